//! An image store in memory, with something beside it that no image may touch.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use minipod_nodeagent::image::{ImageRecord, ImageStore, Limits, LoadKind, LoadOptions, StoreOptions};
use sha2::{Digest as _, Sha256};

/// A node's directory.
pub struct Node {
    dir: tempfile::TempDir,
    /// Its images.
    pub store: Arc<ImageStore>,
}

const WITNESS: &str = "untouched";

impl Node {
    /// An empty one, on a file system in memory.
    pub fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in /dev/shm");
        std::fs::write(dir.path().join("witness"), WITNESS).expect("a file");
        let limits = Limits {
            unpacked_bytes: 4 << 20,
            entries: 2_000,
            metadata_bytes: 64 << 10,
            directory_bytes: 256 << 10,
            ..Limits::default()
        };
        let store = ImageStore::open(&dir.path().join("data"), StoreOptions { limits, durable: false });
        Self { dir, store: store.expect("a store") }
    }

    /// Loads an archive; none when it is refused.
    pub fn load(&self, archive: &[u8], kind: LoadKind) -> Vec<ImageRecord> {
        let file = self.dir.path().join("archive.tar");
        std::fs::write(&file, archive).expect("a file");
        let options = LoadOptions { kind, name: Some("fuzz.example/loaded:1".to_owned()), ..LoadOptions::default() };
        self.store.load(&file, &options).unwrap_or_default()
    }

    /// Removes an image.
    pub fn remove(&self, image: &ImageRecord) {
        self.store.remove(image.id.as_str(), &HashSet::new()).expect("an image that nobody uses");
    }

    /// Nothing is left of any image, and nothing else was touched.
    pub fn is_clean(&self) {
        let data = self.dir.path().join("data");
        for part in ["layers", "images"] {
            // The store's own lock stays as long as the store.
            let left: Vec<String> = names(&data.join(part)).into_iter().filter(|name| name != ".lock").collect();
            assert_eq!(left, [""; 0], "in {part}");
        }
        let witness = std::fs::read_to_string(self.dir.path().join("witness"));
        assert_eq!(witness.as_deref().ok(), Some(WITNESS));
        let beside = names(self.dir.path());
        assert!(beside.iter().all(|name| ["archive.tar", "data", "witness"].contains(&name.as_str())), "{beside:?}");
    }
}

/// The digest of a blob.
#[allow(dead_code)]
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
