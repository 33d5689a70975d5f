//! Where things are on disk.

use std::path::{Path, PathBuf};

use minipod_proto::v1::Pod;

use crate::want::{Uid, key_of};

/// The agent's directories.
#[derive(Debug, Clone)]
pub struct Paths {
    run: PathBuf,
    data: PathBuf,
}

/// A pod's directories.
#[derive(Debug, Clone)]
pub struct PodPaths {
    /// Supervisor, record, spec: gone after a reboot.
    pub run: PathBuf,
    /// Volumes, /etc files, root file systems.
    pub data: PathBuf,
}

/// A container's files, one set per attempt.
#[derive(Debug, Clone)]
pub struct ContainerPaths {
    /// Everything of the attempt.
    pub dir: PathBuf,
    /// Upper layer of its root file system.
    pub upper: PathBuf,
    /// overlayfs' work directory.
    pub work: PathBuf,
    /// Where the root is mounted, within the container's mount namespace.
    pub root: PathBuf,
    /// Bound to the container's terminationMessagePath.
    pub termination_log: PathBuf,
}

impl Paths {
    /// The agent's directories below these two.
    #[must_use]
    pub fn new(run: &Path, data: &Path) -> Self {
        Self { run: run.to_owned(), data: data.to_owned() }
    }

    /// All pods' run directories.
    #[must_use]
    pub fn pods_run(&self) -> PathBuf {
        self.run.join("pods")
    }

    /// ConfigMaps and Secrets of the pods.
    #[must_use]
    pub fn sources(&self) -> PathBuf {
        self.run.join("sources")
    }

    /// All pods' data directories.
    #[must_use]
    pub fn pods_data(&self) -> PathBuf {
        self.data.join("pods")
    }

    /// All pods' logs.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.data.join("logs")
    }

    /// The node's pod CIDR, kept for starts without API server.
    #[must_use]
    pub fn pod_cidr(&self) -> PathBuf {
        self.data.join("pod-cidr")
    }

    /// Which pod has which ids of the node.
    #[must_use]
    pub fn users(&self) -> PathBuf {
        self.data.join("users")
    }

    /// A pod's directories.
    #[must_use]
    pub fn pod(&self, uid: &Uid) -> PodPaths {
        PodPaths { run: self.pods_run().join(&uid.0), data: self.pods_data().join(&uid.0) }
    }

    /// A pod's logs.
    #[must_use]
    pub fn logs_of(&self, pod: &Pod, uid: &Uid) -> PathBuf {
        let (namespace, name) = key_of(pod);
        self.logs().join(format!("{}_{}_{uid}", plain(&namespace), plain(&name)))
    }

    /// The log of one attempt of a container.
    #[must_use]
    pub fn log_file(&self, pod: &Pod, uid: &Uid, container: &str, attempt: u32) -> PathBuf {
        self.logs_of(pod, uid).join(plain(container)).join(format!("{attempt}.log"))
    }
}

impl PodPaths {
    /// A volume's directory.
    #[must_use]
    pub fn volume(&self, name: &str) -> PathBuf {
        self.data.join("volumes").join(plain(name))
    }

    /// The shared memory of all containers, of pods that an agent has made which mounted it itself.
    #[must_use]
    pub fn shm(&self) -> PathBuf {
        self.data.join("shm")
    }

    /// hosts, hostname, resolv.conf.
    #[must_use]
    pub fn etc(&self) -> PathBuf {
        self.data.join("etc")
    }

    /// Root file systems of all containers.
    #[must_use]
    pub fn roots(&self) -> PathBuf {
        self.data.join("containers")
    }

    /// All attempts of a container.
    #[must_use]
    pub fn attempts(&self, container: &str) -> PathBuf {
        self.roots().join(plain(container))
    }

    /// One attempt of a container.
    #[must_use]
    pub fn container(&self, container: &str, attempt: u32) -> ContainerPaths {
        let dir = self.attempts(container).join(attempt.to_string());
        ContainerPaths {
            upper: dir.join("upper"),
            work: dir.join("work"),
            root: dir.join("root"),
            termination_log: dir.join("termination-log"),
            dir,
        }
    }
}

/// A name as one path component. Names were validated when the pod was created; this keeps a bug elsewhere from
/// becoming a walk through the file system.
fn plain(name: &str) -> String {
    match name {
        "" | "." | ".." => "_".to_owned(),
        name => name.replace(['/', '\0'], "_"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leaves_its_directory() {
        let paths = Paths::new(Path::new("/run/m"), Path::new("/var/m"));
        let pod = paths.pod(&Uid("u".into()));
        assert_eq!(pod.volume(".."), Path::new("/var/m/pods/u/volumes/_"));
        assert_eq!(pod.volume("a/../../b"), Path::new("/var/m/pods/u/volumes/a_.._.._b"));
        assert_eq!(pod.container("x", 2).upper, Path::new("/var/m/pods/u/containers/x/2/upper"));
    }
}
