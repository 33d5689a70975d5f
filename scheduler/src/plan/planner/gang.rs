//! Pods that go together or not at all.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::claims::PREEMPT_MS;
use super::{Binding, Eviction, Planner, Step, Turn, turn};
use crate::plan::needs::PodInfo;
use crate::plan::{NodeId, PodId};

/// A gang that could not be placed is tried again at the most this often, milliseconds: a trial decides on every member.
const RETRY_MS: i64 = 100;

/// Namespace and name of a group.
pub(super) type GangKey = (String, String);

/// The pods of one group.
#[derive(Debug, Default)]
pub(super) struct Gang {
    min_count: usize,
    /// Not placed.
    pub(super) pending: BTreeSet<Turn>,
    /// Bound, or proposed.
    placed: BTreeSet<Arc<str>>,
    /// Since when it could not be placed.
    pub(super) waits_since_ms: Option<i64>,
    /// Something has changed since the last trial.
    retry: bool,
    try_at_ms: i64,
    /// Preemption is not tried before.
    preempt_at_ms: i64,
    message: Arc<str>,
    explain_at_ms: i64,
}

impl Gang {
    /// How many more must be placed together.
    fn missing(&self) -> usize {
        self.min_count.saturating_sub(self.placed.len())
    }

    /// Whether enough of its pods exist.
    pub(super) fn is_complete(&self) -> bool {
        !self.pending.is_empty() && self.pending.len() >= self.missing()
    }

    /// When it is tried again.
    pub(super) fn due_ms(&self) -> Option<i64> {
        (self.waits_since_ms.is_some() && self.retry).then_some(self.try_at_ms)
    }
}

pub(super) fn key(info: &PodInfo) -> Option<GangKey> {
    info.group.as_ref().map(|group| (info.namespace().to_owned(), group.name.clone()))
}

impl Planner {
    /// Files a pod with its gang: as placed or as pending.
    pub(super) fn enlist(&mut self, info: &PodInfo, placed: bool) {
        let (Some(key), Some(group)) = (key(info), &info.group) else { return };
        let gang = self.gangs.entry(key).or_default();
        gang.min_count = gang.min_count.max(group.min_count as usize);
        gang.retry = true;
        let turn = turn(info);
        if placed {
            gang.placed.insert(Arc::clone(&turn.2));
            gang.pending.remove(&turn);
        } else {
            gang.placed.remove(&turn.2);
            gang.pending.insert(turn);
        }
    }

    /// What was last said of a pod's gang; empty when it has none or nothing was said.
    pub(super) fn gang_message(&self, info: &PodInfo) -> String {
        let gang = key(info).and_then(|key| self.gangs.get(&key));
        gang.filter(|gang| gang.waits_since_ms.is_some()).map_or_else(String::new, |gang| gang.message.to_string())
    }

    /// Gangs of these pods have had their time with held nodes.
    pub(super) fn requeue_gangs(&mut self, uids: &[Arc<str>], now_ms: i64) {
        for gang in self.gangs.values_mut().filter(|gang| gang.waits_since_ms.is_some()) {
            if gang.pending.iter().any(|(_, _, uid)| uids.contains(uid)) {
                gang.waits_since_ms = Some(now_ms);
            }
        }
    }

    /// Takes a pod out of its gang.
    pub(super) fn discharge(&mut self, info: &PodInfo) {
        let Some(key) = key(info) else { return };
        let Some(gang) = self.gangs.get_mut(&key) else { return };
        gang.placed.remove(&info.uid);
        gang.pending.remove(&turn(info));
        if gang.placed.is_empty() && gang.pending.is_empty() {
            self.gangs.remove(&key);
        }
    }

    /// Gangs that wait and for which something has changed are ready again.
    pub(super) fn wake_gangs(&mut self, changed: bool, now_ms: i64) {
        for gang in self.gangs.values_mut().filter(|gang| gang.waits_since_ms.is_some()) {
            gang.retry |= changed;
            if gang.retry
                && gang.try_at_ms <= now_ms
                && let Some(first) = gang.pending.first()
            {
                self.ready.insert(first.clone());
            }
        }
    }

    /// Places a gang as a whole. What of it is bound already counts; whoever comes later goes alone.
    pub(super) fn place_gang(&mut self, key: &GangKey, now_ms: i64, singles: &mut Vec<Binding>) -> Option<Step> {
        let gang = self.gangs.get_mut(key)?;
        (gang.retry, gang.try_at_ms) = (false, now_ms + RETRY_MS);
        for turn in &gang.pending {
            self.ready.remove(turn);
        }
        let (missing, complete) = (gang.missing(), gang.is_complete());
        let pending: Vec<Turn> = gang.pending.iter().cloned().collect();
        // While its victims end, it waits for all of them.
        let waits = |uid: &str| self.claims.get(uid).is_some_and(|claim| !claim.victims.is_empty());
        if pending.iter().any(|(_, _, uid)| waits(uid)) {
            return None;
        }
        for (_, _, uid) in &pending {
            self.redeem(uid);
        }
        let pods: Vec<PodId> = pending.iter().filter_map(|(_, _, uid)| self.core.pod_id(uid)).collect();
        let (placed, refused) = if complete { self.try_gang(&pods, missing) } else { (Vec::new(), None) };
        if !complete || placed.len() < missing {
            // Asked before the places are given back: what stands in the way is also the gang's own pods.
            let why = refused.map(|pod| self.core.explain(pod).to_string());
            for (pod, _) in &placed {
                self.core.forget(*pod);
            }
            if complete {
                // Those of its victims that still end from before this scheduler was started anew.
                let again = pods.iter().filter(|pod| self.claim_again(**pod, now_ms)).count();
                if again == 0
                    && let Some(step) = self.preempt_gang(key, &pods, missing, now_ms)
                {
                    return Some(step);
                }
            }
            let message = match why {
                Some(why) => {
                    format!("{} of the {missing} pods that group {} needs can be placed; {why}", placed.len(), key.1)
                }
                None => format!("group {} needs {missing} more pods, {} exist", key.1, pending.len()),
            };
            self.keep_waiting(key, message, now_ms);
            return None;
        }
        let mut bindings = Vec::new();
        for (pod, node) in placed {
            bindings.extend(self.propose(pod, node, now_ms));
        }
        match refused {
            // Enough are placed; the rest is tried one by one from now on.
            Some(pod) => {
                let why = self.core.explain(pod).to_string();
                self.keep_waiting(key, why, now_ms);
            }
            None => {
                if let Some(gang) = self.gangs.get_mut(key) {
                    gang.waits_since_ms = None;
                }
            }
        }
        if missing == 0 {
            singles.append(&mut bindings);
            return None;
        }
        Some(Step::BindAll(bindings))
    }

    /// Places as many of these pods as find a place, in their order; the first one that finds none. Promises to less important pods
    /// give way if `missing` are placed so that are not without.
    fn try_gang(&mut self, pods: &[PodId], missing: usize) -> (Vec<(PodId, NodeId)>, Option<PodId>) {
        let (mut placed, refused) = self.assume_all(pods);
        let lowest = refused.and(pods.iter().filter_map(|pod| Some(self.core.pod(*pod)?.needs.priority)).min());
        let Some(lowest) = lowest.filter(|_| placed.len() < missing) else { return (placed, refused) };
        let lifted = self.core.lift_promises(lowest);
        if lifted.is_empty() {
            return (placed, refused);
        }
        let rest: Vec<PodId> = pods.iter().copied().filter(|pod| self.core.place_of(*pod).is_none()).collect();
        let (more, refused) = self.assume_all(&rest);
        let taken: Vec<NodeId> = more.iter().map(|(_, node)| *node).collect();
        placed.extend(more);
        let enough = placed.len() >= missing;
        self.restore(lifted, |node| enough && taken.contains(&node));
        (placed, refused)
    }

    fn assume_all(&mut self, pods: &[PodId]) -> (Vec<(PodId, NodeId)>, Option<PodId>) {
        let (mut placed, mut refused) = (Vec::new(), None);
        for pod in pods {
            match self.core.decide(*pod) {
                Some(node) => {
                    self.core.assume(*pod, node);
                    placed.push((*pod, node));
                }
                None => refused = refused.or(Some(*pod)),
            }
        }
        (placed, refused)
    }

    /// Ends pods so that as many of a gang as it needs find their places, or nobody: the victims of each member are thought away while
    /// the next one is decided on. Those that need no victims get promises too, so that all are there together.
    fn preempt_gang(&mut self, key: &GangKey, pods: &[PodId], missing: usize, now_ms: i64) -> Option<Step> {
        let gang = self.gangs.get_mut(key)?;
        if gang.preempt_at_ms > now_ms {
            // What has changed meanwhile is not forgotten.
            (gang.retry, gang.try_at_ms) = (true, gang.preempt_at_ms);
            return None;
        }
        gang.preempt_at_ms = now_ms + PREEMPT_MS;
        let (mut places, _) = self.assume_all(pods);
        let rest: Vec<PodId> = pods.iter().copied().filter(|pod| self.core.place_of(*pod).is_none()).collect();
        let mut away = Vec::new();
        for pod in rest {
            if places.len() >= missing {
                break;
            }
            let node = match self.core.decide(pod) {
                Some(node) => node,
                None => {
                    let Some(preemption) = self.core.preempt(pod) else { continue };
                    away.extend(preemption.victims.iter().filter_map(|victim| self.core.think_away(*victim)));
                    preemption.node
                }
            };
            self.core.promise(pod, node);
            places.push((pod, node));
        }
        for one in &away {
            self.core.bring_back(one);
        }
        for (pod, _) in &places {
            self.core.forget(*pod);
        }
        if places.len() < missing || away.is_empty() {
            return None;
        }
        let victims = self.victims(away.iter().map(|one| one.pod));
        let message = format!("{} pods of lower priority are ended to make room for group {}", victims.len(), key.1);
        let message: Arc<str> = message.into();
        let mut nominees = Vec::new();
        for (pod, node) in places {
            nominees.extend(self.nominate(pod, node, &victims, &message, now_ms));
        }
        if let Some(gang) = self.gangs.get_mut(key) {
            gang.waits_since_ms = gang.waits_since_ms.or(Some(now_ms));
            gang.message = Arc::clone(&message);
        }
        // In one order in every scheduler: whoever nominates the first of them has them all.
        nominees.sort_by(|a, b| a.uid.cmp(&b.uid));
        Some(Step::Evict(Eviction { preemptor: format!("{}/{}", key.0, key.1), nominees, victims }))
    }

    fn keep_waiting(&mut self, key: &GangKey, message: String, now_ms: i64) {
        let Some(gang) = self.gangs.get_mut(key) else { return };
        gang.waits_since_ms = gang.waits_since_ms.or(Some(now_ms));
        if gang.explain_at_ms <= now_ms || gang.message.is_empty() {
            gang.message = message.into();
            gang.explain_at_ms = now_ms + super::EXPLAIN_MS;
        }
        let (message, uids): (Arc<str>, Vec<Arc<str>>) =
            (Arc::clone(&gang.message), gang.pending.iter().map(|(_, _, uid)| Arc::clone(uid)).collect());
        for uid in uids {
            self.tell_later(uid, &message);
        }
    }
}
