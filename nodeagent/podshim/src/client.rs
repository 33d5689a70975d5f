//! A connection: the agent's own, or the one that an exec'd process lives on.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use minipod_podshim::protocol::{FrameError, Request, Response, Say, put_frame, take_frame};
use nix::sys::epoll::EpollFlags;

use crate::supervisor::drain::Drain;

/// What may wait to be sent before nothing more is produced for a connection: a slow reader costs so much and no more.
pub const OUT_BYTES: usize = 256 << 10;
/// What is read from a connection at once.
const READ_BYTES: usize = 64 << 10;

/// A connection.
#[derive(Debug)]
pub struct Client {
    /// The socket.
    pub stream: UnixStream,
    /// Received, and not yet a whole frame.
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    /// How much of `outgoing` was sent.
    sent: usize,
    /// Gets events after this one.
    pub subscribed_after: Option<u64>,
    /// Serves this process and nothing else.
    pub exec: Option<ExecSession>,
    /// The other side has closed, or sent what is no frame.
    pub broken: bool,
    /// To be closed when everything is sent.
    pub finishing: bool,
    /// What epoll was asked for last.
    pub interest: EpollFlags,
}

/// The exec'd process of a connection, or a container's that it is attached to.
#[derive(Debug)]
pub struct ExecSession {
    /// In the node's PID namespace.
    pub pid: u32,
    /// The request that began it.
    pub request: u64,
    /// Its program runs.
    pub started: bool,
    /// Its stdout and stderr, until their end.
    pub outputs: [Option<OwnedFd>; 2],
    /// Its stdin, until it is closed.
    pub input: Option<OwnedFd>,
    /// For its stdin.
    pub waiting_input: Vec<u8>,
    /// No more will come.
    pub input_ends: bool,
    /// How it ended.
    pub exited: Option<i32>,
    /// The wait for the rest of its output, from its end on.
    pub drain: Option<Drain>,
    /// Bytes of output that were read.
    pub read_bytes: u64,
    /// Not a process of its own: the streams of this container's first process.
    pub attached: Option<String>,
    /// Both of its ends are a terminal's, which `outputs[0]` reads and `input` writes.
    pub terminal: bool,
    /// Whether epoll watches each output.
    pub watched: [bool; 2],
    /// Whether epoll watches its stdin.
    pub input_watched: bool,
}

impl Client {
    /// A fresh connection.
    pub fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            incoming: Vec::new(),
            outgoing: Vec::new(),
            sent: 0,
            subscribed_after: None,
            exec: None,
            broken: false,
            finishing: false,
            interest: EpollFlags::empty(),
        }
    }

    /// Queues a response.
    pub fn say(&mut self, id: u64, say: Say) {
        // Only a response of impossible size is not taken; then its asker hears that.
        if let Err(error) = put_frame(&Response { id, say: Some(say) }, &mut self.outgoing) {
            eprintln!("answer request {id}: {error}");
            self.broken = true;
        }
    }

    /// Whether more may be queued.
    pub fn has_room(&self) -> bool {
        self.outgoing.len() - self.sent < OUT_BYTES
    }

    /// Whether everything was sent.
    pub fn is_flushed(&self) -> bool {
        self.outgoing.is_empty()
    }

    /// Sends what the socket takes.
    pub fn flush(&mut self) {
        while let Some(rest) = self.outgoing.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.broken = true;
                    return;
                }
            }
        }
        self.sent = 0;
        self.outgoing.clear();
        // After a burst the memory goes back: every pod pays for it.
        self.outgoing.shrink_to(4 << 10);
    }

    /// Reads what there is, once.
    pub fn receive(&mut self, buffer: &mut Vec<u8>) {
        buffer.resize(READ_BYTES, 0);
        match self.stream.read(buffer) {
            Ok(0) => self.broken = true,
            Ok(count) => self.incoming.extend_from_slice(buffer.get(..count).unwrap_or(&[])),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.broken = true,
        }
    }

    /// The next whole request.
    ///
    /// # Errors
    /// When what came is no frame; the connection is broken then.
    pub fn next_request(&mut self) -> Result<Option<Request>, FrameError> {
        let request = take_frame(&mut self.incoming);
        if request.is_err() {
            self.broken = true;
        }
        if self.incoming.is_empty() {
            self.incoming.shrink_to(4 << 10);
        }
        request
    }
}
