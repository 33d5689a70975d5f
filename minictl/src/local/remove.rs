//! Takes a cluster down: its processes, pods, network, cgroups, mounts and files.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::error::LocalError;
use super::slot::Slot;
use super::{network, process};

/// How long a daemon may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// How long the kernel may take to end what was killed, and to give its cgroups free.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(10);

/// Removes everything of a cluster, whatever state it is in.
///
/// # Errors
/// [`LocalError::Remains`] names what stays.
pub fn remove(slot: &Slot) -> Result<(), LocalError> {
    end_daemons(slot);
    end_pods(slot);
    let mut remains = network::remove(slot);
    remains.extend(remove_cgroups(slot));
    remains.extend(unmount(&[slot.run(), slot.data()]));
    for dir in [slot.data(), slot.run()] {
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != ErrorKind::NotFound => remains.push(format!("{}: {error}", dir.display())),
            _ => {}
        }
    }
    if remains.is_empty() { Ok(()) } else { Err(LocalError::Remains(remains.join("\n"))) }
}

/// Removes the clusters that nobody owns any more: kept ones when `kept` is true, and those of crashed owners. Answers their numbers.
///
/// # Errors
/// As [`remove`].
pub fn remove_abandoned(kept: bool) -> Result<Vec<u8>, LocalError> {
    let keepers: Vec<u8> = super::kept().into_iter().map(|(number, _)| number).collect();
    let mut removed = Vec::new();
    for number in Slot::used() {
        if !kept && keepers.contains(&number) {
            continue;
        }
        if let Some(slot) = Slot::lock(number)? {
            remove(&slot)?;
            removed.push(number);
        }
    }
    Ok(removed)
}

fn end_daemons(slot: &Slot) {
    let daemons = slot.noted_processes();
    let living =
        || daemons.iter().filter(|(pid, start)| process::start_ticks(*pid) == Some(*start)).map(|(pid, _)| *pid);
    living().for_each(|pid| process::signal(pid, "TERM"));
    if !wait(GRACE, || living().next().is_none()) {
        living().for_each(|pid| process::signal(pid, "KILL"));
        wait(KILL_PATIENCE, || living().next().is_none());
    }
}

/// Supervisors outlive their agents on purpose, and containers their supervisors; they are known by this cluster's paths.
fn end_pods(slot: &Slot) {
    let run = format!("{}/", slot.run().display());
    let supervisors = || process::all().into_iter().filter(|(_, command)| command.contains(&run)).map(|(pid, _)| pid);
    let contained = || cgroups(slot).iter().flat_map(|dir| members(dir)).collect::<Vec<u32>>();
    wait(KILL_PATIENCE, || {
        let left: Vec<u32> = supervisors().filter(|pid| *pid != std::process::id()).chain(contained()).collect();
        left.iter().for_each(|pid| process::signal(*pid, "KILL"));
        left.is_empty()
    });
}

/// The roots of the nodes' pods in every hierarchy.
fn cgroups(slot: &Slot) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let hierarchy = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        after.starts_with("cgroup").then(|| before.split(' ').nth(4).map(PathBuf::from))?
    };
    let prefix = slot.cgroup_prefix();
    let mut roots = Vec::new();
    for hierarchy in mounts.lines().filter_map(hierarchy) {
        for entry in fs::read_dir(hierarchy).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if network::is_numbered(&name, &prefix) {
                roots.push(entry.path());
            }
        }
    }
    roots
}

/// PIDs in a cgroup and those below it.
fn members(dir: &Path) -> Vec<u32> {
    let mut pids: Vec<u32> = fs::read_to_string(dir.join("cgroup.procs"))
        .map(|text| text.lines().filter_map(|line| line.parse().ok()).collect())
        .unwrap_or_default();
    for child in child_dirs(dir) {
        pids.extend(members(&child));
    }
    pids
}

fn child_dirs(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

fn remove_cgroups(slot: &Slot) -> Vec<String> {
    let gone = |dir: &Path| {
        fn remove(dir: &Path) {
            child_dirs(dir).iter().for_each(|child| remove(child));
            // Busy for a moment after its last process: tried again until it works.
            let _ = fs::remove_dir(dir);
        }
        remove(dir);
        !dir.exists()
    };
    let stays = |dir: &PathBuf| !wait(KILL_PATIENCE, || gone(dir));
    cgroups(slot).into_iter().filter(stays).map(|dir| format!("cgroup {}", dir.display())).collect()
}

/// Unmounts everything below `roots`, the deepest first.
fn unmount(roots: &[PathBuf]) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut ours: Vec<PathBuf> = points.filter(|point| roots.iter().any(|root| point.starts_with(root))).collect();
    ours.sort();
    let failed = |point: PathBuf| {
        let status = Command::new("umount").arg("--lazy").arg(&point).status();
        (!status.is_ok_and(|status| status.success())).then(|| format!("mount {}", point.display()))
    };
    ours.into_iter().rev().filter_map(failed).collect()
}

/// Whether `done` became true in time.
fn wait(patience: Duration, mut done: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if done() {
            return true;
        }
        if start.elapsed() > patience {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
}
