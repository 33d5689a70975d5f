//! The receiving side of what replicas say to each other.

use super::proto::peer_server::{Peer, PeerServer};
use super::proto::{
    ChangeReply, ChangeRequest, Frames, IntroduceReply, IntroduceRequest, Piece, SnapshotTaken, TalkEnd,
};
use super::{MAX_FRAME, VERSION};
use crate::machine::{MemberError, Replicator};
use crate::records::{ChangeRecord, MemberRecord};
use crate::replica::run::Replica;
use crate::snapshot::{SnapshotError, Snapshots};
use prost::Message as _;
use raft::eraftpb::{Message, MessageType};
use raft_prost::Message as _;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::mpsc;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

/// Serves other replicas.
#[derive(Debug)]
pub struct PeerService {
    replica: Replica,
    snapshots: Snapshots,
    /// Keeps the files of two snapshots that arrive at once apart.
    arrivals: AtomicU64,
}

impl PeerService {
    /// The service for a tonic server.
    #[must_use]
    pub fn server(replica: Replica, snapshots: Snapshots) -> PeerServer<Self> {
        PeerServer::new(Self { replica, snapshots, arrivals: AtomicU64::new(1) })
            .max_decoding_message_size(MAX_FRAME)
            .max_encoding_message_size(MAX_FRAME)
    }

    /// Refuses calls that are for another cluster, member or version; gives the caller's id.
    fn check(&self, metadata: &MetadataMap) -> Result<u64, Status> {
        let text = |key: &str| metadata.get(key).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let number = |key: &str| {
            u64::from_str_radix(text(key), 16).map_err(|_| {
                Status::invalid_argument(format!("{key} {:?}: it must be a hexadecimal number", text(key)))
            })
        };
        check_version(text("minipod-peer-version"))?;
        let (cluster, from, to) = (number("minipod-cluster")?, number("minipod-from")?, number("minipod-to")?);
        let identity = self.replica.identity();
        if cluster != identity.cluster_id {
            return Err(Status::failed_precondition(format!(
                "this is a member of cluster {:x}, and the caller belongs to cluster {cluster:x}: check --initial-cluster and --join",
                identity.cluster_id
            )));
        }
        if to != identity.member_id {
            return Err(Status::failed_precondition(format!(
                "this is member {:x}, and the caller wants member {to:x}: check the peer addresses of both",
                identity.member_id
            )));
        }
        Ok(from)
    }
}

fn check_version(version: &str) -> Result<(), Status> {
    if version == VERSION {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "this member speaks version {VERSION} of the peer protocol, and the caller speaks {version:?}: run the same release on all members"
    )))
}

fn decode(bytes: &[u8], from: u64) -> Result<Message, Status> {
    let message =
        Message::decode(bytes).map_err(|error| Status::invalid_argument(format!("a raft message: {error}")))?;
    if message.from != from {
        return Err(Status::invalid_argument(format!(
            "a raft message from member {:x} on the link of member {from:x}",
            message.from
        )));
    }
    Ok(message)
}

#[tonic::async_trait]
impl Peer for PeerService {
    async fn talk(&self, request: Request<Streaming<Frames>>) -> Result<Response<TalkEnd>, Status> {
        let from = self.check(request.metadata())?;
        let mut frames = request.into_inner();
        while let Some(frame) = frames.message().await? {
            for bytes in &frame.messages {
                let message = decode(bytes, from)?;
                // A snapshot's message is worth nothing without its file.
                if message.get_msg_type() != MessageType::MsgSnapshot {
                    self.replica.inbox().deliver(message);
                }
            }
        }
        Ok(Response::new(TalkEnd {}))
    }

    async fn snapshot(&self, request: Request<Streaming<Piece>>) -> Result<Response<SnapshotTaken>, Status> {
        let from = self.check(request.metadata())?;
        let mut pieces = request.into_inner();
        let first = pieces.message().await?.ok_or_else(|| Status::invalid_argument("the stream is empty"))?;
        let message = decode(&first.message, from)?;
        let mut incoming = self.snapshots.receive(self.arrivals.fetch_add(1, Ordering::Relaxed)).map_err(failed)?;
        // Four pieces of half a MiB: enough to keep the disk writing.
        let (data, mut arriving) = mpsc::channel::<Vec<u8>>(4);
        let (whole, is_whole) = tokio::sync::oneshot::channel::<()>();
        let writing = tokio::task::spawn_blocking(move || {
            while let Some(data) = arriving.blocking_recv() {
                if let Err(error) = incoming.put(&data) {
                    incoming.discard();
                    return Err(error);
                }
            }
            // A stream that broke ends like one that is complete; only the latter says so.
            if is_whole.blocking_recv().is_err() {
                incoming.discard();
                return Ok(None);
            }
            incoming.finish().map(Some)
        });
        let mut broken = Ok(());
        loop {
            match pieces.message().await {
                Ok(Some(piece)) => {
                    if data.send(piece.data).await.is_err() {
                        // The writer has ended, and says why below.
                        break;
                    }
                }
                Ok(None) => {
                    let _ = whole.send(());
                    break;
                }
                Err(status) => {
                    drop(whole);
                    broken = Err(status);
                    break;
                }
            }
        }
        drop(data);
        let written = writing.await.map_err(|error| Status::internal(error.to_string()))?;
        broken?;
        let meta = written.map_err(failed)?.ok_or_else(|| Status::aborted("the stream broke"))?;
        let announced = message.get_snapshot().get_metadata();
        if (meta.index, meta.term) != (announced.index, announced.term) {
            return Err(Status::invalid_argument("the message announces another snapshot than the file contains"));
        }
        self.replica.inbox().deliver(message);
        Ok(Response::new(SnapshotTaken {}))
    }

    async fn introduce(&self, request: Request<IntroduceRequest>) -> Result<Response<IntroduceReply>, Status> {
        check_version(
            request.metadata().get("minipod-peer-version").and_then(|value| value.to_str().ok()).unwrap_or_default(),
        )?;
        if !request.get_ref().as_known_here {
            // Linearizable: a member that was just added is in it.
            self.replica.read_index().await.map_err(|error| Status::unavailable(error.to_string()))?;
        }
        let members = self.replica.members().into_iter().map(|member| MemberRecord::from(member).encode_to_vec());
        Ok(Response::new(IntroduceReply {
            cluster_id: self.replica.identity().cluster_id,
            members: members.collect(),
            member_id: self.replica.identity().member_id,
        }))
    }

    async fn change(&self, request: Request<ChangeRequest>) -> Result<Response<ChangeReply>, Status> {
        self.check(request.metadata())?;
        let change = ChangeRecord::decode(request.get_ref().change.as_slice())
            .map_err(|error| Status::invalid_argument(format!("a change of the membership: {error}")))?;
        match self.replica.change_here(change).await {
            Ok(members) => {
                let members = members.into_iter().map(|member| MemberRecord::from(member).encode_to_vec()).collect();
                Ok(Response::new(ChangeReply { members, refused: String::new() }))
            }
            Err(MemberError::Refused(refused)) => {
                Ok(Response::new(ChangeReply { members: Vec::new(), refused: refused.to_string() }))
            }
            Err(MemberError::Propose(error)) => Err(Status::unavailable(error.to_string())),
        }
    }
}

fn failed(error: SnapshotError) -> Status {
    tracing::warn!(%error, "receive a snapshot");
    Status::internal(error.to_string())
}
