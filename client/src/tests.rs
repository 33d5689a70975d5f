//! The client against a fake API server on the loopback interface.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use minipod_proto::v1::{ExecStart, ImageLoadStart, LogsRequest, Node, Pod};
use minipod_proto::{Kind, Resource};
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;

use crate::cache::{Cache, Delta, Deltas, Reflector};
use crate::fake::Fake;
use crate::{ChangeKind, Client, ClientError, DeleteOptions, ExecOutput, Options, Query};

fn pod(name: &str) -> Pod {
    let mut pod = Pod::default();
    (pod.meta_mut().name, pod.meta_mut().namespace) = (name.into(), "default".into());
    pod
}

fn labelled(name: &str, value: &str) -> Pod {
    let mut pod = pod(name);
    pod.meta_mut().labels.insert("app".into(), value.into());
    pod
}

async fn fake() -> (Fake, Client) {
    let fake = Fake::start().await.expect("a port on the loopback interface");
    let client = fake.client().expect("its own address");
    (fake, client)
}

/// Waits until `look` returns nothing more to complain about, and fails with the last complaint.
async fn eventually(mut look: impl FnMut() -> Option<String>) {
    let late = Instant::now() + Duration::from_secs(60);
    while let Some(complaint) = look() {
        assert!(Instant::now() < late, "still after 60 s: {complaint}");
        sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn many_are_created_with_few_calls_and_each_has_its_own_answer() {
    let (fake, client) = fake().await;
    client.create(pod("p-700")).await.unwrap();
    let before = fake.calls("create_many");
    let pods = (0..1_200).map(|index| pod(&format!("p-{index}")).into()).collect();
    let results = client.create_many(pods, false).await;
    assert_eq!(results.len(), 1_200);
    for (index, result) in results.iter().enumerate() {
        match result {
            Ok(created) => {
                assert!(index != 700 && created.name == format!("p-{index}") && created.namespace == "default");
                assert!(!created.uid.is_empty() && !created.resource_version.is_empty());
            }
            Err(error) => {
                assert!(index == 700 && error.is_already_exists(), "{index}: {error}");
                assert!(error.to_string().contains("p-700"), "{error}");
            }
        }
    }
    assert_eq!(fake.calls("create_many") - before, 3, "500 in a call");
    fake.fail_next(&[Code::PermissionDenied]);
    let results = client.create_many(vec![pod("x").into(), pod("y").into()], false).await;
    assert!(results.len() == 2 && results.iter().all(|result| matches!(result, Err(ClientError::Denied { .. }))));
    assert!(client.create_many(Vec::new(), false).await.is_empty());
}

#[tokio::test]
async fn calls_of_every_sort() {
    let (fake, client) = fake().await;
    let created = client.create(labelled("a", "web")).await.unwrap();
    assert!(!created.uid().is_empty() && created.revision() > 0);
    assert!(client.create(pod("a")).await.unwrap_err().is_already_exists());
    assert_eq!(client.get::<Pod>("default", "a").await.unwrap(), created);

    let mut changed = created.clone();
    changed.spec_mut().node_name = "node-a".into();
    changed.status_mut().phase = "Running".into();
    let updated = client.update(changed.clone()).await.unwrap();
    assert_eq!((updated.node_name(), updated.status().phase.as_str()), (Some("node-a"), ""));
    assert!(client.update(changed.clone()).await.unwrap_err().is_conflict(), "the revision is stale");
    changed.meta_mut().resource_version.clear();
    changed.spec_mut().node_name = "elsewhere".into();
    let updated = client.update_status(changed).await.unwrap();
    assert_eq!((updated.node_name(), updated.status().phase.as_str()), (Some("node-a"), "Running"));
    let patched = client.patch::<Pod>("default", "a", r#"{"metadata":{"labels":{"app":null,"x":"y"}}}"#).await.unwrap();
    assert_eq!(patched.meta().labels, BTreeMap::from([("x".to_owned(), "y".to_owned())]));

    let wrong = DeleteOptions { uid: "other".into(), ..DeleteOptions::default() };
    assert!(matches!(client.delete::<Pod>("default", "a", &wrong).await, Err(ClientError::Refused { .. })));
    let (marked, gone) = client.delete::<Pod>("default", "a", &DeleteOptions::default()).await.unwrap();
    assert!(marked.is_terminating() && !gone);
    let force = DeleteOptions { grace_seconds: Some(0), ..DeleteOptions::default() };
    assert!(client.delete::<Pod>("default", "a", &force).await.unwrap().1);
    assert!(client.get::<Pod>("default", "a").await.unwrap_err().is_not_found());
    assert_eq!(fake.stored(Kind::Pod, "default/a"), None);
}

#[tokio::test]
async fn errors_say_what_was_done_and_what_to_do() {
    let (fake, client) = fake().await;
    let error = client.get::<Pod>("default", "nope").await.unwrap_err();
    assert_eq!(error.to_string(), r#"get Pod default/nope: Pod "default/nope" not found"#);
    let error = client.list::<Pod>(&Query::all().with_fields("spec.colour=red")).await.unwrap_err();
    assert!(matches!(&error, ClientError::Invalid { problems, .. } if problems.len() == 1), "{error}");
    assert!(error.to_string().contains("spec.colour"), "{error}");
    let address = fake.url();
    drop(fake);
    let error = client.create(pod("a")).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    let error = Client::new(&Options::servers("127.0.0.1:1")).unwrap().create(pod("a")).await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("http://127.0.0.1:1") && error.hint().is_some(), "{error} ({address})");
    for bad in ["ftp://x", "http://", "https://x:1", "a b"] {
        let error = Client::new(&Options::servers(bad)).unwrap_err();
        assert!(matches!(error, ClientError::Address { .. }), "{bad}: {error}");
    }
    assert!(Client::new(&Options::servers(" , ")).is_err());
}

#[tokio::test]
async fn lists_have_all_pages_at_one_revision() {
    let (fake, client) = fake().await;
    for index in 0..25 {
        fake.put(labelled(&format!("p{index:02}"), if index % 2 == 0 { "even" } else { "odd" }));
    }
    fake.page(4);
    let list = client.list::<Pod>(&Query::namespace("default")).await.unwrap();
    assert_eq!((list.items.len(), list.revision), (25, fake.revision()));
    assert_eq!(fake.calls("list"), 7);
    assert_eq!(client.list::<Pod>(&Query::all().with_labels("app=odd")).await.unwrap().items.len(), 12);
    assert_eq!(client.list::<Pod>(&Query::namespace("other")).await.unwrap().items.len(), 0);
}

#[tokio::test]
async fn a_watch_tells_changes_in_order() {
    let (fake, client) = fake().await;
    fake.put(labelled("a", "web"));
    let mut watch = client.watch::<Pod>(&Query::all().with_labels("app=web"), 0).await.unwrap();
    fake.put(pod("ignored"));
    fake.put(labelled("a", "other"));
    fake.put(labelled("a", "web"));
    fake.remove(Kind::Pod, "default/a");
    let mut seen = Vec::new();
    while seen.len() < 5 {
        let change = timeout(Duration::from_secs(5), watch.next()).await.expect("five events").unwrap().unwrap();
        seen.push(match change.kind {
            ChangeKind::Added(pod) => format!("+{}", pod.name()),
            ChangeKind::Modified(pod) => format!("~{}", pod.name()),
            ChangeKind::Deleted(pod) => format!("-{}", pod.name()),
            ChangeKind::Bookmark => "bookmark".to_owned(),
        });
    }
    assert_eq!(seen, ["+a", "bookmark", "-a", "+a", "-a"]);
    fake.break_streams();
    assert!(matches!(watch.next().await, Err(ClientError::Unavailable { .. })));
    fake.compact();
    assert!(client.watch::<Pod>(&Query::all(), 2).await.unwrap_err().is_expired());
}

#[tokio::test]
async fn a_lost_server_is_left_for_the_next_one() {
    let (fake, _) = fake().await;
    fake.put(pod("a"));
    let options = Options::servers(&format!("127.0.0.1:1,{}", fake.url()));
    let client = Client::new(&options).unwrap();
    // Also writes: the first server was never reached.
    client.create(pod("b")).await.unwrap();
    assert_eq!(client.list::<Pod>(&Query::all()).await.unwrap().items.len(), 2);
    // A read is tried again when the server says that it is not there; a write is not.
    fake.fail_next(&[Code::Unavailable]);
    let options = Options::servers(&format!("{},{}", fake.url(), fake.url().replace("127.0.0.1", "localhost")));
    let client = Client::new(&options).unwrap();
    client.get::<Pod>("default", "a").await.unwrap();
    fake.fail_next(&[Code::Unavailable]);
    let error = client.create(pod("c")).await.unwrap_err();
    assert!(matches!(error, ClientError::Unavailable { .. }), "{error:?}");
    assert_eq!(fake.stored(Kind::Pod, "default/c"), None);
    // When all are away for a moment, they are asked again, also by a request that can be sent but once.
    let address = fake.address();
    let client = Client::new(&Options::servers(&format!("127.0.0.1:1,{address}"))).unwrap();
    drop(fake);
    // Its listener ends a moment later; until then it takes requests and answers none.
    while tokio::net::TcpStream::connect(address).await.is_ok() {
        sleep(Duration::from_millis(10)).await;
    }
    let back = tokio::spawn(async move {
        sleep(Duration::from_millis(200)).await;
        let mut started = Fake::start_on(address).await;
        while started.is_err() {
            sleep(Duration::from_millis(10)).await;
            started = Fake::start_on(address).await;
        }
        started.unwrap()
    });
    client.create(pod("d")).await.unwrap();
    let fake = back.await.unwrap();
    assert!(fake.stored(Kind::Pod, "default/d").is_some());
    let mut node = Node::default();
    node.meta_mut().name = "node-a".into();
    fake.put(node);
    let client = Client::new(&Options::servers(&format!("127.0.0.1:1,{address}"))).unwrap();
    let pieces: Vec<io::Result<Bytes>> = vec![Ok(Bytes::from_static(b"whole"))];
    let summary = client.load_image(ImageLoadStart::default(), stream::iter(pieces)).await.unwrap();
    assert_eq!(summary.nodes.len(), 1, "an upload that cannot be begun twice goes to a server that is there");
}

#[tokio::test]
async fn a_silent_server_is_given_up() {
    // It accepts connections and says nothing.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let options = Options { request_timeout: Duration::from_millis(200), ..Options::servers(&address) };
    let client = Client::new(&options).unwrap();
    let error = client.get::<Pod>("default", "a").await.unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error:?}");
}

#[tokio::test]
async fn requests_go_to_a_server_that_answers() {
    // One that is stopped: its kernel takes connections and requests.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (fake, _) = fake().await;
    let client = Client::new(&Options::servers(&format!("{},{}", listener.local_addr().unwrap(), fake.url()))).unwrap();
    client.create(pod("a")).await.unwrap();
    assert!(fake.stored(Kind::Pod, "default/a").is_some());
    drop(listener);
}

/// Follows deltas like somebody who builds a state of their own from them alone.
struct Follower {
    deltas: Deltas<Pod>,
    state: BTreeMap<String, (String, i64)>,
}

impl Follower {
    fn drain(&mut self) {
        while let Some(delta) = self.deltas.try_next() {
            match delta {
                Delta::Added(pod) => {
                    let old = self.state.insert(pod.key(), (pod.uid().into(), pod.revision()));
                    assert_eq!(old, None, "added twice: {}", pod.key());
                }
                Delta::Modified { old, new } => {
                    let known = self.state.insert(new.key(), (new.uid().into(), new.revision()));
                    assert_eq!(known, Some((old.uid().into(), old.revision())), "the old state is the one told before");
                    assert!(new.revision() > old.revision());
                }
                Delta::Deleted(pod) => {
                    let known = self.state.remove(&pod.key()).expect("deleted what was told before");
                    assert_eq!(known.0, pod.uid());
                }
                Delta::Synced { .. } => {}
            }
        }
    }
}

fn content(cache: &Cache<Pod>) -> BTreeMap<String, (String, i64)> {
    cache.list().iter().map(|pod| (pod.key(), (pod.uid().to_owned(), pod.revision()))).collect()
}

fn truth(fake: &Fake) -> BTreeMap<String, (String, i64)> {
    let pods = (0..40).filter_map(|index| fake.stored(Kind::Pod, &format!("default/p{index}")));
    let pods = pods.filter_map(|object| object.as_pod().cloned());
    pods.map(|pod| (pod.key(), (pod.uid().to_owned(), pod.revision()))).collect()
}

/// xorshift: the same disorder in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

#[tokio::test]
async fn the_cache_and_its_deltas_agree_with_the_server_whatever_breaks() {
    futures_util::future::join_all((1..=4).map(disorder)).await;
}

async fn disorder(seed: u64) {
    let (fake, client) = fake().await;
    fake.page(7);
    let (cache, deltas) = Reflector::<Pod>::new(&client, Query::all()).start_with_deltas();
    let mut follower = Follower { deltas, state: BTreeMap::new() };
    let mut dice = Dice(seed);
    for _ in 0..600 {
        let name = format!("p{}", dice.roll(40));
        match dice.roll(100) {
            0..60 => drop(fake.put(pod(&name))),
            60..85 => fake.remove(Kind::Pod, &format!("default/{name}")),
            85..88 => fake.break_streams(),
            88..90 => fake.compact(),
            90..91 => fake.fail_next(&[Code::Internal]),
            91..92 => fake.lag(Duration::from_micros(dice.roll(300))),
            _ => sleep(Duration::from_millis(dice.roll(20))).await,
        }
        follower.drain();
    }
    fake.heal();
    eventually(|| {
        follower.drain();
        let (truth, content) = (truth(&fake), content(&cache));
        (truth != content || truth != follower.state).then(|| {
            let (cached, followed) = (content.len(), follower.state.len());
            format!("seed {seed}: {} there, {cached} cached, {followed} followed", truth.len())
        })
    })
    .await;
    assert!(cache.is_synced() && cache.trouble().is_none());
    assert_eq!(cache.get("default/p0").is_some(), truth(&fake).contains_key("default/p0"));
}

#[tokio::test]
async fn the_cache_survives_a_restart_of_its_server() {
    let (fake, client) = fake().await;
    fake.put(pod("a"));
    fake.put(pod("b"));
    let cache = Reflector::<Pod>::new(&client, Query::all()).start();
    timeout(Duration::from_secs(5), cache.synced()).await.expect("the first list");
    assert_eq!(cache.len(), 2);
    let address = fake.address();
    drop(fake);
    eventually(|| cache.trouble().is_none().then(|| "no trouble is told".to_owned())).await;
    assert_eq!(cache.len(), 2, "what is known stays known");
    // A server with another history: its revision is older than the one that the cache asks for.
    let mut started = Fake::start_on(address).await;
    let late = Instant::now() + Duration::from_secs(10);
    while started.is_err() && Instant::now() < late {
        sleep(Duration::from_millis(10)).await;
        started = Fake::start_on(address).await;
    }
    let fake = started.expect("the port is free again");
    for _ in 0..10 {
        fake.put(pod("c"));
    }
    fake.compact();
    fake.put(pod("c"));
    eventually(|| {
        let keys: Vec<String> = cache.list().iter().map(|pod| pod.key()).collect();
        (keys != ["default/c"]).then(|| format!("{keys:?}, trouble {:?}", cache.trouble()))
    })
    .await;
}

#[tokio::test]
async fn a_slow_subscriber_loses_nothing() {
    let (fake, client) = fake().await;
    let (cache, deltas) = Reflector::<Pod>::new(&client, Query::all()).start_with_deltas();
    let mut follower = Follower { deltas, state: BTreeMap::new() };
    cache.synced().await;
    for round in 0..(2 * crate::cache::SUBSCRIBER_QUEUE) {
        fake.put(pod(&format!("p{}", round % 40)));
    }
    // Nobody reads: the reflector stands still with a full queue.
    sleep(Duration::from_millis(100)).await;
    eventually(|| {
        follower.drain();
        (follower.state != truth(&fake)).then(|| format!("{} of {} followed", follower.state.len(), truth(&fake).len()))
    })
    .await;
}

#[tokio::test]
async fn dropping_the_handles_ends_the_task() {
    let (fake, client) = fake().await;
    let (cache, deltas) = Reflector::<Pod>::new(&client, Query::all()).start_with_deltas();
    eventually(|| (fake.calls("watch") == 0).then(|| "nobody watches yet".to_owned())).await;
    drop(cache);
    drop(deltas);
    let calls = fake.calls("watch");
    fake.break_streams();
    sleep(Duration::from_millis(300)).await;
    assert_eq!(fake.calls("watch"), calls, "nobody watches any more");
}

#[tokio::test]
async fn logs_come_in_pieces() {
    let (fake, client) = fake().await;
    fake.log("default/a/main", "one line\nand another\n");
    let request = |container: &str| LogsRequest {
        namespace: "default".into(),
        pod: "a".into(),
        container: container.into(),
        ..LogsRequest::default()
    };
    let mut logs = client.logs(request("main")).await.unwrap();
    let mut text = Vec::new();
    while let Some(piece) = logs.next().await.unwrap() {
        text.extend_from_slice(&piece);
    }
    assert_eq!(text, b"one line\nand another\n");
    assert!(client.logs(request("other")).await.unwrap_err().is_not_found());
}

fn start(command: &[&str], stdin: bool) -> ExecStart {
    let command = command.iter().map(|word| (*word).to_owned()).collect();
    ExecStart {
        namespace: "default".into(),
        pod: "a".into(),
        container: "c".into(),
        command,
        stdin,
        ..ExecStart::default()
    }
}

#[tokio::test]
async fn exec_goes_both_ways() {
    let (fake, client) = fake().await;
    fake.put(pod("a"));
    let mut exec = client.exec(start(&["cat"], true)).await.unwrap();
    let stdin = exec.take_stdin().expect("asked for");
    assert!(exec.take_stdin().is_none());
    let writer = tokio::spawn(async move {
        for _ in 0..100 {
            assert!(stdin.write(Bytes::from(vec![b'x'; 10_000])).await);
        }
        stdin.close().await;
    });
    let (mut bytes, code) = (0, loop_until_exit(&mut exec).await);
    bytes += code.0;
    writer.await.unwrap();
    assert_eq!((bytes, code.1), (1_000_000, 0));
    let mut exec = client.exec(start(&["exit", "7"], false)).await.unwrap();
    assert!(exec.take_stdin().is_none());
    assert_eq!(exec.next().await.unwrap(), ExecOutput::Exit(7));
    let mut exec = client.exec(start(&["nope"], false)).await.unwrap();
    let error = exec.next().await.unwrap_err();
    assert!(error.to_string().contains("no such file"), "{error}");
}

async fn loop_until_exit(exec: &mut crate::Exec) -> (usize, i32) {
    let mut bytes = 0;
    loop {
        match timeout(Duration::from_secs(10), exec.next()).await.expect("it goes on").unwrap() {
            ExecOutput::Stdout(data) | ExecOutput::Stderr(data) => bytes += data.len(),
            ExecOutput::Exit(code) => return (bytes, code),
        }
    }
}

#[tokio::test]
async fn an_image_is_loaded_whole_or_not_at_all() {
    let (fake, client) = fake().await;
    let mut node = Node::default();
    node.meta_mut().name = "node-a".into();
    fake.put(node);
    let pieces: Vec<io::Result<Bytes>> = (0..50).map(|_| Ok(Bytes::from(vec![7; 60_000]))).collect();
    let summary = client.load_image(ImageLoadStart::default(), stream::iter(pieces)).await.unwrap();
    assert_eq!(summary.nodes[0].images[0].size_bytes, 3_000_000);
    assert_eq!(client.list_images(Vec::new()).await.unwrap().nodes[0].images.len(), 1);
    let broken = vec![Ok(Bytes::from_static(b"half")), Err(io::Error::other("the disk is gone"))];
    let error = client.load_image(ImageLoadStart::default(), stream::iter(broken)).await.unwrap_err();
    assert!(matches!(error, ClientError::Input { .. }), "{error:?}");
    sleep(Duration::from_millis(50)).await;
    assert_eq!(fake.images().len(), 1, "half an image is not stored");
}
