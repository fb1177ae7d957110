//! Host memory that an earlier daemon left.

mod words;

use std::collections::HashMap;

use super::Shared;
use crate::ledger::{FoundSegment, SegmentId, SlotsIn};
use crate::store::{WarmSegment, WarmWords};
use crate::tier::Tier;
use words::FoundPins;
pub(super) use words::FoundWords;

impl Shared {
    /// Takes over what fits the plan and gives up the rest; returns the number of segments taken.
    /// What engines of its time have pinned stays as it is.
    pub(super) fn adopt_warm(
        &self,
        (mut found, engines): (Vec<WarmSegment>, Vec<WarmWords>),
        count: u32,
        segment_bytes: usize,
    ) -> u32 {
        let Some(warm) = &self.warm else { return 0 };
        found.sort_by_key(|segment| segment.index);
        let (mut there, mut bound, mut unbound) = (0, Vec::<FoundSegment>::new(), HashMap::new());
        let mut numbers = HashMap::new();
        let mut surplus = Vec::new();
        for segment in found {
            // Those that can be used close ranks: where a segment lies says nothing about what is in it.
            let number = SegmentId(there);
            let adopt = || warm.adopt(number, &segment, segment_bytes, self.config.one_domain);
            let usable = (there < count).then(adopt).flatten();
            surplus.push(segment.index);
            let index = segment.index;
            let Some(content) = usable else { continue };
            self.host.adopt(segment.memory);
            numbers.insert(index, number);
            match content {
                Some(content) if !content.blocks.is_empty() => bound.push(content),
                Some(content) => {
                    unbound.insert(number, Some(content.class.domain));
                }
                None => {
                    unbound.insert(number, None);
                }
            }
            there += 1;
        }
        surplus.into_iter().filter(|index| *index >= there).for_each(|index| warm.discard(index));
        if there == 0 {
            return 0;
        }
        let names = self.with_ledger(|ledger, now| ledger.name_found(&bound, now));
        let tables = names.tables(bound, &SlotsIn::bytes(segment_bytes));
        let left_out = tables.left_out;
        let blocks = self.with_ledger(|ledger, now| {
            let blocks = ledger.install_found(Tier::Host, names, tables);
            // Nothing is evicted before it is known what is pinned.
            let hold = |words| FoundPins::hold(words, &numbers, &unbound, ledger);
            let pins = engines.into_iter().map(hold).collect();
            *self.found_words.lock() = FoundWords { pins, unbound };
            self.read_found_pins(ledger, now);
            self.events.skip(blocks as u64);
            blocks
        });
        tracing::info!(blocks, left_out, segments = there, "host memory of an earlier daemon is warm");
        there
    }
}

#[cfg(test)]
pub(super) mod tests;
