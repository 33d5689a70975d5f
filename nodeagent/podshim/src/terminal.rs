//! Terminals: made in a container's own devpts, whose programs may be hostile.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use minipod_podshim::handover;
use minipod_podshim::protocol::Window;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::socket::MsgFlags;
use nix::sys::stat::{Mode, SFlag, fstat, major, minor};
use nix::sys::statfs::fstatfs;
use nix::unistd::{Uid, fchown};

use crate::child::report::{Context as _, Failure, Step};
use crate::sys;

/// `DEVPTS_SUPER_MAGIC` of the kernel's linux/magic.h.
const DEVPTS_MAGIC: i64 = 0x1cd1;
/// Device numbers of every `ptmx`.
const PTMX: (u64, u64) = (5, 2);

/// A terminal in the container of this process: the master, which does not block, and the side of the programs, owned by
/// `owner` as login would have it.
///
/// The path is resolved within the container's root, and what it leads to must be the multiplexer of a devpts: a container may
/// have put anything in its place.
pub fn open_in(pid: u32, owner: u32, window: Window) -> Step<(OwnedFd, OwnedFd)> {
    open_below(&format!("/proc/{pid}/root"), owner, window)
}

/// The same below any root; `/` is that of this process.
pub fn open_below(root: &str, owner: u32, window: Window) -> Step<(OwnedFd, OwnedFd)> {
    let path = "/dev/pts/ptmx";
    let root = open(root, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
    let root = root.node("open", "the container's root")?;
    let resolve = ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    let looked_at = openat2(&root, path, OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve));
    check_multiplexer(&looked_at.container("find", path)?)?;
    // Opened anew by name: a descriptor of O_PATH only becomes a master through /proc, which has no devpts beside it.
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let master = openat2(&root, path, OpenHow::new().flags(flags).resolve(resolve)).container("open", path)?;
    check_multiplexer(&master)?;
    sys::unlock_terminal(master.as_fd()).node("unlock", "a terminal")?;
    let terminal = sys::open_terminal_peer(master.as_fd()).node("open", "a terminal")?;
    fchown(&terminal, Some(Uid::from_raw(owner)), None).node("give away", "a terminal")?;
    resize(master.as_fd(), window).node("set the size of", "a terminal")?;
    Ok((master, terminal))
}

fn check_multiplexer(file: &OwnedFd) -> Step<()> {
    let about = fstat(file).node("look at", "/dev/pts/ptmx")?;
    let is_device = SFlag::from_bits_truncate(about.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFCHR;
    let kind = fstatfs(file).node("look at", "/dev/pts/ptmx")?.filesystem_type().0;
    if is_device && (major(about.st_rdev), minor(about.st_rdev)) == PTMX && kind == DEVPTS_MAGIC {
        return Ok(());
    }
    let failure = Failure::container("make a terminal", "/dev/pts/ptmx", Errno::ENODEV);
    Err(failure.because("the container has put something else in its place"))
}

/// Hands a terminal over to the process at the other end.
///
/// # Errors
/// The system's.
pub fn send(to: &UnixStream, terminal: &OwnedFd) -> std::io::Result<()> {
    Ok(handover::send(to, b"t", &[terminal.as_fd()])?)
}

/// Takes the terminal that was sent; does not wait for it.
///
/// # Errors
/// The system's; `InvalidData` when there is none.
pub fn receive(from: &UnixStream) -> std::io::Result<OwnedFd> {
    let (_, descriptors) = handover::receive(from, &mut [0], MsgFlags::MSG_DONTWAIT)?;
    descriptors.into_iter().next().ok_or_else(|| std::io::ErrorKind::InvalidData.into())
}

/// Tells a terminal its size. A size of 0 says that it is not known.
///
/// # Errors
/// The system's.
pub fn resize(terminal: BorrowedFd<'_>, window: Window) -> nix::Result<()> {
    let number = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    sys::set_terminal_size(terminal, number(window.rows), number(window.columns))
}
