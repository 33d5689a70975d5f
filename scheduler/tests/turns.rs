//! Nobody starves and nothing stalls: the planner under streams of small pods, and under pods that cannot be helped, in virtual time.

use std::collections::VecDeque;
use std::time::Instant;

use minipod_proto::Resource;
use minipod_proto::v1::{
    Affinity, Container, LabelSelector, Node, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm,
    Pod, PodAffinity, PodAffinityTerm, ResourceRequirements, Time,
};
use minipod_scheduler::plan::{Event, NodeInfo, Outcome, Planner, PodInfo, Profile, Settings, Step};

const HOLD_AFTER_MS: i64 = 30_000;
const NODES: usize = 10;
/// A small pod takes a quarter of a node and runs for this long.
const RUN_MS: i64 = 20_000;
const TICK_MS: i64 = 100;

fn node(name: &str, cpu: &str) -> Event {
    let mut node = Node::default();
    node.meta_mut().name = name.into();
    node.meta_mut().labels.insert("kubernetes.io/hostname".into(), name.into());
    let amounts = [("cpu", cpu), ("memory", "64Gi"), ("pods", "110")];
    node.status_mut().allocatable = amounts.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    Event::Node(NodeInfo::new(&node).unwrap())
}

fn pod(name: &str, cpu: &str, created_ms: i64) -> Pod {
    let mut pod = Pod::default();
    let meta = pod.meta_mut();
    (meta.name, meta.namespace, meta.uid) = (name.into(), "default".into(), format!("uid-{name}"));
    meta.creation_timestamp = Some(Time::from_unix(1000 + created_ms / 1000, 0));
    pod.spec_mut().scheduler_name = "default-scheduler".into();
    let requests = [("cpu".to_owned(), cpu.to_owned())].into();
    let resources = Some(ResourceRequirements { requests, ..Default::default() });
    pod.spec_mut().containers = vec![Container { name: "main".into(), resources, ..Default::default() }];
    pod
}

/// A cluster in virtual time: every proposal is bound at once, small pods end when their time is over.
struct World {
    planner: Planner,
    pods: std::collections::HashMap<String, Pod>,
    ends: VecDeque<(i64, String)>,
    now_ms: i64,
    made: usize,
    /// Names that are bound, with the time.
    bound: std::collections::HashMap<String, i64>,
}

impl World {
    fn new() -> World {
        let name = "default-scheduler".into();
        let settings = Settings { name, shard: (0, 1), profile: Profile::Spread, hold_after_ms: HOLD_AFTER_MS };
        let mut world = World {
            planner: Planner::new(settings),
            pods: Default::default(),
            ends: VecDeque::new(),
            now_ms: 0,
            made: 0,
            bound: Default::default(),
        };
        (0..NODES).for_each(|at| world.planner.observe(node(&format!("n{at}"), "4")));
        world
    }

    fn add(&mut self, pod: Pod) {
        self.planner.observe(Event::Pod(PodInfo::new(&pod).unwrap()));
        self.pods.insert(pod.uid().to_owned(), pod);
    }

    /// Small pods up to a backlog of twenty: there is always one that would take any free place.
    fn pour(&mut self) {
        let (ready, waiting, _) = self.planner.counts();
        for _ in ready + waiting..20 {
            self.made += 1;
            self.add(pod(&format!("small-{:06}", self.made), "1", self.now_ms));
        }
    }

    fn tick(&mut self) {
        self.now_ms += TICK_MS;
        while self.ends.front().is_some_and(|(end, _)| *end <= self.now_ms) {
            let (_, uid) = self.ends.pop_front().unwrap();
            self.pods.remove(&uid);
            self.planner.observe(Event::PodGone(uid.as_str().into()));
        }
        self.pour();
        for step in self.planner.plan(self.now_ms, 1000) {
            let (Step::Bind(all) | Step::BindAll(all)) = step else { continue };
            for binding in all {
                let mut pod = self.pods.remove(&*binding.uid).unwrap();
                pod.spec_mut().node_name = binding.node.clone();
                self.planner.resolve(&binding.uid, Outcome::Bound, self.now_ms);
                self.planner.observe(Event::Pod(PodInfo::new(&pod).unwrap()));
                self.bound.insert(pod.name().to_owned(), self.now_ms);
                // Ends are spread, so that a node is never empty by chance.
                if pod.name().starts_with("small") {
                    let end = self.now_ms + RUN_MS - (self.made as i64 % 7) * 1000;
                    let at = self.ends.partition_point(|(other, _)| *other <= end);
                    self.ends.insert(at, (end, pod.uid().to_owned()));
                }
                self.pods.insert(pod.uid().to_owned(), pod);
            }
        }
    }

    /// Lets the stream run until all these are bound; answers how long that took.
    fn until_bound(&mut self, names: &[String], limit_ms: i64) -> i64 {
        let from = self.now_ms;
        while !names.iter().all(|name| self.bound.contains_key(name)) {
            self.tick();
            let waited = self.now_ms - from;
            assert!(waited <= limit_ms, "not bound after {waited} ms; held: {:?}", self.planner.core().held_nodes());
        }
        self.now_ms - from
    }

    fn warm_up(&mut self) {
        while self.now_ms < 2 * RUN_MS {
            self.tick();
        }
        assert!(self.bound.len() > 40, "the stream flows");
    }
}

/// When a node is held for it, what runs there ends within a run time; a second covers the checks in between.
const BOUND_MS: i64 = HOLD_AFTER_MS + RUN_MS + 2_000;

#[test]
fn a_large_pod_gets_its_turn_under_a_stream_of_small_ones() {
    let mut world = World::new();
    world.warm_up();
    world.add(pod("large", "4", world.now_ms + 3_600_000));
    let took = world.until_bound(&["large".to_owned()], BOUND_MS);
    assert!(took > TICK_MS, "it had to wait: the test is one of waiting");
    let before = world.bound.len();
    (0..200).for_each(|_| world.tick());
    assert!(world.bound.len() > before, "the stream goes on");
    assert!(world.planner.core().held_nodes().is_empty(), "nothing is held any more");
}

#[test]
fn a_large_gang_gets_its_turn_whole_under_a_stream_of_small_ones() {
    let mut world = World::new();
    world.warm_up();
    let names: Vec<String> = (0..NODES - 2).map(|at| format!("gang-{at}")).collect();
    for name in &names {
        let mut member = pod(name, "4", world.now_ms + 3_600_000);
        let annotations = &mut member.meta_mut().annotations;
        annotations.insert("minipod.dev/pod-group".into(), "job".into());
        annotations.insert("minipod.dev/pod-group-min-count".into(), names.len().to_string());
        world.add(member);
    }
    world.until_bound(&names, BOUND_MS);
    let times: std::collections::BTreeSet<i64> = names.iter().map(|name| world.bound[name]).collect();
    assert_eq!(times.len(), 1, "all in one transaction");
}

#[test]
fn one_large_pod_after_the_other_gets_its_turn() {
    let mut world = World::new();
    world.warm_up();
    let names: Vec<String> = (0..3).map(|at| format!("large-{at}")).collect();
    for name in &names {
        // Not equal, so that each is a class of its own.
        let mut large = pod(name, "4", world.now_ms + 3_600_000);
        large.meta_mut().labels.insert("which".into(), name.clone());
        world.add(large);
    }
    // One holder at a time. Nodes on which a large one sits have most changes behind them at first: they may be held in vain for a while.
    world.until_bound(&names, names.len() as i64 * BOUND_MS);
}

#[test]
fn a_node_that_never_gets_empty_is_not_held_for_ever() {
    let mut world = World::new();
    // The roomiest node at any time, with a pod on it that stays.
    world.planner.observe(node("stuck", "5"));
    let mut squatter = pod("squatter", "2", 0);
    squatter.spec_mut().node_name = "stuck".into();
    world.add(squatter);
    world.warm_up();
    world.add(pod("large", "4", world.now_ms + 3_600_000));
    // Once in vain on that node, once on another.
    world.until_bound(&["large".to_owned()], BOUND_MS + HOLD_AFTER_MS + RUN_MS);
    assert_ne!(world.pods["uid-large"].node_name(), Some("stuck"));
}

fn required(values: Vec<String>) -> Affinity {
    let requirement = NodeSelectorRequirement { key: "kubernetes.io/hostname".into(), operator: "In".into(), values };
    let term = NodeSelectorTerm { match_expressions: vec![requirement], ..Default::default() };
    let required = Some(NodeSelector { node_selector_terms: vec![term] });
    let node_affinity =
        Some(NodeAffinity { required_during_scheduling_ignored_during_execution: required, ..Default::default() });
    Affinity { node_affinity, ..Default::default() }
}

#[test]
fn what_cannot_be_helped_waits_with_its_reason_and_holds_up_nobody() {
    let mut world = World::new();
    // A selector that names more nodes than any cluster has.
    let mut many = pod("many", "1", 0);
    many.spec_mut().affinity = Some(Box::new(required((0..1_000_000).map(|at| format!("host-{at}")).collect())));
    // Affinity to oneself and to nobody at once, by a key that no node has.
    let mut unknown = pod("unknown", "1", 0);
    let term = PodAffinityTerm {
        topology_key: "no/such-key".into(),
        label_selector: Some(LabelSelector { match_labels: [("a".into(), "b".into())].into(), ..Default::default() }),
        ..Default::default()
    };
    let near = PodAffinity { required_during_scheduling_ignored_during_execution: vec![term], ..Default::default() };
    unknown.spec_mut().affinity = Some(Box::new(Affinity { pod_affinity: Some(near), ..Default::default() }));
    world.add(many);
    world.add(unknown);
    let mut longest = std::time::Duration::ZERO;
    let mut reports = Vec::new();
    for at in 0..100 {
        world.add(pod(&format!("fine-{at}"), "10m", 0));
        let started = Instant::now();
        for step in world.planner.plan(at, 1000) {
            match step {
                Step::Bind(all) => world.bound.extend(all.iter().map(|one| (one.pod.to_string(), at))),
                Step::Report(all) => reports.extend(all.into_iter().map(|one| (one.pod.to_string(), one.message))),
                other => panic!("{other:?}"),
            }
        }
        longest = longest.max(started.elapsed());
    }
    assert_eq!(world.bound.len(), 100, "everybody else is served");
    let message = |pod: &str| reports.iter().find(|(name, _)| name == pod).map(|(_, message)| message.as_str());
    assert!(message("many").unwrap().contains("labels do not match"), "{reports:?}");
    assert!(message("unknown").unwrap().contains("has no label no/such-key"), "{reports:?}");
    // No measure of speed: a loop that stands still for as long as the watchdog allows is broken, whatever the machine.
    assert!(longest < std::time::Duration::from_secs(30), "{longest:?}");
}

#[test]
fn two_that_could_end_each_other_do_not_go_round_in_circles() {
    let name = "default-scheduler".into();
    let settings = Settings { name, shard: (0, 1), profile: Profile::Spread, hold_after_ms: HOLD_AFTER_MS };
    let mut planner = Planner::new(settings);
    planner.observe(node("a", "4"));
    let of = |name: &str, priority: i32| {
        let mut pod = pod(name, "4", 0);
        pod.spec_mut().priority = Some(priority);
        pod
    };
    // Three that each fill the node: the highest ends the lowest, and stays.
    let mut running = of("low", 0);
    running.spec_mut().node_name = "a".into();
    planner.observe(Event::Pod(PodInfo::new(&running).unwrap()));
    planner.observe(Event::Pod(PodInfo::new(&of("mid", 5)).unwrap()));
    planner.observe(Event::Pod(PodInfo::new(&of("high", 9)).unwrap()));
    let (mut evictions, mut bindings) = (Vec::new(), Vec::new());
    for turn in 0..1000 {
        let now_ms = turn * 1000;
        for step in planner.plan(now_ms, 100) {
            match step {
                Step::Evict(one) => {
                    for victim in one.victims {
                        evictions.push(victim.pod.to_string());
                        planner.observe(Event::PodGone(victim.uid));
                        // Its owner makes it anew at once.
                        planner.observe(Event::Pod(PodInfo::new(&of(&format!("low-{turn}"), 0)).unwrap()));
                    }
                }
                Step::Bind(all) => {
                    for one in all {
                        planner.resolve(&one.uid, Outcome::Bound, now_ms);
                        let mut bound = of(&one.pod, if &*one.pod == "high" { 9 } else { 0 });
                        bound.spec_mut().node_name = one.node.clone();
                        planner.observe(Event::Pod(PodInfo::new(&bound).unwrap()));
                        bindings.push(one.pod.to_string());
                    }
                }
                Step::BindAll(_) | Step::Report(_) => {}
            }
        }
    }
    assert_eq!((evictions, bindings), (vec!["low".to_owned()], vec!["high".to_owned()]));
}
