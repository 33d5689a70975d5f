//! What must hold, whatever happened.

use super::machine::Chain;
use minipod_store::machine::Member;
use minipod_store::replica::core::Core;
use raft::StateRole;
use raft::eraftpb::ConfState;
use std::collections::BTreeMap;

/// What every replica must agree on after the same entry.
#[derive(Debug, Clone, PartialEq)]
struct Point {
    hash: u64,
    conf: ConfState,
    members: Vec<Member>,
}

/// Remembers what was seen anywhere.
#[derive(Debug, Default)]
pub struct Checker {
    points: BTreeMap<u64, Point>,
    leaders: BTreeMap<u64, u64>,
    /// By operation: the index at which a client was told that it took effect.
    pub acknowledged: BTreeMap<u64, u64>,
    /// Where any replica applied an operation.
    applied: BTreeMap<u64, u64>,
    /// The highest index that any client was told of.
    pub highest_acknowledged: u64,
}

impl Checker {
    /// Looks at a replica after it has done something.
    pub fn look(&mut self, core: &Core<Chain, u64>) -> Result<(), String> {
        let (id, machine) = (core.id(), core.machine());
        if let Some(wrong) = machine.wrong.first() {
            return Err(format!("member {id}: {wrong}"));
        }
        if machine.applied != core.applied() && core.applied() > 1 {
            return Err(format!(
                "member {id}: the machine is at {}, the replica at {}",
                machine.applied,
                core.applied()
            ));
        }
        if core.raft().state == StateRole::Leader {
            let leader = *self.leaders.entry(core.raft().term).or_insert(id);
            if leader != id {
                return Err(format!("term {} has two leaders, {leader} and {id}", core.raft().term));
            }
        }
        if core.leads_alone() && core.applied() < self.highest_acknowledged {
            return Err(format!(
                "member {id} would read at {} without asking, and {} was acknowledged",
                core.applied(),
                self.highest_acknowledged
            ));
        }
        if core.applied() == 0 {
            return Ok(());
        }
        let mut conf = core.conf_state().clone();
        conf.voters.sort_unstable();
        conf.learners.sort_unstable();
        let point = Point { hash: machine.hash, conf, members: core.members().list() };
        match self.points.get(&core.applied()) {
            Some(seen) if *seen != point => {
                Err(format!("member {id} differs after entry {}: {point:?}, and elsewhere {seen:?}", core.applied()))
            }
            Some(_) => Ok(()),
            None => {
                self.points.insert(core.applied(), point);
                for (operation, index) in &machine.operations {
                    let elsewhere = *self.applied.entry(*operation).or_insert(*index);
                    if elsewhere != *index {
                        return Err(format!(
                            "operation {operation} was applied at {elsewhere} and on member {id} at {index}"
                        ));
                    }
                }
                Ok(())
            }
        }
    }

    /// A client was told that its operation took effect at `index`.
    pub fn acknowledge(&mut self, operation: u64, index: u64) -> Result<(), String> {
        self.highest_acknowledged = self.highest_acknowledged.max(index);
        match self.acknowledged.insert(operation, index) {
            Some(before) => Err(format!("operation {operation} was acknowledged twice, at {before} and {index}")),
            None => Ok(()),
        }
    }

    /// Looks at a replica that has everything.
    pub fn look_at_the_end(&self, core: &Core<Chain, u64>) -> Result<(), String> {
        for (operation, index) in &self.acknowledged {
            let found = core.machine().operations.get(operation);
            if found != Some(index) {
                return Err(format!(
                    "operation {operation} was acknowledged at {index}, and member {} has it at {found:?}",
                    core.id()
                ));
            }
        }
        Ok(())
    }
}
