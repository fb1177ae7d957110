//! Host memory as a worker half uses it: mapped segments, and the pins that keep slots in place.

use std::collections::HashMap;
use std::sync::Arc;

use kvbm_hash::{Namespace, SequenceHash};
use kvbm_shm::{PinState, PoolWords, SharedMemory};
use parking_lot::RwLock;

use super::metadata::Lease;
use super::pool::Mover;

/// What one session with the daemon mapped. It is good for as long as it is held, also when the session is over.
#[derive(Debug)]
pub(crate) struct HostMemory {
    pub words: PoolWords,
    pub segments: RwLock<HashMap<u32, Arc<SharedMemory>>>,
    /// Bytes from one slot to the next.
    pub slot_stride: usize,
    /// Bytes from the start of a slot to this rank's part.
    pub shard_offset: usize,
    /// Bytes of this rank's part.
    pub block_bytes: usize,
    pub mover: Arc<dyn Mover>,
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        for segment in self.segments.get_mut().values() {
            self.mover.release(segment);
        }
    }
}

impl HostMemory {
    /// The segment of a slot, and where in it this rank's part begins. `None`: this process has not mapped it.
    pub fn place(&self, segment: u32, index: u32) -> Option<(Arc<SharedMemory>, usize)> {
        let memory = self.segments.read().get(&segment)?.clone();
        let offset = (index as usize).checked_mul(self.slot_stride)?.checked_add(self.shard_offset)?;
        let end = offset.checked_add(self.block_bytes)?;
        (end <= memory.bytes()).then_some((memory, offset))
    }

    /// Begins to copy under a lease. False: it was not made in this session, or was taken back.
    pub fn begin(&self, lease: Lease) -> bool {
        let used = PinState::InUse(lease.lease_id);
        is_pin(lease.pin)
            && (self.words.begin_use(lease.pin, lease.lease_id) || self.words.pin(lease.pin) == used)
    }

    /// Ends it, if it was made in this session.
    pub fn end(&self, lease: Lease) {
        if is_pin(lease.pin) {
            self.words.take_back(lease.pin, lease.lease_id);
            if self.words.pin(lease.pin) == PinState::InUse(lease.lease_id) {
                self.words.clear_pin(lease.pin);
            }
        }
    }

    /// True while copies may be under way, or begin.
    pub fn is_pinned(&self) -> bool {
        !self.words.pinned_slots().is_empty()
    }

    /// A slot is not being written any more.
    pub fn written(&self, pin: u32) {
        if is_pin(pin) {
            self.words.clear_pin(pin);
        }
    }
}

/// What others say is checked before it is used.
fn is_pin(pin: u32) -> bool {
    pin < PoolWords::LEASE_PINS + PoolWords::WRITE_PINS
}

/// Complete blocks of one sequence that are to be found by others.
#[derive(Debug, Clone)]
pub(crate) struct StoreRequest {
    pub namespace: Namespace,
    /// A number and a generation for each block.
    pub blocks: Vec<(u32, u32)>,
    pub keys: Vec<SequenceHash>,
    /// Key of the block before the first.
    pub parent: Option<SequenceHash>,
    /// Empty, or one for each block.
    pub priorities: Vec<u8>,
}

/// A block that is to be copied out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Write {
    /// Which of the request's blocks.
    pub block: usize,
    pub segment: u32,
    pub index: u32,
    pub pin: u32,
}

/// What the daemon says to blocks that could be stored.
#[derive(Debug)]
pub(crate) struct Writes {
    pub store_id: u64,
    pub host: Arc<HostMemory>,
    pub writes: Vec<Write>,
    /// Some blocks were refused because what comes before them is not there.
    pub orphans: bool,
    /// Some blocks were refused for now.
    pub busy: bool,
}

/// The daemon as a worker half uses it. Its methods are called by threads that the engine does not wait for.
pub(crate) trait Host: Send + Sync {
    /// Begins to copy under a lease. `None`: it is not this rank's to use.
    fn begin(&self, lease: Lease) -> Option<Arc<HostMemory>>;

    /// Nothing is copied under it any more, or ever will be.
    fn end(&self, lease: Lease);

    /// Offers blocks. `None`: nobody takes them now.
    fn store(&self, request: &StoreRequest) -> Option<Writes>;

    /// The copies have ended, each with its bytes there or not.
    fn store_done(&self, writes: &Writes, copied: Vec<bool>);
}
