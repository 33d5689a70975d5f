//! Clusters on one machine: their network, where the machine has Docker's packet rules, and what two of them must not share.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use minipod_tests::cluster::{Cluster, pod, text};
use minipod_tests::wait;

/// Set for the process that runs the cluster in the namespace with the rules.
const INSIDE: &str = "MINIPOD_TEST_BEHIND_DOCKERS_RULES";

/// What Docker adds to FORWARD's policy are rules for its own bridges; of others nothing is accepted.
const RULES: &str = "table ip filter { chain FORWARD { type filter hook forward priority filter; policy drop; }; }";

/// Network namespaces that end with this value.
struct Namespaces(Vec<String>);

impl Namespaces {
    fn add(&mut self, role: &str) -> String {
        let name = format!("mpt{}{role}", std::process::id());
        ip(&["netns", "add", &name]);
        self.0.push(name.clone());
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        name
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.0 {
            // An error means that it is not there.
            let _ = Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().unwrap_or_else(|error| panic!("start {program}: {error}"))
}

fn ip(arguments: &[&str]) {
    let output = run("ip", arguments);
    assert!(output.status.success(), "ip {}: {}", arguments.join(" "), text(&output.stderr));
}

/// In a network namespace alone: mounts and everything else stay.
fn within(netns: &str, arguments: &[&str]) -> Output {
    run("nsenter", &[&[&format!("--net=/run/netns/{netns}"), "--"], arguments].concat())
}

/// A namespace with Docker's rules, where they also concern what crosses a bridge.
fn machine_with_dockers_rules(namespaces: &mut Namespaces) -> String {
    let machine = namespaces.add("m");
    let setting = "/proc/sys/net/bridge/bridge-nf-call-iptables";
    let set = within(&machine, &["sh", "-c", &format!("echo 1 >{setting}")]);
    assert!(set.status.success(), "{setting}: {}; load it: modprobe br_netfilter", text(&set.stderr));
    let made = within(&machine, &["nft", RULES]);
    assert!(made.status.success(), "nft: {}", text(&made.stderr));
    machine
}

/// Whether two namespaces on a bridge of the machine's own reach each other.
fn ports_of_a_bridge_meet(machine: &str, [left, right]: [&str; 2]) -> bool {
    for (name, address) in [(left, "192.0.2.1/24"), (right, "192.0.2.2/24")] {
        if !within(machine, &["ip", "link", "show", name]).status.success() {
            ip(&["-n", machine, "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name]);
            ip(&["-n", machine, "link", "set", name, "master", "bridge", "up"]);
            ip(&["-n", name, "address", "add", address, "dev", "eth0"]);
            ip(&["-n", name, "link", "set", "eth0", "up"]);
        }
    }
    // Some tries: the first packets of a new port may be lost.
    within(left, &["busybox", "ping", "-c", "3", "-W", "1", "192.0.2.2"]).status.success()
}

fn manifest(name: &str, node: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  \
         nodeSelector: {{kubernetes.io/hostname: {node}}}\n  containers:\n  - name: app\n    \
         image: minipod.local/busybox\n    imagePullPolicy: IfNotPresent\n    command: [sleep, infinity]\n"
    )
}

async fn pods_of_two_nodes_meet() {
    let cluster = Cluster::start(&[("node-a", "1Gi"), ("node-b", "1Gi")]).await;
    for (name, node) in [("left", "node-a"), ("right", "node-b")] {
        cluster.create(pod(&manifest(name, node))).await;
        cluster.until_phase(name, "Running").await;
    }
    for (from, to) in [("left", "right"), ("right", "left")] {
        let address = cluster.pod(to).await.expect("it is there").status().pod_ip.clone();
        wait::until(&format!("{from} to reach {to} at {address}"), || async {
            cluster.exec(from, "app", &["ping", "-c", "1", "-W", "1", &address]).await
        })
        .await;
    }
    for name in ["left", "right"] {
        cluster.delete_completely(name).await;
    }
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_two_pods_of_a_machine_have_the_same_users() {
    let nodes = [("node-a", "1Gi"), ("node-b", "1Gi")];
    let clusters = [Cluster::start(&nodes).await, Cluster::start(&nodes).await];
    let mut firsts = BTreeSet::new();
    for cluster in &clusters {
        for (node, _) in nodes {
            let own = manifest(node, node).replace("spec:\n", "spec:\n  hostUsers: false\n");
            cluster.create(pod(&own)).await;
            cluster.until_phase(node, "Running").await;
            // First id in the pod, first id on the machine, how many.
            let map = cluster.exec(node, "app", &["cat", "/proc/self/uid_map"]).await.expect("its users");
            let numbers: Vec<u32> = map.split_whitespace().map(|word| word.parse().expect("a number")).collect();
            assert!(numbers.len() == 3 && numbers[0] == 0 && numbers[2] == 65_536, "{map}");
            firsts.insert(numbers[1]);
        }
    }
    assert_eq!(firsts.len(), 4, "{firsts:?}");
    let apart = |(one, next): (&u32, &u32)| next - one >= 65_536;
    assert!(firsts.iter().zip(firsts.iter().skip(1)).all(apart), "{firsts:?}");
    for cluster in clusters {
        for (node, _) in nodes {
            cluster.delete_completely(node).await;
        }
        cluster.local.stop().expect("taken down");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_two_nodes_meet_behind_dockers_rules() {
    if std::env::var_os(INSIDE).is_some() {
        pods_of_two_nodes_meet().await;
        return;
    }
    let mut namespaces = Namespaces(Vec::new());
    let machine = machine_with_dockers_rules(&mut namespaces);
    let (left, right) = (namespaces.add("l"), namespaces.add("r"));
    ip(&["-n", &machine, "link", "add", "bridge", "type", "bridge"]);
    ip(&["-n", &machine, "link", "set", "bridge", "up"]);
    // The rules do what they are there for: without this the rest shows nothing.
    assert!(!ports_of_a_bridge_meet(&machine, [&left, &right]), "the rules drop what crosses a bridge");
    assert!(within(&machine, &["nft", "delete table ip filter"]).status.success());
    assert!(ports_of_a_bridge_meet(&machine, [&left, &right]), "and it was the rules");
    assert!(within(&machine, &["nft", RULES]).status.success());

    // This test once more, as a process of that machine.
    let own = std::env::current_exe().expect("the test's program");
    let mut inner = tokio::process::Command::new("nsenter");
    inner.arg(format!("--net={}", Path::new("/run/netns").join(&machine).display())).arg("--").arg(own);
    inner.args(["--exact", "pods_of_two_nodes_meet_behind_dockers_rules", "--nocapture"]).env(INSIDE, "1");
    let ended = tokio::time::timeout(Duration::from_secs(240), inner.kill_on_drop(true).status()).await;
    let ended = ended.expect("it ends within four minutes").expect("nsenter starts");
    assert!(ended.success(), "behind the rules: {ended}");
}
