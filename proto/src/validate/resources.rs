//! Quantities, requests and limits.

use std::collections::BTreeMap;

use super::walk::Walk;
use crate::{
    names::qualified_name,
    quantity::Quantity,
    resources::{CPU, EPHEMERAL_STORAGE, MEMORY, Resources, container_limits, container_requests, pod_requests},
    v1::{Container, PodSpec, ResourceRequirements},
};

fn is_huge(name: &str) -> bool {
    name.starts_with("hugepages-")
}

/// Whether the kernel can give more of it than there is.
fn overcommits(name: &str) -> bool {
    matches!(name, CPU | MEMORY | EPHEMERAL_STORAGE)
}

/// Quantities by resource name.
pub(super) fn quantities(walk: &mut Walk, field: &str, map: &BTreeMap<String, String>) {
    for (name, text) in map {
        let place = format!("{field}.{name}");
        if !overcommits(name) && !is_huge(name) && (qualified_name(name).is_err() || !name.contains('/')) {
            walk.bad(
                field,
                name,
                "want cpu, memory, ephemeral-storage, hugepages-SIZE or a name such as example.com/gpu",
            );
        }
        let amount = match text.parse::<Quantity>() {
            Ok(amount) => amount,
            Err(error) => {
                walk.wrong(&place, error.to_string());
                continue;
            }
        };
        if amount.sign() < 0 {
            walk.bad(&place, text, "want 0 or more");
        } else if name == CPU && !amount.is_whole_in(1000) {
            walk.bad(&place, text, "want no finer than 1m");
        } else if !overcommits(name) && !amount.is_whole_in(1) {
            walk.bad(&place, text, "want a whole number");
        }
    }
}

fn requirements(walk: &mut Walk, resources: &ResourceRequirements) {
    quantities(walk, "limits", &resources.limits);
    // A request that defaulting took from its limit is judged there.
    let same = |(name, text): &(&String, &String)| resources.limits.get(*name) == Some(*text);
    let own = resources.requests.iter().filter(|pair| !same(pair)).map(|(name, text)| (name.clone(), text.clone()));
    quantities(walk, "requests", &own.collect());
    let parsed = |map: &BTreeMap<String, String>, name: &str| map.get(name)?.parse::<Quantity>().ok();
    for (name, text) in &resources.requests {
        let (request, limit) = (parsed(&resources.requests, name), parsed(&resources.limits, name));
        let place = format!("requests.{name}");
        match (request, limit) {
            (Some(request), Some(limit)) if request > limit => {
                walk.bad(&place, text, format!("want at most the limit of {limit}"));
            }
            (Some(request), Some(limit)) if request != limit && !overcommits(name) => {
                walk.bad(&place, text, format!("want the limit of {limit}, there is no more of {name} than there is"));
            }
            (Some(_), None) if !overcommits(name) => {
                walk.missing(&format!("limits.{name}"), "a resource of this kind wants a limit equal to its request");
            }
            _ => {}
        }
    }
}

/// Resources of a container.
pub(super) fn container(walk: &mut Walk, container: &Container) {
    if let Some(resources) = &container.resources {
        walk.within("resources", |walk| {
            requirements(walk, resources);
            let all = || resources.requests.keys().chain(resources.limits.keys());
            if all().any(|name| is_huge(name)) && !all().any(|name| name == CPU || name == MEMORY) {
                walk.wrong("", "huge pages want cpu or memory beside them");
            }
        });
    }
    walk.each("resizePolicy", &container.resize_policy, |walk, policy| {
        walk.must_be("resourceName", &policy.resource_name, &[CPU, MEMORY]);
        walk.must_be("restartPolicy", &policy.restart_policy, &["NotRequired", "RestartContainer"]);
    });
    walk.unique(
        "resizePolicy",
        "resourceName",
        container.resize_policy.iter().map(|policy| policy.resource_name.as_str()),
    );
}

/// Resources of the pod as a whole, its overhead, and whether all sums can be told.
pub(super) fn pod(walk: &mut Walk, spec: &PodSpec) {
    quantities(walk, "overhead", &spec.overhead);
    if let Err(error @ crate::resources::ResourceError::Overflow { .. }) = pod_requests(spec) {
        walk.wrong("", error.to_string());
    }
    let Some(resources) = &spec.resources else { return };
    walk.within("resources", |walk| {
        requirements(walk, resources);
        for (field, map) in [("limits", &resources.limits), ("requests", &resources.requests)] {
            for name in map.keys().filter(|name| *name != CPU && *name != MEMORY && !is_huge(name)) {
                walk.bad(field, name, "want cpu, memory or hugepages-SIZE for the pod as a whole");
            }
        }
        let containers = PodSpec { resources: None, overhead: BTreeMap::new(), ..spec.clone() };
        let (Ok(sum), Ok(own)) = (pod_requests(&containers), Resources::from_map(&resources.requests)) else { return };
        for (name, text) in &resources.requests {
            if sum.get(name) > own.get(name) {
                let amount = crate::resources::amount_text(name, sum.get(name));
                walk.bad(&format!("requests.{name}"), text, format!("want at least the {amount} of its containers"));
            }
        }
        let Ok(limits) = Resources::from_map(&resources.limits) else { return };
        for container in spec.all_containers() {
            let Ok(limit) =
                container_limits(container).and_then(|limit| Ok(limit.max(&container_requests(container)?)))
            else {
                continue;
            };
            for (name, text) in &resources.limits {
                if limit.get(name) > limits.get(name) {
                    walk.bad(
                        &format!("limits.{name}"),
                        text,
                        format!("want at least that of container {:?}", container.name),
                    );
                }
            }
        }
    });
}
