//! Containers on the real kernel: start, end, what they see, what they are.

mod support;

use std::fs;
use std::process::Command;

use minipod_podshim::protocol::{
    Ask, Capabilities, Fault, Happened, Limits, LogSpec, Mount, MountKind, Propagation, Rlimit, SandboxSpec, Say,
    Sysctl, User,
};
use support::{Pod, until};

#[test]
fn exit_codes_output_and_environment() {
    let mut pod = Pod::new();
    let (ended, output) = pod.run("a", "echo $GREETING; echo err >&2; printf partial; exit 7");
    assert_eq!((ended.exit_code, ended.signal, ended.oom), (7, 0, false));
    // The two streams are two pipes: only the order within each is kept.
    let mut lines: Vec<&str> = output.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines.concat().replace("hello", "").replace("err", ""), "partial");
    assert!(ended.started_wall_ms <= ended.finished_wall_ms && ended.started_wall_ms > 1_700_000_000_000);
    pod.stop();
}

#[test]
fn a_container_sees_itself_alone() {
    let mut pod = Pod::new();
    let (_, output) =
        pod.run("a", "echo $$; hostname; pwd; ps -o comm > /tmp/ps; grep -c . /tmp/ps; cat /proc/1/comm; id -u; umask");
    assert_eq!(output, "1\nthe-pod\n/\n3\nsh\n0\n0022\n");
    // Only its own mounts, and none of the node's.
    let (_, mounts) = pod.run("b", "cut -d' ' -f2 /proc/mounts | sort | tr '\\n' ' '");
    let expected = "/ /dev /dev/full /dev/mqueue /dev/null /dev/pts /dev/random /dev/shm /dev/tty /dev/urandom /dev/zero \
                    /proc /proc/interrupts /proc/sys /sys /sys/firmware ";
    assert_eq!(mounts, expected);
    pod.stop();
}

#[test]
fn namespaces_are_shared_as_the_sandbox_says() {
    let script = "for n in net ipc uts pid mnt cgroup; do readlink /proc/self/ns/$n; done; sleep 1000";
    let node = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).expect(name).to_string_lossy().into_owned();
    let seen = |spec: SandboxSpec| {
        let mut pod = Pod::with(spec);
        let mut outputs = Vec::new();
        for name in ["a", "b"] {
            pod.start(pod.spec(name, script));
            let output = until("namespaces", || pod.output(name, 0), |output| output.lines().count() == 6);
            outputs.push(output.lines().map(str::to_owned).collect::<Vec<_>>());
        }
        pod.stop();
        let same = |at: usize| outputs[0][at] == outputs[1][at];
        let nodes = |at: usize, name: &str| outputs[0][at] == node(name);
        let names = ["net", "ipc", "uts", "pid", "mnt", "cgroup"];
        names.iter().enumerate().map(|(at, name)| (same(at), nodes(at, name))).collect::<Vec<_>>()
    };
    let (shared, own, host) = ((true, false), (false, false), (true, true));
    assert_eq!(seen(SandboxSpec::default()), [shared, shared, shared, own, own, own]);
    let pids = SandboxSpec { share_pid: true, ..SandboxSpec::default() };
    assert_eq!(seen(pids), [shared, shared, shared, shared, own, own]);
    let hosts = SandboxSpec { host_network: true, host_ipc: true, host_pid: true, ..SandboxSpec::default() };
    assert_eq!(seen(hosts), [host, host, host, host, own, own]);
}

#[test]
fn in_a_shared_pid_namespace_nothing_outlives_its_container() {
    let mut pod = Pod::with(SandboxSpec { share_pid: true, ..SandboxSpec::default() });
    pod.start(pod.spec("other", "sleep 1000"));
    // The orphans are adopted by pause; they belong to the container all the same.
    let (ended, _) = pod.run("a", "(sleep 1001 &) ; (setsid sleep 1002 &) ; exit 3");
    assert_eq!(ended.exit_code, 3);
    let (_, seen) = pod.run("b", "ps -o args | grep -c 'sleep 100[12]'");
    assert_eq!(seen, "0\n");
    let (_, seen) = pod.run("c", "ps -o args | grep -c 'sleep 1000'; cat /proc/1/comm");
    // grep, its shell, the other container.
    assert!(seen.ends_with("\nminipod-pause\n") || seen.ends_with("\npause\n"), "{seen}");
    pod.stop();
}

#[test]
fn a_start_that_fails_names_its_step() {
    let mut pod = Pod::new();
    let mut refused = |change: &dyn Fn(&mut minipod_podshim::protocol::ContainerSpec)| {
        let mut spec = pod.spec("a", "true");
        change(&mut spec);
        let refused = pod.try_start(spec).expect_err("refused");
        (refused.step.clone(), refused.object.clone(), refused.errno, refused.fault())
    };
    let by = |step: &str, object: &str, errno: i32, fault: Fault| (step.to_owned(), object.to_owned(), errno, fault);
    assert_eq!(
        refused(&|spec| spec.argv = vec!["/bin/nonsense".into()]),
        by("run the program", "/bin/nonsense", libc::ENOENT, Fault::Container)
    );
    assert_eq!(
        refused(&|spec| spec.argv = vec!["nonsense".into()]),
        by("run the program", "nonsense", libc::ENOENT, Fault::Container)
    );
    assert_eq!(
        refused(&|spec| spec.argv = vec!["/etc/passwd".into()]),
        by("run the program", "/etc/passwd", libc::EACCES, Fault::Container)
    );
    assert_eq!(refused(&|spec| spec.argv.clear()), by("run the program", "", libc::ENOENT, Fault::Container));
    assert_eq!(refused(&|spec| spec.argv = vec!["a\0b".into()]), by("read", "argv", libc::EINVAL, Fault::Container));
    assert_eq!(
        refused(&|spec| spec.cwd = "/etc/passwd".into()),
        by("make the working directory", "/etc/passwd", libc::EEXIST, Fault::Container)
    );
    let bind = |source: &str, target: &str| Mount { source: source.into(), target: target.into(), ..Mount::default() };
    assert_eq!(
        refused(&|spec| spec.mounts.push(bind("/nonexistent", "/x"))),
        by("open mount source", "/nonexistent", libc::ENOENT, Fault::Node)
    );
    assert_eq!(
        refused(&|spec| spec.mounts.push(bind("/tmp", "relative"))),
        by("make mount point", "relative", libc::EINVAL, Fault::Container)
    );
    assert_eq!(
        refused(&|spec| spec.mounts.push(bind("/tmp", "/etc/passwd/x"))),
        by("make mount point", "/etc/passwd/x", libc::ENOTDIR, Fault::Container)
    );
    assert_eq!(refused(&|spec| spec.root = None), by("read", "root", libc::EINVAL, Fault::Container));
    assert_eq!(
        refused(&|spec| spec.seccomp_filter = vec![1, 2, 3]),
        by("load the seccomp filter", "", libc::EINVAL, Fault::Container)
    );
    // Whether the kernel has no such profile or no AppArmor: never without.
    let (step, object, _, _) = refused(&|spec| spec.apparmor_profile = "minipod-test-none".into());
    assert!(step.contains("AppArmor") || object.contains("attr"), "{step} {object}");
    let (step, _, _, fault) = refused(&|spec| spec.name = "../x".into());
    assert_eq!((step.as_str(), fault), ("start container", Fault::Request));
    // No run came of any of these: the same number can be used.
    let (ended, output) = pod.run("a", "echo fine");
    assert_eq!((ended.exit_code, output.as_str()), (0, "fine\n"));
    pod.stop();
}

#[test]
fn a_start_is_answered_again_and_not_done_twice() {
    let mut pod = Pod::new();
    let first = pod.start(pod.spec("a", "echo once; sleep 1000"));
    assert_eq!(pod.start(pod.spec("a", "echo twice")), first);
    until("its output", || pod.output("a", 0), |output| output == "once\n");
    let later = pod.spec_of("a", 1, &["true"]);
    let refused = pod.try_start(later.clone()).expect_err("the first run lives");
    assert_eq!((refused.fault(), refused.detail.as_str()), (Fault::Request, "another run of it is not over"));
    pod.kill("a", 0, libc::SIGTERM, 0);
    assert_eq!(pod.agent.ended("a").exit_code, 137);
    assert_eq!(pod.start(pod.spec("a", "echo twice")), first, "it has run, and does not run again");
    assert_eq!(pod.output("a", 0), "once\n");
    let (ended, _) = pod.run_spec(later);
    assert_eq!((ended.attempt, ended.exit_code), (1, 0));
    pod.stop();
}

#[test]
fn signals_and_grace() {
    let mut pod = Pod::new();
    let script = "trap 'echo got it; exit 5' TERM; echo ready; while true; do sleep 0.05; done";
    pod.start(pod.spec("polite", script));
    until("the trap", || pod.output("polite", 0), |output| output.contains("ready"));
    pod.kill("polite", 0, libc::SIGTERM, 60_000);
    let ended = pod.agent.ended("polite");
    assert_eq!((ended.exit_code, ended.signal), (5, 0));
    assert_eq!(pod.output("polite", 0), "ready\ngot it\n");

    // The first process of a namespace does not hear a signal without a handler; a later wish only shortens the grace.
    pod.start(pod.spec("deaf", "sleep 1000"));
    pod.kill("deaf", 0, libc::SIGTERM, 60_000);
    pod.kill("deaf", 0, libc::SIGTERM, 100);
    pod.kill("deaf", 0, libc::SIGTERM, 60_000);
    let ended = pod.agent.ended("deaf");
    assert_eq!((ended.exit_code, ended.signal), (137, 9));
    let took_ms = ended.finished_wall_ms - ended.started_wall_ms;
    assert!((100..10_000).contains(&took_ms), "killed after {took_ms} ms");

    // An agent that was started anew asks again: the handler runs once all the same.
    let script = "trap 'echo got it' TERM; echo ready; until [ -e /done ]; do sleep 0.05; done";
    pod.start(pod.spec("asked-again", script));
    until("the trap", || pod.output("asked-again", 0), |output| output.contains("ready"));
    pod.kill("asked-again", 0, libc::SIGTERM, 60_000);
    until("the handler", || pod.output("asked-again", 0), |output| output.contains("got it"));
    pod.kill("asked-again", 0, libc::SIGTERM, 300);
    assert_eq!(pod.agent.ended("asked-again").exit_code, 137);
    assert_eq!(pod.output("asked-again", 0), "ready\ngot it\n");

    // What is over or unknown is no error.
    pod.kill("deaf", 0, libc::SIGTERM, 0);
    pod.kill("nobody", 7, libc::SIGTERM, 0);
    // A stopped process is killed too.
    pod.start(pod.spec("stopped", "kill -STOP $$; sleep 1000"));
    pod.kill("stopped", 0, libc::SIGSTOP, 50);
    assert_eq!(pod.agent.ended("stopped").exit_code, 137);
    pod.stop();
}

#[test]
fn identity_capabilities_and_limits() {
    let mut pod = Pod::new();
    let status = "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:)' /proc/self/status; ulimit -n; ulimit -c";
    let (_, output) = pod.run("default", status);
    let value = |output: &str, key: &str| {
        let line =
            output.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{key} in {output}"));
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    for (key, expected) in [
        ("Uid:", "0 0 0 0"),
        ("Groups:", ""),
        ("CapInh:", "0000000000000000"),
        ("CapPrm:", "00000000a80425fb"),
        ("CapEff:", "00000000a80425fb"),
        ("CapBnd:", "00000000a80425fb"),
        ("CapAmb:", "0000000000000000"),
        ("NoNewPrivs:", "0"),
        ("Seccomp:", "0"),
    ] {
        assert_eq!(value(&output, key), expected, "{key}");
    }

    let mut spec = pod.spec("user", status);
    spec.user = Some(User { uid: 1000, gid: 1001, groups: vec![7, 2000] });
    spec.no_new_privs = true;
    spec.rlimits = vec![
        Rlimit { resource: libc::RLIMIT_NOFILE, soft: 77, hard: 99 },
        Rlimit { resource: libc::RLIMIT_CORE, soft: 0, hard: 0 },
    ];
    let net_bind = 1 << 10;
    spec.capabilities = Some(Capabilities {
        bounding: net_bind,
        permitted: net_bind,
        effective: net_bind,
        inheritable: net_bind,
        ambient: net_bind,
    });
    // Allow everything: BPF_RET | BPF_K with SECCOMP_RET_ALLOW.
    spec.seccomp_filter = [&6_u16.to_ne_bytes()[..], &[0, 0], &0x7fff_0000_u32.to_ne_bytes()].concat();
    let (ended, output) = pod.run_spec(spec);
    assert_eq!(ended.exit_code, 0, "{output}");
    for (key, expected) in [
        ("Uid:", "1000 1000 1000 1000"),
        ("Gid:", "1001 1001 1001 1001"),
        ("Groups:", "7 2000"),
        ("CapPrm:", "0000000000000400"),
        ("CapEff:", "0000000000000400"),
        ("CapBnd:", "0000000000000400"),
        ("CapAmb:", "0000000000000400"),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
    ] {
        assert_eq!(value(&output, key), expected, "{key}");
    }
    assert!(output.ends_with("77\n0\n"), "{output}");

    let mut spec = pod.spec("none", status);
    spec.capabilities = None;
    let (_, output) = pod.run_spec(spec);
    assert_eq!((value(&output, "CapPrm:"), value(&output, "CapBnd:")), ("0".repeat(16), "0".repeat(16)));
    pod.stop();
}

#[test]
fn what_the_node_does_not_permit_is_a_warning() {
    let mut pod = Pod::new();
    let mut spec = pod.spec("a", "cat /proc/self/oom_score_adj");
    spec.oom_score_adj = 321;
    let (_, output) = pod.run_spec(spec);
    assert_eq!(output, "321\n");
    let mut spec = pod.spec("b", "ulimit -Hn");
    spec.oom_score_adj = -500;
    spec.rlimits = vec![Rlimit { resource: libc::RLIMIT_NOFILE, soft: 1024, hard: 1 << 40 }];
    let started = pod.start(spec);
    let ended = pod.agent.ended("b");
    assert_eq!(ended.exit_code, 0);
    // Above fs.nr_open nobody may go, so there is at least this warning; the score depends on the node's rights.
    assert!(started.warnings.iter().any(|warning| warning.contains("NOFILE")), "{:?}", started.warnings);
    pod.stop();
}

#[test]
fn files_of_the_kernel_are_hidden_and_devices_bare() {
    let mut pod = Pod::new();
    let script = r#"
        wc -c < /proc/interrupts; ls /sys/firmware | wc -l
        (echo 1 > /proc/sys/kernel/panic) 2>/dev/null || echo sys is read-only
        touch /sys/x 2>/dev/null || echo sysfs is read-only
        for d in null zero full random urandom tty; do [ -c /dev/$d ] && echo $d; done
        echo x > /dev/null && head -c 3 /dev/zero | wc -c
        readlink /dev/fd; readlink /dev/stdin; readlink /dev/ptmx
        for where in /dev /tmp /dev/shm; do
            mknod $where/disk b 8 0; mknod $where/zero2 c 1 5
            head -c 1 $where/zero2 2>/dev/null || echo no device in $where
        done"#;
    let (_, output) = pod.run("a", script);
    let expected = "0\n0\nsys is read-only\nsysfs is read-only\nnull\nzero\nfull\nrandom\nurandom\ntty\n3\n\
                    /proc/self/fd\n/proc/self/fd/0\npts/ptmx\n\
                    no device in /dev\nno device in /tmp\nno device in /dev/shm\n";
    assert_eq!(output, expected);
    pod.stop();
}

/// One memory for all containers of a sandbox, which nobody else has among its mounts.
#[test]
fn memory_is_shared_within_the_sandbox() {
    let mounts = |of: &str| fs::read_to_string(format!("/proc/{of}/mountinfo")).expect("mounts");
    let mut pod = Pod::new();
    pod.start(pod.spec("writer", "echo shared > /dev/shm/x; sleep 1000"));
    let script = "until test -s /dev/shm/x; do sleep 0.02; done; cat /dev/shm/x; mount | grep -c shm; stat -c %a /dev/shm; \
                  df -k /dev/shm | tail -n 1 | awk '{print $2}'; umount /dev/shm 2>/dev/null || echo stays";
    let (_, output) = pod.run("reader", script);
    assert_eq!(output, "shared\n1\n1777\n65536\nstays\n");
    let pause = pod.agent.state().pause_pid;
    let of_pause = mounts(&pause.to_string());
    assert!(of_pause.lines().count() == 1 && of_pause.contains(" - tmpfs "), "{of_pause}");
    assert_eq!(fs::read_dir(format!("/proc/{pause}/root/")).expect("its root").count(), 1);
    let device = of_pause.split(' ').nth(2).expect("a device");
    assert!(mounts("self").lines().all(|line| line.split(' ').nth(2) != Some(device)), "the node has {of_pause}");

    // The next sandbox begins with nothing.
    Command::new("kill").args(["-9", &pause.to_string()]).status().expect("kill");
    while !matches!(pod.agent.event().happened, Some(Happened::SandboxEnded(_))) {}
    pod.create_sandbox(SandboxSpec { attempt: 2, hostname: "again".into(), ..SandboxSpec::default() });
    let (_, output) = pod.run("later", "ls -A /dev/shm");
    assert_eq!(output, "");
    pod.stop();

    // Without any, the infra container has the node's mounts: nothing of those may be shown.
    let mut pod = Pod::spawn();
    let spec = SandboxSpec { attempt: 1, hostname: "none".into(), ..SandboxSpec::default() };
    assert!(matches!(pod.agent.ask(Ask::CreateSandbox(spec)), Say::SandboxStarted(_)));
    let refused = pod.try_start(pod.spec("a", "ls /dev/shm")).expect_err("there is no shared memory");
    assert!(refused.detail.contains("no shared memory"), "{refused:?}");
    pod.stop();
}

#[test]
fn roots_and_volumes() {
    let mut pod = Pod::new();
    let volume = pod.data.path().join("volume");
    fs::create_dir_all(volume.join("sub")).expect("make volume");
    let file = pod.data.path().join("a-file");
    fs::write(&file, "of the node\n").expect("write");
    let mut writer = pod.spec("writer", "echo from writer > /data/deep/x; cat /etc/the-file; mkdir /new; ls -d /new");
    writer.mounts.push(bind(&volume, "/data/deep"));
    writer.mounts.push(Mount { readonly: true, ..bind(&file, "/etc/the-file") });
    let (ended, output) = pod.run_spec(writer);
    assert_eq!((ended.exit_code, output.as_str()), (0, "of the node\n/new\n"));

    let script = "cat /data/x; touch /data/y 2>/dev/null || echo read-only volume; \
                  touch /x 2>/dev/null || echo read-only root; ls /data; touch /tmp/x && echo tmp";
    let mut reader = pod.spec("reader", script);
    reader.mounts.push(Mount { readonly: true, ..bind(&volume, "/data") });
    let tmp = Mount { options: "size=1m,mode=1777".into(), target: "/tmp".into(), ..Mount::default() };
    reader.mounts.push(Mount { kind: MountKind::Tmpfs.into(), ..tmp });
    reader.root.as_mut().expect("root").readonly = true;
    let (_, output) = pod.run_spec(reader);
    assert_eq!(output, "from writer\nread-only volume\nread-only root\nsub\nx\ntmp\n");
    assert!(!support::rootfs().join("new").exists(), "the image is as it was");

    // A link in the image that leads out of it leads to the container's own files.
    let evil = pod.data.path().join("evil");
    fs::create_dir_all(&evil).expect("make layer");
    std::os::unix::fs::symlink("/", evil.join("escape")).expect("link");
    let mut linked = pod.spec("linked", "cat /mark/x; ls /escape/mark");
    linked.root.as_mut().expect("root").lowers.insert(0, evil.to_string_lossy().into_owned());
    linked.mounts.push(bind(&volume, "/escape/mark"));
    let (_, output) = pod.run_spec(linked);
    assert_eq!(output, "from writer\nsub\nx\n");
    assert!(!std::path::Path::new("/mark").exists());
    pod.stop();
}

fn bind(source: &std::path::Path, target: &str) -> Mount {
    let source = source.to_string_lossy().into_owned();
    Mount { source, target: target.into(), recursive: true, ..Mount::default() }
}

#[test]
fn a_part_of_a_volume_is_all_that_is_shown_of_it() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let mut pod = Pod::new();
    let volume = pod.data.path().join("volume");
    fs::create_dir_all(volume.join("real/part")).expect("make volume");
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o777)).expect("open up");
    fs::write(volume.join("file"), "a file\n").expect("write");
    symlink("real", volume.join("inside")).expect("link");
    symlink("/etc", volume.join("outside")).expect("link");
    symlink("../..", volume.join("above")).expect("link");
    let part = |sub_path: &str| Mount { sub_path: sub_path.into(), ..bind(&volume, "/data") };

    // What is missing is made with the volume's mode; a file is mounted as a file; links may lead about in the volume.
    let mut made = pod.spec("made", "echo x > /data/x; stat -c %a /data");
    made.mounts.push(part("new/deep"));
    assert_eq!(pod.run_spec(made).1, "777\n");
    assert_eq!(fs::read_to_string(volume.join("new/deep/x")).expect("read"), "x\n");
    let mut file = pod.spec("file", "cat /data");
    file.mounts.push(part("file"));
    assert_eq!(pod.run_spec(file).1, "a file\n");
    let mut inside = pod.spec("inside", "ls /data");
    inside.mounts.push(part("inside"));
    assert_eq!(pod.run_spec(inside).1, "part\n");

    // And nowhere else.
    for (at, sub_path) in ["outside", "outside/ssl", "above/x", "outside/made/here"].into_iter().enumerate() {
        let mut spec = pod.spec(&format!("out-{at}"), "ls /data");
        spec.mounts.push(part(sub_path));
        let refused = pod.try_start(spec).expect_err(sub_path);
        assert_eq!((refused.step.as_str(), refused.errno), ("open subPath", libc::EXDEV), "{refused:?}");
        assert_eq!((refused.object.as_str(), refused.fault()), (sub_path, Fault::Container));
    }
    for sub_path in ["../x", "/etc", "a/../../x"] {
        let mut spec = pod.spec("wrong", "ls /data");
        spec.mounts.push(part(sub_path));
        assert_eq!(pod.try_start(spec).expect_err(sub_path).errno, libc::EINVAL);
    }
    assert!(!std::path::Path::new("/etc/made").exists());
    pod.stop();
}

#[test]
fn a_part_that_is_exchanged_for_a_link_meanwhile_shows_nothing_of_the_node() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut pod = Pod::new();
    let volume = pod.data.path().join("volume");
    let secret = pod.data.path().join("secret");
    fs::create_dir_all(&volume).expect("make volume");
    fs::create_dir_all(secret.join("deep")).expect("make what must not be seen");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // As another container of the pod would do it.
        scope.spawn(|| {
            let (part, link) = (volume.join("part"), volume.join("link"));
            std::os::unix::fs::symlink(&secret, &link).expect("link");
            fs::create_dir_all(part.join("deep")).expect("make");
            let text =
                |path: &std::path::Path| std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).expect("path");
            let (part, link) = (text(&part), text(&link));
            while !done.load(Ordering::Relaxed) {
                let _ = nix::fcntl::renameat2(
                    nix::fcntl::AT_FDCWD,
                    link.as_c_str(),
                    nix::fcntl::AT_FDCWD,
                    part.as_c_str(),
                    nix::fcntl::RenameFlags::RENAME_EXCHANGE,
                );
            }
        });
        let mut shown = 0;
        for round in 0..40 {
            let mut spec = pod.spec(&format!("r{round}"), "touch /data/seen");
            spec.mounts.push(Mount { sub_path: "part/deep".into(), ..bind(&volume, "/data") });
            match pod.try_start(spec) {
                Ok(_) => {
                    pod.agent.ended(&format!("r{round}"));
                    shown += 1;
                }
                Err(refused) => assert_eq!(refused.step, "open subPath", "{refused:?}"),
            }
        }
        done.store(true, Ordering::Relaxed);
        assert!(shown > 0, "the directory was never there");
    });
    assert!(!secret.join("deep/seen").exists());
    pod.stop();
}

#[test]
fn mounts_below_a_volume() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    let mut pod = Pod::new();
    let volume = pod.data.path().join("volume");
    let (below, later) = (volume.join("below"), volume.join("later"));
    fs::create_dir_all(&below).expect("make");
    fs::create_dir_all(&later).expect("make");
    let none = None::<&str>;
    mount(Some(&volume), &volume, none, MsFlags::MS_BIND, none).expect("mount (needs root)");
    mount(none, &volume, none, MsFlags::MS_SHARED, none).expect("share");
    mount(Some("tmpfs"), &below, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).expect("mount");

    let script =
        "touch /data/x 2>/dev/null || echo top read-only; touch /data/below/x 2>/dev/null || echo below read-only";
    for (name, shallow, told) in
        [("shallow", true, "top read-only\n"), ("whole", false, "top read-only\nbelow read-only\n")]
    {
        let mut spec = pod.spec(name, script);
        spec.mounts.push(Mount { readonly: true, shallow_readonly: shallow, ..bind(&volume, "/data") });
        assert_eq!(pod.run_spec(spec).1, told, "{name}");
    }

    // What the node mounts later is seen where it is asked for, and there alone.
    let script = "echo ready; until [ -e /data/go ]; do sleep 0.02; done; [ -e /data/later/mark ] && echo seen; true";
    for (name, propagation) in [("apart", Propagation::None), ("follows", Propagation::HostToContainer)] {
        let mut spec = pod.spec(name, script);
        spec.mounts.push(Mount { propagation: propagation.into(), ..bind(&volume, "/data") });
        pod.start(spec);
    }
    for name in ["apart", "follows"] {
        until("the shell", || pod.output(name, 0), |output| output.contains("ready"));
    }
    mount(Some("tmpfs"), &later, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).expect("mount");
    fs::write(later.join("mark"), "").expect("write");
    fs::write(volume.join("go"), "").expect("write");
    // They end in any order.
    let mut running = vec!["apart", "follows"];
    while !running.is_empty() {
        if let Some(Happened::Ended(ended)) = pod.agent.event().happened {
            running.retain(|name| *name != ended.name);
        }
    }
    for (name, told) in [("apart", "ready\n"), ("follows", "ready\nseen\n")] {
        assert_eq!(pod.output(name, 0), told, "{name}");
    }
    for place in [&later, &below, &volume] {
        umount2(place, MntFlags::MNT_DETACH).expect("unmount");
    }
    pod.stop();
}

#[test]
fn no_descriptor_of_the_supervisor_leaks() {
    let mut pod = Pod::new();
    let mut spec = pod.spec("a", "cd /proc/self/fd; echo *; readlink 0; cd /; readlink /proc/self/cwd");
    spec.cwd = "/made/for/it".into();
    let (_, output) = pod.run_spec(spec);
    // The shell itself opens one to read its directory.
    let first = output.lines().next().expect("a line");
    assert!(matches!(first, "0 1 2" | "0 1 2 3"), "{output}");
    assert!(output.ends_with("/dev/null\n/\n"), "{output}");
    let (_, output) = pod.run_spec(pod.spec_of("b", 0, &["ls", "-l", "/proc/self/fd"]));
    let open = output.lines().filter(|line| line.starts_with("lr") || line.starts_with("l-")).count();
    assert_eq!(open, 4, "the three, and the directory that is read: {output}");

    let mut spec = pod.spec("waits", "cat; echo never");
    spec.stdin = true;
    pod.start(spec);
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(pod.output("waits", 0), "", "its stdin is open");
    pod.stop();
}

#[test]
fn out_of_memory_is_told() {
    let mut pod = Pod::new();
    let mut spec = pod.spec("hungry", "dd if=/dev/zero of=/dev/null bs=100M count=1; echo survived $?");
    spec.limits = Some(Limits { memory_limit_bytes: Some(32 << 20), oom_group: true, ..Limits::default() });
    spec.argv = vec!["dd".into(), "if=/dev/zero".into(), "of=/dev/null".into(), "bs=100M".into(), "count=1".into()];
    let (ended, _) = pod.run_spec(spec);
    assert_eq!((ended.exit_code, ended.signal, ended.oom), (137, 9, true));
    let mut spec = pod.spec_of("hungry", 1, &["true"]);
    spec.limits = Some(Limits { memory_limit_bytes: Some(32 << 20), ..Limits::default() });
    let (ended, _) = pod.run_spec(spec);
    assert_eq!((ended.exit_code, ended.oom), (0, false), "the next run begins with a clean record");
    pod.stop();
}

#[test]
fn limits_hold() {
    let limits = Limits { pids_limit: Some(60), memory_limit_bytes: Some(512 << 20), ..Limits::default() };
    let mut pod = Pod::with(SandboxSpec { limits: Some(limits), ..SandboxSpec::default() });
    let mut spec = pod.spec("a", "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo no limit");
    spec.limits = Some(Limits {
        pids_limit: Some(5),
        cpu_shares: Some(2),
        cpu_weight: Some(1),
        cpu_quota_us: Some(50_000),
        ..Limits::default()
    });
    let (ended, output) = pod.run_spec(spec);
    assert_ne!(ended.exit_code, 0, "{output}");
    assert!(output.contains("fork"), "{output}");
    let mut spec = pod.spec("b", "cat /proc/self/cgroup | grep -c -v ':/$'; ls /sys/fs/cgroup | head -1");
    spec.mounts.push(Mount { kind: MountKind::Cgroup.into(), target: "/sys/fs/cgroup".into(), ..Mount::default() });
    let (_, output) = pod.run_spec(spec);
    assert!(output.lines().nth(1).is_some_and(|first| !first.is_empty()), "{output}");
    pod.stop();
}

#[test]
fn sysctls_are_the_sandboxs() {
    let before = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("ip_forward");
    let sysctl = |name: &str, value: &str| Sysctl { name: name.into(), value: value.into() };
    let sysctls = vec![sysctl("net.ipv4.ip_forward", "1"), sysctl("kernel.msgmax", "4242")];
    let mut pod = Pod::with(SandboxSpec { sysctls, ..SandboxSpec::default() });
    let (_, output) = pod.run("a", "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax");
    assert_eq!(output, "1\n4242\n");
    assert_eq!(fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("ip_forward"), before);
    pod.stop();
}

#[test]
fn output_that_flows_on_after_the_end_is_waited_for() {
    let mut pod = Pod::with(SandboxSpec { share_pid: true, ..SandboxSpec::default() });
    // Another container holds the first one's stdout and writes to it for longer than what stands still is waited for.
    pod.start(pod.spec("first", "echo $$; until [ -e /go ]; do sleep 0.02; done; exit 7"));
    let pid = until("its pid", || pod.output("first", 0), |output| output.ends_with('\n'));
    let script = format!(
        "exec >/proc/{}/fd/1; echo held; for n in 1 2 3 4 5 6 7 8 9 10; do sleep 0.4; echo $n; done",
        pid.trim()
    );
    pod.start(pod.spec("second", &script));
    until("the second", || pod.output("first", 0), |output| output.contains("held"));
    let (_, _, code) = pod.exec("first", &["touch", "/go"], false).expect("runs").finish();
    assert_eq!(code, 0);
    assert_eq!(pod.agent.ended("first").exit_code, 7);
    assert!(pod.output("first", 0).ends_with("held\n1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n"), "{}", pod.output("first", 0));
    pod.stop();
}

#[test]
fn an_end_is_known_although_the_supervisor_dies_before_it_is_told() {
    use minipod_podshim::cleanup::{kept_ends, kept_events};
    let mut pod = Pod::with(SandboxSpec { share_pid: true, ..SandboxSpec::default() });
    pod.start(pod.spec("first", "echo $$; until [ -e /go ]; do sleep 0.02; done; exit 7"));
    let pid = until("its pid", || pod.output("first", 0), |output| output.ends_with('\n'));
    // Its output stays open, so its end is not told for a while.
    pod.start(pod.spec("second", &format!("exec >/proc/{}/fd/1; echo held; sleep 1000", pid.trim())));
    until("the second", || pod.output("first", 0), |output| output.contains("held"));
    pod.exec("first", &["touch", "/go"], false).expect("runs").finish();
    let ends = until("the end in the state", || kept_ends(pod.dir.path()), |ends| !ends.is_empty());
    pod.shim.kill().expect("kill");
    assert_eq!((ends[0].name.as_str(), ends[0].exit_code), ("first", 7));
    assert!(!kept_events(pod.dir.path()).iter().any(|event| matches!(event.happened, Some(Happened::Ended(_)))));
}

#[test]
fn big_output_arrives_whole_and_rotates() {
    let mut pod = Pod::new();
    let (ended, output) = pod.run("big", "seq 1 300000; echo end");
    assert_eq!(ended.exit_code, 0);
    let expected: String = (1..=300_000).map(|number| format!("{number}\n")).collect();
    assert!(output == format!("{expected}end\n"), "{} bytes arrived", output.len());

    let path = pod.data.path().join("rotated").to_string_lossy().into_owned();
    let mut spec = pod.spec("rotating", "seq 1 100000");
    spec.log = Some(LogSpec { path: path.clone(), max_bytes: 1 << 20, max_files: 3 });
    pod.run_spec(spec);
    let size = |name: String| fs::metadata(name).map(|meta| meta.len()).unwrap_or(0);
    for name in [path.clone(), format!("{path}.1"), format!("{path}.2")] {
        let bytes = size(name.clone());
        assert!(bytes > 0 && bytes <= 1 << 20, "{name}: {bytes}");
    }
    assert_eq!(size(format!("{path}.3")), 0);
    let last = fs::read_to_string(&path).expect("log");
    assert!(last.ends_with(" stdout F 100000\n"));
    pod.stop();
}
