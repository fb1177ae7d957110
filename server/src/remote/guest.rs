//! A connection over TCP, with its place, and with the time that it has to be let in.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep, sleep_until};
use tonic::transport::server::Connected;

use super::door::Reason;
use crate::core::Core;

/// Bytes to and from a peer, encrypted or not.
pub(super) trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

/// Whether a request on this connection has shown what is demanded.
#[derive(Debug, Clone, Default)]
pub(super) struct Admission(Arc<AtomicBool>);

impl Admission {
    /// It has.
    pub fn grant(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// See the module.
pub(super) struct Guest {
    bytes: Box<dyn Bytes>,
    admission: Admission,
    /// Until it is let in.
    waiting: Option<Waiting>,
    _place: OwnedSemaphorePermit,
}

struct Waiting {
    end: Pin<Box<Sleep>>,
    core: Arc<Core>,
}

impl Guest {
    pub fn new(
        bytes: Box<dyn Bytes>,
        core: Arc<Core>,
        deadline: Instant,
        place: OwnedSemaphorePermit,
    ) -> Self {
        let waiting = Some(Waiting { end: Box::pin(sleep_until(deadline)), core });
        Self { bytes, admission: Admission::default(), waiting, _place: place }
    }

    /// An error once the time is over. Wakes the connection's task then, which reads all the time.
    fn check(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Some(waiting) = &mut self.waiting else { return Ok(()) };
        if self.admission.0.load(Ordering::Relaxed) {
            self.waiting = None;
            return Ok(());
        }
        if waiting.end.as_mut().poll(cx).is_pending() {
            return Ok(());
        }
        waiting.core.door.reject(Reason::Silent);
        self.waiting = None;
        Err(io::Error::new(io::ErrorKind::TimedOut, "no permitted request in time"))
    }
}

impl Connected for Guest {
    type ConnectInfo = Admission;

    fn connect_info(&self) -> Admission {
        self.admission.clone()
    }
}

impl AsyncRead for Guest {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check(cx)?;
        Pin::new(&mut self.bytes).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Guest {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.bytes).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.bytes).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.bytes).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.bytes.is_write_vectored()
    }
}
