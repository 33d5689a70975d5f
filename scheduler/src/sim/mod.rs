//! `minipod-scheduler sim`: strategies of placement beside each other, in virtual time.
//!
//! Pure and seeded: the same workload, strategy and seed give the same result. Nothing of it runs in the daemon.
//!
//! | module | what it holds |
//! |---|---|
//! | `job` | amounts, jobs, clusters |
//! | `rng` | random numbers and the distributions that the workloads need |
//! | `world` | the nodes, who holds what of them, and the account of every unit of capacity |
//! | `engine` | the trait that strategies have, and the loop of events |
//! | `strategy` | hoarding, optimistic with rollback, pod-atomic on the real core, and minipod's own planner |
//! | `workload` | generated jobs: Lublin and Feitelson's model, a mix of services and batch, the two-node case |
//! | `read` | jobs and clusters from files: SWF, and CSV as GPU clusters publish it |
//! | `outcome` | what a run comes to |
//! | `packing` | how well placements fill nodes |
//! | `chart`, `figures` | plots as SVG |
//! | `study` | which runs answer which question |
//! | `cli`, `table` | flags, what is printed, files |

mod chart;
pub mod cli;
pub mod engine;
mod figures;
pub mod job;
pub mod outcome;
pub mod packing;
pub mod read;
pub mod rng;
pub mod strategy;
pub mod study;
mod table;
pub mod workload;
pub mod world;
