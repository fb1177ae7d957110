//! Bytes that are different for every block and every place in it, and in which order blocks are scattered.

use std::sync::Arc;

use kvbm_cuda::{Context, DeviceRange, RegisteredMemory};
use kvbm_shm::SharedMemory;

/// Fills `bytes` with those of a block.
pub fn fill(seed: u64, block: usize, bytes: &mut [u8]) {
    let start = (seed << 32 | block as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&start.wrapping_mul(2 * i as u64 + 1).to_le_bytes());
    }
}

pub fn block(seed: u64, block: usize, bytes: usize) -> Vec<u8> {
    let mut filled = vec![0; bytes];
    fill(seed, block, &mut filled);
    filled
}

/// The first difference of what is in a block from what should be there.
pub fn check(seed: u64, number: usize, seen: &[u8]) -> Result<(), String> {
    let expected = block(seed, number, seen.len());
    match seen.iter().zip(&expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => {
            Err(format!("block {number} differs at byte {at}: {} instead of {}", seen[at], expected[at]))
        }
    }
}

pub fn fill_device(memory: &dyn DeviceRange, seed: u64, block_bytes: usize) -> Result<(), String> {
    for number in 0..memory.bytes() / block_bytes {
        let bytes = block(seed, number, block_bytes);
        memory.write(number * block_bytes, &bytes).map_err(|error| error.to_string())?;
    }
    Ok(())
}

pub fn check_device(memory: &dyn DeviceRange, seed: u64, block_bytes: usize) -> Result<(), String> {
    let mut seen = vec![0; block_bytes];
    for number in 0..memory.bytes() / block_bytes {
        memory.read(number * block_bytes, &mut seen).map_err(|error| error.to_string())?;
        check(seed, number, &seen)?;
    }
    Ok(())
}

/// A permutation without locality.
pub fn scatter(count: usize, seed: u64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    let mut random = seed | 1;
    for i in (1..count).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        order.swap(i, (random % (i as u64 + 1)) as usize);
    }
    order
}

/// Populated and registered memory of the host.
pub fn host(context: &Context, bytes: usize) -> Result<Arc<RegisteredMemory>, String> {
    let memory = SharedMemory::create("gpu-test", bytes).map_err(|error| error.to_string())?;
    memory.populate(0..bytes).map_err(|error| error.to_string())?;
    let registered = RegisteredMemory::new(context, Arc::new(memory)).map_err(|error| error.to_string())?;
    Ok(Arc::new(registered))
}
