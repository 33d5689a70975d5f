//! The network between the nodes: a bridge on this machine, and for every node a namespace and a veth pair.

use std::process::{Command, Stdio};

use super::NodeOptions;
use super::error::LocalError;
use super::process;
use super::slot::Slot;

/// Makes all of it. The API server will listen on the bridge's address.
pub(super) fn create(slot: &Slot, nodes: &[NodeOptions]) -> Result<(), LocalError> {
    let bridge = slot.bridge();
    ip(&["link", "add", &bridge, "type", "bridge"])?;
    ip(&["address", "add", &format!("{}/24", slot.gateway()), "dev", &bridge])?;
    ip(&["link", "set", &bridge, "up"])?;
    for index in 0..nodes.len() {
        let (netns, outer) = (slot.netns(index), format!("{bridge}h{index}"));
        ip(&["netns", "add", &netns])?;
        ip(&["link", "add", &outer, "type", "veth", "peer", "name", "eth0", "netns", &netns])?;
        ip(&["link", "set", &outer, "master", &bridge, "up"])?;
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
    // may want the names before that.
    let outer = format!("{}h", slot.bridge());
    for entry in std::fs::read_dir("/sys/class/net").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_numbered(&name, &outer)
            && let Err(error) = ip(&["link", "delete", &name])
            && entry.path().exists()
        {
            remains.push(error.to_string());
        }
    }
    let prefix = slot.netns_prefix();
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if is_numbered(&name, &prefix)
            && let Err(error) = ip(&["netns", "delete", &name])
        {
            remains.push(error.to_string());
        }
    }
    let bridge = slot.bridge();
    if std::path::Path::new("/sys/class/net").join(&bridge).exists()
        && let Err(error) = ip(&["link", "delete", &bridge])
    {
        remains.push(error.to_string());
    }
    remains
}

/// `prefix` and a number: mp1n0 is of cluster 1, mp12n0 is not.
pub(super) fn is_numbered(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

fn ip(arguments: &[&str]) -> Result<(), LocalError> {
    let program = process::find("ip").ok_or(LocalError::Missing("ip", "iproute2"))?;
    let failed = |message: String| LocalError::Command { command: format!("ip {}", arguments.join(" ")), message };
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
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
