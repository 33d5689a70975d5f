//! A store that anybody can check by reading: every revision is a whole map, kept for ever.

use etcd_client::proto::*;
use std::collections::{BTreeMap, BTreeSet};

pub type Keys = BTreeMap<Vec<u8>, PbKeyValue>;

/// One change, as a watcher sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    pub kv: PbKeyValue,
    pub is_delete: bool,
    pub previous: Option<PbKeyValue>,
}

#[derive(Debug, Clone)]
pub struct Model {
    /// The keys as of each revision; the first entry is revision 1.
    pub states: Vec<Keys>,
    pub changes: Vec<Change>,
    pub leases: BTreeMap<i64, i64>,
    pub compacted: i64,
}

fn is_in(key: &[u8], from: &[u8], end: &[u8]) -> bool {
    match end {
        [] => key == from,
        [0] => key >= from,
        end => key >= from && key < end,
    }
}

/// The keys while a transaction goes on.
struct Pending {
    keys: Keys,
    changes: Vec<Change>,
    /// The revision that is being written.
    main: i64,
}

impl Default for Model {
    fn default() -> Self {
        Self { states: vec![Keys::new()], changes: Vec::new(), leases: BTreeMap::new(), compacted: -1 }
    }
}

impl Model {
    pub fn revision(&self) -> i64 {
        self.states.len() as i64
    }

    pub fn now(&self) -> &Keys {
        self.states.last().unwrap()
    }

    fn begin(&self) -> Pending {
        Pending { keys: self.now().clone(), changes: Vec::new(), main: self.revision() + 1 }
    }

    fn end(&mut self, pending: Pending) {
        if !pending.changes.is_empty() {
            // What was there before is what the revision before says, and a new life has no past.
            let before = self.now().clone();
            let changes = pending.changes.into_iter().map(|mut change| {
                let is_new = !change.is_delete && change.kv.create_revision == change.kv.mod_revision;
                change.previous = if is_new { None } else { before.get(&change.kv.key).cloned() };
                change
            });
            self.changes.extend(changes);
            self.states.push(pending.keys);
        }
    }

    /// The keys of a range at a revision, in the way and to the number that is asked for.
    pub fn range(&self, request: &PbRangeRequest) -> Result<(Vec<PbKeyValue>, bool, i64), ()> {
        let revision = if request.revision > 0 { request.revision } else { self.revision() };
        if revision > self.revision() || revision < self.compacted {
            return Err(());
        }
        Ok(select(&self.states[revision as usize - 1], request))
    }

    pub fn put(&mut self, request: &PbPutRequest) -> Result<(), ()> {
        if request.lease != 0 && !self.leases.contains_key(&request.lease) {
            return Err(());
        }
        if (request.ignore_value || request.ignore_lease) && !self.now().contains_key(&request.key) {
            return Err(());
        }
        let mut pending = self.begin();
        pending.put(request);
        self.end(pending);
        Ok(())
    }

    pub fn delete(&mut self, request: &PbDeleteRequest) -> i64 {
        let mut pending = self.begin();
        let deleted = pending.delete(request);
        self.end(pending);
        deleted
    }

    /// Whether it succeeded, and what its reads and deletes found, in order.
    pub fn txn(&mut self, txn: &PbTxnRequest) -> Result<(bool, Vec<i64>), ()> {
        let mut ops = Vec::new();
        let succeeded = self.flatten(txn, &mut ops);
        for op in &ops {
            match op {
                PbTxnOpRequest::RequestPut(put) => {
                    let is_kept = put.ignore_value || put.ignore_lease;
                    if is_kept && !self.now().contains_key(&put.key)
                        || put.lease != 0 && !self.leases.contains_key(&put.lease)
                    {
                        return Err(());
                    }
                }
                PbTxnOpRequest::RequestRange(range)
                    if range.revision != 0 && (range.revision > self.revision() || range.revision < self.compacted) =>
                {
                    return Err(());
                }
                _ => {}
            }
        }
        let (mut pending, mut found) = (self.begin(), Vec::new());
        for op in &ops {
            match op {
                PbTxnOpRequest::RequestPut(put) => pending.put(put),
                PbTxnOpRequest::RequestDeleteRange(delete) => found.push(pending.delete(delete)),
                PbTxnOpRequest::RequestRange(range) => {
                    let keys =
                        if range.revision > 0 { &self.states[range.revision as usize - 1] } else { &pending.keys };
                    found.push(select(keys, range).2);
                }
                PbTxnOpRequest::RequestTxn(_) => {}
            }
        }
        self.end(pending);
        Ok((succeeded, found))
    }

    fn flatten(&self, txn: &PbTxnRequest, ops: &mut Vec<PbTxnOpRequest>) -> bool {
        let holds = txn.compare.iter().all(|compare| self.holds(compare));
        for op in if holds { &txn.success } else { &txn.failure } {
            match &op.request {
                Some(PbTxnOpRequest::RequestTxn(nested)) => {
                    self.flatten(nested, ops);
                }
                Some(other) => ops.push(other.clone()),
                None => {}
            }
        }
        holds
    }

    fn holds(&self, compare: &PbCompare) -> bool {
        let found: Vec<_> = self.now().values().filter(|kv| is_in(&kv.key, &compare.key, &compare.range_end)).collect();
        if found.is_empty() {
            return compare.target != 3 && holds_for(compare, &PbKeyValue::default());
        }
        found.into_iter().all(|kv| holds_for(compare, kv))
    }

    pub fn grant(&mut self, id: i64, ttl: i64) -> Result<(), ()> {
        if ttl > 9_000_000_000 || self.leases.contains_key(&id) {
            return Err(());
        }
        self.leases.insert(id, ttl.max(2));
        Ok(())
    }

    pub fn revoke(&mut self, ids: &[i64]) -> Result<(), ()> {
        let gone: BTreeSet<i64> = ids.iter().copied().filter(|id| self.leases.remove(id).is_some()).collect();
        if gone.is_empty() {
            return Err(());
        }
        let mut pending = self.begin();
        let keys: Vec<Vec<u8>> =
            self.now().values().filter(|kv| gone.contains(&kv.lease)).map(|kv| kv.key.clone()).collect();
        for key in keys {
            pending.delete(&PbDeleteRequest { key, ..Default::default() });
        }
        self.end(pending);
        Ok(())
    }

    pub fn compact(&mut self, revision: i64) -> Result<(), ()> {
        if revision <= self.compacted || revision > self.revision() {
            return Err(());
        }
        self.compacted = revision;
        Ok(())
    }
}

impl Pending {
    fn put(&mut self, request: &PbPutRequest) {
        let old = self.keys.get(&request.key);
        let kv = PbKeyValue {
            key: request.key.clone(),
            create_revision: old.map_or(self.main, |old| old.create_revision),
            mod_revision: self.main,
            version: old.map_or(0, |old| old.version) + 1,
            value: if request.ignore_value { old.unwrap().value.clone() } else { request.value.clone() },
            lease: if request.ignore_lease { old.unwrap().lease } else { request.lease },
        };
        self.keys.insert(request.key.clone(), kv.clone());
        self.changes.push(Change { kv, is_delete: false, previous: None });
    }

    fn delete(&mut self, request: &PbDeleteRequest) -> i64 {
        let gone: Vec<Vec<u8>> =
            self.keys.keys().filter(|key| is_in(key, &request.key, &request.range_end)).cloned().collect();
        for key in &gone {
            self.keys.remove(key);
            let kv = PbKeyValue { key: key.clone(), mod_revision: self.main, ..Default::default() };
            self.changes.push(Change { kv, is_delete: true, previous: None });
        }
        gone.len() as i64
    }
}

fn select(keys: &Keys, request: &PbRangeRequest) -> (Vec<PbKeyValue>, bool, i64) {
    let mut found: Vec<PbKeyValue> =
        keys.values().filter(|kv| is_in(&kv.key, &request.key, &request.range_end)).cloned().collect();
    let count = found.len() as i64;
    if request.count_only {
        return (Vec::new(), false, count);
    }
    let limit = if request.limit > 0 { request.limit as usize } else { usize::MAX };
    let has_bounds = request.min_mod_revision != 0
        || request.max_mod_revision != 0
        || request.min_create_revision != 0
        || request.max_create_revision != 0;
    if request.sort_order == 0 && !has_bounds {
        // Without an order that is named, etcd cuts before it sorts.
        found.truncate(limit.saturating_add(1));
    }
    let inside = |value: i64, min: i64, max: i64| (min == 0 || value >= min) && (max == 0 || value <= max);
    found.retain(|kv| {
        inside(kv.mod_revision, request.min_mod_revision, request.max_mod_revision)
            && inside(kv.create_revision, request.min_create_revision, request.max_create_revision)
    });
    match request.sort_target {
        0 => {}
        1 => found.sort_by_key(|kv| kv.version),
        2 => found.sort_by_key(|kv| kv.create_revision),
        3 => found.sort_by_key(|kv| kv.mod_revision),
        _ => found.sort_by(|a, b| a.value.cmp(&b.value)),
    }
    if request.sort_order == 2 {
        // Descending, but keys that tie stay in the order of their names: turn around twice.
        found.reverse();
        let same = |a: &PbKeyValue, b: &PbKeyValue| match request.sort_target {
            0 => a.key == b.key,
            1 => a.version == b.version,
            2 => a.create_revision == b.create_revision,
            3 => a.mod_revision == b.mod_revision,
            _ => a.value == b.value,
        };
        found.chunk_by_mut(same).for_each(<[PbKeyValue]>::reverse);
    }
    let more = found.len() > limit;
    found.truncate(limit);
    if request.keys_only {
        found.iter_mut().for_each(|kv| kv.value.clear());
    }
    (found, more, count)
}

fn holds_for(compare: &PbCompare, kv: &PbKeyValue) -> bool {
    let number = |ours: i64, given: Option<i64>| ours.cmp(&given.unwrap_or(0));
    let ordering = match (compare.target, &compare.target_union) {
        (0, Some(PbTargetUnion::Version(given))) => number(kv.version, Some(*given)),
        (0, _) => number(kv.version, None),
        (1, Some(PbTargetUnion::CreateRevision(given))) => number(kv.create_revision, Some(*given)),
        (1, _) => number(kv.create_revision, None),
        (2, Some(PbTargetUnion::ModRevision(given))) => number(kv.mod_revision, Some(*given)),
        (2, _) => number(kv.mod_revision, None),
        (3, Some(PbTargetUnion::Value(given))) => kv.value.cmp(given),
        (3, _) => kv.value.cmp(&Vec::new()),
        (_, Some(PbTargetUnion::Lease(given))) => number(kv.lease, Some(*given)),
        _ => number(kv.lease, None),
    };
    match compare.result {
        0 => ordering.is_eq(),
        1 => ordering.is_gt(),
        2 => ordering.is_lt(),
        _ => ordering.is_ne(),
    }
}
