//! What all tasks of the agent share.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use minipod_podshim::protocol::IdRange;
use minipod_proto::v1::{Node, NodeStatus, Pod, Routes};
use tokio::sync::{Notify, Semaphore, SemaphorePermit, watch};

use crate::apparmor;
use crate::clock::{boot_ms, wall_ms};
use crate::config::Config;
use crate::container::env::EnvFacts;
use crate::image::gc::Candidate;
use crate::image::pull::Puller;
use crate::image::{Digest, ImageError, ImageRecord, ImageStore, Reference, StoreOptions};
use crate::metrics::Metrics;
use crate::net::{Cidr, NetConfig, NetError, Network, NodeRoute};
use crate::node::{self, Machine, Pressure};
use crate::outbox::Outbox;
use crate::paths::Paths;
use crate::pods::{Desired, Pods, Spawn};
use crate::pressure::plan::{Conditions, Rules};
use crate::seccomp::Profiles;
use crate::shim::Spare;
use crate::sources::Sources;
use crate::users::{Book, UsersError};
use crate::want::{Uid, key_of};
use crate::worker::{PodView, Worker};

/// How often the machine is measured.
const MEASURE_EVERY_MS: u64 = 10_000;
/// How long a request waits for a pod that this agent has not met yet: as long as a supervisor may take to answer.
const MEETING_PATIENCE: Duration = Duration::from_secs(30);
/// How long a pod's network waits for the node's: within it the first registration is over.
const NETWORK_PATIENCE: Duration = Duration::from_secs(5);

/// Steps that may be performed at a time: more than a full node's 110 pods have at once in the slowest of them (an end that
/// waits for the kernel), so that no pod waits for another one's.
const MAX_STEPS: usize = 512;
/// How long after a pod's start a new supervisor is looked for to wait for the next one.
const SPARE_REST: Duration = Duration::from_millis(100);

/// The agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Flags about eviction or images do not fit together.
    #[error("{0}")]
    Eviction(String),
    /// A directory cannot be made.
    #[error("create {}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// podshim or pause.
    #[error("{0}")]
    Helper(String),
    /// The book of user ids.
    #[error("open the book of pods' user ids")]
    Users(#[from] UsersError),
    /// The image store.
    #[error("open the image store")]
    Images(#[from] ImageError),
    /// `--registry-credentials` cannot be used.
    #[error("{0}")]
    Registries(String),
    /// `--run-dir` makes paths that no socket can have.
    #[error("run directory {0} is too long for the sockets in it: at most {1} bytes")]
    RunDir(String, usize),
    /// Another agent runs on these directories.
    #[error("run directory {} is in use by another agent", .0.display())]
    InUse(PathBuf),
    /// The endpoint for metrics and health.
    #[error("serve metrics: {0}")]
    Metrics(String),
}

/// What all tasks of the agent share.
#[derive(Debug)]
pub struct Agent {
    /// The command line.
    pub config: Config,
    /// This node's name.
    pub name: String,
    /// Facts of the machine.
    pub machine: Machine,
    /// Where things are.
    pub paths: Paths,
    /// What the API server does not know yet.
    pub outbox: Outbox,
    /// The pods.
    pub pods: Pods,
    /// The ConfigMaps and Secrets that they refer to.
    pub sources: Sources,
    /// The ids of pods that have users of their own.
    users: Mutex<Book>,
    /// The images.
    pub images: Arc<ImageStore>,
    /// Fetches them from registries.
    pub puller: Puller,
    /// The profiles of system calls.
    pub seccomp: Profiles,
    /// What the kernel has of AppArmor.
    pub apparmor: apparmor::Support,
    /// Images were loaded.
    pub images_changed: Notify,
    /// What is counted.
    pub metrics: Metrics,
    /// The first snapshot was seen, and what belongs to no pod removed.
    pub strays_removed: AtomicBool,
    /// Steps that are being performed; closed at the end.
    steps: Semaphore,
    /// Steps were performed since the machine was last measured.
    has_worked: AtomicBool,
    /// The supervisor's binary.
    pub podshim: PathBuf,
    /// The infra container's binary.
    pub pause: PathBuf,
    spare: Arc<Spare>,
    node_ip: Mutex<IpAddr>,
    network: watch::Sender<Option<(Cidr, Arc<Network>)>>,
    node_status: Mutex<Option<(u64, NodeStatus)>>,
    /// When pods are evicted.
    pub eviction: Rules,
    /// When images are removed.
    pub image_gc: crate::image::gc::Rules,
    pressure: Mutex<Conditions>,
    connected: AtomicBool,
    /// Requests that may be served at a time.
    pub streams: Arc<Semaphore>,
    views: Mutex<HashMap<Uid, watch::Receiver<PodView>>>,
    /// Held as long as the agent lives.
    _lock: std::fs::File,
}

/// Starts workers; the agent owns the set of pods, so this must not own the agent.
struct Spawner(Weak<Agent>);

impl Spawn for Spawner {
    fn spawn(&self, uid: Uid, desired: watch::Receiver<Desired>) {
        if let Some(agent) = self.0.upgrade() {
            tokio::spawn(Worker::new(agent, uid, desired).run());
        }
    }
}

fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// sun_path is 108 bytes; a uid and `/shim.sock` follow the run directory.
const MAX_RUN_DIR_BYTES: usize = 107 - "/pods/".len() - 36 - "/shim.sock".len();

impl Agent {
    /// Takes the directories in use and looks at the machine. Starts nothing.
    ///
    /// # Errors
    /// See [`AgentError`].
    pub fn new(config: Config) -> Result<Arc<Self>, AgentError> {
        let run_dir = config.run_dir.to_string_lossy().into_owned();
        if run_dir.len() > MAX_RUN_DIR_BYTES {
            return Err(AgentError::RunDir(run_dir, MAX_RUN_DIR_BYTES));
        }
        let paths = Paths::new(&config.run_dir, &config.data_dir);
        for path in [paths.pods_run(), paths.pods_data(), paths.logs()] {
            std::fs::create_dir_all(&path).map_err(|source| AgentError::Directory { path, source })?;
        }
        let lock = lock_dir(&config.run_dir)?;
        let podshim = Config::helper(config.podshim.as_ref(), "minipod-podshim").map_err(AgentError::Helper)?;
        let pause = Config::helper(config.pause.as_ref(), "minipod-pause").map_err(AgentError::Helper)?;
        let users = Book::open(paths.users(), config.pod_user_ids)?;
        let images = ImageStore::open(&config.data_dir, StoreOptions::default())?;
        let puller = Puller::new(images.clone(), config.registries().map_err(AgentError::Registries)?);
        let machine = Machine::look(&config);
        let profiles = config.seccomp_profile_root.clone().unwrap_or_else(|| config.data_dir.join("seccomp"));
        let eviction = crate::pressure::rules(&config).map_err(AgentError::Eviction)?;
        let image_gc = crate::pressure::image_rules(&config).map_err(AgentError::Eviction)?;
        let name = config.name.clone().unwrap_or_else(|| machine.hostname.to_lowercase());
        let node_ip = address(&config).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
        Ok(Arc::new_cyclic(|weak| Self {
            name,
            seccomp: Profiles::new(profiles),
            apparmor: apparmor::Support::find(),
            machine,
            outbox: Outbox::default(),
            pods: Pods::new(Box::new(Spawner(weak.clone()))),
            sources: Sources::load(paths.sources()),
            users: Mutex::new(users),
            paths,
            images,
            puller,
            images_changed: Notify::new(),
            metrics: Metrics::default(),
            strays_removed: AtomicBool::new(false),
            steps: Semaphore::new(MAX_STEPS),
            has_worked: AtomicBool::new(false),
            podshim,
            pause,
            spare: Arc::default(),
            node_ip: Mutex::new(node_ip),
            network: watch::Sender::new(None),
            node_status: Mutex::new(None),
            eviction,
            image_gc,
            pressure: Mutex::default(),
            connected: AtomicBool::new(false),
            streams: Arc::new(Semaphore::new(crate::streams::MAX_STREAMS)),
            views: Mutex::default(),
            _lock: lock,
            config,
        }))
    }

    /// Holds all pods within the node's allocatable, or no longer, as its flags say. A node that cannot is still better than none: it says so.
    pub fn enforce_allocatable(&self) {
        let is_enforced = self.config.enforce_node_allocatable == "pods";
        let allocatable = is_enforced.then_some(&self.machine.allocatable);
        if let Err(error) = crate::ceiling::set(&self.config.cgroup_root, allocatable) {
            tracing::warn!(error = crate::report::chain(&error), "enforce the node's allocatable on its pods");
        }
    }

    /// What a pod's supervisor is started with.
    #[must_use]
    pub fn launch(&self, uid: &Uid) -> crate::shim::Launch {
        crate::shim::Launch {
            podshim: self.podshim.clone(),
            pause: self.pause.clone(),
            dir: self.paths.pod(uid).run,
            uid: uid.0.clone(),
            cgroup_root: self.config.cgroup_root.clone(),
            spare: self.spare.clone(),
        }
    }

    /// Keeps a supervisor in waiting, and looks for a replacement only when nothing is being done: a start that is under way is not to share
    /// the processor with one that nobody needs yet.
    pub async fn keep_spare(&self) {
        loop {
            if self.steps.available_permits() == MAX_STEPS {
                self.spare.fill(&self.podshim, &self.paths.pods_run()).await;
                self.spare.wanted().await;
            }
            tokio::time::sleep(SPARE_REST).await;
        }
    }

    /// The node's address.
    #[must_use]
    pub fn node_ip(&self) -> IpAddr {
        *unpoisoned(&self.node_ip)
    }

    /// The pod network, once the node's range is known.
    ///
    /// # Errors
    /// When it is not known in time: the API server was never reached.
    pub async fn network(&self) -> Result<Arc<Network>, String> {
        let mut receiver = self.network.subscribe();
        let known = tokio::time::timeout(NETWORK_PATIENCE, receiver.wait_for(Option::is_some)).await;
        match known {
            Ok(Ok(network)) => Ok(network.as_ref().map(|(_, network)| network.clone()).ok_or("no pod network")?),
            _ => Err("the node has no pod CIDR yet: the API server was not reached".to_owned()),
        }
    }

    /// The pod network if it is there now.
    #[must_use]
    pub fn network_now(&self) -> Option<Arc<Network>> {
        self.network.borrow().as_ref().map(|(_, network)| network.clone())
    }

    /// Opens the pod network with the range of a former start, so that pods need no API server.
    pub async fn use_kept_pod_cidr(&self) {
        if let Ok(cidr) = std::fs::read_to_string(self.paths.pod_cidr())
            && let Err(error) = self.use_pod_cidr(cidr.trim()).await
        {
            tracing::error!(error, "the kept pod CIDR cannot be used");
        }
    }

    /// Takes the node's pod CIDR: it stays the same for ever.
    ///
    /// # Errors
    /// When it is another one than before, or the network cannot be set up.
    pub async fn use_pod_cidr(&self, text: &str) -> Result<(), String> {
        if let Ok(ip) = address(&self.config) {
            *unpoisoned(&self.node_ip) = ip;
        }
        let cidr: Cidr = text.parse().map_err(|error: NetError| error.to_string())?;
        if let Some((known, _)) = &*self.network.borrow() {
            let change = || format!("pod CIDR was {known:?}, and is now said to be {text}: drain the node first");
            return if *known == cidr { Ok(()) } else { Err(change()) };
        }
        let config = NetConfig {
            bridge: self.config.bridge.clone(),
            pod_cidr: cidr,
            cluster_cidr: None,
            data_dir: self.config.data_dir.clone(),
            mtu: None,
        };
        let opened = tokio::task::spawn_blocking(move || Network::open(config)).await;
        let network = opened
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("set up the pod network: {}", crate::report::chain(&error)))?;
        std::fs::write(self.paths.pod_cidr(), text)
            .map_err(|error| format!("keep the pod CIDR in {}: {error}", self.paths.pod_cidr().display()))?;
        self.network.send_replace(Some((cidr, Arc::new(network))));
        Ok(())
    }

    /// Makes the routes to the other nodes' pods.
    pub async fn use_routes(&self, routes: Routes) {
        let Some(network) = self.network_now() else { return };
        let own = self.node_ip().to_string();
        let parse = |route: &minipod_proto::v1::routes::Route| {
            Some(NodeRoute { pod_cidr: route.pod_cidr.parse().ok()?, via: route.via.parse().ok()? })
        };
        // Nodes that share this machine's address share its bridges: there is nothing to route.
        let routes: Vec<NodeRoute> = routes
            .routes
            .iter()
            .filter(|route| route.node != self.name && route.via != own)
            .filter_map(parse)
            .collect();
        let set = tokio::task::spawn_blocking(move || network.set_routes(&routes)).await;
        if let Ok(Err(error)) = set {
            tracing::warn!(error = crate::report::chain(&error), "routes to other nodes could not be set");
        }
    }

    /// The Node object to register.
    #[must_use]
    pub fn node_object(&self) -> Node {
        node::node_object(&self.config, &self.name, self.measured())
    }

    /// Sends the node's status if it has changed since it was last sent.
    pub fn refresh_node_status(&self) {
        let old = unpoisoned(&self.node_status).clone();
        if old.as_ref().is_some_and(|(at_ms, _)| boot_ms() < at_ms + MEASURE_EVERY_MS) {
            return;
        }
        self.send_changed_node_status();
        if self.has_worked.swap(false, Ordering::Relaxed) {
            tokio::task::spawn_blocking(minipod_daemon::memory::give_back);
        }
    }

    /// Measures now. After a registration the status is another one: the network stands only once its range is known.
    pub fn send_changed_node_status(&self) {
        let old = unpoisoned(&self.node_status).clone();
        let new = self.measured();
        if old.is_none_or(|(_, old)| node::differs(&old, &new)) {
            self.outbox.node_status(new);
        }
    }

    /// What thresholds say of the node.
    #[must_use]
    pub fn conditions(&self) -> Conditions {
        *unpoisoned(&self.pressure)
    }

    /// Takes note of what thresholds say, and tells the API server if that is news.
    pub fn set_pressure(&self, conditions: Conditions) {
        let before = std::mem::replace(&mut *unpoisoned(&self.pressure), conditions);
        if before != conditions {
            self.send_changed_node_status();
        }
    }

    /// Images that pods of this node use, their ended containers included.
    #[must_use]
    pub fn images_in_use(&self) -> HashSet<Digest> {
        let views = unpoisoned(&self.views);
        views.values().flat_map(|view| view.borrow().images.clone()).filter_map(|id| Digest::parse(&id)).collect()
    }

    /// Removes the images that `choose` names of those that there are; answers what is gone. Blocks.
    ///
    /// # Errors
    /// At the first that cannot be removed.
    pub fn remove_images(&self, choose: impl Fn(&[Candidate]) -> Vec<Digest>) -> Result<Vec<ImageRecord>, ImageError> {
        let seen_ms = wall_ms();
        let in_use = self.images_in_use();
        self.images.note_used(&in_use);
        let candidates: Vec<Candidate> = self
            .images
            .list()
            .into_iter()
            .map(|image| Candidate {
                bytes: image.size_bytes,
                last_used_ms: self.images.last_used_ms(&image),
                in_use: in_use.contains(&image.id),
                named: !image.names.is_empty(),
                id: image.id,
            })
            .collect();
        let mut gone = Vec::new();
        for id in choose(&candidates) {
            gone.extend(self.images.remove_unused(&id, seen_ms)?);
        }
        if !gone.is_empty() {
            tracing::info!(images = ?gone.iter().map(|image| &image.names).collect::<Vec<_>>(), "unused images are removed");
            self.send_changed_node_status();
        }
        Ok(gone)
    }

    /// Takes a name from an image, and with its last one the image; by its digest, with all its names. Answers what went, with the names that it
    /// lost; nothing when there is no such image. Blocks.
    ///
    /// # Errors
    /// [`ImageError::InUse`] when the image would go and a pod has it.
    pub fn remove_image(&self, reference: &str) -> Result<Option<ImageRecord>, ImageError> {
        let seen_ms = wall_ms();
        let Some(image) = self.images.get(reference) else { return Ok(None) };
        let in_use = self.images_in_use();
        self.images.note_used(&in_use);
        let name =
            Reference::parse(reference).ok().filter(|parsed| parsed.digest.is_none()).and_then(|parsed| parsed.name());
        let gone = match name.filter(|name| image.names.len() > 1 && image.names.contains(name)) {
            Some(name) => {
                self.images.remove(reference, &in_use)?;
                ImageRecord { names: vec![name], ..image }
            }
            None if in_use.contains(&image.id) => return Err(ImageError::InUse(reference.to_owned())),
            // A pod that has taken it since counts too.
            None => {
                let gone = self.images.remove_unused(&image.id, seen_ms)?;
                gone.ok_or_else(|| ImageError::InUse(reference.to_owned()))?
            }
        };
        self.send_changed_node_status();
        Ok(Some(gone))
    }

    /// Images were loaded: pods that wait for one look again, and the API server hears of them.
    pub fn images_were_loaded(&self) {
        self.images_changed.notify_waiters();
        let status = self.measured();
        self.outbox.node_status(status);
    }

    fn measured(&self) -> NodeStatus {
        let pressure =
            Pressure::measure(&self.config.data_dir, self.network.borrow().is_some(), *unpoisoned(&self.pressure));
        let mut kept = unpoisoned(&self.node_status);
        let previous = kept.as_ref().map(|(_, status)| status);
        let status =
            node::node_status(&self.machine, self.node_ip(), pressure, &self.images.list(), (previous, wall_ms()));
        *kept = Some((boot_ms(), status.clone()));
        status
    }

    /// ConfigMaps or Secrets have changed, or a pod's own fields: volumes follow, and pods that wait look again. Blocks.
    pub fn refresh_volumes(&self, concerns: impl Fn(&Pod) -> bool) {
        for uid in self.pods.uids() {
            let Some(pod) = self.pods.get(&uid).filter(|pod| concerns(pod)) else { continue };
            let facts = self.volume_facts(&pod);
            let how = (&self.sources.writing, self.users_of(&uid));
            if let Err(error) = crate::volumes::refresh(&pod, &self.paths.pod(&uid), &facts, how) {
                tracing::warn!(%uid, error = crate::report::chain(&error), "a volume keeps its former content");
            }
        }
        self.images_changed.notify_waiters();
    }

    /// The ids of a pod that wants users of its own, new ones if it has none yet; none for another pod.
    ///
    /// # Errors
    /// When there are none left.
    pub fn hold_users(&self, pod: &Pod, uid: &Uid) -> Result<Option<IdRange>, UsersError> {
        if !pod.spec().has_own_users() {
            return Ok(None);
        }
        unpoisoned(&self.users).hold(&uid.0).map(Some)
    }

    /// The ids of a pod that has users of its own.
    #[must_use]
    pub fn users_of(&self, uid: &Uid) -> Option<IdRange> {
        unpoisoned(&self.users).get(&uid.0)
    }

    /// Nothing of the pod lives or has its ids any more.
    ///
    /// # Errors
    /// When they cannot be taken back.
    pub fn release_users(&self, uid: &Uid) -> Result<(), UsersError> {
        unpoisoned(&self.users).release(&uid.0)
    }

    /// Takes back the ids of pods that this node does not have any more; answers those.
    ///
    /// # Errors
    /// When they cannot be taken back.
    pub fn reconcile_users(&self) -> Result<Vec<String>, UsersError> {
        let mut users = unpoisoned(&self.users);
        // Looked at while nobody can take ids: a pod that has just come is either among them or has none yet.
        let live: HashSet<String> = self.pods.uids().into_iter().map(|uid| uid.0).collect();
        users.reconcile(&live)
    }

    /// What volumes are made of.
    #[must_use]
    pub fn volume_facts(&self, pod: &Pod) -> EnvFacts {
        EnvFacts {
            node_name: self.name.clone(),
            host_ip: self.node_ip().to_string(),
            allocatable: self.machine.allocatable.clone(),
            sources: self.sources.known(&key_of(pod).0),
            ..EnvFacts::default()
        }
    }

    /// Lets other tasks see a pod.
    pub fn show(&self, uid: &Uid, view: watch::Receiver<PodView>) {
        unpoisoned(&self.views).insert(uid.clone(), view);
    }

    /// The pod is over.
    pub fn hide(&self, uid: &Uid) {
        unpoisoned(&self.views).remove(uid);
    }

    /// A pod as it is now.
    #[must_use]
    pub fn view(&self, uid: &Uid) -> Option<PodView> {
        unpoisoned(&self.views).get(uid).map(|view| view.borrow().clone())
    }

    /// A pod as it is once this agent has looked at it: after a start that takes until its supervisor has answered. `None` for one that is not
    /// here; one whose supervisor is silent for too long is answered as it is.
    pub async fn view_once_met(&self, uid: &Uid) -> Option<PodView> {
        let mut view = unpoisoned(&self.views).get(uid).cloned()?;
        if !view.borrow().is_met {
            tracing::debug!(%uid, "a request waits until the pod's supervisor has answered");
            // An error means that the worker is gone, and with it the pod; too late means that it is told so.
            let _ = tokio::time::timeout(MEETING_PATIENCE, view.wait_for(|view| view.is_met)).await;
        }
        Some(view.borrow().clone())
    }

    /// Completes when that run of the container is over, or the pod is.
    pub fn run_over(&self, uid: &Uid, container: &str, attempt: u32) -> impl Future<Output = ()> + Send + 'static {
        let view = unpoisoned(&self.views).get(uid).cloned();
        let container = container.to_owned();
        async move {
            let over = |view: &PodView| {
                view.runs
                    .get(&container)
                    .is_none_or(|run| run.attempt > attempt || (run.attempt == attempt && !run.running))
            };
            if let Some(mut view) = view {
                // An error means that the worker is gone, and with it the pod.
                let _ = view.wait_for(over).await;
            }
        }
    }

    /// The right to perform a step; `None` when the agent ends.
    pub async fn step_permit(&self) -> Option<SemaphorePermit<'_>> {
        self.has_worked.store(true, Ordering::Relaxed);
        self.steps.acquire().await.ok()
    }

    /// Begins no more steps and waits for those that are under way, at most for `patience`.
    pub async fn drain(&self, patience: Duration) {
        let all = u32::try_from(MAX_STEPS).unwrap_or(u32::MAX);
        // Whoever asks for a permit from now on stands behind this request.
        let drained = tokio::time::timeout(patience, self.steps.acquire_many(all)).await;
        if drained.is_err() {
            tracing::warn!("steps are still under way: the next start finds what they leave");
        }
        self.steps.close();
    }

    /// Brings the gauges up to date.
    pub fn note_metrics(&self) {
        self.metrics.note(self.pods.count(), self.is_connected(), self.outbox.waiting());
    }

    /// What is wrong with the agent, if anything.
    ///
    /// # Errors
    /// When it cannot make pods or cannot tell of them.
    pub fn health(&self) -> Result<(), String> {
        if !self.is_connected() {
            return Err(format!("no session with an API server at {}", self.config.server));
        }
        if self.network_now().is_none() {
            return Err("the pod network is not set up".to_owned());
        }
        Ok(())
    }

    /// Notes whether a session is up.
    pub fn connected(&self, connected: bool) {
        self.connected.store(connected, Ordering::Relaxed);
        self.note_metrics();
    }

    /// Whether a session is up.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        self.connected.load(Ordering::Relaxed)
    }
}

/// The node's address: stated, or that of the route to the first API server whose name is known.
fn address(config: &Config) -> std::io::Result<IpAddr> {
    if let Some(stated) = config.node_ip {
        return Ok(stated);
    }
    let mut found = Err(std::io::ErrorKind::NotFound.into());
    for server in config.server.as_slice() {
        found = node::address_towards(server);
        if found.is_ok() {
            break;
        }
    }
    found
}

/// Two agents on one run directory would both start every pod.
fn lock_dir(run_dir: &std::path::Path) -> Result<std::fs::File, AgentError> {
    let path = run_dir.join("agent.lock");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|source| AgentError::Directory { path: path.clone(), source })?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(AgentError::InUse(run_dir.to_owned())),
        Err(std::fs::TryLockError::Error(source)) => Err(AgentError::Directory { path, source }),
    }
}
