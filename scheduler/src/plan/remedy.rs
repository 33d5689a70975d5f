//! What would make a pod fit on a node: whom to end, how much to free, which label or term stands in the way.

use minipod_proto::resources::{Shortfall, amount_text};
use minipod_proto::scheduling;
use minipod_proto::v1::NodeSelectorRequirement;

use super::class::Class;
use super::core::Core;
use super::explain::{Explanation, NodeReason, Reason};
use super::needs::{NodeInfo, Placement, Term, Who};
use super::statics::StaticReason;
use super::{NodeId, PodId};

/// On so many nodes, those that lack the least, it is looked for whom to end, and only as long as they have no more pods than
/// [`TRIED_PODS`] together: a trial costs about a microsecond per pod on the node and rule of the pod.
const TRIED: usize = 2000;
/// Pods that are thought away for one question, some tens of milliseconds' worth; the first node is tried however many it has.
const TRIED_PODS: usize = 20_000;

/// A node on which it is looked for whom to end; what lacks little is tried first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Trial {
    lack: i64,
    /// The node's place in the explanation.
    pub(super) index: usize,
    pub(super) node: NodeId,
}

/// What would make a pod fit on one node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Remedy {
    /// In words; empty: nothing is known that would help.
    pub text: String,
    /// The pods whose end would be enough, the most important one first.
    pub evict: Vec<PodId>,
    /// All of them have a lower priority, and the pod may preempt.
    pub by_preemption: bool,
}

impl Core {
    /// For every node of an explanation what would make the pod fit there, and on how many nodes it was tried to end pods.
    pub fn remedies(&self, pod: PodId, explanation: &Explanation) -> (Vec<Remedy>, usize) {
        let (mut all, mut trials) = (Vec::with_capacity(explanation.nodes.len()), Vec::new());
        for (index, verdict) in explanation.nodes.iter().enumerate() {
            let (remedy, trial) = self.advise(pod, index, verdict);
            all.push(remedy);
            trials.extend(trial);
        }
        let trials = self.promising(trials);
        for trial in &trials {
            if let Some(remedy) = all.get_mut(trial.index) {
                self.try_ends(pod, trial, remedy);
            }
        }
        (all, trials.len())
    }

    /// What would help on one node of an explanation, in words, and whether it is worth looking for whom to end there.
    pub(super) fn advise(&self, pod: PodId, index: usize, verdict: &NodeReason) -> (Remedy, Option<Trial>) {
        let (Some(entry), Some(reason), Some(node)) = (self.entry(pod), &verdict.reason, self.node_id(&verdict.node))
        else {
            return (Remedy::default(), None);
        };
        let class = self.class(entry.class);
        let text = self.advice(class, node, reason);
        let is_worth_it = reason.helps_to_evict() && !self.is_too_small(class, node);
        let trial = is_worth_it.then(|| Trial { lack: lack(reason), index, node });
        (Remedy { text, ..Remedy::default() }, trial)
    }

    /// The trials that are made, those first that are likely to come to something.
    pub(super) fn promising(&self, mut trials: Vec<Trial>) -> Vec<Trial> {
        trials.sort_unstable();
        let mut pods = 0;
        let within = trials.iter().take(TRIED).take_while(|trial| {
            let before = pods;
            pods += self.pods_on(trial.node);
            before == 0 || pods <= TRIED_PODS
        });
        let tried = within.count();
        trials.truncate(tried);
        trials
    }

    /// How many pods a trial thinks away.
    pub(super) fn pods_on(&self, node: NodeId) -> usize {
        self.nodes.pods.get(node as usize).map_or(0, |pods| pods.len())
    }

    /// Looks for whom to end on a node.
    pub(super) fn try_ends(&self, pod: PodId, trial: &Trial, remedy: &mut Remedy) {
        let Some(entry) = self.entry(pod).filter(|_| self.nodes.alive.contains(trial.node)) else { return };
        let class = self.class(entry.class);
        let Some(preemption) = self.victims_below(class, i64::from(i32::MAX) + 1, trial.node) else { return };
        let lower = |pod: &PodId| self.pod(*pod).is_some_and(|info| info.needs.priority < class.needs.priority);
        remedy.by_preemption = class.needs.preempts && preemption.victims.iter().all(lower);
        if preemption.violations > 0 {
            remedy.text += &format!(" ({} of these ends would violate a disruption budget)", preemption.violations);
        }
        remedy.evict = preemption.victims;
    }

    fn is_too_small(&self, class: &Class, node: NodeId) -> bool {
        class.requests.iter().any(|(resource, amount)| self.allocatable(*resource, node) < *amount)
    }

    fn allocatable(&self, resource: usize, node: NodeId) -> i64 {
        self.nodes.columns[resource].allocatable.get(node as usize).copied().unwrap_or(0)
    }

    /// Everything that a node has of a resource, in its unit (CPU in thousandths).
    pub fn allocatable_of(&self, node: &str, resource: &str) -> i64 {
        let column = self.nodes.columns.iter().position(|column| column.name == resource);
        column.zip(self.node_id(node)).map_or(0, |(column, node)| self.allocatable(column, node))
    }

    fn advice(&self, class: &Class, node: NodeId, reason: &Reason) -> String {
        match reason {
            Reason::Fixed(fixed) => match self.nodes.info.get(node as usize).and_then(Option::as_ref) {
                Some(info) => fixed_advice(fixed, &class.needs.placement, info),
                None => String::new(),
            },
            Reason::Reserved => format!("it waits until the nodes are free again that are held for {}", self.holder()),
            Reason::Port(port) => format!("free host port {port}"),
            Reason::Short(all) => self.free_advice(all, node),
            Reason::Lacking(key) => format!("give the node a label {key}"),
            Reason::Skew { key, .. } => format!("pods in emptier domains of {key} first, or end some of them here"),
            Reason::Far { key, domain } => {
                let term = class.needs.affinity.iter().find(|term| term.topology_key == *key);
                format!("a pod with {} in {key}={domain}", term.map_or_else(String::new, |term| who_text(&term.who)))
            }
            Reason::Near { key, domain } => near_advice(&class.needs.anti_affinity, key, domain),
        }
    }

    fn holder(&self) -> String {
        let keys = self.holders().iter().filter_map(|uid| self.pod_id(uid).and_then(|pod| self.pod(pod)));
        let mut keys = keys.map(super::needs::PodInfo::key);
        let first = keys.next().unwrap_or_else(|| "a pod that has waited longer".to_owned());
        match keys.count() {
            0 => first,
            more => format!("{first} and {more} more"),
        }
    }

    fn free_advice(&self, all: &[Shortfall], node: NodeId) -> String {
        let name = self.nodes.name(node);
        let parts = all.iter().map(|short| {
            let size = self.allocatable_of(name, &short.resource);
            let text = |amount| amount_text(&short.resource, amount);
            if size < short.requested {
                let (has, asks) = (text(size), text(short.requested));
                return format!(
                    "no end of pods helps: all of the node is {has} {}, the pod asks for {asks}",
                    short.resource
                );
            }
            format!("free {} {}", text(short.requested.saturating_sub(short.free)), short.resource)
        });
        parts.collect::<Vec<_>>().join(", ")
    }
}

/// How much is lacking, in thousandths of what is asked for: what lacks little is tried first.
fn lack(reason: &Reason) -> i64 {
    let Reason::Short(all) = reason else { return 0 };
    let share = |short: &Shortfall| {
        let missing = i128::from(short.requested) - i128::from(short.free);
        i64::try_from(missing * 1000 / i128::from(short.requested.max(1))).unwrap_or(i64::MAX)
    };
    all.iter().map(share).max().unwrap_or(0)
}

fn near_advice(own: &[Term], key: &str, domain: &str) -> String {
    match own.iter().find(|term| term.topology_key == key) {
        Some(term) => format!("no pod with {} in {key}={domain}: the pod's own anti-affinity", who_text(&term.who)),
        None => format!("the anti-affinity of a pod in {key}={domain} keeps this one away"),
    }
}

fn who_text(who: &Who) -> String {
    match &who.labels {
        None => "no labels at all (the term has no selector)".to_owned(),
        Some(labels) if labels.is_everything() => "any labels".to_owned(),
        Some(labels) => format!("labels {labels}"),
    }
}

fn fixed_advice(reason: &StaticReason, placement: &Placement, node: &NodeInfo) -> String {
    match reason {
        StaticReason::NotReady => format!("see minictl describe node {}", node.name),
        StaticReason::Unschedulable => format!("minictl uncordon {}", node.name),
        StaticReason::Taint(taint) => format!("a toleration of {taint}"),
        StaticReason::Selector => mismatch(placement, node),
    }
}

/// The label that is wrong, and what is wanted of it.
fn mismatch(placement: &Placement, node: &NodeInfo) -> String {
    let spec = &placement.spec;
    let found = |key: &str| match node.labels.get(key) {
        Some(value) => format!("the node has {key}={value}"),
        None => format!("the node has no label {key}"),
    };
    if let Some((key, value)) = spec.node_selector.iter().find(|(key, value)| node.labels.get(*key) != Some(*value)) {
        return format!("nodeSelector wants {key}={value}, {}", found(key));
    }
    let terms = scheduling::required_node_affinity(spec).map_or(&[][..], |selector| &selector.node_selector_terms);
    // The term that comes nearest says most.
    let failing = terms.iter().map(|term| {
        let labels = term.match_expressions.iter().filter(|one| !scheduling::requirement_matches(one, &node.labels));
        let fields = term.match_fields.iter().filter(|one| !scheduling::field_matches(one, &node.name));
        labels.chain(fields).collect::<Vec<&NodeSelectorRequirement>>()
    });
    let nearest = failing.filter(|failing| !failing.is_empty()).min_by_key(Vec::len);
    match nearest.as_ref().and_then(|failing| failing.first()) {
        Some(one) if one.key == scheduling::FIELD_NODE_NAME => format!("node affinity wants {}", requirement(one)),
        Some(one) => format!("node affinity wants {}, {}", requirement(one), found(&one.key)),
        None => "no term of the required node affinity can match any node".to_owned(),
    }
}

fn requirement(one: &NodeSelectorRequirement) -> String {
    match one.values.as_slice() {
        [] => format!("{} {}", one.key, one.operator),
        values => format!("{} {} ({})", one.key, one.operator, values.join(",")),
    }
}
