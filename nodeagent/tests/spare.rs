//! The supervisor in waiting, under a real agent.

mod support;

use minipod_podshim::call::SPARE;
use nix::sys::signal::Signal;
use support::*;

/// The agent's spare, when one waits.
fn spare_of(node: &Node) -> Option<u32> {
    let agent = node.agent_pid().to_string();
    entries(std::path::Path::new("/proc")).into_iter().find_map(|process| {
        let line = std::fs::read_to_string(process.join("cmdline")).ok()?;
        let stat = std::fs::read_to_string(process.join("stat")).ok()?;
        // After the name in parentheses: the state, the parent.
        let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.to_owned();
        let spare = line.split('\0').nth(1) == Some(SPARE) && parent == agent;
        spare.then(|| process.file_name()?.to_string_lossy().parse().ok()).flatten()
    })
}

/// Waits until one has said that it waits: it is a process before that.
async fn wait_spare(node: &Node) -> u32 {
    let waits =
        |pid: &u32| node.agent_log().lines().any(|line| line.ends_with(&format!("a spare supervisor waits pid={pid}")));
    node.api.wait_for("a spare supervisor", || spare_of(node).filter(waits), || node.agent_log()).await
}

#[test]
fn pods_get_the_spare_and_none_misses_it() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let spare = wait_spare(&node).await;
        let sleeps = |uid| scripts(uid, "Always", 0, &[("a:app", "exec sleep 1000")]);
        node.api.put(sleeps("uid-with-the-spare")).await;
        node.wait_running("uid-with-the-spare").await;
        assert_eq!(node.shim_pid("uid-with-the-spare"), spare);

        // The next one dies before it is called: the pod starts a supervisor of its own.
        let next = wait_spare(&node).await;
        assert_ne!(next, spare);
        kill_9(next);
        node.api.put(sleeps("uid-without")).await;
        node.wait_running("uid-without").await;
        assert_ne!(node.shim_pid("uid-without"), next);

        for uid in ["uid-with-the-spare", "uid-without"] {
            node.api.delete(uid, 0).await;
            node.wait_finished(uid).await;
            node.wait_gone(uid).await;
        }
    });
}

/// What lies ready fits most pods; those that it does not fit get what they asked for all the same.
#[test]
fn the_spare_serves_pods_of_every_kind() {
    on_a_node(|| async {
        let node = Node::with_agent().await;
        let script = "cat /proc/self/uid_map; echo net $(readlink /proc/self/ns/net); echo uts $(readlink /proc/self/ns/uts); \
                      echo ipc $(readlink /proc/self/ns/ipc); df /dev/shm | tail -n 1; ls -l /dev/null; exec httpd -f -p 8080 -h /v";
        let kind = |uid: &str, change: fn(&mut minipod_proto::v1::PodSpec)| {
            let mut pod = scripts(uid, "Never", 0, &[("a:app", script)]);
            change(pod.spec_mut());
            pod
        };
        let pods = [
            kind("uid-plain", |_| {}),
            kind("uid-node-net", |spec| spec.host_network = true),
            kind("uid-node-ipc", |spec| spec.host_ipc = true),
            kind("uid-own-users", |spec| spec.host_users = Some(false)),
            kind("uid-one-pid", |spec| spec.share_process_namespace = Some(true)),
        ];
        let of_node =
            |kind: &str| std::fs::read_link(format!("/proc/thread-self/ns/{kind}")).expect("ns").display().to_string();
        for pod in pods {
            let spare = wait_spare(&node).await;
            let uid = pod.metadata.as_ref().expect("metadata").uid.clone();
            let (node_net, node_ipc) = (uid == "uid-node-net", uid == "uid-node-ipc");
            node.api.put(pod).await;
            let status = node.wait_running(&uid).await;
            assert_eq!(node.shim_pid(&uid), spare, "{uid}");
            let log = node.wait_log(&uid, "app", "/dev/null").await;
            for (kind, shared) in [("net", node_net), ("uts", node_net), ("ipc", node_ipc)] {
                assert_eq!(log.contains(&format!("{kind} {}", of_node(kind))), shared, "{uid}, {kind}:\n{log}");
            }
            assert!(log.contains("/dev/shm"), "{log}");
            let map: Vec<&str> = log.lines().next().unwrap_or_default().split_whitespace().collect();
            assert_eq!(map.get(1) == Some(&"0"), uid != "uid-own-users", "{uid}: {map:?}");
            // The address that the status tells is one that answers.
            if !node_net {
                let address = format!("{}:8080", status.pod_ip);
                let get = || std::net::TcpStream::connect(&address).ok();
                node.api.wait_for("an answer of the pod's address", get, || node.agent_log()).await;
            }
            node.api.delete(&uid, 0).await;
            node.wait_finished(&uid).await;
            node.wait_gone(&uid).await;
        }
    });
}

#[test]
fn the_spare_goes_with_the_agent_and_pods_stay() {
    on_a_node(|| async {
        let mut node = Node::with_agent().await;
        wait_spare(&node).await;
        node.api.put(scripts("uid-stays", "Always", 0, &[("a:app", "exec sleep 1000")])).await;
        node.wait_running("uid-stays").await;
        let spare = wait_spare(&node).await;
        let main = node.pid("uid-stays", "app");
        node.end(Signal::SIGKILL);
        let gone = || (!std::path::Path::new(&format!("/proc/{spare}/exe")).exists()).then_some(());
        node.api.wait_for("the end of the spare", gone, || format!("spare {spare}")).await;
        assert_eq!(node.pid("uid-stays", "app"), main);
        node.start(&[]);
        wait_spare(&node).await;
        node.api.delete("uid-stays", 0).await;
        node.wait_finished("uid-stays").await;
        node.wait_gone("uid-stays").await;
    });
}
