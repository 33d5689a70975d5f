//! The keys in order, each with its versions.

use super::version::{Revision, Version};
use std::collections::BTreeMap;
use std::ops::Bound;

/// The versions of one key, oldest first.
#[derive(Debug, Clone)]
pub struct History {
    /// Nearly every key of nearly every store has just this one.
    latest: Version,
    older: Vec<Version>,
}

impl History {
    /// The last version, which may be a tombstone.
    pub fn latest(&self) -> &Version {
        &self.latest
    }

    /// The version that was in force at revision `main`, which may be a tombstone.
    pub fn at(&self, main: i64) -> Option<&Version> {
        if self.latest.at.main <= main {
            return Some(&self.latest);
        }
        let newer = self.older.partition_point(|version| version.at.main <= main);
        newer.checked_sub(1).and_then(|index| self.older.get(index))
    }
}

/// The keys in order.
#[derive(Debug, Default)]
pub struct Index {
    keys: BTreeMap<Box<[u8]>, History>,
}

/// Which keys a request means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys<'a> {
    /// One key.
    One(&'a [u8]),
    /// Every key from here on.
    From(&'a [u8]),
    /// From the first to before the second; empty when the second does not come after the first.
    Between(&'a [u8], &'a [u8]),
}

impl<'a> Keys<'a> {
    /// As a request says it: no end is one key, an end of one zero byte is every key from `key` on.
    pub fn of(key: &'a [u8], range_end: &'a [u8]) -> Self {
        match range_end {
            [] => Keys::One(key),
            [0] => Keys::From(key),
            end => Keys::Between(key, end),
        }
    }
}

impl Index {
    pub fn get(&self, key: &[u8]) -> Option<&History> {
        self.keys.get(key)
    }

    /// Adds a version, which comes after the others of its key, and gives back the one before it.
    pub fn append(&mut self, key: &[u8], version: Version) -> Option<Version> {
        if let Some(history) = self.keys.get_mut(key) {
            let previous = std::mem::replace(&mut history.latest, version);
            history.older.push(previous.clone());
            return Some(previous);
        }
        self.keys.insert(key.into(), History { latest: version, older: Vec::new() });
        None
    }

    /// Takes out one version, and the key with its last one.
    pub fn forget(&mut self, key: &[u8], at: Revision) {
        let Some(history) = self.keys.get_mut(key) else { return };
        if history.latest.at == at {
            match history.older.pop() {
                Some(version) => history.latest = version,
                None => {
                    self.keys.remove(key);
                }
            }
            return;
        }
        if let Ok(index) = history.older.binary_search_by_key(&at, |version| version.at) {
            history.older.remove(index);
            if history.older.capacity() > 2 * history.older.len() + 4 {
                history.older.shrink_to_fit();
            }
        }
    }

    /// The histories of the keys that are meant, in order; from `resume` on when a scan goes on.
    pub fn range<'a>(&'a self, keys: Keys<'_>, resume: Option<&[u8]>) -> impl Iterator<Item = (&'a [u8], &'a History)> {
        let (start, end): (&[u8], Bound<&[u8]>) = match keys {
            Keys::One(key) => (key, Bound::Included(key)),
            Keys::From(key) => (key, Bound::Unbounded),
            // BTreeMap panics on a range that ends before it begins.
            Keys::Between(key, end) => (key, Bound::Excluded(end.max(key))),
        };
        let start = match resume {
            Some(resume) if resume > start => Bound::Excluded(resume),
            _ => Bound::Included(start),
        };
        self.keys.range::<[u8], _>((start, end)).map(|(key, history)| (&**key, history))
    }
}
