//! Priorities that hold for a time only. Few blocks have such: what is about them is kept beside the slots.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use super::SlotIndex;
use crate::ledger::Millis;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Timed {
    duration_ms: u64,
    /// When it ends, while the block waits to be evicted.
    due: Option<Millis>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Expiry {
    timed: HashMap<SlotIndex, Timed>,
    due: BTreeSet<(Millis, SlotIndex)>,
}

impl Expiry {
    /// The priority of the block in a slot holds so long after it is let go of.
    pub fn set(&mut self, slot: SlotIndex, duration: Duration) {
        let duration_ms = duration.as_millis().try_into().unwrap_or(u64::MAX);
        let before = self.timed.insert(slot, Timed { duration_ms, due: None });
        self.forget(slot, before);
    }

    /// The priority of the block in a slot, if it is still there, holds for ever.
    pub fn clear(&mut self, slot: SlotIndex) {
        let before = self.timed.remove(&slot);
        self.forget(slot, before);
    }

    fn forget(&mut self, slot: SlotIndex, before: Option<Timed>) {
        if let Some(due) = before.and_then(|timed| timed.due) {
            self.due.remove(&(due, slot));
        }
    }

    pub fn duration(&self, slot: SlotIndex) -> Option<Duration> {
        self.timed.get(&slot).map(|timed| Duration::from_millis(timed.duration_ms))
    }

    /// When the priority ends that began to run at `from`.
    pub fn end(&self, slot: SlotIndex, from: Millis) -> Option<Millis> {
        self.timed.get(&slot).map(|timed| Millis(from.0.saturating_add(timed.duration_ms)))
    }

    /// The clock runs from `from`.
    pub fn start(&mut self, slot: SlotIndex, from: Millis) {
        self.stop(slot);
        if let Some(timed) = self.timed.get_mut(&slot) {
            let due = Millis(from.0.saturating_add(timed.duration_ms));
            timed.due = Some(due);
            self.due.insert((due, slot));
        }
    }

    /// The block is held again.
    pub fn stop(&mut self, slot: SlotIndex) {
        let due = self.timed.get_mut(&slot).and_then(|timed| timed.due.take());
        if let Some(due) = due {
            self.due.remove(&(due, slot));
        }
    }

    /// The next block whose time is over, if there is one.
    pub fn next(&self, now: Millis) -> Option<SlotIndex> {
        self.due.first().filter(|(due, _)| *due <= now).map(|(_, slot)| *slot)
    }

    /// Blocks with a duration.
    pub fn len(&self) -> usize {
        self.timed.len()
    }

    pub fn bytes(&self) -> usize {
        self.timed.capacity() * size_of::<(SlotIndex, Timed)>()
            + self.due.len() * size_of::<(Millis, SlotIndex)>()
    }

    pub fn check_integrity(
        &self,
        is_timed: impl Fn(SlotIndex) -> bool,
        is_running: impl Fn(SlotIndex) -> bool,
    ) {
        for (slot, timed) in &self.timed {
            assert!(is_timed(*slot), "{slot:?} has a duration");
            assert_eq!(timed.due.is_some(), is_running(*slot), "the clock of {slot:?} runs");
            assert!(timed.due.is_none_or(|due| self.due.contains(&(due, *slot))));
        }
        assert_eq!(self.due.len(), self.timed.values().filter(|timed| timed.due.is_some()).count());
    }
}
