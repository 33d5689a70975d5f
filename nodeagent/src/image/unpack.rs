//! From a layer's bytes to a directory that overlayfs can have as a lower.
//!
//! Nothing in a layer is trusted: entries that would leave the directory, devices and links out of the layer are refused, sizes
//! and numbers are bounded before they are used, and both digests are computed over exactly the bytes that were unpacked.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use flate2::bufread::MultiGzDecoder;
use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use sha2::{Digest as _, Sha256};

use super::store::Limits;
use super::tarball::{Entry, Tar, from_io};
use super::tree::{Dir, Found, Meta, set_file_meta};
use super::{Digest, ImageError};

const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names that begin so are aufs' own and mean nothing to anybody else.
const AUFS: &[u8] = b".wh..wh.";
const READ_BUFFER_BYTES: usize = 128 << 10;

/// What an image may still unpack.
#[derive(Debug)]
pub(super) struct Budget<'a> {
    limits: &'a Limits,
    bytes: u64,
    entries: u64,
}

impl<'a> Budget<'a> {
    pub(super) fn new(limits: &'a Limits) -> Self {
        Self { limits, bytes: 0, entries: 0 }
    }

    fn entries(&mut self, layer: &str, more: u64) -> Result<(), ImageError> {
        self.entries += more;
        let limit = self.limits.entries;
        let detail = || format!("layer {layer}");
        if self.entries > limit { Err(ImageError::TooBig { limit, unit: "entries", detail: detail() }) } else { Ok(()) }
    }
}

/// What came of a layer.
#[derive(Debug)]
pub(super) struct Unpacked {
    /// Of the bytes as they were in the archive.
    pub(super) blob: Digest,
    /// Of the tar stream.
    pub(super) diff: Digest,
    /// Content of its files.
    pub(super) bytes: u64,
}

/// Unpacks one layer into an empty directory. `label` names it in errors.
pub(super) fn unpack(
    blob: impl Read,
    label: &str,
    into: &Path,
    budget: &mut Budget<'_>,
) -> Result<Unpacked, ImageError> {
    let mut stream = Stream::open(blob, label, budget)?;
    let top = Dir::top(into).map_err(|source| ImageError::Io { operation: "open", path: into.to_owned(), source })?;
    let max_header = stream.budget.limits.metadata_bytes;
    let mut tar = Tar::new(&mut stream, max_header);
    let left_for_dirs = tar.inner_mut().budget.limits.directory_bytes;
    let mut writer = Writer { top, layer: label, bytes: 0, dir_times: Vec::new(), left_for_dirs };
    while let Some(entry) = tar.next()? {
        tar.count_entries(label, 1)?;
        // A path may imply some thousand directories: no more than that before they are counted.
        let implied = writer.write(&entry, &mut tar)?;
        tar.count_entries(label, implied)?;
    }
    let complete = tar.is_complete();
    writer.finish()?;
    let bytes = writer.bytes;
    let (blob, diff) = stream.finish()?;
    if !complete {
        return Err(ImageError::Malformed(format!("layer {label} has no end: it is cut short")));
    }
    Ok(Unpacked { blob, diff, bytes })
}

impl<R: Read> Tar<&mut Stream<'_, '_, R>> {
    fn count_entries(&mut self, layer: &str, more: u64) -> Result<(), ImageError> {
        self.inner_mut().budget.entries(layer, more)
    }
}

// ------------------------------------------------------------------------------------------------------- the stream

/// Counts and hashes what is read.
#[derive(Debug)]
struct Hashed<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.inner.read(buffer)?;
        self.hash.update(&buffer[..got]);
        self.bytes += got as u64;
        Ok(got)
    }
}

enum Coding<R> {
    Plain(BufReader<Hashed<R>>),
    Gzip(Box<MultiGzDecoder<BufReader<Hashed<R>>>>, Sha256),
}

/// The tar stream of a layer, decompressed, bounded and hashed.
struct Stream<'b, 'l, R> {
    coding: Coding<R>,
    budget: &'b mut Budget<'l>,
    out: u64,
}

impl<'b, 'l, R: Read> Stream<'b, 'l, R> {
    fn open(blob: R, label: &str, budget: &'b mut Budget<'l>) -> Result<Self, ImageError> {
        let hashed = Hashed { inner: blob, hash: Sha256::new(), bytes: 0 };
        let mut reader = BufReader::with_capacity(READ_BUFFER_BYTES, hashed);
        let head = reader.fill_buf().map_err(from_io)?;
        let coding = if head.starts_with(&GZIP) {
            Coding::Gzip(Box::new(MultiGzDecoder::new(reader)), Sha256::new())
        } else if head.starts_with(&ZSTD) {
            return Err(ImageError::Unsupported(format!("layer {label} is compressed with zstd; use gzip or none")));
        } else {
            Coding::Plain(reader)
        };
        Ok(Self { coding, budget, out: 0 })
    }

    /// Reads what is left (padding after the archive's end belongs to the digests) and answers blob and diff digest.
    fn finish(mut self) -> Result<(Digest, Digest), ImageError> {
        io::copy(&mut self, &mut io::sink()).map_err(from_io)?;
        match self.coding {
            Coding::Plain(reader) => {
                let digest = Digest::from_hash(&reader.into_inner().hash.finalize());
                Ok((digest.clone(), digest))
            }
            Coding::Gzip(decoder, diff) => {
                let mut rest = decoder.into_inner();
                io::copy(&mut rest, &mut io::sink()).map_err(from_io)?;
                let blob = Digest::from_hash(&rest.into_inner().hash.finalize());
                Ok((blob, Digest::from_hash(&diff.finalize())))
            }
        }
    }

    /// Bombs are found by the stream, not by what its headers say of themselves.
    fn check(&mut self, got: usize) -> Result<(), ImageError> {
        self.out += got as u64;
        self.budget.bytes += got as u64;
        let limits = self.budget.limits;
        if self.budget.bytes > limits.unpacked_bytes {
            let detail = "the layers, unpacked".to_owned();
            return Err(ImageError::TooBig { limit: limits.unpacked_bytes, unit: "bytes", detail });
        }
        if let Coding::Gzip(decoder, _) = &self.coding {
            let compressed = decoder.get_ref().get_ref().bytes;
            if self.out > Limits::RATIO_FREE_BYTES.saturating_add(compressed.saturating_mul(limits.ratio)) {
                let detail = format!("{compressed} bytes became more than {} bytes", self.out);
                return Err(ImageError::TooBig { limit: limits.ratio, unit: "bytes per compressed byte", detail });
            }
        }
        Ok(())
    }
}

impl<R: Read> Read for Stream<'_, '_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = match &mut self.coding {
            Coding::Plain(reader) => reader.read(buffer)?,
            Coding::Gzip(decoder, hash) => {
                let got = decoder.read(buffer)?;
                hash.update(&buffer[..got]);
                got
            }
        };
        self.check(got).map_err(io::Error::other)?;
        Ok(got)
    }
}

// --------------------------------------------------------------------------------------------------------- the tree

struct Writer<'a> {
    top: Dir,
    layer: &'a str,
    bytes: u64,
    /// Set at the end, because making entries changes them; at most one per entry.
    dir_times: Vec<(Vec<u8>, TimeSpec)>,
    /// Bytes that they may still take.
    left_for_dirs: usize,
}

/// Parent directory and name of a path in the layer; `None` for its top.
type Place = Option<(Vec<u8>, Vec<u8>)>;

impl Writer<'_> {
    fn refuse(&self, entry: &Entry, reason: impl Into<String>) -> ImageError {
        let entry = String::from_utf8_lossy(&entry.path).into_owned();
        ImageError::Refused { layer: self.layer.to_owned(), entry, reason: reason.into() }
    }

    /// An error of the kernel: a symlink in the way is the archive's fault, the rest is the disk's.
    fn failed(&self, entry: &Entry, operation: &'static str) -> impl FnOnce(io::Error) -> ImageError {
        let refused = self.refuse(entry, "a symlink lies on its way");
        let path = Path::new(OsStr::from_bytes(&entry.path)).to_owned();
        move |source| match source.raw_os_error() {
            Some(code) if code == Errno::ELOOP as i32 || code == Errno::ENOTDIR as i32 => refused,
            _ => match source.downcast::<ImageError>() {
                Ok(ours) => ours,
                Err(source) => ImageError::Io { operation, path, source },
            },
        }
    }

    /// Carries an entry out; answers how many directories its path implied.
    fn write(&mut self, entry: &Entry, content: &mut impl Read) -> Result<u64, ImageError> {
        let Some((parent, name)) = self.place(entry, &entry.path)? else {
            if entry.kind.is_dir() {
                let meta = self.meta(entry)?;
                self.top.set_meta(&meta).map_err(self.failed(entry, "set metadata of"))?;
                self.note_time(Vec::new(), meta.mtime)?;
            }
            return Ok(0);
        };
        let (dir, implied) = self.top.open_or_make(&parent).map_err(self.failed(entry, "make the directory of"))?;
        if name == OPAQUE {
            dir.make_opaque().map_err(self.failed(entry, "mark as opaque the directory of"))?;
        } else if name.starts_with(AUFS) {
            // Nothing to do.
        } else if let Some(gone) = name.strip_prefix(WHITEOUT) {
            self.whiteout(entry, &dir, gone)?;
        } else {
            self.make(entry, &dir, (&parent, &name), content)?;
        }
        Ok(implied)
    }

    fn note_time(&mut self, path: Vec<u8>, mtime: TimeSpec) -> Result<(), ImageError> {
        let takes = size_of::<(Vec<u8>, TimeSpec)>() + path.len();
        self.left_for_dirs = self.left_for_dirs.checked_sub(takes).ok_or_else(|| ImageError::TooBig {
            limit: self.dir_times.len() as u64,
            unit: "directories with paths as long as these",
            detail: format!("layer {}", self.layer),
        })?;
        self.dir_times.push((path, mtime));
        Ok(())
    }

    fn make(
        &mut self,
        entry: &Entry,
        dir: &Dir,
        (parent, name): (&[u8], &[u8]),
        content: &mut impl Read,
    ) -> Result<(), ImageError> {
        let meta = self.meta(entry)?;
        let found = dir.find(name).map_err(self.failed(entry, "look at"))?;
        if found != Found::Nothing && !(found == Found::Dir && entry.kind.is_dir()) {
            dir.remove(name).map_err(self.failed(entry, "replace"))?;
        }
        let failed = self.failed(entry, "unpack");
        if entry.kind.is_dir() {
            let made = if found == Found::Dir { dir.open(name) } else { dir.make_dir(name) };
            let made = made.map_err(failed)?;
            made.set_meta(&meta).map_err(self.failed(entry, "set metadata of"))?;
            if found == Found::Whiteout {
                // Gone below and made anew here: nothing of the one below may show.
                made.make_opaque().map_err(self.failed(entry, "mark as opaque"))?;
            }
            self.note_time(join(parent, name), meta.mtime)?;
        } else if entry.kind.is_file() || entry.kind.is_contiguous() {
            let mut file = dir.make_file(name).map_err(failed)?;
            self.bytes += io::copy(content, &mut file).map_err(self.failed(entry, "write"))?;
            set_file_meta(&file, &meta).map_err(self.failed(entry, "set metadata of"))?;
        } else if entry.kind.is_symlink() {
            if entry.link.is_empty() || entry.link.contains(&0) {
                return Err(self.refuse(entry, "the symlink has no usable target"));
            }
            dir.make_symlink(name, &entry.link).map_err(failed)?;
            let bare = Meta { xattrs: Vec::new(), ..meta };
            dir.set_meta_of(name, &bare, false).map_err(self.failed(entry, "set metadata of"))?;
        } else if entry.kind.is_hard_link() {
            self.hard_link(entry, dir, name)?;
        } else if entry.kind.is_fifo() {
            dir.make_fifo(name).map_err(failed)?;
            dir.set_meta_of(name, &meta, true).map_err(self.failed(entry, "set metadata of"))?;
        } else if entry.kind.is_character_special() || entry.kind.is_block_special() {
            return Err(self.refuse(entry, "devices are not unpacked"));
        } else {
            return Err(self.refuse(entry, format!("entries of type {:?} are not known", entry.kind.as_byte() as char)));
        }
        Ok(())
    }

    fn hard_link(&self, entry: &Entry, dir: &Dir, name: &[u8]) -> Result<(), ImageError> {
        if entry.link.starts_with(b"/") {
            return Err(self.refuse(entry, "the hard link is absolute"));
        }
        let target = self.place(entry, &entry.link)?;
        let (parent, old) = target.ok_or_else(|| self.refuse(entry, "it is a hard link to the root"))?;
        let absent = || self.refuse(entry, "the target of the hard link is not in this layer");
        let from = match self.top.open(&parent) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(absent()),
            from => from.map_err(self.failed(entry, "open the directory of the target of"))?,
        };
        match from.find(&old).map_err(self.failed(entry, "look at the target of"))? {
            Found::Other => dir.make_link(name, &from, &old).map_err(self.failed(entry, "link")),
            Found::Dir => Err(self.refuse(entry, "it is a hard link to a directory")),
            Found::Nothing | Found::Whiteout => Err(absent()),
        }
    }

    /// A whiteout speaks of the layers below. What this layer itself has under the name stays.
    fn whiteout(&self, entry: &Entry, dir: &Dir, gone: &[u8]) -> Result<(), ImageError> {
        if matches!(gone, b"" | b"." | b"..") {
            return Err(self.refuse(entry, "the whiteout names no file"));
        }
        match dir.find(gone).map_err(self.failed(entry, "look at"))? {
            Found::Nothing => dir.make_whiteout(gone).map_err(self.failed(entry, "make the whiteout")),
            Found::Dir => dir
                .open(gone)
                .and_then(|hidden| hidden.make_opaque())
                .map_err(self.failed(entry, "mark as opaque the directory named by")),
            Found::Whiteout | Found::Other => Ok(()),
        }
    }

    fn place(&self, entry: &Entry, path: &[u8]) -> Result<Place, ImageError> {
        let mut parts: Vec<&[u8]> = Vec::new();
        for part in path.split(|b| *b == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(self.refuse(entry, "the path leads out of the root")),
                part if part.contains(&0) => return Err(self.refuse(entry, "the path holds a NUL byte")),
                part => parts.push(part),
            }
        }
        Ok(parts.pop().map(|name| (parts.join(&b'/'), name.to_vec())))
    }

    fn meta<'e>(&self, entry: &'e Entry) -> Result<Meta<'e>, ImageError> {
        let id = |value: u64| u32::try_from(value).ok().filter(|id| *id != u32::MAX);
        let (uid, gid) = id(entry.uid)
            .zip(id(entry.gid))
            .ok_or_else(|| self.refuse(entry, format!("owner {}:{} is out of range", entry.uid, entry.gid)))?;
        let wanted = |name: &[u8]| name == b"security.capability" || name.starts_with(b"user.");
        // Others are the host's matter: labels of another machine, and overlay's own marks, which a layer must not forge.
        let xattrs = entry.xattrs.iter().filter(|(name, _)| wanted(name) && !name.contains(&0));
        Ok(Meta {
            uid,
            gid,
            mode: entry.mode & 0o7777,
            mtime: TimeSpec::new(entry.mtime.0, i64::from(entry.mtime.1)),
            xattrs: xattrs.map(|(name, value)| (OsStr::from_bytes(name), value.as_slice())).collect(),
        })
    }

    fn finish(&self) -> Result<(), ImageError> {
        for (path, mtime) in self.dir_times.iter().rev() {
            match self.top.open(path) {
                Ok(dir) => dir.set_mtime(*mtime).map_err(|source| ImageError::Io {
                    operation: "set the time of",
                    path: Path::new(OsStr::from_bytes(path)).to_owned(),
                    source,
                })?,
                // A later entry of the layer replaced it.
                Err(_) => continue,
            }
        }
        Ok(())
    }
}

fn join(parent: &[u8], name: &[u8]) -> Vec<u8> {
    if parent.is_empty() { name.to_vec() } else { [parent, b"/", name].concat() }
}

/// Decompresses a whole gzip file, bounded like a layer.
pub(super) fn inflate(from: &Path, to: &Path, limits: &Limits) -> Result<(), ImageError> {
    let open = |source| ImageError::Io { operation: "open", path: from.to_owned(), source };
    let make = |source| ImageError::Io { operation: "write", path: to.to_owned(), source };
    let mut budget = Budget::new(limits);
    let mut stream = Stream::open(File::open(from).map_err(open)?, "of the archive", &mut budget)?;
    let mut out = File::create_new(to).map_err(make)?;
    io::copy(&mut stream, &mut out).map_err(from_io)?;
    Ok(())
}

/// Whether a file begins like gzip.
pub(super) fn is_gzip(file: &Path) -> io::Result<bool> {
    let mut head = Vec::new();
    File::open(file)?.take(2).read_to_end(&mut head)?;
    Ok(head == GZIP)
}
