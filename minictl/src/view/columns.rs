//! The tables of `minictl get`, kind by kind.

use minipod_proto::selector::LabelSelector;
use minipod_proto::v1::{Event, IntOrString, Node, Object, Pod, PodDisruptionBudget, Time, object};
use minipod_proto::{Kind, Resource};

use super::age;
use super::pod_status::summary;
use super::table::Table;

/// What columns to show.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Columns {
    /// NAMESPACE first.
    pub namespace: bool,
    /// More columns.
    pub wide: bool,
    /// LABELS last.
    pub labels: bool,
}

/// An empty table for objects of a kind.
#[must_use]
pub fn table(kind: Kind, columns: Columns) -> Table {
    let mut header: Vec<&str> = Vec::new();
    if columns.namespace && kind.namespaced() {
        header.push("NAMESPACE");
    }
    let (narrow, wide): (&[&str], &[&str]) = match kind {
        Kind::Pod => (&["NAME", "READY", "STATUS", "RESTARTS", "AGE"], &["IP", "NODE"]),
        Kind::Node => (
            &["NAME", "STATUS", "AGE", "VERSION"],
            &["INTERNAL-IP", "POD-CIDR", "CPU", "MEMORY", "OS-IMAGE", "KERNEL-VERSION"],
        ),
        Kind::Namespace => (&["NAME", "STATUS", "AGE"], &[]),
        Kind::Event => (&["LAST SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"], &["SOURCE", "COUNT", "NAME"]),
        Kind::ConfigMap => (&["NAME", "DATA", "AGE"], &[]),
        Kind::Secret => (&["NAME", "TYPE", "DATA", "AGE"], &[]),
        Kind::PriorityClass => (&["NAME", "VALUE", "GLOBAL-DEFAULT", "AGE", "PREEMPTIONPOLICY"], &[]),
        Kind::PodDisruptionBudget => (
            &["NAME", "MIN AVAILABLE", "MAX UNAVAILABLE", "ALLOWED DISRUPTIONS", "AGE"],
            &["HEALTHY", "DESIRED", "EXPECTED", "SELECTOR"],
        ),
    };
    header.extend(narrow);
    if columns.wide {
        header.extend(wide);
    }
    if columns.labels {
        header.push("LABELS");
    }
    Table::new(&header)
}

/// The object's row; its order is that of [`table`]'s header.
#[must_use]
pub fn row(object: &Object, columns: Columns, now: Time) -> Vec<String> {
    let meta = object.meta();
    let mut cells = Vec::new();
    if columns.namespace && object.kind_of().is_some_and(Kind::namespaced) {
        cells.push(meta.namespace.clone());
    }
    let name = meta.name.clone();
    let old = age::since(meta.creation_timestamp, now);
    let wide = match &object.kind {
        Some(object::Kind::Pod(pod)) => {
            cells.extend(pod_cells(pod, now));
            vec![or_none(&pod.status().pod_ip), or_none(&pod.spec().node_name)]
        }
        Some(object::Kind::Node(node)) => {
            cells.extend([name, node_status(node), old, or_none(&node_info(node, |info| &info.kubelet_version))]);
            node_wide(node)
        }
        Some(object::Kind::Namespace(namespace)) => {
            let phase = namespace.status.as_ref().map(|status| status.phase.clone()).filter(|phase| !phase.is_empty());
            cells.extend([name, phase.unwrap_or_else(|| "Active".to_owned()), old]);
            Vec::new()
        }
        Some(object::Kind::Event(event)) => {
            cells.extend(event_cells(event, now));
            vec![event_source(event), event.count.max(1).to_string(), name]
        }
        Some(object::Kind::ConfigMap(map)) => {
            cells.extend([name, (map.data.len() + map.binary_data.len()).to_string(), old]);
            Vec::new()
        }
        Some(object::Kind::Secret(secret)) => {
            cells.extend([name, secret.r#type.clone(), secret.data.len().to_string(), old]);
            Vec::new()
        }
        Some(object::Kind::PriorityClass(class)) => {
            let policy = Some(class.preemption_policy.clone()).filter(|policy| !policy.is_empty());
            let policy = policy.unwrap_or_else(|| "PreemptLowerPriority".to_owned());
            cells.extend([name, class.value.to_string(), class.global_default.to_string(), old, policy]);
            Vec::new()
        }
        Some(object::Kind::PodDisruptionBudget(budget)) => {
            let amount = |amount: &Option<IntOrString>| amount.as_ref().map_or("N/A".to_owned(), ToString::to_string);
            let (spec, status) = (budget.spec(), budget.status.clone().unwrap_or_default());
            let (least, most) = (amount(&spec.min_available), amount(&spec.max_unavailable));
            cells.extend([name, least, most, status.disruptions_allowed.to_string(), old]);
            let counts = [status.current_healthy, status.desired_healthy, status.expected_pods];
            counts.iter().map(ToString::to_string).chain([budget_selector(budget)]).collect()
        }
        None => Vec::new(),
    };
    if columns.wide {
        cells.extend(wide);
    }
    if columns.labels {
        let labels: Vec<String> = meta.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        cells.push(or_none(&labels.join(",")));
    }
    cells
}

fn pod_cells(pod: &Pod, now: Time) -> [String; 5] {
    let summary = summary(pod);
    [
        pod.name().to_owned(),
        format!("{}/{}", summary.ready, summary.total),
        summary.status.clone(),
        summary.restarts_text(now),
        age::since(pod.meta().creation_timestamp, now),
    ]
}

/// `Ready`, `NotReady` or `Unknown`, and whether it is cordoned.
#[must_use]
pub fn node_status(node: &Node) -> String {
    let ready = match node.condition("Ready").map(|condition| condition.status.as_str()) {
        Some("True") => "Ready",
        Some("False") => "NotReady",
        _ => "Unknown",
    };
    if node.spec().unschedulable { format!("{ready},SchedulingDisabled") } else { ready.to_owned() }
}

fn node_info(node: &Node, field: impl Fn(&minipod_proto::v1::NodeSystemInfo) -> &String) -> String {
    node.status().node_info.as_ref().map(|info| field(info).clone()).unwrap_or_default()
}

fn node_wide(node: &Node) -> Vec<String> {
    let allocatable = |resource: &str| or_none(node.status().allocatable.get(resource).map_or("", String::as_str));
    vec![
        or_none(node.address("InternalIP").unwrap_or_default()),
        or_none(&node.spec().pod_cidr),
        allocatable("cpu"),
        allocatable("memory"),
        or_none(&node_info(node, |info| &info.os_image)),
        or_none(&node_info(node, |info| &info.kernel_version)),
    ]
}

/// When an event was last seen.
#[must_use]
pub fn last_seen(event: &Event) -> Option<Time> {
    let series = event.series.as_ref().and_then(|series| series.last_observed_time);
    let micro = |time: minipod_proto::v1::MicroTime| Time { seconds: time.seconds, nanos: time.nanos };
    let times = [series.map(micro), event.last_timestamp, event.event_time.map(micro), event.first_timestamp];
    times.into_iter().flatten().next().or(event.meta().creation_timestamp)
}

/// Who says it.
#[must_use]
pub fn event_source(event: &Event) -> String {
    let source = event.source.clone().unwrap_or_default();
    let component = if source.component.is_empty() { event.reporting_component.clone() } else { source.component };
    if source.host.is_empty() { component } else { format!("{component}, {}", source.host) }
}

fn event_cells(event: &Event, now: Time) -> [String; 5] {
    let about = event.involved_object.clone().unwrap_or_default();
    [
        age::since(last_seen(event), now),
        event.r#type.clone(),
        event.reason.clone(),
        format!("{}/{}", about.kind.to_ascii_lowercase(), about.name),
        event.message.trim_end().to_owned(),
    ]
}

/// What the pods of a budget have in common.
#[must_use]
pub fn budget_selector(budget: &PodDisruptionBudget) -> String {
    match budget.spec().selector.as_ref().map(LabelSelector::from_message) {
        None => "<none>".to_owned(),
        Some(Ok(all)) if all.is_everything() => "<all>".to_owned(),
        Some(Ok(selector)) => selector.to_string(),
        Some(Err(error)) => error.to_string(),
    }
}

fn or_none(text: &str) -> String {
    if text.is_empty() { "<none>".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use minipod_proto::manifest;

    use super::*;

    const NOW: i64 = 1_790_000_000;

    /// Objects as YAML, then what `get` prints of them, narrow and wide.
    const CASES: &str = include_str!("../../testdata/get.txt");

    #[test]
    fn the_tables() {
        let mut checked = 0;
        for case in CASES.split("\n=====\n") {
            let mut parts = case.splitn(3, "\n-----\n");
            let (objects, narrow) = (parts.next().unwrap(), parts.next().expect("a narrow table"));
            let wide = parts.next().expect("a wide table");
            let objects: Vec<Object> = manifest::parse(objects).unwrap_or_else(|problems| panic!("{problems}\n{case}"));
            let kind = objects[0].kind_of().unwrap();
            for (columns, expected) in
                [(Columns::default(), narrow), (Columns { namespace: true, wide: true, labels: true }, wide)]
            {
                let mut table = table(kind, columns);
                for object in &objects {
                    table.row(row(object, columns, Time::from_unix(NOW, 0)));
                }
                assert_eq!(table.render(true).trim_end(), expected.trim_end(), "{columns:?}");
                checked += 1;
            }
        }
        assert_eq!(checked, 16);
    }
}
