//! `cargo xtask vm-test`: the node's tests as root in a machine of their own, where only cgroup version 2 is mounted.
//!
//! Debian's cloud kernel in qemu, in software: `/dev/kvm` is neither needed nor used. The tests are the ones that cargo built, at the
//! same paths, on a disk image; they report on the serial console. The machine has no network but its loopback.

mod disk;
mod machine;

use crate::{images, run, setup};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// What a whole run may take on two cores that emulate.
const WHOLE: Duration = Duration::from_secs(30 * 60);
/// What the selection of `cargo xtask test` may take, with room for a slow day.
const QUICK: Duration = Duration::from_secs(8 * 60);

/// Packages of a node, each with a binary of its name; podshim's tests do without the last.
const BINARIES: [&str; 3] = ["minipod-podshim", "minipod-pause", "minipod-nodeagent"];

/// Test programs of a package and which of their tests run.
struct Suite {
    package: &'static str,
    /// A file of `tests/`, or empty for the library's own tests.
    program: &'static str,
    /// Words for the test program: its filters and what to skip.
    words: &'static [&'static str],
}

const fn suite(package: &'static str, program: &'static str, words: &'static [&'static str]) -> Suite {
    Suite { package, program, words }
}

/// Everything that touches cgroups, mounts or namespaces and needs no other server.
const ALL: &[Suite] = &[
    suite("minipod-podshim", "", &["cgroup::"]),
    suite("minipod-podshim", "containers", &[]),
    suite("minipod-podshim", "life", &[]),
    suite("minipod-podshim", "exec", &[]),
    suite("minipod-podshim", "attach", &[]),
    suite("minipod-podshim", "users", &[]),
    suite("minipod-nodeagent", "life", &[]),
    suite("minipod-nodeagent", "probes", &[]),
    suite("minipod-nodeagent", "streams", &[]),
    suite("minipod-nodeagent", "copy_debug", &[]),
    suite("minipod-nodeagent", "volumes", &[]),
    suite("minipod-nodeagent", "resize", &[]),
    suite("minipod-nodeagent", "pressure", &[]),
    suite("minipod-nodeagent", "users", &[]),
];

/// What shows in a minute that version 2 works: groups, limits, out of memory, kills, leftovers.
const SELECTION: &[Suite] = &[
    suite("minipod-podshim", "", &["cgroup::"]),
    // The race is half a minute of exchanging links, which is the same under both versions.
    suite("minipod-podshim", "containers", &["--skip", "exchanged_for_a_link"]),
    suite("minipod-podshim", "life", &[]),
];

/// Runs the suites; with filters only the tests whose names contain one of them, with `--quick` the selection.
///
/// # Errors
/// When something is missing, a test fails in the machine, or the machine does not end in time.
pub fn test(filters: &[&str]) -> Result<(), String> {
    if filters == ["--quick"] {
        return quick();
    }
    suites(ALL, filters, WHOLE)
}

/// The selection that belongs to every `cargo xtask test`.
///
/// # Errors
/// As [`test()`].
pub fn quick() -> Result<(), String> {
    suites(SELECTION, &[], QUICK)
}

fn binaries(suites: &[Suite]) -> &'static [&'static str] {
    if suites.iter().any(|suite| suite.package == BINARIES[2]) { &BINARIES } else { &BINARIES[..2] }
}

fn prepare(binaries: &[&str]) -> Result<(), String> {
    setup::install(setup::BASE)?;
    setup::install(setup::MACHINE)?;
    let mut build = vec!["build", "--bins"];
    build.extend(binaries.iter().flat_map(|name| ["--package", name]));
    run::cargo(&build)?;
    images::build_all()
}

fn suites(suites: &[Suite], filters: &[&str], bound: Duration) -> Result<(), String> {
    let binaries = binaries(suites);
    prepare(binaries)?;
    let programs = suites.iter().map(|suite| Ok((suite, executable(suite)?))).collect::<Result<Vec<_>, String>>()?;
    // A program without a test to run has nothing to say; a run without any would be a success that says nothing.
    let mut chosen = Vec::new();
    for (suite, program) in programs {
        let words = if filters.is_empty() { suite.words } else { filters };
        if matching(&program, words)? > 0 {
            chosen.push((suite, program, words));
        }
    }
    if chosen.is_empty() {
        return Err(format!("no test of the node's suites has {} in its name", filters.join(" or ")));
    }
    let mut script = String::from("status=0\n");
    for (suite, program, words) in &chosen {
        let name = format!("{} {}", suite.package, if suite.program.is_empty() { "(library)" } else { suite.program });
        let _ = writeln!(script, "echo '==> in the machine: {name}'");
        let _ = writeln!(script, "cd {}", quoted(&manifest_dir(suite.package).to_string_lossy()));
        let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
        let _ =
            writeln!(script, "{} --test-threads=2 {} || status=1", quoted(&program.to_string_lossy()), words.join(" "));
    }
    script.push_str("end $status\n");
    let work = Work::new()?;
    let mut files: Vec<PathBuf> = chosen.iter().map(|(_, program, _)| program.clone()).collect();
    files.extend(binaries.iter().map(|name| run::bin_dir().join(name)));
    let kernel = disk::Kernel::newest()?;
    let initramfs = disk::initramfs(&kernel, &work.0)?;
    let image = disk::root(&kernel, &files, &script, &work.0)?;
    machine::run(&machine::Machine { kernel: &kernel.image, initramfs: &initramfs, disk: &image, bound })
}

/// How many tests of a program these words choose.
fn matching(program: &Path, words: &[&str]) -> Result<usize, String> {
    let mut list = Command::new(program);
    let listed = run::output(list.args(words).arg("--list"))?;
    Ok(listed.lines().filter(|line| line.ends_with(": test")).count())
}

/// The test program that cargo makes of a suite; cargo names it on standard error.
fn executable(suite: &Suite) -> Result<PathBuf, String> {
    let which: &[&str] = if suite.program.is_empty() { &["--lib"] } else { &["--test", suite.program] };
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["test", "--no-run", "--package", suite.package]).args(which).current_dir(run::root());
    let built = build.stdin(Stdio::null()).output().map_err(|e| format!("start cargo test --no-run: {e}"))?;
    let said = String::from_utf8_lossy(&built.stderr);
    if !built.status.success() {
        return Err(format!("building the tests of {} failed: {}\n{said}", suite.package, built.status));
    }
    let named = said.lines().rev().find_map(|line| line.trim().strip_prefix("Executable ")?.rsplit_once('('));
    let path = named.and_then(|(_, path)| path.strip_suffix(')'));
    let path = path.ok_or_else(|| format!("cargo test --no-run names no executable:\n{said}"))?;
    Ok(run::root().join(path))
}

fn manifest_dir(package: &str) -> PathBuf {
    match package {
        "minipod-podshim" => run::root().join("nodeagent/podshim"),
        _ => run::root().join("nodeagent"),
    }
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// A directory for one run's images, removed with it.
struct Work(PathBuf);

impl Work {
    fn new() -> Result<Self, String> {
        let dir = run::target().join(format!("vm/{}", std::process::id()));
        std::fs::create_dir_all(&dir).map_err(|e| format!("create {}: {e}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("remove {}: {error}", self.0.display());
        }
    }
}

/// Copies a file to the same path below `root`, with the directories on the way.
fn copy_into(root: &Path, file: &Path) -> Result<PathBuf, String> {
    let place = root.join(file.strip_prefix("/").unwrap_or(file));
    disk::make_dir(place.parent().unwrap_or(root))?;
    std::fs::copy(file, &place).map_err(|e| format!("copy {} to {}: {e}", file.display(), place.display()))?;
    Ok(place)
}
