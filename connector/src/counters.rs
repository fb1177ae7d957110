//! What the cache did, for metrics: any thread may read.

use std::sync::atomic::{AtomicU64, Ordering};

/// One number.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, to: u64) {
        self.0.store(to, Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Totals since the start, but for `quarantined_blocks` and `attached`.
#[derive(Debug, Default)]
pub struct Counters {
    /// Lookups answered by the daemon.
    pub matches: Counter,
    /// Lookups answered from the local table: detached, breaker open, refused or too late.
    pub local_matches: Counter,
    /// Lookups the daemon did not answer in time.
    pub match_timeouts: Counter,
    /// Matched blocks that were in the pool.
    pub device_blocks_matched: Counter,
    /// Times a lookup waited for blocks to come from disk.
    pub disk_waits: Counter,
    /// Such waits that ended before the blocks had come.
    pub disk_wait_timeouts: Counter,
    /// Host blocks that were found after such a wait, because of it.
    pub promoted_blocks: Counter,
    /// Times the engine stopped listening to the daemon.
    pub detaches: Counter,
    /// Times the daemon took the pool back.
    pub reattaches: Counter,
    /// Times it was offered the pool and did not take it.
    pub attach_failures: Counter,
    /// Blocks brought from host memory.
    pub onboarded_blocks: Counter,
    /// Onboards that did not deliver.
    pub onboard_failures: Counter,
    /// Blocks given to requests.
    pub allocated_blocks: Counter,
    /// Allocations for which nothing could be evicted.
    pub exhausted: Counter,
    /// Times the daemon said about a block what cannot be true.
    pub contradictions: Counter,
    /// Blocks in quarantine now.
    pub quarantined_blocks: Counter,
    /// 1 while attached.
    pub attached: Counter,
}
