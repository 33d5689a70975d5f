//! The peer of the benchmarks: podman from Debian, set up so that it works on this machine and keeps to itself.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::cluster::images;

/// runc, because crun 1.8 refuses hosts with both cgroup versions; limits that root may set also without CAP_SYS_RESOURCE;
/// no journal, because there may be none.
const SETTINGS: &str = r#"[containers]
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"#;

/// podman with its own storage below a temporary directory.
#[derive(Debug)]
pub struct Podman {
    dir: PathBuf,
}

impl Podman {
    /// Loads the image and starts one pod, so that podman has built its own pause image.
    ///
    /// # Panics
    /// When podman is missing or does not work here.
    pub fn prepare() -> Podman {
        let dir = std::env::temp_dir().join(format!("minipod-podman-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a temporary directory can be made");
        std::fs::write(dir.join("containers.conf"), SETTINGS).expect("written");
        let podman = Podman { dir };
        let busybox = images().remove(0);
        podman.run(&["load", "--input", &busybox.to_string_lossy()]);
        podman.start_pod("warm-up");
        podman.remove_pod("warm-up");
        podman
    }

    /// Starts a pod of infra and two containers; how long podman takes until all are started.
    ///
    /// # Panics
    /// When it fails.
    pub fn start_pod(&self, name: &str) -> Duration {
        let manifest = format!(
            "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  containers:
  - {{name: one, image: minipod.local/busybox, imagePullPolicy: Never, command: [sleep, infinity]}}
  - {{name: two, image: minipod.local/busybox, imagePullPolicy: Never, command: [sleep, infinity]}}
"
        );
        let file = self.dir.join("pod.yaml");
        std::fs::write(&file, manifest).expect("written");
        let start = Instant::now();
        self.run(&["play", "kube", &file.to_string_lossy()]);
        start.elapsed()
    }

    /// Removes a pod at once.
    ///
    /// # Panics
    /// When it fails.
    pub fn remove_pod(&self, name: &str) {
        self.run(&["pod", "rm", "--force", "--time", "0", name]);
    }

    /// Removes images, storage and settings.
    ///
    /// # Panics
    /// When podman fails.
    pub fn clean_up(self) {
        self.run(&["system", "reset", "--force"]);
        // An error means that podman removed it with the rest.
        let _ = std::fs::remove_dir_all(&self.dir);
    }

    fn run(&self, arguments: &[&str]) {
        let mut command = Command::new("podman");
        command.arg("--root").arg(self.dir.join("storage")).arg("--runroot").arg(self.dir.join("run"));
        command.args(arguments).env("CONTAINERS_CONF", self.dir.join("containers.conf")).stdin(Stdio::null());
        let output = command.output().unwrap_or_else(|error| panic!("start podman: {error}; apt-get install podman"));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "podman {}: {errors}", arguments.join(" "));
    }
}
