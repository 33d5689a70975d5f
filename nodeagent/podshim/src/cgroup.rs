//! A pod's cgroups: `<root>/<uid>/<container>.<attempt>` and `<root>/<uid>/pause`, in every hierarchy that we use.
//!
//! Version 2 is used when its tree has the memory and pids controllers; otherwise version 1 with what of cpu, memory, pids
//! and cpuset is mounted. Every hierarchy costs a directory, a join and a removal for each container, under locks that the whole
//! machine shares, so the freezer is used only where there is no pids controller to stop forks with. The supervisor stays in the group of its parent, outside the pod's.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::process::Pidfd;
use crate::protocol::Limits;

/// Controllers of version 1 that we use. cpuset only where it is asked for: a new group of it has no processors at all.
const V1_CONTROLLERS: [&str; 5] = ["cpu", "memory", "pids", "freezer", "cpuset"];
/// Controllers of version 2 that we hand down.
const V2_CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "cpuset"];
/// How long killed processes may take to leave their group. They leave it in their exit, so only a process that hangs in
/// the kernel takes longer.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);
const DEFAULT_PERIOD_US: u64 = 100_000;

/// A cgroup operation failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}", path.display())]
pub struct CgroupError {
    /// What was tried.
    pub operation: &'static str,
    /// On what.
    pub path: PathBuf,
    /// The system's answer.
    #[source]
    pub source: io::Error,
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError { operation, path, source }
}

/// The hierarchies of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cgroups {
    /// Controllers and where they are mounted.
    V1(Vec<(&'static str, PathBuf)>),
    /// Where the one tree is mounted.
    V2(PathBuf),
}

impl Cgroups {
    /// Looks at what is mounted.
    ///
    /// # Errors
    /// When no usable hierarchy is mounted.
    pub fn detect() -> Result<Self, CgroupError> {
        let path = Path::new("/proc/self/mountinfo");
        let mounts = fs::read_to_string(path).map_err(failed("read", path))?;
        let none = || io::Error::new(io::ErrorKind::NotFound, "no cgroup hierarchy is mounted");
        let controllers = |mount: &Path| fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
        Self::from_mounts(&mounts, controllers).ok_or_else(none).map_err(failed("find cgroups in", path))
    }

    fn from_mounts(mounts: &str, v2_controllers: impl Fn(&Path) -> String) -> Option<Self> {
        let mut v1: Vec<(&'static str, PathBuf)> = Vec::new();
        let mut v2 = None;
        for line in mounts.lines() {
            let Some((head, tail)) = line.split_once(" - ") else { continue };
            let Some(point) = head.split(' ').nth(4).map(PathBuf::from) else { continue };
            let mut tail = tail.split(' ');
            let (kind, options) = (tail.next().unwrap_or(""), tail.nth(1).unwrap_or(""));
            match kind {
                "cgroup2" if v2.is_none() => v2 = Some(point),
                "cgroup" => {
                    for name in V1_CONTROLLERS {
                        let new = v1.iter().all(|(known, _)| *known != name);
                        if new && options.split(',').any(|option| option == name) {
                            v1.push((name, point.clone()));
                        }
                    }
                }
                _ => {}
            }
        }
        let has = |text: &str, name: &str| text.split_ascii_whitespace().any(|word| word == name);
        if v1.iter().any(|(name, _)| *name == "pids") {
            v1.retain(|(name, _)| *name != "freezer");
        }
        let full = v2.filter(|point| {
            let text = v2_controllers(point);
            has(&text, "memory") && has(&text, "pids")
        });
        match full {
            Some(point) => Some(Self::V2(point)),
            None if v1.is_empty() => None,
            None => Some(Self::V1(v1)),
        }
    }

    /// The group of a pod below the group `root`.
    #[must_use]
    pub fn pod(&self, root: &str, uid: &str) -> Group {
        self.all(root).child(uid)
    }

    /// The group `root`, which holds all pods.
    #[must_use]
    pub fn all(&self, root: &str) -> Group {
        let at = |point: &PathBuf| point.join(root);
        match self {
            Self::V1(points) => Group { v2: false, dirs: points.iter().map(|(name, p)| (*name, at(p))).collect() },
            Self::V2(point) => Group { v2: true, dirs: vec![("", at(point))] },
        }
    }
}

/// What a new process needs to be in a group from its beginning.
#[derive(Debug, Default)]
pub struct Joins {
    /// Version 2: the group's directory, for clone3.
    pub into: Option<OwnedFd>,
    /// Version 1: each hierarchy's `tasks`; the process, of one thread, writes `0` there. Not `cgroup.procs`: that takes a lock which all
    /// forks and exits of the machine share, and waits for an RCU grace period first, some 10 ms. A thread that moves itself needs neither.
    pub tasks: Vec<OwnedFd>,
}

/// One group in all hierarchies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    v2: bool,
    dirs: Vec<(&'static str, PathBuf)>,
}

impl Group {
    /// A group within this one.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self { v2: self.v2, dirs: self.dirs.iter().map(|(controller, dir)| (*controller, dir.join(name))).collect() }
    }

    /// Its directories that exist, each with the controller it is for (empty: all, version 2).
    #[must_use]
    pub fn directories(&self) -> Vec<(String, PathBuf)> {
        let there = self.dirs.iter().filter(|(_, dir)| dir.is_dir());
        there.map(|(controller, dir)| ((*controller).to_owned(), dir.clone())).collect()
    }

    /// Makes the group with its limits; one that is there already gets the limits.
    ///
    /// # Errors
    /// When a directory cannot be made or a limit cannot be set.
    pub fn create(&self, limits: &Limits) -> Result<(), CgroupError> {
        let mut killed = None;
        for (controller, dir) in &self.dirs {
            if *controller == "cpuset" && limits.cpuset_cpus.is_empty() && limits.cpuset_mems.is_empty() {
                continue;
            }
            if self.v2 {
                create_v2(dir)?;
            } else if !create_v1(dir)? && *controller == "pids" && limits.pids_limit.is_none() {
                killed = Some(dir.join("pids.max"));
            }
        }
        self.set(limits)?;
        // A group that was killed and is used again may fork again.
        killed.map_or(Ok(()), |path| put(&path, "max").map_err(failed("set", &path)))
    }

    /// Sets limits of a group that exists.
    ///
    /// # Errors
    /// At the first that cannot be set.
    pub fn set(&self, limits: &Limits) -> Result<(), CgroupError> {
        for (controller, dir) in &self.dirs {
            for setting in settings_of(controller, self.v2, limits) {
                let path = dir.join(setting.file);
                match put(&path, &setting.value) {
                    Err(error) if setting.optional && error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(failed("set", &path)(error)),
                    Ok(()) => {}
                }
            }
            if *controller == "cpuset" && dir.is_dir() {
                fill_cpuset(dir, limits)?;
            }
        }
        Ok(())
    }

    /// Sets the limits of a group that exists and had others: what is absent of CPU quota and memory limit is taken away.
    ///
    /// # Errors
    /// At the first that cannot be set.
    pub fn reset(&self, limits: &Limits) -> Result<(), CgroupError> {
        let mut settings: Vec<(PathBuf, String, bool)> = Vec::new();
        for (controller, dir) in &self.dirs {
            let of = settings_of(controller, self.v2, limits).into_iter().chain(removals(controller, self.v2, limits));
            settings.extend(of.map(|setting| (dir.join(setting.file), setting.value, setting.optional)));
        }
        // Version 1: memory and swap together are never less than memory, so a raise begins with them.
        let raise = match (limits.memory_limit_bytes, self.memory_limit_bytes()) {
            (None, _) => true,
            (Some(new), Some(old)) => new > old,
            (Some(_), None) => false,
        };
        if raise {
            settings.sort_by_key(|(path, ..)| !path.ends_with("memory.memsw.limit_in_bytes"));
        }
        for (path, value, optional) in settings {
            match put(&path, &value) {
                Err(error) if optional && error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("set", &path)(error)),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// These limits, but CPU quota and memory limit not below what the group has.
    #[must_use]
    pub fn at_least(&self, limits: &Limits) -> Limits {
        let most = |new: Option<u64>, old: Option<u64>| new.zip(old).map(|(new, old)| new.max(old));
        Limits {
            cpu_quota_us: most(limits.cpu_quota_us, self.cpu_quota_us()),
            memory_limit_bytes: most(limits.memory_limit_bytes, self.memory_limit_bytes()),
            ..limits.clone()
        }
    }

    /// Memory that is in use and not given up at once: without file pages that have rested. As the kubelet counts.
    #[must_use]
    pub fn working_set_bytes(&self) -> u64 {
        let (usage, rested) = if self.v2 {
            ("memory.current", "inactive_file ")
        } else {
            ("memory.usage_in_bytes", "total_inactive_file ")
        };
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let used = self.memory_file(usage).as_deref().and_then(number).unwrap_or(0);
        let stat = self.memory_file("memory.stat").unwrap_or_default();
        let rested = stat.lines().find_map(|line| number(line.strip_prefix(rested)?)).unwrap_or(0);
        used.saturating_sub(rested)
    }

    /// Processes and threads in the group and below it; 0 where nothing counts them.
    #[must_use]
    pub fn tasks(&self) -> u64 {
        let dir = self.dirs.iter().find(|(controller, _)| self.v2 || *controller == "pids").map(|(_, dir)| dir);
        let text = dir.and_then(|dir| fs::read_to_string(dir.join("pids.current")).ok());
        text.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    /// The memory limit; none where there is none.
    #[must_use]
    pub fn memory_limit_bytes(&self) -> Option<u64> {
        let text = self.memory_file(if self.v2 { "memory.max" } else { "memory.limit_in_bytes" })?;
        // Version 1 has no word for none: the largest number of whole pages.
        text.trim().parse::<u64>().ok().filter(|limit| *limit < 1 << 62)
    }

    /// The CPU quota per period, microseconds; none where there is none.
    #[must_use]
    pub fn cpu_quota_us(&self) -> Option<u64> {
        let dir = self.dirs.iter().find(|(controller, _)| self.v2 || *controller == "cpu").map(|(_, dir)| dir)?;
        let file = if self.v2 { "cpu.max" } else { "cpu.cfs_quota_us" };
        fs::read_to_string(dir.join(file)).ok()?.split_ascii_whitespace().next()?.parse().ok()
    }

    fn memory_file(&self, name: &str) -> Option<String> {
        let dir = self.dirs.iter().find(|(controller, _)| self.v2 || *controller == "memory").map(|(_, dir)| dir)?;
        fs::read_to_string(dir.join(name)).ok()
    }

    /// Opens what a new process needs to join.
    ///
    /// # Errors
    /// When the group is not there.
    pub fn joins(&self) -> Result<Joins, CgroupError> {
        let mut joins = Joins::default();
        for (controller, dir) in &self.dirs {
            if self.v2 {
                joins.into = Some(File::open(dir).map_err(failed("open", dir))?.into());
                continue;
            }
            let path = dir.join("tasks");
            match OpenOptions::new().write(true).open(&path) {
                Ok(file) => joins.tasks.push(file.into()),
                Err(error) if *controller == "cpuset" && error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed("open", &path)(error)),
            }
        }
        Ok(joins)
    }

    /// How many processes of this very group the kernel has killed for want of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let file = if self.v2 { "memory.events" } else { "memory.oom_control" };
        let dir = self.dirs.iter().find(|(controller, _)| self.v2 || *controller == "memory");
        let text = dir.and_then(|(_, dir)| fs::read_to_string(dir.join(file)).ok()).unwrap_or_default();
        text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    /// Whether no process is in the group or below it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.dirs.iter().all(|(_, dir)| pids(dir).is_empty())
    }

    /// Kills every process in the group and below it, once, and for good: nothing can be forked in it until it is created
    /// anew. What was forked meanwhile is left to the next call.
    pub fn kill(&self) {
        for (controller, dir) in &self.dirs {
            if self.v2 && put(&dir.join("cgroup.kill"), "1").is_ok() {
                continue;
            }
            if *controller == "pids" {
                let _ = put(&dir.join("pids.max"), "0");
            }
            let freezer = *controller == "freezer";
            if freezer {
                let _ = put(&dir.join("freezer.state"), "FROZEN");
            }
            let processes: Vec<(u32, Pidfd)> =
                pids(dir).into_iter().filter_map(|pid| Some((pid, Pidfd::open(pid).ok()?))).collect();
            // A number that was given to another process before it was opened is not in the group any more.
            let still: HashSet<u32> = pids(dir).into_iter().collect();
            for (_, process) in processes.iter().filter(|(pid, _)| still.contains(pid)) {
                let _ = process.signal(libc::SIGKILL);
            }
            if freezer {
                thaw(dir);
            }
        }
    }

    /// Kills every process and waits until the group is empty. Children of the caller must be reaped by others meanwhile,
    /// or be zombies, which have left.
    ///
    /// # Errors
    /// When one does not die.
    pub fn kill_until_empty(&self) -> Result<(), CgroupError> {
        let began = Instant::now();
        while !self.is_empty() {
            self.kill();
            if began.elapsed() > LEAVE_PATIENCE {
                let dir = self.dirs.iter().map(|(_, dir)| dir.as_path()).find(|dir| !pids(dir).is_empty());
                let stuck = io::Error::new(io::ErrorKind::TimedOut, "a killed process does not end");
                return Err(failed("empty cgroup", dir.unwrap_or(Path::new("")))(stuck));
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Removes the group and all below it. One that is not there is no error.
    ///
    /// # Errors
    /// When a process is still in it.
    pub fn remove(&self) -> Result<(), CgroupError> {
        self.dirs.iter().try_for_each(|(_, dir)| remove_dir(dir).map_err(failed("remove cgroup", dir)))
    }

    /// The same, and waits for processes that are about to leave.
    ///
    /// # Errors
    /// When a process stays in it.
    pub fn remove_patiently(&self) -> Result<(), CgroupError> {
        let began = Instant::now();
        loop {
            match self.remove() {
                Err(error) if began.elapsed() < LEAVE_PATIENCE && busy(&error.source) => {
                    sleep(Duration::from_millis(1));
                }
                result => return result,
            }
        }
    }
}

struct Setting {
    file: &'static str,
    value: String,
    /// Not every kernel has the file.
    optional: bool,
}

/// Limits as files of a controller.
fn settings_of(controller: &str, v2: bool, limits: &Limits) -> Vec<Setting> {
    let period_us = if limits.cpu_period_us == 0 { DEFAULT_PERIOD_US } else { limits.cpu_period_us };
    let mut out = Vec::new();
    let mut set = |file, value: Option<String>, optional| {
        if let Some(value) = value {
            out.push(Setting { file, value, optional });
        }
    };
    let number = |value: Option<u64>| value.map(|value| value.to_string());
    let text = |value: &String| (!value.is_empty()).then(|| value.clone());
    match (v2, controller) {
        (true, _) => {
            set("cpu.weight", number(limits.cpu_weight), false);
            set("cpu.max", limits.cpu_quota_us.map(|quota_us| format!("{quota_us} {period_us}")), false);
            set("memory.max", number(limits.memory_limit_bytes), false);
            set("memory.swap.max", limits.memory_limit_bytes.map(|_| "0".to_owned()), true);
            set("memory.oom.group", limits.oom_group.then(|| "1".to_owned()), true);
            set("pids.max", number(limits.pids_limit), false);
            set("cpuset.cpus", text(&limits.cpuset_cpus), false);
            set("cpuset.mems", text(&limits.cpuset_mems), false);
        }
        (false, "cpu") => {
            set("cpu.shares", number(limits.cpu_shares), false);
            set("cpu.cfs_period_us", limits.cpu_quota_us.map(|_| period_us.to_string()), false);
            set("cpu.cfs_quota_us", number(limits.cpu_quota_us), false);
        }
        (false, "memory") => {
            set("memory.limit_in_bytes", number(limits.memory_limit_bytes), false);
            // Memory and swap together: no swap. Only kernels that count swap have it.
            set("memory.memsw.limit_in_bytes", number(limits.memory_limit_bytes), true);
        }
        (false, "pids") => set("pids.max", number(limits.pids_limit), false),
        _ => {}
    }
    out
}

/// What takes away a CPU quota and a memory limit that are not asked for.
fn removals(controller: &str, v2: bool, limits: &Limits) -> Vec<Setting> {
    let (no_quota, no_limit) = (limits.cpu_quota_us.is_none(), limits.memory_limit_bytes.is_none());
    let none = if v2 { "max" } else { "-1" };
    let setting = |file, optional| Setting { file, value: none.to_owned(), optional };
    let mut out = Vec::new();
    if no_quota && (v2 || controller == "cpu") {
        out.push(setting(if v2 { "cpu.max" } else { "cpu.cfs_quota_us" }, false));
    }
    if no_limit && (v2 || controller == "memory") {
        out.push(setting(if v2 { "memory.max" } else { "memory.limit_in_bytes" }, false));
        out.push(setting(if v2 { "memory.swap.max" } else { "memory.memsw.limit_in_bytes" }, true));
    }
    out
}

/// Version 1's cpuset: what is not asked for is the parent's, from the top down.
fn fill_cpuset(dir: &Path, limits: &Limits) -> Result<(), CgroupError> {
    for (file, wanted) in [("cpuset.cpus", &limits.cpuset_cpus), ("cpuset.mems", &limits.cpuset_mems)] {
        let path = dir.join(file);
        let value = if wanted.is_empty() { inherited(dir, file)? } else { wanted.clone() };
        if let Some(parent) = dir.parent() {
            inherited(parent, file)?;
        }
        put(&path, &value).map_err(failed("set", &path))?;
    }
    Ok(())
}

/// The value of a cpuset file; an empty one is filled from above first.
fn inherited(dir: &Path, file: &str) -> Result<String, CgroupError> {
    let path = dir.join(file);
    let value = fs::read_to_string(&path).map_err(failed("read", &path))?.trim().to_owned();
    if !value.is_empty() {
        return Ok(value);
    }
    let parent = dir.parent().filter(|parent| parent.join(file).exists());
    let Some(parent) = parent else { return Ok(value) };
    let value = inherited(parent, file)?;
    put(&path, &value).map_err(failed("set", &path))?;
    Ok(value)
}

/// Makes a group of version 1 and those above it; false: it was there.
fn create_v1(dir: &Path) -> Result<bool, CgroupError> {
    match fs::create_dir(dir) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(_) => fs::create_dir_all(dir).map_err(failed("create cgroup", dir)).map(|()| true),
    }
}

/// Makes a group of version 2 and hands the controllers down to it, level by level below the mount point.
fn create_v2(dir: &Path) -> Result<(), CgroupError> {
    if let Some(parent) = dir.parent().filter(|parent| !parent.join("cgroup.subtree_control").exists()) {
        create_v2(parent)?;
    }
    if let Some(parent) = dir.parent() {
        hand_down(parent)?;
    }
    match fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("create cgroup", dir)(error)),
        _ => Ok(()),
    }
}

fn hand_down(dir: &Path) -> Result<(), CgroupError> {
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    let words = |text: &str| text.split_ascii_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let (there, on) = (words(&read("cgroup.controllers")), words(&read("cgroup.subtree_control")));
    let path = dir.join("cgroup.subtree_control");
    for name in V2_CONTROLLERS {
        if !there.iter().any(|word| word == name) || on.iter().any(|word| word == name) {
            continue;
        }
        let word = format!("+{name}");
        let mut result = put(&path, &word);
        if result.as_ref().is_err_and(busy) {
            // In a container the top has processes, the agent among them; controllers are only handed down by a group
            // without any.
            make_room(dir)?;
            result = put(&path, &word);
        }
        result.map_err(failed("hand down controllers in", &path))?;
    }
    Ok(())
}

/// Moves the processes of a group into one below it.
fn make_room(dir: &Path) -> Result<(), CgroupError> {
    let below = dir.join("minipod-init");
    match fs::create_dir(&below) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(failed("create cgroup", &below)(error));
        }
        _ => {}
    }
    let procs = below.join("cgroup.procs");
    for pid in own_pids(dir) {
        match put(&procs, &pid.to_string()) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
                return Err(failed("move a process to", &procs)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOTEMPTY))
}

/// One write, because each write is a command.
fn put(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

fn own_pids(dir: &Path) -> Vec<u32> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0).collect()
}

fn subgroups(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

fn pids(dir: &Path) -> Vec<u32> {
    let mut all = own_pids(dir);
    all.extend(subgroups(dir).iter().flat_map(|sub| pids(sub)));
    all
}

fn thaw(dir: &Path) {
    let _ = put(&dir.join("freezer.state"), "THAWED");
    subgroups(dir).iter().for_each(|sub| thaw(sub));
}

fn remove_dir(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Groups below it, or processes: the second attempt tells.
        Err(error) if busy(&error) => {
            subgroups(dir).iter().try_for_each(|sub| remove_dir(sub))?;
            match fs::remove_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            }
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
30 25 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory
34 30 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
35 30 0:31 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset
37 30 0:32 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
36 30 0:29 / /other/memory rw - cgroup cgroup rw,memory
";

    #[test]
    fn the_version_with_the_controllers_is_used() {
        let at = |name: &str| PathBuf::from("/sys/fs/cgroup").join(name);
        let mut v1 = vec![("cpu", at("cpu,cpuacct")), ("memory", at("memory")), ("cpuset", at("cpuset"))];
        v1.push(("freezer", at("freezer")));
        let found = Cgroups::from_mounts(V1, |_| "hugetlb".to_owned());
        assert_eq!(found, Some(Cgroups::V1(v1)));
        let pids = format!("{V1}38 30 0:33 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n");
        let Some(Cgroups::V1(found)) = Cgroups::from_mounts(&pids, |_| String::new()) else { panic!("version 1") };
        assert_eq!(found.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["cpu", "memory", "cpuset", "pids"]);
        let found = Cgroups::from_mounts(V1, |_| "cpuset cpu io memory pids\n".to_owned());
        assert_eq!(found, Some(Cgroups::V2(at("unified"))));
        assert_eq!(Cgroups::from_mounts("1 1 0:1 / / rw - ext4 /dev/sda rw\n", |_| String::new()), None);
        assert_eq!(Cgroups::from_mounts("nonsense\n\n", |_| String::new()), None);
    }

    fn written(controller: &str, v2: bool, limits: &Limits) -> Vec<String> {
        settings_of(controller, v2, limits).iter().map(|s| format!("{}={}", s.file, s.value)).collect()
    }

    #[test]
    fn limits_become_files() {
        let limits = Limits {
            cpu_shares: Some(102),
            cpu_weight: Some(4),
            cpu_quota_us: Some(25_000),
            memory_limit_bytes: Some(1 << 20),
            pids_limit: Some(9),
            oom_group: true,
            ..Limits::default()
        };
        assert_eq!(
            written("cpu", false, &limits),
            ["cpu.shares=102", "cpu.cfs_period_us=100000", "cpu.cfs_quota_us=25000"]
        );
        assert_eq!(
            written("memory", false, &limits),
            ["memory.limit_in_bytes=1048576", "memory.memsw.limit_in_bytes=1048576"]
        );
        assert_eq!(written("pids", false, &limits), ["pids.max=9"]);
        let v2 = written("", true, &limits);
        assert_eq!(v2[..3], ["cpu.weight=4", "cpu.max=25000 100000", "memory.max=1048576"]);
        assert_eq!(v2[3..], ["memory.swap.max=0", "memory.oom.group=1", "pids.max=9"]);
        for controller in V1_CONTROLLERS {
            assert!(written(controller, false, &Limits::default()).is_empty());
        }
        let taken = |controller, v2, limits: &Limits| -> Vec<String> {
            removals(controller, v2, limits).iter().map(|s| format!("{}={}", s.file, s.value)).collect()
        };
        assert_eq!(taken("cpu", false, &Limits::default()), ["cpu.cfs_quota_us=-1"]);
        assert_eq!(
            taken("memory", false, &Limits::default()),
            ["memory.limit_in_bytes=-1", "memory.memsw.limit_in_bytes=-1"]
        );
        assert_eq!(taken("", true, &Limits::default()), ["cpu.max=max", "memory.max=max", "memory.swap.max=max"]);
        assert!(taken("", true, &limits).is_empty());
    }

    /// On this machine's own hierarchies, whichever version they are.
    #[test]
    fn limits_of_a_living_group_go_up_down_and_away() {
        let cgroups = Cgroups::detect().expect("cgroups are mounted");
        let root = format!("minipod-test-resize-{}", std::process::id());
        let group = cgroups.pod(&root, "pod");
        let limits = |quota: Option<u64>, memory: Option<u64>| Limits {
            cpu_quota_us: quota,
            memory_limit_bytes: memory,
            cpu_shares: Some(100),
            cpu_weight: Some(10),
            ..Limits::default()
        };
        group.create(&limits(Some(50_000), Some(64 << 20))).expect("create (needs root and a writable /sys/fs/cgroup)");
        let mut seen = Vec::new();
        for (quota, memory) in [
            (Some(80_000), Some(128 << 20)),
            (Some(20_000), Some(32 << 20)),
            (None, None),
            (Some(30_000), Some(48 << 20)),
        ] {
            let wanted = limits(quota, memory);
            let before = (group.cpu_quota_us(), group.memory_limit_bytes());
            let least = group.at_least(&wanted);
            seen.push((before, (least.cpu_quota_us, least.memory_limit_bytes)));
            group.reset(&wanted).expect("reset");
            assert_eq!((group.cpu_quota_us(), group.memory_limit_bytes()), (quota, memory));
        }
        cgroups.pod(&root, "").remove_patiently().expect("remove");
        let mib = |quota: u64, mebibytes: u64| (Some(quota), Some(mebibytes << 20));
        assert_eq!(
            seen,
            [
                (mib(50_000, 64), mib(80_000, 128)),
                (mib(80_000, 128), mib(80_000, 128)),
                (mib(20_000, 32), (None, None)),
                ((None, None), (None, None)),
            ]
        );
    }

    #[test]
    fn a_group_comes_and_goes_with_its_processes() {
        let cgroups = Cgroups::detect().expect("cgroups are mounted");
        let root = format!("minipod-test-{}", std::process::id());
        let pod = cgroups.pod(&root, "pod");
        let limits = Limits { pids_limit: Some(50), memory_limit_bytes: Some(64 << 20), ..Limits::default() };
        pod.create(&limits).expect("create (needs root and a writable /sys/fs/cgroup)");
        let group = pod.child("x.0");
        group.create(&Limits { cpu_shares: Some(2), cpu_weight: Some(1), ..Limits::default() }).expect("create");
        group.create(&Limits::default()).expect("create again");
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("sleep");
        for (_, dir) in &group.dirs {
            if dir.exists() {
                put(&dir.join("cgroup.procs"), &child.id().to_string()).expect("join");
            }
        }
        assert!(!pod.is_empty() && group.remove().is_err());
        pod.kill_until_empty().expect("empty");
        child.wait().expect("wait");
        pod.remove_patiently().expect("remove");
        pod.remove_patiently().expect("remove what is gone");
        cgroups.pod(&root, "").remove_patiently().expect("remove root");
        assert!(group.dirs.iter().all(|(_, dir)| !dir.exists()));
    }
}
