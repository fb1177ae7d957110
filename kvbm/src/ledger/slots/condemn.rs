//! A slot that does not hold what it should.

use super::{Change, Copying, SlotIndex, SlotTable, State};

impl SlotTable {
    /// The bytes of a slot that is being read are not those that were stored: it and all that hang on it are not found
    /// any more, and the slot itself is not used again. O(slots).
    pub fn condemn(&mut self, copying: &Copying) {
        let bad = copying.slot();
        self.slots[bad.at()].bad = true;
        // It may have lost its key already, with the block before it.
        if !matches!(self.slots[bad.at()].state, State::Resident { .. }) {
            return;
        }
        let doomed = self.with_descendants(&(bad.0..bad.0 + 1));
        doomed.iter().for_each(|slot| self.unlist(*slot));
        doomed.into_iter().for_each(|slot| self.settle(slot));
    }

    /// Resident to failed: it is free once nobody reads it and nothing hangs on it.
    fn unlist(&mut self, slot: SlotIndex) {
        let State::Resident { key, parent } = self.slots[slot.at()].state else { return };
        self.leave_order(slot);
        self.index.remove(&key);
        self.changes.push(Change::Removed(key));
        self.set_state(slot, State::Failed { parent });
    }
}
