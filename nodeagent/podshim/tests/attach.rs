//! Users attached to running containers.

mod support;

use std::time::Duration;

use minipod_podshim::protocol::{Empty, Fault, Input, SandboxSpec, Window};
use support::{Pod, alive, until};

const WINDOW: Window = Window { rows: 24, columns: 80 };

#[test]
fn output_from_now_on_and_the_exit_code() {
    let mut pod = Pod::new();
    let script =
        "echo before; while read line; do echo got $line; echo err >&2; [ $line = bye ] && exit 6; done; exit 9";
    let mut spec = pod.spec("a", script);
    spec.stdin = true;
    pod.start(spec);
    until("the first line", || pod.output("a", 0), |output| output == "before\n");
    let mut one = pod.attach("a", true, None).expect("attached");
    let mut other = pod.attach("a", false, None).expect("attached");
    one.input(Input::Stdin(b"x\n".to_vec()));
    assert_eq!(one.shown("got x"), "got x\n");
    // Not stdinOnce: whoever goes leaves the input open.
    one.input(Input::StdinClosed(Empty {}));
    drop(one);
    let mut two = pod.attach("a", true, None).expect("attached");
    two.input(Input::Stdin(b"bye\n".to_vec()));
    let (out, err, code) = two.finish();
    assert_eq!((String::from_utf8_lossy(&out).as_ref(), code), ("got bye\n", 6));
    assert!(err == b"err\n" || err == b"err\nerr\n", "{err:?}");
    let (out, err, code) = other.finish();
    assert_eq!(
        (String::from_utf8_lossy(&out).as_ref(), err.as_slice(), code),
        ("got x\ngot bye\n", &b"err\nerr\n"[..], 6)
    );
    assert_eq!(pod.agent.ended("a").exit_code, 6);
    let mut lines: Vec<String> = pod.output("a", 0).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["before", "err", "err", "got bye", "got x"], "the log has it all the same");
    let refused = pod.attach("a", false, None).err().expect("refused");
    assert_eq!((refused.fault(), refused.detail.as_str()), (Fault::Request, "it is not running"));
    pod.stop();
}

#[test]
fn input_that_ends_with_its_first_user() {
    let mut pod = Pod::new();
    for (name, goes) in [("closes", false), ("goes", true)] {
        let mut spec = pod.spec(name, "cat; echo end");
        (spec.stdin, spec.stdin_once) = (true, true);
        pod.start(spec);
        let mut user = pod.attach(name, true, None).expect("attached");
        user.input(Input::Stdin(b"one\n".to_vec()));
        assert_eq!(user.shown("one"), "one\n");
        if goes {
            drop(user);
        } else {
            user.input(Input::StdinClosed(Empty {}));
            assert_eq!(user.finish().2, 0);
        }
        assert_eq!(pod.agent.ended(name).exit_code, 0);
        assert_eq!(pod.output(name, 0), "one\nend\n");
    }
    pod.stop();
}

#[test]
fn a_container_with_a_terminal() {
    let mut pod = Pod::new();
    let script = "tty; [ -t 0 ] && [ -t 1 ] && [ -t 2 ] && echo all; echo $TERM; trap 'stty size' WINCH; \
                  while [ \"$line\" != bye ]; do read line; echo got $line; done; stty size; exit 5";
    let mut spec = pod.spec("a", script);
    (spec.stdin, spec.terminal) = (true, Some(WINDOW));
    pod.start(spec);
    until("the first lines", || pod.output("a", 0), |output| output == "/dev/pts/0\nall\nxterm\n");
    let log = std::fs::read_to_string(pod.data.path().join("a.0.log")).expect("log");
    assert!(
        log.lines().next().is_some_and(|line| line.ends_with(" stdout F /dev/pts/0")) && log.contains("all\r\n"),
        "{log:?}"
    );
    let mut user = pod.attach("a", true, Some(Window { rows: 33, columns: 44 })).expect("attached");
    user.shown("33 44\r\n");
    user.input(Input::Resize(Window { rows: 50, columns: 132 }));
    user.input(Input::Stdin(b"\n".to_vec()));
    user.shown("50 132\r\n");
    // Detached and attached again: it goes on.
    drop(user);
    let mut user = pod.attach("a", true, Some(Window { rows: 50, columns: 132 })).expect("attached");
    user.input(Input::Stdin(b"bye\n".to_vec()));
    let (out, err, code) = user.finish();
    let out = String::from_utf8_lossy(&out);
    assert!(out.ends_with("got bye\r\n50 132\r\n") && err.is_empty() && code == 5, "{code} {out:?}");
    assert_eq!(pod.agent.ended("a").exit_code, 5);

    let mut spec = pod.spec("once", "cat; echo end; exit 3");
    (spec.stdin, spec.stdin_once, spec.terminal) = (true, true, Some(WINDOW));
    pod.start(spec);
    let mut user = pod.attach("once", true, Some(WINDOW)).expect("attached");
    user.input(Input::Stdin(b"one\n".to_vec()));
    user.input(Input::StdinClosed(Empty {}));
    let (out, _, code) = user.finish();
    assert!(out.ends_with(b"end\r\n") && code == 3, "{code} {:?}", String::from_utf8_lossy(&out));
    pod.stop();
}

#[test]
fn a_terminals_last_output_comes_whole() {
    let mut pod = Pod::new();
    let mut spec = pod.spec("a", "read go; stty -opost; head -c 3000000 /dev/zero | tr '\\0' x; echo end");
    (spec.stdin, spec.terminal) = (true, Some(WINDOW));
    pod.start(spec);
    let mut user = pod.attach("a", true, Some(WINDOW)).expect("attached");
    user.input(Input::Stdin(b"\n".to_vec()));
    let (out, _, code) = user.finish();
    // The echo of the first line, and the rest.
    assert_eq!((out.len(), code), (2 + 3_000_000 + 4, 0));
    pod.agent.ended("a");
    // Read by lines, which takes the carriage return of the echo.
    assert_eq!(pod.output("a", 0).len(), 1 + 3_000_000 + 4);
    pod.stop();
}

#[test]
fn who_is_attached_and_does_not_read_holds_nobody_up() {
    let mut pod = Pod::new();
    let mut spec = pod.spec("a", "read go; head -c 50000000 /dev/zero | tr '\\0' x; echo end");
    spec.stdin = true;
    pod.start(spec);
    let mut user = pod.attach("a", true, None).expect("attached");
    user.input(Input::Stdin(b"\n".to_vec()));
    // Nobody reads; the container comes to its end, and its log is whole.
    assert_eq!(pod.agent.ended("a").exit_code, 0);
    let output = pod.output("a", 0);
    assert!(output.len() == 50_000_004 && output.ends_with("xend\n"), "{} bytes", output.len());
    let (out, _, code) = user.finish();
    assert!(out.len() < 50_000_000 && code == 0, "{} bytes", out.len());
    pod.stop();
}

#[test]
fn who_is_attached_and_reads_gets_everything() {
    let mut pod = Pod::new();
    let mut spec = pod.spec("a", "read go; seq 1 1000000");
    spec.stdin = true;
    pod.start(spec);
    let mut user = pod.attach("a", true, None).expect("attached");
    user.input(Input::Stdin(b"\n".to_vec()));
    let (out, _, code) = user.finish();
    let expected: String = (1..=1_000_000).map(|number| format!("{number}\n")).collect();
    assert!(out == expected.as_bytes() && code == 0, "{} of {} bytes, {code}", out.len(), expected.len());
    pod.stop();
}

#[test]
fn the_process_outlives_its_users_and_they_are_told_its_end() {
    let mut pod = Pod::new();
    pod.start(pod.spec("a", "sleep 1000"));
    let mut users: Vec<_> = (0..8).map(|_| pod.attach("a", true, None).expect("attached")).collect();
    assert!(pod.attach("a", false, None).is_err(), "there is an end to how many");
    let pid = users[0].pid;
    // It takes no input, and what is sent all the same is dropped.
    users[0].input(Input::Stdin(vec![b'x'; 60_000]));
    users[0].input(Input::Signal(libc::SIGKILL));
    drop(users.pop());
    std::thread::sleep(Duration::from_millis(100));
    assert!(alive(pid));
    pod.kill("a", 0, libc::SIGTERM, 0);
    for mut user in users {
        assert_eq!(user.finish().2, 137);
    }
    pod.stop();
}

#[test]
fn a_container_among_the_processes_of_another() {
    let mut pod = Pod::new();
    pod.start(pod.spec("target", "sleep 1234"));
    let mut spec =
        pod.spec("guest", "cat /proc/1/cmdline | tr '\\0' ' '; echo; ls /proc/1/root/bin/busybox; sleep 1000");
    spec.pid_of = "target".into();
    pod.start(spec);
    let seen = until("the guest's words", || pod.output("guest", 0), |output| output.lines().count() > 0);
    assert!(seen.starts_with("sh -c sleep 1234") || seen.starts_with("sleep 1234"), "{seen}");
    let mut nobody = pod.spec("lost", "true");
    nobody.pid_of = "nobody".into();
    let refused = pod.try_start(nobody).expect_err("refused");
    assert_eq!(
        (refused.step.as_str(), refused.detail.as_str()),
        ("enter the processes of container", "it is not running")
    );
    // The target's end is the guest's too.
    pod.kill("target", 0, libc::SIGKILL, 0);
    assert_eq!(pod.agent.ended("guest").exit_code, 137);
    assert_eq!(pod.agent.ended("target").exit_code, 137);
    pod.stop();

    // Where all see each other's, there is nothing to enter.
    let mut pod = Pod::with(SandboxSpec { share_pid: true, ..SandboxSpec::default() });
    pod.start(pod.spec("target", "sleep 1234"));
    let mut spec = pod.spec("guest", "cat /proc/1/comm");
    spec.pid_of = "target".into();
    let (_, output) = pod.run_spec(spec);
    assert!(output.contains("pause"), "{output}");
    pod.stop();
}
