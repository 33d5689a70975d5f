//! Real processes under faults: the network and disks they have, what clients do meanwhile, and how it is judged.

pub mod clients;
pub mod net;
pub mod register;
pub mod watches;
