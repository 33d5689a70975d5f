//! Optimistic concurrency with rollback (Schwarzkopf and others, Omega, EuroSys 2013): every scheduler decides on its own copy of the
//! cluster's state and commits; what conflicts is decided on again at once.

use std::collections::VecDeque;

use super::Options;
use crate::sim::engine::{DecisionTime, Strategy};
use crate::sim::job::{Amounts, Workload};
use crate::sim::world::{Happening, JobId, World};

/// When a proposal for a node is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Conflict {
    /// When the node has no room for it now.
    Fit,
    /// When anything has happened to the node since the copy was made.
    Sequence,
}

/// What is committed of a proposal with a conflict.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Commit {
    /// Nothing.
    AllOrNothing,
    /// What does not conflict.
    Incremental,
}

/// A proposal on its way.
#[derive(Debug)]
struct Attempt {
    job: JobId,
    /// Unit, node, version of the node in the copy.
    proposals: Vec<(u32, u32, u64)>,
    cost_us: u64,
    /// How often anything had come free when the copy was made.
    frees: u64,
}

#[derive(Debug, Default)]
struct Scheduler {
    queue: VecDeque<JobId>,
    /// Jobs for which there was no room; tried again when something comes free.
    parked: Vec<JobId>,
    attempt: Option<Attempt>,
}

/// The strategy.
pub struct Optimistic {
    conflict: Conflict,
    commit: Commit,
    time: DecisionTime,
    schedulers: Vec<Scheduler>,
    /// Services have the first scheduler to themselves.
    apart: bool,
    frees: u64,
    /// Batch jobs that have come, to deal them out in turn.
    batch_jobs: usize,
}

impl Optimistic {
    /// With so many schedulers. The first of several has the services to itself if the workload has any, as in Omega.
    pub fn new(workload: &Workload, conflict: Conflict, commit: Commit, options: Options) -> Optimistic {
        let schedulers: Vec<Scheduler> = (0..options.schedulers.max(1)).map(|_| Scheduler::default()).collect();
        let apart = schedulers.len() > 1 && workload.jobs.iter().any(|job| job.service);
        Optimistic { conflict, commit, time: options.time, schedulers, apart, frees: 0, batch_jobs: 0 }
    }

    fn scheduler_of(&mut self, service: bool) -> usize {
        if service && self.apart {
            return 0;
        }
        let first = usize::from(self.apart);
        self.batch_jobs += 1;
        first + self.batch_jobs % (self.schedulers.len() - first)
    }

    /// Begins the next attempt if the scheduler is free.
    fn kick(&mut self, at: usize, world: &mut World) {
        while self.schedulers[at].attempt.is_none() {
            let Some(job) = self.schedulers[at].queue.pop_front() else { return };
            let open: Vec<u32> = world.open_units(job).map(|(unit, ..)| unit).collect();
            let unit = world.job(job).unit();
            let needed = match self.commit {
                Commit::AllOrNothing => open.len(),
                Commit::Incremental => 1,
            };
            // Seen at a glance, without deciding on anything.
            if !unit.times(needed as i64).fits(&world.free_total()) {
                self.schedulers[at].parked.push(job);
                continue;
            }
            let mut proposals = place_somewhere(unit, &open, world);
            if proposals.len() < needed {
                proposals.clear();
            }
            let cost_us = self.time.of(world.job(job).service, open.len());
            world.decisions.spend(at, cost_us);
            self.schedulers[at].attempt = Some(Attempt { job, proposals, cost_us, frees: self.frees });
            world.set_timer(world.now_us() + cost_us, at as u64);
        }
    }

    fn finish(&mut self, at: usize, world: &mut World) {
        let Some(attempt) = self.schedulers[at].attempt.take() else { return };
        let job = attempt.job;
        let refused = |(_, node, version): &(u32, u32, u64), world: &World| match self.conflict {
            Conflict::Fit => false,
            Conflict::Sequence => world.version(*node) != *version,
        };
        // Versions are compared before anything of this transaction changes them.
        let (stale, mut fresh): (Vec<_>, Vec<_>) = attempt.proposals.iter().partition(|one| refused(one, world));
        let mut conflicts = stale.len();
        if conflicts > 0 && self.commit == Commit::AllOrNothing {
            fresh.clear();
        }
        let mut done = 0;
        for (unit, node, _) in fresh {
            match world.claim_unit(job, unit, node) {
                Ok(()) => done += 1,
                Err(_) => conflicts += 1,
            }
        }
        if conflicts > 0 && self.commit == Commit::AllOrNothing {
            // Nothing of it has ever been there: no time has passed.
            world.give_back(job);
            done = 0;
        }
        let service = usize::from(world.job(job).service);
        let decisions = &mut world.decisions;
        decisions.transactions += u64::from(!attempt.proposals.is_empty());
        decisions.conflicts[service] += u64::from(conflicts > 0);
        decisions.refused_units += conflicts as u64;
        decisions.lost_us += if done == 0 { attempt.cost_us } else { 0 };
        if world.settle(job) || world.open_units(job).next().is_none() {
            return;
        }
        let scheduler = &mut self.schedulers[at];
        if conflicts > 0 || attempt.frees != self.frees {
            scheduler.queue.push_front(job);
        } else {
            scheduler.parked.push(job);
        }
    }
}

/// Randomised first fit over the nodes as they are now, for as many of the units as there is room for.
fn place_somewhere(amounts: Amounts, units: &[u32], world: &mut World) -> Vec<(u32, u32, u64)> {
    let count = world.free().len();
    let first = world.rng.below(count);
    let mut proposals = Vec::new();
    for node in (first..count).chain(0..first) {
        let left = &units[proposals.len()..];
        if left.is_empty() {
            break;
        }
        let times = amounts.how_often(&world.free()[node], left.len());
        let version = world.version(node as u32);
        proposals.extend(left[..times].iter().map(|unit| (*unit, node as u32, version)));
    }
    proposals
}

impl Strategy for Optimistic {
    fn name(&self) -> String {
        let conflict = match self.conflict {
            Conflict::Fit => "fit",
            Conflict::Sequence => "seq",
        };
        let commit = match self.commit {
            Commit::AllOrNothing => "all",
            Commit::Incremental => "inc",
        };
        match self.schedulers.len() {
            1 => format!("opt-{conflict}-{commit}"),
            many => format!("opt-{conflict}-{commit}-{many}"),
        }
    }

    fn happen(&mut self, what: Happening, world: &mut World) {
        match what {
            Happening::Submitted(job) => {
                let at = self.scheduler_of(world.job(job).service);
                self.schedulers[at].queue.push_back(job);
                self.kick(at, world);
            }
            Happening::Ended(..) => {
                self.frees += 1;
                for at in 0..self.schedulers.len() {
                    let parked = std::mem::take(&mut self.schedulers[at].parked);
                    self.schedulers[at].queue.extend(parked);
                    self.kick(at, world);
                }
            }
            Happening::Timer(at) => {
                self.finish(at as usize, world);
                self.kick(at as usize, world);
            }
        }
    }
}
