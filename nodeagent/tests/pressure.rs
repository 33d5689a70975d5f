//! Pods that take more of the disk than they may, and a node that runs short: who is ended, with which words, and what is left.

mod support;

use minipod_proto::v1::{Pod, PodStatus, ResourceRequirements};
use nix::sys::signal::Signal;
use support::*;

const FAST: &str = "--housekeeping-interval-ms=300";

async fn node(flags: &[&str]) -> Node {
    let mut node = Node::new().await;
    node.flags.extend(flags.iter().map(|flag| (*flag).to_owned()));
    node.start(&[]);
    node
}

async fn evicted(node: &Node, uid: &str) -> PodStatus {
    let status = node.wait(uid, "Failed", |status| status.phase == "Failed").await;
    assert_eq!(status.reason, "Evicted", "{status:#?}");
    let condition = status.conditions.iter().find(|condition| condition.r#type == "DisruptionTarget");
    let condition = condition.unwrap_or_else(|| panic!("{status:#?}"));
    assert_eq!((condition.reason.as_str(), &condition.message), ("TerminationByKubelet", &status.message));
    node.wait_event(uid, "Evicted").await;
    status
}

fn limit(pod: &mut Pod, container: usize, amount: &str) {
    let limits = [("ephemeral-storage".to_owned(), amount.to_owned())].into();
    let resources = ResourceRequirements { limits, ..ResourceRequirements::default() };
    pod.spec_mut().containers[container].resources = Some(resources);
}

#[test]
fn who_takes_too_much_disk_is_evicted_and_nobody_else() {
    on_a_node(|| async {
        let node = node(&[FAST]).await;
        // Grows until it is ended, or stays at its 4 MiB.
        let fill =
            |place: &str| format!("i=0; while :; do head -c 1m /dev/zero > {place}.$i; i=$((i+1)); sleep 0.05; done");
        let mut volume = scripts("uid-volume", "Always", 30, &[("a:app", &fill("/v/f")), ("a:other", "sleep 1000")]);
        volume.spec_mut().volumes[0].empty_dir.get_or_insert_default().size_limit = "6Mi".into();
        let mut layer = scripts("uid-layer", "Always", 30, &[("a:app", &fill("/f")), ("a:other", "sleep 1000")]);
        limit(&mut layer, 0, "6Mi");
        limit(&mut layer, 1, "64Mi");
        let mut talker = scripts(
            "uid-talker",
            "Always",
            30,
            &[("a:app", "while :; do head -c 1m /dev/zero | tr '\\0' x; echo; sleep 0.05; done")],
        );
        limit(&mut talker, 0, "6Mi");
        let mut calm = scripts(
            "uid-calm",
            "Always",
            1,
            &[("a:app", "head -c 4m /dev/zero > /v/f; head -c 4m /dev/zero > /f; sleep 1000")],
        );
        calm.spec_mut().volumes[0].empty_dir.get_or_insert_default().size_limit = "6Mi".into();
        limit(&mut calm, 0, "12Mi");
        for pod in [volume, layer, talker, calm] {
            node.api.put(pod).await;
        }
        let status = evicted(&node, "uid-volume").await;
        assert_eq!(status.message, "Usage of EmptyDir volume \"v\" exceeds the limit \"6Mi\". ");
        let status = evicted(&node, "uid-layer").await;
        assert_eq!(status.message, "Container app exceeded its local ephemeral storage limit \"6Mi\". ");
        let status = evicted(&node, "uid-talker").await;
        assert_eq!(status.message, "Pod ephemeral local storage usage exceeds the total limit of containers 6Mi. ");
        // What they had is gone from the disk; the pods are there until somebody deletes them.
        for uid in ["uid-volume", "uid-layer"] {
            let data = node.data_dir().join("pods").join(uid);
            let gone = || (!data.exists()).then_some(());
            node.api.wait_for("the end of its data", gone, || format!("{} is there", data.display())).await;
        }
        let calm = node.wait_running("uid-calm").await;
        assert_eq!(container(&calm, "app").restart_count, 0);
        for uid in ["uid-volume", "uid-layer", "uid-talker", "uid-calm"] {
            node.api.delete(uid, 1).await;
            node.wait_finished(uid).await;
        }
        for uid in ["uid-volume", "uid-layer", "uid-talker", "uid-calm"] {
            node.wait_gone(uid).await;
        }
    });
}

#[test]
fn a_node_short_of_memory_ends_who_uses_more_than_asked_for() {
    on_a_node(|| async {
        // Short in any case, because some of the memory is always in use. By the first look all three must run, on a slow machine too.
        let mut node = Node::new().await;
        node.flags.retain(|flag| flag != "--eviction-hard=");
        let flags = ["--eviction-hard=memory.available<100%", "--housekeeping-interval-ms=15000"];
        node.flags.extend(flags.map(str::to_owned));
        let asks = |uid: &str, memory: &str, priority: i32| {
            let mut pod = scripts(uid, "Always", 30, &[("a:app", "sleep 1000")]);
            pod.spec_mut().priority = Some(priority);
            let requests = [("memory".to_owned(), memory.to_owned())].into();
            let resources = ResourceRequirements { requests, ..ResourceRequirements::default() };
            pod.spec_mut().containers[0].resources = Some(resources);
            pod
        };
        // Known before the first round, so that the order is that of the rules alone.
        for pod in
            [asks("uid-modest", "512Mi", 0), asks("uid-over", "4Ki", 100), asks("uid-critical", "4Ki", 2_000_000_000)]
        {
            node.api.put(pod).await;
        }
        node.start(&[]);
        let first = evicted(&node, "uid-over").await;
        let start = "The node was low on resource: memory. Threshold quantity: ";
        assert!(first.message.starts_with(start), "{}", first.message);
        assert!(
            first.message.contains("Container app was using ") && first.message.contains("request is 4Ki"),
            "{}",
            first.message
        );
        let modest = node.api.status("uid-modest").expect("known");
        assert_eq!(modest.phase, "Running", "one pod at a time, and this one keeps to its request");
        let second = evicted(&node, "uid-modest").await;
        assert!(!second.message.contains("Container app"), "{}", second.message);
        let told = || {
            let status = node.api.node_status()?;
            let short = status.conditions.iter().find(|condition| condition.r#type == "MemoryPressure")?;
            (short.status == "True").then_some(())
        };
        node.api.wait_for("MemoryPressure", told, || format!("{:?}", node.api.node_status())).await;
        assert_eq!(node.api.status("uid-critical").expect("known").phase, "Running");
        for uid in ["uid-modest", "uid-over", "uid-critical"] {
            node.api.delete(uid, 1).await;
            node.wait_finished(uid).await;
        }
        for uid in ["uid-modest", "uid-over", "uid-critical"] {
            node.wait_gone(uid).await;
        }
    });
}

#[test]
fn a_node_that_is_short_takes_only_who_it_must_and_keeps_whom_it_has() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        let sleeper = |uid: &str| scripts(uid, "Always", 0, &[("a:app", "sleep 1000")]);
        node.api.put(sleeper("uid-admit-early")).await;
        node.wait_running("uid-admit-early").await;
        let before = node.processes("uid-admit-early");
        node.end(Signal::SIGTERM);
        // Short in any case, because some of the memory is always in use. The agent looks at its start, and then not again while this
        // test lasts: nobody is evicted.
        node.flags.retain(|flag| flag != "--eviction-hard=");
        let flags = ["--eviction-hard=memory.available<100%", "--housekeeping-interval-ms=3600000"];
        node.flags.extend(flags.map(str::to_owned));
        node.start(&[]);
        let mut asks = sleeper("uid-admit-asks");
        let requests = [("memory".to_owned(), "4Ki".to_owned())].into();
        asks.spec_mut().containers[0].resources =
            Some(ResourceRequirements { requests, ..ResourceRequirements::default() });
        let mut critical = sleeper("uid-admit-critical");
        critical.spec_mut().priority = Some(2_000_000_000);
        for pod in [sleeper("uid-admit-plain"), asks, critical] {
            node.api.put(pod).await;
        }
        refused(&node, "uid-admit-plain", "MemoryPressure").await;
        for uid in ["uid-admit-asks", "uid-admit-critical"] {
            node.wait_running(uid).await;
        }
        // The disk is everybody's: who asks for memory is refused as well.
        node.end(Signal::SIGTERM);
        node.flags.push("--eviction-soft=nodefs.available<100%".to_owned());
        node.flags.push("--eviction-soft-grace-period=nodefs.available=1h".to_owned());
        node.start(&[]);
        let mut late = sleeper("uid-admit-late");
        late.spec_mut().containers[0].resources = requirements("1", "64Mi");
        node.api.put(late).await;
        refused(&node, "uid-admit-late", "MemoryPressure DiskPressure").await;
        // They were there before: an agent that starts on a node that is short takes nobody's place away.
        for uid in ["uid-admit-early", "uid-admit-asks", "uid-admit-critical"] {
            assert_eq!(node.api.status(uid).expect("known").phase, "Running", "{uid}");
        }
        assert_eq!(node.processes("uid-admit-early"), before);
        // The names are this test's alone: others of this program look for theirs among all processes.
        let all = ["uid-admit-early", "uid-admit-plain", "uid-admit-asks", "uid-admit-critical", "uid-admit-late"];
        for uid in all {
            node.api.delete(uid, 0).await;
            node.wait_finished(uid).await;
        }
        for uid in all {
            node.wait_gone(uid).await;
        }
    });
}

/// The pod was not taken: it says so as the kubelet does, and nothing of it was ever made.
async fn refused(node: &Node, uid: &str, conditions: &str) {
    let status = node.wait(uid, "the refusal", |status| status.phase == "Failed").await;
    let message = format!("Pod was rejected: The node had condition: [{conditions}]. ");
    assert_eq!((status.reason.as_str(), status.message), ("Evicted", message));
    assert!(!status.conditions.iter().any(|condition| condition.r#type == "DisruptionTarget"), "it was never here");
    node.wait_event(uid, "Evicted").await;
    assert!(!node.api.events(uid).iter().any(|reason| ["Pulled", "Created", "Started"].contains(&reason.as_str())));
    assert!(!node.run_dir().join("pods").join(uid).exists());
}

#[test]
fn thresholds_that_make_no_sense_are_refused_at_the_start() {
    for (flags, part) in [
        (&["--eviction-soft=memory.available<1Gi"][..], "--eviction-soft-grace-period: memory.available is missing"),
        (&["--eviction-hard=disk<1Gi"], "want one of memory.available"),
    ] {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_minipod-nodeagent"));
        command.arg(format!("--run-dir={}", dir.path().join("run").display()));
        command.arg(format!("--data-dir={}", dir.path().join("data").display()));
        command.arg(format!("--podshim={}", binary("minipod-podshim").display()));
        command.arg(format!("--pause={}", binary("minipod-pause").display()));
        let output = command.args(flags).output().expect("run the agent");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(part), "{text}");
    }
}
