//! Which cluster this is: a number that is free on this machine, and the names and addresses that follow from it.

use std::fs::{self, File};
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use super::error::LocalError;
use super::process::Daemon;
use super::remove;

/// Clusters on one machine at a time; the number is part of addresses (172.29.N.0/24, 10.(100+N).0.0/16).
const SLOTS: u8 = 100;
/// User ids of this machine for pods with users of their own: those that an agent takes if nobody says otherwise. All clusters share them.
const POD_USER_IDS: (u32, u32) = (0x7000_0000, 0x7ffd_ffff);
/// How many of them a pod has.
const IDS_PER_POD: u32 = 65_536;
/// Locks, PIDs and sockets; the path is short because it holds sockets (unix(7): 108 bytes).
const RUN: &str = "/run/mp";
/// Logs, the store and the nodes' images and volumes.
const DATA: &str = "/var/lib/minipod-local";

/// A cluster's place on this machine. The lock on it ends with this value or the process.
#[derive(Debug)]
pub struct Slot {
    number: u8,
    /// Held for as long as the cluster belongs to this process.
    _lock: File,
}

impl Slot {
    /// Takes the first free number. What a crashed owner left of it is removed first.
    ///
    /// # Errors
    /// When none is free, this is not root, or the directories cannot be made.
    pub fn claim() -> Result<Slot, LocalError> {
        if !is_root() {
            return Err(LocalError::NotRoot);
        }
        for number in 0..SLOTS {
            let Some(slot) = Slot::lock(number)? else { continue };
            if slot.is_kept() {
                continue;
            }
            remove::remove(&slot)?;
            // The clean-up removed the directory with the lock in it: the new one must be ours before anybody looks.
            let Some(slot) = Slot::lock(number)? else { continue };
            make_dir(&slot.data())?;
            return Ok(slot);
        }
        Err(LocalError::Full(SLOTS))
    }

    /// The slot, unless another process holds it.
    pub(super) fn lock(number: u8) -> Result<Option<Slot>, LocalError> {
        let dir = Path::new(RUN).join(number.to_string());
        make_dir(&dir)?;
        let path = dir.join("lock");
        let open = File::options().create(true).truncate(false).write(true).open(&path);
        let file = open.map_err(|source| LocalError::Io { operation: "open", path: path.clone(), source })?;
        if file.try_lock().is_err() {
            return Ok(None);
        }
        // Between our open and our lock a former owner may have removed the file: then another may lock the new one.
        let same = fs::metadata(&path).is_ok_and(|now| file.metadata().is_ok_and(|mine| same_file(&now, &mine)));
        Ok(same.then_some(Slot { number, _lock: file }))
    }

    /// All numbers that have a directory.
    pub(super) fn used() -> Vec<u8> {
        let entries = fs::read_dir(RUN).into_iter().flatten().flatten();
        let mut numbers: Vec<u8> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        numbers.sort_unstable();
        numbers
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Where it keeps locks, PIDs and sockets.
    #[must_use]
    pub fn run(&self) -> PathBuf {
        Path::new(RUN).join(self.number.to_string())
    }

    /// Where it keeps everything else.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        Path::new(DATA).join(self.number.to_string())
    }

    /// The agent's `--run-dir`.
    #[must_use]
    pub fn node_run_dir(&self, index: usize) -> PathBuf {
        self.run().join(format!("n{index}"))
    }

    /// The agent's `--data-dir`.
    #[must_use]
    pub fn node_data_dir(&self, index: usize) -> PathBuf {
        self.data().join(format!("n{index}"))
    }

    /// What the cgroups of all nodes of this cluster begin with.
    #[must_use]
    pub fn cgroup_prefix(&self) -> String {
        format!("mp{}n", self.number)
    }

    /// The agent's `--cgroup-root`.
    #[must_use]
    pub fn node_cgroup(&self, index: usize) -> String {
        format!("{}{index}", self.cgroup_prefix())
    }

    /// The agent's `--bridge`, in the node's namespace.
    #[must_use]
    pub fn node_bridge(&self, index: usize) -> String {
        format!("mp{}p{index}", self.number)
    }

    /// This machine's end of the network between the nodes.
    #[must_use]
    pub fn host_link(&self) -> String {
        format!("mp{}", self.number)
    }

    /// The network namespace with the bridge between the nodes, as `ip netns` names it.
    #[must_use]
    pub fn switch_netns(&self) -> String {
        format!("mp{}s", self.number)
    }

    /// What the names of the nodes' network namespaces begin with.
    #[must_use]
    pub fn netns_prefix(&self) -> String {
        format!("mp{}n", self.number)
    }

    /// A node's network namespace, as `ip netns` names it.
    #[must_use]
    pub fn netns(&self, index: usize) -> String {
        format!("{}{index}", self.netns_prefix())
    }

    /// The file that stands for it.
    #[must_use]
    pub fn netns_path(&self, index: usize) -> PathBuf {
        Path::new("/run/netns").join(self.netns(index))
    }

    /// This machine's address among the nodes.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 29, self.number, 1)
    }

    /// A node's address.
    #[must_use]
    pub fn node_ip(&self, index: usize) -> Ipv4Addr {
        Ipv4Addr::new(172, 29, self.number, u8::try_from(10 + index).unwrap_or(u8::MAX))
    }

    /// The range of the pods' addresses.
    #[must_use]
    pub fn cluster_cidr(&self) -> String {
        format!("10.{}.0.0/16", 100 + self.number)
    }

    /// The agent's `--pod-user-ids`: agents that share a machine must not give the same ids to two pods.
    ///
    /// # Errors
    /// When there are more nodes than the cluster has ranges.
    pub fn node_pod_user_ids(&self, index: usize, nodes: usize) -> Result<String, LocalError> {
        let ids = pod_user_ids(self.number, index, nodes);
        let (first, last) = ids.ok_or(LocalError::TooManyNodes { nodes, most: ranges_per_cluster() })?;
        Ok(format!("{first}-{last}"))
    }

    fn processes_file(&self) -> PathBuf {
        self.run().join("processes")
    }

    fn kept_file(&self) -> PathBuf {
        self.run().join("kept")
    }

    /// Writes a process down, so that it can be ended without us.
    pub(super) fn note_process(&self, daemon: &Daemon) -> Result<(), LocalError> {
        let path = self.processes_file();
        let note = |file: &mut File| writeln!(file, "{} {}", daemon.pid(), daemon.start_ticks());
        let written = File::options().create(true).append(true).open(&path).and_then(|mut file| note(&mut file));
        written.map_err(|source| LocalError::Io { operation: "write", path, source })
    }

    /// PIDs and start times that were written down.
    pub(super) fn noted_processes(&self) -> Vec<(u32, u64)> {
        let text = fs::read_to_string(self.processes_file()).unwrap_or_default();
        let pair = |line: &str| {
            let (pid, start) = line.split_once(' ')?;
            Some((pid.parse().ok()?, start.parse().ok()?))
        };
        text.lines().filter_map(pair).collect()
    }

    pub(super) fn keep(&self, server: &str) -> Result<(), LocalError> {
        let path = self.kept_file();
        fs::write(&path, server).map_err(|source| LocalError::Io { operation: "write", path, source })
    }

    fn is_kept(&self) -> bool {
        self.kept_file().exists()
    }
}

/// The clusters that were kept: number and server.
#[must_use]
pub fn kept() -> Vec<(u8, String)> {
    let server = |number: u8| {
        let file = Path::new(RUN).join(number.to_string()).join("kept");
        Some((number, fs::read_to_string(file).ok()?))
    };
    Slot::used().into_iter().filter_map(server).collect()
}

/// How many pods with users of their own a cluster has ids for, and so how many nodes it may have.
fn ranges_per_cluster() -> u32 {
    let (first, last) = POD_USER_IDS;
    (last - first + 1) / IDS_PER_POD / u32::from(SLOTS)
}

/// First and last id of a node's part of its cluster's part; `None` where nothing is left for it.
fn pod_user_ids(cluster: u8, index: usize, nodes: usize) -> Option<(u32, u32)> {
    let (index, nodes) = (u32::try_from(index).ok()?, u32::try_from(nodes).ok()?);
    let ranges = ranges_per_cluster().checked_div(nodes).filter(|ranges| *ranges > 0 && index < nodes)?;
    let number = u32::from(cluster) * ranges_per_cluster() + index * ranges;
    let first = POD_USER_IDS.0 + number * IDS_PER_POD;
    Some((first, first + (ranges * IDS_PER_POD - 1)))
}

fn same_file(a: &fs::Metadata, b: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

fn make_dir(dir: &Path) -> Result<(), LocalError> {
    fs::create_dir_all(dir).map_err(|source| LocalError::Io { operation: "make", path: dir.to_owned(), source })
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_nodes_of_a_machine_have_a_user_id_in_common() {
        let (mut next, mut all) = (POD_USER_IDS.0, 0);
        for cluster in 0..SLOTS {
            // Whatever number of nodes each cluster has.
            let nodes = 1 + usize::from(cluster) % 40;
            for index in 0..nodes {
                let (first, last) = pod_user_ids(cluster, index, nodes).expect("enough for each");
                let what = format!("node {index} of {nodes} of cluster {cluster}: {first}-{last}");
                assert!(next <= first && first < last && last <= POD_USER_IDS.1, "{what}, {next} is free");
                assert_eq!(
                    ((first - POD_USER_IDS.0) % IDS_PER_POD, (last - first + 1) % IDS_PER_POD),
                    (0, 0),
                    "{what}"
                );
                (next, all) = (last + 1, all + 1);
            }
        }
        assert!(all > 100, "{all}");
        assert_eq!(pod_user_ids(0, 0, 40), Some((0x7000_0000, 0x7000_ffff)));
        assert_eq!(pod_user_ids(1, 1, 2), Some((0x703c_0000, 0x704f_ffff)));
        for (index, nodes) in [(0, 41), (3, 3), (0, 0)] {
            assert_eq!(pod_user_ids(0, index, nodes), None, "node {index} of {nodes}");
        }
    }
}
