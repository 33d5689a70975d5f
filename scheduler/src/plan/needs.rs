//! What matters for placement, taken once from the wire types: [`Needs`] of a pod, [`NodeInfo`] of a node.
//!
//! Pods with equal needs are one class: a cluster of a hundred thousand pods has a few hundred of them, and they share the work.

use std::collections::BTreeMap;
use std::sync::Arc;

use minipod_proto::Resource;
use minipod_proto::resources::{self, ResourceError, Resources};
use minipod_proto::rules::{RuleError, Rules};
use minipod_proto::v1::{self, Node, Pod, PodSpec, Taint};

// What the API server holds bindings against too: one reading of a pod's rules for both.
pub use minipod_proto::rules::{Inclusion, Placement, Spread, Term, Who};

/// Annotation: the name of the group (gang) that a pod belongs to, within its namespace.
pub const GROUP: &str = "minipod.dev/pod-group";
/// Annotation: how many pods of the group must be placed together for any of them to be placed.
pub const GROUP_MIN_COUNT: &str = "minipod.dev/pod-group-min-count";

/// Amounts above this are taken for this: more than any node has, and thousands of them add up within 63 bits.
pub const AMOUNT_LIMIT: i64 = 1 << 52;

/// CPU that scoring assumes for a pod that asks for none, so that such pods do not all go to one node (millis).
const ASSUMED_CPU_MILLI: i64 = 100;
/// Memory that scoring assumes for a pod that asks for none (bytes).
const ASSUMED_MEMORY: i64 = 200 * 1024 * 1024;

/// A pod or node cannot be understood; validation should have refused it.
#[derive(Debug, thiserror::Error)]
pub enum NeedsError {
    /// An amount is no amount.
    #[error("{object}: {source}")]
    Resources {
        /// Which object.
        object: String,
        /// What is wrong.
        source: ResourceError,
    },
    /// A rule about other pods cannot be understood.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// The group's minimum is no count.
    #[error("pod {pod}: annotation {GROUP_MIN_COUNT} is {value:?}: want a whole number from 1 to 100000")]
    MinCount {
        /// Which pod.
        pod: String,
        /// As given.
        value: String,
    },
}

/// A port of the node that a pod takes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPort {
    /// TCP, UDP or SCTP.
    pub protocol: String,
    /// The number.
    pub port: i32,
    /// The address; `0.0.0.0` is all of them.
    pub ip: String,
}

impl HostPort {
    /// Whether both cannot be on one node.
    pub fn conflicts(&self, other: &HostPort) -> bool {
        let any = |port: &HostPort| port.ip == "0.0.0.0";
        self.protocol == other.protocol && self.port == other.port && (self.ip == other.ip || any(self) || any(other))
    }
}

/// Everything of a pod that matters for where it may go. Equal needs are one class.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Needs {
    /// Its namespace: selectors of other pods look at it.
    pub namespace: String,
    /// Its labels: selectors of other pods look at them.
    pub labels: BTreeMap<String, String>,
    /// Effective requests above 0 by resource name, its place among `pods` included. CPU in thousandths.
    pub requests: Vec<(String, i64)>,
    /// CPU (millis) and memory (bytes) for scoring.
    pub weight: [i64; 2],
    /// Ports of the node.
    pub ports: Vec<HostPort>,
    /// Selector, node affinity, tolerations.
    pub placement: Placement,
    /// Pods it must be near to: all of these.
    pub affinity: Vec<Term>,
    /// Pods it must not be near to.
    pub anti_affinity: Vec<Term>,
    /// Pods it would be near to (positive weight) or away from (negative).
    pub preferred: Vec<(i64, Term)>,
    /// How pods shall be spread.
    pub spread: Vec<Spread>,
    /// The higher one goes first and may preempt lower ones.
    pub priority: i32,
    /// Whether it may preempt.
    pub preempts: bool,
}

/// A pod's membership in a gang.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Group {
    /// Name within the namespace.
    pub name: String,
    /// How many must be placed together.
    pub min_count: u32,
}

/// A pod as the scheduler sees it.
#[derive(Debug, Clone)]
pub struct PodInfo {
    /// metadata.uid.
    pub uid: Arc<str>,
    /// metadata.name.
    pub name: Arc<str>,
    /// spec.schedulerName.
    pub scheduler: Arc<str>,
    /// metadata.resourceVersion.
    pub revision: i64,
    /// The node it is bound to.
    pub node: Option<Arc<str>>,
    /// status.nominatedNodeName: pods are being ended there for it.
    pub nominated: Option<Arc<str>>,
    /// metadata.creationTimestamp, milliseconds since 1970.
    pub created_ms: i64,
    /// status.startTime (else the creation), milliseconds since 1970: preemption spares what runs longest.
    pub started_ms: i64,
    /// Marked for deletion.
    pub terminating: bool,
    /// Ended: it takes nothing any more.
    pub terminal: bool,
    /// Scheduling gates that are still closed.
    pub gates: Vec<String>,
    /// Its gang.
    pub group: Option<Group>,
    /// Where it may go.
    pub needs: Arc<Needs>,
}

/// A node as the scheduler sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeInfo {
    /// metadata.name.
    pub name: Arc<str>,
    /// metadata.labels.
    pub labels: BTreeMap<String, String>,
    /// spec.taints.
    pub taints: Vec<Taint>,
    /// spec.unschedulable.
    pub unschedulable: bool,
    /// Not marked for deletion, and its condition Ready is not other than True.
    pub ready: bool,
    /// What pods may use, by resource name. CPU in thousandths.
    pub allocatable: Vec<(String, i64)>,
}

impl NodeInfo {
    /// From a node of the API.
    ///
    /// # Errors
    /// When an amount of its allocatable is no quantity.
    pub fn new(node: &Node) -> Result<NodeInfo, NeedsError> {
        let all = resources::node_allocatable(node)
            .map_err(|source| NeedsError::Resources { object: format!("node {}", node.name()), source })?;
        let ready = node.condition("Ready").is_none_or(|condition| condition.status == "True");
        Ok(NodeInfo {
            name: node.name().into(),
            labels: node.meta().labels.clone(),
            taints: node.spec().taints.clone(),
            unschedulable: node.spec().unschedulable,
            ready: ready && node.meta().deletion_timestamp.is_none(),
            allocatable: amounts(&all, AMOUNT_LIMIT - 1),
        })
    }
}

fn amounts(all: &Resources, limit: i64) -> Vec<(String, i64)> {
    let positive = all.iter().filter(|(_, amount)| *amount > 0);
    positive.map(|(name, amount)| (name.to_owned(), amount.min(limit))).collect()
}

impl PodInfo {
    /// From a pod of the API.
    ///
    /// # Errors
    /// When a quantity, a selector or the group's annotation is wrong.
    pub fn new(pod: &Pod) -> Result<PodInfo, NeedsError> {
        PodInfo::with(pod, Arc::new(Needs::new(pod)?))
    }

    /// From another state of a pod whose needs are known: most changes (a binding, a report of its node) do not touch them.
    ///
    /// # Errors
    /// As [`PodInfo::new`].
    pub fn changed(old: &Pod, new: &Pod, known: &Arc<Needs>) -> Result<PodInfo, NeedsError> {
        let needs = if same_needs(old, new) { Arc::clone(known) } else { Arc::new(Needs::new(new)?) };
        PodInfo::with(new, needs)
    }

    fn with(pod: &Pod, needs: Arc<Needs>) -> Result<PodInfo, NeedsError> {
        let (meta, spec, status) = (pod.meta(), pod.spec(), pod.status());
        let millis = |time: Option<v1::Time>| time.map(|time| time.seconds * 1000 + i64::from(time.nanos) / 1_000_000);
        let created_ms = millis(meta.creation_timestamp).unwrap_or(0);
        Ok(PodInfo {
            uid: meta.uid.as_str().into(),
            name: meta.name.as_str().into(),
            scheduler: spec.scheduler_name.as_str().into(),
            revision: pod.revision(),
            node: pod.node_name().map(Into::into),
            nominated: Some(status.nominated_node_name.as_str()).filter(|name| !name.is_empty()).map(Into::into),
            created_ms,
            started_ms: millis(status.start_time).unwrap_or(created_ms),
            terminating: pod.is_terminating(),
            terminal: pod.is_terminal(),
            gates: spec.scheduling_gates.iter().map(|gate| gate.name.clone()).collect(),
            group: group(pod)?,
            needs,
        })
    }

    /// Its namespace.
    pub fn namespace(&self) -> &str {
        &self.needs.namespace
    }

    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.needs.namespace, self.name)
    }
}

/// Whether two states of a pod have the same needs. They come from its labels, from the spec, which its generation tells, and from what its
/// status says of a resize.
fn same_needs(old: &Pod, new: &Pod) -> bool {
    let untouched = |pod: &Pod| {
        let status = pod.status();
        let mut containers = status.init_container_statuses.iter().chain(&status.container_statuses);
        minipod_proto::resize::pending(pod).is_none() && containers.all(|one| one.allocated_resources.is_empty())
    };
    old.meta().generation == new.meta().generation
        && old.meta().labels == new.meta().labels
        && untouched(old)
        && untouched(new)
}

fn group(pod: &Pod) -> Result<Option<Group>, NeedsError> {
    let annotations = &pod.meta().annotations;
    let Some(name) = annotations.get(GROUP).filter(|name| !name.is_empty()) else { return Ok(None) };
    let min_count = match annotations.get(GROUP_MIN_COUNT) {
        None => 1,
        Some(text) => {
            let count = text.parse::<u32>().ok().filter(|count| (1..=100_000).contains(count));
            count.ok_or_else(|| NeedsError::MinCount { pod: pod.key(), value: text.clone() })?
        }
    };
    Ok(Some(Group { name: name.clone(), min_count }))
}

impl Needs {
    /// From a pod of the API.
    ///
    /// # Errors
    /// When a quantity or a selector is wrong.
    pub fn new(pod: &Pod) -> Result<Needs, NeedsError> {
        let spec = pod.spec();
        let requested = minipod_proto::resize::scheduled_requests(pod)
            .map_err(|source| NeedsError::Resources { object: format!("pod {}", pod.key()), source })?;
        let rules = Rules::of(pod)?;
        let or = |amount: i64, assumed: i64| if amount == 0 { assumed } else { amount.min(AMOUNT_LIMIT) };
        let mut needs = Needs {
            namespace: pod.namespace().to_owned(),
            labels: pod.meta().labels.clone(),
            requests: amounts(&requested, AMOUNT_LIMIT),
            weight: [or(requested.cpu_milli, ASSUMED_CPU_MILLI), or(requested.memory_bytes, ASSUMED_MEMORY)],
            ports: host_ports(spec),
            placement: Placement::of(spec),
            affinity: rules.affinity,
            anti_affinity: rules.anti_affinity,
            preferred: Vec::new(),
            spread: rules.spread,
            priority: spec.priority.unwrap_or(0),
            preempts: spec.preemption_policy != "Never",
        };
        needs.take_preferences(pod)?;
        Ok(needs)
    }

    fn take_preferences(&mut self, pod: &Pod) -> Result<(), NeedsError> {
        let Some(affinity) = &pod.spec().affinity else { return Ok(()) };
        let near = affinity.pod_affinity.as_ref();
        let away = affinity.pod_anti_affinity.as_ref();
        let near = near.iter().flat_map(|all| &all.preferred_during_scheduling_ignored_during_execution);
        let away = away.iter().flat_map(|all| &all.preferred_during_scheduling_ignored_during_execution);
        let signed = near.map(|one| (1, one)).chain(away.map(|one| (-1, one)));
        for (sign, weighted) in signed {
            if let Some(one) = &weighted.pod_affinity_term {
                self.preferred.push((sign * i64::from(weighted.weight), Term::new(pod, "affinity", one)?));
            }
        }
        Ok(())
    }

    /// Whether pods with these needs are among those that `who` speaks of; `namespaces` has the labels of namespaces.
    pub fn matches(&self, who: &Who, namespaces: &BTreeMap<String, BTreeMap<String, String>>) -> bool {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        let labels = || namespaces.get(&self.namespace).unwrap_or(&NONE);
        who.has_labels(&self.labels) && who.has_namespace(&self.namespace, labels())
    }
}

fn host_ports(spec: &PodSpec) -> Vec<HostPort> {
    // As in Kubernetes, ports of init containers count only where the container stays: in sidecars.
    let sidecars = spec.init_containers.iter().filter(|container| container.is_sidecar());
    let ports = sidecars.chain(&spec.containers).flat_map(|container| &container.ports);
    let ports = ports.filter(|port| port.host_port > 0);
    let mut all: Vec<HostPort> = ports
        .map(|port| HostPort {
            protocol: if port.protocol.is_empty() { "TCP".to_owned() } else { port.protocol.clone() },
            port: port.host_port,
            ip: if port.host_ip.is_empty() { "0.0.0.0".to_owned() } else { port.host_ip.clone() },
        })
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}
