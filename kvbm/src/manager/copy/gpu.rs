//! Copies of owned pools whose blocks are on a GPU: the GPU's copy engine moves them.
//!
//! The rule of the epoch is that of every owned pool: bytes that were copied out count only if it is afterwards what it was
//! when the copy was planned. Copies in both directions run side by side, each on streams of its own, so that nothing has to
//! give way here.

use kvbm_shm::PoolMemory;

use super::still_as_planned;
use crate::ledger::{OffloadBatch, OnboardBatch, OnboardFrom, Place};
use crate::manager::Shared;
use crate::store::{MappedBlocks, OwnedPool, Pace, RangeCopy};

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
    pool: &OwnedPool,
    blocks: &MappedBlocks,
    peer: Option<&OwnedPool>,
    batch: &OnboardBatch,
) -> bool {
    // The writer quarantines targets whose copy it did not see ending, so writing late does no harm; not writing is still
    // better.
    if pool.memory.epoch() != batch.epoch || !still_as_planned(peer, batch) {
        return false;
    }
    let copied = match peer {
        None => from_host(shared, blocks, batch),
        Some(peer) => from_peer(peer, blocks, batch),
    };
    if let Err(reason) = &copied {
        tracing::warn!(reason, "blocks cannot be copied into a GPU");
    }
    shared.copy_delay(batch.copies().len());
    copied.is_ok() && still_as_planned(peer, batch)
}

fn from_host(shared: &Shared, blocks: &MappedBlocks, batch: &OnboardBatch) -> Result<(), String> {
    let segments = shared.host.segments();
    let in_host = batch.copies().filter_map(|(from, block)| match from {
        OnboardFrom::Host(place) => Some((place, block)),
        OnboardFrom::Peer(_) => None,
    });
    let ranges: Vec<RangeCopy<'_>> = in_host
        .flat_map(|(place, block)| {
            let host = &segments[place.segment.0 as usize];
            blocks.ranges(block, host, place.offset(batch.stride()))
        })
        .collect();
    blocks.memory.copy_in(&ranges)
}

fn from_peer(peer: &OwnedPool, blocks: &MappedBlocks, batch: &OnboardBatch) -> Result<(), String> {
    let Some(source) = &peer.gpu else { return Err("the other pool is in memory of the host".into()) };
    let pairs = batch.copies().filter_map(|(from, to)| match from {
        OnboardFrom::Peer(from) => Some((from, to)),
        OnboardFrom::Host(_) => None,
    });
    blocks.copy_from(source, pairs)
}
