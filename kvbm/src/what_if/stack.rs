//! The stack of one tier: a sample of its keys with the depth at which each lies.

use super::feed::Sample;
use super::recency::Recency;

/// How much deeper than the largest capacity that is asked about a stack reaches.
const MARGIN: f64 = 1.1;

/// See the module.
#[derive(Debug)]
pub(super) struct Stack {
    recency: Recency,
    samples_max: usize,
    /// Keys below it are in the sample.
    threshold: u64,
}

impl Stack {
    pub fn new(samples_max: usize) -> Self {
        Self { recency: Recency::new(samples_max + 1), samples_max, threshold: u64::MAX }
    }

    /// Keys below it are in the sample.
    pub fn threshold(&self) -> u64 {
        self.threshold
    }

    /// Keys remembered.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.recency.len()
    }

    /// Share of keys in the sample, above 0 and at most 1.
    pub fn rate(&self) -> f64 {
        (self.threshold as f64 + 1.0) / (u64::MAX as f64 + 1.0)
    }

    /// Calls `see` for each sampled key of a request with the capacity that would have kept it, bytes; `None` if no
    /// capacity that is asked about would have.
    pub fn look_up(&self, samples: &[Sample], mut see: impl FnMut(&Sample, Option<f64>)) {
        let mut shallowest: Option<f64> = None;
        // From the end: a block that is kept keeps those before it.
        for sample in samples.iter().rev().filter(|sample| sample.word < self.threshold) {
            let depth =
                self.recency.depth(sample.word).map(|(above, own)| above as f64 / self.rate() + own as f64);
            shallowest = match (shallowest, depth) {
                (Some(child), Some(own)) => Some(child.min(own)),
                (child, own) => child.or(own),
            };
            see(sample, shallowest);
        }
    }

    /// These keys are used now, and were in use before, or have just been stored.
    pub fn touch(&mut self, samples: &[Sample], block_bytes: u64) {
        // The first block of a sequence was used last: it goes after all that hang on it.
        for sample in samples.iter().rev() {
            if sample.word >= self.threshold {
                continue;
            }
            self.recency.touch(sample.word, block_bytes);
            if self.recency.len() > self.samples_max {
                self.halve();
            }
        }
    }

    /// As [`Stack::touch`], for those that are in it.
    pub fn touch_known(&mut self, samples: &[Sample], block_bytes: u64) {
        for sample in samples.iter().rev() {
            if self.recency.depth(sample.word).is_some() {
                self.recency.touch(sample.word, block_bytes);
            }
        }
    }

    /// Forgets what lies deeper than `bytes`.
    pub fn trim(&mut self, bytes: f64) {
        while self.recency.bytes() as f64 / self.rate() > bytes * MARGIN && self.recency.len() > 1 {
            self.recency.drop_oldest();
        }
    }

    fn halve(&mut self) {
        self.threshold /= 2;
        let threshold = self.threshold;
        self.recency.keep(|word| word < threshold);
    }
}
