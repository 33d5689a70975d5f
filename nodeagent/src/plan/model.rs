//! What the planner knows: the pod that is wanted, what was seen of it on this node, and the steps it can ask for.
//!
//! Times of decisions are milliseconds of the boot clock (`*_ms`), which no clock adjustment moves; times that are only
//! shown to people are milliseconds since the epoch (`*_wall_ms`).

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::backoff::Backoff;
pub use crate::container::resources::Resources;
pub use crate::pods::Evicted;

/// The place of a container in the pod's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Runs to exit 0 before anything after it in the list starts.
    Init,
    /// An init entry with restartPolicy Always: starts in its place and is kept running.
    Sidecar,
    /// Starts when the whole init list is done.
    App,
    /// Added to the running pod by a user: starts as soon as there is a sandbox, once, and counts for nothing.
    Debug,
}

impl Kind {
    /// Whether it is of the init list.
    #[must_use]
    pub fn is_of_init_list(self) -> bool {
        matches!(self, Self::Init | Self::Sidecar)
    }
}

/// When an ended container is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartPolicy {
    /// Whatever its exit code.
    Always,
    /// After an exit code other than 0.
    OnFailure,
    /// Not at all.
    Never,
}

impl RestartPolicy {
    /// Whether a container that ended with `exit_code` is started again.
    #[must_use]
    pub fn restarts(self, exit_code: i32) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => exit_code != 0,
            Self::Never => false,
        }
    }
}

/// One wanted container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerWant {
    /// Unique within the pod.
    pub name: String,
    /// Init, sidecar, app or debug container.
    pub kind: Kind,
    /// The reference of the image that it shall run.
    pub image: String,
    /// The effective policy: the container's own where it has one, else the pod's. An init container of an `Always`
    /// pod is retried on failure.
    pub restart: RestartPolicy,
    /// Exit codes after which it is started again whatever the policy says.
    pub rules: Vec<RestartRule>,
    /// What stands between its process and its readiness.
    pub gates: Gates,
    /// CPU and memory that it shall have.
    pub resources: Resources,
    /// How it gets others.
    pub resize: ResizePolicy,
}

impl ContainerWant {
    /// Whether a container that ended like this is started again.
    #[must_use]
    pub fn restarts(&self, ended: &Ended) -> bool {
        ended.restart
            || self.rules.iter().any(|rule| rule.matches(ended.exit_code))
            || self.restart.restarts(ended.exit_code)
    }
}

/// A rule of restartPolicyRules (KEP-5307); its action is always a restart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestartRule {
    /// Operator In; else NotIn.
    pub within: bool,
    /// Exit codes.
    pub codes: Vec<i32>,
}

impl RestartRule {
    /// Whether it speaks of this exit code.
    #[must_use]
    pub fn matches(&self, exit_code: i32) -> bool {
        self.codes.contains(&exit_code) == self.within
    }
}

/// For which resources a change needs a restart of the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ResizePolicy {
    /// CPU.
    pub cpu_restarts: bool,
    /// Memory.
    pub memory_restarts: bool,
}

/// Probes and hooks of a container, as far as the planner minds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Gates {
    /// A postStart hook has to be done before it counts as started.
    pub post_start: bool,
    /// A preStop hook comes before the stop signal.
    pub pre_stop: bool,
    /// A startup probe has to pass before it counts as started.
    pub startup: bool,
    /// A readiness probe says whether it is ready.
    pub readiness: bool,
}

/// What hooks and probes found of the newest run; outlives the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Health {
    /// The postStart hook is done.
    pub post_started: bool,
    /// The startup probe passed.
    pub startup_passed: bool,
    /// The readiness probe's newest verdict.
    pub ready: bool,
}

/// A run that is to end because of a probe or its postStart hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condemned {
    /// For the event.
    pub why: String,
    /// When its grace is over.
    pub deadline_ms: u64,
}

/// Why a node does not take a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Pod reason, the kubelet's.
    pub reason: &'static str,
    /// The event's message, and what the pod's ends with.
    pub message: String,
}

/// Why and since when a pod ends by someone's wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deletion {
    /// When this agent saw the wish.
    pub since_ms: u64,
    /// How long the containers may take.
    pub grace_ms: u64,
}

/// The pod as it shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodWant {
    /// For messages: namespace/name.
    pub display_name: String,
    /// Init list in order, then apps in order, then debug containers.
    pub containers: Vec<ContainerWant>,
    /// The pod's restart policy.
    pub restart: RestartPolicy,
    /// terminationGracePeriodSeconds in milliseconds, for ends that nobody asked for.
    pub grace_ms: u64,
    /// Set when the pod is to be removed.
    pub deletion: Option<Deletion>,
    /// activeDeadlineSeconds as a point in time.
    pub deadline_ms: Option<u64>,
    /// Set when the node cannot keep the pod.
    pub evicted: Option<Evicted>,
    /// Set when the node does not take the pod: it never starts. One that has started before stays.
    pub refused: Option<Refused>,
    /// No sandbox network of its own.
    pub host_network: bool,
    /// CPU and memory that the pod as a whole shall have.
    pub resources: Resources,
}

impl PodWant {
    /// The wanted container of that name.
    #[must_use]
    pub fn container(&self, name: &str) -> Option<&ContainerWant> {
        self.containers.iter().find(|container| container.name == name)
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ended {
    /// 128 + signal when killed.
    pub exit_code: i32,
    /// The signal that killed it, else 0.
    pub signal: i32,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`.
    pub reason: String,
    /// Detail for people, may be empty.
    pub message: String,
    /// When it began; 0 when it never did.
    pub started_wall_ms: u64,
    /// When it ended.
    pub finished_wall_ms: u64,
    /// It was ended to be started again, from another image or with other resources.
    #[serde(default)]
    pub restart: bool,
}

/// The state of one run of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunState {
    /// Its process lives.
    Running,
    /// Its process is gone, or never came to be.
    Ended(Ended),
}

/// One run (attempt) of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// 0, 1, 2 … over the pod's life; Kubernetes' restartCount.
    pub attempt: u32,
    /// The sandbox attempt it belongs to.
    pub sandbox: u32,
    /// When it began.
    pub started_wall_ms: u64,
    /// Whether it lives.
    pub state: RunState,
}

impl Run {
    /// How it ended, if it did.
    #[must_use]
    pub fn ended(&self) -> Option<&Ended> {
        match &self.state {
            RunState::Running => None,
            RunState::Ended(ended) => Some(ended),
        }
    }

    /// Whether its process lives.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.state == RunState::Running
    }
}

/// What is known of a container's image on this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Image {
    /// Not looked at since the last start.
    #[default]
    Unknown,
    /// Present, and everything that a start needs is at hand.
    Ready,
    /// A start is not possible.
    Failed {
        /// Kubernetes' waiting reason, such as `ErrImageNeverPull`.
        reason: String,
        /// What to do about it.
        message: String,
        /// When to look again.
        retry_ms: u64,
    },
}

/// What was seen of one container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ContainerSeen {
    /// Its image.
    pub image: Image,
    /// The newest run.
    pub run: Option<Run>,
    /// How the run before that one ended.
    pub previous: Option<Ended>,
    /// Not before this may it start again.
    pub retry_ms: u64,
    /// The delay that `retry_ms` was made of, for the message.
    pub backoff_ms: u64,
    /// What its next back-off follows.
    pub backoff: Backoff,
    /// Set once it was told to end: when it will be killed.
    pub kill_at_ms: Option<u64>,
    /// What hooks and probes found of the newest run.
    pub health: Health,
    /// The newest run's preStop hook was run, whatever came of it.
    pub pre_stopped: bool,
    /// The newest run is to end, and to start again by its policy.
    pub condemned: Option<Condemned>,
    /// CPU and memory of the newest run, or of the start that is under way; unknown for one that an older agent started.
    pub applied: Option<Resources>,
    /// The reference of that run's image; empty where it is as unknown.
    pub started_from: String,
}

impl ContainerSeen {
    /// Whether its process lives and has started up as far as hook and startup probe say.
    #[must_use]
    pub fn is_started(&self, gates: Gates) -> bool {
        let running = self.run.as_ref().is_some_and(Run::is_running);
        running && (self.health.post_started || !gates.post_start) && (self.health.startup_passed || !gates.startup)
    }

    /// Whether it is started and its readiness probe, if any, says so.
    #[must_use]
    pub fn is_ready(&self, gates: Gates) -> bool {
        self.is_started(gates) && (self.health.ready || !gates.readiness)
    }
}

/// The pod's supervisor process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Shim {
    /// Never started, or ended in order.
    #[default]
    Absent,
    /// Connected.
    Up,
    /// It died and may have left processes, mounts and cgroups behind.
    Dead,
}

/// The sandbox: pause and the namespaces it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SandboxState {
    /// None since the shim started.
    #[default]
    None,
    /// pause lives.
    Up,
    /// pause is gone, and all that ran in it.
    Ended,
}

/// A phase that nothing leaves again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// Succeeded, else Failed.
    pub succeeded: bool,
    /// Pod reason, mostly empty (`DeadlineExceeded`).
    pub reason: String,
    /// Pod message, mostly empty.
    pub message: String,
    /// When it was decided: sidecars get their grace from here.
    pub since_ms: u64,
    /// Instead of the pod's own grace.
    #[serde(default)]
    pub grace_ms: Option<u64>,
}

/// What was seen of the pod on this node.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Seen {
    /// The pod's directory and its spec file exist.
    pub dir: bool,
    /// Volumes or root file systems may exist.
    pub data: bool,
    /// Logs may exist; they stay until the pod is removed.
    pub logs: bool,
    /// The supervisor.
    pub shim: Shim,
    /// The newest sandbox's number; 0 before the first.
    pub sandbox_attempt: u32,
    /// The newest sandbox.
    pub sandbox: SandboxState,
    /// The sandbox attempt that the network is attached to; 0 when it is not.
    pub network_attempt: u32,
    /// An address, veth or netns of the pod may exist.
    pub network_held: bool,
    /// All volumes are there.
    pub volumes: bool,
    /// Why a volume's image is not there: Kubernetes' waiting reason and what people are told; empty when none is missing.
    pub volume_image: (String, String),
    /// /etc/hosts, hostname and resolv.conf of this sandbox attempt are written.
    pub etc_attempt: u32,
    /// By container name. Boxed, as in other maps that each pod has: a
    /// leaf of a map has room for eleven.
    pub containers: BTreeMap<String, Box<ContainerSeen>>,
    /// Steps that are being performed.
    pub in_flight: BTreeSet<Step>,
    /// Steps that failed and may be tried again at that time.
    pub blocked: BTreeMap<Step, u64>,
    /// Set when the pod reached a terminal phase.
    pub terminal: Option<Terminal>,
    /// CPU and memory of the pod's cgroup; unknown for one that an older agent made.
    pub pod_applied: Option<Resources>,
    /// Why the newest change of resources could not be carried out; empty when it could.
    pub resize_error: String,
}

/// Something that the executor can do. Every step is idempotent.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// Make the pod's directory and keep its spec there.
    EnsurePodDir,
    /// Start the supervisor and connect to it.
    SpawnShim,
    /// After the supervisor's death: kill and remove what it left.
    CleanUpShim,
    /// Make the pod's volumes.
    PrepareVolumes,
    /// Start pause with new namespaces.
    CreateSandbox {
        /// Counts from 1.
        attempt: u32,
    },
    /// Give the sandbox its interface, address and routes.
    AttachNetwork {
        /// The sandbox.
        attempt: u32,
    },
    /// Write hosts, hostname and resolv.conf.
    WriteEtcFiles {
        /// The sandbox.
        attempt: u32,
    },
    /// Find the image and make everything ready that a start of the container needs.
    PrepareImage {
        /// The container.
        name: String,
    },
    /// Start a container in the sandbox.
    StartContainer {
        /// The container.
        name: String,
        /// Its attempt.
        attempt: u32,
    },
    /// Run the postStart hook of a run.
    PostStart {
        /// The container.
        name: String,
        /// The run.
        attempt: u32,
    },
    /// Run the preStop hook of a run.
    PreStop {
        /// The container.
        name: String,
        /// The run.
        attempt: u32,
    },
    /// TERM now, KILL after the grace.
    KillContainer {
        /// The container.
        name: String,
        /// Time between the two, milliseconds.
        grace_ms: u64,
    },
    /// Give these runs, and the pod as a whole, the CPU and memory that they shall have.
    Resize {
        /// Container and run.
        runs: Vec<(String, u32)>,
    },
    /// End pause and the supervisor.
    StopSandbox,
    /// Give the address back.
    DetachNetwork,
    /// Remove volumes and root file systems; logs and the record stay.
    RemovePodData,
    /// Remove everything that is left of the pod.
    RemovePodDir,
}

impl Step {
    /// Whether the step may bring something into being.
    #[must_use]
    pub fn makes_something(&self) -> bool {
        match self {
            Self::EnsurePodDir
            | Self::SpawnShim
            | Self::PrepareVolumes
            | Self::CreateSandbox { .. }
            | Self::AttachNetwork { .. }
            | Self::WriteEtcFiles { .. }
            | Self::PrepareImage { .. }
            | Self::StartContainer { .. } => true,
            Self::CleanUpShim
            | Self::PostStart { .. }
            | Self::PreStop { .. }
            | Self::KillContainer { .. }
            | Self::Resize { .. }
            | Self::StopSandbox
            | Self::DetachNetwork
            | Self::RemovePodData
            | Self::RemovePodDir => false,
        }
    }
}

/// A step with the reason for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// What to do.
    pub step: Step,
    /// Why, for logs and `describe`.
    pub why: &'static str,
}
