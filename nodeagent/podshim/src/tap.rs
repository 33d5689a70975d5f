//! Copies of a container's output for those who are attached to it. Allocates nothing: the log thread uses it.

use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::os::fd::AsFd as _;

use nix::poll::{PollFd, PollFlags, poll};

use crate::supervisor::now_ms;
use crate::sys;

/// The writing end of an attached user's pipe, which does not block.
#[derive(Debug)]
pub struct Tap {
    pipe: File,
    /// Its reader was too slow. It gets nothing until it has read all that it was given.
    lags: bool,
}

impl Tap {
    /// From now on.
    pub fn new(pipe: File) -> Self {
        Self { pipe, lags: false }
    }
}

/// Gives the bytes to all of them; waits for those who are slow, `patience_ms` for all together. Those who are gone are let go.
pub fn pass_on(taps: &mut [Option<Tap>], bytes: &[u8], patience_ms: u64) {
    let mut deadline_ms = None;
    for place in taps {
        let Some(tap) = place else { continue };
        tap.lags = tap.lags && sys::unread_bytes(tap.pipe.as_fd()).is_ok_and(|unread| unread > 0);
        if !tap.lags && !give(tap, bytes, patience_ms, &mut deadline_ms) {
            *place = None;
        }
    }
}

/// False when nobody reads any more.
fn give(tap: &mut Tap, mut bytes: &[u8], patience_ms: u64, deadline_ms: &mut Option<u64>) -> bool {
    while !bytes.is_empty() {
        match tap.pipe.write(bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or(&[]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let now_ms = now_ms();
                let left_ms = deadline_ms.get_or_insert(now_ms + patience_ms).saturating_sub(now_ms);
                let mut fds = [PollFd::new(tap.pipe.as_fd(), PollFlags::POLLOUT)];
                let ready = left_ms > 0 && poll(&mut fds, u16::try_from(left_ms).unwrap_or(u16::MAX)) != Ok(0);
                if !ready {
                    tap.lags = true;
                    return true;
                }
            }
            Err(_) => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    use super::*;

    fn pipe() -> (File, Option<Tap>) {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).expect("pipe");
        (read.into(), Some(Tap::new(write.into())))
    }

    fn read(file: &mut File) -> usize {
        let mut all = vec![0; 1 << 20];
        let mut count = 0;
        while let Ok(got @ 1..) = file.read(&mut all) {
            count += got;
        }
        count
    }

    #[test]
    fn who_does_not_read_loses_and_who_reads_again_gets_again() {
        let ((mut slow, a), (mut quick, b), (gone, c)) = (pipe(), pipe(), pipe());
        let mut taps = [a, b, c, None];
        drop(gone);
        let piece = [b'x'; 32 << 10];
        let mut got = 0;
        for _ in 0..10 {
            pass_on(&mut taps, &piece, 1);
            got += read(&mut quick);
        }
        assert_eq!(got, 10 * piece.len(), "one that reads gets all");
        assert!(taps[2].is_none(), "nobody reads there");
        assert!(taps[0].as_ref().expect("still there").lags);
        assert_eq!(read(&mut slow), 64 << 10, "what its pipe holds");
        pass_on(&mut taps, b"again", 1);
        assert_eq!(read(&mut slow), 5);
    }
}
