//! A node that loses its power while it works, and again. `cargo xtask vm-test --power` runs this in a machine: it kills the machine some time
//! after each line [`CUT`], boots it again from the same disk, and the next boot judges what it finds.
//!
//! The API server is of this test; what it had heard is on the disk, as of some time before the cut, so that the node was further than it knows.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use minipod_proto::v1::{Pod, PodStatus};
use sha2::{Digest as _, Sha256};
use support::liar::{Answer, Liar, image};
use support::*;

/// Read by `xtask/src/vm/machine.rs`.
const CUT: &str = "minipod-vm: cut the power";
/// Boots that end in the dark.
const CUTS: u32 = 3;
/// Big enough to be cut while it is fetched, unpacked or flushed.
const LAYER_BYTES: usize = 24 << 20;
/// Where the disk keeps what must be found again.
const PLACE: &str = "/power";

/// Makes a file that no cut takes.
fn keep(name: &str, bytes: &[u8]) {
    let (draft, place) = (Path::new(PLACE).join("draft"), Path::new(PLACE).join(name));
    let mut file = std::fs::File::create(&draft).expect("create");
    file.write_all(bytes).and_then(|()| file.sync_all()).expect("write");
    std::fs::rename(&draft, &place).expect("rename");
    std::fs::File::open(PLACE).and_then(|dir| dir.sync_all()).expect("flush");
}

/// Pods that stay, by uid.
fn pods() -> BTreeMap<&'static str, Pod> {
    let app = |uid, restart, script| scripts(uid, restart, 0, &[("a:app", script)]);
    // Each run begins without what the one before has written, of which the API server hears late or never.
    let ends = "[ -e /mark ] && echo DIRTY; echo x >/mark; echo x >>/v/runs; sync; exit 3";
    let mut users = app("uid-users", "Always", "id -u; echo x >/mine; sleep 1000");
    users.spec_mut().host_users = Some(false);
    BTreeMap::from([
        ("uid-always", app("uid-always", "Always", "echo up; exec sleep 1000")),
        ("uid-failing", app("uid-failing", "OnFailure", "echo up; exec sleep 1000")),
        ("uid-never", app("uid-never", "Never", "echo up; exec sleep 1000")),
        ("uid-done", app("uid-done", "Never", "echo done")),
        ("uid-ending", app("uid-ending", "Always", ends)),
        ("uid-users", users),
    ])
}

/// What the file of a boot's image holds: nothing that compresses.
fn content(boot: u32) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(u64::from(boot));
    let mut bytes = vec![0; LAYER_BYTES];
    random.fill(&mut bytes);
    bytes
}

/// A pod that prints the checksum of what is in an image.
fn reader(uid: &str, host: &str, boot: u32) -> Pod {
    let yaml = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {uid}}}\nspec:\n  restartPolicy: Never\n  \
         terminationGracePeriodSeconds: 0\n  volumes: [{{name: i, image: {{reference: '{host}/a/b{boot}:1'}}}}]\n  \
         containers:\n    - {{name: app, image: minipod.local/busybox, imagePullPolicy: Never, \
         command: [sh, -c, 'sha256sum </img/file; echo end'], volumeMounts: [{{name: i, mountPath: /img}}]}}\n"
    );
    pod(&yaml, uid)
}

/// A registry with the images of these boots.
fn registry(boots: impl Iterator<Item = u32>) -> Liar {
    let answers = boots.flat_map(|boot| {
        let (answers, _, _) = image(&content(boot));
        let named = move |(path, answer): (String, Answer)| (path.replace("/a/b/", &format!("/a/b{boot}/")), answer);
        answers.into_iter().map(named)
    });
    Liar::start(answers.collect())
}

#[test]
#[ignore = "needs a machine whose power can be cut: cargo xtask vm-test --power"]
fn a_node_comes_back_from_power_cuts() {
    std::fs::create_dir_all(PLACE).expect("a place");
    let boots = std::fs::read_to_string(Path::new(PLACE).join("boots")).ok();
    let boot: u32 = boots.map_or(0, |text| text.trim().parse().expect("a number"));
    keep("boots", (boot + 1).to_string().as_bytes());
    let data = Path::new(PLACE).join("data");
    if boot == 0 {
        std::fs::create_dir_all(&data).expect("made");
        load_images(&data, true);
    }
    on_a_node(move || async move {
        let run = PathBuf::from("/run/power");
        std::fs::create_dir_all(&run).expect("made");
        let mut node = Node::on(PLACE.into(), run, "minipod-power".into()).await;
        println!("boot {boot}");
        let liar = registry(0..=boot);
        node.flags.push(format!("--registry-http={}", liar.host));
        if boot > 0 {
            come_back(&mut node, &liar, boot).await;
        } else {
            for pod in pods().into_values() {
                node.api.put(pod).await;
            }
            node.start(&[]);
        }
        if boot == CUTS {
            return end(&node).await;
        }
        work(&node, &liar, boot).await;
    });
}

/// What the API server had heard before the cut.
fn known() -> BTreeMap<String, PodStatus> {
    let kept = std::fs::read(Path::new(PLACE).join("api.json"));
    kept.map(|kept| serde_json::from_slice(&kept).expect("JSON")).unwrap_or_default()
}

/// Has the node busy, and asks for the cut.
async fn work(node: &Node, liar: &Liar, boot: u32) {
    for uid in ["uid-always", "uid-failing", "uid-users"] {
        node.wait_running(uid).await;
    }
    if boot == 0 {
        node.wait_running("uid-never").await;
        node.wait("uid-done", "its end", |status| status.phase == "Succeeded").await;
    }
    node.wait("uid-ending", "a second run", |status| container(status, "app").restart_count > 0).await;
    // One that the API server forgets while the machine is dark.
    let gone = format!("uid-gone-{boot}");
    node.api.put(scripts(&gone, "Always", 0, &[("a:app", "echo x >/v/x; sleep 1000")])).await;
    node.wait_running(&gone).await;
    // What is over is not told again.
    let mut known = known();
    known.extend(pods().into_keys().filter_map(|uid| Some((uid.to_owned(), node.api.status(uid)?))));
    keep("api.json", &serde_json::to_vec(&known).expect("JSON"));
    // What is pulled, and what has no end of its own, goes on while the power goes.
    node.api.put(reader(&format!("uid-reader-{boot}"), &liar.host, boot)).await;
    println!("{CUT}");
    tokio::time::sleep(Duration::from_secs(120)).await;
    panic!("the power is still on");
}

/// The machine has booted: the API server remembers what it had heard.
async fn come_back(node: &mut Node, liar: &Liar, boot: u32) {
    let known = known();
    for (uid, mut pod) in pods() {
        pod.status = known.get(uid).cloned();
        node.api.put(pod).await;
    }
    node.start(&[]);
    let was = |uid: &str| container(&known[uid], "app").restart_count;
    for uid in ["uid-always", "uid-failing", "uid-users"] {
        let status = node.wait_running(uid).await;
        let app = container(&status, "app");
        assert!(app.restart_count > was(uid), "{uid}: {app:?}");
        let end = last(app).expect("the run before it");
        assert_eq!((end.reason.as_str(), end.exit_code), ("ContainerStatusUnknown", 137), "{uid}");
    }
    if known["uid-never"].phase != "Failed" {
        let never = node.wait("uid-never", "its end", |status| status.phase == "Failed").await;
        assert_eq!(container(&never, "app").restart_count, 0);
    }
    assert!(!node.api.events("uid-never").iter().any(|event| event == "Started"), "it was started again");
    // What is done is told to nobody again, and nothing of it runs.
    assert!(!node.api.events("uid-done").iter().any(|event| event == "Started"), "it was started again");
    node.wait("uid-ending", "a new run", |status| container(status, "app").restart_count > was("uid-ending")).await;
    let logs = entries(&node.data_dir().join("logs"));
    let ending = logs.iter().find(|path| path.to_string_lossy().ends_with("uid-ending")).expect("its logs");
    for log in entries(&ending.join("app")) {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        assert!(!text.contains("DIRTY"), "{} began with another run's files", log.display());
    }
    node.wait_gone(&format!("uid-gone-{}", boot - 1)).await;
    node.wait_gone(&format!("uid-reader-{}", boot - 1)).await;

    // An address is one pod's, and the book has none beside those.
    let uids = ["uid-always", "uid-failing", "uid-users", "uid-ending"];
    let ips: BTreeSet<String> =
        uids.iter().map(|uid| node.api.status(uid).expect("known").pod_ip).filter(|ip| !ip.is_empty()).collect();
    assert_eq!(ips.len(), uids.len(), "{ips:?}");
    let book = entries(&node.data_dir().join("ipam")).into_iter().flat_map(|range| entries(&range));
    let entry = |file: PathBuf| {
        let ip = file.file_name().expect("a name").to_string_lossy().into_owned();
        (std::fs::read_to_string(&file).expect("an entry"), ip)
    };
    let book: Vec<(String, String)> = book.map(entry).collect();
    let holders: BTreeMap<&str, &str> = book.iter().map(|(uid, ip)| (uid.as_str(), ip.as_str())).collect();
    assert_eq!(holders.len(), book.len(), "somebody has two: {book:?}");
    for uid in uids {
        assert_eq!(holders.get(uid).copied(), node.api.status(uid).map(|status| status.pod_ip).as_deref(), "{uid}");
    }
    let strangers: Vec<_> = holders.keys().filter(|uid| !uids.contains(uid) && **uid != "uid-never").collect();
    assert!(strangers.is_empty(), "{strangers:?} have addresses");
    assert_eq!(entries(&node.data_dir().join("users")).len(), 1, "one pod has users of its own");

    // Nothing half of an image is left, and what is here is what it should be, whether it was fetched before the cut or now.
    for dir in entries(&node.data_dir().join("layers")) {
        assert!(!dir.to_string_lossy().contains("/.work-"), "{} is left", dir.display());
    }
    for of in 0..boot {
        let uid = format!("uid-read-{boot}-{of}");
        node.api.put(reader(&uid, &liar.host, of)).await;
        let log = node.wait_log(&uid, "app", "end\n").await;
        let sum: String = Sha256::digest(content(of)).iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(log.starts_with(&sum), "boot {of}: {log}");
        node.api.delete(&uid, 0).await;
        node.wait_finished(&uid).await;
        node.wait_gone(&uid).await;
    }
}

/// All of it can still be removed.
async fn end(node: &Node) {
    for uid in pods().into_keys() {
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    }
}
