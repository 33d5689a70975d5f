//! Probes and hooks under a real agent, supervisor and kernel.

mod support;

use minipod_proto::v1::{
    ExecAction, GrpcAction, HttpGetAction, HttpHeader, Lifecycle, LifecycleHandler, Pod, PodStatus, Probe, SleepAction,
    TcpSocketAction,
};
use nix::sys::signal::Signal;
use support::*;

fn every_second(probe: Probe) -> Box<Probe> {
    Box::new(Probe { period_seconds: 1, timeout_seconds: 1, success_threshold: 1, failure_threshold: 2, ..probe })
}

fn exec(script: &str) -> Option<ExecAction> {
    Some(ExecAction { command: vec!["sh".into(), "-c".into(), script.into()] })
}

fn exec_probe(script: &str) -> Option<Box<Probe>> {
    Some(every_second(Probe { exec: exec(script), ..Probe::default() }))
}

fn http_probe(path: &str) -> Option<Box<Probe>> {
    let header = HttpHeader { name: "X-Test".into(), value: "1".into() };
    let http_get = HttpGetAction {
        path: path.into(),
        port: Some(8080.into()),
        http_headers: vec![header],
        ..HttpGetAction::default()
    };
    Some(every_second(Probe { http_get: Some(http_get), ..Probe::default() }))
}

fn hook(script: &str) -> Option<LifecycleHandler> {
    Some(LifecycleHandler { exec: exec(script), ..LifecycleHandler::default() })
}

fn pod(uid: &str, change: impl FnOnce(&mut Pod), containers: &[(&str, &str)]) -> Pod {
    let mut pod = scripts(uid, "Always", 5, containers);
    change(&mut pod);
    pod
}

fn is_ready(status: &PodStatus) -> bool {
    status.conditions.iter().any(|condition| condition.r#type == "Ready" && condition.status == "True")
}

async fn remove(node: &Node, uids: &[&str]) {
    for uid in uids {
        node.api.delete(uid, 1).await;
    }
    for uid in uids {
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    }
}

const LIVE: &str = "trap 'exit 0' TERM; touch /v/up; while :; do sleep 0.05; done";

#[test]
fn liveness_restarts_and_readiness_tells() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        let set = |pod: &mut Pod| {
            let container = &mut pod.spec_mut().containers[0];
            container.liveness_probe = exec_probe("test ! -e /v/sick");
            container.readiness_probe = http_probe("/ready");
        };
        let web = "rm -f /v/sick; httpd -f -p 8080 -h /v";
        node.api.put(pod("uid-live", set, &[("a:web", web)])).await;
        let status = node.wait_running("uid-live").await;
        assert!(!is_ready(&status), "not before its first good answer");
        let volume = node.data_dir().join("pods/uid-live/volumes/v");
        std::fs::write(volume.join("ready"), b"yes").expect("write");
        node.wait("uid-live", "ready", is_ready).await;
        // The agent's death changes nothing.
        let before = node.processes("uid-live");
        node.end(Signal::SIGKILL);
        node.start(&[]);
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        assert_eq!(node.processes("uid-live"), before);
        node.wait("uid-live", "still ready", is_ready).await;
        std::fs::remove_file(volume.join("ready")).expect("remove");
        let status = node.wait("uid-live", "not ready", |status| !is_ready(status)).await;
        assert_eq!(container(&status, "web").restart_count, 0);
        std::fs::write(volume.join("sick"), b"").expect("write");
        node.wait("uid-live", "a restart", |status| container(status, "web").restart_count >= 1).await;
        for reason in ["Unhealthy", "Killing"] {
            node.wait_event("uid-live", reason).await;
        }
        remove(&node, &["uid-live"]).await;
    });
}

#[test]
fn tcp_and_grpc_and_an_exec_that_hangs() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let tcp = |port: i32| {
            let action = TcpSocketAction { port: Some(port.into()), ..TcpSocketAction::default() };
            Some(every_second(Probe { tcp_socket: Some(action), ..Probe::default() }))
        };
        let web = |port: i32| move |pod: &mut Pod| pod.spec_mut().containers[0].readiness_probe = tcp(port);
        node.api.put(pod("uid-open", web(8080), &[("a:web", "httpd -f -p 8080 -h /v")])).await;
        node.api.put(pod("uid-shut", web(8081), &[("a:web", "httpd -f -p 8080 -h /v")])).await;
        let hangs = |pod: &mut Pod| pod.spec_mut().containers[0].liveness_probe = exec_probe("sleep 100");
        node.api.put(pod("uid-hangs", hangs, &[("a:app", LIVE)])).await;
        let missing = |pod: &mut Pod| {
            let exec = Some(ExecAction { command: vec!["/not/there".to_owned()] });
            let probe = Probe { exec, ..Probe::default() };
            pod.spec_mut().containers[0].liveness_probe = Some(every_second(probe));
        };
        node.api.put(pod("uid-missing", missing, &[("a:app", LIVE)])).await;
        let (reporter, service) = tonic_health::server::health_reporter();
        reporter.set_service_status("web", tonic_health::ServingStatus::Serving).await;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let port = i32::from(listener.local_addr().expect("address").port());
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        let grpc = |name: &'static str| {
            move |pod: &mut Pod| {
                pod.spec_mut().host_network = true;
                let action = GrpcAction { port, service: Some(name.into()) };
                let probe = every_second(Probe { grpc: Some(action), ..Probe::default() });
                pod.spec_mut().containers[0].readiness_probe = Some(probe);
            }
        };
        node.api.put(pod("uid-serving", grpc("web"), &[("a:app", LIVE)])).await;
        node.api.put(pod("uid-unknown", grpc("other"), &[("a:app", LIVE)])).await;
        node.wait("uid-open", "ready", is_ready).await;
        node.wait("uid-serving", "ready", is_ready).await;
        node.wait("uid-hangs", "a restart", |status| container(status, "app").restart_count >= 1).await;
        // What cannot be asked says nothing: more such probes than the threshold has, and it lives.
        let errors = || node.api.events("uid-missing").iter().filter(|reason| *reason == "Unhealthy").count();
        node.api.wait_for("probes that err", || (errors() > 3).then_some(()), || node.agent_log()).await;
        assert_eq!(container(&node.wait_running("uid-missing").await, "app").restart_count, 0);
        for uid in ["uid-shut", "uid-unknown"] {
            let status = node.wait_running(uid).await;
            assert!(!is_ready(&status), "{uid}");
            node.wait_event(uid, "Unhealthy").await;
        }
        remove(&node, &["uid-missing", "uid-open", "uid-shut", "uid-hangs", "uid-serving", "uid-unknown"]).await;
    });
}

#[test]
fn startup_gates_and_hooks_are_in_order() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let set = |pod: &mut Pod| {
            let spec = pod.spec_mut();
            spec.init_containers[0].startup_probe = exec_probe("test -e /v/go");
            let lifecycle = Lifecycle {
                post_start: hook("sleep 1; echo posted >> /v/order"),
                pre_stop: hook("echo prestop >> /v/order; sleep 1"),
                ..Lifecycle::default()
            };
            spec.containers[0].lifecycle = Some(Box::new(lifecycle));
        };
        let app = "trap 'echo term >> /v/order; cat /v/order; exit 0' TERM; while :; do sleep 0.05; done";
        let second = "echo second >> /v/order; while :; do sleep 0.05; done";
        node.api.put(pod("uid-gate", set, &[("s:side", LIVE), ("a:app", app), ("a:second", second)])).await;
        let volume = node.data_dir().join("pods/uid-gate/volumes/v");
        let status =
            node.wait("uid-gate", "the sidecar's process", |status| running(container(status, "side")).is_some()).await;
        assert_eq!((status.phase.as_str(), container(&status, "side").started), ("Pending", Some(false)));
        tokio::time::sleep(std::time::Duration::from_millis(300)).await;
        std::fs::write(volume.join("go"), b"").expect("write");
        node.wait("uid-gate", "ready", is_ready).await;
        let log = node.data_dir().join("logs/default_uid-gate_uid-gate/app/0.log");
        let kept = node.data_dir().join("kept.log");
        std::fs::hard_link(&log, &kept).expect("keep the log beyond the pod");
        node.api.delete("uid-gate", 5).await;
        node.wait_finished("uid-gate").await;
        let text = std::fs::read_to_string(&kept).expect("read");
        let order: Vec<&str> = text.lines().filter_map(|line| line.split(' ').nth(3)).collect();
        assert_eq!(order, ["posted", "second", "prestop", "term"], "{text}");
        std::fs::remove_file(kept).expect("remove");
        let fails = |pod: &mut Pod| {
            let lifecycle = Lifecycle { post_start: hook("exit 3"), ..Lifecycle::default() };
            pod.spec_mut().containers[0].lifecycle = Some(Box::new(lifecycle));
        };
        node.api.put(pod("uid-fails", fails, &[("a:app", LIVE)])).await;
        node.wait("uid-fails", "a restart", |status| container(status, "app").restart_count >= 1).await;
        node.wait_event("uid-fails", "FailedPostStartHook").await;
        let sleeps = |pod: &mut Pod| {
            let sleep = LifecycleHandler { sleep: Some(SleepAction { seconds: 600 }), ..LifecycleHandler::default() };
            let lifecycle =
                Lifecycle { post_start: Some(sleep.clone()), pre_stop: Some(sleep), ..Lifecycle::default() };
            pod.spec_mut().containers[0].lifecycle = Some(Box::new(lifecycle));
        };
        node.api.put(pod("uid-sleeps", sleeps, &[("a:app", LIVE)])).await;
        node.wait_running("uid-sleeps").await;
        remove(&node, &["uid-fails", "uid-sleeps"]).await;
    });
}
