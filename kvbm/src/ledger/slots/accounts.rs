//! Figures of a table.

use super::{Change, GroupCounts, GroupId, SlotCounts, SlotIndex, SlotTable, State};
use crate::ledger::Millis;
use crate::ledger::key::{Key, NamespaceId};

impl SlotTable {
    /// Slots by state.
    pub fn counts(&self) -> SlotCounts {
        SlotCounts {
            free: self.free.len(),
            filling: self.filling,
            resident: self.resident,
            pinned: self.pinned,
            bad: self.bad,
        }
    }

    /// Slots with memory behind them.
    pub fn slots(&self) -> usize {
        self.slots.len() - self.retired
    }

    /// One behind the last slot, retired ones included.
    pub fn end(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Keys of what is resident or being filled under one, in no order.
    pub fn keys(&self) -> impl Iterator<Item = Key> + '_ {
        self.index.iter().map(|slot| self.slots[slot.at()].key)
    }

    /// Blocks evicted to make room, ever.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// For whose share a slot counts.
    pub fn group_of(&self, slot: SlotIndex) -> GroupId {
        self.slots[slot.at()].group
    }

    /// What a group has of the table.
    pub fn group(&self, group: GroupId) -> GroupCounts {
        self.groups.get(group)
    }

    /// Blocks of a namespace count for this group from now on. O(slots).
    pub fn regroup(&mut self, namespace: NamespaceId, group: GroupId, now: Millis) {
        for slot in (0..self.end()).map(SlotIndex) {
            let s = &self.slots[slot.at()];
            let is_meant = s.group != group && (s.key().is_some_and(|key| key.namespace == namespace));
            if is_meant {
                self.withdraw(slot);
                self.set_group(slot, group);
                self.settle(slot, now);
            }
        }
    }

    /// True if no slot of the range is in use; bad ones are not.
    pub fn all_free(&self, range: std::ops::Range<u32>) -> bool {
        range.into_iter().all(|slot| matches!(self.slots[slot as usize].state, State::Free | State::Bad))
    }

    /// How dear the blocks in a range are: the highest priority of any, and the latest use of any.
    pub fn worth(&self, range: std::ops::Range<u32>) -> (u8, Millis) {
        let resident =
            self.slots[range.start as usize..range.end as usize].iter().filter(|s| s.is_resident());
        resident.fold((0, Millis(0)), |(priority, used), s| (priority.max(s.priority), used.max(s.used_at)))
    }

    /// What became resident or left since the last call, in order.
    pub fn take_changes(&mut self) -> std::vec::Drain<'_, Change> {
        self.changes.drain(..)
    }

    /// Bytes that the table takes for what it knows of its slots, its policy's included.
    pub fn metadata_bytes(&self) -> usize {
        self.slots.capacity() * size_of::<super::Slot>()
            + self.free.capacity() * size_of::<SlotIndex>()
            + self.index.bytes()
            + self.expiry.bytes()
            + self.policy.bytes()
    }
}
