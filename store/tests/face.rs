//! What the differential test cannot ask of etcd 3.4, or not in time: leases that run out, progress, limits, alarms,
//! slow watchers, snapshots.

mod common;

use common::{Ours, WatchCreate, watch_progress};
use etcd_client::proto::*;
use minipod_store::etcdapi::FaceConfig;
use minipod_store::machine::Machine;
use minipod_store::state::StateMachine;
use minipod_store::watch::WatchConfig;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;
use tonic::{Code, Status, Streaming};

const WAIT: Duration = Duration::from_secs(20);

fn put(key: &str, value: impl Into<Vec<u8>>) -> PbPutRequest {
    PbPutRequest { key: key.into(), value: value.into(), ..Default::default() }
}

struct Watch {
    requests: Sender<PbWatchRequest>,
    answers: Streaming<PbWatchResponse>,
}

impl Watch {
    async fn open(ours: &Ours, create: &WatchCreate) -> Self {
        let (requests, receiver) = tokio::sync::mpsc::channel(64);
        requests.send(create.request()).await.unwrap();
        Self { requests, answers: ours.client.watch_with(receiver).await.unwrap() }
    }

    async fn next(&mut self) -> PbWatchResponse {
        let next = tokio::time::timeout(WAIT, self.answers.message()).await;
        next.expect("a frame comes in time").unwrap().expect("the stream goes on")
    }
}

fn all() -> WatchCreate {
    WatchCreate { key: vec![0], range_end: vec![0], ..WatchCreate::default() }
}

fn refused<T: std::fmt::Debug>(answer: Result<T, Status>) -> (Code, String) {
    let status = answer.unwrap_err();
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn leases_run_out_and_take_their_keys_in_one_revision() {
    let ours = Ours::start(FaceConfig::default()).await;
    let granted = ours.client.grant(&PbLeaseGrantRequest { ttl: 1, id: 0 }).await.unwrap();
    assert_eq!(granted.ttl, 2, "the shortest there is");
    let kept = ours.client.grant(&PbLeaseGrantRequest { ttl: 2, id: 7 }).await.unwrap();
    for (key, lease) in [("b", granted.id), ("a", granted.id), ("c", kept.id)] {
        ours.client.put(&PbPutRequest { lease, ..put(key, "x") }).await.unwrap();
    }
    let mut watch = Watch::open(&ours, &all()).await;
    assert!(watch.next().await.created);
    let (keep, receiver) = tokio::sync::mpsc::channel(4);
    let client = ours.client.clone();
    let mut kept_alive: Streaming<PbLeaseKeepAliveResponse> = {
        keep.send(PbLeaseKeepAliveRequest { id: 7 }).await.unwrap();
        client.streaming("/etcdserverpb.Lease/LeaseKeepAlive", receiver).await.unwrap()
    };
    let start = Instant::now();
    let events = loop {
        assert_eq!(kept_alive.message().await.unwrap().unwrap().ttl, 2);
        match tokio::time::timeout(Duration::from_millis(300), watch.answers.message()).await {
            Ok(answer) => break answer.unwrap().unwrap().events,
            Err(_) => keep.send(PbLeaseKeepAliveRequest { id: 7 }).await.unwrap(),
        }
        assert!(start.elapsed() < WAIT, "the lease does not run out");
    };
    assert!(start.elapsed() > Duration::from_millis(1_500), "it ran out early, after {:?}", start.elapsed());
    let gone: Vec<_> = events.iter().map(|event| (event.r#type, event.kv.as_ref().unwrap())).collect();
    assert_eq!(gone.iter().map(|(kind, kv)| (*kind, &kv.key[..])).collect::<Vec<_>>(), [(1, &b"a"[..]), (1, b"b")]);
    assert_eq!(gone[0].1.mod_revision, gone[1].1.mod_revision);
    let ttl = ours.client.ttl(&PbLeaseTimeToLiveRequest { id: granted.id, keys: true }).await.unwrap();
    assert_eq!(ttl.ttl, -1);
    let ttl = ours.client.ttl(&PbLeaseTimeToLiveRequest { id: 7, keys: true }).await.unwrap();
    assert_eq!((ttl.granted_ttl, ttl.keys), (2, vec![b"c".to_vec()]));
    keep.send(PbLeaseKeepAliveRequest { id: 99 }).await.unwrap();
    while kept_alive.message().await.unwrap().unwrap().id != 99 {}
}

#[tokio::test]
async fn progress_comes_after_the_events_that_it_covers() {
    let ours = Ours::start(FaceConfig::default()).await;
    for i in 0..3_000 {
        ours.client.put(&put(&format!("k{i:04}"), vec![b'x'; 2_000])).await.unwrap();
    }
    let mut watch = Watch::open(&ours, &WatchCreate { start_revision: 1, ..all() }).await;
    watch.requests.send(watch_progress()).await.unwrap();
    assert!(watch.next().await.created);
    let mut seen = 0;
    loop {
        let answer = watch.next().await;
        if answer.watch_id == -1 {
            assert_eq!((answer.header.unwrap().revision, seen), (3_001, 3_000));
            break;
        }
        seen += answer.events.len();
    }
    // A watch of the future keeps the stream's progress back until its time has come.
    let future = WatchCreate { start_revision: 3_003, ..all() };
    watch.requests.send(future.request()).await.unwrap();
    assert!(watch.next().await.created);
    watch.requests.send(watch_progress()).await.unwrap();
    ours.client.put(&put("one", "x")).await.unwrap();
    let answer = watch.next().await;
    assert_eq!((answer.watch_id, answer.events.len()), (0, 1));
    let answer = watch.next().await;
    assert_eq!((answer.watch_id, answer.header.unwrap().revision), (-1, 3_002));
}

#[tokio::test]
async fn a_server_that_stops_says_so_to_its_watchers() {
    let ours = Ours::start(FaceConfig::default()).await;
    let mut watch = Watch::open(&ours, &all()).await;
    assert!(watch.next().await.created);
    ours.client.put(&put("a", "x")).await.unwrap();
    assert_eq!(watch.next().await.events.len(), 1);
    ours.face.end_streams();
    let end = tokio::time::timeout(WAIT, watch.answers.message()).await.unwrap().unwrap_err();
    assert_eq!((end.code(), end.message()), (Code::Unavailable, "etcdserver: server stopped"));
    assert_eq!(ours.face.watches().watchers(), (0, 0));
}

#[tokio::test]
async fn quiet_watches_get_a_sign_of_life() {
    let watch = WatchConfig { progress_interval: Duration::from_millis(100), ..WatchConfig::default() };
    let ours = Ours::start(FaceConfig { watch, ..FaceConfig::default() }).await;
    ours.client.put(&put("a", "x")).await.unwrap();
    let mut watch = Watch::open(&ours, &WatchCreate { progress_notify: true, ..all() }).await;
    assert!(watch.next().await.created);
    let answer = watch.next().await;
    assert_eq!((answer.watch_id, answer.header.unwrap().revision, answer.events.len()), (0, 2, 0));
}

#[tokio::test]
async fn a_watch_from_the_compacted_revision_misses_nothing() {
    let ours = Ours::start(FaceConfig::default()).await;
    ours.client.put(&put("a", "x")).await.unwrap();
    ours.client.put(&put("b", "x")).await.unwrap();
    let delete = PbDeleteRequest { key: b"a".to_vec(), ..Default::default() };
    ours.client.delete(&delete).await.unwrap();
    ours.client.compact(&PbCompactionRequest { revision: 4, physical: true }).await.unwrap();
    let mut watch = Watch::open(&ours, &WatchCreate { start_revision: 4, ..all() }).await;
    assert!(watch.next().await.created);
    let events = watch.next().await.events;
    assert_eq!((events.len(), events[0].r#type), (1, 1), "the delete of the compacted revision itself");
    let mut watch = Watch::open(&ours, &WatchCreate { start_revision: 3, ..all() }).await;
    assert!(watch.next().await.created);
    let answer = watch.next().await;
    assert!(answer.canceled);
    assert_eq!(answer.compact_revision, 4);
}

#[tokio::test]
async fn a_client_that_does_not_read_misses_nothing_and_holds_nobody_up() {
    let ours = Ours::start(FaceConfig::default()).await;
    let mut slow = Watch::open(&ours, &all()).await;
    assert!(slow.next().await.created);
    let mut quick = Watch::open(&ours, &all()).await;
    assert!(quick.next().await.created);
    // Well beyond what outbox and connection hold.
    let puts = 300;
    let (client, value) = (ours.client.clone(), vec![b'v'; 100_000]);
    let writer = tokio::spawn(async move {
        for i in 0..puts {
            client.put(&put(&format!("k{i}"), value.clone())).await.unwrap();
        }
    });
    let mut seen = 0;
    while seen < puts {
        seen += quick.next().await.events.len();
    }
    writer.await.unwrap();
    let mut revisions = Vec::new();
    while revisions.len() < puts {
        revisions.extend(slow.next().await.events.iter().map(|event| event.kv.as_ref().unwrap().mod_revision));
    }
    assert_eq!(revisions, (2..2 + puts as i64).collect::<Vec<_>>());
}

#[tokio::test]
async fn large_revisions_come_in_pieces_only_to_those_who_asked() {
    let watch = WatchConfig { max_fragment_bytes: 100_000, ..WatchConfig::default() };
    let ours = Ours::start(FaceConfig { watch, ..FaceConfig::default() }).await;
    let mut whole = Watch::open(&ours, &all()).await;
    let mut pieces = Watch::open(&ours, &WatchCreate { fragment: true, ..all() }).await;
    assert!(whole.next().await.created && pieces.next().await.created);
    let op = |i: i32| PbTxnRequestOp {
        request: Some(PbTxnOpRequest::RequestPut(put(&format!("k{i:03}"), vec![7; 10_000]))),
    };
    ours.client.txn(&PbTxnRequest { success: (0..50).map(op).collect(), ..Default::default() }).await.unwrap();
    let answer = whole.next().await;
    assert_eq!((answer.events.len(), answer.fragment), (50, false));
    let (mut seen, mut frames) = (0, 0);
    loop {
        let answer = pieces.next().await;
        seen += answer.events.len();
        frames += 1;
        assert_eq!(answer.fragment, seen < 50);
        if !answer.fragment {
            break;
        }
    }
    assert!(seen == 50 && frames >= 5, "{seen} events in {frames} frames");
}

#[tokio::test]
async fn what_is_too_large_is_refused_with_etcds_words() {
    let ours = Ours::start(FaceConfig::default()).await;
    let too_large = refused(ours.client.put(&put("a", vec![0; 1_600_000])).await);
    assert_eq!(too_large, (Code::InvalidArgument, "etcdserver: request is too large".to_owned()));
    let op = PbTxnRequestOp {
        request: Some(PbTxnOpRequest::RequestRange(PbRangeRequest { key: b"a".to_vec(), ..Default::default() })),
    };
    let too_many = refused(ours.client.txn(&PbTxnRequest { success: vec![op; 129], ..Default::default() }).await);
    assert_eq!(too_many, (Code::InvalidArgument, "etcdserver: too many operations in txn request".to_owned()));
    assert_eq!(ours.client.put(&put("a", vec![0; 1_500_000])).await.unwrap().header.unwrap().revision, 2);
}

#[tokio::test]
async fn the_quota_raises_an_alarm_that_an_operator_clears() {
    let ours = Ours::start(FaceConfig { quota_bytes: 200_000, ..FaceConfig::default() }).await;
    let no_space = (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded".to_owned());
    let full = loop {
        let answer = ours.client.put(&put("same", vec![0; 10_000])).await;
        if answer.is_err() {
            break refused(answer);
        }
    };
    assert_eq!(full, no_space);
    assert_eq!(refused(ours.client.put(&put("small", "x")).await), no_space, "the alarm holds, also for the small");
    let alarms = ours.client.alarm(&PbAlarmRequest::default()).await.unwrap().alarms;
    assert_eq!(alarms, [PbAlarmMember { member_id: 11, alarm: 1 }]);
    assert!(ours.client.status(&PbStatusRequest::default()).await.unwrap().errors[0].contains("NOSPACE"));
    let delete = PbDeleteRequest { key: b"same".to_vec(), ..Default::default() };
    let revision = ours.client.delete(&delete).await.unwrap().header.unwrap().revision;
    ours.client.compact(&PbCompactionRequest { revision, physical: true }).await.unwrap();
    let clear = PbAlarmRequest { action: 2, member_id: 11, alarm: 1 };
    assert_eq!(ours.client.alarm(&clear).await.unwrap().alarms.len(), 1);
    ours.client.put(&put("small", "x")).await.unwrap();
}

#[tokio::test]
async fn a_long_range_sees_one_revision_while_writers_go_on() {
    let ours = Ours::start(FaceConfig::default()).await;
    for batch in 0..100 {
        let op = |i: i32| PbTxnRequestOp {
            request: Some(PbTxnOpRequest::RequestPut(put(&format!("k{:05}", batch * 100 + i), "0"))),
        };
        ours.client.txn(&PbTxnRequest { success: (0..100).map(op).collect(), ..Default::default() }).await.unwrap();
    }
    // First and last key move together, in one transaction.
    let both = |i: u32| {
        let op = |key: &str| PbTxnRequestOp { request: Some(PbTxnOpRequest::RequestPut(put(key, i.to_string()))) };
        PbTxnRequest { success: vec![op("k00000"), op("k09999")], ..Default::default() }
    };
    ours.client.txn(&both(0)).await.unwrap();
    let (client, stop) = (ours.client.clone(), std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false)));
    let (stopped, order) = (std::sync::Arc::clone(&stop), std::sync::atomic::Ordering::Relaxed);
    let writer = tokio::spawn(async move {
        let mut writes = 0;
        while !stopped.load(order) {
            writes += 1;
            client.txn(&both(writes)).await.unwrap();
        }
        writes
    });
    for _ in 0..10 {
        let everything = PbRangeRequest { key: vec![0], range_end: vec![0], ..Default::default() };
        let answer = ours.client.range(&everything).await.unwrap();
        assert_eq!(answer.kvs.len(), 10_000);
        assert_eq!(answer.kvs[0].mod_revision, answer.kvs[9_999].mod_revision);
        assert!(answer.kvs.iter().all(|kv| kv.mod_revision <= answer.header.as_ref().unwrap().revision));
    }
    stop.store(true, order);
    assert!(writer.await.unwrap() > 10);
}

#[tokio::test]
async fn a_snapshot_over_the_wire_is_the_state() {
    let ours = Ours::start(FaceConfig::default()).await;
    for i in 0..500 {
        ours.client.put(&put(&format!("k{}", i % 50), vec![1; 5_000])).await.unwrap();
    }
    let (requests, receiver) = tokio::sync::mpsc::channel(1);
    requests.send(PbSnapshotRequest::default()).await.unwrap();
    drop(requests);
    let mut answers: Streaming<PbSnapshotResponse> =
        ours.client.streaming("/etcdserverpb.Maintenance/Snapshot", receiver).await.unwrap();
    let mut bytes = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        bytes.extend(answer.blob);
    }
    let store = minipod_store::mvcc::bolt::import(&bytes).unwrap();
    let hash = ours.client.hash_kv(&PbHashKvRequest::default()).await.unwrap();
    assert_eq!(store.hash(0).unwrap(), (hash.hash, hash.header.unwrap().revision));
}

#[tokio::test]
async fn what_is_not_there_says_so() {
    let ours = Ours::start(FaceConfig::default()).await;
    for path in [
        "/etcdserverpb.Auth/AuthEnable",
        "/v3lockpb.Lock/Lock",
        "/v3electionpb.Election/Campaign",
        "/etcdserverpb.KV/New",
    ] {
        let answer: Result<PbAuthEnableResponse, _> = ours.client.unary(path, PbAuthEnableRequest::default()).await;
        assert_eq!(answer.unwrap_err().code(), Code::Unimplemented, "{path}");
    }
    let health: PbAlarmMember =
        ours.client.unary("/grpc.health.v1.Health/Check", PbStatusRequest::default()).await.unwrap();
    assert_eq!(health.member_id, 1, "SERVING, whatever the message is called");
}

#[test]
fn commands_that_nobody_can_read_change_nothing() {
    let mut machine = StateMachine::new();
    let mut rng = common::Rng(3);
    for index in 1..20_000 {
        let command: Vec<u8> =
            (0..rng.below(40)).map(|at| if at == 0 { rng.below(13) as u8 } else { rng.next() as u8 }).collect();
        machine.apply(index, &command);
        assert_eq!(machine.applied(), index);
        let _ = minipod_store::wire::WatchRequest::decode(&command);
        let _ = minipod_store::wire::lease(&command);
    }
}
