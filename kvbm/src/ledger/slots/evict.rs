//! Who waits to be evicted, who is chosen, and what follows.

use super::queues::{group_of, priority_of, queue_of};
use super::{Allowances, Change, GroupId, SlotIndex, SlotTable, State};
use crate::ledger::Millis;

/// Among whom a victim is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// For a block of this group: its own, and what is guaranteed to nobody.
    For(GroupId),
    /// Of this group only.
    OfGroup(GroupId),
    /// Everybody.
    Any,
}

impl SlotTable {
    /// The one place where a slot's membership in queues and free list is decided.
    pub(super) fn settle(&mut self, slot: SlotIndex, now: Millis) {
        let s = &self.slots[slot.at()];
        match s.state {
            State::Resident if s.is_idle() => {
                if !s.offered {
                    self.offer(slot, now);
                }
            }
            State::Resident => self.withdraw(slot),
            State::Granted | State::Failed if s.is_idle() => {
                let (bad, parent) = (s.bad, s.parent());
                self.forget_retention(slot);
                self.set_state(slot, if bad { State::Bad } else { State::Free });
                if !bad {
                    self.free.push(slot);
                }
                self.lose_child(parent, Millis(0), now);
            }
            State::Granted | State::Filling | State::Failed | State::Free | State::Retired | State::Bad => {}
        }
    }

    fn offer(&mut self, slot: SlotIndex, now: Millis) {
        if self.slots[slot.at()].timed {
            self.lapse(slot, now);
            self.expiry.start(slot, self.slots[slot.at()].used_at);
        }
        let s = &mut self.slots[slot.at()];
        s.offered = true;
        let queue = queue_of(s.group, s.priority);
        self.queues.enter(queue);
        self.policy.offered(slot, queue, now);
    }

    /// Does nothing if it was not offered. To be done before anything changes that its queue depends on.
    pub(super) fn withdraw(&mut self, slot: SlotIndex) {
        let s = &mut self.slots[slot.at()];
        if std::mem::take(&mut s.offered) {
            let queue = queue_of(s.group, s.priority);
            if s.timed {
                self.expiry.stop(slot);
            }
            self.queues.leave(queue);
            self.policy.withdrawn(slot);
        }
    }

    /// Who goes next. O(1) while all that wait are of one group.
    pub(super) fn victim(&mut self, claim: Claim, allowances: &Allowances, now: Millis) -> Option<SlotIndex> {
        self.expire(now);
        let Self { queues, policy, groups, slots, .. } = self;
        if allowances.0.is_empty()
            && !matches!(claim, Claim::OfGroup(_))
            && let Some(queue) = queues.only_lowest()
        {
            return policy.victim(queue, now);
        }
        let mut found: Option<(u8, Millis, SlotIndex)> = None;
        for queue in queues.iter() {
            let (group, priority) = (group_of(queue), priority_of(queue));
            if found.is_some_and(|(lowest, ..)| priority > lowest) {
                break;
            }
            let may_go = match claim {
                Claim::For(claimant) => claimant == group || !groups.is_at_min(group, 0, allowances),
                Claim::OfGroup(only) => only == group,
                Claim::Any => true,
            };
            if let Some(slot) = may_go.then(|| policy.victim(queue, now)).flatten() {
                let used_at = slots[slot.at()].used_at;
                if found.is_none_or(|(_, oldest, _)| used_at < oldest) {
                    found = Some((priority, used_at, slot));
                }
            }
        }
        found.map(|(.., slot)| slot)
    }

    pub(super) fn evict(&mut self, slot: SlotIndex, now: Millis) {
        self.evictions += 1;
        self.groups.of(self.slots[slot.at()].group).evicted += 1;
        self.withdraw(slot);
        self.policy.removed(slot, true, now);
        self.leave(slot, now);
    }

    /// As [`SlotTable::evict`], but not to make room.
    pub(super) fn discard(&mut self, slot: SlotIndex, now: Millis) {
        self.withdraw(slot);
        self.policy.removed(slot, false, now);
        self.leave(slot, now);
    }

    /// Resident and unused to free.
    fn leave(&mut self, slot: SlotIndex, now: Millis) {
        let s = &self.slots[slot.at()];
        assert!(s.is_resident() && s.is_idle(), "only what nobody holds is discarded");
        let (key, parent, used_at) = (s.key, s.parent(), s.used_at);
        self.forget_retention(slot);
        self.index.remove(&self.slots, slot);
        self.changes.push(Change::Removed(key));
        self.set_state(slot, State::Free);
        self.free.push(slot);
        self.lose_child(parent, used_at, now);
    }
}
