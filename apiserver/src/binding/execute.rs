//! Carries bindings out: reads what is not known, asks [`super::decide`], writes, and asks again when it was beaten.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt, stream};
use minipod_daemon::backoff::Backoff;
use minipod_proto::{
    Kind,
    v1::{BindResult, Object, Pod, bind_batch_request::Item, bind_result::Code},
};
use prost::Message;

use super::{
    Binder,
    batches::{self, Load, Room},
    decide::{self, Plan, Wants},
    hold::Struggle,
    sight::Floor,
};
use crate::{
    cache::{Entry, Noted, Ready},
    error::ApiError,
    keys,
    ledger::Ledger,
    registry::decode_ledger,
    rules::announced::{self, Turns},
    storage::{Guard, Outcome, Part, StoreError, Write},
};

/// How often a transaction is decided again before its items are given back to their scheduler.
pub(super) const ATTEMPTS: u32 = 16;

/// Transactions of one call that are under way at once: enough to keep the store's disk busy while answers travel.
const IN_FLIGHT: usize = 4;

/// Bytes of pods and ledgers in one transaction; half of what etcd takes in a request, as in [`crate::registry`].
const BATCH_BYTES: usize = 768 * 1024;

/// What is written of a pod beside what there is of it: its node and condition, and a share of the node's ledger.
const BINDING_BYTES: usize = 512;

/// An item that may still be bound.
pub(super) struct Candidate {
    index: usize,
    item: Arc<Item>,
    pub(super) pod: Arc<Entry>,
    pub(super) wants: Wants,
}

impl Candidate {
    /// Where it is to go.
    pub(super) fn node(&self) -> &str {
        &self.item.node
    }
}

/// Batches that go one after the other, because what one of them does matters to the next, and the turns that they take.
struct Lane {
    batches: Vec<Vec<Candidate>>,
    turns: Turns,
}

type Results = Vec<(usize, BindResult)>;

/// Ledgers of a transaction's nodes as they are known, with their revisions.
type Known = BTreeMap<String, (Option<Arc<Ledger>>, i64)>;

impl Binder {
    pub(super) async fn execute(
        &self,
        items: &[Arc<Item>],
        keys: Vec<String>,
        all: bool,
    ) -> Result<Vec<BindResult>, ApiError> {
        let (candidates, mut done) = self.candidates(items, &keys).await?;
        let lanes = if all { vec![self.one_lane(items, candidates)?] } else { self.lanes(candidates) };
        if all && !done.is_empty() {
            let rest = lanes.iter().flat_map(|lane| lane.batches.iter().flatten());
            done.extend(rest.map(|candidate| (candidate.index, decide::gang())));
        } else {
            // Unordered: results carry their positions.
            let lanes = lanes.into_iter();
            let mut lanes = stream::iter(lanes).map(|lane| self.bind_lane(lane, all)).buffer_unordered(IN_FLIGHT);
            while let Some(results) = lanes.next().await {
                done.extend(results);
            }
        }
        let mut results = vec![BindResult::default(); items.len()];
        for (index, result) in done {
            if let Some(slot) = results.get_mut(index) {
                *slot = result;
            }
        }
        Ok(results)
    }

    /// Sorts out what cannot be bound whatever the nodes say. A refusal that rests on the cache is confirmed by the store, unless
    /// nothing could ever undo it.
    async fn candidates(&self, items: &[Arc<Item>], keys: &[String]) -> Result<(Vec<Candidate>, Results), ApiError> {
        let cached = self.registry.cache.get_many(Kind::Pod, keys.iter().map(String::as_str));
        let (mut candidates, mut done, mut unsure) = (Vec::with_capacity(items.len()), Results::new(), Vec::new());
        for (index, ((item, key), cached)) in items.iter().zip(keys).zip(cached).enumerate() {
            match (decide::judge_pod(item, cached.as_deref()), cached) {
                (Ok(wants), Some(pod)) => candidates.push(Candidate { index, item: Arc::clone(item), pod, wants }),
                (Err(result), _) if decide::is_for_ever(&result) => done.push((index, *result)),
                (_, cached) => unsure.push((index, item, key, cached)),
            }
        }
        let reads = unsure.iter().map(|(_, _, key, _)| keys::object(Kind::Pod, key)).collect();
        let reads = self.registry.storage.get_many(reads).await?;
        for ((index, item, key, cached), read) in unsure.into_iter().zip(reads) {
            let read = read.map(|read| Entry::decode(Kind::Pod, key, &read.value, read.revision)).transpose()?;
            let fresh = read.map(|read| Arc::new(same_spec(read, cached.as_deref())));
            match (decide::judge_pod(item, fresh.as_deref()), fresh) {
                (Ok(wants), Some(pod)) => candidates.push(Candidate { index, item: Arc::clone(item), pod, wants }),
                (Err(result), _) => done.push((index, *result)),
                (Ok(_), None) => {}
            }
        }
        Ok((candidates, done))
    }

    /// What may be written side by side, and what in turn: pods that rules speak of stay in the order in which they were proposed, because
    /// each was decided on with those before it in their places.
    fn lanes(&self, candidates: Vec<Candidate>) -> Vec<Lane> {
        let ground = self.registry.cache.ground();
        let limit = self.registry.storage.max_ops();
        let concern = |candidate: &Candidate| self.concern(&ground, candidate);
        let (mut plain, mut ruled, mut turns) = (Vec::new(), Vec::new(), 0);
        for candidate in candidates {
            let taken = concern(&candidate);
            turns |= taken;
            if taken == 0 { plain.push(candidate) } else { ruled.push(candidate) }
        }
        // One operation is for the announcements, which every binding compares.
        let room = |others: usize| Room { keys: limit.saturating_sub(others), bytes: BATCH_BYTES };
        let plain = batches::by_node(plain, load, room(1)).into_iter();
        let mut lanes: Vec<Lane> = plain.map(|batch| Lane { batches: vec![batch], turns: 0 }).collect();
        if !ruled.is_empty() {
            let batches = batches::in_order(ruled, load, room(1 + announced::TURNS));
            // Begun first: it takes longest.
            lanes.insert(0, Lane { batches, turns });
        }
        lanes
    }

    /// An ALL batch as the one transaction that it is. That it is too large for one is told whatever else is wrong with it.
    fn one_lane(&self, items: &[Arc<Item>], candidates: Vec<Candidate>) -> Result<Lane, ApiError> {
        let ground = self.registry.cache.ground();
        let limit = self.registry.storage.max_ops();
        let turns = candidates.iter().fold(0, |turns, candidate| turns | self.concern(&ground, candidate));
        let nodes: BTreeSet<&str> = items.iter().map(|item| item.node.as_str()).collect();
        let (pods, nodes, rules) = (items.len(), nodes.len(), 1 + turns.count_ones() as usize);
        if pods + nodes + rules > limit {
            return Err(ApiError::Invalid(format!(
                "items: an ALL batch is one transaction; {pods} pods on {nodes} nodes and {rules} keys for rules between pods are \
                 {} keys, but the store takes {limit}",
                pods + nodes + rules
            )));
        }
        Ok(Lane { batches: vec![candidates], turns })
    }

    async fn bind_lane(&self, lane: Lane, all: bool) -> Results {
        let mut done = Results::new();
        // Turns before nodes, both in order, so that two lanes cannot wait for each other. Like the nodes' locks they only spare this
        // server's calls from making each other's transactions fail.
        let mut held = Vec::new();
        for turn in announced::numbers(lane.turns) {
            if let Some(lock) = self.turn_locks.get(turn) {
                held.push(lock.lock().await);
            }
        }
        for batch in lane.batches {
            done.extend(self.bind_batch(batch, all).await);
        }
        done
    }

    /// One transaction's worth of items, until all of them are bound or refused.
    async fn bind_batch(&self, batch: Vec<Candidate>, all: bool) -> Results {
        let mut struggle = Struggle::default();
        let done = self.struggle(batch, &mut struggle, all).await;
        self.release(struggle).await;
        done
    }

    async fn struggle(&self, mut batch: Vec<Candidate>, struggle: &mut Struggle, all: bool) -> Results {
        let nodes: BTreeSet<String> = batch.iter().map(|candidate| candidate.item.node.clone()).collect();
        // In the order of names, so that two batches cannot wait for each other.
        let mut writers = Vec::with_capacity(nodes.len());
        for node in &nodes {
            writers.push(self.registry.writers.take(node).await);
        }
        let mut known = self.known(&nodes);
        let (mut floor, mut done) = (Floor::default(), Results::new());
        let mut backoff = Backoff::new(Duration::from_millis(2), Duration::from_millis(100));
        let mut failure = decide::result(Code::Conflict, format!("the store was contended {ATTEMPTS} times"));
        for attempt in 0..ATTEMPTS {
            if batch.is_empty() {
                return done;
            }
            match self.attempt(&mut batch, &mut known, (&mut floor, struggle), &mut done, all).await {
                Ok(()) => {}
                // The guards make it safe to send again: what has happened is not done twice but found.
                Err(error @ StoreError::Uncertain { .. }) if attempt < 3 => {
                    failure = decide::result(Code::UnknownOutcome, error.to_string());
                }
                Err(error @ StoreError::Unavailable { .. }) if attempt < 3 => {
                    if failure.code != Code::UnknownOutcome as i32 {
                        failure = decide::result(Code::Conflict, format!("nothing was done: {error}"));
                    }
                }
                Err(error) => {
                    let uncertain =
                        matches!(error, StoreError::Uncertain { .. }) || failure.code == Code::UnknownOutcome as i32;
                    let code = if uncertain { Code::UnknownOutcome } else { Code::Conflict };
                    failure = decide::result(code, error.to_string());
                    break;
                }
            }
            if attempt > 0 && !batch.is_empty() {
                self.retries.increment();
                tokio::time::sleep(backoff.next_wait()).await;
            }
        }
        done.extend(batch.iter().map(|candidate| (candidate.index, failure.clone())));
        done
    }

    /// The newest ledgers that are known here.
    fn known(&self, nodes: &BTreeSet<String>) -> Known {
        let cached = self.registry.cache.ledgers(nodes.iter().map(String::as_str));
        let newest = nodes.iter().zip(cached).map(|(node, cached)| {
            let newest = self.registry.writers.newest(node, cached);
            (node.clone(), newest.map_or((None, 0), |(ledger, revision)| (Some(ledger), revision)))
        });
        newest.collect()
    }

    /// Plans on what is known and writes it. What is settled moves to `done`, what is left stays in `batch` with newer knowledge.
    async fn attempt(
        &self,
        batch: &mut Vec<Candidate>,
        known: &mut Known,
        (floor, struggle): (&mut Floor, &mut Struggle),
        done: &mut Results,
        all: bool,
    ) -> Result<(), StoreError> {
        let mut sight = self.look(batch, floor.seen).await?;
        if sight.scene.is_some() {
            let newer = self.newer(batch);
            if !newer.is_empty() {
                self.rejudge(batch, newer, done, all);
                return Ok(());
            }
        }
        let wishes = batch.iter().map(|candidate| (candidate.item.node.as_str(), &candidate.wants.charge));
        let ledger_of = |node: &str| known.get(node).and_then(|(ledger, _)| ledger.as_deref());
        let mut plan = decide::plan(wishes, ledger_of, sight.scene.take(), all);
        // A rule may seem broken by a pod that has gone, or for want of one that has come: such a refusal counts once all is known that
        // was acknowledged before the call.
        if plan.rules_refuse() && sight.revision < floor.sure {
            floor.sure = self.registry.storage.revision().await?;
            floor.seen = floor.seen.max(floor.sure);
            return Ok(());
        }
        if plan.granted.is_empty() {
            return self.confirm_refusals(batch, known, done, plan).await;
        }
        // Nodes that refuse are compared too, so that a refusal is as exact as a binding.
        let refusing: BTreeSet<&str> = plan
            .refused
            .iter()
            .filter_map(|(position, _)| batch.get(*position))
            .map(|candidate| candidate.item.node.as_str())
            .collect();
        let granted: Vec<&Candidate> = plan.granted.iter().filter_map(|position| batch.get(*position)).collect();
        let guarded: Vec<String> = known
            .keys()
            .filter(|node| plan.ledgers.contains_key(*node) || refusing.contains(node.as_str()))
            .cloned()
            .collect();
        let mut guards: Vec<Guard> =
            granted.iter().map(|c| Guard::new(keys::object(Kind::Pod, &c.pod.key), c.pod.revision)).collect();
        guards.extend(guarded.iter().filter_map(|node| Some(Guard::new(keys::ledger(node), known.get(node)?.1))));
        guards.extend(sight.guards());
        let now = self.registry.now();
        let (mut writes, mut noted) = (Vec::with_capacity(guards.len()), Vec::with_capacity(guards.len()));
        let mut write = |key: Vec<u8>, value: Vec<u8>, ready| {
            noted.push(self.registry.cache.note(key.clone(), &value, ready));
            writes.push(Write::Put(key, value));
        };
        for candidate in &granted {
            let Some(pod) = bound(&candidate.pod.object, &candidate.item.node, now) else { continue };
            let (key, value) = (keys::object(Kind::Pod, &candidate.pod.key), pod.encode_to_vec());
            write(key, value, Ready::Object(Box::new(pod.into())));
        }
        let ledgers = std::mem::take(&mut plan.ledgers).into_iter();
        let ledgers: Vec<(String, Arc<Ledger>)> = ledgers.map(|(node, ledger)| (node, Arc::new(ledger))).collect();
        for (node, ledger) in &ledgers {
            write(keys::ledger(node), ledger.encode_to_vec(), Ready::Ledger(Arc::clone(ledger)));
        }
        let turns = sight.turns_of(&plan.granted);
        writes.extend(announced::numbers(turns).map(|turn| Write::Put(keys::turn(turn), Vec::new())));
        let pods = granted.len();
        match self.registry.gathered(Part { guards, writes }).await? {
            Outcome::Done { revision } => {
                noted.into_iter().for_each(Noted::written);
                self.took(turns, revision);
                struggle.took(turns);
                for (node, ledger) in ledgers {
                    self.registry.writers.wrote(&node, Some(ledger), revision);
                }
                self.settle(batch, plan, revision, done);
            }
            Outcome::Lost { present } => {
                let mut present = present.into_iter();
                let fresh: Vec<_> = present.by_ref().take(pods).collect();
                for (node, item) in guarded.into_iter().zip(present.by_ref()) {
                    let ledger = item.as_ref().and_then(|item| decode_ledger(&node, item).ok().map(Arc::new));
                    if item.is_none() {
                        self.registry.writers.wrote(&node, None, 0);
                    }
                    known.insert(node, (ledger, item.map_or(0, |item| item.revision)));
                }
                let present: Vec<_> = present.collect();
                let overtaken = sight.overtaken_at(&present);
                floor.seen = floor.seen.max(overtaken);
                if overtaken > 0 {
                    floor.seen = floor.seen.max(self.lost_turns(struggle, &sight, &present).await?);
                }
                let newer = plan.granted.iter().zip(fresh).filter_map(|(position, item)| {
                    let known = &batch.get(*position)?.pod;
                    let changed = item.as_ref().is_none_or(|item| item.revision != known.revision);
                    let read =
                        item.and_then(|item| Entry::decode(Kind::Pod, &known.key, &item.value, item.revision).ok());
                    changed.then(|| (*position, read.map(|read| Arc::new(same_spec(read, Some(known))))))
                });
                let newer = newer.collect();
                self.rejudge(batch, newer, done, all);
            }
        }
        Ok(())
    }

    /// Pods of which the cache knows more. One that a transaction of unknown outcome has bound would stand in its own way.
    fn newer(&self, batch: &[Candidate]) -> Vec<(usize, Option<Arc<Entry>>)> {
        let keys = batch.iter().map(|candidate| candidate.pod.key.as_str());
        let cached = self.registry.cache.get_many(Kind::Pod, keys).into_iter().enumerate();
        let known = |position: usize| batch.get(position).map_or(0, |candidate| candidate.pod.revision);
        cached.filter(|(at, pod)| pod.as_ref().is_some_and(|pod| pod.revision > known(*at))).collect()
    }

    /// Nothing can be granted: final only if the ledgers are really so.
    async fn confirm_refusals(
        &self,
        batch: &mut Vec<Candidate>,
        known: &mut Known,
        done: &mut Results,
        plan: Plan,
    ) -> Result<(), StoreError> {
        let mut changed = false;
        let items = self.registry.storage.get_many(known.keys().map(|node| keys::ledger(node)).collect()).await?;
        for ((node, (ledger, revision)), item) in known.iter_mut().zip(items) {
            let now = item.as_ref().map_or(0, |item| item.revision);
            if now != *revision {
                changed = true;
                *revision = now;
                *ledger = item.and_then(|item| decode_ledger(node, &item).ok().map(Arc::new));
            }
        }
        if !changed {
            let refused = plan.refused.into_iter();
            done.extend(refused.filter_map(|(position, result)| Some((batch.get(position)?.index, result))));
            batch.clear();
        }
        Ok(())
    }

    fn settle(&self, batch: &mut Vec<Candidate>, plan: Plan, revision: i64, done: &mut Results) {
        for position in plan.granted {
            let Some(candidate) = batch.get(position) else { continue };
            let mut bound = decide::result(Code::Bound, "");
            bound.node.clone_from(&candidate.item.node);
            bound.revision = revision;
            done.push((candidate.index, bound));
        }
        let refused = plan.refused.into_iter();
        done.extend(refused.filter_map(|(position, result)| Some((batch.get(position)?.index, result))));
        batch.clear();
    }

    /// Judges pods anew of which more is known by now; each with its position.
    fn rejudge(
        &self,
        batch: &mut Vec<Candidate>,
        newer: Vec<(usize, Option<Arc<Entry>>)>,
        done: &mut Results,
        all: bool,
    ) {
        let mut settled = BTreeSet::new();
        for (position, pod) in newer {
            let Some(candidate) = batch.get_mut(position) else { continue };
            match (decide::judge_pod(&candidate.item, pod.as_deref()), pod) {
                (Ok(wants), Some(pod)) => {
                    candidate.wants = wants;
                    candidate.pod = pod;
                }
                (Err(result), _) => {
                    done.push((candidate.index, *result));
                    settled.insert(candidate.index);
                }
                (Ok(_), None) => {}
            }
        }
        if all && !settled.is_empty() {
            done.extend(batch.iter().filter(|c| !settled.contains(&c.index)).map(|c| (c.index, decide::gang())));
            batch.clear();
        }
        batch.retain(|candidate| !settled.contains(&candidate.index));
    }
}

fn load(candidate: &Candidate) -> Load<'_> {
    Load { node: candidate.node(), bytes: candidate.pod.inner.len() + BINDING_BYTES }
}

/// A freshly read pod knows nothing of its past; if the spec is the one known before, so is its age.
fn same_spec(mut read: Entry, known: Option<&Entry>) -> Entry {
    if let Some(known) = known {
        let (old, new) = (known.object.meta(), read.object.meta());
        if old.uid == new.uid && old.generation == new.generation {
            read.spec_revision = known.spec_revision;
        }
    }
    read
}

/// The pod, bound, as it is stored.
fn bound(object: &Object, node: &str, now: minipod_proto::v1::Time) -> Option<Pod> {
    let mut pod = object.as_pod()?.clone();
    if let Some(meta) = &mut pod.metadata {
        meta.resource_version.clear();
    }
    pod.spec_mut().node_name = node.to_owned();
    // It has its place: no room is kept for it any more.
    pod.status_mut().nominated_node_name.clear();
    pod.status_mut().set_condition("PodScheduled", "True", "", "", now);
    Some(pod)
}
