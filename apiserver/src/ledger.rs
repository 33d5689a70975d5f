//! What of a node is taken: the arithmetic of invariant 2, without any I/O.
//!
//! `used` of a ledger is the sum of the requests of the pods that are bound to the node and not ended. It is changed in the store's
//! transaction that binds, ends or removes a pod; nothing else computes it.

pub mod writers;

use std::collections::BTreeMap;

use minipod_proto::{
    resize,
    resources::{self, PODS, ResourceError, Resources},
    scheduling,
    v1::{Node, Pod},
};

/// A host port that a pod has taken.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PortUse {
    /// The port.
    #[prost(int32, tag = "1")]
    pub port: i32,
    /// TCP, UDP or SCTP.
    #[prost(string, tag = "2")]
    pub protocol: String,
    /// The host's address; empty: all of them.
    #[prost(string, tag = "3")]
    pub host_ip: String,
    /// The pod that has it.
    #[prost(string, tag = "4")]
    pub pod_uid: String,
}

impl PortUse {
    fn collides(&self, other: &PortUse) -> bool {
        let any = |ip: &str| ip.is_empty() || ip == "0.0.0.0" || ip == "::";
        self.port == other.port
            && self.protocol == other.protocol
            && (any(&self.host_ip) || any(&other.host_ip) || self.host_ip == other.host_ip)
    }
}

/// The form in the store, under `/minipod/ledger/<node>`. CPU in thousandths, everything else in units.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Ledger {
    /// What pods may use.
    #[prost(btree_map = "string, int64", tag = "1")]
    pub allocatable: BTreeMap<String, i64>,
    /// What they do use; `pods` is their number. Zeros are left out.
    #[prost(btree_map = "string, int64", tag = "2")]
    pub used: BTreeMap<String, i64>,
    /// Taken host ports.
    #[prost(message, repeated, tag = "3")]
    pub ports: Vec<PortUse>,
    /// spec.unschedulable of the node.
    #[prost(bool, tag = "4")]
    pub unschedulable: bool,
    /// The node object is gone; the ledger stays until the last pod has ended.
    #[prost(bool, tag = "5")]
    pub deleting: bool,
    /// The node's condition Ready is not True.
    #[prost(bool, tag = "6")]
    pub not_ready: bool,
}

/// What one pod takes of its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Charge {
    /// The pod.
    pub uid: String,
    /// Requests, with `pods` = 1.
    pub requests: Resources,
    /// Host ports.
    pub ports: Vec<PortUse>,
    /// It may be put on a node that is marked unschedulable.
    pub tolerates_unschedulable: bool,
}

/// Why a pod does not get on a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The node is gone.
    Gone,
    /// The node takes no new pods, and why.
    Unschedulable(&'static str),
    /// No room; the exact shortfalls.
    NoFit(String),
}

/// What a pod takes wherever it is bound.
///
/// # Errors
/// When its quantities cannot be summed (validation refuses such a pod).
pub fn charge(pod: &Pod) -> Result<Charge, ResourceError> {
    let uid = pod.metadata.as_ref().map_or("", |meta| &meta.uid);
    let spec = pod.spec();
    let ports = spec.all_containers().flat_map(|container| &container.ports).filter(|port| port.host_port > 0);
    let ports = ports.map(|port| PortUse {
        port: port.host_port,
        protocol: if port.protocol.is_empty() { "TCP".to_owned() } else { port.protocol.clone() },
        host_ip: port.host_ip.clone(),
        pod_uid: uid.to_owned(),
    });
    Ok(Charge {
        uid: uid.to_owned(),
        requests: resize::bound_requests(pod)?,
        ports: ports.collect(),
        tolerates_unschedulable: scheduling::tolerates_unschedulable(&spec.tolerations),
    })
}

/// What a pod takes now: nothing unless it is bound and has not ended. With the node that it is bound to.
///
/// # Errors
/// When its quantities cannot be summed.
pub fn charged(pod: &Pod) -> Result<Option<(&str, Charge)>, ResourceError> {
    match pod.node_name() {
        Some(node) if !pod.is_terminal() => Ok(Some((node, charge(pod)?))),
        _ => Ok(None),
    }
}

impl Ledger {
    /// A ledger for a new node.
    ///
    /// # Errors
    /// When an allocatable quantity is none.
    pub fn of_node(node: &Node) -> Result<Ledger, ResourceError> {
        let mut ledger = Ledger::default();
        ledger.follow(node)?;
        Ok(ledger)
    }

    /// Takes over what the node says of itself; leaves what is used alone.
    ///
    /// # Errors
    /// When an allocatable quantity is none.
    pub fn follow(&mut self, node: &Node) -> Result<(), ResourceError> {
        let allocatable = resources::node_allocatable(node)?;
        self.allocatable = allocatable.iter().filter(|(_, n)| *n != 0).map(|(name, n)| (name.to_owned(), n)).collect();
        self.unschedulable = node.spec().unschedulable;
        // A node of which nothing is known yet may be used; one that is known to be silent or unwell may not.
        self.not_ready = node.condition("Ready").is_some_and(|ready| ready.status != "True");
        self.deleting = false;
        Ok(())
    }

    /// Whether a pod may be put here now.
    ///
    /// # Errors
    /// The reason against it.
    pub fn admits(&self, charge: &Charge) -> Result<(), Refusal> {
        if self.deleting {
            return Err(Refusal::Gone);
        }
        if self.unschedulable && !charge.tolerates_unschedulable {
            return Err(Refusal::Unschedulable("it is marked unschedulable"));
        }
        if self.not_ready {
            return Err(Refusal::Unschedulable("it is not ready"));
        }
        self.fits(charge)
    }

    fn fits(&self, charge: &Charge) -> Result<(), Refusal> {
        let mut short = Vec::new();
        for (name, amount) in charge.requests.iter().filter(|(_, amount)| *amount > 0) {
            let free = self.free(name);
            if amount > free {
                let shortfall = resources::Shortfall { resource: name.to_owned(), requested: amount, free };
                short.push(shortfall.to_string());
            }
        }
        for port in &charge.ports {
            if self.ports.iter().any(|taken| taken.pod_uid != charge.uid && taken.collides(port)) {
                short.push(format!("host port {}/{} is taken", port.port, port.protocol));
            }
        }
        if short.is_empty() { Ok(()) } else { Err(Refusal::NoFit(short.join(", "))) }
    }

    /// Whether there is room for what a pod that is here takes more than before. What it takes no more of is not asked after: a node
    /// may be overcommitted since it says that it has less.
    ///
    /// # Errors
    /// [`Refusal::NoFit`], and whether that would be so without any other pod too.
    pub fn has_room_for_more(&self, before: &Charge, after: &Charge) -> Result<(), (Refusal, bool)> {
        let (mut short, mut never) = (Vec::new(), false);
        for (name, amount) in after.requests.iter() {
            let more = amount.saturating_sub(before.requests.get(name));
            let free = self.free(name);
            if more > 0 && more > free {
                let free = free.saturating_add(before.requests.get(name));
                never |= amount > self.allocatable.get(name).copied().unwrap_or(0);
                short.push(resources::Shortfall { resource: name.to_owned(), requested: amount, free }.to_string());
            }
        }
        if short.is_empty() { Ok(()) } else { Err((Refusal::NoFit(short.join(", ")), never)) }
    }

    fn free(&self, name: &str) -> i64 {
        let of = |map: &BTreeMap<String, i64>| map.get(name).copied().unwrap_or(0);
        of(&self.allocatable).saturating_sub(of(&self.used))
    }

    /// Books a pod, whether or not it fits.
    pub fn take(&mut self, charge: &Charge) {
        for (name, amount) in charge.requests.iter() {
            self.change(name, amount);
        }
        self.ports.extend(charge.ports.iter().cloned());
    }

    /// Gives back what [`Ledger::take`] booked.
    pub fn release(&mut self, charge: &Charge) {
        for (name, amount) in charge.requests.iter() {
            self.change(name, amount.saturating_neg());
        }
        self.ports.retain(|port| port.pod_uid != charge.uid);
    }

    fn change(&mut self, name: &str, by: i64) {
        if by == 0 {
            return;
        }
        match self.used.get_mut(name) {
            Some(value) => {
                *value = value.saturating_add(by);
                if *value == 0 {
                    self.used.remove(name);
                }
            }
            None => drop(self.used.insert(name.to_owned(), by)),
        }
    }

    /// Number of pods that count.
    pub fn pods(&self) -> i64 {
        self.used.get(PODS).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_for_more_is_asked_for_what_grows_alone() {
        let ledger = Ledger {
            allocatable: [("cpu".to_owned(), 4000), ("memory".to_owned(), 100)].into(),
            // Overcommitted in memory: the node says that it has less than it had.
            used: [("cpu".to_owned(), 3000), ("memory".to_owned(), 150)].into(),
            ..Ledger::default()
        };
        let charge = |cpu_milli, memory_bytes| Charge {
            uid: "u".into(),
            requests: Resources { cpu_milli, memory_bytes, pods: 1, ..Resources::default() },
            ports: Vec::new(),
            tolerates_unschedulable: false,
        };
        let before = charge(1000, 50);
        for ((cpu, memory), want) in [
            ((2000, 50), Ok(())),
            ((500, 20), Ok(())),
            ((2001, 50), Err(("cpu short by 1m", false))),
            ((4001, 50), Err(("cpu short by 2001m", true))),
            ((1000, 51), Err(("memory short by 51", false))),
        ] {
            let got = ledger.has_room_for_more(&before, &charge(cpu, memory));
            let got = got.map_err(|(refusal, never)| match refusal {
                Refusal::NoFit(text) => (text, never),
                other => panic!("{other:?}"),
            });
            assert_eq!(got, want.map_err(|(text, never)| (text.to_owned(), never)), "{cpu} {memory}");
        }
    }
}
