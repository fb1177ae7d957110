//! The client's end of the side channel: binding, the pools' descriptors, and the daemon's life line.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use kvbm_proto::SideMessage;
use kvbm_shm::{Packet, PoolMemory, ProcessWatch, SideSocket};
use parking_lot::Mutex;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use crate::ClientError;

/// Descriptors kept for pools that nobody asked for yet, at most.
const MEMORIES_MAX: usize = 16;

/// Host segments that wait to be mapped, at most.
const SEGMENTS_MAX: usize = 4096;

/// Lets the runtime watch something that only lends its descriptor.
#[derive(Debug)]
struct Watched<T>(T);

impl<T: AsFd> AsRawFd for Watched<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Registers `inner` with the runtime.
fn watched<T: AsFd>(inner: T) -> std::io::Result<AsyncFd<Watched<T>>> {
    // Its successor is unsafe, because a type could lend another descriptor each time. Ours own the one they lend.
    #[allow(deprecated)]
    AsyncFd::new(Watched(inner))
}

/// A bound side channel.
#[derive(Debug)]
pub(crate) struct SideChannel {
    socket: AsyncFd<Watched<SideSocket>>,
    memories: Mutex<HashMap<[u8; 16], OwnedFd>>,
    /// Of GPUs; each came before the memory of the same name.
    device_memories: Mutex<HashMap<[u8; 16], OwnedFd>>,
    segments: Mutex<VecDeque<(u32, OwnedFd)>>,
    arrived: Notify,
}

impl SideChannel {
    /// Connects beside `socket` and binds the connection to the session with `token`.
    pub async fn bind(socket: &Path, token: [u8; 32]) -> Result<Arc<Self>, ClientError> {
        let socket = SideSocket::connect(&side_path(socket)).map_err(ClientError::unavailable)?;
        let socket = watched(socket).map_err(ClientError::unavailable)?;
        let (memories, device_memories, segments) = Default::default();
        let side = Self { socket, memories, device_memories, segments, arrived: Notify::new() };
        side.send(&SideMessage::Bind { token }, None).await?;
        match side.receive().await? {
            (SideMessage::Bound, _) => Ok(Arc::new(side)),
            (other, _) => Err(ClientError::malformed(format!("side channel was bound with {other:?}"))),
        }
    }

    /// Watches the process that listens there. `None` when the kernel will not say.
    pub fn watch_daemon(&self) -> Option<ProcessWatch> {
        self.socket.get_ref().0.watch_peer().ok()
    }

    /// Sends the memory of an engine's own pool.
    pub async fn send_memory(&self, uuid: [u8; 16], fd: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.send(&SideMessage::PoolMemory { uuid }, Some(fd)).await
    }

    /// Sends a pool: the GPU's memory, if it has some, then the pool's.
    pub async fn send_pool(&self, pool: &PoolMemory) -> Result<(), ClientError> {
        let uuid = pool.uuid();
        if let Some((descriptor, _)) = pool.device() {
            self.send(&SideMessage::DeviceMemory { uuid }, Some(descriptor)).await?;
        }
        self.send_memory(uuid, pool.fd()).await
    }

    /// The pool that the daemon sent under this name: its memory, and that of a GPU if some came with it.
    pub async fn take_pool(&self, uuid: [u8; 16]) -> (OwnedFd, Option<OwnedFd>) {
        let memory = self.take_memory(uuid).await;
        (memory, self.device_memories.lock().remove(&uuid))
    }

    /// The memory that the daemon sent under this name.
    pub async fn take_memory(&self, uuid: [u8; 16]) -> OwnedFd {
        loop {
            let mut arrived = pin!(self.arrived.notified());
            arrived.as_mut().enable();
            if let Some(fd) = self.memories.lock().remove(&uuid) {
                return fd;
            }
            arrived.await;
        }
    }

    /// The next host segment that the daemon sent. One task at a time asks.
    pub async fn next_segment(&self) -> (u32, OwnedFd) {
        loop {
            let mut arrived = pin!(self.arrived.notified());
            arrived.as_mut().enable();
            if let Some(segment) = self.segments.lock().pop_front() {
                return segment;
            }
            arrived.await;
        }
    }

    /// Takes in what the daemon sends until the channel ends; says why it did.
    pub async fn run(&self) -> String {
        loop {
            match self.receive().await {
                Ok((SideMessage::HostSegment { segment }, Some(fd))) => {
                    let mut segments = self.segments.lock();
                    if segments.len() >= SEGMENTS_MAX {
                        return format!("more than {SEGMENTS_MAX} host segments that nobody maps");
                    }
                    segments.push_back((segment, fd));
                    drop(segments);
                    self.arrived.notify_waiters();
                }
                Ok((SideMessage::PoolMemory { uuid } | SideMessage::PoolWords { uuid }, Some(fd))) => {
                    let mut memories = self.memories.lock();
                    if memories.len() < MEMORIES_MAX {
                        memories.insert(uuid, fd);
                    }
                    drop(memories);
                    self.arrived.notify_waiters();
                }
                Ok((SideMessage::DeviceMemory { uuid }, Some(fd))) => {
                    let mut memories = self.device_memories.lock();
                    if memories.len() < MEMORIES_MAX {
                        memories.insert(uuid, fd);
                    }
                }
                Ok((message, _)) => return format!("unexpected {message:?} on the side channel"),
                Err(error) => return error.to_string(),
            }
        }
    }

    async fn send(&self, message: &SideMessage, fd: Option<BorrowedFd<'_>>) -> Result<(), ClientError> {
        let bytes = message.encode();
        loop {
            let mut ready = self.socket.writable().await.map_err(ClientError::unavailable)?;
            match self.socket.get_ref().0.send(&bytes, fd) {
                Err(error) if error.is_would_block() => ready.clear_ready(),
                sent => return sent.map_err(ClientError::unavailable),
            }
        }
    }

    async fn receive(&self) -> Result<(SideMessage, Option<OwnedFd>), ClientError> {
        loop {
            let mut ready = self.socket.readable().await.map_err(ClientError::unavailable)?;
            match self.socket.get_ref().0.receive() {
                Ok(Some(Packet { bytes, fd })) => return Ok((SideMessage::decode(&bytes)?, fd)),
                Ok(None) => return Err(ClientError::unavailable("the side channel ended")),
                Err(error) if error.is_would_block() => ready.clear_ready(),
                Err(error) => return Err(ClientError::unavailable(error)),
            }
        }
    }
}

/// Ends when the process is dead.
pub(crate) async fn death(watch: Arc<ProcessWatch>) {
    // Without readiness there is no word of the kernel either; waiting for ever is the safe side.
    let Ok(watched) = watched(ArcFd(watch)) else { return std::future::pending().await };
    loop {
        let Ok(mut ready) = watched.readable().await else { return std::future::pending().await };
        if watched.get_ref().0.0.is_dead() {
            return;
        }
        ready.clear_ready();
    }
}

struct ArcFd(Arc<ProcessWatch>);

impl AsFd for ArcFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Path of the side channel beside the gRPC socket.
pub(crate) fn side_path(socket: &Path) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(".fd");
    path.into()
}
