//! What a node's flags allow its pods, in force on the kernel.

mod support;

use minipod_podshim::cgroup::Cgroups;
use minipod_proto::v1::{PodSecurityContext, PodStatus, Sysctl};
use support::*;

/// The value of a file of the group of all pods, or of one of them: version 1's in its hierarchy, version 2's in the one tree.
fn value(node: &Node, uid: &str, v1: (&str, &str), v2: &str) -> String {
    let group = Cgroups::detect().expect("cgroups").all(&node.cgroup_root).child(uid);
    let (_, file) = group
        .directories()
        .into_iter()
        .find_map(|(controller, dir)| match controller.as_str() {
            "" => Some((controller, dir.join(v2))),
            name if name == v1.0 => Some((controller, dir.join(v1.1))),
            _ => None,
        })
        .expect("the controller");
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display())).trim().to_owned()
}

const MEMORY: ((&str, &str), &str) = (("memory", "memory.limit_in_bytes"), "memory.max");

#[test]
fn all_pods_together_stay_within_the_nodes_allocatable_and_each_within_its_processes() {
    on_a_node(|| async {
        let mut node = Node::new().await;
        let flags = ["--allocatable=cpu=1500m,memory=96Mi", "--pod-pids-limit=40"];
        node.flags.extend(flags.map(str::to_owned));
        node.start(&[]);
        // Starts more than there may be; asks for memory without a limit of its own: far more than the node gives to all pods.
        let forks = "(for n in $(seq 60); do sleep 1000 & done) 2>/v/refused; exec sleep 1000";
        let eats = "echo up; tail /dev/zero; echo survived $?; exit 3";
        node.api.put(scripts("uid-forks", "Never", 0, &[("a:app", forks)])).await;
        let beside = "trap 'exit 0' TERM; until [ -e /v/eaten ]; do sleep 0.1; done; echo still; exec sleep 1000";
        node.api.put(scripts("uid-eats", "Never", 0, &[("a:app", eats), ("a:beside", beside)])).await;
        let eaten = node.wait("uid-eats", "an end", ended("app")).await;
        let end = terminated(container(&eaten, "app")).expect("ended");
        assert_eq!(end.reason, "OOMKilled", "{end:?}");
        std::fs::write(node.data_dir().join("pods/uid-eats/volumes/v/eaten"), b"").expect("tell it");
        // It was that container, not its pod: under version 2 a group can be told to go as a whole.
        assert_eq!(eaten.phase, "Running", "{eaten:#?}");
        node.wait_log("uid-eats", "beside", "still").await;
        assert_eq!(value(&node, "", MEMORY.0, MEMORY.1), (96 << 20).to_string());
        assert_eq!(value(&node, "uid-forks", ("pids", "pids.max"), "pids.max"), "40");
        let refused = node.data_dir().join("pods/uid-forks/volumes/v/refused");
        let told = || std::fs::read_to_string(&refused).ok().filter(|text| text.contains("fork"));
        node.api.wait_for("a fork that is refused", told, || node.agent_log()).await;

        // The next agent takes the ceiling away.
        node.end(nix::sys::signal::Signal::SIGTERM);
        node.flags.push("--enforce-node-allocatable=none".to_owned());
        node.start(&[]);
        let lifted = || {
            let limit = value(&node, "", MEMORY.0, MEMORY.1);
            (limit == "max" || limit.parse::<u64>().is_ok_and(|bytes| bytes > 1 << 50)).then_some(())
        };
        node.api.wait_for("no ceiling", lifted, || node.agent_log()).await;
        for uid in ["uid-forks", "uid-eats"] {
            node.api.delete(uid, 0).await;
            node.wait_finished(uid).await;
            node.wait_gone(uid).await;
        }
    });
}

#[test]
fn parameters_that_a_node_does_not_allow_are_refused() {
    on_a_node(|| async {
        let mut node = Node::new().await;
        node.flags.push("--allowed-unsafe-sysctls=net.core.*".to_owned());
        node.start(&[]);
        let with = |uid: &str, name: &str, value: &str| {
            let mut pod = scripts(uid, "Never", 0, &[("a:app", "cat /proc/sys/net/core/somaxconn; sleep 1000")]);
            let sysctls = vec![Sysctl { name: name.into(), value: value.into() }];
            pod.spec_mut().security_context = Some(PodSecurityContext { sysctls, ..PodSecurityContext::default() });
            pod
        };
        node.api.put(with("uid-allowed", "net.core.somaxconn", "77")).await;
        node.api.put(with("uid-safe", "net.ipv4.tcp_syncookies", "1")).await;
        node.api.put(with("uid-unsafe", "net.ipv4.ip_forward", "1")).await;
        let failed = |status: &PodStatus| status.phase == "Failed";
        let status = node.wait("uid-unsafe", "refusal", failed).await;
        assert_eq!(status.reason, "SysctlForbidden");
        assert!(status.message.contains("\"net.ipv4.ip_forward\" not allowlisted"), "{}", status.message);
        node.wait_running("uid-allowed").await;
        node.wait_log("uid-allowed", "app", "77").await;
        node.wait_running("uid-safe").await;
        for uid in ["uid-allowed", "uid-safe", "uid-unsafe"] {
            node.api.delete(uid, 0).await;
            node.wait_finished(uid).await;
            node.wait_gone(uid).await;
        }
    });
}
