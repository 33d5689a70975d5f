//! The loop: requests in, processes made and reaped, events out.
//!
//! Everything is driven by epoll: the socket and its connections, SIGCHLD, the pipes of children on their way to exec, the
//! log thread's hand-backs, exec'd processes' streams, and one timeout that is the nearest of all deadlines. Nothing in the loop
//! waits, but the very end (`stop`).

mod attach;
mod container;
pub mod drain;
mod exec;
mod resize;
mod sandbox;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, OwnedFd};

use minipod_podshim::cgroup::{Cgroups, Group};
use minipod_podshim::process::{Pidfd, boot_id, start_ticks};
use minipod_podshim::protocol::{self, Ask, Empty, Fault, Refused, Run, Say, State, take_frame};
use nix::errno::Errno;
use nix::sched::CloneFlags;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use self::container::Container;
use self::sandbox::Sandbox;
use crate::child::report::{ChildSays, Failure, Step};
use crate::child::{self, Common};
use crate::client::Client;
use crate::journal::{Journal, write_state};
use crate::logs::Logger;
use crate::stock::Stock;
use crate::sys::{self, Side};
use crate::{Args, Inherited};

/// Connections at one time: the agent's, and one for each exec'd process. More are closed at once.
const MAX_CLIENTS: usize = 128;
/// Containers of a pod, ended ones included.
const MAX_CONTAINERS: usize = 256;
/// How soon to look again at a group that processes are about to leave.
const SETTLE_MS: u64 = 2;
/// So long nothing happens before memory is given back.
const REST_MS: u64 = 1_000;

/// Kinds of epoll events; the low bits hold a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Listener,
    Child,
    Logs,
    /// A connection by number.
    Client(u64),
    /// A child's report by pid.
    Report(u32),
    /// An exec'd process' stdout or stderr, by connection.
    Output(u64, usize),
    /// An exec'd process' stdin, by connection.
    Input(u64),
}

impl Token {
    fn pack(self) -> u64 {
        let (kind, number) = match self {
            Self::Listener => (0, 0),
            Self::Child => (1, 0),
            Self::Logs => (2, 0),
            Self::Client(client) => (3, client),
            Self::Report(pid) => (4, pid.into()),
            Self::Output(client, 0) => (5, client),
            Self::Output(client, _) => (6, client),
            Self::Input(client) => (7, client),
        };
        kind << 56 | number
    }

    fn unpack(data: u64) -> Option<Self> {
        let number = data & ((1 << 56) - 1);
        Some(match data >> 56 {
            0 => Self::Listener,
            1 => Self::Child,
            2 => Self::Logs,
            3 => Self::Client(number),
            4 => Self::Report(u32::try_from(number).ok()?),
            5 => Self::Output(number, 0),
            6 => Self::Output(number, 1),
            7 => Self::Input(number),
            _ => return None,
        })
    }
}

/// What a child is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Role {
    Pause,
    /// A container's first process.
    Container(String),
    /// Of a connection.
    Exec(u64),
}

/// A child that was not reaped yet.
#[derive(Debug)]
struct Child {
    role: Role,
    pidfd: Pidfd,
    /// Until exec.
    report: Option<Report>,
}

/// What a child says on its way to exec.
#[derive(Debug)]
struct Report {
    pipe: File,
    bytes: Vec<u8>,
    failed: Option<Refused>,
    warnings: Vec<String>,
}

/// A request whose answer comes later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Asker {
    client: u64,
    request: u64,
}

/// The supervisor.
#[derive(Debug)]
pub struct Supervisor {
    args: Args,
    inherited: Inherited,
    epoll: Epoll,
    child_signal: SignalFd,
    pause_program: OwnedFd,
    own_pid_namespace: File,
    pod_group: Group,
    /// What was made before there was a pod.
    stock: Stock,
    journal: Journal,
    logger: Option<Logger>,
    sandbox: Sandbox,
    containers: BTreeMap<String, Container>,
    children: BTreeMap<u32, Child>,
    clients: BTreeMap<u64, Client>,
    next_number: u64,
    /// Groups of containers that are over whose processes were killed and did not leave yet.
    leftovers: Vec<Group>,
    /// When to look again at what is about to be complete.
    settle_at_ms: Option<u64>,
    stopping: Option<Asker>,
    state_changed: bool,
    buffer: Vec<u8>,
    boot_id: String,
    start_ticks: u64,
    ended: bool,
}

impl Supervisor {
    /// Gets everything that is needed before the first request.
    ///
    /// # Errors
    /// As text for the complaints file: nobody is connected yet.
    pub fn begin(args: Args, inherited: Inherited, stock: Stock) -> Result<Self, String> {
        let io = |what: &str| {
            let what = what.to_owned();
            move |error: std::io::Error| format!("{what}: {error}")
        };
        let os = |what: &str| {
            let what = what.to_owned();
            move |errno: Errno| format!("{what}: {errno}")
        };
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGCHLD);
        let child_signal = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(os("watch for children"))?;
        let pause = File::open(&args.pause).map_err(io(&format!("open {}", args.pause.display())))?;
        let own_pid_namespace = File::open("/proc/self/ns/pid").map_err(io("open own PID namespace"))?;
        let cgroups = match &stock.cgroups {
            Some(known) => known.clone(),
            None => Cgroups::detect().map_err(|error| format!("{error}: {}", error.source))?,
        };
        let pod_group = cgroups.pod(&args.cgroup_root, &args.uid);
        let journal = Journal::begin(&args.dir).map_err(io("begin the journal"))?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(os("make epoll"))?;
        let event = |token: Token| EpollEvent::new(EpollFlags::EPOLLIN, token.pack());
        epoll.add(&inherited.listener, event(Token::Listener)).map_err(os("watch the socket"))?;
        epoll.add(&child_signal, event(Token::Child)).map_err(os("watch for children"))?;
        let mut supervisor = Self {
            args,
            inherited,
            epoll,
            child_signal,
            pause_program: pause.into(),
            own_pid_namespace,
            pod_group,
            stock,
            journal,
            logger: None,
            sandbox: Sandbox::default(),
            containers: BTreeMap::new(),
            children: BTreeMap::new(),
            clients: BTreeMap::new(),
            next_number: 1,
            leftovers: Vec::new(),
            settle_at_ms: None,
            stopping: None,
            state_changed: true,
            buffer: Vec::new(),
            boot_id: boot_id(),
            start_ticks: start_ticks(std::process::id()).unwrap_or(0),
            ended: false,
        };
        supervisor.keep_state();
        Ok(supervisor)
    }

    /// Serves until it is told to stop.
    ///
    /// # Errors
    /// When the loop itself cannot go on.
    pub fn run(&mut self) -> Result<(), String> {
        let mut events = [EpollEvent::empty(); 32];
        let mut rested = false;
        while !self.ended {
            let timeout = self.timeout(rested);
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => 0,
                Err(errno) => return Err(format!("wait for events: {errno}")),
            };
            rested = count == 0 && self.has_rest();
            if rested {
                sys::rest();
                continue;
            }
            for event in events.iter().take(count) {
                if let Some(token) = Token::unpack(event.data()) {
                    self.serve(token, event.events());
                }
            }
            self.on_time();
            self.settle();
            self.keep_state();
            self.attend_clients();
        }
        Ok(())
    }

    fn serve(&mut self, token: Token, events: EpollFlags) {
        match token {
            Token::Listener => self.accept(),
            Token::Child => self.reap(),
            Token::Logs => self.take_closed_logs(),
            Token::Client(number) => self.serve_client(number, events),
            Token::Report(pid) => self.read_report(pid),
            Token::Output(number, which) => self.read_output(number, which),
            Token::Input(number) => self.write_input(number),
        }
    }

    /// Until the nearest deadline.
    fn timeout(&self, rested: bool) -> EpollTimeout {
        let rest = (!rested).then(|| now_ms() + REST_MS);
        let nearest = self.nearest_deadline().into_iter().chain(rest).min();
        nearest.map_or(EpollTimeout::NONE, |at_ms| {
            let wait_ms = at_ms.saturating_sub(now_ms()).min(60_000);
            EpollTimeout::try_from(u32::try_from(wait_ms).unwrap_or(0)).unwrap_or(EpollTimeout::ZERO)
        })
    }

    fn nearest_deadline(&self) -> Option<u64> {
        let kills = self.containers.values().filter_map(Container::deadline_ms);
        let drains = self.clients.values().filter_map(exec::deadline_ms);
        kills.chain(drains).chain(self.settle_at_ms).min()
    }

    /// Whether nothing is due within the time that a rest is worth.
    fn has_rest(&self) -> bool {
        self.nearest_deadline().is_none_or(|at_ms| at_ms > now_ms() + REST_MS)
    }

    fn on_time(&mut self) {
        let now_ms = now_ms();
        self.kill_the_late(now_ms);
        self.end_drained_execs(now_ms);
        if self.settle_at_ms.is_some_and(|at_ms| at_ms <= now_ms) {
            self.settle_at_ms = None;
        }
    }

    // --------------------------------------------------------------------------------------------- connections

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.inherited.listener.accept() {
            if self.clients.len() >= MAX_CLIENTS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let number = self.next_number;
            self.next_number += 1;
            let event = EpollEvent::new(EpollFlags::EPOLLIN, Token::Client(number).pack());
            if self.epoll.add(&stream, event).is_ok() {
                let mut client = Client::new(stream);
                client.interest = EpollFlags::EPOLLIN;
                self.clients.insert(number, client);
            }
        }
    }

    fn serve_client(&mut self, number: u64, events: EpollFlags) {
        let mut buffer = std::mem::take(&mut self.buffer);
        if let Some(client) = self.clients.get_mut(&number)
            && client.interest.contains(EpollFlags::EPOLLIN)
        {
            client.receive(&mut buffer);
        } else if events.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR)
            && let Some(client) = self.clients.get_mut(&number)
        {
            // The other side has gone while input waits for a program that reads none: nobody is there to read on for.
            client.broken = true;
        }
        self.buffer = buffer;
        self.buffer.clear();
        self.buffer.shrink_to(0);
        self.serve_requests(number);
    }

    fn serve_requests(&mut self, number: u64) {
        loop {
            let Some(client) = self.clients.get_mut(&number) else { return };
            if !client.has_room() || client.exec.as_ref().is_some_and(|exec| !exec.takes_input()) {
                return;
            }
            match client.next_request() {
                Ok(Some(request)) => {
                    let asker = Asker { client: number, request: request.id };
                    match request.ask {
                        Some(ask) => self.answer(asker, ask),
                        None => self.refuse(asker, unknown_request()),
                    }
                }
                Ok(None) => return,
                Err(error) => {
                    eprintln!("a connection sent what is no request: {error}");
                    return;
                }
            }
        }
    }

    fn answer(&mut self, asker: Asker, ask: Ask) {
        match ask {
            Ask::Subscribe(_) => {
                let state = self.state();
                let (_, acknowledged) = self.journal.positions();
                if let Some(client) = self.clients.get_mut(&asker.client) {
                    client.say(asker.request, Say::State(state));
                    client.subscribed_after = Some(acknowledged);
                }
            }
            Ask::State(_) => {
                let state = self.state();
                self.say(asker, Say::State(state));
            }
            Ask::CreateSandbox(spec) => self.create_sandbox(asker, spec),
            Ask::Start(spec) => self.start(asker, *spec),
            Ask::Kill(kill) => self.kill(asker, &kill),
            Ask::Stop(_) => self.stop(asker),
            Ask::Acknowledge(sequence) => {
                self.journal.acknowledge(sequence);
                self.state_changed = true;
            }
            Ask::Exec(exec) => self.exec(asker, &exec),
            Ask::ExecInput(input) => self.exec_input(asker, input),
            Ask::Attach(attach) => self.attach(asker, &attach),
            Ask::Resize(wanted) => self.resize(asker, &wanted),
        }
    }

    fn say(&mut self, asker: Asker, say: Say) {
        if let Some(client) = self.clients.get_mut(&asker.client) {
            client.say(asker.request, say);
        }
    }

    fn done(&mut self, asker: Asker) {
        self.say(asker, Say::Done(Empty {}));
    }

    fn refuse(&mut self, asker: Asker, refused: Refused) {
        self.say(asker, Say::Refused(refused));
    }

    /// Sends what waits, closes what is over, and tells epoll what is of interest now.
    fn attend_clients(&mut self) {
        let numbers: Vec<u64> = self.clients.keys().copied().collect();
        for number in numbers {
            self.push_events(number);
            let Some(client) = self.clients.get_mut(&number) else { continue };
            client.flush();
            if client.broken || (client.finishing && client.is_flushed()) {
                self.close(number);
                continue;
            }
            // Requests that waited for room are in the buffer already, where epoll does not see them.
            self.serve_requests(number);
            self.update_interest(number);
        }
    }

    fn push_events(&mut self, number: u64) {
        let Some(client) = self.clients.get_mut(&number) else { return };
        while let Some(after) = client.subscribed_after
            && client.has_room()
            && let Some(event) = self.journal.after(after)
        {
            client.subscribed_after = Some(event.sequence);
            client.say(0, Say::Event(event.clone()));
        }
    }

    fn update_interest(&mut self, number: u64) {
        let Some(client) = self.clients.get_mut(&number) else { return };
        let mut interest = EpollFlags::empty();
        if client.has_room() && client.exec.as_ref().is_none_or(|exec| exec.takes_input()) {
            interest |= EpollFlags::EPOLLIN;
        }
        if !client.is_flushed() {
            interest |= EpollFlags::EPOLLOUT;
        }
        if interest != client.interest {
            client.interest = interest;
            let mut event = EpollEvent::new(interest, Token::Client(number).pack());
            let _ = self.epoll.modify(&client.stream, &mut event);
        }
        self.update_exec_interest(number);
    }

    fn close(&mut self, number: u64) {
        let Some(client) = self.clients.remove(&number) else { return };
        let _ = self.epoll.delete(&client.stream);
        let Some(exec) = &client.exec else { return };
        if let Some(name) = &exec.attached {
            if exec.input.is_some() && !exec.input_ends {
                self.release_stdin(name, false);
            }
        } else if exec.exited.is_none()
            && let Some(child) = self.children.get(&exec.pid)
        {
            // Its user is gone: so is the reason for it.
            let _ = child.pidfd.signal(libc::SIGKILL);
        }
    }

    // ------------------------------------------------------------------------------------------------ children

    /// Makes a child that works through `steps`.
    fn fork(
        &mut self,
        role: Role,
        namespaces: CloneFlags,
        (mut common, report): (Common, OwnedFd),
        steps: impl FnOnce(&mut Common) -> Step<std::convert::Infallible>,
    ) -> Step<u32> {
        let into = common.joins.into.take();
        // SAFETY: the only other thread is the log thread, which holds no lock: it allocates nothing after it has begun (see
        // `logs`). The child side never returns from `child::run`.
        let side = unsafe { sys::clone3(namespaces.bits(), into.as_ref().map(AsFd::as_fd)) };
        match side {
            Ok(Side::Child) => {
                // The lock says that the supervisor lives: a child on its way to exec must not hold it after it.
                sys::close_in_child(&self.inherited.lock);
                sys::close_in_child(&self.inherited.listener);
                child::run(common, steps)
            }
            Ok(Side::Parent(pid, pidfd)) => {
                let pipe = File::from(report);
                let event = EpollEvent::new(EpollFlags::EPOLLIN, Token::Report(pid).pack());
                let watched = self.epoll.add(&pipe, event);
                let report = Report { pipe, bytes: Vec::new(), failed: None, warnings: Vec::new() };
                let pidfd = Pidfd::from_fd(pidfd);
                if let Err(errno) = watched {
                    let _ = pidfd.signal(libc::SIGKILL);
                    eprintln!("watch a child: {errno}");
                }
                self.children.insert(pid, Child { role, pidfd, report: Some(report) });
                Ok(pid)
            }
            Err(errno) => {
                let failure = Failure::node("make a process", "", errno);
                Err(match errno {
                    Errno::ENOSPC | Errno::EUSERS if namespaces.contains(CloneFlags::CLONE_NEWUSER) => {
                        failure.because("the node allows no more user namespaces (sysctl user.max_user_namespaces)")
                    }
                    Errno::EINVAL if namespaces.contains(CloneFlags::CLONE_NEWUSER) => {
                        failure.because("the node's kernel was built without user namespaces")
                    }
                    _ => failure,
                })
            }
        }
    }

    /// Ends a child that cannot go on, and knows it no more: it is reaped like an orphan.
    fn abandon(&mut self, pid: u32) {
        let Some(child) = self.children.remove(&pid) else { return };
        let _ = child.pidfd.signal(libc::SIGKILL);
        if let Some(report) = &child.report {
            let _ = self.epoll.delete(&report.pipe);
        }
    }

    /// Reads what a child says on its way. Its pipe's end is the exec, or its death.
    fn read_report(&mut self, pid: u32) {
        let Some(child) = self.children.get_mut(&pid) else { return };
        let Some(report) = &mut child.report else { return };
        let mut chunk = [0; 4096];
        let mut named = false;
        let over = loop {
            match report.pipe.read(&mut chunk) {
                Ok(0) => break true,
                Ok(count) => report.bytes.extend_from_slice(chunk.get(..count).unwrap_or(&[])),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => break error.kind() != std::io::ErrorKind::WouldBlock,
            }
        };
        while let Ok(Some(says)) = take_frame::<ChildSays>(&mut report.bytes) {
            named |= says.named;
            if !says.warning.is_empty() {
                report.warnings.push(says.warning);
            }
            if says.failed.is_some() {
                report.failed = says.failed;
            }
        }
        if named {
            self.sandbox_named();
        }
        if over {
            self.report_ended(pid);
        }
    }

    fn report_ended(&mut self, pid: u32) {
        let Some(child) = self.children.get_mut(&pid) else { return };
        let Some(report) = child.report.take() else { return };
        let _ = self.epoll.delete(&report.pipe);
        match child.role.clone() {
            Role::Pause => self.pause_runs(report.failed),
            Role::Container(name) => self.container_runs((&name, pid), report.failed, report.warnings),
            Role::Exec(client) => self.exec_runs(client, report.failed),
        }
    }

    fn reap(&mut self) {
        while let Ok(Some(_)) = self.child_signal.read_signal() {}
        loop {
            let (pid, code, signal) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code, 0),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32, signal as i32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(errno) => {
                    eprintln!("wait for children: {errno}");
                    return;
                }
            };
            let Ok(pid) = u32::try_from(pid.as_raw()) else { continue };
            // It may have said something that was not read yet; its end of the pipe is closed now.
            self.read_report(pid);
            self.report_ended(pid);
            // An orphan that came to us is nobody's.
            let Some(child) = self.children.remove(&pid) else { continue };
            match child.role {
                Role::Pause => self.pause_ended(code, signal),
                Role::Container(name) => self.container_ended((&name, pid), code, signal),
                Role::Exec(client) => self.exec_ended(client, code),
            }
        }
    }

    // --------------------------------------------------------------------------------------------------- state

    fn state(&self) -> State {
        let (last_sequence, acknowledged) = self.journal.positions();
        State {
            version: protocol::ABILITIES,
            shim_pid: std::process::id(),
            boot_id: self.boot_id.clone(),
            sandbox: self.sandbox.attempt(),
            phase: self.sandbox.phase.into(),
            pause_pid: self.sandbox.pid,
            pause_start_ticks: self.sandbox.start_ticks,
            runs: self.containers.values().filter_map(Container::as_run).collect::<Vec<Run>>(),
            last_sequence,
            acknowledged,
            shim_start_ticks: self.start_ticks,
        }
    }

    fn keep_state(&mut self) {
        if std::mem::take(&mut self.state_changed) && !self.ended {
            write_state(&self.args.dir, &self.state());
        }
    }

    /// Looks again soon.
    fn settle_soon(&mut self) {
        self.settle_at_ms.get_or_insert(now_ms() + SETTLE_MS);
    }

    /// What follows from what has happened: ends that are complete, the sandbox's end, the supervisor's.
    fn settle(&mut self) {
        self.finish_ended_containers();
        self.finish_sandbox();
        self.finish_stop();
    }

    // ---------------------------------------------------------------------------------------------------- stop

    fn stop(&mut self, asker: Asker) {
        // Asked twice, the second one is answered; the first has no connection any more or asks again itself.
        self.stopping = Some(asker);
        self.refuse_waiting_starts("the pod is being stopped");
        self.kill_all();
    }

    /// Everything dies: containers, exec'd processes, the infra container.
    fn kill_all(&mut self) {
        for container in self.containers.values() {
            container.kill_group();
        }
        for child in self.children.values() {
            let _ = child.pidfd.signal(libc::SIGKILL);
        }
    }

    fn finish_stop(&mut self) {
        let Some(asker) = self.stopping else { return };
        if !self.children.is_empty() || self.containers.values().any(Container::lives) {
            return;
        }
        let emptied = self.pod_group.kill_until_empty().and_then(|()| self.pod_group.remove_patiently());
        if let Err(error) = emptied {
            self.stopping = None;
            let mut refused = refused(error.operation, &error.path.to_string_lossy(), Fault::Node);
            refused.errno = error.source.raw_os_error().unwrap_or(0);
            refused.detail = error.source.to_string();
            return self.refuse(asker, refused);
        }
        if let Err(error) = minipod_podshim::cleanup::remove_files(&self.args.dir) {
            eprintln!("{error}");
        }
        self.push_events(asker.client);
        self.done(asker);
        if let Some(client) = self.clients.get_mut(&asker.client) {
            let _ = client.stream.set_nonblocking(false);
            let _ = client.stream.set_write_timeout(Some(std::time::Duration::from_secs(1)));
            client.flush();
        }
        self.ended = true;
    }
}

/// Milliseconds of a clock that only goes forward.
pub fn now_ms() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    let now = now.map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds since the epoch.
pub fn wall_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// A refusal without an error number.
pub fn refused(step: &str, object: &str, fault: Fault) -> Refused {
    Refused { step: step.to_owned(), object: object.to_owned(), fault: fault.into(), ..Refused::default() }
}

fn unknown_request() -> Refused {
    let mut refused = refused("understand the request", "", Fault::Request);
    refused.detail = "the supervisor is older than the agent".to_owned();
    refused
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back() {
        for token in [
            Token::Listener,
            Token::Child,
            Token::Logs,
            Token::Client(1 << 40),
            Token::Report(u32::MAX),
            Token::Output(7, 0),
            Token::Output(7, 1),
            Token::Input(9),
        ] {
            assert_eq!(Token::unpack(token.pack()), Some(token));
        }
        assert_eq!(Token::unpack(u64::MAX), None);
    }
}
