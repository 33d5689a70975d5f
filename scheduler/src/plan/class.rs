//! Classes: pods with equal needs, with everything about them that is worth computing once.

use std::collections::HashMap;
use std::sync::Arc;

use super::needs::{Needs, Spread, Who};
use super::nodes::Nodes;
use super::statics::Statics;
use super::topology::{Counted, Counter, Topology};

/// What a counter must say of a node's domain.
#[derive(Debug, Clone)]
pub enum Rule {
    /// At least one pod (required affinity).
    Near,
    /// No pod (anti-affinity, the pod's own or another's towards it).
    Apart,
    /// Not too many more than in the emptiest domain.
    Skew(Spread),
}

/// One condition.
#[derive(Debug, Clone)]
pub struct Check {
    /// Index of the counter.
    pub counter: usize,
    /// What it must say.
    pub rule: Rule,
}

/// What was true when the class could not be placed.
#[derive(Debug, Clone, Copy)]
pub struct Memo {
    /// Position in the change log.
    pub at: u64,
    /// Sum of the versions of the counters that the class looks at.
    pub versions: u64,
}

/// How the class is searched for.
#[derive(Debug, Clone, Default)]
pub struct Route {
    /// Index of the partition.
    pub partition: usize,
    /// Generation of the routes; an older one is made anew.
    pub made: u64,
}

/// Pods with equal needs.
pub struct Class {
    /// The needs.
    pub needs: Arc<Needs>,
    /// Requests by index of the resource.
    pub requests: Vec<(usize, i64)>,
    /// Index among the statics.
    pub statics: usize,
    /// Counters that count these pods.
    pub counted_by: Vec<usize>,
    /// Counters of terms that these pods hold, with their weights.
    pub holds: Vec<(usize, i64)>,
    /// Conditions on a node's domains.
    pub checks: Vec<Check>,
    /// Whether the pod is what its own affinity asks for: then the first one may go anywhere.
    pub likes_itself: bool,
    /// Counters of preferences, with the weight per pod.
    pub pulls: Vec<(usize, i64)>,
    /// Counters of soft spread constraints.
    pub soft: Vec<usize>,
    /// Set when it could not be placed.
    pub memo: Option<Memo>,
    /// How it is searched for.
    pub route: Route,
    /// Number of pods of this class.
    pub pods: u32,
}

/// All classes.
#[derive(Default)]
pub struct Classes {
    ids: HashMap<Arc<Needs>, u32>,
    /// By id.
    pub all: Vec<Class>,
    /// Classes without pods.
    pub idle: usize,
}

/// A counter that did not exist before; pods that are bound must be counted by it.
pub struct NewCounter(pub usize);

impl Classes {
    /// Id of the class with these needs, if there is one.
    pub fn find(&self, needs: &Needs) -> Option<u32> {
        self.ids.get(needs).copied()
    }

    /// Makes a class. Counters that are new for it are returned: what is bound already must be counted.
    pub fn admit(
        &mut self,
        needs: &Arc<Needs>,
        nodes: &mut Nodes,
        statics: &mut Statics,
        topology: &mut Topology,
    ) -> (u32, Vec<NewCounter>) {
        let requests = needs.requests.iter().map(|(name, amount)| (nodes.resource(name), *amount)).collect();
        let mut class = Class {
            needs: Arc::clone(needs),
            requests,
            statics: statics.intern(&needs.placement, &nodes.info),
            counted_by: Vec::new(),
            holds: Vec::new(),
            checks: Vec::new(),
            likes_itself: false,
            pulls: Vec::new(),
            soft: Vec::new(),
            memo: None,
            route: Route::default(),
            pods: 0,
        };
        let mut made = Made { nodes, topology, fresh: Vec::new() };
        made.terms(&mut class);
        made.spreads(&mut class);
        let fresh = made.fresh;
        for index in 0..topology.counters.len() {
            let (counter, namespaces) = (&topology.counters[index], &topology.namespaces);
            relate(&mut class, index, counter, namespaces);
        }
        let fresh_counters: Vec<NewCounter> = fresh.into_iter().map(NewCounter).collect();
        for NewCounter(index) in &fresh_counters {
            for other in &mut self.all {
                relate(other, *index, &topology.counters[*index], &topology.namespaces);
            }
        }
        let id = self.all.len() as u32;
        self.ids.insert(Arc::clone(needs), id);
        self.all.push(class);
        self.idle += 1;
        (id, fresh_counters)
    }
}

type Namespaces = std::collections::BTreeMap<String, std::collections::BTreeMap<String, String>>;

/// Links a class with a counter that speaks of it.
fn relate(class: &mut Class, index: usize, counter: &Counter, namespaces: &Namespaces) {
    let needs = Arc::clone(&class.needs);
    match &counter.counted {
        Counted::Matching(all) if all.iter().all(|who| needs.matches(who, namespaces)) => class.counted_by.push(index),
        Counted::Spread(who, _) if needs.matches(who, namespaces) => class.counted_by.push(index),
        Counted::Repelling(who) if needs.matches(who, namespaces) => {
            class.checks.push(Check { counter: index, rule: Rule::Apart });
            class.memo = None;
            class.route.made = 0;
        }
        Counted::Pulling(who) if needs.matches(who, namespaces) => {
            class.pulls.push((index, 1));
            class.route.made = 0;
        }
        _ => {}
    }
}

/// Makes a class's counters.
struct Made<'a> {
    nodes: &'a Nodes,
    topology: &'a mut Topology,
    fresh: Vec<usize>,
}

impl Made<'_> {
    fn counter(&mut self, counted: Counted, key: &str) -> usize {
        let key = self.topology.key(key, &self.nodes.info);
        let (index, fresh) = self.topology.counter(counted, key, &self.nodes.info);
        if fresh {
            self.fresh.push(index);
        }
        index
    }

    fn terms(&mut self, class: &mut Class) {
        let needs = Arc::clone(&class.needs);
        let all: Vec<Who> = needs.affinity.iter().map(|term| term.who.clone()).collect();
        class.likes_itself = all.iter().all(|who| needs.matches(who, &self.topology.namespaces));
        for term in &needs.affinity {
            // A pod counts for one term only if all terms speak of it, as in Kubernetes.
            let counter = self.counter(Counted::Matching(all.clone()), &term.topology_key);
            class.checks.push(Check { counter, rule: Rule::Near });
            // Other pods are drawn to a pod that requires them near, with weight 1.
            class.holds.push((self.counter(Counted::Pulling(term.who.clone()), &term.topology_key), 1));
        }
        for term in &needs.anti_affinity {
            let counter = self.counter(Counted::Matching(vec![term.who.clone()]), &term.topology_key);
            class.checks.push(Check { counter, rule: Rule::Apart });
            class.holds.push((self.counter(Counted::Repelling(term.who.clone()), &term.topology_key), 1));
        }
        for (weight, term) in &needs.preferred {
            let counter = self.counter(Counted::Matching(vec![term.who.clone()]), &term.topology_key);
            class.pulls.push((counter, *weight));
            class.holds.push((self.counter(Counted::Pulling(term.who.clone()), &term.topology_key), *weight));
        }
    }

    fn spreads(&mut self, class: &mut Class) {
        let needs = Arc::clone(&class.needs);
        for spread in &needs.spread {
            let inclusion = spread.inclusion(&needs.spread, &needs.placement);
            let inclusion = self.topology.inclusion(inclusion, &self.nodes.info);
            let counter = self.counter(Counted::Spread(spread.who.clone(), inclusion), &spread.topology_key);
            if spread.hard {
                class.checks.push(Check { counter, rule: Rule::Skew(spread.clone()) });
            } else {
                class.soft.push(counter);
            }
        }
    }
}
