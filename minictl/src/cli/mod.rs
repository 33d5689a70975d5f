//! The commands of minictl.

/// A line on standard error. One that cannot be written is lost: there is nobody left to tell.
macro_rules! note {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($words)*);
    }};
}

/// A line of narration on standard output, where the end of the reader must not end the work.
macro_rules! tell {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stdout(), $($words)*);
    }};
}

mod access;
mod apply;
mod args;
mod config;
mod cp;
mod debug;
mod delete;
mod demo;
mod error;
mod evict;
mod fit;
mod forward;
mod get;
mod image;
mod inspect;
mod logs;
mod node;
mod resize;
mod session;
mod sources;
mod store;
mod target;
mod terminal;
mod up;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command};
use error::CliError;
use session::Session;

/// Parses the command line, does what it says, prints what went wrong with a hint.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // clap knows whether this is help (standard output, 0) or a mistake (standard error, 2).
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            note!("error: start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = runtime.block_on(run(cli));
    // A thread that waits for standard input must not hold up the end.
    runtime.shutdown_background();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error.report();
            error.exit_code()
        }
    }
}

async fn run(cli: Cli) -> Result<(), CliError> {
    let Cli { global, command } = cli;
    match command {
        Command::Config(command) => config::run(&global, command),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "minictl", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
        Command::Demo(options) => demo::run(&options).await,
        Command::Up(options) => up::up(&options).await,
        Command::Down => up::down(),
        Command::Store(command) => store::run(&global, command).await,
        command => connected(&Session::new(&global)?, command).await,
    }
}

/// The commands that talk to an API server.
async fn connected(session: &Session, command: Command) -> Result<(), CliError> {
    match command {
        Command::Apply(options) => apply::apply(session, &options).await,
        Command::Create(options) => apply::create(session, &options).await,
        Command::Get(options) => get::run(session, &options).await,
        Command::Describe(options) => inspect::describe(session, &options).await,
        Command::Why { pod, output } => inspect::why(session, &pod, output).await,
        Command::Fit(options) => fit::run(session, &options).await,
        Command::Delete(options) => delete::run(session, &options).await,
        Command::Resize(options) => resize::run(session, &options).await,
        Command::Logs(options) => logs::logs(session, &options).await,
        Command::PortForward(options) => forward::forward(session, &options).await,
        Command::Exec(options) => access::exec(session, &options).await,
        Command::Attach(options) => access::attach(session, &options).await,
        Command::Cp(options) => cp::copy(session, &options).await,
        Command::Debug(options) => debug::debug(session, &options).await,
        Command::Image(command) => image::run(session, &command).await,
        Command::Node(command) => node::run(session, &command).await,
        Command::Cordon { nodes } => node::cordon(session, &nodes, true).await,
        Command::Uncordon { nodes } => node::cordon(session, &nodes, false).await,
        Command::Evict(options) => evict::evict(session, &options).await,
        Command::Drain(options) => evict::drain(session, &options).await,
        Command::Version => inspect::version(session).await,
        Command::Config(_)
        | Command::Completion { .. }
        | Command::Demo(_)
        | Command::Up(_)
        | Command::Down
        | Command::Store(_) => Ok(()),
    }
}

/// Data on standard output. A reader that has gone (`| head`) is the end, and no error.
fn print(data: &str) -> Result<(), CliError> {
    print_bytes(data.as_bytes())
}

fn print_bytes(data: &[u8]) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    out.write_all(data).and_then(|()| out.flush()).map_err(CliError::output)
}

/// The time on this machine.
fn now() -> minipod_proto::v1::Time {
    std::time::SystemTime::now().into()
}
