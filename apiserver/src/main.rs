//! The API server's process.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use minipod_apiserver::{
    cache::Limits,
    nodes::cidr::ClusterCidr,
    serve::{self, Config, Replica, ServeError, StartError, StoreAt, StoreListen},
    storage::{DEFAULT_MAX_OPS, EMBEDDED_MAX_OPS},
};
use minipod_daemon::{
    shutdown::Shutdown,
    telemetry::{self, TelemetryError},
};
use minipod_proto::quantity::Quantity;
use minipod_store::{
    members::{Members, host_and_port, parse_members},
    peer::tls::{TlsError, TlsFiles},
};

/// Keeps the objects of a minipod cluster, in etcd or by itself, and serves them.
#[derive(Debug, Parser)]
#[command(name = "minipod-apiserver", version)]
struct Args {
    /// Where the objects are kept: etcd://HOST:PORT[,HOST:PORT…], or embedded: in --data-dir, by this process itself.
    #[arg(long, env = "MINIPOD_STORE", value_parser = store)]
    store: StoreArg,
    /// The directory of the embedded store.
    #[arg(long, env = "MINIPOD_DATA_DIR", default_value = "/var/lib/minipod/store")]
    data_dir: PathBuf,
    /// The members of an embedded store that several API servers carry together, the same list for each: name=https://host:port,…
    /// (http:// without certificates).
    #[arg(long, env = "MINIPOD_PEERS", value_parser = parse_members, requires = "name")]
    peers: Option<Members>,
    /// Which of --peers this one is.
    #[arg(long, env = "MINIPOD_NAME", requires = "peers")]
    name: Option<String>,
    /// Where to serve the other members. Default: the port of this member's first address, on that address if it is one of
    /// numbers, else on all.
    #[arg(long, env = "MINIPOD_PEER_LISTEN", requires = "peers")]
    peer_listen: Option<SocketAddr>,
    /// The PEM certificate that is shown to the other members; `minipod-store certs` makes these three files.
    #[arg(long, env = "MINIPOD_PEER_CERT_FILE", requires = "peers")]
    peer_cert_file: Option<PathBuf>,
    /// Its PEM key.
    #[arg(long, env = "MINIPOD_PEER_KEY_FILE", requires = "peers")]
    peer_key_file: Option<PathBuf>,
    /// The PEM certificate of the authority whose certificates the other members must show.
    #[arg(long, env = "MINIPOD_PEER_TRUSTED_CA_FILE", requires = "peers")]
    peer_trusted_ca_file: Option<PathBuf>,
    /// Serve the embedded store here to others who speak etcd's protocol, such as etcdctl and `minictl store snapshot`: 127.0.0.1:2379. Whoever
    /// reaches it can read and write everything, so an address beyond this machine needs the three files below.
    #[arg(long, env = "MINIPOD_STORE_LISTEN")]
    store_listen: Option<SocketAddr>,
    /// The PEM certificate that is shown to the store's clients, who must show one of --store-trusted-ca-file.
    #[arg(long, env = "MINIPOD_STORE_CERT_FILE", requires = "store_listen")]
    store_cert_file: Option<PathBuf>,
    /// Its PEM key.
    #[arg(long, env = "MINIPOD_STORE_KEY_FILE", requires = "store_listen")]
    store_key_file: Option<PathBuf>,
    /// The PEM certificate of the authority whose certificates the store's clients must show.
    #[arg(long, env = "MINIPOD_STORE_TRUSTED_CA_FILE", requires = "store_listen")]
    store_trusted_ca_file: Option<PathBuf>,
    /// How large the embedded store may grow, such as 4Gi; 0 for no limit. Its keys and their history are kept in memory. From nineteen
    /// twentieths on nothing new is taken, when it is full nothing is written.
    #[arg(long, env = "MINIPOD_STORE_QUOTA", default_value = "2Gi", value_parser = quota)]
    store_quota: u64,
    /// Operations that the store takes in one transaction (etcd's --max-txn-ops), at least 32. Default: 128, as etcd's; 1024 with an
    /// embedded store.
    #[arg(long, env = "MINIPOD_STORE_MAX_TXN_OPS", value_parser = txn_ops)]
    store_max_txn_ops: Option<usize>,
    /// Where to serve the API; port 0 takes a free one.
    #[arg(long, env = "MINIPOD_LISTEN", default_value = "127.0.0.1:7650")]
    listen: SocketAddr,
    /// Where clients reach this server, if not at its listen address: HOST:PORT.
    #[arg(long, env = "MINIPOD_ADVERTISE", default_value = "")]
    advertise: String,
    /// Write the port of the API to this file once it is served.
    #[arg(long, env = "MINIPOD_PORT_FILE")]
    port_file: Option<PathBuf>,
    /// Where to serve /healthz and /metrics.
    #[arg(long, env = "MINIPOD_METRICS_LISTEN")]
    metrics_listen: Option<SocketAddr>,
    /// The addresses of all pods; every node gets a /24 of them.
    #[arg(long, env = "MINIPOD_CLUSTER_CIDR", default_value = "10.42.0.0/16")]
    cluster_cidr: ClusterCidr,
    /// Bits of each node's own range of it: 24 has room for 253 pods. The same as long as the cluster lives.
    #[arg(long, default_value_t = minipod_apiserver::nodes::cidr::NODE_BITS)]
    node_cidr_mask_size: u32,
    /// How long a node may be silent before it is not ready: 15s, 500ms, 2m.
    #[arg(long, env = "MINIPOD_NODE_GRACE", default_value = "15s", value_parser = duration)]
    node_grace: Duration,
    /// How much of the past the store keeps for lists and watches to be continued; 0 leaves compaction to others.
    #[arg(long, env = "MINIPOD_KEEP_HISTORY", default_value = "5m", value_parser = duration)]
    keep_history: Duration,
}

impl Args {
    fn store_at(&self) -> Result<StoreAt, MainError> {
        match (&self.store, &self.peers) {
            (StoreArg::Etcd(_), Some(_)) => Err(MainError::PeersOfEtcd),
            (StoreArg::Etcd(addresses), None) => Ok(StoreAt::Etcd(addresses.clone())),
            (StoreArg::Embedded, None) => Ok(StoreAt::Embedded(self.data_dir.clone())),
            (StoreArg::Embedded, Some(members)) => {
                let name = self.name.clone().unwrap_or_default();
                let listen = match self.peer_listen {
                    Some(listen) => listen,
                    None => listen_of(members, &name)?,
                };
                let tls = TlsFiles::from_flags(
                    self.peer_cert_file.clone(),
                    self.peer_key_file.clone(),
                    self.peer_trusted_ca_file.clone(),
                )?;
                let (dir, members) = (self.data_dir.clone(), members.clone());
                Ok(StoreAt::Replica(Replica { dir, name, members, listen, tls }))
            }
        }
    }

    fn store_listen(&self) -> Result<Option<StoreListen>, MainError> {
        let flags = ["--store-cert-file", "--store-key-file", "--store-trusted-ca-file"];
        let files = TlsFiles::from_three(
            flags,
            self.store_cert_file.clone(),
            self.store_key_file.clone(),
            self.store_trusted_ca_file.clone(),
        )?;
        match (self.store_listen, &self.store) {
            (Some(address), StoreArg::Embedded) => Ok(Some(StoreListen { address, tls: files })),
            (Some(_), StoreArg::Etcd(_)) => Err(MainError::ListenOfEtcd),
            (None, _) => Ok(None),
        }
    }
}

/// Where a member serves the others, by its first address.
fn listen_of(members: &Members, name: &str) -> Result<SocketAddr, MainError> {
    let known = || members.keys().cloned().collect::<Vec<_>>().join(", ");
    let unknown = || MainError::Name { name: name.to_owned(), known: known() };
    let url = members.get(name).and_then(|urls| urls.first()).ok_or_else(unknown)?;
    let (host, port) = host_and_port(url).ok_or_else(unknown)?;
    Ok(SocketAddr::new(host.parse().unwrap_or(IpAddr::from([0, 0, 0, 0])), port))
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum StoreArg {
    Etcd(Vec<String>),
    Embedded,
}

fn store(text: &str) -> Result<StoreArg, String> {
    if text == "embedded" {
        return Ok(StoreArg::Embedded);
    }
    let wrong =
        || format!("{text:?} is no store; write it like embedded, etcd://127.0.0.1:2379 or etcd://a:2379,b:2379");
    let hosts = text.strip_prefix("etcd://").ok_or_else(wrong)?;
    let good = |host: &str| {
        host.rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0))
    };
    let hosts: Vec<String> = hosts.trim_end_matches('/').split(',').map(str::to_owned).collect();
    if hosts.iter().all(|host| good(host)) { Ok(StoreArg::Etcd(hosts)) } else { Err(wrong()) }
}

fn quota(text: &str) -> Result<u64, String> {
    let wrong = || format!("{text:?} is no size; write it like 512Mi, 2Gi or 8Gi, 0 for no limit");
    let quantity: Quantity = text.parse().map_err(|_| wrong())?;
    let bytes = u64::try_from(quantity.value_ceil()).map_err(|_| wrong())?;
    // Less has no room for a cluster's own objects, and is a slip such as 2 for 2Gi.
    if bytes != 0 && bytes < 16 << 20 { Err(format!("{text:?}: at least 16Mi is needed")) } else { Ok(bytes) }
}

fn txn_ops(text: &str) -> Result<usize, String> {
    let count: usize =
        text.parse().map_err(|_| format!("{text:?} is no number of operations; etcd's default is 128"))?;
    // One binding is a pod, a ledger, the announcements of rules and up to all of their turns.
    if count < 32 { Err(format!("{text}: at least 32 are needed")) } else { Ok(count) }
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no duration; write it like 15s, 500ms, 2m or 1h");
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let milliseconds = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1_000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        "" if number == 0 => Some(0),
        _ => None,
    };
    milliseconds.map(Duration::from_millis).ok_or_else(wrong)
}

#[derive(Debug, thiserror::Error)]
enum MainError {
    #[error("set up logging: {0}")]
    Telemetry(#[from] TelemetryError),
    #[error("{0}")]
    NodeCidr(String),
    #[error("--node-grace: at least 100ms is needed to tell silence from a slow network")]
    Grace,
    #[error("--peers: they are the members of --store=embedded; an etcd knows its own")]
    PeersOfEtcd,
    #[error("--store-listen: it serves --store=embedded; an etcd serves its clients itself")]
    ListenOfEtcd,
    #[error("--name {name}: --peers has no such member, only {known}")]
    Name { name: String, known: String },
    #[error("{0}")]
    Tls(#[from] TlsError),
    #[error("set up the runtime or its signals: {0}")]
    Runtime(#[from] std::io::Error),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("write --port-file {path}: {source}", path = path.display())]
    PortFile { path: PathBuf, source: std::io::Error },
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("minipod-apiserver: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<(), MainError> {
    telemetry::init()?;
    if args.node_grace < Duration::from_millis(100) {
        return Err(MainError::Grace);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(serve(args))
}

async fn serve(args: Args) -> Result<(), MainError> {
    let shutdown = Shutdown::on_signals()?;
    let config = Config {
        store: args.store_at()?,
        store_listen: args.store_listen()?,
        store_quota_bytes: args.store_quota,
        max_txn_ops: args.store_max_txn_ops.unwrap_or(match args.store {
            StoreArg::Etcd(_) => DEFAULT_MAX_OPS,
            StoreArg::Embedded => EMBEDDED_MAX_OPS,
        }),
        listen: args.listen,
        advertise: args.advertise,
        metrics_listen: args.metrics_listen,
        cluster_cidr: args.cluster_cidr.with_node_bits(args.node_cidr_mask_size).map_err(MainError::NodeCidr)?,
        node_grace: args.node_grace,
        keep_history: Some(args.keep_history).filter(|keep| !keep.is_zero()),
        limits: Limits::default(),
    };
    let running = serve::start(config, shutdown).await?;
    println!("minipod-apiserver listens on {}", running.address);
    if let Some(path) = args.port_file {
        write_port(&path, running.address.port()).map_err(|source| MainError::PortFile { path, source })?;
    }
    // The task neither panics (that aborts) nor is it cancelled.
    let outcome = running.ended.await.unwrap_or(Ok(()));
    telemetry::flush();
    Ok(outcome?)
}

/// Whole or not at all: a reader that waits for the file never sees half of it.
fn write_port(path: &std::path::Path, port: u16) -> std::io::Result<()> {
    let beside = path.with_extension("new");
    std::fs::write(&beside, format!("{port}\n"))?;
    std::fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_serves_at_its_first_address() {
        let members = parse_members("a=https://10.0.0.1:7,b=https://host:8,c=https://[::1]:9").expect("members");
        for (name, listen) in [("a", "10.0.0.1:7"), ("b", "0.0.0.0:8"), ("c", "[::1]:9")] {
            assert_eq!(listen_of(&members, name).expect("known").to_string(), listen);
        }
        let said = listen_of(&members, "d").expect_err("unknown").to_string();
        assert_eq!(said, "--name d: --peers has no such member, only a, b, c");
    }

    #[test]
    fn stores_and_durations() {
        assert_eq!(store("etcd://a:1,b:2"), Ok(StoreArg::Etcd(vec!["a:1".to_owned(), "b:2".to_owned()])));
        assert_eq!(store("embedded"), Ok(StoreArg::Embedded));
        for bad in ["", "a:1", "etcd://", "etcd://a", "etcd://a:0", "etcd://a:1,", "etcd://:1", "http://a:1"] {
            assert!(store(bad).is_err(), "{bad}");
        }
        assert_eq!((quota("2Gi"), quota("0"), quota("16Mi")), (Ok(2 << 30), Ok(0), Ok(16 << 20)));
        for bad in ["", "2", "-1", "x", "1e30", "15Mi"] {
            assert!(quota(bad).is_err(), "{bad}");
        }
        assert_eq!(duration("15s"), Ok(Duration::from_secs(15)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        for bad in ["", "s", "15", "-1s", "1.5s", "1d", "99999999999999999999s", "18446744073709551615h"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
