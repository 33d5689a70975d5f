//! `cargo xtask compose up|down|test [--store embedded|etcd]`: the cluster of deploy/compose.yaml, with the second file for the store.

use crate::images::{copy, make_dir, shared_libraries};
use crate::{images, run, setup};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Compose's name for what it makes: containers are `minipod_node-1_1`.
const PROJECT: &str = "minipod";
const IMAGES: &[&str] = &["etcd", "apiserver", "scheduler", "node"];
const NODES: &[&str] = &["node-1", "node-2", "node-3"];
const SERVERS: [&str; 3] = ["api-1", "api-2", "api-3"];
/// Prefix of the pods' cgroups in deploy/compose.yaml; the host's tree outlives the containers.
const CGROUPS: &str = "minipod-compose-";
/// Every pod has one; the one that waits for a pod has another command line.
const SUPERVISOR: &str = "minipod-podshim --dir";
const START_TIMEOUT: Duration = Duration::from_secs(90);

/// Where the objects are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// By the API servers themselves.
    Embedded,
    /// In an etcd.
    Etcd,
}

impl Store {
    /// Of the flags behind the verb.
    ///
    /// # Errors
    /// When they are not what is known.
    pub fn of(flags: &[&str]) -> Result<Self, String> {
        match flags {
            [] | ["--store", "embedded"] | ["--store=embedded"] => Ok(Self::Embedded),
            ["--store", "etcd"] | ["--store=etcd"] => Ok(Self::Etcd),
            other => Err(format!("compose: {}: want --store embedded or --store etcd, or nothing", other.join(" "))),
        }
    }

    fn file(self) -> &'static str {
        match self {
            Self::Embedded => "compose.embedded.yaml",
            Self::Etcd => "compose.etcd.yaml",
        }
    }
}

/// One of `up`, `down`, `test`.
///
/// # Errors
/// When docker is missing or a step fails.
pub fn run(verb: &str, store: Store) -> Result<(), String> {
    setup::install(setup::BASE)?;
    setup::install(setup::DOCKER)?;
    match verb {
        "up" => {
            let cluster = Cluster { store, ports: ["7650", "7651", "7652"].map(str::to_owned) };
            cluster.up()?;
            cluster.tell();
            Ok(())
        }
        "down" => down(),
        _ => test(store),
    }
}

/// One that is up, or will be.
struct Cluster {
    store: Store,
    /// Of the API servers, on this machine.
    ports: [String; 3],
}

impl Cluster {
    fn up(&self) -> Result<(), String> {
        run::step("build the binaries");
        run::cargo(&["build", "--workspace", "--bins"])?;
        images::build_base()?;
        build_images()?;
        make_certificates()?;
        run::step(&format!("start the cluster, store: {:?}", self.store));
        run::command(self.compose().args(["up", "-d"]))?;
        wait("three ready nodes", || {
            let nodes = self.minictl(&["get", "nodes"])?;
            let ready = nodes.lines().filter(|line| line.split_whitespace().nth(1) == Some("Ready")).count();
            if ready == NODES.len() { Ok(()) } else { Err(format!("{ready} nodes are ready:\n{nodes}")) }
        })?;
        for image in ["busybox", "toolbox"] {
            let archive = images::dir().join(format!("{image}.oci.tar"));
            eprint!("{}", self.minictl(&["image", "load", &archive.to_string_lossy()])?);
        }
        Ok(())
    }

    fn tell(&self) {
        let minictl = run::bin_dir().join("minictl");
        let minictl = minictl.display();
        eprintln!("the cluster is up; try:\n  export MINIPOD_SERVER={}", self.servers());
        eprintln!("  {minictl} get nodes\n  {minictl} apply -f deploy/examples/helloworld.yaml");
        eprintln!("break it and watch it heal:\n  docker kill {PROJECT}_api-1_1; {minictl} get pods -o wide");
        eprintln!("  docker start {PROJECT}_api-1_1");
        eprintln!("and when you are done: cargo xtask compose down");
    }

    /// For minictl.
    fn servers(&self) -> String {
        self.ports.iter().map(|port| format!("http://127.0.0.1:{port}")).collect::<Vec<_>>().join(",")
    }

    fn minictl(&self, args: &[&str]) -> Result<String, String> {
        minictl(&self.servers(), args)
    }

    fn compose(&self) -> Command {
        let mut command = compose(&[self.store.file()]);
        for (index, port) in self.ports.iter().enumerate() {
            command.env(format!("MINIPOD_PORT_{}", index + 1), port);
        }
        command
    }
}

/// Takes everything down, also what is left of a cluster that broke, whichever store it had.
fn down() -> Result<(), String> {
    let both = [Store::Embedded.file(), Store::Etcd.file()];
    let taken_down = run::command(compose(&both).args(["down", "--volumes", "--timeout", "20"]));
    let cleaned = remove_cgroups(Path::new("/sys/fs/cgroup"));
    taken_down.and(cleaned)
}

/// From outside: apply, wait, read logs; on the node: the pod's processes; then a killed container, a killed API server, and deletion.
fn test(store: Store) -> Result<(), String> {
    let cluster = Cluster { store, ports: [free_port()?, free_port()?, free_port()?] };
    let outcome = cluster.up().and_then(|()| cluster.check());
    if outcome.is_err() {
        // What the cluster said last is what one needs to know.
        let _ = run::command(cluster.compose().args(["logs", "--tail", "40"]));
    }
    let down = down();
    outcome.and(down)
}

impl Cluster {
    fn check(&self) -> Result<(), String> {
        let example = run::root().join("deploy/examples/helloworld.yaml");
        run::step("apply helloworld from outside the cluster");
        eprint!("{}", self.minictl(&["apply", "-f", &example.to_string_lossy()])?);
        let node = wait("helloworld to run on a node", || self.running())?;
        wait("the log container to print main's journal", || {
            let journal = self.minictl(&["logs", "helloworld", "-c", "log"])?;
            let works = journal.contains("hello from api") && journal.contains("3 * 3 = 9");
            if works { Ok(()) } else { Err(format!("the journal is:\n{journal}")) }
        })?;

        run::step(&format!("look at the processes on {node}"));
        let before = processes(&node)?;
        for (what, mark) in
            [("supervisor", SUPERVISOR), ("api", "httpd -f"), ("compute", "compute.sock"), ("main", "main: started")]
        {
            if !before.iter().any(|process| process.command.contains(mark)) {
                return Err(format!("{node} runs no {what} ({mark:?}) among:\n{}", shown(&before)));
            }
        }

        run::step("kill -9 main: only main starts again");
        let main = find(&before, "main: started")?;
        run::output(Command::new("kill").args(["-9", &main.pid]))?;
        let after = wait("main to start again", || {
            let now = processes(&node)?;
            let again = find(&now, "main: started")?.pid != main.pid;
            if again { Ok(now) } else { Err("main is still the one that was killed".to_owned()) }
        })?;
        for mark in ["httpd -f", SUPERVISOR] {
            let (old, new) = (find(&before, mark)?, find(&after, mark)?);
            if old.pid != new.pid {
                return Err(format!("{mark:?} was {} and is {}: it was restarted too", old.pid, new.pid));
            }
        }

        self.survive(&node, &after)?;

        run::step("delete it: nothing of it stays on the node");
        self.minictl(&["delete", "pod", "helloworld"])?;
        wait("the pod's processes to be gone", || {
            let left = processes(&node)?;
            let left: Vec<Process> = left.into_iter().filter(|p| p.command.contains(SUPERVISOR)).collect();
            if left.is_empty() { Ok(()) } else { Err(format!("still there:\n{}", shown(&left))) }
        })
    }

    /// An API server dies: the pod does not notice, and the others serve it, wherever its node's session was. Then it is back.
    fn survive(&self, node: &str, before: &[Process]) -> Result<(), String> {
        let [victim, others @ ..] = SERVERS;
        run::step(&format!("kill {victim}: the others serve, the pod does not notice"));
        let container = format!("{PROJECT}_{victim}_1");
        run::output(Command::new("docker").args(["kill", &container]))?;
        for (name, port) in others.iter().zip(&self.ports[1..]) {
            Self::reach(name, port)?;
        }
        let now = processes(node)?;
        for mark in ["httpd -f", "main: started", SUPERVISOR] {
            let (old, new) = (find(before, mark)?, find(&now, mark)?);
            if old.pid != new.pid {
                return Err(format!("{mark:?} was {} and is {}: it was restarted", old.pid, new.pid));
            }
        }
        run::output(Command::new("docker").args(["start", &container]))?;
        Self::reach(victim, &self.ports[0])
    }

    /// Runs a program in the pod by way of one API server.
    fn reach(name: &str, port: &str) -> Result<(), String> {
        let server = format!("http://127.0.0.1:{port}");
        wait(&format!("a program in the pod to run by way of {name}"), || {
            let said = minictl(&server, &["exec", "helloworld", "-c", "main", "--", "hostname"])?;
            if said.trim() == "helloworld" { Ok(()) } else { Err(format!("it says {said:?}")) }
        })
    }

    /// The node that helloworld runs on, once all four of its containers are ready.
    fn running(&self) -> Result<String, String> {
        let table = self.minictl(&["get", "pod", "helloworld", "-o", "wide"])?;
        let row: Vec<&str> = table.lines().nth(1).unwrap_or_default().split_whitespace().collect();
        let node = NODES.iter().find(|node| row.contains(node));
        match node {
            Some(node) if row.contains(&"4/4") && row.contains(&"Running") => Ok((*node).to_owned()),
            _ => Err(format!("the pod is not running:\n{table}")),
        }
    }
}

struct Process {
    pid: String,
    command: String,
}

/// Processes of a node's container, seen from this machine.
fn processes(node: &str) -> Result<Vec<Process>, String> {
    let container = format!("{PROJECT}_{node}_1");
    let table = run::output(Command::new("docker").args(["top", &container, "-eo", "pid,args"]))?;
    let process = |line: &str| {
        let (pid, command) = line.trim_start().split_once(' ')?;
        Some(Process { pid: pid.to_owned(), command: command.to_owned() })
    };
    Ok(table.lines().skip(1).filter_map(process).collect())
}

fn find<'a>(processes: &'a [Process], mark: &str) -> Result<&'a Process, String> {
    let found = processes.iter().find(|process| process.command.contains(mark));
    found.ok_or_else(|| format!("no process with {mark:?} among:\n{}", shown(processes)))
}

fn shown(processes: &[Process]) -> String {
    processes.iter().map(|process| format!("  {} {}\n", process.pid, process.command)).collect()
}

fn minictl(servers: &str, args: &[&str]) -> Result<String, String> {
    let mut command = Command::new(run::bin_dir().join("minictl"));
    run::output(command.args(args).env("MINIPOD_SERVER", servers))
}

fn compose(stores: &[&str]) -> Command {
    let mut command = Command::new("docker-compose");
    for file in ["compose.yaml"].iter().chain(stores) {
        command.arg("--file").arg(run::root().join("deploy").join(file));
    }
    command.args(["--project-name", PROJECT]).env("MINIPOD_CERTS", certs());
    command
}

/// Where the certificates of the store's members are.
fn certs() -> PathBuf {
    run::target().join("compose/certs")
}

/// Makes them once; they are good for ten years.
fn make_certificates() -> Result<(), String> {
    if certs().join("api-3.pem").is_file() {
        return Ok(());
    }
    // Half of them would be refused to be written over.
    if certs().exists() {
        fs::remove_dir_all(certs()).map_err(|e| format!("remove {}: {e}", certs().display()))?;
    }
    let members: Vec<String> = SERVERS.iter().map(|name| format!("{name}=https://{name}:7660")).collect();
    let mut command = Command::new(run::bin_dir().join("minipod-store"));
    command.arg("certs").arg(certs()).args(["--members", &members.join(",")]);
    run::output(&mut command).map(drop)
}

/// Tries until it works; the last refusal is in the error.
fn wait<T>(what: &str, mut attempt: impl FnMut() -> Result<T, String>) -> Result<T, String> {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(last) if start.elapsed() > START_TIMEOUT => {
                return Err(format!("waited {} s for {what}: {last}", START_TIMEOUT.as_secs()));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(300)),
        }
    }
}

/// A port that nobody listens on at this moment.
fn free_port() -> Result<String, String> {
    let bound = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    bound.map(|address| address.port().to_string()).map_err(|e| format!("find a free port: {e}"))
}

// ---------------------------------------------------------------------------------------------------------- images

/// Lays out the context and has docker build the four images.
fn build_images() -> Result<(), String> {
    run::step("build the cluster's images");
    let context = run::target().join("compose/context");
    if context.exists() {
        fs::remove_dir_all(&context).map_err(|e| format!("remove {}: {e}", context.display()))?;
    }
    let etcd = run::find("etcd").ok_or("etcd is not installed: run `cargo xtask setup`")?;
    with_libraries(&etcd, Path::new("usr/bin/etcd"), &context.join("etcd"))?;
    strip(&binary("minipod-apiserver"), &context.join("apiserver/minipod-apiserver"))?;
    strip(&binary("minipod-scheduler"), &context.join("scheduler/minipod-scheduler"))?;
    let node = context.join("node");
    for name in ["minipod-nodeagent", "minipod-podshim", "minipod-pause"] {
        strip(&binary(name), &node.join("usr/bin").join(name))?;
    }
    let nft = run::find("nft").ok_or("nft is not installed: run `cargo xtask setup`")?;
    with_libraries(&nft, Path::new("usr/sbin/nft"), &node)?;
    let dockerfile = run::root().join("deploy/Dockerfile");
    for target in IMAGES {
        let mut build = Command::new("docker");
        build.args(["build", "--quiet", "--target", target, "--tag", &format!("minipod.local/compose/{target}")]);
        run::output(build.arg("--file").arg(&dockerfile).arg(&context))?;
    }
    Ok(())
}

fn binary(name: &str) -> PathBuf {
    run::bin_dir().join(name)
}

/// Debug builds carry line tables that an image has no use for.
fn strip(from: &Path, to: &Path) -> Result<(), String> {
    make_dir(to.parent().unwrap_or(Path::new("/")))?;
    run::output(Command::new("strip").arg("-o").arg(to).arg(from)).map(|_| ())
}

fn with_libraries(program: &Path, place: &Path, root: &Path) -> Result<(), String> {
    copy(program, &root.join(place))?;
    for library in shared_libraries(program)? {
        copy(&library, &root.join(library.strip_prefix("/").unwrap_or(&library)))?;
    }
    Ok(())
}

// --------------------------------------------------------------------------------------------------------- cgroups

/// Removes the pods' empty cgroups of every hierarchy: they are made in the host's tree and docker does not know them.
fn remove_cgroups(root: &Path) -> Result<(), String> {
    let mounted = fs::read_dir(root).map_err(|e| format!("read {}: {e}", root.display()))?;
    let hierarchies = mounted.flatten().map(|entry| entry.path()).chain([root.to_path_buf()]);
    for hierarchy in hierarchies.filter(|path| path.is_dir() && !path.is_symlink()) {
        for entry in fs::read_dir(&hierarchy).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(CGROUPS) {
                remove_cgroup(&entry.path())?;
            }
        }
    }
    Ok(())
}

fn remove_cgroup(dir: &Path) -> Result<(), String> {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(format!("remove cgroup {}: {e}", dir.display())),
        _ => Ok(()),
    }
}
