//! The two-node case: pairs of App (1 GiB) and LogCollector (0.5 GiB), which must be together, on Node_A with 1.25 GiB and Node_B with
//! 2 GiB. A pair fits on Node_B alone, one at a time.

use crate::sim::job::{Amounts, Job, SECOND_US, Workload};
use crate::sim::rng::Rng;

const APP: Amounts = Amounts([100, 1024, 0]);
const LOG_COLLECTOR: Amounts = Amounts([100, 512, 0]);
const NODE_A: Amounts = Amounts([4000, 1280, 0]);
const NODE_B: Amounts = Amounts([4000, 2048, 0]);

/// `pairs` pairs that come at the same moment and run for a minute each; which half of a pair asks first is by chance.
pub fn two_node(pairs: usize, seed: u64) -> Workload {
    let mut rng = Rng::new(seed);
    let pair = |_| {
        let mut parts = vec![APP, LOG_COLLECTOR];
        rng.shuffle(&mut parts);
        Job { service: false, submit_us: 0, duration_us: 60 * SECOND_US, parts, count: 1, min_count: 1 }
    };
    Workload {
        name: format!("{pairs} pairs on two nodes"),
        nodes: vec![NODE_A, NODE_B],
        jobs: (0..pairs).map(pair).collect(),
    }
}
