//! Objects, bindings and their errors, against a real etcd.

mod support;

use minipod_proto::v1::{BindBatchRequest, Pod, bind_batch_request::Item, bind_result::Code, watch_event::Type};
use support::*;

fn item(pod: &Pod, node: &str) -> Item {
    let meta = pod.metadata.clone().unwrap_or_default();
    Item {
        namespace: meta.namespace,
        pod: meta.name,
        uid: meta.uid,
        revision: meta.resource_version.parse().unwrap_or(0),
        node: node.into(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn create_list_watch_bind() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    let mut objects = server.objects().await;
    let registered = register(server, node("n1", "2", "1Gi", "10")).await;
    assert_eq!(registered.pod_cidr, "10.42.0.0/24");

    let mut events = objects.watch(watch("Pod", 0)).await.expect("watch").into_inner();
    let bookmark = events.message().await.expect("stream").expect("an event");
    assert_eq!(bookmark.r#type(), Type::Bookmark);

    let small = create_pod(server, pod("small", "1", "256Mi")).await;
    let large = create_pod(server, pod("large", "1500m", "256Mi")).await;
    for name in ["small", "large"] {
        let event = events.message().await.expect("stream").expect("an event");
        assert_eq!((event.r#type(), event.object.expect("object").meta().name.as_str()), (Type::Added, name));
    }

    let request =
        BindBatchRequest { items: vec![item(&small, "n1"), item(&large, "n1")], mode: 0, scheduler: "t".into() };
    let results = server.scheduling().await.bind_batch(request.clone()).await.expect("bind").into_inner().results;
    assert_eq!(results[0].code(), Code::Bound, "{results:?}");
    assert_eq!(results[1].code(), Code::NoFit, "{results:?}");
    assert_eq!(results[1].message, "n1: cpu short by 500m");
    let event = events.message().await.expect("stream").expect("an event");
    assert_eq!((event.r#type(), event.revision), (Type::Modified, results[0].revision));
    assert_eq!(event.object.expect("object").as_pod().and_then(Pod::node_name), Some("n1"));

    let again = server.scheduling().await.bind_batch(request).await.expect("bind").into_inner().results;
    assert_eq!((again[0].code(), again[0].node.as_str()), (Code::AlreadyBound, "n1"), "{again:?}");
}
