//! Whether an object may become another one: what is fixed stays fixed.

use serde_json::Value;

use super::{Problem, checked, walk::Walk};
use crate::v1::{ConfigMap, Object, Pod, PodSpec, PriorityClass, Secret, object};

/// Most places that are named where a fixed part differs; a person sees from them what happened.
const MAX_DIFFERENCES: usize = 10;

/// What is wrong with `new` in place of `old`: the rules of new objects, and what may not change.
///
/// The status is not looked at. Call [`carry_over`] first when `new` comes from a manifest.
pub fn update(old: &Object, new: &Object) -> Vec<Problem> {
    if old.kind_of() != new.kind_of() {
        let kind = |object: &Object| object.kind_of().map_or("nothing", crate::Kind::name);
        return vec![Problem::found("kind", kind(new), format!("want {}, the kind does not change", kind(old)))];
    }
    let mut walk = checked(new);
    meta(&mut walk, old, new);
    match (&old.kind, &new.kind) {
        (Some(object::Kind::Pod(old)), Some(object::Kind::Pod(new))) => pod(&mut walk, old, new),
        (Some(object::Kind::ConfigMap(old)), Some(object::Kind::ConfigMap(new))) => config_map(&mut walk, old, new),
        (Some(object::Kind::Secret(old)), Some(object::Kind::Secret(new))) => secret(&mut walk, old, new),
        (Some(object::Kind::PriorityClass(old)), Some(object::Kind::PriorityClass(new))) => class(&mut walk, old, new),
        (Some(object::Kind::Node(old)), Some(object::Kind::Node(new))) => {
            let (old, new) = (&old.spec().pod_cidr, &new.spec().pod_cidr);
            if !old.is_empty() && old != new {
                walk.bad("spec.podCIDR", new, format!("want {old}, a node's network does not change"));
            }
        }
        _ => {}
    }
    walk.problems
}

/// What is wrong with `new` in place of `old` where debug containers are added to a pod: only that may change, and what is there
/// stays as it is.
pub fn update_ephemeral(old: &Object, new: &Object) -> Vec<Problem> {
    let mut walk = checked(new);
    meta(&mut walk, old, new);
    let (Some(old), Some(new)) = (old.as_pod(), new.as_pod()) else {
        walk.wrong("kind", "want Pod, others have no ephemeral containers");
        return walk.problems;
    };
    let (old, new) = (old.spec(), new.spec());
    walk.within("spec", |walk| {
        for before in &old.ephemeral_containers {
            match new.ephemeral_container(&before.name) {
                None => {
                    walk.bad("ephemeralContainers", &before.name, "existing ephemeral containers may not be removed")
                }
                Some(now) if now != before => {
                    walk.bad("ephemeralContainers", &before.name, "existing ephemeral containers may not be changed");
                }
                Some(_) => {}
            }
        }
        let rest = PodSpec { ephemeral_containers: old.ephemeral_containers.clone(), ..new.clone() };
        if rest != *old {
            differences(walk, old, &rest);
        }
    });
    walk.problems
}

/// Takes over into `new` what the system set in `old` and a manifest leaves out: uid, times, generation, the binding, the priority and
/// debug containers.
pub fn carry_over(old: &Object, new: &mut Object) {
    let before = old.meta();
    if let Some(meta) = new.meta_mut() {
        if meta.uid.is_empty() {
            meta.uid.clone_from(&before.uid);
        }
        meta.creation_timestamp = meta.creation_timestamp.or(before.creation_timestamp);
        meta.deletion_timestamp = before.deletion_timestamp;
        meta.deletion_grace_period_seconds = before.deletion_grace_period_seconds;
        meta.generation = before.generation;
    }
    if let (Some(old), Some(object::Kind::Pod(new))) = (old.as_pod(), &mut new.kind) {
        let (old, new) = (old.spec(), new.spec_mut());
        if new.node_name.is_empty() {
            new.node_name.clone_from(&old.node_name);
        }
        if new.ephemeral_containers.is_empty() {
            new.ephemeral_containers.clone_from(&old.ephemeral_containers);
        }
        if new.priority_class_name.is_empty() || new.priority_class_name == old.priority_class_name {
            new.priority = new.priority.or(old.priority);
            if new.priority_class_name.is_empty() {
                new.priority_class_name.clone_from(&old.priority_class_name);
            }
            if new.preemption_policy.is_empty() {
                new.preemption_policy.clone_from(&old.preemption_policy);
            }
        }
    }
}

fn meta(walk: &mut Walk, old: &Object, new: &Object) {
    let (old, new) = (old.meta(), new.meta());
    let fixed =
        [("name", &old.name, &new.name), ("namespace", &old.namespace, &new.namespace), ("uid", &old.uid, &new.uid)];
    for (field, old, new) in fixed {
        if old != new && !(field == "uid" && new.is_empty()) {
            walk.bad(&format!("metadata.{field}"), new, format!("want {old}, it does not change"));
        }
    }
    if new.creation_timestamp.is_some() && new.creation_timestamp != old.creation_timestamp {
        walk.wrong("metadata.creationTimestamp", "does not change");
    }
}

fn pod(walk: &mut Walk, old: &Pod, new: &Pod) {
    let (old, new) = (old.spec(), new.spec());
    walk.within("spec", |walk| {
        deadline(walk, old, new);
        tolerations(walk, old, new);
        gates(walk, old, new);
        // What may change is made equal, and then all must be equal.
        let mut rest = new.clone();
        for (old, new) in [(&old.init_containers, &mut rest.init_containers), (&old.containers, &mut rest.containers)] {
            for (old, new) in old.iter().zip(new) {
                new.image.clone_from(&old.image);
            }
        }
        rest.active_deadline_seconds = old.active_deadline_seconds;
        rest.tolerations.clone_from(&old.tolerations);
        rest.scheduling_gates.clone_from(&old.scheduling_gates);
        if old.termination_grace_period_seconds.is_some_and(|seconds| seconds < 0)
            && new.termination_grace_period_seconds == Some(1)
        {
            rest.termination_grace_period_seconds = old.termination_grace_period_seconds;
        }
        if !old.scheduling_gates.is_empty() {
            // A gated pod may be narrowed down (KEP-3838).
            if old.node_selector.iter().all(|(key, value)| new.node_selector.get(key) == Some(value)) {
                rest.node_selector.clone_from(&old.node_selector);
            }
            if narrows(old, new) {
                rest.affinity.clone_from(&old.affinity);
            }
        }
        if rest != *old {
            differences(walk, old, &rest);
        }
    });
}

/// Whether the node affinity of a gated pod only gets requirements more: from none, or expressions added to each term.
fn narrows(old: &PodSpec, new: &PodSpec) -> bool {
    use crate::scheduling::required_node_affinity;
    let without = |spec: &PodSpec| {
        let mut affinity = spec.affinity.clone().unwrap_or_default();
        affinity.node_affinity = None;
        affinity
    };
    if without(old) != without(new) {
        return false;
    }
    match (required_node_affinity(old), required_node_affinity(new)) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(old), Some(new)) => {
            old.node_selector_terms.len() == new.node_selector_terms.len()
                && old.node_selector_terms.iter().zip(&new.node_selector_terms).all(|(old, new)| {
                    new.match_expressions.starts_with(&old.match_expressions)
                        && new.match_fields.starts_with(&old.match_fields)
                })
        }
    }
}

fn deadline(walk: &mut Walk, old: &PodSpec, new: &PodSpec) {
    let field = "activeDeadlineSeconds";
    match (old.active_deadline_seconds, new.active_deadline_seconds) {
        (Some(old), Some(new)) if new > old => {
            walk.bad(field, new, format!("want at most {old}, it may only get shorter"))
        }
        (Some(old), None) => walk.missing(field, &format!("want at most {old}, it cannot be taken away")),
        _ => {}
    }
}

fn tolerations(walk: &mut Walk, old: &PodSpec, new: &PodSpec) {
    let lost = old.tolerations.iter().filter(|one| !new.tolerations.contains(one)).count();
    if lost > 0 {
        walk.wrong(
            "tolerations",
            format!("{lost} of {} are gone or changed, they may only be added to", old.tolerations.len()),
        );
    }
}

fn gates(walk: &mut Walk, old: &PodSpec, new: &PodSpec) {
    for gate in new.scheduling_gates.iter().filter(|gate| !old.scheduling_gates.contains(gate)) {
        walk.bad("schedulingGates", &gate.name, "may only be removed");
    }
}

/// Names the places where the fixed parts differ.
fn differences(walk: &mut Walk, old: &PodSpec, new: &PodSpec) {
    let json = |spec: &PodSpec| serde_json::to_value(spec).unwrap_or(Value::Null);
    let mut places = Vec::new();
    collect(&json(old), &json(new), "", &mut places);
    if places.is_empty() {
        // They differ in a way that JSON does not show.
        places.push(String::new());
    }
    for place in places {
        let changes = "does not change in a pod that exists; what may: images, activeDeadlineSeconds, tolerations (added), \
             schedulingGates (removed), and cpu and memory of containers by `minictl resize`";
        walk.wrong(&place, changes);
    }
}

fn collect(old: &Value, new: &Value, path: &str, places: &mut Vec<String>) {
    if old == new || places.len() >= MAX_DIFFERENCES {
        return;
    }
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            let more = new.keys().filter(|key| !old.contains_key(*key));
            for key in old.keys().chain(more) {
                let place = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                collect(old.get(key).unwrap_or(&Value::Null), new.get(key).unwrap_or(&Value::Null), &place, places);
            }
        }
        (Value::Array(old), Value::Array(new)) if old.len() == new.len() => {
            for (index, (old, new)) in old.iter().zip(new).enumerate() {
                collect(old, new, &format!("{path}[{index}]"), places);
            }
        }
        _ => places.push(path.to_owned()),
    }
}

fn config_map(walk: &mut Walk, old: &ConfigMap, new: &ConfigMap) {
    let same = old.data == new.data && old.binary_data == new.binary_data;
    immutable(walk, old.immutable, new.immutable, same);
}

fn secret(walk: &mut Walk, old: &Secret, new: &Secret) {
    if old.r#type != new.r#type {
        walk.bad("type", &new.r#type, format!("want {}, the type does not change", old.r#type));
    }
    immutable(walk, old.immutable, new.immutable, old.data == new.data && new.string_data.is_empty());
}

fn immutable(walk: &mut Walk, old: Option<bool>, new: Option<bool>, same: bool) {
    if old == Some(true) {
        if new != Some(true) {
            walk.wrong("immutable", "cannot be taken back, delete the object and create it anew");
        }
        if !same {
            walk.wrong("data", "does not change, the object is immutable");
        }
    }
}

fn class(walk: &mut Walk, old: &PriorityClass, new: &PriorityClass) {
    if old.value != new.value {
        walk.bad("value", new.value, format!("want {}, it does not change", old.value));
    }
    if old.preemption_policy != new.preemption_policy {
        walk.bad(
            "preemptionPolicy",
            &new.preemption_policy,
            format!("want {}, it does not change", old.preemption_policy),
        );
    }
}
