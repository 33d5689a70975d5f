use super::*;

fn toleration(text: &str) -> Toleration {
    // key operator value effect; `-` is empty
    let mut columns = text.split_whitespace().map(|column| if column == "-" { "" } else { column }.to_owned());
    let mut next = || columns.next().unwrap_or_default();
    Toleration { key: next(), operator: next(), value: next(), effect: next(), ..Toleration::default() }
}

fn taint(text: &str) -> Taint {
    let mut columns = text.split_whitespace().map(|column| if column == "-" { "" } else { column }.to_owned());
    let mut next = || columns.next().unwrap_or_default();
    Taint { key: next(), value: next(), effect: next(), ..Taint::default() }
}

#[test]
fn tolerations_cover_taints() {
    let table = [
        ("a Exists - NoSchedule", "a x NoSchedule", true),
        ("a Exists - -", "a x NoExecute", true),
        ("a Exists - NoExecute", "a x NoSchedule", false),
        ("b Exists - -", "a x NoSchedule", false),
        ("- Exists - -", "a x NoSchedule", true),
        ("- Exists - NoSchedule", "a x NoExecute", false),
        ("a Equal x NoSchedule", "a x NoSchedule", true),
        ("a - x -", "a x NoSchedule", true),
        ("a Equal y -", "a x NoSchedule", false),
        ("a Equal - -", "a - NoSchedule", true),
        ("a Nonsense x -", "a x NoSchedule", false),
    ];
    for (one, other, expected) in table {
        assert_eq!(covers(&toleration(one), &taint(other)), expected, "{one} on {other}");
    }
    let taints = [taint("p x PreferNoSchedule"), taint("a x NoSchedule"), taint("b y NoExecute")];
    assert_eq!(untolerated(&taints, &[]).unwrap().key, "a");
    assert_eq!(untolerated(&taints, &[toleration("a Exists - -")]).unwrap().key, "b");
    assert_eq!(untolerated(&taints, &[toleration("- Exists - -")]), None);
    assert!(!tolerates_unschedulable(&[]));
    assert!(tolerates_unschedulable(&[toleration("node.kubernetes.io/unschedulable Exists - NoSchedule")]));
}

/// `key Operator v1,v2`; keys that begin with `@` are matchFields.
fn term(text: &str) -> NodeSelectorTerm {
    let mut term = NodeSelectorTerm::default();
    for part in text.split(';').map(str::trim).filter(|part| !part.is_empty()) {
        let mut columns = part.split_whitespace();
        let key = columns.next().unwrap();
        let operator = columns.next().unwrap_or_default().to_owned();
        let values = columns.next().map(|values| values.split(',').map(str::to_owned).collect()).unwrap_or_default();
        let requirement = |key: &str| NodeSelectorRequirement { key: key.to_owned(), operator, values };
        match key.strip_prefix('@') {
            Some(field) => term.match_fields.push(requirement(field)),
            None => term.match_expressions.push(requirement(key)),
        }
    }
    term
}

#[test]
fn node_selector_terms() {
    let labels = [("zone", "z1"), ("cores", "16"), ("word", "many"), ("empty", "")];
    let labels: BTreeMap<_, _> = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let table = [
        ("", false),
        ("zone In z1", true),
        ("zone In z2,z1", true),
        ("zone In z2", false),
        ("none In z1", false),
        ("zone In", false),
        ("zone NotIn z2", true),
        ("zone NotIn z1", false),
        ("none NotIn z1", true),
        ("zone NotIn", false),
        ("zone Exists", true),
        ("empty Exists", true),
        ("none Exists", false),
        ("zone Exists x", false),
        ("none DoesNotExist", true),
        ("zone DoesNotExist", false),
        ("none DoesNotExist x", false),
        ("cores Gt 15", true),
        ("cores Gt 16", false),
        ("cores Lt 17", true),
        ("cores Lt 16", false),
        ("cores Gt -1", true),
        ("cores Gt 1,2", false),
        ("cores Gt x", false),
        ("word Gt 1", false),
        ("none Gt 1", false),
        ("none Lt 1", false),
        ("zone Near z1", false),
        ("zone In z1; cores Gt 8", true),
        ("zone In z1; cores Gt 80", false),
        ("@metadata.name In node-a", true),
        ("@metadata.name In node-b", false),
        ("@metadata.name NotIn node-b", true),
        ("@metadata.name NotIn node-a", false),
        ("@metadata.name In node-a,node-b", false),
        ("@metadata.name Exists", false),
        ("@spec.x In node-a", false),
        ("@metadata.name In node-a; zone In z1", true),
        ("@metadata.name In node-a; zone In z2", false),
    ];
    for (text, expected) in table {
        assert_eq!(term_matches(&term(text), &labels, "node-a"), expected, "{text}");
    }
    // Terms are alternatives; none of them is no alternative.
    let selector = |terms: &[&str]| NodeSelector { node_selector_terms: terms.iter().map(|text| term(text)).collect() };
    assert!(node_selector_matches(&selector(&["zone In z2", "zone In z1"]), &labels, "n"));
    assert!(!node_selector_matches(&selector(&[]), &labels, "n"));
    // nodeSelector and affinity both count.
    let mut spec = PodSpec::default();
    assert!(node_matches(&spec, &labels, "n"));
    spec.node_selector = [("zone".to_owned(), "z1".to_owned())].into();
    assert!(node_matches(&spec, &labels, "n"));
    let affinity = spec.affinity.get_or_insert_default().node_affinity.get_or_insert_default();
    affinity.required_during_scheduling_ignored_during_execution = Some(selector(&["zone In z2"]));
    assert!(!node_matches(&spec, &labels, "n"));
}
