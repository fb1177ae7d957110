//! The host tier: equal segments, bound to a class (trust domain, slot size) when first needed.
//!
//! A class that owns no segment, or less than its fair share while it has to evict, takes the coldest segment of the
//! richest class. A segment without blocks is taken first. Blocks of one class never share a segment with another's.

use std::collections::BTreeMap;

use super::TrustDomain;
use super::key::KeyHasher;
use super::slots::{SlotCounts, SlotIndex, SlotTable};

/// Segments that are tried before a class keeps what it has: each try may look at every slot.
const COLDEST_TRIED: usize = 4;

/// One of the equal pieces of host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentId(pub u32);

/// What may share a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Class {
    /// Processes that may map it.
    pub domain: TrustDomain,
    /// Bytes from one slot to the next.
    pub stride: usize,
}

/// Where in host memory a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPlace {
    /// Which segment.
    pub segment: SegmentId,
    /// Bytes from its start.
    pub offset: usize,
}

/// The slots of one class.
#[derive(Debug)]
pub struct ClassTable {
    class: Class,
    slots_per_segment: u32,
    /// Position p holds the slots [p * slots_per_segment, (p + 1) * slots_per_segment).
    segments: Vec<Option<SegmentId>>,
    /// The slots.
    pub slots: SlotTable,
}

impl ClassTable {
    /// Where the bytes of a slot are.
    pub fn place(&self, slot: SlotIndex) -> HostPlace {
        let position = (slot.0 / self.slots_per_segment) as usize;
        let segment = self.segments[position].expect("a slot in use has memory behind it");
        HostPlace { segment, offset: (slot.0 % self.slots_per_segment) as usize * self.class.stride }
    }

    fn range(&self, position: usize) -> std::ops::Range<u32> {
        let first = position as u32 * self.slots_per_segment;
        first..first + self.slots_per_segment
    }

    fn owned(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.segments.len()).filter(|position| self.segments[*position].is_some())
    }

    fn bind(&mut self, segment: SegmentId) {
        match self.segments.iter().position(Option::is_none) {
            Some(position) => {
                self.segments[position] = Some(segment);
                self.slots.revive(self.range(position));
            }
            None => {
                self.segments.push(Some(segment));
                self.slots.grow(self.slots_per_segment);
            }
        }
    }

    /// Gives up one segment: an empty one, or (if `in_use`) the one whose latest use is longest ago.
    fn surrender(&mut self, in_use: bool) -> Option<SegmentId> {
        let mut positions: Vec<usize> = self.owned().collect();
        if in_use {
            positions.sort_by_key(|position| self.slots.last_used(self.range(*position)));
            positions.truncate(COLDEST_TRIED);
        } else {
            positions.retain(|position| self.slots.all_free(self.range(*position)));
        }
        let position = positions.into_iter().find(|position| {
            let range = self.range(*position);
            self.slots.retire(range)
        })?;
        self.segments[position].take()
    }
}

/// Summary of one class, for status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassSummary {
    /// The class.
    pub class: Class,
    /// Segments it owns.
    pub segments: usize,
    /// Its slots.
    pub counts: SlotCounts,
}

/// All host memory.
#[derive(Debug)]
pub struct HostTier {
    /// `None`: there is no host tier.
    segment_bytes: Option<usize>,
    free: Vec<SegmentId>,
    classes: BTreeMap<Class, ClassTable>,
    hasher: KeyHasher,
}

impl HostTier {
    /// A tier without memory: segments are added as their pages are populated.
    pub fn new(segment_bytes: usize, hasher: KeyHasher) -> Self {
        Self { segment_bytes: Some(segment_bytes), free: Vec::new(), classes: BTreeMap::new(), hasher }
    }

    /// Bytes in each segment; 0 without a host tier.
    pub fn segment_bytes(&self) -> usize {
        self.segment_bytes.unwrap_or(0)
    }

    /// False if there will never be host memory.
    pub fn is_on(&self) -> bool {
        self.segment_bytes.is_some()
    }

    /// Changes the size of segments, while there are none.
    pub fn set_segments(&mut self, bytes: Option<usize>) {
        assert!(self.free.is_empty() && self.classes.is_empty(), "segments exist already");
        self.segment_bytes = bytes;
    }

    /// Populated memory joins the free set.
    pub fn add_segment(&mut self, segment: SegmentId) {
        self.free.push(segment);
    }

    /// The table of a class that has memory.
    pub fn class(&self, class: Class) -> Option<&ClassTable> {
        self.classes.get(&class)
    }

    /// As [`HostTier::class`].
    pub fn class_mut(&mut self, class: Class) -> Option<&mut ClassTable> {
        self.classes.get_mut(&class)
    }

    /// All tables.
    pub fn classes(&self) -> impl Iterator<Item = (&Class, &ClassTable)> {
        self.classes.iter()
    }

    /// All tables, to be changed.
    pub fn classes_mut(&mut self) -> impl Iterator<Item = (&Class, &mut ClassTable)> {
        self.classes.iter_mut()
    }

    /// The table of a class, with a free segment bound to it if it has no free slot. Its slots may be none. `None` if
    /// blocks of this size do not fit a segment.
    pub fn make_room(&mut self, class: Class) -> Option<&mut ClassTable> {
        let slots_per_segment =
            u32::try_from(self.segment_bytes() / class.stride).ok().filter(|slots| *slots > 0)?;
        let table = self.classes.entry(class).or_insert_with(|| ClassTable {
            class,
            slots_per_segment,
            segments: Vec::new(),
            slots: SlotTable::new(0, self.hasher),
        });
        if table.slots.counts().free == 0
            && let Some(segment) = self.free.pop()
        {
            table.bind(segment);
        }
        Some(table)
    }

    /// Gives a class that would have to evict a segment of another, if it owns less than its share. May look at every
    /// slot: once per batch.
    pub fn claim_share(&mut self, class: Class) {
        let Some(table) = self.make_room(class).filter(|table| table.slots.counts().free == 0) else {
            return;
        };
        let owned = table.owned().count();
        if let Some(segment) = self.take_segment(class, owned) {
            self.classes.get_mut(&class).expect("it was just there").bind(segment);
        }
    }

    /// A segment of another class, for one that owns `owned`.
    fn take_segment(&mut self, class: Class, owned: usize) -> Option<SegmentId> {
        let mut others: Vec<(usize, Class)> = self
            .classes
            .values()
            .filter(|table| table.class != class)
            .map(|table| (table.owned().count(), table.class))
            .collect();
        others.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
        let total = owned + others.iter().map(|(count, _)| count).sum::<usize>();
        for (_, other) in &others {
            let empty = self.classes.get_mut(other).and_then(|table| table.surrender(false));
            if empty.is_some() {
                return empty;
            }
        }
        let claimants = 1 + others.iter().filter(|(count, _)| *count > 0).count();
        let fair = total / claimants;
        if owned >= fair.max(1) {
            return None;
        }
        let richest = others.iter().find(|(count, _)| *count > fair || (owned == 0 && *count > 0))?.1;
        self.classes.get_mut(&richest)?.surrender(true)
    }

    /// Segments that no class owns.
    pub fn free_segments(&self) -> usize {
        self.free.len()
    }

    /// One line per class.
    pub fn summaries(&self) -> Vec<ClassSummary> {
        let of = |table: &ClassTable| ClassSummary {
            class: table.class,
            segments: table.owned().count(),
            counts: table.slots.counts(),
        };
        self.classes.values().map(of).collect()
    }

    /// Panics if an invariant does not hold.
    pub fn check_integrity(&self) {
        let mut seen: Vec<SegmentId> = self.free.clone();
        for table in self.classes.values() {
            table.slots.check_integrity();
            seen.extend(table.segments.iter().flatten());
            let memory = table.owned().count() * table.slots_per_segment as usize;
            assert_eq!(table.slots.slots(), memory, "every slot has memory");
        }
        let count = seen.len();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), count, "a segment is in one place");
    }
}

#[cfg(test)]
mod tests {
    use kvbm_hash::SequenceHash;

    use super::*;
    use crate::ledger::key::{Key, NamespaceId};

    fn key(n: u8) -> Key {
        Key { namespace: NamespaceId(1), hash: SequenceHash([n; 16]) }
    }

    fn tier(segments: u32) -> HostTier {
        let mut tier = HostTier::new(4 * 4096, KeyHasher::new(1));
        (0..segments).for_each(|segment| tier.add_segment(SegmentId(segment)));
        tier
    }

    fn fill(tier: &mut HostTier, class: Class, keys: std::ops::Range<u8>) {
        for n in keys {
            tier.claim_share(class);
            let table = tier.make_room(class).expect("it fits");
            let reserved = table.slots.reserve(key(n), None).expect("there is room");
            assert!(table.slots.commit(reserved));
            tier.check_integrity();
        }
    }

    const SMALL: Class = Class { domain: TrustDomain(1), stride: 4096 };
    const LARGE: Class = Class { domain: TrustDomain(1), stride: 8192 };
    const OTHER: Class = Class { domain: TrustDomain(2), stride: 4096 };

    #[test]
    fn classes_never_share_a_segment_and_a_starving_one_gets_its_share() {
        let mut tier = tier(4);
        fill(&mut tier, SMALL, 0..16);
        assert_eq!(tier.free_segments(), 0);
        fill(&mut tier, LARGE, 0..4);
        let shares = |tier: &HostTier| tier.summaries().iter().map(|s| s.segments).collect::<Vec<_>>();
        assert_eq!(shares(&tier), [2, 2]);
        fill(&mut tier, OTHER, 0..40);
        assert_eq!(shares(&tier).iter().sum::<usize>(), 4);
        assert!(shares(&tier).iter().all(|share| *share >= 1), "{:?}", shares(&tier));
    }

    #[test]
    fn the_coldest_segment_goes_first() {
        let mut tier = tier(2);
        fill(&mut tier, SMALL, 0..8);
        let hot = tier.class(SMALL).unwrap().slots.resident(key(0)).unwrap();
        tier.class_mut(SMALL).unwrap().slots.pin(hot);
        tier.class_mut(SMALL).unwrap().slots.unpin(hot, 1);
        fill(&mut tier, OTHER, 0..1);
        let slots = &tier.class(SMALL).unwrap().slots;
        assert!(slots.resident(key(0)).is_some(), "the segment used last stays");
        assert!(slots.resident(key(7)).is_none());
    }

    #[test]
    fn a_pinned_segment_is_not_taken() {
        let mut tier = tier(1);
        fill(&mut tier, SMALL, 0..1);
        let slot = tier.class(SMALL).unwrap().slots.resident(key(0)).unwrap();
        tier.class_mut(SMALL).unwrap().slots.pin(slot);
        tier.claim_share(OTHER);
        assert_eq!(tier.class(OTHER).unwrap().slots.slots(), 0);
        tier.class_mut(SMALL).unwrap().slots.unpin(slot, 1);
        tier.claim_share(OTHER);
        assert_eq!(tier.class(OTHER).unwrap().slots.slots(), 4);
        tier.check_integrity();
    }

    #[test]
    fn blocks_larger_than_a_segment_have_no_place() {
        assert!(tier(1).make_room(Class { stride: 5 * 4096, ..SMALL }).is_none());
    }
}
