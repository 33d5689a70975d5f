//! Random event orders against a small model of the node: whatever happens, init order holds, no container runs twice at
//! once, and a deletion ends with nothing.

use super::backoff::{note_ended, note_started};
use super::model::*;
use super::{Plan, plan};

/// SplitMix64: enough for test orders, and a failure names the seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound as u64).expect("fits")
    }

    fn one_in(&mut self, bound: usize) -> bool {
        self.below(bound) == 0
    }
}

/// A process of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Process {
    name: String,
    attempt: u32,
    sandbox: u32,
    kill_at_ms: Option<u64>,
}

/// The node's truth beside what the agent has seen.
struct World {
    random: Random,
    now_ms: u64,
    want: PodWant,
    seen: Seen,
    processes: Vec<Process>,
    pause: bool,
    shim: bool,
    /// Init containers that ended with 0, by sandbox.
    init_done: Vec<(u32, String)>,
    trace: Vec<String>,
}

fn random_gates(random: &mut Random) -> Gates {
    Gates { post_start: random.one_in(4), pre_stop: random.one_in(4), ..Gates::default() }
}

fn random_pod(random: &mut Random) -> PodWant {
    let restart = [RestartPolicy::Always, RestartPolicy::OnFailure, RestartPolicy::Never][random.below(3)];
    let mut containers = Vec::new();
    for index in 0..random.below(4) {
        let sidecar = random.one_in(2);
        let init_restart = if restart == RestartPolicy::Never { restart } else { RestartPolicy::OnFailure };
        containers.push(ContainerWant {
            name: format!("i{index}"),
            kind: if sidecar { Kind::Sidecar } else { Kind::Init },
            image: String::new(),
            restart: if sidecar { RestartPolicy::Always } else { init_restart },
            rules: Vec::new(),
            gates: if sidecar { random_gates(random) } else { Gates::default() },
            resources: Resources::default(),
            resize: ResizePolicy::default(),
        });
    }
    for index in 0..=random.below(3) {
        containers.push(ContainerWant {
            name: format!("a{index}"),
            kind: Kind::App,
            image: String::new(),
            restart,
            rules: Vec::new(),
            gates: random_gates(random),
            resources: Resources::default(),
            resize: ResizePolicy::default(),
        });
    }
    PodWant {
        display_name: "default/p".into(),
        containers,
        restart,
        grace_ms: 30_000,
        deletion: None,
        deadline_ms: random.one_in(10).then_some(200_000),
        evicted: None,
        refused: None,
        host_network: random.one_in(8),
        resources: Resources::default(),
    }
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let want = random_pod(&mut random);
        Self {
            random,
            now_ms: 1_000,
            want,
            seen: Seen::default(),
            processes: Vec::new(),
            pause: false,
            shim: false,
            init_done: Vec::new(),
            trace: Vec::new(),
        }
    }

    /// Plans, notes what must be recorded, and puts the steps in flight.
    fn plan(&mut self) -> Plan {
        let plan = plan(&self.want, &self.seen, self.now_ms);
        if plan.terminal.is_some() {
            self.seen.terminal.clone_from(&plan.terminal);
        }
        for planned in &plan.steps {
            self.trace.push(format!("{} plan {:?} ({})", self.now_ms, planned.step, planned.why));
            assert!(self.seen.in_flight.insert(planned.step.clone()), "{:?} asked for twice", planned.step);
        }
        plan
    }

    fn end_process(&mut self, index: usize, code: i32) {
        let process = self.processes.remove(index);
        self.trace.push(format!("{} exit {process:?} {code}", self.now_ms));
        if code == 0 {
            self.init_done.push((process.sandbox, process.name.clone()));
        }
        let container = self.seen.containers.entry(process.name.clone()).or_default();
        let began = container.run.as_ref().map_or(0, |run| run.started_wall_ms);
        let ended =
            Ended { exit_code: code, started_wall_ms: began, finished_wall_ms: self.now_ms, ..Ended::default() };
        note_ended(container, (process.attempt, process.sandbox), ended, (self.now_ms, 300_000));
    }

    fn kill_all(&mut self) {
        while !self.processes.is_empty() {
            self.end_process(0, 137);
        }
    }

    /// The invariant at the heart: when may a container's process come to be?
    fn check_start(&self, name: &str) {
        let sandbox = self.seen.sandbox_attempt;
        assert!(self.processes.iter().all(|process| process.name != name), "two instances of {name}");
        for before in &self.want.containers {
            let is_app = self.want.container(name).expect("wanted").kind == Kind::App;
            if before.name == name || (before.kind == Kind::App && is_app) {
                break;
            }
            if before.kind == Kind::Init {
                let done = self.init_done.contains(&(sandbox, before.name.clone()));
                assert!(done, "{name} starts before {} is done", before.name);
            }
        }
        assert!(self.seen.network_attempt == sandbox || self.want.host_network, "start without network");
    }

    /// Performs a step that was in flight, now and then with a failure.
    fn complete(&mut self, step: &Step) {
        self.seen.in_flight.remove(step);
        let fails = self.random.one_in(12);
        if fails {
            self.trace.push(format!("{} fail {step:?}", self.now_ms));
            if let Step::StartContainer { name, attempt } = step {
                let container = self.seen.containers.entry(name.clone()).or_default();
                let ended = Ended { exit_code: 128, finished_wall_ms: self.now_ms, ..Ended::default() };
                let run = (*attempt, self.seen.sandbox_attempt);
                note_ended(container, run, ended, (self.now_ms, 300_000));
            } else if let Step::PrepareImage { name } = step {
                self.seen.containers.entry(name.clone()).or_default().image = Image::Failed {
                    reason: "ErrImageNeverPull".into(),
                    message: String::new(),
                    retry_ms: self.now_ms + 10_000,
                };
            } else {
                self.seen.blocked.insert(step.clone(), self.now_ms + 1_000);
            }
            return;
        }
        self.seen.blocked.remove(step);
        self.perform(step);
    }

    fn perform(&mut self, step: &Step) {
        match step {
            Step::EnsurePodDir => (self.seen.dir, self.seen.data) = (true, true),
            Step::SpawnShim => {
                assert!(!self.shim);
                (self.shim, self.seen.shim, self.seen.sandbox) = (true, Shim::Up, SandboxState::None);
            }
            Step::CleanUpShim => {
                assert!(self.processes.is_empty() && !self.pause);
                (self.seen.shim, self.seen.sandbox) = (Shim::Absent, SandboxState::None);
            }
            Step::PrepareVolumes => self.seen.volumes = true,
            Step::CreateSandbox { attempt } => {
                if self.shim {
                    assert!(!self.pause && self.processes.is_empty());
                    (self.pause, self.seen.sandbox, self.seen.sandbox_attempt) = (true, SandboxState::Up, *attempt);
                }
            }
            Step::AttachNetwork { attempt } => {
                if self.pause && self.seen.sandbox_attempt == *attempt {
                    (self.seen.network_attempt, self.seen.network_held) = (*attempt, true);
                }
            }
            Step::WriteEtcFiles { attempt } => self.seen.etc_attempt = *attempt,
            Step::PrepareImage { name } => {
                self.seen.containers.entry(name.clone()).or_default().image = Image::Ready;
            }
            Step::StartContainer { name, attempt } => {
                if !self.pause {
                    return;
                }
                self.check_start(name);
                let sandbox = self.seen.sandbox_attempt;
                let container = self.seen.containers.entry(name.clone()).or_default();
                assert!(note_started(container, *attempt, sandbox, self.now_ms), "attempt {attempt} of {name} is old");
                let process = Process { name: name.clone(), attempt: *attempt, sandbox, kill_at_ms: None };
                self.processes.push(process);
            }
            Step::PostStart { name, attempt } | Step::PreStop { name, attempt } => {
                let container = self.seen.containers.entry(name.clone()).or_default();
                if container.run.as_ref().is_some_and(|run| run.attempt == *attempt) {
                    match step {
                        Step::PostStart { .. } => container.health.post_started = true,
                        _ => container.pre_stopped = true,
                    }
                }
            }
            Step::KillContainer { name, grace_ms } => {
                let at_ms = self.now_ms + grace_ms;
                if let Some(process) = self.processes.iter_mut().find(|process| process.name == *name) {
                    process.kill_at_ms = Some(process.kill_at_ms.map_or(at_ms, |old| old.min(at_ms)));
                    self.seen.containers.entry(name.clone()).or_default().kill_at_ms = process.kill_at_ms;
                }
            }
            Step::Resize { runs } => {
                self.seen.pod_applied = Some(self.want.resources);
                for (name, _) in runs {
                    let wanted = self.want.container(name).map(|container| container.resources);
                    self.seen.containers.entry(name.clone()).or_default().applied = wanted;
                }
            }
            Step::StopSandbox => {
                assert!(self.processes.is_empty());
                (self.pause, self.shim) = (false, false);
                (self.seen.shim, self.seen.sandbox) = (Shim::Absent, SandboxState::None);
            }
            Step::DetachNetwork => (self.seen.network_attempt, self.seen.network_held) = (0, false),
            Step::RemovePodData => (self.seen.data, self.seen.volumes) = (false, false),
            Step::RemovePodDir => {
                assert!(!self.shim && self.processes.is_empty());
                (self.seen.dir, self.seen.data) = (false, false);
            }
        }
    }

    fn happen(&mut self, deleting: bool) {
        if !self.seen.in_flight.is_empty() && !self.random.one_in(4) {
            let index = self.random.below(self.seen.in_flight.len());
            let step = self.seen.in_flight.iter().nth(index).expect("in range").clone();
            self.complete(&step);
            return;
        }
        match self.random.below(if deleting { 3 } else { 12 }) {
            0..=1 => {
                let step_ms = [1, 500, 5_000, 11_000, 400_000][self.random.below(5)];
                self.now_ms += step_ms;
                let due = |process: &Process, now_ms| process.kill_at_ms.is_some_and(|at_ms| at_ms <= now_ms);
                while let Some(index) = self.processes.iter().position(|process| due(process, self.now_ms)) {
                    self.end_process(index, 137);
                }
            }
            2 if !self.processes.is_empty() => {
                let index = self.random.below(self.processes.len());
                let stubborn = deleting && self.random.one_in(2);
                if !stubborn {
                    let code = if self.random.one_in(3) { 1 } else { 0 };
                    self.end_process(index, code);
                }
            }
            3 if self.pause && self.random.one_in(6) => {
                self.trace.push(format!("{} pause dies", self.now_ms));
                (self.pause, self.seen.sandbox) = (false, SandboxState::Ended);
                self.kill_all();
            }
            4 if self.shim && self.random.one_in(6) => {
                self.trace.push(format!("{} shim dies", self.now_ms));
                (self.pause, self.shim) = (false, false);
                (self.seen.shim, self.seen.sandbox) = (Shim::Dead, SandboxState::Ended);
                self.kill_all();
            }
            5 if self.random.one_in(6) => {
                // The agent dies: steps are cut off or had just been done; what is known of images is forgotten.
                self.trace.push(format!("{} agent restarts", self.now_ms));
                self.seen.in_flight.clear();
                self.seen.blocked.clear();
                for container in self.seen.containers.values_mut() {
                    container.image = Image::Unknown;
                }
            }
            _ => {}
        }
    }

    fn fail(&self, seed: u64, what: &str) -> ! {
        panic!("seed {seed}: {what}\n{:#?}\n{}\nseen {:#?}", self.want, self.trace.join("\n"), self.seen)
    }
}

#[test]
fn whatever_happens_order_holds_and_deletion_ends_with_nothing() {
    for seed in 0..4_000 {
        let mut world = World::new(seed);
        let length = 20 + world.random.below(150);
        for _ in 0..length {
            world.plan();
            world.happen(false);
        }
        let grace_ms = [0, 2_000, 30_000][world.random.below(3)];
        world.want.deletion = Some(Deletion { since_ms: world.now_ms, grace_ms });
        let mut finished = false;
        for _ in 0..600 {
            let plan = world.plan();
            if plan.steps.iter().any(|planned| matches!(planned.step, Step::StartContainer { .. })) {
                world.fail(seed, "a container starts in a pod that ends");
            }
            finished = plan.finished;
            if finished {
                break;
            }
            world.happen(true);
        }
        let nothing = world.processes.is_empty() && !world.pause && !world.shim && !world.seen.dir;
        if !finished || !nothing {
            world.fail(seed, "the deletion did not end with nothing");
        }
    }
}

#[test]
fn without_trouble_every_pod_comes_up() {
    for seed in 0..500 {
        let mut world = World::new(seed);
        world.want.deadline_ms = None;
        for _ in 0..200 {
            world.plan();
            let Some(step) = world.seen.in_flight.iter().next().cloned() else {
                // Init containers do their work; nothing else is left to happen.
                let init = |process: &Process| world.want.container(&process.name).expect("wanted").kind == Kind::Init;
                let Some(index) = world.processes.iter().position(init) else { break };
                world.end_process(index, 0);
                continue;
            };
            world.seen.in_flight.remove(&step);
            world.perform(&step);
        }
        let expected = world.want.containers.iter().filter(|container| container.kind != Kind::Init).count();
        if world.processes.len() != expected {
            world.fail(seed, "not everything runs");
        }
        let view = plan(&world.want, &world.seen, world.now_ms).view;
        assert_eq!(view.phase.as_str(), "Running", "seed {seed}");
        assert!(view.conditions.iter().all(|condition| condition.status), "seed {seed}: {:?}", view.conditions);
    }
}
