//! Keys in the order of their last use, and how many bytes lie above each: a Fenwick tree over positions in time.

use std::collections::HashMap;

use crate::ledger::KeyHasher;

/// Any odd number: words are uniform, and a client that makes them collide only spoils its own figures.
const SPREAD: u64 = 0x5DEE_CE66_D1CE_4E5B;

#[derive(Debug, Clone, Copy)]
struct Entry {
    position: u32,
    bytes: u64,
}

/// See the module. Positions are handed out in order; when they run out, entries move together.
#[derive(Debug)]
pub(super) struct Recency {
    entries: HashMap<u64, Entry, KeyHasher>,
    /// Who is at each position.
    order: Vec<Option<u64>>,
    /// Fenwick tree of bytes by position, 1-based.
    sums: Vec<u64>,
    /// Position of the next use.
    next: usize,
    /// No entry is at a position before it.
    oldest: usize,
    total: u64,
}

impl Recency {
    /// For `entries_max` entries.
    pub fn new(entries_max: usize) -> Self {
        let positions = 2 * entries_max.max(1);
        Self {
            entries: HashMap::with_hasher(KeyHasher::new(SPREAD)),
            order: vec![None; positions],
            sums: vec![0; positions + 1],
            next: 0,
            oldest: 0,
            total: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of all.
    pub fn bytes(&self) -> u64 {
        self.total
    }

    /// Bytes of those used after it, and its own.
    pub fn depth(&self, word: u64) -> Option<(u64, u64)> {
        let entry = self.entries.get(&word)?;
        Some((self.total - self.sum_through(entry.position as usize), entry.bytes))
    }

    /// It is used now.
    pub fn touch(&mut self, word: u64, bytes: u64) {
        self.remove(word);
        if self.next == self.order.len() {
            self.keep(|_| true);
        }
        let position = self.next;
        self.next += 1;
        self.order[position] = Some(word);
        self.entries.insert(word, Entry { position: position as u32, bytes });
        self.add(position, bytes as i64);
        self.total += bytes;
    }

    /// Forgets the one that was not used for longest.
    pub fn drop_oldest(&mut self) {
        while let Some(place) = self.order.get(self.oldest) {
            if let Some(word) = *place {
                self.remove(word);
                return;
            }
            self.oldest += 1;
        }
    }

    /// Forgets all but some, and moves the rest together.
    pub fn keep(&mut self, kept: impl Fn(u64) -> bool) {
        let words: Vec<u64> = self.order.iter().flatten().copied().filter(|word| kept(*word)).collect();
        self.entries.retain(|word, _| kept(*word));
        self.order.fill(None);
        self.sums.fill(0);
        (self.oldest, self.total, self.next) = (0, 0, words.len());
        for (position, word) in words.into_iter().enumerate() {
            self.order[position] = Some(word);
            let entry = self.entries.get_mut(&word).expect("it was kept");
            entry.position = position as u32;
            let bytes = entry.bytes;
            self.add(position, bytes as i64);
            self.total += bytes;
        }
    }

    fn remove(&mut self, word: u64) {
        let Some(entry) = self.entries.remove(&word) else { return };
        self.order[entry.position as usize] = None;
        self.add(entry.position as usize, -(entry.bytes as i64));
        self.total -= entry.bytes;
    }

    fn add(&mut self, position: usize, bytes: i64) {
        let mut at = position + 1;
        while at < self.sums.len() {
            self.sums[at] = self.sums[at].wrapping_add_signed(bytes);
            at += at & at.wrapping_neg();
        }
    }

    fn sum_through(&self, position: usize) -> u64 {
        let (mut at, mut sum) = (position + 1, 0u64);
        while at > 0 {
            sum = sum.wrapping_add(self.sums[at]);
            at &= at - 1;
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn depths_are_those_of_a_plain_list(uses in prop::collection::vec((0u64..24, 1u64..9, 0u8..20), 1..400)) {
            let mut recency = Recency::new(24);
            let mut list: Vec<(u64, u64)> = Vec::new();
            for (word, bytes, also) in uses {
                recency.touch(word, bytes);
                list.retain(|(other, _)| *other != word);
                list.push((word, bytes));
                if also == 0 {
                    recency.drop_oldest();
                    list.remove(0);
                }
                if also == 1 {
                    recency.keep(|word| word % 3 > 0);
                    list.retain(|(word, _)| word % 3 > 0);
                }
                prop_assert_eq!((recency.len(), recency.bytes()), (list.len(), list.iter().map(|(_, bytes)| bytes).sum()));
                let mut above = 0;
                for (word, bytes) in list.iter().rev() {
                    prop_assert_eq!(recency.depth(*word), Some((above, *bytes)));
                    above += bytes;
                }
            }
        }
    }
}
