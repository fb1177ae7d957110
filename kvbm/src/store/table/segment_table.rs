//! A segment's table in shared memory, which is read again after its writer was killed.
//!
//! A writer at a time. An entry's state word is cleared before anything else of it changes and is set when all of it is
//! there; a binding's check likewise. What a reader finds half done is `Free` or `Damaged`.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use kvbm_shm::{Error, SharedMemory};

use super::binding::Binding;
use super::entry::{Decoded, ENTRIES_PER_PAGE, ENTRY_BYTES, Entry, FREE, READING, STATE_BYTES, STORED};
use super::fields::{CHECK_AT, PAGE_BYTES, put, take};

/// A header page and pages of entries.
#[derive(Debug, Clone)]
pub struct SegmentTable(Arc<SharedMemory>);

impl SegmentTable {
    /// Bytes of a table that has room for so many slots.
    pub fn bytes_for(slots_max: u32) -> usize {
        (1 + slots_max.div_ceil(ENTRIES_PER_PAGE) as usize) * PAGE_BYTES
    }

    /// A table that is not bound.
    pub fn create(slots_max: u32) -> Result<Self, Error> {
        Ok(Self(Arc::new(SharedMemory::create("kvbm-table", Self::bytes_for(slots_max))?)))
    }

    /// A table that somebody else may have written, in whatever state.
    pub fn from_memory(memory: Arc<SharedMemory>) -> Self {
        Self(memory)
    }

    /// The memory, to be kept by somebody who lives longer.
    pub fn memory(&self) -> &Arc<SharedMemory> {
        &self.0
    }

    /// Slots that there is room for.
    pub fn slots_max(&self) -> u32 {
        u32::try_from((self.0.bytes() / PAGE_BYTES - 1) * ENTRIES_PER_PAGE as usize).unwrap_or(u32::MAX)
    }

    /// Gives the slots a new meaning. Entries stored before do not count any more, if the seal is a new one.
    pub fn bind(&self, binding: Binding) {
        assert!(binding.slots <= self.slots_max(), "{} slots do not fit the table", binding.slots);
        let mut page = binding.encode();
        let check = u64::from_le_bytes(take(&page, CHECK_AT));
        put(&mut page, CHECK_AT, &[0; 8]);
        self.0.word64(CHECK_AT).store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        self.0.write(0, &page);
        self.0.word64(CHECK_AT).store(check.to_le(), Ordering::Release);
    }

    /// What the slots mean. `None`: not bound, damaged, or more slots than fit.
    pub fn binding(&self) -> Option<Binding> {
        let mut page = [0; PAGE_BYTES];
        // Not for its value: what its writer did before is seen by the copy.
        self.0.word64(CHECK_AT).load(Ordering::Acquire);
        self.0.read(0, &mut page);
        Binding::decode(&page).filter(|binding| binding.slots <= self.slots_max())
    }

    /// Says that a block is in a slot of a bound table.
    pub fn set(&self, index: u32, entry: &Entry) {
        let at = self.offset(index);
        let bytes = entry.encode(self.seal(), index);
        self.0.word32(at).store(FREE, Ordering::Relaxed);
        fence(Ordering::Release);
        self.0.write(at + STATE_BYTES, &bytes[STATE_BYTES..]);
        self.0.word32(at).store(STORED.to_le(), Ordering::Release);
    }

    /// Says that no block is in a slot; false if there was none.
    pub fn clear(&self, index: u32) -> bool {
        let was = self.0.word32(self.offset(index)).swap(FREE, Ordering::AcqRel);
        // What follows, overwriting the block above all, comes after the word.
        fence(Ordering::SeqCst);
        was != FREE
    }

    /// Says that a drive may write into a slot, even after this process has ended, until it is cleared or set.
    pub fn mark_reading(&self, index: u32) {
        self.0.word32(self.offset(index)).store(READING.to_le(), Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Whether somebody said so.
    pub fn is_reading(&self, index: u32) -> bool {
        self.0.word32(self.offset(index)).load(Ordering::Acquire) == READING.to_le()
    }

    /// What is in a slot of a bound table.
    pub fn get(&self, index: u32) -> Decoded {
        let at = self.offset(index);
        if self.0.word32(at).load(Ordering::Acquire) == FREE {
            return Decoded::Free;
        }
        let mut bytes = [0; ENTRY_BYTES];
        self.0.read(at, &mut bytes);
        Decoded::of(&bytes, self.seal(), index)
    }

    fn seal(&self) -> u64 {
        u64::from_le(self.0.word64(Binding::SEAL_AT).load(Ordering::Acquire))
    }

    fn offset(&self, index: u32) -> usize {
        assert!(index < self.slots_max(), "slot {index} lies outside the table");
        PAGE_BYTES + index as usize * ENTRY_BYTES
    }
}
