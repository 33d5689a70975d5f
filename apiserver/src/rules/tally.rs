//! How many pods of which kind are on which node, kept as the cache changes: counting a large cluster anew for every batch would cost
//! more than binding it.

use std::{
    collections::{BTreeSet, HashMap},
    hash::Hash,
    sync::Arc,
};

use minipod_proto::{
    Resource,
    rules::{Rules, Term},
    selector::LabelSelector,
    v1::Pod,
};

use crate::cache::Entry;

/// Kinds of pods that are counted at once; the one that was asked for longest ago is forgotten for a new one.
const KINDS_LIMIT: usize = 512;

/// A pod before and after a change.
pub type PodChange = (Option<Arc<Entry>>, Option<Arc<Entry>>);

/// What has happened to pods since a revision.
#[derive(Debug)]
pub enum News {
    /// These, in order, up to the revision.
    Changes(Vec<PodChange>, i64),
    /// It is not known any more; all that are bound, at the revision.
    All(Vec<Arc<Entry>>, i64),
}

/// Pods with these labels.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Kind {
    /// All of these select them.
    pub labels: Vec<LabelSelector>,
    /// Without those that are being deleted.
    pub living: bool,
}

impl Kind {
    fn has(&self, pod: &Pod) -> bool {
        let labels = &pod.meta().labels;
        !(self.living && pod.is_terminating()) && self.labels.iter().all(|selector| selector.matches(labels))
    }
}

/// Number of pods by node.
pub type ByNode = HashMap<String, i64>;

/// Pods under some keys, by node.
#[derive(Debug)]
struct Tally<K> {
    /// Everything up to this revision is counted.
    at: i64,
    counts: HashMap<K, ByNode>,
}

impl<K> Default for Tally<K> {
    fn default() -> Tally<K> {
        Tally { at: -1, counts: HashMap::new() }
    }
}

impl<K: Eq + Hash> Tally<K> {
    /// Takes over what has happened; `keys_of` says under which keys a pod counts.
    fn follow(&mut self, news: News, keys_of: impl Fn(&Pod) -> Vec<K>) {
        match news {
            News::Changes(changes, at) => {
                for (before, after) in &changes {
                    let (before, after) = (placed(before.as_deref()), placed(after.as_deref()));
                    if before.is_none() && after.is_none() {
                        continue;
                    }
                    let old = before.map(|(node, pod)| (node, keys_of(pod)));
                    let new = after.map(|(node, pod)| (node, keys_of(pod)));
                    if old != new {
                        self.add(old, -1);
                        self.add(new, 1);
                    }
                }
                self.at = at;
            }
            News::All(pods, at) => {
                self.counts.clear();
                for entry in &pods {
                    self.add(placed(Some(entry)).map(|(node, pod)| (node, keys_of(pod))), 1);
                }
                self.at = at;
            }
        }
    }

    fn add(&mut self, pod: Option<(&str, Vec<K>)>, change: i64) {
        let Some((node, keys)) = pod else { return };
        for key in keys {
            let by_node = self.counts.entry(key).or_default();
            match by_node.get_mut(node) {
                Some(count) if *count + change == 0 => drop(by_node.remove(node)),
                Some(count) => *count += change,
                None => drop(by_node.insert(node.to_owned(), change)),
            }
        }
    }
}

/// A pod that is somewhere, with its node.
fn placed(entry: Option<&Entry>) -> Option<(&str, &Pod)> {
    let pod = entry?.object.as_pod()?;
    pod.node_name().filter(|_| !pod.is_terminal()).map(|node| (node, pod))
}

/// All that is counted.
#[derive(Debug, Default)]
pub struct Tallies {
    /// By namespace; with the last time that it was asked for.
    kinds: HashMap<Kind, (Tally<String>, u64)>,
    /// Pods with that required anti-affinity.
    holders: Tally<Term>,
    asked: u64,
}

impl Tallies {
    /// Pods of a kind, by namespace and node; `news` says what has happened since a revision.
    pub fn pods(&mut self, kind: &Kind, news: impl FnOnce(i64) -> News) -> &HashMap<String, ByNode> {
        self.asked += 1;
        if !self.kinds.contains_key(kind) && self.kinds.len() >= KINDS_LIMIT {
            let oldest = self.kinds.iter().min_by_key(|(_, (_, asked))| *asked).map(|(kind, _)| kind.clone());
            oldest.and_then(|kind| self.kinds.remove(&kind));
        }
        let (tally, asked) = self.kinds.entry(kind.clone()).or_default();
        *asked = self.asked;
        tally.follow(news(tally.at), |pod| if kind.has(pod) { vec![pod.namespace().to_owned()] } else { Vec::new() });
        tally.counts.retain(|_, by_node| !by_node.is_empty());
        &tally.counts
    }

    /// Pods that hold a required anti-affinity, by that and node.
    pub fn holders(&mut self, news: impl FnOnce(i64) -> News) -> &HashMap<Term, ByNode> {
        self.holders.follow(news(self.holders.at), |pod| {
            // Each once: two equal terms of a pod are one. What cannot be understood was never bound with it.
            let terms: BTreeSet<Term> = Rules::anti_affinity_of(pod).unwrap_or_default().into_iter().collect();
            terms.into_iter().collect()
        });
        self.holders.counts.retain(|_, by_node| !by_node.is_empty());
        &self.holders.counts
    }
}

#[cfg(test)]
#[path = "tally_tests.rs"]
mod tests;
