//! Volumes on the real kernel: paths of the node, parts of volumes, the group that owns them.

mod support;

use support::{Node, container, ended, on_a_node, pod, terminated};

#[test]
fn paths_of_the_node_and_parts_of_volumes() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let host = tempfile::tempdir().expect("tempdir");
        let dir = host.path().display();
        std::fs::write(host.path().join("greeting"), "of the node\n").expect("write");
        let uid = "uid-volumes";
        let yaml = format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{name: volumes}}
spec:
  restartPolicy: Never
  securityContext: {{runAsUser: 1000, runAsGroup: 1000, fsGroup: 4321}}
  volumes:
    - name: node
      hostPath: {{path: {dir}, type: Directory}}
    - name: made
      hostPath: {{path: {dir}/made, type: DirectoryOrCreate}}
    - name: scratch
      emptyDir: {{}}
  containers:
    - name: reader
      image: minipod.local/busybox
      imagePullPolicy: Never
      command: ["sh", "-c"]
      args: ["cat /node/greeting; touch /node/x 2>/dev/null || echo refused; id -G; touch /mine/file; ls -n /mine | awk 'NR > 1 {{print $4}}'"]
      env: [{{name: NAME, valueFrom: {{fieldRef: {{fieldPath: metadata.name}}}}}}]
      volumeMounts:
        - {{name: node, mountPath: /node, readOnly: true, recursiveReadOnly: Enabled}}
        - {{name: scratch, mountPath: /mine, subPathExpr: logs/$(NAME)}}
    - name: writer
      image: minipod.local/busybox
      imagePullPolicy: Never
      securityContext: {{runAsUser: 0}}
      command: ["sh", "-c", "echo from the container > /made/file"]
      volumeMounts: [{{name: made, mountPath: /made}}]
"#
        );
        node.api.put(pod(&yaml, uid)).await;
        node.wait(uid, "the reader's end", ended("reader")).await;
        node.wait(uid, "the writer's end", ended("writer")).await;
        let told = node.wait_log(uid, "reader", "4321\n").await;
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(lines, ["of the node", "refused", "1000 4321", "4321"], "{told}");
        let scratch = node.data_dir().join("pods").join(uid).join("volumes/scratch/logs/volumes/file");
        assert!(scratch.exists(), "{} is not there", scratch.display());
        let made = std::fs::read_to_string(host.path().join("made/file")).expect("what the container wrote");
        assert_eq!(made, "from the container\n");
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
        // The pod is gone, the node's files are not.
        assert!(host.path().join("made/file").exists() && host.path().join("greeting").exists());
    });
}

#[test]
fn what_cannot_be_mounted_says_why_and_is_tried_again() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let host = tempfile::tempdir().expect("tempdir");
        let place = host.path().join("late");
        let uid = "uid-late";
        let yaml = format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{name: late}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  volumes: [{{name: late, hostPath: {{path: {}, type: Directory}}}}]
  containers:
    - name: app
      image: minipod.local/busybox
      imagePullPolicy: Never
      command: ["ls", "/late"]
      volumeMounts: [{{name: late, mountPath: /late}}]
"#,
            place.display()
        );
        node.api.put(pod(&yaml, uid)).await;
        let refused = || node.api.events(uid).iter().any(|reason| reason == "FailedMount").then_some(());
        node.api.wait_for("the refusal", refused, || node.agent_log()).await;
        std::fs::create_dir(&place).expect("make it");
        let status = node.wait(uid, "its end", ended("app")).await;
        assert_eq!(terminated(container(&status, "app")).map(|end| end.exit_code), Some(0));
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}
