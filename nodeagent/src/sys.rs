//! System calls that need care. The one module of the agent that may hold `unsafe`; it holds none now, because
//! nix's safe functions suffice.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};

/// An open network namespace. Keeps it alive.
#[derive(Debug)]
pub struct Netns(OwnedFd);

impl Netns {
    /// The namespace of a process. The caller knows that the process lives (holds its pidfd, or is its parent).
    ///
    /// # Errors
    /// When there is no such process.
    pub fn of_pid(pid: u32) -> io::Result<Self> {
        Self::at(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// A namespace by its file, such as `/run/netns/x`.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self(File::open(path)?.into()))
    }

    /// Runs `work` inside the namespace, on a thread of its own that ends with it, so that no thread that does other
    /// things is ever in the wrong namespace.
    ///
    /// # Errors
    /// When the thread cannot be had or the namespace cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let inside = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, || {
                setns(&self.0, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            })?;
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }
}

impl From<OwnedFd> for Netns {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
