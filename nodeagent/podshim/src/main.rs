//! The supervisor of one pod.
//!
//! The agent starts it with the pod's socket as stdin and the locked lock file as stdout (see the agent's `shim/spawn.rs`), or without
//! a pod and hands it one later (`spare`). It goes on without the agent and ends when it is told to stop. One thread runs the loop in `supervisor`; a second one, in
//! `logs`, writes the containers' output. Children take the way in `child` from clone3 to exec.

#![deny(unsafe_op_in_unsafe_fn)]

mod child;
mod client;
mod journal;
mod logs;
mod spare;
mod stock;
mod supervisor;
mod sys;
mod tap;
mod terminal;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use self::stock::{Namespaces, Stock};

/// The command line, as the agent gives it.
#[derive(Debug, Default)]
pub struct Args {
    /// The pod's run directory.
    pub dir: PathBuf,
    /// The pod.
    pub uid: String,
    /// Name of the cgroup that holds all pods.
    pub cgroup_root: String,
    /// The infra container's binary.
    pub pause: PathBuf,
}

/// What the agent handed over.
#[derive(Debug)]
pub struct Inherited {
    /// Bound and listening.
    pub listener: UnixListener,
    /// Locked as long as it is open.
    pub lock: File,
}

fn main() -> ExitCode {
    let run = || -> Result<(), String> {
        let words: Vec<String> = std::env::args().skip(1).collect();
        settle().map_err(|error| format!("set up the process: {error}"))?;
        let (args, inherited, stock) = if spare::is_asked_for(&words) {
            let stock = Stock::lay_in()?;
            let Some((args, inherited)) = spare::wait(stock.namespaces.as_ref().and_then(Namespaces::network))? else {
                return Ok(());
            };
            (args, inherited, stock)
        } else {
            (parse(words.into_iter())?, take_inherited()?, Stock::default())
        };
        let mut supervisor = supervisor::Supervisor::begin(args, inherited, stock)?;
        supervisor.run()
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("minipod-podshim: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Args, String> {
    const USAGE: &str = "it is started by minipod-nodeagent, with --dir DIR --uid UID --cgroup-root NAME --pause FILE";
    let mut args = Args::default();
    while let Some(flag) = words.next() {
        let value = words.next().ok_or_else(|| format!("{flag} has no value: {USAGE}"))?;
        match flag.as_str() {
            "--dir" => args.dir = value.into(),
            "--uid" => args.uid = value,
            "--cgroup-root" => args.cgroup_root = value,
            "--pause" => args.pause = value.into(),
            _ => return Err(format!("unknown argument {flag:?}: {USAGE}")),
        }
    }
    let plain = |name: &str| !name.is_empty() && !name.contains('/') && name != "." && name != "..";
    if !plain(&args.uid) || !plain(&args.cgroup_root) || !args.dir.is_absolute() || !args.pause.is_absolute() {
        return Err(USAGE.to_owned());
    }
    Ok(args)
}

impl Inherited {
    fn of(listener: UnixListener, lock: File) -> Result<Self, String> {
        listener.local_addr().map_err(|error| format!("what should be the pod's socket is none: {error}"))?;
        listener.set_nonblocking(true).map_err(|error| format!("set up the socket: {error}"))?;
        Ok(Self { listener, lock })
    }
}

/// Takes socket and lock from stdin and stdout, and leaves the null device there.
fn take_inherited() -> Result<Inherited, String> {
    let socket: OwnedFd = take_descriptor(std::io::stdin().as_fd(), "take the socket")?.into();
    let lock = take_descriptor(std::io::stdout().as_fd(), "take the lock")?;
    release_standard_streams()?;
    Inherited::of(UnixListener::from(socket), lock)
}

/// A second handle on a standard stream, that no program started later inherits.
fn take_descriptor(stream: BorrowedFd<'_>, what: &str) -> Result<File, String> {
    fcntl(stream, FcntlArg::F_DUPFD_CLOEXEC(10)).map(sys::file_of).map_err(|errno| format!("{what}: {errno}"))
}

/// Puts the null device in the place of stdin and stdout.
fn release_standard_streams() -> Result<(), String> {
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.map_err(|error| format!("open /dev/null: {error}"))?;
    nix::unistd::dup2_stdin(&null).map_err(|errno| format!("release stdin: {errno}"))?;
    nix::unistd::dup2_stdout(&null).map_err(|errno| format!("release stdout: {errno}"))
}

/// A session of its own, at no directory of the agent's, parent of all orphans, hidden from its containers.
fn settle() -> std::io::Result<()> {
    nix::unistd::setsid()?;
    nix::unistd::chdir("/")?;
    // All signals are blocked before there is anything to signal: a broken pipe is an error and no signal.
    nix::sys::signal::SigSet::all().thread_block()?;
    sys::ignore_no_signal();
    sys::one_arena();
    sys::become_subreaper()?;
    sys::forbid_tracing()?;
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    Ok(())
}

/// A pipe of which the reading end does not block.
pub fn pipe() -> std::io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    fcntl(read.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((read, write))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_checked() {
        let parse = |line: &str| parse(line.split(' ').map(str::to_owned));
        let args = parse("--dir /run/p --uid u-1 --cgroup-root minipod --pause /bin/pause").expect("fine");
        assert_eq!((args.uid.as_str(), args.dir), ("u-1", PathBuf::from("/run/p")));
        for bad in [
            "--dir /run/p",
            "--dir run --uid u --cgroup-root m --pause /p",
            "--dir /run --uid .. --cgroup-root m --pause /p",
            "--dir /run --uid u --cgroup-root a/b --pause /p",
            "--dir /run --uid u --cgroup-root m --pause",
            "--what /run",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
