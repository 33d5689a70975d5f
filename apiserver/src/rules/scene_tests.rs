use minipod_proto::{
    Kind as ObjectKind,
    v1::{
        Affinity, LabelSelector as Message, Object, PodAffinity, PodAffinityTerm, PodAntiAffinity, Taint, Time,
        TopologySpreadConstraint,
    },
};

use super::*;
use crate::{dice::Dice, rules::counter::News};
use minipod_proto::{rules::Labels, v1::Node};

/// The scheduler's reference: it shares no code with what is tested here.
#[path = "../../../scheduler/tests/reference/mod.rs"]
mod reference;

fn entry(object: impl Into<Object>) -> Arc<Entry> {
    let object = object.into();
    let kind = object.kind_of().expect("an object");
    let key = if kind == ObjectKind::Node { object.meta().name.clone() } else { object.key() };
    Arc::new(Entry::decode(kind, &key, &object.encode_inner(), 1).expect("it decodes"))
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn node(name: &str, pairs: &[(&str, &str)]) -> Node {
    let mut node = Node::default();
    let meta = node.meta_mut();
    (meta.name, meta.labels) = (name.into(), labels(pairs));
    node.status_mut().allocatable.insert("pods".into(), "1000".into());
    node
}

fn pod(name: &str, app: &str) -> Pod {
    let mut pod = Pod::default();
    let meta = pod.meta_mut();
    (meta.name, meta.namespace, meta.labels) = (name.into(), "d".into(), labels(&[("app", app)]));
    pod
}

fn term(app: &str, key: &str) -> PodAffinityTerm {
    let label_selector = Some(Message { match_labels: labels(&[("app", app)]), ..Message::default() });
    PodAffinityTerm { topology_key: key.into(), label_selector, ..PodAffinityTerm::default() }
}

fn away(mut pod: Pod, app: &str, key: &str) -> Pod {
    let affinity = pod.spec_mut().affinity.get_or_insert_default();
    let all = affinity.pod_anti_affinity.get_or_insert_default();
    all.required_during_scheduling_ignored_during_execution.push(term(app, key));
    pod
}

fn near(mut pod: Pod, app: &str, key: &str) -> Pod {
    let affinity = pod.spec_mut().affinity.get_or_insert_default();
    let all = affinity.pod_affinity.get_or_insert_default();
    all.required_during_scheduling_ignored_during_execution.push(term(app, key));
    pod
}

fn spread(mut pod: Pod, app: &str, key: &str) -> Pod {
    pod.spec_mut().topology_spread_constraints.push(TopologySpreadConstraint {
        max_skew: 1,
        topology_key: key.into(),
        when_unsatisfiable: "DoNotSchedule".into(),
        label_selector: term(app, key).label_selector,
        ..TopologySpreadConstraint::default()
    });
    pod
}

/// What becomes of pods that are proposed in this order, where some are bound already.
fn outcome(nodes: &[Node], bound: &[(Pod, &str)], proposed: &[(Pod, &str)]) -> Vec<Result<(), String>> {
    let bound: Vec<Arc<Entry>> = bound
        .iter()
        .map(|(pod, node)| {
            let mut pod = pod.clone();
            pod.spec_mut().node_name = (*node).to_owned();
            entry(pod)
        })
        .collect();
    let demands: Vec<_> = proposed.iter().map(|(pod, _)| Demand::of(pod).expect("rules")).collect();
    let subjects: Vec<Subject> =
        proposed.iter().zip(&demands).map(|((pod, _), demand)| Subject { pod, demand: demand.as_deref() }).collect();
    let mut scene = scene(nodes, &bound, &|_| Labels::new(), &subjects);
    let mut outcomes = Vec::new();
    for (position, (_, node)) in proposed.iter().enumerate() {
        let admitted = scene.admits(position, node);
        if admitted.is_ok() {
            scene.place(position, node);
        }
        outcomes.push(admitted);
    }
    outcomes
}

fn scene(nodes: &[Node], bound: &[Arc<Entry>], labels_of: &dyn Fn(&str) -> Labels, subjects: &[Subject]) -> Scene {
    let names: Vec<&str> = nodes.iter().map(Resource::name).collect();
    let around = Around {
        labels_of,
        namespaces_at: 0,
        pods: &|_| News::All(bound.to_vec(), 1),
        nodes: &|_| News::All(nodes.iter().cloned().map(entry).collect(), 1),
    };
    Scene::new(subjects, &names, around, &mut Tallies::default())
}

#[test]
fn rules_hold_among_the_bound_and_within_a_batch() {
    let nodes = [
        node("a1", &[("zone", "a"), ("host", "a1")]),
        node("a2", &[("zone", "a"), ("host", "a2")]),
        node("b1", &[("zone", "b"), ("host", "b1")]),
        node("bare", &[]),
    ];
    let web = |name: &str| pod(name, "web");
    let db = |name: &str| pod(name, "db");
    type Placed = Vec<(Pod, &'static str)>;
    let cases: Vec<(&str, Placed, Placed, &[&str])> = vec![
        (
            "its own anti-affinity",
            vec![(db("d"), "a1")],
            vec![(away(web("w"), "db", "zone"), "a2"), (away(web("v"), "db", "zone"), "b1")],
            &["the pod's anti-affinity keeps away from zone=a, where a pod with app=db is", ""],
        ),
        (
            "another's towards it",
            vec![(away(web("w"), "db", "zone"), "a1")],
            vec![(db("d"), "a2"), (db("e"), "b1")],
            &["the anti-affinity of a pod in zone=a keeps it away", ""],
        ),
        (
            "within a batch, in either order",
            vec![],
            vec![
                (away(web("w"), "db", "zone"), "a1"),
                (db("d"), "a2"),
                (db("e"), "b1"),
                (away(web("v"), "db", "zone"), "b1"),
            ],
            &[
                "",
                "the anti-affinity of a pod in zone=a keeps it away",
                "",
                "the pod's anti-affinity keeps away from zone=b, where a pod with app=db is",
            ],
        ),
        (
            "one to a host",
            vec![(away(web("w"), "web", "host"), "a1")],
            vec![
                (away(web("v"), "web", "host"), "a1"),
                (away(web("u"), "web", "host"), "a2"),
                (away(web("t"), "web", "host"), "a2"),
            ],
            &[
                "the pod's anti-affinity keeps away from host=a1, where a pod with app=web is",
                "",
                "the pod's anti-affinity keeps away from host=a2, where a pod with app=web is",
            ],
        ),
        (
            "without a domain nobody is near",
            vec![(db("d"), "bare")],
            vec![(away(web("w"), "db", "zone"), "bare")],
            &[""],
        ),
        (
            "affinity",
            vec![(db("d"), "a1")],
            vec![
                (near(web("w"), "db", "zone"), "a2"),
                (near(web("v"), "db", "zone"), "b1"),
                (near(web("u"), "db", "zone"), "bare"),
            ],
            &[
                "",
                "the pod's affinity wants a pod with app=db in zone=b",
                "it has no label zone, which a rule of the pod needs",
            ],
        ),
        (
            "the first of its kind goes anywhere, the second to it",
            vec![],
            vec![
                (near(web("w"), "web", "zone"), "a1"),
                (near(web("v"), "web", "zone"), "b1"),
                (near(web("u"), "web", "zone"), "a2"),
            ],
            &["", "the pod's affinity wants a pod with app=web in zone=b", ""],
        ),
        (
            "nobody is the first for others",
            vec![],
            vec![(near(web("w"), "db", "zone"), "a1")],
            &["the pod's affinity wants a pod with app=db in zone=a"],
        ),
        (
            "spread",
            vec![(web("w"), "a1")],
            vec![
                (spread(web("v"), "web", "zone"), "a2"),
                (spread(web("u"), "web", "zone"), "b1"),
                (spread(web("t"), "web", "zone"), "a2"),
            ],
            &["zone=a has 1 of the pods to be spread, and may have 0 before another one comes (maxSkew 1)", "", ""],
        ),
        ("no rules", vec![(db("d"), "a1")], vec![(web("w"), "a1")], &[""]),
    ];
    for (name, bound, proposed, want) in cases {
        let found = outcome(&nodes, &bound, &proposed);
        let found: Vec<String> = found.into_iter().map(|one| one.err().unwrap_or_default()).collect();
        assert_eq!(found, want, "{name}");
    }
}

#[test]
fn a_pod_that_ends_is_near_and_is_not_counted_by_spreads() {
    let nodes = [node("a", &[("zone", "a")]), node("b", &[("zone", "b")])];
    let mut ending = pod("w", "web");
    ending.meta_mut().deletion_timestamp = Some(Time::from_unix(1, 0));
    let bound = [(ending, "a")];
    let proposed = [(spread(pod("v", "web"), "web", "zone"), "a"), (away(pod("u", "db"), "web", "zone"), "a")];
    let found = outcome(&nodes, &bound, &proposed);
    assert!(found[0].is_ok() && found[1].is_err(), "{found:?}");
}

fn random_term(dice: &mut Dice) -> PodAffinityTerm {
    let key = ["zone", "host", "rack"][dice.roll(3) as usize];
    let mut term = term(["a", "b"][dice.roll(2) as usize], key);
    if dice.one_in(6) {
        term.label_selector = [None, Some(Message::default())][dice.roll(2) as usize].clone();
    }
    if dice.one_in(4) {
        term.namespaces = vec![["d", "e"][dice.roll(2) as usize].into()];
    }
    if dice.one_in(4) {
        term.namespace_selector = Some(Message { match_labels: labels(&[("team", "x")]), ..Message::default() });
    }
    if dice.one_in(4) {
        term.match_label_keys = vec!["v".into()];
    }
    if dice.one_in(6) {
        term.mismatch_label_keys = vec!["v".into()];
    }
    term
}

fn random_spread(dice: &mut Dice) -> TopologySpreadConstraint {
    TopologySpreadConstraint {
        max_skew: 1 + dice.roll(2) as i32,
        min_domains: dice.one_in(3).then(|| 1 + dice.roll(4) as i32),
        topology_key: ["zone", "host", "rack"][dice.roll(3) as usize].into(),
        when_unsatisfiable: if dice.one_in(4) { "ScheduleAnyway" } else { "DoNotSchedule" }.into(),
        label_selector: term(["a", "b"][dice.roll(2) as usize], "").label_selector,
        node_affinity_policy: ["", "Honor", "Ignore"][dice.roll(3) as usize].into(),
        node_taints_policy: ["", "Honor", "Ignore"][dice.roll(3) as usize].into(),
        match_label_keys: if dice.one_in(4) { vec!["v".into()] } else { Vec::new() },
    }
}

fn random_pod(dice: &mut Dice, name: &str) -> Pod {
    let mut pod = pod(name, ["a", "b"][dice.roll(2) as usize]);
    pod.meta_mut().namespace = ["d", "e"][dice.roll(2) as usize].into();
    pod.meta_mut().labels.insert("v".into(), ["1", "2"][dice.roll(2) as usize].into());
    if dice.one_in(3) {
        pod.spec_mut().node_selector.insert("disk".into(), "ssd".into());
    }
    let required_during_scheduling_ignored_during_execution: Vec<_> =
        (0..dice.roll(3)).map(|_| random_term(dice)).collect();
    let near = PodAffinity { required_during_scheduling_ignored_during_execution, ..PodAffinity::default() };
    let required_during_scheduling_ignored_during_execution: Vec<_> =
        (0..dice.roll(3)).map(|_| random_term(dice)).collect();
    let away = PodAntiAffinity { required_during_scheduling_ignored_during_execution, ..PodAntiAffinity::default() };
    let (pod_affinity, pod_anti_affinity) = (dice.one_in(3).then_some(near), dice.one_in(3).then_some(away));
    pod.spec_mut().affinity = Some(Box::new(Affinity { pod_affinity, pod_anti_affinity, ..Affinity::default() }));
    if dice.one_in(2) {
        pod.spec_mut().topology_spread_constraints = (0..dice.roll(3)).map(|_| random_spread(dice)).collect();
    }
    pod
}

fn random_node(dice: &mut Dice, at: u64) -> Node {
    let mut node = node(&format!("n{at}"), &[("host", &format!("n{at}"))]);
    for (key, values) in [("zone", 3), ("rack", 2)] {
        if !dice.one_in(5) {
            node.meta_mut().labels.insert(key.into(), format!("{}", dice.roll(values)));
        }
    }
    if dice.one_in(2) {
        node.meta_mut().labels.insert("disk".into(), "ssd".into());
    }
    if dice.one_in(4) {
        node.spec_mut().taints = vec![Taint { key: "t".into(), effect: "NoSchedule".into(), ..Taint::default() }];
    }
    node
}

/// Whatever a cluster looks like, rules stand against the same nodes as by the reference, pod by pod as a batch is placed.
#[test]
fn scenes_say_what_the_reference_says() {
    let (mut refusals, mut grants) = (0, 0);
    for seed in 1..=400 {
        let mut dice = Dice(u64::wrapping_mul(seed, 0x9e37_79b9_7f4a_7c15));
        let nodes: Vec<Node> = (0..4 + dice.roll(4)).map(|at| random_node(&mut dice, at)).collect();
        let team = labels(&[("team", "x")]);
        let mut world = reference::World { namespaces: [("e".to_owned(), team.clone())].into(), ..Default::default() };
        world.nodes.clone_from(&nodes);
        let mut bound = Vec::new();
        for n in 0..dice.roll(10) {
            let mut pod = random_pod(&mut dice, &format!("old{n}"));
            if dice.one_in(5) {
                pod.meta_mut().deletion_timestamp = Some(Time::from_unix(1, 0));
            }
            let place = nodes[dice.roll(nodes.len() as u64) as usize].name().to_owned();
            pod.spec_mut().node_name.clone_from(&place);
            bound.push(entry(pod.clone()));
            world.pods.push((pod, Some(place)));
        }
        let pods: Vec<Pod> = (0..4).map(|n| random_pod(&mut dice, &format!("new{n}"))).collect();
        let demands: Vec<_> = pods.iter().map(|pod| Demand::of(pod).expect("rules")).collect();
        let subjects: Vec<Subject> =
            pods.iter().zip(&demands).map(|(pod, demand)| Subject { pod, demand: demand.as_deref() }).collect();
        let labels_of = |namespace: &str| if namespace == "e" { team.clone() } else { Labels::new() };
        let mut scene = scene(&nodes, &bound, &labels_of, &subjects);
        for (position, pod) in pods.iter().enumerate() {
            let mut admitting = None;
            for node in &nodes {
                let want = world.refusal(pod, node);
                let found = scene.admits(position, node.name());
                match want {
                    // Of the node alone: the scheduler's business.
                    Some("selector" | "taint") => {}
                    None => {
                        assert_eq!(found, Ok(()), "seed {seed}, {} on {}", pod.name(), node.name());
                        admitting = Some(node.name());
                        grants += 1;
                    }
                    Some(why) => {
                        assert!(found.is_err(), "seed {seed}, {} on {}: {why}", pod.name(), node.name());
                        refusals += 1;
                    }
                }
            }
            if let Some(node) = admitting {
                scene.place(position, node);
                world.pods.push((pod.clone(), Some(node.to_owned())));
            }
        }
    }
    assert!(refusals > 1_000 && grants > 1_000, "{refusals} refusals and {grants} grants prove little");
}
