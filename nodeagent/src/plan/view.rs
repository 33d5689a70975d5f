//! The pod's status as Kubernetes' users know it: phase, conditions, container states.

use super::model::{
    ContainerSeen, ContainerWant, Ended, Image, Kind, PodWant, Resources, Run, RunState, SandboxState, Seen, Shim,
    Step, Terminal,
};

/// Pod phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Phase {
    /// Not everything has started.
    #[default]
    Pending,
    /// At least one container runs or will run again.
    Running,
    /// All apps ended with 0 and stay so.
    Succeeded,
    /// All apps ended and stay so, at least one not with 0; or an init container failed for good.
    Failed,
}

impl Phase {
    /// The name in the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Running => "Running",
            Self::Succeeded => "Succeeded",
            Self::Failed => "Failed",
        }
    }
}

/// State of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateView {
    /// Not running yet, or between two runs.
    Waiting {
        /// `PodInitializing`, `ContainerCreating`, `CrashLoopBackOff` …
        reason: String,
        /// Detail for people.
        message: String,
    },
    /// Its process lives.
    Running {
        /// Since when.
        started_wall_ms: u64,
    },
    /// It ended.
    Terminated(Ended),
}

/// Status of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerView {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// What it does now.
    pub state: StateView,
    /// How the run before ended.
    pub last: Option<Ended>,
    /// Serving, as its readiness probe says; without one: started.
    pub ready: bool,
    /// Its process runs and is past its start-up.
    pub started: bool,
    /// How often it was started again.
    pub restarts: u32,
    /// CPU and memory of the process that lives, where they are known.
    pub applied: Option<Resources>,
    /// The reference of its image: of the process that lives, or the one that is wanted.
    pub image: String,
}

/// A pod condition without its times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConditionView {
    /// `Ready`, `Initialized` …
    pub kind: &'static str,
    /// True or False.
    pub status: bool,
    /// Empty when true.
    pub reason: &'static str,
    /// Empty when true.
    pub message: String,
}

/// Status of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodView {
    /// Where it is in its life.
    pub phase: Phase,
    /// Why it failed, where that is not the containers' matter.
    pub reason: String,
    /// The same for people.
    pub message: String,
    /// In Kubernetes' order.
    pub conditions: Vec<ConditionView>,
    /// In the order of the wanted pod: init list, apps, debug containers.
    pub containers: Vec<ContainerView>,
}

/// Derives the status to report.
#[must_use]
pub fn pod_view(want: &PodWant, seen: &Seen, terminal: Option<&Terminal>, now_ms: u64) -> PodView {
    let ending = want.deletion.is_some() || terminal.is_some();
    let containers: Vec<ContainerView> =
        want.containers.iter().map(|container| container_view(want, container, seen, (ending, now_ms))).collect();
    let live = want.containers.iter().any(|container| seen.is_live(&container.name));
    let phase = match terminal {
        // While something of it still runs the node's room is not free: the phase turns terminal after that.
        Some(terminal) if !live => {
            if terminal.succeeded {
                Phase::Succeeded
            } else {
                Phase::Failed
            }
        }
        _ => match phase(want, &containers, ending && !live) {
            Phase::Succeeded | Phase::Failed if live && apps_have_started(&containers) => Phase::Running,
            Phase::Succeeded | Phase::Failed if live => Phase::Pending,
            other => other,
        },
    };
    let (reason, message) = match terminal {
        Some(terminal) if !live => (terminal.reason.clone(), terminal.message.clone()),
        _ => Default::default(),
    };
    let mut conditions = conditions(want, seen, phase, &containers);
    // One that was never taken is not disrupted.
    let taken = |terminal: &&Terminal| !terminal.message.starts_with(super::REJECTED);
    if let Some(evicted) = terminal.filter(|terminal| terminal.reason == super::EVICTED).filter(taken) {
        let message = evicted.message.clone();
        conditions.push(ConditionView { message, ..truth("DisruptionTarget", "TerminationByKubelet") });
    }
    PodView { phase, reason, message, conditions, containers }
}

fn container_view(
    want: &PodWant,
    container: &ContainerWant,
    seen: &Seen,
    (ending, now_ms): (bool, u64),
) -> ContainerView {
    let observed = seen.container(&container.name);
    let running = observed.run.as_ref().is_some_and(Run::is_running);
    let mut view = ContainerView {
        name: container.name.clone(),
        kind: container.kind,
        state: waiting("ContainerCreating", ""),
        last: observed.previous.clone(),
        ready: false,
        started: false,
        restarts: observed.run.as_ref().map_or(0, |run| run.attempt),
        applied: observed.applied.filter(|_| running),
        image: if running && !observed.started_from.is_empty() { &observed.started_from } else { &container.image }
            .clone(),
    };
    match &observed.run {
        Some(Run { state: RunState::Running, started_wall_ms, .. }) => {
            view.state = StateView::Running { started_wall_ms: *started_wall_ms };
            // An init container is ready once it is done.
            (view.ready, view.started) = match container.kind {
                Kind::Init => (false, true),
                Kind::Debug => (false, false),
                _ => (observed.is_ready(container.gates), observed.is_started(container.gates)),
            };
        }
        Some(run @ Run { state: RunState::Ended(ended), .. }) => {
            let again = will_restart(container, ended) || (container.kind == Kind::Init && outdated(run, seen));
            match waiting_again(want, container, observed, (run, ended, seen), now_ms) {
                Some(state) if again && !ending => {
                    view.state = state;
                    view.last = Some(ended.clone());
                }
                _ => {
                    view.ready = container.kind == Kind::Init && ended.exit_code == 0;
                    view.state = StateView::Terminated(ended.clone());
                }
            }
        }
        None => view.state = waiting_first(want, container, observed, seen),
    }
    view
}

fn waiting(reason: &str, message: &str) -> StateView {
    StateView::Waiting { reason: reason.to_owned(), message: message.to_owned() }
}

fn outdated(run: &Run, seen: &Seen) -> bool {
    run.sandbox < seen.sandbox_attempt
}

/// Whether the container runs again after this end while its sandbox lives.
#[must_use]
pub fn will_restart(container: &ContainerWant, ended: &Ended) -> bool {
    match container.kind {
        Kind::Init => ended.exit_code != 0 && container.restarts(ended),
        Kind::Sidecar => true,
        Kind::App => container.restarts(ended),
        Kind::Debug => false,
    }
}

/// The waiting state of a container that never ran.
fn waiting_first(want: &PodWant, container: &ContainerWant, observed: &ContainerSeen, seen: &Seen) -> StateView {
    if init_list_open_before(want, container, seen) {
        return waiting("PodInitializing", "");
    }
    match (&observed.image, &seen.volume_image) {
        (Image::Failed { reason, message, .. }, _) => waiting(reason, message),
        (_, (reason, message)) if !reason.is_empty() => waiting(reason, message),
        _ if container.kind != Kind::Debug && want.containers.iter().any(|other| other.kind.is_of_init_list()) => {
            waiting("PodInitializing", "")
        }
        _ => waiting("ContainerCreating", ""),
    }
}

/// The waiting state of a container between two runs; `None` when it is about to start and still shows its end.
fn waiting_again(
    want: &PodWant,
    container: &ContainerWant,
    observed: &ContainerSeen,
    (run, ended, seen): (&Run, &Ended, &Seen),
    now_ms: u64,
) -> Option<StateView> {
    if let Image::Failed { reason, message, .. } = &observed.image {
        return Some(waiting(reason, message));
    }
    if observed.retry_ms > now_ms {
        if ended.reason == "StartError" {
            return Some(waiting("RunContainerError", &ended.message));
        }
        let (delay_s, name, pod) = (observed.backoff_ms.div_ceil(1000), &container.name, &want.display_name);
        let message = format!("back-off {delay_s}s restarting failed container={name} pod={pod}");
        return Some(waiting("CrashLoopBackOff", &message));
    }
    outdated(run, seen).then(|| waiting("PodInitializing", ""))
}

/// Whether an entry of the init list before this container has not done its part in this sandbox.
fn init_list_open_before(want: &PodWant, container: &ContainerWant, seen: &Seen) -> bool {
    let mut before = want.containers.iter().take_while(|other| other.name != container.name);
    container.kind != Kind::Debug && before.any(|other| other.kind.is_of_init_list() && !init_done(other, seen))
}

fn init_done(container: &ContainerWant, seen: &Seen) -> bool {
    let Some(run) = seen.container(&container.name).run.as_ref() else { return false };
    match container.kind {
        _ if run.sandbox != seen.sandbox_attempt => false,
        Kind::Sidecar => seen.container(&container.name).is_started(container.gates),
        _ => run.ended().is_some_and(|ended| ended.exit_code == 0),
    }
}

#[derive(Default)]
struct Tally {
    pending_init: usize,
    pending_sidecar: usize,
    waiting: usize,
    running: usize,
    stopped: usize,
    succeeded: usize,
    restarting: usize,
}

/// Kubernetes' getPhase over the container states. `is_terminal`: nothing starts any more.
fn phase(want: &PodWant, containers: &[ContainerView], is_terminal: bool) -> Phase {
    let mut tally = Tally::default();
    for (view, container) in containers.iter().zip(&want.containers) {
        match container.kind {
            Kind::Init => {
                let end = match (&view.state, &view.last) {
                    (StateView::Terminated(ended), _) => Some(ended),
                    (StateView::Waiting { .. }, Some(last)) => Some(last),
                    _ => None,
                };
                match end {
                    None => tally.pending_init += 1,
                    Some(ended) if ended.exit_code != 0 && !container.restarts(ended) => {
                        return Phase::Failed;
                    }
                    Some(_) => {}
                }
            }
            Kind::Sidecar => match (&view.state, &view.last) {
                (StateView::Running { .. }, _) => {
                    tally.running += 1;
                    tally.pending_sidecar += usize::from(!view.started);
                }
                (StateView::Waiting { .. }, None) => tally.pending_sidecar += 1,
                _ => {}
            },
            Kind::App => tally_app(&mut tally, container, view),
            Kind::Debug => {}
        }
    }
    decide(&tally, apps_have_started(containers), is_terminal)
}

/// Whether any app container ran at any time.
fn apps_have_started(containers: &[ContainerView]) -> bool {
    containers
        .iter()
        .any(|view| view.kind == Kind::App && !matches!((&view.state, &view.last), (StateView::Waiting { .. }, None)))
}

fn tally_app(tally: &mut Tally, container: &ContainerWant, view: &ContainerView) {
    let end = match (&view.state, &view.last) {
        (StateView::Running { .. }, _) => {
            tally.running += 1;
            return;
        }
        (StateView::Terminated(ended), _) => ended,
        (StateView::Waiting { .. }, Some(last)) => last,
        (StateView::Waiting { .. }, None) => {
            tally.waiting += 1;
            return;
        }
    };
    tally.stopped += 1;
    tally.succeeded += usize::from(end.exit_code == 0);
    tally.restarting += usize::from(container.restarts(end));
}

fn decide(tally: &Tally, apps_have_started: bool, is_terminal: bool) -> Phase {
    let open = tally.pending_init > 0 || (tally.pending_sidecar > 0 && !apps_have_started) || tally.waiting > 0;
    if is_terminal && tally.running == 0 && tally.stopped > 0 {
        return if tally.succeeded == tally.stopped && tally.waiting == 0 { Phase::Succeeded } else { Phase::Failed };
    }
    if is_terminal && tally.running == 0 {
        return Phase::Failed;
    }
    if open {
        return Phase::Pending;
    }
    if tally.running > 0 {
        return Phase::Running;
    }
    match (tally.stopped, tally.restarting) {
        (0, _) => Phase::Pending,
        (_, 1..) => Phase::Running,
        (stopped, 0) if stopped == tally.succeeded => Phase::Succeeded,
        _ => Phase::Failed,
    }
}

fn conditions(want: &PodWant, seen: &Seen, phase: Phase, containers: &[ContainerView]) -> Vec<ConditionView> {
    let done = match phase {
        Phase::Succeeded => Some("PodCompleted"),
        Phase::Failed => Some("PodFailed"),
        _ => None,
    };
    let sandbox = seen.shim == Shim::Up
        && seen.sandbox == SandboxState::Up
        && (want.host_network || seen.network_attempt == seen.sandbox_attempt)
        && !seen.in_flight.contains(&Step::StopSandbox);
    let apps_ran = apps_have_started(containers);
    let incomplete: Vec<&str> = want
        .containers
        .iter()
        .filter(|container| container.kind.is_of_init_list() && !init_done(container, seen))
        .filter(|container| !(container.kind == Kind::Sidecar && apps_ran))
        .map(|container| container.name.as_str())
        .collect();
    let unready: Vec<&str> = containers
        .iter()
        .filter(|view| !matches!(view.kind, Kind::Init | Kind::Debug) && !view.ready)
        .map(|view| view.name.as_str())
        .collect();
    let initialized = if phase == Phase::Succeeded || incomplete.is_empty() {
        truth("Initialized", if phase == Phase::Succeeded { "PodCompleted" } else { "" })
    } else {
        falsehood("Initialized", "ContainersNotInitialized", listed("incomplete", &incomplete))
    };
    let unready_because = |kind| match done {
        Some(reason) => falsehood(kind, reason, String::new()),
        None if unready.is_empty() && sandbox => truth(kind, ""),
        None => falsehood(kind, "ContainersNotReady", listed("unready", &unready)),
    };
    let mut all = vec![
        if sandbox {
            truth("PodReadyToStartContainers", "")
        } else {
            falsehood("PodReadyToStartContainers", "", String::new())
        },
        initialized,
        unready_because("Ready"),
        unready_because("ContainersReady"),
    ];
    if done.is_none() && want.deletion.is_none() && super::resize::is_in_progress(want, seen) {
        let reason = if seen.resize_error.is_empty() { "" } else { "Error" };
        let message = seen.resize_error.clone();
        all.push(ConditionView { kind: minipod_proto::resize::IN_PROGRESS, status: true, reason, message });
    }
    all
}

fn truth(kind: &'static str, reason: &'static str) -> ConditionView {
    ConditionView { kind, status: true, reason, message: String::new() }
}

fn falsehood(kind: &'static str, reason: &'static str, message: String) -> ConditionView {
    ConditionView { kind, status: false, reason, message }
}

fn listed(what: &str, names: &[&str]) -> String {
    format!("containers with {what} status: [{}]", names.join(" "))
}
