//! Benchmarks of a whole cluster on this machine: `minipod-bench podstart|footprint|density|access|schedule-e2e`. Figures go to
//! standard output, one `key value` a line; `cargo xtask bench NAME` builds for release, runs this, prints a table and writes the JSON.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Parser};
use minictl::local::{NodeOptions, Options, Store};
use minipod_client::{ChangeKind, DeleteOptions, Query};
use minipod_proto::Resource;
use minipod_proto::v1::Pod;
use minipod_tests::cluster::{Cluster, bin_dir, pod};
use minipod_tests::e2e::{board, limits, measure, questions, workload};
use minipod_tests::hands;
use minipod_tests::kernel::{self, Process};
use minipod_tests::podman::Podman;

/// Pods of one kind that are started in a row, before as many of the other kind: a node that starts pods has its own programs in the
/// processor's caches, and not another system's.
const BLOCK: usize = 5;
/// Blocks of each kind; the first one does not count.
const BLOCKS: usize = 7;
/// Pods that are there while the footprint is taken.
const RESTING_PODS: usize = 20;
/// How long CPU time at rest is counted.
const REST: Duration = Duration::from_secs(10);
/// Clock ticks of /proc a second (sysconf(_SC_CLK_TCK) is 100 on every Linux that we run on).
const TICKS_PER_S: f64 = 100.0;

/// What to measure.
#[derive(Debug, Parser)]
enum Bench {
    /// From a create to Running, beside podman.
    Podstart,
    /// What daemons and resting pods cost, beside podman.
    Footprint,
    /// A thousand pods on one node: how fast they come and go, and what they cost at rest.
    Density {
        /// How many pods; the node's bridge has 1,023 ports.
        #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=1000))]
        pods: u32,
    },
    /// Programs run in a container, and the throughput of its log.
    Access,
    /// From a create to the node's watch, with hollow nodes.
    ScheduleE2e(Flags),
}

#[derive(Debug, Args)]
struct Flags {
    /// embedded, etcd or both.
    #[arg(long, default_value = "both", value_parser = ["embedded", "etcd", "both"])]
    store: String,
    /// Workloads, separated by commas, or limits, or questions; all by default.
    #[arg(long, value_delimiter = ',')]
    workload: Vec<String>,
    /// A tenth of the nodes and pods.
    #[arg(long)]
    quick: bool,
    /// Where the stores keep their data: on a disk, for they sync to it.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
}

#[tokio::main]
async fn main() -> ExitCode {
    let (name, done) = match Bench::parse() {
        Bench::Podstart => ("podstart", {
            podstart().await;
            Ok(())
        }),
        Bench::Footprint => ("footprint", {
            footprint().await;
            Ok(())
        }),
        Bench::Density { pods } => ("density", density(pods as usize).await),
        Bench::Access => ("access", access().await),
        Bench::ScheduleE2e(flags) => ("schedule-e2e", schedule_e2e(&flags).await),
    };
    if let Err(error) = done {
        eprintln!("minipod-bench {name}: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

async fn access() -> Result<(), String> {
    let cluster = one_node().await;
    let figures = hands::run(&cluster).await;
    cluster.local.stop().expect("taken down");
    figures?.into_iter().for_each(|(key, value)| figure(key, value));
    Ok(())
}

async fn schedule_e2e(flags: &Flags) -> Result<(), String> {
    let names: Vec<&str> =
        workload::ALL.iter().map(|workload| workload.name).chain([limits::NAME, questions::NAME]).collect();
    if let Some(unknown) = flags.workload.iter().find(|wanted| !names.contains(&wanted.as_str())) {
        return Err(format!("--workload: there is no {unknown:?}; there are {}", names.join(", ")));
    }
    let wanted = |name: &str| flags.workload.is_empty() || flags.workload.iter().any(|wanted| wanted == name);
    let divisor = if flags.quick { 10 } else { 1 };
    for (name, prefix, store) in [("embedded", "", Store::Embedded), ("etcd", "etcd_", Store::Etcd)] {
        if flags.store != name && flags.store != "both" {
            continue;
        }
        let show = |what: &str, figures: Result<measure::Figures, String>| -> Result<(), String> {
            let figures = figures.map_err(|error| format!("{name}: {what}: {error}"))?;
            figures.iter().for_each(|(key, value)| figure(&format!("{prefix}{key}"), *value));
            Ok(())
        };
        for workload in workload::ALL.iter().filter(|workload| wanted(workload.name)) {
            show(workload.name, measure::run(&workload.divided(divisor), store, &flags.dir).await)?;
        }
        if wanted(limits::NAME) {
            show(limits::NAME, limits::run(store, &flags.dir, divisor).await)?;
        }
        if wanted(questions::NAME) {
            show(questions::NAME, questions::run(store, &flags.dir, divisor).await)?;
        }
    }
    Ok(())
}

fn figure(key: &str, value: f64) {
    println!("{key} {value:.2}");
}

async fn one_node() -> Cluster {
    let node =
        NodeOptions { name: "node".into(), allocatable: "cpu=64,memory=64Gi,pods=1100".into(), ..Default::default() };
    Cluster::start_with(Options::new(bin_dir(), vec![node])).await
}

// --------------------------------------------------------------------------------------------------------- podstart

/// Pause, one init container and two apps; the images are there.
fn measured_pod(name: &str) -> Pod {
    pod(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 0
  initContainers:
  - {{name: init, image: minipod.local/busybox, imagePullPolicy: IfNotPresent, command: ['true']}}
  containers:
  - {{name: one, image: minipod.local/busybox, imagePullPolicy: IfNotPresent, command: [sleep, infinity]}}
  - {{name: two, image: minipod.local/busybox, imagePullPolicy: IfNotPresent, command: [sleep, infinity]}}
"
    ))
}

/// Before each start.
const SETTLE: Duration = Duration::from_millis(500);

/// From the acknowledgement of the create to what a watcher sees.
struct Start {
    bound: Duration,
    running: Duration,
}

async fn start_one(cluster: &Cluster, name: &str) -> Start {
    let client = cluster.client();
    let created = client.create(measured_pod(name)).await.unwrap_or_else(|error| panic!("create {name}: {error}"));
    let acknowledged = Instant::now();
    let revision = created.meta().resource_version.parse().expect("a revision is a number");
    let query = Query::namespace("default").with_fields(format!("metadata.name={name}"));
    let mut watch = client.watch::<Pod>(&query, revision).await.expect("watch");
    let mut bound = None;
    loop {
        let change = watch.next().await.expect("the watch lives").expect("the watch goes on");
        let (ChangeKind::Added(pod) | ChangeKind::Modified(pod)) = change.kind else { continue };
        if pod.node_name().is_some() {
            bound.get_or_insert_with(|| acknowledged.elapsed());
        }
        if pod.status().phase == "Running" && pod.condition_true("Ready") {
            let running = acknowledged.elapsed();
            return Start { bound: bound.unwrap_or(running), running };
        }
    }
}

/// Lets the kernel end what a pod's removal leaves it to do in the background, its network namespace above all: it is the former
/// pod's, ours or podman's, and not to count for the next one.
async fn settle() {
    tokio::time::sleep(SETTLE).await;
}

async fn delete(cluster: &Cluster, name: &str) {
    let now = DeleteOptions { grace_seconds: Some(0), ..DeleteOptions::default() };
    let deleted = cluster.client().delete::<Pod>("default", name, &now).await;
    deleted.unwrap_or_else(|error| panic!("delete {name}: {error}"));
}

async fn podstart() {
    let cluster = one_node().await;
    let podman = Podman::prepare();
    let (mut end_to_end, mut bound, mut node, mut theirs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for block in 0..BLOCKS {
        let names: Vec<String> = (0..BLOCK).map(|pod| format!("bench-{block}-{pod}")).collect();
        for name in &names {
            settle().await;
            let start = start_one(&cluster, name).await;
            delete(&cluster, name).await;
            if block > 0 {
                end_to_end.push(millis(start.running));
                bound.push(millis(start.bound));
                node.push(millis(start.running - start.bound));
            }
        }
        for name in &names {
            settle().await;
            let podmans = podman.start_pod(name);
            podman.remove_pod(name);
            if block > 0 {
                theirs.push(millis(podmans));
            }
        }
    }
    eprintln!(
        "podman's pod is infra and two containers, without the init container (podman 4.3 may wait 20 s for its exit)"
    );
    figure("pods", end_to_end.len() as f64);
    for (key, sample) in [("e2e", &mut end_to_end), ("bound", &mut bound), ("node", &mut node), ("podman", &mut theirs)]
    {
        figure(&format!("{key}_p50_ms"), percentile(sample, 50));
        figure(&format!("{key}_p99_ms"), percentile(sample, 99));
    }
    figure("podman_to_e2e_p50_ratio", percentile(&mut theirs, 50) / percentile(&mut end_to_end, 50));
    podman.clean_up();
    cluster.local.stop().expect("taken down");
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn percentile(sample: &mut [f64], percent: usize) -> f64 {
    sample.sort_by(f64::total_cmp);
    board::percentile(sample, percent)
}

// -------------------------------------------------------------------------------------------------------- footprint

async fn footprint() {
    let mut cluster = one_node().await;
    let mut uids = Vec::new();
    for index in 0..RESTING_PODS {
        let name = format!("rest-{index}");
        start_one(&cluster, &name).await;
        uids.push(cluster.pod(&name).await.expect("it is there").uid().to_owned());
    }
    tokio::time::sleep(Duration::from_secs(3)).await;
    let daemons = ["apiserver", "scheduler-0", "node"].map(|name| cluster.local.daemon(name).expect("it runs").pid());
    for (key, pid) in ["apiserver_rss_mb", "scheduler_rss_mb", "nodeagent_rss_mb"].iter().zip(daemons) {
        figure(key, kernel::rss_kb(pid).expect("it lives") as f64 / 1024.0);
    }
    let mine: f64 = uids.iter().map(|uid| overhead_kb(uid)).sum();
    figure("per_pod_pss_kb", mine / RESTING_PODS as f64);
    let ticks = || daemons.iter().filter_map(|pid| kernel::cpu_ticks(*pid)).sum::<u64>();
    let before = ticks();
    tokio::time::sleep(REST).await;
    figure("idle_cpu_pct", (ticks() - before) as f64 / TICKS_PER_S / REST.as_secs_f64() * 100.0);

    let podman = Podman::prepare();
    podman.start_pod("footprint");
    let conmons = kernel::processes_with_argument("/usr/bin/conmon").into_iter();
    let pauses = kernel::processes_with_argument("/catatonit -P").into_iter();
    let theirs: u64 = conmons.chain(pauses).filter_map(|process| kernel::pss_kb(process.pid)).sum();
    figure("podman_per_pod_pss_kb", theirs as f64);
    podman.remove_pod("footprint");
    podman.clean_up();
    cluster.local.stop().expect("taken down");
}

// ---------------------------------------------------------------------------------------------------------- density

/// Pause and one container. With a grace the node ends the pod before it is gone; without one the object would be gone first.
fn dense_pod(name: &str) -> Pod {
    pod(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {{name: app, image: minipod.local/busybox, imagePullPolicy: IfNotPresent, command: [sleep, infinity]}}
"
    ))
}

async fn density(pods: usize) -> Result<(), String> {
    let node =
        NodeOptions { name: "node".into(), allocatable: "cpu=64,memory=64Gi,pods=1100".into(), ..Default::default() };
    let mut options = Options::new(bin_dir(), vec![node]);
    options.apiserver_flags.push("--node-cidr-mask-size=21".to_owned());
    let mut cluster = Cluster::start_with(options).await;
    let client = cluster.client().clone();
    // The node is warm: its image is mounted, its cgroups and bridge are there.
    start_one(&cluster, "warm-up").await;
    delete(&cluster, "warm-up").await;

    let began = Instant::now();
    let list = client.list::<Pod>(&Query::namespace("default")).await.map_err(|error| error.to_string())?;
    let mut watch =
        client.watch::<Pod>(&Query::namespace("default"), list.revision).await.map_err(|e| e.to_string())?;
    let creator = client.clone();
    let create = async {
        // Sixteen at a time: enough that the API server is not what is waited for.
        let one = |index: usize| {
            let client = creator.clone();
            async move { client.create(dense_pod(&format!("dense-{index}"))).await }
        };
        let made = sixteen((0..pods).map(one)).await;
        made.into_iter().collect::<Result<Vec<Pod>, _>>().map_err(|error| error.to_string())
    };
    let see = async {
        let mut running = std::collections::HashSet::new();
        while running.len() < pods {
            let change = watch.next().await.map_err(|error| error.to_string())?.ok_or("the watch has ended")?;
            let (ChangeKind::Added(pod) | ChangeKind::Modified(pod)) = change.kind else { continue };
            if pod.status().phase == "Failed" {
                return Err(format!("{} failed: {}", pod.name(), pod.status().message));
            }
            if pod.status().phase == "Running" && pod.condition_true("Ready") {
                running.insert(pod.uid().to_owned());
            }
        }
        Ok::<f64, String>(began.elapsed().as_secs_f64())
    };
    let (created, seen) = tokio::join!(create, see);
    let (created, start_s) = (created?, seen?);
    figure("pods", pods as f64);
    figure("start_s", start_s);
    figure("pods_per_s", pods as f64 / start_s);

    tokio::time::sleep(Duration::from_secs(5)).await;
    let uids: Vec<String> = created.iter().map(|pod| pod.uid().to_owned()).collect();
    figure("per_pod_pss_kb", supervisors_kb() / pods as f64);
    let agent = cluster.local.daemon("node").ok_or("the agent runs")?.pid();
    let ticks = || kernel::cpu_ticks(agent).unwrap_or(0);
    let before = ticks();
    tokio::time::sleep(2 * REST).await;
    figure("agent_idle_cpu_pct", (ticks() - before) as f64 / TICKS_PER_S / (2 * REST).as_secs_f64() * 100.0);
    // Only now: at its next look at the machine the agent gives back what it needed for the starts.
    figure("agent_rss_mb", kernel::rss_kb(agent).ok_or("the agent lives")? as f64 / 1024.0);

    let began = Instant::now();
    let soon = DeleteOptions { grace_seconds: None, ..DeleteOptions::default() };
    let one = |pod: &Pod| {
        let (client, name, soon) = (client.clone(), pod.name().to_owned(), soon.clone());
        async move { client.delete::<Pod>("default", &name, &soon).await }
    };
    let deleted = sixteen(created.iter().map(one)).await;
    deleted.into_iter().collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())?;
    loop {
        let left =
            client.list::<Pod>(&Query::namespace("default")).await.map_err(|error| error.to_string())?.items.len();
        if left == 0 {
            break;
        }
        if began.elapsed() > Duration::from_secs(600) {
            return Err(format!("{left} pods are still there after ten minutes"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    figure("delete_s", began.elapsed().as_secs_f64());
    nothing_is_left(&uids).await?;
    cluster.local.stop().map_err(|error| error.to_string())
}

/// Does all of these, sixteen at a time.
async fn sixteen<T: Send + 'static>(jobs: impl Iterator<Item = impl Future<Output = T> + Send + 'static>) -> Vec<T> {
    let (mut running, mut done) = (tokio::task::JoinSet::new(), Vec::new());
    for job in jobs {
        if running.len() >= 16 {
            done.extend(running.join_next().await.and_then(Result::ok));
        }
        running.spawn(job);
    }
    while let Some(one) = running.join_next().await {
        done.extend(one.ok());
    }
    done
}

/// Supervisors and infra containers of this machine together.
fn supervisors_kb() -> f64 {
    let mut processes = kernel::processes_with_argument("minipod-podshim");
    processes.extend(kernel::processes_in_cgroup("/pause"));
    processes.sort_by_key(|process| process.pid);
    processes.dedup_by_key(|process| process.pid);
    processes.iter().filter_map(|process| kernel::pss_kb(process.pid)).sum::<u64>() as f64
}

/// Of all these pods no process, cgroup or mount is left; the kernel may take a moment.
async fn nothing_is_left(uids: &[String]) -> Result<(), String> {
    let began = Instant::now();
    loop {
        let processes = kernel::processes_with_argument("minipod-podshim").into_iter().map(|process| process.command);
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let groups = kernel::cgroup_directories();
        let all: Vec<String> = processes.chain(mounts.lines().map(str::to_owned)).chain(groups).collect();
        let left: Vec<&String> = all.iter().filter(|line| uids.iter().any(|uid| line.contains(uid))).collect();
        if left.is_empty() {
            return Ok(());
        }
        if began.elapsed() > Duration::from_secs(30) {
            return Err(format!("{} things are left of pods that are gone, such as {}", left.len(), left[0]));
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// What a pod costs beside its own containers: its supervisor and pause.
fn overhead_kb(uid: &str) -> f64 {
    let of_pod = |process: &Process| process.command.contains("minipod-podshim") || process.command == "pause";
    let mut processes = kernel::processes_with_argument(uid);
    processes.extend(kernel::processes_in_cgroup(uid));
    processes.sort_by_key(|process| process.pid);
    processes.dedup_by_key(|process| process.pid);
    let pss = processes.iter().filter(|process| of_pod(process)).filter_map(|process| kernel::pss_kb(process.pid));
    pss.sum::<u64>() as f64
}
