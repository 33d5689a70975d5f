//! Requests and limits as cgroup values and oom_score_adj.

use std::collections::BTreeMap;

use minipod_proto::quantity::Quantity;
use minipod_proto::resources::{self as pod_resources, QosClass};
use minipod_proto::v1::{Container, PodSpec, ResourceRequirements};
use serde::{Deserialize, Serialize};

use crate::pressure::plan::CRITICAL_PRIORITY;

/// Period of the CPU quota, microseconds.
pub const CPU_PERIOD_US: u64 = 100_000;
/// Of who is killed last among all pods.
const GUARANTEED_OOM_SCORE_ADJ: i32 = -997;
/// The priority class of pods without which a node is none.
const NODE_CRITICAL: &str = "system-node-critical";
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
            cpu_weight: weight_of(cpu_shares),
            cpu_quota_us: self
                .cpu_limit_milli
                .filter(|milli| *milli > 0)
                .map(|milli| (milli * CPU_PERIOD_US / 1000).max(MIN_QUOTA_US)),
            memory_limit_bytes: self.memory_limit_bytes.filter(|bytes| *bytes > 0),
        }
    }
}

/// Version 2's cpu.weight of version 1's shares, on runc's and crun's curve since 2025: through 2 and 1, 262,144 and 10,000, and the defaults of
/// both, 1,024 and 100. The straight line before it gave a whole CPU 39, less than a process outside of any pod has.
fn weight_of(shares: u64) -> u64 {
    #[allow(clippy::cast_precision_loss, reason = "at most 2^18")]
    let log = (shares.clamp(2, 262_144) as f64).log2();
    let weight = 10_f64.powf((log * log + 125.0 * log) / 612.0 - 7.0 / 34.0);
    // Less than what a sum of floating-point numbers errs by.
    let whole = (weight - 1e-6).ceil().clamp(1.0, 10_000.0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and 10,000")]
    let whole = whole as u64;
    whole
}

/// Kubernetes' oom_score_adj of a container (pkg/kubelet/qos/policy.go): by the pod's quality of service, and of a Burstable pod by the share of
/// the node's memory that the container asks for. A pod that its node needs is killed as late as a Guaranteed one.
#[must_use]
pub fn oom_score_adj(spec: &PodSpec, container: &Container, node_memory_bytes: u64) -> i32 {
    if spec.priority_class_name == NODE_CRITICAL && spec.priority.unwrap_or(0) >= CRITICAL_PRIORITY {
        return GUARANTEED_OOM_SCORE_ADJ;
    }
    match pod_resources::qos_class(spec).unwrap_or(QosClass::BestEffort) {
        QosClass::Guaranteed => GUARANTEED_OOM_SCORE_ADJ,
        QosClass::BestEffort => 1000,
        QosClass::Burstable => {
            let asked_bytes = asked_memory_bytes(spec, container);
            let share = u128::from(asked_bytes) * 1000 / u128::from(node_memory_bytes.max(1));
            1000 - i32::try_from(share.clamp(1, 997)).unwrap_or(997)
        }
    }
}

/// What a container's OOM score counts as its request. A sidecar's score is no higher than that of the app which asks for the least (KEP-753), so
/// that the helper does not die for those that it helps; what the pod asks for beyond its containers is shared by all (KEP-2837).
fn asked_memory_bytes(spec: &PodSpec, container: &Container) -> u64 {
    let request = |container: &Container| Resources::of(container.resources.as_ref()).memory_request_bytes.unwrap_or(0);
    let mut sidecars = spec.init_containers.iter().filter(|one| one.is_sidecar());
    let least = match sidecars.any(|sidecar| sidecar.name == container.name) {
        true => spec.containers.iter().map(request).min().unwrap_or(0),
        false => 0,
    };
    request(container).max(least).saturating_add(unclaimed_memory_bytes(spec))
}

/// A container's part of the memory that the pod as a whole asks for and no container does.
fn unclaimed_memory_bytes(spec: &PodSpec) -> u64 {
    let Some(of_pod) = Resources::of(spec.resources.as_deref()).memory_request_bytes else { return 0 };
    let alone = PodSpec { resources: None, overhead: BTreeMap::new(), ..spec.clone() };
    let claimed = pod_resources::pod_requests(&alone).unwrap_or_default().memory_bytes;
    let sharers = spec.containers.len() + spec.init_containers.len();
    of_pod.saturating_sub(u64::try_from(claimed).unwrap_or(0)) / u64::try_from(sharers).unwrap_or(1).max(1)
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
        assert_eq!(values(&[("cpu", "1")], &[]), (1024, 100, None, None));
        assert_eq!(values(&[("cpu", "100m")], &[("cpu", "250m")]), (102, 17, Some(25_000), None));
        assert_eq!(values(&[], &[("cpu", "2"), ("memory", "64Mi")]), (2048, 174, Some(200_000), Some(64 << 20)));
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
    fn oom_scores_follow_the_pod_and_the_request() {
        // Of a node with 8 GiB: `KIND:REQUEST` of each container, what the pod asks for as a whole, and the scores in the same order.
        for (containers, of_pod, scores) in [
            ("app:-", "", "1000"),
            ("sidecar:- app:-", "", "1000 1000"),
            ("app:=1Gi", "", "-997"),
            ("sidecar:=1Gi app:=1Gi", "", "-997 -997"),
            ("app:4Gi", "", "500"),
            ("app:8Gi", "", "3"),
            ("app:4Gi app:-", "", "500 999"),
            // A sidecar is killed no sooner than the app that asks for the least; and later if it asks for more itself.
            ("sidecar:- app:4Gi", "", "500 500"),
            ("sidecar:1Gi app:4Gi app:2Gi", "", "750 500 750"),
            ("sidecar:6Gi app:4Gi", "", "250 500"),
            ("sidecar:- sidecar:2Gi app:1Gi", "", "875 750 875"),
            ("sidecar:- app:4Gi app:-", "", "999 500 999"),
            // An init container that ends is nobody's helper, and an app that always runs again is no sidecar.
            ("init:- app:4Gi", "", "999 500"),
            ("always:- app:4Gi", "", "999 500"),
            // What the pod asks for beyond its containers counts for each.
            ("app:1Gi app:1Gi", "4Gi", "750 750"),
            ("sidecar:- app:2Gi", "4Gi", "625 625"),
        ] {
            let (mut spec, mut made) = (PodSpec::default(), Vec::new());
            if !of_pod.is_empty() {
                spec.resources = Some(Box::new(requirements(&[("memory", of_pod)], &[])));
            }
            for (index, word) in containers.split(' ').enumerate() {
                let (kind, amount) = word.split_once(':').expect("KIND:REQUEST");
                let amounts = [("memory", amount.trim_start_matches('=')), ("cpu", "1")];
                let resources = match amount {
                    "-" => None,
                    _ if amount.starts_with('=') => Some(requirements(&amounts, &amounts)),
                    _ => Some(requirements(&amounts[..1], &[])),
                };
                let always = ["sidecar", "always"].contains(&kind);
                let restart_policy = if always { "Always" } else { "" }.to_owned();
                let name = format!("c{index}");
                let container = Container { name, restart_policy, resources, ..Container::default() };
                made.push(container.clone());
                let list =
                    if ["sidecar", "init"].contains(&kind) { &mut spec.init_containers } else { &mut spec.containers };
                list.push(container);
            }
            let score = |container| oom_score_adj(&spec, container, 8 << 30).to_string();
            assert_eq!(made.iter().map(score).collect::<Vec<_>>().join(" "), scores, "{containers} of {of_pod:?}");
        }
    }

    #[test]
    fn what_the_node_needs_is_killed_last() {
        let container = Container::default();
        for (class, priority, score) in [
            ("system-node-critical", Some(2_000_001_000), -997),
            ("system-cluster-critical", Some(2_000_000_000), 1000),
            ("system-node-critical", None, 1000),
        ] {
            let priority_class_name = class.to_owned();
            let containers = vec![container.clone()];
            let spec = PodSpec { priority_class_name, priority, containers, ..PodSpec::default() };
            assert_eq!(oom_score_adj(&spec, &container, 1), score, "{class}");
        }
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
