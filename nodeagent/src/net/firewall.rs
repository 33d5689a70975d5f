//! Forwarding and masquerade: what lets pods talk to the world beyond their node. Best effort: a node without nft, or
//! without the right to turn forwarding on, still has pods that reach each other, and says so in its log. Ports of the node
//! that lead to pods are no best effort: a pod that asks for one does not start without.

use std::fs;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use super::NetConfig;
use super::ports::Forward;

const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
/// The search path of a bare init may leave these out.
const PLACES: [&str; 3] = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft"];

/// Turns on forwarding and masquerade for the bridge's range.
pub(super) fn enable(config: &NetConfig, forwards: &[Forward]) {
    if let Err(error) = forward() {
        tracing::warn!(%error, "no IPv4 forwarding: pods reach only pods of this node");
    }
    if let Err(error) = apply(config, forwards) {
        tracing::warn!(%error, "no masquerade: other hosts must know the way to the pod network");
    }
}

/// Makes the ports that are forwarded exactly these.
///
/// # Errors
/// What nft says; nothing is changed then.
pub(super) fn apply(config: &NetConfig, forwards: &[Forward]) -> io::Result<()> {
    if !forwards.is_empty() {
        // For connections from the node itself to 127.0.0.1; others cannot come in by it, see `rules`.
        let file = format!("/proc/sys/net/ipv4/conf/{}/route_localnet", config.bridge);
        if let Err(error) = fs::write(&file, "1") {
            tracing::warn!(file, %error, "hostPorts do not answer on 127.0.0.1");
        }
    }
    nft(&rules(config, forwards))
}

/// Removes our table.
pub(super) fn disable(bridge: &str) {
    let table = table(bridge);
    if let Err(error) = nft(&format!("table ip {table}\ndelete table ip {table}\n")) {
        tracing::debug!(%error, "firewall table not removed");
    }
}

/// Everything of ours is one table, replaced as a whole in one transaction.
///
/// A packet for an address of the node goes through `ports`, whoever sent it. What comes back to where it came from must pass
/// the node again: connections of the node's own 127.0.0.1, and of a pod to its own node's port, get the bridge's address.
fn rules(config: &NetConfig, forwards: &[Forward]) -> String {
    let (bridge, pods, table) = (&config.bridge, config.pod_cidr, table(&config.bridge));
    let beyond = config.cluster_cidr.map_or_else(String::new, |cidr| format!("ip daddr != {cidr} "));
    let ports: String = forwards.iter().map(rule).collect();
    let forwarding = if forwards.is_empty() {
        String::new()
    } else {
        format!(
            r#"    chain ports {{
{ports}    }}
    chain prerouting {{
        type nat hook prerouting priority dstnat; policy accept;
        fib daddr type local jump ports
    }}
    chain output {{
        type nat hook output priority -100; policy accept;
        fib daddr type local jump ports
    }}
    chain guard {{
        type filter hook prerouting priority raw; policy accept;
        iifname "{bridge}" ip daddr 127.0.0.0/8 drop
    }}
"#
        )
    };
    let back = if forwards.is_empty() {
        String::new()
    } else {
        format!(
            r#"        ip saddr 127.0.0.0/8 oifname "{bridge}" masquerade
        ip saddr {pods} oifname "{bridge}" ct status dnat masquerade
"#
        )
    };
    format!(
        r#"table ip {table}
delete table ip {table}
table ip {table} {{
{forwarding}    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
{back}        ip saddr {pods} oifname != "{bridge}" {beyond}ip daddr != 224.0.0.0/4 masquerade
    }}
}}
"#
    )
}

fn rule(forward: &Forward) -> String {
    let Forward { wish, pod_ip } = forward;
    let address = wish.host_ip.map_or_else(String::new, |ip| format!("ip daddr {ip} "));
    let protocol = wish.protocol.name();
    format!("        {address}{protocol} dport {} dnat to {pod_ip}:{}\n", wish.host_port, wish.port)
}

/// A table name may hold less than a link's.
fn table(bridge: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
    format!("minipod_{}", bridge.chars().map(plain).collect::<String>())
}

fn forward() -> io::Result<()> {
    if fs::read_to_string(FORWARD)?.trim() == "1" {
        return Ok(());
    }
    fs::write(FORWARD, "1")
}

fn nft(rules: &str) -> io::Result<()> {
    let program = PLACES.into_iter().find(|place| fs::metadata(place).is_ok()).unwrap_or("nft");
    let mut child = Command::new(program)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| io::Error::new(e.kind(), format!("run {program}: {e}")))?;
    if let Some(mut stdin) = child.stdin.take() {
        // When nft ends early its complaint says more than our broken pipe.
        let _ = stdin.write_all(rules.as_bytes());
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{program}: {}", complaint.lines().next().unwrap_or("failed without a word"))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::ports::Protocol;
    use crate::net::ports::tests::forward;

    #[test]
    fn keeps_addresses_within_the_cluster() {
        let mut config = NetConfig {
            bridge: "mp-0.a".to_owned(),
            pod_cidr: "10.244.1.0/24".parse().expect("a range"),
            cluster_cidr: None,
            data_dir: "/nowhere".into(),
            mtu: None,
        };
        let alone = rules(&config, &[]);
        assert!(alone.starts_with("table ip minipod_mp_0_a\ndelete table ip minipod_mp_0_a\n"), "{alone}");
        assert!(alone.contains("ip saddr 10.244.1.0/24 oifname != \"mp-0.a\" ip daddr != 224.0.0.0/4 masquerade"));
        config.cluster_cidr = Some("10.244.0.0/16".parse().expect("a range"));
        assert!(rules(&config, &[]).contains("oifname != \"mp-0.a\" ip daddr != 10.244.0.0/16 ip daddr != 224"));
    }
    #[test]
    fn ports_of_the_node_lead_to_pods() {
        let config = NetConfig {
            bridge: "mp0".to_owned(),
            pod_cidr: "10.244.1.0/24".parse().expect("a range"),
            cluster_cidr: None,
            data_dir: "/nowhere".into(),
            mtu: None,
        };
        assert!(!rules(&config, &[]).contains("dnat"));
        let forwards = [
            forward(Protocol::Tcp, None, 8080, "10.244.1.2", 80),
            forward(Protocol::Udp, Some("192.0.2.1"), 53, "10.244.1.3", 5353),
        ];
        let text = rules(&config, &forwards);
        for line in [
            "        tcp dport 8080 dnat to 10.244.1.2:80\n",
            "        ip daddr 192.0.2.1 udp dport 53 dnat to 10.244.1.3:5353\n",
            "iifname \"mp0\" ip daddr 127.0.0.0/8 drop",
            "ip saddr 127.0.0.0/8 oifname \"mp0\" masquerade",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
    }
}
