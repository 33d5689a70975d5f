//! The only user of etcd-client, and beside it ([`direct`]) of the store in this process: bytes under keys, with revisions.
//!
//! Everything above sees [`Item`]s, [`Guard`]s and [`Write`]s and knows nothing of etcd. Any endpoint that speaks etcd v3 will do;
//! [`Storage::from_clients`] is the seam for one that is not reached over TCP.

mod direct;

use std::time::Duration;

use etcd_client::{
    Client, Compare, CompareOp, ConnectOptions, EventType, GetOptions, KvClient, Txn, TxnOp, TxnOpResponse,
    TxnResponse, WatchClient, WatchOptions, WatchStream,
};
use minipod_store::{
    direct::{Answer, Transactor},
    wire,
};
use tonic::Code;

/// Every key of minipod begins with this.
pub const PREFIX: &str = "/minipod/";

/// Compares or operations in one transaction: etcd's default `--max-txn-ops`.
pub const DEFAULT_MAX_OPS: usize = 128;

/// The same for a store of this process's own: a scheduler's whole batch of bindings, each with a pod and a ledger, and the turns of
/// rules between pods. A transaction costs an entry of the log, a sync and three wake-ups, whether it binds one pod or hundreds.
pub const EMBEDDED_MAX_OPS: usize = 1_024;

/// A read or a write may take this long before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers of the store may be this large: a page of the largest objects, or a burst of changes on the watch.
const ANSWER_LIMIT_BYTES: usize = 512 * 1024 * 1024;

/// Why the store did not do what it was asked for.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// It was not reached, or it was a read: nothing has happened.
    #[error("{operation}: the store cannot be reached: {detail}")]
    Unavailable {
        /// What was tried.
        operation: &'static str,
        /// What the client says.
        detail: String,
    },
    /// A write was sent and no answer came back.
    #[error("{operation}: the store did not answer, whether it happened is unknown: {detail}")]
    Uncertain {
        /// What was tried.
        operation: &'static str,
        /// What the client says.
        detail: String,
    },
    /// The revision that was asked for is no longer kept.
    #[error("{operation}: the revision has been compacted away")]
    Compacted {
        /// What was tried.
        operation: &'static str,
    },
    /// The request is larger than the store takes.
    #[error("{operation}: the store refuses the size: {detail}")]
    TooLarge {
        /// What was tried.
        operation: &'static str,
        /// What the client says.
        detail: String,
    },
    /// The store has used up its quota: nothing was written, and nothing that adds will be until there is room.
    #[error("{operation}: the store is full, nothing was written: {}", crate::space::ADVICE)]
    Full {
        /// What was tried.
        operation: &'static str,
    },
    /// Anything else: a mistake of ours, or a store that is no etcd.
    #[error("{operation}: the store refuses: {detail}")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// What the client says.
        detail: String,
    },
}

impl StoreError {
    /// Whether it may have been one part's fault when several went in one transaction, and nothing has happened to any.
    pub fn may_be_of_one(&self) -> bool {
        matches!(self, StoreError::TooLarge { .. } | StoreError::Full { .. } | StoreError::Refused { .. })
    }
}

/// A key with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// The whole key.
    pub key: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
    /// The revision of its last write.
    pub revision: i64,
}

/// A condition of a transaction: the key's last write was at this revision; 0: there is no such key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guard {
    /// The whole key.
    pub key: Vec<u8>,
    /// The revision of the last write, 0 for none.
    pub revision: i64,
}

impl Guard {
    /// A guard on a key.
    pub fn new(key: impl Into<Vec<u8>>, revision: i64) -> Guard {
        Guard { key: key.into(), revision }
    }
}

/// A change of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Write {
    /// Key and value.
    Put(Vec<u8>, Vec<u8>),
    /// Key.
    Delete(Vec<u8>),
}

/// A transaction: everything is written if every guard holds, else nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Part {
    /// What it compares.
    pub guards: Vec<Guard>,
    /// What it changes.
    pub writes: Vec<Write>,
}

/// How a transaction ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All guards held; everything was written at this revision.
    Done {
        /// The revision of the writes.
        revision: i64,
    },
    /// A guard did not hold, nothing was written; what the guards' keys hold now, in their order.
    Lost {
        /// One per guard.
        present: Vec<Option<Item>>,
    },
}

/// Part of a range.
#[derive(Debug)]
pub struct Page {
    /// In the order of their keys.
    pub items: Vec<Item>,
    /// The store's revision when it was read.
    pub revision: i64,
    /// There is more after the last item.
    pub more: bool,
}

/// A change that the store tells of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawEvent {
    /// The whole key.
    pub key: Vec<u8>,
    /// `None`: it was deleted.
    pub value: Option<Vec<u8>>,
    /// When.
    pub revision: i64,
}

/// What comes over the feed in one piece: everything up to `revision` has been told of with it.
#[derive(Debug)]
pub struct Batch {
    /// In the order of their revisions.
    pub events: Vec<RawEvent>,
    /// The store's revision.
    pub revision: i64,
}

/// A running watch.
pub struct Feed {
    stream: WatchStream,
}

/// What a client asks for that follows the store: its watch ends where there is no leader. A member that is cut off from the majority
/// would otherwise be silent as if nothing happened. Reads and writes do not ask for it: they wait out the election of a leader.
pub fn following() -> ConnectOptions {
    ConnectOptions::new().with_require_leader(true)
}

/// The store. Cheap to clone; clones share the connection.
#[derive(Clone)]
pub struct Storage {
    kv: KvClient,
    watch: WatchClient,
    /// Where the store is this process's own: transactions go this way.
    own: Option<Transactor>,
    max_ops: usize,
}

impl Storage {
    /// A store behind `host:port` addresses. Does not wait for a connection: it is made with the first request.
    ///
    /// # Errors
    /// When an address cannot be understood.
    pub async fn connect(addresses: &[String], max_ops: usize) -> Result<Storage, StoreError> {
        // Keep-alives find a store that vanished without closing its connections; without them a watch would wait for ever.
        let options = ConnectOptions::new()
            .with_connect_timeout(Duration::from_secs(2))
            .with_keep_alive(Duration::from_secs(5), Duration::from_secs(5))
            .with_keep_alive_while_idle(true);
        let connect = async |options| {
            let client = Client::connect(addresses, Some(options)).await;
            client.map_err(|error| read_error("connect", &error))
        };
        let follower = connect(options.clone().with_require_leader(true)).await?;
        Ok(Storage::from_clients(&connect(options).await?, &follower, max_ops))
    }

    /// A store behind clients that exist already: one reads and writes, the other, which [`following`] describes, watches.
    pub fn from_clients(client: &Client, follower: &Client, max_ops: usize) -> Storage {
        let kv = client.kv_client().max_decoding_message_size(ANSWER_LIMIT_BYTES);
        let watch = follower.watch_client().max_decoding_message_size(ANSWER_LIMIT_BYTES);
        Storage { kv, watch, own: None, max_ops: max_ops.max(2) }
    }

    /// With transactions that do not go through a client.
    #[must_use]
    pub fn with_own(self, own: Transactor) -> Storage {
        Storage { own: Some(own), ..self }
    }

    /// How many guards, and how many writes, fit in one transaction.
    pub fn max_ops(&self) -> usize {
        self.max_ops
    }

    /// The item of a key and the store's revision, linearizable.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn get(&self, key: impl Into<Vec<u8>>) -> Result<(Option<Item>, i64), StoreError> {
        let mut kv = self.kv.clone();
        let mut answer = patient("get", false, kv.get(key, None)).await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok((answer.take_kvs().into_iter().next().map(item), revision))
    }

    /// The items of several keys, in their order, linearizable; as few round trips as the limit of operations allows.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn get_many(&self, keys: Vec<Vec<u8>>) -> Result<Vec<Option<Item>>, StoreError> {
        let mut items = Vec::with_capacity(keys.len());
        for chunk in keys.chunks(self.max_ops) {
            let gets: Vec<TxnOp> = chunk.iter().map(|key| TxnOp::get(key.clone(), None)).collect();
            let mut kv = self.kv.clone();
            let answer = patient("get", false, kv.txn(Txn::new().and_then(gets))).await?;
            items.extend(answer.op_responses().into_iter().map(got));
        }
        Ok(items)
    }

    /// The store's revision, linearizable.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn revision(&self) -> Result<i64, StoreError> {
        let mut kv = self.kv.clone();
        let options = GetOptions::new().with_count_only();
        let answer = patient("read the revision", false, kv.get(PREFIX, Some(options))).await?;
        Ok(answer.header().map_or(0, |header| header.revision()))
    }

    /// Items of the range `from..end` at a revision (0: now).
    ///
    /// # Errors
    /// When the store cannot be read, or the revision is compacted away.
    pub async fn page(
        &self,
        from: impl Into<Vec<u8>>,
        end: impl Into<Vec<u8>>,
        limit: i64,
        revision: i64,
    ) -> Result<Page, StoreError> {
        let mut kv = self.kv.clone();
        let options = GetOptions::new().with_range(end).with_limit(limit).with_revision(revision);
        let mut answer = patient("list", false, kv.get(from, Some(options))).await?;
        let read_at = answer.header().map_or(0, |header| header.revision());
        let more = answer.more();
        Ok(Page { items: answer.take_kvs().into_iter().map(item).collect(), revision: read_at, more })
    }

    /// Everything under a prefix, page by page, at one revision (0: now), which is returned with it.
    ///
    /// # Errors
    /// When the store cannot be read, or the revision is compacted away.
    pub async fn all(&self, prefix: &str, revision: i64) -> Result<(Vec<Item>, i64), StoreError> {
        // Large enough that thousands of pods are few round trips, small enough for a store's answer.
        const PAGE: i64 = 2_000;
        let end = prefix_end(prefix);
        let (mut items, mut at, mut from) = (Vec::new(), revision, prefix.as_bytes().to_vec());
        loop {
            let page = self.page(from, end.clone(), PAGE, at).await?;
            if at == 0 {
                at = page.revision;
            }
            let last = page.items.last().map(|item| item.key.clone());
            items.extend(page.items);
            match last {
                Some(key) if page.more => from = after(&key),
                _ => return Ok((items, at)),
            }
        }
    }

    /// Writes everything if every guard holds, else nothing.
    ///
    /// # Errors
    /// [`StoreError::Uncertain`] when it may have happened; the other errors say that it has not.
    pub async fn txn(&self, guards: Vec<Guard>, writes: Vec<Write>) -> Result<Outcome, StoreError> {
        let part = Part { guards, writes };
        if let Some(own) = &self.own {
            let (revision, answer) = carried_out(own, &direct::txn(&part)).await?;
            return Ok(direct::outcome(answer, revision));
        }
        let mut kv = self.kv.clone();
        let answer = patient("write", true, kv.txn(transaction(part))).await?;
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok(outcome(&answer, revision))
    }

    /// Writes everything whatever there is; the revision of the writes.
    ///
    /// # Errors
    /// As [`Storage::txn`].
    pub async fn put(&self, writes: Vec<Write>) -> Result<i64, StoreError> {
        match self.txn(Vec::new(), writes).await? {
            Outcome::Done { revision } => Ok(revision),
            // Without a guard there is nothing to lose.
            Outcome::Lost { .. } => {
                let detail = "a transaction without a condition did not hold".to_owned();
                Err(StoreError::Refused { operation: "write", detail })
            }
        }
    }

    /// Several transactions as one of the store: one entry of its log, one revision, one answer. Each holds or is lost by itself, by what
    /// the store had before all of them; so none may write what another one compares or writes.
    ///
    /// # Errors
    /// As [`Storage::txn`], of all of them.
    pub async fn txn_each(&self, parts: &[Part]) -> Result<Vec<Outcome>, StoreError> {
        let outcomes: Vec<Outcome> = if let Some(own) = &self.own {
            let (revision, answer) = carried_out(own, &direct::each(parts)).await?;
            direct::outcomes(answer, revision).collect()
        } else {
            let each: Vec<TxnOp> = parts.iter().map(|part| TxnOp::txn(transaction(part.clone()))).collect();
            let mut kv = self.kv.clone();
            let answer = patient("write", true, kv.txn(Txn::new().and_then(each))).await?;
            let revision = answer.header().map_or(0, |header| header.revision());
            let answers = answer.op_responses().into_iter();
            let inner = answers.filter_map(|response| match response {
                TxnOpResponse::Txn(answer) => Some(outcome(&answer, revision)),
                _ => None,
            });
            inner.collect()
        };
        if outcomes.len() == parts.len() {
            return Ok(outcomes);
        }
        let detail = format!("{} answers to {} transactions", outcomes.len(), parts.len());
        Err(StoreError::Uncertain { operation: "write", detail })
    }

    /// All changes of the store from a revision on, that one included.
    ///
    /// # Errors
    /// When the store cannot be reached. A compacted revision shows with the first [`Feed::next`].
    pub async fn feed(&self, from: i64) -> Result<Feed, StoreError> {
        // All keys: only so the revision of an event or a progress report follows the store's, whoever else writes to it.
        let options = WatchOptions::new().with_all_keys().with_start_revision(from).with_progress_notify();
        let mut watch = self.watch.clone();
        let stream = patient("watch", false, watch.watch(Vec::new(), Some(options))).await?;
        Ok(Feed { stream })
    }

    /// Lets the store forget what was before a revision. Compacting twice is no error.
    ///
    /// # Errors
    /// When the store cannot be reached.
    pub async fn compact(&self, revision: i64) -> Result<(), StoreError> {
        let mut kv = self.kv.clone();
        match patient("compact", false, kv.compact(revision, None)).await {
            Ok(_) | Err(StoreError::Compacted { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Feed {
    /// The next changes.
    ///
    /// # Errors
    /// [`StoreError::Compacted`] when the start is gone; otherwise the feed has broken and is opened again after the
    /// last revision seen.
    pub async fn next(&mut self) -> Result<Batch, StoreError> {
        loop {
            let answer = self.stream.message().await.map_err(|error| read_error("watch", &error))?;
            let Some(answer) = answer else {
                return Err(StoreError::Unavailable { operation: "watch", detail: "the stream has ended".into() });
            };
            if answer.compact_revision() > 0 {
                return Err(StoreError::Compacted { operation: "watch" });
            }
            if answer.canceled() {
                let detail = format!("the watch was cancelled: {}", answer.cancel_reason());
                return Err(StoreError::Unavailable { operation: "watch", detail });
            }
            if answer.created() {
                continue;
            }
            let revision = answer.header().map_or(0, |header| header.revision());
            let events: Vec<RawEvent> = answer.events().iter().filter_map(raw_event).collect();
            // The header tells the store's revision, but of a watcher that is behind only what its events tell has been sent.
            let sent = events.last().map_or(revision, |event| event.revision);
            return Ok(Batch { events, revision: sent });
        }
    }
}

async fn carried_out(own: &Transactor, txn: &wire::Txn<'_>) -> Result<(i64, Answer), StoreError> {
    patient("write", true, async { own.txn(txn).await.map_err(etcd_client::Error::GRpcStatus) }).await
}

fn transaction(part: Part) -> Txn {
    let Part { guards, writes } = part;
    let compares: Vec<Compare> =
        guards.iter().map(|g| Compare::mod_revision(g.key.clone(), CompareOp::Equal, g.revision)).collect();
    let present: Vec<TxnOp> = guards.into_iter().map(|g| TxnOp::get(g.key, None)).collect();
    let writes: Vec<TxnOp> = writes
        .into_iter()
        .map(|write| match write {
            Write::Put(key, value) => TxnOp::put(key, value, None),
            Write::Delete(key) => TxnOp::delete(key, None),
        })
        .collect();
    Txn::new().when(compares).and_then(writes).or_else(present)
}

/// How a transaction ended that was carried out at a revision.
fn outcome(answer: &TxnResponse, revision: i64) -> Outcome {
    if answer.succeeded() {
        return Outcome::Done { revision };
    }
    Outcome::Lost { present: answer.op_responses().into_iter().map(got).collect() }
}

fn raw_event(event: &etcd_client::Event) -> Option<RawEvent> {
    let kv = event.kv()?;
    let value = (event.event_type() == EventType::Put).then(|| kv.value().to_vec());
    Some(RawEvent { key: kv.key().to_vec(), value, revision: kv.mod_revision() })
}

/// The item of a get inside a transaction.
fn got(response: TxnOpResponse) -> Option<Item> {
    match response {
        TxnOpResponse::Get(mut get) => get.take_kvs().into_iter().next().map(item),
        _ => None,
    }
}

fn item(kv: etcd_client::KeyValue) -> Item {
    let revision = kv.mod_revision();
    let (key, value) = kv.into_key_value();
    Item { key, value, revision }
}

/// The smallest key that is larger than every key with the prefix.
pub fn prefix_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// The smallest key that is larger than `key`.
pub fn after(key: &[u8]) -> Vec<u8> {
    let mut next = key.to_vec();
    next.push(0);
    next
}

async fn patient<T>(
    operation: &'static str,
    writes: bool,
    call: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) if writes => Err(write_error(operation, &error)),
        Ok(Err(error)) => Err(read_error(operation, &error)),
        Err(_) => {
            let detail = format!("no answer within {} s", PATIENCE.as_secs());
            Err(if writes {
                StoreError::Uncertain { operation, detail }
            } else {
                StoreError::Unavailable { operation, detail }
            })
        }
    }
}

fn read_error(operation: &'static str, error: &etcd_client::Error) -> StoreError {
    let detail = error.to_string();
    let etcd_client::Error::GRpcStatus(status) = error else {
        return match error {
            etcd_client::Error::InvalidArgs(_) | etcd_client::Error::InvalidUri(_) => {
                StoreError::Refused { operation, detail }
            }
            _ => StoreError::Unavailable { operation, detail },
        };
    };
    let detail = status.message().to_owned();
    match status.code() {
        Code::OutOfRange if detail.contains("compacted") => StoreError::Compacted { operation },
        // etcd's words for a raised alarm; "too many requests" has the same code and passes.
        Code::ResourceExhausted if detail.contains("database space exceeded") => StoreError::Full { operation },
        Code::ResourceExhausted if detail.contains("too many requests") => {
            StoreError::Unavailable { operation, detail }
        }
        Code::OutOfRange | Code::ResourceExhausted => StoreError::TooLarge { operation, detail },
        Code::InvalidArgument if detail.contains("too large") => StoreError::TooLarge { operation, detail },
        Code::InvalidArgument | Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => {
            StoreError::Refused { operation, detail }
        }
        _ => StoreError::Unavailable { operation, detail },
    }
}

fn write_error(operation: &'static str, error: &etcd_client::Error) -> StoreError {
    match read_error(operation, error) {
        // tonic's words for a connection that was never made: the request did not leave.
        StoreError::Unavailable { operation, detail }
            if !never_sent(&detail) && !detail.contains("too many requests") =>
        {
            StoreError::Uncertain { operation, detail }
        }
        other => other,
    }
}

fn never_sent(detail: &str) -> bool {
    detail.contains("tcp connect error") || detail.contains("dns error") || detail.contains("not capable")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_of_ranges() {
        assert_eq!(prefix_end("/a/"), b"/a0");
        assert_eq!(after(b"/a"), b"/a\0");
        assert_eq!(prefix_end("\u{7f}"), [0x80]);
    }

    #[test]
    fn only_a_connection_that_was_never_made_is_certain() {
        let status = |code, text: &str| etcd_client::Error::GRpcStatus(tonic::Status::new(code, text));
        let refused = write_error("write", &status(Code::Unavailable, "tcp connect error"));
        assert!(matches!(refused, StoreError::Unavailable { .. }), "{refused}");
        let reset = write_error("write", &status(Code::Unavailable, "connection reset"));
        assert!(matches!(reset, StoreError::Uncertain { .. }), "{reset}");
        let unknown = write_error("write", &status(Code::Unknown, "h2 protocol error"));
        assert!(matches!(unknown, StoreError::Uncertain { .. }), "{unknown}");
        let full = write_error("write", &status(Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded"));
        assert!(matches!(full, StoreError::Full { .. }) && full.to_string().contains("--store-quota"), "{full}");
        let busy = write_error("write", &status(Code::ResourceExhausted, "etcdserver: too many requests"));
        assert!(matches!(busy, StoreError::Unavailable { .. }), "nothing was done: {busy}");
        let large = write_error("write", &status(Code::ResourceExhausted, "grpc: received message larger than max"));
        assert!(matches!(large, StoreError::TooLarge { .. }), "{large}");
        let compacted = read_error("list", &status(Code::OutOfRange, "required revision has been compacted"));
        assert!(matches!(compacted, StoreError::Compacted { .. }), "{compacted}");
    }
}
