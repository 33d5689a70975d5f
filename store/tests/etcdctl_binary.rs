//! Debian's etcdctl (API 3) against real processes: one and three replicas.

#[path = "processes/server.rs"]
mod server;

use etcd_client::{Client, TxnOp};
use server::{Server, cluster, until};
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Output, Stdio};

/// etcdctl with the addresses of `servers`.
fn etcdctl(servers: &[Server], args: &[&str]) -> Command {
    let endpoints: Vec<String> = servers.iter().map(|server| server.client.to_string()).collect();
    let mut command = Command::new("etcdctl");
    command.env("ETCDCTL_API", "3").arg(format!("--endpoints={}", endpoints.join(","))).args(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run(servers: &[Server], args: &[&str], input: &str) -> Output {
    let child = etcdctl(servers, args).spawn();
    let mut child = child.expect("etcdctl does not start: install Debian's etcd-client (apt-get install etcd-client)");
    child.stdin.take().expect("stdin").write_all(input.as_bytes()).expect("write to etcdctl");
    child.wait_with_output().expect("etcdctl")
}

fn told(servers: &[Server], args: &[&str]) -> String {
    let output = run(servers, args, "");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "etcdctl {args:?}: {out} {err}");
    // Healthy endpoints are told on the one or the other, by version.
    format!("{out}{}", if args[0] == "endpoint" { err } else { "".into() })
}

fn keys_and_transactions(servers: &[Server]) {
    assert_eq!(told(servers, &["put", "/a/1", "one"]), "OK\n");
    assert_eq!(told(servers, &["put", "/a/2", "two"]), "OK\n");
    assert_eq!(told(servers, &["get", "/a/", "--prefix"]), "/a/1\none\n/a/2\ntwo\n");
    assert_eq!(told(servers, &["del", "/a/", "--prefix", "--prev-kv"]), "2\n/a/1\none\n/a/2\ntwo\n");
    let output = run(servers, &["txn"], "ver(\"/a/1\") = \"0\"\n\nput /c yes\n\nput /c no\n\n");
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("SUCCESS"), "{output:?}");
    assert_eq!(told(servers, &["get", "/c", "--print-value-only"]), "yes\n");
    let granted = told(servers, &["lease", "grant", "100"]);
    let id = granted.split(' ').nth(1).expect("an id");
    told(servers, &["put", "/leased", "x", &format!("--lease={id}")]);
    assert!(told(servers, &["lease", "timetolive", id, "--keys"]).contains("/leased"));
    assert!(told(servers, &["lease", "list"]).contains(id));
    assert!(told(servers, &["lease", "keep-alive", "--once", id]).contains("keepalived with TTL(100)"));
    assert!(told(servers, &["lease", "revoke", id]).contains("revoked"));
    assert_eq!(told(servers, &["get", "/leased"]), "");
}

fn watches_and_compaction(servers: &[Server]) {
    let mut child =
        etcdctl(servers, &["watch", "/a/", "--prefix", "--rev=2", "--prev-kv"]).spawn().expect("start etcdctl");
    let lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
    let seen: Vec<String> = lines.take(6).map(|line| line.expect("a line")).collect();
    child.kill().and_then(|()| child.wait()).expect("end the watch");
    assert_eq!(seen, ["PUT", "/a/1", "one", "PUT", "/a/2", "two"]);
    assert_eq!(told(servers, &["compaction", "--physical", "2"]), "compacted revision 2\n");
    assert_eq!(told(servers, &["compaction", "3"]), "compacted revision 3\n");
    let late = run(servers, &["get", "/a/1", "--rev=2"], "");
    assert!(String::from_utf8_lossy(&late.stderr).contains("required revision has been compacted"), "{late:?}");
}

/// The options of reads and writes.
fn options(servers: &[Server]) {
    for (key, value) in [("/o/1", "c"), ("/o/2", "a"), ("/o/3", "b")] {
        told(servers, &["put", key, value]);
    }
    assert_eq!(told(servers, &["get", "/o/2", "--from-key", "--limit=1"]), "/o/2\na\n");
    let sorted = told(servers, &["get", "/o/", "--prefix", "--sort-by=VALUE", "--order=DESCEND", "--print-value-only"]);
    assert_eq!(sorted, "c\nb\na\n");
    assert_eq!(told(servers, &["get", "/o/1", "/o/3", "--keys-only"]), "/o/1\n\n/o/2\n\n");
    assert_eq!(told(servers, &["get", "/o/1", "--consistency=s", "--print-value-only"]), "c\n");
    assert_eq!(told(servers, &["put", "/o/1", "d", "--prev-kv"]), "OK\n/o/1\nc\n");
    let id = told(servers, &["lease", "grant", "100"]).split(' ').nth(1).expect("an id").to_owned();
    told(servers, &["put", "/o/1", "--ignore-value", &format!("--lease={id}")]);
    told(servers, &["put", "/o/1", "e", "--ignore-lease"]);
    assert!(told(servers, &["lease", "timetolive", &id, "--keys"]).contains("/o/1"));
    assert_eq!(told(servers, &["get", "/o/1", "--print-value-only"]), "e\n");
    told(servers, &["lease", "revoke", &id]);
    assert_eq!(told(servers, &["del", "/o/", "--prefix"]), "2\n");
    // A lock is made of keys, leases and watches; who holds it runs a command.
    let held = run(servers, &["lock", "/lock", "echo", "holding"], "");
    assert_eq!(String::from_utf8_lossy(&held.stdout), "holding\n", "{held:?}");
    // There are no users here, and nobody is made to believe that there are.
    let refused = run(servers, &["auth", "enable"], "");
    assert!(
        !refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("nimplemented"),
        "{refused:?}"
    );
}

/// A mirror reads all keys at one revision and follows from there.
async fn mirrored(servers: &[Server]) {
    let root = tempfile::tempdir().expect("a directory");
    let mut other = Server::new(root.path(), "mirror");
    other.start();
    other.client().await;
    told(servers, &["put", "/m/before", "x"]);
    let destination = other.client.to_string();
    let mut child = etcdctl(servers, &["make-mirror", "--prefix=/m/", &destination]).spawn().expect("start etcdctl");
    let there = [other];
    let arrives = async |key: &str| {
        until("a key is mirrored", async || {
            let keys = told(&there, &["get", "/m/", "--prefix", "--keys-only"]);
            if keys.contains(key) { Ok(()) } else { Err(keys) }
        })
        .await;
    };
    arrives("/m/before").await;
    told(servers, &["put", "/m/after", "y"]);
    arrives("/m/after").await;
    child.kill().and_then(|()| child.wait()).expect("end the mirror");
}

/// With `MINIPOD_CHECK_PERF=1`: a minute of etcd's own small load, which must pass.
fn check_perf(servers: &[Server]) {
    if std::env::var_os("MINIPOD_CHECK_PERF").is_some() {
        let output = run(servers, &["check", "perf", "--load=s"], "");
        println!("{}", String::from_utf8_lossy(&output.stdout));
        assert!(output.status.success(), "etcdctl check perf: {output:?}");
    }
}

/// `health`, `status`, `hashkv`, `defrag` and the like, which speak to each member.
fn maintenance(servers: &[Server]) {
    let count = |text: &str| servers.iter().filter(|server| text.contains(&server.client.to_string())).count();
    for args in [&["endpoint", "health"][..], &["endpoint", "status"], &["endpoint", "hashkv"]] {
        assert_eq!(count(&told(servers, args)), servers.len(), "etcdctl {args:?}");
    }
    // Not `endpoint status --cluster`: etcdctl 3.4 sends a whole URL as its :authority there, which is against RFC 9113 8.3.1, and the HTTP/2
    // library here ends such streams.
    assert_eq!(count(&told(servers, &["endpoint", "health", "--cluster"])), servers.len());
    assert_eq!(told(servers, &["alarm", "disarm"]), "");
    assert_eq!(told(servers, &["defrag"]).matches("Finished").count(), servers.len());
    assert_eq!(told(servers, &["alarm", "list"]), "");
    let file = servers[0].dir.with_extension("db");
    let path = file.to_str().expect("a path");
    told(&servers[..1], &["snapshot", "save", path]);
    let status = told(&servers[..1], &["snapshot", "status", path]);
    assert!(status.split(", ").count() == 4, "hash, revision, keys, size: {status}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcdctl_drives_one_process() {
    let root = tempfile::tempdir().expect("a directory");
    let mut servers = [Server::new(root.path(), "only")];
    servers[0].start();
    let mut client = servers[0].client().await;
    keys_and_transactions(&servers);
    watches_and_compaction(&servers);
    maintenance(&servers);
    options(&servers);
    mirrored(&servers).await;
    limits(&mut client).await;
    check_perf(&servers);
}

/// What is too large or too much is refused in etcd's words, and nothing of it is done.
async fn limits(client: &mut Client) {
    let error = client.put("/large", vec![b'x'; (3 << 19) + 1024], None).await.expect_err("it is too large");
    assert!(error.to_string().contains("request is too large"), "{error}");
    let ops: Vec<_> = (0..129).map(|number| TxnOp::put(format!("/many/{number}"), "x", None)).collect();
    let error = client.txn(etcd_client::Txn::new().and_then(ops)).await.expect_err("too many");
    assert!(error.to_string().contains("too many operations in txn request"), "{error}");
    for key in ["/large", "/many/0"] {
        assert!(client.get(key, None).await.expect("get").kvs().is_empty(), "{key}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcdctl_drives_three_processes() {
    let root = tempfile::tempdir().expect("a directory");
    let servers = cluster(root.path());
    for server in &servers {
        server.client().await;
    }
    keys_and_transactions(&servers);
    watches_and_compaction(&servers);
    options(&servers);
    mirrored(&servers).await;
    let mut client = servers[0].client().await;
    until("all members are known", async || {
        let list = told(&servers, &["member", "list"]);
        if list.matches("started").count() == 3 { Ok(()) } else { Err(list) }
    })
    .await;
    // Every member has told where its clients find it by now, which --cluster needs.
    maintenance(&servers);
    let leader = client.status().await.expect("status").leader();
    let members = client.member_list().await.expect("members");
    let next = members.members().iter().find(|member| member.id() != leader).expect("a follower").id();
    let moved = told(&servers, &["move-leader", &format!("{next:x}")]);
    assert!(moved.contains("Leadership transferred"), "{moved}");
    until("the new leader is known", async || {
        let leader = client.status().await.map_err(|error| error.to_string())?.leader();
        if leader == next { Ok(()) } else { Err(format!("{leader:x}")) }
    })
    .await;
    let added = told(&servers, &["member", "add", "d", "--peer-urls=http://127.0.0.1:1", "--learner"]);
    let id = added.split_whitespace().nth(1).expect("an id");
    assert!(added.contains("added to cluster"), "{added}");
    told(&servers, &["member", "update", id, "--peer-urls=http://127.0.0.1:2"]);
    assert!(told(&servers, &["member", "list"]).contains("http://127.0.0.1:2"));
    assert!(told(&servers, &["member", "remove", id]).contains("removed from cluster"));
    assert_eq!(told(&servers, &["member", "list"]).lines().count(), 3);
    check_perf(&servers);
}
