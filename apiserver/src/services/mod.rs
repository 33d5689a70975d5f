//! The services of api.proto: from requests to the parts that do them.

pub mod access;
pub mod explaining;
pub mod nodes;
pub mod objects;
pub mod scheduling;
pub mod stores;
