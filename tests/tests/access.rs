//! A hand in a pod, through the whole cluster: ports, terminals, logs.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use minipod_client::ExecOutput;
use minipod_proto::v1::{AttachStart, ExecStart, TerminalSize};
use minipod_tests::cluster::{Cluster, bin_dir, example, pod, text};
use minipod_tests::wait;

const MANIFEST: &str = "apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: server
    image: minipod.local/busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'mkdir /www; echo hello from inside >/www/index.html; echo serving; exec httpd -f -p 127.0.0.1:80 -h /www']
  - name: other
    image: minipod.local/busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'echo beside it; exec sleep infinity']
";

const TALK: &str = "apiVersion: v1
kind: Pod
metadata: {name: talk}
spec:
  terminationGracePeriodSeconds: 0
  restartPolicy: Never
  containers:
  - name: talk
    image: minipod.local/busybox
    imagePullPolicy: IfNotPresent
    stdin: true
    stdinOnce: true
    command: [sh, -c, 'while read word; do echo you said $word; done; exit 4']
";

/// Killed with the test.
struct Forward(Child);

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An HTTP answer of what minictl forwards to.
fn ask(address: &str) -> std::io::Result<String> {
    let mut stream = std::net::TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_terminals_and_logs_of_a_pod() {
    let cluster = Cluster::start(&[("node-a", "1Gi")]).await;
    cluster.create(pod(MANIFEST)).await;
    cluster.until_phase("web", "Running").await;

    let want = "[pod/web/server] serving\n[pod/web/other] beside it\n";
    wait::until("both logs", || async {
        let logs = cluster.minictl(&["logs", "-l", "app=web", "--all-containers", "--prefix"]);
        if text(&logs.stdout) == want { Ok(()) } else { Err(format!("{}{}", text(&logs.stdout), text(&logs.stderr))) }
    })
    .await;

    let mut command = Command::new(bin_dir().join("minictl"));
    command.args(["port-forward", "web", ":80"]).env("MINIPOD_SERVER", cluster.local.server());
    let mut forward = Forward(command.stdout(Stdio::piped()).spawn().expect("minictl starts"));
    let mut line = String::new();
    BufReader::new(forward.0.stdout.take().expect("piped")).read_line(&mut line).expect("UTF-8");
    let address = line.trim().strip_prefix("Forwarding from ").and_then(|line| line.strip_suffix(" -> 80"));
    let address = address.unwrap_or_else(|| panic!("{line:?}")).to_owned();
    wait::until("the pod's page", || async {
        let answer = ask(&address).map_err(|error| error.to_string())?;
        if answer.ends_with("hello from inside\n") { Ok(()) } else { Err(answer) }
    })
    .await;

    let start = ExecStart {
        namespace: "default".to_owned(),
        pod: "web".to_owned(),
        container: "other".to_owned(),
        command: ["sh", "-c", "tty; stty size; exit 3"].map(str::to_owned).to_vec(),
        stdin: true,
        tty: true,
        size: Some(TerminalSize { rows: 31, columns: 97 }),
    };
    let mut exec = cluster.client().exec(start).await.expect("exec");
    let mut shown = Vec::new();
    let code = loop {
        match exec.next().await.expect("output") {
            ExecOutput::Stdout(data) | ExecOutput::Stderr(data) => shown.extend_from_slice(&data),
            ExecOutput::Exit(code) => break code,
        }
    };
    assert_eq!((text(&shown).as_str(), code), ("/dev/pts/0\r\n31 97\r\n", 3));
    drop(forward);

    // Keys and output of a container's own process.
    cluster.create(pod(TALK)).await;
    cluster.until_phase("talk", "Running").await;
    let mut command = Command::new(bin_dir().join("minictl"));
    command.args(["attach", "-i", "talk"]).env("MINIPOD_SERVER", cluster.local.server());
    let mut attached = Forward(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("minictl starts"));
    let mut keyboard = attached.0.stdin.take().expect("piped");
    let mut shown = BufReader::new(attached.0.stdout.take().expect("piped"));
    keyboard.write_all(b"hello\n").expect("typed");
    let mut line = String::new();
    shown.read_line(&mut line).expect("UTF-8");
    assert_eq!(line, "you said hello\n");
    // The end of the first user's input is the container's: it ends, and its exit code is minictl's.
    drop(keyboard);
    assert_eq!(attached.0.wait().expect("ends").code(), Some(4));
    cluster.delete_completely("talk").await;

    // The example: a shell on a terminal, which outlives who was attached to it.
    cluster.create(pod(&example("terminal.yaml"))).await;
    cluster.until_phase("desk", "Running").await;
    let start = || AttachStart {
        namespace: "default".to_owned(),
        pod: "desk".to_owned(),
        stdin: true,
        size: Some(TerminalSize { rows: 31, columns: 97 }),
        ..AttachStart::default()
    };
    for (typed, want) in [("stty size; X=kept\n", "31 97\r\n"), ("echo $X; exit 3\n", "\nkept\r\n")] {
        let mut desk = cluster.client().attach(start(), true).await.expect("attach");
        let keyboard = desk.take_stdin().expect("keys");
        assert!(keyboard.write(typed.into()).await);
        let mut shown = String::new();
        while !shown.contains(want) {
            match desk.next().await.unwrap_or_else(|error| panic!("{error} after {shown:?}")) {
                ExecOutput::Stdout(data) | ExecOutput::Stderr(data) => shown.push_str(&text(&data)),
                ExecOutput::Exit(code) => panic!("ended with {code} after {shown:?}"),
            }
        }
    }
    cluster.until_phase("desk", "Failed").await;
    cluster.delete_completely("desk").await;

    // Files in and out, and a debug container among the server's processes.
    let dir = tempfile::tempdir().expect("tempdir");
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    std::fs::create_dir(at("site")).expect("make");
    std::fs::write(at("site/page.html"), "hello from outside\n").expect("write");
    let ran = |arguments: &[&str]| {
        let ran = cluster.minictl(arguments);
        assert!(ran.status.success(), "{arguments:?}: {}", text(&ran.stderr));
        text(&ran.stdout)
    };
    ran(&["cp", &at("site"), "web:/www", "-c", "server"]);
    let page = ran(&["exec", "web", "-c", "server", "--", "cat", "/www/site/page.html"]);
    assert_eq!(page, "hello from outside\n");
    ran(&["cp", "web:/www", &at("back"), "-c", "server"]);
    assert_eq!(std::fs::read_to_string(at("back/index.html")).expect("copied"), "hello from inside\n");
    assert_eq!(std::fs::read_to_string(at("back/site/page.html")).expect("copied"), "hello from outside\n");
    let refused = cluster.minictl(&["cp", "web:/proc/1", &at("proc"), "-c", "server"]);
    assert!(!refused.status.success() && text(&refused.stderr).contains("use exec"), "{}", text(&refused.stderr));
    let script = "tr '\\0' ' ' </proc/1/cmdline; wget -qO- http://127.0.0.1/; exit 3";
    let image = "--image=minipod.local/busybox";
    let debug =
        cluster.minictl(&["debug", "web", "-i", image, "-c", "look", "--target=server", "--", "sh", "-c", script]);
    assert_eq!(debug.status.code(), Some(3), "{}", text(&debug.stderr));
    let log = ran(&["logs", "web", "-c", "look"]);
    assert_eq!(log, "httpd -f -p 127.0.0.1:80 -h /www hello from inside\n");
    let described = ran(&["describe", "pod", "web"]);
    assert!(described.contains("Debug containers") && described.contains("look"), "{described}");

    // An image out of the cluster, and in again when it is gone.
    let archive = at("image.tar");
    ran(&["image", "save", "minipod.local/toolbox", "-o", &archive]);
    let used = cluster.minictl(&["image", "rm", "minipod.local/busybox"]);
    assert!(!used.status.success() && text(&used.stderr).contains("in use"), "{}", text(&used.stderr));
    assert!(ran(&["image", "rm", "minipod.local/toolbox"]).contains("minipod.local/toolbox:latest"));
    let none = cluster.minictl(&["image", "rm", "minipod.local/toolbox"]);
    assert!(!none.status.success() && text(&none.stderr).contains("no node has"), "{}", text(&none.stderr));
    let gone = cluster.minictl(&["image", "save", "minipod.local/toolbox", "-o", &at("none.tar")]);
    assert!(!gone.status.success() && !std::path::Path::new(&at("none.tar")).exists(), "{}", text(&gone.stderr));
    assert!(ran(&["image", "load", &archive]).contains("minipod.local/toolbox:latest"));
    cluster.delete_completely("web").await;
    cluster.local.stop().expect("taken down");
}
