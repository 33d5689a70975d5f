//! What confines a container, on the real kernel.

mod support;

use minipod_proto::v1::PodStatus;
use support::{Node, container, on_a_node, pod, terminated, waiting_reason};

fn ended(name: &'static str) -> impl Fn(&PodStatus) -> bool {
    move |status| terminated(container(status, name)).is_some()
}

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
