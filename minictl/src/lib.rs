//! The user's hand: `minictl`, and the cluster on one machine that `minictl demo`, `minictl up` and the tests share.
#![forbid(unsafe_code)]

pub mod local;
