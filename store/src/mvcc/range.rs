//! Reading keys: etcd's Range with all its options.

use super::index::{History, Keys};
use super::{Store, Version};
use crate::refused::Refused;
use crate::wire::{self, Range};
use std::cmp::Ordering;

/// A range read that may let go of the store between steps: what it has read is fixed to one revision.
#[derive(Debug, Default)]
pub struct Scan {
    /// The revision that is read and the store's when the read began; `None` before the first step.
    revisions: Option<(i64, i64)>,
    last_key: Option<Box<[u8]>>,
    found: Vec<Version>,
    count: i64,
}

/// What a range came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeResult {
    /// The store's revision when the read began, not the one that was read.
    pub revision: i64,
    /// The keys, in the order asked for.
    pub versions: Vec<Version>,
    /// How many keys the range has, regardless of limit and bounds.
    pub count: i64,
    /// Whether the limit cut something off.
    pub more: bool,
    keys_only: bool,
}

impl RangeResult {
    /// Appends the fields of a `RangeResponse` but for the header.
    pub fn encode(&self, out: &mut Vec<u8>) {
        if !self.keys_only {
            out.reserve(self.versions.iter().map(Version::field_len).sum::<usize>() + 16);
        }
        for version in &self.versions {
            version.put_field(out, 2, self.keys_only);
        }
        wire::put_flag(out, 3, self.more);
        wire::put_int(out, 4, self.count);
    }
}

impl Store {
    /// Reads at once.
    ///
    /// # Errors
    /// [`Refused::Compacted`] or [`Refused::FutureRevision`].
    pub fn range(&self, request: &Range<'_>) -> Result<RangeResult, Refused> {
        self.range_within(request, self.revision)
    }

    /// Reads within a transaction that has reached revision `current`.
    pub(super) fn range_within(&self, request: &Range<'_>, current: i64) -> Result<RangeResult, Refused> {
        let mut scan = Scan::default();
        self.step(request, current, &mut scan, usize::MAX)?;
        Ok(scan.finish(request))
    }

    /// Reads up to `max_keys` more keys; whether the scan is complete.
    ///
    /// # Errors
    /// [`Refused::Compacted`] or [`Refused::FutureRevision`]; the former also when it was compacted between two steps.
    pub fn scan(&self, request: &Range<'_>, scan: &mut Scan, max_keys: usize) -> Result<bool, Refused> {
        self.step(request, self.revision, scan, max_keys)
    }

    fn step(&self, request: &Range<'_>, current: i64, scan: &mut Scan, max_keys: usize) -> Result<bool, Refused> {
        let (revision, _) = match scan.revisions {
            Some(revisions) => revisions,
            None => {
                self.check_revision(request.revision, current)?;
                let revision = if request.revision > 0 { request.revision } else { current };
                *scan.revisions.insert((revision, current))
            }
        };
        if revision < self.compacted {
            return Err(Refused::Compacted);
        }
        let keys = Keys::of(request.key, request.range_end);
        let wanted = wanted(request);
        let last_key = scan.last_key.take();
        for (walked, (key, history)) in self.index.range(keys, last_key.as_deref()).enumerate() {
            if walked >= max_keys {
                return Ok(false);
            }
            if max_keys != usize::MAX && walked + 1 == max_keys {
                scan.last_key = Some(key.into());
            }
            let Some(version) = in_force(history, revision) else { continue };
            scan.count += 1;
            if scan.found.len() < wanted && within_bounds(version, &request.bounds) {
                scan.found.push(version.clone());
            }
        }
        Ok(true)
    }
}

fn in_force(history: &History, revision: i64) -> Option<&Version> {
    history.at(revision).filter(|version| !version.is_tombstone)
}

/// How many keys must be looked at in key order before the limit may cut: sorting and bounds need all of them. The one
/// beyond the limit tells that there is more.
fn wanted(request: &Range<'_>) -> usize {
    if request.count_only {
        return 0;
    }
    let all = request.limit <= 0 || request.sort_order != 0 || request.bounds != [0; 4];
    if all { usize::MAX } else { usize::try_from(request.limit).unwrap_or(usize::MAX).saturating_add(1) }
}

fn within_bounds(version: &Version, bounds: &[i64; 4]) -> bool {
    if *bounds == [0; 4] {
        return true;
    }
    let [min_mod, max_mod, min_create, max_create] = *bounds;
    let kv = version.kv();
    let inside = |value: i64, min: i64, max: i64| (min == 0 || value >= min) && (max == 0 || value <= max);
    inside(kv.mod_revision, min_mod, max_mod) && inside(kv.create_revision, min_create, max_create)
}

impl Scan {
    /// Sorts and cuts what was read.
    pub fn finish(self, request: &Range<'_>) -> RangeResult {
        let mut versions = self.found;
        // Another target without an order is ascending; keys are in ascending order already.
        let order = if request.sort_order == 0 && request.sort_target != 0 { 1 } else { request.sort_order };
        let by = |a: &Version, b: &Version| match request.sort_target {
            1 => a.kv().version.cmp(&b.kv().version),
            2 => a.kv().create_revision.cmp(&b.kv().create_revision),
            3 => a.at.main.cmp(&b.at.main),
            4 => a.kv().value.cmp(b.kv().value),
            _ => a.key().cmp(b.key()),
        };
        match order {
            1 if request.sort_target != 0 => versions.sort_by(by),
            2 => versions.sort_by(|a, b| Ordering::reverse(by(a, b))),
            _ => {}
        }
        let limit = if request.limit > 0 { usize::try_from(request.limit).unwrap_or(usize::MAX) } else { usize::MAX };
        let more = versions.len() > limit;
        versions.truncate(limit);
        let revision = self.revisions.map_or(0, |(_, current)| current);
        RangeResult { revision, versions, count: self.count, more, keys_only: request.keys_only }
    }
}
