//! Slots that do not hold what they should.

use std::collections::HashSet;

use super::{Change, Copying, SlotIndex, SlotTable, State};

impl SlotTable {
    /// The bytes of slots that are being read are not those that were stored: they and all that hang on them are not
    /// found any more, and the slots themselves are not used again. O(slots), however many are bad.
    pub fn condemn<'a>(&mut self, copying: impl IntoIterator<Item = &'a Copying>) {
        let mut roots = HashSet::new();
        for bad in copying.into_iter().map(Copying::slot) {
            self.slots[bad.at()].bad = true;
            // It may have lost its key already, with the block before it.
            if matches!(self.slots[bad.at()].state, State::Resident { .. }) {
                roots.insert(bad);
            }
        }
        if roots.is_empty() {
            return;
        }
        let doomed = self.with_descendants(|slot| roots.contains(&slot));
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
