use super::*;
use crate::storage::Guard;

/// A part by words: `?KEY` compares, `=KEY` puts, `-KEY` deletes, `=KEY*BYTES` puts so much.
fn part(words: &str) -> Part {
    let mut part = Part::default();
    for word in words.split_whitespace() {
        let (what, key) = word.split_at(1);
        match what {
            "?" => part.guards.push(Guard::new(key, 0)),
            "-" => part.writes.push(Write::Delete(key.into())),
            "=" => {
                let (key, bytes) = key.split_once('*').unwrap_or((key, "1"));
                part.writes.push(Write::Put(key.into(), vec![0; bytes.parse().expect("a number")]));
            }
            _ => panic!("{word}"),
        }
    }
    part
}

fn planned(parts: &[&str], max_ops: usize) -> Vec<usize> {
    let parts: Vec<Part> = parts.iter().map(|words| part(words)).collect();
    plan(parts.iter(), max_ops)
}

#[test]
fn what_meets_in_one_transaction() {
    let table: &[(&str, &[&str], &[usize])] = &[
        ("nothing waits", &[], &[]),
        ("one alone", &["?a =a"], &[0]),
        ("creates in one namespace", &["?a ?ns =a", "?b ?ns =b", "?c ?ns =c"], &[0, 1, 2]),
        ("a name twice: the second one finds the first one there", &["?a =a", "?b =b", "?a =a", "?c =c"], &[0, 1, 3]),
        ("one writes what another one compares", &["?a ?ns =a", "?ns =ns", "?b ?ns =b"], &[0, 2]),
        ("one compares what another one writes", &["?ns =ns", "?a ?ns =a", "?x -x"], &[0, 2]),
        ("two write a ledger", &["?a ?led =a =led", "?b ?led =b =led"], &[0]),
        ("each would be right alone, not both", &["?a ?b =a", "?a ?b =b"], &[0]),
        ("writes without guards", &["=a", "=b", "-a"], &[0, 1]),
    ];
    for (what, parts, want) in table {
        assert_eq!(planned(parts, 128), *want, "{what}");
    }
}

#[test]
fn a_transaction_ends_where_the_store_would_refuse_it() {
    // Each takes one operation, and what is in it shares what is left: two compares.
    let creates: Vec<String> = (0..200).map(|index| format!("?p{index} ?ns =p{index}")).collect();
    let creates: Vec<&str> = creates.iter().map(String::as_str).collect();
    assert_eq!(planned(&creates, 128).len(), 126);
    assert_eq!(planned(&creates, 32).len(), 30);
    // One with more in it leaves less room for others, wherever it stands.
    let large = "?a ?b ?c ?d ?e ?f ?g ?h ?i ?j =a";
    assert_eq!(planned(&[&[large], &creates[..]].concat(), 32).len(), 22);
    assert_eq!(planned(&[&creates[..25], &[large]].concat(), 32).len(), 25);
    // One that is too large for any other goes alone; the store says whether it is too large for itself.
    assert_eq!(planned(&["?a =a*2000000", "?b =b"], 128), [0]);
    assert_eq!(planned(&["?b =b", "?a =a*2000000", "?c =c"], 128), [0]);
    assert_eq!(planned(&["?a =a*400000", "?b =b*300000", "?c =c*200000"], 128), [0, 1]);
    assert_eq!(planned(&["?a =a =b =c =d =e"], 4), [0], "it is the store's to refuse");
}

#[test]
fn many_writes_of_one_key_do_not_keep_others_away_nor_the_queue_locked() {
    let mut parts = vec!["?hot =hot"; 100];
    parts.extend(["?a =a", "?b =b"]);
    assert_eq!(planned(&parts, 32), [0, 100, 101]);
    let mut parts = vec!["?hot =hot"; 1_000];
    parts.push("?a =a");
    assert_eq!(planned(&parts, 32), [0], "looked at are 128");
}
