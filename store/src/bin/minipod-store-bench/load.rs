//! Clients that each have one request under way.

use super::grpc::{Connection, Fields, Method, Value, header};
use super::servers::{Cluster, cpu_of};
use super::{Args, Error};
use minipod_store::wire::{put_bytes, put_int, put_nested};
use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Clients share connections as a busy program does: sixteen to one.
const CLIENTS_PER_CONNECTION: usize = 16;
/// Keys that the writes go to.
pub const KEYS: u64 = 10_000;
/// Keys of a range.
const RANGE: usize = 1_000;

/// What a client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Puts to keys that all clients share.
    Put,
    /// A transaction that compares the revision of a key and writes it.
    Cas,
    /// A linearizable read of one key.
    Get,
    /// A linearizable read of a thousand keys.
    Range,
}

impl Workload {
    /// Its name in the figures.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Cas => "cas",
            Self::Get => "get",
            Self::Range => "range",
        }
    }

    const fn path(self) -> &'static str {
        match self {
            Self::Put => "/etcdserverpb.KV/Put",
            Self::Cas => "/etcdserverpb.KV/Txn",
            Self::Get | Self::Range => "/etcdserverpb.KV/Range",
        }
    }
}

/// One slice.
#[derive(Debug, Clone, Copy, Default)]
pub struct Measured {
    /// Operations a second.
    pub ops_s: f64,
    /// The median latency, ms.
    pub p50_ms: f64,
    /// Of a hundred, one is slower, ms.
    pub p99_ms: f64,
    /// The server's processor time for an operation, µs; over all its processes.
    pub cpu_us: f64,
    /// What the clients took of one core.
    pub client_core_percent: f64,
}

/// Clients, connected.
pub struct Load {
    workload: Workload,
    methods: Vec<Method>,
    value_bytes: usize,
    /// Revisions of the clients' own keys.
    revisions: Rc<Vec<Cell<u64>>>,
    next: Rc<Cell<u64>>,
}

/// A put's message.
pub fn put_message(key: &str, value: &[u8]) -> Vec<u8> {
    let mut message = Vec::with_capacity(key.len() + value.len() + 16);
    put_bytes(&mut message, 1, key.as_bytes());
    put_bytes(&mut message, 2, value);
    message
}

/// The name of a shared key.
pub fn key(number: u64) -> String {
    format!("key/{number:08}")
}

impl Load {
    /// Connects so many clients.
    pub async fn new(address: SocketAddr, workload: Workload, clients: usize, args: &Args) -> Result<Self, Error> {
        let mut methods = Vec::new();
        let mut connection = Connection::open(address).await?;
        for number in 0..clients {
            if number > 0 && number % CLIENTS_PER_CONNECTION == 0 {
                connection = Connection::open(address).await?;
            }
            methods.push(connection.method(workload.path())?);
        }
        let mut revisions = Vec::new();
        let mut get = connection.method(Workload::Get.path())?;
        for number in 0..if workload == Workload::Cas { clients } else { 0 } {
            let mut message = Vec::new();
            put_bytes(&mut message, 1, own_key(number).as_bytes());
            revisions.push(Cell::new(mod_revision(&get.call(&message).await?)));
        }
        let value_bytes = args.value_bytes;
        Ok(Self { workload, methods, value_bytes, revisions: Rc::new(revisions), next: Rc::default() })
    }

    /// Works for a while.
    pub async fn slice(&self, cluster: &Cluster, duration: Duration) -> Result<Measured, Error> {
        let (server_before, client_before) = (cluster.cpu()?, cpu_of("self")?);
        let begun = Instant::now();
        let deadline = begun + duration;
        let mut tasks = Vec::new();
        for (number, method) in self.methods.iter().enumerate() {
            let client = Client {
                workload: self.workload,
                method: method.clone(),
                value: vec![b'v'; self.value_bytes],
                own: own_key(number),
                number,
                revisions: Rc::clone(&self.revisions),
                next: Rc::clone(&self.next),
            };
            tasks.push(tokio::task::spawn_local(client.run(deadline)));
        }
        let mut latencies = Vec::new();
        for task in tasks {
            latencies.extend(task.await??);
        }
        let took = begun.elapsed();
        let mut measured = measured(latencies, took);
        let server = (cluster.cpu()? - server_before).as_secs_f64();
        measured.cpu_us = server * 1e6 / (measured.ops_s * took.as_secs_f64()).max(1.0);
        measured.client_core_percent = (cpu_of("self")? - client_before).as_secs_f64() / took.as_secs_f64() * 100.0;
        Ok(measured)
    }
}

fn own_key(number: usize) -> String {
    format!("cas/{number}")
}

fn mod_revision(range_answer: &[u8]) -> u64 {
    Fields(range_answer)
        .find_map(|(field, value)| match (field, value) {
            (2, Value::Bytes(kv)) => Some(Fields(kv).number(3)),
            _ => None,
        })
        .unwrap_or(0)
}

fn measured(mut latencies: Vec<Duration>, took: Duration) -> Measured {
    latencies.sort_unstable();
    let at = |per_mille: usize| {
        let place = (latencies.len() * per_mille / 1_000).min(latencies.len().saturating_sub(1));
        latencies.get(place).map_or(0.0, |latency| latency.as_secs_f64() * 1e3)
    };
    #[expect(clippy::cast_precision_loss, reason = "a count of operations")]
    let count = latencies.len() as f64;
    Measured { ops_s: count / took.as_secs_f64(), p50_ms: at(500), p99_ms: at(990), ..Measured::default() }
}

struct Client {
    workload: Workload,
    method: Method,
    value: Vec<u8>,
    own: String,
    number: usize,
    revisions: Rc<Vec<Cell<u64>>>,
    next: Rc<Cell<u64>>,
}

impl Client {
    async fn run(mut self, deadline: Instant) -> Result<Vec<Duration>, Error> {
        let mut latencies = Vec::new();
        while Instant::now() < deadline {
            let message = self.message();
            let sent = Instant::now();
            let answer = self.method.call(&message).await?;
            latencies.push(sent.elapsed());
            self.check(&answer)?;
        }
        Ok(latencies)
    }

    fn message(&self) -> Vec<u8> {
        // A step that is prime to the number of keys: neighbours in time are none in the order of keys.
        let shared = key(self.next.replace(self.next.get() + 7_919) % KEYS);
        let mut message = Vec::new();
        match self.workload {
            Workload::Put => message = put_message(&shared, &self.value),
            Workload::Cas => {
                let revision = self.revisions.get(self.number).map_or(0, Cell::get);
                put_nested(&mut message, 1, |compare| {
                    put_int(compare, 2, 2);
                    put_bytes(compare, 3, self.own.as_bytes());
                    put_int(compare, 6, revision.cast_signed());
                });
                let put = put_message(&self.own, &self.value);
                put_nested(&mut message, 2, |op| put_bytes(op, 2, &put));
            }
            Workload::Get => put_bytes(&mut message, 1, shared.as_bytes()),
            Workload::Range => {
                put_bytes(&mut message, 1, b"key/");
                put_bytes(&mut message, 2, b"key0");
                put_int(&mut message, 3, i64::try_from(RANGE).unwrap_or(i64::MAX));
            }
        }
        message
    }

    fn check(&self, answer: &[u8]) -> Result<(), Error> {
        match self.workload {
            Workload::Put if header(answer, 3) == 0 => Err("a put's answer has no revision".into()),
            Workload::Cas if Fields(answer).number(2) != 1 => {
                Err(format!("{} was changed by somebody else", self.own).into())
            }
            Workload::Cas => {
                if let Some(revision) = self.revisions.get(self.number) {
                    revision.set(header(answer, 3));
                }
                Ok(())
            }
            Workload::Range => match Fields(answer).filter(|(field, _)| *field == 2).count() {
                RANGE => Ok(()),
                found => Err(format!("a range of {RANGE} has {found} keys").into()),
            },
            Workload::Put | Workload::Get => Ok(()),
        }
    }
}

/// Puts the keys `0..count` once each.
pub async fn fill(address: SocketAddr, count: u64, value_bytes: usize) -> Result<(), Error> {
    let next = Rc::new(Cell::new(0));
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let put = Connection::open(address).await?.method(Workload::Put.path())?;
        for _ in 0..CLIENTS_PER_CONNECTION {
            let (mut put, next) = (put.clone(), Rc::clone(&next));
            tasks.push(tokio::task::spawn_local(async move {
                let value = vec![b'v'; value_bytes];
                while next.get() < count {
                    put.call(&put_message(&key(next.replace(next.get() + 1)), &value)).await?;
                }
                Ok::<_, Error>(())
            }));
        }
    }
    for task in tasks {
        task.await??;
    }
    Ok(())
}
