//! A bridge with a network namespace per member, in a namespace of the test's own that ends with the test.

use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::process::{Command, Stdio};

/// Makes the calling thread and all that it starts live in a new network and a new view of the mounts.
pub fn leave_the_machine() {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("new namespaces: run the tests as root");
    run("mount", &["--make-rprivate", "/"]);
    run("ip", &["link", "set", "lo", "up"]);
    run("ip", &["link", "add", "hub", "type", "bridge"]);
    run("ip", &["addr", "add", "10.77.0.254/24", "dev", "hub"]);
    run("ip", &["link", "set", "hub", "up"]);
}

pub fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}: install iproute2, nftables and mount"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Runs `body` on a thread inside a namespace.
fn inside<T: Send>(network: &File, body: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            setns(network, CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            body()
        });
        thread.join().expect("the thread")
    })
}

/// The namespace of member `number`, with the address 10.77.0.`number`+1 on the hub.
pub fn member(number: usize) -> File {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("a namespace");
        File::open("/proc/thread-self/ns/net").expect("the namespace's file")
    });
    let network = made.join().expect("the thread");
    let outer = format!("member{number}");
    let path = format!("/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&network));
    run("ip", &["link", "add", &outer, "type", "veth", "peer", "name", "eth0", "netns", &path]);
    run("ip", &["link", "set", &outer, "master", "hub", "up"]);
    let address = format!("10.77.0.{}/24", number + 1);
    inside(&network, || {
        run("ip", &["link", "set", "lo", "up"]);
        run("ip", &["addr", "add", &address, "dev", "eth0"]);
        run("ip", &["link", "set", "eth0", "up"]);
        run("nft", &["add table ip cut; add chain ip cut in { type filter hook input priority 0; }"]);
    });
    network
}

/// From now on the member of `network` hears nothing of `from`, another member.
pub fn deafen(network: &File, from: usize) {
    inside(network, || run("nft", &[&format!("add rule ip cut in ip saddr 10.77.0.{} drop", from + 1)]));
}

pub fn heal(network: &File) {
    inside(network, || run("nft", &["flush chain ip cut in"]));
}
