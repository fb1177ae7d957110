//! Rig of the disk store's tests.

mod crash;
mod files;
mod format;
mod races;
mod speed;

use std::cell::Cell;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvbm_shm::SharedMemory;

use super::recording::{FileIo, Random};
use super::*;
use crate::ledger::{Class, SegmentId, TrustDomain};
use crate::store::disk_io::DiskIo;

/// Bytes of each of four extents per file.
const EXTENT: u64 = 40 * 4096;
const SMALL: Class = Class { domain: TrustDomain(1000), stride: 4096 };
const LARGE: Class = Class { domain: TrustDomain(1001), stride: 12_288 };

/// Capacity for so many segments.
fn capacity(files: u64, segments: u64) -> u64 {
    files * ((1 << 20) + segments * EXTENT)
}

fn config(directories: Vec<PathBuf>, segments: u64) -> DiskConfig {
    let capacity_bytes = capacity(directories.len() as u64, segments);
    DiskConfig { directories, capacity_bytes, direct: false, zerofill: false, reset: false }
}

fn directories(root: &Path, count: usize) -> Vec<PathBuf> {
    (0..count).map(|number| root.join(format!("drive{number}"))).collect()
}

fn cache_file(directory: &Path) -> PathBuf {
    directory.join("kvbm-disk-cache")
}

type EngineResult = Result<Arc<dyn DiskIo>, Box<dyn std::error::Error + Send + Sync>>;

fn real_files(files: Vec<File>) -> EngineResult {
    Ok(Arc::new(FileIo(files)))
}

fn open(config: &DiskConfig) -> Result<DiskStore, DiskError> {
    DiskStore::open(config, &real_files)
}

/// Opened and prepared, over real files.
fn start(config: &DiskConfig) -> (DiskStore, Recovered) {
    let store = open(config).unwrap();
    let recovered = store.prepare(&|| false).unwrap();
    (store, recovered)
}

/// A block whose bytes are made of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    namespace: u8,
    key: u8,
    version: u64,
    bytes: usize,
}

impl Block {
    fn payload(&self) -> Vec<u8> {
        let mut random = Random::new(self.version);
        let words = (0..self.bytes.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
        words.take(self.bytes).collect()
    }

    fn write(&self, place: DiskPlace) -> DiskWrite {
        let (source, source_offset) = scratch(self.bytes);
        source.write(source_offset, &self.payload());
        DiskWrite {
            place,
            namespace: [self.namespace; 32],
            key: [self.key; 16],
            parent: (self.key > 0).then(|| [self.key - 1; 16]),
            priority: 50,
            expires_at_s: None,
            source,
            source_offset,
            bytes: self.bytes,
        }
    }

    /// Whether it is read as it was written.
    fn read(&self, store: &DiskStore, place: DiskPlace) -> Result<(), ReadFailure> {
        let found = read(store, place, self.namespace, self.key, self.bytes)?;
        assert!(found == self.payload(), "{self:?} at {place:?}: other bytes were delivered");
        Ok(())
    }
}

fn read(
    store: &DiskStore,
    place: DiskPlace,
    namespace: u8,
    key: u8,
    bytes: usize,
) -> Result<Vec<u8>, ReadFailure> {
    let (target, target_offset) = scratch(bytes);
    let (namespace, key) = ([namespace; 32], [key; 16]);
    let wanted = DiskRead { place, namespace, key, target: Arc::clone(&target), target_offset, bytes };
    store.read(&[wanted]).remove(0)?;
    let mut found = vec![0; bytes];
    target.read(target_offset, &mut found);
    Ok(found)
}

/// Memory for a block that is soon used again for another: more than any batch needs.
fn scratch(bytes: usize) -> (Arc<SharedMemory>, usize) {
    const BYTES: usize = 4 << 20;
    thread_local! {
        static SCRATCH: (Arc<SharedMemory>, Cell<usize>) =
            (Arc::new(SharedMemory::create("scratch", BYTES).unwrap()), Cell::new(0));
    }
    SCRATCH.with(|(memory, next)| {
        let bytes = bytes.next_multiple_of(4096);
        let offset = if next.get() + bytes > BYTES { 0 } else { next.get() };
        next.set(offset + bytes);
        (Arc::clone(memory), offset)
    })
}

fn place(segment: u32, index: u32) -> DiskPlace {
    DiskPlace { segment: SegmentId(segment), index }
}

/// Every slot of the segment, with a block of its own.
fn fill(store: &DiskStore, segment: u32, class: Class) -> Vec<(DiskPlace, Block)> {
    store.bind(SegmentId(segment), class);
    let slots = store.slots_in().count(class.stride);
    let blocks: Vec<(DiskPlace, Block)> = (0..slots)
        .map(|index| {
            let version = u64::from(segment) << 32 | u64::from(index);
            let bytes = class.stride - index as usize % 9 * 100;
            (place(segment, index), Block { namespace: segment as u8, key: index as u8, version, bytes })
        })
        .collect();
    let writes: Vec<DiskWrite> = blocks.iter().map(|(place, block)| block.write(*place)).collect();
    assert!(store.write(&writes).iter().all(Result::is_ok));
    blocks
}

fn assert_all_there(store: &DiskStore, blocks: &[(DiskPlace, Block)]) {
    for (place, block) in blocks {
        assert_eq!(block.read(store, *place), Ok(()), "{block:?} at {place:?}");
    }
}
