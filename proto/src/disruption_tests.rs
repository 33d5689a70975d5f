use super::*;
use crate::Resource;

fn amount(text: &str) -> Option<IntOrString> {
    match text {
        "-" => None,
        text => Some(text.parse::<i32>().map_or_else(|_| IntOrString::from(text), IntOrString::from)),
    }
}

/// One letter a pod: `r` ready, `u` runs and is not ready, `p` pending, `t` ready and being ended, `e` ended.
fn pods(letters: &str) -> Vec<Pod> {
    let pod = |letter: char| {
        let mut pod = Pod::default();
        let phase = match letter {
            'p' => "Pending",
            'e' => "Failed",
            _ => "Running",
        };
        pod.status_mut().phase = phase.into();
        let ready = if matches!(letter, 'r' | 't' | 'e') { "True" } else { "False" };
        pod.status_mut().set_condition("Ready", ready, "", "", Time::from_unix(1, 0));
        if letter == 't' {
            pod.meta_mut().deletion_timestamp = Some(Time::from_unix(2, 0));
        }
        pod
    };
    letters.chars().map(pod).collect()
}

/// minAvailable, maxUnavailable, policy, pods; then expected/healthy/desired/allowed; and what is said to the eviction of a pod that is
/// ready, of one that is not, and of a pending one.
const STANDINGS: &str = "
    2     -     -            rrr    3/3/2/1   counts  free    free
    2     -     -            rr     2/2/2/0   refused free    free
    2     -     -            rru    3/2/2/0   refused free    free
    2     -     -            ruu    3/1/2/0   refused refused free
    2     -     AlwaysAllow  ruu    3/1/2/0   refused free    free
    2     -     -            rrt    3/2/2/0   refused free    free
    2     -     -            rrre   3/3/2/1   counts  free    free
    0     -     -            rr     2/2/0/2   counts  counts  free
    0     -     -            uu     2/0/0/0   refused refused free
    50%   -     -            rrr    3/3/2/1   counts  free    free
    100%  -     -            rrr    3/3/3/0   refused free    free
    0%    -     -            rr     2/2/0/2   counts  counts  free
    -     1     -            rrrr   4/4/3/1   counts  free    free
    -     1     -            rrrt   4/3/3/0   refused free    free
    -     1     -            rrru   4/3/3/0   refused free    free
    -     30%   -            rrrr   4/4/2/2   counts  free    free
    -     0     -            rr     2/2/2/0   refused free    free
    -     9     -            rr     2/2/0/2   counts  counts  free
    -     -     -            rr     2/2/0/2   counts  counts  free
    9     -     -            -      0/0/9/0   refused refused free
    -     x     -            rr     2/2/2147483647/0 refused refused free
";

#[test]
fn the_table_of_standings() {
    let lines: Vec<&str> = STANDINGS.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    assert_eq!(lines.len(), 21);
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        let spec = PodDisruptionBudgetSpec {
            min_available: amount(words[0]),
            max_unavailable: amount(words[1]),
            unhealthy_pod_eviction_policy: if words[2] == "-" { String::new() } else { words[2].into() },
            selector: None,
        };
        let all = if words[3] == "-" { Vec::new() } else { pods(words[3]) };
        let standing = Standing::of(&spec, Counted::of(&all));
        let Standing { expected, healthy, desired, allowed } = standing;
        assert_eq!(format!("{expected}/{healthy}/{desired}/{allowed}"), words[4], "{line}");
        let said = |letter: &str| format!("{:?}", standing.judge(&spec, &pods(letter)[0])).to_lowercase();
        assert_eq!([said("r"), said("u"), said("p")], words[5..8], "{line}");
        assert_eq!((said("t"), said("e")), ("free".into(), "free".into()), "{line}");
    }
}

#[test]
fn one_eviction_takes_one() {
    let spec = PodDisruptionBudgetSpec { min_available: amount("1"), ..Default::default() };
    let all = pods("rrr");
    let mut standing = Standing::of(&spec, Counted::of(&all));
    for want in [(2, 1), (1, 0), (0, 0)] {
        standing = standing.without(&all[0]);
        assert_eq!((standing.healthy, standing.allowed), want);
    }
}

#[test]
fn amounts() {
    for (given, all, want) in
        [("3", 10, Ok(3)), ("25%", 10, Ok(3)), ("0%", 10, Ok(0)), ("100%", 7, Ok(7)), ("1%", 0, Ok(0))]
    {
        assert_eq!(Amount::read(&amount(given).unwrap()).map(|amount| amount.of(all)), want, "{given} of {all}");
    }
    for bad in ["-1", "101%", "1.5%", "half", "%", "-5%", "+5%", "5 %", "99999999999%"] {
        assert!(Amount::read(&amount(bad).unwrap()).is_err(), "{bad}");
    }
}

#[test]
fn scopes() {
    let mut budget = PodDisruptionBudget::default();
    budget.meta_mut().namespace = "default".into();
    let mut pod = pods("r").remove(0);
    pod.meta_mut().namespace = "default".into();
    pod.meta_mut().labels.insert("app".into(), "web".into());
    assert!(!Scope::of(&budget).unwrap().has(&pod), "without a selector it speaks of none");
    budget.spec_mut().selector = Some(Default::default());
    assert!(Scope::of(&budget).unwrap().has(&pod), "an empty selector speaks of all");
    let labels = |value: &str| [("app".to_owned(), value.to_owned())].into();
    budget.spec_mut().selector = Some(crate::v1::LabelSelector { match_labels: labels("web"), ..Default::default() });
    assert!(Scope::of(&budget).unwrap().has(&pod));
    budget.spec_mut().selector = Some(crate::v1::LabelSelector { match_labels: labels("db"), ..Default::default() });
    assert!(!Scope::of(&budget).unwrap().has(&pod));
    budget.spec_mut().selector = Some(Default::default());
    budget.meta_mut().namespace = "other".into();
    assert!(!Scope::of(&budget).unwrap().has(&pod));
}

#[test]
fn the_condition_keeps_its_time_while_it_says_the_same() {
    let mut budget = PodDisruptionBudget::default();
    budget.meta_mut().generation = 3;
    let at = |seconds| Time::from_unix(seconds, 0);
    let free = Standing { expected: 2, healthy: 2, desired: 1, allowed: 1 };
    let status = free.status(&budget, at(1));
    assert_eq!((status.observed_generation, status.disruptions_allowed), (3, 1));
    budget.status = Some(status);
    let again = free.status(&budget, at(2));
    assert_eq!(again.conditions[0].last_transition_time, Some(at(1)));
    let none = Standing { healthy: 1, allowed: 0, ..free };
    let status = none.status(&budget, at(3));
    assert_eq!(
        (status.conditions[0].status.as_str(), status.conditions[0].last_transition_time),
        ("False", Some(at(3)))
    );
    assert_eq!(none.to_string(), "needs 1 healthy pods and has 1 currently");
}
