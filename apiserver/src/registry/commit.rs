//! Carries a verdict out: one transaction over the object and the ledgers that depend on it.

use std::{sync::Arc, time::Duration};

use minipod_daemon::backoff::Backoff;
use minipod_proto::{Kind, resize, v1::Object};
use prost::Message;

use super::{ATTEMPTS, Registry, Stored, Verdict, Written, delete::DEFAULT_NAMESPACE, namespaces};
use crate::{
    cache::{Entry, Ready},
    error::ApiError,
    keys,
    ledger::{self, Charge, Ledger, Refusal, writers::Writer},
    storage::{Guard, Item, Outcome, Part, Write},
};

/// An encoded object may be this large, bytes: under etcd's default request limit of 1.5 MiB, together with a ledger.
const OBJECT_LIMIT_BYTES: usize = 1_400_000;

/// What happens to one node's ledger.
#[derive(Debug)]
enum Booking {
    /// A pod ends there.
    Release(Charge),
    /// A pod is created there.
    Take(Charge),
    /// A pod there takes more or less than before; with `checked` only if there is room for what it takes more.
    Change { before: Charge, after: Charge, checked: bool },
    /// The node says something new of itself.
    Follow(Box<minipod_proto::v1::Node>),
    /// The node goes.
    NodeGone,
}

/// What a write compares and writes.
pub(super) struct Transaction {
    pub(super) part: Part,
    booked: Option<Booked>,
}

/// The ledger in it.
struct Booked {
    node: String,
    /// As it will be; `None`: it goes.
    next: Option<Arc<Ledger>>,
    writer: Writer,
}

impl Transaction {
    /// Carries it out.
    pub(super) async fn run(self, registry: &Registry) -> Result<Outcome, ApiError> {
        let outcome = registry.gatherer.txn(self.part).await?;
        if let (Outcome::Done { revision }, Some(Booked { node, next, writer })) = (&outcome, self.booked) {
            registry.writers.wrote(&node, next, *revision);
            drop(writer);
        }
        Ok(outcome)
    }
}

/// The present state of an object, from wherever it is known.
struct Base {
    entry: Arc<Entry>,
    /// From the cache, which may be behind the store.
    cached: bool,
}

impl Registry {
    /// Decides and writes until it holds.
    ///
    /// # Errors
    /// What `decide` says of the store's state, or what the store says.
    pub async fn modify<F>(&self, kind: Kind, key: &str, decide: F) -> Result<Written, ApiError>
    where
        F: FnMut(&Object) -> Result<Verdict, ApiError>,
    {
        self.modify_while(kind, key, None, decide).await
    }

    /// As [`Registry::modify`], as long as another key is as it was seen; [`ApiError::Overtaken`] when it is not any more.
    ///
    /// # Errors
    /// As [`Registry::modify`].
    pub(crate) async fn modify_while<F>(
        &self,
        kind: Kind,
        key: &str,
        guard: Option<&Guard>,
        mut decide: F,
    ) -> Result<Written, ApiError>
    where
        F: FnMut(&Object) -> Result<Verdict, ApiError>,
    {
        let mut base = self.cache.get(kind, key).map(|entry| Base { entry, cached: true });
        let mut ledger_hint = None;
        let mut backoff = Backoff::new(Duration::from_millis(1), Duration::from_millis(50));
        for attempt in 0..ATTEMPTS {
            let present = match base.take() {
                Some(base) => base,
                None => {
                    let read = self.read(kind, key).await?;
                    let entry = read.ok_or(ApiError::NotFound { kind, key: key.to_owned() })?;
                    Base { entry: Arc::new(entry), cached: false }
                }
            };
            let entry = &*present.entry;
            let verdict = match decide(&entry.object) {
                Ok(Verdict::Keep) | Err(_) if present.cached => continue,
                verdict => verdict?,
            };
            let new = match verdict {
                Verdict::Keep => {
                    return Ok(Written { object: entry.object.clone(), revision: entry.revision, gone: false });
                }
                Verdict::Put(object) => Some(*object),
                Verdict::Remove => None,
            };
            let written = self.write(kind, key, Some(entry), new.as_ref(), guard.cloned(), ledger_hint.take()).await?;
            match written {
                Outcome::Done { revision } => {
                    let gone = new.is_none();
                    let mut object = new.unwrap_or_else(|| entry.object.clone());
                    stamp(&mut object, revision);
                    return Ok(Written { object, revision, gone });
                }
                Outcome::Lost { present } => {
                    self.conflicts.increment();
                    let mut present = present.into_iter();
                    let object = present.next().flatten();
                    if let Some(guard) = guard
                        && present.next().flatten().map_or(0, |item| item.revision) != guard.revision
                    {
                        let held = String::from_utf8_lossy(&guard.key).into_owned();
                        return Err(ApiError::Overtaken(format!(
                            "{held} has changed since revision {}",
                            guard.revision
                        )));
                    }
                    let object = object.ok_or(ApiError::NotFound { kind, key: key.to_owned() })?;
                    let entry = Entry::decode(kind, key, &object.value, object.revision)?;
                    base = Some(Base { entry: Arc::new(entry), cached: false });
                    ledger_hint = present.next();
                }
            }
            if attempt > 2 {
                tokio::time::sleep(backoff.next_wait()).await;
            }
        }
        let detail = format!("others changed it {ATTEMPTS} times meanwhile");
        Err(ApiError::Stale { kind, key: key.to_owned(), detail })
    }

    /// Writes a new object.
    pub(super) async fn insert(
        &self,
        kind: Kind,
        key: &str,
        object: Object,
        guard: Option<Guard>,
    ) -> Result<Stored, ApiError> {
        let object_key = keys::object(kind, key);
        let value = encode(kind, key, &object)?;
        let uid = object.meta().uid.clone();
        // What a ledger depends on is a node, or a pod that says its node: few, and they keep the object for each attempt.
        let (booked, noted) = match booking(None, Some(&object))? {
            Some(_) => (Some(object), None),
            None => {
                let ready = Ready::Object(Box::new(object));
                (None, Some(self.cache.note(object_key.clone(), &value, ready)))
            }
        };
        let mut ledger_hint = None;
        for _ in 0..ATTEMPTS {
            let extra = match &guard {
                Some(guard) => Some(guard.clone()),
                None => self.namespace(kind, key).await?,
            };
            let guarded = extra.is_some();
            let outcome = match &booked {
                Some(object) => self.write(kind, key, None, Some(object), extra, ledger_hint.take()).await?,
                None => {
                    let guards = std::iter::once(Guard::new(object_key.clone(), 0)).chain(extra).collect();
                    let writes = vec![Write::Put(object_key.clone(), value.clone())];
                    self.gatherer.txn(Part { guards, writes }).await?
                }
            };
            match outcome {
                Outcome::Done { revision } => {
                    if let Some(noted) = noted {
                        noted.written();
                    }
                    return Ok(Stored { kind, key: key.to_owned(), uid, value, revision });
                }
                Outcome::Lost { present } => {
                    self.conflicts.increment();
                    let mut present = present.into_iter();
                    if present.next().flatten().is_some() {
                        return Err(ApiError::Exists { kind, key: key.to_owned() });
                    }
                    let second = if guarded { present.next().flatten() } else { None };
                    if let Some(guard) = &guard
                        && second.as_ref().map_or(0, |item| item.revision) != guard.revision
                    {
                        let detail = format!("{} changed meanwhile", String::from_utf8_lossy(&guard.key));
                        return Err(ApiError::Stale { kind, key: key.to_owned(), detail });
                    }
                    let namespace = second.filter(|_| guard.is_none());
                    // The cache may be behind: what is newest is known now.
                    if let Some(item) = namespace {
                        self.cache.reach(item.revision).await?;
                    }
                    ledger_hint = present.next();
                }
            }
        }
        let detail = format!("its namespace or node changed {ATTEMPTS} times meanwhile");
        Err(ApiError::Stale { kind, key: key.to_owned(), detail })
    }

    /// The guard that keeps an object out of a namespace that ends.
    pub(super) async fn namespace(&self, kind: Kind, key: &str) -> Result<Option<Guard>, ApiError> {
        let Some((namespace, _)) = key.split_once('/').filter(|_| kind.namespaced()) else { return Ok(None) };
        let mut known = self.cache.get(Kind::Namespace, namespace);
        if known.is_none() {
            known = self.read(Kind::Namespace, namespace).await?.map(Arc::new);
        }
        if known.is_none() && namespace == DEFAULT_NAMESPACE {
            // A new store: whoever comes before the server has made it need not know.
            Box::pin(namespaces::ensure_default(self)).await?;
            known = self.read(Kind::Namespace, namespace).await?.map(Arc::new);
        }
        let known = known.map(|entry| (entry.object.meta().deletion_timestamp.is_some(), entry.revision));
        match known {
            Some((false, revision)) => Ok(Some(Guard::new(keys::object(Kind::Namespace, namespace), revision))),
            Some((true, _)) => Err(ApiError::Precondition(format!(
                "namespace {namespace} is being deleted: nothing new is made in it"
            ))),
            None => Err(ApiError::NotFound { kind: Kind::Namespace, key: namespace.to_owned() }),
        }
    }

    /// One attempt. Guards: the object, then `extra`, then the ledger.
    async fn write(
        &self,
        kind: Kind,
        key: &str,
        old: Option<&Entry>,
        new: Option<&Object>,
        extra: Option<Guard>,
        ledger_hint: Option<Option<Item>>,
    ) -> Result<Outcome, ApiError> {
        self.transaction(kind, key, old, new, extra, ledger_hint).await?.run(self).await
    }

    /// What [`Registry::write`] compares and writes. Until it is dropped nobody else of this server writes the same ledger.
    pub(super) async fn transaction(
        &self,
        kind: Kind,
        key: &str,
        old: Option<&Entry>,
        new: Option<&Object>,
        extra: Option<Guard>,
        ledger_hint: Option<Option<Item>>,
    ) -> Result<Transaction, ApiError> {
        let object_key = keys::object(kind, key);
        let mut guards = vec![Guard::new(object_key.clone(), old.map_or(0, |old| old.revision))];
        guards.extend(extra);
        let mut writes = vec![match new {
            Some(object) => Write::Put(object_key, encode(kind, key, object)?),
            None => Write::Delete(object_key),
        }];
        let mut booked = None;
        if let Some((node, booking)) = booking(old.map(|old| &old.object), new)? {
            let writer = self.writers.take(&node).await;
            let (ledger, revision) = self.ledger(&node, ledger_hint).await?;
            if let Some(next) = book(&node, ledger.as_deref(), booking)? {
                guards.push(Guard::new(keys::ledger(&node), revision));
                writes.push(match &next {
                    Some(ledger) => Write::Put(keys::ledger(&node), ledger.encode_to_vec()),
                    None => Write::Delete(keys::ledger(&node)),
                });
                booked = Some(Booked { writer, node, next: next.map(Arc::new) });
            }
        }
        Ok(Transaction { part: Part { guards, writes }, booked })
    }

    /// A node's ledger and its revision (0: there is none), from the hint, the cache or the store.
    async fn ledger(&self, node: &str, hint: Option<Option<Item>>) -> Result<(Option<Arc<Ledger>>, i64), ApiError> {
        let known = match hint {
            Some(Some(item)) => Some((Arc::new(decode_ledger(node, &item)?), item.revision)),
            Some(None) => {
                self.writers.wrote(node, None, 0);
                return Ok((None, 0));
            }
            None => self.cache.ledgers(std::iter::once(node)).into_iter().flatten().next(),
        };
        // Others of this server may have written since the hint was true.
        if let Some((ledger, revision)) = self.writers.newest(node, known) {
            return Ok((Some(ledger), revision));
        }
        let (item, _) = self.storage.get(keys::ledger(node)).await?;
        item.map_or(Ok((None, 0)), |item| Ok((Some(Arc::new(decode_ledger(node, &item)?)), item.revision)))
    }
}

pub fn decode_ledger(node: &str, item: &Item) -> Result<Ledger, ApiError> {
    Ledger::decode(item.value.as_slice()).map_err(|source| ApiError::Corrupt {
        kind: "ledger",
        key: node.to_owned(),
        source,
    })
}

/// Makes it the object as it is after a write at a revision.
pub(super) fn stamp(object: &mut Object, revision: i64) {
    if let Some(meta) = object.meta_mut() {
        meta.resource_version = revision.to_string();
    }
}

/// The form in the store: without resourceVersion, which is the key's revision.
fn encode(kind: Kind, key: &str, object: &Object) -> Result<Vec<u8>, ApiError> {
    let bytes = if object.meta().resource_version.is_empty() {
        object.encode_inner()
    } else {
        let mut bare = object.clone();
        if let Some(meta) = bare.meta_mut() {
            meta.resource_version.clear();
        }
        bare.encode_inner()
    };
    if bytes.len() > OBJECT_LIMIT_BYTES {
        return Err(ApiError::TooLarge(format!(
            "{kind} {key} is {} bytes long; an object may have {OBJECT_LIMIT_BYTES}",
            bytes.len()
        )));
    }
    Ok(bytes)
}

/// What a change of an object means for a ledger. A bound pod never changes its node, so that one ledger is enough.
fn booking(old: Option<&Object>, new: Option<&Object>) -> Result<Option<(String, Booking)>, ApiError> {
    let broken = |error| ApiError::Invalid(format!("spec: the requests cannot be summed: {error}"));
    let either = new.or(old);
    if either.is_some_and(|object| object.as_pod().is_some()) {
        let charge = |object: Option<&Object>| -> Result<Option<(String, Charge)>, ApiError> {
            let Some(pod) = object.and_then(Object::as_pod) else { return Ok(None) };
            let charged = ledger::charged(pod).map_err(broken)?;
            Ok(charged.map(|(node, charge)| (node.to_owned(), charge)))
        };
        return Ok(match (charge(old)?, charge(new)?) {
            (Some((node, charge)), None) => Some((node, Booking::Release(charge))),
            (None, Some((node, charge))) => Some((node, Booking::Take(charge))),
            (Some((node, before)), Some((_, after))) if before.requests != after.requests => {
                Some((node, Booking::Change { before, after, checked: grants(old, new) }))
            }
            _ => None,
        });
    }
    let node = |object: Option<&Object>| object.and_then(Object::as_node).cloned();
    Ok(match (node(old), node(new)) {
        (_, Some(new)) => Some((
            new.metadata.as_ref().map(|meta| meta.name.clone()).unwrap_or_default(),
            Booking::Follow(Box::new(new)),
        )),
        (Some(old), None) => {
            Some((old.metadata.as_ref().map(|meta| meta.name.clone()).unwrap_or_default(), Booking::NodeGone))
        }
        (None, None) => None,
    })
}

/// Whether a change of a pod grants it resources. What its node reports is so, and no question of room.
fn grants(old: Option<&Object>, new: Option<&Object>) -> bool {
    let (Some(old), Some(new)) = (old, new) else { return false };
    let waits = |object: &Object| object.as_pod().is_some_and(|pod| resize::pending(pod).is_some());
    old.meta().generation != new.meta().generation || (waits(old) && !waits(new))
}

/// What a booking makes of a ledger; `None` when it stays as it is, `Some(None)` when it goes.
fn book(node: &str, ledger: Option<&Ledger>, booking: Booking) -> Result<Option<Option<Ledger>>, ApiError> {
    let mut next = ledger.cloned().unwrap_or_default();
    match booking {
        Booking::Release(charge) => {
            if ledger.is_none() {
                // Cannot be by way of this server; a ledger that is not there has nothing to give back.
                tracing::warn!(node, pod = charge.uid, "a pod ends on a node without a ledger");
                return Ok(None);
            }
            next.release(&charge);
        }
        Booking::Take(charge) => {
            let missing = || ApiError::Precondition(format!("spec.nodeName: node {node:?} does not exist"));
            let admitted = ledger.ok_or_else(missing)?.admits(&charge);
            admitted.map_err(|refusal| match refusal {
                Refusal::Gone => missing(),
                Refusal::Unschedulable(why) => {
                    ApiError::Precondition(format!("spec.nodeName: node {node:?} takes no pods: {why}"))
                }
                Refusal::NoFit(short) => {
                    ApiError::Precondition(format!("spec.nodeName: the pod does not fit on node {node:?}: {short}"))
                }
            })?;
            next.take(&charge);
        }
        Booking::Change { before, after, checked } => {
            if ledger.is_none() {
                tracing::warn!(node, pod = after.uid, "a pod changes on a node without a ledger");
                return Ok(None);
            }
            if checked && let Err((refusal, never)) = next.has_room_for_more(&before, &after) {
                let short = match refusal {
                    Refusal::NoFit(short) => short,
                    Refusal::Gone | Refusal::Unschedulable(_) => String::new(),
                };
                return Err(ApiError::NoRoom { node: node.to_owned(), short, never });
            }
            next.release(&before);
            next.take(&after);
        }
        Booking::Follow(object) => {
            next.follow(&object).map_err(|error| ApiError::Invalid(format!("status.allocatable: {error}")))?;
        }
        Booking::NodeGone => next.deleting = true,
    }
    if next.deleting && next.pods() == 0 {
        return Ok(ledger.map(|_| None));
    }
    if ledger == Some(&next) {
        return Ok(None);
    }
    Ok(Some(Some(next)))
}
