//! Whole clusters: what the end-to-end tests and benchmarks share.
//!
//! - [`kernel`] reads what the kernel says of a pod (processes, namespaces, mounts, cgroups): never only the system's own word.
//! - [`wait`] waits for a state, level-triggered, and tells the last one seen when it does not come.
//! - [`cluster`] is a cluster of the real binaries on this machine, and shorthands for what tests do with one.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod kernel;
pub mod wait;
