//! One version of one key, encoded once.

use crate::wire::{KeyValue, put_varint, varint_len};
use std::sync::Arc;

/// Where in the history something happened: a revision, and the order within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision {
    /// The store's revision.
    pub main: i64,
    /// Counted from 0 within it.
    pub sub: u32,
}

/// One version of one key: what etcd calls a revision of it. A clone shares the bytes.
///
/// The bytes are the encoded `KeyValue`, so that ranges and watches copy them out and encode nothing. A tombstone's
/// holds the key and the revision of the removal alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Where it came to be.
    pub at: Revision,
    /// Whether the key was removed here.
    pub is_tombstone: bool,
    encoded: Arc<[u8]>,
}

impl Version {
    /// Encodes a version; `scratch` is any buffer, kept from call to call so that encoding allocates nothing but the result.
    pub fn new(at: Revision, is_tombstone: bool, kv: &KeyValue<'_>, scratch: &mut Vec<u8>) -> Self {
        scratch.clear();
        kv.encode(scratch);
        Self { at, is_tombstone, encoded: Arc::from(scratch.as_slice()) }
    }

    /// Takes a version back from its parts, as in a snapshot; `None` when the bytes are not a `KeyValue` of that revision.
    pub fn from_parts(at: Revision, is_tombstone: bool, encoded: &[u8]) -> Option<Self> {
        let kv = KeyValue::decode(encoded).ok()?;
        (kv.mod_revision == at.main && !kv.key.is_empty()).then(|| Self { at, is_tombstone, encoded: encoded.into() })
    }

    /// The version's fields.
    pub fn kv(&self) -> KeyValue<'_> {
        KeyValue::decode(&self.encoded).unwrap_or_default() // It was encoded or checked above.
    }

    /// The key, which is always the first field.
    pub fn key(&self) -> &[u8] {
        let mut len = 0usize;
        for (at, &byte) in self.encoded.iter().enumerate().skip(1).take(5) {
            len |= usize::from(byte & 0x7f) << (7 * (at - 1));
            if byte < 0x80 {
                return self.encoded.get(at + 1..at + 1 + len).unwrap_or_default();
            }
        }
        &[]
    }

    /// Whether a life of the key begins here; the one before it, even in the same revision, is none of its past.
    pub fn is_creation(&self) -> bool {
        !self.is_tombstone && self.kv().create_revision == self.at.main
    }

    /// The encoded `KeyValue`.
    pub fn encoded(&self) -> &[u8] {
        &self.encoded
    }

    /// Appends this version as field `field` of a message.
    pub fn put_field(&self, out: &mut Vec<u8>, field: u64, keys_only: bool) {
        if !keys_only {
            crate::wire::put_message(out, field, &self.encoded);
            return;
        }
        let kv = KeyValue { value: &[], ..self.kv() };
        // Short: a key and four numbers.
        crate::wire::put_nested(out, field, |out| kv.encode(out));
    }

    /// How long [`put_field`](Version::put_field) is for a field number below 16.
    pub fn field_len(&self) -> usize {
        1 + varint_len(self.encoded.len() as u64) + self.encoded.len()
    }

    /// Appends this version as an `Event`, with what was there before when that is wanted and known.
    pub fn put_event(&self, out: &mut Vec<u8>, field: u64, previous: Option<&Version>) {
        let kind = usize::from(self.is_tombstone) * 2;
        let len = kind + self.field_len() + previous.map_or(0, Version::field_len);
        put_varint(out, field << 3 | 2);
        put_varint(out, len as u64);
        if self.is_tombstone {
            out.extend_from_slice(&[1 << 3, 1]);
        }
        self.put_field(out, 2, false);
        if let Some(previous) = previous {
            previous.put_field(out, 3, false);
        }
    }
}
