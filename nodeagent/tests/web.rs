//! What an httpGet asks and what it makes of the answers: probes and hooks of a pod on the node's network, whose server is here.

mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use minipod_proto::v1::{ContainerPort, HttpGetAction, HttpHeader, Lifecycle, LifecycleHandler, Pod, PodStatus, Probe};
use support::certificates::certificates;
use support::registry::Registry;
use support::*;

/// Answers by path, and remembers the heads of what it was asked.
struct Server {
    address: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let (address, heads) = (listener.local_addr().expect("address"), Arc::<Mutex<Vec<String>>>::default());
        let kept = heads.clone();
        // It ends with the test's process.
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                if let Some(head) = answer(connection) {
                    kept.lock().expect("lock").push(head);
                }
            }
        });
        Self { address, heads }
    }

    fn asked(&self, path: &str) -> Vec<String> {
        let line = format!("GET {path} ");
        self.heads.lock().expect("lock").iter().filter(|head| head.starts_with(&line)).cloned().collect()
    }
}

fn answer(mut connection: TcpStream) -> Option<String> {
    let mut lines = BufReader::new(connection.try_clone().ok()?).lines();
    let head: Vec<String> = lines.by_ref().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let path = head.first()?.split(' ').nth(1)?.to_owned();
    let (status, location) = match path.as_str() {
        "/moved" => ("302 Found", "/fine"),
        "/elsewhere" => ("302 Found", "http://other.invalid/"),
        "/round" => ("302 Found", "/round"),
        "/not-modified" => ("304 Not Modified", ""),
        "/missing" => ("404 Not Found", ""),
        "/broken" => ("500 Internal Server Error", ""),
        _ => ("200 OK", ""),
    };
    let location = if location.is_empty() { String::new() } else { format!("Location: {location}\r\n") };
    let text = format!("HTTP/1.1 {status}\r\n{location}Content-Length: 0\r\nConnection: close\r\n\r\n");
    connection.write_all(text.as_bytes()).ok()?;
    Some(head.join("\n"))
}

fn get(address: SocketAddr, path: &str) -> HttpGetAction {
    HttpGetAction {
        path: path.into(),
        host: address.ip().to_string(),
        port: Some(i32::from(address.port()).into()),
        ..HttpGetAction::default()
    }
}

fn pod_with(uid: &str, change: impl FnOnce(&mut Pod)) -> Pod {
    let mut pod = scripts(uid, "Always", 1, &[("a:app", "exec sleep 1000")]);
    change(&mut pod);
    pod
}

fn ready_when(uid: &str, action: HttpGetAction) -> Pod {
    pod_with(uid, |pod| {
        let probe = Probe {
            http_get: Some(action),
            period_seconds: 1,
            timeout_seconds: 5,
            success_threshold: 1,
            failure_threshold: 1,
            ..Probe::default()
        };
        pod.spec_mut().containers[0].readiness_probe = Some(Box::new(probe));
    })
}

fn is_ready(status: &PodStatus) -> bool {
    status.container_statuses.iter().all(|container| container.ready)
}

async fn remove(node: &Node, uids: &[String]) {
    for uid in uids {
        // Some grace: without any no hook is run.
        node.api.delete(uid, 5).await;
    }
    for uid in uids {
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    }
}

#[test]
fn answers_redirects_and_tls_are_judged_as_kubernetes_does() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let server = Server::start();
        let keys = certificates();
        // A certificate of nobody that the node trusts.
        let registry = Registry::with_tls(keys.path(), None);
        let tls = HttpGetAction { scheme: "HTTPS".into(), ..get(registry.host.parse().expect("an address"), "/") };
        let good = ["/fine", "/moved", "/elsewhere", "/not-modified"];
        let bad = ["/missing", "/broken", "/round"];
        let uid_of = |path: &str| format!("uid-{}", path.trim_start_matches('/'));
        for path in good.iter().chain(&bad) {
            node.api.put(ready_when(&uid_of(path), get(server.address, path))).await;
        }
        node.api.put(ready_when("uid-tls", tls)).await;
        for uid in good.iter().map(|path| uid_of(path)).chain(["uid-tls".to_owned()]) {
            node.wait(&uid, "ready", is_ready).await;
        }
        // It was taken for good, not followed, and told of.
        node.wait_event("uid-elsewhere", "ProbeWarning").await;
        for path in bad {
            node.wait_event(&uid_of(path), "Unhealthy").await;
            assert!(!is_ready(&node.wait_running(&uid_of(path)).await), "{path}");
        }
        assert!(!server.asked("/fine").is_empty());
        let mut uids: Vec<String> = good.iter().chain(&bad).map(|path| uid_of(path)).collect();
        uids.push("uid-tls".to_owned());
        remove(&node, &uids).await;
    });
}

#[test]
fn headers_are_the_manifests_and_hooks_find_ports_by_their_names() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let server = Server::start();
        let header = |name: &str, value: &str| HttpHeader { name: name.into(), value: value.into() };
        let probe = HttpGetAction {
            http_headers: vec![header("Host", "shop.example"), header("X-Test", "a"), header("X-Test", "b")],
            ..get(server.address, "/headers?x=1")
        };
        node.api.put(ready_when("uid-headers", probe)).await;
        node.wait("uid-headers", "ready", is_ready).await;
        let head = server.asked("/headers?x=1").remove(0).to_lowercase();
        for line in ["host: shop.example", "x-test: a", "x-test: b", "user-agent: minipod-probe/"] {
            assert!(head.contains(line), "{line} is not in\n{head}");
        }
        assert_eq!(head.matches("host: ").count(), 1, "{head}");

        let hooks = pod_with("uid-hooks", |pod| {
            let spec = pod.spec_mut();
            spec.host_network = true;
            let port = i32::from(server.address.port());
            let named = ContainerPort { name: "web".into(), container_port: port, ..ContainerPort::default() };
            spec.containers[0].ports = vec![named];
            let hook = |path: &str| {
                let action = HttpGetAction {
                    host: String::new(),
                    port: Some(minipod_proto::v1::IntOrString::from("web")),
                    http_headers: vec![header("X-Hook", "yes")],
                    ..get(server.address, path)
                };
                Some(LifecycleHandler { http_get: Some(action), ..LifecycleHandler::default() })
            };
            // Any answer will do for a hook.
            let lifecycle =
                Lifecycle { post_start: hook("/started"), pre_stop: hook("/missing"), ..Lifecycle::default() };
            spec.containers[0].lifecycle = Some(Box::new(lifecycle));
        });
        node.api.put(hooks).await;
        node.wait("uid-hooks", "ready", is_ready).await;
        assert!(server.asked("/started").remove(0).to_lowercase().contains("x-hook: yes"));
        assert!(server.asked("/missing").is_empty());
        remove(&node, &["uid-headers".to_owned(), "uid-hooks".to_owned()]).await;
        assert_eq!(server.asked("/missing").len(), 1, "asked once, before the end");
    });
}
