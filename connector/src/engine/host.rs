//! Host memory as a worker half uses it: mapped segments, and the pins that keep slots in place.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvbm_hash::{Namespace, SequenceHash};
use kvbm_shm::{PinState, PoolWords, SharedMemory};
use parking_lot::{Mutex, RwLock};

use super::metadata::Lease;
use super::pool::Mover;

/// What one session with the daemon mapped. It is good for as long as it is held, also when the session is over.
#[derive(Debug)]
pub(crate) struct HostMemory {
    pub words: Arc<PoolWords>,
    pub writes: Arc<WritePins>,
    pub segments: RwLock<HashMap<u32, Arc<MappedSegment>>>,
    /// Bytes from one slot to the next.
    pub slot_stride: usize,
    /// Bytes from the start of a slot to this rank's part.
    pub shard_offset: usize,
    /// Bytes of this rank's part.
    pub block_bytes: usize,
}

/// A host segment that the mover was told of, until this is dropped. Sessions that are given the same memory share it: a
/// device takes long to learn of memory.
#[derive(Debug)]
pub(crate) struct MappedSegment {
    memory: Arc<SharedMemory>,
    mover: Arc<dyn Mover>,
}

impl MappedSegment {
    /// Maps what the daemon sent.
    pub fn new(fd: OwnedFd, mover: Arc<dyn Mover>) -> Result<Self, String> {
        let memory = Arc::new(SharedMemory::from_fd(fd).map_err(|error| error.to_string())?);
        mover.prepare(&memory)?;
        Ok(Self { memory, mover })
    }

    /// Names the memory; see [`SharedMemory::id_of`].
    pub fn id(&self) -> Option<(u64, u64)> {
        SharedMemory::id_of(self.memory.fd()).ok()
    }
}

impl Drop for MappedSegment {
    fn drop(&mut self) {
        self.mover.release(&self.memory);
    }
}

impl HostMemory {
    /// The segment of a slot, and where in it this rank's part begins. `None`: this process has not mapped it.
    pub fn place(&self, segment: u32, index: u32) -> Option<(Arc<SharedMemory>, usize)> {
        let memory = self.segments.read().get(&segment)?.memory.clone();
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
        self.writes.end(pin);
    }
}

/// Entries that stand for slots this process is writing.
///
/// The daemon sets an entry before it says so; of answers that never arrive this process does not know. So when the
/// session is over, entries that nobody here writes under are cleared: the daemon would keep their slots, and refuse
/// their blocks, for as long as this process lives.
#[derive(Debug)]
pub(crate) struct WritePins {
    words: Arc<PoolWords>,
    /// Those that we write under. When the session is over, no write is begun any more.
    ours: Mutex<(HashSet<u32>, Session)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Session {
    Open,
    Over,
}

impl WritePins {
    pub fn new(words: Arc<PoolWords>) -> Self {
        Self { words, ours: Mutex::new((HashSet::new(), Session::Open)) }
    }

    /// Takes up the writes of an answer. False: the session is over, and nothing is to be written.
    #[must_use]
    pub fn begin(&self, pins: impl Iterator<Item = u32>) -> bool {
        let mut ours = self.ours.lock();
        if ours.1 == Session::Over {
            return false;
        }
        ours.0.extend(pins.filter(|pin| is_pin(*pin)));
        true
    }

    fn end(&self, pin: u32) {
        if self.ours.lock().0.remove(&pin) {
            self.words.clear_pin(pin);
        }
    }

    /// The session is over. To be called again for a while: the daemon may still be working off what it was asked.
    pub fn end_session(&self) {
        let mut ours = self.ours.lock();
        ours.1 = Session::Over;
        for pin in (PoolWords::LEASE_PINS..PoolWords::PINS).filter(|pin| !ours.0.contains(pin)) {
            if self.words.pin(pin) != PinState::Free {
                self.words.clear_pin(pin);
            }
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

/// What became of blocks that could be stored.
#[derive(Debug)]
pub(crate) enum Stored {
    /// This process is to copy some.
    ToWrite(Writes),
    /// The daemon has copied those that were to be.
    Copied(Copied),
}

/// Blocks by what the daemon did with them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Copied {
    pub stored: u64,
    /// Their pages changed hands before they were copied.
    pub stale: u64,
    /// Some were refused because what comes before them is not there.
    pub orphans: bool,
    /// Some were refused for now.
    pub busy: bool,
}

/// The daemon as a worker half uses it. Its methods are called by threads that the engine does not wait for.
pub(crate) trait Host: Send + Sync {
    /// Begins to copy under a lease. `None`: it is not this rank's to use.
    fn begin(&self, lease: Lease) -> Option<Arc<HostMemory>>;

    /// Nothing is copied under it any more, or ever will be.
    fn end(&self, lease: Lease);

    /// Offers blocks. `None`: nobody takes them now.
    fn store(&self, request: &StoreRequest) -> Option<Stored>;

    /// The copies have ended, each with its bytes there or not.
    fn store_done(&self, writes: &Writes, copied: Vec<bool>);
}

#[cfg(test)]
mod tests {
    use kvbm_shm::PinnedSlot;

    use super::*;

    #[test]
    fn when_a_session_is_over_entries_that_nobody_writes_under_are_cleared_and_no_write_begins() {
        let words = Arc::new(PoolWords::create([1; 16], 4).unwrap());
        let slot = PinnedSlot { segment: 1, index: 2 };
        let first = PoolWords::LEASE_PINS;
        let state = |pin| words.pin(pin) != PinState::Free;
        words.set_pin(5, PinState::Promised(9), slot);
        for pin in [first, first + 1] {
            words.set_pin(pin, PinState::InUse(7), slot);
        }
        let pins = WritePins::new(words.clone());
        assert!(pins.begin([first].into_iter()));
        pins.end_session();
        assert!(state(first) && !state(first + 1) && state(5), "leases are another matter");
        // An answer that nobody waited for.
        words.set_pin(first + 2, PinState::InUse(8), slot);
        assert!(!pins.begin([first + 2].into_iter()));
        pins.end_session();
        pins.end(first);
        assert!(!state(first) && !state(first + 2));
    }
}
