//! Pulling images: from Debian's docker-registry, filled with skopeo; and from registries that lie, hang and refuse.

mod support;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use minipod_nodeagent::image::pull::{Credentials, Progress, PullError, Puller, Registries};
use minipod_nodeagent::image::{Digest, ImageRecord, ImageStore, StoreOptions};
use minipod_proto::v1::{ObjectMeta, Secret, server_message::Message as ToAgent};
use sha2::{Digest as _, Sha256};
use support::{Node, container, ended, on_a_node, pod, terminated};
use tokio::sync::watch;

fn store(dir: &Path) -> Arc<ImageStore> {
    let options = StoreOptions { durable: false, ..StoreOptions::default() };
    ImageStore::open(dir, options).expect("a store in an empty directory")
}

fn puller(dir: &Path, registry: &str) -> (Arc<ImageStore>, Puller) {
    let store = store(dir);
    let registries =
        Registries { plain_http: vec![registry.to_owned()], patience: Duration::from_secs(1), ..Registries::default() };
    (store.clone(), Puller::new(store, registries))
}

async fn pull(puller: &Puller, reference: &str) -> Result<ImageRecord, PullError> {
    puller.pull(reference, &BTreeMap::new(), &watch::Sender::new(Progress::default())).await
}

/// Nothing of an unfinished pull is left: every directory of the store is a layer of an image.
fn no_work_is_left(dir: &Path, store: &ImageStore) {
    let layers: Vec<String> =
        store.list().iter().flat_map(|image| image.layers.clone()).map(|l| l.hex().to_owned()).collect();
    for entry in std::fs::read_dir(dir.join("layers")).expect("the store is there").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        assert!(layers.contains(&name), "{name} is left behind");
    }
}

// --------------------------------------------------------------------------------------------- the real registry

/// Debian's docker-registry on a free port.
struct Registry {
    child: Child,
    host: String,
    dir: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        // An error means that it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    fn start() -> Registry {
        Registry::start_with(false)
    }

    /// One that opens to `user` with the password `word` alone.
    fn closed() -> Registry {
        Registry::start_with(true)
    }

    fn start_with(closed: bool) -> Registry {
        let dir = tempfile::tempdir().expect("a directory");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
        let host = format!("127.0.0.1:{port}");
        let users = dir.path().join("users");
        // bcrypt with the least rounds: the word is no secret.
        let line = "user:$2b$04$RB6GR70.lKCxsw0GVH79D.hbnMDo3FMUfeRvVzW.Wi8rfyUZ85sWG\n";
        std::fs::write(&users, line).expect("written");
        let auth = format!("auth: {{htpasswd: {{realm: test, path: '{}'}}}}\n", users.display());
        let more = if closed { auth.as_str() } else { "" };
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{host}'}}\n{more}",
            dir.path().join("data").display()
        );
        let file = dir.path().join("config.yml");
        std::fs::write(&file, config).expect("written");
        let log = std::fs::File::create(dir.path().join("log")).expect("created");
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("cloned")).stderr(log);
        let child = command.spawn().expect("docker-registry is installed (apt-get install docker-registry)");
        let registry = Registry { child, host, dir };
        let start = Instant::now();
        while TcpStream::connect(&registry.host).is_err() {
            assert!(start.elapsed() < Duration::from_secs(20), "the registry does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry
    }

    fn push(&self, archive: &Path, name: &str) {
        self.push_as(archive, name, &[]);
    }

    fn push_as(&self, archive: &Path, name: &str, flags: &[&str]) {
        let target = format!("docker://{}/{name}", self.host);
        let source = format!("oci-archive:{}", archive.display());
        let output = Command::new("skopeo")
            .args(["copy", "--dest-tls-verify=false"])
            .args(flags)
            .args([&source, &target])
            .output();
        let output = output.expect("skopeo is installed (apt-get install skopeo)");
        assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// How often each blob was fetched.
    fn fetches(&self) -> BTreeMap<String, usize> {
        let log = std::fs::read_to_string(self.dir.path().join("log")).expect("readable");
        let mut counts = BTreeMap::new();
        for line in log.lines().filter(|line| line.contains("\"GET /v2/")) {
            if let Some((_, rest)) = line.split_once("/blobs/") {
                *counts.entry(rest.split(' ').next().unwrap_or_default().to_owned()).or_default() += 1;
            }
        }
        counts
    }
}

fn archive(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/images");
    let dir = std::env::var_os("MINIPOD_IMAGES").map_or(root, PathBuf::from);
    let archive = dir.join(format!("{name}.oci.tar"));
    assert!(archive.is_file(), "{} is missing: run `cargo xtask images`", archive.display());
    archive
}

#[tokio::test(flavor = "multi_thread")]
async fn images_come_from_a_real_registry_by_tag_and_digest_and_share_layers() {
    let registry = Registry::start();
    registry.push(&archive("busybox"), "minipod/busybox:1");
    registry.push(&archive("toolbox"), "minipod/toolbox:1");
    let dir = tempfile::tempdir().expect("a directory");
    let (store, puller) = puller(dir.path(), &registry.host);
    let names = ["busybox", "toolbox"].map(|image| format!("{}/minipod/{image}:1", registry.host));

    // Both at once, and each twice: the layer that they share is fetched once.
    let (a, b, c, d) = tokio::join!(
        pull(&puller, &names[0]),
        pull(&puller, &names[1]),
        pull(&puller, &names[0]),
        pull(&puller, &names[1])
    );
    let (busybox, toolbox) = (a.expect("pulled"), b.expect("pulled"));
    assert_eq!(c.expect("pulled").id, busybox.id);
    assert_eq!(d.expect("pulled").id, toolbox.id);
    assert_eq!(toolbox.layers[0], busybox.layers[0], "the images share a layer");
    // Configs are fetched by every pull, they are small; each layer once.
    let layers: Vec<usize> = registry.fetches().into_values().collect();
    assert_eq!(layers.iter().filter(|count| **count == 1).count(), 2, "{:?}", registry.fetches());
    assert!(store.get(&names[0]).is_some() && store.get(&names[1]).is_some());

    let digest = puller.digest(&names[0], &BTreeMap::new()).await.expect("the registry tells it");
    assert_eq!(busybox.manifest_digest.as_ref(), Some(&digest));
    let pinned = format!("{}/minipod/busybox@{digest}", registry.host);
    assert_eq!(store.get(&pinned).map(|image| image.id), Some(busybox.id.clone()), "here already, under its digest");

    // On a node that has nothing: by digest alone.
    let other = tempfile::tempdir().expect("a directory");
    let (other_store, other_puller) = self::puller(other.path(), &registry.host);
    assert_eq!(pull(&other_puller, &pinned).await.expect("pulled").id, busybox.id);
    assert_eq!(other_store.get(&pinned).map(|image| image.id), Some(busybox.id));

    let absent = format!("{}/minipod/nothing:1", registry.host);
    let error = pull(&puller, &absent).await.expect_err("not there");
    assert!(matches!(error, PullError::NotFound { .. }), "{error:?}");
    no_work_is_left(dir.path(), &store);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mirror_is_asked_first_and_the_registry_when_it_fails() {
    let registry = Registry::start();
    registry.push(&archive("busybox"), "library/busybox:1");
    let dir = tempfile::tempdir().expect("a directory");
    let store = store(dir.path());
    let dead = "127.0.0.1:1".to_owned();
    let registries = Registries {
        plain_http: vec![registry.host.clone(), dead.clone()],
        mirrors: BTreeMap::from([("docker.io".to_owned(), vec![dead, registry.host.clone()])]),
        ..Registries::default()
    };
    let puller = Puller::new(store.clone(), registries);
    pull(&puller, "busybox:1").await.expect("the second mirror has it");
    assert!(store.get("docker.io/library/busybox:1").is_some(), "under its own name, not the mirror's");
}

// ------------------------------------------------------------------------------------------- registries that lie

/// An HTTP server of a few lines with an answer per path.
struct Liar {
    host: String,
    asked: Arc<AtomicUsize>,
}

#[derive(Clone)]
enum Answer {
    Is(&'static str, Vec<u8>),
    /// Promises so many bytes and ends the connection after fewer.
    Cut(Vec<u8>, usize),
    /// Promises so many bytes and sends no more after some.
    Hangs(Vec<u8>),
    /// Only for that `Authorization`.
    Secret(&'static str, Vec<u8>),
}

impl Liar {
    fn start(answers: BTreeMap<String, Answer>) -> Liar {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let host = listener.local_addr().expect("bound").to_string();
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answers, count) = (answers.clone(), count.clone());
                std::thread::spawn(move || answer(stream, &answers, &count));
            }
        });
        Liar { host, asked }
    }
}

/// One request on one connection. An error means that the client is gone.
fn answer(mut stream: TcpStream, answers: &BTreeMap<String, Answer>, count: &AtomicUsize) -> Option<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        request.push(byte[0]);
    }
    count.fetch_add(1, Ordering::Relaxed);
    let request = String::from_utf8_lossy(&request).into_owned();
    let path = request.split(' ').nth(1)?;
    let authorization = request.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("authorization").then(|| value.trim().to_owned())
    });
    let head = |status: &str, kind: &str, length: usize| {
        format!("HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")
    };
    match answers.get(path) {
        Some(Answer::Is(kind, body)) => stream.write_all(head("200 OK", kind, body.len()).as_bytes()).ok()?,
        Some(Answer::Cut(body, promised)) => stream.write_all(head("200 OK", "x/y", *promised).as_bytes()).and_then(|()| stream.write_all(body)).ok()?,
        Some(Answer::Hangs(body)) => {
            stream.write_all(head("200 OK", "x/y", body.len()).as_bytes()).ok()?;
            stream.write_all(&body[..body.len() / 2]).ok()?;
            std::thread::sleep(Duration::from_secs(20));
        }
        Some(Answer::Secret(wanted, body)) if authorization.as_deref() == Some(wanted) => {
            stream.write_all(head("200 OK", MANIFEST, body.len()).as_bytes()).and_then(|()| stream.write_all(body)).ok()?;
        }
        Some(Answer::Secret(..)) => stream
            .write_all(b"HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .ok()?,
        None if path == "/v2/" => {
            let secret = answers.values().any(|answer| matches!(answer, Answer::Secret(..)));
            let text = if secret { "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned() } else { head("200 OK", "application/json", 0) };
            stream.write_all(text.as_bytes()).ok()?;
        }
        None => stream.write_all(head("404 Not Found", "application/json", 0).as_bytes()).ok()?,
    }
    if let Some(Answer::Is(_, body)) = answers.get(path) {
        stream.write_all(body).ok()?;
    }
    Some(())
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

fn digest(bytes: &[u8]) -> Digest {
    Digest::from_hash(&Sha256::digest(bytes))
}

/// A tar with one file.
fn layer(content: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    tar.append_data(&mut header, "file", content).expect("in memory");
    tar.into_inner().expect("in memory")
}

/// A small image: the answers for its manifest, config and layer, and the manifest itself.
fn image(content: &[u8]) -> (BTreeMap<String, Answer>, Vec<u8>, Vec<u8>) {
    let layer = layer(content);
    let arch = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let config = format!(
        r#"{{"architecture":"{arch}","os":"linux","config":{{"Cmd":["x"]}},"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        digest(&layer)
    )
    .into_bytes();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{MANIFEST}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{}","size":{}}},"layers":[{{"mediaType":"{LAYER}","digest":"{}","size":{}}}]}}"#,
        digest(&config),
        config.len(),
        digest(&layer),
        layer.len()
    )
    .into_bytes();
    let answers = BTreeMap::from([
        ("/v2/a/b/manifests/1".to_owned(), Answer::Is(MANIFEST, manifest.clone())),
        (format!("/v2/a/b/manifests/{}", digest(&manifest)), Answer::Is(MANIFEST, manifest.clone())),
        (format!("/v2/a/b/blobs/{}", digest(&config)), Answer::Is("x/y", config)),
        (format!("/v2/a/b/blobs/{}", digest(&layer)), Answer::Is("x/y", layer.clone())),
    ]);
    (answers, manifest, layer)
}

async fn pull_from(answers: BTreeMap<String, Answer>, reference: &str) -> (Result<ImageRecord, PullError>, usize) {
    let liar = Liar::start(answers);
    let dir = tempfile::tempdir().expect("a directory");
    let (store, puller) = puller(dir.path(), &liar.host);
    let outcome = pull(&puller, &reference.replace("HOST", &liar.host)).await;
    no_work_is_left(dir.path(), &store);
    (outcome, liar.asked.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_registry_gets_wrong_is_told_and_leaves_nothing() {
    let (good, manifest, layer_bytes) = image(b"hello");
    let (outcome, _) = pull_from(good.clone(), "HOST/a/b:1").await;
    outcome.expect("the honest registry works");

    let blob = format!("/v2/a/b/blobs/{}", digest(&layer_bytes));
    let other = layer(b"other");
    let longer = [layer_bytes.clone(), vec![0; 512]].concat();
    let lies = [
        ("other content", Answer::Is("x/y", other), "igest"),
        ("more than promised", Answer::Is("x/y", longer), "longer"),
        ("cut short", Answer::Cut(layer_bytes[..100].to_vec(), layer_bytes.len()), "fetch sha256"),
        ("hangs", Answer::Hangs(layer_bytes.clone()), "fetch sha256"),
    ];
    for (what, lie, says) in lies {
        let answers = good.clone().into_iter().chain([(blob.clone(), lie)]).collect();
        let (outcome, _) = pull_from(answers, "HOST/a/b:1").await;
        let error = outcome.expect_err(what);
        let text = minipod_nodeagent::report::chain(&error);
        assert!(text.contains(says), "{what}: {text}");
        assert_eq!(error.waiting_reason(), "ErrImagePull");
    }

    let pinned = format!("HOST/a/b@{}", digest(&manifest));
    let (_, other_manifest, _) = image(b"something else");
    let mut answers = good.clone();
    answers.insert(format!("/v2/a/b/manifests/{}", digest(&manifest)), Answer::Is(MANIFEST, other_manifest));
    let (outcome, _) = pull_from(answers, &pinned).await;
    let text = minipod_nodeagent::report::chain(&outcome.expect_err("not what was pinned"));
    assert!(text.contains("igest"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_gives_this_machines_image_and_its_own_digest() {
    let (mut answers, manifest, _) = image(b"ours");
    let arch = if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" };
    let index = |arch: &str| {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{{"mediaType":"{MANIFEST}","digest":"{}","size":1,"platform":{{"architecture":"s390x","os":"linux"}}}},{{"mediaType":"{MANIFEST}","digest":"{}","size":{},"platform":{{"architecture":"{arch}","os":"linux"}}}}]}}"#,
            digest(b"theirs"),
            digest(&manifest),
            manifest.len()
        )
        .into_bytes()
    };
    let ours = index(arch);
    answers.insert("/v2/a/b/manifests/1".to_owned(), Answer::Is(INDEX, ours.clone()));
    let (outcome, _) = pull_from(answers.clone(), "HOST/a/b:1").await;
    assert_eq!(outcome.expect("pulled").manifest_digest, Some(digest(&ours)));

    answers.insert("/v2/a/b/manifests/1".to_owned(), Answer::Is(INDEX, index("riscv64")));
    let (outcome, _) = pull_from(answers, "HOST/a/b:1").await;
    let text = minipod_nodeagent::report::chain(&outcome.expect_err("not for this machine"));
    assert!(text.contains("no image for linux/"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_open_what_is_closed_without_them() {
    let (mut answers, manifest, _) = image(b"secret");
    // dXNlcjp3b3Jk is user:word.
    answers.insert("/v2/a/b/manifests/1".to_owned(), Answer::Secret("Basic dXNlcjp3b3Jk", manifest));
    let liar = Liar::start(answers);
    let dir = tempfile::tempdir().expect("a directory");
    let (_, puller) = puller(dir.path(), &liar.host);
    let reference = format!("{}/a/b:1", liar.host);
    let error = pull(&puller, &reference).await.expect_err("closed");
    assert!(matches!(error, PullError::Unauthorized { .. }), "{error:?}");

    let text = format!(r#"{{"auths": {{"http://{}/v1/": {{"auth": "dXNlcjp3b3Jk"}}}}}}"#, liar.host);
    let credentials = Registries::docker_config(text.as_bytes()).expect("as docker writes it");
    assert_eq!(credentials[&liar.host], Credentials { user: "user".into(), password: "word".into() });
    assert!(!format!("{credentials:?}").contains("word"), "passwords are not for logs");
    let progress = watch::Sender::new(Progress::default());
    puller.pull(&reference, &credentials, &progress).await.expect("open");
    let progress = *progress.borrow();
    assert!(progress.bytes > 0 && progress.bytes == progress.of_bytes, "{progress:?}");
    for bad in ["", "7", r#"{"auths": {"x": {}}}"#, r#"{"auths": {"x": {"auth": "%%"}}}"#] {
        assert!(Registries::docker_config(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn a_pod_brings_its_own_credentials() {
    on_a_node(|| async {
        let registry = Registry::closed();
        registry.push_as(&archive("busybox"), "team/busybox:1", &["--dest-creds=user:word"]);
        let mut node = Node::new().await;
        node.flags.push(format!("--registry-http={}", registry.host));
        node.start(&[]);
        let manifest = |name: &str, secret: &str| {
            pod(
                &format!(
                    "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  restartPolicy: Never\n  \
                     terminationGracePeriodSeconds: 0\n  imagePullSecrets: [{{name: {secret}}}]\n  containers:\n    \
                     - {{name: app, image: '{}/team/busybox:1', imagePullPolicy: Always, command: ['true']}}\n",
                    registry.host
                ),
                name,
            )
        };
        // Without the Secret the registry says no, and both are told.
        node.api.put(manifest("uid-closed", "none")).await;
        for reason in ["FailedToRetrieveImagePullSecret", "Failed"] {
            let told = || node.api.events("uid-closed").iter().any(|event| event == reason).then_some(());
            node.api.wait_for(reason, told, || node.agent_log()).await;
        }
        let config = format!(r#"{{"auths": {{"{}": {{"username": "user", "password": "word"}}}}}}"#, registry.host);
        let secret = Secret {
            metadata: Some(ObjectMeta {
                name: "registry".into(),
                namespace: "default".into(),
                ..ObjectMeta::default()
            }),
            data: [(".dockerconfigjson".to_owned(), config.into_bytes().into())].into(),
            ..Secret::default()
        };
        node.api.put_source("registry", ToAgent::Secret(secret)).await;
        node.api.put(manifest("uid-open", "registry")).await;
        let status = node.wait("uid-open", "its end", ended("app")).await;
        assert_eq!(terminated(container(&status, "app")).map(|end| end.exit_code), Some(0));
        for uid in ["uid-closed", "uid-open"] {
            node.api.delete(uid, 0).await;
            node.wait_finished(uid).await;
            node.wait_gone(uid).await;
        }
    });
}
