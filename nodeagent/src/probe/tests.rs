//! Timelines as text: `testdata/probe/*.txt`. Outcomes are `+` success, `-` failure, `?` unknown, in order; the last repeats.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use super::*;

fn number(text: &str) -> i32 {
    text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn run_case(input: &str) -> String {
    let mut container = Container::default();
    let mut outcomes: BTreeMap<Kind, Vec<char>> = BTreeMap::new();
    let (mut until_s, mut ending_s, mut posted_s, mut passed) = (60, u64::MAX, 0, false);
    for line in input.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let kind = match words[0] {
            "startup" => Kind::Startup,
            "liveness" => Kind::Liveness,
            "readiness" => Kind::Readiness,
            "until" => {
                until_s = words[1].parse().expect("seconds");
                continue;
            }
            "ending" => {
                ending_s = words[1].parse().expect("seconds");
                continue;
            }
            "posted" => {
                posted_s = words[1].parse().expect("seconds");
                continue;
            }
            "passed" => {
                passed = true;
                continue;
            }
            other => panic!("unknown line {other}"),
        };
        let mut probe = Probe::default();
        for word in &words[2..] {
            match word.split_once('=').expect("KEY=VALUE") {
                ("delay", value) => probe.initial_delay_seconds = number(value),
                ("period", value) => probe.period_seconds = number(value),
                ("success", value) => probe.success_threshold = number(value),
                ("failure", value) => probe.failure_threshold = number(value),
                ("grace", value) => probe.termination_grace_period_seconds = Some(number(value).into()),
                other => panic!("unknown word {other:?}"),
            }
        }
        outcomes.insert(kind, words[1].chars().rev().collect());
        match kind {
            Kind::Startup => container.startup_probe = Some(Box::new(probe)),
            Kind::Liveness => container.liveness_probe = Some(Box::new(probe)),
            Kind::Readiness => container.readiness_probe = Some(Box::new(probe)),
        }
    }
    let mut probes = Probes::of(&container, 0, 0, passed).expect("a probe");
    let (mut out, mut condemned) = (String::new(), false);
    for now_s in 0..=until_s {
        let gate = Gate { post_started: now_s >= posted_s, ending: condemned || now_s >= ending_s };
        for kind in probes.due(gate, now_s * 1000) {
            let left = outcomes.get_mut(&kind).expect("outcomes");
            let sign = if left.len() > 1 { left.pop().expect("one") } else { left[0] };
            let outcome = match sign {
                '+' => Outcome::Success(String::new()),
                '-' => Outcome::Failure(String::new()),
                '?' => Outcome::Unknown(String::new()),
                other => panic!("unknown outcome {other}"),
            };
            let (verdict, count) = probes.take(kind, &outcome);
            let _ = write!(out, "{now_s} {} {sign}{count}", kind.as_str());
            if let Some(verdict) = verdict {
                condemned |= matches!(verdict, Verdict::Kill { .. });
                let _ = write!(out, " {verdict:?}");
            }
            out.push('\n');
        }
    }
    out
}

#[test]
fn timelines_are_those_of_the_tables() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/probe/timelines.txt");
    let text = std::fs::read_to_string(&file).expect("read");
    let update = std::env::var_os("UPDATE_TESTDATA").is_some();
    let (mut rewritten, mut failures) = (Vec::new(), String::new());
    for case in text.trim_end().split("\n\n") {
        let (input, expected) = case.split_once("\n----").unwrap_or((case, ""));
        let got = run_case(input);
        if got.trim_end() != expected.trim() && !update {
            let _ = writeln!(failures, "{input}\nexpected:\n{}\ngot:\n{got}", expected.trim());
        }
        rewritten.push(format!("{input}\n----\n{}", got.trim_end()));
    }
    if update {
        std::fs::write(&file, rewritten.join("\n\n") + "\n").expect("write");
    }
    assert!(failures.is_empty(), "{failures}");
}
