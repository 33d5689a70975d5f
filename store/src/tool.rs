//! Looking at a data directory or a saved snapshot, and making the one from the other. Nothing here runs beside a store that is using the
//! directory.

use crate::disk::{Disk, DiskError, RealDisk};
use crate::machine::{Machine, RestoreError};
use crate::mvcc::bolt::{self, ImportError};
use crate::overlay::Overlay;
use crate::replica::core::{Boot, Core, Outbox, ReplicaError, Reply, Settings, begin, snapshot_dir, wal_dir};
use crate::service::{Cluster, StoreError, boot_for, lock, random};
use crate::snapshot::{Reader, SnapshotError, file_name, parse_name};
use crate::state::StateMachine;
use crate::wal::{self, Dumped, Identity, Wal, WalError};
use raft::eraftpb::{EntryType, Message};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a directory or a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The replica's state.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// The configuration.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There is no store.
    #[error("{} has no store: there is no log in {}", dir.display(), wal_dir(dir).display())]
    Empty {
        /// The directory.
        dir: PathBuf,
    },
    /// There is one already.
    #[error("{} has a store already: name an empty directory", dir.display())]
    NotEmpty {
        /// The directory.
        dir: PathBuf,
    },
    /// The saved snapshot cannot be read.
    #[error("read {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The saved snapshot is damaged or none.
    #[error("{} is no snapshot of etcd or of this store", file.display())]
    Saved {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ImportError,
    },
    /// The two snapshots of a directory, each with the log after it, come to different states.
    #[error(
        "{}: snapshot {} and the log after it come to revision {} with hash {}, snapshot {} to revision {} with hash {}: the directory \
         contradicts itself; restore a saved snapshot, or, in a cluster, remove this member, empty its data directory and join it again",
        dir.display(), older.index, older.revision, older.hash, newer.index, newer.revision, newer.hash
    )]
    Contradicts {
        /// The directory.
        dir: PathBuf,
        /// What the older snapshot comes to.
        older: Came,
        /// What the newer one comes to.
        newer: Came,
    },
    /// The machine does not take it.
    #[error("restore {}", file.display())]
    Restore {
        /// The file.
        file: PathBuf,
        /// What the machine says.
        #[source]
        source: RestoreError,
    },
}

/// What a snapshot and the log after it come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Came {
    /// The snapshot's index.
    pub index: u64,
    /// The revision.
    pub revision: i64,
    /// The hash at it.
    pub hash: u32,
}

impl From<WalError> for ToolError {
    fn from(error: WalError) -> Self {
        Self::Replica(error.into())
    }
}

impl From<SnapshotError> for ToolError {
    fn from(error: SnapshotError) -> Self {
        Self::Replica(error.into())
    }
}

impl From<DiskError> for ToolError {
    fn from(error: DiskError) -> Self {
        Self::Replica(error.into())
    }
}

/// What a directory holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Whose it is.
    pub identity: Identity,
    /// Records in the log.
    pub records: u64,
    /// Snapshots, all of them whole.
    pub snapshots: Vec<(u64, u64)>,
    /// The last entry that is known to be committed, and is applied here.
    pub applied: u64,
    /// The last entry of the log.
    pub last: u64,
    /// Raft's term.
    pub term: u64,
    /// The store's revision.
    pub revision: i64,
    /// The oldest revision that can be read; −1 when nothing was compacted.
    pub compacted: i64,
    /// Keys that are there at the revision.
    pub keys: usize,
    /// The hash of all keys and their history, as `etcdctl endpoint hashkv` gives it.
    pub hash: u32,
}

/// What a saved snapshot holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedReport {
    /// Whether it is a file of a data directory's `snap`, and not etcd's form.
    pub is_own: bool,
    /// Whether its content is covered by a checksum: a copy of an etcd's database is not.
    pub is_checked: bool,
    /// The file's length.
    pub bytes: u64,
    /// The store's revision.
    pub revision: i64,
    /// The oldest revision that can be read; −1 when nothing was compacted.
    pub compacted: i64,
    /// Keys that are there at the revision.
    pub keys: usize,
    /// The hash of all keys and their history, as `etcdctl endpoint hashkv` gives it for this store (an etcd hashes otherwise).
    pub hash: u32,
}

impl std::fmt::Display for Report {
    /// One `name value` a line.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "cluster {:x}\nmember {:x}\nrecords {}",
            self.identity.cluster_id, self.identity.member_id, self.records
        )?;
        for (index, term) in &self.snapshots {
            writeln!(f, "snapshot {index} term {term}")?;
        }
        writeln!(f, "last_entry {}\napplied {}\nterm {}", self.last, self.applied, self.term)?;
        write!(f, "revision {}\ncompacted {}\nkeys {}\nhash {}", self.revision, self.compacted, self.keys, self.hash)
    }
}

impl std::fmt::Display for SavedReport {
    /// One `name value` a line.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let form = if self.is_own { "minipod" } else { "etcd" };
        let checked = if self.is_checked { "yes" } else { "no" };
        writeln!(f, "form {form}\nchecksum {checked}\nbytes {}", self.bytes)?;
        write!(f, "revision {}\ncompacted {}\nkeys {}\nhash {}", self.revision, self.compacted, self.keys, self.hash)
    }
}

struct Nobody;

impl Outbox<()> for Nobody {
    fn send(&mut self, _messages: Vec<Message>) {}
    fn answer(&mut self, _waiter: (), _reply: Reply) {}
}

/// Reads the whole log and all snapshots, restores the state in memory and hashes it, once from each snapshot that a start may
/// begin with: all must come to the same. Changes nothing.
///
/// # Errors
/// What is damaged, and where; or which snapshots contradict each other.
pub fn verify(data_dir: &Path) -> Result<Report, ToolError> {
    let overlay = Overlay::default();
    let disk: Arc<dyn Disk> = Arc::new(overlay);
    if !data_dir.is_dir() || !wal_dir(data_dir).is_dir() || !Wal::begun(&*disk, &wal_dir(data_dir))? {
        return Err(ToolError::Empty { dir: data_dir.to_owned() });
    }
    // A copy that nobody has ever served from has no lock, and gets none.
    let _lock = data_dir.join("lock").exists().then(|| lock(data_dir)).transpose()?;
    let mut records = 0;
    let identity = wal::dump(&*disk, &wal_dir(data_dir), &mut |_| records += 1)?;
    let identity = identity.ok_or_else(|| ToolError::Empty { dir: data_dir.to_owned() })?;
    let mut snapshots = Vec::new();
    let dir = snapshot_dir(data_dir);
    for name in disk.list(&dir)? {
        if let Some(place) = parse_name(&name) {
            Reader::open(&*disk, &dir.join(&name))?.verify()?;
            snapshots.push(place);
        }
    }
    let newest = restore_in_memory(&disk, data_dir, identity)?;
    // The older snapshot is kept for the day on which the newer one is damaged: with the log after it, it must come to the same.
    let is_there = |index: &&u64| snapshots.iter().any(|(there, _)| there == *index);
    let older = newest.starts.iter().rev().filter(is_there).find(|index| **index < newest.from);
    let newer = snapshots.iter().filter(|(index, _)| older.is_some_and(|older| older < index));
    let newer: Vec<PathBuf> = newer.map(|(index, term)| dir.join(file_name(*index, *term))).collect();
    if older.is_some() {
        // Gone from the overlay only.
        newer.iter().try_for_each(|file| disk.remove(file))?;
        let older = restore_in_memory(&disk, data_dir, identity)?;
        if (older.revision, older.hash) != (newest.revision, newest.hash) {
            let came = |of: &Restored| Came { index: of.from, revision: of.revision, hash: of.hash };
            return Err(ToolError::Contradicts { dir: data_dir.to_owned(), older: came(&older), newer: came(&newest) });
        }
    }
    let Restored { from: _, starts: _, applied, last, term, revision, compacted, keys, hash } = newest;
    Ok(Report { identity, records, snapshots, applied, last, term, revision, compacted, keys, hash })
}

/// What a start would come to.
struct Restored {
    /// The index of the snapshot that it began with.
    from: u64,
    /// The indexes of the snapshots that it could have begun with, oldest first.
    starts: Vec<u64>,
    applied: u64,
    last: u64,
    term: u64,
    revision: i64,
    compacted: i64,
    keys: usize,
    hash: u32,
}

fn restore_in_memory(disk: &Arc<dyn Disk>, data_dir: &Path, identity: Identity) -> Result<Restored, ToolError> {
    let machine = StateMachine::new();
    let shared = machine.shared();
    let mut core = Core::<_, ()>::open(disk, data_dir, Settings::new(identity), &Boot::Join, machine)?;
    let (from, starts) = (core.applied(), core.snapshot_starts());
    core.advance(&mut Nobody)?;
    let store = shared.read();
    let (hash, revision) = store.hash(0).unwrap_or((0, store.revision()));
    Ok(Restored {
        from,
        starts,
        applied: core.applied(),
        last: core.raft().raft_log.last_index(),
        term: core.raft().term,
        revision,
        compacted: store.compacted(),
        keys: store.keys(),
        hash,
    })
}

/// Reads a saved snapshot as a restore would, and tells what it holds. Changes nothing.
///
/// # Errors
/// What is damaged, and where.
pub fn verify_saved(file: &Path) -> Result<SavedReport, ToolError> {
    let failed = |source| ToolError::Read { file: file.to_owned(), source };
    let bytes = std::fs::metadata(file).map_err(failed)?.len();
    let mut machine = StateMachine::new();
    let form = read_saved(file, &mut machine)?;
    let shared = machine.shared();
    let store = shared.read();
    let (hash, revision) = store.hash(0).unwrap_or((0, store.revision()));
    Ok(SavedReport {
        is_own: form == Form::Own,
        is_checked: form != Form::BareDatabase,
        bytes,
        revision,
        compacted: store.compacted(),
        keys: store.keys(),
        hash,
    })
}

/// Shows every record of the log, one a line.
///
/// # Errors
/// When the log is damaged; the lines before the damage have been shown then.
pub fn dump(data_dir: &Path, show: &mut dyn FnMut(&str)) -> Result<(), ToolError> {
    let dir = wal_dir(data_dir);
    if !dir.is_dir() {
        return Err(ToolError::Empty { dir: data_dir.to_owned() });
    }
    let identity = wal::dump(&RealDisk, &dir, &mut |dumped| show(&line(&dumped)))?;
    if let Some(identity) = identity {
        show(&format!("cluster {:x} member {:x}", identity.cluster_id, identity.member_id));
    }
    Ok(())
}

fn line(dumped: &Dumped) -> String {
    let record = &dumped.record;
    let hard = &record.state.hard;
    let mut line = format!(
        "{} record {} term {} vote {:x} commit {} epoch {}",
        dumped.segment, dumped.number, hard.term, hard.vote, hard.commit, record.state.epoch
    );
    for marker in &record.markers {
        let how = if marker.installed { "installed" } else { "written" };
        let _ = write!(line, " snapshot {how} at {} term {}", marker.index, marker.term);
    }
    if let (Some(first), Some(last)) = (record.entries.first(), record.entries.last()) {
        let bytes: usize = record.entries.iter().map(|entry| entry.data.len()).sum();
        let changes = record.entries.iter().filter(|entry| entry.get_entry_type() != EntryType::EntryNormal).count();
        let _ = write!(
            line,
            " entries {}..={} terms {}..={} bytes {bytes}",
            first.index, last.index, first.term, last.term
        );
        if changes > 0 {
            let _ = write!(line, " configuration changes {changes}");
        }
    }
    line
}

/// Makes a data directory for a member of a new cluster whose state is a saved snapshot: one from `etcdctl snapshot save`
/// against this store or a real etcd, or a file of a data directory's `snap`. Returns the revision.
///
/// The revision is moved on by `bump_revision`, and all before it counts as compacted: a client that has seen revisions which came after
/// the snapshot, and are not in it, lists anew then, instead of waiting for what comes after them. 0 moves nothing.
///
/// # Errors
/// When the directory is not empty, or the snapshot is damaged.
pub fn restore(
    saved: &Path,
    data_dir: &Path,
    name: &str,
    cluster: &Cluster,
    bump_revision: u32,
) -> Result<i64, ToolError> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let _lock = lock(data_dir)?;
    if Wal::begun(&*disk, &wal_dir(data_dir))? {
        return Err(ToolError::NotEmpty { dir: data_dir.to_owned() });
    }
    let mut machine = StateMachine::new();
    read_saved(saved, &mut machine)?;
    if bump_revision > 0 {
        machine.shared().write().bump(bump_revision.into());
    }
    let (identity, boot) = boot_for(name, cluster)?;
    let mut settings = Settings::new(identity);
    settings.wal.nonce_seed = random();
    begin(&disk, data_dir, &settings, &boot, &machine)?;
    let revision = machine.shared().read().revision();
    Ok(revision)
}

/// What a saved snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// A file of a data directory's `snap`.
    Own,
    /// What `snapshot save` writes, with its digest.
    Saved,
    /// A copy of an etcd's database.
    BareDatabase,
}

fn read_saved(file: &Path, machine: &mut StateMachine) -> Result<Form, ToolError> {
    let failed = |source| ToolError::Read { file: file.to_owned(), source };
    let refused = |source| ToolError::Restore { file: file.to_owned(), source };
    let mut magic = [0; 8];
    let is_ours = File::open(file).map_err(failed)?.read_exact(&mut magic).is_ok() && magic == *b"MPODSNAP";
    if is_ours {
        // All of it is checked before any of it is believed.
        Reader::open(&RealDisk, file)?.verify()?;
        machine.restore(&mut Reader::open(&RealDisk, file)?).map_err(refused)?;
        return Ok(Form::Own);
    }
    let bytes = std::fs::read(file).map_err(failed)?;
    let store = bolt::import(&bytes).map_err(|source| ToolError::Saved { file: file.to_owned(), source })?;
    machine.restore(&mut store.snapshot().map(Ok)).map_err(refused)?;
    Ok(if bolt::has_digest(&bytes) { Form::Saved } else { Form::BareDatabase })
}
