//! Chance with a seed, and names for blocks.

/// A small generator of random numbers (SplitMix64), and what is drawn from it.
#[derive(Debug)]
pub struct Generator {
    state: u64,
}

impl Generator {
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mixed(self.state)
    }

    /// In [0, 1).
    pub fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// From `low` to `high`, both included.
    pub fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// Exponentially distributed.
    pub fn wait_ms(&mut self, mean_ms: f64) -> u64 {
        (-mean_ms * (1.0 - self.share()).ln()) as u64
    }

    /// Log-normally distributed: half are shorter than the median, and some are much longer.
    pub fn think_ms(&mut self, median_ms: f64, spread: f64) -> u64 {
        let normal = (-2.0 * (1.0 - self.share()).ln()).sqrt() * (std::f64::consts::TAU * self.share()).cos();
        (median_ms * (spread * normal).exp()) as u64
    }
}

/// Ranks of which the first is drawn most often: the chance of rank r falls as r to the power of `-exponent`.
#[derive(Debug)]
pub struct Zipf {
    cumulated: Vec<f64>,
}

impl Zipf {
    pub fn new(ranks: u32, exponent: f64) -> Self {
        let mut sum = 0.0;
        let cumulated = (1..=ranks)
            .map(|rank| {
                sum += f64::from(rank).powf(-exponent);
                sum
            })
            .collect();
        Self { cumulated }
    }

    pub fn draw(&self, generator: &mut Generator) -> u64 {
        let total = self.cumulated.last().copied().unwrap_or(0.0);
        let point = generator.share() * total;
        self.cumulated.partition_point(|sum| *sum <= point) as u64
    }
}

/// A prompt in the making.
#[derive(Debug, Clone, Default)]
pub struct Prompt {
    pub blocks: Vec<u64>,
}

impl Prompt {
    /// Adds the blocks of a text. The same text behind the same blocks has the same names.
    pub fn add(&mut self, text: u64, blocks: u64) {
        for at in 0..blocks {
            let before = self.blocks.last().copied().unwrap_or(0);
            self.blocks.push(mixed(before ^ mixed(text.wrapping_add(at << 48))));
        }
    }
}

fn mixed(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}
