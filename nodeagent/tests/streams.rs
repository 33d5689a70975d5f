//! Logs and exec through tunnels.

mod support;

use minipod_proto::v1::open_stream::Request;
use minipod_proto::v1::tunnel_frame::Frame;
use minipod_proto::v1::{
    AttachStart, ExecFrame, ExecStart, ImageListRequest, LogsRequest, PortFrame, PortStart, TerminalSize, TunnelEnd,
    exec_frame, port_frame,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::fake_api::Tunnel;
use support::*;

fn exec_request(container: &str, command: &[&str], stdin: bool) -> Request {
    let command = command.iter().map(|word| (*word).to_owned()).collect();
    Request::Exec(ExecStart { container: container.into(), command, stdin, ..ExecStart::default() })
}

async fn input(tunnel: &Tunnel, frame: exec_frame::Frame) {
    tunnel.send(Frame::Exec(ExecFrame { frame: Some(frame) })).await;
}

/// stdout, stderr and how it ended.
async fn output(tunnel: &mut Tunnel) -> (String, String, Result<i32, String>) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let end = loop {
        match tunnel.next().await {
            Some(Frame::Exec(ExecFrame { frame: Some(frame) })) => match frame {
                exec_frame::Frame::Stdout(data) => stdout.extend_from_slice(&data),
                exec_frame::Frame::Stderr(data) => stderr.extend_from_slice(&data),
                exec_frame::Frame::ExitCode(code) => break Ok(code),
                exec_frame::Frame::Error(error) => break Err(error),
                other => panic!("{other:?}"),
            },
            Some(Frame::End(TunnelEnd { message, .. })) => break Err(message),
            Some(Frame::Taken(_)) => {}
            other => panic!("{other:?}"),
        }
    };
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (text(stdout), text(stderr), end)
}

#[test]
fn programs_run_in_containers() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-exec";
        node.api.put(scripts(uid, "Always", 0, &[("a:one", "sleep 1000"), ("a:two", "sleep 1000")])).await;
        node.wait_running(uid).await;
        let script = "echo out; echo err >&2; hostname; exit 7";
        let mut tunnel = node.api.open(uid, exec_request("one", &["sh", "-c", script], false)).await;
        assert_eq!(output(&mut tunnel).await, ("out\nuid-exec\n".into(), "err\n".into(), Ok(7)));
        let mut tunnel = node.api.open(uid, exec_request("two", &["cat"], true)).await;
        for text in ["a", "b\n"] {
            input(&tunnel, exec_frame::Frame::Stdin(text.as_bytes().to_vec().into())).await;
        }
        input(&tunnel, exec_frame::Frame::StdinClosed(true)).await;
        assert_eq!(output(&mut tunnel).await, ("ab\n".into(), String::new(), Ok(0)));
        // More than all buffers hold.
        let mut tunnel = node.api.open(uid, exec_request("one", &["sh", "-c", "yes | head -c 8000000"], false)).await;
        let (stdout, _, end) = output(&mut tunnel).await;
        assert_eq!((stdout.len(), end), (8_000_000, Ok(0)));
        for (container, command, part) in [
            ("one", &["/nonsense"][..], "No such file"),
            ("three", &["true"], "no container \"three\""),
            ("", &["true"], "name one of the containers: one, two"),
            ("one", &[], "no command"),
        ] {
            let mut tunnel = node.api.open(uid, exec_request(container, command, false)).await;
            let (_, _, end) = output(&mut tunnel).await;
            assert!(end.as_ref().is_err_and(|error| error.contains(part)), "{command:?}: {end:?}");
        }
        // The user goes away: so does the process.
        let mut tunnel = node.api.open(uid, exec_request("one", &["sh", "-c", "echo $$; exec sleep 987"], false)).await;
        assert!(matches!(tunnel.next().await, Some(Frame::Exec(_))));
        drop(tunnel);
        let sleeps = || {
            let cmdline = |path: &std::path::Path| std::fs::read(path.join("cmdline")).unwrap_or_default();
            entries(std::path::Path::new("/proc")).iter().any(|path| cmdline(path) == b"sleep\x00987\x00")
        };
        node.api.wait_for("the end of the process", || (!sleeps()).then_some(()), || node.agent_log()).await;
    });
}

#[test]
fn programs_run_on_terminals() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-terminal";
        node.api.put(scripts(uid, "Always", 0, &[("a:app", "sleep 1000")])).await;
        node.wait_running(uid).await;
        let on_terminal = |script: &str| {
            let command = ["sh", "-c", script].map(str::to_owned).to_vec();
            let size = Some(TerminalSize { rows: 30, columns: 90 });
            Request::Exec(ExecStart { command, stdin: true, tty: true, size, ..ExecStart::default() })
        };
        let script = "trap 'stty size; exit 6' WINCH; tty; stty size; echo also >&2; while :; do sleep 0.02; done";
        let mut tunnel = node.api.open(uid, on_terminal(script)).await;
        let mut shown = String::new();
        // A line's end is a write of the kernel's own, after the line: it may come in a frame of its own.
        while !shown.contains("also\r\n") {
            match tunnel.next().await {
                Some(Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Stdout(data)) })) => {
                    shown.push_str(&String::from_utf8_lossy(&data));
                }
                other => panic!("{other:?} after {shown}"),
            }
        }
        assert_eq!(shown, "/dev/pts/0\r\n30 90\r\nalso\r\n");
        input(&tunnel, exec_frame::Frame::Resize(TerminalSize { rows: 41, columns: 101 })).await;
        assert_eq!(output(&mut tunnel).await, ("41 101\r\n".into(), String::new(), Ok(6)));
    });
}

#[test]
fn users_take_part_in_a_containers_streams() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-attach";
        let script = "echo begun; tty; while read line; do echo got $line; [ $line = bye ] && exit 6; done";
        let mut pod = scripts(uid, "Never", 0, &[("a:app", script)]);
        let app = &mut pod.spec.as_mut().expect("spec").containers[0];
        (app.stdin, app.tty) = (true, true);
        node.api.put(pod).await;
        node.wait_running(uid).await;
        node.wait_log(uid, "app", "/dev/pts/0").await;
        let size = Some(TerminalSize { rows: 30, columns: 90 });
        let attach = |stdin| Request::Attach(AttachStart { stdin, size, ..AttachStart::default() });
        let mut one = node.api.open(uid, attach(true)).await;
        input(&one, exec_frame::Frame::Stdin("x\n".into())).await;
        assert!(matches!(one.next().await, Some(Frame::Taken(2) | Frame::Exec(_))));
        let log = node.wait_log(uid, "app", "got x").await;
        assert!(!log.contains("got bye"), "{log}");
        // Whoever goes leaves the container alone, and its input open.
        drop(one);
        let mut two = node.api.open(uid, attach(true)).await;
        input(&two, exec_frame::Frame::Resize(TerminalSize { rows: 31, columns: 91 })).await;
        input(&two, exec_frame::Frame::Stdin("bye\n".into())).await;
        let (shown, _, end) = output(&mut two).await;
        assert!(shown.contains("got bye\r\n") && !shown.contains("begun") && end == Ok(6), "{end:?} {shown:?}");
        // Ended: there is nothing to attach to.
        node.wait(uid, "the end", |status| status.phase == "Failed").await;
        let mut late = node.api.open(uid, attach(false)).await;
        let (_, _, end) = output(&mut late).await;
        assert!(end.as_ref().is_err_and(|error| error.contains("not running")), "{end:?}");
    });
}

#[test]
fn a_request_waits_until_a_new_agent_has_met_the_pod() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        let uid = "uid-met";
        node.api.put(scripts(uid, "Always", 0, &[("a:app", "sleep 1000")])).await;
        node.wait_running(uid).await;
        let shim = Pid::from_raw(node.shim_pid(uid).cast_signed());
        node.end(Signal::SIGTERM);
        // The supervisor has not answered the new agent yet, however long that takes.
        kill(shim, Signal::SIGSTOP).expect("stop the supervisor");
        node.start(&[]);
        let sessions = || (node.api.sessions() >= 2).then_some(());
        node.api.wait_for("a second session", sessions, || node.agent_log()).await;
        let mut asked = Vec::new();
        for word in ["one", "two"] {
            asked.push((word, node.api.open(uid, exec_request("app", &["echo", word], false)).await));
        }
        let waiting = "a request waits until the pod's supervisor has answered";
        let both = || (node.agent_log().matches(waiting).count() >= asked.len()).then_some(());
        node.api.wait_for("both requests to wait", both, || node.agent_log()).await;
        kill(shim, Signal::SIGCONT).expect("continue the supervisor");
        for (word, tunnel) in &mut asked {
            let (stdout, _, end) = output(tunnel).await;
            assert_eq!((stdout, end), (format!("{word}\n"), Ok(0)));
        }
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn a_program_that_reads_no_input_ends_with_its_user() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-full";
        node.api.put(scripts(uid, "Always", 0, &[("a:app", "sleep 1000")])).await;
        node.wait_running(uid).await;
        let command = ["sh", "-c", "echo go; exec sleep 986"];
        let mut tunnel = node.api.open(uid, exec_request("app", &command, true)).await;
        assert!(matches!(tunnel.next().await, Some(Frame::Exec(_))));
        // As an API server does: a bounded number of bytes that were not taken. At last nobody takes any more.
        let full = Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Stdin(vec![b'x'; 60_000].into())) });
        let pause = std::time::Duration::from_millis(500);
        let (mut sent, mut taken) = (0_u64, 0_u64);
        loop {
            while sent - taken <= 180_000 {
                tunnel.send(full.clone()).await;
                sent += 60_000;
            }
            match tokio::time::timeout(pause, tunnel.next()).await {
                Ok(Some(Frame::Taken(bytes))) => taken += bytes,
                Ok(other) => panic!("{other:?}"),
                Err(_) => break,
            }
        }
        assert!(taken < sent, "the program took all of {sent} bytes");
        drop(tunnel);
        let lives = || {
            let cmdline = |path: &std::path::Path| std::fs::read(path.join("cmdline")).unwrap_or_default();
            entries(std::path::Path::new("/proc")).iter().any(|path| cmdline(path) == b"sleep\x00986\x00")
        };
        node.api.wait_for("the end of the process", || (!lives()).then_some(()), || node.agent_log()).await;
    });
}

#[test]
fn logs_are_read_and_followed_to_the_end() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-logs";
        let script = "for n in 1 2 3; do echo line $n; done; until [ -e /v/go ]; do sleep 0.02; done; echo bye >&2";
        node.api.put(scripts(uid, "Never", 0, &[("a:app", script)])).await;
        node.wait_running(uid).await;
        node.wait_log(uid, "app", "line 3").await;
        let tail = LogsRequest { tail_lines: Some(2), ..LogsRequest::default() };
        assert_eq!(node.api.logs(uid, tail).await, ("line 2\nline 3\n".into(), String::new()));
        let follow = LogsRequest { container: "app".into(), follow: true, ..LogsRequest::default() };
        let mut tunnel = node.api.open(uid, Request::Logs(follow)).await;
        assert!(matches!(tunnel.next().await, Some(Frame::Data(data)) if data.starts_with(b"line 1\n")));
        std::fs::write(node.data_dir().join("pods").join(uid).join("volumes/v/go"), b"").expect("tell it");
        let mut rest = Vec::new();
        let end = loop {
            match tunnel.next().await {
                Some(Frame::Data(data)) => rest.extend_from_slice(&data),
                other => break other,
            }
        };
        assert!(rest.ends_with(b"bye\n"), "{}", String::from_utf8_lossy(&rest));
        assert!(matches!(end, Some(Frame::End(TunnelEnd { code: 0, .. }))), "{end:?}");
        for (request, part) in [
            (LogsRequest { container: "x".into(), ..LogsRequest::default() }, "no container"),
            (LogsRequest { previous: true, ..LogsRequest::default() }, "no previous run"),
        ] {
            let (_, error) = node.api.logs(uid, request).await;
            assert!(error.contains(part), "{error}");
        }
        assert!(node.api.logs("uid-none", LogsRequest::default()).await.1.contains("not on its node"));
        let mut tunnel = node.api.open("", Request::ImageList(ImageListRequest::default())).await;
        match tunnel.next().await {
            Some(Frame::Images(list)) => assert_eq!(list.images.len(), 2),
            other => panic!("{other:?}"),
        }
    });
}

async fn port(node: &Node, uid: &str, port: u32) -> Tunnel {
    node.api.open(uid, Request::Port(PortStart { port, ..PortStart::default() })).await
}

fn port_frame(frame: port_frame::Frame) -> Frame {
    Frame::Port(PortFrame { frame: Some(frame) })
}

/// What comes until the program has ended its direction.
async fn received(tunnel: &mut Tunnel) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        match tunnel.next().await {
            Some(Frame::Port(PortFrame { frame: Some(port_frame::Frame::Data(data)) })) => {
                bytes.extend_from_slice(&data)
            }
            Some(Frame::Port(PortFrame { frame: Some(port_frame::Frame::Closed(_)) })) => return bytes,
            Some(Frame::Taken(_)) => {}
            other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&bytes)),
        }
    }
}

fn count_and_answer(mut connection: std::net::TcpStream) {
    let mut all = Vec::new();
    std::io::Read::read_to_end(&mut connection, &mut all).expect("read to its end");
    std::io::Write::write_all(&mut connection, format!("{}\n", all.len()).as_bytes()).expect("answer");
}

#[test]
fn many_programs_at_once_and_a_container_that_dies_under_them() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-storm";
        node.api.put(scripts(uid, "Never", 0, &[("a:app", "sleep 1000"), ("a:other", "sleep 1000")])).await;
        node.wait_running(uid).await;
        // A storm: as many as a node serves at a time, and none is lost or mixed up with another.
        for round in 0..3 {
            let mut tunnels = Vec::new();
            for number in 0..60 {
                let script = format!("echo {number}; exit {}", number % 7);
                tunnels.push((number, node.api.open(uid, exec_request("app", &["sh", "-c", &script], false)).await));
            }
            for (number, mut tunnel) in tunnels {
                let (stdout, stderr, end) = output(&mut tunnel).await;
                assert_eq!((stdout, stderr, end), (format!("{number}\n"), String::new(), Ok(number % 7)), "{round}");
            }
        }
        // More than that are told so, at once.
        let mut held = Vec::new();
        for _ in 0..64 {
            held.push(node.api.open(uid, exec_request("app", &["sh", "-c", "echo go; exec sleep 985"], true)).await);
        }
        for tunnel in &mut held {
            assert!(matches!(tunnel.next().await, Some(Frame::Exec(_))));
        }
        let (_, _, end) = output(&mut node.api.open(uid, exec_request("app", &["true"], false)).await).await;
        assert!(end.as_ref().is_err_and(|error| error.contains("64 streams already")), "{end:?}");
        // The container dies under them: each hears it, and what is asked for meanwhile is run elsewhere, or refused.
        kill_9(node.pid(uid, "app"));
        for mut tunnel in held {
            assert_eq!(output(&mut tunnel).await.2, Ok(137));
        }
        let (_, _, end) = output(&mut node.api.open(uid, exec_request("app", &["true"], false)).await).await;
        assert!(end.is_err(), "{end:?}");
        let (stdout, _, end) =
            output(&mut node.api.open(uid, exec_request("other", &["echo", "fine"], false)).await).await;
        assert_eq!((stdout.as_str(), end), ("fine\n", Ok(0)));
        // Exactly while it dies: an answer, whichever.
        let mut racing = Vec::new();
        for number in 0..30 {
            racing.push(node.api.open(uid, exec_request("other", &["sleep", "984"], false)).await);
            if number == 15 {
                kill_9(node.pid(uid, "other"));
            }
        }
        for mut tunnel in racing {
            let (_, _, end) = output(&mut tunnel).await;
            assert!(end == Ok(137) || end.is_err(), "{end:?}");
        }
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn connections_reach_the_pods_localhost() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-port";
        let script = "yes | head -c 3000000 >/v/big; httpd -p 127.0.0.1:8081 -h /v; \
                      nc -ll -p 8080 -e sh -c 'wc -c; echo bye' & \
                      until nc -w 1 127.0.0.1 8080 </dev/null; do sleep 0.02; done; echo up; wait";
        node.api.put(scripts(uid, "Always", 0, &[("a:app", script)])).await;
        node.wait_running(uid).await;
        node.wait_log(uid, "app", "up").await;
        // Its half closed before the answer comes.
        let mut tunnel = port(&node, uid, 8080).await;
        tunnel.send(port_frame(port_frame::Frame::Data("xxx".into()))).await;
        tunnel.send(port_frame(port_frame::Frame::Closed(true))).await;
        assert_eq!(String::from_utf8_lossy(&received(&mut tunnel).await), "3\nbye\n");
        let end = tunnel.next().await;
        assert!(matches!(end, Some(Frame::End(TunnelEnd { code: 0, .. }))), "{end:?}");
        // Many at once, again and again, to a server that takes them all. Not busybox' nc: it listens with a queue of one (its `-ll`
        // forks between two accepts), the kernel drops what comes meanwhile, and a peer that has sent its end by then is reset.
        let (pause, asked) = (node.pause_pid(uid), std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0)));
        let netns = minipod_nodeagent::sys::Netns::of_pid(pause).expect("the pod's network");
        let listener = netns.run(|| std::net::TcpListener::bind("127.0.0.1:8082")).expect("enter").expect("listen");
        let served = asked.clone();
        // Ends with the test's process.
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                served.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                std::thread::spawn(move || count_and_answer(connection.expect("a connection")));
            }
        });
        for round in 0..5_usize {
            let mut tunnels = Vec::new();
            for count in 1..=20_usize {
                let tunnel = port(&node, uid, 8082).await;
                tunnel.send(port_frame(port_frame::Frame::Data(vec![b'x'; count * 1000].into()))).await;
                tunnels.push((count, tunnel));
            }
            for (count, mut tunnel) in tunnels {
                tunnel.send(port_frame(port_frame::Frame::Closed(true))).await;
                let answer = received(&mut tunnel).await;
                assert_eq!(String::from_utf8_lossy(&answer), format!("{}\n", count * 1000), "in round {round}");
                let end = tunnel.next().await;
                assert!(matches!(end, Some(Frame::End(TunnelEnd { code: 0, .. }))), "{end:?}");
            }
        }
        assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), 100);
        // What listens on localhost only, and more than all buffers hold.
        let mut tunnel = port(&node, uid, 8081).await;
        tunnel.send(port_frame(port_frame::Frame::Data("GET /big HTTP/1.0\r\n\r\n".into()))).await;
        let answer = received(&mut tunnel).await;
        assert!(answer.starts_with(b"HTTP/1.") && answer.len() > 3_000_000, "{} bytes", answer.len());
        for (number, part) in
            [(9, "nothing in the pod listens there"), (0, "not between 1 and 65535"), (65_536, "not between")]
        {
            let mut tunnel = port(&node, uid, number).await;
            match tunnel.next().await {
                Some(Frame::End(TunnelEnd { code, message })) => {
                    assert!(code != 0 && message.contains(part), "{message}")
                }
                other => panic!("{other:?}"),
            }
        }
        // The user goes away: the program sees the end.
        let counts = || {
            let cmdline = |path: &std::path::Path| std::fs::read(path.join("cmdline")).unwrap_or_default();
            entries(std::path::Path::new("/proc")).iter().any(|path| cmdline(path) == b"wc\0-c\0")
        };
        let tunnel = port(&node, uid, 8080).await;
        node.api.wait_for("the program to serve", || counts().then_some(()), || node.agent_log()).await;
        drop(tunnel);
        node.api.wait_for("the program's end", || (!counts()).then_some(()), || node.agent_log()).await;
    });
}
