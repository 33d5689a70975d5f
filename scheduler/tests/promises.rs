//! Places that are being cleared: who gets them, who keeps out, and what a gang does that needs several.

use minipod_proto::Resource;
use minipod_proto::v1::{Container, Node, Pod, ResourceRequirements, Time};
use minipod_scheduler::plan::{Event, NodeInfo, Planner, PodInfo, Profile, Settings, Step};

fn planner_of(shard: (u32, u32)) -> Planner {
    let name = "default-scheduler".into();
    Planner::new(Settings { name, shard, profile: Profile::Spread, hold_after_ms: 30_000 })
}

fn planner(nodes: &[(&str, &str)]) -> Planner {
    with_nodes(planner_of((0, 1)), nodes)
}

fn with_nodes(mut planner: Planner, nodes: &[(&str, &str)]) -> Planner {
    for (name, cpu) in nodes {
        let mut node = Node::default();
        node.meta_mut().name = (*name).into();
        let amounts = [("cpu", *cpu), ("memory", "64Gi"), ("pods", "110")];
        node.status_mut().allocatable = amounts.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        planner.observe(Event::Node(NodeInfo::new(&node).unwrap()));
    }
    planner
}

fn pod(name: &str, cpu: &str, priority: i32) -> Pod {
    let mut pod = Pod::default();
    let meta = pod.meta_mut();
    (meta.name, meta.namespace, meta.uid) = (name.into(), "default".into(), format!("uid-{name}"));
    let spec = pod.spec_mut();
    (spec.scheduler_name, spec.priority) = ("default-scheduler".into(), Some(priority));
    let requests = [("cpu".to_owned(), cpu.to_owned())].into();
    let resources = Some(ResourceRequirements { requests, ..Default::default() });
    spec.containers = vec![Container { name: "main".into(), resources, ..Default::default() }];
    pod
}

fn member(group: &str, name: &str, cpu: &str, priority: i32, min: usize) -> Pod {
    let mut pod = pod(name, cpu, priority);
    let annotations = &mut pod.meta_mut().annotations;
    annotations.insert("minipod.dev/pod-group".into(), group.into());
    annotations.insert("minipod.dev/pod-group-min-count".into(), min.to_string());
    pod
}

fn on(mut pod: Pod, node: &str) -> Pod {
    pod.spec_mut().node_name = node.into();
    pod
}

fn ending(mut pod: Pod) -> Pod {
    pod.meta_mut().deletion_timestamp = Some(Time::from_unix(30, 0));
    pod
}

fn nominated(mut pod: Pod, node: &str) -> Pod {
    pod.status_mut().nominated_node_name = node.into();
    pod
}

fn see(planner: &mut Planner, pod: &Pod) {
    planner.observe(Event::Pod(PodInfo::new(pod).unwrap()));
}

/// Bindings and evictions, without reports.
fn steps(planner: &mut Planner, now_ms: i64) -> Vec<String> {
    let shown = planner.plan(now_ms, 100).into_iter().filter_map(|step| match step {
        Step::Bind(all) => {
            Some(all.iter().map(|one| format!("{}->{}", one.pod, one.node)).collect::<Vec<_>>().join(" "))
        }
        Step::BindAll(all) => {
            let all: Vec<String> = all.iter().map(|one| format!("{}->{}", one.pod, one.node)).collect();
            Some(format!("together {}", all.join(" ")))
        }
        Step::Evict(one) => {
            let mut victims: Vec<&str> = one.victims.iter().map(|victim| &*victim.pod).collect();
            victims.sort_unstable();
            let mut places: Vec<String> = one.nominees.iter().map(|one| format!("{}@{}", one.pod, one.node)).collect();
            places.sort_unstable();
            Some(format!("end {} for {}: {}", victims.join(" "), one.preemptor, places.join(" ")))
        }
        Step::Report(_) => None,
    });
    shown.collect()
}

#[test]
fn another_schedulers_nominated_pod_keeps_its_room_against_who_is_not_more_important() {
    let mut all = planner(&[("a", "2")]);
    let mut foreign = nominated(pod("foreign", "2", 5), "a");
    foreign.spec_mut().scheduler_name = "other".into();
    see(&mut all, &foreign);
    for (name, priority) in [("lower", 1), ("equal", 5)] {
        see(&mut all, &pod(name, "2", priority));
    }
    assert_eq!(steps(&mut all, 0), [""; 0], "nobody takes the room, and a pod that is not there is not ended");
    see(&mut all, &pod("higher", "2", 9));
    assert_eq!(steps(&mut all, 2_000), ["higher->a"], "to the more important one the promise is not there");

    // Without the nomination the room is anybody's.
    let mut all = planner(&[("a", "2")]);
    see(&mut all, &foreign);
    see(&mut all, &pod("lower", "2", 1));
    assert_eq!(steps(&mut all, 0), [""; 0]);
    foreign.status_mut().nominated_node_name.clear();
    see(&mut all, &foreign);
    assert_eq!(steps(&mut all, 1), ["lower->a"]);
}

#[test]
fn whoever_is_more_important_takes_over_a_place_that_is_being_cleared() {
    let mut all = planner(&[("a", "2")]);
    see(&mut all, &on(pod("low", "2", 1), "a"));
    see(&mut all, &pod("mid", "2", 5));
    assert_eq!(steps(&mut all, 0), ["end low for default/mid: mid@a"]);
    see(&mut all, &on(ending(pod("low", "2", 1)), "a"));
    see(&mut all, &nominated(pod("mid", "2", 5), "a"));
    see(&mut all, &pod("high", "2", 9));
    assert_eq!(steps(&mut all, 10), ["end low for default/high: high@a"], "the one that waits for it is not ended");
    all.observe(Event::PodGone("uid-low".into()));
    assert_eq!(steps(&mut all, 20), ["high->a"]);
    // What is no longer true is taken back, and once.
    let outdated = |all: &mut Planner, now_ms| {
        let reports = all.plan(now_ms, 100).into_iter().filter_map(|step| match step {
            Step::Report(reports) => Some(reports),
            _ => None,
        });
        let reports = reports.flatten().filter(|report| !report.outdated.is_empty());
        reports.map(|report| format!("{} {}", report.pod, report.outdated)).collect::<Vec<_>>()
    };
    let mut told = outdated(&mut all, 30);
    told.extend(outdated(&mut all, 6_000));
    see(&mut all, &pod("mid", "2", 5));
    told.extend(outdated(&mut all, 12_000));
    told.dedup();
    assert_eq!(told, ["mid a"]);
}

#[test]
fn a_scheduler_that_is_started_anew_ends_nobody_else_while_victims_end() {
    let mut all = planner(&[("a", "2"), ("b", "2")]);
    see(&mut all, &nominated(pod("high", "2", 9), "a"));
    see(&mut all, &on(ending(pod("low-a", "2", 1)), "a"));
    see(&mut all, &on(pod("low-b", "2", 1), "b"));
    assert_eq!(steps(&mut all, 0), [""; 0]);
    see(&mut all, &pod("small", "1", 1));
    all.observe(Event::PodGone("uid-low-a".into()));
    assert_eq!(steps(&mut all, 1), ["high->a"], "the room was its own");

    // One whose victims are gone and whose room was lost begins anew.
    let mut all = planner(&[("a", "2"), ("b", "2")]);
    see(&mut all, &nominated(pod("high", "2", 9), "a"));
    see(&mut all, &on(pod("other", "2", 9), "a"));
    see(&mut all, &on(pod("low-b", "2", 1), "b"));
    assert_eq!(steps(&mut all, 0), ["end low-b for default/high: high@b"]);
}

#[test]
fn a_gang_clears_all_its_places_or_none() {
    let mut all = planner(&[("a", "2"), ("b", "2"), ("c", "2")]);
    for (name, node, priority) in [("low-a", "a", 1), ("low-b", "b", 1), ("same-c", "c", 10)] {
        see(&mut all, &on(pod(name, "2", priority), node));
    }
    for at in 0..3 {
        see(&mut all, &member("three", &format!("t{at}"), "2", 10, 3));
    }
    assert_eq!(steps(&mut all, 0), [""; 0], "one of its places cannot be cleared: nobody is ended for nothing");
    for at in 0..2 {
        see(&mut all, &member("two", &format!("g{at}"), "2", 10, 2));
    }
    assert_eq!(steps(&mut all, 2_000), ["end low-a low-b for default/two: g0@a g1@b"]);
    // Half of the room is no reason to begin, and nobody else's either.
    see(&mut all, &pod("small", "1", 1));
    all.observe(Event::PodGone("uid-low-a".into()));
    assert_eq!(steps(&mut all, 3_000), [""; 0]);
    assert_eq!(steps(&mut all, 60_000), [""; 0]);
    all.observe(Event::PodGone("uid-low-b".into()));
    assert_eq!(steps(&mut all, 61_000), ["together g0->a g1->b"]);
}

#[test]
fn a_gang_that_finds_some_places_keeps_them_while_the_others_are_cleared() {
    let mut all = planner(&[("a", "2"), ("b", "2")]);
    see(&mut all, &on(pod("low", "2", 1), "b"));
    for at in 0..2 {
        see(&mut all, &member("g", &format!("g{at}"), "2", 10, 2));
    }
    assert_eq!(steps(&mut all, 0), ["end low for default/g: g0@a g1@b"]);
    see(&mut all, &pod("thief", "2", 1));
    assert_eq!(steps(&mut all, 1), [""; 0], "the free node is promised too");
    all.observe(Event::PodGone("uid-low".into()));
    assert_eq!(steps(&mut all, 2), ["together g0->a g1->b"]);
}

#[test]
fn a_gang_whose_eviction_fails_is_decided_anew_as_a_whole() {
    let mut all = planner(&[("a", "2"), ("b", "2")]);
    for node in ["a", "b"] {
        see(&mut all, &on(pod(&format!("low-{node}"), "2", 1), node));
    }
    for at in 0..2 {
        see(&mut all, &member("g", &format!("g{at}"), "2", 10, 2));
    }
    assert_eq!(steps(&mut all, 0).len(), 1);
    for uid in ["uid-g0", "uid-g1"] {
        all.eviction_failed(uid, 1);
    }
    let again: Vec<String> = (1..40).flat_map(|at| steps(&mut all, at * 100)).collect();
    assert_eq!(again, ["end low-a low-b for default/g: g0@a g1@b"]);
}

#[test]
fn one_shard_has_all_of_a_gang() {
    let mut sizes = [0, 0, 0];
    for gang in 0..30 {
        let of = |shard| {
            let mut planner = with_nodes(planner_of((shard, 3)), &[("a", "64")]);
            for at in 0..5 {
                see(&mut planner, &member(&format!("g{gang}"), &format!("g{gang}-{at}"), "1", 1, 5));
            }
            steps(&mut planner, 0)
        };
        for shard in 0..3 {
            let steps = of(shard);
            let whole =
                steps.iter().filter(|step| step.starts_with("together") && step.matches("->").count() == 5).count();
            assert_eq!(steps.len(), whole, "{steps:?}");
            sizes[shard as usize] += whole;
        }
    }
    assert_eq!(sizes.iter().sum::<usize>(), 30, "every gang has one shard");
    assert!(sizes.iter().all(|count| *count > 3), "{sizes:?}");
}
