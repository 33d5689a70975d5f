//! Leases: what is agreed ([`Leases`], part of the replicated state, without a clock) and when they run out ([`Clock`],
//! every member's own).
//!
//! Grants, renewals and revocations go through the log, so every member knows them and starts its own countdown when it
//! applies them; only the leader acts on a countdown that has ended. Its proposal names the *epoch* of the lease that it
//! saw run out: a renewal that comes first gives the lease another epoch, and the proposal does nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

/// The longest time to live, in seconds (etcd's limit).
pub const MAX_TTL_S: i64 = 9_000_000_000;

/// Shorter times to live become this, in seconds: etcd's default of one and a half election timeouts, rounded up.
pub const MIN_TTL_S: i64 = 2;

/// One lease.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lease {
    /// The time to live that was granted, in seconds.
    pub ttl: i64,
    /// What was left of it at the last checkpoint, in seconds; 0 when there was none since the last renewal.
    pub remaining: i64,
    /// Goes up with every renewal and checkpoint.
    pub epoch: u64,
    /// The keys that end with it.
    pub keys: BTreeSet<Box<[u8]>>,
}

/// All leases.
#[derive(Debug, Clone, Default)]
pub struct Leases {
    leases: BTreeMap<i64, Lease>,
    /// Never reused, so that a lease that is granted again under an old id is a new one to the clocks.
    last_epoch: u64,
}

impl Leases {
    /// One lease.
    pub fn get(&self, id: i64) -> Option<&Lease> {
        self.leases.get(&id)
    }

    /// All leases in the order of their ids.
    pub fn iter(&self) -> impl Iterator<Item = (i64, &Lease)> {
        self.leases.iter().map(|(id, lease)| (*id, lease))
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// The last epoch that was given; part of the state, because proposals name epochs.
    pub fn last_epoch(&self) -> u64 {
        self.last_epoch
    }

    pub(crate) fn restart(&mut self, last_epoch: u64) {
        self.last_epoch = last_epoch;
    }

    pub(crate) fn restore(&mut self, id: i64, lease: Lease) {
        self.leases.insert(id, lease);
    }

    /// Adds a lease.
    pub fn insert(&mut self, id: i64, lease: Lease) {
        self.last_epoch += 1;
        self.leases.insert(id, Lease { epoch: self.last_epoch, ..lease });
    }

    /// Takes a lease out.
    pub fn remove(&mut self, id: i64) -> Option<Lease> {
        self.leases.remove(&id)
    }

    /// Starts the lease's time anew; its time to live in seconds, or `None` when it is not there.
    pub fn renew(&mut self, id: i64) -> Option<i64> {
        let lease = self.leases.get_mut(&id)?;
        self.last_epoch += 1;
        lease.epoch = self.last_epoch;
        lease.remaining = 0;
        Some(lease.ttl)
    }

    /// Notes what is left of a lease, so that a restart does not give it all its time again.
    pub fn checkpoint(&mut self, id: i64, remaining: i64) {
        if let Some(lease) = self.leases.get_mut(&id) {
            self.last_epoch += 1;
            lease.epoch = self.last_epoch;
            lease.remaining = remaining.clamp(1, lease.ttl);
        }
    }

    pub(crate) fn attach(&mut self, id: i64, key: &[u8]) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.keys.insert(key.into());
        }
    }

    pub(crate) fn detach(&mut self, id: i64, key: &[u8]) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.keys.remove(key);
        }
    }
}

/// One member's countdowns. Time comes from outside.
#[derive(Debug, Default)]
pub struct Clock {
    countdowns: HashMap<i64, Countdown>,
    /// The leadership that the countdowns belong to.
    term: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Countdown {
    epoch: u64,
    end: Instant,
}

/// What the leader should propose.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// Leases that have run out, with the epoch that did.
    pub expired: Vec<(i64, u64)>,
    /// Leases with what is left of them, in seconds.
    pub checkpoints: Vec<(i64, i64)>,
}

/// A lease longer than this is checkpointed this often, so that leader changes do not keep it alive for good.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(300);

/// At most so many leases run out in one proposal: bounds the entry, and the revision that removes their keys.
const MAX_EXPIRED: usize = 1_000;

impl Clock {
    /// Starts the countdowns of leases that are new or were renewed, forgets those that are gone.
    pub fn observe(&mut self, leases: &Leases, now: Instant) {
        if self.countdowns.len() > leases.leases.len() {
            self.countdowns.retain(|id, _| leases.get(*id).is_some());
        }
        for (id, lease) in leases.iter() {
            self.observe_one(id, lease, now);
        }
    }

    /// Starts the countdown of one lease if it is new or was renewed.
    pub fn observe_one(&mut self, id: i64, lease: &Lease, now: Instant) {
        let fresh = Countdown { epoch: lease.epoch, end: end_of(lease, now) };
        let countdown = self.countdowns.entry(id).or_insert(fresh);
        if countdown.epoch != lease.epoch {
            *countdown = fresh;
        }
    }

    /// What is due, for the leader of `term`. A new leader gives every lease its time again: it cannot know which
    /// renewals the old one had answered.
    pub fn due(&mut self, leases: &Leases, term: u64, now: Instant) -> Due {
        if self.term != Some(term) {
            self.term = Some(term);
            self.countdowns.clear();
        }
        self.observe(leases, now);
        let mut due = Due::default();
        for (id, lease) in leases.iter() {
            let Some(countdown) = self.countdowns.get(&id) else { continue };
            if countdown.end <= now {
                if due.expired.len() < MAX_EXPIRED {
                    due.expired.push((id, countdown.epoch));
                }
            } else {
                let left = countdown.end - now;
                let known = if lease.remaining > 0 { lease.remaining } else { lease.ttl };
                if left + CHECKPOINT_EVERY < Duration::from_secs(known.unsigned_abs())
                    && due.checkpoints.len() < MAX_EXPIRED
                {
                    due.checkpoints.push((id, left.as_secs() as i64 + 1));
                }
            }
        }
        due
    }

    /// No longer the leader.
    pub fn step_down(&mut self) {
        self.term = None;
    }

    /// What is left of a lease, in whole seconds; `None` when its countdown is not known here.
    pub fn remaining_s(&self, id: i64, lease: &Lease, now: Instant) -> Option<i64> {
        let countdown = self.countdowns.get(&id).filter(|countdown| countdown.epoch == lease.epoch)?;
        Some(countdown.end.saturating_duration_since(now).as_secs() as i64)
    }
}

fn end_of(lease: &Lease, now: Instant) -> Instant {
    let seconds = if lease.remaining > 0 { lease.remaining } else { lease.ttl };
    // 9,000,000,000 seconds (285 years) fit every clock that counts nanoseconds in 64 bits from its start.
    let left = Duration::from_secs(seconds.clamp(0, MAX_TTL_S).unsigned_abs());
    now.checked_add(left).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(ttl: i64) -> Lease {
        Lease { ttl, ..Lease::default() }
    }

    #[test]
    fn a_lease_runs_out_when_its_time_is_over_and_not_before() {
        let (mut leases, mut clock, start) = (Leases::default(), Clock::default(), Instant::now());
        leases.insert(7, lease(10));
        leases.insert(8, lease(20));
        assert_eq!(clock.due(&leases, 1, start), Due::default());
        assert_eq!(clock.due(&leases, 1, start + Duration::from_millis(9_999)).expired, []);
        assert_eq!(clock.due(&leases, 1, start + Duration::from_secs(10)).expired, [(7, 1)]);
        leases.renew(7);
        assert_eq!(clock.due(&leases, 1, start + Duration::from_secs(11)).expired, [], "renewed in time");
        assert_eq!(clock.due(&leases, 1, start + Duration::from_secs(21)).expired, [(7, 3), (8, 2)]);
    }

    #[test]
    fn a_new_leader_gives_every_lease_its_time_again() {
        let (mut leases, mut clock, start) = (Leases::default(), Clock::default(), Instant::now());
        leases.insert(7, lease(10));
        clock.observe(&leases, start);
        assert_eq!(clock.due(&leases, 2, start + Duration::from_secs(10)).expired, []);
        assert_eq!(clock.due(&leases, 2, start + Duration::from_secs(19)).expired, []);
        assert_eq!(clock.due(&leases, 2, start + Duration::from_secs(20)).expired, [(7, 1)]);
    }

    #[test]
    fn long_leases_are_checkpointed_and_restarts_go_on_from_there() {
        let (mut leases, mut clock, start) = (Leases::default(), Clock::default(), Instant::now());
        leases.insert(7, lease(1_000));
        clock.due(&leases, 1, start);
        assert_eq!(clock.due(&leases, 1, start + Duration::from_secs(300)).checkpoints, []);
        let due = clock.due(&leases, 1, start + Duration::from_secs(400));
        assert_eq!(due.checkpoints, [(7, 601)]);
        leases.checkpoint(7, 601);
        let mut restarted = Clock::default();
        restarted.observe(&leases, start);
        assert_eq!(restarted.remaining_s(7, leases.get(7).unwrap(), start), Some(601));
    }
}
