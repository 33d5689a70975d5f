//! Creates of many callers share transactions of the store, and each has its own end.

mod support;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use minipod_proto::v1::{Namespace, Object, Pod, watch_event::Type};
use support::*;
use tokio::task::JoinSet;
use tonic::{Code, Status};

/// Creates one pod for each name, all at once, spread over the servers; what each call came to, in order.
async fn create_all(servers: &[&Server], names: &[(String, String)]) -> Vec<Result<Object, Status>> {
    let mut channels = Vec::new();
    for server in servers {
        channels.push(server.objects().await);
    }
    let mut calls = JoinSet::new();
    for (index, (namespace, name)) in names.iter().enumerate() {
        let mut api = channels[index % channels.len()].clone();
        let mut pod = pod(name, "1m", "1Mi");
        pod.metadata.get_or_insert_default().namespace.clone_from(namespace);
        calls.spawn(async move { (index, api.create(create(pod)).await.map(tonic::Response::into_inner)) });
    }
    let mut ends: Vec<Option<Result<Object, Status>>> = names.iter().map(|_| None).collect();
    while let Some(call) = calls.join_next().await {
        let (index, end) = call.expect("the call ends");
        assert!(ends[index].replace(end).is_none(), "call {index} ended twice");
    }
    ends.into_iter().map(|end| end.expect("every call has an end")).collect()
}

fn in_default(names: impl IntoIterator<Item = String>) -> Vec<(String, String)> {
    names.into_iter().map(|name| ("default".to_owned(), name)).collect()
}

/// By name of every pod that the store has: the revision of its creation and its uid. Fails where one was made twice.
async fn made(cluster: &Cluster) -> BTreeMap<String, (i64, String)> {
    let mut made = BTreeMap::new();
    for (revision, events) in cluster.history().await {
        for event in events {
            let key = String::from_utf8(event.key).expect("text");
            let (Some(name), Some(value)) = (key.strip_prefix("/minipod/pods/"), event.value) else { continue };
            let pod = <Pod as prost::Message>::decode(value.as_slice()).expect("a pod");
            let uid = pod.metadata.expect("metadata").uid;
            assert!(made.insert(name.to_owned(), (revision, uid)).is_none(), "{name} was written twice");
        }
    }
    made
}

/// Holds answers against the store: what was acknowledged is there as it was answered, what was refused is not by this call.
fn hold_against(made: &BTreeMap<String, (i64, String)>, names: &[(String, String)], ends: &[Result<Object, Status>]) {
    for ((namespace, name), end) in names.iter().zip(ends) {
        let Ok(object) = end else { continue };
        let (revision, uid) = &made[&format!("{namespace}/{name}")];
        assert_eq!(&object.meta().uid, uid, "{name}: the answer is of another one");
        assert_eq!(object.meta().name, *name);
        assert_eq!(object.meta().resource_version, revision.to_string(), "{name}");
    }
}

fn codes(ends: &[Result<Object, Status>]) -> HashMap<Code, usize> {
    let mut codes = HashMap::new();
    for end in ends {
        *codes.entry(end.as_ref().map_or_else(Status::code, |_| Code::Ok)).or_insert(0) += 1;
    }
    codes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_taken_costs_the_others_nothing() {
    let cluster = Cluster::start().await;
    for index in 0..20 {
        create_pod(&cluster.server, pod(&format!("taken-{index}"), "1m", "1Mi")).await;
    }
    let mut watch = cluster.server.objects().await.watch(watch("Pod", 0)).await.expect("a watch").into_inner();
    // Names that are taken among others, and names that come several times.
    let names = in_default((0..400).map(|index| match index % 10 {
        0 => format!("taken-{}", index / 20),
        1 => format!("twice-{}", index / 40),
        _ => format!("new-{index}"),
    }));
    let ends = create_all(&[&cluster.server], &names).await;
    let made = made(&cluster).await;
    hold_against(&made, &names, &ends);
    for ((_, name), end) in names.iter().zip(&ends) {
        match end {
            Ok(_) => assert!(!name.starts_with("taken"), "{name} was made twice"),
            Err(status) => {
                assert_eq!(status.code(), Code::AlreadyExists, "{name}: {status}");
                assert!(!name.starts_with("new"), "{name}: {status}");
                assert!(status.message().contains(name.as_str()), "{name}: {status}");
            }
        }
    }
    // Of the 40 calls for 10 names, one each.
    assert_eq!(codes(&ends), [(Code::Ok, 320 + 10), (Code::AlreadyExists, 40 + 30)].into());
    let revisions: BTreeSet<i64> = made.values().map(|(revision, _)| *revision).collect();
    assert!(
        revisions.len() < made.len() / 2,
        "{} pods at {} revisions: nothing was gathered",
        made.len(),
        revisions.len()
    );

    // Whoever watches sees each once, in the order of revisions, and is told where to resume only when a revision is complete.
    let (mut seen, mut last) = (BTreeMap::new(), 0);
    while seen.len() < made.len() {
        let next = tokio::time::timeout(Duration::from_secs(10), watch.message()).await;
        let event = next.expect("the next event comes").expect("the watch lives").expect("it goes on");
        if event.r#type() != Type::Added {
            continue;
        }
        let object = event.object.expect("an object");
        let revision: i64 = object.meta().resource_version.parse().expect("a number");
        assert!(event.revision == 0 || revision >= last, "{} of {revision} comes after {last}", object.meta().name);
        last = if event.revision == 0 { 0 } else { revision };
        assert!(event.revision == 0 || event.revision == revision || event.revision == revision - 1);
        assert!(seen.insert(object.key(), (revision, object.meta().uid.clone())).is_none(), "{} twice", object.key());
    }
    assert_eq!(seen, made);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_servers_that_make_the_same_names_at_once_one_makes_each() {
    let cluster = Cluster::start().await;
    let other = Server::start(config(&cluster.etcd)).await;
    // Each name once at each server, in the same order: their transactions meet name by name.
    let names = in_default((0..300).map(|index| format!("pod-{}", index / 2)));
    let ends = create_all(&[&cluster.server, &other], &names).await;
    hold_against(&made(&cluster).await, &names, &ends);
    assert_eq!(codes(&ends), [(Code::Ok, 150), (Code::AlreadyExists, 150)].into());
    for pair in ends.chunks(2) {
        assert_eq!(pair.iter().filter(|end| end.is_ok()).count(), 1);
    }
    other.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_goes_takes_nobody_elses_creates_with_it() {
    let cluster = Cluster::start().await;
    let mut api = cluster.server.objects().await;
    let mut namespace = Namespace::default();
    namespace.metadata.get_or_insert_default().name = "going".into();
    api.create(create(namespace)).await.expect("the namespace");
    let names: Vec<(String, String)> = (0..400)
        .map(|index| (if index % 2 == 0 { "default" } else { "going" }.to_owned(), format!("pod-{index}")))
        .collect();
    let deleting = async {
        let mut api = cluster.server.objects().await;
        api.delete(delete("Namespace", "", "going")).await.expect("it is deleted")
    };
    let servers = [&cluster.server];
    let (ends, _) = tokio::join!(create_all(&servers, &names), deleting);
    for ((namespace, name), end) in names.iter().zip(&ends) {
        match end {
            Ok(_) => {}
            Err(status) => {
                assert_eq!(namespace, "going", "{name}: {status}");
                assert!(matches!(status.code(), Code::FailedPrecondition | Code::NotFound), "{name}: {status}");
            }
        }
    }
    assert!(ends.iter().any(Result::is_err), "the namespace went after all creates: nothing was tried");
    // What got in before the mark is emptied with it: nothing is left behind in a namespace that is not there.
    eventually("the namespace is gone", || async {
        let mut api = cluster.server.objects().await;
        match api.get(get("Namespace", "", "going")).await {
            Err(status) if status.code() == Code::NotFound => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    let left = api.list(list("Pod")).await.expect("a list").into_inner().items;
    assert_eq!(left.len(), 200);
    assert!(left.iter().all(|object| object.meta().namespace == "default"));
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_store_goes_away_every_call_has_one_end() {
    let mut cluster = Cluster::start().await;
    create_pod(&cluster.server, pod("first", "1m", "1Mi")).await;
    // Many times what the transactions under way carry, on several connections, so that some wait behind them.
    let names = in_default((0..2_000).map(|index| format!("pod-{index}")));
    let mut channels = Vec::new();
    for _ in 0..4 {
        channels.push(cluster.server.objects().await);
    }
    let mut calls = JoinSet::new();
    for (index, (_, name)) in names.iter().enumerate() {
        let (mut api, pod) = (channels[index % channels.len()].clone(), pod(name, "1m", "1Mi"));
        calls.spawn(async move { (index, api.create(create(pod)).await.map(tonic::Response::into_inner)) });
    }
    let mut ends: Vec<Option<Result<Object, Status>>> = names.iter().map(|_| None).collect();
    let begun = Instant::now();
    while let Some(call) = calls.join_next().await {
        let (index, end) = call.expect("the call ends");
        if end.is_ok() && cluster.etcd.is_running() {
            cluster.etcd.kill();
        }
        assert!(ends[index].replace(end).is_none(), "call {index} ended twice");
    }
    // Two transactions that wait for the store, one after the other, are the longest way.
    assert!(begun.elapsed() < Duration::from_secs(40), "the last answer came after {:?}", begun.elapsed());
    let ends: Vec<Result<Object, Status>> = ends.into_iter().map(|end| end.expect("an end")).collect();
    let codes = codes(&ends);
    assert!(codes.keys().all(|code| matches!(code, Code::Ok | Code::Unavailable)), "{codes:?}");
    assert!(codes.contains_key(&Code::Unavailable), "{codes:?}: the store was not away in time");

    cluster.etcd.run();
    let made = made(&cluster).await;
    hold_against(&made, &names, &ends);
    // The server goes on: whoever was told that nothing is certain finds out by trying again.
    let mut api = cluster.server.objects().await;
    for ((namespace, name), _) in names.iter().zip(&ends).filter(|(_, end)| end.is_err()).take(20) {
        let there = made.contains_key(&format!("{namespace}/{name}"));
        let mut unsure = false;
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match api.create(create(pod(name, "1m", "1Mi"))).await.map_err(|status| status.code()) {
                Ok(_) if !there => break,
                Err(Code::AlreadyExists) if there || unsure => break,
                Err(Code::Unavailable) if Instant::now() < deadline => unsure = true,
                other => panic!("{name}, which was there: {there}: {other:?}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
