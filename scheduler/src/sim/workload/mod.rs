//! Generated workloads.

pub mod lublin;
mod mix;
mod two_node;

pub use mix::mix;
pub use two_node::two_node;
