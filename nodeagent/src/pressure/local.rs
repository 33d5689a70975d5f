//! Whether a pod keeps to the disk that its manifest allows: pure.

use std::collections::BTreeMap;

use minipod_proto::quantity::Quantity;
use minipod_proto::resources::{EPHEMERAL_STORAGE, amount_text, pod_limits};
use minipod_proto::v1::{Pod, Volume};

/// What a pod has on the disk, bytes and files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DiskUse {
    /// By container: writable layers of its runs, and logs.
    pub containers: BTreeMap<String, u64>,
    /// By volume: its emptyDirs on disk.
    pub volumes: BTreeMap<String, u64>,
    /// Files of all of it.
    pub inodes: u64,
}

impl DiskUse {
    /// All of it.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.containers.values().chain(self.volumes.values()).fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }
}

/// Whether a volume is an emptyDir on the node's disk.
#[must_use]
pub fn is_disk(volume: &Volume) -> bool {
    volume.empty_dir.as_ref().is_some_and(|source| source.medium.is_empty())
}

/// Whether anything of the pod's disk is limited, so that it has to be measured.
#[must_use]
pub fn is_limited(pod: &Pod) -> bool {
    let spec = pod.spec();
    let sized = |volume: &Volume| {
        is_disk(volume) && volume.empty_dir.as_ref().is_some_and(|source| !source.size_limit.is_empty())
    };
    spec.volumes.iter().any(sized)
        || spec.all_containers().any(|container| {
            container.resources.as_ref().is_some_and(|resources| resources.limits.contains_key(EPHEMERAL_STORAGE))
        })
}

/// Why the pod is to be evicted, in the kubelet's words; `None` as long as it keeps to its limits.
#[must_use]
pub fn judge(pod: &Pod, usage: &DiskUse) -> Option<String> {
    let spec = pod.spec();
    let over = |used: u64, limit: &Quantity| i128::from(used) > i128::from(limit.value_ceil());
    for volume in spec.volumes.iter().filter(|volume| is_disk(volume)) {
        let limit = volume.empty_dir.as_ref().and_then(|source| source.size_limit.parse::<Quantity>().ok());
        let used = usage.volumes.get(&volume.name).copied().unwrap_or(0);
        if let Some(limit) = limit.filter(|limit| limit.sign() > 0 && over(used, limit)) {
            return Some(format!("Usage of EmptyDir volume \"{}\" exceeds the limit \"{limit}\". ", volume.name));
        }
    }
    let limit = pod_limits(spec).map(|limits| limits.get(EPHEMERAL_STORAGE)).unwrap_or(0);
    if limit > 0 && i128::from(usage.total_bytes()) > i128::from(limit) {
        let limit = amount_text(EPHEMERAL_STORAGE, limit);
        return Some(format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "));
    }
    for container in spec.all_containers() {
        let limits = container.resources.as_ref().map(|resources| &resources.limits);
        let limit = limits.and_then(|limits| limits.get(EPHEMERAL_STORAGE)?.parse::<Quantity>().ok());
        let used = usage.containers.get(&container.name).copied().unwrap_or(0);
        if let Some(limit) = limit.filter(|limit| limit.sign() > 0 && over(used, limit)) {
            let name = &container.name;
            return Some(format!("Container {name} exceeded its local ephemeral storage limit \"{limit}\". "));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use minipod_proto::v1::{Container, EmptyDirVolumeSource, PodSpec, ResourceRequirements};

    fn pod(containers: &[(&str, &str)], volumes: &[(&str, &str, &str)]) -> Pod {
        let container = |(name, limit): &(&str, &str)| {
            let limits = [(EPHEMERAL_STORAGE.to_owned(), (*limit).to_owned())].into_iter();
            let limits = limits.filter(|(_, limit)| !limit.is_empty()).collect();
            let resources = Some(ResourceRequirements { limits, ..ResourceRequirements::default() });
            Container { name: (*name).into(), resources, ..Container::default() }
        };
        let volume = |(name, medium, limit): &(&str, &str, &str)| Volume {
            name: (*name).into(),
            empty_dir: Some(EmptyDirVolumeSource { medium: (*medium).into(), size_limit: (*limit).into() }),
            ..Volume::default()
        };
        let spec = PodSpec {
            containers: containers.iter().map(container).collect(),
            volumes: volumes.iter().map(volume).collect(),
            ..PodSpec::default()
        };
        Pod { spec: Some(spec), ..Pod::default() }
    }

    fn usage(containers: &[(&str, u64)], volumes: &[(&str, u64)]) -> DiskUse {
        let map = |pairs: &[(&str, u64)]| pairs.iter().map(|(name, used)| ((*name).to_owned(), *used)).collect();
        DiskUse { containers: map(containers), volumes: map(volumes), inodes: 0 }
    }

    #[test]
    fn volumes_then_the_pod_then_containers() {
        const MIB: u64 = 1 << 20;
        let limited = pod(&[("a", "10Mi"), ("b", "5Mi")], &[("v", "", "4Mi"), ("w", "", ""), ("m", "Memory", "1Mi")]);
        for (containers, volumes, want) in [
            (&[("a", 10 * MIB), ("b", 0)][..], &[("v", 4 * MIB)][..], ""),
            (&[], &[("v", 4 * MIB + 1)], "Usage of EmptyDir volume \"v\" exceeds the limit \"4Mi\". "),
            (
                &[("a", 9 * MIB), ("b", 5 * MIB)],
                &[("w", MIB + 1)],
                "Pod ephemeral local storage usage exceeds the total limit of containers 15Mi. ",
            ),
            (&[("a", 1), ("b", 6 * MIB)], &[], "Container b exceeded its local ephemeral storage limit \"5Mi\". "),
            // Memory is bounded by its file system.
            (&[], &[("m", 2 * MIB)], ""),
        ] {
            let got = judge(&limited, &usage(containers, volumes));
            assert_eq!(got.unwrap_or_default(), want, "{containers:?} {volumes:?}");
        }
        assert!(is_limited(&limited) && is_limited(&pod(&[], &[("v", "", "1Mi")])));
        let free = pod(&[("a", "")], &[("v", "", ""), ("m", "Memory", "1Mi")]);
        assert!(!is_limited(&free));
        assert_eq!(judge(&free, &usage(&[("a", u64::MAX)], &[("v", u64::MAX)])), None);
    }
}
