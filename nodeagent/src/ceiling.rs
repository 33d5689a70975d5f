//! The ceiling of all pods together: the node's allocatable, in force on the cgroup that holds them (the kubelet's
//! `--enforce-node-allocatable=pods`). However much pods without limits use, the system and the agent keep what is reserved for them.

use std::collections::BTreeMap;

use minipod_podshim::cgroup::{CgroupError, Cgroups};
use minipod_podshim::protocol::Limits;
use minipod_proto::quantity::Quantity;

use crate::container::resources::Resources;
use crate::container::spec;

/// Limits of the cgroup `root`: those of `allocatable`, or none. Their shares of CPU weigh against the system's; no quota holds them back from time that nobody else wants.
///
/// # Errors
/// When there are no cgroups, or one cannot be set: memory that pods use beyond it already, for one.
pub fn set(root: &str, allocatable: Option<&BTreeMap<String, Quantity>>) -> Result<(), CgroupError> {
    let group = Cgroups::detect()?.all(root);
    match allocatable {
        Some(allocatable) => {
            let limits = limits_of(allocatable);
            group.create(&Limits::default())?;
            group.reset(&limits)
        }
        // What an agent before this one has set is taken away.
        None if !group.directories().is_empty() => {
            group.reset(&Limits { cpu_shares: Some(1024), cpu_weight: Some(100), ..Limits::default() })
        }
        None => Ok(()),
    }
}

fn limits_of(allocatable: &BTreeMap<String, Quantity>) -> Limits {
    let positive = |amount: i64| u64::try_from(amount).ok().filter(|amount| *amount > 0);
    let resources = Resources {
        cpu_request_milli: allocatable.get("cpu").and_then(|cpu| positive(cpu.milli_value_ceil())),
        memory_limit_bytes: allocatable.get("memory").and_then(|memory| positive(memory.value_ceil())),
        ..Resources::default()
    };
    spec::limits_of_all(&resources)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_a_limit_and_cpu_a_weight() {
        let quantity = |text: &str| text.parse::<Quantity>().expect("a quantity");
        let allocatable =
            BTreeMap::from([("cpu".to_owned(), quantity("1900m")), ("memory".to_owned(), quantity("1.5Gi"))]);
        let limits = limits_of(&allocatable);
        assert_eq!(
            (limits.memory_limit_bytes, limits.cpu_shares, limits.cpu_quota_us),
            (Some(3 << 29), Some(1945), None)
        );
        assert!(!limits.oom_group);
        assert_eq!(limits_of(&BTreeMap::new()).memory_limit_bytes, None);
    }
}
