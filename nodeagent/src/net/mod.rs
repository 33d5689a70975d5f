//! The pod network of this node: a bridge, a veth pair and an address per pod, masquerade on the way out.
//!
//! Everything is done in the network namespace in which [`Network::open`] ran, so that several agents in namespaces of their own
//! share a machine without meeting.

mod cidr;
mod error;
pub mod files;
mod firewall;
mod ipam;
mod links;
mod netlink;
mod network;
mod ports;

pub use crate::sys::Netns;
pub use cidr::{Cidr, mac_of};
pub use error::NetError;
pub use network::{NetConfig, Network, NodeRoute, PodNetwork};
pub use ports::{PortWish, Protocol};

#[cfg(test)]
mod tests;
