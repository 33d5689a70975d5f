//! Pods with users of their own on the real kernel: what is root inside is nobody's root on the node.

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use minipod_podshim::protocol::{
    Capabilities, ContainerSpec, Happened, IdRange, Mount, MountKind, SandboxSpec, Sysctl, User, Window,
};
use support::{Pod, until};

const RANGE: IdRange = IdRange { first: 0x7100_0000, count: 65_536 };

fn own_users() -> SandboxSpec {
    SandboxSpec { users: Some(RANGE), ..SandboxSpec::default() }
}

/// Owner on the node, as the pod would see it; `None` for one that the pod does not have.
fn owner(path: &Path) -> (Option<u32>, Option<u32>) {
    let meta = path.symlink_metadata().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    (RANGE.inside(meta.uid()), RANGE.inside(meta.gid()))
}

fn status_line(pid: u32, name: &str) -> Vec<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
    let radix = if name.starts_with("Cap") { 16 } else { 10 };
    line.split_ascii_whitespace().skip(1).map(|word| u64::from_str_radix(word, radix).expect("a number")).collect()
}

#[test]
fn root_inside_is_somebody_else_outside() {
    let mut pod = Pod::with(own_users());
    let script = "id -u; cat /proc/self/uid_map /proc/self/gid_map | tr -s ' '; touch /made; chown 5:6 /made; ls -n /made | \
                  awk '{print $3, $4}'; ls -nd / /bin/sh /dev /dev/null | awk '{print $3}' | tr '\\n' ' '; echo; \
                  echo again > /dev/stdout; sleep 1000";
    let started = pod.start(pod.spec("a", script));
    let output = until("its words", || pod.output("a", 0), |output| output.ends_with("again\n"));
    let map = format!(" 0 {} {}", RANGE.first, RANGE.count);
    // Only a device is the node's.
    assert_eq!(output, format!("0\n{map}\n{map}\n5 6\n0 0 0 65534 \nagain\n"));
    let first = u64::from(RANGE.first);
    let pause = pod.agent.state().pause_pid;
    for pid in [started.pid, pause] {
        assert_eq!(status_line(pid, "Uid:"), [first; 4], "{pid}");
        assert_eq!(status_line(pid, "Gid:"), [first; 4], "{pid}");
        assert_ne!(fs::read_link(format!("/proc/{pid}/ns/user")).ok(), fs::read_link("/proc/self/ns/user").ok());
    }
    // On the disk the owners are those that the pod sees.
    let made = pod.data.path().join("a.0.upper/made").metadata().expect("made");
    assert_eq!((made.uid(), made.gid()), (5, 6));
    // A further process is the same root, and so is one with a terminal, which is its own.
    let (out, _, code) =
        pod.exec("a", &["sh", "-c", "id -u; readlink /proc/self/ns/user"], false).expect("runs").finish();
    let users = fs::read_link(format!("/proc/{pause}/ns/user")).expect("a namespace");
    assert_eq!((String::from_utf8_lossy(&out).into_owned(), code), (format!("0\n{}\n", users.display()), 0));
    let window = Window { rows: 10, columns: 20 };
    let shell = ["sh", "-c", "stat -c %u:%g $(tty); echo more > $(tty)"];
    let (out, _, code) = pod.exec_on("a", &shell, false, Some(window)).expect("runs").finish();
    assert_eq!((String::from_utf8_lossy(&out).replace('\r', ""), code), ("0:5\nmore\n".to_owned(), 0));
    pod.stop();
}

#[test]
fn a_user_and_its_terminal() {
    let mut pod = Pod::with(own_users());
    let mut spec =
        pod.spec("a", "id; stat -c %u:%g $(tty); touch /tmp/x && ls -n /tmp/x | awk '{print $3, $4}'; echo end");
    spec.user = Some(User { uid: 1000, gid: 2000, groups: vec![3000] });
    spec.terminal = Some(Window { rows: 10, columns: 80 });
    spec.mounts.push(Mount {
        kind: MountKind::Tmpfs.into(),
        target: "/tmp".into(),
        options: "mode=1777".into(),
        ..Mount::default()
    });
    let started = pod.start(spec);
    assert_eq!(status_line(started.pid, "Groups:"), [u64::from(RANGE.first) + 3000]);
    let output = until("its words", || pod.output("a", 0), |output| output.contains("end"));
    let wanted = "uid=1000 gid=2000 groups=3000\n1000:5\n1000 2000\nend\n";
    assert_eq!(output.replace('\r', "").replace("groups=2000,3000", "groups=3000"), wanted);
    pod.agent.ended("a");
    let mut beyond = pod.spec("b", "true");
    beyond.user = Some(User { uid: 65_536, gid: 0, groups: vec![] });
    let refused = pod.try_start(beyond).expect_err("no such user");
    assert!(refused.detail.contains("ids 0 to 65535"), "{refused:?}");
    pod.stop();
}

/// All of the namespaces' own things are the pod's root's to change, and nothing else is.
#[test]
fn rights_end_at_the_pods_namespaces() {
    let sysctl = |name: &str, value: &str| Sysctl { name: name.into(), value: value.into() };
    let sysctls = vec![sysctl("net.ipv4.ip_forward", "1"), sysctl("kernel.msgmax", "4242")];
    let mut pod = Pod::with(SandboxSpec { sysctls, ..own_users() });
    let all = Capabilities {
        bounding: u64::MAX >> 23,
        permitted: u64::MAX >> 23,
        effective: u64::MAX >> 23,
        ..Capabilities::default()
    };
    let mut spec = pod.spec(
        "mighty",
        "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax; hostname renamed && hostname; ip link set lo up && echo up; \
         mkdir /tmp/m; mount -t tmpfs none /tmp/m && echo mounted; mknod /tmp/null c 1 3 2>/dev/null || echo no device; \
         umount /proc/interrupts 2>/dev/null || echo masked; mount -o remount,bind,rw /proc/sys 2>/dev/null || echo locked; \
         unshare -m true && echo unshared; httpd -p 80 -h /tmp && echo bound",
    );
    spec.capabilities = Some(all);
    let (ended, output) = pod.run_spec(spec);
    let wanted = "1\n4242\nrenamed\nup\nmounted\nno device\nmasked\nlocked\nunshared\nbound\n";
    assert_eq!((output.as_str(), ended.exit_code), (wanted, 0), "{}", pod.complaints());
    pod.stop();
}

/// An open procfs lets a further user namespace have one of its own, which is what it is for; a masked one does not.
#[test]
fn nested_containers_need_an_open_procfs() {
    let mut pod = Pod::with(own_users());
    let script =
        "unshare -U -r -p -f -m sh -c 'mkdir -p /tmp/p; mount -t proc proc /tmp/p && ls -d /tmp/p/1' 2>&1 | tail -n 1";
    let mut nested = |name: &str, open: bool| {
        let mut spec = pod.spec(name, script);
        spec.mounts.retain(|mount| mount.target != "/sys");
        if open {
            spec.masked_paths.clear();
            spec.readonly_paths.clear();
        }
        pod.run_spec(spec).1
    };
    assert_eq!(nested("open", true), "/tmp/p/1\n");
    let masked = nested("masked", false).to_lowercase();
    assert!(masked.contains("permission denied") || masked.contains("not permitted"), "{masked}");
    pod.stop();
}

#[test]
fn volumes_show_the_ids_that_the_pod_knows() {
    let mut pod = Pod::with(own_users());
    let dir = pod.data.path().join("volumes");
    let place = |name: &str| {
        let path = dir.join(name);
        fs::create_dir_all(&path).expect("make");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("mode");
        path
    };
    let (disk, memory) = (place("disk"), place("memory"));
    // A file of uid 1000 that is on a disk; memory that has the node's ids of the pod already.
    fs::write(disk.join("old"), "x").expect("write");
    std::os::unix::fs::chown(disk.join("old"), Some(1000), Some(1000)).expect("chown");
    std::os::unix::fs::chown(&memory, Some(RANGE.first), Some(RANGE.first + 7)).expect("chown");
    let bind = |source: &Path, target: &str, idmapped: bool| Mount {
        source: source.to_string_lossy().into_owned(),
        target: target.into(),
        idmapped,
        ..Mount::default()
    };
    let script = "touch /disk/new /memory/new /part/new /mpart/new; \
                  ls -nd /disk/new /disk/old /memory /memory/new /mpart /mpart/new /part /part/new | awk '{print $3 \":\" $4}' | tr '\\n' ' '";
    let mut spec = pod.spec("a", script);
    let parts = |spec: &mut ContainerSpec| {
        spec.mounts.extend([bind(&disk, "/disk", true), bind(&memory, "/memory", false)]);
        spec.mounts.push(Mount { sub_path: "a/b".into(), ..bind(&disk, "/part", true) });
        spec.mounts.push(Mount { sub_path: "a/b".into(), ..bind(&memory, "/mpart", false) });
    };
    parts(&mut spec);
    let (_, output) = pod.run_spec(spec);
    assert_eq!(output, "0:0 1000:1000 0:7 0:0 0:0 0:0 0:0 0:0 ", "{}", pod.complaints());
    let on_disk = |path: &str| {
        let meta = dir.join(path).metadata().expect(path);
        (meta.uid(), meta.gid())
    };
    for path in ["disk/new", "disk/a", "disk/a/b", "disk/a/b/new"] {
        assert_eq!(on_disk(path), (0, 0), "{path}");
    }
    for path in ["memory/new", "memory/a", "memory/a/b/new"] {
        assert_eq!(owner(&dir.join(path)), (Some(0), Some(0)), "{path}");
    }
    // Another container of the pod sees the same.
    let mut other = pod.spec("b", "ls -n /disk/new /disk/old | awk '{print $3 \":\" $4}' | tr '\\n' ' '");
    parts(&mut other);
    assert_eq!(pod.run_spec(other).1, "0:0 1000:1000 ");
    // A file system that cannot show other ids is refused, with a word on which can.
    let mut refused = pod.spec("c", "true");
    refused.mounts.push(bind(Path::new("/proc/self"), "/p", true));
    let refused = pod.try_start(refused).expect_err("procfs has no idmapped mounts");
    assert_eq!((refused.step.as_str(), refused.errno), ("show the pod's user ids in", libc::EINVAL));
    assert!(refused.detail.contains("ext4"), "{refused:?}");
    pod.stop();
}

#[test]
fn one_pid_namespace_and_a_second_sandbox() {
    let mut pod = Pod::with(SandboxSpec { share_pid: true, ..own_users() });
    let (_, output) = pod.run("a", "cat /proc/1/comm; ls -nd /proc/1 | awk '{print $3}'; kill -0 1 && echo mine");
    assert!(output.ends_with("pause\n0\nmine\n"), "{output}");
    pod.stop();

    // The users of the next sandbox are others, and nothing is left of those before.
    let mut pod = Pod::with(own_users());
    let pause = pod.agent.state().pause_pid;
    let before = fs::read_link(format!("/proc/{pause}/ns/user")).expect("a namespace");
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pause.cast_signed()), nix::sys::signal::Signal::SIGKILL)
        .expect("kill");
    while !matches!(pod.agent.event().happened, Some(Happened::SandboxEnded(_))) {}
    let range = IdRange { first: RANGE.first + 65_536, ..RANGE };
    pod.create_sandbox(SandboxSpec {
        attempt: 2,
        hostname: "again".into(),
        users: Some(range),
        ..SandboxSpec::default()
    });
    let (_, output) = pod.run("a", "awk '{print $2}' /proc/self/uid_map; readlink /proc/self/ns/user");
    let lines: Vec<&str> = output.lines().collect();
    assert_eq!(lines[0], range.first.to_string());
    assert_ne!(Path::new(lines[1]), before);
    pod.stop();
}
