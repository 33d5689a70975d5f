use super::*;
use crate::v1::{
    Event, EventSource, LabelSelectorRequirement, Node, NodeSpec, ObjectReference, Pod, PodSpec, PodStatus,
};

const LABELS: &str = include_str!("../testdata/label-selectors.txt");
const FIELDS: &str = include_str!("../testdata/field-selectors.txt");

/// Lines of a table without comments, as trimmed columns.
fn rows(table: &str) -> impl Iterator<Item = Vec<&str>> {
    let lines = table.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split('|').map(str::trim).collect())
}

fn labels(text: &str) -> BTreeMap<String, String> {
    let pairs = text.split_whitespace().filter_map(|pair| pair.split_once('='));
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

#[test]
fn label_selectors_from_text() {
    let mut count = 0;
    for row in rows(LABELS) {
        let [text, expected, verdicts @ ..] = row.as_slice() else { panic!("a row with too few columns") };
        match LabelSelector::parse(text) {
            Ok(selector) => {
                assert_eq!(selector.to_string(), *expected, "{text}");
                assert_eq!(
                    LabelSelector::parse(&selector.to_string()).as_ref(),
                    Ok(&selector),
                    "{text}: the text form reads back"
                );
                for verdict in verdicts {
                    let (yes, set) = (verdict.starts_with('+'), verdict.get(1..).unwrap());
                    assert_eq!(selector.matches(&labels(set)), yes, "{text} on {set}");
                    count += 1;
                }
            }
            Err(error) => assert_eq!(format!("error: {error}"), *expected, "{text}"),
        }
    }
    assert!(count > 40);
}

#[test]
fn label_selectors_from_messages() {
    let message = |operator: &str, values: &[&str]| v1::LabelSelector {
        match_labels: [("a".to_owned(), "1".to_owned())].into(),
        match_expressions: vec![LabelSelectorRequirement {
            key: "b".into(),
            operator: operator.into(),
            values: values.iter().map(|value| (*value).to_owned()).collect(),
        }],
    };
    for (operator, values, expected) in [
        ("In", &["y", "x", "y"] as &[&str], "a=1,b in (x,y)"),
        ("NotIn", &["x"], "a=1,b!=x"),
        ("Exists", &[], "a=1,b"),
        ("DoesNotExist", &[], "a=1,!b"),
        ("In", &[], "selector: key \"b\": In needs at least one value, found 0 values"),
        ("Exists", &["x"], "selector: key \"b\": Exists takes no values, found 1 values"),
        ("Gt", &["1"], "selector: operator \"Gt\" of key \"b\": want In, NotIn, Exists or DoesNotExist"),
        ("in", &["1"], "selector: operator \"in\" of key \"b\": want In, NotIn, Exists or DoesNotExist"),
    ] {
        let text = match LabelSelector::from_message(&message(operator, values)) {
            Ok(selector) => selector.to_string(),
            Err(error) => error.to_string(),
        };
        assert_eq!(text, expected);
    }
    assert!(LabelSelector::from_message(&v1::LabelSelector::default()).unwrap().is_everything());
    let more = LabelSelector::parse("a=1").unwrap().and("h", "x", false).unwrap().and("i", "y", true).unwrap();
    assert_eq!(more.to_string(), "a=1,h=x,i!=y");
}

#[test]
fn field_selectors() {
    let mut pod = Pod {
        spec: Some(PodSpec { node_name: "n,1".into(), scheduler_name: "s".into(), ..PodSpec::default() }),
        status: Some(PodStatus { phase: "Running".into(), ..PodStatus::default() }),
        ..Pod::default()
    };
    use crate::Resource;
    pod.meta_mut().name = "p".into();
    pod.meta_mut().namespace = "ns".into();
    let event = Event {
        involved_object: Some(ObjectReference { kind: "Pod".into(), uid: "u".into(), ..ObjectReference::default() }),
        source: Some(EventSource { component: "c".into(), ..EventSource::default() }),
        reason: "Started".into(),
        ..Event::default()
    };
    let node = Node { spec: Some(NodeSpec { unschedulable: true, ..NodeSpec::default() }), ..Node::default() };
    let objects: [Object; 3] = [pod.into(), event.into(), node.into()];
    let mut count = 0;
    for row in rows(FIELDS) {
        let [kind, text, expected] = row.as_slice() else { panic!("a row needs three columns") };
        let kind = Kind::from_name(kind).expect("a kind");
        let object = objects.iter().find(|object| object.kind_of() == Some(kind));
        let answer = match FieldSelector::parse(kind, text) {
            Ok(selector) => {
                assert_eq!(FieldSelector::parse(kind, &selector.to_string()).as_ref(), Ok(&selector), "{text}");
                selector.matches(object.expect("an object of the kind")).to_string()
            }
            Err(error) => format!("error: {error}"),
        };
        assert_eq!(answer, *expected, "{text}");
        count += 1;
    }
    assert!(count > 20);
    let selector = FieldSelector::parse(Kind::Pod, "spec.nodeName=a,status.phase!=Failed").unwrap();
    assert_eq!(selector.exact("spec.nodeName"), Some("a"));
    assert_eq!(selector.exact("status.phase"), None);
    assert!(!FieldSelector::parse(Kind::Pod, "").unwrap().matches(&Object::empty(Kind::Node)));
}
