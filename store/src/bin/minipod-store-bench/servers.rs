//! The two servers, one process or three, on the same disk.

use super::grpc::{Connection, Fields, header};
use super::{Args, Error};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Whose servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Ours.
    Store,
    /// Debian's etcd.
    Etcd,
}

impl Kind {
    /// What its figures' names begin with.
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Store => "",
            Self::Etcd => "etcd_",
        }
    }
}

/// A server that is killed when it goes out of scope, with its directory.
struct Running {
    child: Child,
    client: SocketAddr,
    dir: PathBuf,
    /// How it was started.
    command: Command,
}

/// Bytes that the files below a directory take on disk.
fn bytes_below(dir: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { bytes_below(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(bytes)
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself, and what is left in the directory shows in the file system.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// One server, or replicas.
pub struct Cluster {
    running: Vec<Running>,
    /// Where the leader serves clients.
    pub leader: SocketAddr,
}

/// A started cluster has a leader within this time, one with a gigabyte to read too.
const START: Duration = Duration::from_secs(120);

fn free_address() -> std::io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

impl Cluster {
    /// Starts `replicas` empty servers and waits until one leads.
    pub async fn start(args: &Args, kind: Kind, replicas: usize) -> Result<Self, Error> {
        let peers = (0..replicas).map(|_| free_address()).collect::<Result<Vec<_>, _>>()?;
        let members: Vec<String> = peers.iter().enumerate().map(|(at, peer)| format!("m{at}=http://{peer}")).collect();
        let mut running = Vec::new();
        for (at, peer) in peers.iter().enumerate() {
            running.push(start(args, kind, at, *peer, &members.join(","))?);
        }
        let mut cluster = Self { leader: running.first().map(|first| first.client).ok_or("no replicas")?, running };
        cluster.wait_for_leader(Duration::from_millis(50)).await?;
        Ok(cluster)
    }

    async fn wait_for_leader(&mut self, pause: Duration) -> Result<(), Error> {
        let deadline = Instant::now() + START;
        while !self.find_leader().await {
            if Instant::now() > deadline {
                return Err(format!("{} members have no leader after {START:?}", self.running.len()).into());
            }
            tokio::time::sleep(pause).await;
        }
        Ok(())
    }

    /// Kills all its processes, starts them again on what they had written, and gives how long it took until one of them leads and
    /// has answered a linearizable read.
    pub async fn restart(&mut self) -> Result<Duration, Error> {
        for server in &mut self.running {
            server.child.kill()?;
            server.child.wait()?;
        }
        let begun = Instant::now();
        for server in &mut self.running {
            server.child = server.command.spawn()?;
        }
        self.wait_for_leader(Duration::from_millis(10)).await?;
        // The key is any; what counts is that everything before is applied.
        let connection = Connection::open(self.leader).await?;
        connection.method("/etcdserverpb.KV/Range")?.call(&[10, 1, b'-']).await?;
        Ok(begun.elapsed())
    }

    /// What all its processes have on disk, bytes.
    pub fn disk_bytes(&self) -> Result<u64, Error> {
        let bytes = self.running.iter().map(|server| bytes_below(&server.dir)).sum::<std::io::Result<u64>>();
        Ok(bytes?)
    }

    async fn find_leader(&mut self) -> bool {
        for server in &self.running {
            let status = async {
                let mut status = Connection::open(server.client).await?.method("/etcdserverpb.Maintenance/Status")?;
                status.call(&[]).await
            };
            if let Ok(answer) = status.await {
                let leader = Fields(&answer).number(4);
                if leader != 0 && leader == header(&answer, 2) {
                    self.leader = server.client;
                    return true;
                }
            }
        }
        false
    }

    /// The processor time of all its processes so far.
    pub fn cpu(&self) -> Result<Duration, Error> {
        self.running.iter().map(|server| cpu_of(&server.child.id().to_string())).sum()
    }

    /// Resident memory of all its processes, MiB: all, and what belongs to no file.
    pub fn memory_mib(&self) -> (f64, f64) {
        let of = |field| self.running.iter().map(|server| status_mib(server.child.id(), field)).sum();
        (of("VmRSS:"), of("RssAnon:"))
    }
}

fn start(args: &Args, kind: Kind, at: usize, peer: SocketAddr, members: &str) -> Result<Running, Error> {
    let dir = args.dir.join(format!("bench-{}{}-{at}", kind.prefix(), peer.port()));
    std::fs::create_dir_all(&dir)?;
    let (client, name) = (free_address()?, format!("m{at}"));
    let mut command = match kind {
        Kind::Store => {
            let beside = std::env::current_exe()?.with_file_name("minipod-store");
            let mut command = Command::new(args.store.as_ref().unwrap_or(&beside));
            command.args(["--quota-bytes", "0", "--listen-client", &client.to_string()]);
            command.args(["--listen-peer", &peer.to_string()]).env("RUST_LOG", "warn");
            command
        }
        Kind::Etcd => {
            let (client, peer) = (format!("http://{client}"), format!("http://{peer}"));
            let mut command = Command::new(&args.etcd);
            command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
            command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
            command.args(["--quota-backend-bytes", "8589934592", "--log-level", "error"]);
            command
        }
    };
    command.args(["--name", &name, "--initial-cluster", members]).arg("--data-dir").arg(&dir);
    // etcd writes pages about its elections even at level error.
    let stderr = if kind == Kind::Etcd { Stdio::null() } else { Stdio::inherit() };
    let child = command.stdout(Stdio::null()).stderr(stderr).spawn();
    let child = child.map_err(|error| format!("start {}: {error}", command.get_program().display()))?;
    Ok(Running { child, client, dir, command })
}

/// The processor time of a process, `self` for this one. The kernel counts it in hundredths of a second (proc(5), stat).
pub fn cpu_of(process: &str) -> Result<Duration, Error> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(process).join("stat"))?;
    let after_name = stat.rsplit_once(')').ok_or("a stat line without a name")?.1;
    let ticks: u64 = after_name.split_whitespace().skip(11).take(2).map(|field| field.parse().unwrap_or(0)).sum();
    Ok(Duration::from_millis(ticks * 10))
}

fn status_mib(process: u32, field: &str) -> f64 {
    let status = std::fs::read_to_string(Path::new("/proc").join(process.to_string()).join("status"));
    let status = status.unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0
}
