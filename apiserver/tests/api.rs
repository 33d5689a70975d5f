//! Objects, bindings and their errors, against a real etcd.

mod support;

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, stream::FuturesUnordered};
use minipod_apiserver::{
    cache::{Cache, Limits, feed},
    registry::Registry,
    storage::Storage,
};
use minipod_daemon::{metrics::Registry as Metrics, shutdown::Shutdown};
use minipod_proto::v1::{
    BindBatchRequest, ConfigMap, CreateManyRequest, Namespace, Object, PatchRequest, Pod, PriorityClass,
    ReportUnschedulableRequest, UpdateRequest, WatchEvent, bind_batch_request::Item, bind_result::Code,
    report_unschedulable_request, watch_event::Type,
};
use support::*;
use tonic::{Code as Grpc, Status, Streaming};

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

fn patch(name: &str, json: &str) -> PatchRequest {
    PatchRequest {
        kind: "Pod".into(),
        namespace: "default".into(),
        name: name.into(),
        merge_patch: json.to_owned().into(),
        status: false,
    }
}

async fn next(events: &mut Streaming<WatchEvent>) -> WatchEvent {
    let event = tokio::time::timeout(Duration::from_secs(30), events.message()).await.expect("an event within 30 s");
    event.expect("the watch goes on").expect("an event")
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_in_one_call_each_is_made_or_refused_by_itself() {
    let cluster = Cluster::start().await;
    let mut objects = cluster.server.objects().await;
    objects.create(create(pod("taken", "100m", "64Mi"))).await.expect("created");
    let with = |change: fn(&mut Pod)| {
        let mut pod = pod("p", "100m", "64Mi");
        change(&mut pod);
        Object::from(pod)
    };
    let many = |objects: Vec<Object>, dry_run| CreateManyRequest { objects, dry_run };
    let mut request = many((0..300).map(|index| pod(&format!("p-{index}"), "100m", "64Mi").into()).collect(), false);
    let odd: [(Object, Grpc, &str); 5] = [
        (pod("taken", "100m", "64Mi").into(), Grpc::AlreadyExists, "Pod default/taken exists already"),
        (pod("p-0", "100m", "64Mi").into(), Grpc::AlreadyExists, "Pod default/p-0 exists already"),
        (with(|pod| pod.spec_mut().containers.clear()), Grpc::InvalidArgument, "spec.containers"),
        (with(|pod| pod.metadata.get_or_insert_default().namespace = "nowhere".into()), Grpc::NotFound, "nowhere"),
        (Object::default(), Grpc::InvalidArgument, "object: missing"),
    ];
    request.objects.extend(odd.iter().map(|(object, ..)| object.clone()));
    request.objects.push(with(|pod| {
        let meta = pod.metadata.get_or_insert_default();
        (meta.name, meta.generate_name) = (String::new(), "made-".into());
    }));

    let dry = CreateManyRequest { dry_run: true, ..request.clone() };
    let results = objects.create_many(dry).await.expect("tried").into_inner().results;
    assert!(results.iter().take(300).all(|result| result.code == 0 && result.resource_version.is_empty()));
    assert_eq!(objects.list(list("Pod")).await.expect("listed").into_inner().items.len(), 1, "nothing was stored");

    let results = objects.create_many(request).await.expect("tried").into_inner().results;
    assert_eq!(results.len(), 306);
    let stored = objects.list(list("Pod")).await.expect("listed").into_inner().items;
    assert_eq!(stored.len(), 302);
    let told = |name: &str| stored.iter().find(|object| object.meta().name == name).expect("stored").meta().clone();
    for (index, result) in results.iter().take(300).enumerate() {
        let (name, meta) = (format!("p-{index}"), told(&result.name));
        assert_eq!((result.code, &result.name, result.namespace.as_str()), (0, &name, "default"));
        assert_eq!((&result.uid, &result.resource_version), (&meta.uid, &meta.resource_version));
    }
    for ((_, code, words), result) in odd.iter().zip(&results[300..]) {
        assert_eq!(Grpc::from(result.code), *code, "{result:?}");
        assert!(result.message.contains(words) && result.uid.is_empty(), "{result:?}");
    }
    let made = &results[305];
    assert!(made.code == 0 && made.name.starts_with("made-") && told(&made.name).uid == made.uid, "{made:?}");

    let too_many = many(vec![Object::default(); 1_001], false);
    let status = objects.create_many(too_many).await.expect_err("too many");
    assert_eq!(status.code(), Grpc::InvalidArgument, "{status}");
    assert!(status.message().starts_with("objects: there are 1001 in one call, 1000 at the most"), "{status}");
    assert!(objects.create_many(many(Vec::new(), false)).await.expect("nothing").into_inner().results.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_by_name_and_stores_nothing() {
    let cluster = Cluster::start().await;
    let mut objects = cluster.server.objects().await;
    let before = objects.list(list("Pod")).await.expect("listed").into_inner().revision;
    let with = |change: fn(&mut Pod)| {
        let mut pod = pod("p", "100m", "64Mi");
        change(&mut pod);
        create(pod)
    };
    let requests = |pod: &mut Pod, cpu: &str| {
        let container = pod.spec_mut().containers.first_mut().expect("one");
        container.resources.get_or_insert_default().requests.insert("cpu".into(), cpu.into());
    };
    let mut negative = pod("p", "1", "1Mi");
    requests(&mut negative, "-1");
    let mut nonsense = pod("p", "1", "1Mi");
    requests(&mut nonsense, "1 apple");
    for (request, words) in [
        (with(|pod| pod.metadata.get_or_insert_default().name = "../../etc".into()), "metadata.name"),
        (with(|pod| pod.metadata.get_or_insert_default().namespace = "a/b".into()), "metadata.namespace"),
        (with(|pod| pod.metadata.get_or_insert_default().resource_version = "7".into()), "metadata.resourceVersion"),
        (with(|pod| pod.spec_mut().containers.clear()), "spec.containers"),
        (with(|pod| pod.spec_mut().priority_class_name = "nope".into()), "spec.priorityClassName"),
        (create(negative), "-1"),
        (create(nonsense), "1 apple"),
        (minipod_proto::v1::CreateRequest::default(), "object"),
        (create(Object::default()), "object"),
    ] {
        let status = objects.create(request).await.expect_err(words);
        assert_eq!(status.code(), Grpc::InvalidArgument, "{status}");
        assert!(status.message().contains(words), "{words} is not in: {}", status.message());
    }
    let lost = with(|pod| pod.metadata.get_or_insert_default().namespace = "nowhere".into());
    assert_eq!(objects.create(lost).await.expect_err("no namespace").code(), Grpc::NotFound);
    let elsewhere = with(|pod| pod.spec_mut().node_name = "nowhere".into());
    assert!(objects.create(elsewhere).await.expect_err("bound").message().starts_with("spec.nodeName: "));

    let status = objects.get(get("Pod", "default", "../nodes/n")).await.expect_err("walks");
    assert_eq!(status.code(), Grpc::InvalidArgument, "{status}");
    let status = objects.get(get("pod", "default", "p")).await.expect_err("no kind");
    assert!(status.message().starts_with("kind: \"pod\" is not known; it is one of Pod"), "{status}");
    let mut request = list("Pod");
    request.label_selector = "a in (b".into();
    assert!(objects.list(request).await.expect_err("no selector").message().starts_with("labelSelector: "));
    let mut request = list("Pod");
    request.field_selector = "spec.colour=red".into();
    assert!(objects.list(request).await.expect_err("no field").message().starts_with("fieldSelector: "));
    for token in ["x", "0/default/p", "5/../../x", "99999999999999999999/a"] {
        let mut request = list("Pod");
        request.r#continue = token.into();
        assert_eq!(objects.list(request).await.expect_err(token).code(), Grpc::InvalidArgument);
    }
    let large =
        with(|pod| drop(pod.metadata.get_or_insert_default().annotations.insert("a".into(), "x".repeat(5 << 20))));
    let status = objects.create(large).await.expect_err("too large");
    assert!(matches!(status.code(), Grpc::OutOfRange | Grpc::ResourceExhausted | Grpc::InvalidArgument), "{status}");

    let batch = |items| BindBatchRequest { items, mode: 0, scheduler: String::new() };
    let walking =
        Item { namespace: "default".into(), pod: "p".into(), uid: "u".into(), revision: 0, node: "../x".into() };
    let status = cluster.server.scheduling().await.bind_batch(batch(vec![walking])).await.expect_err("walks");
    assert!(status.message().starts_with("items[0].node: "), "{status}");
    let after = objects.list(list("Pod")).await.expect("the server is alive").into_inner();
    assert_eq!((after.items.len(), after.revision), (0, before), "nothing was stored");
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_compared_and_swapped() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    let mut objects = server.objects().await;
    let made = create_pod(server, pod("p", "100m", "64Mi")).await;
    assert_eq!(objects.create(create(pod("p", "1", "1Mi"))).await.expect_err("taken").code(), Grpc::AlreadyExists);
    let meta = made.metadata.clone().unwrap_or_default();
    assert_eq!((meta.generation, made.spec().priority, made.status().phase.as_str()), (1, Some(0), "Pending"));

    let labelled =
        objects.patch(patch("p", r#"{"metadata":{"labels":{"a":"b"}}}"#)).await.expect("patched").into_inner();
    assert_eq!((labelled.meta().labels["a"].as_str(), labelled.meta().generation), ("b", 1));
    let stale = UpdateRequest { object: Some(made.clone().into()), dry_run: false };
    let status = objects.update(stale.clone()).await.expect_err("stale");
    assert_eq!(status.code(), Grpc::Aborted, "{status}");
    let mut newest = Pod::try_from(labelled.clone()).expect("a pod");
    newest.spec_mut().containers.first_mut().expect("one").image = "minipod.local/busybox:2".into();
    newest.status_mut().phase = "Succeeded".into();
    let updated = objects.update(UpdateRequest { object: Some(newest.clone().into()), dry_run: false }).await;
    let updated = Pod::try_from(updated.expect("updated").into_inner()).expect("a pod");
    assert_eq!(updated.metadata.clone().unwrap_or_default().generation, 2, "the spec has changed");
    assert_eq!(updated.status().phase, "Pending", "a spec write leaves the status alone");

    let mut forbidden = updated.clone();
    forbidden.spec_mut().restart_policy = "Never".into();
    let status =
        objects.update(UpdateRequest { object: Some(forbidden.into()), dry_run: false }).await.expect_err("fixed");
    assert_eq!(status.code(), Grpc::InvalidArgument, "{status}");
    let mut other = updated.clone();
    other.metadata.get_or_insert_default().uid = "another".into();
    let status =
        objects.update(UpdateRequest { object: Some(other.into()), dry_run: false }).await.expect_err("another");
    assert_eq!(status.code(), Grpc::FailedPrecondition, "{status}");

    let mut reported = updated.clone();
    reported.status_mut().phase = "Running".into();
    reported.spec_mut().restart_policy = "Never".into();
    let reported = objects.update_status(UpdateRequest { object: Some(reported.into()), dry_run: false }).await;
    let reported = Pod::try_from(reported.expect("written").into_inner()).expect("a pod");
    assert_eq!((reported.status().phase.as_str(), reported.spec().restart_policy.as_str()), ("Running", "Always"));
    assert_eq!(reported.metadata.clone().unwrap_or_default().generation, 2, "a status write is no spec write");

    // A hundred patches at once: each is applied, none undoes another.
    let many = (0..100).map(|n| {
        let mut objects = objects.clone();
        async move { objects.patch(patch("p", &format!(r#"{{"metadata":{{"labels":{{"l{n}":"x"}}}}}}"#))).await }
    });
    let failed = futures_util::future::join_all(many).await.into_iter().filter_map(Result::err).count();
    let labels = objects.get(get("Pod", "default", "p")).await.expect("there").into_inner().meta().labels.len();
    assert_eq!(labels + failed, 101, "{failed} of 100 gave up");
    let status = objects.patch(patch("p", r#"{"metadata":{"resourceVersion":"1"}}"#)).await.expect_err("stale");
    assert_eq!(status.code(), Grpc::Aborted, "{status}");

    let mut dry = create(pod("dry", "1", "1Mi"));
    dry.dry_run = true;
    objects.create(dry).await.expect("it would do");
    assert_eq!(objects.get(get("Pod", "default", "dry")).await.expect_err("not made").code(), Grpc::NotFound);
    let mut generated = pod("", "1", "1Mi");
    generated.metadata.get_or_insert_default().generate_name = "job-".into();
    let name = create_pod(server, generated).await.metadata.unwrap_or_default().name;
    assert!(name.len() == 9 && name.starts_with("job-"), "{name}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_hold_one_revision_over_their_pages() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    let mut objects = server.objects().await;
    for n in 0..10 {
        let mut pod = pod(&format!("p{n}"), "1m", "1Mi");
        pod.metadata
            .get_or_insert_default()
            .labels
            .insert("parity".into(), if n % 2 == 0 { "even" } else { "odd" }.into());
        create_pod(server, pod).await;
    }
    let mut request = list("Pod");
    request.label_selector = "parity=even".into();
    request.limit = 2;
    let (mut names, mut revisions) = (Vec::new(), Vec::new());
    loop {
        let page = objects.list(request.clone()).await.expect("listed").into_inner();
        names.extend(page.items.iter().map(|pod| pod.meta().name.clone()));
        revisions.push(page.revision);
        if page.r#continue.is_empty() {
            break;
        }
        request.r#continue = page.r#continue;
        // What changes meanwhile is not in the later pages.
        let mut force = delete("Pod", "default", "p8");
        force.grace_period_seconds = Some(0);
        let _ = objects.delete(force).await;
    }
    assert_eq!(names, ["p0", "p2", "p4", "p6", "p8"]);
    revisions.dedup();
    assert_eq!(revisions.len(), 1, "{revisions:?}");
    let mut request = list("Pod");
    request.field_selector = "metadata.name=p3".into();
    assert_eq!(objects.list(request).await.expect("listed").into_inner().items.len(), 1);
    assert_eq!(objects.list(list("Pod")).await.expect("listed").into_inner().items.len(), 9);

    // More than a message takes: the server splits by itself.
    for n in 0..5 {
        let mut map = ConfigMap::default();
        let meta = map.metadata.get_or_insert_default();
        meta.name = format!("c{n}");
        meta.namespace = "default".into();
        map.data.insert("k".into(), "x".repeat(1_000_000));
        objects.create(create(map)).await.expect("made");
    }
    let page = objects.list(list("ConfigMap")).await.expect("listed").into_inner();
    assert!(page.items.len() < 5 && !page.r#continue.is_empty(), "{}", page.items.len());
    let mut rest = list("ConfigMap");
    rest.r#continue = page.r#continue;
    let rest = objects.list(rest).await.expect("listed").into_inner();
    assert_eq!(page.items.len() + rest.items.len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn namespace_default_is_there_for_the_first_who_needs_it() {
    let etcd = Etcd::start();
    let storage = Storage::connect(&[etcd.address()], 128).await.expect("an address");
    let (_trigger, shutdown) = Shutdown::manual();
    let metrics = Metrics::default();
    let cache = Cache::new(Limits::default(), &metrics);
    tokio::spawn(feed::follow(Arc::clone(&cache), storage.clone(), shutdown));
    // Nothing that runs beside the services is started: nobody else makes the namespace.
    let registry = Registry::new(storage, cache, &metrics);
    let made = registry.create(create(pod("first", "1m", "1Mi"))).await.expect("made");
    let namespace = registry.get(get("Namespace", "", "default")).await.expect("made with it");
    assert!(namespace.meta().resource_version < made.meta().resource_version, "{namespace:?}");
    let mut elsewhere = pod("second", "1m", "1Mi");
    elsewhere.metadata.get_or_insert_default().namespace = "absent".into();
    let error = registry.create(create(elsewhere)).await.expect_err("no other is made by itself");
    assert!(error.to_string().contains("Namespace absent does not exist"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_empty_themselves_and_take_nothing_new() {
    let cluster = Cluster::start().await;
    let mut objects = cluster.server.objects().await;
    let mut namespace = Namespace::default();
    namespace.metadata.get_or_insert_default().name = "team".into();
    objects.create(create(namespace)).await.expect("made");
    let member = |name: &str| {
        let mut pod = pod(name, "1m", "1Mi");
        pod.metadata.get_or_insert_default().namespace = "team".into();
        create(pod)
    };
    objects.create(member("a")).await.expect("made");
    let mut map = ConfigMap::default();
    let meta = map.metadata.get_or_insert_default();
    meta.name = "m".into();
    meta.namespace = "team".into();
    map.immutable = Some(true);
    map.data.insert("k".into(), "v".into());
    objects.create(create(map.clone())).await.expect("made");
    map.data.insert("k".into(), "w".into());
    let status =
        objects.update(UpdateRequest { object: Some(map.into()), dry_run: false }).await.expect_err("immutable");
    assert_eq!(status.code(), Grpc::InvalidArgument, "{status}");

    let status = objects.delete(delete("Namespace", "", "default")).await.expect_err("stays");
    assert_eq!(status.code(), Grpc::FailedPrecondition, "{status}");
    let marked = objects.delete(delete("Namespace", "", "team")).await.expect("marked").into_inner();
    assert!(!marked.gone);
    let refused = objects.create(member("b")).await.expect_err("refused");
    assert!(matches!(refused.code(), Grpc::FailedPrecondition | Grpc::NotFound), "{refused}");
    eventually("the namespace is gone", || {
        let mut objects = objects.clone();
        async move {
            match objects.get(get("Namespace", "", "team")).await {
                Err(status) if status.code() == Grpc::NotFound => Ok(()),
                other => Err(format!("{other:?}")),
            }
        }
    })
    .await;
    assert_eq!(objects.get(get("Pod", "team", "a")).await.expect_err("gone").code(), Grpc::NotFound);
    assert_eq!(objects.get(get("ConfigMap", "team", "m")).await.expect_err("gone").code(), Grpc::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn gangs_bind_whole_or_not_at_all() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    register(server, node("n1", "1", "1Gi", "10")).await;
    register(server, node("n2", "1", "1Gi", "10")).await;
    let mut pods = Vec::new();
    for n in 0..4 {
        pods.push(create_pod(server, pod(&format!("p{n}"), "600m", "64Mi")).await);
    }
    let mut scheduling = server.scheduling().await;
    let gang = |items: Vec<Item>| BindBatchRequest { items, mode: 1, scheduler: "t".into() };
    let request = gang(vec![item(&pods[0], "n1"), item(&pods[1], "n2"), item(&pods[2], "n1")]);
    let results = scheduling.bind_batch(request).await.expect("answered").into_inner().results;
    let codes: Vec<Code> = results.iter().map(|result| result.code()).collect();
    assert_eq!(codes, [Code::Gang, Code::Gang, Code::NoFit], "{results:?}");
    let request = gang(vec![item(&pods[0], "n1"), item(&pods[1], "n2")]);
    let results = scheduling.bind_batch(request.clone()).await.expect("answered").into_inner().results;
    assert!(results.iter().all(|result| result.code() == Code::Bound), "{results:?}");
    assert_eq!(results[0].revision, results[1].revision, "one transaction");
    let request = gang(vec![item(&pods[0], "n1"), item(&pods[3], "n2")]);
    let results = scheduling.bind_batch(request).await.expect("answered").into_inner().results;
    assert_eq!((results[0].code(), results[1].code()), (Code::AlreadyBound, Code::Gang), "{results:?}");
    let many = gang((0..200).map(|n| Item { pod: format!("q{n}"), ..item(&pods[3], "n1") }).collect());
    let status = scheduling.bind_batch(many).await.expect_err("too many");
    assert!(status.message().contains("the store takes 128"), "{status}");

    // Why the rest waits is told once, and the telling does not make the decision's revision stale.
    let report = report_unschedulable_request::Item {
        namespace: "default".into(),
        pod: "p2".into(),
        uid: pods[2].metadata.clone().unwrap_or_default().uid,
        reason: "Unschedulable".into(),
        message: "0/2 nodes are available".into(),
        outdated_nomination: String::new(),
    };
    let report = ReportUnschedulableRequest { items: vec![report], scheduler: "t".into() };
    let mut revisions = Vec::new();
    for _ in 0..2 {
        scheduling.report_unschedulable(report.clone()).await.expect("reported");
        let pod = server.objects().await.get(get("Pod", "default", "p2")).await.expect("there").into_inner();
        revisions.push(pod.meta().resource_version.clone());
    }
    assert_eq!(revisions[0], revisions[1], "the second report changes nothing");
    assert_ne!(revisions[0], pods[2].metadata.clone().unwrap_or_default().resource_version);
    let mut force = delete("Pod", "default", "p0");
    force.grace_period_seconds = Some(0);
    server.objects().await.delete(force).await.expect("deleted");
    let request = BindBatchRequest { items: vec![item(&pods[2], "n1")], mode: 0, scheduler: "t".into() };
    let results = scheduling.bind_batch(request).await.expect("answered").into_inner().results;
    assert_eq!(results[0].code(), Code::Bound, "{results:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn priorities_are_resolved_and_nodes_go() {
    let cluster = Cluster::start().await;
    let server = &cluster.server;
    let mut objects = server.objects().await;
    let mut class = PriorityClass { value: 7, ..PriorityClass::default() };
    class.metadata.get_or_insert_default().name = "high".into();
    objects.create(create(class)).await.expect("made");
    register(server, node("n1", "1", "1Gi", "10")).await;
    let mut urgent = pod("urgent", "700m", "1Mi");
    urgent.spec_mut().priority_class_name = "high".into();
    let urgent = eventually("the class is known", || {
        let (mut objects, request) = (objects.clone(), create(urgent.clone()));
        async move { objects.create(request).await.map_err(|status| status.to_string()) }
    })
    .await;
    let urgent = Pod::try_from(urgent.into_inner()).expect("a pod");
    assert_eq!(urgent.spec().priority, Some(7));
    let bind = |pod: &Pod| BindBatchRequest { items: vec![item(pod, "n1")], mode: 0, scheduler: "t".into() };
    let mut scheduling = server.scheduling().await;
    let results = scheduling.bind_batch(bind(&urgent)).await.expect("answered").into_inner().results;
    assert_eq!(results[0].code(), Code::Bound, "{results:?}");
    objects.delete(delete("Node", "", "n1")).await.expect("deleted");
    let later = create_pod(server, pod("later", "1m", "1Mi")).await;
    let results = scheduling.bind_batch(bind(&later)).await.expect("answered").into_inner().results;
    assert_eq!(results[0].code(), Code::NodeGone, "{results:?}");
    // The ledger outlives the node as long as a pod does: who comes back under the name finds what is still taken.
    register(server, node("n1", "1", "1Gi", "10")).await;
    let large = create_pod(server, pod("large", "400m", "1Mi")).await;
    let results = scheduling.bind_batch(bind(&large)).await.expect("answered").into_inner().results;
    assert_eq!((results[0].code(), results[0].message.as_str()), (Code::NoFit, "n1: cpu short by 100m"));
    objects.delete(delete("Node", "", "n1")).await.expect("deleted");
    let gone = objects.delete(delete("Pod", "default", "urgent")).await.expect("deleted").into_inner();
    assert!(gone.gone, "no agent is left that could report its end");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_pods_of_one_node_end_at_once_and_give_everything_back() {
    let cluster = Cluster::start().await;
    register(&cluster.server, node("n", "64", "1Gi", "110")).await;
    let names: Vec<String> = (0..64).map(|i| format!("p{i}")).collect();
    let mut pods = Vec::new();
    for name in &names {
        pods.push(create_pod(&cluster.server, pod(name, "1", "1Mi")).await);
    }
    let mut scheduling = cluster.server.scheduling().await;
    let mut bind = async |pods: &[Pod]| {
        let items = pods.iter().map(|pod| item(pod, "n")).collect();
        let request = BindBatchRequest { items, ..BindBatchRequest::default() };
        let answer = scheduling.bind_batch(request).await.expect("answered").into_inner();
        answer.results.into_iter().map(|result| result.code()).collect::<Vec<Code>>()
    };
    assert_eq!(bind(&pods).await, vec![Code::Bound; 64]);
    // Each changes the same ledger.
    let ends = names.iter().map(|name| {
        let server = &cluster.server;
        async move {
            let mut request = delete("Pod", "default", name);
            request.grace_period_seconds = Some(0);
            server.objects().await.delete(request).await.map(|answer| answer.into_inner().gone)
        }
    });
    let mut ends: FuturesUnordered<_> = ends.collect();
    while let Some(end) = ends.next().await {
        assert!(end.expect("it ends, however many do"));
    }
    let whole = create_pod(&cluster.server, pod("whole", "64", "1Gi")).await;
    assert_eq!(bind(&[whole]).await, [Code::Bound], "the node is as empty as at first");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_outlives_the_store_and_watches_go_on() {
    let mut cluster = Cluster::start().await;
    let mut objects = cluster.server.objects().await;
    create_pod(&cluster.server, pod("before", "1m", "1Mi")).await;
    let mut events = objects.watch(watch("Pod", 0)).await.expect("watch").into_inner();
    assert_eq!(next(&mut events).await.object.expect("object").meta().name, "before");
    assert_eq!(next(&mut events).await.r#type(), Type::Bookmark);
    cluster.etcd.kill();
    let status: Status = objects.get(get("Pod", "default", "before")).await.expect_err("no store");
    assert_eq!(status.code(), Grpc::Unavailable, "{status}");
    assert!(status.message().contains("the store cannot be reached"), "{status}");
    let mut stale = list("Pod");
    stale.allow_stale = true;
    assert_eq!(objects.list(stale).await.expect("from the cache").into_inner().items.len(), 1);
    cluster.etcd.run();
    eventually("the store is reached again", || {
        let mut objects = objects.clone();
        async move { objects.create(create(pod("after", "1m", "1Mi"))).await.map(drop).map_err(|status| status.to_string()) }
    })
    .await;
    let event = next(&mut events).await;
    assert_eq!((event.r#type(), event.object.expect("object").meta().name.as_str()), (Type::Added, "after"));
}

#[tokio::test(flavor = "multi_thread")]
async fn watches_are_resumed_by_another_server_until_the_past_is_compacted() {
    let cluster = Cluster::start().await;
    let mut objects = cluster.server.objects().await;
    let mut events = objects.watch(watch("Pod", 0)).await.expect("watch").into_inner();
    let start = next(&mut events).await.revision;
    for name in ["a", "b", "c"] {
        create_pod(&cluster.server, pod(name, "1m", "1Mi")).await;
    }
    assert_eq!(next(&mut events).await.object.expect("object").meta().name, "a");

    let second = Server::start(config(&cluster.etcd)).await;
    let mut resumed = second.objects().await.watch(watch("Pod", start)).await.expect("watch").into_inner();
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(next(&mut resumed).await.object.expect("object").meta().name.clone());
    }
    assert_eq!(seen, ["a", "b", "c"], "the past of before its start");
    // Written through one, seen through the other.
    create_pod(&second, pod("d", "1m", "1Mi")).await;
    assert_eq!(objects.list(list("Pod")).await.expect("listed").into_inner().items.len(), 4, "lists are linearizable");

    let storage =
        minipod_apiserver::storage::Storage::connect(&[cluster.etcd.address()], 128).await.expect("the store");
    let now = storage.revision().await.expect("its revision");
    storage.compact(now).await.expect("compacted");
    let third = Server::start(config(&cluster.etcd)).await;
    let refused = third.objects().await.watch(watch("Pod", start)).await.expect_err("too old");
    assert_eq!(refused.code(), Grpc::OutOfRange, "{refused}");
    assert!(refused.message().contains(&format!("oldest resumable revision is {now}")), "{refused}");
    let mut page = list("Pod");
    page.limit = 1;
    page.r#continue = format!("{start}/default/a");
    let refused = objects.list(page).await.expect_err("too old");
    assert_eq!(refused.code(), Grpc::OutOfRange, "{refused}");
    second.stop().await;
    third.stop().await;
}
