//! The scheduler: pure decisions over an indexed snapshot, and a loop that carries them out.
//!
//! `answer` says why and where to, for `minictl why` and `fit`. `cases` holds the core against tables of facts. `sim` compares
//! strategies in virtual time; the daemon does not use it.
//! `plan` decides and does no I/O; `run` lists and watches, feeds the core, and proposes bindings. Several schedulers may run
//! beside each other: the API server's binding transaction is the arbiter.
#![forbid(unsafe_code)]

pub mod answer;
pub mod cases;
pub mod plan;
pub mod run;
pub mod sim;
