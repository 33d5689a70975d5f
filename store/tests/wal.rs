//! The log against a disk that loses, tears and refuses.

mod support;

use minipod_store::disk::Disk;
use minipod_store::wal::{Identity, Marker, Options, State, Wal, WalError, segment_name};
use raft::eraftpb::{Entry, HardState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use support::disk::{Fault, SimDisk};
use support::rng::Rng;

const DIR: &str = "/data/wal";
const IDENTITY: Identity = Identity { cluster_id: 11, member_id: 7 };

fn options(seed: u64) -> Options {
    Options { segment_len: 4096, nonce_seed: seed, ..Options::default() }
}

fn create(disk: &SimDisk) -> Result<Wal, WalError> {
    Wal::create(Arc::new(disk.clone()), Path::new(DIR), IDENTITY, options(5))
}

fn open(disk: &SimDisk) -> Result<(Wal, minipod_store::wal::Recovered), WalError> {
    Wal::open(Arc::new(disk.clone()), Path::new(DIR), options(5))
}

fn entry(term: u64, index: u64, len: usize) -> Entry {
    let fill = u8::try_from(index % 251).expect("a byte");
    Entry { term, index, data: vec![fill; len], context: index.to_le_bytes().to_vec(), ..Entry::default() }
}

fn state(term: u64, commit: u64) -> State {
    State { hard: HardState { term, vote: 1, commit }, epoch: 1 }
}

/// What a log must contain, kept beside it.
#[derive(Default, Clone)]
struct Model {
    entries: Vec<Entry>,
    snapshot: u64,
}

impl Model {
    fn append(&mut self, entries: &[Entry]) {
        if let Some(first) = entries.first() {
            self.entries.truncate(usize::try_from(first.index - 1).expect("an index"));
            self.entries.extend_from_slice(entries);
        }
    }
}

/// Does random things until the disk stops or `steps` are done; returns what was acknowledged, and what was under way.
fn work(wal: &mut Wal, rng: &mut Rng, model: &mut Model, term: &mut u64, steps: u64) -> Option<Model> {
    for _ in 0..steps {
        let mut attempt = model.clone();
        let last = model.entries.len() as u64;
        let done = if rng.chance(100) && last > model.snapshot {
            let index = model.snapshot + 1 + rng.below(last - model.snapshot);
            attempt.snapshot = index;
            wal.mark_snapshot(Marker { index, term: *term, installed: false })
        } else {
            *term += u64::from(rng.chance(100));
            // A new term may replace what no snapshot contains.
            let back = if rng.chance(150) { rng.below(last - model.snapshot + 1) } else { 0 };
            let first = last - back + 1;
            let count = 1 + rng.below(4);
            let entries: Vec<_> = (first..first + count).map(|index| entry(*term, index, rng.index(700))).collect();
            attempt.append(&entries);
            wal.append(&state(*term, last), &[], &entries)
        };
        if done.is_err() {
            return Some(attempt);
        }
        *model = attempt;
    }
    None
}

fn recovered_is(found: &minipod_store::wal::Recovered, model: &Model) -> bool {
    let start = usize::try_from(found.start).expect("an index");
    let Some(expected) = model.entries.get(start..) else { return false };
    found.entries.iter().eq(expected.iter()) && (model.snapshot == 0 || found.start <= model.snapshot)
}

#[test]
fn what_was_acknowledged_survives_every_crash() {
    let seeds = std::env::var("MINIPOD_WAL_SEEDS").map_or(2_000, |seeds| seeds.parse().expect("a number of seeds"));
    for seed in 0..seeds {
        let mut rng = Rng::new(seed);
        let disk = SimDisk::default();
        let (mut model, mut term) = (Model::default(), 1);
        let mut wal = create(&disk).expect("create");
        wal.append(&state(1, 0), &[], &[]).expect("the first record");
        for round in 0..6 {
            disk.fault_after(rng.below(60), Fault::Stop);
            let attempt = work(&mut wal, &mut rng, &mut model, &mut term, 60);
            disk.crash(&mut rng);
            // A second crash may come while the first one's traces are removed.
            disk.fault_after(rng.below(4), Fault::Stop);
            if open(&disk).is_err() {
                assert!(disk.is_stopped(), "seed {seed} round {round}: a clean disk opens");
                disk.crash(&mut rng);
            }
            disk.no_fault();
            let (again, found) = open(&disk).unwrap_or_else(|error| panic!("seed {seed} round {round}: {error}"));
            let (acknowledged, under_way) =
                (recovered_is(&found, &model), attempt.as_ref().is_some_and(|attempt| recovered_is(&found, attempt)));
            assert!(
                acknowledged || under_way,
                "seed {seed} round {round}: found {}..={} of {} acknowledged entries, snapshot {}",
                found.start + 1,
                found.start + found.entries.len() as u64,
                model.entries.len(),
                model.snapshot
            );
            if !acknowledged || under_way {
                model = attempt.unwrap_or(model);
            }
            // Entries that were under way may be there without their snapshot's marker, and the other way round.
            model.snapshot = found.markers.last().map_or(0, |marker| marker.index);
            wal = again;
        }
    }
}

#[test]
fn a_disk_that_refuses_stops_the_log_and_loses_nothing() {
    for seed in 0..500 {
        for fault in [Fault::Full, Fault::Io] {
            let mut rng = Rng::new(seed);
            let disk = SimDisk::default();
            let (mut model, mut term) = (Model::default(), 1);
            let mut wal = create(&disk).expect("create");
            wal.append(&state(1, 0), &[], &[]).expect("the first record");
            disk.fault_after(rng.below(100), fault);
            let attempt = work(&mut wal, &mut rng, &mut model, &mut term, 400).expect("the fault comes");
            let again = wal.append(&state(term, 0), &[], &[entry(term, 1, 1)]);
            // The removal of old segments is not the log: it may fail and be done later.
            if !matches!(again, Err(WalError::Failed { .. })) {
                assert!(attempt.snapshot > model.snapshot, "seed {seed}: written after {fault:?}: {again:?}");
                continue;
            }
            disk.crash(&mut rng);
            let (_, found) = open(&disk).unwrap_or_else(|error| panic!("seed {seed} {fault:?}: {error}"));
            assert!(recovered_is(&found, &model) || recovered_is(&found, &attempt), "seed {seed} {fault:?}");
        }
    }
}

/// A log of three segments; returns the paths of its segments.
fn long_log(disk: &SimDisk) -> Vec<PathBuf> {
    let mut wal = create(disk).expect("create");
    for index in 1..=24 {
        wal.append(&state(1, index - 1), &[], &[entry(1, index, 300)]).expect("append");
    }
    let names = disk.list(Path::new(DIR)).expect("list");
    assert!(names.len() >= 3, "{names:?}");
    names.iter().map(|name| Path::new(DIR).join(name)).collect()
}

#[test]
fn a_damaged_middle_is_refused_and_a_damaged_end_repaired() {
    let disk = SimDisk::default();
    let segments = long_log(&disk);
    let (_, whole) = open(&disk).expect("the undamaged log");
    assert_eq!(whole.entries.len(), 24);
    for (number, path) in segments.iter().enumerate() {
        let good = disk.read(path);
        let used = good.iter().rposition(|byte| *byte != 0).expect("records") + 1;
        // The header's unused bytes carry no meaning beyond byte 64.
        for at in (0..64).chain((512..used).step_by(7)) {
            let copy = disk.copy();
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            copy.replace(path, bad.clone());
            match open(&copy) {
                Err(WalError::Damaged { file, offset, .. }) => {
                    assert_eq!(&file, path);
                    assert!(offset <= at as u64, "byte {at} is named as offset {offset}");
                    assert_eq!(copy.read(path), bad, "a refusal changes nothing");
                }
                Err(other) => panic!("segment {number} byte {at}: {other}"),
                Ok((_, found)) if found.repair.is_some() => {
                    assert_eq!(number, segments.len() - 1, "only the last segment has an end");
                    assert_eq!(found.entries.len(), 23, "segment {number} byte {at}: only the last record can go");
                    let (_, again) = open(&copy).expect("repaired");
                    assert_eq!((again.entries.len(), again.repair), (23, None));
                }
                // Padding and the unused bytes of a record's header.
                Ok((_, found)) => assert_eq!(found.entries, whole.entries, "segment {number} byte {at}"),
            }
        }
    }
}

#[test]
fn a_missing_segment_and_a_newer_version_are_named() {
    let disk = SimDisk::default();
    let segments = long_log(&disk);
    let copy = disk.copy();
    copy.remove(&segments[1]).expect("remove");
    let error = open(&copy).expect_err("a gap").to_string();
    assert!(error.contains(&segment_name(2)) && error.contains("missing"), "{error}");

    let mut newer = disk.read(&segments[0]);
    newer[8] = 77;
    let crc = crc32fast::hash(&newer[..60]);
    newer[60..64].copy_from_slice(&crc.to_le_bytes());
    let copy = disk.copy();
    copy.replace(&segments[0], newer);
    let error = open(&copy).expect_err("a newer version").to_string();
    assert!(error.contains("version 77"), "{error}");

    // A segment in another's place.
    let copy = disk.copy();
    copy.replace(&segments[1], disk.read(&segments[0]));
    let error = open(&copy).expect_err("a swapped segment").to_string();
    assert!(error.contains("says that it is segment"), "{error}");
}

#[test]
fn old_segments_go_when_two_snapshots_are_past_them() {
    let disk = SimDisk::default();
    let mut wal = create(&disk).expect("create");
    let mut largest = 0;
    for index in 1..=200 {
        wal.append(&state(1, index - 1), &[], &[entry(1, index, 300)]).expect("append");
        if index % 10 == 0 {
            wal.mark_snapshot(Marker { index, term: 1, installed: false }).expect("mark");
        }
        largest = largest.max(disk.list(Path::new(DIR)).expect("list").len());
    }
    assert!(largest <= 5, "{largest} segments at once");
    drop(wal);
    let (_, found) = open(&disk).expect("open");
    assert_eq!(found.markers.iter().map(|marker| marker.index).collect::<Vec<_>>(), [190, 200]);
    assert!(found.start <= 190 && found.start + found.entries.len() as u64 == 200);
}

#[test]
fn an_installed_snapshot_begins_the_log_anew() {
    let disk = SimDisk::default();
    let mut wal = create(&disk).expect("create");
    wal.append(&state(1, 0), &[], &[entry(1, 1, 10), entry(1, 2, 10)]).expect("append");
    let marker = Marker { index: 50, term: 3, installed: true };
    wal.append(&state(3, 50), &[marker], &[]).expect("install");
    for index in 51..=90 {
        wal.append(&state(3, index), &[], &[entry(3, index, 300)]).expect("append");
    }
    drop(wal);
    let (_, found) = open(&disk).expect("open");
    assert_eq!((found.start, found.entries.len(), found.markers.len()), (50, 40, 1));
}

#[test]
fn the_dump_shows_every_record() {
    let disk = SimDisk::default();
    long_log(&disk);
    let mut entries = Vec::new();
    let identity = minipod_store::wal::dump(&disk, Path::new(DIR), &mut |dumped| {
        entries.extend(dumped.record.entries.iter().map(|entry| entry.index));
    });
    assert_eq!(identity.expect("dump"), Some(IDENTITY));
    assert_eq!(entries, (1..=24).collect::<Vec<_>>());
}
