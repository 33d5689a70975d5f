//! Whole pods and whole gangs, decided on by minipod's core, by one scheduler with the plainest of queues.

use std::collections::{HashMap, VecDeque};

use super::Options;
use super::objects::{node_info, pod_info};
use crate::plan::{Core, Event, PodId, PodInfo};
use crate::sim::engine::{DecisionTime, Strategy};
use crate::sim::job::{Amounts, Workload};
use crate::sim::world::{Happening, JobId, World};

/// Who is next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// The oldest; while it does not fit, nobody.
    Strict,
    /// The oldest that fits.
    Backfill,
}

/// The strategy.
pub struct Atomic {
    order: Order,
    time: DecisionTime,
    core: Core,
    waiting: VecDeque<JobId>,
    /// The job that is being bound; its places are taken.
    binding: Option<JobId>,
}

impl Atomic {
    /// On the workload's nodes.
    pub fn new(workload: &Workload, order: Order, options: Options) -> Atomic {
        let mut core = Core::new(options.profile);
        for (node, amounts) in workload.nodes.iter().enumerate() {
            core.apply(Event::Node(node_info(node as u32, *amounts)));
        }
        Atomic { order, time: options.time, core, waiting: VecDeque::new(), binding: None }
    }

    fn next(&mut self, world: &mut World) {
        // By unit: what of a size has failed in this round fails again, and so does more of it.
        let mut failed: HashMap<Amounts, u32> = HashMap::new();
        let mut at = 0;
        while self.binding.is_none() && at < self.waiting.len() {
            let job = self.waiting[at];
            let unit = world.job(job).unit();
            let open = world.open_units(job).count() as u32;
            let hopeless = failed.get(&unit).is_some_and(|least| open >= *least);
            if !hopeless && self.place(job, world) {
                if world.open_units(job).next().is_none() {
                    self.waiting.remove(at);
                }
                continue;
            }
            if self.order == Order::Strict {
                return;
            }
            failed.entry(unit).and_modify(|least| *least = (*least).min(open)).or_insert(open);
            at += 1;
        }
    }

    /// Places as many units as the job needs together, and further ones where there is room. Whether any were.
    fn place(&mut self, job: JobId, world: &mut World) -> bool {
        let spec = world.job(job).clone();
        let missing = spec.min_count.saturating_sub(world.placed_count(job)).max(1) as usize;
        if !spec.unit().times(missing as i64).fits(&world.free_total()) {
            return false;
        }
        let open: Vec<u32> = world.open_units(job).map(|(unit, ..)| unit).collect();
        let mut like: Option<PodInfo> = None;
        let mut placed: Vec<(u32, PodId, u32)> = Vec::new();
        for unit in open {
            let info = pod_info(job, &spec, unit, "sim", like.as_ref());
            like.get_or_insert_with(|| info.clone());
            let Some(pod) = self.core.upsert_pod(info) else { continue };
            match self.core.decide(pod) {
                Some(node) => {
                    self.core.assume(pod, node);
                    placed.push((unit, pod, node));
                }
                None => {
                    self.core.remove_pod(&format!("{job}-{unit}"));
                    break;
                }
            }
        }
        if placed.len() < missing {
            for (unit, ..) in placed {
                self.core.remove_pod(&format!("{job}-{unit}"));
            }
            return false;
        }
        let cost_us = self.time.of(spec.service, placed.len());
        world.decisions.spend(0, cost_us);
        world.decisions.transactions += 1;
        for (unit, _, node) in placed {
            // The core's nodes have the world's numbers, and nobody else places here.
            let claimed = world.claim_unit(job, unit, node);
            debug_assert_eq!(claimed, Ok(()));
        }
        if cost_us == 0 {
            world.settle(job);
        } else {
            self.binding = Some(job);
            world.set_timer(world.now_us() + cost_us, 0);
        }
        true
    }
}

impl Strategy for Atomic {
    fn name(&self) -> String {
        match self.order {
            Order::Strict => "atomic-fcfs".into(),
            Order::Backfill => "atomic-backfill".into(),
        }
    }

    fn happen(&mut self, what: Happening, world: &mut World) {
        match what {
            Happening::Submitted(job) => self.waiting.push_back(job),
            Happening::Ended(job, unit) => self.core.remove_pod(&format!("{job}-{unit}")),
            Happening::Timer(_) => {
                if let Some(job) = self.binding.take() {
                    world.settle(job);
                }
            }
        }
        self.next(world);
    }
}
