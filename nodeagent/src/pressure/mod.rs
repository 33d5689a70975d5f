//! The node's own health: pods that take more disk than their manifests allow, and what happens when the machine runs short.
//!
//! One task measures every few seconds, asks the pure parts ([`local`], [`plan`]) and carries out what they say: a condition of the
//! node, or the end of one pod, which its worker brings about like any other. New pods meet the conditions in [`admit`].

pub mod admit;
pub mod local;
pub mod plan;
pub mod thresholds;
pub mod usage;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use minipod_podshim::cgroup::{Cgroups, Group};
use minipod_proto::resources::{Resources, container_requests, pod_requests};
use minipod_proto::v1::Pod;

use self::local::DiskUse;
use self::plan::{Eviction, Memory, Observed, PodUse, Rules, Use};
use self::thresholds::{Signal, thresholds};
use self::usage::{Usage, measure};
use crate::agent::Agent;
use crate::clock::boot_ms;
use crate::config::Config;
use crate::image::gc;
use crate::node::{disk, memory, tasks};
use crate::want::{DEFAULT_GRACE_S, Uid, grace_ms, key_of};

/// What the flags say.
///
/// # Errors
/// A soft threshold without its grace.
pub fn rules(config: &Config) -> Result<Rules, String> {
    Ok(Rules {
        thresholds: thresholds(&config.eviction_hard, &config.eviction_soft, &config.eviction_soft_grace_period)?,
        transition_ms: config.eviction_pressure_transition_period_ms,
        max_pod_grace_ms: config.eviction_max_pod_grace_period.saturating_mul(1000),
    })
}

/// What the flags say of images.
///
/// # Errors
/// A low threshold that is not below the high one.
pub fn image_rules(config: &Config) -> Result<gc::Rules, String> {
    let (high, low) = (config.image_gc_high_threshold, config.image_gc_low_threshold);
    if low >= high {
        return Err(format!("--image-gc-low-threshold: {low}, want less than the high threshold of {high}"));
    }
    Ok(gc::Rules {
        high_percent: high,
        low_percent: low,
        min_age_ms: config.image_minimum_gc_age_ms,
        max_age_ms: config.image_maximum_gc_age_ms,
    })
}

/// A first look, before any pod comes: the pods of a node that is short when its agent starts are to meet that.
#[must_use]
pub fn look(agent: &Agent) -> Keeper {
    let mut keeper = Keeper { memory: Memory::default(), cgroups: Cgroups::detect().ok() };
    keeper.observe(agent);
    keeper
}

/// Looks after the node until the agent ends.
pub async fn run(agent: Arc<Agent>, mut keeper: Keeper) {
    let pause = Duration::from_millis(agent.config.housekeeping_interval_ms);
    loop {
        tokio::time::sleep(pause).await;
        let here = agent.clone();
        // It walks through directories.
        let round = tokio::task::spawn_blocking(move || {
            keeper.round(&here);
            keeper
        });
        match round.await {
            Ok(back) => keeper = back,
            // The runtime ends.
            Err(_) => return,
        }
    }
}

/// What is remembered of the node from round to round.
#[derive(Debug)]
pub struct Keeper {
    memory: Memory,
    cgroups: Option<Cgroups>,
}

impl Keeper {
    fn observe(&mut self, agent: &Agent) -> Option<plan::Short> {
        let (conditions, short) = plan::observe(&agent.eviction, &mut self.memory, &signals(agent), boot_ms());
        agent.set_pressure(conditions);
        short
    }

    fn round(&mut self, agent: &Agent) {
        let short = self.observe(agent);
        let pods = agent.pods.evictable();
        let mut evicted = false;
        for (uid, pod) in pods.iter().filter(|(_, pod)| local::is_limited(pod)) {
            if let Some(message) = local::judge(pod, &disk_use(agent, uid, pod)) {
                evict(agent, &Eviction { uid: uid.clone(), message, grace_ms: 0 });
                evicted = true;
            }
        }
        let pressed = short.is_some_and(|short| short.signal().is_disk());
        // The node's own leavings go before any pod.
        let freed = collect_images(agent, pressed);
        // What that frees shows in the next round.
        let Some(short) = short.filter(|_| !(evicted || pressed && freed)) else { return };
        tracing::warn!(signal = %short.signal(), "the node runs short");
        let with_disk = short.signal().is_disk();
        let uses = pods.iter().map(|(uid, pod)| (uid.clone(), self.pod_use(agent, uid, pod, with_disk)));
        match plan::choose(&agent.eviction, &short, &uses.collect()) {
            Some(eviction) => evict(agent, &eviction),
            None => tracing::warn!(signal = %short.signal(), "there is no pod that could be evicted"),
        }
    }

    fn pod_use(&self, agent: &Agent, uid: &Uid, pod: &Pod, with_disk: bool) -> PodUse {
        let group = self.cgroups.as_ref().map(|cgroups| cgroups.pod(&agent.config.cgroup_root, &uid.0));
        let disk = if with_disk { disk_use(agent, uid, pod) } else { DiskUse::default() };
        let (runs, used) = (agent.view(uid).map(|view| view.runs).unwrap_or_default(), Group::working_set_bytes);
        let of_container = |container: &minipod_proto::v1::Container| {
            let name = &container.name;
            let asked = container_requests(container).unwrap_or_default();
            let run = runs.get(name).filter(|run| run.running);
            let of_run =
                group.as_ref().zip(run).map(|(group, run)| used(&group.child(&format!("{name}.{}", run.attempt))));
            let on_disk = disk.containers.get(name).copied().unwrap_or(0);
            (name.clone(), use_of(of_run.unwrap_or(0), asked.memory_bytes), use_of(on_disk, asked.ephemeral_bytes))
        };
        let spec = pod.spec();
        let asked: Resources = pod_requests(spec).unwrap_or_default();
        let (namespace, name) = key_of(pod);
        PodUse {
            name: format!("{namespace}/{name}"),
            priority: spec.priority.unwrap_or(0),
            grace_ms: grace_ms(spec.termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE_S)),
            memory: use_of(group.as_ref().map_or(0, used), asked.memory_bytes),
            disk: use_of(disk.total_bytes(), asked.ephemeral_bytes),
            inodes: disk.inodes,
            tasks: group.as_ref().map_or(0, Group::tasks),
            containers: spec.all_containers().map(of_container).collect(),
        }
    }
}

fn use_of(used: u64, requested: i64) -> Use {
    Use { used, requested: u64::try_from(requested).unwrap_or(0) }
}

fn evict(agent: &Agent, eviction: &Eviction) {
    tracing::warn!(uid = %eviction.uid, message = eviction.message, grace_ms = eviction.grace_ms, "a pod is evicted");
    agent.pods.evict(&eviction.uid, &eviction.message, eviction.grace_ms);
}

/// Removes unused images if the disk is full enough; tells whether any went.
fn collect_images(agent: &Agent, pressed: bool) -> bool {
    let disk = disk(&agent.config.data_dir).unwrap_or_default();
    let choose = |images: &[gc::Candidate]| {
        gc::plan(&agent.image_gc, (disk.bytes, disk.free_bytes), images, crate::clock::wall_ms(), pressed)
    };
    match agent.remove_images(choose) {
        Ok(gone) => !gone.is_empty(),
        Err(error) => {
            tracing::warn!(error = crate::report::chain(&error), "an unused image stays");
            false
        }
    }
}

/// Every signal as it is now; what cannot be measured is left out.
fn signals(agent: &Agent) -> BTreeMap<Signal, Observed> {
    let mut all = BTreeMap::new();
    let (total, available) = memory();
    if total > 0 {
        all.insert(Signal::MemoryAvailable, Observed { available, capacity: total });
    }
    if let Some((most, running)) = tasks() {
        all.insert(Signal::PidAvailable, Observed { available: most.saturating_sub(running), capacity: most });
    }
    if let Some(disk) = disk(&agent.config.data_dir) {
        let bytes = Observed { available: disk.free_bytes, capacity: disk.bytes };
        all.extend([(Signal::NodefsAvailable, bytes), (Signal::ImagefsAvailable, bytes)]);
        // Some file systems make files as they go and count none.
        if disk.inodes > 0 {
            let inodes = Observed { available: disk.free_inodes, capacity: disk.inodes };
            all.extend([(Signal::NodefsInodesFree, inodes), (Signal::ImagefsInodesFree, inodes)]);
        }
    }
    all
}

/// What the pod has on the disk now.
fn disk_use(agent: &Agent, uid: &Uid, pod: &Pod) -> DiskUse {
    let (paths, logs) = (agent.paths.pod(uid), agent.paths.logs_of(pod, uid));
    let mut all = Usage::default();
    let mut note = |usage: Usage| {
        all = all.and(usage);
        usage.bytes
    };
    let spec = pod.spec();
    let containers = spec.all_containers().map(|container| {
        let name = &container.name;
        (name.clone(), note(measure(&paths.attempts(name)).and(measure(&logs.join(name)))))
    });
    let containers = containers.collect();
    let on_disk = spec.volumes.iter().filter(|volume| local::is_disk(volume));
    let volumes = on_disk.map(|volume| (volume.name.clone(), note(measure(&paths.volume(&volume.name))))).collect();
    DiskUse { containers, volumes, inodes: all.inodes }
}
