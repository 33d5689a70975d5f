//! What confines a container, on the real kernel.

mod support;

use minipod_proto::v1::PodStatus;
use support::{Node, container, ended, on_a_node, pod, waiting_reason};

#[test]
fn system_calls_are_filtered_as_the_manifest_says() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let profiles = node.data_dir().join("seccomp");
        std::fs::create_dir_all(&profiles).expect("make");
        let no_mkdir = r#"{"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#;
        std::fs::write(profiles.join("no-mkdir.json"), no_mkdir).expect("write");
        let uid = "uid-seccomp";
        let script =
            "grep ^Seccomp: /proc/self/status | tr '\\t' ' '; mkdir /tmp/x 2>&1; unshare -m true 2>&1; echo end";
        let mut yaml = "apiVersion: v1\nkind: Pod\nmetadata: {name: seccomp}\nspec:\n  restartPolicy: Never\n  \
                        terminationGracePeriodSeconds: 0\n  containers:\n"
            .to_owned();
        for (name, context) in [
            ("plain", "{}"),
            ("default", "{seccompProfile: {type: RuntimeDefault}}"),
            ("own", "{seccompProfile: {type: Localhost, localhostProfile: no-mkdir.json}}"),
            ("free", "{seccompProfile: {type: Unconfined}}"),
            ("missing", "{seccompProfile: {type: Localhost, localhostProfile: none.json}}"),
        ] {
            yaml += &format!(
                "    - name: {name}\n      image: minipod.local/busybox\n      imagePullPolicy: Never\n      \
                 securityContext: {context}\n      command: [\"sh\", \"-c\", {script:?}]\n"
            );
        }
        node.api.put(pod(&yaml, uid)).await;
        let forbidden = "unshare: unshare(0x20000): Operation not permitted";
        for (name, mode, mkdir) in [
            ("plain", 2, ""),
            ("default", 2, ""),
            ("own", 2, "mkdir: can't create directory '/tmp/x': No space left on device\n"),
            ("free", 0, ""),
        ] {
            node.wait(uid, "its end", ended(name)).await;
            let log = node.wait_log(uid, name, "end\n").await;
            // Without CAP_SYS_ADMIN the kernel refuses the last one in any case; with the filter it never sees it.
            assert_eq!(log, format!("Seccomp: {mode}\n{mkdir}{forbidden}\nend\n"), "{name}");
        }
        // Never without the profile that was asked for, and it starts as soon as the profile is there.
        let refused =
            |status: &PodStatus| waiting_reason(container(status, "missing")) == Some("CreateContainerConfigError");
        let status = node.wait(uid, "the refusal", refused).await;
        let waiting = format!("{:?}", container(&status, "missing").state);
        assert!(waiting.contains("none.json") && waiting.contains("No such file"), "{waiting}");
        std::fs::write(profiles.join("none.json"), no_mkdir).expect("write");
        node.wait(uid, "its end", ended("missing")).await;
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn a_privileged_container_is_as_mighty_as_its_node() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let host = tempfile::tempdir().expect("tempdir");
        let none = None::<&str>;
        let flags = nix::mount::MsFlags::MS_BIND;
        nix::mount::mount(Some(host.path()), host.path(), none, flags, none).expect("mount (needs root)");
        nix::mount::mount(none, host.path(), none, nix::mount::MsFlags::MS_SHARED, none).expect("share");
        let uid = "uid-mighty";
        let yaml = format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{name: mighty}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  volumes: [{{name: host, hostPath: {{path: {}}}}}]
  containers:
    - name: mighty
      image: minipod.local/busybox
      imagePullPolicy: Never
      securityContext: {{privileged: true}}
      volumeMounts: [{{name: host, mountPath: /host, mountPropagation: Bidirectional}}]
      command: ["sh", "-c"]
      args:
        - |
          grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status | tr '\t' ' '
          mkdir /host/mark && mount -t tmpfs none /host/mark && touch /host/mark/seen && echo mounted
          ls /dev | wc -l
          echo 1 > /proc/sys/net/ipv4/ip_forward && echo written
          sleep 1000
    - name: plain
      image: minipod.local/busybox
      imagePullPolicy: Never
      command: ["sh", "-c", "ls /dev | wc -l; mount -t tmpfs none /mnt 2>&1; echo end"]
"#,
            host.path().display()
        );
        node.api.put(pod(&yaml, uid)).await;
        let plain = node.wait_log(uid, "plain", "end\n").await;
        let mighty = node.wait_log(uid, "mighty", "written\n").await;
        let lines: Vec<&str> = mighty.lines().collect();
        assert_eq!(lines[..3], ["NoNewPrivs: 0", "Seccomp: 0", "mounted"], "{mighty}");
        let devices = |text: &str| text.parse::<usize>().unwrap_or_else(|_| panic!("{mighty}{plain}"));
        assert!(devices(lines[3]) > devices(plain.lines().next().expect("a number")), "{mighty}{plain}");
        assert!(plain.contains("permission denied") || plain.contains("Permission denied"), "{plain}");
        assert!(host.path().join("mark/seen").exists(), "its mount is the node's too");
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
        for place in [host.path().join("mark"), host.path().to_owned()] {
            nix::mount::umount2(&place, nix::mount::MntFlags::MNT_DETACH).expect("unmount");
        }
    });
}
