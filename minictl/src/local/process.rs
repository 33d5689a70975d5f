//! Processes: started with a log of their own, found again by PID and start time, never by name alone.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::error::LocalError;

/// Lines of a log that an error shows.
const TAIL_LINES: usize = 15;

/// How a daemon is started.
#[derive(Debug, Clone)]
pub struct Launch {
    pub(super) program: PathBuf,
    pub(super) arguments: Vec<String>,
    pub(super) environment: Vec<(String, String)>,
    pub(super) netns: Option<PathBuf>,
    pub(super) log: PathBuf,
}

impl Launch {
    /// Starts it, in its network namespace if it has one. It gets a process group of its own: the terminal's Ctrl-C is
    /// for the one who takes the cluster down in order.
    pub(super) fn start(&self) -> Result<Daemon, LocalError> {
        let io_error = |operation, path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| LocalError::Io { operation, path, source }
        };
        let output = File::options().create(true).append(true).open(&self.log).map_err(io_error("open", &self.log))?;
        let errors = output.try_clone().map_err(io_error("open", &self.log))?;
        let mut command = match &self.netns {
            // nsenter changes the network namespace and nothing else: mounts and cgroups stay this machine's.
            Some(netns) => {
                let nsenter = find("nsenter").ok_or(LocalError::Missing("nsenter", "util-linux"))?;
                let mut command = Command::new(nsenter);
                command.arg(format!("--net={}", netns.display())).arg("--").arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        command.args(&self.arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(output).stderr(errors).process_group(0);
        let child = command.spawn().map_err(io_error("start", &self.program))?;
        let start_ticks = start_ticks(child.id()).unwrap_or(0);
        Ok(Daemon { child, start_ticks, launch: self.clone() })
    }
}

/// A process that we started.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    start_ticks: u64,
    launch: Launch,
}

impl Daemon {
    pub(super) fn launch(&self) -> Launch {
        self.launch.clone()
    }

    /// Its PID.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When it started (proc(5), field 22 of stat).
    #[must_use]
    pub fn start_ticks(&self) -> u64 {
        self.start_ticks
    }

    /// Where its output goes.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.launch.log
    }

    /// Whether the others depend on it to end well.
    pub(super) fn is_store(&self) -> bool {
        self.launch.program.file_name().is_some_and(|name| name == "etcd")
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<String> {
        self.child.try_wait().ok().flatten().map(|status| status.to_string())
    }

    /// The last lines of its log.
    #[must_use]
    pub fn tail(&self) -> String {
        let text = fs::read(self.log()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
    }

    /// SIGTERM.
    pub fn terminate(&mut self) {
        // Not waited for yet: the PID is still its own.
        if self.ended().is_none() {
            signal(self.pid(), "TERM");
        }
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(&mut self) {
        // An error means that it has ended.
        let _ = self.child.kill();
        self.reap();
    }

    /// SIGSTOP and SIGCONT.
    pub fn pause(&mut self, paused: bool) {
        if self.ended().is_none() {
            signal(self.pid(), if paused { "STOP" } else { "CONT" });
        }
    }

    /// Waits for its end.
    pub(super) fn reap(&mut self) {
        let _ = self.child.wait();
    }
}

/// Sends a signal with kill(1): nothing here may be unsafe or needs to be fast.
pub(super) fn signal(pid: u32, name: &str) {
    // An error means that the process is gone.
    let _ = Command::new("kill").args([format!("-{name}"), pid.to_string()]).stderr(Stdio::null()).status();
}

/// Clock ticks from boot to the start of a process (proc(5), field 22 of stat); `None` when it is gone or a zombie.
pub(crate) fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().collect();
    if *fields.first()? == "Z" {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// All PIDs, with the processes' arguments separated by blanks.
pub(super) fn all() -> Vec<(u32, String)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let process = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let arguments = fs::read(entry.path().join("cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&arguments).replace('\0', " ")))
    };
    entries.filter_map(process).collect()
}

/// A port on which nobody listens at this moment.
pub(super) fn free_port() -> Result<u16, LocalError> {
    let bound = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let failed = |source| LocalError::Io { operation: "find a free port on", path: "127.0.0.1".into(), source };
    bound.map(|address| address.port()).map_err(failed)
}

/// Runs a command to its end; `shown` is what an error calls it, with what the command said.
pub(super) fn run(command: &mut Command, shown: &str) -> Result<(), LocalError> {
    let failed = |message: String| LocalError::Command { command: shown.to_owned(), message };
    let output = command.stdin(Stdio::null()).output().map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// The path of a program, also when `sbin` is not in PATH.
pub(super) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let dirs = path.split(':').chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"]);
    dirs.map(|dir| Path::new(dir).join(program)).find(|file| file.is_file())
}
