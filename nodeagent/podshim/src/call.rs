//! How the agent calls a spare supervisor to a pod: one message over a socket of whole messages, with the pod's command line as its
//! bytes and three descriptors, the pod's socket, its lock and its complaints file.

/// The first word of a spare's command line.
pub const SPARE: &str = "--spare";
/// What a spare says once it waits, with the network namespace that the pod's first sandbox gets, if it has one ready. One that never says it
/// is of a version that knows no spares.
pub const READY: u8 = b'r';
/// Options of the tmpfs that is every pod's /dev/shm, as in the field; its pages count against the container that touches them first. A spare
/// has one ready.
pub const SHARED_MEMORY: &str = "mode=1777,size=65536k";
/// Most bytes of a call.
pub const MAX_BYTES: usize = 4096;

/// A command line as bytes; `None` if it is too long.
#[must_use]
pub fn bytes_of(words: &[String]) -> Option<Vec<u8>> {
    let bytes = words.join("\0").into_bytes();
    (bytes.len() <= MAX_BYTES).then_some(bytes)
}

/// The command line of a call. What is no text becomes a sign of that, which no path or name has.
#[must_use]
pub fn words_of(bytes: &[u8]) -> Vec<String> {
    bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_back() {
        let words = ["--dir".to_owned(), "/run/p with blank".to_owned(), "--uid".to_owned(), String::new()];
        assert_eq!(words_of(&bytes_of(&words).expect("short")), words);
        assert_eq!(bytes_of(&["x".repeat(MAX_BYTES + 1)]), None);
        assert_eq!(words_of(b"a\0\xff"), ["a", "\u{fffd}"]);
    }
}
