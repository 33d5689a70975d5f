//! Random requests, good and bad, that a seed replays.

use super::Rng;
use etcd_client::proto::*;

/// Keys are `a00` to `a11` and `b00` to `b11`: a prefix never has more than 12 keys.
const KEYS_PER_PREFIX: u64 = 12;

/// Makes requests that fit the state of the store, mostly.
pub struct Requests {
    pub rng: Rng,
    pub revision: i64,
    pub compacted: i64,
    pub leases: Vec<i64>,
}

impl Requests {
    pub fn new(seed: u64) -> Self {
        Self { rng: Rng(seed), revision: 1, compacted: -1, leases: Vec::new() }
    }

    pub fn key(&mut self) -> Vec<u8> {
        if self.rng.one_in(200) {
            return Vec::new();
        }
        let prefix = if self.rng.one_in(2) { 'a' } else { 'b' };
        format!("{prefix}{:02}", self.rng.below(KEYS_PER_PREFIX)).into_bytes()
    }

    /// A range that is not everything, so that deletes leave something to work with.
    pub fn few_keys(&mut self) -> (Vec<u8>, Vec<u8>) {
        let (key, range_end) = self.keys();
        let is_wide = range_end == [0] || range_end.len() == 1;
        if is_wide && !self.rng.one_in(6) { (self.key(), Vec::new()) } else { (key, range_end) }
    }

    pub fn keys(&mut self) -> (Vec<u8>, Vec<u8>) {
        let key = self.key();
        match self.rng.below(10) {
            0..4 => (key, Vec::new()),
            4 => (b"a".to_vec(), b"b".to_vec()),
            5 => (b"b".to_vec(), b"c".to_vec()),
            6 => (key, vec![0]),
            7 => (vec![0], vec![0]),
            _ => (key, self.key()),
        }
    }

    pub fn some_revision(&mut self) -> i64 {
        match self.rng.below(12) {
            0 => self.revision + 1 + self.rng.below(3) as i64,
            1 => self.compacted - 1,
            2 => self.compacted,
            _ => {
                let low = self.compacted.max(1);
                low + self.rng.below((self.revision - low + 1).unsigned_abs()) as i64
            }
        }
    }

    pub fn lease(&mut self) -> i64 {
        if self.leases.is_empty() || self.rng.one_in(20) {
            return self.rng.below(30) as i64 + 1;
        }
        *self.rng.pick(&self.leases)
    }

    pub fn range(&mut self) -> PbRangeRequest {
        let (mut key, mut range_end) = self.keys();
        let mut request = PbRangeRequest::default();
        if self.rng.one_in(3) {
            request.revision = self.some_revision();
        }
        if self.rng.one_in(3) {
            request.limit = self.rng.below(14) as i64 - 1;
        }
        if self.rng.one_in(3) {
            request.sort_order = self.rng.below(3) as i32;
            request.sort_target = self.rng.below(5) as i32;
            // More than 12 keys that tie come in an order of Go's own.
            if request.sort_target != 0 {
                (key, range_end) =
                    if self.rng.one_in(2) { (b"a".to_vec(), b"b".to_vec()) } else { (b"b".to_vec(), b"c".to_vec()) };
            }
        }
        request.keys_only = self.rng.one_in(5);
        request.count_only = self.rng.one_in(8);
        request.serializable = self.rng.one_in(3);
        if self.rng.one_in(4) {
            for bound in [
                &mut request.min_mod_revision,
                &mut request.max_mod_revision,
                &mut request.min_create_revision,
                &mut request.max_create_revision,
            ] {
                if self.rng.one_in(2) {
                    *bound = self.rng.below(self.revision.unsigned_abs() + 2) as i64;
                }
            }
        }
        PbRangeRequest { key, range_end, ..request }
    }

    pub fn put(&mut self) -> PbPutRequest {
        let mut request = PbPutRequest { key: self.key(), ..Default::default() };
        if !self.rng.one_in(12) {
            request.value = format!("v{}", self.rng.below(20)).into_bytes();
        }
        if self.rng.one_in(5) {
            request.lease = self.lease();
        }
        request.prev_kv = self.rng.one_in(3);
        if self.rng.one_in(12) {
            request.ignore_value = true;
            if !self.rng.one_in(5) {
                request.value = Vec::new();
            }
        }
        if self.rng.one_in(12) {
            request.ignore_lease = true;
            if !self.rng.one_in(5) {
                request.lease = 0;
            }
        }
        request
    }

    pub fn delete(&mut self) -> PbDeleteRequest {
        let (key, range_end) = if self.rng.one_in(8) { self.few_keys() } else { (self.key(), Vec::new()) };
        PbDeleteRequest { key, range_end, prev_kv: self.rng.one_in(2) }
    }

    pub fn compare_op(&mut self) -> PbCompare {
        let (key, range_end) = if self.rng.one_in(4) { self.keys() } else { (self.key(), Vec::new()) };
        let number = match self.rng.below(4) {
            0 => 0,
            1 => 1 + self.rng.below(3) as i64,
            _ => self.some_revision(),
        };
        let lease = self.lease();
        let target = self.rng.below(5) as i32;
        // Now and then the value does not belong to the target.
        let union = if self.rng.one_in(15) { self.rng.below(6) as i32 } else { target };
        let target_union = match union {
            0 => Some(PbTargetUnion::Version(number.min(4))),
            1 => Some(PbTargetUnion::CreateRevision(number)),
            2 => Some(PbTargetUnion::ModRevision(number)),
            3 => Some(PbTargetUnion::Value(format!("v{}", self.rng.below(20)).into_bytes())),
            4 => Some(PbTargetUnion::Lease(if self.rng.one_in(2) { 0 } else { lease })),
            _ => None,
        };
        PbCompare { result: self.rng.below(4) as i32, target, key, range_end, target_union }
    }

    pub fn txn(&mut self) -> PbTxnRequest {
        let mut txn = self.nested_txn(0);
        // etcd checks that a kept value is there before the transaction, and panics when the transaction itself has
        // removed it; only deletes "from key on" get past the check for overlaps.
        if ops(&txn).any(|op| matches!(op, PbTxnOpRequest::RequestPut(put) if put.ignore_value || put.ignore_lease)) {
            narrow(&mut txn);
        }
        txn
    }

    fn nested_txn(&mut self, depth: u64) -> PbTxnRequest {
        let mut txn = PbTxnRequest::default();
        for _ in 0..self.rng.below(3) {
            txn.compare.push(self.compare_op());
        }
        let only_reads = self.rng.one_in(5);
        for branch in 0..2 {
            for _ in 0..self.rng.below(5) {
                let request = match self.rng.below(12) {
                    _ if only_reads => Some(PbTxnOpRequest::RequestRange(self.range())),
                    0..4 => Some(PbTxnOpRequest::RequestRange(self.range())),
                    4..8 => Some(PbTxnOpRequest::RequestPut(self.put())),
                    8..10 => Some(PbTxnOpRequest::RequestDeleteRange(self.delete())),
                    10 if depth < 2 => Some(PbTxnOpRequest::RequestTxn(self.nested_txn(depth + 1))),
                    11 if self.rng.one_in(20) => None,
                    _ => Some(PbTxnOpRequest::RequestRange(self.range())),
                };
                let ops = if branch == 0 { &mut txn.success } else { &mut txn.failure };
                ops.push(PbTxnRequestOp { request });
            }
        }
        if self.rng.one_in(300) {
            let op = PbTxnRequestOp { request: Some(PbTxnOpRequest::RequestRange(self.range())) };
            txn.success = vec![op; 127 + self.rng.below(4) as usize];
        }
        txn
    }
}

/// Every operation, nested ones too.
fn ops(txn: &PbTxnRequest) -> Box<dyn Iterator<Item = &PbTxnOpRequest> + '_> {
    let all = txn.success.iter().chain(&txn.failure).filter_map(|op| op.request.as_ref());
    Box::new(all.flat_map(|op| {
        let nested: Box<dyn Iterator<Item = &PbTxnOpRequest>> = match op {
            PbTxnOpRequest::RequestTxn(nested) => ops(nested),
            _ => Box::new(std::iter::empty()),
        };
        std::iter::once(op).chain(nested)
    }))
}

/// Makes deletes "from key on" deletes of one key.
fn narrow(txn: &mut PbTxnRequest) {
    for op in txn.success.iter_mut().chain(&mut txn.failure) {
        match &mut op.request {
            Some(PbTxnOpRequest::RequestDeleteRange(delete)) if delete.range_end == [0] => delete.range_end.clear(),
            Some(PbTxnOpRequest::RequestTxn(nested)) => narrow(nested),
            _ => {}
        }
    }
}
