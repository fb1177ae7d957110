//! How fast tokens become keys.

use std::hint::black_box;
use std::time::{Duration, Instant};

use kvbm_hash::{Namespace, sequence_hashes};

use super::Row;

/// GB/s of token bytes at 32 tokens per block that the project demands.
const LIMIT: f64 = 0.5;
const TOKENS: usize = 1 << 16;
const ROUNDS: usize = 7;
const ROUND: Duration = Duration::from_millis(100);

pub(super) fn measure() -> Vec<Row> {
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i.wrapping_mul(2_654_435_761)).collect();
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    let measure_one = |size: usize| {
        let (mut ours, mut plain) = (0f64, 0f64);
        // Interleaved, so that both see the same machine; the best round of each.
        for _ in 0..ROUNDS {
            ours = ours.max(rate(|| {
                black_box(sequence_hashes(Namespace([7; 32]), size, black_box(&tokens)));
            }));
            plain = plain.max(rate(|| {
                for block in black_box(&bytes).chunks(size * 4) {
                    black_box(blake3::keyed_hash(&[7; 32], block));
                }
            }));
        }
        let row = Row::new(format!("hash.{size}"), ours, "GB/s").ceiling(plain);
        let row =
            row.detail(format!("one core, blocks of {size} tokens; ceiling: BLAKE3 of unchained blocks"));
        if size == 32 { row.at_least(LIMIT) } else { row }
    };
    [16, 32, 64].into_iter().map(measure_one).collect()
}

/// GB of token bytes per second.
fn rate(mut work: impl FnMut()) -> f64 {
    let started = Instant::now();
    let mut runs = 0;
    while started.elapsed() < ROUND {
        work();
        runs += 1;
    }
    (runs * TOKENS * 4) as f64 / started.elapsed().as_secs_f64() / 1e9
}
