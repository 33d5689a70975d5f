//! Pods whose place is being cleared by preemption.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{Planner, Step, turn};
use crate::plan::{NodeId, PodId};

/// Victims get their own grace; if they are not gone after this long, the claim is given up, milliseconds.
pub(super) const CLAIM_MS: i64 = 10 * 60_000;
/// A class whose pods may not preempt anybody now is not tried again before this has passed, milliseconds.
pub(super) const PREEMPT_MS: i64 = 1_000;

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

/// A pod that is to get a place where others are ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nominee {
    /// metadata.namespace.
    pub namespace: String,
    /// metadata.name.
    pub pod: Arc<str>,
    /// metadata.uid.
    pub uid: Arc<str>,
    /// Its node.
    pub node: String,
    /// The nomination that this decision knew of. Of two schedulers that decide on the same pod the API server lets one through.
    pub seen: String,
}

/// Pods to be ended so that another, or a gang, fits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eviction {
    /// `namespace/name` of the pod or of the group that needs the places.
    pub preemptor: String,
    /// Who gets which place. They are nominated before anybody is ended, so that other schedulers keep out.
    pub nominees: Vec<Nominee>,
    /// Whom to end.
    pub victims: Vec<Victim>,
}

/// A pod that counts on a node whose victims have not left yet.
#[derive(Debug)]
pub(super) struct Claim {
    /// Empty: they have left, and the pod's turn is to come.
    pub(super) victims: BTreeSet<Arc<str>>,
    pub(super) until_ms: i64,
}

/// What preemption comes to.
pub(super) enum Cleared {
    /// It does not help, or may not be.
    No,
    /// Pods are being ended already.
    Waits,
    /// These are to be ended.
    Evict(Step),
}

impl Planner {
    /// The best node for a pod. Where only the promise to a less important one is in the way, that one is decided on anew.
    pub(super) fn find_place(&mut self, pod: PodId) -> Option<NodeId> {
        if let Some(node) = self.core.decide(pod) {
            return Some(node);
        }
        let priority = self.core.pod(pod)?.needs.priority;
        let lifted = self.core.lift_promises(priority);
        if lifted.is_empty() {
            return None;
        }
        let node = self.core.decide(pod);
        self.restore(lifted, |at| Some(at) == node);
        node
    }

    /// Gives promises again that were lifted, but those on nodes that somebody more important takes.
    pub(super) fn restore(&mut self, lifted: Vec<(PodId, NodeId)>, taken: impl Fn(NodeId) -> bool) {
        for (other, at) in lifted {
            if !taken(at) {
                self.core.promise(other, at);
                continue;
            }
            let Some(info) = self.core.pod(other) else { continue };
            // Another scheduler's pod is not ours to decide on: that scheduler sees the binding.
            let (uid, turn) = (Arc::clone(&info.uid), turn(info));
            if self.claims.remove(&uid).is_some() {
                self.outdated.insert(uid, None);
                self.ready.insert(turn);
            }
        }
    }

    /// Clears a place for a pod, if ending others helps. The pod counts there from now on.
    pub(super) fn try_preempt(&mut self, pod: PodId, now_ms: i64) -> Cleared {
        if self.claim_again(pod, now_ms) {
            return Cleared::Waits;
        }
        let Some(class) = self.core.class_of(pod) else { return Cleared::No };
        if self.waiting.get(&class).is_some_and(|waiting| waiting.preempt_at_ms > now_ms) {
            return Cleared::No;
        }
        let Some(preemption) = self.core.preempt(pod) else { return Cleared::No };
        let victims = self.victims(preemption.victims.iter().copied());
        let Some(info) = self.core.pod(pod) else { return Cleared::No };
        let preemptor = info.key();
        let node = self.core.node_name(preemption.node);
        let message = format!("{} pods of lower priority are ended on {node} to make room", victims.len());
        let nominee = self.nominate(pod, preemption.node, &victims, &message.into(), now_ms);
        // Victims that only wait for their own bindings have no process: they count, and are ended like the others.
        Cleared::Evict(Step::Evict(Eviction { preemptor, nominees: nominee.into_iter().collect(), victims }))
    }

    /// Promises a pod its place, and has it told.
    pub(super) fn nominate(
        &mut self,
        pod: PodId,
        node: NodeId,
        victims: &[Victim],
        message: &Arc<str>,
        now_ms: i64,
    ) -> Option<Nominee> {
        self.core.promise(pod, node);
        let info = self.core.pod(pod)?;
        let nominee = Nominee {
            namespace: info.namespace().to_owned(),
            pod: Arc::clone(&info.name),
            uid: Arc::clone(&info.uid),
            node: self.core.node_name(node).to_owned(),
            seen: info.nominated.as_deref().unwrap_or_default().to_owned(),
        };
        let victims = victims.iter().map(|victim| Arc::clone(&victim.uid)).collect();
        self.claims.insert(Arc::clone(&nominee.uid), Claim { victims, until_ms: now_ms + CLAIM_MS });
        self.tell_later(Arc::clone(&nominee.uid), message);
        Some(nominee)
    }

    /// What is told of pods that are to be ended.
    pub(super) fn victims(&self, pods: impl Iterator<Item = PodId>) -> Vec<Victim> {
        let infos = pods.filter_map(|victim| self.core.pod(victim));
        let victims = infos.map(|info| Victim {
            namespace: info.namespace().to_owned(),
            pod: Arc::clone(&info.name),
            uid: Arc::clone(&info.uid),
        });
        victims.collect()
    }

    /// Somebody, perhaps this scheduler before it was started anew, has had pods ended for this one, and they are still ending: nobody
    /// else is ended meanwhile (Kubernetes: a pod with a nominated node preempts no more while victims end there).
    pub(super) fn claim_again(&mut self, pod: PodId, now_ms: i64) -> bool {
        let Some(info) = self.core.pod(pod) else { return false };
        let Some(node) = info.nominated.as_ref().and_then(|name| self.core.node_id(name)) else { return false };
        let victims: BTreeSet<Arc<str>> = self.core.ending_below(node, info.needs.priority).into_iter().collect();
        if victims.is_empty() {
            return false;
        }
        let uid = Arc::clone(&info.uid);
        let message =
            format!("{} pods of lower priority end on {} to make room", victims.len(), self.core.node_name(node));
        self.core.promise(pod, node);
        self.claims.insert(Arc::clone(&uid), Claim { victims, until_ms: now_ms + CLAIM_MS });
        self.tell_later(uid, &message.into());
        true
    }

    /// A pod has left: whoever waited for it alone has its turn. The room stays promised until then.
    pub(super) fn victim_gone(&mut self, uid: &str) {
        for (preemptor, claim) in &mut self.claims {
            if claim.victims.remove(uid)
                && claim.victims.is_empty()
                && let Some(info) = self.core.pod_id(preemptor).and_then(|pod| self.core.pod(pod))
            {
                self.ready.insert(turn(info));
            }
        }
    }

    /// Takes a pod's own promise back, so that it can be decided on.
    pub(super) fn redeem(&mut self, uid: &str) {
        let Some((uid, _)) = self.claims.remove_entry(uid) else { return };
        if let Some(pod) = self.core.pod_id(&uid) {
            self.core.forget(pod);
        }
        // Should it find no place, its nomination is no longer true.
        self.outdated.insert(uid, None);
    }

    /// The pod counts nowhere any more and is decided on like any other.
    fn end_claim(&mut self, uid: &Arc<str>) {
        self.redeem(uid);
        let Some(pod) = self.core.pod_id(uid) else { return };
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
        // A place on a node that is gone is none either.
        let lost = |uid: &str| self.core.pod_id(uid).is_none_or(|pod| self.core.place_of(pod).is_none());
        let late = self.claims.iter().filter(|(uid, claim)| claim.until_ms <= now_ms || lost(uid));
        let late: Vec<Arc<str>> = late.map(|(uid, _)| Arc::clone(uid)).collect();
        for uid in late {
            self.end_claim(&uid);
        }
    }
}
