//! Least recently used goes first.

use std::collections::{BTreeMap, BTreeSet};

use super::{Newcomer, Policy, QueueId};
use crate::ledger::Millis;
use crate::ledger::slots::SlotIndex;

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    last_used: u64,
    parent: Option<SlotIndex>,
    queue: Option<QueueId>,
}

/// See the module. A use of a block is a use of all blocks before it: they learn of it when it goes, which is when it
/// matters.
#[derive(Debug, Default)]
pub struct Lru {
    slots: Vec<Entry>,
    queues: BTreeMap<QueueId, BTreeSet<(u64, SlotIndex)>>,
    tick: u64,
}

impl Lru {
    fn touch(&mut self, slot: SlotIndex) {
        let queue = self.slots[slot.at()].queue;
        self.withdrawn(slot);
        self.tick += 1;
        self.slots[slot.at()].last_used = self.tick;
        if let Some(queue) = queue {
            self.enter(slot, queue);
        }
    }

    fn enter(&mut self, slot: SlotIndex, queue: QueueId) {
        let entry = &mut self.slots[slot.at()];
        entry.queue = Some(queue);
        self.queues.entry(queue).or_default().insert((entry.last_used, slot));
    }
}

impl Policy for Lru {
    fn grow(&mut self, slots: u32) {
        self.slots.resize(slots as usize, Entry::default());
    }

    fn stored(&mut self, slot: SlotIndex, block: Newcomer, _: Millis) {
        self.tick += 1;
        self.slots[slot.at()] = Entry { last_used: self.tick, parent: block.parent, queue: None };
    }

    fn used(&mut self, slot: SlotIndex, _: Millis) {
        self.touch(slot);
    }

    fn released(&mut self, slot: SlotIndex, _: Millis) {
        self.touch(slot);
    }

    fn offered(&mut self, slot: SlotIndex, queue: QueueId, _: Millis) {
        self.enter(slot, queue);
    }

    fn withdrawn(&mut self, slot: SlotIndex) {
        let entry = &mut self.slots[slot.at()];
        if let Some(order) = entry.queue.take().and_then(|queue| self.queues.get_mut(&queue)) {
            order.remove(&(entry.last_used, slot));
        }
    }

    fn victim(&mut self, queue: QueueId, _: Millis) -> Option<SlotIndex> {
        self.queues.get(&queue)?.first().map(|(_, slot)| *slot)
    }

    fn removed(&mut self, slot: SlotIndex, _: bool, _: Millis) {
        let gone = std::mem::take(&mut self.slots[slot.at()]);
        if let Some(parent) = gone.parent {
            let queue = self.slots[parent.at()].queue;
            self.withdrawn(parent);
            let entry = &mut self.slots[parent.at()];
            entry.last_used = entry.last_used.max(gone.last_used);
            if let Some(queue) = queue {
                self.enter(parent, queue);
            }
        }
    }

    fn bytes(&self) -> usize {
        // A node of the tree is two thirds full on average.
        let offered: usize = self.queues.values().map(BTreeSet::len).sum();
        self.slots.capacity() * size_of::<Entry>() + offered * size_of::<(u64, SlotIndex)>() * 3 / 2
    }

    fn check_integrity(&self) {
        for (queue, order) in &self.queues {
            for (last_used, slot) in order {
                let entry = &self.slots[slot.at()];
                assert_eq!((entry.queue, entry.last_used), (Some(*queue), *last_used), "{slot:?}");
            }
        }
        let offered = self.slots.iter().filter(|entry| entry.queue.is_some()).count();
        assert_eq!(offered, self.queues.values().map(BTreeSet::len).sum::<usize>());
    }
}
