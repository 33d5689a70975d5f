//! Replicas talking to each other: one long stream of messages a direction, snapshots on streams of their own.
//!
//! [`Links`] sends and never waits: every member has a bounded queue and a task that empties it. [`server`] receives.

mod link;
pub mod server;
pub mod tls;

#[allow(missing_docs, clippy::all, reason = "made from proto/peer.proto, which has the words")]
pub mod proto {
    tonic::include_proto!("minipod.store.peer.v1");
}

use crate::machine::{Member, MemberError, ProposeError};
use crate::records::{ChangeRecord, MemberRecord};
use crate::refused::Refused;
use crate::replica::inbox::{Inbox, Input};
use crate::replica::run::{ChangeAtLeader, Transport, with_causes};
use crate::snapshot::Snapshots;
use crate::wal::Identity;
use prost::Message as _;
use proto::peer_client::PeerClient;
use raft::eraftpb::{Message, MessageType};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tls::PeerTls;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// The version of the protocol. Members of different versions refuse each other.
pub const VERSION: &str = "1";
/// A member's queue: raft has at most 256 appends under way to a member, and as many small messages again.
const QUEUE: usize = 512;
/// Frames and pieces are smaller than this; raft's largest message is a little over its limit for one, and one command may be 16 MiB.
const MAX_FRAME: usize = 64 << 20;
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(2);
/// A peer that does not answer a ping for so long is gone, even if its kernel is not.
const ALIVE: Duration = Duration::from_secs(5);
/// How long a call that is no stream may take.
const CALL: Duration = Duration::from_secs(10);

/// The ways to all other members.
pub struct Links {
    identity: Identity,
    tls: Option<PeerTls>,
    inbox: Arc<Inbox>,
    snapshots: Snapshots,
    runtime: Handle,
    links: Mutex<HashMap<u64, Link>>,
}

struct Link {
    urls: Vec<String>,
    queue: mpsc::Sender<Message>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Links {
    /// The ways from this member to `members`, until the replica names others. `runtime` runs their tasks.
    #[must_use]
    pub fn new(
        identity: Identity,
        tls: Option<PeerTls>,
        inbox: Arc<Inbox>,
        snapshots: Snapshots,
        runtime: Handle,
        members: Vec<Member>,
    ) -> Arc<Self> {
        let links = Arc::new(Self { identity, tls, inbox, snapshots, runtime, links: Mutex::default() });
        links.connect(members);
        links
    }

    /// Keeps the links to members that are as before, ends those to others, and begins new ones.
    fn connect(&self, members: Vec<Member>) {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted: HashMap<u64, Vec<String>> = members
            .into_iter()
            .filter(|member| member.id != self.identity.member_id)
            .map(|member| (member.id, member.peer_urls))
            .collect();
        links.retain(|id, link| wanted.get(id).is_some_and(|urls| *urls == link.urls));
        for (id, urls) in wanted {
            links.entry(id).or_insert_with(|| {
                let (queue, messages) = mpsc::channel(QUEUE);
                let sender = link::Sender {
                    identity: self.identity,
                    tls: self.tls.clone(),
                    to: id,
                    urls: urls.clone(),
                    inbox: Arc::clone(&self.inbox),
                    snapshots: self.snapshots.clone(),
                };
                Link { urls, queue, task: self.runtime.spawn(sender.run(messages)) }
            });
        }
    }
}

impl Transport for Links {
    fn send(&self, messages: Vec<Message>) {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        for message in messages {
            let (to, is_snapshot) = (message.to, message.get_msg_type() == MessageType::MsgSnapshot);
            let sent = links.get(&to).is_some_and(|link| link.queue.try_send(message).is_ok());
            if !sent {
                self.inbox.tell(if is_snapshot { Input::SnapshotSent(to, false) } else { Input::Unreachable(to) });
            }
        }
    }

    fn members(&self, members: Vec<Member>) {
        self.connect(members);
    }

    fn change_at_leader(&self, leader: &Member, change: ChangeRecord) -> ChangeAtLeader {
        let (identity, tls, leader) = (self.identity, self.tls.clone(), leader.clone());
        Box::pin(async move {
            let lost = |_| MemberError::from(ProposeError::Timeout);
            let url = leader.peer_urls.first().ok_or(ProposeError::NoLeader)?;
            let channel = connect(url, tls.as_ref()).await.map_err(|_| ProposeError::NoLeader)?;
            let mut request = Request::new(proto::ChangeRequest { change: change.to_bytes() });
            mark(request.metadata_mut(), identity, leader.id);
            let call = client(channel);
            let answer = tokio::time::timeout(CALL, async move { { call }.change(request).await });
            let reply = answer.await.map_err(|_| ProposeError::Timeout)?.map_err(lost)?.into_inner();
            if reply.refused.is_empty() {
                return Ok(());
            }
            let refused = Refused::ALL.iter().copied().find(|refused| refused.to_string() == reply.refused);
            Err(refused.map_or(MemberError::Propose(ProposeError::LeaderChanged), MemberError::Refused))
        })
    }
}

fn client(channel: Channel) -> PeerClient<Channel> {
    PeerClient::new(channel).max_decoding_message_size(MAX_FRAME).max_encoding_message_size(MAX_FRAME)
}

/// Says from whom to whom a call is.
fn mark(metadata: &mut MetadataMap, from: Identity, to: u64) {
    let mut put = |key: &'static str, value: String| {
        if let Ok(value) = MetadataValue::try_from(value) {
            metadata.insert(key, value);
        }
    };
    put("minipod-peer-version", VERSION.to_owned());
    put("minipod-cluster", format!("{:x}", from.cluster_id));
    put("minipod-from", format!("{:x}", from.member_id));
    put("minipod-to", format!("{to:x}"));
}

async fn connect(url: &str, tls: Option<&PeerTls>) -> Result<Channel, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(url.to_owned())?;
    let endpoint = match tls {
        Some(tls) => tls.dial(endpoint)?,
        None => endpoint,
    };
    endpoint
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(ALIVE)
        .keep_alive_timeout(ALIVE)
        .keep_alive_while_idle(true)
        // A snapshot or a batch of appends must not wait for window updates on every piece.
        .initial_stream_window_size(4 << 20)
        .initial_connection_window_size(8 << 20)
        .connect()
        .await
}

/// What a call that failed says. That the other side refuses a certificate shows only among the causes.
fn said(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(cause) => format!("{}: {}", status.message(), with_causes(cause)),
        None => status.message().to_owned(),
    }
}

/// What a member of the cluster says to one that wants to join.
#[derive(Debug, Clone)]
pub struct Introduction {
    /// The cluster.
    pub cluster_id: u64,
    /// Its members.
    pub members: Vec<Member>,
    /// Who says so.
    pub member_id: u64,
}

/// Why a cluster could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum IntroduceError {
    /// Nobody is there.
    #[error("connect to {url}")]
    Connect {
        /// The address.
        url: String,
        /// What happened.
        #[source]
        source: tonic::transport::Error,
    },
    /// Somebody is there and refuses.
    #[error("ask {url} about joining its cluster: {}", said(status))]
    Call {
        /// The address.
        url: String,
        /// The answer.
        status: Box<Status>,
    },
}

/// Asks the member at `url` who belongs to its cluster: with `as_known_here` as far as that member knows, otherwise as of now.
///
/// # Errors
/// When it cannot be reached or refuses.
pub async fn introduce(url: &str, tls: Option<&PeerTls>, as_known_here: bool) -> Result<Introduction, IntroduceError> {
    let channel = connect(url, tls).await.map_err(|source| IntroduceError::Connect { url: url.to_owned(), source })?;
    let mut request = Request::new(proto::IntroduceRequest { as_known_here });
    request.set_timeout(CALL);
    mark(request.metadata_mut(), Identity { cluster_id: 0, member_id: 0 }, 0);
    let reply = client(channel)
        .introduce(request)
        .await
        .map_err(|status| IntroduceError::Call { url: url.to_owned(), status: Box::new(status) })?
        .into_inner();
    let members = reply.members.iter().filter_map(|member| MemberRecord::decode(member.as_slice()).ok());
    let members = members.map(Member::from).collect();
    Ok(Introduction { cluster_id: reply.cluster_id, members, member_id: reply.member_id })
}

/// Has the member `introduction` came from add a learner at these addresses; gives the learner's id.
///
/// # Errors
/// When it cannot be reached or the cluster refuses.
pub async fn ask_to_join(
    url: &str,
    tls: Option<&PeerTls>,
    introduction: &Introduction,
    own_urls: &[String],
) -> Result<u64, IntroduceError> {
    let refused = |status: Status| IntroduceError::Call { url: url.to_owned(), status: Box::new(status) };
    let channel = connect(url, tls).await.map_err(|source| IntroduceError::Connect { url: url.to_owned(), source })?;
    // Nobody else knows this number yet, so nobody can choose the same id at the same time.
    let id = crate::service::random().max(1);
    let member = MemberRecord { id, peer_urls: own_urls.to_vec(), is_learner: true, ..MemberRecord::default() };
    let change = ChangeRecord { kind: crate::records::ChangeKind::Add.into(), member: Some(member) };
    let mut request = Request::new(proto::ChangeRequest { change: change.to_bytes() });
    request.set_timeout(CALL);
    let from = Identity { cluster_id: introduction.cluster_id, member_id: id };
    mark(request.metadata_mut(), from, introduction.member_id);
    let reply = client(channel).change(request).await.map_err(refused)?.into_inner();
    if reply.refused.is_empty() { Ok(id) } else { Err(refused(Status::failed_precondition(reply.refused))) }
}
