//! The store's life: opened at once, prepared in the background, closed.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{SystemTime, UNIX_EPOCH};

use kvbm_shm::SharedMemory;
use parking_lot::Mutex;
use rustix::rand::{GetRandomFlags, getrandom};
use tracing::info;

use super::Pages;
use super::config::DiskConfig;
use super::error::DiskError;
use super::files::{CacheFile, FoundSet, bypass_page_cache, judge, open_files};
use super::geometry::Geometry;
use super::header::SetState;
use super::tables::BoundTable;
use crate::ledger::{Class, SegmentId, SlotsIn};
use crate::store::disk_io::{DiskIo, IoFailure, IoLoad};
use crate::store::table::Binding;

/// Makes the engine for these files.
pub type StartEngine<'a> =
    &'a dyn Fn(Vec<File>) -> Result<Arc<dyn DiskIo>, Box<dyn std::error::Error + Send + Sync>>;

/// Where in its life a store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Files are locked and understood, and as they were.
    Opened,
    /// [`DiskStore::prepare`] has begun, and may have failed.
    Preparing,
    /// Blocks can be written and read.
    Ready,
    /// No more I/O.
    Closed,
}

/// All disk segments of a daemon.
#[derive(Debug)]
pub struct DiskStore {
    pages: Pages,
    geometry: Geometry,
    pub(super) files: Vec<CacheFile>,
    /// Segments from now on.
    segments: u32,
    pub(super) found: Option<FoundSet>,
    /// Random name of the set.
    pub(super) set: [u8; 16],
    pub(super) created_at_s: u64,
    pub(super) zerofill: bool,
    /// Of the next block written. Begins at random, so that no two are alike, whichever daemon wrote them.
    generation: AtomicU64,
    pub(super) phase: Mutex<Phase>,
}

impl DiskStore {
    /// Finds or makes the files, locks them and judges their headers; quick. Changes nothing in files that have content,
    /// unless they are to be reset.
    pub fn open(config: &DiskConfig, start_engine: StartEngine<'_>) -> Result<Self, DiskError> {
        let files = open_files(config)?;
        let found = judge(&files)?;
        let count = files.len() as u32;
        let geometry = match &found {
            Some(found) => Some(found.geometry),
            None => Geometry::plan(config.capacity_bytes, count),
        };
        let segments = geometry.map_or(0, |geometry| geometry.segments(config.capacity_bytes));
        let geometry = geometry.filter(|_| segments > 0).ok_or_else(|| too_small(config, found.is_some()))?;
        bypass_page_cache(&files, config.direct)?;
        let clones = files
            .iter()
            .map(|file| file.file.try_clone().map_err(DiskError::io("duplicate descriptor of", &file.path)))
            .collect::<Result<Vec<_>, _>>()?;
        let engine = start_engine(clones).map_err(DiskError::Engine)?;
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ok(Self {
            pages: Pages::new(engine, geometry)?,
            geometry,
            segments,
            set: found.map_or_else(random, |found| found.set),
            created_at_s: found.map_or(now_s, |found| found.created_at_s),
            files,
            found,
            zerofill: config.zerofill,
            generation: AtomicU64::new(u64::from_ne_bytes(random())),
            phase: Mutex::new(Phase::Opened),
        })
    }

    /// Number of segments.
    pub fn segment_count(&self) -> u32 {
        self.segments
    }

    /// How segments are cut: slots of a segment that is bound to a class with this stride.
    pub fn slots_in(&self) -> SlotsIn {
        let geometry = *self.geometry();
        SlotsIn::new(move |stride| geometry.slots(stride))
    }

    /// Gives a segment to a class: every block in it is forgotten. Nothing may be written or read there meanwhile. In
    /// memory only; on disk before the first block is.
    pub fn bind(&self, segment: SegmentId, class: Class) {
        assert!(segment.0 < self.segments, "there is no segment {}", segment.0);
        let binding = Binding {
            domain: class.domain.0,
            stride: class.stride,
            slots: self.geometry.slots_in_extent(class.stride),
            seal: u64::from_ne_bytes(random()),
        };
        let table = BoundTable::new(binding, self.geometry.files);
        let before = self.pages.tables().bind(segment, table);
        // Not freed under the lock.
        drop(before);
    }

    /// Has everything written so far survive a power cut. To be called every second or few.
    pub fn flush(&self) -> Result<(), IoFailure> {
        self.pages.flush()
    }

    /// Blocks will be written from and read into this memory.
    pub fn register(&self, memory: &Arc<SharedMemory>) {
        self.pages.engine().register(memory);
    }

    /// What the engine is doing.
    pub fn load(&self) -> IoLoad {
        self.pages.engine().load()
    }

    /// Gives up what the kernel has not heard of, so that closing does not take long.
    pub fn abandon_waiting(&self) {
        self.pages.engine().abandon_waiting();
    }

    /// Flushes, marks the set as closed, and stops the engine. Nothing may be written or read meanwhile.
    pub fn close(&self) -> Result<(), DiskError> {
        let phase = std::mem::replace(&mut *self.phase.lock(), Phase::Closed);
        let closed = match phase {
            Phase::Ready => self.mark_closed(),
            // Nothing of what there is has changed.
            Phase::Opened | Phase::Preparing | Phase::Closed => Ok(()),
        };
        self.pages.engine().close();
        closed
    }

    fn mark_closed(&self) -> Result<(), DiskError> {
        self.flush().map_err(DiskError::drive("flush", &self.files[0].path))?;
        self.write_headers(SetState::Closed, self.segments)?;
        info!("disk cache closed");
        Ok(())
    }

    pub(super) fn pages(&self) -> &Pages {
        &self.pages
    }

    pub(super) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(super) fn generation(&self) -> &AtomicU64 {
        &self.generation
    }
}

fn too_small(config: &DiskConfig, found: bool) -> DiskError {
    let capacity = config.capacity_bytes;
    DiskError::Config(if found {
        format!(
            "{capacity} bytes are less than one segment of the disk cache that is there: give it more, or reset it"
        )
    } else {
        let files = config.directories.len();
        format!("{capacity} bytes are too few for a disk cache of {files} files")
    })
}

/// The kernel's random bytes, which it has from early boot on.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let filled = getrandom(&mut bytes, GetRandomFlags::empty()).expect("the kernel has random bytes");
    assert_eq!(filled, N, "so few are always given at once");
    bytes
}
