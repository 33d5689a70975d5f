//! The pod's volumes on disk: emptyDir, on the node's disk or in memory, and those made of values ([`crate::projection`]).

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use minipod_proto::quantity::Quantity;
use minipod_proto::v1::{Pod, Volume};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::container::env::EnvFacts;
use crate::paths::PodPaths;
use crate::projection::{self, ProjectionError};

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

/// Of every pod's /dev/shm, as in the field; its pages count against the container that touches them first.
const SHM_OPTIONS: &str = "mode=1777,size=65536k";

/// Makes all volumes of the pod and its shared memory; what is there already stays as it is.
///
/// # Errors
/// At the first volume that cannot be made.
pub fn prepare(pod: &Pod, paths: &PodPaths, facts: &EnvFacts, writing: &Mutex<()>) -> Result<(), VolumeError> {
    if !pod.spec.as_ref().is_some_and(|spec| spec.host_ipc) {
        let shm = paths.shm();
        std::fs::create_dir_all(&shm).map_err(io_error("create", &shm))?;
        mount_memory(&shm, SHM_OPTIONS)?;
    }
    for volume in pod.spec.iter().flat_map(|spec| &spec.volumes) {
        let dir = paths.volume(&volume.name);
        if projection::is_projection(volume) {
            std::fs::create_dir_all(&dir).map_err(io_error("create", &dir))?;
            // In memory: what is secret never comes to the disk.
            mount_memory(&dir, "mode=0755")?;
            publish(pod, volume, &dir, facts, writing)?;
        } else {
            prepare_one(volume, &dir)?;
        }
    }
    Ok(())
}

/// Brings the volumes that are made of values up to date, those that are there.
///
/// # Errors
/// At the first that cannot be: it keeps what it has.
pub fn refresh(pod: &Pod, paths: &PodPaths, facts: &EnvFacts, writing: &Mutex<()>) -> Result<(), VolumeError> {
    for volume in pod.spec.iter().flat_map(|spec| &spec.volumes) {
        let dir = paths.volume(&volume.name);
        if projection::is_projection(volume) && dir.join("..data").symlink_metadata().is_ok() {
            publish(pod, volume, &dir, facts, writing)?;
        }
    }
    Ok(())
}

fn publish(pod: &Pod, volume: &Volume, dir: &Path, facts: &EnvFacts, writing: &Mutex<()>) -> Result<(), VolumeError> {
    let wrong = |source| VolumeError::Projection { volume: volume.name.clone(), source };
    let files = projection::files(pod, volume, facts).map_err(wrong)?;
    let _one = writing.lock().unwrap_or_else(PoisonError::into_inner);
    projection::publish(dir, &files).map(drop).map_err(io_error("write the files of", dir))
}

fn prepare_one(volume: &Volume, dir: &Path) -> Result<(), VolumeError> {
    let Some(source) = &volume.empty_dir else { return Err(VolumeError::Unsupported(volume.name.clone())) };
    std::fs::create_dir_all(dir).map_err(io_error("create", dir))?;
    if source.medium == "Memory" {
        let limit = source.size_limit.parse::<Quantity>().ok().filter(|limit| limit.sign() > 0);
        let options =
            limit.map_or_else(|| "mode=0777".to_owned(), |limit| format!("mode=0777,size={}", limit.value_ceil()));
        mount_memory(dir, &options)?;
    }
    // Not by create's mode: the umask would take from it.
    std::fs::set_permissions(dir, Permissions::from_mode(0o777)).map_err(io_error("open up", dir))
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
fn is_mount_point(dir: &Path) -> Result<bool, VolumeError> {
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
    for mount in mounts_below(dir)?.iter().rev() {
        umount2(mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .map_err(|errno| io_error("unmount", mount)(errno.into()))?;
    }
    if let Some(mount) = mounts_below(dir)?.pop() {
        return Err(VolumeError::StillMounted(mount));
    }
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", dir)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::{EmptyDirVolumeSource, PodSpec};

    use super::*;
    use crate::paths::Paths;
    use crate::want::Uid;

    fn pod(medium: &str, size_limit: &str) -> Pod {
        let source = EmptyDirVolumeSource { medium: medium.into(), size_limit: size_limit.into() };
        let volume = Volume { name: "v".into(), empty_dir: Some(source), ..Volume::default() };
        Pod { spec: Some(PodSpec { volumes: vec![volume], ..PodSpec::default() }), ..Pod::default() }
    }

    #[test]
    fn volumes_come_and_go() {
        let dir = tempfile::tempdir().expect("tempdir");
        let paths = Paths::new(dir.path(), dir.path()).pod(&Uid("u".into()));
        for (medium, limit) in [("", ""), ("Memory", "1Mi")] {
            let prepare = |pod: &Pod| prepare(pod, &paths, &EnvFacts::default(), &Mutex::default());
            prepare(&pod(medium, limit)).expect("prepare (needs root)");
            std::fs::write(paths.volume("v").join("kept"), b"x").expect("write");
            prepare(&pod(medium, limit)).expect("prepare again");
            assert!(paths.volume("v").join("kept").exists(), "a second time changes nothing");
            let mode = paths.volume("v").metadata().expect("metadata").permissions().mode();
            assert_eq!(mode & 0o7777, 0o777);
            assert!(is_mount_point(&paths.shm()).expect("look"), "shared memory is there");
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
        let error = prepare_one(&volume, Path::new("/nonexistent")).expect_err("unsupported");
        assert!(error.to_string().contains("does not support"));
    }

    #[test]
    fn mountinfo_escapes() {
        assert_eq!(unescape(b"/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescape(b"/a\\9"), Path::new("/a\\9"));
    }
}
