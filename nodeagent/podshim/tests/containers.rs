//! Containers on the real kernel: start, end, what they see, what they are.

mod support;

use support::Pod;

#[test]
fn exit_codes_output_and_environment() {
    let mut pod = Pod::new();
    let (ended, output) = pod.run("a", "echo $GREETING; echo err >&2; printf partial; exit 7");
    assert_eq!((ended.exit_code, ended.signal, ended.oom), (7, 0, false));
    assert_eq!(output, "hello\nerr\npartial");
    assert!(ended.started_wall_ms <= ended.finished_wall_ms && ended.started_wall_ms > 1_700_000_000_000);
    pod.stop();
}
