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

async fn wait_spare(node: &Node) -> u32 {
    node.api.wait_for("a spare supervisor", || spare_of(node), || node.agent_log()).await
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
