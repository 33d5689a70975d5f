//! A cluster in one thread: replicas on simulated disks, a network that loses, doubles, delays and splits, clocks that drift, machines
//! that stop at any write. All of it comes from one seed.

pub mod check;
pub mod machine;
pub mod world;
