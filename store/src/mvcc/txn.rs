//! Changing keys: put, delete, transaction. Everything is checked before anything is written, so a transaction never
//! needs to be undone.

use super::index::Keys;
use super::{Revision, Store};
use crate::refused::Refused;
use crate::wire::{self, Compare, DeleteRange, Op, Put, Range, Target, Txn};
use std::cmp::Ordering;

/// A transaction under way: reads see its own writes.
struct Execution<'s> {
    store: Access<'s>,
    /// The revision that the transaction began at; its writes are the next one.
    begin: i64,
    /// Changes so far.
    changes: u32,
}

enum Access<'s> {
    Read(&'s Store),
    Write(&'s mut Store),
}

impl Store {
    /// Puts one key; appends the fields of a `PutResponse` but for the header.
    ///
    /// # Errors
    /// [`Refused::LeaseNotFound`], or [`Refused::KeyNotFound`] for a put that keeps what is not there.
    pub fn apply_put(&mut self, put: &Put<'_>, out: &mut Vec<u8>) -> Result<(), Refused> {
        self.check_lease(put)?;
        self.check_kept(put)?;
        let mut execution = Execution::write(self);
        execution.put(put, out)?;
        execution.end();
        Ok(())
    }

    /// Removes keys; appends the fields of a `DeleteRangeResponse` but for the header.
    ///
    /// # Errors
    /// None that a request can bring about.
    pub fn apply_delete(&mut self, delete: &DeleteRange<'_>, out: &mut Vec<u8>) -> Result<(), Refused> {
        let mut execution = Execution::write(self);
        execution.delete(delete, out)?;
        execution.end();
        Ok(())
    }

    /// Carries out a transaction; appends the fields of a `TxnResponse` but for the header.
    ///
    /// # Errors
    /// As the operations; then nothing was changed.
    pub fn apply_txn(&mut self, txn: &Txn<'_>, out: &mut Vec<u8>) -> Result<(), Refused> {
        let path = self.check_txn(txn)?;
        let mut execution = Execution::write(self);
        execution.txn(txn, &mut path.iter().copied(), out)?;
        execution.end();
        Ok(())
    }

    /// Carries out a transaction that has no writes.
    ///
    /// # Errors
    /// As the operations.
    pub fn read_txn(&self, txn: &Txn<'_>, out: &mut Vec<u8>) -> Result<(), Refused> {
        let path = self.check_txn(txn)?;
        let mut execution = Execution { begin: self.revision, store: Access::Read(self), changes: 0 };
        execution.txn(txn, &mut path.iter().copied(), out)
    }

    /// Removes the keys, which are in order, in one revision if any is there.
    pub(crate) fn remove_all(&mut self, keys: impl Iterator<Item = Box<[u8]>>) {
        let main = self.revision + 1;
        let mut sub = 0;
        for key in keys {
            if self.current(&key).is_some() {
                self.remove(Revision { main, sub }, &key);
                sub += 1;
            }
        }
        if sub > 0 {
            self.revision = main;
        }
    }

    /// Decides every compare, nested ones too, on the state before the transaction; then checks the operations that will
    /// be carried out. The path has one decision per transaction, in the order in which they are met.
    fn check_txn(&self, txn: &Txn<'_>) -> Result<Vec<bool>, Refused> {
        let mut path = Vec::new();
        self.decide(txn, &mut path);
        // Two rounds, as etcd: what is wrong with a put is told before what is wrong with a range.
        self.check_ops(txn, &mut path.iter().copied(), &|op| match op {
            Op::Put(put) => self.check_kept(put).and_then(|()| self.check_lease(put)),
            _ => Ok(()),
        })?;
        self.check_ops(txn, &mut path.iter().copied(), &|op| match op {
            Op::Range(range) if range.revision != 0 => self.check_range(range),
            _ => Ok(()),
        })?;
        Ok(path)
    }

    fn check_range(&self, range: &Range<'_>) -> Result<(), Refused> {
        if range.revision > self.revision {
            return Err(Refused::FutureRevision);
        }
        if range.revision < self.compacted { Err(Refused::Compacted) } else { Ok(()) }
    }

    fn decide(&self, txn: &Txn<'_>, path: &mut Vec<bool>) {
        let holds = txn.compare.iter().all(|compare| self.holds(compare));
        path.push(holds);
        for op in if holds { &txn.success } else { &txn.failure } {
            if let Op::Txn(nested) = op {
                self.decide(nested, path);
            }
        }
    }

    fn check_ops(
        &self,
        txn: &Txn<'_>,
        path: &mut dyn Iterator<Item = bool>,
        check: &impl Fn(&Op<'_>) -> Result<(), Refused>,
    ) -> Result<(), Refused> {
        let holds = path.next().unwrap_or_default();
        for op in if holds { &txn.success } else { &txn.failure } {
            match op {
                Op::Txn(nested) => self.check_ops(nested, path, check)?,
                op => check(op)?,
            }
        }
        Ok(())
    }

    fn check_lease(&self, put: &Put<'_>) -> Result<(), Refused> {
        if put.lease != 0 && self.leases.get(put.lease).is_none() {
            return Err(Refused::LeaseNotFound);
        }
        Ok(())
    }

    fn check_kept(&self, put: &Put<'_>) -> Result<(), Refused> {
        if (put.ignore_value || put.ignore_lease) && self.current(put.key).is_none() {
            return Err(Refused::KeyNotFound);
        }
        Ok(())
    }

    /// Whether a compare holds: for a range, for every key in it.
    fn holds(&self, compare: &Compare<'_>) -> bool {
        let keys = Keys::of(compare.key, compare.range_end);
        let mut any = false;
        for (_, history) in self.index.range(keys, None) {
            if history.latest().is_tombstone {
                continue;
            }
            any = true;
            if !holds_for(compare, &history.latest().kv()) {
                return false;
            }
        }
        // A value that is not there equals nothing, not even the empty one; a number that is not there is 0.
        any || compare.target != 3 && holds_for(compare, &wire::KeyValue::default())
    }
}

fn holds_for(compare: &Compare<'_>, kv: &wire::KeyValue<'_>) -> bool {
    let number = |field: u64, actual: i64| match compare.against {
        Target::Number(given, value) if given == field => actual.cmp(&value),
        _ => actual.cmp(&0),
    };
    let ordering = match compare.target {
        0 => number(4, kv.version),
        1 => number(5, kv.create_revision),
        2 => number(6, kv.mod_revision),
        3 => kv.value.cmp(if let Target::Value(value) = compare.against { value } else { &[] }),
        4 => number(8, kv.lease),
        _ => Ordering::Equal,
    };
    match compare.result {
        0 => ordering.is_eq(),
        1 => ordering.is_gt(),
        2 => ordering.is_lt(),
        3 => ordering.is_ne(),
        _ => true,
    }
}

impl<'s> Execution<'s> {
    fn write(store: &'s mut Store) -> Self {
        Self { begin: store.revision, store: Access::Write(store), changes: 0 }
    }

    fn end(self) {
        if let Access::Write(store) = self.store
            && self.changes > 0
        {
            store.revision += 1;
        }
    }

    fn store(&self) -> &Store {
        match &self.store {
            Access::Read(store) => store,
            Access::Write(store) => store,
        }
    }

    fn writer(&mut self) -> Result<&mut Store, Refused> {
        match &mut self.store {
            Access::Write(store) => Ok(store),
            // Read-only transactions are told apart before they come here.
            Access::Read(_) => Err(Refused::Corrupt),
        }
    }

    /// What the header of the next answer says.
    fn revision(&self) -> i64 {
        self.begin + i64::from(self.changes > 0)
    }

    fn next(&mut self) -> Revision {
        let at = Revision { main: self.begin + 1, sub: self.changes };
        self.changes += 1;
        at
    }

    fn put(&mut self, put: &Put<'_>, out: &mut Vec<u8>) -> Result<(), Refused> {
        let previous = if put.prev_kv || put.ignore_value || put.ignore_lease {
            self.store().current(put.key).cloned()
        } else {
            None
        };
        let kept = previous.as_ref().map(|previous| previous.kv()).unwrap_or_default();
        let value = if put.ignore_value { kept.value } else { put.value };
        let lease = if put.ignore_lease { kept.lease } else { put.lease };
        let at = self.next();
        self.writer()?.put(at, put.key, value, lease);
        if put.prev_kv
            && let Some(previous) = &previous
        {
            previous.put_field(out, 2, false);
        }
        Ok(())
    }

    fn delete(&mut self, delete: &DeleteRange<'_>, out: &mut Vec<u8>) -> Result<(), Refused> {
        let keys = Keys::of(delete.key, delete.range_end);
        let histories = self.store().index.range(keys, None);
        let doomed: Vec<_> =
            histories.map(|(_, history)| history.latest()).filter(|v| !v.is_tombstone).cloned().collect();
        for version in &doomed {
            let at = self.next();
            self.writer()?.remove(at, version.key());
        }
        wire::put_int(out, 2, doomed.len() as i64);
        if delete.prev_kv {
            for version in &doomed {
                version.put_field(out, 3, false);
            }
        }
        Ok(())
    }

    /// Carries out the operations of the branch that the path says.
    fn txn(&mut self, txn: &Txn<'_>, path: &mut dyn Iterator<Item = bool>, out: &mut Vec<u8>) -> Result<(), Refused> {
        let succeeded = path.next().unwrap_or_default();
        wire::put_flag(out, 2, succeeded);
        let mut answer = Vec::new();
        for op in if succeeded { &txn.success } else { &txn.failure } {
            answer.clear();
            let field = self.op(op, path, &mut answer)?;
            wire::put_nested(out, 3, |out| {
                if field != 0 {
                    wire::put_message(out, field, &answer);
                }
            });
        }
        Ok(())
    }

    /// Carries out one operation; its answer with a header goes to `out`, and the field of `ResponseOp` it belongs to is
    /// returned.
    fn op(&mut self, op: &Op<'_>, path: &mut dyn Iterator<Item = bool>, out: &mut Vec<u8>) -> Result<u64, Refused> {
        let mut body = Vec::new();
        let (field, revision) = match op {
            Op::None => return Ok(0),
            Op::Range(range) => {
                let result = self.store().range_within(range, self.revision())?;
                result.encode(&mut body);
                (1, result.revision)
            }
            Op::Put(put) => {
                self.put(put, &mut body)?;
                (2, self.revision())
            }
            Op::DeleteRange(delete) => {
                self.delete(delete, &mut body)?;
                (3, self.revision())
            }
            Op::Txn(nested) => {
                self.txn(nested, path, &mut body)?;
                // etcd leaves the header of a nested transaction empty.
                (4, 0)
            }
        };
        wire::put_nested(out, 1, |out| wire::put_int(out, 3, revision));
        out.extend_from_slice(&body);
        Ok(field)
    }
}
