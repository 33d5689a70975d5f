//! A pod with users of its own: its ids are others on the node.
//!
//! A container's files are prepared by the node's root, who may mount what he likes, but as the user who is root inside: what is made on
//! the way then belongs to the container's root. Entering the user namespace comes last. From there on the process has no rights
//! on the node.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use minipod_podshim::protocol::IdRange;
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{Uid, fchown, read};

use super::Stdio;
use super::report::{Context as _, Failure, Step};
use crate::sys;

/// The sandbox's user namespace.
#[derive(Debug, Clone, Copy)]
pub struct Users<'a> {
    /// The namespace.
    pub namespace: BorrowedFd<'a>,
    /// Its ids on the node.
    pub range: IdRange,
}

impl Users<'_> {
    /// Makes files as the namespace's root from now on.
    pub fn act_as_root(&self) -> Step<()> {
        sys::act_as(self.range.first).node("make files as the user", self.range.first.to_string())
    }

    /// Shows a mount that is not attached yet with the namespace's ids.
    pub fn idmap(&self, tree: impl AsFd, recursive: bool, object: impl AsRef<Path>) -> Step<()> {
        let unable = "its file system has no idmapped mounts: ext4, xfs and btrfs have them, tmpfs from Linux 6.3 on";
        sys::set_idmap(tree, recursive, self.namespace).map_err(|errno| {
            let failure = Failure::node("show the pod's user ids in", &object.as_ref().to_string_lossy(), errno);
            if errno == Errno::EINVAL { failure.because(unable) } else { failure }
        })
    }

    /// Becomes a process of the namespace, with all capabilities in it and none elsewhere.
    pub fn enter(&self) -> Step<()> {
        setns(self.namespace, CloneFlags::CLONE_NEWUSER).node("enter the pod's user namespace", "")?;
        // These two belong to the namespace, so that capabilities of the container count for them. What is mounted already is
        // locked by that: neither a mask nor a read-only mount can be taken off.
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP).node("make namespaces of the pod's users", "")
    }
}

/// What an id of a spec is on the node.
pub fn on_node(range: Option<&IdRange>, id: u32) -> Step<u32> {
    let Some(range) = range else { return Ok(id) };
    let beyond = format!("the pod's users have the ids 0 to {}", range.count.saturating_sub(1));
    range.outside(id).ok_or_else(|| Failure::container("use id", &id.to_string(), Errno::EINVAL).because(&beyond))
}

/// Lets the container's user open its streams anew, as `/dev/stdout` does: a pipe belongs to who made it. `owner` is an id of the
/// node.
pub fn give_streams(stdio: &Stdio, owner: u32) -> Step<()> {
    for stream in [&stdio.stdin, &stdio.stdout, &stdio.stderr] {
        let mode = fstat(stream).node("look at", "a stream")?.st_mode;
        if SFlag::from_bits_truncate(mode & SFlag::S_IFMT.bits()) == SFlag::S_IFIFO {
            fchown(stream, Some(Uid::from_raw(owner)), None).node("give away", "a stream")?;
        }
    }
    Ok(())
}

/// Waits until the supervisor has given this process' user namespace its ids.
pub fn wait_for_ids(gate: impl AsFd) -> Step<()> {
    let mut byte = [0];
    loop {
        match read(&gate, &mut byte) {
            Ok(1) => return Ok(()),
            Err(Errno::EINTR) => {}
            Ok(_) => return Err(Failure::node("wait for the pod's user ids", "", Errno::EPIPE)),
            Err(errno) => return Err(Failure::node("wait for the pod's user ids", "", errno)),
        }
    }
}
