//! What the agent asks for: a sandbox, a container, its mounts, limits and rights.

use prost::Message;

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
    /// Keep stdin open (an empty pipe) instead of the null device; [`super::Ask::Attach`] fills it.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_two_sides() {
        let range = IdRange { first: 1 << 20, count: 65_536 };
        for (inside, outside) in [(0, 1 << 20), (1000, (1 << 20) + 1000), (65_535, (1 << 20) + 65_535)] {
            assert_eq!((range.outside(inside), range.inside(outside)), (Some(outside), Some(inside)));
        }
        assert_eq!((range.outside(65_536), range.inside(0), range.inside((1 << 20) + 65_536)), (None, None, None));
        assert_eq!(IdRange { first: u32::MAX, count: 2 }.outside(1), None);
    }
}
