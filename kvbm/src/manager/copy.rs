//! The threads that copy, and what they report.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

mod gpu;

use kvbm_shm::{Copies, PoolMemory};

use super::{Done, Outcome, PIECE_BLOCKS, Shared};
use crate::error::Refused;
use crate::ledger::{OffloadBatch, OnboardBatch, OnboardFrom, OnboardPart};
use crate::store::OwnedPool;
use crate::tier::Route;

/// Device to host.
pub(super) struct OffloadJob {
    pub batch: OffloadBatch,
    pub pool: Arc<OwnedPool>,
}

/// Host to device.
pub(super) struct OnboardJob {
    pub batch: OnboardBatch,
    pub pool: Arc<OwnedPool>,
    /// Where the blocks are, if that is not host memory.
    pub peer: Option<Arc<OwnedPool>>,
    pub tokens_per_block: u32,
    pub done: Done,
}

/// An offload whose bytes are done with.
pub(super) struct OffloadEnd {
    batch: OffloadBatch,
    copied: bool,
    bytes: u64,
    took: Duration,
}

/// Copies. What follows from a copy is decided by [`settle_offloads`], while the next is under way.
pub(super) fn run_offloads(shared: &Shared, ends: &SyncSender<OffloadEnd>) {
    while let Some(OffloadJob { batch, pool }) = shared.offloads.next() {
        let started = Instant::now();
        if let Some(warm) = &shared.warm {
            warm.clear(batch.copies().map(|(_, place)| place));
        }
        // When stopping, nobody will read what is copied now.
        let copied = !shared.is_stopping()
            && match &pool.gpu {
                None => offload(shared, &pool.memory, &batch),
                Some(blocks) => gpu::offload(shared, &pool.memory, blocks, &batch),
            };
        let bytes = (batch.copies().len() * pool.memory.layout().block_bytes) as u64;
        let end = OffloadEnd { batch, copied, bytes, took: started.elapsed() };
        ends.send(end).expect("the thread that settles ends after this one");
    }
}

/// False: they do not count.
fn offload(shared: &Shared, memory: &PoolMemory, batch: &OffloadBatch) -> bool {
    let (layout, segments) = (memory.layout(), shared.host.segments());
    let copies = Copies::default();
    let mut rest = batch.copies().peekable();
    while let Some((block, place)) = rest.next() {
        shared.gate.give_way();
        let to = (&*segments[place.segment.0 as usize], place.offset(batch.stride()));
        let next = rest.peek().map(|(block, _)| layout.offset(*block));
        memory.memory().copy_in(&copies, layout.offset(block), to, layout.block_bytes, next);
        shared.copy_delay(1);
        // Checked after each block: once it moved, the rest is not worth copying.
        if memory.epoch() != batch.epoch {
            return false;
        }
    }
    true
}

pub(super) fn settle_offloads(shared: &Shared, ends: &Receiver<OffloadEnd>) {
    while let Ok(OffloadEnd { batch, copied, bytes, took }) = ends.recv() {
        if let Some(warm) = shared.warm.as_ref().filter(|_| copied) {
            warm.set(batch.stride(), batch.stored());
        }
        shared.with_ledger(|ledger, now| {
            let copies = batch.copies().len().max(1);
            let stored = ledger.finish_offload(batch, copied, now);
            if copied {
                let stored_bytes = bytes / copies as u64 * stored as u64;
                shared.counters.moved(Route::DeviceToHost, stored, stored_bytes, took);
            } else {
                shared.counters.failed(Route::DeviceToHost);
            }
        });
        shared.offloads.finished();
    }
}

/// Some blocks of an onboard whose bytes are done with.
pub(super) struct OnboardEnd {
    part: OnboardPart,
    copied: bool,
    /// With the last part.
    last: Option<LastOnboard>,
}

struct LastOnboard {
    batch: OnboardBatch,
    route: Route,
    blocks: usize,
    bytes: u64,
    took: Duration,
    tokens_per_block: u32,
    done: Done,
}

/// Copies, part by part. Each part is settled by [`settle_onboards`] while the next is under way.
pub(super) fn run_onboards(shared: &Shared, ends: &SyncSender<OnboardEnd>) {
    while let Some(OnboardJob { mut batch, pool, peer, tokens_per_block, done }) = shared.onboards.next() {
        let started = Instant::now();
        let block_bytes = pool.memory.layout().block_bytes as u64;
        let blocks = batch.copies().len();
        let mut copied = match &pool.gpu {
            None => true,
            // As a whole: settling takes little beside that.
            Some(on_gpu) => gpu::onboard(shared, &pool, on_gpu, peer.as_deref(), &batch),
        };
        let settle = |end| ends.send(end).expect("the thread that settles ends after this one");
        loop {
            let last = batch.copies().len() <= PIECE_BLOCKS;
            let part = batch.take_part(PIECE_BLOCKS);
            if pool.gpu.is_none() {
                copied = copied && copy_part(shared, &pool.memory, batch.epoch, &part);
            }
            if last {
                shared.gate.leave();
                let (bytes, took) = (blocks as u64 * block_bytes, started.elapsed());
                let route = if peer.is_some() { Route::DeviceToDevice } else { Route::HostToDevice };
                let last = LastOnboard { batch, route, blocks, bytes, took, tokens_per_block, done };
                break settle(OnboardEnd { part, copied, last: Some(last) });
            }
            settle(OnboardEnd { part, copied, last: None });
        }
    }
}

fn copy_part(shared: &Shared, memory: &PoolMemory, epoch: u64, part: &OnboardPart) -> bool {
    let (layout, segments) = (memory.layout(), shared.host.segments());
    let copies = Copies::default();
    for (from, block) in part.copies() {
        // The writer quarantines targets whose copy it did not see ending, so writing late does no harm; not writing
        // is still better.
        if memory.epoch() != epoch {
            return false;
        }
        let OnboardFrom::Host(place) = from else {
            unreachable!("pools in memory of the host are not connected to others")
        };
        let from = &segments[place.segment.0 as usize];
        let to = (&**memory.memory(), layout.offset(block));
        from.copy_in(&copies, place.offset(part.stride()), to, layout.block_bytes, None);
        shared.copy_delay(1);
    }
    true
}

/// What was copied out of another pool counts only if its writer has not gone its own way meanwhile.
fn still_as_planned(peer: Option<&OwnedPool>, batch: &OnboardBatch) -> bool {
    let source = peer.zip(batch.peer);
    source.is_none_or(|(pool, planned)| pool.memory.epoch() == planned.epoch)
}

pub(super) fn settle_onboards(shared: &Shared, ends: &Receiver<OnboardEnd>) {
    while let Ok(OnboardEnd { part, copied, last }) = ends.recv() {
        shared.with_ledger(|ledger, now| ledger.finish_onboard_part(part, copied, now));
        let Some(LastOnboard { batch, route, blocks, bytes, took, tokens_per_block, done }) = last else {
            continue;
        };
        shared.with_ledger(|ledger, now| {
            ledger.finish_onboard(batch, copied, now);
            if copied {
                shared.counters.moved(route, blocks, bytes, took);
                shared.counters.matched(blocks as u64 * u64::from(tokens_per_block));
            } else {
                shared.counters.failed(route);
            }
        });
        shared.onboards.finished();
        done(if copied {
            Outcome { blocks_done: blocks, blocks_failed: 0, bytes, error: None }
        } else {
            let error = Some(Refused::Stale { what: "epoch" });
            Outcome { blocks_done: 0, blocks_failed: blocks, bytes: 0, error }
        });
    }
}

impl Shared {
    /// For drills: as if each of so many blocks had taken longer.
    pub(super) fn copy_delay(&self, blocks: usize) {
        if !self.config.copy_delay.is_zero() {
            thread::sleep(self.config.copy_delay * u32::try_from(blocks).unwrap_or(u32::MAX));
        }
    }
}
