//! Slots whose memory is given to another table, and come back.

use std::collections::BTreeMap;

use super::{Allowances, SlotIndex, SlotTable, State};
use crate::ledger::Millis;

impl SlotTable {
    /// Gives retired slots memory again.
    pub fn revive(&mut self, range: std::ops::Range<u32>) {
        for slot in range.rev().map(SlotIndex) {
            assert_eq!(self.slots[slot.at()].state, State::Retired, "only retired slots are revived");
            self.set_state(slot, State::Free);
            self.free.push(slot);
        }
    }

    /// Takes the memory of a range of slots away: discards what is resident there and everything that hangs on it.
    /// Does nothing and returns false if any of that is in use, pinned, or guaranteed to a tenant.
    pub fn retire(&mut self, range: std::ops::Range<u32>, allowances: &Allowances, now: Millis) -> bool {
        self.expire(now);
        let mut doomed = self.with_descendants(|slot| range.contains(&slot.0));
        let busy = |slot: &SlotIndex| {
            let slot = &self.slots[slot.at()];
            let idle = matches!(slot.state, State::Resident | State::Free | State::Bad);
            slot.pins > 0 || slot.copies > 0 || slot.kept || !idle
        };
        if doomed.iter().any(busy) || self.takes_what_is_guaranteed(&doomed, allowances) {
            return false;
        }
        // Deepest first: a slot goes when it has no child left.
        doomed.retain(|slot| self.slots[slot.at()].is_resident());
        doomed.sort_unstable_by_key(|slot| std::cmp::Reverse(self.slots[slot.at()].depth));
        doomed.into_iter().for_each(|slot| self.discard(slot, now));
        self.free.retain(|slot| !range.contains(&slot.0));
        for slot in range.map(SlotIndex) {
            // The next class cuts the place otherwise: what was bad about it is not known any more.
            self.set_state(slot, State::Retired);
            self.slots[slot.at()].bad = false;
        }
        true
    }

    fn takes_what_is_guaranteed(&self, doomed: &[SlotIndex], allowances: &Allowances) -> bool {
        if allowances.0.is_empty() {
            return false;
        }
        let mut lost = BTreeMap::<_, usize>::new();
        for slot in doomed.iter().map(|slot| &self.slots[slot.at()]).filter(|slot| slot.is_resident()) {
            *lost.entry(slot.group).or_default() += 1;
        }
        // One less: a group that keeps exactly its minimum lost nothing that was guaranteed.
        lost.into_iter().any(|(group, lost)| self.groups.is_at_min(group, lost - 1, allowances))
    }

    /// Some slots, and all whose chain of parents passes through them.
    pub(super) fn with_descendants(&self, is_root: impl Fn(SlotIndex) -> bool) -> Vec<SlotIndex> {
        let mut inside: Vec<Option<bool>> = vec![None; self.slots.len()];
        let mut path = Vec::new();
        for start in 0..self.slots.len() {
            let mut at = start;
            let verdict = loop {
                if is_root(SlotIndex(at as u32)) {
                    break true;
                }
                if let Some(known) = inside[at] {
                    break known;
                }
                path.push(at);
                match self.slots[at].parent() {
                    Some(parent) => at = parent.at(),
                    None => break false,
                }
            };
            inside[start] = Some(verdict);
            path.drain(..).for_each(|slot| inside[slot] = Some(verdict));
        }
        let slots = inside.iter().enumerate().filter(|(_, inside)| **inside == Some(true));
        slots.map(|(slot, _)| SlotIndex(slot as u32)).collect()
    }
}
