//! Rigid parallel jobs after Lublin and Feitelson, "The workload on parallel supercomputers: modeling the characteristics of rigid
//! jobs", J. Parallel Distrib. Comput. 63(11), 2003: sizes by a two-stage uniform distribution of their logarithm with serial jobs and
//! powers of two apart, run times by a hyper-gamma distribution of their logarithm that depends on the size, arrivals by a gamma
//! distribution of the logarithm of the gap, stretched over the hours of a day. The constants are the published ones, for batch and
//! interactive jobs each; the size of the machine is the caller's.

use crate::sim::job::{Amounts, Job, SECOND_US, Workload};
use crate::sim::rng::{Rng, gamma_cdf};

/// Half hours of a day.
const SLOTS: usize = 48;
const SLOT_S: f64 = 1800.0;
/// The half hour at which the model's day begins.
const DAY_START: usize = 11;
/// Longest run time and longest gap as natural logarithms of seconds: some two and five days. Longer ones are drawn again.
const MAX_LN_RUN: f64 = 12.0;
const MAX_LN_GAP: f64 = 13.0;

/// The parameters of one class of jobs, named as in the paper.
#[derive(Debug, Clone, Copy)]
struct Class {
    serial: f64,
    power_of_two: f64,
    /// Logarithms to base two of sizes: least, where the stages meet, greatest; and the share of the first stage.
    u_low: f64,
    u_med: f64,
    u_hi: f64,
    u_prob: f64,
    /// Run time: the two gamma distributions, and the share of the first, linear in the number of nodes.
    a1: f64,
    b1: f64,
    a2: f64,
    b2: f64,
    pa: f64,
    pb: f64,
    /// Gaps in the rush hours, the ratio of all hours to them, and the daily cycle.
    a_arr: f64,
    b_arr: f64,
    arar: f64,
    a_num: f64,
    b_num: f64,
}

fn batch(log2_nodes: f64) -> Class {
    Class {
        serial: 0.2927,
        power_of_two: 0.6686,
        u_low: 1.2,
        u_med: log2_nodes - 2.0,
        u_hi: log2_nodes,
        u_prob: 0.875,
        a1: 6.57,
        b1: 0.823,
        a2: 639.1,
        b2: 0.0156,
        pa: -0.003,
        pb: 0.6986,
        a_arr: 6.0415,
        b_arr: 0.8531,
        arar: 1.0519,
        a_num: 6.1271,
        b_num: 5.2740,
    }
}

fn interactive(log2_nodes: f64) -> Class {
    let u_hi = log2_nodes.min(5.5);
    Class {
        serial: 0.1541,
        power_of_two: 0.625,
        u_low: 1.0,
        u_med: u_hi - 2.5,
        u_hi,
        u_prob: 0.705,
        a1: 3.8351,
        b1: 0.6605,
        a2: 7.073,
        b2: 0.6856,
        pa: -0.0118,
        pb: 0.9156,
        a_arr: 6.5510,
        b_arr: 0.6621,
        arar: 0.9797,
        a_num: 8.9186,
        b_num: 3.6680,
    }
}

impl Class {
    fn size(&self, rng: &mut Rng, limit: u32) -> u32 {
        let kind = rng.unit();
        if kind <= self.serial {
            return 1;
        }
        let (from, to) = if rng.unit() <= self.u_prob { (self.u_low, self.u_med) } else { (self.u_med, self.u_hi) };
        let mut log2 = rng.between(from, to);
        if kind <= self.serial + self.power_of_two {
            log2 = log2.round();
        }
        // At the most the machine.
        (log2.exp2().round() as u32).clamp(1, limit)
    }

    /// Seconds.
    fn run_time(&self, rng: &mut Rng, size: u32) -> f64 {
        let first = (self.pa * f64::from(size) + self.pb).clamp(0.0, 1.0);
        loop {
            let (a, b) = if rng.unit() <= first { (self.a1, self.b1) } else { (self.a2, self.b2) };
            let ln = rng.gamma(a, b);
            if ln <= MAX_LN_RUN {
                return ln.exp().floor().max(1.0);
            }
        }
    }
}

/// When jobs of one class come.
struct Arrivals {
    class: Class,
    /// By half hour: how fast time is paid for; 1 on average.
    weights: [f64; SLOTS],
    slot: usize,
    /// Of the present half hour this much is paid for, as a share of a mean half hour.
    points: f64,
    slot_begin_s: f64,
}

impl Arrivals {
    fn new(class: Class) -> Arrivals {
        let mut weights = [0.0; SLOTS];
        for at in DAY_START..DAY_START + SLOTS {
            let below = |x: f64| gamma_cdf(x, class.a_num, class.b_num);
            weights[(at - 1) % SLOTS] = below(at as f64 + 0.5) - below(at as f64 - 0.5);
        }
        let mean = weights.iter().sum::<f64>() / SLOTS as f64;
        weights.iter_mut().for_each(|weight| *weight /= mean);
        Arrivals { class, weights, slot: 0, points: 0.0, slot_begin_s: 0.0 }
    }

    /// The next arrival, seconds from the beginning.
    fn next(&mut self, rng: &mut Rng) -> f64 {
        let ln = loop {
            let ln = rng.gamma(self.class.a_arr * self.class.arar, self.class.b_arr);
            if ln <= MAX_LN_GAP {
                break ln;
            }
        };
        self.points += ln.exp() / SLOT_S;
        while self.points > self.weights[self.slot] {
            self.points -= self.weights[self.slot];
            self.slot = (self.slot + 1) % SLOTS;
            self.slot_begin_s += SLOT_S;
        }
        self.slot_begin_s + SLOT_S * self.points / self.weights[self.slot]
    }
}

/// `jobs` rigid jobs on `nodes` equal nodes; each unit of a job takes one whole node, as on the machines that the model describes.
pub fn rigid(nodes: u32, jobs: usize, seed: u64) -> Workload {
    let mut rng = Rng::new(seed);
    let log2_nodes = f64::from(nodes.max(8)).log2();
    let mut classes = [batch(log2_nodes), interactive(log2_nodes)].map(Arrivals::new);
    let mut next: [f64; 2] = std::array::from_fn(|at| classes[at].next(&mut rng));
    let node = Amounts([1000, 1024, 0]);
    let mut all = Vec::with_capacity(jobs);
    while all.len() < jobs {
        let at = usize::from(next[1] < next[0]);
        let submit_s = next[at];
        next[at] = classes[at].next(&mut rng);
        let size = classes[at].class.size(&mut rng, nodes);
        let run_s = classes[at].class.run_time(&mut rng, size);
        all.push(Job {
            service: false,
            submit_us: (submit_s * SECOND_US as f64) as u64,
            duration_us: run_s as u64 * SECOND_US,
            parts: vec![node],
            count: size,
            min_count: size,
        });
    }
    Workload { name: format!("{jobs} rigid jobs, {nodes} nodes"), nodes: vec![node; nodes as usize], jobs: all }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_has_its_published_features() {
        let workload = rigid(256, 20_000, 3);
        let count = |test: fn(&Job) -> bool| workload.jobs.iter().filter(|job| test(job)).count() as f64 / 20_000.0;
        // Between the shares of the two classes: serial 0.15 to 0.29; powers of two, serial ones included, 0.78 to 0.97.
        let serial = count(|job| job.count == 1);
        assert!((0.15..0.30).contains(&serial), "{serial}");
        let powers = count(|job| job.count.is_power_of_two());
        assert!((0.75..0.98).contains(&powers), "{powers}");
        assert!(workload.jobs.iter().all(|job| (1..=256).contains(&job.count)));
        assert!(workload.jobs.is_sorted_by_key(|job| job.submit_us));
        // Large jobs run longer.
        let mean = |low: u32, high: u32| {
            let some: Vec<f64> = workload
                .jobs
                .iter()
                .filter(|job| (low..=high).contains(&job.count))
                .map(|job| job.duration_us as f64 / 1e6)
                .collect();
            some.iter().sum::<f64>() / some.len() as f64
        };
        assert!(mean(65, 256) > 1.2 * mean(1, 4), "{} {}", mean(65, 256), mean(1, 4));
        // More come in the afternoon than in the early morning.
        let hour = |from: u64, to: u64| {
            workload.jobs.iter().filter(|job| (from..to).contains(&(job.submit_us / SECOND_US % 86_400 / 3600))).count()
        };
        assert!(hour(13, 17) > 2 * hour(2, 6), "{} {}", hour(13, 17), hour(2, 6));
    }

    #[test]
    fn load_is_what_is_asked_for() {
        let workload = rigid(128, 2_000, 9).at_load(0.8);
        assert!((workload.load()[0] - 0.8).abs() < 1e-6, "{:?}", workload.load());
        assert_eq!(rigid(128, 200, 9), rigid(128, 200, 9));
        assert_ne!(rigid(128, 200, 9), rigid(128, 200, 10));
    }
}
