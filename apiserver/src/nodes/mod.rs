//! Nodes: who they are, whether they live, and the one stream of each.
//!
//! [`register`] makes Node objects and gives address ranges ([`ranges`]: which are given); [`session`] is one agent's stream ([`sources`]: the ConfigMaps and Secrets on it); [`contact`] notices silence;
//! [`routes`] tells nodes of each other.

pub mod cidr;
pub mod contact;
pub mod pressure;
mod ranges;
pub mod register;
pub mod routes;
pub mod session;
pub mod sources;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use minipod_daemon::metrics::{Gauge, Registry as Metrics};
use minipod_proto::v1::{OpenStream, ServerMessage, server_message};
use tokio::sync::{mpsc, watch};

use crate::{cache::Cache, error::ApiError};

/// Messages that wait for a session's stream besides pods: acknowledgements of a burst of reports.
const CONTROL: usize = 256;

/// How a replica is known to the others.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Different with every start.
    pub id: String,
    /// Where clients reach it.
    pub address: String,
}

/// The sessions that this server holds, and when each node was last heard of.
pub struct Sessions {
    identity: Identity,
    cache: Arc<Cache>,
    /// At most one a node.
    open: Mutex<HashMap<String, Handle>>,
    /// Last contact, by our own monotonic clock.
    contacts: Mutex<HashMap<String, Instant>>,
    next: Mutex<u64>,
    count: Arc<Gauge>,
}

struct Handle {
    id: u64,
    control: mpsc::Sender<ServerMessage>,
    /// Set to true when another session of the node begins.
    replaced: watch::Sender<bool>,
}

/// One session's place. Dropping it gives the place up.
pub struct Place {
    sessions: Arc<Sessions>,
    /// The node.
    pub node: String,
    id: u64,
    /// Messages that others want to send on the stream.
    pub control: mpsc::Receiver<ServerMessage>,
    /// For messages of one's own.
    pub sender: mpsc::Sender<ServerMessage>,
    /// Becomes true when another session takes the place.
    pub replaced: watch::Receiver<bool>,
}

impl Sessions {
    /// No sessions yet.
    pub fn new(identity: Identity, cache: Arc<Cache>, metrics: &Metrics) -> Arc<Sessions> {
        Arc::new(Sessions {
            identity,
            cache,
            open: Mutex::default(),
            contacts: Mutex::default(),
            next: Mutex::default(),
            count: metrics.gauge("minipod_node_sessions", &[], "Sessions of node agents held by this server."),
        })
    }

    /// Takes the node's place; a session that has it ends.
    pub fn open(self: &Arc<Sessions>, node: &str) -> Place {
        let id = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next += 1;
            *next
        };
        let (sender, control) = mpsc::channel(CONTROL);
        let (replaced, receiver) = watch::channel(false);
        let handle = Handle { id, control: sender.clone(), replaced };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = open.insert(node.to_owned(), handle) {
            old.replaced.send_replace(true);
        }
        self.count.set(i64::try_from(open.len()).unwrap_or(i64::MAX));
        drop(open);
        self.touch(node);
        Place { sessions: Arc::clone(self), node: node.to_owned(), id, control, sender, replaced: receiver }
    }

    /// The node was heard of.
    pub fn touch(&self, node: &str) {
        let mut contacts = self.contacts.lock().unwrap_or_else(PoisonError::into_inner);
        match contacts.get_mut(node) {
            Some(at) => *at = Instant::now(),
            None => drop(contacts.insert(node.to_owned(), Instant::now())),
        }
    }

    /// How long a node has been silent towards all servers. A node that is seen for the first time is not silent yet.
    fn silence(&self, node: &str, now: Instant) -> Duration {
        let ours = *self.contacts.lock().unwrap_or_else(PoisonError::into_inner).entry(node.to_owned()).or_insert(now);
        let theirs = self.cache.contact_elsewhere(node, &self.identity.id);
        now.saturating_duration_since(theirs.map_or(ours, |theirs| theirs.max(ours)))
    }

    fn forget(&self, keep: impl Fn(&str) -> bool) {
        self.contacts.lock().unwrap_or_else(PoisonError::into_inner).retain(|node, _| keep(node));
    }

    /// Nodes with a session here.
    pub fn nodes(&self) -> Vec<String> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let mut nodes: Vec<String> = open.keys().cloned().collect();
        nodes.sort();
        nodes
    }

    /// Asks a node's agent to open a stream.
    ///
    /// # Errors
    /// When the node has no session here; the error says where it has one.
    pub async fn ask(&self, node: &str, open: OpenStream) -> Result<(), ApiError> {
        let control = {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.get(node).map(|handle| handle.control.clone())
        };
        let message = ServerMessage { message: Some(server_message::Message::OpenStream(open)) };
        if let Some(control) = control
            && control.send(message).await.is_ok()
        {
            return Ok(());
        }
        let elsewhere = self
            .cache
            .replicas()
            .into_iter()
            .find(|(id, seen)| *id != self.identity.id && seen.nodes.iter().any(|known| known == node));
        Err(ApiError::Unavailable(match elsewhere {
            Some((_, seen)) => {
                format!("node {node} has its session with the API server at {}; ask that one", seen.address)
            }
            None => format!("node {node} has no session: its agent is not connected"),
        }))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.sessions.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.get(&self.node).is_some_and(|handle| handle.id == self.id) {
            open.remove(&self.node);
        }
        self.sessions.count.set(i64::try_from(open.len()).unwrap_or(i64::MAX));
    }
}
