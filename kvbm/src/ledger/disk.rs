//! The disk tier as the ledger sees it: slots, what is admitted, what is being moved, what is looked at next.

use std::collections::HashMap;
use std::ops::Bound;

use kvbm_hash::SequenceHash;

use super::admission::{Admission, AdmissionRules, AdmissionTally};
use super::demote::{BatchLimit, Candidates};
use super::key::Key;
use super::segments::{Class, ClassSummary, Place, SegmentId, SegmentTier, SlotsIn};
use super::slots::{Copying, GroupId, Restored, SlotIndex, SlotTable, TableRules};
use super::{Ledger, Millis, NamespaceId, Retention, TrustDomain};
use crate::tier::Tier;

/// Settings of the flow to disk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DiskRules {
    /// What is admitted.
    pub admission: AdmissionRules,
    /// Writes wait until nothing was read for so long.
    pub idle: Millis,
    /// Share of host memory in use, 0..=1, above which they do not wait.
    pub high_water: f64,
}

impl Default for DiskRules {
    fn default() -> Self {
        let admission = AdmissionRules { frequency_filter: true, priority_min: 0, bytes_per_day: None };
        Self { admission, idle: Millis(1000), high_water: 0.8 }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Disk {
    pub tier: SegmentTier,
    pub admission: Admission,
    pub candidates: Candidates,
    /// The drive behaves.
    pub in_service: bool,
    pub idle: Millis,
    pub high_water: f64,
    /// Blocks being written.
    pub demoting: usize,
    /// Blocks being read.
    pub promoting: usize,
    /// When something was last read, or was asked to be.
    pub read_at: Option<Millis>,
    /// Blocks that were worth less than what would have had to go for them.
    pub not_admitted: u64,
    /// Where the next inspection begins.
    scrub_after: Option<(Class, SlotIndex)>,
}

impl Disk {
    pub fn new(rules: DiskRules, tables: TableRules) -> Self {
        Self {
            tier: SegmentTier::new(None, tables),
            admission: Admission::new(rules.admission, tables.hasher),
            candidates: Candidates::default(),
            in_service: false,
            idle: rules.idle,
            high_water: rules.high_water,
            demoting: 0,
            promoting: 0,
            read_at: None,
            not_admitted: 0,
            scrub_after: None,
        }
    }
}

/// A block that an earlier life of the daemon left in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FoundBlock {
    /// Digest of its namespace.
    pub namespace: [u8; 32],
    /// Which slot of the segment.
    pub index: u32,
    /// Its key.
    pub key: SequenceHash,
    /// Key of the block before it.
    pub parent: Option<SequenceHash>,
    /// How it is kept: a duration is what is left of it.
    pub retention: Retention,
    /// When it was stored, on any scale.
    pub stored: u64,
}

/// What a slot holds, for whoever writes it down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredBlock {
    /// Digest of its namespace.
    pub namespace: [u8; 32],
    /// Its key.
    pub key: SequenceHash,
    /// Key of the block before it.
    pub parent: Option<SequenceHash>,
    /// How it is kept.
    pub retention: Retention,
}

/// A segment that an earlier life of the daemon left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundSegment {
    /// Which.
    pub segment: SegmentId,
    /// To which class it is bound.
    pub class: Class,
    /// What is in it.
    pub blocks: Vec<FoundBlock>,
}

/// Classes made of what was found; see [`Ledger::name_found`].
#[derive(Debug)]
pub struct FoundTables {
    classes: Vec<(Class, Vec<SegmentId>, SlotTable)>,
    /// Blocks of each namespace.
    blocks: HashMap<NamespaceId, usize>,
    /// Blocks that could not be used: a block before them is missing.
    pub left_out: usize,
}

/// Names of what was found, held until the tables are there.
#[derive(Debug)]
pub struct FoundNames {
    /// With the group of tenants that the blocks count for.
    names: HashMap<(TrustDomain, [u8; 32]), (NamespaceId, GroupId)>,
    rules: TableRules,
    now: Millis,
}

impl FoundNames {
    /// Makes tables of what was found. Takes a while: not to be done under a lock. `slots_in`: as the tier has it.
    pub fn tables(&self, found: Vec<FoundSegment>, slots_in: &SlotsIn) -> FoundTables {
        let mut by_class: HashMap<Class, Vec<FoundSegment>> = HashMap::new();
        for segment in found {
            by_class.entry(segment.class).or_default().push(segment);
        }
        let mut tables = FoundTables { classes: Vec::new(), blocks: HashMap::new(), left_out: 0 };
        for (class, segments) in by_class {
            let per_segment = slots_in.count(class.stride);
            let mut blocks = Vec::with_capacity(segments.iter().map(|segment| segment.blocks.len()).sum());
            for (position, segment) in segments.iter().enumerate() {
                let first = position as u32 * per_segment;
                blocks.extend(segment.blocks.iter().filter(|block| block.index < per_segment).map(|block| {
                    let (namespace, group) = self.names[&(class.domain, block.namespace)];
                    Restored {
                        slot: SlotIndex(first + block.index),
                        key: Key { namespace, hash: block.key },
                        parent: block.parent,
                        retention: block.retention,
                        group,
                        stored: block.stored,
                    }
                }));
            }
            let slots = segments.len() as u32 * per_segment;
            let (table, left_out) = SlotTable::restore(slots, blocks, self.rules, self.now);
            tables.left_out += left_out;
            for key in table.keys() {
                *tables.blocks.entry(key.namespace).or_default() += 1;
            }
            let segments = segments.into_iter().map(|segment| segment.segment).collect();
            tables.classes.push((class, segments, table));
        }
        tables
    }
}

/// A block on disk that is to be looked at.
#[must_use]
#[derive(Debug)]
pub struct ScrubItem {
    class: Class,
    source: Copying,
    /// Its place.
    pub place: Place,
    /// Digest of its namespace.
    pub namespace: [u8; 32],
    /// Its key.
    pub key: SequenceHash,
}

impl ScrubItem {
    /// Its bytes.
    pub fn stride(&self) -> usize {
        self.class.stride
    }
}

impl Ledger {
    /// Disk space is there, cut like this. Nothing is known to be in it, and it is not in service yet.
    pub fn add_disk(&mut self, slots_in: SlotsIn) {
        assert!(self.disk_copies() == 0, "the tier before it has ended");
        self.disk.tier.set_up(Some(slots_in));
    }

    /// A segment of disk space that nothing is in.
    pub fn add_disk_segment(&mut self, segment: SegmentId) {
        self.disk.tier.add_segment(segment);
    }

    /// The drive behaves, or does not: then nothing is found on it and nothing is written to it.
    pub fn set_disk_service(&mut self, in_service: bool) {
        self.disk.in_service = in_service;
        if !in_service {
            self.disk.candidates.clear();
            self.waiters.disk_gone();
        }
    }

    /// True while blocks on disk are found.
    pub fn disk_in_service(&self) -> bool {
        self.disk.in_service
    }

    /// The disk is gone, and all that was on it. False while it is still being written or read: ask again.
    pub fn drop_disk(&mut self) -> bool {
        self.set_disk_service(false);
        if self.disk_copies() > 0 {
            return false;
        }
        self.sweep();
        for event in self.residents_of(Tier::Disk) {
            if let crate::EventKind::Stored { namespace, key, .. } = event.kind {
                self.registry.removed(namespace, Tier::Disk);
                let kind = crate::EventKind::Removed { namespace, key };
                self.events.push(crate::Event { kind, ..event });
            }
        }
        self.disk.tier.set_up(None);
        self.disk.scrub_after = None;
        true
    }

    /// Slots that somebody writes or reads, condemned ones included.
    fn disk_copies(&self) -> usize {
        let counts = self.disk.tier.classes().map(|(_, table)| table.slots.counts());
        counts.map(|counts| counts.pinned + counts.filling).sum()
    }

    /// Names what was found, so that tables can be made of it. To be followed by [`Ledger::install_found`].
    pub fn name_found(&mut self, found: &[FoundSegment], now: Millis) -> FoundNames {
        let mut names = HashMap::new();
        for segment in found {
            for block in &segment.blocks {
                names.entry((segment.class.domain, block.namespace)).or_insert_with(|| {
                    let id = self.registry.hold(segment.class, block.namespace);
                    (id, self.registry.group_of(id))
                });
            }
        }
        FoundNames { names, rules: self.rules, now }
    }

    /// Makes what was found known, in a tier whose classes have not been used. Returns the number of blocks.
    pub fn install_found(&mut self, tier: Tier, names: FoundNames, found: FoundTables) -> usize {
        let now = names.now;
        let segments = match tier {
            Tier::Host => &mut self.host,
            Tier::Disk => &mut self.disk.tier,
            Tier::Device | Tier::Remote => unreachable!("only tiers of segments are restored"),
        };
        for (class, owned, table) in found.classes {
            if tier == Tier::Host {
                owned.iter().for_each(|segment| segments.expose_earlier(*segment, class.domain));
            }
            segments.restore(class, owned, table);
        }
        for (namespace, blocks) in &found.blocks {
            self.registry.stored_many(*namespace, tier, *blocks);
        }
        self.keep_pinned();
        for (namespace, group) in names.names.into_values() {
            // It may have got its tenant while the tables were made.
            let known = self.registry.namespace(namespace).map_or(group, |namespace| namespace.group);
            if known != group {
                self.regroup(namespace, known, now);
            }
            self.registry.let_go(namespace);
        }
        found.blocks.values().sum()
    }

    /// Where in host memory a block is, for tests.
    #[cfg(test)]
    pub fn host_place(&self, hash: SequenceHash) -> Option<Place> {
        let named = |(_, key, _): &(SlotIndex, Key, Option<SequenceHash>)| key.hash == hash;
        self.host.classes().find_map(|(_, table)| {
            table.slots.residents().into_iter().find(named).map(|(slot, ..)| table.place(slot))
        })
    }

    /// How a block on disk is kept, for tests.
    #[cfg(test)]
    pub fn retention_on_disk(&self, hash: SequenceHash) -> Option<Retention> {
        let named = |(_, key, _): &(SlotIndex, Key, Option<SequenceHash>)| key.hash == hash;
        self.disk.tier.classes().find_map(|(_, table)| {
            let (slot, ..) = table.slots.residents().into_iter().find(named)?;
            Some(table.slots.retention_as_set(slot))
        })
    }

    /// The disk tier by class.
    pub fn disk_summaries(&self) -> Vec<ClassSummary> {
        self.disk.tier.summaries()
    }

    /// Disk segments that no class owns.
    pub fn free_disk_segments(&self) -> usize {
        self.disk.tier.free_segments()
    }

    /// What was turned away, and candidates that found no room in their queue.
    pub fn disk_turned_away(&self) -> (AdmissionTally, u64) {
        (self.disk.admission.tally, self.disk.candidates.dropped)
    }

    /// Blocks that wait to be written.
    pub fn demote_backlog(&self) -> usize {
        self.disk.candidates.len()
    }

    /// Blocks that are being written.
    pub fn demoting(&self) -> usize {
        self.disk.demoting
    }

    /// The next blocks on disk to look at, of one class, in the order of their places, round and round. They come back through
    /// [`Ledger::finish_scrub`].
    pub fn next_scrub(&mut self, limit: BatchLimit) -> Vec<ScrubItem> {
        if !self.disk.in_service {
            return Vec::new();
        }
        let from = self.disk.scrub_after;
        let lower = from.map_or(Bound::Unbounded, |(class, _)| Bound::Included(class));
        let Some((class, table)) = self.disk.tier.classes_from(lower).find_map(|(class, table)| {
            let after = from.filter(|(of, _)| of == class).map_or(0, |(_, slot)| slot.0 + 1);
            (after < table.slots.end()).then_some((*class, (table, after)))
        }) else {
            self.disk.scrub_after = None;
            return Vec::new();
        };
        let (table, after) = table;
        let mut items = Vec::new();
        let max = limit.blocks_of(class.stride);
        // Free slots cost time too.
        let end = table.slots.end().min(after.saturating_add(max as u32 * 64));
        let mut last = SlotIndex(after);
        for slot in (after..end).map(SlotIndex) {
            if items.len() >= max {
                break;
            }
            last = slot;
            let Some((key, _)) = table.slots.block(slot) else { continue };
            let Some(namespace) = self.registry.namespace(key.namespace) else { continue };
            let source = table.slots.begin_copy(slot);
            let place = table.place(slot);
            items.push(ScrubItem { class, source, place, namespace: namespace.digest, key: key.hash });
        }
        self.disk.scrub_after = Some((class, last));
        items
    }

    /// Blocks of one call of [`Ledger::next_scrub`] were looked at; false: it is not what was stored.
    pub fn finish_scrub(&mut self, items: Vec<(ScrubItem, bool)>, now: Millis) {
        let Some(class) = items.first().map(|(item, _)| item.class) else { return };
        let table = self.disk.tier.class_mut(class).expect("its slots are being read");
        let damaged = items.iter().filter(|(_, intact)| !intact);
        table.slots.condemn(damaged.map(|(item, _)| &item.source), now);
        items.into_iter().for_each(|(item, _)| table.slots.end_copy(item.source, now));
        self.sweep();
    }
}
