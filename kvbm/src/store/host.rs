//! Host segments: sealed memfds of equal size, populated in the background.
//!
//! A segment is shown to the ledger only when its pages are there, so a slot never faults and a daemon with little
//! memory left finds out here and not in the middle of a copy.

use std::sync::Arc;

use kvbm_shm::{Error, LARGE_PAGE, SharedMemory};
use parking_lot::RwLock;

use crate::ledger::SegmentId;

/// io_uring registers buffers of at most 1 GiB.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// Enough segments that several models can share even a small tier.
const SEGMENTS_WANTED: u64 = 64;
/// Below this a segment is not worth its descriptor.
const SEGMENT_BYTES_WANTED: u64 = 64 << 20;
/// Populated in one call to the kernel, so that stopping does not take long.
const POPULATE_BYTES: usize = 64 << 20;

/// How a capacity is cut: number and size of the equal segments. Nothing at all for less than a page.
///
/// They are of whole large pages, unless they are tiny: io_uring takes the pages of a buffer as large only if all of them
/// are, and 1 MiB in small ones is more than drives take at once.
pub(crate) fn segment_plan(capacity_bytes: u64) -> (u32, usize) {
    let wanted = (capacity_bytes / SEGMENTS_WANTED).clamp(SEGMENT_BYTES_WANTED, SEGMENT_BYTES_MAX);
    let wanted = wanted.min((capacity_bytes / 4).max(4096));
    let large = LARGE_PAGE as u64;
    let page = if wanted >= 8 * large { large } else { 4096 };
    let pages = capacity_bytes / page;
    let fewest = pages.div_ceil(wanted / page);
    // A little more of them, where equal segments would leave out much.
    let left_out = |count: &u64| pages % count;
    let counts = || fewest.max(1)..=2 * fewest;
    let count =
        counts().find(|count| left_out(count) * 200 <= pages).or_else(|| counts().min_by_key(left_out));
    match count {
        Some(count @ 1..) => (count as u32, (pages / count * page) as usize),
        _ => (0, 4096),
    }
}

/// All segments at some time; more may come, none goes.
pub(crate) type Segments = Arc<Vec<Arc<SharedMemory>>>;

/// The memory of the host tier.
#[derive(Debug, Default)]
pub(crate) struct HostSegments(RwLock<Segments>);

impl HostSegments {
    /// Makes one more segment and populates it, on a node of the machine's memory if one is named and has room; gives up
    /// early, with `None`, when `stop` says so.
    pub fn add(
        &self,
        bytes: usize,
        node: Option<u32>,
        stop: impl Fn() -> bool,
    ) -> Result<Option<SegmentId>, Error> {
        let memory = SharedMemory::create("kvbm-host", bytes)?;
        // Containers often forbid it: then the kernel chooses, which costs some speed and nothing else.
        if let Some(Err(error)) = node.map(|node| memory.prefer_node(node)) {
            tracing::debug!(%error, node, "a host segment lies where the kernel likes");
        }
        for start in (0..bytes).step_by(POPULATE_BYTES) {
            if stop() {
                return Ok(None);
            }
            let piece = start..(start + POPULATE_BYTES).min(bytes);
            // Drives read into large pages three times as fast as into scattered small ones, engines map them with fewer
            // faults, and zeroing them takes less.
            memory.gather(piece.clone());
            memory.populate(piece)?;
        }
        let mut segments = self.0.write();
        Arc::make_mut(&mut segments).push(Arc::new(memory));
        Ok(Some(SegmentId(segments.len() as u32 - 1)))
    }

    /// One more segment, which an earlier daemon made.
    pub fn adopt(&self, memory: Arc<SharedMemory>) -> SegmentId {
        let mut segments = self.0.write();
        Arc::make_mut(&mut segments).push(memory);
        SegmentId(segments.len() as u32 - 1)
    }

    /// The segments there are: any place that the ledger has named is in one of them.
    pub fn segments(&self) -> Segments {
        Arc::clone(&self.0.read())
    }

    /// Segments populated so far.
    pub fn count(&self) -> usize {
        self.0.read().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capacity_is_used_almost_whole_in_equal_pages_aligned_segments() {
        for capacity in [1_000_000_000u64, 60_000_000_000, 250_000_000, 1 << 40, 5_000_000] {
            let (count, bytes) = segment_plan(capacity);
            let total = u64::from(count) * bytes as u64;
            assert!(
                total <= capacity && total as f64 > capacity as f64 * 0.99,
                "{capacity}: {count} x {bytes}"
            );
            assert!(count >= 4 && bytes % 4096 == 0 && bytes as u64 <= SEGMENT_BYTES_MAX);
            assert!(count <= 128 || capacity > 1 << 36);
            assert!(bytes % LARGE_PAGE == 0 || capacity < 1 << 26, "{capacity}: {bytes}");
        }
        assert_eq!(segment_plan(0).0, 0);
        assert_eq!(segment_plan(4095).0, 0);
    }
}
