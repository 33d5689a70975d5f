use std::io;
use std::path::PathBuf;

/// Why a cluster on this machine cannot be started or taken down.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// A program of Debian's.
    #[error("{0} is not installed; install it with: apt-get install {1}")]
    Missing(&'static str, &'static str),
    /// A program of minipod's.
    #[error("{} is missing; build it with: cargo build --workspace --bins", .0.display())]
    Binary(PathBuf),
    /// Not root.
    #[error("a cluster on this machine needs root: it makes network namespaces, mounts and cgroups")]
    NotRoot,
    /// Too many clusters.
    #[error("all {0} places for clusters on this machine are taken; end one with: minictl down")]
    Full(u8),
    /// More nodes than there are user ids for.
    #[error("{nodes} nodes: a cluster on one machine can have {most}, each with user ids of its own for its pods")]
    TooManyNodes {
        /// How many were asked for.
        nodes: usize,
        /// How many there can be.
        most: u32,
    },
    /// A file or directory.
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
    /// A command of the system's.
    #[error("{command}: {message}")]
    Command {
        /// As it was run.
        command: String,
        /// What it said.
        message: String,
    },
    /// A daemon ended while the cluster came up.
    #[error("{name} ended ({how}); the end of its log:\n{log}")]
    Ended {
        /// Which.
        name: String,
        /// Its exit status.
        how: String,
        /// Its last lines.
        log: String,
    },
    /// The nodes do not become ready.
    #[error("the cluster did not become ready in {seconds} s: {state}; logs are in {}", logs.display())]
    NotReady {
        /// How long was waited.
        seconds: u64,
        /// What was last seen.
        state: String,
        /// Where the logs are.
        logs: PathBuf,
    },
    /// The client could not be made.
    #[error("reach the cluster")]
    Client(#[source] Box<minipod_client::ClientError>),
    /// No node with that index.
    #[error("the cluster has no node number {0}")]
    NoSuchNode(usize),
    /// No daemon with that name.
    #[error("the cluster has no daemon {0:?}")]
    NoSuchDaemon(String),
    /// It has been taken down.
    #[error("the cluster is down")]
    Down,
    /// Something stays.
    #[error("could not remove everything of the cluster:\n{0}")]
    Remains(String),
}
