//! Services and batch on one cluster, in the proportions that Omega's paper and the published Google trace report: most jobs are batch,
//! most resources go to services, which are few and run long; sizes and run times are heavy-tailed. The paper publishes no
//! parameters; those below are ours, chosen for these proportions.

use crate::sim::job::{Amounts, Job, SECOND_US, Workload};
use crate::sim::rng::Rng;

/// One service in so many jobs: batch is more than nine tenths of the jobs.
const SERVICE_EVERY: f64 = 16.0;
/// Median run times in seconds, and deviations of their logarithms.
const BATCH_RUN: (f64, f64) = (120.0, 1.3);
const SERVICE_RUN: (f64, f64) = (7_200.0, 1.0);
/// Nothing runs longer, seconds.
const LONGEST: (f64, f64) = (4.0 * 3600.0, 24.0 * 3600.0);
/// Tail exponent and greatest number of units.
const BATCH_UNITS: (f64, f64) = (1.1, 300.0);
const SERVICE_UNITS: (f64, f64) = (1.2, 100.0);
/// 32 CPUs and 128 GiB.
const NODE: Amounts = Amounts([32_000, 128 << 10, 0]);

/// `jobs` jobs of independent units; jobs come evenly at random (Poisson), one a second before [`Workload::at_load`] spaces them.
pub fn mix(nodes: u32, jobs: usize, seed: u64) -> Workload {
    let mut rng = Rng::new(seed);
    let mut at_s = 0.0;
    let mut all = Vec::with_capacity(jobs);
    for _ in 0..jobs {
        at_s += rng.exponential(1.0);
        let service = rng.unit() < 1.0 / SERVICE_EVERY;
        let ((median, sigma), longest, (alpha, most)) = match service {
            true => (SERVICE_RUN, LONGEST.1, SERVICE_UNITS),
            false => (BATCH_RUN, LONGEST.0, BATCH_UNITS),
        };
        let cpu = rng.lognormal(if service { 1500.0 } else { 700.0 }, 0.7).clamp(100.0, 8_000.0);
        // 1 to 8 GiB for each CPU.
        let memory = (cpu / 1000.0 * 1024.0 * 2.0f64.powf(rng.between(0.0, 3.0))).clamp(64.0, f64::from(32 << 10));
        all.push(Job {
            service,
            submit_us: (at_s * SECOND_US as f64) as u64,
            duration_us: (rng.lognormal(median, sigma).clamp(5.0, longest) * SECOND_US as f64) as u64,
            parts: vec![Amounts([cpu as i64, memory as i64, 0])],
            count: rng.pareto(alpha, 1.0, most) as u32,
            min_count: 1,
        });
    }
    Workload {
        name: format!("{jobs} jobs, services and batch, {nodes} nodes"),
        nodes: vec![NODE; nodes as usize],
        jobs: all,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_jobs_are_batch_and_most_work_is_services() {
        let workload = mix(100, 20_000, 5);
        let work = |service: bool| -> f64 {
            let jobs = workload.jobs.iter().filter(|job| job.service == service);
            jobs.map(|job| job.unit().0[0] as f64 * f64::from(job.count) * job.duration_us as f64).sum()
        };
        let services = workload.jobs.iter().filter(|job| job.service).count();
        assert!((1_000..1_500).contains(&services), "{services}");
        let share = work(true) / (work(true) + work(false));
        assert!((0.55..0.95).contains(&share), "{share}");
        // Heavy tail: the largest hundredth of the batch jobs has more than a tenth of the units.
        let mut counts: Vec<u32> = workload.jobs.iter().filter(|job| !job.service).map(|job| job.count).collect();
        counts.sort_unstable();
        let (all, top) = (counts.iter().sum::<u32>(), counts[counts.len() * 99 / 100..].iter().sum::<u32>());
        assert!(top * 10 > all, "{top} of {all}");
    }
}
