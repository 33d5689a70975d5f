//! Looking at a data directory, and making one from a saved snapshot. Nothing here runs beside a store that is using the directory.

use crate::disk::{Disk, DiskError, RealDisk};
use crate::machine::{Machine, RestoreError};
use crate::mvcc::bolt::{self, ImportError};
use crate::overlay::Overlay;
use crate::replica::core::{Boot, Core, Outbox, ReplicaError, Reply, Settings, begin, snapshot_dir, wal_dir};
use crate::service::{Cluster, StoreError, boot_for, lock, random};
use crate::snapshot::{Reader, SnapshotError, parse_name};
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
    /// The hash of all keys and their history, as `etcdctl endpoint hashkv` gives it.
    pub hash: u32,
}

struct Nobody;

impl Outbox<()> for Nobody {
    fn send(&mut self, _messages: Vec<Message>) {}
    fn answer(&mut self, _waiter: (), _reply: Reply) {}
}

/// Reads the whole log and all snapshots, restores the state in memory and hashes it. Changes nothing.
///
/// # Errors
/// What is damaged, and where.
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
    let machine = StateMachine::new();
    let shared = machine.shared();
    let mut core = Core::<_, ()>::open(&disk, data_dir, Settings::new(identity), &Boot::Join, machine)?;
    core.advance(&mut Nobody)?;
    let store = shared.read();
    let (hash, revision) = store.hash(0).unwrap_or((0, store.revision()));
    Ok(Report {
        identity,
        records,
        snapshots,
        applied: core.applied(),
        last: core.raft().raft_log.last_index(),
        term: core.raft().term,
        revision,
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
/// # Errors
/// When the directory is not empty, or the snapshot is damaged.
pub fn restore(saved: &Path, data_dir: &Path, name: &str, cluster: &Cluster) -> Result<i64, ToolError> {
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let _lock = lock(data_dir)?;
    if Wal::begun(&*disk, &wal_dir(data_dir))? {
        return Err(ToolError::NotEmpty { dir: data_dir.to_owned() });
    }
    let mut machine = StateMachine::new();
    read_saved(saved, &mut machine)?;
    let (identity, boot) = boot_for(name, cluster)?;
    let mut settings = Settings::new(identity);
    settings.wal.nonce_seed = random();
    begin(&disk, data_dir, &settings, &boot, &machine)?;
    let revision = machine.shared().read().revision();
    Ok(revision)
}

fn read_saved(file: &Path, machine: &mut StateMachine) -> Result<(), ToolError> {
    let failed = |source| ToolError::Read { file: file.to_owned(), source };
    let refused = |source| ToolError::Restore { file: file.to_owned(), source };
    let mut magic = [0; 8];
    let is_ours = File::open(file).map_err(failed)?.read_exact(&mut magic).is_ok() && magic == *b"MPODSNAP";
    if is_ours {
        // All of it is checked before any of it is believed.
        Reader::open(&RealDisk, file)?.verify()?;
        return machine.restore(&mut Reader::open(&RealDisk, file)?).map_err(refused);
    }
    let bytes = std::fs::read(file).map_err(failed)?;
    let store = bolt::import(&bytes).map_err(|source| ToolError::Saved { file: file.to_owned(), source })?;
    machine.restore(&mut store.snapshot().map(Ok)).map_err(refused)
}
