//! What every program that talks to the API server needs: typed calls, resumable list-watch, a cache, a work queue.
//!
//! - [`Client`]: typed calls over [`minipod_proto::Resource`]; several API servers, one of them in use, the next one
//!   when it cannot be reached, all of them again after a pause. No task of its own.
//! - [`reflector`]: the list-watch as a state machine without I/O: which call comes next, what its answer means.
//! - [`cache::Reflector`]: one task that drives the machine. It is the only writer of the [`cache::Cache`] it fills and
//!   the sender of one bounded channel per subscriber; it ends when the cache's and the subscriptions' last handle goes.
//! - [`queue::WorkQueue`]: keys that have work, each in at most one pair of hands. No task: whoever waits for a key
//!   sleeps until the earliest is due.
//!
//! The task and its channels:
//!
//! ```text
//! API server ──list, watch──▶ Reflector ──swap──▶ Cache ◀──get, list── readers
//!                                 └──Delta (bounded, the reflector waits)──▶ subscribers ──key──▶ WorkQueue ──▶ workers
//! ```
#![forbid(unsafe_code)]

mod access;
pub mod cache;
mod calls;
mod client;
mod error;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub mod queue;
pub mod reflector;
mod servers;
#[cfg(test)]
mod tests;
mod watch;

pub use access::{
    Copy, CopySender, Exec, ExecOutput, ExecStdin, ExecTerminal, ImageArchive, Logs, PortEvent, PortReader, PortWriter,
};
pub use calls::{Created, DeleteOptions, EvictOptions, List, Objects, Query};
pub use client::{Client, DEFAULT_SERVER, Options, SERVER_VARIABLE};
pub use error::{ClientError, Operation};
pub use servers::Servers;
pub use watch::{Change, ChangeKind, ObjectChange, Watch};
