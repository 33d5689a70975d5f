//! Pods that are changed, or run out of time, while they live.

mod support;

use minipod_proto::v1::{LogsRequest, Pod, PodStatus};
use nix::sys::signal::Signal;
use support::*;

const OTHER_IMAGE: &str = "minipod.local/toolbox";

/// The pod with another image in its `index`th container of the list.
fn with_image(pod: &Pod, init: bool, image: &str) -> Pod {
    let mut pod = pod.clone();
    pod.metadata.get_or_insert_default().generation += 1;
    let spec = pod.spec_mut();
    let list = if init { &mut spec.init_containers } else { &mut spec.containers };
    list[0].image = image.to_owned();
    pod
}

/// The first line of the newest run's log tells which image it has: the libraries are in one of them alone.
const WHICH: &str = "[ -e /lib64 ] && echo toolbox || echo busybox; echo is up; exec sleep 1000";

#[test]
fn another_image_starts_containers_anew_whatever_their_policy() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-new-image";
        let pod = scripts(uid, "Never", 0, &[("s:side", WHICH), ("a:app", WHICH), ("a:other", WHICH)]);
        node.api.put(pod.clone()).await;
        node.wait_running(uid).await;
        assert!(node.wait_log(uid, "app", "is up").await.contains("busybox"));
        let other = node.pid(uid, "other");

        let pod = with_image(&pod, false, OTHER_IMAGE);
        node.api.put(pod.clone()).await;
        let again = |name: &'static str| {
            move |status: &PodStatus| {
                let one = container(status, name);
                one.restart_count == 1 && running(one).is_some() && one.image == OTHER_IMAGE
            }
        };
        let status = node.wait(uid, "the app from its new image", again("app")).await;
        assert_eq!(status.phase, "Running");
        assert!(last(container(&status, "app")).is_some_and(|last| last.reason == "Error"), "{status:#?}");
        node.wait_event(uid, "Killing").await;
        let log = || Some(node.log(uid, "app", 1)).filter(|log| log.contains("is up"));
        let log = node.api.wait_for("the second run's log", log, || node.agent_log()).await;
        assert!(log.contains("toolbox"), "{log}");

        node.api.put(with_image(&pod, true, OTHER_IMAGE)).await;
        node.wait(uid, "the sidecar from its new image", again("side")).await;
        assert_eq!(node.pid(uid, "other"), other, "the others go on");
        assert_eq!(container(&node.api.status(uid).expect("status"), "app").restart_count, 1);

        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn an_image_that_changed_while_no_agent_was_there_is_noticed() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        let uid = "uid-unseen-change";
        let pod = scripts(uid, "Always", 0, &[("a:app", WHICH)]);
        node.api.put(pod.clone()).await;
        node.wait_running(uid).await;
        node.end(Signal::SIGKILL);
        node.api.put(with_image(&pod, false, OTHER_IMAGE)).await;
        node.start(&[]);
        node.wait(uid, "a restart", |status| {
            let app = container(status, "app");
            app.restart_count == 1 && running(app).is_some() && app.image == OTHER_IMAGE
        })
        .await;
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn a_pod_that_is_corrected_starts_from_its_new_image() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-corrected";
        let right = scripts(uid, "Never", 0, &[("i:first", "true"), ("a:app", WHICH)]);
        node.api.put(with_image(&right, true, "minipod.local/not-there")).await;
        let stuck = |status: &PodStatus| waiting_reason(container(status, "first")) == Some("ErrImageNeverPull");
        node.wait(uid, "the image that is not there", stuck).await;
        node.api.put(with_image(&right, true, OTHER_IMAGE)).await;
        let status = node.wait_running(uid).await;
        let first = container(&status, "first");
        assert_eq!((first.restart_count, first.image.as_str()), (0, OTHER_IMAGE));
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn back_off_goes_on_where_it_was_when_the_agent_starts_again() {
    on_a_node(|| async {
        let mut node = Node::new().await;
        // That of a real node.
        node.flags.retain(|flag| !flag.starts_with("--max-restart-backoff-ms"));
        node.start(&[]);
        let uid = "uid-back-off";
        node.api.put(scripts(uid, "Always", 0, &[("a:app", "echo run; exit 3")])).await;
        let waits = |restarts: i32, delay: &'static str| {
            move |status: &PodStatus| {
                let app = container(status, "app");
                let waiting = app.state.as_ref().and_then(|state| state.waiting.as_ref());
                app.restart_count == restarts && waiting.is_some_and(|waiting| waiting.message.contains(delay))
            }
        };
        node.wait(uid, "a first wait", waits(1, "back-off 10s")).await;
        // The run that has just ended is the last one, and its log both the newest and the previous.
        for previous in [false, true] {
            let request = LogsRequest { previous, ..LogsRequest::default() };
            assert_eq!(node.api.logs(uid, request).await, ("run\n".to_owned(), String::new()), "previous {previous}");
        }
        node.end(Signal::SIGKILL);
        node.start(&[]);
        node.wait(uid, "a second wait, twice as long", waits(2, "back-off 20s")).await;
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn an_active_deadline_holds_across_agents() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        let in_time = |uid: &str, seconds| {
            let mut pod = scripts(uid, "Always", 1, &[("s:side", "exec sleep 1000"), ("a:app", "exec sleep 1000")]);
            pod.metadata.get_or_insert_default().generation = 7;
            pod.spec_mut().active_deadline_seconds = Some(seconds);
            pod
        };
        let uids = ["uid-deadline", "uid-passed-unseen"];
        for (uid, seconds) in uids.iter().zip([6, 2]) {
            node.api.put(in_time(uid, seconds)).await;
            node.wait_running(uid).await;
        }
        node.end(Signal::SIGKILL);
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        node.start(&[]);
        for uid in uids {
            let failed = |status: &PodStatus| status.phase == "Failed";
            let status = node.wait(uid, "the deadline", failed).await;
            assert_eq!(status.reason, "DeadlineExceeded");
            assert_eq!(status.observed_generation, 7);
            assert!(status.conditions.iter().all(|condition| condition.observed_generation == 7), "{status:#?}");
            for name in ["side", "app"] {
                assert_ne!(terminated(container(&status, name)).expect("ended").exit_code, 0, "{name}");
            }
            node.api.delete(uid, 0).await;
            node.wait_finished(uid).await;
            node.wait_gone(uid).await;
        }
    });
}

#[test]
fn apps_with_policies_of_their_own_get_a_new_sandbox() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-own-policy";
        let mut pod = scripts(uid, "Never", 0, &[("a:once", "exec sleep 1000"), ("a:always", "exec sleep 1000")]);
        pod.spec_mut().containers[1].restart_policy = "Always".to_owned();
        node.api.put(pod).await;
        node.wait_running(uid).await;
        kill_9(node.pause_pid(uid));
        let status = node
            .wait(uid, "the one that restarts", |status| {
                let always = container(status, "always");
                always.restart_count == 1 && running(always).is_some()
            })
            .await;
        assert_eq!(status.phase, "Running");
        assert_eq!(terminated(container(&status, "once")).expect("ended for good").exit_code, 137);
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}
