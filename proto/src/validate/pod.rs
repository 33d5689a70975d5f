//! A pod's spec as a whole.

use super::{
    container, resources, scheduling, security, volume,
    walk::{Walk, ip},
};
use crate::{
    names::{dns_label, dns_subdomain, qualified_name},
    v1::{Pod, PodDnsConfig, PodSpec},
};

/// Limits of the resolver (resolv.conf(5), KEP-2595).
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_BYTES: usize = 2048;

pub(super) fn pod(walk: &mut Walk, pod: &Pod) {
    let Some(spec) = &pod.spec else { return walk.missing("spec", "want a spec with at least one container") };
    walk.within("spec", |walk| {
        volume::all(walk, spec);
        container::all(walk, spec);
        walk.word("restartPolicy", &spec.restart_policy, &["Always", "OnFailure", "Never"]);
        if let Some(seconds) = spec.active_deadline_seconds {
            walk.between("activeDeadlineSeconds", seconds, 1, i32::MAX.into());
        }
        names(walk, spec);
        dns(walk, spec);
        scheduling::pod(walk, spec);
        security::pod(walk, spec);
        resources::pod(walk, spec);
        walk.each("readinessGates", &spec.readiness_gates, |walk, gate| {
            walk.form("conditionType", &gate.condition_type, qualified_name);
        });
        if let Some(os) = &spec.os {
            walk.must_be("os.name", &os.name, &["linux"]);
        }
    });
}

/// What only holds when a pod is new.
pub(super) fn create(walk: &mut Walk, pod: &Pod) {
    let spec = pod.spec();
    if !spec.node_name.is_empty() {
        let wanted =
            "want none in a new pod, a scheduler binds it: choose a node by nodeSelector kubernetes.io/hostname";
        walk.bad("spec.nodeName", &spec.node_name, wanted);
    }
    if !spec.ephemeral_containers.is_empty() {
        walk.wrong("spec.ephemeralContainers", "want none in a new pod, they are added to a running one");
    }
    security::apparmor_annotations(walk, pod);
}

fn names(walk: &mut Walk, spec: &PodSpec) {
    walk.form_if_set("nodeName", &spec.node_name, dns_subdomain);
    walk.form_if_set("hostname", &spec.hostname, dns_label);
    walk.form_if_set("subdomain", &spec.subdomain, dns_label);
    walk.form_if_set("serviceAccountName", &spec.service_account_name, dns_subdomain);
    walk.form_if_set("schedulerName", &spec.scheduler_name, dns_subdomain);
    walk.form_if_set("runtimeClassName", &spec.runtime_class_name, dns_subdomain);
    walk.each("imagePullSecrets", &spec.image_pull_secrets, |walk, one| walk.form("name", &one.name, dns_subdomain));
    walk.each("hostAliases", &spec.host_aliases, |walk, alias| {
        walk.form("ip", &alias.ip, ip);
        walk.each("hostnames", &alias.hostnames, |walk, name| walk.form("", name, dns_subdomain));
    });
}

fn dns(walk: &mut Walk, spec: &PodSpec) {
    let policies = ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"];
    walk.word("dnsPolicy", &spec.dns_policy, &policies);
    if spec.dns_policy == "None" && spec.dns_config.as_ref().is_none_or(|dns| dns.nameservers.is_empty()) {
        walk.missing("dnsConfig.nameservers", "dnsPolicy None wants at least one");
    }
    if let Some(config) = &spec.dns_config {
        walk.within("dnsConfig", |walk| dns_config(walk, config));
    }
}

fn dns_config(walk: &mut Walk, config: &PodDnsConfig) {
    if config.nameservers.len() > MAX_NAMESERVERS {
        walk.wrong("nameservers", format!("has {}, want at most {MAX_NAMESERVERS}", config.nameservers.len()));
    }
    walk.each("nameservers", &config.nameservers, |walk, server| walk.form("", server, ip));
    let bytes: usize = config.searches.iter().map(|search| search.len() + 1).sum();
    if config.searches.len() > MAX_SEARCHES || bytes > MAX_SEARCH_BYTES + 1 {
        walk.wrong("searches", format!("want at most {MAX_SEARCHES} with {MAX_SEARCH_BYTES} bytes together"));
    }
    walk.each("searches", &config.searches, |walk, search| {
        // A dot at the end says that the name is complete; underscores stand in service records.
        let name = search.strip_suffix('.').unwrap_or(search).replace('_', "-");
        if search != "." && dns_subdomain(name.trim_matches('-')).is_err() {
            walk.bad("", search, "want a DNS domain such as svc.example.com");
        }
    });
    walk.each("options", &config.options, |walk, option| {
        let word = |text: &str| !text.contains(char::is_whitespace);
        if option.name.is_empty() || !word(&option.name) || !option.value.as_deref().is_none_or(word) {
            walk.bad(
                "name",
                &option.name,
                "want an option of resolv.conf such as ndots, name and value without white space",
            );
        }
    });
}
