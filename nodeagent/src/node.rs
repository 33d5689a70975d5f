//! What the agent tells about its machine.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use minipod_proto::quantity::Quantity;
use minipod_proto::v1::{
    ContainerImage, Node, NodeAddress, NodeCondition, NodeSpec, NodeStatus, NodeSystemInfo, ObjectMeta,
};

use crate::config::Config;
use crate::image::ImageRecord;
use crate::pressure::plan::Conditions;
use crate::status::time;

/// Memory that is kept from pods when `--allocatable` does not say: the system's and the agent's own.
const RESERVED_MEMORY_BYTES: u64 = 256 << 20;
/// CPU that is kept from pods, thousandths.
const RESERVED_CPU_MILLI: i64 = 100;
/// Kubernetes' default for pods on a node.
const DEFAULT_PODS: i64 = 110;
/// Disk that is kept from pods (Kubernetes' default threshold for nodefs), percent.
const RESERVED_DISK_PERCENT: u64 = 10;
/// Images that a node lists (Kubernetes' default).
const LISTED_IMAGES: usize = 50;

/// Facts of the machine that do not change while the agent runs.
#[derive(Debug, Clone, Default)]
pub struct Machine {
    /// kernel, operating system, identities.
    pub info: NodeSystemInfo,
    /// The host's name.
    pub hostname: String,
    /// What the machine has.
    pub capacity: BTreeMap<String, Quantity>,
    /// What pods may use.
    pub allocatable: BTreeMap<String, Quantity>,
}

/// What changes: measured each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pressure {
    /// Memory that could be had without swapping.
    pub memory_available_bytes: u64,
    /// Free share of the data directory's file system.
    pub disk_free_percent: u64,
    /// Free share of the ids of processes and threads, in steps of ten: what comes and goes all the time is no news.
    pub pids_free_percent: u64,
    /// The pod network works (its range is known and the bridge stands).
    pub network_ready: bool,
    /// What thresholds say.
    pub short: Conditions,
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// A value of /proc/meminfo.
fn meminfo_bytes(key: &str) -> u64 {
    read("/proc/meminfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix(key)?.strip_prefix(':')?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
        })
        .map_or(0, |kib| kib * 1024)
}

/// Memory of the machine and what of it could be had without swapping, bytes.
#[must_use]
pub fn memory() -> (u64, u64) {
    (meminfo_bytes("MemTotal"), meminfo_bytes("MemAvailable"))
}

/// Processes and threads: how many there can be (the kernel's limits on ids and on threads), and how many there are.
#[must_use]
pub fn tasks() -> Option<(u64, u64)> {
    let limits = ["/proc/sys/kernel/pid_max", "/proc/sys/kernel/threads-max"].map(|path| read(path).parse().ok());
    let most = limits.into_iter().flatten().min()?;
    // `0.20 0.18 0.12 1/80 11206`: the fourth is what runs now of what there is (proc(5)).
    let load = read("/proc/loadavg");
    let (_, all) = load.split_ascii_whitespace().nth(3)?.split_once('/')?;
    Some((most, all.parse().ok()?))
}

/// A file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Disk {
    /// All of it.
    pub bytes: u64,
    /// What may still be used.
    pub free_bytes: u64,
    /// Files that it can have; 0 where it does not count them.
    pub inodes: u64,
    /// Files that can still be made.
    pub free_inodes: u64,
}

/// The file system that holds `path`.
#[must_use]
pub fn disk(path: &Path) -> Option<Disk> {
    let stat = nix::sys::statvfs::statvfs(path).ok()?;
    Some(Disk {
        bytes: stat.blocks() * stat.fragment_size(),
        free_bytes: stat.blocks_available() * stat.fragment_size(),
        inodes: stat.files(),
        free_inodes: stat.files_available(),
    })
}

impl Machine {
    /// Looks at this machine.
    #[must_use]
    pub fn look(config: &Config) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |count| i64::try_from(count.get()).unwrap_or(1));
        let memory = meminfo_bytes("MemTotal");
        let disk = disk(&config.data_dir).unwrap_or_default().bytes;
        let capacity = BTreeMap::from([
            ("cpu".to_owned(), Quantity::from_units(cpus)),
            ("memory".to_owned(), Quantity::from_size(memory)),
            ("ephemeral-storage".to_owned(), Quantity::from_size(disk)),
            ("pods".to_owned(), Quantity::from_units(DEFAULT_PODS)),
        ]);
        let mut allocatable = capacity.clone();
        let cpu = Quantity::from_milli((cpus * 1000 - RESERVED_CPU_MILLI).max(0));
        allocatable.insert("cpu".to_owned(), cpu);
        allocatable.insert("memory".to_owned(), Quantity::from_size(memory.saturating_sub(RESERVED_MEMORY_BYTES)));
        allocatable
            .insert("ephemeral-storage".to_owned(), Quantity::from_size(disk / 100 * (100 - RESERVED_DISK_PERCENT)));
        allocatable.extend(config.stated_allocatable());
        let hostname = read("/proc/sys/kernel/hostname");
        Self { info: system_info(), hostname, capacity, allocatable }
    }

    /// Bytes of memory, for oom scores.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.capacity.get("memory").map_or(0, |quantity| u64::try_from(quantity.value_ceil()).unwrap_or(0))
    }
}

fn system_info() -> NodeSystemInfo {
    let os_image = read("/etc/os-release")
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .map_or_else(|| "Linux".to_owned(), |name| name.trim_matches('"').to_owned());
    let machine_id = read("/etc/machine-id");
    let version = concat!("minipod://", env!("CARGO_PKG_VERSION"));
    NodeSystemInfo {
        system_uuid: Some(read("/sys/class/dmi/id/product_uuid"))
            .filter(|id| !id.is_empty())
            .unwrap_or(machine_id.clone()),
        machine_id,
        boot_id: read("/proc/sys/kernel/random/boot_id"),
        kernel_version: read("/proc/sys/kernel/osrelease"),
        os_image,
        container_runtime_version: version.to_owned(),
        kubelet_version: concat!("v", env!("CARGO_PKG_VERSION")).to_owned(),
        operating_system: "linux".to_owned(),
        architecture: match std::env::consts::ARCH {
            "x86_64" => "amd64".to_owned(),
            "aarch64" => "arm64".to_owned(),
            other => other.to_owned(),
        },
        ..NodeSystemInfo::default()
    }
}

impl Pressure {
    /// Measures now.
    #[must_use]
    pub fn measure(data_dir: &Path, network_ready: bool, short: Conditions) -> Self {
        let disk = disk(data_dir).unwrap_or_default();
        Self {
            memory_available_bytes: meminfo_bytes("MemAvailable"),
            disk_free_percent: disk.free_bytes * 100 / disk.bytes.max(1),
            pids_free_percent: tasks().map_or(100, |(most, all)| most.saturating_sub(all) * 10 / most.max(1) * 10),
            network_ready,
            short,
        }
    }
}

/// The node's status; condition times are kept from `previous` where a condition stays the same.
#[must_use]
pub fn node_status(
    machine: &Machine,
    node_ip: IpAddr,
    pressure: Pressure,
    images: &[ImageRecord],
    (previous, now_wall_ms): (Option<&NodeStatus>, u64),
) -> NodeStatus {
    let text = |map: &BTreeMap<String, Quantity>| map.iter().map(|(name, q)| (name.clone(), q.to_string())).collect();
    let address = |kind: &str, address: String| NodeAddress { r#type: kind.to_owned(), address };
    NodeStatus {
        capacity: text(&machine.capacity),
        allocatable: text(&machine.allocatable),
        conditions: conditions(pressure, previous, now_wall_ms),
        addresses: vec![address("InternalIP", node_ip.to_string()), address("Hostname", machine.hostname.clone())],
        node_info: Some(machine.info.clone()),
        images: images
            .iter()
            .take(LISTED_IMAGES)
            .map(|image| ContainerImage {
                names: image.names.clone(),
                size_bytes: i64::try_from(image.size_bytes).unwrap_or(i64::MAX),
            })
            .collect(),
    }
}

fn conditions(pressure: Pressure, previous: Option<&NodeStatus>, now_wall_ms: u64) -> Vec<NodeCondition> {
    let Conditions { memory: low_memory, disk: low_disk, pids: low_pids } = pressure.short;
    let memory = format!("{} MiB of memory available", pressure.memory_available_bytes >> 20);
    let disk = format!("{} % of the disk free", pressure.disk_free_percent);
    let ready = if pressure.network_ready {
        ("AgentReady", "the agent is posting ready status")
    } else {
        ("NetworkNotReady", "the pod network is not set up")
    };
    let entries = [
        (
            "MemoryPressure",
            low_memory,
            if low_memory { "NodeHasInsufficientMemory" } else { "NodeHasSufficientMemory" },
            memory,
        ),
        ("DiskPressure", low_disk, if low_disk { "NodeHasDiskPressure" } else { "NodeHasNoDiskPressure" }, disk),
        (
            "PIDPressure",
            low_pids,
            if low_pids { "NodeHasInsufficientPID" } else { "NodeHasSufficientPID" },
            format!("{} % of the process ids free", pressure.pids_free_percent),
        ),
        ("Ready", pressure.network_ready, ready.0, ready.1.to_owned()),
    ];
    let condition = |(kind, status, reason, message): (&str, bool, &str, String)| {
        let status = if status { "True" } else { "False" };
        let before = previous
            .iter()
            .flat_map(|previous| &previous.conditions)
            .find(|before| before.r#type == kind && before.status == status);
        NodeCondition {
            r#type: kind.to_owned(),
            status: status.to_owned(),
            last_heartbeat_time: Some(time(now_wall_ms)),
            last_transition_time: before.and_then(|b| b.last_transition_time).or_else(|| Some(time(now_wall_ms))),
            reason: reason.to_owned(),
            message,
        }
    };
    entries.into_iter().map(condition).collect()
}

/// The Node object to register.
#[must_use]
pub fn node_object(config: &Config, name: &str, status: NodeStatus) -> Node {
    let mut labels: BTreeMap<String, String> = BTreeMap::from([
        ("kubernetes.io/hostname".to_owned(), name.to_owned()),
        ("kubernetes.io/os".to_owned(), "linux".to_owned()),
        ("kubernetes.io/arch".to_owned(), status.node_info.as_ref().map_or("", |i| i.architecture.as_str()).to_owned()),
    ]);
    labels.extend(config.labels.iter().cloned());
    Node {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        metadata: Some(ObjectMeta { name: name.to_owned(), labels, ..ObjectMeta::default() }),
        spec: Some(NodeSpec { taints: config.taints.clone(), ..NodeSpec::default() }),
        status: Some(status),
    }
}

/// Whether the two differ in more than the moment of their measurement, so that the API server should hear of it.
#[must_use]
pub fn differs(old: &NodeStatus, new: &NodeStatus) -> bool {
    let steady = |status: &NodeStatus| {
        let mut status = status.clone();
        for condition in &mut status.conditions {
            condition.last_heartbeat_time = None;
            condition.message.clear();
        }
        status
    };
    steady(old) != steady(new)
}

/// The address that this machine has on the way to `server`: no packet is sent for it.
///
/// # Errors
/// When there is no route.
pub fn address_towards(server: &str) -> std::io::Result<IpAddr> {
    let target = server.split_once("://").map_or(server, |(_, rest)| rest).trim_end_matches('/');
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[test]
    fn this_machine_is_described() {
        let config = Config::parse_from(["x", "--allocatable", "memory=1.25Gi", "--data-dir", "/tmp"]);
        let machine = Machine::look(&config);
        let pressure = Pressure::measure(Path::new("/tmp"), true, Conditions::default());
        let status = node_status(&machine, "192.0.2.1".parse().expect("ip"), pressure, &[], (None, 5_000));
        assert_eq!(status.allocatable["memory"], "1280Mi");
        assert!(machine.memory_bytes() > 0);
        let (most, all) = tasks().expect("counted");
        assert!(0 < all && all <= most, "{all} of {most}");
        let info = status.node_info.as_ref().expect("info");
        assert!(!info.boot_id.is_empty() && !info.kernel_version.is_empty() && !info.os_image.is_empty());
        let ready = status.conditions.iter().find(|condition| condition.r#type == "Ready").expect("Ready");
        assert_eq!((ready.status.as_str(), ready.last_transition_time), ("True", Some(time(5_000))));
        let later = node_status(&machine, "192.0.2.1".parse().expect("ip"), pressure, &[], (Some(&status), 9_000));
        assert!(!differs(&status, &later));
        let down = Pressure { network_ready: false, ..pressure };
        let down = node_status(&machine, "192.0.2.1".parse().expect("ip"), down, &[], (Some(&later), 9_000));
        assert!(differs(&later, &down));
        let short = Pressure { short: Conditions { memory: true, ..Conditions::default() }, ..pressure };
        let short = node_status(&machine, "192.0.2.1".parse().expect("ip"), short, &[], (Some(&later), 9_000));
        let told = short.conditions.iter().find(|condition| condition.r#type == "MemoryPressure").expect("told");
        assert_eq!((told.status.as_str(), told.last_transition_time), ("True", Some(time(9_000))));
    }
}
