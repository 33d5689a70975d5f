//! Writes of many callers in one transaction of the store.
//!
//! A transaction costs a request, an entry of the log, a wake-up and an answer, whether it writes one object or a hundred. So as long as
//! some are under way, what comes meanwhile waits, and whoever ends takes all of it with him. There is no timer: a write that finds a free
//! place goes at once and alone.
//!
//! Each write still holds or is lost by itself ([`Storage::txn_each`]): the transaction has one branch for each, so that a name which is
//! taken costs the others nothing. Those that meet at one revision have nothing in common, see [`plan`].

use std::{
    collections::{HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use minipod_daemon::metrics::{Counter, Registry as Metrics};
use tokio::sync::oneshot;

use crate::storage::{Outcome, Part, Storage, StoreError, Write};

/// Transactions under way at once. With one, all that comes while the store syncs goes into the next: what a transaction costs whatever is
/// in it is spread over more, and processors are what there is too little of when many come. Whoever writes alone waits for nobody.
const IN_FLIGHT: usize = 1;

/// Bytes of keys and values in one transaction; half of what etcd takes in a request, for the frames around them and the keys that
/// are read where a guard does not hold. A larger write goes alone.
const LIMIT_BYTES: usize = 768 * 1024;

/// Looked at for one transaction, as a multiple of what it takes: enough to pass over what many do to one key, and an end to looking.
const LOOK_AT: usize = 4;

/// Whoever has waited so long for the transactions before his is told that nothing has happened.
const PATIENCE: Duration = Duration::from_secs(5);

/// Gathers writes; one for a server.
pub struct Gatherer {
    storage: Storage,
    queue: Mutex<Queue>,
    transactions: Arc<Counter>,
    writes: Arc<Counter>,
}

/// What waits. Bounded by the calls that the connections to this server may have open: each has one write here at a time.
#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    running: usize,
}

struct Waiting {
    part: Part,
    since: Instant,
    answer: oneshot::Sender<Result<Outcome, StoreError>>,
}

impl Gatherer {
    /// Over a store.
    pub fn new(storage: Storage, metrics: &Metrics) -> Arc<Gatherer> {
        let transactions =
            metrics.counter("minipod_write_transactions_total", &[], "Transactions that writes of objects went in.");
        let writes = metrics.counter("minipod_writes_total", &[], "Writes of objects that went to the store.");
        Arc::new(Gatherer { storage, queue: Mutex::default(), transactions, writes })
    }

    /// Writes everything of a part if every guard of it holds, else nothing. Who stops waiting before it has left for the store has written
    /// nothing.
    ///
    /// # Errors
    /// As [`Storage::txn`].
    pub async fn txn(self: &Arc<Gatherer>, part: Part) -> Result<Outcome, StoreError> {
        let (answer, outcome) = oneshot::channel();
        let free = {
            let mut queue = self.queue();
            queue.waiting.push_back(Waiting { part, since: Instant::now(), answer });
            let free = queue.running < IN_FLIGHT;
            queue.running += usize::from(free);
            free
        };
        if free {
            // A task of its own: others' writes go on when this caller does not.
            tokio::spawn(Arc::clone(self).run());
        }
        outcome.await.unwrap_or_else(|_| {
            let detail = "this server is going down".to_owned();
            Err(StoreError::Uncertain { operation: "write", detail })
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One transaction after the other, until nothing waits.
    async fn run(self: Arc<Gatherer>) {
        while let Some(batch) = self.next() {
            self.transactions.increment();
            self.writes.add(batch.len() as u64);
            self.carry_out(batch).await;
        }
    }

    /// What the next transaction carries; `None`: nothing waits, and the place is given back.
    fn next(&self) -> Option<Vec<Waiting>> {
        let mut queue = self.queue();
        let now = Instant::now();
        queue.waiting.retain(|waiting| !waiting.answer.is_closed());
        while let Some(late) = queue.waiting.pop_front_if(|oldest| now.duration_since(oldest.since) > PATIENCE) {
            let detail = format!("the writes before it took longer than {} s", PATIENCE.as_secs());
            late.tell(Err(StoreError::Unavailable { operation: "write", detail }));
        }
        let chosen = plan(queue.waiting.iter().map(|waiting| &waiting.part), self.storage.max_ops());
        if chosen.is_empty() {
            queue.running -= 1;
            return None;
        }
        let seen = chosen.last().map_or(0, |last| last + 1);
        let mut chosen = chosen.into_iter().peekable();
        let (mut batch, mut left) = (Vec::with_capacity(chosen.len()), Vec::new());
        for (position, waiting) in queue.waiting.drain(..seen).enumerate() {
            if chosen.next_if_eq(&position).is_some() { batch.push(waiting) } else { left.push(waiting) }
        }
        left.into_iter().rev().for_each(|waiting| queue.waiting.push_front(waiting));
        Some(batch)
    }

    async fn carry_out(&self, batch: Vec<Waiting>) {
        let (parts, answers): (Vec<Part>, Vec<_>) =
            batch.into_iter().map(|waiting| (waiting.part, waiting.answer)).unzip();
        let ended = match <[Part; 1]>::try_from(parts) {
            Ok([part]) => self.storage.txn(part.guards, part.writes).await.map(|outcome| vec![outcome]),
            Err(parts) => match self.storage.txn_each(&parts).await {
                Err(error) if error.may_be_of_one() => return self.one_by_one(parts, answers).await,
                ended => ended,
            },
        };
        match ended {
            // Nobody to tell is no problem.
            Ok(outcomes) => {
                answers.into_iter().zip(outcomes).for_each(|(answer, outcome)| drop(answer.send(Ok(outcome))));
            }
            Err(error) => answers.into_iter().for_each(|answer| drop(answer.send(Err(error.clone())))),
        }
    }

    /// After a refusal of the whole: nothing has happened, and whose fault it is shows.
    async fn one_by_one(&self, parts: Vec<Part>, answers: Vec<oneshot::Sender<Result<Outcome, StoreError>>>) {
        for (part, answer) in parts.into_iter().zip(answers) {
            self.transactions.increment();
            drop(answer.send(self.storage.txn(part.guards, part.writes).await));
        }
    }
}

impl Waiting {
    fn tell(self, outcome: Result<Outcome, StoreError>) {
        // Nobody to tell is no problem.
        let _ = self.answer.send(outcome);
    }
}

/// Positions of the parts that go into the next transaction, in order; the first one always does.
///
/// All are held against what was before all of them. So that this is the same as one after the other, none may write what another one
/// compares or writes; such a part waits for the next transaction.
fn plan<'a>(parts: impl Iterator<Item = &'a Part>, max_ops: usize) -> Vec<usize> {
    let (mut chosen, mut bytes, mut largest) = (Vec::new(), 0, 0);
    let (mut compared, mut written) = (HashSet::new(), HashSet::new());
    for (position, part) in parts.take(max_ops * LOOK_AT).enumerate() {
        let ops = part.guards.len().max(part.writes.len()).max(largest);
        let bytes_with = bytes + size(part);
        // What is nested shares the limit of operations with what it is nested in.
        if !chosen.is_empty() && (chosen.len() + 1 + ops > max_ops || bytes_with > LIMIT_BYTES) {
            break;
        }
        let writes = || part.writes.iter().map(key);
        let guards = || part.guards.iter().map(|guard| guard.key.as_slice());
        if guards().any(|key| written.contains(key))
            || writes().any(|key| written.contains(key) || compared.contains(key))
        {
            continue;
        }
        written.extend(writes());
        compared.extend(guards());
        chosen.push(position);
        (bytes, largest) = (bytes_with, ops);
    }
    chosen
}

fn key(write: &Write) -> &[u8] {
    match write {
        Write::Put(key, _) | Write::Delete(key) => key,
    }
}

fn size(part: &Part) -> usize {
    let written = |write: &Write| match write {
        Write::Put(key, value) => key.len() + value.len(),
        Write::Delete(key) => key.len(),
    };
    // A guard's key is read where it does not hold.
    let guards: usize = part.guards.iter().map(|guard| 2 * guard.key.len()).sum();
    guards + part.writes.iter().map(written).sum::<usize>()
}

#[cfg(test)]
#[path = "gather_tests.rs"]
mod tests;
