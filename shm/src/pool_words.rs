//! Words that the daemon and one rank of an engine share about a pool that the engine owns.
//!
//! ```text
//! byte  0 magic "kvbmword"   8 version   16 uuid (16 bytes)   32 block count   40 generations at   48 fences at
//!      56 fence count   64 pins at   72 lease pins   80 write pins   128 steps   136 busy ns        all u64, little endian
//! ```
//!
//! *Generations*, one u32 per block: the engine raises a block's word when it allocates it anew, before whatever may write
//! into it is launched. Whoever copied out of the block reads the word again after the copy and discards what it copied
//! if the word has moved.
//!
//! *Fences*, u32 each: written by the engine when work before them is complete.
//!
//! *Pins*: which host slots the engine's process may be touching by itself. The daemon sets an entry, the engine clears
//! it when its copies have ended; neither needs the other for that, and a set entry is honoured by a later daemon.
//!
//! ```text
//!          daemon                engine: begins            engine: done
//!   Free ──────────► Promised ────────────────► InUse ───────────────────► Free
//!     ▲                 │ daemon takes it back    ▲
//!     └─────────────────┘        daemon (a write) │
//! ```

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use crate::{Error, SharedMemory};

const MAGIC: u64 = u64::from_le_bytes(*b"kvbmword");
const VERSION: u64 = 1;
const HEADER_BYTES: usize = 4096;
const PIN_BYTES: usize = 16;

/// Offsets of the header's 8-byte words.
mod field {
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = 8;
    pub const UUID: usize = 16;
    pub const BLOCK_COUNT: usize = 32;
    pub const GENERATIONS_AT: usize = 40;
    pub const FENCES_AT: usize = 48;
    pub const FENCE_COUNT: usize = 56;
    pub const PINS_AT: usize = 64;
    pub const LEASE_PINS: usize = 72;
    pub const WRITE_PINS: usize = 80;
}

/// Where in host memory a pinned slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PinnedSlot {
    /// Number of the segment.
    pub segment: u32,
    /// Position in it.
    pub index: u32,
}

/// State of an entry of the pin table. Ids are those of leases or stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PinState {
    /// Nobody's.
    Free,
    /// The engine may begin to copy.
    Promised(u64),
    /// The engine may be copying.
    InUse(u64),
}

impl PinState {
    fn encode(self) -> u64 {
        match self {
            Self::Free => 0,
            Self::Promised(id) => id << 2 | 1,
            Self::InUse(id) => id << 2 | 2,
        }
    }

    /// What is neither was written by somebody who does not keep the protocol: it counts as in use.
    fn decode(word: u64) -> Self {
        match (word, word & 3) {
            (0, _) => Self::Free,
            (_, 1) => Self::Promised(word >> 2),
            (_, _) => Self::InUse(word >> 2),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct PoolWords {
    memory: SharedMemory,
    uuid: [u8; 16],
    block_count: u32,
}

impl PoolWords {
    /// Fence words of a pool.
    pub const FENCES: u32 = 64;
    /// Entries for leases in the pin table. They come first.
    pub const LEASE_PINS: u32 = 1024;
    /// Entries for slots that are being written.
    pub const WRITE_PINS: u32 = 1024;
    /// All entries of the pin table.
    pub const PINS: u32 = Self::LEASE_PINS + Self::WRITE_PINS;

    const GENERATIONS_AT: usize = HEADER_BYTES;

    fn fences_at(block_count: u32) -> usize {
        (Self::GENERATIONS_AT + block_count as usize * 4).next_multiple_of(64)
    }

    fn pins_at(block_count: u32) -> usize {
        Self::fences_at(block_count) + Self::FENCES as usize * 4
    }

    fn bytes(block_count: u32) -> usize {
        let pins = (Self::LEASE_PINS + Self::WRITE_PINS) as usize * PIN_BYTES;
        (Self::pins_at(block_count) + pins).next_multiple_of(4096)
    }

    /// Words of a new pool: all zero.
    pub fn create(uuid: [u8; 16], block_count: u32) -> Result<Self, Error> {
        let memory = SharedMemory::create("kvbm-words", Self::bytes(block_count))?;
        memory.write(field::UUID, &uuid);
        for (offset, value) in Self::header(block_count) {
            memory.word64(offset).store(value, Ordering::Relaxed);
        }
        memory.word64(field::VERSION).store(VERSION, Ordering::Relaxed);
        memory.word64(field::MAGIC).store(MAGIC, Ordering::Release);
        Ok(Self { memory, uuid, block_count })
    }

    /// Maps words received from another process and checks their header.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        Self::from_memory(SharedMemory::from_fd(fd)?)
    }

    fn from_memory(memory: SharedMemory) -> Result<Self, Error> {
        let read = |offset| memory.word64(offset).load(Ordering::Acquire);
        if read(field::MAGIC) != MAGIC || read(field::VERSION) != VERSION {
            return Err(Error::refused("it has no header of pool words of version 1"));
        }
        let block_count = u32::try_from(read(field::BLOCK_COUNT)).unwrap_or(0);
        let fits = Self::header(block_count).iter().all(|(offset, value)| read(*offset) == *value);
        if block_count == 0 || !fits || Self::bytes(block_count) != memory.bytes() {
            return Err(Error::refused(format!(
                "its header promises words of {block_count} blocks, it has {} bytes",
                memory.bytes()
            )));
        }
        let mut uuid = [0; 16];
        memory.read(field::UUID, &mut uuid);
        Ok(Self { memory, uuid, block_count })
    }

    fn header(block_count: u32) -> [(usize, u64); 7] {
        [
            (field::BLOCK_COUNT, block_count.into()),
            (field::GENERATIONS_AT, Self::GENERATIONS_AT as u64),
            (field::FENCES_AT, Self::fences_at(block_count) as u64),
            (field::FENCE_COUNT, Self::FENCES.into()),
            (field::PINS_AT, Self::pins_at(block_count) as u64),
            (field::LEASE_PINS, Self::LEASE_PINS.into()),
            (field::WRITE_PINS, Self::WRITE_PINS.into()),
        ]
    }

    /// Name of the pool.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    /// Blocks of the pool.
    pub fn block_count(&self) -> u32 {
        self.block_count
    }

    /// The descriptor, to be passed on.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.memory.fd()
    }

    /// The whole memory.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// The word of a block. Bytes that were copied out of the block before this call are those of this generation, if
    /// it was the same before the copy.
    pub fn generation(&self, block: u32) -> u32 {
        assert!(block < self.block_count, "block {block} is not one of {}", self.block_count);
        fence(Ordering::Acquire);
        self.memory.word32(Self::GENERATIONS_AT + block as usize * 4).load(Ordering::SeqCst)
    }

    /// The engine's: the block is allocated anew. Before anything is written into it.
    pub fn raise_generation(&self, block: u32) -> u32 {
        assert!(block < self.block_count, "block {block} is not one of {}", self.block_count);
        let word = self.memory.word32(Self::GENERATIONS_AT + block as usize * 4);
        let raised = word.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
        fence(Ordering::SeqCst);
        raised
    }

    /// The engine's: what the word of a block is to be at first, before the daemon is told of any block.
    pub fn set_generation(&self, block: u32, generation: u32) {
        assert!(block < self.block_count, "block {block} is not one of {}", self.block_count);
        let word = self.memory.word32(Self::GENERATIONS_AT + block as usize * 4);
        word.store(generation, Ordering::SeqCst);
    }

    /// Whether the engine has written a fence with this value or one past it.
    pub fn is_reached(&self, word: u32, value: u32) -> bool {
        assert!(word < Self::FENCES, "fence {word} is not one of {}", Self::FENCES);
        let at = Self::fences_at(self.block_count) + word as usize * 4;
        let behind = self.memory.word32(at).load(Ordering::Acquire).wrapping_sub(value);
        behind.cast_signed() >= 0
    }

    /// The engine's: all that a fence stands for is complete.
    pub fn signal(&self, word: u32, value: u32) {
        assert!(word < Self::FENCES, "fence {word} is not one of {}", Self::FENCES);
        let at = Self::fences_at(self.block_count) + word as usize * 4;
        self.memory.word32(at).store(value, Ordering::Release);
    }

    fn pin_word(&self, pin: u32) -> &AtomicU64 {
        assert!(pin < Self::LEASE_PINS + Self::WRITE_PINS, "there is no pin {pin}");
        self.memory.word64(Self::pins_at(self.block_count) + pin as usize * PIN_BYTES)
    }

    fn place_word(&self, pin: u32) -> &AtomicU64 {
        self.memory.word64(Self::pins_at(self.block_count) + pin as usize * PIN_BYTES + 8)
    }

    /// State of an entry.
    pub fn pin(&self, pin: u32) -> PinState {
        PinState::decode(self.pin_word(pin).load(Ordering::SeqCst))
    }

    /// The daemon's: sets a free entry.
    pub fn set_pin(&self, pin: u32, state: PinState, slot: PinnedSlot) {
        let place = u64::from(slot.segment) << 32 | u64::from(slot.index);
        self.place_word(pin).store(place, Ordering::SeqCst);
        self.pin_word(pin).store(state.encode(), Ordering::SeqCst);
    }

    /// The daemon's: takes a promise back, unless the engine has begun. True if nothing is promised any more.
    pub fn take_back(&self, pin: u32, id: u64) -> bool {
        let (promised, free) = (PinState::Promised(id).encode(), PinState::Free.encode());
        let taken = self.pin_word(pin).compare_exchange(promised, free, Ordering::SeqCst, Ordering::SeqCst);
        !matches!(taken.map_err(PinState::decode), Err(PinState::InUse(_)))
    }

    /// The engine's: begins to copy. False if the promise was taken back.
    pub fn begin_use(&self, pin: u32, id: u64) -> bool {
        let (promised, used) = (PinState::Promised(id).encode(), PinState::InUse(id).encode());
        self.pin_word(pin).compare_exchange(promised, used, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    /// Nothing of the engine touches the slots any more.
    pub fn clear_pin(&self, pin: u32) {
        self.pin_word(pin).store(PinState::Free.encode(), Ordering::SeqCst);
    }

    /// Which slot an entry stands for, if it is set.
    pub fn pinned_slot(&self, pin: u32) -> PinnedSlot {
        let place = self.place_word(pin).load(Ordering::SeqCst);
        PinnedSlot { segment: (place >> 32) as u32, index: place as u32 }
    }

    /// All slots that are pinned.
    pub fn pinned_slots(&self) -> Vec<PinnedSlot> {
        let pins = (0..Self::PINS).filter(|pin| self.pin(*pin) != PinState::Free);
        pins.map(|pin| self.pinned_slot(pin)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn other(words: &PoolWords) -> PoolWords {
        PoolWords::from_fd(words.fd().try_clone_to_owned().unwrap()).unwrap()
    }

    #[test]
    fn both_sides_see_the_same_words_and_the_header_says_where_they_are() {
        let ours = PoolWords::create([7; 16], 33).unwrap();
        let theirs = other(&ours);
        assert_eq!((theirs.uuid(), theirs.block_count()), ([7; 16], 33));
        assert_eq!(theirs.raise_generation(32), 1);
        assert_eq!((ours.generation(32), ours.generation(31)), (1, 0));
        let at = |field| ours.memory().word64(field).load(Ordering::Relaxed) as usize;
        assert_eq!(ours.memory().word32(at(field::GENERATIONS_AT) + 32 * 4).load(Ordering::Relaxed), 1);
        theirs.signal(5, 9);
        assert_eq!(ours.memory().word32(at(field::FENCES_AT) + 5 * 4).load(Ordering::Relaxed), 9);
        ours.set_pin(1025, PinState::InUse(3), PinnedSlot { segment: 2, index: 7 });
        assert_eq!(ours.memory().word64(at(field::PINS_AT) + 1025 * 16).load(Ordering::Relaxed), 3 << 2 | 2);
        assert_eq!(
            ours.memory().word64(at(field::PINS_AT) + 1025 * 16 + 8).load(Ordering::Relaxed),
            2 << 32 | 7
        );
    }

    #[test]
    fn a_fence_is_reached_by_its_value_and_what_follows_it_also_behind_the_wrap() {
        let words = PoolWords::create([7; 16], 1).unwrap();
        assert!(words.is_reached(0, 0) && !words.is_reached(0, 1));
        words.signal(0, u32::MAX);
        assert!(words.is_reached(0, u32::MAX) && !words.is_reached(0, 0));
        words.signal(0, 3);
        assert!(words.is_reached(0, u32::MAX) && words.is_reached(0, 3) && !words.is_reached(0, 4));
    }

    #[test]
    fn a_promise_is_either_taken_back_or_used() {
        let words = PoolWords::create([7; 16], 1).unwrap();
        let slot = PinnedSlot { segment: 1, index: 2 };
        words.set_pin(0, PinState::Promised(4), slot);
        assert!(words.take_back(0, 4) && !words.begin_use(0, 4));
        words.set_pin(0, PinState::Promised(5), slot);
        assert!(!words.begin_use(0, 4), "of another lease");
        assert!(words.begin_use(0, 5) && !words.take_back(0, 5));
        assert_eq!((words.pin(0), words.pinned_slots()), (PinState::InUse(5), vec![slot]));
        words.clear_pin(0);
        assert!(words.take_back(0, 5) && words.pinned_slots().is_empty());
    }

    #[test]
    fn memory_without_header_or_with_a_lying_one_is_refused() {
        let plain = SharedMemory::create("test", 65536).unwrap();
        assert!(PoolWords::from_fd(plain.fd().try_clone_to_owned().unwrap()).is_err());
        let words = PoolWords::create([1; 16], 3).unwrap();
        for (field, lie) in [(field::BLOCK_COUNT, 1 << 20), (field::BLOCK_COUNT, 0), (field::PINS_AT, 4096)] {
            let told = words.memory().word64(field).swap(lie, Ordering::Relaxed);
            assert!(PoolWords::from_fd(words.fd().try_clone_to_owned().unwrap()).is_err());
            words.memory().word64(field).store(told, Ordering::Relaxed);
        }
        assert!(PoolWords::from_fd(words.fd().try_clone_to_owned().unwrap()).is_ok());
    }
}
