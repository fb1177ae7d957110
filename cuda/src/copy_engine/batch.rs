//! What is submitted: copies that end together.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use kvbm_shm::SharedMemory;
use thiserror::Error;

use super::{CopyMemory, Direction};
use crate::word::is_at_or_after;
use crate::{Error as CudaError, RawCopy};

/// Batches of one lane end in the order in which they were submitted, and wait for each other's fences. One lane per
/// session, so that nobody waits for another's engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LaneId(pub u64);

/// Whether somebody waits for the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// As fast as it goes.
    Demanded,
    /// At the rate that the pacer allows, so that decoding goes on undisturbed.
    Background,
}

/// A shared word that must have been reached before the first byte is copied.
#[derive(Debug, Clone)]
pub struct Fence {
    /// Where the word is.
    pub memory: Arc<SharedMemory>,
    /// At which multiple of 4.
    pub offset: usize,
    /// The word must be this or later, in the cyclic order of 32 bits.
    pub value: u32,
    /// How long after its submission the batch fails if the word was not reached.
    pub limit: Duration,
}

impl Fence {
    pub(super) fn is_reached(&self) -> bool {
        let word = self.memory.word32(self.offset).load(std::sync::atomic::Ordering::Acquire);
        is_at_or_after(word, self.value)
    }
}

/// How a batch ended.
#[derive(Debug, Clone)]
pub enum CopyEnd {
    /// All bytes are there.
    Done {
        /// How many.
        bytes: u64,
        /// From the first piece given to the GPU to the last one ended.
        took: Duration,
    },
    /// Some or all bytes are not there. Nothing of the batch touches memory any more.
    Failed(CopyFailure),
}

/// Why a batch failed.
#[derive(Debug, Clone, Error)]
pub enum CopyFailure {
    /// CUDA refused it or broke off; others are not affected.
    #[error("copy: {0}")]
    Refused(Arc<CudaError>),
    /// The GPU cannot be used any more.
    #[error("copy: the GPU is out of service: {0}")]
    OutOfService(Arc<CudaError>),
    /// The word that it waited for was not reached in time.
    #[error("copy: its fence was not reached within {0:?}")]
    FenceLate(Duration),
    /// Its lane was given up.
    #[error("copy: cancelled, because its lane was closed")]
    Cancelled,
    /// The engine is being stopped.
    #[error("copy: the copy engine stops")]
    Stopped,
}

/// Told once how the batch ended, on the thread of the GPU: it should be short and must not wait.
pub(super) type Callback = Box<dyn FnOnce(CopyEnd) + Send>;

/// Copies that end together.
pub struct CopyBatch {
    pub(super) direction: Direction,
    pub(super) lane: LaneId,
    pub(super) urgency: Urgency,
    pub(super) fence: Option<Fence>,
    pub(super) copies: Vec<RawCopy>,
    /// What the copies' addresses belong to. Never empty of what a copy touches.
    pub(super) memories: Vec<CopyMemory>,
    pub(super) bytes: u64,
    pub(super) done: Callback,
}

impl CopyBatch {
    /// A batch without copies. `done` is told how it ended, on the thread of the GPU: it must not wait.
    pub fn new(
        direction: Direction,
        lane: LaneId,
        urgency: Urgency,
        done: impl FnOnce(CopyEnd) + Send + 'static,
    ) -> Self {
        Self {
            direction,
            lane,
            urgency,
            fence: None,
            copies: Vec::new(),
            memories: Vec::new(),
            bytes: 0,
            done: Box::new(done),
        }
    }

    /// Nothing is copied before the fence is reached.
    pub fn after(mut self, fence: Fence) -> Self {
        self.fence = Some(fence);
        self
    }

    /// Adds a copy of `bytes` bytes from one memory and offset to another. Panics if it lies outside of either: places are
    /// computed by us, never by others.
    pub fn copy(&mut self, from: (&CopyMemory, usize), to: (&CopyMemory, usize), bytes: usize) {
        let mut at = 0;
        while at < bytes {
            let ((from_address, from_left), (to_address, to_left)) =
                (from.0.place(from.1 + at), to.0.place(to.1 + at));
            let piece = (bytes - at).min(from_left).min(to_left);
            self.copies.push(RawCopy { from: from_address, to: to_address, bytes: piece });
            at += piece;
        }
        self.bytes += bytes as u64;
        self.hold(from.0);
        self.hold(to.0);
    }

    /// Bytes of all its copies.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Which way they go.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    fn hold(&mut self, memory: &CopyMemory) {
        if !self.memories.iter().any(|held| held.is(memory)) {
            self.memories.push(memory.clone());
        }
    }
}

impl fmt::Debug for CopyBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {} bytes in {} copies", self.direction, self.bytes, self.copies.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shared(bytes: usize) -> CopyMemory {
        CopyMemory::Shared(Arc::new(SharedMemory::create("test", bytes).unwrap()))
    }

    fn empty() -> CopyBatch {
        CopyBatch::new(Direction::Offload, LaneId(0), Urgency::Demanded, |_| ())
    }

    #[test]
    fn a_batch_holds_each_memory_once_and_counts_bytes() {
        let (a, b) = (shared(8192), shared(8192));
        let mut batch = empty();
        for block in 0..4 {
            batch.copy((&a, block * 2048), (&b, 6144 - block * 2048), 2048);
        }
        assert_eq!((batch.memories.len(), batch.copies.len(), batch.bytes()), (2, 4, 8192));
        assert_eq!(batch.copies[1].from.0, a.place(2048).0.0);
    }

    #[test]
    #[should_panic(expected = "lies outside")]
    fn a_copy_beyond_the_end_is_a_bug() {
        let (a, b) = (shared(8192), shared(4096));
        empty().copy((&a, 0), (&b, 4096), 1);
    }

    #[test]
    #[should_panic(expected = "lies outside")]
    fn a_copy_across_the_end_is_a_bug() {
        let (a, b) = (shared(8192), shared(4096));
        empty().copy((&a, 0), (&b, 2048), 4096);
    }

    #[test]
    fn a_fence_is_reached_at_its_value_or_later() {
        let memory = Arc::new(SharedMemory::create("test", 4096).unwrap());
        let fence = Fence { memory: memory.clone(), offset: 8, value: 5, limit: Duration::ZERO };
        assert!(!fence.is_reached());
        for (word, reached) in [(4, false), (5, true), (6, true)] {
            memory.word32(8).store(word, std::sync::atomic::Ordering::Release);
            assert_eq!(fence.is_reached(), reached, "{word}");
        }
    }
}
