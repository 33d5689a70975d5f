//! minipod as it is: its planner, with backfill and the hold for whoever has waited long; several planners side by side, each with its
//! own view, and the binding transaction as the arbiter.

use super::Options;
use super::objects::{node_info, node_name, pod_info, unit_of};
use crate::plan::{Binding, Event, Outcome, Planner, PodInfo, Settings, Step};
use crate::sim::engine::{DecisionTime, Strategy};
use crate::sim::job::Workload;
use crate::sim::world::{Happening, JobId, World};

/// While pods wait, a planner is asked so often whether a hold has come due, microseconds.
const CHECK_US: u64 = 30_000_000;
/// The planner's own delays (a gang's next trial, a pod's after a conflict) are kept if they are this short, microseconds; longer ones
/// only renew explanations.
const SHORT_US: u64 = 1_000_000;

/// Timers from this number on are for a look at what has happened at this moment.
const LOOK: u64 = 1 << 32;

/// What a planner has proposed and not heard of yet.
struct Proposal {
    bindings: Vec<Binding>,
    together: bool,
    cost_us: u64,
}

struct Scheduler {
    planner: Planner,
    /// What has happened while it decided.
    inbox: Vec<Event>,
    proposals: Vec<Proposal>,
    /// When it will be asked again, microseconds.
    due_us: Option<u64>,
    waiting: usize,
    /// The job that it has decided on last.
    last_job: Option<JobId>,
    /// It will look when all that happens at this moment is known: a job's pods end together.
    looks: bool,
}

/// The strategy.
pub struct Minipod {
    schedulers: Vec<Scheduler>,
    time: DecisionTime,
}

impl Minipod {
    /// On the workload's nodes.
    pub fn new(workload: &Workload, options: Options) -> Minipod {
        let all = options.schedulers.max(1);
        let schedulers = (0..all).map(|at| {
            let mut planner = Planner::new(Settings {
                name: scheduler_name(at),
                shard: (0, 1),
                profile: options.profile,
                hold_after_ms: options.hold_after_ms,
            });
            for (node, amounts) in workload.nodes.iter().enumerate() {
                planner.observe(Event::Node(node_info(node as u32, *amounts)));
            }
            let (inbox, proposals) = (Vec::new(), Vec::new());
            Scheduler { planner, inbox, proposals, due_us: None, waiting: 0, last_job: None, looks: false }
        });
        Minipod { schedulers: schedulers.collect(), time: options.time }
    }

    /// Every scheduler sees everything.
    fn tell(&mut self, event: &Event) {
        for scheduler in &mut self.schedulers {
            scheduler.inbox.push(event.clone());
        }
    }

    fn submit(&mut self, job: JobId, world: &World) {
        let (at, spec) = (job as usize % self.schedulers.len(), world.job(job));
        let mut like: Option<PodInfo> = None;
        for unit in 0..spec.count {
            let info = pod_info(job, spec, unit, &scheduler_name(at), like.as_ref());
            like.get_or_insert_with(|| info.clone());
            self.tell(&Event::Pod(info));
        }
        self.schedulers[at].waiting += spec.count as usize;
    }

    /// Lets a scheduler that is not deciding look and decide.
    fn kick(&mut self, at: usize, world: &mut World) {
        let scheduler = &mut self.schedulers[at];
        if !scheduler.proposals.is_empty() {
            return;
        }
        for event in scheduler.inbox.drain(..) {
            scheduler.planner.observe(event);
        }
        let now_ms = (world.now_us() / 1000) as i64;
        let mut cost_us = 0;
        loop {
            for step in scheduler.planner.plan(now_ms, 1) {
                let (bindings, together) = match step {
                    Step::Bind(bindings) => (bindings, false),
                    Step::BindAll(bindings) => (bindings, true),
                    Step::Evict(_) | Step::Report(_) => continue,
                };
                let first = bindings.first().and_then(|binding| unit_of(&binding.uid));
                let service = first.is_some_and(|(job, _)| world.job(job).service);
                // The pods of a job come one after the other: what is looked at once for a job is counted once.
                let job = first.map(|(job, _)| job);
                let again = scheduler.last_job == job;
                scheduler.last_job = job;
                let whole = self.time.of(service, bindings.len());
                cost_us += if again { whole - self.time.of(service, 0) } else { whole };
                scheduler.proposals.push(Proposal { bindings, together, cost_us });
            }
            // Pods that found no place take no time.
            if !scheduler.proposals.is_empty() || scheduler.planner.due_ms(now_ms).is_none_or(|due| due > now_ms) {
                break;
            }
        }
        world.decisions.spend(at, cost_us);
        if !scheduler.proposals.is_empty() {
            self.wake(at, world.now_us() + cost_us, world);
        } else if scheduler.waiting > 0 {
            let due_us = scheduler.planner.due_ms(now_ms).map(|due| due.max(0).unsigned_abs().saturating_mul(1000));
            let short = due_us.filter(|due| *due <= world.now_us() + SHORT_US);
            self.wake(at, short.unwrap_or(world.now_us() + CHECK_US), world);
        }
    }

    fn wake(&mut self, at: usize, due_us: u64, world: &mut World) {
        let scheduler = &mut self.schedulers[at];
        let sooner = scheduler.due_us.is_none_or(|known| due_us < known || known <= world.now_us());
        if sooner || !scheduler.proposals.is_empty() {
            scheduler.due_us = Some(due_us);
            world.set_timer(due_us, at as u64);
        }
    }

    fn commit(&mut self, at: usize, world: &mut World) {
        for proposal in std::mem::take(&mut self.schedulers[at].proposals) {
            let outcomes = transact(&proposal, world);
            let refused = outcomes.iter().filter(|bound| !**bound).count() as u64;
            let jobs = proposal.bindings.iter().filter_map(|binding| unit_of(&binding.uid));
            let mut jobs: Vec<JobId> = jobs.map(|(job, _)| job).collect();
            jobs.dedup();
            let service = jobs.first().is_some_and(|job| world.job(*job).service);
            let decisions = &mut world.decisions;
            decisions.transactions += 1;
            decisions.conflicts[usize::from(service)] += u64::from(refused > 0);
            decisions.refused_units += refused;
            decisions.lost_us += if refused == outcomes.len() as u64 { proposal.cost_us } else { 0 };
            let now_ms = (world.now_us() / 1000) as i64;
            for (binding, bound) in proposal.bindings.iter().zip(outcomes) {
                let outcome = if bound { Outcome::Bound } else { Outcome::Refused };
                self.schedulers[at].planner.resolve(&binding.uid, outcome, now_ms);
                if bound {
                    self.confirm(at, binding);
                }
            }
            for job in jobs {
                world.settle(job);
            }
        }
    }

    fn confirm(&mut self, at: usize, binding: &Binding) {
        let core = self.schedulers[at].planner.core();
        let Some(mut info) = core.pod_id(&binding.uid).and_then(|pod| core.pod(pod)).cloned() else { return };
        info.node = Some(binding.node.as_str().into());
        self.schedulers[at].waiting -= 1;
        self.tell(&Event::Pod(info));
    }
}

fn scheduler_name(at: usize) -> String {
    format!("scheduler-{at}")
}

/// The binding transaction: refused where there is no room, each for itself or all together. Which were bound.
fn transact(proposal: &Proposal, world: &mut World) -> Vec<bool> {
    let claims = proposal.bindings.iter().map(|binding| {
        let (job, unit) = unit_of(&binding.uid)?;
        let node = binding.node.strip_prefix(node_name(0).trim_end_matches('0'))?.parse().ok()?;
        world.claim_unit(job, unit, node).ok().map(|()| job)
    });
    let claims: Vec<Option<JobId>> = claims.collect();
    if proposal.together && claims.iter().any(Option::is_none) {
        for job in claims.iter().flatten() {
            world.give_back(*job);
        }
        return vec![false; claims.len()];
    }
    claims.iter().map(Option::is_some).collect()
}

impl Strategy for Minipod {
    fn name(&self) -> String {
        match self.schedulers.len() {
            1 => "minipod".into(),
            many => format!("minipod-{many}"),
        }
    }

    fn happen(&mut self, what: Happening, world: &mut World) {
        match what {
            Happening::Submitted(job) => self.submit(job, world),
            Happening::Ended(job, unit) => self.tell(&Event::PodGone(format!("{job}-{unit}").into())),
            Happening::Timer(number) if number >= LOOK => {
                let at = (number - LOOK) as usize;
                self.schedulers[at].looks = false;
                self.kick(at, world);
                return;
            }
            Happening::Timer(at) => {
                let at = at as usize;
                // One of several timers: only the one that it waits for ends its deciding.
                if self.schedulers[at].due_us.is_some_and(|due| due <= world.now_us()) {
                    self.commit(at, world);
                }
            }
        }
        for (at, scheduler) in self.schedulers.iter_mut().enumerate() {
            if !scheduler.looks && scheduler.proposals.is_empty() {
                scheduler.looks = true;
                world.set_timer(world.now_us(), LOOK + at as u64);
            }
        }
    }
}
