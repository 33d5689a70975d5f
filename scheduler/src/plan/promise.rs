//! Places that are being cleared: a pod counts where others are being ended for it (status.nominatedNodeName), so that nobody takes the
//! room. Whoever is more important may: to him the promise is not there.

use std::sync::Arc;

use super::core::Core;
use super::{NodeId, PodId};

/// A pod that was thought away.
pub(super) struct Away {
    /// The pod.
    pub(super) pod: PodId,
    node: NodeId,
    assumed: bool,
}

impl Core {
    /// Counts a pod on a node whose room is being cleared for it.
    pub fn promise(&mut self, pod: PodId, node: NodeId) {
        self.assume(pod, node);
        if self.is_assumed(pod) && self.place_of(pod) == Some(node) {
            self.note_promise(pod);
        }
    }

    pub(super) fn note_promise(&mut self, pod: PodId) {
        if let Some(entry) = self.pods.get_mut(pod as usize).and_then(Option::as_mut) {
            entry.promised = true;
            self.promises.insert((entry.info.needs.priority, pod));
        }
    }

    /// Whether a pod counts where it does only by a promise.
    pub fn is_promised(&self, pod: PodId) -> bool {
        self.entry(pod).is_some_and(|entry| entry.promised)
    }

    /// Takes the promises to pods below a priority back for the time being; [`Core::promise`] gives them again.
    pub fn lift_promises(&mut self, priority: i32) -> Vec<(PodId, NodeId)> {
        let below: Vec<PodId> = self.promises.range(..(priority, 0)).map(|(_, pod)| *pod).collect();
        let placed = below.into_iter().filter_map(|pod| Some((pod, self.place_of(pod)?)));
        let lifted: Vec<(PodId, NodeId)> = placed.collect();
        for (pod, _) in &lifted {
            self.forget(*pod);
        }
        lifted
    }

    /// Thinks a pod away; [`Core::bring_back`] with what is returned undoes it.
    pub(super) fn think_away(&mut self, pod: PodId) -> Option<Away> {
        let entry = self.entry(pod)?;
        let away = Away { pod, node: entry.place?, assumed: entry.assumed };
        self.take_off(pod);
        Some(away)
    }

    /// Undoes [`Core::think_away`].
    pub(super) fn bring_back(&mut self, away: &Away) {
        self.put(away.pod, away.node, away.assumed);
    }

    /// Pods on a node that are being ended and are less important than `priority`: uids.
    pub(super) fn ending_below(&self, node: NodeId, priority: i32) -> Vec<Arc<str>> {
        let pods = self.nodes.pods[node as usize].iter().filter_map(|pod| self.entry(*pod));
        let ending = pods.filter(|entry| entry.info.terminating && entry.info.needs.priority < priority);
        ending.map(|entry| Arc::clone(&entry.info.uid)).collect()
    }
}
