//! What the kernel says of pods: /proc and /sys, seen from the host.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A living process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// In the host's PID namespace.
    pub pid: u32,
    /// In its own PID namespace: 1 for a container's own process.
    pub inner_pid: u32,
    /// Clock ticks since boot (proc(5), field 22 of stat): with the PID it names a process for ever.
    pub start_ticks: u64,
    /// Its arguments, separated by blanks.
    pub command: String,
    /// Namespace inodes by name: net, mnt, pid, ipc, uts.
    pub namespaces: BTreeMap<&'static str, u64>,
    /// The path below a cgroup hierarchy's root.
    pub cgroup: String,
}

const NAMESPACES: [&str; 5] = ["net", "mnt", "pid", "ipc", "uts"];

/// All processes whose cgroup path has `part` in it: a pod's uid, or the root of a node's pods. Zombies do not count.
pub fn processes_in_cgroup(part: &str) -> Vec<Process> {
    processes(|process| process.cgroup.contains(part))
}

/// All processes whose arguments have `part` in them.
pub fn processes_with_argument(part: &str) -> Vec<Process> {
    processes(|process| process.command.contains(part))
}

/// The own process of each container of a pod, by container name. Relies on the cgroup's path, `…<uid>/<container>.<attempt>`.
pub fn containers(uid: &str) -> BTreeMap<String, Process> {
    let own = processes_in_cgroup(uid).into_iter().filter(|process| process.inner_pid == 1);
    let name = |process: &Process| {
        let last = process.cgroup.rsplit('/').next().unwrap_or_default();
        last.rsplit_once('.').map_or(last, |(name, _attempt)| name).to_owned()
    };
    own.map(|process| (name(&process), process)).collect()
}

fn processes(keep: impl Fn(&Process) -> bool) -> Vec<Process> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // A process that ends while it is read is no process.
    let mut found: Vec<Process> = pids.filter_map(process).filter(keep).collect();
    found.sort_by_key(|process| process.pid);
    found
}

fn process(pid: u32) -> Option<Process> {
    let dir = PathBuf::from(format!("/proc/{pid}"));
    let stat = fs::read_to_string(dir.join("stat")).ok()?;
    // The name in parentheses may hold anything; the fields begin behind the last one.
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().collect();
    if *fields.first()? == "Z" {
        return None;
    }
    let status = fs::read_to_string(dir.join("status")).ok()?;
    let inner = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()?;
    let arguments = fs::read(dir.join("cmdline")).ok()?;
    let command = String::from_utf8_lossy(&arguments).replace('\0', " ").trim_end().to_owned();
    let namespaces = NAMESPACES.into_iter().filter_map(|name| Some((name, namespace(&dir, name)?))).collect();
    Some(Process {
        pid,
        inner_pid: inner.parse().ok()?,
        start_ticks: fields.get(19)?.parse().ok()?,
        command,
        namespaces,
        cgroup: cgroup(&dir)?,
    })
}

fn namespace(dir: &Path, name: &str) -> Option<u64> {
    let link = fs::read_link(dir.join("ns").join(name)).ok()?;
    link.to_str()?.split(['[', ']']).nth(1)?.parse().ok()
}

/// The deepest path that any hierarchy has for the process.
fn cgroup(dir: &Path) -> Option<String> {
    let text = fs::read_to_string(dir.join("cgroup")).ok()?;
    text.lines().filter_map(|line| line.splitn(3, ':').nth(2)).max_by_key(|path| path.len()).map(str::to_owned)
}

/// Proportional set size of a process and its heap and mappings, kB (proc(5), smaps_rollup).
pub fn pss_kb(pid: u32) -> Option<u64> {
    kilobytes(&format!("/proc/{pid}/smaps_rollup"), "Pss:")
}

/// Resident set size of a process, kB.
pub fn rss_kb(pid: u32) -> Option<u64> {
    kilobytes(&format!("/proc/{pid}/status"), "VmRSS:")
}

/// User and system time of a process, clock ticks (1/100 s).
pub fn cpu_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().collect();
    Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
}

fn kilobytes(path: &str, key: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

/// Whatever of a pod is left anywhere: processes, cgroups, mounts of this namespace, files below `roots`.
pub fn remains(uid: &str, roots: &[&Path]) -> Vec<String> {
    let mut left: Vec<String> =
        processes_in_cgroup(uid).iter().map(|process| format!("process {} {}", process.pid, process.command)).collect();
    left.extend(processes_with_argument(uid).iter().map(|p| format!("process {} {}", p.pid, p.command)));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    left.extend(mounts.lines().filter(|line| line.contains(uid)).map(|line| format!("mount {line}")));
    for root in roots.iter().copied().chain([Path::new("/sys/fs/cgroup")]) {
        find_named(root, uid, 6, &mut left);
    }
    left
}

/// All cgroups, in every hierarchy.
pub fn cgroup_directories() -> Vec<String> {
    let (mut found, mut dirs) = (Vec::new(), vec![PathBuf::from("/sys/fs/cgroup")]);
    while let Some(dir) = dirs.pop() {
        let entries = fs::read_dir(&dir).into_iter().flatten().flatten();
        dirs.extend(
            entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()),
        );
        found.push(format!("cgroup {}", dir.display()));
    }
    found
}

/// Paths below `dir` whose last part has `part` in it.
fn find_named(dir: &Path, part: &str, depth: usize, found: &mut Vec<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().contains(part) {
            found.push(format!("file {}", path.display()));
        } else if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            find_named(&path, part, depth - 1, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_found_with_its_facts() {
        let me = process(std::process::id()).expect("it lives");
        assert_eq!(me.namespaces.len(), NAMESPACES.len(), "{me:?}");
        assert!(me.start_ticks > 0 && me.command.contains("minipod_tests"), "{me:?}");
        assert!(processes_with_argument("minipod_tests").contains(&me));
        assert!(rss_kb(me.pid) >= pss_kb(me.pid).map(|pss| pss / 2), "RSS counts what PSS shares out");
        assert!(cpu_ticks(me.pid).is_some());
    }

    #[test]
    fn remains_are_found_by_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let uid = "0c0ffee0-dead-beef-0000-000000000001";
        assert_eq!(remains(uid, &[dir.path()]), Vec::<String>::new());
        fs::create_dir_all(dir.path().join("pods").join(uid)).expect("made");
        assert_eq!(remains(uid, &[dir.path()]).len(), 1);
    }
}
