//! A connection that writes once for all that is ready, instead of once for every answer.
//!
//! HTTP/2's connection task is woken by the first of a batch's answers and runs before the second one: it would hand the kernel one frame
//! at a time, and on loopback a write costs as much as all the rest of a small call. Here a flush first lets everything else run that is
//! ready, once, and then writes what has come together.

use std::io;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// A buffer that has so much is written without waiting for more: a few dozen small answers, or four frames of a large one.
const FULL_BYTES: usize = 64 << 10;
/// Room beyond this goes when the buffer is empty: most connections are idle.
const KEEP_BYTES: usize = 16 << 10;

/// A connection that gathers what is written until it is flushed.
#[derive(Debug)]
pub struct Coalesced<T> {
    inner: T,
    buffer: Vec<u8>,
    /// How much of the buffer is written already.
    written: usize,
    /// Whether the others have had their turn since the first write into an empty buffer.
    has_yielded: bool,
}

impl<T> Coalesced<T> {
    /// Wraps a connection.
    pub const fn new(inner: T) -> Self {
        Self { inner, buffer: Vec::new(), written: 0, has_yielded: false }
    }
}

impl<T: AsyncWrite + Unpin> Coalesced<T> {
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest) = self.buffer.get(self.written..).filter(|rest| !rest.is_empty()) {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.written += written,
            }
        }
        self.buffer.clear();
        self.buffer.shrink_to(KEEP_BYTES);
        (self.written, self.has_yielded) = (0, false);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Coalesced<T> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Coalesced<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let len = slices.iter().map(|slice| slice.len()).sum::<usize>();
        if self.buffer.len() + len > FULL_BYTES {
            ready!(self.poll_drain(cx))?;
            // What fills the buffer by itself need not go through it.
            if len > FULL_BYTES / 2 {
                return Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
            }
        }
        slices.iter().for_each(|slice| self.buffer.extend_from_slice(slice));
        Poll::Ready(Ok(len))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.buffer.is_empty() {
            if !self.has_yielded {
                self.has_yielded = true;
                // A task that wakes itself goes to the end of the runtime's queue, behind the answers that are ready.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            ready!(self.poll_drain(cx))?;
        }
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

impl<T: Connected> Connected for Coalesced<T> {
    type ConnectInfo = T::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.inner.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    /// Counts the writes that reach it, and takes at most `most` bytes of each.
    struct Counting<T> {
        inner: T,
        writes: usize,
        most: usize,
    }

    impl<T: AsyncWrite + Unpin> AsyncWrite for Counting<T> {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.writes += 1;
            let some = &bytes[..bytes.len().min(self.most)];
            Pin::new(&mut self.inner).poll_write(cx, some)
        }
        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_flush(cx)
        }
        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_shutdown(cx)
        }
    }

    #[tokio::test]
    async fn what_is_ready_together_is_written_together() {
        let (ours, mut theirs) = duplex(1 << 20);
        let mut connection = Coalesced::new(Counting { inner: ours, writes: 0, most: usize::MAX });
        let mut flushes = 0;
        // As HTTP/2's connection task: a frame, a flush that is not finished, another frame, and so on.
        poll_fn(|cx| {
            flushes += 1;
            if flushes <= 3 {
                assert!(Pin::new(&mut connection).poll_write(cx, b"frame").is_ready());
            }
            Pin::new(&mut connection).poll_flush(cx)
        })
        .await
        .expect("flush");
        assert_eq!((connection.inner.writes, flushes), (1, 2));
        let mut got = [0; 10];
        theirs.read_exact(&mut got).await.expect("read");
        assert_eq!(&got, b"frameframe");
    }

    #[tokio::test]
    async fn all_bytes_arrive_in_order_however_they_are_taken() {
        for most in [1, 1_000, usize::MAX] {
            let (ours, mut theirs) = duplex(4_096);
            let sent: Vec<u8> = (0..300_000_u32).map(|at| (at % 251) as u8).collect();
            let expected = sent.clone();
            let writer = tokio::spawn(async move {
                let mut connection = Coalesced::new(Counting { inner: ours, writes: 0, most });
                let mut rest = &sent[..];
                for len in [1, 100, 40_000, 9, 70_000, 33_000, 5_000].into_iter().cycle() {
                    if rest.is_empty() {
                        break;
                    }
                    let (some, after) = rest.split_at(len.min(rest.len()));
                    connection.write_all(some).await.expect("write");
                    if len < 100 {
                        connection.flush().await.expect("flush");
                    }
                    rest = after;
                }
                connection.shutdown().await.expect("shutdown");
            });
            let mut got = Vec::new();
            theirs.read_to_end(&mut got).await.expect("read");
            writer.await.expect("writer");
            assert_eq!(got, expected, "at most {most} bytes a write");
        }
    }
}
