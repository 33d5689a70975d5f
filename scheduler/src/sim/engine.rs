//! The loop of events, and what a strategy is.

use super::job::{SECOND_US, Workload};
use super::outcome::Outcome;
use super::world::{Happening, World};

/// A way to give jobs their nodes.
pub trait Strategy {
    /// Name, for tables.
    fn name(&self) -> String;

    /// Something has happened; the strategy claims, starts and gives back in the world as it sees fit.
    fn happen(&mut self, what: Happening, world: &mut World);
}

/// Time that deciding takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DecisionTime {
    /// For each attempt to place a batch job, microseconds.
    pub job_us: u64,
    /// For each attempt to place a service, microseconds.
    pub service_us: u64,
    /// For each unit that is tried to be placed, beside that, microseconds.
    pub unit_us: u64,
}

impl DecisionTime {
    /// Deciding takes no time.
    pub const NONE: DecisionTime = DecisionTime { job_us: 0, service_us: 0, unit_us: 0 };

    /// For an attempt at `units` units of a job.
    pub fn of(&self, service: bool, units: usize) -> u64 {
        (if service { self.service_us } else { self.job_us }) + self.unit_us * units as u64
    }
}

/// When a run ends, and what is kept of it.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// At this time at the latest, microseconds.
    pub end_us: u64,
    /// As soon as every job has ended, or nothing can happen any more.
    pub stop_when_done: bool,
    /// Means over time that are kept.
    pub stretches: usize,
}

impl Span {
    /// Until the last job has come: what happens after it says nothing about a cluster under load.
    pub fn arrivals(workload: &Workload) -> Span {
        Span { end_us: workload.last_submit_us().max(SECOND_US), stop_when_done: false, stretches: 200 }
    }

    /// Until all is done, or `limit_us` has passed.
    pub fn drain(limit_us: u64) -> Span {
        Span { end_us: limit_us, stop_when_done: true, stretches: 200 }
    }
}

/// Runs a workload under a strategy.
///
/// # Panics
/// When the account of capacity does not add up or a node has more on it than it has: a bug of the simulator, whose figures would
/// be worthless.
pub fn run(workload: &Workload, strategy: &mut dyn Strategy, span: Span, seed: u64) -> Outcome {
    let mut world = World::new(workload, seed, span.end_us, span.stretches);
    let mut left = workload.jobs.len();
    while let Some(what) = world.next(span.end_us) {
        strategy.happen(what, &mut world);
        if let Happening::Ended(job, _) = what {
            left -= usize::from(world.is_finished(job));
        }
        if left == 0 && span.stop_when_done {
            break;
        }
    }
    if let Err(problem) = world.check() {
        panic!("{}: {problem}", strategy.name());
    }
    Outcome::of(strategy.name(), &world)
}
