use super::*;

fn one(namespaces: &[&str], labels: &str) -> Announcement {
    let anywhere = namespaces == ["*"];
    let namespaces = if anywhere { Vec::new() } else { namespaces.iter().map(|name| (*name).to_owned()).collect() };
    Announcement { namespaces, anywhere, labels: labels.to_owned() }
}

fn who(namespaces: &[&str], by_label: bool, labels: Option<&str>) -> Who {
    let parse = |text| LabelSelector::parse(text).expect("a selector");
    Who {
        namespaces: namespaces.iter().map(|name| (*name).to_owned()).collect(),
        namespace_selector: by_label.then(|| parse("team=a")),
        labels: labels.map(parse),
    }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

#[test]
fn whom_a_rule_speaks_of_is_announced() {
    for (who, want) in [
        (who(&["b", "a"], false, Some("x in (2,1),!y")), Some(one(&["a", "b"], "x in (1,2),!y"))),
        (who(&["a"], false, Some("")), Some(one(&["a"], ""))),
        // Which namespaces a selector chooses may change: any may be meant.
        (who(&["a"], true, Some("x=1")), Some(one(&["*"], "x=1"))),
        (who(&["a"], false, None), None),
    ] {
        assert_eq!(Announcement::of(&who), want, "{who:?}");
    }
}

#[test]
fn who_is_spoken_of_takes_the_turn_of_what_covers() {
    let all = [one(&["a"], "x=1"), one(&["a", "b"], "y"), one(&["*"], "z=1"), one(&["c"], "")];
    let announced = Announced::decode(&Announced::new(all.to_vec()).encode()).expect("it comes back");
    let turns = |indexes: &[usize]| indexes.iter().fold(0, |turns, index| turns | all[*index].turn());
    for (namespace, pod, want) in [
        ("a", labels(&[("x", "1")]), &[0][..]),
        ("b", labels(&[("x", "1")]), &[]),
        ("a", labels(&[("x", "2")]), &[]),
        ("a", labels(&[("x", "1"), ("y", "")]), &[0, 1]),
        ("b", labels(&[("y", "2"), ("z", "1")]), &[1, 2]),
        ("elsewhere", labels(&[("z", "1")]), &[2]),
        ("c", labels(&[]), &[3]),
        ("elsewhere", labels(&[]), &[]),
    ] {
        assert_eq!(announced.turns_of(namespace, &pod), turns(want), "{namespace} {pod:?}");
    }
    for (asked, want) in [
        (one(&["a"], "x=1"), Some(&[0][..])),
        (one(&["b"], "x=1"), None),
        (one(&["b"], "y"), Some(&[1])),
        (one(&["a", "b"], "y"), Some(&[1])),
        (one(&["a", "c"], "y"), None),
        (one(&["*"], "y"), None),
        (one(&["q"], "z=1"), Some(&[2])),
        (one(&["*"], "z=1"), Some(&[2])),
        (one(&["c"], "whatever"), Some(&[3])),
        (one(&["c", "d"], "whatever"), None),
    ] {
        assert_eq!(announced.covering(&asked), want.map(turns), "{asked:?}");
    }
    // Whoever is spoken of by a rule is spoken of by what covers the rule: so both take one turn at least.
    let both = announced.turns_of("c", &labels(&[("q", "1")])) & announced.covering(&one(&["c"], "q=1")).unwrap_or(0);
    assert_ne!(both, 0);
}

#[test]
fn what_nobody_needs_is_taken_back() {
    let announced = Announced::new(vec![one(&["a"], "x=1"), one(&["a"], "x=2"), one(&["b"], "")]);
    let needed = BTreeSet::from([one(&["a"], "x=2"), one(&["b"], "x=7")]);
    let (next, dropped) = announced.with(&[one(&["c"], "x=3")], Some(&needed));
    assert_eq!(next.all, [one(&["a"], "x=2"), one(&["b"], ""), one(&["c"], "x=3")]);
    assert_eq!(dropped, one(&["a"], "x=1").turn(), "its turn is compared when it is taken back");
    let (next, dropped) = announced.with(&[one(&["c"], "x=3")], None);
    assert_eq!((next.len(), dropped), (4, 0), "who is not told what is needed takes nothing back");
}

#[test]
fn too_many_become_coarser_and_cover_what_they_did() {
    let many: Vec<Announcement> = (0..=LIMIT).map(|n| one(&[&format!("n{}", n % 7)], &format!("x={n}"))).collect();
    let (next, dropped) = Announced::default().with(&many, None);
    assert_eq!((next.len(), dropped), (7, 0), "one for each namespace");
    assert!(many.iter().all(|one| next.covering(one).is_some()));
    let many: Vec<Announcement> = (0..=LIMIT).map(|n| one(&[&format!("n{n}")], "x=1")).collect();
    let (next, _) = Announced::default().with(&many, None);
    assert_eq!(next.len(), 1, "one for all");
    assert!(many.iter().all(|one| next.covering(one).is_some()));
    assert_eq!(next.turns_of("any", &Labels::new()).count_ones(), 1);
}

#[test]
fn turns_are_used_evenly_and_stay_what_they_are() {
    let mut used = [0; TURNS];
    for n in 0..1_600 {
        numbers(one(&["default"], &format!("app=a{n}")).turn()).for_each(|turn| used[turn] += 1);
    }
    assert!(used.iter().all(|count| (50..200).contains(count)), "{used:?}");
    // All servers must agree, also with those of an older build.
    assert_eq!(numbers(one(&["default"], "app=web").turn()).collect::<Vec<_>>(), [TURN_OF_WEB]);
}

/// As it was when this was written.
const TURN_OF_WEB: usize = 7;
