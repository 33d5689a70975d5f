//! Connections to the API servers: one is in use, and the next one is when that cannot be reached.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use minipod_daemon::backoff::Backoff;
use minipod_proto::Kind;
use minipod_proto::v1::GetRequest;
use minipod_proto::v1::objects_client::ObjectsClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::error::{ClientError, Operation, connection_broke, never_sent, reason};
use crate::servers::{Next, Retry, Servers, Tries};

/// The API server's address where nothing else is said.
pub const DEFAULT_SERVER: &str = "http://127.0.0.1:7650";
/// The environment variable with the API servers' addresses, separated by commas.
pub const SERVER_VARIABLE: &str = "MINIPOD_SERVER";

/// The longest message that is read: a page of objects of the largest allowed size does not come near in practice.
pub(crate) const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// A server that has answered so shortly ago is taken to be there.
const LATELY: Duration = Duration::from_secs(4);
/// One that has not is given so long to answer a small question, before it gets the request.
const PROBE: Duration = Duration::from_secs(3);
/// First and longest pause before all servers are asked again.
const ROUND_PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// How to connect.
#[derive(Debug, Clone)]
pub struct Options {
    /// Addresses of API servers as [`Servers`] takes them; the first that answers is used.
    pub servers: Vec<String>,
    /// How long a connection may take to come up.
    pub connect_timeout: Duration,
    /// How long an answer may take.
    pub request_timeout: Duration,
    /// A silent connection is probed this often, and given up when the probe is not answered for as long.
    pub keep_alive: Duration,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            servers: vec![DEFAULT_SERVER.to_owned()],
            connect_timeout: Duration::from_secs(3),
            request_timeout: Duration::from_secs(15),
            // A server that is stopped is left within twice this time.
            keep_alive: Duration::from_secs(4),
        }
    }
}

impl From<Servers> for Options {
    fn from(servers: Servers) -> Options {
        Options { servers: servers.as_slice().to_vec(), ..Options::default() }
    }
}

impl Options {
    /// The servers of a text like that of `MINIPOD_SERVER`: addresses separated by commas. [`Client::new`] checks them.
    #[must_use]
    pub fn servers(text: &str) -> Options {
        Options { servers: text.split(',').map(str::to_owned).collect(), ..Options::default() }
    }

    /// The servers that `MINIPOD_SERVER` names; without it [`DEFAULT_SERVER`].
    #[must_use]
    pub fn from_env() -> Options {
        match std::env::var(SERVER_VARIABLE) {
            Ok(text) if !text.trim().is_empty() => Options::servers(&text),
            _ => Options::default(),
        }
    }
}

/// A connection to the API servers. Clones share it.
#[derive(Debug, Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    servers: Vec<Server>,
    /// Index of the server in use; moves on when it cannot be reached.
    current: AtomicUsize,
    request_timeout: Duration,
}

#[derive(Debug)]
struct Server {
    address: String,
    channel: Channel,
    /// When it last answered anything.
    answered: Mutex<Option<Instant>>,
}

impl Server {
    fn has_answered(&self) {
        *self.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn answered_lately(&self) -> bool {
        let answered = *self.answered.lock().unwrap_or_else(PoisonError::into_inner);
        answered.is_some_and(|at| at.elapsed() < LATELY)
    }
}

impl Client {
    /// A client of these servers. Nothing is connected before the first call. Needs a tokio runtime.
    ///
    /// # Errors
    /// When there is no server or an address makes no sense.
    pub fn new(options: &Options) -> Result<Client, ClientError> {
        let servers = Servers::new(options.servers.iter().map(String::as_str))?;
        let servers = servers.as_slice().iter().map(|address| server(address, options)).collect::<Result<_, _>>()?;
        let shared = Shared { servers, current: AtomicUsize::new(0), request_timeout: options.request_timeout };
        Ok(Client { shared: Arc::new(shared) })
    }

    /// A client of the servers that `MINIPOD_SERVER` names; without it of [`DEFAULT_SERVER`].
    ///
    /// # Errors
    /// As [`Client::new`].
    pub fn from_env() -> Result<Client, ClientError> {
        Client::new(&Options::from_env())
    }

    /// The servers' addresses, separated by commas.
    #[must_use]
    pub fn servers(&self) -> String {
        let addresses: Vec<&str> = self.shared.servers.iter().map(|server| server.address.as_str()).collect();
        addresses.join(",")
    }

    /// For every server a client of it alone, over the same connections.
    pub fn each(&self) -> impl Iterator<Item = Client> + '_ {
        self.shared.servers.iter().map(|server| {
            let server =
                Server { address: server.address.clone(), channel: server.channel.clone(), answered: Mutex::default() };
            let request_timeout = self.shared.request_timeout;
            Client { shared: Arc::new(Shared { servers: vec![server], current: AtomicUsize::new(0), request_timeout }) }
        })
    }

    pub(crate) async fn objects<Q: Clone, A, Fut>(
        &self,
        operation: Operation,
        retry: Retry,
        request: Q,
        call: impl Fn(ObjectsClient<Channel>, Q) -> Fut,
    ) -> Result<A, ClientError>
    where
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        self.call(operation, retry, |channel| call(objects_client(channel), request.clone())).await
    }

    /// Makes a call at the server in use, or at the next when that one is not there.
    pub(crate) async fn call<A, Fut>(
        &self,
        operation: Operation,
        retry: Retry,
        call: impl Fn(Channel) -> Fut,
    ) -> Result<A, ClientError>
    where
        Fut: Future<Output = Result<Response<A>, Status>>,
    {
        let shared = &self.shared;
        let (mut tries, begun) = (Tries::new(shared.servers.len(), retry), Instant::now());
        let mut pauses = Backoff::new(ROUND_PAUSE.0, ROUND_PAUSE.1);
        self.choose().await;
        loop {
            let index = shared.current.load(Ordering::Relaxed) % shared.servers.len();
            let answer =
                tokio::time::timeout(shared.request_timeout, call(shared.servers[index].channel.clone())).await;
            let status = match answer {
                Ok(Ok(answer)) => {
                    shared.servers[index].has_answered();
                    return Ok(answer.into_inner());
                }
                Ok(Err(status)) => status,
                Err(_) => {
                    self.leave(index);
                    return Err(ClientError::Timeout { operation, seconds: shared.request_timeout.as_secs() });
                }
            };
            if !is_away(&status) {
                shared.servers[index].has_answered();
                return Err(self.failure(operation, status));
            }
            self.leave(index);
            match tries.failed(!never_sent(&status), begun.elapsed()) {
                Next::Elsewhere => {}
                Next::Pause => tokio::time::sleep(pauses.next_wait()).await,
                Next::GiveUp => return Err(self.failure(operation, status)),
            }
        }
    }

    /// Makes a server the one in use that answers, if there are several: one that is stopped takes a request and does nothing with it,
    /// which is noticed late, and then nobody knows whether it was done. Whether one was found, the request itself shows.
    pub(crate) async fn choose(&self) {
        let servers = &self.shared.servers;
        for _ in 1..servers.len() {
            let index = self.shared.current.load(Ordering::Relaxed) % servers.len();
            if servers[index].answered_lately() {
                return;
            }
            let request = GetRequest {
                kind: Kind::Namespace.name().to_owned(),
                namespace: String::new(),
                name: "default".to_owned(),
            };
            let mut api = objects_client(servers[index].channel.clone());
            match tokio::time::timeout(PROBE, api.get(request)).await {
                Ok(Err(status)) if is_away(&status) => self.leave(index),
                Err(_) => self.leave(index),
                // What it answers does not matter.
                Ok(_) => return servers[index].has_answered(),
            }
        }
    }

    /// How long an answer may take.
    pub(crate) fn request_timeout(&self) -> Duration {
        self.shared.request_timeout
    }

    /// The channel of the server in use, for a call whose request cannot be made twice.
    pub(crate) fn channel(&self) -> Channel {
        let servers = &self.shared.servers;
        servers[self.shared.current.load(Ordering::Relaxed) % servers.len()].channel.clone()
    }

    /// The error of a call that ended with this status.
    pub(crate) fn failure(&self, operation: Operation, status: Status) -> ClientError {
        if never_sent(&status) {
            return ClientError::Unreachable { operation, servers: self.servers(), reason: reason(&status) };
        }
        ClientError::from_status(operation, &status)
    }

    /// The server at `index` does not answer: the next call goes to the one after it.
    fn leave(&self, index: usize) {
        let next = (index + 1) % self.shared.servers.len();
        // Only the first to notice moves on; the others find the new one.
        let _ = self.shared.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Whether a server, or the store behind it, is not there.
fn is_away(status: &Status) -> bool {
    never_sent(status) || connection_broke(status) || status.code() == Code::Unavailable
}

pub(crate) fn objects_client(channel: Channel) -> ObjectsClient<Channel> {
    ObjectsClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES)
}

fn server(address: &str, options: &Options) -> Result<Server, ClientError> {
    let bad = |message: String| ClientError::Address { address: address.to_owned(), message };
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(|error| bad(error.to_string()))?;
    let channel = endpoint
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(options.keep_alive)
        .keep_alive_timeout(options.keep_alive)
        .keep_alive_while_idle(true)
        // Lists and logs are large beside the default window of 64 KiB.
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20)
        .connect_lazy();
    Ok(Server { address: address.to_owned(), channel, answered: Mutex::default() })
}
