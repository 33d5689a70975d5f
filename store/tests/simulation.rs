//! Three replicas and more through storms that a seed repeats. `MINIPOD_SIM_SEEDS=n` runs more of them, `MINIPOD_SIM_SEED=s` one alone.

mod sim;
mod support;

use minipod_store::replica::core::Planted;
use sim::world::{Tally, run};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name}: {value:?} is no number")))
}

/// Raft's own assertions count as violations.
fn one(seed: u64, planted: Option<Planted>, lying: bool) -> Result<Tally, String> {
    catch_unwind(AssertUnwindSafe(|| run(seed, planted, lying))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(format!(
            "panic: {}",
            text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
        ))
    })
}

#[test]
fn storms_break_nothing() {
    if let Some(seed) = number("MINIPOD_SIM_SEED") {
        println!("{:?}", one(seed, None, false).unwrap_or_else(|violated| panic!("seed {seed}: {violated}")));
        return;
    }
    let (first, seeds) = (number("MINIPOD_SIM_FIRST").unwrap_or(0), number("MINIPOD_SIM_SEEDS").unwrap_or(300));
    let next = AtomicU64::new(first);
    let sum = std::thread::scope(|scope| {
        let worker = || {
            let mut sum = Tally::default();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= first + seeds {
                    return sum;
                }
                let tally = one(seed, None, false)
                    .unwrap_or_else(|violated| panic!("{violated}; again with MINIPOD_SIM_SEED={seed}"));
                sum.acknowledged += tally.acknowledged;
                sum.reads += tally.reads;
                sum.crashes += tally.crashes;
                sum.snapshots_installed += tally.snapshots_installed;
                sum.changes += tally.changes;
            }
        };
        let workers = [(); 2].map(|()| scope.spawn(worker));
        workers.into_iter().fold(Tally::default(), |mut sum, worker| {
            let tally = worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            sum.acknowledged += tally.acknowledged;
            sum.reads += tally.reads;
            sum.crashes += tally.crashes;
            sum.snapshots_installed += tally.snapshots_installed;
            sum.changes += tally.changes;
            sum
        })
    });
    println!("{seeds} seeds: {sum:?}");
    // A simulation in which nothing happens proves nothing.
    assert!(sum.acknowledged > 20 * seeds && sum.reads > 10 * seeds && sum.crashes > seeds, "{sum:?}");
    assert!(sum.snapshots_installed > seeds / 4 && sum.changes > seeds / 4, "{sum:?}");
}

/// The first of `seeds` that finds the bug.
fn found(planted: Option<Planted>, lying: bool, seeds: u64) -> Option<(u64, String)> {
    // The panics of raft are expected here.
    (0..seeds).find_map(|seed| one(seed, planted, lying).err().map(|violated| (seed, violated)))
}

#[test]
fn planted_bugs_are_found() {
    let table = [
        ("a restart that forgets what was applied", Some(Planted::DoubleApply), false),
        ("snapshots without the configuration", Some(Planted::NoConfState), false),
        ("acknowledged before it is durable", Some(Planted::AckBeforeSync), false),
        ("reads that ask nobody", Some(Planted::StaleRead), false),
        ("disks that lose what they said is durable", None, true),
    ];
    for (what, planted, lying) in table {
        let (seed, violated) = found(planted, lying, 400).unwrap_or_else(|| panic!("not found: {what}"));
        println!("{what}: found with seed {seed}: {violated}");
    }
}
