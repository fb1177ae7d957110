//! The holder itself: one daemon at a time, what it keeps, and when it ends.
//!
//! All of it happens in one task, one packet after the other, so there is no lock. Whatever a daemon does wrong ends its
//! connection and nothing else.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use kvbm_shm::{ProcessWatch, SideSocket};
use rustix::process::geteuid;
use tokio::io::Interest;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::message::{Label, Malformed, Refusal, Reply, Request, VERSION};
use super::place::Place;
use super::watched::{Received, Watched, received};
use super::{HeldSegment, HolderError, limit};

/// How long a newcomer may take to say who it is.
const GREETING: Duration = Duration::from_millis(500);
/// How long it may take to receive everything.
const HANDOVER: Duration = Duration::from_secs(10);
/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a holder ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was told to.
    Told,
    /// No daemon came for as long as it waits.
    Alone,
}

/// A holder that listens. What it keeps goes with it.
#[derive(Debug)]
pub struct Holder {
    place: Place,
    capacity: u32,
}

impl Holder {
    /// Listens at `path` and raises the process's limit of descriptors as far as it may. The socket of a dead holder is
    /// replaced, a living holder is an error.
    pub fn bind(path: &Path) -> Result<Self, HolderError> {
        let capacity = limit::capacity(limit::raise()?)?;
        Ok(Self { place: Place::claim(path)?, capacity })
    }

    /// How many segments it keeps at most.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    #[cfg(test)]
    pub(super) fn with_capacity(self, capacity: u32) -> Self {
        Self { capacity, ..self }
    }

    /// Serves until `cancel`, or until no daemon has been connected for `grace`, counted from now and from the end of
    /// each connection.
    pub async fn serve(self, grace: Duration, cancel: CancellationToken) -> Result<Ended, HolderError> {
        let Place { listener, claim } = self.place;
        let listener = Watched::new(listener, Interest::READABLE)?;
        let mut shelf = Shelf::new(self.capacity);
        let serving = async {
            loop {
                tokio::select! {
                    // In this order: a daemon that comes at the last moment is served.
                    biased;
                    packet = receive(shelf.connection.as_ref()) => shelf.take(packet),
                    accepted = listener.accept() => match accepted {
                        Ok(socket) => shelf.greet(socket).await,
                        Err(error) => {
                            tracing::warn!(%error, "cannot accept a connection");
                            sleep(ACCEPT_PAUSE).await;
                        }
                    },
                    () = sleep_until(shelf.alone_since + grace), if shelf.connection.is_none() => return,
                }
            }
        };
        let ended = tokio::select! {
            () = cancel.cancelled() => Ended::Told,
            () = serving => Ended::Alone,
        };
        drop(listener);
        // Only now may another holder take the place.
        drop(claim);
        Ok(ended)
    }
}

async fn receive(connection: Option<&Watched<SideSocket>>) -> Received {
    match connection {
        Some(connection) => connection.receive().await,
        None => std::future::pending().await,
    }
}

/// What is kept, and for whom.
#[derive(Debug)]
struct Shelf {
    kept: BTreeMap<u32, HeldSegment>,
    capacity: u32,
    /// The daemon's, while there is one.
    connection: Option<Watched<SideSocket>>,
    /// The process that was given the memory last. While it lives, it may be using it, connected or not.
    owner: Option<ProcessWatch>,
    /// When there was a connection last.
    alone_since: Instant,
}

impl Shelf {
    fn new(capacity: u32) -> Self {
        Self { kept: BTreeMap::new(), capacity, connection: None, owner: None, alone_since: Instant::now() }
    }

    /// Deals with what the daemon sent, or with its having ended.
    fn take(&mut self, packet: Received) {
        let outcome = match packet {
            Ok(Some((bytes, fds))) => Request::decode(&bytes, &fds)
                .map_err(HolderError::from)
                .and_then(|request| self.obey(request, fds)),
            Ok(None) => Err(HolderError::Lost),
            Err(error) => Err(error),
        };
        let Err(error) = outcome else { return };
        let pid = self.owner.as_ref().map_or(0, ProcessWatch::pid);
        let segments = self.kept.len();
        match error {
            HolderError::Lost => tracing::info!(pid, segments, "the daemon has left, its memory is kept"),
            error => {
                tracing::warn!(pid, segments, %error, "the daemon's connection is closed, its memory is kept")
            }
        }
        self.connection = None;
        self.alone_since = Instant::now();
    }

    fn obey(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<(), HolderError> {
        match request {
            Request::Hello { .. } => return Err(Malformed::Order("a second Hello").into()),
            Request::Keep(label) => {
                let is_full = self.kept.len() >= self.capacity as usize;
                if is_full && !self.kept.contains_key(&label.index) {
                    return Err(HolderError::Full { capacity: self.capacity });
                }
                self.kept.insert(label.index, label.with(fds)?);
            }
            // A daemon need not know what is kept to let go of it.
            Request::Drop { index } => drop(self.kept.remove(&index)),
            Request::DropAll => self.kept.clear(),
        }
        Ok(())
    }

    /// Hears who it is and makes it the daemon, or turns it away.
    async fn greet(&mut self, socket: SideSocket) {
        match self.admit(socket).await {
            Ok(pid) => tracing::info!(pid, segments = self.kept.len(), "serves a daemon"),
            Err(error) => tracing::warn!(%error, "a connection is turned away"),
        }
    }

    /// Returns the process that was admitted.
    async fn admit(&mut self, socket: SideSocket) -> Result<u32, HolderError> {
        let peer = socket.peer()?;
        let process = socket.watch_peer()?;
        let socket = Watched::new(socket, Interest::READABLE | Interest::WRITABLE)?;
        // Before anything is refused: a connection that is closed with something unread is reset, and the reply lost.
        let version = timeout(GREETING, hello(&socket)).await;
        let theirs = version.unwrap_or(Err(HolderError::Late { what: "Hello", limit: GREETING }))?;
        if peer.uid != geteuid().as_raw() {
            turn_away(socket.get(), Reply::Refused { version: VERSION, refusal: Refusal::User });
            return Err(HolderError::Stranger { uid: peer.uid });
        }
        if theirs != VERSION {
            turn_away(socket.get(), Reply::Refused { version: VERSION, refusal: Refusal::Version });
            return Err(HolderError::Version { theirs });
        }
        self.notice_end()?;
        if let Some(pid) = self.occupant(peer.pid) {
            turn_away(socket.get(), Reply::Busy { pid });
            return Err(HolderError::Busy { pid });
        }
        // From here on it may have memory, whatever goes wrong.
        self.owner = Some(process);
        self.alone_since = Instant::now();
        let handed_over = timeout(HANDOVER, self.hand_over(&socket)).await;
        handed_over.unwrap_or(Err(HolderError::Late { what: "progress of the daemon", limit: HANDOVER }))?;
        self.connection = Some(socket);
        Ok(peer.pid)
    }

    /// If the connection has ended although nobody noticed yet, takes what is left in it: a daemon's last words count.
    fn notice_end(&mut self) -> Result<(), HolderError> {
        let is_dead = self.owner.as_ref().is_some_and(ProcessWatch::is_dead);
        while let Some(connection) = &self.connection {
            if !is_dead && !connection.get().is_hung_up()? {
                break;
            }
            // Nobody sends any more, so this comes to an end; even without one, if a fork of a dead daemon has the socket.
            let packet = match connection.get().receive_fds() {
                Err(error) if error.is_would_block() => Ok(None),
                packet => packet.map_err(received),
            };
            self.take(packet);
        }
        Ok(())
    }

    /// The process that stands in the way of `pid`.
    fn occupant(&self, pid: u32) -> Option<u32> {
        let owner = self.owner.as_ref().filter(|owner| !owner.is_dead())?;
        // The same living process may come back.
        (self.connection.is_some() || owner.pid() != pid).then_some(owner.pid())
    }

    async fn hand_over(&self, socket: &Watched<SideSocket>) -> Result<(), HolderError> {
        let count = u32::try_from(self.kept.len()).expect("the capacity is one");
        let welcome = Reply::Welcome { version: VERSION, count, capacity: self.capacity };
        socket.send(&welcome.encode(), &[]).await?;
        for segment in self.kept.values() {
            let held = Reply::Held(Label { index: segment.index, fingerprint: segment.fingerprint });
            socket.send(&held.encode(), &[segment.memory.as_fd(), segment.table.as_fd()]).await?;
        }
        socket.send(&Reply::Done.encode(), &[]).await
    }
}

/// The version in the first packet.
async fn hello(socket: &Watched<SideSocket>) -> Result<u32, HolderError> {
    let (bytes, fds) = socket.receive().await?.ok_or(HolderError::Lost)?;
    match Request::decode(&bytes, &fds)? {
        Request::Hello { version } => Ok(version),
        Request::Keep(_) | Request::Drop { .. } | Request::DropAll => {
            Err(Malformed::Order("something before Hello").into())
        }
    }
}

/// Says why. There is always room for a first packet; whoever is gone does not want to know.
fn turn_away(socket: &SideSocket, reply: Reply) {
    if let Err(error) = socket.send(&reply.encode(), None) {
        tracing::debug!(%error, "who is turned away does not listen");
    }
}
