//! Reading the tables of all segments: large reads, the next ones under way while the last are decoded.

use std::sync::Arc;
use std::time::Duration;

use kvbm_shm::SharedMemory;
use tracing::warn;

use super::allocate::stop_if;
use super::block::DiskPlace;
use super::error::DiskError;
use super::exchange::Started;
use super::geometry::Geometry;
use super::pages::Pages;
use super::tables::BoundTable;
use crate::ledger::{Class, SegmentId, TrustDomain};
use crate::store::disk_io::{Buffer, Io, IoFailure};
use crate::store::table::{Binding, Decoded, ENTRIES_PER_PAGE, ENTRY_BYTES, Entry, PAGE_BYTES};

/// Read by one I/O.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces handed over at a time; as many again are under way meanwhile.
const PIECES: usize = 8;
/// Headers of segments read at a time.
const HEADERS: usize = PIECE_BYTES / PAGE_BYTES;

/// What was found on disk. The same block may be in several slots.
#[derive(Debug)]
pub struct Recovered {
    /// Bound segments, in order.
    pub segments: Vec<RecoveredSegment>,
    /// Summary.
    pub report: RecoveryReport,
}

/// A bound segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecoveredSegment {
    /// Which.
    pub segment: SegmentId,
    /// What it is bound to.
    pub class: Class,
    /// Its blocks and the slots they are in, in no particular order. Their bytes are only checked when read.
    pub entries: Vec<(u32, Entry)>,
}

/// Summary, for a log line and status.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Blocks found.
    pub entries: usize,
    /// Entries that were not as they were written, or, after an unclean end, not written since their segment was bound.
    pub damaged: usize,
    /// Segments that are bound.
    pub segments: usize,
    /// Segments that were bound as far as can be seen, but not to what.
    pub segments_lost: usize,
    /// Reads that failed: what was there is not known.
    pub reads_failed: usize,
    /// Bytes of tables read.
    pub bytes_read: u64,
    /// Time for all of it, space included.
    pub took: Duration,
    /// The set was not closed by the daemon that used it last.
    pub unclean: bool,
}

/// Pages of a table that are read at once.
#[derive(Debug, Clone, Copy)]
struct Piece {
    segment: SegmentId,
    file: u32,
    first_page: u32,
    pages: u32,
}

impl Piece {
    fn bytes(&self) -> usize {
        self.pages as usize * PAGE_BYTES
    }
}

/// Reads tables into memory.
pub struct Recovery<'a> {
    pages: &'a Pages,
    geometry: Geometry,
    /// Two halves, in turn with the drive.
    memory: Arc<SharedMemory>,
    segments: Vec<Option<(BoundTable, RecoveredSegment)>>,
    damaged: Vec<DiskPlace>,
    report: RecoveryReport,
    stopping: &'a dyn Fn() -> bool,
}

impl<'a> Recovery<'a> {
    /// For the segments [0, segments).
    pub fn new(
        pages: &'a Pages,
        geometry: Geometry,
        segments: u32,
        stopping: &'a dyn Fn() -> bool,
    ) -> Result<Self, DiskError> {
        Ok(Self {
            pages,
            geometry,
            memory: Arc::new(SharedMemory::create("kvbm-disk-recovery", 2 * PIECES * PIECE_BYTES)?),
            segments: (0..segments).map(|_| None).collect(),
            damaged: Vec::new(),
            report: RecoveryReport::default(),
            stopping,
        })
    }

    /// Reads everything and has the tables taken over.
    pub fn run(mut self) -> Result<Recovered, DiskError> {
        self.read_headers()?;
        self.read_entries()?;
        let mut tables = self.pages.tables();
        let mut segments = Vec::new();
        for (table, found) in self.segments.into_iter().flatten() {
            tables.adopt(found.segment, table);
            segments.push(found);
        }
        // So that they are not found again; on disk that is in the next flush.
        for place in &self.damaged {
            tables.clear(*place);
        }
        self.report.damaged = self.damaged.len();
        self.report.segments = segments.len();
        self.report.entries = segments.iter().map(|segment| segment.entries.len()).sum();
        Ok(Recovered { segments, report: self.report })
    }

    fn read_headers(&mut self) -> Result<(), DiskError> {
        let files = self.geometry.files;
        let all: Vec<Piece> = (0..self.segments.len() as u32)
            .flat_map(|segment| (0..files).map(move |file| (SegmentId(segment), file)))
            .map(|(segment, file)| Piece { segment, file, first_page: 0, pages: 1 })
            .collect();
        let mut bindings: Vec<HeaderFound> = Vec::with_capacity(all.len());
        self.read_all(&all, HEADERS, |_, _, page| {
            bindings.push(match page {
                Ok((memory, offset)) => {
                    let mut page = [0; PAGE_BYTES];
                    memory.read(offset, &mut page);
                    HeaderFound::of(&page)
                }
                Err(_) => HeaderFound::Damaged,
            });
        })?;
        for (segment, headers) in bindings.chunks(files as usize).enumerate() {
            let segment = SegmentId(segment as u32);
            match headers[0] {
                HeaderFound::Bound(binding)
                    if headers.iter().all(|header| *header == headers[0]) && self.is_sound(&binding) =>
                {
                    let class = Class { domain: TrustDomain(binding.domain), stride: binding.stride };
                    let found = RecoveredSegment { segment, class, entries: Vec::new() };
                    self.segments[segment.0 as usize] = Some((BoundTable::new(binding, files), found));
                }
                HeaderFound::Bound(_) | HeaderFound::Damaged => self.report.segments_lost += 1,
                HeaderFound::Nothing => {
                    let lost = headers.iter().any(|header| *header != HeaderFound::Nothing);
                    self.report.segments_lost += usize::from(lost);
                }
            }
        }
        Ok(())
    }

    /// Whether a binding fits the extents.
    fn is_sound(&self, binding: &Binding) -> bool {
        binding.slots > 0 && binding.slots == self.geometry.slots_in_extent(binding.stride)
    }

    fn read_entries(&mut self) -> Result<(), DiskError> {
        let piece_pages = (PIECE_BYTES / PAGE_BYTES) as u32;
        let mut all = Vec::new();
        for (table, found) in self.segments.iter().flatten() {
            let behind = Geometry::table_pages(table.binding.slots);
            for file in 0..self.geometry.files {
                for first_page in (1..behind).step_by(piece_pages as usize) {
                    let pages = piece_pages.min(behind - first_page);
                    all.push(Piece { segment: found.segment, file, first_page, pages });
                }
            }
        }
        self.read_all(&all, PIECES, |recovery, piece, bytes| {
            if let Ok((memory, offset)) = bytes {
                recovery.take_over(&piece, &memory, offset);
            }
        })
    }

    /// Copies pages into their table and decodes them.
    fn take_over(&mut self, piece: &Piece, memory: &SharedMemory, offset: usize) {
        let Some((table, found)) = &mut self.segments[piece.segment.0 as usize] else { return };
        let binding = table.binding;
        let bytes = table.pages_mut(piece.file, piece.first_page, piece.bytes());
        memory.read(offset, bytes);
        let first = (piece.first_page - 1) * ENTRIES_PER_PAGE;
        for (entry, local) in bytes.chunks_exact(ENTRY_BYTES).zip(first..binding.slots) {
            let index = self.geometry.join(piece.file, local);
            let entry = entry.try_into().expect("chunks are of this size");
            match Decoded::of(entry, binding.seal, index) {
                Decoded::Free => {}
                Decoded::Damaged => self.damaged.push(DiskPlace { segment: piece.segment, index }),
                Decoded::Stored(entry) => found.entries.push((index, entry)),
            }
        }
    }

    /// Reads pieces, `at_once` at a time and as many again under way, and shows them in order.
    fn read_all(
        &mut self,
        all: &[Piece],
        at_once: usize,
        mut each: impl FnMut(&mut Self, Piece, Result<(Arc<SharedMemory>, usize), IoFailure>),
    ) -> Result<(), DiskError> {
        let half = PIECES * PIECE_BYTES;
        let stride = half / at_once;
        let (pages, geometry, memory) = (self.pages, self.geometry, Arc::clone(&self.memory));
        let mut groups = all.chunks(at_once).enumerate();
        let mut start = || {
            let (number, group) = groups.next()?;
            let base = number % 2 * half;
            let ios = group.iter().enumerate().map(|(at, piece)| {
                let memory = Arc::clone(&memory);
                let buffer = Buffer { memory, offset: base + at * stride, len: piece.bytes() };
                let offset = geometry.offset(piece.segment) + u64::from(piece.first_page) * PAGE_BYTES as u64;
                Io::Read { file: piece.file as usize, offset, buffer }
            });
            Some((group, base, Started::new(pages.engine(), ios.collect())))
        };
        let mut current = start();
        while let Some((group, base, started)) = current {
            stop_if(self.stopping)?;
            let next = start();
            let results = started.wait(pages.engine());
            for (at, (piece, result)) in group.iter().zip(results).enumerate() {
                match result {
                    Ok(()) => self.report.bytes_read += piece.bytes() as u64,
                    Err(failure) => self.tell(piece, failure),
                }
                each(self, *piece, result.map(|()| (Arc::clone(&memory), base + at * stride)));
            }
            current = next;
        }
        Ok(())
    }

    /// One line, for the first of them.
    fn tell(&mut self, piece: &Piece, failure: IoFailure) {
        if self.report.reads_failed == 0 {
            let (segment, file) = (piece.segment.0, piece.file);
            warn!("disk cache: table of segment {segment} in file {file} cannot be read: {failure}");
        }
        self.report.reads_failed += 1;
    }
}

/// A segment's header page in one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HeaderFound {
    Nothing,
    Damaged,
    Bound(Binding),
}

impl HeaderFound {
    fn of(page: &[u8; PAGE_BYTES]) -> Self {
        match Binding::decode(page) {
            Some(binding) => Self::Bound(binding),
            None if page.iter().all(|byte| *byte == 0) => Self::Nothing,
            None => Self::Damaged,
        }
    }
}
