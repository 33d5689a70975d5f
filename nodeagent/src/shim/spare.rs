//! A supervisor in waiting. The start of a process is a good part of a pod's start: it is paid before there is a pod.
//!
//! One at a time, and a new one only when the node rests: pods that come in a crowd start supervisors of their own, as they would
//! without any of this. A spare ends when the agent's end of its socket closes, with the agent at the latest.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use minipod_podshim::call::{self, READY, SPARE};
use minipod_podshim::handover;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};
use tokio::sync::Notify;

use crate::sys::Netns;

/// How long a new one may take until it waits.
const READY_PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a pod's uid that a spare's command line has room for, twice: in the directory and by itself.
const UID_BYTES: usize = 64;

/// What a supervisor is handed to be a pod's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Handed<'a> {
    /// The pod's socket, listening.
    pub listener: BorrowedFd<'a>,
    /// The pod's lock, held.
    pub lock: BorrowedFd<'a>,
    /// Where it complains.
    pub complaints: BorrowedFd<'a>,
}

/// One that waits.
#[derive(Debug)]
struct Waiting {
    /// The agent's end of its stdin.
    socket: OwnedFd,
    network: Option<Netns>,
}

/// The place of the one that waits.
#[derive(Debug, Default)]
pub struct Spare {
    waiting: Mutex<Option<Waiting>>,
    wanted: Notify,
}

/// A spare is a pod's supervisor now.
#[derive(Debug)]
pub(super) struct Called {
    /// The network namespace that the pod's first sandbox gets, unless that has the node's or users of its own.
    pub network: Option<Netns>,
}

impl Spare {
    fn place(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when a pod has asked for it since the last time.
    pub async fn wanted(&self) {
        self.wanted.notified().await;
    }

    /// Lets the spare be a pod's supervisor; none: there is no spare, or it does not come.
    pub(super) fn call(&self, words: &[String], handed: Handed<'_>) -> Option<Called> {
        let bytes = call::bytes_of(words)?;
        self.wanted.notify_one();
        let waiting = self.place().take()?;
        match handover::send(&waiting.socket, &bytes, &[handed.listener, handed.lock, handed.complaints]) {
            Ok(()) => Some(Called { network: waiting.network }),
            Err(errno) => {
                tracing::warn!(%errno, "the spare supervisor has ended");
                None
            }
        }
    }

    /// Starts one for a pod in a directory of `pods`, unless one waits. A failure is told and leaves none: the pods' own starts say what is wrong.
    pub async fn fill(&self, podshim: &Path, pods: &Path) {
        if self.place().is_some() {
            return;
        }
        match start(podshim, pods).await {
            Ok(waiting) => *self.place() = Some(waiting),
            Err(error) => tracing::warn!(%error, podshim = %podshim.display(), "start a spare supervisor"),
        }
    }
}

/// Starts one and waits until it waits.
async fn start(podshim: &Path, pods: &Path) -> std::io::Result<Waiting> {
    let (ours, its) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    // A pod's command line takes the place of this one: nothing but blanks, as long as that may be.
    let room = pods.as_os_str().len() + 2 * UID_BYTES + 256;
    let child = tokio::process::Command::new(podshim)
        .arg(SPARE)
        .arg(" ".repeat(room))
        .env_clear()
        .stdin(Stdio::from(its))
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()?;
    let pid = child.id();
    // The runtime reaps it when it ends; it is not to end with this handle.
    drop(child);
    let waits = tokio::task::spawn_blocking(move || {
        let network = hear_ready(&ours)?;
        Ok::<_, std::io::Error>(Waiting { socket: ours, network })
    });
    let waiting = waits.await.map_err(std::io::Error::other)??;
    tracing::debug!(pid, "a spare supervisor waits");
    Ok(waiting)
}

fn hear_ready(socket: &OwnedFd) -> std::io::Result<Option<Netns>> {
    let patience = PollTimeout::try_from(READY_PATIENCE).unwrap_or(PollTimeout::MAX);
    if poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], patience)? == 0 {
        return Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "it does not say that it waits"));
    }
    let mut byte = [0];
    match handover::receive(socket, &mut byte, MsgFlags::MSG_DONTWAIT)? {
        (1, descriptors) if byte == [READY] => Ok(descriptors.into_iter().next().map(Netns::from)),
        _ => Err(std::io::Error::other("it ended: is it older than this agent?")),
    }
}
