//! Nodes in the order in which they are good places, within groups whose nodes are alike for a class of pods.
//!
//! A partition groups nodes by shape and by their domains of a few coarse topology keys. All nodes of a group get the same answer
//! from every check on those keys, and a pod changes their ranks alike, so the best node of a group is the first in order
//! that passes what is left to check.

use std::collections::{BTreeSet, HashMap};

use super::NodeId;
use super::nodes::Nodes;
use super::topology::Topology;

/// Nodes that are alike.
pub struct Group {
    /// Index of their shape.
    pub shape: u32,
    /// Their domains, one per key of the partition.
    pub domains: Box<[u32]>,
    /// By (rank, complement of the id): the last one is the best, and of equals the one with the lowest id.
    pub nodes: BTreeSet<(i64, u32)>,
}

/// A grouping of all nodes.
pub struct Partition {
    /// Indexes of the keys, ascending.
    pub keys: Vec<usize>,
    /// By index.
    pub groups: Vec<Group>,
    ids: HashMap<(u32, Box<[u32]>), u32>,
    /// Where the node is filed: group and rank.
    filed: Vec<Option<(u32, i64)>>,
}

impl Partition {
    /// Of all nodes by these keys.
    pub fn new(keys: Vec<usize>, nodes: &Nodes, topology: &Topology) -> Partition {
        let mut partition = Partition { keys, groups: Vec::new(), ids: HashMap::new(), filed: Vec::new() };
        for node in nodes.alive.iter() {
            partition.file(node, nodes, topology);
        }
        partition
    }

    /// Group of a node.
    pub fn group(&self, node: NodeId) -> Option<u32> {
        self.filed.get(node as usize).copied().flatten().map(|(group, _)| group)
    }

    /// Takes the node out.
    pub fn remove(&mut self, node: NodeId) {
        if let Some(Some((group, rank))) = self.filed.get_mut(node as usize).map(Option::take) {
            self.groups[group as usize].nodes.remove(&(rank, !node));
        }
    }

    /// Puts the node in.
    pub fn file(&mut self, node: NodeId, nodes: &Nodes, topology: &Topology) {
        self.remove(node);
        let shape = nodes.shape[node as usize];
        let domains: Box<[u32]> = self.keys.iter().map(|key| topology.keys[*key].domain(node)).collect();
        let next = self.groups.len() as u32;
        let group = *self.ids.entry((shape, domains.clone())).or_insert(next);
        if group == next {
            self.groups.push(Group { shape, domains, nodes: BTreeSet::new() });
        }
        let rank = nodes.rank[node as usize];
        self.groups[group as usize].nodes.insert((rank, !node));
        if self.filed.len() <= node as usize {
            self.filed.resize(node as usize + 1, None);
        }
        self.filed[node as usize] = Some((group, rank));
    }

    /// The node's rank has changed.
    pub fn rerank(&mut self, node: NodeId, rank: i64) {
        if let Some(Some((group, old))) = self.filed.get_mut(node as usize)
            && *old != rank
        {
            let order = &mut self.groups[*group as usize].nodes;
            order.remove(&(*old, !node));
            order.insert((rank, !node));
            *old = rank;
        }
    }
}
