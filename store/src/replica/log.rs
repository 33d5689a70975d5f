//! The part of the log that raft sees: the entries since some index, in memory. What is older lives in snapshots, and on disk for a start.

use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use std::cell::Cell;
use std::collections::VecDeque;

/// Raft's storage. Written by the replica after the same things are durable.
#[derive(Debug, Default)]
pub struct Log {
    hard: HardState,
    conf: ConfState,
    entries: VecDeque<Entry>,
    /// The index and term before the first entry.
    start: (u64, u64),
    bytes: u64,
    /// A snapshot on disk that can be sent.
    snapshot: Option<Snapshot>,
    /// Raft asked for a snapshot that is not there.
    wanted: Cell<bool>,
}

/// Bytes that an entry counts for, with the room that it takes beside its data.
fn weight(entry: &Entry) -> u64 {
    (entry.data.len() + entry.context.len() + size_of::<Entry>()) as u64
}

impl Log {
    /// A log that begins after the entry `start` = (index, term), with the configuration as of that entry.
    #[must_use]
    pub fn new(start: (u64, u64), hard: HardState, conf: ConfState, entries: VecDeque<Entry>) -> Self {
        let bytes = entries.iter().map(weight).sum();
        Self { hard, conf, entries, start, bytes, snapshot: None, wanted: Cell::new(false) }
    }

    /// The index of the last entry.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.start.0 + self.entries.len() as u64
    }

    /// The term of an entry that is here, or of the one before the first.
    #[must_use]
    pub fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.start.0 {
            return Some(self.start.1);
        }
        let at = usize::try_from(index.checked_sub(self.start.0 + 1)?).ok()?;
        self.entries.get(at).map(|entry| entry.term)
    }

    /// Appends entries, in place of those that are there from the first one's index on.
    pub fn append(&mut self, entries: Vec<Entry>) {
        let Some(first) = entries.first() else { return };
        // Raft never replaces what is committed, and only that is in `start`.
        let keep = usize::try_from(first.index.saturating_sub(self.start.0 + 1)).unwrap_or(usize::MAX);
        for replaced in self.entries.drain(keep.min(self.entries.len())..) {
            self.bytes -= weight(&replaced);
        }
        self.bytes += entries.iter().map(weight).sum::<u64>();
        self.entries.extend(entries);
    }

    /// Takes the state that is durable now.
    pub fn set_hard(&mut self, hard: &HardState) {
        self.hard.clone_from(hard);
    }

    /// Begins anew after an installed snapshot.
    pub fn install(&mut self, snapshot: Snapshot) {
        let metadata = snapshot.get_metadata();
        self.start = (metadata.index, metadata.term);
        self.conf = metadata.get_conf_state().clone();
        self.entries.clear();
        self.bytes = 0;
        self.snapshot = Some(snapshot);
    }

    /// Forgets the oldest entries, never beyond `limit`, until at most `keep_bytes` are left.
    pub fn trim(&mut self, limit: u64, keep_bytes: u64) {
        while self.bytes > keep_bytes && self.start.0 < limit {
            let Some(entry) = self.entries.pop_front() else { return };
            self.bytes -= weight(&entry);
            self.start = (entry.index, entry.term);
        }
    }

    /// Makes a snapshot known that can be sent.
    pub fn offer(&mut self, snapshot: Snapshot) {
        self.snapshot = Some(snapshot);
        self.wanted.set(false);
    }

    /// Whether raft asked for a snapshot that is not there.
    #[must_use]
    pub fn snapshot_wanted(&self) -> bool {
        self.wanted.get()
    }
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState { hard_state: self.hard.clone(), conf_state: self.conf.clone() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.start.0 {
            return Err(StorageError::Compacted.into());
        }
        if high > self.last() + 1 {
            return Err(StorageError::Unavailable.into());
        }
        let at = |index: u64| usize::try_from(index - self.start.0 - 1).unwrap_or(usize::MAX);
        let limit = max_size.into().unwrap_or(u64::MAX);
        let mut size = 0;
        let mut entries = Vec::new();
        for entry in self.entries.range(at(low)..at(high)) {
            size += weight(entry);
            if size > limit && !entries.is_empty() {
                break;
            }
            entries.push(entry.clone());
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        match self.term_of(index) {
            Some(term) => Ok(term),
            None if index < self.start.0 => Err(StorageError::Compacted.into()),
            None => Err(StorageError::Unavailable.into()),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.start.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        // One that ends before the entries here leaves a gap, and one without the receiver in its configuration is ignored there.
        let fits = |snapshot: &&Snapshot| {
            let metadata = snapshot.get_metadata();
            let conf = metadata.get_conf_state();
            metadata.index >= request_index.max(self.start.0)
                && conf.voters.iter().chain(&conf.learners).chain(&conf.voters_outgoing).any(|id| *id == to)
        };
        if let Some(snapshot) = self.snapshot.as_ref().filter(fits) {
            return Ok(snapshot.clone());
        }
        self.wanted.set(true);
        Err(StorageError::SnapshotTemporarilyUnavailable.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use raft::eraftpb::SnapshotMetadata;

    fn entry(term: u64, index: u64) -> Entry {
        Entry { term, index, data: vec![0; 100], ..Entry::default() }
    }

    fn log() -> Log {
        let entries = (6..=10).map(|index| entry(2, index)).collect();
        Log::new((5, 1), HardState::default(), ConfState::default(), entries)
    }

    fn indexes(log: &Log, low: u64, high: u64, max: u64) -> Result<Vec<u64>, raft::Error> {
        Ok(log.entries(low, high, max, GetEntriesContext::empty(false))?.iter().map(|entry| entry.index).collect())
    }

    #[test]
    fn gives_what_is_there_and_names_what_is_not() {
        let log = log();
        assert_eq!(indexes(&log, 6, 11, u64::MAX), Ok(vec![6, 7, 8, 9, 10]));
        assert_eq!(indexes(&log, 7, 9, u64::MAX), Ok(vec![7, 8]));
        assert_eq!(indexes(&log, 7, 11, 0), Ok(vec![7]), "one is always given");
        assert_eq!(indexes(&log, 5, 7, 0), Err(StorageError::Compacted.into()));
        assert_eq!(indexes(&log, 6, 12, 0), Err(StorageError::Unavailable.into()));
        assert_eq!((log.term(5), log.term(6)), (Ok(1), Ok(2)));
        assert_eq!(log.term(4), Err(StorageError::Compacted.into()));
        assert_eq!(log.term(11), Err(StorageError::Unavailable.into()));
    }

    #[test]
    fn a_new_term_replaces_the_end() {
        let mut log = log();
        log.append(vec![entry(3, 9)]);
        assert_eq!((log.last(), log.term(9)), (9, Ok(3)));
        assert_eq!(log.bytes, log.entries.iter().map(weight).sum::<u64>());
    }

    #[test]
    fn trims_to_the_limit_and_not_beyond() {
        let mut log = log();
        log.trim(8, 0);
        assert_eq!((log.first_index(), log.term(8), log.last()), (Ok(9), Ok(2), 10));
        log.trim(10, u64::MAX);
        assert_eq!(log.first_index(), Ok(9), "it fits");
    }

    #[test]
    fn sends_only_a_snapshot_that_helps_the_receiver() {
        let mut log = log();
        let snapshot = |index| Snapshot {
            metadata: Some(SnapshotMetadata { index, term: 1, conf_state: Some((vec![1, 2], vec![3]).into()) }),
            ..Snapshot::default()
        };
        assert!(log.snapshot(0, 2).is_err() && log.snapshot_wanted());
        log.offer(snapshot(4));
        assert!(log.snapshot(0, 2).is_err(), "it leaves a gap");
        log.offer(snapshot(7));
        assert!(!log.snapshot_wanted() && log.snapshot(0, 2).is_ok() && log.snapshot(7, 3).is_ok());
        assert!(log.snapshot(8, 2).is_err(), "older than asked for");
        assert!(log.snapshot(0, 4).is_err(), "the receiver is not in it");
    }
}
