//! Real processes that are killed, damaged and misled. `MINIPOD_CRASH_ROUNDS=n` kills more often than the default 20 times.

#[path = "processes/server.rs"]
mod server;
mod support;

use etcd_client::{Client, GetOptions};
use server::Server;
use std::collections::BTreeMap;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use support::rng::Rng;

/// What clients were told, by key: the last value that was acknowledged, and the last that was sent.
type Told = Arc<Mutex<BTreeMap<String, (u64, u64)>>>;

/// Writes ever greater numbers to one key until the server is gone.
async fn write(mut client: Client, key: String, told: Told) {
    loop {
        let next = {
            let mut told = told.lock().expect("the lock");
            let entry = told.entry(key.clone()).or_default();
            entry.1 += 1;
            entry.1
        };
        let put = tokio::time::timeout(Duration::from_secs(5), client.put(key.as_str(), next.to_string(), None)).await;
        if !matches!(put, Ok(Ok(_))) {
            return;
        }
        told.lock().expect("the lock").entry(key.clone()).or_default().0 = next;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_acknowledged_write_survives_kill_9() {
    let rounds: u64 = std::env::var("MINIPOD_CRASH_ROUNDS").map_or(20, |rounds| rounds.parse().expect("a number"));
    let root = tempfile::tempdir().expect("a directory");
    let mut server = Server::new(root.path(), "only");
    // Snapshots come often, so that some kills hit them.
    server.args = ["--snapshot-count", "40"].map(str::to_owned).to_vec();
    let told = Told::default();
    let mut rng = Rng::new(std::process::id().into());
    let mut written = 0;
    for round in 0..rounds {
        server.start();
        let mut client = server.client().await;
        let found = client.get("k/", Some(GetOptions::new().with_prefix())).await.expect("read");
        let found: BTreeMap<_, u64> = found
            .kvs()
            .iter()
            .map(|kv| {
                (kv.key_str().expect("a key").to_owned(), kv.value_str().expect("a value").parse().expect("a number"))
            })
            .collect();
        for (key, (acknowledged, sent)) in told.lock().expect("the lock").iter_mut() {
            let value = found.get(key).copied().unwrap_or(0);
            assert!(
                (*acknowledged..=*sent).contains(&value),
                "round {round}: {key} is {value}, {acknowledged} was acknowledged, {sent} sent; {}",
                server.log()
            );
            // What is there now stays.
            *acknowledged = value;
            written = written.max(value);
        }
        let writers: Vec<_> = (0..16)
            .map(|number| tokio::spawn(write(client.clone(), format!("k/{number}"), Arc::clone(&told))))
            .collect();
        tokio::time::sleep(Duration::from_millis(20 + rng.below(250))).await;
        server.kill();
        for writer in writers {
            writer.await.expect("a writer");
        }
    }
    assert!(written > rounds, "hardly anything was written: {written}");
    let report = minipod_store::tool::verify(&server.dir).expect("the directory is whole");
    assert!(report.snapshots.iter().any(|(index, _)| *index > 1), "no snapshot was written: {report:?}");
}

/// A store with some keys, ended.
async fn filled(root: &std::path::Path) -> Server {
    let mut server = Server::new(root, "only");
    server.start();
    let mut client = server.client().await;
    for number in 0..50 {
        client.put(format!("k/{number}"), "v".repeat(500), None).await.expect("put");
    }
    server.terminate();
    server
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_named_and_a_torn_end_repaired() {
    let root = tempfile::tempdir().expect("a directory");
    let mut server = filled(root.path()).await;
    let before = minipod_store::tool::verify(&server.dir).expect("it is whole");
    let segment = server.dir.join("wal").join("0000000000000001.wal");
    let good = std::fs::read(&segment).expect("the segment");
    let end = good.iter().rposition(|byte| *byte != 0).expect("records");

    let mut bad = good.clone();
    bad[end / 2] ^= 1;
    std::fs::write(&segment, &bad).expect("write");
    let said = server.start_refused();
    assert!(
        said.contains("0000000000000001.wal is damaged at offset") && said.contains("nothing was changed"),
        "{said}"
    );
    assert_eq!(std::fs::read(&segment).expect("the segment"), bad, "a refusal changes nothing");
    assert!(minipod_store::tool::verify(&server.dir).expect_err("damaged").to_string().contains("offset"));

    // A crash in the middle of the next record.
    let mut torn = good;
    torn[end + 16..end + 48].copy_from_slice(&[7; 32]);
    std::fs::write(&segment, &torn).expect("write");
    server.start();
    let mut client = server.client().await;
    let found = client.get("k/", Some(GetOptions::new().with_prefix().with_count_only())).await.expect("read");
    assert_eq!(found.count(), 50);
    server.terminate();
    let after = minipod_store::tool::verify(&server.dir).expect("it is whole again");
    assert_eq!((before.revision, before.hash), (after.revision, after.hash));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_directory_is_refused() {
    let root = tempfile::tempdir().expect("a directory");
    let mut server = filled(root.path()).await;
    server.args = vec!["--initial-cluster".to_owned(), format!("only=http://{}", server.peer)];
    let said = server.start_refused();
    assert!(said.contains("belongs to member") && said.contains("of cluster"), "{said}");
    server.args = vec!["--initial-cluster".to_owned(), "other=http://127.0.0.1:1".to_owned()];
    let said = server.start_refused();
    assert!(said.contains("no member \"only\", only other"), "{said}");
    server.args = vec!["--join".to_owned(), "http://127.0.0.1:1".to_owned()];
    // It was a member before, and starts without anybody's help.
    server.start();
    server.client().await;
    let mut second = Server::new(root.path(), "only");
    second.dir = server.dir.clone();
    let said = second.start_refused();
    assert!(said.contains("is in use by another process"), "{said}");
    assert!(minipod_store::tool::verify(&server.dir).expect_err("in use").to_string().contains("in use"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saved_snapshot_becomes_a_store() {
    let root = tempfile::tempdir().expect("a directory");
    let mut server = filled(root.path()).await;
    server.start();
    server.client().await;
    let saved = root.path().join("saved.db");
    let endpoint = format!("--endpoints={}", server.client);
    let mut etcdctl = Command::new("etcdctl");
    etcdctl.env("ETCDCTL_API", "3").args([&endpoint, "snapshot", "save"]).arg(&saved);
    let output =
        etcdctl.output().expect("etcdctl does not start: install Debian's etcd-client (apt-get install etcd-client)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut again = Server::new(root.path(), "again");
    let restore = |dir: &std::path::Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minipod-store"));
        command.arg("restore").arg(&saved).arg("--data-dir").arg(dir).args(["--name", "again"]);
        command.output().expect("restore")
    };
    let output = restore(&again.dir);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let output = restore(&again.dir);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("has a store already"));
    again.start();
    let mut client = again.client().await;
    let found = client.get("k/", Some(GetOptions::new().with_prefix())).await.expect("read");
    assert_eq!(found.count(), 50);
    assert!(found.kvs().iter().all(|kv| kv.value().len() == 500));
    client.put("k/new", "v", None).await.expect("put");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_version_is_refused_and_left_alone() {
    let root = tempfile::tempdir().expect("a directory");
    let server = filled(root.path()).await;
    let segment = server.dir.join("wal").join("0000000000000001.wal");
    let mut newer = std::fs::read(&segment).expect("the segment");
    // The header's version and its checksum, as a later program would write them.
    newer[8] = 9;
    let crc = crc32fast::hash(&newer[..60]);
    newer[60..64].copy_from_slice(&crc.to_le_bytes());
    std::fs::write(&segment, &newer).expect("write");
    let said = server.start_refused();
    assert!(
        said.contains("0000000000000001.wal has format version 9") && said.contains("use the program that wrote it"),
        "{said}"
    );
    assert_eq!(std::fs::read(&segment).expect("the segment"), newer, "a refusal changes nothing");
}
