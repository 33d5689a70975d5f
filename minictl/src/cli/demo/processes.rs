//! The containers' processes, as this machine's kernel sees them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use crate::local::start_ticks;

/// A process: the PID here, and the clock ticks from boot to its start; together they never name another.
pub type Process = (u32, u64);

/// Every container's own process, by container name. A container's cgroup is `…<uid>…/<container>.<attempt>`, and its own
/// process is PID 1 of its PID namespace.
pub fn of_pod(uid: &str) -> BTreeMap<String, Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let container = |entry: fs::DirEntry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let dir = entry.path();
        let groups = fs::read_to_string(dir.join("cgroup")).ok()?;
        let group = groups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).max_by_key(|path| path.len())?;
        let first = |line: &str| line.strip_prefix("NSpid:")?.split_whitespace().last().map(|inner| inner == "1");
        let status = fs::read_to_string(dir.join("status")).ok()?;
        let own = status.lines().find_map(first).unwrap_or(false);
        let (name, _attempt) = Path::new(group).file_name()?.to_str()?.rsplit_once('.')?;
        if group.contains(uid) && own { Some((name.to_owned(), (pid, start_ticks(pid)?))) } else { None }
    };
    // A process that ends while it is read is no process.
    entries.filter_map(container).collect()
}
