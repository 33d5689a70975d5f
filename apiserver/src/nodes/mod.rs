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
use prost::Message;
use tokio::sync::{mpsc, watch};

use crate::{
    cache::{Cache, SessionRecord},
    error::ApiError,
    keys,
    storage::{Guard, Outcome, Storage, Write},
};

/// Messages that wait for a session's stream besides pods: acknowledgements of a burst of reports.
const CONTROL: usize = 256;

/// How a replica is known to the others.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Different with every start.
    pub id: String,
    /// Where clients reach it.
    pub address: String,
    /// Where other API servers pass requests on to it.
    pub relay: String,
    /// What they show there. Different with every start.
    pub key: String,
}

impl Identity {
    /// Of a server that starts.
    #[must_use]
    pub fn new(address: String, relay: String) -> Identity {
        let random = || uuid::Uuid::new_v4().to_string();
        Identity { id: random(), address, relay, key: random() }
    }
}

/// The sessions that this server holds, and when each node was last heard of.
pub struct Sessions {
    identity: Identity,
    cache: Arc<Cache>,
    /// At most one a node.
    open: Mutex<HashMap<String, Handle>>,
    /// Last contact, by our own monotonic clock.
    contacts: Mutex<HashMap<String, Instant>>,
    count: Arc<Gauge>,
}

struct Handle {
    /// The revision of its begin.
    revision: i64,
    control: mpsc::Sender<ServerMessage>,
    /// Told why the session must end.
    end: watch::Sender<Option<Ending>>,
}

/// Why a session must end that its agent would go on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Another one of the node has begun here.
    Replaced,
    /// This server cannot reach its store; another one may.
    NoStore,
}

/// One session's place. Dropping it gives the place up.
pub struct Place {
    sessions: Arc<Sessions>,
    /// The node.
    pub node: String,
    revision: i64,
    /// Messages that others want to send on the stream.
    pub control: mpsc::Receiver<ServerMessage>,
    /// For messages of one's own.
    pub sender: mpsc::Sender<ServerMessage>,
    /// Becomes the reason why the session must end.
    pub end: watch::Receiver<Option<Ending>>,
}

impl Sessions {
    /// No sessions yet.
    pub fn new(identity: Identity, cache: Arc<Cache>, metrics: &Metrics) -> Arc<Sessions> {
        Arc::new(Sessions {
            identity,
            cache,
            open: Mutex::default(),
            contacts: Mutex::default(),
            count: metrics.gauge("minipod_node_sessions", &[], "Sessions of node agents held by this server."),
        })
    }

    /// Writes into the store that a node's session begins here; answers the guard that holds until another one begins.
    ///
    /// # Errors
    /// What the store says.
    pub async fn claim(&self, storage: &Storage, node: &str) -> Result<Guard, ApiError> {
        let Identity { id, relay, key, .. } = &self.identity;
        let record = SessionRecord { replica: id.clone(), relay: relay.clone(), key: key.clone() };
        let write = Write::Put(keys::session(node), record.encode_to_vec());
        match storage.txn(Vec::new(), vec![write]).await? {
            Outcome::Done { revision } => Ok(Guard::new(keys::session(node), revision)),
            // Nothing was guarded.
            Outcome::Lost { .. } => Err(ApiError::Unavailable(format!("the session of node {node} was not written"))),
        }
    }

    /// Takes the node's place for the session that began at that revision; an earlier one that has it ends.
    ///
    /// # Errors
    /// When a later one has it.
    pub fn open(self: &Arc<Sessions>, node: &str, revision: i64) -> Result<Place, ApiError> {
        let (sender, control) = mpsc::channel(CONTROL);
        let (end, receiver) = watch::channel(None);
        let handle = Handle { revision, control: sender.clone(), end };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.get(node).is_some_and(|other| other.revision > revision) {
            return Err(ApiError::Overtaken(format!("another session of node {node} has begun")));
        }
        if let Some(old) = open.insert(node.to_owned(), handle) {
            old.end.send_replace(Some(Ending::Replaced));
        }
        self.count.set(i64::try_from(open.len()).unwrap_or(i64::MAX));
        drop(open);
        self.touch(node);
        Ok(Place { sessions: Arc::clone(self), node: node.to_owned(), revision, control, sender, end: receiver })
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

    /// Ends all sessions: their agents go to other servers.
    fn end_all(&self, why: Ending) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        for handle in open.values() {
            handle.end.send_replace(Some(why));
        }
    }

    /// This server could not listen for a while: nobody's silence in that time counts.
    fn listen_anew(&self) {
        let now = Instant::now();
        self.contacts.lock().unwrap_or_else(PoisonError::into_inner).values_mut().for_each(|at| *at = now);
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

    /// Where a node's session is, as far as is known here.
    pub fn way(&self, node: &str) -> Way {
        let here = {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.get(node).map(|handle| handle.revision)
        };
        let stored = self.cache.session_of(node).map(|seen| (seen.record, seen.revision));
        way(here, stored, &self.identity.id)
    }

    /// Asks a node's agent to open a stream; `false`: the node has no session here.
    pub async fn ask(&self, node: &str, open: OpenStream) -> bool {
        let control = {
            let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            open.get(node).map(|handle| handle.control.clone())
        };
        let message = ServerMessage { message: Some(server_message::Message::OpenStream(open)) };
        match control {
            Some(control) => control.send(message).await.is_ok(),
            None => false,
        }
    }

    /// Who this server is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }
}

/// Where a node's session is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// This server holds it.
    Here,
    /// Another one does, or did last.
    There(Arc<SessionRecord>),
    /// Nobody does.
    Nowhere,
}

/// The later begin counts: of the session that is open here, and of the one in the store (which is seen a little later).
fn way(here: Option<i64>, stored: Option<(Arc<SessionRecord>, i64)>, own: &str) -> Way {
    match (here, stored) {
        (Some(here), Some((_, stored))) if here >= stored => Way::Here,
        (_, Some((record, _))) if record.replica != own => Way::There(record),
        (Some(_), _) => Way::Here,
        (None, _) => Way::Nowhere,
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.sessions.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.get(&self.node).is_some_and(|handle| handle.revision == self.revision) {
            open.remove(&self.node);
        }
        self.sessions.count.set(i64::try_from(open.len()).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_later_begin_is_where_the_session_is() {
        let record = |replica: &str| Arc::new(SessionRecord { replica: replica.into(), ..SessionRecord::default() });
        let there = || Way::There(record("other"));
        for (here, stored, found) in [
            (None, None, Way::Nowhere),
            // Its own, before its last restart or as long as it takes to be gone from the store.
            (None, Some(("own", 5)), Way::Nowhere),
            (None, Some(("other", 5)), there()),
            // Begun here, and not seen in the store yet.
            (Some(5), None, Way::Here),
            (Some(5), Some(("other", 4)), Way::Here),
            (Some(5), Some(("own", 5)), Way::Here),
            // A session that has moved on while this server did not run.
            (Some(5), Some(("other", 6)), there()),
            // The next one here, which takes the place in a moment.
            (Some(5), Some(("own", 6)), Way::Here),
        ] {
            let stored = stored.map(|(replica, revision)| (record(replica), revision));
            assert_eq!(way(here, stored.clone(), "own"), found, "{here:?} {stored:?}");
        }
    }
}
