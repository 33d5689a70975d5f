//! How many pods are in which domain, kept as the cache changes: counting a large cluster anew for every batch would cost more than
//! binding it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use minipod_proto::{
    Resource,
    rules::{Inclusion, Labels, Who},
    v1::{Node, Pod},
};

use super::terrain::{NOWHERE, Terrain};
use crate::cache::Entry;

/// An object before and after a change.
pub type Change = (Option<Arc<Entry>>, Option<Arc<Entry>>);

/// What has happened to pods or nodes since a revision.
#[derive(Debug)]
pub enum News {
    /// These, in order, up to the revision.
    Changes(Vec<Change>, i64),
    /// It is not known any more; all nodes, or all pods that are bound, at the revision.
    All(Vec<Arc<Entry>>, i64),
}

/// What a counter counts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Counted {
    /// Pods that all of these speak of.
    Matching(Vec<Who>),
    /// Pods that a spread counts: not being deleted, on the nodes that it counts.
    Spread(Who, Box<Inclusion>),
    /// Pods with a required anti-affinity that speaks of these.
    Repelling(Who),
}

/// Whether a term speaks of a pod; `labels_of` has the labels of a namespace.
pub fn speaks_of(who: &Who, pod: &Pod, labels_of: &dyn Fn(&str) -> Labels) -> bool {
    let namespace = pod.namespace();
    let has_namespace = || match &who.namespace_selector {
        None => who.namespaces.contains(namespace),
        Some(_) => who.has_namespace(namespace, &labels_of(namespace)),
    };
    who.has_labels(&pod.meta().labels) && has_namespace()
}

impl Counted {
    /// Whether it counts a pod for what the pod is, wherever it may be; of [`Counted::Repelling`], which is about rules of the pod, whether
    /// those speak of it.
    pub fn speaks_of(&self, pod: &Pod, labels_of: &dyn Fn(&str) -> Labels) -> bool {
        match self {
            Counted::Matching(all) => all.iter().all(|who| speaks_of(who, pod, labels_of)),
            Counted::Spread(who, _) => !pod.is_terminating() && speaks_of(who, pod, labels_of),
            Counted::Repelling(who) => speaks_of(who, pod, labels_of),
        }
    }

    /// Whether it counts what is on a node.
    fn has(&self, node: &Node) -> bool {
        match self {
            Counted::Spread(_, inclusion) => inclusion.admits(node.name(), &node.meta().labels, &node.spec().taints),
            Counted::Matching(_) | Counted::Repelling(_) => true,
        }
    }

    /// Whether the labels of namespaces matter to it.
    fn selects_namespaces(&self) -> bool {
        let selects = |who: &Who| who.namespace_selector.is_some();
        match self {
            Counted::Matching(all) => all.iter().any(selects),
            Counted::Spread(who, _) | Counted::Repelling(who) => selects(who),
        }
    }
}

/// What is on a node.
#[derive(Debug, Clone, Copy)]
struct Place {
    pods: i64,
    /// Where they are counted.
    domain: u32,
}

const EMPTY: Place = Place { pods: 0, domain: NOWHERE };

/// What is in a domain.
#[derive(Debug, Clone, Copy, Default)]
struct Domain {
    pods: i64,
    /// How many nodes of it are counted.
    nodes: usize,
}

/// Pods by domain of a node label.
#[derive(Debug)]
pub struct Counter {
    counted: Counted,
    key: String,
    /// Everything that happened to pods up to this revision is counted.
    at: i64,
    /// The revision at which the labels of namespaces were looked at.
    namespaces_at: i64,
    /// How many of the terrain's changes are taken note of.
    noted: usize,
    /// By number of the node.
    places: Vec<Place>,
    /// By number of the domain.
    domains: Vec<Domain>,
    /// Pods in any domain.
    total: i64,
    /// Pods on any node.
    everywhere: i64,
    /// By number of pods how many of the domains with nodes have so many.
    spectrum: BTreeMap<i64, usize>,
}

impl Counter {
    /// One that has counted nothing.
    pub fn new(counted: Counted, key: &str, terrain: &mut Terrain) -> Counter {
        let mut counter = Counter::blank(counted, key, terrain);
        for id in 0..terrain.count() {
            counter.locate(id, terrain);
        }
        counter
    }

    /// One to be asked at once and never again: it knows no nodes.
    pub fn blank(counted: Counted, key: &str, terrain: &mut Terrain) -> Counter {
        terrain.look_at(key);
        Counter {
            counted,
            key: key.to_owned(),
            at: -1,
            namespaces_at: 0,
            noted: terrain.changed().len(),
            places: Vec::new(),
            domains: Vec::new(),
            total: 0,
            everywhere: 0,
            spectrum: BTreeMap::new(),
        }
    }

    /// Whether it has nothing to say.
    pub const fn is_empty(&self) -> bool {
        self.everywhere == 0
    }

    /// Takes note of nodes that have changed.
    pub fn follow_nodes(&mut self, terrain: &Terrain) {
        for id in terrain.changed().get(self.noted..).unwrap_or_default() {
            self.locate(*id, terrain);
        }
        self.noted = terrain.changed().len();
    }

    /// Takes over what has happened to pods. `namespaces_at` is when a namespace's labels changed last.
    pub fn follow_pods<N: AsRef<News>>(
        &mut self,
        news: impl FnOnce(i64) -> N,
        labels_of: &dyn Fn(&str) -> Labels,
        namespaces_at: i64,
        terrain: &mut Terrain,
    ) {
        if self.counted.selects_namespaces() && self.namespaces_at != namespaces_at {
            self.at = -1;
        }
        self.namespaces_at = namespaces_at;
        let news = news(self.at);
        match news.as_ref() {
            News::Changes(changes, at) => {
                for (before, after) in changes {
                    let (before, after) = (placed(before.as_deref()), placed(after.as_deref()));
                    let counts = |(_, pod): &(&str, &Pod)| self.counted.speaks_of(pod, labels_of);
                    let old = before.filter(counts).map(|(node, _)| node);
                    let new = after.filter(counts).map(|(node, _)| node);
                    if old != new {
                        self.add(old.map(|node| terrain.id(node)), -1);
                        self.add(new.map(|node| terrain.id(node)), 1);
                    }
                }
                self.at = *at;
            }
            News::All(pods, at) => {
                let (counted, key) = (self.counted.clone(), self.key.clone());
                *self = Counter { at: *at, namespaces_at, ..Counter::new(counted, &key, terrain) };
                for (node, pod) in pods.iter().filter_map(|entry| placed(Some(entry))) {
                    if self.counted.speaks_of(pod, labels_of) {
                        self.add(Some(terrain.id(node)), 1);
                    }
                }
            }
        }
    }

    /// So many pods more on a node.
    pub fn add(&mut self, node: Option<usize>, change: i64) {
        let Some(id) = node else { return };
        self.everywhere += change;
        let place = self.place(id);
        place.pods += change;
        let domain = place.domain;
        self.shift(domain, change, 0);
    }

    fn place(&mut self, id: usize) -> &mut Place {
        if self.places.len() <= id {
            self.places.resize(id + 1, EMPTY);
        }
        &mut self.places[id]
    }

    /// Counts what is on a node where the node is now.
    fn locate(&mut self, id: usize, terrain: &Terrain) {
        let counts = terrain.node(id).is_some_and(|node| self.counted.has(node));
        let new = if counts { terrain.domain(id, &self.key) } else { NOWHERE };
        let place = self.place(id);
        let old = std::mem::replace(&mut place.domain, new);
        if old != new {
            let pods = place.pods;
            self.shift(old, -pods, -1);
            self.shift(new, pods, 1);
        }
    }

    fn shift(&mut self, domain: u32, pods: i64, nodes: isize) {
        let Some(id) = usize::try_from(domain).ok().filter(|_| domain != NOWHERE) else { return };
        if self.domains.len() <= id {
            self.domains.resize(id + 1, Domain::default());
        }
        let domain = &mut self.domains[id];
        if domain.nodes > 0 {
            recount(&mut self.spectrum, domain.pods, false);
        }
        domain.pods += pods;
        domain.nodes = domain.nodes.saturating_add_signed(nodes);
        if domain.nodes > 0 {
            recount(&mut self.spectrum, domain.pods, true);
        }
        self.total += pods;
    }

    /// What it says of these nodes.
    pub fn counts(&self, nodes: &[usize], terrain: &Terrain) -> Counts {
        let domains: Vec<u32> = nodes.iter().map(|id| terrain.domain(*id, &self.key)).collect();
        let cell = |domain: u32| {
            let found = usize::try_from(domain).ok().and_then(|id| self.domains.get(id)).copied().unwrap_or_default();
            (domain, found)
        };
        let is_spread = matches!(self.counted, Counted::Spread(..));
        let counts = |(id, domain): (&usize, &u32)| {
            let place = self.places.get(*id).copied().unwrap_or(EMPTY);
            if is_spread { place.domain != NOWHERE } else { *domain != NOWHERE }
        };
        Counts {
            counted: self.counted.clone(),
            key: self.key.clone(),
            cells: domains.iter().filter(|domain| **domain != NOWHERE).map(|domain| cell(*domain)).collect(),
            counts: nodes.iter().zip(&domains).map(counts).collect(),
            domains,
            total: self.total,
            spectrum: if is_spread { self.spectrum.clone() } else { BTreeMap::new() },
        }
    }
}

/// One domain more or less that has so many pods.
fn recount(spectrum: &mut BTreeMap<i64, usize>, pods: i64, more: bool) {
    let same = spectrum.entry(pods).or_insert(0);
    *same = if more { *same + 1 } else { same.saturating_sub(1) };
    if *same == 0 {
        spectrum.remove(&pods);
    }
}

/// A pod that is somewhere, with its node.
pub fn placed(entry: Option<&Entry>) -> Option<(&str, &Pod)> {
    let pod = entry?.object.as_pod()?;
    pod.node_name().filter(|_| !pod.is_terminal()).map(|node| (node, pod))
}

/// What a counter says of the domains of some nodes, and what comes of it as pods are placed on these. By the nodes' positions.
#[derive(Debug)]
pub struct Counts {
    /// What is counted.
    pub counted: Counted,
    /// By which node label.
    pub key: String,
    /// The nodes' domains.
    domains: Vec<u32>,
    /// Whether what is on the nodes is counted.
    counts: Vec<bool>,
    cells: HashMap<u32, Domain>,
    total: i64,
    /// Of a spread.
    spectrum: BTreeMap<i64, usize>,
}

impl Counts {
    /// Pods in a node's domain; `None`: it has none.
    pub fn of(&self, node: usize) -> Option<i64> {
        self.domains.get(node).and_then(|domain| self.cells.get(domain)).map(|domain| domain.pods)
    }

    /// Pods in any domain.
    pub const fn total(&self) -> i64 {
        self.total
    }

    /// Of a spread: how many domains it counts, and how many pods the emptiest of them has.
    pub fn domains(&self) -> (usize, i64) {
        (self.spectrum.values().sum(), self.spectrum.first_key_value().map_or(0, |(pods, _)| *pods))
    }

    /// A pod that it speaks of comes to a node.
    pub fn place(&mut self, node: usize) {
        if self.counts.get(node) != Some(&true) {
            return;
        }
        let Some(domain) = self.domains.get(node).and_then(|domain| self.cells.get_mut(domain)) else { return };
        self.total += 1;
        if domain.nodes > 0 && matches!(self.counted, Counted::Spread(..)) {
            recount(&mut self.spectrum, domain.pods, false);
            recount(&mut self.spectrum, domain.pods + 1, true);
        }
        domain.pods += 1;
    }
}
