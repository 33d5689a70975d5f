//! Forwarding and masquerade: what lets pods talk to the world beyond their node. Best effort: a node without nft, or
//! without the right to turn forwarding on, still has pods that reach each other, and says so in its log.

use std::fs;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

use super::NetConfig;

const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
/// The search path of a bare init may leave these out.
const PLACES: [&str; 3] = ["/usr/sbin/nft", "/sbin/nft", "/usr/bin/nft"];

/// Turns on forwarding and masquerade for the bridge's range.
pub(super) fn enable(config: &NetConfig) {
    if let Err(error) = forward() {
        tracing::warn!(%error, "no IPv4 forwarding: pods reach only pods of this node");
    }
    if let Err(error) = nft(&rules(config)) {
        tracing::warn!(%error, "no masquerade: other hosts must know the way to the pod network");
    }
}

/// Removes our table.
pub(super) fn disable(bridge: &str) {
    let table = table(bridge);
    if let Err(error) = nft(&format!("table ip {table}\ndelete table ip {table}\n")) {
        tracing::debug!(%error, "firewall table not removed");
    }
}

/// Everything of ours is one table, replaced as a whole in one transaction.
fn rules(config: &NetConfig) -> String {
    let (bridge, pods, table) = (&config.bridge, config.pod_cidr, table(&config.bridge));
    let beyond = config.cluster_cidr.map_or_else(String::new, |cidr| format!("ip daddr != {cidr} "));
    format!(
        r#"table ip {table}
delete table ip {table}
table ip {table} {{
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {pods} oifname != "{bridge}" {beyond}ip daddr != 224.0.0.0/4 masquerade
    }}
}}
"#
    )
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

    #[test]
    fn keeps_addresses_within_the_cluster() {
        let mut config = NetConfig {
            bridge: "mp-0.a".to_owned(),
            pod_cidr: "10.244.1.0/24".parse().expect("a range"),
            cluster_cidr: None,
            data_dir: "/nowhere".into(),
            mtu: None,
        };
        let alone = rules(&config);
        assert!(alone.starts_with("table ip minipod_mp_0_a\ndelete table ip minipod_mp_0_a\n"), "{alone}");
        assert!(alone.contains("ip saddr 10.244.1.0/24 oifname != \"mp-0.a\" ip daddr != 224.0.0.0/4 masquerade"));
        config.cluster_cidr = Some("10.244.0.0/16".parse().expect("a range"));
        assert!(rules(&config).contains("oifname != \"mp-0.a\" ip daddr != 10.244.0.0/16 ip daddr != 224"));
    }
}
