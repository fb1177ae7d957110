//! What is least worth its space goes first: times of reuse are learned, and ranked by Gittins' index.
//!
//! ```text
//!   events ──► Slot: uses, last use ──────────► cell (class, age) ──► Order: cells by worth ──► victim
//!     │                                                                    ▲
//!     ├─ a sample of all ─────► History: resident or not ──► Hazards ──► index
//!     └─ blocks that went ────► Ghosts: how often they were used
//! ```
//!
//! What each part does is told in its module, and why all this pays in `docs/policies.md`.
//!
//! A use of a block is one of all blocks before it. They are not told at once: a block that goes tells its parent when
//! it was last used and how often since it came. Only then may the parent be chosen, so it always knows in time. Blocks
//! of the sample are told at once, from one to the next, because what is learned must not depend on evictions.

mod ages;
mod class;
mod ghosts;
mod hazard;
mod history;
mod order;

use super::{Newcomer, Policy, QueueId};
use crate::ledger::Millis;
use crate::ledger::slots::SlotIndex;
use ages::{Clock, Tick, bucket};
use class::Class;
use ghosts::Ghosts;
use hazard::{Hazards, cell};
use history::History;
use order::Order;

const NONE: u32 = u32::MAX;

/// Events after which half of what was learned is forgotten: so many, or so many for each slot if that is more.
const HALF_LIFE: f64 = 65_536.0;
const HALF_LIFE_PER_SLOT: f64 = 8.0;

/// The index is computed anew after so many events, earlier while little is known.
const EVENTS_PER_INDEX: u64 = 8192;

/// Blocks are looked at for a change of age after so many events, or after one for each sixteenth slot.
const EVENTS_PER_AGING: u64 = 2048;

/// Sets of the history that are looked at for each use of a sampled block.
const SETS_PER_USE: usize = 4;

#[derive(Debug, Clone, Copy)]
struct Slot {
    mark: u32,
    parent: u32,
    /// The nearest block before it that is in the sample.
    sampled_before: u32,
    last_used: Tick,
    /// Saturates.
    depth: u16,
    /// All that is known of, those of earlier stays included. Saturates.
    uses: u16,
    /// How many they were when it was stored.
    uses_at_first: u16,
    /// The last request that used it went no further.
    ends_a_request: bool,
}

const EMPTY: Slot = Slot {
    mark: 1,
    parent: NONE,
    sampled_before: NONE,
    last_used: Tick(0),
    depth: 1,
    uses: 1,
    uses_at_first: 1,
    ends_a_request: false,
};

/// See the module.
#[derive(Debug)]
pub struct Gittins {
    slots: Vec<Slot>,
    clock: Clock,
    history: History,
    ghosts: Ghosts,
    hazards: Hazards,
    order: Order,
    /// Uses, of resident blocks and of others.
    events: u64,
    events_learned: u64,
    events_aged: u64,
}

impl Default for Gittins {
    fn default() -> Self {
        let hazards = Hazards::default();
        let order = Order::new(hazards.index());
        Self {
            slots: Vec::new(),
            clock: Clock::default(),
            history: History::default(),
            ghosts: Ghosts::default(),
            hazards,
            order,
            events: 0,
            events_learned: 0,
            events_aged: 0,
        }
    }
}

/// What stands for a fingerprint here; never 0.
fn mark(fingerprint: u64) -> u32 {
    ((fingerprint.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u32).max(1)
}

impl Slot {
    fn cell(&self, now: Tick) -> usize {
        let class = Class::new(self.uses, self.depth, self.ends_a_request);
        cell(class, bucket(now.since(self.last_used)))
    }
}

impl Gittins {
    /// Time goes on, and now and then what was learned comes to bear.
    fn event(&mut self, now: Millis) -> Tick {
        let now = self.clock.event(now);
        self.events += 1;
        let events = self.events - self.events_learned;
        if events >= EVENTS_PER_INDEX.min(self.events / 4).max(64) {
            self.events_learned = self.events;
            let half_life = HALF_LIFE.max(HALF_LIFE_PER_SLOT * self.slots.len() as f64);
            self.hazards.learn((-(events as f64) / half_life).exp2() as f32);
            self.order.rank(self.hazards.index());
        }
        now
    }

    /// A use of a block that was not resident; the number of its uses.
    fn use_of_absent(&mut self, mark: u32, depth: u16, uses_before: u16, now: Tick) -> u16 {
        let uses = uses_before.saturating_add(1);
        if !History::samples(mark) {
            return uses;
        }
        self.history.sweep(SETS_PER_USE, now, &mut self.hazards);
        self.history.used(mark, depth, uses, now, &mut self.hazards)
    }

    fn enter(&mut self, slot: SlotIndex, queue: QueueId, now: Tick) {
        let entry = &self.slots[slot.at()];
        let age = now.since(entry.last_used);
        let is_older_than = |other: SlotIndex| age >= now.since(self.slots[other.at()].last_used);
        self.order.enter(slot, queue, entry.cell(now), is_older_than);
    }

    /// Moves blocks that got older to the cells where they belong.
    fn age(&mut self, queue: QueueId, now: Tick) {
        for at in 0..hazard::CELLS.div_ceil(64) {
            let mut cells = self.order.occupied(queue, at);
            while let Some(cell) = cells.next(&self.order) {
                while let Some(slot) = self.order.first_in(queue, cell) {
                    if self.slots[slot.at()].cell(now) == cell {
                        break;
                    }
                    self.order.leave(slot);
                    self.enter(slot, queue, now);
                }
            }
        }
    }
}

impl Policy for Gittins {
    fn grow(&mut self, slots: u32) {
        let slots = slots as usize;
        self.slots.resize(slots, EMPTY);
        self.order.grow(slots);
        // Small tables need a longer memory: what they evict comes back after many times their size.
        let history = (slots * 3 / 4).max((slots * 32).min(8192));
        if self.history.capacity() < history {
            self.history.grow(history);
        }
        let ghosts = (slots * 3).max((slots * 128).min(32768));
        if self.ghosts.capacity() < ghosts {
            self.ghosts.grow(ghosts);
        }
    }

    fn stored(&mut self, slot: SlotIndex, block: Newcomer, now: Millis) {
        let now = self.event(now);
        let mark = mark(block.fingerprint);
        let depth = u16::try_from(block.depth).unwrap_or(u16::MAX);
        let uses_before = self.ghosts.take(mark);
        let uses = self.use_of_absent(mark, depth, uses_before, now);
        let mut sampled_before = NONE;
        if let Some(parent) = block.parent {
            let before = &mut self.slots[parent.at()];
            if std::mem::take(&mut before.ends_a_request) && History::samples(before.mark) {
                self.history.went_on(before.mark);
            }
            let before = &self.slots[parent.at()];
            sampled_before = if History::samples(before.mark) { parent.0 } else { before.sampled_before };
        }
        self.slots[slot.at()] = Slot {
            mark,
            parent: block.parent.map_or(NONE, |parent| parent.0),
            sampled_before,
            last_used: now,
            depth,
            uses,
            uses_at_first: uses,
            ends_a_request: true,
        };
    }

    fn used(&mut self, slot: SlotIndex, now: Millis) {
        let queue = self.order.leave(slot);
        let now = self.event(now);
        let entry = &mut self.slots[slot.at()];
        entry.last_used = now;
        entry.uses = entry.uses.saturating_add(1);
        entry.ends_a_request = true;
        let mut next = if History::samples(entry.mark) { slot.0 } else { entry.sampled_before };
        let mut depth = u16::MAX;
        // The depth falls from one to the next, else a slot on the way is not what it was.
        while let Some(entry) = self.slots.get(next as usize)
            && entry.depth <= depth
            && depth > 0
        {
            if History::samples(entry.mark) {
                self.history.used(entry.mark, entry.depth, entry.uses, now, &mut self.hazards);
            }
            depth = entry.depth.saturating_sub(1);
            next = entry.sampled_before;
        }
        if let Some(queue) = queue {
            self.enter(slot, queue, now);
        }
    }

    fn offered(&mut self, slot: SlotIndex, queue: QueueId, _: Millis) {
        let now = self.clock.now();
        self.order.leave(slot);
        let entry = &self.slots[slot.at()];
        if entry.ends_a_request && History::samples(entry.mark) {
            self.history.ended(entry.mark);
        }
        self.enter(slot, queue, now);
    }

    fn withdrawn(&mut self, slot: SlotIndex) {
        self.order.leave(slot);
    }

    fn victim(&mut self, queue: QueueId, now: Millis) -> Option<SlotIndex> {
        let now = self.clock.at(now);
        let events = self.events - self.events_aged;
        if events >= (self.slots.len() as u64 / 16).clamp(1, EVENTS_PER_AGING) {
            self.events_aged = self.events;
            self.age(queue, now);
        }
        loop {
            let (slot, cell) = self.order.first(queue)?;
            if self.slots[slot.at()].cell(now) == cell {
                return Some(slot);
            }
            self.order.leave(slot);
            self.enter(slot, queue, now);
        }
    }

    fn removed(&mut self, slot: SlotIndex, evicted: bool, _: Millis) {
        self.order.leave(slot);
        let gone = std::mem::replace(&mut self.slots[slot.at()], EMPTY);
        if evicted {
            self.ghosts.add(gone.mark, gone.uses);
        }
        let Some(entry) = self.slots.get_mut(gone.parent as usize) else { return };
        let parent = SlotIndex(gone.parent);
        let queue = self.order.leave(parent);
        let now = self.clock.now();
        // Of its first use its parent was told, or was stored with it.
        entry.uses = entry.uses.saturating_add(gone.uses - gone.uses_at_first);
        if now.since(gone.last_used) < now.since(entry.last_used) {
            entry.last_used = gone.last_used;
        }
        if let Some(queue) = queue {
            self.enter(parent, queue, now);
        }
    }

    fn admits(&mut self, newcomer: &Newcomer, victim: SlotIndex, now: Millis) -> bool {
        let now = self.clock.at(now);
        let uses = self.ghosts.uses(mark(newcomer.fingerprint)).saturating_add(1);
        let depth = u16::try_from(newcomer.depth).unwrap_or(u16::MAX);
        let index = self.hazards.index();
        index[cell(Class::new(uses, depth, false), 0)] >= index[self.slots[victim.at()].cell(now)]
    }

    fn left_out(&mut self, fingerprint: u64, depth: u32, now: Millis) {
        let now = self.event(now);
        let mark = mark(fingerprint);
        let uses_before = self.ghosts.uses(mark);
        let uses = self.use_of_absent(mark, u16::try_from(depth).unwrap_or(u16::MAX), uses_before, now);
        self.ghosts.add(mark, uses);
    }

    fn bytes(&self) -> usize {
        self.slots.capacity() * size_of::<Slot>()
            + self.history.bytes()
            + self.ghosts.bytes()
            + self.hazards.bytes()
            + self.order.bytes()
    }

    fn check_integrity(&self) {
        self.order.check_integrity();
    }
}
