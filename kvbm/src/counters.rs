//! Figures that are counted when a device or the kernel reported completion, never when something was issued.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use parking_lot::Mutex;

use crate::tier::{Route, Tier};

/// Counts durations in buckets of fixed width on a logarithmic scale.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [AtomicU64; Self::BOUNDS.len() + 1],
    nanoseconds: AtomicU64,
}

impl Histogram {
    /// Upper bounds of the buckets, seconds; one more bucket is without bound.
    pub const BOUNDS: [f64; 14] =
        [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0];

    /// Counts one duration.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = Self::BOUNDS.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.nanoseconds.fetch_add(took.as_nanos().try_into().unwrap_or(u64::MAX), Relaxed);
    }

    /// Observations per bucket (not cumulated), the last one without bound.
    pub fn buckets(&self) -> [u64; Self::BOUNDS.len() + 1] {
        std::array::from_fn(|i| self.buckets[i].load(Relaxed))
    }

    /// Sum of all durations, seconds.
    pub fn seconds(&self) -> f64 {
        self.nanoseconds.load(Relaxed) as f64 / 1e9
    }
}

/// Requests that the hit rate looks back on.
const HIT_WINDOW: usize = 1000;

/// What one request asked for behind the device's blocks, and what was found, in blocks.
#[derive(Debug, Clone, Copy, Default)]
struct Lookup {
    host: usize,
    disk: usize,
    wanted: usize,
}

/// All counters of a manager. Blocks, bytes and tokens since its start.
#[derive(Debug, Default)]
pub struct Counters {
    blocks: [AtomicU64; Route::ALL.len()],
    bytes: [AtomicU64; Route::ALL.len()],
    failed_batches: [AtomicU64; Route::ALL.len()],
    seconds: [Histogram; Route::ALL.len()],
    busy: [AtomicU64; Self::QUEUES.len()],
    matched_tokens: AtomicU64,
    lock_held: Histogram,
    lookups: Mutex<VecDeque<Lookup>>,
}

impl Counters {
    /// Names of the bounded queues, as `Busy` and the metrics call them.
    pub const QUEUES: [&'static str; 6] = ["offload", "onboard", "adoptions", "promote", "load", "fences"];

    pub(crate) fn moved(&self, route: Route, blocks: usize, bytes: u64, took: Duration) {
        self.blocks[route.index()].fetch_add(blocks as u64, Relaxed);
        self.bytes[route.index()].fetch_add(bytes, Relaxed);
        self.seconds[route.index()].observe(took);
    }

    /// Blocks that an engine has brought to host memory by itself.
    pub(crate) fn staged(&self, blocks: usize, bytes: u64) {
        let route = Route::DeviceToHost.index();
        self.blocks[route].fetch_add(blocks as u64, Relaxed);
        self.bytes[route].fetch_add(bytes, Relaxed);
    }

    pub(crate) fn failed(&self, route: Route) {
        self.failed_batches[route.index()].fetch_add(1, Relaxed);
    }

    pub(crate) fn was_busy(&self, queue: &str) {
        if let Some(i) = Self::QUEUES.iter().position(|name| *name == queue) {
            self.busy[i].fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn matched(&self, tokens: u64) {
        self.matched_tokens.fetch_add(tokens, Relaxed);
    }

    pub(crate) fn held(&self, took: Duration) {
        self.lock_held.observe(took);
    }

    pub(crate) fn looked_up(&self, host: usize, disk: usize, wanted: usize) {
        let mut window = self.lookups.lock();
        if window.len() == HIT_WINDOW {
            window.pop_front();
        }
        window.push_back(Lookup { host, disk, wanted });
    }

    /// Blocks that arrived.
    pub fn blocks(&self, route: Route) -> u64 {
        self.blocks[route.index()].load(Relaxed)
    }

    /// Bytes that arrived.
    pub fn bytes(&self, route: Route) -> u64 {
        self.bytes[route.index()].load(Relaxed)
    }

    /// Batches whose bytes did not count in the end.
    pub fn failed_batches(&self, route: Route) -> u64 {
        self.failed_batches[route.index()].load(Relaxed)
    }

    /// Time from start to end of each batch.
    pub fn seconds(&self, route: Route) -> &Histogram {
        &self.seconds[route.index()]
    }

    /// Times a bounded queue was full, by name.
    pub fn busy(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        Self::QUEUES.iter().zip(&self.busy).map(|(name, count)| (*name, count.load(Relaxed)))
    }

    /// Tokens that were found outside the device and brought there.
    pub fn matched_tokens(&self) -> u64 {
        self.matched_tokens.load(Relaxed)
    }

    /// How long the ledger's lock was held.
    pub fn lock_held(&self) -> &Histogram {
        &self.lock_held
    }

    /// Share of the blocks asked for behind the device's that a tier had, over the last 1000 requests; 0 before the
    /// first.
    pub fn hit_rate(&self, tier: Tier) -> f64 {
        let found = |lookup: &Lookup| match tier {
            Tier::Host => lookup.host,
            Tier::Disk => lookup.disk,
            Tier::Device | Tier::Remote => 0,
        };
        let window = self.lookups.lock();
        let (found, wanted) =
            window.iter().fold((0, 0), |sum, lookup| (sum.0 + found(lookup), sum.1 + lookup.wanted));
        if wanted == 0 { 0.0 } else { found as f64 / wanted as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_falls_into_the_first_bucket_that_is_not_smaller() {
        let histogram = Histogram::default();
        histogram.observe(Duration::from_micros(1));
        histogram.observe(Duration::from_micros(2));
        histogram.observe(Duration::from_secs(60));
        let buckets = histogram.buckets();
        assert_eq!((buckets[0], buckets[1], buckets[14]), (1, 1, 1));
        assert!((histogram.seconds() - 60.000_003).abs() < 1e-9);
    }

    #[test]
    fn hit_rate_looks_back_a_thousand_requests() {
        let counters = Counters::default();
        assert_eq!(counters.hit_rate(Tier::Host), 0.0);
        (0..1000).for_each(|_| counters.looked_up(0, 1, 2));
        (0..500).for_each(|_| counters.looked_up(1, 1, 2));
        assert_eq!((counters.hit_rate(Tier::Host), counters.hit_rate(Tier::Disk)), (0.25, 0.5));
    }
}
