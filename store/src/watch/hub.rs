//! Who watches what, and who has seen how much. No thread, no clock.
//!
//! The hub has a *position*: the revision up to which it has handed out events. A watcher is *synced* when it has seen
//! everything up to there, or *lagging* at a revision of its own: it began in the past, or its client reads too slowly.
//! Both are served from the revision log, in [`Batch`]es that never split a revision; the log is the only queue.

use super::outbox::{Frame, Outbox, What};
use crate::mvcc::{Store, Version};
use crate::wire::WatchCreate;
use bytes::Bytes;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// A batch ends with the revision in which it reaches one of these: bounds a frame, and how long the store is held.
const BATCH_VERSIONS: usize = 1_000;
const BATCH_BYTES: usize = 1 << 20;

/// Events in order, whole revisions only.
#[derive(Debug, Default)]
pub struct Batch {
    from: i64,
    /// Every event from `from` up to this revision is in the batch.
    through: i64,
    compacted: i64,
    events: Vec<Event>,
}

#[derive(Debug)]
struct Event {
    version: Version,
    /// What was there before, when some watcher wants to know.
    previous: Option<Version>,
    /// Encoded when first wanted, without and with what was there before.
    encoded: [Option<Bytes>; 2],
}

impl Event {
    fn encoded(&mut self, with_previous: bool) -> Bytes {
        let with_previous = with_previous && self.previous.is_some();
        let Event { version, previous, encoded: [plain, full] } = self;
        let (slot, previous) = if with_previous { (full, previous.as_ref()) } else { (plain, None) };
        let encoded = slot.get_or_insert_with(|| {
            let len = version.field_len() + previous.map_or(0, Version::field_len);
            let mut out = Vec::with_capacity(len + 16);
            version.put_event(&mut out, 11, previous);
            out.into()
        });
        encoded.clone()
    }
}

impl Batch {
    /// Reads the log from `from` on, up to the limits of a batch.
    pub fn read(store: &Store, from: i64, with_previous: bool) -> Self {
        let mut batch = Batch { from, through: store.revision(), compacted: store.compacted(), events: Vec::new() };
        let mut bytes = 0;
        let mut last = i64::MIN;
        for version in store.history(from) {
            if version.at.main != last && (batch.events.len() >= BATCH_VERSIONS || bytes >= BATCH_BYTES) {
                batch.through = last;
                break;
            }
            last = version.at.main;
            bytes += version.encoded().len();
            // etcd answers nothing when the revision before is compacted away; so do we, whatever the sweep has left.
            let before = last - 1;
            let known = with_previous && before >= store.compacted() && !version.is_creation();
            let previous = if known { store.at(version.key(), before).cloned() } else { None };
            batch.events.push(Event { version: version.clone(), previous, encoded: [None, None] });
        }
        batch
    }
}

/// A first key and an end; an end of `None` is open, and an empty one means the one key.
type KeyRange = (Box<[u8]>, Option<Box<[u8]>>);

/// One watch.
#[derive(Debug)]
struct Watcher {
    stream: u64,
    id: i64,
    keys: KeyRange,
    /// Where it asked to begin.
    start: i64,
    /// The next revision that it wants; for a synced one only of interest when it lies ahead of the hub.
    next: i64,
    is_lagging: bool,
    progress_notify: bool,
    no_put: bool,
    no_delete: bool,
    prev_kv: bool,
    fragment: bool,
    /// Had something to read since the last round of progress.
    was_active: bool,
    /// Gathers a frame; empty between batches.
    gathered: Vec<(i64, Bytes)>,
}

#[derive(Debug)]
struct Stream {
    outbox: Arc<Outbox>,
    /// The client's ids.
    watches: HashMap<i64, u64>,
    next_id: i64,
    wants_progress: bool,
}

/// Bugs that tests plant and must find; etcd has had each of them.
#[cfg(feature = "planted-bugs")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planted {
    /// A watcher that wants what is compacted away goes on with what is left.
    SkipsCompacted,
    /// Progress is answered while watchers still lag.
    ProgressOvertakes,
    /// What does not fit a full outbox is dropped.
    DropsWhenFull,
    /// After a snapshot of another member, the replay begins one revision too early.
    RepeatsAfterRestore,
}

/// Who watches what.
#[derive(Debug)]
pub struct Hub {
    streams: HashMap<u64, Stream>,
    watchers: HashMap<u64, Watcher>,
    last_handle: u64,
    by_key: HashMap<Box<[u8]>, Vec<u64>>,
    /// Ranges with their watchers. Many watch the same few ranges.
    by_range: HashMap<KeyRange, Vec<u64>>,
    lagging: BTreeSet<u64>,
    with_previous: usize,
    position: i64,
    restores: u64,
    /// A frame of a watcher that allows fragments is cut here.
    max_fragment_bytes: usize,
    /// A bug on purpose, for the tests that must find it.
    #[cfg(feature = "planted-bugs")]
    pub planted: Option<Planted>,
}

impl Hub {
    /// A hub that has handed out everything up to `position`.
    pub fn new(position: i64, restores: u64, max_fragment_bytes: usize) -> Self {
        Self {
            streams: HashMap::new(),
            watchers: HashMap::new(),
            last_handle: 0,
            by_key: HashMap::new(),
            by_range: HashMap::new(),
            lagging: BTreeSet::new(),
            with_previous: 0,
            position,
            restores,
            max_fragment_bytes,
            #[cfg(feature = "planted-bugs")]
            planted: None,
        }
    }

    /// The revision up to which events were handed out.
    pub fn position(&self) -> i64 {
        self.position
    }

    /// How many watches there are, and how many of them lag.
    pub fn watchers(&self) -> (usize, usize) {
        (self.watchers.len(), self.lagging.len())
    }

    fn handle(&mut self) -> u64 {
        self.last_handle += 1;
        self.last_handle
    }

    /// A new client stream.
    pub fn open(&mut self, outbox: Arc<Outbox>) -> u64 {
        let handle = self.handle();
        self.streams.insert(handle, Stream { outbox, watches: HashMap::new(), next_id: 0, wants_progress: false });
        handle
    }

    /// The end of a client stream and of all its watches.
    pub fn close(&mut self, stream: u64) {
        if let Some(stream) = self.streams.remove(&stream) {
            for handle in stream.watches.into_values() {
                self.forget(handle);
            }
            stream.outbox.close();
        }
    }

    /// A new watch, with the store at `revision`. The answer is queued before any of its events.
    pub fn create(&mut self, stream_handle: u64, create: &WatchCreate<'_>, revision: i64) {
        let handle = self.handle();
        let Some(stream) = self.streams.get_mut(&stream_handle) else { return };
        let key: &[u8] = if create.key.is_empty() { &[0] } else { create.key };
        let created = |watch_id, refused| Frame { watch_id, revision, what: What::Created { refused } };
        if !matches!(create.range_end, [] | [0]) && key >= create.range_end {
            stream.outbox.push(created(-1, Some("mvcc: watcher range is empty")));
            return;
        }
        let id = match create.watch_id {
            0 => {
                while stream.watches.contains_key(&stream.next_id) {
                    stream.next_id += 1;
                }
                stream.next_id += 1;
                stream.next_id - 1
            }
            id if stream.watches.contains_key(&id) => {
                stream.outbox.push(created(-1, Some("mvcc: duplicate watch ID provided on the WatchStream")));
                return;
            }
            id => id,
        };
        stream.watches.insert(id, handle);
        stream.outbox.push(created(id, None));
        let end = match create.range_end {
            [] => None,
            [0] => Some(None),
            end => Some(Some(Box::from(end))),
        };
        let start = if create.start_revision == 0 { revision + 1 } else { create.start_revision };
        let is_lagging = start <= self.position;
        let keys = match end.clone() {
            None => {
                self.by_key.entry(key.into()).or_default().push(handle);
                (Box::from(key), Some(Box::default()))
            }
            Some(end) => {
                self.by_range.entry((key.into(), end.clone())).or_default().push(handle);
                (Box::from(key), end)
            }
        };
        self.with_previous += usize::from(create.prev_kv);
        if is_lagging {
            self.lagging.insert(handle);
        }
        let watcher = Watcher {
            stream: stream_handle,
            id,
            keys,
            start,
            next: start,
            is_lagging,
            progress_notify: create.progress_notify,
            no_put: create.no_put,
            no_delete: create.no_delete,
            prev_kv: create.prev_kv,
            fragment: create.fragment,
            was_active: false,
            gathered: Vec::new(),
        };
        self.watchers.insert(handle, watcher);
    }

    /// The end of a watch on its client's wish, with the store at `revision`; nothing when there is no such watch.
    pub fn cancel(&mut self, stream: u64, id: i64, revision: i64) {
        let Some(stream) = self.streams.get_mut(&stream) else { return };
        let Some(handle) = stream.watches.remove(&id) else { return };
        let what = What::Canceled { compact_revision: 0 };
        stream.outbox.push(Frame { watch_id: id, revision, what });
        self.forget(handle);
    }

    /// The client wants to know how far its stream is; answered when all its watches are synced.
    pub fn request_progress(&mut self, stream: u64) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.wants_progress = true;
        }
    }

    fn forget(&mut self, handle: u64) {
        let Some(watcher) = self.watchers.remove(&handle) else { return };
        self.lagging.remove(&handle);
        self.with_previous -= usize::from(watcher.prev_kv);
        let (key, end) = watcher.keys;
        if end.as_deref() == Some(&[]) {
            remove_from(&mut self.by_key, key, handle);
        } else {
            remove_from(&mut self.by_range, (key, end), handle);
        }
    }

    /// The next batch for those who are synced, when there is something new. All watchers fall back to replay when the
    /// store was replaced by a snapshot's, which may have compacted away what they have not seen.
    pub fn next_batch(&mut self, store: &Store, restores: u64) -> Option<Batch> {
        if restores != self.restores {
            self.restores = restores;
            for (handle, watcher) in &mut self.watchers {
                if !watcher.is_lagging && watcher.next <= store.revision() {
                    watcher.is_lagging = true;
                    watcher.next = watcher.next.max(self.position + 1);
                    #[cfg(feature = "planted-bugs")]
                    if self.planted == Some(Planted::RepeatsAfterRestore) {
                        watcher.next -= 1;
                    }
                    self.lagging.insert(*handle);
                }
            }
            self.position = store.revision();
        }
        if self.watchers.is_empty() {
            // Nobody misses anything.
            self.position = store.revision();
        }
        (self.position < store.revision()).then(|| Batch::read(store, self.position + 1, self.with_previous > 0))
    }

    /// Hands a batch to all who are synced.
    pub fn deliver(&mut self, mut batch: Batch) {
        let touched = self.gather(&mut batch, false);
        self.position = batch.through;
        for handle in touched {
            let sent = self.send(handle, batch.through);
            #[cfg(feature = "planted-bugs")]
            let sent = sent || self.planted == Some(Planted::DropsWhenFull);
            if !sent && let Some(watcher) = self.watchers.get_mut(&handle) {
                watcher.is_lagging = true;
                watcher.next = watcher.next.max(batch.from);
                self.lagging.insert(handle);
            }
        }
    }

    /// The next batch for those who lag and whose clients read, from the one who is furthest behind.
    pub fn next_replay(&mut self, store: &Store) -> Option<Batch> {
        let next = self.lagging.iter().filter_map(|handle| self.watchers.get(handle));
        let ready = next.filter(|w| self.streams.get(&w.stream).is_some_and(|stream| stream.outbox.has_room()));
        let from = ready.map(|watcher| watcher.next).min()?;
        Some(Batch::read(store, from.max(store.compacted()), self.with_previous > 0))
    }

    /// Hands a batch to all who lag. Who wants what is compacted away is told so, and is no watcher any more.
    pub fn replay(&mut self, mut batch: Batch) {
        let lagging: Vec<u64> = self.lagging.iter().copied().collect();
        let mut ready = Vec::new();
        for handle in lagging {
            #[cfg(feature = "planted-bugs")]
            if self.planted == Some(Planted::SkipsCompacted)
                && let Some(watcher) = self.watchers.get_mut(&handle)
            {
                watcher.next = watcher.next.max(batch.compacted);
            }
            let Some(watcher) = self.watchers.get(&handle) else { continue };
            let Some(stream) = self.streams.get_mut(&watcher.stream) else { continue };
            if !stream.outbox.has_room() {
                continue;
            }
            if watcher.next < batch.compacted {
                // etcd gives these no revision.
                let what = What::Canceled { compact_revision: batch.compacted };
                stream.outbox.push(Frame { watch_id: watcher.id, revision: 0, what });
                // As in etcd, the id stays taken until the client cancels it.
                self.forget(handle);
            } else if watcher.next >= batch.from && watcher.next <= batch.through {
                // One whose client made room since the batch was read may be further behind: it waits for its own.
                ready.push(handle);
            }
        }
        self.gather(&mut batch, true);
        for handle in ready {
            let sent = self.send(handle, batch.through);
            let position = self.position;
            if let Some(watcher) = self.watchers.get_mut(&handle)
                && sent
            {
                watcher.next = batch.through + 1;
                if batch.through >= position {
                    watcher.is_lagging = false;
                    self.lagging.remove(&handle);
                }
            }
        }
        // Events for those whose stream filled up between two looks.
        for handle in &self.lagging {
            if let Some(watcher) = self.watchers.get_mut(handle) {
                watcher.gathered.clear();
            }
        }
    }

    /// Collects each watcher's events; who got any.
    fn gather(&mut self, batch: &mut Batch, lagging: bool) -> Vec<u64> {
        let mut touched = Vec::new();
        let Self { watchers, by_key, by_range, .. } = self;
        for event in &mut batch.events {
            let key = event.version.key();
            let exact = by_key.get(key).into_iter().flatten().copied();
            let within = |(from, end): &KeyRange| **from <= *key && end.as_ref().is_none_or(|end| *key < **end);
            let ranges = by_range.iter().filter(|(range, _)| within(range)).flat_map(|(_, handles)| handles).copied();
            let handles: Vec<u64> = exact.chain(ranges).collect();
            let (main, is_tombstone) = (event.version.at.main, event.version.is_tombstone);
            for handle in handles {
                let Some(watcher) = watchers.get_mut(&handle) else { continue };
                let filtered = if is_tombstone { watcher.no_delete } else { watcher.no_put };
                if watcher.is_lagging != lagging || main < watcher.next || filtered {
                    continue;
                }
                if watcher.gathered.is_empty() {
                    touched.push(handle);
                }
                watcher.gathered.push((main, event.encoded(watcher.prev_kv)));
            }
        }
        touched
    }

    /// Queues what was gathered for a watcher; false when its stream is full, and nothing was queued.
    fn send(&mut self, handle: u64, through: i64) -> bool {
        let Some(watcher) = self.watchers.get_mut(&handle) else { return true };
        let gathered = std::mem::take(&mut watcher.gathered);
        if gathered.is_empty() {
            return true;
        }
        let Some(stream) = self.streams.get(&watcher.stream) else { return true };
        if !stream.outbox.has_room() {
            return false;
        }
        watcher.was_active = true;
        let mut pieces: Vec<Vec<Bytes>> = vec![Vec::new()];
        let mut bytes = 0;
        for (_, event) in gathered {
            if watcher.fragment && bytes > 0 && bytes + event.len() > self.max_fragment_bytes {
                pieces.push(Vec::new());
                bytes = 0;
            }
            bytes += event.len();
            if let Some(piece) = pieces.last_mut() {
                piece.push(event);
            }
        }
        let last = pieces.len() - 1;
        for (index, events) in pieces.into_iter().enumerate() {
            let what = What::Events { events, fragment: index < last };
            stream.outbox.push(Frame { watch_id: watcher.id, revision: through, what });
        }
        true
    }

    /// Answers the wishes for progress that can be answered now, after everything new was handed out.
    pub fn answer_progress(&mut self) {
        for stream in self.streams.values_mut().filter(|stream| stream.wants_progress) {
            let mut watchers = stream.watches.values().filter_map(|handle| self.watchers.get(handle));
            let all_synced = watchers.all(|watcher| !watcher.is_lagging && watcher.start <= self.position + 1);
            #[cfg(feature = "planted-bugs")]
            let all_synced = all_synced || self.planted == Some(Planted::ProgressOvertakes);
            if all_synced {
                stream.wants_progress = false;
                stream.outbox.push(Frame { watch_id: -1, revision: self.position, what: What::Progress });
            }
        }
    }

    /// A sign of life for every synced watcher that asked for them and had nothing to read since the last round.
    pub fn notify_progress(&mut self) {
        for watcher in self.watchers.values_mut().filter(|watcher| watcher.progress_notify) {
            let is_quiet = !std::mem::take(&mut watcher.was_active);
            let Some(stream) = self.streams.get(&watcher.stream) else { continue };
            let is_current = !watcher.is_lagging && watcher.start <= self.position + 1;
            if is_quiet && is_current && stream.outbox.has_room() {
                stream.outbox.push(Frame { watch_id: watcher.id, revision: self.position, what: What::Progress });
            }
        }
    }
}

fn remove_from<K: std::hash::Hash + Eq>(map: &mut HashMap<K, Vec<u64>>, key: K, handle: u64) {
    if let std::collections::hash_map::Entry::Occupied(mut entry) = map.entry(key) {
        entry.get_mut().retain(|other| *other != handle);
        if entry.get().is_empty() {
            entry.remove();
        }
    }
}
