//!
//! - [`kernel`] reads what the kernel says of a pod (processes, namespaces, mounts, cgroups): never only the system's own word.
//! - [`wait`] waits for a state, level-triggered, and tells the last one seen when it does not come.
#![forbid(unsafe_code)]

pub mod kernel;
pub mod wait;
