//! `cargo xtask bench NAME`: the benchmarks of the tests crate on release binaries.

use crate::{images, run, setup};
use std::process::Command;

/// Builds for release and runs one benchmark, which prints one `key value` per line.
///
/// # Errors
/// When something cannot be installed or built, or the benchmark fails.
pub fn run(name: &str, rest: &[&str]) -> Result<(), String> {
    setup::install(setup::BASE)?;
    if name == "podstart" {
        setup::install(setup::PODMAN)?;
    }
    run::step("build for release");
    run::cargo(&["build", "--release", "--workspace", "--bins"])?;
    images::build_all()?;
    let mut bench = Command::new(run::release_dir().join("minipod-bench"));
    bench.arg(name).args(rest).env("MINIPOD_BIN_DIR", run::release_dir()).env("MINIPOD_IMAGES", images::dir());
    run::command(&mut bench)
}
