//! The contents of a pod's /etc/hosts, hostname and /etc/resolv.conf. Pure.

use std::fmt::Write as _;
use std::net::IpAddr;

/// Of a host name without dots (RFC 1123).
const MAX_LABEL_BYTES: usize = 63;
/// Of the UTS namespace (uname(2): 65 with the final NUL).
const MAX_UTS_BYTES: usize = 64;
/// What the C libraries read (resolv.conf(5)), and what Kubernetes allows.
const MAX_NAMESERVERS: usize = 3;
const MAX_SEARCHES: usize = 32;
const MAX_SEARCH_BYTES: usize = 2048;
/// The names of this machine and the fixed names of IPv6.
const LOCAL_HOSTS: &str = "127.0.0.1\tlocalhost\n\
    ::1\tlocalhost ip6-localhost ip6-loopback\n\
    fe00::0\tip6-localnet\n\
    ff02::1\tip6-allnodes\n\
    ff02::2\tip6-allrouters\n";

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
    let hostname = match input.hostname {
        // A pod's name may be longer than a host's, and may have dots; what is cut must not end in a separator.
        "" => cut(input.pod_name, MAX_LABEL_BYTES).trim_end_matches(['-', '.']).to_owned(),
        stated => stated.to_owned(),
    };
    let domain = match input.subdomain {
        "" => String::new(),
        subdomain => format!("{subdomain}.{}.svc.{}", input.namespace, input.cluster_domain),
    };
    let uts = match (input.set_hostname_as_fqdn, domain.as_str()) {
        (true, domain) if !domain.is_empty() => format!("{hostname}.{domain}"),
        _ => hostname.clone(),
    };
    if uts.len() > MAX_UTS_BYTES {
        return Err(format!(
            "host name {uts:?} has {} bytes, and the kernel takes {MAX_UTS_BYTES}: shorten spec.hostname or spec.subdomain, \
             or leave spec.setHostnameAsFQDN",
            uts.len()
        ));
    }
    Ok(Hostnames { hostname, domain, uts })
}

/// The first bytes of a text, at most `bytes`, whole characters.
fn cut(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
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
    let mut text = String::from(LOCAL_HOSTS);
    if names.domain.is_empty() {
        let _ = writeln!(text, "{ip}\t{}", names.hostname);
    } else {
        let _ = writeln!(text, "{ip}\t{0}.{1}\t{0}", names.hostname, names.domain);
    }
    add_aliases(&mut text, aliases);
    text
}

/// /etc/hosts of a pod in the node's network: the node's file and the aliases.
#[must_use]
pub fn etc_hosts_of_node(node_file: &str, aliases: &[HostAlias]) -> String {
    let mut text = node_file.to_owned();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    add_aliases(&mut text, aliases);
    text
}

fn add_aliases(text: &mut String, aliases: &[HostAlias]) {
    if aliases.is_empty() {
        return;
    }
    text.push_str("# spec.hostAliases\n");
    for alias in aliases {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}\t{}", alias.ip, alias.hostnames.join("\t"));
    }
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
        match text {
            "" | "ClusterFirst" => Some(Self::ClusterFirst),
            "ClusterFirstWithHostNet" => Some(Self::ClusterFirstWithHostNet),
            "Default" => Some(Self::Default),
            "None" => Some(Self::None),
            _ => None,
        }
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
    let node = Parsed::of(input.node_file);
    let cluster = match input.policy {
        DnsPolicy::ClusterFirst => !input.host_network,
        DnsPolicy::ClusterFirstWithHostNet => true,
        DnsPolicy::Default | DnsPolicy::None => false,
    };
    let mut out = match input.policy {
        DnsPolicy::None => Parsed::default(),
        _ if cluster && !input.cluster_dns.is_empty() => {
            let (domain, namespace) = (input.cluster_domain, input.namespace);
            let mut searches = vec![format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.to_owned()];
            searches.extend(node.searches);
            let nameservers = input.cluster_dns.iter().map(ToString::to_string).collect();
            Parsed { nameservers, searches, options: vec![("ndots".to_owned(), Some("5".to_owned()))] }
        }
        _ => node,
    };
    out.nameservers.extend(input.nameservers.iter().cloned());
    out.searches.extend(input.searches.iter().cloned());
    for (name, value) in input.options {
        out.options.retain(|(other, _)| other != name);
        out.options.push((name.clone(), value.clone()));
    }
    out.render()
}

/// The three kinds of lines that we know.
#[derive(Debug, Default)]
struct Parsed {
    nameservers: Vec<String>,
    searches: Vec<String>,
    options: Vec<(String, Option<String>)>,
}

impl Parsed {
    fn of(file: &str) -> Self {
        let mut out = Self::default();
        for line in file.lines() {
            let mut words = line.split(['#', ';']).next().unwrap_or_default().split_whitespace().map(str::to_owned);
            match words.next().as_deref() {
                Some("nameserver") => out.nameservers.extend(words.next()),
                // The last such line counts.
                Some("search" | "domain") => out.searches = words.collect(),
                Some("options") => out.options.extend(words.map(|word| match word.split_once(':') {
                    Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                    None => (word, None),
                })),
                _ => {}
            }
        }
        out
    }

    /// The file, without what resolvers would not read.
    fn render(mut self) -> ResolvConf {
        let mut out = ResolvConf::default();
        dedup(&mut self.nameservers);
        dedup(&mut self.searches);
        if self.nameservers.len() > MAX_NAMESERVERS {
            let left = self.nameservers.split_off(MAX_NAMESERVERS).join(" ");
            out.warnings.push(format!("resolvers read {MAX_NAMESERVERS} nameservers: {left} left out"));
        }
        let mut length = 0;
        let kept = self.searches.iter().take(MAX_SEARCHES).take_while(|search| {
            // One more for the space before each but the first.
            length += search.len() + 1;
            length <= MAX_SEARCH_BYTES + 1
        });
        let kept = kept.count();
        if kept < self.searches.len() {
            let left = self.searches.split_off(kept).join(" ");
            out.warnings.push(format!(
                "resolvers read {MAX_SEARCHES} search domains of {MAX_SEARCH_BYTES} bytes: {left} left out"
            ));
        }
        for server in &self.nameservers {
            let _ = writeln!(out.text, "nameserver {server}");
        }
        if !self.searches.is_empty() {
            let _ = writeln!(out.text, "search {}", self.searches.join(" "));
        }
        let option = |(name, value): &(String, Option<String>)| match value {
            Some(value) => format!("{name}:{value}"),
            None => name.clone(),
        };
        if !self.options.is_empty() {
            let _ = writeln!(out.text, "options {}", self.options.iter().map(option).collect::<Vec<_>>().join(" "));
        }
        out
    }
}

/// Keeps the first of equal entries, in order.
fn dedup(entries: &mut Vec<String>) {
    let mut seen = std::collections::HashSet::new();
    entries.retain(|entry| seen.insert(entry.clone()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pod: &str, hostname: &str, subdomain: &str, fqdn: bool) -> Result<Hostnames, String> {
        hostnames(&HostnameInput {
            pod_name: pod,
            namespace: "ns",
            hostname,
            subdomain,
            set_hostname_as_fqdn: fqdn,
            cluster_domain: "cluster.local",
        })
    }

    #[test]
    fn the_hostname_is_stated_or_the_pods_name() {
        let long = format!("{}-{}", "a".repeat(62), "b");
        for (pod, hostname, subdomain, fqdn, want) in [
            ("web", "", "", false, ("web", "", "web")),
            ("web", "front", "", false, ("front", "", "front")),
            ("web", "", "sub", false, ("web", "sub.ns.svc.cluster.local", "web")),
            ("web", "", "sub", true, ("web", "sub.ns.svc.cluster.local", "web.sub.ns.svc.cluster.local")),
            ("web", "", "", true, ("web", "", "web")),
            (&long, "", "", false, (&long[..62], "", &long[..62])),
        ] {
            let got = names(pod, hostname, subdomain, fqdn).expect(pod);
            assert_eq!((got.hostname.as_str(), got.domain.as_str(), got.uts.as_str()), want, "{pod}");
        }
        let error = names(&"a".repeat(50), "", "sub", true).expect_err("too long");
        assert!(error.contains("the kernel takes 64"), "{error}");
    }

    #[test]
    fn hosts_have_the_pod_and_its_aliases() {
        let aliases = [HostAlias { ip: "192.0.2.7".into(), hostnames: vec!["a".into(), "b".into()] }];
        let ip = "10.1.0.5".parse().expect("ip");
        let text = etc_hosts(ip, &names("web", "", "", false).expect("names"), &aliases);
        for line in ["127.0.0.1\tlocalhost", "10.1.0.5\tweb", "192.0.2.7\ta\tb"] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
        let text = etc_hosts(ip, &names("web", "", "sub", false).expect("names"), &[]);
        assert!(text.ends_with("10.1.0.5\tweb.sub.ns.svc.cluster.local\tweb\n"), "{text}");
        assert_eq!(etc_hosts_of_node("127.0.0.1 x", &[]), "127.0.0.1 x\n");
        assert!(etc_hosts_of_node("", &aliases).ends_with("192.0.2.7\ta\tb\n"));
    }

    const NODE: &str =
        "# made by hand\ndomain old\nsearch lan corp ; note\nnameserver 192.0.2.53\noptions edns0 ndots:2\n";

    fn resolv(policy: &str, host_network: bool, dns: &[IpAddr]) -> String {
        let policy = DnsPolicy::parse(policy).expect("a policy");
        let input = DnsInput {
            policy,
            host_network,
            node_file: NODE,
            cluster_dns: dns,
            cluster_domain: "cluster.local",
            namespace: "ns",
            ..DnsInput::default()
        };
        resolv_conf(&input).text
    }

    #[test]
    fn the_policy_chooses_whose_resolver() {
        let dns = ["10.0.0.10".parse().expect("ip")];
        let node = "nameserver 192.0.2.53\nsearch lan corp\noptions edns0 ndots:2\n";
        let cluster = "nameserver 10.0.0.10\nsearch ns.svc.cluster.local svc.cluster.local cluster.local lan corp\noptions ndots:5\n";
        for (policy, host_network, dns, want) in [
            ("", false, &[][..], node),
            ("ClusterFirst", false, &dns[..], cluster),
            ("ClusterFirst", true, &dns[..], node),
            ("ClusterFirstWithHostNet", true, &dns[..], cluster),
            ("Default", false, &dns[..], node),
            ("None", false, &dns[..], ""),
        ] {
            assert_eq!(resolv(policy, host_network, dns), want, "{policy}");
        }
        assert_eq!(DnsPolicy::parse("clusterfirst"), None);
    }

    #[test]
    fn the_pods_own_words_are_added_within_what_resolvers_read() {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        let input = DnsInput {
            policy: DnsPolicy::Default,
            node_file: NODE,
            nameservers: &texts(&["192.0.2.53", "1.1.1.1", "2.2.2.2", "3.3.3.3"]),
            searches: &texts(&["corp", "x.y"]),
            options: &[("ndots".into(), Some("1".into())), ("rotate".into(), None)],
            ..DnsInput::default()
        };
        let out = resolv_conf(&input);
        let want = "nameserver 192.0.2.53\nnameserver 1.1.1.1\nnameserver 2.2.2.2\nsearch lan corp x.y\noptions edns0 ndots:1 rotate\n";
        assert_eq!(out.text, want);
        assert!(out.warnings.len() == 1 && out.warnings[0].contains("3.3.3.3"), "{:?}", out.warnings);
        let many: Vec<String> = (0..40).map(|n| format!("d{n}.example")).collect();
        let out = resolv_conf(&DnsInput { policy: DnsPolicy::None, searches: &many, ..DnsInput::default() });
        assert_eq!(out.text.split_whitespace().count(), 1 + MAX_SEARCHES);
        assert!(out.warnings[0].contains("d39.example"));
        let wide: Vec<String> = (0..20).map(|n| format!("{n:0>200}")).collect();
        let out = resolv_conf(&DnsInput { policy: DnsPolicy::None, searches: &wide, ..DnsInput::default() });
        assert!(out.text.len() <= "search ".len() + MAX_SEARCH_BYTES + 1 && out.warnings.len() == 1);
    }
}
