//! The server as a process: its flags, its port file, its end; and what tools see of it.

mod support;

use std::{
    io::{Read, Write},
    net::TcpStream,
    process::{Child, Command, Output, Stdio},
};

use support::*;
use tonic::transport::Channel;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

/// Ends with the test, also when it fails.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_minipod-apiserver"));
    command.env_clear().stdin(Stdio::null());
    command
}

fn run(flags: &[&str]) -> Output {
    command().args(flags).output().expect("the binary runs")
}

#[test]
fn bad_flags_are_refused_by_name() {
    for (flags, words) in [
        (&["--listen=127.0.0.1:0"][..], "--store"),
        (&["--store=http://x:1"], "etcd://127.0.0.1:2379"),
        (&["--store=etcd://127.0.0.1:1", "--cluster-cidr=10.0.0.1/16"], "10.42.0.0/16"),
        (&["--store=etcd://127.0.0.1:1", "--node-grace=15"], "15s"),
        (&["--store=etcd://127.0.0.1:1", "--node-grace=1ms"], "--node-grace: at least 100ms"),
        (&["--store=etcd://127.0.0.1:1", "--peers=a=http://127.0.0.1:1", "--name=a"], "--peers: they are the members"),
        (&["--store=embedded", "--peers=a=http://127.0.0.1:1"], "--name"),
        (&["--store=embedded", "--peers=a=http://127.0.0.1:1", "--name=b"], "no such member, only a"),
        (
            &["--store=embedded", "--peers=a=http://127.0.0.1:1", "--name=a", "--peer-key-file=x"],
            "--peer-cert-file is missing",
        ),
        (
            &["--store=embedded", "--listen=127.0.0.1:0", "--peers=a=https://127.0.0.1:1", "--name=a"],
            "must begin with http://",
        ),
        (&["--store=embedded", "--listen=127.0.0.1:0", "--store-listen=0.0.0.0:2379"], "--store-cert-file"),
        (&["--store=embedded", "--store-listen=127.0.0.1:1", "--store-key-file=x"], "--store-cert-file is missing"),
        (&["--store=embedded", "--store-key-file=x"], "--store-listen"),
        (&["--store=etcd://127.0.0.1:1", "--store-listen=127.0.0.1:1"], "an etcd serves its clients itself"),
        (&["--store=embedded", "--store-quota=2"], "at least 16Mi"),
        (&["--store=etcd://127.0.0.1:1", "--listen=192.0.2.1:1"], "listen on 192.0.2.1:1"),
        (
            &["--store=etcd://127.0.0.1:1", "--listen=127.0.0.1:0", "--port-file=/nowhere/at/all"],
            "write --port-file /nowhere/at/all",
        ),
    ] {
        let output = run(flags);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(words), "{flags:?}: {words} is not in: {said}");
    }
}

fn http_get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the metrics port is served");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\n\r\n").expect("asked");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    answer
}

#[tokio::test(flavor = "multi_thread")]
async fn it_starts_before_its_store_and_ends_on_term() {
    let mut etcd = Etcd::start();
    etcd.kill();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let port_file = directory.path().join("port");
    let metrics_port = free_port();
    let child = command()
        .arg(format!("--store=etcd://{}", etcd.address()))
        .args(["--listen=127.0.0.1:0", &format!("--metrics-listen=127.0.0.1:{metrics_port}")])
        .arg(format!("--port-file={}", port_file.display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut process = Process(child.expect("the binary runs"));
    let port: u16 = eventually("the port file is written", || async {
        let text = std::fs::read_to_string(&port_file).map_err(|error| error.to_string())?;
        text.trim().parse().map_err(|error| format!("{text:?}: {error}"))
    })
    .await;
    let channel =
        Channel::from_shared(format!("http://127.0.0.1:{port}")).expect("an address").connect().await.expect("served");
    let mut objects = minipod_proto::v1::objects_client::ObjectsClient::new(channel.clone());
    let status = objects.get(get("Namespace", "", "default")).await.expect_err("no store");
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    for path in ["/healthz", "/readyz"] {
        assert!(http_get(metrics_port, path).starts_with("HTTP/1.1 503"), "{path}");
    }

    etcd.run();
    eventually("healthy", || async {
        let answer = http_get(metrics_port, "/healthz");
        if answer.starts_with("HTTP/1.1 200") { Ok(()) } else { Err(answer) }
    })
    .await;
    let health = HealthClient::new(channel.clone());
    eventually("the gRPC health service says so too", || {
        let mut health = health.clone();
        async move {
            let answer = health.check(HealthCheckRequest::default()).await.map_err(|status| status.to_string())?;
            if answer.get_ref().status == 1 { Ok(()) } else { Err(format!("{answer:?}")) }
        }
    })
    .await;
    assert!(http_get(metrics_port, "/metrics").contains("minipod_cache_revision "));
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = ServerReflectionClient::new(channel).server_reflection_info(tokio_stream::iter([request])).await;
    let answer = answers.expect("reflected").into_inner().message().await.expect("answered").expect("an answer");
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else { panic!("{answer:?}") };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    for service in ["Objects", "Scheduling", "Nodes", "PodAccess", "Images", "Stores"] {
        assert!(names.contains(&format!("minipod.v1.{service}")), "{names:?}");
    }

    let ended = Command::new("kill").args(["-TERM", &process.0.id().to_string()]).status().expect("kill runs");
    assert!(ended.success());
    let status = eventually("the process ends", || {
        let ended = process.0.try_wait().expect("it is ours");
        async move { ended.ok_or_else(|| "it still runs".to_owned()) }
    })
    .await;
    assert!(status.success(), "{status}");
    let mut said = String::new();
    process.0.stdout.take().expect("piped").read_to_string(&mut said).expect("readable");
    assert_eq!(said, format!("minipod-apiserver listens on 127.0.0.1:{port}\n"));
}
