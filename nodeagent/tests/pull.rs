//! Pulling images: from Debian's docker-registry, filled with skopeo; and from registries that lie, hang and refuse.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use minipod_nodeagent::image::pull::{Credentials, Progress, PullError, Puller, Registries};
use minipod_nodeagent::image::{ImageRecord, ImageStore, StoreOptions};
use minipod_proto::v1::{ObjectMeta, Secret, server_message::Message as ToAgent};
use support::certificates::certificates;
use support::liar::{Answer, INDEX, Liar, MANIFEST, config_of, digest, image, layer, manifest_of};
use support::registry::Registry;
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

// --------------------------------------------------------------------------------------------- a registry over TLS

/// Puts files of `from` into the operator's directory for a registry, under other names.
fn trust(dir: &Path, host: &str, from: &Path, files: &[(&str, &str)]) {
    std::fs::create_dir_all(dir.join(host)).expect("made");
    for (file, name) in files {
        std::fs::copy(from.join(file), dir.join(host).join(name)).expect("copied");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_over_tls_is_one_that_its_operator_trusts() {
    let (keys, certs) = (certificates(), tempfile::tempdir().expect("a directory"));
    let registry = Registry::with_tls(keys.path(), None);
    registry.push(&archive("busybox"), "a/busybox:1");
    let dir = tempfile::tempdir().expect("a directory");
    let store = store(dir.path());
    let registries = Registries { certs: certs.path().to_owned(), ..Registries::default() };
    let puller = Puller::new(store.clone(), registries);
    let of = |host: &str| format!("{host}/a/busybox:1");
    let port = registry.host.rsplit(':').next().expect("a port");
    let by_name = format!("localhost:{port}");
    let refused = async |host: &str, parts: &[&str]| {
        let error = pull(&puller, &of(host)).await.expect_err(host);
        let text = minipod_nodeagent::report::chain(&error);
        assert!(parts.iter().all(|part| text.contains(part)), "{parts:?}: {text}");
        assert_eq!(error.waiting_reason(), "ErrImagePull");
    };
    let place = certs.path().join(&registry.host).display().to_string();
    let untrusted =
        [&format!("registry {0}: get the manifest: {0} is not trusted", registry.host), "UnknownIssuer", &place];
    refused(&registry.host, &untrusted).await;
    // Another authority is none, and nobody else's directory counts.
    trust(certs.path(), &registry.host, keys.path(), &[("other.pem", "ca.crt")]);
    trust(certs.path(), "127.0.0.1", keys.path(), &[("ca.pem", "ca.crt")]);
    refused(&registry.host, &untrusted).await;
    // Its own authority for a name that it does not have.
    trust(certs.path(), &by_name, keys.path(), &[("ca.pem", "ca.crt")]);
    refused(&by_name, &["is not trusted", "not valid for name \"localhost\""]).await;
    std::fs::write(certs.path().join(&registry.host).join("new.crt"), "nonsense").expect("written");
    refused(&registry.host, &["its certificates on this node", "new.crt: want certificates as PEM"]).await;
    assert!(store.list().is_empty());
    // What is there counts for the next pull.
    trust(certs.path(), &registry.host, keys.path(), &[("ca.pem", "new.crt")]);
    pull(&puller, &of(&registry.host)).await.expect("pulled");

    // One that speaks in the clear is told from one that is not there.
    let plain = Registry::start();
    refused(&plain.host, &[&format!("{} does not speak TLS", plain.host), "--registry-http"]).await;
    no_work_is_left(dir.path(), &store);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_shows_the_certificate_that_a_registry_wants() {
    let (keys, certs) = (certificates(), tempfile::tempdir().expect("a directory"));
    let registry = Registry::with_tls(keys.path(), Some("ca.pem"));
    let dir = tempfile::tempdir().expect("a directory");
    let registries = Registries { certs: certs.path().to_owned(), ..Registries::default() };
    let puller = Puller::new(store(dir.path()), registries);
    let image = format!("{}/a/busybox:1", registry.host);
    trust(certs.path(), &registry.host, keys.path(), &[("ca.pem", "ca.crt")]);
    let error = pull(&puller, &image).await.expect_err("it wants to know who asks");
    let text = minipod_nodeagent::report::chain(&error);
    assert!(text.contains("ertificate"), "{text}");
    trust(certs.path(), &registry.host, keys.path(), &[("client.pem", "node.cert"), ("client-key.pem", "node.key")]);
    // The directory is one as skopeo, podman and docker read it.
    let flag = format!("--dest-cert-dir={}", certs.path().join(&registry.host).display());
    registry.push_as(&archive("busybox"), "a/busybox:1", &[&flag]);
    pull(&puller, &image).await.expect("pulled");
}

#[test]
fn a_pod_waits_until_its_registry_is_trusted() {
    on_a_node(|| async {
        let (keys, certs) = (certificates(), tempfile::tempdir().expect("a directory"));
        let registry = Registry::with_tls(keys.path(), None);
        registry.push(&archive("busybox"), "a/busybox:1");
        let mut node = Node::new().await;
        node.flags.push(format!("--registry-certs={}", certs.path().display()));
        node.start(&[]);
        let uid = "uid-tls";
        let manifest = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: tls}}\nspec:\n  restartPolicy: Never\n  \
             terminationGracePeriodSeconds: 0\n  containers:\n    \
             - {{name: app, image: '{}/a/busybox:1', command: ['true']}}\n",
            registry.host
        );
        node.api.put(pod(&manifest, uid)).await;
        let status = node
            .wait(uid, "the refusal", |status| {
                support::waiting_reason(container(status, "app")).is_some_and(|reason| reason.contains("Pull"))
            })
            .await;
        let told = format!("{:?}", container(&status, "app").state);
        assert!(told.contains(&format!("{} is not trusted", registry.host)), "{told}");
        trust(certs.path(), &registry.host, keys.path(), &[("ca.pem", "ca.crt")]);
        let status = node.wait(uid, "its end", ended("app")).await;
        assert_eq!(terminated(container(&status, "app")).map(|end| end.exit_code), Some(0));
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

// ------------------------------------------------------------------------------------------- registries that lie

async fn pull_from(answers: BTreeMap<String, Answer>, reference: &str) -> (Result<ImageRecord, PullError>, usize) {
    let liar = Liar::start(answers);
    let dir = tempfile::tempdir().expect("a directory");
    let (store, puller) = puller(dir.path(), &liar.host);
    let outcome = pull(&puller, &reference.replace("HOST", &liar.host)).await;
    no_work_is_left(dir.path(), &store);
    (outcome, liar.asked())
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
        ("other content", Answer::Is("x/y", other), "but the content is"),
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
    assert!(text.contains("but the content is"), "{text}");
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
    answers.insert(
        "/v2/a/b/manifests/1".to_owned(),
        Answer::Secret("Basic dXNlcjp3b3Jk".into(), "Basic realm=\"x\"".into(), manifest),
    );
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

// ------------------------------------------------------------------------------------- registries that mean harm

/// The most memory that this process has had, in bytes.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("readable");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the kernel says it");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_registry_does_goes_on_for_ever() {
    let (good, manifest, layer_bytes) = image(b"hello");
    let config = config_of(&[&layer_bytes], "");
    let at = |kind: &str, digest: &dyn std::fmt::Display| format!("/v2/a/b/{kind}/{digest}");
    let (tag, layer_at) = ("/v2/a/b/manifests/1".to_owned(), at("blobs", &digest(&layer_bytes)));
    let bearer = || Answer::Wants("Bearer realm=\"http://HOST/token\",service=\"x\"".to_owned());
    let with = |sizes: (u64, u64), count: usize| {
        Answer::Is(MANIFEST, manifest_of(&config, sizes.0, &vec![(digest(&layer_bytes), sizes.1); count]))
    };
    let small = (config.len() as u64, layer_bytes.len() as u64);
    let token = ("/token".to_owned(), Answer::Is("application/json", br#"{"token": "x"}"#.to_vec()));
    // What it does where, what is said of it, and how many requests that takes at most.
    type Lies = Vec<(String, Answer)>;
    let cases: Vec<(&str, Lies, &str, usize)> = vec![
        ("endless manifest", vec![(tag.clone(), Answer::Endless("200 OK"))], "more than 4194304 bytes", 1),
        ("dripping manifest", vec![(tag.clone(), Answer::Drips(manifest.clone()))], "not complete after 4 s", 1),
        ("endless error", vec![(tag.clone(), Answer::Endless("500 Oops"))], "answers 500", 1),
        ("endless config", vec![(at("blobs", &digest(&config)), Answer::Endless("200 OK"))], "longer", 2),
        ("endless layer", vec![(layer_at.clone(), Answer::Endless("200 OK"))], "longer", 3),
        ("dripping layer", vec![(layer_at.clone(), Answer::Drips(layer_bytes.clone()))], "not complete after 4 s", 3),
        ("a config of any size", vec![(tag.clone(), with((u64::MAX, small.1), 1))], "limit of 4194304", 1),
        ("a layer of any size", vec![(tag.clone(), with((small.0, u64::MAX), 2))], "layers of 1844674407370955", 2),
        ("any number of layers", vec![(tag.clone(), with(small, 5000))], "limit of 128 layers", 2),
        ("never enough tokens", vec![(tag.clone(), bearer()), token], "credentials", 3),
        (
            "an endless token",
            vec![(tag.clone(), bearer()), ("/token".to_owned(), Answer::Endless("200 OK"))],
            "more than 1048576 bytes",
            2,
        ),
        ("no token", vec![(tag.clone(), bearer())], "credentials", 2),
        ("a ring", vec![(tag.clone(), Answer::SendsTo("http://HOST/v2/a/b/manifests/1".into()))], "too often", 11),
        ("nowhere", vec![(tag.clone(), Answer::SendsTo("http://[".into()))], "no URL", 1),
    ];
    let before = peak_bytes();
    for (what, lies, says, most) in cases {
        let began = Instant::now();
        let (outcome, asked) = pull_from(good.clone().into_iter().chain(lies).collect(), "HOST/a/b:1").await;
        let text = minipod_nodeagent::report::chain(&outcome.expect_err(what));
        assert!(text.contains(says), "{what}: {text}");
        assert!(asked <= most, "{what}: {asked} requests");
        assert!(began.elapsed() < Duration::from_secs(15), "{what}: {:?}", began.elapsed());
    }
    let grown = peak_bytes().saturating_sub(before);
    assert!(grown < 256 << 20, "{grown} bytes for answers of which none may take more than 4 MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_sends_nobody_to_what_only_this_machine_can_reach() {
    let (good, _, layer_bytes) = image(b"hello");
    let layer_at = format!("/v2/a/b/blobs/{}", digest(&layer_bytes));
    let victim = Liar::start([("/secret".to_owned(), Answer::Is("x/y", layer_bytes.clone()))].into());
    let port = victim.host.split_once(':').expect("with a port").1.to_owned();
    for place in ["http://127.0.0.1", "https://127.0.0.1", "http://localhost", "https://localhost", "https://[::1]"] {
        let place = format!("{place}:{port}/secret");
        let wants = Answer::Wants(format!("Bearer realm=\"{place}\""));
        for (at, lie) in [(layer_at.clone(), Answer::SendsTo(place.clone())), ("/v2/a/b/manifests/1".to_owned(), wants)]
        {
            let (outcome, _) = pull_from(good.clone().into_iter().chain([(at, lie)]).collect(), "HOST/a/b:1").await;
            let text = minipod_nodeagent::report::chain(&outcome.expect_err(&place));
            assert!(text.contains("sends us on to") || text.contains("this machine itself"), "{place}: {text}");
        }
    }
    assert_eq!(victim.asked(), 0, "somebody was there");

    // Where the operator says that a registry is there, it is one like any other.
    let liar = Liar::start(
        good.into_iter().chain([(layer_at, Answer::SendsTo(format!("http://{}/secret", victim.host)))]).collect(),
    );
    let dir = tempfile::tempdir().expect("a directory");
    let plain_http = vec![liar.host.clone(), victim.host.clone()];
    let puller = Puller::new(store(dir.path()), Registries { plain_http, ..Registries::default() });
    pull(&puller, &format!("{}/a/b:1", liar.host)).await.expect("it is where it was sent to");
    assert_eq!(victim.asked(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_takes_its_time_holds_up_no_other() {
    let (good, _, layer_bytes) = image(b"hello");
    let mut slow = good.clone();
    slow.insert(format!("/v2/a/b/blobs/{}", digest(&layer_bytes)), Answer::Hangs(layer_bytes));
    let (slow, honest) = (Liar::start(slow), Liar::start(good));
    let dir = tempfile::tempdir().expect("a directory");
    let plain_http = vec![slow.host.clone(), honest.host.clone()];
    let patience = Duration::from_secs(60);
    let puller = Arc::new(Puller::new(store(dir.path()), Registries { plain_http, patience, ..Registries::default() }));
    let stuck = tokio::spawn({
        let (puller, reference) = (puller.clone(), format!("{}/a/b:1", slow.host));
        async move { pull(&puller, &reference).await.map(drop) }
    });
    // Manifest, config and the layer that never comes.
    let began = Instant::now();
    while slow.asked() < 3 {
        assert!(began.elapsed() < Duration::from_secs(20) && !stuck.is_finished(), "it does not get to the layer");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let reference = format!("{}/a/b:1", honest.host);
    let pulled = tokio::time::timeout(Duration::from_secs(20), pull(&puller, &reference)).await;
    pulled.expect("it does not wait for the other").expect("the layer is here, from whom it was asked of");
    assert!(!stuck.is_finished());
    stuck.abort();
}
