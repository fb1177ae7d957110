//! What the link to the device gives by itself: blocks of the same size, all over host memory, in one raw batch.

use std::sync::Arc;
use std::time::Instant;

use kvbm_cuda::copy_engine::{CopyBatch, CopyMemory, Direction, LaneId, RawCopies, RawMethod, Urgency};
use kvbm_cuda::{Context, DeviceMemory, Driver, RegisteredMemory};
use kvbm_shm::{Copies, SharedMemory};

/// Copied at a time.
const BYTES: usize = 1 << 30;
const BYTES_ON_CPU: usize = 64 << 20;
/// The best counts.
const ROUNDS: usize = 5;

/// In one direction, at best.
pub(super) fn bytes_per_second(
    device: &str,
    block_bytes: usize,
    direction: Direction,
) -> Result<f64, String> {
    let text = |error: kvbm_cuda::Error| error.to_string();
    if device == "cpu" {
        return on_cpu(block_bytes);
    }
    let driver = Driver::load().map_err(text)?;
    let name = device.parse().map_err(text)?;
    let context = Context::open(&driver, &driver.device(&name).map_err(text)?).map_err(text)?;
    let blocks = (BYTES / block_bytes).max(1);
    let bytes = blocks * block_bytes.next_multiple_of(4096);
    let host = host(bytes)?;
    let host = CopyMemory::Registered(Arc::new(RegisteredMemory::new(&context, host).map_err(text)?));
    let there = CopyMemory::Device(Arc::new(DeviceMemory::allocate(&context, bytes).map_err(text)?));
    let mut batch = CopyBatch::new(direction, LaneId(0), Urgency::Demanded, |_| ());
    let stride = block_bytes.next_multiple_of(4096);
    for block in 0..blocks {
        let (here, there) = ((&host, scattered(block, blocks) * stride), (&there, block * stride));
        match direction {
            Direction::Onboard => batch.copy(here, there, block_bytes),
            Direction::Offload => batch.copy(there, here, block_bytes),
        }
    }
    let mut raw = RawCopies::new(&driver, &context).map_err(text)?;
    let mut best = f64::MAX;
    let batches = [batch];
    for _ in 0..ROUNDS {
        best = best.min(raw.run(RawMethod::Batch, &batches).map_err(text)?.as_secs_f64());
    }
    Ok((blocks * block_bytes) as f64 / best)
}

fn on_cpu(block_bytes: usize) -> Result<f64, String> {
    let stride = block_bytes.next_multiple_of(4096);
    let blocks = (BYTES_ON_CPU / block_bytes).max(1);
    let (from, to) = (host(blocks * stride)?, host(blocks * stride)?);
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let started = Instant::now();
        let copies = Copies::default();
        for block in 0..blocks {
            let place = (&*to, block * stride);
            from.copy_in(&copies, scattered(block, blocks) * stride, place, block_bytes, None);
        }
        drop(copies);
        best = best.min(started.elapsed().as_secs_f64());
    }
    Ok((blocks * block_bytes) as f64 / best)
}

fn host(bytes: usize) -> Result<Arc<SharedMemory>, String> {
    let memory = SharedMemory::create("bench-host", bytes).map_err(|error| error.to_string())?;
    memory.populate(0..bytes).map_err(|error| error.to_string())?;
    Ok(Arc::new(memory))
}

/// Another block for each, no two neighbours.
fn scattered(block: usize, blocks: usize) -> usize {
    let odd = (blocks / 3) | 1;
    let step = (0..).map(|more| odd + 2 * more).find(|step| gcd(*step, blocks) == 1).unwrap_or(1);
    block * step % blocks
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_is_copied_once() {
        for blocks in [1, 2, 7, 256, 1000] {
            let mut seen: Vec<usize> = (0..blocks).map(|block| scattered(block, blocks)).collect();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..blocks), "{blocks}");
        }
    }
}
