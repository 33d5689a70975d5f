//! Objects: create, get, list, change, delete, watch.

use std::{pin::Pin, sync::Arc};

use futures_util::StreamExt;
use minipod_proto::{
    Kind,
    v1::{
        CreateManyRequest, CreateManyResponse, CreateRequest, CreateResult, DeleteRequest, DeleteResponse,
        EvictRequest, GetRequest, ListRequest, ListResponse, Object, PatchRequest, ResizeRequest, UpdateRequest,
        WatchEvent, WatchRequest, objects_server,
    },
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status};

use crate::{
    cache::{Entry, Filter, Subscription},
    error::ApiError,
    keys,
    registry::{Registry, Stored},
    storage::{self, StoreError},
    wire::{self, EncodedEvent, EncodedList, EncodedObject},
};

/// A list is split before it is larger than this: clients take messages of 4 MiB unless they ask for more.
const LIST_LIMIT_BYTES: usize = 3 * 1024 * 1024;

/// Objects of one CreateMany: what a client packs into a message, far from what a server could not hold.
const CREATE_LIMIT: usize = 1_000;

/// Of these, as many are under way at a time: about what one transaction of the store carries.
const CREATE_AT_ONCE: usize = 128;

/// Encoded events that wait in front of a connection: a little, so that the bound of a slow watcher is the cache's queue.
const READY_EVENTS: usize = 32;

/// Objects that are read at once for the later pages of a list.
const READ_AT_ONCE: i64 = 500;

/// Events of a watch.
pub type EventStream = ReceiverStream<Result<EncodedEvent, Status>>;

/// The implementation.
pub struct ObjectsApi {
    registry: Arc<Registry>,
}

impl ObjectsApi {
    /// Over a registry.
    pub fn new(registry: Arc<Registry>) -> ObjectsApi {
        ObjectsApi { registry }
    }

    /// Makes an object.
    ///
    /// # Errors
    /// As [`Registry::create`].
    pub async fn create_encoded(&self, request: CreateRequest) -> Result<EncodedObject, ApiError> {
        let stored = self.registry.create_stored(request).await?;
        Ok(EncodedObject { kind: stored.kind, inner: stored.inner() })
    }

    /// Makes many objects; what became of each, in their order.
    ///
    /// # Errors
    /// When there are too many for one call; then none was made.
    pub async fn create_many(&self, request: CreateManyRequest) -> Result<CreateManyResponse, ApiError> {
        let CreateManyRequest { objects, dry_run } = request;
        if objects.len() > CREATE_LIMIT {
            return Err(ApiError::Invalid(format!(
                "objects: there are {} in one call, {CREATE_LIMIT} at the most; make several calls",
                objects.len()
            )));
        }
        let registry = &self.registry;
        let results = futures_util::stream::iter(objects).map(|object| async move {
            created(registry.create_stored(CreateRequest { object: Some(object), dry_run }).await)
        });
        Ok(CreateManyResponse { results: results.buffered(CREATE_AT_ONCE).collect().await })
    }

    /// One page of a list.
    ///
    /// # Errors
    /// When the request is wrong, the store cannot be read, or the list's revision is gone.
    pub async fn page(&self, request: ListRequest) -> Result<EncodedList, ApiError> {
        let kind = keys::kind(&request.kind)?;
        let filter = Filter::parse(kind, &request.namespace, &request.label_selector, &request.field_selector)?;
        if request.limit < 0 {
            return Err(ApiError::Invalid(format!("limit: {} is negative; 0 stands for everything", request.limit)));
        }
        let limit = if request.limit == 0 { usize::MAX } else { usize::try_from(request.limit).unwrap_or(usize::MAX) };
        if !request.r#continue.is_empty() {
            let token = Token::parse(&request.r#continue)?;
            return self.later_page(kind, &filter, &token, limit).await;
        }
        if !request.allow_stale {
            let now = self.registry.storage.revision().await?;
            self.registry.cache.reach(now).await?;
        } else if self.registry.cache.revision() == 0 {
            self.registry.cache.reach(1).await?;
        }
        let (items, revision) = self.registry.cache.list(kind, &filter);
        let mut page = Collected::new(limit);
        for entry in items {
            page.take(entry);
            if page.full {
                break;
            }
        }
        Ok(page.finish(kind, revision))
    }

    /// The first page came from the cache; the others come from the store, at the first one's revision.
    async fn later_page(
        &self,
        kind: Kind,
        filter: &Filter,
        token: &Token,
        limit: usize,
    ) -> Result<EncodedList, ApiError> {
        let prefix = keys::range_prefix(kind, &filter.namespace);
        let whole = keys::object(kind, &token.key);
        if !whole.starts_with(prefix.as_bytes()) {
            return Err(ApiError::Invalid(
                "continue: the token belongs to another list; repeat the list's other parameters".into(),
            ));
        }
        let (end, mut from) = (storage::prefix_end(&prefix), storage::after(&whole));
        let mut page = Collected::new(limit);
        loop {
            let read = self.registry.storage.page(from, end.clone(), READ_AT_ONCE, token.revision).await;
            let read = read.map_err(|error| match error {
                StoreError::Compacted { .. } => ApiError::Expired(format!(
                    "continue: the list's revision {} is no longer kept; list again from the beginning",
                    token.revision
                )),
                error => error.into(),
            })?;
            let last = read.items.last().map(|item| item.key.clone());
            for item in &read.items {
                let keys::Parsed::Object(_, key) = keys::parse(&item.key) else { continue };
                let entry = Arc::new(Entry::decode(kind, key, &item.value, item.revision)?);
                if filter.matches(&entry) {
                    page.take(entry);
                }
                if page.full {
                    return Ok(page.finish(kind, token.revision));
                }
            }
            match last {
                Some(key) if read.more => from = storage::after(&key),
                _ => return Ok(page.finish(kind, token.revision)),
            }
        }
    }

    /// Opens a watch.
    ///
    /// # Errors
    /// When the request is wrong, or the changes since its revision are no longer kept.
    pub async fn open_watch(&self, request: WatchRequest) -> Result<EventStream, ApiError> {
        let kind = keys::kind(&request.kind)?;
        let filter = Filter::parse(kind, &request.namespace, &request.label_selector, &request.field_selector)?;
        if request.revision < 0 {
            return Err(ApiError::Invalid(format!(
                "revision: {} is negative; 0 begins with what there is",
                request.revision
            )));
        }
        if request.revision == 0 {
            let now = self.registry.storage.revision().await?;
            self.registry.cache.reach(now).await?;
        } else {
            // Before the first list nothing is known of any revision, and nothing may be refused.
            self.registry.cache.reach(1).await?;
        }
        let subscription = self.registry.cache.subscribe(kind, filter, request.revision)?;
        let (sender, receiver) = mpsc::channel(READY_EVENTS);
        tokio::spawn(forward(kind, subscription, sender));
        Ok(ReceiverStream::new(receiver))
    }
}

/// What became of an object of a CreateMany.
fn created(stored: Result<Stored, ApiError>) -> CreateResult {
    match stored {
        Ok(stored) => {
            let (namespace, name) = stored.key.rsplit_once('/').unwrap_or(("", &stored.key));
            CreateResult {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                resource_version: stored.resource_version(),
                uid: stored.uid,
                ..CreateResult::default()
            }
        }
        Err(error) => {
            let status = Status::from(error);
            let (code, message) = (status.code().into(), status.message().to_owned());
            CreateResult { code, message, ..CreateResult::default() }
        }
    }
}

async fn forward(kind: Kind, mut subscription: Subscription, out: mpsc::Sender<Result<EncodedEvent, Status>>) {
    loop {
        // Both arms are cancel safe; a closed connection ends the watch also when nothing happens.
        let next = tokio::select! {
            next = subscription.next() => next,
            () = out.closed() => return,
        };
        let deliveries = match next {
            Ok(deliveries) => deliveries,
            Err(cut) => {
                // Nobody to tell is no problem.
                let _ = out.send(Err(ApiError::from(cut).into())).await;
                return;
            }
        };
        for delivery in deliveries {
            if out.send(Ok(EncodedEvent { kind, delivery })).await.is_err() {
                return;
            }
        }
    }
}

/// A page that fills.
struct Collected {
    items: Vec<Arc<Entry>>,
    limit: usize,
    bytes: usize,
    /// There is one more item than the page takes.
    full: bool,
}

impl Collected {
    fn new(limit: usize) -> Collected {
        Collected { items: Vec::new(), limit, bytes: 0, full: false }
    }

    fn take(&mut self, entry: Arc<Entry>) {
        let size = wire::listed_len(&entry);
        if self.items.len() >= self.limit || (!self.items.is_empty() && self.bytes + size > LIST_LIMIT_BYTES) {
            self.full = true;
            return;
        }
        self.bytes += size;
        self.items.push(entry);
    }

    fn finish(self, kind: Kind, revision: i64) -> EncodedList {
        let last = self.items.last().filter(|_| self.full);
        let next = last.map(|entry| Token { revision, key: entry.key.clone() }.text()).unwrap_or_default();
        EncodedList { kind, items: self.items, revision, next }
    }
}

/// What a continue token says: the list's revision and the last key of the page before.
struct Token {
    revision: i64,
    key: String,
}

impl Token {
    fn text(&self) -> String {
        format!("{}/{}", self.revision, self.key)
    }

    fn parse(text: &str) -> Result<Token, ApiError> {
        let parts = text.split_once('/').and_then(|(revision, key)| Some((revision.parse::<i64>().ok()?, key)));
        match parts {
            Some((revision, key))
                if revision > 0 && key.split('/').all(|part| keys::check_name("continue", part).is_ok()) =>
            {
                Ok(Token { revision, key: key.to_owned() })
            }
            _ => {
                Err(ApiError::Invalid("continue: no token of this server; repeat it as the page before gave it".into()))
            }
        }
    }
}

#[tonic::async_trait]
impl objects_server::Objects for ObjectsApi {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchEvent, Status>> + Send>>;

    async fn create(&self, request: Request<CreateRequest>) -> Result<Response<Object>, Status> {
        Ok(Response::new(wire::decoded(&self.create_encoded(request.into_inner()).await?)?))
    }

    async fn create_many(&self, request: Request<CreateManyRequest>) -> Result<Response<CreateManyResponse>, Status> {
        Ok(Response::new(self.create_many(request.into_inner()).await?))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Object>, Status> {
        Ok(Response::new(self.registry.get(request.into_inner()).await?))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        Ok(Response::new(wire::decoded(&self.page(request.into_inner()).await?)?))
    }

    async fn update(&self, request: Request<UpdateRequest>) -> Result<Response<Object>, Status> {
        Ok(Response::new(self.registry.update(request.into_inner()).await?))
    }

    async fn update_status(&self, request: Request<UpdateRequest>) -> Result<Response<Object>, Status> {
        Ok(Response::new(self.registry.update_status(request.into_inner()).await?))
    }

    async fn update_ephemeral_containers(&self, request: Request<UpdateRequest>) -> Result<Response<Object>, Status> {
        Ok(Response::new(self.registry.update_ephemeral(request.into_inner()).await?))
    }

    async fn patch(&self, request: Request<PatchRequest>) -> Result<Response<Object>, Status> {
        Ok(Response::new(self.registry.patch(request.into_inner()).await?))
    }

    async fn resize(&self, request: Request<ResizeRequest>) -> Result<Response<Object>, Status> {
        Ok(Response::new(self.registry.resize(request.into_inner()).await?))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<DeleteResponse>, Status> {
        Ok(Response::new(self.registry.delete(request.into_inner()).await?))
    }

    async fn evict(&self, request: Request<EvictRequest>) -> Result<Response<DeleteResponse>, Status> {
        Ok(Response::new(self.registry.evict(request.into_inner()).await?))
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let events = self.open_watch(request.into_inner()).await?;
        Ok(Response::new(Box::pin(events.map(|event| wire::decoded(&event?)))))
    }
}
