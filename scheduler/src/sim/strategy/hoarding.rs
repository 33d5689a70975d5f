//! Hoarding, as frameworks do it on offers (Hindman and others, Mesos, NSDI 2011): a job takes of every offer what it can use, holds it,
//! and starts once it has its whole set.
//!
//! An offer is what is free on one node. While its receiver decides, nobody else is offered that node. A unit's further parts follow
//! its first one: the receiver sees what is free in an offer, not what the node could have free one day.

use std::collections::{BTreeMap, BTreeSet};

use crate::sim::engine::{DecisionTime, Strategy};
use crate::sim::job::Amounts;
use crate::sim::world::{Happening, JobId, World};

/// Who gives up, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Patience {
    /// Nobody ever; offers go round in random order.
    Endless,
    /// Whoever is not whole so long after its first claim gives everything back and stays away for a random time that doubles with each
    /// failure, microseconds.
    Timeout(u64),
    /// Nobody ever; offers go to the oldest first, and to others only what it cannot use.
    OldestFirst,
}

/// What a timer is for.
#[derive(Debug, Clone, Copy)]
enum Alarm {
    /// The receiver of the offer of this node has decided.
    Answer(JobId, u32),
    /// The job has held for long, if this is still its so many-th try.
    Timeout(JobId, u32),
    /// The job asks for offers again.
    Return(JobId),
    /// Everything that happened at this moment is known.
    Offer,
}

#[derive(Debug, Clone, Copy, Default)]
struct Framework {
    /// Offers that it has not answered.
    deciding: u32,
    /// It holds something.
    holds: bool,
    /// Times that it has given back.
    failures: u32,
    /// It takes no offers.
    away: bool,
}

/// The strategy.
pub struct Hoarding {
    patience: Patience,
    time: DecisionTime,
    waiting: BTreeMap<JobId, Framework>,
    /// Nodes that are on offer.
    offered: BTreeSet<u32>,
    alarms: Vec<Alarm>,
    /// Offers will be made, once all that happens at this moment is known: who comes at the same time gets offers in turn.
    offer_is_due: bool,
}

impl Hoarding {
    /// With this patience; each offer takes its receiver the time that is given.
    pub fn new(patience: Patience, time: DecisionTime) -> Hoarding {
        let (waiting, offered, alarms) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
        Hoarding { patience, time, waiting, offered, alarms, offer_is_due: false }
    }

    fn set_alarm(&mut self, alarm: Alarm, at_us: u64, world: &mut World) {
        self.alarms.push(alarm);
        world.set_timer(at_us, self.alarms.len() as u64 - 1);
    }

    fn ring(&mut self, alarm: Alarm, world: &mut World) {
        match alarm {
            Alarm::Answer(job, node) => {
                self.offered.remove(&node);
                if let Some(framework) = self.waiting.get_mut(&job) {
                    framework.deciding -= 1;
                }
                self.settle(job, world);
            }
            Alarm::Timeout(job, failures) => {
                let still = |framework: &&mut Framework| framework.failures == failures && framework.holds;
                let Some(framework) = self.waiting.get_mut(&job).filter(still) else { return };
                framework.failures += 1;
                (framework.holds, framework.away) = (false, true);
                world.give_back(job);
                world.decisions.give_backs += 1;
                let Patience::Timeout(timeout_us) = self.patience else { return };
                let back_off = (timeout_us << failures.min(6)) as f64 * world.rng.between(0.5, 1.5);
                self.set_alarm(Alarm::Return(job), world.now_us() + back_off as u64, world);
            }
            Alarm::Return(job) => {
                if let Some(framework) = self.waiting.get_mut(&job) {
                    framework.away = false;
                }
            }
            Alarm::Offer => {
                self.offer_is_due = false;
                self.offer(world);
            }
        }
    }

    /// Starts the job if it has answered all offers and has its set.
    fn settle(&mut self, job: JobId, world: &mut World) {
        let idle = self.waiting.get(&job).is_some_and(|framework| framework.deciding == 0);
        if idle && world.settle(job) {
            self.waiting.remove(&job);
        }
    }

    /// Makes offers until nobody can use what is left.
    fn offer(&mut self, world: &mut World) {
        loop {
            let mut order: Vec<JobId> =
                self.waiting.iter().filter(|(_, framework)| !framework.away).map(|(job, _)| *job).collect();
            let oldest_first = self.patience == Patience::OldestFirst;
            if !oldest_first {
                world.rng.shuffle(&mut order);
            }
            let mut any = false;
            for job in order {
                let mut roomy = self.roomy(world);
                if roomy.is_empty() {
                    return;
                }
                world.rng.shuffle(&mut roomy);
                for node in roomy {
                    if self.take(job, node, world) {
                        any = true;
                        // The others get their offers in between.
                        if !oldest_first {
                            break;
                        }
                    }
                }
            }
            if !any {
                return;
            }
        }
    }

    /// Nodes with anything free that are not on offer.
    fn roomy(&self, world: &World) -> Vec<u32> {
        let nodes = world.free().iter().enumerate().filter(|(_, free)| free.0 != Amounts::default().0);
        nodes.map(|(node, _)| node as u32).filter(|node| !self.offered.contains(node)).collect()
    }

    /// The job takes what it can use of a node. Whether that is anything.
    fn take(&mut self, job: JobId, node: u32, world: &mut World) -> bool {
        let Some(framework) = self.waiting.get(&job).copied() else { return false };
        let mut free = world.free()[node as usize];
        let mut wanted = Vec::new();
        let parts = &world.job(job).parts;
        for (unit, place, has) in world.open_units(job) {
            if place.is_some_and(|place| place != node) {
                continue;
            }
            let mut count = 0;
            for part in &parts[has..] {
                if !part.fits(&free) {
                    break;
                }
                free -= *part;
                count += 1;
            }
            if count == 0 {
                break;
            }
            wanted.push((unit, count));
        }
        for (unit, count) in &wanted {
            // Just measured, and nobody else has been there since.
            let claimed = world.claim(job, *unit, node, *count);
            debug_assert_eq!(claimed, Ok(()));
        }
        if wanted.is_empty() {
            return false;
        }
        let now_us = world.now_us();
        let first = !framework.holds;
        if let Some(framework) = self.waiting.get_mut(&job) {
            framework.holds = true;
            framework.deciding += 1;
        }
        if let (Patience::Timeout(after_us), true) = (self.patience, first) {
            self.set_alarm(Alarm::Timeout(job, framework.failures), now_us + after_us, world);
        }
        let cost_us = self.time.of(world.job(job).service, wanted.len());
        world.decisions.spend(0, cost_us);
        world.decisions.transactions += 1;
        if cost_us == 0 {
            if let Some(framework) = self.waiting.get_mut(&job) {
                framework.deciding -= 1;
            }
            self.settle(job, world);
        } else {
            self.offered.insert(node);
            self.set_alarm(Alarm::Answer(job, node), now_us + cost_us, world);
        }
        true
    }
}

impl Strategy for Hoarding {
    fn name(&self) -> String {
        match self.patience {
            Patience::Endless => "hoard".into(),
            Patience::Timeout(_) => "hoard-timeout".into(),
            Patience::OldestFirst => "hoard-oldest".into(),
        }
    }

    fn happen(&mut self, what: Happening, world: &mut World) {
        match what {
            Happening::Submitted(job) => drop(self.waiting.insert(job, Framework::default())),
            Happening::Ended(..) => {}
            Happening::Timer(number) => {
                let Some(alarm) = self.alarms.get(number as usize).copied() else { return };
                self.ring(alarm, world);
                if matches!(alarm, Alarm::Offer) {
                    return;
                }
            }
        }
        if !self.offer_is_due {
            self.offer_is_due = true;
            self.set_alarm(Alarm::Offer, world.now_us(), world);
        }
    }
}
