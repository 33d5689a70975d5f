//! A cluster of the real binaries, and shorthands for what tests do with one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use minictl::local::{LocalCluster, NodeOptions, Options, Store};
use minipod_client::{Client, DeleteOptions, ExecOutput, Options as ClientOptions};
use minipod_proto::Resource;
use minipod_proto::v1::{ExecStart, LogsRequest, Object, Pod};

use crate::wait;

/// Where the binaries are: `MINIPOD_BIN_DIR`, or beside the test's own.
///
/// # Panics
/// When the test's own executable cannot be found.
pub fn bin_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("MINIPOD_BIN_DIR") {
        return PathBuf::from(dir);
    }
    let exe = std::env::current_exe().expect("the test has an executable");
    let dir = exe.parent().expect("it is in a directory");
    if dir.ends_with("deps") { dir.parent().expect("deps is in a directory").to_owned() } else { dir.to_owned() }
}

/// Where `cargo xtask images` puts the archives.
///
/// # Panics
/// When they are not there.
pub fn images() -> Vec<PathBuf> {
    ["busybox", "toolbox"].map(image).into()
}

/// One of the archives that `cargo xtask images` makes.
///
/// # Panics
/// When it is not there.
pub fn image(name: &str) -> PathBuf {
    let dir = std::env::var_os("MINIPOD_IMAGES").map_or_else(|| root().join("target/images"), PathBuf::from);
    let archive = dir.join(format!("{name}.oci.tar"));
    assert!(archive.is_file(), "{} is missing: run `cargo xtask images`", archive.display());
    archive
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in the workspace").to_owned()
}

/// The store of all clusters of this run: `MINIPOD_TEST_STORE`, `embedded` (also when it is not set) or `etcd`.
///
/// # Panics
/// When it is something else.
pub fn store() -> Store {
    match std::env::var("MINIPOD_TEST_STORE").as_deref() {
        Err(_) | Ok("embedded") => Store::Embedded,
        Ok("etcd") => Store::Etcd,
        Ok(other) => panic!("MINIPOD_TEST_STORE is {other:?}: want embedded or etcd"),
    }
}

/// The text of one of `deploy/examples`.
///
/// # Panics
/// When there is no such file.
pub fn example(name: &str) -> String {
    let path = root().join("deploy/examples").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("read {}: {error}", path.display()))
}

/// The one pod of a manifest.
///
/// # Panics
/// When the manifest is wrong or has something else in it.
pub fn pod(manifest: &str) -> Pod {
    let objects = minipod_proto::manifest::parse(manifest).unwrap_or_else(|problems| panic!("{problems}"));
    let [object]: [Object; 1] = objects.try_into().expect("one object");
    Pod::try_from(object).expect("a pod")
}

/// A cluster for one test.
pub struct Cluster {
    /// The processes.
    pub local: LocalCluster,
}

impl Cluster {
    /// Starts one with the images loaded.
    ///
    /// # Panics
    /// When it does not come up.
    pub async fn start(nodes: &[(&str, &str)]) -> Cluster {
        let nodes = nodes.iter().map(|(name, memory)| NodeOptions::with_memory(name, memory)).collect();
        Cluster::start_with(Options::new(bin_dir(), nodes)).await
    }

    /// As [`Cluster::start`], with all options.
    ///
    /// # Panics
    /// When it does not come up.
    pub async fn start_with(options: Options) -> Cluster {
        let options = Options { store: store(), ..options };
        let has_nodes = !options.nodes.is_empty();
        let local = LocalCluster::start(options).await.unwrap_or_else(|error| panic!("start the cluster: {error}"));
        let cluster = Cluster { local };
        if has_nodes {
            for archive in images() {
                let loaded = cluster.minictl(&["image", "load", &archive.to_string_lossy()]);
                assert!(loaded.status.success(), "load {}: {}", archive.display(), text(&loaded.stderr));
            }
        }
        cluster
    }

    /// A client of it.
    pub fn client(&self) -> &Client {
        self.local.client()
    }

    /// Runs the real minictl against it.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn minictl(&self, arguments: &[&str]) -> Output {
        minictl(self.local.server(), arguments)
    }

    /// Creates a pod.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn create(&self, pod: Pod) -> Pod {
        let name = pod.name().to_owned();
        self.client().create(pod).await.unwrap_or_else(|error| panic!("create {name}: {error}"))
    }

    /// The pod of that name as it is now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub async fn pod(&self, name: &str) -> Result<Pod, String> {
        self.client().get::<Pod>("default", name).await.map_err(|error| error.to_string())
    }

    /// Waits until the pod is in that phase and, when it is Running, ready.
    ///
    /// # Panics
    /// When it does not come to that.
    pub async fn until_phase(&self, name: &str, phase: &str) -> Pod {
        wait::until(&format!("pod {name} to be {phase}"), || async {
            let pod = self.pod(name).await?;
            let ready = phase != "Running" || pod.condition_true("Ready");
            if pod.status().phase == phase && ready { Ok(pod) } else { Err(format!("{:#?}", pod.status())) }
        })
        .await
    }

    /// Runs a command in a container; standard output, which must come with exit code 0.
    ///
    /// # Errors
    /// When it cannot be run or exits with something else.
    pub async fn exec(&self, pod: &str, container: &str, command: &[&str]) -> Result<String, String> {
        exec(self.client(), pod, container, command).await
    }

    /// What a container has logged.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub async fn logs(&self, pod: &str, container: &str) -> Result<String, String> {
        logs(self.client(), pod, container).await
    }

    /// Deletes a pod and waits until its object is gone and nothing of it is left on this machine.
    ///
    /// # Panics
    /// When something stays.
    pub async fn delete_completely(&self, name: &str) {
        let pod = self.delete(name).await;
        self.leaves_nothing(&pod).await;
    }

    /// Deletes a pod in good order and waits until its object is gone; answers what it was.
    ///
    /// # Panics
    /// When it stays.
    pub async fn delete(&self, name: &str) -> Pod {
        let pod = self.pod(name).await.unwrap_or_else(|error| panic!("read {name}: {error}"));
        let deleted = self.client().delete::<Pod>("default", name, &DeleteOptions::default()).await;
        deleted.unwrap_or_else(|error| panic!("delete {name}: {error}"));
        wait::until(&format!("pod {name} to be gone"), || async {
            match self.client().get::<Pod>("default", name).await {
                Err(error) if error.is_not_found() => Ok(()),
                Err(error) => Err(error.to_string()),
                Ok(pod) => Err(format!("{:?}", pod.status())),
            }
        })
        .await;
        pod
    }

    /// Waits until nothing of a pod is left on this machine.
    ///
    /// # Panics
    /// When something stays.
    pub async fn leaves_nothing(&self, pod: &Pod) {
        let names = self.local.names().expect("the cluster is up");
        let (run, data) = (names.run(), names.data());
        wait::until(&format!("pod {} to leave nothing", pod.name()), || async {
            let left = crate::kernel::remains(pod.uid(), &[&run, &data]);
            if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
        })
        .await;
    }
}

/// A client of one of several API servers.
///
/// # Panics
/// When the address makes no sense.
pub fn client_of(server: &str) -> Client {
    Client::new(&ClientOptions::servers(server)).unwrap_or_else(|error| panic!("{error}"))
}

/// As [`Cluster::exec`], through any client.
///
/// # Errors
/// As [`Cluster::exec`].
pub async fn exec(client: &Client, pod: &str, container: &str, command: &[&str]) -> Result<String, String> {
    let start = ExecStart {
        namespace: "default".to_owned(),
        pod: pod.to_owned(),
        container: container.to_owned(),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        stdin: false,
        ..ExecStart::default()
    };
    let mut exec = client.exec(start).await.map_err(|error| error.to_string())?;
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    loop {
        match exec.next().await.map_err(|error| error.to_string())? {
            ExecOutput::Stdout(data) => output.extend_from_slice(&data),
            ExecOutput::Stderr(data) => errors.extend_from_slice(&data),
            ExecOutput::Exit(0) => return Ok(text(&output)),
            ExecOutput::Exit(code) => return Err(format!("{command:?} exited with {code}: {}", text(&errors))),
        }
    }
}

/// As [`Cluster::logs`], through any client.
///
/// # Errors
/// As [`Cluster::logs`].
pub async fn logs(client: &Client, pod: &str, container: &str) -> Result<String, String> {
    let request = LogsRequest {
        namespace: "default".to_owned(),
        pod: pod.to_owned(),
        container: container.to_owned(),
        ..LogsRequest::default()
    };
    let mut logs = client.logs(request).await.map_err(|error| error.to_string())?;
    let mut all = Vec::new();
    while let Some(data) = logs.next().await.map_err(|error| error.to_string())? {
        all.extend_from_slice(&data);
    }
    Ok(text(&all))
}

/// Runs the real minictl against an API server.
///
/// # Panics
/// When it cannot be started.
pub fn minictl(server: &str, arguments: &[&str]) -> Output {
    let program = bin_dir().join("minictl");
    let mut command = Command::new(&program);
    command.args(arguments).env("MINIPOD_SERVER", server).stdin(Stdio::null());
    command.output().unwrap_or_else(|error| panic!("start {}: {error}", program.display()))
}

/// Bytes as text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
