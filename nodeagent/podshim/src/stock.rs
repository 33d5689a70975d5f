//! What a spare supervisor lays in while nobody waits: parts of a sandbox and of containers that are the same for every pod.
//!
//! All of it hangs on descriptors of this process and is mounted nowhere, so it goes with the process. What a pod does not need, it does
//! without: the first sandbox takes what fits it, the rest is closed.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};

use minipod_podshim::call::SHARED_MEMORY;
use minipod_podshim::cgroup::Cgroups;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, chroot, fchdir};

use crate::child::report::Failure;
use crate::child::{memory, rootfs};
use crate::sys::Tree;

/// So many containers get their `/dev` from the stock: an init container and an app with two helpers.
const DEVS: usize = 4;
/// The namespaces of a sandbox, with their names in /proc. The mount namespace is the last: from there /proc is not seen.
const KINDS: [(CloneFlags, &str); 4] = [
    (CloneFlags::CLONE_NEWNET, "/proc/self/ns/net"),
    (CloneFlags::CLONE_NEWUTS, "/proc/self/ns/uts"),
    (CloneFlags::CLONE_NEWIPC, "/proc/self/ns/ipc"),
    (CloneFlags::CLONE_NEWNS, "/proc/self/ns/mnt"),
];
/// Where things are put together within a mount namespace that nobody else sees: any directory that is there will do.
const WORKBENCH: &str = "/proc";

/// The stock. Empty by default: everything is made when it is needed.
#[derive(Debug, Default)]
pub struct Stock {
    /// What is mounted on this machine.
    pub cgroups: Option<Cgroups>,
    /// For the first sandbox.
    pub namespaces: Option<Namespaces>,
    /// For containers whose users are the node's.
    pub devs: Vec<Tree>,
}

/// Namespaces of a sandbox that nobody is in.
#[derive(Debug)]
pub struct Namespaces(Vec<(CloneFlags, OwnedFd)>);

impl Namespaces {
    /// Those among `kinds`; that of the shared memory only if it has these options.
    pub fn of(self, kinds: CloneFlags, shared_memory: &str) -> Vec<(CloneFlags, OwnedFd)> {
        let fits = |kind: CloneFlags| kind != CloneFlags::CLONE_NEWNS || shared_memory == SHARED_MEMORY;
        self.0.into_iter().filter(|(kind, _)| kinds.contains(*kind) && fits(*kind)).collect()
    }
}

impl Stock {
    /// Lays in all there is. A part that cannot be made is told on stderr and left out: the pod's own start says what is wrong.
    ///
    /// # Errors
    /// When this process does not find back to where it was, and is of no use any more.
    pub fn lay_in() -> Result<Self, String> {
        let mut stock = Self { cgroups: Cgroups::detect().ok(), ..Self::default() };
        let way_back = WayBack::remember().map_err(|error| format!("open the own namespaces: {error}"))?;
        if let Err(error) = stock.make() {
            eprintln!("a spare supervisor has less in stock: {error}");
        }
        way_back.go().map_err(|errno| format!("return to the own namespaces: {errno}"))?;
        Ok(stock)
    }

    /// Leaves this process in other namespaces, at an end of its work or at the first failure.
    fn make(&mut self) -> Result<(), String> {
        let text = |Failure(refused): Failure| {
            format!("{} {}: {}", refused.step, refused.object, Errno::from_raw(refused.errno))
        };
        unshare(KINDS.iter().map(|(kind, _)| *kind).collect()).map_err(|errno| format!("make namespaces: {errno}"))?;
        let namespaces = opened().map_err(|error| format!("open the new namespaces: {error}"))?;
        rootfs::part_from_node().map_err(text)?;
        for _ in 0..DEVS {
            let dev = rootfs::spare_dev(rootfs::open_dir(WORKBENCH).map_err(text)?).map_err(text)?;
            umount2(WORKBENCH, MntFlags::MNT_DETACH).map_err(|errno| format!("clear {WORKBENCH}: {errno}"))?;
            self.devs.push(dev);
        }
        let memory = memory::make(SHARED_MEMORY).map_err(text)?;
        memory::hold(&memory).map_err(text)?;
        self.namespaces = Some(Namespaces(namespaces));
        Ok(())
    }
}

fn opened() -> std::io::Result<Vec<(CloneFlags, OwnedFd)>> {
    KINDS.iter().map(|(kind, path)| Ok((*kind, File::open(path)?.into()))).collect()
}

/// Where this process was.
struct WayBack {
    namespaces: Vec<(CloneFlags, OwnedFd)>,
    root: OwnedFd,
}

impl WayBack {
    fn remember() -> std::io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        Ok(Self { namespaces: opened()?, root: open("/", flags, Mode::empty())? })
    }

    fn go(self) -> nix::Result<()> {
        for (kind, namespace) in &self.namespaces {
            setns(namespace.as_fd(), *kind)?;
        }
        // A mount namespace is entered at its root, and this process may have been started below another one.
        fchdir(&self.root)?;
        chroot(".")?;
        chdir("/")
    }
}
