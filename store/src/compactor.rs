//! Automatic compaction: which revision to compact to, and when. The decision is pure; [`keep_compacting`] carries it out.

use crate::machine::Replicator;
use crate::state::{Kind, Shared, request_command};
use etcd_client::proto::PbCompactionRequest;
use prost::Message as _;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What of the history is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Retention {
    /// All of it.
    #[default]
    All,
    /// So many revisions.
    Revisions(i64),
    /// What was the present within this time.
    Time(Duration),
}

/// How often the store is looked at: as etcd does in its revision mode, but more often, so that compactions stay small.
const LOOK: Duration = Duration::from_secs(60);
/// A retention by time remembers so many revisions, evenly spaced.
const SAMPLES: u32 = 10;

/// Decides on compactions.
#[derive(Debug)]
pub struct Compactor {
    retention: Retention,
    /// When which revision was the present; bounded because old ones are used up.
    samples: VecDeque<(Instant, i64)>,
    compacted: i64,
}

impl Compactor {
    /// One that has seen nothing.
    #[must_use]
    pub const fn new(retention: Retention) -> Self {
        Self { retention, samples: VecDeque::new(), compacted: 0 }
    }

    /// How long to wait between two looks.
    #[must_use]
    pub fn interval(&self) -> Duration {
        match self.retention {
            Retention::Time(time) => (time / SAMPLES).clamp(Duration::from_millis(100), LOOK),
            Retention::All | Retention::Revisions(_) => LOOK,
        }
    }

    /// The revision to compact to, now that the present is `revision`.
    pub fn look(&mut self, now: Instant, revision: i64) -> Option<i64> {
        let target = match self.retention {
            Retention::All => return None,
            Retention::Revisions(keep) => revision - keep,
            Retention::Time(time) => {
                self.samples.push_back((now, revision));
                let mut target = 0;
                while let Some((at, sample)) = self.samples.front().copied()
                    && now.saturating_duration_since(at) >= time
                {
                    target = sample;
                    self.samples.pop_front();
                }
                target
            }
        };
        if target <= self.compacted {
            return None;
        }
        self.compacted = target;
        Some(target)
    }
}

/// Compacts as `retention` says while this member leads; runs until it is dropped.
pub async fn keep_compacting<R: Replicator>(replicator: R, shared: Arc<Shared>, retention: Retention) {
    let mut compactor = Compactor::new(retention);
    let mut tick = tokio::time::interval(compactor.interval());
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let (revision, status) = (shared.read().revision(), replicator.status());
        // Every member looks, so that a new leader knows the past.
        let Some(target) = compactor.look(Instant::now(), revision) else { continue };
        if status.leader_id != status.member_id {
            continue;
        }
        let request = PbCompactionRequest { revision: target, physical: false };
        match replicator.propose(request_command(Kind::Compact, &request.encode_to_vec())).await {
            Ok(_) => tracing::info!(revision = target, "compacted the history"),
            Err(error) => tracing::warn!(%error, revision = target, "compact the history"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_so_many_revisions() {
        let mut compactor = Compactor::new(Retention::Revisions(100));
        let now = Instant::now();
        for (revision, target) in [(50, None), (100, None), (150, Some(50)), (150, None), (151, Some(51)), (151, None)]
        {
            assert_eq!(compactor.look(now, revision), target, "at {revision}");
        }
    }

    #[test]
    fn keeps_what_was_the_present_within_the_time() {
        let mut compactor = Compactor::new(Retention::Time(Duration::from_secs(10)));
        let start = Instant::now();
        for (second, revision, target) in [
            (0, 10, None),
            (5, 20, None),
            (9, 30, None),
            (10, 40, Some(10)),
            (11, 41, None),
            (19, 50, Some(30)),
            (40, 50, Some(50)),
            (60, 50, None),
        ] {
            assert_eq!(compactor.look(start + Duration::from_secs(second), revision), target, "after {second} s");
        }
        assert!(compactor.samples.len() < 20);
    }

    #[test]
    fn keeps_all() {
        assert_eq!(Compactor::new(Retention::All).look(Instant::now(), 1_000_000), None);
    }
}
