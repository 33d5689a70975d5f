//! The state machine and the watch hub against a model that keeps every revision as a whole map; seeded.
//!
//! `MINIPOD_MODEL_SEEDS` (default 60) says how many runs; a failure names its seed, `MINIPOD_MODEL_SEED` replays it alone.

mod common;

use common::model::{Change, Model};
use common::option;
use common::requests::Requests;
use etcd_client::proto::*;
use minipod_store::etcdapi::check;
use minipod_store::machine::{Machine, Outcome};
use minipod_store::mvcc::Store;
use minipod_store::state::{Kind, StateMachine, number_command, request_command};
use minipod_store::watch::hub::{Hub, Planted};
use minipod_store::watch::outbox::{Frame, Outbox, What};
use minipod_store::wire::{self, Txn, WatchCreate};
use prost::Message;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

fn for_each_seed(run: impl Fn(u64)) {
    let only = option("MINIPOD_MODEL_SEED", 0);
    let seeds = if only == 0 { 1..=option("MINIPOD_MODEL_SEEDS", 60) } else { only..=only };
    for seed in seeds {
        println!("MINIPOD_MODEL_SEED={seed}");
        run(seed);
    }
}

/// A machine and its model, which go through the same requests.
struct Twins {
    make: Requests,
    machine: StateMachine,
    model: Model,
    index: u64,
}

fn is_valid_put(put: &PbPutRequest) -> bool {
    check::put(&wire::Put::decode(&put.encode_to_vec()).unwrap()).is_ok()
}

impl Twins {
    fn new(seed: u64) -> Self {
        Self { make: Requests::new(seed), machine: StateMachine::new(), model: Model::default(), index: 0 }
    }

    fn apply(&mut self, command: &[u8]) -> Outcome {
        self.index += 1;
        self.machine.apply(self.index, command)
    }

    fn request(&mut self, kind: Kind, request: &impl Message) -> Outcome {
        self.apply(&request_command(kind, &request.encode_to_vec()))
    }

    fn change(&mut self) {
        match self.make.rng.below(100) {
            0..40 => {
                let put = self.make.put();
                if is_valid_put(&put) {
                    let outcome = self.request(Kind::Put, &put);
                    assert_eq!(outcome.result.is_ok(), self.model.put(&put).is_ok(), "{put:?}: {outcome:?}");
                }
            }
            40..50 => {
                let delete = self.make.delete();
                if !delete.key.is_empty() {
                    let outcome = self.request(Kind::DeleteRange, &delete);
                    let answer = PbDeleteResponse::decode(outcome.result.unwrap()).unwrap();
                    assert_eq!(answer.deleted, self.model.delete(&delete), "{delete:?}");
                }
            }
            50..85 => self.txn(),
            85..90 => {
                let (id, ttl) = (self.make.rng.below(30) as i64 + 1, self.make.rng.below(9_100_000_000) as i64);
                let outcome = self.apply(&number_command(Kind::LeaseGrant, [id, ttl]));
                assert_eq!(outcome.result.is_ok(), self.model.grant(id, ttl).is_ok(), "grant {id} for {ttl} s");
                if outcome.result.is_ok() {
                    self.make.leases.push(id);
                }
            }
            90..94 => self.end_leases(),
            94..96 => {
                let revision = self.make.some_revision();
                let outcome = self.request(Kind::Compact, &PbCompactionRequest { revision, physical: false });
                assert_eq!(outcome.result.is_ok(), self.model.compact(revision).is_ok(), "compact at {revision}");
                self.make.compacted = self.model.compacted;
            }
            _ => {
                // Raft's own entries change nothing.
                self.apply(&[]);
            }
        }
        self.make.revision = self.model.revision();
        assert_eq!(self.machine.shared().read().revision(), self.model.revision());
    }

    fn txn(&mut self) {
        let request = self.make.txn();
        let bytes = request.encode_to_vec();
        if check::txn(&Txn::decode(&bytes).unwrap(), 128).is_err() {
            return;
        }
        let outcome = self.apply(&request_command(Kind::Txn, &bytes));
        let expected = self.model.txn(&request);
        match (outcome.result, expected) {
            (Ok(answer), Ok((succeeded, found))) => {
                let answer = PbTxnResponse::decode(answer).unwrap();
                let mut counts = Vec::new();
                count(&answer, &mut counts);
                assert_eq!((answer.succeeded, counts), (succeeded, found), "{request:?}");
            }
            (Err(_), Err(())) => {}
            (ours, model) => panic!("{request:?}: {ours:?}, the model {model:?}"),
        }
    }

    fn end_leases(&mut self) {
        let id = self.make.lease();
        if self.make.rng.one_in(2) {
            let outcome = self.apply(&number_command(Kind::LeaseRevoke, [id]));
            assert_eq!(outcome.result.is_ok(), self.model.revoke(&[id]).is_ok(), "revoke {id}");
            return;
        }
        // Several run out at once; one of them was renewed in time.
        let other = self.make.lease();
        let renewed = self.make.lease();
        let epochs: Vec<i64> = {
            let shared = self.machine.shared();
            let store = shared.read();
            let epoch = |id: i64| store.leases().get(id).map_or(0, |lease| lease.epoch as i64);
            [id, other, renewed].iter().flat_map(|id| [*id, epoch(*id)]).collect()
        };
        self.apply(&number_command(Kind::LeaseRenew, [renewed]));
        self.apply(&number_command(Kind::LeaseExpire, epochs));
        let over: Vec<i64> = [id, other].into_iter().filter(|id| *id != renewed).collect();
        let _ = self.model.revoke(&over);
    }

    fn read(&mut self) {
        let request = self.make.range();
        let bytes = request.encode_to_vec();
        let ours = self.machine.shared().range(&wire::Range::decode(&bytes).unwrap());
        match (ours, self.model.range(&request)) {
            (Ok(ours), Ok((kvs, more, count))) => {
                let mut out = Vec::new();
                ours.encode(&mut out);
                let answer = PbRangeResponse::decode(&out[..]).unwrap();
                assert_eq!((answer.kvs, answer.more, answer.count), (kvs, more, count), "{request:?}");
            }
            (Err(_), Err(())) => {}
            (ours, model) => panic!("{request:?}: {ours:?}, the model {model:?}"),
        }
    }

    /// The history from the compacted revision on is what the model says.
    fn check_history(&self) {
        let shared = self.machine.shared();
        let store = shared.read();
        let from = store.compacted();
        let ours: Vec<_> =
            store.history(from).map(|v| (PbKeyValue::decode(v.encoded()).unwrap(), v.is_tombstone)).collect();
        let changes = self.model.changes.iter().filter(|change| change.kv.mod_revision >= from);
        let model: Vec<_> = changes.map(|change| (change.kv.clone(), change.is_delete)).collect();
        assert_eq!(ours, model);
        assert_eq!(store.keys(), self.model.now().len(), "the count that metrics show");
        let leases: BTreeMap<i64, i64> = store.leases().iter().map(|(id, lease)| (id, lease.ttl)).collect();
        assert_eq!(leases, self.model.leases);
        for (id, lease) in store.leases().iter() {
            let keys: Vec<&[u8]> = lease.keys.iter().map(|key| &**key).collect();
            let attached = self.model.now().values().filter(|kv| kv.lease == id);
            assert_eq!(keys, attached.map(|kv| &kv.key[..]).collect::<Vec<_>>(), "keys of lease {id}");
        }
    }
}

/// What the reads and deletes of a transaction found.
fn count(answer: &PbTxnResponse, counts: &mut Vec<i64>) {
    for op in &answer.responses {
        match &op.response {
            Some(PbTxnOpResponse::ResponseRange(range)) => counts.push(range.count),
            Some(PbTxnOpResponse::ResponseDeleteRange(delete)) => counts.push(delete.deleted),
            Some(PbTxnOpResponse::ResponseTxn(nested)) => count(nested, counts),
            _ => {}
        }
    }
}

fn restored(machine: &StateMachine) -> StateMachine {
    let mut copy = StateMachine::new();
    copy.restore(&mut machine.snapshot().map(Ok)).unwrap();
    copy
}

fn hash(machine: &StateMachine) -> (u32, i64) {
    machine.shared().read().hash(0).unwrap()
}

#[test]
fn the_machine_does_what_the_model_does() {
    for_each_seed(|seed| {
        let mut twins = Twins::new(seed);
        // Applies the same log, but is swept at other times and restarted from snapshots.
        for step in 0..1_500 {
            twins.change();
            for _ in 0..2 {
                twins.read();
            }
            if twins.make.rng.one_in(40) {
                let before = hash(&twins.machine);
                let shared = twins.machine.shared();
                shared.sweep(twins.make.rng.below(30) as usize);
                assert_eq!(hash(&twins.machine), before, "a sweep does not show");
                twins.check_history();
            }
            if step % 300 == 299 {
                let copy = restored(&twins.machine);
                assert_eq!(hash(&copy), hash(&twins.machine), "a snapshot is the state");
                twins.machine = copy;
                twins.check_history();
            }
        }
        let shared = twins.machine.shared();
        while shared.sweep(100) {}
        twins.check_history();
        let kept = shared.read().versions();
        let needed = needed(&twins.model);
        assert_eq!(kept, needed, "everything that is compacted away is freed, and nothing else");
    });
}

/// How many versions must be kept: all from the compacted revision on, and what was in force there.
fn needed(model: &Model) -> usize {
    let compacted = model.compacted;
    let newer = model.changes.iter().filter(|change| change.kv.mod_revision >= compacted).count();
    if compacted < 1 {
        return newer;
    }
    newer + model.states[compacted as usize - 1].values().filter(|kv| kv.mod_revision < compacted).count()
}

#[test]
fn members_agree_whatever_they_went_through() {
    for_each_seed(|seed| {
        let mut twins = Twins::new(seed);
        let mut other = StateMachine::new();
        let mut log: Vec<Vec<u8>> = Vec::new();
        for _ in 0..600 {
            let put = PbPutRequest { key: twins.make.key(), value: vec![1; 10], ..Default::default() };
            if put.key.is_empty() {
                continue;
            }
            let command = match twins.make.rng.below(10) {
                0 => number_command(Kind::LeaseGrant, [twins.make.rng.below(20) as i64 + 1, 100]),
                1 => number_command(Kind::LeaseRenew, [twins.make.rng.below(20) as i64 + 1]),
                2 => number_command(
                    Kind::LeaseExpire,
                    [twins.make.rng.below(20) as i64 + 1, twins.make.rng.below(90) as i64],
                ),
                3 if twins.make.rng.one_in(4) => {
                    let revision = twins.machine.shared().read().revision();
                    request_command(Kind::Compact, &PbCompactionRequest { revision, physical: false }.encode_to_vec())
                }
                _ => {
                    let lease = twins.make.rng.below(20) as i64;
                    request_command(Kind::Put, &PbPutRequest { lease, ..put }.encode_to_vec())
                }
            };
            log.push(command.to_vec());
            let outcome = twins.apply(&command);
            let index = other.applied() + 1;
            assert_eq!(other.apply(index, &command), outcome);
            if twins.make.rng.one_in(50) {
                other.shared().sweep(twins.make.rng.below(100) as usize);
            }
            if twins.make.rng.one_in(100) {
                other = restored(&other);
            }
            assert_eq!(hash(&other), hash(&twins.machine));
        }
        let (ours, theirs) = (twins.machine.shared(), other.shared());
        while ours.sweep(1_000) {}
        while theirs.sweep(1_000) {}
        assert_eq!(snapshot(&twins.machine), snapshot(&other), "byte for byte");
    });
}

fn snapshot(machine: &StateMachine) -> Vec<bytes::Bytes> {
    machine.snapshot().collect()
}

#[test]
fn a_broken_snapshot_is_refused_and_changes_nothing() {
    let mut twins = Twins::new(5);
    for _ in 0..300 {
        twins.change();
    }
    let whole = snapshot(&twins.machine);
    let mut target = restored(&twins.machine);
    let before = hash(&target);
    let mut rng = common::Rng(9);
    let mut refused = 0;
    for _ in 0..500 {
        let mut broken: Vec<Vec<u8>> = whole.iter().map(|chunk| chunk.to_vec()).collect();
        let chunk = rng.below(broken.len() as u64) as usize;
        match rng.below(3) {
            0 => {
                let len = rng.below(broken[chunk].len() as u64) as usize;
                broken[chunk].truncate(len);
            }
            1 => {
                broken.truncate(chunk);
            }
            _ => broken[chunk].push(0),
        }
        // A chunk of whole entries that is cut between two of them is noticed at the end.
        let error = target.restore(&mut broken.into_iter().map(|chunk| Ok(chunk.into()))).err();
        refused += u32::from(error.is_some());
        if error.is_some() {
            assert_eq!(hash(&target), before);
        }
    }
    assert!(
        refused > 490,
        "cutting a chunk of leases or alarms between two entries may pass, {refused} of 500 did not"
    );
}

/// One watcher's view in the test of the hub.
struct Watching {
    key: Vec<u8>,
    range_end: Vec<u8>,
    next: i64,
    no_put: bool,
    no_delete: bool,
    prev_kv: bool,
    fragment: bool,
    created: bool,
    over: bool,
}

struct Client {
    stream: u64,
    outbox: Arc<Outbox>,
    watching: BTreeMap<i64, Watching>,
}

fn pop(outbox: &Outbox) -> Option<Frame> {
    match outbox.poll_pop(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Some((frame, _))) => Some(frame),
        _ => None,
    }
}

impl Watching {
    fn wants(&self, change: &Change) -> bool {
        let key = &change.kv.key[..];
        let inside = match &self.range_end[..] {
            [] => key == self.key,
            [0] => key >= &self.key[..],
            end => key >= &self.key[..] && key < end,
        };
        inside && change.kv.mod_revision >= self.next && !(if change.is_delete { self.no_delete } else { self.no_put })
    }

    /// The model's events from `next` up to a revision.
    fn expected(&self, model: &Model, through: i64) -> Vec<Change> {
        let wanted = model.changes.iter().filter(|change| change.kv.mod_revision <= through && self.wants(change));
        wanted.cloned().collect()
    }
}

fn decode_events(events: &[bytes::Bytes]) -> Vec<PbEvent> {
    let encoded: Vec<u8> = events.iter().flat_map(|event| event.to_vec()).collect();
    PbWatchResponse::decode(&encoded[..]).unwrap().events
}

/// A run of the hub: every frame is held against the model as it is taken.
struct HubRun {
    twins: Twins,
    hub: Hub,
    clients: Vec<Client>,
    restores: u64,
    seen: BTreeMap<&'static str, u64>,
}

impl HubRun {
    fn store<T>(&self, with: impl FnOnce(&Store) -> T) -> T {
        with(&self.twins.machine.shared().read())
    }

    fn step(&mut self) {
        match self.twins.make.rng.below(100) {
            0..45 => self.twins.change(),
            45..60 => {
                let batch = self.twins.machine.shared();
                let batch = self.hub.next_batch(&batch.read(), self.restores);
                if let Some(batch) = batch {
                    self.hub.deliver(batch);
                }
            }
            60..70 => {
                let shared = self.twins.machine.shared();
                let batch = self.hub.next_replay(&shared.read());
                if let Some(batch) = batch {
                    self.hub.replay(batch);
                }
            }
            70..80 => {
                // As the hub's thread does it: nothing that it has not handed out is freed.
                let shared = self.twins.machine.shared();
                if shared.read().compacted() <= self.hub.position() + 1 {
                    shared.sweep(self.twins.make.rng.below(50) as usize);
                }
            }
            80..84 => self.create(),
            84..86 => {
                if let Some(client) = self.clients.first() {
                    let id = client.watching.keys().next().copied().unwrap_or(0);
                    let revision = self.twins.model.revision();
                    self.hub.cancel(client.stream, id, revision);
                }
            }
            86..88 => {
                let index = self.twins.make.rng.below(self.clients.len() as u64 + 1) as usize;
                if let Some(client) = self.clients.get(index) {
                    self.hub.request_progress(client.stream);
                }
            }
            88 => {
                self.twins.machine = restored(&self.twins.machine);
                // A snapshot from another member that is ahead: what came in between was never seen here.
                for _ in 0..self.twins.make.rng.below(20) {
                    self.twins.change();
                }
                while self.twins.machine.shared().sweep(1_000) {}
                self.restores += 1;
            }
            89 => self.hub.notify_progress(),
            90..92 => {
                // Only after everything new was handed out, as the hub's thread does it.
                let shared = self.twins.machine.shared();
                if self.hub.next_batch(&shared.read(), self.restores).is_none() {
                    self.hub.answer_progress();
                }
            }
            _ => {
                let index = self.twins.make.rng.below(self.clients.len() as u64 + 1) as usize;
                for _ in 0..self.twins.make.rng.below(6) {
                    self.take(index);
                }
            }
        }
    }

    fn create(&mut self) {
        let make = &mut self.twins.make;
        if self.clients.len() < 3 {
            let outbox = Arc::new(Outbox::bounded(2_000, 4));
            let stream = self.hub.open(Arc::clone(&outbox));
            self.clients.push(Client { stream, outbox, watching: BTreeMap::new() });
        }
        let index = make.rng.below(self.clients.len() as u64) as usize;
        let client = &mut self.clients[index];
        if client.watching.len() > 6 {
            return;
        }
        let (key, range_end) = make.keys();
        let key = if key.is_empty() { vec![0] } else { key };
        if range_end.len() > 1 && key >= range_end {
            return;
        }
        let start = if make.rng.one_in(3) { 0 } else { make.some_revision().max(1) };
        let [no_put, no_delete, prev_kv, fragment] = [5, 5, 2, 3].map(|n| make.rng.one_in(n));
        let create = WatchCreate {
            key: &key,
            range_end: &range_end,
            start_revision: start,
            no_put,
            no_delete,
            prev_kv,
            fragment,
            progress_notify: true,
            ..WatchCreate::default()
        };
        let revision = self.twins.model.revision();
        self.hub.create(client.stream, &create, revision);
        // Ids count up per stream and are never reused without a client's wish.
        let id = client.watching.len() as i64;
        let next = if start == 0 { revision + 1 } else { start };
        let watching =
            Watching { key, range_end, next, no_put, no_delete, prev_kv, fragment, created: false, over: false };
        client.watching.insert(id, watching);
    }

    /// Takes one frame of a client and holds it against the model.
    fn take(&mut self, index: usize) {
        let Some(client) = self.clients.get_mut(index) else { return };
        let Some(frame) = pop(&client.outbox) else { return };
        let model = &self.twins.model;
        match frame.what {
            What::Created { refused } => {
                assert_eq!(refused, None);
                client.watching.get_mut(&frame.watch_id).unwrap().created = true;
            }
            What::Canceled { compact_revision } => {
                let watching = client.watching.get_mut(&frame.watch_id).unwrap();
                if compact_revision != 0 {
                    *self.seen.entry("compacted").or_default() += 1;
                    assert!(watching.next < compact_revision, "{} is still there", watching.next);
                }
                watching.over = true;
            }
            What::Progress => {
                *self.seen.entry("progress").or_default() += 1;
                for (id, watching) in &client.watching {
                    if (frame.watch_id == -1 || frame.watch_id == *id) && watching.created && !watching.over {
                        let missing = watching.expected(model, frame.revision);
                        assert_eq!(missing, [], "progress to {} overtook events of watch {id}", frame.revision);
                    }
                }
            }
            What::Events { events, fragment } => {
                *self.seen.entry("frames").or_default() += 1;
                let watching = client.watching.get_mut(&frame.watch_id).unwrap();
                assert!(!watching.over, "an event after the end");
                let expected = watching.expected(model, i64::MAX);
                let got = decode_events(&events);
                assert!(got.len() <= expected.len());
                for (got, expected) in got.iter().zip(&expected) {
                    assert_eq!(got.kv.as_ref(), Some(&expected.kv));
                    assert_eq!(got.r#type == 1, expected.is_delete);
                    let past = expected.kv.mod_revision - 1;
                    match &got.prev_kv {
                        Some(_) => assert!(watching.prev_kv && got.prev_kv == expected.previous),
                        None => assert!(!watching.prev_kv || expected.previous.is_none() || past < model.compacted),
                    }
                }
                let last = got.last().unwrap().kv.as_ref().unwrap().mod_revision;
                let ends_inside = expected.get(got.len()).is_some_and(|next| next.kv.mod_revision == last);
                assert!(!ends_inside || watching.fragment && fragment, "revision {last} is split");
                assert!(last <= frame.revision);
                if fragment {
                    *self.seen.entry("fragments").or_default() += 1;
                    self.pending_fragments(index, frame.watch_id, got.len());
                } else {
                    watching.next = frame.revision + 1;
                }
            }
        }
    }

    /// Fragments of one frame come one after the other: take the rest of them, which complete what the first began.
    fn pending_fragments(&mut self, index: usize, id: i64, mut had: usize) {
        let client = &mut self.clients[index];
        let watching = client.watching.get_mut(&id).unwrap();
        let expected = watching.expected(&self.twins.model, i64::MAX);
        loop {
            let frame = pop(&client.outbox).expect("the fragments of a frame are queued together");
            assert_eq!(frame.watch_id, id);
            let What::Events { events, fragment } = frame.what else { panic!("{frame:?} amid fragments") };
            for event in decode_events(&events) {
                assert_eq!(event.kv.as_ref(), Some(&expected[had].kv));
                had += 1;
            }
            if !fragment {
                watching.next = frame.revision + 1;
                return;
            }
        }
    }
}

impl HubRun {
    fn new(seed: u64) -> Self {
        let hub = Hub::new(1, 0, 200);
        Self { twins: Twins::new(seed), hub, clients: Vec::new(), restores: 0, seen: BTreeMap::new() }
    }

    fn run(&mut self) {
        for _ in 0..4_000 {
            self.step();
        }
        // In the end everyone has seen everything, or was told that it is gone.
        for _ in 0..2_000 {
            let shared = self.twins.machine.shared();
            let batch = self.hub.next_batch(&shared.read(), self.restores);
            if let Some(batch) = batch {
                self.hub.deliver(batch);
            }
            let batch = self.hub.next_replay(&shared.read());
            if let Some(batch) = batch {
                self.hub.replay(batch);
            }
            for index in 0..self.clients.len() {
                self.take(index);
            }
        }
        assert_eq!(self.hub.position(), self.store(Store::revision));
        for client in &self.clients {
            for (id, watching) in client.watching.iter().filter(|(_, watching)| !watching.over) {
                assert_eq!(watching.expected(&self.twins.model, i64::MAX), [], "watch {id} misses events");
            }
        }
    }
}

#[test]
fn watchers_see_what_the_model_saw() {
    let all = std::cell::RefCell::new(BTreeMap::<&str, u64>::new());
    for_each_seed(|seed| {
        let mut run = HubRun::new(seed);
        run.run();
        for (what, times) in run.seen {
            *all.borrow_mut().entry(what).or_default() += times;
        }
    });
    let all = all.into_inner();
    println!("{all:?}");
    for what in ["frames", "fragments", "progress", "compacted"] {
        assert!(
            option("MINIPOD_MODEL_SEED", 0) != 0 || all.get(what).is_some_and(|times| *times > 20),
            "{what}: {all:?}"
        );
    }
}

/// The seed of the first run that fails, out of a few.
fn found_by(run: impl Fn(u64)) -> Option<u64> {
    (1..=20).find(|seed| std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(*seed))).is_err())
}

#[test]
fn planted_bugs_are_found() {
    for bug in
        [Planted::SkipsCompacted, Planted::ProgressOvertakes, Planted::DropsWhenFull, Planted::RepeatsAfterRestore]
    {
        let seed = found_by(|seed| {
            let mut run = HubRun::new(seed);
            run.hub.planted = Some(bug);
            run.run();
        });
        println!("{bug:?} is found by seed {seed:?}");
        assert!(seed.is_some(), "{bug:?} is not found");
    }
    let seed = found_by(|seed| {
        let mut twins = Twins::new(seed);
        twins.machine.expire_early();
        for _ in 0..1_500 {
            twins.change();
            twins.check_history();
        }
    });
    assert!(seed.is_some(), "leases that run out early are not found");
}
