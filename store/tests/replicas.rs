//! Three real processes: a leader that dies, members that come, go and come back.

#[path = "processes/server.rs"]
mod server;

use etcd_client::{Client, GetOptions};
use server::{Server, cluster, until};
use std::time::{Duration, Instant};

async fn put(client: &mut Client, key: &str, value: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match client.put(key, value, None).await {
            Ok(_) => return,
            Err(error) if Instant::now() > deadline => panic!("put {key}: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// The place of the leader in `servers`, once they agree on one among them.
async fn leader(servers: &[&Server]) -> usize {
    until("the members agree on a leader", async || {
        let mut seen = Vec::new();
        for server in servers {
            let mut client = server.client().await;
            let status = client.status().await.map_err(|error| error.to_string())?;
            let id = status.header().map_or(0, |header| header.member_id());
            seen.push((id, status.leader()));
        }
        let (_, leader) = seen[0];
        let place = seen.iter().position(|(id, _)| *id == leader);
        place.filter(|_| seen.iter().all(|(_, seen)| *seen == leader)).ok_or_else(|| format!("{seen:?}"))
    })
    .await
}

/// Waits until all have the same revision, and compares their hashes at it.
async fn same_state(servers: &[&Server]) {
    until("the members have the same state", async || {
        let mut seen = Vec::new();
        for server in servers {
            let mut client = server.client().await;
            let status = client.hash_kv(0).await.map_err(|error| error.to_string())?;
            seen.push((status.header().map_or(0, |header| header.revision()), status.hash()));
        }
        if seen.iter().all(|state| *state == seen[0]) { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_dies_and_comes_back() {
    let root = tempfile::tempdir().expect("a directory");
    let mut servers = cluster(root.path());
    let first = leader(&servers.iter().collect::<Vec<_>>()).await;
    let mut client = servers[first].client().await;
    for number in 0..200 {
        put(&mut client, &format!("k/{number}"), "before").await;
    }
    servers[first].kill();
    let others: Vec<usize> = (0..3).filter(|place| *place != first).collect();
    let mut client = servers[others[0]].client().await;
    put(&mut client, "k/0", "without the first leader").await;
    // More than is kept in the log of a small store is not needed: a snapshot is due every 100 entries.
    for number in 0..300 {
        put(&mut client, &format!("m/{number}"), "while it was away").await;
    }
    servers[first].start();
    let mut back = servers[first].client().await;
    let found = back.get("k/0", None).await.expect("a linearizable read on the member that was away");
    assert_eq!(found.kvs()[0].value_str().expect("text"), "without the first leader");
    same_state(&servers.iter().collect::<Vec<_>>()).await;
    // An orderly end hands over: the others go on without waiting for an election.
    let second = leader(&servers.iter().collect::<Vec<_>>()).await;
    let took = servers[second].terminate();
    assert!(took < Duration::from_secs(10), "the orderly end took {took:?}");
    assert!(servers[second].log().contains("the replica has ended"));
    let rest: Vec<&Server> = (0..3).filter(|place| *place != second).map(|place| &servers[place]).collect();
    let mut client = rest[0].client().await;
    put(&mut client, "after", "the orderly end").await;
    leader(&rest).await;
    same_state(&rest).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_join_and_leave() {
    let root = tempfile::tempdir().expect("a directory");
    let mut only = Server::new(root.path(), "only");
    only.args = ["--snapshot-count", "50"].map(str::to_owned).to_vec();
    only.start();
    let mut client = only.client().await;
    for number in 0..120 {
        put(&mut client, &format!("k/{number}"), "alone").await;
    }
    // A cluster of one becomes one of three; each joins by itself, as a learner first.
    let mut joined = Vec::new();
    for name in ["second", "third"] {
        let mut server = Server::new(root.path(), name);
        server.args = vec!["--join".to_owned(), format!("http://{}", only.peer)];
        server.start();
        until("the new member gets its vote", async || {
            let members = client.member_list().await.map_err(|error| error.to_string())?;
            let members: Vec<_> =
                members.members().iter().map(|member| (member.name().to_owned(), member.is_learner())).collect();
            members
                .contains(&(name.to_owned(), false))
                .then_some(())
                .ok_or_else(|| format!("{members:?}; {}", server.log()))
        })
        .await;
        joined.push(server);
    }
    let mut at_second = joined[0].client().await;
    let found = at_second.get("k/", Some(GetOptions::new().with_prefix().with_count_only())).await.expect("read");
    assert_eq!(found.count(), 120);
    put(&mut at_second, "k/through", "a follower").await;
    same_state(&[&only, &joined[0], &joined[1]]).await;

    // The first one, and leader, is removed; it ends, and the others go on.
    let members = client.member_list().await.expect("members");
    let first = members.members().iter().find(|member| member.name() == "only").expect("the first").id();
    at_second.member_remove(first).await.expect("remove");
    until("the removed member ends", async || {
        let log = only.log();
        if log.contains("this member was removed") { Ok(()) } else { Err(log) }
    })
    .await;
    only.kill();
    put(&mut at_second, "k/after", "the removal").await;
    leader(&[&joined[0], &joined[1]]).await;
    same_state(&[&joined[0], &joined[1]]).await;

    // Its directory is of no use in the cluster any more, and it is told so.
    let found = at_second.member_list().await.expect("members");
    assert_eq!(found.members().len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_without_its_data_comes_back_as_another() {
    let root = tempfile::tempdir().expect("a directory");
    let mut servers = cluster(root.path());
    let first = leader(&servers.iter().collect::<Vec<_>>()).await;
    let (lost, other) = ((first + 1) % 3, (first + 2) % 3);
    let mut client = servers[other].client().await;
    put(&mut client, "k", "v").await;
    until("all members are known", async || {
        let members = client.member_list().await.map_err(|error| error.to_string())?;
        let started = members.members().iter().filter(|member| !member.client_urls().is_empty()).count();
        if started == 3 { Ok(()) } else { Err(format!("{started} of 3 have started")) }
    })
    .await;
    servers[lost].kill();
    std::fs::remove_dir_all(&servers[lost].dir).expect("lose the data");
    let said = servers[lost].start_refused();
    assert!(said.contains("must not vote again") && said.contains("--join"), "{said}");
    let members = client.member_list().await.expect("members");
    let id = members.members().iter().find(|member| member.name() == servers[lost].name).expect("the lost one").id();
    client.member_remove(id).await.expect("remove");
    servers[lost].args = vec!["--join".to_owned(), format!("http://{}", servers[other].peer)];
    servers[lost].start();
    let mut back = servers[lost].client().await;
    assert_eq!(back.get("k", None).await.expect("get").kvs().len(), 1);
    same_state(&servers.iter().collect::<Vec<_>>()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_cluster_is_refused_by_its_peers() {
    let root = tempfile::tempdir().expect("a directory");
    let servers = cluster(root.path());
    leader(&servers.iter().collect::<Vec<_>>()).await;
    // The same addresses under another token: another cluster.
    let mut stranger = Server::new(root.path(), "a");
    stranger.dir = root.path().join("stranger");
    let members = format!("a=http://{},b=http://{}", stranger.peer, servers[1].peer);
    stranger.args = vec!["--initial-cluster".to_owned(), members];
    stranger.start();
    until("the stranger is told", async || {
        let log = stranger.log();
        if log.contains("belongs to cluster") { Ok(()) } else { Err(log) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_embedded_store_keeps_its_state() {
    let root = tempfile::tempdir().expect("a directory");
    for round in 0..3 {
        let config = minipod_store::service::Config::alone(root.path().join("data"));
        let store = minipod_store::service::Store::open(config).await.expect("open");
        let mut client = store.client(None).await.expect("a client");
        let found = client.get("round", None).await.expect("get");
        let before = found.kvs().first().map(|kv| kv.value_str().expect("text").to_owned());
        assert_eq!(before, (round > 0).then(|| (round - 1).to_string()));
        client.put("round", round.to_string(), None).await.expect("put");
        let ended = store.shutdown().await;
        assert!(matches!(ended, minipod_store::replica::run::Ended::Stopped), "{ended:?}");
    }
}
