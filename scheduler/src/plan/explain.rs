//! Why a pod cannot be placed: per node the first reason and the exact shortfall.

use std::collections::BTreeMap;
use std::fmt;

use minipod_proto::resources::{Shortfall, amount_text};
use minipod_proto::rules::Bounds;

use super::class::{Class, Rule};
use super::core::Core;
use super::statics::{self, StaticReason};
use super::topology::NOWHERE;
use super::{NodeId, PodId};

/// Up to so many nodes are named in a summary; more are counted.
const NAMED: usize = 8;

/// Why a node will not do for a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// Something about the node itself.
    Fixed(StaticReason),
    /// It is kept free for a pod or gang that has waited long.
    Reserved,
    /// Somebody has the port already.
    Port(String),
    /// Not enough is free.
    Short(Vec<Shortfall>),
    /// It lacks the label of a topology key.
    Lacking(String),
    /// Its domain would be too full.
    Skew {
        /// The topology key.
        key: String,
        /// The node's domain.
        domain: String,
        /// Pods counted there.
        count: i64,
        /// As many may be there at the most before the pod comes.
        limit: i64,
    },
    /// No pod that the affinity asks for is in its domain.
    Far {
        /// The topology key.
        key: String,
        /// The node's domain.
        domain: String,
    },
    /// A pod that must not be near is in its domain.
    Near {
        /// The topology key.
        key: String,
        /// The node's domain.
        domain: String,
    },
}

impl fmt::Display for StaticReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StaticReason::NotReady => f.write_str("not ready"),
            StaticReason::Unschedulable => f.write_str("marked unschedulable"),
            StaticReason::Taint(taint) => write!(f, "taint {taint} is not tolerated"),
            StaticReason::Selector => f.write_str("labels do not match the pod's node selector or affinity"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Fixed(reason) => reason.fmt(f),
            Reason::Reserved => f.write_str("reserved for a pod or group that has waited longer"),
            Reason::Port(port) => write!(f, "host port {port} is taken"),
            Reason::Short(all) => {
                for (index, short) in all.iter().enumerate() {
                    write!(f, "{}{short}", if index > 0 { ", " } else { "" })?;
                }
                Ok(())
            }
            Reason::Lacking(key) => write!(f, "has no label {key}"),
            Reason::Skew { key, domain, count, limit } => {
                write!(f, "{key}={domain} has {count} such pods, maxSkew allows {limit} there before this one")
            }
            Reason::Far { key, domain } => write!(f, "no pod that the affinity asks for in {key}={domain}"),
            Reason::Near { key, domain } => write!(f, "anti-affinity with a pod in {key}={domain}"),
        }
    }
}

impl Reason {
    /// The kind of reason, for counting nodes.
    pub fn kind(&self) -> String {
        match self {
            Reason::Short(all) => {
                let names: Vec<&str> = all.iter().map(|short| short.resource.as_str()).collect();
                format!("too little {}", names.join(" and "))
            }
            Reason::Skew { key, .. } => format!("maxSkew of {key} is reached"),
            Reason::Far { key, .. } => format!("no pod that the affinity asks for in the same {key}"),
            Reason::Near { key, .. } => format!("anti-affinity within the same {key}"),
            other => other.to_string(),
        }
    }

    /// Whether ending pods on the node could help.
    pub fn helps_to_evict(&self) -> bool {
        match self {
            Reason::Fixed(_) | Reason::Reserved | Reason::Lacking(_) | Reason::Far { .. } => false,
            Reason::Port(_) | Reason::Short(_) | Reason::Skew { .. } | Reason::Near { .. } => true,
        }
    }
}

/// A node and why it will not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeReason {
    /// Name of the node.
    pub node: String,
    /// `None`: it would do.
    pub reason: Option<Reason>,
}

/// Why a pod is pending.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Explanation {
    /// Scheduling gates that are closed; then nothing else is looked at.
    pub gates: Vec<String>,
    /// Every node, by name.
    pub nodes: Vec<NodeReason>,
}

impl Explanation {
    /// Of these nodes, in any order.
    pub(super) fn new(gates: Vec<String>, mut nodes: Vec<NodeReason>) -> Explanation {
        nodes.sort_unstable_by(|left, right| left.node.cmp(&right.node));
        Explanation { gates, nodes }
    }

    /// Number of nodes that would do.
    pub fn available(&self) -> usize {
        self.nodes.iter().filter(|node| node.reason.is_none()).count()
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.gates.is_empty() {
            return write!(f, "scheduling gates are closed: {}", self.gates.join(", "));
        }
        if self.nodes.is_empty() {
            return f.write_str("there are no nodes");
        }
        write!(f, "{}/{} nodes are available", self.available(), self.nodes.len())?;
        let mut separator = ": ";
        let against = self.nodes.iter().filter_map(|node| Some((&node.node, node.reason.as_ref()?)));
        if self.nodes.len() <= NAMED {
            for (node, reason) in against {
                write!(f, "{separator}{node}: {reason}")?;
                separator = "; ";
            }
            return Ok(());
        }
        let mut kinds: BTreeMap<String, (usize, Option<Shortfall>)> = BTreeMap::new();
        for (_, reason) in against {
            let entry = kinds.entry(reason.kind()).or_default();
            entry.0 += 1;
            if let Reason::Short(all) = reason
                && let Some(first) = all.first()
            {
                let missing = |short: &Shortfall| short.requested.saturating_sub(short.free);
                if entry.1.as_ref().is_none_or(|least| missing(first) < missing(least)) {
                    entry.1 = Some(first.clone());
                }
            }
        }
        let mut kinds: Vec<_> = kinds.into_iter().collect();
        kinds.sort_by(|(left, (more, _)), (right, (less, _))| less.cmp(more).then_with(|| left.cmp(right)));
        for (kind, (count, least)) in kinds {
            write!(f, "{separator}{count}: {kind}")?;
            if let Some(least) = least {
                let missing = least.requested.saturating_sub(least.free);
                write!(f, " ({} short by {} at the best)", least.resource, amount_text(&least.resource, missing))?;
            }
            separator = "; ";
        }
        Ok(())
    }
}

impl Core {
    /// Per node the first reason against the pod, as things are now.
    pub fn explain(&self, pod: PodId) -> Explanation {
        let Some(entry) = self.entry(pod) else { return Explanation::default() };
        let class = self.class(entry.class);
        let gates = entry.info.gates.clone();
        let nodes = self.nodes.alive.iter().map(|node| self.judged(class, pod, node)).collect();
        Explanation::new(gates, nodes)
    }

    /// The nodes that there are.
    pub(super) fn alive(&self) -> Vec<NodeId> {
        self.nodes.alive.iter().collect()
    }

    /// The first reason against one node, as things are now; `None` when it is gone, or the pod.
    pub(super) fn explain_on(&self, pod: PodId, node: NodeId) -> Option<NodeReason> {
        let class = self.class(self.entry(pod)?.class);
        self.nodes.alive.contains(node).then(|| self.judged(class, pod, node))
    }

    fn judged(&self, class: &Class, pod: PodId, node: NodeId) -> NodeReason {
        let reserved = self.shut_for(pod).is_some_and(|shut| shut.contains(node));
        let reason = self.reason(class, node).or(reserved.then_some(Reason::Reserved));
        NodeReason { node: self.nodes.name(node).to_owned(), reason }
    }

    /// The first reason against a node.
    pub(super) fn reason(&self, class: &Class, node: NodeId) -> Option<Reason> {
        let info = self.nodes.info.get(node as usize).and_then(Option::as_ref)?;
        if let Err(reason) = statics::judge(&class.needs.placement, info) {
            return Some(Reason::Fixed(reason));
        }
        if let Some(port) = self.nodes.port_conflict(node, &class.needs.ports) {
            return Some(Reason::Port(format!("{}/{}", port.port, port.protocol)));
        }
        let short: Vec<Shortfall> = class
            .requests
            .iter()
            .filter_map(|(resource, requested)| {
                let column = &self.nodes.columns[*resource];
                let free = column.free[node as usize];
                (*requested > free).then(|| Shortfall { resource: column.name.clone(), requested: *requested, free })
            })
            .collect();
        if !short.is_empty() {
            return Some(Reason::Short(short));
        }
        self.domain_reason(class, node)
    }

    fn domain_reason(&self, class: &Class, node: NodeId) -> Option<Reason> {
        let topology = &self.topology;
        let nobody_near = Core::near_rules(class).all(|counter| topology.counters[counter].total == 0);
        // Spread before affinity, as the names of the reasons are known from Kubernetes.
        let spread_first = |rule: &Rule| u8::from(!matches!(rule, Rule::Skew(_)));
        let mut checks: Vec<_> = class.checks.iter().collect();
        checks.sort_by_key(|check| spread_first(&check.rule));
        checks.into_iter().find_map(|check| {
            let counter = &topology.counters[check.counter];
            let key = &topology.keys[counter.key];
            let domain = key.domain(node);
            let count = counter.count(domain);
            let (name, value) = (key.name.clone(), key.value(domain).to_owned());
            match &check.rule {
                Rule::Apart if domain != NOWHERE && count > 0 => Some(Reason::Near { key: name, domain: value }),
                Rule::Apart => None,
                _ if domain == NOWHERE => Some(Reason::Lacking(name)),
                Rule::Near if count > 0 || (class.likes_itself && nobody_near) => None,
                Rule::Near => Some(Reason::Far { key: name, domain: value }),
                Rule::Skew(spread) => {
                    let limit = Bounds::skew(spread, counter.domains, counter.least()).most;
                    (count > limit).then_some(Reason::Skew { key: name, domain: value, count, limit })
                }
            }
        })
    }
}
