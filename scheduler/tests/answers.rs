//! What is said of a pod that waits, and of pods that do not exist: reasons, remedies, places; and that asking changes nothing.

use std::collections::BTreeMap;

use minipod_proto::Resource;
use minipod_proto::manifest;
use minipod_proto::v1::{Node, Object, Pod, Taint};
use minipod_scheduler::plan::{Budget, Event, NodeInfo, Planner, PodInfo, Profile, Progress, Settings, Standing, Step};

fn planner() -> Planner {
    let name = "default-scheduler".into();
    Planner::new(Settings { name, shard: (0, 1), profile: Profile::Spread, hold_after_ms: 30_000 })
}

fn node(name: &str, cpu: &str, labels: &[(&str, &str)], change: impl FnOnce(&mut Node)) -> Event {
    let mut node = Node::default();
    node.meta_mut().name = name.into();
    node.meta_mut().labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    node.meta_mut().labels.insert("kubernetes.io/hostname".into(), name.into());
    let amounts = [("cpu", cpu), ("memory", "8Gi"), ("pods", "110")];
    node.status_mut().allocatable = amounts.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    change(&mut node);
    Event::Node(NodeInfo::new(&node).unwrap())
}

/// A pod of that name with a CPU request; `spec` is more of its spec as YAML in flow style, without braces.
fn pod(name: &str, cpu: &str, spec: &str) -> Pod {
    let more = if spec.is_empty() { String::new() } else { format!(", {spec}") };
    let text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec: {{containers: [{{name: c, image: x, resources: {{requests: {{cpu: {cpu}}}}}}}]{more}}}\n"
    );
    let objects: Vec<Object> = manifest::parse(&text).unwrap_or_else(|problems| panic!("{problems}\n{text}"));
    let mut pod = objects[0].as_pod().unwrap().clone();
    let meta = pod.meta_mut();
    (meta.namespace, meta.uid) = ("default".into(), format!("uid-{name}"));
    pod.spec_mut().scheduler_name = "default-scheduler".into();
    pod
}

fn seen(pod: &Pod) -> Event {
    Event::Pod(PodInfo::new(pod).unwrap())
}

fn bound(pod: &Pod, node: &str, priority: i32) -> Event {
    let mut pod = pod.clone();
    pod.spec_mut().node_name = node.into();
    pod.spec_mut().priority = Some(priority);
    seen(&pod)
}

/// `node: reason | remedy | victims` per node.
fn lines(planner: &Planner, uid: &str) -> Vec<String> {
    let Some(Standing::Waits { why, remedies, .. }) = planner.standing(uid) else {
        panic!("{:?}", planner.standing(uid))
    };
    let victims = |evict: &[u32]| {
        let names: Vec<&str> =
            evict.iter().filter_map(|pod| planner.core().pod(*pod)).map(|info| &*info.name).collect();
        names.join(" ")
    };
    let all = why.nodes.iter().zip(&remedies);
    all.map(|(node, remedy)| {
        let reason = node.reason.as_ref().map_or_else(|| "fits".to_owned(), ToString::to_string);
        let own = if remedy.by_preemption { " (itself)" } else { "" };
        format!("{}: {reason} | {} | {}{own}", node.node, remedy.text, victims(&remedy.evict))
    })
    .collect()
}

#[test]
fn every_node_has_its_first_reason_and_what_would_help() {
    let mut planner = planner();
    planner.observe(node("a-full", "2", &[], |_| {}));
    planner.observe(node("b-small", "1", &[], |_| {}));
    planner.observe(node("c-cordoned", "4", &[], |node| node.spec_mut().unschedulable = true));
    planner.observe(node("d-tainted", "4", &[], |node| {
        let taint = Taint { key: "gpu".into(), value: "yes".into(), effect: "NoSchedule".into(), ..Taint::default() };
        node.spec_mut().taints.push(taint);
    }));
    for (name, cpu, priority) in [("low", "500m", 1), ("mid", "500m", 5), ("high", "1", 50)] {
        planner.observe(bound(&pod(name, cpu, ""), "a-full", priority));
    }
    let mut big = pod("big", "1500m", "");
    big.spec_mut().priority = Some(10);
    big.spec_mut().preemption_policy = "Never".into();
    planner.observe(seen(&big));
    assert!(planner.plan(0, 10).iter().all(|step| matches!(step, Step::Report(_))));
    assert_eq!(
        lines(&planner, "uid-big"),
        [
            // The most important one is spared as long as it may: without low and mid one CPU is free, so high must go as well as one more.
            "a-full: cpu short by 1500m | free 1500m cpu | high low",
            "b-small: cpu short by 500m | no end of pods helps: all of the node is 1 cpu, the pod asks for 1500m | ",
            "c-cordoned: marked unschedulable | minictl uncordon c-cordoned | ",
            "d-tainted: taint gpu=yes:NoSchedule is not tolerated | a toleration of gpu=yes:NoSchedule | ",
        ]
    );
}

#[test]
fn labels_terms_and_domains_are_named() {
    let mut planner = planner();
    planner.observe(node("a", "4", &[("zone", "z1"), ("disk", "hdd")], |_| {}));
    planner.observe(node("b", "4", &[("zone", "z2")], |_| {}));
    planner.observe(bound(&pod("db", "100m", ""), "a", 0));
    let term = |labels: &str| {
        format!(
            "requiredDuringSchedulingIgnoredDuringExecution: [{{topologyKey: zone, labelSelector: {{matchLabels: {{app: {labels}}}}}}}]"
        )
    };
    for (name, spec, expected) in [
        (
            "ssd",
            "nodeSelector: {disk: ssd}".to_owned(),
            [
                "a: labels do not match the pod's node selector or affinity | nodeSelector wants disk=ssd, the node has disk=hdd | ",
                "b: labels do not match the pod's node selector or affinity | nodeSelector wants disk=ssd, the node has no label disk | ",
            ],
        ),
        (
            "near",
            format!("affinity: {{podAffinity: {{{}}}}}", term("cache")),
            [
                "a: no pod that the affinity asks for in zone=z1 | a pod with labels app=cache in zone=z1 | ",
                "b: no pod that the affinity asks for in zone=z2 | a pod with labels app=cache in zone=z2 | ",
            ],
        ),
        (
            "away",
            format!("nodeSelector: {{disk: hdd}}, affinity: {{podAntiAffinity: {{{}}}}}", term("db")),
            [
                "a: anti-affinity with a pod in zone=z1 | no pod with labels app=db in zone=z1: the pod's own anti-affinity | db",
                "b: labels do not match the pod's node selector or affinity | nodeSelector wants disk=hdd, the node has no label disk | ",
            ],
        ),
        (
            // Both at once can be true of no node: it waits with the reason.
            "contradiction",
            "affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: zone, operator: In, values: [z1]}, {key: zone, operator: NotIn, values: [z1]}]}]}}}".to_owned(),
            [
                "a: labels do not match the pod's node selector or affinity | node affinity wants zone NotIn (z1), the node has zone=z1 | ",
                "b: labels do not match the pod's node selector or affinity | node affinity wants zone In (z1), the node has zone=z2 | ",
            ],
        ),
    ] {
        planner.observe(seen(&pod(name, "100m", &spec)));
        planner.plan(0, 10);
        assert_eq!(lines(&planner, &format!("uid-{name}")), expected, "{name}");
    }
}

#[test]
fn a_disruption_budget_is_named() {
    let mut all = planner();
    all.observe(node("a", "1", &[], |_| {}));
    let web = pod("web", "1", "");
    all.observe(bound(&web, "a", 0));
    let selector = minipod_proto::selector::LabelSelector::parse("app=web").unwrap();
    all.observe(Event::Budgets(vec![Budget { namespace: "default".into(), selector, allowed: 0 }]));
    let mut next = pod("next", "1", "");
    next.spec_mut().preemption_policy = "Never".into();
    all.observe(seen(&next));
    all.plan(0, 10);
    assert_eq!(
        lines(&all, "uid-next"),
        ["a: cpu short by 1 | free 1 cpu (1 of these ends would violate a disruption budget) | web"]
    );
}

#[test]
fn pods_that_do_not_exist_get_places_and_leave_no_trace() {
    let mut planner = planner();
    planner.observe(node("a", "2", &[], |_| {}));
    planner.observe(node("b", "4", &[], |_| {}));
    let (wanted, spread) = (
        pod("web", "500m", ""),
        pod(
            "lone",
            "100m",
            "affinity: {podAntiAffinity: {requiredDuringSchedulingIgnoredDuringExecution: [{topologyKey: kubernetes.io/hostname, labelSelector: {matchLabels: {app: lone}}}]}}",
        ),
    );
    for _ in 0..3 {
        let fit = planner.fit(&[PodInfo::new(&wanted).unwrap()], 40);
        let mut by_node: BTreeMap<&str, usize> = BTreeMap::new();
        fit.placements.iter().for_each(|(_, _, node)| *by_node.entry(node).or_default() += 1);
        assert_eq!(by_node, [("a", 4), ("b", 8)].into());
        let unplaced = fit.unplaced.expect("twelve fit");
        assert_eq!((unplaced.copy, unplaced.pod), (12, 0));
        assert_eq!(unplaced.why.to_string(), "0/2 nodes are available: a: cpu short by 500m; b: cpu short by 500m");
        // Copies see each other.
        assert_eq!(planner.fit(&[PodInfo::new(&spread).unwrap()], 3).placements.len(), 2);
        assert_eq!(planner.core().pod_count(), 0);
    }
    planner.observe(seen(&pod("real", "4", "")));
    let steps = planner.plan(0, 10);
    assert!(matches!(&steps[..], [Step::Bind(all)] if all[0].node == "b"), "{steps:?}");
}

#[test]
fn a_group_that_fits_in_part_fits_not_at_all() {
    let mut planner = planner();
    planner.observe(node("a", "2", &[], |_| {}));
    let mut member = pod("member", "1", "");
    let annotations = &mut member.meta_mut().annotations;
    annotations.insert("minipod.dev/pod-group".into(), "job".into());
    annotations.insert("minipod.dev/pod-group-min-count".into(), "3".into());
    let info = [PodInfo::new(&member).unwrap()];
    assert_eq!(planner.fit(&info, 3).group.as_deref(), Some("job: 2 of at least 3 find a place"));
    planner.observe(node("b", "2", &[], |_| {}));
    assert_eq!(planner.fit(&info, 3).group, None);
}

/// A cluster of nodes of a size, with as many pods of a size on each.
fn full((nodes, node_cpu): (usize, &str), (pods, pod_cpu): (usize, &str)) -> Planner {
    let mut all = planner();
    let small = pod("small", pod_cpu, "");
    for at in 0..nodes {
        let name = format!("n{at}");
        all.observe(node(&name, node_cpu, &[], |node| {
            node.status_mut().allocatable.insert("pods".into(), "200".into());
        }));
        for one in 0..pods {
            let mut small = small.clone();
            small.meta_mut().uid = format!("uid-{at}-{one}");
            all.observe(bound(&small, &name, 0));
        }
    }
    all
}

#[test]
fn a_question_thinks_away_no_more_pods_than_it_may() {
    // Twenty thousand pods are 200 nodes.
    let mut all = full((300, "10"), (100, "100m"));
    all.observe(seen(&pod("web", "1", "")));
    all.plan(0, 10);
    let Some(Standing::Waits { remedies, tried, .. }) = all.standing("uid-web") else { panic!("it waits") };
    assert_eq!(tried, 200);
    assert_eq!(
        remedies.iter().filter(|remedy| remedy.evict.len() == 10).count(),
        200,
        "each of them is answered in full"
    );
}

/// A cluster of 5,000 nodes with 20 pods each, and a pod that fits on none.
fn large() -> Planner {
    let mut all = full((5_000, "1500m"), (20, "50m"));
    all.observe(seen(&pod("big", "1", "")));
    all.plan(0, 10);
    all
}

#[test]
fn decisions_are_made_between_the_slices_of_answers() {
    let mut all = large();
    let mut asked: Vec<_> = (0..8).map(|_| all.inquire("uid-big")).collect();
    let (mut slices, mut answers) = (0, Vec::new());
    while !asked.is_empty() {
        for inquiry in std::mem::take(&mut asked) {
            // What comes while an answer is on its way is decided on before the next slice of it.
            slices += 1;
            let name = format!("p{slices}");
            all.observe(seen(&pod(&name, "10m", "")));
            let steps = all.plan(slices, 100);
            let bound = |step: &Step| matches!(step, Step::Bind(all) if all.iter().any(|one| *one.pod == *name));
            assert!(steps.iter().any(bound), "{name}: {steps:?}");
            match all.pursue(inquiry) {
                Progress::More(more) => asked.push(more),
                Progress::Done(answer) => answers.push(answer.expect("it is known")),
            }
        }
    }
    // Ten of judging, ten of advising, twenty of trying each, or a few more where pods have come.
    assert!((8 * 40..8 * 44).contains(&slices), "{slices}");
    for answer in answers {
        let Standing::Waits { why, remedies, tried, .. } = answer else { panic!("{answer:?}") };
        assert_eq!((why.nodes.len(), remedies.len()), (5_000, 5_000));
        // Twenty thousand pods, among them some that have come meanwhile.
        assert!((900..=1_000).contains(&tried), "{tried}");
        assert!(why.nodes.is_sorted_by(|left, right| left.node < right.node));
        assert!(why.nodes.iter().all(|node| node.reason.is_some()));
        assert_eq!(remedies.iter().filter(|remedy| !remedy.evict.is_empty()).count(), tried);
    }
}

#[test]
fn a_pod_that_gets_its_place_or_goes_while_it_is_asked_about() {
    let mut all = large();
    let [first, second] = [all.inquire("uid-big"), all.inquire("uid-big")];
    let Progress::More(first) = all.pursue(first) else { panic!("5,000 nodes are more than a slice") };
    let Progress::More(second) = all.pursue(second) else { panic!("5,000 nodes are more than a slice") };
    all.observe(node("new", "8", &[], |_| {}));
    all.plan(1, 10);
    let Progress::Done(Some(Standing::Placed(where_to))) = all.pursue(first) else { panic!("it has its place") };
    assert_eq!(where_to, "proposed for new, not confirmed yet");
    all.observe(Event::PodGone("uid-big".into()));
    assert!(matches!(all.pursue(second), Progress::Done(None)));
}

#[test]
fn a_node_that_goes_while_it_is_asked_about_is_left_out() {
    let mut all = large();
    let mut inquiry = all.inquire("uid-big");
    let standing = loop {
        match all.pursue(inquiry) {
            Progress::More(more) => inquiry = more,
            Progress::Done(standing) => break standing,
        }
        all.observe(Event::NodeGone("n4999".into()));
    };
    let Some(Standing::Waits { why, remedies, .. }) = standing else { panic!("{standing:?}") };
    assert_eq!((why.nodes.len(), remedies.len()), (4_999, 4_999));
}

#[test]
fn reasons_of_many_kinds_of_pods_are_told_over_several_turns() {
    let mut all = large();
    for cpu in 2..22 {
        all.observe(seen(&pod(&format!("p{cpu}"), &cpu.to_string(), "")));
    }
    let (mut told, mut turns) = (BTreeMap::<String, usize>::new(), 0);
    while all.due_ms(1).is_some_and(|due| due <= 1) {
        turns += 1;
        assert!(turns < 100, "it comes to no end: {told:?}");
        let mut now = 0;
        for step in all.plan(1, 100) {
            let Step::Report(reports) = step else { panic!("{step:?}") };
            now += reports.len();
            reports.iter().for_each(|report| *told.entry(report.pod.to_string()).or_default() += 1);
        }
        // Two kinds of pods on 5,000 nodes are what one turn may look at.
        assert!(now <= 2, "{now} in one turn");
    }
    assert_eq!(told.len(), 20, "{told:?}");
    assert!(told.values().all(|times| *times == 1), "{told:?}");
}

#[test]
fn a_selector_that_is_none_is_an_error_with_its_place() {
    let term = |operator: &str| {
        format!(
            "affinity: {{podAntiAffinity: {{requiredDuringSchedulingIgnoredDuringExecution: [{{topologyKey: zone, labelSelector: \
             {{matchExpressions: [{{key: app, operator: {operator}, values: [x]}}]}}}}]}}}}"
        )
    };
    let good = pod("web", "1", &term("In"));
    assert!(PodInfo::new(&good).is_ok());
    for (operator, want) in [
        (
            "Gt",
            "pod default/web: affinity.podAntiAffinity: selector: operator \"Gt\" of key \"app\": want In, NotIn, Exists or DoesNotExist",
        ),
        (
            "Exists",
            "pod default/web: affinity.podAntiAffinity: selector: key \"app\": Exists takes no values, found 1 values",
        ),
    ] {
        let error = PodInfo::new(&pod("web", "1", &term(operator))).err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some(want));
    }
}
