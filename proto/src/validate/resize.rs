//! Whether the CPU and memory of a pod may change in place (KEP-1287).

use std::collections::BTreeMap;

use super::{Problem, checked, walk::Walk};
use crate::{
    resize::is_resizable,
    resources::qos_class,
    v1::{Container, Object, Pod, ResizeRequest, ResourceRequirements},
};

/// What is wrong with `new`, which is `old` with what `request` names.
pub fn resize(old: &Pod, new: &Pod, request: &ResizeRequest) -> Vec<Problem> {
    let mut asked = Walk::default();
    named(&mut asked, old, request);
    let mut problems = asked.problems;
    problems.extend(checked(&Object::from(new.clone())).problems);
    let mut walk = Walk::default();
    state(&mut walk, old);
    let (was, is) = (old.spec(), new.spec());
    walk.within("spec", |walk| {
        for (list, init, old, new) in [
            ("initContainers", true, &was.init_containers, &is.init_containers),
            ("containers", false, &was.containers, &is.containers),
        ] {
            for (index, (old, new)) in old.iter().zip(new).enumerate().filter(|(_, (old, new))| old != new) {
                walk.within(&format!("{list}[{index}].resources"), |walk| container(walk, old, new, init));
            }
        }
        if let (Ok(before), Ok(after)) = (qos_class(was), qos_class(is))
            && before != after
        {
            let (before, after) = (before.as_str(), after.as_str());
            walk.wrong(
                "",
                format!("the pod would become {after}, want {before}: its quality of service does not change"),
            );
        }
    });
    problems.extend(walk.problems);
    problems
}

fn state(walk: &mut Walk, pod: &Pod) {
    if pod.is_terminal() {
        walk.bad("status.phase", &pod.status().phase, "a pod that has ended is not resized");
    }
    if pod.is_terminating() {
        walk.wrong("metadata.deletionTimestamp", "is set: a pod that ends is not resized");
    }
}

/// The request itself: what it names is there, and is something that can change.
fn named(walk: &mut Walk, pod: &Pod, request: &ResizeRequest) {
    if request.containers.is_empty() {
        walk.missing("containers", "want at least one container with the resources that it shall have");
    }
    let known = || pod.spec().all_containers().map(|one| one.name.as_str()).collect::<Vec<_>>().join(", ");
    walk.unique("containers", "name", request.containers.iter().map(|one| one.name.as_str()));
    walk.each("containers", &request.containers, |walk, one| {
        if pod.spec().container(&one.name).is_none() {
            walk.bad("name", &one.name, format!("want a container of the pod: {}", known()));
        }
        let empty = ResourceRequirements::default();
        let resources = one.resources.as_ref().unwrap_or(&empty);
        if resources.limits.is_empty() && resources.requests.is_empty() {
            walk.missing("resources", "want requests or limits of cpu or memory");
        }
        for (field, map) in [("limits", &resources.limits), ("requests", &resources.requests)] {
            for name in map.keys().filter(|name| !is_resizable(name)) {
                walk.bad(&format!("resources.{field}"), name, "want cpu or memory, nothing else changes in place");
            }
        }
    });
}

fn container(walk: &mut Walk, old: &Container, new: &Container, init: bool) {
    if init && !old.is_sidecar() {
        walk.wrong("", "an init container runs to its end with what it began with, unless it is a sidecar");
    }
    let empty = BTreeMap::new();
    let side = |container: &Container, limits: bool| -> BTreeMap<String, String> {
        let all = container.resources.as_ref();
        all.map_or(&empty, |all| if limits { &all.limits } else { &all.requests }).clone()
    };
    for (field, limits) in [("limits", true), ("requests", false)] {
        let (old, new) = (side(old, limits), side(new, limits));
        for name in old.keys().filter(|name| !new.contains_key(*name)) {
            walk.missing(&format!("{field}.{name}"), "what was set once can change and not go");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{manifest, resize::merge};

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: p}
spec:
  initContainers:
  - {name: i, image: x, resources: {requests: {cpu: 1}}}
  - {name: s, image: x, restartPolicy: Always, resources: {requests: {cpu: 1}}}
  containers:
  - {name: a, image: x, resources: {requests: {cpu: 1, memory: 1Gi}, limits: {memory: 2Gi}}}
  - {name: b, image: x}
";

    fn outcome(name: &str, requests: &[(&str, &str)], limits: &[(&str, &str)], phase: &str) -> String {
        let mut object = manifest::parse(POD).expect("good").remove(0);
        crate::defaults::apply(&mut object);
        let mut old = object.as_pod().expect("a pod").clone();
        old.status_mut().phase = phase.to_owned();
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let resources = ResourceRequirements { requests: map(requests), limits: map(limits) };
        let one = crate::v1::resize_request::Container { name: name.into(), resources: Some(resources.clone()) };
        let request = ResizeRequest { containers: vec![one], ..ResizeRequest::default() };
        let mut new = old.clone();
        let spec = new.spec_mut();
        let found = spec.init_containers.iter_mut().chain(&mut spec.containers).find(|one| one.name == name);
        found.into_iter().for_each(|container| merge(container, &resources));
        resize(&old, &new, &request).iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }

    #[test]
    fn what_may_change_and_what_not() {
        type Pairs = &'static [(&'static str, &'static str)];
        let table: [(&str, Pairs, Pairs, &str, &str); 11] = [
            ("a", &[("cpu", "2")], &[], "Running", ""),
            ("a", &[("memory", "2Gi")], &[("memory", "4Gi")], "Running", ""),
            ("s", &[("cpu", "500m")], &[], "Running", ""),
            // A container that asked for nothing in a pod that is Burstable all the same.
            ("b", &[("cpu", "500m")], &[], "Pending", ""),
            (
                "c",
                &[("cpu", "2")],
                &[],
                "Running",
                "containers[0].name: found \"c\": want a container of the pod: i, s, a, b",
            ),
            ("i", &[("cpu", "2")], &[], "Running", "runs to its end"),
            ("a", &[("ephemeral-storage", "2")], &[], "Running", "want cpu or memory"),
            ("a", &[("memory", "3Gi")], &[], "Running", "want at most the limit of 2Gi"),
            ("a", &[("cpu", "many")], &[], "Running", "resources.requests.cpu"),
            ("a", &[], &[], "Running", "want requests or limits"),
            ("a", &[("cpu", "2")], &[], "Succeeded", "status.phase"),
        ];
        for (name, requests, limits, phase, want) in table {
            let got = outcome(name, requests, limits, phase);
            assert!(if want.is_empty() { got.is_empty() } else { got.contains(want) }, "{name} {requests:?}: {got}");
        }
    }

    #[test]
    fn the_quality_of_service_stays() {
        let mut object = manifest::parse(
            "{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {containers: [{name: a, image: x, \
             resources: {limits: {cpu: 1, memory: 1Gi}}}]}}",
        )
        .expect("good")
        .remove(0);
        crate::defaults::apply(&mut object);
        let old = object.as_pod().expect("a pod").clone();
        let mut new = old.clone();
        let resources = ResourceRequirements { requests: [("cpu".into(), "500m".into())].into(), ..Default::default() };
        merge(&mut new.spec_mut().containers[0], &resources);
        let one = crate::v1::resize_request::Container { name: "a".into(), resources: Some(resources) };
        let request = ResizeRequest { containers: vec![one], ..ResizeRequest::default() };
        let problems: Vec<String> = resize(&old, &new, &request).iter().map(ToString::to_string).collect();
        assert_eq!(
            problems,
            ["spec: the pod would become Burstable, want Guaranteed: its quality of service does not change"]
        );
    }
}
