//! The one long stream to the API server: register, hello, snapshot, then changes in and reports out; again and again.
//!
//! The pods of the node never wait for it: what comes in is handed to [`crate::pods::Pods`], what goes out waits in the
//! [`Outbox`](crate::outbox::Outbox) until it is acknowledged.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use minipod_client::Servers;
use minipod_daemon::backoff::Backoff;
use minipod_proto::references::{Reference, references};
use minipod_proto::v1::agent_message::Message as Out;
use minipod_proto::v1::nodes_client::NodesClient;
use minipod_proto::v1::server_message::Message as In;
use minipod_proto::v1::{AgentHello, AgentMessage, Heartbeat, Pod, RegisterRequest, RegisterResponse, ServerMessage};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

use crate::agent::Agent;
use crate::want::key_of;

/// Messages between the session and the connection: a few, so that a stalled connection holds the reports back in the
/// outbox, where newer ones replace them.
const SEND_QUEUE: usize = 16;
/// First and longest wait before the API servers are tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// A session that lived for so long shows that the servers are well.
const LIVED: Duration = Duration::from_secs(10);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// HTTP/2 pings find a half-open connection, or a server that is stopped, within two of these.
const KEEPALIVE: Duration = Duration::from_secs(4);
/// Largest message of the API server: a snapshot of a full node's pods.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// An address of `--server` cannot be used.
    #[error("API server address {0:?}")]
    Address(String, #[source] tonic::transport::Error),
    /// No connection.
    #[error("connect to the API server")]
    Connect(#[source] tonic::transport::Error),
    /// The API server refused, or the connection broke.
    #[error("{operation}: {}", status.message())]
    Call {
        /// What was tried.
        operation: &'static str,
        /// The answer.
        status: Box<tonic::Status>,
    },
    /// The connection says nothing.
    #[error("the API server was silent for {0} ms")]
    Silent(u128),
    /// The API server gave something that cannot be used.
    #[error("registration: {0}")]
    Registration(String),
}

fn call(operation: &'static str) -> impl FnOnce(tonic::Status) -> SessionError {
    move |status| SessionError::Call { operation, status: Box::new(status) }
}

/// Which API server is next, and how long to wait before.
#[derive(Debug)]
struct Rotation {
    servers: Vec<String>,
    /// The one in use.
    at: usize,
    /// How many have failed since one was well, or since the last pause.
    failed: usize,
    pauses: Backoff,
}

impl Rotation {
    /// Every node has an order of its own: nodes are spread over the servers, and those of one that dies over all the others.
    fn new(servers: &Servers, node: &str) -> Rotation {
        let mut servers = servers.as_slice().to_vec();
        servers.sort_by_cached_key(|server| {
            let mut hasher = DefaultHasher::new();
            (node, server).hash(&mut hasher);
            hasher.finish()
        });
        Rotation { servers, at: 0, failed: 0, pauses: Backoff::new(RETRY.0, RETRY.1) }
    }

    fn current(&self) -> &str {
        &self.servers[self.at]
    }

    /// The session with the current server ended, or did not come to be: the next server is the current one, after the wait.
    fn leave(&mut self, lived: bool) -> Duration {
        if lived {
            self.failed = 0;
            self.pauses.reset();
        }
        self.failed += 1;
        self.at = (self.at + 1) % self.servers.len();
        if self.failed < self.servers.len() {
            // Another one may be well; the first wait is there for its jitter, so that a thousand agents do not come at one moment.
            return Backoff::new(RETRY.0, RETRY.0).next_wait();
        }
        self.failed = 0;
        self.pauses.next_wait()
    }
}

/// Keeps a session with one of the API servers until the future is dropped.
pub async fn run(agent: Arc<Agent>) {
    let mut rotation = Rotation::new(&agent.config.server, &agent.name);
    let mut last_error = String::new();
    loop {
        let (began, server) = (Instant::now(), rotation.current().to_owned());
        let error = session(&agent, &server).await;
        agent.connected(false);
        let text = format!("{server}: {}", crate::report::chain(&error));
        if text == last_error {
            tracing::debug!(error = %text, "session ended");
        } else {
            tracing::warn!(error = %text, "session with the API server ended, pods run on");
            last_error = text;
        }
        sleep(rotation.leave(began.elapsed() > LIVED)).await;
    }
}

/// A lazily connected channel with the agent's timeouts.
///
/// # Errors
/// [`SessionError::Address`].
pub fn endpoint(server: &str) -> Result<Endpoint, SessionError> {
    let wrong = |error| SessionError::Address(server.to_owned(), error);
    Ok(Endpoint::from_shared(server.to_owned())
        .map_err(wrong)?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .keep_alive_while_idle(true))
}

/// One session from connecting to its end.
async fn session(agent: &Arc<Agent>, server: &str) -> SessionError {
    match try_session(agent, server).await {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

async fn try_session(agent: &Arc<Agent>, server: &str) -> Result<std::convert::Infallible, SessionError> {
    let channel = endpoint(server)?.connect().await.map_err(SessionError::Connect)?;
    let mut client = NodesClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let registered = register(agent, &mut client).await?;
    let heartbeat_ms = u64::try_from(registered.heartbeat_interval_ms).unwrap_or(0).clamp(100, 60_000);

    let (sender, receiver) = mpsc::channel(SEND_QUEUE);
    let hello = AgentHello {
        node: agent.name.clone(),
        boot_id: agent.machine.info.boot_id.clone(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    // The channel was just made: it has room.
    let _ = sender.send(wrap(Out::Hello(hello))).await;
    let open = client.session(ReceiverStream::new(receiver));
    let response = timeout(CONNECT_TIMEOUT, open)
        .await
        .map_err(|_| SessionError::Silent(CONNECT_TIMEOUT.as_millis()))?
        .map_err(call("open session"))?;
    agent.outbox.rewind();
    agent.sources.begin();
    agent.send_changed_node_status();
    agent.connected(true);
    tracing::info!(server, "session with the API server is up");
    serve(agent, server, response.into_inner(), sender, heartbeat_ms).await
}

async fn register(agent: &Arc<Agent>, client: &mut NodesClient<Channel>) -> Result<RegisterResponse, SessionError> {
    let request = RegisterRequest { node: Some(agent.node_object()) };
    let registered = timeout(CONNECT_TIMEOUT, client.register(request))
        .await
        .map_err(|_| SessionError::Silent(CONNECT_TIMEOUT.as_millis()))?
        .map_err(call("register node"))?
        .into_inner();
    agent.use_pod_cidr(&registered.pod_cidr).await.map_err(SessionError::Registration)?;
    Ok(registered)
}

fn wrap(message: Out) -> AgentMessage {
    AgentMessage { message: Some(message) }
}

/// Both directions of an open session.
async fn serve(
    agent: &Arc<Agent>,
    server: &str,
    mut incoming: tonic::Streaming<ServerMessage>,
    sender: mpsc::Sender<AgentMessage>,
    heartbeat_ms: u64,
) -> Result<std::convert::Infallible, SessionError> {
    let mut heartbeats = interval(Duration::from_millis(heartbeat_ms));
    heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let patience = Duration::from_millis(heartbeat_ms * 3).max(Duration::from_secs(3));
    let mut last_heard = Instant::now();
    let mut sequence = 0;
    loop {
        tokio::select! {
            // Cancel safe: `message` keeps a partly read frame in the stream.
            message = incoming.message() => {
                let message = message.map_err(call("session"))?;
                let ended = || tonic::Status::unavailable("the API server ended the session");
                last_heard = Instant::now();
                receive(agent, server, message.ok_or_else(ended).map_err(call("session"))?).await;
            }
            // Cancel safe: the outbox keeps the wake-up; a message is only taken once there is room for it.
            permit = next_to_send(agent, &sender) => match permit {
                Some((permit, message)) => permit.send(wrap(message)),
                None => return Err(call("session")(tonic::Status::unavailable("the connection is gone"))),
            },
            // Cancel safe: a tick that is not taken comes again.
            _ = heartbeats.tick() => {
                if last_heard.elapsed() > patience {
                    return Err(SessionError::Silent(last_heard.elapsed().as_millis()));
                }
                sequence += 1;
                agent.refresh_node_status();
                agent.note_metrics();
                // A full queue means that the connection stalls: silence will end the session.
                let _ = sender.try_send(wrap(Out::Heartbeat(Heartbeat { sequence })));
            }
        }
    }
}

/// Room in the queue and what to put there. `None` when the connection is gone.
async fn next_to_send<'a>(
    agent: &Agent,
    sender: &'a mpsc::Sender<AgentMessage>,
) -> Option<(mpsc::Permit<'a, AgentMessage>, Out)> {
    loop {
        let permit = sender.reserve().await.ok()?;
        if let Some(message) = agent.outbox.next() {
            return Some((permit, message));
        }
        drop(permit);
        agent.outbox.changed().await;
    }
}

async fn refresh_users(agent: &Arc<Agent>, namespace: String, reference: Reference) {
    // Before the snapshot not everything is known yet; it refreshes all.
    if agent.sources.is_settled() {
        let uses = move |pod: &Pod| key_of(pod).0 == namespace && references(pod).contains(&reference);
        refresh(agent, uses).await;
    }
}

/// One at a time, because the next message waits for it.
async fn refresh(agent: &Arc<Agent>, concerns: impl Fn(&Pod) -> bool + Send + 'static) {
    let agent = agent.clone();
    // An error means that the agent is ending.
    let _ = tokio::task::spawn_blocking(move || agent.refresh_volumes(concerns)).await;
}

async fn receive(agent: &Arc<Agent>, server: &str, message: ServerMessage) {
    match message.message {
        Some(In::Snapshot(list)) => {
            agent.sources.settle();
            agent.pods.snapshot(list.items);
            refresh(agent, |_| true).await;
            if !agent.strays_removed.swap(true, Ordering::Relaxed) {
                let agent = agent.clone();
                tokio::task::spawn_blocking(move || crate::recover::remove_strays(&agent));
            }
        }
        Some(In::PodUpsert(pod)) => {
            let uid = pod.metadata.as_ref().map(|meta| meta.uid.clone()).unwrap_or_default();
            let shows_itself = pod.spec().volumes.iter().any(crate::projection::is_projection);
            agent.pods.upsert(pod);
            if shows_itself {
                refresh(agent, move |pod| pod.metadata.as_ref().is_some_and(|meta| meta.uid == uid)).await;
            }
        }
        Some(In::ConfigMap(map)) => {
            agent.sources.config_map(&map);
            let meta = map.metadata.unwrap_or_default();
            refresh_users(agent, meta.namespace, Reference::ConfigMap(meta.name)).await;
        }
        Some(In::Secret(secret)) => {
            agent.sources.secret(&secret);
            let meta = secret.metadata.unwrap_or_default();
            refresh_users(agent, meta.namespace, Reference::Secret(meta.name)).await;
        }
        // Volumes keep what they have, as in Kubernetes; containers that are to start wait.
        Some(In::SourceGone(gone)) => agent.sources.gone(&gone),
        Some(In::PodGone(gone)) => agent.pods.gone(&gone),
        Some(In::PodStatusAck(ack)) => {
            if let Some(settled) = agent.outbox.acknowledge(&ack)
                && !settled.error.is_empty()
            {
                tracing::warn!(pod = %settled.uid, error = settled.error, "the API server refused a status report");
            }
        }
        Some(In::Heartbeat(_)) | None => {}
        Some(In::OpenStream(open)) => crate::streams::open(agent, server, open),
        Some(In::Routes(routes)) => agent.use_routes(routes).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotation(servers: &str, node: &str) -> Rotation {
        Rotation::new(&servers.parse().expect("servers"), node)
    }

    const THREE: &str = "http://a:1,http://b:1,http://c:1";

    #[test]
    fn the_next_server_is_tried_soon_and_all_of_them_ever_less_often() {
        let mut rotation = rotation(THREE, "node");
        let order: Vec<String> = (0..3).map(|at| rotation.servers[at].clone()).collect();
        let first = RETRY.0;
        // The longest wait after each failure: two steps to the others, then the pause, which doubles.
        for (step, longest) in
            [first, first, first, first, first, first * 2, first, first, first * 4].into_iter().enumerate()
        {
            assert_eq!(rotation.current(), order[step % 3], "step {step}");
            let wait = rotation.leave(false);
            assert!(wait >= longest / 2 && wait <= longest, "step {step}: {wait:?} of {longest:?}");
        }
        // A server that was well for a while begins it all again.
        for lived in [true, false, false] {
            assert!(rotation.leave(lived) <= first);
        }
        (0..60).for_each(|_| assert!(rotation.leave(false) <= RETRY.1));
    }

    #[test]
    fn a_lone_server_is_tried_ever_less_often() {
        let mut rotation = rotation("http://a:1", "node");
        for longest in [1, 2, 4, 8, 16, 32, 50, 50].map(|times| RETRY.0 * times) {
            let wait = rotation.leave(false);
            assert!(wait >= longest / 2 && wait <= longest, "{wait:?} of {longest:?}");
        }
    }

    #[test]
    fn nodes_are_spread_and_so_are_those_of_a_server_that_dies() {
        let (mut first, mut second) = ([0; 3], [[0; 3]; 3]);
        let place = |server: &str| usize::from(server.as_bytes()["http://".len()] - b'a');
        for node in 0..300 {
            let mut rotation = rotation(THREE, &format!("node-{node}"));
            let begin = place(rotation.current());
            first[begin] += 1;
            rotation.leave(true);
            second[begin][place(rotation.current())] += 1;
        }
        assert!(first.iter().all(|nodes| *nodes > 60), "{first:?}");
        for (dead, next) in second.iter().enumerate() {
            let others = (0..3).filter(|other| *other != dead);
            assert!(others.into_iter().all(|other| next[other] > 20) && next[dead] == 0, "{second:?}");
        }
    }
}
