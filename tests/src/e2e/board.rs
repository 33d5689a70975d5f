//! When each pod's create left, and when and where it was first seen.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use minipod_proto::v1::ObjectMeta;
use tokio::sync::Notify;

/// Written by all sessions and creators at once, without a lock.
#[derive(Debug)]
pub struct Board {
    prefix: &'static str,
    start: Instant,
    slots: Vec<Slot>,
    seen: AtomicUsize,
    moved: AtomicUsize,
    more: Notify,
}

/// Nanoseconds since the board's start; 0 is "not yet".
#[derive(Debug, Default)]
struct Slot {
    created: AtomicU64,
    seen: AtomicU64,
    /// One more than the node's number.
    node: AtomicUsize,
}

impl Board {
    /// A board for pods with the names `PREFIX-0` to one less than `PREFIX-PODS`.
    pub fn new(prefix: &'static str, pods: usize) -> Board {
        let slots = (0..pods).map(|_| Slot::default()).collect();
        let (seen, moved) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Board { prefix, start: Instant::now(), slots, seen, moved, more: Notify::new() }
    }

    /// The name of a pod.
    pub fn name(&self, index: usize) -> String {
        format!("{}-{index}", self.prefix)
    }

    /// How many pods are awaited.
    pub fn pods(&self) -> usize {
        self.slots.len()
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1)
    }

    /// A pod's create is about to be sent.
    pub fn created(&self, index: usize) {
        if let Some(slot) = self.slots.get(index) {
            slot.created.store(self.now(), Ordering::Relaxed);
        }
    }

    /// A node's session has brought a pod.
    pub fn seen(&self, pod: &ObjectMeta, node: usize) {
        let index = pod.name.strip_prefix(self.prefix).and_then(|rest| rest.strip_prefix('-')?.parse::<usize>().ok());
        let Some(slot) = index.and_then(|index| self.slots.get(index)) else { return };
        match slot.node.compare_exchange(0, node + 1, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => {
                slot.seen.store(self.now(), Ordering::Release);
                self.seen.fetch_add(1, Ordering::AcqRel);
                self.more.notify_one();
            }
            Err(before) if before != node + 1 => {
                self.moved.fetch_add(1, Ordering::AcqRel);
            }
            Err(_) => {}
        }
    }

    /// How many pods have been seen.
    pub fn count(&self) -> usize {
        self.seen.load(Ordering::Acquire)
    }

    /// Pods that came to a second node: there must be none.
    pub fn moved(&self) -> usize {
        self.moved.load(Ordering::Acquire)
    }

    /// The number of the node that a pod came to.
    pub fn node(&self, index: usize) -> Option<usize> {
        self.slots.get(index)?.node.load(Ordering::Acquire).checked_sub(1)
    }

    /// Waits until all pods are seen.
    ///
    /// # Errors
    /// When none comes for `patience`; how many have.
    pub async fn all_seen(&self, patience: Duration) -> Result<(), String> {
        while self.count() < self.pods() {
            let before = self.count();
            let more = tokio::time::timeout(patience, self.more.notified()).await;
            if more.is_err() && self.count() == before {
                let (seen, pods) = (self.count(), self.pods());
                return Err(format!("{seen} of {pods} pods {}-N were seen, and none for {patience:?}", self.prefix));
            }
        }
        Ok(())
    }

    /// Milliseconds of each pod from its create to its node, sorted.
    pub fn latencies_ms(&self) -> Vec<f64> {
        let took = |slot: &Slot| {
            let (created, seen) = (slot.created.load(Ordering::Relaxed), slot.seen.load(Ordering::Acquire));
            (created > 0 && seen > 0).then(|| seen.saturating_sub(created) as f64 / 1e6)
        };
        let mut all: Vec<f64> = self.slots.iter().filter_map(took).collect();
        all.sort_by(f64::total_cmp);
        all
    }

    /// Seconds from the first create to the last pod seen.
    pub fn span_s(&self) -> f64 {
        let first = self.slots.iter().map(|slot| slot.created.load(Ordering::Relaxed)).filter(|at| *at > 0).min();
        let last = self.slots.iter().map(|slot| slot.seen.load(Ordering::Acquire)).max();
        last.zip(first).map_or(0.0, |(last, first)| last.saturating_sub(first) as f64 / 1e9)
    }

    /// Pods seen in each second after the first create.
    pub fn by_second(&self) -> Vec<usize> {
        let first = self.slots.iter().map(|slot| slot.created.load(Ordering::Relaxed)).min().unwrap_or(0);
        let mut seconds = Vec::new();
        for at in self.slots.iter().map(|slot| slot.seen.load(Ordering::Acquire)).filter(|at| *at > 0) {
            let second = usize::try_from(at.saturating_sub(first) / 1_000_000_000).unwrap_or(0);
            if seconds.len() <= second {
                seconds.resize(second + 1, 0);
            }
            if let Some(count) = seconds.get_mut(second) {
                *count += 1;
            }
        }
        seconds
    }
}

/// Nearest rank of a sorted sample.
pub fn percentile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> ObjectMeta {
        ObjectMeta { name: name.to_owned(), ..ObjectMeta::default() }
    }

    #[tokio::test]
    async fn a_pod_counts_once_and_a_second_node_is_noticed() {
        let board = Board::new("pod", 2);
        board.created(0);
        board.seen(&named("pod-0"), 3);
        board.seen(&named("pod-0"), 3);
        board.seen(&named("init-1"), 3);
        board.seen(&named("pod-2"), 3);
        assert_eq!((board.count(), board.moved(), board.node(0), board.node(1)), (1, 0, Some(3), None));
        assert!(board.all_seen(Duration::from_millis(1)).await.is_err());
        board.seen(&named("pod-0"), 4);
        board.seen(&named("pod-1"), 0);
        assert_eq!((board.count(), board.moved(), board.node(1)), (2, 1, Some(0)));
        assert_eq!(board.all_seen(Duration::ZERO).await, Ok(()));
        assert_eq!(board.latencies_ms().len(), 1, "of the second pod no create was told");
    }
}
