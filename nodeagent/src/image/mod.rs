//! The node's images: a content-addressed store under `<data-dir>/images` (one JSON record per image) and
//! `<data-dir>/layers/<diff id>/fs` (each layer unpacked once, ready to be an overlay lower).
//!
//! Everything that is loaded comes from outside and is treated so: each blob is held against its digest, each layer against its
//! diff id, and unpacking never leaves the layer's directory. A load becomes visible by renames at its end; what
//! a crash leaves behind lies in temporary directories that the next [`ImageStore::open`] removes.

mod archive;
mod certs;
mod error;
pub mod gc;
pub mod pull;
mod record;
mod reference;
mod registry;
mod save;
pub mod secrets;
mod store;
mod tarball;
mod tree;
mod unpack;
mod user;

#[cfg(test)]
mod hostile_tests;
#[cfg(test)]
mod save_tests;
#[cfg(test)]
mod tests;

pub use error::ImageError;
pub use record::{Digest, ImageConfig, ImageRecord};
pub use reference::Reference;
pub use store::{ImageStore, Limits, LoadKind, LoadOptions, StoreOptions};
pub use user::ResolvedUser;
