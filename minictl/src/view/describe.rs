//! `minictl describe`: an object for people.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use minipod_proto::Resource;
use minipod_proto::resources::{self, Resources};
use minipod_proto::v1::{
    Container, ContainerState, ContainerStatus, EnvVar, Event, Node, Object, ObjectMeta, Pod, PodDisruptionBudget,
    ResourceRequirements, Time, Volume, object,
};

use super::pod_status::summary;
use super::table::Table;
use super::{age, columns, text};

/// Where values begin.
const COLUMN: usize = 18;

/// Lines with a depth.
struct Page {
    out: String,
    depth: usize,
}

impl Page {
    fn field(&mut self, name: &str, value: &str) {
        let value = text::line(value);
        let label = format!("{}{name}:", "  ".repeat(self.depth));
        let _ = writeln!(self.out, "{}", format!("{label:COLUMN$} {value}").trim_end());
    }

    fn line(&mut self, content: &str) {
        let _ = writeln!(self.out, "{}{}", "  ".repeat(self.depth), text::line(content));
    }

    fn within(&mut self, title: &str, fill: impl FnOnce(&mut Page)) {
        self.line(&format!("{title}:"));
        self.depth += 1;
        fill(self);
        self.depth -= 1;
    }

    fn table(&mut self, table: &Table) {
        for line in table.render(true).lines() {
            let _ = writeln!(self.out, "{}{line}", "  ".repeat(self.depth));
        }
    }

    fn map(&mut self, name: &str, map: &BTreeMap<String, String>) {
        let mut pairs = map.iter().filter(|(key, _)| !key.ends_with("last-applied-configuration"));
        match pairs.next() {
            None => self.field(name, "<none>"),
            Some((key, value)) => {
                self.field(name, &format!("{key}={value}"));
                for (key, value) in pairs {
                    let _ = writeln!(self.out, "{:COLUMN$} {}", "", text::line(&format!("{key}={value}")));
                }
            }
        }
    }

    fn meta(&mut self, meta: &ObjectMeta, now: Time) {
        self.field("Name", &meta.name);
        if !meta.namespace.is_empty() {
            self.field("Namespace", &meta.namespace);
        }
        self.map("Labels", &meta.labels);
        self.map("Annotations", &meta.annotations);
        if let Some(created) = meta.creation_timestamp {
            self.field("Created", &format!("{created} ({} ago)", age::since(Some(created), now)));
        }
    }

    fn events(&mut self, events: &[Event], now: Time) {
        if events.is_empty() {
            return self.field("Events", "<none>");
        }
        let mut sorted: Vec<&Event> = events.iter().collect();
        sorted.sort_by_key(|event| columns::last_seen(event).map(|time| (time.seconds, time.nanos)));
        let mut table = Table::new(&["Type", "Reason", "Age", "From", "Message"]);
        for event in sorted {
            let last = age::since(columns::last_seen(event), now);
            let first = age::since(event.first_timestamp.or(event.meta().creation_timestamp), now);
            let when = if event.count > 1 { format!("{last} (x{} over {first})", event.count) } else { last };
            let cells = [&event.r#type, &event.reason, &when, &columns::event_source(event), &event.message];
            table.row(cells.map(|cell| cell.trim_end().to_owned()));
        }
        self.within("Events", |page| page.table(&table));
    }
}

/// A pod with its events.
#[must_use]
pub fn pod(pod: &Pod, events: &[Event], now: Time) -> String {
    let mut page = Page { out: String::new(), depth: 0 };
    let (spec, status) = (pod.spec(), pod.status());
    page.meta(pod.meta(), now);
    page.field("UID", pod.uid());
    page.field("Node", pod.node_name().unwrap_or("<none>"));
    if !status.nominated_node_name.is_empty() {
        page.field("Nominated node", &status.nominated_node_name);
    }
    if let Some(deleted) = pod.meta().deletion_timestamp {
        let grace = pod.meta().deletion_grace_period_seconds.unwrap_or_default();
        page.field("Terminating", &format!("until {deleted} (grace period {grace} s)"));
    }
    page.field("Status", &summary(pod).status);
    page.field("Phase", pod.phase().as_str());
    for (name, value) in
        [("Reason", &status.reason), ("Message", &status.message), ("IP", &status.pod_ip), ("QoS", &status.qos_class)]
    {
        if !value.is_empty() {
            page.field(name, value);
        }
    }
    page.field("Restart policy", if spec.restart_policy.is_empty() { "Always" } else { &spec.restart_policy });
    if !spec.scheduler_name.is_empty() {
        page.field("Scheduler", &spec.scheduler_name);
    }
    if let Some(priority) = spec.priority {
        page.field("Priority", &format!("{priority} {}", spec.priority_class_name));
    }
    if let Ok(requests) = resources::pod_requests(spec) {
        page.field("Requests", &resources_line(&requests));
    }
    if !spec.init_containers.is_empty() {
        page.within("Init containers", |page| {
            containers(page, &spec.init_containers, &status.init_container_statuses, now)
        });
    }
    page.within("Containers", |page| containers(page, &spec.containers, &status.container_statuses, now));
    if !spec.ephemeral_containers.is_empty() {
        let debug: Vec<Container> = spec.ephemeral_containers.iter().map(|one| one.as_container()).collect();
        page.within("Debug containers", |page| containers(page, &debug, &status.ephemeral_container_statuses, now));
    }
    pod_conditions(&mut page, pod, now);
    if !spec.volumes.is_empty() {
        page.within("Volumes", |page| spec.volumes.iter().for_each(|one| page.field(&one.name, &volume(one))));
    }
    page.map("Node selector", &spec.node_selector);
    page.events(events, now);
    page.out
}

fn pod_conditions(page: &mut Page, pod: &Pod, now: Time) {
    if pod.status().conditions.is_empty() {
        return;
    }
    let mut table = Table::new(&["Type", "Status", "Since", "Reason", "Message"]);
    for one in &pod.status().conditions {
        let since = age::since(one.last_transition_time, now);
        table.row([one.r#type.clone(), one.status.clone(), since, one.reason.clone(), one.message.clone()]);
    }
    page.within("Conditions", |page| page.table(&table));
}

fn containers(page: &mut Page, containers: &[Container], statuses: &[ContainerStatus], now: Time) {
    for container in containers {
        let status = statuses.iter().find(|status| status.name == container.name);
        page.within(&container.name, |page| one_container(page, container, status, now));
    }
}

fn one_container(page: &mut Page, container: &Container, status: Option<&ContainerStatus>, now: Time) {
    page.field("Image", &container.image);
    if let Some(status) = status {
        for (name, value) in [("Image ID", &status.image_id), ("Container ID", &status.container_id)] {
            if !value.is_empty() {
                page.field(name, value);
            }
        }
    }
    for (name, words) in [("Command", &container.command), ("Args", &container.args)] {
        if !words.is_empty() {
            page.field(name, &words.join(" "));
        }
    }
    let ports: Vec<String> =
        container.ports.iter().map(|port| format!("{}/{}", port.container_port, port.protocol)).collect();
    if !ports.is_empty() {
        page.field("Ports", &ports.join(", "));
    }
    if let Some(status) = status {
        state(page, "State", status.state.as_ref(), now);
        if status.last_state.as_ref().is_some_and(|state| *state != ContainerState::default()) {
            state(page, "Last state", status.last_state.as_ref(), now);
        }
        page.field("Ready", if status.ready { "True" } else { "False" });
        page.field("Restarts", &status.restart_count.to_string());
    }
    amounts(page, "", container.resources.as_ref());
    // What is in force, where that is not what is written.
    let in_force = status.and_then(|status| status.resources.as_ref());
    if in_force.is_some() && in_force != container.resources.as_ref() {
        amounts(page, " in force", in_force);
    }
    if !container.env.is_empty() {
        page.within("Environment", |page| {
            container.env.iter().for_each(|one| page.field(&one.name, &environment(one)))
        });
    }
    for mount in &container.volume_mounts {
        let mode = if mount.read_only { "ro" } else { "rw" };
        page.field("Mount", &format!("{} from {} ({mode})", mount.mount_path, mount.name));
    }
}

fn amounts(page: &mut Page, suffix: &str, resources: Option<&ResourceRequirements>) {
    let Some(ResourceRequirements { limits, requests }) = resources else { return };
    for (name, map) in [("Limits", limits), ("Requests", requests)] {
        if !map.is_empty() {
            let pairs: Vec<String> = map.iter().map(|(name, amount)| format!("{name} {amount}")).collect();
            page.field(&format!("{name}{suffix}"), &pairs.join(", "));
        }
    }
}

fn state(page: &mut Page, name: &str, state: Option<&ContainerState>, now: Time) {
    let state = state.cloned().unwrap_or_default();
    if let Some(running) = state.running {
        page.field(name, &format!("Running for {}", age::since(running.started_at, now)));
    } else if let Some(ended) = state.terminated {
        let how = if ended.signal > 0 { format!(", signal {}", ended.signal) } else { String::new() };
        let when = age::since(ended.finished_at, now);
        page.field(name, &format!("Terminated {when} ago: {} (exit code {}{how})", ended.reason, ended.exit_code));
        if !ended.message.is_empty() {
            page.field("  Message", ended.message.trim_end());
        }
    } else {
        let waiting = state.waiting.unwrap_or_default();
        let text = [waiting.reason.as_str(), waiting.message.as_str()].join(" ");
        page.field(name, format!("Waiting {}", text.trim()).trim_end());
    }
}

fn environment(variable: &EnvVar) -> String {
    let Some(source) = &variable.value_from else { return variable.value.clone() };
    if let Some(field) = &source.field_ref {
        return format!("<field {}>", field.field_path);
    }
    if let Some(resource) = &source.resource_field_ref {
        return format!("<resource {} of {}>", resource.resource, resource.container_name);
    }
    if let Some(key) = &source.config_map_key_ref {
        return format!("<key {} of ConfigMap {}>", key.key, key.name);
    }
    source.secret_key_ref.as_ref().map_or_else(String::new, |key| format!("<key {} of Secret {}>", key.key, key.name))
}

fn volume(volume: &Volume) -> String {
    if let Some(empty) = &volume.empty_dir {
        let medium = if empty.medium.is_empty() { String::new() } else { format!(" in {}", empty.medium) };
        let limit = if empty.size_limit.is_empty() { String::new() } else { format!(", at most {}", empty.size_limit) };
        return format!("emptyDir{medium}{limit}");
    }
    if let Some(path) = &volume.host_path {
        return format!("hostPath {}", path.path);
    }
    if let Some(map) = &volume.config_map {
        return format!("ConfigMap {}", map.name);
    }
    if let Some(secret) = &volume.secret {
        return format!("Secret {}", secret.secret_name);
    }
    if let Some(image) = &volume.image {
        return format!("image {}", image.reference);
    }
    if volume.projected.is_some() { "projected" } else { "downward API" }.to_owned()
}

fn resources_line(resources: &Resources) -> String {
    // Every pod asks for one pod.
    let amounts = resources.iter().filter(|(name, amount)| *amount > 0 && *name != "pods");
    let words: Vec<String> =
        amounts.map(|(name, amount)| format!("{name} {}", resources::amount_text(name, amount))).collect();
    if words.is_empty() { "<none>".to_owned() } else { words.join(", ") }
}

/// A node with the pods on it and its events.
#[must_use]
pub fn node(node: &Node, pods: &[Pod], events: &[Event], now: Time) -> String {
    let mut page = Page { out: String::new(), depth: 0 };
    page.meta(node.meta(), now);
    page.field("Status", &columns::node_status(node));
    page.field("Unschedulable", &node.spec().unschedulable.to_string());
    let taint = |taint: &minipod_proto::v1::Taint| match taint.value.as_str() {
        "" => format!("{}:{}", taint.key, taint.effect),
        value => format!("{}={value}:{}", taint.key, taint.effect),
    };
    let taints: Vec<String> = node.spec().taints.iter().map(taint).collect();
    page.field("Taints", if taints.is_empty() { "<none>".to_owned() } else { taints.join(", ") }.as_str());
    page.field("Pod CIDR", &node.spec().pod_cidr);
    for address in &node.status().addresses {
        page.field(&address.r#type, &address.address);
    }
    if let Some(info) = &node.status().node_info {
        page.field("OS image", &info.os_image);
        page.field("Kernel", &format!("{} {}", info.kernel_version, info.architecture));
        page.field("Agent", &info.kubelet_version);
    }
    if !node.status().conditions.is_empty() {
        let mut table = Table::new(&["Type", "Status", "Since", "Reason", "Message"]);
        for one in &node.status().conditions {
            let since = age::since(one.last_transition_time, now);
            table.row([one.r#type.clone(), one.status.clone(), since, one.reason.clone(), one.message.clone()]);
        }
        page.within("Conditions", |page| page.table(&table));
    }
    node_resources(&mut page, node, pods);
    node_pods(&mut page, pods, now);
    page.events(events, now);
    page.out
}

/// Requests of the pods that are not over, beside what there is.
fn node_resources(page: &mut Page, node: &Node, pods: &[Pod]) {
    let mut used = Resources::default();
    let living: Vec<&Pod> = pods.iter().filter(|pod| !pod.is_terminal()).collect();
    for pod in &living {
        if let Ok(sum) = minipod_proto::resize::bound_requests(pod).and_then(|requests| used.checked_add(&requests)) {
            used = sum;
        }
    }
    let mut table = Table::new(&["Resource", "Capacity", "Allocatable", "Requested"]);
    for (name, allocatable) in &node.status().allocatable {
        let capacity = node.status().capacity.get(name).cloned().unwrap_or_default();
        let requested = match name.as_str() {
            "pods" => living.len().to_string(),
            name => resources::amount_text(name, used.get(name)),
        };
        table.row([name.clone(), capacity, allocatable.clone(), requested]);
    }
    page.within("Resources", |page| page.table(&table));
}

fn node_pods(page: &mut Page, pods: &[Pod], now: Time) {
    if pods.is_empty() {
        return page.field("Pods", "<none>");
    }
    let mut table = Table::new(&["Namespace", "Name", "Status", "Requests", "Age"]);
    for pod in pods {
        let requests =
            minipod_proto::resize::bound_requests(pod).map(|requests| resources_line(&requests)).unwrap_or_default();
        let age = age::since(pod.meta().creation_timestamp, now);
        table.row([pod.namespace().to_owned(), pod.name().to_owned(), summary(pod).status, requests, age]);
    }
    page.within("Pods", |page| page.table(&table));
}

/// A disruption budget with its events.
#[must_use]
pub fn budget(budget: &PodDisruptionBudget, events: &[Event], now: Time) -> String {
    let mut page = Page { out: String::new(), depth: 0 };
    let (spec, status) = (budget.spec(), budget.status.clone().unwrap_or_default());
    page.meta(budget.meta(), now);
    for (name, amount) in [("Min available", &spec.min_available), ("Max unavailable", &spec.max_unavailable)] {
        if let Some(amount) = amount {
            page.field(name, &amount.to_string());
        }
    }
    page.field("Selector", &columns::budget_selector(budget));
    let policy = &spec.unhealthy_pod_eviction_policy;
    page.field("Unhealthy pods", if policy.is_empty() { "IfHealthyBudget" } else { policy });
    page.within("Status", |page| {
        page.field("Allowed", &format!("{} disruptions", status.disruptions_allowed));
        page.field("Healthy", &format!("{} (want {})", status.current_healthy, status.desired_healthy));
        page.field("Pods", &status.expected_pods.to_string());
    });
    if !status.conditions.is_empty() {
        let mut table = Table::new(&["Type", "Status", "Since", "Reason", "Message"]);
        for one in &status.conditions {
            let since = age::since(one.last_transition_time, now);
            table.row([one.r#type.clone(), one.status.clone(), since, one.reason.clone(), one.message.clone()]);
        }
        page.within("Conditions", |page| page.table(&table));
    }
    page.events(events, now);
    page.out
}

/// Any other object: its metadata, its content as YAML (of a Secret only the sizes), its events.
#[must_use]
pub fn other(object: &Object, events: &[Event], now: Time) -> String {
    let mut page = Page { out: String::new(), depth: 0 };
    page.meta(object.meta(), now);
    if let Some(object::Kind::Secret(secret)) = &object.kind {
        page.field("Type", &secret.r#type);
        page.within("Data", |page| {
            secret.data.iter().for_each(|(key, value)| page.field(key, &format!("{} bytes", value.len())));
        });
        page.events(events, now);
        return page.out;
    }
    let mut bare = object.clone();
    if let Some(meta) = bare.meta_mut() {
        *meta = ObjectMeta::default();
    }
    // The printer quotes control characters itself.
    for line in minipod_proto::manifest::to_yaml(&bare).lines().filter(|line| !line.starts_with("metadata:")) {
        page.line(line);
    }
    page.events(events, now);
    page.out
}

#[cfg(test)]
mod tests {
    use minipod_proto::manifest;

    use super::*;

    const CASES: &str = include_str!("../../testdata/describe.txt");

    #[test]
    fn the_pages() {
        let mut checked = 0;
        for case in CASES.split("\n=====\n") {
            let (objects, expected) = case.split_once("\n-----\n").expect("objects and text");
            let objects: Vec<Object> = manifest::parse(objects).unwrap_or_else(|problems| panic!("{problems}\n{case}"));
            let now = Time::from_unix(1_790_000_000, 0);
            let (mut pods, mut events) = (Vec::new(), Vec::new());
            for object in &objects {
                match &object.kind {
                    Some(object::Kind::Pod(pod)) => pods.push(pod.clone()),
                    Some(object::Kind::Event(event)) => events.push(event.clone()),
                    _ => {}
                }
            }
            let found = match &objects[0].kind {
                Some(object::Kind::Pod(one)) => pod(one, &events, now),
                Some(object::Kind::Node(one)) => node(one, &pods, &events, now),
                Some(object::Kind::PodDisruptionBudget(one)) => budget(one, &events, now),
                _ => other(&objects[0], &events, now),
            };
            assert_eq!(found.trim_end(), expected.trim_end());
            checked += 1;
        }
        assert_eq!(checked, 4);
    }
}
