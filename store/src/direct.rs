//! Transactions of code in the store's own process.
//!
//! An etcd client makes messages of its own of what it is given, encodes them, and has the answer decoded, which for an API server that lives
//! beside its store costs more than the store's work. Here a transaction is encoded once, from where its keys and values lie, into the form
//! in which it goes through the log.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use tonic::Status;

use crate::etcdapi::Face;
use crate::replica::run::Replica;
use crate::wire::{self, Compare, DeleteRange, Fields, KeyValue, Malformed, Op, Put, Range, Target, Txn};

/// Carries out transactions. Cheap to clone.
#[derive(Clone)]
pub struct Transactor {
    face: Arc<Face<Replica>>,
}

/// What became of a transaction. `TxnResponse`, without its header.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// Whether everything that was compared held.
    pub succeeded: bool,
    /// Answers to the operations that were done, in their order.
    pub done: Vec<Done>,
}

/// What became of one operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    /// A read: what it found.
    Found(Vec<Found>),
    /// A change.
    Changed,
    /// A transaction in the transaction.
    Txn(Answer),
}

/// A key that a read has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The key.
    pub key: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
    /// The revision of its last write.
    pub mod_revision: i64,
}

impl fmt::Debug for Transactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Transactor")
    }
}

impl Transactor {
    pub(crate) fn new(face: Arc<Face<Replica>>) -> Self {
        Self { face }
    }

    /// Carries a transaction out; the store's revision with the answer. It is held against the same limits as one that comes from outside.
    ///
    /// # Errors
    /// What a client of etcd would be told.
    pub async fn txn(&self, txn: &Txn<'_>) -> Result<(i64, Answer), Status> {
        let mut request = Vec::new();
        encode_txn(txn, &mut request);
        let (revision, answer) = self.face.transact(&Bytes::from(request)).await?;
        let answer = decode_answer(&answer).map_err(|malformed| Status::internal(malformed.to_string()))?;
        Ok((revision, answer))
    }
}

/// Appends a `TxnRequest`.
fn encode_txn(txn: &Txn<'_>, out: &mut Vec<u8>) {
    for compare in &txn.compare {
        wire::put_nested(out, 1, |out| encode_compare(compare, out));
    }
    for (field, branch) in [(2, &txn.success), (3, &txn.failure)] {
        for op in branch {
            wire::put_nested(out, field, |out| encode_op(op, out));
        }
    }
}

fn encode_compare(compare: &Compare<'_>, out: &mut Vec<u8>) {
    wire::put_int(out, 1, compare.result);
    wire::put_int(out, 2, compare.target);
    wire::put_bytes(out, 3, compare.key);
    match compare.against {
        Target::Unset => {}
        // Of a oneof a zero is there, too.
        Target::Number(field, number) => {
            wire::put_varint(out, field << 3);
            wire::put_varint(out, number as u64);
        }
        Target::Value(value) => wire::put_message(out, 7, value),
    }
    wire::put_bytes(out, 64, compare.range_end);
}

fn encode_op(op: &Op<'_>, out: &mut Vec<u8>) {
    match op {
        Op::None => {}
        Op::Range(range) => wire::put_nested(out, 1, |out| encode_range(range, out)),
        Op::Put(put) => wire::put_nested(out, 2, |out| {
            let Put { key, value, lease, prev_kv, ignore_value, ignore_lease } = put;
            wire::put_bytes(out, 1, key);
            wire::put_bytes(out, 2, value);
            wire::put_int(out, 3, *lease);
            for (field, flag) in [(4, prev_kv), (5, ignore_value), (6, ignore_lease)] {
                wire::put_flag(out, field, *flag);
            }
        }),
        Op::DeleteRange(delete) => wire::put_nested(out, 3, |out| {
            let DeleteRange { key, range_end, prev_kv } = delete;
            wire::put_bytes(out, 1, key);
            wire::put_bytes(out, 2, range_end);
            wire::put_flag(out, 3, *prev_kv);
        }),
        Op::Txn(txn) => wire::put_nested(out, 4, |out| encode_txn(txn, out)),
    }
}

fn encode_range(range: &Range<'_>, out: &mut Vec<u8>) {
    let Range { key, range_end, limit, revision, sort_order, sort_target, serializable, keys_only, count_only, bounds } =
        range;
    wire::put_bytes(out, 1, key);
    wire::put_bytes(out, 2, range_end);
    for (field, number) in [(3, limit), (4, revision), (5, sort_order), (6, sort_target)] {
        wire::put_int(out, field, *number);
    }
    for (field, flag) in [(7, serializable), (8, keys_only), (9, count_only)] {
        wire::put_flag(out, field, *flag);
    }
    for (field, bound) in (10..).zip(bounds) {
        wire::put_int(out, field, *bound);
    }
}

fn decode_answer(bytes: &[u8]) -> Result<Answer, Malformed> {
    let mut fields = Fields::new("TxnResponse", bytes);
    let mut answer = Answer::default();
    while let Some((number, value)) = fields.next()? {
        match number {
            2 => answer.succeeded = value.flag()?,
            3 => answer.done.push(decode_done(value.bytes()?)?),
            _ => {}
        }
    }
    Ok(answer)
}

fn decode_done(bytes: &[u8]) -> Result<Done, Malformed> {
    let mut fields = Fields::new("ResponseOp", bytes);
    let mut done = Done::Changed;
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => done = Done::Found(decode_found(value.bytes()?)?),
            4 => done = Done::Txn(decode_answer(value.bytes()?)?),
            _ => {}
        }
    }
    Ok(done)
}

fn decode_found(bytes: &[u8]) -> Result<Vec<Found>, Malformed> {
    let mut fields = Fields::new("RangeResponse", bytes);
    let mut found = Vec::new();
    while let Some((number, value)) = fields.next()? {
        if number == 2 {
            let KeyValue { key, value, mod_revision, .. } = KeyValue::decode(value.bytes()?)?;
            found.push(Found { key: key.to_vec(), value: value.to_vec(), mod_revision });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mod_revision(key: &[u8], revision: i64) -> Compare<'_> {
        Compare { target: 2, key, against: Target::Number(6, revision), ..Compare::default() }
    }

    const ALL_OF_A: Range<'static> = Range {
        key: b"a",
        range_end: b"",
        limit: 0,
        revision: 0,
        sort_order: 0,
        sort_target: 0,
        serializable: true,
        keys_only: true,
        count_only: true,
        bounds: [1, 2, 3, 4],
    };

    #[test]
    fn what_is_encoded_is_read_as_it_was_meant() {
        let value = vec![7; 300];
        let inner = Txn {
            compare: vec![mod_revision(b"a", 0), mod_revision(b"b", 300)],
            success: vec![
                Op::Put(Put { key: b"a", value: &value, ..Put::default() }),
                Op::DeleteRange(DeleteRange { key: b"b", ..DeleteRange::default() }),
            ],
            failure: vec![
                Op::Range(Range { key: b"a", ..Range::default() }),
                Op::Range(Range { range_end: b"z", limit: 1, revision: 2, sort_order: 1, sort_target: 3, ..ALL_OF_A }),
                Op::Put(Put { key: b"c", lease: 7, prev_kv: true, ignore_value: true, ..Put::default() }),
            ],
        };
        let txn = Txn { success: vec![Op::Txn(inner.clone()), Op::Txn(Txn::default())], ..Txn::default() };
        for txn in [txn, inner] {
            let mut bytes = Vec::new();
            encode_txn(&txn, &mut bytes);
            assert_eq!(Txn::decode(&bytes).unwrap(), txn);
        }
    }
}
