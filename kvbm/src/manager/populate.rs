//! Populates host memory in the background, segment by segment.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Instant;

use super::Shared;
use crate::store::{OwnedPool, SegmentNodes};

/// Populating is bound by the kernel zeroing pages: a few threads help on large machines, more do not.
const THREADS_MAX: usize = 8;

/// Populated in one call to the kernel, so that stopping does not take long.
const POOL_PIECE_BYTES: usize = 64 << 20;

/// Returns when all segments are there, or the first could not be had.
pub(super) fn run(shared: &Shared, there: u32, count: u32, segment_bytes: usize) {
    let started = Instant::now();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicU32::new(there);
    let nodes = SegmentNodes::new(&shared.config.gpu_nodes);
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count || !add_segment(shared, segment_bytes, nodes.node_of(number)) {
                return;
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..(cores / 4).clamp(1, THREADS_MAX) {
            scope.spawn(work);
        }
        work();
    });
    let segments = shared.host.count();
    tracing::info!(
        segments,
        segment_bytes,
        seconds = started.elapsed().as_secs_f64(),
        "host memory is populated"
    );
}

/// Populates a device pool, so that neither its first writer nor the first copy out of it faults page by page.
/// If it is a GPU's, the memory that is copied from and to is that of the host tier.
pub(super) fn run_pool(shared: &Shared, pool: &OwnedPool) {
    if pool.gpu.is_some() {
        let segments = shared.host.segments();
        return segments.iter().take_while(|_| !shared.is_stopping()).for_each(|host| pool.prepare(host));
    }
    let memory = pool.memory.memory();
    for start in (0..memory.bytes()).step_by(POOL_PIECE_BYTES) {
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        if let Err(error) = memory.populate(start..(start + POOL_PIECE_BYTES).min(memory.bytes())) {
            tracing::error!(%error, "a device pool cannot be populated");
            return;
        }
    }
}

fn add_segment(shared: &Shared, bytes: usize, node: Option<u32>) -> bool {
    let stopping = || shared.stopping.load(Ordering::SeqCst);
    match shared.host.add(bytes, node, stopping) {
        Ok(Some(segment)) => {
            let memory = Arc::clone(&shared.host.segments()[segment.0 as usize]);
            if let Some(Err(error)) = shared.warm.as_ref().map(|warm| warm.add(segment, &memory)) {
                tracing::warn!(%error, "a host segment will not outlive the daemon");
            }
            if let Some(store) = shared.disk.as_ref().and_then(|tier| tier.store()) {
                store.register(&memory);
            }
            shared.pools.all().iter().for_each(|pool| pool.prepare(&memory));
            shared.engines.prepare(&memory);
            shared.with_ledger(|ledger, _| ledger.add_segment_on(segment, node));
            shared.engines.segments_changed();
            true
        }
        Ok(None) => false,
        Err(error) => {
            tracing::error!(%error, "host memory is smaller than configured");
            *shared.host_error.lock() = Some(error.to_string());
            false
        }
    }
}
