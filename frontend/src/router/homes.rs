//! Where prompts went, remembered for longer than their blocks stay: a conversation whose blocks are gone goes back to where
//! they were.
//!
//! Nothing is found there any more, but a daemon learns which blocks come back from those that do come back, evicted ones
//! included. If they come back elsewhere, it learns that they never do. And what others know of the same conversation stays
//! in one place.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::index::Fingerprint;

/// Places in one of two generations: the older one is forgotten when the newer one is full.
const GENERATION: usize = 1 << 16;
/// Of each prompt so many blocks at its end are remembered: the next turn of a conversation begins with nearly all of this
/// one, but its last blocks may differ, as by the beginning of an answer.
const REMEMBERED: usize = 4;

/// Which worker a prompt with such an end went to last.
#[derive(Debug, Default)]
pub struct Homes(Mutex<Generations>);

#[derive(Debug, Default)]
struct Generations {
    newer: HashMap<Fingerprint, u64>,
    older: HashMap<Fingerprint, u64>,
}

impl Homes {
    /// The longest part of a prompt of which it is known where it went, in blocks, and the worker.
    pub fn of(&self, keys: &[Fingerprint]) -> Option<(usize, u64)> {
        let homes = self.0.lock();
        let home = |key: &Fingerprint| homes.newer.get(key).or_else(|| homes.older.get(key)).copied();
        keys.iter().enumerate().rev().find_map(|(at, key)| Some((at + 1, home(key)?)))
    }

    /// A prompt goes to a worker.
    pub fn note(&self, keys: &[Fingerprint], worker: u64) {
        let mut homes = self.0.lock();
        if homes.newer.len() >= GENERATION {
            homes.older = std::mem::take(&mut homes.newer);
        }
        for key in keys.iter().rev().take(REMEMBERED) {
            homes.newer.insert(*key, worker);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(numbers: std::ops::Range<u64>) -> Vec<Fingerprint> {
        numbers.map(Fingerprint).collect()
    }

    #[test]
    fn a_longer_prompt_goes_where_the_longest_part_of_it_went() {
        let homes = Homes::default();
        assert_eq!(homes.of(&keys(0..9)), None);
        homes.note(&keys(0..6), 1);
        homes.note(&keys(0..8), 2);
        assert_eq!(homes.of(&keys(0..20)), Some((8, 2)));
        assert_eq!(homes.of(&keys(0..3)), Some((3, 1)));
        // Another answer took the place of the last blocks.
        let other = [keys(0..6), keys(100..110)].concat();
        assert_eq!(homes.of(&other), Some((6, 2)));
        assert_eq!(homes.of(&keys(50..60)), None);
    }

    #[test]
    fn what_went_somewhere_long_ago_is_forgotten_and_no_more_is_kept_than_that() {
        let homes = Homes::default();
        homes.note(&keys(0..1), 7);
        for number in 1..=3 * GENERATION as u64 {
            homes.note(&keys(number..number + 1), 8);
        }
        assert_eq!((homes.of(&keys(0..1)), homes.of(&keys(9..10))), (None, None));
        let kept = homes.0.lock();
        assert!(kept.newer.len() + kept.older.len() <= 2 * GENERATION + REMEMBERED);
        assert!(kept.older.len() >= GENERATION);
    }
}
