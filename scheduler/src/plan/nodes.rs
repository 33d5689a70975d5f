//! The nodes: dense ids, and what is free as one array per resource.

use std::collections::HashMap;
use std::sync::Arc;

use minipod_proto::resources::{CPU, EPHEMERAL_STORAGE, MEMORY, PODS};

use super::bits::Bits;
use super::levels::Levels;
use super::needs::{HostPort, NodeInfo};
use super::{NodeId, PodId, Profile};

/// Index of CPU among the resources.
pub const CPU_INDEX: usize = 0;
/// Index of memory.
pub const MEMORY_INDEX: usize = 1;

/// A share of 1 in the fixed point of ranks: shares of two resources add up well within 63 bits.
const ONE: i64 = 1 << 60;
/// Ranks of one resource are kept within this, so that sums cannot overflow.
const RANK_LIMIT: i128 = 1 << 60;

/// One resource over all nodes.
pub struct Column {
    /// Name of the resource.
    pub name: String,
    /// What pods may use, by node.
    pub allocatable: Vec<i64>,
    /// What is left, by node; negative where more is bound than the node has.
    pub free: Vec<i64>,
    /// Index over `free`.
    pub levels: Levels,
}

/// Nodes of (nearly) the same size: the share that an amount is of the node is the same on all of them, so the order
/// of such nodes by rank does not depend on the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Rank per unit of CPU and of memory.
    per_unit: [i64; 2],
}

impl Shape {
    /// Sizes within a sixty-fourth of each other are one.
    fn new(sizes: [i64; 2]) -> Shape {
        Shape { per_unit: sizes.map(|size| if size <= 0 { 0 } else { ONE / round_up(size) }) }
    }

    /// The shares that these amounts are, added up.
    pub fn rank(&self, amounts: [i64; 2]) -> i64 {
        let share = |index: usize| {
            let exact = i128::from(amounts[index]) * i128::from(self.per_unit[index]);
            // Clamped to 61 bits.
            exact.clamp(-RANK_LIMIT, RANK_LIMIT) as i64
        };
        share(0) + share(1)
    }
}

/// Up to the next number with seven significant bits.
fn round_up(size: i64) -> i64 {
    let spare = (63 - size.leading_zeros()).saturating_sub(6);
    let mask = (1i64 << spare) - 1;
    size.saturating_add(mask) & !mask
}

/// All nodes.
pub struct Nodes {
    profile: Profile,
    ids: HashMap<Arc<str>, NodeId>,
    vacant: Vec<NodeId>,
    /// By id; `None` where the id is vacant.
    pub info: Vec<Option<NodeInfo>>,
    /// Ids that are not vacant.
    pub alive: Bits,
    /// By resource index.
    pub columns: Vec<Column>,
    resource_ids: HashMap<String, usize>,
    /// What is left of CPU and memory as scoring counts it, by node.
    score_free: [Vec<i64>; 2],
    /// Index into `shapes`, by node.
    pub shape: Vec<u32>,
    /// All shapes seen.
    pub shapes: Vec<Shape>,
    /// By shape: how far what is free (at least 0) may be above `score_free`, in rank. It only grows.
    pub slack: Vec<i64>,
    shape_ids: HashMap<Shape, u32>,
    /// By node: how good it is as a place for any pod; the greater the better.
    pub rank: Vec<i64>,
    /// By node: grows with everything that happens to it and its pods; from 1.
    pub version: Vec<u64>,
    /// Pods on the node.
    pub pods: Vec<Vec<PodId>>,
    /// Nodes where somebody takes this port, by protocol and number.
    port_users: HashMap<(String, i32), Bits>,
    /// Ports taken, by node.
    pub ports: Vec<Vec<HostPort>>,
}

impl Nodes {
    /// None yet.
    pub fn new(profile: Profile) -> Nodes {
        let mut nodes = Nodes {
            profile,
            ids: HashMap::new(),
            vacant: Vec::new(),
            info: Vec::new(),
            alive: Bits::default(),
            columns: Vec::new(),
            resource_ids: HashMap::new(),
            score_free: [Vec::new(), Vec::new()],
            shape: Vec::new(),
            shapes: Vec::new(),
            slack: Vec::new(),
            shape_ids: HashMap::new(),
            rank: Vec::new(),
            version: Vec::new(),
            pods: Vec::new(),
            port_users: HashMap::new(),
            ports: Vec::new(),
        };
        for name in [CPU, MEMORY, EPHEMERAL_STORAGE, PODS] {
            nodes.resource(name);
        }
        nodes
    }

    /// Id of the node of that name.
    pub fn id(&self, name: &str) -> Option<NodeId> {
        self.ids.get(name).copied()
    }

    /// Number of ids, vacant ones included.
    pub fn capacity(&self) -> usize {
        self.info.len()
    }

    /// Index of a resource; it gets one if it has none.
    pub fn resource(&mut self, name: &str) -> usize {
        if let Some(index) = self.resource_ids.get(name) {
            return *index;
        }
        // From where amounts are told apart up to more than machines have: 16 milli to 1,000 CPUs, 16 MiB to 16 TiB.
        let levels = match name {
            CPU => Levels::new(4, 16),
            MEMORY | EPHEMERAL_STORAGE => Levels::new(24, 20),
            _ => Levels::new(0, 16),
        };
        let zeros = vec![0; self.capacity()];
        self.columns.push(Column { name: name.to_owned(), allocatable: zeros.clone(), free: zeros, levels });
        self.resource_ids.insert(name.to_owned(), self.columns.len() - 1);
        self.columns.len() - 1
    }

    /// An id for a new node, with nothing of it set but the name.
    pub fn admit(&mut self, name: &Arc<str>) -> NodeId {
        let id = self.vacant.pop().unwrap_or_else(|| {
            for column in &mut self.columns {
                column.allocatable.push(0);
                column.free.push(0);
            }
            for free in &mut self.score_free {
                free.push(0);
            }
            self.info.push(None);
            self.shape.push(0);
            self.rank.push(0);
            self.version.push(0);
            self.pods.push(Vec::new());
            self.ports.push(Vec::new());
            self.info.len() as NodeId - 1
        });
        self.ids.insert(Arc::clone(name), id);
        self.alive.set(id, true);
        id
    }

    /// Gives the id of a node back. Its pods must be off it.
    pub fn dismiss(&mut self, id: NodeId) {
        if let Some(info) = self.info[id as usize].take() {
            self.ids.remove(&info.name);
        }
        self.set_allocatable(id, &[]);
        self.alive.set(id, false);
        self.vacant.push(id);
    }

    /// Marks an id that was admitted without a node as vacant.
    pub fn retire(&mut self, id: NodeId) {
        self.ids.retain(|_, other| *other != id);
        self.vacant.push(id);
    }

    /// Takes over what pods may use of the node; what is used stays.
    pub fn set_allocatable(&mut self, id: NodeId, allocatable: &[(String, i64)]) {
        let index = id as usize;
        let mut sizes = vec![0; self.columns.len()];
        for (name, amount) in allocatable {
            let resource = self.resource(name);
            sizes.resize(self.columns.len(), 0);
            sizes[resource] = *amount;
        }
        for (resource, size) in sizes.iter().enumerate() {
            let change = size - self.columns[resource].allocatable[index];
            self.columns[resource].allocatable[index] = *size;
            self.add_free(id, resource, change);
            if let Some(free) = self.score_free.get_mut(resource) {
                free[index] += change;
            }
        }
        let shape = Shape::new([sizes[CPU_INDEX], sizes[MEMORY_INDEX]]);
        let next = self.shapes.len() as u32;
        let shape_id = *self.shape_ids.entry(shape).or_insert(next);
        if shape_id == next {
            self.shapes.push(shape);
            self.slack.push(0);
        }
        self.shape[index] = shape_id;
        self.refresh_slack(id);
        self.refresh_rank(id);
    }

    /// Changes what is free of one resource.
    fn add_free(&mut self, id: NodeId, resource: usize, change: i64) {
        let column = &mut self.columns[resource];
        let free = &mut column.free[id as usize];
        *free += change;
        column.levels.update(id, *free);
    }

    /// A pod comes (`sign` 1) or goes (-1).
    pub fn charge(&mut self, id: NodeId, requests: &[(usize, i64)], weight: [i64; 2], sign: i64) {
        let mut asked = [0; 2];
        for (resource, amount) in requests {
            self.add_free(id, *resource, -sign * amount);
            if let Some(asked) = asked.get_mut(*resource) {
                *asked = *amount;
            }
        }
        for (free, amount) in self.score_free.iter_mut().zip(weight) {
            free[id as usize] -= sign * amount;
        }
        let over = |resource: usize| self.columns[resource].free[id as usize] < 0;
        if asked != weight || over(CPU_INDEX) || over(MEMORY_INDEX) {
            self.refresh_slack(id);
        }
        self.refresh_rank(id);
    }

    fn refresh_slack(&mut self, id: NodeId) {
        let index = id as usize;
        // A pod that asks for none of a resource fits where less than none is left.
        let gap = |resource: usize| self.columns[resource].free[index].max(0) - self.score_free[resource][index];
        let shape = self.shape[index] as usize;
        let slack = self.shapes[shape].rank([gap(CPU_INDEX), gap(MEMORY_INDEX)]);
        self.slack[shape] = self.slack[shape].max(slack);
    }

    fn refresh_rank(&mut self, id: NodeId) {
        let index = id as usize;
        self.version[index] += 1;
        let free = [self.score_free[0][index], self.score_free[1][index]];
        let share = self.shapes[self.shape[index] as usize].rank(free);
        self.rank[index] = match self.profile {
            Profile::Spread => share,
            Profile::Pack => -share,
        };
    }

    /// What a pod of this weight changes in the rank of a node of that shape.
    pub fn rank_change(&self, shape: u32, weight: [i64; 2]) -> i64 {
        let share = self.shapes[shape as usize].rank(weight);
        match self.profile {
            Profile::Spread => -share,
            Profile::Pack => share,
        }
    }

    /// No node of that shape with a rank above this has room for the requests.
    pub fn rank_bound(&self, shape: u32, requests: &[(usize, i64)]) -> i64 {
        match self.profile {
            Profile::Spread => i64::MAX,
            Profile::Pack => {
                let of =
                    |wanted| requests.iter().find(|(resource, _)| *resource == wanted).map_or(0, |(_, amount)| *amount);
                let least = self.shapes[shape as usize].rank([of(CPU_INDEX), of(MEMORY_INDEX)]);
                self.slack[shape as usize].saturating_sub(least)
            }
        }
    }

    /// Whether the requests fit.
    pub fn fits(&self, id: NodeId, requests: &[(usize, i64)]) -> bool {
        requests.iter().all(|(resource, amount)| self.columns[*resource].free[id as usize] >= *amount)
    }

    /// A pod takes its ports or gives them back.
    pub fn take_ports(&mut self, id: NodeId, ports: &[HostPort], take: bool) {
        let taken = &mut self.ports[id as usize];
        for port in ports {
            if take {
                taken.push(port.clone());
            } else if let Some(at) = taken.iter().position(|other| other == port) {
                taken.swap_remove(at);
            }
            let users = taken.iter().any(|other| other.port == port.port && other.protocol == port.protocol);
            self.port_users.entry((port.protocol.clone(), port.port)).or_default().set(id, users);
        }
    }

    /// The first of these ports that somebody has on the node.
    pub fn port_conflict<'a>(&self, id: NodeId, ports: &'a [HostPort]) -> Option<&'a HostPort> {
        let taken = &self.ports[id as usize];
        if taken.is_empty() {
            return None;
        }
        ports.iter().find(|port| taken.iter().any(|other| other.conflicts(port)))
    }

    /// Name of the node of that id; empty for a vacant one.
    pub fn name(&self, id: NodeId) -> &str {
        self.info.get(id as usize).and_then(Option::as_ref).map_or("", |info| &info.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_join_what_is_nearly_the_same_size() {
        let mib = |n: i64| n << 20;
        assert_eq!(Shape::new([4000, mib(16000)]), Shape::new([3990, mib(15990)]));
        assert_ne!(Shape::new([4000, mib(16000)]), Shape::new([4000, mib(15000)]));
        assert_eq!(Shape::new([0, 0]).rank([5, 5]), 0);
    }

    #[test]
    fn rank_is_linear_and_never_overflows() {
        let shape = Shape::new([4000, 16 << 30]);
        let parts = shape.rank([1000, 1 << 30]) + shape.rank([500, 3 << 30]);
        assert_eq!(parts, shape.rank([1500, 4 << 30]));
        let _ = Shape::new([1, 1]).rank([i64::MAX, i64::MIN]);
    }
}
