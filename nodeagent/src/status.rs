//! From the planner's view to the API's pod status.

use std::collections::BTreeMap;

use minipod_proto::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    ContainerUser, HostIp, LinuxContainerUser, Pod, PodCondition, PodIp, PodSpec, PodStatus, Time, VolumeMount,
    VolumeMountStatus,
};

use crate::container::process::signal_name;
use crate::execute::Begun;
use crate::plan::model::{Ended, Kind};
use crate::plan::view::{ConditionView, ContainerView, PodView, StateView};
use crate::want::{any_container, find_container};

/// Most bytes of termination messages in one pod's status, each container having the same share.
const MAX_MESSAGES_BYTES: usize = 12 << 10;

/// What the status tells beside the planner's view.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// The node's address.
    pub host_ip: String,
    /// The pod's address; empty before it has one.
    pub pod_ip: String,
    /// When this node took the pod on.
    pub start_wall_ms: u64,
    /// By container.
    pub containers: BTreeMap<String, Known>,
}

/// What is known of a container beside its states.
#[derive(Debug, Clone, Default)]
pub struct Known {
    /// The image's digest.
    pub image_id: String,
    /// Of its newest run.
    pub begun: Option<Box<Begun>>,
}

/// The status to report. Condition times are kept from `previous` where the condition stays the same; conditions that
/// are not this agent's (PodScheduled, readiness gates) are kept as they are in the pod.
#[must_use]
pub fn pod_status(pod: &Pod, view: &PodView, facts: &Facts, previous: &PodStatus, now_wall_ms: u64) -> PodStatus {
    let stored = pod.status.clone().unwrap_or_default();
    let of = |belongs: fn(Kind) -> bool| {
        view.containers
            .iter()
            .filter(|container| belongs(container.kind))
            .map(|container| container_status(pod, container, facts))
            .collect()
    };
    let ips = |ip: &String| (!ip.is_empty()).then(|| ip.clone());
    PodStatus {
        observed_generation: pod.metadata.as_ref().map_or(0, |meta| meta.generation),
        phase: view.phase.as_str().to_owned(),
        conditions: conditions(pod, view, &stored, previous, now_wall_ms),
        message: view.message.clone(),
        reason: view.reason.clone(),
        nominated_node_name: stored.nominated_node_name,
        host_ip: facts.host_ip.clone(),
        host_ips: ips(&facts.host_ip).map(|ip| HostIp { ip }).into_iter().collect(),
        pod_ip: facts.pod_ip.clone(),
        pod_ips: ips(&facts.pod_ip).map(|ip| PodIp { ip }).into_iter().collect(),
        start_time: Some(time(facts.start_wall_ms)),
        init_container_statuses: of(Kind::is_of_init_list),
        container_statuses: of(|kind| kind == Kind::App),
        ephemeral_container_statuses: of(|kind| kind == Kind::Debug),
        qos_class: stored.qos_class,
        ..PodStatus::default()
    }
}

/// Milliseconds since the epoch as the API's time; JSON shows whole seconds.
#[must_use]
pub fn time(wall_ms: u64) -> Time {
    Time::from_unix_ms(i64::try_from(wall_ms).unwrap_or(i64::MAX))
}

/// The same time, or none for a moment that never was.
fn moment(wall_ms: u64) -> Option<Time> {
    (wall_ms > 0).then(|| time(wall_ms))
}

fn conditions(
    pod: &Pod,
    view: &PodView,
    stored: &PodStatus,
    previous: &PodStatus,
    now_wall_ms: u64,
) -> Vec<PodCondition> {
    let generation = pod.metadata.as_ref().map_or(0, |meta| meta.generation);
    let ours = |kind: &str| view.conditions.iter().any(|condition| condition.kind == kind);
    let mut out: Vec<PodCondition> = view
        .conditions
        .iter()
        .map(|condition| {
            let condition = match condition.kind {
                "Ready" if condition.status => gated(pod, stored, condition),
                _ => condition.clone(),
            };
            let status = if condition.status { "True" } else { "False" };
            let before = previous
                .conditions
                .iter()
                .chain(&stored.conditions)
                .find(|before| before.r#type == condition.kind && before.status == status);
            PodCondition {
                r#type: condition.kind.to_owned(),
                observed_generation: generation,
                status: status.to_owned(),
                last_probe_time: None,
                last_transition_time: before
                    .and_then(|before| before.last_transition_time)
                    .or_else(|| Some(time(now_wall_ms))),
                reason: condition.reason.to_owned(),
                message: condition.message,
            }
        })
        .collect();
    // What is not under way any more is not told.
    let over = |kind: &str| kind == minipod_proto::resize::IN_PROGRESS;
    let foreign = |condition: &&PodCondition| !ours(&condition.r#type) && !over(&condition.r#type);
    out.extend(stored.conditions.iter().filter(foreign).cloned());
    out
}

/// A pod is Ready when its containers are and every readiness gate is True; a missing one is False.
fn gated(pod: &Pod, stored: &PodStatus, ready: &ConditionView) -> ConditionView {
    let gates = pod.spec.iter().flat_map(|spec| &spec.readiness_gates);
    let is_open = |kind: &str| stored.conditions.iter().any(|other| other.r#type == kind && other.status == "True");
    let closed: Vec<&str> =
        gates.map(|gate| gate.condition_type.as_str()).filter(|condition_type| !is_open(condition_type)).collect();
    if closed.is_empty() {
        return ready.clone();
    }
    let message = format!("corresponding condition of pod readiness gate is not True: [{}]", closed.join(" "));
    ConditionView { kind: ready.kind, status: false, reason: "ReadinessGatesNotReady", message }
}

fn container_status(pod: &Pod, view: &ContainerView, facts: &Facts) -> ContainerStatus {
    let state = match &view.state {
        StateView::Waiting { reason, message } => ContainerState {
            waiting: Some(ContainerStateWaiting { reason: reason.clone(), message: message.clone() }),
            ..ContainerState::default()
        },
        StateView::Running { started_wall_ms } => ContainerState {
            running: Some(ContainerStateRunning { started_at: moment(*started_wall_ms) }),
            ..ContainerState::default()
        },
        StateView::Terminated(ended) => terminated(pod, view, ended, view.restarts),
    };
    let last_attempt = match view.state {
        StateView::Waiting { .. } => view.restarts,
        _ => view.restarts.saturating_sub(1),
    };
    let stated = find_container(pod, &view.name).and_then(|container| container.resources.as_ref());
    let known = facts.containers.get(&view.name);
    let begun = known.and_then(|known| known.begun.as_deref());
    let ran = view.last.is_some() || !matches!(view.state, StateView::Waiting { .. });
    ContainerStatus {
        name: view.name.clone(),
        state: Some(state),
        last_state: view.last.as_ref().map(|ended| terminated(pod, view, ended, last_attempt)),
        ready: view.ready,
        restart_count: i32::try_from(view.restarts).unwrap_or(i32::MAX),
        image: view.image.clone(),
        image_id: known.map(|known| known.image_id.clone()).unwrap_or_default(),
        container_id: if ran { container_id(pod, &view.name, view.restarts) } else { String::new() },
        started: Some(view.started),
        allocated_resources: stated.map(|stated| stated.requests.clone()).unwrap_or_default(),
        stop_signal: begun.map_or_else(String::new, |begun| signal_name(begun.stop_signal)),
        volume_mounts: if ran {
            any_container(pod, &view.name).map_or_else(Vec::new, |of| mounts(&of))
        } else {
            Vec::new()
        },
        user: begun.map(user),
        resources: stated.map(|stated| view.applied.map_or_else(|| stated.clone(), |has| has.within(stated))),
    }
}

/// As whom its first process began.
fn user(begun: &Begun) -> ContainerUser {
    let linux = LinuxContainerUser {
        uid: Some(begun.uid.into()),
        gid: Some(begun.gid.into()),
        supplemental_groups: begun.groups.iter().map(|group| (*group).into()).collect(),
    };
    ContainerUser { linux: Some(linux) }
}

/// Where its volumes are, and how far a read-only one goes down: every kernel that runs pods can do what IfPossible asks for.
fn mounts(container: &Container) -> Vec<VolumeMountStatus> {
    let status = |mount: &VolumeMount| {
        let all = matches!(mount.recursive_read_only.as_str(), "Enabled" | "IfPossible");
        VolumeMountStatus {
            name: mount.name.clone(),
            mount_path: mount.mount_path.clone(),
            read_only: mount.read_only,
            recursive_read_only: match (mount.read_only, all) {
                (false, _) => String::new(),
                (true, true) => "Enabled".to_owned(),
                (true, false) => "Disabled".to_owned(),
            },
        }
    };
    container.volume_mounts.iter().map(status).collect()
}

fn terminated(pod: &Pod, view: &ContainerView, ended: &Ended, attempt: u32) -> ContainerState {
    let terminated = ContainerStateTerminated {
        exit_code: ended.exit_code,
        signal: ended.signal,
        reason: ended.reason.clone(),
        message: shortened(&ended.message, message_share(pod)).to_owned(),
        started_at: moment(ended.started_wall_ms),
        finished_at: moment(ended.finished_wall_ms),
        container_id: container_id(pod, &view.name, attempt),
    };
    ContainerState { terminated: Some(terminated), ..ContainerState::default() }
}

/// Bytes that each container may say at its end, as the kubelet reckons.
fn message_share(pod: &Pod) -> usize {
    let count = |spec: &PodSpec| spec.init_containers.len() + spec.containers.len() + spec.ephemeral_containers.len();
    MAX_MESSAGES_BYTES / pod.spec.as_ref().map_or(1, count).max(1)
}

/// The beginning of a text, in whole characters.
fn shortened(text: &str, max_bytes: usize) -> &str {
    &text[..text.floor_char_boundary(max_bytes)]
}

/// A container's run, unique in the cluster.
fn container_id(pod: &Pod, name: &str, attempt: u32) -> String {
    let uid = pod.metadata.as_ref().map_or("", |meta| meta.uid.as_str());
    format!("minipod://{uid}/{name}/{attempt}")
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::{ObjectMeta, PodReadinessGate};

    use super::*;
    use crate::plan::view::Phase;

    fn view(status: bool) -> PodView {
        let reason = if status { "" } else { "ContainersNotReady" };
        let condition = |kind| ConditionView { kind, status, reason, message: String::new() };
        PodView {
            phase: Phase::Running,
            conditions: vec![condition("Ready"), condition("ContainersReady")],
            ..PodView::default()
        }
    }

    fn pod_with(conditions: &[(&str, &str)], gates: &[&str]) -> Pod {
        let condition = |(kind, status): &(&str, &str)| PodCondition {
            r#type: (*kind).into(),
            status: (*status).into(),
            last_transition_time: Some(time(5_000)),
            ..PodCondition::default()
        };
        let gate = |kind: &&str| PodReadinessGate { condition_type: (*kind).into() };
        Pod {
            metadata: Some(ObjectMeta { uid: "u".into(), ..ObjectMeta::default() }),
            spec: Some(PodSpec { readiness_gates: gates.iter().map(gate).collect(), ..PodSpec::default() }),
            status: Some(PodStatus {
                conditions: conditions.iter().map(condition).collect(),
                qos_class: "Burstable".into(),
                ..PodStatus::default()
            }),
            ..Pod::default()
        }
    }

    #[test]
    fn transition_times_change_with_the_status_only_and_foreign_conditions_stay() {
        let pod = pod_with(&[("PodScheduled", "True")], &[]);
        let facts = Facts::default();
        let first = pod_status(&pod, &view(false), &facts, &PodStatus::default(), 10_000);
        let second = pod_status(&pod, &view(false), &facts, &first, 20_000);
        let third = pod_status(&pod, &view(true), &facts, &second, 30_000);
        let times = |status: &PodStatus| {
            status.conditions.iter().map(|c| c.last_transition_time.map_or(0, |t| t.seconds)).collect::<Vec<_>>()
        };
        assert_eq!(times(&first), [10, 10, 5]);
        assert_eq!(times(&second), [10, 10, 5]);
        assert_eq!(times(&third), [30, 30, 5]);
        assert_eq!(third.conditions[2].r#type, "PodScheduled");
        assert_eq!(third.qos_class, "Burstable");
    }

    #[test]
    fn last_words_of_many_containers_share_the_room() {
        let mut pod = pod_with(&[], &[]);
        for (containers, bytes) in [(1, 4096), (3, 4096), (4, 3072), (5, 2456)] {
            let spec = pod.spec.get_or_insert_default();
            spec.containers = vec![Container::default(); containers];
            // Two bytes a character: none is cut through.
            let ended = Ended { message: "ö".repeat(2048), ..Ended::default() };
            let view = ContainerView {
                name: String::new(),
                kind: Kind::App,
                state: StateView::Terminated(ended.clone()),
                last: None,
                ready: false,
                started: false,
                restarts: 0,
                applied: None,
                image: String::new(),
            };
            let told = terminated(&pod, &view, &ended, 0).terminated.expect("terminated");
            assert_eq!(told.message.len(), bytes, "{containers} containers");
        }
    }

    #[test]
    fn a_readiness_gate_holds_ready_back() {
        let status = |pod: &Pod| {
            let status = pod_status(pod, &view(true), &Facts::default(), &PodStatus::default(), 1);
            (status.conditions[0].status.clone(), status.conditions[1].status.clone())
        };
        assert_eq!(status(&pod_with(&[], &["example.com/up"])), ("False".into(), "True".into()));
        assert_eq!(
            status(&pod_with(&[("example.com/up", "True")], &["example.com/up"])),
            ("True".into(), "True".into())
        );
    }
}
