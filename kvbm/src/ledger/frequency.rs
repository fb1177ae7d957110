//! How often keys were used lately, roughly, in memory that does not grow.
//!
//! A count-min sketch: each key has a few counters among those of one line, and its count is the least of them. Keys
//! that share counters lend each other uses, the more the more counters are taken: when an eighth is, all are halved. So
//! what was used once is forgotten, and what was used more often is taken for used once.

use std::hash::BuildHasher;

use super::key::{Key, KeyHasher};

/// Counters of two bits; 4 MiB.
const LINES: usize = 1 << 16;
const WORDS_PER_LINE: usize = 8;
const COUNTERS_PER_WORD: usize = 32;
/// Counters of a key.
const PROBES: usize = 4;
/// Counters above zero at which all are halved: half a million keys.
const TAKEN_MAX: usize = LINES * WORDS_PER_LINE * COUNTERS_PER_WORD / 8;
/// The upper and the lower bit of each counter of a word.
const UPPER: u64 = 0xAAAA_AAAA_AAAA_AAAA;
const LOWER: u64 = UPPER >> 1;

/// What a counter of two bits holds at most.
const USES_MAX: u64 = 3;

/// As large as a cache line, so that a use touches two of those at most.
type Line = [u64; WORDS_PER_LINE];

/// See the module.
#[derive(Debug)]
pub(super) struct Frequency {
    hasher: KeyHasher,
    lines: Vec<Line>,
    /// Counters above zero.
    taken: usize,
}

impl Frequency {
    pub fn new(hasher: KeyHasher) -> Self {
        Self { hasher, lines: vec![[0; WORDS_PER_LINE]; LINES], taken: 0 }
    }

    /// Counts one use and returns the uses so far, 3 for more: seldom too many.
    pub fn count(&mut self, key: Key) -> u8 {
        if self.taken >= TAKEN_MAX {
            self.age();
        }
        // The upper half of a product is mixed best.
        let hash = self.hasher.hash_one(key);
        let words: &mut Line = &mut self.lines[(hash >> 48) as usize % LINES];
        let mut least = USES_MAX;
        for probe in 0..PROBES {
            let at = (hash >> (8 * (probe + 2))) as usize % (WORDS_PER_LINE * COUNTERS_PER_WORD);
            let (word, shift) = (&mut words[at / COUNTERS_PER_WORD], at % COUNTERS_PER_WORD * 2);
            let count = *word >> shift & USES_MAX;
            self.taken += usize::from(count == 0);
            if count < USES_MAX {
                *word += 1 << shift;
            }
            least = least.min((count + 1).min(USES_MAX));
        }
        least as u8
    }

    fn age(&mut self) {
        self.taken = 0;
        for word in self.lines.as_flattened_mut() {
            *word = (*word & UPPER) >> 1;
            self.taken += (*word & LOWER).count_ones() as usize;
        }
    }
}

#[cfg(test)]
mod tests {
    use kvbm_hash::SequenceHash;

    use super::*;
    use crate::ledger::key::NamespaceId;

    fn key(n: u64) -> Key {
        let mut hash = [0; 16];
        hash[..8].copy_from_slice(&n.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
        Key { namespace: NamespaceId(1), hash: SequenceHash(hash) }
    }

    #[test]
    fn uses_are_counted_up_to_three() {
        let mut frequency = Frequency::new(KeyHasher::new(3));
        assert_eq!([1, 1, 1, 1, 2, 2].map(|n| frequency.count(key(n))), [1, 2, 3, 3, 1, 2]);
    }

    #[test]
    fn however_many_were_used_once_few_count_as_used_twice() {
        let mut frequency = Frequency::new(KeyHasher::new(3));
        let early = (0..5_000_000).filter(|n| frequency.count(key(*n)) > 1).count();
        assert!(early < 5_000, "{early} of 5000000");
    }

    #[test]
    fn what_is_used_often_is_remembered_beyond_what_is_used_once() {
        let mut frequency = Frequency::new(KeyHasher::new(3));
        (0..1000).for_each(|n| _ = [frequency.count(key(n)), frequency.count(key(n))]);
        let mut others = 1000..;
        let mut aged = |frequency: &mut Frequency| {
            let mut before = 0;
            while frequency.taken >= before {
                before = frequency.taken;
                frequency.count(key(others.next().unwrap()));
            }
        };
        aged(&mut frequency);
        let known = (0..500).filter(|n| frequency.count(key(*n)) == 2).count();
        assert!(known > 490, "{known} of 500 are taken for used once");
        aged(&mut frequency);
        aged(&mut frequency);
        let known = (500..1000).filter(|n| frequency.count(key(*n)) > 1).count();
        assert!(known < 10, "{known} of 500 were not used for two ages");
    }
}
