//! Who holds a slot: sessions and leases by pins, copies in flight, users' pins.

use super::{Change, Copying, SlotIndex, SlotTable};
use crate::ledger::Millis;
use crate::ledger::key::Key;

impl SlotTable {
    /// One more pin on a slot in use. Whether that is a use of the block is told by [`SlotTable::used`].
    pub fn pin(&mut self, slot: SlotIndex) {
        self.hold(slot, |pins, _| *pins += 1);
        self.withdraw(slot);
    }

    /// Gives back `count` pins (at most those there are). With the last, the block has been let go of now, and a granted
    /// slot becomes free.
    pub fn unpin(&mut self, slot: SlotIndex, count: u32, now: Millis) {
        let held = self.slots[slot.at()].pins > 0;
        self.hold(slot, |pins, _| *pins = pins.saturating_sub(count));
        let s = &mut self.slots[slot.at()];
        if held && s.pins == 0 && s.is_resident() {
            s.used_at = now;
            self.policy.released(slot, now);
        }
        self.settle(slot, now);
    }

    /// A request found the blocks up to this one.
    pub fn used(&mut self, slot: SlotIndex, now: Millis) {
        self.slots[slot.at()].used_at = now;
        self.policy.used(slot, now);
        if self.slots[slot.at()].timed && self.slots[slot.at()].offered {
            self.expiry.start(slot, now);
        }
    }

    /// Number of pins.
    pub fn pins(&self, slot: SlotIndex) -> u32 {
        self.slots[slot.at()].pins
    }

    /// A copy from or to the slot begins.
    pub fn begin_copy(&mut self, slot: SlotIndex) -> Copying {
        self.hold(slot, |_, copies| *copies += 1);
        self.withdraw(slot);
        Copying(slot)
    }

    /// The copy ended. That is no use of the block: its clock goes on as if there had been none.
    pub fn end_copy(&mut self, copying: Copying, now: Millis) {
        self.hold(copying.0, |_, copies| *copies -= 1);
        self.settle(copying.0, now);
    }

    /// The holder of all pins is gone.
    pub fn drop_all_pins(&mut self, now: Millis) {
        for slot in (0..self.slots.len() as u32).map(SlotIndex) {
            let pins = self.slots[slot.at()].pins;
            if pins > 0 {
                self.unpin(slot, pins, now);
            }
        }
    }

    /// A user's pin is on the block: it is not evicted, nor is its memory taken away.
    pub fn keep(&mut self, slot: SlotIndex) {
        if !std::mem::replace(&mut self.slots[slot.at()].kept, true) {
            self.kept += 1;
        }
        self.withdraw(slot);
    }

    /// Keeps those of the blocks that became resident lately which are pinned, up to `max` of all; none without the one
    /// before it, which it holds anyway.
    pub fn keep_stored(&mut self, is_pinned: impl Fn(Key) -> bool, max: usize) {
        let stored = self.changes.iter().filter_map(|change| match change {
            Change::Stored(key, _) => Some(*key).filter(|key| is_pinned(*key)),
            Change::Removed(_) => None,
        });
        for key in stored.collect::<Vec<_>>() {
            if self.kept >= max {
                break;
            }
            if let Some(slot) = self.resident(key) {
                let parent = self.slots[slot.at()].parent();
                if parent.is_none_or(|parent| self.slots[parent.at()].kept) {
                    self.keep(slot);
                }
            }
        }
    }

    /// The last user's pin on the block has ended.
    pub fn let_go(&mut self, slot: SlotIndex, now: Millis) {
        let s = &mut self.slots[slot.at()];
        if std::mem::take(&mut s.kept) {
            s.used_at = now;
            self.kept -= 1;
            self.policy.released(slot, now);
        }
        self.settle(slot, now);
    }

    /// Blocks with a user's pin on them.
    pub fn kept(&self) -> usize {
        self.kept
    }

    fn hold(&mut self, slot: SlotIndex, change: impl FnOnce(&mut u32, &mut u32)) {
        let s = &mut self.slots[slot.at()];
        let before = s.pins > 0 || s.copies > 0;
        change(&mut s.pins, &mut s.copies);
        let after = s.pins > 0 || s.copies > 0;
        if s.is_resident() && before != after {
            if after { self.pinned += 1 } else { self.pinned -= 1 }
        }
    }
}
