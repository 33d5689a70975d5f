//! Users who take part in the streams of a container's first process, each on its own connection.
//!
//! Output comes through pipes that the log thread fills beside the log; input goes to the pipe or terminal that the container got at
//! its start. The connection is served as an exec'd process' is, with the container's end as its own.

use std::os::fd::{AsFd as _, OwnedFd};

use minipod_podshim::protocol::{Attach, Fault, Refused, Window};

use super::exec::{END_OF_TRANSMISSION, started};
use super::sandbox::Tap as _;
use super::{Asker, Supervisor, refused};
use crate::child::report::{Failure, errno_of};
use crate::client::ExecSession;
use crate::logs::MAX_TAPS;
use crate::terminal;

impl Supervisor {
    pub(super) fn attach(&mut self, asker: Asker, attach: &Attach) {
        match self.try_attach(asker, attach) {
            Ok(session) => {
                let pid = session.pid;
                if let Some(client) = self.clients.get_mut(&asker.client) {
                    client.exec = Some(session);
                    client.say(asker.request, started(pid));
                }
                if let Some(window) = attach.window {
                    self.resize_terminal(&attach.name, window);
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

    fn try_attach(&mut self, asker: Asker, attach: &Attach) -> Result<ExecSession, Refused> {
        let wrong = |why: &str| refused("attach to container", &attach.name, Fault::Request).tap(why);
        let client = self.clients.get(&asker.client);
        if client.is_none_or(|client| client.exec.is_some() || client.finishing || client.subscribed_after.is_some()) {
            return Err(wrong("the connection serves something else"));
        }
        let attached = |session: &&ExecSession| session.attached.as_ref() == Some(&attach.name);
        if self.clients.values().filter_map(|client| client.exec.as_ref()).filter(attached).count() >= MAX_TAPS {
            return Err(wrong("as many as can be are attached to it already"));
        }
        let known = self.containers.get(&attach.name).filter(|known| known.attempt() == attach.attempt && known.runs());
        let container = known.filter(|_| self.stopping.is_none()).ok_or_else(|| wrong("it is not running"))?;
        let copy =
            |fd: &OwnedFd| fd.try_clone().map_err(|error| Failure::node("copy a descriptor", "", errno_of(&error)).0);
        let input = if attach.stdin { container.stdin.as_ref().map(copy).transpose()? } else { None };
        let (pid, log, terminal) = (container.pid(), container.log, container.spec.terminal.is_some());
        let outputs = self.tap(log).map_err(|error| Failure::node("copy the output", "", errno_of(&error)).0)?;
        Ok(ExecSession {
            pid,
            request: asker.request,
            started: true,
            outputs,
            input,
            waiting_input: Vec::new(),
            input_ends: false,
            exited: None,
            drain: None,
            read_bytes: 0,
            attached: Some(attach.name.clone()),
            terminal,
            watched: [false; 2],
            input_watched: false,
        })
    }

    /// Pipes with a copy of what is written to a log from now on.
    fn tap(&mut self, log: Option<u64>) -> std::io::Result<[Option<OwnedFd>; 2]> {
        let (Some(log), Some(logger)) = (log, &mut self.logger) else { return Ok([None, None]) };
        let pipe = || {
            let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC | nix::fcntl::OFlag::O_NONBLOCK)?;
            crate::sys::widen_pipe(read.as_fd(), super::container::PIPE_BYTES);
            Ok::<_, std::io::Error>((read, write))
        };
        let ((out, to_out), (err, to_err)) = (pipe()?, pipe()?);
        logger.tap(log, [to_out, to_err])?;
        Ok([Some(out), Some(err)])
    }

    pub(super) fn resize_terminal(&mut self, name: &str, window: Window) {
        if let Some(container) = self.containers.get(name)
            && container.spec.terminal.is_some()
            && let Some(master) = &container.stdin
        {
            // One that has just ended needs no size.
            let _ = terminal::resize(master.as_fd(), window);
        }
    }

    /// A user who could type has gone, or types no more. Some containers' input ends with that.
    pub(super) fn release_stdin(&mut self, name: &str, typed_end: bool) {
        let Some(container) = self.containers.get_mut(name).filter(|container| container.spec.stdin_once) else {
            return;
        };
        let Some(input) = (if container.spec.terminal.is_some() { None } else { container.stdin.take() }) else {
            if let Some(master) = container.stdin.as_ref().filter(|_| !typed_end) {
                // A terminal has no end, only the character that a person would type; one that is full has a reader to come.
                let _ = nix::unistd::write(master, &[END_OF_TRANSMISSION]);
            }
            return;
        };
        drop(input);
        for session in self.clients.values_mut().filter_map(|client| client.exec.as_mut()) {
            if session.attached.as_deref() == Some(name) {
                // Closing it ends epoll's interest too: it is the last descriptor of this end.
                (session.input, session.input_watched) = (None, false);
                session.waiting_input = Vec::new();
            }
        }
    }

    /// A container's first process has ended: whoever is attached hears of it after the last output.
    pub(super) fn end_attached(&mut self, name: &str, code: i32) {
        for session in self.clients.values_mut().filter_map(|client| client.exec.as_mut()) {
            if session.attached.as_deref() == Some(name) && session.exited.is_none() {
                session.ended(code, super::container::DRAIN);
            }
        }
    }
}
