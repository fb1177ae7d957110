//! Blocks on their way to and from a disk.

use std::sync::Arc;

use kvbm_shm::SharedMemory;
use thiserror::Error;

use crate::ledger::SegmentId;
use crate::store::disk_io::IoFailure;

/// A slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DiskPlace {
    /// Which segment.
    pub segment: SegmentId,
    /// Which of its slots, counted over all files.
    pub index: u32,
}

/// A block to be written. Memory up to the next multiple of 4096 bytes is written with it.
#[derive(Debug, Clone)]
pub struct DiskWrite {
    /// Where to.
    pub place: DiskPlace,
    /// Digest of its namespace.
    pub namespace: [u8; 32],
    /// Its sequence hash.
    pub key: [u8; 16],
    /// Sequence hash of its predecessor.
    pub parent: Option<[u8; 16]>,
    /// Retention priority, 0..=100.
    pub priority: u8,
    /// When its priority ends if nobody uses it, in seconds since 1970.
    pub expires_at_s: Option<u64>,
    /// Its bytes, which stay as they are until the write ended.
    pub source: Arc<SharedMemory>,
    /// Where they begin.
    pub source_offset: usize,
    /// How many.
    pub bytes: usize,
}

/// A block to be read. Memory up to the next multiple of 4096 bytes is overwritten with it, also when it fails.
#[derive(Debug, Clone)]
pub struct DiskRead {
    /// Where from.
    pub place: DiskPlace,
    /// Digest of the namespace it must have.
    pub namespace: [u8; 32],
    /// The sequence hash it must have.
    pub key: [u8; 16],
    /// Where its bytes go.
    pub target: Arc<SharedMemory>,
    /// Where they begin.
    pub target_offset: usize,
    /// How many it must have.
    pub bytes: usize,
}

/// Why a block is not on disk now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum WriteFailure {
    /// The segment is not bound to a class with such a slot, or was bound anew meanwhile.
    #[error("the slot is not there")]
    Unbound,
    /// The drive, or [`IoFailure::Abandoned`] if its backlog was full.
    #[error(transparent)]
    Io(#[from] IoFailure),
}

/// Why a block was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ReadFailure {
    /// The slot holds no block, or another.
    #[error("the block is not there")]
    Absent,
    /// The bytes are not those that were stored.
    #[error("the block's bytes are damaged")]
    Corrupt,
    /// The drive, or [`IoFailure::Abandoned`] if its backlog was full.
    #[error(transparent)]
    Io(#[from] IoFailure),
}
