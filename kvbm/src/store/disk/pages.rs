//! Writes pages of tables so that the newest state of each is what ends on disk, and syncs files.
//!
//! A page is with the drive once at a time: it is copied when it is handed over, under the lock, and whoever wants a
//! later state of it waits until that copy has landed. So an older copy never overwrites a newer one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvbm_shm::SharedMemory;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::arena::{Arena, SLAB_PAGES, Slab};
use super::exchange::{IoResult, carry_out, first_failure};
use super::geometry::Geometry;
use super::tables::{Change, PageId, Tables};
use crate::ledger::SegmentId;
use crate::store::disk_io::{Buffer, DiskIo, Io, IoFailure};
use crate::store::table::PAGE_BYTES;

/// The tables and the way to disk.
#[derive(Debug)]
pub struct Pages {
    engine: Arc<dyn DiskIo>,
    geometry: Geometry,
    tables: Mutex<Tables>,
    /// Some page landed.
    landed: Condvar,
    arena: Arena,
    /// Files written since their last sync.
    unsynced: Mutex<BTreeSet<usize>>,
}

impl Pages {
    /// Over nothing bound.
    pub fn new(engine: Arc<dyn DiskIo>, geometry: Geometry) -> Result<Self, kvbm_shm::Error> {
        let arena = Arena::new()?;
        engine.register(arena.memory());
        Ok(Self {
            engine,
            geometry,
            tables: Mutex::new(Tables::new(geometry)),
            landed: Condvar::new(),
            arena,
            unsynced: Mutex::new(BTreeSet::new()),
        })
    }

    /// The engine.
    pub fn engine(&self) -> &dyn DiskIo {
        &*self.engine
    }

    /// The tables. Held for no longer than it takes to look or to change.
    pub fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock()
    }

    /// The tables, once no page of earlier bindings of these segments is on its way.
    pub fn tables_without_ghosts(&self, segments: &BTreeSet<SegmentId>) -> MutexGuard<'_, Tables> {
        let mut tables = self.tables.lock();
        while segments.iter().any(|segment| tables.is_haunted(*segment)) {
            self.landed.wait(&mut tables);
        }
        tables
    }

    /// Has these pages written as they are now, or later; answers for which that failed. They stay dirty.
    pub fn write(&self, ids: impl IntoIterator<Item = PageId>) -> BTreeMap<PageId, IoFailure> {
        let mut failures = BTreeMap::new();
        let mut waiting: BTreeMap<PageId, Change> = {
            let tables = self.tables.lock();
            ids.into_iter().filter_map(|id| Some((id, tables.wanted(id)?))).collect()
        };
        while !waiting.is_empty() {
            let slab = self.arena.take();
            let launched = self.launch(&mut waiting, &slab);
            let ios =
                runs(&launched).map(|(first, len)| self.page_io(&launched, first, len, &slab)).collect();
            let ended = carry_out(self.engine(), ios);
            self.unsynced(launched.iter().map(|id| id.file as usize));
            let mut tables = self.tables.lock();
            for ((first, len), result) in runs(&launched).zip(ended) {
                for id in &launched[first..first + len] {
                    tables.landed(*id, result.is_ok());
                    waiting.remove(id);
                    if let Err(failure) = result {
                        failures.insert(*id, failure);
                    }
                }
            }
            self.landed.notify_all();
        }
        failures
    }

    /// Copies a slab full of the waiting pages, in order, as soon as there is one that nobody else is writing. None when
    /// others have written all of them.
    fn launch(&self, waiting: &mut BTreeMap<PageId, Change>, slab: &Slab<'_>) -> Vec<PageId> {
        let mut tables = self.tables.lock();
        loop {
            waiting.retain(|id, wanted| !tables.is_written(*id, *wanted));
            let idle = |id: &&PageId| !tables.is_in_flight(**id);
            let launched: Vec<PageId> = waiting.keys().filter(idle).take(SLAB_PAGES).copied().collect();
            if waiting.is_empty() || !launched.is_empty() {
                for (at, id) in launched.iter().enumerate() {
                    let bytes = tables.launch(*id).expect("a page that is not written is there");
                    self.arena.memory().write(slab.offset(at), bytes);
                }
                return launched;
            }
            self.landed.wait(&mut tables);
        }
    }

    fn page_io(&self, launched: &[PageId], first: usize, len: usize, slab: &Slab<'_>) -> Io {
        let id = launched[first];
        let buffer = Buffer {
            memory: Arc::clone(self.arena.memory()),
            offset: slab.offset(first),
            len: len * PAGE_BYTES,
        };
        let offset = self.geometry.offset(id.segment) + u64::from(id.page) * PAGE_BYTES as u64;
        Io::Write { file: id.file as usize, offset, buffer }
    }

    /// Writes the first page of each file.
    pub fn write_headers(&self, headers: &[[u8; PAGE_BYTES]]) -> Result<(), (usize, IoFailure)> {
        let slab = self.arena.take();
        let memory: &Arc<SharedMemory> = self.arena.memory();
        let write = |(file, page): (usize, &[u8; PAGE_BYTES])| {
            memory.write(slab.offset(file), page);
            let buffer = Buffer { memory: Arc::clone(memory), offset: slab.offset(file), len: PAGE_BYTES };
            Io::Write { file, offset: 0, buffer }
        };
        let ended = carry_out(self.engine(), headers.iter().enumerate().map(write).collect());
        self.unsynced(0..headers.len());
        first_failure(&ended)
    }

    /// These files have been written to.
    pub fn unsynced(&self, files: impl IntoIterator<Item = usize>) {
        self.unsynced.lock().extend(files);
    }

    /// Makes everything durable whose write has ended.
    pub fn sync(&self) -> Result<(), (usize, IoFailure)> {
        // Taken out first: what is written from here on is for the next time.
        let files: Vec<usize> = std::mem::take(&mut *self.unsynced.lock()).into_iter().collect();
        let ended: Vec<IoResult> =
            carry_out(self.engine(), files.iter().map(|file| Io::Sync { file: *file }).collect());
        let failed = || files.iter().zip(&ended).filter(|(_, result)| result.is_err());
        self.unsynced(failed().map(|(file, _)| *file));
        first_failure(&ended).map_err(|(at, failure)| (files[at], failure))
    }

    /// Has all pages written, then syncs. Goes on after a failure, and answers with the first.
    pub fn flush(&self) -> Result<(), IoFailure> {
        let dirty: Vec<PageId> = self.tables.lock().dirty().collect();
        let failures = self.write(dirty);
        let synced = self.sync();
        match failures.into_values().next() {
            Some(failure) => Err(failure),
            None => synced.map_err(|(_, failure)| failure),
        }
    }
}

/// Pages that follow each other on disk, as (position of the first, how many): each run is one I/O.
fn runs(pages: &[PageId]) -> impl Iterator<Item = (usize, usize)> + '_ {
    let mut first = 0;
    pages.chunk_by(|a, b| (b.segment, b.file) == (a.segment, a.file) && b.page == a.page + 1).map(
        move |run| {
            first += run.len();
            (first - run.len(), run.len())
        },
    )
}
