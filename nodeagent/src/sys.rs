//! System calls that need care. The one module of the agent that may hold `unsafe`: what nix does for the whole process (glibc asks all
//! threads to follow a change of identity) is done here for one thread.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::fstat;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};

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

    /// Whether both are one.
    ///
    /// # Errors
    /// The system's.
    pub fn is(&self, other: &Self) -> io::Result<bool> {
        // A namespace is a file of nsfs, by whichever descriptor (ioctl_ns(2)).
        let (own, its) = (fstat(&self.0)?, fstat(&other.0)?);
        Ok((own.st_dev, own.st_ino) == (its.st_dev, its.st_ino))
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

/// Who a thread is to be when it touches files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Whether it is root where it belongs to, which may be a pod with users of its own.
    pub root: bool,
    /// Effective capabilities, bit n for capability n; root's. Others have none.
    pub capabilities: u64,
}

impl Identity {
    /// Makes the calling thread this, for files: the rest of the process stays who it is. There is no way back, so it is for a thread
    /// that ends with its work.
    ///
    /// # Errors
    /// When the agent may not: then the thread must not go on.
    pub fn assume(&self) -> io::Result<()> {
        // SAFETY: the kernel reads `groups.len()` 32-bit numbers from the slice. The raw call changes the calling thread alone.
        Errno::result(unsafe { libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr()) })?;
        setfsgid(Gid::from_raw(self.gid));
        setfsuid(Uid::from_raw(self.uid));
        // They do not say whether it was done, only who it was before.
        if setfsuid(Uid::from_raw(self.uid)).as_raw() != self.uid
            || setfsgid(Gid::from_raw(self.gid)).as_raw() != self.gid
        {
            return Err(Errno::EPERM.into());
        }
        let effective = if self.root { self.capabilities } else { 0 };
        set_effective(effective)
    }
}

/// _LINUX_CAPABILITY_VERSION_3.
const CAP_VERSION: u32 = 0x2008_0522;

/// Leaves the calling thread these capabilities, of those that it has.
fn set_effective(wanted: u64) -> io::Result<()> {
    let mut header = [CAP_VERSION, 0];
    // Effective, permitted and inheritable, the lower halves first.
    let mut sets = [[0_u32; 3]; 2];
    // SAFETY: version 3 reads a header of two numbers and writes two sets of three, which these are; process 0 is the calling thread.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) })?;
    for (set, shift) in sets.iter_mut().zip([0, 32]) {
        // The truncation is the half that is meant.
        let half = (wanted >> shift) as u32 & set[1];
        *set = [half, half, 0];
    }
    // SAFETY: as above, and the kernel only reads. The raw call changes the calling thread alone.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()) })?;
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_is_somebody_else_and_the_others_are_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let secret = dir.path().join("secret");
        std::fs::write(&secret, "x").expect("write");
        std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("mode");
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("mode");
        let (file, made) = (secret.clone(), dir.path().join("made"));
        let other = thread::spawn(move || {
            let identity = Identity { uid: 1234, gid: 2345, groups: vec![7], root: false, capabilities: u64::MAX };
            identity.assume().expect("needs root");
            let read = std::fs::read(file).map_err(|error| error.kind());
            std::fs::write(&made, "y").expect("write");
            let about = std::fs::metadata(made).expect("made");
            (read, std::os::unix::fs::MetadataExt::uid(&about), std::os::unix::fs::MetadataExt::gid(&about))
        });
        let (read, uid, gid) = other.join().expect("thread");
        assert_eq!((read, uid, gid), (Err(io::ErrorKind::PermissionDenied), 1234, 2345));
        assert_eq!(std::fs::read(&secret).expect("this thread is still root"), b"x");
        // Root without the capability to read everything.
        std::os::unix::fs::chown(&secret, Some(99), Some(99)).expect("chown");
        let file = secret.clone();
        let weak = thread::spawn(move || {
            Identity { uid: 0, gid: 0, groups: vec![], root: true, capabilities: 0 }.assume().expect("needs root");
            std::fs::read(file).map_err(|error| error.kind())
        });
        assert_eq!(weak.join().expect("thread"), Err(io::ErrorKind::PermissionDenied));
        assert!(std::fs::read(&secret).is_ok());
    }
}
