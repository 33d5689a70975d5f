//! The agent's process: takes its directories, brings back the pods that run, serves the API server, and ends without
//! ending a container.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use minipod_daemon::shutdown::Shutdown;
use minipod_daemon::{http, telemetry};
use minipod_nodeagent::agent::{Agent, AgentError};
use minipod_nodeagent::config::Config;
use minipod_nodeagent::{failpoints, pressure, recover, report, session};

/// How long steps that are under way may take at the end. What is not done then is found by the next start.
const DRAIN: Duration = Duration::from_secs(2);

/// Runs the agent until it is asked to end.
pub fn main() -> ExitCode {
    let config = Config::parse();
    let _failpoints = failpoints::arm();
    // Two are enough: workers wait most of the time, and what blocks has threads of its own.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_keep_alive(Duration::from_secs(2))
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(run(config));
            runtime.shutdown_timeout(DRAIN);
            outcome
        }
        Err(error) => Err(format!("start the runtime: {error}")),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("minipod-nodeagent: {problem}");
            ExitCode::FAILURE
        }
    }
}

async fn run(config: Config) -> Result<(), String> {
    telemetry::init().map_err(|error| report::chain(&error))?;
    let shutdown = Shutdown::on_signals().map_err(|error| format!("take signals: {error}"))?;
    let agent = Agent::new(config).map_err(|error| report::chain(&error))?;
    serve_metrics(&agent, shutdown.clone()).await.map_err(|error| report::chain(&error))?;
    agent.enforce_allocatable();
    agent.use_kept_pod_cidr().await;
    let keeper = pressure::look(&agent);
    let adopted = recover::adopt_pods(&agent);
    tracing::info!(node = agent.name, adopted, "the agent is up");
    tokio::select! {
        // Never returns.
        () = session::run(agent.clone()) => {}
        // Returns with the runtime.
        () = pressure::run(agent.clone(), keeper) => {}
        // Never returns.
        () = agent.keep_spare() => {}
        // Cancel safe: a level.
        () = shutdown.asked() => {}
    }
    agent.drain(DRAIN).await;
    tracing::info!(pods = agent.pods.count(), "the agent ends; its pods run on");
    telemetry::flush();
    Ok(())
}

/// Healthy is an agent that can make pods and tell of them.
async fn serve_metrics(agent: &Arc<Agent>, shutdown: Shutdown) -> Result<(), AgentError> {
    let registry = agent.metrics.registry.clone();
    let health = agent.clone();
    let health = move || health.health();
    let listen = agent.config.metrics_listen;
    let served = http::serve(listen, registry, Arc::new(health), shutdown).await;
    served.map(drop).map_err(|error| AgentError::Metrics(format!("{listen}: {error}")))
}
