//! The log on disk: segments of records, one record and one sync a batch.
//!
//! Every record is durable before the next one is written. So at most one record, the last, can be torn by a crash, and a bad record
//! with a valid one after it is damage and not a crash: the first is repaired, the second refused.

mod dump;
pub mod format;
mod recover;

pub use dump::{Dumped, dump};
pub use format::{Identity, Marker, State};
pub use recover::{Recovered, Repair, identity};

use crate::disk::{Disk, DiskError, DiskFile};
use format::{FIRST_RECORD, Header};
use minipod_daemon::metrics::Histogram;
use raft::eraftpb::Entry;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Instant;

/// A log that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum WalError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A file is damaged in a way that no crash can explain.
    #[error(
        "{} is damaged at offset {offset}: {what}; nothing was changed. Restore the file from a backup, or, in a cluster, remove this \
         member, empty its data directory and join it again; `minipod-store restore` brings back a saved snapshot", file.display()
    )]
    Damaged {
        /// The file.
        file: PathBuf,
        /// Where in it, bytes.
        offset: u64,
        /// What is wrong there.
        what: String,
    },
    /// A file was written by a program that this one does not know.
    #[error("{} has format version {found}, and this program reads version {known} only: use the program that wrote it", file.display())]
    Version {
        /// The file.
        file: PathBuf,
        /// Its version.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// A segment between others is missing.
    #[error("{} is missing: the log has {before:?} and {after:?} around it; restore the file from a backup", file.display())]
    Missing {
        /// The file that should be there.
        file: PathBuf,
        /// The name of the one before.
        before: String,
        /// The name of the one after.
        after: String,
    },
    /// The log ended with an error before, and is not written any more.
    #[error("the log in {} failed before and is not written any more", dir.display())]
    Failed {
        /// Its directory.
        dir: PathBuf,
    },
}

/// How to write a log.
#[derive(Debug, Clone)]
pub struct Options {
    /// The length of a segment, bytes; a larger record gets a segment of its own.
    pub segment_len: u64,
    /// Makes the checksums of this log its own; random.
    pub nonce_seed: u64,
    /// Whether a thread prepares the next segment ahead of time.
    pub prepare_ahead: bool,
    /// Where the time of every sync is counted; `None` looks at no clock.
    pub sync_seconds: Option<Arc<Histogram>>,
}

/// 32 MiB: a few seconds of writes at full speed, so that the next segment is ready in time, and little to read at a start.
pub const SEGMENT_LEN: u64 = 32 << 20;

/// The first segment is small, so that a fresh store does not begin by writing zeros for seconds on a slow disk.
const FIRST_SEGMENT_LEN: u64 = 2 << 20;

impl Default for Options {
    fn default() -> Self {
        Self { segment_len: SEGMENT_LEN, nonce_seed: 0, prepare_ahead: false, sync_seconds: None }
    }
}

/// A segment that is written no more.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sealed {
    pub(crate) sequence: u64,
    /// The highest index of an entry in it or before.
    pub(crate) last_index: u64,
}

/// The log, open for writing.
#[derive(Debug)]
pub struct Wal {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    identity: Identity,
    options: Options,
    state: State,
    /// The snapshots that a start may begin with, oldest first.
    markers: Vec<Marker>,
    sealed: VecDeque<Sealed>,
    file: Box<dyn DiskFile>,
    header: Header,
    len: u64,
    offset: u64,
    last_index: u64,
    buffer: Vec<u8>,
    spare: Option<mpsc::Receiver<Result<(), DiskError>>>,
    failed: bool,
    #[cfg(feature = "planted-bugs")]
    planted_no_sync: bool,
}

/// Two snapshots are kept: should the newer one be damaged, the older one and the log after it have everything.
const SNAPSHOTS: usize = 2;
const SPARE: &str = "spare.tmp";

/// The name of a segment.
#[must_use]
pub fn segment_name(sequence: u64) -> String {
    format!("{sequence:016x}.wal")
}

/// The sequence number in a segment's name.
#[must_use]
pub fn segment_sequence(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".wal")?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok()).flatten()
}

impl Wal {
    /// Begins a log in an empty directory.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn create(disk: Arc<dyn Disk>, dir: &Path, identity: Identity, options: Options) -> Result<Self, WalError> {
        disk.create_dir(dir)?;
        let header = Header { identity, sequence: 1, nonce: options.nonce_seed.wrapping_add(1) };
        let len = options.segment_len.min(FIRST_SEGMENT_LEN);
        let file = new_segment(&*disk, dir, &header, len)?;
        let mut wal = Self {
            disk,
            dir: dir.to_owned(),
            identity,
            len,
            options,
            state: State::default(),
            markers: Vec::new(),
            sealed: VecDeque::new(),
            file,
            header,
            offset: FIRST_RECORD,
            last_index: 0,
            buffer: Vec::new(),
            spare: None,
            failed: false,
            #[cfg(feature = "planted-bugs")]
            planted_no_sync: false,
        };
        wal.prepare_spare();
        Ok(wal)
    }

    /// Whose log it is.
    #[must_use]
    pub const fn identity(&self) -> Identity {
        self.identity
    }

    /// What the segments take on disk, bytes; a segment of unusual length counts as a usual one.
    #[must_use]
    pub fn disk_bytes(&self) -> u64 {
        self.sealed.len() as u64 * self.options.segment_len + self.len
    }

    /// The state in the last record.
    #[must_use]
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// Appends one record and makes it durable: afterwards all of it survives any crash.
    ///
    /// # Errors
    /// When the disk fails. The log is not written any more then: what the kernel still holds of a failed sync is unknown.
    pub fn append(&mut self, state: &State, markers: &[Marker], entries: &[Entry]) -> Result<(), WalError> {
        if self.failed {
            return Err(WalError::Failed { dir: self.dir.clone() });
        }
        let done = self.try_append(state, markers, entries);
        self.failed = done.is_err();
        done
    }

    /// As [`Self::append`], but a crash may take it: the bug that the simulation has to find.
    ///
    /// # Errors
    /// As [`Self::append`].
    #[cfg(feature = "planted-bugs")]
    pub fn append_without_sync(
        &mut self,
        state: &State,
        markers: &[Marker],
        entries: &[Entry],
    ) -> Result<(), WalError> {
        self.planted_no_sync = true;
        let done = self.append(state, markers, entries);
        self.planted_no_sync = false;
        done
    }

    fn try_append(&mut self, state: &State, markers: &[Marker], entries: &[Entry]) -> Result<(), WalError> {
        let needed = format::record_len(markers.len(), entries);
        if self.offset + needed > self.len {
            self.rotate(needed)?;
        }
        self.write_record(state, markers, entries)?;
        self.state = state.clone();
        for marker in markers {
            if marker.installed {
                self.markers.clear();
                self.last_index = marker.index;
            }
            self.markers.push(*marker);
        }
        let surplus = self.markers.len().saturating_sub(SNAPSHOTS);
        self.markers.drain(..surplus);
        if let Some(entry) = entries.last() {
            self.last_index = entry.index;
        }
        Ok(())
    }

    fn write_record(&mut self, state: &State, markers: &[Marker], entries: &[Entry]) -> Result<(), WalError> {
        format::encode_record(&mut self.buffer, self.header.nonce, self.offset, state, (markers, entries));
        self.file.write_at(self.offset, &self.buffer)?;
        #[cfg(feature = "planted-bugs")]
        if self.planted_no_sync {
            self.offset += self.buffer.len() as u64;
            return Ok(());
        }
        let begun = self.options.sync_seconds.as_ref().map(|_| Instant::now());
        self.file.sync()?;
        if let (Some(seconds), Some(begun)) = (&self.options.sync_seconds, begun) {
            seconds.observe(begun.elapsed());
        }
        self.offset += self.buffer.len() as u64;
        // One huge batch must not hold its memory for good.
        if self.buffer.capacity() > 8 << 20 {
            self.buffer = Vec::new();
        }
        Ok(())
    }

    /// Goes on in a new segment, which begins with the state and the markers, so that the older ones can go.
    fn rotate(&mut self, needed: u64) -> Result<(), WalError> {
        let sequence = self.header.sequence + 1;
        let header =
            Header { identity: self.identity, sequence, nonce: self.options.nonce_seed.wrapping_add(sequence) };
        let markers = std::mem::take(&mut self.markers);
        let len = self.options.segment_len.max(FIRST_RECORD + needed + format::record_len(markers.len(), &[]));
        let ready = len == self.options.segment_len && self.take_spare();
        let file = if ready {
            let path = self.dir.join(segment_name(sequence));
            self.disk.rename(&self.dir.join(SPARE), &path)?;
            let file = self.disk.open(&path)?;
            finish_segment(&*self.disk, &self.dir, &*file, &header)?;
            file
        } else {
            new_segment(&*self.disk, &self.dir, &header, len)?
        };
        self.sealed.push_back(Sealed { sequence: self.header.sequence, last_index: self.last_index });
        (self.file, self.header, self.len, self.offset) = (file, header, len, FIRST_RECORD);
        let state = self.state.clone();
        // An installed snapshot has taken effect where it was written first; said again, it would drop the entries after it.
        let repeated: Vec<_> = markers.iter().map(|marker| Marker { installed: false, ..*marker }).collect();
        self.write_record(&state, &repeated, &[])?;
        self.markers = markers;
        self.prepare_spare();
        Ok(())
    }

    /// Makes a locally written snapshot known and removes the segments that no start needs any more.
    ///
    /// # Errors
    /// As [`Self::append`].
    pub fn mark_snapshot(&mut self, marker: Marker) -> Result<(), WalError> {
        let state = self.state.clone();
        self.append(&state, &[marker], &[])?;
        self.remove_old_segments()
    }

    /// The snapshots that a start may begin with, oldest first.
    #[must_use]
    pub fn snapshots(&self) -> &[Marker] {
        &self.markers
    }

    /// Removes the segments before the oldest snapshot that is kept, oldest first, each durably before the next: a gap in the log is
    /// therefore always damage.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn remove_old_segments(&mut self) -> Result<(), WalError> {
        let Some(oldest) = self.markers.first().map(|marker| marker.index) else { return Ok(()) };
        while let Some(segment) = self.sealed.front().copied() {
            if segment.last_index > oldest {
                break;
            }
            self.disk.remove(&self.dir.join(segment_name(segment.sequence)))?;
            self.disk.sync_dir(&self.dir)?;
            self.sealed.pop_front();
        }
        Ok(())
    }

    /// Whether the prepared segment is there. A failure to prepare it is no failure of the log: it is then made in place, and an error
    /// shows there.
    fn take_spare(&mut self) -> bool {
        self.spare.take().is_some_and(|spare| matches!(spare.recv(), Ok(Ok(()))))
    }

    fn prepare_spare(&mut self) {
        if !self.options.prepare_ahead {
            return;
        }
        let (disk, path, len) = (Arc::clone(&self.disk), self.dir.join(SPARE), self.options.segment_len);
        // One answer.
        let (sender, receiver) = mpsc::sync_channel(1);
        let made = std::thread::Builder::new().name("wal-spare".to_owned()).spawn(move || {
            let _ = sender.send(disk.create(&path, len).map(drop));
        });
        self.spare = made.is_ok().then_some(receiver);
    }
}

/// Makes a segment with its header, durably.
fn new_segment(disk: &dyn Disk, dir: &Path, header: &Header, len: u64) -> Result<Box<dyn DiskFile>, DiskError> {
    let file = disk.create(&dir.join(segment_name(header.sequence)), len)?;
    finish_segment(disk, dir, &*file, header)?;
    Ok(file)
}

/// The header and the name are durable before the first record is written: a damaged header is thus a crash only when nothing follows it.
fn finish_segment(disk: &dyn Disk, dir: &Path, file: &dyn DiskFile, header: &Header) -> Result<(), DiskError> {
    file.write_at(0, &header.encode())?;
    file.sync()?;
    disk.sync_dir(dir)
}
