//! What dies alone, and what does not notice: agents, supervisors, pauses, the control plane.

use minictl::local::{NodeOptions, Options};
use minipod_proto::Resource;
use minipod_proto::v1::{Node, Pod};
use minipod_tests::cluster::{Cluster, bin_dir, pod};
use minipod_tests::kernel::{self, Process};
use minipod_tests::wait;

/// An init container that leaves a mark each time it runs, and an app that must not be disturbed.
const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: steady}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{name: marks, emptyDir: {}}]
  initContainers:
  - name: mark
    image: minipod.local/busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'echo run >> /marks/init']
    volumeMounts: [{name: marks, mountPath: /marks}]
  containers:
  - name: app
    image: minipod.local/busybox
    imagePullPolicy: IfNotPresent
    command: [sleep, infinity]
    volumeMounts: [{name: marks, mountPath: /marks}]
  - name: other
    image: minipod.local/busybox
    imagePullPolicy: IfNotPresent
    command: [sleep, infinity]
";

async fn steady() -> (Cluster, Pod) {
    let nodes = vec![NodeOptions::with_memory("node", "2Gi")];
    let apiserver_flags = vec!["--node-grace=2s".to_owned()];
    let cluster = Cluster::start_with(Options { apiserver_flags, ..Options::new(bin_dir(), nodes) }).await;
    let created = cluster.create(pod(POD)).await;
    cluster.until_phase("steady", "Running").await;
    (cluster, created)
}

fn kill(pid: u32) {
    let status = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(status.expect("kill is there").success(), "process {pid} is there");
}

fn app_and_other(pod: &Pod) -> [Process; 2] {
    let containers = kernel::containers(pod.uid());
    ["app", "other"].map(|name| containers.get(name).unwrap_or_else(|| panic!("no {name}: {containers:#?}")).clone())
}

/// How often init has run, and the restart counts of app and other.
async fn counts(cluster: &Cluster) -> Result<(usize, [i32; 2]), String> {
    let marks = cluster.exec("steady", "app", &["cat", "/marks/init"]).await?;
    let pod = cluster.pod("steady").await?;
    let count = |name: &str| {
        let status = pod.status().container_statuses.iter().find(|status| status.name == name);
        status.map_or(-1, |status| status.restart_count)
    };
    Ok((marks.lines().count(), [count("app"), count("other")]))
}

async fn until_counts(cluster: &Cluster, want: (usize, [i32; 2])) {
    wait::until(&format!("init runs and restart counts {want:?}"), || async {
        let found = counts(cluster).await?;
        let ready = cluster.pod("steady").await?.condition_true("Ready");
        if found == want && ready { Ok(()) } else { Err(format!("{found:?}, ready {ready}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_disturbs_nobody_and_finds_what_happened_meanwhile() {
    let (mut cluster, created) = steady().await;
    let before = app_and_other(&created);
    cluster.local.daemon("node").expect("it runs").kill();
    assert_eq!(app_and_other(&created), before, "containers run on without their agent");
    kill(before[1].pid);
    cluster.local.restart("node").expect("started again");
    until_counts(&cluster, (1, [0, 1])).await;
    let after = app_and_other(&created);
    assert_eq!(after[0], before[0], "app did not notice");
    assert_ne!(after[1].pid, before[1].pid, "what ended meanwhile is started again");
    cluster.delete_completely("steady").await;
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_control_plane_disturbs_nobody_and_goes_on_where_it_was() {
    let (mut cluster, created) = steady().await;
    let before = app_and_other(&created);
    for daemon in ["apiserver", "scheduler-0", "etcd", "apiserver"] {
        // The embedded store dies and comes back with the API server.
        if cluster.local.daemon(daemon).is_some() {
            cluster.local.restart(daemon).expect("started again");
        }
    }
    kill(before[1].pid);
    until_counts(&cluster, (1, [0, 1])).await;
    assert_eq!(app_and_other(&created)[0], before[0], "app did not notice");
    let second = POD.replace("name: steady", "name: second");
    cluster.create(pod(&second)).await;
    cluster.until_phase("second", "Running").await;
    cluster.delete_completely("second").await;
    cluster.delete_completely("steady").await;
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_pause_makes_a_new_sandbox_and_init_runs_again() {
    let (cluster, created) = steady().await;
    let processes = kernel::processes_in_cgroup(created.uid());
    let pause = processes.iter().find(|process| process.cgroup.ends_with("/pause"));
    kill(pause.unwrap_or_else(|| panic!("the pod has no pause: {processes:#?}")).pid);
    until_counts(&cluster, (2, [1, 1])).await;
    cluster.delete_completely("steady").await;
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_supervisor_takes_its_pod_along_and_the_pod_comes_back() {
    let (cluster, created) = steady().await;
    let before = app_and_other(&created);
    let shim =
        kernel::processes_with_argument(created.uid()).into_iter().find(|p| p.command.contains("minipod-podshim"));
    kill(shim.expect("the pod has a supervisor").pid);
    until_counts(&cluster, (2, [1, 1])).await;
    let after = app_and_other(&created);
    assert!(before.iter().zip(&after).all(|(old, new)| old.pid != new.pid), "{before:#?} {after:#?}");
    let alive = kernel::processes_with_argument("sleep infinity");
    assert!(!alive.iter().any(|process| before.iter().any(|old| old.pid == process.pid)), "no orphan: {alive:#?}");
    cluster.delete_completely("steady").await;
    cluster.local.stop().expect("taken down");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_node_is_not_ready_and_its_pods_are_not_but_stay() {
    let (mut cluster, created) = steady().await;
    let before = app_and_other(&created);
    cluster.local.daemon("node").expect("it runs").pause(true);
    let node_ready = async |cluster: &Cluster, want: bool| {
        let client = cluster.client().clone();
        wait::until(&format!("node and pod to be ready: {want}"), || async {
            let node = client.get::<Node>("", "node").await.map_err(|error| error.to_string())?;
            let pod = client.get::<Pod>("default", "steady").await.map_err(|error| error.to_string())?;
            let found = (node.is_ready(), pod.condition_true("Ready"));
            if found == (want, want) { Ok(()) } else { Err(format!("node and pod: {found:?}")) }
        })
        .await;
    };
    node_ready(&cluster, false).await;
    let steady = cluster.pod("steady").await.expect("it stays");
    assert_eq!((steady.uid(), steady.status().phase.as_str()), (created.uid(), "Running"));
    cluster.local.daemon("node").expect("it runs").pause(false);
    node_ready(&cluster, true).await;
    assert_eq!(app_and_other(&created), before, "nothing was restarted");
    cluster.delete_completely("steady").await;
    cluster.local.stop().expect("taken down");
}
