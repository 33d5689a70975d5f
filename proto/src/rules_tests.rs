use super::*;
use crate::v1::{
    LabelSelector as Message, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, PodAffinity,
    PodAntiAffinity, Toleration,
};

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn selector(pairs: &[(&str, &str)]) -> Option<Message> {
    Some(Message { match_labels: labels(pairs), ..Message::default() })
}

fn pod(pairs: &[(&str, &str)]) -> Pod {
    let mut pod = Pod::default();
    let meta = pod.meta_mut();
    (meta.name, meta.namespace, meta.labels) = ("p".into(), "own".into(), labels(pairs));
    pod
}

fn term(change: impl FnOnce(&mut PodAffinityTerm)) -> PodAffinityTerm {
    let mut term = PodAffinityTerm {
        topology_key: "zone".into(),
        label_selector: selector(&[("app", "db")]),
        ..Default::default()
    };
    change(&mut term);
    term
}

#[test]
fn terms_speak_of_namespaces_and_labels() {
    type Case = (&'static str, PodAffinityTerm, &'static str, &'static [(&'static str, &'static str)], bool);
    let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let cases: [Case; 11] = [
        ("its own namespace", term(|_| ()), "own", &[("app", "db")], true),
        ("no other one", term(|_| ()), "other", &[("app", "db")], false),
        ("other labels", term(|_| ()), "own", &[("app", "web")], false),
        ("a named one", term(|t| t.namespaces = named(&["other"])), "other", &[("app", "db")], true),
        ("then not its own", term(|t| t.namespaces = named(&["other"])), "own", &[("app", "db")], false),
        ("by label", term(|t| t.namespace_selector = selector(&[("team", "a")])), "other", &[("app", "db")], true),
        ("all of them", term(|t| t.namespace_selector = selector(&[])), "own", &[("app", "db")], true),
        ("without a selector nobody", term(|t| t.label_selector = None), "own", &[("app", "db")], false),
        ("with an empty one all", term(|t| t.label_selector = selector(&[])), "own", &[], true),
        (
            "the pod's own value",
            term(|t| t.match_label_keys = named(&["v"])),
            "own",
            &[("app", "db"), ("v", "1")],
            true,
        ),
        (
            "another than its own",
            term(|t| t.mismatch_label_keys = named(&["v"])),
            "own",
            &[("app", "db"), ("v", "1")],
            false,
        ),
    ];
    for (name, term, namespace, other, want) in cases {
        let who = Term::new(&pod(&[("v", "1")]), "f", &term).expect(name).who;
        let of_namespace = if namespace == "other" { labels(&[("team", "a")]) } else { Labels::new() };
        let found = who.has_labels(&labels(other)) && who.has_namespace(namespace, &of_namespace);
        assert_eq!(found, want, "{name}");
    }
}

#[test]
fn rules_are_those_that_are_required() {
    let mut pod = pod(&[]);
    let required_during_scheduling_ignored_during_execution = vec![term(|_| ())];
    pod.spec_mut().affinity = Some(Box::new(Affinity {
        pod_affinity: Some(PodAffinity {
            required_during_scheduling_ignored_during_execution: required_during_scheduling_ignored_during_execution
                .clone(),
            ..PodAffinity::default()
        }),
        pod_anti_affinity: Some(PodAntiAffinity {
            required_during_scheduling_ignored_during_execution,
            ..PodAntiAffinity::default()
        }),
        ..Affinity::default()
    }));
    let constraint = |when: &str| TopologySpreadConstraint {
        max_skew: 1,
        topology_key: "zone".into(),
        when_unsatisfiable: when.into(),
        label_selector: selector(&[]),
        ..TopologySpreadConstraint::default()
    };
    pod.spec_mut().topology_spread_constraints = vec![constraint("DoNotSchedule"), constraint("ScheduleAnyway")];
    let rules = Rules::of(&pod).expect("good");
    let hard: Vec<bool> = rules.spread.iter().map(|spread| spread.hard).collect();
    assert_eq!((rules.affinity.len(), rules.anti_affinity.len(), hard), (1, 1, vec![true, false]));

    pod.spec_mut().topology_spread_constraints[1].max_skew = 0;
    let error = Rules::of(&pod).expect_err("no skew").to_string();
    assert_eq!(error, "pod own/p: topologySpreadConstraints: maxSkew is 0: want at least 1");
    pod.spec_mut().topology_spread_constraints[0].topology_key.clear();
    let error = Rules::of(&pod).expect_err("no key").to_string();
    assert!(error.starts_with("pod own/p: topologySpreadConstraints: topologyKey is empty: want"), "{error}");
}

#[test]
fn domains_have_bounds() {
    let spread = |max_skew, min_domains, counts_itself| Spread {
        who: Who { namespaces: BTreeSet::new(), namespace_selector: None, labels: None },
        topology_key: "zone".into(),
        max_skew,
        min_domains,
        hard: true,
        honor_affinity: true,
        honor_taints: false,
        counts_itself,
    };
    for (name, bounds, count, want) in [
        ("apart from nobody", Bounds::APART, Some(0), true),
        ("apart from one", Bounds::APART, Some(1), false),
        ("apart without a domain", Bounds::APART, None, true),
        ("near to one", Bounds::near(false), Some(1), true),
        ("near to nobody", Bounds::near(false), Some(0), false),
        ("the first of its kind", Bounds::near(true), Some(0), true),
        ("the first without a domain", Bounds::near(true), None, false),
        ("as full as the emptiest", Bounds::skew(&spread(1, 1, true), 3, 2), Some(2), true),
        ("one more", Bounds::skew(&spread(1, 1, true), 3, 2), Some(3), false),
        ("one more of others", Bounds::skew(&spread(1, 1, false), 3, 2), Some(3), true),
        ("skew 2", Bounds::skew(&spread(2, 1, true), 3, 2), Some(3), true),
        ("too few domains", Bounds::skew(&spread(1, 4, true), 3, 2), Some(1), false),
        ("too few domains, an empty one", Bounds::skew(&spread(1, 4, true), 3, 2), Some(0), true),
        ("spread without a domain", Bounds::skew(&spread(1, 1, true), 3, 2), None, false),
    ] {
        assert_eq!(bounds.admit(count), want, "{name}");
    }
}

#[test]
fn spreads_count_some_nodes() {
    let mut pod = pod(&[]);
    let zone_a = NodeSelectorRequirement { key: "zone".into(), operator: "In".into(), values: vec!["a".into()] };
    let terms = vec![NodeSelectorTerm { match_expressions: vec![zone_a], ..NodeSelectorTerm::default() }];
    pod.spec_mut().affinity = Some(Box::new(Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(NodeSelector { node_selector_terms: terms }),
            ..NodeAffinity::default()
        }),
        pod_affinity: Some(PodAffinity::default()),
        ..Affinity::default()
    }));
    pod.spec_mut().tolerations =
        vec![Toleration { key: "gpu".into(), operator: "Exists".into(), ..Toleration::default() }];
    let placement = Placement::of(pod.spec());
    assert_eq!(placement.spec.affinity.as_ref().map(|all| all.pod_affinity.is_some()), Some(false), "nodes alone");
    let taint = |key: &str| vec![Taint { key: key.into(), effect: "NoSchedule".into(), ..Taint::default() }];
    type Case = (&'static str, &'static str, &'static str, &'static [(&'static str, &'static str)], Vec<Taint>, bool);
    let cases: [Case; 8] = [
        ("selected", "", "", &[("zone", "a"), ("row", "1")], vec![], true),
        ("not selected", "", "", &[("zone", "b"), ("row", "1")], vec![], false),
        ("selection ignored", "Ignore", "", &[("zone", "b"), ("row", "1")], vec![], true),
        ("a key is missing", "Ignore", "", &[("zone", "b")], vec![], false),
        ("taints ignored", "", "", &[("zone", "a"), ("row", "1")], taint("disk"), true),
        ("taints honoured", "", "Honor", &[("zone", "a"), ("row", "1")], taint("disk"), false),
        ("tolerated", "", "Honor", &[("zone", "a"), ("row", "1")], taint("gpu"), true),
        ("no taint", "", "Honor", &[("zone", "a"), ("row", "1")], vec![], true),
    ];
    for (name, affinity, taints, node, tainted, want) in cases {
        let constraint = |key: &str| TopologySpreadConstraint {
            max_skew: 1,
            topology_key: key.into(),
            when_unsatisfiable: "DoNotSchedule".into(),
            node_affinity_policy: affinity.into(),
            node_taints_policy: taints.into(),
            ..TopologySpreadConstraint::default()
        };
        let mut soft = constraint("rack");
        soft.when_unsatisfiable = "ScheduleAnyway".into();
        // Keys of constraints of the same kind alone count: "rack" is of none of the nodes.
        pod.spec_mut().topology_spread_constraints = vec![constraint("zone"), constraint("row"), soft];
        let all = Rules::of(&pod).expect(name).spread;
        let inclusion = all[0].inclusion(&all, &placement);
        assert_eq!(inclusion.admits("n", &labels(node), &tainted), want, "{name}");
    }
}
