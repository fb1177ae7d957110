//! S3-FIFO: three queues are all one needs (Yang and others, SOSP 2023), on leaves.
//!
//! New blocks wait in a small queue, a tenth of the slots. Who was used there goes on to the main queue; who was not is
//! evicted and leaves a ghost. If it comes back while that is remembered, it goes to the main queue at once. In the main
//! queue each use buys another round, three at most.
//!
//! Only leaves can be chosen, so the first of a queue is its first leaf.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use super::{Newcomer, Policy, QueueId};
use crate::ledger::Millis;
use crate::ledger::slots::SlotIndex;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Part {
    #[default]
    Small,
    Main,
}

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    fingerprint: u64,
    parent: Option<SlotIndex>,
    part: Part,
    /// Place in the order of its part.
    since: u64,
    /// Rounds that it may still stay: 0..=3.
    rounds: u8,
    queue: Option<QueueId>,
    resident: bool,
}

/// Leaves in order of their places.
#[derive(Debug, Default)]
struct Offered {
    small: BTreeSet<(u64, SlotIndex)>,
    main: BTreeSet<(u64, SlotIndex)>,
}

impl Offered {
    fn part(&mut self, part: Part) -> &mut BTreeSet<(u64, SlotIndex)> {
        match part {
            Part::Small => &mut self.small,
            Part::Main => &mut self.main,
        }
    }
}

/// See the module. A use of a block is a use of all blocks before it: as long as it stays they do, and when it goes, their
/// place is where it was.
#[derive(Debug, Default)]
pub struct S3Fifo {
    slots: Vec<Entry>,
    queues: BTreeMap<QueueId, Offered>,
    /// New and not used. The others in the small queue are as good as in the main queue, but that nobody sees it before it
    /// is their turn, and those that are no leaves never have one.
    on_trial_count: usize,
    places: u64,
    /// Fingerprints, and when they went.
    ghosts: HashMap<u64, u64>,
    ghosts_in_order: VecDeque<(u64, u64)>,
}

impl Entry {
    fn is_on_trial(&self) -> bool {
        self.resident && self.part == Part::Small && self.rounds == 0
    }
}

impl S3Fifo {
    fn next_place(&mut self) -> u64 {
        self.places += 1;
        self.places
    }

    fn small_target(&self) -> usize {
        (self.slots.len() / 10).max(1)
    }

    fn remember(&mut self, fingerprint: u64) {
        let when = self.next_place();
        self.ghosts.insert(fingerprint, when);
        self.ghosts_in_order.push_back((fingerprint, when));
        let most = (self.slots.len() * 9 / 10).max(1);
        while self.ghosts_in_order.len() > most
            && let Some((oldest, when)) = self.ghosts_in_order.pop_front()
        {
            if self.ghosts.get(&oldest) == Some(&when) {
                self.ghosts.remove(&oldest);
            }
        }
    }

    fn enter(&mut self, slot: SlotIndex, queue: QueueId) {
        let entry = &mut self.slots[slot.at()];
        entry.queue = Some(queue);
        self.queues.entry(queue).or_default().part(entry.part).insert((entry.since, slot));
    }

    /// Puts an offered block at the end of the main queue.
    fn another_round(&mut self, slot: SlotIndex, queue: QueueId, rounds_left: u8) {
        self.withdrawn(slot);
        let since = self.next_place();
        let entry = &mut self.slots[slot.at()];
        (entry.part, entry.since, entry.rounds) = (Part::Main, since, rounds_left);
        self.enter(slot, queue);
    }
}

impl Policy for S3Fifo {
    fn grow(&mut self, slots: u32) {
        self.slots.resize(slots as usize, Entry::default());
    }

    fn stored(&mut self, slot: SlotIndex, block: Newcomer, _: Millis) {
        let part = match self.ghosts.remove(&block.fingerprint) {
            Some(_) => Part::Main,
            None => Part::Small,
        };
        self.on_trial_count += usize::from(part == Part::Small);
        self.slots[slot.at()] = Entry {
            fingerprint: block.fingerprint,
            parent: block.parent,
            part,
            since: self.next_place(),
            rounds: 0,
            queue: None,
            resident: true,
        };
    }

    fn used(&mut self, slot: SlotIndex, _: Millis) {
        let entry = &mut self.slots[slot.at()];
        let mut next = Some(slot).filter(|_| entry.is_on_trial());
        if next.is_none() {
            entry.rounds = (entry.rounds + 1).min(3);
        }
        // Those before it that are on trial pass too. Each does so once.
        while let Some(slot) = next {
            let entry = &mut self.slots[slot.at()];
            entry.rounds = 1;
            self.on_trial_count -= 1;
            next = entry.parent.filter(|parent| self.slots[parent.at()].is_on_trial());
        }
    }

    fn offered(&mut self, slot: SlotIndex, queue: QueueId, _: Millis) {
        self.withdrawn(slot);
        self.enter(slot, queue);
    }

    fn withdrawn(&mut self, slot: SlotIndex) {
        let entry = &mut self.slots[slot.at()];
        if let Some(offered) = entry.queue.take().and_then(|queue| self.queues.get_mut(&queue)) {
            offered.part(entry.part).remove(&(entry.since, slot));
        }
    }

    fn victim(&mut self, queue: QueueId, _: Millis) -> Option<SlotIndex> {
        loop {
            let offered = self.queues.get(&queue)?;
            let (small, main) = (offered.small.first(), offered.main.first());
            let small_is_due = self.on_trial_count >= self.small_target() || main.is_none();
            let (_, slot) = *if small_is_due { small.or(main) } else { main }?;
            let entry = &self.slots[slot.at()];
            match (entry.part, entry.rounds) {
                (_, 0) => return Some(slot),
                (Part::Small, _) => self.another_round(slot, queue, 0),
                (Part::Main, rounds) => self.another_round(slot, queue, rounds - 1),
            }
        }
    }

    fn removed(&mut self, slot: SlotIndex, evicted: bool, _: Millis) {
        self.withdrawn(slot);
        let gone = std::mem::take(&mut self.slots[slot.at()]);
        if gone.is_on_trial() {
            self.on_trial_count -= 1;
            if evicted {
                self.remember(gone.fingerprint);
            }
        }
        if let Some(parent) = gone.parent {
            let queue = self.slots[parent.at()].queue;
            self.withdrawn(parent);
            let entry = &mut self.slots[parent.at()];
            // It went along with its child to the main queue and round it, as far as that went.
            if gone.part == Part::Main && entry.part == Part::Small {
                self.on_trial_count -= usize::from(entry.is_on_trial());
                entry.part = Part::Main;
                entry.rounds = entry.rounds.saturating_sub(1);
            }
            entry.since = entry.since.max(gone.since);
            if let Some(queue) = queue {
                self.enter(parent, queue);
            }
        }
    }

    fn bytes(&self) -> usize {
        // A node of a tree, and a hash table, are two thirds full on average.
        let offered: usize =
            self.queues.values().map(|offered| offered.small.len() + offered.main.len()).sum();
        let half_empty =
            offered * size_of::<(u64, SlotIndex)>() + self.ghosts.len() * size_of::<(u64, u64)>();
        self.slots.capacity() * size_of::<Entry>()
            + self.ghosts_in_order.capacity() * size_of::<(u64, u64)>()
            + half_empty * 3 / 2
    }

    fn check_integrity(&self) {
        for (queue, offered) in &self.queues {
            for (part, order) in [(Part::Small, &offered.small), (Part::Main, &offered.main)] {
                for (since, slot) in order {
                    let entry = &self.slots[slot.at()];
                    let found = (entry.queue, entry.part, entry.since);
                    assert_eq!(found, (Some(*queue), part, *since), "{slot:?}");
                }
            }
        }
        let offered = self.slots.iter().filter(|entry| entry.queue.is_some()).count();
        let in_order = self.queues.values().map(|offered| offered.small.len() + offered.main.len());
        assert_eq!(offered, in_order.sum::<usize>());
        let on_trial = self.slots.iter().filter(|entry| entry.is_on_trial()).count();
        assert_eq!(on_trial, self.on_trial_count);
        assert!(self.ghosts.len() <= self.ghosts_in_order.len());
    }
}
