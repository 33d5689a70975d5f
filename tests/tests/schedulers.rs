//! Ten schedulers at once, some of them killed or stopped for a while: every pod is bound at most once, no node is ever over
//! its allocatable, and everything that fits is bound in the end. Six at two API servers, with rules between pods: no revision breaks one.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use minictl::local::Options;
use minipod_client::{ChangeKind, Client, Query};
use minipod_proto::Resource;
use minipod_proto::v1::{Node, Pod};
use minipod_tests::cluster::{Cluster, bin_dir, minictl, pod, text};
use minipod_tests::hollow::{HollowNode, Shape};
use minipod_tests::wait;
use tonic::transport::{Channel, Endpoint};

/// The scheduler's reference: it shares no code with what decides.
#[path = "../../scheduler/tests/reference/mod.rs"]
mod reference;

const NODES: usize = 50;
const PODS: usize = 2000;
/// A node of 3 CPUs takes 30 pods of 100m: 50 nodes take 1,500, and nothing is lost to fragments.
const FIT: usize = 1500;
const CPU_MILLI: i64 = 3000;
const POD_MILLI: i64 = 100;
/// Creates under way at a time: a user with a script, not a flood.
const CREATORS: usize = 16;

#[tokio::test(flavor = "multi_thread")]
async fn ten_schedulers_never_bind_twice_nor_overcommit_and_bind_all_that_fits() {
    let options = Options { schedulers: 10, ..Options::new(bin_dir(), Vec::new()) };
    let mut cluster = Cluster::start_with(options).await;
    let client = cluster.client().clone();
    let channel = Endpoint::from_shared(cluster.local.server().to_owned()).expect("an address").connect_lazy();
    let _nodes = join_nodes(channel).await;

    let revision = client.list::<Pod>(&Query::all()).await.expect("listed").revision;
    let audit = tokio::spawn(audit(client.clone(), revision));
    let created = tokio::spawn(create_pods(client.clone()));

    // Killed for good, killed in the middle of their work, and one that wakes up with a stale view.
    for name in ["scheduler-3", "scheduler-7"] {
        tokio::time::sleep(Duration::from_millis(300)).await;
        cluster.local.daemon(name).expect("it runs").kill();
    }
    cluster.local.daemon("scheduler-1").expect("it runs").pause(true);
    tokio::time::sleep(Duration::from_secs(2)).await;
    cluster.local.daemon("scheduler-1").expect("it runs").pause(false);
    created.await.expect("all pods are created");

    let bound = audit.await.expect("the audit found nothing wrong");
    assert_eq!(bound, FIT, "all that fit, and no more");
    wait::until("the rest to be told why", || async {
        let pods = client.list::<Pod>(&Query::all()).await.map_err(|error| error.to_string())?.items;
        let waiting: Vec<&Pod> = pods.iter().filter(|pod| pod.node_name().is_none()).collect();
        let told = |pod: &&&Pod| pod.condition("PodScheduled").is_some_and(|c| c.message.contains("cpu"));
        let told = waiting.iter().filter(told).count();
        if waiting.len() == PODS - FIT && told == waiting.len() {
            Ok(())
        } else {
            Err(format!("{} wait, {told} are told why", waiting.len()))
        }
    })
    .await;
    cluster.local.stop().expect("taken down");
}

/// A pod that asks for nothing but CPU.
fn cpu_pod(name: &str, cpu: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  containers:\n  - name: c\n    image: x\n    \
         resources: {{requests: {{cpu: {cpu}}}}}\n"
    )
}

async fn join_nodes(channel: Channel) -> Vec<HollowNode> {
    let mut nodes = Vec::new();
    for index in 0..NODES {
        let allocatable = [("cpu", "3"), ("memory", "64Gi"), ("pods", "110")];
        let joined = HollowNode::join(channel.clone(), &format!("hollow-{index}"), &allocatable).await;
        nodes.push(joined.unwrap_or_else(|status| panic!("hollow-{index}: {status}")));
    }
    nodes
}

async fn create_pods(client: Client) {
    let mut creators = tokio::task::JoinSet::new();
    for creator in 0..CREATORS {
        let client = client.clone();
        creators.spawn(async move {
            for index in (creator..PODS).step_by(CREATORS) {
                let manifest = cpu_pod(&format!("p{index}"), &format!("{POD_MILLI}m"));
                client.create(pod(&manifest)).await.unwrap_or_else(|error| panic!("create p{index}: {error}"));
            }
        });
    }
    while let Some(done) = creators.join_next().await {
        done.expect("a creator's pods are created");
    }
}

/// Follows every change of every pod, one revision after the other, and checks each state; answers how many are bound once
/// nothing more is.
async fn audit(client: Client, revision: i64) -> usize {
    let mut watch = client.watch::<Pod>(&Query::all(), revision).await.expect("watched");
    let (mut node_of, mut used) = (HashMap::<String, String>::new(), HashMap::<String, i64>::new());
    let mut last = revision;
    loop {
        let patience = if node_of.len() < FIT { wait::PATIENCE } else { Duration::from_secs(5) };
        let Ok(change) = tokio::time::timeout(patience, watch.next()).await else { return node_of.len() };
        let change = change.expect("the watch lives").expect("the watch goes on");
        assert!(change.revision >= last, "revision {} after {last}", change.revision);
        last = change.revision;
        let (ChangeKind::Added(pod) | ChangeKind::Modified(pod)) = change.kind else { continue };
        let (name, Some(node)) = (pod.name().to_owned(), pod.node_name()) else { continue };
        match node_of.get(&name) {
            Some(before) => assert_eq!(before, node, "{name} was moved at revision {last}"),
            None => {
                node_of.insert(name, node.to_owned());
                let sum = used.entry(node.to_owned()).or_default();
                *sum += POD_MILLI;
                assert!(*sum <= CPU_MILLI, "{node} has {sum}m of {CPU_MILLI}m at revision {last}");
            }
        }
    }
}

const ZONES: usize = 3;
const ZONED_NODES: usize = 12;
/// Of the pods with rules so many find a place whoever is first, and so many exist; see [`ruled_pods`].
const RULED_FIT: usize = 48 + 12 + 60 + 48 + 32 + 24;
const RULED: usize = RULED_FIT + 4 + 4;

/// Pods with every rule there is, shuffled, as YAML.
fn ruled_pods() -> Vec<(String, String)> {
    let term = |app: &str, key: &str| {
        format!(
            "requiredDuringSchedulingIgnoredDuringExecution: [{{topologyKey: {key}, labelSelector: {{matchLabels: {{app: {app}}}}}}}]"
        )
    };
    let away = |app: &str, key: &str| format!("  affinity: {{podAntiAffinity: {{{}}}}}\n", term(app, key));
    let near = |app: &str, key: &str| format!("  affinity: {{podAffinity: {{{}}}}}\n", term(app, key));
    let spread = |app: &str, key: &str| {
        format!(
            "  topologySpreadConstraints: [{{maxSkew: 1, topologyKey: {key}, whenUnsatisfiable: DoNotSchedule, labelSelector: \
             {{matchLabels: {{app: {app}}}}}}}]\n"
        )
    };
    const HOST: &str = "kubernetes.io/hostname";
    let mut pods = Vec::new();
    let mut add = |kind: &str, app: usize, count: usize, rule: &dyn Fn(&str) -> String| {
        let app = format!("{kind}{app}");
        for index in 0..count {
            let name = format!("{app}-{index}");
            let manifest =
                cpu_pod(&name, "10m").replace("metadata: {", &format!("metadata: {{labels: {{app: {app}}}, "));
            pods.push((name, manifest + &rule(&app)));
        }
    };
    for app in 0..4 {
        add("lone", app, ZONED_NODES, &|app| away(app, HOST));
        // One more than there are zones: it waits.
        add("zonal", app, ZONES + 1, &|app| away(app, "zone"));
        add("even", app, 15, &|app| spread(app, "zone"));
        add("flock", app, 8, &|app| near(app, "zone"));
        // A zone that the guard is in is closed to these, and one that they are in to the guard: it may find none.
        add("shy", app, 6, &|_| String::new());
        add("guard", app, 1, &|app| away(&app.replace("guard", "shy"), "zone"));
    }
    for app in 0..2 {
        add("thin", app, 2 * ZONED_NODES, &|app| spread(app, HOST));
    }
    // Always the same order, in which neighbours have nothing to do with each other.
    pods.sort_by_key(|(name, _)| {
        name.bytes().fold(0u32, |hash, byte| hash.wrapping_mul(0x0100_0193) ^ u32::from(byte))
    });
    pods
}

#[tokio::test(flavor = "multi_thread")]
async fn six_schedulers_at_two_servers_break_no_rule_between_pods() {
    let options = Options { schedulers: 6, apiservers: 2, ..Options::new(bin_dir(), Vec::new()) };
    let mut cluster = Cluster::start_with(options).await;
    let client = cluster.client().clone();
    let first = cluster.local.server().split(',').next().expect("a server").to_owned();
    let channel = Endpoint::from_shared(first).expect("an address").connect_lazy();
    let mut nodes = Vec::new();
    for index in 0..ZONED_NODES {
        let (name, zone) = (format!("hollow-{index}"), format!("z{}", index % ZONES));
        let allocatable = [("cpu", "64"), ("memory", "65536Mi"), ("pods", "110")];
        let shape = Shape { name: &name, allocatable: &allocatable, labels: &[("zone", &zone)] };
        nodes.push(HollowNode::join_as(channel.clone(), shape, std::sync::Arc::new(|_| {})).await.expect("it joins"));
    }
    let nodes_now = client.list::<Node>(&Query::all()).await.expect("listed").items;
    let world = reference::World { nodes: nodes_now, ..Default::default() };
    assert_eq!(world.nodes.len(), ZONED_NODES);

    let revision = client.list::<Pod>(&Query::all()).await.expect("listed").revision;
    let audit = tokio::spawn(audit_rules(client.clone(), revision, world));
    let creator = client.clone();
    let created = tokio::spawn(async move {
        let pods = ruled_pods();
        assert_eq!(pods.len(), RULED);
        for (name, manifest) in pods {
            creator.create(pod(&manifest)).await.unwrap_or_else(|error| panic!("create {name}: {error}"));
        }
    });
    // One is killed in the middle of its work, and one wakes up with a stale view, and with decisions that were made on it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    cluster.local.daemon("scheduler-2").expect("it runs").kill();
    cluster.local.daemon("scheduler-1").expect("it runs").pause(true);
    tokio::time::sleep(Duration::from_secs(1)).await;
    cluster.local.daemon("scheduler-1").expect("it runs").pause(false);
    created.await.expect("all pods are created");
    let bound = audit.await.expect("the audit found nothing wrong");
    assert!((RULED_FIT..=RULED_FIT + 4).contains(&bound), "{bound} are bound, but {RULED_FIT} and up to 4 guards fit");
    cluster.local.stop().expect("taken down");
}

/// Follows every revision and has each binding judged by what was bound before it; answers how many there are once nothing more is bound.
async fn audit_rules(client: Client, revision: i64, mut world: reference::World) -> usize {
    let mut watch = client.watch::<Pod>(&Query::all(), revision).await.expect("watched");
    let mut bound = HashSet::new();
    let (mut at, mut news) = (revision, Vec::new());
    let mut settle = |at: i64, news: &mut Vec<(Pod, String)>| {
        let judged = world.bind_in_some_order(&std::mem::take(news));
        judged.unwrap_or_else(|broken| panic!("revision {at} breaks a rule: {broken}"));
    };
    loop {
        let patience = if bound.len() < RULED_FIT { wait::PATIENCE } else { Duration::from_secs(5) };
        let Ok(change) = tokio::time::timeout(patience, watch.next()).await else {
            settle(at, &mut news);
            return bound.len();
        };
        let change = change.expect("the watch lives").expect("the watch goes on");
        let (ChangeKind::Added(pod) | ChangeKind::Modified(pod)) = change.kind else { continue };
        if pod.revision() != at {
            settle(at, &mut news);
            at = pod.revision();
        }
        if let Some(node) = pod.node_name().map(str::to_owned)
            && bound.insert(pod.name().to_owned())
        {
            news.push((pod, node));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn why_and_fit_are_answered_by_the_scheduler_through_the_api_server() {
    let mut cluster = Cluster::start_with(Options { schedulers: 2, ..Options::new(bin_dir(), Vec::new()) }).await;
    let channel = Endpoint::from_shared(cluster.local.server().to_owned()).expect("an address").connect_lazy();
    let mut nodes = Vec::new();
    for (name, cpu) in [("small", "1"), ("large", "4")] {
        let allocatable = [("cpu", cpu), ("memory", "8Gi"), ("pods", "110")];
        nodes.push(HollowNode::join(channel.clone(), name, &allocatable).await.expect("it joins"));
    }
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("web.yaml").display().to_string();
    std::fs::write(&path, cpu_pod("web", "500m")).expect("written");
    // The nodes must have come to the scheduler first.
    let fit = wait::until("ten to find a place", || async {
        let output = cluster.minictl(&["fit", "-f", &path, "-n", "40", "-o", "json"]);
        let fit: serde_json::Value = serde_json::from_slice(&output.stdout).map_err(|_| text(&output.stderr))?;
        if fit["placed"] == 10 { Ok(fit) } else { Err(fit.to_string()) }
    })
    .await;
    assert_eq!((&fit["asked"], &fit["unplaced"]["copy"]), (&40.into(), &11.into()), "{fit}");
    let shown = cluster.minictl(&["fit", "-f", &path, "-n", "40"]);
    let shown = text(&shown.stdout);
    assert!(shown.contains("10 of 40 pods find a place") && shown.contains("cpu short by 500m"), "{shown}");
    let pods = cluster.client().list::<Pod>(&Query::all()).await.expect("listed").items;
    assert!(pods.is_empty(), "nothing is created");

    cluster.create(pod(&cpu_pod("first", "3"))).await;
    wait::until("it to be bound", || async {
        let first = cluster.pod("first").await?;
        first.node_name().map(str::to_owned).ok_or("not bound".to_owned())
    })
    .await;
    cluster.create(pod(&cpu_pod("second", "3"))).await;
    let server = cluster.local.server().to_owned();
    let ask = |arguments: &[&str]| {
        let output = minictl(&server, arguments);
        (text(&output.stdout), text(&output.stderr))
    };
    let why = wait::until("the scheduler to name the pod in the way", || async {
        let (out, err) = ask(&["why", "second"]);
        if out.contains("end default/first (priority 0)") { Ok(out) } else { Err(format!("{out}{err}")) }
    })
    .await;
    assert!(why.contains("free 2 cpu"), "{why}");
    assert!(why.contains("all of the node is 1 cpu, the pod asks for 3"), "{why}");
    let told: serde_json::Value = serde_json::from_str(&ask(&["why", "second", "-o", "json"]).0).expect("JSON");
    assert_eq!(told["nodes"][0]["shortfalls"][0]["missing"], "2", "{told}");

    // One scheduler of the name that hangs is passed over; without any, the pod's own condition is what is left.
    cluster.local.daemon("scheduler-0").expect("it runs").pause(true);
    let (out, err) = ask(&["why", "second"]);
    assert!(out.contains("end default/first"), "{out}{err}");
    cluster.local.daemon("scheduler-0").expect("it runs").kill();
    cluster.local.daemon("scheduler-1").expect("it runs").kill();
    wait::until("what was said last", || async {
        let (out, err) = ask(&["why", "second"]);
        let last = err.contains("no scheduler of the name \"default-scheduler\"") && out.contains("cpu short by 2");
        if last { Ok(()) } else { Err(format!("{out}{err}")) }
    })
    .await;
    cluster.local.stop().expect("taken down");
}
