//! The pod's volumes on disk: emptyDir, on the node's disk or in memory, those made of values ([`crate::projection`]), and
//! the node's own paths, which are looked at here and mounted from where they are.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use minipod_podshim::protocol::IdRange;
use minipod_proto::quantity::Quantity;
use minipod_proto::v1::{HostPathVolumeSource, Pod, Volume};
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;

use crate::container::env::EnvFacts;
use crate::container::spec::pod_level;
use crate::paths::PodPaths;
use crate::projection::{self, Owner, ProjectionError};

/// A volume could not be made, or what a pod left could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A kind that this agent does not carry out.
    #[error("volume {0:?} is of a kind that this agent does not support")]
    Unsupported(String),
    /// A value that is not there, or not yet.
    #[error("volume {volume:?}")]
    Projection {
        /// Its name.
        volume: String,
        /// What is missing.
        #[source]
        source: ProjectionError,
    },
    /// A hostPath that is not what its type says.
    #[error("volume {volume:?}: hostPath type check failed: {} is not {wanted}", path.display())]
    HostPath {
        /// Its name.
        volume: String,
        /// The node's path.
        path: PathBuf,
        /// What its type asks for.
        wanted: &'static str,
    },
    /// A file operation.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Removing would reach into something that is mounted there.
    #[error("{} is still a mount point: not removing the pod's files", .0.display())]
    StillMounted(PathBuf),
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VolumeError {
    let path = path.to_owned();
    move |source| VolumeError::Io { operation, path, source }
}

/// What volumes are made with.
#[derive(Debug, Clone, Copy)]
pub struct Around<'a> {
    /// What their files are made of.
    pub facts: &'a EnvFacts,
    /// Held while files are written.
    pub writing: &'a Mutex<()>,
    /// The layers of volumes that show an image, the topmost first.
    pub images: &'a BTreeMap<String, Vec<PathBuf>>,
    /// The pod's own users; `None`: they are the node's.
    pub users: Option<IdRange>,
}

/// Whether the volume is memory. It is the pod's alone and has the node's ids of its users; what is on a disk has those that the pod
/// sees, and is shown by idmapped mounts.
#[must_use]
pub fn is_in_memory(volume: &Volume) -> bool {
    projection::is_projection(volume) || volume.empty_dir.as_ref().is_some_and(|source| source.medium == "Memory")
}

/// Makes all volumes of the pod; what is there already stays as it is.
///
/// # Errors
/// At the first volume that cannot be made.
pub fn prepare(pod: &Pod, paths: &PodPaths, around: &Around<'_>) -> Result<(), VolumeError> {
    let Around { facts, writing, images, users } = *around;
    for volume in pod.spec.iter().flat_map(|spec| &spec.volumes) {
        if let Some(source) = &volume.host_path {
            check_host_path(&volume.name, source)?;
            continue;
        }
        let dir = paths.volume(&volume.name);
        if volume.image.is_some() {
            let missing = || VolumeError::Unsupported(volume.name.clone());
            mount_image(&dir, images.get(&volume.name).ok_or_else(missing)?)?;
            continue;
        }
        if projection::is_projection(volume) {
            std::fs::create_dir_all(&dir).map_err(io_error("create", &dir))?;
            // In memory: what is secret never comes to the disk.
            mount_memory(&dir, &root_owns("mode=0755", users))?;
            publish(pod, volume, &dir, (facts, writing, users))?;
        } else {
            prepare_one(volume, &dir, (fs_group(pod), users), || memory_room(pod, facts))?;
        }
    }
    Ok(())
}

/// Brings the volumes that are made of values up to date, those that are there.
///
/// # Errors
/// At the first that cannot be: it keeps what it has.
pub fn refresh(
    pod: &Pod,
    paths: &PodPaths,
    facts: &EnvFacts,
    (writing, users): (&Mutex<()>, Option<IdRange>),
) -> Result<(), VolumeError> {
    for volume in pod.spec.iter().flat_map(|spec| &spec.volumes) {
        let dir = paths.volume(&volume.name);
        if projection::is_projection(volume) && dir.join("..data").symlink_metadata().is_ok() {
            publish(pod, volume, &dir, (facts, writing, users))?;
        }
    }
    Ok(())
}

/// Options of a tmpfs whose root directory belongs to the pod's root.
pub(crate) fn root_owns(options: &str, users: Option<IdRange>) -> String {
    users.map_or_else(|| options.to_owned(), |users| format!("{options},uid={0},gid={0}", users.first))
}

/// Root of the pod and, if there is one, its group, as the node knows them.
fn memory_owner(users: Option<IdRange>, group: Option<u32>) -> Owner {
    let shared = group.is_some();
    match users {
        None => Owner { user: None, group, shared },
        Some(users) => {
            // Where a group has no id in the namespace, no container of the pod starts.
            let group = users.outside(group.unwrap_or(0)).unwrap_or(users.first);
            Owner { user: Some(users.first), group: Some(group), shared }
        }
    }
}

/// Owner before mode: a change of owner takes set-gid away.
fn own(path: &Path, owner: Owner, mode: u32) -> Result<(), VolumeError> {
    chown(path, owner.user, owner.group)
        .and_then(|()| std::fs::set_permissions(path, Permissions::from_mode(mode)))
        .map_err(io_error("open up", path))
}

fn publish(
    pod: &Pod,
    volume: &Volume,
    dir: &Path,
    (facts, writing, users): (&EnvFacts, &Mutex<()>, Option<IdRange>),
) -> Result<(), VolumeError> {
    let wrong = |source| VolumeError::Projection { volume: volume.name.clone(), source };
    let mut files = projection::files(pod, volume, facts).map_err(wrong)?;
    let group = fs_group(pod);
    if group.is_some() {
        // The group can read whatever the manifest's mode says, as in Kubernetes.
        files.values_mut().for_each(|file| file.mode |= 0o440);
    }
    let _one = writing.lock().unwrap_or_else(PoisonError::into_inner);
    projection::publish(dir, &files, memory_owner(users, group)).map(drop).map_err(io_error("write the files of", dir))
}

/// The group that the pod's volumes belong to.
fn fs_group(pod: &Pod) -> Option<u32> {
    let context = pod.spec.as_ref()?.security_context.as_ref()?;
    context.fs_group.and_then(|group| u32::try_from(group).ok())
}

/// Whether the node's path is what the volume's type says; the two types that may make it do so.
fn check_host_path(volume: &str, source: &HostPathVolumeSource) -> Result<(), VolumeError> {
    let path = Path::new(&source.path);
    let kind = match path.metadata() {
        Ok(meta) => Some(meta.file_type()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(io_error("look at", path)(error)),
    };
    let make_dir = || std::fs::create_dir_all(path).map_err(io_error("create", path));
    let (good, wanted) = match (source.r#type.as_str(), &kind) {
        // Without a type nothing is checked; what is missing becomes a directory, as every runtime of the field does it.
        ("", None) | ("DirectoryOrCreate", None) => return make_dir(),
        ("FileOrCreate", None) => {
            return std::fs::File::create_new(path).map(drop).map_err(io_error("create", path));
        }
        ("", Some(_)) => return Ok(()),
        ("DirectoryOrCreate" | "Directory", kind) => (kind.is_some_and(|kind| kind.is_dir()), "a directory"),
        ("FileOrCreate" | "File", kind) => (kind.is_some_and(|kind| kind.is_file()), "a file"),
        ("Socket", kind) => (kind.is_some_and(|kind| kind.is_socket()), "a socket"),
        ("CharDevice", kind) => (kind.is_some_and(|kind| kind.is_char_device()), "a character device"),
        ("BlockDevice", kind) => (kind.is_some_and(|kind| kind.is_block_device()), "a block device"),
        (_, _) => return Err(VolumeError::Unsupported(volume.to_owned())),
    };
    if good { Ok(()) } else { Err(VolumeError::HostPath { volume: volume.to_owned(), path: path.to_owned(), wanted }) }
}

/// Bytes that a volume in memory has room for when it does not say: no more than the pod may use, nor than the node has for pods (KEP-1967).
fn memory_room(pod: &Pod, facts: &EnvFacts) -> Option<u64> {
    let of_pod = pod_level(pod.spec()).memory_limit_bytes;
    let of_node = facts.allocatable.get("memory").and_then(|memory| u64::try_from(memory.value_ceil()).ok());
    of_pod.into_iter().chain(of_node).filter(|bytes| *bytes > 0).min()
}

fn prepare_one(
    volume: &Volume,
    dir: &Path,
    (group, users): (Option<u32>, Option<IdRange>),
    room: impl Fn() -> Option<u64>,
) -> Result<(), VolumeError> {
    let Some(source) = &volume.empty_dir else { return Err(VolumeError::Unsupported(volume.name.clone())) };
    std::fs::create_dir_all(dir).map_err(io_error("create", dir))?;
    if source.medium == "Memory" {
        let stated = source.size_limit.parse::<Quantity>().ok().filter(|limit| limit.sign() > 0);
        let stated = stated.and_then(|limit| u64::try_from(limit.value_ceil()).ok());
        let size = stated.into_iter().chain(room()).min();
        let options = size.map_or_else(|| "mode=0777".to_owned(), |bytes| format!("mode=0777,size={bytes}"));
        mount_memory(dir, &options)?;
    }
    // Not by create's mode: the umask would take from it.
    // With a group, what is made in it belongs to that group too.
    let mode = if group.is_some() { 0o2777 } else { 0o777 };
    own(dir, memory_owner(users.filter(|_| is_in_memory(volume)), group), mode)
}

/// An image's layers as one directory that nobody can write to. What is mounted is gone with the pod's data.
fn mount_image(dir: &Path, lowers: &[PathBuf]) -> Result<(), VolumeError> {
    std::fs::create_dir_all(dir).map_err(io_error("create", dir))?;
    if is_mount_point(dir)? {
        return Ok(());
    }
    // overlayfs wants two lower directories where there is no upper one, and an image may have one layer.
    let empty = dir.with_file_name(".empty");
    std::fs::create_dir_all(&empty).map_err(io_error("create", &empty))?;
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let open = |path: &Path| open(path, flags, Mode::empty()).map_err(|errno| io_error("open", path)(errno.into()));
    let layers = lowers.iter().map(PathBuf::as_path).chain([empty.as_path()]).map(open);
    let layers: Vec<OwnedFd> = layers.collect::<Result<_, _>>()?;
    // By descriptor: mount(2) takes one page of options, and paths of many layers are longer.
    let names: Vec<String> = layers.iter().map(|layer| format!("/proc/self/fd/{}", layer.as_raw_fd())).collect();
    let options = format!("lowerdir={}", names.join(":"));
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("overlay"), dir, Some("overlay"), flags, Some(options.as_str()))
        .map_err(|errno| io_error("mount the image on", dir)(errno.into()))
}

/// A tmpfs on the directory, unless something is mounted there.
fn mount_memory(dir: &Path, options: &str) -> Result<(), VolumeError> {
    if is_mount_point(dir)? {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), dir, Some("tmpfs"), flags, Some(options))
        .map_err(|errno| io_error("mount tmpfs on", dir)(errno.into()))
}

/// Whether it lies on another file system than its parent. Enough for tmpfs, and cheaper than the list of all mounts.
pub(crate) fn is_mount_point(dir: &Path) -> Result<bool, VolumeError> {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| path.symlink_metadata().map(|meta| meta.dev()).map_err(io_error("look at", path));
    match dir.parent() {
        Some(parent) => Ok(device(dir)? != device(parent)?),
        None => Ok(true),
    }
}

/// Mount points at or below `dir`, innermost last.
fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>, VolumeError> {
    let file = Path::new("/proc/self/mountinfo");
    let text = std::fs::read(file).map_err(io_error("read", file))?;
    // The kernel writes resolved paths.
    let dir = match dir.canonicalize() {
        Ok(dir) => dir,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io_error("resolve", dir)(error)),
    };
    let mount_point = |line: &[u8]| line.split(|byte| *byte == b' ').nth(4).map(unescape);
    let lines = text.split(|byte| *byte == b'\n');
    Ok(lines.filter_map(mount_point).filter(|mount| mount.starts_with(&dir)).collect())
}

/// Octal escapes of mountinfo: space, tab, newline, backslash.
fn unescape(field: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\').then(|| tail.get(..3)).flatten();
        let code = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => {
                out.push(code);
                rest = &tail[3..];
            }
            None => {
                out.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// Removes a directory of a pod with everything in it. What is mounted in it is unmounted first; if that fails nothing
/// is removed, because removing would empty what is mounted.
///
/// # Errors
/// When something is still mounted, or a file cannot be removed. A directory that is not there is no error.
pub fn remove_tree(dir: &Path) -> Result<(), VolumeError> {
    // The list of the node's mounts is long where there are many pods.
    match dir.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        _ => {}
    }
    for mount in mounts_below(dir)?.iter().rev() {
        umount2(mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|errno| io_error("unmount", mount)(errno.into()))?;
    }
    if let Some(mount) = mounts_below(dir)?.pop() {
        return Err(VolumeError::StillMounted(mount));
    }
    match crate::remove::tree(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", dir)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::{
        Container, DownwardApiVolumeFile, DownwardApiVolumeSource, EmptyDirVolumeSource, ObjectFieldSelector,
        ObjectMeta, PodSecurityContext, PodSpec, ResourceRequirements,
    };

    use super::*;
    use crate::paths::Paths;
    use crate::want::Uid;

    fn pod(medium: &str, size_limit: &str) -> Pod {
        let source = EmptyDirVolumeSource { medium: medium.into(), size_limit: size_limit.into() };
        let volume = Volume { name: "v".into(), empty_dir: Some(source), ..Volume::default() };
        Pod { spec: Some(PodSpec { volumes: vec![volume], ..PodSpec::default() }), ..Pod::default() }
    }

    #[test]
    fn a_volume_in_memory_has_the_room_of_who_has_least() {
        let quantity = |text: &str| text.parse::<Quantity>().expect("a quantity");
        for (limit, node, expected) in
            [("", "1Gi", Some(1 << 30)), ("64Mi", "1Gi", Some(64 << 20)), ("2Gi", "1Gi", Some(1 << 30)), ("", "", None)]
        {
            let mut pod = pod("Memory", "");
            let limits = [("memory".to_owned(), limit.to_owned())].into_iter().filter(|(_, limit)| !limit.is_empty());
            let resources = ResourceRequirements { limits: limits.collect(), ..ResourceRequirements::default() };
            pod.spec_mut().containers = vec![Container { resources: Some(resources), ..Container::default() }];
            let allocatable = [("memory".to_owned(), node)].into_iter().filter(|(_, node)| !node.is_empty());
            let allocatable = allocatable.map(|(name, node)| (name, quantity(node))).collect();
            assert_eq!(memory_room(&pod, &EnvFacts { allocatable, ..EnvFacts::default() }), expected, "{limit} {node}");
        }
    }

    fn prepare_for(pod: &Pod, paths: &PodPaths, users: Option<IdRange>) -> Result<(), VolumeError> {
        let (facts, writing, images) = (EnvFacts::default(), Mutex::default(), BTreeMap::new());
        prepare(pod, paths, &Around { facts: &facts, writing: &writing, images: &images, users })
    }

    /// Memory is owned by the pod's users as the node knows them; a disk by those that the pod sees.
    #[test]
    fn a_pod_with_users_of_its_own_owns_its_memory() {
        use std::os::unix::fs::MetadataExt;
        let users = IdRange { first: 1 << 20, count: 65_536 };
        for group in [None, Some(4321_u32)] {
            let dir = tempfile::tempdir().expect("tempdir");
            let paths = Paths::new(dir.path(), dir.path()).pod(&Uid("u".into()));
            let mut pod = pod("Memory", "");
            let spec = pod.spec.as_mut().expect("spec");
            spec.security_context =
                Some(PodSecurityContext { fs_group: group.map(i64::from), ..PodSecurityContext::default() });
            let disk = EmptyDirVolumeSource::default();
            spec.volumes.push(Volume { name: "disk".into(), empty_dir: Some(disk), ..Volume::default() });
            let source = DownwardApiVolumeSource::default();
            spec.volumes.push(Volume { name: "d".into(), downward_api: Some(source), ..Volume::default() });
            prepare_for(&pod, &paths, Some(users)).expect("prepare (needs root)");
            let ids = |path: PathBuf| {
                let meta = path.metadata().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                (meta.uid(), meta.gid())
            };
            let outside = users.first + group.unwrap_or(0);
            assert_eq!(ids(paths.volume("v")), (users.first, outside));
            assert_eq!(ids(paths.volume("d").join("..data")), (users.first, outside));
            assert_eq!(ids(paths.volume("disk")), (0, group.unwrap_or(0)));
            remove_tree(&paths.data).expect("remove");
        }
    }

    #[test]
    fn volumes_come_and_go() {
        let dir = tempfile::tempdir().expect("tempdir");
        let paths = Paths::new(dir.path(), dir.path()).pod(&Uid("u".into()));
        for (medium, limit) in [("", ""), ("Memory", "1Mi")] {
            let prepare = |pod: &Pod| prepare_for(pod, &paths, None);
            prepare(&pod(medium, limit)).expect("prepare (needs root)");
            std::fs::write(paths.volume("v").join("kept"), b"x").expect("write");
            prepare(&pod(medium, limit)).expect("prepare again");
            assert!(paths.volume("v").join("kept").exists(), "a second time changes nothing");
            let mode = paths.volume("v").metadata().expect("metadata").permissions().mode();
            assert_eq!(mode & 0o7777, 0o777);
            if medium == "Memory" {
                let too_much = vec![0_u8; 2 << 20];
                assert!(std::fs::write(paths.volume("v").join("big"), too_much).is_err(), "the limit holds");
            }
            remove_tree(&paths.data).expect("remove");
            assert!(!paths.data.exists() && mounts_below(dir.path()).expect("mounts").is_empty());
            remove_tree(&paths.data).expect("remove what is gone");
        }
    }

    #[test]
    fn what_is_not_supported_is_said() {
        let volume = Volume { name: "v".into(), ..Volume::default() };
        let error = prepare_one(&volume, Path::new("/nonexistent"), (None, None), || None).expect_err("unsupported");
        assert!(error.to_string().contains("does not support"));
    }

    #[test]
    fn a_group_owns_what_is_made_in_its_volumes() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("tempdir");
        let paths = Paths::new(dir.path(), dir.path()).pod(&Uid("u".into()));
        let mut pod = pod("", "");
        let context = PodSecurityContext { fs_group: Some(4321), ..PodSecurityContext::default() };
        let spec = pod.spec.as_mut().expect("spec");
        spec.security_context = Some(context);
        let field = ObjectFieldSelector { field_path: "metadata.name".into(), ..ObjectFieldSelector::default() };
        let item = DownwardApiVolumeFile {
            path: "name".into(),
            field_ref: Some(field),
            mode: Some(0o400),
            ..DownwardApiVolumeFile::default()
        };
        let source = DownwardApiVolumeSource { items: vec![item], ..DownwardApiVolumeSource::default() };
        spec.volumes.push(Volume { name: "d".into(), downward_api: Some(source), ..Volume::default() });
        pod.metadata = Some(ObjectMeta { name: "p".into(), ..ObjectMeta::default() });
        for round in 1..=2 {
            prepare_for(&pod, &paths, None).expect("prepare (needs root)");
            let told = |path: &Path| {
                let meta = path.metadata().unwrap_or_else(|error| panic!("round {round}, {}: {error}", path.display()));
                (meta.gid(), meta.mode() & 0o7777)
            };
            assert_eq!(told(&paths.volume("v")), (4321, 0o2777));
            assert_eq!(told(&paths.volume("d").join("name")), (4321, 0o440));
            assert_eq!(told(&paths.volume("d").join("..data")), (4321, 0o2755));
            let made = paths.volume("v").join("dir");
            std::fs::create_dir_all(&made).expect("make a directory");
            assert_eq!(made.metadata().expect("look").gid(), 4321);
        }
        remove_tree(&paths.data).expect("remove");
    }

    #[test]
    fn paths_of_the_node_are_what_their_type_says() {
        let dir = tempfile::tempdir().expect("tempdir");
        let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        std::fs::create_dir(at("dir")).expect("make");
        std::fs::write(at("file"), b"kept").expect("write");
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).expect("bind");
        let check = |kind: &str, path: &str| {
            let source = HostPathVolumeSource { path: path.to_owned(), r#type: kind.to_owned() };
            check_host_path("h", &source).map_err(|error| error.to_string())
        };
        let all = ["dir", "file", "socket", "missing"].map(at);
        let [dir, file, socket, missing] = &all;
        let device = &"/dev/null".to_owned();
        for (kind, good, bad) in [
            ("Directory", vec![dir], vec![file, socket, device, missing]),
            ("File", vec![file], vec![dir, socket, device, missing]),
            ("Socket", vec![socket], vec![dir, file, device, missing]),
            ("CharDevice", vec![device], vec![dir, file, socket, missing]),
            ("BlockDevice", vec![], vec![dir, file, socket, device, missing]),
            ("DirectoryOrCreate", vec![dir], vec![file, socket, device]),
            ("FileOrCreate", vec![file], vec![dir, socket, device]),
            ("", vec![dir, file, socket, device], vec![]),
        ] {
            for path in good {
                check(kind, path).unwrap_or_else(|error| panic!("{kind} {path}: {error}"));
            }
            for path in bad {
                let error = check(kind, path).expect_err(kind);
                assert!(error.contains("type check failed") && error.contains(path.as_str()), "{error}");
            }
        }
        check("DirectoryOrCreate", &format!("{missing}/a/b")).expect("made");
        check("FileOrCreate", &format!("{missing}/a/f")).expect("made");
        check("", &format!("{missing}/c")).expect("made");
        assert!(Path::new(&format!("{missing}/a/b")).is_dir() && Path::new(&format!("{missing}/c")).is_dir());
        assert!(Path::new(&format!("{missing}/a/f")).is_file());
        check("FileOrCreate", file).expect("there");
        assert_eq!(std::fs::read(file).expect("read"), b"kept");
    }

    #[test]
    fn mountinfo_escapes() {
        assert_eq!(unescape(b"/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescape(b"/a\\9"), Path::new("/a\\9"));
    }
}
