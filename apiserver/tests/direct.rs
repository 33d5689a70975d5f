//! A store in the API server's own process is given transactions without a client between. Both ways must be the same: the same
//! random transactions to two stores, one of them by way of the client, end the same.

mod support;

use std::path::Path;

use minipod_apiserver::storage::{self, Guard, Outcome, Part, Storage, StoreError, Write};
use minipod_store::service::{Config, Store};
use support::Dice;

const ROUNDS: usize = 400;
const KEYS: usize = 12;

async fn open(dir: &Path) -> (Store, Storage) {
    let store = Store::open(Config::alone(dir.to_owned())).await.expect("a new store");
    let client = store.client(None).await.expect("a client");
    let follower = store.client(Some(storage::following())).await.expect("a client");
    let storage = Storage::from_clients(&client, &follower, 128);
    (store, storage)
}

/// Conditions and changes on few keys: some conditions hold, by the revisions that were seen last.
fn part(dice: &mut Dice, keys: std::ops::Range<usize>, seen: &[i64]) -> Part {
    let key = |number: usize| format!("/minipod/{number}").into_bytes();
    let mut part = Part::default();
    for number in keys {
        match dice.roll(4) {
            0 => {}
            1 => part.guards.push(Guard::new(key(number), dice.roll(3) as i64)),
            _ => part.guards.push(Guard::new(key(number), seen[number])),
        }
        match dice.roll(6) {
            0 => part.writes.push(Write::Delete(key(number))),
            1 => {}
            sort => part.writes.push(Write::Put(key(number), vec![b'v'; sort * sort * 60])),
        }
    }
    part
}

/// The last revisions of all keys.
async fn revisions(storage: &Storage) -> Vec<i64> {
    let keys = (0..KEYS).map(|number| format!("/minipod/{number}").into_bytes()).collect();
    let items = storage.get_many(keys).await.expect("read");
    items.into_iter().map(|item| item.map_or(0, |item| item.revision)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_ends_the_same_with_and_without_a_client_between() {
    let dirs = [tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory")];
    let (_one, by_client) = open(dirs[0].path()).await;
    let (two, storage) = open(dirs[1].path()).await;
    let own = storage.with_own(two.transactor());
    let mut dice = Dice(7);
    let (mut done, mut lost) = (0, 0);
    for round in 0..ROUNDS {
        let seen = revisions(&by_client).await;
        assert_eq!(seen, revisions(&own).await, "round {round}");
        if dice.roll(3) == 0 {
            let Part { guards, writes } = part(&mut dice, 0..3, &seen);
            let ends = [
                by_client.txn(guards.clone(), writes.clone()).await.expect("carried out"),
                own.txn(guards, writes).await.expect("carried out"),
            ];
            assert_eq!(ends[0], ends[1], "round {round}");
            continue;
        }
        // Parts of one transaction have no key in common.
        let parts: Vec<Part> = (0..KEYS / 3).map(|at| part(&mut dice, at * 3..at * 3 + 3, &seen)).collect();
        let ends =
            [by_client.txn_each(&parts).await.expect("carried out"), own.txn_each(&parts).await.expect("carried out")];
        assert_eq!(ends[0], ends[1], "round {round}: {parts:?}");
        for end in &ends[0] {
            match end {
                Outcome::Done { .. } => done += 1,
                Outcome::Lost { present } => lost += usize::from(present.iter().any(Option::is_some)),
            }
        }
    }
    assert!(done > ROUNDS / 4 && lost > ROUNDS / 4, "{done} held, {lost} did not");

    // What is refused, too.
    let large = || vec![Write::Put(b"/minipod/large".to_vec(), vec![0; 2 << 20])];
    let ends = [by_client.txn(Vec::new(), large()).await, own.txn(Vec::new(), large()).await];
    for end in ends {
        assert!(matches!(end, Err(StoreError::TooLarge { .. })), "{end:?}");
    }
    let many = || (0..200).map(|number| Write::Put(format!("/minipod/m{number}").into_bytes(), Vec::new())).collect();
    let ends = [by_client.txn(Vec::new(), many()).await, own.txn(Vec::new(), many()).await];
    let texts = ends.map(|end| end.expect_err("too many operations").to_string());
    assert_eq!(texts[0], texts[1]);
}
