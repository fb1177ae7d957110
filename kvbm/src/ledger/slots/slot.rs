//! One slot, and the state it is in.

use std::num::NonZeroU32;

use super::{GroupId, SlotIndex};
use crate::ledger::Millis;
use crate::ledger::key::{Key, NamespaceId};

/// What a slot is there for now. Says which of the slot's fields count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Free,
    /// Given to a holder who writes into it and names its key at commit: no key, no parent.
    Granted,
    /// Bytes are arriving for a key that is known.
    Filling,
    /// Filling did not succeed, but children that were being filled behind it have not heard of it yet: no key.
    Failed,
    /// Holds a block.
    Resident,
    /// Has no memory behind it.
    Retired,
    /// Did not give back what was stored in it: never used again.
    Bad,
}

/// A slot, or none, in four bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Link(Option<NonZeroU32>);

impl Link {
    pub fn get(self) -> Option<SlotIndex> {
        self.0.map(|behind| SlotIndex(behind.get() - 1))
    }
}

impl From<Option<SlotIndex>> for Link {
    fn from(slot: Option<SlotIndex>) -> Self {
        Self(slot.and_then(|slot| NonZeroU32::new(slot.0 + 1)))
    }
}

/// 64 bytes, a line of cache: a table has as many as there are blocks of memory.
#[derive(Debug)]
pub(super) struct Slot {
    /// Of a slot that is filling or resident.
    pub key: Key,
    /// Of a slot that is filling, failed or resident.
    pub parent: Link,
    /// When it was last stored, used or let go of, or the latest of those behind it that have left.
    pub used_at: Millis,
    /// Rises each time the slot is taken from the free list.
    pub generation: u32,
    /// Rights of holders: leases, sessions.
    pub pins: u32,
    /// Copies in flight from or to this slot.
    pub copies: u32,
    /// Slots whose parent is this one.
    pub children: u32,
    /// Blocks from the first of the sequence to this one.
    pub depth: u32,
    /// Whose share it counts for.
    pub group: GroupId,
    pub state: State,
    /// 0..=100, of the block in it.
    pub priority: u8,
    /// It waits in the queue of its group and priority.
    pub offered: bool,
    /// Its priority holds for a time: see `Expiry`.
    pub timed: bool,
    /// A user's pin is on it.
    pub kept: bool,
    /// It was not worth a place in the next tier: its children are not tried either.
    pub left_out: bool,
    /// Becomes [`State::Bad`] instead of free.
    pub bad: bool,
}

impl Slot {
    pub fn free() -> Self {
        Self {
            key: Key { namespace: NamespaceId(0), hash: kvbm_hash::SequenceHash([0; 16]) },
            parent: Link::default(),
            used_at: Millis(0),
            generation: 0,
            pins: 0,
            copies: 0,
            children: 0,
            depth: 0,
            group: GroupId::COMMON,
            state: State::Free,
            priority: super::PRIORITY_DEFAULT,
            offered: false,
            timed: false,
            kept: false,
            left_out: false,
            bad: false,
        }
    }

    /// Holding a block, or to hold one: what a tenant's share is counted in.
    pub fn is_in_use(&self) -> bool {
        matches!(self.state, State::Granted | State::Filling | State::Failed | State::Resident)
    }

    pub fn is_resident(&self) -> bool {
        self.state == State::Resident
    }

    /// The block before it.
    pub fn parent(&self) -> Option<SlotIndex> {
        match self.state {
            State::Filling | State::Failed | State::Resident => self.parent.get(),
            State::Free | State::Granted | State::Retired | State::Bad => None,
        }
    }

    /// Its key, if it has one.
    pub fn key(&self) -> Option<Key> {
        match self.state {
            State::Filling | State::Resident => Some(self.key),
            State::Free | State::Granted | State::Failed | State::Retired | State::Bad => None,
        }
    }

    /// Held by nobody, and nothing hangs on it.
    pub fn is_idle(&self) -> bool {
        self.pins == 0 && self.copies == 0 && self.children == 0 && !self.kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_one_line_of_cache() {
        assert_eq!(size_of::<Slot>(), 64);
        assert_eq!(Link::from(Some(SlotIndex(7))).get(), Some(SlotIndex(7)));
        assert_eq!(Link::from(None).get(), None);
    }
}
