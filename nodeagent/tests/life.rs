//! Pods' lives under a real agent, supervisor and kernel, with an API server of the test's.

mod support;

use minipod_proto::v1::server_message::Message as ToAgent;
use minipod_proto::v1::{ConfigMap, EnvVar, EnvVarSource, ObjectMeta, Secret, SecretKeySelector};
use nix::sys::signal::Signal;
use support::*;

#[test]
fn the_example_of_four_containers_restarts_only_what_was_killed() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-helloworld";
        node.api.put(example("helloworld")).await;
        let status = node.wait_running(uid).await;
        assert!(status.pod_ip.starts_with("10.231.7."), "{}", status.pod_ip);
        let log = node.wait_log(uid, "log", "compute: 2 * 2 = 4").await;
        assert!(log.contains("hello from api to request"), "{log}");
        let before = node.processes(uid);
        for (name, pid, _) in &before {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
            let own =
                status.lines().find(|line| line.starts_with("NSpid:")).and_then(|line| line.split('\t').next_back());
            assert_eq!(own, Some("1"), "{name} is PID 1 of its own");
        }
        kill_9(node.pid(uid, "main"));
        let status = node
            .wait(uid, "main running again", |status| {
                let main = container(status, "main");
                main.restart_count == 1 && running(main).is_some()
            })
            .await;
        let ended = last(container(&status, "main")).expect("last state");
        assert_eq!((ended.exit_code, ended.signal, ended.reason.as_str()), (137, 9, "Error"));
        let after = node.processes(uid);
        let others = |all: &[(String, u32, u64)]| -> Vec<(String, u32, u64)> {
            all.iter().filter(|(name, _, _)| name != "main").cloned().collect()
        };
        assert_eq!(others(&before), others(&after));
        node.api.delete(uid, 5).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn the_examples_of_one_node_run_side_by_side() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let names = ["co-scheduling", "shared-data", "init-order", "sidecar"];
        for name in names {
            node.api.put(example(name)).await;
        }
        for name in &names[..3] {
            node.wait_running(&format!("uid-{name}")).await;
        }
        node.wait_log("uid-co-scheduling", "log-collector", "app: event 2").await;
        // One network: the same MAC and address. The page written by one is served by the other.
        let writer = node.wait_log("uid-shared-data", "writer", "hello from the writer").await;
        let reader = node.log("uid-shared-data", "reader", 0);
        let has = |log: &str| log.split(" and have ").nth(1).and_then(|rest| rest.lines().next()).map(str::to_owned);
        assert_eq!(has(&writer), has(&reader), "{writer}{reader}");
        assert!(writer.contains("I am PID 1 ") && reader.contains("I am PID 1 "));
        let status = node.wait_running("uid-init-order").await;
        node.wait_log("uid-init-order", "app", "started after: first second third").await;
        let restarts = ["first", "second", "third"].map(|name| container(&status, name).restart_count);
        assert_eq!(restarts, [0, 1, 0]);
        let status = node.wait("uid-sidecar", "Succeeded", |status| status.phase == "Succeeded").await;
        assert_eq!(terminated(container(&status, "app")).map(|end| end.exit_code), Some(0));
        let collected = node.wait_log("uid-sidecar", "log-collector", "lines collected").await;
        let lines: Vec<&str> = collected.lines().collect();
        assert_eq!(
            (lines[0], lines[lines.len() - 1]),
            ("log-collector: ready before the app", "log-collector: the app ended, 5 lines collected")
        );
        assert!(lines.contains(&"app: line 5 of 5"));
        for name in names {
            node.api.delete(&format!("uid-{name}"), 5).await;
        }
        for name in names {
            node.wait_finished(&format!("uid-{name}")).await;
            node.wait_gone(&format!("uid-{name}")).await;
        }
    });
}

#[test]
fn a_container_that_keeps_failing_backs_off() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let script = "echo attempt; echo last words > /dev/termination-log; exit 3";
        node.api.put(scripts("uid-crash", "Always", 1, &[("a:bad", script), ("a:good", "sleep 1000")])).await;
        let status = node
            .wait("uid-crash", "back-off", |status| {
                let bad = container(status, "bad");
                bad.restart_count >= 2 && waiting_reason(bad) == Some("CrashLoopBackOff")
            })
            .await;
        let ended = last(container(&status, "bad")).expect("last state");
        assert_eq!((ended.exit_code, ended.message.as_str()), (3, "last words\n"));
        assert_eq!((status.phase.as_str(), container(&status, "good").restart_count), ("Running", 0));
        node.wait_event("uid-crash", "BackOff").await;
        let missing = scripts("uid-missing", "Never", 1, &[("a:x", "true")]);
        let mut missing = missing;
        missing.spec_mut().containers[0].command = vec!["/nonsense".into()];
        node.api.put(missing).await;
        let status = node.wait("uid-missing", "Failed", |status| status.phase == "Failed").await;
        let ended = terminated(container(&status, "x")).expect("terminated");
        assert_eq!((ended.exit_code, ended.reason.as_str()), (128, "StartError"));
        assert!(ended.message.contains("/nonsense") && ended.message.contains("No such file"), "{}", ended.message);
        for uid in ["uid-crash", "uid-missing"] {
            node.api.delete(uid, 1).await;
            node.wait_finished(uid).await;
            node.wait_gone(uid).await;
        }
    });
}

#[test]
fn ends_are_in_order_and_within_the_grace() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let polite = "trap 'echo app >> /v/order; exit 0' TERM; while :; do sleep 0.05; done";
        let sidecar = |name: &str| {
            format!("trap 'echo {name} >> /v/order; cat /v/order; exit 0' TERM; while :; do sleep 0.05; done")
        };
        let (one, two) = (sidecar("one"), sidecar("two"));
        node.api.put(scripts("uid-order", "Always", 20, &[("s:one", &one), ("s:two", &two), ("a:app", polite)])).await;
        let stubborn = "trap '' TERM; while :; do sleep 0.05; done";
        node.api.put(scripts("uid-stubborn", "Always", 1, &[("a:app", stubborn)])).await;
        node.wait_running("uid-order").await;
        node.wait_running("uid-stubborn").await;
        let log = node.data_dir().join("logs/default_uid-order_uid-order/one/0.log");
        let kept = node.data_dir().join("kept.log");
        std::fs::hard_link(&log, &kept).expect("keep the log beyond the pod");
        // The shells must have set their traps.
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        let began = std::time::Instant::now();
        node.api.delete("uid-order", 20).await;
        node.wait_finished("uid-order").await;
        assert!(began.elapsed().as_secs() < 10, "nobody had to be killed");
        let text = std::fs::read_to_string(&kept).expect("read");
        let order: Vec<&str> = text.lines().filter_map(|line| line.split(' ').nth(3)).collect();
        assert_eq!(order, ["app", "two", "one"], "{text}");
        std::fs::remove_file(kept).expect("remove");
        let began = std::time::Instant::now();
        node.api.delete("uid-stubborn", 1).await;
        node.wait_finished("uid-stubborn").await;
        let took = began.elapsed().as_millis();
        assert!((1900..6000).contains(&took), "killed after the minimum of two seconds, not after {took} ms");
        for uid in ["uid-order", "uid-stubborn"] {
            node.wait_gone(uid).await;
        }
    });
}

#[test]
fn the_agents_death_restarts_nothing_and_loses_nothing() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        let uid = "uid-adopt";
        let app = "trap 'exit 0' TERM; while :; do sleep 0.05; done";
        // Ends with its own code when told by a file.
        let told = "until [ -e /v/go ]; do sleep 0.02; done; exit 42";
        let pod = scripts(
            uid,
            "Never",
            5,
            &[("i:first", "echo once >> /v/init"), ("s:side", app), ("a:app", app), ("a:told", told)],
        );
        node.api.put(pod).await;
        node.wait_running(uid).await;
        let before = node.processes(uid);
        assert_eq!(node.end(Signal::SIGKILL).code(), None);
        node.start(&[]);
        let sessions = || (node.api.sessions() >= 2).then_some(());
        node.api.wait_for("a second session", sessions, || node.agent_log()).await;
        node.wait_running(uid).await;
        assert_eq!(node.processes(uid), before);
        // An orderly end too; and what ends meanwhile is told with its true code.
        assert_eq!(node.end(Signal::SIGTERM).code(), Some(0), "{}", node.agent_log());
        assert_eq!(node.processes(uid), before);
        let volume = node.data_dir().join("pods").join(uid).join("volumes/v");
        std::fs::write(volume.join("go"), b"").expect("tell it");
        let told_pid = before.iter().find(|(name, _, _)| name == "told").expect("told").1;
        let gone = || (!std::path::Path::new(&format!("/proc/{told_pid}")).exists()).then_some(());
        node.api.wait_for("its end", gone, String::new).await;
        node.start(&[]);
        let status =
            node.wait(uid, "the end of `told`", |status| terminated(container(status, "told")).is_some()).await;
        assert_eq!(terminated(container(&status, "told")).map(|end| (end.exit_code, end.signal)), Some((42, 0)));
        let left: Vec<_> = before.iter().filter(|(name, _, _)| name != "told").cloned().collect();
        assert_eq!(node.processes(uid), left);
        assert_eq!(std::fs::read_to_string(volume.join("init")).expect("read"), "once\n");
        node.api.delete(uid, 5).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn a_dead_sandbox_or_supervisor_is_made_anew() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-anew";
        let containers = [("i:first", "echo again >> /v/init"), ("a:app", "sleep 1000")];
        node.api.put(scripts(uid, "Always", 1, &containers)).await;
        let first = node.wait_running(uid).await;
        let init = node.data_dir().join("pods").join(uid).join("volumes/v/init");
        for (round, victim) in [(1, "pause"), (2, "shim")] {
            let pid = if victim == "pause" { node.pause_pid(uid) } else { node.shim_pid(uid) };
            kill_9(pid);
            let again = node
                .wait(uid, &format!("running again after the death of {victim}"), |status| {
                    let app = container(status, "app");
                    app.restart_count == round && running(app).is_some()
                })
                .await;
            assert_eq!(again.pod_ip, first.pod_ip, "the address stays");
            let ran = std::fs::read_to_string(&init).expect("read");
            assert_eq!(ran.lines().count(), round as usize + 1, "init containers run in every sandbox");
        }
        node.api.delete(uid, 1).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn how_a_container_ended_outlives_agent_and_supervisor() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        let uid = "uid-last-words";
        let app = "until [ -e /v/go ]; do sleep 0.02; done; exit 7";
        node.api.put(scripts(uid, "Never", 0, &[("a:app", app), ("a:other", "sleep 1000")])).await;
        node.wait_running(uid).await;
        node.end(Signal::SIGKILL);
        // Nobody listens when it ends, and then the one who saw it dies.
        let shim = node.shim_pid(uid);
        std::fs::write(node.data_dir().join("pods").join(uid).join("volumes/v/go"), b"").expect("tell it");
        let left = || (node.processes(uid).len() == 1).then_some(());
        node.api.wait_for("its end in the supervisor's state", left, || node.agent_log()).await;
        kill_9(shim);
        node.start(&[]);
        let status = node.wait(uid, "both ended", |status| ended("app")(status) && ended("other")(status)).await;
        let code = |name| terminated(container(&status, name)).map(|ended| ended.exit_code);
        assert_eq!((code("app"), code("other")), (Some(7), Some(137)));
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn a_forgotten_pod_goes_and_its_name_can_be_taken_again() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let of = |uid: &str| {
            let mut pod = scripts(uid, "Always", 30, &[("a:app", "trap '' TERM; sleep 1000")]);
            pod.metadata.get_or_insert_default().name = "same".to_owned();
            pod
        };
        node.api.put(of("uid-old")).await;
        node.wait_running("uid-old").await;
        node.api.forget("uid-old").await;
        node.api.put(of("uid-new")).await;
        node.wait_running("uid-new").await;
        let left = node.traces_of("uid-old");
        let left: Vec<_> = left.iter().filter(|trace| !trace.starts_with("link")).collect();
        assert!(left.is_empty(), "the old one is gone before the new one begins: {left:?}");
        node.api.delete("uid-new", 0).await;
        node.wait_finished("uid-new").await;
        node.wait_gone("uid-new").await;
    });
}

#[test]
fn an_image_that_comes_late_is_used_at_once() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let mut pod = scripts("uid-late", "Always", 1, &[("a:app", "sleep 1000")]);
        pod.spec_mut().containers[0].image = "minipod.local/late:1".to_owned();
        node.api.put(pod).await;
        let is_waiting = |status: &minipod_proto::v1::PodStatus| {
            waiting_reason(container(status, "app")) == Some("ErrImageNeverPull")
        };
        let status = node.wait("uid-late", "a reason to wait", is_waiting).await;
        let message =
            &container(&status, "app").state.as_ref().expect("state").waiting.as_ref().expect("waiting").message;
        assert!(message.contains("minictl image load"), "{message}");
        streams::load(&node, "minipod.local/late:1").await;
        node.wait_running("uid-late").await;
        node.api.delete("uid-late", 0).await;
        node.wait_finished("uid-late").await;
    });
}

fn config_map(name: &str, pairs: &[(&str, &str)]) -> ToAgent {
    let data = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let metadata = Some(ObjectMeta { name: name.into(), namespace: "default".into(), ..ObjectMeta::default() });
    ToAgent::ConfigMap(ConfigMap { metadata, data, ..ConfigMap::default() })
}

fn secret(name: &str, key: &str, value: &str) -> ToAgent {
    let data = [(key.to_owned(), value.as_bytes().to_vec().into())].into();
    let metadata = Some(ObjectMeta { name: name.into(), namespace: "default".into(), ..ObjectMeta::default() });
    ToAgent::Secret(Secret { metadata, data, ..Secret::default() })
}

const CONFIGURED: &str = "
apiVersion: v1
kind: Pod
metadata: {name: configured, labels: {app: first}}
spec:
  terminationGracePeriodSeconds: 1
  volumes:
  - {name: map, configMap: {name: settings}}
  - {name: all, projected: {defaultMode: 0440, sources: [{secret: {name: keys}}, {downwardAPI: {items: [{path: me/labels, fieldRef: {fieldPath: metadata.labels}}]}}, {configMap: {name: absent, optional: true}}]}}
  containers:
  - name: app
    image: minipod.local/busybox
    imagePullPolicy: Never
    envFrom: [{configMapRef: {name: settings}, prefix: S_}]
    env: [{name: TOKEN, valueFrom: {secretKeyRef: {name: keys, key: token}}}]
    volumeMounts: [{name: map, mountPath: /map}, {name: all, mountPath: /all}]
    command: [sh, -c]
    args:
    - |
      echo env $S_colour $TOKEN
      echo modes $(stat -Lc %a /map/colour) $(stat -Lc %a /all/token)
      touch /map/x 2>/dev/null || echo read only
      old=
      while :; do
        new=\"$(cat /map/colour) $(cat /all/token) $(cat /all/me/labels)\"
        [ \"$new\" = \"$old\" ] || echo files $new
        old=$new
        sleep 0.05
      done
";

#[test]
fn values_of_config_maps_and_secrets_reach_containers_and_follow_changes() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        let uid = "uid-configured";
        node.api.put(pod(CONFIGURED, uid)).await;
        node.wait_event(uid, "FailedMount").await;
        node.api.put_source("settings", config_map("settings", &[("colour", "red")])).await;
        node.api.put_source("keys", secret("keys", "token", "one")).await;
        node.wait_running(uid).await;
        let log = node.wait_log(uid, "app", "files red one app=\"first\"").await;
        for expected in ["env red one", "modes 644 440", "read only"] {
            assert!(log.contains(expected), "{log}");
        }
        node.api.put_source("settings", config_map("settings", &[("colour", "blue")])).await;
        node.wait_log(uid, "app", "files blue one app=\"first\"").await;
        node.api.put_source("keys", secret("keys", "token", "two")).await;
        node.wait_log(uid, "app", "files blue two app=\"first\"").await;
        let mut relabelled = pod(CONFIGURED, uid);
        relabelled.metadata.get_or_insert_default().labels = [("app".to_owned(), "second".to_owned())].into();
        node.api.put(relabelled).await;
        node.wait_log(uid, "app", "files blue two app=\"second\"").await;
        // What changes while there is no agent is there after its start; a container that ended starts with it.
        node.end(Signal::SIGKILL);
        node.api.put_source("settings", config_map("settings", &[("colour", "green")])).await;
        node.start(&[]);
        node.wait_log(uid, "app", "files green two app=\"second\"").await;
        kill_9(node.pid(uid, "app"));
        node.wait(uid, "app running again", |status| {
            let app = container(status, "app");
            app.restart_count == 1 && running(app).is_some()
        })
        .await;
        let again = || node.log(uid, "app", 1).contains("env green two").then_some(());
        node.api.wait_for("the new value in the environment", again, || node.log(uid, "app", 1)).await;
        node.api.delete(uid, 1).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn a_container_waits_for_the_values_of_its_environment() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-waits";
        let mut waits = scripts(uid, "Never", 1, &[("a:app", "echo got $PASS")]);
        let source = SecretKeySelector { name: "late".into(), key: "pass".into(), optional: None };
        let value_from = Some(EnvVarSource { secret_key_ref: Some(source), ..EnvVarSource::default() });
        waits.spec_mut().containers[0].env = vec![EnvVar { name: "PASS".into(), value_from, ..EnvVar::default() }];
        node.api.put(waits).await;
        let is_waiting = |status: &minipod_proto::v1::PodStatus| {
            waiting_reason(container(status, "app")) == Some("CreateContainerConfigError")
        };
        let status = node.wait(uid, "a reason to wait", is_waiting).await;
        let state = container(&status, "app").state.clone().expect("state");
        assert_eq!(state.waiting.expect("waiting").message, "secret \"late\" not found");
        node.api.put_source("late", secret("late", "pass", "geheim")).await;
        node.wait(uid, "Succeeded", |status| status.phase == "Succeeded").await;
        node.wait_log(uid, "app", "got geheim").await;
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

mod streams {
    use minipod_proto::v1::open_stream::Request;
    use minipod_proto::v1::tunnel_frame::Frame;
    use minipod_proto::v1::{ImageLoadStart, TunnelEnd};

    use super::support::*;

    /// Loads busybox through a tunnel, under a name.
    pub async fn load(node: &Node, name: &str) {
        let start = ImageLoadStart { name: name.to_owned(), ..ImageLoadStart::default() };
        let mut tunnel = node.api.open("", Request::ImageLoad(start)).await;
        for chunk in std::fs::read(&images()[0]).expect("the image").chunks(64 << 10) {
            tunnel.send(Frame::Data(chunk.to_vec().into())).await;
        }
        tunnel.send(Frame::End(TunnelEnd::default())).await;
        match tunnel.next().await {
            Some(Frame::ImageLoaded(loaded)) => assert!(loaded.images[0].names.contains(&name.to_owned())),
            other => panic!("{other:?}"),
        }
    }
}

/// After a power cut: what a run had written is on the disk, and the API server has never heard of the run.
#[test]
fn a_run_begins_with_its_image_alone_whatever_an_unknown_one_has_left() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-unheard-of";
        let left = node.data_dir().join("pods").join(uid);
        for (file, dir) in [("mark", "containers/app/0/upper"), ("kept", "volumes/v")] {
            std::fs::create_dir_all(left.join(dir)).expect("made");
            std::fs::write(left.join(dir).join(file), "x").expect("written");
        }
        node.api.put(scripts(uid, "Never", 0, &[("a:app", "ls -d /mark /v/kept 2>&1; echo end")])).await;
        let log = node.wait_log(uid, "app", "end\n").await;
        // A volume lives as long as its pod, and that has not ended.
        assert_eq!(log, "ls: /mark: No such file or directory\n/v/kept\nend\n");
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}
