//! A socket that the runtime watches.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use kvbm_shm::{Error, SideListener, SideSocket};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::HolderError;
use super::error::{is_closed, is_crowded};
use super::message::Malformed;

/// Pause while too many descriptors are under way.
pub(super) const CROWDED: Duration = Duration::from_millis(1);

/// Bytes and descriptors of a packet; `None` at end of file.
pub(super) type Received = Result<Option<(Vec<u8>, Vec<OwnedFd>)>, HolderError>;

/// Lends the runtime the descriptor that it owns.
#[derive(Debug)]
struct Owner<T>(T);

impl<T: AsFd> AsRawFd for Owner<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Watched<T: AsFd>(AsyncFd<Owner<T>>);

impl<T: AsFd> Watched<T> {
    #[allow(
        deprecated,
        reason = "it trusts that the descriptor stays open and the same; the types here own theirs and never change it"
    )]
    pub fn new(inner: T, interest: Interest) -> Result<Self, HolderError> {
        let watched = AsyncFd::with_interest(Owner(inner), interest);
        watched.map(Self).map_err(HolderError::kernel("watch a socket"))
    }

    pub fn get(&self) -> &T {
        &self.0.get_ref().0
    }

    /// Calls `attempt` whenever there may be something to read, until it does not say would-block.
    async fn reading<R>(&self, attempt: impl Fn(&T) -> Result<R, Error>) -> Result<R, HolderError> {
        loop {
            let mut ready = self.0.readable().await.map_err(HolderError::kernel("wait for a socket"))?;
            match attempt(self.get()) {
                Err(error) if error.is_would_block() => ready.clear_ready(),
                outcome => return outcome.map_err(received),
            }
        }
    }
}

impl Watched<SideListener> {
    pub async fn accept(&self) -> Result<SideSocket, HolderError> {
        self.reading(SideListener::accept).await
    }
}

impl Watched<SideSocket> {
    /// The next packet. Nothing is lost if this is dropped while it waits.
    pub async fn receive(&self) -> Received {
        self.reading(SideSocket::receive_fds).await
    }

    /// Sends one packet as soon as there is room.
    pub async fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), HolderError> {
        loop {
            let mut ready = self.0.writable().await.map_err(HolderError::kernel("wait for a socket"))?;
            match self.get().send_fds(bytes, fds) {
                Err(error) if error.is_would_block() => ready.clear_ready(),
                Err(error) if is_crowded(&error) => tokio::time::sleep(CROWDED).await,
                Err(error) if is_closed(&error) => return Err(HolderError::Lost),
                outcome => return Ok(outcome?),
            }
        }
    }
}

/// What an error of receiving means.
pub(super) fn received(error: Error) -> HolderError {
    match error {
        Error::Refused { .. } => Malformed::Cut.into(),
        error if is_closed(&error) => HolderError::Lost,
        error @ Error::System { .. } => error.into(),
    }
}
