//! The few file operations that the log and the snapshots need, behind a trait, so that tests can lose, tear and refuse them.
//!
//! The contract is the kernel's, not more: what was written is durable after [`DiskFile::sync`] of the file, and a name is durable
//! after [`Disk::sync_dir`] of its directory. Between the two anything may survive a crash, sector by sector.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// An operation on a file or directory that failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}: {source}", path.display())]
pub struct DiskError {
    /// What was tried, such as `write` or `sync`.
    pub operation: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

impl DiskError {
    /// Puts the operation and the path to an error of the system.
    pub fn new(operation: &'static str, path: &Path, source: io::Error) -> Self {
        Self { operation, path: path.to_owned(), source }
    }

    /// Whether the disk is full or the quota reached.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// The result of an operation on the disk.
pub type Result<T> = std::result::Result<T, DiskError>;

/// A file that is written at offsets.
pub trait DiskFile: Send + Debug {
    /// The length, bytes.
    ///
    /// # Errors
    /// When the system fails.
    fn len(&self) -> Result<u64>;

    /// Whether the file has no bytes.
    ///
    /// # Errors
    /// When the system fails.
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Writes all of `bytes` at `offset`. Not durable before [`Self::sync`].
    ///
    /// # Errors
    /// When the system fails; part of the bytes may be written then.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Reads at `offset` until `buffer` is full or the file ends; returns how many bytes were read.
    ///
    /// # Errors
    /// When the system fails.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize>;

    /// Makes what was written durable (fdatasync). After an error nothing is known about what was written before: a second call
    /// may report success for pages that the kernel has dropped, so the caller has to stop.
    ///
    /// # Errors
    /// When the system fails.
    fn sync(&self) -> Result<()>;
}

/// A file system, or a simulated one.
pub trait Disk: Send + Sync + Debug {
    /// Makes a directory and its parents; it may exist.
    ///
    /// # Errors
    /// When the system fails.
    fn create_dir(&self, dir: &Path) -> Result<()>;

    /// The names of the files in a directory, sorted.
    ///
    /// # Errors
    /// When the system fails.
    fn list(&self, dir: &Path) -> Result<Vec<String>>;

    /// Makes a file of `len` zero bytes whose blocks are there already, in place of one that may exist.
    ///
    /// # Errors
    /// When the system fails.
    fn create(&self, path: &Path, len: u64) -> Result<Box<dyn DiskFile>>;

    /// Opens a file for reading and writing.
    ///
    /// # Errors
    /// When the system fails.
    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>>;

    /// Gives a file another name, in place of one that may exist.
    ///
    /// # Errors
    /// When the system fails.
    fn rename(&self, from: &Path, to: &Path) -> Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// When the system fails.
    fn remove(&self, path: &Path) -> Result<()>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// When the system fails.
    fn sync_dir(&self, dir: &Path) -> Result<()>;
}

/// All bytes of a file.
///
/// # Errors
/// When the system fails.
pub fn read_all(file: &dyn DiskFile, path: &Path) -> Result<Vec<u8>> {
    let len = usize::try_from(file.len()?)
        .map_err(|_| DiskError::new("read", path, io::Error::from(io::ErrorKind::FileTooLarge)))?;
    let mut bytes = vec![0; len];
    let read = file.read_at(0, &mut bytes)?;
    bytes.truncate(read);
    Ok(bytes)
}

/// The file system of this machine.
#[derive(Debug, Default, Clone, Copy)]
pub struct RealDisk;

#[derive(Debug)]
struct RealFile {
    file: File,
    path: PathBuf,
}

/// Zeros are written in pieces of this many bytes.
const ZEROS: usize = 1 << 20;

impl RealDisk {
    /// Writes zeros: blocks that were only allocated would have their extents converted, and the journal written, by the
    /// fdatasync of every batch that reaches them for the first time.
    fn fill(file: &File, len: u64) -> io::Result<()> {
        let zeros = vec![0; ZEROS];
        let mut offset = 0;
        while offset < len {
            let piece = usize::try_from(len - offset).unwrap_or(ZEROS).min(ZEROS);
            file.write_all_at(&zeros[..piece], offset)?;
            offset += piece as u64;
        }
        Ok(())
    }
}

impl Disk for RealDisk {
    fn create_dir(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(|source| DiskError::new("create directory", dir, source))
    }

    fn list(&self, dir: &Path) -> Result<Vec<String>> {
        let failed = |source| DiskError::new("list", dir, source);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(failed)? {
            // A name that is not UTF-8 is none of ours.
            if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn create(&self, path: &Path, len: u64) -> Result<Box<dyn DiskFile>> {
        let failed = |source| DiskError::new("create", path, source);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).map_err(failed)?;
        if len > 0 {
            Self::fill(&file, len).map_err(failed)?;
            // The length and the blocks are metadata, which fdatasync of the batches need not write once it is durable here.
            file.sync_all().map_err(failed)?;
        }
        Ok(Box::new(RealFile { file, path: path.to_owned() }))
    }

    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| DiskError::new("open", path, source))?;
        Ok(Box::new(RealFile { file, path: path.to_owned() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        std::fs::rename(from, to).map_err(|source| DiskError::new("rename", from, source))
    }

    fn remove(&self, path: &Path) -> Result<()> {
        std::fs::remove_file(path).map_err(|source| DiskError::new("remove", path, source))
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(|source| DiskError::new("sync directory", dir, source))
    }
}

impl DiskFile for RealFile {
    fn len(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(|source| DiskError::new("stat", &self.path, source))?.len())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).map_err(|source| DiskError::new("write", &self.path, source))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(DiskError::new("read", &self.path, source)),
            }
        }
        Ok(done)
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|source| DiskError::new("sync", &self.path, source))
    }
}
