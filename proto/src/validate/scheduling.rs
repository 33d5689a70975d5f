//! Where a pod may and may not go.

use super::{
    meta::{label_selector, labels},
    walk::Walk,
};
use crate::{
    names::{dns_label, dns_subdomain, label_value, qualified_name},
    scheduling::{FIELD_NODE_NAME, NO_EXECUTE, NO_SCHEDULE, PREFER_NO_SCHEDULE},
    selector::Operator,
    v1::{
        Affinity, LabelSelector, NodeSelectorTerm, PodAffinityTerm, PodSpec, Taint, Toleration,
        TopologySpreadConstraint, WeightedPodAffinityTerm,
    },
};

const EFFECTS: [&str; 3] = [NO_SCHEDULE, PREFER_NO_SCHEDULE, NO_EXECUTE];

pub(super) fn pod(walk: &mut Walk, spec: &PodSpec) {
    labels(walk, "nodeSelector", &spec.node_selector);
    walk.each("tolerations", &spec.tolerations, toleration);
    walk.each("topologySpreadConstraints", &spec.topology_spread_constraints, spread);
    let pairs: Vec<String> = spec
        .topology_spread_constraints
        .iter()
        .map(|one| format!("{} {}", one.topology_key, one.when_unsatisfiable))
        .collect();
    walk.unique("topologySpreadConstraints", "", pairs.iter().map(String::as_str));
    walk.each("schedulingGates", &spec.scheduling_gates, |walk, gate| walk.form("name", &gate.name, qualified_name));
    walk.unique("schedulingGates", "name", spec.scheduling_gates.iter().map(|gate| gate.name.as_str()));
    if let Some(all) = &spec.affinity {
        walk.within("affinity", |walk| affinity(walk, all));
    }
    walk.form_if_set("priorityClassName", &spec.priority_class_name, dns_subdomain);
    walk.word("preemptionPolicy", &spec.preemption_policy, &["PreemptLowerPriority", "Never"]);
}

fn toleration(walk: &mut Walk, toleration: &Toleration) {
    walk.form_if_set("key", &toleration.key, qualified_name);
    walk.word("operator", &toleration.operator, &["Equal", "Exists"]);
    if toleration.key.is_empty() && toleration.operator != "Exists" {
        walk.bad("operator", &toleration.operator, "want Exists where there is no key");
    }
    match toleration.operator.as_str() {
        "Exists" if !toleration.value.is_empty() => walk.bad("value", &toleration.value, "want none with Exists"),
        _ => walk.form("value", &toleration.value, label_value),
    }
    walk.word("effect", &toleration.effect, &EFFECTS);
    if let Some(seconds) = toleration.toleration_seconds
        && toleration.effect != NO_EXECUTE
    {
        walk.bad("tolerationSeconds", seconds, "want it with effect NoExecute only");
    }
}

pub(super) fn taint(walk: &mut Walk, taint: &Taint) {
    walk.form("key", &taint.key, qualified_name);
    walk.form("value", &taint.value, label_value);
    walk.must_be("effect", &taint.effect, &EFFECTS);
}

fn affinity(walk: &mut Walk, affinity: &Affinity) {
    if let Some(nodes) = &affinity.node_affinity {
        walk.within("nodeAffinity", |walk| {
            if let Some(selector) = &nodes.required_during_scheduling_ignored_during_execution {
                walk.within("requiredDuringSchedulingIgnoredDuringExecution", |walk| {
                    if selector.node_selector_terms.is_empty() {
                        walk.missing("nodeSelectorTerms", "want at least one term, without any no node matches");
                    }
                    walk.each("nodeSelectorTerms", &selector.node_selector_terms, node_term);
                });
            }
            let preferred = &nodes.preferred_during_scheduling_ignored_during_execution;
            walk.each("preferredDuringSchedulingIgnoredDuringExecution", preferred, |walk, one| {
                walk.between("weight", one.weight.into(), 1, 100);
                match &one.preference {
                    Some(term) => walk.within("preference", |walk| node_term(walk, term)),
                    None => walk.missing("preference", "want a term"),
                }
            });
        });
    }
    let pods = affinity.pod_affinity.as_ref().map(|pods| {
        let required = &pods.required_during_scheduling_ignored_during_execution;
        ("podAffinity", required, &pods.preferred_during_scheduling_ignored_during_execution)
    });
    let against = affinity.pod_anti_affinity.as_ref().map(|pods| {
        let required = &pods.required_during_scheduling_ignored_during_execution;
        ("podAntiAffinity", required, &pods.preferred_during_scheduling_ignored_during_execution)
    });
    for (field, required, preferred) in pods.into_iter().chain(against) {
        walk.within(field, |walk| {
            walk.each("requiredDuringSchedulingIgnoredDuringExecution", required, pod_term);
            walk.each("preferredDuringSchedulingIgnoredDuringExecution", preferred, weighted_pod_term);
        });
    }
}

fn node_term(walk: &mut Walk, term: &NodeSelectorTerm) {
    walk.each("matchExpressions", &term.match_expressions, |walk, one| {
        walk.form("key", &one.key, qualified_name);
        match Operator::parse(&one.operator) {
            None => walk.bad("operator", &one.operator, "want In, NotIn, Exists, DoesNotExist, Gt or Lt"),
            Some(operator) => {
                if let Err(wanted) = operator.check_values(&one.values) {
                    walk.bad("values", one.values.join(","), format!("{} {wanted}", one.operator));
                }
            }
        }
        walk.each("values", &one.values, |walk, value| walk.form("", value, label_value));
    });
    walk.each("matchFields", &term.match_fields, |walk, one| {
        walk.must_be("key", &one.key, &[FIELD_NODE_NAME]);
        walk.must_be("operator", &one.operator, &["In", "NotIn"]);
        match one.values.as_slice() {
            [name] => walk.form("values[0]", name, dns_subdomain),
            values => walk.bad("values", values.join(","), "want exactly one name of a node"),
        }
    });
}

fn weighted_pod_term(walk: &mut Walk, weighted: &WeightedPodAffinityTerm) {
    walk.between("weight", weighted.weight.into(), 1, 100);
    match &weighted.pod_affinity_term {
        Some(term) => walk.within("podAffinityTerm", |walk| pod_term(walk, term)),
        None => walk.missing("podAffinityTerm", "want a term"),
    }
}

fn pod_term(walk: &mut Walk, term: &PodAffinityTerm) {
    topology_key(walk, &term.topology_key);
    label_selector(walk, "labelSelector", term.label_selector.as_ref());
    label_selector(walk, "namespaceSelector", term.namespace_selector.as_ref());
    walk.each("namespaces", &term.namespaces, |walk, name| walk.form("", name, dns_label));
    let selector = term.label_selector.as_ref();
    label_keys(walk, "matchLabelKeys", &term.match_label_keys, selector);
    label_keys(walk, "mismatchLabelKeys", &term.mismatch_label_keys, selector);
    for key in term.mismatch_label_keys.iter().filter(|key| term.match_label_keys.contains(key)) {
        walk.bad("mismatchLabelKeys", key, "is in matchLabelKeys too");
    }
}

fn topology_key(walk: &mut Walk, key: &str) {
    if key.is_empty() {
        walk.missing("topologyKey", "want a node label such as kubernetes.io/hostname");
    } else {
        walk.form("topologyKey", key, qualified_name);
    }
}

fn label_keys(walk: &mut Walk, field: &str, keys: &[String], selector: Option<&LabelSelector>) {
    if !keys.is_empty() && selector.is_none() {
        walk.wrong(field, "want a labelSelector beside it");
    }
    walk.each(field, keys, |walk, key| {
        walk.form("", key, qualified_name);
        let used = selector.is_some_and(|selector| {
            selector.match_labels.contains_key(key) || selector.match_expressions.iter().any(|one| one.key == *key)
        });
        if used {
            walk.bad("", key, "is in the labelSelector too");
        }
    });
}

fn spread(walk: &mut Walk, constraint: &TopologySpreadConstraint) {
    walk.between("maxSkew", constraint.max_skew.into(), 1, i32::MAX.into());
    topology_key(walk, &constraint.topology_key);
    walk.must_be("whenUnsatisfiable", &constraint.when_unsatisfiable, &["DoNotSchedule", "ScheduleAnyway"]);
    if let Some(domains) = constraint.min_domains {
        walk.between("minDomains", domains.into(), 1, i32::MAX.into());
        if constraint.when_unsatisfiable != "DoNotSchedule" {
            walk.bad("minDomains", domains, "want it with whenUnsatisfiable: DoNotSchedule only");
        }
    }
    walk.word("nodeAffinityPolicy", &constraint.node_affinity_policy, &["Honor", "Ignore"]);
    walk.word("nodeTaintsPolicy", &constraint.node_taints_policy, &["Honor", "Ignore"]);
    label_selector(walk, "labelSelector", constraint.label_selector.as_ref());
    label_keys(walk, "matchLabelKeys", &constraint.match_label_keys, constraint.label_selector.as_ref());
}
