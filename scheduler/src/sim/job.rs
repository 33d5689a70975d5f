//! Amounts, jobs and the clusters that they run on.

use std::ops::{Add, AddAssign, Sub, SubAssign};

/// Number of resources.
pub const RESOURCES: usize = 3;
/// Their names, in the order of [`Amounts`].
pub const NAMES: [&str; RESOURCES] = ["cpu", "memory", "gpu"];
/// A second, in the simulator's unit of time.
pub const SECOND_US: u64 = 1_000_000;

/// CPU (thousandths), memory (MiB), GPU (thousandths of a device).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Amounts(pub [i64; RESOURCES]);

impl Amounts {
    /// Whether this is no more than `free`, in every resource.
    pub fn fits(&self, free: &Amounts) -> bool {
        self.0.iter().zip(&free.0).all(|(want, have)| want <= have)
    }

    /// So many times this.
    #[must_use]
    pub fn times(self, count: i64) -> Amounts {
        Amounts(self.0.map(|amount| amount.saturating_mul(count)))
    }

    /// How often this fits into `free`; at the most `limit`.
    pub fn how_often(&self, free: &Amounts, limit: usize) -> usize {
        let each = self.0.iter().zip(&free.0).filter(|(want, _)| **want > 0).map(|(want, have)| have.max(&0) / want);
        each.min().map_or(limit, |count| usize::try_from(count).unwrap_or(usize::MAX).min(limit))
    }
}

impl Add for Amounts {
    type Output = Amounts;
    fn add(mut self, other: Amounts) -> Amounts {
        self += other;
        self
    }
}

impl Sub for Amounts {
    type Output = Amounts;
    fn sub(mut self, other: Amounts) -> Amounts {
        self -= other;
        self
    }
}

impl AddAssign for Amounts {
    fn add_assign(&mut self, other: Amounts) {
        self.0.iter_mut().zip(other.0).for_each(|(mine, other)| *mine += other);
    }
}

impl SubAssign for Amounts {
    fn sub_assign(&mut self, other: Amounts) {
        self.0.iter_mut().zip(other.0).for_each(|(mine, other)| *mine -= other);
    }
}

impl std::iter::Sum for Amounts {
    fn sum<I: Iterator<Item = Amounts>>(all: I) -> Amounts {
        all.fold(Amounts::default(), Add::add)
    }
}

/// Work that comes at one time: equal units (pods), each of one or more parts (containers) that must be on one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// A service runs long and is decided on with care; the others are batch.
    pub service: bool,
    /// When it comes, microseconds.
    pub submit_us: u64,
    /// How long each unit runs, microseconds.
    pub duration_us: u64,
    /// What each part of a unit takes, in the order in which a strategy that goes part by part asks for them.
    pub parts: Vec<Amounts>,
    /// Number of units.
    pub count: u32,
    /// So many units must have their places before any of them runs; `count` for a rigid job, 1 for independent tasks.
    pub min_count: u32,
}

impl Job {
    /// What one unit takes.
    pub fn unit(&self) -> Amounts {
        self.parts.iter().copied().sum()
    }
}

/// Nodes, and what comes to them in order of time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// In words, for titles.
    pub name: String,
    /// What each node has.
    pub nodes: Vec<Amounts>,
    /// In order of `submit_us`.
    pub jobs: Vec<Job>,
}

impl Workload {
    /// What all nodes have.
    pub fn capacity(&self) -> Amounts {
        self.nodes.iter().copied().sum()
    }

    /// When the last job comes, microseconds.
    pub fn last_submit_us(&self) -> u64 {
        self.jobs.last().map_or(0, |job| job.submit_us)
    }

    /// Work that is offered over what the nodes can do until the last job comes, per resource; 0 for a resource that no node has.
    pub fn load(&self) -> [f64; RESOURCES] {
        let (capacity, time) = (self.capacity(), self.last_submit_us().max(1) as f64);
        let mut work = [0.0; RESOURCES];
        for job in &self.jobs {
            let unit = job.unit();
            let amount = |index: usize| unit.0[index] as f64 * f64::from(job.count) * job.duration_us as f64;
            (0..RESOURCES).for_each(|index| work[index] += amount(index));
        }
        let share = |index: usize| match capacity.0[index] {
            ..=0 => 0.0,
            all => work[index] / (all as f64 * time),
        };
        std::array::from_fn(share)
    }

    /// The resource that is asked for most: figures that are one number speak of it.
    pub fn main_resource(&self) -> usize {
        let load = self.load();
        (0..RESOURCES).max_by(|a, b| load[*a].total_cmp(&load[*b]).then(b.cmp(a))).unwrap_or(0)
    }

    /// Spaces the arrivals so that the load of the main resource is `load`. What a job is stays.
    #[must_use]
    pub fn at_load(mut self, load: f64) -> Workload {
        let now = self.load()[self.main_resource()];
        if now > 0.0 && load > 0.0 {
            let stretch = now / load;
            for job in &mut self.jobs {
                job.submit_us = (job.submit_us as f64 * stretch) as u64;
            }
        }
        self
    }

    /// Leaves out the jobs that the empty cluster could not run; gives their number.
    pub fn drop_impossible(&mut self) -> usize {
        let before = self.jobs.len();
        let nodes = std::mem::take(&mut self.nodes);
        self.jobs.retain(|job| {
            let (unit, mut left) = (job.unit(), job.count as usize);
            for node in &nodes {
                left -= unit.how_often(node, left);
                if left == 0 {
                    return true;
                }
            }
            false
        });
        self.nodes = nodes;
        before - self.jobs.len()
    }
}
