//! What the supervisor says, and what it remembers.

use prost::Message;

use super::{Empty, User};

/// From the supervisor.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    /// The request's; 0 for events.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// What is said.
    #[prost(oneof = "Say", tags = "2, 3, 4, 5, 6, 7, 8")]
    pub say: Option<Say>,
}

/// What the supervisor can say.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Say {
    /// It is done.
    #[prost(message, tag = "2")]
    Done(Empty),
    /// It was not done.
    #[prost(message, tag = "3")]
    Refused(Refused),
    /// Everything that is known.
    #[prost(message, tag = "4")]
    State(State),
    /// The sandbox's namespaces exist.
    #[prost(message, tag = "5")]
    SandboxStarted(SandboxStarted),
    /// A run's program runs.
    #[prost(message, tag = "6")]
    Started(Started),
    /// Something happened.
    #[prost(message, tag = "7")]
    Event(Event),
    /// Of the connection's exec'd process.
    #[prost(message, tag = "8")]
    ExecOutput(ExecOutput),
}

/// Whose fault a refusal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Fault {
    /// The node's: trying again may help.
    Node = 0,
    /// The container's: its spec, its image, its program.
    Container = 1,
    /// The asker's: it does not fit the state (no such run, no sandbox).
    Request = 2,
}

/// Why something was not done.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Refused {
    /// The step that failed, such as `mount overlay`, `enter the working directory`, `run the program`.
    #[prost(string, tag = "1")]
    pub step: String,
    /// On what, may be empty.
    #[prost(string, tag = "2")]
    pub object: String,
    /// The system's error number, or 0.
    #[prost(int32, tag = "3")]
    pub errno: i32,
    /// More for people, may be empty.
    #[prost(string, tag = "4")]
    pub detail: String,
    /// Whose fault.
    #[prost(enumeration = "Fault", tag = "5")]
    pub fault: i32,
}

/// The sandbox's namespaces exist.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct SandboxStarted {
    /// The infra container, in the node's PID namespace.
    #[prost(uint32, tag = "1")]
    pub pause_pid: u32,
}

/// A run's program runs.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Started {
    /// The container.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its run.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
    /// The sandbox it runs in.
    #[prost(uint32, tag = "3")]
    pub sandbox: u32,
    /// Its first process in the node's PID namespace.
    #[prost(uint32, tag = "4")]
    pub pid: u32,
    /// When it began.
    #[prost(uint64, tag = "5")]
    pub started_wall_ms: u64,
    /// What the node could not give, for the pod's events.
    #[prost(string, repeated, tag = "6")]
    pub warnings: Vec<String>,
}

/// A run is over.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Ended {
    /// The container.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its run.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
    /// The sandbox it ran in.
    #[prost(uint32, tag = "3")]
    pub sandbox: u32,
    /// 128 + signal when killed.
    #[prost(int32, tag = "4")]
    pub exit_code: i32,
    /// The signal that killed it, else 0.
    #[prost(int32, tag = "5")]
    pub signal: i32,
    /// The kernel killed at least one of its processes for want of memory.
    #[prost(bool, tag = "6")]
    pub oom: bool,
    /// When it began.
    #[prost(uint64, tag = "7")]
    pub started_wall_ms: u64,
    /// When it ended.
    #[prost(uint64, tag = "8")]
    pub finished_wall_ms: u64,
}

/// The infra container is gone, and with it every container of the sandbox.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SandboxEnded {
    /// The sandbox.
    #[prost(uint32, tag = "1")]
    pub sandbox: u32,
    /// Why, when it could not even begin.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// Something happened. It is kept until it is acknowledged.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Event {
    /// Counts from 1 over the supervisor's life.
    #[prost(uint64, tag = "1")]
    pub sequence: u64,
    /// What.
    #[prost(oneof = "Happened", tags = "2, 3, 4")]
    pub happened: Option<Happened>,
}

/// What can happen.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Happened {
    /// A run began.
    #[prost(message, tag = "2")]
    Started(Started),
    /// A run ended. All of its output is in the log.
    #[prost(message, tag = "3")]
    Ended(Ended),
    /// The sandbox ended.
    #[prost(message, tag = "4")]
    SandboxEnded(SandboxEnded),
}

/// Where the sandbox is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum SandboxPhase {
    /// None since the supervisor began.
    None = 0,
    /// The infra container lives.
    Up = 1,
    /// It is gone.
    Ended = 2,
}

/// A run of a container.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Run {
    /// How it began.
    #[prost(message, optional, tag = "1")]
    pub started: Option<Started>,
    /// How it ended, if it has.
    #[prost(message, optional, tag = "2")]
    pub ended: Option<Ended>,
    /// Field 22 of /proc/PID/stat: with the pid and the boot id, the identity of the process.
    #[prost(uint64, tag = "3")]
    pub start_ticks: u64,
    /// How its first process ended, while its end is not complete: what a supervisor that dies in between would take with it.
    #[prost(message, optional, tag = "4")]
    pub leaving: Option<Ended>,
    /// Who its first process was made as.
    #[prost(message, optional, tag = "5")]
    pub user: Option<User>,
    /// With which effective capabilities.
    #[prost(uint64, tag = "6")]
    pub capabilities: u64,
}

/// Everything that the supervisor knows.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct State {
    /// [`super::ABILITIES`] of the supervisor's build.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The supervisor.
    #[prost(uint32, tag = "2")]
    pub shim_pid: u32,
    /// /proc/sys/kernel/random/boot_id.
    #[prost(string, tag = "3")]
    pub boot_id: String,
    /// The newest sandbox's number; 0 before the first.
    #[prost(uint32, tag = "4")]
    pub sandbox: u32,
    /// Where it is in its life.
    #[prost(enumeration = "SandboxPhase", tag = "5")]
    pub phase: i32,
    /// The infra container while it lives, else 0.
    #[prost(uint32, tag = "6")]
    pub pause_pid: u32,
    /// Like [`Run::start_ticks`].
    #[prost(uint64, tag = "7")]
    pub pause_start_ticks: u64,
    /// The newest run of each container.
    #[prost(message, repeated, tag = "8")]
    pub runs: Vec<Run>,
    /// The newest event.
    #[prost(uint64, tag = "9")]
    pub last_sequence: u64,
    /// The newest event that was acknowledged.
    #[prost(uint64, tag = "10")]
    pub acknowledged: u64,
    /// Like [`Run::start_ticks`].
    #[prost(uint64, tag = "11")]
    pub shim_start_ticks: u64,
}

/// From an exec'd process.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ExecOutput {
    /// What.
    #[prost(oneof = "Output", tags = "1, 2, 3, 4")]
    pub output: Option<Output>,
}

/// What an exec'd process can say.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Output {
    /// Its program runs; the pid in the node's namespace.
    #[prost(uint32, tag = "1")]
    Started(u32),
    /// At most [`super::MAX_DATA_BYTES`].
    #[prost(bytes = "vec", tag = "2")]
    Stdout(Vec<u8>),
    /// At most [`super::MAX_DATA_BYTES`].
    #[prost(bytes = "vec", tag = "3")]
    Stderr(Vec<u8>),
    /// It ended and all output was sent; 128 + signal when killed. The last message.
    #[prost(int32, tag = "4")]
    Exited(i32),
}
