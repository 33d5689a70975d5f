//! One workload on a fresh cluster.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use minictl::local::Store;
use minipod_client::{Client, Options};

use super::board::{Board, percentile};
use super::workload::Workload;
use super::{load, verify};
use crate::plane::Plane;

/// A pod that does not come for so long does not come.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The scheduler of all pods that are to be bound.
pub const SCHEDULER: &str = "default-scheduler";

/// The priorities of the preemption workload.
const PRIORITIES: &str = "apiVersion: scheduling.k8s.io/v1\nkind: PriorityClass\nmetadata: {name: low}\nvalue: 1\n---\n\
                          apiVersion: scheduling.k8s.io/v1\nkind: PriorityClass\nmetadata: {name: high}\nvalue: 1000\n";

/// Figures by key.
pub type Figures = Vec<(String, f64)>;

/// Runs a workload; its figures. Everything is verified at the end.
///
/// # Errors
/// When something does not come up, is refused, or does not hold.
pub async fn run(workload: &Workload, store: Store, dir: &Path) -> Result<Figures, String> {
    let plane = Plane::start(store, dir)?;
    let client = Client::new(&Options::servers(plane.server())).map_err(|error| error.to_string())?;
    let init = Arc::new(Board::new("init", workload.init.1));
    let measured = Arc::new(Board::new("pod", workload.measured.1));
    let _nodes = load::join(plane.server(), workload, &[Arc::clone(&init), Arc::clone(&measured)]).await?;
    load::apply(&client, PRIORITIES).await?;
    load::create(plane.server(), &init, workload.init.0, SCHEDULER, workload.together).await?;
    if workload.init_fits() {
        init.all_seen(PATIENCE).await?;
    }

    let before = plane.cpu_seconds();
    let churn = workload.churn.then(|| tokio::spawn(load::churn(client.clone(), plane.server().to_owned())));
    load::create(plane.server(), &measured, workload.measured.0, SCHEDULER, workload.together).await?;
    measured.all_seen(PATIENCE).await?;
    let after = plane.cpu_seconds();
    if let Some(churn) = churn {
        if churn.is_finished() {
            churn.await.map_err(|error| error.to_string())??;
        } else {
            churn.abort();
        }
    }

    // Low pods have gone for high ones: where they were is no longer in the store.
    let preempts = workload.measured.0 == super::workload::Shape::High;
    let boards: &[&Board] = if preempts || !workload.init_fits() { &[&measured] } else { &[&init, &measured] };
    verify::check(&client, boards).await?;
    let seconds: Vec<String> = measured.by_second().iter().map(usize::to_string).collect();
    eprintln!("    {} ({store:?}), pods each second: {}", workload.name, seconds.join(" "));
    Ok(figures(workload.name, &measured, &before, &after))
}

fn figures(name: &str, board: &Board, before: &[(&str, f64)], after: &[(&str, f64)]) -> Figures {
    let (latencies, pods) = (board.latencies_ms(), board.pods() as f64);
    let mut figures = vec![
        (format!("{name}_pods_s"), pods / board.span_s()),
        (format!("{name}_p50_ms"), percentile(&latencies, 50)),
        (format!("{name}_p99_ms"), percentile(&latencies, 99)),
    ];
    for ((process, after), (_, before)) in after.iter().zip(before) {
        figures.push((format!("{name}_{process}_cpu_us_per_pod"), (after - before) * 1e6 / pods));
    }
    figures
}
