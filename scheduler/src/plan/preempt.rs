//! Whom to end so that a pod fits.
//!
//! As in Kubernetes: on each node all pods of lower priority are thought away; if the pod then fits, as many as possible are spared again,
//! those first whose end would violate a disruption budget, then the more important ones. Of the nodes the one wins whose
//! victims cost least. Pods that only have a promise there (their places are being cleared) give way when they are less important, and
//! are never among the victims: nothing of them is there. The trial is arithmetic on copies: nothing in the core moves.

use std::cmp::Reverse;

use minipod_proto::Resource;
use minipod_proto::disruption::Scope;
use minipod_proto::rules::Bounds;
use minipod_proto::selector::{LabelSelector, SelectorError};
use minipod_proto::v1::PodDisruptionBudget;

use super::class::{Class, Rule};
use super::core::{Core, PodEntry};
use super::needs::HostPort;
use super::topology::{Counted, NOWHERE};
use super::{NodeId, PodId};

/// How many of some pods may be ended at the moment.
#[derive(Debug, Clone)]
pub struct Budget {
    /// Namespace of the pods.
    pub namespace: String,
    /// Which pods; an empty selector means all of the namespace.
    pub selector: LabelSelector,
    /// How many of them may go.
    pub allowed: i64,
}

impl Budget {
    /// Of a budget of the API; `None` when it speaks of no pods. One whose status is not of its present spec allows nothing.
    ///
    /// # Errors
    /// When its selector is none.
    pub fn new(budget: &PodDisruptionBudget) -> Result<Option<Budget>, SelectorError> {
        let scope = Scope::of(budget)?;
        let status = budget.status.as_ref().filter(|status| status.observed_generation == budget.meta().generation);
        let allowed = status.map_or(0, |status| i64::from(status.disruptions_allowed));
        let namespace = scope.namespace().to_owned();
        Ok(scope.selector().map(|selector| Budget { namespace, selector: selector.clone(), allowed }))
    }
}

/// Whom to end where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preemption {
    /// The node that is then good.
    pub node: NodeId,
    /// Pods to end, the most important one first.
    pub victims: Vec<PodId>,
    /// How many of them violate a budget.
    pub violations: usize,
}

/// What a preemption costs; less is better. The order of the fields is the policy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    violations: usize,
    highest_priority: i64,
    /// Sum of priorities, each lifted above 0 so that one more victim always costs more.
    priorities: i64,
    victims: usize,
    /// When the first of the highest victims started: what has run shortest goes first.
    started: Reverse<i64>,
    node: NodeId,
}

/// What preemption on each node would cost for the class that asked last: nodes on which nothing has happened since are not tried again.
#[derive(Default)]
pub(super) struct Trials {
    class: Option<u32>,
    generation: u64,
    /// By node: the node's version at the trial, and the cost if it helped.
    costs: Vec<(u64, Option<Cost>)>,
}

/// What is free on a node while pods are thought away.
struct Trial<'a> {
    core: &'a Core,
    class: &'a Class,
    node: NodeId,
    /// By position among the class's requests.
    free: Vec<i64>,
    ports: Vec<HostPort>,
    /// By position among the class's checks: change of the count in the node's domain.
    counts: Vec<i64>,
}

impl<'a> Trial<'a> {
    fn new(core: &'a Core, class: &'a Class, node: NodeId) -> Trial<'a> {
        let free = class.requests.iter().map(|(resource, _)| core.nodes.columns[*resource].free[node as usize]);
        let ports = if class.needs.ports.is_empty() { Vec::new() } else { core.nodes.ports[node as usize].clone() };
        Trial { core, class, node, free: free.collect(), ports, counts: vec![0; class.checks.len()] }
    }

    /// A pod goes (`sign` 1: it gives back) or comes again (-1).
    fn shift(&mut self, pod: &PodEntry, sign: i64) {
        let other = self.core.class(pod.class);
        for (free, (resource, _)) in self.free.iter_mut().zip(&self.class.requests) {
            let held = other.requests.iter().find(|(held, _)| held == resource).map_or(0, |(_, amount)| *amount);
            *free += sign * held;
        }
        if !self.class.needs.ports.is_empty() {
            for port in &other.needs.ports {
                if sign < 0 {
                    self.ports.push(port.clone());
                } else if let Some(at) = self.ports.iter().position(|taken| taken == port) {
                    self.ports.swap_remove(at);
                }
            }
        }
        for (change, check) in self.counts.iter_mut().zip(&self.class.checks) {
            let counter = &self.core.topology.counters[check.counter];
            let passing = pod.info.terminating && matches!(counter.counted, Counted::Spread(..));
            let counted = i64::from(other.counted_by.contains(&check.counter) && !passing);
            let held: i64 =
                other.holds.iter().filter(|(held, _)| *held == check.counter).map(|(_, weight)| weight).sum();
            if self.core.topology.domain(check.counter, self.node) != NOWHERE {
                *change -= sign * (counted + held);
            }
        }
    }

    fn fits(&self) -> bool {
        let class = self.class;
        let room = self.free.iter().zip(&class.requests).all(|(free, (_, amount))| free >= amount);
        let clash = class.needs.ports.iter().any(|port| self.ports.iter().any(|other| other.conflicts(port)));
        room && !clash && self.passes_checks()
    }

    fn passes_checks(&self) -> bool {
        let topology = &self.core.topology;
        let near = self.class.checks.iter().zip(&self.counts).filter(|(check, _)| matches!(check.rule, Rule::Near));
        let nobody = near.into_iter().all(|(check, change)| topology.counters[check.counter].total + change == 0);
        let first_of_its_kind = self.class.likes_itself && nobody;
        self.class.checks.iter().zip(&self.counts).all(|(check, change)| {
            let counter = &topology.counters[check.counter];
            let domain = topology.keys[counter.key].domain(self.node);
            let count = counter.count(domain) + change;
            match &check.rule {
                Rule::Apart => domain == NOWHERE || count <= 0,
                _ if domain == NOWHERE => false,
                Rule::Near => first_of_its_kind || count > 0,
                Rule::Skew(spread) => {
                    Bounds::skew(spread, counter.domains, counter.least().min(count)).admit(Some(count))
                }
            }
        })
    }
}

impl Core {
    /// How many pods of which may be ended; replaces what was set before.
    pub fn set_budgets(&mut self, budgets: Vec<Budget>) {
        self.budgets = budgets;
    }

    /// Whether there is anybody whom this pod might end, wherever.
    pub fn may_preempt(&self, pod: PodId) -> bool {
        let Some(entry) = self.entry(pod) else { return false };
        let needs = &entry.info.needs;
        needs.preempts && self.lowest_priority().is_some_and(|lowest| lowest < needs.priority)
    }

    /// Whom to end so that this pod fits somewhere; `None` when that does not help or the pod may not.
    pub fn preempt(&mut self, pod: PodId) -> Option<Preemption> {
        let class_id = self.entry(pod).filter(|entry| entry.place.is_none())?.class;
        if !self.may_preempt(pod) {
            return None;
        }
        let mut known = std::mem::take(&mut self.trials);
        let class = self.class(class_id);
        // What a node would cost depends on the node alone only where no other node's pods and no budget have a say.
        let lasting = class.checks.is_empty() && self.budgets.is_empty();
        if !lasting || known.class != Some(class_id) || known.generation != self.generation() {
            known = Trials { class: Some(class_id), generation: self.generation(), costs: Vec::new() };
        }
        known.costs.resize_with(self.nodes.capacity(), || (0, None));
        let shut = self.shut_for(pod);
        let mut best: Option<&Cost> = None;
        for node in self.statics.all[class.statics].tiers.iter().flat_map(|(_, bits)| bits.iter()) {
            if shut.is_some_and(|shut| shut.contains(node)) {
                continue;
            }
            let version = self.nodes.version[node as usize];
            let (at, cost) = &mut known.costs[node as usize];
            if *at != version {
                *at = version;
                *cost = self.victims_on(class, i64::from(class.needs.priority), node).map(|(cost, _)| cost);
            }
        }
        let open = known.costs.iter().filter(|(at, _)| *at > 0).filter_map(|(_, cost)| cost.as_ref());
        for cost in open {
            let closed = shut.is_some_and(|shut| shut.contains(cost.node));
            if !closed
                && best.is_none_or(|best| cost < best)
                && self.statics.all[class.statics].score(cost.node).is_some()
            {
                best = Some(cost);
            }
        }
        let node = best.map(|cost| cost.node);
        let found = node.and_then(|node| self.victims_on(class, i64::from(class.needs.priority), node));
        self.trials = if lasting { known } else { Trials::default() };
        found.map(|(_, preemption)| preemption)
    }

    /// Whom to end on one node so that this pod fits there.
    pub fn victims(&self, pod: PodId, node: NodeId) -> Option<Preemption> {
        let class = self.class(self.entry(pod)?.class);
        let allowed = self.statics.all[class.statics].score(node).is_some();
        allowed
            .then(|| self.victims_on(class, i64::from(class.needs.priority), node))
            .flatten()
            .map(|(_, preemption)| preemption)
    }

    /// Whom of the pods below a priority to end on one node so that a pod of the class fits there.
    pub(super) fn victims_below(&self, class: &Class, priority: i64, node: NodeId) -> Option<Preemption> {
        self.victims_on(class, priority, node).map(|(_, preemption)| preemption)
    }

    /// The pods to end on one node, and what that costs.
    fn victims_on(&self, class: &Class, priority: i64, node: NodeId) -> Option<(Cost, Preemption)> {
        let on_node = self.nodes.pods[node as usize].iter();
        let below: Vec<(PodId, &PodEntry)> = on_node
            .filter_map(|pod| Some((*pod, self.entry(*pod)?)))
            .filter(|(_, entry)| i64::from(entry.info.needs.priority) < priority)
            .collect();
        let mut trial = Trial::new(self, class, node);
        for (_, entry) in &below {
            trial.shift(entry, 1);
        }
        let mut lower: Vec<(PodId, &PodEntry)> = below.into_iter().filter(|(_, entry)| !entry.promised).collect();
        if lower.is_empty() {
            return None;
        }
        if !trial.fits() {
            return None;
        }
        // The more important one first: higher priority, then the one that has run longer.
        lower.sort_by_key(|(pod, entry)| (Reverse(entry.info.needs.priority), entry.info.started_ms, *pod));
        let violating = self.violating(&lower);
        let rest = (0..lower.len()).filter(|at| !violating.contains(at));
        let (mut victims, mut violations) = (Vec::new(), 0);
        for at in violating.iter().copied().chain(rest) {
            let Some((_, entry)) = lower.get(at) else { continue };
            trial.shift(entry, -1);
            if !trial.fits() {
                trial.shift(entry, 1);
                victims.push(at);
                violations += usize::from(violating.contains(&at));
            }
        }
        victims.sort_unstable();
        let chosen: Vec<&(PodId, &PodEntry)> = victims.iter().filter_map(|at| lower.get(*at)).collect();
        let highest = i64::from(chosen.first()?.1.info.needs.priority);
        let of_highest = chosen.iter().filter(|(_, entry)| i64::from(entry.info.needs.priority) == highest);
        let lifted = chosen.iter().map(|(_, entry)| i64::from(entry.info.needs.priority) + i64::from(i32::MAX) + 1);
        let cost = Cost {
            violations,
            highest_priority: highest,
            priorities: lifted.sum(),
            victims: chosen.len(),
            started: Reverse(of_highest.map(|(_, entry)| entry.info.started_ms).min()?),
            node,
        };
        let victims = chosen.iter().map(|(pod, _)| *pod).collect();
        Some((cost, Preemption { node, victims, violations }))
    }

    /// Positions of pods whose end, in this order, would violate a budget.
    fn violating(&self, pods: &[(PodId, &PodEntry)]) -> Vec<usize> {
        let mut allowed: Vec<i64> = self.budgets.iter().map(|budget| budget.allowed).collect();
        let mut violating = Vec::new();
        // A pod that is being ended already takes nothing more from its budgets.
        for (at, (_, entry)) in pods.iter().enumerate().filter(|(_, (_, entry))| !entry.info.terminating) {
            let needs = &entry.info.needs;
            let mut violates = false;
            for (budget, allowed) in self.budgets.iter().zip(&mut allowed) {
                let selects = budget.namespace == needs.namespace && budget.selector.matches(&needs.labels);
                if selects {
                    *allowed -= 1;
                    violates |= *allowed < 0;
                }
            }
            if violates {
                violating.push(at);
            }
        }
        violating
    }
}
