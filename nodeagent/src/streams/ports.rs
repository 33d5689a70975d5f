//! Connections of users to ports in a pod.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdTcpStream};
use std::time::Duration;

use minipod_proto::v1::tunnel_frame::Frame;
use minipod_proto::v1::{PortFrame, PortStart, TunnelFrame, port_frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use super::{Tunnel, frame};
use crate::shim::{Shim, ShimError};
use crate::sys::Netns;
use crate::worker::PodView;

/// How long a program in the pod may take to accept. On the loopback interface only one with a full queue takes any time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Read from a connection at a time: a tunnel frame.
const READ_BYTES: usize = 64 << 10;

/// Connects to the port on the pod's loopback interface, and carries both directions until both have ended.
pub(super) async fn forward(tunnel: &mut Tunnel, view: &PodView, start: &PortStart) -> Result<(), Status> {
    let wrong = || Status::invalid_argument(format!("port: {} is not between 1 and 65535", start.port));
    let port = u16::try_from(start.port).ok().filter(|port| *port != 0).ok_or_else(wrong)?;
    let not_running = || Status::failed_precondition("the pod is not running");
    let netns = netns(view.shim.as_ref().ok_or_else(not_running)?).await?.ok_or_else(not_running)?;
    let connected = tokio::task::spawn_blocking(move || connect(&netns, port)).await;
    let connected = connected.map_err(|error| Status::internal(error.to_string()))?;
    let refused = |error: io::Error| match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            Status::failed_precondition(format!("port {port}: nothing in the pod listens there on localhost"))
        }
        _ => Status::unavailable(format!("port {port}: connect in the pod: {error}")),
    };
    let (reader, writer) = connected.and_then(TcpStream::from_std).map_err(refused)?.into_split();
    let Tunnel { sender, incoming } = tunnel;
    // Both in one task, and neither waits for the other: a program may answer before it has read everything.
    tokio::try_join!(to_user(reader, sender), to_program(incoming, writer, sender)).map(|_| ())
}

/// The pod's network namespace, while its sandbox lives.
async fn netns(shim: &Shim) -> Result<Option<Netns>, Status> {
    let failed = |error: ShimError| Status::unavailable(crate::report::chain(&error));
    let before = shim.state().await.map_err(failed)?;
    let Some(pause) = before.pause_pid else { return Ok(None) };
    let netns = Netns::of_pid(pause);
    // The supervisor reaps the infra container: as long as it names this process, no other one has had its number.
    let after = shim.state().await.map_err(failed)?;
    if (after.pause_pid, after.sandbox_attempt) != (before.pause_pid, before.sandbox_attempt) {
        return Ok(None);
    }
    netns.map(Some).map_err(|error| Status::internal(format!("open the pod's network namespace: {error}")))
}

/// A socket belongs to the namespace that it was made in, whoever uses it later.
fn connect(netns: &Netns, port: u16) -> io::Result<StdTcpStream> {
    let to = |address: IpAddr| StdTcpStream::connect_timeout(&SocketAddr::new(address, port), CONNECT_TIMEOUT);
    let connected = netns.run(|| match to(Ipv4Addr::LOCALHOST.into()) {
        // As with the name localhost: a program may listen on the other family only.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            to(Ipv6Addr::LOCALHOST.into()).map_err(|_| error)
        }
        answer => answer,
    })?;
    let stream = connected?;
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn to_user(mut reader: OwnedReadHalf, sender: &mpsc::Sender<TunnelFrame>) -> Result<(), Status> {
    let gone = || Status::cancelled("the user is gone");
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let got = tokio::select! {
            // Cancel safe: nothing is read when the other arm wins.
            got = reader.read(&mut buffer) => got,
            // Cancel safe: a level.
            () = sender.closed() => return Err(gone()),
        };
        let got = got.map_err(|error| Status::unavailable(format!("read from the program in the pod: {error}")))?;
        let content = match buffer.get(..got) {
            Some(data) if !data.is_empty() => port_frame::Frame::Data(data.to_vec().into()),
            _ => port_frame::Frame::Closed(true),
        };
        sender.send(port_frame(content)).await.map_err(|_| gone())?;
        if got == 0 {
            return Ok(());
        }
    }
}

async fn to_program(
    incoming: &mut Streaming<TunnelFrame>,
    mut writer: OwnedWriteHalf,
    sender: &mpsc::Sender<TunnelFrame>,
) -> Result<(), Status> {
    let lost = |error: io::Error| Status::unavailable(format!("write to the program in the pod: {error}"));
    loop {
        let message = incoming.message().await.ok().flatten().ok_or_else(|| Status::cancelled("the user is gone"))?;
        match message.frame {
            Some(Frame::Port(PortFrame { frame: Some(port_frame::Frame::Data(data)) })) => {
                writer.write_all(&data).await.map_err(lost)?;
                let taken = sender.send(frame(Frame::Taken(data.len() as u64))).await;
                taken.map_err(|_| Status::cancelled("the user is gone"))?;
            }
            Some(Frame::Port(PortFrame { frame: Some(port_frame::Frame::Closed(_)) }) | Frame::End(_)) => {
                // One that has closed its side already needs not be told.
                return match writer.shutdown().await {
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
                    done => done.map_err(lost),
                };
            }
            _ => {}
        }
    }
}

fn port_frame(content: port_frame::Frame) -> TunnelFrame {
    frame(Frame::Port(PortFrame { frame: Some(content) }))
}
