//! Weights that are random numbers, the same on every machine and by whatever they are made.

use half::bf16;
use rayon::prelude::*;

/// A tensor of numbers in [-scale, scale), each a function of the tensor's seed and of its index only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct RandomTensor {
    pub seed: u64,
    pub scale: f32,
}

impl RandomTensor {
    /// The tensor of this name with so many columns. Products of its rows with numbers of variance 1 have variance 1.
    pub fn new(name: &str, columns: usize) -> Self {
        let digest = blake3::derive_key("kvbm v1 random weights", name.as_bytes());
        let mut seed = [0; 8];
        seed.copy_from_slice(&digest[..8]);
        Self { seed: u64::from_le_bytes(seed), scale: (3.0 / columns as f32).sqrt() }
    }

    /// Its first `count` elements, as bf16. The kernel `fill_random` has the same arithmetic.
    pub fn bits(self, count: usize) -> Vec<u16> {
        (0..count).into_par_iter().with_min_len(1 << 14).map(|index| self.element(index as u64)).collect()
    }

    fn element(self, index: u64) -> u16 {
        let mut z = self.seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        let unit = (z >> 40) as f32 * (1.0 / 8_388_608.0) - 1.0;
        bf16::from_f32(unit * self.scale).to_bits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The kernel's check has the same example.
    #[test]
    fn numbers_are_those_that_the_kernel_makes() {
        let bits = RandomTensor { seed: 42, scale: 0.5 }.bits(4);
        assert_eq!(bits, [0x3e77, 0xbeae, 0xbe63, 0xbe20]);
    }

    #[test]
    fn tensors_differ_and_have_the_right_spread() {
        let (a, b) = (RandomTensor::new("a", 300), RandomTensor::new("b", 300));
        assert_ne!(a.seed, b.seed);
        let values: Vec<f64> =
            a.bits(100_000).into_iter().map(|bits| bf16::from_bits(bits).to_f64()).collect();
        let square = values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64;
        assert!((square * 300.0 - 1.0).abs() < 0.02, "{square}");
        assert!(values.iter().sum::<f64>().abs() < 50.0);
    }
}
