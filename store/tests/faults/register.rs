//! Whether a history of one key can be put in an order that respects time: the search of Wing and Gong with Lowe's memory.
//!
//! Our own and small: porcupine-rs 0.3.0 has criterion, regex and rand among its library's plain dependencies, and no word for a
//! call whose outcome is unknown, which is what faults produce.

use std::collections::HashSet;

/// Values are unique in a history; none is a key that is not there.
pub type Value = Option<u64>;

/// What a call did, as its answer says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Get(Value),
    Put(u64),
    /// A delete, and whether something was there; unknown when it was not answered.
    Delete(Option<bool>),
    /// Puts the second when the first is there; done or not, and then with what was found.
    Cas(u64, u64, Result<(), Value>),
    /// The end of a lease: takes the key away if the value that was put with it is still there.
    Revoke(u64),
}

/// A call on one key.
#[derive(Debug, Clone)]
pub struct Call {
    pub client: usize,
    pub begun_us: u64,
    /// `u64::MAX` when no answer came: it may take effect at any later time.
    pub ended_us: u64,
    /// Whether it may also never take effect.
    pub maybe: bool,
    pub op: Op,
}

/// The state after `op`, or none when its answer is impossible in this state.
fn step(state: Value, op: &Op) -> Option<Value> {
    match op {
        Op::Get(seen) => (*seen == state).then_some(state),
        Op::Put(value) => Some(Some(*value)),
        Op::Delete(there) => there.is_none_or(|there| there == state.is_some()).then_some(None),
        Op::Cas(expected, new, Ok(())) => (state == Some(*expected)).then_some(Some(*new)),
        Op::Cas(expected, _, Err(found)) => (state == *found && state != Some(*expected)).then_some(state),
        Op::Revoke(value) => Some(state.filter(|there| there != value)),
    }
}

/// A place in the search: the first definite call that is open, those done beyond it, the uncertain ones done, the state.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Place {
    first: usize,
    ahead: Vec<usize>,
    maybe: Vec<usize>,
    state: Value,
}

/// Places that are searched before a history is given up as undecided.
const MOST_PLACES: usize = 2_000_000;

/// Finds an order, or says how far the longest one came.
pub fn check(mut calls: Vec<Call>) -> Result<(), String> {
    calls.sort_by_key(|call| call.begun_us);
    let (maybe, definite): (Vec<Call>, Vec<Call>) = calls.into_iter().partition(|call| call.maybe);
    let begin = Place { first: 0, ahead: Vec::new(), maybe: Vec::new(), state: None };
    let mut best = begin.clone();
    let (mut seen, mut stack) = (HashSet::new(), vec![begin]);
    while let Some(place) = stack.pop() {
        if place.first == definite.len() {
            return Ok(());
        }
        if place.first + place.ahead.len() > best.first + best.ahead.len() {
            best = place.clone();
        }
        if seen.len() > MOST_PLACES {
            return Err(format!("undecided after {MOST_PLACES} places; {}", stuck(&best, &definite)));
        }
        if seen.insert(place.clone()) {
            push_next(&place, &definite, &maybe, &mut stack);
        }
    }
    Err(stuck(&best, &definite))
}

fn push_next(place: &Place, definite: &[Call], maybe: &[Call], stack: &mut Vec<Place>) {
    let open = |index: &usize| !place.ahead.contains(index);
    let mut limit = u64::MAX;
    let mut ready = Vec::new();
    for index in (place.first..definite.len()).filter(open) {
        if definite[index].begun_us > limit {
            break;
        }
        limit = limit.min(definite[index].ended_us);
        ready.push(index);
    }
    ready.retain(|index| definite[*index].begun_us <= limit);
    let mut told = Vec::new();
    for (index, call) in maybe.iter().enumerate().take_while(|(_, call)| call.begun_us <= limit) {
        let Some(state) = step(place.state, &call.op) else { continue };
        // Of calls that do the same the first is as good as any, and one that changes nothing need not have been.
        if place.maybe.contains(&index) || state == place.state || told.contains(&&call.op) {
            continue;
        }
        told.push(&call.op);
        let mut next = Place { state, ..place.clone() };
        next.maybe.push(index);
        next.maybe.sort_unstable();
        stack.push(next);
    }
    // The call that ends first is tried first.
    ready.sort_by_key(|index| std::cmp::Reverse(definite[*index].ended_us));
    for index in ready {
        let Some(state) = step(place.state, &definite[index].op) else { continue };
        let mut next = Place { state, ..place.clone() };
        next.ahead.push(index);
        next.ahead.sort_unstable();
        while next.ahead.first() == Some(&next.first) {
            next.ahead.remove(0);
            next.first += 1;
        }
        stack.push(next);
    }
}

fn stuck(best: &Place, definite: &[Call]) -> String {
    let around: Vec<String> = definite[best.first.saturating_sub(6)..(best.first + 8).min(definite.len())]
        .iter()
        .map(|call| format!("{}..{} client {}: {:?}", call.begun_us, call.ended_us, call.client, call.op))
        .collect();
    format!(
        "no order after {} of {} calls, with the value {:?}; around there (µs):\n  {}",
        best.first + best.ahead.len(),
        definite.len(),
        best.state,
        around.join("\n  ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histories_are_judged() {
        let call = |begun_us, ended_us, op: Op| Call { client: 0, begun_us, ended_us, maybe: ended_us == u64::MAX, op };
        let never = u64::MAX;
        let table = [
            ("one after the other", vec![call(0, 1, Op::Put(1)), call(2, 3, Op::Get(Some(1)))], true),
            ("a read of the past", vec![call(0, 1, Op::Put(1)), call(2, 3, Op::Get(None))], false),
            ("a read beside the write", vec![call(0, 5, Op::Put(1)), call(2, 3, Op::Get(None))], true),
            (
                "back in time",
                vec![call(0, 9, Op::Put(1)), call(1, 2, Op::Get(Some(1))), call(3, 4, Op::Get(None))],
                false,
            ),
            (
                "an unknown put that was",
                vec![call(0, never, Op::Put(1)), call(5, 6, Op::Get(None)), call(7, 8, Op::Get(Some(1)))],
                true,
            ),
            ("an unknown put that was not", vec![call(0, never, Op::Put(1)), call(5, 6, Op::Get(None))], true),
            (
                "an unknown delete",
                vec![
                    call(0, 1, Op::Put(1)),
                    call(2, never, Op::Delete(None)),
                    call(3, 4, Op::Get(Some(1))),
                    call(5, 6, Op::Get(None)),
                ],
                true,
            ),
            (
                "two exchanges of one value",
                vec![call(0, 1, Op::Put(1)), call(2, 9, Op::Cas(1, 2, Ok(()))), call(2, 9, Op::Cas(1, 3, Ok(())))],
                false,
            ),
            (
                "an exchange that found another",
                vec![
                    call(0, 1, Op::Put(1)),
                    call(2, 9, Op::Cas(1, 2, Ok(()))),
                    call(2, 9, Op::Cas(1, 3, Err(Some(2)))),
                ],
                true,
            ),
            (
                "a lease that ends takes only its own",
                vec![call(0, 1, Op::Put(1)), call(2, 3, Op::Revoke(7)), call(4, 5, Op::Get(None))],
                false,
            ),
            ("a delete of nothing that took something", vec![call(0, 1, Op::Delete(Some(true)))], false),
        ];
        for (what, calls, right) in table {
            assert_eq!(check(calls).is_ok(), right, "{what}");
        }
    }
}
