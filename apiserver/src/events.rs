//! Events: what is worth telling a user about a pod. Repeated ones are counted in one object; old ones are swept.
//!
//! Events are best effort. They wait in a bounded queue for one task that writes them at a bounded rate; what does not fit is
//! counted and dropped, so that they never slow a binding or a status report.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use minipod_daemon::{
    metrics::{Counter, Registry as Metrics},
    shutdown::Shutdown,
};
use minipod_proto::{
    Kind,
    v1::{
        CreateRequest, DeleteRequest, Event, EventReport, EventSource, Object, ObjectReference,
        bind_batch_request::Item, object,
    },
};
use tokio::sync::mpsc;

use crate::{
    cache::Filter,
    error::ApiError,
    registry::{Registry, Verdict},
};

/// Events that wait to be written: a burst of a full node's worth from many nodes.
const QUEUE: usize = 1_024;
/// Events written at once, and then per second: a small part of what the store takes.
const BURST: f64 = 200.0;
const PER_SECOND: f64 = 50.0;
/// Events are kept this long after they were last seen (Kubernetes: `--event-ttl`).
const KEEP: Duration = Duration::from_secs(3_600);
const SWEEP: Duration = Duration::from_secs(60);
/// Longer texts are cut, in characters.
const MESSAGE_LIMIT: usize = 1_024;

/// One thing that happened to a pod.
#[derive(Debug, Clone)]
struct Happening {
    report: EventReport,
    component: String,
    host: String,
}

/// Takes events; cheap to clone.
#[derive(Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Happening>,
    dropped: Arc<Counter>,
}

impl Recorder {
    /// A recorder and the queue that [`write()`] empties.
    pub fn new(metrics: &Metrics) -> (Recorder, Queue) {
        let (queue, receiver) = mpsc::channel(QUEUE);
        let dropped =
            metrics.counter("minipod_events_dropped_total", &[], "Events not written because there were too many.");
        (Recorder { queue, dropped: Arc::clone(&dropped) }, Queue { receiver, dropped })
    }

    /// What an agent tells of a pod.
    pub fn reported(&self, report: EventReport, node: &str) {
        self.record(Happening { report, component: "nodeagent".into(), host: node.to_owned() });
    }

    /// A pod was bound.
    pub fn scheduled(&self, item: &Item, scheduler: &str) {
        let message = format!("bound {}/{} to {}", item.namespace, item.pod, item.node);
        self.of_scheduler(
            item.namespace.clone(),
            item.pod.clone(),
            item.uid.clone(),
            scheduler,
            ("Normal", "Scheduled", message),
        );
    }

    /// A pod could not be bound.
    pub fn unschedulable(&self, namespace: &str, pod: &str, uid: &str, scheduler: &str, message: &str) {
        let what = ("Warning", "FailedScheduling", message.to_owned());
        self.of_scheduler(namespace.into(), pod.into(), uid.into(), scheduler, what);
    }

    /// A pod was ended so that a more important one gets its place.
    pub fn preempted(&self, namespace: &str, pod: &str, uid: &str, scheduler: &str, message: &str) {
        let what = ("Normal", "Preempted", message.to_owned());
        self.of_scheduler(namespace.into(), pod.into(), uid.into(), scheduler, what);
    }

    fn of_scheduler(&self, namespace: String, pod: String, uid: String, scheduler: &str, what: (&str, &str, String)) {
        let (kind, reason, message) = what;
        let report = EventReport {
            namespace,
            pod,
            uid,
            r#type: kind.into(),
            reason: reason.into(),
            message,
            ..EventReport::default()
        };
        let component = if scheduler.is_empty() { "scheduler" } else { scheduler };
        self.record(Happening { report, component: component.into(), host: String::new() });
    }

    fn record(&self, happening: Happening) {
        if self.queue.try_send(happening).is_err() {
            self.dropped.increment();
        }
    }
}

/// The waiting events.
pub struct Queue {
    receiver: mpsc::Receiver<Happening>,
    dropped: Arc<Counter>,
}

/// Writes events until the shutdown.
pub async fn write(registry: Arc<Registry>, mut queue: Queue, shutdown: Shutdown) {
    let mut tokens = Tokens { level: BURST, at: Instant::now() };
    let mut sweep = tokio::time::interval(SWEEP);
    loop {
        // All arms are cancel safe: recv and tick lose nothing, and the shutdown stays asked for.
        tokio::select! {
            happening = queue.receiver.recv() => {
                let Some(happening) = happening else { return };
                if !tokens.take(Instant::now()) {
                    queue.dropped.increment();
                } else if let Err(error) = store(&registry, &happening).await {
                    tracing::debug!(%error, "an event is lost");
                }
            }
            _ = sweep.tick() => {
                if let Err(error) = sweep_old(&registry).await {
                    tracing::debug!(%error, "old events stay for now");
                }
            }
            () = shutdown.asked() => return,
        }
    }
}

/// A bucket that fills at a steady rate.
struct Tokens {
    level: f64,
    at: Instant,
}

impl Tokens {
    fn take(&mut self, now: Instant) -> bool {
        self.level = (self.level + now.saturating_duration_since(self.at).as_secs_f64() * PER_SECOND).min(BURST);
        self.at = now;
        let there = self.level >= 1.0;
        if there {
            self.level -= 1.0;
        }
        there
    }
}

async fn store(registry: &Registry, happening: &Happening) -> Result<(), ApiError> {
    let report = &happening.report;
    let now = registry.now();
    let name = name_of(happening);
    let counted = registry
        .modify(Kind::Event, &format!("{}/{name}", report.namespace), |old| {
            let mut object = old.clone();
            if let Some(object::Kind::Event(event)) = &mut object.kind {
                event.count = event.count.saturating_add(1);
                event.last_timestamp = Some(now);
            }
            Ok(Verdict::put(object))
        })
        .await;
    match counted {
        Err(ApiError::NotFound { .. }) => {}
        done => return done.map(drop),
    }
    let mut event = Event {
        involved_object: Some(ObjectReference {
            kind: "Pod".into(),
            namespace: report.namespace.clone(),
            name: report.pod.clone(),
            uid: report.uid.clone(),
            api_version: "v1".into(),
            field_path: report.field_path.clone(),
            ..ObjectReference::default()
        }),
        reason: report.reason.clone(),
        message: report.message.chars().take(MESSAGE_LIMIT).collect(),
        source: Some(EventSource { component: happening.component.clone(), host: happening.host.clone() }),
        first_timestamp: Some(now),
        last_timestamp: Some(now),
        count: 1,
        r#type: if report.r#type == "Warning" { "Warning".into() } else { "Normal".into() },
        reporting_component: happening.component.clone(),
        reporting_instance: happening.host.clone(),
        ..Event::default()
    };
    let meta = event.metadata.get_or_insert_default();
    meta.namespace.clone_from(&report.namespace);
    meta.name = name;
    registry.create(CreateRequest { object: Some(Object::from(event)), dry_run: false }).await.map(drop)
}

/// The same happening has the same name, so that it is counted.
fn name_of(happening: &Happening) -> String {
    let report = &happening.report;
    let parts =
        [&report.uid, &report.reason, &report.message, &report.field_path, &happening.component, &happening.host];
    // FNV-1a: stable over restarts and builds, which the standard hasher does not promise. A collision only merges two counts.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in parts.into_iter().flat_map(|part| part.bytes().chain([0])) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let stem: String = report.pod.chars().take(200).collect();
    format!("{}.{hash:016x}", stem.trim_end_matches(['.', '-']))
}

async fn sweep_old(registry: &Registry) -> Result<(), ApiError> {
    let limit = i64::try_from(KEEP.as_millis()).unwrap_or(i64::MAX);
    let oldest = registry.now().unix_ms().saturating_sub(limit);
    let (entries, _) = registry.cache.list(Kind::Event, &Filter::everything(Kind::Event)?);
    let mut seen: HashMap<&str, i64> = HashMap::new();
    for entry in &entries {
        if let Some(object::Kind::Event(event)) = &entry.object.kind {
            let at = event.last_timestamp.or(event.first_timestamp).or(entry.object.meta().creation_timestamp);
            seen.insert(&entry.key, at.map_or(0, |at| at.unix_ms()));
        }
    }
    for (key, _) in seen.into_iter().filter(|(_, at)| *at < oldest) {
        let (namespace, name) = key.split_once('/').unwrap_or(("", key));
        let request = DeleteRequest {
            kind: Kind::Event.name().into(),
            namespace: namespace.into(),
            name: name.into(),
            ..DeleteRequest::default()
        };
        match registry.delete(request).await {
            Ok(_) | Err(ApiError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
