//! A node for one test: a network namespace with its API server and agent, directories and a cgroup of its own. Everything goes
//! with it, also when the test fails. Needs root and Debian's iproute2, nftables and busybox-static.

#![allow(dead_code)]

pub mod certificates;
pub mod fake_api;
pub mod liar;
pub mod registry;

use std::fs;
use std::future::Future;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use minipod_nodeagent::image::{ImageStore, LoadOptions, StoreOptions};
use minipod_podshim::{cleanup, process};
use minipod_proto::v1::{Object, Pod, PodStatus, ResourceRequirements, object};
use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use fake_api::FakeApi;

pub const POD_CIDR: &str = "10.231.7.0/24";

/// Runs a test on a thread and in a network namespace of its own. What the test starts inherits the namespace; its links and
/// rules go with the last process in it.
pub fn on_a_node<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let node = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; these tests need root");
        run("ip", &["link", "set", "lo", "up"]);
        // One thread: all others would be in another namespace.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(test());
    });
    if let Err(panic) = node.join() {
        std::panic::resume_unwind(panic);
    }
}

pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("run {program}: {error}; is it installed?"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {}{text}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Where cargo puts binaries: beside the directory of this test's executable, or what `MINIPOD_BIN_DIR` says.
pub fn bin_dir() -> PathBuf {
    match std::env::var_os("MINIPOD_BIN_DIR") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_BIN_EXE_minipod-nodeagent")).parent().expect("a directory").to_owned(),
    }
}

/// A binary of another package, which cargo does not build for this one's tests.
pub fn binary(name: &str) -> PathBuf {
    let path = bin_dir().join(name);
    assert!(path.is_file(), "{} is missing: run `cargo build --workspace --bins` first", path.display());
    path
}

/// The archives of `cargo xtask images`, made if they are not there.
pub fn images() -> &'static [PathBuf; 2] {
    static IMAGES: OnceLock<[PathBuf; 2]> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir));
        let archives = ["busybox", "toolbox"].map(|name| target.join("images").join(format!("{name}.oci.tar")));
        if !archives.iter().all(|archive| archive.is_file()) {
            let made = Command::new(env!("CARGO")).args(["xtask", "images"]).current_dir(root).status();
            assert!(made.expect("run cargo").success(), "cargo xtask images failed");
        }
        archives
    })
}

/// Puts both images into a store that no agent has; durably as an agent would, or quickly.
pub fn load_images(data_dir: &Path, durable: bool) {
    let store = ImageStore::open(data_dir, StoreOptions { durable, ..StoreOptions::default() });
    let store = store.expect("an image store");
    for archive in images() {
        store.load(archive, &LoadOptions::default()).expect("load an image");
    }
}

/// A node: directories, API server and, most of the time, an agent.
pub struct Node {
    pub api: FakeApi,
    /// Images, volumes, logs.
    dir: PathBuf,
    /// What does not outlive a boot.
    run: PathBuf,
    /// Both, where they go with the node.
    owned: Option<tempfile::TempDir>,
    /// The cgroup of all its pods.
    pub cgroup_root: String,
    agent: Option<Child>,
    pub program: PathBuf,
    pub flags: Vec<String>,
    /// Log warnings only, for measurements.
    pub quiet: bool,
    log: PathBuf,
}

impl Node {
    /// Directories with both images, and an API server.
    pub async fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let owned = tempfile::Builder::new().prefix("mp-").tempdir().expect("a directory");
        let dir = owned.path().to_owned();
        load_images(&dir.join("data"), false);
        let name = format!("minipod-test-{}-{number}", std::process::id());
        let mut node = Self::on(dir.clone(), dir.join("run"), name).await;
        node.owned = Some(owned);
        node
    }

    /// One on directories that are there, and stay.
    pub async fn on(dir: PathBuf, run: PathBuf, cgroup_root: String) -> Self {
        let log = dir.join("agent.log");
        let (api, _server) = FakeApi::start(POD_CIDR).await;
        // The disk of the machine that tests run on is nobody's business but that of the tests that say so.
        let flags = vec![
            "--max-restart-backoff-ms=300".to_owned(),
            "--eviction-hard=".to_owned(),
            "--image-gc-high-threshold=100".to_owned(),
        ];
        Self {
            api,
            cgroup_root,
            agent: None,
            program: PathBuf::from(env!("CARGO_BIN_EXE_minipod-nodeagent")),
            flags,
            quiet: false,
            log,
            dir,
            run,
            owned: None,
        }
    }

    /// The same with a running agent.
    pub async fn with_agent() -> Self {
        let mut node = Self::new().await;
        node.start(&[]);
        node
    }

    pub fn run_dir(&self) -> PathBuf {
        self.run.clone()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub fn start(&mut self, environment: &[(&str, &str)]) {
        assert!(self.agent.is_none(), "an agent runs already");
        let log = fs::OpenOptions::new().create(true).append(true).open(&self.log).expect("a log file");
        let mut command = Command::new(&self.program);
        command
            .arg(format!("--server={}", self.api.url()))
            .args([
                "--name=node-a",
                "--bridge=mptest0",
                "--node-ip=127.0.0.1",
                "--allocatable=cpu=8,memory=8Gi,pods=110",
            ])
            .arg(format!("--run-dir={}", self.run_dir().display()))
            .arg(format!("--data-dir={}", self.data_dir().display()))
            .arg(format!("--cgroup-root={}", self.cgroup_root))
            .arg(format!("--podshim={}", binary("minipod-podshim").display()))
            .arg(format!("--pause={}", binary("minipod-pause").display()))
            .args(&self.flags)
            .env("RUST_LOG", if self.quiet { "warn" } else { "info,minipod_nodeagent=debug" })
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.agent = Some(command.spawn().expect("start the agent"));
    }

    pub fn agent_pid(&self) -> u32 {
        self.agent.as_ref().expect("an agent").id()
    }

    /// Ends the agent by a signal; answers how it ended.
    pub fn end(&mut self, signal: Signal) -> std::process::ExitStatus {
        let mut agent = self.agent.take().expect("an agent");
        kill(Pid::from_raw(agent.id().cast_signed()), signal).expect("signal the agent");
        agent.wait().expect("wait for the agent")
    }

    /// Whether the agent killed itself at a failpoint meanwhile; then it is gone.
    pub fn has_died(&mut self) -> bool {
        let Some(agent) = &mut self.agent else { return true };
        let Some(status) = agent.try_wait().expect("look at the agent") else { return false };
        assert_eq!(status.signal(), Some(9), "the agent ended otherwise: {status}\n{}", self.agent_log());
        self.agent = None;
        true
    }

    pub fn agent_log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits for a status of the pod; shows the agent's log when it does not come.
    pub async fn wait(&self, uid: &str, what: &str, good: impl Fn(&PodStatus) -> bool) -> PodStatus {
        let wanted = || self.api.status(uid).filter(|status| good(status));
        self.api.wait_for(what, wanted, || self.describe(uid)).await
    }

    fn describe(&self, uid: &str) -> String {
        let log = self.agent_log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(60)..].join("\n");
        let shim = fs::read_to_string(self.run_dir().join("pods").join(uid).join("shim.log")).unwrap_or_default();
        format!("{:#?}\nevents {:?}\nshim: {shim}\n{tail}", self.api.status(uid), self.api.events(uid))
    }

    pub async fn wait_running(&self, uid: &str) -> PodStatus {
        self.wait(uid, "all containers running", |status| {
            let running = status.container_statuses.iter().all(|container| running(container).is_some());
            status.phase == "Running" && !status.container_statuses.is_empty() && running
        })
        .await
    }

    pub async fn wait_finished(&self, uid: &str) {
        let wanted = || self.api.is_finished(uid).then_some(());
        self.api.wait_for("the end of the pod", wanted, || self.describe(uid)).await;
    }

    /// Waits until the agent has told of this: events go their own way, before or after the status.
    pub async fn wait_event(&self, uid: &str, reason: &str) {
        let told = || self.api.events(uid).iter().any(|told| told == reason).then_some(());
        self.api.wait_for(&format!("the event {reason} of {uid}"), told, || self.agent_log()).await;
    }

    /// The first process of each running container, with its start time.
    pub fn processes(&self, uid: &str) -> Vec<(String, u32, u64)> {
        let state = cleanup::kept_state(&self.run_dir().join("pods").join(uid)).expect("the supervisor's state");
        let running = state.runs.into_iter().filter(|run| run.ended.is_none());
        let mut all: Vec<(String, u32, u64)> = running
            .filter_map(|run| run.started)
            .map(|run| (run.name, run.pid, process::start_ticks(run.pid).unwrap_or(0)))
            .collect();
        all.sort();
        all
    }

    pub fn pid(&self, uid: &str, container: &str) -> u32 {
        let all = self.processes(uid);
        let found = all.iter().find(|(name, _, _)| name == container);
        found.unwrap_or_else(|| panic!("{container} is not among {all:?}")).1
    }

    pub fn shim_pid(&self, uid: &str) -> u32 {
        cleanup::kept_state(&self.run_dir().join("pods").join(uid)).expect("the supervisor's state").shim_pid
    }

    pub fn pause_pid(&self, uid: &str) -> u32 {
        cleanup::kept_state(&self.run_dir().join("pods").join(uid)).expect("the supervisor's state").pause_pid
    }

    /// The text of a container's log.
    pub fn log(&self, uid: &str, container: &str, attempt: u32) -> String {
        let logs = self.data_dir().join("logs");
        let pod = entries(&logs).into_iter().find(|path| path.to_string_lossy().ends_with(uid));
        let file = pod.map(|pod| pod.join(container).join(format!("{attempt}.log")));
        let raw = file.and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
        raw.lines().map(|line| format!("{}\n", line.splitn(4, ' ').nth(3).unwrap_or_default())).collect()
    }

    /// Waits until a container's log has the text; answers the log.
    pub async fn wait_log(&self, uid: &str, container: &str, text: &str) -> String {
        let get = || Some(self.log(uid, container, 0)).filter(|log| log.contains(text));
        let describe = || format!("log of {container}:\n{}\n{}", self.log(uid, container, 0), self.describe(uid));
        self.api.wait_for(&format!("{text:?} in the log of {container}"), get, describe).await
    }

    /// Everything on the machine that belongs to the pod: processes, mounts, cgroups, links, addresses, files.
    pub fn traces_of(&self, uid: &str) -> Vec<String> {
        let mut found = Vec::new();
        for pid in entries(Path::new("/proc")) {
            let read = |name: &str| fs::read(pid.join(name)).unwrap_or_default();
            let ours = [read("cgroup"), read("cmdline")].iter().any(|text| contains(text, uid.as_bytes()));
            if ours && pid.file_name().is_some_and(|name| name.to_string_lossy().parse::<u32>().is_ok()) {
                found.push(format!("process {} {}", pid.display(), String::from_utf8_lossy(&read("cmdline"))));
            }
        }
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").expect("mounts");
        found.extend(mounts.lines().filter(|line| line.contains(uid)).map(|line| format!("mount {line}")));
        let links = run("ip", &["-o", "link"]);
        // One that names no pod is anybody's.
        let (any, own) = (" alias minipod:", format!(" alias minipod:{uid}"));
        let ours = |line: &&str| !line.contains(any) || line.ends_with(&own);
        let veths = links.lines().filter(|line| line.contains("master mptest0")).filter(ours);
        found.extend(veths.map(|line| format!("link {line}")));
        let groups = self.cgroups().into_iter().filter(|group| group.to_string_lossy().contains(uid));
        found.extend(groups.map(|group| format!("cgroup {}", group.display())));
        let mut dirs = vec![self.run_dir(), self.data_dir()];
        while let Some(dir) = dirs.pop() {
            for path in entries(&dir) {
                if path.file_name().is_some_and(|name| name.to_string_lossy().contains(uid)) {
                    found.push(format!("file {}", path.display()));
                } else if path.is_dir() && !path.is_symlink() && !path.ends_with("layers") {
                    dirs.push(path);
                }
            }
        }
        found
    }

    /// Waits until nothing of the pod is left; the kernel takes its time with namespaces.
    pub async fn wait_gone(&self, uid: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let traces = self.traces_of(uid);
            if traces.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "{traces:#?} is left\n{}", self.describe(uid));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// All cgroups of this node in all hierarchies, outer ones first.
    fn cgroups(&self) -> Vec<PathBuf> {
        let base = Path::new("/sys/fs/cgroup");
        let mut roots = vec![base.to_owned()];
        roots.extend(entries(base).into_iter().filter(|path| path.is_dir()));
        // The agent may itself be in a group: look below that one too.
        let mut all = Vec::new();
        let mut dirs: Vec<PathBuf> = roots;
        let mut seen = std::collections::HashSet::new();
        while let Some(dir) = dirs.pop() {
            for path in entries(&dir).into_iter().filter(|path| path.is_dir() && !path.is_symlink()) {
                if seen.insert(path.clone()) {
                    if path.to_string_lossy().contains(&self.cgroup_root) {
                        all.push(path.clone());
                    }
                    dirs.push(path);
                }
            }
        }
        all.sort();
        all
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.agent_log();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("the agent's last words:\n{}", lines[lines.len().saturating_sub(80)..].join("\n"));
        }
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
        for pod in entries(&self.run_dir().join("pods")) {
            let uid = pod.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Err(error) = cleanup::clean_up(&pod, &self.cgroup_root, &uid) {
                eprintln!("clean up {uid}: {error}");
            }
        }
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
        let dir = self.dir.to_string_lossy().into_owned();
        for point in
            mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).filter(|point| point.starts_with(&dir))
        {
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
        for group in self.cgroups().iter().rev() {
            let _ = fs::remove_dir(group);
        }
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

pub fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

// ------------------------------------------------------------------------------------------------------------ pods

/// A pod of a manifest, as the API server would send it: defaulted, with uid and namespace.
pub fn pod(yaml: &str, uid: &str) -> Pod {
    let objects = minipod_proto::manifest::parse(yaml).unwrap_or_else(|problems| panic!("{problems}\n{yaml}"));
    let mut object: Object = objects.into_iter().next().expect("one object");
    minipod_proto::defaults::apply(&mut object);
    let Some(object::Kind::Pod(mut pod)) = object.kind else { panic!("not a pod: {yaml}") };
    let meta = pod.metadata.get_or_insert_default();
    meta.uid = uid.to_owned();
    if meta.namespace.is_empty() {
        meta.namespace = "default".to_owned();
    }
    pod
}

/// An example of deploy/examples.
pub fn example(name: &str) -> Pod {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples").join(format!("{name}.yaml"));
    let text = fs::read_to_string(&file).unwrap_or_else(|error| panic!("read {}: {error}", file.display()));
    pod(&text, &format!("uid-{name}"))
}

/// A pod of shell scripts: `i` init, `s` sidecar, else an app; `kind:name` and the script.
pub fn scripts(uid: &str, restart: &str, grace_s: u32, containers: &[(&str, &str)]) -> Pod {
    let mut yaml = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {uid}}}\nspec:\n  restartPolicy: {restart}\n  \
         terminationGracePeriodSeconds: {grace_s}\n  volumes: [{{name: v, emptyDir: {{}}}}]\n"
    );
    for (list, kinds) in [("initContainers", &["i", "s"][..]), ("containers", &["a"])] {
        let of_list: Vec<_> = containers
            .iter()
            .filter_map(|(name, script)| name.split_once(':').map(|(kind, name)| (kind, name, script)))
            .filter(|(kind, _, _)| kinds.contains(kind))
            .collect();
        if !of_list.is_empty() {
            yaml += &format!("  {list}:\n");
        }
        for (kind, name, script) in of_list {
            let policy = if kind == "s" { "\n      restartPolicy: Always" } else { "" };
            yaml += &format!(
                "    - name: {name}\n      image: minipod.local/busybox\n      imagePullPolicy: Never{policy}\n      \
                 command: [\"sh\", \"-c\"]\n      args: [{}]\n      volumeMounts: [{{name: v, mountPath: /v}}]\n",
                serde_json::to_string(script).expect("a string")
            );
        }
    }
    pod(&yaml, uid)
}

/// The status of a container, of the init list too.
pub fn container<'a>(status: &'a PodStatus, name: &str) -> &'a minipod_proto::v1::ContainerStatus {
    let mut all = status.init_container_statuses.iter().chain(&status.container_statuses);
    all.find(|container| container.name == name).unwrap_or_else(|| panic!("no status of {name}: {status:#?}"))
}

/// CPU and memory, as much requested as allowed.
pub fn requirements(cpu: &str, memory: &str) -> Option<ResourceRequirements> {
    let map = [("cpu".to_owned(), cpu.to_owned()), ("memory".to_owned(), memory.to_owned())];
    Some(ResourceRequirements { limits: map.clone().into(), requests: map.into() })
}

/// The resources that the node says are in force.
pub fn in_force(status: &PodStatus, name: &str) -> Option<ResourceRequirements> {
    container(status, name).resources.clone()
}

/// What the kernel holds a process' group to: CPU quota per 100 ms in microseconds, memory in bytes.
pub fn limits_of(pid: u32) -> (u64, u64) {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("its groups");
    let path = |controller: &str| -> PathBuf {
        let line = |name: &str| {
            groups.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let names = parts.next()?;
                let hit = if name.is_empty() { names.is_empty() } else { names.split(',').any(|one| one == name) };
                hit.then(|| parts.next())?
            })
        };
        match line(controller) {
            Some(path) => mount_of(controller).join(path.trim_start_matches('/')),
            None => mount_of("").join(line("").expect("version 2").trim_start_matches('/')),
        }
    };
    let read = |dir: PathBuf, names: [&str; 2]| {
        let text = names.iter().find_map(|name| fs::read_to_string(dir.join(name)).ok());
        let text = text.unwrap_or_else(|| panic!("{names:?} in {}", dir.display()));
        text.split_ascii_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(u64::MAX)
    };
    (read(path("cpu"), ["cpu.cfs_quota_us", "cpu.max"]), read(path("memory"), ["memory.limit_in_bytes", "memory.max"]))
}

/// Where a version 1 controller is mounted, or with an empty name version 2.
fn mount_of(controller: &str) -> PathBuf {
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").expect("mounts");
    let found = mounts.lines().find_map(|line| {
        let (head, tail) = line.split_once(" - ")?;
        let (kind, options) = (tail.split(' ').next()?, tail.split(' ').nth(2)?);
        let hit = match (kind, controller) {
            ("cgroup2", "") => true,
            ("cgroup", name) => options.split(',').any(|option| option == name),
            _ => false,
        };
        hit.then(|| head.split(' ').nth(4).map(Path::new).map(Path::to_owned))?
    });
    found.unwrap_or_else(|| panic!("{controller:?} is not mounted:\n{mounts}"))
}

/// The pod with other resources of `app`, as the API server grants them.
pub fn resized(pod: &Pod, resources: Option<ResourceRequirements>) -> Pod {
    let mut pod = pod.clone();
    let found = pod.spec_mut().containers.iter_mut().find(|one| one.name == "app");
    found.expect("app").resources = resources;
    pod.metadata.get_or_insert_default().generation += 1;
    pod
}

pub fn running(status: &minipod_proto::v1::ContainerStatus) -> Option<&minipod_proto::v1::ContainerStateRunning> {
    status.state.as_ref()?.running.as_ref()
}

pub fn terminated(status: &minipod_proto::v1::ContainerStatus) -> Option<&minipod_proto::v1::ContainerStateTerminated> {
    status.state.as_ref()?.terminated.as_ref()
}

/// Whether the container of that name has ended.
pub fn ended(name: &'static str) -> impl Fn(&PodStatus) -> bool {
    move |status| terminated(container(status, name)).is_some()
}

pub fn last(status: &minipod_proto::v1::ContainerStatus) -> Option<&minipod_proto::v1::ContainerStateTerminated> {
    status.last_state.as_ref()?.terminated.as_ref()
}

pub fn waiting_reason(status: &minipod_proto::v1::ContainerStatus) -> Option<&str> {
    Some(status.state.as_ref()?.waiting.as_ref()?.reason.as_str())
}

/// Kills a process hard.
pub fn kill_9(pid: u32) {
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).expect("kill -9");
}
