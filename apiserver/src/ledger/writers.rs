//! Who writes a node's ledger next. The store's comparison keeps ledgers right; waiting for each other keeps the calls of one server from
//! making each other's transactions fail.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::OwnedMutexGuard;

use super::Ledger;

/// Locks beyond this number are looked through for those that nobody holds: their nodes may be gone, and they are made again when
/// they are needed.
const LOCKS: usize = 100_000;

/// The ledgers that this server wrote last, and one lock a node.
#[derive(Default)]
pub struct Writers {
    locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Until the cache shows them: so most writes need one round trip to the store and no read.
    recent: Mutex<HashMap<String, (Arc<Ledger>, i64)>>,
}

/// The right to write a node's ledger before all others of this server, until it is dropped.
#[derive(Debug)]
pub struct Writer(#[expect(dead_code, reason = "held, never read")] OwnedMutexGuard<()>);

impl Writers {
    /// Waits, first come, first served. Whoever takes several must take them in the order of the nodes' names.
    pub async fn take(&self, node: &str) -> Writer {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            if locks.len() > LOCKS {
                locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            }
            match locks.get(node) {
                Some(lock) => Arc::clone(lock),
                None => Arc::clone(locks.entry(node.to_owned()).or_default()),
            }
        };
        Writer(lock.lock_owned().await)
    }

    /// The newer of what the cache shows of a node's ledger and what was written here.
    pub fn newest(&self, node: &str, cached: Option<(Arc<Ledger>, i64)>) -> Option<(Arc<Ledger>, i64)> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = recent.get(node).filter(|(_, revision)| cached.as_ref().is_none_or(|cached| cached.1 < *revision));
        match ours.cloned() {
            Some(ours) => Some(ours),
            None => {
                recent.remove(node);
                cached
            }
        }
    }

    /// Notes what was written at a revision; `None`: there is no ledger (any more).
    pub fn wrote(&self, node: &str, ledger: Option<Arc<Ledger>>, revision: i64) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        match ledger {
            Some(ledger) => drop(recent.insert(node.to_owned(), (ledger, revision))),
            None => drop(recent.remove(node)),
        }
    }
}
