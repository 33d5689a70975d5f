//! What this server is writing just now, decoded.
//!
//! What it writes comes back on the store's watch, and the feed would decode what was encoded a moment ago. Whoever writes notes both
//! forms before; the feed takes the decoded one if the bytes that come are the same. So nothing depends on how the write ends, on whose
//! write it is that comes, or on its order among others: the feed alone says what has happened and when.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use minipod_proto::v1::Object;

use crate::ledger::Ledger;

/// Writes that are noted at a time; about what fits into the transactions that are under way. Beyond it the feed decodes.
const LIMIT: usize = 8_192;

/// Room for the resourceVersion that is appended, see [`super::with_revision`].
pub(super) const SUFFIX_BYTES: usize = 24;

/// What a value in the store decodes to.
#[derive(Debug)]
pub enum Ready {
    /// An object, without resourceVersion as in the store.
    Object(Box<Object>),
    /// A node's ledger.
    Ledger(Arc<Ledger>),
}

/// The writes that are under way.
#[derive(Debug, Default)]
pub(super) struct Known {
    writes: Mutex<Writes>,
}

#[derive(Debug, Default)]
struct Writes {
    by_key: HashMap<Vec<u8>, Write>,
    next: u64,
}

#[derive(Debug)]
struct Write {
    number: u64,
    value: Vec<u8>,
    ready: Ready,
}

/// A write that is under way; dropping it takes the note back.
#[derive(Debug)]
pub struct Noted {
    known: Arc<Known>,
    /// `None`: it is left to the feed.
    key: Option<Vec<u8>>,
    number: u64,
}

impl Known {
    pub fn note(self: &Arc<Known>, key: Vec<u8>, value: &[u8], ready: Ready) -> Noted {
        let mut writes = self.writes();
        let number = writes.next;
        writes.next += 1;
        if writes.by_key.len() >= LIMIT {
            return Noted { known: Arc::clone(self), key: None, number };
        }
        let mut copy = Vec::with_capacity(value.len() + SUFFIX_BYTES);
        copy.extend_from_slice(value);
        writes.by_key.insert(key.clone(), Write { number, value: copy, ready });
        Noted { known: Arc::clone(self), key: Some(key), number }
    }

    /// The decoded form of a value, and the value with room for its resourceVersion.
    pub fn take(&self, key: &[u8], value: &[u8]) -> Option<(Ready, Vec<u8>)> {
        let mut writes = self.writes();
        if writes.by_key.get(key)?.value != value {
            return None;
        }
        writes.by_key.remove(key).map(|write| (write.ready, write.value))
    }

    /// Forgets everything: of what was written before a list of the store nothing will come.
    pub fn clear(&self) {
        self.writes().by_key.clear();
    }

    fn writes(&self) -> MutexGuard<'_, Writes> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Noted {
    /// It was written: the feed takes the note, or has taken it.
    pub fn written(mut self) {
        self.key = None;
    }
}

impl Drop for Noted {
    fn drop(&mut self) {
        let Some(key) = self.key.take() else { return };
        let mut writes = self.known.writes();
        if writes.by_key.get(&key).is_some_and(|write| write.number == self.number) {
            writes.by_key.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ready {
        Ready::Ledger(Arc::default())
    }

    #[test]
    fn the_same_bytes_are_taken_once_and_others_never() {
        let known = Arc::new(Known::default());
        known.note(b"a".to_vec(), b"one", ledger()).written();
        assert!(known.take(b"b", b"one").is_none());
        assert!(known.take(b"a", b"another's").is_none());
        let (_, value) = known.take(b"a", b"one").expect("it is there after others' writes of the key");
        assert!(value == b"one" && value.capacity() >= 3 + SUFFIX_BYTES);
        assert!(known.take(b"a", b"one").is_none());
    }

    #[test]
    fn a_note_goes_with_the_write_that_came_to_nothing() {
        let known = Arc::new(Known::default());
        let first = known.note(b"a".to_vec(), b"one", ledger());
        let second = known.note(b"a".to_vec(), b"two", ledger());
        drop(first);
        assert!(known.take(b"a", b"one").is_none(), "the later note has its place");
        drop(second);
        assert!(known.take(b"a", b"two").is_none());
        known.note(b"a".to_vec(), b"three", ledger()).written();
        known.clear();
        assert!(known.take(b"a", b"three").is_none());
    }

    #[test]
    fn there_are_never_more_than_the_limit() {
        let known = Arc::new(Known::default());
        for index in 0..=LIMIT {
            known.note(index.to_string().into_bytes(), b"", ledger()).written();
        }
        assert_eq!(known.writes().by_key.len(), LIMIT);
        assert!(known.take(LIMIT.to_string().as_bytes(), b"").is_none());
        assert!(known.take(b"0", b"").is_some());
    }
}
