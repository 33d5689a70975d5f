//! The agent's command line.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::Parser;
use minipod_client::Servers;
use minipod_proto::quantity::Quantity;
use minipod_proto::v1::Taint;

use crate::image::pull::{CERTS, Registries};
use crate::pressure::thresholds::{Graces, Limits, parse_duration_ms};
use crate::sysctls::Pattern;
use crate::users::Span;

/// The node agent of minipod: makes the pods of one machine real.
#[derive(Debug, Clone, Parser)]
#[command(name = "minipod-nodeagent", version)]
pub struct Config {
    /// Addresses of API servers, http://HOST:PORT, separated by commas: the session is with one of them, with another when that is gone.
    #[arg(long, default_value = minipod_client::DEFAULT_SERVER, env = minipod_client::SERVER_VARIABLE)]
    pub server: Servers,
    /// This node's name [default: the host name].
    #[arg(long)]
    pub name: Option<String>,
    /// What pods may use, such as cpu=2,memory=1.25Gi,pods=110 [default: the machine's less a reserve].
    #[arg(long, value_delimiter = ',', value_parser = parse_quantity)]
    pub allocatable: Vec<(String, Quantity)>,
    /// State that does not outlive a boot. Keep it short: it holds sockets.
    #[arg(long, default_value = "/run/minipod")]
    pub run_dir: PathBuf,
    /// Images, volumes and logs.
    #[arg(long, default_value = "/var/lib/minipod")]
    pub data_dir: PathBuf,
    /// Name of the cgroup that holds all pods.
    #[arg(long, default_value = "minipod")]
    pub cgroup_root: String,
    /// Name of the bridge that connects the pods.
    #[arg(long, default_value = "minipod0")]
    pub bridge: String,
    /// Where /metrics and /healthz are served.
    #[arg(long, default_value = "127.0.0.1:0")]
    pub metrics_listen: SocketAddr,
    /// A label of the node; may be given several times.
    #[arg(long = "label", value_parser = parse_label)]
    pub labels: Vec<(String, String)>,
    /// A taint of the node at its creation, key=value:Effect; may be given several times.
    #[arg(long = "taint", value_parser = parse_taint)]
    pub taints: Vec<Taint>,
    /// The node's address [default: that of the route to the first API server].
    #[arg(long)]
    pub node_ip: Option<IpAddr>,
    /// Longest delay before a container that keeps ending is started again.
    #[arg(long, default_value_t = 300_000, value_parser = clap::value_parser!(u64).range(1..=300_000))]
    pub max_restart_backoff_ms: u64,
    /// A registry, `host[:port]`, that is spoken to without TLS; may be given several times.
    #[arg(long = "registry-http")]
    pub registry_http: Vec<String>,
    /// REGISTRY=MIRROR: the mirror is asked first; may be given several times, the first comes first.
    #[arg(long = "registry-mirror", value_parser = parse_mirror)]
    pub registry_mirrors: Vec<(String, String)>,
    /// A file with the node's credentials for registries, as docker's config.json.
    #[arg(long)]
    pub registry_credentials: Option<PathBuf>,
    /// Whom to trust as a registry beside the system's authorities: `HOST[:PORT]/*.crt` in this directory; `NAME.cert` and `NAME.key` there are
    /// what the node shows of itself. Read for each pull.
    #[arg(long, default_value = CERTS)]
    pub registry_certs: PathBuf,
    /// Kernel parameters that pods may set beside the safe ones, such as net.core.somaxconn,kernel.msg*.
    #[arg(long, value_delimiter = ',')]
    pub allowed_unsafe_sysctls: Vec<Pattern>,
    /// Most processes and threads of one pod [default: as many as the node has].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    pub pod_pids_limit: Option<u64>,
    /// What is kept within the node's allocatable: pods, all together; none.
    #[arg(long, default_value = "pods", value_parser = ["pods", "none"])]
    pub enforce_node_allocatable: String,
    /// Containers that say nothing of seccomp have the profile RuntimeDefault; false: none, as in Kubernetes.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub seccomp_default: bool,
    /// Where seccomp profiles of type Localhost lie [default: seccomp in the data directory].
    #[arg(long)]
    pub seccomp_profile_root: Option<PathBuf>,
    /// User and group ids of this machine for pods with hostUsers: false, FIRST-LAST; each pod has 65536 of them. Agents that share a
    /// machine want different ones.
    #[arg(long, default_value_t)]
    pub pod_user_ids: Span,
    /// When to evict pods at once, such as memory.available<100Mi,nodefs.available<10%; signals: memory.available,
    /// nodefs.available, nodefs.inodesFree, imagefs.available, imagefs.inodesFree, pid.available. Empty: never.
    #[arg(long, default_value = "memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%")]
    pub eviction_hard: Limits,
    /// When to evict pods after a while and with their grace.
    #[arg(long, default_value = "")]
    pub eviction_soft: Limits,
    /// How long each soft threshold has to be met, such as memory.available=1m30s.
    #[arg(long, default_value = "")]
    pub eviction_soft_grace_period: Graces,
    /// The longest grace of a pod that a soft threshold evicts, seconds.
    #[arg(long, default_value_t = 0)]
    pub eviction_max_pod_grace_period: u64,
    /// How long MemoryPressure, DiskPressure and PIDPressure hold after the last threshold was met, such as 5m.
    #[arg(long = "eviction-pressure-transition-period", default_value = "5m", value_parser = parse_duration_ms)]
    pub eviction_pressure_transition_period_ms: u64,
    /// From this share of the disk on unused images are removed, percent; 100: never.
    #[arg(long, default_value_t = 85, value_parser = clap::value_parser!(u64).range(0..=100))]
    pub image_gc_high_threshold: u64,
    /// Down to this share, percent; below the high one.
    #[arg(long, default_value_t = 80, value_parser = clap::value_parser!(u64).range(0..=100))]
    pub image_gc_low_threshold: u64,
    /// An image that was used or came within this time stays, such as 2m.
    #[arg(long = "image-minimum-gc-age", default_value = "2m", value_parser = parse_duration_ms)]
    pub image_minimum_gc_age_ms: u64,
    /// An image that was not used for this long is removed however much room there is, such as 720h; 0s: it is not.
    #[arg(long = "image-maximum-gc-age", default_value = "0s", value_parser = parse_duration_ms)]
    pub image_maximum_gc_age_ms: u64,
    /// How often pods' disk and the machine's memory and disk are measured.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(100..=3_600_000))]
    pub housekeeping_interval_ms: u64,
    /// The podshim binary [default: beside this one].
    #[arg(long)]
    pub podshim: Option<PathBuf>,
    /// The pause binary [default: beside this one].
    #[arg(long)]
    pub pause: Option<PathBuf>,
}

impl Config {
    /// The path of a helper binary: the flag's, or `name` beside this executable.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn helper(flag: Option<&PathBuf>, name: &str) -> Result<PathBuf, String> {
        let path = match flag {
            Some(path) => path.clone(),
            None => {
                std::env::current_exe().map_err(|error| format!("find this executable: {error}"))?.with_file_name(name)
            }
        };
        if path.is_file() { Ok(path) } else { Err(format!("{} is missing: is it installed?", path.display())) }
    }

    /// The registries as they are to be reached.
    ///
    /// # Errors
    /// When the file with credentials cannot be read.
    pub fn registries(&self) -> Result<Registries, String> {
        let credentials = match &self.registry_credentials {
            Some(path) => {
                let named = |error: String| format!("--registry-credentials {}: {error}", path.display());
                let text = std::fs::read(path).map_err(|error| named(error.to_string()))?;
                Registries::docker_config(&text).map_err(named)?
            }
            None => BTreeMap::new(),
        };
        let mut mirrors: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (registry, mirror) in &self.registry_mirrors {
            mirrors.entry(registry.clone()).or_default().push(mirror.clone());
        }
        let (plain_http, certs) = (self.registry_http.clone(), self.registry_certs.clone());
        Ok(Registries { plain_http, mirrors, credentials, certs, ..Registries::default() })
    }

    /// The stated allocatable by resource.
    #[must_use]
    pub fn stated_allocatable(&self) -> BTreeMap<String, Quantity> {
        self.allocatable.iter().cloned().collect()
    }
}

fn parse_quantity(text: &str) -> Result<(String, Quantity), String> {
    let (name, value) = text.split_once('=').ok_or("want RESOURCE=QUANTITY, such as memory=2Gi")?;
    let quantity: Quantity = value.parse().map_err(|error| format!("{error}"))?;
    if name.is_empty() || quantity.sign() < 0 {
        return Err("want a resource's name and a quantity that is not negative".to_owned());
    }
    Ok((name.to_owned(), quantity))
}

fn parse_label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("want KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn parse_mirror(text: &str) -> Result<(String, String), String> {
    let (registry, mirror) =
        text.split_once('=').ok_or("want REGISTRY=MIRROR, such as docker.io=mirror.example:5000")?;
    Ok((registry.to_owned(), mirror.to_owned()))
}

fn parse_taint(text: &str) -> Result<Taint, String> {
    let wrong = "want KEY[=VALUE]:NoSchedule, :PreferNoSchedule or :NoExecute";
    let (pair, effect) = text.rsplit_once(':').ok_or(wrong)?;
    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
    if key.is_empty() || !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect) {
        return Err(wrong.to_owned());
    }
    Ok(Taint { key: key.to_owned(), value: value.to_owned(), effect: effect.to_owned(), time_added: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Config, String> {
        let all = std::iter::once("minipod-nodeagent").chain(args.iter().copied());
        Config::try_parse_from(all).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_are_read_and_checked() {
        let config =
            parse(&["--allocatable", "cpu=2,memory=1.25Gi,pods=110", "--taint", "a=b:NoSchedule"]).expect("fine");
        assert_eq!(config.stated_allocatable()["memory"].value_ceil(), 5 << 28);
        assert_eq!((config.taints[0].key.as_str(), config.taints[0].value.as_str()), ("a", "b"));
        for bad in [
            &["--allocatable", "cpu=-1"][..],
            &["--allocatable", "cpu"],
            &["--allocatable", "memory=1Gb"],
            &["--taint", "a=b"],
            &["--taint", ":NoSchedule"],
            &["--label", "a"],
            &["--max-restart-backoff-ms", "0"],
            &["--eviction-hard", "memory<1Gi"],
            &["--eviction-soft", "nodefs.available<200%"],
            &["--eviction-pressure-transition-period", "5"],
            &["--pod-user-ids", "0-65535"],
            &["--allowed-unsafe-sysctls", "vm.swappiness"],
            &["--pod-pids-limit", "0"],
            &["--enforce-node-allocatable", "all"],
            &["--server", "http://a:1,"],
            &["--server", "http://a"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
