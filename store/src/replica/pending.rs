//! What this member has under way: proposals until they are applied here, reads until their index is. Pure.

use crate::records::ChangeRecord;
use bytes::Bytes;
use std::collections::VecDeque;

/// What is proposed.
#[derive(Debug, Clone)]
pub enum Proposal {
    /// A command of the machine.
    Command(Bytes),
    /// A change of the membership.
    Change(ChangeRecord),
}

/// A proposal under way.
#[derive(Debug)]
pub struct Pending<W> {
    /// Who waits.
    pub waiter: W,
    /// What for.
    pub proposal: Proposal,
    /// The term and the leader to which it was given last; `None` when raft has not taken it.
    pub given: Option<(u64, u64)>,
    /// Ticks since then.
    pub given_ticks: u32,
    /// Ticks since it came.
    pub age_ticks: u32,
}

/// Proposals by number, in order. Bounded by the replica's queue, which admits so many at once.
#[derive(Debug)]
pub struct Proposals<W> {
    /// The number of the first place in `window`; all before are settled.
    floor: u64,
    window: VecDeque<Option<Pending<W>>>,
}

impl<W> Default for Proposals<W> {
    fn default() -> Self {
        Self { floor: 1, window: VecDeque::new() }
    }
}

impl<W> Proposals<W> {
    /// All numbers before this one are settled.
    #[must_use]
    pub const fn floor(&self) -> u64 {
        self.floor
    }

    /// Takes a new proposal and numbers it.
    pub fn push(&mut self, waiter: W, proposal: Proposal) -> u64 {
        let number = self.floor + self.window.len() as u64;
        self.window.push_back(Some(Pending { waiter, proposal, given: None, given_ticks: 0, age_ticks: 0 }));
        number
    }

    /// Settles one; `None` when it was settled before.
    pub fn settle(&mut self, number: u64) -> Option<Pending<W>> {
        let at = usize::try_from(number.checked_sub(self.floor)?).ok()?;
        let pending = self.window.get_mut(at)?.take();
        while let Some(None) = self.window.front() {
            self.window.pop_front();
            self.floor += 1;
        }
        pending
    }

    /// The unsettled ones with their numbers, in order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut Pending<W>)> {
        (self.floor..).zip(self.window.iter_mut()).filter_map(|(number, place)| Some((number, place.as_mut()?)))
    }

    /// Settles all that `choose` names, and gives them.
    pub fn settle_where(&mut self, mut choose: impl FnMut(u64, &Pending<W>) -> bool) -> Vec<Pending<W>> {
        let chosen: Vec<u64> =
            self.iter_mut().filter_map(|(number, pending)| choose(number, pending).then_some(number)).collect();
        chosen.into_iter().filter_map(|number| self.settle(number)).collect()
    }
}

/// Reads on their way: one round of raft at a time answers for all that came before it began.
#[derive(Debug)]
pub struct Reads<W> {
    /// The last round's number.
    round: u64,
    /// Came after the present round began.
    waiting: Vec<(W, u32)>,
    /// In the present round.
    asked: Vec<(W, u32)>,
    /// Ticks since the present round began.
    asked_ticks: u32,
    /// Confirmed; to be answered when the index is applied. The indexes never fall.
    confirmed: VecDeque<(u64, Vec<(W, u32)>)>,
}

impl<W> Default for Reads<W> {
    fn default() -> Self {
        Self { round: 0, waiting: Vec::new(), asked: Vec::new(), asked_ticks: 0, confirmed: VecDeque::new() }
    }
}

impl<W> Reads<W> {
    /// A new read.
    pub fn push(&mut self, waiter: W) {
        self.waiting.push((waiter, 0));
    }

    /// Begins a round when there are reads for one and none is under way; gives its number.
    pub fn begin_round(&mut self) -> Option<u64> {
        if self.waiting.is_empty() || !self.asked.is_empty() {
            return None;
        }
        std::mem::swap(&mut self.waiting, &mut self.asked);
        self.asked_ticks = 0;
        self.round += 1;
        Some(self.round)
    }

    /// Raft drops reads silently, without a leader or before the leader's first commit: after `patience_ticks`, or when leadership
    /// moved, the round's reads go into the next one.
    pub fn give_up_round(&mut self) {
        self.waiting.append(&mut self.asked);
    }

    /// Time passes. Gives the reads that have waited `limit_ticks` and are given up.
    pub fn tick(&mut self, patience_ticks: u32, limit_ticks: u32) -> Vec<W> {
        self.asked_ticks += 1;
        let confirmed = self.confirmed.iter_mut().flat_map(|(_, reads)| reads.iter_mut());
        for (_, age) in self.waiting.iter_mut().chain(self.asked.iter_mut()).chain(confirmed) {
            *age += 1;
        }
        if self.asked_ticks >= patience_ticks {
            self.give_up_round();
        }
        let old = |(_, age): &mut (W, u32)| *age >= limit_ticks;
        let mut late: Vec<W> = self.waiting.extract_if(.., old).map(|(waiter, _)| waiter).collect();
        for (_, reads) in &mut self.confirmed {
            late.extend(reads.extract_if(.., old).map(|(waiter, _)| waiter));
        }
        late
    }

    /// A round's answer: everything committed when it began is at or before `index`. Answers of rounds that were given up are void.
    pub fn confirm(&mut self, round: u64, index: u64) {
        if round == self.round && !self.asked.is_empty() {
            self.confirmed.push_back((index, std::mem::take(&mut self.asked)));
        }
    }

    /// The reads whose index is applied.
    pub fn applied(&mut self, applied: u64) -> Vec<(W, u64)> {
        let mut ready = Vec::new();
        while self.confirmed.front().is_some_and(|(index, _)| *index <= applied) {
            let Some((_, reads)) = self.confirmed.pop_front() else { break };
            ready.extend(reads.into_iter().map(|(waiter, _)| (waiter, applied)));
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_follows_what_is_settled() {
        let mut proposals = Proposals::default();
        let command = || Proposal::Command(Bytes::new());
        assert_eq!([(); 4].map(|()| proposals.push("w", command())), [1, 2, 3, 4]);
        assert!(proposals.settle(2).is_some() && proposals.settle(2).is_none());
        assert_eq!(proposals.floor(), 1);
        assert!(proposals.settle(1).is_some());
        assert_eq!(proposals.floor(), 3);
        assert_eq!(proposals.iter_mut().map(|(number, _)| number).collect::<Vec<_>>(), [3, 4]);
        assert_eq!(proposals.settle_where(|number, _| number == 4).len(), 1);
        assert!(proposals.settle(0).is_none() && proposals.settle(99).is_none());
        assert_eq!(proposals.push("w", command()), 5);
    }

    #[test]
    fn one_round_answers_all_before_it_and_none_after() {
        let mut reads = Reads::default();
        assert_eq!(reads.begin_round(), None, "nobody reads");
        reads.push("a");
        assert_eq!(reads.begin_round(), Some(1));
        reads.push("b");
        assert_eq!(reads.begin_round(), None, "one at a time");
        reads.confirm(1, 10);
        assert_eq!(reads.applied(9), []);
        assert_eq!(reads.applied(10), [("a", 10)]);
        assert_eq!(reads.begin_round(), Some(2), "b goes into the next one");
        reads.give_up_round();
        assert_eq!(reads.begin_round(), Some(3));
        reads.confirm(2, 11);
        assert_eq!(reads.applied(99), [], "the answer of a round that was given up");
        assert_eq!(reads.tick(5, 2), Vec::<&str>::new());
        assert_eq!(reads.tick(2, 2), ["b"], "too late");
    }
}
