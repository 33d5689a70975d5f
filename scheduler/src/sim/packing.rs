//! How well placements fill nodes: pods come one after the other and stay.

use serde::Serialize;

use super::job::{Amounts, Job, NAMES, RESOURCES};
use super::rng::Rng;
use super::strategy::{node_info, pod_info};
use crate::plan::{Core, Event, Profile};

/// Loads at which the largest pod that could still be placed is looked for.
pub const LOADS: [f64; 4] = [0.5, 0.7, 0.8, 0.9];

/// Who chooses the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filler {
    /// minipod's core.
    Core(Profile),
    /// The first node with room.
    FirstFit,
    /// Any node with room, by chance.
    Random,
}

impl Filler {
    /// All, in the order of tables.
    pub const ALL: [Filler; 4] =
        [Filler::Core(Profile::Pack), Filler::Core(Profile::Spread), Filler::FirstFit, Filler::Random];

    /// Name, for tables.
    pub fn name(self) -> &'static str {
        match self {
            Filler::Core(Profile::Pack) => "minipod pack",
            Filler::Core(Profile::Spread) => "minipod spread",
            Filler::FirstFit => "first fit",
            Filler::Random => "random",
        }
    }
}

/// Nodes that are being filled.
struct Filling {
    filler: Filler,
    core: Core,
    capacity: Vec<Amounts>,
    free: Vec<Amounts>,
    pods: u32,
    rng: Rng,
}

impl Filling {
    fn new(filler: Filler, nodes: &[Amounts], seed: u64) -> Filling {
        let profile = match filler {
            Filler::Core(profile) => profile,
            Filler::FirstFit | Filler::Random => Profile::Pack,
        };
        let core = Core::new(profile);
        let mut filling =
            Filling { filler, core, capacity: Vec::new(), free: Vec::new(), pods: 0, rng: Rng::new(seed) };
        nodes.iter().for_each(|node| filling.add(*node));
        filling
    }

    fn add(&mut self, node: Amounts) {
        if let Filler::Core(_) = self.filler {
            self.core.apply(Event::Node(node_info(self.free.len() as u32, node)));
        }
        self.capacity.push(node);
        self.free.push(node);
    }

    /// Places a pod. Whether there was room.
    fn place(&mut self, pod: Amounts) -> bool {
        let node = match self.filler {
            Filler::Core(_) => self.decide(pod),
            Filler::FirstFit => self.free.iter().position(|free| pod.fits(free)),
            Filler::Random => {
                let fitting: Vec<usize> = (0..self.free.len()).filter(|node| pod.fits(&self.free[*node])).collect();
                let chosen = self.rng.below(fitting.len());
                fitting.get(chosen).copied()
            }
        };
        let Some(node) = node else { return false };
        self.free[node] -= pod;
        assert!(self.free[node].0.iter().all(|amount| *amount >= 0), "{} overcommits", self.filler.name());
        true
    }

    fn decide(&mut self, pod: Amounts) -> Option<usize> {
        let job = Job { service: false, submit_us: 0, duration_us: 0, parts: vec![pod], count: 1, min_count: 1 };
        self.pods += 1;
        let info = pod_info(self.pods, &job, 0, "sim", None);
        let uid = std::sync::Arc::clone(&info.uid);
        let id = self.core.upsert_pod(info)?;
        match self.core.decide(id) {
            Some(node) => {
                self.core.assume(id, node);
                Some(node as usize)
            }
            None => {
                self.core.remove_pod(&uid);
                None
            }
        }
    }

    /// Share in use of the resource that is used most.
    fn load(&self) -> f64 {
        let (all, free) = (self.capacity.iter().copied().sum::<Amounts>(), self.free.iter().copied().sum::<Amounts>());
        (0..RESOURCES).map(|at| share(all.0[at] - free.0[at], all.0[at])).fold(0.0, f64::max)
    }

    /// The largest pod that still fits, of a node's proportions, as a share of its node.
    fn largest(&self) -> f64 {
        let of = |(free, all): (&Amounts, &Amounts)| {
            let shares = (0..RESOURCES).filter(|at| all.0[*at] > 0).map(|at| share(free.0[at], all.0[at]));
            shares.fold(1.0, f64::min)
        };
        self.free.iter().zip(&self.capacity).map(of).fold(0.0, f64::max)
    }

    /// Per resource the share of all capacity that is free where a pod like `pod` does not fit.
    fn stranded(&self, pod: Amounts) -> [f64; RESOURCES] {
        let all: Amounts = self.capacity.iter().copied().sum();
        let stranded: Amounts = self.free.iter().filter(|free| !pod.fits(free)).copied().sum();
        std::array::from_fn(|at| share(stranded.0[at], all.0[at]))
    }
}

fn share(part: i64, all: i64) -> f64 {
    if all > 0 { part as f64 / all as f64 } else { 0.0 }
}

/// Figures of one filler.
#[derive(Debug, Clone, Serialize)]
pub struct Packing {
    /// Who chose.
    pub filler: &'static str,
    /// Nodes that all pods together needed, over the number that no packing could go below; where all nodes are equal.
    pub nodes_over_bound: Option<f64>,
    /// Load of the resource that is used most when the first pod found no place.
    pub load_at_first_refusal: f64,
    /// When half as much again as the nodes have had been offered: per resource the share of capacity that is free on nodes with no
    /// room for the median pod.
    pub stranded: [f64; RESOURCES],
    /// Load at that time.
    pub load_full: f64,
    /// At the loads of [`LOADS`]: the largest pod of a node's proportions that would still fit, as a share of its node; `None` if the
    /// load was never reached.
    pub largest: [Option<f64>; LOADS.len()],
}

/// Least number of equal nodes for the pods: no packing can do with fewer.
pub fn lower_bound(pods: &[Amounts], node: Amounts) -> usize {
    let all: Amounts = pods.iter().copied().sum();
    let need = |at: usize| if node.0[at] > 0 { (all.0[at] + node.0[at] - 1) / node.0[at] } else { 0 };
    (0..RESOURCES).map(need).max().unwrap_or(0).max(1) as usize
}

/// Fills the nodes with pods drawn from `pods`, and finds out how many nodes as many pods need.
pub fn fill(filler: Filler, pods: &[Amounts], nodes: &[Amounts], seed: u64) -> Packing {
    let mut rng = Rng::new(seed);
    let mut order = pods.to_vec();
    rng.shuffle(&mut order);
    let equal = nodes.windows(2).all(|pair| pair[0] == pair[1]);
    let nodes_over_bound = nodes.first().filter(|_| equal).map(|node| nodes_needed(filler, &order, *node, seed));
    let mut filling = Filling::new(filler, nodes, seed);
    let (mut first, mut largest) = (None, [None; LOADS.len()]);
    let (capacity, mut offered) = (nodes.iter().copied().sum::<Amounts>(), Amounts::default());
    let beyond =
        |offered: &Amounts| (0..RESOURCES).any(|at| capacity.0[at] > 0 && share(offered.0[at], capacity.0[at]) > 1.5);
    for at in 0.. {
        if pods.is_empty() || beyond(&offered) || at > 100 * pods.len() {
            break;
        }
        let pod = order[at % order.len()];
        offered += pod;
        let placed = filling.place(pod);
        let load = filling.load();
        if !placed {
            first.get_or_insert(load);
        }
        for (limit, slot) in LOADS.iter().zip(&mut largest) {
            if load >= *limit {
                slot.get_or_insert_with(|| filling.largest());
            }
        }
    }
    let load_full = filling.load();
    Packing {
        filler: filler.name(),
        nodes_over_bound,
        load_at_first_refusal: first.unwrap_or(load_full),
        stranded: filling.stranded(median(pods)),
        load_full,
        largest,
    }
}

fn nodes_needed(filler: Filler, pods: &[Amounts], node: Amounts, seed: u64) -> f64 {
    let bound = lower_bound(pods, node);
    let mut filling = Filling::new(filler, &vec![node; bound], seed);
    for pod in pods.iter().filter(|pod| pod.fits(&node)) {
        if !filling.place(*pod) {
            filling.add(node);
            filling.place(*pod);
        }
    }
    filling.free.len() as f64 / bound as f64
}

/// The median of each resource by itself.
fn median(pods: &[Amounts]) -> Amounts {
    Amounts(std::array::from_fn(|at| {
        let mut all: Vec<i64> = pods.iter().map(|pod| pod.0[at]).collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied().unwrap_or(0)
    }))
}

/// Mean over seeds.
pub fn mean(all: &[Packing]) -> Option<Packing> {
    let first = all.first()?;
    let count = all.len() as f64;
    let over = |of: &dyn Fn(&Packing) -> f64| all.iter().map(of).sum::<f64>() / count;
    let some = |of: &dyn Fn(&Packing) -> Option<f64>| {
        let known: Vec<f64> = all.iter().filter_map(of).collect();
        (known.len() == all.len()).then(|| known.iter().sum::<f64>() / count)
    };
    Some(Packing {
        filler: first.filler,
        nodes_over_bound: some(&|one| one.nodes_over_bound),
        load_at_first_refusal: over(&|one| one.load_at_first_refusal),
        stranded: std::array::from_fn(|at| over(&|one| one.stranded[at])),
        load_full: over(&|one| one.load_full),
        largest: std::array::from_fn(|at| some(&|one| one.largest[at])),
    })
}

/// `cpu 3.1 %, memory 0.2 %`.
pub fn shares_text(shares: &[f64; RESOURCES]) -> String {
    let all = NAMES.iter().zip(shares).filter(|(_, share)| **share > 0.0);
    let all: Vec<String> = all.map(|(name, share)| format!("{name} {:.1} %", share * 100.0)).collect();
    if all.is_empty() { "none".into() } else { all.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: Amounts = Amounts([4000, 4000, 0]);

    #[test]
    fn the_bound_is_of_the_scarcest_resource() {
        let pods = [Amounts([1000, 100, 0]); 9];
        assert_eq!(lower_bound(&pods, NODE), 3);
        assert_eq!(lower_bound(&[Amounts([100, 4001, 0])], NODE), 2);
        assert_eq!(lower_bound(&[], NODE), 1);
    }

    #[test]
    fn spread_strands_what_packing_keeps_whole() {
        // Small pods first: spread puts one on each node, and no large one fits any more.
        let filling = |filler| {
            let mut filling = Filling::new(filler, &[NODE; 4], 1);
            (0..4).for_each(|_| assert!(filling.place(Amounts([1000, 1000, 0]))));
            (filling.largest(), filling.stranded(NODE)[0], filling.load())
        };
        assert_eq!(filling(Filler::Core(Profile::Spread)), (0.75, 0.75, 0.25));
        assert_eq!(filling(Filler::Core(Profile::Pack)), (1.0, 0.0, 0.25));
        assert_eq!(filling(Filler::FirstFit), (1.0, 0.0, 0.25));
    }

    #[test]
    fn figures_of_a_case_by_hand() {
        // Three of four thousandths each: one for each node, a quarter of everything is stranded.
        let pods = [Amounts([3000, 3000, 0]); 8];
        for filler in Filler::ALL {
            let packing = fill(filler, &pods, &[NODE; 4], 1);
            assert_eq!(packing.nodes_over_bound, Some(8.0 / 6.0), "{packing:?}");
            assert_eq!((packing.load_at_first_refusal, packing.load_full), (0.75, 0.75), "{packing:?}");
            assert_eq!(packing.stranded, [0.25, 0.25, 0.0], "{packing:?}");
            assert_eq!(packing.largest, [Some(1.0), Some(0.25), None, None], "{packing:?}");
        }
    }
}
