//! A pod on the real kernel: the built supervisor, driven over its socket as the agent does it.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use minipod_podshim::call::{READY, SHARED_MEMORY, SPARE, bytes_of};
use minipod_podshim::cgroup::Cgroups;
use minipod_podshim::protocol::*;
use minipod_podshim::{cleanup, handover};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socketpair};

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(60);
const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;

/// A pod's supervisor and directories; all of it goes with this value, also when the test panics.
pub struct Pod {
    /// The run directory: in memory, as the agent's is.
    pub dir: tempfile::TempDir,
    /// Root file systems and logs: on a disk, as the agent's are.
    pub data: tempfile::TempDir,
    pub uid: String,
    pub root: String,
    pub shim: Child,
    pub agent: Agent,
    /// The network namespace that its supervisor has told of before it was the pod's.
    pub network: Option<File>,
}

/// A connection to a supervisor.
pub struct Agent {
    stream: UnixStream,
    bytes: Vec<u8>,
    events: VecDeque<Event>,
    next_id: u64,
}

impl Agent {
    pub fn connect(dir: &Path) -> Self {
        let stream = UnixStream::connect(dir.join(files::SOCKET)).expect("connect to the supervisor");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        Self { stream, bytes: Vec::new(), events: VecDeque::new(), next_id: 1 }
    }

    /// Another handle on the same connection.
    pub fn try_clone(&self) -> Self {
        let stream = self.stream.try_clone().expect("clone");
        Self { stream, bytes: Vec::new(), events: VecDeque::new(), next_id: 1 << 32 }
    }

    pub fn send_input(&mut self, input: Input) {
        self.send(Ask::ExecInput(ExecInput { input: Some(input) }));
    }

    pub fn send(&mut self, ask: Ask) -> u64 {
        self.next_id += 1;
        let mut bytes = Vec::new();
        put_frame(&Request { id: self.next_id, ask: Some(ask) }, &mut bytes).expect("short");
        self.stream.write_all(&bytes).expect("send");
        self.next_id
    }

    /// The next response; `None` when the connection ended.
    pub fn next(&mut self) -> Option<Response> {
        loop {
            if let Some(response) = take_frame(&mut self.bytes).expect("a frame") {
                return Some(response);
            }
            let mut chunk = [0; 65536];
            let count = self.stream.read(&mut chunk).expect("an answer in time");
            if count == 0 {
                return None;
            }
            self.bytes.extend_from_slice(&chunk[..count]);
        }
    }

    pub fn ask(&mut self, ask: Ask) -> Say {
        let id = self.send(ask);
        loop {
            let response = self.next().expect("the supervisor is there");
            match response.say.expect("something") {
                Say::Event(event) => self.events.push_back(event),
                say => {
                    assert_eq!(response.id, id);
                    return say;
                }
            }
        }
    }

    pub fn state(&mut self) -> State {
        match self.ask(Ask::State(Empty {})) {
            Say::State(state) => state,
            other => panic!("no state: {other:?}"),
        }
    }

    pub fn subscribe(&mut self) -> State {
        match self.ask(Ask::Subscribe(Empty {})) {
            Say::State(state) => state,
            other => panic!("no state: {other:?}"),
        }
    }

    pub fn event(&mut self) -> Event {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        match self.next().expect("the supervisor is there").say {
            Some(Say::Event(event)) => event,
            other => panic!("no event: {other:?}"),
        }
    }

    /// The end of a run; events of others stay for who asks for them.
    pub fn ended(&mut self, name: &str) -> Ended {
        let mut others = VecDeque::new();
        loop {
            match self.event() {
                Event { happened: Some(Happened::Ended(ended)), .. } if ended.name == name => {
                    others.append(&mut self.events);
                    self.events = others;
                    return ended;
                }
                other => others.push_back(other),
            }
        }
    }
}

/// A busybox root file system, made once in cargo's directory for such things.
pub fn rootfs() -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("busybox-rootfs");
    if path.exists() {
        return path;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("tempdir").keep();
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    let busybox = busybox.expect("busybox is missing: apt-get install busybox-static");
    for name in ["bin", "etc", "tmp", "home"] {
        fs::create_dir_all(dir.join(name)).expect("make rootfs");
    }
    fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
    fs::copy(busybox, dir.join("bin/busybox")).expect("copy busybox");
    let list = Command::new(busybox).arg("--list").output().expect("list of applets");
    for applet in String::from_utf8_lossy(&list.stdout).lines().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", dir.join("bin").join(applet)).expect("link");
    }
    fs::write(dir.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").expect("passwd");
    // Whole from the first moment; if another test was faster, its one serves.
    if fs::rename(&dir, &path).is_err() {
        let _ = fs::remove_dir_all(&dir);
    }
    path
}

/// The infra container's binary, beside ours; built if `cargo test` of one crate did not.
pub fn pause() -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_minipod-podshim")).with_file_name("minipod-pause");
    if !path.exists() {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
        let mut build = Command::new(cargo);
        build.args(["build", "--package", "minipod-pause"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        assert!(build.status().expect("run cargo").success(), "build minipod-pause");
    }
    path
}

/// A supervisor that waits for a pod.
pub struct Spare {
    pub process: Child,
    pub socket: OwnedFd,
    /// The network namespace that it has told of.
    pub network: Option<File>,
}

impl Spare {
    pub fn start() -> Self {
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
        let (count, descriptors) = handover::receive(&socket, &mut byte, MsgFlags::empty()).expect("a message");
        assert_eq!((count, byte), (1, [READY]));
        Self { process, socket, network: descriptors.into_iter().next().map(File::from) }
    }

    /// Sends what makes it a supervisor, and lets go of it all, as the agent does.
    pub fn call(&self, dir: &Path, words: &[&str]) {
        let listener = UnixListener::bind(dir.join(files::SOCKET)).expect("bind");
        let lock = File::create(dir.join(files::LOCK)).expect("lock");
        lock.try_lock().expect("nobody else has the lock");
        let complaints = File::create(dir.join("shim.log")).expect("log");
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let bytes = bytes_of(&words).expect("a short command line");
        handover::send(&self.socket, &bytes, &[listener.as_fd(), lock.as_fd(), complaints.as_fd()]).expect("send");
    }
}

/// Whether this test program tries supervisors that have waited for their pod.
const OF_SPARES: bool = matches!(env!("CARGO_CRATE_NAME").as_bytes(), b"containers_of_spares");

impl Pod {
    /// A supervisor without a sandbox.
    pub fn spawn() -> Self {
        if OF_SPARES { Self::of_spare() } else { Self::begin(|dir, uid, root| (spawn_shim(dir, uid, root), None)) }
    }

    /// The same, of a supervisor that has waited for its pod.
    pub fn of_spare() -> Self {
        Self::begin(|dir, uid, root| {
            let spare = Spare::start();
            let (path, pause) = (dir.to_string_lossy(), pause());
            let pause = pause.to_string_lossy();
            spare.call(dir, &["--dir", &*path, "--uid", uid, "--cgroup-root", root, "--pause", &*pause]);
            (spare.process, spare.network)
        })
    }

    fn begin(start: impl FnOnce(&Path, &str, &str) -> (Child, Option<File>)) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests need root");
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let uid = format!("pod-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let root = format!("minipod-test-shim-{}-{uid}", std::process::id());
        let dir = tempfile::Builder::new().prefix("minipod-test-").tempdir_in("/run").expect("a directory in /run");
        let data = tempfile::tempdir().expect("tempdir");
        let (shim, network) = start(dir.path(), &uid, &root);
        let mut agent = Agent::connect(dir.path());
        agent.subscribe();
        Self { dir, data, uid, root, shim, agent, network }
    }

    /// A supervisor with a sandbox.
    pub fn new() -> Self {
        Self::with(SandboxSpec::default())
    }

    pub fn with(spec: SandboxSpec) -> Self {
        let mut pod = Self::spawn();
        let spec = SandboxSpec { attempt: 1, hostname: "the-pod".into(), ..spec };
        pod.create_sandbox(spec);
        pod
    }

    /// As the agent does it, with shared memory.
    pub fn create_sandbox(&mut self, mut spec: SandboxSpec) -> u32 {
        let root = spec.users.map_or(0, |users| users.first);
        spec.shared_memory = match root {
            0 => SHARED_MEMORY.to_owned(),
            root => format!("{SHARED_MEMORY},uid={root},gid={root}"),
        };
        match self.agent.ask(Ask::CreateSandbox(spec)) {
            Say::SandboxStarted(started) => started.pause_pid,
            other => panic!("no sandbox: {other:?}"),
        }
    }

    /// A container that runs a shell script, with everything that the agent gives by default.
    pub fn spec(&self, name: &str, script: &str) -> ContainerSpec {
        self.spec_of(name, 0, &["sh", "-c", script])
    }

    pub fn spec_of(&self, name: &str, attempt: u32, argv: &[&str]) -> ContainerSpec {
        let at = |what: &str| self.data.path().join(format!("{name}.{attempt}.{what}"));
        for what in ["upper", "work", "target"] {
            fs::create_dir_all(at(what)).expect("make directories");
        }
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let mount =
            |kind: MountKind, target: &str| Mount { kind: kind.into(), target: target.into(), ..Mount::default() };
        let capabilities = DEFAULT_CAPABILITIES;
        ContainerSpec {
            name: name.into(),
            attempt,
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            env: vec!["PATH=/bin".into(), "GREETING=hello".into()],
            user: Some(User::default()),
            capabilities: Some(Capabilities {
                bounding: capabilities,
                permitted: capabilities,
                effective: capabilities,
                ..Capabilities::default()
            }),
            root: Some(Rootfs {
                lowers: vec![text(rootfs())],
                upper: text(at("upper")),
                work: text(at("work")),
                target: text(at("target")),
                readonly: false,
                devices: false,
            }),
            mounts: vec![
                mount(MountKind::Proc, "/proc"),
                mount(MountKind::Dev, "/dev"),
                mount(MountKind::SharedMemory, "/dev/shm"),
                mount(MountKind::Mqueue, "/dev/mqueue"),
                Mount { readonly: true, ..mount(MountKind::Sysfs, "/sys") },
            ],
            masked_paths: vec!["/proc/interrupts".into(), "/sys/firmware".into(), "/proc/nonexistent".into()],
            readonly_paths: vec!["/proc/sys".into()],
            log: Some(LogSpec { path: text(at("log")), max_bytes: 0, max_files: 1 }),
            ..ContainerSpec::default()
        }
    }

    pub fn try_start(&mut self, spec: ContainerSpec) -> Result<Started, Refused> {
        match self.agent.ask(Ask::Start(Box::new(spec))) {
            Say::Started(started) => Ok(started),
            Say::Refused(refused) => Err(refused),
            other => panic!("neither started nor refused: {other:?}"),
        }
    }

    pub fn start(&mut self, spec: ContainerSpec) -> Started {
        self.try_start(spec).unwrap_or_else(|refused| panic!("not started: {refused:?}\n{}", self.complaints()))
    }

    /// Runs a script to its end: how it ended and what it wrote.
    pub fn run(&mut self, name: &str, script: &str) -> (Ended, String) {
        let spec = self.spec(name, script);
        self.run_spec(spec)
    }

    pub fn run_spec(&mut self, spec: ContainerSpec) -> (Ended, String) {
        let (name, attempt) = (spec.name.clone(), spec.attempt);
        self.start(spec);
        let ended = self.agent.ended(&name);
        (ended, self.output(&name, attempt))
    }

    /// What a run wrote so far, without times, streams and tags.
    pub fn output(&self, name: &str, attempt: u32) -> String {
        let log = fs::read_to_string(self.data.path().join(format!("{name}.{attempt}.log"))).unwrap_or_default();
        let mut text = String::new();
        for line in log.lines() {
            let mut parts = line.splitn(4, ' ').skip(2);
            let (tag, content) = (parts.next().expect("a tag"), parts.next().unwrap_or(""));
            text.push_str(content);
            if tag == "F" {
                text.push('\n');
            }
        }
        text
    }

    pub fn kill(&mut self, name: &str, attempt: u32, signal: i32, grace_ms: u64) {
        let kill = Kill { name: name.into(), attempt, signal, grace_ms };
        assert_eq!(self.agent.ask(Ask::Kill(kill)), Say::Done(Empty {}));
    }

    pub fn stop(&mut self) {
        assert_eq!(self.agent.ask(Ask::Stop(Empty {})), Say::Done(Empty {}));
        let status = self.shim.wait().expect("wait");
        assert!(status.success(), "{status}: {}", self.complaints());
        self.check_nothing_left();
    }

    pub fn exec(&self, name: &str, argv: &[&str], stdin: bool) -> Result<Process, Refused> {
        self.exec_on(name, argv, stdin, None)
    }

    pub fn exec_on(
        &self,
        name: &str,
        argv: &[&str],
        stdin: bool,
        terminal: Option<Window>,
    ) -> Result<Process, Refused> {
        let mut agent = Agent::connect(self.dir.path());
        let argv = argv.iter().map(|word| (*word).to_owned()).collect();
        agent.send(Ask::Exec(Exec { name: name.into(), attempt: 0, argv, stdin, env: vec![], terminal }));
        match agent.next().and_then(|response| response.say) {
            Some(Say::ExecOutput(ExecOutput { output: Some(Output::Started(pid)) })) => Ok(Process { agent, pid }),
            Some(Say::Refused(refused)) => Err(refused),
            other => panic!("neither started nor refused: {other:?}"),
        }
    }

    /// Takes part in a container's streams.
    pub fn attach(&self, name: &str, stdin: bool, window: Option<Window>) -> Result<Process, Refused> {
        let mut agent = Agent::connect(self.dir.path());
        agent.send(Ask::Attach(Attach { name: name.into(), attempt: 0, stdin, window }));
        match agent.next().and_then(|response| response.say) {
            Some(Say::ExecOutput(ExecOutput { output: Some(Output::Started(pid)) })) => Ok(Process { agent, pid }),
            Some(Say::Refused(refused)) => Err(refused),
            other => panic!("neither started nor refused: {other:?}"),
        }
    }

    /// What the supervisor wrote to stderr.
    pub fn complaints(&self) -> String {
        fs::read_to_string(self.dir.path().join("shim.log")).unwrap_or_default()
    }

    /// No process, mount, cgroup or supervisor's file of the pod.
    pub fn check_nothing_left(&self) {
        for name in [files::SOCKET, files::LOCK, files::STATE, files::EVENTS] {
            assert!(!self.dir.path().join(name).exists(), "{name} is left");
        }
        let cgroups = Cgroups::detect().expect("cgroups").pod(&self.root, &self.uid);
        assert!(cgroups.directories().is_empty(), "cgroups are left: {:?}", cgroups.directories());
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
        for dir in [&self.dir, &self.data] {
            assert!(!mounts.contains(&*dir.path().to_string_lossy()), "mounts are left");
        }
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.shim.kill();
        let _ = self.shim.wait();
        if let Err(error) = cleanup::clean_up(self.dir.path(), &self.root, &self.uid) {
            eprintln!("clean up: {error}");
        }
        if let Ok(cgroups) = Cgroups::detect() {
            let _ = cgroups.pod(&self.root, "").remove_patiently();
        }
        if std::thread::panicking() {
            eprintln!("supervisor's complaints: {}", self.complaints());
        }
    }
}

/// An exec'd process.
pub struct Process {
    pub agent: Agent,
    pub pid: u32,
}

impl Process {
    pub fn input(&mut self, input: Input) {
        self.agent.send(Ask::ExecInput(ExecInput { input: Some(input) }));
    }

    pub fn next(&mut self) -> Output {
        match self.agent.next().and_then(|response| response.say) {
            Some(Say::ExecOutput(ExecOutput { output: Some(output) })) => output,
            other => panic!("no output: {other:?}"),
        }
    }

    /// What came on stdout until `until` was in it.
    pub fn shown(&mut self, until: &str) -> String {
        let mut text = String::new();
        while !text.contains(until) {
            match self.next() {
                Output::Stdout(data) => text.push_str(&String::from_utf8_lossy(&data)),
                other => panic!("{other:?} instead of {until:?} after {text:?}"),
            }
        }
        text
    }

    /// All output to the end: stdout, stderr, exit code.
    pub fn finish(&mut self) -> (Vec<u8>, Vec<u8>, i32) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        loop {
            match self.next() {
                Output::Stdout(data) => out.extend(data),
                Output::Stderr(data) => err.extend(data),
                Output::Exited(code) => return (out, err, code),
                Output::Started(_) => panic!("started twice"),
            }
        }
    }
}

/// Starts a supervisor as the agent does.
pub fn spawn_shim(dir: &Path, uid: &str, root: &str) -> Child {
    let socket = dir.join(files::SOCKET);
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).expect("bind");
    let lock = File::create(dir.join(files::LOCK)).expect("lock");
    lock.try_lock().expect("nobody else has the lock");
    let complaints = File::options().create(true).append(true).open(dir.join("shim.log")).expect("log");
    Command::new(env!("CARGO_BIN_EXE_minipod-podshim"))
        .arg("--dir")
        .arg(dir)
        .args(["--uid", uid, "--cgroup-root", root, "--pause"])
        .arg(pause())
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(listener)))
        .stdout(Stdio::from(lock))
        .stderr(Stdio::from(complaints))
        .spawn()
        .expect("start the supervisor")
}

/// Waits until something is so; panics with what was seen last.
pub fn until<T: std::fmt::Debug>(what: &str, mut look: impl FnMut() -> T, good: impl Fn(&T) -> bool) -> T {
    let began = Instant::now();
    loop {
        let seen = look();
        if good(&seen) {
            return seen;
        }
        assert!(began.elapsed() < PATIENCE, "{what}: last seen {seen:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process of the node is there (and no zombie).
pub fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}
