//! What is wrong with a request whatever the state is. Nothing here looks at the store.

use crate::refused::Refused;
use crate::wire::{Op, Put, Txn};
use std::collections::{BTreeMap, HashSet};

/// Checks a key.
///
/// # Errors
/// [`Refused::EmptyKey`].
pub fn key(key: &[u8]) -> Result<(), Refused> {
    if key.is_empty() { Err(Refused::EmptyKey) } else { Ok(()) }
}

/// Checks a put.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn put(put: &Put<'_>) -> Result<(), Refused> {
    key(put.key)?;
    if put.ignore_value && !put.value.is_empty() {
        return Err(Refused::ValueProvided);
    }
    if put.ignore_lease && put.lease != 0 {
        return Err(Refused::LeaseProvided);
    }
    Ok(())
}

/// Checks a transaction with all that is nested in it.
///
/// # Errors
/// The first thing that is wrong with it.
pub fn txn(txn: &Txn<'_>, max_ops: usize) -> Result<(), Refused> {
    txn_ops(txn, max_ops)?;
    changes(&txn.success)?;
    changes(&txn.failure)?;
    Ok(())
}

fn txn_ops(txn: &Txn<'_>, max_ops: usize) -> Result<(), Refused> {
    let ops = txn.compare.len().max(txn.success.len()).max(txn.failure.len());
    // What is nested shares the limit with what it is nested in.
    let left = max_ops.checked_sub(ops).ok_or(Refused::TooManyOps)?;
    txn.compare.iter().try_for_each(|compare| key(compare.key))?;
    txn.success.iter().chain(&txn.failure).try_for_each(|op| match op {
        Op::Range(range) => key(range.key),
        Op::Put(request) => put(request),
        Op::DeleteRange(delete) => key(delete.key),
        Op::Txn(nested) => txn_ops(nested, left),
        // etcd's answer to an operation without a request.
        Op::None => Err(Refused::KeyNotFound),
    })
}

/// What a branch changes.
#[derive(Default)]
struct Changes<'a> {
    puts: HashSet<&'a [u8]>,
    deletes: Intervals<'a>,
}

/// Key ranges, joined where they overlap: from each key to before the other.
#[derive(Default)]
struct Intervals<'a>(BTreeMap<&'a [u8], End<'a>>);

/// An end; a point ends with itself.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct End<'a> {
    key: &'a [u8],
    inclusive: bool,
}

impl<'a> Intervals<'a> {
    fn insert(&mut self, start: &'a [u8], end: End<'a>) {
        let (mut start, mut end) = (start, end);
        while let Some((&other_start, &other_end)) = self.0.range(..=end.key).next_back() {
            if other_end.key < start {
                break;
            }
            self.0.remove(other_start);
            start = start.min(other_start);
            end = end.max(other_end);
        }
        self.0.insert(start, end);
    }

    fn contains(&self, key: &[u8]) -> bool {
        self.0.range(..=key).next_back().is_some_and(|(_, end)| key < end.key || end.inclusive && key == end.key)
    }
}

/// Refuses a branch that puts a key twice, or puts a key that it deletes; branches that exclude each other may.
///
/// As in etcd, a delete "from key on" is not held against puts: they are carried out in order.
fn changes<'a>(ops: &'a [Op<'a>]) -> Result<Changes<'a>, Refused> {
    let mut all = Changes::default();
    for op in ops {
        let Op::DeleteRange(delete) = op else { continue };
        match delete.range_end {
            [] => all.deletes.insert(delete.key, End { key: delete.key, inclusive: true }),
            end if delete.key < end => all.deletes.insert(delete.key, End { key: end, inclusive: false }),
            _ => {}
        }
    }
    for op in ops {
        let Op::Txn(nested) = op else { continue };
        let then = changes(&nested.success)?;
        let otherwise = changes(&nested.failure)?;
        for key in &then.puts {
            if all.deletes.contains(key) || !all.puts.insert(key) {
                return Err(Refused::DuplicateKey);
            }
        }
        for key in &otherwise.puts {
            if all.deletes.contains(key) || !all.puts.insert(key) && !then.puts.contains(key) {
                return Err(Refused::DuplicateKey);
            }
        }
        for (start, end) in then.deletes.0.into_iter().chain(otherwise.deletes.0) {
            all.deletes.insert(start, end);
        }
    }
    for op in ops {
        let Op::Put(put) = op else { continue };
        if all.deletes.contains(put.key) || !all.puts.insert(put.key) {
            return Err(Refused::DuplicateKey);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::DeleteRange;

    fn put(key: &str) -> Op<'_> {
        Op::Put(Put { key: key.as_bytes(), ..Put::default() })
    }
    fn delete<'a>(key: &'a str, end: &'a str) -> Op<'a> {
        Op::DeleteRange(DeleteRange { key: key.as_bytes(), range_end: end.as_bytes(), prev_kv: false })
    }
    fn nested<'a>(success: Vec<Op<'a>>, failure: Vec<Op<'a>>) -> Op<'a> {
        Op::Txn(Txn { compare: Vec::new(), success, failure })
    }

    #[test]
    fn overlapping_changes_are_refused() {
        let table: Vec<(Vec<Op<'_>>, bool)> = vec![
            (vec![put("a"), put("b")], true),
            (vec![put("a"), put("a")], false),
            (vec![put("a"), delete("a", "")], false),
            (vec![delete("a", "c"), put("c")], true),
            (vec![delete("a", "c"), put("b")], false),
            (vec![delete("a", "c"), delete("b", "d"), put("c")], false),
            (vec![delete("a", ""), delete("a", "b"), put("b")], true),
            (vec![delete("b", "a"), put("b")], true),
            (vec![nested(vec![put("a")], vec![put("a")])], true),
            (vec![nested(vec![put("a")], vec![]), put("a")], false),
            (vec![nested(vec![put("a")], vec![]), nested(vec![], vec![put("a")])], false),
            (vec![nested(vec![delete("a", "")], vec![]), put("a")], false),
            (vec![nested(vec![put("a")], vec![]), nested(vec![delete("a", "")], vec![])], true),
            (vec![nested(vec![delete("a", "")], vec![]), nested(vec![put("a")], vec![])], false),
        ];
        for (ops, allowed) in table {
            assert_eq!(changes(&ops).is_ok(), allowed, "{ops:?}");
        }
    }

    #[test]
    fn nested_operations_share_the_limit() {
        let deep = nested(vec![put("a"), put("b")], vec![]);
        let request = Txn { success: vec![deep], ..Txn::default() };
        assert_eq!(txn(&request, 3), Ok(()));
        assert_eq!(txn(&request, 2), Err(Refused::TooManyOps));
    }
}
