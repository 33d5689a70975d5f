//! AppArmor on the kernel that is there: one that has it confines by it, and on one that has not, what asks for it is refused.

mod support;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use minipod_proto::v1::open_stream::Request;
use minipod_proto::v1::tunnel_frame::Frame;
use minipod_proto::v1::{ExecFrame, ExecStart, PodStatus, exec_frame};
use support::*;

/// Whether this kernel has it; where the machine was made to have it (`cargo xtask vm-test`), it must.
fn enabled() -> bool {
    let enabled = Path::new("/sys/kernel/security/apparmor").is_dir();
    assert!(enabled || std::env::var_os("MINIPOD_HAS_APPARMOR").is_none(), "this machine should have AppArmor");
    enabled
}

const PROFILE: &str = "minipod-test-own";

/// Loads a profile as an operator would.
fn load(text: &str) {
    let mut parser = Command::new("apparmor_parser").arg("--replace").stdin(Stdio::piped()).spawn().expect("a parser");
    parser.stdin.take().expect("stdin").write_all(text.as_bytes()).expect("written");
    assert!(parser.wait().expect("it ends").success());
}

fn pod_of(uid: &str, more: &str, containers: &[(&str, &str, &str)]) -> minipod_proto::v1::Pod {
    let mut yaml = format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {uid}}}\nspec:\n  restartPolicy: Never\n  \
         terminationGracePeriodSeconds: 0\n{more}  containers:\n"
    );
    for (name, context, script) in containers {
        yaml += &format!(
            "    - name: {name}\n      image: minipod.local/busybox\n      imagePullPolicy: Never\n      \
             securityContext: {context}\n      command: [\"sh\", \"-c\", {script:?}]\n"
        );
    }
    pod(&yaml, uid)
}

const WHO: &str = "cat /proc/self/attr/current; ";

#[test]
fn a_profile_confines_its_container_or_the_pod_is_refused() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        if enabled() { confines(&node).await } else { refuses(&node).await }
    });
}

async fn confines(node: &Node) {
    load(&format!(
        "profile {PROFILE} flags=(attach_disconnected) {{ capability, file, network, signal, deny /tmp/no w, }}"
    ));
    let uid = "uid-profiles";
    let mount = format!("{WHO}mkdir /tmp/m; mount -t tmpfs none /tmp/m 2>&1 && echo mounted; echo end");
    let write = format!("{WHO}echo x >/tmp/yes; (echo x >/tmp/no) 2>&1; ls /tmp; echo end; sleep 1000");
    // So mighty that only the profile is in the way.
    let admin = "capabilities: {add: [SYS_ADMIN]}, allowPrivilegeEscalation: true, seccompProfile: {type: Unconfined}";
    let own = format!("{{appArmorProfile: {{type: Localhost, localhostProfile: {PROFILE}}}}}");
    let missing = "{appArmorProfile: {type: Localhost, localhostProfile: minipod-test-none}}";
    let containers = [
        ("plain", &*format!("{{{admin}}}"), &*mount),
        ("default", &*format!("{{appArmorProfile: {{type: RuntimeDefault}}, {admin}}}"), &*mount),
        ("free", &*format!("{{appArmorProfile: {{type: Unconfined}}, {admin}}}"), &*mount),
        ("mighty", "{privileged: true}", &*mount),
        ("own", &*own, &*write),
        ("missing", missing, "true"),
    ];
    node.api.put(pod_of(uid, "", &containers)).await;
    let denied = "minipod-default (enforce)\nmount: mounting none on /tmp/m failed: Permission denied\nend\n";
    for (name, wanted) in [
        ("plain", denied),
        ("default", denied),
        ("free", "unconfined\nmounted\nend\n"),
        ("mighty", "unconfined\nmounted\nend\n"),
        ("own", "minipod-test-own (enforce)\nsh: can't create /tmp/no: Permission denied\nyes\nend\n"),
    ] {
        assert_eq!(node.wait_log(uid, name, "end\n").await, wanted, "{name}");
    }
    // What is run in it later is confined as it is, and never by less.
    let command = ["cat", "/proc/self/attr/current"].map(str::to_owned).to_vec();
    let exec = ExecStart { container: "own".into(), command, ..ExecStart::default() };
    let mut tunnel = node.api.open(uid, Request::Exec(exec)).await;
    match tunnel.next().await {
        Some(Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Stdout(data)) })) => {
            assert_eq!(String::from_utf8_lossy(&data), "minipod-test-own (enforce)\n");
        }
        other => panic!("{other:?}"),
    }
    let refused =
        |status: &PodStatus| waiting_reason(container(status, "missing")) == Some("CreateContainerConfigError");
    let status = node.wait(uid, "the refusal", refused).await;
    let waiting = format!("{:?}", container(&status, "missing").state);
    assert!(waiting.contains("no profile of that name is loaded"), "{waiting}");

    // Its mounts and /proc are a user namespace's, and its exec comes after that has been entered.
    let users = "uid-users";
    let script = format!("{WHO}(echo 1 >/proc/sys/kernel/shm_rmid_forced) 2>&1; echo end");
    let context = "{procMount: Unmasked}";
    node.api.put(pod_of(users, "  hostUsers: false\n", &[("app", context, &script)])).await;
    let log = node.wait_log(users, "app", "end\n").await;
    assert!(log.starts_with("minipod-default (enforce)\n") && log.contains("Permission denied"), "{log}");
    for uid in [uid, users] {
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    }
}

async fn refuses(node: &Node) {
    for (uid, more, context) in [
        ("uid-own", "", "{appArmorProfile: {type: RuntimeDefault}}"),
        ("uid-pod", "  securityContext: {appArmorProfile: {type: Localhost, localhostProfile: a}}\n", "{}"),
    ] {
        node.api.put(pod_of(uid, more, &[("app", context, "true")])).await;
        let status = node.wait(uid, "the refusal", |status| status.phase == "Failed").await;
        assert_eq!(status.reason, "AppArmor");
        let message = "Pod was rejected: Cannot enforce AppArmor: AppArmor is not enabled on the host";
        assert_eq!(status.message, message);
        node.wait_event(uid, "AppArmor").await;
        assert!(!node.api.events(uid).iter().any(|reason| reason == "Started"));
    }
    let free = "{appArmorProfile: {type: Unconfined}}";
    node.api.put(pod_of("uid-free", "", &[("app", free, "echo end"), ("other", "{}", "echo end")])).await;
    for name in ["app", "other"] {
        node.wait_log("uid-free", name, "end\n").await;
    }
    for uid in ["uid-own", "uid-pod", "uid-free"] {
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    }
}
