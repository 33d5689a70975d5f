//! Real store processes, which end with the test.
#![allow(dead_code, reason = "each test file uses a part")]

use etcd_client::Client;
use std::io::Read as _;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

/// How to start one store, again and again on the same directory.
pub struct Server {
    pub name: String,
    pub dir: PathBuf,
    pub client: SocketAddr,
    pub peer: SocketAddr,
    pub args: Vec<String>,
    /// What is added to its environment.
    pub environment: Vec<(String, String)>,
    /// The network namespace it runs in, when not the test's.
    pub network: Option<std::fs::File>,
    child: Option<Child>,
}

impl Server {
    pub fn new(root: &Path, name: &str) -> Self {
        Self {
            name: name.to_owned(),
            dir: root.join(name),
            client: free_address(),
            peer: free_address(),
            args: Vec::new(),
            environment: Vec::new(),
            network: None,
            child: None,
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minipod-store"));
        command.args(["--name", &self.name, "--listen-client", &self.client.to_string()]);
        command.args(["--listen-peer", &self.peer.to_string()]).arg("--data-dir").arg(&self.dir).args(&self.args);
        command.envs(self.environment.iter().cloned());
        command
    }

    pub fn start(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.dir.with_extension("log"));
        let log = log.expect("the log file");
        let mut command = self.command();
        command.stderr(log).stdout(Stdio::null());
        self.child = Some(spawn_in(self.network.as_ref(), &mut command));
    }

    /// Whether it has ended by itself; it can be started again then.
    pub fn has_ended(&mut self) -> bool {
        let Some(child) = &mut self.child else { return true };
        let ended = child.try_wait().expect("wait").is_some();
        if ended {
            self.child = None;
        }
        ended
    }

    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let child = self.child.as_ref().expect("it runs");
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
        nix::sys::signal::kill(pid, signal).expect("signal");
    }

    /// Starts it and expects that it ends with an error; gives what it says.
    pub fn start_refused(&self) -> String {
        let mut child =
            self.command().stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("start minipod-store");
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = child.try_wait().expect("wait") {
                let mut text = String::new();
                child.stderr.take().expect("stderr").read_to_string(&mut text).expect("read");
                assert!(!status.success(), "it ended well: {text}");
                return text;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{} did not refuse to start", self.name);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("kill");
            child.wait().expect("wait");
        }
    }

    /// SIGTERM, and waits for the end; gives how long that took.
    pub fn terminate(&mut self) -> Duration {
        let mut child = self.child.take().expect("it runs");
        let begun = Instant::now();
        let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signal");
        let deadline = begun + Duration::from_secs(20);
        while child.try_wait().expect("wait").is_none() {
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{} does not end", self.name);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        begun.elapsed()
    }

    /// A client once the server answers.
    pub async fn client(&self) -> Client {
        let endpoint = format!("http://{}", self.client);
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut last = String::new();
        while Instant::now() < deadline {
            match Client::connect([&endpoint], None).await {
                Ok(mut client) => match client.get("x", None).await {
                    Ok(_) => return client,
                    Err(error) => last = error.to_string(),
                },
                Err(error) => last = error.to_string(),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("{} does not answer: {last}; its log: {}", self.name, self.log());
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.with_extension("log")).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Starts a process in a network namespace: a thread enters it first, and its children are born there.
fn spawn_in(network: Option<&std::fs::File>, command: &mut Command) -> Child {
    std::thread::scope(|scope| {
        let born = scope.spawn(|| {
            if let Some(network) = network {
                nix::sched::setns(network, nix::sched::CloneFlags::CLONE_NEWNET).expect("enter the namespace (root?)");
            }
            command.spawn().expect("start minipod-store")
        });
        born.join().expect("the thread")
    })
}

/// Three servers of a new cluster, started.
pub fn cluster(root: &Path) -> Vec<Server> {
    let mut servers: Vec<Server> = ["a", "b", "c"].iter().map(|name| Server::new(root, name)).collect();
    let members: Vec<String> = servers.iter().map(|server| format!("{}=http://{}", server.name, server.peer)).collect();
    for server in &mut servers {
        server.args = ["--initial-cluster", &members.join(","), "--snapshot-count", "100"].map(str::to_owned).to_vec();
        server.start();
    }
    servers
}

/// Waits until `check` gives something; panics with the last state otherwise.
pub async fn until<T>(what: &str, mut check: impl AsyncFnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match check().await {
            Ok(value) => return value,
            Err(state) if Instant::now() > deadline => panic!("{what}: {state}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}
