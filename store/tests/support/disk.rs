//! A disk in memory that forgets and tears what was not synced, and fails on demand.

use super::rng::Rng;
use minipod_store::disk::{Disk, DiskError, DiskFile, Result};
use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

const SECTOR: usize = 512;

/// What to do at an operation to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "each test file uses a part")]
pub enum Fault {
    /// The machine stops in the middle of it: nothing works until [`SimDisk::crash`].
    Stop,
    /// No space; of a write, half is done.
    Full,
    /// An I/O error.
    Io,
}

#[derive(Debug, Default)]
struct Inode {
    data: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<(usize, Vec<u8>)>,
}

#[derive(Debug)]
enum NameChange {
    Set(PathBuf, u64),
    Remove(PathBuf),
}

#[derive(Debug, Default)]
struct State {
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    changes: Vec<NameChange>,
    /// Counts the crashes: files opened before one are dead.
    life: u64,
    stopped: bool,
    operations: u64,
    fault_at: Option<(u64, Fault)>,
    lies: bool,
}

/// Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct SimDisk(Arc<Mutex<State>>);

#[derive(Debug)]
struct SimFile {
    disk: SimDisk,
    path: PathBuf,
    inode: u64,
    life: u64,
}

#[allow(dead_code, reason = "each test file uses a part")]
impl SimDisk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("the disk's lock")
    }

    /// Lets the operation after `count` more that change something meet `fault`.
    pub fn fault_after(&self, count: u64, fault: Fault) {
        let mut state = self.lock();
        state.fault_at = Some((state.operations + count, fault));
    }

    pub fn no_fault(&self) {
        self.lock().fault_at = None;
    }

    pub fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// How many changing operations there were.
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// From now on a sync says that it is done and does nothing.
    pub fn lie_about_syncs(&self) {
        self.lock().lies = true;
    }

    /// Power off and on: what was not synced survives by chance, sector by sector.
    pub fn crash(&self, rng: &mut Rng) {
        let mut state = self.lock();
        let state = &mut *state;
        state.life += 1;
        state.stopped = false;
        state.fault_at = None;
        // Journaling file systems keep the order of changes to names: some of the last are lost.
        let keep = rng.index(state.changes.len() + 1);
        for change in state.changes.drain(..).take(keep) {
            apply(&mut state.durable_names, &change);
        }
        state.names = state.durable_names.clone();
        for inode in state.inodes.values_mut() {
            let style = rng.below(4);
            for (offset, bytes) in std::mem::take(&mut inode.pending) {
                let mut at = 0;
                while at < bytes.len() {
                    let sector_end = ((offset + at) / SECTOR + 1) * SECTOR - offset;
                    let end = sector_end.min(bytes.len());
                    let survives = match style {
                        0 => false,
                        1 => true,
                        _ => rng.chance(500),
                    };
                    if survives {
                        put(&mut inode.durable, offset + at, &bytes[at..end]);
                    }
                    at = end;
                }
            }
            inode.data = inode.durable.clone();
        }
    }

    /// The bytes of a file.
    pub fn read(&self, path: &Path) -> Vec<u8> {
        let state = self.lock();
        let inode = state.names.get(path).expect("the file is there");
        state.inodes[inode].data.clone()
    }

    /// Replaces the bytes of a file, as rot or a careless hand does.
    pub fn replace(&self, path: &Path, bytes: Vec<u8>) {
        let mut state = self.lock();
        let inode = *state.names.get(path).expect("the file is there");
        let inode = state.inodes.get_mut(&inode).expect("its inode");
        (inode.data, inode.durable) = (bytes.clone(), bytes);
    }

    /// A disk of its own with the same durable content.
    pub fn copy(&self) -> Self {
        let state = self.lock();
        let inodes = state
            .inodes
            .iter()
            .map(|(id, inode)| {
                (*id, Inode { data: inode.data.clone(), durable: inode.data.clone(), pending: Vec::new() })
            })
            .collect();
        Self(Arc::new(Mutex::new(State {
            inodes,
            next_inode: state.next_inode,
            names: state.names.clone(),
            durable_names: state.names.clone(),
            ..State::default()
        })))
    }

    /// Counts a changing operation and says whether it fails: with the error and whether half of it is done first.
    fn step(
        &self,
        operation: &'static str,
        path: &Path,
    ) -> std::result::Result<MutexGuard<'_, State>, (DiskError, bool)> {
        let mut state = self.lock();
        if state.stopped {
            return Err((stopped(operation, path), false));
        }
        state.operations += 1;
        match state.fault_at {
            Some((at, fault)) if at < state.operations => {
                state.fault_at = None;
                match fault {
                    Fault::Stop => {
                        state.stopped = true;
                        Err((stopped(operation, path), true))
                    }
                    Fault::Full => {
                        Err((DiskError::new(operation, path, io::Error::from(io::ErrorKind::StorageFull)), true))
                    }
                    Fault::Io => Err((DiskError::new(operation, path, io::Error::other("input/output error")), false)),
                }
            }
            _ => Ok(state),
        }
    }
}

fn stopped(operation: &'static str, path: &Path) -> DiskError {
    DiskError::new(operation, path, io::Error::other("the simulated machine has stopped"))
}

fn apply(names: &mut BTreeMap<PathBuf, u64>, change: &NameChange) {
    match change {
        NameChange::Set(path, inode) => drop(names.insert(path.clone(), *inode)),
        NameChange::Remove(path) => drop(names.remove(path)),
    }
}

fn put(data: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if data.len() < offset + bytes.len() {
        data.resize(offset + bytes.len(), 0);
    }
    data[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl State {
    fn change(&mut self, change: NameChange) {
        apply(&mut self.names, &change);
        self.changes.push(change);
    }
}

impl Disk for SimDisk {
    fn create_dir(&self, _dir: &Path) -> Result<()> {
        Ok(())
    }

    fn list(&self, dir: &Path) -> Result<Vec<String>> {
        let state = self.lock();
        if state.stopped {
            return Err(stopped("list", dir));
        }
        let names = state.names.keys().filter(|path| path.parent() == Some(dir));
        Ok(names.filter_map(|path| path.file_name()?.to_str().map(str::to_owned)).collect())
    }

    fn create(&self, path: &Path, len: u64) -> Result<Box<dyn DiskFile>> {
        let mut state = self.step("create", path).map_err(|(error, _)| error)?;
        let inode = state.next_inode;
        state.next_inode += 1;
        let data = vec![0; usize::try_from(len).expect("a length")];
        state.inodes.insert(inode, Inode { durable: data.clone(), data, pending: Vec::new() });
        state.change(NameChange::Set(path.to_owned(), inode));
        Ok(Box::new(SimFile { disk: self.clone(), path: path.to_owned(), inode, life: state.life }))
    }

    fn open(&self, path: &Path) -> Result<Box<dyn DiskFile>> {
        let state = self.lock();
        if state.stopped {
            return Err(stopped("open", path));
        }
        let missing = || DiskError::new("open", path, io::Error::from(io::ErrorKind::NotFound));
        let inode = *state.names.get(path).ok_or_else(missing)?;
        Ok(Box::new(SimFile { disk: self.clone(), path: path.to_owned(), inode, life: state.life }))
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let mut state = self.step("rename", from).map_err(|(error, _)| error)?;
        let missing = || DiskError::new("rename", from, io::Error::from(io::ErrorKind::NotFound));
        let inode = *state.names.get(from).ok_or_else(missing)?;
        state.change(NameChange::Set(to.to_owned(), inode));
        state.change(NameChange::Remove(from.to_owned()));
        Ok(())
    }

    fn remove(&self, path: &Path) -> Result<()> {
        let mut state = self.step("remove", path).map_err(|(error, _)| error)?;
        state.change(NameChange::Remove(path.to_owned()));
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> Result<()> {
        let mut state = self.step("sync directory", dir).map_err(|(error, _)| error)?;
        if state.lies {
            return Ok(());
        }
        let state = &mut *state;
        for change in state.changes.drain(..) {
            apply(&mut state.durable_names, &change);
        }
        Ok(())
    }
}

impl SimFile {
    fn check(&self, state: &State, operation: &'static str) -> Result<()> {
        if state.life == self.life && !state.stopped { Ok(()) } else { Err(stopped(operation, &self.path)) }
    }
}

impl DiskFile for SimFile {
    fn len(&self) -> Result<u64> {
        let state = self.disk.lock();
        self.check(&state, "stat")?;
        Ok(state.inodes[&self.inode].data.len() as u64)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let offset = usize::try_from(offset).expect("an offset");
        let (mut state, error, bytes) = match self.disk.step("write", &self.path) {
            Ok(state) => (state, None, bytes),
            Err((error, true)) => (self.disk.lock(), Some(error), &bytes[..bytes.len() / 2]),
            Err((error, false)) => return Err(error),
        };
        if state.life != self.life {
            return Err(stopped("write", &self.path));
        }
        let inode = state.inodes.get_mut(&self.inode).expect("its inode");
        put(&mut inode.data, offset, bytes);
        inode.pending.push((offset, bytes.to_vec()));
        error.map_or(Ok(()), Err)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let state = self.disk.lock();
        self.check(&state, "read")?;
        let rest =
            state.inodes[&self.inode].data.get(usize::try_from(offset).expect("an offset")..).unwrap_or_default();
        let len = rest.len().min(buffer.len());
        buffer[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn sync(&self) -> Result<()> {
        let mut state = self.disk.step("sync", &self.path).map_err(|(error, _)| error)?;
        if state.life != self.life {
            return Err(stopped("sync", &self.path));
        }
        if state.lies {
            return Ok(());
        }
        let inode = state.inodes.get_mut(&self.inode).expect("its inode");
        for (offset, bytes) in std::mem::take(&mut inode.pending) {
            put(&mut inode.durable, offset, &bytes);
        }
        Ok(())
    }
}
