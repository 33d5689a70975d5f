//! Messages as bytes.

use prost::Message;

use super::{HEAD_BYTES, MAX_MESSAGE_BYTES, VERSION};

const MAGIC: [u8; 2] = *b"mp";

/// The bytes on a connection are not a frame that this build understands. Nothing after them can be trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol.
    #[error("frame begins with {0:02x?} instead of \"mp\"")]
    Magic([u8; 2]),
    /// The other side is newer than this one.
    #[error("frame has version {0}, this build reads up to {VERSION}")]
    Version(u16),
    /// Longer than [`MAX_MESSAGE_BYTES`].
    #[error("frame of {0} bytes, at most {MAX_MESSAGE_BYTES} are allowed")]
    TooLong(usize),
    /// Not the expected message.
    #[error("frame cannot be read: {0}")]
    Message(#[from] prost::DecodeError),
}

/// Appends a message as a frame.
///
/// # Errors
/// [`FrameError::TooLong`]; then nothing was appended.
pub fn put_frame(message: &impl Message, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let length = message.encoded_len();
    if length > MAX_MESSAGE_BYTES {
        return Err(FrameError::TooLong(length));
    }
    out.reserve(HEAD_BYTES + length);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&VERSION.to_le_bytes());
    // At most MAX_MESSAGE_BYTES, which fits.
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    out.extend_from_slice(&message.encode_to_vec());
    Ok(())
}

/// Reads a frame's head: the length of the message after it.
///
/// # Errors
/// See [`FrameError`].
pub fn read_head(head: [u8; HEAD_BYTES]) -> Result<usize, FrameError> {
    let [m0, m1, v0, v1, l0, l1, l2, l3] = head;
    if [m0, m1] != MAGIC {
        return Err(FrameError::Magic([m0, m1]));
    }
    let version = u16::from_le_bytes([v0, v1]);
    if version > VERSION {
        return Err(FrameError::Version(version));
    }
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > MAX_MESSAGE_BYTES { Err(FrameError::TooLong(length)) } else { Ok(length) }
}

/// Takes the first message out of `bytes` if it is there in full.
///
/// # Errors
/// See [`FrameError`].
pub fn take_frame<M: Message + Default>(bytes: &mut Vec<u8>) -> Result<Option<M>, FrameError> {
    let Some(head) = bytes.first_chunk::<HEAD_BYTES>() else { return Ok(None) };
    let end = HEAD_BYTES + read_head(*head)?;
    let Some(body) = bytes.get(HEAD_BYTES..end) else { return Ok(None) };
    let message = M::decode(body)?;
    bytes.drain(..end);
    Ok(Some(message))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{Ask, ContainerSpec, Kill, Request};

    fn kill() -> Request {
        let kill = Kill { name: "web".into(), attempt: 3, signal: 15, grace_ms: 30_000 };
        Request { id: 7, ask: Some(Ask::Kill(kill)) }
    }

    #[test]
    fn frames_arrive_in_any_pieces() {
        let mut stream = Vec::new();
        for _ in 0..3 {
            put_frame(&kill(), &mut stream).expect("short");
        }
        for piece in 1..stream.len() {
            let (mut bytes, mut seen) = (Vec::new(), 0);
            for chunk in stream.chunks(piece) {
                bytes.extend_from_slice(chunk);
                while let Some(request) = take_frame::<Request>(&mut bytes).expect("good") {
                    assert_eq!(request, kill());
                    seen += 1;
                }
            }
            assert_eq!((seen, bytes.len()), (3, 0), "pieces of {piece}");
        }
    }

    #[test]
    fn what_is_no_frame_is_named() {
        let mut good = Vec::new();
        put_frame(&kill(), &mut good).expect("short");
        let broken = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            take_frame::<Request>(&mut bytes).expect_err("broken").to_string()
        };
        assert_eq!(broken(0, b'x'), "frame begins with [78, 70] instead of \"mp\"");
        assert_eq!(broken(3, 1), format!("frame has version 257, this build reads up to {VERSION}"));
        assert!(broken(7, 0xff).contains("at most"));
        assert!(broken(HEAD_BYTES, 0xff).contains("cannot be read"));
        assert_eq!(take_frame::<Request>(&mut good[..HEAD_BYTES + 1].to_vec()), Ok(None));
    }

    #[test]
    fn too_long_a_message_is_not_sent() {
        let spec = ContainerSpec { env: vec!["x".repeat(MAX_MESSAGE_BYTES)], ..ContainerSpec::default() };
        let mut out = Vec::new();
        let request = Request { id: 1, ask: Some(Ask::Start(Box::new(spec))) };
        assert!(matches!(put_frame(&request, &mut out), Err(FrameError::TooLong(_))));
        assert!(out.is_empty());
    }

    #[test]
    fn a_newer_side_may_add_fields() {
        #[derive(Clone, PartialEq, Message)]
        struct NewerKill {
            #[prost(string, tag = "1")]
            name: String,
            #[prost(string, tag = "99")]
            more: String,
        }
        let bytes = NewerKill { name: "web".into(), more: "unknown to us".into() }.encode_to_vec();
        assert_eq!(Kill::decode(bytes.as_slice()).expect("reads").name, "web");
    }
}
