//! Snapshots on disk: the machine's state in checked chunks, and with it what the replica itself must know as of the same entry.
//!
//! ```text
//! file   "MPODSNAP" version:u32 meta_len:u32 meta crc:u32 · chunk* · end
//! chunk  length:u32 (not 0) crc:u32 data            the CRC covers the chunk's number and the data
//! end    0:u32 crc:u32 chunks:u64 bytes:u64         the CRC covers the two numbers and the CRC of the head
//! ```
//!
//! A file gets its name only when it is whole and durable, so a crash leaves none that is half written.

use crate::disk::{Disk, DiskError, DiskFile};
use crate::records::SnapshotMeta;
use crate::wal::Marker;
use bytes::Bytes;
use prost::Message as _;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The version of the format that this code writes and reads.
pub const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"MPODSNAP";
/// Chunks are at most 1 MiB where they are made; a longer one is damage.
const MAX_CHUNK: usize = 16 << 20;
/// A head holds members and sessions; a longer one is damage.
const MAX_META: usize = 64 << 20;
/// Writes are gathered to this many bytes.
const WRITE: usize = 1 << 20;

/// A snapshot that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The file is not what was written.
    #[error("snapshot {} is damaged at offset {offset}: {what}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// Where in it, bytes.
        offset: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// The file was written by a program that this one does not know.
    #[error("snapshot {} has format version {found}, and this program reads version {VERSION} only: use the program that wrote it", file.display())]
    Version {
        /// The file.
        file: PathBuf,
        /// Its version.
        found: u32,
    },
    /// Another cluster's state.
    #[error("snapshot {} belongs to cluster {found:x}, and this is cluster {expected:x}", file.display())]
    Cluster {
        /// The file.
        file: PathBuf,
        /// Its cluster.
        found: u64,
        /// Ours.
        expected: u64,
    },
}

/// The snapshots in a directory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Snapshots {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    cluster_id: u64,
}

/// The name of a snapshot's file.
#[must_use]
pub fn file_name(index: u64, term: u64) -> String {
    format!("{index:016x}-{term:016x}.snap")
}

/// The index and term in a snapshot's name.
#[must_use]
pub fn parse_name(name: &str) -> Option<(u64, u64)> {
    let (index, term) = name.strip_suffix(".snap")?.split_once('-')?;
    let number = |digits: &str| (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok()).flatten();
    Some((number(index)?, number(term)?))
}

impl Snapshots {
    /// The snapshots of a cluster in `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn new(disk: Arc<dyn Disk>, dir: &Path, cluster_id: u64) -> Result<Self, SnapshotError> {
        disk.create_dir(dir)?;
        Ok(Self { disk, dir: dir.to_owned(), cluster_id })
    }

    /// Writes a snapshot, durably; returns the bytes of its file.
    ///
    /// # Errors
    /// When the disk fails; then there is no such snapshot.
    pub fn write(&self, meta: &SnapshotMeta, chunks: &mut dyn Iterator<Item = Bytes>) -> Result<u64, SnapshotError> {
        let name = file_name(meta.index, meta.term);
        let temporary = self.dir.join(format!("{name}.tmp"));
        let written = self.write_file(&temporary, meta, chunks).and_then(|bytes| {
            self.name_it(&temporary, &self.dir.join(&name))?;
            Ok(bytes)
        });
        if written.is_err() {
            // The space is worth having back; the first error is the one that counts.
            let _ = self.disk.remove(&temporary);
        }
        written
    }

    fn name_it(&self, temporary: &Path, path: &Path) -> Result<(), SnapshotError> {
        self.disk.rename(temporary, path)?;
        self.disk.sync_dir(&self.dir)?;
        Ok(())
    }

    fn write_file(
        &self,
        path: &Path,
        meta: &SnapshotMeta,
        chunks: &mut dyn Iterator<Item = Bytes>,
    ) -> Result<u64, SnapshotError> {
        let mut out = Appender { file: self.disk.create(path, 0)?, buffer: Vec::with_capacity(WRITE), offset: 0 };
        let head = encode_head(meta);
        let head_crc = crc32fast::hash(&head);
        out.put(&head)?;
        out.put(&head_crc.to_le_bytes())?;
        let (mut count, mut bytes) = (0_u64, 0_u64);
        for chunk in chunks {
            if chunk.is_empty() {
                continue;
            }
            out.put(&u32::try_from(chunk.len()).unwrap_or(u32::MAX).to_le_bytes())?;
            out.put(&chunk_crc(count, &chunk).to_le_bytes())?;
            out.put(&chunk)?;
            count += 1;
            bytes += chunk.len() as u64;
        }
        out.put(&0_u32.to_le_bytes())?;
        out.put(&end_crc(count, bytes, head_crc).to_le_bytes())?;
        out.put(&count.to_le_bytes())?;
        out.put(&bytes.to_le_bytes())?;
        out.finish()
    }

    /// Opens a snapshot whose head is checked; the chunks are checked as they are read.
    ///
    /// # Errors
    /// When the disk fails, or the head is not that of this snapshot and cluster.
    pub fn open(&self, index: u64, term: u64) -> Result<Reader, SnapshotError> {
        let reader = self.open_path(&self.dir.join(file_name(index, term)))?;
        if (reader.meta.index, reader.meta.term) != (index, term) {
            return Err(reader.damaged("the head is that of another snapshot"));
        }
        Ok(reader)
    }

    fn open_path(&self, path: &Path) -> Result<Reader, SnapshotError> {
        let reader = Reader::open(&*self.disk, path)?;
        if reader.meta.cluster_id != self.cluster_id {
            return Err(SnapshotError::Cluster {
                file: path.to_owned(),
                found: reader.meta.cluster_id,
                expected: self.cluster_id,
            });
        }
        Ok(reader)
    }

    /// Reads a snapshot to its end.
    ///
    /// # Errors
    /// As [`Self::open`], and when a chunk is damaged.
    pub fn verify(&self, index: u64, term: u64) -> Result<SnapshotMeta, SnapshotError> {
        self.open(index, term)?.verify()
    }

    /// The file of a snapshot for sending it elsewhere as it is, and its length.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn raw(&self, index: u64, term: u64) -> Result<(Box<dyn DiskFile>, u64), SnapshotError> {
        let file = self.disk.open(&self.dir.join(file_name(index, term)))?;
        let len = file.len()?;
        Ok((file, len))
    }

    /// Begins to receive a snapshot's file from elsewhere. `tag` keeps two senders apart.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn receive(&self, tag: u64) -> Result<Incoming, SnapshotError> {
        let path = self.dir.join(format!("incoming-{tag:016x}.tmp"));
        let file = self.disk.create(&path, 0)?;
        let out = Appender { file, buffer: Vec::with_capacity(WRITE), offset: 0 };
        Ok(Incoming { snapshots: self.clone(), path, out })
    }

    /// The snapshots that are there, oldest first.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn list(&self) -> Result<Vec<(u64, u64)>, SnapshotError> {
        Ok(self.disk.list(&self.dir)?.iter().filter_map(|name| parse_name(name)).collect())
    }

    /// Removes all snapshots but those in `keep` and those after them, which may just have arrived.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn remove_old(&self, keep: &[Marker]) -> Result<(), SnapshotError> {
        let newest = keep.iter().map(|marker| marker.index).max().unwrap_or(0);
        for (index, term) in self.list()? {
            if index <= newest && !keep.iter().any(|marker| (marker.index, marker.term) == (index, term)) {
                self.disk.remove(&self.dir.join(file_name(index, term)))?;
            }
        }
        Ok(())
    }

    /// Removes what a crash left half done. Only at a start, when nothing is being written.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn remove_temporary(&self) -> Result<(), SnapshotError> {
        for name in self.disk.list(&self.dir)? {
            if name.ends_with(".tmp") {
                self.disk.remove(&self.dir.join(name))?;
            }
        }
        Ok(())
    }
}

fn encode_head(meta: &SnapshotMeta) -> Vec<u8> {
    let meta = meta.encode_to_vec();
    let mut head = Vec::with_capacity(16 + meta.len());
    head.extend_from_slice(&MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&u32::try_from(meta.len()).unwrap_or(u32::MAX).to_le_bytes());
    head.extend_from_slice(&meta);
    head
}

fn chunk_crc(number: u64, data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.update(data);
    hasher.finalize()
}

fn end_crc(count: u64, bytes: u64, head_crc: u32) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&count.to_le_bytes());
    hasher.update(&bytes.to_le_bytes());
    hasher.update(&head_crc.to_le_bytes());
    hasher.finalize()
}

/// Writes behind the end in large pieces.
#[derive(Debug)]
struct Appender {
    file: Box<dyn DiskFile>,
    buffer: Vec<u8>,
    offset: u64,
}

impl Appender {
    fn put(&mut self, bytes: &[u8]) -> Result<(), DiskError> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= WRITE { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        self.file.write_at(self.offset, &self.buffer)?;
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<u64, SnapshotError> {
        self.flush()?;
        self.file.sync()?;
        Ok(self.offset)
    }
}

/// A snapshot that is arriving.
#[derive(Debug)]
pub struct Incoming {
    snapshots: Snapshots,
    path: PathBuf,
    out: Appender,
}

impl Incoming {
    /// Takes the next bytes of the file.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn put(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        Ok(self.out.put(bytes)?)
    }

    /// Gives up: the file is removed.
    pub fn discard(self) {
        if let Err(error) = self.snapshots.disk.remove(&self.path) {
            tracing::debug!(%error, "remove a snapshot that did not arrive whole");
        }
    }

    /// Checks the whole file, and makes it a snapshot of this member, durably.
    ///
    /// # Errors
    /// When the disk fails or the file is damaged or another cluster's; it is removed then.
    pub fn finish(self) -> Result<SnapshotMeta, SnapshotError> {
        let Self { snapshots, path, out } = self;
        let done = out.finish().and_then(|_| {
            let meta = snapshots.open_path(&path)?.verify()?;
            snapshots.name_it(&path, &snapshots.dir.join(file_name(meta.index, meta.term)))?;
            Ok(meta)
        });
        if done.is_err() {
            let _ = snapshots.disk.remove(&path);
        }
        done
    }
}

/// Reads a snapshot's chunks; as an iterator it ends after the last one or after the first error.
#[derive(Debug)]
pub struct Reader {
    file: Box<dyn DiskFile>,
    path: PathBuf,
    meta: SnapshotMeta,
    head_crc: u32,
    offset: u64,
    count: u64,
    bytes: u64,
    ended: bool,
}

impl Reader {
    /// Opens a snapshot file of any cluster.
    ///
    /// # Errors
    /// When the disk fails or the head is damaged or of another version.
    pub fn open(disk: &dyn Disk, path: &Path) -> Result<Self, SnapshotError> {
        let file = disk.open(path)?;
        let mut reader = Self {
            file,
            path: path.to_owned(),
            meta: SnapshotMeta::default(),
            head_crc: 0,
            offset: 0,
            count: 0,
            bytes: 0,
            ended: false,
        };
        let fixed = reader.bytes(16)?;
        let version = number(&fixed, 8);
        if !fixed.starts_with(&MAGIC) {
            return Err(reader.damaged("it does not begin as a snapshot does"));
        }
        if version != VERSION {
            return Err(SnapshotError::Version { file: path.to_owned(), found: version });
        }
        let len = usize::try_from(number(&fixed, 12)).unwrap_or(usize::MAX);
        if len > MAX_META {
            return Err(reader.damaged("the head is too long"));
        }
        let meta = reader.bytes(len)?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&fixed);
        hasher.update(&meta);
        reader.head_crc = hasher.finalize();
        let crc = reader.bytes(4)?;
        if number(&crc, 0) != reader.head_crc {
            return Err(reader.damaged("the head's checksum is wrong"));
        }
        reader.meta =
            SnapshotMeta::decode(meta.as_slice()).map_err(|_| reader.damaged("the head cannot be decoded"))?;
        Ok(reader)
    }

    /// The snapshot's head.
    #[must_use]
    pub const fn meta(&self) -> &SnapshotMeta {
        &self.meta
    }

    fn damaged(&self, what: &'static str) -> SnapshotError {
        SnapshotError::Damaged { file: self.path.clone(), offset: self.offset, what }
    }

    fn bytes(&mut self, len: usize) -> Result<Vec<u8>, SnapshotError> {
        let mut bytes = vec![0; len];
        if self.file.read_at(self.offset, &mut bytes)? < len {
            return Err(self.damaged("the file ends here"));
        }
        self.offset += len as u64;
        Ok(bytes)
    }

    fn next_chunk(&mut self) -> Result<Option<Bytes>, SnapshotError> {
        let frame = self.bytes(8)?;
        let (len, crc) = (usize::try_from(number(&frame, 0)).unwrap_or(usize::MAX), number(&frame, 4));
        if len == 0 {
            let mut numbers = self.count.to_le_bytes().to_vec();
            numbers.extend_from_slice(&self.bytes.to_le_bytes());
            if self.bytes(16)? != numbers || crc != end_crc(self.count, self.bytes, self.head_crc) {
                return Err(self.damaged("the end does not fit what was before it"));
            }
            return Ok(None);
        }
        if len > MAX_CHUNK {
            return Err(self.damaged("a chunk is too long"));
        }
        let data = self.bytes(len)?;
        if crc != chunk_crc(self.count, &data) {
            return Err(self.damaged("a chunk's checksum is wrong"));
        }
        self.count += 1;
        self.bytes += data.len() as u64;
        Ok(Some(Bytes::from(data)))
    }

    /// Reads all chunks and returns the head.
    ///
    /// # Errors
    /// When the disk fails or a chunk is damaged.
    pub fn verify(mut self) -> Result<SnapshotMeta, SnapshotError> {
        while self.next_chunk()?.is_some() {}
        Ok(self.meta)
    }
}

fn number(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

impl Iterator for Reader {
    type Item = io::Result<Bytes>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let chunk = self.next_chunk().map_err(io::Error::other).transpose();
        self.ended = !matches!(chunk, Some(Ok(_)));
        chunk
    }
}
