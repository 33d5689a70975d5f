//! The store of a control plane in an operator's hands: `minictl store`, etcdctl, a full store, and moving to an etcd and back. Real
//! processes, listening on loopback.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use minipod_tests::cluster::{bin_dir, text};
use minipod_tests::plane::http_get;
use serde_json::Value;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// Tries until it works; panics with the last answer otherwise.
fn until<T>(what: &str, mut attempt: impl FnMut() -> Result<T, String>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(last) if Instant::now() > deadline => panic!("{what} did not happen within {PATIENCE:?}; last: {last}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// A process that ends with the test, also when it fails.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(program: &Path, arguments: &[String], log: PathBuf) -> Process {
        let out = File::options().create(true).append(true).open(&log).expect("the log");
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(out)
            .spawn()
            .unwrap_or_else(|error| {
                panic!("{} does not start ({error}): cargo build --workspace --bins", program.display())
            });
        Process { child, log }
    }

    /// SIGTERM, and waits for the end.
    fn terminate(mut self) {
        let told = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().expect("kill runs");
        assert!(told.success());
        let deadline = Instant::now() + PATIENCE;
        while self.child.try_wait().expect("it is ours").is_none() {
            assert!(Instant::now() < deadline, "it does not end; {}", self.said());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An API server, to be started again and again at the same addresses.
struct Server {
    api: u16,
    store: u16,
    metrics: u16,
    dir: PathBuf,
    process: Option<Process>,
}

impl Server {
    fn new(root: &TempDir, name: &str) -> Server {
        let dir = root.path().join(name);
        Server { api: free_port(), store: free_port(), metrics: free_port(), dir, process: None }
    }

    fn start(&mut self, store: &[&str]) {
        let mut arguments =
            vec![format!("--listen=127.0.0.1:{}", self.api), format!("--metrics-listen=127.0.0.1:{}", self.metrics)];
        arguments.extend(store.iter().map(|&flag| flag.to_owned()));
        self.process =
            Some(Process::start(&bin_dir().join("minipod-apiserver"), &arguments, self.dir.with_extension("log")));
        until("the API server is healthy", || {
            let answer = self.http("/healthz");
            if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(format!("{answer}; {}", self.log())) }
        });
    }

    /// With the embedded store, which is served on loopback.
    fn start_embedded(&mut self, more: &[&str]) {
        let (dir, store) =
            (format!("--data-dir={}", self.dir.display()), format!("--store-listen={}", self.endpoint()));
        self.start(&[&["--store=embedded", &dir, &store], more].concat());
    }

    fn stop(&mut self) {
        self.process.take().expect("it runs").terminate();
    }

    fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.store)
    }

    fn log(&self) -> String {
        self.process.as_ref().map(Process::said).unwrap_or_default()
    }

    fn http(&self, path: &str) -> String {
        http_get(("127.0.0.1", self.metrics), path).unwrap_or_else(|error| error.to_string())
    }

    fn minictl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(bin_dir().join("minictl"));
        command.env_clear().env("MINIPOD_SERVER", format!("http://127.0.0.1:{}", self.api));
        command.args(arguments).stdin(Stdio::null()).output().expect("minictl starts: cargo build --workspace --bins")
    }

    /// What minictl prints; it must succeed.
    fn told(&self, arguments: &[&str]) -> String {
        let output = self.minictl(arguments);
        let (out, errors) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "minictl {arguments:?}: {out}{errors}; the server: {}", self.log());
        out
    }

    /// What minictl says on standard error; it must fail.
    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.minictl(arguments);
        assert!(!output.status.success(), "minictl {arguments:?} succeeded: {}", text(&output.stdout));
        text(&output.stderr)
    }

    fn apply(&self, root: &TempDir, name: &str, value: &str) -> Output {
        self.send("apply", root, name, value)
    }

    fn send(&self, verb: &str, root: &TempDir, name: &str, value: &str) -> Output {
        let file = root.path().join("manifest.yaml");
        let manifest = format!("apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: {name}}}\ndata: {{key: {value}}}\n");
        fs::write(&file, manifest).expect("written");
        self.minictl(&[verb, "-f", &file.to_string_lossy()])
    }

    fn must_apply(&self, root: &TempDir, name: &str, value: &str) {
        let output = self.apply(root, name, value);
        assert!(output.status.success(), "apply {name}: {}; the server: {}", text(&output.stderr), self.log());
    }

    fn config_maps(&self) -> Vec<String> {
        let names = self.told(&["get", "configmaps", "-o", "name"]);
        names.lines().map(str::to_owned).collect()
    }

    fn status(&self) -> Value {
        serde_json::from_str(&self.told(&["store", "status", "-o", "json"])).expect("JSON")
    }
}

fn etcdctl(endpoint: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("etcdctl");
    command.env("ETCDCTL_API", "3").arg(format!("--endpoints={endpoint}")).args(arguments).stdin(Stdio::null());
    command.output().expect("etcdctl does not start: install Debian's etcd-client (apt-get install etcd-client)")
}

fn etcdctl_told(endpoint: &str, arguments: &[&str]) -> String {
    let output = etcdctl(endpoint, arguments);
    assert!(output.status.success(), "etcdctl {arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn temporary() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

#[test]
fn a_store_is_looked_at_saved_checked_and_restored() {
    let root = temporary();
    let mut server = Server::new(&root, "first");
    server.start_embedded(&[]);
    for name in ["one", "two"] {
        server.must_apply(&root, name, "before");
    }

    let table = server.told(&["store", "status"]);
    let row: Vec<&str> = table.lines().nth(1).expect("a member").split_whitespace().collect();
    assert_eq!((row[1], row[2], row[8], row[9]), ("default", "leader", "2Gi", "3.5.13+minipod"), "{table}");
    assert_eq!(table.lines().count(), 2, "nothing is wrong: {table}");
    let status = server.status();
    assert_eq!((&status["kind"], &status["alarms"]), (&"embedded".into(), &Value::Array(Vec::new())), "{status}");
    let endpoint = server.endpoint();
    assert!(server.told(&["store", "status", "--endpoints", &endpoint]).contains("leader"));
    let metrics = server.http("/metrics");
    for name in ["minipod_store_is_leader 1", "minipod_store_alarms_no_space 0", "minipod_store_quota_bytes 2147483648"]
    {
        assert!(metrics.lines().any(|line| line == name), "{name} is not in {metrics}");
    }
    assert!(metrics.contains("minipod_store_wal_sync_seconds_bucket{le=\"0.0001\"}"), "{metrics}");
    let value = |name: &str| -> i64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse().expect("a number")
    };
    assert!(value("minipod_store_wal_sync_seconds_count") > 2 && value("minipod_store_watchers") >= 1);
    assert!(
        value("minipod_store_keys") >= 3
            && value("minipod_store_applied_index") > 2
            && value("minipod_store_wal_bytes") > 0
    );

    let saved = root.path().join("saved.db");
    let saved_text = saved.to_string_lossy().into_owned();
    let said = server.told(&["store", "snapshot", &saved_text, "--endpoints", &endpoint]);
    assert!(said.starts_with(&format!("saved {saved_text}: ")) && said.contains(" keys, hash "), "{said}");
    assert!(etcdctl(&endpoint, &["snapshot", "status", &saved_text]).status.success());
    let verified = server.told(&["store", "verify", &saved_text]);
    assert!(verified.contains("form etcd\nchecksum yes\n") && verified.contains("\nrevision "), "{verified}");
    let data = server.dir.to_string_lossy().into_owned();
    assert!(server.refused(&["store", "verify", &data]).contains("is in use by another process"));
    server.must_apply(&root, "three", "after");
    server.stop();

    let whole = server.told(&["store", "verify", &data]);
    assert!(whole.contains("\nhash ") && whole.contains("\nsnapshot 1 term 1\n"), "{whole}");
    assert!(server.told(&["store", "dump", &data]).contains(" record 0 term "));
    let segment = server.dir.join("wal/0000000000000001.wal");
    let good = fs::read(&segment).expect("the log");
    let middle = good.iter().rposition(|byte| *byte != 0).expect("records") / 2;
    let mut bad = good.clone();
    bad[middle] ^= 1;
    fs::write(&segment, &bad).expect("written");
    let said = server.refused(&["store", "verify", &data]);
    assert!(said.contains("0000000000000001.wal is damaged at offset") && said.contains("restore"), "{said}");
    fs::write(&segment, &good).expect("written");

    let mut damaged = fs::read(&saved).expect("the snapshot");
    let at = damaged.len() / 2;
    damaged[at] ^= 1;
    let damaged_file = root.path().join("damaged.db");
    fs::write(&damaged_file, damaged).expect("written");
    let said = server.refused(&["store", "verify", &damaged_file.to_string_lossy()]);
    assert!(said.contains("the digest at offset") && said.contains("hint: use an older snapshot"), "{said}");

    let mut again = Server::new(&root, "again");
    let new_dir = again.dir.to_string_lossy().into_owned();
    let restored = again.told(&["store", "restore", &saved_text, "--data-dir", &new_dir]);
    let revision: i64 =
        restored.trim_end().rsplit(' ').next().and_then(|number| number.parse().ok()).expect("a revision");
    assert!(revision > 1_000_000_000, "everybody who has seen more must list anew: {restored}");
    assert!(again.refused(&["store", "restore", &saved_text, "--data-dir", &new_dir]).contains("has a store already"));
    again.start_embedded(&[]);
    assert_eq!(again.config_maps(), ["configmap/one", "configmap/two"], "as it was when it was saved");
    again.must_apply(&root, "four", "new");
    assert!(again.status()["members"][0]["status"]["revision"].as_i64().expect("a number") > revision);
    let second = root.path().join("second.db").to_string_lossy().into_owned();
    let endpoint = again.endpoint();
    again.told(&["store", "snapshot", &second, "--endpoints", &endpoint]);
    let equal = until("nobody writes between the snapshot and the comparison", || {
        again.told(&["store", "snapshot", &second, "--endpoints", &endpoint]);
        let output = again.minictl(&["store", "verify", &second, "--against", &endpoint]);
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    });
    assert!(equal.contains(&format!("equal to {endpoint} at revision")), "{equal}");
}

#[test]
fn objects_move_to_an_etcd_and_back() {
    let root = temporary();
    let mut server = Server::new(&root, "embedded");
    server.start_embedded(&[]);
    server.must_apply(&root, "ours", "x");
    let saved = root.path().join("ours.db").to_string_lossy().into_owned();
    server.told(&["store", "snapshot", &saved, "--endpoints", &server.endpoint()]);
    server.stop();

    let data = root.path().join("etcd").to_string_lossy().into_owned();
    etcdctl_told("127.0.0.1:1", &["snapshot", "restore", &saved, "--data-dir", &data]);
    let (client, peer) = (format!("127.0.0.1:{}", free_port()), format!("http://127.0.0.1:{}", free_port()));
    let arguments = [
        format!("--data-dir={data}"),
        format!("--listen-client-urls=http://{client}"),
        format!("--advertise-client-urls=http://{client}"),
        format!("--listen-peer-urls={peer}"),
    ];
    let etcd = Process::start(Path::new("etcd"), &arguments, root.path().join("etcd.log"));
    let mut on_etcd = Server::new(&root, "on-etcd");
    on_etcd.start(&[&format!("--store=etcd://{client}")]);
    assert_eq!(on_etcd.config_maps(), ["configmap/ours"]);
    on_etcd.must_apply(&root, "theirs", "y");
    let table = on_etcd.told(&["store", "status"]);
    assert!(table.contains("leader") && table.contains(" 3.4."), "{table}");
    let back = root.path().join("back.db").to_string_lossy().into_owned();
    on_etcd.told(&["store", "snapshot", &back, "--endpoints", &client]);
    let said = on_etcd.refused(&["store", "verify", &back, "--against", &client]);
    assert!(said.contains("an etcd answers there"), "{said}");
    on_etcd.stop();
    drop(etcd);

    let mut home = Server::new(&root, "home");
    home.told(&["store", "restore", &back, "--data-dir", &home.dir.to_string_lossy()]);
    home.start_embedded(&[]);
    assert_eq!(home.config_maps(), ["configmap/ours", "configmap/theirs"]);
    home.must_apply(&root, "more", "z");
}

#[test]
fn a_full_store_says_so_keeps_room_for_deleting_and_recovers_by_itself() {
    let root = temporary();
    let mut server = Server::new(&root, "small");
    // Little history, so that what is deleted is soon compacted away.
    server.start_embedded(&["--store-quota=16Mi", "--keep-history=1s"]);
    let endpoint = server.endpoint();
    let megabyte = "x".repeat(1_000_000);
    let mut taken = 0;
    let said = until("the store is nearly full", || {
        // What is applied is kept a second time, in an annotation that may not be so large.
        let output = server.send("create", &root, &format!("large-{taken}"), &megabyte);
        if output.status.success() {
            taken += 1;
            return Err(format!("{taken} were taken"));
        }
        Ok(text(&output.stderr))
    });
    assert!(said.contains("full") && said.contains("--store-quota") && said.contains("minictl store status"), "{said}");
    assert!(taken >= 10, "only {taken} were taken: {said}");
    assert!(server.http("/healthz").starts_with("HTTP/1.1 200"), "it serves");
    // The store may have refused before the API server has looked at it.
    until("the server is not ready", || {
        let ready = server.http("/readyz");
        if ready.starts_with("HTTP/1.1 503") && ready.contains("full") { Ok(()) } else { Err(ready) }
    });
    assert_eq!(server.config_maps().len(), taken, "what is there can be read");

    // Past the API, up to the quota itself: etcd's words, and an alarm.
    let value = root.path().join("value");
    fs::write(&value, vec![b'x'; 900_000]).expect("written");
    let put = |key: &str| {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &endpoint, "put", key]);
        command.stdin(File::open(&value).expect("the value")).output().expect("etcdctl runs")
    };
    let refusal = (0..40).map(|number| put(&format!("/other/{number}"))).find(|output| !output.status.success());
    let refusal = text(&refusal.expect("the quota is reached").stderr);
    assert!(refusal.contains("etcdserver: mvcc: database space exceeded"), "{refusal}");
    assert!(etcdctl_told(&endpoint, &["alarm", "list"]).contains("alarm:NOSPACE"));
    let table = server.told(&["store", "status"]);
    assert!(
        table.contains("alarm NOSPACE of default: the quota is used up") && table.contains("--store-quota"),
        "{table}"
    );
    assert_eq!(server.status()["alarms"][0]["kind"], "NOSPACE");
    assert!(server.http("/metrics").lines().any(|line| line == "minipod_store_alarms_no_space 1"));
    let said = text(&server.apply(&root, "large-0", "changed").stderr);
    assert!(said.contains("the store is full") && said.contains("--store-quota"), "{said}");

    // Deleting works, and everything else does again once the history has gone.
    etcdctl_told(&endpoint, &["del", "/other/", "--prefix"]);
    server.told(&["delete", "configmap", "large-0", "large-1", "large-2"]);
    until("the alarm goes by itself", || {
        let alarms = server.status()["alarms"].to_string();
        if alarms == "[]" { Ok(()) } else { Err(alarms) }
    });
    until("the server is ready again", || {
        let ready = server.http("/readyz");
        if ready.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(ready) }
    });
    server.must_apply(&root, "small", "fits");
}

#[test]
fn the_store_is_served_beyond_this_machine_with_certificates_alone() {
    let root = temporary();
    let certs = root.path().join("certs");
    let made = Command::new(bin_dir().join("minipod-store"))
        .arg("certs")
        .arg(&certs)
        .args(["--members", "server=https://127.0.0.1:1"])
        .output()
        .expect("minipod-store runs");
    assert!(made.status.success(), "{}", text(&made.stderr));
    let file = |name: &str| certs.join(name).to_string_lossy().into_owned();
    let mut server = Server::new(&root, "tls");
    let (cert, key, ca) = (file("server.pem"), file("server-key.pem"), file("ca.pem"));
    let flags = [
        format!("--store-cert-file={cert}"),
        format!("--store-key-file={key}"),
        format!("--store-trusted-ca-file={ca}"),
    ];
    // Reached at 127.0.0.1, which the certificate names; the listener is on every address.
    let (dir, store) =
        (format!("--data-dir={}", server.dir.display()), format!("--store-listen=0.0.0.0:{}", server.store));
    server.start(&["--store=embedded", &dir, &store, &flags[0], &flags[1], &flags[2]]);
    server.must_apply(&root, "one", "x");
    let endpoint = server.endpoint();

    let with = [
        format!("--cacert={ca}"),
        format!("--cert={cert}"),
        format!("--key={key}"),
        "get".to_owned(),
        "--prefix".to_owned(),
        "--keys-only".to_owned(),
        "/minipod/configmaps/".to_owned(),
    ];
    let with: Vec<&str> = with.iter().map(String::as_str).collect();
    let keys = etcdctl_told(&format!("https://{endpoint}"), &with);
    assert!(keys.contains("/minipod/configmaps/default/one"), "{keys}");
    // Without a certificate of the authority nobody is let in, whether by TLS or plainly.
    for (url, arguments) in [
        (format!("https://{endpoint}"), &["--dial-timeout=2s", "--command-timeout=3s", with[0], "get", "x"][..]),
        (format!("http://{endpoint}"), &["--dial-timeout=2s", "--command-timeout=3s", "get", "x"]),
    ] {
        assert!(!etcdctl(&url, arguments).status.success(), "{url} {arguments:?}");
    }
    let saved = root.path().join("saved.db").to_string_lossy().into_owned();
    let tls = ["--store-cert", &cert, "--store-key", &key, "--store-cacert", &ca];
    let snapshot = ["store", "snapshot", &saved, "--endpoints", &endpoint];
    server.told(&[&snapshot[..], &tls].concat());
    server.refused(&snapshot);
    let said = server.refused(&["store", "status", "--endpoints", &endpoint, "--store-cert", &cert]);
    assert!(said.contains("--store-key is missing"), "{said}");
}
