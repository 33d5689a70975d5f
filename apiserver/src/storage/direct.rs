//! Transactions for a store in this process, in its own terms: nothing is copied before it is encoded.

use minipod_store::{
    direct::{Answer, Done, Found},
    wire::{Compare, DeleteRange, Op, Put, Range, Target, Txn},
};

use super::{Guard, Item, Outcome, Part, Write};

/// Of what a key's revision is compared: `Compare.CompareTarget.MOD`, and the field of `Compare` that has the number (rpc.proto of etcd).
const MOD: i64 = 2;
const MOD_REVISION: u64 = 6;

/// A transaction by itself.
pub fn txn(part: &Part) -> Txn<'_> {
    Txn {
        compare: part.guards.iter().map(compare).collect(),
        success: part.writes.iter().map(change).collect(),
        failure: part.guards.iter().map(read).collect(),
    }
}

fn compare(guard: &Guard) -> Compare<'_> {
    let against = Target::Number(MOD_REVISION, guard.revision);
    Compare { target: MOD, key: &guard.key, against, ..Compare::default() }
}

fn read(guard: &Guard) -> Op<'_> {
    Op::Range(Range { key: &guard.key, ..Range::default() })
}

fn change(write: &Write) -> Op<'_> {
    match write {
        Write::Put(key, value) => Op::Put(Put { key, value, ..Put::default() }),
        Write::Delete(key) => Op::DeleteRange(DeleteRange { key, ..DeleteRange::default() }),
    }
}

/// Several, each by itself.
pub fn each(parts: &[Part]) -> Txn<'_> {
    Txn { success: parts.iter().map(|part| Op::Txn(txn(part))).collect(), ..Txn::default() }
}

/// How a transaction ended that was carried out at a revision.
pub fn outcome(answer: Answer, revision: i64) -> Outcome {
    if answer.succeeded {
        return Outcome::Done { revision };
    }
    let present = answer.done.into_iter().map(|done| match done {
        Done::Found(found) => found.into_iter().next().map(item),
        Done::Changed | Done::Txn(_) => None,
    });
    Outcome::Lost { present: present.collect() }
}

/// How each ended.
pub fn outcomes(answer: Answer, revision: i64) -> impl Iterator<Item = Outcome> {
    answer.done.into_iter().filter_map(move |done| match done {
        Done::Txn(answer) => Some(outcome(answer, revision)),
        Done::Found(_) | Done::Changed => None,
    })
}

fn item(found: Found) -> Item {
    let Found { key, value, mod_revision: revision } = found;
    Item { key, value, revision }
}
