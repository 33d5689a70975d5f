//! Long waits that get nodes held for them.

use std::sync::Arc;

use super::Planner;
use crate::plan::PodId;

/// Nodes are held for one pod or gang for this long; then it is another's turn, milliseconds.
const HOLD_MS: i64 = 10 * 60_000;
/// How often it is looked at who has waited long, milliseconds.
const HOLD_CHECK_MS: i64 = 1_000;
/// Of those who have waited long, so many are considered; those that fit nowhere are passed over.
const CANDIDATES: usize = 16;

impl Planner {
    /// Holds nodes for whoever has waited longest, once that is too long.
    pub(super) fn manage_hold(&mut self, now_ms: i64) {
        if now_ms < self.hold_check_ms {
            return;
        }
        self.hold_check_ms = now_ms + HOLD_CHECK_MS;
        let holders = self.core.holders();
        if !holders.is_empty() {
            let waits = |uid: &Arc<str>| self.core.pod_id(uid).is_some_and(|pod| self.core.place_of(pod).is_none());
            let over = !holders.iter().any(waits) || now_ms >= self.hold_until_ms;
            if !over {
                self.move_hold(now_ms);
                return;
            }
            // Whoever has had its time goes to the end of the line.
            let had: Vec<Arc<str>> = holders.to_vec();
            self.requeue_gangs(&had, now_ms);
            for uid in had {
                self.waits_since.entry(uid).and_modify(|since| *since = now_ms);
            }
            self.core.release_hold();
            self.changed = true;
        }
        for pods in self.long_waiters(now_ms) {
            // Places are being cleared for it already.
            if pods.iter().any(|pod| self.core.place_of(*pod).is_some()) {
                continue;
            }
            if self.core.hold_for(&pods) {
                self.hold_until_ms = now_ms + HOLD_MS;
                (self.hold_progress, self.hold_moved_ms) = (self.core.hold_progress(), now_ms);
                self.changed = true;
                return;
            }
        }
    }

    /// Held nodes that have got no emptier for as long as a pod waits for a hold are changed for others.
    fn move_hold(&mut self, now_ms: i64) {
        let progress = self.core.hold_progress();
        if progress > self.hold_progress {
            (self.hold_progress, self.hold_moved_ms) = (progress, now_ms);
        } else if now_ms - self.hold_moved_ms >= self.settings.hold_after_ms {
            self.core.hold_elsewhere();
            (self.hold_progress, self.hold_moved_ms) = (self.core.hold_progress(), now_ms);
            self.changed = true;
        }
    }

    /// Pods and gangs that have waited long, the first in turn first.
    fn long_waiters(&self, now_ms: i64) -> Vec<Vec<PodId>> {
        let long = |since: i64| since.saturating_add(self.settings.hold_after_ms) <= now_ms;
        let gangs = self.gangs.values().filter(|gang| gang.is_complete() && gang.waits_since_ms.is_some_and(long));
        let gangs = gangs.filter_map(|gang| Some((gang.pending.first()?, gang.pending.iter().collect::<Vec<_>>())));
        let singles = self.waiting.values().filter_map(|waiting| {
            let first = waiting.turns.first()?;
            long(*self.waits_since.get(&first.2)?).then(|| (first, vec![first]))
        });
        let mut all: Vec<_> = gangs.chain(singles).collect();
        all.sort_by_key(|(turn, _)| *turn);
        let pods = all
            .into_iter()
            .take(CANDIDATES)
            .map(|(_, turns)| turns.into_iter().filter_map(|(_, _, uid)| self.core.pod_id(uid)).collect());
        pods.collect()
    }
}
