//! Whole clusters: what the end-to-end tests and benchmarks share.
//!
//! - [`kernel`] reads what the kernel says of a pod (processes, namespaces, mounts, cgroups): never only the system's own word.
//! - [`wait`] waits for a state, level-triggered, and tells the last one seen when it does not come.
//! - [`podman`] is the peer of the benchmarks.
//! - [`cluster`] is a cluster of the real binaries on this machine, and shorthands for what tests do with one.
//! - [`hollow`] has nodes without a machine, for tests of the control plane; [`plane`] is the control plane without nodes; [`wire`] is how load
//!   speaks to it without being most of the work itself.
//! - [`registry`] is a registry of images, the same that the node agent's own tests have.
//! - [`e2e`] is the benchmark `schedule-e2e`, [`hands`] the benchmark `access`.
#![forbid(unsafe_code)]

pub mod cluster;
pub mod e2e;
pub mod hands;
pub mod hollow;
pub mod kernel;
pub mod plane;
pub mod podman;
#[path = "../../nodeagent/tests/support/registry.rs"]
pub mod registry;
pub mod wait;
pub mod wire;
