//! Free slots, by the node of the machine's memory that their bytes lie on: a block is put near the device that it comes
//! from, as long as there is a choice.

use super::{Allowances, GroupId, SlotIndex, SlotTable};
use crate::ledger::Millis;
use crate::ledger::slots::evict::Claim;

/// Free slots on other nodes that may wait for blocks of theirs while something is evicted for one of this node: so many,
/// and this part of the table, are unused at most. For which node the next block is cannot be known.
const WAITING_MAX: usize = 64;
const WAITING_PART: usize = 16;

/// Nodes are few and numbered from 0.
const NODES_MAX: usize = 64;

/// Last in, first out, for each node.
#[derive(Debug)]
pub(super) struct FreeSlots {
    /// One for each node; the first also has those of which nothing is known.
    by_node: Vec<Vec<SlotIndex>>,
    /// Node of each segment.
    segments: Vec<usize>,
    /// Slots of a segment; 0: nothing is known of nodes.
    per_segment: u32,
    /// From where the next slots should be taken.
    near: Option<usize>,
}

impl Default for FreeSlots {
    fn default() -> Self {
        Self { by_node: vec![Vec::new()], segments: Vec::new(), per_segment: 0, near: None }
    }
}

impl FreeSlots {
    fn node_of(&self, slot: SlotIndex) -> usize {
        let segment = slot.0.checked_div(self.per_segment).map(|segment| segment as usize);
        segment.and_then(|segment| self.segments.get(segment)).copied().unwrap_or(0)
    }

    pub fn len(&self) -> usize {
        self.by_node.iter().map(Vec::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.by_node.iter().all(Vec::is_empty)
    }

    pub fn capacity(&self) -> usize {
        self.by_node.iter().map(Vec::capacity).sum()
    }

    pub fn push(&mut self, slot: SlotIndex) {
        let node = self.node_of(slot);
        self.by_node[node].push(slot);
    }

    pub fn extend(&mut self, slots: impl Iterator<Item = SlotIndex>) {
        slots.for_each(|slot| self.push(slot));
    }

    pub fn retain(&mut self, keep: impl Fn(&SlotIndex) -> bool) {
        self.by_node.iter_mut().for_each(|slots| slots.retain(&keep));
    }

    /// One where it is wanted, else from where most are.
    pub fn pop(&mut self) -> Option<SlotIndex> {
        let near = self.near.and_then(|near| self.by_node[near].pop());
        near.or_else(|| self.by_node.iter_mut().max_by_key(|slots| slots.len())?.pop())
    }

    /// There is one where it is wanted.
    pub fn has_near(&self) -> bool {
        self.near.map_or_else(|| !self.is_empty(), |near| !self.by_node[near].is_empty())
    }

    /// Whether any slot at all, free or not, may be where it is wanted.
    fn could_be_near(&self) -> bool {
        self.near.is_some_and(|near| self.segments.contains(&near))
    }

    fn known(&mut self, node: u32) -> usize {
        let node = (node as usize).min(NODES_MAX - 1);
        if self.by_node.len() <= node {
            self.by_node.resize_with(node + 1, Vec::new);
        }
        node
    }
}

impl SlotTable {
    /// Says on which node the memory of a segment is, before its slots are free. `position`: which segment of this table,
    /// all of `per_segment` slots.
    pub fn set_node(&mut self, position: usize, per_segment: u32, node: Option<u32>) {
        let node = self.free.known(node.unwrap_or(0));
        self.free.per_segment = per_segment;
        if self.free.segments.len() <= position {
            self.free.segments.resize(position + 1, 0);
        }
        self.free.segments[position] = node;
    }

    /// On which node the next slots should be, as far as there is a choice.
    pub fn want_near(&mut self, node: Option<u32>) {
        self.free.near = node.map(|node| self.free.known(node));
    }

    /// A free slot is where the next should be.
    pub fn has_near(&self) -> bool {
        self.free.has_near()
    }

    /// The next block would have something evicted, if that is possible.
    pub fn would_evict(&self) -> bool {
        self.free.is_empty() || self.is_worth_evicting()
    }

    /// None of the free slots is where the next should be, and no more of them should wait for others.
    fn is_worth_evicting(&self) -> bool {
        let waiting = WAITING_MAX.min(self.slots() / WAITING_PART);
        self.free.could_be_near() && !self.free.has_near() && self.free.len() <= waiting
    }

    /// What would have to go soon goes now, until something that goes was where the next block should be.
    pub(super) fn make_place_near(&mut self, group: GroupId, allowances: &Allowances, now: Millis) {
        while self.is_worth_evicting() {
            let Some(victim) = self.victim(Claim::For(group), allowances, now) else { return };
            self.evict(victim, now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_taken_where_they_are_wanted_as_long_as_there_are_any() {
        let mut free = FreeSlots { per_segment: 4, segments: vec![0, 1, 0], ..FreeSlots::default() };
        free.known(1);
        free.extend((0..12).map(SlotIndex));
        free.near = Some(1);
        let taken: Vec<u32> = (0..5).filter_map(|_| free.pop()).map(|slot| slot.0).collect();
        assert_eq!(taken[..4], [7, 6, 5, 4]);
        assert!(!free.has_near() && !(4..8).contains(&taken[4]) && free.len() == 7);
        free.push(SlotIndex(5));
        assert!(free.has_near());
        free.retain(|slot| slot.0 != 5);
        assert!(!free.has_near() && free.len() == 7);
    }
}
