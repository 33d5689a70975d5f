//! `cargo xtask compose up|down|test`: the cluster of deploy/compose.yaml.

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
/// Prefix of the pods' cgroups in deploy/compose.yaml; the host's tree outlives the containers.
const CGROUPS: &str = "minipod-compose-";
/// Every pod has one.
const SUPERVISOR: &str = "minipod-podshim";
const START_TIMEOUT: Duration = Duration::from_secs(90);

/// One of `up`, `down`, `test`.
///
/// # Errors
/// When docker is missing or a step fails.
pub fn run(verb: &str) -> Result<(), String> {
    setup::install(setup::BASE)?;
    setup::install(setup::DOCKER)?;
    match verb {
        "up" => up(&port()),
        "down" => down(),
        _ => test(),
    }
}

/// Where the API server is reached on this machine.
fn port() -> String {
    std::env::var("MINIPOD_PORT").unwrap_or_else(|_| "7650".to_owned())
}

fn up(port: &str) -> Result<(), String> {
    run::step("build the binaries");
    run::cargo(&["build", "--workspace", "--bins"])?;
    images::build_all()?;
    build_images()?;
    run::step("start the cluster");
    run::command(compose(port).args(["up", "-d"]))?;
    wait("three ready nodes", || {
        let nodes = minictl(port, &["get", "nodes"])?;
        let ready = nodes.lines().filter(|line| line.split_whitespace().nth(1) == Some("Ready")).count();
        if ready == NODES.len() { Ok(()) } else { Err(format!("{ready} nodes are ready:\n{nodes}")) }
    })?;
    for image in ["busybox", "toolbox"] {
        let archive = images::dir().join(format!("{image}.oci.tar"));
        eprint!("{}", minictl(port, &["image", "load", &archive.to_string_lossy()])?);
    }
    let minictl = run::bin_dir().join("minictl");
    eprintln!("the cluster is up; try:\n  export MINIPOD_SERVER=http://127.0.0.1:{port}");
    eprintln!("  {} get nodes\n  {} apply -f deploy/examples/helloworld.yaml", minictl.display(), minictl.display());
    eprintln!("and when you are done: cargo xtask compose down");
    Ok(())
}

/// Takes everything down, also what is left of a cluster that broke.
fn down() -> Result<(), String> {
    let taken_down = run::command(compose(&port()).args(["down", "--volumes", "--timeout", "20"]));
    let cleaned = remove_cgroups(Path::new("/sys/fs/cgroup"));
    taken_down.and(cleaned)
}

/// From outside: apply, wait, read logs; on the node: the pod's processes; then a killed container, and deletion.
fn test() -> Result<(), String> {
    let port = free_port()?;
    let outcome = up(&port).and_then(|()| check(&port));
    if outcome.is_err() {
        // What the cluster said last is what one needs to know.
        let _ = run::command(compose(&port).args(["logs", "--tail", "40"]));
    }
    let down = down();
    outcome.and(down)
}

fn check(port: &str) -> Result<(), String> {
    let example = run::root().join("deploy/examples/helloworld.yaml");
    run::step("apply helloworld from outside the cluster");
    eprint!("{}", minictl(port, &["apply", "-f", &example.to_string_lossy()])?);
    let node = wait("helloworld to run on a node", || running(port))?;
    wait("the log container to print main's journal", || {
        let journal = minictl(port, &["logs", "helloworld", "-c", "log"])?;
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

    run::step("delete it: nothing of it stays on the node");
    minictl(port, &["delete", "pod", "helloworld"])?;
    wait("the pod's processes to be gone", || {
        let left = processes(&node)?;
        let left: Vec<Process> = left.into_iter().filter(|p| p.command.contains(SUPERVISOR)).collect();
        if left.is_empty() { Ok(()) } else { Err(format!("still there:\n{}", shown(&left))) }
    })
}

/// The node that helloworld runs on, once all four of its containers are ready.
fn running(port: &str) -> Result<String, String> {
    let table = minictl(port, &["get", "pod", "helloworld", "-o", "wide"])?;
    let row: Vec<&str> = table.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    let node = NODES.iter().find(|node| row.contains(node));
    match node {
        Some(node) if row.contains(&"4/4") && row.contains(&"Running") => Ok((*node).to_owned()),
        _ => Err(format!("the pod is not running:\n{table}")),
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

fn minictl(port: &str, args: &[&str]) -> Result<String, String> {
    let mut command = Command::new(run::bin_dir().join("minictl"));
    run::output(command.args(args).env("MINIPOD_SERVER", format!("http://127.0.0.1:{port}")))
}

fn compose(port: &str) -> Command {
    let mut command = Command::new("docker-compose");
    command.arg("--file").arg(run::root().join("deploy/compose.yaml")).args(["--project-name", PROJECT]);
    command.env("MINIPOD_PORT", port);
    command
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
