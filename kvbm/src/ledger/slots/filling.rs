//! Slots are taken, filled and become resident, or do not.

use kvbm_hash::SequenceHash;

use super::evict::Claim;
use super::{Allowances, Change, GroupId, Reserved, Slot, SlotIndex, SlotTable, State};
use crate::ledger::key::Key;
use crate::ledger::policy::Newcomer;
use crate::ledger::{Millis, Retention};

/// A block that is to have a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Incoming {
    /// Its key.
    pub key: Key,
    /// Key of the block before it.
    pub parent: Option<SequenceHash>,
    /// How long and how dearly it is to be kept.
    pub retention: Retention,
    /// Whose share it counts for.
    pub group: GroupId,
}

#[cfg(test)]
impl Incoming {
    /// A block like any other.
    pub fn of_tests(key: Key, parent: Option<SequenceHash>) -> Self {
        Self { key, parent, retention: Retention::default(), group: GroupId::COMMON }
    }
}

/// How much a place is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Somebody waits for the block: whatever may be evicted is.
    Wanted,
    /// It is on its way to a tier below, which can only choose among what it sees: left out only if what would go for it
    /// is dearer.
    Passing,
    /// The block may be left out, if it is worth less than what would go for it.
    Optional,
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
    /// Its tenant has all it may have, and nothing of it can be evicted; the slot stays as it was.
    OverQuota,
    /// Not granted, or of another generation.
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
    /// Its tenant has all it may have, or what could be evicted is guaranteed to others.
    OverQuota,
    /// It is worth less than what would have to go.
    NotAdmitted,
}

impl SlotTable {
    /// Takes a slot for a block, evicting if need be. The parent, if any, is protected from that.
    pub fn reserve(
        &mut self,
        block: Incoming,
        need: Need,
        allowances: &Allowances,
        now: Millis,
    ) -> Result<Reserved, NotReserved> {
        if let Some(slot) = self.index.find(&self.slots, block.key) {
            let resident = self.slots[slot.at()].is_resident();
            return Err(if resident { NotReserved::Resident } else { NotReserved::Filling });
        }
        let parent = match block.parent {
            None => None,
            Some(hash) => Some(self.find_parent(Key { hash, ..block.key }).ok_or(NotReserved::Orphan)?),
        };
        self.adopt_child(parent);
        if let Err(refused) = self.make_place(&block, parent, need, allowances, now) {
            self.lose_child(parent, Millis(0), now);
            return Err(refused);
        }
        self.make_place_near(block.group, allowances, now);
        let slot = self.take_free(block.group).expect("a place was made");
        self.place(slot, block.key, parent);
        self.set_state(slot, State::Filling);
        self.set_retention(slot, block.retention, now);
        Ok(Reserved(slot))
    }

    fn make_place(
        &mut self,
        block: &Incoming,
        parent: Option<SlotIndex>,
        need: Need,
        allowances: &Allowances,
        now: Millis,
    ) -> Result<(), NotReserved> {
        let at_max = self.groups.is_at_max(block.group, allowances);
        if !at_max && !self.free.is_empty() {
            return Ok(());
        }
        let claim = if at_max { Claim::OfGroup(block.group) } else { Claim::For(block.group) };
        let Some(victim) = self.victim(claim, allowances, now) else {
            if !at_max && self.queues.counts().is_empty() {
                return Err(NotReserved::Exhausted);
            }
            self.groups.of(block.group).refused += 1;
            return Err(NotReserved::OverQuota);
        };
        if need != Need::Wanted {
            let goes = self.slots[victim.at()].priority;
            let newcomer = Newcomer {
                fingerprint: self.index.fingerprint(block.key),
                parent: parent.filter(|parent| self.slots[parent.at()].is_resident()),
                depth: self.depth(parent) as u32 + 1,
            };
            let priority = block.retention.priority;
            let is_worth_it =
                goes < priority || goes == priority && self.is_worth(need, &newcomer, victim, now);
            if !is_worth_it {
                self.passed_over(block.key, newcomer.depth, now);
                return Err(NotReserved::NotAdmitted);
            }
        }
        self.evict(victim, now);
        Ok(())
    }

    fn is_worth(&mut self, need: Need, newcomer: &Newcomer, victim: SlotIndex, now: Millis) -> bool {
        need == Need::Passing || self.policy.admits(newcomer, victim, now)
    }

    /// A block, so many blocks deep in its sequence, is not stored, because it or one before it was not admitted.
    pub fn passed_over(&mut self, key: Key, depth: u32, now: Millis) {
        self.policy.left_out(self.index.fingerprint(key), depth, now);
    }

    /// The bytes of a reserved slot are complete. False: the block before it failed, so this one is given up too.
    pub fn commit(&mut self, reserved: Reserved, now: Millis) -> bool {
        let slot = reserved.0;
        assert_eq!(self.slots[slot.at()].state, State::Filling, "a reserved slot is being filled");
        let parent = self.slots[slot.at()].parent();
        if parent.is_some_and(|parent| !self.slots[parent.at()].is_resident()) {
            self.abandon(Reserved(slot), now);
            return false;
        }
        self.become_resident(slot, now);
        true
    }

    /// The bytes of a reserved slot did not arrive.
    pub fn abandon(&mut self, reserved: Reserved, now: Millis) {
        let slot = reserved.0;
        assert_eq!(self.slots[slot.at()].state, State::Filling, "a reserved slot is being filled");
        self.index.remove(&self.slots, slot);
        self.set_state(slot, State::Failed);
        self.settle(slot, now);
    }

    /// Takes a slot without a key for a holder, with one pin, evicting if need be. It is not known yet whose block it will
    /// be. A holder must go on: if all that can be evicted is guaranteed to somebody, it is evicted nevertheless.
    pub fn grant(&mut self, allowances: &Allowances, now: Millis) -> Option<SlotIndex> {
        if self.free.is_empty() {
            let victim = self.victim(Claim::For(GroupId::COMMON), allowances, now);
            let victim = victim.or_else(|| self.victim(Claim::Any, allowances, now))?;
            self.evict(victim, now);
        }
        let slot = self.take_free(GroupId::COMMON)?;
        self.slots[slot.at()].pins = 1;
        self.set_state(slot, State::Granted);
        Some(slot)
    }

    /// A granted slot is complete and holds a block.
    pub fn commit_granted(
        &mut self,
        slot: SlotIndex,
        generation: u32,
        block: Incoming,
        allowances: &Allowances,
        now: Millis,
    ) -> Committed {
        let granted = self
            .slots
            .get(slot.at())
            .is_some_and(|slot| slot.generation == generation && slot.state == State::Granted);
        if !granted {
            return Committed::Stale;
        }
        if self.index.find(&self.slots, block.key).is_some() {
            return Committed::Duplicate;
        }
        let parent = match block.parent {
            None => None,
            Some(hash) => match self.find_parent(Key { hash, ..block.key }) {
                Some(parent) if self.slots[parent.at()].is_resident() => Some(parent),
                Some(_) | None => return Committed::Orphan,
            },
        };
        self.adopt_child(parent);
        if self.groups.is_at_max(block.group, allowances) {
            let Some(victim) = self.victim(Claim::OfGroup(block.group), allowances, now) else {
                self.groups.of(block.group).refused += 1;
                self.lose_child(parent, Millis(0), now);
                return Committed::OverQuota;
            };
            self.evict(victim, now);
        }
        self.set_group(slot, block.group);
        self.place(slot, block.key, parent);
        self.set_state(slot, State::Filling);
        self.set_retention(slot, block.retention, now);
        self.become_resident(slot, now);
        Committed::Resident
    }

    /// Gives a slot its key and its place behind `parent`, which knows of it already.
    pub(super) fn place(&mut self, slot: SlotIndex, key: Key, parent: Option<SlotIndex>) {
        let depth = self.depth(parent) as u32 + 1;
        let taken = &mut self.slots[slot.at()];
        (taken.key, taken.parent, taken.depth) = (key, parent.into(), depth);
        self.index.insert(&self.slots, slot);
        self.placed_last = slot;
    }

    /// Blocks come one behind the other: mostly the parent is the one that came before.
    fn find_parent(&self, key: Key) -> Option<SlotIndex> {
        let before = self.slots.get(self.placed_last.at()).and_then(Slot::key);
        if before == Some(key) { Some(self.placed_last) } else { self.index.find(&self.slots, key) }
    }

    fn become_resident(&mut self, slot: SlotIndex, now: Millis) {
        self.set_state(slot, State::Resident);
        self.slots[slot.at()].used_at = now;
        let Self { slots, index, policy, changes, .. } = self;
        let (stored, parent) = (&slots[slot.at()], slots[slot.at()].parent());
        changes.push(Change::Stored(stored.key, parent.map(|parent| slots[parent.at()].key.hash)));
        let fingerprint = index.fingerprint(stored.key);
        policy.stored(slot, Newcomer { fingerprint, parent, depth: stored.depth }, now);
        self.settle(slot, now);
    }

    fn take_free(&mut self, group: GroupId) -> Option<SlotIndex> {
        let slot = self.free.pop()?;
        let taken = &mut self.slots[slot.at()];
        taken.generation = taken.generation.wrapping_add(1);
        (taken.priority, taken.left_out, taken.group) = (super::PRIORITY_DEFAULT, false, group);
        Some(slot)
    }
}
