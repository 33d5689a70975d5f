//! The infra container and what depends on its life.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use minipod_podshim::process::start_ticks;
use minipod_podshim::protocol::{
    ContainerSpec, Fault, Happened, IdRange, Limits, Refused, SandboxEnded, SandboxPhase, SandboxSpec, SandboxStarted,
    Say,
};
use nix::fcntl::OFlag;
use nix::sched::CloneFlags;

use super::container::Container;
use super::{Asker, Role, Supervisor, refused};
use crate::child::report::{Context as _, Failure, Reporter};
use crate::child::{self, Common, OwnUsers, PauseChild, SharedMemory, Stdio};
use crate::stock;

/// Name of the infra container's cgroup; no container's run has it, because their names end with a number.
const PAUSE_GROUP: &str = "pause";

/// The sandbox.
#[derive(Debug, Default)]
pub struct Sandbox {
    pub spec: Option<SandboxSpec>,
    pub phase: SandboxPhase,
    /// The infra container while it lives, else 0.
    pub pid: u32,
    pub start_ticks: u64,
    /// It has its hostname and parameters.
    pub named: bool,
    /// Why it could not begin.
    pub message: String,
    /// Its end is an event already.
    pub announced: bool,
    /// Its users, if they are not the node's.
    pub user_namespace: Option<OwnedFd>,
    /// Starts that came before it was named.
    pub waiting: Vec<(Asker, ContainerSpec)>,
}

impl Sandbox {
    /// Its number; 0 before the first.
    pub fn attempt(&self) -> u32 {
        self.spec.as_ref().map_or(0, |spec| spec.attempt)
    }

    /// Whether all containers see each other's processes.
    pub fn shares_pids(&self) -> bool {
        self.spec.as_ref().is_some_and(|spec| spec.share_pid)
    }

    /// Whether all containers see the node's processes.
    pub fn host_pids(&self) -> bool {
        self.spec.as_ref().is_some_and(|spec| spec.host_pid)
    }

    /// Whether its containers share memory.
    pub fn has_memory(&self) -> bool {
        self.spec.as_ref().is_some_and(|spec| !spec.shared_memory.is_empty())
    }

    /// Which of the infra container's namespaces a container enters.
    pub fn shared_namespaces(&self) -> CloneFlags {
        self.spec.as_ref().map_or(CloneFlags::empty(), own_namespaces)
    }

    /// The ids of its users, if they are not the node's.
    pub fn ids(&self) -> Option<IdRange> {
        self.spec.as_ref().and_then(|spec| spec.users)
    }
}

/// Namespaces of the sandbox that are not the node's.
fn own_namespaces(spec: &SandboxSpec) -> CloneFlags {
    let mut flags = CloneFlags::empty();
    if !spec.host_network {
        flags |= CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS;
    }
    if !spec.host_ipc {
        flags |= CloneFlags::CLONE_NEWIPC;
    }
    flags
}

impl Supervisor {
    pub(super) fn create_sandbox(&mut self, asker: Asker, spec: SandboxSpec) {
        match self.try_create_sandbox(spec) {
            Ok(pause_pid) => self.say(asker, Say::SandboxStarted(SandboxStarted { pause_pid })),
            Err(refused) => self.refuse(asker, refused),
        }
    }

    fn try_create_sandbox(&mut self, spec: SandboxSpec) -> Result<u32, Refused> {
        let wrong = |why: &str| refused("create the sandbox", "", Fault::Request).tap(why);
        if self.stopping.is_some() {
            return Err(wrong("the pod is being stopped"));
        }
        match self.sandbox.phase {
            SandboxPhase::Up if self.sandbox.attempt() == spec.attempt => return Ok(self.sandbox.pid),
            SandboxPhase::Up => return Err(wrong("another one is up")),
            SandboxPhase::Ended if !self.sandbox.announced => {
                return Err(wrong("containers of the former one are still ending"));
            }
            _ if spec.attempt == 0 => return Err(wrong("sandboxes are numbered from 1")),
            _ => {}
        }
        if spec.share_pid && spec.host_pid {
            return Err(wrong("it cannot share its own and the node's processes at once"));
        }
        if spec.users.is_some() && (spec.host_network || spec.host_ipc || spec.host_pid) {
            return Err(wrong("users of its own have no rights in the node's namespaces"));
        }
        let group = self.pod_group.child(PAUSE_GROUP);
        let limits = spec.limits.clone().unwrap_or_default();
        let created = self.pod_group.create(&limits).and_then(|()| group.create(&Limits::default()));
        let joins = created.and_then(|()| group.joins()).map_err(|error| cgroup_refused(&error))?;
        let mut namespaces = own_namespaces(&spec);
        if spec.share_pid {
            namespaces |= CloneFlags::CLONE_NEWPID;
        }
        if !spec.shared_memory.is_empty() {
            namespaces |= CloneFlags::CLONE_NEWNS;
        }
        // A sandbox with users of its own has namespaces of theirs.
        let ready = self.stock.namespaces.take().filter(|_| spec.users.is_none());
        let ready = ready.map(|ready| ready.fit_for(namespaces, &spec.shared_memory)).unwrap_or_default();
        let (pause, user_namespace) =
            self.fork_pause(&spec, (namespaces, ready), joins).map_err(|failure| failure.0)?;
        self.sandbox = Sandbox {
            phase: SandboxPhase::Up,
            pid: pause,
            start_ticks: start_ticks(pause).unwrap_or(0),
            spec: Some(spec),
            user_namespace,
            ..Sandbox::default()
        };
        self.state_changed = true;
        Ok(pause)
    }

    fn fork_pause(
        &mut self,
        spec: &SandboxSpec,
        (mut namespaces, ready): (CloneFlags, stock::Namespaces),
        joins: minipod_podshim::cgroup::Joins,
    ) -> Result<(u32, Option<OwnedFd>), Failure> {
        let wrong = |error: std::io::Error| Failure::node("make a pipe", "", child::report::errno_of(&error));
        let (report, reporter) = crate::pipe().map_err(wrong)?;
        let stdio = Stdio { stdin: null()?, stdout: null()?, stderr: null()?, terminal: false };
        let common = Common { joins, stdio, reporter: Reporter(reporter.into()) };
        let program = self.pause_program.try_clone().map_err(wrong)?;
        // Those that are there are entered before it is born: whoever knows its number finds it in the right ones.
        ready.common.iter().for_each(|(kind, _)| namespaces.remove(*kind));
        let shared_memory = match (ready.memory, spec.shared_memory.as_str()) {
            (_, "") => SharedMemory::None,
            (Some(memory), _) => {
                namespaces.remove(CloneFlags::CLONE_NEWNS);
                SharedMemory::Namespace(memory)
            }
            // Made here, with rights that a user namespace's root has not.
            (None, options) => SharedMemory::Unmounted(child::memory::make(options)?),
        };
        let Some(range) = spec.users else {
            let child = PauseChild { spec, program: &program, shared_memory, own_users: None };
            let born = stock::within(&ready.common, || {
                self.fork(Role::Pause, namespaces, (common, report), |common| child::pause(&child, common))
            });
            let enter = |error| Failure::node("enter", "the sandbox's namespaces", child::report::errno_of(&error));
            return Ok((born.map_err(enter)??, None));
        };
        let (gate, open) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| wrong(errno.into()))?;
        let proc = crate::sys::new_mount(c"proc", &[], 0).node("make procfs for", "sysctls")?;
        let own_users = Some(OwnUsers { gate, proc });
        let child = PauseChild { spec, program: &program, shared_memory, own_users };
        let with_users = namespaces | CloneFlags::CLONE_NEWUSER;
        let pid = self.fork(Role::Pause, with_users, (common, report), |common| {
            // Only the supervisor may hold it, so that the gate's end is seen.
            crate::sys::close_in_child(&open);
            child::pause(&child, common)
        })?;
        match map_users(pid, range, spec.oom_score_adj) {
            Ok(namespace) => {
                // Should the child have ended meanwhile, nobody is there to read it; its end is reaped.
                let _ = nix::unistd::write(&open, b"g");
                Ok((pid, Some(namespace)))
            }
            Err(failure) => {
                self.abandon(pid);
                Err(failure)
            }
        }
    }

    /// The sandbox has its name: what waited for it starts.
    pub(super) fn sandbox_named(&mut self) {
        self.sandbox.named = true;
        for (asker, spec) in std::mem::take(&mut self.sandbox.waiting) {
            self.start(asker, spec);
        }
    }

    /// The infra container's program runs, or it never will.
    pub(super) fn pause_runs(&mut self, failed: Option<Refused>) {
        if let Some(failed) = failed {
            let errno = nix::errno::Errno::from_raw(failed.errno);
            self.sandbox.message = format!("{} {}: {errno} {}", failed.step, failed.object, failed.detail);
            eprintln!("the infra container did not start: {}", self.sandbox.message);
        }
    }

    /// With the infra container ends everything in its sandbox.
    pub(super) fn pause_ended(&mut self, code: i32, signal: i32) {
        if self.sandbox.message.is_empty() && self.stopping.is_none() {
            self.sandbox.message = format!("the infra container ended with exit code {code}, signal {signal}");
        }
        self.sandbox.phase = SandboxPhase::Ended;
        self.sandbox.pid = 0;
        self.state_changed = true;
        self.refuse_waiting_starts("the sandbox ended");
        for container in self.containers.values() {
            container.kill_group();
        }
        for child in self.children.values() {
            let _ = child.pidfd.signal(libc::SIGKILL);
        }
    }

    pub(super) fn refuse_waiting_starts(&mut self, why: &str) {
        for (asker, spec) in std::mem::take(&mut self.sandbox.waiting) {
            self.refuse(asker, refused("start container", &spec.name, Fault::Request).tap(why));
        }
    }

    /// Announces the sandbox's end once its last container has ended, so that the next one finds nothing of it.
    pub(super) fn finish_sandbox(&mut self) {
        if self.sandbox.phase != SandboxPhase::Ended
            || self.sandbox.announced
            || self.containers.values().any(Container::lives)
        {
            return;
        }
        let group = self.pod_group.child(PAUSE_GROUP);
        if group.remove().is_err() {
            // Its processes were killed and are about to leave.
            group.kill();
            return self.settle_soon();
        }
        self.sandbox.announced = true;
        let (sandbox, message) = (self.sandbox.attempt(), self.sandbox.message.clone());
        self.journal.append(Happened::SandboxEnded(SandboxEnded { sandbox, message }));
        self.state_changed = true;
    }

    /// Lets the next child be made in the PID namespace of `process`, runs `make`, and goes back.
    pub(super) fn in_pid_namespace_of<T>(
        &mut self,
        process: Option<OwnedFd>,
        make: impl FnOnce(&mut Self) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let Some(process) = process else { return make(self) };
        let enter = |namespace: std::os::fd::BorrowedFd<'_>| nix::sched::setns(namespace, CloneFlags::CLONE_NEWPID);
        enter(process.as_fd()).map_err(|errno| Failure::node("enter the PID namespace", "", errno))?;
        let made = make(self);
        if let Err(errno) = enter(self.own_pid_namespace.as_fd()) {
            // Everything made from now on would be in the wrong place.
            eprintln!("return to the own PID namespace: {errno}");
            std::process::abort();
        }
        made
    }
}

/// Gives the infra container's user namespace its ids, and what only the node's root may set of the process. A handle on the namespace.
fn map_users(pid: u32, range: IdRange, oom_score_adj: i32) -> Result<OwnedFd, Failure> {
    let dir = Path::new("/proc").join(pid.to_string());
    let map = format!("0 {} {}", range.first, range.count);
    for name in ["uid_map", "gid_map"] {
        let path = dir.join(name);
        std::fs::write(&path, &map).node("write", &path)?;
    }
    // As elsewhere: a node may be forbidden to lower it.
    if let Err(error) = std::fs::write(dir.join("oom_score_adj"), oom_score_adj.to_string()) {
        eprintln!("oom_score_adj {oom_score_adj} of the infra container: {error}");
    }
    let path = dir.join("ns/user");
    Ok(File::open(&path).node("open", &path)?.into())
}

/// The null device.
pub(super) fn null() -> Result<OwnedFd, Failure> {
    let opened = std::fs::File::options().read(true).write(true).open("/dev/null");
    opened.map(Into::into).map_err(|error| Failure::node("open", "/dev/null", child::report::errno_of(&error)))
}

pub(super) fn cgroup_refused(error: &minipod_podshim::cgroup::CgroupError) -> Refused {
    let mut refused = refused(error.operation, &error.path.to_string_lossy(), Fault::Node);
    refused.errno = error.source.raw_os_error().unwrap_or(0);
    if refused.errno == 0 {
        refused.detail = error.source.to_string();
    }
    refused
}

/// A reason, added in passing.
pub(super) trait Tap {
    fn tap(self, why: &str) -> Self;
}

impl Tap for Refused {
    fn tap(mut self, why: &str) -> Self {
        why.clone_into(&mut self.detail);
        self
    }
}
