//! Nodes kept free for one pod or gang that has waited long, so that a stream of small pods does not starve it.
//!
//! Nothing is taken from anybody: what runs there ends in its own time, and only newcomers of the same or lower priority are kept
//! away. What never ends on its own must not hold up the holder for ever: a held node that gets no emptier is given up for another.
//! This suits jobs that end by themselves within minutes: nodes get free one after the other and stay so. Among services that run for ever
//! a held node never gets free; the hold then wanders from node to node (`hold_elsewhere`) and costs room without helping. Whoever must get
//! in there needs a priority that preempts.
//! One holder at a time, so two holders can never wait for each other's nodes.

use std::collections::HashMap;
use std::sync::Arc;

use super::bits::Bits;
use super::core::Core;
use super::{NodeId, PodId};

/// Nodes kept free.
pub struct Hold {
    /// The nodes.
    pub nodes: Bits,
    /// Who may use them: uids.
    pub owners: Vec<Arc<str>>,
    /// Pods of higher priority may use them too.
    pub priority: i32,
    /// What the owners are to get there, by resource.
    planned: HashMap<NodeId, Planned>,
    /// Nodes that were held for these owners and got no emptier.
    shunned: Bits,
}

/// Amounts by index of the resource.
type Planned = Vec<(usize, i64)>;

impl Core {
    /// Keeps nodes free on which all these pods would fit if nothing else were there. `false`, and nothing is held, when there are
    /// no such nodes: waiting will not help them.
    pub fn hold_for(&mut self, pods: &[PodId]) -> bool {
        self.hold_but(pods, Bits::default())
    }

    /// As [`Core::hold_for`], on none of the nodes that are shunned.
    fn hold_but(&mut self, pods: &[PodId], shunned: Bits) -> bool {
        let mut planned: HashMap<NodeId, Planned> = HashMap::new();
        // Whoever has had others ended for it gets there first.
        let mut closed = shunned.clone();
        for (_, pod) in &self.promises {
            if let Some(node) = self.place_of(*pod) {
                closed.set(node, true);
            }
        }
        let mut hold =
            Hold { nodes: Bits::default(), owners: Vec::new(), priority: i32::MIN, planned: HashMap::new(), shunned };
        for pod in pods {
            let Some(entry) = self.entry(*pod) else { continue };
            let class = self.class(entry.class);
            hold.owners.push(Arc::clone(&entry.info.uid));
            hold.priority = hold.priority.max(class.needs.priority);
            let roomiest = self.roomiest(class.statics, &class.requests, &planned, &closed);
            let Some(node) = roomiest else { return false };
            hold.nodes.set(node, true);
            let used = planned.entry(node).or_default();
            for (resource, amount) in &class.requests {
                match used.iter_mut().find(|(other, _)| other == resource) {
                    Some((_, sum)) => *sum += amount,
                    None => used.push((*resource, *amount)),
                }
            }
        }
        hold.planned = planned;
        self.hold = Some(hold);
        true
    }

    /// How far the held nodes are free for what is planned there: a thousand per node and resource when they are.
    pub fn hold_progress(&self) -> i64 {
        let Some(hold) = &self.hold else { return 0 };
        hold.planned.iter().map(|(node, planned)| self.readiness(*node, planned)).sum()
    }

    fn readiness(&self, node: NodeId, planned: &Planned) -> i64 {
        let shares = planned.iter().map(|(resource, amount)| {
            let free = self.nodes.columns[*resource].free[node as usize].clamp(0, *amount);
            i64::try_from(i128::from(free) * 1000 / i128::from((*amount).max(1))).unwrap_or(1000)
        });
        shares.sum()
    }

    /// Gives up the held nodes that are not free enough yet and holds others instead; those that are free stay held.
    pub fn hold_elsewhere(&mut self) {
        let Some(hold) = &self.hold else { return };
        let mut shunned = hold.shunned.clone();
        for (node, planned) in &hold.planned {
            if self.readiness(*node, planned) < 1000 * planned.len() as i64 {
                shunned.set(*node, true);
            }
        }
        let pods: Vec<PodId> = hold.owners.iter().filter_map(|uid| self.pod_id(uid)).collect();
        // When all have been tried, they are tried again.
        if !self.hold_but(&pods, shunned) {
            self.hold_for(&pods);
        }
    }

    /// Of the nodes that have room for the requests beside what is planned, were all else gone: the one where most is free now.
    fn roomiest(
        &self,
        statics: usize,
        requests: &[(usize, i64)],
        planned: &HashMap<NodeId, Planned>,
        shunned: &Bits,
    ) -> Option<NodeId> {
        let taken = |node: NodeId, resource: usize| {
            let used = planned.get(&node).and_then(|used| used.iter().find(|(other, _)| *other == resource));
            used.map_or(0, |(_, amount)| *amount)
        };
        let nodes = self.statics.all[statics].tiers.iter().flat_map(|(_, bits)| bits.iter());
        let fitting = nodes.filter(|node| !shunned.contains(*node)).filter(|node| {
            requests.iter().all(|(resource, amount)| {
                let size = self.nodes.columns[*resource].allocatable[*node as usize];
                size - taken(*node, *resource) >= *amount
            })
        });
        fitting.max_by_key(|node| {
            // The resource that is shortest decides, in thousandths of the request.
            let shares = requests.iter().map(|(resource, amount)| {
                let free = self.nodes.columns[*resource].free[*node as usize] - taken(*node, *resource);
                i128::from(free) * 1000 / i128::from((*amount).max(1))
            });
            // Among equals the one on which most has changed: what runs there is likely to end soon.
            (shares.min(), self.nodes.version[*node as usize], std::cmp::Reverse(*node))
        })
    }

    /// Gives the held nodes back to everybody.
    pub fn release_hold(&mut self) {
        self.hold = None;
    }

    /// The uids that nodes are held for; empty when none are.
    pub fn holders(&self) -> &[Arc<str>] {
        self.hold.as_ref().map_or(&[], |hold| &hold.owners)
    }

    /// Names of the nodes that are held.
    pub fn held_nodes(&self) -> Vec<&str> {
        self.hold.iter().flat_map(|hold| hold.nodes.iter()).map(|node| self.node_name(node)).collect()
    }
}
