//! Which nodes a pod may go to as far as the nodes' own properties say: interned per placement, one bit per node.

use std::cmp::Reverse;
use std::collections::HashMap;

use minipod_proto::scheduling::{self, PREFER_NO_SCHEDULE};

use super::NodeId;
use super::bits::Bits;
use super::needs::{NodeInfo, Placement};

/// How much a node's own properties speak for it; the first field decides first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct StaticScore {
    /// PreferNoSchedule taints that are not tolerated.
    pub shunned: Reverse<u32>,
    /// Sum of the weights of preferred node terms that match.
    pub preference: i64,
}

/// Why a node's own properties forbid a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StaticReason {
    /// Its agent is silent, or it is going away.
    NotReady,
    /// spec.unschedulable.
    Unschedulable,
    /// A taint, as `key=value:effect`.
    Taint(String),
    /// Node selector or required node affinity.
    Selector,
}

/// Judges one node.
///
/// # Errors
/// The first reason against it.
pub fn judge(placement: &Placement, node: &NodeInfo) -> Result<StaticScore, StaticReason> {
    let spec = &placement.spec;
    if !node.ready {
        return Err(StaticReason::NotReady);
    }
    if node.unschedulable && !scheduling::tolerates_unschedulable(&spec.tolerations) {
        return Err(StaticReason::Unschedulable);
    }
    if let Some(taint) = scheduling::untolerated(&node.taints, &spec.tolerations) {
        let value = if taint.value.is_empty() { String::new() } else { format!("={}", taint.value) };
        return Err(StaticReason::Taint(format!("{}{value}:{}", taint.key, taint.effect)));
    }
    if !scheduling::node_matches(spec, &node.labels, &node.name) {
        return Err(StaticReason::Selector);
    }
    let soft = node.taints.iter().filter(|taint| taint.effect == PREFER_NO_SCHEDULE);
    let shunned = soft.filter(|taint| !scheduling::tolerates(&spec.tolerations, taint)).count();
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let preferred = affinity.into_iter().flat_map(|all| &all.preferred_during_scheduling_ignored_during_execution);
    let matching = preferred.filter(|term| {
        let wanted = term.preference.as_ref();
        wanted.is_some_and(|wanted| scheduling::term_matches(wanted, &node.labels, &node.name))
    });
    let preference = matching.map(|term| i64::from(term.weight)).sum();
    Ok(StaticScore { shunned: Reverse(shunned as u32), preference })
}

/// The nodes that one placement allows.
pub struct Static {
    placement: Placement,
    /// Best score first; together all nodes that are allowed.
    pub tiers: Vec<(StaticScore, Bits)>,
}

impl Static {
    fn place(&mut self, node: NodeId, info: Option<&NodeInfo>) {
        let verdict = info.and_then(|info| judge(&self.placement, info).ok());
        for (score, bits) in &mut self.tiers {
            bits.set(node, verdict == Some(*score));
        }
        let Some(score) = verdict else { return };
        if let Err(at) = self.tiers.binary_search_by(|(other, _)| score.cmp(other)) {
            let mut bits = Bits::default();
            bits.set(node, true);
            self.tiers.insert(at, (score, bits));
        }
    }

    /// The score of an allowed node.
    pub fn score(&self, node: NodeId) -> Option<StaticScore> {
        self.tiers.iter().find(|(_, bits)| bits.contains(node)).map(|(score, _)| *score)
    }
}

/// All placements in use.
#[derive(Default)]
pub struct Statics {
    ids: HashMap<Placement, usize>,
    /// By index.
    pub all: Vec<Static>,
}

impl Statics {
    /// Index of a placement.
    pub fn intern(&mut self, placement: &Placement, nodes: &[Option<NodeInfo>]) -> usize {
        if let Some(index) = self.ids.get(placement) {
            return *index;
        }
        let mut all = Static { placement: placement.clone(), tiers: Vec::new() };
        for (node, info) in nodes.iter().enumerate().filter(|(_, info)| info.is_some()) {
            all.place(node as NodeId, info.as_ref());
        }
        self.all.push(all);
        self.ids.insert(placement.clone(), self.all.len() - 1);
        self.all.len() - 1
    }

    /// A node comes, goes (`None`) or has changed.
    pub fn place_node(&mut self, node: NodeId, info: Option<&NodeInfo>) {
        for all in &mut self.all {
            all.place(node, info);
        }
    }
}
