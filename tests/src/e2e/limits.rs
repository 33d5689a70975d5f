//! The parts of a pod's way by themselves: creates that nobody schedules, bindings that nobody decides, and watches of what was
//! written before. The way as a whole is no faster than its slowest part, and all parts share the machine.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use minictl::local::Store;
use minipod_client::{ChangeKind, Client, Options, Query};
use minipod_proto::Resource;
use minipod_proto::v1::bind_batch_request::{Item, Mode};
use minipod_proto::v1::bind_result::Code;
use minipod_proto::v1::{BindBatchRequest, Pod};
use tokio::task::JoinSet;

use super::board::Board;
use super::load;
use super::measure::{Figures, PATIENCE};
use super::verify;
use super::workload::{Shape, Workload};
use crate::plane::Plane;

/// What `--workload` calls it.
pub const NAME: &str = "limits";
/// A scheduler that is not there.
const NOBODY: &str = "nobody";
/// Bindings of one call, and calls under way, as the scheduler has them.
const BATCH: usize = 256;
const IN_FLIGHT: usize = 8;
/// Watches that are served at once.
const WATCHES: usize = 10;

/// Takes them, with 5,000 nodes and 10,000 pods, or fewer by the factor `divisor`.
///
/// # Errors
/// When something does not come up, is refused, or does not hold.
pub async fn run(store: Store, dir: &Path, divisor: usize) -> Result<Figures, String> {
    let shape = (Shape::Default, 10_000);
    let workload = Workload {
        name: NAME,
        nodes: 5_000,
        zones: &["zone1"],
        init: shape,
        measured: shape,
        together: 1,
        churn: false,
    };
    let workload = workload.divided(divisor);
    let plane = Plane::start(store, dir)?;
    let client = Client::new(&Options::servers(plane.server())).map_err(|error| error.to_string())?;
    let board = Arc::new(Board::new("pod", workload.measured.1));
    let _nodes = load::join(plane.server(), &workload, &[Arc::clone(&board)]).await?;
    let pods = board.pods() as f64;

    let listed = client.list::<Pod>(&Query::all()).await.map_err(|error| error.to_string())?;
    let start = Instant::now();
    load::create(plane.server(), &board, Shape::Default, NOBODY, 1).await?;
    let creates = pods / start.elapsed().as_secs_f64();

    let start = Instant::now();
    let events = watch_all(&client, listed.revision, board.pods()).await?;
    let fan_out = events as f64 / start.elapsed().as_secs_f64();

    let items = items(&client, workload.nodes).await?;
    let start = Instant::now();
    bind(&client, items).await?;
    let binds = pods / start.elapsed().as_secs_f64();
    board.all_seen(PATIENCE).await?;
    let shown = pods / start.elapsed().as_secs_f64();
    verify::check(&client, &[&board]).await?;
    let figure = |key: &str, value| (format!("{NAME}_{key}"), value);
    Ok(vec![
        figure("creates_s", creates),
        figure("binds_s", binds),
        figure("binds_seen_by_nodes_s", shown),
        figure("fanout_events_s", fan_out),
    ])
}

/// Watches of all pods, each from before the first create until the last; how many events came.
async fn watch_all(client: &Client, revision: i64, pods: usize) -> Result<usize, String> {
    let mut watches = JoinSet::new();
    for _ in 0..WATCHES {
        let client = client.clone();
        watches.spawn(async move {
            let mut watch = client.watch::<Pod>(&Query::all(), revision).await.map_err(|error| error.to_string())?;
            let mut seen = 0;
            while seen < pods {
                let next = tokio::time::timeout(PATIENCE, watch.next()).await;
                let next = next.map_err(|_| format!("a watch stands still after {seen} of {pods} events"))?;
                let change = next.map_err(|error| error.to_string())?.ok_or("a watch has ended")?;
                seen += usize::from(!matches!(change.kind, ChangeKind::Bookmark));
            }
            Ok::<usize, String>(pods)
        });
    }
    let mut events = 0;
    while let Some(watched) = watches.join_next().await {
        events += watched.map_err(|error| error.to_string())??;
    }
    Ok(events)
}

/// A binding for every pod, to the nodes in turn.
async fn items(client: &Client, nodes: usize) -> Result<Vec<Item>, String> {
    let pods = client.list::<Pod>(&Query::all()).await.map_err(|error| error.to_string())?.items;
    let item = |(index, pod): (usize, &Pod)| Item {
        namespace: pod.namespace().to_owned(),
        pod: pod.name().to_owned(),
        uid: pod.uid().to_owned(),
        revision: 0,
        node: load::node_name(index % nodes),
    };
    Ok(pods.iter().enumerate().map(item).collect())
}

async fn bind(client: &Client, items: Vec<Item>) -> Result<(), String> {
    let mut calls = JoinSet::new();
    for batch in items.chunks(BATCH) {
        if calls.len() >= IN_FLIGHT
            && let Some(done) = calls.join_next().await
        {
            done.map_err(|error| error.to_string())??;
        }
        let request = BindBatchRequest { items: batch.to_vec(), mode: Mode::Each.into(), scheduler: NOBODY.to_owned() };
        let client = client.clone();
        calls.spawn(async move {
            let answer = client.bind_batch(request).await.map_err(|error| error.to_string())?;
            match answer.results.iter().find(|result| result.code() != Code::Bound) {
                None => Ok(()),
                Some(refused) => Err(format!("a binding is refused: {refused:?}")),
            }
        });
    }
    while let Some(done) = calls.join_next().await {
        done.map_err(|error| error.to_string())??;
    }
    Ok(())
}
