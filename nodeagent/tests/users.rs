//! Pods with `hostUsers: false` on the real kernel.

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use minipod_proto::v1::open_stream::Request;
use minipod_proto::v1::server_message::Message as ToAgent;
use minipod_proto::v1::tunnel_frame::Frame;
use minipod_proto::v1::{
    AttachStart, ConfigMap, EphemeralContainer, ExecFrame, ExecStart, ObjectMeta, TerminalSize, exec_frame,
};
use nix::sys::signal::Signal;
use support::*;

/// First ids of the ranges that the agent has given away, by pod.
fn book(node: &Node) -> BTreeMap<String, u32> {
    let files = entries(&node.data_dir().join("users")).into_iter();
    let line = |path: std::path::PathBuf| {
        let first = path.file_name()?.to_str()?.parse().ok()?;
        Some((std::fs::read_to_string(&path).ok()?, first))
    };
    files.filter_map(line).collect()
}

/// Who a process is on the node: user and group.
fn who(pid: u32) -> (u32, u32) {
    let meta = std::fs::metadata(format!("/proc/{pid}")).unwrap_or_else(|error| panic!("process {pid}: {error}"));
    (meta.uid(), meta.gid())
}

fn config_map(name: &str, key: &str, value: &str) -> ToAgent {
    let metadata = Some(ObjectMeta { name: name.into(), namespace: "default".into(), ..ObjectMeta::default() });
    let map = ConfigMap { metadata, data: [(key.to_owned(), value.to_owned())].into(), ..ConfigMap::default() };
    ToAgent::ConfigMap(map)
}

const SHARED: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: NAME}
spec:
  hostUsers: false
  restartPolicy: Always
  terminationGracePeriodSeconds: 0
  securityContext: {fsGroup: 4321, sysctls: [{name: net.ipv4.ip_forward, value: "1"}]}
  volumes:
    - {name: disk, emptyDir: {}}
    - {name: memory, emptyDir: {medium: Memory}}
    - {name: settings, configMap: {name: settings, defaultMode: 0400}}
    - {name: host, hostPath: {path: HOST, type: Directory}}
  containers:
    - name: root
      image: minipod.local/busybox
      imagePullPolicy: Never
      command: ["sh", "-c"]
      args:
        - |
          id -u; echo x > /disk/file; echo x > /memory/file; echo x > /host/file; echo x > /dev/shm/file
          ls -n /dev/shm/file /disk/file /etc/hosts /host/file /host/theirs /memory/file | awk '{print $3 ":" $4}' | tr '\n' ' '; echo
          cat /settings/colour; echo; cat /proc/sys/net/ipv4/ip_forward
          httpd -p 80 -h /host && echo bound
          touch /disk/ready; sleep 1000
      readinessProbe: {exec: {command: [test, -f, /disk/ready]}, periodSeconds: 1}
      volumeMounts: &mounts
        - {name: disk, mountPath: /disk}
        - {name: memory, mountPath: /memory}
        - {name: settings, mountPath: /settings}
        - {name: host, mountPath: /host}
    - name: user
      image: minipod.local/busybox
      imagePullPolicy: Never
      securityContext: {runAsUser: 1000}
      command: ["sh", "-c"]
      args:
        - |
          until [ -e /disk/ready ]; do sleep 0.05; done
          id -u; id -G; ls -n /disk/file | awk '{print $3 ":" $4}'
          cat /settings/colour; echo; echo y > /disk/mine && ls -n /disk/mine | awk '{print $3 ":" $4}'
          echo y > /memory/mine && ls -n /memory/mine | awk '{print $3 ":" $4}'
          (echo y > /host/mine) 2>/dev/null || echo refused
          echo end > /dev/stdout; sleep 1000
      volumeMounts: *mounts
"#;

#[test]
fn root_of_a_pod_with_users_of_its_own_is_nobody_on_the_node() {
    on_a_node(|| async {
        let mut node = Node::new().await;
        node.flags.push("--allowed-unsafe-sysctls=net.ipv4.ip_forward".to_owned());
        node.start(&[]);
        let host = tempfile::tempdir().expect("tempdir");
        std::fs::write(host.path().join("theirs"), "x").expect("write");
        std::os::unix::fs::chown(host.path().join("theirs"), Some(1000), Some(1000)).expect("chown");
        node.api.put_source("settings", config_map("settings", "colour", "red")).await;
        let manifest = |name: &str| SHARED.replace("NAME", name).replace("HOST", &host.path().to_string_lossy());
        for uid in ["uid-one", "uid-two"] {
            node.api.put(pod(&manifest(uid), uid)).await;
        }
        for uid in ["uid-one", "uid-two"] {
            node.wait_running(uid).await;
            let ready = |status: &minipod_proto::v1::PodStatus| container(status, "root").ready;
            node.wait(uid, "the probe's word", ready).await;
            // The set-gid bit gives what is made in a volume to the pod's group.
            let root = node.wait_log(uid, "root", "bound\n").await;
            let all = "0:0 0:4321 0:0 0:0 1000:1000 0:4321 ";
            assert_eq!(root, format!("0\n{all}\nred\n1\nbound\n"), "{uid}");
            let user = node.wait_log(uid, "user", "end\n").await;
            let wanted = "1000\n0 4321\n0:4321\nred\n1000:4321\n1000:4321\nrefused\nend\n";
            assert_eq!(user, wanted, "{uid}");
        }
        let given = book(&node);
        let (one, two) = (given["uid-one"], given["uid-two"]);
        assert!(one >= 65_536 && one.abs_diff(two) >= 65_536, "{given:?}");
        for (uid, first) in [("uid-one", one), ("uid-two", two)] {
            let volumes = node.data_dir().join("pods").join(uid).join("volumes");
            let owner = |path: &Path| {
                let meta = path.metadata().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
                (meta.uid(), meta.gid())
            };
            assert_eq!(who(node.pid(uid, "root")), (first, first));
            assert_eq!(who(node.pid(uid, "user")).0, first + 1000);
            assert_eq!(who(node.pause_pid(uid)), (first, first));
            // On a disk are the ids that the pod sees; in memory, which is only the pod's, those of the node.
            assert_eq!(owner(&volumes.join("disk/file")), (0, 4321));
            assert_eq!(owner(&volumes.join("memory/file")), (first, first + 4321));
            assert_eq!(owner(&host.path().join("file")), (0, 0));
        }

        // A new agent finds it all again, and what it starts is in the same range.
        let before = node.processes("uid-one");
        node.end(Signal::SIGKILL);
        node.api.put_source("settings", config_map("settings", "colour", "blue")).await;
        node.start(&[]);
        kill_9(node.pid("uid-two", "root"));
        let again = |status: &minipod_proto::v1::PodStatus| {
            let root = container(status, "root");
            root.restart_count == 1 && running(root).is_some()
        };
        node.wait("uid-two", "root running again", again).await;
        assert_eq!(node.processes("uid-one"), before);
        assert_eq!(book(&node), given);
        assert_eq!(who(node.pid("uid-two", "root")), (two, two));
        // Values that have changed belong to the pod like those before.
        let colour = node.data_dir().join("pods/uid-one/volumes/settings/colour");
        let is_blue = || std::fs::read_to_string(&colour).ok().filter(|text| text == "blue").map(drop);
        node.api.wait_for("the new value", is_blue, || node.agent_log()).await;
        assert_eq!(colour.metadata().expect("colour").uid(), one);

        // Its infra container's death costs the sandbox, not the ids.
        kill_9(node.pause_pid("uid-one"));
        node.wait("uid-one", "root running again", again).await;
        assert_eq!(who(node.pid("uid-one", "root")), (one, one));

        for uid in ["uid-one", "uid-two"] {
            node.api.delete(uid, 0).await;
        }
        for uid in ["uid-one", "uid-two"] {
            node.wait_finished(uid).await;
            node.wait_gone(uid).await;
        }
        assert!(book(&node).is_empty(), "{:?}", book(&node));
        assert!(host.path().join("file").exists());
    });
}

/// One who has no ids left waits for another one's end.
#[test]
fn ids_that_are_all_taken_are_waited_for() {
    on_a_node(|| async {
        let mut node = Node::new().await;
        node.flags.push("--pod-user-ids=200000-265535".to_owned());
        node.start(&[]);
        let with_users = |uid: &str| {
            let mut pod = scripts(uid, "Never", 0, &[("a:app", "cat /proc/self/uid_map; sleep 1000")]);
            pod.spec_mut().host_users = Some(false);
            pod
        };
        node.api.put(with_users("uid-first")).await;
        node.wait_running("uid-first").await;
        let map = node.wait_log("uid-first", "app", "65536").await;
        assert_eq!(map.split_whitespace().collect::<Vec<_>>(), ["0", "200000", "65536"]);
        node.api.put(with_users("uid-second")).await;
        let refused =
            || node.api.events("uid-second").iter().any(|reason| reason == "FailedCreatePodSandBox").then_some(());
        node.api.wait_for("the refusal", refused, || node.agent_log()).await;
        assert!(node.agent_log().contains("all 1 ranges of 65536 ids in --pod-user-ids 200000-265535 are taken"));
        node.api.delete("uid-first", 0).await;
        node.wait_finished("uid-first").await;
        node.wait_running("uid-second").await;
        assert_eq!(book(&node), [("uid-second".to_owned(), 200_000)].into());
        // A pod that the API server has forgotten while there was no agent gives its ids back too.
        node.end(Signal::SIGKILL);
        node.api.forget("uid-second").await;
        node.start(&[]);
        let empty = || book(&node).is_empty().then_some(());
        node.api.wait_for("an empty book", empty, || node.agent_log()).await;
        node.wait_gone("uid-second").await;
    });
}

/// What a pod may see of /proc, and that a privileged container is mighty in the pod alone.
#[test]
fn an_open_procfs_and_a_privileged_container_of_own_users() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-open";
        let script = "grep -c ' /proc/' /proc/mounts; unshare -U -r -p -f -m sh -c 'mount -t proc proc /tmp && ls -d /tmp/1' 2>&1 | tail -n 1; \
                      mkdir -p /tmp/m; mount -t tmpfs none /tmp/m >/tmp/error 2>&1 && echo mounted; echo end";
        let mut yaml =
            "apiVersion: v1\nkind: Pod\nmetadata: {name: open}\nspec:\n  hostUsers: false\n  restartPolicy: Never\n  \
                        terminationGracePeriodSeconds: 0\n  containers:\n"
                .to_owned();
        for (name, context) in [
            ("masked", "{seccompProfile: {type: Unconfined}, appArmorProfile: {type: Unconfined}}"),
            ("open", "{procMount: Unmasked, seccompProfile: {type: Unconfined}, appArmorProfile: {type: Unconfined}}"),
            ("mighty", "{privileged: true}"),
        ] {
            yaml += &format!(
                "    - name: {name}\n      image: minipod.local/busybox\n      imagePullPolicy: Never\n      \
                 securityContext: {context}\n      command: [\"sh\", \"-c\", {script:?}]\n"
            );
        }
        node.api.put(pod(&yaml, uid)).await;
        for name in ["masked", "open", "mighty"] {
            node.wait(uid, "its end", ended(name)).await;
            let log = node.wait_log(uid, name, "end\n").await;
            match name {
                "masked" => assert!(log.starts_with(|c: char| c != '0') && !log.contains("/tmp/1"), "{log}"),
                "open" => assert_eq!(log, "0\n/tmp/1\nend\n"),
                _ => assert_eq!(log, "0\n/tmp/1\nmounted\nend\n"),
            }
        }
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

/// What a stream shows until `last` is in it.
async fn shown(tunnel: &mut support::fake_api::Tunnel, last: &str) -> String {
    let mut text = String::new();
    while !text.contains(last) {
        match tunnel.next().await {
            Some(Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Stdout(data)) })) => {
                text.push_str(&String::from_utf8_lossy(&data));
            }
            Some(Frame::Taken(_)) => {}
            other => panic!("{other:?} after {text:?}"),
        }
    }
    text
}

async fn types(tunnel: &support::fake_api::Tunnel, keys: &str) {
    let keys = exec_frame::Frame::Stdin(keys.as_bytes().to_vec().into());
    tunnel.send(Frame::Exec(ExecFrame { frame: Some(keys) })).await;
}

/// Terminals are made by the node's root in a devpts of the pod's; a debug container enters namespaces that are another's.
#[test]
fn a_user_takes_part_in_debugs_and_resizes_a_pod_with_users_of_its_own() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        let uid = "uid-tended";
        let script = "tty; ls -n $(tty) | awk '{print $3}'; while read line; do echo got $line; done";
        let mut pod = scripts(uid, "Always", 0, &[("a:app", script), ("a:other", "exec sleep 1234")]);
        pod.spec_mut().host_users = Some(false);
        let app = &mut pod.spec_mut().containers[0];
        (app.stdin, app.tty) = (true, true);
        app.security_context.get_or_insert_default().run_as_user = Some(1000);
        app.resources = requirements("100m", "64Mi");
        pod.spec_mut().containers[1].resources = requirements("100m", "16Mi");
        node.api.put(pod.clone()).await;
        node.wait_running(uid).await;
        let first = book(&node)[uid];
        let log = node.wait_log(uid, "app", "1000").await;
        assert_eq!(log.replace('\r', ""), "/dev/pts/0\n1000\n", "the terminal is the container's user's");

        // Attached, with keys, and gone again; another agent serves the next one.
        let size = Some(TerminalSize { rows: 30, columns: 90 });
        let attach =
            || Request::Attach(AttachStart { container: "app".into(), stdin: true, size, ..Default::default() });
        let mut tunnel = node.api.open(uid, attach()).await;
        types(&tunnel, "x\n").await;
        shown(&mut tunnel, "got x\r\n").await;
        drop(tunnel);
        node.end(Signal::SIGKILL);
        let api = node.api.clone();
        let reports = || api.reports().iter().filter(|report| report.uid == uid).count();
        let before = reports();
        node.start(&[]);
        // It tells of the pod once it has found the supervisor; until then nothing of it runs, as far as it knows.
        let told = || (reports() > before).then_some(());
        node.api.wait_for("the new agent's word on the pod", told, || node.agent_log()).await;
        let mut tunnel = node.api.open(uid, attach()).await;
        types(&tunnel, "y\n").await;
        shown(&mut tunnel, "got y\r\n").await;
        drop(tunnel);
        // A terminal of its own beside it.
        let command = ["sh", "-c", "tty; stty size; id -u; cat /proc/self/uid_map"].map(str::to_owned).to_vec();
        let exec = ExecStart { container: "app".into(), command, tty: true, size, ..ExecStart::default() };
        let mut tunnel = node.api.open(uid, Request::Exec(exec)).await;
        let text = shown(&mut tunnel, "65536\r\n").await;
        let words: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(words, ["/dev/pts/1", "30", "90", "1000", "0", &first.to_string(), "65536"]);

        // A debug container among the target's processes, root of the same users.
        let script = "tr '\\0' ' ' </proc/1/cmdline; echo; id -u; ls -nd /proc/1/root/v | awk '{print $3}'; \
                      kill -0 1 && echo may; sleep 1000";
        let debug = EphemeralContainer {
            name: "debug".into(),
            image: "minipod.local/busybox".into(),
            image_pull_policy: "Never".into(),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            target_container_name: "other".into(),
            ..EphemeralContainer::default()
        };
        let before = node.processes(uid);
        pod.spec_mut().ephemeral_containers.push(debug);
        node.api.put(pod.clone()).await;
        let log = node.wait_log(uid, "debug", "may").await;
        assert_eq!(log, "sleep 1234 \n0\n0\nmay\n");
        assert_eq!(who(node.pid(uid, "debug")), (first, first));

        // Limits change in place while all that goes on.
        node.api.put(resized(&pod, requirements("200m", "96Mi"))).await;
        let wanted = requirements("200m", "96Mi");
        node.wait(uid, "more", |status| in_force(status, "app") == wanted).await;
        let still: Vec<_> = node.processes(uid).into_iter().filter(|(name, ..)| !name.starts_with("debug")).collect();
        assert_eq!(still, before, "nothing was started again");
        assert_eq!(limits_of(node.pid(uid, "app")), (20_000, 96 << 20));
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
        assert!(book(&node).is_empty(), "{:?}", book(&node));
    });
}
