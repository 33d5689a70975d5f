//! The network between the nodes: a bridge in a namespace of its own, and for every node a namespace and a veth pair. This machine is
//! joined to the bridge like a node.
//!
//! The bridge is not in this machine's own namespace because packet rules there may concern it: with br_netfilter, which Docker
//! loads, what crosses a bridge passes the chain FORWARD, and Docker's drops what is not its own.

use std::process::Command;

use super::NodeOptions;
use super::error::LocalError;
use super::process;
use super::slot::Slot;

/// The bridge, in the switch's namespace.
const BRIDGE: &str = "switch";
/// This machine's end there.
const HOST: &str = "host";

/// Makes all of it. The API server will listen on the gateway's address.
pub(super) fn create(slot: &Slot, nodes: &[NodeOptions]) -> Result<(), LocalError> {
    let (switch, host) = (slot.switch_netns(), slot.host_link());
    ip(&["netns", "add", &switch])?;
    ip(&["-n", &switch, "link", "add", BRIDGE, "type", "bridge"])?;
    ip(&["-n", &switch, "link", "set", BRIDGE, "up"])?;
    ip(&["link", "add", &host, "type", "veth", "peer", "name", HOST, "netns", &switch])?;
    ip(&["-n", &switch, "link", "set", HOST, "master", BRIDGE, "up"])?;
    ip(&["address", "add", &format!("{}/24", slot.gateway()), "dev", &host])?;
    ip(&["link", "set", &host, "up"])?;
    for index in 0..nodes.len() {
        let (netns, outer) = (slot.netns(index), format!("node{index}"));
        ip(&["netns", "add", &netns])?;
        ip(&["-n", &switch, "link", "add", &outer, "type", "veth", "peer", "name", "eth0", "netns", &netns])?;
        ip(&["-n", &switch, "link", "set", &outer, "master", BRIDGE, "up"])?;
        let address = format!("{}/24", slot.node_ip(index));
        ip(&["-n", &netns, "address", "add", &address, "dev", "eth0"])?;
        ip(&["-n", &netns, "link", "set", "lo", "up"])?;
        ip(&["-n", &netns, "link", "set", "eth0", "up"])?;
        ip(&["-n", &netns, "route", "add", "default", "via", &slot.gateway().to_string()])?;
    }
    Ok(())
}

/// Removes what is there of it.
pub(super) fn remove(slot: &Slot) -> Vec<String> {
    let mut remains = Vec::new();
    // Explicitly, and first: a namespace gives its veths free some time after its end, and the next cluster with this number
    // may want the names before that. Numbered ones were a bridge's ports, in clusters of earlier releases.
    let (host, port) = (slot.host_link(), format!("{}h", slot.host_link()));
    for entry in std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if (name == host || is_numbered(&name, &port))
            && let Err(error) = ip(&["link", "delete", &name])
            && entry.path().exists()
        {
            remains.push(error.to_string());
        }
    }
    let (switch, prefix) = (slot.switch_netns(), slot.netns_prefix());
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if (name == switch || is_numbered(&name, &prefix))
            && let Err(error) = ip(&["netns", "delete", &name])
        {
            remains.push(error.to_string());
        }
    }
    remains
}

/// `prefix` and a number: mp1n0 is of cluster 1, mp12n0 is not.
pub(super) fn is_numbered(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

fn ip(arguments: &[&str]) -> Result<(), LocalError> {
    let program = process::find("ip").ok_or(LocalError::Missing("ip", "iproute2"))?;
    process::run(Command::new(program).args(arguments), &format!("ip {}", arguments.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::is_numbered;

    #[test]
    fn names_of_other_clusters_are_not_ours() {
        for (name, ours) in [("mp1n0", true), ("mp1n12", true), ("mp12n0", false), ("mp1n", false), ("mp1nx", false)] {
            assert_eq!(is_numbered(name, "mp1n"), ours, "{name}");
        }
    }
}
