//! The store as a whole: opened from a data directory, served over TCP or to this process alone.
//!
//! ```text
//! client / clients  ─▶ etcdapi ─▶ Replica ─▶ inbox ─▶ thread: raft, log, machine ─▶ Shared ─▶ reads, watches
//!                                    ▲                    │
//!                        peer server ┘                    └▶ Links ─▶ other members
//! ```

use crate::compactor::{Retention, keep_compacting};
use crate::direct::Transactor;
use crate::disk::{Disk, DiskError, RealDisk};
use crate::etcdapi::{Face, FaceConfig};
use crate::machine::{Member, MemberChange, MemberError, Replicator};
use crate::metrics::{self, Timed};
use crate::peer::server::PeerService;
use crate::peer::tls::PeerTls;
use crate::peer::{IntroduceError, Links, ask_to_join, introduce};
use crate::refused::Refused;
use crate::replica::core::{Boot, Core, ReplicaError, Settings, wal_dir};
use crate::replica::run::{Ended, Pace, Replica, Transport, id_from};
use crate::snapshot::Snapshots;
use crate::space::keep_space;
use crate::state::{Shared, StateMachine};
use crate::wal::{self, Identity, Wal, WalError};
use crate::watch::Watches;
use minipod_daemon::coalesce::Coalesced;
use minipod_daemon::metrics::Registry;
use minipod_daemon::shutdown::{Shutdown, Trigger};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fs::{File, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tower::ServiceExt;
use tower::util::BoxCloneSyncService;

/// Which cluster a member belongs to when its data directory is empty. Later the directory knows.
#[derive(Debug, Clone)]
pub enum Cluster {
    /// A cluster of one. Its peer addresses count once others join.
    Alone {
        /// Where others would find it.
        peer_urls: Vec<String>,
    },
    /// A new cluster of these members, this one among them by its name; the same on all of them.
    New {
        /// Peer addresses by name.
        members: BTreeMap<String, Vec<String>>,
        /// Keeps clusters with the same members apart.
        token: String,
    },
    /// A cluster that is there.
    Join {
        /// Peer addresses of some of its members.
        at: Vec<String>,
        /// Where the others will find this member.
        own_urls: Vec<String>,
    },
}

/// How to open a store.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// This member's name.
    pub name: String,
    /// The cluster to begin or join.
    pub cluster: Cluster,
    /// TLS between members; `None`: they speak plainly.
    pub peer_tls: Option<PeerTls>,
    /// Where clients find this member.
    pub client_urls: Vec<String>,
    /// Ticks and elections.
    pub pace: Pace,
    /// A snapshot is due after so many entries.
    pub snapshot_entries: u64,
    /// What of the history is kept.
    pub retention: Retention,
    /// Limits of the etcd face.
    pub face: FaceConfig,
    /// Where the time of syncs and snapshots is counted.
    pub timed: Timed,
}

impl Config {
    /// A cluster of one, as it is embedded.
    #[must_use]
    pub fn alone(data_dir: PathBuf) -> Self {
        Self {
            data_dir,
            name: "default".to_owned(),
            cluster: Cluster::Alone { peer_urls: Vec::new() },
            peer_tls: None,
            client_urls: Vec::new(),
            pace: Pace::default(),
            snapshot_entries: 100_000,
            retention: Retention::All,
            face: FaceConfig::default(),
            timed: Timed::default(),
        }
    }
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The replica.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// A thread could not be started.
    #[error("start the store's threads")]
    Thread(#[source] std::io::Error),
    /// The configuration names a cluster without this member.
    #[error(
        "initial cluster: it has no member {name:?}, only {known}; give this member one of these names, or add it to the list"
    )]
    NotAMember {
        /// The name.
        name: String,
        /// The names that are there.
        known: String,
    },
    /// No member of the cluster could be asked.
    #[error("join: none of {tried} answered; the last answer was: {last}")]
    Join {
        /// The addresses.
        tried: String,
        /// What happened at the last one.
        last: String,
    },
    /// The directory is empty, but the member has been there before.
    #[error(
        "member {member_id:x} has been part of this cluster, {url} says, and its data directory is empty now: a member without its data must \
         not vote again. Remove it (etcdctl member remove {member_id:x}) and start it with --join {url}"
    )]
    SecondLife {
        /// The member.
        member_id: u64,
        /// Who knows it.
        url: String,
    },
    /// Another process has the directory.
    #[error("{} is in use by another process: end it first, or name another directory", dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// The directory cannot be locked.
    #[error("lock {}", file.display())]
    Lock {
        /// The lock's file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Opening was cut off.
    #[error("opening the store was interrupted")]
    Interrupted,
}

impl From<WalError> for StoreError {
    fn from(error: WalError) -> Self {
        Self::Replica(error.into())
    }
}

impl From<DiskError> for StoreError {
    fn from(error: DiskError) -> Self {
        Self::Replica(error.into())
    }
}

/// An open store. It ends when it is shut down or its replica ends.
#[derive(Debug)]
pub struct Store {
    replica: Replica,
    shared: Arc<Shared>,
    face: Arc<Face<Replica>>,
    snapshots: Snapshots,
    peer_tls: Option<PeerTls>,
    quota_bytes: u64,
    /// Ends the servers.
    trigger: Trigger,
    shutdown: Shutdown,
    tasks: JoinSet<()>,
    /// The data directory is this process's as long as this is open.
    _lock: File,
}

/// Takes a data directory for this process, until the file is closed; makes the directory when it is not there.
pub(crate) fn lock(dir: &Path) -> Result<File, StoreError> {
    RealDisk.create_dir(dir)?;
    let file = dir.join("lock");
    let failed = |source| StoreError::Lock { file: file.clone(), source };
    let opened = File::options().create(true).truncate(false).write(true).open(&file).map_err(failed)?;
    match opened.try_lock() {
        Ok(()) => Ok(opened),
        Err(TryLockError::WouldBlock) => Err(StoreError::InUse { dir: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(failed(source)),
    }
}

/// A random number: for ids and checksums' nonces, not for secrets.
pub(crate) fn random() -> u64 {
    RandomState::new().hash_one(std::process::id())
}

/// Who this member is, and with whom it begins.
struct Place {
    identity: Identity,
    boot: Boot,
    /// The members to talk to until the replica knows its own.
    known: Vec<Member>,
    /// Whether it asks for a vote once it has the log.
    wants_vote: bool,
}

impl Store {
    /// Opens the store, or begins it when its directory is empty. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When the directory is damaged or another cluster's, or the cluster to join cannot be asked.
    pub async fn open(config: Config) -> Result<Self, StoreError> {
        #[cfg(not(feature = "planted-bugs"))]
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        #[cfg(feature = "planted-bugs")]
        let disk = crate::planted::disk();
        let lock = lock(&config.data_dir)?;
        let place = find_place(&config, &*disk).await?;
        let machine = StateMachine::new();
        let shared = machine.shared();
        let mut settings = Settings::new(place.identity);
        settings.election_ticks = config.pace.election_ticks;
        settings.snapshot_entries = config.snapshot_entries;
        #[cfg(feature = "planted-bugs")]
        {
            settings.planted = crate::planted::bug();
        }
        settings.wal = wal::Options {
            nonce_seed: random(),
            prepare_ahead: true,
            sync_seconds: Some(Arc::clone(&config.timed.wal_sync)),
            ..wal::Options::default()
        };
        settings.timed = config.timed.clone();
        let (dir, boot) = (config.data_dir.clone(), place.boot.clone());
        // Reading a large directory takes seconds, which the runtime's threads have not.
        let opening = tokio::task::spawn_blocking(move || Core::open(&disk, &dir, settings, &boot, machine));
        let core = opening.await.map_err(|_| StoreError::Interrupted)??;
        let (snapshots, runtime) = (core.snapshots().clone(), tokio::runtime::Handle::current());
        let tls = config.peer_tls.clone();
        let replica = Replica::start(core, config.pace, |replica| {
            let inbox = Arc::clone(replica.inbox());
            let links: Arc<dyn Transport> =
                Links::new(place.identity, tls, inbox, snapshots.clone(), runtime, place.known.clone());
            links
        })
        .map_err(StoreError::Thread)?;
        let face = Face::new(replica.clone(), Arc::clone(&shared), config.face).map_err(StoreError::Thread)?;
        let (trigger, shutdown) = Shutdown::manual();
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&face).keep_leases());
        tasks.spawn(keep_space(replica.clone(), Arc::clone(&shared), config.face.quota_bytes));
        if config.retention != Retention::All {
            tasks.spawn(keep_compacting(replica.clone(), Arc::clone(&shared), config.retention));
        }
        let introduced = replica.clone();
        tasks.spawn(async move {
            introduced.publish(&config.name, config.client_urls).await;
            if place.wants_vote {
                ask_for_vote(&introduced).await;
            }
        });
        Ok(Self {
            replica,
            shared,
            face,
            snapshots,
            peer_tls: config.peer_tls,
            quota_bytes: config.face.quota_bytes,
            trigger,
            shutdown,
            tasks,
            _lock: lock,
        })
    }

    /// An etcd client within this process. Its calls are the server's functions: the same messages as over TCP, but no connection, no
    /// frames and no compressed headers, which cost more than the store's own work for a small write.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub async fn client(
        &self,
        wants: Option<etcd_client::ConnectOptions>,
    ) -> Result<etcd_client::Client, etcd_client::Error> {
        let routes = self.face.routes().prepare();
        let routes =
            ServiceExt::<http::Request<tonic::body::Body>>::map_err(routes, |never: Infallible| match never {});
        let channel = etcd_client::Channel::Custom(BoxCloneSyncService::new(routes));
        etcd_client::Client::from_channel(channel, wants).await
    }

    /// For transactions of this process, without a client between.
    #[must_use]
    pub fn transactor(&self) -> Transactor {
        Transactor::new(Arc::clone(&self.face))
    }

    /// The replica.
    #[must_use]
    pub const fn replica(&self) -> &Replica {
        &self.replica
    }

    /// The state.
    #[must_use]
    pub const fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// How many watches there are, and how many of them lag behind.
    #[must_use]
    pub fn watchers(&self) -> (usize, usize) {
        self.face.watches().watchers()
    }

    /// All watches.
    #[must_use]
    pub fn watches(&self) -> Arc<Watches> {
        Arc::clone(self.face.watches())
    }

    /// Shows this store in what a registry renders; [`Config::timed`] has the rest.
    pub fn show_in(&self, registry: &Registry) {
        metrics::show(self, registry, self.quota_bytes);
    }

    /// Serves clients on a listener until the store ends; with `tls` those alone that show a certificate of its authority.
    ///
    /// # Errors
    /// When the certificates cannot be used.
    pub fn serve_clients(
        &mut self,
        listener: TcpListener,
        tls: Option<&PeerTls>,
    ) -> Result<(), tonic::transport::Error> {
        let shutdown = self.shutdown.clone();
        let asked = async move { shutdown.asked().await };
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        // What is gathered must be what TLS has made of it: below TLS, a handshake would wait in the buffer for a flush that never comes.
        let mut server = match tls {
            Some(tls) => tls.serve(server())?,
            None => server(),
        };
        let (router, is_secured) = (server.add_routes(self.face.routes()), tls.is_some());
        self.tasks.spawn(async move {
            let served = if is_secured {
                router.serve_with_incoming_shutdown(incoming, asked).await
            } else {
                let gathered = incoming.map(|accepted| accepted.map(Coalesced::new));
                router.serve_with_incoming_shutdown(gathered, asked).await
            };
            if let Err(error) = served {
                tracing::error!(%error, "serve clients");
            }
        });
        Ok(())
    }

    /// Serves the other members on a listener until the store ends.
    ///
    /// # Errors
    /// When the certificates cannot be used.
    pub fn serve_peers(&mut self, listener: TcpListener) -> Result<(), tonic::transport::Error> {
        self.serve_peers_beside(listener, Routes::default())
    }

    /// As [`Store::serve_peers`], with services of others for which members authenticate themselves in the same way.
    ///
    /// # Errors
    /// When the certificates cannot be used.
    pub fn serve_peers_beside(&mut self, listener: TcpListener, others: Routes) -> Result<(), tonic::transport::Error> {
        let shutdown = self.shutdown.clone();
        let service = PeerService::server(self.replica.clone(), self.snapshots.clone());
        let mut server = match &self.peer_tls {
            Some(tls) => tls.serve(server())?,
            None => server(),
        };
        let server = server.add_routes(others.add_service(service));
        self.tasks.spawn(async move {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let asked = async move { shutdown.asked().await };
            if let Err(error) = server.serve_with_incoming_shutdown(incoming, asked).await {
                tracing::error!(%error, "serve other members");
            }
        });
        Ok(())
    }

    /// Returns when the replica has ended: because it was asked, or because it must.
    pub async fn ended(&self) -> Ended {
        self.replica.ended().await
    }

    /// Ends the store: a leader hands over, what is under way is answered, then the servers close.
    pub async fn shutdown(mut self) -> Ended {
        self.replica.stop();
        let ended = self.replica.ended().await;
        // Watches are long calls that do not end by themselves.
        self.face.end_streams();
        self.trigger.end();
        tokio::time::sleep(Duration::from_millis(100)).await;
        self.tasks.shutdown().await;
        ended
    }
}

fn server() -> Server {
    Server::builder()
        // A client that is gone without a word must not keep its watches.
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        // Many small calls share a connection; the default window of 64 KiB would make them wait for each other.
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
}

/// A learner that joined by itself becomes a voter once it has the log.
async fn ask_for_vote(replica: &Replica) {
    let id = replica.identity().member_id;
    loop {
        match replica.change_members(MemberChange::Promote { id }).await {
            Ok(_) | Err(MemberError::Refused(Refused::MemberNotLearner)) => {
                tracing::info!("this member has its vote");
                return;
            }
            Err(MemberError::Propose(crate::machine::ProposeError::Stopped)) => return,
            Err(error) => tracing::debug!(%error, "ask for the vote"),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// A member that votes, loses its directory and begins anew under the same id could vote twice in one term: the others know whether it has
/// been there before.
async fn refuse_second_life(place: &Place, tls: Option<&PeerTls>) -> Result<(), StoreError> {
    let me = place.identity.member_id;
    let others = place.known.iter().filter(|member| member.id != me).flat_map(|member| &member.peer_urls);
    for url in others {
        // One that does not answer at once cannot be asked; at a cluster's first start that is the rule.
        let Ok(Ok(answer)) = tokio::time::timeout(Duration::from_secs(2), introduce(url, tls, true)).await else {
            continue;
        };
        let is_same_cluster = answer.cluster_id == place.identity.cluster_id;
        let known = answer.members.iter().find(|member| member.id == me);
        if is_same_cluster && known.is_none_or(|member| !member.client_urls.is_empty()) {
            return Err(StoreError::SecondLife { member_id: me, url: url.clone() });
        }
    }
    Ok(())
}

async fn find_place(config: &Config, disk: &dyn Disk) -> Result<Place, StoreError> {
    let wal_dir = wal_dir(&config.data_dir);
    let found = if Wal::begun(disk, &wal_dir)? { wal::identity(disk, &wal_dir)? } else { None };
    let place = match (&config.cluster, found) {
        (Cluster::New { members, token }, found) => {
            let place = place_in_new(&config.name, members, token)?;
            if let Some(found) = found.filter(|found| *found != place.identity) {
                let dir = config.data_dir.clone();
                return Err(ReplicaError::Identity { dir, found, expected: place.identity }.into());
            }
            if found.is_none() {
                refuse_second_life(&place, config.peer_tls.as_ref()).await?;
            }
            place
        }
        (Cluster::Alone { .. }, Some(identity)) => {
            Place { identity, boot: Boot::Join, known: Vec::new(), wants_vote: false }
        }
        (Cluster::Alone { peer_urls }, None) => alone(&config.name, peer_urls),
        (Cluster::Join { at, own_urls }, found) => join(at, own_urls, found, config.peer_tls.as_ref()).await?,
    };
    Ok(place)
}

fn alone(name: &str, peer_urls: &[String]) -> Place {
    let identity = Identity { cluster_id: random().max(1), member_id: random().max(1) };
    let (name, peer_urls) = (name.to_owned(), peer_urls.to_vec());
    let member = Member { id: identity.member_id, name, peer_urls, ..Member::default() };
    Place { identity, boot: Boot::Members(vec![member]), known: Vec::new(), wants_vote: false }
}

/// Who a member of a new cluster is, and with whom it begins.
///
/// # Errors
/// When it is not among the members, or the cluster is not a new one.
pub(crate) fn boot_for(name: &str, cluster: &Cluster) -> Result<(Identity, Boot), StoreError> {
    let place = match cluster {
        Cluster::Alone { peer_urls } => alone(name, peer_urls),
        Cluster::New { members, token } => place_in_new(name, members, token)?,
        Cluster::Join { at, .. } => {
            let last = "a saved snapshot begins a new cluster".to_owned();
            return Err(StoreError::Join { tried: at.join(", "), last });
        }
    };
    Ok((place.identity, place.boot))
}

/// The members of a new cluster have ids that follow from the configuration, so that all of them know the same.
fn place_in_new(name: &str, members: &BTreeMap<String, Vec<String>>, token: &str) -> Result<Place, StoreError> {
    let digest = |parts: &mut dyn Iterator<Item = &str>| {
        let mut hasher = Sha256::new();
        for part in parts {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        id_from(&hasher.finalize())
    };
    let words = || members.iter().flat_map(|(name, urls)| std::iter::once(name).chain(urls)).map(String::as_str);
    let cluster_id = digest(&mut std::iter::once(token).chain(words()));
    let member = |(name, urls): (&String, &Vec<String>)| Member {
        id: digest(&mut [token, name].into_iter().chain(urls.iter().map(String::as_str))),
        name: name.clone(),
        peer_urls: urls.clone(),
        ..Member::default()
    };
    let known: Vec<Member> = members.iter().map(member).collect();
    let me = known.iter().find(|member| member.name == name).ok_or_else(|| StoreError::NotAMember {
        name: name.to_owned(),
        known: members.keys().cloned().collect::<Vec<_>>().join(", "),
    })?;
    let identity = Identity { cluster_id, member_id: me.id };
    Ok(Place { identity, boot: Boot::Members(known.clone()), known, wants_vote: false })
}

/// Asks the cluster who it is. A member that was added before is found by its addresses; any other is added as a learner.
async fn join(
    at: &[String],
    own_urls: &[String],
    found: Option<Identity>,
    tls: Option<&PeerTls>,
) -> Result<Place, StoreError> {
    let mut last = "no address was given".to_owned();
    for url in at {
        let answer: Result<Place, IntroduceError> = async {
            let introduction = introduce(url, tls, false).await?;
            let mine =
                introduction.members.iter().find(|member| own_urls.iter().any(|url| member.peer_urls.contains(url)));
            let (member_id, wants_vote) = match (found, mine) {
                (Some(found), _) => (found.member_id, false),
                (None, Some(mine)) => (mine.id, false),
                (None, None) => (ask_to_join(url, tls, &introduction, own_urls).await?, true),
            };
            let identity = Identity { cluster_id: introduction.cluster_id, member_id };
            Ok(Place { identity, boot: Boot::Join, known: introduction.members, wants_vote })
        }
        .await;
        match answer {
            Ok(place) => return Ok(place),
            Err(error) => last = crate::replica::run::with_causes(&error),
        }
    }
    // A member that has been there needs nobody: it knows the others from its own directory.
    match found {
        Some(identity) => Ok(Place { identity, boot: Boot::Join, known: Vec::new(), wants_vote: false }),
        None => Err(StoreError::Join { tried: at.join(", "), last }),
    }
}
