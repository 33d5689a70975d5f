//! What a run comes to.

use serde::Serialize;

use super::job::{NAMES, RESOURCES};
use super::world::{Account, World};

/// Waiting times in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Wait {
    /// Mean.
    pub mean_s: f64,
    /// Half of the jobs waited no longer.
    pub p50_s: f64,
    /// Nineteen of twenty waited no longer.
    pub p95_s: f64,
}

impl Wait {
    /// Of these waits in seconds.
    pub fn of(mut waits: Vec<f64>) -> Wait {
        waits.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * waits.len() as f64).ceil() as usize;
            waits.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        let mean_s = waits.iter().sum::<f64>() / waits.len().max(1) as f64;
        Wait { mean_s, p50_s: at(0.5), p95_s: at(0.95) }
    }
}

/// Shares of capacity times time of one resource; they add up to 1.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Shares {
    /// Units ran.
    pub useful: f64,
    /// Held by units that did not run yet.
    pub held: f64,
    /// Held, and given back for nothing.
    pub wasted: f64,
    /// Nobody's.
    pub free: f64,
}

impl Shares {
    fn of(account: &Account, resource: usize) -> Shares {
        let parts = [account.useful, account.held, account.wasted, account.free].map(|part| part[resource]);
        let all = parts.iter().sum::<i128>().max(1) as f64;
        let [useful, held, wasted, free] = parts.map(|part| part as f64 / all);
        Shares { useful, held, wasted, free }
    }
}

/// A run's figures.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// The strategy.
    pub strategy: String,
    /// Virtual time that passed, seconds.
    pub time_s: f64,
    /// Jobs that came.
    pub jobs: usize,
    /// Jobs whose units have all started.
    pub started: usize,
    /// Jobs whose units have all ended.
    pub finished: usize,
    /// At the end nothing ran though jobs waited, and nothing had moved since this time, seconds.
    pub stuck_since_s: Option<f64>,
    /// The resource that is asked for most.
    pub main_resource: &'static str,
    /// Of the main resource.
    pub shares: Shares,
    /// Per resource, in the order of [`NAMES`].
    pub shares_by_resource: [Shares; RESOURCES],
    /// From coming until all units have started; those that still wait count with what they have waited so far.
    pub wait: Wait,
    /// Transactions with a conflict per job that has started: 1 means that each job had to be decided on twice.
    pub conflict_fraction: f64,
    /// The same of services alone.
    pub conflict_fraction_service: f64,
    /// Transactions with a conflict over all transactions.
    pub conflict_share: f64,
    /// Units refused.
    pub refused_units: u64,
    /// Times that a job gave back what it held.
    pub give_backs: u64,
    /// Mean over schedulers of the share of time spent deciding; above 1 when decisions go on side by side, as hoarders' do.
    pub busyness: f64,
    /// By scheduler; where services have one apart, it is the first.
    pub busyness_by_scheduler: Vec<f64>,
    /// Share of deciding that was for proposals of which nothing was accepted.
    pub decisions_lost: f64,
    /// Over time: middle of the stretch in seconds, share of the main resource that ran, share that was held.
    pub series: Vec<(f64, [f64; 2])>,
}

impl Outcome {
    /// Of a world at its end.
    pub fn of(strategy: String, world: &World) -> Outcome {
        let (now_us, main) = (world.now_us(), world.main_resource());
        let come: Vec<u32> = (0..world.job_count() as u32).filter(|job| world.job(*job).submit_us <= now_us).collect();
        let waits = come.iter().map(|job| {
            let until = world.complete_us(*job).unwrap_or(now_us);
            (until - world.job(*job).submit_us) as f64 / 1e6
        });
        let started = come.iter().filter(|job| world.is_complete(**job)).count();
        let services = come.iter().filter(|job| world.job(**job).service && world.is_complete(**job)).count();
        let account = world.account();
        let decisions = &world.decisions;
        let busy: Vec<f64> = decisions.busy_us.iter().map(|busy| *busy as f64 / now_us.max(1) as f64).collect();
        let over = |part: u64, all: u64| part as f64 / all.max(1) as f64;
        Outcome {
            strategy,
            time_s: now_us as f64 / 1e6,
            jobs: come.len(),
            started,
            finished: come.iter().filter(|job| world.is_finished(**job)).count(),
            stuck_since_s: (world.is_still() && started < come.len()).then(|| world.last_progress_us() as f64 / 1e6),
            main_resource: NAMES[main],
            shares: Shares::of(&account, main),
            shares_by_resource: std::array::from_fn(|resource| Shares::of(&account, resource)),
            wait: Wait::of(waits.collect()),
            conflict_fraction: over(decisions.conflicts.iter().sum(), started as u64),
            conflict_fraction_service: over(decisions.conflicts[1], services as u64),
            conflict_share: over(decisions.conflicts.iter().sum(), decisions.transactions),
            refused_units: decisions.refused_units,
            give_backs: decisions.give_backs,
            busyness: busy.iter().sum::<f64>() / busy.len().max(1) as f64,
            busyness_by_scheduler: busy,
            decisions_lost: over(decisions.lost_us, decisions.busy_us.iter().sum()),
            series: world.series().shares(world.capacity().0[main]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let wait = Wait::of((1..=20).map(f64::from).collect());
        assert_eq!((wait.mean_s, wait.p50_s, wait.p95_s), (10.5, 10.0, 19.0));
        assert_eq!(Wait::of(Vec::new()), Wait::default());
        assert_eq!(Wait::of(vec![3.0]).p95_s, 3.0);
    }
}
