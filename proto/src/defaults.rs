//! What Kubernetes fills in when an object is created, so that everyone after it reads one complete form.
//!
//! Applying twice is applying once. What depends on other objects (priority by class) or on time is not here.

use std::collections::BTreeMap;

use crate::{
    DEFAULT_GRACE_SECONDS, Kind, apparmor,
    resources::{CPU, MEMORY, amount_text},
    v1::{
        ConfigMapVolumeSource, Container, ContainerPort, EnvVar, EphemeralContainer, Event, HttpGetAction,
        NamespaceStatus, NodeStatus, Object, Pod, PodSpec, Probe, ResourceRequirements, Secret, Volume, object,
    },
};

/// The namespace of objects that name none.
pub const NAMESPACE: &str = "default";
/// The scheduler of pods that name none.
pub const SCHEDULER: &str = "default-scheduler";

/// The mode of files from ConfigMaps, Secrets and the downward API.
const FILE_MODE: i32 = 0o644;

/// Fills in the defaults of any kind of object, with apiVersion, kind and namespace.
pub fn apply(object: &mut Object) {
    object.set_type();
    if object.kind_of().is_some_and(Kind::namespaced)
        && let Some(meta) = object.meta_mut()
    {
        set(&mut meta.namespace, NAMESPACE);
    }
    match &mut object.kind {
        Some(object::Kind::Pod(pod)) => apply_pod(pod),
        Some(object::Kind::Secret(secret)) => apply_secret(secret),
        Some(object::Kind::Namespace(namespace)) => {
            let status = namespace.status.get_or_insert_with(NamespaceStatus::default);
            set(&mut status.phase, "Active");
        }
        Some(object::Kind::Node(node)) => {
            if let Some(status) = &mut node.status {
                apply_node_status(status);
            }
        }
        Some(object::Kind::PriorityClass(class)) => set(&mut class.preemption_policy, "PreemptLowerPriority"),
        Some(object::Kind::Event(event)) => apply_event(event),
        Some(object::Kind::ConfigMap(_) | object::Kind::PodDisruptionBudget(_)) | None => {}
    }
}

fn set(field: &mut String, value: &str) {
    if field.is_empty() {
        value.clone_into(field);
    }
}

fn set_number(field: &mut i32, value: i32) {
    if *field == 0 {
        *field = value;
    }
}

fn apply_secret(secret: &mut Secret) {
    for (key, text) in std::mem::take(&mut secret.string_data) {
        secret.data.insert(key, text.into());
    }
    set(&mut secret.r#type, "Opaque");
}

/// What a node has is what pods may use, unless it says less.
fn apply_node_status(status: &mut NodeStatus) {
    for (name, amount) in &status.capacity {
        status.allocatable.entry(name.clone()).or_insert_with(|| amount.clone());
    }
}

fn apply_event(event: &mut Event) {
    set(&mut event.r#type, "Normal");
}

/// Fills in the defaults of a pod.
fn apply_pod(pod: &mut Pod) {
    apparmor_from_annotations(pod);
    let spec = pod.spec_mut();
    set(&mut spec.restart_policy, "Always");
    set(&mut spec.dns_policy, "ClusterFirst");
    set(&mut spec.scheduler_name, SCHEDULER);
    spec.termination_grace_period_seconds.get_or_insert(DEFAULT_GRACE_SECONDS);
    spec.enable_service_links.get_or_insert(true);
    spec.security_context.get_or_insert_default();
    // The old name and the new one say the same.
    if spec.service_account_name.is_empty() {
        spec.service_account_name.clone_from(&spec.service_account);
    }
    spec.service_account.clone_from(&spec.service_account_name);
    spec.volumes.iter_mut().for_each(volume);
    let host_network = spec.host_network;
    spec.init_containers.iter_mut().chain(&mut spec.containers).for_each(|one| container(one, host_network));
    spec.ephemeral_containers.iter_mut().for_each(ephemeral);
    pod_level_requests(spec);
    for constraint in &mut spec.topology_spread_constraints {
        set(&mut constraint.node_affinity_policy, "Honor");
        set(&mut constraint.node_taints_policy, "Ignore");
    }
}

/// What the field says comes first; an annotation that says nothing sensible is validation's to report.
fn apparmor_from_annotations(pod: &mut Pod) {
    let annotations = pod.metadata.iter().flat_map(|meta| &meta.annotations);
    let profile = |(key, value): (&String, &String)| {
        let name = key.strip_prefix(apparmor::ANNOTATION)?;
        Some((name.to_owned(), apparmor::from_annotation(value).ok()?))
    };
    let profiles: Vec<_> = annotations.filter_map(profile).collect();
    let spec = pod.spec_mut();
    for (name, profile) in profiles {
        let mut containers = spec.init_containers.iter_mut().chain(&mut spec.containers);
        if let Some(container) = containers.find(|container| container.name == name) {
            container.security_context.get_or_insert_default().app_armor_profile.get_or_insert(profile);
        }
    }
}

/// Where the pod as a whole has limits: what its containers request together is its request, and what they do not request it takes
/// from the limit (KEP-2837).
fn pod_level_requests(spec: &mut PodSpec) {
    if spec.resources.as_ref().is_none_or(|resources| resources.limits.is_empty()) {
        return;
    }
    let containers = PodSpec { resources: None, overhead: BTreeMap::new(), ..spec.clone() };
    // A sum that cannot be told is validation's to report.
    let sum = crate::resources::pod_requests(&containers).unwrap_or_default();
    let Some(resources) = &mut spec.resources else { return };
    for name in [CPU, MEMORY] {
        let amount = sum.get(name);
        if amount > 0 {
            resources.requests.entry(name.to_owned()).or_insert_with(|| amount_text(name, amount));
        }
    }
    requests_from_limits(resources);
}

fn requests_from_limits(resources: &mut ResourceRequirements) {
    for (name, limit) in &resources.limits {
        resources.requests.entry(name.clone()).or_insert_with(|| limit.clone());
    }
}

/// A debug container has no ports, probes, resources or hooks, which is what the other defaults are about.
fn ephemeral(debug: &mut EphemeralContainer) {
    set(&mut debug.image_pull_policy, pull_policy(&debug.image));
    set(&mut debug.termination_message_path, "/dev/termination-log");
    set(&mut debug.termination_message_policy, "File");
    debug.env.iter_mut().for_each(variable);
}

fn container(container: &mut Container, host_network: bool) {
    set(&mut container.image_pull_policy, pull_policy(&container.image));
    set(&mut container.termination_message_path, "/dev/termination-log");
    set(&mut container.termination_message_policy, "File");
    if let Some(resources) = &mut container.resources {
        requests_from_limits(resources);
    }
    container.ports.iter_mut().for_each(|one| port(one, host_network));
    for policy in &mut container.resize_policy {
        set(&mut policy.restart_policy, "NotRequired");
    }
    container.env.iter_mut().for_each(variable);
    let probes = [&mut container.liveness_probe, &mut container.readiness_probe, &mut container.startup_probe];
    probes.into_iter().flatten().for_each(|one| probe(one));
    if let Some(lifecycle) = &mut container.lifecycle {
        let handlers = [&mut lifecycle.post_start, &mut lifecycle.pre_stop];
        handlers.into_iter().flatten().filter_map(|handler| handler.http_get.as_mut()).for_each(http_get);
    }
}

fn variable(variable: &mut EnvVar) {
    if let Some(source) = &mut variable.value_from {
        if let Some(field) = &mut source.field_ref {
            set(&mut field.api_version, "v1");
        }
        if let Some(field) = &mut source.resource_field_ref {
            set(&mut field.divisor, "0");
        }
    }
}

fn port(port: &mut ContainerPort, host_network: bool) {
    set(&mut port.protocol, "TCP");
    if host_network {
        set_number(&mut port.host_port, port.container_port);
    }
}

fn probe(probe: &mut Probe) {
    set_number(&mut probe.timeout_seconds, 1);
    set_number(&mut probe.period_seconds, 10);
    set_number(&mut probe.success_threshold, 1);
    set_number(&mut probe.failure_threshold, 3);
    if let Some(action) = &mut probe.http_get {
        http_get(action);
    }
    if let Some(action) = &mut probe.grpc {
        action.service.get_or_insert_default();
    }
}

fn http_get(action: &mut HttpGetAction) {
    set(&mut action.path, "/");
    set(&mut action.scheme, "HTTP");
}

fn volume(volume: &mut Volume) {
    let named = volume.host_path.is_some()
        || volume.empty_dir.is_some()
        || volume.secret.is_some()
        || volume.downward_api.is_some()
        || volume.config_map.is_some()
        || volume.projected.is_some()
        || volume.image.is_some();
    if !named {
        // As Kubernetes: a volume of no kind is an empty directory.
        volume.empty_dir.get_or_insert_default();
    }
    if let Some(ConfigMapVolumeSource { default_mode, .. }) = &mut volume.config_map {
        default_mode.get_or_insert(FILE_MODE);
    }
    if let Some(source) = &mut volume.secret {
        source.default_mode.get_or_insert(FILE_MODE);
    }
    if let Some(source) = &mut volume.downward_api {
        source.default_mode.get_or_insert(FILE_MODE);
        let fields = source.items.iter_mut().filter_map(|item| item.field_ref.as_mut());
        fields.for_each(|field| set(&mut field.api_version, "v1"));
    }
    if let Some(source) = &mut volume.projected {
        source.default_mode.get_or_insert(FILE_MODE);
    }
    if let Some(source) = &mut volume.image {
        let policy = pull_policy(&source.reference);
        set(&mut source.pull_policy, policy);
    }
}

/// `Always` for an image by the tag latest or without a tag, `IfNotPresent` for any other tag or a digest.
pub fn pull_policy(image: &str) -> &'static str {
    if image.contains('@') {
        return "IfNotPresent";
    }
    // A colon before the last slash belongs to the registry's port.
    let name = image.rsplit_once('/').map_or(image, |(_, name)| name);
    match name.split_once(':') {
        None | Some((_, "latest" | "")) => "Always",
        Some(_) => "IfNotPresent",
    }
}

#[cfg(test)]
#[path = "defaults_tests.rs"]
mod tests;
