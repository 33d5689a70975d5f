//! Which runs answer which question.

use serde::Serialize;

use super::engine::{self, DecisionTime, Span};
use super::job::{Amounts, SECOND_US, Workload};
use super::outcome::Outcome;
use super::packing::{self, Filler, Packing};
use super::rng::Rng;
use super::strategy::{self, Options};
use super::workload;

/// Strategies by name, and what they are made with.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Names, checked.
    pub strategies: Vec<String>,
    /// The rest.
    pub options: Options,
    /// For everything random in strategies.
    pub seed: u64,
}

impl Setup {
    /// Of a workload under each strategy.
    ///
    /// # Errors
    /// When a strategy is not known.
    pub fn compare(&self, workload: &Workload, span: Span) -> Result<Vec<Outcome>, String> {
        let run = |name: &String| {
            let mut strategy = strategy::find(name)?(workload, self.options);
            Ok(engine::run(workload, strategy.as_mut(), span, self.seed))
        };
        self.strategies.iter().map(run).collect()
    }

    fn with(&self, options: Options) -> Setup {
        Setup { options, ..self.clone() }
    }
}

/// Of many interleavings of the two-node case.
#[derive(Debug, Clone, Serialize)]
pub struct TwoNode {
    /// The strategy.
    pub strategy: String,
    /// Pairs that come at once.
    pub pairs: usize,
    /// Interleavings tried.
    pub runs: u64,
    /// Of them, those in which a pair that never ran waits for ever, or still waits at the end of the time.
    pub stuck: u64,
    /// Mean of the pairs that ran.
    pub ran: f64,
    /// Mean time until all had run, seconds, where that happened.
    pub done_s: Option<f64>,
    /// Mean share of memory and time held for nothing, or idle while held.
    pub idle_or_wasted: f64,
}

/// The two-node case in `runs` interleavings for each number of pairs; each run has `limit_us`.
///
/// # Errors
/// When a strategy is not known.
pub fn two_node(setup: &Setup, pairs: &[usize], runs: u64, limit_us: u64) -> Result<Vec<TwoNode>, String> {
    let mut all = Vec::new();
    for name in &setup.strategies {
        let make = strategy::find(name)?;
        for pairs in pairs {
            let outcomes: Vec<Outcome> = (0..runs)
                .map(|run| {
                    let seed = setup.seed.wrapping_add(run);
                    let workload = workload::two_node(*pairs, seed);
                    let mut strategy = make(&workload, setup.options);
                    engine::run(&workload, strategy.as_mut(), Span::drain(limit_us), seed)
                })
                .collect();
            let mean = |of: &dyn Fn(&Outcome) -> f64, some: &[&Outcome]| {
                some.iter().map(|one| of(one)).sum::<f64>() / some.len() as f64
            };
            let every: Vec<&Outcome> = outcomes.iter().collect();
            let done: Vec<&Outcome> = outcomes.iter().filter(|one| one.finished == *pairs).collect();
            all.push(TwoNode {
                strategy: name.clone(),
                pairs: *pairs,
                runs,
                stuck: (outcomes.len() - done.len()) as u64,
                ran: mean(&|one| one.finished as f64, &every),
                done_s: (!done.is_empty()).then(|| mean(&|one| one.time_s, &done)),
                idle_or_wasted: mean(&|one| one.shares.held + one.shares.wasted, &every),
            });
        }
    }
    Ok(all)
}

/// A run with something varied.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// What was varied: seconds for a decision on a service, or number of schedulers.
    pub at: f64,
    /// The run.
    pub outcome: Outcome,
}

/// Each strategy for each time of deciding on a service, in seconds.
///
/// # Errors
/// When a strategy is not known.
pub fn by_decision_time(setup: &Setup, workload: &Workload, times_s: &[f64]) -> Result<Vec<Point>, String> {
    let mut points = Vec::new();
    for at in times_s {
        let time = DecisionTime { service_us: (at * SECOND_US as f64) as u64, ..setup.options.time };
        let run = setup.with(Options { time, ..setup.options });
        let outcomes = run.compare(workload, Span::arrivals(workload))?;
        // The names of strategies go without the number of schedulers, which is the same in all.
        points.extend(
            setup
                .strategies
                .iter()
                .zip(outcomes)
                .map(|(name, outcome)| Point { at: *at, outcome: Outcome { strategy: name.clone(), ..outcome } }),
        );
    }
    Ok(points)
}

/// Each strategy for each number of schedulers.
///
/// # Errors
/// When a strategy is not known.
pub fn by_schedulers(setup: &Setup, workload: &Workload, counts: &[usize]) -> Result<Vec<Point>, String> {
    let mut points = Vec::new();
    for count in counts {
        let run = setup.with(Options { schedulers: *count, ..setup.options });
        let outcomes = run.compare(workload, Span::arrivals(workload))?;
        points.extend(setup.strategies.iter().zip(outcomes).map(|(name, outcome)| Point {
            at: *count as f64,
            outcome: Outcome { strategy: name.clone(), ..outcome },
        }));
    }
    Ok(points)
}

/// Every filler on these nodes, mean over `runs` orders of the pods.
pub fn packing(pods: &[Amounts], nodes: &[Amounts], runs: u64, seed: u64) -> Vec<Packing> {
    let mean = |filler: &Filler| {
        let all: Vec<Packing> =
            (0..runs).map(|run| packing::fill(*filler, pods, nodes, seed.wrapping_add(run))).collect();
        packing::mean(&all)
    };
    Filler::ALL.iter().filter_map(mean).collect()
}

/// Pods for packing: units of the mix, and one in twenty that takes up to a node.
pub fn pods_to_pack(count: usize, node: Amounts, seed: u64) -> Vec<Amounts> {
    let mut rng = Rng::new(seed);
    let jobs = workload::mix(1, count, seed).jobs;
    let pod = |job: &super::job::Job| {
        if rng.unit() >= 0.05 {
            return job.unit();
        }
        let mut share = || rng.between(0.2, 1.0);
        Amounts([(node.0[0] as f64 * share()) as i64, (node.0[1] as f64 * share()) as i64, 0])
    };
    jobs.iter().map(pod).collect()
}
