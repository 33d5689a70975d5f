//! Descriptors that go from one process to another with a message over a unix socket (unix(7), `SCM_RIGHTS`).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// Most descriptors of one message.
const MAX: usize = 4;

/// Sends a message with descriptors, of which the receiver gets copies.
///
/// # Errors
/// `EPIPE` when nobody is at the other end; no signal is raised.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> nix::Result<()> {
    let numbers: Vec<RawFd> = descriptors.iter().map(|descriptor| descriptor.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let rights = if numbers.is_empty() { &[] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(socket.as_fd().as_raw_fd(), &[IoSlice::new(bytes)], rights, flags, None).map(|_| ())
}

/// Receives a message: how many bytes it has in `buffer`, 0 at the end, and what came with it, closed on exec.
///
/// # Errors
/// `EAGAIN` with [`MsgFlags::MSG_DONTWAIT`] when there is none yet.
pub fn receive(socket: impl AsFd, buffer: &mut [u8], flags: MsgFlags) -> nix::Result<(usize, Vec<OwnedFd>)> {
    let mut parts = [IoSliceMut::new(buffer)];
    let mut room = nix::cmsg_space!([RawFd; MAX]);
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = loop {
        match recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut parts, Some(&mut room), flags) {
            Err(Errno::EINTR) => {}
            message => break message?,
        }
    };
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel made them for this message, which is read once; nobody else knows them.
            descriptors.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    Ok((message.bytes, descriptors))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn descriptors_come_over() {
        let (here, there) = UnixStream::pair().expect("pair");
        let mut buffer = [0; 8];
        assert_eq!(receive(&there, &mut buffer, MsgFlags::MSG_DONTWAIT).err(), Some(Errno::EAGAIN));
        let (pipe, writer) = nix::unistd::pipe().expect("pipe");
        send(&here, b"two", &[pipe.as_fd(), writer.as_fd()]).expect("send");
        let (count, descriptors) = receive(&there, &mut buffer, MsgFlags::empty()).expect("receive");
        assert_eq!((&buffer[..count], descriptors.len()), (&b"two"[..], 2));
        nix::unistd::write(&writer, b"x").expect("write");
        drop(writer);
        let [copy, its_writer] = <[OwnedFd; 2]>::try_from(descriptors).expect("two");
        drop(its_writer);
        let mut text = String::new();
        File::from(copy).read_to_string(&mut text).expect("read");
        assert_eq!(text, "x");

        send(&here, b"none", &[]).expect("send");
        assert_eq!(receive(&there, &mut buffer, MsgFlags::empty()).expect("receive").1.len(), 0);
        drop(here);
        assert_eq!(receive(&there, &mut buffer, MsgFlags::empty()).expect("the end").0, 0);
        assert_eq!(send(&there, b"x", &[]), Err(Errno::EPIPE));
    }
}
