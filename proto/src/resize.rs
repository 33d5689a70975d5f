//! Change of CPU and memory in place (KEP-1287): what a pod counts with while one is under way, and who has decided what.
//!
//! `spec` says what is wanted. The API server, which keeps the nodes' ledgers, decides whether the node has room: it writes
//! `allocatedResources` of every container status, and the condition [`PENDING`] as long as the wish is not granted. The node
//! reports `resources`, what is in force, and [`IN_PROGRESS`] as long as that is not what was allocated.

use std::collections::BTreeMap;

use crate::{
    resources::{ResourceError, Resources, container_requests, requests_by},
    v1::{Container, ContainerStatus, Pod, PodCondition, PodStatus, ResourceRequirements},
};

/// Condition of a pod whose wish was not granted (yet).
pub const PENDING: &str = "PodResizePending";
/// Its reason where the node has no room now.
pub const DEFERRED: &str = "Deferred";
/// Its reason where the node could never have the room.
pub const INFEASIBLE: &str = "Infeasible";
/// Condition of a pod whose node is carrying a change out, with the reason `Error` where it cannot now.
pub const IN_PROGRESS: &str = "PodResizeInProgress";

/// The condition that a wish was not granted.
#[must_use]
pub fn pending(pod: &Pod) -> Option<&PodCondition> {
    pod.condition(PENDING).filter(|condition| condition.status == "True")
}

/// Whether the wish waits for room on the node.
#[must_use]
pub fn is_deferred(pod: &Pod) -> bool {
    pending(pod).is_some_and(|condition| condition.reason == DEFERRED)
}

/// Status of the container of that name, of init and app containers.
#[must_use]
pub fn container_status<'a>(status: &'a PodStatus, name: &str) -> Option<&'a ContainerStatus> {
    status.init_container_statuses.iter().chain(&status.container_statuses).find(|one| one.name == name)
}

/// What a pod takes of the node that it is bound to: of each container the most of what was granted and what is in force.
///
/// # Errors
/// When its quantities cannot be summed.
pub fn bound_requests(pod: &Pod) -> Result<Resources, ResourceError> {
    counted(pod, pending(pod).is_none())
}

/// What a scheduler counts a pod with: room that a wish waits for is kept for it, one that can never be granted is forgotten.
///
/// # Errors
/// When its quantities cannot be summed.
pub fn scheduled_requests(pod: &Pod) -> Result<Resources, ResourceError> {
    counted(pod, pending(pod).is_none_or(|condition| condition.reason != INFEASIBLE))
}

fn counted(pod: &Pod, with_spec: bool) -> Result<Resources, ResourceError> {
    let status = pod.status();
    requests_by(pod.spec(), &|container: &Container| {
        let mut most = container_requests(container)?;
        // Where nothing was ever written of what is allocated, nothing has changed since the pod was bound.
        let Some(found) = container_status(status, &container.name).filter(|one| !one.allocated_resources.is_empty())
        else {
            return Ok(most);
        };
        let actual = found.resources.as_ref().map(|all| &all.requests);
        let stated = container.resources.as_ref().map(|all| &all.requests);
        if stated == Some(&found.allocated_resources) && actual.is_none_or(|actual| Some(actual) == stated) {
            return Ok(most);
        }
        if !with_spec {
            (most.cpu_milli, most.memory_bytes) = (0, 0);
        }
        for map in [Some(&found.allocated_resources), actual].into_iter().flatten() {
            most = most.max(&Resources::from_map(map)?);
        }
        Ok(most)
    })
}

/// Whether a resource can change in place.
#[must_use]
pub fn is_resizable(resource: &str) -> bool {
    matches!(resource, crate::resources::CPU | crate::resources::MEMORY)
}

/// Puts what is named in `change` in the place of a container's resources.
pub fn merge(container: &mut Container, change: &ResourceRequirements) {
    let own = container.resources.get_or_insert_default();
    own.limits.extend(change.limits.clone());
    own.requests.extend(change.requests.clone());
}

/// Writes what is allocated into the status, for every container: what the spec of `granted` says. Statuses that are missing are made.
pub fn set_allocated(status: &mut PodStatus, granted: &Pod) {
    let spec = granted.spec();
    for (containers, statuses) in [
        (&spec.init_containers, &mut status.init_container_statuses),
        (&spec.containers, &mut status.container_statuses),
    ] {
        for container in containers {
            let Some(resources) = &container.resources else { continue };
            let index = statuses.iter().position(|one| one.name == container.name).unwrap_or_else(|| {
                statuses.push(ContainerStatus { name: container.name.clone(), ..ContainerStatus::default() });
                statuses.len() - 1
            });
            if let Some(one) = statuses.get_mut(index) {
                one.allocated_resources.clone_from(&resources.requests);
                // What is in force is the node's to say; until it has, it is what it was.
                one.resources.get_or_insert_with(|| resources.clone());
            }
        }
    }
}

/// Takes what the API server alone knows of a resize over into a status that the node reported.
pub fn keep_decision(pod: &Pod, reported: &mut PodStatus) {
    let ours = pending(pod);
    reported.conditions.retain(|condition| condition.r#type != PENDING);
    if let Some(condition) = ours {
        reported.conditions.push(condition.clone());
    }
    let old = pod.status();
    let names = pod.spec().all_containers().map(|container| (&container.name, container.resources.as_ref()));
    let resources: BTreeMap<&String, Option<&ResourceRequirements>> = names.collect();
    let statuses = reported.init_container_statuses.iter_mut().chain(&mut reported.container_statuses);
    for one in statuses {
        let before = container_status(old, &one.name);
        match before.filter(|before| ours.is_some() && !before.allocated_resources.is_empty()) {
            Some(before) => one.allocated_resources.clone_from(&before.allocated_resources),
            None => {
                let stated = resources.get(&one.name).copied().flatten();
                one.allocated_resources = stated.map(|stated| stated.requests.clone()).unwrap_or_default();
            }
        }
    }
    if ours.is_some() {
        // A report that leaves a container out does not take back what was allocated to it.
        for (kept, list) in [
            (&old.init_container_statuses, &mut reported.init_container_statuses),
            (&old.container_statuses, &mut reported.container_statuses),
        ] {
            let missing = kept.iter().filter(|one| !one.allocated_resources.is_empty());
            let missing: Vec<ContainerStatus> =
                missing.filter(|one| list.iter().all(|other| other.name != one.name)).cloned().collect();
            list.extend(missing);
        }
    }
}

/// The resources that are granted to a container of a pod whose wish is pending, as far as its status tells: in force are its
/// limits, allocated its requests.
#[must_use]
pub fn granted(pod: &Pod, container: &str) -> Option<ResourceRequirements> {
    let found = container_status(pod.status(), container)?;
    let mut granted = found.resources.clone()?;
    granted.requests.extend(found.allocated_resources.clone());
    Some(granted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::PodSpec;

    fn map(cpu: &str) -> BTreeMap<String, String> {
        [("cpu".to_owned(), cpu.to_owned())].into_iter().filter(|(_, cpu)| !cpu.is_empty()).collect()
    }

    fn pod(spec: &str, allocated: &str, actual: &str, pending: &str) -> Pod {
        let wants = ResourceRequirements { requests: map(spec), ..ResourceRequirements::default() };
        let container = Container { name: "a".into(), resources: Some(wants), ..Container::default() };
        let mut status = PodStatus::default();
        if !allocated.is_empty() || !actual.is_empty() {
            let force = ResourceRequirements { requests: map(actual), ..ResourceRequirements::default() };
            status.container_statuses.push(ContainerStatus {
                name: "a".into(),
                allocated_resources: map(allocated),
                resources: Some(force).filter(|_| !actual.is_empty()),
                ..ContainerStatus::default()
            });
        }
        if !pending.is_empty() {
            status.set_condition(PENDING, "True", pending, "", crate::v1::Time::default());
        }
        Pod {
            spec: Some(PodSpec { containers: vec![container], ..PodSpec::default() }),
            status: Some(status),
            ..Pod::default()
        }
    }

    #[test]
    fn a_pod_counts_with_the_most_of_what_may_be_in_force() {
        // spec, allocated, in force, pending → bound, scheduled
        for (spec, allocated, actual, pending, bound, scheduled) in [
            ("1", "", "", "", 1000, 1000),
            ("1", "1", "1", "", 1000, 1000),
            // Granted, and not carried out yet: up, then down.
            ("2", "2", "1", "", 2000, 2000),
            ("1", "1", "2", "", 2000, 2000),
            // Not granted.
            ("4", "1", "1", DEFERRED, 1000, 4000),
            ("4", "1", "1", INFEASIBLE, 1000, 1000),
            ("4", "1", "2", INFEASIBLE, 2000, 2000),
            // Wished back to what is allocated, before the API server has said so.
            ("1", "1", "1", DEFERRED, 1000, 1000),
            // A status without what is allocated says nothing.
            ("2", "", "1", DEFERRED, 2000, 2000),
        ] {
            let pod = pod(spec, allocated, actual, pending);
            let sums = (bound_requests(&pod).unwrap().cpu_milli, scheduled_requests(&pod).unwrap().cpu_milli);
            assert_eq!(sums, (bound, scheduled), "{spec} {allocated} {actual} {pending}");
        }
    }

    #[test]
    fn a_report_does_not_undo_the_decision() {
        let old = pod("4", "1", "1", DEFERRED);
        let mut reported = pod("4", "4", "1", "").status.unwrap();
        keep_decision(&old, &mut reported);
        assert_eq!(reported.container_statuses[0].allocated_resources, map("1"));
        assert_eq!(reported.conditions.len(), 1);
        let mut reported = PodStatus::default();
        keep_decision(&old, &mut reported);
        assert_eq!(reported.container_statuses[0].allocated_resources, map("1"));
        // Granted meanwhile: a report that still has the condition does not bring it back.
        let granted = pod("4", "4", "1", "");
        let mut reported = old.status.clone().unwrap();
        keep_decision(&granted, &mut reported);
        assert_eq!(reported.conditions, []);
        assert_eq!(reported.container_statuses[0].allocated_resources, map("4"));
    }

    #[test]
    fn what_is_granted_is_told_by_the_status() {
        let pod = pod("4", "1", "2", DEFERRED);
        assert_eq!(granted(&pod, "a").unwrap().requests, map("1"));
        assert_eq!(granted(&pod, "b"), None);
    }
}
