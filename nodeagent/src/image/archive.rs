//! What an archive holds: the images of an oci-layout (tar or directory) or a docker-archive, or one root file system.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::store::Limits;
use super::tarball::{Tar, from_io};
use super::{Digest, ImageConfig, ImageError, LoadKind, LoadOptions, Reference};

/// Files that an archive of images may hold beside its layers' content; a root file system may have more, and then their
/// places are not kept.
const MAX_INDEXED: usize = 20_000;
/// An index may point to indexes, but not for ever.
const MAX_INDEX_DEPTH: usize = 3;
/// Images of one archive.
const MAX_IMAGES: usize = 64;
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Where blobs come from.
#[derive(Debug)]
pub(super) enum Source {
    /// An oci-layout that lies unpacked.
    Dir(PathBuf),
    /// A tar, with the places of its files.
    Tar(PathBuf, HashMap<String, (u64, u64)>),
}

/// One image that is to be loaded.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) names: Vec<String>,
    /// Digest of its config; of a root file system only known when its one layer is unpacked.
    pub(super) id: Option<Digest>,
    pub(super) manifest: Option<Digest>,
    pub(super) config: ImageConfig,
    pub(super) layers: Vec<PlannedLayer>,
}

/// One layer of it.
#[derive(Debug)]
pub(super) struct PlannedLayer {
    /// The blob's name in the source; empty: the whole file.
    pub(super) name: String,
    /// What the manifest promises of the blob.
    pub(super) blob: Option<Digest>,
    /// What the config promises of the tar stream.
    pub(super) diff: Option<Digest>,
}

// ----------------------------------------------------------------------------------------------------------- source

impl Source {
    /// Looks what the archive is.
    pub(super) fn open(path: &Path, limits: &Limits) -> Result<Self, ImageError> {
        if path.is_dir() {
            return Ok(Self::Dir(path.to_owned()));
        }
        let file = File::open(path).map_err(io_error("open", path))?;
        let mut tar = Tar::seekable(BufReader::new(file), limits.metadata_bytes);
        let (mut files, mut entries) = (HashMap::new(), 0_u64);
        while let Some(entry) = tar.next()? {
            entries += 1;
            if entries > limits.entries {
                let detail = "the archive".to_owned();
                return Err(ImageError::TooBig { limit: limits.entries, unit: "entries", detail });
            }
            let Ok(name) = std::str::from_utf8(&entry.path) else { continue };
            let name = name.strip_prefix("./").unwrap_or(name);
            if entry.kind.is_file() && is_of_image(name) && files.len() < MAX_INDEXED {
                files.insert(name.to_owned(), (entry.offset, entry.size));
            }
        }
        Ok(Self::Tar(path.to_owned(), files))
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Dir(dir) => dir.join(name).is_file(),
            Self::Tar(_, files) => files.contains_key(name),
        }
    }

    /// The content of a file. Names are constants or were checked: they never leave the source.
    pub(super) fn read(&self, name: &str) -> Result<Box<dyn Read>, ImageError> {
        match self {
            Self::Tar(path, _) if name.is_empty() => Ok(Box::new(File::open(path).map_err(io_error("open", path))?)),
            Self::Dir(dir) => {
                let path = dir.join(name);
                match File::open(&path) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(absent(name)),
                    file => Ok(Box::new(file.map_err(io_error("open", &path))?)),
                }
            }
            Self::Tar(path, files) => {
                let (offset, size) = *files.get(name).ok_or_else(|| absent(name))?;
                let mut file = File::open(path).map_err(io_error("open", path))?;
                file.seek(SeekFrom::Start(offset)).map_err(io_error("seek in", path))?;
                Ok(Box::new(file.take(size)))
            }
        }
    }

    fn small(&self, name: &str, limits: &Limits) -> Result<Vec<u8>, ImageError> {
        let limit = limits.metadata_bytes;
        let mut bytes = Vec::new();
        self.read(name)?.take(limit + 1).read_to_end(&mut bytes).map_err(from_io)?;
        if bytes.len() as u64 > limit {
            return Err(ImageError::TooBig { limit, unit: "bytes", detail: name.to_owned() });
        }
        Ok(bytes)
    }

    /// A small blob of an oci-layout, held against its digest.
    fn blob(&self, digest: &Digest, limits: &Limits) -> Result<Vec<u8>, ImageError> {
        let bytes = self.small(&blob_name(digest), limits)?;
        let actual = Digest::from_hash(&Sha256::digest(&bytes));
        if actual == *digest { Ok(bytes) } else { Err(mismatch("blob", digest, &actual)) }
    }
}

fn is_of_image(name: &str) -> bool {
    let plain = !name.starts_with('/') && name.split('/').all(|part| !matches!(part, "" | "." | ".."));
    plain
        && (matches!(name, "oci-layout" | "index.json" | "manifest.json")
            || name.starts_with("blobs/sha256/")
            || (name.split('/').count() <= 2 && (name.ends_with(".json") || name.ends_with(".tar"))))
}

pub(super) fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { operation, path, source }
}

fn absent(name: &str) -> ImageError {
    ImageError::Malformed(format!("{name} is named, but is not in the archive"))
}

pub(super) fn mismatch(what: &str, expected: &Digest, actual: &Digest) -> ImageError {
    ImageError::DigestMismatch { what: what.to_owned(), expected: expected.to_string(), actual: actual.to_string() }
}

// ----------------------------------------------------------------------------------------------------------- images

/// The images of the source.
pub(super) fn plan(source: &Source, options: &LoadOptions, limits: &Limits) -> Result<Vec<Planned>, ImageError> {
    let given = match &options.pulled {
        Some(reference) => Some(reference.to_string()),
        None => options.name.as_deref().filter(|name| !name.is_empty()).map(normalised).transpose()?,
    };
    let mut images = match source {
        _ if options.kind == LoadKind::Rootfs => vec![rootfs(source, options)?],
        _ if source.has("index.json") && source.has("oci-layout") => oci_layout(source, limits)?,
        _ if source.has("manifest.json") => docker_archive(source, limits)?,
        _ => vec![rootfs(source, options)?],
    };
    match (given, images.as_mut_slice()) {
        (Some(name), [only]) => only.names = vec![name],
        (Some(_), several) => {
            let many = format!("it holds {} images: one name cannot be given to all of them", several.len());
            return Err(ImageError::Malformed(many));
        }
        (None, images) if images.iter().any(|image| image.names.is_empty()) => return Err(ImageError::NeedsName),
        (None, _) => {}
    }
    for image in &images {
        if image.layers.len() > limits.layers {
            let detail = image.names.join(", ");
            return Err(ImageError::TooBig { limit: limits.layers as u64, unit: "layers", detail });
        }
    }
    Ok(images)
}

fn normalised(name: &str) -> Result<String, ImageError> {
    let reference = Reference::parse(name)?;
    let pinned = || ImageError::BadReference {
        reference: name.to_owned(),
        reason: "an image is named by a tag, not by a digest",
    };
    if reference.digest.is_some() {
        return Err(pinned());
    }
    reference.name().ok_or_else(pinned)
}

fn rootfs(source: &Source, options: &LoadOptions) -> Result<Planned, ImageError> {
    if let Source::Dir(dir) = source {
        return Err(ImageError::Malformed(format!("{} is a directory, but no oci-layout", dir.display())));
    }
    let env = if options.env.is_empty() { vec![DEFAULT_PATH.to_owned()] } else { options.env.clone() };
    Ok(Planned {
        names: Vec::new(),
        id: None,
        manifest: None,
        config: ImageConfig { entrypoint: options.entrypoint.clone(), env, ..ImageConfig::default() },
        layers: vec![PlannedLayer { name: String::new(), blob: None, diff: None }],
    })
}

#[derive(Debug, Deserialize)]
struct Index {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

/// A pointer to a blob, as manifests and indexes have them.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub(super) media_type: String,
    pub(super) digest: Digest,
    /// Bytes of the blob.
    #[serde(default)]
    pub(super) size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: HashMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    config: Option<ConfigBody>,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

/// Absent and null mean the same in configs of the field.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct ConfigBody {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    stop_signal: Option<String>,
    labels: Option<std::collections::BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn json<'a, T: Deserialize<'a>>(what: &str, bytes: &'a [u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|error| ImageError::Malformed(format!("{what}: {error}")))
}

/// The architecture of this build in the field's words.
pub(super) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn oci_layout(source: &Source, limits: &Limits) -> Result<Vec<Planned>, ImageError> {
    let index: Index = json("index.json", &source.small("index.json", limits)?)?;
    if index.manifests.len() > MAX_IMAGES {
        let detail = "index.json".to_owned();
        return Err(ImageError::TooBig { limit: MAX_IMAGES as u64, unit: "images", detail });
    }
    let mut images: Vec<Planned> = Vec::new();
    for entry in &index.manifests {
        if entry.platform.as_ref().is_some_and(|platform| !is_ours(platform)) {
            continue;
        }
        let mut image = oci_image(source, entry, limits, 0)?;
        image.names = names_of(entry)?;
        // The same image under several names stands once per name in the index.
        match images.iter_mut().find(|other| other.id == image.id) {
            Some(other) => other.names.append(&mut image.names),
            None => images.push(image),
        }
    }
    if images.is_empty() {
        return Err(ImageError::Malformed(format!("index.json has no image for linux/{}", architecture())));
    }
    Ok(images)
}

fn is_ours(platform: &Platform) -> bool {
    platform.os == "linux" && platform.architecture == architecture()
}

/// containerd writes the full name, others the tag or the name into the reference annotation.
fn names_of(entry: &Descriptor) -> Result<Vec<String>, ImageError> {
    let full = entry.annotations.get("io.containerd.image.name");
    let reference = entry.annotations.get("org.opencontainers.image.ref.name").filter(|name| name.contains(['/', ':']));
    full.or(reference).map(|name| normalised(name)).transpose().map(|name| name.into_iter().collect())
}

/// What a manifest points to.
#[derive(Debug)]
pub(super) enum Pointed {
    /// An index: the manifest for this machine.
    Manifest(Descriptor),
    /// One image.
    Image { config: Descriptor, layers: Vec<Descriptor> },
}

/// Reads a manifest or an index; `what` names it in errors.
pub(super) fn pointed(what: &str, media_type: &str, bytes: &[u8]) -> Result<Pointed, ImageError> {
    if media_type.ends_with(".image.index.v1+json") || media_type.ends_with("manifest.list.v2+json") {
        let index: Index = json(what, bytes)?;
        let ours = index.manifests.into_iter().find(|entry| entry.platform.as_ref().is_some_and(is_ours));
        let none = || ImageError::Malformed(format!("{what} has no image for linux/{}", architecture()));
        return ours.ok_or_else(none).map(Pointed::Manifest);
    }
    let Manifest { config, layers } = json(what, bytes)?;
    Ok(Pointed::Image { config, layers })
}

/// The diff ids of an image's config, lowest layer first.
pub(super) fn diff_ids(bytes: &[u8], digest: &Digest) -> Result<Vec<Digest>, ImageError> {
    config(bytes, digest).map(|(_, diff_ids)| diff_ids)
}

fn oci_image(source: &Source, entry: &Descriptor, limits: &Limits, depth: usize) -> Result<Planned, ImageError> {
    let bytes = source.blob(&entry.digest, limits)?;
    let what = format!("blob {}", entry.digest);
    let (config_blob, blobs) = match pointed(&what, &entry.media_type, &bytes)? {
        Pointed::Manifest(_) if depth >= MAX_INDEX_DEPTH => {
            return Err(ImageError::Malformed("indexes are nested too deep".to_owned()));
        }
        Pointed::Manifest(inner) => {
            let image = oci_image(source, &inner, limits, depth + 1)?;
            // What a manifest pins is what the registry names: the outermost digest.
            return Ok(Planned { manifest: Some(entry.digest.clone()), ..image });
        }
        Pointed::Image { config, layers } => (config.digest, layers),
    };
    let (config, diff_ids) = config(&source.blob(&config_blob, limits)?, &config_blob)?;
    if diff_ids.len() != blobs.len() {
        let (layers, ids) = (blobs.len(), diff_ids.len());
        return Err(ImageError::Malformed(format!("{what} has {layers} layers, and its config {ids}")));
    }
    let layers = blobs.into_iter().zip(diff_ids).map(|(layer, diff)| PlannedLayer {
        name: blob_name(&layer.digest),
        blob: Some(layer.digest),
        diff: Some(diff),
    });
    Ok(Planned {
        names: Vec::new(),
        id: Some(config_blob),
        manifest: Some(entry.digest.clone()),
        config,
        layers: layers.collect(),
    })
}

fn config(bytes: &[u8], digest: &Digest) -> Result<(ImageConfig, Vec<Digest>), ImageError> {
    let file: ConfigFile = json(&format!("config {digest}"), bytes)?;
    let platform = Platform { architecture: file.architecture, os: file.os };
    if !platform.architecture.is_empty() && !is_ours(&platform) {
        let Platform { architecture: theirs, os } = platform;
        return Err(ImageError::Unsupported(format!("an image for {os}/{theirs} on linux/{}", architecture())));
    }
    let body = file.config.unwrap_or_default();
    let config = ImageConfig {
        entrypoint: body.entrypoint.unwrap_or_default(),
        cmd: body.cmd.unwrap_or_default(),
        env: body.env.unwrap_or_default(),
        working_dir: body.working_dir.unwrap_or_default(),
        user: body.user.unwrap_or_default(),
        stop_signal: body.stop_signal.unwrap_or_default(),
        labels: body.labels.unwrap_or_default(),
    };
    Ok((config, file.rootfs.diff_ids))
}

fn docker_archive(source: &Source, limits: &Limits) -> Result<Vec<Planned>, ImageError> {
    let images: Vec<DockerImage> = json("manifest.json", &source.small("manifest.json", limits)?)?;
    if images.is_empty() || images.len() > MAX_IMAGES {
        return Err(ImageError::Malformed(format!(
            "manifest.json lists {} images: want 1 to {MAX_IMAGES}",
            images.len()
        )));
    }
    images.into_iter().map(|image| docker_image(source, image, limits)).collect()
}

fn docker_image(source: &Source, image: DockerImage, limits: &Limits) -> Result<Planned, ImageError> {
    let bytes = source.small(&image.config, limits)?;
    let id = Digest::from_hash(&Sha256::digest(&bytes));
    let (config, diff_ids) = config(&bytes, &id)?;
    if diff_ids.len() != image.layers.len() {
        let (layers, ids) = (image.layers.len(), diff_ids.len());
        return Err(ImageError::Malformed(format!("manifest.json has {layers} layers, and {} {ids}", image.config)));
    }
    let names = image.repo_tags.unwrap_or_default().iter().map(|name| normalised(name)).collect::<Result<_, _>>()?;
    let layers = image.layers.into_iter().zip(diff_ids);
    let layers = layers.map(|(name, diff)| PlannedLayer { name, blob: None, diff: Some(diff) }).collect();
    Ok(Planned { names, id: Some(id), manifest: None, config, layers })
}
