//! `port-forward`.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use minipod_client::{Client, ClientError, PortEvent, PortReader, PortWriter};
use minipod_proto::v1::{Pod, PortStart};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::args::ForwardArgs;
use super::error::CliError;
use super::session::Session;
use super::target;
use crate::view::text;

/// Read from a local connection at a time.
const READ_BYTES: usize = 32 << 10;

/// `[LOCAL:]REMOTE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// On this machine; 0: any free one.
    pub local: u16,
    /// In the pod.
    pub remote: u16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |text: &str| {
            let number = text.parse().ok().filter(|port| *port != 0);
            number.ok_or_else(|| {
                format!("{text:?} is no port: write LOCAL:REMOTE, REMOTE or :REMOTE, each from 1 to 65535")
            })
        };
        match text.split_once(':') {
            None => port(text).map(|port| Self { local: port, remote: port }),
            Some(("", remote)) => Ok(Self { local: 0, remote: port(remote)? }),
            Some((local, remote)) => Ok(Self { local: port(local)?, remote: port(remote)? }),
        }
    }
}

/// Listens here and carries every connection to the pod, until minictl is ended or the pod is gone.
pub async fn forward(session: &Session, options: &ForwardArgs) -> Result<(), CliError> {
    let name = target::pod_name(&options.pod)?;
    // Before anything is promised: that there is such a pod.
    let _: Pod = session.client.get(&session.namespace, name).await?;
    let mut listeners = JoinSet::new();
    for ports in &options.ports {
        let address = SocketAddr::new(options.address, ports.local);
        let listener = TcpListener::bind(address).await.map_err(|error| cannot_listen(address, &error))?;
        let bound = listener.local_addr().map_err(|error| cannot_listen(address, &error))?;
        tell!("Forwarding from {bound} -> {}", ports.remote);
        let start = PortStart { namespace: session.namespace.clone(), pod: name.to_owned(), port: ports.remote.into() };
        listeners.spawn(serve(session.client.clone(), listener, start));
    }
    // None of them ends.
    while listeners.join_next().await.is_some() {}
    Ok(())
}

fn cannot_listen(address: SocketAddr, error: &io::Error) -> CliError {
    CliError::usage(
        format!("listen on {address}: {error}"),
        "choose another local port, or none: minictl port-forward POD :REMOTE",
    )
}

async fn serve(client: Client, listener: TcpListener, start: PortStart) {
    let start = Arc::new(start);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (client, start) = (client.clone(), Arc::clone(&start));
                tokio::spawn(async move {
                    if let Err(error) = carry(&client, stream, &start).await {
                        note!("error: a connection to port {}: {}", start.port, text::line(&error.to_string()));
                    }
                });
            }
            Err(error) => {
                note!("error: accept a connection: {error}");
                // Descriptors may be short for a moment; without a pause this would spin.
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn carry(client: &Client, stream: TcpStream, start: &PortStart) -> Result<(), ClientError> {
    // A connection without it works as well, only slower.
    let _ = stream.set_nodelay(true);
    let (reader, writer) = client.port_forward(start.clone()).await?;
    let (local_reader, local_writer) = stream.into_split();
    tokio::select! {
        // The other side says when all is over; both arms are dropped then.
        ended = to_local(reader, local_writer) => ended,
        never = to_pod(local_reader, writer) => match never {},
    }
}

async fn to_local(mut reader: PortReader, mut local: OwnedWriteHalf) -> Result<(), ClientError> {
    while let Some(event) = reader.next().await? {
        let taken = match event {
            PortEvent::Data(data) => local.write_all(&data).await,
            PortEvent::Closed => local.shutdown().await,
        };
        if taken.is_err() {
            // Whoever connected here has gone, and knows it.
            break;
        }
    }
    Ok(())
}

async fn to_pod(mut local: OwnedReadHalf, writer: PortWriter) -> std::convert::Infallible {
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let got = local.read(&mut buffer).await.unwrap_or(0);
        match buffer.get(..got) {
            Some(data) if !data.is_empty() => {
                if !writer.send(Bytes::copy_from_slice(data)).await {
                    break;
                }
            }
            _ => {
                writer.close().await;
                break;
            }
        }
    }
    std::future::pending().await
}

/// Where to listen: the names of the loopback interface, or an address.
pub fn address(text: &str) -> Result<IpAddr, String> {
    match text {
        "localhost" => Ok(std::net::Ipv4Addr::LOCALHOST.into()),
        text => text.parse().map_err(|_| format!("{text:?} is neither localhost nor an IP address")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read() {
        let ports = |local, remote| Ok(Ports { local, remote });
        assert_eq!("80".parse(), ports(80, 80));
        assert_eq!("8080:80".parse(), ports(8080, 80));
        assert_eq!(":80".parse(), ports(0, 80));
        for wrong in ["", ":", "0", "80:", "x:80", "1:2:3", "65536", "80:0", "-1"] {
            let error = wrong.parse::<Ports>().expect_err(wrong);
            assert!(error.contains("is no port"), "{wrong}: {error}");
        }
    }

    #[test]
    fn addresses_are_read() {
        assert_eq!(address("localhost"), Ok(std::net::Ipv4Addr::LOCALHOST.into()));
        assert_eq!(address("::1"), Ok(std::net::Ipv6Addr::LOCALHOST.into()));
        assert!(address("example.org").is_err_and(|error| error.contains("neither")));
    }
}
