use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use tokio::sync::oneshot;
use tokio_stream::StreamExt;

use super::*;

fn line(second: u32, stream: &str, tag: &str, text: &str) -> String {
    format!("2026-01-31T12:00:{second:02}.000000000Z {stream} {tag} {text}\n")
}

fn append(path: &Path, text: &str) {
    let mut file = OpenOptions::new().create(true).append(true).open(path).expect("open");
    file.write_all(text.as_bytes()).expect("write");
}

async fn collect(path: &Path, options: LogOptions) -> String {
    let chunks: Vec<_> = read_log(path.to_owned(), options, std::future::pending()).collect().await;
    let bytes: Vec<u8> = chunks.into_iter().flat_map(|chunk| chunk.expect("readable")).collect();
    String::from_utf8(bytes).expect("UTF-8")
}

fn numbers(from: u32, to: u32) -> String {
    (from..to).map(|n| line(n % 60, "stdout", "F", &format!("line {n}"))).collect()
}

#[tokio::test]
async fn pieces_become_lines_again() {
    let dir = tempfile::tempdir().expect("tempdir");
    let log = dir.path().join("0.log");
    let pieces = [
        ("stdout", "P", "one "),
        ("stderr", "P", "bad "),
        ("stdout", "F", "two"),
        ("stdout", "F", ""),
        ("stderr", "F", "news"),
        ("stdout", "F:x", "tagged"),
        ("stdout", "P", "unfinished"),
    ];
    append(&log, &pieces.iter().map(|(stream, tag, text)| line(0, stream, tag, text)).collect::<String>());
    append(&log, "not a log line\n");
    assert_eq!(collect(&log, LogOptions::default()).await, "one two\n\nbad news\ntagged\nnot a log line\nunfinished");
    let stamped = collect(&log, LogOptions { timestamps: true, ..LogOptions::default() }).await;
    assert!(
        stamped.starts_with("2026-01-31T12:00:00.000000000Z one two\n2026-01-31T12:00:00.000000000Z \n"),
        "{stamped}"
    );
}

#[tokio::test]
async fn the_last_lines_are_found_from_the_end() {
    let dir = tempfile::tempdir().expect("tempdir");
    let log = dir.path().join("0.log");
    // Lines around the size of a block, so that heads lie across its border.
    let filler = "x".repeat(1000);
    let mut text = String::new();
    for n in 0..300 {
        text += &line(n % 60, "stdout", "P", &filler);
        text += &line(n % 60, "stdout", "F", &n.to_string());
    }
    append(&log, &text);
    for tail in [0, 1, 2, 61, 62, 63, 64, 65, 66, 130, 299, 300, 301] {
        let got = collect(&log, LogOptions { tail_lines: Some(tail), ..LogOptions::default() }).await;
        let from = 300_u64.saturating_sub(tail);
        let want: String = (from..300).map(|n| format!("{filler}{n}\n")).collect();
        assert!(got == want, "the last {tail}: {} lines", got.lines().count());
    }
    append(&log, &line(0, "stdout", "P", "and"));
    let options = LogOptions { tail_lines: Some(2), ..LogOptions::default() };
    assert_eq!(collect(&log, options).await, format!("{filler}299\nand"));
}

#[tokio::test]
async fn a_moment_and_a_limit_bound_it() {
    let dir = tempfile::tempdir().expect("tempdir");
    let log = dir.path().join("0.log");
    append(&log, &numbers(0, 60));
    // 2026-01-31T12:00:57Z
    let since = Some(UNIX_EPOCH + Duration::from_secs(1_769_860_857));
    let options = LogOptions { since, ..LogOptions::default() };
    assert_eq!(collect(&log, options.clone()).await, "line 57\nline 58\nline 59\n");
    let options = LogOptions { limit_bytes: Some(10), ..options };
    assert_eq!(collect(&log, options).await, "line 57\nli");
    assert_eq!(collect(&log, LogOptions { limit_bytes: Some(0), ..LogOptions::default() }).await, "");
    assert_eq!(collect(&dir.path().join("absent"), LogOptions::default()).await, "");
}

#[tokio::test]
async fn big_logs_come_in_bounded_chunks() {
    let dir = tempfile::tempdir().expect("tempdir");
    let log = dir.path().join("0.log");
    append(&log, &line(0, "stdout", "F", &"y".repeat(16 << 10)).repeat(40));
    let chunks: Vec<_> = read_log(log, LogOptions::default(), std::future::pending()).collect().await;
    let sizes: Vec<usize> = chunks.into_iter().map(|chunk| chunk.expect("readable").len()).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 40 * ((16 << 10) + 1));
    assert!(sizes.iter().all(|size| *size <= CHUNK_BYTES), "{sizes:?}");
}

/// Reads until what has come ends with `end`.
async fn until(chunks: &mut ReceiverStream<Result<Vec<u8>, LogError>>, end: &str) -> String {
    let mut text = String::new();
    while !text.ends_with(end) {
        let chunk = tokio::time::timeout(Duration::from_secs(10), chunks.next()).await;
        let chunk = chunk.unwrap_or_else(|_| panic!("waiting for {end:?}, got {text:?}"));
        text += std::str::from_utf8(&chunk.expect("not over").expect("readable")).expect("UTF-8");
    }
    text
}

#[tokio::test]
async fn following_goes_across_rotation_to_the_end() {
    let dir = tempfile::tempdir().expect("tempdir");
    let log = dir.path().join("0.log");
    let (end, ended) = oneshot::channel::<()>();
    let over = async move { ended.await.expect("told") };
    let mut chunks = read_log(log.clone(), LogOptions { follow: true, ..LogOptions::default() }, over);
    tokio::time::sleep(Duration::from_millis(20)).await;
    append(&log, &numbers(0, 3));
    assert_eq!(until(&mut chunks, "line 2\n").await, "line 0\nline 1\nline 2\n");
    // A line in two writes.
    let half = line(3, "stdout", "F", "line 3");
    append(&log, &half[..20]);
    append(&log, &half[20..]);
    assert_eq!(until(&mut chunks, "line 3\n").await, "line 3\n");
    // Two rotations at once: nothing of the file between them is lost.
    append(&log, &numbers(4, 6));
    fs::rename(&log, dir.path().join("0.log.1")).expect("rotate");
    append(&log, &numbers(6, 8));
    fs::rename(dir.path().join("0.log.1"), dir.path().join("0.log.2")).expect("rotate");
    fs::rename(&log, dir.path().join("0.log.1")).expect("rotate");
    append(&log, &numbers(8, 10));
    let want: String = (4..10).map(|n| format!("line {n}\n")).collect();
    assert_eq!(until(&mut chunks, "line 9\n").await, want);
    append(&log, &line(10, "stdout", "P", "the end"));
    end.send(()).expect("still read");
    let rest: Vec<_> = tokio::time::timeout(Duration::from_secs(10), chunks.collect()).await.expect("ends");
    let rest: Vec<u8> = rest.into_iter().flat_map(|chunk: Result<_, LogError>| chunk.expect("readable")).collect();
    assert_eq!(rest, b"the end");
}

#[tokio::test]
async fn a_reader_that_goes_ends_the_following() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (held, gone) = oneshot::channel::<()>();
    let over = async move {
        let _held = held;
        std::future::pending::<()>().await;
    };
    let chunks = read_log(dir.path().join("0.log"), LogOptions { follow: true, ..LogOptions::default() }, over);
    drop(chunks);
    let ended = tokio::time::timeout(Duration::from_secs(10), gone).await;
    assert!(ended.expect("the reading ends").is_err(), "its future was dropped");
}

#[tokio::test]
async fn rotated_files_are_read_too() {
    let dir = tempfile::tempdir().expect("tempdir");
    let log = dir.path().join("0.log");
    let name = |number: u32| dir.path().join(format!("0.log.{number}"));
    for (path, from, to) in [(name(2), 0, 10), (name(1), 10, 20), (log.clone(), 20, 30)] {
        append(&path, &numbers(from, to));
    }
    let lines = |from: u32| (from..30).map(|n| format!("line {n}\n")).collect::<String>();
    assert_eq!(collect(&log, LogOptions::default()).await, lines(0));
    for tail in [0, 1, 9, 10, 11, 19, 20, 21, 29, 30, 31] {
        let options = LogOptions { tail_lines: Some(tail), ..LogOptions::default() };
        let tail = u32::try_from(tail).expect("small");
        assert_eq!(collect(&log, options).await, lines(30_u32.saturating_sub(tail)), "the last {tail}");
    }
    // Following begins there as well, and goes on.
    let options = LogOptions { follow: true, tail_lines: Some(15), ..LogOptions::default() };
    let mut chunks = read_log(log.clone(), options, std::future::pending());
    assert_eq!(until(&mut chunks, "line 29\n").await, lines(15));
    append(&log, &numbers(30, 31));
    assert_eq!(until(&mut chunks, "line 30\n").await, "line 30\n");
    // Between the two renames of a rotation the newest file is missing.
    fs::remove_file(&log).expect("removed");
    let options = LogOptions { tail_lines: Some(2), ..LogOptions::default() };
    assert_eq!(collect(&log, options).await, "line 18\nline 19\n");
    // A file that was seen under two names, as in a rotation meanwhile, comes once.
    fs::hard_link(name(1), &log).expect("linked");
    assert_eq!(collect(&log, LogOptions::default()).await, (0..20).map(|n| format!("line {n}\n")).collect::<String>());
}
