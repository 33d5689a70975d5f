//! The contents of a pod's /etc/hosts, hostname and /etc/resolv.conf. Pure.

use std::net::IpAddr;

/// What decides a pod's host name.
#[derive(Debug, Clone, Default)]
pub struct HostnameInput<'a> {
    /// metadata.name.
    pub pod_name: &'a str,
    /// metadata.namespace.
    pub namespace: &'a str,
    /// spec.hostname, may be empty.
    pub hostname: &'a str,
    /// spec.subdomain, may be empty.
    pub subdomain: &'a str,
    /// spec.setHostnameAsFQDN.
    pub set_hostname_as_fqdn: bool,
    /// Such as `cluster.local`.
    pub cluster_domain: &'a str,
}

/// A pod's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hostnames {
    /// The short name, at most 63 bytes.
    pub hostname: String,
    /// `subdomain.namespace.svc.domain`, empty without subdomain.
    pub domain: String,
    /// What `uname -n` and /etc/hostname say.
    pub uts: String,
}

/// The pod's names.
///
/// # Errors
/// A message for the pod's status when the full name is longer than the kernel's 64 bytes.
pub fn hostnames(input: &HostnameInput<'_>) -> Result<Hostnames, String> {
    let _ = input;
    unimplemented!()
}

/// spec.hostAliases.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostAlias {
    /// The address.
    pub ip: String,
    /// Its names.
    pub hostnames: Vec<String>,
}

/// /etc/hosts of a pod with its own network.
#[must_use]
pub fn etc_hosts(ip: IpAddr, names: &Hostnames, aliases: &[HostAlias]) -> String {
    let _ = (ip, names, aliases);
    unimplemented!()
}

/// /etc/hosts of a pod in the node's network: the node's file and the aliases.
#[must_use]
pub fn etc_hosts_of_node(node_file: &str, aliases: &[HostAlias]) -> String {
    let _ = (node_file, aliases);
    unimplemented!()
}

/// spec.dnsPolicy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DnsPolicy {
    /// The cluster's DNS, for pods with their own network. Without a cluster DNS: the node's.
    #[default]
    ClusterFirst,
    /// The cluster's DNS for pods in the node's network too.
    ClusterFirstWithHostNet,
    /// The node's.
    Default,
    /// Only dnsConfig.
    None,
}

impl DnsPolicy {
    /// Of the manifest's text; empty is `ClusterFirst`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let _ = text;
        unimplemented!()
    }
}

/// What decides a pod's resolv.conf.
#[derive(Debug, Clone, Default)]
pub struct DnsInput<'a> {
    /// spec.dnsPolicy.
    pub policy: DnsPolicy,
    /// Whether the pod is in the node's network.
    pub host_network: bool,
    /// The node's /etc/resolv.conf.
    pub node_file: &'a str,
    /// Cluster DNS servers; empty while there are none.
    pub cluster_dns: &'a [IpAddr],
    /// Such as `cluster.local`.
    pub cluster_domain: &'a str,
    /// metadata.namespace.
    pub namespace: &'a str,
    /// spec.dnsConfig.nameservers.
    pub nameservers: &'a [String],
    /// spec.dnsConfig.searches.
    pub searches: &'a [String],
    /// spec.dnsConfig.options: name and value.
    pub options: &'a [(String, Option<String>)],
}

/// A resolv.conf and what had to be left out of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResolvConf {
    /// The file's content.
    pub text: String,
    /// For the pod's events.
    pub warnings: Vec<String>,
}

/// /etc/resolv.conf of a pod.
#[must_use]
pub fn resolv_conf(input: &DnsInput<'_>) -> ResolvConf {
    let _ = input;
    unimplemented!()
}
