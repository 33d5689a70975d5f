//! Kernel parameters that pods may set: those that are safe among neighbours, and those that the node's operator allows.

use std::str::FromStr;

use minipod_proto::v1::Pod;

use crate::plan::model::Refused;

/// Parameters of a namespace that hold for the pod alone, cost its neighbours nothing and lift no limit of its: Kubernetes' list.
const SAFE: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];

/// Parameters that a node allows beside the safe ones: a name, or the beginning of names and `*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    fn fits(&self, name: &str) -> bool {
        self.0.strip_suffix('*').map_or(self.0 == name, |beginning| name.starts_with(beginning))
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let dotted = dotted(text);
        let name = dotted.strip_suffix('*').unwrap_or(&dotted);
        let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
        let of_a_namespace = ["net.", "kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue."];
        if name.bytes().all(is_name) && of_a_namespace.iter().any(|group| name.starts_with(group)) {
            Ok(Self(dotted))
        } else {
            Err("want a parameter of a namespace (net.*, kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.*), or its beginning and *".to_owned())
        }
    }
}

/// sysctl takes both ways of writing it.
fn dotted(name: &str) -> String {
    name.replace('/', ".")
}

/// Why a pod cannot be on a node that allows these, in the kubelet's words: it sets a parameter that is neither safe nor allowed.
#[must_use]
pub fn refusal(pod: &Pod, allowed: &[Pattern]) -> Option<Refused> {
    let context = pod.spec.as_ref()?.security_context.as_ref()?;
    let forbidden = context
        .sysctls
        .iter()
        .map(|sysctl| dotted(&sysctl.name))
        .find(|name| !SAFE.contains(&name.as_str()) && !allowed.iter().any(|pattern| pattern.fits(name)))?;
    Some(Refused {
        reason: "SysctlForbidden",
        message: format!(
            "forbidden sysctl: {forbidden:?} not allowlisted: the node's --allowed-unsafe-sysctls does not have it"
        ),
    })
}

#[cfg(test)]
mod tests {
    use minipod_proto::v1::{PodSecurityContext, PodSpec, Sysctl};

    use super::*;

    #[test]
    fn only_safe_ones_and_those_that_the_node_allows() {
        let allowed: Vec<Pattern> =
            ["net.core.somaxconn", "kernel.msg*"].iter().map(|text| text.parse().expect("a pattern")).collect();
        for (name, good) in [
            ("net.ipv4.tcp_syncookies", true),
            ("net/ipv4/tcp_syncookies", true),
            ("net.core.somaxconn", true),
            ("net.core.somaxconn2", false),
            ("kernel.msgmax", true),
            ("kernel.shm_rmid_forced", true),
            ("kernel.shmmax", false),
            ("net.ipv4.ip_forward", false),
        ] {
            let sysctls = vec![Sysctl { name: name.into(), value: "1".into() }];
            let security_context = Some(PodSecurityContext { sysctls, ..PodSecurityContext::default() });
            let pod = Pod { spec: Some(PodSpec { security_context, ..PodSpec::default() }), ..Pod::default() };
            let refused = refusal(&pod, &allowed);
            assert_eq!(refused.is_none(), good, "{name}: {refused:?}");
        }
        assert_eq!(refusal(&Pod::default(), &[]), None);
    }

    #[test]
    fn patterns_are_of_namespaces() {
        for good in ["net.*", "net.core.somaxconn", "kernel.sem", "fs/mqueue/*"] {
            assert!(good.parse::<Pattern>().is_ok(), "{good}");
        }
        for bad in ["*", "", "kernel.*", "vm.swappiness", "net.*.x", "net.A"] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
    }
}
