//! A supervisor that was started before there is a pod for it: what a process costs to come to life is paid while nobody waits.
//!
//! It has nothing of any pod. The agent keeps the other end of its stdin, and sends the command line and the descriptors of one pod
//! there; from then on it is that pod's supervisor like any other. When the agent goes before that, so does the spare.

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;

use minipod_podshim::call::{MAX_BYTES, READY, SPARE, words_of};
use minipod_podshim::handover;
use nix::sys::socket::MsgFlags;

use crate::{Args, Inherited, parse, release_standard_streams, take_descriptor};

/// Whether the command line asks for a spare. Blank words may follow: they hold the place of a pod's command line.
pub fn is_asked_for(words: &[String]) -> bool {
    words.first().is_some_and(|word| word == SPARE) && words.iter().skip(1).all(|word| word.trim().is_empty())
}

/// Waits for a pod; none: the agent is gone. `network` is the namespace that the pod's first sandbox gets, unless it has the node's or users of
/// its own: the agent can set up the pod's network while the sandbox is made.
///
/// # Errors
/// When stdin is no socket, or what came through it is not a pod.
pub fn wait(network: Option<BorrowedFd<'_>>) -> Result<Option<(Args, Inherited)>, String> {
    let socket = take_descriptor(std::io::stdin().as_fd(), "take the agent's socket")?;
    release_standard_streams()?;
    let network: Vec<BorrowedFd<'_>> = network.into_iter().collect();
    handover::send(&socket, &[READY], &network).map_err(|errno| format!("tell the agent: {errno}"))?;
    let Some((words, descriptors)) = receive(&socket.into()).map_err(|error| format!("wait for a pod: {error}"))?
    else {
        return Ok(None);
    };
    let [listener, lock, complaints] =
        <[OwnedFd; 3]>::try_from(descriptors).map_err(|got| format!("a pod came with {} descriptors", got.len()))?;
    nix::unistd::dup2_stderr(&complaints).map_err(|errno| format!("take stderr: {errno}"))?;
    let args = parse(words.iter().cloned())?;
    if let Err(error) = be_called(&words) {
        // Only people look for it there.
        eprintln!("show the pod in the list of processes: {error}");
    }
    Ok(Some((args, Inherited::of(UnixListener::from(listener), File::from(lock))?)))
}

type Call = (Vec<String>, Vec<OwnedFd>);

fn receive(socket: &OwnedFd) -> nix::Result<Option<Call>> {
    let mut bytes = [0; MAX_BYTES];
    let (count, descriptors) = handover::receive(socket, &mut bytes, MsgFlags::empty())?;
    Ok((count > 0).then(|| (words_of(bytes.get(..count).unwrap_or(&[])), descriptors)))
}

/// Writes a pod's command line over the one that this process was started with, so that `ps` tells whose supervisor it is. What has
/// no room is left out.
fn be_called(words: &[String]) -> std::io::Result<()> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let wrong =
        || std::io::Error::new(std::io::ErrorKind::InvalidData, "/proc/self/stat has no place of the arguments");
    let (start, end) = place_of_arguments(&stat).ok_or_else(wrong)?;
    let name = std::env::args().next().unwrap_or_default();
    let room = usize::try_from(end.saturating_sub(start)).unwrap_or(0);
    let mut memory = File::options().write(true).open("/proc/self/mem")?;
    memory.seek(SeekFrom::Start(start))?;
    memory.write_all(&command_line(&name, words, room))
}

/// `arg_start` and `arg_end` of proc_pid_stat(5).
fn place_of_arguments(stat: &str) -> Option<(u64, u64)> {
    // The program's name, in parentheses, may have blanks.
    let (_, fields) = stat.rsplit_once(") ")?;
    // The first of these is field 3.
    let mut fields = fields.split(' ').skip(48 - 3).map(|field| field.trim().parse::<u64>());
    fields.next()?.ok().zip(fields.next()?.ok())
}

/// Words as the kernel lays them out, in exactly `room` bytes of which the last is a zero.
fn command_line(name: &str, words: &[String], room: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(room);
    for word in std::iter::once(name).chain(words.iter().map(String::as_str)) {
        bytes.extend_from_slice(word.as_bytes());
        bytes.push(0);
    }
    bytes.resize(room, 0);
    if let Some(last) = bytes.last_mut() {
        *last = 0;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spare_is_asked_for_by_the_first_word() {
        let asks = |words: &[&str]| is_asked_for(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        assert!(asks(&["--spare"]) && asks(&["--spare", "     "]));
        assert!(!asks(&[]) && !asks(&["--dir", "--spare"]) && !asks(&["--spare", "--dir"]));
    }

    #[test]
    fn arguments_are_found_whatever_the_program_is_called() {
        let fields = (3..=52).map(|number| number.to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(place_of_arguments(&format!("7 (a) b) {fields}\n")), Some((48, 49)));
        assert_eq!(place_of_arguments("7 (a) S 1 2"), None);
        let own = std::fs::read_to_string("/proc/self/stat").expect("own stat");
        let (start, end) = place_of_arguments(&own).expect("of this process");
        let line = std::fs::read("/proc/self/cmdline").expect("own command line");
        assert_eq!(usize::try_from(end - start).ok(), Some(line.len()));
    }

    #[test]
    fn a_command_line_fills_its_room() {
        let words = ["--uid".to_owned(), "u1".to_owned()];
        assert_eq!(command_line("shim", &words, 20), b"shim\0--uid\0u1\0\0\0\0\0\0\0");
        assert_eq!(command_line("shim", &words, 9), b"shim\0--u\0");
        assert_eq!(command_line("shim", &words, 0), b"");
    }
}
