//! The columns READY, STATUS and RESTARTS of a pod, as kubectl computes them (kubernetes/kubernetes, pkg/printers/internalversion, printPod).

use minipod_proto::v1::{Container, ContainerState, ContainerStateTerminated, ContainerStatus, Pod, Time};

use super::age;

/// A pod in three columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Containers that are ready: apps and sidecars.
    pub ready: usize,
    /// Containers that may be ready.
    pub total: usize,
    /// One word for what it is doing, such as `Init:1/3` or `CrashLoopBackOff`.
    pub status: String,
    /// How often its containers were started again.
    pub restarts: i64,
    /// When the last of them had ended before its restart.
    pub last_restart: Option<Time>,
}

impl Summary {
    /// The column RESTARTS: `2 (5m ago)`.
    #[must_use]
    pub fn restarts_text(&self, now: Time) -> String {
        match self.last_restart {
            Some(_) if self.restarts > 0 => format!("{} ({} ago)", self.restarts, age::since(self.last_restart, now)),
            _ => self.restarts.to_string(),
        }
    }
}

/// Sums up a pod.
#[must_use]
pub fn summary(pod: &Pod) -> Summary {
    let (spec, status) = (pod.spec(), pod.status());
    let sidecars = spec.init_containers.iter().filter(|container| container.is_sidecar()).count();
    let mut summary = Summary {
        ready: 0,
        total: spec.containers.len() + sidecars,
        status: status.phase.clone(),
        restarts: 0,
        last_restart: None,
    };
    if summary.status.is_empty() {
        summary.status = "Pending".to_owned();
    }
    if !status.reason.is_empty() {
        summary.status.clone_from(&status.reason);
    }
    if pod.condition("PodScheduled").is_some_and(|condition| condition.reason == "SchedulingGated") {
        summary.status = "SchedulingGated".to_owned();
    }
    let initializing = init_containers(pod, &mut summary);
    if !initializing || pod.condition_true("Initialized") {
        app_containers(pod, &mut summary);
    }
    // How its containers came to their end is less than why.
    if status.reason == "Evicted" {
        summary.status.clone_from(&status.reason);
    }
    if pod.is_terminating() {
        if status.reason == "NodeLost" {
            summary.status = "Unknown".to_owned();
        } else if !pod.is_terminal() {
            summary.status = "Terminating".to_owned();
        }
    }
    summary
}

/// Whether one of them still holds up the pod.
fn init_containers(pod: &Pod, summary: &mut Summary) -> bool {
    let spec = pod.spec();
    let mut restarts = 0;
    let mut sidecar_restarts = 0;
    let mut word = None;
    for (index, status) in pod.status().init_container_statuses.iter().enumerate() {
        let container = spec.init_containers.iter().find(|container| container.name == status.name);
        let sidecar = container.is_some_and(Container::is_sidecar);
        restarts += i64::from(status.restart_count);
        sidecar_restarts += if sidecar { i64::from(status.restart_count) } else { 0 };
        if summary.last_restart.is_none_or(|last| last_end(status).is_some_and(|end| later(end, last))) {
            summary.last_restart = last_end(status).or(summary.last_restart);
        }
        if word.is_some() {
            continue;
        }
        let state = status.state.clone().unwrap_or_default();
        match (state.terminated, waiting_reason(status)) {
            (Some(ended), _) if ended.exit_code == 0 => {}
            _ if sidecar && status.started == Some(true) => summary.ready += usize::from(status.ready),
            (Some(ended), _) => word = Some(format!("Init:{}", end_word(&ended))),
            (None, reason) if !reason.is_empty() && reason != "PodInitializing" => {
                word = Some(format!("Init:{reason}"))
            }
            _ => word = Some(format!("Init:{index}/{}", spec.init_containers.len())),
        }
    }
    // While the apps have not started, the init containers' restarts are the pod's; afterwards only the sidecars' count.
    summary.restarts = if word.is_some() { restarts } else { sidecar_restarts };
    let initializing = word.is_some();
    if let Some(word) = word {
        if pod.condition_true("Initialized") {
            summary.restarts = sidecar_restarts;
        }
        summary.status = word;
    }
    initializing
}

fn app_containers(pod: &Pod, summary: &mut Summary) {
    let mut running = false;
    // The first container's word wins: it is written last.
    for status in pod.status().container_statuses.iter().rev() {
        summary.restarts += i64::from(status.restart_count);
        if summary.last_restart.is_none_or(|last| last_end(status).is_some_and(|end| later(end, last))) {
            summary.last_restart = last_end(status).or(summary.last_restart);
        }
        let ContainerState { running: runs, terminated, .. } = status.state.clone().unwrap_or_default();
        let reason = waiting_reason(status);
        if !reason.is_empty() {
            reason.clone_into(&mut summary.status);
        } else if let Some(ended) = terminated {
            summary.status = end_word(&ended);
        } else if status.ready && runs.is_some() {
            running = true;
            summary.ready += 1;
        }
    }
    // One container has ended well and others run on.
    if running && summary.status == "Completed" {
        summary.status = if pod.condition_true("Ready") { "Running" } else { "NotReady" }.to_owned();
    }
}

fn waiting_reason(status: &ContainerStatus) -> &str {
    let waiting = status.state.as_ref().and_then(|state| state.waiting.as_ref());
    waiting.map_or("", |waiting| waiting.reason.as_str())
}

fn end_word(ended: &ContainerStateTerminated) -> String {
    match (ended.reason.as_str(), ended.signal) {
        ("", 0) => format!("ExitCode:{}", ended.exit_code),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

fn last_end(status: &ContainerStatus) -> Option<Time> {
    status.last_state.as_ref()?.terminated.as_ref()?.finished_at
}

fn later(one: Time, other: Time) -> bool {
    (one.seconds, one.nanos) > (other.seconds, other.nanos)
}

#[cfg(test)]
mod tests {
    use minipod_proto::Resource;
    use minipod_proto::v1::{ContainerStateRunning, ContainerStateWaiting, PodCondition, PodSpec, PodStatus};

    use super::*;

    /// A pod in a line: `phase=P [reason=R] [deleted] [gated] [Initialized] [Ready] init:SPEC… app:SPEC…`.
    /// A container: `wait[=reason]`, `run` (not ready), `ready`, `end=code[/reason][*signal]`, then `^restarts`, and `~` before it for a sidecar (`!`: started).
    const TABLE: &str = "
        phase=Pending                                                       | 0/0 Pending 0
        phase=Pending app:wait                                              | 0/1 Pending 0
        phase=Pending gated app:wait                                        | 0/1 SchedulingGated 0
        phase=Pending app:wait=ContainerCreating app:wait=ErrImageNeverPull | 0/2 ContainerCreating 0
        phase=Pending init:run init:wait=PodInitializing init:wait=PodInitializing app:wait=PodInitializing | 0/1 Init:0/3 0
        phase=Pending init:end=0/Completed init:run init:wait=PodInitializing app:wait=PodInitializing      | 0/1 Init:1/3 0
        phase=Pending init:end=0/Completed init:end=1/Error^1 app:wait=PodInitializing   | 0/1 Init:Error 1
        phase=Pending init:wait=CrashLoopBackOff^3 app:wait=PodInitializing              | 0/1 Init:CrashLoopBackOff 3
        phase=Pending init:end=7 app:wait=PodInitializing                                | 0/1 Init:ExitCode:7 0
        phase=Pending init:end=137*9 app:wait=PodInitializing                            | 0/1 Init:Signal:9 0
        phase=Pending init:end=0/Completed^2 app:wait=PodInitializing                    | 0/1 PodInitializing 0
        phase=Running Initialized Ready app:ready app:ready                 | 2/2 Running 0
        phase=Running Initialized app:ready app:run                         | 1/2 Running 0
        phase=Running Initialized app:ready app:wait=CrashLoopBackOff^5     | 1/2 CrashLoopBackOff 5
        phase=Running Initialized app:end=1/Error^1 app:ready               | 1/2 Error 1
        phase=Running Initialized app:end=137/OOMKilled app:ready           | 1/2 OOMKilled 0
        phase=Running Initialized app:end=0/Completed app:ready             | 1/2 NotReady 0
        phase=Running Initialized Ready app:end=0/Completed app:ready       | 1/2 Running 0
        phase=Running Initialized Ready ~init:ready!^1 app:ready^2          | 2/2 Running 3
        phase=Pending ~init:run app:wait=PodInitializing                    | 0/2 Init:0/1 0
        phase=Running Initialized ~init:wait=CrashLoopBackOff^4 app:ready   | 1/2 Init:CrashLoopBackOff 4
        phase=Succeeded Initialized app:end=0/Completed                     | 0/1 Completed 0
        phase=Succeeded Initialized ~init:end=0/Completed app:end=0/Completed | 0/2 Completed 0
        phase=Failed Initialized app:end=3/Error                            | 0/1 Error 0
        phase=Failed reason=Evicted                                         | 0/0 Evicted 0
        phase=Failed reason=Evicted app:end=137/Error*9                     | 0/1 Evicted 0
        phase=Running Initialized deleted Ready app:ready                   | 1/1 Terminating 0
        phase=Succeeded Initialized deleted app:end=0/Completed             | 0/1 Completed 0
        phase=Running reason=NodeLost deleted app:ready                     | 1/1 Unknown 0
    ";

    fn container(text: &str) -> (bool, ContainerStatus) {
        let (sidecar, text) = text.strip_prefix('~').map_or((false, text), |rest| (true, rest));
        let (text, restarts) = text.split_once('^').unwrap_or((text, "0"));
        let (text, started) = text.strip_suffix('!').map_or((text, None), |rest| (rest, Some(true)));
        let mut status = ContainerStatus { restart_count: restarts.parse().unwrap(), started, ..Default::default() };
        let (word, detail) = text.split_once('=').unwrap_or((text, ""));
        let mut state = ContainerState::default();
        match word {
            "wait" => state.waiting = Some(ContainerStateWaiting { reason: detail.into(), message: String::new() }),
            "run" => state.running = Some(ContainerStateRunning::default()),
            "ready" => {
                state.running = Some(ContainerStateRunning::default());
                status.ready = true;
            }
            "end" => {
                let (detail, signal) = detail.split_once('*').unwrap_or((detail, "0"));
                let (code, reason) = detail.split_once('/').unwrap_or((detail, ""));
                state.terminated = Some(ContainerStateTerminated {
                    exit_code: code.parse().unwrap(),
                    signal: signal.parse().unwrap(),
                    reason: reason.into(),
                    ..Default::default()
                });
            }
            _ => panic!("container {text:?}"),
        }
        status.state = Some(state);
        (sidecar, status)
    }

    fn pod(text: &str) -> Pod {
        let (mut spec, mut status) = (PodSpec::default(), PodStatus::default());
        let mut pod = Pod::default();
        let condition = |kind: &str, status: &str, reason: &str| PodCondition {
            r#type: kind.into(),
            status: status.into(),
            reason: reason.into(),
            ..Default::default()
        };
        for word in text.split_whitespace() {
            let sidecar = if word.starts_with('~') { "~" } else { "" };
            let bare = word.trim_start_matches('~');
            if let Some(phase) = word.strip_prefix("phase=") {
                status.phase = phase.into();
            } else if let Some(reason) = word.strip_prefix("reason=") {
                status.reason = reason.into();
            } else if let Some(text) = bare.strip_prefix("init:") {
                let (sidecar, mut container) = container(&format!("{sidecar}{text}"));
                container.name = format!("i{}", spec.init_containers.len());
                let policy = if sidecar { "Always" } else { "" };
                spec.init_containers.push(Container {
                    name: container.name.clone(),
                    restart_policy: policy.into(),
                    ..Default::default()
                });
                status.init_container_statuses.push(container);
            } else if let Some(text) = bare.strip_prefix("app:") {
                let (_, mut container) = container(text);
                container.name = format!("a{}", spec.containers.len());
                spec.containers.push(Container { name: container.name.clone(), ..Default::default() });
                status.container_statuses.push(container);
            } else {
                match word {
                    "deleted" => pod.meta_mut().deletion_timestamp = Some(Time::from_unix(1, 0)),
                    "gated" => status.conditions.push(condition("PodScheduled", "False", "SchedulingGated")),
                    kind => status.conditions.push(condition(kind, "True", "")),
                }
            }
        }
        (pod.spec, pod.status) = (Some(spec), Some(status));
        pod
    }

    #[test]
    fn the_table_of_states() {
        let lines: Vec<&str> = TABLE.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        assert_eq!(lines.len(), 29);
        for line in lines {
            let (text, expected) = line.split_once('|').unwrap();
            let summary = summary(&pod(text));
            let found = format!("{}/{} {} {}", summary.ready, summary.total, summary.status, summary.restarts);
            assert_eq!(found, expected.trim(), "{line}");
        }
    }

    #[test]
    fn the_last_restart_is_told() {
        let mut pod = pod("phase=Running Initialized Ready app:ready^2 app:ready^1");
        for (status, end) in pod.status_mut().container_statuses.iter_mut().zip([100, 50]) {
            let ended = ContainerStateTerminated { finished_at: Some(Time::from_unix(end, 0)), ..Default::default() };
            status.last_state = Some(ContainerState { terminated: Some(ended), ..Default::default() });
        }
        let summary = summary(&pod);
        assert_eq!(summary.restarts_text(Time::from_unix(130, 0)), "3 (30s ago)");
    }
}
