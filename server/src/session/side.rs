//! The side channel: who is really at the other end, descriptors in and out, and the life line.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use kvbm_proto::SideMessage;
use kvbm_shm::{Error, Packet, ProcessWatch, SideListener, SideSocket};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use crate::core::Core;

/// Lets the runtime watch what only lends its descriptor.
#[derive(Debug)]
struct Raw<T>(T);

impl<T: AsFd> AsRawFd for Raw<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Registers a descriptor with the runtime.
#[allow(
    deprecated,
    reason = "it trusts that the descriptor stays open and the same; the types here own theirs and never change it"
)]
fn watch<T: AsFd>(owner: T, interest: Interest) -> io::Result<AsyncFd<Raw<T>>> {
    AsyncFd::with_interest(Raw(owner), interest)
}

/// One bound connection and the process behind it.
#[derive(Debug)]
pub(crate) struct Side {
    socket: AsyncFd<Raw<SideSocket>>,
    process: AsyncFd<Raw<ProcessWatch>>,
    at_end: bool,
}

impl Side {
    fn new(socket: SideSocket, process: ProcessWatch) -> io::Result<Self> {
        Ok(Self {
            socket: watch(socket, Interest::READABLE | Interest::WRITABLE)?,
            process: watch(process, Interest::READABLE)?,
            at_end: false,
        })
    }

    /// The process, by the kernel's word.
    pub fn pid(&self) -> u32 {
        self.process.get_ref().0.pid()
    }

    /// Another watch on it.
    pub fn watch(&self) -> Option<ProcessWatch> {
        self.process.get_ref().0.try_clone().ok()
    }

    /// The next packet; `None` once the peer has closed its end. May be dropped while it waits.
    pub async fn receive(&mut self) -> Option<Packet> {
        while !self.at_end {
            match receive(&self.socket).await {
                Ok(Some(packet)) => return Some(packet),
                Ok(None) => self.at_end = true,
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::warn!(pid = self.pid(), %error, "a side channel packet is ignored");
                }
                Err(_) => self.at_end = true,
            }
        }
        None
    }

    /// Sends one packet, waiting for room no longer than `limit`.
    pub async fn send(
        &self,
        message: SideMessage,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> io::Result<()> {
        let bytes = message.encode();
        let send = async {
            loop {
                let mut ready = self.socket.writable().await?;
                if let Ok(sent) = ready.try_io(|socket| socket.get_ref().0.send(&bytes, fd).map_err(into_io))
                {
                    return sent;
                }
            }
        };
        timeout(limit, send).await.unwrap_or_else(|late| Err(io::Error::new(io::ErrorKind::TimedOut, late)))
    }

    /// Tells the peer that this end is done, while its own end of file can still be seen.
    pub fn say_goodbye(&self) {
        // Fails only if the peer is gone already.
        let _ = rustix::net::shutdown(&self.socket.get_ref().0, rustix::net::Shutdown::Write);
    }

    /// True if the peer has closed its end, as far as read so far, and its process is dead.
    pub fn is_dead(&self) -> bool {
        self.at_end && self.process.get_ref().0.is_dead()
    }

    /// Returns when the peer has closed its end.
    pub async fn closed(&mut self) {
        while self.receive().await.is_some() {}
    }

    /// Returns when the peer has closed its end and its process is dead: only both together mean that nobody touches
    /// the memory any more.
    pub async fn dead(&mut self) {
        self.closed().await;
        while !self.process.get_ref().0.is_dead() {
            match self.process.readable().await {
                // Whatever woke us: the loop asks the kernel.
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => {
                    tracing::error!(pid = self.pid(), %error, "cannot watch a process: what it holds stays quarantined");
                    return std::future::pending().await;
                }
            }
        }
    }
}

async fn receive(socket: &AsyncFd<Raw<SideSocket>>) -> io::Result<Option<Packet>> {
    loop {
        let mut ready = socket.readable().await?;
        if let Ok(received) = ready.try_io(|socket| socket.get_ref().0.receive().map_err(into_io)) {
            return received;
        }
    }
}

fn into_io(error: Error) -> io::Error {
    match error {
        Error::System { source, .. } => source,
        Error::Refused { reason } => io::Error::new(io::ErrorKind::InvalidData, reason),
    }
}

/// Memory that came ahead of the message that names its pool.
#[derive(Debug)]
pub(crate) enum Ahead {
    /// The pool's.
    Pool([u8; 16], OwnedFd),
    /// The GPU's that has its blocks.
    Device([u8; 16], OwnedFd),
}

/// What a packet brought.
pub(crate) fn ahead(packet: Packet) -> Option<Ahead> {
    match (SideMessage::decode(&packet.bytes), packet.fd) {
        (Ok(SideMessage::PoolMemory { uuid }), Some(fd)) => Some(Ahead::Pool(uuid, fd)),
        (Ok(SideMessage::DeviceMemory { uuid }), Some(fd)) => Some(Ahead::Device(uuid, fd)),
        _ => None,
    }
}

/// Takes connections until the daemon stops.
pub(crate) async fn accept(core: Arc<Core>, listener: SideListener) {
    let listener = match watch(listener, Interest::READABLE) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the side channel is not served: no engine can attach");
            return;
        }
    };
    let unbound =
        Arc::new(Semaphore::new(usize::try_from(core.config.sessions_max).unwrap_or(usize::MAX >> 4)));
    loop {
        let accepted = tokio::select! {
            () = core.stopping.cancelled() => return,
            accepted = accept_one(&listener) => accepted,
        };
        match accepted {
            Ok(socket) => {
                // Dropped when too many have not yet said who they are: the client sees end of file and tries again.
                let Ok(place) = Arc::clone(&unbound).try_acquire_owned() else { continue };
                let greeting = greet(Arc::clone(&core), socket);
                core.tasks.spawn(async move {
                    let _place = place;
                    if let Err(reason) = greeting.await {
                        tracing::warn!(reason, "a side channel connection is refused");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a side channel connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn accept_one(listener: &AsyncFd<Raw<SideListener>>) -> io::Result<SideSocket> {
    loop {
        let mut ready = listener.readable().await?;
        if let Ok(accepted) = ready.try_io(|listener| listener.get_ref().0.accept().map_err(into_io)) {
            return accepted;
        }
    }
}

/// Finds the session that a connection belongs to and hands it over.
async fn greet(core: Arc<Core>, socket: SideSocket) -> Result<(), String> {
    let say = |error: &dyn std::fmt::Display| error.to_string();
    let peer = socket.peer().map_err(|error| say(&error))?;
    if !core.may_attach(peer.uid) {
        return Err(format!("user {} may not attach", peer.uid));
    }
    let process = socket.watch_peer().map_err(|error| say(&error))?;
    let side = Side::new(socket, process).map_err(|error| say(&error))?;
    let limit = Duration::from_millis(core.config.bind_timeout_ms);
    let first = tokio::select! {
        () = core.stopping.cancelled() => return Ok(()),
        first = timeout(limit, receive(&side.socket)) => first,
    };
    let first = first.map_err(|_| "it says nothing".to_owned())?.map_err(|error| say(&error))?;
    let Some(first) = first else { return Err("it was closed without a word".to_owned()) };
    match SideMessage::decode(&first.bytes) {
        Ok(SideMessage::Bind { token }) => core.sessions.bind(&token, peer.uid, side),
        Ok(SideMessage::Lookups { token }) => {
            super::lookups::start(&core, &token, peer.uid, side.socket.into_inner().0)
        }
        Ok(other) => Err(format!("its first packet is {other:?}")),
        Err(malformed) => Err(malformed.to_string()),
    }
}
