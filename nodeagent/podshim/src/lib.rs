//! What the node agent and the pod's supervisor share: the protocol of their socket, the layout of a pod's cgroups, and the
//! removal of what a dead supervisor left.
//!
//! The supervisor itself is the binary `minipod-podshim`; it has one thread, no runtime and no HTTP stack, because every
//! pod of a node pays for its memory.

pub mod call;
pub mod cgroup;
pub mod cleanup;
pub mod handover;
pub mod process;
pub mod protocol;
pub mod replace;
