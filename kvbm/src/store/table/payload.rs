//! The check of a block's bytes.

use crc_fast::{CrcAlgorithm, Digest};
use kvbm_shm::SharedMemory;

use super::fields::put;

/// CRC-64/NVME over whose block it is, which time it was stored, how long it is, and its bytes: right bytes in the wrong
/// place do not count as right.
pub fn payload_check(
    namespace: &[u8; 32],
    key: &[u8; 16],
    generation: u64,
    memory: &SharedMemory,
    offset: usize,
    bytes: usize,
) -> u64 {
    let mut identity = [0; 64];
    put(&mut identity, 0, namespace);
    put(&mut identity, 32, key);
    put(&mut identity, 48, &generation.to_le_bytes());
    put(&mut identity, 56, &(bytes as u64).to_le_bytes());
    let mut digest = Digest::new(CrcAlgorithm::Crc64Nvme);
    digest.update(&identity);
    memory.for_each_piece(offset, bytes, |piece| digest.update(piece));
    digest.finalize()
}
