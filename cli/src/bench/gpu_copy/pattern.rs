//! Bytes that are different for every block and every place in it.

use std::sync::atomic::{AtomicUsize, Ordering};

use kvbm_shm::SharedMemory;

/// Bytes that are made and compared at a time: they stay in a cache.
const PIECE: usize = 16 << 10;

/// The bytes of a piece of a block.
fn piece(seed: u64, block: usize, at: usize) -> [u8; PIECE] {
    let mut bytes = [0; PIECE];
    let start = (seed << 32 | block as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    for (i, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        *word = start.wrapping_mul(2 * (at / 8 + i) as u64 + 1).to_le_bytes();
    }
    bytes
}

/// Writes a block to an offset.
pub(super) fn fill(seed: u64, block: usize, block_bytes: usize, memory: &SharedMemory, offset: usize) {
    for at in (0..block_bytes).step_by(PIECE) {
        memory.write(offset + at, &piece(seed, block, at));
    }
}

/// True if the bytes at an offset are those of a block.
pub(super) fn holds(
    seed: u64,
    block: usize,
    block_bytes: usize,
    memory: &SharedMemory,
    offset: usize,
) -> bool {
    let mut seen = [0; PIECE];
    (0..block_bytes).step_by(PIECE).all(|at| {
        memory.read(offset + at, &mut seen);
        seen == piece(seed, block, at)
    })
}

/// Does something for each number below `count`, on all cores. The first error ends it.
pub(super) fn in_parallel(
    count: usize,
    each: impl Fn(usize) -> Result<(), String> + Sync,
) -> Result<(), String> {
    let next = AtomicUsize::new(0);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(count.max(1));
    std::thread::scope(|scope| {
        let work = || {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return Ok(());
                }
                each(number).inspect_err(|_| next.store(count, Ordering::Relaxed))?;
            }
        };
        let all: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        all.into_iter().try_for_each(|thread| thread.join().expect("the work does not panic"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flipped_bit_and_a_block_in_the_wrong_place_are_noticed() {
        let block = 2 * PIECE;
        let memory = SharedMemory::create("test", 2 * block).unwrap();
        fill(1, 7, block, &memory, block);
        assert!(holds(1, 7, block, &memory, block));
        assert!(!holds(1, 8, block, &memory, block) && !holds(2, 7, block, &memory, block));
        let mut byte = [0];
        memory.read(2 * block - 1, &mut byte);
        memory.write(2 * block - 1, &[byte[0] ^ 0x80]);
        assert!(!holds(1, 7, block, &memory, block));
    }

    #[test]
    fn every_number_is_done_once_and_an_error_is_told() {
        let sum = AtomicUsize::new(0);
        in_parallel(1000, |number| {
            sum.fetch_add(number, Ordering::Relaxed);
            Ok(())
        })
        .unwrap();
        assert_eq!(sum.into_inner(), 999 * 1000 / 2);
        let failed = in_parallel(10, |number| if number == 3 { Err("third".into()) } else { Ok(()) });
        assert_eq!(failed, Err("third".into()));
        assert_eq!(in_parallel(0, |_| Err("none".into())), Ok(()));
    }
}
