//! The best node for a class of pods.
//!
//! Tier by tier of static score. Within a tier the groups of the class's partition answer all checks on coarse keys at once, and each
//! group is walked from its best node down until one passes the rest. Where that takes long (many good places that are
//! full, or preferences that differ from node to node), the bitmaps are joined instead and every candidate is weighed.

use std::cmp::Reverse;

use minipod_proto::rules::Bounds;

use super::bits::{Bits, Members};
use super::class::{Class, Memo, Rule};
use super::core::Core;
use super::order::Partition;
use super::statics::StaticScore;
use super::topology::NOWHERE;
use super::{NodeId, PodId};

/// Nodes of a group that may fail before the bitmaps are joined: about what the join costs at a few thousand nodes.
pub(super) const WALK: usize = 48;
/// What a soft spread constraint costs a node that lacks its key.
const LACKING: i64 = 1 << 40;

/// How good a node is for a pod. The order of the fields is the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Score {
    /// What the node's own properties say: taints to be avoided, preferred labels.
    pub fixed: StaticScore,
    /// Preferred affinity, of the pod and towards it.
    pub pull: i64,
    /// Crowding of the node's domains by soft spread constraints.
    pub crowding: Reverse<i64>,
    /// Free share after placing (spread), or its negative (pack), of CPU and memory alone. Extended resources decide whether a pod fits and
    /// not which node is better, as in Kubernetes (NodeResourcesFit scores CPU and memory unless it is configured otherwise).
    pub rank: i64,
    /// Of equals the node that is known longer.
    pub first: Reverse<NodeId>,
}

/// The part of a score that all nodes of a group share.
type Coarse = (i64, Reverse<i64>);

/// A condition on the count of a node's domain.
struct Probe<'a> {
    key: usize,
    domains: &'a [u32],
    counts: &'a [i64],
    bounds: Bounds,
}

fn at(counts: &[i64], domain: u32) -> i64 {
    counts.get(domain as usize).copied().unwrap_or(0)
}

impl Probe<'_> {
    fn passes(&self, domain: u32) -> bool {
        self.bounds.admit((domain != NOWHERE).then(|| at(self.counts, domain)))
    }

    fn passes_node(&self, node: NodeId) -> bool {
        self.passes(self.domains.get(node as usize).copied().unwrap_or(NOWHERE))
    }
}

/// A preference by the count of a node's domain.
struct Tug<'a> {
    key: usize,
    domains: &'a [u32],
    counts: &'a [i64],
    weight: i64,
    soft_spread: bool,
}

impl Tug<'_> {
    fn add(&self, domain: u32, coarse: &mut Coarse) {
        match (self.soft_spread, domain) {
            (false, NOWHERE) => {}
            (false, _) => coarse.0 = coarse.0.saturating_add(self.weight.saturating_mul(at(self.counts, domain))),
            (true, NOWHERE) => coarse.1.0 += LACKING,
            (true, _) => coarse.1.0 = coarse.1.0.saturating_add(self.weight.saturating_mul(at(self.counts, domain))),
        }
    }

    fn add_node(&self, node: NodeId, coarse: &mut Coarse) {
        self.add(self.domains.get(node as usize).copied().unwrap_or(NOWHERE), coarse);
    }
}

/// Weight of a pod that a soft constraint counts: with more domains each pod in one says more. Thousandths.
fn soft_weight(domains: usize) -> i64 {
    // Rounded, so that no platform's logarithm decides.
    (((domains + 2) as f64).ln() * 1000.0).round() as i64
}

/// A search for one class at one moment.
pub(super) struct Search<'a> {
    core: &'a Core,
    class: &'a Class,
    partition: &'a Partition,
    probes: Vec<Probe<'a>>,
    tugs: Vec<Tug<'a>>,
    /// Nodes that are not for this pod.
    shut: Option<&'a Bits>,
}

/// The best candidate so far; the order of the fields as in [`Score`].
type Best = (Coarse, i64, Reverse<NodeId>);

impl<'a> Search<'a> {
    pub(super) fn new(core: &'a Core, class: &'a Class, shut: Option<&'a Bits>) -> Search<'a> {
        let topology = &core.topology;
        let nobody_near = Core::near_rules(class).all(|counter| topology.counters[counter].total == 0);
        let first_of_its_kind = class.likes_itself && nobody_near;
        let probes = class.checks.iter().map(|check| {
            let counter = &topology.counters[check.counter];
            let bounds = match &check.rule {
                Rule::Near => Bounds::near(first_of_its_kind),
                Rule::Apart => Bounds::APART,
                Rule::Skew(spread) => Bounds::skew(spread, counter.domains, counter.least()),
            };
            let key = &topology.keys[counter.key];
            Probe { key: counter.key, domains: &key.of_node, counts: &counter.counts, bounds }
        });
        let pulls = class.pulls.iter().map(|(counter, weight)| (*counter, *weight, false));
        let soft = class.soft.iter().map(|counter| (*counter, soft_weight(topology.counters[*counter].domains), true));
        let tugs = pulls.chain(soft).filter_map(|(counter, weight, soft_spread)| {
            let counter = &topology.counters[counter];
            let key = &topology.keys[counter.key];
            // Preferences towards nobody are none; lacking the key of a spread constraint always counts.
            let idle = !soft_spread && counter.busy == 0;
            (!idle).then(|| Tug {
                key: counter.key,
                domains: &key.of_node,
                counts: &counter.counts,
                weight,
                soft_spread,
            })
        });
        let partition = &core.partitions[class.route.partition];
        Search { core, class, partition, probes: probes.collect(), tugs: tugs.collect(), shut }
    }

    /// The best node of all, with its static score.
    pub(super) fn best(&self) -> Option<NodeId> {
        let tiers = &self.core.statics.all[self.class.statics].tiers;
        let by_group = self.tugs.iter().all(|tug| self.partition.keys.contains(&tug.key));
        tiers.iter().find_map(|(_, tier)| if by_group { self.walk(tier) } else { self.weigh(tier) })
    }

    /// What all nodes with these domains share; `None` if none of them will do.
    fn judge_group(&self, domains: &[u32]) -> Option<Coarse> {
        let keys = &self.partition.keys;
        let domain = |key: usize| keys.iter().position(|other| *other == key).and_then(|at| domains.get(at)).copied();
        let all_pass = self.probes.iter().all(|probe| domain(probe.key).is_none_or(|domain| probe.passes(domain)));
        if !all_pass {
            return None;
        }
        let mut coarse = (0, Reverse(0));
        for tug in &self.tugs {
            if let Some(domain) = domain(tug.key) {
                tug.add(domain, &mut coarse);
            }
        }
        Some(coarse)
    }

    /// Everything about a node that its group, its tier and its free amounts do not say.
    fn passes_rest(&self, node: NodeId) -> bool {
        let nodes = &self.core.nodes;
        self.shut.is_none_or(|shut| !shut.contains(node))
            && nodes.fits(node, &self.class.requests)
            && nodes.port_conflict(node, &self.class.needs.ports).is_none()
            && self
                .probes
                .iter()
                .filter(|probe| !self.partition.keys.contains(&probe.key))
                .all(|probe| probe.passes_node(node))
    }

    /// Walks each group from its best node down.
    fn walk(&self, tier: &Bits) -> Option<NodeId> {
        let (nodes, class) = (&self.core.nodes, self.class);
        let mut best: Option<Best> = None;
        for group in &self.partition.groups {
            let Some((top, _)) = group.nodes.last() else { continue };
            let Some(coarse) = self.judge_group(&group.domains) else { continue };
            let change = nodes.rank_change(group.shape, class.needs.weight);
            if best.is_some_and(|(other, rank, _)| (coarse, top.saturating_add(change)) < (other, rank)) {
                continue;
            }
            let bound = nodes.rank_bound(group.shape, &class.requests);
            let mut failed = 0;
            for (rank, complement) in group.nodes.range(..=(bound, u32::MAX)).rev() {
                let node = !complement;
                let candidate = (coarse, rank.saturating_add(change), Reverse(node));
                if best.is_some_and(|best| candidate < best) {
                    break;
                }
                if tier.contains(node) && self.passes_rest(node) {
                    best = Some(candidate);
                    break;
                }
                failed += 1;
                if failed > self.core.walk_limit {
                    return self.weigh(tier);
                }
            }
        }
        best.map(|(_, _, Reverse(node))| node)
    }

    /// Joins the bitmaps and weighs every candidate.
    fn weigh(&self, tier: &Bits) -> Option<NodeId> {
        let (nodes, class) = (&self.core.nodes, self.class);
        let verdicts: Vec<Option<(Coarse, i64)>> = self
            .partition
            .groups
            .iter()
            .map(|group| Some((self.judge_group(&group.domains)?, nodes.rank_change(group.shape, class.needs.weight))))
            .collect();
        let levels = class.requests.iter().filter_map(|(resource, amount)| {
            nodes.columns.get(*resource).and_then(|column| column.levels.at_least(*amount))
        });
        let rows: Vec<&Bits> = levels.collect();
        let fine_tugs: Vec<&Tug> = self.tugs.iter().filter(|tug| !self.partition.keys.contains(&tug.key)).collect();
        let mut best: Option<Best> = None;
        for (index, word) in tier.words().iter().enumerate() {
            let open = rows.iter().fold(*word, |word, row| word & row.word(index));
            for node in (Members { word: open, base: index as u32 * 64 }) {
                let group = self.partition.group(node).and_then(|group| verdicts.get(group as usize)).copied();
                let Some((mut coarse, change)) = group.flatten() else { continue };
                for tug in &fine_tugs {
                    tug.add_node(node, &mut coarse);
                }
                let candidate = (coarse, nodes.rank[node as usize].saturating_add(change), Reverse(node));
                if best.is_none_or(|best| candidate > best) && self.passes_rest(node) {
                    best = Some(candidate);
                }
            }
        }
        best.map(|(_, _, Reverse(node))| node)
    }

    /// The score of a node, if it will do.
    pub(super) fn score(&self, node: NodeId) -> Option<Score> {
        let fixed = self.core.statics.all[self.class.statics].score(node)?;
        let all_pass = self.probes.iter().all(|probe| probe.passes_node(node));
        if !all_pass || !self.passes_rest(node) {
            return None;
        }
        let mut coarse = (0, Reverse(0));
        for tug in &self.tugs {
            tug.add_node(node, &mut coarse);
        }
        let nodes = &self.core.nodes;
        let change = nodes.rank_change(nodes.shape[node as usize], self.class.needs.weight);
        Some(Score {
            fixed,
            pull: coarse.0,
            crowding: coarse.1,
            rank: nodes.rank[node as usize].saturating_add(change),
            first: Reverse(node),
        })
    }

    /// The best of a few nodes.
    fn best_of(&self, few: impl Iterator<Item = NodeId>) -> Option<NodeId> {
        few.filter_map(|node| self.score(node)).max().map(|score| score.first.0)
    }
}

impl Core {
    /// Where a pod should go now; `None` if no node will do (then [`Core::explain`] says why), or if it has a place already.
    pub fn decide(&mut self, pod: PodId) -> Option<NodeId> {
        let entry = self.entry(pod).filter(|entry| entry.place.is_none() && entry.info.gates.is_empty())?;
        let class_id = entry.class;
        self.refresh_route(class_id);
        let class = self.class(class_id);
        let shut = self.shut_for(pod);
        // Where some nodes are kept free, what is true of one pod of the class may not be true of the next.
        let memo = class.memo.filter(|_| self.hold.is_none());
        let search = Search::new(self, class, shut);
        let versions = self.versions(class);
        let known = memo.filter(|memo| memo.versions == versions).and_then(|memo| self.log.since(memo.at));
        let node = match known {
            // Nothing but these nodes has become better, and no other would do before.
            Some(improved) => search.best_of(improved),
            None => search.best(),
        };
        let memo = (node.is_none() && self.hold.is_none()).then(|| Memo { at: self.log.end(), versions });
        self.classes.all[class_id as usize].memo = memo;
        node
    }

    /// The score that a node has for a pod; `None` if it will not do.
    pub fn score(&mut self, pod: PodId, node: NodeId) -> Option<Score> {
        let class = self.entry(pod)?.class;
        self.refresh_route(class);
        Search::new(self, self.class(class), self.shut_for(pod)).score(node)
    }

    /// Nodes that are kept free for somebody else.
    pub(super) fn shut_for(&self, pod: PodId) -> Option<&Bits> {
        let hold = self.hold.as_ref()?;
        let entry = self.entry(pod)?;
        let may = hold.owners.contains(&entry.info.uid) || entry.info.needs.priority > hold.priority;
        (!may).then_some(&hold.nodes)
    }
}
