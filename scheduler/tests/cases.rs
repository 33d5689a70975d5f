//! All cases of `testdata`: everything as expected but what `differences.txt` lists, and all of that differing.

use std::collections::BTreeSet;
use std::path::Path;

use minipod_scheduler::cases;

#[test]
fn the_scheduler_agrees_with_kubernetes_but_for_the_listed_differences() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/kubernetes-1.20");
    let verdicts = cases::run_directory(&directory).expect("the cases are there");
    let listed = std::fs::read_to_string(directory.join("differences.txt")).expect("the list is there");
    let lines = listed.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let listed: BTreeSet<&str> = lines.filter_map(|line| line.split_whitespace().next()).collect();
    let differing: BTreeSet<&str> =
        verdicts.iter().filter(|verdict| verdict.difference.is_some()).map(|verdict| verdict.id.as_str()).collect();
    let new: Vec<_> =
        verdicts.iter().filter(|one| one.difference.is_some() && !listed.contains(one.id.as_str())).collect();
    assert!(new.is_empty(), "these differ: {new:#?}");
    let agreeing: Vec<_> = listed.difference(&differing).collect();
    assert!(agreeing.is_empty(), "these are listed and do not differ: {agreeing:?}");
    assert!(verdicts.len() - differing.len() >= 600, "only {} cases agree", verdicts.len() - differing.len());
    let kinds: BTreeSet<&str> =
        verdicts.iter().filter_map(|one| one.id.rsplit_once('-').map(|(kind, _)| kind)).collect();
    assert!(kinds.len() >= 15, "areas: {kinds:?}");
}

#[test]
fn what_is_no_case_is_reported_as_such() {
    for (line, told) in [
        ("{", "not a case"),
        (r#"{"id":"x","kind":"fliter"}"#, "unknown kind \"fliter\""),
        (r#"{"kind":"filter","pod":{"spec":{"contaners":[]}}}"#, "unknown field `contaners`"),
        (r#"{"kind":"filter","expect":{"a":3}}"#, "expect"),
        (r#"{"kind":"quantity","args":{"text":"1"},"expect":{"value":2}}"#, "value: ours 1, expected 2"),
        (r#"{"kind":"selector","args":{"selector":"a=b"}}"#, "want valid or matches"),
    ] {
        let verdict = cases::run_line(line, "file:1");
        let difference = verdict.difference.unwrap_or_default();
        assert!(difference.contains(told), "{line}: {difference}");
    }
    let empty = cases::run_directory(Path::new(env!("CARGO_MANIFEST_DIR"))).expect_err("no cases there");
    assert!(empty.to_string().contains("there is no *.jsonl file"), "{empty}");
}
