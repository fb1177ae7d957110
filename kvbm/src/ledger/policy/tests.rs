//! What every policy keeps to. How often what they keep is asked for is tested where traces are replayed.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// What may happen to a slot. What is not possible at the time is skipped.
#[derive(Debug, Clone)]
enum Event {
    Store { fingerprint: u64, parent: usize },
    Use(usize),
    Offer(usize, u16),
    Withdraw(usize),
    Evict(u16),
    Remove(usize),
    LeaveOut(u64),
    Wait(u64),
    Grow,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0..40u64, any::<usize>()).prop_map(|(fingerprint, parent)| Event::Store { fingerprint, parent }),
        4 => any::<usize>().prop_map(Event::Use),
        6 => (any::<usize>(), 0..3u16).prop_map(|(slot, queue)| Event::Offer(slot, queue)),
        2 => any::<usize>().prop_map(Event::Withdraw),
        6 => (0..3u16).prop_map(Event::Evict),
        1 => any::<usize>().prop_map(Event::Remove),
        1 => (0..40u64).prop_map(Event::LeaveOut),
        2 => (0..100_000u64).prop_map(Event::Wait),
        1 => Just(Event::Grow),
    ]
}

#[derive(Debug, Default)]
struct Resident {
    parent: Option<u32>,
    children: usize,
    queue: Option<QueueId>,
}

/// The table as it should be, and the policy that is told of it.
struct Model {
    policy: Box<dyn Policy>,
    slots: u32,
    resident: BTreeMap<u32, Resident>,
    now: Millis,
}

impl Model {
    fn pick(&self, which: usize, suits: impl Fn(&Resident) -> bool) -> Option<u32> {
        let suitable: Vec<u32> =
            self.resident.iter().filter(|(_, block)| suits(block)).map(|(slot, _)| *slot).collect();
        (!suitable.is_empty()).then(|| suitable[which % suitable.len()])
    }

    fn remove(&mut self, slot: u32, evicted: bool) {
        self.policy.withdrawn(SlotIndex(slot));
        self.policy.removed(SlotIndex(slot), evicted, self.now);
        let gone = self.resident.remove(&slot).unwrap();
        if let Some(parent) = gone.parent {
            self.resident.get_mut(&parent).unwrap().children -= 1;
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Store { fingerprint, parent } => {
                let Some(free) = (0..self.slots).find(|slot| !self.resident.contains_key(slot)) else {
                    return;
                };
                let parent = self.pick(parent, |_| true);
                if let Some(parent) = parent {
                    self.policy.withdrawn(SlotIndex(parent));
                    let parent = self.resident.get_mut(&parent).unwrap();
                    parent.queue = None;
                    parent.children += 1;
                }
                let newcomer =
                    Newcomer { fingerprint, parent: parent.map(SlotIndex), depth: 1 + fingerprint as u32 };
                self.policy.stored(SlotIndex(free), newcomer, self.now);
                self.resident.insert(free, Resident { parent, ..Resident::default() });
            }
            Event::Use(which) => {
                let Some(slot) = self.pick(which, |_| true) else { return };
                self.policy.used(SlotIndex(slot), self.now);
            }
            Event::Offer(which, queue) => {
                let Some(slot) = self.pick(which, |block| block.children == 0) else { return };
                self.policy.withdrawn(SlotIndex(slot));
                self.policy.offered(SlotIndex(slot), QueueId(queue), self.now);
                self.resident.get_mut(&slot).unwrap().queue = Some(QueueId(queue));
            }
            Event::Withdraw(which) => {
                let Some(slot) = self.pick(which, |_| true) else { return };
                self.policy.withdrawn(SlotIndex(slot));
                self.resident.get_mut(&slot).unwrap().queue = None;
            }
            Event::Evict(queue) => {
                let Some(victim) = self.policy.victim(QueueId(queue), self.now) else { return };
                let newcomer = Newcomer { fingerprint: 7, parent: None, depth: 1 };
                self.policy.admits(&newcomer, victim, self.now);
                self.remove(victim.0, true);
            }
            Event::Remove(which) => {
                let Some(slot) = self.pick(which, |block| block.children == 0) else { return };
                self.remove(slot, false);
            }
            Event::LeaveOut(fingerprint) => self.policy.left_out(fingerprint, 3, self.now),
            Event::Wait(ms) => self.now.0 += ms,
            Event::Grow if self.slots < 40 => {
                self.slots += 3;
                self.policy.grow(self.slots);
            }
            Event::Grow => {}
        }
    }

    /// A victim is offered in its queue, and there is one whenever one is offered.
    fn check(&mut self) {
        self.policy.check_integrity();
        for queue in (0..3).map(QueueId) {
            let offered = self.pick(0, |block| block.queue == Some(queue));
            let victim = self.policy.victim(queue, self.now);
            assert_eq!(victim.is_some(), offered.is_some(), "{queue:?}");
            if let Some(victim) = victim {
                assert_eq!(self.resident[&victim.0].queue, Some(queue));
                assert_eq!(self.policy.victim(queue, self.now), Some(victim), "asked twice");
            }
        }
        self.policy.check_integrity();
    }
}

proptest! {
    #[test]
    fn every_policy_knows_who_is_offered(slots in 1..20u32, events in prop::collection::vec(event(), 0..200)) {
        for kind in PolicyKind::ALL {
            let mut model =
                Model { policy: kind.build(slots), slots, resident: BTreeMap::new(), now: Millis(0) };
            for event in events.clone() {
                model.apply(event);
                model.check();
            }
        }
    }
}
