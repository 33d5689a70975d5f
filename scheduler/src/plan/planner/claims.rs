//! Pods whose place is being cleared by preemption, and long waits that get nodes held for them.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Planner, Step, turn};
use crate::plan::PodId;

/// Victims get their own grace; if they are not gone after this long, the claim is given up, milliseconds.
const CLAIM_MS: i64 = 10 * 60_000;
/// A class whose pods may not preempt anybody now is not tried again before this has passed, milliseconds.
pub(super) const PREEMPT_MS: i64 = 1_000;
/// Nodes are held for one pod or gang for this long; then it is another's turn, milliseconds.
const HOLD_MS: i64 = 10 * 60_000;
/// How often it is looked at who has waited long, milliseconds.
const HOLD_CHECK_MS: i64 = 1_000;
/// Of those who have waited long, so many are considered; those that fit nowhere are passed over.
const CANDIDATES: usize = 16;

/// A pod that is to be ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Victim {
    /// metadata.namespace.
    pub namespace: String,
    /// metadata.name.
    pub pod: Arc<str>,
    /// metadata.uid.
    pub uid: Arc<str>,
}

/// Pods to be ended so that another fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eviction {
    /// Uid of the pod that needs the place.
    pub uid: Arc<str>,
    /// `namespace/name` of it.
    pub preemptor: String,
    /// Its node.
    pub node: String,
    /// Whom to end.
    pub victims: Vec<Victim>,
}

/// A pod that counts on a node whose victims have not left yet.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) victims: BTreeSet<Arc<str>>,
    pub(super) until_ms: i64,
}

impl Planner {
    /// Clears a place for a pod, if ending others helps. The pod counts there from now on.
    pub(super) fn try_preempt(&mut self, pod: PodId, now_ms: i64) -> Option<Step> {
        let class = self.core.class_of(pod)?;
        if self.waiting.get(&class).is_some_and(|waiting| waiting.preempt_at_ms > now_ms) {
            return None;
        }
        let preemption = self.core.preempt(pod)?;
        let victims = preemption.victims.iter().filter_map(|victim| self.core.pod(*victim));
        let victims: Vec<Victim> = victims
            .map(|info| Victim {
                namespace: info.namespace().to_owned(),
                pod: Arc::clone(&info.name),
                uid: Arc::clone(&info.uid),
            })
            .collect();
        let info = self.core.pod(pod)?;
        let (uid, preemptor) = (Arc::clone(&info.uid), info.key());
        let node = self.core.node_name(preemption.node).to_owned();
        self.core.assume(pod, preemption.node);
        let uids = victims.iter().map(|victim| Arc::clone(&victim.uid)).collect();
        self.claims.insert(Arc::clone(&uid), Claim { victims: uids, until_ms: now_ms + CLAIM_MS });
        let message = format!("{} pods of lower priority are ended on {node} to make room", victims.len());
        self.tell_later(Arc::clone(&uid), &message.into());
        // Victims that only wait for their own bindings have no process: they count, and are ended like the others.
        Some(Step::Evict(Eviction { uid, preemptor, node, victims }))
    }

    /// A pod has left: claims that waited for it alone are decided on again.
    pub(super) fn victim_gone(&mut self, uid: &str) {
        let mut free = Vec::new();
        for (preemptor, claim) in &mut self.claims {
            if claim.victims.remove(uid) && claim.victims.is_empty() {
                free.push(Arc::clone(preemptor));
            }
        }
        for uid in free {
            self.end_claim(&uid);
        }
    }

    /// The pod counts nowhere any more and is decided on like any other.
    fn end_claim(&mut self, uid: &Arc<str>) {
        if self.claims.remove(uid).is_none() {
            return;
        }
        let Some(pod) = self.core.pod_id(uid) else { return };
        self.core.forget(pod);
        if self.core.place_of(pod).is_none()
            && let Some(info) = self.core.pod(pod)
        {
            self.ready.insert(turn(info));
        }
    }

    /// A victim could not be ended: the preemptor is decided on anew.
    pub fn eviction_failed(&mut self, uid: &str, now_ms: i64) {
        if self.claims.remove(uid).is_some() {
            self.give_back(uid, now_ms);
        }
    }

    pub(super) fn expire_claims(&mut self, now_ms: i64) {
        let late = self.claims.iter().filter(|(_, claim)| claim.until_ms <= now_ms);
        let late: Vec<Arc<str>> = late.map(|(uid, _)| Arc::clone(uid)).collect();
        for uid in late {
            self.end_claim(&uid);
        }
    }

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
