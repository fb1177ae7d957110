//! A tier cut into equal segments (host memory, disk space), each bound to a class (trust domain, slot size) when first
//! needed.
//!
//! A class that owns no segment, or less than its fair share while it has to evict, takes the coldest segment of the
//! richest class. A segment without blocks is taken first. Blocks of one class never share a segment with another's.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use super::quotas::Tenants;
use super::slots::{Allowances, SlotCounts, SlotIndex, SlotTable, TableRules};
use super::{Millis, TrustDomain};
use crate::tier::Tier;

/// Segments that are tried before a class keeps what it has: each try may look at every slot.
const COLDEST_TRIED: usize = 4;

/// One of the equal pieces of a tier.
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

/// Where in a tier a slot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// Which segment.
    pub segment: SegmentId,
    /// Which of its slots.
    pub index: u32,
}

impl Place {
    /// Bytes from the start of a segment that holds slots behind each other.
    pub fn offset(self, stride: usize) -> usize {
        self.index as usize * stride
    }
}

/// How many slots of a size a segment has.
#[derive(Clone)]
pub struct SlotsIn(Arc<dyn Fn(usize) -> u32 + Send + Sync>);

impl SlotsIn {
    /// `slots(stride)` must always give the same answer.
    pub fn new(slots: impl Fn(usize) -> u32 + Send + Sync + 'static) -> Self {
        Self(Arc::new(slots))
    }

    /// Slots of this size.
    pub fn count(&self, stride: usize) -> u32 {
        (self.0)(stride)
    }

    /// Slots behind each other, nothing else.
    pub fn bytes(segment_bytes: usize) -> Self {
        Self::new(move |stride| u32::try_from(segment_bytes / stride).unwrap_or(0))
    }
}

impl std::fmt::Debug for SlotsIn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SlotsIn")
    }
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
    pub fn place(&self, slot: SlotIndex) -> Place {
        let position = (slot.0 / self.slots_per_segment) as usize;
        let segment = self.segments[position].expect("a slot in use has memory behind it");
        Place { segment, index: slot.0 % self.slots_per_segment }
    }

    fn range(&self, position: usize) -> std::ops::Range<u32> {
        let first = position as u32 * self.slots_per_segment;
        first..first + self.slots_per_segment
    }

    /// The slot at a place, if it is one of this class.
    pub fn slot_at(&self, segment: SegmentId, index: u32) -> Option<SlotIndex> {
        let position = self.segments.iter().position(|owned| *owned == Some(segment))?;
        (index < self.slots_per_segment).then(|| SlotIndex(self.range(position).start + index))
    }

    /// Segments that it owns.
    pub fn segments(&self) -> impl Iterator<Item = SegmentId> + '_ {
        self.segments.iter().flatten().copied()
    }

    fn owned(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.segments.len()).filter(|position| self.segments[*position].is_some())
    }

    fn bind(&mut self, segment: SegmentId, node: Option<u32>) {
        let vacant = self.segments.iter().position(Option::is_none);
        let position = vacant.unwrap_or(self.segments.len());
        self.slots.set_node(position, self.slots_per_segment, node);
        match vacant {
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

    /// Positions of segments that may be given up.
    fn movable(&self, may_go: impl Fn(SegmentId) -> bool) -> impl Iterator<Item = usize> {
        self.owned().filter(move |position| self.segments[*position].is_some_and(&may_go))
    }

    /// Gives up a segment without blocks.
    fn surrender_empty(&mut self, may_go: impl Fn(SegmentId) -> bool, now: Millis) -> Option<SegmentId> {
        let position = self.movable(may_go).find(|position| self.slots.all_free(self.range(*position)))?;
        let retired = self.slots.retire(self.range(position), Allowances::NONE, now);
        retired.then(|| self.segments[position].take()).flatten()
    }

    /// Gives up the segment whose blocks are of the lowest priority; among those, the one whose latest use is longest ago.
    /// One that holds what is pinned or guaranteed is kept.
    fn surrender(
        &mut self,
        may_go: impl Fn(SegmentId) -> bool,
        allowances: &Allowances,
        now: Millis,
    ) -> Option<SegmentId> {
        self.slots.expire(now);
        let mut positions: Vec<usize> = self.movable(may_go).collect();
        positions.sort_by_cached_key(|position| self.slots.worth(self.range(*position)));
        let position = positions.into_iter().take(COLDEST_TRIED).find(|position| {
            let range = self.range(*position);
            self.slots.retire(range, allowances, now)
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

/// What is to be heeded when a class claims a segment of another.
#[derive(Debug, Clone, Copy)]
pub(super) struct Claimed<'a> {
    pub tier: Tier,
    pub tenants: &'a Tenants,
    pub now: Millis,
}

/// A tier of segments.
#[derive(Debug)]
pub struct SegmentTier {
    /// `None`: there is no such tier.
    slots_in: Option<SlotsIn>,
    free: Vec<SegmentId>,
    /// On which node of the machine's memory a segment is, where that is known.
    nodes: BTreeMap<SegmentId, u32>,
    classes: BTreeMap<Class, ClassTable>,
    bound: Vec<(SegmentId, Class)>,
    /// Segments that processes of a domain have mapped, or may have: none of another domain's blocks are put there.
    exposed: BTreeMap<SegmentId, Exposed>,
    rules: TableRules,
}

/// To whom a segment has been shown.
#[derive(Debug, Clone, Copy)]
struct Exposed {
    to: TrustDomain,
    /// By an earlier life of the daemon: nobody knows to whom of that domain, and whether they live.
    earlier: bool,
}

impl SegmentTier {
    /// A tier without segments.
    pub fn new(slots_in: Option<SlotsIn>, rules: TableRules) -> Self {
        let (free, nodes, classes, bound, exposed) = Default::default();
        Self { slots_in, free, nodes, classes, bound, exposed, rules }
    }

    /// False if there will never be a segment.
    pub fn is_on(&self) -> bool {
        self.slots_in.is_some()
    }

    /// Forgets everything, and changes how segments are cut. No slot may be in use.
    pub fn set_up(&mut self, slots_in: Option<SlotsIn>) {
        *self = Self::new(slots_in, self.rules);
    }

    /// Slots of a size in each segment.
    pub fn slots_in(&self, stride: usize) -> u32 {
        self.slots_in.as_ref().map_or(0, |slots_in| slots_in.count(stride))
    }

    /// Segments that were bound to a class since the last call: what was in them is void.
    pub fn take_bound(&mut self) -> Vec<(SegmentId, Class)> {
        std::mem::take(&mut self.bound)
    }

    /// A class as it was found, with its segments in order; see `SlotTable::restore`. The class must be new.
    pub fn restore(&mut self, class: Class, segments: Vec<SegmentId>, slots: SlotTable) {
        let slots_per_segment = self.slots_in(class.stride);
        assert_eq!(slots.slots(), segments.len() * slots_per_segment as usize, "every slot has memory");
        let segments = segments.into_iter().map(Some).collect();
        let known = self.classes.insert(class, ClassTable { class, slots_per_segment, segments, slots });
        assert!(known.is_none(), "a class is restored once, before it is used");
    }

    /// Processes of a domain are given a segment, which has a class of that domain or none.
    pub fn expose(&mut self, segment: SegmentId, to: TrustDomain) {
        self.exposed.entry(segment).or_insert(Exposed { to, earlier: false });
    }

    /// An earlier life of the daemon may have given a segment to processes of a domain.
    pub fn expose_earlier(&mut self, segment: SegmentId, to: TrustDomain) {
        self.exposed.insert(segment, Exposed { to, earlier: true });
    }

    /// No process of a domain has a segment any more that this life of the daemon gave it.
    pub fn forget_exposure(&mut self, of: TrustDomain) {
        self.exposed.retain(|_, exposed| exposed.to != of || exposed.earlier);
    }

    /// Share of the slots that are in use; segments without a class count as unused.
    pub fn occupancy(&self) -> f64 {
        let (mut used, mut segments) = (0.0, self.free.len() as f64);
        for table in self.classes.values() {
            let owned = table.owned().count() as f64;
            segments += owned;
            let slots = table.slots.slots();
            if slots > 0 {
                used += owned * (slots - table.slots.counts().free) as f64 / slots as f64;
            }
        }
        if segments == 0.0 { 0.0 } else { used / segments }
    }

    /// Says, before a segment joins, on which node of the machine's memory it is.
    pub fn set_node(&mut self, segment: SegmentId, node: u32) {
        self.nodes.insert(segment, node);
    }

    /// On which node of the machine's memory a segment is, if that is known.
    pub fn node_of(&self, segment: SegmentId) -> Option<u32> {
        self.nodes.get(&segment).copied()
    }

    /// A segment joins the free set.
    pub fn add_segment(&mut self, segment: SegmentId) {
        self.free.push(segment);
    }

    /// The table of a class that has memory.
    pub fn class(&self, class: Class) -> Option<&ClassTable> {
        self.classes.get(&class)
    }

    /// As [`SegmentTier::class`].
    pub fn class_mut(&mut self, class: Class) -> Option<&mut ClassTable> {
        self.classes.get_mut(&class)
    }

    /// All tables.
    pub fn classes(&self) -> impl Iterator<Item = (&Class, &ClassTable)> + Clone {
        self.classes.iter()
    }

    /// All tables, to be changed.
    pub fn classes_mut(&mut self) -> impl Iterator<Item = (&Class, &mut ClassTable)> {
        self.classes.iter_mut()
    }

    /// Tables from a class on, to be changed.
    pub fn classes_from(&mut self, from: Bound<Class>) -> impl Iterator<Item = (&Class, &mut ClassTable)> {
        self.classes.range_mut((from, Bound::Unbounded))
    }

    /// The table of a class, with a free segment bound to it if it has no free slot. Its slots may be none. `None` if
    /// blocks of this size do not fit a segment.
    pub fn make_room(&mut self, class: Class) -> Option<&mut ClassTable> {
        self.make_room_near(class, None)
    }

    /// As [`SegmentTier::make_room`]; the next slots are wanted on a node of the machine's memory, if that is known.
    pub fn make_room_near(&mut self, class: Class, node: Option<u32>) -> Option<&mut ClassTable> {
        let slots_per_segment = Some(self.slots_in(class.stride)).filter(|slots| *slots > 0)?;
        let table = self.classes.entry(class).or_insert_with(|| ClassTable {
            class,
            slots_per_segment,
            segments: Vec::new(),
            slots: SlotTable::new(0, self.rules),
        });
        let exposed = &self.exposed;
        let may_have = |segment: &SegmentId| exposed.get(segment).is_none_or(|e| e.to == class.domain);
        table.slots.want_near(node);
        let (full, nodes) = (table.slots.would_evict(), &self.nodes);
        let is_near = |segment: &SegmentId| node.is_some() && nodes.get(segment).copied() == node;
        let near = self.free.iter().rposition(|segment| is_near(segment) && may_have(segment));
        let any = || self.free.iter().rposition(|segment| full && may_have(segment));
        if let Some(at) = near.filter(|_| full || !table.slots.has_near()).or_else(any) {
            let segment = self.free.remove(at);
            table.bind(segment, nodes.get(&segment).copied());
            self.bound.push((segment, class));
        }
        Some(table)
    }

    /// Gives a class that would have to evict a segment of another, if it owns less than its share. May look at every
    /// slot: once per batch.
    pub(super) fn claim_share(&mut self, class: Class, rights: Claimed<'_>) {
        let Some(table) = self.make_room(class).filter(|table| table.slots.counts().free == 0) else {
            return;
        };
        let owned = table.owned().count();
        if let Some(segment) = self.take_segment(class, owned, rights) {
            let node = self.node_of(segment);
            self.classes.get_mut(&class).expect("it was just there").bind(segment, node);
            self.bound.push((segment, class));
        }
    }

    /// A segment of another class, for one that owns `owned`.
    fn take_segment(&mut self, class: Class, owned: usize, rights: Claimed<'_>) -> Option<SegmentId> {
        let mut others: Vec<(usize, Class)> = self
            .classes
            .values()
            .filter(|table| table.class != class)
            .map(|table| (table.owned().count(), table.class))
            .collect();
        others.sort_by_key(|(count, _)| std::cmp::Reverse(*count));
        let exposed = self.exposed.clone();
        let may_go = |segment| exposed.get(&segment).is_none_or(|exposed| exposed.to == class.domain);
        let total = owned + others.iter().map(|(count, _)| count).sum::<usize>();
        for (_, other) in &others {
            let empty =
                self.classes.get_mut(other).and_then(|table| table.surrender_empty(may_go, rights.now));
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
        let allowances = rights.tenants.in_segments(rights.tier, self, richest);
        self.classes.get_mut(&richest)?.surrender(may_go, &allowances, rights.now)
    }

    /// Segments that no class owns, the one that is taken next first.
    pub fn free(&self) -> impl Iterator<Item = SegmentId> + '_ {
        self.free.iter().rev().copied()
    }

    /// How many those are.
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
    use crate::ledger::Retention;
    use crate::ledger::key::{Key, NamespaceId};
    use crate::ledger::slots::{Incoming, Need};

    fn key(n: u8) -> Key {
        Key { namespace: NamespaceId(1), hash: SequenceHash([n; 16]) }
    }

    fn tier(segments: u32) -> SegmentTier {
        let mut tier = SegmentTier::new(Some(SlotsIn::bytes(4 * 4096)), TableRules::of_tests());
        (0..segments).for_each(|segment| tier.add_segment(SegmentId(segment)));
        tier
    }

    fn claim(tier: &mut SegmentTier, class: Class) {
        let tenants = Tenants::default();
        tier.claim_share(class, Claimed { tier: Tier::Host, tenants: &tenants, now: Millis(50) });
    }

    fn fill(tier: &mut SegmentTier, class: Class, keys: std::ops::Range<u8>) {
        for n in keys {
            claim(tier, class);
            let table = tier.make_room(class).expect("it fits");
            let block = Incoming::of_tests(key(n), None);
            let now = Millis(u64::from(n));
            let reserved = table.slots.reserve(block, Need::Wanted, Allowances::NONE, now);
            assert!(table.slots.commit(reserved.expect("there is room"), now));
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
        let shares = |tier: &SegmentTier| tier.summaries().iter().map(|s| s.segments).collect::<Vec<_>>();
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
        tier.class_mut(SMALL).unwrap().slots.unpin(hot, 1, Millis(9));
        fill(&mut tier, OTHER, 0..1);
        let slots = &tier.class(SMALL).unwrap().slots;
        assert!(slots.resident(key(0)).is_some(), "the segment used last stays");
        assert!(slots.resident(key(7)).is_none());
    }

    #[test]
    fn a_segment_with_dearer_blocks_outlives_one_that_was_used_later() {
        let mut tier = tier(2);
        fill(&mut tier, SMALL, 0..8);
        let slots = &mut tier.class_mut(SMALL).unwrap().slots;
        // In the segment that was filled first.
        let dear = slots.resident(key(2)).unwrap();
        slots.set_retention(dear, Retention { priority: 36, duration: None }, Millis(9));
        fill(&mut tier, OTHER, 0..1);
        let slots = &tier.class(SMALL).unwrap().slots;
        assert!(slots.resident(key(2)).is_some(), "it is dearer");
        assert!(slots.resident(key(7)).is_none(), "though it was used later");
    }

    #[test]
    fn a_pinned_segment_is_not_taken() {
        let mut tier = tier(1);
        fill(&mut tier, SMALL, 0..1);
        let slot = tier.class(SMALL).unwrap().slots.resident(key(0)).unwrap();
        tier.class_mut(SMALL).unwrap().slots.pin(slot);
        claim(&mut tier, OTHER);
        assert_eq!(tier.class(OTHER).unwrap().slots.slots(), 0);
        tier.class_mut(SMALL).unwrap().slots.unpin(slot, 1, Millis(9));
        claim(&mut tier, OTHER);
        assert_eq!(tier.class(OTHER).unwrap().slots.slots(), 4);
        tier.check_integrity();
    }

    #[test]
    fn blocks_larger_than_a_segment_have_no_place() {
        assert!(tier(1).make_room(Class { stride: 5 * 4096, ..SMALL }).is_none());
    }
}
