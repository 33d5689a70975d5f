//! Measures the store and etcd in turn, slice by slice, so that whatever else the machine does hits both: the same client, the same disk,
//! every write synced. Prints `key value` lines: medians over the slices; etcd's figures begin with `etcd_`, those of three replicas with
//! `three_`, and `ratio_…` is the median of the slices' own ratios of operations a second.
//!
//! The client is one thread on raw HTTP/2 frames, because on a small machine it takes from the server what it uses itself;
//! `generator_core_percent` is the most that it took of one core.
#![forbid(unsafe_code)]

mod fanout;
mod grpc;
mod load;
mod servers;
mod state;

use clap::Parser;
use load::{Load, Workload};
use servers::{Cluster, Kind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

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
    /// Replicas, all measured anew for each number; 1 or 3.
    #[arg(long, value_delimiter = ',', default_value = "1,3", value_parser = parse_replicas)]
    replicas: Vec<usize>,
    /// Seconds for each figure of each server.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Into how many turns they are divided.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    slices: u32,
    /// Bytes a value.
    #[arg(long, default_value_t = 1_024)]
    value_bytes: usize,
    /// Keys for the memory that a million of them take: 1000000 for the whole truth.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    memory_keys: u64,
    /// Keys that are there when a start is measured: a million of 1 KiB are a gigabyte.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    start_keys: u64,
    /// What to measure; state is memory and snapshots, start how long a server takes that has been killed with much data.
    #[arg(long, value_delimiter = ',', default_value = "put,cas,get,range,watch,state", value_parser = ["put", "cas", "get", "range", "watch", "state", "start"])]
    workloads: Vec<String>,
    /// About a minute: 16 and 64 clients, 100 watchers, one replica, short slices, few keys.
    #[arg(long)]
    quick: bool,
}

fn parse_replicas(text: &str) -> Result<usize, String> {
    match text {
        "1" => Ok(1),
        "3" => Ok(3),
        _ => Err("it must be 1 or 3".to_owned()),
    }
}

impl Args {
    fn made_quick(mut self) -> Self {
        if self.quick {
            (self.clients, self.watchers, self.replicas) = (vec![16, 64], vec![100], vec![1]);
            (self.seconds, self.slices, self.memory_keys) = (1.5, 3, 20_000);
        }
        self
    }

    fn slice(&self) -> Duration {
        Duration::from_secs_f64(self.seconds / f64::from(self.slices))
    }

    fn wants(&self, workload: &str) -> bool {
        self.workloads.iter().any(|wanted| wanted == workload)
    }
}

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Figures by name, one value a slice, in the order in which they came.
#[derive(Debug, Default)]
struct Figures {
    known: Vec<(String, Vec<f64>)>,
    generator_core_percent: f64,
}

impl Figures {
    fn note(&mut self, kind: Kind, name: &str, value: f64) {
        let key = format!("{}{name}", kind.prefix());
        match self.known.iter_mut().find(|(known, _)| *known == key) {
            Some((_, values)) => values.push(value),
            None => self.known.push((key, vec![value])),
        }
    }

    fn note_load(&mut self, kind: Kind, name: &str, measured: load::Measured) {
        self.note(kind, &format!("{name}_ops_s"), measured.ops_s);
        self.note(kind, &format!("{name}_p50_ms"), measured.p50_ms);
        self.note(kind, &format!("{name}_p99_ms"), measured.p99_ms);
        self.note(kind, &format!("{name}_cpu_us"), measured.cpu_us);
        self.generator_core_percent = self.generator_core_percent.max(measured.client_core_percent);
    }

    /// Prints the medians, and forgets them.
    fn print(&mut self) {
        for (key, mut values) in self.known.drain(..) {
            values.sort_unstable_by(f64::total_cmp);
            let value = values.get(values.len() / 2).copied().unwrap_or(0.0);
            if value.abs() < 100.0 { println!("{key} {value:.3}") } else { println!("{key} {value:.0}") }
        }
    }
}

const WORKLOADS: [Workload; 4] = [Workload::Put, Workload::Cas, Workload::Get, Workload::Range];

async fn measure_calls(
    args: &Args,
    clusters: &[(Kind, Cluster)],
    prefix: &str,
    figures: &mut Figures,
) -> Result<(), Error> {
    for workload in WORKLOADS.into_iter().filter(|workload| args.wants(workload.name())) {
        for clients in &args.clients {
            let name = format!("{prefix}{}_{clients}", workload.name());
            let mut loads = Vec::new();
            for (_, cluster) in clusters {
                loads.push(Load::new(cluster.leader, workload, *clients, args).await?);
            }
            for _ in 0..args.slices {
                let mut rates = Vec::new();
                for ((kind, cluster), load) in clusters.iter().zip(&loads) {
                    let measured = load.slice(cluster, args.slice()).await?;
                    rates.push(measured.ops_s);
                    figures.note_load(*kind, &name, measured);
                }
                if let [ours, theirs] = rates[..] {
                    figures.note(Kind::Store, &format!("ratio_{name}"), ours / theirs);
                }
            }
            figures.print();
        }
    }
    Ok(())
}

async fn measure_watches(
    args: &Args,
    clusters: &[(Kind, Cluster)],
    prefix: &str,
    figures: &mut Figures,
) -> Result<(), Error> {
    for watchers in &args.watchers {
        let name = format!("{prefix}watch_{watchers}");
        let mut fanouts = Vec::new();
        for (_, cluster) in clusters {
            fanouts.push(fanout::Fanout::new(cluster.leader, *watchers).await?);
        }
        for _ in 0..args.slices {
            let mut rates = Vec::new();
            for ((kind, _), fanout) in clusters.iter().zip(&fanouts) {
                let events_s = fanout.slice(args.slice(), args).await?;
                rates.push(events_s);
                figures.note(*kind, &format!("{name}_events_s"), events_s);
            }
            if let [ours, theirs] = rates[..] {
                figures.note(Kind::Store, &format!("ratio_{name}"), ours / theirs);
            }
        }
        figures.print();
    }
    Ok(())
}

async fn run(args: &Args) -> Result<(), Error> {
    let mut figures = Figures::default();
    let kinds: &[Kind] = if args.etcd.is_empty() { &[Kind::Store] } else { &[Kind::Store, Kind::Etcd] };
    let wants_clusters = args.workloads.iter().any(|workload| !["state", "start"].contains(&workload.as_str()));
    for replicas in args.replicas.iter().filter(|_| wants_clusters) {
        let prefix = if *replicas == 1 { "" } else { "three_" };
        let mut clusters = Vec::new();
        for kind in kinds {
            let cluster = Cluster::start(args, *kind, *replicas).await?;
            load::fill(cluster.leader, load::KEYS, args.value_bytes).await?;
            clusters.push((*kind, cluster));
        }
        measure_calls(args, &clusters, prefix, &mut figures).await?;
        if args.wants("watch") {
            measure_watches(args, &clusters, prefix, &mut figures).await?;
        }
    }
    if args.wants("state") {
        state::measure(args, kinds, &mut figures).await?;
        figures.print();
    }
    if args.wants("start") {
        state::measure_start(args, kinds, &mut figures).await?;
        figures.print();
    }
    println!("generator_core_percent {:.0}", figures.generator_core_percent);
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse().made_quick();
    match tokio::task::LocalSet::new().run_until(run(&args)).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("minipod-store-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
