//! Host slots that engines of an earlier daemon may still be touching.

use crate::ledger::segments::{Class, SegmentId};
use crate::ledger::slots::SlotIndex;
use crate::ledger::{Ledger, Millis};

/// A slot that is kept as it is until its engine is done with it. Comes back through [`Ledger::release_found`].
#[must_use]
#[derive(Debug)]
pub struct FoundHold {
    class: Class,
    slot: SlotIndex,
}

impl Ledger {
    /// Keeps a slot of a segment that was found: the block in it, or, if none was found there, the place. `None`: the
    /// segment has no class.
    pub fn hold_found(&mut self, segment: SegmentId, index: u32) -> Option<FoundHold> {
        let (class, table) =
            self.host.classes_mut().find(|(_, table)| table.slot_at(segment, index).is_some())?;
        let slot = table.slot_at(segment, index).expect("it was just there");
        if table.slots.adopt(slot, table.slots.generation(slot)) {
            table.slots.finish_adoption();
        } else {
            table.slots.pin(slot);
        }
        Some(FoundHold { class: *class, slot })
    }

    /// Its engine is done with a slot.
    pub fn release_found(&mut self, hold: FoundHold, now: Millis) {
        let table = self.host.class_mut(hold.class).expect("a class with a held slot stays");
        table.slots.unpin(hold.slot, 1, now);
        self.sweep();
    }
}
