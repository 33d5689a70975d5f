//! Change of CPU and memory in place: what is granted, what waits, and what the node's ledger has of it. Against a real etcd.

mod support;

use minipod_proto::Resource as _;
use minipod_proto::resize::{DEFERRED, IN_PROGRESS, INFEASIBLE, PENDING};
use minipod_proto::v1::{
    AgentHello, AgentMessage, BindBatchRequest, Pod, PodCondition, PodStatus, ResizeRequest, ResourceRequirements,
    UpdateRequest, agent_message, bind_batch_request::Item, bind_result::Code, resize_request,
};
use support::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code as Grpc;

async fn bind(server: &Server, pod: &Pod, node: &str) -> (Code, String) {
    let meta = pod.metadata.clone().expect("metadata");
    let item = Item {
        namespace: meta.namespace,
        pod: meta.name,
        uid: meta.uid,
        revision: meta.resource_version.parse().expect("a revision"),
        node: node.into(),
    };
    let request = BindBatchRequest { items: vec![item], ..BindBatchRequest::default() };
    let mut answer = server.scheduling().await.bind_batch(request).await.expect("an answer").into_inner();
    let result = answer.results.remove(0);
    (result.code(), result.message)
}

fn wish(name: &str, cpu: &str) -> ResizeRequest {
    let requests = [("cpu".to_owned(), cpu.to_owned())].into();
    let resources = Some(ResourceRequirements { requests, ..ResourceRequirements::default() });
    ResizeRequest {
        namespace: "default".into(),
        name: name.into(),
        containers: vec![resize_request::Container { name: "app".into(), resources }],
        ..ResizeRequest::default()
    }
}

async fn resize(server: &Server, name: &str, cpu: &str) -> Pod {
    let resized = server.objects().await.resize(wish(name, cpu)).await.expect("resized").into_inner();
    Pod::try_from(resized).expect("a pod")
}

/// Reason of the condition that the wish waits; what the spec wants; what is allocated.
fn told(pod: &Pod) -> (String, String, String) {
    let reason = pod.condition(PENDING).map(|condition| condition.reason.clone()).unwrap_or_default();
    let wanted = pod.spec().containers[0].resources.as_ref().map(|all| all.requests["cpu"].clone());
    let status = pod.status().container_statuses.first();
    let allocated = status.and_then(|status| status.allocated_resources.get("cpu")).cloned();
    (reason, wanted.unwrap_or_default(), allocated.unwrap_or_default())
}

fn words(a: &str, b: &str, c: &str) -> (String, String, String) {
    (a.to_owned(), b.to_owned(), c.to_owned())
}

/// How much CPU the node has left, in halves: found by binding.
async fn fits(server: &Server, name: &str, cpu: &str) -> bool {
    let probe = create_pod(server, pod(name, cpu, "1Mi")).await;
    let (code, message) = bind(server, &probe, "n").await;
    let mut objects = server.objects().await;
    let force = minipod_proto::v1::DeleteRequest { grace_period_seconds: Some(0), ..delete("Pod", "default", name) };
    objects.delete(force).await.expect("deleted");
    assert!(matches!(code, Code::Bound | Code::NoFit), "{message}");
    code == Code::Bound
}

/// The node says what is in force, as its agent does.
async fn carried_out(server: &Server, name: &str, cpu: &str) {
    let mut objects = server.objects().await;
    let object = objects.get(get("Pod", "default", name)).await.expect("there").into_inner();
    let mut pod = Pod::try_from(object).expect("a pod");
    pod.metadata.get_or_insert_default().resource_version.clear();
    let condition = PodCondition { r#type: PENDING.into(), status: "True".into(), ..PodCondition::default() };
    let status: &mut PodStatus = pod.status_mut();
    // An agent that has not heard of a decision yet repeats what it knew.
    status.conditions.push(condition);
    let one = &mut status.container_statuses[0];
    one.allocated_resources = [("cpu".to_owned(), "77".to_owned())].into();
    let requests = [("cpu".to_owned(), cpu.to_owned()), ("memory".to_owned(), "1Mi".to_owned())].into();
    one.resources = Some(ResourceRequirements { requests, ..ResourceRequirements::default() });
    let request = UpdateRequest { object: Some(pod.into()), dry_run: false };
    objects.update_status(request).await.expect("a report is stored");
}

#[tokio::test]
async fn a_wish_is_granted_waits_or_is_never_possible() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    register(server, node("n", "4", "1Gi", "110")).await;
    let (a, b) = (create_pod(server, pod("a", "1", "1Mi")).await, create_pod(server, pod("b", "1500m", "1Mi")).await);

    // Before the binding the spec alone changes.
    let a2 = resize(server, "a", "500m").await;
    assert_eq!(told(&a2), words("", "500m", ""));
    assert_eq!((a2.meta().generation, bind(server, &a, "n").await.0), (2, Code::PodChanged), "decided on another spec");
    let a = resize(server, "a", "1").await;
    for pod in [&a, &b] {
        assert_eq!(bind(server, pod, "n").await.0, Code::Bound);
    }
    // 2.5 of 4 are taken.
    let grown = resize(server, "a", "2").await;
    assert_eq!(told(&grown), words("", "2", "2"));
    assert_eq!(grown.meta().generation, a.meta().generation + 1);
    assert!(!fits(server, "x1", "600m").await && fits(server, "x2", "500m").await);

    // Down: the room is free only when the node has taken it from the container.
    carried_out(server, "a", "2").await;
    assert_eq!(told(&resize(server, "a", "1").await), words("", "1", "1"));
    assert!(!fits(server, "x3", "600m").await);
    carried_out(server, "a", "1").await;
    assert!(fits(server, "x4", "1500m").await && !fits(server, "x5", "1600m").await);

    // Not now, and never; the ledger has what was, whatever a report says.
    let waits = resize(server, "a", "3").await;
    assert_eq!(told(&waits), words(DEFERRED, "3", "1"));
    let condition = waits.condition(PENDING).expect("pending");
    assert_eq!(condition.message, "node n has no room now: cpu short by 500m");
    assert_eq!(condition.observed_generation, waits.meta().generation);
    carried_out(server, "a", "1").await;
    let object = server.objects().await.get(get("Pod", "default", "a")).await.expect("there").into_inner();
    assert_eq!(told(&Pod::try_from(object).expect("a pod")), words(DEFERRED, "3", "1"));
    assert!(fits(server, "x6", "1500m").await);
    assert_eq!(told(&resize(server, "a", "5").await), words(INFEASIBLE, "5", "1"));
    // Taken back.
    assert_eq!(told(&resize(server, "a", "1").await), words("", "1", "1"));
    assert!(fits(server, "x7", "1500m").await && !fits(server, "x8", "1600m").await);
}

#[tokio::test]
async fn a_wish_that_waits_is_granted_when_room_comes() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    register(server, node("n", "4", "1Gi", "110")).await;
    let (send, messages) = mpsc::channel(16);
    let hello = AgentHello { node: "n".into(), boot_id: "b".into(), agent_version: "t".into() };
    send.send(AgentMessage { message: Some(agent_message::Message::Hello(hello)) }).await.expect("room");
    let _session = server.nodes().await.session(ReceiverStream::new(messages)).await.expect("a session");
    let mut low = pod("low", "1", "1Mi");
    low.metadata.get_or_insert_default().labels.insert("app".into(), "low".into());
    let mut pods = Vec::new();
    for pod in [low, pod("high", "1", "1Mi"), pod("other", "2", "1Mi")] {
        let pod = create_pod(server, pod).await;
        assert_eq!(bind(server, &pod, "n").await.0, Code::Bound);
        pods.push(pod);
    }
    assert_eq!(told(&resize(server, "low", "3").await), words(DEFERRED, "3", "1"));
    let mut objects = server.objects().await;
    let force = minipod_proto::v1::DeleteRequest { grace_period_seconds: Some(0), ..delete("Pod", "default", "other") };
    objects.delete(force).await.expect("deleted");
    eventually("the wish is granted", || {
        let mut objects = objects.clone();
        async move {
            let object = objects.get(get("Pod", "default", "low")).await.expect("there").into_inner();
            let told = told(&Pod::try_from(object).expect("a pod"));
            if told == words("", "3", "3") { Ok(()) } else { Err(format!("{told:?}")) }
        }
    })
    .await;
    assert!(!fits(server, "x", "100m").await, "1 of 4 was left, and 2 are taken");
}

#[tokio::test]
async fn wishes_that_make_no_sense_are_refused() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    let made = create_pod(server, pod("a", "1", "1Mi")).await;
    let mut objects = server.objects().await;
    let uid = ResizeRequest { uid: "another".into(), ..wish("a", "2") };
    let stale = ResizeRequest { resource_version: "1".into(), ..wish("a", "2") };
    let nobody = ResizeRequest { containers: Vec::new(), ..wish("a", "2") };
    for (request, code, part) in [
        (wish("b", "2"), Grpc::NotFound, "default/b"),
        (uid, Grpc::FailedPrecondition, "uid"),
        (stale, Grpc::Aborted, "revision"),
        (nobody, Grpc::InvalidArgument, "containers: is missing"),
        (wish("a", "-2"), Grpc::InvalidArgument, "spec.containers[0].resources.requests.cpu"),
    ] {
        let status = objects.resize(request).await.expect_err(part);
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(part), "{status}");
    }
    let dry = ResizeRequest { dry_run: true, ..wish("a", "2") };
    let answer = Pod::try_from(objects.resize(dry).await.expect("fine").into_inner()).expect("a pod");
    assert_eq!(told(&answer).1, "2");
    let object = objects.get(get("Pod", "default", "a")).await.expect("there").into_inner();
    assert_eq!(object.meta().resource_version, made.meta().resource_version, "nothing was stored");
    // By an update it does not go, and the refusal says how it does.
    let mut changed = made.clone();
    changed.spec_mut().containers[0].resources.get_or_insert_default().requests.insert("cpu".into(), "2".into());
    let request = UpdateRequest { object: Some(changed.into()), dry_run: false };
    let status = objects.update(request).await.expect_err("refused");
    assert!(status.message().contains("minictl resize"), "{status}");
    assert_eq!(made.condition(IN_PROGRESS), None);
}
