//! Which keys were there at all during the last one to two halves of the window: the ceiling, without any eviction.

use std::collections::HashSet;

use crate::ledger::KeyHasher;

/// Any odd number, as in `recency.rs`.
const SPREAD: u64 = 0x5DEE_CE66_D1CE_4E5B;

#[derive(Debug)]
struct Generation {
    words: HashSet<u64, KeyHasher>,
    /// All keys below it that were there are in it.
    threshold: u64,
}

impl Generation {
    fn new() -> Self {
        Self { words: HashSet::with_hasher(KeyHasher::new(SPREAD)), threshold: u64::MAX }
    }
}

/// See the module. Each generation begins with all keys and halves its share when it is full.
#[derive(Debug)]
pub(super) struct Seen {
    now: Generation,
    before: Generation,
    words_max: usize,
}

impl Seen {
    /// `words_max`: keys that each of the two generations remembers.
    pub fn new(words_max: usize) -> Self {
        Self { now: Generation::new(), before: Generation::new(), words_max }
    }

    /// Keys below it are remembered from now on.
    pub fn threshold(&self) -> u64 {
        self.now.threshold
    }

    /// Keys remembered.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.now.words.len() + self.before.words.len()
    }

    /// Whether the key was there, and for how many such keys it stands; `None` if it is not in the sample.
    pub fn look_up(&self, word: u64) -> Option<(bool, f64)> {
        let threshold = self.now.threshold.min(self.before.threshold);
        let share = (threshold as f64 + 1.0) / (u64::MAX as f64 + 1.0);
        let seen = || self.now.words.contains(&word) || self.before.words.contains(&word);
        (word < threshold).then(|| (seen(), 1.0 / share))
    }

    /// The key is there.
    pub fn add(&mut self, word: u64) {
        let Generation { words, threshold } = &mut self.now;
        if word < *threshold {
            words.insert(word);
            while words.len() > self.words_max {
                *threshold /= 2;
                words.retain(|word| *word < *threshold);
            }
        }
    }

    /// The next half of the window begins.
    pub fn turn(&mut self) {
        self.before = std::mem::replace(&mut self.now, Generation::new());
    }
}
