//! From the API's pod to what the planner wants.

use std::borrow::Cow;
use std::sync::Arc;

use minipod_proto::resize;
use minipod_proto::v1::{Container, ContainerRestartRule, Lifecycle, Pod, PodSpec};

use crate::container::resources::Resources;
use crate::container::spec::pod_level;
use crate::plan::model::{ContainerWant, Gates, Kind, PodWant, ResizePolicy, RestartPolicy, RestartRule};

/// Kubernetes' default for terminationGracePeriodSeconds.
pub const DEFAULT_GRACE_S: i64 = 30;

/// Identity of a pod instance.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Uid(pub String);

impl Uid {
    /// The uid of a pod, if it is fit to be a directory's name (the API server makes UUIDs; anything else is refused here
    /// because it becomes part of paths).
    #[must_use]
    pub fn of(pod: &Pod) -> Option<Self> {
        Self::parse(&pod.metadata.as_ref()?.uid)
    }

    /// Checks a text from outside.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let fit = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        (!text.is_empty() && text.len() <= 63 && text.bytes().all(fit)).then(|| Self(text.to_owned()))
    }
}

impl std::fmt::Display for Uid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The pod's namespace and name.
#[must_use]
pub fn key_of(pod: &Pod) -> (String, String) {
    pod.metadata.as_ref().map_or_else(Default::default, |meta| (meta.namespace.clone(), meta.name.clone()))
}

/// A container of the pod's init list or of its apps.
#[must_use]
pub fn find_container<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    let spec = pod.spec.as_ref()?;
    spec.init_containers.iter().chain(&spec.containers).find(|container| container.name == name)
}

/// Any container of the pod, debug containers too.
#[must_use]
pub fn any_container<'a>(pod: &'a Pod, name: &str) -> Option<Cow<'a, Container>> {
    let debug = || Some(Cow::Owned(pod.spec.as_ref()?.ephemeral_container(name)?.as_container()));
    find_container(pod, name).map(Cow::Borrowed).or_else(debug)
}

/// The planner's view of the wanted pod; deletion, deadline and what the node refuses are the worker's to fill in, because they are points in
/// this node's time.
#[must_use]
pub fn pod_want(pod: &Pod) -> PodWant {
    let empty = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    let restart = policy(&spec.restart_policy).unwrap_or(RestartPolicy::Always);
    let init = spec.init_containers.iter().map(|container| init_want(container, restart));
    let apps = spec.containers.iter().map(|container| ContainerWant {
        name: container.name.clone(),
        kind: Kind::App,
        image: container.image.clone(),
        restart: policy(&container.restart_policy).unwrap_or(restart),
        rules: rules(container),
        gates: gates(container),
        resources: Resources::of(container.resources.as_ref()),
        resize: resize_policy(container),
    });
    let debug = spec.ephemeral_containers.iter().map(|container| ContainerWant {
        name: container.name.clone(),
        kind: Kind::Debug,
        image: container.image.clone(),
        restart: RestartPolicy::Never,
        rules: Vec::new(),
        gates: Gates::default(),
        resources: Resources::default(),
        resize: ResizePolicy::default(),
    });
    let (namespace, name) = key_of(pod);
    PodWant {
        display_name: format!("{namespace}/{name}"),
        containers: init.chain(apps).chain(debug).collect(),
        restart,
        grace_ms: grace_ms(spec.termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE_S)),
        deletion: None,
        deadline_ms: None,
        evicted: None,
        refused: None,
        host_network: spec.host_network,
        resources: pod_level(spec),
    }
}

/// The pod with the resources that are granted: where it wishes for others and its node has no room for them, those that it had
/// before, as `former` has them, or, where nothing is kept, its status.
#[must_use]
pub fn granted(pod: Arc<Pod>, former: Option<&Pod>) -> Arc<Pod> {
    if resize::pending(&pod).is_none() {
        return pod;
    }
    let mut granted = Pod::clone(&pod);
    let spec = granted.spec_mut();
    for container in spec.init_containers.iter_mut().chain(&mut spec.containers) {
        let before = former.and_then(|former| find_container(former, &container.name));
        match before {
            Some(before) => container.resources.clone_from(&before.resources),
            None => container.resources = resize::granted(&pod, &container.name).or(container.resources.take()),
        }
    }
    Arc::new(granted)
}

/// Seconds as they stand in the API, negative ones as one second.
#[must_use]
pub fn grace_ms(seconds: i64) -> u64 {
    let seconds = if seconds < 0 { 1 } else { seconds };
    u64::try_from(seconds).unwrap_or(1).saturating_mul(1000)
}

fn init_want(container: &Container, pod_restart: RestartPolicy) -> ContainerWant {
    let own = policy(&container.restart_policy);
    let sidecar = own == Some(RestartPolicy::Always);
    let restart = match own.unwrap_or(pod_restart) {
        _ if sidecar => RestartPolicy::Always,
        RestartPolicy::Never => RestartPolicy::Never,
        // Done is done, but failure is tried again.
        RestartPolicy::Always | RestartPolicy::OnFailure => RestartPolicy::OnFailure,
    };
    let kind = if sidecar { Kind::Sidecar } else { Kind::Init };
    ContainerWant {
        name: container.name.clone(),
        kind,
        image: container.image.clone(),
        restart,
        rules: rules(container),
        gates: gates(container),
        resources: Resources::of(container.resources.as_ref()),
        resize: resize_policy(container),
    }
}

/// The rules that a restart follows from; one without exit codes speaks of none.
fn rules(container: &Container) -> Vec<RestartRule> {
    let rule = |rule: &ContainerRestartRule| {
        let codes = rule.exit_codes.as_ref().filter(|_| rule.action == "Restart")?;
        Some(RestartRule { within: codes.operator != "NotIn", codes: codes.values.clone() })
    };
    container.restart_policy_rules.iter().filter_map(rule).collect()
}

fn resize_policy(container: &Container) -> ResizePolicy {
    let restarts = |name: &str| {
        let mut policies = container.resize_policy.iter().filter(|policy| policy.resource_name == name);
        policies.any(|policy| policy.restart_policy == "RestartContainer")
    };
    ResizePolicy { cpu_restarts: restarts("cpu"), memory_restarts: restarts("memory") }
}

fn gates(container: &Container) -> Gates {
    let hook = |pick: fn(&Lifecycle) -> bool| container.lifecycle.as_deref().is_some_and(pick);
    Gates {
        post_start: hook(|lifecycle| lifecycle.post_start.is_some()),
        pre_stop: hook(|lifecycle| lifecycle.pre_stop.is_some()),
        startup: container.startup_probe.is_some(),
        readiness: container.readiness_probe.is_some(),
    }
}

fn policy(text: &str) -> Option<RestartPolicy> {
    match text {
        "Always" => Some(RestartPolicy::Always),
        "OnFailure" => Some(RestartPolicy::OnFailure),
        "Never" => Some(RestartPolicy::Never),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container(name: &str, restart_policy: &str) -> Container {
        Container { name: name.into(), restart_policy: restart_policy.into(), ..Container::default() }
    }

    #[test]
    fn kinds_and_policies_follow_the_manifest() {
        let want = |pod_policy: &str| {
            let spec = PodSpec {
                init_containers: vec![container("i", ""), container("s", "Always")],
                containers: vec![container("x", ""), container("y", "Never")],
                restart_policy: pod_policy.into(),
                ..PodSpec::default()
            };
            pod_want(&Pod { spec: Some(spec), ..Pod::default() })
                .containers
                .into_iter()
                .map(|container| (container.kind, container.restart))
                .collect::<Vec<_>>()
        };
        use RestartPolicy::{Always, Never, OnFailure};
        let app = |restart| (Kind::App, restart);
        assert_eq!(want(""), [(Kind::Init, OnFailure), (Kind::Sidecar, Always), app(Always), app(Never)]);
        assert_eq!(want("Never"), [(Kind::Init, Never), (Kind::Sidecar, Always), app(Never), app(Never)]);
        assert_eq!(want("OnFailure"), [(Kind::Init, OnFailure), (Kind::Sidecar, Always), app(OnFailure), app(Never)]);
    }

    #[test]
    fn a_wish_without_room_leaves_what_was() {
        use minipod_proto::v1::{ContainerStatus, PodStatus, ResourceRequirements, Time};
        let resources = |cpu: &str| {
            let requests = [("cpu".to_owned(), cpu.to_owned())].into();
            Some(ResourceRequirements { requests, ..ResourceRequirements::default() })
        };
        let pod = |cpu: &str, pending: bool| {
            let mut one = container("a", "");
            one.resources = resources(cpu);
            let mut status = PodStatus::default();
            status.container_statuses.push(ContainerStatus {
                name: "a".into(),
                allocated_resources: [("cpu".to_owned(), "1".to_owned())].into(),
                resources: resources("1"),
                ..ContainerStatus::default()
            });
            if pending {
                status.set_condition(resize::PENDING, "True", resize::DEFERRED, "", Time::default());
            }
            let spec = PodSpec { containers: vec![one], ..PodSpec::default() };
            Arc::new(Pod { spec: Some(spec), status: Some(status), ..Pod::default() })
        };
        let cpu = |pod: &Pod| pod_want(pod).containers[0].resources.cpu_request_milli;
        assert_eq!(cpu(&granted(pod("4", false), Some(&pod("2", false)))), Some(4000));
        assert_eq!(cpu(&granted(pod("4", true), Some(&pod("2", false)))), Some(2000));
        assert_eq!(cpu(&granted(pod("4", true), None)), Some(1000));
    }

    #[test]
    fn a_uid_that_walks_paths_is_refused() {
        for bad in ["", "..", "a/b", "a.b", &"x".repeat(64)] {
            assert_eq!(Uid::parse(bad), None, "{bad}");
        }
        assert!(Uid::parse("0b9d3a55-7a47-4a35-9d52-7a2c9a0a6f0e").is_some());
    }
}
