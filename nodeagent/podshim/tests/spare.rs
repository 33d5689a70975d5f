//! Supervisors that wait for a pod.

mod support;

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use minipod_podshim::call::{READY, SPARE, bytes_of};
use minipod_podshim::cleanup::{self, Presence};
use minipod_podshim::protocol::files;
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair};
use support::{Agent, pause, until};

struct Spare {
    process: Child,
    socket: OwnedFd,
}

impl Spare {
    fn start() -> Self {
        let (socket, its) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .expect("a pair of sockets");
        let process = Command::new(env!("CARGO_BIN_EXE_minipod-podshim"))
            .args([SPARE, &" ".repeat(300)])
            .env_clear()
            .stdin(Stdio::from(its))
            .stdout(Stdio::null())
            .spawn()
            .expect("start a spare");
        let mut byte = [0];
        assert_eq!(recv(socket.as_raw_fd(), &mut byte, MsgFlags::empty()), Ok(1));
        assert_eq!(byte, [READY]);
        Self { process, socket }
    }

    /// Sends what makes it a supervisor, and lets go of it all, as the agent does.
    fn call(&self, dir: &Path, words: &[&str]) {
        let listener = UnixListener::bind(dir.join(files::SOCKET)).expect("bind");
        let lock = File::create(dir.join(files::LOCK)).expect("lock");
        lock.try_lock().expect("nobody else has the lock");
        let complaints = File::create(dir.join("shim.log")).expect("log");
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let bytes = bytes_of(&words).expect("a short command line");
        let descriptors = [listener.as_raw_fd(), lock.as_raw_fd(), complaints.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        sendmsg::<()>(self.socket.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, MsgFlags::empty(), None)
            .expect("send");
    }
}

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
