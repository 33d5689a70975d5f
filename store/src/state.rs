//! The state machine that consensus drives, and the view of its state that everyone else reads.

use crate::lease::{Lease, MAX_TTL_S, MIN_TTL_S};
use crate::machine::{Machine, Outcome, RestoreError};
use crate::mvcc::{RangeResult, Restore, Scan, Store};
use crate::refused::Refused;
use crate::wire::{self, Compaction, DeleteRange, Malformed, Put, Range, Txn};
use bytes::{BufMut, Bytes, BytesMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::Thread;

/// How many keys a read looks at before it lets writers in: well under a millisecond.
const KEYS_PER_STEP: usize = 2_048;

/// What goes through the log: one byte of kind, then its body. Requests travel as the client encoded them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A `PutRequest`.
    Put = 1,
    /// A `DeleteRangeRequest`.
    DeleteRange = 2,
    /// A `TxnRequest`.
    Txn = 3,
    /// A `CompactionRequest`.
    Compact = 4,
    /// A lease's id and time to live.
    LeaseGrant = 5,
    /// A lease's id.
    LeaseRevoke = 6,
    /// A lease's id.
    LeaseRenew = 7,
    /// Ids and epochs of leases that have run out.
    LeaseExpire = 8,
    /// Ids of leases and what is left of them, in seconds.
    LeaseCheckpoint = 9,
    /// 1 to raise and 0 to clear, a member, a kind of alarm.
    Alarm = 10,
}

/// Makes a command of a request's bytes.
pub fn request_command(kind: Kind, request: &[u8]) -> Bytes {
    let mut command = BytesMut::with_capacity(request.len() + 1);
    command.put_u8(kind as u8);
    command.put_slice(request);
    command.freeze()
}

/// Makes a command of numbers.
pub fn number_command(kind: Kind, numbers: impl IntoIterator<Item = i64>) -> Bytes {
    let mut command = BytesMut::new();
    command.put_u8(kind as u8);
    for number in numbers {
        command.put_i64(number);
    }
    command.freeze()
}

fn numbers<const N: usize>(body: &[u8]) -> Result<impl Iterator<Item = [i64; N]>, Malformed> {
    let (chunks, rest) = body.as_chunks::<8>();
    let (groups, left) = chunks.as_chunks::<N>();
    if !rest.is_empty() || !left.is_empty() {
        return Err(Malformed { message: "command", problem: "its numbers are incomplete" });
    }
    Ok(groups.iter().map(|group| group.map(i64::from_be_bytes)))
}

/// The state as its readers see it.
#[derive(Debug, Default)]
pub struct Shared {
    store: RwLock<Store>,
    /// The watch hub's thread, woken after every batch.
    hub: OnceLock<Thread>,
    /// How often the state was replaced by a snapshot's.
    restores: AtomicU64,
    /// The state's size, for those who must not wait for a lock.
    bytes: AtomicU64,
}

impl Shared {
    /// The state; hold it shortly, the next write waits for it.
    pub fn read(&self) -> RwLockReadGuard<'_, Store> {
        self.store.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, Store> {
        self.store.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a range; a long one lets writers in between and still sees one revision.
    ///
    /// # Errors
    /// [`Refused::Compacted`] or [`Refused::FutureRevision`].
    pub fn range(&self, request: &Range<'_>) -> Result<RangeResult, Refused> {
        let mut scan = Scan::default();
        loop {
            match self.read().scan(request, &mut scan, KEYS_PER_STEP) {
                Ok(true) => return Ok(scan.finish(request)),
                Ok(false) => {}
                // Compacted between two steps: once more, at one go.
                Err(Refused::Compacted) => return self.read().range(request),
                Err(refused) => return Err(refused),
            }
        }
    }

    /// About what the state takes in memory, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// How often the state was replaced by a snapshot's.
    pub fn restores(&self) -> u64 {
        self.restores.load(Ordering::Acquire)
    }

    /// Frees up to `max_versions` versions that are compacted away; whether there are more. The watch hub does this where
    /// there is one, see [`Store::sweep`].
    pub fn sweep(&self, max_versions: usize) -> bool {
        let mut store = self.write();
        let more = store.sweep(max_versions);
        self.note_bytes(&store);
        more
    }

    /// Notes the size of the state for [`Self::bytes`], after every change of it.
    pub(crate) fn note_bytes(&self, store: &Store) {
        self.bytes.store(store.bytes(), Ordering::Relaxed);
    }

    /// Names the thread that is woken when the state has changed; the first call counts.
    pub fn wake_with(&self, thread: Thread) {
        let _ = self.hub.set(thread);
    }

    /// Wakes the watch hub.
    pub fn wake(&self) {
        if let Some(thread) = self.hub.get() {
            thread.unpark();
        }
    }
}

/// The store as a [`Machine`].
#[derive(Debug, Default)]
pub struct StateMachine {
    shared: Arc<Shared>,
}

impl StateMachine {
    /// An empty state.
    pub fn new() -> Self {
        Self::default()
    }

    /// Plants a bug: leases that were renewed in time run out all the same.
    #[cfg(feature = "planted-bugs")]
    pub fn expire_early(&mut self) {
        self.shared.write().expires_early = true;
    }

    /// The view of the state for its readers.
    pub fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }
}

impl Machine for StateMachine {
    fn applied(&self) -> u64 {
        self.shared.read().applied()
    }

    fn apply(&mut self, index: u64, command: &[u8]) -> Outcome {
        let mut store = self.shared.write();
        store.set_applied(index);
        let mut body = Vec::new();
        let result = apply(&mut store, command, &mut body).map(|()| Bytes::from(body));
        self.shared.note_bytes(&store);
        Outcome { revision: store.revision(), result }
    }

    fn batch_applied(&mut self) {
        self.shared.wake();
    }

    fn snapshot(&self) -> Box<dyn Iterator<Item = Bytes> + Send> {
        Box::new(self.shared.read().snapshot())
    }

    fn restore(&mut self, chunks: &mut dyn Iterator<Item = std::io::Result<Bytes>>) -> Result<(), RestoreError> {
        let mut restore = Restore::default();
        let mut next = 0;
        for (chunk, bytes) in (0..).zip(chunks) {
            let bytes = bytes.map_err(|source| RestoreError::Read { chunk, source })?;
            restore.chunk(&bytes).map_err(|problem| RestoreError::Malformed { chunk, problem })?;
            next = chunk + 1;
        }
        let store = restore.finish().map_err(|problem| RestoreError::Malformed { chunk: next, problem })?;
        let mut state = self.shared.write();
        let old = std::mem::replace(&mut *state, store);
        self.shared.note_bytes(&state);
        // Counted before anyone can read the new state: the watch hub must not take it for a step from the old one.
        self.shared.restores.fetch_add(1, Ordering::Release);
        drop(state);
        self.shared.wake();
        // Freeing a large state takes a while; nobody waits for it any more.
        drop(old);
        Ok(())
    }
}

/// Applies one command to the state; the answer's fields go to `out`.
fn apply(store: &mut Store, command: &[u8], out: &mut Vec<u8>) -> Result<(), Refused> {
    let Some((&kind, body)) = command.split_first() else { return Ok(()) };
    match apply_kind(store, kind, body, out) {
        Ok(result) => result,
        Err(malformed) => {
            tracing::error!(kind, %malformed, "the log holds a command that this version cannot read");
            Err(Refused::Corrupt)
        }
    }
}

fn apply_kind(store: &mut Store, kind: u8, body: &[u8], out: &mut Vec<u8>) -> Result<Result<(), Refused>, Malformed> {
    Ok(match kind {
        1 => {
            let put = Put::decode(body)?;
            if store.is_capped() { Err(Refused::NoSpace) } else { store.apply_put(&put, out) }
        }
        2 => store.apply_delete(&DeleteRange::decode(body)?, out),
        3 => {
            let txn = Txn::decode(body)?;
            if store.is_capped() && txn.puts() { Err(Refused::NoSpace) } else { store.apply_txn(&txn, out) }
        }
        4 => store.compact(Compaction::decode(body)?.revision),
        5 => numbers(body)?.try_for_each(|[id, ttl]| grant(store, id, ttl, out)),
        6 => numbers(body)?.try_for_each(|[id]| revoke(store, id)),
        7 => {
            for [id] in numbers(body)? {
                // An unknown lease is answered with a time to live of 0.
                let ttl = store.leases.renew(id).unwrap_or(0);
                wire::put_int(out, 2, id);
                wire::put_int(out, 3, ttl);
            }
            Ok(())
        }
        8 => {
            expire(store, numbers(body)?);
            Ok(())
        }
        9 => {
            numbers(body)?.for_each(|[id, remaining]| store.leases.checkpoint(id, remaining));
            Ok(())
        }
        10 => {
            for [raised, member, kind] in numbers(body)? {
                let kind = kind as i32;
                if store.set_alarm(member as u64, kind, raised != 0) {
                    wire::put_nested(out, 2, |out| {
                        wire::put_int(out, 1, member);
                        wire::put_int(out, 2, kind.into());
                    });
                }
            }
            Ok(())
        }
        _ => return Err(Malformed { message: "command", problem: "its kind is unknown" }),
    })
}

fn grant(store: &mut Store, id: i64, ttl: i64, out: &mut Vec<u8>) -> Result<(), Refused> {
    if store.is_capped() {
        return Err(Refused::NoSpace);
    }
    if id == 0 {
        return Err(Refused::LeaseNotFound);
    }
    if ttl > MAX_TTL_S {
        return Err(Refused::LeaseTtlTooLarge);
    }
    if store.leases.get(id).is_some() {
        return Err(Refused::LeaseExists);
    }
    let ttl = ttl.max(MIN_TTL_S);
    store.leases.insert(id, Lease { ttl, ..Lease::default() });
    wire::put_int(out, 2, id);
    wire::put_int(out, 3, ttl);
    Ok(())
}

fn revoke(store: &mut Store, id: i64) -> Result<(), Refused> {
    let lease = store.leases.remove(id).ok_or(Refused::LeaseNotFound)?;
    store.remove_all(lease.keys.into_iter());
    Ok(())
}

/// Removes the leases that are still in the epoch that ran out, all their keys in one revision.
fn expire(store: &mut Store, leases: impl Iterator<Item = [i64; 2]>) {
    let mut keys = std::collections::BTreeSet::new();
    for [id, epoch] in leases {
        let is_over = store.leases.get(id).is_some_and(|lease| lease.epoch == epoch as u64);
        #[cfg(feature = "planted-bugs")]
        let is_over = is_over || store.expires_early;
        if is_over && let Some(mut lease) = store.leases.remove(id) {
            keys.append(&mut lease.keys);
        }
    }
    store.remove_all(keys.into_iter());
}
