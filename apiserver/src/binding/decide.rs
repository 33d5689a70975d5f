//! What may be done with pods and ledgers: pure.

use std::{collections::BTreeMap, sync::Arc};

use minipod_proto::v1::{BindResult, Pod, bind_batch_request::Item, bind_result::Code};

use crate::{
    cache::Entry,
    ledger::{self, Charge, Ledger, Refusal},
    rules::{Demand, scene::Scene},
};

/// What a pod asks for wherever it is bound.
#[derive(Debug, Clone)]
pub struct Wants {
    /// What it takes of the node.
    pub charge: Charge,
    /// Its rules about other pods, if it has any.
    pub demand: Option<Arc<Demand>>,
}

/// A result without a node.
pub fn result(code: Code, message: impl Into<String>) -> BindResult {
    BindResult { code: code as i32, message: message.into(), ..BindResult::default() }
}

/// Whether this pod may be bound: what it wants, or the result that says why not. `entry` is the pod's newest known state.
///
/// # Errors
/// The final result of the item.
pub fn judge_pod(item: &Item, entry: Option<&Entry>) -> Result<Wants, Box<BindResult>> {
    let refuse = |code, message: String| Err(Box::new(result(code, message)));
    let Some((entry, pod)) = entry.and_then(|entry| Some((entry, entry.object.as_pod()?))) else {
        return refuse(Code::PodGone, format!("pod {}/{} does not exist", item.namespace, item.pod));
    };
    let meta = entry.object.meta();
    if meta.uid != item.uid {
        return refuse(Code::PodGone, format!("pod {} is another one now, with the uid {}", entry.key, meta.uid));
    }
    if let Some(node) = pod.node_name() {
        let mut bound = result(Code::AlreadyBound, format!("pod {} is bound to {node}", entry.key));
        bound.node = node.to_owned();
        bound.revision = entry.revision;
        return Err(Box::new(bound));
    }
    if pod.is_terminating() {
        return refuse(Code::PodTerminating, format!("pod {} is being deleted", entry.key));
    }
    if pod.is_terminal() {
        return refuse(Code::PodChanged, format!("pod {} has ended: {}", entry.key, pod.phase()));
    }
    if item.revision != 0 && item.revision < entry.spec_revision {
        let (decided, now) = (item.revision, entry.spec_revision);
        return refuse(
            Code::PodChanged,
            format!("the spec of pod {} is of revision {now}, not of {decided}", entry.key),
        );
    }
    if let Some(gate) = pod.spec().scheduling_gates.first() {
        return refuse(Code::PodChanged, format!("pod {} waits for its scheduling gate {}", entry.key, gate.name));
    }
    wants_of(pod, &entry.key)
}

/// Whether a result about a pod stays true whatever is written later: a binding, a mark for deletion and an end are never undone.
pub fn is_for_ever(result: &BindResult) -> bool {
    matches!(result.code(), Code::AlreadyBound | Code::PodTerminating)
}

fn wants_of(pod: &Pod, key: &str) -> Result<Wants, Box<BindResult>> {
    let cannot = |what: &str, error: &dyn std::fmt::Display| {
        Box::new(result(Code::PodChanged, format!("the {what} of pod {key} cannot be {error}")))
    };
    let charge = ledger::charge(pod).map_err(|error| cannot("requests", &format!("summed: {error}")))?;
    let demand = Demand::of(pod).map_err(|error| cannot("rules", &format!("understood: {error}")))?;
    Ok(Wants { charge, demand })
}

/// The result of a refusal by a node.
pub fn refused(node: &str, refusal: Refusal) -> BindResult {
    match refusal {
        Refusal::Gone => result(Code::NodeGone, format!("node {node} does not exist")),
        Refusal::Unschedulable(why) => result(Code::NodeUnschedulable, format!("node {node} takes no pods: {why}")),
        Refusal::NoFit(short) => result(Code::NoFit, format!("{node}: {short}")),
    }
}

/// What a batch comes to on the ledgers as they are known.
#[derive(Debug, Default)]
pub struct Plan {
    /// Positions of the wishes that are granted.
    pub granted: Vec<usize>,
    /// Positions of the others, and why.
    pub refused: Vec<(usize, BindResult)>,
    /// Ledgers with the granted pods booked, of those nodes that get any.
    pub ledgers: BTreeMap<String, Ledger>,
}

impl Plan {
    /// Whether a rule between pods stood against any.
    pub fn rules_refuse(&self) -> bool {
        self.refused.iter().any(|(_, result)| result.code() == Code::RuleBroken)
    }
}

/// Grants wishes in their order as long as they fit; with `all`, everything or nothing. `ledger_of` is what is known of a node, `scene`
/// has the rules where any concerns a pod of the batch.
pub fn plan<'a, 'l>(
    wishes: impl IntoIterator<Item = (&'a str, &'a Charge)>,
    ledger_of: impl Fn(&str) -> Option<&'l Ledger>,
    mut scene: Option<Scene>,
    all: bool,
) -> Plan {
    let mut plan = Plan::default();
    for (position, (node, charge)) in wishes.into_iter().enumerate() {
        let present = plan.ledgers.get(node).or_else(|| ledger_of(node));
        let by_ledger = present.map_or(Err(Refusal::Gone), |ledger| ledger.admits(charge));
        let by_rules = || scene.as_ref().map_or(Ok(()), |scene| scene.admits(position, node));
        let admitted = by_ledger
            .map_err(|refusal| refused(node, refusal))
            .and_then(|()| by_rules().map_err(|why| result(Code::RuleBroken, format!("{node}: {why}"))));
        match admitted {
            Ok(()) => {
                if let Some(scene) = &mut scene {
                    scene.place(position, node);
                }
                if let Some(ledger) = plan.ledgers.get_mut(node) {
                    ledger.take(charge);
                } else if let Some(ledger) = ledger_of(node) {
                    let mut ledger = ledger.clone();
                    ledger.take(charge);
                    plan.ledgers.insert(node.to_owned(), ledger);
                }
                plan.granted.push(position);
            }
            Err(refusal) => plan.refused.push((position, refusal)),
        }
    }
    if all && !plan.refused.is_empty() {
        let others = std::mem::take(&mut plan.granted);
        plan.ledgers.clear();
        plan.refused.extend(others.into_iter().map(|position| (position, gang())));
    }
    plan
}

/// The result of an item that had to stay behind with its gang.
pub fn gang() -> BindResult {
    result(Code::Gang, "another pod of the batch could not be bound")
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
