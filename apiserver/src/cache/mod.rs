//! What the store holds, in memory, and who watches it.
//!
//! One task ([`feed`]) follows the store in the order of its revisions and is the only writer. Readers take `Arc`s. Every change is
//! decoded once; what goes over the wire is the store's own bytes with the resourceVersion appended (protobuf merges it), so that
//! an event is never encoded again, however many watch it. Watchers are indexed by node and by namespace.

mod counts;
pub mod feed;
mod known;
mod state;
mod watcher;

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes};
use minipod_daemon::metrics::Registry;
use minipod_proto::{Kind, disruption::Counted, v1::Object};
use tokio::sync::watch;

use known::Known;
pub use known::{Noted, Ready};
use state::State;
pub use state::{Change, ReplicaSummary, SessionRecord};
pub use watcher::{Cut, Delivery, Filter, Subscription};

use crate::{
    error::ApiError,
    ledger::Ledger,
    rules::{
        announced::{Announced, TURNS},
        counter::News,
    },
    storage::Item,
};

/// How long a reader waits for the cache to reach the store's revision. Normally it is there at once.
const CATCH_UP: Duration = Duration::from_secs(5);

/// An object as it was at a revision.
#[derive(Debug)]
pub struct Entry {
    /// Decoded, with its resourceVersion.
    pub object: Object,
    /// `namespace/name` or `name`.
    pub key: String,
    /// The encoded inner message, with its resourceVersion.
    pub inner: Bytes,
    /// The revision of the last write.
    pub revision: i64,
    /// A revision since which the spec is the same. After a start it may be later than the true one, never earlier.
    pub spec_revision: i64,
}

impl Entry {
    /// From the bytes of the store.
    ///
    /// # Errors
    /// When they cannot be decoded.
    pub fn decode(kind: Kind, key: &str, value: &[u8], revision: i64) -> Result<Entry, ApiError> {
        let mut object = Object::decode_inner(kind, value).map_err(|source| ApiError::Corrupt {
            kind: kind.name(),
            key: key.to_owned(),
            source,
        })?;
        if let Some(meta) = object.meta_mut() {
            meta.resource_version = revision.to_string();
        }
        object.shrink_to_fit();
        let inner = with_revision(value, revision);
        Ok(Entry { object, key: key.to_owned(), inner, revision, spec_revision: revision })
    }

    /// From an object and the bytes of the store that it would be decoded from.
    fn ready(kind: Kind, key: &str, mut object: Object, value: Vec<u8>, revision: i64) -> Entry {
        debug_assert_eq!(
            Object::decode_inner(kind, &value).as_ref().ok(),
            Some(&object),
            "{kind} {key}: what was written is not what was noted"
        );
        if let Some(meta) = object.meta_mut() {
            meta.resource_version = revision.to_string();
        }
        object.shrink_to_fit();
        let inner = append_revision(value, revision);
        Entry { object, key: key.to_owned(), inner, revision, spec_revision: revision }
    }

    /// The same object, deleted at a revision.
    fn deleted(&self, revision: i64) -> Entry {
        let mut object = self.object.clone();
        if let Some(meta) = object.meta_mut() {
            meta.resource_version = revision.to_string();
        }
        let inner = with_revision(&self.inner, revision);
        Entry { object, key: self.key.clone(), inner, revision, spec_revision: self.spec_revision }
    }

    /// The node of a bound pod; empty for everything else.
    fn node(&self) -> &str {
        self.object.as_pod().and_then(|pod| pod.node_name()).unwrap_or_default()
    }

    fn namespace(&self) -> &str {
        &self.object.meta().namespace
    }
}

/// Appends `metadata.resourceVersion` to an encoded object. A field that comes again is merged into the message, and of a scalar the
/// last value counts (protobuf encoding, "Last One Wins"); `metadata` has the number 3 in every kind, `resourceVersion` the 5.
pub(crate) fn with_revision(value: &[u8], revision: i64) -> Bytes {
    let mut bytes = Vec::with_capacity(value.len() + known::SUFFIX_BYTES);
    bytes.put_slice(value);
    append_revision(bytes, revision)
}

fn append_revision(mut bytes: Vec<u8>, revision: i64) -> Bytes {
    let text = revision.to_string();
    let length = u8::try_from(text.len()).unwrap_or(0);
    bytes.put_slice(&[3 << 3 | 2, length + 2, 5 << 3 | 2, length]);
    bytes.put_slice(text.as_bytes());
    Bytes::from(bytes)
}

/// What another API server said of itself.
#[derive(Debug, Clone)]
pub struct ReplicaSeen {
    /// Where clients reach it.
    pub address: String,
    /// Nodes whose sessions it holds.
    pub nodes: Vec<String>,
    /// When its word reached us, by our own clock.
    pub at: Instant,
    /// The revision of its word.
    pub revision: i64,
}

/// Which server began a node's session last.
#[derive(Debug, Clone)]
pub struct SessionSeen {
    /// The server.
    pub record: Arc<SessionRecord>,
    /// The revision of the begin.
    pub revision: i64,
    /// When word of it reached us, by our own clock.
    pub at: Instant,
}

/// What bindings compare for the sake of rules between pods, as one revision left it.
#[derive(Debug, Clone)]
pub struct Ground {
    /// The revision.
    pub revision: i64,
    /// Whom rules speak of.
    pub announced: Arc<Announced>,
    /// The revision of the last announcement; 0: there was never any.
    pub announced_at: i64,
    /// Revisions at which the turns were taken last; 0: never.
    pub turns: [i64; TURNS],
    /// For whom turns are held.
    pub held: [Option<Held>; TURNS],
}

/// A turn that is held for one server.
#[derive(Debug, Clone)]
pub struct Held {
    /// The server's binder.
    pub by: Arc<[u8]>,
    /// When word of it reached us, by our own clock.
    pub seen: Instant,
}

/// A disruption budget with its pods, counted.
pub type Budgeted = (Arc<Entry>, Counted);

/// Sizes of the cache.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Changes that are kept per kind for watches that resume.
    pub history: usize,
    /// Transactions' worth of changes that may wait for one watcher before it is cut.
    pub queue: usize,
}

impl Default for Limits {
    /// History: some minutes of a busy cluster, at a few hundred bytes each (the objects are shared). Queue: what a connection
    /// that stalls for a second misses at a thousand transactions a second.
    fn default() -> Limits {
        Limits { history: 16_384, queue: 1_024 }
    }
}

/// The cache. Shared by everything in the server.
pub struct Cache {
    state: RwLock<State>,
    revision: watch::Sender<i64>,
    /// Why the store's feed is broken, while it is.
    trouble: RwLock<Option<String>>,
    known: Arc<Known>,
    metrics: Metrics,
}

struct Metrics {
    revision: Arc<minipod_daemon::metrics::Gauge>,
    watchers: Arc<minipod_daemon::metrics::Gauge>,
    cut: Arc<minipod_daemon::metrics::Counter>,
    relists: Arc<minipod_daemon::metrics::Counter>,
}

impl Cache {
    /// An empty cache; [`feed::follow`] fills it.
    pub fn new(limits: Limits, registry: &Registry) -> Arc<Cache> {
        let metrics = Metrics {
            revision: registry.gauge("minipod_cache_revision", &[], "The store's revision that the cache has reached."),
            watchers: registry.gauge("minipod_watchers", &[], "Open watches, those of node sessions included."),
            cut: registry.counter("minipod_watchers_cut_total", &[], "Watches ended because they were too slow."),
            relists: registry.counter("minipod_cache_lists_total", &[], "Times that the cache was filled by a list."),
        };
        Arc::new(Cache {
            state: RwLock::new(State::new(limits)),
            revision: watch::Sender::new(0),
            trouble: RwLock::new(Some("the first list of the store is not done yet".into())),
            known: Arc::default(),
            metrics,
        })
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The revision up to which everything is known.
    pub fn revision(&self) -> i64 {
        *self.revision.borrow()
    }

    /// Why the feed from the store is broken; `None` when it runs.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.write().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// Returns when everything up to a revision is known.
    ///
    /// # Errors
    /// When that takes too long: the store cannot be followed.
    pub async fn reach(&self, revision: i64) -> Result<(), ApiError> {
        let mut known = self.revision.subscribe();
        let reached = tokio::time::timeout(CATCH_UP, known.wait_for(|known| *known >= revision)).await;
        match reached {
            Ok(Ok(_)) => Ok(()),
            _ => {
                let why = self.trouble().unwrap_or_else(|| "the cache is behind".into());
                Err(ApiError::Unavailable(format!("revision {revision} was not reached within 5 s: {why}")))
            }
        }
    }

    /// Returns when more is known than up to a revision. Cancel safe.
    pub async fn passed(&self, revision: i64) {
        // The sender is this cache's own: it is there as long as this call.
        let _ = self.revision.subscribe().wait_for(|known| *known > revision).await;
    }

    /// One object.
    pub fn get(&self, kind: Kind, key: &str) -> Option<Arc<Entry>> {
        self.read().kind(kind).objects.get(key).cloned()
    }

    /// Several objects of a kind under one lock.
    pub fn get_many<'a>(&self, kind: Kind, keys: impl Iterator<Item = &'a str>) -> Vec<Option<Arc<Entry>>> {
        let state = self.read();
        let objects = &state.kind(kind).objects;
        keys.map(|key| objects.get(key).cloned()).collect()
    }

    /// Objects of a kind that match, in the order of their keys, and the revision at which that is exact.
    pub fn list(&self, kind: Kind, filter: &Filter) -> (Vec<Arc<Entry>>, i64) {
        let state = self.read();
        (state.matching(kind, filter), state.revision)
    }

    /// The pods that a disruption budget has, counted; `None`: there is no such budget.
    pub fn counted(&self, budget: &Entry) -> Option<Counted> {
        self.read().counts.of(budget.namespace(), &budget.key)
    }

    /// The disruption budgets of a namespace, each with its pods, counted, and one pod, all as of the same revision.
    pub fn budgeted(&self, namespace: &str, pod: &str) -> (Vec<Budgeted>, Option<Arc<Entry>>) {
        let (state, prefix) = (self.read(), format!("{namespace}/"));
        let budgets = state.kind(Kind::PodDisruptionBudget).objects.range(prefix.clone()..);
        let budgets = budgets.take_while(|(key, _)| key.starts_with(&prefix));
        let counted = budgets.filter_map(|(key, entry)| Some((Arc::clone(entry), state.counts.of(namespace, key)?)));
        (counted.collect(), state.kind(Kind::Pod).objects.get(pod).cloned())
    }

    /// All objects of a kind, in the order of their keys.
    pub fn all(&self, kind: Kind) -> Vec<Arc<Entry>> {
        self.read().kind(kind).objects.values().cloned().collect()
    }

    /// All pods that are bound to a node.
    pub fn pods_of(&self, node: &str) -> Vec<Arc<Entry>> {
        self.read().pods_of(node)
    }

    /// Nodes that pods are bound to.
    pub fn nodes_with_pods(&self) -> Vec<String> {
        self.read().pods_by_node.keys().cloned().collect()
    }

    /// Whether a namespace still has objects.
    pub fn namespace_in_use(&self, namespace: &str) -> bool {
        let state = self.read();
        let prefix = format!("{namespace}/");
        Kind::ALL.into_iter().filter(|kind| kind.namespaced()).any(|kind| {
            state.kind(kind).objects.range(prefix.clone()..).next().is_some_and(|(key, _)| key.starts_with(&prefix))
        })
    }

    /// Ledgers of nodes under one lock, with the revisions of their last writes.
    pub fn ledgers<'a>(&self, nodes: impl Iterator<Item = &'a str>) -> Vec<Option<(Arc<Ledger>, i64)>> {
        let state = self.read();
        nodes.map(|node| state.ledgers.get(node).cloned()).collect()
    }

    /// What bindings compare for the sake of rules between pods.
    pub fn ground(&self) -> Ground {
        let state = self.read();
        let (announced, announced_at) = &state.announced;
        Ground {
            revision: state.revision,
            announced: Arc::clone(announced),
            announced_at: *announced_at,
            turns: state.turns,
            held: state.held.clone(),
        }
    }

    /// What has happened to objects of a kind after a revision; if that is not known any more, all of them, of pods those that are bound.
    pub fn news(&self, kind: Kind, since: i64) -> News {
        self.read().news(kind, since)
    }

    /// The revision at which a namespace came, or the labels of one changed, last.
    pub fn namespaces_relabelled(&self) -> i64 {
        self.read().namespaces_relabelled
    }

    /// When a server other than `own` last said that it holds a node's session.
    pub fn contact_elsewhere(&self, node: &str, own: &str) -> Option<Instant> {
        let state = self.read();
        let others = state.replicas.iter().filter(|(id, _)| *id != own);
        // Sorted by whoever wrote it; this is asked for every node, every second.
        let holding = others.filter(|(_, seen)| seen.nodes.binary_search_by(|known| known.as_str().cmp(node)).is_ok());
        // A session that has just begun is in no summary yet.
        let begun = state.sessions.get(node).filter(|seen| seen.record.replica != own).map(|seen| seen.at);
        holding.map(|(_, seen)| seen.at).chain(begun).max()
    }

    /// What the API servers, this one included, have said of themselves.
    pub fn replicas(&self) -> HashMap<String, ReplicaSeen> {
        self.read().replicas.clone()
    }

    /// Who began a node's session last.
    pub fn session_of(&self, node: &str) -> Option<SessionSeen> {
        self.read().sessions.get(node).cloned()
    }

    /// Names without a node that somebody has begun a session of, each with the revision of the last begin.
    pub fn orphaned_sessions(&self) -> Vec<(String, i64)> {
        let state = self.read();
        let nodes = &state.kind(Kind::Node).objects;
        let orphaned = state.sessions.iter().filter(|(node, _)| !nodes.contains_key(*node));
        orphaned.map(|(node, seen)| (node.clone(), seen.revision)).collect()
    }

    /// The changes after a revision that match a filter, and those to come. Revision 0: the present objects first.
    ///
    /// # Errors
    /// When the changes after that revision are no longer kept; the error names the oldest that can be resumed from.
    pub fn subscribe(self: &Arc<Cache>, kind: Kind, filter: Filter, revision: i64) -> Result<Subscription, ApiError> {
        let subscription = self.write().subscribe(self, kind, filter, revision)?;
        self.metrics.watchers.add(1);
        Ok(subscription)
    }

    fn unsubscribe(&self, kind: Kind, id: u64) {
        self.write().unsubscribe(kind, id);
        self.metrics.watchers.add(-1);
    }

    /// Tells every watcher the revision that it has seen everything of.
    pub fn bookmark(&self) {
        let cut = self.write().bookmark();
        self.metrics.cut.add(cut);
    }

    /// Notes what is about to be written, so that the feed need not decode it. `ready` must be what `value` decodes to.
    pub fn note(&self, key: Vec<u8>, value: &[u8], ready: Ready) -> Noted {
        self.known.note(key, value, ready)
    }

    /// Everything as a list has found it. Watchers cannot be told what happened in between and are sent to list again.
    fn replace(&self, items: Vec<Item>, revision: i64) {
        let decoded = state::decode_items(items);
        self.known.clear();
        self.write().replace(decoded, revision);
        self.metrics.relists.increment();
        self.metrics.revision.set(revision);
        self.revision.send_replace(revision);
    }

    /// Changes in the order of their revisions; everything up to `revision` is told with them.
    fn apply(&self, events: Vec<crate::storage::RawEvent>, revision: i64) {
        // Decoding is the expensive part and needs no lock.
        let decoded = state::decode_events(events, &self.known);
        let cut = self.write().apply(decoded, revision);
        self.metrics.cut.add(cut);
        self.metrics.revision.set(revision);
        self.revision.send_if_modified(|known| {
            let newer = revision > *known;
            *known = revision.max(*known);
            newer
        });
    }
}

#[cfg(test)]
mod tests;
