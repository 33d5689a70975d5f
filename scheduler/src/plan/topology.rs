//! How many pods of interest are in each topology domain, kept as pods come and go.
//!
//! A [`Counter`] belongs to one node label (the topology key) and counts, per value of it (the domain), either the pods that a
//! term speaks of, or the pods that hold a term which speaks of others (anti-affinity works in both directions).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::NodeId;
use super::bits::Bits;
use super::needs::{Inclusion, NodeInfo, Who};

/// The domain of a node that does not have the label.
pub const NOWHERE: u32 = u32::MAX;
/// The label whose domains are single nodes.
const HOSTNAME: &str = "kubernetes.io/hostname";
/// With more domains than this a key is fine: nodes are looked at one by one and not by group.
const COARSE_LIMIT: usize = 512;

/// A node label that terms use.
pub struct Key {
    /// Name of the label.
    pub name: String,
    /// Domain by node.
    pub of_node: Vec<u32>,
    domains: HashMap<String, u32>,
    /// Too many domains to group nodes by.
    pub fine: bool,
}

impl Key {
    /// Domain of a node.
    pub fn domain(&self, node: NodeId) -> u32 {
        self.of_node.get(node as usize).copied().unwrap_or(NOWHERE)
    }

    /// Reads the node's label anew. Tells whether the key has just become fine.
    fn place(&mut self, node: NodeId, info: Option<&NodeInfo>) -> bool {
        if self.of_node.len() <= node as usize {
            self.of_node.resize(node as usize + 1, NOWHERE);
        }
        let domain = match info.and_then(|info| info.labels.get(&self.name)) {
            None => NOWHERE,
            Some(value) => {
                let next = self.domains.len() as u32;
                *self.domains.entry(value.clone()).or_insert(next)
            }
        };
        self.of_node[node as usize] = domain;
        let was = self.fine;
        self.fine |= self.domains.len() > COARSE_LIMIT;
        self.fine != was
    }

    /// The label's value in a domain, for explanations.
    pub fn value(&self, domain: u32) -> &str {
        self.domains.iter().find(|(_, id)| **id == domain).map_or("", |(value, _)| value)
    }
}

/// What a counter counts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Counted {
    /// Pods that all of these speak of.
    Matching(Vec<Who>),
    /// Pods that a spread constraint counts: alive, on the nodes of the inclusion with that index.
    Spread(Who, usize),
    /// Pods with a required anti-affinity term that speaks of these.
    Repelling(Who),
    /// Sum of the weights of preferred terms (and 1 for a required affinity term) that speak of these.
    Pulling(Who),
}

/// Whether a spread constraint counts a node.
fn includes(inclusion: &Inclusion, node: &NodeInfo) -> bool {
    inclusion.admits(&node.name, &node.labels, &node.taints)
}

/// Pods per domain.
pub struct Counter {
    /// What it counts.
    pub counted: Counted,
    /// Index of its key.
    pub key: usize,
    /// By domain.
    pub counts: Vec<i64>,
    /// Over all domains.
    pub total: i64,
    /// Number of domains with a count other than 0.
    pub busy: usize,
    /// Grows with every change.
    pub version: u64,
    /// Included nodes per domain (spread only).
    included: Vec<u32>,
    /// How many domains with included nodes have that count (spread only).
    spectrum: BTreeMap<i64, u32>,
    /// Number of domains with included nodes (spread only).
    pub domains: usize,
}

impl Counter {
    fn new(counted: Counted, key: usize) -> Counter {
        Counter {
            counted,
            key,
            counts: Vec::new(),
            total: 0,
            busy: 0,
            version: 0,
            included: Vec::new(),
            spectrum: BTreeMap::new(),
            domains: 0,
        }
    }

    /// Pods in a domain.
    pub fn count(&self, domain: u32) -> i64 {
        self.counts.get(domain as usize).copied().unwrap_or(0)
    }

    /// Pods in the emptiest domain with included nodes.
    pub fn least(&self) -> i64 {
        self.spectrum.first_key_value().map_or(0, |(count, _)| *count)
    }

    /// Pods come or go.
    pub fn add(&mut self, domain: u32, change: i64) {
        if domain == NOWHERE || change == 0 {
            return;
        }
        let index = domain as usize;
        if self.counts.len() <= index {
            self.counts.resize(index + 1, 0);
        }
        let old = self.counts[index];
        self.counts[index] += change;
        self.busy = self.busy + usize::from(old == 0) - usize::from(old + change == 0);
        self.total += change;
        self.version += 1;
        if self.included.get(index).is_some_and(|nodes| *nodes > 0) {
            self.respect(old, -1);
            self.respect(old + change, 1);
        }
    }

    /// A node comes into the domain or leaves it.
    fn include(&mut self, domain: u32, comes: bool) {
        let index = domain as usize;
        if self.included.len() <= index {
            self.included.resize(index + 1, 0);
        }
        let before = self.included[index];
        let after = if comes { before + 1 } else { before.saturating_sub(1) };
        self.included[index] = after;
        self.version += 1;
        let count = self.count(domain);
        if before == 0 && after > 0 {
            self.domains += 1;
            self.respect(count, 1);
        } else if before > 0 && after == 0 {
            self.domains -= 1;
            self.respect(count, -1);
        }
    }

    fn respect(&mut self, count: i64, change: i32) {
        let domains = self.spectrum.entry(count).or_insert(0);
        *domains = domains.saturating_add_signed(change);
        if *domains == 0 {
            self.spectrum.remove(&count);
        }
    }
}

/// All keys and counters.
#[derive(Default)]
pub struct Topology {
    /// By index.
    pub keys: Vec<Key>,
    key_ids: HashMap<String, usize>,
    /// By index.
    pub counters: Vec<Counter>,
    counter_ids: HashMap<(Counted, usize), usize>,
    inclusions: Vec<(Inclusion, Bits)>,
    inclusion_ids: HashMap<Inclusion, usize>,
    /// Labels of namespaces.
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
    /// Number of keys that are fine: it changes when nodes must be grouped anew.
    pub fine_keys: usize,
}

impl Topology {
    /// Index of a key; it gets one if it has none.
    pub fn key(&mut self, name: &str, nodes: &[Option<NodeInfo>]) -> usize {
        if let Some(index) = self.key_ids.get(name) {
            return *index;
        }
        let mut key =
            Key { name: name.to_owned(), of_node: Vec::new(), domains: HashMap::new(), fine: name == HOSTNAME };
        for (node, info) in nodes.iter().enumerate() {
            key.place(node as NodeId, info.as_ref());
        }
        self.fine_keys += usize::from(key.fine);
        self.keys.push(key);
        self.key_ids.insert(name.to_owned(), self.keys.len() - 1);
        self.keys.len() - 1
    }

    /// Index of a counter; `true` if it is new, and then nothing is counted yet but the nodes.
    pub fn counter(&mut self, counted: Counted, key: usize, nodes: &[Option<NodeInfo>]) -> (usize, bool) {
        let id = (counted, key);
        if let Some(index) = self.counter_ids.get(&id) {
            return (*index, false);
        }
        let mut counter = Counter::new(id.0.clone(), key);
        if let Counted::Spread(_, inclusion) = &counter.counted {
            let members = self.inclusions.get(*inclusion).map(|(_, bits)| bits.clone()).unwrap_or_default();
            for node in members.iter().filter(|node| nodes.get(*node as usize).is_some_and(Option::is_some)) {
                let domain = self.keys[key].domain(node);
                if domain != NOWHERE {
                    counter.include(domain, true);
                }
            }
        }
        self.counters.push(counter);
        self.counter_ids.insert(id, self.counters.len() - 1);
        (self.counters.len() - 1, true)
    }

    /// Index of an inclusion.
    pub fn inclusion(&mut self, inclusion: Inclusion, nodes: &[Option<NodeInfo>]) -> usize {
        if let Some(index) = self.inclusion_ids.get(&inclusion) {
            return *index;
        }
        let mut bits = Bits::default();
        for (node, info) in nodes.iter().enumerate() {
            bits.set(node as NodeId, info.as_ref().is_some_and(|info| includes(&inclusion, info)));
        }
        self.inclusions.push((inclusion.clone(), bits));
        self.inclusion_ids.insert(inclusion, self.inclusions.len() - 1);
        self.inclusions.len() - 1
    }

    /// Where a pod on this node is counted by that counter.
    pub fn domain(&self, counter: usize, node: NodeId) -> u32 {
        let counter = &self.counters[counter];
        if let Counted::Spread(_, inclusion) = &counter.counted
            && !self.inclusions[*inclusion].1.contains(node)
        {
            return NOWHERE;
        }
        self.keys[counter.key].domain(node)
    }

    /// A node comes, goes (`None`) or has changed; its pods must not be counted at the moment.
    pub fn place_node(&mut self, node: NodeId, info: Option<&NodeInfo>) {
        self.include_node(node, false);
        for key in &mut self.keys {
            self.fine_keys += usize::from(key.place(node, info));
        }
        for (inclusion, bits) in &mut self.inclusions {
            bits.set(node, info.is_some_and(|info| includes(inclusion, info)));
        }
        self.include_node(node, true);
    }

    fn include_node(&mut self, node: NodeId, comes: bool) {
        for index in 0..self.counters.len() {
            if matches!(self.counters[index].counted, Counted::Spread(..)) {
                let domain = self.domain(index, node);
                if domain != NOWHERE {
                    self.counters[index].include(domain, comes);
                }
            }
        }
    }

    /// Names of namespaces and their labels, shared with whoever asks about selectors.
    pub fn set_namespace(&mut self, name: &Arc<str>, labels: Option<BTreeMap<String, String>>) -> bool {
        match labels {
            Some(labels) => self.namespaces.insert(name.to_string(), labels.clone()) != Some(labels),
            None => self.namespaces.remove(&**name).is_some(),
        }
    }
}
