//! What a pod allows of a node: tolerations against taints, node selectors against labels. Pure; the scheduler filters with it.
//!
//! The semantics are Kubernetes': what validation refuses (an operator with the wrong values) matches nothing.

use std::collections::BTreeMap;

use crate::{
    selector::Operator,
    v1::{NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, PodSpec, Taint, Toleration},
};

/// Effect of a taint: new pods stay away.
pub const NO_SCHEDULE: &str = "NoSchedule";
/// Effect of a taint: new pods prefer other nodes.
pub const PREFER_NO_SCHEDULE: &str = "PreferNoSchedule";
/// Effect of a taint: new pods stay away, running ones leave.
pub const NO_EXECUTE: &str = "NoExecute";
/// Key of the taint that stands for `spec.unschedulable` of a node.
pub const TAINT_UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// The only field that matchFields knows.
pub const FIELD_NODE_NAME: &str = "metadata.name";

/// Whether one toleration covers a taint.
pub fn covers(toleration: &Toleration, taint: &Taint) -> bool {
    if !toleration.effect.is_empty() && toleration.effect != taint.effect {
        return false;
    }
    // An empty key (with Exists) covers every key.
    if !toleration.key.is_empty() && toleration.key != taint.key {
        return false;
    }
    match toleration.operator.as_str() {
        "" | "Equal" => toleration.value == taint.value,
        "Exists" => true,
        _ => false,
    }
}

/// Whether any of the tolerations covers a taint.
pub fn tolerates(tolerations: &[Toleration], taint: &Taint) -> bool {
    tolerations.iter().any(|toleration| covers(toleration, taint))
}

/// The first taint that keeps a pod with these tolerations off a node (effects NoSchedule and NoExecute).
pub fn untolerated<'a>(taints: &'a [Taint], tolerations: &[Toleration]) -> Option<&'a Taint> {
    taints
        .iter()
        .filter(|taint| taint.effect == NO_SCHEDULE || taint.effect == NO_EXECUTE)
        .find(|taint| !tolerates(tolerations, taint))
}

/// Whether a pod with these tolerations may go to a node that is marked unschedulable.
pub fn tolerates_unschedulable(tolerations: &[Toleration]) -> bool {
    let taint = Taint { key: TAINT_UNSCHEDULABLE.to_owned(), effect: NO_SCHEDULE.to_owned(), ..Taint::default() };
    tolerates(tolerations, &taint)
}

/// Whether a node with these labels meets one requirement of matchExpressions.
pub fn requirement_matches(requirement: &NodeSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let operator = Operator::parse(&requirement.operator);
    let actual = labels.get(&requirement.key).map(String::as_str);
    operator.is_some_and(|operator| operator.met(actual, &requirement.values))
}

/// Whether a node of that name meets one requirement of matchFields: only metadata.name, In or NotIn, exactly one value.
pub fn field_matches(requirement: &NodeSelectorRequirement, node: &str) -> bool {
    match (requirement.key.as_str(), requirement.operator.as_str(), requirement.values.as_slice()) {
        (FIELD_NODE_NAME, "In", [name]) => name == node,
        (FIELD_NODE_NAME, "NotIn", [name]) => name != node,
        _ => false,
    }
}

/// Whether a node meets all of a term; a term without requirements is met by no node.
pub fn term_matches(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>, node: &str) -> bool {
    let empty = term.match_expressions.is_empty() && term.match_fields.is_empty();
    !empty
        && term.match_expressions.iter().all(|requirement| requirement_matches(requirement, labels))
        && term.match_fields.iter().all(|requirement| field_matches(requirement, node))
}

/// Whether a node meets any of a selector's terms; a selector without terms is met by no node.
pub fn node_selector_matches(selector: &NodeSelector, labels: &BTreeMap<String, String>, node: &str) -> bool {
    selector.node_selector_terms.iter().any(|term| term_matches(term, labels, node))
}

/// What a pod requires of nodes in its affinity, if anything.
pub fn required_node_affinity(spec: &PodSpec) -> Option<&NodeSelector> {
    let affinity = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    affinity.required_during_scheduling_ignored_during_execution.as_ref()
}

/// Whether a node meets a pod's `nodeSelector` and its required node affinity.
pub fn node_matches(spec: &PodSpec, labels: &BTreeMap<String, String>, node: &str) -> bool {
    spec.node_selector.iter().all(|(key, value)| labels.get(key) == Some(value))
        && required_node_affinity(spec).is_none_or(|selector| node_selector_matches(selector, labels, node))
}

#[cfg(test)]
#[path = "scheduling_tests.rs"]
mod tests;
