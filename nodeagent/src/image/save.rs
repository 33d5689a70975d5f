//! From the store to an archive: an OCI layout in one tar, with the `manifest.json` by which docker loads it too.
//!
//! The store keeps layers unpacked, so their tars are made anew: the same files with their owners, modes, links and attributes, times in
//! whole seconds, but not the bytes that the image came in, and so under other digests. What is saved, loaded and saved again has the same ones.
//! Everything is read twice, once for digest and size, once for the archive: no copy of it is kept anywhere.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{self, Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use super::archive::architecture;
use super::{Digest, ImageError, ImageRecord};

const BLOCK: usize = 512;
const OPAQUE: &[u8] = b".wh..wh..opq";
const WHITEOUT: &[u8] = b".wh.";
/// Bytes of a path or link that a header has room for; longer ones stand in a record before it (pax).
const HEADER_PATH_BYTES: usize = 100;

/// Writes the image; `layers` are its unpacked layers, the lowest first.
///
/// # Errors
/// [`ImageError::Io`] for what cannot be read, [`ImageError::Archive`] when nobody takes the archive.
pub(super) fn save(record: &ImageRecord, layers: &[PathBuf], out: &mut impl Write) -> Result<(), ImageError> {
    let mut blobs: BTreeMap<Digest, (u64, Blob<'_>)> = BTreeMap::new();
    let (mut descriptors, mut paths, mut diff_ids) = (Vec::new(), Vec::new(), Vec::new());
    for layer in layers {
        let mut measured = Measured::new(io::sink());
        write_layer(layer, &mut measured)?;
        let (digest, bytes) = measured.finish();
        descriptors.push(descriptor("application/vnd.oci.image.layer.v1.tar", &digest, bytes));
        paths.push(blob_path(&digest));
        diff_ids.push(digest.as_str().to_owned());
        blobs.insert(digest, (bytes, Blob::Layer(layer)));
    }
    let mut keep = |value: &Value| {
        let text = value.to_string().into_bytes();
        let (digest, bytes) = (Digest::from_hash(&Sha256::digest(&text)), text.len() as u64);
        blobs.insert(digest.clone(), (bytes, Blob::Text(text)));
        (digest, bytes)
    };
    let (config, config_bytes) = keep(&config_of(record, &diff_ids));
    let (manifest, manifest_bytes) = keep(&json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config, config_bytes),
        "layers": descriptors,
    }));
    let of_image = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest, manifest_bytes);
    // The index has the image once for each of its names.
    let named = |name: &String| {
        let mut entry = of_image.clone();
        entry["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name});
        entry
    };
    // One that came by its digest has a name of that digest, which it is not saved under.
    let names: Vec<&String> = record.names.iter().filter(|name| !name.contains('@')).collect();
    let manifests = if names.is_empty() { vec![of_image.clone()] } else { names.iter().copied().map(named).collect() };
    let index =
        json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests});
    let docker = json!([{"Config": blob_path(&config), "RepoTags": names, "Layers": paths}]);

    for (name, text) in [
        ("oci-layout", json!({"imageLayoutVersion": "1.0.0"}).to_string()),
        ("index.json", index.to_string()),
        ("manifest.json", docker.to_string()),
    ] {
        put(out, name, &Blob::Text(text.clone().into_bytes()), text.len() as u64, None)?;
    }
    for (digest, (bytes, blob)) in &blobs {
        put(out, &blob_path(digest), blob, *bytes, Some(digest))?;
    }
    out.write_all(&[0; 2 * BLOCK]).and_then(|()| out.flush()).map_err(ImageError::Archive)
}

/// What a blob is made of.
enum Blob<'a> {
    Text(Vec<u8>),
    Layer(&'a Path),
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn descriptor(media_type: &str, digest: &Digest, bytes: u64) -> Value {
    json!({"mediaType": media_type, "digest": digest.as_str(), "size": bytes})
}

fn config_of(record: &ImageRecord, diff_ids: &[String]) -> Value {
    let config = &record.config;
    let mut process = serde_json::Map::new();
    let mut say = |name: &str, value: Value, is_empty: bool| {
        if !is_empty {
            process.insert(name.to_owned(), value);
        }
    };
    say("Env", json!(config.env), config.env.is_empty());
    say("Entrypoint", json!(config.entrypoint), config.entrypoint.is_empty());
    say("Cmd", json!(config.cmd), config.cmd.is_empty());
    say("WorkingDir", json!(config.working_dir), config.working_dir.is_empty());
    say("User", json!(config.user), config.user.is_empty());
    say("StopSignal", json!(config.stop_signal), config.stop_signal.is_empty());
    say("Labels", json!(config.labels), config.labels.is_empty());
    json!({
        "architecture": architecture(),
        "os": "linux",
        "config": process,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
}

/// One file of the archive. A layer is made a second time: one that has another digest by now was changed meanwhile.
fn put(
    out: &mut impl Write,
    name: &str,
    blob: &Blob<'_>,
    bytes: u64,
    digest: Option<&Digest>,
) -> Result<(), ImageError> {
    let mut header = head(EntryType::Regular, 0o644, bytes);
    header.set_path(name).map_err(ImageError::Archive)?;
    header.set_cksum();
    out.write_all(header.as_bytes()).map_err(ImageError::Archive)?;
    match blob {
        Blob::Text(text) => out.write_all(text).map_err(ImageError::Archive)?,
        Blob::Layer(layer) => {
            let mut measured = Measured::new(&mut *out);
            write_layer(layer, &mut measured)?;
            if digest != Some(&measured.finish().0) {
                return Err(ImageError::Malformed(format!("layer {} has changed while it was saved", layer.display())));
            }
        }
    }
    let padding = (BLOCK - usize::try_from(bytes % BLOCK as u64).unwrap_or(0)) % BLOCK;
    out.write_all(&[0; BLOCK][..padding]).map_err(ImageError::Archive)
}

fn head(kind: EntryType, mode: u32, bytes: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(bytes);
    header.set_mtime(0);
    header
}

/// Counts and hashes what is written.
struct Measured<W> {
    inner: W,
    hash: Sha256,
    bytes: u64,
}

impl<W> Measured<W> {
    fn new(inner: W) -> Self {
        Self { inner, hash: Sha256::new(), bytes: 0 }
    }

    fn finish(self) -> (Digest, u64) {
        (Digest::from_hash(&self.hash.finalize()), self.bytes)
    }
}

impl<W: Write> Write for Measured<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.inner.write(bytes)?;
        self.hash.update(&bytes[..taken]);
        self.bytes += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

// ------------------------------------------------------------------------------------------------------- one layer

/// The tar of an unpacked layer: directories before what is in them, names in their order.
fn write_layer(top: &Path, out: &mut impl Write) -> Result<(), ImageError> {
    let mut layer = Layer { builder: Builder::new(out), links: HashMap::new() };
    let mut open = vec![(top.to_owned(), Vec::new())];
    while let Some((path, name)) = open.pop() {
        let meta = path.symlink_metadata().map_err(failed("look at", &path))?;
        layer.entry(&path, &name, &meta)?;
        if meta.is_dir() {
            let entries =
                path.read_dir().and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(failed("read", &path))?;
            let mut names: Vec<_> = entries.into_iter().map(|entry| entry.file_name()).collect();
            // The last one is taken first.
            names.sort_by(|a, b| b.cmp(a));
            open.extend(names.into_iter().map(|child| (path.join(&child), joined(&name, child.as_bytes()))));
        }
    }
    layer.builder.finish().map_err(ImageError::Archive)
}

fn joined(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { operation, path, source }
}

struct Layer<'w, W: Write> {
    builder: Builder<&'w mut W>,
    /// Names of files that have several, by device and inode.
    links: HashMap<(u64, u64), Vec<u8>>,
}

impl<W: Write> Layer<'_, W> {
    fn entry(&mut self, path: &Path, name: &[u8], meta: &Metadata) -> Result<(), ImageError> {
        let kind = meta.file_type();
        if kind.is_dir() {
            let attributes = attributes(path)?;
            let slash = if name.is_empty() { b"./".to_vec() } else { [name, b"/"].concat() };
            self.write(EntryType::Directory, &slash, meta, (b"", &attributes), (io::empty(), 0))?;
            let opaque = xattr::get(path, "trusted.overlay.opaque").map_err(failed("read attributes of", path))?;
            if opaque.as_deref() == Some(b"y") {
                self.marker(&joined(name, OPAQUE))?;
            }
            return Ok(());
        }
        if kind.is_char_device() {
            // Overlay's mark that the name is gone; an image has no devices.
            let (parent, last) = name
                .iter()
                .rposition(|byte| *byte == b'/')
                .map_or((&[][..], name), |at| (&name[..at], &name[at + 1..]));
            return self.marker(&joined(parent, &[WHITEOUT, last].concat()));
        }
        if kind.is_socket() || kind.is_block_device() {
            return Ok(());
        }
        if !kind.is_dir() && meta.nlink() > 1 {
            if let Some(first) = self.links.get(&(meta.dev(), meta.ino())).cloned() {
                return self.write(EntryType::Link, name, meta, (&first, &[]), (io::empty(), 0));
            }
            self.links.insert((meta.dev(), meta.ino()), name.to_vec());
        }
        if kind.is_symlink() {
            let target = path.read_link().map_err(failed("read the link", path))?;
            return self.write(EntryType::Symlink, name, meta, (target.as_os_str().as_bytes(), &[]), (io::empty(), 0));
        }
        if kind.is_fifo() {
            return self.write(EntryType::Fifo, name, meta, (b"", &[]), (io::empty(), 0));
        }
        let flags = OFlag::O_NOFOLLOW.bits();
        let file = File::options().read(true).custom_flags(flags).open(path).map_err(failed("open", path))?;
        let attributes = attributes(path)?;
        self.write(EntryType::Regular, name, meta, (b"", &attributes), (file.take(meta.len()), meta.len()))
    }

    /// An empty file whose name says something of the layers below.
    fn marker(&mut self, name: &[u8]) -> Result<(), ImageError> {
        let header = head(EntryType::Regular, 0o644, 0);
        self.append(header, name, (b"", &[]), io::empty())
    }

    fn write(
        &mut self,
        kind: EntryType,
        name: &[u8],
        meta: &Metadata,
        more: (&[u8], &[(String, Vec<u8>)]),
        (content, bytes): (impl io::Read, u64),
    ) -> Result<(), ImageError> {
        let mut header = head(kind, meta.mode() & 0o7777, bytes);
        header.set_uid(meta.uid().into());
        header.set_gid(meta.gid().into());
        header.set_mtime(u64::try_from(meta.mtime()).unwrap_or(0));
        self.append(header, name, more, content)
    }

    fn append(
        &mut self,
        mut header: Header,
        name: &[u8],
        (link, attributes): (&[u8], &[(String, Vec<u8>)]),
        content: impl io::Read,
    ) -> Result<(), ImageError> {
        let mut records: Vec<(&str, &[u8])> = Vec::new();
        if name.len() > HEADER_PATH_BYTES {
            records.push(("path", name));
        }
        if link.len() > HEADER_PATH_BYTES {
            records.push(("linkpath", link));
        }
        records.extend(attributes.iter().map(|(name, value)| (name.as_str(), value.as_slice())));
        if !records.is_empty() {
            self.builder.append_pax_extensions(records).map_err(ImageError::Archive)?;
        }
        let fields = header.as_old_mut();
        let fill = |field: &mut [u8; HEADER_PATH_BYTES], text: &[u8]| {
            let bytes = text.len().min(HEADER_PATH_BYTES);
            field[..bytes].copy_from_slice(&text[..bytes]);
        };
        fill(&mut fields.name, name);
        fill(&mut fields.linkname, link);
        header.set_cksum();
        self.builder.append(&header, content).map_err(ImageError::Archive)
    }
}

/// The attributes that an image has: those of users, and a program's capabilities.
fn attributes(path: &Path) -> Result<Vec<(String, Vec<u8>)>, ImageError> {
    let names = xattr::list(path).map_err(failed("list attributes of", path))?;
    let of_image = |name: &OsStr| name == "security.capability" || name.as_bytes().starts_with(b"user.");
    let mut found = Vec::new();
    for name in names.filter(|name| of_image(name)) {
        if let (Some(text), Some(value)) =
            (name.to_str(), xattr::get(path, &name).map_err(failed("read attributes of", path))?)
        {
            found.push((format!("SCHILY.xattr.{text}"), value));
        }
    }
    found.sort();
    Ok(found)
}
