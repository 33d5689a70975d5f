//! The multi-version store: keys, their history, leases. No clock, no I/O, no thread.
//!
//! [`Store`] holds every version in a revision log (`log`) and, per key, its versions in an ordered index; both share
//! the bytes. Watches and snapshots read the log, ranges read the index. Writers are `txn`'s functions, readers those
//! of `range`. Compaction has two steps: it is *logical* at once (older revisions are refused), and [`Store::sweep`]
//! frees the space in slices. Nothing that a client can see depends on how far the sweep has come.

pub mod bolt;
mod compact;
mod index;
mod log;
mod range;
mod snapshot;
mod txn;
mod version;

pub use compact::Hashing;
pub use index::History;
pub use range::{RangeResult, Scan};
pub use snapshot::{MAX_CHUNK_BYTES, Restore};
pub use version::{Revision, Version};

use crate::lease::Leases;
use crate::refused::Refused;
use crate::wire::KeyValue;
use index::Index;
use log::Log;
use std::collections::{BTreeSet, VecDeque};

/// What a version costs besides its bytes: log and index entries with their slack. An estimate for the quota.
const VERSION_OVERHEAD_BYTES: u64 = 96;

/// The state of the store.
#[derive(Debug)]
pub struct Store {
    index: Index,
    log: Log,
    /// Versions that a later one replaced, with the revision that did it.
    replaced: VecDeque<Garbage>,
    /// Versions that die one revision after they came: tombstones, and what was written and removed in one transaction.
    short_lived: VecDeque<Garbage>,
    pub(crate) leases: Leases,
    /// Raised alarms: member and kind (1 no space, 2 corrupt).
    alarms: BTreeSet<(u64, i32)>,
    revision: i64,
    compacted: i64,
    applied: u64,
    bytes: u64,
    /// Keys that are there now.
    keys: usize,
    scratch: Vec<u8>,
    /// A bug on purpose, for the tests that must find it: a lease that was renewed in time runs out all the same.
    #[cfg(feature = "planted-bugs")]
    pub expires_early: bool,
}

/// A version that is dead once the store is compacted at `dead_from` or later.
#[derive(Debug, Clone, Copy)]
struct Garbage {
    dead_from: i64,
    at: Revision,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            index: Index::default(),
            log: Log::default(),
            replaced: VecDeque::new(),
            short_lived: VecDeque::new(),
            leases: Leases::default(),
            alarms: BTreeSet::new(),
            revision: 1,
            compacted: -1,
            applied: 0,
            bytes: 0,
            keys: 0,
            scratch: Vec::new(),
            #[cfg(feature = "planted-bugs")]
            expires_early: false,
        }
    }
}

impl Store {
    /// The revision of the last change; 1 when there was none.
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// The oldest revision that can be read; −1 when nothing was compacted.
    pub fn compacted(&self) -> i64 {
        self.compacted
    }

    /// The index of the last log entry that is part of the state.
    pub fn applied(&self) -> u64 {
        self.applied
    }

    pub(crate) fn set_applied(&mut self, index: u64) {
        self.applied = index;
    }

    /// About what the state takes in memory, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes + self.log.len() as u64 * VERSION_OVERHEAD_BYTES
    }

    /// How many versions are kept.
    pub fn versions(&self) -> usize {
        self.log.len()
    }

    /// How many keys are there now.
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// The versions from revision `main` on, in order. Those from the compacted revision on are all there.
    pub fn history(&self, main: i64) -> impl Iterator<Item = &Version> {
        self.log.from(main)
    }

    /// What `key` was at revision `main`, however long ago; `None` when it was not there or is no longer known.
    pub fn at(&self, key: &[u8], main: i64) -> Option<&Version> {
        self.index.get(key)?.at(main).filter(|version| !version.is_tombstone)
    }

    fn current(&self, key: &[u8]) -> Option<&Version> {
        self.index.get(key).map(History::latest).filter(|version| !version.is_tombstone)
    }

    /// The leases.
    pub fn leases(&self) -> &Leases {
        &self.leases
    }

    /// The alarms that are raised: member and kind.
    pub fn alarms(&self) -> impl Iterator<Item = (u64, i32)> {
        self.alarms.iter().copied()
    }

    /// Raises or clears an alarm; whether that changed anything.
    pub fn set_alarm(&mut self, member: u64, kind: i32, raised: bool) -> bool {
        if raised { self.alarms.insert((member, kind)) } else { self.alarms.remove(&(member, kind)) }
    }

    /// Whether a member ran out of space, so that nothing may be added.
    pub fn is_capped(&self) -> bool {
        self.alarms.iter().any(|(_, kind)| *kind == 1)
    }

    /// Writes a key at `at`. The lease, if any, exists.
    fn put(&mut self, at: Revision, key: &[u8], value: &[u8], lease: i64) {
        let (create_revision, version) = match self.current(key) {
            Some(previous) => {
                let previous = previous.kv();
                (previous.create_revision, previous.version + 1)
            }
            None => (at.main, 1),
        };
        let kv = KeyValue { key, create_revision, mod_revision: at.main, version, value, lease };
        let version = Version::new(at, false, &kv, &mut self.scratch);
        self.append(version, &kv);
    }

    /// Removes a key, which is there, at `at`.
    fn remove(&mut self, at: Revision, key: &[u8]) {
        let kv = KeyValue { key, mod_revision: at.main, ..KeyValue::default() };
        let version = Version::new(at, true, &kv, &mut self.scratch);
        self.append(version, &kv);
    }

    /// Adds a version to log, index and leases. It comes after all others.
    fn append(&mut self, version: Version, kv: &KeyValue<'_>) {
        let at = version.at;
        self.bytes += version.encoded().len() as u64;
        let is_tombstone = version.is_tombstone;
        self.log.push(version.clone());
        let previous = self.index.append(kv.key, version).filter(|previous| !previous.is_tombstone);
        match (previous.is_some(), is_tombstone) {
            (false, false) => self.keys += 1,
            (true, true) => self.keys = self.keys.saturating_sub(1),
            _ => {}
        }
        let old_lease = match previous {
            Some(previous) => {
                if previous.at.main < at.main {
                    self.replaced.push_back(Garbage { dead_from: at.main, at: previous.at });
                } else {
                    self.short_lived.push_back(Garbage { dead_from: at.main + 1, at: previous.at });
                }
                previous.kv().lease
            }
            None => 0,
        };
        // After what it replaced: the sweep frees in this order, and a tombstone that goes first would bring the key back.
        if is_tombstone {
            self.short_lived.push_back(Garbage { dead_from: at.main + 1, at });
        }
        if old_lease != kv.lease {
            self.leases.detach(old_lease, kv.key);
            self.leases.attach(kv.lease, kv.key);
        }
    }

    /// Whether a revision can be read.
    fn check_revision(&self, revision: i64, current: i64) -> Result<(), Refused> {
        if revision > current {
            return Err(Refused::FutureRevision);
        }
        if revision > 0 && revision < self.compacted {
            return Err(Refused::Compacted);
        }
        Ok(())
    }
}
