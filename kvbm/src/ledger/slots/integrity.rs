//! What must hold after every step.

use super::{SlotIndex, SlotTable, State};

impl SlotTable {
    /// Panics if an invariant of the module does not hold. O(slots).
    pub fn check_integrity(&self) {
        let (mut free, mut filling, mut resident, mut pinned, mut retired, mut bad, mut idle) =
            (0, 0, 0, 0, 0, 0, 0);
        let mut children = vec![0; self.slots.len()];
        let mut keyed = 0;
        for (i, slot) in self.slots.iter().enumerate() {
            let at = SlotIndex(i as u32);
            if let Some(parent) = self.parent_of(at) {
                children[parent.at()] += 1;
                let parent = self.slots[parent.at()].state;
                match slot.state {
                    State::Resident { .. } => assert!(
                        matches!(parent, State::Resident { .. }),
                        "{at:?} is resident, its parent {parent:?}"
                    ),
                    _ => assert!(
                        !matches!(parent, State::Free | State::Retired | State::Bad),
                        "{at:?} hangs on a slot that is {parent:?}"
                    ),
                }
            }
            match slot.state {
                State::Free => {
                    free += 1;
                    assert_eq!((slot.pins, slot.copies, slot.children), (0, 0, 0), "{at:?} is free");
                }
                State::Retired => retired += 1,
                State::Bad => {
                    bad += 1;
                    assert_eq!((slot.pins, slot.copies, slot.children), (0, 0, 0), "{at:?} is bad");
                }
                State::Failed { .. } => filling += 1,
                State::Filling { key, .. } => {
                    filling += 1;
                    if let Some(key) = key {
                        assert_eq!(self.index.get(&key), Some(&at));
                        keyed += 1;
                    }
                }
                State::Resident { key, .. } => {
                    resident += 1;
                    keyed += 1;
                    assert_eq!(self.index.get(&key), Some(&at));
                    pinned += usize::from(slot.pins > 0 || slot.copies > 0);
                    let is_idle = slot.pins == 0 && slot.copies == 0 && slot.children == 0;
                    idle += usize::from(is_idle);
                    assert_eq!(
                        self.order.contains(&(slot.last_used, at)),
                        is_idle,
                        "{at:?} in eviction order"
                    );
                }
            }
        }
        for (slot, children) in self.slots.iter().zip(children) {
            assert_eq!(slot.children, children, "children are counted");
        }
        assert_eq!(self.index.len(), keyed, "the index holds what is filling or resident under a key");
        assert_eq!(self.order.len(), idle, "the order holds the evictable");
        assert_eq!((self.free.len(), self.filling, self.resident), (free, filling, resident));
        assert_eq!((self.pinned, self.retired, self.bad), (pinned, retired, bad));
        assert_eq!(free + filling + resident + retired + bad, self.slots.len());
    }
}
