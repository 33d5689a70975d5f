//! Where a user's path begins, and how paths below an open directory are opened.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;
use nix::sys::statfs::fstatfs;

/// File systems (their magic numbers in linux/magic.h) whose files are doors of the kernel: to read or write one may do anything.
const PSEUDO: [i64; 12] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x27_e0eb,   // cgroup
    0x6367_7270, // cgroup2
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0xcafe_4a11, // bpf
    0x1cd1,      // devpts
    0x6265_6570, // configfs
    0xde5e_81e4, // efivarfs
    0x1980_0202, // mqueue
];

/// The view in which a user's own path is meant.
#[derive(Debug)]
pub enum Base {
    /// This process': links lead wherever they lead.
    Process,
    /// A container's root: links and `..` lead about in it and never out.
    Root(OwnedFd),
}

impl Base {
    /// Opens what a path of the user's leads to, as a place and not for reading.
    pub(crate) fn open(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let flags = OFlag::O_PATH | OFlag::O_CLOEXEC;
        let Self::Root(root) = self else { return Ok(open(path, flags, Mode::empty())?) };
        let how =
            OpenHow::new().flags(flags).resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        retried(|| openat2(root, path, how))
    }
}

/// Opens a relative path below a directory; no part of it may be a link, and the last one is not followed.
pub(crate) fn open_below(dir: BorrowedFd<'_>, path: &[u8], flags: OFlag) -> io::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let path = if path.is_empty() { b"." } else { path };
    retried(|| openat2(dir, path, how))
}

/// The kernel gives up when names are exchanged while it looks: again, but not for ever, because a container may do that all day.
fn retried(mut open: impl FnMut() -> nix::Result<OwnedFd>) -> io::Result<OwnedFd> {
    let mut tries = 0;
    loop {
        match open() {
            Err(Errno::EAGAIN | Errno::EINTR) if tries < 1000 => tries += 1,
            result => return Ok(result?),
        }
    }
}

/// Whether a file belongs to the kernel.
pub(crate) fn is_pseudo(file: impl AsFd) -> io::Result<bool> {
    let kind = fstatfs(file)?.filesystem_type().0;
    Ok(PSEUDO.contains(&kind))
}
