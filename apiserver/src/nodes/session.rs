//! One agent's session: its pods down, what it observes up.
//!
//! Three loops in one task: `read` takes messages off the stream (and echoes heartbeats at once, whatever the store does), `store`
//! writes reports, `send` feeds the stream from the cache's watch, the acknowledgements and the routes. The end of one ends all.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use minipod_daemon::backoff::Backoff;
use minipod_proto::{
    Kind, Resource as _,
    v1::{
        AgentMessage, Heartbeat, NodeStatus, Object, PodGone, PodStatusAck, PodStatusReport, Routes, ServerMessage,
        agent_message, server_message, watch_event::Type,
    },
};
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Ending, Place, Sessions, pressure::follow_pressure, register::alive, routes::Table, sources::Sources};
use crate::{
    cache::{Filter, Subscription},
    error::ApiError,
    events::Recorder,
    keys,
    registry::{Registry, Verdict, merge_status},
    storage::{Guard, StoreError, Write},
    wire::EncodedMessage,
};

/// What the agent gets.
pub type MessageStream = ReceiverStream<Result<EncodedMessage, Status>>;

/// Messages ready for the connection; what waits behind them waits in the cache's bounded queue.
const READY: usize = 32;
/// Pods of one node with a report that is not stored yet. A node runs some hundred.
const REPORTS: usize = 4_096;
/// Reports written at once.
const WRITES: usize = 8;
/// How often it is looked whether room has come for a resize that waits.
const GRANT_PAUSE: Duration = Duration::from_millis(200);
/// A session begins with its first message within this time.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);

/// What every session needs.
pub struct Shared {
    /// Where reports go.
    pub registry: Arc<Registry>,
    /// Who is connected.
    pub sessions: Arc<Sessions>,
    /// Where events go.
    pub recorder: Recorder,
    /// Routes to all nodes.
    pub routes: watch::Receiver<Table>,
    /// A stream that is silent for so long is ended.
    pub grace: Duration,
}

/// Begins a session.
///
/// # Errors
/// When the first message is no hello of a registered node, or the pods cannot be told exactly.
pub async fn open(shared: Arc<Shared>, mut inbound: Streaming<AgentMessage>) -> Result<MessageStream, ApiError> {
    let first = tokio::time::timeout(FIRST_MESSAGE, inbound.message()).await;
    let hello = match first {
        Ok(Ok(Some(AgentMessage { message: Some(agent_message::Message::Hello(hello)) }))) => hello,
        Ok(Err(status)) => return Err(ApiError::Unavailable(format!("the session broke before its hello: {status}"))),
        _ => return Err(ApiError::Invalid("message: a session begins with hello".into())),
    };
    let node = keys::object_key(Kind::Node, "", &hello.node)?;
    // The agent ends what the snapshot does not name: it must not be older than the store.
    let now = shared.registry.storage.revision().await?;
    shared.registry.cache.reach(now).await?;
    if shared.registry.cache.get(Kind::Node, &node).is_none() {
        return Err(ApiError::Precondition(format!("node {node} is not registered; call Register first")));
    }
    let filter = Filter::parse(Kind::Pod, "", "", &format!("spec.nodeName={node}"))?;
    let pods = shared.registry.cache.subscribe(Kind::Pod, filter, 0)?;
    let claim = shared.sessions.claim(&shared.registry.storage, &node).await?;
    let place = shared.sessions.open(&node, claim.revision)?;
    tracing::info!(node, boot = hello.boot_id, version = hello.agent_version, "session");
    let (out, receiver) = mpsc::channel(READY);
    tokio::spawn(run(shared, place, claim, inbound, pods, out));
    Ok(ReceiverStream::new(receiver))
}

type Out = mpsc::Sender<Result<EncodedMessage, Status>>;

async fn run(
    shared: Arc<Shared>,
    mut place: Place,
    claim: Guard,
    inbound: Streaming<AgentMessage>,
    pods: Subscription,
    out: Out,
) {
    let node = place.node.clone();
    let reports = Reports::default();
    let wishes = Wishes::default();
    let control = place.sender.clone();
    let mut ended = place.end.clone();
    let overtaken = Notify::new();
    let session = Session {
        shared: &shared,
        node: &node,
        reports: &reports,
        wishes: &wishes,
        control,
        claim: &claim,
        overtaken: &overtaken,
    };
    let overtaken_by = async {
        overtaken.notified().await;
        Some(Status::aborted(format!("another session of node {node} has begun at another API server")))
    };
    let must_end = async {
        Some(match must_end(&mut ended).await {
            Ending::Replaced => Status::aborted(format!("another session of node {node} has begun")),
            Ending::NoStore => Status::unavailable("this API server cannot reach its store: try another one"),
        })
    };
    // Each is woken by itself: there are thousands of sessions, and a pod for one of them must not look at everything it waits for.
    // Dropping the losers is what ends them: a transaction under way happens or not, and the agent reports again in its next session.
    let mut parts: FuturesUnordered<BoxFuture<'_, Option<Status>>> = FuturesUnordered::new();
    parts.push(Box::pin(session.read(inbound)));
    parts.push(Box::pin(session.send(&mut place, pods, &out)));
    parts.push(Box::pin(session.store()));
    parts.push(Box::pin(session.grant()));
    parts.push(Box::pin(must_end));
    parts.push(Box::pin(overtaken_by));
    let end = parts.next().await.flatten();
    drop(parts);
    drop(place);
    tracing::info!(node, end = end.as_ref().map(Status::message), "session ended");
    if let Some(status) = end {
        // A peer that does not read its end is not waited for.
        let _ = out.try_send(Err(status));
    }
    // Nobody looks here for the node any more. Not when another session has begun meanwhile: the guard does not hold then.
    let gone = Write::Delete(claim.key.clone());
    if let Err(error) = shared.registry.storage.txn(vec![claim], vec![gone]).await {
        tracing::debug!(node, %error, "the session's end is not written");
    }
}

/// Why the session must end; pends while it need not.
async fn must_end(end: &mut watch::Receiver<Option<Ending>>) -> Ending {
    match end.wait_for(Option::is_some).await {
        Ok(why) => why.unwrap_or(Ending::Replaced),
        // The place is given to another one only after the reason was told.
        Err(_) => Ending::Replaced,
    }
}

struct Session<'a> {
    shared: &'a Shared,
    node: &'a str,
    reports: &'a Reports,
    wishes: &'a Wishes,
    control: mpsc::Sender<ServerMessage>,
    /// Holds until another session of the node begins anywhere: what an agent said before must not overwrite what it says there.
    claim: &'a Guard,
    /// Told when it does not hold any more.
    overtaken: &'a Notify,
}

impl Session<'_> {
    async fn read(&self, mut inbound: Streaming<AgentMessage>) -> Option<Status> {
        loop {
            let message = match tokio::time::timeout(self.shared.grace, inbound.message()).await {
                Ok(Ok(Some(message))) => message,
                Ok(Ok(None)) => return None,
                Ok(Err(status)) => {
                    tracing::debug!(node = self.node, %status, "the session's stream broke");
                    return None;
                }
                Err(_) => {
                    let seconds = self.shared.grace.as_secs_f64();
                    return Some(Status::deadline_exceeded(format!("node {} was silent for {seconds} s", self.node)));
                }
            };
            self.shared.sessions.touch(self.node);
            let taken = match message.message {
                Some(agent_message::Message::Heartbeat(Heartbeat { sequence })) => {
                    let echo =
                        ServerMessage { message: Some(server_message::Message::Heartbeat(Heartbeat { sequence })) };
                    // A stream so full that the echo does not fit shows the agent enough life.
                    let _ = self.control.try_send(echo);
                    Ok(())
                }
                Some(agent_message::Message::PodStatus(report)) => self.reports.pod(report),
                Some(agent_message::Message::NodeStatus(status)) => self.reports.node(status),
                Some(agent_message::Message::Event(event)) => {
                    match keys::object_key(Kind::Pod, &event.namespace, &event.pod) {
                        Ok(_) => self.shared.recorder.reported(event, self.node),
                        Err(error) => tracing::debug!(node = self.node, %error, "an event is refused"),
                    }
                    Ok(())
                }
                Some(agent_message::Message::Hello(_)) => {
                    Err(Status::invalid_argument("message: hello comes once, first"))
                }
                None => Ok(()),
            };
            if let Err(status) = taken {
                return Some(status);
            }
        }
    }

    async fn send(&self, place: &mut Place, mut pods: Subscription, out: &Out) -> Option<Status> {
        let mut routes = self.shared.routes.clone();
        routes.mark_changed();
        let mut first = true;
        let mut sources = Sources::new(Arc::clone(&self.shared.registry.cache));
        loop {
            // All arms are cancel safe. The snapshot comes before anything else.
            let messages = tokio::select! {
                biased;
                next = pods.next() => match next {
                    Ok(deliveries) => {
                        self.wishes.note(&deliveries);
                        match pod_messages(&mut sources, deliveries, std::mem::take(&mut first)) {
                            Ok(messages) => messages,
                            Err(error) => return Some(error.into()),
                        }
                    }
                    Err(cut) => return Some(ApiError::from(cut).into()),
                },
                changed = sources.changed(), if !first => match changed {
                    Ok(messages) => messages,
                    Err(cut) => return Some(ApiError::from(cut).into()),
                },
                Some(message) = place.control.recv(), if !first => vec![EncodedMessage::Plain(Box::new(message))],
                Ok(()) = routes.changed(), if !first => {
                    let table = Arc::clone(&routes.borrow_and_update());
                    let others = table.iter().filter(|route| route.node != self.node).cloned().collect();
                    let message = server_message::Message::Routes(Routes { routes: others });
                    vec![EncodedMessage::Plain(Box::new(ServerMessage { message: Some(message) }))]
                }
                () = out.closed() => return None,
            };
            for message in messages {
                if out.send(Ok(message)).await.is_err() {
                    return None;
                }
            }
        }
    }

    /// Writes what was reported, the newest of each pod. Runs until it is dropped.
    async fn store(&self) -> Option<Status> {
        self.persist(|| self.store_node(None)).await;
        loop {
            let (node, pods) = self.reports.take().await;
            if let Some(status) = node {
                self.persist(|| self.store_node(Some(&status))).await;
            }
            futures_util::stream::iter(pods).for_each_concurrent(WRITES, |report| self.store_pod(report)).await;
        }
    }

    /// Grants resizes that wait for room, the important ones first, whenever the node's ledger has changed. Runs until it is dropped.
    async fn grant(&self) -> Option<Status> {
        let registry = &self.shared.registry;
        let mut tried = (0, 0);
        loop {
            let (wishes, version) = self.wishes.wait().await;
            let ledger = registry.cache.ledgers(std::iter::once(self.node)).into_iter().flatten().next();
            let now = (ledger.map_or(0, |(_, revision)| revision), version);
            if now != tried {
                for key in wishes {
                    match registry.grant_resize(&key).await {
                        Ok(true) => self.wishes.forget(&key),
                        Ok(false) => {}
                        Err(error) => tracing::debug!(node = self.node, key, %error, "a resize waits on"),
                    }
                }
                tried = now;
            }
            tokio::time::sleep(GRANT_PAUSE).await;
        }
    }

    /// Repeats until the store has answered; other errors are final.
    async fn persist<F: Future<Output = Result<(), ApiError>>>(&self, write: impl Fn() -> F) -> Option<ApiError> {
        let mut backoff = Backoff::new(Duration::from_millis(50), Duration::from_secs(2));
        loop {
            match write().await {
                Ok(()) => return None,
                Err(
                    ApiError::Unavailable(_)
                    | ApiError::Stale { .. }
                    // A full store is made room in one day, and then the report must be there.
                    | ApiError::Store(
                        StoreError::Unavailable { .. } | StoreError::Uncertain { .. } | StoreError::Full { .. },
                    ),
                ) => tokio::time::sleep(backoff.next_wait()).await,
                Err(ApiError::Overtaken(_)) => {
                    self.overtaken.notify_one();
                    // The session ends, and this with it.
                    std::future::pending::<()>().await;
                }
                Err(error) => {
                    tracing::debug!(node = self.node, %error, "a report is refused");
                    return Some(error);
                }
            }
        }
    }

    async fn store_node(&self, reported: Option<&NodeStatus>) -> Result<(), ApiError> {
        let now = self.shared.registry.now();
        let written = self.shared.registry.modify_while(Kind::Node, self.node, Some(self.claim), |object| {
            let Some(old) = object.as_node() else { return Ok(Verdict::Keep) };
            let mut node = old.clone();
            let status = match reported {
                Some(reported) => alive(reported.clone(), Some(old.status()), now),
                // A session has begun: what the node last said of itself holds again, but it is heard of.
                None => {
                    let mut status = old.status().clone();
                    let silent = |condition: &minipod_proto::v1::NodeCondition| {
                        condition.r#type == "Ready" && condition.status == "Unknown"
                    };
                    if status.conditions.iter().any(silent) {
                        status.set_condition("Ready", "True", "AgentReady", "the node's agent is connected", now);
                    }
                    alive(status, Some(old.status()), now)
                }
            };
            if same_but_for_heartbeats(&status, old.status()) {
                return Ok(Verdict::Keep);
            }
            node.status = Some(status);
            follow_pressure(&mut node, now);
            Ok(Verdict::put(node))
        });
        written.await.map(drop)
    }

    async fn store_pod(&self, report: PodStatusReport) {
        let refused = match keys::object_key(Kind::Pod, &report.namespace, &report.name) {
            Ok(key) => self.persist(|| self.write_report(&key, &report)).await,
            Err(error) => Some(error),
        };
        let ack = PodStatusAck {
            uid: report.uid,
            sequence: report.sequence,
            error: refused.map(|error| error.to_string()).unwrap_or_default(),
        };
        // The stream's end is seen by `send`.
        let _ = self.control.send(ServerMessage { message: Some(server_message::Message::PodStatusAck(ack)) }).await;
    }

    async fn write_report(&self, key: &str, report: &PodStatusReport) -> Result<(), ApiError> {
        let registry = &self.shared.registry;
        if let Some(status) = &report.status {
            let written = registry.modify_while(Kind::Pod, key, Some(self.claim), |object| {
                let mut pod = self.own(object, report)?.clone();
                pod.status = Some(merge_status(&pod, status.clone()));
                let new = Object::from(pod);
                Ok(if new == *object { Verdict::Keep } else { Verdict::put(new) })
            });
            written.await?;
        }
        if !report.finished {
            return Ok(());
        }
        // Whether it is marked is asked of the store, not of a cache that may not know of the mark yet: the agent says it once.
        let removed = registry.modify_while(Kind::Pod, key, Some(self.claim), |object| {
            let pod = self.own(object, report)?;
            let free = pod.is_terminating() && object.meta().finalizers.is_empty();
            Ok(if free { Verdict::Remove } else { Verdict::Keep })
        });
        removed.await.map(drop)
    }

    /// The pod that the report is about, if it is this node's.
    fn own<'p>(&self, object: &'p Object, report: &PodStatusReport) -> Result<&'p minipod_proto::v1::Pod, ApiError> {
        let pod = object.as_pod().filter(|_| object.meta().uid == report.uid);
        let pod = pod.ok_or_else(|| {
            let (key, uid) = (object.key(), &object.meta().uid);
            ApiError::Precondition(format!("pod {key} has the uid {uid}, not {}: the one reported is gone", report.uid))
        })?;
        if pod.node_name() != Some(self.node) {
            let (key, node) = (object.key(), pod.node_name().unwrap_or("no node"));
            return Err(ApiError::Precondition(format!("pod {key} is bound to {node}, not to {}", self.node)));
        }
        Ok(pod)
    }
}

/// Pods, and before each what it refers to; last what is needed no more.
fn pod_messages(
    sources: &mut Sources,
    deliveries: Vec<crate::cache::Delivery>,
    snapshot: bool,
) -> Result<Vec<EncodedMessage>, ApiError> {
    let mut messages = Vec::new();
    for delivery in &deliveries {
        let Some(entry) = &delivery.entry else { continue };
        if delivery.kind == Type::Deleted {
            sources.pod_gone(&entry.object.meta().uid);
        } else if let Some(pod) = entry.object.as_pod() {
            messages.extend(sources.before(pod)?);
        }
    }
    if snapshot {
        messages.push(EncodedMessage::Snapshot(deliveries.into_iter().filter_map(|one| one.entry).collect()));
    } else {
        messages.extend(deliveries.into_iter().filter_map(pod_message));
    }
    messages.extend(sources.unneeded());
    Ok(messages)
}

fn pod_message(delivery: crate::cache::Delivery) -> Option<EncodedMessage> {
    let entry = delivery.entry?;
    if delivery.kind != Type::Deleted {
        return Some(EncodedMessage::Upsert(entry));
    }
    let meta = entry.object.meta();
    let gone = PodGone { namespace: meta.namespace.clone(), name: meta.name.clone(), uid: meta.uid.clone() };
    Some(EncodedMessage::Plain(Box::new(ServerMessage { message: Some(server_message::Message::PodGone(gone)) })))
}

fn same_but_for_heartbeats(new: &NodeStatus, old: &NodeStatus) -> bool {
    let quiet = |status: &NodeStatus| {
        let mut status = status.clone();
        status.conditions.iter_mut().for_each(|condition| condition.last_heartbeat_time = None);
        status
    };
    quiet(new) == quiet(old)
}

/// The node's pods whose resize waits for room; changes that come from the watch itself count as news, so that none is missed.
#[derive(Default)]
struct Wishes {
    /// Priority by key, and a number that grows with every change.
    waiting: Mutex<(HashMap<String, i32>, u64)>,
    more: Notify,
}

impl Wishes {
    fn note(&self, deliveries: &[crate::cache::Delivery]) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        for delivery in deliveries {
            let Some(pod) = delivery.entry.as_ref().and_then(|entry| entry.object.as_pod()) else { continue };
            if delivery.kind != Type::Deleted && !pod.is_terminal() && minipod_proto::resize::is_deferred(pod) {
                waiting.0.insert(pod.key(), pod.spec().priority.unwrap_or(0));
                waiting.1 += 1;
                self.more.notify_one();
            } else if !waiting.0.is_empty() {
                waiting.0.remove(&pod.key());
            }
        }
    }

    fn forget(&self, key: &str) {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).0.remove(key);
    }

    /// All of them, the important ones first, as soon as there are any.
    async fn wait(&self) -> (Vec<String>, u64) {
        loop {
            {
                let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if !waiting.0.is_empty() {
                    let mut all: Vec<(i32, &String)> =
                        waiting.0.iter().map(|(key, priority)| (priority.saturating_neg(), key)).collect();
                    all.sort();
                    return (all.into_iter().map(|(_, key)| key.clone()).collect(), waiting.1);
                }
            }
            self.more.notified().await;
        }
    }
}

/// Reports that are not stored yet: the newest of each pod, in the order in which pods were first heard of.
#[derive(Default)]
struct Reports {
    waiting: Mutex<Waiting>,
    more: Notify,
}

#[derive(Default)]
struct Waiting {
    node: Option<NodeStatus>,
    order: VecDeque<String>,
    pods: HashMap<String, PodStatusReport>,
}

impl Reports {
    fn node(&self, status: NodeStatus) -> Result<(), Status> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).node = Some(status);
        self.more.notify_one();
        Ok(())
    }

    fn pod(&self, mut report: PodStatusReport) -> Result<(), Status> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.pods.len() >= REPORTS && !waiting.pods.contains_key(&report.uid) {
            return Err(Status::resource_exhausted(format!("{REPORTS} pods have reports that are not stored yet")));
        }
        match waiting.pods.get(&report.uid) {
            // What an overtaken report said for the first and only time must not be lost with it.
            Some(older) => {
                report.finished |= older.finished;
                if report.status.is_none() {
                    report.status.clone_from(&older.status);
                }
            }
            None => waiting.order.push_back(report.uid.clone()),
        }
        waiting.pods.insert(report.uid.clone(), report);
        self.more.notify_one();
        Ok(())
    }

    async fn take(&self) -> (Option<NodeStatus>, Vec<PodStatusReport>) {
        loop {
            {
                let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
                if waiting.node.is_some() || !waiting.order.is_empty() {
                    let order = std::mem::take(&mut waiting.order);
                    let mut pods = std::mem::take(&mut waiting.pods);
                    return (waiting.node.take(), order.into_iter().filter_map(|uid| pods.remove(&uid)).collect());
                }
            }
            self.more.notified().await;
        }
    }
}
