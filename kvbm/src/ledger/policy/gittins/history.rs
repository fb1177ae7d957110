//! What became of a sample of the blocks, whether they are still resident or not.
//!
//! A cache that learns only from what it holds learns that nothing comes back later than it evicts. So one block in
//! eight, chosen by its fingerprint, is followed for much longer than it stays. Which ones does
//! not depend on where they are or how often they are used, so what is learned from them holds for all.

use super::ages::{AGES, Tick, begin, bucket};
use super::class::Class;
use super::hazard::Hazards;

const WAYS: usize = 8;
/// One block in so many is in the sample.
const SAMPLED_OF: u32 = 8;

/// A block of the sample.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    /// 0: nothing here.
    mark: u32,
    last_used: Tick,
    /// Saturates.
    uses: u8,
    class: Class,
    /// Age buckets that were counted as reached.
    reached: u8,
}

/// Sets of eight; in each the one used longest ago makes room.
#[derive(Debug, Default)]
pub struct History {
    entries: Vec<Entry>,
    /// The set whose ages are counted next.
    hand: usize,
}

impl History {
    /// Blocks that can be followed.
    pub fn capacity(&self) -> usize {
        self.entries.len()
    }

    /// Whether a block is in the sample.
    pub fn samples(mark: u32) -> bool {
        mark.is_multiple_of(SAMPLED_OF)
    }

    /// Makes room for at least so many blocks.
    pub fn grow(&mut self, blocks: usize) {
        let before = std::mem::take(&mut self.entries);
        self.entries = vec![Entry::default(); blocks.div_ceil(WAYS) * WAYS];
        self.hand = 0;
        for entry in before.into_iter().filter(|entry| entry.mark != 0) {
            if let Some(room) = self.set(entry.mark).iter_mut().find(|room| room.mark == 0) {
                *room = entry;
            }
        }
    }

    /// A use of a block. Returns how often it was used, this time included: at least `uses`, which is what is known of
    /// it otherwise.
    pub fn used(&mut self, mark: u32, depth: u16, uses: u16, now: Tick, hazards: &mut Hazards) -> u16 {
        let entry = self.entry_or_oldest(mark, now);
        let mut uses = uses;
        if entry.mark != 0 {
            entry.count_ages(now, hazards);
        }
        if entry.mark == mark {
            hazards.hit(entry.class, bucket(now.since(entry.last_used)));
            uses = uses.max(u16::from(entry.uses) + 1);
        }
        let class = Class::new(uses, depth, false);
        let saturated = u8::try_from(uses).unwrap_or(u8::MAX);
        *entry = Entry { mark, last_used: now, uses: saturated, class, reached: 0 };
        uses
    }

    /// The last request that used the block ended with it.
    pub fn ended(&mut self, mark: u32) {
        if let Some(entry) = self.set(mark).iter_mut().find(|entry| entry.mark == mark) {
            entry.class = entry.class.at_an_end();
        }
    }

    /// It went further after all: blocks of one request may come one by one.
    pub fn went_on(&mut self, mark: u32) {
        if let Some(entry) = self.set(mark).iter_mut().find(|entry| entry.mark == mark) {
            entry.class = entry.class.not_at_an_end();
        }
    }

    /// Counts the ages that the blocks of some sets have reached since the last time.
    pub fn sweep(&mut self, sets: usize, now: Tick, hazards: &mut Hazards) {
        for _ in 0..sets {
            let set = &mut self.entries[self.hand..][..WAYS];
            set.iter_mut().filter(|entry| entry.mark != 0).for_each(|entry| entry.count_ages(now, hazards));
            self.hand = if self.hand + WAYS < self.entries.len() { self.hand + WAYS } else { 0 };
        }
    }

    pub fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Entry>()
    }

    fn entry_or_oldest(&mut self, mark: u32, now: Tick) -> &mut Entry {
        let set = self.set(mark);
        let age = |entry: &Entry| match entry.mark {
            0 => u64::MAX,
            _ => u64::from(now.since(entry.last_used)),
        };
        let mut at = 0;
        for (other, entry) in set.iter().enumerate() {
            if entry.mark == mark {
                at = other;
                break;
            }
            if age(entry) > age(&set[at]) {
                at = other;
            }
        }
        &mut set[at]
    }

    fn set(&mut self, mark: u32) -> &mut [Entry] {
        let sets = (self.entries.len() / WAYS) as u64;
        let set = ((u64::from(mark) * sets) >> 32) as usize;
        &mut self.entries[set * WAYS..][..WAYS]
    }
}

impl Entry {
    fn count_ages(&mut self, now: Tick, hazards: &mut Hazards) {
        let age = now.since(self.last_used);
        let reached = usize::from(self.reached);
        if reached < AGES && begin(reached) <= age {
            let next = bucket(age) + 1;
            hazards.reached(self.class, reached..next);
            self.reached = next as u8;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_known_for_longer_than_the_oldest_of_their_set() {
        let (mut history, mut hazards) = (History::default(), Hazards::default());
        history.grow(64);
        for round in 1..=3 {
            for mark in 1..=8 {
                let uses = history.used(mark << 28, 1, 1, Tick(round * 100 + mark), &mut hazards);
                assert_eq!(u32::from(uses), round);
            }
        }
        // Nine in one set: the one used longest ago is forgotten.
        (2..=9).for_each(|mark| _ = history.used(mark, 1, 1, Tick(400 + mark), &mut hazards));
        assert_eq!(history.used(10, 1, 1, Tick(500), &mut hazards), 1);
        assert_eq!(history.used(2, 1, 1, Tick(501), &mut hazards), 1);
        assert_eq!(history.used(9, 1, 1, Tick(502), &mut hazards), 2);
    }

    #[test]
    fn what_is_known_stays_known_when_the_table_grows() {
        let (mut history, mut hazards) = (History::default(), Hazards::default());
        history.grow(64);
        (1..=8).for_each(|mark| _ = history.used(mark << 28, 1, 5, Tick(mark), &mut hazards));
        history.grow(200);
        assert!(history.capacity() >= 200);
        (1..=8).for_each(|mark| assert_eq!(history.used(mark << 28, 1, 1, Tick(9), &mut hazards), 6));
    }
}
