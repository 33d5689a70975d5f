//! Ports of the node that lead to pods (`hostPort`): which there are, kept in one small file per pod below
//! `<data-dir>/ports/`, so that an agent that starts anew forwards them from its first rule on.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use super::NetError;
use super::ipam::check_uid;

/// A transport that has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// By its name in a manifest; nothing is TCP.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name.to_ascii_lowercase().as_str() {
            "" | "tcp" => Some(Self::Tcp),
            "udp" => Some(Self::Udp),
            "sctp" => Some(Self::Sctp),
            _ => None,
        }
    }

    /// Its name in nft's language.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// A port of the node that a pod wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortWish {
    /// Its transport.
    pub protocol: Protocol,
    /// On this address of the node alone; `None`: on all.
    pub host_ip: Option<Ipv4Addr>,
    /// The node's port.
    pub host_port: u16,
    /// The pod's.
    pub port: u16,
}

/// A wish and the pod that it leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Forward {
    /// What is forwarded.
    pub wish: PortWish,
    /// Where to.
    pub pod_ip: Ipv4Addr,
}

/// Of all pods of the node.
#[derive(Debug)]
pub(super) struct PortBook {
    dir: PathBuf,
    by_uid: BTreeMap<String, Vec<Forward>>,
}

impl PortBook {
    /// Reads the book below `data_dir`; what cannot be read of it is thrown out.
    pub(super) fn open(data_dir: &Path) -> Result<Self, NetError> {
        let dir = data_dir.join("ports");
        fs::create_dir_all(&dir).map_err(|e| failed("create directory", &dir, e))?;
        let mut by_uid = BTreeMap::new();
        for entry in fs::read_dir(&dir).map_err(|e| failed("list", &dir, e))? {
            let path = entry.map_err(|e| failed("list", &dir, e))?.path();
            let uid = path.file_name().and_then(|name| name.to_str()).filter(|uid| check_uid(uid).is_ok());
            let text = fs::read_to_string(&path).unwrap_or_default();
            let forwards: Option<Vec<Forward>> = text.lines().map(parse).collect();
            match (uid, forwards) {
                (Some(uid), Some(forwards)) if !forwards.is_empty() => {
                    by_uid.insert(uid.to_owned(), forwards);
                }
                _ => {
                    tracing::warn!(path = %path.display(), "remove a broken entry of the book of ports");
                    remove(&path)?;
                }
            }
        }
        Ok(Self { dir, by_uid })
    }

    /// Everything that is to be forwarded, in a fixed order.
    pub(super) fn all(&self) -> Vec<Forward> {
        self.by_uid.values().flatten().copied().collect()
    }

    /// Makes the pod's ports exactly these; answers whether that changed anything.
    pub(super) fn set(&mut self, uid: &str, forwards: Vec<Forward>) -> Result<bool, NetError> {
        if self.by_uid.get(uid).map_or(&[][..], Vec::as_slice) == forwards {
            return Ok(false);
        }
        let path = self.dir.join(uid);
        if forwards.is_empty() {
            remove(&path)?;
            self.by_uid.remove(uid);
            return Ok(true);
        }
        let text: String = forwards.iter().map(line).collect();
        // One small write: there whole, or thrown out at the next start, when the pod's sandbox is made anew anyway.
        fs::write(&path, text).map_err(|e| failed("write", &path, e))?;
        self.by_uid.insert(uid.to_owned(), forwards);
        Ok(true)
    }

    /// Forgets the ports of pods that are not in `live`; answers whether there were any.
    pub(super) fn reconcile(&mut self, live: &HashSet<String>) -> Result<bool, NetError> {
        let dead: Vec<String> = self.by_uid.keys().filter(|uid| !live.contains(*uid)).cloned().collect();
        for uid in &dead {
            self.set(uid, Vec::new())?;
        }
        Ok(!dead.is_empty())
    }
}

fn line(forward: &Forward) -> String {
    let Forward { wish, pod_ip } = forward;
    let host_ip = wish.host_ip.unwrap_or(Ipv4Addr::UNSPECIFIED);
    format!("{} {host_ip} {} {pod_ip} {}\n", wish.protocol.name(), wish.host_port, wish.port)
}

fn parse(line: &str) -> Option<Forward> {
    let mut words = line.split(' ');
    let mut next = || words.next();
    let protocol = Protocol::parse(next()?)?;
    let host_ip: Ipv4Addr = next()?.parse().ok()?;
    let host_ip = Some(host_ip).filter(|ip| !ip.is_unspecified());
    let host_port = next()?.parse().ok()?;
    let pod_ip = next()?.parse().ok()?;
    let port = next()?.parse().ok()?;
    Some(Forward { wish: PortWish { protocol, host_ip, host_port, port }, pod_ip })
}

fn remove(path: &Path) -> Result<(), NetError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path, error)),
        _ => Ok(()),
    }
}

fn failed(operation: &'static str, path: &Path, source: io::Error) -> NetError {
    NetError::Io { operation, path: path.to_owned(), source }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn forward(protocol: Protocol, host_ip: Option<&str>, host_port: u16, pod: &str, port: u16) -> Forward {
        let host_ip = host_ip.map(|ip| ip.parse().expect("an address"));
        let wish = PortWish { protocol, host_ip, host_port, port };
        Forward { wish, pod_ip: pod.parse().expect("an address") }
    }

    #[test]
    fn the_book_survives_and_forgets() {
        let dir = tempfile::tempdir().expect("a directory");
        let open = || PortBook::open(dir.path()).expect("a book");
        let web = vec![
            forward(Protocol::Tcp, None, 8080, "10.0.0.2", 80),
            forward(Protocol::Udp, Some("192.0.2.1"), 53, "10.0.0.2", 5353),
        ];
        let other = vec![forward(Protocol::Sctp, None, 9, "10.0.0.3", 9)];
        let mut book = open();
        assert!(book.set("web", web.clone()).expect("set"));
        assert!(!book.set("web", web.clone()).expect("set"), "the same again");
        assert!(book.set("other", other.clone()).expect("set"));
        assert!(!book.set("none", Vec::new()).expect("set"));
        std::fs::write(dir.path().join("ports/broken"), "tcp x").expect("write");
        let mut book = open();
        assert_eq!(book.all(), [other, web.clone()].concat());
        assert!(!dir.path().join("ports/broken").exists());
        let live = HashSet::from(["web".to_owned()]);
        assert!(book.reconcile(&live).expect("reconcile") && !book.reconcile(&live).expect("reconcile"));
        assert_eq!(open().all(), web);
    }
}
