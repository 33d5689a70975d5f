//! Ten schedulers at once, some of them killed or stopped for a while: every pod is bound at most once, no node is ever over
//! its allocatable, and everything that fits is bound in the end.

use std::collections::HashMap;
use std::time::Duration;

use minictl::local::Options;
use minipod_client::{ChangeKind, Client, Query};
use minipod_proto::Resource;
use minipod_proto::v1::Pod;
use minipod_tests::cluster::{Cluster, bin_dir, pod};
use minipod_tests::hollow::HollowNode;
use minipod_tests::wait;
use tonic::transport::{Channel, Endpoint};

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
                let manifest = format!(
                    "apiVersion: v1\nkind: Pod\nmetadata: {{name: p{index}}}\nspec:\n  containers:\n  - name: c\n    image: x\n    \
                     resources: {{requests: {{cpu: {POD_MILLI}m}}}}\n"
                );
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
