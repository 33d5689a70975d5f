//! The user's hand: `minictl`, and the cluster on one machine that `minictl demo`, `minictl up` and the tests share.
//!
//! - [`cli`]: the commands. Each makes its calls, then prints what `view` says: data on standard output, the rest on standard error.
//! - [`view`]: what objects look like. Pure functions of objects and the time.
//! - [`local`]: a whole cluster on this machine.
#![forbid(unsafe_code)]

pub mod cli;
pub mod local;
pub mod view;
