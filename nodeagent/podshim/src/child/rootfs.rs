//! The container's view of files. Everything is attached by descriptor: paths of the image are resolved by the kernel within
//! the root (`RESOLVE_IN_ROOT`), once, and what was resolved is what is mounted on.
//!
//! No mount of a container lets devices be opened but the single files that /dev is made of, so that a container that may
//! make device files gains nothing by it, with or without a devices cgroup. The spec of a privileged one says otherwise.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::{CStr, CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use libc::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY};
use minipod_podshim::protocol::{ContainerSpec, Mount, MountKind, Propagation, Rootfs};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, open, openat, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, major, minor, mkdirat, umask};
use nix::unistd::{chdir, chroot, fchdir, pivot_root, symlinkat};

use super::report::{Context as _, Failure, Step, c_text};
use super::users::{Users, on_node};
use crate::sys::{self, Tree};

/// mount(2) takes one page of options, the closing zero included.
const MAX_OPTIONS_BYTES: usize = 4095;
/// The device files of every container, with their numbers.
const DEVICES: [(&CStr, u64, u64); 6] =
    [(c"null", 1, 3), (c"zero", 1, 5), (c"full", 1, 7), (c"random", 1, 8), (c"urandom", 1, 9), (c"tty", 5, 0)];
const DEV_LINKS: [(&str, &str); 6] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
    ("/proc/kcore", "core"),
];
/// The group `tty`, which owns terminals so that its members can write to them.
const TERMINALS_GROUP: u32 = 5;
const NOTHING_SPECIAL: u64 = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;

/// What mounts of a container need beside their spec.
#[derive(Debug)]
pub struct Around<'a> {
    /// Its groups by controller.
    pub cgroups: &'a [(String, PathBuf)],
    /// What the sandbox shares.
    pub memory: Option<Tree>,
    /// The pod's users, if they are not the node's.
    pub users: Option<&'a Users<'a>>,
    /// A `/dev` that was made before; for one mount.
    pub dev: RefCell<Option<Tree>>,
}

/// Makes the container's root from its spec and enters it; the node's files are out of reach afterwards. With users of the pod's own this
/// process goes on as their root where it touches files.
pub fn enter(spec: &ContainerSpec, around: &Around<'_>) -> Step<()> {
    let users = around.users;
    let missing = || Failure::container("read", "root", Errno::EINVAL).because("the spec has no root file system");
    let root_spec = spec.root.as_ref().ok_or_else(missing)?;
    // Before the namespace's mounts part from the node's: a shared source stays shared.
    let sources = spec.mounts.iter().map(|mount| open_source(mount, users)).collect::<Step<Vec<Option<Tree>>>>()?;
    part_from_node()?;
    if let Some(users) = users {
        idmap_layers(root_spec, users)?;
        users.act_as_root()?;
    }
    let root = mount_root(root_spec, users)?;
    for (mount, source) in spec.mounts.iter().zip(sources) {
        attach_mount(&root, mount, source, around)?;
    }
    for path in &spec.readonly_paths {
        make_readonly(&root, path)?;
    }
    mask(&root, &spec.masked_paths)?;
    if root_spec.readonly {
        sys::set_attributes(&root, false, MOUNT_ATTR_RDONLY, 0).node("make read-only", &root_spec.target)?;
    }
    change_root(&root)
}

/// Lets this namespace's mounts and the node's go their own ways.
pub fn part_from_node() -> Step<()> {
    let all = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, all, None::<&str>).node("make mounts private", "/")
}

/// Makes a mount the root and all that there is; this process is in it then.
pub fn change_root(root: &OwnedFd) -> Step<()> {
    fchdir(root).node("enter", "the new root")?;
    match pivot_root(".", ".") {
        // The old root lies over the new one now.
        Ok(()) => umount2(".", MntFlags::MNT_DETACH).node("unmount", "the node's root")?,
        // An initramfs cannot be pivoted: the new root is moved over it.
        Err(Errno::EINVAL) => {
            mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).node("move", "the new root")?;
            chroot(".").node("change root to", "the new root")?;
        }
        Err(errno) => return Err(Failure::node("pivot to", "the new root", errno)),
    }
    chdir("/").node("enter", "/")
}

// -------------------------------------------------------------------------------------------------------- the root

/// The directory that is the root as it is, without an overlay.
fn plain_root(root: &Rootfs) -> Option<&String> {
    match (root.lowers.as_slice(), root.upper.as_str()) {
        ([only], "") => Some(only),
        _ => None,
    }
}

/// Lays mounts with the pod's ids over an overlay's layers, where the overlay finds them under their names. They go with the node's root.
/// overlayfs itself has no such mounts.
fn idmap_layers(root: &Rootfs, users: &Users<'_>) -> Step<()> {
    if plain_root(root).is_some() {
        return Ok(());
    }
    let mut dirs: BTreeSet<&Path> = root.lowers.iter().map(Path::new).collect();
    if !root.upper.is_empty() {
        // One mount has both, as overlayfs wants it.
        let (of_upper, of_work) = (Path::new(&root.upper).parent(), Path::new(&root.work).parent());
        let apart = || Failure::node("use", &root.work, Errno::EINVAL).because("it is not beside the upper directory");
        dirs.insert(of_upper.filter(|dir| of_work == Some(*dir)).ok_or_else(apart)?);
    }
    for dir in dirs {
        let text = dir.to_string_lossy();
        let tree = sys::open_tree(AT_FDCWD, &c_text("root", &text)?, false).node("open layer", dir)?;
        users.idmap(&tree, false, dir)?;
        sys::attach(tree, open_dir(&text)?).node("mount on", dir)?;
    }
    Ok(())
}

fn mount_root(root: &Rootfs, users: Option<&Users<'_>>) -> Step<OwnedFd> {
    if root.lowers.is_empty() {
        return Err(Failure::container("read", "root", Errno::EINVAL).because("the image has no layers"));
    }
    let tree = match plain_root(root) {
        Some(only) => {
            let path = c_text("root.lowers", only)?;
            let tree = sys::open_tree(AT_FDCWD, &path, true).node("open root directory", only)?;
            if let Some(users) = users {
                users.idmap(&tree, true, only)?;
            }
            let flags = if root.devices { 0 } else { MOUNT_ATTR_NODEV };
            sys::set_attributes(&tree, true, flags, libc::MS_PRIVATE).node("seal", only)?;
            Some(tree)
        }
        None => {
            let too_old = |failure: Failure| match failure.0.errno {
                libc::EINVAL if users.is_some() => {
                    failure.because("overlayfs takes layers with the pod's user ids from Linux 5.19 on")
                }
                _ => failure,
            };
            mount_overlay(root).map_err(too_old)?;
            None
        }
    };
    if let Some(tree) = tree {
        let target = open_dir(&root.target)?;
        sys::attach(tree, target).node("mount root directory on", &root.target)?;
    }
    open_dir(&root.target)
}

/// A handle on a directory.
pub fn open_dir(path: &str) -> Step<OwnedFd> {
    open(path, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty()).node("open", path)
}

fn mount_overlay(root: &Rootfs) -> Step<()> {
    // A volatile upper that was mounted before, by a start that failed later, says so here and would be refused.
    let marker = Path::new(&root.work).join("work/incompat");
    match std::fs::remove_dir_all(&marker) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).node("remove", &marker),
        _ => {}
    }
    let (dir, options) = overlay_options(root)?;
    if let Some(dir) = &dir {
        chdir(dir).node("enter", dir)?;
    }
    let flags = if root.devices { MsFlags::empty() } else { MsFlags::MS_NODEV };
    let with = |options: &str| mount(Some("overlay"), root.target.as_str(), Some("overlay"), flags, Some(options));
    let mut result = Err(Errno::EINVAL);
    if !root.upper.is_empty() {
        // What a container wrote is discarded after a crash of the machine, so nothing of it need be synced.
        result = with(&format!("{options},volatile"));
    }
    if result == Err(Errno::EINVAL) {
        result = with(&options);
    }
    result.node("mount overlay", &root.target)
}

/// overlay's options, and the directory that they are relative to when they would be too long otherwise.
fn overlay_options(root: &Rootfs) -> Step<(Option<PathBuf>, String)> {
    let full = options_relative_to(root, None);
    if full.len() + ",volatile".len() <= MAX_OPTIONS_BYTES {
        return Ok((None, full));
    }
    let common = common_dir(&root.lowers);
    let short = options_relative_to(root, Some(&common));
    if short.len() + ",volatile".len() > MAX_OPTIONS_BYTES {
        let text = format!("{} layers need {} bytes of mount options", root.lowers.len(), short.len());
        return Err(Failure::container("mount overlay", &root.target, Errno::E2BIG).because(&text));
    }
    Ok((Some(common), short))
}

fn options_relative_to(root: &Rootfs, dir: Option<&Path>) -> String {
    let name = |path: &String| {
        let path = Path::new(path);
        let relative = dir.and_then(|dir| path.strip_prefix(dir).ok()).unwrap_or(path);
        let text = relative.to_string_lossy();
        // overlayfs' own separators.
        text.replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,")
    };
    let lowers: Vec<String> = root.lowers.iter().map(name).collect();
    let mut options = format!("lowerdir={}", lowers.join(":"));
    if !root.upper.is_empty() {
        options.push_str(&format!(",upperdir={},workdir={}", name(&root.upper), name(&root.work)));
    }
    options
}

fn common_dir(paths: &[String]) -> PathBuf {
    let mut paths = paths.iter().map(|path| Path::new(path).parent().unwrap_or(Path::new("/")));
    let mut common = paths.next().unwrap_or(Path::new("/")).to_owned();
    for path in paths {
        common = common.components().zip(path.components()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect();
    }
    common
}

// ------------------------------------------------------------------------------------------------- within the root

/// Opens what a path of the container means, links resolved within its root.
fn find(root: impl AsFd, path: &Path) -> Result<OwnedFd, Errno> {
    resolve(root, path, ResolveFlag::RESOLVE_IN_ROOT)
}

fn resolve(root: impl AsFd, path: &Path, within: ResolveFlag) -> Result<OwnedFd, Errno> {
    let how =
        OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(within | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    loop {
        match openat2(&root, path, how) {
            // The kernel lost a race against a rename elsewhere.
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// The same, and makes what is missing: directories, and at the end a directory or an empty file.
fn find_or_make(root: &OwnedFd, path: &str, is_dir: bool) -> Step<OwnedFd> {
    let wrong = |errno| Failure::container("make mount point", path, errno);
    if !path.starts_with('/') {
        return Err(wrong(Errno::EINVAL).because("it must be absolute"));
    }
    let missing = Missing { dir_mode: 0o755, ends_in_dir: is_dir };
    make_way(root, Path::new(path), ResolveFlag::RESOLVE_IN_ROOT, missing).map_err(wrong)
}

/// How what is missing of a path is made.
#[derive(Clone, Copy)]
struct Missing {
    dir_mode: u32,
    /// Else the last one is an empty file.
    ends_in_dir: bool,
}

/// Opens what a path below `root` means and makes what is missing of it. Names are resolved by the kernel from `root` each
/// time, and made in the directory that was resolved: exchanging a directory for a link meanwhile gains nothing.
fn make_way(root: &OwnedFd, path: &Path, within: ResolveFlag, missing: Missing) -> Result<OwnedFd, Errno> {
    let names: Vec<&OsStr> = path
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let whole: PathBuf = names.iter().collect();
    match resolve(root, &whole, within) {
        Err(Errno::ENOENT) => {}
        result => return result,
    }
    let mut so_far = PathBuf::new();
    let mut here = resolve(root, Path::new("."), within)?;
    for (at, name) in names.iter().enumerate() {
        so_far.push(name);
        here = match resolve(root, &so_far, within) {
            Err(Errno::ENOENT) => {
                if missing.ends_in_dir || at + 1 < names.len() {
                    // EEXIST: a link that leads nowhere.
                    let before = umask(Mode::empty());
                    let made = mkdirat(&here, *name, Mode::from_bits_truncate(missing.dir_mode));
                    umask(before);
                    made?;
                } else {
                    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                    openat(&here, *name, flags, Mode::from_bits_truncate(0o644))?;
                }
                resolve(root, &so_far, within)?
            }
            result => result?,
        };
    }
    Ok(here)
}

/// Makes the working directory if it is missing. Within the root already.
pub fn make_cwd(path: &str) -> Step<()> {
    std::fs::create_dir_all(path).container("make the working directory", path)
}

fn kind_of(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

fn is_dir(fd: impl AsFd) -> Result<bool, Errno> {
    Ok(kind_of(&fstat(fd)?) == SFlag::S_IFDIR)
}

// ----------------------------------------------------------------------------------------------------------- mounts

fn open_source(mount: &Mount, users: Option<&Users<'_>>) -> Step<Option<Tree>> {
    if mount.kind() != MountKind::Bind {
        return Ok(None);
    }
    let tree = if mount.sub_path.is_empty() {
        let path = c_text("mounts.source", &mount.source)?;
        sys::open_tree(AT_FDCWD, &path, mount.recursive).node("open mount source", &mount.source)?
    } else {
        open_sub_path(mount, users)?
    };
    if let Some(users) = users.filter(|_| mount.idmapped) {
        users.idmap(&tree, mount.recursive, &mount.source)?;
    }
    Ok(Some(tree))
}

/// A part of a volume. Other containers may write to the volume at the same time, so nothing is looked up by path twice
/// (CVE-2017-1002101, CVE-2021-25741).
fn open_sub_path(mount: &Mount, users: Option<&Users<'_>>) -> Step<Tree> {
    let path = Path::new(&mount.sub_path);
    let wrong = |errno| {
        let failure = Failure::container("open subPath", &mount.sub_path, errno);
        if errno == Errno::EXDEV { failure.because("it leads out of the volume") } else { failure }
    };
    if path.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(wrong(Errno::EINVAL).because("it must be relative and without \"..\""));
    }
    let volume = open_dir(&mount.source)?;
    let dir_mode = fstat(&volume).node("look at", &mount.source)?.st_mode & 0o7777;
    let missing = Missing { dir_mode, ends_in_dir: true };
    // What is made belongs to root, by the ids that the volume has.
    let owner = users.filter(|_| !mount.idmapped).map_or(0, |users| users.range.first);
    let act_as = |id: u32| sys::act_as(id).node("make files as the user", id.to_string());
    if owner != 0 {
        act_as(owner)?;
    }
    let place = make_way(&volume, path, ResolveFlag::RESOLVE_BENEATH, missing).map_err(wrong)?;
    if owner != 0 {
        act_as(0)?;
    }
    sys::open_tree(place.as_fd(), c"", mount.recursive).map_err(wrong)
}

fn attributes(mount: &Mount) -> u64 {
    let flag = |on: bool, flag: u64| if on { flag } else { 0 };
    flag(mount.readonly, MOUNT_ATTR_RDONLY)
        | flag(mount.nosuid, MOUNT_ATTR_NOSUID)
        | flag(mount.noexec, MOUNT_ATTR_NOEXEC)
        | flag(!mount.devices, MOUNT_ATTR_NODEV)
}

fn attach_mount(root: &OwnedFd, mount: &Mount, source: Option<Tree>, around: &Around<'_>) -> Step<()> {
    let target = mount.target.as_str();
    let readonly = if mount.readonly { MOUNT_ATTR_RDONLY } else { 0 };
    let tree = match (mount.kind(), source) {
        (MountKind::Bind, Some(tree)) => {
            let propagation = match mount.propagation() {
                Propagation::None => libc::MS_PRIVATE,
                Propagation::HostToContainer => libc::MS_SLAVE,
                Propagation::Bidirectional => 0,
            };
            let (all, top) = match attributes(mount) {
                flags if mount.shallow_readonly => (flags & !MOUNT_ATTR_RDONLY, flags & MOUNT_ATTR_RDONLY),
                flags => (flags, 0),
            };
            sys::set_attributes(&tree, mount.recursive, all, propagation)
                .and_then(|()| sys::set_attributes(&tree, false, top, 0))
                .node("set flags of", &mount.source)?;
            let place = find_or_make(root, target, is_dir(&tree).node("look at", &mount.source)?)?;
            return sys::attach(tree, place).node("mount on", target);
        }
        (MountKind::Bind, None) => return Err(Failure::node("open mount source", &mount.source, Errno::EBADF)),
        (MountKind::Tmpfs, _) => {
            let options = file_system_options(&mount.options)?;
            sys::new_mount(c"tmpfs", &options, attributes(mount)).container("make tmpfs for", target)?
        }
        (MountKind::Proc, _) => {
            sys::new_mount(c"proc", &[], NOTHING_SPECIAL | readonly).node("make procfs for", target)?
        }
        (MountKind::Sysfs, _) => {
            sys::new_mount(c"sysfs", &[], NOTHING_SPECIAL | readonly).node("make sysfs for", target)?
        }
        (MountKind::Mqueue, _) => {
            sys::new_mount(c"mqueue", &[], NOTHING_SPECIAL | readonly).node("make mqueue for", target)?
        }
        (MountKind::SharedMemory, _) => {
            let missing =
                || Failure::container("mount", "shared memory", Errno::ENOENT).because("the sandbox has none");
            let memory = around.memory.as_ref().ok_or_else(missing)?;
            sys::set_attributes(memory, false, attributes(mount), 0).node("set flags of", "shared memory")?;
            let place = find_or_make(root, target, true)?;
            return sys::attach(memory, place).node("mount on", target);
        }
        (MountKind::Cgroup, _) => return attach_cgroups(root, target, readonly, around.cgroups),
        (MountKind::Dev, _) => {
            let place = find_or_make(root, target, true)?;
            if !mount.devices
                && let Some(dev) = around.dev.take()
            {
                return sys::attach(dev, place).node("mount on", target);
            }
            let terminals = on_node(around.users.map(|users| &users.range), TERMINALS_GROUP)?;
            let dev = make_dev(place, terminals)?;
            return if mount.devices { attach_node_devices(&dev) } else { Ok(()) };
        }
    };
    let place = find_or_make(root, target, true)?;
    sys::attach(tree, place).node("mount on", target)
}

/// `a=b,c` as pairs.
pub fn file_system_options(text: &str) -> Step<Vec<(CString, Option<CString>)>> {
    let parts = text.split(',').filter(|part| !part.is_empty());
    parts
        .map(|part| match part.split_once('=') {
            Some((key, value)) => Ok((c_text("mounts.options", key)?, Some(c_text("mounts.options", value)?))),
            None => Ok((c_text("mounts.options", part)?, None)),
        })
        .collect()
}

/// The container's own groups: version 2 the group itself, version 1 a directory of them.
fn attach_cgroups(root: &OwnedFd, target: &str, readonly: u64, cgroups: &[(String, PathBuf)]) -> Step<()> {
    let view = |dir: &Path| {
        let path = c_text("cgroup", &dir.to_string_lossy())?;
        let tree = sys::open_tree(AT_FDCWD, &path, false).node("open cgroup", dir)?;
        sys::set_attributes(&tree, false, NOTHING_SPECIAL | readonly, libc::MS_PRIVATE).node("seal", dir)?;
        Step::Ok(tree)
    };
    let place = find_or_make(root, target, true)?;
    if let [(name, dir)] = cgroups
        && name.is_empty()
    {
        return sys::attach(view(dir)?, place).node("mount on", target);
    }
    let options = file_system_options("mode=755,size=64k")?;
    let top = sys::new_mount(c"tmpfs", &options, NOTHING_SPECIAL).node("make tmpfs for", target)?;
    sys::attach(&top, place).node("mount on", target)?;
    for (name, dir) in cgroups {
        let place = find_or_make(root, &format!("{target}/{name}"), true)?;
        sys::attach(view(dir)?, place).node("mount on", target)?;
    }
    sys::set_attributes(&top, false, MOUNT_ATTR_RDONLY, 0).node("make read-only", target)
}

/// A `/dev` that can be laid into any container whose users are the node's. It is put together on `place`, in this process' mount namespace.
pub fn spare_dev(place: OwnedFd) -> Step<Tree> {
    let dev = make_dev(place, TERMINALS_GROUP)?;
    let tree = sys::open_tree(dev.as_fd(), c"", true).node("copy", "/dev")?;
    sys::set_attributes(&tree, true, 0, libc::MS_PRIVATE).node("seal", "/dev")?;
    Ok(tree)
}

/// Mounts a `/dev` on `place`; terminals belong to the group `terminals` of the node.
fn make_dev(place: OwnedFd, terminals: u32) -> Step<Tree> {
    let options = file_system_options("mode=755,size=64k")?;
    let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_NODEV;
    let dev = sys::new_mount(c"tmpfs", &options, attributes).node("make tmpfs for", "/dev")?;
    sys::attach(&dev, place).node("mount", "/dev")?;
    let node_dev = open_dir("/dev")?;
    for (name, major, minor) in DEVICES {
        let tree = open_device(node_dev.as_fd(), name, major, minor)?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let place = openat(&dev, name, flags, Mode::from_bits_truncate(0o666)).node("make in", "/dev")?;
        sys::attach(tree, place).node("mount device in", "/dev")?;
    }
    mkdirat(&dev, "pts", Mode::from_bits_truncate(0o755)).node("make", "/dev/pts")?;
    let options = file_system_options(&format!("newinstance,ptmxmode=0666,mode=0620,gid={terminals}"))?;
    let pts = sys::new_mount(c"devpts", &options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC).node("make", "/dev/pts")?;
    let place = openat(&dev, "pts", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).node("open", "/dev/pts")?;
    sys::attach(pts, place).node("mount on", "/dev/pts")?;
    for (to, name) in DEV_LINKS {
        symlinkat(to, &dev, name).node("make link in", "/dev")?;
    }
    Ok(dev)
}

/// All devices of the node that a fresh /dev does not have; terminals of others and the console stay where they are.
fn attach_node_devices(dev: &OwnedFd) -> Step<()> {
    let mut dirs = vec![PathBuf::new()];
    while let Some(dir) = dirs.pop() {
        let path = Path::new("/dev").join(&dir);
        for entry in std::fs::read_dir(&path).node("list", &path)? {
            let entry = entry.node("list", &path)?;
            let (name, kind) = (dir.join(entry.file_name()), entry.file_type().node("look at", entry.path())?);
            use std::os::unix::fs::FileTypeExt;
            if kind.is_dir() && !["pts", "shm", "mqueue", "fd"].iter().any(|apart| name == Path::new(apart)) {
                mkdirat(dev, &name, Mode::from_bits_truncate(0o755)).node("make", entry.path())?;
                dirs.push(name);
            } else if (kind.is_char_device() || kind.is_block_device()) && name != Path::new("console") {
                attach_node_device(dev, &name)?;
            }
        }
    }
    Ok(())
}

fn attach_node_device(dev: &OwnedFd, name: &Path) -> Step<()> {
    let object = Path::new("/dev").join(name);
    let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let place = match openat(dev, name, flags, Mode::from_bits_truncate(0o600)) {
        // One that every container has.
        Err(Errno::EEXIST) => return Ok(()),
        result => result.node("make", &object)?,
    };
    let path = c_text("device", &object.to_string_lossy())?;
    match sys::open_tree(AT_FDCWD, &path, false) {
        // It went between the list and now, as devices do.
        Err(Errno::ENOENT) => Ok(()),
        tree => tree.and_then(|tree| sys::attach(tree, place)).node("mount device", &object),
    }
}

/// A device file of the node, if it is what it is called.
fn open_device(dev: BorrowedFd<'_>, name: &CStr, want_major: u64, want_minor: u64) -> Step<Tree> {
    let object = Path::new("/dev").join(OsStr::from_bytes(name.to_bytes()));
    let tree = sys::open_tree(dev, name, false).node("open device", &object)?;
    let stat = fstat(&tree).node("look at", &object)?;
    let numbers = (major(stat.st_rdev), minor(stat.st_rdev));
    if kind_of(&stat) != SFlag::S_IFCHR || numbers != (want_major, want_minor) {
        let text = format!("it is not the character device {want_major}:{want_minor}");
        return Err(Failure::node("use", &object.to_string_lossy(), Errno::ENODEV).because(&text));
    }
    Ok(tree)
}

// -------------------------------------------------------------------------------------------- hidden and read-only

/// What a path of the list means, if it exists.
fn find_listed(root: &OwnedFd, path: &str) -> Step<Option<OwnedFd>> {
    match find(root, Path::new(path)) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        result => result.map(Some).container("look for", path),
    }
}

fn make_readonly(root: &OwnedFd, path: &str) -> Step<()> {
    let Some(place) = find_listed(root, path)? else { return Ok(()) };
    let tree = sys::open_tree(place.as_fd(), c"", true).node("open", path)?;
    sys::set_attributes(&tree, true, MOUNT_ATTR_RDONLY, 0).node("make read-only", path)?;
    sys::attach(tree, place).node("mount on", path)
}

/// One empty directory hides all directories, and the null device all files. Copies are made of the mount that is in its place already:
/// kernels before 6.15 copy none that is not attached yet.
fn mask(root: &OwnedFd, paths: &[String]) -> Step<()> {
    let (mut empty, mut null): (Option<Tree>, Option<Tree>) = (None, None);
    for path in paths {
        let Some(place) = find_listed(root, path)? else { continue };
        let is_dir = is_dir(&place).node("look at", path)?;
        let known = if is_dir { &mut empty } else { &mut null };
        let tree = match known {
            Some(mounted) => sys::open_tree(mounted.as_fd(), c"", false).node("copy mask for", path)?,
            None if is_dir => {
                let options = file_system_options("mode=755,size=4k,nr_inodes=1")?;
                sys::new_mount(c"tmpfs", &options, NOTHING_SPECIAL | MOUNT_ATTR_RDONLY).node("make mask for", path)?
            }
            None => open_device(open_dir("/dev")?.as_fd(), c"null", 1, 3)?,
        };
        sys::attach(&tree, place).node("mask", path)?;
        known.get_or_insert(tree);
    }
    Ok(())
}

/// The working directory lies within the root: a descriptor that leaked in from outside would show here.
pub fn check_cwd() -> Step<()> {
    let cwd = nix::unistd::getcwd().node("ask for", "the working directory")?;
    if cwd.as_os_str().as_bytes().starts_with(b"/") {
        return Ok(());
    }
    Err(Failure::node("stay in", "the container's root", Errno::EXDEV).because("the working directory is outside"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rootfs(lowers: &[&str], upper: &str) -> Rootfs {
        Rootfs {
            lowers: lowers.iter().map(|path| (*path).to_owned()).collect(),
            upper: upper.to_owned(),
            work: upper.replace("upper", "work"),
            ..Rootfs::default()
        }
    }

    #[test]
    fn overlay_options_are_escaped_and_shortened() {
        let (dir, options) = overlay_options(&rootfs(&["/l/b", "/l/a:,\\x"], "/c/upper")).expect("fit");
        assert_eq!(dir, None);
        assert_eq!(options, "lowerdir=/l/b:/l/a\\:\\,\\\\x,upperdir=/c/upper,workdir=/c/work");
        let (_, readonly) = overlay_options(&rootfs(&["/l/b", "/l/a"], "")).expect("fit");
        assert_eq!(readonly, "lowerdir=/l/b:/l/a");

        let many: Vec<String> = (0..50).map(|n| format!("/var/lib/{}/{n:064}/fs", "long".repeat(10))).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let (dir, options) = overlay_options(&rootfs(&many, "/c/upper")).expect("fit when relative");
        assert_eq!(dir, Some(PathBuf::from(format!("/var/lib/{}", "long".repeat(10)))));
        assert!(options.len() < MAX_OPTIONS_BYTES && options.starts_with("lowerdir=0000"));

        let too_many: Vec<String> = (0..200).map(|n| format!("/l/{n:064}/fs")).collect();
        let too_many: Vec<&str> = too_many.iter().map(String::as_str).collect();
        let failure = overlay_options(&rootfs(&too_many, "/c/upper")).expect_err("too long");
        assert!(failure.0.detail.contains("200 layers"));
    }

    #[test]
    fn options_are_pairs_or_flags() {
        let options = file_system_options("size=64k,newinstance,,mode=1777").expect("fine");
        let text = |option: &(CString, Option<CString>)| format!("{option:?}");
        assert_eq!(options.len(), 3);
        assert!(text(&options[0]).contains("64k") && text(&options[1]).contains("None"));
        assert!(file_system_options("a\0b").is_err());
    }
}
