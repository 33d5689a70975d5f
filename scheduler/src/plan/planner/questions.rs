//! What the planner tells those who ask.

use super::Planner;
use crate::plan::explain::Explanation;
use crate::plan::needs::PodInfo;
use crate::plan::{Fit, Remedy};

/// How a pod stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It has its place, or is about to get it; in words.
    Placed(String),
    /// It has none.
    Waits {
        /// Why, node by node.
        why: Explanation,
        /// What would help, node by node.
        remedies: Vec<Remedy>,
        /// On how many nodes it was tried to end pods.
        tried: usize,
        /// What else is to be said of it: its group.
        note: String,
    },
}

impl Planner {
    /// How the pod with this uid stands; `None` when it is not known here.
    pub fn standing(&self, uid: &str) -> Option<Standing> {
        let pod = self.core.pod_id(uid)?;
        let info = self.core.pod(pod)?;
        if let Some(node) = self.core.place_of(pod) {
            let node = self.core.node_name(node);
            return Some(Standing::Placed(match self.claims.get(uid) {
                Some(claim) => format!("it gets a place on {node} when {} pods there have ended", claim.victims.len()),
                None if info.node.is_some() => format!("bound to {node}"),
                None => format!("proposed for {node}, not confirmed yet"),
            }));
        }
        let why = self.core.explain(pod);
        let (remedies, tried) = self.core.remedies(pod, &why);
        Some(Standing::Waits { why, remedies, tried, note: self.gang_message(info) })
    }

    /// Where `count` copies of these pods would go.
    pub fn fit(&mut self, pods: &[PodInfo], count: usize) -> Fit {
        let fit = self.core.fit(pods, count);
        // Guests may have been classes of their own.
        self.refile();
        fit
    }
}
