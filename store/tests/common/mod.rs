//! What the store's tests share: a server in this process, a real etcd, a client of either that speaks raw messages.
#![allow(dead_code, reason = "every test uses its part")]

pub mod model;
pub mod requests;

use bytes::Bytes;
use etcd_client::proto::*;
use minipod_store::etcdapi::{Face, FaceConfig};
use minipod_store::machine::{
    Machine, Member, MemberChange, MemberError, Outcome, ProposeError, ReplicaStatus, Replicator,
};
use minipod_store::refused::Refused;
use minipod_store::service::{Config, Store};
use minipod_store::state::StateMachine;
use prost::Message;
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

/// A replica that is alone, remembers nothing and never fails: what remains is the face and the state machine.
#[derive(Clone, Default)]
pub struct Alone(Arc<Mutex<(StateMachine, u64)>>);

impl Alone {
    pub fn machine<T>(&self, with: impl FnOnce(&mut StateMachine) -> T) -> T {
        with(&mut self.0.lock().unwrap().0)
    }
}

impl Replicator for Alone {
    async fn propose(&self, command: Bytes) -> Result<Outcome, ProposeError> {
        let mut guard = self.0.lock().unwrap();
        guard.1 += 1;
        let index = guard.1;
        let outcome = guard.0.apply(index, &command);
        guard.0.batch_applied();
        Ok(outcome)
    }
    async fn read_index(&self) -> Result<u64, ProposeError> {
        Ok(self.0.lock().unwrap().1)
    }
    fn status(&self) -> ReplicaStatus {
        let index = self.0.lock().unwrap().1;
        ReplicaStatus {
            cluster_id: 7,
            member_id: 11,
            leader_id: 11,
            term: 2,
            commit_index: index,
            applied_index: index,
            ..ReplicaStatus::default()
        }
    }
    fn members(&self) -> Vec<Member> {
        vec![Member { id: 11, name: "alone".to_owned(), ..Member::default() }]
    }
    async fn change_members(&self, _: MemberChange) -> Result<(Vec<Member>, Option<u64>), MemberError> {
        Err(Refused::Unhealthy.into())
    }
    async fn transfer_leadership(&self, _: u64) -> Result<(), MemberError> {
        Err(Refused::BadLeaderTransferee.into())
    }
}

/// The face on loopback, until it is dropped.
pub struct Ours {
    pub client: Raw,
    pub replica: Alone,
    pub face: Arc<Face<Alone>>,
    pub address: SocketAddr,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Ours {
    pub async fn start(config: FaceConfig) -> Self {
        let replica = Alone::default();
        let shared = replica.machine(|machine| machine.shared());
        let face = Face::new(replica.clone(), shared, config).unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_routes(face.routes());
        let tasks = vec![
            tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() }),
            tokio::spawn(Arc::clone(&face).keep_leases()),
        ];
        Self { client: Raw::connect(address).await, replica, face, address, tasks }
    }
}

impl Drop for Ours {
    fn drop(&mut self) {
        self.tasks.iter().for_each(|task| task.abort());
    }
}

/// The whole store, one replica on a disk of its own, until it is dropped.
pub struct Whole {
    pub client: Raw,
    pub store: Store,
    _dir: tempfile::TempDir,
}

impl Whole {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Snapshots in the midst of it, so that log and state are cut under the operations.
        let config = Config { snapshot_entries: 1_000, ..Config::alone(dir.path().join("data")) };
        let mut store = Store::open(config).await.unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Raw::connect(listener.local_addr().unwrap()).await;
        store.serve_clients(listener, None).expect("served without certificates");
        Self { client, store, _dir: dir }
    }
}

/// A real etcd, until it is dropped.
pub struct Etcd {
    pub client: Raw,
    address: SocketAddr,
    process: Child,
    _dir: tempfile::TempDir,
}

impl Etcd {
    pub async fn start() -> Self {
        // Its data is of no use after the test; on memory the test is not a test of the disk.
        let base = if std::path::Path::new("/dev/shm").is_dir() { "/dev/shm".into() } else { std::env::temp_dir() };
        let dir = tempfile::tempdir_in(base).unwrap();
        let [client, peer] = [free_port(), free_port()].map(|port| format!("http://127.0.0.1:{port}"));
        let process = Command::new("etcd")
            .args(["--name", "oracle", "--log-level", "error", "--logger", "zap", "--data-dir"])
            .arg(dir.path())
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("oracle={peer}")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd does not start: install Debian's etcd-server (apt-get install etcd-server)");
        let address = client.strip_prefix("http://").unwrap().parse().unwrap();
        let client = Raw::connect(address).await;
        let etcd = Self { client, address, process, _dir: dir };
        let start = Instant::now();
        let request = PbRangeRequest { key: b"a".to_vec(), ..Default::default() };
        while let Err(status) = etcd.client.range(&request).await {
            assert!(start.elapsed() < Duration::from_secs(20), "etcd does not answer: {status}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        etcd
    }
}

impl Etcd {
    /// How many of its watches have not caught up.
    pub async fn lagging(&self) -> u64 {
        let mut stream = tokio::net::TcpStream::connect(self.address).await.unwrap();
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let value = answer.lines().find_map(|line| line.strip_prefix("etcd_debugging_mvcc_slow_watcher_total "));
        value.unwrap_or_else(|| panic!("etcd does not say how many watches lag: {answer}")).parse().unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A client that sends exactly the messages it is given.
#[derive(Clone)]
pub struct Raw(Channel);

macro_rules! methods {
    ($($name:ident: $path:literal, $request:ty => $response:ty;)*) => {
        impl Raw {
            $(pub async fn $name(&self, request: &$request) -> Result<$response, Status> {
                self.unary($path, request.clone()).await
            })*
        }
    };
}

methods! {
    range: "/etcdserverpb.KV/Range", PbRangeRequest => PbRangeResponse;
    put: "/etcdserverpb.KV/Put", PbPutRequest => PbPutResponse;
    delete: "/etcdserverpb.KV/DeleteRange", PbDeleteRequest => PbDeleteResponse;
    txn: "/etcdserverpb.KV/Txn", PbTxnRequest => PbTxnResponse;
    compact: "/etcdserverpb.KV/Compact", PbCompactionRequest => PbCompactionResponse;
    grant: "/etcdserverpb.Lease/LeaseGrant", PbLeaseGrantRequest => PbLeaseGrantResponse;
    revoke: "/etcdserverpb.Lease/LeaseRevoke", PbLeaseRevokeRequest => PbLeaseRevokeResponse;
    ttl: "/etcdserverpb.Lease/LeaseTimeToLive", PbLeaseTimeToLiveRequest => PbLeaseTimeToLiveResponse;
    leases: "/etcdserverpb.Lease/LeaseLeases", PbLeaseLeasesRequest => PbLeaseLeasesResponse;
    alarm: "/etcdserverpb.Maintenance/Alarm", PbAlarmRequest => PbAlarmResponse;
    status: "/etcdserverpb.Maintenance/Status", PbStatusRequest => PbStatusResponse;
    hash_kv: "/etcdserverpb.Maintenance/HashKV", PbHashKvRequest => PbHashKvResponse;
    members: "/etcdserverpb.Cluster/MemberList", PbMemberListRequest => PbMemberListResponse;
}

impl Raw {
    pub async fn connect(address: SocketAddr) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        Self(endpoint.connect_lazy())
    }

    pub async fn unary<M, N>(&self, path: &'static str, message: M) -> Result<N, Status>
    where
        M: Message + Send + Sync + 'static,
        N: Message + Default + Send + Sync + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.0.clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let codec = tonic_prost::ProstCodec::<M, N>::default();
        let answer = grpc.unary(Request::new(message), PathAndQuery::from_static(path), codec).await;
        answer.map(tonic::Response::into_inner)
    }

    /// A stream of requests, and the answers as they come.
    pub async fn streaming<M, N>(
        &self,
        path: &'static str,
        requests: tokio::sync::mpsc::Receiver<M>,
    ) -> Result<Streaming<N>, Status>
    where
        M: Message + Send + Sync + 'static,
        N: Message + Default + Send + Sync + 'static,
    {
        let mut grpc = tonic::client::Grpc::new(self.0.clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let codec = tonic_prost::ProstCodec::<M, N>::default();
        let requests = Request::new(tokio_stream::wrappers::ReceiverStream::new(requests));
        let answer = grpc.streaming(requests, PathAndQuery::from_static(path), codec).await?;
        Ok(answer.into_inner())
    }

    pub async fn watch_with(
        &self,
        requests: tokio::sync::mpsc::Receiver<PbWatchRequest>,
    ) -> Result<Streaming<PbWatchResponse>, Status> {
        self.streaming("/etcdserverpb.Watch/Watch", requests).await
    }
}

/// A watch to be created; what etcd-client's message says, which cannot be named.
#[derive(Debug, Clone, Default)]
pub struct WatchCreate {
    pub key: Vec<u8>,
    pub range_end: Vec<u8>,
    pub start_revision: i64,
    pub progress_notify: bool,
    pub filters: Vec<i64>,
    pub prev_kv: bool,
    pub watch_id: i64,
    pub fragment: bool,
}

impl WatchCreate {
    pub fn request(&self) -> PbWatchRequest {
        use minipod_store::wire;
        let mut out = Vec::new();
        wire::put_nested(&mut out, 1, |out| {
            wire::put_bytes(out, 1, &self.key);
            wire::put_bytes(out, 2, &self.range_end);
            wire::put_int(out, 3, self.start_revision);
            wire::put_flag(out, 4, self.progress_notify);
            let filters: Vec<u8> = self.filters.iter().map(|filter| *filter as u8).collect();
            wire::put_bytes(out, 5, &filters);
            wire::put_flag(out, 6, self.prev_kv);
            wire::put_int(out, 7, self.watch_id);
            wire::put_flag(out, 8, self.fragment);
        });
        PbWatchRequest::decode(&out[..]).unwrap()
    }
}

pub fn watch_cancel(id: i64) -> PbWatchRequest {
    let mut out = Vec::new();
    minipod_store::wire::put_nested(&mut out, 2, |out| minipod_store::wire::put_int(out, 1, id));
    PbWatchRequest::decode(&out[..]).unwrap()
}

pub fn watch_progress() -> PbWatchRequest {
    PbWatchRequest::decode(&[3 << 3 | 2, 0][..]).unwrap()
}

/// Random numbers that a seed replays (splitmix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
}

/// A number from the environment, or the default.
pub fn option(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name}={value}: not a number")))
}
