//! The nodes in virtual time: who holds what of them, and the account of every unit of capacity.
//!
//! A part of a unit is claimed on a node and from then on taken from everybody else. Once as many units are whole as the job needs
//! together, they start; until then what they hold is idle. What is given back without having started was wasted.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::job::{Amounts, Job, RESOURCES, Workload};
use super::rng::Rng;

/// Index of a job in the workload.
pub type JobId = u32;

/// What a strategy is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Happening {
    /// A job has come.
    Submitted(JobId),
    /// This unit of the job has run to its end; its place is free.
    Ended(JobId, u32),
    /// A timer that the strategy has set, with its number.
    Timer(u64),
}

/// Why a claim is not possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It would be more than the node has.
    #[error("the node has no room")]
    NoRoom,
    /// A unit's parts are on one node.
    #[error("the unit's first part is on another node")]
    Elsewhere,
    /// The unit runs, has ended, or has all its parts.
    #[error("the unit claims nothing any more")]
    NotOpen,
}

/// A unit's way.
#[derive(Debug, Clone)]
enum Unit {
    /// Not running: for each part that is claimed, since when.
    Open { node: u32, since: Vec<u64> },
    /// Running.
    Running { node: u32, since: u64 },
    /// Ended.
    Done,
}

/// Where a job is.
#[derive(Debug, Clone)]
struct Progress {
    units: Vec<Unit>,
    /// Units with all parts claimed, and not started.
    whole: u32,
    started: u32,
    ended: u32,
    /// When its last unit started.
    complete_us: Option<u64>,
}

/// Amounts times microseconds, exact.
pub type Integral = [i128; RESOURCES];

/// Where all capacity has gone. The four together are capacity times time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Account {
    /// Units ran.
    pub useful: Integral,
    /// Held by units that started later, or still held at the end.
    pub held: Integral,
    /// Held and given back without having started.
    pub wasted: Integral,
    /// Nobody's, measured by itself from the nodes' free amounts.
    pub free: Integral,
}

/// What deciding took.
#[derive(Debug, Clone, Default)]
pub struct Decisions {
    /// Time that each scheduler has spent deciding, microseconds.
    pub busy_us: Vec<u64>,
    /// Of it, for proposals of which nothing was accepted, microseconds.
    pub lost_us: u64,
    /// Proposals that changed something or were refused.
    pub transactions: u64,
    /// Proposals of which at least one unit was refused: for batch jobs, and for services.
    pub conflicts: [u64; 2],
    /// Units refused.
    pub refused_units: u64,
    /// Times that a job gave back what it held.
    pub give_backs: u64,
}

impl Decisions {
    /// Counts time of a scheduler.
    pub fn spend(&mut self, scheduler: usize, time_us: u64) {
        if self.busy_us.len() <= scheduler {
            self.busy_us.resize(scheduler + 1, 0);
        }
        self.busy_us[scheduler] += time_us;
    }
}

/// Means over equal stretches of time.
#[derive(Debug, Clone)]
pub struct Series {
    width_us: u64,
    /// Per stretch: amount that ran, and that was held, times microseconds, of the main resource.
    sums: Vec<[i128; 2]>,
}

impl Series {
    fn add(&mut self, from: u64, to: u64, amounts: [i64; 2]) {
        let mut at = from;
        while at < to {
            let bucket = (at / self.width_us) as usize;
            let end = to.min((bucket as u64 + 1) * self.width_us);
            if let Some(sums) = self.sums.get_mut(bucket) {
                sums.iter_mut()
                    .zip(amounts)
                    .for_each(|(sum, amount)| *sum += i128::from(amount) * i128::from(end - at));
            }
            at = end;
        }
    }

    /// Per stretch its middle in seconds, and the shares of `capacity` that ran and that were held.
    pub fn shares(&self, capacity: i64) -> Vec<(f64, [f64; 2])> {
        let whole = (capacity.max(1) as f64) * self.width_us as f64;
        let middle = |at: usize| (at as f64 + 0.5) * self.width_us as f64 / 1e6;
        self.sums.iter().enumerate().map(|(at, sums)| (middle(at), sums.map(|sum| sum as f64 / whole))).collect()
    }
}

/// Nodes, jobs and time.
pub struct World {
    jobs: Vec<Job>,
    progress: Vec<Progress>,
    capacity: Amounts,
    free: Vec<Amounts>,
    version: Vec<u64>,
    now_us: u64,
    events: BinaryHeap<Reverse<(u64, u64, Happening)>>,
    events_made: u64,
    free_total: Amounts,
    held_total: Amounts,
    running_total: Amounts,
    account: Account,
    main: usize,
    series: Series,
    last_progress_us: u64,
    /// Counters that strategies keep.
    pub decisions: Decisions,
    /// The strategy's randomness.
    pub rng: Rng,
}

impl World {
    /// A workload's beginning. `stretches` is the number of means that are kept over the time until `end_us`.
    pub fn new(workload: &Workload, seed: u64, end_us: u64, stretches: usize) -> World {
        let progress = workload.jobs.iter().map(|job| Progress {
            units: vec![Unit::Open { node: 0, since: Vec::new() }; job.count as usize],
            whole: 0,
            started: 0,
            ended: 0,
            complete_us: None,
        });
        let width_us = (end_us / stretches.max(1) as u64).max(1);
        let mut world = World {
            progress: progress.collect(),
            jobs: workload.jobs.clone(),
            capacity: workload.capacity(),
            free: workload.nodes.clone(),
            version: vec![0; workload.nodes.len()],
            now_us: 0,
            events: BinaryHeap::new(),
            events_made: 0,
            free_total: workload.capacity(),
            held_total: Amounts::default(),
            running_total: Amounts::default(),
            account: Account::default(),
            main: workload.main_resource(),
            series: Series { width_us, sums: vec![[0; 2]; stretches] },
            last_progress_us: 0,
            decisions: Decisions::default(),
            rng: Rng::new(seed),
        };
        for (id, job) in workload.jobs.iter().enumerate() {
            world.push(job.submit_us, Happening::Submitted(id as JobId));
        }
        world
    }

    // --------------------------------------------------------------------------------------------------------- time

    /// Now, microseconds.
    pub fn now_us(&self) -> u64 {
        self.now_us
    }

    /// Tells the strategy so at that time; a time that has passed means now.
    pub fn set_timer(&mut self, at_us: u64, number: u64) {
        self.push(at_us.max(self.now_us), Happening::Timer(number));
    }

    fn push(&mut self, at_us: u64, what: Happening) {
        self.events_made += 1;
        self.events.push(Reverse((at_us, self.events_made, what)));
    }

    /// The next event that is not after `end_us`, time being moved on to it; `None`, with time at `end_us`, when there is none.
    pub fn next(&mut self, end_us: u64) -> Option<Happening> {
        let due = self.events.peek().is_some_and(|Reverse((at, ..))| *at <= end_us);
        let Some(Reverse((at_us, _, what))) = self.events.pop().filter(|_| due) else {
            self.advance(end_us);
            return None;
        };
        self.advance(at_us);
        if let Happening::Ended(job, unit) = what {
            self.end(job, unit);
        }
        Some(what)
    }

    fn advance(&mut self, to_us: u64) {
        let time = to_us.saturating_sub(self.now_us);
        add(&mut self.account.free, self.free_total, time);
        let (running, held) = (self.running_total.0[self.main], self.held_total.0[self.main]);
        self.series.add(self.now_us, to_us, [running, held]);
        self.now_us = self.now_us.max(to_us);
    }

    // -------------------------------------------------------------------------------------------------------- reading

    /// A job.
    pub fn job(&self, job: JobId) -> &Job {
        &self.jobs[job as usize]
    }

    /// Number of jobs.
    pub fn job_count(&self) -> usize {
        self.jobs.len()
    }

    /// What is free, by node.
    pub fn free(&self) -> &[Amounts] {
        &self.free
    }

    /// What is free on all nodes together.
    pub fn free_total(&self) -> Amounts {
        self.free_total
    }

    /// What all nodes have.
    pub fn capacity(&self) -> Amounts {
        self.capacity
    }

    /// Index of the resource that is asked for most.
    pub fn main_resource(&self) -> usize {
        self.main
    }

    /// Grows with everything that happens to the node.
    pub fn version(&self, node: u32) -> u64 {
        self.version[node as usize]
    }

    /// Units that have not all their parts and do not run, each with the node of its first part, if it has one, and the number of parts.
    pub fn open_units(&self, job: JobId) -> impl Iterator<Item = (u32, Option<u32>, usize)> + '_ {
        let parts = self.job(job).parts.len();
        self.progress[job as usize].units.iter().enumerate().filter_map(move |(id, unit)| match unit {
            Unit::Open { node, since } if since.len() < parts => {
                Some((id as u32, (!since.is_empty()).then_some(*node), since.len()))
            }
            _ => None,
        })
    }

    /// Units that run, or hold all that they need.
    pub fn placed_count(&self, job: JobId) -> u32 {
        let progress = &self.progress[job as usize];
        progress.whole + progress.started
    }

    /// Whether all its units have started.
    pub fn is_complete(&self, job: JobId) -> bool {
        self.progress[job as usize].complete_us.is_some()
    }

    /// When its last unit started, microseconds.
    pub fn complete_us(&self, job: JobId) -> Option<u64> {
        self.progress[job as usize].complete_us
    }

    /// Whether all its units have ended.
    pub fn is_finished(&self, job: JobId) -> bool {
        self.progress[job as usize].ended == self.job(job).count
    }

    /// When a unit last started or ended, microseconds.
    pub fn last_progress_us(&self) -> u64 {
        self.last_progress_us
    }

    /// Whether nothing runs.
    pub fn is_still(&self) -> bool {
        self.running_total == Amounts::default()
    }

    /// What is held by units that do not run.
    pub fn held_total(&self) -> Amounts {
        self.held_total
    }

    /// Means over time.
    pub fn series(&self) -> &Series {
        &self.series
    }

    // -------------------------------------------------------------------------------------------------------- claims

    /// Claims the next `parts` parts of a unit on a node.
    ///
    /// # Errors
    /// When the node has no room for them, or the unit is not to be placed there; nothing is claimed then.
    pub fn claim(&mut self, job: JobId, unit: u32, node: u32, parts: usize) -> Result<(), Refused> {
        let (all, now_us) = (&self.jobs[job as usize].parts, self.now_us);
        let progress = &mut self.progress[job as usize];
        let Some(Unit::Open { node: place, since }) = progress.units.get_mut(unit as usize) else {
            return Err(Refused::NotOpen);
        };
        let wanted = all.get(since.len()..since.len() + parts).filter(|wanted| !wanted.is_empty());
        let wanted: Amounts = wanted.ok_or(Refused::NotOpen)?.iter().copied().sum();
        if !since.is_empty() && *place != node {
            return Err(Refused::Elsewhere);
        }
        let free = self.free.get_mut(node as usize).ok_or(Refused::NoRoom)?;
        if !wanted.fits(free) {
            return Err(Refused::NoRoom);
        }
        *place = node;
        since.extend(std::iter::repeat_n(now_us, parts));
        progress.whole += u32::from(since.len() == all.len());
        *free -= wanted;
        self.free_total -= wanted;
        self.held_total += wanted;
        self.version[node as usize] += 1;
        Ok(())
    }

    /// Claims a whole unit on a node.
    ///
    /// # Errors
    /// As [`World::claim`].
    pub fn claim_unit(&mut self, job: JobId, unit: u32, node: u32) -> Result<(), Refused> {
        self.claim(job, unit, node, self.jobs[job as usize].parts.len())
    }

    /// Starts the job's whole units, if as many are whole or started as it needs together. Whether now all of it has started.
    pub fn settle(&mut self, job: JobId) -> bool {
        let id = job as usize;
        if self.progress[id].whole + self.progress[id].started >= self.jobs[id].min_count && self.progress[id].whole > 0
        {
            for unit in 0..self.jobs[id].count {
                self.start(job, unit);
            }
            self.last_progress_us = self.now_us;
        }
        self.is_complete(job)
    }

    fn start(&mut self, job: JobId, unit: u32) {
        let (all, now_us) = (&self.jobs[job as usize], self.now_us);
        let progress = &mut self.progress[job as usize];
        let slot = &mut progress.units[unit as usize];
        let Unit::Open { node, since } = slot else { return };
        if since.len() < all.parts.len() {
            return;
        }
        for (part, since) in all.parts.iter().zip(since.iter()) {
            add(&mut self.account.held, *part, now_us - since);
        }
        *slot = Unit::Running { node: *node, since: now_us };
        progress.whole -= 1;
        progress.started += 1;
        if progress.started == all.count {
            progress.complete_us = Some(now_us);
        }
        let (amounts, end_us) = (all.unit(), now_us + all.duration_us);
        self.held_total -= amounts;
        self.running_total += amounts;
        self.push(end_us, Happening::Ended(job, unit));
    }

    fn end(&mut self, job: JobId, unit: u32) {
        let amounts = self.jobs[job as usize].unit();
        let progress = &mut self.progress[job as usize];
        let slot = &mut progress.units[unit as usize];
        let Unit::Running { node, since } = *slot else { return };
        add(&mut self.account.useful, amounts, self.now_us - since);
        *slot = Unit::Done;
        progress.ended += 1;
        self.running_total -= amounts;
        self.return_to(node, amounts);
        self.last_progress_us = self.now_us;
    }

    fn return_to(&mut self, node: u32, amounts: Amounts) {
        self.free[node as usize] += amounts;
        self.free_total += amounts;
        self.version[node as usize] += 1;
    }

    /// Gives back everything that the job holds and that does not run. Whether it held anything.
    pub fn give_back(&mut self, job: JobId) -> bool {
        let mut any = false;
        for unit in 0..self.jobs[job as usize].count {
            let parts = &self.jobs[job as usize].parts;
            let progress = &mut self.progress[job as usize];
            let Unit::Open { node, since } = &mut progress.units[unit as usize] else { continue };
            if since.is_empty() {
                continue;
            }
            any = true;
            progress.whole -= u32::from(since.len() == parts.len());
            let mut amounts = Amounts::default();
            for (part, since) in parts.iter().zip(since.drain(..)) {
                amounts += *part;
                add(&mut self.account.wasted, *part, self.now_us - since);
            }
            let node = *node;
            self.held_total -= amounts;
            self.return_to(node, amounts);
        }
        any
    }

    // ------------------------------------------------------------------------------------------------------- account

    /// The account until now, with what runs and what is held at this moment.
    pub fn account(&self) -> Account {
        let mut account = self.account;
        for (job, progress) in self.jobs.iter().zip(&self.progress) {
            for unit in &progress.units {
                match unit {
                    Unit::Open { since, .. } => {
                        for (part, since) in job.parts.iter().zip(since) {
                            add(&mut account.held, *part, self.now_us - since);
                        }
                    }
                    Unit::Running { since, .. } => add(&mut account.useful, job.unit(), self.now_us - since),
                    Unit::Done => {}
                }
            }
        }
        account
    }

    /// Holds the nodes against the units, which are counted from the beginning.
    ///
    /// # Errors
    /// When a node has less than nothing free, or the sums do not agree: what is wrong.
    pub fn check(&self) -> Result<(), String> {
        let mut taken = vec![Amounts::default(); self.free.len()];
        for (job, progress) in self.jobs.iter().zip(&self.progress) {
            for unit in &progress.units {
                match unit {
                    Unit::Open { node, since } => {
                        taken[*node as usize] += job.parts[..since.len()].iter().copied().sum();
                    }
                    Unit::Running { node, .. } => taken[*node as usize] += job.unit(),
                    Unit::Done => {}
                }
            }
        }
        for (node, (free, taken)) in self.free.iter().zip(&taken).enumerate() {
            if free.0.iter().any(|amount| *amount < 0) {
                return Err(format!("node {node} is overcommitted: free is {:?}, taken {:?}", free.0, taken.0));
            }
        }
        let (all, free) = (taken.into_iter().sum::<Amounts>(), self.free.iter().copied().sum::<Amounts>());
        if free != self.free_total || all != self.held_total + self.running_total || all + free != self.capacity {
            return Err(format!("sums differ: taken {:?}, free {:?}, capacity {:?}", all.0, free.0, self.capacity.0));
        }
        Ok(())
    }
}

fn add(integral: &mut Integral, amounts: Amounts, time_us: u64) {
    for (sum, amount) in integral.iter_mut().zip(amounts.0) {
        *sum += i128::from(amount) * i128::from(time_us);
    }
}
