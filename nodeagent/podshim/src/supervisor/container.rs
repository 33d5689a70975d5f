//! Containers: from their spec to a process, to their end.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use minipod_podshim::cgroup::Group;
use minipod_podshim::process::{Pidfd, start_ticks};
use minipod_podshim::protocol::{
    ContainerSpec, Ended, Fault, Happened, Kill, LogSpec, MountKind, Refused, Rootfs, Run, SandboxPhase, Say, Started,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sched::CloneFlags;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::drain::{Drain, Flow, Patience};
use super::sandbox::{Tap as _, cgroup_refused, null};
use super::{Asker, MAX_CONTAINERS, Role, Supervisor, Token, now_ms, refused, wall_ms};
use crate::child::report::{Failure, Reporter, errno_of};
use crate::child::users::Users;
use crate::child::{self, Common, ContainerChild, Stdio};
use crate::logs::{Logger, Progress, Task};
use crate::terminal;

/// How long an ended container's output is waited for. Others may hold its pipe open, and a disk may stall: its end is told all the
/// same.
pub(super) const DRAIN: Patience = Patience { idle_ms: 2_000, held_ms: 20_000 };
/// How long an ended container's killed processes may take to leave its group before its end is told.
const LEAVE_MS: u64 = 2_000;
/// What a container may write before the log thread has read it.
pub(super) const PIPE_BYTES: i32 = 256 << 10;

/// The newest run of a container.
#[derive(Debug)]
pub struct Container {
    /// Without what only its start needs.
    pub spec: ContainerSpec,
    started: Started,
    start_ticks: u64,
    group: Group,
    phase: Phase,
    kill_at_ms: Option<u64>,
    waiters: Vec<Asker>,
    /// The number of its open log.
    pub log: Option<u64>,
    /// How far that is.
    progress: Option<Arc<Progress>>,
    /// Kept open, so that a container which reads stdin waits instead of seeing its end. Of one with a terminal: its master.
    pub stdin: Option<OwnedFd>,
    /// Until its program runs: where its terminal comes from, and the log that waits for it.
    console: Option<(UnixStream, Option<Box<Task>>)>,
    /// A second handle on its first process.
    init: Option<Pidfd>,
    /// That is the first of a PID namespace.
    has_own_pids: bool,
}

/// What stays with the supervisor of a container that was begun.
#[derive(Debug, Default)]
struct Made {
    pid: u32,
    log: Option<u64>,
    progress: Option<Arc<Progress>>,
    stdin: Option<OwnedFd>,
    console: Option<(UnixStream, Option<Box<Task>>)>,
    has_own_pids: bool,
}

#[derive(Debug)]
enum Phase {
    /// On its way to exec.
    Starting,
    /// Its program runs.
    Running,
    /// Its first process is gone; the rest is not complete.
    Ending { ended: Ended, since_ms: u64, drain: Drain },
    /// It is over.
    Ended(Ended),
}

impl Container {
    /// Whether anything of it may live.
    pub fn lives(&self) -> bool {
        !matches!(self.phase, Phase::Ended(_))
    }

    /// Whether a program can be run in it.
    pub fn runs(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    /// Its run.
    pub fn attempt(&self) -> u32 {
        self.spec.attempt
    }

    /// Its cgroup.
    pub fn group(&self) -> &Group {
        &self.group
    }

    /// Its first process in the node's PID namespace.
    pub fn pid(&self) -> u32 {
        self.started.pid
    }

    /// Its first process.
    pub fn init_fd(&self) -> Result<OwnedFd, Failure> {
        let gone = || Failure::node("find", "the container's process", Errno::ESRCH);
        let copy = self.init.as_ref().ok_or_else(gone)?.as_fd().try_clone_to_owned();
        copy.map_err(|error| Failure::node("copy a descriptor", "", errno_of(&error)))
    }

    /// When something is due for it.
    pub fn deadline_ms(&self) -> Option<u64> {
        match self.phase {
            Phase::Starting | Phase::Running => self.kill_at_ms,
            Phase::Ending { since_ms, ref drain, .. } => {
                let leave_ms = since_ms + LEAVE_MS;
                Some(if self.log.is_some() { drain.deadline_ms() } else { leave_ms })
            }
            Phase::Ended(_) => None,
        }
    }

    /// As the state tells it; none until its program runs.
    pub fn as_run(&self) -> Option<Run> {
        let (ended, leaving) = match &self.phase {
            Phase::Starting => return None,
            Phase::Running => (None, None),
            Phase::Ending { ended, .. } => (None, Some(ended.clone())),
            Phase::Ended(ended) => (Some(ended.clone()), None),
        };
        Some(Run {
            started: Some(self.started.clone()),
            ended,
            start_ticks: self.start_ticks,
            leaving,
            user: self.spec.user.clone(),
            capabilities: self.spec.capabilities.map_or(0, |set| set.effective),
        })
    }

    fn flow(&self) -> Flow {
        self.progress.as_ref().map_or(Flow { bytes: 0, held_open: false }, |progress| progress.flow())
    }

    /// It has these limits from now on.
    pub fn note_limits(&mut self, limits: Option<minipod_podshim::protocol::Limits>) {
        self.spec.limits = limits;
    }

    /// Kills everything in it.
    pub fn kill_group(&self) {
        if let Phase::Starting | Phase::Running = self.phase
            && let Some(init) = &self.init
        {
            let _ = init.signal(libc::SIGKILL);
        }
        if self.lives() {
            self.group.kill();
        }
    }
}

impl Supervisor {
    pub(super) fn start(&mut self, asker: Asker, spec: ContainerSpec) {
        if let Some(container) = self.containers.get_mut(&spec.name).filter(|known| known.attempt() == spec.attempt) {
            if matches!(container.phase, Phase::Starting) {
                container.waiters.push(asker);
            } else {
                let started = container.started.clone();
                self.say(asker, Say::Started(started));
            }
            return;
        }
        if let Err(refused) = self.check_start(&spec) {
            return self.refuse(asker, refused);
        }
        if !self.sandbox.named {
            self.sandbox.waiting.push((asker, spec));
            return;
        }
        if let Err(refused) = self.try_start(asker, spec) {
            self.refuse(asker, refused);
        }
    }

    fn check_start(&self, spec: &ContainerSpec) -> Result<(), Refused> {
        let wrong = |why: &str| Err(refused("start container", &spec.name, Fault::Request).tap(why));
        let label = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if spec.name.is_empty() || spec.name.len() > 63 || !spec.name.bytes().all(label) {
            return wrong("a name has 1 to 63 lower case letters, digits and dashes");
        }
        if self.stopping.is_some() {
            return wrong("the pod is being stopped");
        }
        if self.sandbox.phase != SandboxPhase::Up {
            return wrong("there is no sandbox");
        }
        // Its infra container is at home among the node's mounts then.
        if !self.sandbox.has_memory() && spec.mounts.iter().any(|mount| mount.kind() == MountKind::SharedMemory) {
            return wrong("the sandbox has no shared memory");
        }
        match self.containers.get(&spec.name) {
            Some(known) if known.lives() => return wrong("another run of it is not over"),
            Some(known) if known.attempt() > spec.attempt => return wrong("a later run of it is over already"),
            None if self.containers.len() >= MAX_CONTAINERS => return wrong("the pod has too many containers"),
            _ => {}
        }
        if self.sandbox.waiting.len() >= MAX_CONTAINERS || !self.journal.has_room() {
            return wrong("too much of the pod waits for the agent");
        }
        Ok(())
    }

    fn try_start(&mut self, asker: Asker, spec: ContainerSpec) -> Result<(), Refused> {
        let group = self.pod_group.child(&format!("{}.{}", spec.name, spec.attempt));
        // A start of the same number may have failed just now: what it left is this one's from now on.
        self.leftovers.retain(|leftover| *leftover != group);
        let joins = group
            .create(&spec.limits.clone().unwrap_or_default())
            .and_then(|()| group.joins())
            .map_err(|error| cgroup_refused(&error))?;
        let made = self.make_container(&spec, &group, joins);
        let made = match made {
            Ok(made) => made,
            Err(failure) => {
                let _ = group.remove();
                return Err(failure.0);
            }
        };
        let started = Started {
            name: spec.name.clone(),
            attempt: spec.attempt,
            sandbox: self.sandbox.attempt(),
            pid: made.pid,
            started_wall_ms: wall_ms(),
            warnings: Vec::new(),
        };
        // What an exec'd process needs later; the rest was for the start.
        let kept = ContainerSpec {
            root: Some(Rootfs::default()),
            mounts: Vec::new(),
            masked_paths: Vec::new(),
            readonly_paths: Vec::new(),
            argv: Vec::new(),
            ..spec
        };
        let container = Container {
            started,
            start_ticks: start_ticks(made.pid).unwrap_or(0),
            group,
            phase: Phase::Starting,
            kill_at_ms: None,
            waiters: vec![asker],
            log: made.log,
            progress: made.progress,
            stdin: made.stdin,
            console: made.console,
            init: Pidfd::open(made.pid).ok(),
            has_own_pids: made.has_own_pids,
            spec: kept,
        };
        self.containers.insert(container.spec.name.clone(), container);
        Ok(())
    }

    fn make_container(
        &mut self,
        spec: &ContainerSpec,
        group: &Group,
        joins: minipod_podshim::cgroup::Joins,
    ) -> Result<Made, Failure> {
        let wrong = |error: std::io::Error| Failure::node("make a pipe", "", errno_of(&error));
        let (report, reporter) = crate::pipe().map_err(wrong)?;
        let (stdio, console, mut made) = self.streams(spec)?;
        let pause = self.pause_fd()?;
        let mut namespaces = CloneFlags::CLONE_NEWNS;
        let into_pids = if self.sandbox.shares_pids() {
            Some(self.pause_fd()?)
        } else if self.sandbox.host_pids() {
            None
        } else if spec.pid_of.is_empty() {
            namespaces |= CloneFlags::CLONE_NEWPID;
            None
        } else {
            Some(self.target_fd(&spec.pid_of)?)
        };
        made.has_own_pids = namespaces.contains(CloneFlags::CLONE_NEWPID);
        let cgroups: Vec<(String, PathBuf)> = group.directories();
        let shared = self.sandbox.shared_namespaces();
        let own = self.sandbox.user_namespace.as_ref().map(OwnedFd::try_clone).transpose();
        let own = own.map_err(|error| Failure::node("copy a descriptor", "", errno_of(&error)))?;
        let ids = self.sandbox.ids();
        // Its terminals' group is one of the node's.
        let dev = if own.is_none() { self.stock.devs.pop() } else { None };
        let common = Common { joins, stdio, reporter: Reporter(reporter.into()) };
        let role = Role::Container(spec.name.clone());
        made.pid = self.in_pid_namespace_of(into_pids, |this| {
            this.fork(role, namespaces, (common, report), |common| {
                let users = own.as_ref().zip(ids).map(|(own, range)| Users { namespace: own.as_fd(), range });
                let pause = pause.as_fd();
                let child = ContainerChild { spec, pause, namespaces: shared, users, cgroups, console, dev };
                child::container(child, common)
            })
        })?;
        Ok(made)
    }

    /// A container's streams: the child's ends, where it sends its terminal to, and what stays here.
    fn streams(&mut self, spec: &ContainerSpec) -> Result<(Stdio, Option<UnixStream>, Made), Failure> {
        let wrong = |error: std::io::Error| Failure::node("make a pipe", "", errno_of(&error));
        let plain_pipe = || nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|errno| wrong(errno.into()));
        let mut made = Made::default();
        let number = self.next_number;
        self.next_number += 1;
        let open = |log: &LogSpec, pipes| {
            let task = Task::open(number, log, pipes);
            task.map_err(|error| Failure::node("open log", &log.path, errno_of(&error)))
        };
        if spec.terminal.is_some() {
            let task = spec.log.as_ref().map(|log| open(log, None)).transpose()?;
            (made.log, made.progress) = (task.as_ref().map(|_| number), task.as_ref().map(|task| task.progress()));
            let (here, there) = UnixStream::pair().map_err(wrong)?;
            made.console = Some((here, task));
            // The terminal takes their place in the child.
            return Ok((
                Stdio { stdin: null()?, stdout: null()?, stderr: null()?, terminal: false },
                Some(there),
                made,
            ));
        }
        let stdin = if spec.stdin {
            let (read, write) = plain_pipe()?;
            fcntl(write.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(|errno| wrong(errno.into()))?;
            made.stdin = Some(write);
            read
        } else {
            null()?
        };
        let Some(log) = &spec.log else {
            return Ok((Stdio { stdin, stdout: null()?, stderr: null()?, terminal: false }, None, made));
        };
        let ((out, stdout), (err, stderr)) = (plain_pipe()?, plain_pipe()?);
        crate::sys::widen_pipe(out.as_fd(), PIPE_BYTES);
        let task = open(log, Some([out, err]))?;
        (made.log, made.progress) = (Some(number), Some(task.progress()));
        self.add_log(task).map_err(|error| Failure::node("begin log", &log.path, errno_of(&error)))?;
        Ok((Stdio { stdin, stdout, stderr, terminal: false }, None, made))
    }

    /// The terminal that the child has made, and its log.
    fn take_console(&mut self, name: &str) -> Result<(), Failure> {
        let Some(container) = self.containers.get_mut(name) else { return Ok(()) };
        let Some((console, task)) = container.console.take() else { return Ok(()) };
        let wrong = |error: std::io::Error| Failure::node("take the terminal of", name, errno_of(&error));
        let master = terminal::receive(&console).map_err(wrong)?;
        container.stdin = Some(master.try_clone().map_err(wrong)?);
        if let Some(mut task) = task {
            task.read_terminal(master);
            self.add_log(task).map_err(wrong)?;
        }
        Ok(())
    }

    fn target_fd(&self, name: &str) -> Result<OwnedFd, Failure> {
        let target = self.containers.get(name).filter(|container| container.runs());
        let gone =
            || Failure::node("enter the processes of container", name, Errno::ESRCH).because("it is not running");
        target.ok_or_else(gone)?.init_fd()
    }

    fn pause_fd(&self) -> Result<OwnedFd, Failure> {
        let gone = || Failure::node("find", "the infra container", Errno::ESRCH);
        let pause = self.children.get(&self.sandbox.pid).ok_or_else(gone)?;
        let copy = pause.pidfd.as_fd().try_clone_to_owned();
        copy.map_err(|error| Failure::node("copy a descriptor", "", errno_of(&error)))
    }

    fn add_log(&mut self, task: Box<Task>) -> std::io::Result<()> {
        if self.logger.is_none() {
            let logger = Logger::start()?;
            let event = EpollEvent::new(EpollFlags::EPOLLIN, Token::Logs.pack());
            self.epoll.add(logger.done(), event)?;
            self.logger = Some(logger);
        }
        self.logger.as_mut().map_or(Ok(()), |logger| logger.add(task))
    }

    pub(super) fn take_closed_logs(&mut self) {
        while let Some(number) = self.logger.as_mut().and_then(Logger::next_done) {
            for container in self.containers.values_mut().filter(|container| container.log == Some(number)) {
                container.log = None;
            }
        }
    }

    /// A container's program runs, or it never will.
    pub(super) fn container_runs(&mut self, (name, pid): (&str, u32), failed: Option<Refused>, warnings: Vec<String>) {
        if failed.is_none()
            && self.containers.get(name).is_some_and(|known| known.started.pid == pid)
            && let Err(Failure(refused)) = self.take_console(name)
        {
            // Its program runs already: without its output, rather than not at all.
            eprintln!("{} {}: errno {}", refused.step, refused.object, refused.errno);
            if let Some(container) = self.containers.get_mut(name) {
                (container.log, container.progress) = (None, None);
            }
        }
        let Some(container) = self.containers.get_mut(name).filter(|known| known.started.pid == pid) else { return };
        let waiters = std::mem::take(&mut container.waiters);
        container.started.warnings = warnings;
        match failed {
            None => {
                container.phase = Phase::Running;
                let started = container.started.clone();
                self.journal.append(Happened::Started(started.clone()));
                self.state_changed = true;
                waiters.into_iter().for_each(|asker| self.say(asker, Say::Started(started.clone())));
            }
            Some(failed) => {
                // No run came of it: the same number may be tried again. The process is about to be reaped.
                if let Some(container) = self.containers.remove(name) {
                    self.leftovers.push(container.group);
                    self.settle_soon();
                }
                waiters.into_iter().for_each(|asker| self.refuse(asker, failed.clone()));
            }
        }
    }

    /// A container's first process is gone.
    pub(super) fn container_ended(&mut self, (name, pid): (&str, u32), exit_code: i32, signal: i32) {
        // A start that failed leaves a process whose name another start may have by now.
        let Some(container) = self.containers.get_mut(name).filter(|known| known.started.pid == pid) else { return };
        // With the first process of a PID namespace all others in it have died already. Should something be left in the group all the same,
        // the group is not removed before it is killed.
        if !container.has_own_pids {
            container.group.kill();
        }
        let ended = Ended {
            name: name.to_owned(),
            attempt: container.spec.attempt,
            sandbox: container.started.sandbox,
            exit_code,
            signal,
            oom: false,
            started_wall_ms: container.started.started_wall_ms,
            finished_wall_ms: wall_ms(),
        };
        container.init = None;
        container.kill_at_ms = None;
        // Not its terminal: what it shows last is read from it.
        container.stdin = None;
        let (now_ms, flow) = (now_ms(), container.flow());
        container.phase = Phase::Ending {
            ended,
            since_ms: now_ms,
            drain: Drain::begin(DRAIN, Flow { held_open: true, ..flow }, now_ms),
        };
        // Should this process die before the end is complete, its exit code is known all the same.
        self.state_changed = true;
        self.end_attached(name, exit_code);
    }

    /// Announces ends that are complete: the group empty and removed, the output written.
    pub(super) fn finish_ended_containers(&mut self) {
        let now_ms = now_ms();
        let mut again = false;
        for container in self.containers.values_mut() {
            let flow = container.flow();
            let Phase::Ending { ended, since_ms, drain } = &mut container.phase else { continue };
            if container.log.is_some() && !drain.is_given_up(flow, now_ms) {
                continue;
            }
            let late = *since_ms + LEAVE_MS <= now_ms;
            ended.oom |= container.group.oom_kills() > 0;
            if container.group.remove().is_err() {
                if !late {
                    container.group.kill();
                    again = true;
                    continue;
                }
                self.leftovers.push(container.group.clone());
            }
            let ended = ended.clone();
            self.journal.append(Happened::Ended(ended.clone()));
            container.phase = Phase::Ended(ended);
            self.state_changed = true;
        }
        self.leftovers.retain(|group| {
            group.kill();
            group.remove().is_err()
        });
        if again || !self.leftovers.is_empty() {
            self.settle_soon();
        }
    }

    pub(super) fn kill(&mut self, asker: Asker, kill: &Kill) {
        let container = self.containers.get_mut(&kill.name).filter(|known| known.attempt() == kill.attempt);
        if let Some(container) = container
            && matches!(container.phase, Phase::Starting | Phase::Running)
        {
            let at_ms = now_ms().saturating_add(kill.grace_ms);
            // An agent that was started anew, or that shortens the grace, asks again: a handler must run once.
            let first = container.kill_at_ms.is_none();
            container.kill_at_ms = Some(container.kill_at_ms.map_or(at_ms, |known| known.min(at_ms)));
            if first
                && kill.grace_ms > 0
                && let Some(init) = &container.init
                && let Err(error) = init.signal(kill.signal)
                && error.raw_os_error() == Some(libc::EINVAL)
            {
                container.kill_at_ms = None;
                let mut wrong = refused("send signal", &kill.signal.to_string(), Fault::Request);
                wrong.errno = libc::EINVAL;
                return self.refuse(asker, wrong);
            }
        }
        self.done(asker);
    }

    /// Kills what did not end in its grace.
    pub(super) fn kill_the_late(&mut self, now_ms: u64) {
        for container in self.containers.values_mut() {
            if container.kill_at_ms.is_some_and(|at_ms| at_ms <= now_ms) {
                container.kill_at_ms = None;
                container.kill_group();
            }
        }
    }
}
