//! The same random operations to our face and to Debian's etcd 3.4: identical answers, errors and event streams.
//!
//! `MINIPOD_DIFF_OPS` (default 4,000) says how many, `MINIPOD_DIFF_SEED` which; a failure prints both.
//!
//! What is known to differ in etcd 3.4, and is therefore not asked or not compared:
//! - the ids and the term in headers, and the header's revision in event frames: how many revisions share a frame is not agreed;
//! - the order of keys that tie in a sort of more than 12 keys: Go's sort is not stable there, ours is;
//! - a watch that starts at exactly the compacted revision: 3.4.23 has dropped a delete of that very revision
//!   (fixed in 3.4.34 and 3.5.16), we keep it;
//! - progress on request: 3.4.23 answers at once and may overtake events (fixed in 3.4.31 and 3.5.13), we wait;
//! - the order of lease ids and of a lease's keys: etcd lists leases by expiry and keys in no order;
//! - what is left of a lease, by up to two seconds of elapsed time;
//! - hashes: they cover the storage format;
//! - negative start revisions of watches, which etcd takes for very large ones.

mod common;

use common::{Etcd, Ours, Raw, Rng, WatchCreate, option, watch_cancel};
use etcd_client::proto::*;
use minipod_store::etcdapi::FaceConfig;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;
use tonic::Status;

/// What both must agree on.
type Told = Result<String, String>;

fn told<T: Debug>(answer: Result<T, Status>, clean: impl FnOnce(&mut T)) -> Told {
    match answer {
        Ok(mut answer) => {
            clean(&mut answer);
            Ok(format!("{answer:?}"))
        }
        Err(status) => Err(format!("{:?}: {}", status.code(), status.message())),
    }
}

fn only_revision(header: &mut Option<PbResponseHeader>) {
    let revision = header.as_ref().map_or(0, |header| header.revision);
    *header = Some(PbResponseHeader { revision, ..Default::default() });
}

fn clean_txn(txn: &mut PbTxnResponse) {
    only_revision(&mut txn.header);
    for op in &mut txn.responses {
        match &mut op.response {
            Some(PbTxnOpResponse::ResponseRange(range)) => only_revision(&mut range.header),
            Some(PbTxnOpResponse::ResponsePut(put)) => only_revision(&mut put.header),
            Some(PbTxnOpResponse::ResponseDeleteRange(delete)) => only_revision(&mut delete.header),
            Some(PbTxnOpResponse::ResponseTxn(txn)) => clean_txn(txn),
            None => {}
        }
    }
}

/// What a stream has received, by watch.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Received {
    created: Vec<String>,
    events: BTreeMap<i64, Vec<String>>,
    canceled: Vec<(i64, i64)>,
    failed: Option<String>,
}

/// One client's watch stream on one server.
struct Stream {
    requests: Sender<PbWatchRequest>,
    received: Arc<Mutex<Received>>,
    reader: tokio::task::JoinHandle<()>,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn event(event: &PbEvent) -> String {
    let kv = |kv: &PbKeyValue| {
        let (key, value) = (kv.key.escape_ascii(), kv.value.escape_ascii());
        format!("{key}={value} c{} m{} v{} l{}", kv.create_revision, kv.mod_revision, kv.version, kv.lease)
    };
    let previous = event.prev_kv.as_ref().map(|previous| format!(" was {}", kv(previous))).unwrap_or_default();
    format!("{} {}{previous}", event.r#type, event.kv.as_ref().map(kv).unwrap_or_default())
}

impl Stream {
    async fn open(client: &Raw, first: &WatchCreate) -> Self {
        let received = Arc::new(Mutex::new(Received::default()));
        // etcd answers the stream's headers with the first answer, so the first request goes ahead of them.
        let (requests, receiver) = tokio::sync::mpsc::channel(64);
        requests.send(first.request()).await.unwrap();
        let (client, into) = (client.clone(), Arc::clone(&received));
        let reader = tokio::spawn(async move {
            if let Err(status) = Self::read(client, receiver, &into).await {
                into.lock().unwrap().failed = Some(status.to_string());
            }
        });
        Self { requests, received, reader }
    }

    async fn read(
        client: Raw,
        receiver: tokio::sync::mpsc::Receiver<PbWatchRequest>,
        into: &Mutex<Received>,
    ) -> Result<(), Status> {
        let mut answers = client.watch_with(receiver).await?;
        while let Some(answer) = answers.message().await? {
            let mut received = into.lock().unwrap();
            let (id, revision) = (answer.watch_id, answer.header.as_ref().map_or(0, |header| header.revision));
            if answer.created {
                let told = format!("{id} at {revision}, refused: {} {:?}", answer.canceled, answer.cancel_reason);
                received.created.push(told);
            } else if answer.canceled {
                received.canceled.push((id, answer.compact_revision));
            }
            received.events.entry(id).or_default().extend(answer.events.iter().map(event));
        }
        Ok(())
    }

    fn received(&self) -> Received {
        let mut received = self.received.lock().unwrap().clone();
        received.events.retain(|_, events| !events.is_empty());
        received.canceled.sort_unstable();
        received
    }
}

struct Pair {
    ours: Stream,
    etcd: Stream,
    asked: usize,
    /// Ids that a client may cancel.
    ids: Vec<i64>,
    cancels: usize,
}

struct Run {
    rng: Rng,
    ours: Ours,
    etcd: Etcd,
    revision: i64,
    compacted: i64,
    leases: Vec<i64>,
    pairs: Vec<Pair>,
    counts: BTreeMap<&'static str, u64>,
    done: Vec<String>,
}

const KEYS_PER_PREFIX: u64 = 12;
const WAIT: Duration = Duration::from_secs(20);

macro_rules! both {
    ($run:ident, $method:ident, $request:expr, $clean:expr) => {{
        let request = $request;
        let (ours, etcd) = tokio::join!($run.ours.client.$method(&request), $run.etcd.client.$method(&request));
        if let Ok(answer) = &ours {
            $run.revision = answer.header.as_ref().map_or($run.revision, |header| header.revision.max($run.revision));
        }
        let is_ok = ours.is_ok();
        let (ours, etcd) = (told(ours, $clean), told(etcd, $clean));
        $run.compare(stringify!($method), &request, ours, etcd);
        is_ok
    }};
}

impl Run {
    fn compare(&mut self, method: &'static str, request: &impl Debug, ours: Told, etcd: Told) {
        *self.counts.entry(method).or_default() += 1;
        let told = format!(
            "{method} {request:?}\n   -> {}",
            match &ours {
                Ok(answer) | Err(answer) => answer,
            }
        );
        self.done.push(told);
        if ours != etcd {
            self.fail(&format!("answers differ\n ours: {ours:?}\n etcd: {etcd:?}"));
        }
    }

    fn fail(&self, what: &str) -> ! {
        let recent = self.done.iter().rev().take(6).rev();
        panic!("{what}\n the last operations:\n{}", recent.map(String::as_str).collect::<Vec<_>>().join("\n"));
    }

    fn key(&mut self) -> Vec<u8> {
        if self.rng.one_in(200) {
            return Vec::new();
        }
        let prefix = if self.rng.one_in(2) { 'a' } else { 'b' };
        format!("{prefix}{:02}", self.rng.below(KEYS_PER_PREFIX)).into_bytes()
    }

    fn keys(&mut self) -> (Vec<u8>, Vec<u8>) {
        let key = self.key();
        match self.rng.below(10) {
            0..4 => (key, Vec::new()),
            4 => (b"a".to_vec(), b"b".to_vec()),
            5 => (b"b".to_vec(), b"c".to_vec()),
            6 => (key, vec![0]),
            7 => (vec![0], vec![0]),
            _ => (key, self.key()),
        }
    }

    fn some_revision(&mut self) -> i64 {
        match self.rng.below(12) {
            0 => self.revision + 1 + self.rng.below(3) as i64,
            1 => self.compacted - 1,
            2 => self.compacted,
            _ => {
                let low = self.compacted.max(1);
                low + self.rng.below((self.revision - low + 1).unsigned_abs()) as i64
            }
        }
    }

    fn lease(&mut self) -> i64 {
        if self.leases.is_empty() || self.rng.one_in(20) {
            return self.rng.below(30) as i64 + 1;
        }
        *self.rng.pick(&self.leases)
    }

    fn range(&mut self) -> PbRangeRequest {
        let (mut key, mut range_end) = self.keys();
        let mut request = PbRangeRequest::default();
        if self.rng.one_in(3) {
            request.revision = self.some_revision();
        }
        if self.rng.one_in(3) {
            request.limit = self.rng.below(14) as i64 - 1;
        }
        if self.rng.one_in(3) {
            request.sort_order = self.rng.below(3) as i32;
            request.sort_target = self.rng.below(5) as i32;
            // More than 12 keys that tie come in an order of Go's own.
            if request.sort_target != 0 {
                (key, range_end) =
                    if self.rng.one_in(2) { (b"a".to_vec(), b"b".to_vec()) } else { (b"b".to_vec(), b"c".to_vec()) };
            }
        }
        request.keys_only = self.rng.one_in(5);
        request.count_only = self.rng.one_in(8);
        request.serializable = self.rng.one_in(3);
        if self.rng.one_in(4) {
            for bound in [
                &mut request.min_mod_revision,
                &mut request.max_mod_revision,
                &mut request.min_create_revision,
                &mut request.max_create_revision,
            ] {
                if self.rng.one_in(2) {
                    *bound = self.rng.below(self.revision.unsigned_abs() + 2) as i64;
                }
            }
        }
        PbRangeRequest { key, range_end, ..request }
    }

    fn put(&mut self) -> PbPutRequest {
        let mut request = PbPutRequest { key: self.key(), ..Default::default() };
        if !self.rng.one_in(12) {
            request.value = format!("v{}", self.rng.below(20)).into_bytes();
        }
        if self.rng.one_in(5) {
            request.lease = self.lease();
        }
        request.prev_kv = self.rng.one_in(3);
        if self.rng.one_in(12) {
            request.ignore_value = true;
            if !self.rng.one_in(5) {
                request.value = Vec::new();
            }
        }
        if self.rng.one_in(12) {
            request.ignore_lease = true;
            if !self.rng.one_in(5) {
                request.lease = 0;
            }
        }
        request
    }

    fn delete(&mut self) -> PbDeleteRequest {
        let (key, range_end) = if self.rng.one_in(4) { self.keys() } else { (self.key(), Vec::new()) };
        PbDeleteRequest { key, range_end, prev_kv: self.rng.one_in(2) }
    }

    fn compare_op(&mut self) -> PbCompare {
        let (key, range_end) = if self.rng.one_in(4) { self.keys() } else { (self.key(), Vec::new()) };
        let number = match self.rng.below(4) {
            0 => 0,
            1 => 1 + self.rng.below(3) as i64,
            _ => self.some_revision(),
        };
        let lease = self.lease();
        let target = self.rng.below(5) as i32;
        // Now and then the value does not belong to the target.
        let union = if self.rng.one_in(15) { self.rng.below(6) as i32 } else { target };
        let target_union = match union {
            0 => Some(PbTargetUnion::Version(number.min(4))),
            1 => Some(PbTargetUnion::CreateRevision(number)),
            2 => Some(PbTargetUnion::ModRevision(number)),
            3 => Some(PbTargetUnion::Value(format!("v{}", self.rng.below(20)).into_bytes())),
            4 => Some(PbTargetUnion::Lease(if self.rng.one_in(2) { 0 } else { lease })),
            _ => None,
        };
        PbCompare { result: self.rng.below(4) as i32, target, key, range_end, target_union }
    }

    fn txn(&mut self, depth: u64) -> PbTxnRequest {
        let mut txn = PbTxnRequest::default();
        for _ in 0..self.rng.below(3) {
            txn.compare.push(self.compare_op());
        }
        let only_reads = self.rng.one_in(5);
        for branch in 0..2 {
            for _ in 0..self.rng.below(5) {
                let request = match self.rng.below(12) {
                    _ if only_reads => Some(PbTxnOpRequest::RequestRange(self.range())),
                    0..4 => Some(PbTxnOpRequest::RequestRange(self.range())),
                    4..8 => Some(PbTxnOpRequest::RequestPut(self.put())),
                    8..10 => Some(PbTxnOpRequest::RequestDeleteRange(self.delete())),
                    10 if depth < 2 => Some(PbTxnOpRequest::RequestTxn(self.txn(depth + 1))),
                    11 if self.rng.one_in(20) => None,
                    _ => Some(PbTxnOpRequest::RequestRange(self.range())),
                };
                let ops = if branch == 0 { &mut txn.success } else { &mut txn.failure };
                ops.push(PbTxnRequestOp { request });
            }
        }
        if self.rng.one_in(300) {
            let op = PbTxnRequestOp { request: Some(PbTxnOpRequest::RequestRange(self.range())) };
            txn.success = vec![op; 127 + self.rng.below(4) as usize];
        }
        txn
    }

    async fn step(&mut self) {
        match self.rng.below(1_000) {
            0..250 => {
                both!(self, range, self.range(), |answer: &mut PbRangeResponse| only_revision(&mut answer.header));
            }
            250..500 => {
                both!(self, put, self.put(), |answer: &mut PbPutResponse| only_revision(&mut answer.header));
            }
            500..600 => {
                both!(self, delete, self.delete(), |answer: &mut PbDeleteResponse| only_revision(&mut answer.header));
            }
            600..890 => {
                both!(self, txn, self.txn(0), clean_txn);
            }
            890..920 => self.grant().await,
            920..940 => {
                let id = self.lease();
                self.leases.retain(|other| *other != id);
                both!(self, revoke, PbLeaseRevokeRequest { id }, |answer: &mut PbLeaseRevokeResponse| {
                    only_revision(&mut answer.header);
                });
            }
            940..960 => self.look_at_leases().await,
            960..965 => self.compact().await,
            965..985 => self.watch().await,
            985..990 => self.cancel().await,
            990..992 => self.end_stream().await,
            _ => self.settle().await,
        }
    }

    async fn grant(&mut self) {
        let id = self.rng.below(30) as i64 + 1;
        let ttl = match self.rng.below(10) {
            0 => 9_000_000_001,
            1 => 9_000_000_000,
            _ => 3_600 + self.rng.below(1_000) as i64,
        };
        if both!(self, grant, PbLeaseGrantRequest { ttl, id }, |answer: &mut PbLeaseGrantResponse| only_revision(
            &mut answer.header
        )) {
            self.leases.push(id);
        }
    }

    async fn look_at_leases(&mut self) {
        if self.rng.one_in(4) {
            both!(self, leases, PbLeaseLeasesRequest::default(), |answer: &mut PbLeaseLeasesResponse| {
                only_revision(&mut answer.header);
                answer.leases.sort_by_key(|lease| lease.id);
            });
            return;
        }
        let request = PbLeaseTimeToLiveRequest { id: self.lease(), keys: self.rng.one_in(2) };
        let (ours, etcd) = tokio::join!(self.ours.client.ttl(&request), self.etcd.client.ttl(&request));
        if let (Ok(ours), Ok(etcd)) = (&ours, &etcd) {
            assert!((ours.ttl - etcd.ttl).abs() <= 2, "time to live: ours {}, etcd {}", ours.ttl, etcd.ttl);
        }
        let clean = |answer: &mut PbLeaseTimeToLiveResponse| {
            only_revision(&mut answer.header);
            answer.keys.sort();
            answer.ttl = answer.ttl.signum();
        };
        self.compare("ttl", &request, told(ours, clean), told(etcd, clean));
    }

    async fn compact(&mut self) {
        // etcd looks up what was there before when it sends an event: compacted in between, it is not found.
        self.settle().await;
        let revision = if self.rng.one_in(3) {
            self.some_revision()
        } else {
            self.compacted.max(0) + self.rng.below((self.revision - self.compacted.max(0) + 1).unsigned_abs()) as i64
        };
        let request = PbCompactionRequest { revision, physical: self.rng.one_in(3) };
        if both!(self, compact, request, |answer: &mut PbCompactionResponse| only_revision(&mut answer.header)) {
            self.compacted = revision;
        }
    }

    async fn watch(&mut self) {
        let (key, range_end) = self.keys();
        let mut create = WatchCreate { key, range_end, ..WatchCreate::default() };
        create.start_revision = match self.rng.below(4) {
            0 => 0,
            1 => self.revision + 1 + self.rng.below(20) as i64,
            _ => self.some_revision().max(1),
        };
        if create.start_revision == self.compacted {
            create.start_revision += 1;
        }
        create.prev_kv = self.rng.one_in(2);
        create.fragment = self.rng.one_in(4);
        if self.rng.one_in(4) {
            create.filters = vec![self.rng.below(2) as i64];
        }
        if self.rng.one_in(4) {
            create.watch_id = self.rng.below(6) as i64;
        }
        if self.pairs.is_empty() || self.pairs.len() < 4 && self.rng.one_in(3) {
            let ours = Stream::open(&self.ours.client, &create).await;
            let etcd = Stream::open(&self.etcd.client, &create).await;
            self.pairs.push(Pair { ours, etcd, asked: 1, ids: Vec::new(), cancels: 0 });
        } else {
            let index = self.rng.below(self.pairs.len() as u64) as usize;
            let pair = &mut self.pairs[index];
            if pair.asked >= 12 {
                return;
            }
            pair.asked += 1;
            pair.ours.requests.send(create.request()).await.unwrap();
            pair.etcd.requests.send(create.request()).await.unwrap();
        }
        *self.counts.entry("watch").or_default() += 1;
        self.done.push(format!("{create:?}"));
        self.await_answers().await;
        for pair in &mut self.pairs {
            let ids = pair.ours.received.lock().unwrap().created.clone();
            pair.ids =
                ids.iter().filter_map(|told| told.split(' ').next()?.parse().ok()).filter(|id| *id >= 0).collect();
        }
    }

    async fn cancel(&mut self) {
        self.settle().await;
        if self.pairs.is_empty() {
            return;
        }
        let index = self.rng.below(self.pairs.len() as u64) as usize;
        let over: Vec<i64> = self.pairs[index].ours.received().canceled.iter().map(|(id, _)| *id).collect();
        let open: Vec<i64> = self.pairs[index].ids.iter().copied().filter(|id| !over.contains(id)).collect();
        let Some(&id) = open.first() else { return };
        self.pairs[index].cancels += 1;
        for stream in [&self.pairs[index].ours, &self.pairs[index].etcd] {
            stream.requests.send(watch_cancel(id)).await.unwrap();
        }
        *self.counts.entry("cancel").or_default() += 1;
        self.settle().await;
    }

    async fn end_stream(&mut self) {
        self.settle().await;
        if !self.pairs.is_empty() {
            let index = self.rng.below(self.pairs.len() as u64) as usize;
            self.pairs.swap_remove(index);
        }
    }

    /// Waits until every watch that was asked for is answered: what comes next must not race with it.
    async fn await_answers(&self) {
        let start = Instant::now();
        for pair in &self.pairs {
            for stream in [&pair.ours, &pair.etcd] {
                loop {
                    let received = stream.received();
                    if received.created.len() >= pair.asked {
                        break;
                    }
                    if start.elapsed() > WAIT || received.failed.is_some() {
                        self.fail(&format!("a watch is not answered: {received:?}"));
                    }
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
    }

    /// Waits until both servers have told their watchers the same.
    async fn settle(&mut self) {
        let start = Instant::now();
        for pair in &self.pairs {
            loop {
                let (ours, etcd) = (pair.ours.received(), pair.etcd.received());
                if ours == etcd && ours.failed.is_none() {
                    break;
                }
                if start.elapsed() > WAIT {
                    self.fail(&format!("watch streams differ\n ours: {ours:#?}\n etcd: {etcd:#?}"));
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        self.done.drain(..self.done.len().saturating_sub(50));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ours_and_etcd_answer_alike() {
    let ops = option("MINIPOD_DIFF_OPS", 4_000);
    let seed = option("MINIPOD_DIFF_SEED", std::process::id().into());
    println!("replay with MINIPOD_DIFF_SEED={seed} MINIPOD_DIFF_OPS={ops}");
    let (ours, etcd) = (Ours::start(FaceConfig::default()).await, Etcd::start().await);
    let (leases, pairs, done) = (Vec::new(), Vec::new(), Vec::new());
    let counts = BTreeMap::new();
    let mut run = Run { rng: Rng(seed), ours, etcd, revision: 1, compacted: -1, leases, pairs, counts, done };
    let start = Instant::now();
    for _ in 0..ops {
        run.step().await;
    }
    run.settle().await;
    // What comes too much comes late.
    tokio::time::sleep(Duration::from_millis(300)).await;
    run.settle().await;
    println!(
        "{ops} operations in {:.1} s up to revision {}: {:?}",
        start.elapsed().as_secs_f64(),
        run.revision,
        run.counts
    );
}
