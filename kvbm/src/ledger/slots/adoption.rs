//! A table made elsewhere: the engine kept it while no daemon served it.

use super::{GroupId, SlotIndex, SlotTable, State};

impl SlotTable {
    /// Takes this very slot from the free list, in this generation, with one pin. False if it is not free.
    pub fn adopt(&mut self, slot: SlotIndex, generation: u32) -> bool {
        if self.slots.get(slot.at()).is_none_or(|s| s.state != State::Free) {
            return false;
        }
        // Adoption fills a new table in one go; the free list is put right once, by `finish_adoption`.
        let s = &mut self.slots[slot.at()];
        (s.generation, s.pins, s.group) = (generation, 1, GroupId::COMMON);
        self.set_state(slot, State::Granted);
        true
    }

    /// Removes adopted slots from the free list.
    pub fn finish_adoption(&mut self) {
        let slots = &self.slots;
        self.free.retain(|slot| slots[slot.at()].state == State::Free);
    }
}
