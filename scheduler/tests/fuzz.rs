//! The fast core against the reference: random clusters with every feature, event by event.

mod reference;

use minipod_proto::Resource;
use minipod_proto::v1::{
    Affinity, Container, ContainerPort, LabelSelector, LabelSelectorRequirement, Node, NodeAffinity, NodeSelector,
    NodeSelectorRequirement, NodeSelectorTerm, Pod, PodAffinity, PodAffinityTerm, PodAntiAffinity,
    PreferredSchedulingTerm, ResourceRequirements, Taint, Time, Toleration, TopologySpreadConstraint,
    WeightedPodAffinityTerm,
};
use minipod_scheduler::plan::{Budget, Core, Event, NodeInfo, PodInfo, Profile};
use reference::{Labels, World};

/// SplitMix64: every run is the same run.
pub struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True once in `n`.
    fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

const KEYS: [&str; 3] = ["zone", "kubernetes.io/hostname", "rack"];
const NAMESPACES: [&str; 3] = ["red", "green", "blue"];

fn node(dice: &mut Dice, name: &str) -> Node {
    let mut node = Node::default();
    let meta = node.meta_mut();
    meta.name = name.to_owned();
    meta.labels = labels(&[("kubernetes.io/hostname", name)]);
    if !dice.once_in(6) {
        meta.labels.insert("zone".into(), format!("z{}", dice.below(3)));
    }
    if dice.once_in(2) {
        meta.labels.insert("rack".into(), format!("r{}", dice.below(2)));
    }
    if dice.once_in(2) {
        meta.labels.insert("disk".into(), dice.pick(&["ssd", "hdd"]).into());
    }
    if dice.once_in(3) {
        meta.labels.insert("size".into(), dice.below(5).to_string());
    }
    for _ in 0..dice.below(3) {
        if dice.once_in(3) {
            let effect = dice.pick(&["NoSchedule", "PreferNoSchedule", "NoExecute"]).to_owned();
            let taint = Taint { key: dice.pick(&["a", "b"]).into(), value: "x".into(), effect, ..Taint::default() };
            node.spec_mut().taints.push(taint);
        }
    }
    node.spec_mut().unschedulable = dice.once_in(15);
    let ready = if dice.once_in(20) { "False" } else { "True" };
    if dice.once_in(2) {
        node.status_mut().set_condition("Ready", ready, "", "", Time::from_unix(1, 0));
    }
    node.status_mut().allocatable = labels(&[
        ("cpu", dice.pick(&["2", "4", "4", "3900m"])),
        ("memory", dice.pick(&["2048Mi", "4096Mi", "4096Mi", "4100Mi"])),
        ("pods", dice.pick(&["3", "6", "20"])),
    ]);
    if dice.once_in(3) {
        node.status_mut().allocatable.insert("example.com/gpu".into(), "2".into());
    }
    node
}

fn selector(dice: &mut Dice) -> Option<LabelSelector> {
    match dice.below(6) {
        0 => None,
        1 => Some(LabelSelector::default()),
        2 => {
            let operator = dice.pick(&["In", "NotIn", "Exists", "DoesNotExist"]).to_owned();
            let values = if operator.ends_with("In") { vec!["web".into(), "db".into()] } else { Vec::new() };
            let one = LabelSelectorRequirement { key: "app".into(), operator, values };
            Some(LabelSelector { match_expressions: vec![one], ..Default::default() })
        }
        _ => {
            let match_labels = labels(&[("app", dice.pick(&["web", "db", "cache"]))]);
            Some(LabelSelector { match_labels, ..Default::default() })
        }
    }
}

fn pod_term(dice: &mut Dice) -> PodAffinityTerm {
    let mut term = PodAffinityTerm {
        label_selector: selector(dice),
        topology_key: dice.pick(&KEYS).to_owned(),
        ..Default::default()
    };
    match dice.below(6) {
        0 => term.namespaces = vec![dice.pick(&NAMESPACES).to_owned()],
        1 => {
            let match_labels = labels(&[("team", dice.pick(&["one", "two"]))]);
            term.namespace_selector = Some(LabelSelector { match_labels, ..Default::default() });
        }
        2 => term.namespace_selector = Some(LabelSelector::default()),
        _ => {}
    }
    match dice.below(8) {
        0 => term.match_label_keys = vec!["version".into()],
        1 => term.mismatch_label_keys = vec!["version".into()],
        _ => {}
    }
    term
}

fn node_term(dice: &mut Dice) -> NodeSelectorTerm {
    let mut term = NodeSelectorTerm::default();
    if dice.once_in(10) {
        let values = vec![format!("n{}", dice.below(6))];
        let operator = dice.pick(&["In", "NotIn"]).to_owned();
        term.match_fields = vec![NodeSelectorRequirement { key: "metadata.name".into(), operator, values }];
    }
    for _ in 0..dice.below(3) {
        let (key, operator, values): (&str, &str, &[&str]) = dice.pick(&[
            ("disk", "In", ["ssd"].as_slice()),
            ("disk", "NotIn", ["ssd"].as_slice()),
            ("disk", "Exists", [].as_slice()),
            ("zone", "DoesNotExist", [].as_slice()),
            ("size", "Gt", ["1"].as_slice()),
            ("size", "Lt", ["3"].as_slice()),
            ("zone", "In", ["z0", "z1"].as_slice()),
        ]);
        term.match_expressions.push(NodeSelectorRequirement {
            key: key.into(),
            operator: operator.into(),
            values: values.iter().map(|v| (*v).to_owned()).collect(),
        });
    }
    term
}

fn node_affinity(dice: &mut Dice) -> NodeAffinity {
    let mut affinity = NodeAffinity::default();
    if dice.once_in(2) {
        let node_selector_terms = (0..dice.below(3)).map(|_| node_term(dice)).collect();
        affinity.required_during_scheduling_ignored_during_execution = Some(NodeSelector { node_selector_terms });
    }
    for _ in 0..dice.below(3) {
        let (weight, preference) = (dice.below(3) as i32 + 1, Some(node_term(dice)));
        let term = PreferredSchedulingTerm { weight, preference };
        affinity.preferred_during_scheduling_ignored_during_execution.push(term);
    }
    affinity
}

fn weighted(dice: &mut Dice) -> WeightedPodAffinityTerm {
    WeightedPodAffinityTerm { weight: dice.below(5) as i32 + 1, pod_affinity_term: Some(pod_term(dice)) }
}

fn affinity(dice: &mut Dice) -> Affinity {
    let mut affinity = Affinity::default();
    if dice.once_in(3) {
        affinity.node_affinity = Some(node_affinity(dice));
    }
    if dice.once_in(4) {
        affinity.pod_affinity = Some(PodAffinity {
            required_during_scheduling_ignored_during_execution: (0..dice.below(3)).map(|_| pod_term(dice)).collect(),
            preferred_during_scheduling_ignored_during_execution: (0..dice.below(2)).map(|_| weighted(dice)).collect(),
        });
    }
    if dice.once_in(4) {
        affinity.pod_anti_affinity = Some(PodAntiAffinity {
            required_during_scheduling_ignored_during_execution: (0..dice.below(3)).map(|_| pod_term(dice)).collect(),
            preferred_during_scheduling_ignored_during_execution: (0..dice.below(2)).map(|_| weighted(dice)).collect(),
        });
    }
    affinity
}

fn spread(dice: &mut Dice) -> TopologySpreadConstraint {
    TopologySpreadConstraint {
        max_skew: dice.below(2) as i32 + 1,
        topology_key: dice.pick(&KEYS).into(),
        when_unsatisfiable: dice.pick(&["DoNotSchedule", "ScheduleAnyway"]).into(),
        label_selector: selector(dice),
        min_domains: dice.once_in(4).then_some(3),
        node_affinity_policy: dice.pick(&["", "Honor", "Ignore"]).into(),
        node_taints_policy: dice.pick(&["", "Honor", "Ignore"]).into(),
        match_label_keys: if dice.once_in(4) { vec!["version".into()] } else { Vec::new() },
    }
}

fn pod(dice: &mut Dice, number: u64) -> Pod {
    let mut pod = Pod::default();
    let meta = pod.meta_mut();
    meta.name = format!("p{number}");
    meta.uid = format!("uid-{number}");
    meta.namespace = dice.pick(&NAMESPACES).into();
    if !dice.once_in(5) {
        meta.labels.insert("app".into(), dice.pick(&["web", "db", "cache"]).into());
    }
    if dice.once_in(3) {
        meta.labels.insert("version".into(), dice.pick(&["1", "2"]).into());
    }
    // Distinct, so that the order of victims is one.
    pod.status_mut().start_time = Some(Time::from_unix(dice.next() as i64 >> 24, 0));
    let spec = pod.spec_mut();
    spec.priority = Some(dice.below(4) as i32);
    let mut container = Container { name: "main".into(), ..Default::default() };
    let mut requests = Labels::new();
    if !dice.once_in(5) {
        requests.insert("cpu".into(), dice.pick(&["100m", "500m", "1", "3"]).into());
    }
    if !dice.once_in(5) {
        requests.insert("memory".into(), dice.pick(&["64Mi", "512Mi", "1024Mi", "3000Mi"]).into());
    }
    if dice.once_in(8) {
        requests.insert("example.com/gpu".into(), "1".into());
    }
    container.resources = Some(ResourceRequirements { requests, ..Default::default() });
    if dice.once_in(8) {
        let host_ip = dice.pick(&["", "10.0.0.1", "10.0.0.2"]).to_owned();
        let protocol = dice.pick(&["", "UDP"]).to_owned();
        container.ports =
            vec![ContainerPort { host_port: 80, container_port: 80, host_ip, protocol, ..Default::default() }];
    }
    spec.containers = vec![container];
    if dice.once_in(6) {
        spec.node_selector = labels(&[("disk", "ssd")]);
    }
    for _ in 0..dice.below(3) {
        let (key, operator, value, effect) = dice.pick(&[
            ("a", "Equal", "x", ""),
            ("b", "", "x", "NoSchedule"),
            ("", "Exists", "", ""),
            ("a", "Exists", "", "PreferNoSchedule"),
            ("b", "Equal", "y", ""),
        ]);
        if dice.once_in(2) {
            spec.tolerations.push(Toleration {
                key: key.into(),
                operator: operator.into(),
                value: value.into(),
                effect: effect.into(),
                ..Default::default()
            });
        }
    }
    if dice.once_in(2) {
        spec.affinity = Some(Box::new(affinity(dice)));
    }
    if dice.once_in(3) {
        spec.topology_spread_constraints = (0..=dice.below(2)).map(|_| spread(dice)).collect();
    }
    pod
}

/// Both schedulers, fed with the same events.
struct Pair {
    world: World,
    core: Core,
    seed: u64,
    cases: u64,
    placed: u64,
    preemptions: u64,
}

impl Pair {
    fn new(seed: u64, dice: &mut Dice) -> Pair {
        let pack = dice.once_in(2);
        let mut core = Core::new(if pack { Profile::Pack } else { Profile::Spread });
        if dice.once_in(2) {
            core.set_walk_limit(dice.below(3) as usize);
        }
        let mut pair =
            Pair { world: World { pack, ..World::default() }, core, seed, cases: 0, placed: 0, preemptions: 0 };
        for namespace in NAMESPACES {
            pair.label_namespace(dice, namespace);
        }
        pair
    }

    fn label_namespace(&mut self, dice: &mut Dice, namespace: &str) {
        let labels = labels(&[("team", dice.pick(&["one", "two"]))]);
        self.core.apply(Event::Namespace(namespace.into(), labels.clone()));
        self.world.namespaces.insert(namespace.to_owned(), labels);
    }

    fn upsert_node(&mut self, node: Node) {
        self.core.apply(Event::Node(NodeInfo::new(&node).unwrap()));
        match self.world.nodes.iter_mut().find(|other| other.name() == node.name()) {
            Some(other) => *other = node,
            None => self.world.nodes.push(node),
        }
    }

    fn remove_node(&mut self, at: usize) {
        let node = self.world.nodes.remove(at);
        self.core.apply(Event::NodeGone(node.name().into()));
    }

    fn remove_pod(&mut self, at: usize) {
        let (pod, _) = self.world.pods.remove(at);
        self.core.apply(Event::PodGone(pod.uid().into()));
    }

    fn terminate(&mut self, at: usize) {
        let (pod, place) = &mut self.world.pods[at];
        pod.meta_mut().deletion_timestamp = Some(Time::from_unix(5, 0));
        let mut seen = pod.clone();
        seen.spec_mut().node_name = place.clone().unwrap_or_default();
        self.core.apply(Event::Pod(PodInfo::new(&seen).unwrap()));
    }

    /// Decides on a new pod both ways; it is then bound with or without an event that says so.
    fn decide(&mut self, dice: &mut Dice, pod: Pod) {
        let id = self.core.upsert_pod(PodInfo::new(&pod).unwrap()).unwrap();
        let chosen = self.core.decide(id);
        let context = || format!("seed {} pod {}", self.seed, serde_json::to_string(&pod).unwrap());
        let mut best = None;
        for node in &self.world.nodes {
            let refusal = self.world.refusal(&pod, node);
            let node_id = self.core.node_id(node.name()).unwrap();
            let score = self.core.score(id, node_id);
            assert_eq!(score.is_none(), refusal.is_some(), "{}: {} {refusal:?} {score:?}", context(), node.name());
            if let Some(score) = score {
                let truth = self.world.score(&pod, node);
                let fast = reference::Score {
                    shunned: score.fixed.shunned,
                    preference: score.fixed.preference,
                    pull: score.pull,
                    crowding: score.crowding,
                    rank: score.rank,
                };
                assert_eq!(fast, truth, "{}: {}", context(), node.name());
                best = best.max(Some((score, node.name().to_owned())));
            }
        }
        let chosen_name = chosen.map(|node| self.core.node_name(node).to_owned());
        assert_eq!(chosen_name, best.map(|(_, name)| name), "{}", context());
        let explanation = self.core.explain(id);
        for reason in &explanation.nodes {
            let node = self.world.nodes.iter().find(|node| node.name() == reason.node).unwrap();
            let agree = reason.reason.is_some() == self.world.refusal(&pod, node).is_some();
            assert!(agree, "{}: explanation {reason:?}", context());
        }
        self.cases += 1;
        if chosen.is_none() && dice.once_in(4) {
            self.compare_preemption(dice, &pod, id);
        }
        if let Some(node) = chosen {
            self.placed += 1;
            self.core.assume(id, node);
            if dice.once_in(2) {
                let mut seen = pod.clone();
                seen.spec_mut().node_name = chosen_name.clone().unwrap();
                self.core.apply(Event::Pod(PodInfo::new(&seen).unwrap()));
            }
            self.world.pods.push((pod, chosen_name));
        } else if dice.once_in(2) {
            self.world.pods.push((pod, None));
        } else {
            self.core.apply(Event::PodGone(pod.uid().into()));
        }
    }

    fn compare_preemption(&mut self, dice: &mut Dice, pod: &Pod, id: u32) {
        let one = |dice: &mut Dice| {
            let match_labels = labels(&[("app", dice.pick(&["web", "db"]))]);
            let selector = LabelSelector { match_labels, ..Default::default() };
            (dice.pick(&NAMESPACES).to_owned(), selector, dice.below(2) as i64)
        };
        let budgets: Vec<_> = (0..dice.below(3)).map(|_| one(dice)).collect();
        let fast = budgets.iter().map(|(namespace, selector, allowed)| Budget {
            namespace: namespace.clone(),
            selector: minipod_proto::selector::LabelSelector::from_message(selector).unwrap(),
            allowed: *allowed,
        });
        self.core.set_budgets(fast.collect());
        // Twice with a change in between: what is remembered of the first time must not show in the second.
        for _ in 0..2 {
            // Of equal nodes the one with the lower id wins: the reference gets them in that order.
            let mut world = self.world.clone();
            world.nodes.sort_by_key(|node| self.core.node_id(node.name()));
            let truth = world.preempt(pod, &budgets);
            let chosen = self.core.preempt(id).map(|chosen| {
                let victims = chosen.victims.iter().map(|victim| self.core.pod(*victim).unwrap().uid.to_string());
                (self.core.node_name(chosen.node).to_owned(), victims.collect::<Vec<_>>(), chosen.violations)
            });
            self.preemptions += u64::from(chosen.is_some());
            assert_eq!(chosen, truth, "seed {} {}", self.seed, serde_json::to_string(pod).unwrap());
            if !self.world.pods.is_empty() {
                let at = dice.below(self.world.pods.len() as u64) as usize;
                self.remove_pod(at);
            }
        }
    }

    /// A pod that waits is tried again: memos must not hide what has become possible.
    fn retry(&mut self, dice: &mut Dice) {
        let waiting: Vec<usize> = (0..self.world.pods.len()).filter(|at| self.world.pods[*at].1.is_none()).collect();
        if let Some(at) = waiting.get(dice.below(8) as usize) {
            let (pod, _) = self.world.pods.remove(*at);
            self.decide(dice, pod);
        }
    }

    fn step(&mut self, dice: &mut Dice, number: u64) {
        match dice.below(20) {
            0 => {
                let name = format!("n{}", dice.below(12));
                let node = node(dice, &name);
                self.upsert_node(node);
            }
            1 if self.world.nodes.len() > 2 && dice.once_in(3) => {
                let at = dice.below(self.world.nodes.len() as u64) as usize;
                let name = self.world.nodes[at].name().to_owned();
                let on: Vec<String> = self
                    .world
                    .pods
                    .iter()
                    .filter(|(_, place)| place.as_deref() == Some(&name))
                    .map(|(pod, _)| pod.uid().to_owned())
                    .collect();
                for uid in on {
                    let at = self.world.pods.iter().position(|(pod, _)| pod.uid() == uid).unwrap();
                    self.remove_pod(at);
                }
                self.remove_node(at);
            }
            2 if dice.once_in(4) => {
                let namespace = dice.pick(&NAMESPACES);
                self.label_namespace(dice, namespace);
            }
            3 | 4 if !self.world.pods.is_empty() => {
                let at = dice.below(self.world.pods.len() as u64) as usize;
                self.remove_pod(at);
            }
            5 if !self.world.pods.is_empty() => {
                let at = dice.below(self.world.pods.len() as u64) as usize;
                if self.world.pods[at].1.is_some() {
                    self.terminate(at);
                }
            }
            6..9 => self.retry(dice),
            _ => {
                let pod = pod(dice, number);
                self.decide(dice, pod);
            }
        }
    }
}

#[test]
fn the_fast_core_decides_as_the_reference_does() {
    let (mut cases, mut placed, mut preemptions, mut seed) = (0, 0, 0, 0);
    while cases < 100_000 {
        seed += 1;
        let mut dice = Dice(seed);
        let mut pair = Pair::new(seed, &mut dice);
        for at in 0..=dice.below(8) {
            let node = node(&mut dice, &format!("n{at}"));
            pair.upsert_node(node);
        }
        for number in 0..60 {
            pair.step(&mut dice, number);
        }
        cases += pair.cases;
        placed += pair.placed;
        preemptions += pair.preemptions;
    }
    // Had nearly everything been refused or nearly everything placed, little would have been compared.
    assert!(placed * 5 > cases && placed * 5 < cases * 4, "{placed} of {cases} placed");
    assert!(preemptions > 1_000, "{preemptions} preemptions");
}
