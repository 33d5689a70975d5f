//! The pods of a batch, the rules that concern them, and what the domains hold: whether each may go where it was proposed.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use minipod_proto::{
    Resource,
    rules::{Bounds, Inclusion, Labels, Spread, Term, Who},
    selector::LabelSelector,
    v1::{Node, Pod},
};

use super::{
    Demand,
    tally::{Kind, News, Tallies},
};
use crate::cache::Entry;

/// A pod of the batch.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// As it is bound.
    pub pod: &'a Pod,
    /// Its own rules, if it has any.
    pub demand: Option<&'a Demand>,
}

/// What the cluster is like beside the batch.
pub struct Around<'a> {
    /// All nodes, in the order of their names.
    pub nodes: Arc<[Arc<Entry>]>,
    /// The labels of a namespace.
    pub labels_of: &'a dyn Fn(&str) -> Labels,
    /// What has happened to pods since a revision.
    pub news: &'a dyn Fn(i64) -> News,
}

/// What a counter counts.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Counted {
    /// Pods that all of these speak of.
    Matching(Vec<Who>),
    /// Pods that a spread counts: not being deleted, on the nodes that it counts.
    Spread(Who, Box<Inclusion>),
    /// Pods with a required anti-affinity that speaks of these.
    Repelling(Who),
}

/// Pods by domain of a node label.
#[derive(Debug)]
struct Counter {
    counted: Counted,
    key: String,
    counts: HashMap<String, i64>,
    total: i64,
    /// Of a spread: by number of pods how many of the counted domains have so many.
    spectrum: BTreeMap<i64, usize>,
    /// Of a spread: the counted domains.
    domains: BTreeSet<String>,
}

impl Counter {
    fn count(&self, domain: &str) -> i64 {
        self.counts.get(domain).copied().unwrap_or(0)
    }

    fn add(&mut self, domain: &str, change: i64) {
        let old = self.count(domain);
        self.counts.insert(domain.to_owned(), old + change);
        self.total += change;
        if self.domains.contains(domain) {
            if let Some(same) = self.spectrum.get_mut(&old) {
                *same -= 1;
                if *same == 0 {
                    self.spectrum.remove(&old);
                }
            }
            *self.spectrum.entry(old + change).or_insert(0) += 1;
        }
    }

    fn emptiest(&self) -> i64 {
        self.spectrum.first_key_value().map_or(0, |(count, _)| *count)
    }
}

/// What a counter must say of a node's domain.
#[derive(Debug, Clone)]
enum Rule {
    Near,
    /// Anti-affinity, the pod's own or another's towards it.
    Apart {
        own: bool,
    },
    Skew(Spread),
}

/// What is to be looked at for one pod.
#[derive(Debug, Default)]
struct Part {
    checks: Vec<(usize, Rule)>,
    /// All terms of its affinity speak of itself.
    likes_itself: bool,
    /// Counters that count it once it is placed.
    counted_by: Vec<usize>,
}

/// A batch among the pods that are bound already. Pods of the batch that are placed count for those after them.
pub struct Scene {
    nodes: Arc<[Arc<Entry>]>,
    counters: Vec<Counter>,
    parts: Vec<Part>,
}

impl Scene {
    /// Of these pods.
    pub fn new(subjects: &[Subject], around: Around, tallies: &mut Tallies) -> Scene {
        let mut making = Making { around, counters: Vec::new(), ids: HashMap::new() };
        let mut parts: Vec<Part> = subjects.iter().map(|subject| making.own_rules(subject)).collect();
        // Rules of others: of those that are bound, and of those that may be in this batch.
        for (term, nodes) in tallies.holders(making.around.news) {
            if subjects.iter().any(|subject| making.speaks_of(&term.who, subject.pod)) {
                let id = making.repelling(term);
                making.fill(id, nodes.iter());
            }
        }
        for (subject, part) in subjects.iter().zip(&mut parts) {
            making.relate(subject, part);
        }
        making.count(tallies);
        Scene { nodes: making.around.nodes, counters: making.counters, parts }
    }

    /// Whether the pod at a position may go to a node.
    ///
    /// # Errors
    /// The rule against it, in words.
    pub fn admits(&self, position: usize, node: &str) -> Result<(), String> {
        let Some(part) = self.parts.get(position) else { return Ok(()) };
        let near = part.checks.iter().filter(|(_, rule)| matches!(rule, Rule::Near));
        let nobody = near.into_iter().all(|(id, _)| self.counters.get(*id).is_none_or(|counter| counter.total == 0));
        let is_first = part.likes_itself && nobody;
        for (id, rule) in &part.checks {
            let Some(counter) = self.counters.get(*id) else { continue };
            let bounds = match rule {
                Rule::Near => Bounds::near(is_first),
                Rule::Apart { .. } => Bounds::APART,
                Rule::Skew(spread) => Bounds::skew(spread, counter.domains.len(), counter.emptiest()),
            };
            let domain = domain_of(&self.nodes, node, &counter.key);
            let count = domain.map(|domain| counter.count(domain));
            if !bounds.admit(count) {
                return Err(why(counter, rule, domain.zip(count), bounds.most));
            }
        }
        Ok(())
    }

    /// The pod at a position goes to a node.
    pub fn place(&mut self, position: usize, node: &str) {
        let Some(part) = self.parts.get(position) else { return };
        for id in &part.counted_by {
            let Some(counter) = self.counters.get_mut(*id) else { continue };
            let counts = match &counter.counted {
                Counted::Spread(_, inclusion) => node_of(&self.nodes, node).is_some_and(|node| has(inclusion, node)),
                Counted::Matching(_) | Counted::Repelling(_) => true,
            };
            if let Some(domain) = domain_of(&self.nodes, node, &counter.key).filter(|_| counts) {
                counter.add(domain, 1);
            }
        }
    }
}

fn why(counter: &Counter, rule: &Rule, found: Option<(&str, i64)>, most: i64) -> String {
    let key = &counter.key;
    let Some((domain, count)) = found else {
        return format!("it has no label {key}, which a rule of the pod needs");
    };
    let whom = || match &counter.counted {
        Counted::Matching(all) => {
            let texts = all.iter().filter_map(|who| who.labels.as_ref()).map(LabelSelector::to_string);
            let texts = texts.filter(|text| !text.is_empty()).collect::<Vec<_>>().join(" and ");
            if texts.is_empty() { "a pod".to_owned() } else { format!("a pod with {texts}") }
        }
        Counted::Spread(who, _) | Counted::Repelling(who) => {
            who.labels.as_ref().map_or_else(String::new, LabelSelector::to_string)
        }
    };
    match rule {
        Rule::Near => format!("the pod's affinity wants {} in {key}={domain}", whom()),
        Rule::Apart { own: true } => {
            format!("the pod's anti-affinity keeps away from {key}={domain}, where {} is", whom())
        }
        Rule::Apart { own: false } => format!("the anti-affinity of a pod in {key}={domain} keeps it away"),
        Rule::Skew(spread) => format!(
            "{key}={domain} has {count} of the pods to be spread, and may have {} before another one comes (maxSkew {})",
            most.max(0),
            spread.max_skew
        ),
    }
}

fn node_of<'a>(nodes: &'a [Arc<Entry>], name: &str) -> Option<&'a Node> {
    let index = nodes.binary_search_by(|node| node.key.as_str().cmp(name)).ok()?;
    nodes.get(index)?.object.as_node()
}

fn domain_of<'a>(nodes: &'a [Arc<Entry>], name: &str, key: &str) -> Option<&'a str> {
    node_of(nodes, name)?.meta().labels.get(key).map(String::as_str)
}

fn has(inclusion: &Inclusion, node: &Node) -> bool {
    inclusion.admits(node.name(), &node.meta().labels, &node.spec().taints)
}

/// A scene that is being made.
struct Making<'a> {
    around: Around<'a>,
    counters: Vec<Counter>,
    ids: HashMap<(Counted, String), usize>,
}

impl Making<'_> {
    fn counter(&mut self, counted: Counted, key: &str) -> usize {
        let next = self.counters.len();
        let id = *self.ids.entry((counted.clone(), key.to_owned())).or_insert(next);
        if id == next {
            self.counters.push(Counter {
                counted,
                key: key.to_owned(),
                counts: HashMap::new(),
                total: 0,
                spectrum: BTreeMap::new(),
                domains: BTreeSet::new(),
            });
        }
        id
    }

    fn repelling(&mut self, term: &Term) -> usize {
        self.counter(Counted::Repelling(term.who.clone()), &term.topology_key)
    }

    fn speaks_of(&self, who: &Who, pod: &Pod) -> bool {
        let namespace = pod.namespace();
        who.has_labels(&pod.meta().labels) && self.has_namespace(who, namespace)
    }

    fn has_namespace(&self, who: &Who, namespace: &str) -> bool {
        match &who.namespace_selector {
            None => who.namespaces.contains(namespace),
            Some(_) => who.has_namespace(namespace, &(self.around.labels_of)(namespace)),
        }
    }

    /// The counters of a pod's own rules, and its checks of them.
    fn own_rules(&mut self, subject: &Subject) -> Part {
        let mut part = Part::default();
        let Some(demand) = subject.demand else { return part };
        let rules = &demand.rules;
        let all: Vec<Who> = rules.affinity.iter().map(|term| term.who.clone()).collect();
        part.likes_itself = all.iter().all(|who| self.speaks_of(who, subject.pod));
        for spread in &rules.spread {
            let inclusion = spread.inclusion(&rules.spread, &demand.placement);
            let id = self.counter(Counted::Spread(spread.who.clone(), Box::new(inclusion)), &spread.topology_key);
            part.checks.push((id, Rule::Skew(spread.clone())));
        }
        for term in &rules.affinity {
            // A pod counts for one term only if all terms speak of it, as in Kubernetes.
            let id = self.counter(Counted::Matching(all.clone()), &term.topology_key);
            part.checks.push((id, Rule::Near));
        }
        for term in &rules.anti_affinity {
            let id = self.counter(Counted::Matching(vec![term.who.clone()]), &term.topology_key);
            part.checks.push((id, Rule::Apart { own: true }));
            part.counted_by.push(self.repelling(term));
        }
        part.counted_by.sort_unstable();
        part.counted_by.dedup();
        part
    }

    /// What all counters have to do with a pod of the batch.
    fn relate(&self, subject: &Subject, part: &mut Part) {
        for (id, counter) in self.counters.iter().enumerate() {
            match &counter.counted {
                Counted::Matching(all) if all.iter().all(|who| self.speaks_of(who, subject.pod)) => {
                    part.counted_by.push(id);
                }
                Counted::Spread(who, _) if self.speaks_of(who, subject.pod) => part.counted_by.push(id),
                Counted::Repelling(who) if self.speaks_of(who, subject.pod) => {
                    part.checks.push((id, Rule::Apart { own: false }));
                }
                _ => {}
            }
        }
    }

    /// Counts what is bound already for all counters but those of others' anti-affinity.
    fn count(&mut self, tallies: &mut Tallies) {
        for id in 0..self.counters.len() {
            let Some(counter) = self.counters.get(id) else { continue };
            let (whos, living) = match &counter.counted {
                Counted::Matching(all) => (all.clone(), false),
                Counted::Spread(who, inclusion) => {
                    let inclusion = inclusion.clone();
                    let who = who.clone();
                    self.include(id, &inclusion);
                    (vec![who], true)
                }
                Counted::Repelling(_) => continue,
            };
            // Without a selector a term speaks of nobody.
            let labels: Option<Vec<LabelSelector>> = whos.iter().map(|who| who.labels.clone()).collect();
            let Some(labels) = labels else { continue };
            for (namespace, nodes) in tallies.pods(&Kind { labels, living }, self.around.news) {
                if whos.iter().all(|who| self.has_namespace(who, namespace)) {
                    self.fill(id, nodes.iter());
                }
            }
        }
    }

    /// The domains that a spread counts.
    fn include(&mut self, id: usize, inclusion: &Inclusion) {
        let Some(counter) = self.counters.get_mut(id) else { return };
        let nodes = self.around.nodes.iter().filter_map(|entry| entry.object.as_node());
        for node in nodes.filter(|node| has(inclusion, node)) {
            if let Some(domain) = node.meta().labels.get(&counter.key)
                && counter.domains.insert(domain.clone())
            {
                *counter.spectrum.entry(0).or_insert(0) += 1;
            }
        }
    }

    fn fill<'n>(&mut self, id: usize, nodes: impl Iterator<Item = (&'n String, &'n i64)>) {
        let Some(counter) = self.counters.get_mut(id) else { return };
        for (name, count) in nodes {
            let Some(node) = node_of(&self.around.nodes, name) else { continue };
            let counts = match &counter.counted {
                Counted::Spread(_, inclusion) => has(inclusion, node),
                Counted::Matching(_) | Counted::Repelling(_) => true,
            };
            if let Some(domain) = node.meta().labels.get(&counter.key).filter(|_| counts) {
                counter.add(domain, *count);
            }
        }
    }
}

#[cfg(test)]
#[path = "scene_tests.rs"]
mod tests;
