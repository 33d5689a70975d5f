//! A disk that reads files and keeps all that is written in memory: for looking at a data directory without touching it.

use crate::disk::{Disk, DiskError, DiskFile, RealDisk, Result, read_all};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A file's content once it was opened or made.
type Content = Arc<Mutex<Vec<u8>>>;

#[derive(Debug, Default)]
struct Layer {
    written: BTreeMap<PathBuf, Content>,
    removed: BTreeSet<PathBuf>,
}

/// The disk. Clones share what was written.
#[derive(Debug, Clone, Default)]
pub struct Overlay(Arc<Mutex<Layer>>);

#[derive(Debug)]
struct OverlayFile(Content);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Disk for Overlay {
    /// Nothing is made: a directory that is not there has no files.
    fn create_dir(&self, _dir: &Path) -> Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> Result<Vec<String>> {
        let layer = lock(&self.0);
        let mut names: BTreeSet<String> =
            RealDisk.list(dir)?.into_iter().filter(|name| !layer.removed.contains(&dir.join(name))).collect();
        let written = layer.written.keys().filter(|path| path.parent() == Some(dir));
        names.extend(written.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())));
        Ok(names.into_iter().collect())
    }

    fn create(&self, path: &Path, len: u64) -> Result<Box<dyn DiskFile>> {
        let len = usize::try_from(len).map_err(|_| too_large(path))?;
        let content = Content::new(Mutex::new(vec![0; len]));
        let mut layer = lock(&self.0);
        layer.removed.remove(path);
        layer.written.insert(path.to_owned(), Arc::clone(&content));
        Ok(Box::new(OverlayFile(content)))
    }

    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        let mut layer = lock(&self.0);
        if let Some(content) = layer.written.get(path) {
            return Ok(Box::new(OverlayFile(Arc::clone(content))));
        }
        if layer.removed.contains(path) {
            return Err(DiskError::new("open", path, io::Error::from(io::ErrorKind::NotFound)));
        }
        let content = Content::new(Mutex::new(read_all(&*RealDisk.open(path)?, path)?));
        layer.written.insert(path.to_owned(), Arc::clone(&content));
        Ok(Box::new(OverlayFile(content)))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        self.open(from)?;
        let mut layer = lock(&self.0);
        if let Some(content) = layer.written.remove(from) {
            layer.removed.insert(from.to_owned());
            layer.removed.remove(to);
            layer.written.insert(to.to_owned(), content);
        }
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<()> {
        let mut layer = lock(&self.0);
        layer.written.remove(path);
        layer.removed.insert(path.to_owned());
        Ok(())
    }

    fn sync_dir(&self, _dir: &Path) -> Result<()> {
        Ok(())
    }
}

fn too_large(path: &Path) -> DiskError {
    DiskError::new("write", path, io::Error::from(io::ErrorKind::FileTooLarge))
}

impl DiskFile for OverlayFile {
    fn len(&self) -> Result<u64> {
        Ok(lock(&self.0).len() as u64)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let offset = usize::try_from(offset).map_err(|_| too_large(Path::new("")))?;
        let mut content = lock(&self.0);
        if content.len() < offset + bytes.len() {
            content.resize(offset + bytes.len(), 0);
        }
        if let Some(place) = content.get_mut(offset..offset + bytes.len()) {
            place.copy_from_slice(bytes);
        }
        Ok(())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let content = lock(&self.0);
        let rest = usize::try_from(offset).ok().and_then(|offset| content.get(offset..)).unwrap_or_default();
        let read = rest.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..read), rest.get(..read)) {
            to.copy_from_slice(from);
        }
        Ok(read)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }
}
