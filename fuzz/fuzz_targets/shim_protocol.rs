//! What agent and podshim read of each other, in whatever pieces it comes: frames, and the messages in them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minipod_podshim::protocol::{self, Request, Response};

/// Reads a stream to its end or its first fault, in pieces; what was read comes out of its own frame again.
fn read<M: prost::Message + Default + PartialEq>(stream: &[u8], piece: usize) {
    let mut bytes = Vec::new();
    for part in stream.chunks(piece) {
        bytes.extend_from_slice(part);
        loop {
            match protocol::take_frame::<M>(&mut bytes) {
                Ok(Some(message)) => {
                    let mut frame = Vec::new();
                    protocol::put_frame(&message, &mut frame).expect("what came in a frame fits in one");
                    let again = protocol::take_frame::<M>(&mut frame).expect("our own frame").expect("the whole of it");
                    assert!(again == message && frame.is_empty());
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

fuzz_target!(|input: (bool, u8, bool, Vec<u8>)| {
    let (is_request, piece, framed, body) = input;
    // Half of them are bodies in good frames: magic numbers are no use to find faults behind them.
    let stream = if framed {
        let length = u32::try_from(body.len()).expect("a small input");
        [b"mp".as_slice(), &1_u16.to_le_bytes(), &length.to_le_bytes(), &body].concat()
    } else {
        body
    };
    let piece = usize::from(piece).max(1);
    if is_request { read::<Request>(&stream, piece) } else { read::<Response>(&stream, piece) }
});
