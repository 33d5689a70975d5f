//! Rules between pods, as bindings are held against them: required (anti-)affinity and `DoNotSchedule` spreads. Pure; what is read and
//! written is in [`crate::binding`].
//!
//! | module | what it holds |
//! |---|---|
//! | [`announced`] | whom rules speak of that are being bound by or have been: what every binding compares |
//! | [`terrain`] | the nodes and the domains that their labels make, numbered |
//! | [`counter`] | how many pods of a kind are in which domain, kept as the cache changes |
//! | [`tally`] | the counters of a server, and what they say of a few nodes at one moment |
//! | [`scene`] | the pods of a batch, the rules that concern them, and what the domains hold |

pub mod announced;
pub mod counter;
pub mod scene;
pub mod tally;
pub mod terrain;

use std::sync::Arc;

use minipod_proto::{
    rules::{Placement, RuleError, Rules, Who},
    v1::Pod,
};

/// What a pod's own rules demand of the place that it is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    /// Those that must hold: no preferences, and no `ScheduleAnyway`.
    pub rules: Rules,
    /// Which nodes the pod accepts, for the spreads that count no others.
    pub placement: Placement,
}

impl Demand {
    /// A pod's; `None` when it has no such rules, as most.
    ///
    /// # Errors
    /// When a rule cannot be understood (validation refuses such a pod).
    pub fn of(pod: &Pod) -> Result<Option<Arc<Demand>>, RuleError> {
        let spec = pod.spec();
        if spec.affinity.is_none() && spec.topology_spread_constraints.is_empty() {
            return Ok(None);
        }
        let mut rules = Rules::of(pod)?;
        rules.spread.retain(|spread| spread.hard);
        let none = rules.affinity.is_empty() && rules.anti_affinity.is_empty() && rules.spread.is_empty();
        Ok((!none).then(|| Arc::new(Demand { rules, placement: Placement::of(spec) })))
    }

    /// Whom the rules speak of.
    pub fn whos(&self) -> impl Iterator<Item = &Who> {
        let terms = self.rules.affinity.iter().chain(&self.rules.anti_affinity).map(|term| &term.who);
        terms.chain(self.rules.spread.iter().map(|spread| &spread.who))
    }
}
