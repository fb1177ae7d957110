//! Random numbers for workloads: the same seed gives the same workload for ever, which no library promises.

/// SplitMix64.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        word ^ (word >> 31)
    }

    /// 0 included, 1 not.
    pub(super) fn unit(&mut self) -> f64 {
        (self.word() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Both ends included.
    pub(super) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + (self.unit() * (high - low + 1) as f64) as u64
    }

    pub(super) fn chance(&mut self, probability: f64) -> bool {
        self.unit() < probability
    }

    /// Exponential: waiting times, lengths.
    pub(super) fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }

    /// Spread evenly over orders of magnitude around a median: half the values lie within a factor of about two.
    pub(super) fn log_normal(&mut self, median: f64, sigma: f64) -> f64 {
        // Twelve uniform numbers make a normal one, near enough.
        let normal = (0..12).map(|_| self.unit()).sum::<f64>() - 6.0;
        median * (sigma * normal).exp()
    }
}

/// Ranks 0.. of which each is rarer than the one before: the n-th has weight 1 / n^exponent.
#[derive(Debug, Clone)]
pub(super) struct Zipf(Vec<f64>);

impl Zipf {
    pub(super) fn new(count: usize, exponent: f64) -> Self {
        let weights = (1..=count).map(|rank| (rank as f64).powf(-exponent));
        Self(
            weights
                .scan(0.0, |sum, weight| {
                    *sum += weight;
                    Some(*sum)
                })
                .collect(),
        )
    }

    pub(super) fn draw(&self, random: &mut Random) -> usize {
        let total = self.0.last().copied().unwrap_or(0.0);
        let at = random.unit() * total;
        self.0.partition_point(|sum| *sum <= at).min(self.0.len().saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_shape_they_promise() {
        let mut random = Random::new(7);
        let mean = (0..20_000).map(|_| random.exponential(10.0)).sum::<f64>() / 20_000.0;
        assert!((9.5..10.5).contains(&mean), "{mean}");
        assert!((0..1000).all(|_| (3..=5).contains(&random.between(3, 5))));
        let zipf = Zipf::new(100, 1.0);
        let first = (0..10_000).filter(|_| zipf.draw(&mut random) == 0).count();
        // 1 / H(100) = 0.193.
        assert!((1800..2060).contains(&first), "{first}");
        let above = (0..10_000).filter(|_| random.log_normal(50.0, 1.0) > 50.0).count();
        assert!((4800..5200).contains(&above), "{above}");
    }
}
