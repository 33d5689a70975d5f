//! How the API servers are started: one by itself, several on one etcd, or several that carry the embedded store together.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;

use super::error::LocalError;
use super::process;

/// Where one API server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// The daemon's name: `apiserver`, or one of `apiserver-0`, `apiserver-1`, ….
    pub(super) name: String,
    /// Where it serves the API.
    listen: SocketAddr,
    /// Where it serves the other members of the store.
    peer: SocketAddr,
}

impl Place {
    /// For clients.
    pub(super) fn url(&self) -> String {
        format!("http://{}", self.listen)
    }

    fn member(&self) -> String {
        format!("{}=https://{}", self.name, self.peer)
    }
}

/// Places for so many API servers (at least one), on ports that are free at this moment.
pub(super) fn places(host: Ipv4Addr, count: usize) -> Result<Vec<Place>, LocalError> {
    let place = |index: usize| {
        let name = if count <= 1 { "apiserver".to_owned() } else { format!("apiserver-{index}") };
        let address = || process::free_port().map(|port| SocketAddr::from((host, port)));
        Ok(Place { name, listen: address()?, peer: address()? })
    };
    (0..count.max(1)).map(place).collect()
}

fn members(all: &[Place]) -> String {
    all.iter().map(Place::member).collect::<Vec<_>>().join(",")
}

/// The flags of one of them that say where it serves and where its store is. `etcd`: its address as `etcd://HOST:PORT`.
pub(super) fn arguments(place: &Place, all: &[Place], etcd: Option<&str>, data: &Path) -> Vec<String> {
    let mut arguments = vec![format!("--listen={}", place.listen)];
    if let Some(etcd) = etcd {
        arguments.push(format!("--store={etcd}"));
        return arguments;
    }
    arguments.push("--store=embedded".to_owned());
    if all.len() == 1 {
        arguments.push(format!("--data-dir={}", data.join("store").display()));
        return arguments;
    }
    let (name, certs) = (&place.name, data.join("certs"));
    let file = |name: String| certs.join(name).display().to_string();
    arguments.extend([
        format!("--data-dir={}", data.join(format!("store-{name}")).display()),
        format!("--name={name}"),
        format!("--peers={}", members(all)),
        format!("--peer-cert-file={}", file(format!("{name}.pem"))),
        format!("--peer-key-file={}", file(format!("{name}-key.pem"))),
        format!("--peer-trusted-ca-file={}", file("ca.pem".to_owned())),
    ]);
    arguments
}

/// Certificates for the members of the store, in `certs` of the data directory.
pub(super) fn make_certificates(bin_dir: &Path, data: &Path, all: &[Place]) -> Result<(), LocalError> {
    let program = bin_dir.join("minipod-store");
    if !program.is_file() {
        return Err(LocalError::Binary(program));
    }
    let mut command = Command::new(program);
    command.arg("certs").arg(data.join("certs")).args(["--members", &members(all)]);
    process::run(&mut command, "minipod-store certs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_follow_from_the_store_and_the_number() {
        let place = |index: u16| Place {
            name: format!("apiserver-{index}"),
            listen: SocketAddr::from(([10, 0, 0, 1], 100 + index)),
            peer: SocketAddr::from(([10, 0, 0, 1], 200 + index)),
        };
        let shown = |all: &[Place], etcd| arguments(&all[0], all, etcd, Path::new("/d")).join(" ");
        let (one, two) = ([place(0)], [place(0), place(1)]);
        assert_eq!(shown(&one, None), "--listen=10.0.0.1:100 --store=embedded --data-dir=/d/store");
        for all in [&one[..], &two] {
            assert_eq!(shown(all, Some("etcd://h:1")), "--listen=10.0.0.1:100 --store=etcd://h:1");
        }
        assert_eq!(
            shown(&two, None),
            "--listen=10.0.0.1:100 --store=embedded --data-dir=/d/store-apiserver-0 --name=apiserver-0 \
             --peers=apiserver-0=https://10.0.0.1:200,apiserver-1=https://10.0.0.1:201 \
             --peer-cert-file=/d/certs/apiserver-0.pem --peer-key-file=/d/certs/apiserver-0-key.pem \
             --peer-trusted-ca-file=/d/certs/ca.pem"
        );
        let names = |count| places(Ipv4Addr::LOCALHOST, count).expect("ports").into_iter().map(|place| place.name);
        assert_eq!(names(0).collect::<Vec<_>>(), ["apiserver"]);
        assert_eq!(names(2).collect::<Vec<_>>(), ["apiserver-0", "apiserver-1"]);
    }
}
