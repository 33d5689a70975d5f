//! The calls of the API, typed.

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use minipod_daemon::backoff::Backoff;
use minipod_proto::v1::explaining_client::ExplainingClient;
use minipod_proto::v1::objects_client::ObjectsClient;
use minipod_proto::v1::scheduling_client::SchedulingClient;
use minipod_proto::v1::stores_client::StoresClient;
use minipod_proto::v1::{
    BindBatchRequest, BindBatchResponse, CreateRequest, DeleteRequest, EvictRequest, ExplainRequest, Explanation,
    FitRequest, FitResponse, GetRequest, ListRequest, Object, PatchRequest, Pod, PreemptRequest, PreemptResponse,
    ReportUnschedulableRequest, ResizeRequest, SchedulerMessage, SchedulerQuestion, StoreStatus, StoreStatusRequest,
    UpdateRequest,
};
use minipod_proto::{Kind, Resource};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::error::{ClientError, Operation, connection_broke, never_sent, reason};
use crate::servers::{Next, Retry, Servers, Tries};

/// The API server's address where nothing else is said.
pub const DEFAULT_SERVER: &str = "http://127.0.0.1:7650";
/// The environment variable with the API servers' addresses, separated by commas.
pub const SERVER_VARIABLE: &str = "MINIPOD_SERVER";

/// Objects in one page of a list: with pods of a few kilobytes a page is a few megabytes.
const PAGE: i64 = 500;
/// The longest message that is read: a page of objects of the largest allowed size does not come near in practice.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// How often a list starts over when its continuation was compacted away.
const LIST_RESTARTS: usize = 3;
/// A server that has answered so shortly ago is taken to be there.
const LATELY: Duration = Duration::from_secs(4);
/// One that has not is given so long to answer a small question, before it gets the request.
const PROBE: Duration = Duration::from_secs(3);
/// First and longest pause before all servers are asked again.
const ROUND_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// How to connect.
#[derive(Debug, Clone)]
pub struct Options {
    /// Addresses of API servers as [`Servers`] takes them; the first that answers is used.
    pub servers: Vec<String>,
    /// How long a connection may take to come up.
    pub connect_timeout: Duration,
    /// How long an answer may take.
    pub request_timeout: Duration,
    /// A silent connection is probed this often, and given up when the probe is not answered for as long.
    pub keep_alive: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            servers: vec![DEFAULT_SERVER.to_owned()],
            connect_timeout: Duration::from_secs(3),
            request_timeout: Duration::from_secs(15),
            // A server that is stopped is left within twice this time.
            keep_alive: Duration::from_secs(4),
        }
    }
}

impl From<Servers> for Options {
    fn from(servers: Servers) -> Options {
        Options { servers: servers.as_slice().to_vec(), ..Options::default() }
    }
}

impl Options {
    /// The servers of a text like that of `MINIPOD_SERVER`: addresses separated by commas. [`Client::new`] checks them.
    #[must_use]
    pub fn servers(text: &str) -> Options {
        Options { servers: text.split(',').map(str::to_owned).collect(), ..Options::default() }
    }

    /// The servers that `MINIPOD_SERVER` names; without it [`DEFAULT_SERVER`].
    #[must_use]
    pub fn from_env() -> Options {
        match std::env::var(SERVER_VARIABLE) {
            Ok(text) if !text.trim().is_empty() => Options::servers(&text),
            _ => Options::default(),
        }
    }
}

/// What a list or a watch is about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query {
    /// Empty: all namespaces.
    pub namespace: String,
    /// A label selector such as `app=web,tier in (a,b)`; empty: everything.
    pub labels: String,
    /// A field selector such as `spec.nodeName=node-a`; empty: everything.
    pub fields: String,
    /// Lists may come from a cache that lags.
    pub allow_stale: bool,
}

impl Query {
    /// Everything, in all namespaces.
    #[must_use]
    pub fn all() -> Query {
        Query::default()
    }

    /// Everything in one namespace.
    pub fn namespace(namespace: impl Into<String>) -> Query {
        Query { namespace: namespace.into(), ..Query::default() }
    }

    /// With a label selector.
    #[must_use]
    pub fn with_labels(mut self, selector: impl Into<String>) -> Query {
        self.labels = selector.into();
        self
    }

    /// With a field selector.
    #[must_use]
    pub fn with_fields(mut self, selector: impl Into<String>) -> Query {
        self.fields = selector.into();
        self
    }
}

/// Objects of one kind, exact at one revision.
#[derive(Debug, Clone, PartialEq)]
pub struct List<K> {
    /// The objects.
    pub items: Vec<K>,
    /// Watch from here.
    pub revision: i64,
}

/// Objects of a kind that is known at run time only.
pub type Objects = List<Object>;

/// One page of a list.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Page {
    pub(crate) items: Vec<Object>,
    pub(crate) revision: i64,
    /// Not empty: there is more.
    pub(crate) next: String,
}

/// How to delete.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeleteOptions {
    /// Seconds between TERM and KILL; `None`: the pod's own; 0: gone at once, whatever its node does.
    pub grace_seconds: Option<i64>,
    /// Only if the object has this uid; empty: any.
    pub uid: String,
    /// Only if the object has this resourceVersion; empty: any.
    pub resource_version: String,
}

/// How to evict.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EvictOptions {
    /// Seconds between TERM and KILL; `None`: the pod's own.
    pub grace_seconds: Option<i64>,
    /// Only if the pod has this uid; empty: any.
    pub uid: String,
    /// Judge, and change nothing.
    pub dry_run: bool,
}

/// A connection to the API servers. Clones share it.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    servers: Vec<Server>,
    /// Index of the server in use; moves on when it cannot be reached.
    current: AtomicUsize,
    request_timeout: Duration,
}

#[derive(Debug)]
struct Server {
    address: String,
    channel: Channel,
    /// When it last answered anything.
    answered: Mutex<Option<Instant>>,
}

impl Server {
    fn has_answered(&self) {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn answered_lately(&self) -> bool {
        let answered = *self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        answered.is_some_and(|at| at.elapsed() < LATELY)
    }
}

impl Client {
    /// A client of these servers. Nothing is connected before the first call. Needs a tokio runtime.
    ///
    /// # Errors
    /// When there is no server or an address makes no sense.
    pub fn new(options: &Options) -> Result<Client, ClientError> {
        let servers = Servers::new(options.servers.iter().map(String::as_str))?;
        let servers = servers.as_slice().iter().map(|address| server(address, options)).collect::<Result<_, _>>()?;
        let shared = Shared { servers, current: AtomicUsize::new(0), request_timeout: options.request_timeout };
        Ok(Client { shared: Arc::new(shared) })
    }

    /// A client of the servers that `MINIPOD_SERVER` names; without it of [`DEFAULT_SERVER`].
    ///
    /// # Errors
    /// As [`Client::new`].
    pub fn from_env() -> Result<Client, ClientError> {
        Client::new(&Options::from_env())
    }

    /// The servers' addresses, separated by commas.
    #[must_use]
    pub fn servers(&self) -> String {
        let addresses: Vec<&str> = self.shared.servers.iter().map(|server| server.address.as_str()).collect();
        addresses.join(",")
    }

    // ------------------------------------------------------------------------------------------------ typed objects

    /// Reads an object.
    ///
    /// # Errors
    /// `NotFound`, and what any call can meet.
    pub async fn get<K: Resource>(&self, namespace: &str, name: &str) -> Result<K, ClientError> {
        let object = self.get_object(K::KIND, namespace, name).await?;
        typed(object, || Operation::new("get", subject(K::KIND, namespace, name)))
    }

    /// Lists objects, all pages, exact at one revision.
    ///
    /// # Errors
    /// `Invalid` for a bad selector, and what any call can meet.
    pub async fn list<K: Resource>(&self, query: &Query) -> Result<List<K>, ClientError> {
        let list = self.list_objects(K::KIND, query).await?;
        let items = list.items.into_iter().map(|object| typed(object, || listing(K::KIND, query)));
        Ok(List { items: items.collect::<Result<_, _>>()?, revision: list.revision })
    }

    /// Creates an object and returns it as stored.
    ///
    /// # Errors
    /// `AlreadyExists`, `Invalid`, and what any call can meet.
    pub async fn create<K: Resource>(&self, object: K) -> Result<K, ClientError> {
        let operation = Operation::new("create", named(K::KIND, object.meta()));
        typed(self.create_object(object.into(), false).await?, || operation)
    }

    /// Replaces everything but the status; with a resourceVersion only if nobody else wrote meanwhile.
    ///
    /// # Errors
    /// `NotFound`, `Conflict`, `Refused`, `Invalid`, and what any call can meet.
    pub async fn update<K: Resource>(&self, object: K) -> Result<K, ClientError> {
        let operation = Operation::new("update", named(K::KIND, object.meta()));
        typed(self.update_object(object.into(), false).await?, || operation)
    }

    /// Replaces the status and nothing else.
    ///
    /// # Errors
    /// As [`Client::update`].
    pub async fn update_status<K: Resource>(&self, object: K) -> Result<K, ClientError> {
        let operation = Operation::new("update the status of", named(K::KIND, object.meta()));
        let request = UpdateRequest { object: Some(object.into()), dry_run: false };
        let call = |mut api: ObjectsClient<Channel>, request| async move { api.update_status(request).await };
        let object = self.objects(operation.clone(), Retry::NeverSent, request, call).await?;
        typed(object, || operation)
    }

    /// Replaces a pod's debug containers and nothing else: new ones are added, those that are there must be as they were.
    ///
    /// # Errors
    /// As [`Client::update`].
    pub async fn update_ephemeral_containers(&self, pod: Pod) -> Result<Pod, ClientError> {
        let operation = Operation::new("add a debug container to", named(Kind::Pod, pod.meta()));
        let request = UpdateRequest { object: Some(pod.into()), dry_run: false };
        let call =
            |mut api: ObjectsClient<Channel>, request| async move { api.update_ephemeral_containers(request).await };
        let object = self.objects(operation.clone(), Retry::NeverSent, request, call).await?;
        typed(object, || operation)
    }

    /// Applies a JSON merge patch (RFC 7386) of the Kubernetes JSON form to everything but the status.
    ///
    /// # Errors
    /// As [`Client::update`].
    pub async fn patch<K: Resource>(&self, namespace: &str, name: &str, merge_patch: &str) -> Result<K, ClientError> {
        let object = self.patch_object(K::KIND, namespace, name, merge_patch).await?;
        typed(object, || Operation::new("patch", subject(K::KIND, namespace, name)))
    }

    /// Changes CPU and memory of a pod's containers in place. Whether the node has the room tells the condition
    /// `PodResizePending` of the pod that comes back.
    ///
    /// # Errors
    /// `NotFound`, `Conflict`, `Refused` for another uid, `Invalid`, and what any call can meet.
    pub async fn resize(&self, request: ResizeRequest) -> Result<Pod, ClientError> {
        let operation = Operation::new("resize", subject(Kind::Pod, &request.namespace, &request.name));
        let call = |mut api: ObjectsClient<Channel>, request| async move { api.resize(request).await };
        let object = self.objects(operation.clone(), Retry::NeverSent, request, call).await?;
        typed(object, || operation)
    }

    /// Deletes an object: returns it as it is now (marked) or was last, and whether it is gone already.
    ///
    /// # Errors
    /// `NotFound`, `Refused` for another uid, `Conflict` for another resourceVersion, and what any call can meet.
    pub async fn delete<K: Resource>(
        &self,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<(K, bool), ClientError> {
        let (object, gone) = self.delete_object(K::KIND, namespace, name, options).await?;
        let object = typed(object, || Operation::new("delete", subject(K::KIND, namespace, name)))?;
        Ok((object, gone))
    }

    /// Deletes a pod if its disruption budgets allow that now: returns it as it is then, and whether it is gone already.
    ///
    /// # Errors
    /// `Budget` when they do not; otherwise as [`Client::delete`].
    pub async fn evict(&self, namespace: &str, pod: &str, options: &EvictOptions) -> Result<(Pod, bool), ClientError> {
        let operation = Operation::new("evict", subject(Kind::Pod, namespace, pod));
        let request = EvictRequest {
            namespace: namespace.to_owned(),
            pod: pod.to_owned(),
            grace_period_seconds: options.grace_seconds,
            uid: options.uid.clone(),
            resource_version: String::new(),
            dry_run: options.dry_run,
        };
        let call = |mut api: ObjectsClient<Channel>, request| async move { api.evict(request).await };
        let answer = self.objects(operation.clone(), Retry::NeverSent, request, call).await;
        let answer = answer.map_err(|error| match error {
            // The store may be full as well; the server's words tell the two apart.
            ClientError::TooLarge { operation, message } if message.contains("disruption budget") => {
                ClientError::Budget { operation, message }
            }
            error => error,
        })?;
        let missing = || ClientError::Answer { operation: operation.clone(), message: "it has no object".to_owned() };
        Ok((typed(answer.object.ok_or_else(missing)?, || operation)?, answer.gone))
    }

    // ---------------------------------------------------------------------------------- objects of kinds at run time

    /// As [`Client::get`], for a kind that is known at run time.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn get_object(&self, kind: Kind, namespace: &str, name: &str) -> Result<Object, ClientError> {
        let operation = Operation::new("get", subject(kind, namespace, name));
        let request =
            GetRequest { kind: kind.name().to_owned(), namespace: namespace.to_owned(), name: name.to_owned() };
        self.objects(operation, Retry::Always, request, |mut api, request| async move { api.get(request).await }).await
    }

    /// As [`Client::list`], for a kind that is known at run time.
    ///
    /// # Errors
    /// As [`Client::list`].
    pub async fn list_objects(&self, kind: Kind, query: &Query) -> Result<Objects, ClientError> {
        let mut restarts = 0;
        let mut items = Vec::new();
        let mut token = String::new();
        loop {
            match self.list_page(kind, query, &token).await {
                Ok(page) => {
                    items.extend(page.items);
                    if page.next.is_empty() {
                        return Ok(List { items, revision: page.revision });
                    }
                    token = page.next;
                }
                Err(error) if error.is_expired() && !token.is_empty() && restarts < LIST_RESTARTS => {
                    restarts += 1;
                    items.clear();
                    token.clear();
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// As [`Client::create`], for a kind that is known at run time; `dry_run` stores nothing.
    ///
    /// # Errors
    /// As [`Client::create`].
    pub async fn create_object(&self, object: Object, dry_run: bool) -> Result<Object, ClientError> {
        let operation = Operation::new("create", described(&object));
        let request = CreateRequest { object: Some(object), dry_run };
        let call = |mut api: ObjectsClient<Channel>, request| async move { api.create(request).await };
        self.objects(operation, Retry::NeverSent, request, call).await
    }

    /// As [`Client::update`], for a kind that is known at run time; `dry_run` stores nothing.
    ///
    /// # Errors
    /// As [`Client::update`].
    pub async fn update_object(&self, object: Object, dry_run: bool) -> Result<Object, ClientError> {
        let operation = Operation::new("update", described(&object));
        let request = UpdateRequest { object: Some(object), dry_run };
        let call = |mut api: ObjectsClient<Channel>, request| async move { api.update(request).await };
        self.objects(operation, Retry::NeverSent, request, call).await
    }

    /// As [`Client::patch`], for a kind that is known at run time.
    ///
    /// # Errors
    /// As [`Client::patch`].
    pub async fn patch_object(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        merge_patch: &str,
    ) -> Result<Object, ClientError> {
        let operation = Operation::new("patch", subject(kind, namespace, name));
        let request = PatchRequest {
            kind: kind.name().to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            merge_patch: merge_patch.as_bytes().to_vec().into(),
            status: false,
        };
        let call = |mut api: ObjectsClient<Channel>, request| async move { api.patch(request).await };
        self.objects(operation, Retry::NeverSent, request, call).await
    }

    /// As [`Client::delete`], for a kind that is known at run time.
    ///
    /// # Errors
    /// As [`Client::delete`].
    pub async fn delete_object(
        &self,
        kind: Kind,
        namespace: &str,
        name: &str,
        options: &DeleteOptions,
    ) -> Result<(Object, bool), ClientError> {
        let operation = Operation::new("delete", subject(kind, namespace, name));
        let request = DeleteRequest {
            kind: kind.name().to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            grace_period_seconds: options.grace_seconds,
            uid: options.uid.clone(),
            resource_version: options.resource_version.clone(),
        };
        let call = |mut api: ObjectsClient<Channel>, request| async move { api.delete(request).await };
        let answer = self.objects(operation.clone(), Retry::NeverSent, request, call).await?;
        let missing = || ClientError::Answer { operation, message: "it has no object".to_owned() };
        Ok((answer.object.ok_or_else(missing)?, answer.gone))
    }

    /// One page of a list; an empty token asks for the first.
    pub(crate) async fn list_page(&self, kind: Kind, query: &Query, token: &str) -> Result<Page, ClientError> {
        let request = ListRequest {
            kind: kind.name().to_owned(),
            namespace: query.namespace.clone(),
            label_selector: query.labels.clone(),
            field_selector: query.fields.clone(),
            limit: PAGE,
            r#continue: token.to_owned(),
            allow_stale: query.allow_stale,
        };
        let call = |mut api: ObjectsClient<Channel>, request| async move { api.list(request).await };
        let answer = self.objects(listing(kind, query), Retry::Always, request, call).await?;
        Ok(Page { items: answer.items, revision: answer.revision, next: answer.r#continue })
    }

    // --------------------------------------------------------------------------------------------------- scheduling

    /// Binds pods to nodes; one result per item, in order. After an error it is unknown which items were bound: the watch tells.
    ///
    /// # Errors
    /// What any call can meet; that an item could not be bound is no error but its result.
    pub async fn bind_batch(&self, request: BindBatchRequest) -> Result<BindBatchResponse, ClientError> {
        let asked = request.items.len();
        let operation = Operation::new("bind", format!("{asked} pods"));
        let answer = self
            .call(operation.clone(), Retry::NeverSent, |channel| {
                let mut api = SchedulingClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES);
                let request = request.clone();
                async move { api.bind_batch(request).await }
            })
            .await?;
        if answer.results.len() != asked {
            let message = format!("{} results for {asked} items", answer.results.len());
            return Err(ClientError::Answer { operation, message });
        }
        Ok(answer)
    }

    /// Tells why pods stay pending.
    ///
    /// # Errors
    /// What any call can meet.
    pub async fn report_unschedulable(&self, request: ReportUnschedulableRequest) -> Result<(), ClientError> {
        let operation = Operation::new("report", format!("{} unschedulable pods", request.items.len()));
        // A report that arrives twice writes once: the server compares.
        self.call(operation, Retry::Always, |channel| {
            let mut api = SchedulingClient::new(channel);
            let request = request.clone();
            async move { api.report_unschedulable(request).await }
        })
        .await
        .map(|_| ())
    }

    /// Ends pods with their own grace so that a more important one gets their place.
    ///
    /// # Errors
    /// What any call can meet; that a pod could not be ended is no error but in the answer.
    pub async fn preempt(&self, request: PreemptRequest) -> Result<PreemptResponse, ClientError> {
        let operation = Operation::new("end", format!("{} pods for {}", request.victims.len(), request.preemptor));
        // A pod that is marked already stays so: twice is once.
        self.call(operation, Retry::Always, |channel| {
            let mut api = SchedulingClient::new(channel);
            let request = request.clone();
            async move { api.preempt(request).await }
        })
        .await
    }

    // --------------------------------------------------------------------------------------------------- explaining

    /// Why a pod is not placed, from its scheduler.
    ///
    /// # Errors
    /// `NotFound`; `Unavailable` when its scheduler has no stream to the server; and what any call can meet.
    pub async fn explain(&self, namespace: &str, pod: &str) -> Result<Explanation, ClientError> {
        let operation = Operation::new("explain", subject(Kind::Pod, namespace, pod));
        let request = ExplainRequest { namespace: namespace.to_owned(), pod: pod.to_owned() };
        self.call(operation, Retry::Always, |channel| {
            let mut api = explaining_client(channel);
            let request = request.clone();
            async move { api.explain(request).await }
        })
        .await
    }

    /// Where pods would go that do not exist.
    ///
    /// # Errors
    /// `Invalid`; `Unavailable` when their scheduler has no stream to the server; and what any call can meet.
    pub async fn fit(&self, request: FitRequest) -> Result<FitResponse, ClientError> {
        let operation = Operation::new("fit", format!("{} pods", request.pods.len()));
        self.call(operation, Retry::Always, |channel| {
            let mut api = explaining_client(channel);
            let request = request.clone();
            async move { api.fit(request).await }
        })
        .await
    }

    /// Opens a scheduler's stream of questions at the server in use; [`Client::each`] has one client per server.
    ///
    /// # Errors
    /// What any call can meet.
    pub async fn answer(
        &self,
        answers: impl tokio_stream::Stream<Item = SchedulerMessage> + Send + 'static,
    ) -> Result<tonic::Streaming<SchedulerQuestion>, ClientError> {
        let operation = || Operation::new("open", "the stream of questions");
        let mut api = explaining_client(self.channel());
        let opened = tokio::time::timeout(self.shared.request_timeout, api.answer(answers)).await;
        let seconds = self.shared.request_timeout.as_secs();
        let opened = opened.map_err(|_| ClientError::Timeout { operation: operation(), seconds })?;
        opened.map(Response::into_inner).map_err(|status| self.failure(operation(), status))
    }

    /// For every server a client of it alone, over the same connections.
    pub fn each(&self) -> impl Iterator<Item = Client> + '_ {
        self.shared.servers.iter().map(|server| {
            let server =
                Server { address: server.address.clone(), channel: server.channel.clone(), answered: Mutex::default() };
            let request_timeout = self.shared.request_timeout;
            Client { shared: Arc::new(Shared { servers: vec![server], current: AtomicUsize::new(0), request_timeout }) }
        })
    }

    // ------------------------------------------------------------------------------------------------------- store

    /// The store behind the server in use.
    ///
    /// # Errors
    /// What any call can meet.
    pub async fn store_status(&self) -> Result<StoreStatus, ClientError> {
        let operation = Operation::new("ask for the status of", "the store");
        self.call(operation, Retry::Always, |channel| {
            let mut api = StoresClient::new(channel);
            async move { api.status(StoreStatusRequest {}).await }
        })
        .await
    }

    // ----------------------------------------------------------------------------------------------------- plumbing

    async fn objects<Q: Clone, A, Fut>(
        &self,
        operation: Operation,
        retry: Retry,
        request: Q,
        call: impl Fn(ObjectsClient<Channel>, Q) -> Fut,
    ) -> Result<A, ClientError>
    where
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        self.call(operation, retry, |channel| call(objects_client(channel), request.clone())).await
    }

    /// Makes a call at the server in use, or at the next when that one is not there.
    pub(crate) async fn call<A, Fut>(
        &self,
        operation: Operation,
        retry: Retry,
        call: impl Fn(Channel) -> Fut,
    ) -> Result<A, ClientError>
    where
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        let shared = &self.shared;
        let (mut tries, begun) = (Tries::new(shared.servers.len(), retry), Instant::now());
        let mut pauses = Backoff::new(ROUND_PAUSE.0, ROUND_PAUSE.1);
        self.choose().await;
        loop {
            let index = shared.current.load(Ordering::Relaxed) % shared.servers.len();
            let answer =
                tokio::time::timeout(shared.request_timeout, call(shared.servers[index].channel.clone())).await;
            let status = match answer {
                Ok(Ok(answer)) => {
                    shared.servers[index].has_answered();
                    return Ok(answer.into_inner());
                }
                Ok(Err(status)) => status,
                Err(_) => {
                    self.leave(index);
                    return Err(ClientError::Timeout { operation, seconds: shared.request_timeout.as_secs() });
                }
            };
            if !is_away(&status) {
                shared.servers[index].has_answered();
                return Err(self.failure(operation, status));
            }
            self.leave(index);
            match tries.failed(!never_sent(&status), begun.elapsed()) {
                Next::Elsewhere => {}
                Next::Pause => tokio::time::sleep(pauses.next_wait()).await,
                Next::GiveUp => return Err(self.failure(operation, status)),
            }
        }
    }

    /// Makes a server the one in use that answers, if there are several: one that is stopped takes a request and does nothing with it,
    /// which is noticed late, and then nobody knows whether it was done. Whether one was found, the request itself shows.
    pub(crate) async fn choose(&self) {
        let servers = &self.shared.servers;
        for _ in 1..servers.len() {
            let index = self.shared.current.load(Ordering::Relaxed) % servers.len();
            if servers[index].answered_lately() {
                return;
            }
            let request = GetRequest {
                kind: Kind::Namespace.name().to_owned(),
                namespace: String::new(),
                name: "default".to_owned(),
            };
            let mut api = objects_client(servers[index].channel.clone());
            match tokio::time::timeout(PROBE, api.get(request)).await {
                Ok(Err(status)) if is_away(&status) => self.leave(index),
                Err(_) => self.leave(index),
                // What it answers does not matter.
                Ok(_) => return servers[index].has_answered(),
            }
        }
    }

    /// The channel of the server in use, for a call whose request cannot be made twice.
    pub(crate) fn channel(&self) -> Channel {
        let servers = &self.shared.servers;
        servers[self.shared.current.load(Ordering::Relaxed) % servers.len()].channel.clone()
    }

    /// The error of a call that ended with this status.
    pub(crate) fn failure(&self, operation: Operation, status: Status) -> ClientError {
        if never_sent(&status) {
            return ClientError::Unreachable { operation, servers: self.servers(), reason: reason(&status) };
        }
        ClientError::from_status(operation, &status)
    }

    /// The server at `index` does not answer: the next call goes to the one after it.
    fn leave(&self, index: usize) {
        let next = (index + 1) % self.shared.servers.len();
        // Only the first to notice moves on; the others find the new one.
        let _ = self.shared.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Whether a server, or the store behind it, is not there.
fn is_away(status: &Status) -> bool {
    never_sent(status) || connection_broke(status) || status.code() == Code::Unavailable
}

fn explaining_client(channel: Channel) -> ExplainingClient<Channel> {
    ExplainingClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

pub(crate) fn objects_client(channel: Channel) -> ObjectsClient<Channel> {
    ObjectsClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

fn server(address: &str, options: &Options) -> Result<Server, ClientError> {
    let bad = |message: String| ClientError::Address { address: address.to_owned(), message };
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(|error| bad(error.to_string()))?;
    let channel = endpoint
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(options.keep_alive)
        .keep_alive_timeout(options.keep_alive)
        .keep_alive_while_idle(true)
        // Lists and logs are large beside the default window of 64 KiB.
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .connect_lazy();
    Ok(Server { address: address.to_owned(), channel, answered: Mutex::default() })
}

/// Kind and name for messages.
pub(crate) fn subject(kind: Kind, namespace: &str, name: &str) -> String {
    if namespace.is_empty() { format!("{kind} {name}") } else { format!("{kind} {namespace}/{name}") }
}

fn named(kind: Kind, meta: &minipod_proto::v1::ObjectMeta) -> String {
    let name = if meta.name.is_empty() { format!("{}…", meta.generate_name) } else { meta.name.clone() };
    subject(kind, &meta.namespace, &name)
}

fn described(object: &Object) -> String {
    object.kind_of().map_or_else(|| "object of unknown kind".to_owned(), |kind| named(kind, object.meta()))
}

pub(crate) fn listing(kind: Kind, query: &Query) -> Operation {
    let place = if query.namespace.is_empty() { String::new() } else { format!(" of namespace {}", query.namespace) };
    Operation::new("list", format!("{}{place}", kind.plural()))
}

pub(crate) fn typed<K: Resource>(object: Object, operation: impl FnOnce() -> Operation) -> Result<K, ClientError> {
    K::try_from(object).map_err(|other| {
        let found = other.kind_of().map_or("an object of unknown kind", Kind::name);
        ClientError::Answer { operation: operation(), message: format!("{found} instead of {}", K::KIND) }
    })
}
