//! Node sessions and tunnels, with a small agent made here, against a real etcd.

mod support;

use std::time::Duration;

use minipod_proto::v1::UpdateRequest;
use minipod_proto::v1::{
    AgentHello, AgentMessage, BindBatchRequest, ConfigMap, ConfigMapEnvSource, EnvFromSource, EventReport, ExecFrame,
    ExecStart, Heartbeat, ImageInfo, ImageLoadRequest, ImageLoadResponse, ImageLoadStart, LogsRequest, Node,
    NodeAddress, ObjectMeta, OpenStream, Pod, PodCondition, PodStatus, PodStatusReport, RelayFrame, RelayStart,
    ServerMessage, TunnelEnd, TunnelFrame, agent_message, bind_batch_request::Item, bind_result::Code, exec_frame,
    image_load_request, images_client::ImagesClient, object, open_stream, pod_access_client::PodAccessClient,
    relay_frame, relays_client::RelaysClient, server_message, tunnel_frame::Frame,
};
use support::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code as Grpc, Streaming};

struct Agent {
    node: String,
    send: mpsc::Sender<AgentMessage>,
    receive: Streaming<ServerMessage>,
    /// Pods that it was told are gone while it waited for something else.
    gone: Vec<String>,
}

impl Agent {
    async fn connect(server: &Server, node: &str) -> Agent {
        let (send, messages) = mpsc::channel(16);
        let hello = AgentHello { node: node.into(), boot_id: "b".into(), agent_version: "t".into() };
        let first = AgentMessage { message: Some(agent_message::Message::Hello(hello)) };
        send.send(first).await.expect("room");
        let session = server.nodes().await.session(ReceiverStream::new(messages)).await;
        Agent { node: node.into(), send, receive: session.expect("the session begins").into_inner(), gone: Vec::new() }
    }

    async fn say(&self, message: agent_message::Message) {
        self.send.send(AgentMessage { message: Some(message) }).await.expect("the session is open");
    }

    /// The next message that is no routes.
    async fn hear(&mut self) -> server_message::Message {
        loop {
            let message = tokio::time::timeout(Duration::from_secs(20), self.receive.message()).await;
            let message = message.expect("a message within 20 s").expect("the session goes on").expect("a message");
            match message.message.expect("a message of a kind") {
                server_message::Message::Routes(_) => {}
                other => return other,
            }
        }
    }

    async fn snapshot(&mut self) -> Vec<String> {
        match self.hear().await {
            server_message::Message::Snapshot(pods) => {
                pods.items.into_iter().map(|pod| pod.metadata.unwrap_or_default().name).collect()
            }
            other => panic!("{} hears {other:?} instead of its snapshot", self.node),
        }
    }

    async fn upsert(&mut self) -> Pod {
        match self.hear().await {
            server_message::Message::PodUpsert(pod) => pod,
            other => panic!("{} hears {other:?} instead of a pod", self.node),
        }
    }

    /// Reports a status; the acknowledgement's error. Changes of the pod that come before it are passed over.
    async fn report(&mut self, pod: &Pod, phase: &str, sequence: u64, finished: bool) -> String {
        let meta = pod.metadata.clone().unwrap_or_default();
        let ready = PodCondition { r#type: "Ready".into(), status: "True".into(), ..PodCondition::default() };
        let status = PodStatus {
            phase: phase.into(),
            pod_ip: "10.42.0.9".into(),
            conditions: vec![ready],
            ..PodStatus::default()
        };
        let report = PodStatusReport {
            namespace: meta.namespace,
            name: meta.name,
            uid: meta.uid,
            status: Some(status),
            sequence,
            finished,
        };
        self.say(agent_message::Message::PodStatus(report)).await;
        loop {
            match self.hear().await {
                server_message::Message::PodStatusAck(ack) => {
                    assert_eq!(ack.sequence, sequence);
                    return ack.error;
                }
                server_message::Message::PodGone(gone) => self.gone.push(gone.name),
                _ => {}
            }
        }
    }

    /// How the session ends.
    async fn end(&mut self) -> String {
        loop {
            let message = tokio::time::timeout(Duration::from_secs(20), self.receive.message()).await;
            match message.expect("an end within 20 s") {
                Ok(Some(_)) => {}
                Ok(None) => return "without a word".to_owned(),
                Err(status) => return status.message().to_owned(),
            }
        }
    }

    /// Waits until it has been told that a pod is gone; the word may have come before an acknowledgement.
    async fn told_gone(&mut self, name: &str) {
        while !self.gone.iter().any(|gone| gone == name) {
            if let server_message::Message::PodGone(gone) = self.hear().await {
                self.gone.push(gone.name);
            }
        }
    }
}

async fn bound_pod(server: &Server, name: &str, node: &str) -> Pod {
    bound(server, pod(name, "100m", "64Mi"), node).await
}

async fn bound(server: &Server, pod: Pod, node: &str) -> Pod {
    let made = create_pod(server, pod).await;
    let meta = made.metadata.clone().unwrap_or_default();
    let item = Item { namespace: meta.namespace, pod: meta.name, uid: meta.uid, revision: 0, node: node.into() };
    let request = BindBatchRequest { items: vec![item], mode: 0, scheduler: String::new() };
    let results = server.scheduling().await.bind_batch(request).await.expect("bind").into_inner().results;
    assert_eq!(results[0].code(), Code::Bound, "{results:?}");
    made
}

async fn stored_pod(server: &Server, name: &str) -> Result<Pod, Grpc> {
    let got = server.objects().await.get(get("Pod", "default", name)).await;
    got.map(|pod| Pod::try_from(pod.into_inner()).expect("a pod")).map_err(|status| status.code())
}

async fn stored_node(server: &Server, name: &str) -> Node {
    let got = server.objects().await.get(get("Node", "", name)).await.expect("the node is there");
    Node::try_from(got.into_inner()).expect("a node")
}

async fn used_pods(cluster: &Cluster, node: &str) -> i64 {
    let storage =
        minipod_apiserver::storage::Storage::connect(&[cluster.etcd.address()], 128).await.expect("the store");
    let (item, _) = storage.get(minipod_apiserver::keys::ledger(node)).await.expect("the ledger");
    let ledger: minipod_apiserver::ledger::Ledger =
        prost::Message::decode(item.expect("a ledger").value.as_slice()).expect("decodes");
    ledger.pods()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_lives_and_goes_through_a_session() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    register(server, node("n1", "4", "4Gi", "10")).await;
    let early = bound_pod(server, "early", "n1").await;
    let mut agent = Agent::connect(server, "n1").await;
    assert_eq!(agent.snapshot().await, ["early"]);

    agent.say(agent_message::Message::Heartbeat(Heartbeat { sequence: 7 })).await;
    assert_eq!(agent.hear().await, server_message::Message::Heartbeat(Heartbeat { sequence: 7 }));

    let made = bound_pod(server, "late", "n1").await;
    let late = agent.upsert().await;
    assert_eq!(
        (late.node_name(), &late.metadata.clone().unwrap_or_default().uid),
        (Some("n1"), &made.metadata.clone().unwrap_or_default().uid)
    );
    assert_eq!(used_pods(&cluster, "n1").await, 2);

    assert_eq!(agent.report(&late, "Running", 1, false).await, "");
    let stored = stored_pod(server, "late").await.expect("there");
    assert_eq!((stored.status().phase.as_str(), stored.status().pod_ip.as_str()), ("Running", "10.42.0.9"));
    assert!(stored.condition_true("PodScheduled") && stored.condition_true("Ready"));
    assert_eq!(stored.status().qos_class, "Burstable");

    let marked = server.objects().await.delete(delete("Pod", "default", "late")).await.expect("marked").into_inner();
    assert!(!marked.gone);
    let meta = marked.object.expect("the pod").meta().clone();
    assert_eq!((meta.deletion_grace_period_seconds, meta.generation), (Some(30), 2));
    assert_eq!(agent.report(&late, "Failed", 2, false).await, "");
    assert_eq!(used_pods(&cluster, "n1").await, 1, "an ended pod counts nothing");
    assert_eq!(agent.report(&late, "Running", 3, false).await, "");
    assert_eq!(stored_pod(server, "late").await.expect("there").status().phase, "Failed", "an ended pod stays so");
    assert_eq!(agent.report(&late, "Failed", 4, true).await, "");
    assert_eq!(stored_pod(server, "late").await.expect_err("gone"), Grpc::NotFound);
    agent.told_gone("late").await;
    assert_eq!(used_pods(&cluster, "n1").await, 1, "nothing is given back twice");

    // A forced deletion: the agent is told, and what it says afterwards is refused.
    let mut force = delete("Pod", "default", "early");
    force.grace_period_seconds = Some(0);
    assert!(server.objects().await.delete(force).await.expect("deleted").into_inner().gone);
    assert_eq!(used_pods(&cluster, "n1").await, 0);
    agent.told_gone("early").await;
    let refused = agent.report(&early, "Running", 1, false).await;
    assert!(refused.contains("does not exist"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_tells_what_its_pods_refer_to_and_nothing_else() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    for name in ["n1", "n2"] {
        register(server, node(name, "4", "4Gi", "10")).await;
    }
    let map = |name: &str, value: &str| {
        let metadata = ObjectMeta { name: name.into(), namespace: "default".into(), ..ObjectMeta::default() };
        let data = [("k".to_owned(), value.to_owned())].into();
        ConfigMap { metadata: Some(metadata), data, ..ConfigMap::default() }
    };
    for name in ["used", "foreign", "nobodys"] {
        server.objects().await.create(create(map(name, "1"))).await.expect("created");
    }
    for (name, refers, node) in [("p1", "used", "n1"), ("p2", "foreign", "n2"), ("p3", "late", "n1")] {
        let mut pod = pod(name, "100m", "64Mi");
        let config_map_ref = Some(ConfigMapEnvSource { name: refers.into(), optional: None });
        pod.spec_mut().containers[0].env_from = vec![EnvFromSource { config_map_ref, ..EnvFromSource::default() }];
        bound(server, pod, node).await;
    }
    let update = |map: ConfigMap| UpdateRequest { object: Some(map.into()), dry_run: false };
    let told = |message: server_message::Message| match message {
        server_message::Message::ConfigMap(map) => {
            format!("{}={}", map.metadata.unwrap_or_default().name, map.data["k"])
        }
        server_message::Message::SourceGone(gone) => format!("{} {}/{} gone", gone.kind, gone.namespace, gone.name),
        server_message::Message::PodGone(gone) => format!("pod {} gone", gone.name),
        server_message::Message::PodUpsert(_) => "pod changed".to_owned(),
        other => panic!("{other:?}"),
    };
    let mut agent = Agent::connect(server, "n1").await;
    assert_eq!(told(agent.hear().await), "used=1", "before the pod that needs it");
    assert_eq!(agent.snapshot().await, ["p1", "p3"]);
    server.objects().await.update(update(map("foreign", "2"))).await.expect("updated");
    server.objects().await.update(update(map("nobodys", "2"))).await.expect("updated");
    server.objects().await.update(update(map("used", "2"))).await.expect("updated");
    assert_eq!(told(agent.hear().await), "used=2", "the others are not this node's");
    server.objects().await.create(create(map("late", "1"))).await.expect("created");
    assert_eq!(told(agent.hear().await), "late=1");
    server.objects().await.delete(delete("ConfigMap", "default", "late")).await.expect("deleted");
    assert_eq!(told(agent.hear().await), "ConfigMap default/late gone");
    let mut force = delete("Pod", "default", "p1");
    force.grace_period_seconds = Some(0);
    server.objects().await.delete(force).await.expect("deleted");
    assert_eq!(told(agent.hear().await), "pod p1 gone");
    assert_eq!(told(agent.hear().await), "ConfigMap default/used gone", "nobody here needs it any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_session_ends_the_first_and_foreign_reports_are_refused() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    for name in ["n1", "n2"] {
        let mut node = node(name, "4", "4Gi", "10");
        node.status_mut()
            .addresses
            .push(NodeAddress { r#type: "InternalIP".into(), address: format!("192.0.2.{}", &name[1..]) });
        register(server, node).await;
    }
    let made = bound_pod(server, "p", "n1").await;
    let mut first = Agent::connect(server, "n1").await;
    assert_eq!(first.snapshot().await, ["p"]);
    let mut second = Agent::connect(server, "n1").await;
    assert_eq!(second.snapshot().await, ["p"]);
    let status = loop {
        match first.receive.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the first session ended without a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!((status.code(), status.message()), (Grpc::Aborted, "another session of node n1 has begun"));

    let mut other = Agent::connect(server, "n2").await;
    assert!(other.snapshot().await.is_empty());
    let refused = other.report(&made, "Failed", 1, true).await;
    assert!(refused.contains("bound to n1, not to n2"), "{refused}");
    let mut stranger = made.clone();
    stranger.metadata.get_or_insert_default().uid = "another".into();
    let refused = second.report(&stranger, "Failed", 1, true).await;
    assert!(refused.contains("the one reported is gone"), "{refused}");
    assert_eq!(stored_pod(server, "p").await.expect("there").status().phase, "Pending");

    // Each is told of the other's addresses.
    let message = tokio::time::timeout(Duration::from_secs(20), async {
        let mut third = Agent::connect(server, "n2").await;
        loop {
            let message = third.receive.message().await.expect("open").expect("a message").message;
            // The first table may be one that was made before the nodes were there.
            if let Some(server_message::Message::Routes(routes)) = message
                && !routes.routes.is_empty()
            {
                return routes;
            }
        }
    });
    let routes = message.await.expect("routes within 20 s").routes;
    assert_eq!(routes.len(), 1);
    assert_eq!(
        (routes[0].node.as_str(), routes[0].pod_cidr.as_str(), routes[0].via.as_str()),
        ("n1", "10.42.0.0/24", "192.0.2.1")
    );

    let (send, messages) = mpsc::channel(1);
    let hello = AgentHello { node: "nobody".into(), ..AgentHello::default() };
    send.send(AgentMessage { message: Some(agent_message::Message::Hello(hello)) }).await.expect("room");
    let refused = server.nodes().await.session(ReceiverStream::new(messages)).await.expect_err("refused");
    assert_eq!(refused.code(), Grpc::FailedPrecondition, "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_node_is_marked_and_comes_back() {
    let cluster = Cluster::with(|config| config.node_grace = Duration::from_secs(2)).await;
    let server = &cluster.server;
    register(server, node("n1", "4", "4Gi", "10")).await;
    assert!(stored_node(server, "n1").await.is_ready());
    let made = bound_pod(server, "p", "n1").await;
    let mut agent = Agent::connect(server, "n1").await;
    agent.snapshot().await;
    assert_eq!(agent.report(&made, "Running", 1, false).await, "");
    drop(agent);
    eventually("the node is not ready, nor its pod", || async {
        let (node, pod) = (stored_node(server, "n1").await, stored_pod(server, "p").await.expect("there"));
        let silent = !node.is_ready() && !pod.condition_true("Ready");
        if silent { Ok(()) } else { Err(format!("{:?} {:?}", node.status().conditions, pod.status().conditions)) }
    })
    .await;
    let pod = stored_pod(server, "p").await.expect("there");
    assert_eq!((pod.node_name(), pod.status().phase.as_str()), (Some("n1"), "Running"), "nothing is moved");
    let next = create_pod(server, support::pod("q", "100m", "64Mi")).await;
    let meta = next.metadata.clone().unwrap_or_default();
    let item = Item { namespace: meta.namespace, pod: meta.name, uid: meta.uid, revision: 0, node: "n1".into() };
    let request = BindBatchRequest { items: vec![item], mode: 0, scheduler: String::new() };
    let results = server.scheduling().await.bind_batch(request.clone()).await.expect("answered").into_inner().results;
    assert_eq!(results[0].code(), Code::NodeUnschedulable, "{results:?}");

    let mut agent = Agent::connect(server, "n1").await;
    assert_eq!(agent.snapshot().await, ["p"]);
    eventually("the node is ready again", || async {
        let node = stored_node(server, "n1").await;
        if node.is_ready() { Ok(()) } else { Err(format!("{:?}", node.status().conditions)) }
    })
    .await;
    let results = server.scheduling().await.bind_batch(request).await.expect("answered").into_inner().results;
    assert_eq!(results[0].code(), Code::Bound, "{results:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_stay_and_differ_and_events_are_counted() {
    let cluster = Cluster::with(|config| config.cluster_cidr = "10.1.0.0/22".parse().expect("good")).await;
    let server = &cluster.server;
    let joined =
        futures_util::future::join_all((0..4).map(|n| register(server, node(&format!("n{n}"), "1", "1Gi", "10"))))
            .await;
    let mut ranges: Vec<String> = joined.into_iter().map(|answer| answer.pod_cidr).collect();
    ranges.sort();
    assert_eq!(ranges, ["10.1.0.0/24", "10.1.1.0/24", "10.1.2.0/24", "10.1.3.0/24"]);
    let before = stored_node(server, "n2").await;
    let again = register(server, node("n2", "2", "1Gi", "10")).await;
    assert_eq!(again.pod_cidr, before.spec().pod_cidr);
    let after = stored_node(server, "n2").await;
    assert_eq!(after.metadata.clone().unwrap_or_default().uid, before.metadata.clone().unwrap_or_default().uid);
    assert_eq!(after.status().allocatable["cpu"], "2");
    let request = minipod_proto::v1::RegisterRequest { node: Some(node("n4", "1", "1Gi", "10")) };
    let full = server.nodes().await.register(request).await.expect_err("full");
    assert_eq!(full.code(), Grpc::ResourceExhausted, "{full}");

    let made = bound_pod(server, "p", "n0").await;
    let mut agent = Agent::connect(server, "n0").await;
    agent.snapshot().await;
    let meta = made.metadata.clone().unwrap_or_default();
    for _ in 0..3 {
        let event = EventReport {
            namespace: meta.namespace.clone(),
            pod: meta.name.clone(),
            uid: meta.uid.clone(),
            r#type: "Warning".into(),
            reason: "BackOff".into(),
            message: "restarting".into(),
            field_path: "spec.containers{app}".into(),
        };
        agent.say(agent_message::Message::Event(event)).await;
    }
    eventually("one event counted three times", || async {
        let events = server.objects().await.list(list("Event")).await.expect("listed").into_inner().items;
        let found = events.iter().filter_map(|event| match &event.kind {
            Some(object::Kind::Event(event)) if event.reason == "BackOff" => Some(event.count),
            _ => None,
        });
        let counts: Vec<i32> = found.collect();
        if counts == [3] { Ok(()) } else { Err(format!("{counts:?} of {}", events.len())) }
    })
    .await;
}

/// Opens the stream that the agent was asked for.
async fn answer(server: &Server, id: String) -> (mpsc::Sender<TunnelFrame>, Streaming<TunnelFrame>) {
    let (send, frames) = mpsc::channel(16);
    send.send(TunnelFrame { frame: Some(Frame::Open(id)) }).await.expect("room");
    let inbound =
        server.nodes().await.tunnel(ReceiverStream::new(frames)).await.expect("the tunnel is wanted").into_inner();
    (send, inbound)
}

async fn put(send: &mpsc::Sender<TunnelFrame>, frame: Frame) {
    send.send(TunnelFrame { frame: Some(frame) }).await.expect("the tunnel is open");
}

async fn asked(agent: &mut Agent) -> (String, String, open_stream::Request) {
    loop {
        if let server_message::Message::OpenStream(open) = agent.hear().await {
            return (open.stream_id, open.pod_uid, open.request.expect("a request"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_exec_and_images_ride_on_tunnels() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    register(server, node("n1", "4", "4Gi", "10")).await;
    let made = bound_pod(server, "p", "n1").await;
    let logs = LogsRequest { namespace: "default".into(), pod: "p".into(), ..LogsRequest::default() };
    let mut access = PodAccessClient::new(server.channel().await);
    let absent = access.logs(logs.clone()).await.expect_err("no session");
    assert_eq!(
        (absent.code(), absent.message()),
        (Grpc::Unavailable, "node n1 has no session: its agent is not connected")
    );
    let wrong =
        access.logs(LogsRequest { container: "x".into(), ..logs.clone() }).await.expect_err("no such container");
    assert_eq!(
        (wrong.code(), wrong.message()),
        (Grpc::InvalidArgument, "container: pod default/p has no \"x\"; it has app")
    );

    let mut agent = Agent::connect(server, "n1").await;
    agent.snapshot().await;
    let reading = tokio::spawn(async move { (access.logs(logs).await.expect("logs").into_inner(), access) });
    let (id, uid, request) = asked(&mut agent).await;
    assert_eq!(uid, made.metadata.clone().unwrap_or_default().uid);
    assert!(matches!(request, open_stream::Request::Logs(logs) if logs.container == "app"));
    let (send, _inbound) = answer(server, id).await;
    put(&send, Frame::Data("line 1\n".into())).await;
    let (mut chunks, mut access) = reading.await.expect("the reader goes on");
    assert_eq!(chunks.message().await.expect("open").expect("a chunk").data, "line 1\n");
    put(&send, Frame::End(TunnelEnd { code: 9, message: "the container has not started".into() })).await;
    let ended = chunks.message().await.expect_err("an error");
    assert_eq!((ended.code(), ended.message()), (Grpc::FailedPrecondition, "the container has not started"));

    let (input, frames) = mpsc::channel(4);
    let start = ExecStart {
        namespace: "default".into(),
        pod: "p".into(),
        command: vec!["cat".into()],
        stdin: true,
        ..ExecStart::default()
    };
    input.send(ExecFrame { frame: Some(exec_frame::Frame::Start(start)) }).await.expect("room");
    let running =
        tokio::spawn(async move { access.exec(ReceiverStream::new(frames)).await.expect("exec").into_inner() });
    let (id, _, _) = asked(&mut agent).await;
    let (send, mut inbound) = answer(server, id).await;
    let mut output = running.await.expect("the user goes on");
    input.send(ExecFrame { frame: Some(exec_frame::Frame::Stdin("hi".into())) }).await.expect("room");
    let got = inbound.message().await.expect("open").expect("a frame").frame;
    assert_eq!(got, Some(Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Stdin("hi".into())) })));
    put(&send, Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Stdout("hi".into())) })).await;
    put(&send, Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::ExitCode(3)) })).await;
    put(&send, Frame::End(TunnelEnd::default())).await;
    let mut frames = Vec::new();
    while let Some(frame) = output.message().await.expect("open") {
        frames.push(frame.frame.expect("a frame"));
    }
    assert_eq!(frames, [exec_frame::Frame::Stdout("hi".into()), exec_frame::Frame::ExitCode(3)]);

    load_an_image(server, &mut agent).await;
    break_a_load_off(server, &mut agent).await;
    let mut unknown = server.nodes().await;
    let (send, frames) = mpsc::channel(1);
    send.send(TunnelFrame { frame: Some(Frame::Open("no such id".into())) }).await.expect("room");
    assert_eq!(
        unknown.tunnel(ReceiverStream::new(frames)).await.expect_err("refused").code(),
        Grpc::FailedPrecondition
    );
}

/// Half an image is never ended as a whole one would be.
async fn break_a_load_off(server: &Server, agent: &mut Agent) {
    let mut images = ImagesClient::new(server.channel().await);
    let (upload, pieces) = mpsc::channel(4);
    let loading = tokio::spawn(async move { images.load(ReceiverStream::new(pieces)).await });
    let message = |message| ImageLoadRequest { message: Some(message) };
    upload.send(message(image_load_request::Message::Start(ImageLoadStart::default()))).await.expect("room");
    upload.send(message(image_load_request::Message::Data("half".into()))).await.expect("room");
    let (id, _, _) = asked(agent).await;
    let (_send, mut inbound) = answer(server, id).await;
    drop(upload);
    while let Ok(Some(frame)) = inbound.message().await {
        assert!(matches!(frame.frame, Some(Frame::Data(_))), "{frame:?}");
    }
    let summary = loading.await.expect("the user goes on").expect("answered").into_inner();
    assert_eq!(summary.nodes[0].error, "the upload broke off");
}

async fn load_an_image(server: &Server, agent: &mut Agent) {
    let mut images = ImagesClient::new(server.channel().await);
    let (upload, pieces) = mpsc::channel(4);
    let loading =
        tokio::spawn(async move { images.load(ReceiverStream::new(pieces)).await.expect("answered").into_inner() });
    let message = |message| ImageLoadRequest { message: Some(message) };
    upload.send(message(image_load_request::Message::Start(ImageLoadStart::default()))).await.expect("room");
    upload.send(message(image_load_request::Message::Data("half".into()))).await.expect("room");
    let (id, _, request) = asked(agent).await;
    assert!(matches!(request, open_stream::Request::ImageLoad(_)));
    let (send, mut inbound) = answer(server, id).await;
    upload.send(message(image_load_request::Message::Data("rest".into()))).await.expect("room");
    upload.send(message(image_load_request::Message::Complete(true))).await.expect("room");
    drop(upload);
    let mut file = Vec::new();
    loop {
        match inbound.message().await.expect("open").expect("a frame").frame.expect("a frame") {
            Frame::Data(data) => file.extend(data),
            Frame::End(end) => break assert_eq!(end.code, 0),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(file, b"halfrest");
    let image = ImageInfo { names: vec!["i:1".into()], digest: "sha256:0".into(), size_bytes: 8, layers: 1 };
    put(&send, Frame::ImageLoaded(ImageLoadResponse { images: vec![image.clone()] })).await;
    let summary = loading.await.expect("the user goes on");
    assert_eq!((summary.nodes.len(), summary.nodes[0].error.as_str(), &summary.nodes[0].images), (1, "", &vec![image]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_elsewhere_counts_and_is_reached() {
    let grace = Duration::from_secs(2);
    let cluster = Cluster::with(|config| config.node_grace = grace).await;
    let first = &cluster.server;
    let mut other = config(&cluster.etcd);
    other.node_grace = grace;
    let second = Server::start(other).await;
    register(first, node("n1", "4", "4Gi", "10")).await;
    bound_pod(first, "p", "n1").await;
    let mut agent = Agent::connect(&second, "n1").await;
    assert_eq!(agent.snapshot().await, ["p"]);
    let begun = std::time::Instant::now();
    let mut sequence = 0;
    while begun.elapsed() < grace * 3 {
        sequence += 1;
        agent.say(agent_message::Message::Heartbeat(Heartbeat { sequence })).await;
        agent.hear().await;
        assert!(
            stored_node(first, "n1").await.is_ready(),
            "marked after {:?}, but it speaks to the other server",
            begun.elapsed()
        );
        tokio::time::sleep(grace / 10).await;
    }
    // Asked of the first, answered through the second.
    let logs = LogsRequest { namespace: "default".into(), pod: "p".into(), ..LogsRequest::default() };
    let mut access = PodAccessClient::new(first.channel().await);
    let asking = logs.clone();
    let reading = tokio::spawn(async move { (access.logs(asking).await.expect("logs").into_inner(), access) });
    let (id, _, _) = asked(&mut agent).await;
    let (send, mut inbound) = answer(&second, id).await;
    put(&send, Frame::Data("line 1\n".into())).await;
    let (mut chunks, access) = reading.await.expect("the reader goes on");
    assert_eq!(chunks.message().await.expect("open").expect("a chunk").data, "line 1\n");
    put(&send, Frame::End(TunnelEnd { code: 9, message: "the container has not started".into() })).await;
    let ended = chunks.message().await.expect_err("an error");
    assert_eq!((ended.code(), ended.message()), (Grpc::FailedPrecondition, "the container has not started"));
    assert_eq!(inbound.message().await.expect("ended in order"), None);

    // Both directions; and a user who leaves is seen to leave by the agent.
    let (input, frames) = mpsc::channel(4);
    let start = ExecStart {
        namespace: "default".into(),
        pod: "p".into(),
        command: vec!["cat".into()],
        stdin: true,
        ..ExecStart::default()
    };
    input.send(ExecFrame { frame: Some(exec_frame::Frame::Start(start)) }).await.expect("room");
    let mut user = access.clone();
    let running = tokio::spawn(async move { user.exec(ReceiverStream::new(frames)).await.expect("exec").into_inner() });
    let (id, _, _) = asked(&mut agent).await;
    let (send, mut inbound) = answer(&second, id).await;
    let mut output = running.await.expect("the user goes on");
    input.send(ExecFrame { frame: Some(exec_frame::Frame::Stdin("hi".into())) }).await.expect("room");
    let got = inbound.message().await.expect("open").expect("a frame").frame;
    assert_eq!(got, Some(Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Stdin("hi".into())) })));
    put(&send, Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Stdout("hi".into())) })).await;
    let got = output.message().await.expect("open").expect("a frame").frame;
    assert_eq!(got, Some(exec_frame::Frame::Stdout("hi".into())));
    drop((output, input));
    let left = async { while let Ok(Some(_)) = inbound.message().await {} };
    tokio::time::timeout(Duration::from_secs(10), left).await.expect("the agent sees that the user is gone");

    relays_are_for_servers_alone(&second).await;

    // The session moves: what the agent says in the old one is not written any more.
    let made = stored_pod(first, "p").await.expect("it is there");
    let mut moved = Agent::connect(first, "n1").await;
    assert_eq!(moved.snapshot().await, ["p"]);
    let meta = made.metadata.clone().unwrap_or_default();
    let report = |phase: &str, sequence| {
        agent_message::Message::PodStatus(PodStatusReport {
            namespace: meta.namespace.clone(),
            name: meta.name.clone(),
            uid: meta.uid.clone(),
            status: Some(PodStatus { phase: phase.into(), ..PodStatus::default() }),
            sequence,
            finished: false,
        })
    };
    moved.say(report("Running", 1)).await;
    eventually("what is said in the new session is written", || async {
        let phase = stored_pod(first, "p").await.expect("it is there").status().phase.clone();
        if phase == "Running" { Ok(()) } else { Err(phase) }
    })
    .await;
    agent.say(report("Failed", 2)).await;
    let end = agent.end().await;
    assert!(end.contains("another session of node n1 has begun"), "{end}");
    assert_eq!(stored_pod(first, "p").await.expect("it is there").status().phase, "Running");

    // Now the second server passes on to the first; and when that is gone with the session, it says so.
    let mut access = PodAccessClient::new(second.channel().await);
    let asking = logs.clone();
    let reading = tokio::spawn(async move { (access.logs(asking).await.expect("logs").into_inner(), access) });
    let (id, _, _) = asked(&mut moved).await;
    let (send, _inbound) = answer(first, id).await;
    put(&send, Frame::Data("line 2\n".into())).await;
    let (mut chunks, mut access) = reading.await.expect("the reader goes on");
    assert_eq!(chunks.message().await.expect("open").expect("a chunk").data, "line 2\n");
    drop(moved);
    let refused = access.logs(logs).await.expect_err("nobody has the session");
    assert_eq!(refused.code(), Grpc::Unavailable);
    assert!(refused.message().starts_with("node n1 has no session: its agent is not connected"), "{refused}");
}

/// Whoever does not read the store is refused, at any node.
async fn relays_are_for_servers_alone(server: &Server) {
    let mut relays = RelaysClient::new(server.channel().await);
    let mut ask = async |frame| {
        let frames = tokio_stream::once(RelayFrame { frame: Some(frame) });
        relays.relay(frames).await.expect_err("refused").code()
    };
    let open =
        || OpenStream { request: Some(open_stream::Request::Logs(LogsRequest::default())), ..Default::default() };
    let start = RelayStart { node: "n1".into(), open: Some(open()), ..RelayStart::default() };
    assert_eq!(ask(relay_frame::Frame::Start(start)).await, Grpc::NotFound, "another server is meant");
    assert_eq!(ask(relay_frame::Frame::Tunnel(TunnelFrame::default())).await, Grpc::InvalidArgument);
}
