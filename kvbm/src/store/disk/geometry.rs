//! Where everything is in the files.
//!
//! ```text
//! file   [header page, rest of 1 MiB unused | extent 0 | extent 1 | ...]
//! extent [segment header page | pages of 32 entries | slots]
//! ```
//!
//! Segment s is extent s of every file; slot i of a segment is slot i / files of its extent in file i % files.

use crate::ledger::SegmentId;
use crate::store::table::{ENTRIES_PER_PAGE, PAGE_BYTES};

/// Where the extents begin.
pub const FIRST_EXTENT: u64 = 1 << 20;
/// A segment's size at most, over all files.
const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// Enough segments that several models can share even a small tier.
const SEGMENTS_WANTED: u64 = 64;
/// Segments below this are made only to have a few.
const SEGMENT_BYTES_WANTED: u64 = 64 << 20;
/// Segments even of a small tier.
const SEGMENTS_MIN: u64 = 4;
/// Segment header, a page of entries, a slot.
const EXTENT_BYTES_MIN: u64 = 3 * PAGE_BYTES as u64;
/// Files of a set at most: their headers are written in one batch.
pub const FILES_MAX: u32 = 64;
/// Largest extent that a file's header may name.
const EXTENT_BYTES_MAX: u64 = 1 << 40;

/// The form of a set of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Files in the set.
    pub files: u32,
    /// Bytes of each extent.
    pub extent_bytes: u64,
}

impl Geometry {
    /// For a new set. `None` if the capacity is too small for anything.
    pub fn plan(capacity_bytes: u64, files: u32) -> Option<Self> {
        let usable = (capacity_bytes / u64::from(files)).checked_sub(FIRST_EXTENT)?;
        let total = usable * u64::from(files);
        let wanted = (total / SEGMENTS_WANTED).clamp(SEGMENT_BYTES_WANTED, SEGMENT_BYTES_MAX);
        let wanted = wanted.min(total / SEGMENTS_MIN).max(1);
        let extent = usable / total.div_ceil(wanted).max(1);
        let page = PAGE_BYTES as u64;
        // Round numbers, as long as that costs less than a sixty-fourth.
        let unit = [1 << 20, 1 << 16].into_iter().find(|unit| unit * 64 <= extent).unwrap_or(page);
        let extent_bytes = extent / unit * unit;
        (extent_bytes >= EXTENT_BYTES_MIN).then_some(Self { files, extent_bytes })
    }

    /// Whether a header may name these numbers: then nothing computed here overflows.
    pub fn is_sound(&self) -> bool {
        (1..=FILES_MAX).contains(&self.files)
            && (EXTENT_BYTES_MIN..=EXTENT_BYTES_MAX).contains(&self.extent_bytes)
            && self.extent_bytes.is_multiple_of(PAGE_BYTES as u64)
    }

    /// Segments that a capacity has room for.
    pub fn segments(&self, capacity_bytes: u64) -> u32 {
        let usable = (capacity_bytes / u64::from(self.files)).saturating_sub(FIRST_EXTENT);
        // More would not have an offset that a file can have.
        let most = (i64::MAX as u64 - FIRST_EXTENT) / self.extent_bytes;
        u32::try_from((usable / self.extent_bytes).min(most)).unwrap_or(u32::MAX)
    }

    /// Bytes of each file with so many segments.
    pub fn file_bytes(&self, segments: u32) -> u64 {
        self.offset(SegmentId(segments))
    }

    /// Whole extents in a file of this size.
    pub fn extents_in(&self, file_bytes: u64) -> u32 {
        u32::try_from(file_bytes.saturating_sub(FIRST_EXTENT) / self.extent_bytes).unwrap_or(u32::MAX)
    }

    /// Where a segment's extent begins.
    pub fn offset(&self, segment: SegmentId) -> u64 {
        FIRST_EXTENT + u64::from(segment.0) * self.extent_bytes
    }

    /// Slots of an extent: as many as fit behind their entries. 0 if the stride is not a multiple of a page.
    pub fn slots_in_extent(&self, stride: usize) -> u32 {
        if stride == 0 || !stride.is_multiple_of(PAGE_BYTES) {
            return 0;
        }
        let (pages, slot_pages) = (self.extent_bytes / PAGE_BYTES as u64, (stride / PAGE_BYTES) as u64);
        let per_page = u64::from(ENTRIES_PER_PAGE);
        let too_many = |slots: u64| {
            let needed =
                slots.checked_mul(slot_pages).and_then(|n| n.checked_add(1 + slots.div_ceil(per_page)));
            needed.is_none_or(|needed| needed > pages)
        };
        let mut slots =
            (pages - 1).saturating_mul(per_page) / slot_pages.saturating_mul(per_page).saturating_add(1);
        while slots > 0 && too_many(slots) {
            slots -= 1;
        }
        // All slots of a segment have a number.
        slots.min(u64::from(u32::MAX / self.files)) as u32
    }

    /// Slots of a segment.
    pub fn slots(&self, stride: usize) -> u32 {
        self.slots_in_extent(stride) * self.files
    }

    /// Which file a slot is in, and which slot of the extent there it is.
    pub fn split(&self, index: u32) -> (u32, u32) {
        (index % self.files, index / self.files)
    }

    /// Number in its segment of a slot of an extent.
    pub fn join(&self, file: u32, local: u32) -> u32 {
        local * self.files + file
    }

    /// Pages of a table, its header included, for so many slots of an extent.
    pub fn table_pages(slots_in_extent: u32) -> u32 {
        1 + slots_in_extent.div_ceil(ENTRIES_PER_PAGE)
    }

    /// Where in its file a slot of an extent begins.
    pub fn slot_offset(&self, segment: SegmentId, local: u32, stride: usize) -> u64 {
        let table = u64::from(Self::table_pages(self.slots_in_extent(stride))) * PAGE_BYTES as u64;
        self.offset(segment) + table + u64::from(local) * stride as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capacity_is_used_almost_whole_and_never_exceeded() {
        for files in [1, 2, 3, 8] {
            for capacity in [20_000_000_u64, 250_000_000, 1_000_000_000, 60_000_000_000, 1 << 40, 1 << 50] {
                let geometry = Geometry::plan(capacity, files).unwrap();
                let segments = geometry.segments(capacity);
                let used = geometry.file_bytes(segments) * u64::from(files);
                assert!(geometry.is_sound() && segments >= 4, "{capacity} {files}: {geometry:?} {segments}");
                let overhead = FIRST_EXTENT * u64::from(files);
                assert!(
                    used <= capacity && (used - overhead) as f64 > (capacity - overhead) as f64 * 0.98,
                    "{capacity} {files}: {used}"
                );
                assert!(geometry.extent_bytes * u64::from(files) <= SEGMENT_BYTES_MAX);
            }
        }
        assert_eq!(Geometry::plan(0, 1), None);
        assert_eq!(Geometry::plan(FIRST_EXTENT + 4 * EXTENT_BYTES_MIN - 1, 1), None);
        assert!(Geometry::plan(FIRST_EXTENT + 4 * EXTENT_BYTES_MIN, 1).is_some());
    }

    #[test]
    fn slots_fill_an_extent_and_overlap_nothing() {
        for extent_pages in [3_u64, 4, 35, 36, 1000, 262_144] {
            let geometry = Geometry { files: 3, extent_bytes: extent_pages * 4096 };
            for stride in [4096, 8192, 65_536, 1 << 20, 1 << 30, usize::MAX / 4096 * 4096] {
                let slots = geometry.slots_in_extent(stride);
                let bytes = |slots: u32| {
                    u128::from(Geometry::table_pages(slots)) * 4096 + u128::from(slots) * stride as u128
                };
                assert!(slots == 0 || bytes(slots) <= u128::from(geometry.extent_bytes));
                assert!(bytes(slots + 1) > u128::from(geometry.extent_bytes), "{extent_pages} {stride}");
                if slots > 0 {
                    let end = geometry.slot_offset(SegmentId(5), slots - 1, stride) + stride as u64;
                    assert!(end <= geometry.offset(SegmentId(6)));
                }
            }
            assert_eq!((geometry.slots_in_extent(0), geometry.slots_in_extent(5000)), (0, 0));
        }
    }

    #[test]
    fn slots_of_a_segment_take_turns_on_the_files() {
        let geometry = Geometry { files: 3, extent_bytes: 1 << 20 };
        assert_eq!(
            (0..4).map(|index| geometry.split(index)).collect::<Vec<_>>(),
            [(0, 0), (1, 0), (2, 0), (0, 1)]
        );
        assert!((0..100).all(|index| {
            let (file, local) = geometry.split(index);
            geometry.join(file, local) == index
        }));
    }

    #[test]
    fn numbers_of_any_header_overflow_nothing() {
        let geometry = Geometry { files: 64, extent_bytes: EXTENT_BYTES_MAX };
        assert!(geometry.is_sound());
        let segments = geometry.segments(u64::MAX);
        assert!(i64::try_from(geometry.file_bytes(segments)).is_ok());
        assert!(geometry.slots(4096) > 0);
        assert!(!Geometry { files: 1, extent_bytes: 0 }.is_sound());
        assert!(!Geometry { files: 1, extent_bytes: u64::MAX }.is_sound());
    }
}
