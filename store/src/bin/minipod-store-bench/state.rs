//! What much state costs: memory, what compaction gives back, a snapshot that is read while others write, and a start.

use super::grpc::Connection;
use super::load::{Load, Workload, fill};
use super::servers::{Cluster, Kind};
use super::{Args, Error, Figures};
use minipod_store::wire::{put_flag, put_int};
use std::time::{Duration, Instant};

/// Fills both servers, measures their memory, serves while a snapshot is read, then replaces all values and compacts.
pub async fn measure(args: &Args, kinds: &[Kind], figures: &mut Figures) -> Result<(), Error> {
    let mut clusters = Vec::new();
    for kind in kinds {
        let cluster = Cluster::start(args, *kind, 1).await?;
        let (_, empty) = cluster.memory_mib();
        fill(cluster.leader, args.memory_keys, args.value_bytes).await?;
        settle(&cluster).await;
        note_memory(args, *kind, "memory", &cluster, empty, figures);
        clusters.push((*kind, cluster, empty));
    }
    serve_meanwhile(args, &clusters, figures).await?;
    for (kind, cluster, empty) in &clusters {
        fill(cluster.leader, args.memory_keys, args.value_bytes).await?;
        compact(cluster).await?;
        settle(cluster).await;
        note_memory(args, *kind, "memory_compacted", cluster, *empty, figures);
    }
    Ok(())
}

/// Fills one server after the other, then kills it and starts it again, several times.
pub async fn measure_start(args: &Args, kinds: &[Kind], figures: &mut Figures) -> Result<(), Error> {
    for kind in kinds {
        let mut cluster = Cluster::start(args, *kind, 1).await?;
        fill(cluster.leader, args.start_keys, args.value_bytes).await?;
        #[expect(clippy::cast_precision_loss, reason = "a size on disk")]
        figures.note(*kind, "start_bytes", cluster.disk_bytes()? as f64);
        for _ in 0..STARTS {
            figures.note(*kind, "start_s", cluster.restart().await?.as_secs_f64());
        }
        let (all, _) = cluster.memory_mib();
        figures.note(*kind, "start_memory_mib", all);
    }
    Ok(())
}

/// How often a server is started; the median counts.
const STARTS: usize = 3;

/// Memory is given back a while after it is freed.
async fn settle(cluster: &Cluster) {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut before = f64::INFINITY;
    // Until it falls no further.
    loop {
        tokio::time::sleep(Duration::from_millis(1_000)).await;
        let (now, _) = cluster.memory_mib();
        if now > before - 1.0 || Instant::now() > deadline {
            return;
        }
        before = now;
    }
}

/// Per million keys: all resident memory without that of an empty server, and the part that belongs to no file.
fn note_memory(args: &Args, kind: Kind, name: &str, cluster: &Cluster, empty: f64, figures: &mut Figures) {
    let (all, anonymous) = cluster.memory_mib();
    #[expect(clippy::cast_precision_loss, reason = "a count of keys")]
    let scale = 1e6 / args.memory_keys as f64;
    figures.note(kind, &format!("{name}_mib_per_million"), (all - empty) * scale);
    figures.note(kind, &format!("{name}_anonymous_mib_per_million"), (anonymous - empty) * scale);
}

async fn serve_meanwhile(args: &Args, clusters: &[(Kind, Cluster, f64)], figures: &mut Figures) -> Result<(), Error> {
    let mut loads = Vec::new();
    for (_, cluster, _) in clusters {
        loads.push(Load::new(cluster.leader, Workload::Put, 64, args).await?);
    }
    for _ in 0..args.slices {
        for ((kind, cluster, _), load) in clusters.iter().zip(&loads) {
            let quiet = load.slice(cluster, args.slice()).await?;
            let reader = tokio::task::spawn_local(read_snapshots(cluster.leader));
            let busy = load.slice(cluster, args.slice()).await?;
            let was_read = !reader.is_finished() || matches!(reader.await, Ok(Ok(())));
            if !was_read {
                return Err(format!("{kind:?} gave no snapshot").into());
            }
            figures.note(*kind, "snapshot_without_p99_ms", quiet.p99_ms);
            figures.note(*kind, "snapshot_put_64_p99_ms", busy.p99_ms);
            figures.note(*kind, "snapshot_put_64_ops_s", busy.ops_s);
            figures.note(*kind, "snapshot_p99_factor", busy.p99_ms / quiet.p99_ms.max(1e-6));
        }
    }
    Ok(())
}

/// Reads one snapshot.
async fn read_snapshots(address: std::net::SocketAddr) -> Result<(), Error> {
    let mut method = Connection::open(address).await?.method("/etcdserverpb.Maintenance/Snapshot")?;
    let mut stream = method.stream(&[]).await?;
    while stream.message().await?.is_some() {}
    Ok(())
}

/// Compacts all history, and returns when the space is free.
async fn compact(cluster: &Cluster) -> Result<(), Error> {
    let connection = Connection::open(cluster.leader).await?;
    let answer = connection.method("/etcdserverpb.KV/Range")?.call(&[10, 1, b'-']).await?;
    let mut message = Vec::new();
    put_int(&mut message, 1, super::grpc::header(&answer, 3).cast_signed());
    put_flag(&mut message, 2, true);
    connection.method("/etcdserverpb.KV/Compact")?.call(&message).await?;
    Ok(())
}
