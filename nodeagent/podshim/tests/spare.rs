//! Supervisors that wait for a pod.

mod support;

use std::os::unix::fs::MetadataExt as _;

use minipod_podshim::cleanup::{self, Presence};
use minipod_podshim::protocol::{Happened, IdRange, SandboxSpec};
use support::{Agent, Pod, Spare, pause, until};

fn run_dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("minipod-test-").tempdir_in("/run").expect("a directory in /run (needs root)")
}

#[test]
fn a_spare_that_is_called_is_the_pods_supervisor() {
    let dir = run_dir();
    let mut spare = Spare::start();
    let (path, root) = (dir.path().to_string_lossy(), format!("minipod-test-spare-{}", std::process::id()));
    let pause = pause();
    let words = ["--dir", &*path, "--uid", "pod-called", "--cgroup-root", &root, "--pause", &*pause.to_string_lossy()];
    spare.call(dir.path(), &words);
    assert_eq!(cleanup::look(dir.path()).expect("look"), Presence::Live);
    let mut agent = Agent::connect(dir.path());
    let state = agent.subscribe();
    assert_eq!(state.shim_pid, spare.process.id());
    // It is nobody's spare any more: the other end of its former stdin does not matter, and `ps` shows the pod.
    drop(spare.socket);
    let line = std::fs::read_to_string(format!("/proc/{}/cmdline", spare.process.id())).expect("command line");
    let shown: Vec<&str> = line.split('\0').skip(1).take_while(|word| !word.is_empty()).collect();
    assert_eq!(shown, words);
    agent.state();
    spare.process.kill().expect("kill");
    spare.process.wait().expect("wait");
    assert_eq!(cleanup::look(dir.path()).expect("look"), Presence::Dead);
}

#[test]
fn a_spare_ends_with_its_agent() {
    let mut spare = Spare::start();
    drop(spare.socket);
    let status = spare.process.wait().expect("wait");
    assert!(status.success(), "{status}");
}

#[test]
fn a_call_that_makes_no_sense_leaves_no_supervisor() {
    let dir = run_dir();
    let mut spare = Spare::start();
    spare.call(dir.path(), &["--dir", "relative", "--uid", ".."]);
    assert!(!spare.process.wait().expect("wait").success());
    let complaint = std::fs::read_to_string(dir.path().join("shim.log")).expect("complaints");
    assert!(complaint.contains("it is started by minipod-nodeagent"), "{complaint}");
    until("the lock is free", || cleanup::look(dir.path()).expect("look"), |seen| *seen == Presence::Dead);
}

#[test]
fn a_spare_that_died_takes_its_call_with_it() {
    let dir = run_dir();
    let mut spare = Spare::start();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(spare.process.id().cast_signed()), nix::sys::signal::SIGSTOP)
        .expect("stop");
    spare.call(dir.path(), &["--dir", "/nowhere"]);
    // On its way the lock is held; with the socket that nobody reads any more it goes.
    assert_eq!(cleanup::look(dir.path()).expect("look"), Presence::Live);
    spare.process.kill().expect("kill");
    spare.process.wait().expect("wait");
    until("the lock is free", || cleanup::look(dir.path()).expect("look"), |seen| *seen == Presence::Dead);
}

/// The network that a spare has told of is that of the sandbox, and stays its own where the sandbox has another.
#[test]
fn the_first_sandbox_has_the_network_that_was_told_of() {
    let same = |spec: SandboxSpec| {
        let mut pod = Pod::of_spare();
        let told = pod.network.take().expect("a spare has one").metadata().expect("stat").ino();
        let mut used = |spec| {
            let pause = pod.create_sandbox(spec);
            let network = std::fs::metadata(format!("/proc/{pause}/ns/net")).expect("its network").ino();
            (network == told, pause)
        };
        let (first, pause) = used(SandboxSpec { attempt: 1, hostname: "first".into(), ..spec.clone() });
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pause.cast_signed()), nix::sys::signal::SIGKILL)
            .expect("kill");
        while !matches!(pod.agent.event().happened, Some(Happened::SandboxEnded(_))) {}
        let pause = pod.create_sandbox(SandboxSpec { attempt: 2, hostname: "second".into(), ..spec });
        let again = std::fs::metadata(format!("/proc/{pause}/ns/net")).expect("its network").ino() == told;
        assert_eq!(pod.run("a", "hostname").1, "second\n");
        pod.stop();
        (first, again)
    };
    assert_eq!(same(SandboxSpec::default()), (true, false));
    assert_eq!(same(SandboxSpec { share_pid: true, ..SandboxSpec::default() }), (true, false));
    let users = Some(IdRange { first: 1 << 20, count: 65_536 });
    assert_eq!(same(SandboxSpec { users, ..SandboxSpec::default() }), (false, false));
}

/// It has what it laid in on descriptors alone: after a refusal everything is made when it is needed.
#[test]
fn a_sandbox_that_fails_leaves_a_supervisor_that_can_make_one() {
    let mut pod = Pod::of_spare();
    let wrong = SandboxSpec { attempt: 1, hostname: "x".repeat(100), ..SandboxSpec::default() };
    pod.create_sandbox(wrong);
    while !matches!(pod.agent.event().happened, Some(Happened::SandboxEnded(_))) {}
    pod.create_sandbox(SandboxSpec { attempt: 2, hostname: "fits".into(), ..SandboxSpec::default() });
    assert_eq!(pod.run("a", "hostname; ls /sys/class/net").1, "fits\nlo\n");
    pod.stop();
}
