//! Rules between pods, held by the binding transaction: two API servers over one etcd, of which one learns late what the other does.
//! Nothing but the servers stands between these binders and a broken rule: they propose whatever the test says.

mod support;

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

use minipod_apiserver::{
    keys::{self, Parsed},
    serve::StoreAt,
    storage::{RawEvent, Storage},
};
use minipod_proto::{
    Kind, Resource,
    v1::{
        BindBatchRequest, BindResult, LabelSelector, Node, Object, Pod, PodAffinityTerm, TopologySpreadConstraint,
        bind_batch_request::Item, bind_result::Code, scheduling_client::SchedulingClient,
    },
};
use support::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::Instant,
};
use tonic::transport::Channel;

/// The scheduler's reference: it shares no code with what is tested here.
#[path = "../../scheduler/tests/reference/mod.rs"]
mod reference;

/// How late the second server learns what the store says: many times what a binding takes.
const LATE: Duration = Duration::from_millis(150);

/// A way to the store on which requests are prompt and answers, and so all changes, come late.
async fn late_way(target: String, late: Duration) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("its address").to_string();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(&target).await else { continue };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let ((mut from_near, mut to_near), (mut from_far, mut to_far)) = (near.into_split(), far.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut from_near, &mut to_far).await });
            let (sender, mut queue) = tokio::sync::mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
            tokio::spawn(async move {
                let mut buffer = vec![0; 64 << 10];
                while let Ok(length @ 1..) = from_far.read(&mut buffer).await {
                    if sender.send((Instant::now() + late, buffer[..length].to_vec())).is_err() {
                        return;
                    }
                }
            });
            tokio::spawn(async move {
                while let Some((due, bytes)) = queue.recv().await {
                    tokio::time::sleep_until(due).await;
                    if to_near.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// Two servers over one etcd, and nodes in two zones.
struct Pair {
    cluster: Cluster,
    second: Server,
    nodes: Vec<Node>,
}

impl Pair {
    /// The second server learns so late of what happens.
    async fn start(late: Duration, nodes: &[(&str, &str)]) -> Pair {
        let cluster = Cluster::start().await;
        let mut config = config(&cluster.etcd);
        config.store = StoreAt::Etcd(vec![late_way(cluster.etcd.address(), late).await]);
        let second = Server::start(config).await;
        let mut made = Vec::new();
        for (name, zone) in nodes {
            let mut node = node(name, "16", "65536Mi", "5000");
            let labels = &mut node.metadata.get_or_insert_default().labels;
            labels.insert("zone".into(), (*zone).into());
            labels.insert("kubernetes.io/hostname".into(), (*name).into());
            register(&cluster.server, node.clone()).await;
            made.push(node);
        }
        // Both have seen the nodes: what follows is about pods.
        for server in [&cluster.server, &second] {
            let (objects, last) = (server.objects().await, made.last().map_or("", |node| node.name()).to_owned());
            eventually("the nodes are known", || {
                let (mut objects, request) = (objects.clone(), get("Node", "", &last));
                async move { objects.get(request).await.map(drop).map_err(|status| status.to_string()) }
            })
            .await;
        }
        Pair { cluster, second, nodes: made }
    }

    async fn schedulings(&self) -> [SchedulingClient<Channel>; 2] {
        [self.cluster.server.scheduling().await, self.second.scheduling().await]
    }

    async fn create(&self, pod: Pod) -> Pod {
        create_pod(&self.cluster.server, pod).await
    }

    /// Looks at every binding as the revision before it left the cluster; how many there were.
    async fn check_history(&self) -> usize {
        let mut history = History::new(&self.nodes);
        for (revision, events) in self.cluster.history().await {
            events.iter().for_each(|event| history.apply(event));
            history.settle(revision);
        }
        history.bindings
    }
}

/// The cluster as a revision left it.
struct History {
    world: reference::World,
    bound: HashSet<String>,
    /// Bound by the revision that is being read.
    news: Vec<(Pod, String)>,
    bindings: usize,
}

impl History {
    fn new(nodes: &[Node]) -> History {
        let world = reference::World { nodes: nodes.to_vec(), ..Default::default() };
        History { world, bound: HashSet::new(), news: Vec::new(), bindings: 0 }
    }

    fn apply(&mut self, event: &RawEvent) {
        let (Parsed::Object(Kind::Pod, key), Some(value)) = (keys::parse(&event.key), &event.value) else { return };
        let object = Object::decode_inner(Kind::Pod, value).expect("a pod");
        let pod = Pod::try_from(object).expect("a pod");
        let Some(node) = pod.node_name().map(str::to_owned) else { return };
        if self.bound.insert(key.to_owned()) {
            self.bindings += 1;
            self.news.push((pod, node));
        }
    }

    /// All that one transaction bound must find their places one after the other.
    fn settle(&mut self, revision: i64) {
        if let Err(broken) = self.world.bind_in_some_order(&std::mem::take(&mut self.news)) {
            panic!("revision {revision} breaks a rule: {broken}");
        }
    }
}

fn item(pod: &Pod, node: &str) -> Item {
    let meta = pod.metadata.clone().unwrap_or_default();
    Item { namespace: meta.namespace, pod: meta.name, uid: meta.uid, revision: 0, node: node.into() }
}

async fn bind(scheduling: &mut SchedulingClient<Channel>, items: Vec<Item>, mode: i32) -> Vec<BindResult> {
    let request = BindBatchRequest { items, mode, scheduler: "test".into() };
    scheduling.bind_batch(request).await.expect("answered").into_inner().results
}

async fn bind_one(scheduling: &mut SchedulingClient<Channel>, pod: &Pod, node: &str) -> BindResult {
    bind(scheduling, vec![item(pod, node)], 0).await.remove(0)
}

fn selector(app: &str) -> Option<LabelSelector> {
    let match_labels = [("app".to_owned(), app.to_owned())].into();
    Some(LabelSelector { match_labels, ..LabelSelector::default() })
}

fn labelled(name: &str, app: &str) -> Pod {
    let mut pod = pod(name, "10m", "1Mi");
    pod.metadata.get_or_insert_default().labels.insert("app".into(), app.into());
    pod
}

fn term(app: &str, key: &str) -> PodAffinityTerm {
    PodAffinityTerm { topology_key: key.into(), label_selector: selector(app), ..PodAffinityTerm::default() }
}

fn away(mut pod: Pod, app: &str, key: &str) -> Pod {
    let all = pod.spec_mut().affinity.get_or_insert_default().pod_anti_affinity.get_or_insert_default();
    all.required_during_scheduling_ignored_during_execution.push(term(app, key));
    pod
}

fn near(mut pod: Pod, app: &str, key: &str) -> Pod {
    let all = pod.spec_mut().affinity.get_or_insert_default().pod_affinity.get_or_insert_default();
    all.required_during_scheduling_ignored_during_execution.push(term(app, key));
    pod
}

fn spread(mut pod: Pod, app: &str, key: &str) -> Pod {
    pod.spec_mut().topology_spread_constraints.push(TopologySpreadConstraint {
        max_skew: 1,
        topology_key: key.into(),
        when_unsatisfiable: "DoNotSchedule".into(),
        label_selector: selector(app),
        ..TopologySpreadConstraint::default()
    });
    pod
}

const HOST: &str = "kubernetes.io/hostname";
const NODES: [(&str, &str); 4] = [("a1", "a"), ("a2", "a"), ("b1", "b"), ("b2", "b")];

/// Pairs of pods, each with its node, that may each be bound alone and not both. `n` keeps pairs apart.
fn pairs(n: usize) -> Vec<(&'static str, [(Pod, &'static str); 2])> {
    let app = |what: &str| format!("{what}-{n}");
    let one = |what: &str, which: usize| labelled(&format!("{what}-{n}-{which}"), &app(what));
    vec![
        (
            "anti-affinity towards a pod without rules",
            [(away(one("lonely", 0), &app("plain"), "zone"), "a1"), (one("plain", 1), "a2")],
        ),
        (
            "anti-affinity by host towards its own kind",
            [(away(one("host", 0), &app("host"), HOST), "b1"), (away(one("host", 1), &app("host"), HOST), "b1")],
        ),
        (
            "affinity: both are the first of their kind",
            [
                (near(one("flock", 0), &app("flock"), "zone"), "a1"),
                (near(one("flock", 1), &app("flock"), "zone"), "b1"),
            ],
        ),
        (
            "spread over zones",
            [
                (spread(one("even", 0), &app("even"), "zone"), "a1"),
                (spread(one("even", 1), &app("even"), "zone"), "a2"),
            ],
        ),
        (
            "spread over hosts, and a pod without rules that counts",
            [
                (spread(one("thin", 0), &app("thin"), HOST), "b2"),
                (labelled(&format!("thin-{n}-1"), &app("thin")), "b2"),
            ],
        ),
    ]
}

/// The last pair may be bound in one order: who has no rule of its own and only counts is not held up by another's spread.
fn may_follow(name: &str, first: usize) -> bool {
    name.starts_with("spread over hosts") && first == 0
}

#[tokio::test(flavor = "multi_thread")]
async fn each_rule_holds_in_either_order_at_a_server_that_is_behind() {
    let pair = Pair::start(LATE, &NODES).await;
    let mut servers = pair.schedulings().await;
    let mut n = 0;
    // Which pod is first, and which server binds it; the other server is asked at once for the other pod.
    for (first, server) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
        n += 1;
        for (name, pods) in pairs(n) {
            let [one, two] = pods;
            let both = [(pair.create(one.0).await, one.1), (pair.create(two.0).await, two.1)];
            let (early, late) = (&both[first], &both[1 - first]);
            // Both servers know the pods: a read of the store would bring the late one up to date.
            tokio::time::sleep(LATE * 2).await;
            let told = bind_one(&mut servers[server], &early.0, early.1).await;
            assert_eq!(told.code(), Code::Bound, "{name}, first {first}, server {server}: {}", told.message);
            let told = bind_one(&mut servers[1 - server], &late.0, late.1).await;
            let want = if may_follow(name, first) { Code::Bound } else { Code::RuleBroken };
            assert_eq!(told.code(), want, "{name}, first {first}, server {server}: {}", told.message);
            if want == Code::RuleBroken {
                assert!(told.message.starts_with(&format!("{}: ", late.1)), "{name}: {}", told.message);
            }
        }
    }
    assert!(pair.check_history().await > 4 * 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_race_one_is_bound() {
    let pair = Pair::start(Duration::ZERO, &NODES).await;
    let [mut one, mut two] = pair.schedulings().await;
    let mut won = [0, 0];
    for n in 0..25 {
        for (name, pods) in pairs(n) {
            let [(first, here), (second, there)] = pods;
            let (first, second) = (pair.create(first).await, pair.create(second).await);
            // Now one and now the other is a little earlier.
            let pause = |yes: bool| tokio::time::sleep(Duration::from_micros(if yes { 300 } else { 0 }));
            let (a, b) = tokio::join!(
                async {
                    pause(n % 3 == 1).await;
                    bind_one(&mut one, &first, here).await
                },
                async {
                    pause(n % 3 == 2).await;
                    bind_one(&mut two, &second, there).await
                }
            );
            let bound = [&a, &b].map(|told| usize::from(told.code() == Code::Bound));
            let most = if name.starts_with("spread over hosts") { 2 } else { 1 };
            assert!((1..=most).contains(&(bound[0] + bound[1])), "{name}, round {n}: {a:?} and {b:?}");
            won = [won[0] + bound[0], won[1] + bound[1]];
        }
    }
    let bindings = pair.check_history().await;
    eprintln!("{bindings} bindings checked; the first was bound {} times, the second {}", won[0], won[1]);
    assert!(won[0] > 0 && won[1] > 0, "{won:?}: no race");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gang_breaks_no_rule_and_its_own_order_counts() {
    let pair = Pair::start(LATE, &NODES).await;
    let mut servers = pair.schedulings().await;
    let flock = |n: usize| near(labelled(&format!("g{n}"), "gang"), "gang", "zone");
    let gang = [pair.create(flock(0)).await, pair.create(flock(1)).await, pair.create(flock(2)).await];
    // Two zones: nobody, although each alone would be the first.
    let items = vec![item(&gang[0], "a1"), item(&gang[1], "a2"), item(&gang[2], "b1")];
    let codes: Vec<Code> = bind(&mut servers[0], items, 1).await.iter().map(BindResult::code).collect();
    assert_eq!(codes, [Code::Gang, Code::Gang, Code::RuleBroken]);
    // Somebody else's pod is the first meanwhile, in the other zone, and the server that is asked for the gang learns of it late.
    let other = pair.create(labelled("other", "gang")).await;
    let told = bind_one(&mut servers[0], &other, "b1").await;
    assert_eq!(told.code(), Code::Bound, "{}", told.message);
    let items = vec![item(&gang[0], "a1"), item(&gang[1], "a2"), item(&gang[2], "a1")];
    let results = bind(&mut servers[1], items, 1).await;
    assert!(results.iter().all(|result| matches!(result.code(), Code::Gang | Code::RuleBroken)), "{results:?}");
    let items = vec![item(&gang[0], "b1"), item(&gang[1], "b2"), item(&gang[2], "b1")];
    let results = bind(&mut servers[1], items, 1).await;
    assert!(results.iter().all(|result| result.code() == Code::Bound), "{results:?}");

    // A batch in the order in which it was decided on: each pod counts for those after it, whatever their nodes are called.
    let mut items = Vec::new();
    for (n, node) in ["b1", "a1", "b2", "a2", "a1", "b1"].into_iter().enumerate() {
        let pod = pair.create(spread(labelled(&format!("s{n}"), "row"), "row", "zone")).await;
        items.push(item(&pod, node));
    }
    let results = bind(&mut servers[0], items, 0).await;
    assert!(results.iter().all(|result| result.code() == Code::Bound), "{results:?}");
    assert_eq!(pair.check_history().await, 4 + 6);
}

/// A binder that proposes anything, in batches and in gangs, until so many proposals have been made.
async fn propose(mut scheduling: SchedulingClient<Channel>, pods: &[Pod], seed: u64) -> BTreeMap<Code, usize> {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut left: Vec<&Pod> = pods.iter().collect();
    let mut seen = BTreeMap::new();
    for _ in 0..60 {
        let all = dice.roll(4) == 0;
        let mut items: Vec<Item> = Vec::new();
        for _ in 0..if all { 2 } else { 12 } {
            let Some(pod) = left.get(dice.roll(left.len())) else { break };
            if !items.iter().any(|item| item.pod == pod.name()) {
                items.push(item(pod, NODES[dice.roll(NODES.len())].0));
            }
        }
        if items.is_empty() {
            break;
        }
        let results = bind(&mut scheduling, items.clone(), i32::from(all)).await;
        for (item, result) in items.iter().zip(results) {
            *seen.entry(result.code()).or_default() += 1;
            match result.code() {
                Code::Bound | Code::AlreadyBound => left.retain(|pod| pod.name() != item.pod),
                Code::RuleBroken | Code::Gang | Code::Conflict => {}
                other => panic!("{other:?}: {}", result.message),
            }
        }
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn eight_binders_that_propose_anything_break_no_rule() {
    let pair = Pair::start(Duration::from_millis(5), &NODES).await;
    let mut pods = Vec::new();
    for n in 0..240 {
        let app = format!("app{}", n % 24);
        let one = labelled(&format!("p{n}"), &app);
        // Also across kinds: some keep away from, or want to be near, pods that have no rules or others.
        let next = format!("app{}", (n + 1) % 24);
        pods.push(
            pair.create(match n % 24 {
                0..4 => away(one, &app, HOST),
                4..8 => away(one, &app, "zone"),
                8..12 => spread(one, &app, "zone"),
                12..15 => spread(one, &app, HOST),
                15..18 => near(one, &app, "zone"),
                18..20 => near(one, &next, "zone"),
                20..22 => away(one, &next, HOST),
                _ => one,
            })
            .await,
        );
    }
    let began = std::time::Instant::now();
    let [one, two] = pair.schedulings().await;
    let binders = (1..=8).map(|seed| propose(if seed % 2 == 0 { one.clone() } else { two.clone() }, &pods, seed));
    let seen = futures_util::future::join_all(binders).await;
    let took = began.elapsed();
    let bindings = pair.check_history().await;
    let count = |code| seen.iter().filter_map(|codes| codes.get(&code)).sum::<usize>();
    eprintln!("{bindings} bindings checked, {took:?}: {seen:?}");
    assert_eq!(bindings, count(Code::Bound), "every binding that was told of is in the store, and no other");
    assert!(bindings > 100 && count(Code::RuleBroken) > 100, "too little happened");
}

/// Announcements that nobody needs are taken back, and a rule whose announcement was holds as well.
#[tokio::test(flavor = "multi_thread")]
async fn announcements_come_and_go_and_no_rule_is_forgotten() {
    let pair = Pair::start(LATE, &NODES).await;
    let mut servers = pair.schedulings().await;
    let lasting = pair.create(away(labelled("lasting", "lasting"), "victim", "zone")).await;
    assert_eq!(bind_one(&mut servers[0], &lasting, "a1").await.code(), Code::Bound);
    let mut objects = pair.cluster.server.objects().await;
    for n in 0..150 {
        let name = format!("passing{n}");
        let pod = pair.create(away(labelled(&name, &name), &name, HOST)).await;
        let told = bind_one(&mut servers[0], &pod, "b1").await;
        assert_eq!(told.code(), Code::Bound, "{name}: {}", told.message);
        let mut request = delete("Pod", "default", &name);
        request.grace_period_seconds = Some(0);
        objects.delete(request).await.expect("deleted");
    }
    let storage = Storage::connect(&[pair.cluster.etcd.address()], 128).await.expect("the store");
    let (item, _) = storage.get(keys::announced()).await.expect("read");
    let announced = minipod_apiserver::rules::announced::Announced::decode(&item.expect("announcements").value);
    let left = announced.expect("readable").len();
    assert!((1..=70).contains(&left), "{left} announcements, but one rule is left");
    let victim = pair.create(labelled("victim", "victim")).await;
    let told = bind_one(&mut servers[1], &victim, "a2").await;
    assert_eq!(told.code(), Code::RuleBroken, "{}", told.message);
    let told = bind_one(&mut servers[1], &victim, "b2").await;
    assert_eq!(told.code(), Code::Bound, "{}", told.message);
}

/// A server that learns of a turn only when the next one has been taken gets its own all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_far_behind_is_not_starved() {
    /// More than the others bind while the late one loses as often as it may.
    const OTHERS: usize = 4_000;
    let pair = Pair::start(LATE, &NODES[..2]).await;
    let [mut prompt, mut late] = pair.schedulings().await;
    let flock = |name: String| {
        let mut pod = near(labelled(&name, "flock"), "flock", "zone");
        pod.spec_mut().containers[0].resources = None;
        pod
    };
    let first = pair.create(flock("first".into())).await;
    assert_eq!(bind_one(&mut prompt, &first, "a1").await.code(), Code::Bound);
    let slow = pair.create(flock("slow".into())).await;
    let objects = pair.cluster.server.objects().await;
    let make = |n: usize| {
        let mut objects = objects.clone();
        let pod = flock(format!("other{n}"));
        async move { Pod::try_from(objects.create(create(pod)).await.expect("created").into_inner()).expect("a pod") }
    };
    let others: Vec<Pod> = futures_util::StreamExt::collect(futures_util::StreamExt::buffered(
        futures_util::stream::iter((0..OTHERS).map(make)),
        64,
    ))
    .await;
    // Both servers know the pods, and the rule is announced.
    tokio::time::sleep(LATE * 3).await;
    let (told, mut taken) = tokio::sync::watch::channel(false);
    let taking = tokio::spawn(async move {
        // One after the other, without a pause: as many turns as the store takes.
        let mut bound = 0;
        for pod in &others {
            let result = bind_one(&mut prompt, pod, "a2").await;
            assert_eq!(result.code(), Code::Bound, "{}: {}", pod.name(), result.message);
            bound += 1;
            if *taken.borrow_and_update() {
                break;
            }
        }
        bound
    });
    let result = bind_one(&mut late, &slow, "a1").await;
    let _ = told.send(true);
    let bound = taking.await.expect("the others go on");
    assert_eq!(result.code(), Code::Bound, "{} while others took {bound} turns", result.message);
    assert!((20..OTHERS).contains(&bound), "{bound} turns were taken meanwhile: this proves nothing");
    assert_eq!(pair.check_history().await, 2 + bound);
}
