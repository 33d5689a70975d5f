//! From results to charts.

use super::chart::{self, Axis, Bars, COLOURS, Chart, FREE, Series};
use super::outcome::Outcome;
use super::packing::{LOADS, Packing};
use super::study::{Point, TwoNode};

const DAY_S: f64 = 86_400.0;
/// The shortest wait that has a place on a logarithmic axis, seconds.
const LEAST_WAIT_S: f64 = 0.1;

/// Where capacity went, over all time and over time, and how long jobs waited.
pub fn comparison(prefix: &str, workload: &str, outcomes: &[Outcome]) -> Vec<Chart> {
    let Some(first) = outcomes.first() else { return Vec::new() };
    let resource = first.main_resource;
    let parts =
        [("useful work", COLOURS[0]), ("held idle", COLOURS[5]), ("held for nothing", COLOURS[1]), ("free", FREE)];
    let shares = outcomes.iter().map(|one| {
        let shares = one.shares;
        (one.strategy.clone(), vec![shares.useful, shares.held, shares.wasted, shares.free])
    });
    let title = format!("Where the {resource} of the cluster went");
    let stacked = chart::stacked(&title, workload, &parts, &shares.collect::<Vec<_>>());

    let (unit, length) = if first.time_s > 2.0 * DAY_S { ("days", DAY_S) } else { ("hours", 3600.0) };
    let panels = outcomes
        .iter()
        .map(|one| (one.strategy.clone(), one.series.iter().map(|(time, shares)| (time / length, *shares)).collect()));
    let title = format!("Use of {resource} over time");
    let names = ["useful work", "held (idle, or for nothing)"];
    let areas = chart::areas(&title, workload, unit, names, &panels.collect::<Vec<_>>());

    let waits = outcomes.iter().map(|one| {
        let waits = [one.wait.p50_s, one.wait.mean_s, one.wait.p95_s];
        (one.strategy.clone(), waits.map(|wait| wait.max(LEAST_WAIT_S)).to_vec())
    });
    let axis = Axis::log("seconds from coming to running whole (logarithmic; below 0.1 shown as 0.1)");
    let dots = chart::dots(
        "How long jobs waited",
        workload,
        &axis,
        &["median", "mean", "95th percentile"],
        &waits.collect::<Vec<_>>(),
    );
    vec![
        (format!("{prefix}-shares"), stacked),
        (format!("{prefix}-over-time"), areas),
        (format!("{prefix}-wait"), dots),
    ]
}

/// How often pairs were stuck.
pub fn two_node(all: &[TwoNode]) -> Vec<Chart> {
    let mut pairs: Vec<usize> = all.iter().map(|one| one.pairs).collect();
    pairs.sort_unstable();
    pairs.dedup();
    let runs = all.first().map_or(0, |one| one.runs);
    let panels = pairs.iter().map(|count| Bars {
        title: if *count == 1 { "1 pair".into() } else { format!("{count} pairs at once") },
        end: Some(100.0),
        rows: all
            .iter()
            .filter(|one| one.pairs == *count)
            .map(|one| (one.strategy.clone(), 100.0 * one.stuck as f64 / one.runs.max(1) as f64))
            .collect(),
    });
    let about = format!(
        "App 1 GiB + LogCollector 0.5 GiB on nodes of 1.25 and 2 GiB: % of {runs} interleavings that end stuck"
    );
    vec![("two-node-stuck".into(), chart::bars("Pairs that never run", &about, &panels.collect::<Vec<_>>()))]
}

fn series(points: &[Point], of: impl Fn(&Outcome) -> f64) -> Vec<Series> {
    let mut all: Vec<Series> = Vec::new();
    for point in points {
        let name = &point.outcome.strategy;
        let value = (point.at, of(&point.outcome));
        match all.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(value),
            None => all.push((name.clone(), vec![value])),
        }
    }
    all
}

/// Conflicts and load of schedulers over the time that a decision takes.
pub fn decision_time(workload: &str, points: &[Point]) -> Vec<Chart> {
    let x = Axis::log("seconds to decide on a service (logarithmic)");
    let conflicts = series(points, |one| one.conflict_fraction_service);
    let busy = series(points, |one| one.busyness_by_scheduler.first().copied().unwrap_or(0.0));
    let y = Axis::log("conflicted tries per service (logarithmic)");
    vec![
        (
            "mix-conflicts".into(),
            chart::lines("Services decided on again because of conflicts", workload, &x, &y, &conflicts),
        ),
        (
            "mix-busyness".into(),
            chart::lines(
                "Busyness of the services' scheduler",
                workload,
                &x,
                &Axis::linear("share of time spent deciding"),
                &busy,
            ),
        ),
    ]
}

/// Conflicts and waits over the number of schedulers.
pub fn schedulers(workload: &str, points: &[Point]) -> Vec<Chart> {
    let x = Axis::linear("schedulers side by side");
    let conflicts = series(points, |one| one.conflict_fraction);
    let waits = series(points, |one| one.wait.mean_s.max(LEAST_WAIT_S));
    let (conflicts_axis, waits_axis) =
        (Axis::linear("conflicted tries per job"), Axis::log("mean wait, seconds (logarithmic)"));
    vec![
        (
            "mix-schedulers".into(),
            chart::lines("Conflicts by number of schedulers", workload, &x, &conflicts_axis, &conflicts),
        ),
        (
            "mix-schedulers-wait".into(),
            chart::lines("Waiting by number of schedulers", workload, &x, &waits_axis, &waits),
        ),
    ]
}

/// How well nodes were filled.
pub fn packing(prefix: &str, about: &str, all: &[Packing]) -> Vec<Chart> {
    let panel = |title: &str, end: Option<f64>, of: &dyn Fn(&Packing) -> f64| Bars {
        title: title.into(),
        end,
        rows: all.iter().map(|one| (one.filler.to_owned(), of(one))).collect(),
    };
    let stranded = |one: &Packing| 100.0 * one.stranded.iter().copied().fold(0.0, f64::max);
    let mut panels = vec![
        panel("first refusal at % load", Some(100.0), &|one| 100.0 * one.load_at_first_refusal),
        panel("stranded, % of capacity", None, &stranded),
    ];
    if all.iter().all(|one| one.nodes_over_bound.is_some()) {
        let extra = |one: &Packing| 100.0 * (one.nodes_over_bound.unwrap_or(1.0) - 1.0);
        panels.insert(0, panel("nodes above bound, %", None, &extra));
    }
    let largest = LOADS.iter().enumerate().map(|(at, load)| {
        panel(&format!("at {:.0} % load", load * 100.0), Some(100.0), &move |one: &Packing| {
            one.largest[at].map_or(f64::NAN, |share| 100.0 * share)
        })
    });
    let title = "The largest pod that still fits, % of a node";
    vec![
        (format!("{prefix}-quality"), chart::bars("How well nodes are filled", about, &panels)),
        (format!("{prefix}-largest"), chart::bars(title, about, &largest.collect::<Vec<_>>())),
    ]
}
