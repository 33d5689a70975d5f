//! Programs run in running containers.

mod support;

use std::time::Duration;

use minipod_podshim::protocol::{Capabilities, Empty, Fault, Input, Output, SandboxSpec, User, Window};
use support::{Pod, alive, until};

fn pod_with(script: &str) -> Pod {
    let mut pod = Pod::new();
    pod.start(pod.spec("a", script));
    pod
}

#[test]
fn output_and_exit_code() {
    let pod = pod_with("sleep 1000");
    let mut process = pod.exec("a", &["sh", "-c", "echo $GREETING; echo $$ >&2; exit 9"], false).expect("runs");
    let (out, err, code) = process.finish();
    assert_eq!((out.as_slice(), code), (&b"hello\n"[..], 9));
    assert_ne!(err, b"1\n", "it is in the container's PID namespace and not its first process");
    let (_, _, code) = pod.exec("a", &["sh", "-c", "kill -9 $$"], false).expect("runs").finish();
    assert_eq!(code, 137);
}

#[test]
fn it_is_inside_and_as_weak_as_the_container() {
    let mut pod = Pod::new();
    let mut spec = pod.spec("a", "for n in net ipc uts pid mnt cgroup; do readlink /proc/self/ns/$n; done; sleep 1000");
    spec.user = Some(User { uid: 1000, gid: 1000, groups: vec![5] });
    spec.capabilities = Some(Capabilities::default());
    spec.no_new_privs = true;
    spec.cwd = "/home".into();
    pod.start(spec);
    let first = until("namespaces", || pod.output("a", 0), |output| output.lines().count() == 6);
    let script = "for n in net ipc uts pid mnt cgroup; do readlink /proc/self/ns/$n; done";
    let (out, _, _) = pod.exec("a", &["sh", "-c", script], false).expect("runs").finish();
    assert_eq!(String::from_utf8_lossy(&out), first);
    let script = "pwd; id -u; id -G; grep -E 'CapBnd|NoNewPrivs' /proc/self/status | cut -f2; ls /proc/self/fd | wc -l";
    let (out, _, _) = pod.exec("a", &["sh", "-c", script], false).expect("runs").finish();
    assert_eq!(String::from_utf8_lossy(&out), "/home\n1000\n1000 5\n0000000000000000\n1\n4\n");
    // Its memory and processes count for the container.
    let cgroup = |pid: &str| {
        let command = ["cat".to_owned(), format!("/proc/{pid}/cgroup")];
        let words: Vec<&str> = command.iter().map(String::as_str).collect();
        pod.exec("a", &words, false).expect("runs").finish().0
    };
    assert_eq!(cgroup("self"), cgroup("1"));
}

#[test]
fn input_flows_through_without_a_deadlock() {
    let pod = pod_with("sleep 1000");
    let mut process = pod.exec("a", &["cat"], true).expect("runs");
    let data: Vec<u8> = (0..8_000_000_u32).map(|number| (number % 251) as u8).collect();
    // More than all buffers hold: one thread writes, the other reads.
    let mut copy = process.agent.try_clone();
    let sent = data.clone();
    let writer = std::thread::spawn(move || {
        for piece in sent.chunks(60_000) {
            copy.send_input(Input::Stdin(piece.to_vec()));
        }
        copy.send_input(Input::StdinClosed(Empty {}));
    });
    let (out, _, code) = process.finish();
    writer.join().expect("writer");
    assert_eq!(code, 0);
    assert!(out == data, "{} of {} bytes came back", out.len(), data.len());
}

#[test]
fn without_input_stdin_is_empty_and_closing_ends_it() {
    let pod = pod_with("sleep 1000");
    let (out, _, code) = pod.exec("a", &["cat"], false).expect("runs").finish();
    assert_eq!((out.len(), code), (0, 0));
    let mut process = pod.exec("a", &["cat"], true).expect("runs");
    process.input(Input::Stdin(b"one".to_vec()));
    assert_eq!(process.next(), Output::Stdout(b"one".to_vec()));
    process.input(Input::StdinClosed(Empty {}));
    assert_eq!(process.finish().2, 0);
}

#[test]
fn a_refusal_names_the_reason() {
    let mut pod = pod_with("sleep 1000");
    let refused = pod.exec("a", &["/bin/nonsense"], false).err().expect("refused");
    assert_eq!(
        (refused.step.as_str(), refused.errno, refused.fault()),
        ("run the program", libc::ENOENT, Fault::Container)
    );
    let refused = pod.exec("nobody", &["true"], false).err().expect("refused");
    assert_eq!((refused.fault(), refused.detail.as_str()), (Fault::Request, "it is not running"));
    pod.kill("a", 0, libc::SIGKILL, 0);
    pod.agent.ended("a");
    assert!(pod.exec("a", &["true"], false).is_err());
}

#[test]
fn it_ends_with_its_user_and_with_its_container() {
    let mut pod = pod_with("sleep 1000");
    let process = pod.exec("a", &["sleep", "1001"], false).expect("runs");
    let pid = process.pid;
    assert!(alive(pid));
    drop(process);
    until("the process of a user who is gone", || alive(pid), |alive| !alive);

    let mut process = pod.exec("a", &["sleep", "1001"], false).expect("runs");
    pod.kill("a", 0, libc::SIGTERM, 0);
    assert_eq!(process.finish().2, 137);
    assert_eq!(pod.agent.ended("a").exit_code, 137);

    let pod = pod_with("sleep 1000");
    let mut process = pod.exec("a", &["sleep", "1001"], true).expect("runs");
    process.input(Input::Signal(libc::SIGTERM));
    assert_eq!(process.finish().2, 143);
}

#[test]
fn a_slow_reader_holds_back_its_own_program_only() {
    let mut pod = pod_with("sleep 1000");
    let mut flood = pod.exec("a", &["yes"], false).expect("runs");
    std::thread::sleep(Duration::from_millis(300));
    // Nobody reads the flood; everything else goes on.
    let (out, _, _) = pod.exec("a", &["echo", "quick"], false).expect("runs").finish();
    assert_eq!(out, b"quick\n");
    assert_eq!(pod.run("b", "echo also").1, "also\n");
    let rss = std::fs::read_to_string(format!("/proc/{}/statm", pod.shim.id())).expect("statm");
    let pages: u64 = rss.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("pages");
    assert!(pages * 4 < 8_192, "the supervisor holds {} kB", pages * 4);
    for _ in 0..200 {
        assert!(matches!(flood.next(), Output::Stdout(data) if data.starts_with(b"y\n") || data.starts_with(b"\n")));
    }
}

#[test]
fn output_held_open_by_others_does_not_hold_the_end() {
    let pod = pod_with("sleep 1000");
    let mut process = pod.exec("a", &["sh", "-c", "echo out; sleep 1000 & exit 4"], false).expect("runs");
    assert_eq!(process.finish().2, 4);
    // Also when they go on writing.
    let script = "(while sleep 0.1; do echo more; done) & exit 5";
    let mut process = pod.exec("a", &["sh", "-c", script], false).expect("runs");
    assert_eq!(process.finish().2, 5);
}

#[test]
fn a_slow_reader_gets_what_was_written_before_the_end() {
    let pod = pod_with("sleep 1000");
    // As much as all buffers hold, so that the program ends before anything is read.
    let mut process = pod.exec("a", &["sh", "-c", "head -c 400000 /dev/zero; exit 3"], false).expect("runs");
    let pid = process.pid;
    // More than the supervisor ever waits for what stands still.
    std::thread::sleep(Duration::from_millis(1_500));
    let (out, _, code) = process.finish();
    assert_eq!((out.len(), code), (400_000, 3));
    assert!(!alive(pid));
}

#[test]
fn a_shared_pid_namespace_works_too() {
    let mut pod = Pod::with(SandboxSpec { share_pid: true, ..SandboxSpec::default() });
    pod.start(pod.spec("a", "sleep 1000"));
    let (out, _, code) = pod.exec("a", &["cat", "/proc/1/comm"], false).expect("runs").finish();
    assert!(code == 0 && String::from_utf8_lossy(&out).contains("pause"), "{out:?}");
    let mut host = Pod::with(SandboxSpec { host_pid: true, ..SandboxSpec::default() });
    host.start(host.spec("a", "sleep 1000"));
    let (out, _, _) = host.exec("a", &["sh", "-c", "echo $$"], false).expect("runs").finish();
    assert!(String::from_utf8_lossy(&out).trim().parse::<u32>().expect("a pid") > 1);
    host.stop();
}

#[test]
fn a_terminal_is_the_containers_own_and_has_the_size_that_it_is_told() {
    let mut pod = Pod::new();
    let mut spec = pod.spec("a", "sleep 1000");
    spec.user = Some(User { uid: 1000, gid: 1000, groups: vec![] });
    pod.start(spec);
    let script = "trap 'stty size' WINCH; tty; stty size; echo $TERM; echo x >$(tty) && echo open; \
                  while [ \"$line\" != bye ]; do read line; echo got $line; done; echo end >&2; exit 5";
    let window = Window { rows: 33, columns: 44 };
    let mut process = pod.exec_on("a", &["sh", "-c", script], true, Some(window)).expect("runs");
    let begin = process.shown("open");
    assert!(begin.contains("/dev/pts/0\r\n33 44\r\nxterm\r\n"), "{begin:?}");
    process.input(Input::Resize(Window { rows: 50, columns: 132 }));
    // The signal ends a `read` of the shell; an empty line ends one that began just before it came.
    process.input(Input::Stdin(b"\n".to_vec()));
    process.shown("50 132\r\n");
    process.input(Input::Stdin(b"one\n".to_vec()));
    // It echoes what is typed, and both outputs are one.
    let then = process.shown("got one\r\n");
    assert_eq!(then.matches("one\r\n").count(), 2, "{then:?}");
    process.input(Input::Stdin(b"bye\n".to_vec()));
    let (out, err, code) = process.finish();
    let out = String::from_utf8_lossy(&out);
    assert!(out.ends_with("got bye\r\nend\r\n") && err.is_empty() && code == 5, "{code} {out:?}");
}

#[test]
fn keys_are_signals_on_a_terminal_and_its_end_is_theirs() {
    let pod = pod_with("sleep 1000");
    let window = Window { rows: 24, columns: 80 };
    let mut process = pod.exec_on("a", &["sh", "-c", "echo go; exec sleep 1001"], true, Some(window)).expect("runs");
    process.shown("go");
    process.input(Input::Stdin(vec![3]));
    assert_eq!(process.finish().2, 128 + libc::SIGINT);
    // Its user goes away: nothing of the session stays.
    let script = "sleep 1002 & echo go; wait";
    let mut process = pod.exec_on("a", &["sh", "-c", script], false, Some(window)).expect("runs");
    process.shown("go");
    let pid = process.pid;
    drop(process);
    until("the process of a user who is gone", || alive(pid), |alive| !alive);
    let (out, _, _) =
        pod.exec("a", &["sh", "-c", "for p in /proc/[0-9]*; do cat $p/cmdline; done"], false).expect("runs").finish();
    assert!(!String::from_utf8_lossy(&out).contains("sleep\x001002"), "{}", String::from_utf8_lossy(&out));
    // A large output comes whole although the terminal ends with its program.
    let script = "stty -opost; head -c 3000000 /dev/zero | tr '\\0' x";
    let (out, _, code) = pod.exec_on("a", &["sh", "-c", script], false, Some(window)).expect("runs").finish();
    assert_eq!((out.len(), code), (3_000_000, 0));
}

/// Beside others, so that the kernel's own thread between the two ends of a terminal is late now and then.
#[test]
fn the_last_words_on_a_terminal_come_every_time() {
    let mut pod = Pod::new();
    pod.start(pod.spec("a", "sleep 1000"));
    // More than the kernel holds for a reader (4 kB) in the second one.
    let short = ("echo first; echo last >&2; exit 6", "first\r\nlast\r\n".to_owned());
    let long = ("seq 2000; echo last; exit 6", (1..=2000).map(|n| format!("{n}\r\n")).collect::<String>() + "last\r\n");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..50 {
                    let (script, wanted) = if round % 5 == 4 { &long } else { &short };
                    let window = Some(Window { rows: 24, columns: 80 });
                    let (out, _, code) = pod.exec_on("a", &["sh", "-c", script], true, window).expect("runs").finish();
                    let out = String::from_utf8_lossy(&out);
                    assert!(out == *wanted && code == 6, "round {round}, code {code}: {} bytes: {out:?}", out.len());
                }
            });
        }
    });
    // The log of a container with a terminal is read by another thread.
    for attempt in 0..20 {
        let mut spec = pod.spec_of("t", attempt, &["sh", "-c", long.0]);
        spec.terminal = Some(Window { rows: 24, columns: 80 });
        pod.run_spec(spec);
        let log = pod.output("t", attempt).replace('\r', "");
        assert_eq!(log, long.1.replace('\r', ""), "run {attempt}");
    }
}

#[test]
fn a_container_without_terminals_is_refused_one() {
    let mut pod = Pod::new();
    // One that may mount puts a file of its own where the terminals were.
    let mut spec = pod.spec("a", "mount -t tmpfs none /dev/pts; echo trap >/dev/pts/ptmx; sleep 1000");
    let all = (1 << 22) - 1;
    spec.capabilities = Some(Capabilities { bounding: all, permitted: all, effective: all, ..Capabilities::default() });
    pod.start(spec);
    let window = Window { rows: 24, columns: 80 };
    let refused = until(
        "the container to have no terminals",
        || pod.exec_on("a", &["true"], false, Some(window)).err(),
        Option::is_some,
    );
    let refused = refused.expect("refused");
    assert_eq!((refused.fault(), refused.object.as_str()), (Fault::Container, "/dev/pts/ptmx"));
}

#[test]
fn a_full_input_does_not_hide_that_the_user_has_gone() {
    let pod = pod_with("sleep 1000");
    let mut process = pod.exec("a", &["sleep", "1001"], true).expect("runs");
    let pid = process.pid;
    // More than the supervisor and the pipe take, and less than would hold up this test.
    for _ in 0..6 {
        process.input(Input::Stdin(vec![b'x'; 60_000]));
    }
    std::thread::sleep(Duration::from_millis(100));
    assert!(alive(pid));
    drop(process);
    until("the process of a user who is gone", || alive(pid), |alive| !alive);
    let ticks = || {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pod.shim.id())).expect("stat");
        stat.rsplit(' ').nth(52 - 14).and_then(|ticks| ticks.parse::<u64>().ok()).expect("utime")
    };
    let before = ticks();
    std::thread::sleep(Duration::from_millis(300));
    assert!(ticks() - before < 10, "the supervisor spins");
}
