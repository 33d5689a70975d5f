//! Files and directory trees as a stream of frames, for `minictl cp`: packed on one side, unpacked on the other.
//!
//! ```text
//! pack:    a place ── walk by descriptors ──▶ entry, data …, entry, data …, complete
//! unpack:  frames ── checked ──▶ made below one directory, by descriptors
//! ```
//!
//! Neither side trusts the other, nor the files that it works on: a container may exchange directories for links while it is read, and
//! what it sends may claim any path. So every path is resolved by the kernel below one open directory (openat2(2) with
//! `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`), the last part is never followed, and only regular files, directories and links are made.
//! What is neither, and what cannot be read, is left out and said so.

#![forbid(unsafe_code)]

mod base;
mod pack;
mod path;
mod unpack;

pub use base::Base;
pub use pack::pack;
pub use path::{leads_out, name_of};
pub use unpack::{Policy, Unpack};

use std::io;

/// Most bytes of content in one frame.
pub const MAX_DATA_BYTES: usize = 64 << 10;
/// Most directories of one tree: their times and permissions are remembered until its end.
pub const MAX_DIRECTORIES: usize = 1_000_000;

/// A transfer cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The kernel refused.
    #[error("{operation} {path}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what, as the user knows it.
        path: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// What is to be copied is no file and no directory.
    #[error("{path} is neither a file nor a directory")]
    Kind {
        /// What.
        path: String,
    },
    /// Something is in the way.
    #[error("{path}: {why}")]
    InTheWay {
        /// Where.
        path: String,
        /// What.
        why: &'static str,
    },
    /// A stream that would make something outside of its place, or is malformed otherwise.
    #[error("refused entry {path:?}: {why}")]
    Refused {
        /// As it was sent.
        path: String,
        /// Why.
        why: &'static str,
    },
    /// Files of the kernel's own.
    #[error("{path} lies on a file system of the kernel's, whose files are not copied: use exec")]
    Pseudo {
        /// What.
        path: String,
    },
    /// More directories than [`MAX_DIRECTORIES`].
    #[error("the tree has more than {MAX_DIRECTORIES} directories")]
    TooMany,
    /// Whoever takes the frames takes no more.
    #[error("the other side has gone")]
    Gone,
}

impl TransferError {
    fn io(operation: &'static str, path: impl Into<Vec<u8>>, source: impl Into<io::Error>) -> Self {
        let path = String::from_utf8_lossy(&path.into()).into_owned();
        Self::Io { operation, path, source: source.into() }
    }
}
