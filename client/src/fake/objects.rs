//! Objects and Scheduling of the fake.

use std::pin::Pin;
use std::time::SystemTime;

use futures_util::Stream;
use minipod_proto::selector::{FieldSelector, LabelSelector};
use minipod_proto::v1::objects_server::Objects;
use minipod_proto::v1::scheduling_server::Scheduling;
use minipod_proto::v1::{
    BindBatchRequest, BindBatchResponse, BindResult, ConfigMap, CreateManyRequest, CreateManyResponse, CreateRequest,
    CreateResult, DeleteRequest, DeleteResponse, EvictRequest, GetRequest, ListRequest, ListResponse, Namespace, Node,
    Object, ObjectMeta, PatchRequest, Pod, PodDisruptionBudget, PreemptRequest, PreemptResponse, PriorityClass,
    ReportUnschedulableRequest, ReportUnschedulableResponse, ResizeRequest, Secret, Time, UpdateRequest, WatchEvent,
    WatchRequest, bind_result, object, watch_event,
};
use minipod_proto::{Kind, Resource};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{Event, Shared, State};

/// Events under way to one watcher of the fake: few, so that tests see what a full queue does.
const WATCHER_QUEUE: usize = 4;

type Answer<T> = Result<Response<T>, Status>;

/// What a list or watch selects.
struct Selection {
    kind: Kind,
    namespace: String,
    labels: LabelSelector,
    fields: FieldSelector,
}

impl Selection {
    fn new(kind: &str, namespace: &str, labels: &str, fields: &str) -> Result<Selection, Status> {
        let kind = kind_of(kind)?;
        let wrong = |error: minipod_proto::selector::SelectorError| Status::invalid_argument(error.to_string());
        Ok(Selection {
            kind,
            namespace: namespace.to_owned(),
            labels: LabelSelector::parse(labels).map_err(wrong)?,
            fields: FieldSelector::parse(kind, fields).map_err(wrong)?,
        })
    }

    fn matches(&self, object: &Object) -> bool {
        object.kind_of() == Some(self.kind)
            && (self.namespace.is_empty() || object.meta().namespace == self.namespace)
            && self.labels.matches(&object.meta().labels)
            && self.fields.matches(object)
    }

    /// The event as a watcher with this selection sees it.
    fn see(&self, event: &Event) -> Option<WatchEvent> {
        let before = event.before.as_ref().is_some_and(|before| self.matches(before));
        let after = event.kind != watch_event::Type::Deleted && self.matches(&event.object);
        let kind = match (before, after) {
            (false, false) => return None,
            (false, true) => watch_event::Type::Added,
            (true, true) => watch_event::Type::Modified,
            (true, false) => watch_event::Type::Deleted,
        };
        Some(WatchEvent { r#type: kind.into(), object: Some(event.object.clone()), revision: event.revision })
    }
}

fn kind_of(name: &str) -> Result<Kind, Status> {
    Kind::from_name(name).ok_or_else(|| Status::invalid_argument(format!("kind {name:?} is unknown")))
}

fn key_of(namespace: &str, name: &str) -> String {
    if namespace.is_empty() { name.to_owned() } else { format!("{namespace}/{name}") }
}

fn find(state: &State, kind: Kind, key: &str) -> Result<Object, Status> {
    let found = state.objects.get(&(kind, key.to_owned())).cloned();
    found.ok_or_else(|| Status::not_found(format!("{} {key:?} not found", kind.name())))
}

/// The object that is to be written, its kind and key.
fn written(object: Option<Object>) -> Result<(Object, Kind, String), Status> {
    let mut object = object.ok_or_else(|| Status::invalid_argument("object: required"))?;
    object.set_type();
    minipod_proto::defaults::apply(&mut object);
    let kind = object.kind_of().ok_or_else(|| Status::invalid_argument("object: of unknown kind"))?;
    if let Some(meta) = object.meta_mut() {
        if kind.namespaced() && meta.namespace.is_empty() {
            meta.namespace = "default".into();
        }
        if meta.name.is_empty() {
            return Err(Status::invalid_argument("metadata.name: required"));
        }
    }
    let key = object.key();
    Ok((object, kind, key))
}

fn take_status(to: &mut Object, from: &Object) {
    match (&mut to.kind, &from.kind) {
        (Some(object::Kind::Pod(to)), Some(object::Kind::Pod(from))) => to.status.clone_from(&from.status),
        (Some(object::Kind::Node(to)), Some(object::Kind::Node(from))) => to.status.clone_from(&from.status),
        _ => {}
    }
}

fn compare_revision(stated: &str, object: &Object) -> Result<(), Status> {
    let present = &object.meta().resource_version;
    if stated.is_empty() || stated == present {
        return Ok(());
    }
    Err(Status::aborted(format!("resourceVersion {stated} is stale: it is {present} now")))
}

/// RFC 7386.
fn merge(target: &mut serde_json::Value, patch: serde_json::Value) {
    let serde_json::Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = serde_json::Value::Object(serde_json::Map::new());
    }
    let Some(target) = target.as_object_mut() else { return };
    for (name, value) in patch {
        if value.is_null() {
            target.remove(&name);
        } else {
            merge(target.entry(name).or_insert(serde_json::Value::Null), value);
        }
    }
}

fn from_json(kind: Kind, value: serde_json::Value) -> serde_json::Result<Object> {
    Ok(match kind {
        Kind::Pod => serde_json::from_value::<Pod>(value)?.into(),
        Kind::Node => serde_json::from_value::<Node>(value)?.into(),
        Kind::Namespace => serde_json::from_value::<Namespace>(value)?.into(),
        Kind::Event => serde_json::from_value::<minipod_proto::v1::Event>(value)?.into(),
        Kind::ConfigMap => serde_json::from_value::<ConfigMap>(value)?.into(),
        Kind::Secret => serde_json::from_value::<Secret>(value)?.into(),
        Kind::PriorityClass => serde_json::from_value::<PriorityClass>(value)?.into(),
        Kind::PodDisruptionBudget => serde_json::from_value::<PodDisruptionBudget>(value)?.into(),
    })
}

impl Shared {
    fn write(&self, mut state: std::sync::MutexGuard<'_, State>, object: Object) -> Answer<Object> {
        let (kind, key) = (object.kind_of(), object.key());
        state.put(object);
        let stored = kind.map(|kind| find(&state, kind, &key)).transpose()?.unwrap_or_default();
        drop(state);
        self.changed();
        Ok(Response::new(stored))
    }
}

#[tonic::async_trait]
impl Objects for Shared {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchEvent, Status>> + Send>>;

    async fn create(&self, request: Request<CreateRequest>) -> Answer<Object> {
        let request = request.into_inner();
        let state = self.call("create")?;
        let (object, kind, key) = written(request.object)?;
        if state.objects.contains_key(&(kind, key.clone())) {
            return Err(Status::already_exists(format!("{} {key:?} already exists", kind.name())));
        }
        if request.dry_run { Ok(Response::new(object)) } else { self.write(state, object) }
    }

    async fn create_many(&self, request: Request<CreateManyRequest>) -> Answer<CreateManyResponse> {
        let CreateManyRequest { objects, dry_run } = request.into_inner();
        drop(self.call("create_many")?);
        let mut results = Vec::new();
        for object in objects {
            let made = self.create(Request::new(CreateRequest { object: Some(object), dry_run })).await;
            results.push(match made {
                Ok(made) => {
                    let ObjectMeta { namespace, name, uid, resource_version, .. } = made.get_ref().meta().clone();
                    CreateResult { namespace, name, uid, resource_version, ..CreateResult::default() }
                }
                Err(status) => {
                    let (code, message) = (status.code().into(), status.message().to_owned());
                    CreateResult { code, message, ..CreateResult::default() }
                }
            });
        }
        Ok(Response::new(CreateManyResponse { results }))
    }

    async fn get(&self, request: Request<GetRequest>) -> Answer<Object> {
        let request = request.into_inner();
        let state = self.call("get")?;
        find(&state, kind_of(&request.kind)?, &key_of(&request.namespace, &request.name)).map(Response::new)
    }

    async fn list(&self, request: Request<ListRequest>) -> Answer<ListResponse> {
        let request = request.into_inner();
        let mut state = self.call("list")?;
        let selection =
            Selection::new(&request.kind, &request.namespace, &request.label_selector, &request.field_selector)?;
        // The token: the revision of the first page and how many objects were given.
        let (revision, start) = match request.r#continue.split_once(':') {
            None => (state.revision, 0),
            Some((revision, start)) => (revision.parse().unwrap_or(0), start.parse().unwrap_or(0)),
        };
        let all: Vec<Object> = match state.lists.get(&revision) {
            Some(kept) if start > 0 => kept.iter().filter(|object| selection.matches(object)).cloned().collect(),
            None if start > 0 => return Err(Status::out_of_range("the list's revision is gone")),
            _ => state.objects.values().filter(|object| selection.matches(object)).cloned().collect(),
        };
        let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0).unwrap_or(usize::MAX);
        let end = start + limit.min(state.page).min(all.len().saturating_sub(start));
        let items = all.iter().skip(start).take(end - start).cloned().collect();
        let next = if end < all.len() { format!("{revision}:{end}") } else { String::new() };
        if start == 0 && !next.is_empty() {
            state.lists.insert(revision, all);
        }
        Ok(Response::new(ListResponse { items, revision, r#continue: next }))
    }

    async fn update(&self, request: Request<UpdateRequest>) -> Answer<Object> {
        let request = request.into_inner();
        let state = self.call("update")?;
        let (mut object, kind, key) = written(request.object)?;
        let old = find(&state, kind, &key)?;
        compare_revision(&object.meta().resource_version, &old)?;
        take_status(&mut object, &old);
        if let Some(meta) = object.meta_mut() {
            meta.creation_timestamp = old.meta().creation_timestamp;
            meta.uid.clone_from(&old.meta().uid);
        }
        if request.dry_run { Ok(Response::new(object)) } else { self.write(state, object) }
    }

    async fn update_status(&self, request: Request<UpdateRequest>) -> Answer<Object> {
        let request = request.into_inner();
        let state = self.call("update_status")?;
        let (object, kind, key) = written(request.object)?;
        let mut old = find(&state, kind, &key)?;
        compare_revision(&object.meta().resource_version, &old)?;
        take_status(&mut old, &object);
        self.write(state, old)
    }

    async fn resize(&self, request: Request<ResizeRequest>) -> Answer<Object> {
        let request = request.into_inner();
        let state = self.call("resize")?;
        let mut object = find(&state, Kind::Pod, &key_of(&request.namespace, &request.name))?;
        if let Some(object::Kind::Pod(pod)) = &mut object.kind {
            let spec = pod.spec_mut();
            for container in spec.init_containers.iter_mut().chain(&mut spec.containers) {
                let change = request.containers.iter().find(|one| one.name == container.name);
                if let Some(resources) = change.and_then(|one| one.resources.as_ref()) {
                    minipod_proto::resize::merge(container, resources);
                }
            }
        }
        self.write(state, object)
    }

    async fn update_ephemeral_containers(&self, request: Request<UpdateRequest>) -> Answer<Object> {
        let request = request.into_inner();
        let state = self.call("update_ephemeral_containers")?;
        let (object, kind, key) = written(request.object)?;
        let mut old = find(&state, kind, &key)?;
        compare_revision(&object.meta().resource_version, &old)?;
        if let (Some(object::Kind::Pod(old)), Some(object::Kind::Pod(new))) = (&mut old.kind, object.kind) {
            old.spec_mut().ephemeral_containers = new.spec.unwrap_or_default().ephemeral_containers;
        }
        self.write(state, old)
    }

    async fn patch(&self, request: Request<PatchRequest>) -> Answer<Object> {
        let request = request.into_inner();
        let state = self.call("patch")?;
        let kind = kind_of(&request.kind)?;
        let old = find(&state, kind, &key_of(&request.namespace, &request.name))?;
        let wrong = |error: serde_json::Error| Status::invalid_argument(format!("patch: {error}"));
        let mut value = serde_json::to_value(&old).map_err(wrong)?;
        merge(&mut value, serde_json::from_slice(&request.merge_patch).map_err(wrong)?);
        let mut object = from_json(kind, value).map_err(wrong)?;
        take_status(&mut object, &old);
        if object == old {
            return Ok(Response::new(old));
        }
        self.write(state, object)
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Answer<DeleteResponse> {
        let request = request.into_inner();
        let mut state = self.call("delete")?;
        let (kind, key) = (kind_of(&request.kind)?, key_of(&request.namespace, &request.name));
        let old = find(&state, kind, &key)?;
        compare_revision(&request.resource_version, &old)?;
        if !request.uid.is_empty() && request.uid != old.meta().uid {
            return Err(Status::failed_precondition(format!("uid {} is not that of {key}", request.uid)));
        }
        let alive = old.as_pod().is_some_and(|pod| pod.node_name().is_some() && !pod.is_terminal());
        let grace = request.grace_period_seconds.or_else(|| old.as_pod().map(|pod| pod.spec().grace_seconds()));
        let gone = !alive || grace == Some(0);
        let object = if gone {
            state.remove(kind, &key)
        } else {
            let mut marked = old;
            if let Some(meta) = marked.meta_mut() {
                meta.deletion_timestamp = Some(Time::from(SystemTime::now()).plus_seconds(grace.unwrap_or(0)));
                meta.deletion_grace_period_seconds = grace;
            }
            state.put(marked);
            state.objects.get(&(kind, key)).cloned()
        };
        drop(state);
        self.changed();
        Ok(Response::new(DeleteResponse { object, gone }))
    }

    async fn evict(&self, request: Request<EvictRequest>) -> Answer<DeleteResponse> {
        let request = request.into_inner();
        drop(self.call("evict")?);
        if request.dry_run {
            return Err(Status::unimplemented("the fake judges no budgets"));
        }
        let delete = DeleteRequest {
            kind: Kind::Pod.name().to_owned(),
            namespace: request.namespace,
            name: request.pod,
            grace_period_seconds: request.grace_period_seconds,
            uid: request.uid,
            resource_version: request.resource_version,
        };
        self.delete(Request::new(delete)).await
    }

    async fn watch(&self, request: Request<WatchRequest>) -> Answer<Self::WatchStream> {
        let request = request.into_inner();
        let selection =
            Selection::new(&request.kind, &request.namespace, &request.label_selector, &request.field_selector)?;
        let (mut cursor, epoch, first) = {
            let state = self.call("watch")?;
            if request.revision != 0 && request.revision < state.compacted {
                let text =
                    format!("revision {} is compacted away; the oldest is {}", request.revision, state.compacted);
                return Err(Status::out_of_range(text));
            }
            let mut first = Vec::new();
            if request.revision == 0 {
                let present = state.objects.values().filter(|object| selection.matches(object));
                first.extend(present.map(|object| event(watch_event::Type::Added, Some(object), state.revision)));
                first.push(event(watch_event::Type::Bookmark, None, state.revision));
            }
            (if request.revision == 0 { state.revision } else { request.revision }, state.epoch, first)
        };
        let (sender, receiver) = mpsc::channel(WATCHER_QUEUE);
        let (shared, mut changed) = (self.clone(), self.changed.subscribe());
        tokio::spawn(async move {
            for event in first {
                if sender.send(Ok(event)).await.is_err() {
                    return;
                }
            }
            loop {
                changed.mark_unchanged();
                let (news, lag) = {
                    let state = shared.lock();
                    (news(&state, &selection, epoch, &mut cursor), state.lag)
                };
                for item in news {
                    tokio::time::sleep(lag).await;
                    let last = item.is_err();
                    if sender.send(item).await.is_err() || last {
                        return;
                    }
                }
                // Cancel safe, both: a closed channel stays closed, and the count of changes is kept.
                tokio::select! {
                    () = sender.closed() => return,
                    changed = changed.changed() => if changed.is_err() { return },
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// What a watcher gets next.
fn news(state: &State, selection: &Selection, epoch: u64, cursor: &mut i64) -> Vec<Result<WatchEvent, Status>> {
    if state.epoch != epoch {
        return vec![Err(Status::unavailable("the stream was broken on purpose"))];
    }
    if *cursor < state.compacted {
        return vec![Err(Status::out_of_range(format!("revision {cursor} is compacted away")))];
    }
    let new = state.history.iter().filter(|event| event.revision > *cursor);
    let seen = new.filter_map(|event| selection.see(event).map(Ok)).collect();
    *cursor = state.revision;
    seen
}

fn event(kind: watch_event::Type, object: Option<&Object>, revision: i64) -> WatchEvent {
    WatchEvent { r#type: kind.into(), object: object.cloned(), revision }
}

#[tonic::async_trait]
impl Scheduling for Shared {
    async fn bind_batch(&self, request: Request<BindBatchRequest>) -> Answer<BindBatchResponse> {
        let request = request.into_inner();
        let mut state = self.call("bind_batch")?;
        let mut results = Vec::with_capacity(request.items.len());
        for item in request.items {
            let key = key_of(&item.namespace, &item.pod);
            let pod = state.objects.get(&(Kind::Pod, key)).and_then(Object::as_pod).cloned();
            let result = |code: bind_result::Code, node: &str, revision| BindResult {
                code: code.into(),
                message: String::new(),
                node: node.to_owned(),
                revision,
            };
            results.push(match pod {
                None => result(bind_result::Code::PodGone, "", 0),
                Some(pod) if pod.node_name().is_some() => {
                    result(bind_result::Code::AlreadyBound, &pod.spec().node_name, pod.revision())
                }
                Some(mut pod) => {
                    pod.spec_mut().node_name.clone_from(&item.node);
                    let revision = state.put(pod.into());
                    result(bind_result::Code::Bound, &item.node, revision)
                }
            });
        }
        drop(state);
        self.changed();
        Ok(Response::new(BindBatchResponse { results }))
    }

    async fn report_unschedulable(
        &self,
        request: Request<ReportUnschedulableRequest>,
    ) -> Answer<ReportUnschedulableResponse> {
        let mut state = self.call("report_unschedulable")?;
        for item in request.into_inner().items {
            let pod =
                state.objects.get(&(Kind::Pod, key_of(&item.namespace, &item.pod))).and_then(Object::as_pod).cloned();
            let Some(mut pod) = pod else { continue };
            let now = Time::from(SystemTime::now());
            if pod.status_mut().set_condition("PodScheduled", "False", &item.reason, &item.message, now) {
                state.put(pod.into());
            }
        }
        drop(state);
        self.changed();
        Ok(Response::new(ReportUnschedulableResponse {}))
    }

    async fn preempt(&self, request: Request<PreemptRequest>) -> Answer<PreemptResponse> {
        let request = request.into_inner();
        drop(self.call("preempt")?);
        for victim in request.victims {
            let delete = DeleteRequest {
                kind: Kind::Pod.name().to_owned(),
                namespace: victim.namespace,
                name: victim.pod,
                uid: victim.uid,
                ..DeleteRequest::default()
            };
            self.delete(Request::new(delete)).await?;
        }
        Ok(Response::new(PreemptResponse::default()))
    }
}
