//! The only writer of objects: defaults, validates, and writes by compare-and-swap.
//!
//! What is to become of an object is decided by a function of its present state ([`Verdict`]); [`commit`] carries it out in one
//! transaction together with the ledgers that it concerns, and asks again when the state has changed meanwhile. The first attempt
//! takes the state from the cache; a refusal or a "nothing to do" that rests on the cache is confirmed by the store.

pub mod admission;
pub mod budgets;
mod commit;
pub mod delete;
mod evict;
mod gather;
pub mod namespaces;
mod resize;
mod update;

pub(crate) use commit::decode_ledger;

use std::sync::Arc;

use bytes::Bytes;
use minipod_daemon::metrics::Registry as Metrics;
use minipod_proto::{
    Kind,
    v1::{CreateRequest, GetRequest, Object, Time},
};

use crate::{
    cache::{self, Cache, Entry},
    error::ApiError,
    keys,
    ledger::writers::Writers,
    space::Space,
    storage::{Guard, Outcome, Part, Storage, StoreError},
};

/// How often a write is tried when others keep writing the same object.
const ATTEMPTS: u32 = 32;

/// Names that generateName makes are tried as often.
const NAME_ATTEMPTS: u32 = 8;

/// What is to become of an object.
#[derive(Debug)]
pub enum Verdict {
    /// Nothing: it is as it shall be.
    Keep,
    /// This instead.
    Put(Box<Object>),
    /// It goes.
    Remove,
}

impl Verdict {
    /// This instead.
    pub fn put(object: impl Into<Object>) -> Verdict {
        Verdict::Put(Box::new(object.into()))
    }
}

/// What became of it.
#[derive(Debug)]
pub struct Written {
    /// As it is now, or was last.
    pub object: Object,
    /// The revision at which it is so.
    pub revision: i64,
    /// It is gone from the store.
    pub gone: bool,
}

/// An object as it went to the store.
#[derive(Debug)]
pub struct Stored {
    /// Its kind.
    pub kind: Kind,
    /// `namespace/name` or `name`.
    pub key: String,
    /// Its metadata.uid.
    pub uid: String,
    /// The encoded inner message, without resourceVersion.
    value: Vec<u8>,
    /// The revision of the write; 0: it was not written.
    revision: i64,
}

impl Stored {
    /// The encoded inner message as clients see it, with its resourceVersion.
    pub fn inner(self) -> Bytes {
        if self.revision == 0 { self.value.into() } else { cache::with_revision(&self.value, self.revision) }
    }

    /// Its resourceVersion; empty when it was not written.
    pub fn resource_version(&self) -> String {
        if self.revision == 0 { String::new() } else { self.revision.to_string() }
    }

    /// Decoded.
    fn object(&self) -> Result<Object, ApiError> {
        let Stored { kind, key, value, revision, .. } = self;
        let decoded = Object::decode_inner(*kind, value);
        let mut object = decoded.map_err(|source| ApiError::Corrupt { kind: kind.name(), key: key.clone(), source })?;
        if *revision != 0 {
            commit::stamp(&mut object, *revision);
        }
        Ok(object)
    }
}

/// The registry. Shared by all services.
pub struct Registry {
    /// The store.
    pub storage: Storage,
    /// What it holds.
    pub cache: Arc<Cache>,
    /// Who writes which ledger next.
    pub writers: Writers,
    /// Whether the store has room for more.
    pub space: Arc<Space>,
    /// What writes go through.
    gatherer: Arc<gather::Gatherer>,
    /// The wall clock, for what users read.
    clock: fn() -> Time,
    conflicts: Arc<minipod_daemon::metrics::Counter>,
}

impl Registry {
    /// A registry over a store and its cache.
    pub fn new(storage: Storage, cache: Arc<Cache>, metrics: &Metrics) -> Registry {
        let conflicts =
            metrics.counter("minipod_write_conflicts_total", &[], "Writes repeated because the object had changed.");
        let clock = || Time::from(std::time::SystemTime::now());
        let gatherer = gather::Gatherer::new(storage.clone(), metrics);
        Registry { storage, cache, writers: Writers::default(), space: Arc::default(), gatherer, clock, conflicts }
    }

    /// The wall clock.
    pub fn now(&self) -> Time {
        (self.clock)()
    }

    /// Writes in one transaction with whatever else is written here just now; it holds or is lost by itself.
    pub(crate) async fn gathered(&self, part: Part) -> Result<Outcome, StoreError> {
        self.gatherer.txn(part).await
    }

    /// Makes a new object.
    ///
    /// # Errors
    /// When it is wrong, its name is taken, its namespace is not there, or the store has no room for more.
    pub async fn create(&self, request: CreateRequest) -> Result<Object, ApiError> {
        self.create_stored(request).await?.object()
    }

    /// As [`Registry::create`]; what comes back is not decoded.
    ///
    /// # Errors
    /// As [`Registry::create`].
    pub async fn create_stored(&self, request: CreateRequest) -> Result<Stored, ApiError> {
        if !request.dry_run {
            self.space.admit()?;
        }
        self.create_named(request, None).await
    }

    /// Makes a new object in a transaction that holds only while another key is as it was seen; [`ApiError::Stale`] when it is
    /// not any more. For objects without namespace.
    pub(crate) async fn create_while(&self, request: CreateRequest, guard: Option<Guard>) -> Result<Object, ApiError> {
        self.create_named(request, guard).await?.object()
    }

    async fn create_named(&self, request: CreateRequest, guard: Option<Guard>) -> Result<Stored, ApiError> {
        let given = request.object.ok_or_else(|| ApiError::Invalid("object: missing".into()))?;
        let generated = given.meta().name.is_empty() && !given.meta().generate_name.is_empty();
        if !generated {
            return self.create_once(given, request.dry_run, guard).await;
        }
        for _ in 0..NAME_ATTEMPTS {
            match self.create_once(given.clone(), request.dry_run, guard.clone()).await {
                Err(ApiError::Exists { .. }) => {}
                done => return done,
            }
        }
        let prefix = &given.meta().generate_name;
        Err(ApiError::Unavailable(format!(
            "metadata.generateName: {NAME_ATTEMPTS} names that begin with {prefix:?} were taken; try again"
        )))
    }

    /// Defaults, validates and writes an object; a name that is to be made is made anew with each call.
    async fn create_once(&self, mut object: Object, dry_run: bool, guard: Option<Guard>) -> Result<Stored, ApiError> {
        let kind = admission::prepare(&mut object, self.now())?;
        if kind == Kind::Pod {
            admission::resolve_priority(&mut object, &self.cache)?;
        }
        admission::validate(&object)?;
        let key = keys::object_key(kind, &object.meta().namespace, &object.meta().name)?;
        if dry_run {
            self.namespace(kind, &key).await?;
            let (uid, value) = (object.meta().uid.clone(), object.encode_inner());
            return Ok(Stored { kind, key, uid, value, revision: 0 });
        }
        self.insert(kind, &key, object, guard).await
    }

    /// Reads an object, linearizable.
    ///
    /// # Errors
    /// When there is none, or the store cannot be read.
    pub async fn get(&self, request: GetRequest) -> Result<Object, ApiError> {
        let kind = keys::kind(&request.kind)?;
        let key = keys::object_key(kind, &request.namespace, &request.name)?;
        let entry = self.read(kind, &key).await?;
        entry.map(|entry| entry.object).ok_or(ApiError::NotFound { kind, key })
    }

    /// An object as the store has it.
    pub(crate) async fn read(&self, kind: Kind, key: &str) -> Result<Option<Entry>, ApiError> {
        let (item, _) = self.storage.get(keys::object(kind, key)).await?;
        item.map(|item| Entry::decode(kind, key, &item.value, item.revision)).transpose()
    }
}

/// The status that a pod has after a report: terminal phases are for ever, and what only the server knows is kept.
pub fn merge_status(
    pod: &minipod_proto::v1::Pod,
    mut reported: minipod_proto::v1::PodStatus,
) -> minipod_proto::v1::PodStatus {
    let old = pod.status();
    let phase = minipod_proto::Phase::from(reported.phase.as_str());
    if pod.is_terminal() && phase != pod.phase() {
        reported.phase.clone_from(&old.phase);
        reported.reason.clone_from(&old.reason);
        reported.message.clone_from(&old.message);
    }
    if reported.phase.is_empty() {
        reported.phase.clone_from(&old.phase);
    }
    if reported.qos_class.is_empty() {
        reported.qos_class.clone_from(&old.qos_class);
    }
    // The binding, and that somebody has chosen the pod to go, is known here and nowhere else; a report that does not mention it
    // does not undo it.
    for kind in [minipod_proto::disruption::DISRUPTION_TARGET, "PodScheduled"] {
        if let Some(ours) = pod.condition(kind)
            && !reported.conditions.iter().any(|condition| condition.r#type == kind)
        {
            reported.conditions.insert(0, ours.clone());
        }
    }
    minipod_proto::resize::keep_decision(pod, &mut reported);
    reported
}
