//! The slots of one pool, or of one class of a tier: who is in them, who holds them, who may be evicted.
//!
//! ```text
//!            grant                        commit
//!   Free ─────────────► Granted ─────────────────────────► Resident
//!    │                     │ let go                          │
//!    │       reserve       ▼              commit             │
//!    ├─────────────────► Filling ───────────────────────────►│
//!    ▲                     │ abandon                         │
//!    │◄── no child waits ─ Failed                            │
//!    │◄──────────────────────────────────────────────────────┘ evicted: no pin, no copy, no child
//!
//!   Resident ── condemned ──► Failed ──► Bad: did not give back what was stored, never used again
//! ```
//!
//! Who is evicted is decided by the order of rights: what is pinned stays; what a tenant is guaranteed is not taken from
//! it for others; who is at a maximum makes room of its own; a lower priority goes before a higher one; the [`Policy`]
//! decides among equals. Of two groups of tenants whose candidates have equal priority, the one used longest ago goes.
//!
//! Invariants, checked by [`SlotTable::check_integrity`]:
//! * free + filling + failed + resident + retired + bad = all slots, and each collection agrees with the slots' states;
//! * a resident slot's parent is resident (prefixes are closed), so the deepest key of a prefix stands for all of it
//!   and a lookup may gallop;
//! * exactly the resident slots without pin, copy or child are offered to the policy, in the queue of their group and
//!   priority.
//!
//! The tables touch no KV byte and are told the time.

mod accounts;
mod adoption;
mod condemn;
mod evict;
mod expiry;
mod filling;
mod free;
mod groups;
mod holding;
mod index;
mod integrity;
mod lookup;
mod queues;
mod restore;
mod retention;
mod retire;
mod slot;

use kvbm_hash::SequenceHash;

use super::Millis;
use super::key::{Key, KeyHasher};
use super::policy::{Policy, PolicyKind};
use expiry::Expiry;
use free::FreeSlots;
use groups::Groups;
use index::Index;
use queues::Queues;
use slot::{Slot, State};

pub use filling::{Committed, Incoming, Need, NotReserved};
pub use groups::{Allowance, Allowances, GroupCounts, GroupId};
pub use restore::Restored;

/// Priority of a block whose writer gave none.
pub const PRIORITY_DEFAULT: u8 = 35;

/// Position in a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotIndex(pub u32);

impl SlotIndex {
    pub(super) fn at(self) -> usize {
        self.0 as usize
    }
}

/// Right to fill one slot. Consumed by `commit` or `abandon`.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub struct Reserved(SlotIndex);

impl Reserved {
    /// The slot it is about.
    pub fn slot(&self) -> SlotIndex {
        self.0
    }
}

/// Right to copy from or to one slot. Consumed by `end_copy`.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub struct Copying(SlotIndex);

impl Copying {
    /// The slot it is about.
    pub fn slot(&self) -> SlotIndex {
        self.0
    }
}

/// Slots by state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// On the free list.
    pub free: usize,
    /// Being filled, or granted.
    pub filling: usize,
    /// Holding a block.
    pub resident: usize,
    /// Those of the resident ones that somebody holds or copies.
    pub pinned: usize,
    /// Never used again, because they did not give back what was stored in them.
    pub bad: usize,
}

/// A block that left or entered the table, for events and accounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Became resident.
    Stored(Key, Option<SequenceHash>),
    /// Evicted or discarded.
    Removed(Key),
}

/// How tables are made.
#[derive(Debug, Clone, Copy)]
pub struct TableRules {
    /// Spreads keys over buckets.
    pub hasher: KeyHasher,
    /// Order of eviction among equals.
    pub policy: PolicyKind,
}

#[cfg(test)]
impl TableRules {
    /// Exact order, keys spread always alike.
    pub fn of_tests() -> Self {
        Self { hasher: KeyHasher::new(7), policy: PolicyKind::Lru }
    }
}

/// See the module.
#[derive(Debug)]
pub struct SlotTable {
    slots: Vec<Slot>,
    free: FreeSlots,
    index: Index,
    policy: Box<dyn Policy>,
    queues: Queues,
    expiry: Expiry,
    groups: Groups,
    /// Blocks with a user's pin on them.
    kept: usize,
    filling: usize,
    resident: usize,
    pinned: usize,
    retired: usize,
    bad: usize,
    /// The slot that got its key last.
    placed_last: SlotIndex,
    evictions: u64,
    changes: Vec<Change>,
}

impl SlotTable {
    /// A table with `slots` free slots.
    pub fn new(slots: u32, rules: TableRules) -> Self {
        let mut table = Self {
            slots: Vec::new(),
            free: FreeSlots::default(),
            index: Index::new(rules.hasher),
            policy: rules.policy.build(slots),
            queues: Queues::default(),
            expiry: Expiry::default(),
            groups: Groups::default(),
            kept: 0,
            filling: 0,
            resident: 0,
            pinned: 0,
            retired: 0,
            bad: 0,
            placed_last: SlotIndex(0),
            evictions: 0,
            changes: Vec::new(),
        };
        table.grow(slots);
        table
    }

    /// Adds free slots at the end and returns the first.
    pub fn grow(&mut self, slots: u32) -> SlotIndex {
        let first = self.slots.len() as u32;
        self.slots.extend((0..slots).map(|_| Slot::free()));
        self.free.extend((first..first + slots).rev().map(SlotIndex));
        self.index.reserve(&self.slots);
        self.policy.grow(first + slots);
        SlotIndex(first)
    }

    // ---- what all changes go through ------------------------------------------------------------------------------

    fn set_state(&mut self, slot: SlotIndex, state: State) {
        self.count(slot, false);
        self.slots[slot.at()].state = state;
        self.count(slot, true);
    }

    /// The one place where gauges are derived from a slot.
    fn count(&mut self, slot: SlotIndex, enters: bool) {
        let slot = &self.slots[slot.at()];
        let add = |gauge: &mut usize| if enters { *gauge += 1 } else { *gauge -= 1 };
        if slot.is_in_use() {
            add(&mut self.groups.of(slot.group).in_use);
        }
        match slot.state {
            State::Granted | State::Filling | State::Failed => add(&mut self.filling),
            State::Resident => {
                add(&mut self.resident);
                if slot.pins > 0 || slot.copies > 0 {
                    add(&mut self.pinned);
                }
            }
            State::Bad => add(&mut self.bad),
            State::Retired => add(&mut self.retired),
            State::Free => {}
        }
    }

    /// The slot counts for another group from now on.
    fn set_group(&mut self, slot: SlotIndex, group: GroupId) {
        self.count(slot, false);
        self.slots[slot.at()].group = group;
        self.count(slot, true);
    }

    fn adopt_child(&mut self, parent: Option<SlotIndex>) {
        if let Some(parent) = parent {
            self.slots[parent.at()].children += 1;
            self.withdraw(parent);
        }
    }

    /// A use of a block is a use of all blocks before it. They learn of it when it goes, which is when it matters.
    fn lose_child(&mut self, parent: Option<SlotIndex>, used_at: Millis, now: Millis) {
        if let Some(parent) = parent {
            let slot = &mut self.slots[parent.at()];
            slot.children -= 1;
            slot.used_at = slot.used_at.max(used_at);
            self.settle(parent, now);
        }
    }
}

#[cfg(test)]
mod tests;
