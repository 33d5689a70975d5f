//! What matters for placement, taken once from the wire types: [`Needs`] of a pod, [`NodeInfo`] of a node.
//!
//! Pods with equal needs are one class: a cluster of a hundred thousand pods has a few hundred of them, and they share the work.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use minipod_proto::Resource;
use minipod_proto::resources::{self, ResourceError, Resources};
use minipod_proto::selector::{LabelSelector, SelectorError};
use minipod_proto::v1::{self, Node, Pod, PodSpec, Taint};
use prost::Message;

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
    /// A label selector is none.
    #[error("pod {pod}: {field}: {source}")]
    Selector {
        /// Which pod.
        pod: String,
        /// Where in its spec.
        field: &'static str,
        /// What is wrong.
        source: SelectorError,
    },
    /// The group's minimum is no count.
    #[error("pod {pod}: annotation {GROUP_MIN_COUNT} is {value:?}: want a whole number from 1 to 100000")]
    MinCount {
        /// Which pod.
        pod: String,
        /// As given.
        value: String,
    },
    /// A term names no topology.
    #[error("pod {pod}: {field}: topologyKey is empty: want the key of a node label, such as kubernetes.io/hostname")]
    TopologyKey {
        /// Which pod.
        pod: String,
        /// Where in its spec.
        field: &'static str,
    },
    /// A number is out of its range.
    #[error("pod {pod}: topologySpreadConstraints: {field} is {value}: want at least 1")]
    Spread {
        /// Which pod.
        pod: String,
        /// Which number.
        field: &'static str,
        /// As given.
        value: i32,
    },
}

/// Which pods a term speaks of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Who {
    /// Namespaces by name.
    pub namespaces: BTreeSet<String>,
    /// Namespaces by label, beside those by name.
    pub namespace_selector: Option<LabelSelector>,
    /// Pods by label; `None` selects none.
    pub labels: Option<LabelSelector>,
}

/// A term of pod affinity or anti-affinity.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Term {
    /// The pods that it speaks of.
    pub who: Who,
    /// The node label whose equal values make nodes near each other.
    pub topology_key: String,
}

/// A topology spread constraint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Spread {
    /// The pods that are counted.
    pub who: Who,
    /// The node label whose values are the domains.
    pub topology_key: String,
    /// How much fuller than the emptiest domain the pod's domain may be, the pod included.
    pub max_skew: i64,
    /// With fewer domains than this the emptiest one counts as empty.
    pub min_domains: i64,
    /// DoNotSchedule; otherwise ScheduleAnyway.
    pub hard: bool,
    /// Count only nodes that the pod's selector and affinity allow.
    pub honor_affinity: bool,
    /// Count only nodes whose taints the pod tolerates.
    pub honor_taints: bool,
    /// Whether the pod itself is counted.
    pub counts_itself: bool,
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

/// What a pod asks of nodes as they are: selector, node affinity, tolerations. Compared and hashed by encoding.
#[derive(Debug, Clone)]
pub struct Placement {
    /// A spec with nodeSelector, affinity.nodeAffinity and tolerations only.
    pub spec: PodSpec,
    /// Its encoding.
    pub key: Box<[u8]>,
}

impl Placement {
    /// Of those parts of a spec.
    pub fn new(spec: PodSpec) -> Placement {
        let key = spec.encode_to_vec().into_boxed_slice();
        Placement { spec, key }
    }
}

impl PartialEq for Placement {
    fn eq(&self, other: &Placement) -> bool {
        self.key == other.key
    }
}

impl Eq for Placement {}

impl Hash for Placement {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key.hash(state);
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
            needs: Arc::new(Needs::new(pod)?),
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
        let or = |amount: i64, assumed: i64| if amount == 0 { assumed } else { amount.min(AMOUNT_LIMIT) };
        let mut needs = Needs {
            namespace: pod.namespace().to_owned(),
            labels: pod.meta().labels.clone(),
            requests: amounts(&requested, AMOUNT_LIMIT),
            weight: [or(requested.cpu_milli, ASSUMED_CPU_MILLI), or(requested.memory_bytes, ASSUMED_MEMORY)],
            ports: host_ports(spec),
            placement: placement(spec),
            affinity: Vec::new(),
            anti_affinity: Vec::new(),
            preferred: Vec::new(),
            spread: Vec::new(),
            priority: spec.priority.unwrap_or(0),
            preempts: spec.preemption_policy != "Never",
        };
        needs.take_affinity(pod)?;
        for constraint in &spec.topology_spread_constraints {
            needs.spread.push(spread(pod, constraint)?);
        }
        Ok(needs)
    }

    fn take_affinity(&mut self, pod: &Pod) -> Result<(), NeedsError> {
        let Some(affinity) = &pod.spec().affinity else { return Ok(()) };
        let near = affinity.pod_affinity.as_ref();
        let away = affinity.pod_anti_affinity.as_ref();
        for one in near.iter().flat_map(|all| &all.required_during_scheduling_ignored_during_execution) {
            self.affinity.push(term(pod, "affinity.podAffinity", one)?);
        }
        for one in away.iter().flat_map(|all| &all.required_during_scheduling_ignored_during_execution) {
            self.anti_affinity.push(term(pod, "affinity.podAntiAffinity", one)?);
        }
        let near = near.iter().flat_map(|all| &all.preferred_during_scheduling_ignored_during_execution);
        let away = away.iter().flat_map(|all| &all.preferred_during_scheduling_ignored_during_execution);
        let signed = near.map(|one| (1, one)).chain(away.map(|one| (-1, one)));
        for (sign, weighted) in signed {
            if let Some(one) = &weighted.pod_affinity_term {
                self.preferred.push((sign * i64::from(weighted.weight), term(pod, "affinity", one)?));
            }
        }
        Ok(())
    }

    /// Whether pods with these needs are among those that `who` speaks of; `namespaces` has the labels of namespaces.
    pub fn matches(&self, who: &Who, namespaces: &BTreeMap<String, BTreeMap<String, String>>) -> bool {
        static NONE: BTreeMap<String, String> = BTreeMap::new();
        let labels = who.labels.as_ref().is_some_and(|labels| labels.matches(&self.labels));
        labels
            && (who.namespaces.contains(&self.namespace)
                || who
                    .namespace_selector
                    .as_ref()
                    .is_some_and(|selector| selector.matches(namespaces.get(&self.namespace).unwrap_or(&NONE))))
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

fn placement(spec: &PodSpec) -> Placement {
    let node_affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.clone());
    Placement::new(PodSpec {
        node_selector: spec.node_selector.clone(),
        affinity: node_affinity
            .map(|node_affinity| v1::Affinity { node_affinity: Some(node_affinity), ..Default::default() }),
        tolerations: spec.tolerations.clone(),
        ..PodSpec::default()
    })
}

fn term(pod: &Pod, field: &'static str, term: &v1::PodAffinityTerm) -> Result<Term, NeedsError> {
    if term.topology_key.is_empty() {
        return Err(NeedsError::TopologyKey { pod: pod.key(), field });
    }
    let wrong = |source| NeedsError::Selector { pod: pod.key(), field, source };
    let mut labels = term.label_selector.as_ref().map(LabelSelector::from_message).transpose().map_err(wrong)?;
    let same = term.match_label_keys.iter().map(|key| (key, false));
    let other = term.mismatch_label_keys.iter().map(|key| (key, true));
    for (key, negate) in same.chain(other) {
        if let (Some(selector), Some(value)) = (labels.clone(), pod.meta().labels.get(key)) {
            labels = Some(selector.and(key, value, negate).map_err(wrong)?);
        }
    }
    let namespace_selector = term.namespace_selector.as_ref().map(LabelSelector::from_message).transpose();
    let namespace_selector = namespace_selector.map_err(wrong)?;
    let own = term.namespaces.is_empty() && namespace_selector.is_none();
    let own = own.then(|| pod.namespace().to_owned());
    let namespaces = term.namespaces.iter().cloned().chain(own).collect();
    Ok(Term { who: Who { namespaces, namespace_selector, labels }, topology_key: term.topology_key.clone() })
}

fn spread(pod: &Pod, constraint: &v1::TopologySpreadConstraint) -> Result<Spread, NeedsError> {
    let field = "topologySpreadConstraints";
    if constraint.topology_key.is_empty() {
        return Err(NeedsError::TopologyKey { pod: pod.key(), field });
    }
    for (field, value) in [("maxSkew", constraint.max_skew), ("minDomains", constraint.min_domains.unwrap_or(1))] {
        if value < 1 {
            return Err(NeedsError::Spread { pod: pod.key(), field, value });
        }
    }
    let wrong = |source| NeedsError::Selector { pod: pod.key(), field, source };
    let mut labels = constraint.label_selector.as_ref().map(LabelSelector::from_message).transpose().map_err(wrong)?;
    for key in &constraint.match_label_keys {
        if let (Some(selector), Some(value)) = (labels.clone(), pod.meta().labels.get(key)) {
            labels = Some(selector.and(key, value, false).map_err(wrong)?);
        }
    }
    let counts_itself = labels.as_ref().is_some_and(|labels| labels.matches(&pod.meta().labels));
    let namespaces = BTreeSet::from([pod.namespace().to_owned()]);
    Ok(Spread {
        who: Who { namespaces, namespace_selector: None, labels },
        topology_key: constraint.topology_key.clone(),
        max_skew: i64::from(constraint.max_skew),
        min_domains: i64::from(constraint.min_domains.unwrap_or(1)),
        hard: constraint.when_unsatisfiable != "ScheduleAnyway",
        honor_affinity: constraint.node_affinity_policy != "Ignore",
        honor_taints: constraint.node_taints_policy == "Honor",
        counts_itself,
    })
}
