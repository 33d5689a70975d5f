//! What a spare supervisor lays in while nobody waits: parts of a sandbox and of containers that are the same for every pod.
//!
//! All of it hangs on descriptors of this process and is mounted nowhere, so it goes with the process. What a pod does not need, it does
//! without: the first sandbox takes what fits it, the rest is closed.

use std::fs::File;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

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
/// Namespaces that all processes of a sandbox are in, and where a process finds its own.
const COMMON: [(CloneFlags, &str); 3] = [
    (CloneFlags::CLONE_NEWNET, "/proc/self/ns/net"),
    (CloneFlags::CLONE_NEWUTS, "/proc/self/ns/uts"),
    (CloneFlags::CLONE_NEWIPC, "/proc/self/ns/ipc"),
];
const MOUNTS: &str = "/proc/self/ns/mnt";
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

/// Namespaces of a sandbox that nobody is in. Empty by default.
#[derive(Debug, Default)]
pub struct Namespaces {
    /// Network, names and IPC, each with its kind.
    pub common: Vec<(CloneFlags, OwnedFd)>,
    /// The mount namespace that has the shared memory and nothing else.
    pub memory: Option<OwnedFd>,
}

impl Namespaces {
    /// Only those among `kinds`, and the memory only if it shall have these options.
    pub fn fit_for(self, kinds: CloneFlags, shared_memory: &str) -> Self {
        let common = self.common.into_iter().filter(|(kind, _)| kinds.contains(*kind)).collect();
        Self { common, memory: self.memory.filter(|_| shared_memory == SHARED_MEMORY) }
    }

    /// The network's.
    pub fn network(&self) -> Option<BorrowedFd<'_>> {
        let network = self.common.iter().find(|(kind, _)| *kind == CloneFlags::CLONE_NEWNET);
        network.map(|(_, namespace)| namespace.as_fd())
    }
}

/// Enters namespaces, runs `make` and goes back to this process' own. It ends where that fails: whatever it made from then on would be in
/// the wrong place.
///
/// # Errors
/// When one cannot be entered; this process is where it was.
pub fn within<T>(namespaces: &[(CloneFlags, OwnedFd)], make: impl FnOnce() -> T) -> std::io::Result<T> {
    let own = |kind: CloneFlags| COMMON.iter().find(|(known, _)| *known == kind).map(|(_, path)| File::open(path));
    let way_back = namespaces.iter().filter_map(|(kind, _)| Some(own(*kind)?.map(|own| (*kind, own))));
    let way_back = way_back.collect::<std::io::Result<Vec<_>>>()?;
    let entered = namespaces.iter().try_for_each(|(kind, namespace)| setns(namespace.as_fd(), *kind));
    let made = entered.map(|()| make());
    for (kind, own) in &way_back {
        if let Err(errno) = setns(own.as_fd(), *kind) {
            eprintln!("return to the own namespaces: {errno}");
            std::process::abort();
        }
    }
    Ok(made?)
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

    /// Leaves this process in other namespaces, at the end of its work or at the first failure.
    fn make(&mut self) -> Result<(), String> {
        let text = |Failure(refused): Failure| {
            format!("{} {}: {}", refused.step, refused.object, Errno::from_raw(refused.errno))
        };
        let kinds: CloneFlags = COMMON.iter().map(|(kind, _)| *kind).collect();
        unshare(kinds | CloneFlags::CLONE_NEWNS).map_err(|errno| format!("make namespaces: {errno}"))?;
        // The mount namespace as well, while there is a /proc in it.
        let (common, memory) = opened().map_err(|error| format!("open the new namespaces: {error}"))?;
        rootfs::part_from_node().map_err(text)?;
        for _ in 0..DEVS {
            let dev = rootfs::spare_dev(rootfs::open_dir(WORKBENCH).map_err(text)?).map_err(text)?;
            umount2(WORKBENCH, MntFlags::MNT_DETACH).map_err(|errno| format!("clear {WORKBENCH}: {errno}"))?;
            self.devs.push(dev);
        }
        let tree = memory::make(SHARED_MEMORY).map_err(text)?;
        memory::hold(&tree).map_err(text)?;
        self.namespaces = Some(Namespaces { common, memory: Some(memory) });
        Ok(())
    }
}

/// This process' own namespaces: those that a sandbox has in common, and that of mounts.
fn opened() -> std::io::Result<(Vec<(CloneFlags, OwnedFd)>, OwnedFd)> {
    let common = COMMON.iter().map(|(kind, path)| Ok((*kind, File::open(path)?.into())));
    Ok((common.collect::<std::io::Result<_>>()?, File::open(MOUNTS)?.into()))
}

/// Where this process was.
struct WayBack {
    common: Vec<(CloneFlags, OwnedFd)>,
    mounts: OwnedFd,
    root: OwnedFd,
}

impl WayBack {
    fn remember() -> std::io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let (common, mounts) = opened()?;
        Ok(Self { common, mounts, root: open("/", flags, Mode::empty())? })
    }

    fn go(self) -> nix::Result<()> {
        setns(&self.mounts, CloneFlags::CLONE_NEWNS)?;
        for (kind, namespace) in &self.common {
            setns(namespace, *kind)?;
        }
        // A mount namespace is entered at its root, and this process may have been started below another one.
        fchdir(&self.root)?;
        chroot(".")?;
        chdir("/")
    }
}
