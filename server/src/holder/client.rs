//! The daemon's end: blocking, with a deadline on everything, because a daemon must start without its holder.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use kvbm_shm::SideSocket;
use parking_lot::Mutex;
use rustix::process::geteuid;
use tokio::io::Interest;

use super::error::{is_closed, is_crowded};
use super::limit::{self, DESCRIPTORS_RESERVED};
use super::message::{Label, Malformed, Refusal, Reply, Request, VERSION};
use super::watched::{CROWDED, Received, Watched, received};
use super::{HeldSegment, HolderError};

/// How long a daemon's start may take longer because of its holder.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Pause before the next try, when the holder is not there yet or waits for a daemon to be dead.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);
/// How long one packet may wait for room in the socket.
const SEND_LIMIT: Duration = Duration::from_secs(1);

/// A connection to the holder. To be kept open as long as the daemon lives: the holder ends some time after it.
///
/// Lock order: one lock, held while a packet is sent, so that `kept` and what the holder keeps change in the same order.
#[derive(Debug)]
pub struct Client {
    socket: SideSocket,
    path: PathBuf,
    capacity: u32,
    kept: Mutex<BTreeSet<u32>>,
}

impl Client {
    /// Connects to the holder at `path` and takes over everything it keeps, in the order of the indexes. Tries for two
    /// seconds, also while nobody listens there and while the holder waits for the last daemon to be dead. Raises this
    /// process's limit of descriptors as far as it may.
    pub fn connect(path: &Path) -> Result<(Self, Vec<HeldSegment>), HolderError> {
        Self::connect_within(path, CONNECT_LIMIT)
    }

    /// As [`Client::connect`], with another limit. There is one try at least.
    pub fn connect_within(path: &Path, limit: Duration) -> Result<(Self, Vec<HeldSegment>), HolderError> {
        let descriptors = limit::raise()?;
        let deadline = Deadline::new("answer of the holder", limit);
        let mut last = None;
        loop {
            match attempt(path, descriptors, &deadline) {
                Err(
                    error @ (HolderError::Unavailable { .. } | HolderError::Busy { .. } | HolderError::Lost),
                ) => {
                    if deadline.left().is_err() {
                        return Err(error);
                    }
                    last = Some(error);
                    std::thread::sleep(CONNECT_PAUSE);
                }
                // That the time was up in the middle of another try says less than what the last one was told.
                Err(late @ HolderError::Late { .. }) => return Err(last.unwrap_or(late)),
                outcome => return outcome,
            }
        }
    }

    /// Has the holder keep a segment, instead of what it keeps under this index, if anything. Once this returns, the
    /// segment is kept even if this process is killed.
    pub fn keep(
        &self,
        index: u32,
        fingerprint: [u8; 32],
        memory: BorrowedFd<'_>,
        table: BorrowedFd<'_>,
    ) -> Result<(), HolderError> {
        let mut kept = self.kept.lock();
        if kept.len() >= self.capacity as usize && !kept.contains(&index) {
            return Err(HolderError::Full { capacity: self.capacity });
        }
        self.send(Request::Keep(Label { index, fingerprint }), &[memory, table])?;
        kept.insert(index);
        Ok(())
    }

    /// Has the holder let go of one segment. It need not keep it.
    pub fn drop_segment(&self, index: u32) -> Result<(), HolderError> {
        let mut kept = self.kept.lock();
        self.send(Request::Drop { index }, &[])?;
        kept.remove(&index);
        Ok(())
    }

    /// Has the holder let go of everything.
    pub fn drop_all(&self) -> Result<(), HolderError> {
        let mut kept = self.kept.lock();
        self.send(Request::DropAll, &[])?;
        kept.clear();
        Ok(())
    }

    /// How many segments the holder keeps at most.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Returns once the holder is gone or has hung up, after one line that says so. To be run beside everything else;
    /// may be dropped while it waits.
    pub async fn watch(&self) {
        let error = match self.next_packet().await {
            // It has nothing to say after `Done`.
            Ok(Some(_)) => Malformed::Order("a packet that nobody asked for").into(),
            Ok(None) => HolderError::Lost,
            Err(error) => error,
        };
        self.socket.hang_up();
        let path = self.path.display();
        tracing::warn!(holder = %path, %error, "host memory will not outlive this daemon any more");
    }

    async fn next_packet(&self) -> Received {
        let socket = self.socket.try_clone()?;
        Watched::new(socket, Interest::READABLE)?.receive().await
    }

    /// Sends, or hangs up: a holder that is half informed is worse than one that ends.
    fn send(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<(), HolderError> {
        let outcome =
            send(&self.socket, request, fds, &Deadline::new("room in the holder's socket", SEND_LIMIT));
        if outcome.is_err() {
            self.socket.hang_up();
        }
        outcome
    }
}

impl AsFd for Client {
    /// Readable once the holder is gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A moment, and what should have happened by then.
struct Deadline {
    what: &'static str,
    limit: Duration,
    moment: Instant,
}

impl Deadline {
    fn new(what: &'static str, limit: Duration) -> Self {
        Self { what, limit, moment: Instant::now() + limit }
    }

    /// Time until then.
    fn left(&self) -> Result<Duration, HolderError> {
        let left = self.moment.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(HolderError::Late { what: self.what, limit: self.limit }) } else { Ok(left) }
    }
}

/// One try to become the daemon of this holder.
fn attempt(
    path: &Path,
    descriptors: u64,
    deadline: &Deadline,
) -> Result<(Client, Vec<HeldSegment>), HolderError> {
    let socket = SideSocket::connect(path)
        .map_err(|source| HolderError::Unavailable { path: path.to_owned(), source })?;
    let peer = socket.peer()?;
    if peer.uid != geteuid().as_raw() {
        return Err(HolderError::Stranger { uid: peer.uid });
    }
    send(&socket, Request::Hello { version: VERSION }, &[], deadline)?;
    let (count, capacity) = match receive(&socket, deadline)? {
        (Reply::Welcome { version: VERSION, count, capacity }, _) => (count, capacity),
        (Reply::Welcome { version: theirs, .. }, _) => return Err(HolderError::Version { theirs }),
        (Reply::Refused { refusal: Refusal::Version, version: theirs }, _) => {
            return Err(HolderError::Version { theirs });
        }
        (Reply::Refused { refusal: Refusal::User, .. }, _) => return Err(HolderError::NotOurs),
        (Reply::Busy { pid }, _) => return Err(HolderError::Busy { pid }),
        (Reply::Held(_) | Reply::Done, _) => return Err(Malformed::Order("something before Welcome").into()),
    };
    let needed = DESCRIPTORS_RESERVED + 2 * u64::from(count);
    if needed > descriptors {
        return Err(HolderError::Descriptors { limit: descriptors, needed });
    }
    let held = receive_all(&socket, count, deadline)?;
    let kept = Mutex::new(held.iter().map(|segment| segment.index).collect());
    Ok((Client { socket, path: path.to_owned(), capacity, kept }, held))
}

fn receive_all(
    socket: &SideSocket,
    count: u32,
    deadline: &Deadline,
) -> Result<Vec<HeldSegment>, HolderError> {
    let mut held: Vec<HeldSegment> = Vec::new();
    for _ in 0..count {
        let (Reply::Held(label), fds) = receive(socket, deadline)? else {
            return Err(Malformed::Segments.into());
        };
        if held.last().is_some_and(|last| last.index >= label.index) {
            return Err(Malformed::Segments.into());
        }
        held.push(label.with(fds)?);
    }
    match receive(socket, deadline)? {
        (Reply::Done, _) => Ok(held),
        _ => Err(Malformed::Segments.into()),
    }
}

fn send(
    socket: &SideSocket,
    request: Request,
    fds: &[BorrowedFd<'_>],
    deadline: &Deadline,
) -> Result<(), HolderError> {
    let bytes = request.encode();
    loop {
        match socket.send_fds(&bytes, fds) {
            Err(error) if error.is_would_block() => {
                socket.wait_writable(deadline.left()?)?;
            }
            Err(error) if is_crowded(&error) => std::thread::sleep(deadline.left()?.min(CROWDED)),
            Err(error) if is_closed(&error) => return Err(HolderError::Lost),
            outcome => return Ok(outcome?),
        }
    }
}

fn receive(socket: &SideSocket, deadline: &Deadline) -> Result<(Reply, Vec<OwnedFd>), HolderError> {
    loop {
        match socket.receive_fds() {
            Err(error) if error.is_would_block() => {
                socket.wait_readable(deadline.left()?)?;
            }
            Ok(Some((bytes, fds))) => return Ok((Reply::decode(&bytes, &fds)?, fds)),
            Ok(None) => return Err(HolderError::Lost),
            Err(error) => return Err(received(error)),
        }
    }
}
