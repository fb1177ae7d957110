//! Copies of owned pools whose blocks are on a GPU: the GPU's copy engine moves them.
//!
//! The rule of the epoch is that of every owned pool: bytes that were copied out count only if it is afterwards what it was
//! when the copy was planned. Copies in both directions run side by side, each on streams of its own, so that nothing has to
//! give way here.

use kvbm_shm::PoolMemory;

use crate::ledger::{OffloadBatch, OnboardBatch, Place};
use crate::manager::Shared;
use crate::store::{MappedBlocks, Pace, RangeCopy};

/// False: they do not count.
pub(super) fn offload(
    shared: &Shared,
    memory: &PoolMemory,
    blocks: &MappedBlocks,
    batch: &OffloadBatch,
) -> bool {
    let segments = shared.host.segments();
    let host = |place: Place| (&segments[place.segment.0 as usize], place.offset(batch.stride()));
    let ranges: Vec<RangeCopy<'_>> = batch
        .copies()
        .flat_map(|(block, place)| {
            let (host, offset) = host(place);
            blocks.ranges(block, host, offset)
        })
        .collect();
    let pace = if batch.pressed { Pace::Full } else { Pace::Background };
    let copied = blocks.memory.copy_out(pace, &ranges);
    if let Err(reason) = &copied {
        tracing::warn!(pool = batch.pool.0, reason, "blocks cannot be copied out of a GPU");
    }
    shared.copy_delay(batch.copies().len());
    copied.is_ok() && memory.epoch() == batch.epoch
}

/// False: not all of them arrived.
pub(super) fn onboard(
    shared: &Shared,
    memory: &PoolMemory,
    blocks: &MappedBlocks,
    batch: &OnboardBatch,
) -> bool {
    // The writer quarantines targets whose copy it did not see ending, so writing late does no harm; not writing is still
    // better.
    if memory.epoch() != batch.epoch {
        return false;
    }
    let segments = shared.host.segments();
    let ranges: Vec<RangeCopy<'_>> = batch
        .copies()
        .flat_map(|(place, block)| {
            let host = &segments[place.segment.0 as usize];
            blocks.ranges(block, host, place.offset(batch.stride()))
        })
        .collect();
    let copied = blocks.memory.copy_in(&ranges);
    if let Err(reason) = &copied {
        tracing::warn!(reason, "blocks cannot be copied into a GPU");
    }
    shared.copy_delay(batch.copies().len());
    copied.is_ok()
}
