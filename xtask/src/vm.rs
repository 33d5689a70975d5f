//! `cargo xtask vm-test`: the node's tests as root in a machine of their own, where only cgroup version 2 is mounted.
//!
//! Debian's cloud kernel in qemu, in software: `/dev/kvm` is neither needed nor used. The tests are the ones that cargo built, at the
//! same paths, on a disk image; they report on the serial console. The machine has no network but its loopback.

mod disk;
mod machine;

use crate::{
    images,
    programs::{self, Program},
    run, setup,
};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// What a whole run may take on two cores that emulate.
const WHOLE: Duration = Duration::from_secs(30 * 60);
/// What the selection of `cargo xtask test` may take, with room for a slow day.
const QUICK: Duration = Duration::from_secs(8 * 60);

/// The binaries of a node.
const BINARIES: [&str; 3] = ["minipod-podshim", "minipod-pause", "minipod-nodeagent"];

const PODSHIM: &str = "nodeagent/podshim";
const NODEAGENT: &str = "nodeagent";

/// Test programs of a package and which of their tests run.
struct Suite {
    /// The package's directory.
    dir: &'static str,
    /// A file of `tests/`, or empty for the library's own tests.
    program: &'static str,
    /// Words for the test program: its filters and what to skip.
    words: &'static [&'static str],
}

const fn suite(dir: &'static str, program: &'static str, words: &'static [&'static str]) -> Suite {
    Suite { dir, program, words }
}

/// Everything that touches cgroups, mounts or namespaces and needs no other server.
const ALL: &[Suite] = &[
    suite(PODSHIM, "", &["cgroup::"]),
    suite(PODSHIM, "containers", &[]),
    suite(PODSHIM, "containers_of_spares", &["--skip", "exchanged_for_a_link"]),
    suite(PODSHIM, "spare", &[]),
    suite(PODSHIM, "life", &[]),
    suite(PODSHIM, "exec", &[]),
    suite(PODSHIM, "attach", &[]),
    suite(PODSHIM, "users", &[]),
    suite(NODEAGENT, "life", &[]),
    suite(NODEAGENT, "spare", &[]),
    suite(NODEAGENT, "change", &[]),
    suite(NODEAGENT, "bounds", &[]),
    suite(NODEAGENT, "files", &[]),
    suite(NODEAGENT, "probes", &[]),
    suite(NODEAGENT, "streams", &[]),
    suite(NODEAGENT, "copy_debug", &[]),
    suite(NODEAGENT, "volumes", &[]),
    suite(NODEAGENT, "apparmor", &[]),
    suite(NODEAGENT, "resize", &[]),
    suite(NODEAGENT, "pressure", &[]),
    suite(NODEAGENT, "users", &[]),
];

/// What shows in a minute that version 2 works: groups, limits, out of memory, kills, leftovers.
const SELECTION: &[Suite] = &[
    suite(PODSHIM, "", &["cgroup::"]),
    // The race is half a minute of exchanging links, which is the same under both versions.
    suite(PODSHIM, "containers", &["--skip", "exchanged_for_a_link"]),
    suite(PODSHIM, "life", &[]),
    suite(PODSHIM, "spare", &[]),
    suite(PODSHIM, "users", &[]),
];

/// A node that loses its power, several times within one run.
const POWER: &[Suite] = &[suite(NODEAGENT, "power_cut", &["--ignored", "--nocapture"])];

/// Runs the suites; with filters only the tests whose names contain one of them, with `--quick` the selection, with `--power` a machine
/// whose power is cut.
///
/// # Errors
/// When something is missing, a test fails in the machine, or the machine does not end in time.
pub fn test(filters: &[&str]) -> Result<(), String> {
    match filters {
        ["--quick"] => return quick(),
        ["--power"] => return suites(POWER, &[], WHOLE, true),
        _ => {}
    }
    suites(ALL, filters, WHOLE, false)
}

/// The selection that belongs to every `cargo xtask test`.
///
/// # Errors
/// As [`test()`].
pub fn quick() -> Result<(), String> {
    suites(SELECTION, &[], QUICK, false)
}

fn suites(suites: &[Suite], filters: &[&str], bound: Duration, losing: bool) -> Result<(), String> {
    setup::install(setup::BASE)?;
    setup::install(setup::MACHINE)?;
    run::cargo(&["build", "--workspace", "--bins"])?;
    images::build_base()?;
    let built = programs::build()?;
    let programs =
        suites.iter().map(|suite| Ok((suite, executable(suite, &built)?))).collect::<Result<Vec<_>, String>>()?;
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
        let name = format!("{} {}", suite.dir, if suite.program.is_empty() { "(library)" } else { suite.program });
        let _ = writeln!(script, "echo '==> in the machine: {name}'");
        let _ = writeln!(script, "cd {}", quoted(&run::root().join(suite.dir).to_string_lossy()));
        let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
        let _ =
            writeln!(script, "{} --test-threads=2 {} || status=1", quoted(&program.to_string_lossy()), words.join(" "));
    }
    script.push_str("end $status\n");
    let work = Work::new()?;
    let mut files: Vec<PathBuf> = chosen.iter().map(|(_, program, _)| program.clone()).collect();
    files.extend(BINARIES.iter().map(|name| run::bin_dir().join(name)));
    let kernel = disk::Kernel::newest()?;
    let initramfs = disk::initramfs(&kernel, &work.0)?;
    let image = disk::root(&kernel, &files, &script, losing, &work.0)?;
    let overlay = if losing { Some(disk::overlay(&image, &work.0)?) } else { None };
    let disk = overlay.as_deref().map_or(machine::Disk::Plain(&image), machine::Disk::Losing);
    machine::run(&machine::Machine { kernel: &kernel.image, initramfs: &initramfs, disk, bound })
}

/// How many tests of a program these words choose.
fn matching(program: &Path, words: &[&str]) -> Result<usize, String> {
    let mut list = Command::new(program);
    let listed = run::output(list.args(words).arg("--list"))?;
    Ok(listed.lines().filter(|line| line.ends_with(": test")).count())
}

/// The test program of a suite.
fn executable(suite: &Suite, built: &[Program]) -> Result<PathBuf, String> {
    let dir = run::root().join(suite.dir);
    let found = built.iter().find(|program| program.dir == dir && program.name == suite.program);
    let found = found.ok_or_else(|| format!("{} has no test program {:?}", suite.dir, suite.program))?;
    Ok(found.executable.clone())
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
