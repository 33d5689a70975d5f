//! The nodes and the domains that their labels make, numbered: what is kept of thousands of nodes for each rule is then two numbers a node.

use std::{collections::HashMap, sync::Arc};

use minipod_proto::{Resource, v1::Node};

use super::counter::News;
use crate::cache::Entry;

/// A domain of nothing: the node has no such label.
pub const NOWHERE: u32 = u32::MAX;

/// Names of nodes that are gone, and changes, are kept up to this number (and the number of nodes): then everything is counted anew.
const WORN_AT: usize = 1 << 16;

/// Node labels that are looked at: each is one number for every node. There are as many as rules name.
const KEYS_LIMIT: usize = 1_024;

/// All nodes.
#[derive(Debug)]
pub struct Terrain {
    /// Everything up to this revision is taken note of.
    at: i64,
    ids: HashMap<String, usize>,
    nodes: Vec<Option<Arc<Entry>>>,
    axes: HashMap<String, Axis>,
    changed: Vec<usize>,
}

/// The domains of one node label.
#[derive(Debug, Default)]
struct Axis {
    numbers: HashMap<String, u32>,
    of: Vec<u32>,
}

impl Axis {
    fn set(&mut self, id: usize, node: Option<&Node>, key: &str) {
        let value = node.and_then(|node| node.meta().labels.get(key));
        let number = value.map_or(NOWHERE, |value| {
            let next = u32::try_from(self.numbers.len()).unwrap_or(NOWHERE);
            *self.numbers.entry(value.clone()).or_insert(next)
        });
        if self.of.len() <= id {
            self.of.resize(id + 1, NOWHERE);
        }
        if let Some(of) = self.of.get_mut(id) {
            *of = number;
        }
    }
}

impl Default for Terrain {
    fn default() -> Terrain {
        let (ids, nodes, axes, changed) = Default::default();
        Terrain { at: -1, ids, nodes, axes, changed }
    }
}

impl Terrain {
    /// Takes over what has happened to nodes; `news` says what since a revision.
    pub fn follow(&mut self, news: impl FnOnce(i64) -> News) {
        match news(self.at) {
            News::Changes(changes, at) => {
                for (before, after) in changes {
                    let Some(name) = after.as_ref().or(before.as_ref()).map(|entry| entry.key.clone()) else {
                        continue;
                    };
                    self.set(&name, after);
                }
                self.at = at;
            }
            News::All(nodes, at) => {
                let mut gone =
                    self.nodes.iter().flatten().map(|node| (node.key.clone(), None)).collect::<HashMap<_, _>>();
                gone.extend(nodes.into_iter().map(|node| (node.key.clone(), Some(node))));
                for (name, node) in gone {
                    self.set(&name, node);
                }
                self.at = at;
            }
        }
    }

    fn set(&mut self, name: &str, node: Option<Arc<Entry>>) {
        let id = self.id(name);
        let Some(place) = self.nodes.get_mut(id) else { return };
        let old = std::mem::replace(place, node);
        let (old, new) = (old.as_deref().and_then(as_node), place.as_deref().and_then(as_node));
        let same = match (old, new) {
            (Some(old), Some(new)) => old.meta().labels == new.meta().labels && old.spec().taints == new.spec().taints,
            (None, None) => true,
            _ => false,
        };
        if same {
            return;
        }
        for (key, axis) in &mut self.axes {
            axis.set(id, new, key);
        }
        self.changed.push(id);
    }

    /// The number of a node, known or not: pods may be on one that is not.
    pub fn id(&mut self, name: &str) -> usize {
        if let Some(id) = self.ids.get(name) {
            return *id;
        }
        let id = self.nodes.len();
        self.ids.insert(name.to_owned(), id);
        self.nodes.push(None);
        id
    }

    /// A node by its number.
    pub fn node(&self, id: usize) -> Option<&Node> {
        self.entry(id).and_then(|entry| as_node(entry))
    }

    /// The same as the cache has it.
    pub fn entry(&self, id: usize) -> Option<&Arc<Entry>> {
        self.nodes.get(id)?.as_ref()
    }

    /// How many numbers were given.
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// Makes the domains of a label known.
    pub fn look_at(&mut self, key: &str) {
        if self.axes.contains_key(key) {
            return;
        }
        let mut axis = Axis::default();
        for (id, node) in self.nodes.iter().enumerate() {
            axis.set(id, node.as_deref().and_then(as_node), key);
        }
        self.axes.insert(key.to_owned(), axis);
    }

    /// The domain of a node by a label that was looked at.
    pub fn domain(&self, id: usize, key: &str) -> u32 {
        self.axes.get(key).and_then(|axis| axis.of.get(id)).copied().unwrap_or(NOWHERE)
    }

    /// Nodes whose labels or taints have changed, in order, each as often as they did.
    pub fn changed(&self) -> &[usize] {
        &self.changed
    }

    /// Whether there is more of the past in it than of the present.
    pub fn is_worn(&self) -> bool {
        let limit = WORN_AT.max(2 * self.nodes.iter().flatten().count());
        self.nodes.len() > limit || self.changed.len() > 2 * limit || self.axes.len() > KEYS_LIMIT
    }
}

fn as_node(entry: &Entry) -> Option<&Node> {
    entry.object.as_node()
}
