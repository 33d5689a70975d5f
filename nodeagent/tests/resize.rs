//! CPU and memory of a pod that runs: the kernel's limits follow the spec, with a restart only where the manifest asks for one.

mod support;

use minipod_proto::resize::IN_PROGRESS;
use minipod_proto::v1::PodStatus;
use nix::sys::signal::Signal;
use support::*;

fn in_progress(status: &PodStatus) -> Option<(&str, &str)> {
    let condition = status.conditions.iter().find(|condition| condition.r#type == IN_PROGRESS)?;
    Some((&condition.reason, &condition.message))
}

#[test]
fn limits_change_in_place_and_back() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        let uid = "uid-grow";
        let mut pod = scripts(uid, "Always", 1, &[("a:app", "sleep 1000"), ("a:other", "sleep 1000")]);
        pod.spec_mut().containers[0].resources = requirements("200m", "64Mi");
        pod.spec_mut().containers[1].resources = requirements("100m", "16Mi");
        node.api.put(pod.clone()).await;
        node.wait_running(uid).await;
        let before = node.processes(uid);
        let pid = node.pid(uid, "app");
        assert_eq!(limits_of(pid), (20_000, 64 << 20));

        let bigger = resized(&pod, requirements("500m", "128Mi"));
        node.api.put(bigger.clone()).await;
        let wanted = requirements("500m", "128Mi");
        node.wait(uid, "more", |status| in_force(status, "app") == wanted && in_progress(status).is_none()).await;
        assert_eq!(limits_of(pid), (50_000, 128 << 20));
        assert_eq!(node.processes(uid), before, "nothing was started again");
        for reason in ["ResizeStarted", "ResizeCompleted"] {
            node.wait_event(uid, reason).await;
        }

        // An agent that comes anew goes on with what is in force.
        node.end(Signal::SIGKILL);
        node.start(&[]);
        let smaller = resized(&bigger, requirements("100m", "32Mi"));
        let sessions = || (node.api.sessions() >= 2).then_some(());
        node.api.wait_for("a second session", sessions, || node.agent_log()).await;
        node.api.put(smaller.clone()).await;
        let wanted = requirements("100m", "32Mi");
        node.wait(uid, "less", |status| in_force(status, "app") == wanted && in_progress(status).is_none()).await;
        assert_eq!(limits_of(pid), (10_000, 32 << 20));
        assert_eq!(node.processes(uid), before);
        node.api.delete(uid, 1).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn a_limit_below_what_is_in_use_waits_and_kills_nothing() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-inuse";
        // The volume is memory, and its pages are the container's. In large pieces and with a whole processor: a tenth of an emulated one
        // takes minutes to fill it by the kilobyte.
        let app = "dd if=/dev/zero of=/m/held bs=1M count=40; echo held; until [ -e /v/go ]; do sleep 0.05; done; rm /m/held; sleep 1000";
        let mut pod = scripts(uid, "Always", 1, &[("a:app", app)]);
        let volume = minipod_proto::v1::EmptyDirVolumeSource { medium: "Memory".into(), ..Default::default() };
        let volume = minipod_proto::v1::Volume {
            name: "m".into(),
            empty_dir: Some(volume),
            ..minipod_proto::v1::Volume::default()
        };
        let mount = minipod_proto::v1::VolumeMount { name: "m".into(), mount_path: "/m".into(), ..Default::default() };
        pod.spec_mut().volumes.push(volume);
        pod.spec_mut().containers[0].volume_mounts.push(mount);
        pod.spec_mut().containers[0].resources = requirements("1", "96Mi");
        node.api.put(pod.clone()).await;
        node.wait_running(uid).await;
        node.wait_log(uid, "app", "held").await;
        let (before, pid) = (node.processes(uid), node.pid(uid, "app"));
        node.api.put(resized(&pod, requirements("2", "20Mi"))).await;
        let status = node
            .wait(uid, "a change that cannot be carried out", |status| {
                in_progress(status).is_some_and(|(reason, _)| reason == "Error")
            })
            .await;
        let (_, message) = in_progress(&status).expect("told");
        assert!(message.contains("below its current usage"), "{message}");
        assert_eq!(limits_of(pid), (100_000, 96 << 20), "all of it or nothing");
        assert_eq!((in_force(&status, "app"), node.processes(uid)), (requirements("1", "96Mi"), before.clone()));
        std::fs::write(node.data_dir().join("pods").join(uid).join("volumes/v/go"), b"").expect("tell it");
        let wanted = requirements("2", "20Mi");
        node.wait(uid, "less", |status| in_force(status, "app") == wanted && in_progress(status).is_none()).await;
        assert_eq!((limits_of(pid), node.processes(uid)), ((200_000, 20 << 20), before));
        node.api.delete(uid, 1).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

/// How soon the kernel kills it when memory is short.
fn oom_score_adj(pid: u32) -> i32 {
    let path = format!("/proc/{pid}/oom_score_adj");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.trim().parse().expect("a number")
}

/// As runc, which Kubernetes leaves it to: of what runs nobody knows which process has another score for a reason of its own.
#[test]
fn what_runs_keeps_its_oom_score_and_what_starts_gets_the_new_one() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-score";
        let mut pod = scripts(uid, "Always", 0, &[("a:app", "sleep 1000")]);
        // More wished for than needed: the score goes by the share of the node's memory.
        let total = minipod_nodeagent::node::memory().0;
        let burstable = |tenths: u64| {
            let mut resources = requirements("100m", "8Gi").expect("some");
            resources.limits.clear();
            resources.requests.insert("memory".into(), (total / 10 * tenths).to_string());
            Some(resources)
        };
        pod.spec_mut().containers[0].resources = burstable(1);
        node.api.put(pod.clone()).await;
        node.wait_running(uid).await;
        let pid = node.pid(uid, "app");
        // One below the round number where the division leaves a rest.
        assert!((900..=901).contains(&oom_score_adj(pid)), "{}", oom_score_adj(pid));
        node.api.put(resized(&pod, burstable(4))).await;
        let wanted = burstable(4);
        node.wait(uid, "more", |status| in_force(status, "app") == wanted && in_progress(status).is_none()).await;
        assert_eq!(node.pid(uid, "app"), pid);
        assert!((900..=901).contains(&oom_score_adj(pid)), "{}", oom_score_adj(pid));
        kill_9(pid);
        let again = |status: &PodStatus| {
            let app = container(status, "app");
            app.restart_count == 1 && running(app).is_some()
        };
        node.wait(uid, "a new run", again).await;
        let score = oom_score_adj(node.pid(uid, "app"));
        assert!((600..=601).contains(&score), "{score}");
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn a_container_that_wants_a_restart_for_it_gets_one() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-again";
        // Ends with 0, after which its policy alone would not start it again.
        let app = "trap 'exit 0' TERM; while :; do sleep 0.05; done";
        let mut pod = scripts(uid, "OnFailure", 5, &[("a:app", app), ("a:other", "sleep 1000")]);
        let policy = |name: &str, restart: &str| minipod_proto::v1::ContainerResizePolicy {
            resource_name: name.into(),
            restart_policy: restart.into(),
        };
        let one = &mut pod.spec_mut().containers[0];
        one.resources = requirements("100m", "32Mi");
        one.resize_policy = vec![policy("cpu", "NotRequired"), policy("memory", "RestartContainer")];
        pod.spec_mut().containers[1].resources = requirements("100m", "16Mi");
        node.api.put(pod.clone()).await;
        node.wait_running(uid).await;
        let (before, pid) = (node.processes(uid), node.pid(uid, "app"));
        // The shell must have set its trap.
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        let faster = resized(&pod, requirements("200m", "32Mi"));
        node.api.put(faster.clone()).await;
        let wanted = requirements("200m", "32Mi");
        node.wait(uid, "more CPU", |status| in_force(status, "app") == wanted).await;
        assert_eq!((limits_of(pid), node.processes(uid)), ((20_000, 32 << 20), before.clone()));

        node.api.put(resized(&faster, requirements("200m", "64Mi"))).await;
        let wanted = requirements("200m", "64Mi");
        let status = node
            .wait(uid, "more memory, after a restart", |status| {
                let app = container(status, "app");
                app.restart_count == 1 && running(app).is_some() && in_force(status, "app") == wanted
            })
            .await;
        assert_eq!(last(container(&status, "app")).map(|end| end.exit_code), Some(0));
        assert_eq!((container(&status, "other").restart_count, in_progress(&status)), (0, None));
        assert_eq!(limits_of(node.pid(uid, "app")), (20_000, 64 << 20));
        node.api.delete(uid, 1).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn exit_codes_decide_by_the_restart_rules() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-rules";
        let count = |then: &str| format!("echo x >> /v/$0; n=$(wc -l < /v/$0); {then}");
        let (again, done) = (count("[ $n -lt 3 ] && exit 42; exit 7"), count("exit 42"));
        let mut pod = scripts(
            uid,
            "Never",
            1,
            &[("i:first", &count("[ $n -lt 2 ] && exit 5; exit 0")), ("a:again", &again), ("a:done", &done)],
        );
        let rule = |operator: &str, code: i32| minipod_proto::v1::ContainerRestartRule {
            action: "Restart".into(),
            exit_codes: Some(minipod_proto::v1::ContainerRestartRuleOnExitCodes {
                operator: operator.into(),
                values: vec![code],
            }),
        };
        let spec = pod.spec_mut();
        for one in spec.init_containers.iter_mut().chain(&mut spec.containers) {
            // `sh -c SCRIPT NAME`
            one.args.push(one.name.clone());
            one.restart_policy = "Never".into();
        }
        spec.init_containers[0].restart_policy_rules = vec![rule("In", 5)];
        spec.containers[0].restart_policy_rules = vec![rule("In", 42)];
        spec.containers[1].restart_policy_rules = vec![rule("NotIn", 42)];
        node.api.put(pod).await;
        let status = node.wait(uid, "its end", |status| status.phase == "Failed").await;
        let told = |name: &str| {
            let one = container(&status, name);
            (one.restart_count, terminated(one).map(|end| end.exit_code))
        };
        assert_eq!((told("first"), told("again"), told("done")), ((1, Some(0)), (2, Some(7)), (0, Some(42))));
        node.api.delete(uid, 1).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}
