//! Reading a log at a start.

use super::format::{self, FIRST_RECORD, Header, HeaderProblem, Record, VERSION};
use super::{Identity, Marker, Options, SNAPSHOTS, Sealed, State, Wal, WalError, segment_name, segment_sequence};
use crate::disk::{Disk, DiskError, DiskFile, read_all};
use raft::eraftpb::Entry;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a log says.
#[derive(Debug, Default)]
pub struct Recovered {
    /// The state in the last record.
    pub state: State,
    /// The snapshots that are known, oldest first.
    pub markers: Vec<Marker>,
    /// The entries after `start`, without a gap.
    pub entries: VecDeque<Entry>,
    /// The index before the first entry; 0 for a log from its beginning.
    pub start: u64,
    /// What a crash had left and was cleaned.
    pub repair: Option<Repair>,
}

/// The end of a log that a crash had torn, and which was removed. Nothing acknowledged was in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// The segment.
    pub file: PathBuf,
    /// Where the torn record began.
    pub offset: u64,
}

/// Takes records in order and keeps what they amount to.
#[derive(Debug, Default)]
pub(super) struct Replay {
    pub(super) log: Recovered,
    begun: bool,
    /// The index of the last snapshot that came from elsewhere: nothing before it is replaced any more.
    installed: u64,
    pub(super) last_index: u64,
}

impl Replay {
    /// Takes the next record.
    ///
    /// # Errors
    /// What is wrong when it does not continue the log.
    pub(super) fn take(&mut self, record: Record) -> Result<(), String> {
        self.log.state = record.state;
        for marker in record.markers {
            if marker.installed {
                self.log.markers.clear();
                self.log.entries.clear();
                (self.log.start, self.begun) = (marker.index, true);
                (self.installed, self.last_index) = (marker.index, marker.index);
            }
            if !self.log.markers.iter().any(|known| known.index == marker.index) {
                self.log.markers.push(marker);
            }
        }
        let surplus = self.log.markers.len().saturating_sub(SNAPSHOTS);
        self.log.markers.drain(..surplus);
        for entry in record.entries {
            self.take_entry(entry)?;
        }
        Ok(())
    }

    fn take_entry(&mut self, entry: Entry) -> Result<(), String> {
        if !self.begun {
            // Older segments are gone, or the log is new.
            (self.log.start, self.begun) = (entry.index.saturating_sub(1), true);
        }
        let next = self.log.start + self.log.entries.len() as u64 + 1;
        if entry.index > next {
            return Err(format!("it appends entry {} to a log that ends with {}", entry.index, next - 1));
        }
        if entry.index <= self.installed {
            return Err(format!(
                "it replaces entry {}, which a snapshot up to {} contains",
                entry.index, self.installed
            ));
        }
        if entry.index <= self.log.start {
            // The segment with the entry that is replaced here is gone already.
            (self.log.start, self.last_index) = (entry.index - 1, entry.index - 1);
            self.log.entries.clear();
        }
        // A new leader's entries replace those of the old one that were never committed.
        let keep = usize::try_from(entry.index - self.log.start - 1).unwrap_or(usize::MAX);
        self.log.entries.truncate(keep);
        self.last_index = entry.index;
        self.log.entries.push_back(entry);
        Ok(())
    }
}

/// A segment's bytes and where its records end.
struct Scanned {
    header: Header,
    records: Vec<Record>,
    /// The offset after the last valid record.
    end: u64,
    /// Whether bytes that are no valid record follow.
    torn: bool,
    len: u64,
}

/// The segments in a directory by sequence, without a gap.
pub(super) fn segments(disk: &dyn Disk, dir: &Path) -> Result<Vec<u64>, WalError> {
    let found: Vec<u64> = disk.list(dir)?.iter().filter_map(|name| segment_sequence(name)).collect();
    for pair in found.windows(2) {
        if let [before, after] = pair
            && before + 1 != *after
        {
            return Err(WalError::Missing {
                file: dir.join(segment_name(before + 1)),
                before: segment_name(*before),
                after: segment_name(*after),
            });
        }
    }
    Ok(found)
}

/// Whether a log was begun in a directory: a crash while the first segment was made leaves a file, but no log.
fn begun(disk: &dyn Disk, dir: &Path) -> Result<bool, DiskError> {
    disk.create_dir(dir)?;
    let mut sequences: Vec<u64> = disk.list(dir)?.iter().filter_map(|name| segment_sequence(name)).collect();
    match (sequences.pop(), sequences.is_empty()) {
        (None, _) => Ok(false),
        (Some(1), true) => {
            let path = dir.join(segment_name(1));
            let bytes = read_all(&*disk.open(&path)?, &path)?;
            // What cannot be read is a log all the same: opening it says what is wrong.
            Ok(scan(&path, &bytes, true).map_or(true, |found| found.is_some_and(|scanned| !scanned.records.is_empty())))
        }
        (Some(_), _) => Ok(true),
    }
}

/// Reads a segment. `last` says whether a torn end can be a crash's.
fn scan(path: &Path, bytes: &[u8], last: bool) -> Result<Option<Scanned>, WalError> {
    let damaged = |offset, what: String| WalError::Damaged { file: path.to_owned(), offset, what };
    let header = match Header::decode(bytes) {
        Ok(header) => header,
        Err(HeaderProblem::Version(found)) => {
            return Err(WalError::Version { file: path.to_owned(), found, known: VERSION });
        }
        Err(HeaderProblem::Damaged) => {
            let first_record = usize::try_from(FIRST_RECORD).unwrap_or(usize::MAX);
            let empty = bytes.iter().skip(first_record).all(|byte| *byte == 0);
            if last && empty {
                // The crash came while the segment was made; nothing was written to it yet.
                return Ok(None);
            }
            return Err(damaged(0, "the header's checksum is wrong".to_owned()));
        }
    };
    let mut scanned = Scanned { header, records: Vec::new(), end: FIRST_RECORD, torn: false, len: bytes.len() as u64 };
    while let Some((payload, next)) = format::record_at(bytes, header.nonce, scanned.end) {
        let record = format::decode_record(payload)
            .ok_or_else(|| damaged(scanned.end, "a record with a right checksum has a wrong form".to_owned()))?;
        scanned.records.push(record);
        scanned.end = next;
    }
    let end = usize::try_from(scanned.end).unwrap_or(usize::MAX);
    scanned.torn = bytes.iter().skip(end).any(|byte| *byte != 0);
    if scanned.torn {
        if let Some(next) = format::next_valid_record(bytes, header.nonce, scanned.end) {
            return Err(damaged(
                scanned.end,
                format!("a record's checksum is wrong, and a valid record follows at {next}"),
            ));
        }
        if !last {
            return Err(damaged(
                scanned.end,
                "a record's checksum is wrong, and the log goes on in another file".to_owned(),
            ));
        }
    }
    Ok(Some(scanned))
}

impl Wal {
    /// Whether a log was begun in `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn begun(disk: &dyn Disk, dir: &Path) -> Result<bool, DiskError> {
        begun(disk, dir)
    }

    /// Opens the log in `dir`, repairs a torn end, and goes on writing behind the last record.
    ///
    /// # Errors
    /// When the disk fails, or the log is damaged, of another version or has a gap; nothing is changed then.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, options: Options) -> Result<(Self, Recovered), WalError> {
        let mut sequences = segments(&*disk, dir)?;
        let mut replay = Replay::default();
        let mut sealed = VecDeque::new();
        let mut current: Option<(Scanned, Box<dyn DiskFile>)> = None;
        let last = sequences.last().copied();
        let mut unfinished = None;
        for sequence in sequences.drain(..) {
            let path = dir.join(segment_name(sequence));
            let file = disk.open(&path)?;
            let bytes = read_all(&*file, &path)?;
            let Some(mut scanned) = scan(&path, &bytes, Some(sequence) == last)? else {
                unfinished = Some(path);
                break;
            };
            check_place(&path, &scanned.header, sequence, current.as_ref().map(|(before, _)| before.header.identity))?;
            if let Some((before, _)) = current.take() {
                sealed.push_back(Sealed { sequence: before.header.sequence, last_index: replay.last_index });
            }
            for record in std::mem::take(&mut scanned.records) {
                replay.take(record).map_err(|what| WalError::Damaged {
                    file: path.clone(),
                    offset: scanned.end,
                    what,
                })?;
            }
            current = Some((scanned, file));
        }
        if let Some(path) = unfinished {
            disk.remove(&path)?;
            disk.sync_dir(dir)?;
        }
        let Some((scanned, file)) = current else {
            // The crash came while the very first segment was made: there never was a log.
            return Err(WalError::Damaged {
                file: dir.join(segment_name(1)),
                offset: 0,
                what: "the log was never begun; empty the directory and start again".to_owned(),
            });
        };
        let mut log = replay.log;
        if scanned.torn {
            let path = dir.join(segment_name(scanned.header.sequence));
            erase(&*file, scanned.end, scanned.len)?;
            log.repair = Some(Repair { file: path, offset: scanned.end });
        }
        let mut wal = Self {
            disk,
            dir: dir.to_owned(),
            identity: scanned.header.identity,
            options,
            state: log.state.clone(),
            markers: log.markers.clone(),
            sealed,
            file,
            header: scanned.header,
            len: scanned.len,
            offset: scanned.end,
            last_index: replay.last_index,
            buffer: Vec::new(),
            spare: None,
            failed: false,
            #[cfg(feature = "planted-bugs")]
            planted_no_sync: false,
        };
        wal.prepare_spare();
        Ok((wal, log))
    }
}

/// A file copied from elsewhere or renamed must not pass for ours.
fn check_place(path: &Path, header: &Header, sequence: u64, before: Option<Identity>) -> Result<(), WalError> {
    let what = if header.sequence != sequence {
        format!("its header says that it is segment {:016x}", header.sequence)
    } else if before.is_some_and(|before| before != header.identity) {
        "it belongs to another cluster or member than the segment before it".to_owned()
    } else {
        return Ok(());
    };
    Err(WalError::Damaged { file: path.to_owned(), offset: 0, what })
}

/// Overwrites a torn record with zeros, durably, so that its rest is never taken for something that follows later records.
fn erase(file: &dyn DiskFile, from: u64, len: u64) -> Result<(), DiskError> {
    let mut offset = from;
    let zeros = vec![0; 1 << 20];
    while offset < len {
        let piece = usize::try_from(len - offset).unwrap_or(zeros.len()).min(zeros.len());
        file.write_at(offset, &zeros[..piece])?;
        offset += piece as u64;
    }
    file.sync()
}

/// Whose log is in `dir`, by the header of its first segment.
///
/// # Errors
/// As [`Wal::open`].
pub fn identity(disk: &dyn Disk, dir: &Path) -> Result<Option<Identity>, WalError> {
    let Some(first) = segments(disk, dir)?.first().copied() else { return Ok(None) };
    let path = dir.join(segment_name(first));
    let mut bytes = vec![0; usize::try_from(FIRST_RECORD).unwrap_or(usize::MAX)];
    disk.open(&path)?.read_at(0, &mut bytes)?;
    match Header::decode(&bytes) {
        Ok(header) => Ok(Some(header.identity)),
        Err(HeaderProblem::Version(found)) => Err(WalError::Version { file: path, found, known: VERSION }),
        Err(HeaderProblem::Damaged) => Ok(None),
    }
}

pub(super) fn scan_for_dump(path: &Path, bytes: &[u8]) -> Result<Vec<Record>, WalError> {
    Ok(scan(path, bytes, true)?.map(|scanned| scanned.records).unwrap_or_default())
}
