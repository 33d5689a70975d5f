//! An API server of a few lines: holds pods for one node, speaks the Nodes service, remembers what it is told.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use minipod_proto::v1::agent_message::Message as FromAgent;
use minipod_proto::v1::nodes_server::{Nodes, NodesServer};
use minipod_proto::v1::server_message::Message as ToAgent;
use minipod_proto::v1::tunnel_frame::Frame;
use minipod_proto::v1::{
    AgentMessage, EventReport, Heartbeat, LogsRequest, NodeStatus, OpenStream, Pod, PodGone, PodList, PodStatus,
    PodStatusAck, PodStatusReport, RegisterRequest, RegisterResponse, ServerMessage, Time, TunnelFrame, open_stream,
};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// Messages to the agent that wait; tests send few.
const QUEUE: usize = 256;

#[derive(Default)]
struct State {
    pods: HashMap<String, Pod>,
    /// ConfigMaps and Secrets by name, told before every snapshot.
    sources: HashMap<String, ToAgent>,
    statuses: HashMap<String, PodStatus>,
    finished: Vec<String>,
    reports: Vec<PodStatusReport>,
    events: Vec<EventReport>,
    node_status: Option<NodeStatus>,
    session: Option<mpsc::Sender<Result<ServerMessage, Status>>>,
    tunnels: HashMap<String, oneshot::Sender<Tunnel>>,
    sessions: usize,
    next_stream: usize,
}

/// The server's end of a tunnel.
pub struct Tunnel {
    pub incoming: Streaming<TunnelFrame>,
    pub sender: mpsc::Sender<Result<TunnelFrame, Status>>,
}

impl Tunnel {
    pub async fn send(&self, frame: Frame) {
        let _ = self.sender.send(Ok(TunnelFrame { frame: Some(frame) })).await;
    }

    pub async fn next(&mut self) -> Option<Frame> {
        tokio::time::timeout(Duration::from_secs(20), self.incoming.message())
            .await
            .expect("tunnel is silent")
            .ok()??
            .frame
    }
}

/// Cheap to clone; all clones are one server.
#[derive(Clone)]
pub struct FakeApi {
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    pod_cidr: String,
    pub address: SocketAddr,
}

impl FakeApi {
    pub async fn start(pod_cidr: &str) -> (Self, tokio::task::JoinHandle<()>) {
        Self::start_at("127.0.0.1:0".parse().expect("address"), pod_cidr, Arc::default()).await
    }

    async fn start_at(at: SocketAddr, pod_cidr: &str, state: Arc<Mutex<State>>) -> (Self, tokio::task::JoinHandle<()>) {
        let listener = tokio::net::TcpListener::bind(at).await.expect("bind");
        let address = listener.local_addr().expect("address");
        let api = Self { state, changed: Arc::default(), pod_cidr: pod_cidr.to_owned(), address };
        let server = tonic::transport::Server::builder()
            .add_service(NodesServer::new(api.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        (api, tokio::spawn(async move { server.await.expect("serve") }))
    }

    /// The same server with its memory, after an outage.
    pub async fn restart(&self) -> (Self, tokio::task::JoinHandle<()>) {
        self.state.lock().expect("lock").session = None;
        Self::start_at(self.address, &self.pod_cidr, self.state.clone()).await
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    async fn tell(&self, message: ToAgent) {
        let session = self.state.lock().expect("lock").session.clone();
        if let Some(session) = session {
            let _ = session.send(Ok(ServerMessage { message: Some(message) })).await;
        }
    }

    pub async fn put(&self, pod: Pod) {
        let uid = pod.metadata.as_ref().expect("metadata").uid.clone();
        self.state.lock().expect("lock").pods.insert(uid, pod.clone());
        self.tell(ToAgent::PodUpsert(pod)).await;
    }

    /// A ConfigMap or Secret is new or has changed.
    pub async fn put_source(&self, name: &str, source: ToAgent) {
        self.state.lock().expect("lock").sources.insert(name.to_owned(), source.clone());
        self.tell(source).await;
    }

    /// Marks the pod for deletion, as a DELETE does.
    pub async fn delete(&self, uid: &str, grace_s: i64) {
        let pod = {
            let mut state = self.state.lock().expect("lock");
            let pod = state.pods.get_mut(uid).expect("known pod");
            let meta = pod.metadata.as_mut().expect("metadata");
            meta.deletion_timestamp = Some(Time::from_unix(1, 0));
            meta.deletion_grace_period_seconds = Some(grace_s);
            pod.clone()
        };
        self.tell(ToAgent::PodUpsert(pod)).await;
    }

    /// Removes the pod at once, as a forced DELETE does.
    pub async fn forget(&self, uid: &str) {
        let pod = self.state.lock().expect("lock").pods.remove(uid).expect("known pod");
        let meta = pod.metadata.expect("metadata");
        self.tell(ToAgent::PodGone(PodGone { namespace: meta.namespace, name: meta.name, uid: meta.uid })).await;
    }

    /// What the node last said of itself, since its registration.
    pub fn node_status(&self) -> Option<NodeStatus> {
        self.state.lock().expect("lock").node_status.clone()
    }

    pub fn status(&self, uid: &str) -> Option<PodStatus> {
        self.state.lock().expect("lock").statuses.get(uid).cloned()
    }

    pub fn events(&self, uid: &str) -> Vec<String> {
        let state = self.state.lock().expect("lock");
        state.events.iter().filter(|event| event.uid == uid).map(|event| event.reason.clone()).collect()
    }

    pub fn is_finished(&self, uid: &str) -> bool {
        self.state.lock().expect("lock").finished.iter().any(|other| other == uid)
    }

    pub fn reports(&self) -> Vec<PodStatusReport> {
        self.state.lock().expect("lock").reports.clone()
    }

    pub fn sessions(&self) -> usize {
        self.state.lock().expect("lock").sessions
    }

    /// Waits until the pod's status is as wanted; says what it is when it does not become so.
    pub async fn wait(&self, uid: &str, what: &str, good: impl Fn(&PodStatus) -> bool) -> PodStatus {
        let wanted = || self.status(uid).filter(|status| good(status));
        let description = || format!("{:#?}\nevents {:?}", self.status(uid), self.events(uid));
        self.wait_for(what, wanted, description).await
    }

    pub async fn wait_finished(&self, uid: &str) {
        let description = || format!("{:#?}", self.status(uid));
        self.wait_for("finished", || self.is_finished(uid).then_some(()), description).await;
    }

    pub async fn wait_for<T>(
        &self,
        what: &str,
        mut get: impl FnMut() -> Option<T>,
        describe: impl Fn() -> String,
    ) -> T {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(value) = get() {
                return value;
            }
            assert!(Instant::now() < deadline, "{what} did not come to be; last state: {}", describe());
            let _ = tokio::time::timeout(Duration::from_millis(50), self.changed.notified()).await;
        }
    }

    /// Asks for a stream and waits for the agent's tunnel.
    pub async fn open(&self, pod_uid: &str, request: open_stream::Request) -> Tunnel {
        let (sender, receiver) = oneshot::channel();
        let stream_id = {
            let mut state = self.state.lock().expect("lock");
            state.next_stream += 1;
            let id = format!("stream-{}", state.next_stream);
            state.tunnels.insert(id.clone(), sender);
            id
        };
        self.tell(ToAgent::OpenStream(OpenStream { stream_id, pod_uid: pod_uid.into(), request: Some(request) })).await;
        // An emulated machine with sixty programs starting takes seconds for a dial.
        tokio::time::timeout(Duration::from_secs(30), receiver).await.expect("a tunnel in time").expect("tunnel")
    }

    /// A log's text and, where it could not be had, why.
    pub async fn logs(&self, uid: &str, request: LogsRequest) -> (String, String) {
        let mut tunnel = self.open(uid, open_stream::Request::Logs(request)).await;
        let mut text = Vec::new();
        loop {
            match tunnel.next().await {
                Some(Frame::Data(data)) => text.extend_from_slice(&data),
                Some(Frame::End(end)) => return (String::from_utf8(text).expect("UTF-8"), end.message),
                other => panic!("{other:?}"),
            }
        }
    }

    fn take(&self, message: FromAgent) -> Option<ToAgent> {
        let mut state = self.state.lock().expect("lock");
        let answer = match message {
            FromAgent::Heartbeat(Heartbeat { sequence }) => Some(ToAgent::Heartbeat(Heartbeat { sequence })),
            FromAgent::PodStatus(report) => {
                let ack = PodStatusAck { uid: report.uid.clone(), sequence: report.sequence, error: String::new() };
                if let Some(status) = &report.status {
                    state.statuses.insert(report.uid.clone(), status.clone());
                    if let Some(pod) = state.pods.get_mut(&report.uid) {
                        pod.status = Some(status.clone());
                    }
                }
                // Like the real one: an object goes only when someone asked for it.
                let marked = |pod: &Pod| pod.metadata.as_ref().is_some_and(|meta| meta.deletion_timestamp.is_some());
                if report.finished && state.pods.get(&report.uid).is_none_or(marked) {
                    state.pods.remove(&report.uid);
                    state.finished.push(report.uid.clone());
                }
                state.reports.push(report);
                Some(ToAgent::PodStatusAck(ack))
            }
            FromAgent::Event(event) => {
                state.events.push(event);
                None
            }
            FromAgent::NodeStatus(status) => {
                state.node_status = Some(status);
                None
            }
            FromAgent::Hello(_) => None,
        };
        drop(state);
        self.changed.notify_waiters();
        answer
    }
}

type Out<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Nodes for FakeApi {
    async fn register(&self, request: Request<RegisterRequest>) -> Result<Response<RegisterResponse>, Status> {
        let node = request.into_inner().node;
        Ok(Response::new(RegisterResponse { node, pod_cidr: self.pod_cidr.clone(), heartbeat_interval_ms: 1000 }))
    }

    type SessionStream = Out<ServerMessage>;

    async fn session(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let mut incoming = request.into_inner();
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (sources, items) = {
            let mut state = self.state.lock().expect("lock");
            state.session = Some(sender.clone());
            state.sessions += 1;
            (state.sources.values().cloned().collect::<Vec<_>>(), state.pods.values().cloned().collect())
        };
        for source in sources {
            let _ = sender.send(Ok(ServerMessage { message: Some(source) })).await;
        }
        let snapshot = ToAgent::Snapshot(PodList { items, ..PodList::default() });
        let _ = sender.send(Ok(ServerMessage { message: Some(snapshot) })).await;
        let api = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = incoming.message().await {
                if let Some(answer) = message.message.and_then(|message| api.take(message)) {
                    let _ = sender.send(Ok(ServerMessage { message: Some(answer) })).await;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type TunnelStream = Out<TunnelFrame>;

    async fn tunnel(&self, request: Request<Streaming<TunnelFrame>>) -> Result<Response<Self::TunnelStream>, Status> {
        let mut incoming = request.into_inner();
        let first = incoming.next().await.ok_or_else(|| Status::invalid_argument("no frame"))??;
        let Some(Frame::Open(id)) = first.frame else {
            return Err(Status::invalid_argument("first frame is not open"));
        };
        let (sender, receiver) = mpsc::channel(16);
        let waiting = self.state.lock().expect("lock").tunnels.remove(&id);
        let waiting = waiting.ok_or_else(|| Status::not_found("nobody waits for this stream"))?;
        let _ = waiting.send(Tunnel { incoming, sender });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
