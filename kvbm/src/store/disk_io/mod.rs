//! The one seam between the disk tier and a drive: batches of reads, writes and syncs.
//!
//! Invariants of every implementation, checked by one conformance suite:
//! * a batch that was accepted ends exactly once, and only when the kernel is done with all of its buffers, however long
//!   that takes; a batch that was not accepted is given back whole;
//! * an I/O is done in full, or it is an error: never short, never partly;
//! * accepting never blocks.
//!
//! Nothing here knows of blocks, keys or checksums.
//!
//! ```text
//!   submit ──► backlog (bounded; reads first) ──► uring: one thread, one ring ──► finished
//!                                             └─► pread: a few threads        ──► finished
//! ```
//!
//! Lock order: an engine has one lock, around its backlog, and holds it neither while the kernel works nor while a batch
//! is being told that it is finished.

mod backlog;
mod engine;
mod pread;
mod uring;

#[cfg(test)]
mod conformance;

pub use engine::{IO_BYTES_MAX, IoKind, IoOptions, Overdue, StartError, start};
pub use uring::{PlainFigures, PlainLoop};

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kvbm_shm::SharedMemory;
use thiserror::Error;

/// Where in memory the bytes are. O_DIRECT wants both numbers and the file's offset in multiples of 4096.
#[derive(Debug, Clone)]
pub struct Buffer {
    /// The memory.
    pub memory: Arc<SharedMemory>,
    /// Bytes from its start.
    pub offset: usize,
    /// How many bytes.
    pub len: usize,
}

/// One request to a drive. Files are named by their position in the list that the engine was started with.
#[derive(Debug, Clone)]
pub enum Io {
    /// Fills a buffer from a file.
    Read {
        /// Which file.
        file: usize,
        /// Bytes from its start.
        offset: u64,
        /// To be filled whole.
        buffer: Buffer,
    },
    /// Writes a buffer to a file.
    Write {
        /// Which file.
        file: usize,
        /// Bytes from its start.
        offset: u64,
        /// To be written whole.
        buffer: Buffer,
    },
    /// Makes what was written before durable (fdatasync): the writes of its own batch, after which it is carried out, and
    /// those of batches that have ended. Not those of other batches under way.
    Sync {
        /// Which file.
        file: usize,
    },
}

impl Io {
    /// Which file.
    pub fn file(&self) -> usize {
        match self {
            Self::Read { file, .. } | Self::Write { file, .. } | Self::Sync { file } => *file,
        }
    }

    /// Where in the file; 0 for a sync.
    pub fn offset(&self) -> u64 {
        match self {
            Self::Read { offset, .. } | Self::Write { offset, .. } => *offset,
            Self::Sync { .. } => 0,
        }
    }

    /// The memory that the kernel will touch.
    pub fn buffer(&self) -> Option<&Buffer> {
        match self {
            Self::Read { buffer, .. } | Self::Write { buffer, .. } => Some(buffer),
            Self::Sync { .. } => None,
        }
    }

    /// Bytes to be moved.
    pub fn bytes(&self) -> usize {
        self.buffer().map_or(0, |buffer| buffer.len)
    }
}

/// Why an I/O was not carried out in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum IoFailure {
    /// The kernel said so.
    #[error("{}", std::io::Error::from_raw_os_error(*.0))]
    Os(i32),
    /// Fewer bytes were moved than asked for.
    #[error("only {moved} of {wanted} bytes were moved")]
    Short {
        /// Bytes moved.
        moved: usize,
        /// Bytes asked for.
        wanted: usize,
    },
    /// It took longer than the deadline.
    #[error("the drive did not answer in time")]
    TimedOut,
    /// It was given up before the kernel heard of it.
    #[error("given up before it was started")]
    Abandoned,
}

/// What came of a batch: one result for each I/O, in the order of the batch.
pub type Finished = Box<dyn FnOnce(Vec<Result<(), IoFailure>>) + Send>;

/// A batch, as it is handed to an engine, and as it is given back when there is no room.
pub struct IoBatch {
    /// To be carried out in any order, except that a sync waits for the writes of its batch.
    pub ios: Vec<Io>,
    /// Called exactly once, on a thread of the engine; it must return soon. It may submit, but not close.
    pub finished: Finished,
}

impl fmt::Debug for IoBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBatch").field("ios", &self.ios.len()).finish_non_exhaustive()
    }
}

/// What an engine is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoLoad {
    /// I/Os with the kernel.
    pub in_flight: usize,
    /// Their bytes.
    pub bytes_in_flight: usize,
    /// I/Os accepted that the kernel has not heard of. Syncs that wait for writes count.
    pub waiting: usize,
    /// I/Os with the kernel for longer than the deadline.
    pub overdue: usize,
    /// Time that the oldest of them has been with the kernel.
    pub oldest: Duration,
}

/// A drive, or several.
pub trait DiskIo: Send + Sync + fmt::Debug {
    /// What it is, for people: "io_uring" or "pread".
    fn name(&self) -> &'static str;

    /// Accepts a batch, or gives it back because the backlog is full or the engine was closed. Reads go before writes
    /// that wait.
    ///
    /// # Panics
    ///
    /// If an I/O names a file that is not there, a place that no file has, bytes outside its memory, or more than
    /// [`IO_BYTES_MAX`] of them.
    fn submit(&self, batch: IoBatch) -> Result<(), IoBatch>;

    /// This memory will be named often: an engine may prepare for it, soon, and keeps it as long as others do.
    fn register(&self, memory: &Arc<SharedMemory>);

    /// Memories that the engine has prepared for.
    fn memories_registered(&self) -> usize {
        0
    }

    /// Ends everything that the kernel has not heard of with [`IoFailure::Abandoned`].
    fn abandon_waiting(&self);

    /// What is going on.
    fn load(&self) -> IoLoad;

    /// Accepts nothing more and returns when everything accepted has ended.
    fn close(&self);
}
