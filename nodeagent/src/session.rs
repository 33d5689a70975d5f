//! The one long stream to the API server: register, hello, snapshot, then changes in and reports out; again and again.
//!
//! The pods of the node never wait for it: what comes in is handed to [`crate::pods::Pods`], what goes out waits in the
//! [`Outbox`](crate::outbox::Outbox) until it is acknowledged.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

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
/// First and longest wait between two attempts.
const RETRY_MS: (u64, u64) = (100, 5_000);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// HTTP/2 pings find a half-open connection within two of these.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Largest message of the API server: a snapshot of a full node's pods.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// `--server` is not an address.
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

/// Keeps a session with the API server until the future is dropped.
pub async fn run(agent: Arc<Agent>) {
    let mut wait_ms = RETRY_MS.0;
    let mut last_error = String::new();
    loop {
        let began = Instant::now();
        let error = session(&agent).await;
        agent.connected(false);
        // A session that lived shows that the server is well: the next attempt is a first one.
        if began.elapsed() > Duration::from_secs(10) {
            wait_ms = RETRY_MS.0;
        }
        let text = crate::report::chain(&error);
        if text == last_error {
            tracing::debug!(error = %text, "session ended");
        } else {
            tracing::warn!(error = %text, "session with the API server ended, pods run on");
            last_error = text;
        }
        sleep(Duration::from_millis(jittered(wait_ms))).await;
        wait_ms = (wait_ms * 2).min(RETRY_MS.1);
    }
}

/// Between half of `ms` and all of it, so that a thousand agents do not come back at one moment.
fn jittered(ms: u64) -> u64 {
    let noise = u64::from(std::process::id()).wrapping_mul(2_654_435_761).wrapping_add(crate::clock::wall_ms());
    ms / 2 + noise % (ms / 2 + 1)
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
async fn session(agent: &Arc<Agent>) -> SessionError {
    match try_session(agent).await {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

async fn try_session(agent: &Arc<Agent>) -> Result<std::convert::Infallible, SessionError> {
    let channel = endpoint(&agent.config.server)?.connect().await.map_err(SessionError::Connect)?;
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
    tracing::info!(server = %agent.config.server, "session with the API server is up");
    serve(agent, response.into_inner(), sender, heartbeat_ms).await
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
                receive(agent, message.ok_or_else(ended).map_err(call("session"))?).await;
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

async fn receive(agent: &Arc<Agent>, message: ServerMessage) {
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
        Some(In::OpenStream(open)) => crate::streams::open(agent, open),
        Some(In::Routes(routes)) => agent.use_routes(routes).await,
    }
}
