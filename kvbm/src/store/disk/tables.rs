//! The tables of all segments in memory: pages as they are, or will be, on disk, and which of them differ from there.

use std::collections::{BTreeMap, BTreeSet};

use super::block::DiskPlace;
use super::geometry::Geometry;
use crate::ledger::SegmentId;
use crate::store::table::{
    Binding, Decoded, ENTRIES_PER_PAGE, ENTRY_BYTES, Entry, FREE, PAGE_BYTES, STATE_BYTES, put, take,
};

/// A page of a table; page 0 is the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PageId {
    /// Of which segment.
    pub segment: SegmentId,
    /// In which file.
    pub file: u32,
    /// Which of its extent's.
    pub page: u32,
}

/// Counts changes of pages over all tables: a page that changed later has the larger number, also if its segment has been
/// bound anew.
pub type Change = u64;

/// The part of a segment's table that is in one file.
#[derive(Debug)]
pub struct ExtentTable {
    /// All pages, one after the other.
    bytes: Vec<u8>,
    /// For each page, when it last changed in memory,
    changed: Vec<Change>,
    /// and the state of it that is known to be on disk.
    written: Vec<Change>,
}

impl ExtentTable {
    fn new(binding: &Binding) -> Self {
        let pages = Geometry::table_pages(binding.slots) as usize;
        let mut bytes = vec![0; pages * PAGE_BYTES];
        put(&mut bytes, 0, &binding.encode());
        Self { bytes, changed: vec![0; pages], written: vec![0; pages] }
    }

    fn entry(&self, local: u32) -> &[u8; ENTRY_BYTES] {
        let at = entry_at(local);
        self.bytes[at..at + ENTRY_BYTES].try_into().expect("the range has these bytes")
    }

    fn page(&self, page: u32) -> Option<&[u8]> {
        let at = page as usize * PAGE_BYTES;
        self.bytes.get(at..at + PAGE_BYTES)
    }
}

fn entry_at(local: u32) -> usize {
    PAGE_BYTES + local as usize * ENTRY_BYTES
}

/// The table of a bound segment.
#[derive(Debug)]
pub struct BoundTable {
    /// What it is bound to; slots are those of one extent.
    pub binding: Binding,
    extents: Vec<ExtentTable>,
}

impl BoundTable {
    /// Without entries.
    pub fn new(binding: Binding, files: u32) -> Self {
        Self { binding, extents: (0..files).map(|_| ExtentTable::new(&binding)).collect() }
    }

    /// Room for what is read from a file: the pages [first, first + bytes / page).
    pub fn pages_mut(&mut self, file: u32, first: u32, bytes: usize) -> &mut [u8] {
        let at = first as usize * PAGE_BYTES;
        &mut self.extents[file as usize].bytes[at..at + bytes]
    }

    fn decode(&self, geometry: &Geometry, index: u32) -> Decoded {
        let (file, local) = geometry.split(index);
        if local >= self.binding.slots {
            return Decoded::Free;
        }
        Decoded::of(self.extents[file as usize].entry(local), self.binding.seal, index)
    }
}

/// A page on its way to a file.
#[derive(Debug)]
struct InFlight {
    /// State that is being written.
    change: Change,
    /// Binding that it belongs to.
    seal: u64,
}

/// All of them.
#[derive(Debug)]
pub struct Tables {
    geometry: Geometry,
    /// Those that are bound.
    segments: BTreeMap<SegmentId, BoundTable>,
    /// Pages with `written < changed`.
    dirty: BTreeSet<PageId>,
    in_flight: BTreeMap<PageId, InFlight>,
    changes: Change,
}

impl Tables {
    /// Nothing is bound.
    pub fn new(geometry: Geometry) -> Self {
        Self {
            geometry,
            segments: BTreeMap::new(),
            dirty: BTreeSet::new(),
            in_flight: BTreeMap::new(),
            changes: 0,
        }
    }

    /// The table of a bound segment.
    pub fn bound(&self, segment: SegmentId) -> Option<&BoundTable> {
        self.segments.get(&segment)
    }

    /// Takes over a table as it is on disk.
    pub fn adopt(&mut self, segment: SegmentId, table: BoundTable) {
        self.segments.insert(segment, table);
    }

    /// Takes over a table that is not on disk, and gives back the one before. All of its pages are to be written: what
    /// is on disk in their place may be anything.
    pub fn bind(&mut self, segment: SegmentId, table: BoundTable) -> Option<BoundTable> {
        let first = PageId { segment, file: 0, page: 0 };
        let behind = PageId { segment: SegmentId(segment.0 + 1), file: 0, page: 0 };
        let stale: Vec<PageId> = self.dirty.range(first..behind).copied().collect();
        for id in &stale {
            self.dirty.remove(id);
        }
        let pages = Geometry::table_pages(table.binding.slots);
        let before = self.segments.insert(segment, table);
        for file in 0..self.geometry.files {
            (0..pages).for_each(|page| self.touch(PageId { segment, file, page }));
        }
        before
    }

    /// What is in a slot.
    pub fn entry(&self, place: DiskPlace) -> Decoded {
        self.bound(place.segment).map_or(Decoded::Free, |table| table.decode(&self.geometry, place.index))
    }

    /// What the slot's segment is bound to, if the slot is there and large enough.
    pub fn binding_for(&self, place: DiskPlace, bytes: usize) -> Option<Binding> {
        let binding = self.bound(place.segment)?.binding;
        let there = self.geometry.split(place.index).1 < binding.slots;
        (there && (1..=binding.stride).contains(&bytes)).then_some(binding)
    }

    /// Puts an entry into a slot that is there, and names the page.
    pub fn set(&mut self, place: DiskPlace, entry: &Entry) -> PageId {
        let (file, local) = self.geometry.split(place.index);
        let table = self.segments.get_mut(&place.segment).expect("the slot is there");
        let bytes = entry.encode(table.binding.seal, place.index);
        put(&mut table.extents[file as usize].bytes, entry_at(local), &bytes);
        self.touched(place.segment, file, local)
    }

    /// Empties a slot; names the page if anything was in it.
    pub fn clear(&mut self, place: DiskPlace) -> Option<PageId> {
        let (file, local) = self.geometry.split(place.index);
        let table = self.segments.get_mut(&place.segment)?;
        if local >= table.binding.slots {
            return None;
        }
        let extent = &mut table.extents[file as usize];
        let state: [u8; STATE_BYTES] = take(extent.entry(local), 0);
        if u32::from_le_bytes(state) == FREE {
            return None;
        }
        put(&mut extent.bytes, entry_at(local), &[0; ENTRY_BYTES]);
        Some(self.touched(place.segment, file, local))
    }

    fn touched(&mut self, segment: SegmentId, file: u32, local: u32) -> PageId {
        let id = PageId { segment, file, page: 1 + local / ENTRIES_PER_PAGE };
        self.touch(id);
        id
    }

    fn touch(&mut self, id: PageId) {
        self.changes += 1;
        let table = self.segments.get_mut(&id.segment).expect("its page has been changed");
        table.extents[id.file as usize].changed[id.page as usize] = self.changes;
        self.dirty.insert(id);
    }

    /// Pages that are not on disk as they are here.
    pub fn dirty(&self) -> impl Iterator<Item = PageId> + '_ {
        self.dirty.iter().copied()
    }

    /// The state that a page has to have on disk for it to be as it is now; `None` if it is, or is gone.
    pub fn wanted(&self, id: PageId) -> Option<Change> {
        self.dirty.contains(&id).then(|| self.changed(id)).flatten()
    }

    fn changed(&self, id: PageId) -> Option<Change> {
        self.bound(id.segment)?.extents.get(id.file as usize)?.changed.get(id.page as usize).copied()
    }

    /// Whether that state of the page, or a later one, is on disk, or the page is gone.
    pub fn is_written(&self, id: PageId, wanted: Change) -> bool {
        let written = || self.bound(id.segment)?.extents.get(id.file as usize)?.written.get(id.page as usize);
        written().is_none_or(|written| *written >= wanted)
    }

    /// Whether somebody is writing the page.
    pub fn is_in_flight(&self, id: PageId) -> bool {
        self.in_flight.contains_key(&id)
    }

    /// Whether pages of an earlier binding of the segment are still being written: they may land on what is now a slot.
    pub fn is_haunted(&self, segment: SegmentId) -> bool {
        let seal = self.bound(segment).map(|table| table.binding.seal);
        self.in_flight.iter().any(|(id, page)| id.segment == segment && Some(page.seal) != seal)
    }

    /// The page's bytes, which are now being written. Nobody else may be at it.
    pub fn launch(&mut self, id: PageId) -> Option<&[u8]> {
        let change = self.changed(id)?;
        let seal = self.bound(id.segment)?.binding.seal;
        let before = self.in_flight.insert(id, InFlight { change, seal });
        assert!(before.is_none(), "two writers of one page");
        self.bound(id.segment)?.extents[id.file as usize].page(id.page)
    }

    /// A page has been written, or not.
    pub fn landed(&mut self, id: PageId, arrived: bool) {
        let launched = self.in_flight.remove(&id).expect("it was launched");
        let Some(table) = self.segments.get_mut(&id.segment) else { return };
        // A page of an earlier binding says nothing about this one's, which has changed later.
        if arrived && let Some(written) = table.extents[id.file as usize].written.get_mut(id.page as usize) {
            *written = launched.change;
            if self.changed(id) == Some(launched.change) {
                self.dirty.remove(&id);
            }
        }
    }
}
