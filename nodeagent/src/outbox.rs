//! What the agent has to tell the API server and could not be sure of yet.
//!
//! Statuses are levels: of each pod only the newest waits here, and it waits until it is acknowledged. So the size is bounded
//! by the pods of the node, whatever the length of an outage. Events are edges: they wait in a short queue whose oldest
//! entries are dropped, and counted, when the API server is away for long. Nobody waits for them as for a status, so they go a moment
//! later, together: a pod that starts has the processor, the API server and its disk to itself.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use minipod_proto::v1::{EventReport, NodeStatus, PodStatusAck, PodStatusReport, agent_message};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::want::Uid;

/// Events that wait at most: a few restarts of each of a full node's 110 pods.
pub const MAX_EVENTS: usize = 512;
/// How long the first event that waits is held back, so that others can join it.
const EVENTS_PAUSE: Duration = Duration::from_millis(100);
/// So many events that wait are sent at once.
const MANY_EVENTS: usize = 64;

/// Shared by all pod workers (who put in) and the session (which takes out).
#[derive(Debug, Default)]
pub struct Outbox {
    inner: Mutex<Inner>,
    /// Wakes the session; holds one permit, so no wake-up between two waits is lost.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    statuses: BTreeMap<Uid, Slot>,
    /// Counts over all pods, which also counts up per pod.
    sequence: u64,
    events: VecDeque<EventReport>,
    /// When they may go.
    events_due: Option<Instant>,
    dropped_events: u64,
    node: Option<NodeStatus>,
}

#[derive(Debug)]
struct Slot {
    report: PodStatusReport,
    sent: bool,
}

/// A pod's status was stored (or refused) by the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settled {
    /// The pod.
    pub uid: Uid,
    /// It was the report that nothing of the pod is left.
    pub finished: bool,
    /// Why it was refused, if it was.
    pub error: String,
}

impl Outbox {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // A panic aborts the process, so the lock is never poisoned.
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Replaces what is to be told about the pod.
    pub fn report(&self, uid: &Uid, mut report: PodStatusReport) {
        let mut inner = self.lock();
        inner.sequence += 1;
        report.sequence = inner.sequence;
        inner.statuses.insert(uid.clone(), Slot { report, sent: false });
        drop(inner);
        self.changed.notify_one();
    }

    /// Adds an event.
    pub fn event(&self, event: EventReport) {
        let mut inner = self.lock();
        if inner.events.len() >= MAX_EVENTS {
            inner.events.pop_front();
            inner.dropped_events += 1;
        }
        inner.events.push_back(event);
        if inner.events.len() >= MANY_EVENTS {
            inner.events_due = Some(Instant::now());
        }
        inner.events_due.get_or_insert_with(|| Instant::now() + EVENTS_PAUSE);
        drop(inner);
        self.changed.notify_one();
    }

    /// Replaces the node's status.
    pub fn node_status(&self, status: NodeStatus) {
        self.lock().node = Some(status);
        self.changed.notify_one();
    }

    /// Waits until there may be something to send. Cancel safe.
    pub async fn changed(&self) {
        let events_due = self.lock().events_due;
        let due = async {
            match events_due {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.changed.notified() => {}
            () = due => {}
        }
    }

    /// A new session: everything that was not acknowledged is sent again.
    pub fn rewind(&self) {
        for slot in self.lock().statuses.values_mut() {
            slot.sent = false;
        }
        self.changed.notify_one();
    }

    /// The next message to send. Events and the node's status are gone from here by that; a status stays until it is
    /// acknowledged.
    pub fn next(&self) -> Option<agent_message::Message> {
        let mut inner = self.lock();
        if let Some(slot) =
            inner.statuses.values_mut().filter(|slot| !slot.sent).min_by_key(|slot| slot.report.sequence)
        {
            slot.sent = true;
            return Some(agent_message::Message::PodStatus(slot.report.clone()));
        }
        if let Some(node) = inner.node.take() {
            return Some(agent_message::Message::NodeStatus(node));
        }
        if inner.dropped_events > 0 {
            tracing::warn!(dropped = inner.dropped_events, "events were dropped while the API server was away");
            inner.dropped_events = 0;
        }
        if inner.events_due.is_none_or(|at| at > Instant::now()) {
            return None;
        }
        let event = inner.events.pop_front();
        if inner.events.is_empty() {
            inner.events_due = None;
        }
        event.map(agent_message::Message::Event)
    }

    /// Takes an acknowledgement; `None` when it is about an older report.
    pub fn acknowledge(&self, ack: &PodStatusAck) -> Option<Settled> {
        let uid = Uid::parse(&ack.uid)?;
        let mut inner = self.lock();
        let slot = inner.statuses.get(&uid).filter(|slot| slot.report.sequence <= ack.sequence)?;
        let finished = slot.report.finished;
        inner.statuses.remove(&uid);
        Some(Settled { uid, finished, error: ack.error.clone() })
    }

    /// Forgets what was to be told about the pod.
    pub fn forget(&self, uid: &Uid) {
        self.lock().statuses.remove(uid);
    }

    /// Statuses that wait for an acknowledgement.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.lock().statuses.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(text: &str) -> Uid {
        Uid::parse(text).expect("uid")
    }

    fn report(uid: &str, phase: &str) -> PodStatusReport {
        let status = minipod_proto::v1::PodStatus { phase: phase.into(), ..Default::default() };
        PodStatusReport { uid: uid.into(), status: Some(status), ..PodStatusReport::default() }
    }

    fn drain(outbox: &Outbox) -> Vec<String> {
        std::iter::from_fn(|| outbox.next())
            .map(|message| match message {
                agent_message::Message::PodStatus(report) => {
                    format!("{} {} {}", report.uid, report.status.expect("status").phase, report.sequence)
                }
                agent_message::Message::Event(event) => event.reason,
                other => format!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn the_newest_report_replaces_and_is_resent_until_acknowledged() {
        let outbox = Outbox::default();
        outbox.report(&uid("a"), report("a", "Pending"));
        outbox.report(&uid("b"), report("b", "Pending"));
        outbox.report(&uid("a"), report("a", "Running"));
        assert_eq!(drain(&outbox), ["b Pending 2", "a Running 3"]);
        assert_eq!(drain(&outbox), [""; 0]);
        outbox.rewind();
        assert_eq!(drain(&outbox), ["b Pending 2", "a Running 3"]);
        let ack = |uid: &str, sequence| PodStatusAck { uid: uid.into(), sequence, error: String::new() };
        assert_eq!(outbox.acknowledge(&ack("a", 1)), None, "an older report's");
        assert!(outbox.acknowledge(&ack("a", 3)).is_some());
        outbox.rewind();
        assert_eq!(drain(&outbox), ["b Pending 2"]);
        assert_eq!(outbox.waiting(), 1);
    }

    #[test]
    fn events_are_bounded_and_the_oldest_go() {
        let outbox = Outbox::default();
        for index in 0..MAX_EVENTS + 3 {
            outbox.event(EventReport { reason: index.to_string(), ..EventReport::default() });
        }
        let left = drain(&outbox);
        assert_eq!((left.len(), left[0].as_str()), (MAX_EVENTS, "3"));
    }

    #[tokio::test]
    async fn events_go_together_behind_the_statuses() {
        let outbox = Outbox::default();
        let event = |reason: &str| outbox.event(EventReport { reason: reason.into(), ..EventReport::default() });
        let put_in = Instant::now();
        event("Created");
        assert_eq!(drain(&outbox), [""; 0]);
        event("Started");
        outbox.report(&uid("a"), report("a", "Running"));
        assert_eq!(drain(&outbox), ["a Running 1"]);
        let mut sent = Vec::new();
        while sent.is_empty() {
            outbox.changed().await;
            sent = drain(&outbox);
        }
        assert_eq!(sent, ["Created", "Started"]);
        assert!(put_in.elapsed() >= EVENTS_PAUSE);
    }
}
