//! `minipod-scheduler-cases DIR`: runs every `*.jsonl` file of a directory through the scheduler; prints id and verdict per case, and a total.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use minipod_scheduler::cases;

/// Runs cases of scheduling facts (see scheduler/testdata/README.md).
#[derive(Debug, Parser)]
struct Flags {
    /// Directory with *.jsonl files.
    directory: PathBuf,
}

fn main() -> ExitCode {
    match cases::run_directory(&Flags::parse().directory) {
        Ok(verdicts) => {
            print!("{}", cases::report(&verdicts));
            if verdicts.iter().all(|verdict| verdict.difference.is_none()) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            eprintln!("minipod-scheduler-cases: {error}");
            ExitCode::FAILURE
        }
    }
}
