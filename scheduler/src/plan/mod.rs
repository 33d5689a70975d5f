//! The scheduler's decisions: pure, without I/O, clock or randomness.
//!
//! [`Core`] holds the cluster as indexes that are kept up to date event by event; [`Core::decide`] answers where a pod should go,
//! [`Core::explain`] why not elsewhere. Every decision looks at all nodes: indexes only leave out what is certain to lose.
//!
//! | module | what it holds |
//! |---|---|
//! | `needs` | what matters of pods and nodes, taken from the wire types |
//! | `nodes` | dense ids, free amounts by resource, ranks |
//! | `levels` | bitmaps: which nodes have at least so much free |
//! | `statics` | bitmaps: which nodes selector, affinity and tolerations allow |
//! | `topology` | pods per topology domain, for (anti-)affinity and spread |
//! | `order` | nodes by rank, in groups that are alike |
//! | `core` | events in, indexes up to date |
//! | `class` | pods with equal needs, and what is known about them together |
//! | `decide` | the best node for a class |
//! | `explain` | per node the first reason against it |
//! | `remedy` | what would make a pod fit |
//! | `fit` | where pods would go that do not exist |
//! | `preempt` | whom to end so that a pod fits |
//! | `promise` | places that are being cleared |
//! | `hold` | nodes kept free for whoever has waited long |
//! | `planner` | which pod is next, and what becomes of those that wait |

mod bits;
mod class;
mod core;
mod decide;
mod explain;
mod fit;
mod hold;
mod levels;
pub mod needs;
mod nodes;
mod order;
mod planner;
mod preempt;
mod promise;
mod remedy;
mod statics;
mod topology;

pub use self::core::{Core, Event};
pub use decide::Score;
pub use explain::{Explanation, NodeReason, Reason};
pub use fit::{Fit, Unplaced};
pub use needs::{Group, NodeInfo, PodInfo};
pub use planner::{
    BATCH, Binding, Eviction, Inquiry, Nominee, Outcome, Planner, Progress, Report, Settings, Standing, Step, Victim,
};
pub use preempt::{Budget, Preemption};
pub use remedy::Remedy;
pub use statics::StaticScore;

/// Dense number of a node.
pub type NodeId = u32;
/// Dense number of a pod.
pub type PodId = u32;

/// Which of several possible nodes is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Profile {
    /// The emptier one: load is spread.
    #[default]
    Spread,
    /// The fuller one: nodes are filled one by one.
    Pack,
}

impl std::str::FromStr for Profile {
    type Err = String;

    fn from_str(text: &str) -> Result<Profile, String> {
        match text {
            "spread" => Ok(Profile::Spread),
            "pack" => Ok(Profile::Pack),
            other => Err(format!("unknown profile {other:?}: want spread or pack")),
        }
    }
}
