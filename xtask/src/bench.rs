//! `cargo xtask bench NAME`: release binaries that print one `key value` a line; here they become a table and a JSON file.

use crate::{images, run, setup};
use std::fs;
use std::process::{Command, Stdio};

/// A benchmark: its name, the binary that runs it and that binary's first arguments.
struct Bench {
    name: &'static str,
    binary: &'static str,
    arguments: &'static [&'static str],
    /// Whether it starts containers.
    images: bool,
    /// What it compares with.
    needs: &'static [setup::Need],
}

const BENCHES: &[Bench] = &[
    Bench { name: "podstart", binary: "minipod-bench", arguments: &["podstart"], images: true, needs: setup::PODMAN },
    Bench { name: "footprint", binary: "minipod-bench", arguments: &["footprint"], images: true, needs: setup::PODMAN },
    Bench { name: "density", binary: "minipod-bench", arguments: &["density"], images: true, needs: &[] },
    Bench { name: "access", binary: "minipod-bench", arguments: &["access"], images: true, needs: &[] },
    Bench { name: "scheduler", binary: "minipod-scheduler-bench", arguments: &[], images: false, needs: &[] },
    // With hollow nodes: no images, no agents.
    Bench { name: "schedule-e2e", binary: "minipod-bench", arguments: &["schedule-e2e"], images: false, needs: &[] },
    // Beside Debian's etcd, on the file system of the working directory.
    Bench { name: "store", binary: "minipod-store-bench", arguments: &[], images: false, needs: &[] },
    // A gigabyte of keys, killed and started again.
    Bench {
        name: "store-start",
        binary: "minipod-store-bench",
        arguments: &["--workloads", "start"],
        images: false,
        needs: &[],
    },
];

/// The names, for the usage.
pub fn names() -> String {
    BENCHES.iter().map(|bench| bench.name).collect::<Vec<_>>().join(", ")
}

/// Builds for release, runs one benchmark, prints a table and writes `target/bench/NAME.json`.
///
/// # Errors
/// When something cannot be installed or built, or the benchmark fails.
pub fn run(name: &str, rest: &[&str]) -> Result<(), String> {
    let known = || format!("no benchmark {name:?}: there are {}", names());
    let bench = BENCHES.iter().find(|bench| bench.name == name).ok_or_else(known)?;
    setup::install(setup::BASE)?;
    setup::install(bench.needs)?;
    run::step("build for release");
    // All of them, whatever is measured: with fewer packages cargo would choose other features and build the dependencies again.
    run::cargo(&["build", "--release", "--workspace", "--bins"])?;
    if bench.images {
        images::build_base()?;
    }
    run::step(&format!("measure {name}"));
    let mut command = Command::new(run::release_dir().join(bench.binary));
    command.args(bench.arguments).args(rest).stderr(Stdio::inherit());
    command.env("MINIPOD_BIN_DIR", run::release_dir()).env("MINIPOD_IMAGES", images::dir());
    let figures = figures(&run::output(&mut command)?)?;
    let widest = figures.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    for (key, value) in &figures {
        println!("{key:widest$}  {value:>14}");
    }
    let lines: Vec<String> = figures.iter().map(|(key, value)| format!("  \"{key}\": {value}")).collect();
    let file = run::target().join("bench").join(format!("{name}.json"));
    images::make_dir(&run::target().join("bench"))?;
    fs::write(&file, format!("{{\n{}\n}}\n", lines.join(",\n")))
        .map_err(|e| format!("write {}: {e}", file.display()))?;
    eprintln!("written to {}", file.display());
    Ok(())
}

/// The lines `key value`; anything else is an error, so that nothing is lost silently.
fn figures(output: &str) -> Result<Vec<(String, String)>, String> {
    let figure = |line: &str| {
        let pair = line.split_once(' ').filter(|(_, value)| value.parse::<f64>().is_ok_and(f64::is_finite));
        let (key, value) = pair.ok_or_else(|| format!("the benchmark printed {line:?}, want KEY NUMBER"))?;
        Ok((key.to_owned(), value.to_owned()))
    };
    output.lines().filter(|line| !line.is_empty()).map(figure).collect()
}
