//! The network for real: each test is a node in a namespace of its own, which goes with the test's thread. Needs root,
//! and `nft` (Debian: nftables) and `unshare` (util-linux).

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::net::links::{self, Link};
use crate::net::netlink::Netlink;

const BRIDGE: &str = "mptest0";

/// Runs a test as a node of its own.
fn on_a_node(test: impl FnOnce(&Path) + Send) {
    let dir = tempfile::tempdir().expect("a directory");
    thread::scope(|scope| {
        let node = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; these tests need root");
            test(dir.path());
        });
        node.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// A namespace that lives as long as it is held.
fn netns() -> Netns {
    let made = thread::spawn(|| -> OwnedFd {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; these tests need root");
        File::open("/proc/thread-self/ns/net").expect("its file").into()
    });
    made.join().expect("the thread that made it").into()
}

fn config(dir: &Path, range: &str) -> NetConfig {
    NetConfig {
        bridge: BRIDGE.to_owned(),
        pod_cidr: range.parse().expect("a range"),
        cluster_cidr: None,
        data_dir: dir.to_owned(),
        mtu: None,
    }
}

fn open(dir: &Path) -> Network {
    Network::open(config(dir, "10.99.0.0/24")).expect("a network")
}

fn links_here() -> Vec<Link> {
    let mut netlink = Netlink::open().expect("netlink");
    netlink.dump(links::all_links()).expect("links").into_iter().filter_map(Link::of).collect()
}

fn veths_here() -> Vec<String> {
    links_here().into_iter().filter(|link| link.alias.starts_with("minipod:")).map(|link| link.name).collect()
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < end, "not within 10 s: {what}; links: {:?}", links_here());
        thread::sleep(Duration::from_millis(5));
    }
}

/// What `ip` says inside; the witness who is not us.
fn ip_says(netns: &Netns, args: &[&str]) -> String {
    let output = netns.run(|| Command::new("ip").args(args).output()).expect("enter the namespace");
    let output = output.expect("run ip; install iproute2");
    assert!(output.status.success(), "ip {args:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Sends a word from one pod to another and back.
fn talk(from: &Netns, to: &Netns, ip: Ipv4Addr) {
    let address = SocketAddr::new(IpAddr::V4(ip), 8080);
    let listener = to.run(|| TcpListener::bind(address)).expect("enter").expect("listen");
    let answering = thread::spawn(move || {
        let (mut stream, peer) = listener.accept().expect("accept");
        let mut word = [0; 5];
        stream.read_exact(&mut word).expect("read");
        stream.write_all(&word).expect("write");
        peer.ip()
    });
    let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(5));
    let mut stream = from.run(connect).expect("enter").expect("connect to the other pod");
    stream.write_all(b"hello").expect("write");
    let mut word = [0; 5];
    stream.read_exact(&mut word).expect("read");
    assert_eq!(&word, b"hello");
    answering.join().expect("the other pod");
}

#[test]
fn two_pods_reach_each_other() {
    on_a_node(|dir| {
        let network = open(dir);
        let (a, b) = (netns(), netns());
        let pod_a = network.attach("uid-a", &a, &[]).expect("attach a");
        let pod_b = network.attach("uid-b", &b, &[]).expect("attach b");
        assert_eq!(pod_a.ip, Ipv4Addr::new(10, 99, 0, 2));
        assert_eq!(pod_a.gateway, Ipv4Addr::new(10, 99, 0, 1));
        assert_eq!((pod_a.ifname.as_str(), pod_a.prefix), ("eth0", 24));
        assert_ne!(pod_a.ip, pod_b.ip);
        let link = ip_says(&a, &["link", "show", "eth0"]);
        assert!(link.contains("link/ether 0a:58:0a:63:00:02") && link.contains(",UP"), "{link}");
        assert!(ip_says(&a, &["addr", "show", "eth0"]).contains("inet 10.99.0.2/24"));
        assert!(ip_says(&a, &["route"]).contains("default via 10.99.0.1 dev eth0"));
        assert!(ip_says(&a, &["link", "show", "lo"]).contains("<LOOPBACK,UP"));
        talk(&a, &b, pod_b.ip);
        talk(&b, &a, pod_a.ip);
        // Its own address, through lo.
        talk(&a, &a, pod_a.ip);
        // No end announces an IPv6 address to all pods of the node; `::1` is each pod's own.
        assert_eq!(ip_says(&a, &["-6", "addr", "show", "dev", "eth0"]), "");
        assert!(ip_says(&a, &["-6", "addr", "show", "dev", "lo"]).contains("::1/128"));
        let host = Command::new("ip").args(["-6", "addr", "show", "dev", &pod_a.host_ifname]).output();
        assert_eq!(String::from_utf8_lossy(&host.expect("run ip").stdout), "");
        network.shutdown().expect("shutdown");
        assert_eq!(links_here().len(), 1, "lo alone");
    });
}

#[test]
fn attach_again_changes_nothing() {
    on_a_node(|dir| {
        let network = open(dir);
        let a = netns();
        let first = network.attach("uid-a", &a, &[]).expect("attach");
        let before = links_here();
        assert_eq!(network.attach("uid-a", &a, &[]).expect("again"), first);
        drop(network);
        // The agent was killed and starts again.
        let network = open(dir);
        assert_eq!(network.attach("uid-a", &a, &[]).expect("after a restart"), first);
        assert_eq!(links_here(), before);
        assert_eq!(network.address("uid-a"), Some(first.ip));
    });
}

#[test]
fn a_new_sandbox_keeps_the_address() {
    on_a_node(|dir| {
        let network = open(dir);
        let (old, new, other) = (netns(), netns(), netns());
        let first = network.attach("uid-a", &old, &[]).expect("attach");
        let second = network.attach("uid-a", &new, &[]).expect("attach the new namespace while the old one lives");
        assert_eq!(first, second);
        assert_eq!(veths_here().len(), 1);
        network.attach("uid-b", &other, &[]).expect("attach another");
        talk(&other, &new, second.ip);
        // The old one goes at its leisure, in the middle of the new attach.
        for _ in 0..10 {
            let next = netns();
            network.attach("uid-c", &next, &[]).expect("attach");
            drop(next);
        }
    });
}

#[test]
fn a_pod_that_goes_leaves_nothing() {
    on_a_node(|dir| {
        let network = open(dir);
        let a = netns();
        network.attach("uid-a", &a, &[]).expect("attach");
        assert_eq!(veths_here().len(), 1);
        drop(a);
        let start = Instant::now();
        network.detach("uid-a").expect("detach");
        assert!(start.elapsed() < Duration::from_millis(15), "detach waited: {:?}", start.elapsed());
        network.detach("uid-a").expect("detach twice");
        wait_until("the veth goes with the namespace", || veths_here().is_empty());
        assert_eq!(network.address("uid-a"), None);
        assert_eq!(std::fs::read_dir(dir.join("ipam/10.99.0.0_24")).expect("the book").count(), 0);
    });
}

#[test]
fn a_namespace_that_is_held_loses_its_veth() {
    on_a_node(|dir| {
        let network = open(dir);
        let (a, b) = (netns(), netns());
        network.attach("uid-a", &a, &[]).expect("attach");
        network.detach("uid-a").expect("detach");
        network.attach("uid-b", &b, &[]).expect("attach");
        network.detach("uid-b").expect("detach");
        let again = network.attach("uid-b", &b, &[]).expect("attach again before the veth went");
        wait_until("the reaper removes one veth", || veths_here() == [again.host_ifname.clone()]);
        thread::sleep(Duration::from_millis(700));
        assert_eq!(veths_here(), [again.host_ifname], "the one that came back stays");
    });
}

#[test]
fn reconcile_keeps_only_the_living() {
    on_a_node(|dir| {
        let network = open(dir);
        let spaces: Vec<Netns> = (0..4).map(|_| netns()).collect();
        for (n, space) in spaces.iter().enumerate() {
            network.attach(&format!("uid-{n}"), space, &[]).expect("attach");
        }
        // Killed between making a veth and marking it.
        let unmarked = Command::new("ip")
            .args(["link", "add", "mp123456789abc", "master", BRIDGE, "type", "veth", "peer", "name", "x"])
            .status();
        assert!(unmarked.expect("run ip; install iproute2").success());
        // Not ours: neither marked nor on our bridge.
        let foreign =
            Command::new("ip").args(["link", "add", "mpforeign", "type", "veth", "peer", "name", "y"]).status();
        assert!(foreign.expect("run ip").success());
        let live = HashSet::from(["uid-1".to_owned(), "uid-2".to_owned(), "uid-new".to_owned()]);
        assert_eq!(network.reconcile(&live).expect("reconcile"), ["uid-0", "uid-3"]);
        assert_eq!(network.reconcile(&live).expect("reconcile"), [""; 0]);
        assert_eq!(veths_here().len(), 2);
        let names: Vec<String> = links_here().into_iter().map(|link| link.name).collect();
        assert!(names.contains(&"mpforeign".to_owned()) && !names.contains(&"mp123456789abc".to_owned()), "{names:?}");
        assert!(network.address("uid-1").is_some() && network.address("uid-0").is_none());
    });
}

#[test]
fn a_taken_name_is_not_touched() {
    on_a_node(|dir| {
        let network = open(dir);
        let a = netns();
        let probe = network.attach("uid-a", &a, &[]).expect("attach").host_ifname;
        drop(network);
        let run =
            |args: &[&str]| assert!(Command::new("ip").args(args).status().expect("run ip").success(), "{args:?}");
        run(&["link", "set", &probe, "alias", "minipod:someone-else"]);
        let network = open(dir);
        let b = netns();
        let pod = network.attach("uid-a", &b, &[]).expect("attach under the second name");
        assert_ne!(pod.host_ifname, probe);
        assert!(links_here().iter().any(|link| link.name == probe && link.alias == "minipod:someone-else"));
        let taken = netns();
        assert!(taken.run(|| run(&["link", "add", "eth0", "type", "veth", "peer", "name", "y"])).is_ok());
        let error = network.attach("uid-z", &taken, &[]).expect_err("eth0 exists inside");
        assert!(error.to_string().starts_with("create eth0 for mp"), "{error}");
    });
}

#[test]
fn the_bridge_survives_and_follows_its_range() {
    on_a_node(|dir| {
        drop(open(dir));
        let index = |links: &[Link]| links.iter().find(|l| l.name == BRIDGE).map(|l| l.index);
        let before = index(&links_here()).expect("the bridge outlives the agent");
        let network = Network::open(config(dir, "10.98.0.0/24")).expect("open with another range");
        assert_eq!(index(&links_here()), Some(before));
        let output = Command::new("ip").args(["-4", "addr", "show", BRIDGE]).output().expect("run ip");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("inet 10.98.0.1/24") && !text.contains("10.99.0"), "{text}");
        assert_eq!(std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").expect("sysctl").trim(), "1");
        let rules = Command::new("nft").args(["list", "ruleset"]).output().expect("run nft; install nftables");
        let rules = String::from_utf8_lossy(&rules.stdout).into_owned();
        assert_eq!(rules.matches("masquerade").count(), 1, "{rules}");
        network.shutdown().expect("shutdown");
        let rules = Command::new("nft").args(["list", "ruleset"]).output().expect("run nft");
        assert_eq!(String::from_utf8_lossy(&rules.stdout).trim(), "");
    });
    on_a_node(|dir| {
        let made = Command::new("ip").args(["link", "add", BRIDGE, "type", "veth", "peer", "name", "y"]).status();
        assert!(made.expect("run ip").success());
        let error = Network::open(config(dir, "10.99.0.0/24")).expect_err("the name is a veth's");
        assert!(error.to_string().contains("use as a bridge"), "{error}");
        let mut bad = config(dir, "10.99.0.0/24");
        bad.bridge = "../etc".to_owned();
        assert!(matches!(Network::open(bad), Err(NetError::BadBridge(_))));
    });
}

#[test]
fn nodes_reach_each_others_pods_with_masquerade_beyond() {
    on_a_node(|dir| {
        // This node, and another behind a link.
        let other = netns();
        let range = |text: &str| text.parse::<Cidr>().expect("a range");
        let cluster = Some(range("10.99.0.0/16"));
        let wire = links::create_pair(
            &links::Pair { host_name: "up0", bridge_index: 0, pod_name: "up0", pod_mac: [2, 0, 0, 0, 0, 9], mtu: None },
            &other,
        );
        let mut netlink = Netlink::open().expect("netlink");
        netlink.call(wire, netlink_packet_core::NLM_F_CREATE).expect("a link between the nodes");
        let ip = |args: &'static [&'static str]| Command::new("ip").args(args).status().expect("run ip").success();
        assert!(ip(&["addr", "add", "192.168.77.1/24", "dev", "up0"]));
        assert!(other.run(|| ip(&["addr", "add", "192.168.77.2/24", "dev", "up0"])).expect("enter"));
        assert!(other.run(|| ip(&["link", "set", "up0", "up"])).expect("enter"));
        let here = Network::open(NetConfig { cluster_cidr: cluster, ..config(&dir.join("a"), "10.99.0.0/24") });
        let here = here.expect("a network");
        let there = other
            .run(|| Network::open(NetConfig { cluster_cidr: cluster, ..config(&dir.join("b"), "10.99.1.0/24") }))
            .expect("enter")
            .expect("the same bridge name in another namespace");
        let (a, b) = (netns(), netns());
        let pod_a = here.attach("uid-a", &a, &[]).expect("attach");
        let pod_b = there.attach("uid-b", &b, &[]).expect("attach over there");
        assert_eq!(pod_b.ip, Ipv4Addr::new(10, 99, 1, 2));
        let to = |cidr: &str, via: [u8; 4]| NodeRoute { pod_cidr: range(cidr), via: via.into() };
        here.set_routes(&[to("10.99.7.0/24", [192, 168, 77, 2])]).expect("a route that will be stale");
        here.set_routes(&[to("10.99.1.0/24", [192, 168, 77, 2])]).expect("routes");
        here.set_routes(&[to("10.99.1.0/24", [192, 168, 77, 2])]).expect("the same again");
        there.set_routes(&[to("10.99.0.0/24", [192, 168, 77, 1])]).expect("routes");
        let routes = Command::new("ip").args(["route"]).output().expect("run ip");
        let routes = String::from_utf8_lossy(&routes.stdout).into_owned();
        assert!(routes.contains("10.99.1.0/24 via 192.168.77.2") && !routes.contains("10.99.7"), "{routes}");
        assert_eq!(source_seen(&a, &b, pod_b.ip), IpAddr::V4(pod_a.ip), "the pod network keeps addresses");
        let outside = Ipv4Addr::new(192, 168, 77, 2);
        assert_eq!(source_seen(&a, &other, outside), "192.168.77.1".parse::<IpAddr>().expect("an address"));
        there.shutdown().expect("shutdown");
        here.shutdown().expect("shutdown");
    });
}

#[test]
fn ports_of_the_node_lead_to_pods() {
    on_a_node(|dir| {
        let network = open(dir);
        assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("run ip").success());
        let (a, b) = (netns(), netns());
        let wish = |protocol, host_ip, host_port| PortWish { protocol, host_ip, host_port, port: 8080 };
        let gateway = Ipv4Addr::new(10, 99, 0, 1);
        let wishes =
            [wish(Protocol::Tcp, None, 80), wish(Protocol::Tcp, Some(gateway), 81), wish(Protocol::Udp, None, 80)];
        let pod = network.attach("uid-a", &a, &wishes).expect("attach");
        network.attach("uid-b", &b, &[]).expect("attach");
        let listener = a.run(|| TcpListener::bind((pod.ip, 8080))).expect("enter").expect("listen");
        listener.set_nonblocking(true).expect("nonblocking");
        let connect = |ip: Ipv4Addr, port: u16| {
            let address = SocketAddr::new(IpAddr::V4(ip), port);
            // Longer than TCP waits for its first retransmission (1 s, RFC 6298): on a new veth the first SYN may be lost.
            TcpStream::connect_timeout(&address, Duration::from_secs(5)).map(drop)
        };
        let all = |when: &str| {
            for (who, answer) in [
                ("the node", connect(gateway, 80)),
                ("the node at the one address", connect(gateway, 81)),
                ("the node by its loopback", connect(Ipv4Addr::LOCALHOST, 80)),
                ("another pod", b.run(|| connect(gateway, 80)).expect("enter")),
                ("the pod itself", a.run(|| connect(gateway, 80)).expect("enter")),
            ] {
                answer.unwrap_or_else(|error| panic!("{who}, {when}: {error}"));
                wait_until(who, || listener.accept().is_ok());
            }
        };
        all("at first");
        assert!(connect(Ipv4Addr::LOCALHOST, 81).is_err(), "81 is the gateway's alone");
        let udp = a.run(|| std::net::UdpSocket::bind((pod.ip, 8080))).expect("enter").expect("bind");
        let sender = std::net::UdpSocket::bind((gateway, 0)).expect("bind");
        sender.send_to(b"word", (gateway, 80)).expect("send");
        udp.set_read_timeout(Some(Duration::from_secs(5))).expect("a patience");
        let mut word = [0; 8];
        assert_eq!(udp.recv(&mut word).expect("receive"), 4);
        // An agent that starts anew forwards from its first rule on, and what belongs to no pod goes.
        drop(network);
        let network = open(dir);
        all("after a restart");
        network.reconcile(&HashSet::from(["uid-a".to_owned(), "uid-b".to_owned()])).expect("reconcile");
        all("after a look at what there is");
        network.detach("uid-a").expect("detach");
        assert!(connect(gateway, 80).is_err(), "gone with the pod");
        let rules = Command::new("nft").args(["list", "ruleset"]).output().expect("run nft");
        assert!(!String::from_utf8_lossy(&rules.stdout).contains("dnat"));
        network.shutdown().expect("shutdown");
    });
}

/// The address from which `to` sees `from`.
fn source_seen(from: &Netns, to: &Netns, ip: Ipv4Addr) -> IpAddr {
    let address = SocketAddr::new(IpAddr::V4(ip), 8081);
    let listener = to.run(|| TcpListener::bind(address)).expect("enter").expect("listen");
    let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(5));
    let _stream = from.run(connect).expect("enter").expect("connect");
    listener.accept().expect("accept").1.ip()
}

#[test]
fn exhaustion_is_an_error_and_ends() {
    on_a_node(|dir| {
        let network = Network::open(config(dir, "10.99.0.0/30")).expect("a network");
        let (a, b) = (netns(), netns());
        network.attach("uid-a", &a, &[]).expect("the only address");
        let error = network.attach("uid-b", &b, &[]).expect_err("there is one address");
        assert!(matches!(error, NetError::Exhausted { size: 1, .. }), "{error}");
        assert_eq!(veths_here().len(), 1);
        network.detach("uid-a").expect("detach");
        drop(a);
        network.attach("uid-b", &b, &[]).expect("freed");
    });
}

#[test]
fn the_namespace_of_a_process() {
    on_a_node(|dir| {
        let network = open(dir);
        let mut child = Command::new("unshare")
            .args(["-n", "sleep", "60"])
            .stdin(Stdio::null())
            .spawn()
            .expect("run unshare; install util-linux");
        let own = std::fs::read_link("/proc/thread-self/ns/net").expect("own namespace");
        wait_until("unshare has its namespace", || {
            std::fs::read_link(format!("/proc/{}/ns/net", child.id())).is_ok_and(|theirs| theirs != own)
        });
        let attached = Netns::of_pid(child.id()).map(|netns| network.attach("uid-p", &netns, &[]));
        child.kill().expect("kill");
        child.wait().expect("wait");
        attached.expect("open its namespace").expect("attach");
        network.detach("uid-p").expect("detach");
        wait_until("the veth goes with the process", || veths_here().is_empty());
        assert!(Netns::of_pid(child.id()).is_err(), "it is gone");
    });
}

#[test]
fn many_pods_at_once_and_their_time() {
    on_a_node(|dir| {
        let network = open(dir);
        let spaces: Vec<Netns> = (0..40).map(|_| netns()).collect();
        let mut times: Vec<Duration> = spaces[..20]
            .iter()
            .enumerate()
            .map(|(n, space)| {
                let start = Instant::now();
                network.attach(&format!("one-{n}"), space, &[]).expect("attach");
                start.elapsed()
            })
            .collect();
        times.sort();
        println!("attach: median {:?}, slowest {:?}", times[times.len() / 2], times[times.len() - 1]);
        let failed = AtomicBool::new(false);
        thread::scope(|scope| {
            for (n, space) in spaces[20..].iter().enumerate() {
                let (network, failed) = (&network, &failed);
                scope.spawn(move || {
                    if let Err(error) = network.attach(&format!("many-{n}"), space, &[]) {
                        println!("{error}");
                        failed.store(true, Ordering::Relaxed);
                    }
                });
            }
        });
        assert!(!failed.load(Ordering::Relaxed));
        assert_eq!(veths_here().len(), 40);
        talk(&spaces[0], &spaces[39], network.address("many-19").expect("its address"));
    });
}
