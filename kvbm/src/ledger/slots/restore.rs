//! A table of what an earlier life of the daemon left.

use std::collections::HashMap;

use kvbm_hash::SequenceHash;

use super::{GroupId, SlotIndex, SlotTable, State, TableRules};
use crate::ledger::key::{Key, KeyHasher};
use crate::ledger::policy::Newcomer;
use crate::ledger::{Millis, Retention};

/// A block that was found in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// Where.
    pub slot: SlotIndex,
    /// Its key.
    pub key: Key,
    /// Key of the block before it.
    pub parent: Option<SequenceHash>,
    /// How it is kept; the clock of a duration begins to run now.
    pub retention: Retention,
    /// Whose share it counts for.
    pub group: GroupId,
    /// When it was stored, on any scale: later ones stay longer.
    pub stored: u64,
}

/// Where a block's parent is among the blocks found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Parent {
    None,
    At(u32),
    Missing,
}

impl SlotTable {
    /// A table of `slots` slots that holds these blocks, and how many of them were left out: those whose slot or key is
    /// taken by a later one, and those with a block missing before them.
    pub fn restore(slots: u32, mut found: Vec<Restored>, rules: TableRules, now: Millis) -> (Self, usize) {
        let all = found.len();
        let mut table = Self::new(slots, rules);
        found.retain(|block| block.slot.0 < slots);
        found.sort_unstable_by_key(|block| (std::cmp::Reverse(block.stored), block.slot));
        let mut taken = vec![false; slots as usize];
        let mut by_key: HashMap<Key, u32, KeyHasher> =
            HashMap::with_capacity_and_hasher(found.len(), rules.hasher);
        let mut kept = Vec::with_capacity(found.len());
        for block in found {
            if taken[block.slot.at()] || by_key.contains_key(&block.key) {
                continue;
            }
            taken[block.slot.at()] = true;
            by_key.insert(block.key, kept.len() as u32);
            kept.push(block);
        }
        let parents = kept.iter().map(|block| match block.parent {
            None => Parent::None,
            Some(hash) => {
                by_key.get(&Key { hash, ..block.key }).map_or(Parent::Missing, |at| Parent::At(*at))
            }
        });
        let parents: Vec<Parent> = parents.collect();
        let depths = depths(&parents);
        // The policy hears of the earliest first, and of each after the block before it.
        let mut path = Vec::new();
        for earliest in (0..kept.len()).rev().filter(|i| depths[*i] > 0) {
            let mut next = Some(earliest);
            while let Some(i) = next.filter(|i| !table.slots[kept[*i].slot.at()].is_resident()) {
                path.push(i);
                next = match parents[i] {
                    Parent::At(at) => Some(at as usize),
                    Parent::None | Parent::Missing => None,
                };
            }
            while let Some(i) = path.pop() {
                let parent = match parents[i] {
                    Parent::At(at) => Some(kept[at as usize].slot),
                    Parent::None | Parent::Missing => None,
                };
                table.put_back(&kept[i], parent, now);
            }
        }
        table.free.retain(|slot| table.slots[slot.at()].state == State::Free);
        for slot in (0..slots).map(SlotIndex) {
            table.settle(slot, now);
        }
        let left_out = all - table.resident;
        (table, left_out)
    }

    /// To be settled once all of them are there.
    fn put_back(&mut self, block: &Restored, parent: Option<SlotIndex>, now: Millis) {
        let slot = block.slot;
        if let Some(parent) = parent {
            self.slots[parent.at()].children += 1;
        }
        self.place(slot, block.key, parent);
        let s = &mut self.slots[slot.at()];
        (s.generation, s.group, s.used_at) = (1, block.group, now);
        self.set_state(slot, State::Filling);
        self.set_retention(slot, block.retention, now);
        self.set_state(slot, State::Resident);
        let (fingerprint, depth) = (self.index.fingerprint(block.key), self.slots[slot.at()].depth);
        self.policy.stored(slot, Newcomer { fingerprint, parent, depth }, now);
    }
}

/// Blocks from the first of its sequence to each block; 0 for those that have none.
fn depths(parents: &[Parent]) -> Vec<u32> {
    const OPEN: u32 = u32::MAX;
    let mut depths = vec![OPEN; parents.len()];
    let mut path = Vec::new();
    for start in 0..parents.len() {
        let mut at = start;
        let mut depth = loop {
            if depths[at] != OPEN {
                break depths[at];
            }
            // Whoever meets this again before it is known walks in a circle.
            depths[at] = 0;
            path.push(at);
            match parents[at] {
                Parent::None => break OPEN,
                Parent::Missing => break 0,
                Parent::At(parent) => at = parent as usize,
            }
        };
        while let Some(block) = path.pop() {
            depth = match depth {
                OPEN => 1,
                0 => 0,
                depth => depth + 1,
            };
            depths[block] = depth;
        }
    }
    depths
}

#[cfg(test)]
mod tests {
    use super::super::{Allowances, Incoming, Need};
    use super::*;
    use crate::ledger::key::NamespaceId;

    fn hash(n: u32) -> SequenceHash {
        let mut hash = [3; 16];
        hash[..4].copy_from_slice(&n.to_le_bytes());
        SequenceHash(hash)
    }

    fn block(slot: u32, n: u32, parent: Option<u32>, stored: u64) -> Restored {
        let key = Key { namespace: NamespaceId(1), hash: hash(n) };
        let retention = Retention::default();
        Restored {
            slot: SlotIndex(slot),
            key,
            parent: parent.map(hash),
            retention,
            group: GroupId::COMMON,
            stored,
        }
    }

    fn restore(slots: u32, found: Vec<Restored>) -> (SlotTable, usize) {
        let (table, left_out) = SlotTable::restore(slots, found, TableRules::of_tests(), Millis(0));
        table.check_integrity();
        (table, left_out)
    }

    fn holds(table: &SlotTable, n: u32) -> bool {
        table.resident(Key { namespace: NamespaceId(1), hash: hash(n) }).is_some()
    }

    #[test]
    fn a_chain_comes_back_whatever_the_order_and_is_evicted_from_its_end() {
        let found = vec![block(2, 3, Some(2), 7), block(0, 1, None, 5), block(1, 2, Some(1), 6)];
        let (mut table, left_out) = restore(4, found);
        assert_eq!((left_out, table.counts().resident, table.counts().free), (0, 3, 1));
        let keys = [1, 2, 3].map(|n| Key { namespace: NamespaceId(1), hash: hash(n) });
        assert_eq!(table.prefix(|i| keys[i], 3).0, 3);
        let new = |n| Key { namespace: NamespaceId(1), hash: hash(n) };
        for n in [10, 11] {
            let block = Incoming::of_tests(new(n), None);
            let reserved = table.reserve(block, Need::Wanted, Allowances::NONE, Millis(1)).unwrap();
            assert!(table.commit(reserved, Millis(1)));
            table.check_integrity();
        }
        assert!(!holds(&table, 3) && holds(&table, 2));
    }

    #[test]
    fn what_has_a_gap_before_it_or_runs_in_a_circle_is_left_out() {
        let gap = vec![block(0, 1, None, 1), block(1, 3, Some(2), 1), block(2, 4, Some(3), 1)];
        assert_eq!(restore(4, gap).1, 2);
        let circle = vec![
            block(0, 1, Some(2), 1),
            block(1, 2, Some(1), 2),
            block(2, 3, Some(1), 3),
            block(3, 9, None, 1),
        ];
        assert_eq!(restore(4, circle).1, 3);
    }

    #[test]
    fn of_two_blocks_with_one_key_or_slot_the_later_counts() {
        let (table, left_out) =
            restore(3, vec![block(0, 1, None, 1), block(1, 1, None, 2), block(1, 5, None, 1)]);
        assert_eq!((left_out, holds(&table, 1), holds(&table, 5)), (2, true, false));
        assert_eq!(restore(1, vec![block(1, 1, None, 1)]).1, 1, "a slot that is not there");
    }

    /// How long a large table takes: printed, not judged.
    #[test]
    #[ignore = "a measurement"]
    fn a_million_blocks() {
        let mut found = Vec::new();
        for chain in 0..1000 {
            for i in 0..1000 {
                let n = chain * 1000 + i;
                found.push(block(n, n + 1, (i > 0).then_some(n), n.into()));
            }
        }
        let started = std::time::Instant::now();
        let (table, left_out) = SlotTable::restore(1_000_000, found, TableRules::of_tests(), Millis(0));
        eprintln!("{:?}", started.elapsed());
        assert_eq!((left_out, table.counts().resident), (0, 1_000_000));
    }
}
