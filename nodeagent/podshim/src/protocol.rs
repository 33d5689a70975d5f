//! The conversation between the agent and a pod's supervisor on `shim.sock`.
//!
//! Each side sends frames: 8 bytes of head (`"mp"`, version as u16, length as u32, both little endian), then a protobuf
//! message of that length. The agent sends [`Request`]s and the supervisor [`Response`]s; a response carries the id of its
//! request, events carry 0. Requests of one connection may be answered out of order: a start takes as long as it takes.
//!
//! A supervisor outlives upgrades of the agent. Fields are only ever added, a reader ignores what it does not know, and a
//! frame whose version is higher than the reader's [`VERSION`] ends the connection. The version is raised when an old reader
//! would do harm by ignoring something.

use prost::Message;

/// The version that this build speaks, and the highest it reads.
pub const VERSION: u16 = 1;
/// What this build carries out, as it tells in [`State::version`]: grows with every field of a spec that an older supervisor
/// would do harm by ignoring. 2: [`Mount::sub_path`]. 3: [`Exec::terminal`]. 4: [`ContainerSpec::terminal`],
/// [`ContainerSpec::stdin_once`], [`ContainerSpec::pid_of`], [`Ask::Attach`], [`Run::user`]. 5: [`Ask::Resize`].
/// 6: [`SandboxSpec::users`]. 7: [`ContainerSpec::apparmor_profile`], [`SandboxSpec::shared_memory`], [`MountKind::SharedMemory`].
pub const ABILITIES: u32 = 7;
/// Largest message: a container's spec with the manifest's largest environment fits several times.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Most bytes of output or input in one exec frame.
pub const MAX_DATA_BYTES: usize = 64 << 10;
/// Bytes before each message.
pub const HEAD_BYTES: usize = 8;

const MAGIC: [u8; 2] = *b"mp";

/// Names of the files in the pod's run directory.
pub mod files {
    /// The supervisor's socket.
    pub const SOCKET: &str = "shim.sock";
    /// Held locked (flock) as long as the supervisor lives; removed when it ends in order.
    pub const LOCK: &str = "shim.lock";
    /// A [`super::State`]; replaced by way of [`NEW_STATE`], see [`crate::replace`].
    pub const STATE: &str = "shim.state";
    /// The state where [`STATE`] is missing, as it may be of supervisors before ability 7.
    pub const NEW_STATE: &str = "shim.state.new";
    /// [`super::Event`]s as frames, appended before they are announced; begun anew when it has grown and all are acknowledged.
    pub const EVENTS: &str = "shim.events";
}

// ------------------------------------------------------------------------------------------------------------ specs

/// What the pod's sandbox shall be: the infra container and the namespaces that it holds.
#[derive(Clone, PartialEq, Message)]
pub struct SandboxSpec {
    /// Counts from 1.
    #[prost(uint32, tag = "1")]
    pub attempt: u32,
    /// Of the UTS namespace.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// The node's network instead of an own one; then the node's UTS namespace too.
    #[prost(bool, tag = "3")]
    pub host_network: bool,
    /// The node's IPC namespace instead of an own one.
    #[prost(bool, tag = "4")]
    pub host_ipc: bool,
    /// The node's PID namespace for all containers.
    #[prost(bool, tag = "5")]
    pub host_pid: bool,
    /// One PID namespace for all containers, with the infra container as its init.
    #[prost(bool, tag = "6")]
    pub share_pid: bool,
    /// Kernel parameters of the sandbox's namespaces.
    #[prost(message, repeated, tag = "7")]
    pub sysctls: Vec<Sysctl>,
    /// Limits of the pod as a whole.
    #[prost(message, optional, tag = "8")]
    pub limits: Option<Limits>,
    /// Of the infra container; best effort where the node forbids a lower value.
    #[prost(sint32, tag = "9")]
    pub oom_score_adj: i32,
    /// A user namespace of its own, which all its other namespaces belong to; absent: the node's users.
    #[prost(message, optional, tag = "10")]
    pub users: Option<IdRange>,
    /// Memory that its containers share, for [`MountKind::SharedMemory`]: options of its tmpfs, such as `size=65536k,mode=1777`. Empty:
    /// there is none.
    #[prost(string, tag = "11")]
    pub shared_memory: String,
}

/// Ids of the node, for users and groups alike, that stand for 0, 1, 2 … in a user namespace.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct IdRange {
    /// What 0 is outside.
    #[prost(uint32, tag = "1")]
    pub first: u32,
    /// How many.
    #[prost(uint32, tag = "2")]
    pub count: u32,
}

impl IdRange {
    /// What an id of the namespace is outside.
    #[must_use]
    pub fn outside(&self, id: u32) -> Option<u32> {
        if id < self.count { self.first.checked_add(id) } else { None }
    }

    /// What an id of the node is inside.
    #[must_use]
    pub fn inside(&self, id: u32) -> Option<u32> {
        id.checked_sub(self.first).filter(|id| *id < self.count)
    }
}

/// A kernel parameter.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Sysctl {
    /// With dots, such as `net.ipv4.ip_forward`.
    #[prost(string, tag = "1")]
    pub name: String,
    /// As written to the file.
    #[prost(string, tag = "2")]
    pub value: String,
}

/// Controller values as plain numbers, for both versions of cgroups; what is absent is not set.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Limits {
    /// v1 `cpu.shares`.
    #[prost(uint64, optional, tag = "1")]
    pub cpu_shares: Option<u64>,
    /// v2 `cpu.weight`.
    #[prost(uint64, optional, tag = "2")]
    pub cpu_weight: Option<u64>,
    /// CPU time per period, microseconds.
    #[prost(uint64, optional, tag = "3")]
    pub cpu_quota_us: Option<u64>,
    /// The period, microseconds; 0 stands for 100,000.
    #[prost(uint64, tag = "4")]
    pub cpu_period_us: u64,
    /// Hard memory limit.
    #[prost(uint64, optional, tag = "5")]
    pub memory_limit_bytes: Option<u64>,
    /// Most processes and threads.
    #[prost(uint64, optional, tag = "6")]
    pub pids_limit: Option<u64>,
    /// `cpuset.cpus`, empty: the parent's.
    #[prost(string, tag = "7")]
    pub cpuset_cpus: String,
    /// `cpuset.mems`, empty: the parent's.
    #[prost(string, tag = "8")]
    pub cpuset_mems: String,
    /// v2: an OOM kill takes all processes of the group.
    #[prost(bool, tag = "9")]
    pub oom_group: bool,
}

/// What one run of a container shall be.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerSpec {
    /// Unique within the pod; a DNS label, because it names a cgroup.
    #[prost(string, tag = "1")]
    pub name: String,
    /// 0, 1, 2 … over the pod's life.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
    /// The program and its arguments. A program without a slash is looked for in the environment's PATH.
    #[prost(string, repeated, tag = "3")]
    pub argv: Vec<String>,
    /// `NAME=value`.
    #[prost(string, repeated, tag = "4")]
    pub env: Vec<String>,
    /// Absolute; made if it is missing; empty: `/`.
    #[prost(string, tag = "5")]
    pub cwd: String,
    /// Who the process is.
    #[prost(message, optional, tag = "6")]
    pub user: Option<User>,
    /// Its capabilities; absent: none.
    #[prost(message, optional, tag = "7")]
    pub capabilities: Option<Capabilities>,
    /// PR_SET_NO_NEW_PRIVS.
    #[prost(bool, tag = "8")]
    pub no_new_privs: bool,
    /// Resource limits of the process.
    #[prost(message, repeated, tag = "9")]
    pub rlimits: Vec<Rlimit>,
    /// Best effort where the node forbids a lower value; then the start's answer has a warning.
    #[prost(sint32, tag = "10")]
    pub oom_score_adj: i32,
    /// The root file system.
    #[prost(message, optional, tag = "11")]
    pub root: Option<Rootfs>,
    /// In this order, each below the root.
    #[prost(message, repeated, tag = "12")]
    pub mounts: Vec<Mount>,
    /// Hidden if they exist: an empty read-only directory, or the null device over a file.
    #[prost(string, repeated, tag = "13")]
    pub masked_paths: Vec<String>,
    /// Made read-only if they exist.
    #[prost(string, repeated, tag = "14")]
    pub readonly_paths: Vec<String>,
    /// Where its output goes; absent: nowhere.
    #[prost(message, optional, tag = "15")]
    pub log: Option<LogSpec>,
    /// Limits of the container.
    #[prost(message, optional, tag = "16")]
    pub limits: Option<Limits>,
    /// A seccomp filter: classic BPF, an array of the kernel's `struct sock_filter`; empty: none.
    #[prost(bytes = "vec", tag = "17")]
    pub seccomp_filter: Vec<u8>,
    /// Keep stdin open (an empty pipe) instead of the null device; [`Ask::Attach`] fills it.
    #[prost(bool, tag = "18")]
    pub stdin: bool,
    /// A terminal for all three streams instead of pipes, of this size at first. Its log is all stdout.
    #[prost(message, optional, tag = "19")]
    pub terminal: Option<Window>,
    /// Stdin ends with the first who was attached to it.
    #[prost(bool, tag = "20")]
    pub stdin_once: bool,
    /// Enter the PID namespace of this running container instead of an own one; empty: no. Without meaning where all share one.
    #[prost(string, tag = "21")]
    pub pid_of: String,
    /// The AppArmor profile of its programs, exec'd ones too; empty: that of the supervisor.
    #[prost(string, tag = "22")]
    pub apparmor_profile: String,
}

/// A process' identity in numbers.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct User {
    /// User id.
    #[prost(uint32, tag = "1")]
    pub uid: u32,
    /// Primary group id.
    #[prost(uint32, tag = "2")]
    pub gid: u32,
    /// Supplementary groups.
    #[prost(uint32, repeated, tag = "3")]
    pub groups: Vec<u32>,
}

/// Capability sets as bit masks, bit n for capability n of linux/capability.h.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Capabilities {
    /// What the process and its children can ever have.
    #[prost(uint64, tag = "1")]
    pub bounding: u64,
    /// What it may make effective.
    #[prost(uint64, tag = "2")]
    pub permitted: u64,
    /// What it begins with.
    #[prost(uint64, tag = "3")]
    pub effective: u64,
    /// What survives an exec of a file with inheritable capabilities.
    #[prost(uint64, tag = "4")]
    pub inheritable: u64,
    /// What survives any exec; must be permitted and inheritable.
    #[prost(uint64, tag = "5")]
    pub ambient: u64,
}

/// A resource limit.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Rlimit {
    /// RLIMIT_* of the kernel.
    #[prost(uint32, tag = "1")]
    pub resource: u32,
    /// Soft limit; u64::MAX: none.
    #[prost(uint64, tag = "2")]
    pub soft: u64,
    /// Hard limit; u64::MAX: none. Lowered to what the node has when it may not be raised.
    #[prost(uint64, tag = "3")]
    pub hard: u64,
}

/// An overlay, or a directory as it is.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Rootfs {
    /// Read-only layers, the topmost first. With exactly one and no `upper`, that directory itself becomes the root.
    #[prost(string, repeated, tag = "1")]
    pub lowers: Vec<String>,
    /// The writable layer; must exist.
    #[prost(string, tag = "2")]
    pub upper: String,
    /// Beside `upper` on the same file system; must exist.
    #[prost(string, tag = "3")]
    pub work: String,
    /// Where the root is mounted before the container makes it its own; must exist.
    #[prost(string, tag = "4")]
    pub target: String,
    /// The container may write to its mounts only.
    #[prost(bool, tag = "5")]
    pub readonly: bool,
    /// Device files in it can be opened.
    #[prost(bool, tag = "6")]
    pub devices: bool,
}

/// What a mount shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum MountKind {
    /// `source`, a file or directory of the node.
    Bind = 0,
    /// Memory; `options` such as `size=65536k,mode=1777`.
    Tmpfs = 1,
    /// procfs of the container's PID namespace.
    Proc = 2,
    /// sysfs of the container's network namespace.
    Sysfs = 3,
    /// POSIX message queues of the sandbox's IPC namespace.
    Mqueue = 4,
    /// The container's cgroups; `readonly` as elsewhere.
    Cgroup = 5,
    /// A fresh /dev: null, zero, full, random, urandom, tty, pts with ptmx, and the usual links.
    Dev = 6,
    /// The sandbox's [`SandboxSpec::shared_memory`].
    SharedMemory = 7,
}

/// What happens to mounts that are made below a bind mount later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Propagation {
    /// Neither side sees the other's.
    None = 0,
    /// The container sees the node's.
    HostToContainer = 1,
    /// Both see all.
    Bidirectional = 2,
}

/// One mount of a container.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Mount {
    /// What it shows.
    #[prost(enumeration = "MountKind", tag = "1")]
    pub kind: i32,
    /// For binds, absolute on the node.
    #[prost(string, tag = "2")]
    pub source: String,
    /// Absolute in the container; made if it is missing, links are followed within the root only.
    #[prost(string, tag = "3")]
    pub target: String,
    /// No writing.
    #[prost(bool, tag = "4")]
    pub readonly: bool,
    /// Binds: with all that is mounted below `source`; `readonly` then holds for all of it, see `shallow_readonly`.
    #[prost(bool, tag = "5")]
    pub recursive: bool,
    /// Set-uid bits and file capabilities have no effect.
    #[prost(bool, tag = "6")]
    pub nosuid: bool,
    /// Device files cannot be opened.
    #[prost(bool, tag = "7")]
    pub nodev: bool,
    /// Programs cannot be run.
    #[prost(bool, tag = "8")]
    pub noexec: bool,
    /// Of the file system, comma separated: `size=…`, `mode=…`.
    #[prost(string, tag = "9")]
    pub options: String,
    /// Binds.
    #[prost(enumeration = "Propagation", tag = "10")]
    pub propagation: i32,
    /// Binds: what of the directory `source` is shown, a path below it; empty: all of it. Missing directories are made with
    /// the mode of `source`. Links are followed as long as they stay below `source`.
    #[prost(string, tag = "11")]
    pub sub_path: String,
    /// Binds with `recursive`: `readonly` holds for the mount itself, not for those below it.
    #[prost(bool, tag = "12")]
    pub shallow_readonly: bool,
    /// Binds: device files in it can be opened. [`MountKind::Dev`]: it has all devices of the node.
    #[prost(bool, tag = "13")]
    pub devices: bool,
    /// Binds, where the sandbox has users of its own: the owners in `source` are ids of these users, 0 for their root, as an idmapped
    /// mount shows them. Else they are ids of the node.
    #[prost(bool, tag = "14")]
    pub idmapped: bool,
}

/// A container's log in CRI format.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct LogSpec {
    /// The file; its directory must exist. Rotated ones are `path.1` (newest), `path.2` ….
    #[prost(string, tag = "1")]
    pub path: String,
    /// A file that has grown to this is rotated; 0: never.
    #[prost(uint64, tag = "2")]
    pub max_bytes: u64,
    /// Files kept, the current one included; at least 1.
    #[prost(uint32, tag = "3")]
    pub max_files: u32,
}

// --------------------------------------------------------------------------------------------------------- requests

/// From the agent.
#[derive(Clone, PartialEq, Message)]
pub struct Request {
    /// Not 0, unique on its connection.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// What is asked.
    #[prost(oneof = "Ask", tags = "2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12")]
    pub ask: Option<Ask>,
}

/// What the agent can ask.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Ask {
    /// Send me events, first all that are not acknowledged. Answered by the state, which the events follow.
    #[prost(message, tag = "2")]
    Subscribe(Empty),
    /// Answered by the state.
    #[prost(message, tag = "3")]
    State(Empty),
    /// Answered by `SandboxStarted` as soon as its namespaces exist.
    #[prost(message, tag = "4")]
    CreateSandbox(SandboxSpec),
    /// Answered by `Started` when the program runs, or `Refused`. A repetition is answered like the first.
    #[prost(message, tag = "5")]
    Start(Box<ContainerSpec>),
    /// Answered at once; the end comes as an event.
    #[prost(message, tag = "6")]
    Kill(Kill),
    /// Kill all, remove the pod's cgroups, answer, end.
    #[prost(message, tag = "7")]
    Stop(Empty),
    /// Events up to this are written down and may be forgotten. Not answered.
    #[prost(uint64, tag = "8")]
    Acknowledge(u64),
    /// Run a program in a container. The connection serves this process from then on, and nothing else.
    #[prost(message, tag = "9")]
    Exec(Exec),
    /// For the process of this connection. Not answered.
    #[prost(message, tag = "10")]
    ExecInput(ExecInput),
    /// Take part in the streams of a container's first process, from now on. The connection then serves this and nothing else: it is
    /// answered like `Exec`, and its end leaves the process alone.
    #[prost(message, tag = "11")]
    Attach(Attach),
    /// Other limits for what runs. All of them or, where memory is in use above its new limit, none.
    #[prost(message, tag = "12")]
    Resize(Resize),
}

/// Limits for a pod and for runs of its containers, in place of those that they have.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Resize {
    /// Of the pod as a whole; a later sandbox has them too.
    #[prost(message, optional, tag = "1")]
    pub pod: Option<Limits>,
    /// Runs that are over are left out.
    #[prost(message, repeated, tag = "2")]
    pub containers: Vec<ResizeContainer>,
}

/// Limits for a run.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ResizeContainer {
    /// The container.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its run; another run is left alone.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
    /// What it shall have; a CPU quota or a memory limit that is absent is taken away.
    #[prost(message, optional, tag = "3")]
    pub limits: Option<Limits>,
}

/// Nothing to say.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Empty {}

/// End a run: the signal now, KILL to the whole container after the grace.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Kill {
    /// The container.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its run; another run is left alone.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
    /// Sent to the container's first process, by the first request only: its handler runs once.
    #[prost(int32, tag = "3")]
    pub signal: i32,
    /// Time between the two; 0: KILL at once. A later request can only shorten it.
    #[prost(uint64, tag = "4")]
    pub grace_ms: u64,
}

/// A program to run in a container, as the container's user with its limits.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Exec {
    /// The container.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its run.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
    /// The program and its arguments.
    #[prost(string, repeated, tag = "3")]
    pub argv: Vec<String>,
    /// Whether `ExecInput` will be sent; else its stdin is the null device.
    #[prost(bool, tag = "4")]
    pub stdin: bool,
    /// Added to the container's environment.
    #[prost(string, repeated, tag = "5")]
    pub env: Vec<String>,
    /// A terminal of this size instead of pipes; what it shows comes as stdout.
    #[prost(message, optional, tag = "6")]
    pub terminal: Option<Window>,
}

/// A running container's streams to take part in. Output that its reader does not keep up with is lost to this reader.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Attach {
    /// The container.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its run.
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
    /// Whether `ExecInput` will be sent. A container without open stdin gets none of it.
    #[prost(bool, tag = "3")]
    pub stdin: bool,
    /// The size of its terminal, if it has one.
    #[prost(message, optional, tag = "4")]
    pub window: Option<Window>,
}

/// The size of a terminal, in characters; the kernel's numbers have 16 bits.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Window {
    /// Lines.
    #[prost(uint32, tag = "1")]
    pub rows: u32,
    /// Characters in a line.
    #[prost(uint32, tag = "2")]
    pub columns: u32,
}

/// To an exec'd process.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ExecInput {
    /// What.
    #[prost(oneof = "Input", tags = "1, 2, 3, 4")]
    pub input: Option<Input>,
}

/// What can be sent to an exec'd process.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum Input {
    /// At most [`MAX_DATA_BYTES`].
    #[prost(bytes = "vec", tag = "1")]
    Stdin(Vec<u8>),
    /// No more of it.
    #[prost(message, tag = "2")]
    StdinClosed(Empty),
    /// A signal by number.
    #[prost(int32, tag = "3")]
    Signal(i32),
    /// Its terminal has another size now. Ignored by one without a terminal.
    #[prost(message, tag = "4")]
    Resize(Window),
}

// -------------------------------------------------------------------------------------------------------- responses

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
    /// [`ABILITIES`] of the supervisor's build.
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
    /// At most [`MAX_DATA_BYTES`].
    #[prost(bytes = "vec", tag = "2")]
    Stdout(Vec<u8>),
    /// At most [`MAX_DATA_BYTES`].
    #[prost(bytes = "vec", tag = "3")]
    Stderr(Vec<u8>),
    /// It ended and all output was sent; 128 + signal when killed. The last message.
    #[prost(int32, tag = "4")]
    Exited(i32),
}

// ----------------------------------------------------------------------------------------------------------- frames

/// The bytes on a connection are not a frame that this build understands. Nothing after them can be trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol.
    #[error("frame begins with {0:02x?} instead of \"mp\"")]
    Magic([u8; 2]),
    /// The other side is newer than this one.
    #[error("frame has version {0}, this build reads up to {VERSION}")]
    Version(u16),
    /// Longer than [`MAX_MESSAGE_BYTES`].
    #[error("frame of {0} bytes, at most {MAX_MESSAGE_BYTES} are allowed")]
    TooLong(usize),
    /// Not the expected message.
    #[error("frame cannot be read: {0}")]
    Message(#[from] prost::DecodeError),
}

/// Appends a message as a frame.
///
/// # Errors
/// [`FrameError::TooLong`]; then nothing was appended.
pub fn put_frame(message: &impl Message, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let length = message.encoded_len();
    if length > MAX_MESSAGE_BYTES {
        return Err(FrameError::TooLong(length));
    }
    out.reserve(HEAD_BYTES + length);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    // At most MAX_MESSAGE_BYTES, which fits.
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&message.encode_to_vec());
    Ok(())
}

/// Reads a frame's head: the length of the message after it.
///
/// # Errors
/// See [`FrameError`].
pub fn read_head(head: [u8; HEAD_BYTES]) -> Result<usize, FrameError> {
    let [m0, m1, v0, v1, l0, l1, l2, l3] = head;
    if [m0, m1] != MAGIC {
        return Err(FrameError::Magic([m0, m1]));
    }
    let version = u16::from_le_bytes([v0, v1]);
    if version > VERSION {
        return Err(FrameError::Version(version));
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > MAX_MESSAGE_BYTES { Err(FrameError::TooLong(length)) } else { Ok(length) }
}

/// Takes the first message out of `bytes` if it is there in full.
///
/// # Errors
/// See [`FrameError`].
pub fn take_frame<M: Message + Default>(bytes: &mut Vec<u8>) -> Result<Option<M>, FrameError> {
    let Some(head) = bytes.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
    let end = HEAD_BYTES + read_head(*head)?;
    let Some(body) = bytes.get(HEAD_BYTES..end) else { return Ok(None) };
    let message = M::decode(body)?;
    bytes.drain(..end);
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kill() -> Request {
        let kill = Kill { name: "web".into(), attempt: 3, signal: 15, grace_ms: 30_000 };
        Request { id: 7, ask: Some(Ask::Kill(kill)) }
    }

    #[test]
    fn frames_arrive_in_any_pieces() {
        let mut stream = Vec::new();
        for _ in 0..3 {
            put_frame(&kill(), &mut stream).expect("short");
        }
        for piece in 1..stream.len() {
            let (mut bytes, mut seen) = (Vec::new(), 0);
            for chunk in stream.chunks(piece) {
                bytes.extend_from_slice(chunk);
                while let Some(request) = take_frame::<Request>(&mut bytes).expect("good") {
                    assert_eq!(request, kill());
                    seen += 1;
                }
            }
            assert_eq!((seen, bytes.len()), (3, 0), "pieces of {piece}");
        }
    }

    #[test]
    fn what_is_no_frame_is_named() {
        let mut good = Vec::new();
        put_frame(&kill(), &mut good).expect("short");
        let broken = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            take_frame::<Request>(&mut bytes).expect_err("broken").to_string()
        };
        assert_eq!(broken(0, b'x'), "frame begins with [78, 70] instead of \"mp\"");
        assert_eq!(broken(3, 1), format!("frame has version 257, this build reads up to {VERSION}"));
        assert!(broken(7, 0xff).contains("at most"));
        assert!(broken(HEAD_BYTES, 0xff).contains("cannot be read"));
        assert_eq!(take_frame::<Request>(&mut good[..HEAD_BYTES + 1].to_vec()), Ok(None));
    }

    #[test]
    fn too_long_a_message_is_not_sent() {
        let spec = ContainerSpec { env: vec!["x".repeat(MAX_MESSAGE_BYTES)], ..ContainerSpec::default() };
        let mut out = Vec::new();
        let request = Request { id: 1, ask: Some(Ask::Start(Box::new(spec))) };
        assert!(matches!(put_frame(&request, &mut out), Err(FrameError::TooLong(_))));
        assert!(out.is_empty());
    }

    #[test]
    fn ids_have_two_sides() {
        let range = IdRange { first: 1 << 20, count: 65_536 };
        for (inside, outside) in [(0, 1 << 20), (1000, (1 << 20) + 1000), (65_535, (1 << 20) + 65_535)] {
            assert_eq!((range.outside(inside), range.inside(outside)), (Some(outside), Some(inside)));
        }
        assert_eq!((range.outside(65_536), range.inside(0), range.inside((1 << 20) + 65_536)), (None, None, None));
        assert_eq!(IdRange { first: u32::MAX, count: 2 }.outside(1), None);
    }

    #[test]
    fn a_newer_side_may_add_fields() {
        #[derive(Clone, PartialEq, Message)]
        struct NewerKill {
            #[prost(string, tag = "1")]
            name: String,
            #[prost(string, tag = "99")]
            more: String,
        }
        let bytes = NewerKill { name: "web".into(), more: "unknown to us".into() }.encode_to_vec();
        assert_eq!(Kill::decode(bytes.as_slice()).expect("reads").name, "web");
    }
}
