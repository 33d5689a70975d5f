//! Images from registries (OCI distribution specification 1.1, and Docker's registry v2 before it).
//!
//! A pull lays out an oci-layout of what is missing and has the store load it: there is one way into the store. Layers that
//! are there already, from whatever image, are not fetched; a blob that several pulls need at one time is fetched once.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::{OnceCell, watch};

use super::archive::{self, Descriptor, Pointed};
use super::registry::{Clients, Registry, RegistryError};
use super::{Digest, ImageError, ImageRecord, ImageStore, LoadOptions, Reference};

/// A registry that sends nothing for so long hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// Layers of one image that are fetched at a time, as in the field.
const LAYERS_AT_A_TIME: usize = 3;
const MAX_INDEX_DEPTH: usize = 3;
/// A registry that sends a blob slower than this on the whole is not waited for: it could send a byte now and then for years.
const SLOWEST_BYTES_PER_S: u64 = 16 << 10;
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Name and password for a registry.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// The password or token.
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Credentials({})", self.user)
    }
}

/// Which registries there are and how they are reached.
#[derive(Debug, Clone)]
pub struct Registries {
    /// `host[:port]` of registries that are spoken to without TLS.
    pub plain_http: Vec<String>,
    /// Registries that are asked first, in order, by the registry's name.
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// The node's own credentials by registry.
    pub credentials: BTreeMap<String, Credentials>,
    /// How long a registry may say nothing.
    pub patience: Duration,
    /// Where each registry's certificates lie, in a directory of its name.
    pub certs: PathBuf,
}

/// Where certificates of registries lie unless the operator says otherwise.
pub const CERTS: &str = "/etc/minipod/certs.d";

impl Default for Registries {
    fn default() -> Self {
        let (plain_http, mirrors, credentials) = Default::default();
        Self { plain_http, mirrors, credentials, patience: PATIENCE, certs: CERTS.into() }
    }
}

impl Registries {
    /// Reads credentials as docker and Kubernetes' `kubernetes.io/dockerconfigjson` secrets have them.
    ///
    /// # Errors
    /// What is wrong with the text; it is not repeated, it holds passwords.
    pub fn docker_config(text: &[u8]) -> Result<BTreeMap<String, Credentials>, String> {
        #[derive(serde::Deserialize)]
        struct File {
            #[serde(default)]
            auths: BTreeMap<String, Entry>,
        }
        #[derive(serde::Deserialize)]
        struct Entry {
            auth: Option<String>,
            username: Option<String>,
            password: Option<String>,
        }
        let bad =
            |error: serde_json::Error| format!("not a docker config: line {}, column {}", error.line(), error.column());
        let file: File = serde_json::from_slice(text).map_err(bad)?;
        let mut out = BTreeMap::new();
        for (registry, entry) in file.auths {
            let pair = match (entry.username, entry.password, entry.auth) {
                (Some(user), Some(password), _) => Some((user, password)),
                (_, _, Some(auth)) => minipod_proto::base64::decode(&auth)
                    .and_then(|bytes| String::from_utf8(bytes).ok())
                    .and_then(|text| text.split_once(':').map(|(user, word)| (user.to_owned(), word.to_owned()))),
                _ => None,
            };
            let none = || format!("auths[{registry:?}]: want username and password, or auth: base64 of user:password");
            let (user, password) = pair.ok_or_else(none)?;
            out.insert(host_of(&registry).to_owned(), Credentials { user, password });
        }
        Ok(out)
    }
}

/// The host of a registry as docker's file may write it: `https://index.docker.io/v1/` is `docker.io`.
fn host_of(registry: &str) -> &str {
    let rest = registry.split_once("://").map_or(registry, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or(rest);
    if host == "index.docker.io" { "docker.io" } else { host }
}

/// How far a pull is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are here.
    pub bytes: u64,
    /// Bytes that have to be fetched in all, once the manifest is known.
    pub of_bytes: u64,
}

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// Not a reference.
    #[error(transparent)]
    Reference(ImageError),
    /// The registry has no such image.
    #[error("registry {registry} has no image {image}")]
    NotFound {
        /// Which registry.
        registry: String,
        /// Which image.
        image: String,
    },
    /// The registry wants (other) credentials.
    #[error("registry {registry} refuses {image}: it wants credentials that allow it")]
    Unauthorized {
        /// Which registry.
        registry: String,
        /// Which image.
        image: String,
    },
    /// The registry cannot be reached, broke off, or did what a registry must not do.
    #[error("registry {registry}: {operation}")]
    Registry {
        /// Which registry.
        registry: String,
        /// What was tried.
        operation: String,
        /// What came back.
        #[source]
        source: RegistryError,
    },
    /// There is no HTTP here.
    #[error("set up HTTP: {0}")]
    Http(String),
    /// What came is not what was promised.
    #[error(transparent)]
    Image(#[from] ImageError),
}

impl PullError {
    /// Kubernetes' waiting reason.
    #[must_use]
    pub fn waiting_reason(&self) -> &'static str {
        match self {
            Self::Reference(_) => "InvalidImageName",
            _ => "ErrImagePull",
        }
    }
}

/// Pulls images into a store.
#[derive(Debug)]
pub struct Puller {
    store: Arc<ImageStore>,
    registries: Registries,
    clients: OnceLock<Result<Arc<Clients>, String>>,
    /// Blobs on their way, by registry and digest; each removes its file with its last user. Not by digest alone: whoever asks an
    /// honest registry must not wait for another one that takes its time.
    blobs: Mutex<HashMap<(String, Digest), Weak<Blob>>>,
}

/// A blob on its way or here.
#[derive(Debug)]
struct Blob {
    dir: PathBuf,
    fetched: OnceCell<()>,
}

impl Blob {
    fn file(&self) -> PathBuf {
        self.dir.join("blob")
    }
}

impl Drop for Blob {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "remove a fetched blob; the next start does it");
        }
    }
}

/// One registry to ask, and how.
struct Source<'a> {
    /// A mirror in place of the image's registry, perhaps.
    client: Registry,
    registry: String,
    image: &'a Reference,
    patience: Duration,
}

impl Puller {
    /// A puller into that store.
    #[must_use]
    pub fn new(store: Arc<ImageStore>, registries: Registries) -> Self {
        // An error means that the process has chosen its TLS provider already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self { store, registries, clients: OnceLock::new(), blobs: Mutex::default() }
    }

    /// Fetches what is missing of an image and puts it into the store under `reference`. `credentials` come before the
    /// node's own; they are by registry.
    ///
    /// # Errors
    /// See [`PullError`]; nothing half is left in the store.
    pub async fn pull(
        &self,
        reference: &str,
        credentials: &BTreeMap<String, Credentials>,
        progress: &watch::Sender<Progress>,
    ) -> Result<ImageRecord, PullError> {
        let image = Reference::parse(reference).map_err(PullError::Reference)?;
        let mut last = None;
        for source in self.sources(&image, credentials)? {
            match self.pull_from(&source, progress).await {
                Ok(record) => return Ok(record),
                Err(error) => {
                    tracing::debug!(registry = source.registry, error = crate::report::chain(&error), "pull failed");
                    // Told is what the registry itself said, which is asked after its mirrors.
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| PullError::NotFound {
            registry: registry_of(&image).to_owned(),
            image: image.to_string(),
        }))
    }

    /// The digest that the registry has under a tag now: whether a pull would change anything.
    ///
    /// # Errors
    /// As [`Puller::pull`].
    pub async fn digest(
        &self,
        reference: &str,
        credentials: &BTreeMap<String, Credentials>,
    ) -> Result<Digest, PullError> {
        let image = Reference::parse(reference).map_err(PullError::Reference)?;
        if let Some(digest) = &image.digest {
            return Ok(digest.clone());
        }
        let mut last = None;
        for source in self.sources(&image, credentials)? {
            match source.digest(self.store.limits().metadata_bytes).await {
                Ok(digest) => return Ok(digest),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| PullError::NotFound {
            registry: registry_of(&image).to_owned(),
            image: image.to_string(),
        }))
    }

    /// The mirrors, then the registry itself.
    fn sources<'a>(
        &self,
        image: &'a Reference,
        credentials: &BTreeMap<String, Credentials>,
    ) -> Result<Vec<Source<'a>>, PullError> {
        let own = registry_of(image);
        let mirrors = self.registries.mirrors.get(own).into_iter().flatten().map(String::as_str);
        mirrors.chain([own]).map(|registry| self.source(image, registry, credentials)).collect()
    }

    fn source<'a>(
        &self,
        image: &'a Reference,
        registry: &str,
        credentials: &BTreeMap<String, Credentials>,
    ) -> Result<Source<'a>, PullError> {
        let Registries { plain_http, credentials: own, patience, certs, .. } = &self.registries;
        let made =
            || Clients::new(*patience, certs.clone()).map(Arc::new).map_err(|error| crate::report::chain(&error));
        let clients = self.clients.get_or_init(made).clone().map_err(PullError::Http)?;
        let path = image.repository.split_once('/').map_or(image.repository.as_str(), |(_, path)| path);
        let found = credentials.get(registry).or_else(|| own.get(registry)).cloned();
        let named =
            |source| PullError::Registry { registry: registry.to_owned(), operation: "reach it".to_owned(), source };
        let client = Registry::new(clients, (registry, path), plain_http, found).map_err(named)?;
        Ok(Source { client, registry: registry.to_owned(), image, patience: *patience })
    }

    async fn pull_from(
        &self,
        source: &Source<'_>,
        progress: &watch::Sender<Progress>,
    ) -> Result<ImageRecord, PullError> {
        let layout = Layout::create(&self.store)?;
        let (config, layers) = self.fetch_manifests(source, &layout).await?;
        let config_bytes = source.small_blob(&config, self.store.limits().metadata_bytes).await?;
        layout.write(&config.digest, &config_bytes)?;
        let diff_ids = archive::diff_ids(&config_bytes, &config.digest)?;
        let missing: Vec<&Descriptor> = layers
            .iter()
            .enumerate()
            .filter(|(number, _)| !diff_ids.get(*number).is_some_and(|diff| self.store.has_layer(diff)))
            .map(|(_, layer)| layer)
            .collect();
        self.check_size(source, layers.len(), &missing)?;
        progress.send_modify(|state| {
            *state = Progress { bytes: 0, of_bytes: missing.iter().map(|layer| layer.size).sum() };
        });
        // Held until the store has them: a blob's file goes with its last user.
        // Boxed, because the compiler cannot see through a stream of borrowing futures that they are Send.
        let fetches: Vec<BoxFuture<'_, _>> =
            missing.into_iter().map(|layer| self.fetch_layer(source, layer, &layout, progress).boxed()).collect();
        let blobs: Vec<Arc<Blob>> = stream::iter(fetches).buffer_unordered(LAYERS_AT_A_TIME).try_collect().await?;
        let options = LoadOptions { pulled: Some(source.image.clone()), ..LoadOptions::default() };
        let (store, dir) = (self.store.clone(), layout.dir.clone());
        let loaded = tokio::task::spawn_blocking(move || store.load(&dir, &options)).await;
        drop(blobs);
        let loaded = loaded.map_err(|error| io_error("load", &layout.dir)(std::io::Error::other(error)))??;
        let none = || ImageError::Malformed("the registry's manifest has no image for this machine".to_owned());
        Ok(loaded.into_iter().next().ok_or_else(none)?)
    }

    /// Before anything is fetched: the store would refuse it, but only when all of it is here.
    fn check_size(&self, source: &Source<'_>, layers: usize, missing: &[&Descriptor]) -> Result<(), PullError> {
        let limits = self.store.limits();
        if layers > limits.layers {
            let (limit, detail) = (limits.layers as u64, format!("{} has {layers}", source.image));
            return Err(ImageError::TooBig { limit, unit: "layers", detail }.into());
        }
        let limit = limits.archive_bytes;
        let sum = missing.iter().fold(0_u64, |sum, layer| sum.saturating_add(layer.size));
        if sum <= limit {
            return Ok(());
        }
        Err(ImageError::TooBig { limit, unit: "bytes", detail: format!("layers of {sum} bytes") }.into())
    }

    /// Index (if there is one) and manifest, kept in the layout; the config and the layers that they point to.
    async fn fetch_manifests(
        &self,
        source: &Source<'_>,
        layout: &Layout,
    ) -> Result<(Descriptor, Vec<Descriptor>), PullError> {
        let mut reference = source.name();
        let mut expected = source.image.digest.clone();
        for depth in 0..=MAX_INDEX_DEPTH {
            let answer = source.client.manifest(&reference, self.store.limits().metadata_bytes).await;
            let bytes = answer.map_err(|error| source.error("get the manifest", error))?;
            let digest = Digest::from_hash(&Sha256::digest(&bytes));
            if let Some(expected) = expected.filter(|expected| *expected != digest) {
                return Err(archive::mismatch("manifest", &expected, &digest).into());
            }
            let media_type = media_type(&bytes);
            layout.write(&digest, &bytes)?;
            if depth == 0 {
                layout.write_index(&media_type, &digest, bytes.len())?;
            }
            match archive::pointed(&format!("manifest {digest}"), &media_type, &bytes)? {
                Pointed::Image { config, layers } => return Ok((config, layers)),
                Pointed::Manifest(inner) => {
                    reference = inner.digest.to_string();
                    expected = Some(inner.digest);
                }
            }
        }
        Err(ImageError::Malformed("indexes are nested too deep".to_owned()).into())
    }

    /// Fetches a layer's blob, unless another pull is at it: then waits for that one.
    async fn fetch_layer(
        &self,
        source: &Source<'_>,
        layer: &Descriptor,
        layout: &Layout,
        progress: &watch::Sender<Progress>,
    ) -> Result<Arc<Blob>, PullError> {
        let blob = self.blob(&source.registry, &layer.digest)?;
        let file = blob.file();
        blob.fetched.get_or_try_init(|| source.fetch(layer, &file, progress)).await?;
        let place = layout.place(&layer.digest);
        std::fs::hard_link(&file, &place)
            .or_else(|error| if error.kind() == std::io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) })
            .map_err(io_error("link", &place))?;
        Ok(blob)
    }

    fn blob(&self, registry: &str, digest: &Digest) -> Result<Arc<Blob>, ImageError> {
        let key = (registry.to_owned(), digest.clone());
        let mut blobs = self.blobs.lock().unwrap_or_else(PoisonError::into_inner);
        blobs.retain(|_, blob| blob.strong_count() > 0);
        if let Some(blob) = blobs.get(&key).and_then(Weak::upgrade) {
            return Ok(blob);
        }
        let blob = Arc::new(Blob { dir: self.store.work_dir()?, fetched: OnceCell::new() });
        blobs.insert(key, Arc::downgrade(&blob));
        Ok(blob)
    }
}

impl Source<'_> {
    fn error(&self, operation: &str, error: RegistryError) -> PullError {
        let (registry, image) = (self.registry.clone(), self.image.to_string());
        match error {
            RegistryError::NotFound => PullError::NotFound { registry, image },
            RegistryError::Unauthorized => PullError::Unauthorized { registry, image },
            source => PullError::Registry { registry, operation: operation.to_owned(), source },
        }
    }

    fn blob_error(&self, blob: &Descriptor) -> impl FnOnce(RegistryError) -> PullError {
        let operation = format!("fetch {}", blob.digest);
        move |error| self.error(&operation, error)
    }

    /// What the manifest is asked for by.
    fn name(&self) -> String {
        let tag = || self.image.tag.clone().unwrap_or_else(|| "latest".to_owned());
        self.image.digest.as_ref().map_or_else(tag, Digest::to_string)
    }

    /// The digest of what is under the tag: the registry says it, or it is that of the manifest.
    async fn digest(&self, limit: u64) -> Result<Digest, PullError> {
        let failed = |error| self.error("look up the manifest", error);
        match self.client.digest(&self.name()).await.map_err(failed)? {
            Some(text) => Digest::parse(&text)
                .ok_or_else(|| ImageError::Malformed(format!("digest {text:?} of a registry")).into()),
            None => {
                let manifest = self.client.manifest(&self.name(), limit).await.map_err(failed)?;
                Ok(Digest::from_hash(&Sha256::digest(&manifest)))
            }
        }
    }

    /// A config.
    async fn small_blob(&self, blob: &Descriptor, limit: u64) -> Result<Vec<u8>, PullError> {
        if blob.size > limit {
            return Err(ImageError::TooBig { limit, unit: "bytes", detail: format!("config {}", blob.digest) }.into());
        }
        let mut bytes = Vec::new();
        self.content(blob, &mut bytes, Path::new(""), |_| {}).await?;
        Ok(bytes)
    }

    /// A layer, to a file.
    async fn fetch(&self, blob: &Descriptor, to: &Path, progress: &watch::Sender<Progress>) -> Result<(), PullError> {
        let mut file = tokio::fs::File::create(to).await.map_err(io_error("create", to))?;
        let came = |bytes: u64| progress.send_modify(|state| state.bytes += bytes);
        self.content(blob, &mut file, to, came).await
    }

    /// A blob's content, held against its digest, never longer than promised, and not for ever. `place` is for errors.
    async fn content(
        &self,
        blob: &Descriptor,
        into: &mut (impl AsyncWrite + Unpin),
        place: &Path,
        came: impl Fn(u64),
    ) -> Result<(), PullError> {
        let most = self.patience * 4 + Duration::from_secs(blob.size / SLOWEST_BYTES_PER_S);
        let fetching = async {
            let mut answer = self.client.blob(blob.digest.as_str()).await.map_err(self.blob_error(blob))?;
            let (mut hash, mut bytes) = (Sha256::new(), 0_u64);
            while let Some(chunk) = answer.chunk().await.map_err(|error| self.blob_error(blob)(error.into()))? {
                bytes += chunk.len() as u64;
                if bytes > blob.size {
                    let detail = format!("blob {} is longer than its manifest says", blob.digest);
                    return Err(ImageError::TooBig { limit: blob.size, unit: "bytes", detail }.into());
                }
                hash.update(&chunk);
                into.write_all(&chunk).await.map_err(io_error("write", place))?;
                came(chunk.len() as u64);
            }
            into.flush().await.map_err(io_error("write", place))?;
            Ok(verify(&blob.digest, &Digest::from_hash(&hash.finalize()))?)
        };
        let slow = |_| Err(self.blob_error(blob)(RegistryError::Slow(most)));
        tokio::time::timeout(most, fetching).await.unwrap_or_else(slow)
    }
}

fn verify(expected: &Digest, actual: &Digest) -> Result<(), ImageError> {
    if expected == actual { Ok(()) } else { Err(archive::mismatch("blob", expected, actual)) }
}

fn registry_of(image: &Reference) -> &str {
    image.repository.split('/').next().unwrap_or_default()
}

/// What a manifest says it is; the oldest OCI manifests say nothing, and an index has `manifests`.
fn media_type(bytes: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Kind {
        media_type: Option<String>,
        manifests: Option<serde_json::Value>,
    }
    match serde_json::from_slice::<Kind>(bytes) {
        Ok(Kind { media_type: Some(media_type), .. }) => media_type,
        Ok(Kind { manifests: Some(_), .. }) => OCI_INDEX.to_owned(),
        _ => OCI_MANIFEST.to_owned(),
    }
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { operation, path, source }
}

/// An oci-layout in the making; removed with this value.
#[derive(Debug)]
struct Layout {
    dir: PathBuf,
}

impl Layout {
    fn create(store: &ImageStore) -> Result<Self, ImageError> {
        let layout = Self { dir: store.work_dir()? };
        let blobs = layout.dir.join("blobs/sha256");
        std::fs::create_dir_all(&blobs).map_err(io_error("create", &blobs))?;
        let mark = layout.dir.join("oci-layout");
        std::fs::write(&mark, r#"{"imageLayoutVersion":"1.0.0"}"#).map_err(io_error("write", &mark))?;
        Ok(layout)
    }

    fn place(&self, digest: &Digest) -> PathBuf {
        self.dir.join(archive::blob_name(digest))
    }

    fn write(&self, digest: &Digest, bytes: &[u8]) -> Result<(), ImageError> {
        let place = self.place(digest);
        std::fs::write(&place, bytes).map_err(io_error("write", &place))
    }

    fn write_index(&self, media_type: &str, digest: &Digest, size: usize) -> Result<(), ImageError> {
        let entry = serde_json::json!({"mediaType": media_type, "digest": digest, "size": size});
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [entry]});
        let place = self.dir.join("index.json");
        std::fs::write(&place, index.to_string()).map_err(io_error("write", &place))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "remove a pull's files; the next start does it");
        }
    }
}
