//! Finds the slot of a key. Holds slot numbers only: the keys are in the slots.

use std::hash::BuildHasher;

use hashbrown::HashTable;

use super::SlotIndex;
use super::slot::Slot;
use crate::ledger::key::{Key, KeyHasher};

/// See the module.
#[derive(Debug)]
pub(super) struct Index {
    table: HashTable<SlotIndex>,
    hasher: KeyHasher,
}

impl Index {
    pub fn new(hasher: KeyHasher) -> Self {
        Self { table: HashTable::new(), hasher }
    }

    /// Stands for a key: what it is found by, and what policies know it by.
    pub fn fingerprint(&self, key: Key) -> u64 {
        self.hasher.hash_one(key)
    }

    /// Makes room at once for as many keys as there are slots.
    pub fn reserve(&mut self, slots: &[Slot]) {
        let hasher = self.hasher;
        let wanted = slots.len().saturating_sub(self.table.len());
        self.table.reserve(wanted, |slot| hasher.hash_one(slots[slot.at()].key));
    }

    pub fn find(&self, slots: &[Slot], key: Key) -> Option<SlotIndex> {
        self.table.find(self.fingerprint(key), |slot| slots[slot.at()].key == key).copied()
    }

    /// The slot has its key already, and no other slot has it.
    pub fn insert(&mut self, slots: &[Slot], slot: SlotIndex) {
        let hasher = self.hasher;
        let hash = self.fingerprint(slots[slot.at()].key);
        self.table.insert_unique(hash, slot, |slot| hasher.hash_one(slots[slot.at()].key));
    }

    pub fn remove(&mut self, slots: &[Slot], slot: SlotIndex) {
        let hash = self.fingerprint(slots[slot.at()].key);
        if let Ok(found) = self.table.find_entry(hash, |at| *at == slot) {
            found.remove();
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = SlotIndex> + '_ {
        self.table.iter().copied()
    }

    pub fn len(&self) -> usize {
        self.table.len()
    }

    pub fn bytes(&self) -> usize {
        self.table.allocation_size()
    }
}
