//! The same random operations to ours and to Debian's etcd 3.4: identical answers, errors and event streams.
//!
//! Once with the face over a replica that is memory only, once with the whole store on a disk. `MINIPOD_DIFF_OPS` (default
//! 3,000) says how many, `MINIPOD_DIFF_SEED` which; a failure prints both.
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
//! - a transaction that removes a key with a delete "from key on" and then puts it keeping value or lease: etcd panics;
//! - negative start revisions of watches, which etcd takes for very large ones.

mod common;

use common::requests::Requests;
use common::{Etcd, Ours, Raw, WatchCreate, Whole, option, watch_cancel};
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
}

struct Run {
    make: Requests,
    ours: Raw,
    /// How many watches of ours have not caught up.
    lagging: Box<dyn Fn() -> usize>,
    etcd: Etcd,
    pairs: Vec<Pair>,
    counts: BTreeMap<&'static str, u64>,
    done: Vec<String>,
}

/// A key that every stream watches, under an id of its own.
const MARK: &[u8] = b"~mark";
const MARK_ID: i64 = 1_000;

const WAIT: Duration = Duration::from_secs(20);

macro_rules! both {
    ($run:ident, $method:ident, $request:expr, $clean:expr) => {{
        let request = $request;
        let (ours, etcd) = tokio::join!($run.ours.$method(&request), $run.etcd.client.$method(&request));
        if let Ok(answer) = &ours {
            $run.make.revision =
                answer.header.as_ref().map_or($run.make.revision, |header| header.revision.max($run.make.revision));
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

    async fn step(&mut self) {
        match self.make.rng.below(1_000) {
            0..250 => {
                both!(self, range, self.make.range(), |answer: &mut PbRangeResponse| only_revision(&mut answer.header));
            }
            250..500 => {
                both!(self, put, self.make.put(), |answer: &mut PbPutResponse| only_revision(&mut answer.header));
            }
            500..560 => {
                both!(self, delete, self.make.delete(), |answer: &mut PbDeleteResponse| only_revision(
                    &mut answer.header
                ));
            }
            560..890 => {
                both!(self, txn, self.make.txn(), clean_txn);
            }
            890..920 => self.grant().await,
            920..940 => {
                let id = self.make.lease();
                self.make.leases.retain(|other| *other != id);
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
        let id = self.make.rng.below(30) as i64 + 1;
        let ttl = match self.make.rng.below(10) {
            0 => 9_000_000_001,
            1 => 9_000_000_000,
            _ => 3_600 + self.make.rng.below(1_000) as i64,
        };
        if both!(self, grant, PbLeaseGrantRequest { ttl, id }, |answer: &mut PbLeaseGrantResponse| only_revision(
            &mut answer.header
        )) {
            self.make.leases.push(id);
        }
    }

    async fn look_at_leases(&mut self) {
        if self.make.rng.one_in(4) {
            both!(self, leases, PbLeaseLeasesRequest::default(), |answer: &mut PbLeaseLeasesResponse| {
                only_revision(&mut answer.header);
                answer.leases.sort_by_key(|lease| lease.id);
            });
            return;
        }
        let request = PbLeaseTimeToLiveRequest { id: self.make.lease(), keys: self.make.rng.one_in(2) };
        let (ours, etcd) = tokio::join!(self.ours.ttl(&request), self.etcd.client.ttl(&request));
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
        // A watch that etcd has not come round to yet would be told that its start is compacted away.
        let start = Instant::now();
        while self.etcd.lagging().await > 0 {
            if start.elapsed() > WAIT {
                self.fail("a watch of etcd does not catch up");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let revision = if self.make.rng.one_in(3) {
            self.make.some_revision()
        } else {
            self.make.compacted.max(0)
                + self.make.rng.below((self.make.revision - self.make.compacted.max(0) + 1).unsigned_abs()) as i64
        };
        let request = PbCompactionRequest { revision, physical: self.make.rng.one_in(3) };
        if both!(self, compact, request, |answer: &mut PbCompactionResponse| only_revision(&mut answer.header)) {
            self.make.compacted = revision;
        }
    }

    async fn watch(&mut self) {
        let (key, range_end) = self.make.keys();
        let mut create = WatchCreate { key, range_end, ..WatchCreate::default() };
        create.start_revision = match self.make.rng.below(4) {
            0 => 0,
            1 => self.make.revision + 1 + self.make.rng.below(20) as i64,
            _ => self.make.some_revision().max(1),
        };
        if create.start_revision == self.make.compacted {
            create.start_revision += 1;
        }
        create.prev_kv = self.make.rng.one_in(2);
        create.fragment = self.make.rng.one_in(4);
        if self.make.rng.one_in(4) {
            create.filters = vec![self.make.rng.below(2) as i64];
        }
        if self.make.rng.one_in(4) {
            create.watch_id = self.make.rng.below(6) as i64;
        }
        if self.pairs.is_empty() || self.pairs.len() < 4 && self.make.rng.one_in(3) {
            let mark = WatchCreate { key: MARK.to_vec(), watch_id: MARK_ID, ..WatchCreate::default() };
            let ours = Stream::open(&self.ours, &mark).await;
            let etcd = Stream::open(&self.etcd.client, &mark).await;
            ours.requests.send(create.request()).await.unwrap();
            etcd.requests.send(create.request()).await.unwrap();
            self.pairs.push(Pair { ours, etcd, asked: 2, ids: Vec::new() });
        } else {
            let index = self.make.rng.below(self.pairs.len() as u64) as usize;
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
            pair.ids = ids
                .iter()
                .filter_map(|told| told.split(' ').next()?.parse().ok())
                .filter(|id| (0..MARK_ID).contains(id))
                .collect();
        }
    }

    async fn cancel(&mut self) {
        self.settle().await;
        if self.pairs.is_empty() {
            return;
        }
        let index = self.make.rng.below(self.pairs.len() as u64) as usize;
        let over: Vec<i64> = self.pairs[index].ours.received().canceled.iter().map(|(id, _)| *id).collect();
        let open: Vec<i64> = self.pairs[index].ids.iter().copied().filter(|id| !over.contains(id)).collect();
        let Some(&id) = open.first() else { return };
        for stream in [&self.pairs[index].ours, &self.pairs[index].etcd] {
            stream.requests.send(watch_cancel(id)).await.unwrap();
        }
        *self.counts.entry("cancel").or_default() += 1;
        let start = Instant::now();
        for stream in [&self.pairs[index].ours, &self.pairs[index].etcd] {
            while !stream.received().canceled.contains(&(id, 0)) {
                if start.elapsed() > WAIT {
                    self.fail(&format!("the end of watch {id} is not told: {:#?}", stream.received()));
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        self.settle().await;
    }

    async fn end_stream(&mut self) {
        self.settle().await;
        if !self.pairs.is_empty() {
            let index = self.make.rng.below(self.pairs.len() as u64) as usize;
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

    /// Waits until ours has told its watchers everything, and etcd the same. Two streams that are equally far behind
    /// would be equal too, so a write to a key that every stream watches marks the end.
    async fn settle(&mut self) {
        let start = Instant::now();
        while (self.lagging)() > 0 {
            if start.elapsed() > WAIT {
                self.fail("a watch of ours does not catch up");
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mark = PbPutRequest { key: MARK.to_vec(), ..Default::default() };
        both!(self, put, mark, |answer: &mut PbPutResponse| only_revision(&mut answer.header));
        let marked = format!(" m{} ", self.make.revision);
        for pair in &self.pairs {
            while !pair
                .ours
                .received()
                .events
                .get(&MARK_ID)
                .is_some_and(|marks| marks.last().is_some_and(|last| last.contains(&marked)))
            {
                if start.elapsed() > WAIT {
                    self.fail(&format!("ours does not tell of the mark at {marked}: {:#?}", pair.ours.received()));
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
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

async fn compare(ops: u64, ours: Raw, lagging: Box<dyn Fn() -> usize>) {
    let seed = option("MINIPOD_DIFF_SEED", std::process::id().into());
    println!("replay with MINIPOD_DIFF_SEED={seed} MINIPOD_DIFF_OPS={ops}");
    let (etcd, counts) = (Etcd::start().await, BTreeMap::new());
    let mut run = Run { make: Requests::new(seed), ours, lagging, etcd, pairs: Vec::new(), counts, done: Vec::new() };
    let start = Instant::now();
    for done in 1..=ops {
        run.step().await;
        if done % 10_000 == 0 {
            println!("{done} operations alike after {:.0} s", start.elapsed().as_secs_f64());
        }
    }
    run.settle().await;
    // What comes too much comes late.
    tokio::time::sleep(Duration::from_millis(300)).await;
    run.settle().await;
    let (seconds, revision) = (start.elapsed().as_secs_f64(), run.make.revision);
    println!("{ops} operations in {seconds:.1} s up to revision {revision}: {:?}", run.counts);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn face_and_etcd_answer_alike() {
    let ours = Ours::start(FaceConfig::default()).await;
    let watches = Arc::clone(ours.face.watches());
    compare(option("MINIPOD_DIFF_OPS", 3_000), ours.client.clone(), Box::new(move || watches.watchers().1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whole_store_and_etcd_answer_alike() {
    let whole = Whole::start().await;
    let client = whole.client.clone();
    compare(option("MINIPOD_DIFF_OPS", 3_000), client, Box::new(move || whole.store.watchers().1)).await;
}
