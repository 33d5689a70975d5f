//! An API server in memory, for tests of clients: it keeps objects, revisions and a history, and breaks on demand.
//!
//! It fills in defaults and checks hardly anything about objects: what it is for is the behaviour of the connection.

mod access;
mod objects;

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use minipod_proto::Kind;
use minipod_proto::v1::images_server::ImagesServer;
use minipod_proto::v1::objects_server::ObjectsServer;
use minipod_proto::v1::pod_access_server::PodAccessServer;
use minipod_proto::v1::scheduling_server::SchedulingServer;
use minipod_proto::v1::{ImageLoadStart, LogsRequest, Object, Time, copy_frame, watch_event};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Status};

use crate::client::{Client, Options};

/// A running fake API server. Dropping it cuts every connection.
#[derive(Debug)]
pub struct Fake {
    address: SocketAddr,
    shared: Shared,
    /// Its own, so that its connections end with it like those of a process.
    runtime: Option<Runtime>,
}

/// What the services share.
#[derive(Debug, Clone)]
struct Shared {
    state: Arc<Mutex<State>>,
    /// Sent after every change of the state.
    changed: watch::Sender<u64>,
}

/// One change, as a watch sees it.
#[derive(Debug, Clone)]
struct Event {
    revision: i64,
    kind: watch_event::Type,
    object: Object,
    before: Option<Object>,
}

#[derive(Debug, Default)]
struct State {
    revision: i64,
    objects: BTreeMap<(Kind, String), Object>,
    history: Vec<Event>,
    /// Lists that were given in part, by revision: their next pages are as old.
    lists: BTreeMap<i64, Vec<Object>>,
    /// Revisions up to this one cannot be resumed from.
    compacted: i64,
    /// Every open watch of an older epoch ends.
    epoch: u64,
    /// What the next calls are answered with.
    failures: Vec<Code>,
    lag: Duration,
    page: usize,
    calls: HashMap<&'static str, usize>,
    logs: HashMap<String, Bytes>,
    log_requests: Vec<LogsRequest>,
    images: Vec<(ImageLoadStart, Vec<u8>)>,
    copy_out: Vec<copy_frame::Frame>,
    copied_in: Vec<Vec<copy_frame::Frame>>,
}

impl Fake {
    /// Starts one on a free port of the loopback interface.
    ///
    /// # Errors
    /// When no port can be had.
    pub async fn start() -> std::io::Result<Fake> {
        Fake::start_on(SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    /// Starts one on that address, for instance where another one was.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub async fn start_on(address: SocketAddr) -> std::io::Result<Fake> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.spawn(TcpListener::bind(address)).await.map_err(std::io::Error::other)??;
        let address = listener.local_addr()?;
        let state = State { revision: 1, page: usize::MAX, ..State::default() };
        let shared = Shared { state: Arc::new(Mutex::new(state)), changed: watch::Sender::new(0) };
        let router = tonic::transport::Server::builder()
            .add_service(ObjectsServer::new(shared.clone()))
            .add_service(SchedulingServer::new(shared.clone()))
            .add_service(PodAccessServer::new(shared.clone()))
            .add_service(ImagesServer::new(shared.clone()));
        // A test that lost its server sees it at the next call.
        runtime.spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        Ok(Fake { address, shared, runtime: Some(runtime) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens, as clients want it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A client of it that gives up after a second.
    ///
    /// # Errors
    /// Never for an address of its own.
    pub fn client(&self) -> Result<Client, crate::ClientError> {
        let second = Duration::from_secs(1);
        let options = Options { connect_timeout: second, request_timeout: second, ..Options::servers(&self.url()) };
        Client::new(&options)
    }

    /// Creates or replaces an object as it is, uid and creation time apart. Returns the revision.
    pub fn put(&self, object: impl Into<Object>) -> i64 {
        let revision = self.lock().put(object.into());
        self.changed();
        revision
    }

    /// Removes an object if it is there.
    pub fn remove(&self, kind: Kind, key: &str) {
        self.lock().remove(kind, key);
        self.changed();
    }

    /// The object as it is stored.
    #[must_use]
    pub fn stored(&self, kind: Kind, key: &str) -> Option<Object> {
        self.lock().objects.get(&(kind, key.to_owned())).cloned()
    }

    /// The last revision.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.lock().revision
    }

    /// Ends every open watch with UNAVAILABLE.
    pub fn break_streams(&self) {
        self.lock().epoch += 1;
        self.changed();
    }

    /// Forgets the history: watches resume from the present revision or not at all.
    pub fn compact(&self) {
        let mut state = self.lock();
        state.compacted = state.revision;
        state.history.clear();
        state.lists.clear();
    }

    /// Answers the next calls with these codes, in order.
    pub fn fail_next(&self, codes: &[Code]) {
        self.lock().failures.extend(codes);
    }

    /// Fails and delays nothing any more.
    pub fn heal(&self) {
        let mut state = self.lock();
        state.failures.clear();
        state.lag = Duration::ZERO;
    }

    /// Delays every event by that time.
    pub fn lag(&self, lag: Duration) {
        self.lock().lag = lag;
    }

    /// Gives at most so many objects in a page of a list.
    pub fn page(&self, objects: usize) {
        self.lock().page = objects;
    }

    /// How often a call was made ("list", "watch", "get" …).
    #[must_use]
    pub fn calls(&self, name: &'static str) -> usize {
        self.lock().calls.get(name).copied().unwrap_or(0)
    }

    /// Sets the log of a container, by `namespace/pod/container`.
    pub fn log(&self, key: &str, text: &str) {
        self.lock().logs.insert(key.to_owned(), Bytes::copy_from_slice(text.as_bytes()));
    }

    /// Sets what every copy out of a container brings.
    pub fn copy_out(&self, frames: Vec<copy_frame::Frame>) {
        self.lock().copy_out = frames;
    }

    /// What was copied into containers completely, each with its start.
    #[must_use]
    pub fn copied_in(&self) -> Vec<Vec<copy_frame::Frame>> {
        self.lock().copied_in.clone()
    }

    /// The log requests so far.
    #[must_use]
    pub fn log_requests(&self) -> Vec<LogsRequest> {
        self.lock().log_requests.clone()
    }

    /// The images that were loaded completely: the request and the bytes.
    #[must_use]
    pub fn images(&self) -> Vec<(ImageLoadStart, Vec<u8>)> {
        self.lock().images.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }

    fn changed(&self) {
        self.shared.changed();
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        // Without waiting: this runs inside the test's own runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// Counts the call, and fails it if that was asked for.
    fn call(&self, name: &'static str) -> Result<MutexGuard<'_, State>, Status> {
        let mut state = self.lock();
        *state.calls.entry(name).or_default() += 1;
        if state.failures.is_empty() {
            return Ok(state);
        }
        let code = state.failures.remove(0);
        Err(Status::new(code, format!("{name} was told to fail")))
    }
}

impl State {
    fn put(&mut self, mut object: Object) -> i64 {
        let Some(kind) = object.kind_of() else { return self.revision };
        self.revision += 1;
        let key = (kind, object.key());
        let before = self.objects.get(&key).cloned();
        let (revision, uid) = (self.revision, before.as_ref().map(|before| before.meta().uid.clone()));
        if let Some(meta) = object.meta_mut() {
            meta.resource_version = revision.to_string();
            meta.creation_timestamp.get_or_insert_with(|| Time::from(SystemTime::now()));
            if meta.uid.is_empty() {
                meta.uid = uid.unwrap_or_else(|| format!("uid-{revision}"));
            }
        }
        self.objects.insert(key, object.clone());
        let kind = if before.is_some() { watch_event::Type::Modified } else { watch_event::Type::Added };
        self.history.push(Event { revision, kind, object, before });
        revision
    }

    fn remove(&mut self, kind: Kind, key: &str) -> Option<Object> {
        let mut object = self.objects.remove(&(kind, key.to_owned()))?;
        self.revision += 1;
        let before = Some(object.clone());
        if let Some(meta) = object.meta_mut() {
            meta.resource_version = self.revision.to_string();
        }
        let event = Event { revision: self.revision, kind: watch_event::Type::Deleted, object: object.clone(), before };
        self.history.push(event);
        Some(object)
    }
}
