//! Containers: their names, images, ports, environment, mounts, policies and probes.

use std::collections::HashSet;

use super::{
    resources, security,
    walk::{Walk, absolute, ip, relative},
};
use crate::{
    names::{dns_label, env_name, port_name, qualified_name},
    v1::{
        Container, ContainerPort, EnvVar, EnvVarSource, EphemeralContainer, HttpGetAction, IntOrString, Lifecycle,
        LifecycleHandler, ObjectFieldSelector, PodSpec, Probe, ResourceFieldSelector, VolumeMount, int_or_string,
    },
};

/// Most rules of one container (KEP-5307).
const MAX_RESTART_RULES: usize = 20;
/// Most exit codes of one rule (KEP-5307).
const MAX_EXIT_CODES: usize = 255;

/// Which list of the pod a container is in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Init,
    App,
    /// Added to a running pod (`ephemeralContainers`).
    Debug,
}

pub(super) fn all(walk: &mut Walk, spec: &PodSpec) {
    if spec.containers.is_empty() {
        walk.missing("containers", "want at least one container");
    }
    walk.each("initContainers", &spec.init_containers, |walk, one| container(walk, one, spec, Place::Init));
    walk.each("containers", &spec.containers, |walk, one| container(walk, one, spec, Place::App));
    // One name, one container: logs, exec and the directories of a pod go by it.
    walk.unique("initContainers", "name", spec.init_containers.iter().map(|one| one.name.as_str()));
    let mut seen: HashSet<&str> = spec.init_containers.iter().map(|one| one.name.as_str()).collect();
    for (index, one) in spec.containers.iter().enumerate() {
        if !one.name.is_empty() && !seen.insert(&one.name) {
            walk.bad(&format!("containers[{index}].name"), &one.name, "is there already, want every one once");
        }
    }
    host_ports(walk, spec);
    for (index, one) in spec.ephemeral_containers.iter().enumerate() {
        walk.within(&format!("ephemeralContainers[{index}]"), |walk| {
            ephemeral(walk, one, spec);
            if !one.name.is_empty() && !seen.insert(&one.name) {
                walk.bad("name", &one.name, "is there already, want every one once");
            }
        });
    }
}

/// A debug container: what would count for the pod, or for its scheduling, it cannot have (KEP-277).
fn ephemeral(walk: &mut Walk, debug: &EphemeralContainer, spec: &PodSpec) {
    let forbidden = [
        ("ports", !debug.ports.is_empty()),
        ("resources", debug.resources.is_some()),
        ("resizePolicy", !debug.resize_policy.is_empty()),
        ("restartPolicy", !debug.restart_policy.is_empty()),
        ("restartPolicyRules", !debug.restart_policy_rules.is_empty()),
        ("volumeDevices", !debug.volume_devices.is_empty()),
        ("livenessProbe", debug.liveness_probe.is_some()),
        ("readinessProbe", debug.readiness_probe.is_some()),
        ("startupProbe", debug.startup_probe.is_some()),
        ("lifecycle", debug.lifecycle.is_some()),
    ];
    for (field, _) in forbidden.iter().filter(|(_, set)| *set) {
        walk.wrong(field, "cannot be set for an Ephemeral Container");
    }
    for (index, mount) in debug.volume_mounts.iter().enumerate() {
        for (field, text) in [("subPath", &mount.sub_path), ("subPathExpr", &mount.sub_path_expr)] {
            if !text.is_empty() {
                walk.bad(&format!("volumeMounts[{index}].{field}"), text, "cannot be set for an Ephemeral Container");
            }
        }
    }
    if !debug.target_container_name.is_empty() && spec.container(&debug.target_container_name).is_none() {
        walk.bad("targetContainerName", &debug.target_container_name, "want the name of a container of the pod");
    }
    let mut plain = debug.as_container();
    // What was refused above is not judged a second time.
    plain.ports.clear();
    plain.restart_policy.clear();
    plain.restart_policy_rules.clear();
    (plain.resources, plain.lifecycle) = (None, None);
    (plain.liveness_probe, plain.readiness_probe, plain.startup_probe) = (None, None, None);
    container(walk, &plain, spec, Place::Debug);
}

/// Ports of the node that two containers of the pod would both need.
fn host_ports(walk: &mut Walk, spec: &PodSpec) {
    let mut seen = HashSet::new();
    for (list, containers) in [("initContainers", &spec.init_containers), ("containers", &spec.containers)] {
        for (index, container) in containers.iter().enumerate() {
            // Init containers that end are gone before the next one listens.
            if list == "initContainers" && !container.is_sidecar() {
                continue;
            }
            for (number, port) in container.ports.iter().enumerate().filter(|(_, port)| port.host_port > 0) {
                let protocol = if port.protocol.is_empty() { "TCP" } else { &port.protocol };
                if !seen.insert((port.host_port, protocol, port.host_ip.as_str())) {
                    let place = format!("{list}[{index}].ports[{number}].hostPort");
                    walk.bad(&place, port.host_port, format!("is used by another port of the pod ({protocol})"));
                }
            }
        }
    }
}

fn container(walk: &mut Walk, container: &Container, spec: &PodSpec, place: Place) {
    walk.form("name", &container.name, dns_label);
    if container.image.is_empty() {
        walk.missing("image", "want an image such as busybox:1.36");
    } else if container.image.contains(char::is_whitespace) {
        walk.bad("image", &container.image, "want no white space");
    }
    if !container.working_dir.is_empty() {
        walk.form("workingDir", &container.working_dir, absolute);
    }
    for (field, texts) in [("command", &container.command), ("args", &container.args)] {
        for (index, text) in texts.iter().enumerate().filter(|(_, text)| text.contains('\0')) {
            walk.bad(&format!("{field}[{index}]"), text, "want no NUL byte");
        }
    }
    walk.each("ports", &container.ports, |walk, one| port(walk, one, spec.host_network));
    walk.unique("ports", "name", container.ports.iter().map(|port| port.name.as_str()));
    walk.each("env", &container.env, |walk, one| variable(walk, one, spec));
    walk.unique("env", "name", container.env.iter().map(|variable| variable.name.as_str()));
    walk.each("envFrom", &container.env_from, |walk, source| {
        walk.form_if_set("prefix", &source.prefix, env_name);
        exactly_one(
            walk,
            &[("configMapRef", source.config_map_ref.is_some()), ("secretRef", source.secret_ref.is_some())],
        );
    });
    resources::container(walk, container);
    resize_policies(walk, container, spec);
    mounts(walk, container, spec);
    walk.word("imagePullPolicy", &container.image_pull_policy, &["Always", "IfNotPresent", "Never"]);
    if !container.termination_message_path.is_empty() {
        walk.form("terminationMessagePath", &container.termination_message_path, absolute);
    }
    let policies = ["File", "FallbackToLogsOnError"];
    walk.word("terminationMessagePolicy", &container.termination_message_policy, &policies);
    restarts(walk, container);
    security::container(walk, container.security_context.as_deref(), spec);
    probes(walk, container, (spec, place));
}

fn port(walk: &mut Walk, port: &ContainerPort, host_network: bool) {
    walk.form_if_set("name", &port.name, port_name);
    walk.between("containerPort", port.container_port.into(), 1, 65_535);
    walk.between("hostPort", port.host_port.into(), 0, 65_535);
    if host_network && port.host_port != 0 && port.host_port != port.container_port {
        walk.bad(
            "hostPort",
            port.host_port,
            format!("want the containerPort {} with hostNetwork", port.container_port),
        );
    }
    walk.word("protocol", &port.protocol, &["TCP", "UDP", "SCTP"]);
    walk.form_if_set("hostIP", &port.host_ip, ip);
}

/// Of several fields exactly one must be set.
pub(super) fn exactly_one(walk: &mut Walk, fields: &[(&str, bool)]) {
    let names = || fields.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let set: Vec<&str> = fields.iter().filter(|(_, set)| *set).map(|(name, _)| *name).collect();
    match set.as_slice() {
        [_] => {}
        [] => walk.wrong("", format!("says nothing, want exactly one of {}", names())),
        several => walk.wrong("", format!("has {}, want exactly one of them", several.join(" and "))),
    }
}

fn variable(walk: &mut Walk, variable: &EnvVar, spec: &PodSpec) {
    walk.form("name", &variable.name, env_name);
    if variable.value.contains('\0') {
        walk.bad("value", &variable.value, "want no NUL byte");
    }
    let Some(source) = &variable.value_from else { return };
    if !variable.value.is_empty() {
        walk.bad("value", &variable.value, "want either value or valueFrom");
    }
    walk.within("valueFrom", |walk| source_of(walk, source, spec));
}

fn source_of(walk: &mut Walk, source: &EnvVarSource, spec: &PodSpec) {
    exactly_one(
        walk,
        &[
            ("fieldRef", source.field_ref.is_some()),
            ("resourceFieldRef", source.resource_field_ref.is_some()),
            ("configMapKeyRef", source.config_map_key_ref.is_some()),
            ("secretKeyRef", source.secret_key_ref.is_some()),
        ],
    );
    if let Some(field) = &source.field_ref {
        const FIELDS: [&str; 9] = [
            "metadata.name",
            "metadata.namespace",
            "metadata.uid",
            "spec.nodeName",
            "spec.serviceAccountName",
            "status.hostIP",
            "status.hostIPs",
            "status.podIP",
            "status.podIPs",
        ];
        walk.within("fieldRef", |walk| field_ref(walk, field, &FIELDS));
    }
    if let Some(field) = &source.resource_field_ref {
        walk.within("resourceFieldRef", |walk| resource_ref(walk, field, spec));
    }
}

/// A field of the pod; labels and annotations by `metadata.labels['KEY']`.
pub(super) fn field_ref(walk: &mut Walk, field: &ObjectFieldSelector, allowed: &[&str]) {
    walk.word("apiVersion", &field.api_version, &["v1"]);
    let path = field.field_path.as_str();
    let keyed = ["metadata.labels['", "metadata.annotations['"].iter().find_map(|start| path.strip_prefix(start));
    match keyed.and_then(|rest| rest.strip_suffix("']")) {
        Some(key) => walk.form("fieldPath", &key.to_ascii_lowercase(), qualified_name),
        None if allowed.contains(&path) => {}
        None => walk.bad(
            "fieldPath",
            path,
            format!("want metadata.labels['KEY'], metadata.annotations['KEY'] or one of {}", allowed.join(", ")),
        ),
    }
}

pub(super) fn resource_ref(walk: &mut Walk, field: &ResourceFieldSelector, spec: &PodSpec) {
    if !field.container_name.is_empty() && spec.container(&field.container_name).is_none() {
        walk.bad("containerName", &field.container_name, "want the name of a container of the pod");
    }
    let known = field.resource.split_once('.').is_some_and(|(side, name)| {
        let standard = matches!(name, "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-");
        matches!(side, "limits" | "requests") && standard
    });
    if !known {
        walk.bad(
            "resource",
            &field.resource,
            "want limits.NAME or requests.NAME with cpu, memory, ephemeral-storage or hugepages-SIZE",
        );
    }
    match field.divisor.parse::<crate::quantity::Quantity>() {
        Ok(divisor) if divisor.sign() < 0 => walk.bad("divisor", &field.divisor, "want 0 (stands for 1) or more"),
        Err(error) if !field.divisor.is_empty() => walk.wrong("divisor", error.to_string()),
        _ => {}
    }
}

fn mounts(walk: &mut Walk, container: &Container, spec: &PodSpec) {
    let privileged = container.security_context.as_ref().and_then(|context| context.privileged) == Some(true);
    walk.each("volumeMounts", &container.volume_mounts, |walk, mount| {
        if mount.mount_propagation == "Bidirectional" && !privileged {
            walk.bad("mountPropagation", "Bidirectional", "want securityContext.privileged: true beside it");
        }
        if mount.mount_propagation == "Bidirectional" && spec.has_own_users() {
            let wanted = "want None or HostToContainer with hostUsers: false, such mounts do not reach the node";
            walk.bad("mountPropagation", "Bidirectional", wanted);
        }
        if !spec.volumes.iter().any(|volume| volume.name == mount.name) {
            let names: Vec<&str> = spec.volumes.iter().map(|volume| volume.name.as_str()).collect();
            let wanted = match names.as_slice() {
                [] => "the pod has no volumes".to_owned(),
                names => format!("want a volume of the pod: {}", names.join(", ")),
            };
            walk.bad("name", &mount.name, wanted);
        }
        volume_mount(walk, mount);
    });
    walk.unique(
        "volumeMounts",
        "mountPath",
        container.volume_mounts.iter().map(|mount| mount.mount_path.trim_end_matches('/')),
    );
}

fn volume_mount(walk: &mut Walk, mount: &VolumeMount) {
    if mount.mount_path.is_empty() {
        walk.missing("mountPath", "want an absolute path in the container");
    } else if mount.mount_path.trim_end_matches('/').is_empty() {
        walk.bad("mountPath", &mount.mount_path, "want a place below the root, the root is the image's");
    } else {
        walk.form("mountPath", &mount.mount_path, absolute);
    }
    if mount.mount_path.contains(':') {
        walk.bad("mountPath", &mount.mount_path, "want no ':'");
    }
    walk.form_if_set("subPath", &mount.sub_path, relative);
    walk.form_if_set("subPathExpr", &mount.sub_path_expr, relative);
    if !mount.sub_path.is_empty() && !mount.sub_path_expr.is_empty() {
        walk.bad("subPathExpr", &mount.sub_path_expr, "want either subPath or subPathExpr");
    }
    walk.word("mountPropagation", &mount.mount_propagation, &["None", "HostToContainer", "Bidirectional"]);
    walk.word("recursiveReadOnly", &mount.recursive_read_only, &["Disabled", "IfPossible", "Enabled"]);
    if matches!(mount.recursive_read_only.as_str(), "IfPossible" | "Enabled") && !mount.read_only {
        walk.bad("recursiveReadOnly", &mount.recursive_read_only, "want readOnly: true beside it");
    }
    let propagates = !matches!(mount.mount_propagation.as_str(), "" | "None");
    if mount.recursive_read_only == "Enabled" && propagates {
        walk.bad("mountPropagation", &mount.mount_propagation, "want None beside recursiveReadOnly: Enabled");
    }
}

/// A container that is never started again cannot be started again for its resources.
fn resize_policies(walk: &mut Walk, container: &Container, spec: &PodSpec) {
    let own = if container.restart_policy.is_empty() { &spec.restart_policy } else { &container.restart_policy };
    if own != "Never" {
        return;
    }
    walk.each("resizePolicy", &container.resize_policy, |walk, policy| {
        if policy.restart_policy == "RestartContainer" {
            walk.bad(
                "restartPolicy",
                &policy.restart_policy,
                "want NotRequired where the container's restartPolicy is Never",
            );
        }
    });
}

fn restarts(walk: &mut Walk, container: &Container) {
    walk.word("restartPolicy", &container.restart_policy, &["Always", "OnFailure", "Never"]);
    let rules = &container.restart_policy_rules;
    if !rules.is_empty() && container.restart_policy.is_empty() {
        walk.missing("restartPolicy", "restartPolicyRules want the container's own restartPolicy beside them");
    }
    if rules.len() > MAX_RESTART_RULES {
        walk.wrong("restartPolicyRules", format!("has {} rules, want at most {MAX_RESTART_RULES}", rules.len()));
    }
    walk.each("restartPolicyRules", rules, |walk, rule| {
        if rule.action == "RestartAllContainers" {
            walk.bad("action", &rule.action, "want Restart: nothing restarts all containers of a pod at once yet");
        } else {
            walk.must_be("action", &rule.action, &["Restart"]);
        }
        let Some(codes) = &rule.exit_codes else { return walk.missing("exitCodes", "a rule wants its exit codes") };
        walk.within("exitCodes", |walk| {
            walk.must_be("operator", &codes.operator, &["In", "NotIn"]);
            if codes.values.is_empty() || codes.values.len() > MAX_EXIT_CODES {
                walk.wrong("values", format!("has {} exit codes, want 1 to {MAX_EXIT_CODES}", codes.values.len()));
            }
            walk.each("values", &codes.values, |walk, code| walk.between("", (*code).into(), 0, 255));
        });
    });
}

fn probes(walk: &mut Walk, container: &Container, (spec, place): (&PodSpec, Place)) {
    let probes = [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ];
    let runs_to_its_end = place == Place::Init && !container.is_sidecar();
    for (field, found) in probes {
        let Some(found) = found else { continue };
        if runs_to_its_end {
            walk.wrong(field, "an init container has none, unless its restartPolicy is Always");
        }
        walk.within(field, |walk| probe(walk, found, field, container));
    }
    if let Some(found) = &container.lifecycle {
        if runs_to_its_end {
            walk.wrong("lifecycle", "an init container has none, unless its restartPolicy is Always");
        }
        walk.within("lifecycle", |walk| lifecycle(walk, found, (container, spec)));
    }
}

fn probe(walk: &mut Walk, probe: &Probe, kind: &str, container: &Container) {
    exactly_one(
        walk,
        &[
            ("exec", probe.exec.is_some()),
            ("httpGet", probe.http_get.is_some()),
            ("tcpSocket", probe.tcp_socket.is_some()),
            ("grpc", probe.grpc.is_some()),
        ],
    );
    let numbers = [
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("periodSeconds", probe.period_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ];
    for (field, number) in numbers {
        walk.between(field, number.into(), 0, i32::MAX.into());
    }
    if kind != "readinessProbe" && probe.success_threshold > 1 {
        walk.bad("successThreshold", probe.success_threshold, "want 1 for liveness and startup");
    }
    match probe.termination_grace_period_seconds {
        Some(seconds) if kind == "readinessProbe" => {
            walk.bad("terminationGracePeriodSeconds", seconds, "want none, readiness ends nothing");
        }
        Some(seconds) => walk.between("terminationGracePeriodSeconds", seconds, 1, i64::MAX),
        None => {}
    }
    if probe.exec.as_ref().is_some_and(|exec| exec.command.is_empty()) {
        walk.missing("exec.command", "want a command");
    }
    if let Some(action) = &probe.http_get {
        walk.within("httpGet", |walk| http_get(walk, action, container));
    }
    if let Some(action) = &probe.tcp_socket {
        walk.within("tcpSocket", |walk| target(walk, action.port.as_ref(), container));
    }
    if let Some(action) = &probe.grpc {
        walk.between("grpc.port", action.port.into(), 1, 65_535);
    }
}

fn http_get(walk: &mut Walk, action: &HttpGetAction, container: &Container) {
    target(walk, action.port.as_ref(), container);
    walk.word("scheme", &action.scheme, &["HTTP", "HTTPS"]);
    walk.each("httpHeaders", &action.http_headers, |walk, header| {
        let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if header.name.is_empty() || !header.name.bytes().all(token) {
            walk.bad("name", &header.name, "want the name of an HTTP header");
        }
        if header.value.contains(['\r', '\n', '\0']) {
            walk.bad("value", &header.value, "want one line");
        }
    });
}

/// A port by number, or by the name of one of the container's.
fn target(walk: &mut Walk, port: Option<&IntOrString>, container: &Container) {
    match port.and_then(|port| port.value.as_ref()) {
        Some(int_or_string::Value::Int(number)) => walk.between("port", (*number).into(), 1, 65_535),
        Some(int_or_string::Value::Str(name)) if container.ports.iter().any(|port| port.name == *name) => {}
        Some(int_or_string::Value::Str(name)) => {
            walk.bad("port", name, "want a number or the name of a port of this container")
        }
        None => walk.missing("port", "want a number or the name of a port of this container"),
    }
}

fn lifecycle(walk: &mut Walk, lifecycle: &Lifecycle, (container, spec): (&Container, &PodSpec)) {
    for (field, handler) in [("postStart", &lifecycle.post_start), ("preStop", &lifecycle.pre_stop)] {
        if let Some(handler) = handler {
            walk.within(field, |walk| hook(walk, handler, (container, spec)));
        }
    }
    let signal = lifecycle.stop_signal.as_str();
    if !signal.is_empty() && !is_signal(signal) {
        walk.bad("stopSignal", signal, "want a signal such as SIGTERM, SIGUSR1 or SIGRTMIN+3");
    }
}

fn hook(walk: &mut Walk, handler: &LifecycleHandler, (container, spec): (&Container, &PodSpec)) {
    exactly_one(
        walk,
        &[
            ("exec", handler.exec.is_some()),
            ("httpGet", handler.http_get.is_some()),
            ("tcpSocket", handler.tcp_socket.is_some()),
            ("sleep", handler.sleep.is_some()),
        ],
    );
    if handler.exec.as_ref().is_some_and(|exec| exec.command.is_empty()) {
        walk.missing("exec.command", "want a command");
    }
    if let Some(action) = &handler.http_get {
        walk.within("httpGet", |walk| http_get(walk, action, container));
    }
    if let Some(action) = &handler.tcp_socket {
        walk.within("tcpSocket", |walk| target(walk, action.port.as_ref(), container));
    }
    if let Some(sleep) = &handler.sleep {
        // Nobody sleeps beyond the pod's grace.
        walk.between("sleep.seconds", sleep.seconds, 0, spec.termination_grace_period_seconds.unwrap_or(30).max(0));
    }
}

/// A signal of Linux by its name with SIG; the real-time ones by their distance from the ends.
fn is_signal(name: &str) -> bool {
    const NAMES: [&str; 33] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "IOT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM",
        "PROF", "WINCH", "IO", "POLL", "PWR", "SYS",
    ];
    let Some(name) = name.strip_prefix("SIG") else { return false };
    let distance = |prefix: &str, sign: char, most: u32| {
        let rest = name.strip_prefix(prefix)?;
        Some(
            rest.is_empty()
                || rest.strip_prefix(sign).is_some_and(|n| n.parse::<u32>().is_ok_and(|n| (1..=most).contains(&n))),
        )
    };
    NAMES.contains(&name) || distance("RTMIN", '+', 15).or(distance("RTMAX", '-', 14)).unwrap_or(false)
}
