//! What must hold after every step.

use std::collections::BTreeMap;

use super::queues::queue_of;
use super::{SlotCounts, SlotIndex, SlotTable, State};

impl SlotTable {
    /// Panics if an invariant of the module does not hold. O(slots).
    pub fn check_integrity(&self) {
        let mut counts = SlotCounts::default();
        let (mut retired, mut kept, mut keyed) = (0, 0, 0);
        let mut children = vec![0; self.slots.len()];
        let mut in_use = BTreeMap::<_, usize>::new();
        let mut waiting = BTreeMap::<_, usize>::new();
        for (i, slot) in self.slots.iter().enumerate() {
            let at = SlotIndex(i as u32);
            if let Some(parent) = slot.parent() {
                children[parent.at()] += 1;
                self.check_parent(at, parent);
            }
            if let Some(key) = slot.key() {
                assert_eq!(self.index.find(&self.slots, key), Some(at));
                keyed += 1;
            }
            if slot.is_in_use() {
                *in_use.entry(slot.group).or_default() += 1;
            } else {
                assert_eq!((slot.pins, slot.copies, slot.children), (0, 0, 0), "{at:?} is not in use");
                assert!(!slot.timed && !slot.kept, "{at:?} is not in use");
            }
            match slot.state {
                State::Free => counts.free += 1,
                State::Retired => retired += 1,
                State::Bad => counts.bad += 1,
                State::Granted | State::Filling | State::Failed => counts.filling += 1,
                State::Resident => {
                    counts.resident += 1;
                    counts.pinned += usize::from(slot.pins > 0 || slot.copies > 0);
                }
            }
            kept += usize::from(slot.kept);
            assert_eq!(slot.offered, slot.is_resident() && slot.is_idle(), "{at:?} is offered");
            if slot.offered {
                *waiting.entry(queue_of(slot.group, slot.priority)).or_default() += 1;
            }
        }
        for (slot, children) in self.slots.iter().zip(children) {
            assert_eq!(slot.children, children, "children are counted");
        }
        assert_eq!(self.index.len(), keyed, "the index holds what is filling or resident under a key");
        assert_eq!(*self.queues.counts(), waiting, "queues hold the evictable");
        assert_eq!(self.counts(), counts);
        assert_eq!((self.retired, self.kept), (retired, kept));
        assert_eq!(counts.free + counts.filling + counts.resident + retired + counts.bad, self.slots.len());
        for (group, counts) in self.groups.all().iter().enumerate() {
            let group = super::GroupId(group as u16);
            assert_eq!(counts.in_use, in_use.get(&group).copied().unwrap_or(0), "{group:?}");
        }
        let timed = |slot: SlotIndex| self.slots[slot.at()].timed;
        self.expiry.check_integrity(timed, |slot| self.slots[slot.at()].offered);
        assert_eq!(self.slots.iter().filter(|slot| slot.timed).count(), self.expiry.len());
        self.policy.check_integrity();
    }

    fn check_parent(&self, at: SlotIndex, parent: SlotIndex) {
        let (slot, parent) = (&self.slots[at.at()], &self.slots[parent.at()]);
        match slot.state {
            State::Resident => {
                assert!(parent.is_resident(), "{at:?} is resident, its parent {:?}", parent.state);
                assert_eq!(slot.depth, parent.depth + 1, "{at:?}");
            }
            _ => assert!(parent.is_in_use(), "{at:?} hangs on a slot that is {:?}", parent.state),
        }
    }
}
