//! Requests and limits as cgroup values and oom_score_adj.

use std::collections::BTreeMap;

use minipod_proto::quantity::Quantity;
use minipod_proto::v1::ResourceRequirements;
use serde::{Deserialize, Serialize};

/// Period of the CPU quota, microseconds.
pub const CPU_PERIOD_US: u64 = 100_000;
/// Smallest quota that the kernel takes, microseconds.
const MIN_QUOTA_US: u64 = 1_000;

/// Requests and limits in plain numbers; absent where the manifest says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Resources {
    /// CPU request in thousandths.
    pub cpu_request_milli: Option<u64>,
    /// CPU limit in thousandths.
    pub cpu_limit_milli: Option<u64>,
    /// Memory request.
    pub memory_request_bytes: Option<u64>,
    /// Memory limit.
    pub memory_limit_bytes: Option<u64>,
}

/// Values of the cpu and memory controllers; what is absent is not set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CgroupValues {
    /// v1 cpu.shares.
    pub cpu_shares: u64,
    /// v2 cpu.weight.
    pub cpu_weight: u64,
    /// Quota per [`CPU_PERIOD_US`], microseconds.
    pub cpu_quota_us: Option<u64>,
    /// Memory limit.
    pub memory_limit_bytes: Option<u64>,
}

impl Resources {
    /// Reads a container's (or a pod's) resources. They were validated when the pod was created; what cannot be read is
    /// taken as absent. A request that is absent is its limit.
    #[must_use]
    pub fn of(requirements: Option<&ResourceRequirements>) -> Self {
        let Some(requirements) = requirements else { return Self::default() };
        let quantity = |name: &str, from: &BTreeMap<String, String>| {
            from.get(name)?.parse::<Quantity>().ok().filter(|quantity| quantity.sign() >= 0)
        };
        let milli = |quantity: Quantity| u64::try_from(quantity.milli_value_ceil()).ok();
        let whole = |quantity: Quantity| u64::try_from(quantity.value_ceil()).ok();
        let cpu_limit_milli = quantity("cpu", &requirements.limits).and_then(milli);
        let memory_limit_bytes = quantity("memory", &requirements.limits).and_then(whole);
        Self {
            cpu_request_milli: quantity("cpu", &requirements.requests).and_then(milli).or(cpu_limit_milli),
            cpu_limit_milli,
            memory_request_bytes: quantity("memory", &requirements.requests).and_then(whole).or(memory_limit_bytes),
            memory_limit_bytes,
        }
    }

    /// `stated` with these amounts of CPU and memory: for what is in force and not yet, or no longer, what the manifest says.
    #[must_use]
    pub fn within(&self, stated: &ResourceRequirements) -> ResourceRequirements {
        let mut all = stated.clone();
        let says = Self::of(Some(stated));
        let cpu = |milli: u64| Quantity::from_milli(i64::try_from(milli).unwrap_or(i64::MAX)).to_string();
        let memory = |bytes: u64| Quantity::from_size(bytes).to_string();
        let mut put =
            |map: fn(&mut ResourceRequirements) -> &mut BTreeMap<String, String>, name: &str, text: Option<String>| {
                match text {
                    Some(text) => drop(map(&mut all).insert(name.to_owned(), text)),
                    None => drop(map(&mut all).remove(name)),
                }
            };
        if self.cpu_request_milli != says.cpu_request_milli {
            put(|all| &mut all.requests, "cpu", self.cpu_request_milli.map(cpu));
        }
        if self.cpu_limit_milli != says.cpu_limit_milli {
            put(|all| &mut all.limits, "cpu", self.cpu_limit_milli.map(cpu));
        }
        if self.memory_request_bytes != says.memory_request_bytes {
            put(|all| &mut all.requests, "memory", self.memory_request_bytes.map(memory));
        }
        if self.memory_limit_bytes != says.memory_limit_bytes {
            put(|all| &mut all.limits, "memory", self.memory_limit_bytes.map(memory));
        }
        all
    }

    /// Controller values: shares from the request, quota from the limit.
    #[must_use]
    pub fn cgroup(&self) -> CgroupValues {
        let cpu_shares = self.cpu_request_milli.map_or(2, |milli| (milli * 1024 / 1000).clamp(2, 262_144));
        CgroupValues {
            cpu_shares,
            cpu_weight: 1 + (cpu_shares - 2) * 9_999 / 262_142,
            cpu_quota_us: self
                .cpu_limit_milli
                .filter(|milli| *milli > 0)
                .map(|milli| (milli * CPU_PERIOD_US / 1000).max(MIN_QUOTA_US)),
            memory_limit_bytes: self.memory_limit_bytes.filter(|bytes| *bytes > 0),
        }
    }
}

/// Kubernetes' oom_score_adj by quality of service.
#[must_use]
pub fn oom_score_adj(qos_class: &str, memory_request_bytes: u64, node_memory_bytes: u64) -> i32 {
    match qos_class {
        "Guaranteed" => -997,
        "BestEffort" => 1000,
        _ => {
            let share = u128::from(memory_request_bytes) * 1000 / u128::from(node_memory_bytes.max(1));
            1000 - i32::try_from(share.clamp(1, 997)).unwrap_or(997)
        }
    }
}

/// The value of a resourceFieldRef: rounded up to the divisor. `node` answers for a limit that the container has not.
#[must_use]
pub fn field_value(
    requirements: Option<&ResourceRequirements>,
    resource: &str,
    divisor: &str,
    node: &BTreeMap<String, Quantity>,
) -> Option<String> {
    let (side, name) = resource.split_once('.')?;
    let stated = requirements.and_then(|requirements| match side {
        "limits" => requirements.limits.get(name),
        "requests" => requirements.requests.get(name).or_else(|| requirements.limits.get(name)),
        _ => None,
    });
    let stated = stated.and_then(|text| text.parse::<Quantity>().ok());
    let quantity = match side {
        "limits" => stated.or_else(|| node.get(name).copied()),
        "requests" => Some(stated.unwrap_or(Quantity::ZERO)),
        _ => None,
    }?;
    let divisor = divisor.parse::<Quantity>().ok().filter(|divisor| divisor.sign() > 0);
    let divisor = divisor.unwrap_or_else(|| Quantity::from_units(1));
    let in_milli = |quantity: Quantity| i128::from(quantity.milli_value_ceil());
    // Milli precision would overflow 64 bits only beyond 9 PB; whole units serve there.
    let (value, by) = if quantity.value_ceil() < i64::MAX / 1000 {
        (in_milli(quantity), in_milli(divisor))
    } else {
        (i128::from(quantity.value_ceil()), i128::from(divisor.value_ceil()))
    };
    Some(((value + by - 1) / by.max(1)).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requirements(requests: &[(&str, &str)], limits: &[(&str, &str)]) -> ResourceRequirements {
        let map = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        ResourceRequirements { requests: map(requests), limits: map(limits) }
    }

    #[test]
    fn cgroup_values_follow_requests_and_limits() {
        let values = |requests: &[(&str, &str)], limits: &[(&str, &str)]| {
            let values = Resources::of(Some(&requirements(requests, limits))).cgroup();
            (values.cpu_shares, values.cpu_weight, values.cpu_quota_us, values.memory_limit_bytes)
        };
        assert_eq!(values(&[], &[]), (2, 1, None, None));
        assert_eq!(values(&[("cpu", "1")], &[]), (1024, 39, None, None));
        assert_eq!(values(&[("cpu", "100m")], &[("cpu", "250m")]), (102, 4, Some(25_000), None));
        assert_eq!(values(&[], &[("cpu", "2"), ("memory", "64Mi")]), (2048, 79, Some(200_000), Some(64 << 20)));
        assert_eq!(values(&[("cpu", "1m")], &[("cpu", "1m")]), (2, 1, Some(1_000), None));
        assert_eq!(values(&[("cpu", "9000")], &[]), (262_144, 10_000, None, None));
    }

    #[test]
    fn what_is_in_force_is_told_in_the_manifests_words() {
        let stated = requirements(&[("cpu", "1.0"), ("memory", "1Gi")], &[("memory", "2Gi"), ("example.com/x", "1")]);
        assert_eq!(Resources::of(Some(&stated)).within(&stated), stated, "words that say the same stay");
        let other = requirements(&[("cpu", "500m"), ("memory", "1Gi")], &[("memory", "3Gi")]);
        let told = Resources::of(Some(&other)).within(&stated);
        let want = requirements(&[("cpu", "500m"), ("memory", "1Gi")], &[("memory", "3Gi"), ("example.com/x", "1")]);
        assert_eq!(told, want);
        assert_eq!(Resources::default().within(&stated).requests, BTreeMap::new());
    }

    #[test]
    fn oom_scores_follow_the_quality_of_service() {
        assert_eq!(oom_score_adj("Guaranteed", 1, 1), -997);
        assert_eq!(oom_score_adj("BestEffort", 0, 1), 1000);
        assert_eq!(oom_score_adj("Burstable", 4 << 30, 8 << 30), 500);
        assert_eq!(oom_score_adj("Burstable", 0, 8 << 30), 999);
        assert_eq!(oom_score_adj("Burstable", 8 << 30, 8 << 30), 3);
    }

    #[test]
    fn resource_fields_round_up_to_the_divisor() {
        let own = requirements(&[("cpu", "250m"), ("memory", "32Mi")], &[("memory", "64Mi")]);
        let node = BTreeMap::from([("cpu".to_owned(), Quantity::from_units(2))]);
        let value = |resource: &str, divisor: &str| field_value(Some(&own), resource, divisor, &node);
        assert_eq!(value("requests.cpu", ""), Some("1".into()));
        assert_eq!(value("requests.cpu", "1m"), Some("250".into()));
        assert_eq!(value("limits.cpu", "0"), Some("2".into()), "no limit: the node's allocatable");
        assert_eq!(value("requests.memory", "1Mi"), Some("32".into()));
        assert_eq!(value("limits.memory", ""), Some("67108864".into()));
        assert_eq!(value("limits.memory", "1G"), Some("1".into()));
        assert_eq!(value("requests.ephemeral-storage", ""), Some("0".into()));
        assert_eq!(value("limits.ephemeral-storage", ""), None);
        assert_eq!(value("nonsense", ""), None);
    }
}
