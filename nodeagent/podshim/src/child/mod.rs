//! What happens in a child between clone3 and exec.
//!
//! The child is a copy of the supervisor with one thread. It works through its steps, tells the supervisor which one failed
//! and with what, and ends by exec or `_exit`. Nothing here returns to the supervisor's loop.

pub mod identity;
pub mod memory;
pub mod report;
pub mod rootfs;
pub mod users;

use std::cell::RefCell;
use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use minipod_podshim::cgroup::Joins;
use minipod_podshim::protocol::{ContainerSpec, IdRange, MountKind, SandboxSpec, Sysctl, Window};
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{chdir, execve, setsid, write};

use self::report::{ChildSays, Context as _, Failure, Reporter, Step, c_text};
use self::users::{Users, on_node};
use crate::sys::Tree;
use crate::{sys, terminal};

/// A child's standard descriptors.
#[derive(Debug)]
pub struct Stdio {
    /// Descriptor 0.
    pub stdin: OwnedFd,
    /// Descriptor 1.
    pub stdout: OwnedFd,
    /// Descriptor 2.
    pub stderr: OwnedFd,
    /// They are a terminal, and the session's.
    pub terminal: bool,
}

/// What every child gets.
#[derive(Debug)]
pub struct Common {
    /// Its cgroups.
    pub joins: Joins,
    /// Its standard descriptors.
    pub stdio: Stdio,
    /// Where it reports; closes at exec.
    pub reporter: Reporter,
}

/// The memory that a sandbox's containers share.
#[derive(Debug)]
pub enum SharedMemory {
    /// They share none.
    None,
    /// It is mounted nowhere yet; the infra container is born in a mount namespace of its own.
    Unmounted(Tree),
    /// The mount namespace that has nothing else.
    Namespace(OwnedFd),
}

/// The infra container.
#[derive(Debug)]
pub struct PauseChild<'a> {
    /// What the sandbox shall be.
    pub spec: &'a SandboxSpec,
    /// The binary, open.
    pub program: &'a OwnedFd,
    /// What its containers share.
    pub shared_memory: SharedMemory,
    /// What it needs where it has a user namespace of its own.
    pub own_users: Option<OwnUsers>,
}

/// For an infra container in a user namespace of its own.
#[derive(Debug)]
pub struct OwnUsers {
    /// A byte comes when the namespace has its ids.
    pub gate: OwnedFd,
    /// procfs for the kernel parameters: the namespace's root may not mount one that belongs to the node.
    pub proc: OwnedFd,
}

/// A container's first process.
#[derive(Debug)]
pub struct ContainerChild<'a> {
    /// What it shall be.
    pub spec: &'a ContainerSpec,
    /// The infra container.
    pub pause: BorrowedFd<'a>,
    /// Which of its namespaces to enter.
    pub namespaces: CloneFlags,
    /// The sandbox's users, if they are not the node's.
    pub users: Option<Users<'a>>,
    /// Its groups by controller.
    pub cgroups: Vec<(String, PathBuf)>,
    /// Where its terminal goes; none: it has pipes.
    pub console: Option<UnixStream>,
    /// A `/dev` that was made before.
    pub dev: Option<Tree>,
}

/// A further process of a container.
#[derive(Debug)]
pub struct ExecChild<'a> {
    /// The container's spec.
    pub spec: &'a ContainerSpec,
    /// The program and its arguments.
    pub argv: &'a [String],
    /// Added to the container's environment.
    pub env: &'a [String],
    /// The container's first process.
    pub init: BorrowedFd<'a>,
    /// Which of its namespaces to enter; the PID namespace was entered by the supervisor, for its child.
    pub namespaces: CloneFlags,
    /// The sandbox's users, if they are not the node's.
    pub range: Option<IdRange>,
}

/// Runs the steps and ends.
pub fn run(mut common: Common, steps: impl FnOnce(&mut Common) -> Step<Infallible>) -> ! {
    // From the first moment; a change of credentials clears it and `identity` sets it again. If the supervisor is gone
    // already, whoever cleans up after it kills what is in the pod's cgroups.
    let _ = sys::die_with_parent();
    // The supervisor has all of them blocked, and ignores none.
    sys::unblock_signals();
    let Err(failure) = steps(&mut common);
    common.reporter.fail(failure);
    sys::exit_now(127)
}

/// The infra container's steps.
pub fn pause(child: &PauseChild<'_>, common: &mut Common) -> Step<Infallible> {
    if let Some(own) = &child.own_users {
        users::wait_for_ids(&own.gate)?;
    }
    if !child.spec.host_network {
        nix::unistd::sethostname(&child.spec.hostname).container("set hostname", &child.spec.hostname)?;
    }
    match &child.own_users {
        Some(own) => set_sysctls_and_become_root(&own.proc, &child.spec.sysctls)?,
        None => set_sysctls(&child.spec.sysctls)?,
    }
    if child.own_users.is_none() {
        // Else the supervisor has set it: lowering it is a right on the node.
        identity::set_oom_score(child.spec.oom_score_adj, &mut common.reporter)?;
    }
    match &child.shared_memory {
        SharedMemory::None => {}
        SharedMemory::Unmounted(memory) => memory::hold(memory)?,
        SharedMemory::Namespace(memory) => {
            setns(memory, CloneFlags::CLONE_NEWNS).node("enter the mount namespace of", "shared memory")?;
        }
    }
    common.reporter.say(&ChildSays { named: true, ..ChildSays::default() });
    // The containers are prepared meanwhile.
    join(&common.joins)?;
    chdir("/").node("enter", "/")?;
    begin_session(&common.stdio)?;
    sys::die_with_parent().node("bind the infra container's life to its supervisor", "")?;
    sys::close_from_on_exec(3).node("close descriptors", "")?;
    let errno = sys::exec_fd(child.program, &[CString::from(c"pause")]);
    Err(Failure::node("run the infra container's program", "", errno))
}

/// Through a procfs of our own: the node's may be read-only, as in a container, or covered.
fn set_sysctls(sysctls: &[Sysctl]) -> Step<()> {
    if sysctls.is_empty() {
        return Ok(());
    }
    let proc = sys::new_mount(c"proc", &[], 0).node("make procfs for", "sysctls")?;
    sysctls.iter().try_for_each(|sysctl| set_sysctl(&proc, sysctl))
}

/// Whom the kernel lets write a parameter depends on its age and on the parameter: the node's root, who this process still is but for
/// its capabilities, or the namespace's (IPC's, from Linux 6.9 on).
fn set_sysctls_and_become_root(proc: &OwnedFd, sysctls: &[Sysctl]) -> Step<()> {
    let mut later = Vec::new();
    for sysctl in sysctls {
        match set_sysctl(proc, sysctl) {
            Err(Failure(refused)) if matches!(refused.errno, libc::EACCES | libc::EPERM) => later.push(sysctl),
            result => result?,
        }
    }
    sys::set_user(0, 0, &[]).node("become root of the pod's user namespace", "")?;
    later.into_iter().try_for_each(|sysctl| set_sysctl(proc, sysctl))
}

fn set_sysctl(proc: &OwnedFd, sysctl: &Sysctl) -> Step<()> {
    let path = Path::new("sys").join(sysctl.name.replace('.', "/"));
    let how = OpenHow::new().flags(OFlag::O_WRONLY | OFlag::O_CLOEXEC).resolve(ResolveFlag::RESOLVE_BENEATH);
    let file = openat2(proc, &path, how).container("open sysctl", &sysctl.name)?;
    write(&file, sysctl.value.as_bytes()).container("set sysctl", &sysctl.name)?;
    Ok(())
}

/// A container's steps.
pub fn container(mut child: ContainerChild<'_>, common: &mut Common) -> Step<Infallible> {
    let spec = child.spec;
    join(&common.joins)?;
    identity::confine(&spec.apparmor_profile)?;
    let range = child.users.as_ref().map(|users| &users.range);
    let owner = on_node(range, spec.user.as_ref().map_or(0, |user| user.uid))?;
    users::give_streams(&common.stdio, owner)?;
    if child.users.is_none() {
        unshare(CloneFlags::CLONE_NEWCGROUP).node("make a cgroup namespace", "")?;
    }
    if !child.namespaces.is_empty() {
        setns(child.pause, child.namespaces).node("enter the sandbox's namespaces", "")?;
    }
    identity::set_oom_score(spec.oom_score_adj, &mut common.reporter)?;
    umask(Mode::from_bits_truncate(0o022));
    let memory = match spec.mounts.iter().any(|mount| mount.kind() == MountKind::SharedMemory) {
        true => Some(memory::of(child.pause)?),
        false => None,
    };
    let dev = RefCell::new(child.dev.take());
    let around = rootfs::Around { cgroups: &child.cgroups, memory, users: child.users.as_ref(), dev };
    rootfs::enter(spec, &around)?;
    let mut more_env = Vec::new();
    if let (Some(window), Some(console)) = (spec.terminal, &child.console) {
        take_terminal(owner, window, (console, &mut common.stdio))?;
        if !spec.env.iter().any(|pair| pair.starts_with("TERM=")) {
            more_env.push("TERM=xterm".to_owned());
        }
    }
    let cwd = if spec.cwd.is_empty() { "/" } else { spec.cwd.as_str() };
    rootfs::make_cwd(cwd)?;
    if let Some(users) = &child.users {
        users.enter()?;
    }
    become_program(spec, (cwd, &spec.argv, &more_env), common)
}

/// Makes a terminal in the container's own devpts, and sends the supervisor its master.
fn take_terminal(owner: u32, window: Window, (console, stdio): (&UnixStream, &mut Stdio)) -> Step<()> {
    let (master, stdin) = terminal::open_below("/", owner, window)?;
    terminal::send(console, &master).node("hand over", "the terminal")?;
    let copy = || stdin.try_clone().node("copy", "the terminal");
    let (stdout, stderr) = (copy()?, copy()?);
    *stdio = Stdio { stdin, stdout, stderr, terminal: true };
    Ok(())
}

/// The steps of an exec'd process.
pub fn exec(child: &ExecChild<'_>, common: &mut Common) -> Step<Infallible> {
    join(&common.joins)?;
    identity::confine(&child.spec.apparmor_profile)?;
    let owner = on_node(child.range.as_ref(), child.spec.user.as_ref().map_or(0, |user| user.uid))?;
    users::give_streams(&common.stdio, owner)?;
    identity::set_oom_score(child.spec.oom_score_adj, &mut common.reporter)?;
    setns(child.init, child.namespaces).node("enter the container's namespaces", "")?;
    umask(Mode::from_bits_truncate(0o022));
    let cwd = if child.spec.cwd.is_empty() { "/" } else { child.spec.cwd.as_str() };
    become_program(child.spec, (cwd, child.argv, child.env), common)
}

fn become_program(
    spec: &ContainerSpec,
    (cwd, argv, more_env): (&str, &[String], &[String]),
    common: &mut Common,
) -> Step<Infallible> {
    chdir(cwd).container("enter the working directory", cwd)?;
    rootfs::check_cwd()?;
    identity::set_rlimits(&spec.rlimits, &mut common.reporter)?;
    begin_session(&common.stdio)?;
    let env = spec.env.iter().chain(more_env).map(|pair| c_text("env", pair)).collect::<Step<Vec<_>>>()?;
    let texts = argv.iter().map(|text| c_text("argv", text)).collect::<Step<Vec<_>>>()?;
    identity::assume(spec, &mut common.reporter)?;
    sys::close_from_on_exec(3).node("close descriptors", "")?;
    run_program(&texts, &env)
}

/// Looks the program up as a shell would, and runs it.
fn run_program(argv: &[CString], env: &[CString]) -> Step<Infallible> {
    let empty = || Failure::container("run the program", "", Errno::ENOENT).because("there is no command");
    let program = argv.first().filter(|program| !program.is_empty()).ok_or_else(empty)?;
    let name = String::from_utf8_lossy(program.to_bytes()).into_owned();
    if program.to_bytes().contains(&b'/') {
        let Err(errno) = execve(program, argv, env);
        return Err(failure_of(&name, errno));
    }
    let path = env.iter().rev().find_map(|pair| pair.to_bytes().strip_prefix(b"PATH=")).unwrap_or(b"/usr/bin:/bin");
    let mut worst = Errno::ENOENT;
    for dir in path.split(|byte| *byte == b':') {
        let dir = if dir.is_empty() { std::ffi::OsStr::new(".") } else { std::ffi::OsStr::from_bytes(dir) };
        let mut bytes = PathBuf::from(dir).join(&name).into_os_string().into_encoded_bytes();
        bytes.push(0);
        let Ok(candidate) = CStr::from_bytes_with_nul(&bytes) else { continue };
        let Err(errno) = execve(candidate, argv, env);
        match errno {
            Errno::ENOENT | Errno::ENOTDIR => {}
            // Another directory may have one that is permitted.
            Errno::EACCES => worst = errno,
            errno => return Err(failure_of(&name, errno)),
        }
    }
    let failure = failure_of(&name, worst);
    Err(if worst == Errno::ENOENT { failure.because("it is not in the PATH either") } else { failure })
}

fn failure_of(name: &str, errno: Errno) -> Failure {
    match errno {
        Errno::ENOMEM | Errno::EAGAIN | Errno::ENFILE => Failure::node("run the program", name, errno),
        errno => Failure::container("run the program", name, errno),
    }
}

/// Puts this process into its groups, where clone3 did not.
fn join(joins: &Joins) -> Step<()> {
    for tasks in &joins.tasks {
        write(tasks, b"0").node("join cgroup", format!("/proc/self/fd/{}", tasks.as_raw_fd()))?;
    }
    Ok(())
}

fn begin_session(stdio: &Stdio) -> Step<()> {
    setsid().node("begin a session", "")?;
    // dup2 clears close-on-exec, unless both are the same: so none of them may be 0, 1 or 2 already.
    let high = |fd: &OwnedFd| -> Step<File> {
        let fd =
            nix::fcntl::fcntl(fd.as_fd(), nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(10)).node("copy a descriptor", "")?;
        Ok(sys::file_of(fd))
    };
    let (stdin, stdout, stderr) = (high(&stdio.stdin)?, high(&stdio.stdout)?, high(&stdio.stderr)?);
    nix::unistd::dup2_stdin(&stdin).node("set up", "stdin")?;
    nix::unistd::dup2_stdout(&stdout).node("set up", "stdout")?;
    nix::unistd::dup2_stderr(&stderr).node("set up", "stderr")?;
    if stdio.terminal { sys::control_by_stdin().node("take", "the terminal") } else { Ok(()) }
}
