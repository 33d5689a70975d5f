//! One pod's task: observe, plan, have the steps performed, report; again whenever anything happens.
//!
//! The worker owns everything that is known of its pod; steps run beside it as tasks and bring their outcome back, so
//! there is no lock and no step ever runs twice at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use minipod_proto::v1::{Pod, PodStatus, PodStatusReport};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::agent::Agent;
use crate::clock::{boot_ms, wall_ms};
use crate::events::{Severity, field_path, pod_event};
use crate::execute::{Came, Done, Job, StepError, perform};
use crate::image::ImageRecord;
use crate::net::PodNetwork;
use crate::plan::anew::anew;
use crate::plan::backoff::{forget, note_ended, note_started};
use crate::plan::model::{
    Condemned, ContainerSeen, Deletion, Ended, Health, Image, PodWant, Refused, Resources, RunState, SandboxState,
    Seen, Shim as ShimState, Step,
};
use crate::plan::view::{Phase, StateView};
use crate::plan::{Plan, plan};
use crate::pods::Desired;
use crate::probe::perform::{Target, probe as perform_probe};
use crate::probe::{Gate, Outcome, Probes, Verdict};
use crate::record::{self, ContainerRecord, Record};
use crate::shim::{Shim, ShimEvent};
use crate::status::{Facts, Known, pod_status};
use crate::want::{DEFAULT_GRACE_S, Uid, grace_ms, granted, key_of, pod_want};

/// First and longest wait after a step that failed.
const STEP_RETRY_MS: (u64, u64) = (250, 30_000);
/// First and longest wait before an image that could not be had is tried again; a load of images wakes the worker at once.
const IMAGE_RETRY_MS: (u64, u64) = (10_000, 300_000);
/// Changes that nobody waits for are told together after this time.
const MINOR_REPORT_DELAY_MS: u64 = 50;

/// What other tasks may know of a pod.
#[derive(Debug, Clone)]
pub struct PodView {
    /// The pod.
    pub pod: Arc<Pod>,
    /// Its supervisor, when connected.
    pub shim: Option<Shim>,
    /// The newest run of each container that ever started.
    pub runs: BTreeMap<String, RunView>,
    /// What the node had of it was looked at, by this agent: until then the rest of this says nothing.
    pub is_met: bool,
    /// Ids of the images that it uses.
    pub images: BTreeSet<String>,
}

/// A container's newest run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunView {
    /// Its number.
    pub attempt: u32,
    /// Whether its process lives.
    pub running: bool,
    /// The run whose end is the container's last state, as its status tells it.
    pub previous: Option<u32>,
}

/// The task of one pod.
pub struct Worker {
    agent: Arc<Agent>,
    uid: Uid,
    desired: watch::Receiver<Desired>,
    pod: Arc<Pod>,
    want: PodWant,
    seen: Seen,
    record: Record,
    /// As it was last written: the bytes, which take a tenth of the record's memory.
    kept: Box<[u8]>,
    images: BTreeMap<String, Box<ImageRecord>>,
    failures: BTreeMap<Step, u32>,
    /// How often in a row a container's image could not be had.
    pull_failures: BTreeMap<String, u32>,
    /// References of the images that are being looked at, by container.
    preparing: BTreeMap<String, String>,
    shim: Option<Shim>,
    shim_events: Option<mpsc::Receiver<Box<ShimEvent>>>,
    tasks: JoinSet<(Step, Result<Done, StepError>)>,
    /// By container, of its newest run.
    probes: BTreeMap<String, Probes>,
    /// At most one of each kind per container.
    probing: JoinSet<Probed>,
    reported: Option<PodStatus>,
    minor_report_at_ms: Option<u64>,
    /// The node was short when the pod came, and does not take it.
    not_admitted: Option<Refused>,
    /// The API knew the pod as done before this node knew anything of it: its status is the API's, not ours.
    done_elsewhere: bool,
    /// When the pod arrived, until all of it runs; `None` for one that was here before.
    arrived: Option<Instant>,
    shown: watch::Sender<PodView>,
}

/// What woke the worker.
enum Wake {
    Desired(bool),
    Step(Step, Result<Done, StepError>),
    Shim(Option<Box<ShimEvent>>),
    Probe(Probed),
    Images,
    Time,
}

/// What a probe of a container's run found.
struct Probed {
    name: String,
    attempt: u32,
    kind: crate::probe::Kind,
    outcome: Outcome,
}

impl Worker {
    /// Shows the pod to other tasks: from now on who asks for it waits for what [`Worker::run`] finds.
    pub fn new(agent: Arc<Agent>, uid: Uid, mut desired: watch::Receiver<Desired>) -> Self {
        let pod = desired.borrow_and_update().pod.clone();
        let want = pod_want(&pod);
        let shown = watch::Sender::new(PodView {
            pod: pod.clone(),
            shim: None,
            runs: BTreeMap::new(),
            is_met: false,
            images: BTreeSet::new(),
        });
        agent.show(&uid, shown.subscribe());
        Self {
            agent,
            uid,
            desired,
            pod,
            want,
            seen: Seen::default(),
            record: Record::default(),
            kept: Box::default(),
            images: BTreeMap::new(),
            failures: BTreeMap::new(),
            pull_failures: BTreeMap::new(),
            preparing: BTreeMap::new(),
            shim: None,
            shim_events: None,
            tasks: JoinSet::new(),
            probes: BTreeMap::new(),
            probing: JoinSet::new(),
            reported: None,
            minor_report_at_ms: None,
            not_admitted: None,
            done_elsewhere: false,
            arrived: Some(Instant::now()),
            shown,
        }
    }

    /// Runs the pod's task until nothing of the pod is left.
    pub async fn run(mut self) {
        self.look().await;
        if self.work().await {
            self.agent.hide(&self.uid);
            self.agent.pods.ended(&self.uid);
        }
    }

    /// Shows the other tasks what has changed.
    fn show(&self, told: &crate::plan::view::PodView) {
        let waits = |name: &str| {
            told.containers.iter().any(|view| view.name == name && matches!(view.state, StateView::Waiting { .. }))
        };
        let run_of = |name: &String, seen: &ContainerSeen| {
            let run = seen.run.as_ref()?;
            // Of one that is to start again, the run that has just ended is the last state already.
            let previous = if waits(name) { Some(run.attempt) } else { run.attempt.checked_sub(1) };
            Some((name.clone(), RunView { attempt: run.attempt, running: run.is_running(), previous }))
        };
        let runs: BTreeMap<String, RunView> =
            self.seen.containers.iter().filter_map(|(name, seen)| run_of(name, seen)).collect();
        let images = self.images_in_use();
        self.shown.send_if_modified(|view| {
            let same = view.is_met
                && view.runs == runs
                && view.images == images
                && Arc::ptr_eq(&view.pod, &self.pod)
                && view.shim.as_ref().map(Shim::id) == self.shim.as_ref().map(Shim::id);
            if !same {
                *view = PodView { pod: self.pod.clone(), shim: self.shim.clone(), runs, is_met: true, images };
            }
            !same
        });
    }

    fn images_in_use(&self) -> BTreeSet<String> {
        let started = self.record.containers.values().map(|container| container.image_id.clone());
        let prepared = self.images.values().map(|image| image.id.as_str().to_owned());
        let volumes = self.record.volume_images.values().cloned();
        started.chain(prepared).chain(volumes).filter(|id| !id.is_empty()).collect()
    }

    /// Finds what there is of the pod on this node.
    async fn look(&mut self) {
        let paths = self.agent.paths.pod(&self.uid);
        self.pod = granted(self.pod.clone(), record::load_spec_if_any(&paths.run).as_ref());
        self.want = pod_want(&self.pod);
        self.seen.dir = paths.run.is_dir();
        self.seen.data = paths.data.exists();
        self.seen.logs = self.agent.paths.logs_of(&self.pod, &self.uid).exists();
        self.seen.network_held = self.seen.dir || self.seen.data || self.seen.logs;
        if self.seen.dir {
            self.arrived = None;
            self.record = Record::load(&paths.run);
            self.record.restore(&mut self.seen, boot_ms());
            self.seen.data &= !self.record.data_removed;
            self.seen.network_held &= !self.record.data_removed;
            self.meet_shim().await;
        } else {
            record::adopt_from_api(&self.pod, &mut self.seen, (boot_ms(), wall_ms()));
            self.done_elsewhere = self.seen.terminal.is_some();
            // Once: what is taken stays, however short the node becomes while its images are pulled.
            self.not_admitted = crate::pressure::admit::refusal(&self.pod, self.agent.conditions());
        }
        if self.record.start_wall_ms == 0 {
            let stored = self.pod.status.as_ref().and_then(|status| status.start_time);
            self.record.start_wall_ms =
                stored.and_then(|time| u64::try_from(time.unix_ms()).ok()).filter(|ms| *ms > 0).unwrap_or_else(wall_ms);
        }
        self.take_desired();
    }

    /// True when the pod is over; false when the agent ends.
    async fn work(&mut self) -> bool {
        loop {
            let now_ms = boot_ms();
            self.condemn_changed();
            let plan = self.plan(now_ms);
            self.report(&plan);
            self.show(&plan.view);
            if plan.finished {
                return true;
            }
            self.begin_steps(&plan, now_ms);
            let probe_at_ms = self.begin_probes();
            let wake = self.wait([plan.wake_at_ms, probe_at_ms].into_iter().flatten().min()).await;
            if !self.handle(wake).await {
                return false;
            }
            self.handle_what_is_ready().await;
        }
    }

    fn plan(&mut self, now_ms: u64) -> Plan {
        let plan = plan(&self.want, &self.seen, now_ms);
        if let Some(terminal) = &plan.terminal {
            if let Some(refused) = self.want.refused.as_ref().filter(|refused| refused.reason == terminal.reason) {
                self.pod_event(Severity::Warning, refused.reason, refused.message.clone());
            }
            self.seen.terminal = Some(terminal.clone());
            self.save();
        }
        plan
    }

    /// Waits for the next thing to happen. Every arm is cancel safe: watch, join set, channel and notification keep what
    /// was not taken.
    async fn wait(&mut self, wake_at_ms: Option<u64>) -> Wake {
        let wake_at_ms = [wake_at_ms, self.minor_report_at_ms].into_iter().flatten().min();
        let sleep = async {
            match wake_at_ms {
                Some(at_ms) => tokio::time::sleep(Duration::from_millis(at_ms.saturating_sub(boot_ms()))).await,
                None => std::future::pending().await,
            }
        };
        let waits_for_image = self.seen.blocked.contains_key(&Step::PrepareVolumes)
            || self.seen.containers.values().any(|seen| matches!(seen.image, Image::Failed { .. }));
        tokio::select! {
            changed = self.desired.changed() => Wake::Desired(changed.is_ok()),
            Some(joined) = self.tasks.join_next() => match joined {
                Ok((step, outcome)) => Wake::Step(step, outcome),
                // A panic aborts the process and nobody cancels steps.
                Err(error) => unreachable!("a step's task was lost: {error}"),
            },
            Some(Ok(probed)) = self.probing.join_next() => Wake::Probe(probed),
            event = next_event(&mut self.shim_events) => Wake::Shim(event),
            () = self.agent.images_changed.notified(), if waits_for_image => Wake::Images,
            () = sleep => Wake::Time,
        }
    }

    /// False when the agent ends.
    async fn handle(&mut self, wake: Wake) -> bool {
        match wake {
            Wake::Desired(false) => return false,
            Wake::Desired(true) => self.take_desired(),
            Wake::Step(step, outcome) => self.take_outcome(step, outcome),
            Wake::Shim(Some(event)) => self.take_event(*event),
            Wake::Shim(None) => self.lost_shim().await,
            Wake::Probe(probed) => self.take_probed(&probed),
            Wake::Images => self.look_for_images_again(),
            Wake::Time => {}
        }
        true
    }

    /// Several things often happen at once; one plan serves them all.
    async fn handle_what_is_ready(&mut self) {
        loop {
            if let Some(Ok((step, outcome))) = self.tasks.try_join_next() {
                self.take_outcome(step, outcome);
            } else if let Some(event) = self.shim_events.as_mut().and_then(|events| events.try_recv().ok()) {
                self.take_event(*event);
            } else {
                return;
            }
        }
    }

    /// Begins what was planned at `now_ms`; the graces of the plan count from there.
    fn begin_steps(&mut self, plan: &Plan, now_ms: u64) {
        for planned in &plan.steps {
            let step = planned.step.clone();
            tracing::debug!(pod = %self.want.display_name, ?step, why = planned.why, "step");
            self.seen.in_flight.insert(step.clone());
            self.seen.blocked.remove(&step);
            match &step {
                Step::AttachNetwork { .. } => self.seen.network_held = true,
                Step::KillContainer { name, grace_ms } => self.note_kill(name, now_ms + grace_ms),
                Step::CreateSandbox { .. } => {
                    self.seen.pod_applied = Some(self.want.resources);
                    // It may bring the pod's network along.
                    self.seen.network_held |= !self.want.host_network;
                }
                Step::StartContainer { name, .. } => {
                    let want = self.want.container(name);
                    let seen = self.seen.containers.entry(name.clone()).or_default();
                    seen.applied = want.map(|container| container.resources);
                    seen.started_from = want.map(|container| container.image.clone()).unwrap_or_default();
                }
                Step::PrepareImage { name } => {
                    self.preparing.insert(name.clone(), self.image_of(name));
                }
                Step::Resize { .. } => {
                    self.pod_event(
                        Severity::Normal,
                        "ResizeStarted",
                        "the pod's resources are being changed".to_owned(),
                    );
                }
                _ => {}
            }
            let job = self.job(&step);
            self.tasks.spawn(async move {
                let outcome = perform(job, &step).await;
                (step, outcome)
            });
        }
    }

    fn job(&self, step: &Step) -> Job {
        let container = match step {
            Step::PrepareImage { name }
            | Step::StartContainer { name, .. }
            | Step::PostStart { name, .. }
            | Step::PreStop { name, .. }
            | Step::KillContainer { name, .. } => name,
            _ => "",
        };
        Job {
            agent: self.agent.clone(),
            uid: self.uid.clone(),
            pod: self.pod.clone(),
            shim: self.shim.clone(),
            pod_ip: self.record.pod_ip.clone(),
            image: self.images.get(container).map(|image| ImageRecord::clone(image)),
            attempt: self.seen.container(container).run.as_ref().map_or(0, |run| run.attempt),
            sandbox: self.seen.sandbox_attempt,
            record: self.record.clone(),
            view: self.shown.subscribe(),
        }
    }

    /// Begins the probes that are due; answers when the next one is.
    fn begin_probes(&mut self) -> Option<u64> {
        let now_ms = boot_ms();
        let ends = self.ends();
        let mut wake_at_ms = None;
        for want in self.want.containers.clone() {
            let seen = self.seen.container(&want.name);
            let Some(run) = seen.run.as_ref().filter(|run| run.is_running()) else {
                self.probes.remove(&want.name);
                continue;
            };
            let Some(container) = crate::want::find_container(&self.pod, &want.name) else { continue };
            if self.probes.get(&want.name).is_none_or(|probes| probes.attempt != run.attempt) {
                let started_ms = now_ms.saturating_sub(wall_ms().saturating_sub(run.started_wall_ms));
                let Some(probes) = Probes::of(container, run.attempt, started_ms, seen.health.startup_passed) else {
                    continue;
                };
                self.probes.insert(want.name.clone(), probes);
            }
            let Some(probes) = self.probes.get_mut(&want.name) else { continue };
            let gate = Gate {
                post_started: seen.health.post_started || !want.gates.post_start,
                ending: ends || seen.condemned.is_some(),
            };
            for kind in probes.due(gate, now_ms) {
                let Some(probe) = kind.of(container).cloned() else { continue };
                let address =
                    if self.want.host_network { self.agent.node_ip().to_string() } else { self.record.pod_ip.clone() };
                let (shim, attempt) = (self.shim.clone(), run.attempt);
                let target = Target { shim, container: container.clone(), attempt, address };
                self.probing.spawn(async move {
                    let outcome = perform_probe(&target, &probe).await;
                    Probed { name: target.container.name, attempt, kind, outcome }
                });
            }
            wake_at_ms = [wake_at_ms, probes.wake_at_ms(gate)].into_iter().flatten().min();
        }
        wake_at_ms
    }

    fn take_probed(&mut self, probed: &Probed) {
        let Probed { name, attempt, kind, outcome } = probed;
        let Some(probes) = self.probes.get_mut(name).filter(|probes| probes.attempt == *attempt) else { return };
        let (verdict, count) = probes.take(*kind, outcome);
        let kind = kind.as_str();
        match outcome {
            // Not one event per failure for ever: the first ones, and then ever fewer.
            Outcome::Failure(why) if count <= 3 || count.is_power_of_two() => {
                self.container_event(name, Severity::Warning, "Unhealthy", format!("{kind} probe failed: {why}"));
            }
            Outcome::Success(warning) if !warning.is_empty() => {
                let message = format!("{kind} probe warning: {warning}");
                self.container_event(name, Severity::Warning, "ProbeWarning", message);
            }
            // Thrown away, as with the kubelet: what could not be asked says nothing of the container.
            Outcome::Unknown(why) if self.shim.is_some() && (count <= 3 || count.is_power_of_two()) => {
                let message = format!("{kind} probe errored and resulted in unknown state: {why}");
                self.container_event(name, Severity::Warning, "Unhealthy", message);
            }
            _ => {}
        }
        match verdict {
            Some(Verdict::Kill { grace_ms }) => {
                let why = format!("Container {name} failed {} probe", kind.to_lowercase());
                self.condemn(name, why, grace_ms);
            }
            Some(Verdict::Started) => self.health(name).startup_passed = true,
            Some(Verdict::Ready(ready)) => self.health(name).ready = ready,
            None => return,
        }
        self.save();
    }

    fn health(&mut self, name: &str) -> &mut Health {
        &mut self.seen.containers.entry(name.to_owned()).or_default().health
    }

    /// The container's run is to end, within the pod's grace unless there is another.
    fn condemn(&mut self, name: &str, why: String, grace_ms: Option<u64>) {
        let deadline_ms = boot_ms() + grace_ms.unwrap_or(self.want.grace_ms);
        self.container_event(name, Severity::Normal, "Killing", format!("{why}, will be restarted"));
        self.seen.containers.entry(name.to_owned()).or_default().condemned = Some(Condemned { why, deadline_ms });
    }

    /// Runs that cannot get their new image or resources without a restart are to end.
    fn condemn_changed(&mut self) {
        if self.ends() {
            return;
        }
        let containers = self.want.containers.iter();
        let due = containers.filter_map(|container| {
            let seen = self.seen.container(&container.name);
            let why = anew(container, seen).filter(|_| seen.condemned.is_none())?.why(&container.name);
            Some((container.name.clone(), why))
        });
        for (name, why) in due.collect::<Vec<_>>() {
            self.condemn(&name, why, None);
        }
    }

    /// Whether nothing starts again in this pod.
    fn ends(&self) -> bool {
        self.want.deletion.is_some() || self.seen.terminal.is_some()
    }

    fn take_hooked(&mut self, step: &Step, outcome: Result<(), String>) {
        let (Step::PostStart { name, attempt } | Step::PreStop { name, attempt }) = step else { return };
        let Some(seen) = self.seen.containers.get_mut(name) else { return };
        if !seen.run.as_ref().is_some_and(|run| run.attempt == *attempt && run.is_running()) {
            return;
        }
        match (step, outcome) {
            (Step::PostStart { .. }, Ok(())) => seen.health.post_started = true,
            (Step::PostStart { .. }, Err(why)) => {
                let message = format!("PostStartHook failed: {why}");
                self.container_event(name, Severity::Warning, "FailedPostStartHook", message);
                self.condemn(name, format!("Container {name} failed its postStart hook"), None);
            }
            (_, outcome) => {
                seen.pre_stopped = true;
                if let Err(why) = outcome {
                    let message = format!("PreStopHook failed: {why}");
                    self.container_event(name, Severity::Warning, "FailedPreStopHook", message);
                }
            }
        }
    }

    // ------------------------------------------------------------------------------------------- what is wanted

    fn take_desired(&mut self) {
        let mut desired = self.desired.borrow_and_update().clone();
        desired.pod = granted(desired.pod, Some(&self.pod));
        let changed = !same_but_status(&self.pod, &desired.pod);
        self.pod = desired.pod;
        if changed {
            self.look_for_configs_again();
        }
        if self.reported.as_ref().is_some_and(|reported| was_marked_silent(&self.pod, reported)) {
            // We were away; what was said of the pod is not so, and is told again.
            self.reported = None;
        }
        let (now_ms, now_wall_ms) = (boot_ms(), wall_ms());
        let old = std::mem::replace(&mut self.want, pod_want(&self.pod));
        self.take_images_wanted(&old);
        self.want.deletion = sooner(old.deletion, wish_to_end(&self.pod, desired.gone, now_ms));
        if desired.evicted.is_some() && old.evicted.is_none() && self.seen.terminal.is_none() {
            let message = desired.evicted.as_ref().map(|evicted| evicted.message.clone()).unwrap_or_default();
            self.pod_event(Severity::Warning, crate::plan::EVICTED, message);
        }
        self.want.evicted = desired.evicted;
        let lacks = || crate::apparmor::refusal(&self.pod, &self.agent.apparmor);
        let allowed = &self.agent.config.allowed_unsafe_sysctls;
        let forbids = || crate::sysctls::refusal(&self.pod, allowed);
        self.want.refused = self.not_admitted.clone().or_else(lacks).or_else(forbids);
        let deadline_s = self.pod.spec.as_ref().and_then(|spec| spec.active_deadline_seconds);
        self.want.deadline_ms = deadline_s.and_then(|seconds| u64::try_from(seconds).ok()).map(|seconds| {
            (now_ms + self.record.start_wall_ms.saturating_add(seconds.saturating_mul(1000)))
                .saturating_sub(now_wall_ms)
        });
        if changed && self.seen.dir && !self.seen.in_flight.contains(&Step::RemovePodDir) {
            let dir = self.agent.paths.pod(&self.uid).run;
            if let Err(error) = record::save_spec(&dir, &self.pod) {
                self.warn("keep the pod's spec", &error);
            }
        }
    }

    /// Another image than before is looked for at once, whatever came of the old one, and so is what runs from it.
    fn take_images_wanted(&mut self, old: &PodWant) {
        for container in &self.want.containers {
            let before = old.container(&container.name).map(|before| before.image.as_str());
            if before.is_none_or(|before| before == container.image) {
                continue;
            }
            self.pull_failures.remove(&container.name);
            if let Some(seen) = self.seen.containers.get_mut(&container.name) {
                seen.image = Image::Unknown;
                forget(seen);
            }
        }
    }

    /// The pod was changed: what it said wrong may be right now.
    fn look_for_configs_again(&mut self) {
        for seen in self.seen.containers.values_mut() {
            match &mut seen.image {
                // Registries are not asked more often for it.
                Image::Failed { reason, .. } if matches!(reason.as_str(), "ErrImagePull" | "ImagePullBackOff") => {}
                Image::Failed { retry_ms, .. } => *retry_ms = 0,
                Image::Unknown | Image::Ready => {}
            }
        }
    }

    /// Images were loaded, or ConfigMaps and Secrets have come.
    fn look_for_images_again(&mut self) {
        self.seen.blocked.remove(&Step::PrepareVolumes);
        for seen in self.seen.containers.values_mut() {
            if let Image::Failed { retry_ms, .. } = &mut seen.image {
                *retry_ms = 0;
            }
        }
    }

    // ----------------------------------------------------------------------------------------- what has happened

    fn take_outcome(&mut self, step: Step, outcome: Result<Done, StepError>) {
        self.seen.in_flight.remove(&step);
        if let Step::PrepareImage { name } = &step
            && self.preparing.remove(name).is_some_and(|asked| asked != self.image_of(name))
        {
            // Another one is wanted by now; this one is as good as not looked at.
            return;
        }
        match outcome {
            Ok(done) => {
                self.failures.remove(&step);
                self.take_done(&step, done);
            }
            Err(error) => self.take_failure(step, &error),
        }
    }

    fn take_done(&mut self, step: &Step, done: Done) {
        match (step, done) {
            (Step::EnsurePodDir, _) => {
                (self.seen.dir, self.seen.data, self.seen.logs) = (true, true, true);
            }
            (Step::SpawnShim, Done::Shim(shim, events)) => {
                (self.seen.shim, self.seen.sandbox) = (ShimState::Up, SandboxState::None);
                (self.shim, self.shim_events) = (Some(shim), Some(events));
            }
            (Step::CreateSandbox { attempt }, done) => {
                (self.seen.sandbox, self.seen.sandbox_attempt) = (SandboxState::Up, *attempt);
                if let Done::Network(network) = done {
                    self.take_network(*attempt, &network);
                }
                if *attempt > 1 {
                    let message = "Pod sandbox changed, it was killed and has been re-created".to_owned();
                    self.pod_event(Severity::Normal, "SandboxChanged", message);
                }
            }
            (Step::AttachNetwork { attempt }, Done::Network(network)) => {
                self.take_network(*attempt, &network);
            }
            (Step::WriteEtcFiles { attempt }, _) => self.seen.etc_attempt = *attempt,
            (Step::PrepareVolumes, done) => {
                self.seen.volumes = true;
                self.seen.volume_image = Default::default();
                if let Done::Volumes(images) = done {
                    self.record.volume_images = images;
                }
            }
            (Step::PrepareImage { name }, Done::Image(image, came)) => self.take_image(name, image, came),
            (Step::StartContainer { name, attempt }, Done::Started { sandbox, wall_ms, begun }) => {
                self.record.containers.entry(name.clone()).or_default().begun = Some(begun);
                self.take_started(name, *attempt, sandbox, wall_ms);
            }
            (Step::StopSandbox | Step::CleanUpShim, _) => {
                (self.seen.shim, self.seen.sandbox) = (ShimState::Absent, SandboxState::None);
                (self.shim, self.shim_events) = (None, None);
            }
            (Step::DetachNetwork, _) => (self.seen.network_held, self.seen.network_attempt) = (false, 0),
            (Step::RemovePodData, _) => (self.seen.data, self.seen.volumes) = (false, false),
            (Step::RemovePodDir, _) => {
                (self.seen.dir, self.seen.data, self.seen.logs) = (false, false, false);
            }
            (Step::KillContainer { .. }, _) => {}
            (Step::Resize { .. }, Done::Resized { pod, runs }) => self.take_resized(pod, runs),
            (step, Done::Hooked(outcome)) => self.take_hooked(step, outcome),
            (step, _) => tracing::error!(?step, "a step answered something else than it is for"),
        }
        self.save();
    }

    fn take_resized(&mut self, pod: Resources, runs: Vec<(String, u32, Resources)>) {
        self.seen.pod_applied = Some(pod);
        self.seen.resize_error.clear();
        for (name, attempt, resources) in runs {
            if let Some(seen) = self.seen.containers.get_mut(&name)
                && seen.run.as_ref().is_some_and(|run| run.attempt == attempt)
            {
                seen.applied = Some(resources);
            }
        }
        if !crate::plan::resize::is_in_progress(&self.want, &self.seen) {
            self.pod_event(Severity::Normal, "ResizeCompleted", "the pod's resources have been changed".to_owned());
        }
    }

    fn take_image(&mut self, name: &str, image: Box<ImageRecord>, came: Came) {
        self.pull_failures.remove(name);
        let (reference, bytes) = (self.image_of(name), image.size_bytes);
        self.record.containers.entry(name.to_owned()).or_default().image_id = image.id.as_str().to_owned();
        self.images.insert(name.to_owned(), image);
        self.seen.containers.entry(name.to_owned()).or_default().image = Image::Ready;
        let message = match came {
            Came::Present => format!("Container image \"{reference}\" already present on machine"),
            Came::Confirmed => format!("Container image \"{reference}\" is what the registry has"),
            Came::Pulled { ms } => format!("Successfully pulled image \"{reference}\" in {ms} ms: {bytes} bytes"),
        };
        self.container_event(name, Severity::Normal, "Pulled", message);
    }

    fn take_started(&mut self, name: &str, attempt: u32, sandbox: u32, started_wall_ms: u64) {
        let seen = self.seen.containers.entry(name.to_owned()).or_default();
        if note_started(seen, attempt, sandbox, started_wall_ms) {
            self.container_event(name, Severity::Normal, "Created", format!("Created container: {name}"));
            self.container_event(name, Severity::Normal, "Started", format!("Started container {name}"));
        }
    }

    fn take_ended(&mut self, name: &str, (attempt, sandbox): (u32, u32), mut ended: Ended) {
        let ends = self.ends();
        let seen = self.seen.containers.entry(name.to_owned()).or_default();
        // Also when this agent never told it to end: the one before may have.
        let changed = !ends
            && seen.run.as_ref().is_some_and(|run| run.attempt == attempt)
            && self.want.container(name).is_some_and(|container| anew(container, seen).is_some());
        ended.restart = changed;
        let times = (boot_ms(), self.agent.config.max_restart_backoff_ms);
        if !note_ended(seen, (attempt, sandbox), ended, times) {
            return;
        }
        if changed {
            forget(seen);
        }
        if seen.backoff_ms > 0 && self.want.deletion.is_none() {
            let message = format!("Back-off restarting failed container {name} in pod {}", self.want.display_name);
            let again = self.want.container(name).is_some_and(|container| {
                let run = self.seen.container(name).run.as_ref().and_then(|run| run.ended().cloned());
                run.is_some_and(|ended| crate::plan::view::will_restart(container, &ended))
            });
            if again {
                self.container_event(name, Severity::Warning, "BackOff", message);
            }
        }
    }

    fn take_failure(&mut self, step: Step, error: &StepError) {
        let text = crate::report::chain(error);
        tracing::warn!(pod = %self.want.display_name, ?step, error = %text, "step failed");
        let now_ms = boot_ms();
        if let (Step::PrepareImage { name } | Step::StartContainer { name, .. }, Some(reason)) =
            (&step, error.waiting_reason())
        {
            let failures = self.pull_failures.entry(name.clone()).or_default();
            let retry_ms = now_ms + image_delay_ms(*failures);
            *failures += 1;
            let (reason, message) = waiting_for_image(reason, *failures, &text);
            let known =
                matches!(&self.seen.container(name).image, Image::Failed { message: old, .. } if *old == message);
            self.seen.containers.entry(name.clone()).or_default().image =
                Image::Failed { reason: reason.to_owned(), message: message.clone(), retry_ms };
            if !known {
                self.container_event(name, Severity::Warning, "Failed", format!("Error: {message}"));
            }
            return;
        }
        if let (Step::StartContainer { name, attempt }, StepError::NotStarted { .. }) = (&step, error) {
            let finished_wall_ms = wall_ms();
            let reason = "StartError".to_owned();
            let ended = Ended { exit_code: 128, reason, message: text.clone(), finished_wall_ms, ..Ended::default() };
            self.container_event(name, Severity::Warning, "Failed", format!("Error: {text}"));
            self.take_ended(name, (*attempt, self.seen.sandbox_attempt), ended);
            self.save();
            return;
        }
        if let Step::KillContainer { name, .. } = &step
            && let Some(seen) = self.seen.containers.get_mut(name)
        {
            seen.kill_at_ms = None;
        }
        if matches!(step, Step::Resize { .. }) {
            self.seen.resize_error.clone_from(&text);
        }
        let failures = self.failures.entry(step.clone()).or_default();
        *failures += 1;
        let mut delay_ms = (STEP_RETRY_MS.0 << (*failures - 1).min(10)).min(STEP_RETRY_MS.1);
        if let (Step::PrepareVolumes, Some(reason)) = (&step, error.waiting_reason()) {
            // A registry is asked no more often for a volume's image than for a container's.
            delay_ms = image_delay_ms(*failures - 1);
            let (reason, message) = waiting_for_image(reason, *failures, &text);
            self.seen.volume_image = (reason.to_owned(), message);
        }
        if *failures == 1 || failures.is_power_of_two() {
            let reason = match &step {
                Step::PrepareVolumes => "FailedMount",
                Step::Resize { .. } => "ResizeError",
                Step::SpawnShim | Step::CreateSandbox { .. } | Step::AttachNetwork { .. } => "FailedCreatePodSandBox",
                Step::KillContainer { .. } | Step::StopSandbox | Step::CleanUpShim => "FailedKillPod",
                _ => "FailedSync",
            };
            self.pod_event(Severity::Warning, reason, text);
        }
        self.seen.blocked.insert(step, now_ms + delay_ms);
    }

    fn take_network(&mut self, attempt: u32, network: &PodNetwork) {
        self.seen.network_attempt = attempt;
        self.record.pod_ip = network.ip.to_string();
    }

    fn note_kill(&mut self, name: &str, kill_at_ms: u64) {
        let seen = self.seen.containers.entry(name.to_owned()).or_default();
        let first = seen.kill_at_ms.replace(kill_at_ms).is_none();
        if first && seen.condemned.is_none() {
            self.container_event(name, Severity::Normal, "Killing", format!("Stopping container {name}"));
        }
    }

    // ------------------------------------------------------------------------------------------- the supervisor

    fn take_event(&mut self, event: ShimEvent) {
        match event.what {
            crate::shim::What::Started { name, attempt, sandbox, wall_ms } => {
                self.take_started(&name, attempt, sandbox, wall_ms);
            }
            crate::shim::What::Ended { name, attempt, sandbox, mut ended } => {
                self.add_termination_message(&name, attempt, &mut ended);
                self.take_ended(&name, (attempt, sandbox), ended);
            }
            crate::shim::What::SandboxEnded { sandbox } => {
                if sandbox == self.seen.sandbox_attempt && self.seen.sandbox == SandboxState::Up {
                    self.seen.sandbox = SandboxState::Ended;
                }
            }
        }
        self.save();
        // Written down: the supervisor may forget it.
        if let (Some(shim), Some(sequence)) = (&self.shim, event.sequence) {
            shim.acknowledge(sequence);
        }
    }

    /// What the container left to say, for its status.
    fn add_termination_message(&self, name: &str, attempt: u32, ended: &mut Ended) {
        let Some(container) = crate::want::any_container(&self.pod, name) else { return };
        let paths = self.agent.paths.pod(&self.uid).container(name, attempt);
        let log = self.agent.paths.log_file(&self.pod, &self.uid, name, attempt);
        let message = crate::termination::message(
            &paths.termination_log,
            &log,
            &container.termination_message_policy,
            ended.exit_code,
        );
        if !message.is_empty() {
            ended.message = message;
        }
    }

    /// The connection to the supervisor ended.
    async fn lost_shim(&mut self) {
        self.shim_events = None;
        // Told to end, it does.
        if self.seen.in_flight.contains(&Step::StopSandbox) {
            return;
        }
        self.shim = None;
        self.meet_shim().await;
        self.save();
    }

    /// Connects to the supervisor if it lives, and finds out that it died if it does not.
    async fn meet_shim(&mut self) {
        match Shim::find(&self.agent.paths.pod(&self.uid)).await {
            crate::shim::Found::Live(shim, state, events) => {
                self.seen.shim = ShimState::Up;
                self.seen.sandbox = state.sandbox;
                self.seen.sandbox_attempt = self.seen.sandbox_attempt.max(state.sandbox_attempt);
                for (name, run) in state.runs {
                    self.take_started(&name, run.attempt, run.sandbox, run.started_wall_ms);
                    if let RunState::Ended(mut ended) = run.state {
                        self.add_termination_message(&name, run.attempt, &mut ended);
                        self.take_ended(&name, (run.attempt, run.sandbox), ended);
                    }
                }
                (self.shim, self.shim_events) = (Some(shim), Some(events));
            }
            crate::shim::Found::Dead => self.shim_died(),
            crate::shim::Found::Never => self.seen.shim = ShimState::Absent,
        }
    }

    fn shim_died(&mut self) {
        for event in crate::shim::last_words(&self.agent.paths.pod(&self.uid)) {
            self.take_event(event);
        }
        let message = "the pod's supervisor died; its containers are killed".to_owned();
        self.pod_event(Severity::Warning, "SandboxLost", message.clone());
        (self.seen.shim, self.seen.sandbox) = (ShimState::Dead, SandboxState::Ended);
        let running: Vec<(String, u32, u32, u64)> = self
            .seen
            .containers
            .iter()
            .filter_map(|(name, seen)| {
                let run = seen.run.as_ref().filter(|run| run.is_running())?;
                Some((name.clone(), run.attempt, run.sandbox, run.started_wall_ms))
            })
            .collect();
        for (name, attempt, sandbox, started_wall_ms) in running {
            let ended = Ended {
                exit_code: 137,
                signal: 9,
                reason: "Error".to_owned(),
                message: message.clone(),
                started_wall_ms,
                finished_wall_ms: wall_ms(),
                restart: false,
            };
            self.take_ended(&name, (attempt, sandbox), ended);
        }
    }

    // ------------------------------------------------------------------------------------------------- telling

    fn report(&mut self, plan: &Plan) {
        let now_ms = boot_ms();
        if plan.view.phase == Phase::Running
            && let Some(arrived) = self.arrived.take()
        {
            let took = arrived.elapsed();
            self.agent.metrics.pod_start.observe(took);
            tracing::debug!(pod = %self.want.display_name, took_us = took.as_micros(), "the pod runs");
        }
        let facts = Facts {
            host_ip: self.agent.node_ip().to_string(),
            pod_ip: if self.want.host_network { self.agent.node_ip().to_string() } else { self.record.pod_ip.clone() },
            start_wall_ms: self.record.start_wall_ms,
            containers: self.record.containers.iter().map(|(name, of)| (name.clone(), known(of))).collect(),
        };
        let empty = PodStatus::default();
        let previous = self.reported.as_ref().or(self.pod.status.as_ref()).unwrap_or(&empty);
        let status = if self.done_elsewhere {
            self.pod.status.clone().unwrap_or_default()
        } else {
            pod_status(&self.pod, &plan.view, &facts, previous, wall_ms())
        };
        let due = self.minor_report_at_ms.is_some_and(|at_ms| at_ms <= now_ms);
        match &self.reported {
            _ if plan.finished => {}
            _ if self.done_elsewhere => return,
            Some(reported) if *reported == status => {
                self.minor_report_at_ms = None;
                return;
            }
            reported if !due && self.is_minor(reported.as_ref(), &status) => {
                self.minor_report_at_ms.get_or_insert(now_ms + MINOR_REPORT_DELAY_MS);
                return;
            }
            _ => {}
        }
        // Only remains of it were removed, because their spec was not readable: the pod begins anew if it is wanted, and who
        // wants it gone hears of that from the new beginning.
        if plan.finished && (self.desired.borrow().is_wanted() || self.pod.spec.is_none()) {
            return;
        }
        self.minor_report_at_ms = None;
        self.reported = Some(status.clone());
        let (namespace, name) = key_of(&self.pod);
        let report = PodStatusReport {
            namespace,
            name,
            uid: self.uid.0.clone(),
            status: Some(status),
            sequence: 0,
            finished: plan.finished,
        };
        self.agent.outbox.report(&self.uid, report);
    }

    /// Whether nobody waits for this news, or better news will follow it in a moment: of a pod that begins, and of one that runs in part.
    fn is_minor(&self, reported: Option<&PodStatus>, status: &PodStatus) -> bool {
        let begins = reported.is_none_or(|reported| reported.phase == "Pending");
        let starting = || self.seen.in_flight.iter().any(|step| matches!(step, Step::StartContainer { .. }));
        match reported {
            None if status.phase == "Pending" => self.arrived.is_some(),
            Some(reported) if !matters(reported, status) => true,
            _ => begins && status.phase == "Running" && starting(),
        }
    }

    fn pod_event(&self, severity: Severity, reason: &str, message: String) {
        self.agent.outbox.event(pod_event(&self.pod, &self.uid, severity, reason, message));
    }

    fn container_event(&self, name: &str, severity: Severity, reason: &str, message: String) {
        let mut event = pod_event(&self.pod, &self.uid, severity, reason, message);
        if let Some(container) = self.want.container(name) {
            event.field_path = field_path(container.kind, name);
        }
        self.agent.outbox.event(event);
    }

    fn image_of(&self, name: &str) -> String {
        crate::want::any_container(&self.pod, name).map_or_else(String::new, |container| container.image.clone())
    }

    fn save(&mut self) {
        self.record.note(&self.seen);
        if !self.seen.dir || self.seen.in_flight.contains(&Step::RemovePodDir) {
            return;
        }
        let dir = self.agent.paths.pod(&self.uid).run;
        if let Err(error) = self.record.save_if_changed(&dir, &mut self.kept) {
            self.warn("keep the pod's record", &error);
        }
    }

    fn warn(&self, what: &str, error: &(dyn std::error::Error + 'static)) {
        tracing::warn!(pod = %self.want.display_name, error = crate::report::chain(error), "{what}");
    }
}

fn known(container: &ContainerRecord) -> Known {
    Known { image_id: container.image_id.clone(), begun: container.begun.clone() }
}

/// How long an image is waited for that could not be had so often before.
fn image_delay_ms(failures: u32) -> u64 {
    (IMAGE_RETRY_MS.0 << failures.min(10)).min(IMAGE_RETRY_MS.1)
}

/// The first time the failure itself is the reason, from then on that it is being waited.
fn waiting_for_image(reason: &'static str, failures: u32, why: &str) -> (&'static str, String) {
    match (reason, failures) {
        ("ErrImagePull", 2..) => ("ImagePullBackOff", format!("Back-off pulling image: {why}")),
        _ => (reason, why.to_owned()),
    }
}

async fn next_event(events: &mut Option<mpsc::Receiver<Box<ShimEvent>>>) -> Option<Box<ShimEvent>> {
    match events {
        Some(events) => events.recv().await,
        None => std::future::pending().await,
    }
}

/// Whether someone waits for this difference: phase, readiness, or a container that cannot start.
fn matters(old: &PodStatus, new: &PodStatus) -> bool {
    let ready = |status: &PodStatus| {
        status.conditions.iter().find(|condition| condition.r#type == "Ready").map(|condition| condition.status.clone())
    };
    old.phase != new.phase || ready(old) != ready(new)
}

/// Whether the API server took the pod for not ready because it had not heard of the node, while we know better.
fn was_marked_silent(pod: &Pod, reported: &PodStatus) -> bool {
    let marked = pod.condition("Ready").is_some_and(|ready| ready.status != "True" && ready.reason == "NodeNotReady");
    marked
        && reported.conditions.iter().any(|condition| condition.r#type == "Ready" && condition.reason != "NodeNotReady")
}

fn same_but_status(a: &Pod, b: &Pod) -> bool {
    let version = |pod: &Pod| {
        let mut meta = pod.metadata.clone().unwrap_or_default();
        meta.resource_version.clear();
        meta
    };
    a.spec == b.spec && version(a) == version(b)
}

/// Whether, and from when, the pod is to end.
fn wish_to_end(pod: &Pod, gone: bool, now_ms: u64) -> Option<Deletion> {
    let meta = pod.metadata.as_ref();
    if gone {
        // Nobody waits for its status any more; the containers get the minimum.
        return Some(Deletion { since_ms: now_ms, grace_ms: 0 });
    }
    meta.and_then(|meta| meta.deletion_timestamp)?;
    let spec_s = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
    let seconds = meta.and_then(|meta| meta.deletion_grace_period_seconds).or(spec_s).unwrap_or(DEFAULT_GRACE_S);
    Some(Deletion { since_ms: now_ms, grace_ms: grace_ms(seconds) })
}

/// A later wish can only make the end come sooner, never later or not at all.
fn sooner(old: Option<Deletion>, new: Option<Deletion>) -> Option<Deletion> {
    match (old, new) {
        (Some(old), Some(new)) if new.since_ms + new.grace_ms < old.since_ms + old.grace_ms => Some(new),
        (Some(old), _) => Some(old),
        (None, new) => new,
    }
}
