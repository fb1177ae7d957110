//! Host memory that an earlier daemon left.

use super::Shared;
use crate::ledger::{FoundSegment, SegmentId, SlotsIn};
use crate::store::WarmSegment;
use crate::tier::Tier;

impl Shared {
    /// Takes over what fits the plan and gives up the rest; returns the number of segments taken.
    pub(super) fn adopt_warm(&self, mut found: Vec<WarmSegment>, count: u32, segment_bytes: usize) -> u32 {
        let Some(warm) = &self.warm else { return 0 };
        found.sort_by_key(|segment| segment.index);
        let (mut there, mut bound, mut unbound) = (0, Vec::<FoundSegment>::new(), Vec::new());
        let mut surplus = Vec::new();
        for segment in found {
            // Those that can be used close ranks: where a segment lies says nothing about what is in it.
            let number = SegmentId(there);
            let usable = (there < count).then(|| warm.adopt(number, &segment, segment_bytes)).flatten();
            surplus.push(segment.index);
            let Some(content) = usable else { continue };
            self.host.adopt(segment.memory);
            match content.filter(|content| !content.blocks.is_empty()) {
                Some(content) => bound.push(content),
                None => unbound.push(number),
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
        let blocks = self.with_ledger(|ledger, _| {
            let blocks = ledger.install_found(Tier::Host, names, tables);
            unbound.into_iter().for_each(|segment| ledger.add_segment(segment));
            self.events.skip(blocks as u64);
            blocks
        });
        tracing::info!(blocks, left_out, segments = there, "host memory of an earlier daemon is warm");
        there
    }
}

#[cfg(test)]
mod tests;
