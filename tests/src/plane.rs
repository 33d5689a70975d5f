//! A control plane without nodes: store, API server and scheduler as processes of their own, listening on loopback.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use minictl::local::Store;

use crate::cluster::bin_dir;
use crate::kernel;

/// How long a process may take to serve.
const START: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(20);
/// Room for a /24 for each of 65,536 nodes.
const CIDR: &str = "--cluster-cidr=10.0.0.0/8";
/// Heartbeats every five seconds, as agents send them by default; a busy machine makes nobody silent.
const GRACE: &str = "--node-grace=60s";
/// Clock ticks of /proc a second (sysconf(_SC_CLK_TCK) is 100 on every Linux that we run on).
const TICKS_PER_S: f64 = 100.0;

/// Running processes; dropping the value ends them and removes their data.
#[derive(Debug)]
pub struct Plane {
    processes: Vec<(&'static str, Child)>,
    dir: PathBuf,
    server: String,
    /// Where the scheduler shows its metrics.
    metrics: String,
}

impl Plane {
    /// Starts everything in a new directory of its own below `parent`, which should be on a real disk: the store syncs to it.
    ///
    /// # Errors
    /// What could not be started, with the end of its log.
    pub fn start(store: Store, parent: &Path) -> Result<Plane, String> {
        let dir = parent.join(format!("e2e-{}-{}", std::process::id(), free_port()?));
        fs::create_dir_all(&dir).map_err(|error| format!("create {}: {error}", dir.display()))?;
        let metrics = format!("127.0.0.1:{}", free_port()?);
        let mut plane = Plane { processes: Vec::new(), dir, server: String::new(), metrics };
        let store = match store {
            Store::Etcd => plane.start_etcd()?,
            Store::Embedded => vec!["--store=embedded".to_owned(), plane.flag("data-dir", "store")],
        };
        let port_file = plane.dir.join("port");
        let mut arguments = store;
        arguments.extend(["--listen=127.0.0.1:0".to_owned(), plane.flag("port-file", "port")]);
        arguments.extend([CIDR.to_owned(), GRACE.to_owned()]);
        plane.spawn("apiserver", &bin_dir().join("minipod-apiserver"), &arguments)?;
        let port =
            plane.wait("apiserver", || fs::read_to_string(&port_file).ok().map(|port| port.trim().to_owned()))?;
        plane.server = format!("http://127.0.0.1:{port}");
        let server = format!("--server={}", plane.server);
        let metrics = format!("--metrics-listen={}", plane.metrics);
        plane.spawn("scheduler", &bin_dir().join("minipod-scheduler"), &[server, metrics])?;
        Ok(plane)
    }

    /// The API server's address.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// The value of one of the scheduler's metrics that has no labels.
    ///
    /// # Errors
    /// When it does not answer, or has no such metric.
    pub fn scheduler_count(&self, name: &str) -> Result<f64, String> {
        let text = http_get(&self.metrics, "/metrics");
        let text = text.map_err(|error| format!("the scheduler's metrics at {}: {error}", self.metrics))?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.ok_or_else(|| format!("{name} is not among the scheduler's metrics"))
    }

    /// CPU time of every process so far, this one last (as `load`), in seconds.
    pub fn cpu_seconds(&self) -> Vec<(&'static str, f64)> {
        let pids = self.processes.iter().map(|(name, child)| (*name, child.id()));
        let all = pids.chain([("load", std::process::id())]);
        all.map(|(name, pid)| (name, kernel::cpu_ticks(pid).unwrap_or(0) as f64 / TICKS_PER_S)).collect()
    }

    fn start_etcd(&mut self) -> Result<Vec<String>, String> {
        let (client, peer) = (free_port()?, free_port()?);
        let (client, peer) = (format!("127.0.0.1:{client}"), format!("127.0.0.1:{peer}"));
        let arguments = [
            self.flag("data-dir", "etcd"),
            format!("--listen-client-urls=http://{client}"),
            format!("--advertise-client-urls=http://{client}"),
            format!("--listen-peer-urls=http://{peer}"),
            format!("--initial-advertise-peer-urls=http://{peer}"),
            format!("--initial-cluster=default=http://{peer}"),
            "--quota-backend-bytes=8589934592".to_owned(),
            "--logger=zap".to_owned(),
            "--log-level=error".to_owned(),
        ];
        self.spawn("etcd", Path::new("etcd"), &arguments)?;
        self.wait("etcd", || TcpStream::connect(&client).ok())?;
        Ok(vec![format!("--store=etcd://{client}")])
    }

    fn flag(&self, name: &str, file: &str) -> String {
        format!("--{name}={}", self.dir.join(file).display())
    }

    fn spawn(&mut self, name: &'static str, program: &Path, arguments: &[String]) -> Result<(), String> {
        let log = self.dir.join(format!("{name}.log"));
        let output = File::create(&log).map_err(|error| format!("create {}: {error}", log.display()))?;
        let errors = output.try_clone().map_err(|error| format!("open {}: {error}", log.display()))?;
        let mut command = Command::new(program);
        command.args(arguments).env("RUST_LOG", "warn").stdin(Stdio::null()).stdout(output).stderr(errors);
        let child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => format!("{} is missing: cargo xtask setup, or build it", program.display()),
            _ => format!("start {}: {error}", program.display()),
        })?;
        self.processes.push((name, child));
        Ok(())
    }

    fn wait<T>(&mut self, name: &str, ready: impl Fn() -> Option<T>) -> Result<T, String> {
        let start = Instant::now();
        while start.elapsed() < START {
            if let Some(ready) = ready() {
                return Ok(ready);
            }
            std::thread::sleep(PAUSE);
        }
        let log = fs::read_to_string(self.dir.join(format!("{name}.log"))).unwrap_or_default();
        Err(format!("{name} does not serve after {} s; its log: {log}", START.as_secs()))
    }
}

/// The whole answer, head and body, of a daemon's page for monitoring.
///
/// # Errors
/// When it cannot be asked, or does not answer with text.
pub fn http_get(address: impl ToSocketAddrs, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map(|_| answer)
}

impl Drop for Plane {
    fn drop(&mut self) {
        // Those that depend on others first. Errors mean that there is nothing left to end or to remove.
        for (_, child) in self.processes.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn free_port() -> Result<u16, String> {
    let bound = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    bound.map(|address| address.port()).map_err(|error| format!("find a free port on 127.0.0.1: {error}"))
}
