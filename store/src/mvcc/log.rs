//! The revision log: every version that is still kept, in order.

use super::version::{Revision, Version};
use std::sync::Arc;

/// Versions per segment: 16 KiB of entries, which is what a write copies at most while a snapshot is being taken.
const SEGMENT: usize = 512;

/// Versions in the order of their revisions, in shared segments: a clone is a snapshot, and costs a pointer per segment.
#[derive(Debug, Clone, Default)]
pub struct Log {
    segments: Vec<Arc<Vec<Version>>>,
    len: usize,
}

impl Log {
    /// How many versions.
    pub fn len(&self) -> usize {
        self.len
    }

    /// The last version.
    pub fn last(&self) -> Option<&Version> {
        self.segments.last().and_then(|segment| segment.last())
    }

    /// Appends a version, which comes after all others.
    pub fn push(&mut self, version: Version) {
        match self.segments.last_mut() {
            Some(last) if last.len() < SEGMENT => Arc::make_mut(last).push(version),
            _ => {
                let mut segment = Vec::with_capacity(SEGMENT);
                segment.push(version);
                self.segments.push(Arc::new(segment));
            }
        }
        self.len += 1;
    }

    /// The versions from revision `main` on.
    pub fn from(&self, main: i64) -> impl Iterator<Item = &Version> {
        let first = self.segments.partition_point(|segment| segment.last().is_some_and(|last| last.at.main < main));
        let skip = self.segments.get(first).map_or(0, |segment| segment.partition_point(|v| v.at.main < main));
        self.segments.iter().skip(first).flat_map(|segment| segment.iter()).skip(skip)
    }

    /// The version at a place in the history.
    pub fn get(&self, at: Revision) -> Option<&Version> {
        let segment = self.segments.get(self.segment_of(at))?;
        segment.binary_search_by_key(&at, |version| version.at).ok().and_then(|index| segment.get(index))
    }

    fn segment_of(&self, at: Revision) -> usize {
        self.segments.partition_point(|segment| segment.last().is_some_and(|last| last.at < at))
    }

    /// Takes out the versions at `dead`, which is sorted; segments that become sparse are joined.
    pub fn remove(&mut self, dead: &[Revision]) {
        let mut rest = dead;
        let mut touched: Option<(usize, usize)> = None;
        while let Some(&first) = rest.first() {
            let index = self.segment_of(first);
            let Some(segment) = self.segments.get_mut(index) else { break };
            let Some(last) = segment.last().map(|last| last.at) else { break };
            let (here, later) = rest.split_at(rest.partition_point(|at| *at <= last));
            let segment = Arc::make_mut(segment);
            let before = segment.len();
            let mut here = here.iter().peekable();
            segment.retain(|version| {
                while here.next_if(|at| **at < version.at).is_some() {}
                here.next_if(|at| **at == version.at).is_none()
            });
            self.len -= before - segment.len();
            touched = Some((touched.map_or(index, |(first, _)| first), index));
            // An emptied segment has no last version to search by, so it goes at once.
            if segment.is_empty() {
                self.segments.remove(index);
            }
            rest = later;
        }
        if let Some((first, last)) = touched {
            self.join(first.saturating_sub(1), (last + 2).min(self.segments.len()));
        }
    }

    /// Joins neighbours among the segments `first..end` that fit into half a segment, so that old, thin segments do not
    /// pile up.
    fn join(&mut self, first: usize, end: usize) {
        let some: Vec<_> = self.segments.drain(first.min(end)..end).collect();
        let mut joined: Vec<Arc<Vec<Version>>> = Vec::with_capacity(some.len());
        for mut segment in some {
            match joined.last_mut() {
                Some(last) if last.len() + segment.len() <= SEGMENT / 2 => {
                    Arc::make_mut(last).extend(segment.iter().cloned());
                }
                _ => {
                    // The room in a thin segment is worth more than the copy.
                    if segment.capacity() > 2 * segment.len() + 64
                        && let Some(segment) = Arc::get_mut(&mut segment)
                    {
                        segment.shrink_to_fit();
                    }
                    joined.push(segment);
                }
            }
        }
        let at = first.min(self.segments.len());
        self.segments.splice(at..at, joined);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::KeyValue;

    fn version(main: i64, sub: u32) -> Version {
        let kv = KeyValue { key: b"k", mod_revision: main, ..KeyValue::default() };
        Version::new(Revision { main, sub }, false, &kv, &mut Vec::new())
    }

    #[test]
    fn what_is_taken_out_is_gone_and_the_rest_is_found() {
        let mut log = Log::default();
        for main in 0..5_000 {
            log.push(version(main, 0));
            log.push(version(main, 1));
        }
        let before = log.clone();
        let dead: Vec<Revision> = (0..4_900)
            .flat_map(|main| [Revision { main, sub: 0 }, Revision { main, sub: 1 }])
            .filter(|at| at.main % 100 != 0 || at.sub == 0)
            .collect();
        log.remove(&dead);
        assert_eq!(log.len(), 49 + 200);
        assert!(log.segments.len() < 8, "sparse segments are joined: {}", log.segments.len());
        assert_eq!(log.from(4_800).map(|v| v.at.main).take(3).collect::<Vec<_>>(), [4_800, 4_900, 4_900]);
        assert_eq!(log.get(Revision { main: 300, sub: 1 }).map(|v| v.at.main), Some(300));
        assert_eq!(log.get(Revision { main: 300, sub: 0 }), None);
        assert_eq!(before.len(), 10_000, "a clone keeps what it saw");
        assert_eq!(before.from(0).count(), 10_000);
    }
}
