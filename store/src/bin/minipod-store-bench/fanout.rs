//! One stream per watcher, all of the same prefix, while eight clients write.

use super::grpc::{Connection, Fields, Stream};
use super::load::put_message;
use super::{Args, Error};
use minipod_store::wire::{put_bytes, put_nested};
use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// Both servers allow a connection at least so many streams.
const STREAMS_PER_CONNECTION: usize = 100;
const WRITERS: usize = 8;
/// A slice ends after so many events, lest a thousand watchers take minutes to read them.
const MAX_EVENTS: u64 = 400_000;
/// All events of a slice have arrived within this time after the last write.
const PATIENCE: Duration = Duration::from_secs(120);

/// Watchers, connected.
pub struct Fanout {
    address: SocketAddr,
    watchers: usize,
    received: Rc<Cell<u64>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Fanout {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Fanout {
    /// Opens the watches and waits until all are there.
    pub async fn new(address: SocketAddr, watchers: usize) -> Result<Self, Error> {
        let received = Rc::new(Cell::new(0));
        let mut tasks = Vec::new();
        let mut create = Vec::new();
        put_nested(&mut create, 1, |create| {
            put_bytes(create, 1, b"fan/");
            put_bytes(create, 2, b"fan0");
        });
        let mut connection = Connection::open(address).await?;
        for number in 0..watchers {
            if number > 0 && number % STREAMS_PER_CONNECTION == 0 {
                connection = Connection::open(address).await?;
            }
            let mut stream = connection.method("/etcdserverpb.Watch/Watch")?.stream(&create).await?;
            let created = stream.message().await?.ok_or("a watch ended at once")?;
            if Fields(&created).number(3) != 1 {
                return Err("a watch was not created".into());
            }
            tasks.push(tokio::task::spawn_local(count(stream, Rc::clone(&received))));
        }
        Ok(Self { address, watchers, received, tasks })
    }

    /// Writes for a while, waits for all events, and gives events a second.
    pub async fn slice(&self, duration: Duration, args: &Args) -> Result<f64, Error> {
        self.received.set(0);
        let begun = Instant::now();
        let deadline = begun + duration;
        let sent = Rc::new(Cell::new(0));
        let most = MAX_EVENTS / self.watchers.max(1) as u64;
        let mut writers = Vec::new();
        for number in 0..WRITERS {
            let mut put = Connection::open(self.address).await?.method("/etcdserverpb.KV/Put")?;
            let (sent, message) =
                (Rc::clone(&sent), put_message(&format!("fan/{number}"), &vec![b'v'; args.value_bytes.min(64)]));
            writers.push(tokio::task::spawn_local(async move {
                while Instant::now() < deadline && sent.get() < most {
                    sent.set(sent.get() + 1);
                    put.call(&message).await?;
                }
                Ok::<_, Error>(())
            }));
        }
        for writer in writers {
            writer.await??;
        }
        let expected = sent.get() * self.watchers as u64;
        let patience = Instant::now() + PATIENCE;
        while self.received.get() < expected {
            if Instant::now() > patience {
                return Err(format!("{} of {expected} events arrived", self.received.get()).into());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        #[expect(clippy::cast_precision_loss, reason = "a count of events")]
        let events = expected as f64;
        Ok(events / begun.elapsed().as_secs_f64())
    }
}

async fn count(mut stream: Stream, received: Rc<Cell<u64>>) {
    // A stream that breaks leaves events missing, and the slice says so.
    while let Ok(Some(response)) = stream.message().await {
        received.set(received.get() + Fields(&response).filter(|(field, _)| *field == 11).count() as u64);
    }
}
