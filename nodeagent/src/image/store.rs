//! The store: open, load, look up, remove.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::Stream;

use super::{Digest, ImageError, ImageRecord, ResolvedUser};

/// Bounds of what may be loaded, against bombs.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of the archive as it arrives.
    pub archive_bytes: u64,
    /// Bytes of all layers of an image, unpacked.
    pub unpacked_bytes: u64,
    /// Entries of all layers of an image.
    pub entries: u64,
    /// Unpacked bytes per compressed byte of a layer, counted once a layer has unpacked [`Limits::RATIO_FREE_BYTES`].
    pub ratio: u64,
    /// Bytes of one manifest, config or index, and of one entry's headers.
    pub metadata_bytes: u64,
    /// Layers of an image; overlayfs takes 500.
    pub layers: usize,
}

impl Limits {
    /// Below this, any ratio is fine.
    pub const RATIO_FREE_BYTES: u64 = 32 << 20;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            archive_bytes: 16 << 30,
            unpacked_bytes: 32 << 30,
            entries: 2_000_000,
            ratio: 200,
            metadata_bytes: 4 << 20,
            layers: 128,
        }
    }
}

/// How to open a store.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Against bombs.
    pub limits: Limits,
    /// Flush a load to disk before it is acknowledged, so that a power cut leaves no half layer. Tests turn it off.
    pub durable: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { limits: Limits::default(), durable: true }
    }
}

/// What the archive is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadKind {
    /// Look: oci-layout, docker-archive, else a plain root file system.
    #[default]
    Auto,
    /// A root file system, whatever lies in it.
    Rootfs,
}

/// What the caller adds to an archive.
#[derive(Debug, Clone, Default)]
pub struct LoadOptions {
    /// The archive's kind.
    pub kind: LoadKind,
    /// Replaces the archive's names; needed for a plain root file system. `None` or empty: the archive's own.
    pub name: Option<String>,
    /// For a plain root file system.
    pub entrypoint: Vec<String>,
    /// For a plain root file system, `NAME=value`. Empty: a usual PATH.
    pub env: Vec<String>,
}

/// All images of this node. Cheap to share by [`Arc`]; every method may be called from any thread. Methods that are not `async`
/// block on the disk: call [`ImageStore::load`] and [`ImageStore::remove`] in `spawn_blocking`; the look-ups are quick.
#[derive(Debug)]
pub struct ImageStore {
    root: PathBuf,
}

impl ImageStore {
    /// Opens (and makes) the store below `data_dir`, removes what a crash left, and reads the records.
    ///
    /// # Errors
    /// When the directory cannot be used, or another process has it ([`ImageError::Locked`]).
    pub fn open(data_dir: &Path, options: StoreOptions) -> Result<Arc<Self>, ImageError> {
        let _ = options;
        Ok(Arc::new(Self { root: data_dir.to_owned() }))
    }

    /// Loads a tar (oci-layout, docker-archive, plain rootfs; gzip allowed) or the directory form of an oci-layout.
    /// Blocks. Loading what is there already only sets the names.
    ///
    /// # Errors
    /// See [`ImageError`]; the store is then as it was.
    pub fn load(&self, archive: &Path, options: &LoadOptions) -> Result<Vec<ImageRecord>, ImageError> {
        let _ = (archive, options);
        unimplemented!()
    }

    /// The same for bytes that arrive in chunks: they are kept in a temporary file until all are there.
    ///
    /// # Errors
    /// See [`ImageError`]; an error of the stream is [`ImageError::Archive`].
    pub async fn load_stream<S>(
        self: &Arc<Self>,
        chunks: S,
        options: LoadOptions,
    ) -> Result<Vec<ImageRecord>, ImageError>
    where
        S: Stream<Item = io::Result<Vec<u8>>> + Unpin + Send,
    {
        let _ = (chunks, options);
        unimplemented!()
    }

    /// The image that a reference (name, name@digest, or id) stands for now.
    #[must_use]
    pub fn get(&self, reference: &str) -> Option<ImageRecord> {
        let _ = reference;
        unimplemented!()
    }

    /// All images, by name.
    #[must_use]
    pub fn list(&self) -> Vec<ImageRecord> {
        unimplemented!()
    }

    /// Removes a name, and with its last name the image and the layers that no other image has. Blocks.
    ///
    /// # Errors
    /// [`ImageError::InUse`] when the image would go and its id is in `in_use`.
    pub fn remove(&self, reference: &str, in_use: &HashSet<Digest>) -> Result<(), ImageError> {
        let _ = (reference, in_use);
        unimplemented!()
    }

    /// Removes images that have lost all names and are not in `in_use`; returns them. Blocks.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn prune(&self, in_use: &HashSet<Digest>) -> Result<Vec<Digest>, ImageError> {
        let _ = in_use;
        unimplemented!()
    }

    /// The layers as overlay lowers, **uppermost first**, the order of overlay's `lowerdir=`.
    #[must_use]
    pub fn lower_dirs(&self, record: &ImageRecord) -> Vec<PathBuf> {
        record.layers.iter().rev().map(|layer| self.root.join("layers").join(layer.hex()).join("fs")).collect()
    }

    /// Who `user` (`name|uid[:group|gid]`, empty: root) is in this image. Reads the image's /etc/passwd and /etc/group.
    ///
    /// # Errors
    /// [`ImageError::User`] when a name is not in there.
    pub fn resolve_user(&self, record: &ImageRecord, user: &str) -> Result<ResolvedUser, ImageError> {
        let _ = (record, user);
        unimplemented!()
    }
}
