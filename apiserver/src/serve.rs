//! Puts the parts together: binds early, serves, drains.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use minipod_daemon::{coalesce::Coalesced, http, metrics::Registry as Metrics, shutdown::Shutdown};
use minipod_proto::{
    FILE_DESCRIPTOR_SET,
    v1::{
        explaining_server::ExplainingServer, images_server::ImagesServer, pod_access_server::PodAccessServer,
        relays_server::RelaysServer, scheduling_server::SchedulingServer, stores_server::StoresServer,
    },
};
use minipod_store::{
    members::Members as PeerMembers,
    metrics::Timed,
    peer::tls::{PeerTls, TlsError, TlsFiles, check_urls},
    remote::Remote,
    replica::run::Ended,
    service::{Cluster, Store},
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_stream::StreamExt;
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{
    binding::Binder,
    cache::{Cache, Limits, feed},
    events::{self, Recorder},
    nodes::{Identity, Sessions, cidr::ClusterCidr, contact, register::Registrar, routes, session},
    registry::{Registry, budgets, namespaces},
    services::{
        access::AccessApi, explaining::ExplainingApi, nodes::NodesApi, objects::ObjectsApi, scheduling::SchedulingApi,
        stores::StoresApi,
    },
    space::{self, Members},
    storage::{self, Storage, StoreError},
    tunnels::{
        Tunnels,
        relay::{Dialer, RelayApi},
    },
    wire::{self, REQUEST_LIMIT_BYTES},
};

/// Connections get this long to end by themselves after the shutdown.
const DRAIN: Duration = Duration::from_secs(1);
/// A peer that does not answer pings is gone; its sessions and watches end.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_PATIENCE: Duration = Duration::from_secs(10);

/// Where the objects are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreAt {
    /// An etcd, or anything that speaks its protocol, at `host:port` addresses.
    Etcd(Vec<String>),
    /// A store of this process's own, in a directory.
    Embedded(PathBuf),
    /// A replica of a store that several API servers carry together.
    Replica(Replica),
}

/// One replica of several, each in an API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// Its directory.
    pub dir: PathBuf,
    /// Its name among the members.
    pub name: String,
    /// All members, the same list in every API server.
    pub members: PeerMembers,
    /// Where it serves the other members.
    pub listen: SocketAddr,
    /// TLS between members; `None`: plain HTTP.
    pub tls: Option<TlsFiles>,
}

impl std::fmt::Display for StoreAt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StoreAt::Etcd(addresses) => write!(f, "etcd://{}", addresses.join(",")),
            StoreAt::Embedded(dir) => write!(f, "embedded in {}", dir.display()),
            StoreAt::Replica(replica) => {
                let (name, dir, all) = (&replica.name, replica.dir.display(), replica.members.len());
                write!(f, "embedded in {dir}, member {name} of {all}")
            }
        }
    }
}

/// Where this process's own store is served to others, such as etcdctl and `minictl store snapshot`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreListen {
    /// The address.
    pub address: SocketAddr,
    /// TLS with clients of its authority alone; `None`: plain, on this machine alone.
    pub tls: Option<TlsFiles>,
}

impl StoreListen {
    /// Whether it can be served like this: whoever reaches it can read and write everything.
    ///
    /// # Errors
    /// [`StartError::Exposed`] for an address beyond this machine without certificates.
    fn check(&self) -> Result<(), StartError> {
        if self.tls.is_none() && !self.address.ip().is_loopback() {
            return Err(StartError::Exposed { address: self.address });
        }
        Ok(())
    }

    /// What others write to reach it.
    fn url(&self) -> String {
        format!("{}://{}", if self.tls.is_some() { "https" } else { "http" }, self.address)
    }
}

/// What a server needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where the objects are kept.
    pub store: StoreAt,
    /// Where a store of this process's own is served to others, if anywhere.
    pub store_listen: Option<StoreListen>,
    /// How large a store of this process's own may grow, bytes; 0 for no limit.
    pub store_quota_bytes: u64,
    /// The store's limit of operations in a transaction.
    pub max_txn_ops: usize,
    /// Where to serve.
    pub listen: SocketAddr,
    /// What other servers tell clients who look for a node of this one; empty: the real listen address.
    pub advertise: String,
    /// Where to serve /healthz and /metrics, if anywhere.
    pub metrics_listen: Option<SocketAddr>,
    /// The addresses of all pods.
    pub cluster_cidr: ClusterCidr,
    /// How long a node may be silent.
    pub node_grace: Duration,
    /// How much of the past the store keeps; `None`: somebody else compacts it.
    pub keep_history: Option<Duration>,
    /// Sizes of the cache.
    pub limits: Limits,
}

/// Why a server could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is taken, or not ours.
    #[error("listen on {address}: {source}")]
    Listen {
        /// As it was given.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The store's addresses cannot be understood.
    #[error("--store: {0}")]
    Store(#[from] StoreError),
    /// The store of this process cannot be opened.
    #[error("--data-dir {path}: {source}", path = dir.display())]
    Embedded {
        /// Its directory.
        dir: PathBuf,
        /// Why not.
        source: minipod_store::service::StoreError,
    },
    /// The members of the store cannot speak TLS as configured.
    #[error("--peers: {}", minipod_store::replica::run::with_causes(.0))]
    Tls(#[from] TlsError),
    /// The store would be open to everybody who reaches the address.
    #[error(
        "--store-listen {address}: whoever reaches this address could read and write everything, Secrets with it; listen on 127.0.0.1, or give \
         --store-cert-file, --store-key-file and --store-trusted-ca-file (`minipod-store certs` makes them)"
    )]
    Exposed {
        /// As it was given.
        address: SocketAddr,
    },
    /// The store's clients cannot be served as configured.
    #[error("--store-listen: {}", minipod_store::replica::run::with_causes(.0))]
    StoreTls(TlsError),
    /// The store's clients cannot be served.
    #[error("serve the store's clients: {0}")]
    StoreClients(tonic::transport::Error),
    /// The other members cannot be served.
    #[error("serve the other members of the store: {0}")]
    Peers(tonic::transport::Error),
    /// The store of this process cannot be spoken to.
    #[error("speak to the embedded store: {0}")]
    Channel(#[from] etcd_client::Error),
    /// The description of the API cannot be served.
    #[error("set up the reflection service: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A server that ended without having been asked.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its own store has ended: nothing can be kept any more.
    #[error("the embedded store has ended: {0}")]
    Store(String),
    /// Its listener broke.
    #[error("serve: {0}")]
    Serve(#[from] tonic::transport::Error),
}

/// A server that runs.
pub struct Running {
    /// Where it serves.
    pub address: SocketAddr,
    /// Where it serves metrics.
    pub metrics_address: Option<SocketAddr>,
    /// Ends when the server has.
    pub ended: JoinHandle<Result<(), ServeError>>,
}

/// Starts a server. It serves at once; until the store is reached its answers are UNAVAILABLE.
///
/// # Errors
/// When it cannot listen, or its configuration makes no sense.
pub async fn start(config: Config, shutdown: Shutdown) -> Result<Running, StartError> {
    let listen = |address, source| StartError::Listen { address, source };
    let listener = TcpListener::bind(config.listen).await.map_err(|error| listen(config.listen, error))?;
    let address = listener.local_addr().map_err(|error| listen(config.listen, error))?;
    let metrics = Arc::new(Metrics::default());
    let cache = Cache::new(config.limits, &metrics);
    let advertise = if config.advertise.is_empty() { address.to_string() } else { config.advertise.clone() };
    let (identity, tls) = introduce(&config, advertise)?;
    let sessions = Sessions::new(identity, Arc::clone(&cache), &metrics);
    let tunnels = Tunnels::new(Arc::clone(&sessions), Arc::clone(&cache), Dialer { tls: tls.clone() });
    let own = (tls, sessions.identity().address.as_str());
    let (storage, own_store) = open_store(&config, own, &tunnels, &metrics).await?;
    let members = match (&config.store, &own_store) {
        (_, Some(store)) => Members::own(Remote::with(store.client(None).await?, "the store of this process")),
        (StoreAt::Etcd(addresses), None) => Members::etcd(addresses),
        // There is a store of this process wherever it is embedded.
        (_, None) => Members::etcd(&[]),
    };

    let parts = Parts::new(&config, storage, (sessions, tunnels), (cache, members), metrics);
    let metrics_address = match config.metrics_listen {
        Some(wanted) => {
            let bound = http::serve_checks(wanted, Arc::clone(&parts.metrics), parts.checks(), shutdown.clone()).await;
            Some(bound.map_err(|error| listen(wanted, error))?)
        }
        None => None,
    };
    let routes = parts.spawn_tasks(&config, &shutdown);
    let router = parts.services(&config, routes, &shutdown)?;

    let server = Server::builder()
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_PATIENCE))
        // Many small calls share a connection; with the default of 64 KiB they would wait for each other.
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .add_routes(router);
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true)).map(|accepted| accepted.map(Coalesced::new));
    let ended = tokio::spawn(async move {
        let asked = shutdown.clone();
        let serving = server.serve_with_incoming_shutdown(incoming, async move { asked.asked().await });
        let drained = async {
            shutdown.asked().await;
            tokio::time::sleep(DRAIN).await;
        };
        // Watches never end by themselves: after the drain they are dropped with everything else.
        let outcome = tokio::select! {
            served = serving => served.map_err(ServeError::from),
            () = drained => Ok(()),
            how = store_ended(own_store.as_ref()) => Err(ServeError::Store(how)),
        };
        if let Some(store) = own_store {
            store.shutdown().await;
        }
        outcome
    });
    Ok(Running { address, metrics_address, ended })
}

/// Who this server is to others, and what it shows them: members of a store meet where the store's replicas do, others at the API.
fn introduce(config: &Config, advertise: String) -> Result<(Identity, Option<PeerTls>), StartError> {
    let StoreAt::Replica(replica) = &config.store else {
        if matches!(config.store, StoreAt::Etcd(_))
            && config.advertise.is_empty()
            && config.listen.ip().is_unspecified()
        {
            tracing::warn!(
                listen = %config.listen,
                "--advertise is not given: other API servers of the store cannot pass requests for nodes on to this one"
            );
        }
        let relay = format!("http://{advertise}");
        return Ok((Identity::new(advertise, relay), None));
    };
    check_urls(replica.members.values().flatten(), replica.tls.is_some())?;
    let tls = replica.tls.as_ref().map(PeerTls::load).transpose()?;
    let own = replica.members.get(&replica.name).and_then(|urls| urls.first()).cloned();
    Ok((Identity::new(advertise, own.unwrap_or_default()), tls))
}

/// The store's client, and the store itself where it is this process's own.
async fn open_store(
    config: &Config,
    own: (Option<PeerTls>, &str),
    tunnels: &Arc<Tunnels>,
    metrics: &Arc<Metrics>,
) -> Result<(Storage, Option<Store>), StartError> {
    let store = match &config.store {
        StoreAt::Etcd(addresses) => return Ok((Storage::connect(addresses, config.max_txn_ops).await?, None)),
        StoreAt::Embedded(dir) => {
            let mut options = minipod_store::service::Config::alone(dir.clone());
            options.client_urls = config.store_listen.iter().map(StoreListen::url).collect();
            open_embedded(options, config, metrics).await?
        }
        StoreAt::Replica(replica) => {
            let relays = Routes::new(RelaysServer::new(RelayApi::new(Arc::clone(tunnels))));
            open_replica(replica, config, own, relays, metrics).await?
        }
    };
    let (client, follower) = (store.client(None).await?, store.client(Some(storage::following())).await?);
    let storage = Storage::from_clients(&client, &follower, config.max_txn_ops).with_own(store.transactor());
    Ok((storage, Some(store)))
}

/// Opens a store, and serves it to others where that is wanted.
async fn open_embedded(
    mut options: minipod_store::service::Config,
    config: &Config,
    metrics: &Arc<Metrics>,
) -> Result<Store, StartError> {
    // Bound first: a wrong address shows before the directory is touched.
    let listener = match &config.store_listen {
        Some(wanted) => {
            wanted.check()?;
            let tls = wanted.tls.as_ref().map(PeerTls::load).transpose().map_err(StartError::StoreTls)?;
            let bound = TcpListener::bind(wanted.address).await;
            Some((bound.map_err(|source| StartError::Listen { address: wanted.address, source })?, tls))
        }
        None => None,
    };
    options.face.max_txn_ops = config.max_txn_ops;
    options.face.quota_bytes = config.store_quota_bytes;
    options.timed = Timed::of(metrics);
    let dir = options.data_dir.clone();
    let mut store = Store::open(options).await.map_err(|source| StartError::Embedded { dir, source })?;
    store.show_in(metrics);
    if let Some((listener, tls)) = listener {
        store.serve_clients(listener, tls.as_ref()).map_err(StartError::StoreClients)?;
    }
    Ok(store)
}

/// Opens one of several replicas and serves the others. It need not have a leader yet.
async fn open_replica(
    replica: &Replica,
    config: &Config,
    (tls, advertise): (Option<PeerTls>, &str),
    relays: Routes,
    metrics: &Arc<Metrics>,
) -> Result<Store, StartError> {
    let mut options = minipod_store::service::Config::alone(replica.dir.clone());
    options.peer_tls = tls;
    options.name = replica.name.clone();
    options.cluster = Cluster::New { members: replica.members.clone(), token: "minipod".to_owned() };
    // A member that has told where its clients find it has lived: it may not begin anew with an empty directory. Where the store is
    // not served, its clients are the API's.
    options.client_urls =
        vec![config.store_listen.as_ref().map_or_else(|| format!("http://{advertise}"), StoreListen::url)];
    // Bound first: a wrong address shows before the directory is touched.
    let listener = TcpListener::bind(replica.listen).await;
    let listener = listener.map_err(|source| StartError::Listen { address: replica.listen, source })?;
    let mut store = open_embedded(options, config, metrics).await?;
    store.serve_peers_beside(listener, relays).map_err(StartError::Peers)?;
    Ok(store)
}

/// How this process's own store ended; never where there is none.
async fn store_ended(store: Option<&Store>) -> String {
    match store {
        Some(store) => match store.ended().await {
            Ended::Failed(how) => how.to_string(),
            other => format!("{other:?}"),
        },
        None => std::future::pending().await,
    }
}

/// What all services share.
struct Parts {
    registry: Arc<Registry>,
    sessions: Arc<Sessions>,
    tunnels: Arc<Tunnels>,
    recorder: Recorder,
    queue: std::sync::Mutex<Option<events::Queue>>,
    members: Members,
    metrics: Arc<Metrics>,
}

impl Parts {
    fn new(
        config: &Config,
        storage: Storage,
        (sessions, tunnels): (Arc<Sessions>, Arc<Tunnels>),
        (cache, members): (Arc<Cache>, Members),
        metrics: Arc<Metrics>,
    ) -> Parts {
        let Identity { id, address, relay, .. } = sessions.identity();
        tracing::info!(store = %config.store, id, address, relay, "starting");
        let registry = Arc::new(Registry::new(storage, cache, &metrics));
        let (recorder, queue) = Recorder::new(&metrics);
        Parts { registry, sessions, tunnels, recorder, queue: std::sync::Mutex::new(Some(queue)), members, metrics }
    }

    /// Healthy while the store is followed; ready while it can be written, too.
    fn checks(&self) -> http::Checks {
        let (cache, registry) = (Arc::clone(&self.registry.cache), Arc::clone(&self.registry));
        http::Checks {
            health: Arc::new(move || cache.trouble().map_or(Ok(()), Err)),
            ready: Arc::new(move || registry.cache.trouble().or_else(|| registry.space.trouble()).map_or(Ok(()), Err)),
        }
    }

    /// Starts everything that runs beside the services.
    fn spawn_tasks(&self, config: &Config, shutdown: &Shutdown) -> watch::Receiver<routes::Table> {
        let (registry, end) = (&self.registry, || shutdown.clone());
        tokio::spawn(feed::follow(Arc::clone(&registry.cache), registry.storage.clone(), end()));
        tokio::spawn(space::watch(Arc::clone(&registry.space), self.members.clone(), end()));
        tokio::spawn(namespaces::keep(Arc::clone(registry), end()));
        tokio::spawn(budgets::keep(Arc::clone(registry), end()));
        tokio::spawn(contact::watch(Arc::clone(registry), Arc::clone(&self.sessions), config.node_grace, end()));
        let (sender, table) = watch::channel(routes::Table::default());
        tokio::spawn(routes::keep(Arc::clone(&registry.cache), sender, end()));
        let queue = self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(queue) = queue {
            tokio::spawn(events::write(Arc::clone(registry), queue, end()));
        }
        if let Some(keep) = config.keep_history {
            tokio::spawn(compact(registry.storage.clone(), keep, end()));
        }
        table
    }

    fn services(
        &self,
        config: &Config,
        table: watch::Receiver<routes::Table>,
        shutdown: &Shutdown,
    ) -> Result<Routes, StartError> {
        let heartbeat = (config.node_grace / 3).min(Duration::from_secs(5));
        let heartbeat_ms = i64::try_from(heartbeat.as_millis()).unwrap_or(5_000);
        let registry = || Arc::clone(&self.registry);
        let registrar = Registrar::new(registry(), Arc::clone(&self.sessions), config.cluster_cidr, heartbeat_ms);
        let shared = session::Shared {
            registry: registry(),
            sessions: Arc::clone(&self.sessions),
            recorder: self.recorder.clone(),
            routes: table,
            grace: config.node_grace,
        };
        let nodes = NodesApi::new(registrar, Arc::new(shared), Arc::clone(&self.tunnels));
        let binder = Binder::new(registry(), self.recorder.clone(), Arc::clone(&self.metrics));
        let scheduling = SchedulingApi::new(registry(), binder, self.recorder.clone());
        // An explanation names every node.
        let explaining = ExplainingServer::new(ExplainingApi::new(registry())).max_decoding_message_size(64 << 20);
        let access = AccessApi::new(registry(), Arc::clone(&self.tunnels));

        let (reporter, health) = tonic_health::server::health_reporter();
        tokio::spawn(report_health(reporter, Arc::clone(&self.registry.cache), shutdown.clone()));
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);

        let mut routes = Routes::builder();
        routes.add_service(health);
        routes.add_service(reflection.build_v1()?);
        routes.add_service(wire::Objects::new(Arc::new(ObjectsApi::new(registry()))));
        routes.add_service(wire::Nodes::new(Arc::new(nodes)));
        routes.add_service(SchedulingServer::new(scheduling).max_decoding_message_size(REQUEST_LIMIT_BYTES));
        routes.add_service(explaining);
        routes.add_service(PodAccessServer::new(access.clone()).max_decoding_message_size(REQUEST_LIMIT_BYTES));
        routes.add_service(StoresServer::new(StoresApi::new(registry(), self.members.clone())));
        routes.add_service(ImagesServer::new(access).max_decoding_message_size(REQUEST_LIMIT_BYTES));
        // Members of a store pass requests on where their replicas meet.
        if !matches!(config.store, StoreAt::Replica(_)) {
            routes.add_service(RelaysServer::new(RelayApi::new(Arc::clone(&self.tunnels))));
        }
        Ok(routes.routes())
    }
}

/// Tells the gRPC health service whether the store is followed.
async fn report_health(reporter: HealthReporter, cache: Arc<Cache>, shutdown: Shutdown) {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut told = None;
    loop {
        // Cancel safe: a tick that is not taken comes again.
        tokio::select! {
            _ = tick.tick() => {}
            () = shutdown.asked() => return,
        }
        let status = if cache.trouble().is_none() { ServingStatus::Serving } else { ServingStatus::NotServing };
        if told != Some(status) {
            reporter.set_service_status("", status).await;
            told = Some(status);
        }
    }
}

/// Lets the store forget what is older than `keep`. Several servers may do so: the later one finds it done.
async fn compact(storage: Storage, keep: Duration, shutdown: Shutdown) {
    let mut before = None;
    loop {
        match storage.revision().await {
            Ok(now) => {
                if let Some(revision) = before.replace(now)
                    && let Err(error) = storage.compact(revision).await
                {
                    tracing::warn!(%error, "the store's past is not compacted");
                }
            }
            Err(error) => tracing::debug!(%error, "the store's past is not compacted"),
        }
        // Cancel safe: a sleep.
        tokio::select! {
            () = tokio::time::sleep(keep) => {}
            () = shutdown.asked() => return,
        }
    }
}
