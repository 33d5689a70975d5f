//! The supervisor's own life: agents that come and go, deaths of everything.

mod support;

use std::collections::BTreeSet;

use minipod_podshim::cgroup::Cgroups;
use minipod_podshim::cleanup::{self, Presence};
use minipod_podshim::protocol::{Ask, Empty, Fault, Happened, SandboxPhase, SandboxSpec, Say};
use support::{Agent, Pod, alive, until};

#[test]
fn a_new_agent_hears_what_happened_without_one() {
    let mut pod = Pod::new();
    let long = pod.start(pod.spec("long", "sleep 1000"));
    pod.start(pod.spec("short", "sleep 0.3; exit 6"));
    // Both starts; then the agent dies.
    assert!(matches!(pod.agent.event().happened, Some(Happened::Started(_))));
    let seen = pod.agent.event().sequence;
    pod.agent.send(Ask::Acknowledge(seen));
    pod.agent.state();
    pod.agent = Agent::connect(pod.dir.path());
    until(
        "the short one's end",
        || pod.agent.state().runs.iter().filter(|run| run.ended.is_some()).count(),
        |ended| *ended == 1,
    );

    let mut agent = Agent::connect(pod.dir.path());
    let state = agent.subscribe();
    assert_eq!((state.phase(), state.acknowledged), (SandboxPhase::Up, seen));
    let run = state.runs.iter().find(|run| run.started.as_ref().is_some_and(|s| s.name == "long")).expect("run");
    assert_eq!((run.started.as_ref(), &run.ended), (Some(&long), &None));
    assert!(alive(long.pid));
    let event = agent.event();
    assert_eq!(event.sequence, seen + 1);
    assert!(matches!(event.happened, Some(Happened::Ended(ended)) if ended.name == "short" && ended.exit_code == 6));

    // Not acknowledged: the next one hears it again. Acknowledged: never again.
    let mut again = Agent::connect(pod.dir.path());
    again.subscribe();
    assert_eq!(again.event().sequence, seen + 1);
    again.send(Ask::Acknowledge(seen + 1));
    again.state();
    let mut last = Agent::connect(pod.dir.path());
    last.subscribe();
    let kept = cleanup::kept_events(pod.dir.path());
    assert!(kept.is_empty(), "{kept:?}");
    pod.agent = last;
    pod.kill("long", 0, libc::SIGKILL, 0);
    assert_eq!(pod.agent.ended("long").exit_code, 137);
    pod.stop();
}

#[test]
fn events_are_on_disk_before_they_are_heard() {
    let mut pod = Pod::new();
    pod.run("a", "exit 3");
    pod.shim.kill().expect("kill");
    pod.shim.wait().expect("wait");
    let kept = cleanup::kept_events(pod.dir.path());
    let ends: Vec<i32> = kept
        .iter()
        .filter_map(|event| match &event.happened {
            Some(Happened::Ended(ended)) => Some(ended.exit_code),
            _ => None,
        })
        .collect();
    assert_eq!(ends, [3]);
}

#[test]
fn nothing_goes_on_without_its_supervisor() {
    for share_pid in [false, true] {
        let mut pod = Pod::with(SandboxSpec { share_pid, ..SandboxSpec::default() });
        let started = pod.start(pod.spec("a", "sleep 1000 & (setsid sleep 1001 &); sleep 1002"));
        let exec = pod.exec("a", &["sleep", "1003"], false).expect("runs");
        let state = pod.agent.state();
        pod.shim.kill().expect("kill");
        pod.shim.wait().expect("wait");
        assert_eq!(cleanup::look(pod.dir.path()).expect("look"), Presence::Dead);
        cleanup::clean_up(pod.dir.path(), &pod.root, &pod.uid).expect("clean up");
        for pid in [state.pause_pid, started.pid, exec.pid] {
            until("a process of the dead supervisor's pod", || alive(pid), |alive| !alive);
        }
        assert_eq!(cleanup::look(pod.dir.path()).expect("look"), Presence::Never);
        pod.check_nothing_left();
        cleanup::clean_up(pod.dir.path(), &pod.root, &pod.uid).expect("clean up what is clean");
    }
}

#[test]
fn a_supervisor_that_hangs_is_cleaned_up_too() {
    let mut pod = Pod::new();
    let started = pod.start(pod.spec("a", "sleep 1000"));
    let shim = minipod_podshim::process::Pidfd::open(pod.shim.id()).expect("pidfd");
    shim.signal(libc::SIGSTOP).expect("stop");
    assert_eq!(cleanup::look(pod.dir.path()).expect("look"), Presence::Live);
    cleanup::clean_up(pod.dir.path(), &pod.root, &pod.uid).expect("clean up");
    assert!(!alive(started.pid));
    pod.shim.wait().expect("wait");
    pod.check_nothing_left();
}

#[test]
fn the_sandbox_ends_with_its_infra_container_and_is_made_anew() {
    let mut pod = Pod::new();
    let started = pod.start(pod.spec("a", "sleep 1000"));
    let netns = |pid: u32| std::path::PathBuf::from(format!("/proc/{pid}/ns/net"));
    // Held open, so that its number is not used again.
    let _held = std::fs::File::open(netns(started.pid)).expect("netns");
    let before = std::fs::read_link(netns(started.pid)).expect("netns");
    let pause = minipod_podshim::process::Pidfd::open(pod.agent.state().pause_pid).expect("pidfd");
    pause.signal(libc::SIGKILL).expect("kill pause");
    assert_eq!(pod.agent.ended("a").exit_code, 137);
    // Before it, the container's start is told.
    let ended = loop {
        if let Some(Happened::SandboxEnded(ended)) = pod.agent.event().happened {
            break ended;
        }
    };
    assert_eq!(ended.sandbox, 1);
    assert!(ended.message.contains("signal 9"), "{}", ended.message);
    let state = pod.agent.state();
    assert_eq!((state.phase(), state.pause_pid), (SandboxPhase::Ended, 0));
    let refused = pod.try_start(pod.spec_of("a", 1, &["true"])).expect_err("no sandbox");
    assert_eq!(refused.detail, "there is no sandbox");

    pod.create_sandbox(SandboxSpec { attempt: 2, hostname: "again".into(), ..SandboxSpec::default() });
    let started = pod.start(pod.spec_of("a", 1, &["sh", "-c", "hostname; sleep 1000"]));
    assert_eq!(started.sandbox, 2);
    until("its name", || pod.output("a", 1), |output| output == "again\n");
    let after = std::fs::read_link(netns(started.pid)).expect("netns");
    assert_ne!(before, after);
    pod.stop();
}

#[test]
fn requests_that_do_not_fit_are_refused_and_harmless() {
    let mut pod = Pod::spawn();
    let refused = pod.try_start(pod.spec("early", "true")).expect_err("no sandbox yet");
    assert_eq!(refused.fault(), Fault::Request);
    let spec = SandboxSpec { attempt: 1, hostname: "x".into(), ..SandboxSpec::default() };
    let first = pod.create_sandbox(spec.clone());
    assert_eq!(pod.create_sandbox(spec.clone()), first, "asked again, it is the same one");
    let other = pod.agent.ask(Ask::CreateSandbox(SandboxSpec { attempt: 2, ..spec }));
    assert!(matches!(other, Say::Refused(refused) if refused.detail == "another one is up"));

    // Noise on the socket ends that connection and nothing else.
    use std::io::{Read as _, Write as _};
    let socket = pod.dir.path().join(minipod_podshim::protocol::files::SOCKET);
    for noise in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], b"mp\x01\x00\xff\xff\xff\xff", b"mp\x01\x00\x04\x00\x00\x00\xff\xff\xff\xff"]
    {
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).expect("connect");
        stream.write_all(noise).expect("write");
        let mut rest = Vec::new();
        assert_eq!(stream.read_to_end(&mut rest).unwrap_or(0), 0);
    }
    assert_eq!(pod.run("a", "echo fine").1, "fine\n");
    pod.stop();
}

#[test]
fn stop_takes_everything() {
    let mut pod = Pod::with(SandboxSpec { share_pid: true, ..SandboxSpec::default() });
    let mut pids = vec![pod.agent.state().pause_pid];
    for name in ["a", "b"] {
        pids.push(pod.start(pod.spec(name, "trap '' TERM; (setsid sleep 1000 &); sleep 1001 & wait")).pid);
    }
    pids.push(pod.exec("a", &["sleep", "1002"], false).expect("runs").pid);
    pod.stop();
    assert!(pids.iter().all(|pid| !alive(*pid)));
    assert_eq!(cleanup::look(pod.dir.path()).expect("look"), Presence::Never);

    let mut bare = Pod::spawn();
    bare.stop();
}

#[test]
fn starts_during_the_sandboxs_birth_and_many_at_once() {
    let mut pod = Pod::spawn();
    let spec = SandboxSpec {
        attempt: 1,
        hostname: "busy".into(),
        shared_memory: "mode=1777".into(),
        ..SandboxSpec::default()
    };
    pod.agent.send(Ask::CreateSandbox(spec));
    let names: BTreeSet<String> = (0..12).map(|number| format!("c{number}")).collect();
    for name in &names {
        let spec = pod.spec(name, "hostname; exit 1");
        pod.agent.send(Ask::Start(Box::new(spec)));
    }
    let mut ended = BTreeSet::new();
    while ended.len() < names.len() {
        match pod.agent.next().expect("the supervisor is there").say {
            Some(Say::Event(event)) => {
                if let Some(Happened::Ended(end)) = event.happened {
                    assert_eq!(end.exit_code, 1);
                    ended.insert(end.name);
                }
            }
            Some(Say::Refused(refused)) => panic!("{refused:?}"),
            _ => {}
        }
    }
    assert_eq!(ended, names);
    assert!(names.iter().all(|name| pod.output(name, 0) == "busy\n"));
    let group = Cgroups::detect().expect("cgroups").pod(&pod.root, &pod.uid).child("c1.0");
    assert!(group.directories().is_empty(), "groups of ended containers are gone");
    assert_eq!(pod.agent.ask(Ask::Stop(Empty {})), Say::Done(Empty {}));
    pod.shim.wait().expect("wait");
    pod.check_nothing_left();
}
