//! What is in host memory, written down where the next daemon finds it.
//!
//! Each host segment has a table in shared memory. A slot's entry is cleared before the first byte of another block is
//! written into the slot, and set when all bytes are there: memory survives a killed process coherently, so an entry that
//! is found is true. Descriptors of both are kept by somebody who lives longer, the [`Keeper`].
//!
//! A slot that a drive reads into is marked: the drive may go on after its daemon was killed, so such a segment has no
//! successor.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvbm_shm::{Error, PoolWords, ProcessWatch, SharedMemory};
use parking_lot::RwLock;
use rustix::rand::{GetRandomFlags, getrandom};

use super::table::{Binding, Decoded, Entry, PAGE_BYTES, SegmentTable};
use super::wall_time::{self, expires_at_s, now_s};
use crate::ledger::{Class, FoundBlock, FoundSegment, Place, SegmentId, StoredBlock, TrustDomain};

/// A host segment and its table.
#[derive(Debug, Clone)]
pub struct WarmSegment {
    /// Which.
    pub index: u32,
    /// Says how it is cut; another one cannot be used.
    pub fingerprint: [u8; 32],
    /// The slots.
    pub memory: Arc<SharedMemory>,
    /// What is in them.
    pub table: Arc<SharedMemory>,
}

/// Keeps descriptors beyond the life of the daemon.
pub trait Keeper: Send + Sync {
    /// From now on.
    fn keep(&self, segment: &WarmSegment);

    /// No longer.
    fn discard(&self, index: u32);

    /// From now on, what is shared with an engine, and the process that shares it.
    fn keep_words(&self, number: u32, words: &PoolWords, process: &ProcessWatch);

    /// No longer.
    fn discard_words(&self, number: u32);
}

/// What an earlier daemon shared with an engine, which may be touching the host slots that are pinned there.
#[derive(Debug)]
pub struct WarmWords {
    /// The number it was kept under.
    pub number: u32,
    /// The words.
    pub words: PoolWords,
    /// The engine's process.
    pub process: ProcessWatch,
}

/// Host memory that outlives the daemon.
pub struct WarmHost {
    /// What an earlier daemon left.
    pub found: Vec<WarmSegment>,
    /// What it shared with engines.
    pub words: Vec<WarmWords>,
    /// Who kept it.
    pub keeper: Box<dyn Keeper>,
}

/// The tables of all host segments.
pub(crate) struct WarmTables {
    keeper: Box<dyn Keeper>,
    tables: RwLock<HashMap<SegmentId, SegmentTable>>,
    /// Under which number the words of the next engine are kept.
    next_words: AtomicU32,
}

impl WarmTables {
    /// `words_from`: words of earlier daemons have smaller numbers.
    pub fn new(keeper: Box<dyn Keeper>, words_from: u32) -> Self {
        Self { keeper, tables: RwLock::default(), next_words: AtomicU32::new(words_from) }
    }

    /// Has the words of an engine outlive the daemon; returns their number.
    pub fn keep_words(&self, words: &PoolWords, process: &ProcessWatch) -> u32 {
        let number = self.next_words.fetch_add(1, Ordering::Relaxed);
        self.keeper.keep_words(number, words, process);
        number
    }

    /// Nobody needs these words any more.
    pub fn discard_words(&self, number: u32) {
        self.keeper.discard_words(number);
    }

    /// A segment that nothing is in.
    pub fn add(&self, segment: SegmentId, memory: &Arc<SharedMemory>) -> Result<(), Error> {
        let table = SegmentTable::create(slots_max(memory.bytes()))?;
        self.keeper.keep(&WarmSegment {
            index: segment.0,
            fingerprint: fingerprint(memory.bytes()),
            memory: Arc::clone(memory),
            table: Arc::clone(table.memory()),
        });
        self.tables.write().insert(segment, table);
        Ok(())
    }

    /// A segment that an earlier daemon left, as number `segment`, if it can be used: with what is in it, if it is bound.
    /// One into which a drive may still be writing for the dead daemon cannot, nor can one that nothing was in unless there
    /// is but `one_domain`: anybody's processes may have been given it.
    pub fn adopt(
        &self,
        segment: SegmentId,
        found: &WarmSegment,
        segment_bytes: usize,
        one_domain: bool,
    ) -> Option<Option<FoundSegment>> {
        let table = SegmentTable::from_memory(Arc::clone(&found.table));
        let usable = found.fingerprint == fingerprint(segment_bytes)
            && found.memory.bytes() == segment_bytes
            && found.table.bytes() == SegmentTable::bytes_for(slots_max(segment_bytes));
        if !usable {
            return None;
        }
        let bound = table.binding().filter(|binding| {
            binding.stride >= PAGE_BYTES
                && binding.stride.is_multiple_of(PAGE_BYTES)
                && segment_bytes / binding.stride == binding.slots as usize
        });
        let refused = match &bound {
            Some(binding) => (0..binding.slots).any(|index| table.is_reading(index)),
            None => !one_domain,
        };
        if refused {
            return None;
        }
        if segment.0 != found.index {
            self.keeper.keep(&WarmSegment { index: segment.0, ..found.clone() });
        }
        let found = bound.map(|binding| FoundSegment {
            segment,
            class: Class { domain: TrustDomain(binding.domain), stride: binding.stride },
            blocks: (0..binding.slots).filter_map(|index| block(&table, index)).collect(),
        });
        self.tables.write().insert(segment, table);
        Some(found)
    }

    /// What an earlier daemon left is of no use.
    pub fn discard(&self, index: u32) {
        self.keeper.discard(index);
    }

    /// The slots of a segment have another meaning from now on.
    pub fn bind(&self, segment: SegmentId, class: Class, slots: u32) {
        let mut seal = [0; 8];
        let filled = getrandom(&mut seal, GetRandomFlags::empty()).expect("the kernel has random bytes");
        assert_eq!(filled, seal.len(), "so few are always given at once");
        let (domain, seal) = (class.domain.0, u64::from_ne_bytes(seal));
        if let Some(table) = self.tables.read().get(&segment) {
            table.bind(Binding { domain, stride: class.stride, slots, seal });
        }
    }

    /// Another block is about to be written into these slots.
    pub fn clear(&self, places: impl Iterator<Item = Place>) {
        let tables = self.tables.read();
        for place in places {
            if let Some(table) = tables.get(&place.segment) {
                table.clear(place.index);
            }
        }
    }

    /// A drive is about to write into these slots: until they are cleared or set, no other daemon uses them.
    pub fn mark_reading(&self, places: impl Iterator<Item = Place>) {
        let tables = self.tables.read();
        for place in places {
            if let Some(table) = tables.get(&place.segment) {
                table.mark_reading(place.index);
            }
        }
    }

    /// All bytes of these blocks are there.
    pub fn set(&self, stride: usize, blocks: impl Iterator<Item = (Place, StoredBlock)>) {
        let stored_at_s = now_s();
        let tables = self.tables.read();
        for (place, block) in blocks {
            let Some(table) = tables.get(&place.segment) else { continue };
            table.set(
                place.index,
                &Entry {
                    namespace: block.namespace,
                    key: block.key.0,
                    parent: block.parent.map(|parent| parent.0),
                    generation: 0,
                    payload_check: 0,
                    payload_bytes: u32::try_from(stride).unwrap_or(u32::MAX),
                    priority: block.retention.priority,
                    stored_at_s,
                    expires_at_s: expires_at_s(block.retention, stored_at_s),
                },
            );
        }
    }
}

fn block(table: &SegmentTable, index: u32) -> Option<FoundBlock> {
    let Decoded::Stored(entry) = table.get(index) else { return None };
    Some(FoundBlock {
        namespace: entry.namespace,
        index,
        key: kvbm_hash::SequenceHash(entry.key),
        parent: entry.parent.map(kvbm_hash::SequenceHash),
        retention: wall_time::found(entry.priority, entry.stored_at_s, entry.expires_at_s, now_s()),
        stored: entry.stored_at_s,
    })
}

/// Slots of the smallest size.
fn slots_max(segment_bytes: usize) -> u32 {
    u32::try_from(segment_bytes / PAGE_BYTES).unwrap_or(u32::MAX)
}

/// Names this way of cutting and describing a segment.
fn fingerprint(segment_bytes: usize) -> [u8; 32] {
    let mut fingerprint = [0; 32];
    fingerprint[..16].copy_from_slice(b"kvbm host seg 1\0");
    fingerprint[16..24].copy_from_slice(&(segment_bytes as u64).to_le_bytes());
    fingerprint
}
