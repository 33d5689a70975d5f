//! Compaction, and the hash that members compare.

use super::{Garbage, Log, Revision, Store};
use crate::refused::Refused;
use std::collections::{HashSet, VecDeque};

impl Store {
    /// Makes `revision` the oldest that can be read. The space is freed by [`Store::sweep`].
    ///
    /// What stays: every version from `revision` on, and of each key the one in force at `revision`.
    ///
    /// # Errors
    /// [`Refused::Compacted`] when that is no progress, [`Refused::FutureRevision`].
    pub fn compact(&mut self, revision: i64) -> Result<(), Refused> {
        if revision <= self.compacted {
            return Err(Refused::Compacted);
        }
        if revision > self.revision {
            return Err(Refused::FutureRevision);
        }
        self.compacted = revision;
        Ok(())
    }

    /// Moves the revision on by `by`, as if that much had happened since, and compacts what was before.
    pub(crate) fn bump(&mut self, by: i64) {
        self.revision = self.revision.saturating_add(by);
        self.compacted = self.revision;
    }

    /// Frees up to `max_versions` versions that compaction has declared dead; whether there are more.
    ///
    /// The caller has seen every version that it needs: the watch hub calls this once it has caught up.
    pub fn sweep(&mut self, max_versions: usize) -> bool {
        let mut dead = Vec::new();
        for queue in [&mut self.replaced, &mut self.short_lived] {
            while dead.len() < max_versions
                && let Some(garbage) = queue.front()
                && garbage.dead_from <= self.compacted
            {
                dead.push(garbage.at);
                queue.pop_front();
            }
            if queue.capacity() > 4 * queue.len() + 1024 {
                queue.shrink_to(2 * queue.len());
            }
        }
        dead.sort_unstable();
        for &at in &dead {
            if let Some(version) = self.log.get(at) {
                self.bytes = self.bytes.saturating_sub(version.encoded().len() as u64);
                self.index.forget(version.key(), at);
            }
        }
        self.log.remove(&dead);
        self.has_garbage()
    }

    /// Whether [`Store::sweep`] has something to do.
    pub fn has_garbage(&self) -> bool {
        let dead = |queue: &VecDeque<Garbage>| queue.front().is_some_and(|first| first.dead_from <= self.compacted);
        dead(&self.replaced) || dead(&self.short_lived)
    }

    /// A hash over everything that can be read up to `revision` (0: the current one), equal on all members that have the
    /// same compacted revision; with the revision hashed.
    ///
    /// # Errors
    /// [`Refused::Compacted`] or [`Refused::FutureRevision`].
    pub fn hash(&self, revision: i64) -> Result<(u32, i64), Refused> {
        self.hashing(revision).map(Hashing::finish)
    }

    /// What [`Store::hash`] needs, so that the store is not held while a gigabyte is read.
    ///
    /// # Errors
    /// As [`Store::hash`].
    pub fn hashing(&self, revision: i64) -> Result<Hashing, Refused> {
        let revision = if revision <= 0 { self.revision } else { revision };
        if revision < self.compacted {
            return Err(Refused::Compacted);
        }
        if revision > self.revision {
            return Err(Refused::FutureRevision);
        }
        // What is dead and not yet swept must not count.
        let queues = [&self.replaced, &self.short_lived];
        let dead =
            queues.iter().flat_map(|queue| queue.iter().take_while(|garbage| garbage.dead_from <= self.compacted));
        Ok(Hashing { log: self.log.clone(), dead: dead.map(|garbage| garbage.at).collect(), revision })
    }
}

/// A hash that is still to be computed.
#[derive(Debug)]
pub struct Hashing {
    log: Log,
    dead: HashSet<Revision>,
    revision: i64,
}

impl Hashing {
    /// The hash, and the revision hashed.
    pub fn finish(self) -> (u32, i64) {
        let mut hasher = crc32fast::Hasher::new();
        for version in self.log.from(i64::MIN).take_while(|version| version.at.main <= self.revision) {
            if !self.dead.contains(&version.at) {
                hasher.update(&version.at.main.to_be_bytes());
                hasher.update(&version.at.sub.to_be_bytes());
                hasher.update(&[u8::from(version.is_tombstone)]);
                hasher.update(version.encoded());
            }
        }
        (hasher.finalize(), self.revision)
    }
}
