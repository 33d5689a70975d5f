//! What questions cost while a cluster works: `Explain` of a pod that fits on none of thousands of nodes, asked without pause while
//! pods are bound, and evictions under a budget of thousands of pods.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use minictl::local::Store;
use minipod_client::{Client, EvictOptions, Options, Query};
use minipod_proto::Resource;
use minipod_proto::v1::{Pod, Time};
use tokio::task::JoinSet;

use super::board::{Board, percentile};
use super::load;
use super::measure::{Figures, PATIENCE, SCHEDULER};
use super::workload::{Shape, TOGETHER, Workload};
use crate::plane::Plane;

/// What `--workload` calls it.
pub const NAME: &str = "questions";
/// Who asks, each as soon as he has his answer.
const ASKERS: usize = 4;
/// Pods that are evicted, one after the other.
const EVICTED: usize = 200;
/// Statuses that are written at a time.
const WRITERS: usize = 64;

/// A budget of all pods that never refuses, and is counted each time.
const BUDGET: &str = "apiVersion: policy/v1\nkind: PodDisruptionBudget\nmetadata: {name: all, namespace: default}\n\
                      spec: {maxUnavailable: 100%, selector: {matchLabels: {color: none}}}\n";

/// Measures with 5,000 nodes, 10,000 pods that are bound while questions are asked, and 5,000 of them under a budget; or with fewer by
/// the factor `divisor`.
///
/// # Errors
/// When something does not come up, is refused, or does not hold.
pub async fn run(store: Store, dir: &Path, divisor: usize) -> Result<Figures, String> {
    let (init, measured) = ((Shape::TooLarge, 1), (Shape::Default, 10_000 / divisor));
    let nodes = 5_000 / divisor;
    let workload = Workload { name: NAME, nodes, zones: &["zone1"], init, measured, together: TOGETHER, churn: false };
    let plane = Plane::start(store, dir)?;
    let client = Client::new(&Options::servers(plane.server())).map_err(|error| error.to_string())?;
    let large = Arc::new(Board::new("large", 1));
    let board = Arc::new(Board::new("pod", workload.measured.1));
    let _nodes = load::join(plane.server(), &workload, &[Arc::clone(&board)]).await?;
    load::create(plane.server(), &large, workload.init.0, SCHEDULER, 1).await?;

    let done = Arc::new(AtomicBool::new(false));
    let mut askers = JoinSet::new();
    for _ in 0..ASKERS {
        askers.spawn(ask(client.clone(), workload.nodes, Arc::clone(&done)));
    }
    load::create(plane.server(), &board, workload.measured.0, SCHEDULER, workload.together).await?;
    let seen = board.all_seen(PATIENCE).await;
    done.store(true, Ordering::Release);
    let mut asked = Vec::new();
    while let Some(answers) = askers.join_next().await {
        asked.extend(answers.map_err(|error| error.to_string())??);
    }
    seen?;
    asked.sort_by(f64::total_cmp);
    let stalls = plane.scheduler_count("minipod_scheduler_loop_stall_seconds_count")?;

    let evicted = evictions(&client, divisor).await?;
    let bound = board.latencies_ms();
    let figures = [
        ("pods_s", board.pods() as f64 / board.span_s()),
        ("pods_p99_ms", percentile(&bound, 99)),
        ("explains", asked.len() as f64),
        ("explain_p50_ms", percentile(&asked, 50)),
        ("explain_p99_ms", percentile(&asked, 99)),
        ("loop_stalls", stalls),
        ("evict_p50_ms", percentile(&evicted, 50)),
        ("evict_p99_ms", percentile(&evicted, 99)),
    ];
    Ok(figures.map(|(key, value)| (format!("{NAME}_{key}"), value)).to_vec())
}

/// Asks why the large pod waits, until it is enough; milliseconds of each answer.
async fn ask(client: Client, nodes: usize, done: Arc<AtomicBool>) -> Result<Vec<f64>, String> {
    let mut took = Vec::new();
    while !done.load(Ordering::Acquire) {
        let start = Instant::now();
        match client.explain("default", "large-0").await {
            Ok(answer) if answer.nodes.len() == nodes => took.push(start.elapsed().as_secs_f64() * 1e3),
            Ok(answer) => {
                return Err(format!("{} of {nodes} nodes are explained: {}", answer.nodes.len(), answer.state));
            }
            // The scheduler has just heard of the pod, or will.
            Err(error) if error.is_not_found() || error.is_transient() => {
                tokio::time::sleep(Duration::from_millis(10)).await
            }
            Err(error) => return Err(format!("explain: {error}")),
        }
    }
    Ok(took)
}

/// Evicts some of many pods that are ready; milliseconds of each.
async fn evictions(client: &Client, divisor: usize) -> Result<Vec<f64>, String> {
    load::apply(client, BUDGET).await?;
    let pods = client.list::<Pod>(&Query::namespace("default")).await.map_err(|error| error.to_string())?.items;
    let bound = pods.into_iter().filter(|pod| pod.node_name().is_some());
    let bound: Vec<Pod> = bound.take(5_000 / divisor).collect();
    let names: Vec<String> = bound.iter().map(|pod| pod.name().to_owned()).take((EVICTED / divisor).max(10)).collect();
    let mut writers = JoinSet::new();
    for some in bound.chunks(bound.len().div_ceil(WRITERS).max(1)) {
        let (some, client) = (some.to_vec(), client.clone());
        writers.spawn(async move {
            for mut pod in some {
                pod.meta_mut().resource_version.clear();
                pod.status_mut().phase = "Running".to_owned();
                pod.status_mut().set_condition("Ready", "True", "", "", Time::default());
                client.update_status(pod).await.map_err(|error| error.to_string())?;
            }
            Ok::<(), String>(())
        });
    }
    while let Some(written) = writers.join_next().await {
        written.map_err(|error| error.to_string())??;
    }
    let mut took = Vec::new();
    for name in names {
        let start = Instant::now();
        client
            .evict("default", &name, &EvictOptions::default())
            .await
            .map_err(|error| format!("evict {name}: {error}"))?;
        took.push(start.elapsed().as_secs_f64() * 1e3);
    }
    took.sort_by(f64::total_cmp);
    Ok(took)
}
