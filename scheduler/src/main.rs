//! `minipod-scheduler`: gives pods their nodes.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use minipod_client::{Client, Options, Servers};
use minipod_daemon::metrics::Registry;
use minipod_daemon::shutdown::Shutdown;
use minipod_daemon::{http, telemetry};
use minipod_scheduler::plan::{Profile, Settings};
use minipod_scheduler::run::{self, Pulse};
use minipod_scheduler::sim::{self, cli::Sim};

/// Gives pods their nodes. Any number may run beside each other: the API server's binding transaction is the arbiter.
/// RUST_LOG chooses what is logged (info; warn,minipod_scheduler=debug), MINIPOD_LOG_FORMAT=json how.
#[derive(Debug, Parser)]
#[command(name = "minipod-scheduler", version, about, args_conflicts_with_subcommands = true)]
struct Flags {
    #[command(subcommand)]
    command: Option<Command>,
    /// Addresses of API servers, http://HOST:PORT, separated by commas: when one is gone, the next is used.
    #[arg(long, env = "MINIPOD_SERVER", default_value = minipod_client::DEFAULT_SERVER)]
    server: Servers,
    /// Pods with this schedulerName are this scheduler's.
    #[arg(long, env = "MINIPOD_SCHEDULER_NAME", default_value = "default-scheduler")]
    name: String,
    /// spread: the emptier node first; pack: the fuller one.
    #[arg(long, env = "MINIPOD_SCHEDULER_PROFILE", default_value = "spread")]
    profile: Profile,
    /// Only the pods of one shard, as INDEX/COUNT (from 0): several schedulers of one name share the work. All pods of a group are in one
    /// shard.
    #[arg(long, env = "MINIPOD_SCHEDULER_SHARD", default_value = "0/1", value_parser = shard)]
    shard: (u32, u32),
    /// A pod or group that has waited so many seconds gets nodes held for it, so that a stream of small pods does not starve it. It
    /// helps where pods end by themselves; among pods that never do, a priority that preempts is what helps.
    #[arg(long, env = "MINIPOD_SCHEDULER_HOLD_AFTER", default_value = "30", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    hold_after_seconds: u32,
    /// Address for /healthz and /metrics.
    #[arg(long, env = "MINIPOD_SCHEDULER_METRICS_LISTEN")]
    metrics_listen: Option<SocketAddr>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Sim(Sim),
}

fn shard(text: &str) -> Result<(u32, u32), String> {
    let wrong = || format!("{text:?} is no shard: want INDEX/COUNT with INDEX below COUNT, such as 0/4");
    let (index, count) = text.split_once('/').ok_or_else(wrong)?;
    let (index, count) = index.parse().ok().zip(count.parse().ok()).ok_or_else(wrong)?;
    if index < count { Ok((index, count)) } else { Err(wrong()) }
}

fn main() -> ExitCode {
    let mut flags = Flags::parse();
    if let Some(Command::Sim(sim)) = flags.command.take() {
        return end(sim::cli::run(sim));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = match runtime {
        Ok(runtime) => runtime.block_on(serve(flags)),
        Err(error) => Err(format!("start the runtime: {error}")),
    };
    end(done)
}

fn end(done: Result<(), String>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("minipod-scheduler: {problem}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(flags: Flags) -> Result<(), String> {
    telemetry::init().map_err(|error| error.to_string())?;
    let shutdown = Shutdown::on_signals().map_err(|error| format!("listen to signals: {error}"))?;
    let client = Client::new(&Options::from(flags.server.clone())).map_err(|error| error.to_string())?;
    let (registry, pulse) = (Arc::new(Registry::default()), Arc::new(Pulse::default()));
    if let Some(address) = flags.metrics_listen {
        let health = Arc::clone(&pulse);
        http::serve(address, Arc::clone(&registry), Arc::new(move || health.check()), shutdown.clone())
            .await
            .map_err(|error| format!("listen on {address} for /healthz and /metrics: {error}"))?;
    }
    let settings = Settings {
        name: flags.name,
        shard: flags.shard,
        profile: flags.profile,
        hold_after_ms: i64::from(flags.hold_after_seconds) * 1000,
    };
    tracing::info!(name = %settings.name, server = %flags.server, "scheduling");
    run::run(client, settings, &registry, pulse, shutdown).await;
    telemetry::flush();
    Ok(())
}
