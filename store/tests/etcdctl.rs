//! Debian's etcdctl (API 3) against the face, and snapshots from us to a real etcd and back.

mod common;

use common::{Etcd, Ours, free_port};
use etcd_client::proto::*;
use minipod_store::etcdapi::FaceConfig;
use minipod_store::mvcc::bolt;
use std::net::SocketAddr;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Runs etcdctl; what it wrote.
async fn etcdctl(address: SocketAddr, args: &[&str]) -> Output {
    run(address, args, "").await
}

async fn run(address: SocketAddr, args: &[&str], input: &'static str) -> Output {
    let mut command = tokio::process::Command::new("etcdctl");
    command.env("ETCDCTL_API", "3").arg("--endpoints").arg(address.to_string()).args(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let mut child =
        command.spawn().expect("etcdctl does not start: install Debian's etcd-client (apt-get install etcd-client)");
    let mut stdin = child.stdin.take().unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stdin, input.as_bytes()).await.unwrap();
    drop(stdin);
    let output = tokio::time::timeout(Duration::from_secs(60), child.wait_with_output()).await;
    output.unwrap_or_else(|_| panic!("etcdctl {args:?} does not end")).unwrap()
}

async fn told(address: SocketAddr, args: &[&str]) -> String {
    let output = etcdctl(address, args).await;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "etcdctl {args:?}: {out} {err}");
    out.into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcdctl_works() {
    let ours = Ours::start(FaceConfig::default()).await;
    let at = ours.address;
    assert_eq!(told(at, &["put", "/a/1", "one"]).await, "OK\n");
    assert_eq!(told(at, &["put", "/a/2", "two"]).await, "OK\n");
    assert_eq!(told(at, &["put", "/b", "three", "--prev-kv"]).await, "OK\n");
    assert_eq!(told(at, &["get", "/a/", "--prefix"]).await, "/a/1\none\n/a/2\ntwo\n");
    assert_eq!(told(at, &["get", "/a", "/b", "--order=DESCEND", "--limit=1", "--print-value-only"]).await, "two\n");
    assert_eq!(told(at, &["get", "", "--from-key", "--keys-only", "--limit=1"]).await.trim(), "/a/1");
    assert_eq!(told(at, &["get", "/a/1", "--rev=1"]).await, "");
    assert_eq!(told(at, &["del", "/a/", "--prefix", "--prev-kv"]).await, "2\n/a/1\none\n/a/2\ntwo\n");
    let output =
        run(at, &["txn", "--interactive=false"], "mod(\"/b\") > \"0\"\n\nput /c yes\nget /b\n\nput /c no\n\n").await;
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("SUCCESS"), "{output:?}");
    assert_eq!(told(at, &["get", "/c", "--print-value-only"]).await, "yes\n");
    leases(at).await;
    watches(&ours).await;
    let compacted = told(at, &["compaction", "5"]).await;
    assert_eq!(compacted, "compacted revision 5\n");
    let late = etcdctl(at, &["get", "/b", "--rev=2"]).await;
    assert!(String::from_utf8_lossy(&late.stderr).contains("required revision has been compacted"), "{late:?}");
    assert!(told(at, &["member", "list"]).await.contains("alone"));
    let health = etcdctl(at, &["endpoint", "health"]).await;
    assert!(health.status.success(), "{health:?}");
    assert!(told(at, &["endpoint", "status"]).await.contains("3.5.13"));
    assert!(told(at, &["endpoint", "hashkv"]).await.contains(&at.to_string()));
    assert_eq!(told(at, &["alarm", "list"]).await, "");
    assert!(told(at, &["defrag"]).await.contains("Finished"));
}

async fn leases(at: SocketAddr) {
    let granted = told(at, &["lease", "grant", "100"]).await;
    let id = granted.split(' ').nth(1).unwrap();
    told(at, &["put", "/leased", "x", &format!("--lease={id}")]).await;
    let left = told(at, &["lease", "timetolive", id, "--keys"]).await;
    assert!(left.contains("granted with TTL(100s)") && left.contains("/leased"), "{left}");
    assert!(told(at, &["lease", "list"]).await.contains(id));
    assert!(told(at, &["lease", "keep-alive", "--once", id]).await.contains("keepalived with TTL(100)"));
    assert!(told(at, &["lease", "revoke", id]).await.contains("revoked"));
    assert_eq!(told(at, &["get", "/leased"]).await, "");
}

async fn watches(ours: &Ours) {
    let mut command = tokio::process::Command::new("etcdctl");
    command.env("ETCDCTL_API", "3").arg("--endpoints").arg(ours.address.to_string());
    command.args(["watch", "/w", "--prefix", "--rev=2", "--prev-kv"]).stdout(Stdio::piped()).kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().unwrap()));
    told(ours.address, &["put", "/w1", "x"]).await;
    told(ours.address, &["put", "/w1", "y"]).await;
    told(ours.address, &["del", "/w1"]).await;
    let mut seen = Vec::new();
    while seen.len() < 10 {
        let line = tokio::time::timeout(Duration::from_secs(20), lines.next_line()).await;
        seen.push(line.unwrap_or_else(|_| panic!("the watch says no more than {seen:?}")).unwrap().unwrap());
    }
    // An event is its kind, what was there before, and what is there now.
    assert_eq!(seen.join(" "), "PUT /w1 x PUT /w1 x /w1 y DELETE /w1", "{seen:?}");
    child.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_of_ours_becomes_an_etcd_and_an_etcd_becomes_ours() {
    let ours = Ours::start(FaceConfig::default()).await;
    let at = ours.address;
    ours.client.grant(&PbLeaseGrantRequest { ttl: 3_600, id: 42 }).await.unwrap();
    for i in 0..2_000 {
        let (key, value) = (format!("key-{:03}", i % 300).into_bytes(), vec![b'a' + (i % 26) as u8; i % 3_000]);
        let lease = if i % 7 == 0 { 42 } else { 0 };
        ours.client.put(&PbPutRequest { key, value, lease, ..Default::default() }).await.unwrap();
    }
    let delete = PbDeleteRequest { key: b"key-1".to_vec(), range_end: b"key-15".to_vec(), ..Default::default() };
    ours.client.delete(&delete).await.unwrap();
    ours.client.compact(&PbCompactionRequest { revision: 1_500, physical: true }).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("snapshot.db");
    let path = file.to_str().unwrap();
    told(at, &["snapshot", "save", path]).await;
    let status = told(at, &["snapshot", "status", path]).await;
    assert!(status.contains("2002"), "the revision: {status}");

    // To a real etcd.
    let data = dir.path().join("etcd");
    told(at, &["snapshot", "restore", path, "--data-dir", data.to_str().unwrap()]).await;
    let etcd = Restored::start(&data).await;
    let everything = PbRangeRequest { key: vec![0], range_end: vec![0], ..Default::default() };
    for revision in [0, 1_500, 1_700] {
        let request = PbRangeRequest { revision, ..everything.clone() };
        let theirs = etcd.client.range(&request).await.unwrap().kvs;
        assert_eq!(theirs, ours.client.range(&request).await.unwrap().kvs, "at revision {revision}");
    }
    let left = etcd.client.ttl(&PbLeaseTimeToLiveRequest { id: 42, keys: true }).await.unwrap();
    let mine = ours.client.ttl(&PbLeaseTimeToLiveRequest { id: 42, keys: true }).await.unwrap();
    assert_eq!((left.granted_ttl, left.keys.len()), (3_600, mine.keys.len()));

    // And back, after more changes there.
    let put = PbPutRequest { key: b"new".to_vec(), value: b"there".to_vec(), lease: 42, ..Default::default() };
    etcd.client.put(&put).await.unwrap();
    let back = dir.path().join("back.db");
    told(etcd.address, &["snapshot", "save", back.to_str().unwrap()]).await;
    let store = bolt::import(&std::fs::read(&back).unwrap()).unwrap();
    let answer = etcd.client.range(&everything).await.unwrap();
    let request = minipod_store::wire::Range { key: &[0], range_end: &[0], ..Default::default() };
    let mut encoded = Vec::new();
    store.range(&request).unwrap().encode(&mut encoded);
    assert_eq!(prost::Message::decode(&encoded[..]).map(|answer: PbRangeResponse| answer.kvs), Ok(answer.kvs));
    assert_eq!(store.revision(), answer.header.unwrap().revision);
    assert_eq!(store.leases().get(42).unwrap().keys.len(), mine.keys.len() + 1);
}

/// A real etcd on data that exists.
struct Restored {
    client: common::Raw,
    address: SocketAddr,
    process: std::process::Child,
}

impl Restored {
    async fn start(data: &std::path::Path) -> Self {
        let [client, peer] = [free_port(), free_port()].map(|port| format!("http://127.0.0.1:{port}"));
        let process = Command::new("etcd")
            .args(["--log-level", "error", "--logger", "zap", "--data-dir"])
            .arg(data)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client, "--listen-peer-urls", &peer])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("etcd does not start: install Debian's etcd-server (apt-get install etcd-server)");
        let address = client.strip_prefix("http://").unwrap().parse().unwrap();
        let restored = Self { client: common::Raw::connect(address).await, address, process };
        let start = Instant::now();
        while let Err(status) = restored.client.members(&PbMemberListRequest::default()).await {
            assert!(start.elapsed() < Duration::from_secs(20), "the restored etcd does not answer: {status}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        restored
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[tokio::test]
async fn the_oracle_is_there() {
    // The differential test needs it; said here once, plainly.
    let etcd = Etcd::start().await;
    let status = etcd.client.status(&PbStatusRequest::default()).await.unwrap();
    assert!(
        status.version.starts_with("3.4."),
        "etcd {} is installed; the differences are listed for 3.4",
        status.version
    );
}
