//! What can go wrong with the network.

use std::io;
use std::path::PathBuf;

/// Why the network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Netlink said no.
    #[error("{operation} {object}")]
    Netlink {
        /// Such as `create link`.
        operation: &'static str,
        /// Such as the link's name.
        object: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A file operation of the address book, or a sysctl.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Not a usable CIDR.
    #[error("pod CIDR {0:?}: {1}")]
    BadCidr(String, &'static str),
    /// No address left.
    #[error("no free address in {cidr}: all {size} are taken")]
    Exhausted {
        /// The node's range.
        cidr: String,
        /// How many addresses it has for pods.
        size: u32,
    },
    /// The node's ports cannot be forwarded.
    #[error("forward ports of the node (hostPort) with nft")]
    Ports(#[source] io::Error),
    /// Not a name for a link.
    #[error("bridge name {0:?}: expected 1 to 15 letters, digits, '-', '_' or '.'")]
    BadBridge(String),
    /// A uid that cannot be a file name.
    #[error("pod uid {0:?} is not usable as a file name")]
    BadUid(String),
}
