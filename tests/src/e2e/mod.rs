//! `schedule-e2e`: pods from their create until their node's watch shows them, through the real API server, scheduler and store.
//!
//! - [`workload`] is what is run: the workloads of kube-scheduler's own benchmark, scheduler_perf, as data.
//! - [`board`] is when and where each pod was seen.
//! - [`load`] makes nodes and pods.
//! - [`measure`] runs one workload on a fresh cluster and gives its figures.
//! - [`limits`] takes the parts of the way by themselves, so that the slowest has a name.
//! - [`questions`] is what questions and evictions cost meanwhile.
//! - [`verify`] holds what came of it against the invariants.

pub mod board;
pub mod limits;
pub mod load;
pub mod measure;
pub mod questions;
pub mod verify;
pub mod workload;
