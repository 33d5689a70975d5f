//! Why a pod is where it is, or why it is nowhere: `minictl why`.

use std::fmt::Write as _;

use minipod_proto::Resource;
use minipod_proto::v1::{ContainerStatus, Event, Pod, Time};

use super::pod_status::summary;
use super::{age, columns, text};

/// Events that are shown: the newest.
const EVENTS: usize = 10;

/// What a person wants to know about a pod that does not do what they want. `told` is what its scheduler says now, as lines; without
/// it stands what the scheduler wrote into the pod.
#[must_use]
pub fn why(pod: &Pod, told: Option<&str>, events: &[Event], now: Time) -> String {
    let mut out = String::new();
    let place = match pod.node_name() {
        Some(node) => format!("on {node}"),
        None => "on no node".to_owned(),
    };
    line(&mut out, 0, &format!("pod {}: {}, {place}", pod.key(), summary(pod).status));
    scheduling(&mut out, pod, told, now);
    containers(&mut out, pod);
    conditions(&mut out, pod, now);
    if !pod.status().message.is_empty() {
        line(&mut out, 0, &format!("status: {}", pod.status().message));
    }
    let mut newest: Vec<&Event> = events.iter().collect();
    newest.sort_by_key(|event| std::cmp::Reverse(columns::last_seen(event).map(|time| (time.seconds, time.nanos))));
    if !newest.is_empty() {
        line(&mut out, 0, "events, newest first:");
    }
    for event in newest.into_iter().take(EVENTS) {
        let times = if event.count > 1 { format!(" ({} times)", event.count) } else { String::new() };
        let seen = age::since(columns::last_seen(event), now);
        line(&mut out, 1, &format!("{seen} ago{times}: {}: {}", event.reason, event.message.trim_end()));
    }
    out
}

/// Why no node was found, one line for every node, as the scheduler wrote it.
fn scheduling(out: &mut String, pod: &Pod, told: Option<&str>, now: Time) {
    let scheduled = pod.condition("PodScheduled");
    if pod.node_name().is_some() {
        return;
    }
    let Some(condition) = scheduled.filter(|condition| condition.status != "True") else {
        let gates: Vec<&str> = pod.spec().scheduling_gates.iter().map(|gate| gate.name.as_str()).collect();
        let scheduler = Some(pod.spec().scheduler_name.as_str()).filter(|name| !name.is_empty());
        let text = match gates.as_slice() {
            [] => {
                format!("scheduler {} has not looked at it yet: does it run?", scheduler.unwrap_or("default-scheduler"))
            }
            gates => format!("its scheduling gates are closed: {}", gates.join(", ")),
        };
        line(out, 0, &text);
        told.into_iter().flat_map(str::lines).for_each(|text| line(out, 1, text));
        return;
    };
    let since = age::since(condition.last_transition_time, now);
    line(out, 0, &format!("not scheduled for {since}: {}", condition.reason));
    if let Some(told) = told {
        told.lines().for_each(|text| line(out, 1, text));
        return;
    }
    let (head, nodes) = condition.message.split_once(": ").unwrap_or((condition.message.as_str(), ""));
    line(out, 1, head);
    for node in nodes.split("; ").map(str::trim).filter(|node| !node.is_empty()) {
        line(out, 2, node);
    }
}

/// The containers that do not simply run or have ended well.
fn containers(out: &mut String, pod: &Pod) {
    let status = pod.status();
    for (what, container) in (status.init_container_statuses.iter().map(|container| ("init container", container)))
        .chain(status.container_statuses.iter().map(|container| ("container", container)))
    {
        if let Some(text) = container_trouble(container) {
            line(out, 0, &format!("{what} {}: {text}", container.name));
        }
    }
}

fn container_trouble(container: &ContainerStatus) -> Option<String> {
    let state = container.state.clone().unwrap_or_default();
    let last = container.last_state.as_ref().and_then(|state| state.terminated.as_ref());
    let ended = |ended: &minipod_proto::v1::ContainerStateTerminated| {
        let how = if ended.signal > 0 {
            format!("signal {}", ended.signal)
        } else {
            format!("exit code {}", ended.exit_code)
        };
        let message = if ended.message.is_empty() { String::new() } else { format!(": {}", ended.message.trim_end()) };
        format!("{} ({how}){message}", ended.reason)
    };
    let before = last.map(|last| format!("; before: {}", ended(last))).unwrap_or_default();
    if let Some(waiting) = state.waiting {
        let message = if waiting.message.is_empty() { String::new() } else { format!(": {}", waiting.message) };
        let reason = if waiting.reason.is_empty() { "waiting" } else { waiting.reason.as_str() };
        return Some(format!("{reason}{message}{before}"));
    }
    if let Some(terminated) = state.terminated {
        return (terminated.exit_code != 0).then(|| format!("ended: {}", ended(&terminated)));
    }
    (state.running.is_some() && !container.ready).then(|| format!("runs, not ready{before}"))
}

/// Conditions that are not True and say why.
fn conditions(out: &mut String, pod: &Pod, now: Time) {
    let told = |kind: &str| kind == "PodScheduled" && pod.node_name().is_none();
    for condition in
        pod.status().conditions.iter().filter(|condition| condition.status != "True" && !told(&condition.r#type))
    {
        if condition.reason.is_empty() && condition.message.is_empty() {
            continue;
        }
        let since = age::since(condition.last_transition_time, now);
        let detail = [condition.reason.as_str(), condition.message.as_str()].join(" ");
        line(out, 0, &format!("not {} for {since}: {}", condition.r#type, detail.trim()));
    }
}

fn line(out: &mut String, depth: usize, content: &str) {
    let _ = writeln!(out, "{}{}", "  ".repeat(depth), text::line(content));
}

#[cfg(test)]
mod tests {
    use minipod_proto::manifest;
    use minipod_proto::v1::{Object, object};

    use super::*;

    const CASES: &str = include_str!("../../testdata/why.txt");

    #[test]
    fn the_table_of_reasons() {
        let mut checked = 0;
        for case in CASES.split("\n=====\n") {
            let (objects, expected) = case.split_once("\n-----\n").expect("objects and text");
            let objects: Vec<Object> = manifest::parse(objects).unwrap_or_else(|problems| panic!("{problems}\n{case}"));
            let pod = objects[0].as_pod().expect("the pod first");
            let events: Vec<Event> = objects
                .iter()
                .filter_map(|object| match &object.kind {
                    Some(object::Kind::Event(event)) => Some(event.clone()),
                    _ => None,
                })
                .collect();
            assert_eq!(why(pod, None, &events, Time::from_unix(1_790_000_000, 0)).trim_end(), expected.trim_end());
            checked += 1;
        }
        assert_eq!(checked, 4);
    }
}
