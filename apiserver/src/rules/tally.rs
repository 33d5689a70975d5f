//! The counters of a server, kept from batch to batch.

use std::{
    collections::{BTreeSet, HashMap},
    rc::Rc,
    sync::Arc,
};

use minipod_proto::{
    Resource,
    rules::{Labels, Rules, Term, Who},
    v1::Pod,
};

use super::{
    counter::{Change, Counted, Counter, Counts, News, placed, speaks_of},
    terrain::Terrain,
};
use crate::cache::Entry;

/// Counters that are kept; the one that was asked for longest ago is forgotten for a new one.
const COUNTERS_LIMIT: usize = 512;

/// The same, in numbers that are kept for nodes: 16 bytes each.
const PLACES_LIMIT: usize = 16 << 20;

/// What the cluster is like.
pub struct Around<'a> {
    /// The labels of a namespace.
    pub labels_of: &'a dyn Fn(&str) -> Labels,
    /// The revision at which those of any namespace changed last.
    pub namespaces_at: i64,
    /// What has happened to pods since a revision.
    pub pods: &'a dyn Fn(i64) -> News,
    /// What has happened to nodes since a revision.
    pub nodes: &'a dyn Fn(i64) -> News,
}

/// News of pods, each asked for once: most counters have counted up to the same revision.
#[derive(Default)]
struct Heard(HashMap<i64, Rc<News>>);

impl Heard {
    fn since(&mut self, at: i64, ask: &dyn Fn(i64) -> News) -> Rc<News> {
        Rc::clone(self.0.entry(at).or_insert_with(|| Rc::new(ask(at))))
    }
}

/// All that is counted.
#[derive(Debug)]
pub struct Tallies {
    terrain: Terrain,
    /// By what they count and by which node label; with the last time that they were asked for.
    kept: HashMap<(Counted, String), (Counter, u64)>,
    /// Pods that hold a required anti-affinity.
    holders: HashMap<Term, Counter>,
    /// Everything that happened to pods up to this revision is counted for those.
    holders_at: i64,
    asked: u64,
}

impl Default for Tallies {
    fn default() -> Tallies {
        let (terrain, kept, holders) = Default::default();
        Tallies { terrain, kept, holders, holders_at: -1, asked: 0 }
    }
}

/// What is asked about some nodes, all as of the same moment.
pub struct Survey<'a> {
    tallies: &'a mut Tallies,
    around: Around<'a>,
    heard: Heard,
    nodes: Vec<usize>,
}

impl Tallies {
    /// Looks at nodes by their names.
    pub fn survey<'a>(&'a mut self, nodes: &[&str], around: Around<'a>) -> Survey<'a> {
        if self.terrain.is_worn() {
            *self = Tallies::default();
        }
        self.terrain.follow(around.nodes);
        let nodes = nodes.iter().map(|name| self.terrain.id(name)).collect();
        let mut survey = Survey { tallies: self, around, heard: Heard::default(), nodes };
        survey.follow_holders();
        survey
    }

    fn make_room(&mut self) {
        let limit = COUNTERS_LIMIT.min(PLACES_LIMIT / self.terrain.count().max(1)).max(1);
        while self.kept.len() >= limit {
            let oldest = self.kept.iter().min_by_key(|(_, (_, asked))| *asked).map(|(what, _)| what.clone());
            oldest.and_then(|what| self.kept.remove(&what));
        }
    }
}

impl Survey<'_> {
    /// Whether a term speaks of a pod.
    pub fn speaks_of(&self, who: &Who, pod: &Pod) -> bool {
        speaks_of(who, pod, self.around.labels_of)
    }

    /// Whether a pod counts wherever it may be.
    pub fn counts_pod(&self, counted: &Counted, pod: &Pod) -> bool {
        counted.speaks_of(pod, self.around.labels_of)
    }

    /// The required anti-affinities that bound pods hold.
    pub fn held(&self) -> impl Iterator<Item = &Term> {
        self.tallies.holders.keys()
    }

    /// The nodes that are looked at; `None`: there is no node of that name.
    pub fn nodes(&self) -> Vec<Option<Arc<Entry>>> {
        self.nodes.iter().map(|id| self.tallies.terrain.entry(*id).cloned()).collect()
    }

    /// What is counted in the domains of the nodes.
    pub fn counts(&mut self, counted: &Counted, key: &str) -> Counts {
        let Tallies { terrain, kept, holders, .. } = &mut *self.tallies;
        if let Counted::Repelling(who) = counted {
            let term = Term { who: who.clone(), topology_key: key.to_owned() };
            if let Some(counter) = holders.get_mut(&term) {
                counter.follow_nodes(terrain);
                return counter.counts(&self.nodes, terrain);
            }
            return Counter::blank(counted.clone(), key, terrain).counts(&self.nodes, terrain);
        }
        let what = (counted.clone(), key.to_owned());
        if !kept.contains_key(&what) {
            self.tallies.make_room();
        }
        let Tallies { terrain, kept, asked, .. } = &mut *self.tallies;
        *asked += 1;
        let (counter, last) = kept.entry(what).or_insert_with(|| (Counter::new(counted.clone(), key, terrain), *asked));
        *last = *asked;
        counter.follow_nodes(terrain);
        let news = |at| self.heard.since(at, self.around.pods);
        counter.follow_pods(news, self.around.labels_of, self.around.namespaces_at, terrain);
        counter.counts(&self.nodes, terrain)
    }

    fn follow_holders(&mut self) {
        let news = self.heard.since(self.tallies.holders_at, self.around.pods);
        let at = match &*news {
            News::Changes(changes, at) => {
                for change in changes.iter().filter(|change| !is_alike(change)) {
                    let (before, after) = (placed(change.0.as_deref()), placed(change.1.as_deref()));
                    self.hold(before, -1);
                    self.hold(after, 1);
                }
                *at
            }
            News::All(pods, at) => {
                self.tallies.holders.clear();
                for entry in pods {
                    self.hold(placed(Some(entry)), 1);
                }
                *at
            }
        };
        self.tallies.holders.retain(|_, counter| !counter.is_empty());
        self.tallies.holders_at = at;
    }

    fn hold(&mut self, pod: Option<(&str, &Pod)>, change: i64) {
        let Some((node, pod)) = pod else { return };
        let Tallies { terrain, holders, .. } = &mut *self.tallies;
        // Each once: two equal terms of a pod are one. What cannot be understood was never bound with it.
        let terms: BTreeSet<Term> = Rules::anti_affinity_of(pod).unwrap_or_default().into_iter().collect();
        let node = terrain.id(node);
        for term in terms {
            let counter = holders.entry(term).or_insert_with_key(|term| {
                Counter::new(Counted::Repelling(term.who.clone()), &term.topology_key, terrain)
            });
            counter.follow_nodes(terrain);
            counter.add(Some(node), change);
        }
    }
}

/// Whether a pod has the same anti-affinity in the same place as before: most changes are of its status.
fn is_alike((before, after): &Change) -> bool {
    let (Some(before), Some(after)) = (before, after) else { return false };
    match (placed(Some(before)), placed(Some(after))) {
        (None, None) => true,
        (Some((old_node, old)), Some((new_node, new))) => {
            let same = before.spec_revision == after.spec_revision && old.meta().uid == new.meta().uid;
            // Terms may take over values of the pod's own labels.
            same && old_node == new_node && old.meta().labels == new.meta().labels
        }
        _ => false,
    }
}

#[cfg(test)]
#[path = "tally_tests.rs"]
mod tests;
