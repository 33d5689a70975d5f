//! Ten binders at once against a real etcd, and then every revision looked at: the invariants of the binding transaction.

mod support;

use std::collections::{BTreeMap, HashMap};

use minipod_apiserver::{
    keys::{self, Parsed},
    ledger::{self, Ledger},
    storage::RawEvent,
};
use minipod_proto::{
    Kind,
    v1::{BindBatchRequest, Object, Pod, bind_batch_request::Item, bind_result::Code},
};
use prost::Message;
use support::*;

const PODS: usize = 2_000;
const NODES: usize = 50;
const FIT_PER_NODE: usize = 30;
const BINDERS: u64 = 10;

/// A binder with a will of its own: it knows nothing of the others and tries any node that it has not found full.
async fn bind_all(server: &Server, pods: Vec<Item>, seed: u64) -> BTreeMap<Code, usize> {
    let mut scheduling = server.scheduling().await;
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut open: Vec<String> = (0..NODES).map(|n| format!("node-{n}")).collect();
    let mut left = pods;
    let mut seen = BTreeMap::new();
    while !left.is_empty() && !open.is_empty() {
        let mut items = Vec::new();
        for _ in 0..64.min(left.len()) {
            let mut item = left.swap_remove(dice.roll(left.len()));
            item.node = open[dice.roll(open.len())].clone();
            items.push(item);
        }
        let request = BindBatchRequest { items: items.clone(), mode: 0, scheduler: format!("binder-{seed}") };
        let results = match scheduling.bind_batch(request).await {
            Ok(answer) => answer.into_inner().results,
            Err(status) => {
                // Only a store that is away excuses a call; what became of the items shows when they are tried again.
                assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
                left.extend(items);
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
        };
        assert_eq!(results.len(), items.len());
        for (item, result) in items.into_iter().zip(results) {
            *seen.entry(result.code()).or_default() += 1;
            match result.code() {
                Code::Bound => assert_eq!(result.node, item.node),
                Code::AlreadyBound => assert!(!result.node.is_empty()),
                Code::NoFit => {
                    open.retain(|node| *node != item.node);
                    left.push(item);
                }
                Code::Conflict | Code::UnknownOutcome => left.push(item),
                Code::PodGone => {}
                other => panic!("{other:?}: {}", result.message),
            }
        }
    }
    seen
}

/// The cluster as a revision left it.
#[derive(Default)]
struct World {
    pods: HashMap<String, Pod>,
    ledgers: HashMap<String, Ledger>,
    /// Where each uid was bound first.
    homes: HashMap<String, String>,
}

impl World {
    fn apply(&mut self, event: &RawEvent) {
        match (keys::parse(&event.key), &event.value) {
            (Parsed::Object(Kind::Pod, key), Some(value)) => {
                let object = Object::decode_inner(Kind::Pod, value).expect("a pod");
                let pod = Pod::try_from(object).expect("a pod");
                if let Some(node) = pod.node_name() {
                    let uid = pod.metadata.clone().unwrap_or_default().uid;
                    let home = self.homes.entry(uid).or_insert_with(|| node.to_owned());
                    assert_eq!(home, node, "{key} is bound a second time at revision {}", event.revision);
                }
                self.pods.insert(key.to_owned(), pod);
            }
            (Parsed::Object(Kind::Pod, key), None) => drop(self.pods.remove(key)),
            (Parsed::Ledger(node), Some(value)) => {
                self.ledgers.insert(node.to_owned(), Ledger::decode(value.as_slice()).expect("a ledger"));
            }
            (Parsed::Ledger(node), None) => drop(self.ledgers.remove(node)),
            _ => {}
        }
    }

    fn check(&self, revision: i64) {
        let mut sums: HashMap<&str, BTreeMap<String, i64>> = HashMap::new();
        for pod in self.pods.values() {
            if let Some((node, charge)) = ledger::charged(pod).expect("summable") {
                let sum = sums.entry(node).or_default();
                for (resource, amount) in charge.requests.iter().filter(|(_, amount)| *amount != 0) {
                    *sum.entry(resource.to_owned()).or_default() += amount;
                }
            }
        }
        for (node, ledger) in &self.ledgers {
            assert_eq!(ledger.used, sums.remove(node.as_str()).unwrap_or_default(), "{node} at revision {revision}");
            for (resource, used) in &ledger.used {
                let allocatable = ledger.allocatable.get(resource).copied().unwrap_or(0);
                assert!(
                    *used <= allocatable,
                    "{node} at revision {revision}: {used} of {resource}, but has {allocatable}"
                );
            }
        }
        assert!(sums.is_empty(), "revision {revision}: pods on nodes without a ledger: {:?}", sums.keys());
    }
}

async fn make_pods(server: &Server, count: usize) -> Vec<Item> {
    let mut items = Vec::new();
    let mut objects = server.objects().await;
    for n in 0..count {
        let made = objects.create(create(pod(&format!("p{n}"), "100m", "64Mi"))).await.expect("created").into_inner();
        let meta = made.meta();
        let (pod, uid) = (meta.name.clone(), meta.uid.clone());
        let revision = meta.resource_version.parse().expect("a number");
        items.push(Item { namespace: "default".into(), pod, uid, revision, node: String::new() });
    }
    items
}

/// Looks at the cluster as every revision left it; returns the last one.
async fn check_history(cluster: &Cluster) -> (World, i64) {
    let (mut world, mut last) = (World::default(), 1);
    for (revision, events) in cluster.history().await {
        events.iter().for_each(|event| world.apply(event));
        world.check(revision);
        last = revision;
    }
    (world, last)
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_binders_never_bind_twice_and_never_overcommit() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    for n in 0..NODES {
        register(server, node(&format!("node-{n}"), "3", "30Gi", "100")).await;
    }
    let items = make_pods(server, PODS).await;
    let began = std::time::Instant::now();
    let binders = (1..=BINDERS).map(|seed| bind_all(server, items.clone(), seed));
    // Meanwhile some of the pods go away again, whether or not they are bound.
    let deletions = async {
        let mut objects = server.objects().await;
        for n in (0..PODS).step_by(100) {
            let mut request = delete("Pod", "default", &format!("p{n}"));
            request.grace_period_seconds = Some(0);
            objects.delete(request).await.expect("deleted");
        }
    };
    let (mut seen, ()) = tokio::join!(futures_util::future::join_all(binders), deletions);
    let took = began.elapsed();
    // Room that the deletions made after a binder had found a node full is found by a last one.
    seen.push(bind_all(server, items.clone(), 99).await);

    let told: usize = seen.iter().filter_map(|codes| codes.get(&Code::Bound)).sum();
    let (world, last) = check_history(&cluster).await;
    let living = world.pods.values().filter(|pod| pod.node_name().is_some()).count();
    eprintln!(
        "{told} bindings, {living} pods bound at the end, {last} revisions checked, binding took {took:?}; {seen:?}"
    );
    assert_eq!(living, NODES * FIT_PER_NODE, "all pods are alike, so that every node is filled to the brim");
    assert_eq!(told, world.homes.len(), "every binding that was told of is in the store, and no other");
}

/// The store is killed and comes back while ten binders work through two servers.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_dies_loses_no_binding_and_makes_none_twice() {
    let mut cluster = Cluster::start().await;
    let second = Server::start(config(&cluster.etcd)).await;
    for n in 0..NODES {
        register(&cluster.server, node(&format!("node-{n}"), "1", "30Gi", "100")).await;
    }
    let items = make_pods(&cluster.server, 600).await;
    let Cluster { etcd, server } = &mut cluster;
    let binders = (1..=BINDERS).map(|seed| bind_all(if seed % 2 == 0 { server } else { &second }, items.clone(), seed));
    let outages = async {
        for _ in 0..3 {
            tokio::time::sleep(std::time::Duration::from_millis(150)).await;
            tokio::task::block_in_place(|| {
                etcd.kill();
                etcd.run();
            });
        }
    };
    let (mut seen, ()) = tokio::join!(futures_util::future::join_all(binders), outages);
    seen.push(bind_all(server, items.clone(), 99).await);
    let told: usize = seen.iter().filter_map(|codes| codes.get(&Code::Bound)).sum();
    let (world, last) = check_history(&cluster).await;
    eprintln!("{told} bindings told of, {} in the store, {last} revisions checked; {seen:?}", world.homes.len());
    assert!(told <= world.homes.len(), "a binding that was told of is not in the store");
    assert_eq!(world.homes.len(), NODES * 10, "all pods are alike, so that every node is filled to the brim");
}
