//! Programs run in a container, each on its own connection.

use std::os::fd::{AsFd, OwnedFd};

use minipod_podshim::protocol::{
    Exec, ExecInput, ExecOutput, Fault, Input, MAX_DATA_BYTES, Output, Refused, Say, Window,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::CloneFlags;
use nix::sys::epoll::{EpollEvent, EpollFlags};

use super::container::Container;
use super::drain::{Drain, Flow, Patience};
use super::sandbox::{Tap as _, cgroup_refused, null};
use super::{Asker, Role, Supervisor, Token, now_ms, refused};
use crate::child::report::{Failure, Reporter, errno_of};
use crate::child::users::on_node;
use crate::child::{self, Common, ExecChild, Stdio};
use crate::client::{Client, ExecSession};
use crate::terminal;

/// Input that may wait for a process which does not read it, before its connection is not read any more.
const INPUT_BYTES: usize = 256 << 10;
/// What ends the input at a terminal.
pub(super) const END_OF_TRANSMISSION: u8 = 4;
/// How long an ended process' output is waited for. What it has written is there at once; only others can make it last.
const DRAIN: Patience = Patience { idle_ms: 500, held_ms: 5_000 };

impl ExecSession {
    /// Whether more input can be taken.
    pub fn takes_input(&self) -> bool {
        self.waiting_input.len() < INPUT_BYTES
    }

    fn flow(&self) -> Flow {
        Flow { bytes: self.read_bytes, held_open: self.outputs.iter().flatten().any(|pipe| !is_hung_up(pipe)) }
    }

    /// Its process has ended.
    pub fn ended(&mut self, code: i32, patience: Patience) {
        self.exited = Some(code);
        self.drain = Some(Drain::begin(patience, self.flow(), now_ms()));
    }

    fn is_over(&mut self, room: bool, now_ms: u64) -> bool {
        if !self.started || self.exited.is_none() {
            return false;
        }
        let flow = self.flow();
        match &mut self.drain {
            _ if self.outputs.iter().all(Option::is_none) => true,
            Some(drain) if !room => {
                drain.wait_for_reader(now_ms);
                false
            }
            Some(drain) => drain.is_given_up(flow, now_ms),
            None => true,
        }
    }
}

/// When to stop waiting for a connection's process. While its reader is slow there is no such time: what it gives room for is read.
pub(super) fn deadline_ms(client: &Client) -> Option<u64> {
    let exec = client.exec.as_ref().filter(|_| client.has_room())?;
    exec.drain.as_ref().map(Drain::deadline_ms)
}

/// Whether nobody can write any more; what was written may wait all the same.
fn is_hung_up(pipe: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
    let asked = poll(&mut fds, PollTimeout::ZERO);
    asked.is_ok() && fds.iter().any(|fd| fd.revents().is_some_and(|seen| seen.contains(PollFlags::POLLHUP)))
}

impl Supervisor {
    pub(super) fn exec(&mut self, asker: Asker, exec: &Exec) {
        match self.try_exec(asker, exec) {
            Ok(session) => {
                if let Some(client) = self.clients.get_mut(&asker.client) {
                    client.exec = Some(session);
                }
            }
            Err(refused) => {
                self.refuse(asker, refused);
                if let Some(client) = self.clients.get_mut(&asker.client) {
                    client.finishing = true;
                }
            }
        }
    }

    fn try_exec(&mut self, asker: Asker, exec: &Exec) -> Result<ExecSession, Refused> {
        let wrong = |why: &str| refused("run a program in container", &exec.name, Fault::Request).tap(why);
        let client = self.clients.get(&asker.client);
        if client.is_none_or(|client| client.exec.is_some() || client.finishing || client.subscribed_after.is_some()) {
            return Err(wrong("the connection serves something else"));
        }
        let known = self.containers.get(&exec.name).filter(|known| known.attempt() == exec.attempt && known.runs());
        let container = known.filter(|_| self.stopping.is_none()).ok_or_else(|| wrong("it is not running"))?;
        let joins = container.group().joins().map_err(|error| cgroup_refused(&error))?;
        let spec = container.spec.clone();
        let init = container.init_fd().map_err(|failure| failure.0)?;
        self.make_exec(asker, exec, (spec, init, joins)).map_err(|failure| failure.0)
    }

    fn make_exec(
        &mut self,
        asker: Asker,
        exec: &Exec,
        (spec, init, joins): (minipod_podshim::protocol::ContainerSpec, OwnedFd, minipod_podshim::cgroup::Joins),
    ) -> Result<ExecSession, Failure> {
        let wrong = |error: std::io::Error| Failure::node("make a pipe", "", errno_of(&error));
        let (report, reporter) = crate::pipe().map_err(wrong)?;
        let (stdio, ends) = match &exec.terminal {
            Some(window) => self.terminal_streams(&exec.name, *window, exec.stdin)?,
            None => pipe_streams(exec.stdin).map_err(wrong)?,
        };
        let mut env = exec.env.clone();
        if stdio.terminal && !spec.env.iter().any(|pair| pair.starts_with("TERM=")) {
            env.push("TERM=xterm".to_owned());
        }
        let into_pids = if self.sandbox.host_pids() {
            None
        } else {
            Some(init.try_clone().map_err(|error| Failure::node("copy a descriptor", "", errno_of(&error)))?)
        };
        let mut namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP | self.sandbox.shared_namespaces();
        let range = self.sandbox.ids();
        if range.is_some() {
            namespaces |= CloneFlags::CLONE_NEWUSER;
        }
        let common = Common { joins, stdio, reporter: Reporter(reporter.into()) };
        let pid = self.in_pid_namespace_of(into_pids, |this| {
            this.fork(Role::Exec(asker.client), CloneFlags::empty(), (common, report), |common| {
                let (argv, env) = (&exec.argv, &env);
                let child = ExecChild { spec: &spec, argv, env, init: init.as_fd(), namespaces, range };
                child::exec(&child, common)
            })
        })?;
        Ok(ExecSession {
            pid,
            request: asker.request,
            started: false,
            outputs: ends.outputs,
            input: ends.input,
            waiting_input: Vec::new(),
            input_ends: false,
            exited: None,
            drain: None,
            read_bytes: 0,
            attached: None,
            terminal: exec.terminal.is_some(),
            watched: [false; 2],
            input_watched: false,
        })
    }

    /// A terminal of the container's own, so that its programs find it under the name that they are told.
    fn terminal_streams(&self, name: &str, window: Window, stdin: bool) -> Result<(Stdio, Ends), Failure> {
        let container = self.containers.get(name);
        let owner = container.and_then(|container| container.spec.user.as_ref()).map_or(0, |user| user.uid);
        let owner = on_node(self.sandbox.ids().as_ref(), owner)?;
        let pid = container.map_or(0, Container::pid);
        let (master, terminal) = terminal::open_in(pid, owner, window)?;
        let wrong = |error: std::io::Error| Failure::node("copy a descriptor", "", errno_of(&error));
        let copy = |fd: &OwnedFd| fd.try_clone().map_err(wrong);
        let input = if stdin { Some(copy(&master)?) } else { None };
        let (stdin, stdout) = (copy(&terminal)?, copy(&terminal)?);
        let stdio = Stdio { stdin, stdout, stderr: terminal, terminal: true };
        Ok((stdio, Ends { outputs: [Some(master), None], input }))
    }

    /// Its program runs, or it never will.
    pub(super) fn exec_runs(&mut self, number: u64, failed: Option<Refused>) {
        let Some(client) = self.clients.get_mut(&number) else { return };
        let Some(session) = &mut client.exec else { return };
        let request = session.request;
        match failed {
            Some(failed) => {
                client.say(request, Say::Refused(failed));
                client.finishing = true;
                client.exec = None;
            }
            None => {
                session.started = true;
                let pid = session.pid;
                client.say(request, started(pid));
            }
        }
    }

    pub(super) fn read_output(&mut self, number: u64, which: usize) {
        let Some(client) = self.clients.get_mut(&number) else { return };
        let room = client.has_room();
        let Some(session) = &mut client.exec else { return };
        let request = session.request;
        let (Some(place), Some(watched)) = (session.outputs.get_mut(which), session.watched.get_mut(which)) else {
            return;
        };
        let Some(pipe) = place else { return };
        if !room {
            // Its reader is slow: the process waits. `update_exec_interest` watches again when there is room.
            let _ = self.epoll.delete(&*pipe);
            *watched = false;
            return;
        }
        let mut data = vec![0; MAX_DATA_BYTES];
        match nix::unistd::read(&*pipe, &mut data) {
            Ok(count) if count > 0 => {
                session.read_bytes += count as u64;
                data.truncate(count);
                data.shrink_to_fit();
                client.say(request, said(if which == 0 { Output::Stdout(data) } else { Output::Stderr(data) }));
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            _ => {
                let _ = self.epoll.delete(&*pipe);
                *place = None;
            }
        }
    }

    /// Watches what can be served: outputs while their reader keeps up, stdin while something waits for it.
    pub(super) fn update_exec_interest(&mut self, number: u64) {
        let Some(client) = self.clients.get_mut(&number) else { return };
        let room = client.has_room();
        let Some(session) = client.exec.as_mut().filter(|session| session.started) else { return };
        for (which, (pipe, watched)) in session.outputs.iter().zip(&mut session.watched).enumerate() {
            if let Some(pipe) = pipe
                && room
                && !*watched
            {
                let event = EpollEvent::new(EpollFlags::EPOLLIN, Token::Output(number, which).pack());
                *watched = self.epoll.add(pipe, event).is_ok();
            }
        }
        let Some(input) = &session.input else { return };
        let wanted = !session.waiting_input.is_empty();
        if wanted && !session.input_watched {
            let event = EpollEvent::new(EpollFlags::EPOLLOUT, Token::Input(number).pack());
            session.input_watched = self.epoll.add(input, event).is_ok();
        } else if !wanted && session.input_watched {
            let _ = self.epoll.delete(input);
            session.input_watched = false;
        }
    }

    pub(super) fn exec_input(&mut self, asker: Asker, input: ExecInput) {
        let attached = self.clients.get(&asker.client).and_then(|client| client.exec.as_ref()?.attached.clone());
        let once = attached.as_ref().is_none_or(|name| self.containers.get(name).is_some_and(|c| c.spec.stdin_once));
        if let (Some(name), Some(Input::Resize(window))) = (&attached, &input.input) {
            return self.resize_terminal(name, *window);
        }
        let Some(session) = self.clients.get_mut(&asker.client).and_then(|client| client.exec.as_mut()) else { return };
        match input.input {
            Some(Input::Stdin(data)) if session.input.is_some() => session.waiting_input.extend_from_slice(&data),
            Some(Input::StdinClosed(_)) if !session.input_ends => {
                session.input_ends = true;
                if session.terminal && session.input.is_some() && once {
                    // A terminal has no end, only the character that a person would type.
                    session.waiting_input.push(END_OF_TRANSMISSION);
                }
            }
            Some(Input::Signal(signal)) if attached.is_none() => {
                if let Some(child) = self.children.get(&session.pid) {
                    let _ = child.pidfd.signal(signal);
                }
            }
            Some(Input::Resize(window)) => {
                if let (true, [Some(master), _]) = (session.terminal, &session.outputs) {
                    // A terminal that has just ended needs no size.
                    let _ = terminal::resize(master.as_fd(), window);
                }
            }
            Some(Input::Stdin(_) | Input::StdinClosed(_) | Input::Signal(_)) | None => {}
        }
        self.write_input(asker.client);
    }

    pub(super) fn write_input(&mut self, number: u64) {
        let Some(session) = self.clients.get_mut(&number).and_then(|client| client.exec.as_mut()) else { return };
        let Some(input) = &session.input else { return };
        let mut written = 0;
        let open = loop {
            let Some(rest) = session.waiting_input.get(written..).filter(|rest| !rest.is_empty()) else { break true };
            match nix::unistd::write(input, rest) {
                Ok(count) => written += count,
                Err(Errno::EINTR) => {}
                Err(errno) => break errno == Errno::EAGAIN,
            }
        };
        session.waiting_input.drain(..written);
        if !open || (session.input_ends && session.waiting_input.is_empty()) {
            if session.input_watched {
                let _ = self.epoll.delete(input);
            }
            // What nobody reads is dropped; what comes later too.
            (session.input, session.input_watched) = (None, false);
            session.waiting_input = Vec::new();
            if let Some(name) = session.attached.clone().filter(|_| session.input_ends) {
                self.release_stdin(&name, true);
            }
        }
    }

    pub(super) fn exec_ended(&mut self, number: u64, code: i32) {
        if let Some(session) = self.clients.get_mut(&number).and_then(|client| client.exec.as_mut()) {
            session.ended(code, DRAIN);
        }
    }

    /// Tells the ends of processes whose output was all sent, or is held open for too long.
    pub(super) fn end_drained_execs(&mut self, now_ms: u64) {
        for client in self.clients.values_mut() {
            let room = client.has_room();
            let Some(session) = client.exec.as_mut() else { continue };
            if !session.is_over(room, now_ms) {
                continue;
            }
            for (pipe, watched) in session.outputs.iter().zip(session.watched) {
                if let Some(pipe) = pipe
                    && watched
                {
                    let _ = self.epoll.delete(pipe);
                }
            }
            let (request, code) = (session.request, session.exited.unwrap_or(0));
            client.exec = None;
            client.say(request, said(Output::Exited(code)));
            client.finishing = true;
        }
    }
}

/// The supervisor's ends of a program's streams.
struct Ends {
    outputs: [Option<OwnedFd>; 2],
    input: Option<OwnedFd>,
}

fn pipe_streams(with_input: bool) -> std::io::Result<(Stdio, Ends)> {
    let ((out, stdout), (err, stderr)) = (crate::pipe()?, crate::pipe()?);
    let (stdin, input) = if with_input {
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        fcntl(write.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        (read, Some(write))
    } else {
        (null().map_err(|failure| std::io::Error::from_raw_os_error(failure.0.errno))?, None)
    };
    let stdio = Stdio { stdin, stdout, stderr, terminal: false };
    Ok((stdio, Ends { outputs: [Some(out), Some(err)], input }))
}

/// The program runs.
pub(super) fn started(pid: u32) -> Say {
    said(Output::Started(pid))
}

fn said(output: Output) -> Say {
    Say::ExecOutput(ExecOutput { output: Some(output) })
}
