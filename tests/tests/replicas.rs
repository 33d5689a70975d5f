//! Three API servers that carry the store together, with schedulers and agents, as a user runs them: each of them dies, also the
//! store's leader, and one stands still for a while. Pods do not notice, and whoever is left does everything.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use minictl::local::{NodeOptions, Options};
use minipod_client::{ChangeKind, Client, Query};
use minipod_proto::Resource;
use minipod_proto::v1::{Node, Pod};
use minipod_tests::cluster::{Cluster, bin_dir, client_of, exec, logs, pod, text};
use minipod_tests::kernel::{self, Process};
use minipod_tests::wait;

const SERVERS: [&str; 3] = ["apiserver-0", "apiserver-1", "apiserver-2"];
/// Short, so that a server can stand still for longer than that.
const GRACE: Duration = Duration::from_secs(5);
const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];

/// A pod that stays where it is put, if it is put anywhere.
fn manifest(name: &str, node: Option<&str>) -> String {
    let place = node.map_or_else(String::new, |node| format!("  nodeSelector: {{kubernetes.io/hostname: {node}}}\n"));
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 0\n{place}  \
         containers:\n  - name: app\n    image: minipod.local/busybox\n    imagePullPolicy: IfNotPresent\n    \
         command: [sh, -c, 'echo this is {name}; exec sleep infinity']\n"
    )
}

/// Every node that a pod was ever bound to, by uid, from a watch that goes on at whichever server is there.
#[derive(Clone, Default)]
struct Audit(Arc<Mutex<BTreeMap<String, Vec<String>>>>);

impl Audit {
    async fn follow(self, client: Client, mut revision: i64) {
        loop {
            if let Ok(mut watch) = client.watch::<Pod>(&Query::all(), revision).await {
                while let Ok(Some(change)) = watch.next().await {
                    assert!(change.revision >= revision, "revision {} after {revision}", change.revision);
                    revision = change.revision;
                    let (ChangeKind::Added(pod) | ChangeKind::Modified(pod)) = change.kind else { continue };
                    let Some(node) = pod.node_name() else { continue };
                    let mut nodes = self.0.lock().expect("no panic");
                    let nodes = nodes.entry(pod.uid().to_owned()).or_default();
                    if nodes.last().is_none_or(|last| last != node) {
                        nodes.push(node.to_owned());
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// The pods that run, and the process of each.
struct Running {
    pods: BTreeMap<String, (Pod, Process)>,
}

impl Running {
    async fn add(&mut self, cluster: &Cluster, name: &str) {
        let pod = cluster.until_phase(name, "Running").await;
        let process = kernel::containers(pod.uid()).remove("app").expect("its container runs");
        self.pods.insert(name.to_owned(), (pod, process));
    }

    /// The same processes under the same names, addresses and nodes.
    async fn are_untouched(&self, cluster: &Cluster) {
        for (name, (before, process)) in &self.pods {
            assert_eq!(kernel::containers(before.uid()).get("app"), Some(process), "{name}");
            let now = cluster.pod(name).await.expect("it is there");
            let facts =
                |pod: &Pod| (pod.uid().to_owned(), pod.node_name().map(str::to_owned), pod.status().pod_ip.clone());
            assert_eq!(facts(&now), facts(before), "{name}");
            assert_eq!(now.status().container_statuses[0].restart_count, 0, "{name}");
        }
    }

    /// Every pod's log and a program in it, through one server: also where another one holds the node's session.
    async fn are_reached_through(&self, server: &str) {
        let client = client_of(server);
        for name in self.pods.keys() {
            wait::until(&format!("{name} to be reached through {server}"), || async {
                let said = exec(&client, name, "app", &["hostname"]).await?;
                assert_eq!(said.trim(), name);
                let log = logs(&client, name, "app").await?;
                if log == format!("this is {name}\n") { Ok(()) } else { Err(log) }
            })
            .await;
        }
    }
}

/// Of the servers, one by one.
fn addresses(cluster: &Cluster) -> Vec<String> {
    cluster.local.server().split(',').map(str::to_owned).collect()
}

/// As a user: minictl is given all servers, also the one that is away.
async fn apply(cluster: &Cluster, name: &str) {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), manifest(name, None)).expect("written");
    wait::until(&format!("{name} to be applied"), || async {
        let applied = cluster.minictl(&["apply", "-f", &file.path().to_string_lossy()]);
        if applied.status.success() { Ok(()) } else { Err(text(&applied.stderr)) }
    })
    .await;
}

async fn until_nodes_are_ready(cluster: &Cluster) {
    wait::until("all nodes to be ready", || async {
        let nodes = cluster.client().list::<Node>(&Query::all()).await.map_err(|error| error.to_string())?.items;
        let ready = nodes.iter().filter(|node| node.is_ready()).count();
        if ready == NODES.len() { Ok(()) } else { Err(format!("{ready} are ready")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_api_server_may_die_or_stand_still_and_pods_do_not_notice() {
    let nodes = NODES.map(|name| NodeOptions::with_memory(name, "1Gi"));
    let apiserver_flags = vec![format!("--node-grace={}s", GRACE.as_secs())];
    let options = Options { apiservers: 3, schedulers: 2, apiserver_flags, ..Options::new(bin_dir(), nodes.into()) };
    let mut cluster = Cluster::start_with(options).await;
    let servers = addresses(&cluster);
    assert_eq!(servers.len(), 3);
    let revision = cluster.client().list::<Pod>(&Query::all()).await.expect("listed").revision;
    let audit = Audit::default();
    let auditor = tokio::spawn(audit.clone().follow(cluster.client().clone(), revision));

    let mut running = Running { pods: BTreeMap::new() };
    for node in NODES {
        let name = format!("on-{node}");
        cluster.create(pod(&manifest(&name, Some(node)))).await;
        running.add(&cluster, &name).await;
    }
    for server in &servers {
        running.are_reached_through(server).await;
    }

    // Each dies once, so the leader of the store does. While it is away the others do everything; then it is back, and does too.
    for dead in 0..3 {
        cluster.local.daemon(SERVERS[dead]).expect("it runs").kill();
        let name = format!("without-{dead}");
        apply(&cluster, &name).await;
        running.add(&cluster, &name).await;
        for (_, server) in servers.iter().enumerate().filter(|(index, _)| *index != dead) {
            running.are_reached_through(server).await;
        }
        running.are_untouched(&cluster).await;
        cluster.local.restart(SERVERS[dead]).expect("started again");
        running.are_reached_through(&servers[dead]).await;
        until_nodes_are_ready(&cluster).await;
    }

    // One stands still: its agents and clients leave it, and it does no harm when it goes on.
    let since = Instant::now();
    cluster.local.daemon(SERVERS[0]).expect("it runs").pause(true);
    for server in &servers[1..] {
        running.are_reached_through(server).await;
    }
    eprintln!("all pods are reached {:.1} s after a server was stopped", since.elapsed().as_secs_f64());
    apply(&cluster, "meanwhile").await;
    running.add(&cluster, "meanwhile").await;
    // What it then knows of all nodes is older than their grace.
    tokio::time::sleep((GRACE * 3 / 2).saturating_sub(since.elapsed())).await;
    cluster.local.daemon(SERVERS[0]).expect("it runs").pause(false);
    running.are_reached_through(&servers[0]).await;
    until_nodes_are_ready(&cluster).await;
    running.are_untouched(&cluster).await;

    let bound = audit.0.lock().expect("no panic").clone();
    for (pod, _) in running.pods.values() {
        let nodes = bound.get(pod.uid()).map(Vec::as_slice);
        assert_eq!(nodes, Some(&[pod.node_name().expect("bound").to_owned()][..]), "{} is bound once", pod.name());
    }
    assert_eq!(bound.len(), running.pods.len());
    assert!(!auditor.is_finished(), "the audit found nothing wrong");
    auditor.abort();
    for name in running.pods.keys() {
        cluster.delete_completely(name).await;
    }
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_list_of_servers_is_refused_by_every_program() {
    let list = "http://127.0.0.1:7650,http://127.0.0.1";
    let want =
        "server address \"http://127.0.0.1\": the port is missing: want http://HOST:PORT, several separated by commas";
    for (program, arguments) in
        [("minictl", &["get", "pods"][..]), ("minipod-scheduler", &[]), ("minipod-nodeagent", &[])]
    {
        let mut command = std::process::Command::new(bin_dir().join(program));
        command.args(arguments).arg(format!("--server={list}")).stdin(std::process::Stdio::null());
        let output = command.output().expect("it starts");
        let said = text(&output.stderr);
        assert!(!output.status.success() && said.contains(want), "{program}: {said}");
    }
}
