//! The agent for the crash tests: `FAILPOINTS=before:spawn-shim=return` kills it there.

#[path = "main.rs"]
mod agent;

fn main() -> std::process::ExitCode {
    agent::main()
}
