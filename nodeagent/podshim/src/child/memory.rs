//! Memory that the containers of a pod share: a tmpfs that is mounted in the infra container's mount namespace and nowhere else on the
//! node. It goes with the last process that has it, and no other pod's namespace begins with a copy of it.
//!
//! A mount that hangs in no namespace would do from Linux 6.15 on; older kernels copy none of those.

use std::os::fd::{AsFd, BorrowedFd};

use libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MS_PRIVATE};
use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::Mode;

use super::report::{Context as _, Step};
use super::rootfs;
use crate::sys::{self, Tree};

/// Makes it; it is mounted nowhere yet.
pub fn make(options: &str) -> Step<Tree> {
    let options = rootfs::file_system_options(options)?;
    let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    sys::new_mount(c"tmpfs", &options, attributes).container("make", "shared memory")
}

/// Makes it all that the infra container's namespace has: of the node's mounts none is kept busy by that.
pub fn hold(memory: &Tree) -> Step<()> {
    rootfs::part_from_node()?;
    // Any directory that is there will do; what is below the root is gone in a moment.
    sys::attach(memory, rootfs::open_dir("/proc")?).node("mount", "shared memory")?;
    rootfs::change_root(memory)
}

/// A copy of the mount for a container. This process has a mount namespace of its own, and returns to its root directory.
pub fn of(pause: BorrowedFd<'_>) -> Step<Tree> {
    let path = "/proc/self/ns/mnt";
    let own = open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).node("open", path)?;
    let enter = |namespace: BorrowedFd<'_>| setns(namespace, CloneFlags::CLONE_NEWNS);
    enter(pause).node("enter the mount namespace of", "the infra container")?;
    let copy = sys::open_tree(AT_FDCWD, c"/", false);
    enter(own.as_fd()).node("return to", "the own mount namespace")?;
    let copy = copy.node("copy", "shared memory")?;
    sys::set_attributes(&copy, false, 0, MS_PRIVATE).node("seal", "shared memory")?;
    Ok(copy)
}
