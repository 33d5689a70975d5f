//! The chapters of the demo: one example each, and what it proves.

use std::process::Command;

use minipod_proto::Resource;
use minipod_proto::v1::{Pod, Time};

use super::processes;
use super::stage::{Stage, status};
use crate::cli::{error::CliError, now};
use crate::view::why::why;

/// Four containers, one application; one of them dies.
pub async fn helloworld(stage: &Stage) -> Result<(), CliError> {
    let claim = "Four containers work together over localhost, a unix socket and a shared volume.\n\
                 When one of them is killed, it alone starts again.";
    stage.chapter("helloworld: one pod of four containers", claim).await;
    let pod = stage.apply("helloworld.yaml").await?;
    stage.until_ready("helloworld").await?;
    let parts = ["hello from api to request", "compute: 2 * 2 = 4"];
    let journal = stage.until_logged("helloworld", "log", &parts).await?;
    stage.say("minictl logs helloworld -c log");
    stage.quote(&journal);

    let before = processes::of_pod(pod.uid());
    for (name, (pid, _)) in &before {
        stage.say(&format!("{name}: PID {pid} on this machine, PID 1 in its container"));
    }
    let Some((pid, _)) = before.get("main").copied() else {
        return stage.prove("main has a process", false, &format!("{before:?}"));
    };
    stage.say(&format!("kill -9 {pid}"));
    let killed = Command::new("kill").args(["-9", &pid.to_string()]).status();
    stage.prove("main can be killed", killed.as_ref().is_ok_and(|status| status.success()), &format!("{killed:?}"))?;
    let again = |pod: &Pod| status(pod, "main").is_some_and(|main| main.restart_count == 1 && main.ready);
    stage.until("helloworld", "main runs again", again).await?;
    let after = processes::of_pod(pod.uid());
    let same =
        before.iter().filter(|(name, _)| *name != "main").all(|(name, process)| after.get(name) == Some(process));
    let claim = "api, compute and log kept their PIDs and start times; main has a new one";
    let new = after.get("main").is_some_and(|main| *main != (pid, 0) && before.get("main") != Some(main));
    stage.prove(claim, same && new, &format!("before {before:?}, after {after:?}"))?;
    stage.delete("helloworld").await
}

/// A pod is placed as a whole.
pub async fn co_scheduling(stage: &Stage) -> Result<(), CliError> {
    let claim = "The app needs 1Gi, its log collector 512Mi: together they fit on node-b (2Gi) and not on node-a (1.25Gi).\n\
                 A scheduler that placed containers one by one could put the app on node-a and be stuck.";
    stage.chapter("co-scheduling: a pod is placed as a whole", claim).await;
    stage.apply("co-scheduling.yaml").await?;
    let pod = stage.until_ready("co-scheduling").await?;
    let node = pod.node_name().unwrap_or("no node");
    stage.prove("it is on node-b, whole", node == "node-b", node)?;
    stage.delete("co-scheduling").await?;

    stage.rest().await;
    stage.say("now node-b is filled with a pod of 1Gi, and the same pod comes again");
    stage.create(FILLER).await?;
    stage.until_ready("filler").await?;
    stage.apply("co-scheduling.yaml").await?;
    let told = |pod: &Pod| pod.condition("PodScheduled").is_some_and(|condition| condition.reason == "Unschedulable");
    let pending = stage.until("co-scheduling", "the scheduler says why it waits", told).await?;
    stage.say("minictl why co-scheduling");
    let reasons = why(&pending, None, &stage.events(&pending).await?, now());
    stage.quote(&reasons);
    let both = ["node-a", "node-b"].iter().all(|node| reasons.contains(node));
    stage.prove("the shortfall of every node is told", both, &reasons)?;
    stage.prove("nothing of it is anywhere", pending.node_name().is_none(), &format!("{:?}", pending.node_name()))?;
    stage.delete("filler").await?;
    let running = stage.until_ready("co-scheduling").await?;
    let node = running.node_name().unwrap_or("no node");
    stage.prove("with room again it runs on node-b, and nobody had to ask", node == "node-b", node)?;
    stage.delete("co-scheduling").await
}

/// Takes half of node-b, and says so with the label that every node has.
const FILLER: &str = "
apiVersion: v1
kind: Pod
metadata: {name: filler, namespace: default}
spec:
  terminationGracePeriodSeconds: 0
  nodeSelector: {kubernetes.io/hostname: node-b}
  containers:
  - name: sleep
    image: minipod.local/busybox
    imagePullPolicy: IfNotPresent
    command: [sleep, infinity]
    resources: {requests: {memory: 1Gi}, limits: {memory: 1Gi}}
";

/// What containers of a pod share.
pub async fn shared_data(stage: &Stage) -> Result<(), CliError> {
    let claim = "Two containers, one volume, one network: same interface, address and MAC.\n\
                 Their root file systems and process trees are their own.";
    stage.chapter("shared-data: what containers share, and what not", claim).await;
    stage.apply("shared-data.yaml").await?;
    stage.until_ready("shared-data").await?;
    stage.until_logged("shared-data", "writer", &["hello from the writer"]).await?;
    for (command, shared) in [
        (&["ip", "-o", "link", "show", "eth0"][..], true),
        (&["ip", "-o", "-4", "addr", "show", "eth0"], true),
        (&["wget", "-q", "-O", "-", "http://127.0.0.1/"], true),
        (&["cat", "/who-am-i"], false),
    ] {
        let mut answers = Vec::new();
        for container in ["reader", "writer"] {
            let (code, said) = stage.exec("shared-data", container, command).await?;
            stage.prove(&format!("{:?} works in {container}", command.join(" ")), code == 0, &said)?;
            stage.quote(&said);
            answers.push(said);
        }
        let same = answers.windows(2).all(|pair| pair.first() == pair.last());
        let claim = if shared { "both see the same" } else { "each has its own" };
        stage.prove(claim, same == shared, &format!("{answers:?}"))?;
    }
    stage.delete("shared-data").await
}

/// Init containers in order.
pub async fn init_order(stage: &Stage) -> Result<(), CliError> {
    let claim = "Three init containers, one after the other; the second fails at its first attempt and holds up the rest\n\
                 until it has recovered. Then, and only then, the app starts.";
    stage.chapter("init-order: before the app starts", claim).await;
    stage.apply("init-order.yaml").await?;
    let pod = stage.until_ready("init-order").await?;
    let log = stage.until_logged("init-order", "app", &["app: started after"]).await?;
    stage.quote(&log);
    stage.prove("the order is that of the manifest", log.contains("first second third"), &log)?;
    let restarts: Vec<i32> = ["first", "second", "third"]
        .iter()
        .map(|name| status(&pod, name).map_or(-1, |status| status.restart_count))
        .collect();
    stage.prove("only the second ran twice", restarts == [0, 1, 0], &format!("restarts {restarts:?}"))?;
    stage.delete("init-order").await
}

/// A sidecar lives around the app.
pub async fn sidecar(stage: &Stage) -> Result<(), CliError> {
    let claim = "A log collector as a sidecar: started before the app, ended after it, and it does not hold a finished pod open.";
    stage.chapter("sidecar: around the app", claim).await;
    stage.apply("sidecar.yaml").await?;
    let done = stage.until("sidecar", "the pod has succeeded", Pod::is_terminal).await?;
    stage.prove("the pod has succeeded", done.status().phase == "Succeeded", &done.status().phase)?;
    let log = stage.logs("sidecar", "log-collector").await?;
    stage.quote(&log);
    stage.prove("the last line was collected", log.contains("app: line 5 of 5"), &log)?;
    let times = |name: &str| {
        let ended = status(&done, name).and_then(|status| status.state.clone()).and_then(|state| state.terminated);
        ended.and_then(|ended| Some((millis(ended.started_at)?, millis(ended.finished_at)?)))
    };
    let (app, collector) = (times("app"), times("log-collector"));
    let around =
        matches!((app, collector), (Some(app), Some(collector)) if collector.0 <= app.0 && collector.1 >= app.1);
    stage.prove(
        "it was there before the app and after it",
        around,
        &format!("app {app:?}, collector {collector:?}"),
    )?;
    stage.delete("sidecar").await
}

fn millis(time: Option<Time>) -> Option<i64> {
    time.map(|time| time.unix_ms())
}
