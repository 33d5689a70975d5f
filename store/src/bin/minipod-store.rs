//! The store as a process of its own: an etcd v3 server, alone or one of several replicas.
#![forbid(unsafe_code)]

use clap::{Args, Parser, Subcommand};
use minipod_daemon::metrics::Registry;
use minipod_daemon::shutdown::Shutdown;
use minipod_store::certs;
use minipod_store::compactor::Retention;
use minipod_store::etcdapi::FaceConfig;
use minipod_store::members::{Members, parse_members, parse_url};
use minipod_store::metrics::Timed;
use minipod_store::peer::tls::{PeerTls, TlsFiles, check_urls};
use minipod_store::replica::run::{Ended, Pace, with_causes};
use minipod_store::service::{Cluster, Config, Store};
use minipod_store::tool;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;

/// An etcd v3 server on raft, in one process or several replicas.
#[derive(Debug, Parser)]
#[command(name = "minipod-store", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Serve,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check every record and snapshot of a data directory, or a saved snapshot, restore the state in memory and print its hash. Changes
    /// nothing.
    Verify {
        /// The directory.
        #[arg(long, default_value = "minipod-store.data")]
        data_dir: PathBuf,
        /// A saved snapshot instead of the directory.
        #[arg(conflicts_with = "data_dir")]
        snapshot: Option<PathBuf>,
    },
    /// Print every record of the log, one a line.
    Dump {
        /// The directory.
        #[arg(long, default_value = "minipod-store.data")]
        data_dir: PathBuf,
    },
    /// Make an authority and a certificate for every member, for --peer-cert-file, --peer-key-file and --peer-trusted-ca-file. An
    /// authority that is in the directory already issues the new ones. Move NAME.pem, NAME-key.pem and ca.pem to the member's
    /// machine, and ca-key.pem to a safe place.
    Certs {
        /// The directory.
        dir: PathBuf,
        /// The members: name=https://host:port,… A certificate is good for the hosts of these addresses.
        #[arg(long, value_parser = parse_members)]
        members: Members,
        /// How many days the certificates are valid.
        #[arg(long, default_value_t = 3_650, value_parser = clap::value_parser!(u32).range(1..=36_000))]
        days: u32,
    },
    /// Make a data directory from a saved snapshot (etcdctl snapshot save, of this store or a real etcd, or a file of a data directory's snap/). With
    /// --initial-cluster, do it for every member with the same snapshot.
    Restore {
        /// The saved snapshot.
        snapshot: PathBuf,
        /// The directory to make.
        #[arg(long)]
        data_dir: PathBuf,
        /// Move the revision on by so much, and compact what was before, so that clients which have seen revisions after the snapshot
        /// list anew; 1000000000 is enough for any cluster.
        #[arg(long, default_value_t = 0)]
        bump_revision: u32,
        #[command(flatten)]
        member: MemberArgs,
    },
}

#[derive(Debug, Args)]
struct MemberArgs {
    /// This member's name.
    #[arg(long, default_value = "default")]
    name: String,
    /// The members of a new cluster, the same list on each: name=https://host:port,… (http:// without certificates). A name may come several times.
    #[arg(long, value_parser = parse_members)]
    initial_cluster: Option<Members>,
    /// Keeps clusters with the same members apart.
    #[arg(long, default_value = "minipod-store")]
    initial_cluster_token: String,
    /// Where other members find this one: https://host:port. Default: --listen-peer.
    #[arg(long, value_delimiter = ',', value_parser = parse_url)]
    advertise_peer: Vec<String>,
}

#[derive(Debug, Args)]
struct Serve {
    #[command(flatten)]
    member: MemberArgs,
    /// Where everything is kept.
    #[arg(long, default_value = "minipod-store.data")]
    data_dir: PathBuf,
    /// Where to serve clients: host:port.
    #[arg(long, default_value = "127.0.0.1:2379")]
    listen_client: SocketAddr,
    /// The PEM certificate that is shown to clients, which must show one of --trusted-ca-file then. Without the three files everybody who
    /// reaches --listen-client reads and writes everything.
    #[arg(long)]
    cert_file: Option<PathBuf>,
    /// Its PEM key.
    #[arg(long)]
    key_file: Option<PathBuf>,
    /// The PEM certificate of the authority whose certificates clients must show.
    #[arg(long)]
    trusted_ca_file: Option<PathBuf>,
    /// Where clients find this member: http://host:port. Default: http:// (https:// with --cert-file) and --listen-client.
    #[arg(long, value_delimiter = ',', value_parser = parse_url)]
    advertise_client: Vec<String>,
    /// Where to serve other members: host:port. Needed with --initial-cluster and --join.
    #[arg(long)]
    listen_peer: Option<SocketAddr>,
    /// Join a cluster that is there: peer addresses of some of its members. This member is added as a learner and becomes a voter
    /// once it has the log, unless it was added before (etcdctl member add).
    #[arg(long, value_delimiter = ',', value_parser = parse_url, conflicts_with = "initial_cluster")]
    join: Vec<String>,
    /// This member's PEM certificate, shown to the other members. Without the three files members speak plain HTTP.
    #[arg(long)]
    peer_cert_file: Option<PathBuf>,
    /// Its PEM key.
    #[arg(long)]
    peer_key_file: Option<PathBuf>,
    /// The PEM certificate of the authority whose certificates the other members must show.
    #[arg(long)]
    peer_trusted_ca_file: Option<PathBuf>,
    /// Entries between two snapshots.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    snapshot_count: u64,
    /// When the state has so many bytes an alarm is raised and nothing is added; 0 for no limit.
    #[arg(long, default_value_t = 2 << 30)]
    quota_bytes: u64,
    /// The largest request, bytes.
    #[arg(long, default_value_t = 3 << 19)]
    max_request_bytes: usize,
    /// The most operations in a transaction.
    #[arg(long, default_value_t = 128)]
    max_txn_ops: usize,
    /// What --auto-compaction-retention counts: periodic (a time) or revision.
    #[arg(long, default_value = "periodic", value_parser = ["periodic", "revision"])]
    auto_compaction_mode: String,
    /// How much history is kept: a time such as 10m or 1h (a bare number is hours), or a number of revisions; 0 for all.
    #[arg(long, default_value = "0")]
    auto_compaction_retention: String,
    /// Milliseconds between two heartbeats.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(5..=10_000))]
    heartbeat_interval: u64,
    /// Milliseconds without a heartbeat until an election; at least five heartbeats.
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(25..=100_000))]
    election_timeout: u64,
    /// Where to serve /healthz and /metrics: host:port.
    #[arg(long)]
    listen_metrics: Option<SocketAddr>,
}

fn parse_retention(mode: &str, text: &str) -> Result<Retention, String> {
    let wrong = |right: &str| {
        format!("--auto-compaction-retention {text:?}: with --auto-compaction-mode {mode} it must be {right}")
    };
    if text == "0" {
        return Ok(Retention::All);
    }
    if mode == "revision" {
        let revisions = text.parse::<i64>().ok().filter(|revisions| *revisions > 0);
        return revisions.map(Retention::Revisions).ok_or_else(|| wrong("a number of revisions, such as 1000"));
    }
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit_s = match text.get(digits.len()..).unwrap_or_default() {
        "" | "h" => 3_600,
        "m" => 60,
        "s" => 1,
        _ => return Err(wrong("a time, such as 10m or 1h")),
    };
    let seconds =
        digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit_s)).filter(|seconds| *seconds > 0);
    seconds
        .map(|seconds| Retention::Time(Duration::from_secs(seconds)))
        .ok_or_else(|| wrong("a time, such as 10m or 1h"))
}

impl MemberArgs {
    fn cluster(&self, join: &[String], listen_peer: Option<SocketAddr>, scheme: &str) -> Result<Cluster, String> {
        let mut own_urls = self.advertise_peer.clone();
        if own_urls.is_empty() {
            own_urls.extend(listen_peer.map(|address| format!("{scheme}://{address}")));
        }
        if !join.is_empty() {
            if own_urls.is_empty() {
                return Err("--join: the other members must find this one; add --listen-peer host:port".to_owned());
            }
            return Ok(Cluster::Join { at: join.to_vec(), own_urls });
        }
        match &self.initial_cluster {
            Some(members) => Ok(Cluster::New { members: members.clone(), token: self.initial_cluster_token.clone() }),
            None => Ok(Cluster::Alone { peer_urls: own_urls }),
        }
    }
}

impl Serve {
    /// TLS with clients, if there is any.
    fn client_tls(&self) -> Result<Option<PeerTls>, String> {
        let flags = ["--cert-file", "--key-file", "--trusted-ca-file"];
        let (cert, key, trusted_ca) = (self.cert_file.clone(), self.key_file.clone(), self.trusted_ca_file.clone());
        let files = TlsFiles::from_three(flags, cert, key, trusted_ca).map_err(|error| with_causes(&error))?;
        files.as_ref().map(PeerTls::load).transpose().map_err(|error| with_causes(&error))
    }

    fn config(&self) -> Result<Config, String> {
        let files = TlsFiles::from_flags(
            self.peer_cert_file.clone(),
            self.peer_key_file.clone(),
            self.peer_trusted_ca_file.clone(),
        );
        let files = files.map_err(|error| with_causes(&error))?;
        let peer_tls = files.as_ref().map(PeerTls::load).transpose().map_err(|error| with_causes(&error))?;
        let scheme = if peer_tls.is_some() { "https" } else { "http" };
        let cluster = self.member.cluster(&self.join, self.listen_peer, scheme)?;
        let peer_urls: Vec<&String> = match &cluster {
            Cluster::Alone { peer_urls } => peer_urls.iter().collect(),
            Cluster::New { members, .. } => members.values().flatten().collect(),
            Cluster::Join { at, own_urls } => at.iter().chain(own_urls).collect(),
        };
        check_urls(peer_urls, peer_tls.is_some()).map_err(|error| with_causes(&error))?;
        if matches!(&cluster, Cluster::New { members, .. } if members.len() > 1) && self.listen_peer.is_none() {
            return Err(
                "--initial-cluster: the other members must reach this one; add --listen-peer host:port".to_owned()
            );
        }
        let election_ticks = self.election_timeout / self.heartbeat_interval;
        if election_ticks < 5 {
            return Err(format!(
                "--election-timeout {}: it must be at least five times --heartbeat-interval, which is {}",
                self.election_timeout, self.heartbeat_interval
            ));
        }
        let mut client_urls = self.advertise_client.clone();
        if client_urls.is_empty() {
            let scheme = if self.cert_file.is_some() { "https" } else { "http" };
            client_urls.push(format!("{scheme}://{}", self.listen_client));
        }
        Ok(Config {
            data_dir: self.data_dir.clone(),
            name: self.member.name.clone(),
            cluster,
            peer_tls,
            client_urls,
            pace: Pace {
                tick: Duration::from_millis(self.heartbeat_interval),
                election_ticks: usize::try_from(election_ticks).unwrap_or(usize::MAX),
            },
            snapshot_entries: self.snapshot_count,
            retention: parse_retention(&self.auto_compaction_mode, &self.auto_compaction_retention)?,
            timed: Timed::default(),
            face: FaceConfig {
                max_request_bytes: self.max_request_bytes,
                max_txn_ops: self.max_txn_ops,
                quota_bytes: self.quota_bytes,
                ..FaceConfig::default()
            },
        })
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        None => serve(&cli.serve),
        Some(Command::Verify { snapshot: Some(file), .. }) => {
            tool::verify_saved(&file).map(|report| println!("{report}")).map_err(|error| with_causes(&error))
        }
        Some(Command::Verify { data_dir, snapshot: None }) => {
            tool::verify(&data_dir).map(|report| println!("{report}")).map_err(|error| with_causes(&error))
        }
        Some(Command::Dump { data_dir }) => {
            tool::dump(&data_dir, &mut |line| println!("{line}")).map_err(|error| with_causes(&error))
        }
        Some(Command::Certs { dir, members, days }) => {
            certs::make(&dir, &members, days).map_err(|error| with_causes(&error))
        }
        Some(Command::Restore { snapshot, data_dir, bump_revision, member }) => {
            member.cluster(&[], None, "http").and_then(|cluster| {
                let restored = tool::restore(&snapshot, &data_dir, &member.name, &cluster, bump_revision);
                let revision = restored.map_err(|error| with_causes(&error))?;
                eprintln!(
                    "restored revision {revision}; start it with: minipod-store --data-dir {}",
                    data_dir.display()
                );
                Ok(())
            })
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("minipod-store: {problem}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn serve(args: &Serve) -> Result<(), String> {
    minipod_daemon::telemetry::init().map_err(|error| with_causes(&error))?;
    let metrics = Arc::new(Registry::default());
    let config = Config { timed: Timed::of(&metrics), ..args.config()? };
    let client_tls = args.client_tls()?;
    let shutdown = Shutdown::on_signals().map_err(|error| format!("signal handlers: {error}"))?;
    // The addresses are bound first: a wrong one shows at once, and nobody is answered before the state is there.
    let clients = bind("--listen-client", args.listen_client).await?;
    let peers = match args.listen_peer {
        Some(address) => Some(bind("--listen-peer", address).await?),
        None => None,
    };
    let begun = std::time::Instant::now();
    let mut store = Store::open(config).await.map_err(|error| with_causes(&error))?;
    if let Some(peers) = peers {
        store.serve_peers(peers).map_err(|error| with_causes(&error))?;
    }
    store.show_in(&metrics);
    let replica = store.replica().clone();
    if let Some(address) = args.listen_metrics {
        let replica = replica.clone();
        let health = Arc::new(move || {
            let status = minipod_store::machine::Replicator::status(&replica);
            if status.leader_id == 0 { Err("there is no leader".to_owned()) } else { Ok(()) }
        });
        minipod_daemon::http::serve(address, metrics, health, shutdown.clone())
            .await
            .map_err(|error| format!("--listen-metrics {address}: {error}"))?;
    }
    store.serve_clients(clients, client_tls.as_ref()).map_err(|error| with_causes(&error))?;
    let identity = replica.identity();
    tracing::info!(
        cluster = format!("{:x}", identity.cluster_id),
        member = format!("{:x}", identity.member_id),
        clients = %args.listen_client,
        took_ms = begun.elapsed().as_millis(),
        "serving"
    );
    // Both arms only wait, and neither loses anything when the other comes first.
    let ended = tokio::select! {
        () = shutdown.asked() => store.shutdown().await,
        ended = store.ended() => ended,
    };
    match ended {
        Ended::Stopped => Ok(()),
        Ended::Removed => {
            tracing::warn!("this member was removed from the cluster; its data directory is of no more use");
            Ok(())
        }
        Ended::Failed(text) => Err(text.to_string()),
    }
}

async fn bind(flag: &str, address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|error| format!("{flag} {address}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retentions_are_read_as_etcd_does() {
        let hour = Duration::from_secs(3_600);
        for (mode, text, right) in [
            ("periodic", "0", Some(Retention::All)),
            ("periodic", "1", Some(Retention::Time(hour))),
            ("periodic", "60m", Some(Retention::Time(hour))),
            ("periodic", "5s", Some(Retention::Time(Duration::from_secs(5)))),
            ("periodic", "5x", None),
            ("periodic", "-5", None),
            ("revision", "1000", Some(Retention::Revisions(1_000))),
            ("revision", "10m", None),
        ] {
            assert_eq!(parse_retention(mode, text).ok(), right, "{mode} {text}");
        }
    }

    #[test]
    fn the_flags_fit_together() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
