//! The kinds beside pods.

use super::{meta::label_selector, resources::quantities, scheduling::taint, walk::Walk};
use crate::{
    disruption::{ALWAYS_ALLOW, Amount, IF_HEALTHY_BUDGET},
    names::config_key,
    quantity::Quantity,
    resources::PODS,
    v1::{ConfigMap, Event, Node, PodDisruptionBudget, PriorityClass, Secret},
};

/// Most bytes of values in a ConfigMap or Secret: it is one value in the store.
const MAX_DATA_BYTES: usize = 1 << 20;
/// Largest value of a user's priority class; what is above is for the system.
const MAX_USER_PRIORITY: i32 = 1_000_000_000;
/// Most characters of an event's message.
const MAX_MESSAGE_CHARS: usize = 1024;

fn data<'a>(walk: &mut Walk, entries: impl Iterator<Item = (&'a str, &'a String, usize)>) {
    let mut bytes = 0;
    for (field, key, length) in entries {
        bytes += length;
        if let Err(wanted) = config_key(key) {
            walk.bad(field, key, wanted);
        }
    }
    if bytes > MAX_DATA_BYTES {
        walk.wrong("data", format!("has {bytes} bytes, want at most {MAX_DATA_BYTES}"));
    }
}

pub(super) fn config_map(walk: &mut Walk, map: &ConfigMap) {
    let text = map.data.iter().map(|(key, value)| ("data", key, value.len()));
    let binary = map.binary_data.iter().map(|(key, value)| ("binaryData", key, value.len()));
    data(walk, text.chain(binary));
    for key in map.binary_data.keys().filter(|key| map.data.contains_key(*key)) {
        walk.bad("binaryData", key, "is in data too");
    }
}

pub(super) fn secret(walk: &mut Walk, secret: &Secret) {
    let stored = secret.data.iter().map(|(key, value)| ("data", key, value.len()));
    data(walk, stored.chain(secret.string_data.iter().map(|(key, value)| ("stringData", key, value.len()))));
}

pub(super) fn node(walk: &mut Walk, node: &Node) {
    if let Some(spec) = &node.spec {
        walk.within("spec", |walk| {
            walk.each("taints", &spec.taints, taint);
            let pairs: Vec<String> = spec.taints.iter().map(|one| format!("{}:{}", one.key, one.effect)).collect();
            walk.unique("taints", "", pairs.iter().map(String::as_str));
            for (field, text) in [
                ("podCIDR", Some(&spec.pod_cidr)),
                ("podCIDRs[0]", spec.pod_cidrs.first()),
                ("podCIDRs[1]", spec.pod_cidrs.get(1)),
            ] {
                if let Some(text) = text.filter(|text| !text.is_empty())
                    && !is_cidr(text)
                {
                    walk.bad(field, text, "want a network such as 10.1.2.0/24");
                }
            }
        });
    }
    if let Some(status) = &node.status {
        walk.within("status", |walk| {
            for (field, map) in [("capacity", &status.capacity), ("allocatable", &status.allocatable)] {
                let others =
                    map.iter().filter(|(name, _)| *name != PODS).map(|(k, v)| (k.clone(), v.clone())).collect();
                quantities(walk, field, &others);
                if let Some(text) = map.get(PODS)
                    && text.parse::<Quantity>().map_or(true, |pods| pods.sign() < 0 || !pods.is_whole_in(1))
                {
                    walk.bad(&format!("{field}.pods"), text, "want a whole number, 0 or more");
                }
            }
        });
    }
}

fn is_cidr(text: &str) -> bool {
    let Some((address, length)) = text.split_once('/') else { return false };
    let Ok(address) = address.parse::<std::net::IpAddr>() else { return false };
    length.parse::<u8>().is_ok_and(|length| length <= if address.is_ipv4() { 32 } else { 128 })
}

pub(super) fn priority_class(walk: &mut Walk, class: &PriorityClass) {
    walk.word("preemptionPolicy", &class.preemption_policy, &["PreemptLowerPriority", "Never"]);
    let name = class.metadata.as_ref().map_or("", |meta| meta.name.as_str());
    if class.value > MAX_USER_PRIORITY && !name.starts_with("system-") {
        walk.bad("value", class.value, format!("want at most {MAX_USER_PRIORITY}, more is for the system"));
    }
}

pub(super) fn budget(walk: &mut Walk, budget: &PodDisruptionBudget) {
    walk.within("spec", |walk| {
        let spec = budget.spec();
        for (field, amount) in [("minAvailable", &spec.min_available), ("maxUnavailable", &spec.max_unavailable)] {
            if let Some(amount) = amount
                && let Err(wanted) = Amount::read(amount)
            {
                walk.bad(field, amount, wanted);
            }
        }
        if let (Some(_), Some(most)) = (&spec.min_available, &spec.max_unavailable) {
            walk.bad("maxUnavailable", most, "want it or minAvailable, not both");
        }
        label_selector(walk, "selector", spec.selector.as_ref());
        let policy = &spec.unhealthy_pod_eviction_policy;
        walk.word("unhealthyPodEvictionPolicy", policy, &[IF_HEALTHY_BUDGET, ALWAYS_ALLOW]);
    });
}

pub(super) fn event(walk: &mut Walk, event: &Event) {
    if event.involved_object.is_none() {
        walk.missing("involvedObject", "want the object that the event is about");
    }
    walk.word("type", &event.r#type, &["Normal", "Warning"]);
    let length = event.message.chars().count();
    if length > MAX_MESSAGE_CHARS {
        walk.wrong("message", format!("has {length} characters, want at most {MAX_MESSAGE_CHARS}"));
    }
}
