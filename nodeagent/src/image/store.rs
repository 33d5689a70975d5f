//! The store: open, load, look up, remove.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use futures_util::{Stream, StreamExt as _};
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;

use super::archive::{self, Planned, PlannedLayer, Source};
use super::save;
use super::unpack::{self, Budget};
use super::{Digest, ImageError, ImageRecord, Reference, ResolvedUser, user};

/// Bounds of what may be loaded, against bombs.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of the archive as it arrives.
    pub archive_bytes: u64,
    /// Bytes of all layers of an archive, unpacked.
    pub unpacked_bytes: u64,
    /// Entries of all layers of an archive, with the directories that they imply.
    pub entries: u64,
    /// Unpacked bytes per compressed byte of a layer, counted once a layer has unpacked [`Limits::RATIO_FREE_BYTES`].
    pub ratio: u64,
    /// Bytes of one manifest, config or index, and of all headers of one entry.
    pub metadata_bytes: u64,
    /// Bytes of memory for the paths and times of a layer's directories, which are kept until its end.
    pub directory_bytes: usize,
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
            directory_bytes: 64 << 20,
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
    /// The reference that it was pulled by, a digest in it as well; instead of `name`.
    pub pulled: Option<Reference>,
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
    options: StoreOptions,
    images: RwLock<BTreeMap<Digest, Arc<ImageRecord>>>,
    /// One change of the store at a time.
    changing: Mutex<()>,
    /// When a pod last asked for an image, milliseconds since the epoch. Lives in memory only: a new agent counts from the load.
    used: Mutex<HashMap<Digest, u64>>,
    /// Numbers the temporary files of this process.
    next: AtomicU64,
    /// Held as long as the store is.
    _lock: File,
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { operation, path, source }
}

impl ImageStore {
    /// Opens (and makes) the store below `data_dir`, removes what a crash left, and reads the records.
    ///
    /// # Errors
    /// When the directory cannot be used, or another process has it ([`ImageError::Locked`]).
    pub fn open(data_dir: &Path, options: StoreOptions) -> Result<Arc<Self>, ImageError> {
        for dir in ["images", "layers"] {
            let dir = data_dir.join(dir);
            std::fs::create_dir_all(&dir).map_err(io_error("create", &dir))?;
        }
        let lock = lock(data_dir)?;
        let images = RwLock::new(read_records(&data_dir.join("images"))?);
        let root = data_dir.to_owned();
        let (changing, used, next) = Default::default();
        let store = Self { root, options, images, changing, used, next, _lock: lock };
        store.remove_left_overs()?;
        Ok(Arc::new(store))
    }

    /// Loads a tar (oci-layout, docker-archive, plain rootfs; gzip allowed) or the directory form of an oci-layout.
    /// Blocks. Loading what is there already only sets the names.
    ///
    /// # Errors
    /// See [`ImageError`]; the store is then as it was.
    pub fn load(&self, archive: &Path, options: &LoadOptions) -> Result<Vec<ImageRecord>, ImageError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let work = self.temporary()?;
        let loaded = self.load_in(&work, archive, options);
        if let Err(error) = crate::remove::tree(&work) {
            tracing::warn!(dir = %work.display(), %error, "remove a load's temporary files; the next start does it");
        }
        loaded
    }

    fn load_in(&self, work: &Path, archive: &Path, options: &LoadOptions) -> Result<Vec<ImageRecord>, ImageError> {
        let limits = &self.options.limits;
        let mut archive = archive.to_owned();
        if archive.is_file() && unpack::is_gzip(&archive).map_err(io_error("read", &archive))? {
            let plain = work.join("archive");
            unpack::inflate(&archive, &plain, limits)?;
            archive = plain;
        }
        let source = Source::open(&archive, limits)?;
        let planned = archive::plan(&source, options, limits)?;
        // One for all of them: an archive of many images is bounded like an archive of one.
        let mut budget = Budget::new(limits);
        let mut loaded = Vec::new();
        for image in planned {
            loaded.push(self.load_image(work, &source, image, &mut budget)?);
        }
        // Only now does anything become visible: all images of the archive, or none but by a crash between two renames.
        loaded.into_iter().map(|record| self.publish(record)).collect()
    }

    /// Brings the layers in. They are of no use to anybody before the record is there.
    fn load_image(
        &self,
        work: &Path,
        source: &Source,
        image: Planned,
        budget: &mut Budget<'_>,
    ) -> Result<ImageRecord, ImageError> {
        let mut layers: Vec<Digest> = Vec::new();
        let mut sizes: BTreeMap<Digest, u64> = BTreeMap::new();
        for (number, layer) in image.layers.iter().enumerate() {
            let (diff, bytes) = self.load_layer(work, source, (number, layer), budget)?;
            sizes.insert(diff.clone(), bytes);
            layers.push(diff);
        }
        let id = match image.id {
            Some(id) => id,
            None => {
                let text = serde_json::to_vec(&(&image.config, &layers)).unwrap_or_default();
                Digest::from_hash(&Sha256::digest(&text))
            }
        };
        Ok(ImageRecord {
            id,
            names: image.names,
            manifest_digest: image.manifest,
            config: image.config,
            layers,
            size_bytes: sizes.values().sum(),
            loaded_wall_ms: crate::clock::wall_ms(),
        })
    }

    fn load_layer(
        &self,
        work: &Path,
        source: &Source,
        (number, layer): (usize, &PlannedLayer),
        budget: &mut Budget<'_>,
    ) -> Result<(Digest, u64), ImageError> {
        if let Some(diff) = &layer.diff
            && let Some(bytes) = self.layer_bytes(diff)
        {
            return Ok((diff.clone(), bytes));
        }
        let label = layer.diff.as_ref().map_or_else(|| "of the root file system".to_owned(), Digest::to_string);
        let dir = work.join(format!("layer-{}-{number}", self.next.fetch_add(1, Ordering::Relaxed)));
        let fs = dir.join("fs");
        std::fs::create_dir_all(&fs).map_err(io_error("create", &fs))?;
        std::fs::set_permissions(&fs, Permissions::from_mode(0o755)).map_err(io_error("set mode of", &fs))?;
        let unpacked = unpack::unpack(source.read(&layer.name)?, &label, &fs, budget)?;
        if let Some(blob) = layer.blob.as_ref().filter(|blob| **blob != unpacked.blob) {
            return Err(archive::mismatch("layer blob", blob, &unpacked.blob));
        }
        if let Some(diff) = layer.diff.as_ref().filter(|diff| **diff != unpacked.diff) {
            return Err(archive::mismatch("unpacked layer", diff, &unpacked.diff));
        }
        let size = dir.join("bytes");
        std::fs::write(&size, unpacked.bytes.to_string()).map_err(io_error("write", &size))?;
        self.flush(&dir)?;
        let place = self.layer_dir(&unpacked.diff);
        if !place.exists() {
            std::fs::rename(&dir, &place).map_err(io_error("move in", &place))?;
            self.flush(&self.root.join("layers"))?;
        }
        Ok((unpacked.diff, unpacked.bytes))
    }

    /// Writes the record, and takes the names from the images that had them.
    fn publish(&self, mut record: ImageRecord) -> Result<ImageRecord, ImageError> {
        let mut changed = Vec::new();
        for other in self.all() {
            if other.id == record.id {
                record.names.extend(
                    other.names.iter().filter(|name| !record.names.contains(name)).cloned().collect::<Vec<_>>(),
                );
            } else if other.names.iter().any(|name| record.names.contains(name)) {
                let mut other = ImageRecord::clone(&other);
                other.names.retain(|name| !record.names.contains(name));
                changed.push(other);
            }
        }
        record.names.sort();
        // First the new one: a crash in between leaves two with the name, and the younger counts.
        self.write_record(&record)?;
        for other in changed {
            self.write_record(&other)?;
        }
        Ok(record)
    }

    /// The same for bytes that arrive in chunks: they are kept in a temporary file until all are there.
    ///
    /// # Errors
    /// See [`ImageError`]; an error of the stream is [`ImageError::Archive`].
    pub async fn load_stream<S>(
        self: &Arc<Self>,
        mut chunks: S,
        options: LoadOptions,
    ) -> Result<Vec<ImageRecord>, ImageError>
    where
        S: Stream<Item = io::Result<Vec<u8>>> + Unpin + Send,
    {
        let work = self.temporary()?;
        let archive = work.join("archive");
        let arrived = self.keep(&mut chunks, &archive).await;
        let (store, place) = (self.clone(), archive.clone());
        let loaded = match arrived {
            Ok(()) => tokio::task::spawn_blocking(move || store.load(&place, &options)).await.unwrap_or_else(|error| {
                Err(ImageError::Io { operation: "load", path: archive.clone(), source: io::Error::other(error) })
            }),
            Err(error) => Err(error),
        };
        if let Err(error) = tokio::fs::remove_dir_all(&work).await {
            tracing::warn!(dir = %work.display(), %error, "remove an upload; the next start does it");
        }
        loaded
    }

    async fn keep<S>(&self, chunks: &mut S, archive: &Path) -> Result<(), ImageError>
    where
        S: Stream<Item = io::Result<Vec<u8>>> + Unpin + Send,
    {
        let limit = self.options.limits.archive_bytes;
        let mut file = tokio::fs::File::create_new(archive).await.map_err(io_error("create", archive))?;
        let mut bytes = 0;
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(ImageError::Archive)?;
            bytes += chunk.len() as u64;
            if bytes > limit {
                return Err(ImageError::TooBig { limit, unit: "bytes", detail: "the archive".to_owned() });
            }
            file.write_all(&chunk).await.map_err(io_error("write", archive))?;
        }
        file.flush().await.map_err(io_error("write", archive))
    }

    /// The image that a reference (name, name@digest, or id) stands for now.
    #[must_use]
    pub fn get(&self, reference: &str) -> Option<ImageRecord> {
        self.find(reference).map(|record| ImageRecord::clone(&record))
    }

    fn find(&self, reference: &str) -> Option<Arc<ImageRecord>> {
        let images = self.images.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = Digest::parse(reference) {
            return images.get(&id).cloned();
        }
        let reference = Reference::parse(reference).ok()?;
        if let Some(digest) = &reference.digest {
            // The digest alone decides, as everywhere in the field; a tag beside it is a remark.
            let is_it = |image: &&Arc<ImageRecord>| {
                let same_repository = |name: &String| {
                    name.strip_prefix(&reference.repository).is_some_and(|tag| tag.starts_with([':', '@']))
                };
                (image.manifest_digest.as_ref() == Some(digest) || image.id == *digest)
                    && image.names.iter().any(same_repository)
            };
            return images.values().find(is_it).cloned();
        }
        let name = reference.name()?;
        images.values().filter(|image| image.names.contains(&name)).max_by_key(|image| image.loaded_wall_ms).cloned()
    }

    /// All images, by name.
    #[must_use]
    pub fn list(&self) -> Vec<ImageRecord> {
        let mut all: Vec<ImageRecord> = self.all().iter().map(|image| ImageRecord::clone(image)).collect();
        all.sort_by(|a, b| (&a.names, &a.id).cmp(&(&b.names, &b.id)));
        all
    }

    fn all(&self) -> Vec<Arc<ImageRecord>> {
        self.images.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Removes a name, and with its last name the image and the layers that no other image has. Blocks.
    ///
    /// # Errors
    /// [`ImageError::InUse`] when the image would go and its id is in `in_use`.
    pub fn remove(&self, reference: &str, in_use: &HashSet<Digest>) -> Result<(), ImageError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let found = self.find(reference).ok_or_else(|| ImageError::NotFound(reference.to_owned()))?;
        let name = Reference::parse(reference).ok().filter(|r| r.digest.is_none()).and_then(|r| r.name());
        let mut record = ImageRecord::clone(&found);
        match name.filter(|name| record.names.contains(name)) {
            Some(name) if record.names.len() > 1 => {
                record.names.retain(|other| *other != name);
                self.write_record(&record)
            }
            _ if in_use.contains(&record.id) => Err(ImageError::InUse(reference.to_owned())),
            _ => self.forget(&record),
        }
    }

    /// The image that a reference stands for, for a pod that is about to use it: it is not removed as unused from now on.
    #[must_use]
    pub fn take(&self, reference: &str) -> Option<ImageRecord> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        // Within the lock: who removes looks at both under it.
        let found = self.find(reference)?;
        used.insert(found.id.clone(), crate::clock::wall_ms());
        Some(ImageRecord::clone(&found))
    }

    /// When a pod last used an image, as far as this store was told, or it came.
    #[must_use]
    pub fn last_used_ms(&self, image: &ImageRecord) -> u64 {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.get(&image.id).copied().unwrap_or(0).max(image.loaded_wall_ms)
    }

    /// Notes that pods use these images now.
    pub fn note_used(&self, in_use: &HashSet<Digest>) {
        let now_ms = crate::clock::wall_ms();
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        for id in in_use {
            used.insert(id.clone(), now_ms);
        }
    }

    /// Removes an image unless a pod has taken it, or it came anew, since `seen_ms`. Tells whether it is gone. Blocks.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn remove_unused(&self, id: &Digest, seen_ms: u64) -> Result<Option<ImageRecord>, ImageError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let record = {
            let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(record) = self.find(id.as_str()) else { return Ok(None) };
            if used.get(id).copied().unwrap_or(0).max(record.loaded_wall_ms) > seen_ms {
                return Ok(None);
            }
            self.unlist(&record)?;
            used.remove(id);
            record
        };
        self.remove_layers_of(&record)?;
        Ok(Some(ImageRecord::clone(&record)))
    }

    /// Removes images that have lost all names and are not in `in_use`; returns them. Blocks.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn prune(&self, in_use: &HashSet<Digest>) -> Result<Vec<Digest>, ImageError> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut gone = Vec::new();
        for image in self.all().iter().filter(|image| image.names.is_empty() && !in_use.contains(&image.id)) {
            self.forget(image)?;
            gone.push(image.id.clone());
        }
        Ok(gone)
    }

    /// Writes an image as an archive that [`ImageStore::load`], skopeo and docker read. Blocks.
    ///
    /// # Errors
    /// [`ImageError::NotFound`]; and what reading and writing can meet, also that the image was removed meanwhile.
    pub fn save(&self, reference: &str, out: &mut impl io::Write) -> Result<(), ImageError> {
        let record = self.find(reference).ok_or_else(|| ImageError::NotFound(reference.to_owned()))?;
        let mut layers = self.lower_dirs(&record);
        layers.reverse();
        save::save(&record, &layers, out)
    }

    /// The layers as overlay lowers, **uppermost first**, the order of overlay's `lowerdir=`.
    #[must_use]
    pub fn lower_dirs(&self, record: &ImageRecord) -> Vec<PathBuf> {
        record.layers.iter().rev().map(|layer| self.layer_dir(layer).join("fs")).collect()
    }

    /// Who `user` (`name|uid[:group|gid]`, empty: root) is in this image. Reads the image's /etc/passwd and /etc/group.
    ///
    /// # Errors
    /// [`ImageError::User`] when a name is not in there.
    pub fn resolve_user(&self, record: &ImageRecord, user: &str) -> Result<ResolvedUser, ImageError> {
        let lowers = self.lower_dirs(record);
        let file = |name: &str| user::read_from_layers(&lowers, name);
        user::resolve(user, &file("passwd"), &file("group"))
    }

    // ------------------------------------------------------------------------------------------------------ files

    fn layer_dir(&self, diff: &Digest) -> PathBuf {
        self.root.join("layers").join(diff.hex())
    }

    /// Whether a layer is here, unpacked.
    pub(super) fn has_layer(&self, diff: &Digest) -> bool {
        self.layer_bytes(diff).is_some()
    }

    /// The bounds of what may be brought in.
    pub(super) fn limits(&self) -> &Limits {
        &self.options.limits
    }

    /// Where downloads may lie: on the store's file system, removed when the store is opened the next time.
    pub(super) fn work_dir(&self) -> Result<PathBuf, ImageError> {
        self.temporary()
    }

    /// Bytes of a layer that is here.
    fn layer_bytes(&self, diff: &Digest) -> Option<u64> {
        std::fs::read_to_string(self.layer_dir(diff).join("bytes")).ok()?.trim().parse().ok()
    }

    fn record_file(&self, id: &Digest) -> PathBuf {
        self.root.join("images").join(format!("{}.json", id.hex()))
    }

    fn write_record(&self, record: &ImageRecord) -> Result<(), ImageError> {
        let bytes = serde_json::to_vec(record).unwrap_or_default();
        let place = self.record_file(&record.id);
        let fresh = place.with_extension("new");
        let mut file = File::create(&fresh).map_err(io_error("create", &fresh))?;
        file.write_all(&bytes).map_err(io_error("write", &fresh))?;
        if self.options.durable {
            file.sync_all().map_err(io_error("flush", &fresh))?;
        }
        std::fs::rename(&fresh, &place).map_err(io_error("move in", &place))?;
        self.flush(&self.root.join("images"))?;
        let mut images = self.images.write().unwrap_or_else(PoisonError::into_inner);
        images.insert(record.id.clone(), Arc::new(record.clone()));
        Ok(())
    }

    /// Removes an image and the layers that are its own.
    fn forget(&self, record: &ImageRecord) -> Result<(), ImageError> {
        self.unlist(record)?;
        self.remove_layers_of(record)
    }

    fn unlist(&self, record: &ImageRecord) -> Result<(), ImageError> {
        let file = self.record_file(&record.id);
        std::fs::remove_file(&file).map_err(io_error("remove", &file))?;
        self.images.write().unwrap_or_else(PoisonError::into_inner).remove(&record.id);
        Ok(())
    }

    fn remove_layers_of(&self, record: &ImageRecord) -> Result<(), ImageError> {
        let kept: HashSet<Digest> = self.all().iter().flat_map(|image| image.layers.clone()).collect();
        for layer in record.layers.iter().filter(|layer| !kept.contains(layer)) {
            self.remove_layer(&self.layer_dir(layer))?;
        }
        Ok(())
    }

    /// Out of the way by one rename, so that a crash leaves no half layer under its digest.
    fn remove_layer(&self, dir: &Path) -> Result<(), ImageError> {
        let work = self.temporary()?;
        match std::fs::rename(dir, work.join("layer")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("move out", dir)(error)),
            _ => {}
        }
        crate::remove::tree(&work).map_err(io_error("remove", &work))
    }

    /// A fresh directory on the store's file system.
    fn temporary(&self) -> Result<PathBuf, ImageError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let dir = self.root.join("layers").join(format!("{TEMPORARY}{number}"));
        std::fs::create_dir(&dir).map_err(io_error("create", &dir))?;
        std::fs::set_permissions(&dir, Permissions::from_mode(0o700)).map_err(io_error("set mode of", &dir))?;
        Ok(dir)
    }

    fn flush(&self, dir: &Path) -> Result<(), ImageError> {
        if !self.options.durable {
            return Ok(());
        }
        let open = File::open(dir).map_err(io_error("open", dir))?;
        nix::unistd::syncfs(&open).map_err(|errno| io_error("flush", dir)(errno.into()))
    }

    /// What a crash left: temporary directories, and layers that no record has.
    fn remove_left_overs(&self) -> Result<(), ImageError> {
        let kept: HashSet<String> =
            self.all().iter().flat_map(|image| image.layers.iter().map(|l| l.hex().to_owned())).collect();
        let layers = self.root.join("layers");
        for entry in std::fs::read_dir(&layers).map_err(io_error("list", &layers))? {
            let entry = entry.map_err(io_error("list", &layers))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(TEMPORARY) {
                crate::remove::tree(&entry.path()).map_err(io_error("remove", &entry.path()))?;
            }
        }
        for entry in std::fs::read_dir(&layers).map_err(io_error("list", &layers))? {
            let entry = entry.map_err(io_error("list", &layers))?;
            if !kept.contains(entry.file_name().to_string_lossy().as_ref()) && entry.path().is_dir() {
                self.remove_layer(&entry.path())?;
            }
        }
        Ok(())
    }
}

/// Begins the names of directories that the next start removes.
const TEMPORARY: &str = ".work-";

fn lock(data_dir: &Path) -> Result<File, ImageError> {
    let path = data_dir.join("images").join(".lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(ImageError::Locked(data_dir.to_owned())),
        Err(std::fs::TryLockError::Error(source)) => Err(io_error("lock", &path)(source)),
    }
}

/// The records; one that cannot be read, or whose layers are not all there, is said so and left out.
fn read_records(dir: &Path) -> Result<BTreeMap<Digest, Arc<ImageRecord>>, ImageError> {
    let mut out = BTreeMap::new();
    for entry in std::fs::read_dir(dir).map_err(io_error("list", dir))? {
        let path = entry.map_err(io_error("list", dir))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let bytes = std::fs::read(&path).map_err(io_error("read", &path))?;
        let record: ImageRecord = match serde_json::from_slice(&bytes) {
            Ok(record) => record,
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "an image's record is unreadable: load the image again");
                continue;
            }
        };
        let layers = dir.with_file_name("layers");
        if let Some(gone) = record.layers.iter().find(|layer| !layers.join(layer.hex()).join("bytes").is_file()) {
            tracing::error!(names = ?record.names, %gone, "a layer of an image is gone: load the image again");
            continue;
        }
        out.insert(record.id.clone(), Arc::new(record));
    }
    Ok(out)
}
