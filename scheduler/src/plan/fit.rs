//! Where pods would go that do not exist: decided one after the other as if they did, then forgotten.

use super::PodId;
use super::core::Core;
use super::explain::Explanation;
use super::needs::PodInfo;
use super::remedy::Remedy;

/// Where pods would go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fit {
    /// By copy (from 0) and position among the pods: the node.
    pub placements: Vec<(usize, usize, String)>,
    /// The first that finds no place.
    pub unplaced: Option<Unplaced>,
    /// A group of which too few find a place: none of it would be bound.
    pub group: Option<String>,
}

/// A pod that finds no place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplaced {
    /// Which copy, from 0.
    pub copy: usize,
    /// Position among the pods.
    pub pod: usize,
    /// Why.
    pub why: Explanation,
    /// What would help, node by node.
    pub remedies: Vec<Remedy>,
    /// On how many nodes it was tried to end pods.
    pub tried: usize,
}

impl Core {
    /// Where `count` copies of these pods would go, one after the other; ends at the first that finds no place. The cluster is
    /// afterwards as it was before.
    pub fn fit(&mut self, pods: &[PodInfo], count: usize) -> Fit {
        let (mut fit, mut guests) = (Fit::default(), Vec::new());
        'copies: for copy in 0..count {
            for (position, info) in pods.iter().enumerate() {
                // No uid of the API has a slash.
                let uid = format!("fit/{copy}/{position}");
                let mut guest = info.clone();
                guest.uid = uid.as_str().into();
                (guest.node, guest.terminal, guest.terminating) = (None, false, false);
                let Some(pod) = self.upsert_pod(guest) else { continue };
                guests.push(uid);
                match self.decide(pod) {
                    Some(node) => {
                        self.assume(pod, node);
                        fit.placements.push((copy, position, self.node_name(node).to_owned()));
                    }
                    None => {
                        fit.unplaced = Some(self.unplaced(pod, copy, position));
                        break 'copies;
                    }
                }
            }
        }
        fit.group = short_group(pods, &fit);
        for uid in &guests {
            self.remove_pod(uid);
        }
        fit
    }

    fn unplaced(&self, pod: PodId, copy: usize, position: usize) -> Unplaced {
        let why = self.explain(pod);
        let (remedies, tried) = self.remedies(pod, &why);
        Unplaced { copy, pod: position, why, remedies, tried }
    }
}

/// A group that falls short of its minimum.
fn short_group(pods: &[PodInfo], fit: &Fit) -> Option<String> {
    let groups = pods.iter().filter_map(|info| Some((info.namespace(), info.group.as_ref()?)));
    let mut wanted: std::collections::BTreeMap<(&str, &str), usize> = std::collections::BTreeMap::new();
    for (namespace, group) in groups {
        let count = wanted.entry((namespace, &group.name)).or_default();
        *count = (*count).max(group.min_count as usize);
    }
    let of = |at: usize| pods.get(at).and_then(|info| Some((info.namespace(), info.group.as_ref()?.name.as_str())));
    wanted.into_iter().find_map(|(key, min_count)| {
        let placed = fit.placements.iter().filter(|(_, position, _)| of(*position) == Some(key)).count();
        (placed < min_count).then(|| format!("{}: {placed} of at least {min_count} find a place", key.1))
    })
}
