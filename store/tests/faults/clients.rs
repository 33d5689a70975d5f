//! Clients that put, read, exchange, delete and lease, and remember every call.

use super::register::{Call, Op, Value};
use crate::support::rng::Rng;
use etcd_client::{Client, Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp, TxnOpResponse};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const KEYS: u64 = 6;
/// A call without an answer for so long has an unknown outcome.
const PATIENCE: Duration = Duration::from_secs(2);

/// All that clients did and saw.
#[derive(Debug, Default)]
pub struct History {
    pub calls: BTreeMap<String, Vec<Call>>,
    /// Acknowledged puts: revision, key, value.
    pub acknowledged: Vec<(i64, String, u64)>,
    /// What reads saw: the revision they speak of, key, value. Serializable ones are only here.
    pub seen: Vec<(i64, String, Value)>,
    /// When which revision is known to have been there: the time of an answer in µs, and its header's revision.
    pub reached: Vec<(u64, i64)>,
    pub unknown: u64,
}

impl History {
    /// The time in µs at which a revision was known to be there, if ever: what made it had taken effect by then.
    pub fn reached(&self) -> impl Fn(i64) -> Option<u64> + use<> {
        let mut answers = self.reached.clone();
        answers.sort_unstable();
        // Only an answer of a revision higher than all before it tells something new.
        let mut highest = 0;
        answers.retain(|(_, revision)| {
            let higher = *revision > highest;
            highest = highest.max(*revision);
            higher
        });
        move |revision| answers.get(answers.partition_point(|(_, reached)| *reached < revision)).map(|(at, _)| *at)
    }
}

/// One client of all members.
pub struct Worker {
    pub number: usize,
    pub members: Vec<Client>,
    pub rng: Rng,
    pub begun: Instant,
    pub values: Arc<AtomicU64>,
    pub history: Arc<Mutex<History>>,
    pub stop: Arc<AtomicBool>,
    /// The last value that was seen of each key.
    pub known: BTreeMap<String, u64>,
}

fn value(kvs: &[etcd_client::KeyValue]) -> Value {
    kvs.first().map(|kv| kv.value_str().expect("text").parse().expect("a number"))
}

/// An answer in time.
async fn answer<T>(call: impl Future<Output = Result<T, etcd_client::Error>>) -> Option<T> {
    tokio::time::timeout(PATIENCE, call).await.ok()?.ok()
}

impl Worker {
    fn now_us(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).expect("a short test")
    }

    fn fresh(&self) -> u64 {
        self.values.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn record(&self, key: &str, begun_us: u64, answered: bool, op: Op) {
        let ended_us = if answered { self.now_us() } else { u64::MAX };
        let mut history = self.history.lock().expect("the history");
        history.unknown += u64::from(!answered);
        let call = Call { client: self.number, begun_us, ended_us, maybe: !answered, op };
        history.calls.entry(key.to_owned()).or_default().push(call);
    }

    fn reached(&self, header: Option<&etcd_client::ResponseHeader>) -> i64 {
        let revision = header.expect("a header").revision();
        self.history.lock().expect("the history").reached.push((self.now_us(), revision));
        revision
    }

    fn acknowledged(&self, header: Option<&etcd_client::ResponseHeader>, key: &str, value: u64) {
        let revision = self.reached(header);
        self.history.lock().expect("the history").acknowledged.push((revision, key.to_owned(), value));
    }

    pub async fn run(mut self) {
        while !self.stop.load(Ordering::SeqCst) {
            let key = format!("k/{}", self.rng.below(KEYS));
            let mut member = self.members[self.rng.index(self.members.len())].clone();
            match self.rng.below(100) {
                0..30 => self.put(&mut member, &key).await,
                30..55 => self.get(&mut member, &key).await,
                55..65 => self.serializable(&mut member, &key).await,
                65..85 => self.exchange(&mut member, &key).await,
                85..90 => self.delete(&mut member, &key).await,
                90..96 => self.pair(&mut member, &key).await,
                _ => self.lease(&mut member, &key).await,
            }
            tokio::time::sleep(Duration::from_millis(4 + self.rng.below(12))).await;
        }
    }

    async fn put(&mut self, member: &mut Client, key: &str) {
        let (new, begun) = (self.fresh(), self.now_us());
        let told = answer(member.put(key, new.to_string(), None)).await;
        self.record(key, begun, told.is_some(), Op::Put(new));
        if let Some(told) = told {
            self.acknowledged(told.header(), key, new);
        }
    }

    fn saw(&mut self, told: &etcd_client::GetResponse, key: &str) -> Value {
        let seen = value(told.kvs());
        self.known.extend(seen.map(|seen| (key.to_owned(), seen)));
        let revision = self.reached(told.header());
        self.history.lock().expect("the history").seen.push((revision, key.to_owned(), seen));
        seen
    }

    async fn get(&mut self, member: &mut Client, key: &str) {
        let begun = self.now_us();
        // A read without an answer says nothing.
        if let Some(told) = answer(member.get(key, None)).await {
            let seen = self.saw(&told, key);
            self.record(key, begun, true, Op::Get(seen));
        }
    }

    async fn serializable(&mut self, member: &mut Client, key: &str) {
        if let Some(told) = answer(member.get(key, Some(GetOptions::new().with_serializable()))).await {
            self.saw(&told, key);
        }
    }

    async fn exchange(&mut self, member: &mut Client, key: &str) {
        let Some(expected) = self.known.get(key).copied() else { return self.get(member, key).await };
        let (new, begun) = (self.fresh(), self.now_us());
        let txn = Txn::new()
            .when([Compare::value(key, CompareOp::Equal, expected.to_string())])
            .and_then([TxnOp::put(key, new.to_string(), None)])
            .or_else([TxnOp::get(key, None)]);
        let Some(told) = answer(member.txn(txn)).await else {
            return self.record(key, begun, false, Op::Cas(expected, new, Ok(())));
        };
        if told.succeeded() {
            self.record(key, begun, true, Op::Cas(expected, new, Ok(())));
            self.acknowledged(told.header(), key, new);
            self.known.insert(key.to_owned(), new);
        } else if let Some(TxnOpResponse::Get(found)) = told.op_responses().into_iter().next() {
            let found = value(found.kvs());
            self.known.extend(found.map(|found| (key.to_owned(), found)));
            self.record(key, begun, true, Op::Cas(expected, new, Err(found)));
        }
    }

    async fn delete(&mut self, member: &mut Client, key: &str) {
        let begun = self.now_us();
        let told = answer(member.delete(key, None)).await;
        self.record(key, begun, told.is_some(), Op::Delete(told.map(|told| told.deleted() > 0)));
    }

    /// Two keys in one transaction, which is one revision.
    async fn pair(&mut self, member: &mut Client, key: &str) {
        let other = format!("k/{}", KEYS + self.rng.below(2));
        let (new, second, begun) = (self.fresh(), self.fresh(), self.now_us());
        let ops = [TxnOp::put(key, new.to_string(), None), TxnOp::put(&*other, second.to_string(), None)];
        let told = answer(member.txn(Txn::new().and_then(ops))).await;
        for (key, value) in [(key, new), (&*other, second)] {
            self.record(key, begun, told.is_some(), Op::Put(value));
            if let Some(told) = &told {
                self.acknowledged(told.header(), key, value);
            }
        }
    }

    /// A lease that outlives the test unless it is revoked: expiry has its own tests, with a clock that can be asked.
    async fn lease(&mut self, member: &mut Client, key: &str) {
        let Some(lease) = answer(member.lease_grant(86_400, None)).await else { return };
        let (new, begun) = (self.fresh(), self.now_us());
        let told = answer(member.put(key, new.to_string(), Some(PutOptions::new().with_lease(lease.id())))).await;
        self.record(key, begun, told.is_some(), Op::Put(new));
        if let Some(told) = told {
            self.acknowledged(told.header(), key, new);
        }
        tokio::time::sleep(Duration::from_millis(self.rng.below(30))).await;
        let begun = self.now_us();
        let told = answer(member.lease_revoke(lease.id())).await;
        self.record(key, begun, told.is_some(), Op::Revoke(new));
    }
}
