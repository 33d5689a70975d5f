//! What tests plant in a real process, by its environment: a disk that loses what was not synced, and bugs they must find.
//! Only with the feature `planted-bugs`, which no build that is used has.

use crate::disk::{Disk, DiskError, DiskFile, RealDisk, Result};
use crate::replica::core::Planted;
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The disk: `MINIPOD_STORE_DISK=volatile` for one that keeps unsynced bytes in this process, so that killing it is a power cut.
#[must_use]
pub fn disk() -> Arc<dyn Disk> {
    match std::env::var("MINIPOD_STORE_DISK").as_deref() {
        Ok("volatile") => Arc::new(Volatile::default()),
        _ => Arc::new(RealDisk),
    }
}

/// The bug that `MINIPOD_STORE_PLANTED` names: `stale-read` or `ack-before-sync`.
#[must_use]
pub fn bug() -> Option<Planted> {
    match std::env::var("MINIPOD_STORE_PLANTED").as_deref() {
        Ok("stale-read") => Some(Planted::StaleRead),
        Ok("ack-before-sync") => Some(Planted::AckBeforeSync),
        _ => None,
    }
}

/// Writes to one file since its last sync, in their order.
type Pending = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

/// Files whose bytes reach the kernel at a sync and not before. Names and lengths reach it at once: their loss is the simulation's.
#[derive(Debug, Default)]
struct Volatile(Mutex<BTreeMap<PathBuf, Pending>>);

#[derive(Debug)]
struct VolatileFile {
    file: Box<dyn DiskFile>,
    pending: Pending,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk for Volatile {
    fn create_dir(&self, dir: &Path) -> Result<()> {
        RealDisk.create_dir(dir)
    }

    fn list(&self, dir: &Path) -> Result<Vec<String>> {
        RealDisk.list(dir)
    }

    fn create(&self, path: &Path, len: u64) -> Result<Box<dyn DiskFile>> {
        let file = RealDisk.create(path, len)?;
        let pending = Pending::default();
        lock(&self.0).insert(path.to_owned(), Arc::clone(&pending));
        Ok(Box::new(VolatileFile { file, pending }))
    }

    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        let file = RealDisk.open(path)?;
        let pending = Arc::clone(lock(&self.0).entry(path.to_owned()).or_default());
        Ok(Box::new(VolatileFile { file, pending }))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        RealDisk.rename(from, to)?;
        let mut files = lock(&self.0);
        if let Some(pending) = files.remove(from) {
            files.insert(to.to_owned(), pending);
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<()> {
        lock(&self.0).remove(path);
        RealDisk.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        RealDisk.sync_dir(dir)
    }
}

impl DiskFile for VolatileFile {
    fn len(&self) -> Result<u64> {
        let ends = lock(&self.pending).iter().map(|(offset, bytes)| offset + bytes.len() as u64).max();
        Ok(self.file.len()?.max(ends.unwrap_or(0)))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        lock(&self.pending).push((offset, bytes.to_owned()));
        Ok(())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let mut read = self.file.read_at(offset, buffer)?;
        for (start, bytes) in lock(&self.pending).iter() {
            let (from, to) = ((*start).max(offset), (start + bytes.len() as u64).min(offset + buffer.len() as u64));
            if from >= to {
                continue;
            }
            let place = |at: u64, base: u64| {
                usize::try_from(at - base)
                    .map_err(|_| DiskError::new("read", Path::new(""), io::Error::from(io::ErrorKind::FileTooLarge)))
            };
            let (first, end) = (place(from, offset)?, place(to, offset)?);
            buffer[first..end].copy_from_slice(&bytes[place(from, *start)?..place(to, *start)?]);
            read = read.max(end);
        }
        Ok(read)
    }

    fn sync(&self) -> Result<()> {
        let mut pending = lock(&self.pending);
        for (offset, bytes) in pending.iter() {
            self.file.write_at(*offset, bytes)?;
        }
        pending.clear();
        self.file.sync()
    }
}
