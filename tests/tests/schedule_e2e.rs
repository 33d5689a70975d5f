//! The benchmark's workloads, a hundred times smaller: every pod gets its node once, the node's session shows it, and no node has
//! more than it can. The figures are the benchmark's; here they are only there.

use minipod_tests::cluster::store;
use minipod_tests::e2e::{limits, measure, questions, workload};

const SMALLER: usize = 100;

#[tokio::test(flavor = "multi_thread")]
async fn every_workload_binds_every_measured_pod_once_and_its_node_is_told() {
    let dir = tempfile::tempdir().expect("a directory");
    for workload in workload::ALL {
        let figures = measure::run(&workload.divided(SMALLER), store(), dir.path()).await;
        let figures = figures.unwrap_or_else(|error| panic!("{}: {error}", workload.name));
        assert!(figures.iter().take(3).all(|(_, value)| *value > 0.0), "{figures:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_parts_work_by_themselves() {
    let dir = tempfile::tempdir().expect("a directory");
    let figures = limits::run(store(), dir.path(), SMALLER).await.unwrap_or_else(|error| panic!("{error}"));
    assert!(figures.len() == 4 && figures.iter().all(|(_, value)| *value > 0.0), "{figures:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn questions_are_answered_and_budgets_counted_while_pods_are_bound() {
    let dir = tempfile::tempdir().expect("a directory");
    let figures = questions::run(store(), dir.path(), SMALLER).await.unwrap_or_else(|error| panic!("{error}"));
    let figure = |name: &str| figures.iter().find(|(key, _)| key == &format!("questions_{name}")).expect("measured").1;
    assert!(figure("explains") > 0.0 && figure("evict_p50_ms") > 0.0 && figure("pods_s") > 0.0, "{figures:?}");
    assert!(figure("loop_stalls") < 1.0, "{figures:?}");
}
