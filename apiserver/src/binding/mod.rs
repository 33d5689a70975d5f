//! Binding: the arbiter between any number of schedulers.
//!
//! [`decide`] is pure: what may be done with these pods on these ledgers, under the rules between pods that concern them
//! ([`crate::rules`]). [`execute`] reads, asks it, and writes pods, ledgers and turns in one transaction; what has changed meanwhile is decided
//! anew from what the store holds, by fit, not by "somebody wrote". [`sight`] says what rules are held against.

mod batches;
pub mod decide;
mod execute;
mod hold;
mod sight;

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

use minipod_daemon::metrics::{Counter, Registry as Metrics};
use minipod_proto::v1::{
    BindBatchRequest, BindResult,
    bind_batch_request::{Item, Mode},
    bind_result::Code,
};

use crate::{
    error::ApiError,
    events::Recorder,
    keys,
    registry::Registry,
    rules::{announced::TURNS, tally::Tallies},
};

/// Items in one call: some transactions' worth, and an answer well under a message's limit.
const ITEMS_LIMIT: usize = 4_096;

/// Binds pods to nodes.
pub struct Binder {
    /// What it writes into turns that are to be held for it.
    id: String,
    registry: Arc<Registry>,
    recorder: Recorder,
    /// One lock a turn, so that the calls of one server do not make each other's transactions fail.
    turn_locks: [tokio::sync::Mutex<()>; TURNS],
    /// Revisions at which this server took the turns last: its cache must show them before it takes them again.
    taken: Mutex<[i64; TURNS]>,
    tallies: Mutex<Tallies>,
    /// Whether rules of pods that were there before this server are announced.
    caught_up: tokio::sync::OnceCell<()>,
    metrics: Arc<Metrics>,
    retries: Arc<Counter>,
    announcements: Arc<Counter>,
    holds: Arc<Counter>,
}

impl Binder {
    /// A binder that writes through a registry's store.
    pub fn new(registry: Arc<Registry>, recorder: Recorder, metrics: Arc<Metrics>) -> Binder {
        let help = "Binding transactions decided again because something had changed.";
        let retries = metrics.counter("minipod_bind_retries_total", &[], help);
        let help = "Announcements of rules between pods that were written.";
        let announcements = metrics.counter("minipod_bind_announcements_total", &[], help);
        let help = "Times that turns were held because a batch had lost them again and again.";
        let holds = metrics.counter("minipod_bind_holds_total", &[], help);
        Binder {
            id: uuid::Uuid::new_v4().to_string(),
            registry,
            recorder,
            turn_locks: Default::default(),
            taken: Mutex::default(),
            tallies: Mutex::default(),
            caught_up: tokio::sync::OnceCell::new(),
            metrics,
            retries,
            announcements,
            holds,
        }
    }

    /// Binds a batch; one result per item, in order.
    ///
    /// # Errors
    /// When the request itself is wrong, or the store cannot be reached and nothing was done.
    pub async fn bind(&self, request: BindBatchRequest) -> Result<Vec<BindResult>, ApiError> {
        let keys = check(&request)?;
        let all = request.mode == Mode::All as i32;
        let items: Vec<Arc<Item>> = request.items.into_iter().map(Arc::new).collect();
        let results = self.execute(&items, keys, all).await?;
        for (item, result) in items.iter().zip(&results) {
            if result.code == Code::Bound as i32 {
                self.recorder.scheduled(item, &request.scheduler);
            }
        }
        for code in results.iter().map(|result| result.code).collect::<BTreeSet<i32>>() {
            let count = results.iter().filter(|result| result.code == code).count();
            let name = Code::try_from(code).map_or("UNKNOWN", |code| code.as_str_name());
            self.metrics
                .counter("minipod_binds_total", &[("code", name)], "Items of BindBatch by result.")
                .add(count as u64);
        }
        Ok(results)
    }
}

/// Checks a request; the keys of its pods.
fn check(request: &BindBatchRequest) -> Result<Vec<String>, ApiError> {
    if request.items.len() > ITEMS_LIMIT {
        return Err(ApiError::TooLarge(format!("items: {}, but one call may have {ITEMS_LIMIT}", request.items.len())));
    }
    if Mode::try_from(request.mode).is_err() {
        return Err(ApiError::Invalid(format!("mode: {} is neither EACH (0) nor ALL (1)", request.mode)));
    }
    let (mut problems, mut seen, mut keys) = (Vec::new(), BTreeSet::new(), Vec::with_capacity(request.items.len()));
    for (index, item) in request.items.iter().enumerate() {
        let key = keys::object_key(minipod_proto::Kind::Pod, &item.namespace, &item.pod);
        match key.and_then(|key| keys::check_name("node", &item.node).map(|()| key)) {
            Ok(key) if seen.contains(&key) => problems.push(format!("items[{index}]: pod {key} is in the batch twice")),
            Ok(_) if item.uid.is_empty() => {
                problems.push(format!("items[{index}].uid: empty; say which pod of that name is meant"))
            }
            Ok(key) => {
                seen.insert(key.clone());
                keys.push(key);
            }
            Err(error) => problems.push(format!("items[{index}].{error}")),
        }
    }
    if problems.is_empty() { Ok(keys) } else { Err(ApiError::Invalid(problems.join("\n"))) }
}
