//! What is where.

use kvbm_hash::SequenceHash;

use super::{SlotIndex, SlotTable, State};
use crate::ledger::key::Key;

impl SlotTable {
    /// The slot in which `key` is resident.
    pub fn resident(&self, key: Key) -> Option<SlotIndex> {
        let slot = *self.index.get(&key)?;
        matches!(self.slots[slot.at()].state, State::Resident { .. }).then_some(slot)
    }

    /// True if `key` is resident or being filled under that name.
    pub fn knows(&self, key: Key) -> bool {
        self.index.contains_key(&key)
    }

    /// Number of leading `keys` that are resident, and the slot of the last of them. Gallops: O(log n) lookups.
    pub fn prefix(&self, mut key: impl FnMut(usize) -> Key, len: usize) -> (usize, Option<SlotIndex>) {
        // [0, known) is resident, `known`'s last slot is `deepest`; [missing, len) is not.
        let (mut known, mut deepest, mut missing) = (0, None, len);
        let mut probe = len;
        while known < missing {
            // Keys that are no prefix (a client's mistake) are not found at the depth at which they are asked for.
            let found = self.resident(key(probe - 1)).filter(|slot| self.depth(Some(*slot)) == probe);
            match found {
                Some(slot) => (known, deepest) = (probe, Some(slot)),
                None => missing = probe - 1,
            }
            // First the whole, then 1, 2, 4 ... blocks, then the middle of what is open.
            let doubled = (known * 2).max(1);
            probe =
                if doubled < missing && missing == len - 1 { doubled } else { (known + missing).div_ceil(2) };
        }
        (known, deepest)
    }

    pub(super) fn depth(&self, slot: Option<SlotIndex>) -> usize {
        slot.map_or(0, |slot| self.slots[slot.at()].depth as usize)
    }

    pub(super) fn place_behind(&mut self, slot: SlotIndex, parent: Option<SlotIndex>) {
        self.slots[slot.at()].depth = self.depth(parent) as u32 + 1;
    }

    /// The chain that ends in `deepest`: its last `count` slots, first block first.
    pub fn chain(&self, deepest: SlotIndex, count: usize) -> Vec<SlotIndex> {
        let mut slots: Vec<_> = self.ancestors(deepest).take(count).collect();
        slots.reverse();
        slots
    }

    /// A slot, the one before it, and so on to the first of the sequence.
    pub fn ancestors(&self, deepest: SlotIndex) -> impl Iterator<Item = SlotIndex> + '_ {
        std::iter::successors(Some(deepest), |slot| self.parent_of(*slot))
    }

    /// Key and parent's key of a resident slot.
    pub fn block(&self, slot: SlotIndex) -> Option<(Key, Option<SequenceHash>)> {
        match self.slots.get(slot.at())?.state {
            State::Resident { key, parent } => Some((key, parent.and_then(|parent| self.hash_of(parent)))),
            _ => None,
        }
    }

    pub(super) fn hash_of(&self, slot: SlotIndex) -> Option<SequenceHash> {
        match self.slots[slot.at()].state {
            State::Filling { key, .. } => key.map(|key| key.hash),
            State::Resident { key, .. } => Some(key.hash),
            State::Free | State::Failed { .. } | State::Retired | State::Bad => None,
        }
    }

    /// Priority of the block in a slot, 0..=100.
    pub fn priority(&self, slot: SlotIndex) -> u8 {
        self.slots[slot.at()].priority
    }

    /// Sets the priority of the block in a slot.
    pub fn set_priority(&mut self, slot: SlotIndex, priority: u8) {
        self.slots[slot.at()].priority = priority;
    }

    /// Generation of a slot.
    pub fn generation(&self, slot: SlotIndex) -> u32 {
        self.slots[slot.at()].generation
    }

    /// True if the slot exists, is being filled in this generation and has a holder.
    pub fn is_granted(&self, slot: SlotIndex, generation: u32) -> bool {
        let slot = self.slots.get(slot.at());
        slot.is_some_and(|s| {
            s.generation == generation && s.pins > 0 && matches!(s.state, State::Filling { key: None, .. })
        })
    }

    /// True if the slot is resident in this generation.
    pub fn is_resident(&self, slot: SlotIndex, generation: u32) -> bool {
        let slot = self.slots.get(slot.at());
        slot.is_some_and(|s| s.generation == generation && matches!(s.state, State::Resident { .. }))
    }

    /// Everything resident, parents before children.
    pub fn residents(&self) -> Vec<(SlotIndex, Key, Option<SequenceHash>)> {
        let mut done = vec![false; self.slots.len()];
        let mut blocks = Vec::with_capacity(self.resident);
        let mut path = Vec::new();
        for start in (0..self.slots.len() as u32).map(SlotIndex) {
            let mut next = Some(start);
            while let Some(slot) = next.filter(|slot| !done[slot.at()]) {
                done[slot.at()] = true;
                path.push(slot);
                next = self.parent_of(slot);
            }
            while let Some(slot) = path.pop() {
                if let Some((key, parent)) = self.block(slot) {
                    blocks.push((slot, key, parent));
                }
            }
        }
        blocks
    }
}
