//! Files of running containers, and debug containers beside them.

mod support;

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use minipod_proto::v1::copy_entry::Kind;
use minipod_proto::v1::copy_frame::Frame as Part;
use minipod_proto::v1::open_stream::Request;
use minipod_proto::v1::tunnel_frame::Frame;
use minipod_proto::v1::{
    AttachStart, CopyEntry, CopyFrame, CopyStart, EphemeralContainer, ExecFrame, Pod, TunnelEnd, exec_frame,
};
use support::fake_api::Tunnel;
use support::*;

/// What an API server lets be on its way to an agent.
const CREDIT: usize = 256 << 10;

fn part(part: Part) -> Frame {
    Frame::Copy(CopyFrame { frame: Some(part) })
}

fn entry(path: &str, kind: Kind, link: &str) -> Part {
    let (path, link) = (path.as_bytes().to_vec().into(), link.as_bytes().to_vec().into());
    Part::Entry(CopyEntry { path, kind: kind.into(), mode: 0o640, uid: 1234, gid: 2345, link, ..CopyEntry::default() })
}

fn data(text: &str) -> Part {
    Part::Data(text.as_bytes().to_vec().into())
}

/// The parts of a copy out of a container, and how it ended.
async fn out(node: &Node, uid: &str, container: &str, path: &str) -> (Vec<Part>, String) {
    let (container, path) = (container.to_owned(), path.as_bytes().to_vec().into());
    let mut tunnel = node.api.open(uid, Request::Copy(CopyStart { container, path, ..CopyStart::default() })).await;
    let mut parts = Vec::new();
    loop {
        match tunnel.next().await {
            Some(Frame::Copy(CopyFrame { frame: Some(part) })) => parts.push(part),
            Some(Frame::End(end)) => return (parts, end.message),
            other => panic!("{other:?}"),
        }
    }
}

/// Sends parts into a container, as an API server does: so much on its way and no more. Answers how it ended.
async fn into(node: &Node, uid: &str, (container, path, name): (&str, &str, &str), parts: Vec<Part>) -> String {
    let start = CopyStart {
        container: container.into(),
        path: path.as_bytes().to_vec().into(),
        name: name.as_bytes().to_vec().into(),
        upload: true,
        ..CopyStart::default()
    };
    let mut tunnel = node.api.open(uid, Request::Copy(start)).await;
    let (mut under_way, mut done) = (0_usize, false);
    let mut parts = parts.into_iter().map(part).peekable();
    loop {
        while under_way < CREDIT
            && let Some(frame) = parts.next()
        {
            if let Frame::Copy(copy) = &frame {
                under_way += prost::Message::encoded_len(copy);
            }
            tunnel.send(frame).await;
        }
        match tunnel.next().await {
            Some(Frame::Taken(bytes)) => under_way -= usize::try_from(bytes).expect("few"),
            Some(Frame::Copy(CopyFrame { frame: Some(Part::Done(true)) })) => done = true,
            Some(Frame::End(TunnelEnd { code: 0, .. })) => {
                assert!(done && parts.peek().is_none());
                return String::new();
            }
            Some(Frame::End(end)) => return end.message,
            other => panic!("{other:?}"),
        }
    }
}

fn content(parts: &[Part]) -> Vec<u8> {
    parts
        .iter()
        .filter_map(|part| if let Part::Data(data) = part { Some(data.to_vec()) } else { None })
        .flatten()
        .collect()
}

#[test]
fn files_go_into_containers_and_out_of_them() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-copy";
        let evil = "ln -s /etc /to-etc; ln -s ../../../../../../../../.. /up; mkdir -p /tree/d; echo in >/tree/d/file; \
                    mkfifo /tree/pipe; ln -s /etc/passwd /tree/out; chmod 700 /tree/d; echo own >/root-only; \
                    chmod 600 /root-only; echo ready; sleep 1000";
        let mut pod = scripts(uid, "Always", 0, &[("a:app", evil), ("a:user", "echo mine >/tmp/mine; sleep 1000")]);
        for container in &mut pod.spec_mut().containers {
            container.volume_mounts[0].mount_path = "/volume".into();
        }
        pod.spec_mut().containers[1].security_context.get_or_insert_default().run_as_user = Some(1000);
        node.api.put(pod).await;
        node.wait_running(uid).await;
        node.wait_log(uid, "app", "ready").await;

        // Into a volume, which both see; a big file, with back-pressure.
        let piece = "x".repeat(64 << 10);
        let mut parts = vec![entry("", Kind::Directory, ""), entry("big", Kind::File, "")];
        parts.extend((0..40).map(|_| data(&piece)));
        parts.extend([
            entry("same", Kind::HardLink, "big"),
            entry("l", Kind::Symlink, "/etc/passwd"),
            Part::Complete(true),
        ]);
        assert_eq!(into(&node, uid, ("app", "/volume", "tree"), parts).await, "");
        let volume = node.data_dir().join("pods").join(uid).join("volumes/v");
        let about = std::fs::metadata(volume.join("tree/big")).expect("big");
        assert_eq!(
            (about.len(), about.mode() & 0o7777, about.uid(), about.gid(), about.nlink()),
            (40 << 16, 0o640, 1234, 2345, 2)
        );
        assert_eq!(std::fs::read_link(volume.join("tree/l")).expect("link").to_str(), Some("/etc/passwd"));

        // Out of it again, and a tree of the container's own.
        let (parts, end) = out(&node, uid, "user", "/volume/tree/big").await;
        assert!(end.contains("Permission denied") && content(&parts).is_empty(), "{end}");
        let (parts, end) = out(&node, uid, "app", "/volume/tree/big").await;
        assert_eq!((content(&parts).len(), end.as_str()), (40 << 16, ""));
        assert!(matches!(parts.last(), Some(Part::Complete(true))));
        let (parts, end) = out(&node, uid, "app", "/tree").await;
        assert_eq!((content(&parts).as_slice(), end.as_str()), (&b"in\n"[..], ""));
        assert!(parts.iter().any(|part| matches!(part, Part::Left(left) if left.path == "pipe")));
        assert!(
            parts
                .iter()
                .any(|part| matches!(part, Part::Entry(entry) if entry.path == "out" && entry.link == "/etc/passwd"))
        );

        // Links of the container lead about in it: this one's /etc has no shadow file of the node's.
        for path in ["/to-etc/hostname", "/up/etc/hostname", "/../../etc/hostname"] {
            assert_eq!(content(&out(&node, uid, "app", path).await.0), format!("{uid}\n").into_bytes(), "{path}");
        }
        assert_eq!(
            into(
                &node,
                uid,
                ("app", "/to-etc", "made"),
                vec![entry("", Kind::File, ""), data("x"), Part::Complete(true)]
            )
            .await,
            ""
        );
        assert!(!std::path::Path::new("/etc/made").exists(), "written to the node");

        // As the container's user, and never more.
        let (_, end) = out(&node, uid, "user", "/tmp/mine").await;
        assert_eq!(end, "");
        let file = || vec![entry("", Kind::File, ""), data("x"), Part::Complete(true)];
        assert!(into(&node, uid, ("user", "/none/mine", "x"), file()).await.contains("No such file"));
        assert!(into(&node, uid, ("user", "/etc", "mine"), file()).await.contains("Permission denied"));
        assert_eq!(into(&node, uid, ("user", "/tmp", "mine"), file()).await, "");
        let owner = node.api.open(uid, exec("user", &["stat", "-c", "%u %a", "/tmp/mine"])).await;
        assert_eq!(
            stdout(owner).await,
            "1000 640\n",
            "its owner could not be given away, and its mode is as it was sent"
        );

        // What is refused.
        for (path, part) in [
            ("relative", "want an absolute path"),
            ("/none", "No such file"),
            ("/proc/1/environ", "of the kernel's"),
            ("/dev/null", "neither a file"),
        ] {
            let (_, end) = out(&node, uid, "app", path).await;
            assert!(end.contains(part), "{path}: {end}");
        }
        for (what, parts, part) in [
            (
                "up",
                vec![entry("", Kind::Directory, ""), entry("../x", Kind::File, ""), Part::Complete(true)],
                "leads out",
            ),
            (
                "a link on the way",
                vec![
                    entry("", Kind::Directory, ""),
                    entry("l", Kind::Symlink, "/etc"),
                    entry("l/x", Kind::File, ""),
                    Part::Complete(true),
                ],
                "lies on its way",
            ),
            ("no tree", vec![data("x"), Part::Complete(true)], "content without a file"),
        ] {
            let end = into(&node, uid, ("app", "/volume", "refused"), parts).await;
            assert!(end.contains(part), "{what}: {end}");
        }
        assert!(into(&node, uid, ("app", "/proc/sys/kernel", "x"), file()).await.contains("of the kernel's"));

        // A user who goes in the middle: nothing of the copying stays.
        let start = CopyStart {
            container: "app".into(),
            path: "/volume".into(),
            name: "half".into(),
            upload: true,
            ..CopyStart::default()
        };
        let tunnel = node.api.open(uid, Request::Copy(start)).await;
        tunnel.send(part(entry("", Kind::File, ""))).await;
        drop(tunnel);
        let copying = || {
            let agent = std::path::PathBuf::from(format!("/proc/{}/task", node.agent_pid()));
            entries(&agent)
                .iter()
                .any(|task| std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name == "copy\n"))
        };
        node.api.wait_for("the end of the thread", || (!copying()).then_some(()), || node.agent_log()).await;
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

/// Owners are those that the container sees, whatever they are on the node.
#[test]
fn files_of_a_pod_with_users_of_its_own() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-own-users";
        let script =
            "mkdir /tree /v/in; echo x >/tree/file; chown 7:8 /tree/file; chmod 600 /tree/file; echo ready; sleep 1000";
        let mut pod = scripts(uid, "Always", 0, &[("a:app", script), ("a:user", "echo mine >/tmp/mine; sleep 1000")]);
        pod.spec_mut().host_users = Some(false);
        pod.spec_mut().containers[1].security_context.get_or_insert_default().run_as_user = Some(1000);
        node.api.put(pod).await;
        node.wait_running(uid).await;
        node.wait_log(uid, "app", "ready").await;
        // Root inside reads what belongs to another user of the pod.
        let (parts, end) = out(&node, uid, "app", "/tree").await;
        assert_eq!((content(&parts).as_slice(), end.as_str()), (&b"x\n"[..], ""));
        let owner = |name: &str| {
            let found = parts.iter().find_map(|part| match part {
                Part::Entry(entry) if entry.path == name.as_bytes() => Some((entry.uid, entry.gid)),
                _ => None,
            });
            found.unwrap_or_else(|| panic!("no entry {name:?}"))
        };
        assert_eq!((owner(""), owner("file")), ((0, 0), (7, 8)));
        let file = || vec![entry("", Kind::File, ""), data("x"), Part::Complete(true)];
        assert_eq!(into(&node, uid, ("app", "/v/in", "came"), file()).await, "");
        let seen = node.api.open(uid, exec("app", &["stat", "-c", "%u:%g %a", "/v/in/came"])).await;
        assert_eq!(stdout(seen).await, "1234:2345 640\n");
        let on_disk = node.data_dir().join("pods").join(uid).join("volumes/v/in/came").metadata().expect("came");
        assert_eq!((on_disk.uid(), on_disk.gid()), (1234, 2345));
        // One who is not root keeps what is his.
        assert_eq!(into(&node, uid, ("user", "/tmp", "mine"), file()).await, "");
        let seen = node.api.open(uid, exec("user", &["stat", "-c", "%u", "/tmp/mine"])).await;
        assert_eq!(stdout(seen).await, "1000\n");
        assert!(into(&node, uid, ("user", "/etc", "mine"), file()).await.contains("Permission denied"));
        node.api.delete(uid, 0).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

fn exec(container: &str, command: &[&str]) -> Request {
    let command = command.iter().map(|word| (*word).to_owned()).collect();
    Request::Exec(minipod_proto::v1::ExecStart { container: container.into(), command, ..Default::default() })
}

async fn stdout(mut tunnel: Tunnel) -> String {
    let mut text = Vec::new();
    loop {
        match tunnel.next().await {
            Some(Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Stdout(data)) })) => {
                text.extend_from_slice(&data)
            }
            Some(Frame::End(_)) | None => return String::from_utf8(text).expect("UTF-8"),
            Some(_) => {}
        }
    }
}

/// The same pod with one debug container more, as the API server would send it.
fn with_debug(pod: &Pod, name: &str, target: &str, script: &str) -> Pod {
    let mut pod = pod.clone();
    pod.spec_mut().ephemeral_containers.push(EphemeralContainer {
        name: name.into(),
        image: "minipod.local/busybox".into(),
        image_pull_policy: "Never".into(),
        command: vec!["sh".into(), "-c".into(), script.into()],
        target_container_name: target.into(),
        stdin: true,
        ..EphemeralContainer::default()
    });
    pod
}

#[test]
fn debug_containers_join_a_running_pod() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-debug";
        let pod = scripts(uid, "Always", 1, &[("a:app", "exec sleep 1234"), ("a:other", "sleep 1000")]);
        node.api.put(pod.clone()).await;
        node.wait_running(uid).await;
        let before = node.processes(uid);
        let script = "tr '\\0' ' ' </proc/1/cmdline; echo; hostname; read line; echo got $line; exit 5";
        let pod = with_debug(&pod, "d1", "app", script);
        node.api.put(pod.clone()).await;
        let state = |status: &minipod_proto::v1::PodStatus, name: &str| {
            let all = &status.ephemeral_container_statuses;
            all.iter().find(|one| one.name == name).cloned().unwrap_or_default()
        };
        let status = node.wait(uid, "d1 running", |status| running(&state(status, "d1")).is_some()).await;
        assert_eq!((status.phase.as_str(), status.container_statuses.len()), ("Running", 2));
        // It sees the target's processes, and the pod's network and name are its own.
        let log = node.wait_log(uid, "d1", uid).await;
        assert_eq!(log, format!("sleep 1234 \n{uid}\n"));
        // A second one, without a target, beside it.
        let pod = with_debug(&pod, "d2", "", "cat /proc/1/comm; exec sleep 1000");
        node.api.put(pod.clone()).await;
        assert_eq!(node.wait_log(uid, "d2", "\n").await, "sh\n");
        // A user talks to the first, and its end is told.
        let attach = AttachStart { container: "d1".into(), stdin: true, ..AttachStart::default() };
        let tunnel = node.api.open(uid, Request::Attach(attach)).await;
        tunnel.send(Frame::Exec(ExecFrame { frame: Some(exec_frame::Frame::Stdin("hello\n".into())) })).await;
        assert_eq!(stdout(tunnel).await, "got hello\n");
        let status = node.wait(uid, "d1 ended", |status| terminated(&state(status, "d1")).is_some()).await;
        assert_eq!(terminated(&state(&status, "d1")).map(|ended| ended.exit_code), Some(5));
        let ready = status.conditions.iter().find(|condition| condition.r#type == "Ready").expect("Ready");
        assert_eq!((status.phase.as_str(), ready.status.as_str()), ("Running", "True"), "it counts for nothing");
        assert_eq!(state(&status, "d1").restart_count, 0);
        // The others never noticed, and an agent that is started anew starts nothing again.
        let others = |all: Vec<(String, u32, u64)>| -> Vec<_> {
            all.into_iter().filter(|(name, _, _)| !name.starts_with('d')).collect()
        };
        assert_eq!(others(node.processes(uid)), others(before));
        let mut node = node;
        node.end(nix::sys::signal::Signal::SIGKILL);
        node.start(&[]);
        let status = node.wait(uid, "d1 still ended", |status| terminated(&state(status, "d1")).is_some()).await;
        assert!(running(&state(&status, "d2")).is_some() && state(&status, "d1").restart_count == 0);
        // The target's end is that of a container among its processes; the target comes again, the debug container does not.
        let pod = with_debug(&pod, "d3", "app", "sleep 1000");
        node.api.put(pod).await;
        node.wait(uid, "d3 running", |status| running(&state(status, "d3")).is_some()).await;
        kill_9(node.pid(uid, "app"));
        let again = |status: &minipod_proto::v1::PodStatus| {
            terminated(&state(status, "d3")).is_some() && container(status, "app").restart_count == 1
        };
        let status = node.wait(uid, "d3 ended and app again", again).await;
        assert_eq!(terminated(&state(&status, "d3")).map(|ended| ended.exit_code), Some(137));
        node.api.delete(uid, 1).await;
        node.wait_finished(uid).await;
        node.wait_gone(uid).await;
    });
}

#[test]
fn files_that_are_set_as_they_were_sent() {
    // The mode of a file is told apart from the umask of whoever runs the agent.
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let uid = "uid-readonly";
        let mut pod = scripts(uid, "Always", 0, &[("a:app", "sleep 1000")]);
        pod.spec_mut().containers[0].security_context.get_or_insert_default().read_only_root_filesystem = Some(true);
        node.api.put(pod).await;
        node.wait_running(uid).await;
        let file = |mode: u32| {
            let entry = CopyEntry { mode, kind: Kind::File.into(), ..CopyEntry::default() };
            vec![Part::Entry(entry), data("x"), Part::Complete(true)]
        };
        let refused = into(&node, uid, ("app", "/etc", "x"), file(0o644)).await;
        assert!(refused.contains("Read-only file system"), "{refused}");
        assert_eq!(into(&node, uid, ("app", "/v", "x"), file(0o4777)).await, "");
        let made = node.data_dir().join("pods").join(uid).join("volumes/v/x");
        assert_eq!(std::fs::metadata(made).expect("made").permissions().mode() & 0o7777, 0o4777);
    });
}
