//! A private etcd and an API server in this process, on free ports; both end with the test, also when it fails.
#![allow(dead_code)]

use std::{
    net::{SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use minipod_apiserver::{
    cache::Limits,
    serve::{self, Config, Running, StoreAt},
    storage::{RawEvent, Storage},
};
use minipod_daemon::shutdown::{Shutdown, Trigger};
use minipod_proto::v1::{
    Container, Node, Object, Pod, RegisterRequest, ResourceRequirements, nodes_client::NodesClient,
    objects_client::ObjectsClient, scheduling_client::SchedulingClient,
};
use tempfile::TempDir;
use tonic::transport::Channel;

/// Small and seeded, so that a failure names the run that repeats it.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides.max(1) as u64) as usize
    }
}

pub struct Etcd {
    child: Option<Child>,
    data: TempDir,
    client_port: u16,
    peer_port: u16,
}

pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

impl Etcd {
    pub fn start() -> Etcd {
        let data = tempfile::tempdir().expect("a temporary directory");
        let mut etcd = Etcd { child: None, data, client_port: free_port(), peer_port: free_port() };
        etcd.run();
        etcd
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// Starts it (again) on the same data.
    pub fn run(&mut self) {
        let client = format!("http://127.0.0.1:{}", self.client_port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.data.path().join("etcd"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--logger", "zap", "--log-level", "error"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.child = Some(child.expect("etcd must be installed: apt-get install etcd-server"));
        let deadline = Instant::now() + Duration::from_secs(30);
        // Listening is not enough: an etcd that is killed before it has written its own first entries never elects itself again.
        while !self.is_healthy() {
            assert!(Instant::now() < deadline, "etcd on port {} is not healthy after 30 s", self.client_port);
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn is_healthy(&self) -> bool {
        use std::io::{Read as _, Write as _};
        let ask = || {
            let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.client_port))?;
            stream.set_read_timeout(Some(Duration::from_secs(2)))?;
            stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).map(|_| answer)
        };
        ask().is_ok_and(|answer: String| answer.contains("\"health\":\"true\""))
    }

    pub fn is_running(&self) -> bool {
        self.child.is_some()
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

pub struct Cluster {
    pub etcd: Etcd,
    pub server: Server,
}

pub struct Server {
    pub address: SocketAddr,
    pub metrics: SocketAddr,
    trigger: Option<Trigger>,
    running: Option<Running>,
}

pub fn config(etcd: &Etcd) -> Config {
    Config {
        store: StoreAt::Etcd(vec![etcd.address()]),
        store_listen: None,
        store_quota_bytes: 2 << 30,
        max_txn_ops: 128,
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        advertise: String::new(),
        metrics_listen: Some(SocketAddr::from(([127, 0, 0, 1], 0))),
        cluster_cidr: "10.42.0.0/16".parse().expect("a good range"),
        node_grace: Duration::from_secs(600),
        keep_history: None,
        limits: Limits::default(),
    }
}

impl Server {
    pub async fn start(config: Config) -> Server {
        let (trigger, shutdown) = Shutdown::manual();
        let running = serve::start(config, shutdown).await.expect("the server starts");
        let metrics = running.metrics_address.expect("it serves metrics");
        Server { address: running.address, metrics, trigger: Some(trigger), running: Some(running) }
    }

    pub async fn stop(mut self) {
        self.trigger.take();
        if let Some(running) = self.running.take() {
            running.ended.await.expect("the server ends").expect("because it was asked to");
        }
    }

    pub async fn channel(&self) -> Channel {
        let endpoint = Channel::from_shared(format!("http://{}", self.address)).expect("an address");
        endpoint.connect().await.expect("the server is reached")
    }

    pub async fn objects(&self) -> ObjectsClient<Channel> {
        ObjectsClient::new(self.channel().await).max_decoding_message_size(64 << 20)
    }

    pub async fn scheduling(&self) -> SchedulingClient<Channel> {
        SchedulingClient::new(self.channel().await)
    }

    pub async fn nodes(&self) -> NodesClient<Channel> {
        NodesClient::new(self.channel().await)
    }
}

impl Cluster {
    pub async fn start() -> Cluster {
        Cluster::with(|_| ()).await
    }

    pub async fn with(change: impl FnOnce(&mut Config)) -> Cluster {
        let etcd = Etcd::start();
        let mut config = config(&etcd);
        change(&mut config);
        let server = Server::start(config).await;
        Cluster { etcd, server }
    }

    /// All changes in the store up to now, those of one revision together.
    pub async fn history(&self) -> Vec<(i64, Vec<RawEvent>)> {
        let storage = Storage::connect(&[self.etcd.address()], 128).await.expect("the store");
        let last = storage.revision().await.expect("its revision");
        let mut feed = storage.feed(1).await.expect("its history");
        let mut history: Vec<(i64, Vec<RawEvent>)> = Vec::new();
        while history.last().map_or(1, |(revision, _)| *revision) < last {
            for event in feed.next().await.expect("the history goes on").events {
                match history.last_mut() {
                    Some((revision, events)) if *revision == event.revision => events.push(event),
                    _ => history.push((event.revision, vec![event])),
                }
            }
        }
        history
    }
}

/// Waits for a state, and tells the last one when it does not come.
pub async fn eventually<T, F: Future<Output = Result<T, String>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match look().await {
            Ok(value) => return value,
            Err(state) => assert!(Instant::now() < deadline, "{what}: not so after 30 s; last: {state}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub fn get(kind: &str, namespace: &str, name: &str) -> minipod_proto::v1::GetRequest {
    minipod_proto::v1::GetRequest { kind: kind.into(), namespace: namespace.into(), name: name.into() }
}

pub fn list(kind: &str) -> minipod_proto::v1::ListRequest {
    minipod_proto::v1::ListRequest { kind: kind.into(), ..Default::default() }
}

pub fn watch(kind: &str, revision: i64) -> minipod_proto::v1::WatchRequest {
    minipod_proto::v1::WatchRequest { kind: kind.into(), revision, ..Default::default() }
}

pub fn delete(kind: &str, namespace: &str, name: &str) -> minipod_proto::v1::DeleteRequest {
    minipod_proto::v1::DeleteRequest {
        kind: kind.into(),
        namespace: namespace.into(),
        name: name.into(),
        ..Default::default()
    }
}

pub fn create(object: impl Into<Object>) -> minipod_proto::v1::CreateRequest {
    minipod_proto::v1::CreateRequest { object: Some(object.into()), dry_run: false }
}

pub fn pod(name: &str, cpu: &str, memory: &str) -> Pod {
    let mut pod = Pod::default();
    let meta = pod.metadata.get_or_insert_default();
    meta.name = name.into();
    meta.namespace = "default".into();
    let requests = [("cpu".to_owned(), cpu.to_owned()), ("memory".to_owned(), memory.to_owned())].into();
    pod.spec_mut().containers.push(Container {
        name: "app".into(),
        image: "minipod.local/busybox:1".into(),
        resources: Some(ResourceRequirements { requests, ..ResourceRequirements::default() }),
        ..Container::default()
    });
    pod
}

pub fn node(name: &str, cpu: &str, memory: &str, pods: &str) -> Node {
    let mut node = Node::default();
    node.metadata.get_or_insert_default().name = name.into();
    let status = node.status_mut();
    for (resource, amount) in [("cpu", cpu), ("memory", memory), ("pods", pods)] {
        status.allocatable.insert(resource.into(), amount.into());
        status.capacity.insert(resource.into(), amount.into());
    }
    node
}

pub async fn register(server: &Server, node: Node) -> minipod_proto::v1::RegisterResponse {
    let request = RegisterRequest { node: Some(node) };
    server.nodes().await.register(request).await.expect("the node registers").into_inner()
}

pub async fn create_pod(server: &Server, pod: Pod) -> Pod {
    let object = server.objects().await.create(create(pod)).await.expect("the pod is created").into_inner();
    Pod::try_from(object).expect("a pod comes back")
}
