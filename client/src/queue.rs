//! A queue of keys that have work: each key at most once in the queue and in at most one pair of hands, later if asked, later and
//! later if its job keeps failing.
//!
//! It holds keys, not jobs: whoever takes a key looks at the present state of its object. It is bounded by the number of
//! distinct keys, that is of objects, which the API server bounds.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use minipod_daemon::backoff::Backoff;
use tokio::sync::Notify;
use tokio::time::Instant;

/// A queue of keys. Clones share it.
#[derive(Debug)]
pub struct WorkQueue<K> {
    shared: Arc<Shared<K>>,
}

impl<K> Clone for WorkQueue<K> {
    fn clone(&self) -> WorkQueue<K> {
        WorkQueue { shared: Arc::clone(&self.shared) }
    }
}

#[derive(Debug)]
struct Shared<K> {
    core: Mutex<Core<K>>,
    /// Told when something may have become due earlier than the sleepers know.
    changed: Notify,
}

/// A key that is in this pair of hands. Dropping it is [`Job::done`].
#[derive(Debug)]
pub struct Job<K: Clone + Eq + Hash> {
    key: K,
    shared: Arc<Shared<K>>,
    outcome: Outcome,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Well: its back-off starts over.
    Done,
    /// To be done again after that time, without having failed.
    Again(Duration),
    /// It failed: again after the back-off.
    Failed,
}

impl<K: Clone + Eq + Hash> WorkQueue<K> {
    /// An empty queue; a key that fails waits `first`, then twice that, up to `limit`.
    #[must_use]
    pub fn new(first: Duration, limit: Duration) -> WorkQueue<K> {
        let core =
            Core { due: BTreeMap::new(), entries: HashMap::new(), sequence: 0, backoff: Backoff::new(first, limit) };
        WorkQueue { shared: Arc::new(Shared { core: Mutex::new(core), changed: Notify::new() }) }
    }

    /// The key has work now. A key that is waiting moves forward; one in hands comes again when it is done.
    pub fn add(&self, key: K) {
        self.add_after(key, Duration::ZERO);
    }

    /// The key has work after that time, or earlier if it was to come earlier anyway.
    pub fn add_after(&self, key: K, wait: Duration) {
        let due = Instant::now() + wait;
        self.shared.lock().add(key, due);
        self.shared.changed.notify_one();
    }

    /// The key needs no work any more: takes it out if it waits, and forgets its failures. One in hands stays there.
    pub fn remove(&self, key: &K) {
        self.shared.lock().remove(key);
    }

    /// The next key that is due, oldest first; waits for one. Several may wait. Cancel safe: a key is taken only when it is returned.
    pub async fn next(&self) -> Job<K> {
        loop {
            let changed = self.shared.changed.notified();
            let due = match self.shared.lock().take(Instant::now()) {
                Taken::Key(key) => {
                    // Whoever else waits was told of one change, and there may be more than one key.
                    self.shared.changed.notify_one();
                    return Job { key, shared: Arc::clone(&self.shared), outcome: Outcome::Done };
                }
                Taken::Until(due) => due,
            };
            match due {
                // Both arms are cancel safe: they only tell when to look again.
                Some(due) => tokio::select! { () = changed => {}, () = tokio::time::sleep_until(due) => {} },
                None => changed.await,
            }
        }
    }

    /// Keys that wait, due or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.lock().due.len()
    }

    /// Whether no key waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K> Shared<K> {
    fn lock(&self) -> MutexGuard<'_, Core<K>> {
        // Every change of the core is complete before anything in it could panic.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Clone + Eq + Hash> Job<K> {
    /// Whose work it is.
    #[must_use]
    pub fn key(&self) -> &K {
        &self.key
    }

    /// It is done; the key's failures are forgotten.
    pub fn done(self) {}

    /// It is to be done again after that time, though it did not fail.
    pub fn again_after(mut self, wait: Duration) {
        self.outcome = Outcome::Again(wait);
    }

    /// It failed: the key comes again after its back-off.
    pub fn failed(mut self) {
        self.outcome = Outcome::Failed;
    }
}

impl<K: Clone + Eq + Hash> Drop for Job<K> {
    fn drop(&mut self) {
        self.shared.lock().finish(&self.key, self.outcome, Instant::now());
        self.shared.changed.notify_one();
    }
}

/// Ordered by when it is due, then by when it was added.
type Slot = (Instant, u64);

/// The queue without clock and waiting.
#[derive(Debug)]
struct Core<K> {
    due: BTreeMap<Slot, K>,
    entries: HashMap<K, Entry>,
    sequence: u64,
    /// A back-off that has seen no failure.
    backoff: Backoff,
}

#[derive(Debug)]
struct Entry {
    place: Place,
    /// Set after a failure.
    backoff: Option<Backoff>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Waiting(Slot),
    /// Somebody works on it; with a time: it came again meanwhile.
    InHands(Option<Instant>),
}

enum Taken<K> {
    Key(K),
    /// Nothing before this; `None`: nothing at all.
    Until(Option<Instant>),
}

impl<K: Clone + Eq + Hash> Core<K> {
    fn add(&mut self, key: K, due: Instant) {
        match self.entries.get_mut(&key) {
            None => {
                let place = Place::Waiting(self.enqueue(key.clone(), due));
                self.entries.insert(key, Entry { place, backoff: None });
            }
            Some(Entry { place: Place::InHands(again), .. }) => *again = Some(again.map_or(due, |at| at.min(due))),
            Some(Entry { place: Place::Waiting(slot), .. }) if slot.0 <= due => {}
            Some(Entry { place: Place::Waiting(slot), .. }) => {
                let slot = *slot;
                self.due.remove(&slot);
                let slot = self.enqueue(key.clone(), due);
                if let Some(entry) = self.entries.get_mut(&key) {
                    entry.place = Place::Waiting(slot);
                }
            }
        }
    }

    fn enqueue(&mut self, key: K, due: Instant) -> Slot {
        self.sequence += 1;
        self.due.insert((due, self.sequence), key);
        (due, self.sequence)
    }

    fn take(&mut self, now: Instant) -> Taken<K> {
        let Some(first) = self.due.first_entry() else { return Taken::Until(None) };
        if first.key().0 > now {
            return Taken::Until(Some(first.key().0));
        }
        let key = first.remove();
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.place = Place::InHands(None);
        }
        Taken::Key(key)
    }

    fn finish(&mut self, key: &K, outcome: Outcome, now: Instant) {
        let Some(mut entry) = self.entries.remove(key) else { return };
        let came_again = match entry.place {
            Place::InHands(again) => again,
            Place::Waiting(_) => None,
        };
        let wanted = match outcome {
            Outcome::Done => {
                entry.backoff = None;
                None
            }
            Outcome::Again(wait) => {
                entry.backoff = None;
                Some(now + wait)
            }
            Outcome::Failed => Some(now + entry.backoff.get_or_insert_with(|| self.backoff.clone()).next_wait()),
        };
        let due = match (wanted, came_again) {
            // News about a failing key is no reason to hammer: its back-off counts.
            (Some(wanted), _) if outcome == Outcome::Failed => Some(wanted),
            (Some(wanted), Some(again)) => Some(wanted.min(again)),
            (one, other) => one.or(other),
        };
        if let Some(due) = due {
            entry.place = Place::Waiting(self.enqueue(key.clone(), due));
            self.entries.insert(key.clone(), entry);
        }
    }

    fn remove(&mut self, key: &K) {
        match self.entries.get_mut(key) {
            Some(Entry { place: Place::Waiting(slot), .. }) => {
                let slot = *slot;
                self.due.remove(&slot);
                self.entries.remove(key);
            }
            Some(Entry { place: Place::InHands(again), backoff }) => (*again, *backoff) = (None, None),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn core() -> Core<&'static str> {
        let backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(8));
        Core { due: BTreeMap::new(), entries: HashMap::new(), sequence: 0, backoff }
    }

    fn key(taken: Taken<&'static str>) -> Option<&'static str> {
        match taken {
            Taken::Key(key) => Some(key),
            Taken::Until(_) => None,
        }
    }

    #[test]
    fn a_key_is_once_in_the_queue_and_in_one_pair_of_hands() {
        let (mut core, now) = (core(), Instant::now());
        for name in ["a", "b", "a", "a"] {
            core.add(name, now);
        }
        assert_eq!(key(core.take(now)), Some("a"));
        core.add("a", now);
        assert_eq!(key(core.take(now)), Some("b"));
        assert_eq!(key(core.take(now)), None, "a is in hands");
        core.finish(&"a", Outcome::Done, now);
        assert_eq!(key(core.take(now)), Some("a"), "it came again while it was in hands");
        core.finish(&"a", Outcome::Done, now);
        core.finish(&"b", Outcome::Done, now);
        assert!(core.entries.is_empty() && core.due.is_empty(), "nothing is remembered of what is done");
    }

    #[test]
    fn the_earlier_time_counts() {
        let (mut core, now) = (core(), Instant::now());
        let at = |seconds| now + Duration::from_secs(seconds);
        core.add("a", at(10));
        core.add("a", at(5));
        core.add("a", at(20));
        assert_eq!(key(core.take(at(4))), None);
        assert_eq!(key(core.take(at(5))), Some("a"));
        core.finish(&"a", Outcome::Again(Duration::from_secs(3)), at(6));
        assert_eq!(key(core.take(at(8))), None);
        assert_eq!(key(core.take(at(9))), Some("a"));
    }

    #[test]
    fn failures_back_off_until_one_job_is_done() {
        let (mut core, mut now) = (core(), Instant::now());
        core.add("a", now);
        for ceiling in [1, 2, 4, 8, 8] {
            assert_eq!(key(core.take(now)), Some("a"));
            core.add("a", now);
            core.finish(&"a", Outcome::Failed, now);
            let ceiling = Duration::from_secs(ceiling);
            assert_eq!(key(core.take(now + ceiling / 2 - Duration::from_millis(1))), None, "{ceiling:?}");
            now += ceiling;
        }
        assert_eq!(key(core.take(now)), Some("a"));
        core.finish(&"a", Outcome::Done, now);
        core.add("a", now);
        assert_eq!(key(core.take(now)), Some("a"));
        core.finish(&"a", Outcome::Failed, now);
        assert_eq!(key(core.take(now + Duration::from_secs(1))), Some("a"));
    }

    #[test]
    fn a_removed_key_does_not_come() {
        let (mut core, now) = (core(), Instant::now());
        core.add("a", now);
        core.remove(&"a");
        assert_eq!(key(core.take(now)), None);
        core.add("a", now);
        assert_eq!(key(core.take(now)), Some("a"));
        core.add("a", now);
        core.remove(&"a");
        core.finish(&"a", Outcome::Done, now);
        assert_eq!(key(core.take(now)), None);
        assert!(core.entries.is_empty());
    }

    #[tokio::test]
    async fn many_workers_never_share_a_key() {
        let queue = WorkQueue::new(Duration::from_millis(1), Duration::from_millis(10));
        let in_hands = Arc::new(Mutex::new(std::collections::HashSet::new()));
        let done = Arc::new(Mutex::new(0_usize));
        let workers: Vec<_> = (0..8)
            .map(|_| {
                let (queue, in_hands, done) = (queue.clone(), Arc::clone(&in_hands), Arc::clone(&done));
                tokio::spawn(async move {
                    loop {
                        let job: Job<u32> = queue.next().await;
                        assert!(in_hands.lock().unwrap().insert(*job.key()), "{} is in two pairs of hands", job.key());
                        tokio::task::yield_now().await;
                        in_hands.lock().unwrap().remove(job.key());
                        *done.lock().unwrap() += 1;
                        if job.key().is_multiple_of(3) {
                            job.again_after(Duration::from_micros(100));
                        }
                    }
                })
            })
            .collect();
        for round in 0..200_u32 {
            queue.add(round % 20);
            if round % 7 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        let late = Instant::now() + Duration::from_secs(10);
        while *done.lock().unwrap() < 200 {
            assert!(Instant::now() < late, "only {} jobs were done", *done.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        for worker in workers {
            assert!(!worker.is_finished(), "a worker failed: {:?}", worker.await);
            worker.abort();
        }
    }

    #[tokio::test]
    async fn a_worker_sleeps_until_the_key_is_due() {
        let queue = WorkQueue::new(Duration::from_millis(1), Duration::from_millis(10));
        queue.add_after("late", Duration::from_secs(60));
        queue.add_after("soon", Duration::from_millis(20));
        let start = Instant::now();
        let job = queue.next().await;
        assert_eq!(*job.key(), "soon");
        assert!(start.elapsed() >= Duration::from_millis(20));
        job.done();
        let waiting = tokio::spawn({
            let queue = queue.clone();
            async move { *queue.next().await.key() }
        });
        tokio::task::yield_now().await;
        queue.add("late");
        assert_eq!(waiting.await.unwrap(), "late", "moved forward");
    }
}
