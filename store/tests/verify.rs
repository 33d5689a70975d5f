//! What `verify` finds in a directory that is whole record by record and file by file, and wrong all the same.

#[path = "processes/server.rs"]
mod server;

use minipod_store::disk::{Disk, RealDisk};
use minipod_store::machine::Machine as _;
use minipod_store::snapshot::{Snapshots, parse_name};
use minipod_store::state::{Kind, StateMachine, request_command};
use minipod_store::wire::put_bytes;
use server::Server;
use std::sync::Arc;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshots_that_contradict_each_other_are_found() {
    let root = tempfile::tempdir().expect("a directory");
    let mut server = Server::new(root.path(), "only");
    server.args = ["--snapshot-count", "40"].map(str::to_owned).to_vec();
    server.start();
    let mut client = server.client().await;
    // Until two snapshots beside the first one have been written.
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let snap = server.dir.join("snap");
    let snapshots = || -> Vec<std::path::PathBuf> {
        let names = std::fs::read_dir(&snap).expect("snapshots").map(|entry| entry.expect("an entry").path());
        let mut paths: Vec<_> = names.filter(|path| path.extension().is_some_and(|end| end == "snap")).collect();
        paths.sort();
        paths
    };
    let mut number = 0;
    while snapshots().len() < 2 || snapshots()[0].ends_with("0000000000000001-0000000000000001.snap") {
        assert!(std::time::Instant::now() < deadline, "no snapshots: {}", server.log());
        client.put(format!("k/{}", number % 7), number.to_string(), None).await.expect("put");
        number += 1;
    }
    server.terminate();
    let whole = minipod_store::tool::verify(&server.dir).expect("it is whole");
    assert_eq!(whole.keys, 7);

    // A snapshot that was written for something else: whole in itself, and not what the log before it comes to.
    let newest = snapshots().pop().expect("a snapshot");
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let files = Snapshots::new(disk, &snap, whole.identity.cluster_id).expect("snapshots");
    let name = newest.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
    let (index, term) = parse_name(&name).expect("index and term");
    let reader = files.open(index, term).expect("whole");
    let meta = reader.meta().clone();
    let mut machine = StateMachine::new();
    machine.restore(&mut { reader }).expect("restored");
    let mut put = Vec::new();
    put_bytes(&mut put, 1, b"forged");
    put_bytes(&mut put, 2, b"x");
    machine.apply(index + 1, &request_command(Kind::Put, &put));
    files.write(&meta, &mut machine.snapshot()).expect("written");
    let said = minipod_store::tool::verify(&server.dir).expect_err("it contradicts itself").to_string();
    assert!(
        said.contains("the directory contradicts itself") && said.contains(&format!("snapshot {index} to revision")),
        "{said}"
    );
}
