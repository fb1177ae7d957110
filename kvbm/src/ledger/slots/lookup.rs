//! What is where.

use kvbm_hash::SequenceHash;

use super::{SlotIndex, SlotTable, State};
use crate::ledger::key::Key;

impl SlotTable {
    /// The slot in which `key` is resident.
    pub fn resident(&self, key: Key) -> Option<SlotIndex> {
        let slot = self.index.find(&self.slots, key)?;
        self.slots[slot.at()].is_resident().then_some(slot)
    }

    /// True if `key` is resident in this very slot.
    pub fn holds(&self, slot: SlotIndex, key: Key) -> bool {
        let slot = &self.slots[slot.at()];
        slot.is_resident() && slot.key == key
    }

    /// True if `key` is resident or being filled under that name.
    pub fn knows(&self, key: Key) -> bool {
        self.index.find(&self.slots, key).is_some()
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

    /// Blocks up to the one in a slot, of its sequence; none: 0.
    pub fn depth(&self, slot: Option<SlotIndex>) -> usize {
        slot.map_or(0, |slot| self.slots[slot.at()].depth as usize)
    }

    /// The chain that ends in `deepest`: its last `count` slots, first block first.
    pub fn chain(&self, deepest: SlotIndex, count: usize) -> Vec<SlotIndex> {
        let mut slots = Vec::with_capacity(count);
        slots.extend(self.ancestors(deepest).take(count));
        slots.reverse();
        slots
    }

    /// A slot, the one before it, and so on to the first of the sequence.
    pub fn ancestors(&self, deepest: SlotIndex) -> impl Iterator<Item = SlotIndex> + '_ {
        std::iter::successors(Some(deepest), |slot| self.slots[slot.at()].parent())
    }

    /// Key and parent's key of a resident slot.
    pub fn block(&self, slot: SlotIndex) -> Option<(Key, Option<SequenceHash>)> {
        let slot = self.slots.get(slot.at()).filter(|slot| slot.is_resident())?;
        let parent = slot.parent().map(|parent| self.slots[parent.at()].key.hash);
        Some((slot.key, parent))
    }

    /// Generation of a slot.
    pub fn generation(&self, slot: SlotIndex) -> u32 {
        self.slots[slot.at()].generation
    }

    /// True if the slot exists, is granted in this generation and has a holder.
    pub fn is_granted(&self, slot: SlotIndex, generation: u32) -> bool {
        let slot = self.slots.get(slot.at());
        slot.is_some_and(|s| s.generation == generation && s.pins > 0 && s.state == State::Granted)
    }

    /// True if the slot is resident in this generation.
    pub fn is_resident(&self, slot: SlotIndex, generation: u32) -> bool {
        let slot = self.slots.get(slot.at());
        slot.is_some_and(|s| s.generation == generation && s.is_resident())
    }

    /// Whether the block before that in a slot is still being filled.
    pub fn is_behind_filling(&self, slot: SlotIndex) -> bool {
        self.parent_state(slot) == Some(State::Filling)
    }

    /// Whether the block before that in a slot did not arrive.
    pub fn is_behind_failed(&self, slot: SlotIndex) -> bool {
        self.parent_state(slot).is_some_and(|state| !matches!(state, State::Filling | State::Resident))
    }

    fn parent_state(&self, slot: SlotIndex) -> Option<State> {
        self.slots[slot.at()].parent().map(|parent| self.slots[parent.at()].state)
    }

    /// Whether the block was not worth a place in the next tier when it was last tried.
    pub fn is_left_out(&self, slot: SlotIndex) -> bool {
        self.slots[slot.at()].left_out
    }

    /// The block was not worth a place in the next tier.
    pub fn leave_out(&mut self, slot: SlotIndex) {
        self.slots[slot.at()].left_out = true;
    }

    /// The block, and those before it, may be tried again.
    pub fn try_again(&mut self, slot: SlotIndex) {
        let mut next = Some(slot);
        while let Some(slot) = next.filter(|slot| self.slots[slot.at()].left_out) {
            self.slots[slot.at()].left_out = false;
            next = self.slots[slot.at()].parent();
        }
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
                next = self.slots[slot.at()].parent();
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
