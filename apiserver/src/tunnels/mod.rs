//! Tunnels: a user's stream and an agent's stream meet here.
//!
//! A node listens on nothing. Whoever wants something of it leaves a fresh id and waits; the session tells the agent the id; the
//! agent opens a stream that begins with it. Frames then flow through small bounded queues, so that a slow end slows the other one.
//! What another API server holds the session for is passed on to that one ([`relay`]).

pub mod relay;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use minipod_proto::{
    Kind,
    v1::{OpenStream, TunnelEnd, TunnelFrame, open_stream, tunnel_frame::Frame},
};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::{
    cache::Cache,
    error::ApiError,
    nodes::{Identity, Sessions, Way},
};
use relay::{Dialer, Missed};

/// An agent opens its stream within this time.
const ARRIVAL: Duration = Duration::from_secs(10);
/// Frames on their way to an agent; of 64 KiB, they are a megabyte.
const FRAMES: usize = 16;
/// An agent whose API server has died has its next session within a fraction of this.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(50);
/// Requests that wait for their agents at once.
const WAITING: usize = 1_024;

/// The two ends of an agent's stream.
#[derive(Debug)]
pub struct Tunnel {
    inbound: Streaming<TunnelFrame>,
    /// Frames to the agent.
    pub outbound: mpsc::Sender<Result<TunnelFrame, Status>>,
    /// The node, for errors.
    pub node: String,
}

/// Where streams meet.
pub struct Tunnels {
    sessions: Arc<Sessions>,
    cache: Arc<Cache>,
    dialer: Dialer,
    waiting: Mutex<HashMap<String, oneshot::Sender<Ends>>>,
}

type Ends = (Streaming<TunnelFrame>, mpsc::Sender<Result<TunnelFrame, Status>>);

/// Takes the id back when the request is given up.
struct Waiting<'a> {
    tunnels: &'a Tunnels,
    id: String,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.tunnels.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

impl Tunnels {
    /// Over the sessions that agents are asked through, here and at other servers.
    pub fn new(sessions: Arc<Sessions>, cache: Arc<Cache>, dialer: Dialer) -> Arc<Tunnels> {
        Arc::new(Tunnels { sessions, cache, dialer, waiting: Mutex::default() })
    }

    /// Who this server is.
    pub fn identity(&self) -> &Identity {
        self.sessions.identity()
    }

    /// Asks a node for a stream and waits for it, wherever the node has its session. One that is between two sessions is waited for.
    ///
    /// # Errors
    /// When the node has no session anywhere, or does not open a stream.
    pub async fn open(&self, node: &str, request: open_stream::Request, pod_uid: &str) -> Result<Tunnel, ApiError> {
        let begun = Instant::now();
        loop {
            let missed = match self.sessions.way(node) {
                Way::Here => match self.open_here(node, request.clone(), pod_uid).await? {
                    Some(tunnel) => return Ok(tunnel),
                    None => "its session has just ended".to_owned(),
                },
                Way::There(record) => {
                    let open = OpenStream {
                        stream_id: String::new(),
                        request: Some(request.clone()),
                        pod_uid: pod_uid.to_owned(),
                    };
                    match self.dialer.relay(&record, node, open).await {
                        Ok(tunnel) => return Ok(tunnel),
                        Err(Missed::Failed(status)) => return Err(ApiError::Relayed(Box::new(status))),
                        Err(Missed::Elsewhere(why)) => format!("its agent is not connected any more: {why}"),
                    }
                }
                Way::Nowhere => "its agent is not connected".to_owned(),
            };
            if begun.elapsed() > PATIENCE || !self.is_ready(node) {
                return Err(ApiError::Unavailable(format!("node {node} has no session: {missed}")));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// A node that has been silent for long is not waited for.
    fn is_ready(&self, node: &str) -> bool {
        let entry = self.cache.get(Kind::Node, node);
        entry.is_some_and(|entry| entry.object.as_node().is_some_and(|node| node.is_ready()))
    }

    /// Asks a node that has its session here; `None`: it has not.
    ///
    /// # Errors
    /// When the node does not open a stream.
    async fn open_here(
        &self,
        node: &str,
        request: open_stream::Request,
        pod_uid: &str,
    ) -> Result<Option<Tunnel>, ApiError> {
        let id = uuid::Uuid::new_v4().to_string();
        let (sender, receiver) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.len() >= WAITING {
                return Err(ApiError::TooLarge(format!("{WAITING} requests wait for nodes already; try again later")));
            }
            waiting.insert(id.clone(), sender);
        }
        let _given_up = Waiting { tunnels: self, id: id.clone() };
        let open = OpenStream { stream_id: id, request: Some(request), pod_uid: pod_uid.to_owned() };
        if !self.sessions.ask(node, open).await {
            return Ok(None);
        }
        match tokio::time::timeout(ARRIVAL, receiver).await {
            Ok(Ok((inbound, outbound))) => Ok(Some(Tunnel { inbound, outbound, node: node.to_owned() })),
            _ => {
                Err(ApiError::Unavailable(format!("node {node} did not open a stream within {} s", ARRIVAL.as_secs())))
            }
        }
    }

    /// An agent's stream has come.
    ///
    /// # Errors
    /// When nobody waits for it.
    pub async fn arrive(
        &self,
        mut inbound: Streaming<TunnelFrame>,
    ) -> Result<ReceiverStream<Result<TunnelFrame, Status>>, ApiError> {
        let first = tokio::time::timeout(ARRIVAL, inbound.message()).await;
        let Ok(Ok(Some(TunnelFrame { frame: Some(Frame::Open(id)) }))) = first else {
            return Err(ApiError::Invalid("frame: a tunnel begins with open and the id of the OpenStream".into()));
        };
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        let nobody = || ApiError::Precondition("open: nobody waits for this stream (any more)".into());
        let (outbound, receiver) = mpsc::channel(FRAMES);
        waiting.ok_or_else(nobody)?.send((inbound, outbound)).map_err(|_| nobody())?;
        Ok(ReceiverStream::new(receiver))
    }
}

impl Tunnel {
    /// The agent's next frame. Cancel safe.
    ///
    /// # Errors
    /// When the agent ends the request with an error, or the stream breaks.
    pub async fn next(&mut self) -> Result<Option<Frame>, Status> {
        loop {
            match self.inbound.message().await {
                Ok(Some(TunnelFrame { frame: Some(Frame::End(TunnelEnd { code, message })) })) => {
                    return if code == 0 { Ok(None) } else { Err(Status::new(Code::from_i32(code), message)) };
                }
                Ok(Some(TunnelFrame { frame: Some(frame) })) => return Ok(Some(frame)),
                Ok(Some(TunnelFrame { frame: None })) => {}
                Ok(None) => {
                    return Err(Status::unavailable(format!("the stream from node {} has ended early", self.node)));
                }
                Err(status) => {
                    let text = status.message();
                    return Err(Status::unavailable(format!("the stream from node {} broke: {text}", self.node)));
                }
            }
        }
    }
}

/// A frame as it is sent.
pub fn frame(frame: Frame) -> Result<TunnelFrame, Status> {
    Ok(TunnelFrame { frame: Some(frame) })
}
