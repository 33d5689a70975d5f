//! What the node agent and the pod's supervisor share: the protocol of their socket, and the layout of a pod's cgroups.
//!
//! The supervisor itself is the binary `minipod-podshim`; it has one thread, no runtime and no HTTP stack, because every
//! pod of a node pays for its memory.

pub mod protocol;
