//! What is done for the disk in quiet moments: entries are made durable, blocks are looked at before anybody asks.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use kvbm_shm::SharedMemory;

use super::flow::disk_place;
use super::{DiskTier, Shared};
use crate::ledger::{BatchLimit, Promoted, ScrubItem};
use crate::store::disk::{DiskRead, DiskStore};

/// How often there may be something to do.
const TURN: Duration = Duration::from_millis(100);
/// What was written is durable after this long and the time that a flush takes, when there is nothing more to write.
const FLUSH_IDLE: Duration = Duration::from_millis(500);
/// The same as long as there is more: the least and the most.
const FLUSH_BUSY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));
/// A drive that flushes writes nothing else. Of the time in which there is more to write, one part in so many is for flushes:
/// drives that keep what they were given when the power goes flush in no time, others need a tenth of a second.
const FLUSH_SHARE: u32 = 50;
/// Blocks in one acquisition of the ledger's lock.
const BLOCKS_AT_ONCE: usize = 256;
/// Memory for blocks that are looked at; larger ones are only looked at when they are wanted.
const SCRATCH_BYTES: usize = 16 << 20;

/// Until the manager stops.
pub(super) fn run(shared: &Shared, tier: &DiskTier) {
    let mut flushed = Instant::now();
    let mut flush_cost = Duration::ZERO;
    let mut scrub = Scrub::default();
    while !shared.stopping.load(Ordering::SeqCst) {
        thread::sleep(TURN);
        let Some(store) = tier.store().filter(|_| tier.is_on()) else { continue };
        let is_busy = tier.demotes.len() > 0;
        if flushed.elapsed() >= if is_busy { busy_interval(flush_cost) } else { FLUSH_IDLE } {
            flushed = Instant::now();
            if let Err(failure) = store.flush() {
                shared.disk_fault(tier, &format!("flush to disk: {failure}"));
            }
            if is_busy {
                flush_cost = flushed.elapsed();
            }
        }
        scrub.turn(shared, tier, &store);
    }
}

/// How long after a flush the next is due while there is more to write, by what one cost.
fn busy_interval(cost: Duration) -> Duration {
    (cost * FLUSH_SHARE).clamp(FLUSH_BUSY.0, FLUSH_BUSY.1)
}

/// Reads what is on disk, round and round.
#[derive(Default)]
struct Scrub {
    scratch: Option<Arc<SharedMemory>>,
    /// Bytes that may be read now.
    credit: u64,
}

impl Scrub {
    fn turn(&mut self, shared: &Shared, tier: &DiskTier, store: &DiskStore) {
        let per_turn = tier.config.scrub_bytes_per_second * TURN.as_millis() as u64 / 1000;
        self.credit = (self.credit + per_turn).min((SCRATCH_BYTES as u64).max(per_turn));
        let busy = tier.promotes.len() + tier.demotes.len() > 0;
        if busy || self.credit < SCRATCH_BYTES as u64 {
            return;
        }
        let Some(scratch) = self.scratch() else { return };
        let limit = BatchLimit { blocks: BLOCKS_AT_ONCE, bytes: SCRATCH_BYTES };
        let (items, large): (Vec<_>, Vec<_>) = shared
            .with_ledger(|ledger, _| ledger.next_scrub(limit))
            .into_iter()
            .partition(|item| item.stride() <= SCRATCH_BYTES);
        let read = |(i, item): (usize, &ScrubItem)| DiskRead {
            place: disk_place(item.place),
            namespace: item.namespace,
            key: item.key.0,
            target: Arc::clone(&scratch),
            target_offset: i * item.stride(),
            bytes: item.stride(),
        };
        let reads: Vec<DiskRead> = items.iter().enumerate().map(read).collect();
        let results = store.read(&reads);
        let outcomes = shared.judge(tier, store, &reads, &results);
        let bytes: u64 = items.iter().map(|item| item.stride() as u64).sum();
        self.credit -= bytes.min(self.credit);
        tier.scrubbed_bytes.fetch_add(bytes, Ordering::Relaxed);
        let corrupt = outcomes.iter().filter(|outcome| **outcome == Promoted::Corrupt).count();
        tier.corrupt.fetch_add(corrupt as u64, Ordering::Relaxed);
        let looked_at =
            items.into_iter().zip(outcomes).map(|(item, outcome)| (item, outcome != Promoted::Corrupt));
        let looked_at = looked_at.chain(large.into_iter().map(|item| (item, true))).collect();
        shared.with_ledger(|ledger, now| ledger.finish_scrub(looked_at, now));
    }

    fn scratch(&mut self) -> Option<Arc<SharedMemory>> {
        if self.scratch.is_none() {
            match SharedMemory::create("kvbm-scrub", SCRATCH_BYTES) {
                Ok(memory) => self.scratch = Some(Arc::new(memory)),
                Err(error) => {
                    tracing::warn!(%error, "blocks on disk are only looked at when they are wanted")
                }
            }
        }
        self.scratch.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drive_for_which_flushing_is_dear_flushes_less_often_but_within_seconds() {
        let millis = Duration::from_millis;
        assert_eq!(busy_interval(Duration::ZERO), millis(1000));
        assert_eq!(busy_interval(millis(20)), millis(1000));
        assert_eq!(busy_interval(millis(60)), millis(3000));
        assert_eq!(busy_interval(millis(1260)), millis(5000));
    }
}
