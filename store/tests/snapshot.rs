//! Snapshots that are damaged, and what a start makes of them.

#[path = "sim/machine.rs"]
mod machine;
mod support;

use bytes::Bytes;
use machine::Chain;
use minipod_store::disk::Disk;
use minipod_store::machine::{Machine, Member};
use minipod_store::records::SnapshotMeta;
use minipod_store::replica::core::{Boot, Core, Outbox, ReplicaError, Reply, Settings, snapshot_dir};
use minipod_store::snapshot::{SnapshotError, Snapshots, file_name};
use minipod_store::wal::{Identity, Options};
use raft::eraftpb::Message;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::disk::{Fault, SimDisk};
use support::rng::Rng;

const DATA: &str = "/data";
const IDENTITY: Identity = Identity { cluster_id: 5, member_id: 1 };

fn shared(disk: &SimDisk) -> Arc<dyn Disk> {
    Arc::new(disk.clone())
}

fn snapshots(disk: &SimDisk) -> Snapshots {
    Snapshots::new(shared(disk), Path::new("/snap"), IDENTITY.cluster_id).expect("snapshots")
}

fn meta(index: u64) -> SnapshotMeta {
    SnapshotMeta { cluster_id: IDENTITY.cluster_id, index, term: 2, ..SnapshotMeta::default() }
}

fn chunks() -> Vec<Bytes> {
    (1..=4_u8).map(|fill| Bytes::from(vec![fill; 100 * usize::from(fill)])).collect()
}

#[test]
fn a_snapshot_comes_back_and_no_changed_byte_goes_unseen() {
    let disk = SimDisk::default();
    let snapshots = snapshots(&disk);
    let bytes = snapshots.write(&meta(9), &mut chunks().into_iter()).expect("write");
    let reader = snapshots.open(9, 2).expect("open");
    assert_eq!(reader.meta(), &meta(9));
    assert_eq!(reader.map(|chunk| chunk.expect("whole")).collect::<Vec<_>>(), chunks());

    let path = Path::new("/snap").join(file_name(9, 2));
    let good = disk.read(&path);
    assert_eq!(good.len() as u64, bytes);
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        disk.replace(&path, bad);
        assert!(snapshots.verify(9, 2).is_err(), "byte {at}");
        disk.replace(&path, good[..at].to_vec());
        assert!(snapshots.verify(9, 2).is_err(), "cut after {at} bytes");
    }
    disk.replace(&path, good);
    snapshots.verify(9, 2).expect("whole again");
    let other = Snapshots::new(shared(&disk), Path::new("/snap"), 6).expect("snapshots");
    assert!(matches!(other.verify(9, 2), Err(SnapshotError::Cluster { found: 5, expected: 6, .. })));
}

#[test]
fn a_crash_leaves_a_whole_snapshot_or_none() {
    for seed in 0..300 {
        let mut rng = Rng::new(seed);
        let disk = SimDisk::default();
        let snapshots = snapshots(&disk);
        let fault = if rng.chance(700) { Fault::Stop } else { Fault::Full };
        disk.fault_after(rng.below(7), fault);
        let written = snapshots.write(&meta(9), &mut chunks().into_iter()).is_ok();
        disk.crash(&mut rng);
        snapshots.remove_temporary().expect("clean");
        let found = snapshots.list().expect("list");
        if written {
            assert_eq!(found, [(9, 2)], "seed {seed}: what was written is there");
        }
        for (index, term) in found {
            snapshots.verify(index, term).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        }
    }
}

#[derive(Default)]
struct Answers(usize);

impl Outbox<u64> for Answers {
    fn send(&mut self, _messages: Vec<Message>) {}
    fn answer(&mut self, _waiter: u64, reply: Reply) {
        assert!(matches!(reply, Reply::Outcome(_)), "{reply:?}");
        self.0 += 1;
    }
}

fn open(disk: &SimDisk) -> Result<Core<Chain, u64>, ReplicaError> {
    let mut settings = Settings::new(IDENTITY);
    settings.snapshot_entries = 10;
    settings.wal = Options { segment_len: 4_096, nonce_seed: 3, ..Options::default() };
    let only = Member { id: 1, name: "only".to_owned(), ..Member::default() };
    let mut core = Core::open(&shared(disk), Path::new(DATA), settings, &Boot::Members(vec![only]), Chain::default())?;
    core.advance(&mut Answers::default())?;
    Ok(core)
}

/// A store with 35 commands and two snapshots on disk; gives their files, the older first.
fn store(disk: &SimDisk) -> (Vec<PathBuf>, Chain) {
    let mut core = open(disk).expect("open");
    let mut answers = Answers::default();
    for operation in 1..=35_u64 {
        core.propose(Bytes::copy_from_slice(&operation.to_le_bytes()), operation);
        core.advance(&mut answers).expect("advance");
        if let Some(job) = core.snapshot_job() {
            core.snapshot_done(job.run()).expect("note the snapshot");
        }
    }
    assert_eq!(answers.0, 35);
    let files = core.snapshots().list().expect("list");
    assert_eq!(files.len(), 2, "{files:?}");
    let path = |(index, term): (u64, u64)| snapshot_dir(Path::new(DATA)).join(file_name(index, term));
    (files.into_iter().map(path).collect(), core.machine().clone())
}

fn damage(disk: &SimDisk, path: &Path) {
    let mut bytes = disk.read(path);
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    disk.replace(path, bytes);
}

#[test]
fn the_older_snapshot_and_the_log_make_good_a_damaged_newer_one() {
    let disk = SimDisk::default();
    let (files, before) = store(&disk);
    let again = open(&disk).expect("open");
    assert_eq!((again.machine().hash, again.machine().operations.len()), (before.hash, 35));
    drop(again);
    damage(&disk, &files[1]);
    let again = open(&disk).expect("open with a damaged snapshot");
    assert_eq!((again.machine().hash, again.machine().operations.len()), (before.hash, 35));
    assert!(again.machine().applied() > before.applied());
    drop(again);
    damage(&disk, &files[0]);
    let error = open(&disk).map(drop).expect_err("nothing is left to begin with");
    assert!(error.to_string().contains("no usable snapshot in /data/snap"), "{error}");
}

#[test]
fn a_snapshot_that_cannot_be_written_stops_nothing() {
    let disk = SimDisk::default();
    let mut core = open(&disk).expect("open");
    let mut answers = Answers::default();
    let mut refused = 0;
    for operation in 1..=60_u64 {
        core.propose(Bytes::copy_from_slice(&operation.to_le_bytes()), operation);
        core.advance(&mut answers).expect("advance");
        if let Some(job) = core.snapshot_job() {
            if refused < 3 {
                disk.fault_after(0, Fault::Full);
            }
            let done = job.run();
            refused += u64::from(done.is_err());
            core.snapshot_done(done).expect("go on");
        }
    }
    assert_eq!((answers.0, refused), (60, 3));
    assert!(core.snapshots().list().expect("list").iter().any(|(index, _)| *index > 1), "a later one was written");
}
