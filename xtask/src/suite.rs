//! Everything CI runs, in the order of what fails fastest. Each stage prints how long it took.

use crate::{compose, images, programs, run, setup, vm};
use std::process::Command;
use std::time::Instant;

/// `cargo xtask test [FILTER]`. With a filter only what the tests need is built, then the matching tests run.
///
/// # Errors
/// The first stage that fails.
pub fn test(filter: &[&str]) -> Result<(), String> {
    let all = filter.is_empty();
    let start = Instant::now();
    stage("set up", || setup::install(setup::BASE))?;
    if all {
        stage("formatting", || run::cargo(&["fmt", "--all", "--check"]))?;
        stage("lints", || run::cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    }
    stage("binaries", || run::cargo(&["build", "--workspace", "--bins"]))?;
    stage("images", images::build_all)?;
    if all {
        stage("documentation", documentation)?;
        stage("the demo", || crate::demo(&["--fast"]))?;
        stage("the cluster in containers", || compose::run("test", compose::Store::Embedded))?;
        stage("the cluster in containers, on etcd", || compose::run("test", compose::Store::Etcd))?;
        stage("a node with cgroup version 2", vm::quick)?;
    }
    let mut args = vec!["test", "--workspace"];
    if !all {
        args.push("--");
        args.extend(filter);
    }
    if all {
        // The clusters of the other runs keep their objects in the embedded store.
        stage("whole clusters on etcd", on_etcd)?;
    }
    // Last, so that cargo's own closing lines end the output.
    let tested = stage("tests", || run::cargo(&args));
    eprintln!("==> all stages: {:.0} s", start.elapsed().as_secs_f64());
    tested
}

/// The end-to-end tests once more, with Debian's etcd as the store.
fn on_etcd() -> Result<(), String> {
    let of_clusters = run::root().join("tests");
    for program in programs::build()?.iter().filter(|program| program.dir == of_clusters && !program.name.is_empty()) {
        run::step(&format!("on etcd: {}", program.name));
        let mut tests = Command::new(&program.executable);
        run::command(tests.current_dir(&program.dir).env("MINIPOD_TEST_STORE", "etcd"))?;
    }
    Ok(())
}

/// rustdoc finds links that lead nowhere. Private items are documented too, so links to them lead somewhere.
fn documentation() -> Result<(), String> {
    let flags = [("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links")];
    run::cargo_with(&["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"], &flags)
}

fn stage(name: &str, work: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let start = Instant::now();
    run::step(name);
    let done = work();
    let verdict = if done.is_ok() { "done" } else { "FAILED" };
    eprintln!("==> {name}: {verdict} after {:.1} s", start.elapsed().as_secs_f64());
    done.map_err(|e| format!("{name}: {e}"))
}
