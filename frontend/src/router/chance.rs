//! Random numbers for choices and seeds: nobody may depend on them, so they need not be secret.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A sequence that differs from process to process.
#[derive(Debug)]
pub struct Chance(AtomicU64);

impl Default for Chance {
    fn default() -> Self {
        // The standard library's only source of randomness: keys of a fresh hasher.
        Self(AtomicU64::new(RandomState::new().hash_one(std::process::id())))
    }
}

impl Chance {
    /// Any number.
    pub fn bits(&self) -> u64 {
        // splitmix64.
        let mut z = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `[0, 1)`.
    pub fn unit(&self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Below `end`, which is not 0.
    pub fn below(&self, end: usize) -> usize {
        ((u128::from(self.bits()) * end as u128) >> 64) as usize
    }
}
