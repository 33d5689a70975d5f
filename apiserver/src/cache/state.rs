//! The cache's content; pure, under the lock of [`super::Cache`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque, btree_map},
    sync::{Arc, Mutex},
    time::Instant,
};

use minipod_proto::{
    Kind,
    v1::{Object, Pod, object, watch_event::Type},
};
use prost::Message;
use tokio::sync::mpsc;

use super::{
    Cache, Entry, Held, Limits, ReplicaSeen, SessionSeen,
    counts::Counts,
    known::{Known, Ready},
    watcher::{self, Cut, Delivery, Filter, Subscription, Watcher},
};
use crate::{
    error::ApiError,
    keys::{self, Parsed},
    ledger::Ledger,
    rules::{
        announced::{Announced, TURNS},
        counter::News,
    },
    storage::{Item, RawEvent},
};

/// One change of one object.
#[derive(Debug)]
pub struct Change {
    /// When.
    pub revision: i64,
    /// What it was; `None`: it is new.
    pub before: Option<Arc<Entry>>,
    /// What it is; `None`: it is gone.
    pub after: Option<Arc<Entry>>,
    /// Of a deletion: the last state, with the revision of the deletion.
    gone: Option<Arc<Entry>>,
}

impl Change {
    /// The newest state there is to show.
    pub fn last(&self) -> &Arc<Entry> {
        match (&self.after, &self.gone, &self.before) {
            (Some(entry), _, _) | (None, Some(entry), _) | (None, None, Some(entry)) => entry,
            (None, None, None) => &NOTHING,
        }
    }
}

/// What a change from nothing to nothing would show; there is no such change.
static NOTHING: std::sync::LazyLock<Arc<Entry>> = std::sync::LazyLock::new(|| {
    let object = Object::empty(Kind::Pod);
    Arc::new(Entry { object, key: String::new(), inner: bytes::Bytes::new(), revision: 0, spec_revision: 0 })
});

/// All of one kind.
pub(super) struct KindState {
    pub objects: BTreeMap<String, Arc<Entry>>,
    ring: VecDeque<Arc<Change>>,
    /// Every change after this revision is in the ring.
    oldest: i64,
    watchers: HashMap<u64, Watcher>,
    by_node: HashMap<String, HashSet<u64>>,
    by_namespace: HashMap<String, HashSet<u64>>,
    unindexed: HashSet<u64>,
}

pub(super) struct State {
    pub revision: i64,
    limits: Limits,
    kinds: [KindState; Kind::ALL.len()],
    /// Keys of the pods of each node.
    pub pods_by_node: HashMap<String, BTreeSet<String>>,
    pub ledgers: HashMap<String, (Arc<Ledger>, i64)>,
    pub replicas: HashMap<String, ReplicaSeen>,
    /// By node.
    pub sessions: HashMap<String, SessionSeen>,
    /// Pods of disruption budgets.
    pub counts: Counts,
    /// Whom rules between pods speak of, and the revision of the last announcement.
    pub announced: (Arc<Announced>, i64),
    /// Revisions at which the turns were taken last; 0: never.
    pub turns: [i64; TURNS],
    /// For whom they are held.
    pub held: [Option<Held>; TURNS],
    /// The revision at which the labels of a namespace changed last.
    pub namespaces_relabelled: i64,
    next_watcher: u64,
}

/// A replica's summary, in the store.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ReplicaSummary {
    /// Where clients reach it.
    #[prost(string, tag = "1")]
    pub address: String,
    /// Nodes whose sessions it holds.
    #[prost(string, repeated, tag = "2")]
    pub nodes: Vec<String>,
}

/// Which API server holds a node's session, in the store: written when a session begins, by whoever begins it.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SessionRecord {
    /// The server's id.
    #[prost(string, tag = "1")]
    pub replica: String,
    /// Where other API servers pass requests on to it: `http://host:port` or `https://host:port`.
    #[prost(string, tag = "2")]
    pub relay: String,
    /// What they show there: who knows it reads the store.
    #[prost(string, tag = "3")]
    pub key: String,
}

/// A change with its value decoded.
pub(super) struct Decoded {
    revision: i64,
    what: What,
}

enum What {
    Object(Kind, String, Option<Arc<Entry>>),
    Ledger(String, Option<Arc<Ledger>>),
    Replica(String, Option<ReplicaSummary>),
    Session(String, Option<SessionRecord>),
    Announced(Option<Announced>),
    /// Its number, and whose it is, if anybody's; `None`: it is gone.
    Turn(usize, Option<Vec<u8>>),
}

pub(super) fn decode_items(items: Vec<Item>) -> Vec<Decoded> {
    items.iter().filter_map(|item| decode(&item.key, Some(&item.value), item.revision)).collect()
}

pub(super) fn decode_events(events: Vec<RawEvent>, known: &Known) -> Vec<Decoded> {
    let decoded = |event: &RawEvent| {
        recognise(event, known).or_else(|| decode(&event.key, event.value.as_deref(), event.revision))
    };
    events.iter().filter_map(decoded).collect()
}

/// What this server has written itself.
fn recognise(event: &RawEvent, known: &Known) -> Option<Decoded> {
    let (ready, value) = known.take(&event.key, event.value.as_deref()?)?;
    let what = match (keys::parse(&event.key), ready) {
        (Parsed::Object(kind, key), Ready::Object(object)) => {
            let entry = Entry::ready(kind, key, *object, value, event.revision);
            What::Object(kind, key.to_owned(), Some(Arc::new(entry)))
        }
        (Parsed::Ledger(node), Ready::Ledger(ledger)) => What::Ledger(node.to_owned(), Some(ledger)),
        _ => return None,
    };
    Some(Decoded { revision: event.revision, what })
}

fn decode(key: &[u8], value: Option<&[u8]>, revision: i64) -> Option<Decoded> {
    let what = match keys::parse(key) {
        Parsed::Object(kind, key) => {
            let entry = value.map(|value| Entry::decode(kind, key, value, revision)).transpose();
            // What cannot be read is shown to nobody; a later write of the key makes it visible again.
            let entry = entry.inspect_err(|error| tracing::error!(%error, "an object is not served")).ok()?;
            What::Object(kind, key.to_owned(), entry.map(Arc::new))
        }
        Parsed::Ledger(node) => {
            let ledger = value.map(|value| Ledger::decode(value).map(Arc::new)).transpose();
            What::Ledger(node.to_owned(), ledger.inspect_err(|error| tracing::error!(node, %error, "ledger")).ok()?)
        }
        Parsed::Replica(id) => {
            let summary = value.map(ReplicaSummary::decode).transpose();
            What::Replica(id.to_owned(), summary.inspect_err(|error| tracing::warn!(id, %error, "replica")).ok()?)
        }
        Parsed::Session(node) => {
            let record = value.map(SessionRecord::decode).transpose();
            What::Session(node.to_owned(), record.inspect_err(|error| tracing::warn!(node, %error, "session")).ok()?)
        }
        // What cannot be read may speak of anybody.
        Parsed::Announced => What::Announced(value.map(|value| {
            Announced::decode(value).unwrap_or_else(|error| {
                tracing::error!(%error, "the announcements of rules cannot be read: every binding takes a turn");
                Announced::everything()
            })
        })),
        Parsed::Turn(number) => {
            What::Turn(number.parse().ok().filter(|number| *number < TURNS)?, value.map(<[u8]>::to_vec))
        }
        Parsed::PodCidr(_) | Parsed::Unknown => return None,
    };
    Some(Decoded { revision, what })
}

impl KindState {
    fn new() -> KindState {
        KindState {
            objects: BTreeMap::new(),
            ring: VecDeque::new(),
            oldest: 0,
            watchers: HashMap::new(),
            by_node: HashMap::new(),
            by_namespace: HashMap::new(),
            unindexed: HashSet::new(),
        }
    }

    #[cfg(test)]
    pub fn is_unwatched(&self) -> bool {
        self.watchers.is_empty() && self.by_node.is_empty() && self.by_namespace.is_empty() && self.unindexed.is_empty()
    }

    fn index_of(&mut self, filter: &Filter) -> &mut HashSet<u64> {
        match (filter.node(), filter.namespace.as_str()) {
            (Some(node), _) => self.by_node.entry(node.to_owned()).or_default(),
            (None, "") => &mut self.unindexed,
            (None, namespace) => self.by_namespace.entry(namespace.to_owned()).or_default(),
        }
    }

    fn remove(&mut self, id: u64) {
        let Some(watcher) = self.watchers.remove(&id) else { return };
        self.index_of(&watcher.filter).remove(&id);
        self.by_node.retain(|_, ids| !ids.is_empty());
        self.by_namespace.retain(|_, ids| !ids.is_empty());
    }

    /// Watchers that a change may concern, each once.
    fn concerned<'a>(&'a self, change: &'a Change) -> impl Iterator<Item = u64> + 'a {
        let state = |entry: &'a Option<Arc<Entry>>| entry.as_deref();
        let (before, after) = (state(&change.before), state(&change.after));
        let nodes = [before.map_or("", Entry::node), after.map_or("", Entry::node)];
        let second = if nodes[0] == nodes[1] { "" } else { nodes[1] };
        let of_nodes = [nodes[0], second].into_iter().filter(|node| !node.is_empty());
        let by_node = of_nodes.filter_map(|node| self.by_node.get(node)).flatten();
        let by_namespace = self.by_namespace.get(change.last().namespace()).into_iter().flatten();
        self.unindexed.iter().chain(by_namespace).chain(by_node).copied()
    }

    fn remember(&mut self, change: Arc<Change>, limit: usize) {
        self.ring.push_back(change);
        while self.ring.len() > limit {
            if let Some(dropped) = self.ring.pop_front() {
                self.oldest = dropped.revision;
            }
        }
    }
}

impl State {
    pub fn new(limits: Limits) -> State {
        State {
            revision: 0,
            limits,
            kinds: std::array::from_fn(|_| KindState::new()),
            pods_by_node: HashMap::new(),
            ledgers: HashMap::new(),
            replicas: HashMap::new(),
            sessions: HashMap::new(),
            counts: Counts::default(),
            announced: (Arc::default(), 0),
            turns: [0; TURNS],
            held: Default::default(),
            namespaces_relabelled: 0,
            next_watcher: 0,
        }
    }

    pub fn kind(&self, kind: Kind) -> &KindState {
        &self.kinds[kind as usize]
    }

    pub fn pods_of(&self, node: &str) -> Vec<Arc<Entry>> {
        let keys = self.pods_by_node.get(node).into_iter().flatten();
        keys.filter_map(|key| self.kind(Kind::Pod).objects.get(key).cloned()).collect()
    }

    /// What has happened to objects of a kind after a revision.
    pub fn news(&self, kind: Kind, since: i64) -> News {
        let state = self.kind(kind);
        if since < state.oldest {
            let all: Vec<Arc<Entry>> = if kind == Kind::Pod {
                let keys = self.pods_by_node.values().flatten();
                keys.filter_map(|key| state.objects.get(key).cloned()).collect()
            } else {
                state.objects.values().cloned().collect()
            };
            return News::All(all, self.revision);
        }
        let first = state.ring.partition_point(|change| change.revision <= since);
        let changes = state.ring.range(first..).map(|change| (change.before.clone(), change.after.clone()));
        News::Changes(changes.collect(), self.revision)
    }

    pub fn matching(&self, kind: Kind, filter: &Filter) -> Vec<Arc<Entry>> {
        if let (Kind::Pod, Some(node)) = (kind, filter.node()) {
            let mut entries = self.pods_of(node);
            entries.retain(|entry| filter.matches(entry));
            return entries;
        }
        let prefix = if filter.namespace.is_empty() { String::new() } else { format!("{}/", filter.namespace) };
        let range = self.kind(kind).objects.range(prefix.clone()..);
        let entries = range.take_while(|(key, _)| key.starts_with(&prefix)).map(|(_, entry)| entry);
        entries.filter(|entry| filter.matches(entry)).cloned().collect()
    }

    pub fn subscribe(
        &mut self,
        cache: &Arc<Cache>,
        kind: Kind,
        filter: Filter,
        from: i64,
    ) -> Result<Subscription, ApiError> {
        let revision = self.revision;
        let mut backlog = VecDeque::new();
        if from == 0 {
            let present = self.matching(kind, &filter).into_iter();
            let mut initial: Vec<Delivery> =
                present.map(|entry| Delivery { kind: Type::Added, entry: Some(entry), revision: 0 }).collect();
            initial.push(Delivery { kind: Type::Bookmark, entry: None, revision });
            backlog.push_back(initial);
        } else {
            let state = self.kind(kind);
            if from < state.oldest {
                return Err(watcher::expired(state.oldest));
            }
            let first = state.ring.partition_point(|change| change.revision <= from);
            let mut group: (i64, Vec<Delivery>) = (0, Vec::new());
            for change in state.ring.range(first..) {
                if change.revision != group.0 {
                    flush(&mut backlog, &mut group);
                    group.0 = change.revision;
                }
                if let Some((kind, entry)) = watcher::seen(&filter, change) {
                    group.1.push(Delivery { kind, entry: Some(entry), revision: 0 });
                }
            }
            flush(&mut backlog, &mut group);
        }
        let id = self.next_watcher;
        self.next_watcher += 1;
        let (sender, queue) = mpsc::channel(self.limits.queue);
        let end = Arc::new(Mutex::new(None));
        let state = &mut self.kinds[kind as usize];
        state.index_of(&filter).insert(id);
        let start = revision.max(from);
        let watcher = Watcher { filter, from: start, delivered: start, queue: sender, end: Arc::clone(&end) };
        state.watchers.insert(id, watcher);
        Ok(Subscription { cache: Arc::clone(cache), kind, id, backlog, queue, end, revision })
    }

    pub fn unsubscribe(&mut self, kind: Kind, id: u64) {
        self.kinds[kind as usize].remove(id);
    }

    /// Returns how many watchers were cut.
    pub fn bookmark(&mut self) -> u64 {
        let revision = self.revision;
        for state in &mut self.kinds {
            for watcher in state.watchers.values_mut().filter(|watcher| watcher.from <= revision) {
                let bookmark = Delivery { kind: Type::Bookmark, entry: None, revision };
                // A full queue needs no bookmark: its events tell revisions themselves.
                if watcher.queue.try_send(vec![bookmark]).is_ok() {
                    watcher.delivered = revision;
                }
            }
        }
        0
    }

    pub fn replace(&mut self, decoded: Vec<Decoded>, revision: i64) {
        for state in &mut self.kinds {
            for watcher in state.watchers.values() {
                watcher.cut(Cut::Relisted { oldest: revision });
            }
            *state = KindState::new();
            state.oldest = revision;
        }
        self.pods_by_node.clear();
        self.counts = Counts::default();
        self.ledgers.clear();
        self.replicas.clear();
        self.sessions.clear();
        self.announced = (Arc::default(), 0);
        self.turns = [0; TURNS];
        self.held = Default::default();
        self.namespaces_relabelled = revision;
        self.revision = revision;
        for one in decoded {
            match one.what {
                What::Object(kind, key, Some(entry)) => {
                    self.index_pod(kind, &key, None, Some(&entry));
                    self.kinds[kind as usize].objects.insert(key, entry);
                }
                other => self.apply_aside(other, one.revision),
            }
        }
        // Last: a budget may be listed before its pods.
        let budgets: Vec<Arc<Entry>> = self.kind(Kind::PodDisruptionBudget).objects.values().cloned().collect();
        budgets.iter().for_each(|entry| self.count(None, Some(entry)));
    }

    /// Returns how many watchers were cut.
    pub fn apply(&mut self, decoded: Vec<Decoded>, revision: i64) -> u64 {
        let mut cut = 0;
        let mut decoded = decoded.into_iter().peekable();
        while let Some(first) = decoded.next() {
            let at = first.revision;
            let mut group = vec![first.what];
            while let Some(next) = decoded.next_if(|next| next.revision == at) {
                group.push(next.what);
            }
            // After a broken feed the store tells again what is known already.
            if at > self.revision {
                cut += self.apply_transaction(group, at);
                self.revision = at;
            }
        }
        self.revision = self.revision.max(revision);
        cut
    }

    fn apply_transaction(&mut self, group: Vec<What>, revision: i64) -> u64 {
        let mut pending: HashMap<(Kind, u64), Vec<Delivery>> = HashMap::new();
        for what in group {
            let What::Object(kind, key, entry) = what else {
                self.apply_aside(what, revision);
                continue;
            };
            let Some(change) = self.change_object(kind, key, entry, revision) else { continue };
            let state = &mut self.kinds[kind as usize];
            for id in state.concerned(&change) {
                let Some(watcher) = state.watchers.get(&id).filter(|watcher| watcher.from < revision) else { continue };
                if let Some((event, entry)) = watcher::seen(&watcher.filter, &change) {
                    let delivery = Delivery { kind: event, entry: Some(entry), revision };
                    pending.entry((kind, id)).or_default().push(delivery);
                }
            }
            state.remember(Arc::new(change), self.limits.history);
        }
        let mut cut = 0;
        for ((kind, id), mut deliveries) in pending {
            watcher::seal(&mut deliveries, revision);
            let state = &mut self.kinds[kind as usize];
            let keep = state.watchers.get_mut(&id).is_none_or(|watcher| watcher.offer(deliveries, revision));
            if !keep {
                state.remove(id);
                cut += 1;
            }
        }
        cut
    }

    fn change_object(&mut self, kind: Kind, key: String, entry: Option<Arc<Entry>>, revision: i64) -> Option<Change> {
        let objects = &mut self.kinds[kind as usize].objects;
        let Some(mut entry) = entry else {
            let before = objects.remove(&key)?;
            self.index_pod(kind, &key, Some(&before), None);
            self.count(Some(&before), None);
            let gone = Some(Arc::new(before.deleted(revision)));
            return Some(Change { revision, before: Some(before), after: None, gone });
        };
        // Looked up once: with many objects, comparing keys is much of what a change costs.
        let before = match objects.entry(key) {
            btree_map::Entry::Occupied(mut present) => {
                let (before, after) = (present.get(), &entry);
                let (old, new) = (before.object.meta(), after.object.meta());
                let same_spec = old.uid == new.uid && old.generation == new.generation;
                // Nobody else has it yet.
                if let Some(after) = Arc::get_mut(&mut entry).filter(|_| same_spec) {
                    after.spec_revision = before.spec_revision;
                }
                Some(present.insert(Arc::clone(&entry)))
            }
            btree_map::Entry::Vacant(place) => {
                place.insert(Arc::clone(&entry));
                None
            }
        };
        let old_labels = before.as_ref().map(|before| &before.object.meta().labels);
        if kind == Kind::Namespace && old_labels != Some(&entry.object.meta().labels) {
            self.namespaces_relabelled = revision;
        }
        self.index_pod(kind, &entry.key, before.as_deref(), Some(&entry));
        self.count(before.as_deref(), Some(&entry));
        // A name that is taken again in the same breath is a deletion and a creation to whoever looks at uids.
        Some(Change { revision, before, after: Some(entry), gone: None })
    }

    /// Keeps the counts of budgets.
    fn count(&mut self, before: Option<&Entry>, after: Option<&Entry>) {
        let Some(one) = after.or(before) else { return };
        let namespace = one.namespace();
        match &one.object.kind {
            Some(object::Kind::Pod(_)) => {
                self.counts.pod(namespace, pod_of(before), pod_of(after));
            }
            Some(object::Kind::PodDisruptionBudget(budget)) => {
                if after.is_none() {
                    self.counts.forget(namespace, &one.key);
                } else if before.is_none_or(|before| before.spec_revision != one.spec_revision) {
                    let prefix = format!("{namespace}/");
                    let pods = self.kinds[Kind::Pod as usize].objects.range(prefix.clone()..);
                    let pods = pods.take_while(|(key, _)| key.starts_with(&prefix));
                    self.counts.budget(&one.key, budget, pods.filter_map(|(_, entry)| entry.object.as_pod()));
                }
            }
            _ => {}
        }
    }

    fn index_pod(&mut self, kind: Kind, key: &str, before: Option<&Entry>, after: Option<&Entry>) {
        let (old, new) = (before.map_or("", Entry::node), after.map_or("", Entry::node));
        if kind != Kind::Pod || old == new {
            return;
        }
        if let Some(keys) = self.pods_by_node.get_mut(old) {
            keys.remove(key);
            if keys.is_empty() {
                self.pods_by_node.remove(old);
            }
        }
        if !new.is_empty() {
            self.pods_by_node.entry(new.to_owned()).or_default().insert(key.to_owned());
        }
    }

    fn apply_aside(&mut self, what: What, revision: i64) {
        match what {
            What::Ledger(node, Some(ledger)) => drop(self.ledgers.insert(node, (ledger, revision))),
            What::Ledger(node, None) => drop(self.ledgers.remove(&node)),
            What::Replica(id, Some(summary)) => {
                let ReplicaSummary { address, nodes } = summary;
                drop(self.replicas.insert(id, ReplicaSeen { address, nodes, at: Instant::now(), revision }));
            }
            What::Replica(id, None) => drop(self.replicas.remove(&id)),
            What::Session(node, Some(record)) => {
                drop(
                    self.sessions.insert(node, SessionSeen { record: Arc::new(record), revision, at: Instant::now() }),
                );
            }
            What::Session(node, None) => drop(self.sessions.remove(&node)),
            What::Announced(Some(announced)) => self.announced = (Arc::new(announced), revision),
            What::Announced(None) => self.announced = (Arc::default(), 0),
            What::Turn(number, whose) => {
                if let (Some(turn), Some(held)) = (self.turns.get_mut(number), self.held.get_mut(number)) {
                    *turn = if whose.is_some() { revision } else { 0 };
                    let whose = whose.filter(|whose| !whose.is_empty());
                    *held = whose.map(|by| Held { by: by.into(), seen: Instant::now() });
                }
            }
            What::Object(..) => {}
        }
    }
}

fn pod_of(entry: Option<&Entry>) -> Option<&Pod> {
    entry.and_then(|entry| entry.object.as_pod())
}

fn flush(backlog: &mut VecDeque<Vec<Delivery>>, group: &mut (i64, Vec<Delivery>)) {
    let mut deliveries = std::mem::take(&mut group.1);
    if !deliveries.is_empty() {
        watcher::seal(&mut deliveries, group.0);
        backlog.push_back(deliveries);
    }
}
