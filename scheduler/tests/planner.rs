//! The planner, step by step: what becomes of pods that fit, wait, conflict and come back.

use minipod_proto::Resource;
use minipod_proto::v1::{Container, Node, Pod, PodSchedulingGate, ResourceRequirements, Time};
use minipod_scheduler::plan::{Event, NodeInfo, Outcome, Planner, PodInfo, Profile, Settings, Step};

fn planner() -> Planner {
    Planner::new(Settings { name: "default-scheduler".into(), shard: (0, 1), profile: Profile::Spread })
}

fn node(name: &str, cpu: &str, memory: &str) -> Event {
    let mut node = Node::default();
    node.meta_mut().name = name.into();
    let amounts = [("cpu", cpu), ("memory", memory), ("pods", "110")];
    node.status_mut().allocatable = amounts.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    Event::Node(NodeInfo::new(&node).unwrap())
}

fn pod(name: &str, cpu: &str, memory: &str) -> Pod {
    let mut pod = Pod::default();
    let meta = pod.meta_mut();
    (meta.name, meta.namespace, meta.uid) = (name.into(), "default".into(), format!("uid-{name}"));
    meta.creation_timestamp = Some(Time::from_unix(1000, 0));
    pod.spec_mut().scheduler_name = "default-scheduler".into();
    let amounts = [("cpu", cpu), ("memory", memory)];
    let requests = amounts.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let resources = Some(ResourceRequirements { requests, ..Default::default() });
    pod.spec_mut().containers = vec![Container { name: "main".into(), resources, ..Default::default() }];
    pod
}

fn seen(pod: &Pod) -> Event {
    Event::Pod(PodInfo::new(pod).unwrap())
}

fn bound(pod: &Pod, node: &str) -> Event {
    let mut pod = pod.clone();
    pod.spec_mut().node_name = node.into();
    seen(&pod)
}

/// `pod->node` per binding and `pod: message` per report.
fn told(steps: Vec<Step>) -> Vec<String> {
    let mut lines = Vec::new();
    for step in steps {
        match step {
            Step::Bind(all) => lines.extend(all.iter().map(|one| format!("{}->{}", one.pod, one.node))),
            Step::Report(all) => lines.extend(all.iter().map(|one| format!("{}: {}", one.pod, one.message))),
        }
    }
    lines
}

#[test]
fn the_whole_pod_goes_to_the_node_that_has_room_for_all_of_it() {
    let mut planner = planner();
    planner.observe(node("node-a", "4", "1280Mi"));
    planner.observe(node("node-b", "4", "2Gi"));
    let mut both = pod("app", "100m", "1Gi");
    let mut second = both.spec().containers[0].clone();
    second.name = "log-collector".into();
    second.resources.as_mut().unwrap().requests.insert("memory".into(), "512Mi".into());
    both.spec_mut().containers.push(second);
    planner.observe(seen(&both));
    assert_eq!(told(planner.plan(0, 100)), ["app->node-b"]);
    planner.observe(bound(&both, "node-b"));
    let mut next = both.clone();
    (next.meta_mut().name, next.meta_mut().uid) = ("next".into(), "uid-next".into());
    planner.observe(seen(&next));
    assert_eq!(
        told(planner.plan(1, 100)),
        ["next: 0/2 nodes are available: node-a: memory short by 256Mi; node-b: memory short by 1Gi"]
    );
    planner.observe(Event::PodGone("uid-app".into()));
    assert_eq!(told(planner.plan(2, 100)), ["next->node-b"]);
}

#[test]
fn a_conflict_concerns_one_pod_and_is_tried_again_after_a_delay() {
    let mut planner = planner();
    planner.observe(node("a", "4", "4Gi"));
    let (one, two) = (pod("one", "1", "1Gi"), pod("two", "1", "1Gi"));
    planner.observe(seen(&one));
    planner.observe(seen(&two));
    assert_eq!(told(planner.plan(0, 100)), ["one->a", "two->a"]);
    planner.resolve("uid-one", Outcome::Bound, 1);
    planner.resolve("uid-two", Outcome::Refused, 1);
    assert_eq!(told(planner.plan(2, 100)), [""; 0]);
    assert_eq!(planner.due_ms(2), Some(11));
    assert_eq!(told(planner.plan(11, 100)), ["two->a"]);
    planner.resolve("uid-two", Outcome::Refused, 12);
    assert_eq!(planner.due_ms(12), Some(32), "the delay doubles");
    planner.observe(bound(&two, "a"));
    assert_eq!(told(planner.plan(1000, 100)), [""; 0]);
}

#[test]
fn what_nobody_confirms_is_proposed_again() {
    let mut planner = planner();
    planner.observe(node("a", "1", "4Gi"));
    let one = pod("one", "1", "1Gi");
    planner.observe(seen(&one));
    assert_eq!(told(planner.plan(0, 100)), ["one->a"]);
    planner.resolve("uid-one", Outcome::Unknown, 10);
    assert_eq!(told(planner.plan(100, 100)), [""; 0]);
    // The doubt ends after five seconds; then the usual delay.
    assert_eq!(told(planner.plan(5010, 100)), [""; 0]);
    assert_eq!(told(planner.plan(5020, 100)), ["one->a"]);
    // A watch that stays silent after a success is doubted after thirty.
    planner.resolve("uid-one", Outcome::Bound, 5021);
    assert_eq!(told(planner.plan(35_019, 100)), [""; 0]);
    assert_eq!(told(planner.plan(35_020, 100)), [""; 0]);
    assert_eq!(told(planner.plan(35_040, 100)), ["one->a"]);
}

#[test]
fn a_thousand_waiting_pods_of_a_class_wake_one_by_one() {
    let mut planner = planner();
    planner.observe(node("a", "1", "1000Gi"));
    for number in 0..1000 {
        planner.observe(seen(&pod(&format!("p{number:04}"), "600m", "1Gi")));
    }
    let first = told(planner.plan(0, 10_000));
    assert_eq!(first.iter().filter(|line| line.contains("->")).collect::<Vec<_>>(), ["p0000->a"]);
    assert_eq!(planner.counts().1, 999);
    planner.observe(bound(&pod("p0000", "600m", "1Gi"), "a"));
    assert!(!told(planner.plan(1, 10_000)).iter().any(|line| line.contains("->")));
    planner.observe(Event::PodGone("uid-p0000".into()));
    let next = told(planner.plan(2, 10_000));
    assert_eq!(next.iter().filter(|line| line.contains("->")).collect::<Vec<_>>(), ["p0001->a"]);
    planner.observe(node("b", "10", "1000Gi"));
    let next = told(planner.plan(3, 10_000));
    assert_eq!(next.iter().filter(|line| line.contains("->")).count(), 16);
}

#[test]
fn reports_say_a_thing_once_and_name_counts_in_large_clusters() {
    let mut planner = planner();
    for number in 0..20 {
        planner.observe(node(&format!("n{number:02}"), "1", if number < 3 { "1Gi" } else { "8Gi" }));
    }
    planner.observe(seen(&pod("big", "2", "2Gi")));
    assert_eq!(
        told(planner.plan(0, 100)),
        [
            "big: 0/20 nodes are available: 17: too little cpu (cpu short by 1 at the best); 3: too little cpu and memory \
          (cpu short by 1 at the best)"
        ]
    );
    for now in [1, 5_000, 10_000, 20_000] {
        planner.observe(seen(&pod("big", "2", "2Gi")));
        assert_eq!(told(planner.plan(now, 100)), [""; 0]);
    }
    // Another pod of the class is told as well.
    planner.observe(seen(&pod("big2", "2", "2Gi")));
    assert_eq!(told(planner.plan(20_001, 100)).len(), 1);
}

#[test]
fn gates_other_schedulers_and_terminating_pods_are_left_alone() {
    let mut planner = planner();
    planner.observe(node("a", "4", "4Gi"));
    let mut gated = pod("gated", "1", "1Gi");
    gated.spec_mut().scheduling_gates = vec![PodSchedulingGate { name: "wait".into() }];
    let mut other = pod("other", "1", "1Gi");
    other.spec_mut().scheduler_name = "mine".into();
    let mut ending = pod("ending", "1", "1Gi");
    ending.meta_mut().deletion_timestamp = Some(Time::from_unix(1, 0));
    for one in [&gated, &other, &ending] {
        planner.observe(seen(one));
    }
    assert_eq!(told(planner.plan(0, 100)), [""; 0]);
    gated.spec_mut().scheduling_gates.clear();
    planner.observe(seen(&gated));
    assert_eq!(told(planner.plan(1, 100)), ["gated->a"]);
}

#[test]
fn priority_goes_first_then_age() {
    let mut planner = planner();
    planner.observe(node("a", "1", "4Gi"));
    for (name, priority, created) in [("old", 0, 1), ("young", 0, 2), ("high", 10, 3)] {
        let mut pod = pod(name, "1", "1Gi");
        pod.spec_mut().priority = Some(priority);
        pod.meta_mut().creation_timestamp = Some(Time::from_unix(created, 0));
        planner.observe(seen(&pod));
    }
    let told = told(planner.plan(0, 100));
    assert_eq!(told.first().map(String::as_str), Some("high->a"));
    assert_eq!(told.iter().filter(|line| line.contains("->")).count(), 1);
}

#[test]
fn shards_share_all_pods_and_none_twice() {
    let mut planners: Vec<Planner> = (0..3)
        .map(|index| {
            Planner::new(Settings { name: "default-scheduler".into(), shard: (index, 3), profile: Profile::Pack })
        })
        .collect();
    let mut all = Vec::new();
    for planner in &mut planners {
        planner.observe(node("a", "100", "400Gi"));
        for number in 0..60 {
            planner.observe(seen(&pod(&format!("p{number}"), "1", "1Gi")));
        }
        let bound = told(planner.plan(0, 100));
        assert!(bound.len() > 5, "{bound:?}");
        all.extend(bound);
    }
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 60);
}
