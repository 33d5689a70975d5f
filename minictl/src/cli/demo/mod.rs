//! `demo`: a cluster of two nodes, the examples on it one after the other, each with what it proves; then everything goes.
//!
//! A proof that fails is an error: the demo is a test that explains itself.

mod chapters;
mod processes;
mod stage;

use super::args::DemoArgs;
use super::error::CliError;
use super::print;
use super::up::{bin_dir, load_images, until_interrupted, usage};
use crate::local::{LocalCluster, NodeOptions, Options};
use stage::Stage;

/// Runs it.
pub async fn run(options: &DemoArgs) -> Result<(), CliError> {
    let nodes = vec![NodeOptions::with_memory("node-a", "1.25Gi"), NodeOptions::with_memory("node-b", "2Gi")];
    let wanted = Options::new(bin_dir(options.bin_dir.as_deref())?, nodes);
    tell!(
        "==> start a cluster on this machine: API server with its own store, scheduler, node-a (1.25Gi) and node-b (2Gi),"
    );
    tell!("    each node in a network namespace of its own");
    let start = std::time::Instant::now();
    let cluster = until_interrupted(LocalCluster::start(wanted)).await??;
    tell!("    up after {:.1} s", start.elapsed().as_secs_f64());
    // Dropping the cluster takes it down, also when a chapter fails or Ctrl-C comes.
    let told = until_interrupted(chapters(&cluster, options)).await;
    match told {
        Ok(Ok(())) if options.keep => {
            let server = cluster.server().to_owned();
            cluster.keep()?;
            tell!("\n==> the cluster stays up. To use it, and to end it:\n");
            print(&usage(&server))
        }
        Ok(Ok(())) => {
            tell!("\n==> take everything down");
            cluster.stop()?;
            tell!("    no process, mount, cgroup, namespace or file of it is left");
            Ok(())
        }
        Ok(Err(error)) | Err(error) => {
            note!("the demo did not get to its end; taking the cluster down");
            if let Err(down) = cluster.stop() {
                CliError::from(down).report();
            }
            Err(error)
        }
    }
}

async fn chapters(cluster: &LocalCluster, options: &DemoArgs) -> Result<(), CliError> {
    let stage = Stage::new(cluster.client().clone(), options.examples.clone(), options.fast);
    tell!("\n==> load the images of {} into both nodes: there is no registry in this demo", options.images.display());
    for name in load_images(cluster.client(), &options.images).await? {
        tell!("    {name}");
    }
    stage.show_nodes().await?;
    chapters::helloworld(&stage).await?;
    chapters::co_scheduling(&stage).await?;
    chapters::shared_data(&stage).await?;
    chapters::init_order(&stage).await?;
    chapters::sidecar(&stage).await
}
