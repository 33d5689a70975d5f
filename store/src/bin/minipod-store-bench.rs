//! Measures the store and etcd in turn: the same client, the same disk, every write synced. Prints `key value` lines.
#![forbid(unsafe_code)]

use clap::Parser;
use etcd_client::{Client, Compare, CompareOp, GetOptions, Txn, TxnOp, WatchOptions};
use std::fmt::Display;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[derive(Debug, Parser)]
#[command(version, about)]
struct Args {
    /// Where the data directories are made; what is there stays.
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// etcd's binary; empty to measure the store alone.
    #[arg(long, default_value = "/usr/bin/etcd")]
    etcd: String,
    /// The store's binary. Default: beside this one.
    #[arg(long)]
    store: Option<PathBuf>,
    /// Clients at once, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64,256")]
    clients: Vec<usize>,
    /// Watchers at once, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "1,100,1000")]
    watchers: Vec<usize>,
    /// Seconds a measurement.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Bytes a value.
    #[arg(long, default_value_t = 1_024)]
    value_bytes: usize,
    /// How often all is measured; the medians are printed.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// What to measure.
    #[arg(long, value_delimiter = ',', default_value = "put,cas,get,range,watch")]
    workloads: Vec<String>,
}

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Clients share connections as a busy program does: sixteen to one.
const CLIENTS_PER_CONNECTION: usize = 16;
/// Keys that the writes go to.
const KEYS: u64 = 10_000;
const RANGE: i64 = 1_000;

/// A server that is killed when it goes out of scope, with its directory.
struct Running {
    child: Child,
    endpoint: String,
    dir: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Store,
    Etcd,
}

impl Server {
    const fn prefix(self) -> &'static str {
        match self {
            Self::Store => "",
            Self::Etcd => "etcd_",
        }
    }
}

fn start(args: &Args, server: Server) -> Result<Running, Error> {
    let dir = args.dir.join(format!("bench-{}{}", server.prefix(), std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let client = format!("127.0.0.1:{}", free_port()?);
    let mut command = match server {
        Server::Store => {
            let beside = std::env::current_exe()?.with_file_name("minipod-store");
            let mut command = Command::new(args.store.as_ref().unwrap_or(&beside));
            command.args(["--listen-client", &client, "--quota-bytes", "0"]).arg("--data-dir").arg(&dir);
            command.env("RUST_LOG", "warn");
            command
        }
        Server::Etcd => {
            let (client, peer) = (format!("http://{client}"), format!("http://127.0.0.1:{}", free_port()?));
            let mut command = Command::new(&args.etcd);
            command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
            command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
            command.args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"]);
            command.args(["--quota-backend-bytes", "8589934592"]).arg("--data-dir").arg(&dir);
            command
        }
    };
    // etcd writes pages about its elections even at level error.
    let stderr = if server == Server::Etcd { Stdio::null() } else { Stdio::inherit() };
    let child = command.stdout(Stdio::null()).stderr(stderr).spawn()?;
    Ok(Running { child, endpoint: format!("http://{client}"), dir })
}

async fn connect(endpoint: &str) -> Result<Client, Error> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Ok(mut client) = Client::connect([endpoint], None).await
            && client.get("ready", None).await.is_ok()
        {
            return Ok(client);
        }
        if Instant::now() > deadline {
            return Err(format!("{endpoint} does not answer").into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Operations a second and latencies.
#[derive(Debug, Clone, Copy, Default)]
struct Measured {
    ops_s: f64,
    p50_ms: f64,
    p99_ms: f64,
}

fn measured(mut latencies: Vec<Duration>, took: Duration) -> Measured {
    latencies.sort_unstable();
    let at = |per_mille: usize| {
        let place = (latencies.len() * per_mille / 1_000).min(latencies.len().saturating_sub(1));
        latencies.get(place).map_or(0.0, |latency| latency.as_secs_f64() * 1e3)
    };
    #[expect(clippy::cast_precision_loss, reason = "a count of operations")]
    let count = latencies.len() as f64;
    Measured { ops_s: count / took.as_secs_f64(), p50_ms: at(500), p99_ms: at(990) }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Workload {
    Put,
    Cas,
    Get,
    Range,
}

async fn one(
    client: &mut Client,
    workload: Workload,
    key: &str,
    revision: &mut i64,
    value: &[u8],
) -> Result<(), Error> {
    match workload {
        Workload::Put => drop(client.put(key, value, None).await?),
        Workload::Cas => {
            let compare = Compare::mod_revision(key, CompareOp::Equal, *revision);
            let txn = Txn::new().when([compare]).and_then([TxnOp::put(key, value, None)]);
            let response = client.txn(txn).await?;
            if !response.succeeded() {
                return Err(format!("{key} was changed by somebody else").into());
            }
            *revision = response.header().map_or(0, etcd_client::ResponseHeader::revision);
        }
        Workload::Get => drop(client.get(key, None).await?),
        Workload::Range => {
            let response = client.get("key/", Some(GetOptions::new().with_prefix().with_limit(RANGE))).await?;
            if response.kvs().len() != usize::try_from(RANGE)? {
                return Err(format!("a range of {RANGE} has {} keys", response.kvs().len()).into());
            }
        }
    }
    Ok(())
}

async fn measure(endpoint: &str, workload: Workload, clients: usize, args: &Args) -> Result<Measured, Error> {
    let mut connections = Vec::new();
    for _ in 0..clients.div_ceil(CLIENTS_PER_CONNECTION) {
        connections.push(connect(endpoint).await?);
    }
    let value = vec![b'v'; args.value_bytes];
    let next = Arc::new(AtomicU64::new(0));
    let begun = Instant::now();
    let deadline = begun + Duration::from_secs_f64(args.seconds);
    let mut tasks = Vec::new();
    for number in 0..clients {
        let (mut client, value, next) =
            (connections[number / CLIENTS_PER_CONNECTION].clone(), value.clone(), Arc::clone(&next));
        tasks.push(tokio::spawn(async move {
            let mut latencies = Vec::new();
            // A client that compares has a key of its own, so that none fails.
            let own = format!("cas/{number}");
            let mut revision = client.get(own.as_str(), None).await?.kvs().first().map_or(0, |kv| kv.mod_revision());
            while Instant::now() < deadline {
                let shared = format!("key/{:08}", next.fetch_add(7_919, Ordering::Relaxed) % KEYS);
                let key = if workload == Workload::Cas { &own } else { &shared };
                let sent = Instant::now();
                one(&mut client, workload, key, &mut revision, &value).await?;
                latencies.push(sent.elapsed());
            }
            Ok::<_, Error>(latencies)
        }));
    }
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await??);
    }
    Ok(measured(latencies, begun.elapsed()))
}

/// Events a second over all watchers while eight clients write, and the time from a put's answer to be sent until an event arrives.
async fn measure_watch(endpoint: &str, watchers: usize, args: &Args) -> Result<f64, Error> {
    let received = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    let mut client = connect(endpoint).await?;
    for number in 0..watchers {
        if number % 100 == 0 {
            client = connect(endpoint).await?;
        }
        let mut stream = client.watch("fan/", Some(WatchOptions::new().with_prefix())).await?;
        let received = Arc::clone(&received);
        tasks.push(tokio::spawn(async move {
            while let Ok(Some(response)) = stream.message().await {
                received.fetch_add(response.events().len() as u64, Ordering::Relaxed);
            }
        }));
    }
    let begun = Instant::now();
    let deadline = begun + Duration::from_secs_f64(args.seconds);
    let mut writers = Vec::new();
    for number in 0..8 {
        let mut client = connect(endpoint).await?;
        writers.push(tokio::spawn(async move {
            let mut sent = 0_u64;
            while Instant::now() < deadline {
                client.put(format!("fan/{number}"), "x", None).await?;
                sent += 1;
            }
            Ok::<_, Error>(sent)
        }));
    }
    let mut sent = 0;
    for writer in writers {
        sent += writer.await??;
    }
    // All must arrive; the rate counts until the last one has.
    let expected = sent * watchers as u64;
    let patience = Instant::now() + Duration::from_secs(120);
    while received.load(Ordering::Relaxed) < expected {
        if Instant::now() > patience {
            return Err(format!("{} of {expected} events arrived", received.load(Ordering::Relaxed)).into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = begun.elapsed();
    for task in tasks {
        task.abort();
    }
    #[expect(clippy::cast_precision_loss, reason = "a count of events")]
    let events = expected as f64;
    Ok(events / took.as_secs_f64())
}

fn show(key: impl Display, value: f64) {
    if value < 100.0 { println!("{key} {value:.3}") } else { println!("{key} {value:.0}") }
}

/// The resident memory of a process, MiB.
fn resident_mib(process: u32) -> f64 {
    let status =
        std::fs::read_to_string(Path::new("/proc").join(process.to_string()).join("status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}

async fn run(args: &Args) -> Result<(), Error> {
    let mut results: Vec<(String, Vec<f64>)> = Vec::new();
    let mut note = |key: String, value: f64| match results.iter_mut().find(|(known, _)| *known == key) {
        Some((_, values)) => values.push(value),
        None => results.push((key, vec![value])),
    };
    let servers: &[Server] = if args.etcd.is_empty() { &[Server::Store] } else { &[Server::Store, Server::Etcd] };
    for _ in 0..args.rounds {
        for server in servers {
            let running = start(args, *server)?;
            let prefix = server.prefix();
            for name in &args.workloads {
                let workload = match name.as_str() {
                    "put" => Workload::Put,
                    "cas" => Workload::Cas,
                    "get" => Workload::Get,
                    "range" => Workload::Range,
                    "watch" => {
                        for watchers in &args.watchers {
                            let events_s = measure_watch(&running.endpoint, *watchers, args).await?;
                            note(format!("{prefix}watch_{watchers}_events_s"), events_s);
                        }
                        continue;
                    }
                    _ => return Err(format!("--workloads {name:?}: it must be put, cas, get, range or watch").into()),
                };
                for clients in &args.clients {
                    let measured = measure(&running.endpoint, workload, *clients, args).await?;
                    note(format!("{prefix}{name}_{clients}_ops_s"), measured.ops_s);
                    note(format!("{prefix}{name}_{clients}_p50_ms"), measured.p50_ms);
                    note(format!("{prefix}{name}_{clients}_p99_ms"), measured.p99_ms);
                }
            }
            note(format!("{prefix}resident_mib"), resident_mib(running.child.id()));
        }
    }
    for (key, mut values) in results {
        values.sort_unstable_by(f64::total_cmp);
        show(key, values.get(values.len() / 2).copied().unwrap_or(0.0));
    }
    Ok(())
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("minipod-store-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
