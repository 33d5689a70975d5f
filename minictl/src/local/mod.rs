//! A whole cluster on this machine: the real binaries, each node in a network namespace of its own. `minictl demo`,
//! `minictl up` and the end-to-end tests share it.
//!
//! - [`slot`] gives the cluster a number of its own, and with it names and addresses that no other one has.
//! - [`network`] joins the nodes: one bridge, one veth per node.
//! - [`servers`] says how the API servers are started, one or several.
//! - [`process`] starts, stops and finds processes.
//! - [`mod@remove`] takes everything down again, from what is written down: also after a crash, also by another process.
//!
//! Nothing of it is simulated: the only thing that one machine lacks of several is a second kernel.

mod error;
mod network;
mod process;
mod remove;
mod servers;
mod slot;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use minipod_client::{Client, Options as ClientOptions, Query};
use minipod_proto::Resource;
use minipod_proto::v1::Node;

pub use error::LocalError;
pub(crate) use process::start_ticks;
pub use process::{Daemon, Launch};
pub use remove::{remove, remove_abandoned};
pub use slot::{Slot, kept};

/// How long the cluster may take to come up.
const START_TIMEOUT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(20);

/// One node to be.
#[derive(Debug, Clone, Default)]
pub struct NodeOptions {
    /// Its name.
    pub name: String,
    /// What pods may use, as the agent's `--allocatable`: `cpu=2,memory=1.25Gi`.
    pub allocatable: String,
    /// More flags of the agent, such as `--label`.
    pub flags: Vec<String>,
    /// Environment of the agent, such as `FAILPOINTS`.
    pub environment: Vec<(String, String)>,
}

impl NodeOptions {
    /// A node with 4 CPUs and that much memory.
    #[must_use]
    pub fn with_memory(name: &str, memory: &str) -> NodeOptions {
        NodeOptions { name: name.to_owned(), allocatable: format!("cpu=4,memory={memory}"), ..NodeOptions::default() }
    }
}

/// Where the cluster keeps its objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Store {
    /// Debian's etcd, a process of its own.
    Etcd,
    /// The API server's own.
    #[default]
    Embedded,
}

/// The cluster to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the binaries of minipod are.
    pub bin_dir: PathBuf,
    /// The nodes.
    pub nodes: Vec<NodeOptions>,
    /// How many API servers: several share the etcd, or carry the embedded store together.
    pub apiservers: usize,
    /// How many schedulers work side by side.
    pub schedulers: usize,
    /// The store.
    pub store: Store,
    /// More flags of every API server.
    pub apiserver_flags: Vec<String>,
    /// The port of a registry on this machine's address among the nodes, which they ask, without TLS, for the images of
    /// `minipod.local` that they have not. It need not be up before one is needed.
    pub registry_port: Option<u16>,
}

impl Options {
    /// One API server, one scheduler, the embedded store, these nodes.
    #[must_use]
    pub fn new(bin_dir: impl Into<PathBuf>, nodes: Vec<NodeOptions>) -> Options {
        Options {
            bin_dir: bin_dir.into(),
            nodes,
            apiservers: 1,
            schedulers: 1,
            store: Store::default(),
            apiserver_flags: Vec::new(),
            registry_port: None,
        }
    }
}

/// A running cluster. Dropping it takes it down, unless it was [kept](LocalCluster::keep).
#[derive(Debug)]
pub struct LocalCluster {
    slot: Option<Slot>,
    options: Options,
    daemons: BTreeMap<String, Daemon>,
    server: String,
    client: Client,
}

impl LocalCluster {
    /// Starts everything and waits until all nodes are ready.
    ///
    /// # Errors
    /// When something is missing (the error says what to install), or does not come up; then nothing is left behind.
    pub async fn start(options: Options) -> Result<LocalCluster, LocalError> {
        let etcd = match options.store {
            Store::Etcd => Some(process::find("etcd").ok_or(LocalError::Missing("etcd", "etcd-server"))?),
            Store::Embedded => None,
        };
        let slot = Slot::claim()?;
        let places = servers::places(slot.gateway(), options.apiservers)?;
        let addresses: Vec<String> = places.iter().map(servers::Place::url).collect();
        let server = addresses.join(",");
        let client =
            Client::new(&ClientOptions::servers(&server)).map_err(|error| LocalError::Client(Box::new(error)))?;
        let mut cluster = LocalCluster { slot: Some(slot), options, daemons: BTreeMap::new(), server, client };
        cluster.start_all(etcd, &places).await?;
        Ok(cluster)
    }

    async fn start_all(&mut self, etcd: Option<PathBuf>, places: &[servers::Place]) -> Result<(), LocalError> {
        network::create(self.slot()?, &self.options.nodes)?;
        let etcd = etcd.map(|etcd| self.start_etcd(&etcd)).transpose()?;
        if etcd.is_none() && places.len() > 1 {
            servers::make_certificates(&self.options.bin_dir, &self.slot()?.data(), places)?;
        }
        for place in places {
            let (slot, own) = (self.slot()?, &self.options.apiserver_flags);
            let mut arguments = servers::arguments(place, places, etcd.as_deref(), &slot.data());
            arguments.push(format!("--cluster-cidr={}", slot.cluster_cidr()));
            arguments.extend(own.iter().cloned());
            self.spawn(&place.name, "minipod-apiserver", &arguments, None)?;
        }
        for index in 0..self.options.schedulers {
            // Each begins at another server, so that none has them all.
            let mut servers: Vec<&str> = self.server.split(',').collect();
            let first = index % servers.len().max(1);
            servers.rotate_left(first);
            let arguments = [format!("--server={}", servers.join(","))];
            self.spawn(&format!("scheduler-{index}"), "minipod-scheduler", &arguments, None)?;
        }
        for index in 0..self.options.nodes.len() {
            self.start_agent(index)?;
        }
        self.wait_ready().await
    }

    fn start_etcd(&mut self, etcd: &Path) -> Result<String, LocalError> {
        let (client_port, peer_port) = (process::free_port()?, process::free_port()?);
        let client_url = format!("http://127.0.0.1:{client_port}");
        let peer_url = format!("http://127.0.0.1:{peer_port}");
        let arguments = [
            format!("--data-dir={}", self.slot()?.data().join("etcd").display()),
            format!("--listen-client-urls={client_url}"),
            format!("--advertise-client-urls={client_url}"),
            format!("--listen-peer-urls={peer_url}"),
            format!("--initial-advertise-peer-urls={peer_url}"),
            format!("--initial-cluster=default={peer_url}"),
            "--logger=zap".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        self.spawn_program("etcd", etcd, &arguments, None)?;
        Ok(format!("etcd://127.0.0.1:{client_port}"))
    }

    fn start_agent(&mut self, index: usize) -> Result<(), LocalError> {
        let slot = self.slot()?;
        let node = self.options.nodes.get(index).ok_or(LocalError::NoSuchNode(index))?.clone();
        let mut arguments = vec![
            format!("--server={}", self.server),
            format!("--name={}", node.name),
            format!("--run-dir={}", slot.node_run_dir(index).display()),
            format!("--data-dir={}", slot.node_data_dir(index).display()),
            format!("--cgroup-root={}", slot.node_cgroup(index)),
            format!("--bridge={}", slot.node_bridge(index)),
            // Nodes that share a machine share its disk with everything else on it: its fill is no reason to end their pods.
            "--eviction-hard=memory.available<50Mi".to_owned(),
            "--image-gc-high-threshold=100".to_owned(),
            format!("--node-ip={}", slot.node_ip(index)),
            format!("--pod-user-ids={}", slot.node_pod_user_ids(index, self.options.nodes.len())?),
        ];
        if !node.allocatable.is_empty() {
            arguments.push(format!("--allocatable={}", node.allocatable));
        }
        if let Some(port) = self.options.registry_port {
            let registry = format!("{}:{port}", slot.gateway());
            arguments.push(format!("--registry-http={registry}"));
            arguments.push(format!("--registry-mirror=minipod.local={registry}"));
        }
        arguments.extend(node.flags.iter().cloned());
        self.spawn(&node.name, "minipod-nodeagent", &arguments, Some(index))
    }

    fn spawn(&mut self, name: &str, binary: &str, arguments: &[String], node: Option<usize>) -> Result<(), LocalError> {
        let program = self.options.bin_dir.join(binary);
        if !program.is_file() {
            return Err(LocalError::Binary(program));
        }
        self.spawn_program(name, &program, arguments, node)
    }

    fn spawn_program(
        &mut self,
        name: &str,
        program: &Path,
        arguments: &[String],
        node: Option<usize>,
    ) -> Result<(), LocalError> {
        let slot = self.slot()?;
        let launch = Launch {
            program: program.to_owned(),
            arguments: arguments.to_vec(),
            environment: node
                .and_then(|index| Some(self.options.nodes.get(index)?.environment.clone()))
                .unwrap_or_default(),
            netns: node.map(|index| slot.netns_path(index)),
            log: slot.data().join(format!("{name}.log")),
        };
        let daemon = launch.start()?;
        slot.note_process(&daemon)?;
        self.daemons.insert(name.to_owned(), daemon);
        Ok(())
    }

    /// Starts a daemon again as it was started before; one that still runs is killed first, without warning.
    ///
    /// # Errors
    /// When there is none of that name, or it cannot be started.
    pub fn restart(&mut self, name: &str) -> Result<(), LocalError> {
        let daemon = self.daemons.get_mut(name).ok_or_else(|| LocalError::NoSuchDaemon(name.to_owned()))?;
        daemon.kill();
        *daemon = daemon.launch().start()?;
        let daemon = self.daemons.get(name).ok_or(LocalError::Down)?;
        self.slot()?.note_process(daemon)
    }

    async fn wait_ready(&mut self) -> Result<(), LocalError> {
        let start = Instant::now();
        loop {
            self.check_alive()?;
            let listed = self.client.list::<Node>(&Query::all()).await;
            let state = match listed {
                Ok(list) => {
                    let ready = |node: &NodeOptions| list.items.iter().any(|n| n.name() == node.name && n.is_ready());
                    let missing: Vec<&str> =
                        self.options.nodes.iter().filter(|node| !ready(node)).map(|node| node.name.as_str()).collect();
                    if missing.is_empty() {
                        return Ok(());
                    }
                    format!("not ready: {}", missing.join(", "))
                }
                Err(error) => error.to_string(),
            };
            if start.elapsed() > START_TIMEOUT {
                return Err(LocalError::NotReady {
                    seconds: START_TIMEOUT.as_secs(),
                    state,
                    logs: self.slot()?.data(),
                });
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// A daemon that ended by itself will not make the cluster ready.
    fn check_alive(&mut self) -> Result<(), LocalError> {
        for (name, daemon) in &mut self.daemons {
            if let Some(how) = daemon.ended() {
                return Err(LocalError::Ended { name: name.clone(), how, log: daemon.tail() });
            }
        }
        Ok(())
    }

    fn slot(&self) -> Result<&Slot, LocalError> {
        self.slot.as_ref().ok_or(LocalError::Down)
    }

    /// The API servers' addresses, as minictl's `MINIPOD_SERVER`.
    #[must_use]
    pub fn server(&self) -> &str {
        &self.server
    }

    /// A client of them.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The options it was started with.
    #[must_use]
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Its number, names and directories.
    ///
    /// # Errors
    /// When it is down.
    pub fn names(&self) -> Result<&Slot, LocalError> {
        self.slot()
    }

    /// A daemon by name: `etcd`, `apiserver` (of several: `apiserver-0`), `scheduler-0`, or a node's name for its agent.
    pub fn daemon(&mut self, name: &str) -> Option<&mut Daemon> {
        self.daemons.get_mut(name)
    }

    /// Leaves it running when this value is dropped; `minictl down` ends it.
    ///
    /// # Errors
    /// When that cannot be written down.
    pub fn keep(mut self) -> Result<(), LocalError> {
        let Some(slot) = self.slot.take() else { return Err(LocalError::Down) };
        slot.keep(&self.server)
    }

    /// Takes it down: pods, daemons, network, files.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn stop(mut self) -> Result<(), LocalError> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<(), LocalError> {
        let Some(slot) = self.slot.take() else { return Ok(()) };
        // Told to end in the order in which they depend on each other; `remove` ends what does not listen.
        let (stores, others): (Vec<_>, Vec<_>) = self.daemons.values_mut().partition(|daemon| daemon.is_store());
        others.into_iter().chain(stores).for_each(Daemon::terminate);
        let removed = remove(&slot);
        self.daemons.values_mut().for_each(Daemon::reap);
        removed
    }
}

impl Drop for LocalCluster {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            eprintln!("the cluster could not be taken down completely: {error}");
        }
    }
}
