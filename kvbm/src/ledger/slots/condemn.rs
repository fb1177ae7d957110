//! Slots that do not hold what they should.

use std::collections::HashSet;

use super::{Change, Copying, SlotIndex, SlotTable, State};
use crate::ledger::Millis;

impl SlotTable {
    /// The bytes of slots that are being read are not those that were stored: they and all that hang on them are not
    /// found any more, and the slots themselves are not used again. O(slots), however many are bad.
    pub fn condemn<'a>(&mut self, copying: impl IntoIterator<Item = &'a Copying>, now: Millis) {
        let mut roots = HashSet::new();
        for bad in copying.into_iter().map(Copying::slot) {
            self.slots[bad.at()].bad = true;
            // It may have lost its key already, with the block before it.
            if self.slots[bad.at()].is_resident() {
                roots.insert(bad);
            }
        }
        if roots.is_empty() {
            return;
        }
        let mut doomed = self.with_descendants(|slot| roots.contains(&slot));
        // Children first, as when they are evicted.
        doomed.sort_unstable_by_key(|slot| std::cmp::Reverse(self.slots[slot.at()].depth));
        doomed.iter().for_each(|slot| self.unlist(*slot, now));
        doomed.into_iter().for_each(|slot| self.settle(slot, now));
    }

    /// Resident to failed: it is free once nobody reads it and nothing hangs on it. Users' pins on it are void.
    fn unlist(&mut self, slot: SlotIndex, now: Millis) {
        if !self.slots[slot.at()].is_resident() {
            return;
        }
        self.withdraw(slot);
        self.policy.removed(slot, false, now);
        self.kept -= usize::from(std::mem::take(&mut self.slots[slot.at()].kept));
        self.index.remove(&self.slots, slot);
        self.changes.push(Change::Removed(self.slots[slot.at()].key));
        self.set_state(slot, State::Failed);
    }
}
