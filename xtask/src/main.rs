//! What a person or CI types: `cargo xtask demo`, `cargo xtask test`. Standard library only, so that it builds in a second.

mod bench;
mod compose;
mod fuzz;
mod images;
mod programs;
mod run;
mod setup;
mod suite;
mod vm;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  demo [--keep] [--fast]  set up, build, start a cluster on this machine, run the examples, take it down (--keep: leave it up)
  test [FILTER]           everything CI runs; with FILTER only the tests whose names contain it
  vm-test [FILTER...]     the node's tests as root in a virtual machine that has cgroup version 2 alone (--quick: CI's selection;
                         --power: one whose power is cut)
  setup                   install the Debian packages that are missing
  images                  build target/images/*.oci.tar from Debian's packages, those of the example tomcat-war too
  bench NAME              run a benchmark on release binaries; without a right NAME it says which there are
  fuzz NAME [--minutes N] throw inputs at manifest, layer, image_config or shim_protocol (10 minutes)
  compose up|test [--store embedded|etcd]   the cluster of deploy/compose.yaml, in containers
  compose down            takes it down, whichever store it has
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args.as_slice() {
        ["demo", flags @ ..] => demo(flags),
        ["test", filter @ ..] => suite::test(filter),
        ["vm-test", filters @ ..] => vm::test(filters),
        ["setup"] => setup::install(setup::BASE),
        ["images"] => setup::install(setup::BASE).and_then(|()| images::build_all()),
        ["bench", name, rest @ ..] => bench::run(name, rest),
        ["fuzz", name, flags @ ..] => fuzz::run(name, flags),
        ["cases", directory] => cases(directory),
        ["compose", "down"] => compose::run("down", compose::Store::Embedded),
        ["compose", verb @ ("up" | "test"), flags @ ..] => {
            compose::Store::of(flags).and_then(|store| compose::run(verb, store))
        }
        [] | ["help" | "-h" | "--help"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        other => Err(format!("no such command: {}\n\n{USAGE}", other.join(" "))),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("xtask: {problem}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a directory of scheduling cases; the scheduler's own runner prints id and verdict.
fn cases(directory: &str) -> Result<(), String> {
    run::cargo(&["build", "--workspace", "--bin", "minipod-scheduler-cases"])?;
    run::command(std::process::Command::new(run::bin_dir().join("minipod-scheduler-cases")).arg(directory))
}

/// Set up, build, and let `minictl demo` do the rest.
pub(crate) fn demo(flags: &[&str]) -> Result<(), String> {
    for flag in flags {
        if !["--keep", "--fast"].contains(flag) {
            return Err(format!("demo: unknown flag {flag}: only --keep and --fast are known"));
        }
    }
    setup::install(setup::BASE)?;
    run::step("build the binaries");
    run::cargo(&["build", "--workspace", "--bins"])?;
    images::build_base()?;
    let root = run::root();
    let mut demo = std::process::Command::new(run::bin_dir().join("minictl"));
    demo.arg("demo").args(flags);
    demo.arg("--bin-dir").arg(run::bin_dir());
    demo.arg("--images").arg(images::dir());
    demo.arg("--examples").arg(root.join("deploy/examples"));
    run::command(&mut demo)
}
