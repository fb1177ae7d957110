//! How dearly blocks are kept, and how long that holds.
//!
//! The clock of a priority that holds for a time runs while nobody holds the block, from when it was let go of, last used
//! or stored. When it has run out, the block is one of default priority, as if it had been let go of just then.

use super::{PRIORITY_DEFAULT, SlotIndex, SlotTable, State};
use crate::ledger::{Millis, Retention};

impl SlotTable {
    /// Priority of the block in a slot, 0..=100.
    pub fn priority(&self, slot: SlotIndex) -> u8 {
        self.slots[slot.at()].priority
    }

    /// How the block in a slot is kept.
    pub fn retention(&mut self, slot: SlotIndex, now: Millis) -> Retention {
        if self.slots[slot.at()].timed {
            self.expire(now);
            self.lapse(slot, now);
        }
        let s = &self.slots[slot.at()];
        Retention { priority: s.priority, duration: s.timed.then(|| self.expiry.duration(slot)).flatten() }
    }

    /// As [`SlotTable::retention`], whether its time is over or not.
    pub fn retention_as_set(&self, slot: SlotIndex) -> Retention {
        Retention { priority: self.priority(slot), duration: self.expiry.duration(slot) }
    }

    /// When the priority of the block in a slot ends, if nobody uses it any more.
    pub fn priority_ends(&self, slot: SlotIndex) -> Option<Millis> {
        let s = &self.slots[slot.at()];
        s.timed.then(|| self.expiry.end(slot, s.used_at)).flatten()
    }

    /// The block in a slot is kept like this from now on.
    pub fn set_retention(&mut self, slot: SlotIndex, retention: Retention, now: Millis) {
        let s = &self.slots[slot.at()];
        let timed = retention.duration.filter(|_| retention.priority != PRIORITY_DEFAULT);
        if s.priority == retention.priority && !s.timed && timed.is_none() {
            return;
        }
        self.withdraw(slot);
        self.forget_retention(slot);
        let s = &mut self.slots[slot.at()];
        s.priority = retention.priority;
        if let Some(duration) = timed {
            s.timed = true;
            self.expiry.set(slot, duration);
        }
        if self.slots[slot.at()].state == State::Resident {
            self.settle(slot, now);
        }
    }

    /// A request found `deepest` and all blocks before it. `said` is how each of the first of them is kept from now on;
    /// the others keep their priority, but not for a time only. Does not look at each block while there is nothing to change.
    pub fn reuse(&mut self, deepest: SlotIndex, said: &[Option<Retention>], now: Millis) {
        self.expire(now);
        if !said.is_empty() || self.expiry.len() > 0 {
            self.retain_chain(deepest, said, now);
        }
        self.used(deepest, now);
    }

    fn retain_chain(&mut self, deepest: SlotIndex, said: &[Option<Retention>], now: Millis) {
        let mut next = Some(deepest);
        while let Some(slot) = next {
            next = self.slots[slot.at()].parent();
            match said.get(self.depth(Some(slot)) - 1).copied().flatten() {
                Some(retention) => {
                    self.slots[slot.at()].used_at = now;
                    self.set_retention(slot, retention, now);
                }
                None if self.slots[slot.at()].timed => {
                    self.lapse(slot, now);
                    let priority = self.slots[slot.at()].priority;
                    self.set_retention(slot, Retention { priority, duration: None }, now);
                }
                None => {}
            }
        }
    }

    /// Ends the priorities whose time is over.
    pub fn expire(&mut self, now: Millis) {
        while let Some(slot) = self.expiry.next(now) {
            self.withdraw(slot);
            self.forget_retention(slot);
            // The blocks before it learn from it when they were used last: that has not changed.
            self.slots[slot.at()].priority = PRIORITY_DEFAULT;
            self.policy.released(slot, now);
            self.settle(slot, now);
        }
    }

    /// Ends the priority of a block that is not offered, if its time is over: blocks wait behind it, or did until now.
    pub(super) fn lapse(&mut self, slot: SlotIndex, now: Millis) {
        let s = &self.slots[slot.at()];
        let runs = !s.offered && s.is_resident() && s.pins == 0 && !s.kept;
        if runs && self.priority_ends(slot).is_some_and(|end| end <= now) {
            self.forget_retention(slot);
            self.slots[slot.at()].priority = PRIORITY_DEFAULT;
        }
    }

    pub(super) fn forget_retention(&mut self, slot: SlotIndex) {
        if std::mem::take(&mut self.slots[slot.at()].timed) {
            self.expiry.clear(slot);
        }
    }
}
