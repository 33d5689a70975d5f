//! What can go wrong with an image.

use std::io;
use std::path::PathBuf;

/// Why an image could not be loaded, found, used or removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file operation of the store itself.
    #[error("{operation} {}", path.display())]
    Io {
        /// What was tried, such as `open`.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The archive could not be read: cut short, or not an archive.
    #[error("read the image archive: {0}")]
    Archive(#[source] io::Error),
    /// The archive is none of the known kinds, or contradicts itself.
    #[error("image archive: {0}")]
    Malformed(String),
    /// Correct, but not something that this version can do.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// A blob is not what its digest says.
    #[error("{what}: expected {expected}, but the content is {actual}")]
    DigestMismatch {
        /// Which blob.
        what: String,
        /// The digest (or size) that was promised.
        expected: String,
        /// What it really is.
        actual: String,
    },
    /// An entry of a layer that would be dangerous to unpack.
    #[error("layer {layer}: refuse entry {entry:?}: {reason}")]
    Refused {
        /// Diff id of the layer.
        layer: String,
        /// The entry's path as written in the archive.
        entry: String,
        /// Why.
        reason: String,
    },
    /// The image is bigger than the store allows.
    #[error("image is over the limit of {limit} {unit}: {detail}")]
    TooBig {
        /// The limit.
        limit: u64,
        /// What it counts.
        unit: &'static str,
        /// Where it was reached.
        detail: String,
    },
    /// A plain root file system has no name of its own.
    #[error("the archive names no image: give a name")]
    NeedsName,
    /// Not a reference.
    #[error("image reference {reference:?}: {reason}")]
    BadReference {
        /// As given.
        reference: String,
        /// Why not.
        reason: &'static str,
    },
    /// No such image here.
    #[error("image {0:?} is not on this node")]
    NotFound(String),
    /// A pod needs it.
    #[error("image {0:?} is in use")]
    InUse(String),
    /// The user or group of the container cannot be found in the image.
    #[error("user {user:?}: {reason}")]
    User {
        /// As given.
        user: String,
        /// Why not.
        reason: String,
    },
    /// Another agent works on this directory.
    #[error("image store {} is in use by another process", .0.display())]
    Locked(PathBuf),
}
