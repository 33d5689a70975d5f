//! The real binary against a fake API server: what it prints where, and how it ends.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use minipod_client::fake::Fake;
use minipod_proto::v1::copy_entry::Kind as EntryKind;
use minipod_proto::v1::copy_frame::Frame;
use minipod_proto::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStatus, CopyEntry, Event, Node, ObjectReference, Pod,
    Time,
};
use minipod_proto::{Kind, Resource};
use tonic::Code;

/// How long minictl may take; it is killed then, and the test says what it had printed.
const PATIENCE: Duration = Duration::from_secs(30);

struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn command(server: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_minictl"));
    command.args(arguments).env_clear().env("MINIPOD_SERVER", server).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn ran(output: Output) -> Ran {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("minictl prints UTF-8");
    Ran { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

async fn fake_pod(fake: &Fake, name: &str) -> Pod {
    let client = minipod_client::Client::new(&minipod_client::Options::servers(&fake.url())).expect("a client");
    client.get("default", name).await.expect("it is there")
}

/// Runs minictl beside the fake's runtime.
async fn minictl(fake: &Fake, arguments: &[&str]) -> Ran {
    minictl_with_input(fake, arguments, b"").await
}

async fn minictl_with_input(fake: &Fake, arguments: &[&str], input: &[u8]) -> Ran {
    let mut command = command(&fake.url(), arguments);
    command.stdin(Stdio::piped());
    let mut child = command.spawn().expect("minictl starts");
    let (mut stdin, input) = (child.stdin.take().expect("piped"), input.to_vec());
    let words = arguments.join(" ");
    let pid = child.id();
    let waited = tokio::task::spawn_blocking(move || {
        // It may end without reading.
        let _ = stdin.write_all(&input);
        drop(stdin);
        child.wait_with_output().expect("it can be waited for")
    });
    match tokio::time::timeout(PATIENCE, waited).await {
        Ok(output) => ran(output.expect("the wait does not fail")),
        Err(_) => {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
            panic!("minictl {words} did not end within {PATIENCE:?}");
        }
    }
}

fn ok(ran: &Ran) -> &str {
    assert_eq!(ran.code, Some(0), "stdout: {}\nstderr: {}", ran.stdout, ran.stderr);
    &ran.stdout
}

fn pod(name: &str) -> Pod {
    let mut pod = Pod::default();
    (pod.meta_mut().name, pod.meta_mut().namespace) = (name.into(), "default".into());
    let container = |name: &str| Container { name: name.into(), image: "x".into(), ..Container::default() };
    pod.spec_mut().containers = vec![container("main"), container("log")];
    pod
}

fn running(name: &str) -> Pod {
    let mut pod = pod(name);
    pod.spec_mut().node_name = "node-a".into();
    pod.status_mut().phase = "Running".into();
    pod
}

async fn fake() -> Fake {
    let fake = Fake::start().await.expect("a port on the loopback interface");
    let mut node = Node::default();
    node.meta_mut().name = "node-a".into();
    node.status_mut().set_condition("Ready", "True", "", "", Time::from_unix(1, 0));
    fake.put(node);
    fake
}

fn file(dir: &Path, name: &str, content: &str) -> String {
    let path = dir.join(name);
    std::fs::write(&path, content).expect("written");
    path.display().to_string()
}

const MANIFEST: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec: {containers: [{name: main, image: x}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {colour: red}
";

#[tokio::test]
async fn apply_tells_created_configured_and_unchanged() {
    let (fake, dir) = (fake().await, tempfile::tempdir().unwrap());
    let path = file(dir.path(), "m.yaml", MANIFEST);
    assert_eq!(
        ok(&minictl(&fake, &["apply", "--dry-run", "-f", &path]).await),
        "pod/web created (dry run)\nconfigmap/settings created (dry run)\n"
    );
    assert_eq!(fake.stored(Kind::Pod, "default/web"), None);
    assert_eq!(ok(&minictl(&fake, &["apply", "-f", &path]).await), "pod/web created\nconfigmap/settings created\n");
    assert_eq!(ok(&minictl(&fake, &["apply", "-f", &path]).await), "pod/web unchanged\nconfigmap/settings unchanged\n");
    let revision = fake.revision();
    let changed = MANIFEST.replace("red", "blue");
    let from_stdin = minictl_with_input(&fake, &["apply", "-f", "-"], changed.as_bytes()).await;
    assert_eq!(ok(&from_stdin), "pod/web unchanged\nconfigmap/settings configured\n");
    assert_eq!(fake.revision(), revision + 1);
    let without_label = changed.replace(", labels: {app: web}", "");
    let path = file(dir.path(), "m.yaml", &without_label);
    assert_eq!(
        ok(&minictl(&fake, &["apply", "-f", &path]).await),
        "pod/web configured\nconfigmap/settings unchanged\n"
    );
    assert!(fake.stored(Kind::Pod, "default/web").unwrap().meta().labels.is_empty());
    let elsewhere = minictl(&fake, &["apply", "-n", "other", "-f", &path]).await;
    assert_eq!(ok(&elsewhere), "pod/web created\nconfigmap/settings created\n");
    assert!(fake.stored(Kind::Pod, "other/web").is_some());
}

#[tokio::test]
async fn pods_of_one_file_are_made_together() {
    let (fake, dir) = (fake().await, tempfile::tempdir().unwrap());
    let pod = |name: &str| {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec: {{containers: [{{name: c, image: x}}]}}\n"
        )
    };
    let some = |names: &[&str]| names.iter().map(|name| pod(name)).collect::<String>();
    let path = file(dir.path(), "m.yaml", &some(&["a", "b", "c"]));
    assert_eq!(ok(&minictl(&fake, &["apply", "-f", &path]).await), "pod/a created\npod/b created\npod/c created\n");
    assert_eq!((fake.calls("create_many"), fake.calls("get")), (1, 0));
    let path = file(dir.path(), "m.yaml", &some(&["b", "d", "c"]));
    let applied = minictl(&fake, &["apply", "-f", &path]).await;
    assert_eq!(ok(&applied), "pod/b unchanged\npod/d created\npod/c unchanged\n");

    let path = file(dir.path(), "m.yaml", &some(&["e", "a", "f"]));
    let created = minictl(&fake, &["create", "-f", &path]).await;
    assert_eq!(created.stdout, "pod/e created\npod/f created\n");
    assert!(created.code != Some(0) && created.stderr.contains("create Pod default/a"), "{}", created.stderr);
    let path = file(dir.path(), "m.yaml", &some(&["g", "h"]));
    assert_eq!(
        ok(&minictl(&fake, &["create", "--dry-run", "-f", &path]).await),
        "pod/g created (dry run)\npod/h created (dry run)\n"
    );
    assert_eq!(fake.stored(Kind::Pod, "default/g"), None);
    assert_eq!(ok(&minictl(&fake, &["create", "-o", "name", "-f", &path]).await), "pod/g\npod/h\n");
    // A server without the call, such as an older one, is asked for each.
    for (verb, names) in [("apply", ["i", "j"]), ("create", ["k", "l"])] {
        fake.fail_next(&[Code::Unimplemented]);
        let path = file(dir.path(), "m.yaml", &some(&names));
        let [first, second] = names;
        assert_eq!(
            ok(&minictl(&fake, &[verb, "-f", &path]).await),
            format!("pod/{first} created\npod/{second} created\n")
        );
    }
}

#[tokio::test]
async fn a_bad_manifest_is_told_whole_and_nothing_is_sent() {
    let (fake, dir) = (fake().await, tempfile::tempdir().unwrap());
    let bad = MANIFEST.replace("image: x", "imag: x").replace("data:", "date:");
    let path = file(dir.path(), "bad.yaml", &bad);
    let ran = minictl(&fake, &["apply", "-f", &path]).await;
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""));
    for part in ["bad.yaml", "spec.containers[0].imag", "date", "line 5", "line 10", "hint: nothing was sent"] {
        assert!(ran.stderr.contains(part), "{part:?} is missing: {}", ran.stderr);
    }
    assert_eq!(fake.calls("create"), 0);
}

#[tokio::test]
async fn get_prints_data_on_stdout_and_the_rest_on_stderr() {
    let fake = fake().await;
    let nothing = minictl(&fake, &["get", "pods"]).await;
    assert_eq!((ok(&nothing), nothing.stderr.as_str()), ("", "nothing found in namespace default\n"));
    fake.put(running("a"));
    fake.put(pod("b\u{1b}[2J"));
    let table = minictl(&fake, &["get", "pods"]).await;
    let lines: Vec<&str> = ok(&table).lines().collect();
    let words = |line: &str| line.split_whitespace().take(4).map(str::to_owned).collect::<Vec<String>>();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(words(lines[0]), ["NAME", "READY", "STATUS", "RESTARTS"]);
    assert_eq!(words(lines[1]), ["a", "0/2", "Running", "0"]);
    assert!(!table.stdout.contains('\u{1b}') && table.stderr.is_empty(), "{}", table.stdout);
    assert_eq!(ok(&minictl(&fake, &["get", "pod/a", "-o", "name"]).await), "pod/a\n");
    let json: serde_json::Value =
        serde_json::from_str(ok(&minictl(&fake, &["get", "po", "a", "-o", "json"]).await)).unwrap();
    assert_eq!((json["kind"].as_str(), json["metadata"]["name"].as_str()), (Some("Pod"), Some("a")));
    let list: serde_json::Value =
        serde_json::from_str(ok(&minictl(&fake, &["get", "po", "-A", "-o", "json"]).await)).unwrap();
    assert_eq!((list["kind"].as_str(), list["items"].as_array().map(Vec::len)), (Some("List"), Some(2)));
    assert!(
        ok(&minictl(&fake, &["get", "pods", "--field-selector", "status.phase=Running", "--no-headers"]).await)
            .starts_with("a ")
    );
    let missing = minictl(&fake, &["get", "pod", "nope"]).await;
    assert_eq!((missing.code, missing.stdout.as_str()), (Some(1), ""));
    assert!(
        missing.stderr.contains("nope") && missing.stderr.contains("hint: see what there is: minictl get pods"),
        "{}",
        missing.stderr
    );
    let unknown = minictl(&fake, &["get", "potatoes"]).await;
    assert_eq!(unknown.code, Some(2));
    assert!(unknown.stderr.contains("\"potatoes\"") && unknown.stderr.contains("pods, nodes"), "{}", unknown.stderr);
}

#[tokio::test]
async fn an_unreachable_server_is_named_with_a_hint() {
    let output = command("http://127.0.0.1:1", &["get", "pods"]).output().expect("minictl starts");
    let ran = ran(output);
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(1), ""));
    assert!(
        ran.stderr.contains("http://127.0.0.1:1") && ran.stderr.contains("hint: is the API server running?"),
        "{}",
        ran.stderr
    );
}

#[tokio::test]
async fn delete_waits_until_the_pod_is_gone() {
    let fake = fake().await;
    fake.put(running("a"));
    fake.put(pod("b"));
    let not_yet = minictl(&fake, &["delete", "pod", "a", "--timeout", "1s"]).await;
    assert_eq!((not_yet.code, not_yet.stdout.as_str()), (Some(1), "pod \"a\" deleted\n"));
    assert!(not_yet.stderr.contains("Terminating"), "{}", not_yet.stderr);
    assert_eq!(ok(&minictl(&fake, &["delete", "pod", "a", "--wait=false"]).await), "pod \"a\" deleted\n");
    assert_eq!(ok(&minictl(&fake, &["delete", "pod/a", "--force"]).await), "pod \"a\" deleted (force)\n");
    assert_eq!(fake.stored(Kind::Pod, "default/a"), None);
    assert_eq!(minictl(&fake, &["delete", "pod", "a"]).await.code, Some(1));
    assert_eq!(ok(&minictl(&fake, &["delete", "pod", "a", "--ignore-not-found"]).await), "");
    assert_eq!(minictl(&fake, &["delete", "pods"]).await.code, Some(2), "all pods only when that is said");
    assert_eq!(ok(&minictl(&fake, &["delete", "pods", "--all"]).await), "pod \"b\" deleted\n");
}

#[tokio::test]
async fn watch_goes_on_and_survives_a_broken_stream() {
    let fake = fake().await;
    fake.put(pod("a"));
    let mut command = command(&fake.url(), &["get", "pods", "-w", "-o", "name"]);
    let mut child = command.spawn().expect("minictl starts");
    let stdout = child.stdout.take().expect("piped");
    let reader = tokio::task::spawn_blocking(move || {
        use std::io::BufRead;
        let lines = std::io::BufReader::new(stdout).lines();
        lines.take(3).map(|line| line.expect("UTF-8")).collect::<Vec<String>>()
    });
    let late = tokio::time::Instant::now() + PATIENCE;
    while fake.calls("watch") == 0 {
        assert!(tokio::time::Instant::now() < late, "it never watched");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    fake.put(pod("b"));
    fake.break_streams();
    fake.put(pod("c"));
    let lines = tokio::time::timeout(PATIENCE, reader).await;
    child.kill().expect("it runs");
    let stderr = ran(child.wait_with_output().expect("it ended")).stderr;
    assert_eq!(lines.expect("three lines in time").unwrap(), ["pod/a", "pod/b", "pod/c"], "{stderr}");
}

#[tokio::test]
async fn logs_pass_raw_to_what_is_no_terminal() {
    let fake = fake().await;
    fake.put(running("a"));
    fake.log("default/a/main", "one\u{1b}[2J\ntwo\n");
    assert_eq!(ok(&minictl(&fake, &["logs", "a"]).await), "one\u{1b}[2J\ntwo\n");
    ok(&minictl(
        &fake,
        &["logs", "pod/a", "-c", "main", "--tail=5", "--since=1m", "--timestamps", "-p", "--limit-bytes=9"],
    )
    .await);
    let request = fake.log_requests().pop().unwrap();
    assert_eq!((request.tail_lines, request.since_seconds, request.limit_bytes), (Some(5), Some(60), Some(9)));
    assert!(request.timestamps && request.previous && !request.follow);
    let missing = minictl(&fake, &["logs", "a", "-c", "other"]).await;
    assert!(missing.code == Some(1) && missing.stderr.contains("other"), "{}", missing.stderr);
}

#[tokio::test]
async fn logs_of_many() {
    let fake = fake().await;
    for name in ["a", "b"] {
        let mut pod = running(name);
        pod.meta_mut().labels.insert("app".into(), "web".into());
        fake.put(pod);
        fake.log(&format!("default/{name}/main"), &format!("one of {name}\ntwo of {name}\n"));
    }
    let many = minictl(&fake, &["logs", "-l", "app=web", "-c", "main", "--prefix"]).await;
    let want = "[pod/a/main] one of a\n[pod/a/main] two of a\n[pod/b/main] one of b\n[pod/b/main] two of b\n";
    assert_eq!(ok(&many), want);
    assert!(fake.log_requests().iter().all(|request| request.tail_lines == Some(10)));
    ok(&minictl(&fake, &["logs", "a", "--since-time=2026-01-31T12:00:00Z", "--tail=-1"]).await);
    let request = fake.log_requests().pop().unwrap();
    assert_eq!((request.since_time.map(|time| time.seconds), request.tail_lines), (Some(1_769_860_800), None));
    let few = minictl(&fake, &["logs", "-f", "-l", "app=web", "--max-log-requests=1"]).await;
    assert!(few.code == Some(2) && few.stderr.contains("--max-log-requests=2"), "{}", few.stderr);
    for wrong in [&["logs"][..], &["logs", "a", "-l", "app=web"], &["logs", "a", "--since-time=noon"]] {
        assert_eq!(minictl(&fake, wrong).await.code, Some(2), "{wrong:?}");
    }
    let none = minictl(&fake, &["logs", "-l", "app=none"]).await;
    assert!(none.code == Some(0) && none.stderr.contains("no pods match"), "{}", none.stderr);
}

/// Closes the child when the test ends, however it ends.
struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn port_forward_carries_connections_and_tells_what_goes_wrong() {
    let fake = fake().await;
    fake.put(running("a"));
    let missing = minictl(&fake, &["port-forward", "nobody", ":7"]).await;
    assert!(missing.code == Some(1) && missing.stderr.contains("nobody"), "{}", missing.stderr);
    assert_eq!(minictl(&fake, &["port-forward", "a", "7:x"]).await.code, Some(2));

    let mut child = Running(command(&fake.url(), &["port-forward", "a", ":7", ":9"]).spawn().expect("minictl starts"));
    let (stdout, stderr) = (child.0.stdout.take().expect("piped"), child.0.stderr.take().expect("piped"));
    let serving = tokio::task::spawn_blocking(move || {
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stdout)).map(|line| line.expect("UTF-8"));
        let mut port = |remote: &str| {
            let line = lines.next().expect("a line for each port");
            let address = line.strip_prefix("Forwarding from ").and_then(|line| line.strip_suffix(remote));
            address.unwrap_or_else(|| panic!("{line}")).to_owned()
        };
        let (echo, closed) = (port(" -> 7"), port(" -> 9"));
        for text in ["first", "second"] {
            let mut stream = std::net::TcpStream::connect(&echo).expect("it listens");
            stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            stream.write_all(text.as_bytes()).expect("sent");
            stream.shutdown(std::net::Shutdown::Write).expect("half closed");
            let mut answer = String::new();
            std::io::Read::read_to_string(&mut stream, &mut answer).expect("answered and closed");
            assert_eq!(answer, text);
        }
        let mut stream = std::net::TcpStream::connect(&closed).expect("it listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        // The end, or a reset: nothing in any case.
        let mut nothing = Vec::new();
        let _ = std::io::Read::read_to_end(&mut stream, &mut nothing);
        assert!(nothing.is_empty());
        let mut told = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stderr), &mut told).expect("UTF-8");
        told
    });
    let told = tokio::time::timeout(PATIENCE, serving).await.expect("in time").expect("as expected");
    assert!(told.contains("port 9") && told.contains("nothing listens"), "{told}");
}

#[tokio::test]
async fn exec_passes_input_output_and_the_exit_code() {
    let fake = fake().await;
    fake.put(running("a"));
    assert_eq!(ok(&minictl(&fake, &["exec", "a", "--", "echo", "-n", "x"]).await), "-n x\n");
    let cat = minictl_with_input(&fake, &["exec", "-i", "a", "-c", "log", "--", "cat"], &vec![b'y'; 200_000]).await;
    assert_eq!(ok(&cat).len(), 200_000);
    let failed = minictl(&fake, &["exec", "a", "--", "err", "no"]).await;
    assert_eq!((failed.code, failed.stdout.as_str(), failed.stderr.as_str()), (Some(1), "", "no\n"));
    assert_eq!(minictl(&fake, &["exec", "a", "--", "exit", "42"]).await.code, Some(42));
    let unknown = minictl(&fake, &["exec", "a", "--", "nope"]).await;
    assert!(unknown.code == Some(1) && unknown.stderr.contains("no such file"), "{}", unknown.stderr);
    let tty = minictl(&fake, &["exec", "-it", "a", "--", "exit", "3"]).await;
    assert!(tty.code == Some(3) && tty.stderr.contains("no terminal for the command"), "{}", tty.stderr);
}

#[tokio::test]
async fn files_are_copied_in_and_out_and_nothing_leaves_its_place() {
    let entry = |path: &str, kind: EntryKind, link: &str| {
        let (path, link) = (path.as_bytes().to_vec().into(), link.as_bytes().to_vec().into());
        Frame::Entry(CopyEntry { path, kind: kind.into(), mode: 0o4755, link, ..CopyEntry::default() })
    };
    let data = |text: &str| Frame::Data(text.as_bytes().to_vec().into());
    let fake = fake().await;
    fake.put(running("a"));
    let dir = tempfile::tempdir().expect("tempdir");
    let at = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    std::fs::create_dir(at("tree")).expect("make");
    std::fs::write(at("tree/file"), vec![b'z'; 300_000]).expect("write");
    std::os::unix::fs::symlink("/etc/passwd", at("tree/link")).expect("link");
    ok(&minictl(&fake, &["cp", &at("tree"), "a:/to"]).await);
    let sent = fake.copied_in().pop().expect("a copy");
    let Some(Frame::Start(start)) = sent.first() else { panic!("{sent:?}") };
    assert!(start.upload && start.path == "/to" && start.name == "tree", "{start:?}");
    let bytes: usize = sent.iter().map(|frame| if let Frame::Data(data) = frame { data.len() } else { 0 }).sum();
    assert_eq!(bytes, 300_000);
    assert!(sent.iter().any(|frame| matches!(frame, Frame::Entry(entry) if entry.link == "/etc/passwd")), "as it is");
    assert!(matches!(sent.last(), Some(Frame::Complete(true))));
    let missing = minictl(&fake, &["cp", &at("none"), "a:/to"]).await;
    assert!(missing.code == Some(1) && missing.stderr.contains("No such file"), "{}", missing.stderr);
    assert_eq!(fake.copied_in().len(), 1, "nothing complete was sent");

    fake.copy_out(vec![
        entry("", EntryKind::Directory, ""),
        entry("f", EntryKind::File, ""),
        data("con"),
        data("tent"),
        entry("inside", EntryKind::Symlink, "f"),
        entry("outside", EntryKind::Symlink, "/etc/passwd"),
        Frame::Complete(true),
    ]);
    let copied = minictl(&fake, &["cp", "a:/some/where", &at("out")]).await;
    assert!(copied.code == Some(1) && copied.stderr.contains("left out: outside"), "{}", copied.stderr);
    assert_eq!(std::fs::read(at("out/f")).expect("copied"), b"content");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(at("out/f")).expect("copied").permissions());
    assert_eq!(mode & 0o7777, 0o755, "no container makes a set-uid program here");
    assert!(
        std::fs::symlink_metadata(at("out/inside")).is_ok() && std::fs::symlink_metadata(at("out/outside")).is_err()
    );
    for (what, frames) in [
        (
            "up",
            vec![
                entry("", EntryKind::Directory, ""),
                entry("../evil", EntryKind::File, ""),
                data("x"),
                Frame::Complete(true),
            ],
        ),
        ("broken off", vec![entry("", EntryKind::Directory, ""), entry("half", EntryKind::File, ""), data("x")]),
        ("nothing", vec![]),
    ] {
        fake.copy_out(frames);
        let refused = minictl(&fake, &["cp", "a:/x", &at("refused")]).await;
        assert_eq!(refused.code, Some(1), "{what}: {}", refused.stderr);
        assert!(!dir.path().join("evil").exists(), "{what}");
    }
    for wrong in [["cp", "a:/x", "b:/y"], ["cp", "x", "y"], ["cp", "a:x", "y"]] {
        assert_ne!(minictl(&fake, &wrong).await.code, Some(0), "{wrong:?}");
    }
}

#[tokio::test]
async fn a_debug_container_is_added_and_attached_to() {
    let fake = fake().await;
    let mut pod = running("a");
    // As its node would soon say.
    let state = ContainerState { running: Some(ContainerStateRunning::default()), ..ContainerState::default() };
    let status = ContainerStatus { name: "d".into(), state: Some(state), ..ContainerStatus::default() };
    pod.status_mut().ephemeral_container_statuses = vec![status];
    fake.put(pod);
    let words = ["debug", "a", "-i", "--image=busybox", "-c", "d", "--target=log", "--env", "A=b", "--", "sh"];
    let debug = minictl_with_input(&fake, &words, b"typed").await;
    assert_eq!((debug.code, debug.stdout.as_str()), (Some(5), "typed"), "{}", debug.stderr);
    let pod = fake_pod(&fake, "a").await;
    let added = &pod.spec().ephemeral_containers[0];
    assert_eq!(
        (added.name.as_str(), added.image.as_str(), added.target_container_name.as_str()),
        ("d", "busybox", "log")
    );
    assert_eq!((added.command[0].as_str(), added.stdin, added.tty), ("sh", true, false));
    // Without -i it is only added, under a name of its own.
    let second = minictl(&fake, &["debug", "a", "--image=busybox", "--profile=sysadmin"]).await;
    assert!(second.stderr.contains("debugger-"), "{}", second.stderr);
    let pod = fake_pod(&fake, "a").await;
    assert_eq!(pod.spec().ephemeral_containers.len(), 2);
    assert_eq!(minictl(&fake, &["debug", "nobody", "--image=busybox"]).await.code, Some(1));
}

#[tokio::test]
async fn attach_passes_input_and_output_as_the_manifest_has_them() {
    let fake = fake().await;
    let mut pod = running("a");
    pod.spec_mut().containers[0].stdin = true;
    let name = pod.spec().containers[0].name.clone();
    fake.put(pod);
    let cat = minictl_with_input(&fake, &["attach", "-i", "a", "-c", &name], &vec![b'y'; 200_000]).await;
    assert_eq!((cat.code, cat.stdout.len()), (Some(5), 200_000), "{}", cat.stderr);
    let output = minictl(&fake, &["attach", "a", "-c", &name]).await;
    assert_eq!((output.code, output.stdout.as_str()), (Some(4), "attached\n"));
    fake.put(running("b"));
    let closed = minictl(&fake, &["attach", "-it", "b"]).await;
    assert!(closed.stderr.contains("takes no input") && closed.stderr.contains("has no terminal"), "{}", closed.stderr);
    assert_eq!(closed.code, Some(4));
    assert_eq!(minictl(&fake, &["attach", "nobody"]).await.code, Some(1));
}

#[tokio::test]
async fn images_are_loaded_and_listed() {
    let (fake, dir) = (fake().await, tempfile::tempdir().unwrap());
    let path = file(dir.path(), "image.tar", &"z".repeat(1 << 20));
    let loaded = minictl(
        &fake,
        &["image", "load", &path, "--name", "minipod.local/x:1", "--entrypoint", "/x", "--entrypoint", "-v"],
    )
    .await;
    assert!(ok(&loaded).contains("node-a   minipod.local/x:1"), "{}", loaded.stdout);
    let (start, bytes) = fake.images().pop().unwrap();
    assert_eq!((start.entrypoint, bytes.len()), (vec!["/x".to_owned(), "-v".to_owned()], 1 << 20));
    assert!(ok(&minictl(&fake, &["image", "ls"]).await).contains("1.0MiB"));
    let piped = minictl_with_input(&fake, &["image", "load", "-"], b"abc").await;
    assert!(ok(&piped).contains("3B"), "{}", piped.stdout);
    let missing = minictl(&fake, &["image", "load", "/does/not/exist"]).await;
    assert!(missing.code == Some(1) && missing.stderr.contains("/does/not/exist"), "{}", missing.stderr);
}

#[tokio::test]
async fn describe_and_why_bring_the_events() {
    let fake = fake().await;
    let mut waiting = pod("a");
    let message = "0/1 nodes are available: node-a: memory short by 1Gi";
    waiting.status_mut().set_condition("PodScheduled", "False", "Unschedulable", message, Time::from_unix(1, 0));
    waiting.meta_mut().uid = "u1".into();
    fake.put(waiting);
    let about = ObjectReference {
        kind: "Pod".into(),
        namespace: "default".into(),
        name: "a".into(),
        uid: "u1".into(),
        ..Default::default()
    };
    let mut event = Event {
        reason: "FailedScheduling".into(),
        message: message.into(),
        involved_object: Some(about),
        ..Default::default()
    };
    (event.meta_mut().name, event.meta_mut().namespace) = ("a.1".into(), "default".into());
    fake.put(event);
    for words in [&["describe", "pod", "a"][..], &["why", "a"], &["why", "pod/a"]] {
        let ran = minictl(&fake, words).await;
        for part in ["node-a: memory short by 1Gi", "FailedScheduling"] {
            assert!(ok(&ran).contains(part), "{words:?} has no {part:?}: {}", ran.stdout);
        }
    }
    assert!(ok(&minictl(&fake, &["describe", "node", "node-a"]).await).contains("Ready"));
}

#[tokio::test]
async fn nodes_are_cordoned_and_given_back() {
    let fake = fake().await;
    assert_eq!(ok(&minictl(&fake, &["cordon", "node-a"]).await), "node/node-a cordoned\n");
    assert_eq!(ok(&minictl(&fake, &["node", "cordon", "node-a"]).await), "node/node-a already cordoned\n");
    assert!(ok(&minictl(&fake, &["node", "list"]).await).contains("Ready,SchedulingDisabled"));
    assert_eq!(ok(&minictl(&fake, &["node", "uncordon", "node/node-a"]).await), "node/node-a uncordoned\n");
    assert_eq!(minictl(&fake, &["cordon", "nope"]).await.code, Some(1));
}

#[tokio::test]
async fn contexts_are_kept_in_the_file() {
    let (fake, dir) = (fake().await, tempfile::tempdir().unwrap());
    fake.put(running("a"));
    let config = dir.path().join("sub/config.yaml").display().to_string();
    let run = |words: &[&str], server: Option<&str>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_minictl"));
        command.args(["--config", &config]).args(words).env_clear().stdin(Stdio::null());
        command.envs(server.map(|server| ("MINIPOD_SERVER", server)));
        ran(command.output().expect("minictl starts"))
    };
    assert_eq!(
        ok(&run(&["config", "set-context", "here", "--server", &fake.url()], None)),
        "context \"here\" created\n"
    );
    assert_eq!(
        ok(&run(&["config", "set-context", "there", "--server", "http://127.0.0.1:1", "-n", "x"], None)),
        "context \"there\" created\n"
    );
    assert_eq!(ok(&run(&["config", "current-context"], None)), "here\n");
    assert_eq!(ok(&run(&["get", "pods", "-o", "name"], None)), "pod/a\n");
    assert_eq!(ok(&run(&["config", "use-context", "there"], None)), "context \"there\" is in use\n");
    assert_eq!(run(&["get", "pods"], None).code, Some(1));
    assert_eq!(ok(&run(&["--context", "here", "get", "pods", "-o", "name"], None)), "pod/a\n");
    let unknown = run(&["config", "use-context", "nowhere"], None);
    assert!(unknown.code == Some(2) && unknown.stderr.contains("here, there"), "{}", unknown.stderr);
    let bad = run(&["config", "set-context", "bad", "--server", "ftp://x"], None);
    assert!(bad.code == Some(1) && bad.stderr.contains("ftp"), "{}", bad.stderr);
    assert!(
        ok(&run(&["config", "view"], None))
            .starts_with("apiVersion: minipod.dev/v1\nkind: Config\ncurrentContext: there\n")
    );
}
