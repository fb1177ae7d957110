//! Slots whose memory is given to another table, and come back.

use super::{SlotIndex, SlotTable, State};

impl SlotTable {
    /// Gives retired slots memory again.
    pub fn revive(&mut self, range: std::ops::Range<u32>) {
        for slot in range.rev().map(SlotIndex) {
            assert_eq!(self.slots[slot.at()].state, State::Retired, "only retired slots are revived");
            self.slots[slot.at()].state = State::Free;
            self.retired -= 1;
            self.free.push(slot);
        }
    }

    /// Takes the memory of a range of slots away: discards what is resident there and everything that hangs on it.
    /// Does nothing and returns false if any of that is in use.
    pub fn retire(&mut self, range: std::ops::Range<u32>) -> bool {
        let doomed = self.with_descendants(|slot| range.contains(&slot.0));
        let busy = |slot: &SlotIndex| {
            let slot = &self.slots[slot.at()];
            let idle = matches!(slot.state, State::Resident { .. } | State::Free | State::Bad);
            slot.pins > 0 || slot.copies > 0 || !idle
        };
        if doomed.iter().any(busy) {
            return false;
        }
        // Deepest first: a slot goes when it has no child left. Children mostly come behind their parents.
        let mut rest = doomed;
        rest.reverse();
        while !rest.is_empty() {
            rest.retain(|slot| match self.slots[slot.at()].state {
                State::Resident { .. } if self.slots[slot.at()].children > 0 => true,
                State::Resident { .. } => {
                    self.discard(*slot);
                    false
                }
                _ => false,
            });
        }
        self.free.retain(|slot| !range.contains(&slot.0));
        for slot in range.map(SlotIndex) {
            // The next class cuts the place otherwise: what was bad about it is not known any more.
            self.set_state(slot, State::Retired);
            self.slots[slot.at()].bad = false;
            self.retired += 1;
        }
        true
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
                match self.parent_of(SlotIndex(at as u32)) {
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
