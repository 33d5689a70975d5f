//! The planner: wanted pod, seen pod and the time in; steps, reasons, the status to report and the next wake-up out.
//!
//! It is pure. Steps of one plan are independent of each other and may run at the same time; the worker plans again
//! whenever a step ends or something is observed. A step that is in flight is never asked for twice, and a container is
//! only started when its newest run is known to have ended, so two instances of it cannot come to be.

pub mod anew;
pub mod backoff;
pub mod model;
#[cfg(test)]
mod random_tests;
pub mod resize;
#[cfg(test)]
mod table_tests;
mod teardown;
pub mod view;

use model::{
    ContainerSeen, ContainerWant, Image, Kind, Planned, PodWant, RestartPolicy, SandboxState, Seen, Shim, Step,
    Terminal,
};
use view::PodView;

/// What to do now and what to tell the API server.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Independent steps.
    pub steps: Vec<Planned>,
    /// Plan again at this time (boot clock) even if nothing happens.
    pub wake_at_ms: Option<u64>,
    /// The pod reached a terminal phase by this plan: must be recorded (in [`Seen::terminal`]) before the next plan.
    pub terminal: Option<Terminal>,
    /// The status to report.
    pub view: PodView,
    /// Nothing of the pod is left on the node.
    pub finished: bool,
}

/// What the status of a pod that its node does not take begins with, as the kubelet's.
pub const REJECTED: &str = "Pod was rejected: ";
/// Reason of a pod that its node could not keep.
pub const EVICTED: &str = "Evicted";
/// Kubernetes gives every container at least this long between TERM and KILL.
pub const MINIMUM_GRACE_MS: u64 = 2_000;

/// Plans the pod's next steps.
#[must_use]
pub fn plan(want: &PodWant, seen: &Seen, now_ms: u64) -> Plan {
    let mut planner = Planner { want, seen, now_ms, out: Plan::default() };
    let terminal = seen.terminal.clone().or_else(|| planner.reached_terminal());
    if seen.terminal.is_none() {
        planner.out.terminal.clone_from(&terminal);
    }
    if let Some(deletion) = want.deletion {
        planner.end_pod(deletion.since_ms + deletion.grace_ms, true);
    } else if let Some(terminal) = &terminal {
        planner.end_pod(terminal.since_ms + terminal.grace_ms.unwrap_or(want.grace_ms), false);
    } else {
        planner.keep_running();
    }
    let mut out = planner.out;
    out.view = view::pod_view(want, seen, terminal.as_ref(), now_ms);
    out
}

struct Planner<'a> {
    want: &'a PodWant,
    seen: &'a Seen,
    now_ms: u64,
    out: Plan,
}

/// A container with nothing known about it.
static UNSEEN: ContainerSeen = ContainerSeen {
    image: Image::Unknown,
    run: None,
    previous: None,
    retry_ms: 0,
    backoff_ms: 0,
    backoff: backoff::Backoff::NONE,
    kill_at_ms: None,
    health: model::Health { post_started: false, startup_passed: false, ready: false },
    pre_stopped: false,
    condemned: None,
    applied: None,
    started_from: String::new(),
};

impl Seen {
    /// What is known of a container, or the state of a container that nothing is known about.
    #[must_use]
    pub fn container(&self, name: &str) -> &ContainerSeen {
        self.containers.get(name).map_or(&UNSEEN, Box::as_ref)
    }

    /// Whether a start of this container is being performed.
    #[must_use]
    pub fn is_starting(&self, name: &str) -> bool {
        self.in_flight.iter().any(|step| matches!(step, Step::StartContainer { name: other, .. } if other == name))
    }

    /// Whether any process of the container lives or is about to.
    #[must_use]
    pub fn is_live(&self, name: &str) -> bool {
        self.is_starting(name) || self.container(name).run.as_ref().is_some_and(model::Run::is_running)
    }
}

impl Planner<'_> {
    /// Asks for a step unless it is being performed or waits after a failure.
    fn emit(&mut self, step: Step, why: &'static str) {
        let known = self.out.steps.iter().any(|planned| planned.step == step);
        if known || self.seen.in_flight.contains(&step) {
            return;
        }
        match self.seen.blocked.get(&step) {
            Some(&until_ms) if until_ms > self.now_ms => self.wake_at(until_ms),
            _ => self.out.steps.push(Planned { step, why }),
        }
    }

    fn wake_at(&mut self, at_ms: u64) {
        let at_ms = self.out.wake_at_ms.map_or(at_ms, |other| other.min(at_ms));
        self.out.wake_at_ms = Some(at_ms);
    }

    /// The terminal phase that what was seen amounts to, if any.
    fn reached_terminal(&mut self) -> Option<Terminal> {
        let since_ms = self.now_ms;
        let terminal = |succeeded, reason: &str, message: &str| {
            let (reason, message) = (reason.to_owned(), message.to_owned());
            Some(Terminal { succeeded, reason, message, since_ms, grace_ms: None })
        };
        if let Some(evicted) = &self.want.evicted {
            let evicted_for = terminal(false, EVICTED, &evicted.message);
            return evicted_for.map(|terminal| Terminal { grace_ms: Some(evicted.grace_ms), ..terminal });
        }
        let never_ran = self.seen.containers.values().all(|container| container.run.is_none());
        if let Some(refused) = self.want.refused.as_ref().filter(|_| never_ran) {
            return terminal(false, refused.reason, &format!("{REJECTED}{}", refused.message));
        }
        if let Some(deadline_ms) = self.want.deadline_ms {
            if deadline_ms <= self.now_ms {
                let message = "Pod was active on the node longer than the specified deadline";
                return terminal(false, "DeadlineExceeded", message);
            }
            self.wake_at(deadline_ms);
        }
        let ended = |container: &ContainerWant| self.seen.container(&container.name).run.as_ref()?.ended();
        let of_kind = |kind| self.want.containers.iter().filter(move |container| container.kind == kind);
        let failed_init =
            of_kind(Kind::Init).any(|init| ended(init).is_some_and(|run| run.exit_code != 0 && !init.restarts(run)));
        if failed_init {
            return terminal(false, "", "");
        }
        let mut apps = of_kind(Kind::App).peekable();
        let all_done = apps.peek().is_some() && apps.all(|app| ended(app).is_some_and(|run| !app.restarts(run)));
        if all_done {
            let succeeded = of_kind(Kind::App).all(|app| ended(app).is_some_and(|run| run.exit_code == 0));
            return terminal(succeeded, "", "");
        }
        // Without restarts a lost sandbox cannot be made good: what had started has died with it. Apps may have policies of their own.
        let lost = self.seen.sandbox_attempt > 0
            && (self.seen.sandbox == SandboxState::Ended || self.seen.shim != Shim::Up)
            && self.seen.containers.values().any(|container| container.run.is_some());
        let again = of_kind(Kind::App).any(|app| ended(app).is_some_and(|run| app.restarts(run)));
        if lost && self.want.restart == RestartPolicy::Never && !again && !self.anything_live() {
            return terminal(false, "", "the pod's sandbox ended and restartPolicy is Never");
        }
        None
    }

    /// Removes what a dead supervisor left. Steps that talk to it come to their end first, so that none of them meets
    /// the next one.
    fn clean_up(&mut self, why: &'static str) {
        if !self.seen.in_flight.iter().any(Step::makes_something) {
            self.emit(Step::CleanUpShim, why);
        }
    }

    fn anything_live(&self) -> bool {
        self.want.containers.iter().any(|container| self.seen.is_live(&container.name))
    }

    fn keep_running(&mut self) {
        if !self.seen.dir {
            self.emit(Step::EnsurePodDir, "the pod is new here");
            return;
        }
        match self.seen.shim {
            Shim::Dead => self.clean_up("the pod's supervisor died"),
            Shim::Absent => {
                self.emit(Step::SpawnShim, "the pod has no supervisor");
                self.prepare();
            }
            Shim::Up => {
                self.prepare();
                if self.sandbox_ready() {
                    self.tend();
                    self.resize();
                    self.run_containers();
                }
            }
        }
    }

    /// Volumes and images need no sandbox: they are made beside it.
    fn prepare(&mut self) {
        if !self.seen.volumes {
            self.emit(Step::PrepareVolumes, "volumes are missing");
        }
        for container in &self.want.containers {
            let seen = self.seen.container(&container.name);
            if self.seen.is_live(&container.name) || !self.may_start_ever(container) {
                continue;
            }
            let step = Step::PrepareImage { name: container.name.clone() };
            match &seen.image {
                Image::Ready => {}
                Image::Unknown => self.emit(step, "its image was not looked at yet"),
                Image::Failed { retry_ms, .. } if *retry_ms > self.now_ms => self.wake_at(*retry_ms),
                Image::Failed { .. } => self.emit(step, "its image failed before"),
            }
        }
    }

    /// Whether the container could be started (again) in this sandbox at some time.
    fn may_start_ever(&self, container: &ContainerWant) -> bool {
        let Some(run) = &self.seen.container(&container.name).run else { return true };
        match (container.kind, run.ended()) {
            (_, None) => false,
            (Kind::Init, Some(ended)) => !self.is_current(run) || (ended.exit_code != 0 && container.restarts(ended)),
            (Kind::Sidecar, Some(_)) => true,
            (Kind::App, Some(ended)) => container.restarts(ended),
            (Kind::Debug, Some(_)) => false,
        }
    }

    fn is_current(&self, run: &model::Run) -> bool {
        run.sandbox == self.seen.sandbox_attempt
    }

    /// Brings the sandbox up; true when containers may start in it.
    fn sandbox_ready(&mut self) -> bool {
        let attempt = self.seen.sandbox_attempt;
        match self.seen.sandbox {
            SandboxState::Up => {}
            // The supervisor kills what ran in a dead sandbox; a new one waits for the end of all that, and for steps
            // that still work on the old one.
            SandboxState::Ended if self.anything_live() || self.attaching() => return false,
            SandboxState::Ended => {
                self.emit(Step::CreateSandbox { attempt: attempt + 1 }, "the sandbox ended");
                return false;
            }
            SandboxState::None => {
                self.emit(Step::CreateSandbox { attempt: attempt + 1 }, "the pod has no sandbox");
                return false;
            }
        }
        if self.seen.network_attempt != attempt && !self.want.host_network {
            self.emit(Step::AttachNetwork { attempt }, "the sandbox has no network");
            return false;
        }
        if self.seen.etc_attempt != attempt {
            self.emit(Step::WriteEtcFiles { attempt }, "the sandbox has no hosts, hostname and resolv.conf");
        }
        self.seen.etc_attempt == attempt && self.seen.volumes
    }

    fn attaching(&self) -> bool {
        let attaching = |step: &Step| matches!(step, Step::AttachNetwork { .. } | Step::WriteEtcFiles { .. });
        self.seen.in_flight.iter().any(attaching)
    }

    /// Runs postStart hooks that are due, and ends what probes and hooks have condemned.
    fn tend(&mut self) {
        for container in &self.want.containers {
            let seen = self.seen.container(&container.name);
            let Some(run) = seen.run.as_ref().filter(|run| run.is_running()) else { continue };
            if let Some(condemned) = &seen.condemned {
                self.kill(
                    container,
                    condemned.deadline_ms,
                    "a probe or its postStart hook failed, or it is to start anew",
                );
            } else if container.gates.post_start && !seen.health.post_started {
                let step = Step::PostStart { name: container.name.clone(), attempt: run.attempt };
                self.emit(step, "its process runs");
            }
        }
    }

    /// Whether the start of what comes after this container waits for its postStart hook.
    fn holds_back(&self, container: &ContainerWant) -> bool {
        if !container.gates.post_start {
            return false;
        }
        let seen = self.seen.container(&container.name);
        let start = |step: &Step| matches!(step, Step::StartContainer { name, .. } if *name == container.name);
        let running = seen.run.as_ref().is_some_and(model::Run::is_running);
        self.seen.is_starting(&container.name)
            || self.out.steps.iter().any(|planned| start(&planned.step))
            || (running && !seen.health.post_started && seen.condemned.is_none())
    }

    /// Init list strictly in order, then the apps.
    fn run_containers(&mut self) {
        // They are there to find out why others do not start.
        for debug in self.want.containers.iter().filter(|container| container.kind == Kind::Debug) {
            if self.seen.container(&debug.name).run.is_none() {
                self.start(debug, "a user has added it");
            }
        }
        let init_list: Vec<&ContainerWant> =
            self.want.containers.iter().filter(|container| container.kind.is_of_init_list()).collect();
        for (index, container) in init_list.iter().enumerate() {
            let later_ran = self.something_after_ran(&init_list[index + 1..]);
            let goes_on = match container.kind {
                Kind::Sidecar => self.drive_sidecar(container) || later_ran,
                // What came after an init container could only start once it was done: its own record may be gone.
                _ => later_ran || self.drive_init(container),
            };
            if !goes_on {
                return;
            }
        }
        for app in self.want.containers.iter().filter(|container| container.kind == Kind::App) {
            self.drive_app(app);
            if self.holds_back(app) {
                return;
            }
        }
    }

    /// Whether an entry after this one, or an app, was started in this sandbox.
    fn something_after_ran(&self, later: &[&ContainerWant]) -> bool {
        let ran = |container: &ContainerWant| {
            let seen = self.seen.container(&container.name);
            self.seen.is_starting(&container.name) || seen.run.as_ref().is_some_and(|run| self.is_current(run))
        };
        later.iter().any(|container| ran(container))
            || self.want.containers.iter().any(|container| container.kind == Kind::App && ran(container))
    }

    /// True when the init container is done.
    fn drive_init(&mut self, container: &ContainerWant) -> bool {
        match self.seen.container(&container.name).run.as_ref().filter(|run| self.is_current(run)) {
            None => self.start(container, "it is its turn in the init list"),
            Some(run) => match run.ended() {
                None => {}
                Some(ended) if ended.exit_code == 0 => return true,
                Some(ended) if container.restarts(ended) => {
                    self.start(container, "it failed and is tried again");
                }
                Some(_) => {}
            },
        }
        false
    }

    /// True when the sidecar has started.
    fn drive_sidecar(&mut self, container: &ContainerWant) -> bool {
        match self.seen.container(&container.name).run.as_ref().filter(|run| self.is_current(run)) {
            Some(run) if run.is_running() => {
                return self.seen.container(&container.name).is_started(container.gates);
            }
            Some(_) => self.start(container, "it ended and is kept running"),
            None => self.start(container, "it is its turn in the init list"),
        }
        false
    }

    fn drive_app(&mut self, container: &ContainerWant) {
        let run = self.seen.container(&container.name).run.as_ref();
        match run.map(|run| (run.ended(), self.is_current(run))) {
            None => self.start(container, "the init list is done"),
            Some((None, _)) => {}
            Some((Some(ended), current)) if container.restarts(ended) => {
                let why = if current { "it ended and its restart policy says so" } else { "the sandbox is new" };
                self.start(container, why);
            }
            Some(_) => {}
        }
    }

    /// Starts the container when its back-off is over and its image is there.
    fn start(&mut self, container: &ContainerWant, why: &'static str) {
        let seen = self.seen.container(&container.name);
        // What is to begin with more must not begin below the pod's old limits.
        if self.seen.is_live(&container.name) || resize::pod_differs(self.want, self.seen) {
            return;
        }
        if seen.run.is_some() && seen.retry_ms > self.now_ms {
            self.wake_at(seen.retry_ms);
            return;
        }
        if seen.image == Image::Ready {
            let attempt = seen.run.as_ref().map_or(0, |run| run.attempt + 1);
            self.emit(Step::StartContainer { name: container.name.clone(), attempt }, why);
        }
    }
}
