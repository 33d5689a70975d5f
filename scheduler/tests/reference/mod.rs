//! The slow and obviously right scheduler that the fast one is held against.
//!
//! It knows nothing but lists of nodes and pods, and answers every question by going through all of them. It shares no code with the fast
//! core: selectors, tolerations, requests and ranks are done again here, as directly as they are written down.
#![allow(dead_code)]

mod order;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use minipod_proto::Resource;
use minipod_proto::v1::{
    LabelSelector, Node, NodeSelectorRequirement, NodeSelectorTerm, Pod, PodAffinityTerm, Taint, Toleration,
    TopologySpreadConstraint,
};

pub type Labels = BTreeMap<String, String>;
/// What ending pods on a node costs, see `preempt`.
type Cost = (usize, i32, i64, usize, i64, usize);

/// The cluster: nothing but lists.
#[derive(Default, Clone)]
pub struct World {
    pub nodes: Vec<Node>,
    /// Pods with the node they are on.
    pub pods: Vec<(Pod, Option<String>)>,
    pub namespaces: BTreeMap<String, Labels>,
    pub pack: bool,
}

/// As the fast core's score, without the tie-break.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Score {
    pub shunned: Reverse<u32>,
    pub preference: i64,
    pub pull: i64,
    pub crowding: Reverse<i64>,
    pub rank: i64,
}

fn selector_matches(selector: Option<&LabelSelector>, labels: &Labels) -> bool {
    let Some(selector) = selector else { return false };
    selector.match_labels.iter().all(|(key, value)| labels.get(key) == Some(value))
        && selector.match_expressions.iter().all(|e| {
            let value = labels.get(&e.key);
            match e.operator.as_str() {
                "In" => value.is_some_and(|value| e.values.contains(value)),
                "NotIn" => value.is_none_or(|value| !e.values.contains(value)),
                "Exists" => value.is_some(),
                "DoesNotExist" => value.is_none(),
                _ => false,
            }
        })
}

fn keys_match(keys: &[String], same: bool, own: &Labels, other: &Labels) -> bool {
    let relevant = keys.iter().filter(|key| own.contains_key(*key));
    relevant.into_iter().all(|key| (own.get(key) == other.get(key)) == same)
}

fn covers(toleration: &Toleration, taint: &Taint) -> bool {
    (toleration.effect.is_empty() || toleration.effect == taint.effect)
        && (toleration.key.is_empty() || toleration.key == taint.key)
        && (toleration.operator == "Exists" || toleration.value == taint.value)
}

fn tolerated(pod: &Pod, taint: &Taint) -> bool {
    pod.spec().tolerations.iter().any(|toleration| covers(toleration, taint))
}

fn requirement(r: &NodeSelectorRequirement, value: Option<&String>) -> bool {
    let number = |text: &String| text.parse::<i64>().ok();
    match r.operator.as_str() {
        "In" => value.is_some_and(|value| r.values.contains(value)),
        "NotIn" => value.is_none_or(|value| !r.values.contains(value)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => value.and_then(number).zip(number(&r.values[0])).is_some_and(|(have, want)| have > want),
        "Lt" => value.and_then(number).zip(number(&r.values[0])).is_some_and(|(have, want)| have < want),
        _ => false,
    }
}

fn term_matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let name = node.name().to_owned();
    !(term.match_expressions.is_empty() && term.match_fields.is_empty())
        && term.match_expressions.iter().all(|r| requirement(r, node.meta().labels.get(&r.key)))
        && term.match_fields.iter().all(|r| r.key == "metadata.name" && requirement(r, Some(&name)))
}

fn selected(pod: &Pod, node: &Node) -> bool {
    let labels = &node.meta().labels;
    let by_selector = pod.spec().node_selector.iter().all(|(key, value)| labels.get(key) == Some(value));
    let affinity = pod.spec().affinity.as_ref().and_then(|all| all.node_affinity.as_ref());
    let required = affinity.and_then(|all| all.required_during_scheduling_ignored_during_execution.as_ref());
    by_selector && required.is_none_or(|all| all.node_selector_terms.iter().any(|term| term_matches(term, node)))
}

fn hard_taint(pod: &Pod, node: &Node) -> bool {
    let hard = node.spec().taints.iter().filter(|taint| taint.effect == "NoSchedule" || taint.effect == "NoExecute");
    hard.into_iter().any(|taint| !tolerated(pod, taint))
}

/// Amount of a resource that a pod asks for, by the rule of KEP-753, restated.
pub fn request(pod: &Pod, resource: &str) -> i64 {
    let of = |container: &minipod_proto::v1::Container| {
        let resources = container.resources.clone().unwrap_or_default();
        let text = resources.requests.get(resource).or(resources.limits.get(resource)).cloned();
        text.map_or(0, |text| amount(resource, &text))
    };
    if resource == "pods" {
        return 1;
    }
    let sidecar = |c: &&minipod_proto::v1::Container| c.restart_policy == "Always";
    let init = &pod.spec().init_containers;
    let running: i64 =
        pod.spec().containers.iter().map(of).sum::<i64>() + init.iter().filter(sidecar).map(of).sum::<i64>();
    let peak = (0..init.len()).map(|at| init[..at].iter().filter(sidecar).map(of).sum::<i64>() + of(&init[at]));
    let overhead = pod.spec().overhead.get(resource).map_or(0, |text| amount(resource, text));
    running.max(peak.max().unwrap_or(0)) + overhead
}

/// The tests write amounts as plain numbers, `m` for CPU and `Mi` for memory.
fn amount(resource: &str, text: &str) -> i64 {
    match (resource, text.strip_suffix('m'), text.strip_suffix("Mi")) {
        (_, Some(milli), _) => milli.parse().unwrap(),
        (_, _, Some(mi)) => mi.parse::<i64>().unwrap() << 20,
        ("cpu", ..) => text.parse::<i64>().unwrap() * 1000,
        _ => text.parse().unwrap(),
    }
}

fn allocatable(node: &Node, resource: &str) -> i64 {
    node.status().allocatable.get(resource).map_or(0, |text| amount(resource, text))
}

fn ports(pod: &Pod) -> Vec<(String, i32, String)> {
    let sidecars = pod.spec().init_containers.iter().filter(|c| c.restart_policy == "Always");
    let ports = sidecars.chain(&pod.spec().containers).flat_map(|c| &c.ports).filter(|p| p.host_port > 0);
    let or = |text: &str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
    ports.map(|p| (or(&p.protocol, "TCP"), p.host_port, or(&p.host_ip, "0.0.0.0"))).collect()
}

impl World {
    fn on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Pod> {
        self.pods.iter().filter(move |(_, place)| place.as_deref() == Some(node)).map(|(pod, _)| pod)
    }

    fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name() == name)
    }

    /// Whether a term of `holder` speaks of `other`.
    fn speaks_of(&self, holder: &Pod, term: &PodAffinityTerm, other: &Pod) -> bool {
        let namespace = other.namespace();
        let none = Labels::new();
        let by_name = if term.namespaces.is_empty() && term.namespace_selector.is_none() {
            namespace == holder.namespace()
        } else {
            term.namespaces.iter().any(|name| name == namespace)
        };
        let by_label = term.namespace_selector.is_some()
            && selector_matches(term.namespace_selector.as_ref(), self.namespaces.get(namespace).unwrap_or(&none));
        let (own, labels) = (&holder.meta().labels, &other.meta().labels);
        (by_name || by_label)
            && selector_matches(term.label_selector.as_ref(), labels)
            && keys_match(&term.match_label_keys, true, own, labels)
            && keys_match(&term.mismatch_label_keys, false, own, labels)
    }

    fn terms(pod: &Pod) -> (Vec<PodAffinityTerm>, Vec<PodAffinityTerm>, Vec<(i64, PodAffinityTerm)>) {
        let affinity = pod.spec().affinity.clone().unwrap_or_default();
        let near = affinity.pod_affinity.unwrap_or_default();
        let away = affinity.pod_anti_affinity.unwrap_or_default();
        let term = |w: minipod_proto::v1::WeightedPodAffinityTerm| {
            (i64::from(w.weight), w.pod_affinity_term.unwrap_or_default())
        };
        let mut preferred: Vec<_> =
            near.preferred_during_scheduling_ignored_during_execution.into_iter().map(term).collect();
        let against = away.preferred_during_scheduling_ignored_during_execution.into_iter().map(term);
        preferred.extend(against.map(|(weight, term)| (-weight, term)));
        (
            near.required_during_scheduling_ignored_during_execution,
            away.required_during_scheduling_ignored_during_execution,
            preferred,
        )
    }

    /// Bound pods with their nodes.
    fn bound(&self) -> impl Iterator<Item = (&Pod, &Node)> {
        self.pods.iter().filter_map(|(pod, place)| Some((pod, self.node(place.as_deref()?)?)))
    }

    fn same_domain(node: &Node, other: &Node, key: &str) -> bool {
        let value = node.meta().labels.get(key);
        value.is_some() && value == other.meta().labels.get(key)
    }

    /// Why the pod cannot go to the node; `None` if it can.
    pub fn refusal(&self, pod: &Pod, node: &Node) -> Option<&'static str> {
        let ready = node.condition("Ready").is_none_or(|condition| condition.status == "True");
        if !ready || node.meta().deletion_timestamp.is_some() {
            return Some("not ready");
        }
        let cordon =
            Taint { key: "node.kubernetes.io/unschedulable".into(), effect: "NoSchedule".into(), ..Default::default() };
        if node.spec().unschedulable && !tolerated(pod, &cordon) {
            return Some("unschedulable");
        }
        if hard_taint(pod, node) {
            return Some("taint");
        }
        if !selected(pod, node) {
            return Some("selector");
        }
        let any = "0.0.0.0";
        let clash = |a: &(String, i32, String), b: &(String, i32, String)| {
            a.0 == b.0 && a.1 == b.1 && (a.2 == b.2 || a.2 == any || b.2 == any)
        };
        let taken: Vec<_> = self.on(node.name()).flat_map(ports).collect();
        if ports(pod).iter().any(|port| taken.iter().any(|other| clash(port, other))) {
            return Some("port");
        }
        for resource in ["cpu", "memory", "ephemeral-storage", "pods", "example.com/gpu"] {
            let used: i64 = self.on(node.name()).map(|other| request(other, resource)).sum();
            let wanted = request(pod, resource);
            if wanted > 0 && used + wanted > allocatable(node, resource) {
                return Some("short");
            }
        }
        if pod.spec().topology_spread_constraints.iter().any(|c| !self.spread_allows(pod, c, node)) {
            return Some("spread");
        }
        self.affinity_refusal(pod, node)
    }

    fn affinity_refusal(&self, pod: &Pod, node: &Node) -> Option<&'static str> {
        let (near, away, _) = Self::terms(pod);
        let all_speak_of = |other: &Pod| near.iter().all(|term| self.speaks_of(pod, term, other));
        if !near.is_empty() {
            if near.iter().any(|term| !node.meta().labels.contains_key(&term.topology_key)) {
                return Some("affinity key");
            }
            let counted = |key: &str, at: Option<&Node>| {
                self.bound().any(|(other, place)| {
                    let there = at.is_none_or(|node| Self::same_domain(node, place, key));
                    all_speak_of(other) && place.meta().labels.contains_key(key) && there
                })
            };
            let first = all_speak_of(pod) && !near.iter().any(|term| counted(&term.topology_key, None));
            if !first && !near.iter().all(|term| counted(&term.topology_key, Some(node))) {
                return Some("affinity");
            }
        }
        let meets = |holder: &Pod, terms: &[PodAffinityTerm], other: &Pod, place: &Node| {
            terms
                .iter()
                .any(|term| self.speaks_of(holder, term, other) && Self::same_domain(node, place, &term.topology_key))
        };
        let own = self.bound().any(|(other, place)| meets(pod, &away, other, place));
        let theirs = self.bound().any(|(other, place)| meets(other, &Self::terms(other).1, pod, place));
        (own || theirs).then_some("anti-affinity")
    }

    /// Nodes that a constraint counts.
    fn included(&self, pod: &Pod, constraint: &TopologySpreadConstraint) -> Vec<&Node> {
        let hard = |c: &TopologySpreadConstraint| c.when_unsatisfiable != "ScheduleAnyway";
        let all = pod.spec().topology_spread_constraints.iter().filter(|c| hard(c) == hard(constraint));
        let keys: BTreeSet<&String> = all.map(|c| &c.topology_key).collect();
        let mut nodes: Vec<&Node> = self.nodes.iter().collect();
        nodes.retain(|node| {
            keys.iter().all(|key| node.meta().labels.contains_key(*key))
                && (constraint.node_affinity_policy == "Ignore" || selected(pod, node))
                && (constraint.node_taints_policy != "Honor" || !hard_taint(pod, node))
        });
        nodes
    }

    /// Pods counted per domain of the included nodes.
    fn spread_counts(&self, pod: &Pod, constraint: &TopologySpreadConstraint) -> BTreeMap<String, i64> {
        let mut counts = BTreeMap::new();
        let own = &pod.meta().labels;
        for node in self.included(pod, constraint) {
            let there = self.on(node.name()).filter(|other| {
                other.namespace() == pod.namespace()
                    && !other.is_terminating()
                    && selector_matches(constraint.label_selector.as_ref(), &other.meta().labels)
                    && keys_match(&constraint.match_label_keys, true, own, &other.meta().labels)
            });
            let domain = node.meta().labels[&constraint.topology_key].clone();
            *counts.entry(domain).or_insert(0) += there.count() as i64;
        }
        counts
    }

    fn spread_allows(&self, pod: &Pod, constraint: &TopologySpreadConstraint, node: &Node) -> bool {
        if constraint.when_unsatisfiable == "ScheduleAnyway" {
            return true;
        }
        let Some(domain) = node.meta().labels.get(&constraint.topology_key) else { return false };
        let counts = self.spread_counts(pod, constraint);
        let few = (counts.len() as i64) < i64::from(constraint.min_domains.unwrap_or(1));
        let emptiest = if few { 0 } else { counts.values().copied().min().unwrap_or(0) };
        let itself = selector_matches(constraint.label_selector.as_ref(), &pod.meta().labels);
        let count = counts.get(domain).copied().unwrap_or(0);
        count + i64::from(itself) - emptiest <= i64::from(constraint.max_skew)
    }

    /// How good the node is for the pod.
    pub fn score(&self, pod: &Pod, node: &Node) -> Score {
        let soft = node.spec().taints.iter().filter(|taint| taint.effect == "PreferNoSchedule");
        let shunned = soft.filter(|taint| !tolerated(pod, taint)).count() as u32;
        let affinity = pod.spec().affinity.clone().unwrap_or_default().node_affinity.unwrap_or_default();
        let preferred = affinity.preferred_during_scheduling_ignored_during_execution;
        let matching = preferred.iter().filter(|p| p.preference.as_ref().is_some_and(|term| term_matches(term, node)));
        let preference = matching.map(|p| i64::from(p.weight)).sum();
        Score {
            shunned: Reverse(shunned),
            preference,
            pull: self.pull(pod, node),
            crowding: Reverse(self.crowding(pod, node)),
            rank: self.rank(pod, node),
        }
    }

    /// Whom to end on which node so that the pod fits: each node's pods of lower priority are taken away, and one by one put back
    /// where that does no harm. The cheapest node wins: (violations, highest priority, sum, number, latest start, age of node).
    pub fn preempt(&self, pod: &Pod, budgets: &[(String, LabelSelector, i64)]) -> Option<(String, Vec<String>, usize)> {
        let priority = |pod: &Pod| pod.spec().priority.unwrap_or(0);
        let start = |pod: &Pod| pod.status().start_time.map_or(0, |time| time.seconds);
        let mut best: Option<(Cost, String, Vec<String>)> = None;
        for (age, node) in self.nodes.iter().enumerate() {
            let here = |place: &Option<String>| place.as_deref() == Some(node.name());
            let mut lower: Vec<(Pod, Option<String>)> = self
                .pods
                .iter()
                .filter(|(other, place)| here(place) && priority(other) < priority(pod))
                .cloned()
                .collect();
            lower.sort_by_key(|(other, _)| (Reverse(priority(other)), start(other)));
            let mut rest = self.clone();
            rest.pods.retain(|(other, place)| !(here(place) && priority(other) < priority(pod)));
            if lower.is_empty() || rest.refusal(pod, node).is_some() {
                continue;
            }
            let mut left: Vec<i64> = budgets.iter().map(|(_, _, allowed)| *allowed).collect();
            let violates: Vec<bool> = lower
                .iter()
                .map(|(other, _)| {
                    let mut any = false;
                    if other.is_terminating() {
                        return false;
                    }
                    for (at, (namespace, selector, _)) in budgets.iter().enumerate() {
                        if namespace == other.namespace() && selector_matches(Some(selector), &other.meta().labels) {
                            left[at] -= 1;
                            any |= left[at] < 0;
                        }
                    }
                    any
                })
                .collect();
            let mut victims = Vec::new();
            for round in [true, false] {
                for (at, one) in lower.iter().enumerate().filter(|(at, _)| violates[*at] == round) {
                    rest.pods.push(one.clone());
                    if rest.refusal(pod, node).is_some() {
                        rest.pods.pop();
                        victims.push(at);
                    }
                }
            }
            if victims.is_empty() {
                continue;
            }
            victims.sort_unstable();
            let highest = victims.iter().map(|at| priority(&lower[*at].0)).max()?;
            let sum = victims.iter().map(|at| i64::from(priority(&lower[*at].0)) + (1 << 31)).sum();
            let first =
                victims.iter().filter(|at| priority(&lower[**at].0) == highest).map(|at| start(&lower[*at].0)).min()?;
            let violations = victims.iter().filter(|at| violates[**at]).count();
            let cost = (violations, highest, sum, victims.len(), -first, age);
            if best.as_ref().is_none_or(|(other, _, _)| cost < *other) {
                let victims = victims.iter().map(|at| lower[*at].0.uid().to_owned()).collect();
                best = Some((cost, node.name().to_owned(), victims));
            }
        }
        best.map(|(cost, node, victims)| (node, victims, cost.0))
    }

    fn pull(&self, pod: &Pod, node: &Node) -> i64 {
        let mut pull = 0;
        let own = Self::terms(pod).2;
        for (other, place) in self.bound() {
            for (weight, term) in &own {
                if self.speaks_of(pod, term, other) && Self::same_domain(node, place, &term.topology_key) {
                    pull += weight;
                }
            }
            let (near, _, preferred) = Self::terms(other);
            for (weight, term) in preferred.iter().cloned().chain(near.into_iter().map(|term| (1, term))) {
                if self.speaks_of(other, &term, pod) && Self::same_domain(node, place, &term.topology_key) {
                    pull += weight;
                }
            }
        }
        pull
    }

    fn crowding(&self, pod: &Pod, node: &Node) -> i64 {
        let soft = pod.spec().topology_spread_constraints.iter().filter(|c| c.when_unsatisfiable == "ScheduleAnyway");
        soft.map(|constraint| match node.meta().labels.get(&constraint.topology_key) {
            None => 1 << 40,
            Some(domain) => {
                let counts = self.spread_counts(pod, constraint);
                let weight = (((counts.len() + 2) as f64).ln() * 1000.0).round() as i64;
                weight * counts.get(domain).copied().unwrap_or(0)
            }
        })
        .sum()
    }

    fn rank(&self, pod: &Pod, node: &Node) -> i64 {
        let share = |resource: &str, assumed: i64| -> i64 {
            let of = |pod: &Pod| Some(request(pod, resource)).filter(|amount| *amount != 0).unwrap_or(assumed);
            let size = allocatable(node, resource);
            if size == 0 {
                return 0;
            }
            // Seven significant bits, rounded up.
            let mut unit = 1;
            while size / unit >= 128 {
                unit *= 2;
            }
            let rounded = (size + unit - 1) / unit * unit;
            let per_unit = i128::from((1i64 << 60) / rounded);
            let clamp = |value: i128| value.clamp(-(1 << 60), 1 << 60) as i64;
            let left = size - self.on(node.name()).map(of).sum::<i64>();
            clamp(i128::from(left) * per_unit) - clamp(i128::from(of(pod)) * per_unit)
        };
        let free = share("cpu", 100) + share("memory", 200 << 20);
        if self.pack { -free } else { free }
    }
}
