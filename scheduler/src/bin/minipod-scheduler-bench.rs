//! `minipod-scheduler-bench`: how many decisions a second, by workload and number of nodes. Decisions and index updates only: no API, one
//! thread, CPU time. Prints `key value` lines.

use std::time::Duration;

use clap::Parser;
use minipod_proto::Resource;
use minipod_proto::v1::{
    Affinity, Container, LabelSelector, Node, NodeAffinity, NodeSelector, NodeSelectorRequirement, NodeSelectorTerm,
    Pod, PodAffinity, PodAffinityTerm, PodAntiAffinity, ResourceRequirements, TopologySpreadConstraint,
};
use minipod_scheduler::plan::needs::NeedsError;
use minipod_scheduler::plan::{Core, Event, NodeInfo, PodId, PodInfo, Profile};
use nix::time::{ClockId, clock_gettime};

/// Decisions per second of the scheduler's core, one core, no API.
#[derive(Debug, Parser)]
struct Flags {
    /// Numbers of nodes.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 5_000, 15_000, 100_000, 1_000_000])]
    nodes: Vec<u32>,
    /// Workloads; all by default.
    #[arg(long, value_delimiter = ',')]
    workloads: Vec<String>,
    /// A workload is stopped after so many seconds of measuring; its rate is that of what was done.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// spread or pack.
    #[arg(long, default_value = "spread")]
    profile: Profile,
}

const WORKLOADS: [&str; 10] = [
    "basic",
    "identical",
    "node_affinity",
    "spread",
    "affinity",
    "anti_affinity",
    "preemption",
    "gangs",
    "unschedulable",
    "memory",
];
/// Pods of one measurement at the most: beyond it nothing new is seen.
const PODS: u32 = 400_000;
/// Zones of the cluster.
const ZONES: u32 = 10;

fn main() -> std::process::ExitCode {
    let flags = Flags::parse();
    let unknown = flags.workloads.iter().find(|name| !WORKLOADS.contains(&name.as_str()));
    if let Some(name) = unknown {
        eprintln!("minipod-scheduler-bench: no such workload: {name}; there are {}", WORKLOADS.join(", "));
        return std::process::ExitCode::FAILURE;
    }
    for nodes in &flags.nodes {
        for name in WORKLOADS {
            if flags.workloads.is_empty() || flags.workloads.iter().any(|wanted| wanted == name) {
                let bench = Bench { nodes: *nodes, profile: flags.profile, limit: flags.seconds };
                if let Err(error) = bench.run(name) {
                    eprintln!("minipod-scheduler-bench: {name}: {error}");
                    return std::process::ExitCode::FAILURE;
                }
            }
        }
    }
    std::process::ExitCode::SUCCESS
}

struct Bench {
    nodes: u32,
    profile: Profile,
    /// Seconds.
    limit: f64,
}

/// Time that this thread has run, so that what else the machine does is not measured.
struct Clock(Duration);

impl Clock {
    fn start() -> Clock {
        Clock(Clock::cpu())
    }

    fn cpu() -> Duration {
        // Linux has this clock since 2.6.12; without it the figures would be infinite and plain to see.
        clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
    }

    fn seconds(&self) -> f64 {
        (Clock::cpu() - self.0).as_secs_f64()
    }
}

/// Resident memory of this process, bytes.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split(' ').nth(1).and_then(|field| field.parse::<u64>().ok()));
    pages.unwrap_or(0) * 4096
}

impl Bench {
    fn run(&self, name: &str) -> Result<(), NeedsError> {
        let rate = match name {
            "memory" => return self.memory(),
            "preemption" => self.preemption()?,
            "gangs" => self.gangs()?,
            "unschedulable" => self.unschedulable()?,
            // Mixed sizes until the cluster is four fifths full: a node takes about forty pods.
            "basic" => self.fill(self.nodes.saturating_mul(32), |at| sized(&format!("p{at}"), at))?,
            "identical" => self.fill(self.nodes.saturating_mul(32), |at| sized(&format!("p{at}"), 0))?,
            "node_affinity" => self.fill(self.nodes.saturating_mul(10), node_affinity)?,
            "spread" => self.fill(self.nodes.saturating_mul(10), spread)?,
            "affinity" => self.fill(self.nodes.saturating_mul(10), |at| near(at, false))?,
            _ => self.fill(self.nodes.saturating_mul(5), |at| near(at, true))?,
        };
        println!("{name}_{}_pods_s {rate:.0}", self.nodes);
        Ok(())
    }

    fn cluster(&self) -> Result<Core, NeedsError> {
        let mut core = Core::new(self.profile);
        for at in 0..self.nodes {
            core.apply(Event::Node(node(at)?));
        }
        Ok(core)
    }

    /// Places pods as they come; the pods are known to the core beforehand, as they would be from the watch.
    fn fill(&self, pods: u32, make: impl Fn(u32) -> Pod) -> Result<f64, NeedsError> {
        let mut core = self.cluster()?;
        let mut ids = Vec::new();
        for at in 0..pods.min(PODS) {
            ids.extend(core.upsert_pod(PodInfo::new(&make(at))?));
        }
        let started = Clock::start();
        let mut placed = 0_u32;
        for chunk in ids.chunks(256) {
            for pod in chunk {
                if let Some(node) = core.decide(*pod) {
                    core.assume(*pod, node);
                    placed += 1;
                }
            }
            if started.seconds() > self.limit {
                break;
            }
        }
        Ok(f64::from(placed) / started.seconds())
    }

    /// A cluster full of pods of priority 0; each new pod ends one and takes its place.
    fn preemption(&self) -> Result<f64, NeedsError> {
        let mut core = self.cluster()?;
        for at in 0..self.nodes.saturating_mul(8).min(8 * PODS) {
            let mut pod = pod(&format!("low{at}"), "4", "4Gi");
            pod.spec_mut().node_name = format!("n{}", at % self.nodes);
            core.apply(Event::Pod(PodInfo::new(&pod)?));
        }
        let mut ids = Vec::new();
        for at in 0..10_000 {
            let mut pod = pod(&format!("high{at}"), "4", "4Gi");
            pod.spec_mut().priority = Some(10);
            ids.extend(core.upsert_pod(PodInfo::new(&pod)?));
        }
        let started = Clock::start();
        let mut placed = 0_u32;
        for pod in ids {
            if core.decide(pod).is_none()
                && let Some(preemption) = core.preempt(pod)
            {
                let uids: Vec<_> =
                    preemption.victims.iter().filter_map(|pod| Some(core.pod(*pod)?.uid.clone())).collect();
                uids.iter().for_each(|uid| core.remove_pod(uid));
                core.assume(pod, preemption.node);
                placed += 1;
            }
            if started.seconds() > self.limit {
                break;
            }
        }
        Ok(f64::from(placed) / started.seconds())
    }

    /// Gangs of eight, all or nothing.
    fn gangs(&self) -> Result<f64, NeedsError> {
        let mut core = self.cluster()?;
        let mut ids = Vec::new();
        for at in 0..self.nodes.saturating_mul(8).min(PODS) {
            ids.extend(core.upsert_pod(PodInfo::new(&sized(&format!("p{at}"), at / 8))?));
        }
        let started = Clock::start();
        let mut placed = 0_usize;
        for gang in ids.chunks(8) {
            let mut done: Vec<PodId> = Vec::new();
            for pod in gang {
                if let Some(node) = core.decide(*pod) {
                    core.assume(*pod, node);
                    done.push(*pod);
                }
            }
            if done.len() == gang.len() {
                placed += gang.len();
            } else {
                done.iter().for_each(|pod| core.forget(*pod));
            }
            if started.seconds() > self.limit {
                break;
            }
        }
        Ok(placed as f64 / started.seconds())
    }

    /// A hundred classes of pods that fit nowhere are asked about again after every pod that comes or goes.
    fn unschedulable(&self) -> Result<f64, NeedsError> {
        let mut core = self.cluster()?;
        let mut waiting = Vec::new();
        for at in 0..100 {
            waiting.extend(core.upsert_pod(PodInfo::new(&pod(&format!("big{at}"), &format!("{}", 100 + at), "1Gi"))?));
        }
        let mut ids = Vec::new();
        for at in 0..100_000 {
            ids.extend(core.upsert_pod(PodInfo::new(&sized(&format!("p{at}"), at))?));
        }
        let started = Clock::start();
        let mut placed = 0_u32;
        for pair in ids.chunks(2) {
            let [first, second] = pair else { break };
            for pod in [first, second] {
                if let Some(node) = core.decide(*pod) {
                    core.assume(*pod, node);
                    placed += 1;
                }
            }
            core.forget(*second);
            for pod in &waiting {
                core.decide(*pod);
            }
            if started.seconds() > self.limit {
                break;
            }
        }
        Ok(f64::from(placed) / started.seconds())
    }

    fn memory(&self) -> Result<(), NeedsError> {
        let empty = resident();
        let mut core = self.cluster()?;
        let with_nodes = resident();
        println!("memory_{}_bytes_per_node {}", self.nodes, with_nodes.saturating_sub(empty) / u64::from(self.nodes));
        let pods = self.nodes.saturating_mul(10).clamp(100_000, 2_000_000);
        for at in 0..pods {
            let mut pod = sized(&format!("p{at}"), at);
            pod.spec_mut().node_name = format!("n{}", at % self.nodes);
            core.apply(Event::Pod(PodInfo::new(&pod)?));
        }
        println!("memory_{}_bytes_per_pod {}", self.nodes, resident().saturating_sub(with_nodes) / u64::from(pods));
        Ok(())
    }
}

fn node(at: u32) -> Result<NodeInfo, NeedsError> {
    let mut node = Node::default();
    let name = format!("n{at}");
    let labels = &mut node.meta_mut().labels;
    labels.insert("kubernetes.io/hostname".into(), name.clone());
    labels.insert("topology.kubernetes.io/zone".into(), format!("zone-{}", at % ZONES));
    node.meta_mut().name = name;
    let amounts = [("cpu", "32"), ("memory", "128Gi"), ("pods", "256")];
    node.status_mut().allocatable = amounts.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    NodeInfo::new(&node)
}

fn pod(name: &str, cpu: &str, memory: &str) -> Pod {
    let mut pod = Pod::default();
    let meta = pod.meta_mut();
    (meta.name, meta.namespace, meta.uid) = (name.into(), "bench".into(), format!("4d8a9a0c-{name}"));
    let requests = [("cpu", cpu), ("memory", memory)].map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let resources = Some(ResourceRequirements { requests, ..Default::default() });
    pod.spec_mut().containers = vec![Container { name: "main".into(), resources, ..Default::default() }];
    pod
}

/// Sixteen sizes, 800 milli and 3 GiB on average.
fn sized(name: &str, at: u32) -> Pod {
    let (cpu, memory) = (at % 4, at / 4 % 4);
    pod(name, ["200m", "500m", "1", "1500m"][cpu as usize], ["1Gi", "2Gi", "3Gi", "6Gi"][memory as usize])
}

fn app(at: u32) -> String {
    format!("app-{}", at % 10)
}

fn selector(at: u32) -> Option<LabelSelector> {
    Some(LabelSelector { match_labels: [("app".to_owned(), app(at))].into(), ..Default::default() })
}

fn node_affinity(at: u32) -> Pod {
    let mut pod = pod(&format!("p{at}"), "1", "2Gi");
    let zone = NodeSelectorRequirement {
        key: "topology.kubernetes.io/zone".into(),
        operator: "In".into(),
        values: vec![format!("zone-{}", at % ZONES), format!("zone-{}", (at + 1) % ZONES)],
    };
    let term = NodeSelectorTerm { match_expressions: vec![zone], ..Default::default() };
    let required = Some(NodeSelector { node_selector_terms: vec![term] });
    let affinity = NodeAffinity { required_during_scheduling_ignored_during_execution: required, ..Default::default() };
    pod.spec_mut().affinity = Some(Box::new(Affinity { node_affinity: Some(affinity), ..Default::default() }));
    pod
}

fn spread(at: u32) -> Pod {
    let mut pod = pod(&format!("p{at}"), "1", "2Gi");
    pod.meta_mut().labels.insert("app".into(), app(at));
    pod.spec_mut().topology_spread_constraints = vec![TopologySpreadConstraint {
        max_skew: 1,
        topology_key: "topology.kubernetes.io/zone".into(),
        when_unsatisfiable: "DoNotSchedule".into(),
        label_selector: selector(at),
        ..Default::default()
    }];
    pod
}

/// Pods that want to be in one zone with their like, or on no node with their like.
fn near(at: u32, anti: bool) -> Pod {
    let mut pod = pod(&format!("p{at}"), "1", "2Gi");
    pod.meta_mut().labels.insert("app".into(), app(at));
    let topology_key = if anti { "kubernetes.io/hostname" } else { "topology.kubernetes.io/zone" }.to_owned();
    let term = PodAffinityTerm { label_selector: selector(at), topology_key, ..Default::default() };
    let mut affinity = Affinity::default();
    if anti {
        let required = vec![term];
        affinity.pod_anti_affinity = Some(PodAntiAffinity {
            required_during_scheduling_ignored_during_execution: required,
            ..Default::default()
        });
    } else {
        let required = vec![term];
        affinity.pod_affinity =
            Some(PodAffinity { required_during_scheduling_ignored_during_execution: required, ..Default::default() });
    }
    pod.spec_mut().affinity = Some(Box::new(affinity));
    pod
}
