//! What the planner tells those who ask.
//!
//! In a large cluster one answer takes longer than the loop may stand still: an [`Inquiry`] is answered in slices, and between two of them
//! the planner observes and decides as always. Each node's verdict is then true of the moment when it was looked at.

use std::sync::Arc;

use super::Planner;
use crate::plan::explain::{Explanation, NodeReason};
use crate::plan::needs::PodInfo;
use crate::plan::remedy::Trial;
use crate::plan::{Fit, NodeId, PodId, Remedy};

/// Nodes that are looked at in one slice, and pods that are thought away: a millisecond or two.
const SLICE_NODES: usize = 500;
const SLICE_PODS: usize = 1_000;

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

/// A question about one pod, on the way to its answer.
#[derive(Debug)]
pub struct Inquiry {
    uid: Arc<str>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Why not, node by node.
    Judging { nodes: std::vec::IntoIter<NodeId>, reasons: Vec<NodeReason> },
    /// What would help, node by node.
    Advising { why: Explanation, remedies: Vec<Remedy>, trials: Vec<Trial> },
    /// Whom to end, on the nodes that lack the least.
    Trying { why: Explanation, remedies: Vec<Remedy>, trials: std::vec::IntoIter<Trial>, tried: usize },
}

/// What a slice of an [`Inquiry`] came to.
#[derive(Debug)]
pub enum Progress {
    /// There is more to look at.
    More(Inquiry),
    /// The answer; `None`: the pod is not known here.
    Done(Option<Standing>),
}

impl Planner {
    /// Begins to find out how the pod with this uid stands. Nothing has been looked at yet.
    pub fn inquire(&self, uid: &str) -> Inquiry {
        let stage = Stage::Judging { nodes: self.core.alive().into_iter(), reasons: Vec::new() };
        Inquiry { uid: uid.into(), stage }
    }

    /// The next slice. A pod that has got its place meanwhile, or has gone, is answered for at once.
    pub fn pursue(&self, inquiry: Inquiry) -> Progress {
        let Inquiry { uid, stage } = inquiry;
        let Some(pod) = self.core.pod_id(&uid) else { return Progress::Done(None) };
        let Some(info) = self.core.pod(pod) else { return Progress::Done(None) };
        if let Some(placed) = self.placed(pod, info) {
            return Progress::Done(Some(placed));
        }
        let stage = match stage {
            Stage::Judging { mut nodes, mut reasons } => {
                let slice = nodes.by_ref().take(SLICE_NODES);
                reasons.extend(slice.filter_map(|node| self.core.explain_on(pod, node)));
                if nodes.len() > 0 {
                    Stage::Judging { nodes, reasons }
                } else {
                    let why = Explanation::new(info.gates.clone(), reasons);
                    Stage::Advising { remedies: Vec::with_capacity(why.nodes.len()), why, trials: Vec::new() }
                }
            }
            Stage::Advising { why, mut remedies, mut trials } => {
                for (index, verdict) in why.nodes.iter().enumerate().skip(remedies.len()).take(SLICE_NODES) {
                    let (remedy, trial) = self.core.advise(pod, index, verdict);
                    remedies.push(remedy);
                    trials.extend(trial);
                }
                if remedies.len() < why.nodes.len() {
                    Stage::Advising { why, remedies, trials }
                } else {
                    let trials = self.core.promising(trials);
                    Stage::Trying { why, remedies, tried: trials.len(), trials: trials.into_iter() }
                }
            }
            Stage::Trying { why, mut remedies, mut trials, tried } => {
                let mut pods = 0;
                while pods < SLICE_PODS
                    && let Some(trial) = trials.next()
                {
                    // A node without pods is looked at too.
                    pods += self.core.pods_on(trial.node).max(1);
                    if let Some(remedy) = remedies.get_mut(trial.index) {
                        self.core.try_ends(pod, &trial, remedy);
                    }
                }
                if trials.len() == 0 {
                    let note = self.gang_message(info);
                    return Progress::Done(Some(Standing::Waits { why, remedies, tried, note }));
                }
                Stage::Trying { why, remedies, trials, tried }
            }
        };
        Progress::More(Inquiry { uid, stage })
    }

    /// How the pod with this uid stands, all at once; `None` when it is not known here.
    pub fn standing(&self, uid: &str) -> Option<Standing> {
        let mut inquiry = self.inquire(uid);
        loop {
            match self.pursue(inquiry) {
                Progress::More(more) => inquiry = more,
                Progress::Done(standing) => return standing,
            }
        }
    }

    fn placed(&self, pod: PodId, info: &PodInfo) -> Option<Standing> {
        let node = self.core.node_name(self.core.place_of(pod)?);
        Some(Standing::Placed(match self.claims.get(&info.uid) {
            Some(claim) => format!("it gets a place on {node} when {} pods there have ended", claim.victims.len()),
            None if info.node.is_some() => format!("bound to {node}"),
            None => format!("proposed for {node}, not confirmed yet"),
        }))
    }

    /// Where `count` copies of these pods would go.
    pub fn fit(&mut self, pods: &[PodInfo], count: usize) -> Fit {
        let fit = self.core.fit(pods, count);
        // Guests may have been classes of their own.
        self.refile();
        fit
    }
}
