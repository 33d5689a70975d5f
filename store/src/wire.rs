//! The protobuf wire form of etcd's hot messages, read in place and written by hand.
//!
//! A put crosses the face, the log and the state machine as the bytes that the client sent; nobody builds a message that
//! owns its fields. The messages that are rarely seen come from etcd-client's generated code instead.
//! Field numbers are those of etcd's `rpc.proto` and `kv.proto`.

use std::fmt;

/// Bytes that are not the message they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed {message}: {problem}")]
pub struct Malformed {
    /// What was read.
    pub message: &'static str,
    /// What is wrong with it.
    pub problem: &'static str,
}

/// How deep transactions may be nested; bounds the recursion of everything that walks them.
pub const MAX_TXN_DEPTH: usize = 32;

/// Reads fields one after the other.
pub(crate) struct Fields<'a> {
    rest: &'a [u8],
    message: &'static str,
}

/// One field's value.
#[derive(Clone, Copy)]
pub(crate) enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Other,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(message: &'static str, bytes: &'a [u8]) -> Self {
        Self { rest: bytes, message }
    }

    fn malformed(&self, problem: &'static str) -> Malformed {
        Malformed { message: self.message, problem }
    }

    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0u64;
        for (at, &byte) in self.rest.iter().enumerate().take(10) {
            value |= u64::from(byte & 0x7f) << (7 * at);
            if byte < 0x80 {
                self.rest = self.rest.get(at + 1..).unwrap_or_default();
                return Ok(value);
            }
        }
        Err(self.malformed("a number has no end"))
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8], Malformed> {
        let split = usize::try_from(len).ok().and_then(|len| self.rest.split_at_checked(len));
        let (head, tail) = split.ok_or_else(|| self.malformed("it ends within a field"))?;
        self.rest = tail;
        Ok(head)
    }

    pub(crate) fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, Malformed> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => {
                self.take(8)?;
                Value::Other
            }
            2 => {
                let len = self.varint()?;
                Value::Bytes(self.take(len)?)
            }
            5 => {
                self.take(4)?;
                Value::Other
            }
            _ => return Err(self.malformed("a field has an unknown wire type")),
        };
        Ok(Some((tag >> 3, value)))
    }
}

impl<'a> Value<'a> {
    fn int(self) -> Result<i64, Malformed> {
        match self {
            Value::Varint(value) => Ok(value as i64),
            _ => Err(Malformed { message: "message", problem: "a number has another wire type" }),
        }
    }
    pub(crate) fn flag(self) -> Result<bool, Malformed> {
        Ok(self.int()? != 0)
    }
    pub(crate) fn bytes(self) -> Result<&'a [u8], Malformed> {
        match self {
            Value::Bytes(bytes) => Ok(bytes),
            _ => Err(Malformed { message: "message", problem: "bytes have another wire type" }),
        }
    }
}

/// `RangeRequest`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Range<'a> {
    /// First key.
    pub key: &'a [u8],
    /// Empty: the one key. `\0`: every key from `key` on. Otherwise the first key that is out.
    pub range_end: &'a [u8],
    /// Above 0: at most so many.
    pub limit: i64,
    /// Above 0: as of this revision.
    pub revision: i64,
    /// 0 none, 1 ascending, 2 descending.
    pub sort_order: i64,
    /// 0 key, 1 version, 2 create, 3 mod, 4 value.
    pub sort_target: i64,
    /// A member's own state will do.
    pub serializable: bool,
    /// Without values.
    pub keys_only: bool,
    /// Only the count.
    pub count_only: bool,
    /// When not 0: bounds for the keys' revisions, in the order min mod, max mod, min create, max create.
    pub bounds: [i64; 4],
}

/// `PutRequest`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Put<'a> {
    /// Whose value.
    pub key: &'a [u8],
    /// The value.
    pub value: &'a [u8],
    /// The lease that the key hangs on, or 0.
    pub lease: i64,
    /// Answer with what was there.
    pub prev_kv: bool,
    /// Keep the value.
    pub ignore_value: bool,
    /// Keep the lease.
    pub ignore_lease: bool,
}

/// `DeleteRangeRequest`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeleteRange<'a> {
    /// As in [`Range`].
    pub key: &'a [u8],
    /// As in [`Range`].
    pub range_end: &'a [u8],
    /// Answer with what was there.
    pub prev_kv: bool,
}

/// What a [`Compare`] holds against.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Target<'a> {
    /// Nothing was given: zero or nothing, by the target's kind.
    #[default]
    Unset,
    /// version, create revision, mod revision or lease, with the field's number.
    Number(u64, i64),
    /// The value.
    Value(&'a [u8]),
}

/// `Compare`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Compare<'a> {
    /// 0 equal, 1 greater, 2 less, 3 not equal.
    pub result: i64,
    /// 0 version, 1 create, 2 mod, 3 value, 4 lease.
    pub target: i64,
    /// As in [`Range`].
    pub key: &'a [u8],
    /// As in [`Range`].
    pub range_end: &'a [u8],
    /// With what.
    pub against: Target<'a>,
}

/// `RequestOp`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op<'a> {
    /// Nothing set; an error to etcd.
    None,
    /// A read.
    Range(Range<'a>),
    /// A write.
    Put(Put<'a>),
    /// A removal.
    DeleteRange(DeleteRange<'a>),
    /// A transaction in the transaction.
    Txn(Txn<'a>),
}

/// `TxnRequest`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn<'a> {
    /// All must hold for `success`.
    pub compare: Vec<Compare<'a>>,
    /// Done when they hold.
    pub success: Vec<Op<'a>>,
    /// Done when they do not.
    pub failure: Vec<Op<'a>>,
}

/// `CompactionRequest`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Compaction {
    /// What stays readable.
    pub revision: i64,
    /// Answer once the space is free.
    pub physical: bool,
}

impl<'a> Range<'a> {
    /// Reads the message.
    ///
    /// # Errors
    /// When the bytes are not one.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new("RangeRequest", bytes);
        let mut range = Self::default();
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => range.key = value.bytes()?,
                2 => range.range_end = value.bytes()?,
                3 => range.limit = value.int()?,
                4 => range.revision = value.int()?,
                5 => range.sort_order = value.int()?,
                6 => range.sort_target = value.int()?,
                7 => range.serializable = value.flag()?,
                8 => range.keys_only = value.flag()?,
                9 => range.count_only = value.flag()?,
                10 => range.bounds[0] = value.int()?,
                11 => range.bounds[1] = value.int()?,
                12 => range.bounds[2] = value.int()?,
                13 => range.bounds[3] = value.int()?,
                _ => {}
            }
        }
        Ok(range)
    }
}

impl<'a> Put<'a> {
    /// Reads the message.
    ///
    /// # Errors
    /// When the bytes are not one.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new("PutRequest", bytes);
        let mut put = Self::default();
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => put.key = value.bytes()?,
                2 => put.value = value.bytes()?,
                3 => put.lease = value.int()?,
                4 => put.prev_kv = value.flag()?,
                5 => put.ignore_value = value.flag()?,
                6 => put.ignore_lease = value.flag()?,
                _ => {}
            }
        }
        Ok(put)
    }
}

impl<'a> DeleteRange<'a> {
    /// Reads the message.
    ///
    /// # Errors
    /// When the bytes are not one.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new("DeleteRangeRequest", bytes);
        let mut delete = Self::default();
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => delete.key = value.bytes()?,
                2 => delete.range_end = value.bytes()?,
                3 => delete.prev_kv = value.flag()?,
                _ => {}
            }
        }
        Ok(delete)
    }
}

impl<'a> Compare<'a> {
    fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new("Compare", bytes);
        let mut compare = Self::default();
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => compare.result = value.int()?,
                2 => compare.target = value.int()?,
                3 => compare.key = value.bytes()?,
                4 | 5 | 6 | 8 => compare.against = Target::Number(number, value.int()?),
                7 => compare.against = Target::Value(value.bytes()?),
                64 => compare.range_end = value.bytes()?,
                _ => {}
            }
        }
        Ok(compare)
    }
}

impl<'a> Op<'a> {
    fn decode(bytes: &'a [u8], depth: usize) -> Result<Self, Malformed> {
        let mut fields = Fields::new("RequestOp", bytes);
        let mut op = Op::None;
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => op = Op::Range(Range::decode(value.bytes()?)?),
                2 => op = Op::Put(Put::decode(value.bytes()?)?),
                3 => op = Op::DeleteRange(DeleteRange::decode(value.bytes()?)?),
                4 => op = Op::Txn(Txn::decode_nested(value.bytes()?, depth + 1)?),
                _ => {}
            }
        }
        Ok(op)
    }
}

impl<'a> Txn<'a> {
    /// Reads the message.
    ///
    /// # Errors
    /// When the bytes are not one, or it is nested deeper than [`MAX_TXN_DEPTH`].
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        Self::decode_nested(bytes, 0)
    }

    fn decode_nested(bytes: &'a [u8], depth: usize) -> Result<Self, Malformed> {
        let mut fields = Fields::new("TxnRequest", bytes);
        if depth > MAX_TXN_DEPTH {
            return Err(fields.malformed("transactions are nested more than 32 deep"));
        }
        let mut txn = Self::default();
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => txn.compare.push(Compare::decode(value.bytes()?)?),
                2 => txn.success.push(Op::decode(value.bytes()?, depth)?),
                3 => txn.failure.push(Op::decode(value.bytes()?, depth)?),
                _ => {}
            }
        }
        Ok(txn)
    }

    /// Whether no branch can write.
    pub fn is_read_only(&self) -> bool {
        self.success.iter().chain(&self.failure).all(|op| match op {
            Op::Range(_) | Op::None => true,
            Op::Put(_) | Op::DeleteRange(_) => false,
            Op::Txn(txn) => txn.is_read_only(),
        })
    }

    /// Whether every read in it may be answered from a member's own state.
    pub fn is_serializable(&self) -> bool {
        self.success.iter().chain(&self.failure).all(|op| match op {
            Op::Range(range) => range.serializable,
            _ => true,
        })
    }

    /// Whether some branch puts a key.
    pub fn puts(&self) -> bool {
        self.success.iter().chain(&self.failure).any(|op| match op {
            Op::Put(_) => true,
            Op::Txn(txn) => txn.puts(),
            _ => false,
        })
    }
}

impl Compaction {
    /// Reads the message.
    ///
    /// # Errors
    /// When the bytes are not one.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new("CompactionRequest", bytes);
        let mut compaction = Self::default();
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => compaction.revision = value.int()?,
                2 => compaction.physical = value.flag()?,
                _ => {}
            }
        }
        Ok(compaction)
    }
}

/// `WatchCreateRequest`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WatchCreate<'a> {
    /// As in [`Range`]; empty means the smallest key.
    pub key: &'a [u8],
    /// As in [`Range`].
    pub range_end: &'a [u8],
    /// The first revision wanted; 0 is "from now on".
    pub start_revision: i64,
    /// Wants a sign of life when nothing happens.
    pub progress_notify: bool,
    /// Wants no puts.
    pub no_put: bool,
    /// Wants no deletes.
    pub no_delete: bool,
    /// Wants what was there before.
    pub prev_kv: bool,
    /// The client's own id; 0 lets the server choose.
    pub watch_id: i64,
    /// Large revisions may come in pieces.
    pub fragment: bool,
}

/// `WatchRequest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchRequest<'a> {
    /// Nothing that is known.
    None,
    /// A new watch.
    Create(WatchCreate<'a>),
    /// The end of one.
    Cancel(i64),
    /// A sign of life, please.
    Progress,
}

impl<'a> WatchRequest<'a> {
    /// Reads the message.
    ///
    /// # Errors
    /// When the bytes are not one.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new("WatchRequest", bytes);
        let mut request = WatchRequest::None;
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => request = WatchRequest::Create(WatchCreate::decode(value.bytes()?)?),
                2 => {
                    let mut inner = Fields::new("WatchCancelRequest", value.bytes()?);
                    let mut id = 0;
                    while let Some((number, value)) = inner.next()? {
                        if number == 1 {
                            id = value.int()?;
                        }
                    }
                    request = WatchRequest::Cancel(id);
                }
                3 => request = WatchRequest::Progress,
                _ => {}
            }
        }
        Ok(request)
    }
}

impl<'a> WatchCreate<'a> {
    fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new("WatchCreateRequest", bytes);
        let mut create = Self::default();
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (1, _) => create.key = value.bytes()?,
                (2, _) => create.range_end = value.bytes()?,
                (3, _) => create.start_revision = value.int()?,
                (4, _) => create.progress_notify = value.flag()?,
                // Repeated enums come packed or one by one.
                (5, Value::Bytes(packed)) => {
                    let mut filters = Fields::new("WatchCreateRequest", packed);
                    while !filters.rest.is_empty() {
                        let filter = filters.varint()?;
                        create.filter(filter);
                    }
                }
                (5, Value::Varint(filter)) => create.filter(filter),
                (6, _) => create.prev_kv = value.flag()?,
                (7, _) => create.watch_id = value.int()?,
                (8, _) => create.fragment = value.flag()?,
                _ => {}
            }
        }
        Ok(create)
    }

    fn filter(&mut self, filter: u64) {
        match filter {
            0 => self.no_put = true,
            1 => self.no_delete = true,
            _ => {}
        }
    }
}

/// A stored `KeyValue`, read in place.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct KeyValue<'a> {
    /// The key.
    pub key: &'a [u8],
    /// Where its present life began.
    pub create_revision: i64,
    /// Where this version began.
    pub mod_revision: i64,
    /// Versions of this life, counted from 1; 0 in a tombstone.
    pub version: i64,
    /// The value.
    pub value: &'a [u8],
    /// Its lease, or 0.
    pub lease: i64,
}

impl fmt::Debug for KeyValue<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, create_revision, mod_revision, version, value, lease } = self;
        let (key, len) = (key.escape_ascii(), value.len());
        write!(f, "{key}@{mod_revision} (created {create_revision}, version {version}, {len} bytes, lease {lease})")
    }
}

impl<'a> KeyValue<'a> {
    /// Reads the message.
    ///
    /// # Errors
    /// When the bytes are not one.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new("KeyValue", bytes);
        let mut kv = Self::default();
        while let Some((number, value)) = fields.next()? {
            match number {
                1 => kv.key = value.bytes()?,
                2 => kv.create_revision = value.int()?,
                3 => kv.mod_revision = value.int()?,
                4 => kv.version = value.int()?,
                5 => kv.value = value.bytes()?,
                6 => kv.lease = value.int()?,
                _ => {}
            }
        }
        Ok(kv)
    }

    /// Appends the message; fields of zero are left out, as proto3 wants it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_bytes(out, 1, self.key);
        put_int(out, 2, self.create_revision);
        put_int(out, 3, self.mod_revision);
        put_int(out, 4, self.version);
        put_bytes(out, 5, self.value);
        put_int(out, 6, self.lease);
    }
}

/// Reads etcd's stored `Lease`: id, time to live and what is left of it, both in seconds.
///
/// # Errors
/// When the bytes are not one.
pub fn lease(bytes: &[u8]) -> Result<(i64, i64, i64), Malformed> {
    let mut fields = Fields::new("Lease", bytes);
    let mut lease = (0, 0, 0);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => lease.0 = value.int()?,
            2 => lease.1 = value.int()?,
            3 => lease.2 = value.int()?,
            _ => {}
        }
    }
    Ok(lease)
}

/// Appends a varint.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// How long a varint is.
pub fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

/// Appends an integer field unless it is 0.
pub fn put_int(out: &mut Vec<u8>, field: u64, value: i64) {
    if value != 0 {
        put_varint(out, field << 3);
        put_varint(out, value as u64);
    }
}

/// Appends a flag unless it is false.
pub fn put_flag(out: &mut Vec<u8>, field: u64, value: bool) {
    put_int(out, field, i64::from(value));
}

/// Appends a field of bytes unless it is empty.
pub fn put_bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    if !value.is_empty() {
        put_message(out, field, value);
    }
}

/// Appends a message's field, also when it is empty.
pub fn put_message(out: &mut Vec<u8>, field: u64, message: &[u8]) {
    put_varint(out, field << 3 | 2);
    put_varint(out, message.len() as u64);
    out.extend_from_slice(message);
}

/// Appends a message's field whose bytes `fill` appends, also when it is empty.
pub fn put_nested(out: &mut Vec<u8>, field: u64, fill: impl FnOnce(&mut Vec<u8>)) {
    put_varint(out, field << 3 | 2);
    let at = out.len();
    fill(out);
    let len = out.len() - at;
    // The length goes before what it measures: shifting a small answer costs less than measuring it first.
    let mut prefix = [0u8; 10];
    let used = varint_len(len as u64);
    let mut value = len as u64;
    for byte in prefix.iter_mut().take(used) {
        *byte = value as u8 & 0x7f | 0x80;
        value >>= 7;
    }
    if let Some(last) = prefix.get_mut(used - 1) {
        *last &= 0x7f;
    }
    out.splice(at..at, prefix.iter().take(used).copied());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nested_message_of_any_length_reads_back() {
        for len in [0usize, 1, 127, 128, 16_383, 16_384, 300_000] {
            let mut out = vec![9];
            put_nested(&mut out, 5, |out| out.extend(std::iter::repeat_n(7, len)));
            let mut fields = Fields::new("test", &out[1..]);
            let (number, value) = fields.next().unwrap().unwrap();
            assert_eq!((number, value.bytes().unwrap().len()), (5, len));
            assert!(fields.rest.is_empty());
        }
    }

    #[test]
    fn what_is_cut_short_is_refused_and_never_panics() {
        let mut whole = Vec::new();
        put_bytes(&mut whole, 1, b"key");
        put_bytes(&mut whole, 2, b"value");
        put_int(&mut whole, 3, -1);
        assert_eq!(Put::decode(&whole).unwrap(), Put { key: b"key", value: b"value", lease: -1, ..Put::default() });
        let (mut refused, mut read) = (0, 0);
        for len in 0..whole.len() {
            match Put::decode(&whole[..len]) {
                Ok(_) => read += 1,
                Err(_) => refused += 1,
            }
        }
        assert_eq!(read, 3, "only the field boundaries (none, one, two fields) read, {refused} are refused");
        assert!(Put::decode(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]).is_err());
        assert!(Put::decode(&[0x0b]).is_err(), "groups are not known");
    }

    #[test]
    fn nesting_is_bounded() {
        let mut txn = Vec::new();
        for _ in 0..40 {
            let mut op = Vec::new();
            put_message(&mut op, 4, &txn);
            txn = Vec::new();
            put_message(&mut txn, 2, &op);
        }
        assert!(Txn::decode(&txn).is_err());
    }
}
