//! Bad input through the real minictl and API server: each gets a clear error and an exit code that is not 0, nothing is
//! stored, and the server serves on.

use std::io::Write;

use minictl::local::Options;
use minipod_client::Query;
use minipod_proto::v1::Pod;
use minipod_tests::cluster::{Cluster, bin_dir, text};

/// A manifest, and what the error must say.
struct Case {
    manifest: String,
    says: &'static [&'static str],
}

fn pod(metadata: &str, container: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{{metadata}}}\nspec:\n  containers:\n  - name: app\n    image: x\n    {container}\n"
    )
}

fn cases() -> Vec<Case> {
    let case = |manifest: String, says| Case { manifest, says };
    let bomb = {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..10 {
            let references = vec![format!("*a{}", level - 1); 9].join(", ");
            text += &format!("a{level}: &a{level} [{references}]\n");
        }
        text + "apiVersion: v1\nkind: Pod\n"
    };
    vec![
        case("apiVersion: v1\nkind: Pod\n  metadata: [}".into(), &["line"]),
        case(pod("name: a", "imagePulPolicy: Always"), &["imagePulPolicy", "line 8", "imagePullPolicy"]),
        case(pod("name: a", "command: 7"), &["spec.containers[0].command", "list"]),
        case(pod("name: a", "resources: {requests: {memory: -1Gi}}"), &["requests", "memory", "-1Gi"]),
        case(pod("name: a", "resources: {requests: {cpu: lots}}"), &["cpu", "lots"]),
        case(pod("name: a", "image: x\n  - name: app\n    image: y").replacen("image: x\n", "", 1), &["app"]),
        case(pod("name: ../../etc/passwd", ""), &["metadata.name", "../../etc/passwd"]),
        case(pod("name: a, namespace: ../other", ""), &["namespace", "../other"]),
        case(pod("name: A_B", ""), &["metadata.name", "A_B", "lower case"]),
        case(pod("name: a", "volumeMounts: [{name: nope, mountPath: /x}]"), &["volumeMounts", "nope"]),
        case("apiVersion: v1\nkind: Pot\nmetadata: {name: a}\n".into(), &["Pot", "Pod"]),
        case("apiVersion: v2\nkind: Pod\nmetadata: {name: a}\n".into(), &["v2", "v1"]),
        case(format!("{}#{}\n", pod("name: a", ""), "x".repeat(10 << 20)), &["MiB"]),
        case("[".repeat(100_000), &["deep"]),
        case(bomb, &["alias"]),
        case("\u{0}\u{1}\u{2}".into(), &[]),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_manifests_are_refused_with_clear_errors_and_nothing_is_stored() {
    let cluster = Cluster::start_with(Options { schedulers: 0, ..Options::new(bin_dir(), Vec::new()) }).await;
    for (number, case) in cases().iter().enumerate() {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(case.manifest.as_bytes()).expect("written");
        let output = cluster.minictl(&["apply", "-f", &file.path().to_string_lossy()]);
        let errors = text(&output.stderr);
        let shown: String = case.manifest.chars().take(300).collect();
        assert!(!output.status.success(), "case {number} must be refused:\n{shown}\n{errors}");
        assert!(!errors.contains("panicked") && !errors.is_empty(), "case {number}: {errors}");
        for part in case.says {
            assert!(errors.contains(part), "case {number} must say {part:?}:\n{shown}\n{errors}");
        }
        let pods = cluster.client().list::<Pod>(&Query::all()).await.expect("the server serves on").items;
        assert!(pods.is_empty(), "case {number} stored {pods:?}");
    }
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_call_gets_a_hint_and_an_unreachable_server_is_named() {
    let cluster = Cluster::start_with(Options { schedulers: 0, ..Options::new(bin_dir(), Vec::new()) }).await;
    for (arguments, says) in [
        (&["get", "pods", "nope"][..], "nope"),
        (&["get", "potatoes"], "potatoes"),
        (&["apply", "-f", "/does/not/exist.yaml"], "/does/not/exist.yaml"),
        (&["logs", "nope"], "nope"),
        (&["get", "pods", "-l", "a in (b"], "a in (b"),
        (&["get", "pods", "--field-selector", "spec.color=red"], "spec.color"),
    ] {
        let output = cluster.minictl(arguments);
        let errors = text(&output.stderr);
        assert!(!output.status.success() && errors.contains(says), "{arguments:?}: {errors}");
        assert!(output.stdout.is_empty(), "data only on stdout: {}", text(&output.stdout));
    }
    cluster.local.stop().expect("taken down");

    let output = minipod_tests::cluster::minictl("http://127.0.0.1:1", &["get", "pods"]);
    let errors = text(&output.stderr);
    assert!(!output.status.success() && errors.contains("127.0.0.1:1") && errors.contains("hint"), "{errors}");
}
