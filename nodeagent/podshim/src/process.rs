//! Processes by descriptor, never by bare number: a number may belong to another process by the time it is used.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

/// A process that stays the same one, whatever becomes of its number.
#[derive(Debug)]
pub struct Pidfd(OwnedFd);

impl Pidfd {
    /// The process that has this number now.
    ///
    /// # Errors
    /// `ESRCH` when there is none.
    pub fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: pidfd_open(2) takes two numbers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: the call succeeded, so `fd` is a fresh descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Takes a descriptor that clone3 gave.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self(fd)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `ESRCH` when the process is gone, `EINVAL` when there is no such signal.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let no_info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: pidfd_send_signal(2) with a live descriptor and no siginfo reads nothing of ours.
        let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal, no_info, 0) };
        Errno::result(sent)?;
        Ok(())
    }
}

impl AsFd for Pidfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// When the process began, in clock ticks since boot: with its number and [`boot_id`] its identity. `None` when it is gone.
#[must_use]
pub fn start_ticks(pid: u32) -> Option<u64> {
    start_ticks_of(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Field 22; the second field is the program's name in brackets and may hold anything.
fn start_ticks_of(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The process if it is still the one that began then.
#[must_use]
pub fn same_process(pid: u32, ticks: u64) -> Option<Pidfd> {
    // Opened first: if it is still the one afterwards, then the descriptor is its.
    let pidfd = Pidfd::open(pid).ok()?;
    (pid != 0 && ticks != 0 && start_ticks(pid) == Some(ticks)).then_some(pidfd)
}

/// The identity of this boot of the machine; empty when procfs does not say.
#[must_use]
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_may_have_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 1";
        assert_eq!(start_ticks_of(stat), Some(4242));
        assert_eq!(start_ticks_of("7 (x"), None);
        assert_eq!(start_ticks_of(""), None);
    }

    #[test]
    fn a_process_is_known_by_its_start() {
        let me = std::process::id();
        let ticks = start_ticks(me).expect("procfs is mounted");
        assert!(same_process(me, ticks).is_some());
        assert!(same_process(me, ticks + 1).is_none());
        assert!(same_process(0, 0).is_none());
    }
}
