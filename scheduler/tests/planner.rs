//! The planner, step by step: what becomes of pods that fit, wait, conflict and come back.

use minipod_proto::Resource;
use minipod_proto::v1::{Container, Node, Pod, PodSchedulingGate, ResourceRequirements, Time};
use minipod_scheduler::plan::{Event, NodeInfo, Outcome, Planner, PodInfo, Profile, Settings, Step};

fn planner() -> Planner {
    Planner::new(Settings {
        name: "default-scheduler".into(),
        shard: (0, 1),
        profile: Profile::Spread,
        hold_after_ms: 30_000,
    })
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
            Step::BindAll(all) => {
                let all: Vec<String> = all.iter().map(|one| format!("{}->{}", one.pod, one.node)).collect();
                lines.push(format!("together {}", all.join(" ")));
            }
            Step::Evict(one) => {
                let victims: Vec<&str> = one.victims.iter().map(|victim| &*victim.pod).collect();
                let nodes: Vec<&str> = one.nominees.iter().map(|nominee| &*nominee.node).collect();
                lines.push(format!("end {} on {} for {}", victims.join(" "), nodes.join(" "), one.preemptor));
            }
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
fn a_pod_that_others_pods_stand_against_is_told_and_decided_on_anew() {
    let mut planner = planner();
    planner.observe(node("a", "4", "4Gi"));
    planner.observe(node("b", "1", "4Gi"));
    let one = pod("one", "1", "1Gi");
    planner.observe(seen(&one));
    assert_eq!(told(planner.plan(0, 100)), ["one->a"]);
    planner.resolve("uid-one", Outcome::Refused, 1);
    planner.tell_refusal("uid-one", "a: the anti-affinity of a pod in zone=z keeps it away");
    let why = "one: pods that were bound meanwhile stand against the decision, it is made anew: \
               a: the anti-affinity of a pod in zone=z keeps it away";
    assert_eq!(told(planner.plan(2, 100)), [why]);
    // What the API server knew already has come by the watch.
    planner.observe(bound(&pod("other", "4", "1Gi"), "a"));
    assert_eq!(told(planner.plan(11, 100)), ["one->b"]);
    // The same refusal again is no news, and one of a pod that is bound none at all.
    planner.resolve("uid-one", Outcome::Refused, 12);
    planner.tell_refusal("uid-one", "a: the anti-affinity of a pod in zone=z keeps it away");
    assert_eq!(told(planner.plan(13, 100)), [""; 0]);
    planner.observe(bound(&one, "b"));
    planner.tell_refusal("uid-one", "b: whatever");
    assert_eq!(told(planner.plan(100, 100)), [""; 0]);
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
            Planner::new(Settings {
                name: "default-scheduler".into(),
                shard: (index, 3),
                profile: Profile::Pack,
                hold_after_ms: 30_000,
            })
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

fn with_priority(name: &str, cpu: &str, priority: i32) -> Pod {
    let mut pod = pod(name, cpu, "1Gi");
    pod.spec_mut().priority = Some(priority);
    pod
}

#[test]
fn preemption_ends_the_cheapest_pods_and_waits_for_them_to_leave() {
    let mut planner = planner();
    planner.observe(node("a", "4", "40Gi"));
    planner.observe(node("b", "4", "40Gi"));
    for (name, cpu, priority, place) in
        [("a1", "2", 5, "a"), ("a2", "2", 1, "a"), ("b1", "2", 3, "b"), ("b2", "2", 4, "b")]
    {
        planner.observe(bound(&with_priority(name, cpu, priority), place));
    }
    let high = with_priority("high", "2", 10);
    planner.observe(seen(&high));
    assert_eq!(
        told(planner.plan(0, 100)),
        ["end a2 on a for default/high", "high: 1 pods of lower priority are ended on a to make room"]
    );
    // The place is its own: a small pod does not slip in when the victim leaves.
    planner.observe(seen(&with_priority("small", "2", 1)));
    assert!(!told(planner.plan(1, 100)).iter().any(|line| line.contains("->")));
    planner.observe(Event::PodGone("uid-a2".into()));
    let lines = told(planner.plan(2, 100));
    assert_eq!(lines.iter().filter(|line| line.contains("->")).collect::<Vec<_>>(), ["high->a"]);
    // Whoever may not preempt waits.
    let mut meek = with_priority("meek", "2", 10);
    meek.spec_mut().preemption_policy = "Never".into();
    planner.observe(seen(&meek));
    assert!(!told(planner.plan(3, 100)).iter().any(|line| line.starts_with("end")));
}

#[test]
fn a_preemption_that_fails_is_decided_anew() {
    let mut planner = planner();
    planner.observe(node("a", "2", "40Gi"));
    planner.observe(bound(&with_priority("low", "2", 1), "a"));
    planner.observe(seen(&with_priority("high", "2", 10)));
    assert_eq!(told(planner.plan(0, 100)).first().map(String::as_str), Some("end low on a for default/high"));
    planner.eviction_failed("uid-high", 1);
    assert_eq!(told(planner.plan(11, 100)).first().map(String::as_str), Some("end low on a for default/high"));
    planner.observe(Event::PodGone("uid-low".into()));
    assert_eq!(told(planner.plan(12, 100)), ["high->a"]);
}

fn member(group: &str, name: &str, cpu: &str, min: u32) -> Pod {
    let mut pod = pod(name, cpu, "1Gi");
    let annotations = &mut pod.meta_mut().annotations;
    annotations.insert("minipod.dev/pod-group".into(), group.into());
    annotations.insert("minipod.dev/pod-group-min-count".into(), min.to_string());
    pod
}

#[test]
fn a_gang_goes_together_or_not_at_all() {
    let mut planner = planner();
    planner.observe(node("a", "2", "40Gi"));
    for name in ["g1", "g2"] {
        planner.observe(seen(&member("g", name, "1", 3)));
    }
    assert_eq!(
        told(planner.plan(0, 100)),
        ["g1: group g needs 3 more pods, 2 exist", "g2: group g needs 3 more pods, 2 exist"]
    );
    planner.observe(seen(&member("g", "g3", "1", 3)));
    let mut lines = told(planner.plan(10_000, 100));
    lines.sort();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(
        lines[0],
        "g1: 2 of the 3 pods that group g needs can be placed; 0/1 nodes are available: a: cpu short by 1"
    );
    // Nothing of it is kept: a single pod takes the room.
    planner.observe(seen(&pod("single", "2", "1Gi")));
    assert_eq!(told(planner.plan(10_001, 100)), ["single->a"]);
    planner.observe(node("b", "4", "40Gi"));
    assert_eq!(told(planner.plan(20_000, 100)), ["together g1->b g2->b g3->b"]);
    // Refused as a whole, tried again as a whole.
    for uid in ["uid-g1", "uid-g2", "uid-g3"] {
        planner.resolve(uid, Outcome::Refused, 20_001);
    }
    assert_eq!(told(planner.plan(20_200, 100)), ["together g1->b g2->b g3->b"]);
    for name in ["g1", "g2", "g3"] {
        planner.observe(bound(&member("g", name, "1", 3), "b"));
    }
    // Whoever comes later goes alone.
    planner.observe(seen(&member("g", "g4", "1", 3)));
    assert_eq!(told(planner.plan(30_000, 100)), ["g4->b"]);
}

/// Small pods come and go for ever and would fill every gap.
fn starve(with_hold: bool) -> Option<i64> {
    let hold_after_ms = if with_hold { 30_000 } else { i64::MAX };
    let name = "default-scheduler".to_owned();
    let mut planner = Planner::new(Settings { name, shard: (0, 1), profile: Profile::Spread, hold_after_ms });
    for at in 0..4 {
        planner.observe(node(&format!("n{at}"), "4", "400Gi"));
    }
    let mut running: Vec<(i64, String)> = Vec::new();
    let mut dice = 7_u64;
    for second in 0..1_000 {
        let now = second * 1_000;
        let over = running.iter().position(|(end, _)| *end <= now);
        for (_, name) in
            over.map(|_| running.extract_if(.., |(end, _)| *end <= now).collect::<Vec<_>>()).into_iter().flatten()
        {
            planner.observe(Event::PodGone(format!("uid-{name}").into()));
        }
        for at in 0..3 {
            planner.observe(seen(&pod(&format!("small-{second}-{at}"), "1", "1Gi")));
        }
        if second == 20 {
            for at in 0..2 {
                let mut big = member("big", &format!("big-{at}"), "4", 2);
                big.meta_mut().creation_timestamp = Some(Time::from_unix(2000, 0));
                planner.observe(seen(&big));
            }
        }
        for step in planner.plan(now, 1000) {
            match step {
                Step::BindAll(_) => return Some(second - 20),
                Step::Bind(all) => {
                    for one in all {
                        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                        running.push((now + 5_000 + (dice >> 33) as i64 % 10_000, one.pod.to_string()));
                        planner.observe(bound(&pod(&one.pod, "1", "1Gi"), &one.node));
                    }
                }
                _ => {}
            }
        }
    }
    None
}

#[test]
fn a_stream_of_small_pods_does_not_starve_a_large_gang() {
    assert_eq!(starve(false), None, "the stream is dense enough to starve it without a hold");
    // Thirty seconds until nodes are held, fifteen until the last small pod on them has ended, and some for rounding.
    let waited = starve(true);
    assert!(waited.is_some_and(|seconds| seconds <= 50), "{waited:?}");
}
