//! Starting a supervisor so that there is never a moment in which it lives unseen.
//!
//! The agent takes the lock and binds the socket, and hands both to the supervisor: to the spare in a message, to a new one as its stdout
//! and stdin. So the lock is held from before the supervisor is the pod's to its death, on the way as well, and a connection can be
//! made at once: it waits in the backlog. A spare that dies before it has read the message lets go of both: then there is no supervisor.

use std::fs::{OpenOptions, TryLockError};
use std::os::fd::{AsFd as _, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::Stdio;

use minipod_podshim::protocol::files;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};

use super::spare::Handed;
use super::{Launch, ShimError};
use crate::sys::Netns;

/// Connections that wait to be taken: the agent's own, and exec'd processes.
const BACKLOG: i32 = 64;
/// The supervisor's own complaints, for people.
const COMPLAINTS: &str = "shim.log";

fn failed(operation: &'static str, path: PathBuf) -> impl FnOnce(std::io::Error) -> ShimError {
    move |source| ShimError::Start { operation, path, source }
}

/// Starts a supervisor unless one lives. The network namespace that it has ready, if it has.
pub(super) async fn ensure(launch: &Launch) -> Result<Option<Netns>, ShimError> {
    let path = launch.dir.join(files::LOCK);
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = open.map_err(failed("create", path.clone()))?;
    // std's lock is given up when the last descriptor that shares it is closed, not when this one is.
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(source)) => return Err(failed("lock", path)(source)),
    }
    let listener = listen_at(launch.dir.join(files::SOCKET))?;
    let log = launch.dir.join(COMPLAINTS);
    let complaints = OpenOptions::new().create(true).append(true).open(&log).map_err(failed("create", log))?;
    let words = words_of(launch);
    let handed = Handed { listener: listener.as_fd(), lock: file.as_fd(), complaints: complaints.as_fd() };
    if let Some(called) = launch.spare.call(&words, handed) {
        return Ok(called.network);
    }
    // Nothing is asked for that posix_spawn cannot do, such as another directory: a fork would copy the page tables of this process.
    let child = tokio::process::Command::new(&launch.podshim)
        .args(words)
        .env_clear()
        .stdin(Stdio::from(listener))
        .stdout(Stdio::from(file))
        .stderr(Stdio::from(complaints))
        .spawn();
    // The runtime reaps it when it ends; it is not to end with this handle.
    child.map(|_| None).map_err(failed("start", launch.podshim.clone()))
}

/// A supervisor's command line.
fn words_of(launch: &Launch) -> Vec<String> {
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let pairs = [
        ("--dir", path(&launch.dir)),
        ("--uid", launch.uid.clone()),
        ("--cgroup-root", launch.cgroup_root.clone()),
        ("--pause", path(&launch.pause)),
    ];
    pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect()
}

fn listen_at(path: PathBuf) -> Result<OwnedFd, ShimError> {
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed("remove", path)(error)),
        _ => {}
    }
    let make = || {
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
        bind(fd.as_raw_fd(), &UnixAddr::new(&path)?)?;
        listen(&fd, Backlog::new(BACKLOG)?)?;
        Ok(fd)
    };
    make().map_err(|errno: Errno| failed("listen at", path.clone())(errno.into()))
}
