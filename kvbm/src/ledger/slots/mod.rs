//! The slots of one pool, device or host: who is in them, who holds them, who may be evicted.
//!
//! ```text
//!            reserve / grant                    commit
//!   Free ─────────────────────► Filling ───────────────────► Resident
//!    ▲                             │ abandon                     │
//!    │◄── no child waits ── Failed ◄┘                            │
//!    │◄──────────────────────────────────────────────────────────┘ evicted: no pin, no copy, no child
//!
//!   Resident ── condemned ──► Failed ──► Bad: did not give back what was stored, never used again
//! ```
//!
//! Invariants, checked by [`SlotTable::check_integrity`]:
//! * free + filling + failed + resident + retired + bad = all slots, and each collection agrees with the slots' states;
//! * a resident slot's parent is resident (prefixes are closed), so the deepest key of a prefix stands for all of it
//!   and a lookup may gallop;
//! * exactly the resident slots without pin, copy or child are in the eviction order.
//!
//! The tables touch no KV byte and know no time: order is a tick that rises with each use.

mod adoption;
mod condemn;
mod integrity;
mod lookup;
mod restore;
mod retire;

use std::collections::{BTreeSet, HashMap};

use kvbm_hash::SequenceHash;

use super::key::{Key, KeyHasher};

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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    /// Bytes are arriving. The key is known from the start (host) or at commit (device).
    Filling {
        key: Option<Key>,
        parent: Option<SlotIndex>,
    },
    /// Filling did not succeed, but children that were being filled behind it have not heard of it yet.
    Failed {
        parent: Option<SlotIndex>,
    },
    Resident {
        key: Key,
        parent: Option<SlotIndex>,
    },
    /// Has no memory behind it.
    Retired,
    /// Did not give back what was stored in it: never used again.
    Bad,
}

#[derive(Debug)]
struct Slot {
    state: State,
    /// Rises each time the slot is taken from the free list.
    generation: u32,
    /// Rights of holders: leases, sessions.
    pins: u32,
    /// Copies in flight from or to this slot.
    copies: u32,
    /// Slots whose parent is this one.
    children: u32,
    /// Blocks from the first of the sequence to this one.
    depth: u32,
    /// It is in the eviction order, under `last_used`.
    ordered: bool,
    /// Becomes [`State::Bad`] instead of free.
    bad: bool,
    /// 0..=100, of the block in it.
    priority: u8,
    last_used: u64,
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

/// What became of a commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Committed {
    /// Found by others from now on.
    Resident,
    /// The key is resident elsewhere in this table; the slot stays as it was.
    Duplicate,
    /// The block before it is not resident; the slot stays as it was.
    Orphan,
    /// Not being filled, or of another generation.
    Stale,
}

/// Why a key cannot be reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotReserved {
    /// It is resident already.
    Resident,
    /// It is being filled already.
    Filling,
    /// Its parent is neither resident nor being filled.
    Orphan,
    /// Nothing is free and nothing can be evicted.
    Exhausted,
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
    /// Those of the resident ones with a pin or a copy in flight.
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

/// See the module.
#[derive(Debug)]
pub struct SlotTable {
    slots: Vec<Slot>,
    free: Vec<SlotIndex>,
    index: HashMap<Key, SlotIndex, KeyHasher>,
    order: BTreeSet<(u64, SlotIndex)>,
    tick: u64,
    filling: usize,
    resident: usize,
    pinned: usize,
    retired: usize,
    bad: usize,
    evictions: u64,
    changes: Vec<Change>,
}

impl SlotTable {
    /// A table with `slots` free slots. `hasher` only spreads keys over buckets.
    pub fn new(slots: u32, hasher: KeyHasher) -> Self {
        let mut table = Self {
            slots: Vec::new(),
            free: Vec::new(),
            index: HashMap::with_hasher(hasher),
            order: BTreeSet::new(),
            tick: 0,
            filling: 0,
            resident: 0,
            pinned: 0,
            retired: 0,
            bad: 0,
            evictions: 0,
            changes: Vec::new(),
        };
        table.grow(slots);
        table
    }

    /// Adds free slots at the end and returns the first.
    pub fn grow(&mut self, slots: u32) -> SlotIndex {
        let first = self.slots.len() as u32;
        let fresh = || Slot {
            state: State::Free,
            generation: 0,
            pins: 0,
            copies: 0,
            children: 0,
            depth: 0,
            ordered: false,
            bad: false,
            priority: PRIORITY_DEFAULT,
            last_used: 0,
        };
        self.slots.extend((0..slots).map(|_| fresh()));
        self.free.extend((first..first + slots).rev().map(SlotIndex));
        SlotIndex(first)
    }

    fn parent_of(&self, slot: SlotIndex) -> Option<SlotIndex> {
        match self.slots[slot.at()].state {
            State::Filling { parent, .. } | State::Failed { parent } | State::Resident { parent, .. } => {
                parent
            }
            State::Free | State::Retired | State::Bad => None,
        }
    }

    // ---- filling ------------------------------------------------------------------------------------------------

    /// Takes a slot for `key`, evicting if need be. The parent, if any, is protected from that.
    pub fn reserve(&mut self, key: Key, parent: Option<SequenceHash>) -> Result<Reserved, NotReserved> {
        if let Some(slot) = self.index.get(&key) {
            let resident = matches!(self.slots[slot.at()].state, State::Resident { .. });
            return Err(if resident { NotReserved::Resident } else { NotReserved::Filling });
        }
        let parent = match parent {
            None => None,
            Some(hash) => Some(*self.index.get(&Key { hash, ..key }).ok_or(NotReserved::Orphan)?),
        };
        self.adopt_child(parent);
        let Some(slot) = self.take_free() else {
            self.lose_child(parent, 0);
            return Err(NotReserved::Exhausted);
        };
        self.set_state(slot, State::Filling { key: Some(key), parent });
        self.place_behind(slot, parent);
        self.index.insert(key, slot);
        Ok(Reserved(slot))
    }

    /// The bytes of a reserved slot are complete. False: the block before it failed, so this one is given up too.
    pub fn commit(&mut self, reserved: Reserved) -> bool {
        let slot = reserved.0;
        let State::Filling { key: Some(key), parent } = self.slots[slot.at()].state else {
            unreachable!("a reserved slot is being filled")
        };
        let parent_resident =
            parent.is_none_or(|parent| matches!(self.slots[parent.at()].state, State::Resident { .. }));
        if !parent_resident {
            self.abandon(Reserved(slot));
            return false;
        }
        self.become_resident(slot, key, parent);
        true
    }

    /// The bytes of a reserved slot did not arrive.
    pub fn abandon(&mut self, reserved: Reserved) {
        let slot = reserved.0;
        let State::Filling { key: Some(key), parent } = self.slots[slot.at()].state else {
            unreachable!("a reserved slot is being filled")
        };
        self.index.remove(&key);
        self.set_state(slot, State::Failed { parent });
        self.settle(slot);
    }

    /// Takes a slot without a key for a holder, with one pin, evicting if need be.
    pub fn grant(&mut self) -> Option<SlotIndex> {
        let slot = self.take_free()?;
        self.set_state(slot, State::Filling { key: None, parent: None });
        self.slots[slot.at()].pins = 1;
        Some(slot)
    }

    /// A granted slot is complete and holds `key`.
    pub fn commit_granted(
        &mut self,
        slot: SlotIndex,
        generation: u32,
        key: Key,
        parent: Option<SequenceHash>,
    ) -> Committed {
        let filling = self.slots.get(slot.at()).is_some_and(|s| {
            s.generation == generation && matches!(s.state, State::Filling { key: None, .. })
        });
        if !filling {
            return Committed::Stale;
        }
        if self.index.contains_key(&key) {
            return Committed::Duplicate;
        }
        let parent = match parent {
            None => None,
            Some(hash) => match self.resident(Key { hash, ..key }) {
                Some(parent) => Some(parent),
                None => return Committed::Orphan,
            },
        };
        self.adopt_child(parent);
        self.place_behind(slot, parent);
        self.index.insert(key, slot);
        self.become_resident(slot, key, parent);
        Committed::Resident
    }

    fn become_resident(&mut self, slot: SlotIndex, key: Key, parent: Option<SlotIndex>) {
        self.set_state(slot, State::Resident { key, parent });
        let parent = parent.and_then(|parent| self.hash_of(parent));
        self.changes.push(Change::Stored(key, parent));
        self.touch(slot);
        self.settle(slot);
    }

    // ---- rights -------------------------------------------------------------------------------------------------

    /// One more pin on a slot in use; it counts as used now.
    pub fn pin(&mut self, slot: SlotIndex) {
        self.alter(slot, |s| s.pins += 1);
        self.touch(slot);
        self.settle(slot);
    }

    /// Gives back `count` pins (at most those there are). The slot counts as used now. With the last, a granted slot
    /// becomes free.
    pub fn unpin(&mut self, slot: SlotIndex, count: u32) {
        self.alter(slot, |s| s.pins = s.pins.saturating_sub(count));
        self.touch(slot);
        self.settle(slot);
    }

    /// The block counts as used now.
    pub fn used(&mut self, slot: SlotIndex) {
        self.touch(slot);
        self.settle(slot);
    }

    /// Number of pins.
    pub fn pins(&self, slot: SlotIndex) -> u32 {
        self.slots[slot.at()].pins
    }

    /// A copy from or to the slot begins.
    pub fn begin_copy(&mut self, slot: SlotIndex) -> Copying {
        self.alter(slot, |s| s.copies += 1);
        self.settle(slot);
        Copying(slot)
    }

    /// The copy ended.
    pub fn end_copy(&mut self, copying: Copying) {
        self.alter(copying.0, |s| s.copies -= 1);
        self.settle(copying.0);
    }

    /// The holder of all pins is gone.
    pub fn drop_all_pins(&mut self) {
        for slot in (0..self.slots.len() as u32).map(SlotIndex) {
            if self.slots[slot.at()].pins > 0 {
                self.alter(slot, |s| s.pins = 0);
                self.settle(slot);
            }
        }
    }

    // ---- internal -----------------------------------------------------------------------------------------------

    fn take_free(&mut self) -> Option<SlotIndex> {
        if self.free.is_empty() {
            let (_, victim) = *self.order.first()?;
            self.evictions += 1;
            self.discard(victim);
        }
        let slot = self.free.pop()?;
        let taken = &mut self.slots[slot.at()];
        taken.generation = taken.generation.wrapping_add(1);
        taken.priority = PRIORITY_DEFAULT;
        Some(slot)
    }

    /// Resident and unused to free.
    fn discard(&mut self, slot: SlotIndex) {
        let State::Resident { key, parent } = self.slots[slot.at()].state else {
            unreachable!("only resident slots are discarded")
        };
        let last_used = self.slots[slot.at()].last_used;
        self.leave_order(slot);
        self.index.remove(&key);
        self.changes.push(Change::Removed(key));
        self.set_state(slot, State::Free);
        self.free.push(slot);
        self.lose_child(parent, last_used);
    }

    fn adopt_child(&mut self, parent: Option<SlotIndex>) {
        if let Some(parent) = parent {
            self.slots[parent.at()].children += 1;
            self.settle(parent);
        }
    }

    /// A use of a block is a use of all blocks before it. They learn of it when it goes, which is when it matters.
    fn lose_child(&mut self, parent: Option<SlotIndex>, last_used: u64) {
        if let Some(parent) = parent {
            self.leave_order(parent);
            let slot = &mut self.slots[parent.at()];
            slot.children -= 1;
            slot.last_used = slot.last_used.max(last_used);
            self.settle(parent);
        }
    }

    /// To be followed by `settle`.
    fn touch(&mut self, slot: SlotIndex) {
        self.leave_order(slot);
        self.tick += 1;
        self.slots[slot.at()].last_used = self.tick;
    }

    fn leave_order(&mut self, slot: SlotIndex) {
        let s = &mut self.slots[slot.at()];
        if std::mem::take(&mut s.ordered) {
            self.order.remove(&(s.last_used, slot));
        }
    }

    fn set_state(&mut self, slot: SlotIndex, state: State) {
        self.count(slot, false);
        self.slots[slot.at()].state = state;
        self.count(slot, true);
    }

    fn alter(&mut self, slot: SlotIndex, change: impl FnOnce(&mut Slot)) {
        self.count(slot, false);
        change(&mut self.slots[slot.at()]);
        self.count(slot, true);
    }

    /// The one place where gauges are derived from a slot.
    fn count(&mut self, slot: SlotIndex, enters: bool) {
        let slot = &self.slots[slot.at()];
        let pinned = slot.pins > 0 || slot.copies > 0;
        let add = |gauge: &mut usize| if enters { *gauge += 1 } else { *gauge -= 1 };
        match slot.state {
            State::Filling { .. } | State::Failed { .. } => add(&mut self.filling),
            State::Resident { .. } => {
                add(&mut self.resident);
                if pinned {
                    add(&mut self.pinned);
                }
            }
            State::Bad => add(&mut self.bad),
            State::Free | State::Retired => {}
        }
    }

    /// The one place where a slot's membership in eviction order and free list is decided.
    fn settle(&mut self, slot: SlotIndex) {
        let s = &mut self.slots[slot.at()];
        let idle = s.pins == 0 && s.copies == 0 && s.children == 0;
        match s.state {
            State::Resident { .. } if idle => {
                if !std::mem::replace(&mut s.ordered, true) {
                    self.order.insert((s.last_used, slot));
                }
            }
            State::Resident { .. } => self.leave_order(slot),
            State::Filling { key: None, parent } | State::Failed { parent } if idle => {
                let bad = s.bad;
                self.set_state(slot, if bad { State::Bad } else { State::Free });
                if !bad {
                    self.free.push(slot);
                }
                self.lose_child(parent, 0);
            }
            State::Filling { .. } | State::Failed { .. } => {}
            State::Free | State::Retired | State::Bad => {}
        }
    }

    // ---- accounts -----------------------------------------------------------------------------------------------

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
        self.index.keys().copied()
    }

    /// Blocks evicted to make room, ever.
    pub fn evictions(&self) -> u64 {
        self.evictions
    }

    /// True if no slot of the range is in use; bad ones are not.
    pub fn all_free(&self, range: std::ops::Range<u32>) -> bool {
        range.into_iter().all(|slot| matches!(self.slots[slot as usize].state, State::Free | State::Bad))
    }

    /// Latest use of any slot in the range.
    pub fn last_used(&self, range: std::ops::Range<u32>) -> u64 {
        range.into_iter().map(|slot| self.slots[slot as usize].last_used).max().unwrap_or(0)
    }

    /// What became resident or left since the last call, in order.
    pub fn take_changes(&mut self) -> std::vec::Drain<'_, Change> {
        self.changes.drain(..)
    }
}

#[cfg(test)]
mod tests;
