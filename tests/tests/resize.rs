//! `minictl resize`, through the whole cluster: spec, ledger, node and kernel.

use minipod_proto::resize;
use minipod_proto::v1::Pod;
use minipod_tests::cluster::{Cluster, pod, text};
use minipod_tests::wait;

fn manifest(name: &str, memory: &str) -> Pod {
    pod(&format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: app
    image: minipod.local/busybox
    imagePullPolicy: IfNotPresent
    command: [sleep, infinity]
    resources: {{requests: {{memory: {memory}}}, limits: {{memory: {memory}}}}}
"
    ))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_grows_waits_for_room_and_grows_on() {
    let cluster = Cluster::start(&[("node-a", "256Mi")]).await;
    for (name, memory) in [("web", "64Mi"), ("other", "128Mi")] {
        cluster.create(manifest(name, memory)).await;
        cluster.until_phase(name, "Running").await;
    }
    let resize = |memory: &str| {
        let done = cluster.minictl(&["resize", "web", "--memory", memory]);
        assert!(done.status.success(), "{}", text(&done.stderr));
        text(&done.stdout)
    };
    let in_force = |want: &'static str| {
        let client = cluster.client().clone();
        async move {
            let pod: Pod = client.get("default", "web").await.map_err(|error| error.to_string())?;
            let one = pod.status().container_statuses.first().cloned().unwrap_or_default();
            let limits = one.resources.clone().unwrap_or_default().limits;
            let good = limits.get("memory").map(String::as_str) == Some(want)
                && pod.condition(resize::PENDING).is_none()
                && pod.condition(resize::IN_PROGRESS).is_none()
                && one.restart_count == 0;
            if good { Ok(()) } else { Err(format!("{:#?}", pod.status())) }
        }
    };
    assert_eq!(resize("96Mi"), "pod/web resized\n");
    wait::until("96Mi in force", || in_force("96Mi")).await;
    let limit = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max";
    let seen = cluster.minictl(&["exec", "web", "--", "sh", "-c", limit]);
    assert_eq!(text(&seen.stdout).trim(), (96 << 20).to_string(), "{}", text(&seen.stderr));

    let waits = resize("192Mi");
    assert_eq!(waits, "pod/web not resized yet (Deferred): node node-a has no room now: memory short by 64Mi\n");
    let gone = cluster.minictl(&["delete", "pod", "other"]);
    assert!(gone.status.success(), "{}", text(&gone.stderr));
    wait::until("192Mi in force", || in_force("192Mi")).await;
    let never = resize("1Gi");
    assert!(never.starts_with("pod/web not resized yet (Infeasible): node node-a is too small"), "{never}");
    let seen = cluster.minictl(&["describe", "pod", "web"]);
    let page = text(&seen.stdout);
    assert!(page.contains("PodResizePending") && page.contains("Limits in force:"), "{page}");
    let wrong = cluster.minictl(&["resize", "web", "-c", "nobody", "--cpu", "1"]);
    assert!(!wrong.status.success());
    assert!(text(&wrong.stderr).contains("want a container of the pod: app"), "{}", text(&wrong.stderr));
}
