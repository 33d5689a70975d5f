//! A request for a node whose session another API server holds is passed on to that one, and never further.
//!
//! Who holds a session stands in the store ([`SessionRecord`]), with an address and a key. Members of an embedded store meet where
//! they speak to each other anyway, by their certificates; servers of an etcd at their API. Everywhere the key must be shown: only
//! API servers read the store. It also finds an address that leads to another server than the one that is meant.

use std::{pin::Pin, time::Duration};

use minipod_proto::v1::{
    OpenStream, RelayFrame, RelayStart, TunnelFrame, relay_frame::Frame as Relayed, relays_client::RelaysClient,
    relays_server,
};
use minipod_store::{peer::tls::PeerTls, replica::run::with_causes};
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Code, Request, Response, Status, Streaming, transport::Endpoint};

use super::{ARRIVAL, FRAMES, Tunnel, Tunnels};
use crate::{cache::SessionRecord, nodes::Identity};

/// Another server is reached within this time, or it is gone.
const CONNECT: Duration = Duration::from_secs(2);
/// A server that does not answer pings any more is gone within two of these.
const ALIVE: Duration = Duration::from_secs(4);
/// The other server waits for its agent; this is on top of that.
const MARGIN: Duration = Duration::from_secs(3);

/// Dials other API servers.
#[derive(Debug, Clone, Default)]
pub struct Dialer {
    /// Shown to those that are dialled by https.
    pub tls: Option<PeerTls>,
}

/// Why a request was not passed on.
#[derive(Debug)]
pub(super) enum Missed {
    /// The session is not there (any more); nothing was asked of the agent.
    Elsewhere(String),
    /// It went wrong there, and may have been begun.
    Failed(Status),
}

impl Dialer {
    /// Passes a request on to the server that holds the session.
    ///
    /// On a connection of its own, like the agent's: what a slow user leaves unread holds up nobody else.
    pub(super) async fn relay(&self, record: &SessionRecord, node: &str, open: OpenStream) -> Result<Tunnel, Missed> {
        let gone = |why: String| Missed::Elsewhere(format!("the API server at {} {why}", record.relay));
        let endpoint = self.endpoint(&record.relay).map_err(|error| gone(format!("cannot be dialled: {error}")))?;
        let channel = endpoint.connect().await;
        let channel = channel.map_err(|error| gone(format!("is not reached: {}", with_causes(&error))))?;
        let start = RelayStart {
            node: node.to_owned(),
            open: Some(open),
            replica: record.replica.clone(),
            key: record.key.clone(),
        };
        let (outbound, frames) = mpsc::channel::<Result<TunnelFrame, Status>>(FRAMES);
        let frame = |frame| RelayFrame { frame: Some(frame) };
        // Nobody sends an error this way; one would end the stream.
        let frames =
            ReceiverStream::new(frames).map_while(Result::ok).map(move |tunnel| frame(Relayed::Tunnel(tunnel)));
        let frames = tokio_stream::once(frame(Relayed::Start(start))).chain(frames);
        let mut client = RelaysClient::new(channel);
        let answer = tokio::time::timeout(ARRIVAL + MARGIN, client.relay(frames)).await;
        match answer {
            Ok(Ok(answer)) => Ok(Tunnel { inbound: answer.into_inner(), outbound, node: node.to_owned() }),
            Ok(Err(status)) if status.code() == Code::NotFound => Err(gone(format!("says: {}", status.message()))),
            Ok(Err(status)) => Err(Missed::Failed(status)),
            Err(_) => {
                let (relay, seconds) = (&record.relay, (ARRIVAL + MARGIN).as_secs());
                let text = format!(
                    "the API server at {relay}, which holds the session of node {node}, has not answered in {seconds} s"
                );
                Err(Missed::Failed(Status::unavailable(text)))
            }
        }
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(address.to_owned())?;
        let endpoint = match &self.tls {
            Some(tls) if address.starts_with("https://") => tls.dial(endpoint)?,
            _ => endpoint,
        };
        Ok(endpoint
            .connect_timeout(CONNECT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(ALIVE)
            .keep_alive_timeout(ALIVE)
            .keep_alive_while_idle(true))
    }
}

/// The side that holds the session.
#[derive(Clone)]
pub struct RelayApi {
    tunnels: Arc<Tunnels>,
}

impl RelayApi {
    /// Over the tunnels of this server.
    pub fn new(tunnels: Arc<Tunnels>) -> RelayApi {
        RelayApi { tunnels }
    }
}

/// Whether a request is for this server, from one that reads the store.
fn check(start: &RelayStart, own: &Identity) -> Result<(), Status> {
    if start.replica != own.id {
        // The address of one that has ended, or that several have given as their own.
        return Err(Status::not_found(format!(
            "another API server answers here ({}) than the one that holds the session: it has ended, or its --advertise is wrong",
            own.address
        )));
    }
    // In the same time wherever they differ: nothing about the key can be learnt from it.
    let differ = start.key.bytes().zip(own.key.bytes()).fold(0, |seen, (a, b)| seen | (a ^ b));
    if start.key.len() != own.key.len() || differ != 0 {
        return Err(Status::permission_denied("relays are for API servers of this store"));
    }
    Ok(())
}

#[tonic::async_trait]
impl relays_server::Relays for RelayApi {
    type RelayStream = Pin<Box<dyn Stream<Item = Result<TunnelFrame, Status>> + Send>>;

    async fn relay(&self, request: Request<Streaming<RelayFrame>>) -> Result<Response<Self::RelayStream>, Status> {
        let mut inbound = request.into_inner();
        let first = tokio::time::timeout(ARRIVAL, inbound.message()).await;
        let Ok(Ok(Some(RelayFrame { frame: Some(Relayed::Start(mut start)) }))) = first else {
            return Err(Status::invalid_argument("frame: a relay begins with start"));
        };
        check(&start, self.tunnels.identity())?;
        let open = start.open.take().unwrap_or_default();
        let request = open.request.ok_or_else(|| Status::invalid_argument("start.open.request: missing"))?;
        // Here or not at all: a request that was passed on is never passed on again.
        let tunnel = self.tunnels.open_here(&start.node, request, &open.pod_uid).await?;
        let tunnel =
            tunnel.ok_or_else(|| Status::not_found(format!("node {} has no session here (any more)", start.node)))?;
        let (out, receiver) = mpsc::channel(FRAMES);
        tokio::spawn(carry(tunnel, inbound, out));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

/// Both directions, frame by frame, until one end is gone.
async fn carry(mut tunnel: Tunnel, mut inbound: Streaming<RelayFrame>, out: mpsc::Sender<Result<TunnelFrame, Status>>) {
    let to_agent = tunnel.outbound.clone();
    // Apart from the other direction: an agent that takes nothing must not hold up what it says.
    let input = tokio::spawn(async move {
        while let Ok(Some(frame)) = inbound.message().await {
            if let Some(Relayed::Tunnel(frame)) = frame.frame
                && to_agent.send(Ok(frame)).await.is_err()
            {
                return;
            }
        }
    });
    loop {
        // Both arms are cancel safe. A user who leaves ends the relay, and the agent sees that.
        let next = tokio::select! {
            next = tunnel.inbound.message() => next,
            () = out.closed() => break,
        };
        let (frame, last) = match next {
            Ok(Some(frame)) => (Ok(frame), false),
            Ok(None) => break,
            Err(status) => (Err(Status::unavailable(status.message().to_owned())), true),
        };
        if out.send(frame).await.is_err() || last {
            break;
        }
    }
    input.abort();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_servers_of_the_store_that_mean_this_one_are_let_in() {
        let own = Identity::new("10.0.0.1:7650".into(), "http://10.0.0.1:7650".into());
        let start = |replica: &str, key: &str| {
            let start = RelayStart { replica: replica.into(), key: key.into(), ..RelayStart::default() };
            check(&start, &own).map_err(|status| status.code())
        };
        assert_eq!(start(&own.id, &own.key), Ok(()));
        assert_eq!(start("another", &own.key), Err(Code::NotFound));
        let last = if own.key.ends_with('0') { "1" } else { "0" };
        let near = format!("{}{last}", &own.key[..own.key.len() - 1]);
        for wrong in ["", &near, &own.key[1..], &format!("{}0", own.key)] {
            assert_eq!(start(&own.id, wrong), Err(Code::PermissionDenied), "{wrong}");
        }
    }
}
