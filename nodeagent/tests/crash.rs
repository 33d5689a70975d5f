//! The agent dies at every failpoint, once while a pod is made and once while it is removed; the pod runs once and goes completely.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use minipod_nodeagent::failpoints::FAILPOINTS;
use minipod_proto::v1::{ExecAction, Lifecycle, LifecycleHandler, PodStatus};
use nix::sys::signal::Signal;
use support::*;

/// The agent with failpoints, built beside the other binaries.
fn agent_with_failpoints() -> PathBuf {
    let name = "minipod-nodeagent-failpoints";
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let built = Command::new(env!("CARGO"))
        // Of the whole workspace, so that its dependencies are those that are built already.
        .args(["build", "--quiet", "--workspace", "--features", "minipod-nodeagent/failpoints", "--bin", name])
        .current_dir(root)
        .status();
    assert!(built.expect("run cargo").success(), "cargo build of {name} failed");
    Path::new(env!("CARGO_BIN_EXE_minipod-nodeagent")).with_file_name(name)
}

fn runs(status: &PodStatus) -> bool {
    status.phase == "Running" && status.container_statuses.iter().all(|container| running(container).is_some())
}

/// How the pod of one failpoint goes: `phase` is what happens when the agent is to die.
async fn die_at(node: &mut Node, name: &str, uid: &str, deletion: bool) -> bool {
    let armed = format!("{name}=return");
    let once = [
        ("i:first", "echo first >> /v/ran"),
        ("s:side", "echo side >> /v/ran; sleep 1000"),
        ("a:app", "echo app >> /v/ran; sleep 1000"),
    ];
    let armed = [("FAILPOINTS", armed.as_str())];
    node.start(if deletion { &[] } else { &armed });
    node.api.put(scripts(uid, "Always", 0, &once)).await;
    let mut died = false;
    if !deletion {
        died = wait_until_it_dies_or(node, |node| node.api.status(uid).is_some_and(|status| runs(&status))).await;
        if died {
            node.start(&[]);
        }
    }
    node.wait(uid, &format!("running with {name}"), runs).await;
    let ran = node.data_dir().join("pods").join(uid).join("volumes/v/ran");
    let all = || Some(std::fs::read_to_string(&ran).unwrap_or_default()).filter(|text| text.lines().count() >= 3);
    let ran = node.api.wait_for("all three", all, || node.agent_log()).await;
    assert_eq!(ran, "first\nside\napp\n", "everything ran once, in order ({name})");
    if deletion {
        node.end(Signal::SIGKILL);
        node.start(&armed);
    }
    node.api.delete(uid, 0).await;
    if deletion {
        died = wait_until_it_dies_or(node, |node| node.api.is_finished(uid)).await;
        if died {
            node.start(&[]);
        }
    }
    node.wait_finished(uid).await;
    node.wait_gone(uid).await;
    node.end(Signal::SIGKILL);
    died
}

async fn wait_until_it_dies_or(node: &mut Node, done: impl Fn(&Node) -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if node.has_died() {
            return true;
        }
        if done(node) {
            return false;
        }
        assert!(Instant::now() < deadline, "neither died nor done\n{}", node.agent_log());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Failpoints of the two halves of a pod's life. `clean-up-shim` is only reached when the supervisor died: its own test.
/// Hooks and resizes have their own tests too. `remove-pod-data` is a step of pods that ended by themselves; its inner point lies on the way of every removal.
fn names(deletion: bool) -> Vec<&'static str> {
    let is_end = |name: &&str| {
        ["kill-container", "stop-sandbox", "detach-network", "remove-pod-dir", "remove-pod-data:"]
            .iter()
            .any(|part| name.contains(part))
    };
    let own = |name: &&str| {
        ["clean-up-shim", "post-start", "pre-stop", "resize"].iter().any(|part| name.contains(part))
            || name.ends_with(":remove-pod-data")
    };
    FAILPOINTS.iter().copied().filter(|name| !own(name) && is_end(name) == deletion).collect()
}

#[test]
fn an_agent_that_dies_in_a_pods_creation_goes_on_where_it_was() {
    let program = agent_with_failpoints();
    on_a_node(move || async move {
        let mut node = Node::new().await;
        node.program = program;
        let names = names(false);
        assert!(names.len() >= 18, "{names:?}");
        for (number, name) in names.iter().enumerate() {
            assert!(die_at(&mut node, name, &format!("uid-create-{number}x"), false).await, "{name} was never reached");
        }
    });
}

#[test]
fn an_agent_that_dies_in_a_pods_removal_goes_on_where_it_was() {
    let program = agent_with_failpoints();
    on_a_node(move || async move {
        let mut node = Node::new().await;
        node.program = program;
        let names = names(true);
        assert!(names.len() >= 10, "{names:?}");
        for (number, name) in names.iter().enumerate() {
            assert!(die_at(&mut node, name, &format!("uid-remove-{number}x"), true).await, "{name} was never reached");
        }
    });
}

#[test]
fn an_agent_that_dies_while_it_cleans_up_goes_on_where_it_was() {
    let program = agent_with_failpoints();
    on_a_node(move || async move {
        let mut node = Node::new().await;
        node.program = program;
        for (number, name) in ["before:clean-up-shim", "after:clean-up-shim"].into_iter().enumerate() {
            let uid = format!("uid-clean-{number}x");
            let armed = format!("{name}=return");
            node.start(&[("FAILPOINTS", armed.as_str())]);
            node.api.put(scripts(&uid, "Always", 0, &[("a:app", "sleep 1000")])).await;
            node.wait(&uid, "running", runs).await;
            kill_9(node.shim_pid(&uid));
            assert!(wait_until_it_dies_or(&mut node, |_| false).await);
            node.start(&[]);
            let again = |status: &PodStatus| runs(status) && container(status, "app").restart_count == 1;
            node.wait(&uid, &format!("running again after {name}"), again).await;
            node.api.delete(&uid, 0).await;
            node.wait_finished(&uid).await;
            node.wait_gone(&uid).await;
            node.end(Signal::SIGKILL);
        }
        for (number, name) in ["before:remove-pod-data", "after:remove-pod-data"].into_iter().enumerate() {
            let uid = format!("uid-done-{number}x");
            let armed = format!("{name}=return");
            node.start(&[("FAILPOINTS", armed.as_str())]);
            node.api.put(scripts(&uid, "Never", 0, &[("a:app", "exit 0")])).await;
            assert!(wait_until_it_dies_or(&mut node, |_| false).await);
            node.start(&[]);
            node.wait(&uid, "Succeeded", |status| status.phase == "Succeeded").await;
            node.api.delete(&uid, 0).await;
            node.wait_finished(&uid).await;
            node.wait_gone(&uid).await;
            node.end(Signal::SIGKILL);
        }
    });
}

#[test]
fn an_agent_that_dies_at_a_hook_runs_it_again_and_restarts_nothing() {
    let program = agent_with_failpoints();
    on_a_node(move || async move {
        let mut node = Node::new().await;
        node.program = program;
        let kept = node.data_dir().join("hooks.log");
        for (number, name) in
            ["before:post-start", "after:post-start", "before:pre-stop", "after:pre-stop"].iter().enumerate()
        {
            let uid = format!("uid-hook-{number}x");
            let armed = format!("{name}=return");
            node.start(&[("FAILPOINTS", armed.as_str())]);
            let app = "trap 'cat /v/hooks; exit 0' TERM; while :; do sleep 0.05; done";
            let mut pod = scripts(&uid, "Always", 20, &[("a:app", app)]);
            let hook = |word: &str| {
                let command = vec!["sh".into(), "-c".into(), format!("echo {word} >> /v/hooks")];
                Some(LifecycleHandler { exec: Some(ExecAction { command }), ..LifecycleHandler::default() })
            };
            let (post_start, pre_stop) = (hook("post"), hook("pre"));
            let lifecycle = Lifecycle { post_start, pre_stop, ..Lifecycle::default() };
            pod.spec_mut().containers[0].lifecycle = Some(Box::new(lifecycle));
            node.api.put(pod).await;
            let started = |status: &PodStatus| {
                status.container_statuses.iter().all(|app| app.started == Some(true)) && runs(status)
            };
            if name.ends_with("post-start") {
                assert!(wait_until_it_dies_or(&mut node, |_| false).await);
                node.start(&[]);
            }
            let status = node.wait(&uid, &format!("started with {name}"), started).await;
            assert_eq!(container(&status, "app").restart_count, 0);
            std::fs::hard_link(node.data_dir().join(format!("logs/default_{uid}_{uid}/app/0.log")), &kept)
                .expect("keep");
            node.api.delete(&uid, 20).await;
            if name.ends_with("pre-stop") {
                assert!(wait_until_it_dies_or(&mut node, |_| false).await);
                node.start(&[]);
            }
            node.wait_finished(&uid).await;
            node.wait_gone(&uid).await;
            node.end(Signal::SIGKILL);
            let text = std::fs::read_to_string(&kept).expect("read");
            let mut words: Vec<&str> = text.lines().filter_map(|line| line.split(' ').nth(3)).collect();
            words.dedup();
            assert_eq!(words, ["post", "pre"], "each at least once and in order ({name}): {text}");
            std::fs::remove_file(&kept).expect("remove");
        }
    });
}

#[test]
fn an_agent_that_dies_at_a_resize_resizes_and_restarts_nothing() {
    let program = agent_with_failpoints();
    on_a_node(move || async move {
        let mut node = Node::new().await;
        node.program = program;
        for (number, name) in ["before:resize", "after:resize"].iter().enumerate() {
            let uid = format!("uid-resize-{number}x");
            let armed = format!("{name}=return");
            node.start(&[("FAILPOINTS", armed.as_str())]);
            let mut pod = scripts(&uid, "Always", 0, &[("a:app", "sleep 1000")]);
            pod.spec_mut().containers[0].resources = requirements("100m", "32Mi");
            node.api.put(pod.clone()).await;
            node.wait(&uid, &format!("running with {name}"), runs).await;
            let before = node.pid(&uid, "app");
            let wanted = requirements("200m", "64Mi");
            node.api.put(resized(&pod, wanted.clone())).await;
            assert!(wait_until_it_dies_or(&mut node, |_| false).await);
            node.start(&[]);
            let done = |status: &PodStatus| in_force(status, "app") == wanted;
            let status = node.wait(&uid, &format!("resized after {name}"), done).await;
            assert_eq!((container(&status, "app").restart_count, node.pid(&uid, "app")), (0, before));
            node.api.delete(&uid, 0).await;
            node.wait_finished(&uid).await;
            node.wait_gone(&uid).await;
            node.end(Signal::SIGKILL);
        }
    });
}
