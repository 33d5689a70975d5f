//! Asking a running member, or an etcd, over its own protocol: what it says of itself, and a snapshot of what it holds.

use crate::peer::tls::{PeerTls, TlsError};
use etcd_client::{Client, SnapshotStreaming};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tonic::transport::Endpoint;

/// A connection is made within this time.
const CONNECT_PATIENCE: Duration = Duration::from_secs(3);
/// A question is answered within this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// What reads all keys takes longer to begin with: some seconds a gigabyte.
const LONG_PATIENCE: Duration = Duration::from_secs(60);

/// Why a member could not be asked, or what it said is of no use.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The address cannot be understood.
    #[error(
        "address {endpoint:?}: {problem}; write it like 127.0.0.1:2379, http://HOST:PORT, or https://HOST:PORT with certificates"
    )]
    Address {
        /// As it was given.
        endpoint: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Nobody answers there, or not with this protocol.
    #[error("{operation}: {endpoint} does not answer")]
    Connect {
        /// What was tried.
        operation: &'static str,
        /// Where.
        endpoint: String,
        /// Why not.
        #[source]
        source: tonic::transport::Error,
    },
    /// It answers with an error.
    #[error("{operation} at {endpoint}")]
    Call {
        /// What was asked.
        operation: &'static str,
        /// Where.
        endpoint: String,
        /// What it said.
        #[source]
        source: Box<etcd_client::Error>,
    },
    /// It does not answer in time.
    #[error("{operation} at {endpoint}: no answer within {seconds} s")]
    Timeout {
        /// What was asked.
        operation: &'static str,
        /// Where.
        endpoint: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The snapshot cannot be kept.
    #[error("{operation} {}", file.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        file: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// What arrived is not what was sent.
    #[error("snapshot from {endpoint}: {problem}; nothing was kept, try again")]
    Arrived {
        /// From where.
        endpoint: String,
        /// What is wrong.
        problem: &'static str,
    },
}

/// A member of the cluster, as another one knows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Known {
    /// Its id.
    pub id: u64,
    /// Its name; empty until it has started.
    pub name: String,
    /// Where its clients find it.
    pub client_urls: Vec<String>,
    /// Whether it has no vote.
    pub is_learner: bool,
}

/// A raised alarm.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Alarm {
    /// Whose.
    pub member_id: u64,
    /// `NOSPACE` or `CORRUPT`.
    pub kind: String,
}

/// What a member says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemberStatus {
    /// Its id.
    pub member_id: u64,
    /// Whom it takes for the leader; 0 for nobody.
    pub leader_id: u64,
    /// The etcd whose behaviour it has.
    pub version: String,
    /// Raft's term.
    pub term: u64,
    /// The last entry that it has applied.
    pub applied_index: u64,
    /// The store's revision.
    pub revision: i64,
    /// What it takes on disk, bytes.
    pub size_bytes: u64,
    /// How much of that is in use, bytes.
    pub used_bytes: u64,
    /// How much may be used, bytes; 0 when there is no limit or it does not say (an etcd before 3.6).
    pub quota_bytes: u64,
    /// What is raised in the cluster.
    pub alarms: Vec<Alarm>,
    /// What else is wrong, such as that there is no leader.
    pub problems: Vec<String>,
}

impl MemberStatus {
    /// Whether this store answers there, and not an etcd.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.version.ends_with("+minipod")
    }
}

/// What a member's keys and their history hash to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hashed {
    /// The hash. An etcd hashes otherwise than this store.
    pub hash: u32,
    /// The oldest revision that can be read there; hashes can be compared only when it is the same.
    pub compacted: i64,
}

/// A snapshot that has arrived whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    /// The file's length.
    pub bytes: u64,
}

/// A member that can be asked.
#[derive(Clone)]
pub struct Remote {
    client: Client,
    endpoint: String,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// The whole address of what may be only host and port.
fn address_of(endpoint: &str, has_tls: bool) -> Result<String, RemoteError> {
    let wrong = |problem: &str| RemoteError::Address { endpoint: endpoint.to_owned(), problem: problem.to_owned() };
    let given = endpoint.trim().trim_end_matches('/');
    let (scheme, rest) = match given.split_once("://") {
        Some((scheme, rest)) => (scheme, rest),
        None => (if has_tls { "https" } else { "http" }, given),
    };
    match (scheme, has_tls) {
        ("http", false) | ("https", true) => {}
        ("http", true) => return Err(wrong("certificates are given, and it says http")),
        ("https", false) => return Err(wrong("it says https, and no certificates are given")),
        _ => return Err(wrong("its scheme is neither http nor https")),
    }
    let (host, port) = rest.rsplit_once(':').ok_or_else(|| wrong("it has no port"))?;
    if host.is_empty() || host.contains('/') || !port.parse::<u16>().is_ok_and(|port| port > 0) {
        return Err(wrong("it is no host with a port"));
    }
    Ok(format!("{scheme}://{rest}"))
}

/// `memberID:5 alarm:NOSPACE `, as members report their alarms among what is wrong.
fn parse_alarm(text: &str) -> Option<Alarm> {
    let (member, kind) = text.trim().strip_prefix("memberID:")?.split_once(" alarm:")?;
    Some(Alarm { member_id: member.trim().parse().ok()?, kind: kind.trim().to_owned() })
}

impl Remote {
    /// A member at `endpoint`: `host:port` or a URL of that.
    ///
    /// # Errors
    /// When the address makes no sense.
    pub async fn new(endpoint: &str, tls: Option<&PeerTls>) -> Result<Self, RemoteError> {
        let address = address_of(endpoint, tls.is_some())?;
        let wrong = |error: tonic::transport::Error| RemoteError::Address {
            endpoint: endpoint.to_owned(),
            problem: crate::replica::run::with_causes(&error),
        };
        let dialled = Endpoint::from_shared(address.clone()).map_err(wrong)?;
        let dialled = dialled.connect_timeout(CONNECT_PATIENCE).tcp_nodelay(true);
        let dialled = match tls {
            Some(tls) => tls.dial(dialled).map_err(wrong)?,
            None => dialled,
        };
        // Connected here, because a lazy channel hides why nobody answers behind its first call.
        let channel = dialled.connect().await.map_err(|source| RemoteError::Connect {
            operation: "connect",
            endpoint: address.clone(),
            source,
        })?;
        let made = Client::from_channel(etcd_client::Channel::Tonic(channel), None).await;
        Ok(Self::with(made.map_err(|source| called("connect", &address, source))?, &address))
    }

    /// A member behind a client; `endpoint` is its name in errors.
    #[must_use]
    pub fn with(client: Client, endpoint: &str) -> Self {
        Self { client, endpoint: endpoint.to_owned() }
    }

    /// Where it is.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    async fn ask<T>(
        &self,
        operation: &'static str,
        call: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, RemoteError> {
        self.ask_within(PATIENCE, operation, call).await
    }

    async fn ask_within<T>(
        &self,
        patience: Duration,
        operation: &'static str,
        call: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, RemoteError> {
        match tokio::time::timeout(patience, call).await {
            Ok(answer) => answer.map_err(|source| called(operation, &self.endpoint, source)),
            Err(_) => {
                Err(RemoteError::Timeout { operation, endpoint: self.endpoint.clone(), seconds: patience.as_secs() })
            }
        }
    }

    /// The members as this one knows them; answered without a leader too.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn members(&self) -> Result<Vec<Known>, RemoteError> {
        let mut client = self.client.cluster_client();
        let list = self.ask("list the members", client.member_list()).await?;
        let known = list.members().iter().map(|member| Known {
            id: member.id(),
            name: member.name().to_owned(),
            client_urls: member.client_urls().to_vec(),
            is_learner: member.is_learner(),
        });
        Ok(known.collect())
    }

    /// What it says of itself; answered without a leader too.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn status(&self) -> Result<MemberStatus, RemoteError> {
        let mut client = self.client.maintenance_client();
        let said = self.ask("ask for the status", client.status()).await?;
        let header = said.header();
        let number = |bytes: i64| u64::try_from(bytes).unwrap_or(0);
        let alarms: Vec<Alarm> = said.errors().iter().filter_map(|text| parse_alarm(text)).collect();
        let others = said.errors().iter().filter(|text| parse_alarm(text).is_none());
        Ok(MemberStatus {
            member_id: header.map_or(0, etcd_client::ResponseHeader::member_id),
            leader_id: said.leader(),
            version: said.version().to_owned(),
            term: said.raft_term(),
            applied_index: said.raft_applied_index(),
            revision: header.map_or(0, etcd_client::ResponseHeader::revision),
            size_bytes: number(said.db_size()),
            used_bytes: number(said.raft_used_db_size()),
            quota_bytes: number(said.db_size_quota()),
            alarms,
            problems: others.map(|text| text.trim().to_owned()).collect(),
        })
    }

    /// The hash of everything up to `revision` (0: the present).
    ///
    /// # Errors
    /// When it does not answer, or the revision is compacted there or yet to come.
    pub async fn hash(&self, revision: i64) -> Result<Hashed, RemoteError> {
        let mut client = self.client.maintenance_client();
        let said = self.ask_within(LONG_PATIENCE, "hash the keys", client.hash_kv(revision)).await?;
        Ok(Hashed { hash: said.hash(), compacted: said.compact_version() })
    }

    /// Saves everything that it holds into `file`, which is there only when all of it has arrived and is on disk; an older
    /// one of that name stays until then.
    ///
    /// # Errors
    /// When it does not answer, the file cannot be written, or what arrived is damaged.
    pub async fn save(&self, file: &Path) -> Result<Saved, RemoteError> {
        let mut client = self.client.maintenance_client();
        let mut pieces = self.ask_within(LONG_PATIENCE, "read a snapshot", client.snapshot()).await?;
        let mut name = file.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        let part = file.with_file_name(name);
        let done = self.receive(&mut pieces, &part, file).await;
        if done.is_err() {
            // The first error is the one that counts.
            let _ = std::fs::remove_file(&part);
        }
        done
    }

    async fn receive(&self, pieces: &mut SnapshotStreaming, part: &Path, file: &Path) -> Result<Saved, RemoteError> {
        let failed = |operation, path: &Path| {
            let file = path.to_owned();
            move |source| RemoteError::File { operation, file, source }
        };
        let mut out = File::create(part).map_err(failed("create", part))?;
        let (mut check, mut bytes) = (Tail::default(), 0_u64);
        while let Some(piece) = self.ask_within(LONG_PATIENCE, "read a snapshot", pieces.message()).await? {
            out.write_all(piece.blob()).map_err(failed("write", part))?;
            check.take(piece.blob());
            bytes += piece.blob().len() as u64;
        }
        if !check.fits() {
            let problem = "its digest does not fit what arrived: it was cut off or changed on the way";
            return Err(RemoteError::Arrived { endpoint: self.endpoint.clone(), problem });
        }
        out.sync_all().map_err(failed("sync", part))?;
        std::fs::rename(part, file).map_err(failed("name", file))?;
        let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed("sync", dir))?;
        Ok(Saved { bytes })
    }
}

fn called(operation: &'static str, endpoint: &str, source: etcd_client::Error) -> RemoteError {
    RemoteError::Call { operation, endpoint: endpoint.to_owned(), source: Box::new(source) }
}

/// Checks a stream whose last 32 bytes are the SHA-256 of all before them.
#[derive(Default)]
struct Tail {
    hasher: Sha256,
    /// The last bytes so far, at most 32, which are not hashed yet.
    tail: Vec<u8>,
}

impl Tail {
    fn take(&mut self, piece: &[u8]) {
        self.tail.extend_from_slice(piece);
        let settled = self.tail.len().saturating_sub(32);
        self.hasher.update(self.tail.get(..settled).unwrap_or_default());
        self.tail.drain(..settled);
    }

    fn fits(self) -> bool {
        self.tail.len() == 32 && self.hasher.finalize().as_slice() == self.tail
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_completed_or_refused() {
        for (given, tls, whole) in [
            ("127.0.0.1:2379", false, "http://127.0.0.1:2379"),
            ("http://h:1/", false, "http://h:1"),
            ("h:1", true, "https://h:1"),
            ("https://[::1]:1", true, "https://[::1]:1"),
        ] {
            assert_eq!(address_of(given, tls).expect("good"), whole, "{given}");
        }
        for (given, tls, problem) in [
            ("http://h:1", true, "it says http"),
            ("https://h:1", false, "no certificates"),
            ("etcd://h:1", false, "neither http nor https"),
            ("h", false, "no port"),
            ("h:0", false, "no host with a port"),
            (":1", false, "no host with a port"),
            ("http://h/x:1", false, "no host with a port"),
        ] {
            let said = address_of(given, tls).expect_err("refused").to_string();
            assert!(said.contains(problem) && said.contains(given), "{given}: {said}");
        }
    }

    #[test]
    fn alarms_are_read_as_members_print_them() {
        let alarm = |member_id, kind: &str| Some(Alarm { member_id, kind: kind.to_owned() });
        for (text, right) in [
            ("memberID:5 alarm:NOSPACE ", alarm(5, "NOSPACE")),
            ("memberID:9372538179322589801 alarm:CORRUPT", alarm(9_372_538_179_322_589_801, "CORRUPT")),
            ("etcdserver: no leader", None),
            ("memberID:x alarm:NOSPACE", None),
        ] {
            assert_eq!(parse_alarm(text), right, "{text}");
        }
    }

    #[test]
    fn the_digest_is_found_however_the_stream_is_cut() {
        let content: Vec<u8> = (0..1_000_u32).flat_map(u32::to_le_bytes).collect();
        let mut whole = content.clone();
        whole.extend_from_slice(&Sha256::digest(&content));
        for piece in [1, 7, 31, 32, 33, 1_000, whole.len()] {
            let fits = |bytes: &[u8]| {
                let mut tail = Tail::default();
                bytes.chunks(piece).for_each(|piece| tail.take(piece));
                tail.fits()
            };
            assert!(fits(&whole), "pieces of {piece}");
            assert!(!fits(&whole[..whole.len() - 1]), "cut off, pieces of {piece}");
            let mut changed = whole.clone();
            changed[100] ^= 1;
            assert!(!fits(&changed), "changed, pieces of {piece}");
        }
        assert!(!Tail::default().fits(), "nothing is no snapshot");
    }
}
