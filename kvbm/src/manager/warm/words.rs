//! Pin tables of engines that outlived the daemon before this one: what is pinned there stays as it is until its engine
//! has cleared the entry, or is dead.

use std::collections::HashMap;

use kvbm_shm::{PinState, PinnedSlot, PoolWords};

use super::Shared;
use crate::ledger::{FoundHold, Ledger, Millis, SegmentId, TrustDomain};
use crate::store::WarmWords;

/// What one entry of a pin table keeps.
enum Kept {
    Slot(FoundHold),
    /// No slot of it is used, because it was given to nobody yet.
    Segment(SegmentId),
}

/// The words of one engine.
pub(in crate::manager) struct FoundPins {
    words: WarmWords,
    kept: Vec<(u32, PinState, Kept)>,
}

/// Segments that were found without a block, by number: they join the free set when nothing is pinned in them.
pub(super) type Unbound = HashMap<SegmentId, Option<TrustDomain>>;

impl FoundPins {
    /// Keeps what an engine has pinned. `numbers`: those of segments, by what they were called when they were pinned.
    pub(super) fn hold(
        words: WarmWords,
        numbers: &HashMap<u32, SegmentId>,
        unbound: &Unbound,
        ledger: &mut Ledger,
    ) -> Self {
        let mut kept = Vec::new();
        let set = (0..PoolWords::PINS).map(|pin| (pin, words.words.pin(pin)));
        for (pin, state) in set.filter(|(_, state)| *state != PinState::Free) {
            let PinnedSlot { segment, index } = words.words.pinned_slot(pin);
            let Some(number) = numbers.get(&segment).copied() else { continue };
            if unbound.contains_key(&number) {
                kept.push((pin, state, Kept::Segment(number)));
            } else if let Some(hold) = ledger.hold_found(number, index) {
                kept.push((pin, state, Kept::Slot(hold)));
            }
        }
        Self { words, kept }
    }

    fn is_over(&self) -> bool {
        self.kept.is_empty()
    }

    /// Gives back what is pinned no more.
    fn release(&mut self, ledger: &mut Ledger, now: Millis) {
        let dead = self.words.process.is_dead();
        for (pin, state, kept) in std::mem::take(&mut self.kept) {
            // An entry is set by the daemon only, and there is none any more: what has changed was cleared.
            let is_set = |now| match (state, now) {
                (_, PinState::Free) => false,
                (PinState::Promised(a) | PinState::InUse(a), PinState::Promised(b) | PinState::InUse(b)) => {
                    a == b
                }
                (PinState::Free, _) => false,
            };
            match kept {
                kept if !dead && is_set(self.words.words.pin(pin)) => self.kept.push((pin, state, kept)),
                Kept::Slot(hold) => ledger.release_found(hold, now),
                Kept::Segment(_) => {}
            }
        }
    }

    fn keeps(&self, segment: SegmentId) -> bool {
        self.kept.iter().any(|(_, _, kept)| matches!(kept, Kept::Segment(kept) if *kept == segment))
    }
}

/// All of them.
#[derive(Default)]
pub(in crate::manager) struct FoundWords {
    pub(super) pins: Vec<FoundPins>,
    pub(super) unbound: Unbound,
}

impl Shared {
    /// Looks which entries were cleared, and which engines have died.
    pub(in crate::manager) fn read_found_pins(&self, ledger: &mut Ledger, now: Millis) {
        let mut found = self.found_words.lock();
        let FoundWords { pins, unbound } = &mut *found;
        pins.iter_mut().for_each(|pins| pins.release(ledger, now));
        for (segment, domain) in
            unbound.extract_if(|segment, _| !pins.iter().any(|pins| pins.keeps(*segment)))
        {
            match domain {
                Some(domain) => ledger.add_segment_of(segment, domain),
                None => ledger.add_segment(segment),
            }
        }
        let over = pins.extract_if(.., |pins| pins.is_over());
        if let Some(warm) = &self.warm {
            over.for_each(|pins| warm.discard_words(pins.words.number));
        }
    }
}
