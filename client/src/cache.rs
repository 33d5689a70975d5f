//! A local copy of the objects of one kind, kept by one task, and the changes to it for whoever wants to act on them.

use std::collections::HashMap;
use std::marker::PhantomData;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use minipod_daemon::backoff::Backoff;
use minipod_proto::Resource;
use minipod_proto::v1::Object;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

use crate::calls::{Query, listing, typed};
use crate::client::Client;
use crate::error::ClientError;
use crate::reflector::{Input, Output, State};
use crate::watch::Watch;

/// Changes under way to one subscriber: enough to ride out a pause of a few milliseconds at ten thousand changes a second.
/// When it is full the reflector waits, the server notices that the watch does not read, cuts it, and the reflector resumes:
/// nothing is lost and no memory is taken.
pub const SUBSCRIBER_QUEUE: usize = 1024;
/// First and longest wait after calls that failed; any that works takes it back.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// First and longest wait before a new list. Lists are dear, and one that works says nothing about the watch after it: only
/// the watch's events take it back.
const LIST_BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(3));

/// A change of the cache.
#[derive(Debug, Clone, PartialEq)]
pub enum Delta<K> {
    /// An object that was not there.
    Added(Arc<K>),
    /// An object that was there, with another state (same uid).
    Modified {
        /// As it was in the cache; states between the two may have been missed.
        old: Arc<K>,
        /// As it is now.
        new: Arc<K>,
    },
    /// An object that is gone: its last known state.
    Deleted(Arc<K>),
    /// A list is through: everything before this says what there is at `revision`.
    Synced {
        /// The list's revision.
        revision: i64,
    },
}

impl<K> Delta<K> {
    /// The object it is about, as it is now or was last.
    pub fn object(&self) -> Option<&Arc<K>> {
        match self {
            Delta::Added(object) | Delta::Modified { new: object, .. } | Delta::Deleted(object) => Some(object),
            Delta::Synced { .. } => None,
        }
    }
}

/// The objects of one kind, as of some revision. Clones share them.
#[derive(Debug)]
pub struct Cache<K> {
    table: Arc<RwLock<Table<K>>>,
    status: watch::Receiver<Status>,
    _task: Arc<Task>,
}

impl<K> Clone for Cache<K> {
    fn clone(&self) -> Cache<K> {
        Cache { table: Arc::clone(&self.table), status: self.status.clone(), _task: Arc::clone(&self._task) }
    }
}

/// The changes of a cache, in order, without a gap.
#[derive(Debug)]
pub struct Deltas<K> {
    receiver: mpsc::Receiver<Delta<K>>,
    _task: Arc<Task>,
}

/// A list-watch that is being set up.
#[derive(Debug)]
pub struct Reflector<K> {
    client: Client,
    query: Query,
    kind: PhantomData<fn() -> K>,
}

/// How the list-watch fares.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Status {
    synced: bool,
    trouble: Option<String>,
}

/// Ends the reflector's task with the last handle.
#[derive(Debug)]
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<K: Resource + Send + Sync + 'static> Reflector<K> {
    /// A list-watch of the objects of a query.
    #[must_use]
    pub fn new(client: &Client, query: Query) -> Reflector<K> {
        Reflector { client: client.clone(), query, kind: PhantomData }
    }

    /// Starts it for those who only look.
    #[must_use]
    pub fn start(self) -> Cache<K> {
        self.launch(None)
    }

    /// Starts it for one who acts on changes: gets every one from the first list on, and must keep reading.
    #[must_use]
    pub fn start_with_deltas(self) -> (Cache<K>, Deltas<K>) {
        let (sender, receiver) = mpsc::channel(SUBSCRIBER_QUEUE);
        let cache = self.launch(Some(sender));
        let deltas = Deltas { receiver, _task: Arc::clone(&cache._task) };
        (cache, deltas)
    }

    fn launch(self, subscriber: Option<mpsc::Sender<Delta<K>>>) -> Cache<K> {
        let table = Arc::new(RwLock::new(Table::default()));
        let (sender, status) = watch::channel(Status::default());
        let driver = Driver {
            client: self.client,
            query: self.query,
            table: Arc::clone(&table),
            subscriber,
            status: sender,
            backoff: Backoff::new(BACKOFF.0, BACKOFF.1),
            list_backoff: Backoff::new(LIST_BACKOFF.0, LIST_BACKOFF.1),
            stream: None,
        };
        let task = Arc::new(Task(tokio::spawn(driver.run()).abort_handle()));
        Cache { table, status, _task: task }
    }
}

impl<K> Cache<K> {
    /// The object with that key (`namespace/name`, or the name alone).
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Arc<K>> {
        self.read(|table| table.objects.get(key).cloned())
    }

    /// All objects, in no order.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<K>> {
        self.read(|table| table.objects.values().cloned().collect())
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.read(|table| table.objects.len())
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The revision up to which everything is in; 0 before the first list.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.read(|table| table.revision)
    }

    /// Whether the first list is in.
    #[must_use]
    pub fn is_synced(&self) -> bool {
        self.status.borrow().synced
    }

    /// Returns when the first list is in.
    pub async fn synced(&self) {
        // An error means that the task is gone, which needs this handle gone.
        let _ = self.status.clone().wait_for(|status| status.synced).await;
    }

    /// Why the objects may be out of date: the last failure, until the list-watch works again.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.status.borrow().trouble.clone()
    }

    fn read<R>(&self, look: impl FnOnce(&Table<K>) -> R) -> R {
        // The writer replaces whole values, so that a table is never half-written.
        look(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl<K> Deltas<K> {
    /// The next change; `None` only when the process is ending. Cancel safe.
    pub async fn next(&mut self) -> Option<Delta<K>> {
        self.receiver.recv().await
    }

    /// The next change if it is here already.
    pub fn try_next(&mut self) -> Option<Delta<K>> {
        self.receiver.try_recv().ok()
    }
}

/// The objects by key.
#[derive(Debug)]
struct Table<K> {
    objects: HashMap<String, Arc<K>>,
    revision: i64,
}

impl<K> Default for Table<K> {
    fn default() -> Table<K> {
        Table { objects: HashMap::new(), revision: 0 }
    }
}

impl<K: Resource> Table<K> {
    /// Applies what the state machine says; returns the changes.
    fn apply(&mut self, output: Output<K>) -> Vec<Delta<K>> {
        match output {
            Output::Reset { items, revision } => self.reset(items, revision),
            Output::Upsert { object, revision } => {
                self.revision = revision;
                self.upsert(object)
            }
            Output::Remove { object, revision } => {
                self.revision = revision;
                let key = object.key();
                // The state at its end is newer than the one in the table.
                self.objects.remove(&key).map(|_| Delta::Deleted(Arc::new(object))).into_iter().collect()
            }
            Output::Progress { revision } => {
                self.revision = revision;
                Vec::new()
            }
        }
    }

    fn upsert(&mut self, object: K) -> Vec<Delta<K>> {
        let new = Arc::new(object);
        let old = self.objects.insert(new.key(), Arc::clone(&new));
        compare(old, new)
    }

    /// The new table first, complete, then the swap; the changes are what a watch without a gap would have told.
    fn reset(&mut self, items: Vec<K>, revision: i64) -> Vec<Delta<K>> {
        let mut objects = HashMap::with_capacity(items.len());
        let (mut gone, mut changes) = (Vec::new(), Vec::new());
        for item in items {
            let key = item.key();
            match self.objects.remove(&key) {
                Some(old) if same_state(old.as_ref(), &item) => {
                    objects.insert(key, old);
                }
                old => {
                    let new = Arc::new(item);
                    objects.insert(key.clone(), Arc::clone(&new));
                    for change in compare(old, new) {
                        match change {
                            Delta::Deleted(old) => gone.push((key.clone(), old)),
                            change => changes.push(change),
                        }
                    }
                }
            }
        }
        gone.extend(std::mem::replace(&mut self.objects, objects));
        self.revision = revision;
        gone.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        // Deletions first: what takes their place may need the room.
        let gone = gone.into_iter().map(|(_, object)| Delta::Deleted(object));
        gone.chain(changes).chain([Delta::Synced { revision }]).collect()
    }
}

fn same_state<K: Resource>(old: &K, new: &K) -> bool {
    old.uid() == new.uid() && old.meta().resource_version == new.meta().resource_version && old.revision() != 0
}

fn compare<K: Resource>(old: Option<Arc<K>>, new: Arc<K>) -> Vec<Delta<K>> {
    match old {
        None => vec![Delta::Added(new)],
        Some(old) if old.uid() == new.uid() => vec![Delta::Modified { old, new }],
        // The name was deleted and taken again while nobody watched.
        Some(old) => vec![Delta::Deleted(old), Delta::Added(new)],
    }
}

/// Performs what the state machine asks for. The only writer of the table.
struct Driver<K> {
    client: Client,
    query: Query,
    table: Arc<RwLock<Table<K>>>,
    subscriber: Option<mpsc::Sender<Delta<K>>>,
    status: watch::Sender<Status>,
    backoff: Backoff,
    list_backoff: Backoff,
    stream: Option<Watch<K>>,
}

impl<K: Resource + Send + Sync + 'static> Driver<K> {
    async fn run(mut self) {
        let mut state = State::start();
        loop {
            let input = self.perform(&state).await;
            self.note(&input);
            let (next, output) = state.step(input);
            state = next;
            if let Some(output) = output {
                let changes = self.table.write().unwrap_or_else(PoisonError::into_inner).apply(output);
                self.tell(changes).await;
                if matches!(state, State::Opening { .. }) {
                    self.status.send_if_modified(|status| !std::mem::replace(&mut status.synced, true));
                }
            }
        }
    }

    /// The one call that the state names.
    async fn perform(&mut self, state: &State<K>) -> Input<K> {
        match state {
            State::Listing { page, .. } => {
                let page = self.client.list_page(K::KIND, &self.query, page).await;
                match page.and_then(|page| Ok((self.typed(page.items)?, page.revision, page.next))) {
                    Ok((items, revision, next)) => Input::Page { items, revision, next },
                    Err(error) => self.failed(&error),
                }
            }
            State::Opening { revision } => match self.client.watch(&self.query, *revision).await {
                Ok(stream) => {
                    self.stream = Some(stream);
                    Input::Opened
                }
                Err(error) => self.failed(&error),
            },
            State::Watching { .. } => match &mut self.stream {
                Some(stream) => match stream.next().await {
                    Ok(Some(change)) => Input::Event(change),
                    Ok(None) => Input::Ended,
                    Err(error) => self.failed(&error),
                },
                None => Input::Ended,
            },
            State::Waiting { revision } => {
                self.stream = None;
                let backoff = if revision.is_some() { &mut self.backoff } else { &mut self.list_backoff };
                tokio::time::sleep(backoff.next_wait()).await;
                Input::Waited
            }
        }
    }

    fn typed(&self, objects: Vec<Object>) -> Result<Vec<K>, ClientError> {
        objects.into_iter().map(|object| typed(object, || listing(K::KIND, &self.query))).collect()
    }

    fn failed(&self, error: &ClientError) -> Input<K> {
        let expired = error.is_expired();
        if expired {
            tracing::info!(kind = K::KIND.name(), %error, "the watch cannot be resumed: listing again");
        } else {
            tracing::warn!(kind = K::KIND.name(), %error, "list-watch failed: trying again");
        }
        let trouble = Some(error.to_string());
        self.status.send_if_modified(|status| {
            let changed = status.trouble != trouble;
            status.trouble = trouble;
            changed
        });
        Input::Failed { expired }
    }

    /// Takes back-offs and trouble back when things work again.
    fn note(&mut self, input: &Input<K>) {
        match input {
            Input::Page { .. } | Input::Opened => self.backoff.reset(),
            Input::Event(_) => {
                self.backoff.reset();
                self.list_backoff.reset();
            }
            Input::Failed { .. } | Input::Ended | Input::Waited => return,
        }
        // A list alone is no sign that the watch works, but what it brought is up to date.
        self.status.send_if_modified(|status| status.trouble.take().is_some());
    }

    /// Gives the changes to the subscriber, waiting while its queue is full; forgets one who left.
    async fn tell(&mut self, changes: Vec<Delta<K>>) {
        let Some(subscriber) = &self.subscriber else { return };
        for change in changes {
            if subscriber.send(change).await.is_err() {
                self.subscriber = None;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::Pod;

    use super::*;

    fn pod(name: &str, uid: &str, revision: i64) -> Pod {
        let mut pod = Pod::default();
        let meta = pod.meta_mut();
        (meta.name, meta.namespace, meta.uid) = (name.into(), "default".into(), uid.into());
        meta.resource_version = revision.to_string();
        pod
    }

    fn shown(changes: &[Delta<Pod>]) -> String {
        let show = |change: &Delta<Pod>| match change {
            Delta::Added(pod) => format!("+{}/{}", pod.name(), pod.uid()),
            Delta::Modified { old, new } => format!("~{}@{}->{}", new.name(), old.revision(), new.revision()),
            Delta::Deleted(pod) => format!("-{}/{}", pod.name(), pod.uid()),
            Delta::Synced { revision } => format!("synced {revision}"),
        };
        changes.iter().map(show).collect::<Vec<_>>().join(" ")
    }

    fn reset(items: Vec<Pod>, revision: i64) -> Output<Pod> {
        Output::Reset { items, revision }
    }

    #[test]
    fn a_relist_tells_what_the_watch_missed() {
        let mut table = Table::default();
        let changes = table.apply(reset(vec![pod("a", "1", 2), pod("b", "2", 3), pod("c", "3", 4)], 5));
        assert_eq!(shown(&changes), "+a/1 +b/2 +c/3 synced 5");
        // a is the same, b is gone, c is another c, d is new.
        let changes = table.apply(reset(vec![pod("a", "1", 2), pod("c", "9", 8), pod("d", "4", 9)], 10));
        assert_eq!(shown(&changes), "-b/2 -c/3 +c/9 +d/4 synced 10");
        let changes = table.apply(reset(vec![pod("a", "1", 11)], 12));
        assert_eq!(shown(&changes), "-c/9 -d/4 ~a@2->11 synced 12");
        assert_eq!((table.objects.len(), table.revision), (1, 12));
    }

    #[test]
    fn events_change_one_object() {
        let mut table = Table::default();
        let upsert = |pod: Pod| Output::Upsert { revision: pod.revision(), object: pod };
        assert_eq!(shown(&table.apply(upsert(pod("a", "1", 2)))), "+a/1");
        assert_eq!(shown(&table.apply(upsert(pod("a", "1", 3)))), "~a@2->3");
        assert_eq!(shown(&table.apply(upsert(pod("a", "2", 4)))), "-a/1 +a/2");
        let remove = |pod: Pod| Output::Remove { revision: pod.revision(), object: pod };
        assert_eq!(shown(&table.apply(remove(pod("a", "2", 5)))), "-a/2");
        assert_eq!(shown(&table.apply(remove(pod("a", "2", 5)))), "");
        assert_eq!(shown(&table.apply(Output::Progress { revision: 7 })), "");
        assert_eq!(table.revision, 7);
    }
}
