//! The strategies that are compared.

mod atomic;
mod hoarding;
mod minipod;
mod objects;
mod optimistic;

pub use atomic::{Atomic, Order};
pub use hoarding::{Hoarding, Patience};
pub use minipod::Minipod;
pub use objects::{node_info, pod_info};
pub use optimistic::{Commit, Conflict, Optimistic};

use super::engine::{DecisionTime, Strategy};
use super::job::{SECOND_US, Workload};
use crate::plan::Profile;

/// What a strategy is made with.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Schedulers at once, for the optimistic ones and minipod.
    pub schedulers: usize,
    /// Time that deciding takes.
    pub time: DecisionTime,
    /// After how long a hoarder gives back, microseconds.
    pub hoard_timeout_us: u64,
    /// After how long minipod holds nodes for who waits, milliseconds.
    pub hold_after_ms: i64,
    /// Which nodes the core prefers.
    pub profile: Profile,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            schedulers: 1,
            time: DecisionTime::NONE,
            hoard_timeout_us: 600 * SECOND_US,
            hold_after_ms: 30_000,
            profile: Profile::Spread,
        }
    }
}

/// A strategy for a workload.
pub type Maker = fn(&Workload, Options) -> Box<dyn Strategy>;

/// All strategies: name, in one line what it does, how it is made.
pub const ALL: [(&str, &str, Maker); 10] = [
    ("hoard", "offers are held until the set is whole, without end", |_, options| {
        Box::new(Hoarding::new(Patience::Endless, options.time))
    }),
    ("hoard-timeout", "the same; after --hoard-timeout everything is given back, with back-off", |_, options| {
        Box::new(Hoarding::new(Patience::Timeout(options.hoard_timeout_us), options.time))
    }),
    ("hoard-oldest", "the same without timeout; the oldest job gets the offers first", |_, options| {
        Box::new(Hoarding::new(Patience::OldestFirst, options.time))
    }),
    ("opt-fit-all", "optimistic; refused where there is no room; all or nothing", |workload, options| {
        Box::new(Optimistic::new(workload, Conflict::Fit, Commit::AllOrNothing, options))
    }),
    ("opt-fit-inc", "optimistic; refused where there is no room; what fits is kept", |workload, options| {
        Box::new(Optimistic::new(workload, Conflict::Fit, Commit::Incremental, options))
    }),
    ("opt-seq-all", "optimistic; refused where the node has changed; all or nothing", |workload, options| {
        Box::new(Optimistic::new(workload, Conflict::Sequence, Commit::AllOrNothing, options))
    }),
    ("opt-seq-inc", "optimistic; refused where the node has changed; the rest is kept", |workload, options| {
        Box::new(Optimistic::new(workload, Conflict::Sequence, Commit::Incremental, options))
    }),
    ("atomic-fcfs", "whole pods and gangs by minipod's core, strictly in order of coming", |workload, options| {
        Box::new(Atomic::new(workload, Order::Strict, options))
    }),
    ("atomic-backfill", "the same; whoever fits goes, nothing is kept for who waits", |workload, options| {
        Box::new(Atomic::new(workload, Order::Backfill, options))
    }),
    (
        "minipod",
        "minipod's planner: backfill, and after --hold-after nodes are kept for the oldest",
        |workload, options| Box::new(Minipod::new(workload, options)),
    ),
];

/// Those that differ where decisions are fast beside the jobs: without conflicts, both kinds of conflict are the same.
pub const STANDARD: [&str; 8] = [
    "hoard",
    "hoard-timeout",
    "hoard-oldest",
    "opt-fit-all",
    "opt-fit-inc",
    "atomic-fcfs",
    "atomic-backfill",
    "minipod",
];

/// The strategy of that name.
///
/// # Errors
/// When there is none: the names that there are.
pub fn find(name: &str) -> Result<Maker, String> {
    let found = ALL.iter().find(|(known, ..)| *known == name).map(|(_, _, maker)| *maker);
    found.ok_or_else(|| {
        let names: Vec<&str> = ALL.iter().map(|(name, ..)| *name).collect();
        format!("no strategy is called {name:?}: want one of {}", names.join(", "))
    })
}
