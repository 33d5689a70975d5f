//! The calls of the API, typed.

use minipod_proto::v1::explaining_client::ExplainingClient;
use minipod_proto::v1::objects_client::ObjectsClient;
use minipod_proto::v1::scheduling_client::SchedulingClient;
use minipod_proto::v1::stores_client::StoresClient;
use minipod_proto::v1::{
    BindBatchRequest, BindBatchResponse, CreateManyRequest, CreateRequest, CreateResult, DeleteRequest, EvictRequest,
    ExplainRequest, Explanation, FitRequest, FitResponse, GetRequest, ListRequest, Object, ObjectMeta, PatchRequest,
    Pod, PreemptRequest, PreemptResponse, ReportUnschedulableRequest, ResizeRequest, SchedulerMessage,
    SchedulerQuestion, StoreStatus, StoreStatusRequest, UpdateRequest,
};
use minipod_proto::{Kind, Resource};
use prost::Message;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::client::{Client, MAX_MESSAGE_BYTES};
use crate::error::{ClientError, Operation};
use crate::servers::Retry;

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

/// An object that was made together with others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Created {
    /// Empty for kinds without namespace.
    pub namespace: String,
    /// As given, or as the server has made it of metadata.generateName.
    pub name: String,
    /// Its metadata.uid.
    pub uid: String,
    /// Its metadata.resourceVersion; empty in a dry run.
    pub resource_version: String,
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

/// Objects in one page of a list: with pods of a few kilobytes a page is a few megabytes.
const PAGE: i64 = 500;
/// Objects, and bytes of them, in one call that makes many: well below what a server takes (1,000, and 4 MiB for a message).
const CREATE_OBJECTS: usize = 500;
const CREATE_BYTES: usize = 3 << 20;
/// How often a list starts over when its continuation was compacted away.
const LIST_RESTARTS: usize = 3;

impl Client {
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

    /// Creates many objects with few calls; what became of each, in their order. They come to be in no order: none may need another one.
    /// `dry_run` stores nothing.
    ///
    /// # Errors
    /// Of an object as [`Client::create`] has them; what a call meets is the error of all its objects.
    pub async fn create_many(&self, objects: Vec<Object>, dry_run: bool) -> Vec<Result<Created, ClientError>> {
        let mut results = Vec::with_capacity(objects.len());
        let mut objects = objects.into_iter().peekable();
        while objects.peek().is_some() {
            let (mut some, mut bytes) = (Vec::new(), 0);
            while let Some(next) = objects.next_if(|next| {
                bytes += next.encoded_len();
                some.is_empty() || (some.len() < CREATE_OBJECTS && bytes <= CREATE_BYTES)
            }) {
                some.push(next);
            }
            results.extend(self.create_some(some, dry_run).await);
        }
        results
    }

    /// One call's.
    async fn create_some(&self, objects: Vec<Object>, dry_run: bool) -> Vec<Result<Created, ClientError>> {
        let operations: Vec<Operation> =
            objects.iter().map(|object| Operation::new("create", described(object))).collect();
        let request = CreateManyRequest { objects, dry_run };
        let call = |mut api: ObjectsClient<Channel>, request| async move { api.create_many(request).await };
        let all = Operation::new("create", format!("{} objects", operations.len()));
        match self.objects(all, Retry::NeverSent, request.clone(), call).await {
            Ok(answer) => {
                let mut results = answer.results.into_iter();
                let became = |operation| match results.next() {
                    Some(result) => became(operation, result),
                    None => {
                        let message = "the server has not said what became of it".to_owned();
                        Err(ClientError::Server { operation, code: Code::Internal, message })
                    }
                };
                operations.into_iter().map(became).collect()
            }
            // A server from before there was this call.
            Err(ClientError::Unsupported { .. }) => {
                let mut results = Vec::with_capacity(operations.len());
                for object in request.objects {
                    results.push(self.create_object(object, dry_run).await.map(|object| {
                        let ObjectMeta { namespace, name, uid, resource_version, .. } = object.meta().clone();
                        Created { namespace, name, uid, resource_version }
                    }));
                }
                results
            }
            Err(error) => operations.iter().map(|_| Err(error.clone())).collect(),
        }
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
        let opened = tokio::time::timeout(self.request_timeout(), api.answer(answers)).await;
        let seconds = self.request_timeout().as_secs();
        let opened = opened.map_err(|_| ClientError::Timeout { operation: operation(), seconds })?;
        opened.map(Response::into_inner).map_err(|status| self.failure(operation(), status))
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
}

fn explaining_client(channel: Channel) -> ExplainingClient<Channel> {
    ExplainingClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

/// Kind and name for messages.
pub(crate) fn subject(kind: Kind, namespace: &str, name: &str) -> String {
    if namespace.is_empty() { format!("{kind} {name}") } else { format!("{kind} {namespace}/{name}") }
}

fn named(kind: Kind, meta: &minipod_proto::v1::ObjectMeta) -> String {
    let name = if meta.name.is_empty() { format!("{}…", meta.generate_name) } else { meta.name.clone() };
    subject(kind, &meta.namespace, &name)
}

fn became(operation: Operation, result: CreateResult) -> Result<Created, ClientError> {
    let CreateResult { code, message, namespace, name, uid, resource_version } = result;
    match Code::from(code) {
        Code::Ok => Ok(Created { namespace, name, uid, resource_version }),
        code => Err(ClientError::from_status(operation, &Status::new(code, message))),
    }
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
