//! The engine's KV memory: where the bytes of a block are, and who moves them.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use kvbm_shm::SharedMemory;
use thiserror::Error;

mod memory;
mod steps;

pub use memory::MemoryMover;
pub(crate) use steps::Steps;

/// Bytes of a page that lie together: page `i` has `[i * stride, +bytes)` of a piece of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Address of page 0.
    pub base: usize,
    /// Bytes of each page.
    pub bytes: usize,
    /// Bytes from one page to the next, at least `bytes`.
    pub stride: usize,
    /// How many pages there are.
    pub pages: u32,
}

/// Layers whose pages are numbered together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerGroup {
    /// In the order in which they lie in a host slot.
    pub regions: Vec<Region>,
}

/// A pool that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("register KV memory: {0}")]
pub struct InvalidPool(pub(crate) String);

/// Where the bytes of an engine's blocks are. A block is one page of each group, one behind the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolShape {
    groups: Vec<LayerGroup>,
    layers: usize,
}

impl PoolShape {
    /// Checks the regions: each group has some, all of as many pages, none of which overlap.
    pub fn new(groups: Vec<LayerGroup>) -> Result<Self, InvalidPool> {
        let wrong = |what: String| Err(InvalidPool(what));
        if groups.is_empty() {
            return wrong("there is no layer group".into());
        }
        for (index, group) in groups.iter().enumerate() {
            let Some(first) = group.regions.first() else {
                return wrong(format!("layer group {index} has no memory"));
            };
            for region in &group.regions {
                let Region { base, bytes, stride, pages } = *region;
                if pages == 0 || pages != first.pages || i32::try_from(pages).is_err() {
                    return wrong(format!(
                        "layer group {index} has a region of {pages} pages and one of {}",
                        first.pages
                    ));
                }
                let end = stride.checked_mul(pages as usize).and_then(|bytes| base.checked_add(bytes));
                if base == 0 || bytes == 0 || bytes > stride || end.is_none() {
                    return wrong(format!(
                        "layer group {index} has pages of {bytes} bytes every {stride} at {base:#x}"
                    ));
                }
            }
        }
        Ok(Self { groups, layers: 1 })
    }

    /// Of blocks that have one layer behind the other, so many of one size. What cannot be is left as it is.
    #[must_use]
    pub fn of_layers(self, layers: usize) -> Self {
        let fits = self.groups.len() == 1 && layers > 0 && self.block_bytes().is_multiple_of(layers);
        Self { layers: if fits { layers } else { 1 }, ..self }
    }

    /// Layers that lie one behind the other in a block; 1: it is not known where they are.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// The layer groups.
    pub fn groups(&self) -> &[LayerGroup] {
        &self.groups
    }

    /// Bytes of a block, all groups.
    pub fn block_bytes(&self) -> usize {
        self.regions().map(|(_, region)| region.bytes).sum()
    }

    /// Pages of the group that has most.
    pub fn pages_max(&self) -> u32 {
        self.groups.iter().map(|group| group.regions[0].pages).max().unwrap_or(0)
    }

    /// Every region, with the number of its group.
    pub fn regions(&self) -> impl Iterator<Item = (usize, &Region)> {
        self.groups
            .iter()
            .enumerate()
            .flat_map(|(group, of)| of.regions.iter().map(move |region| (group, region)))
    }

    /// True if the groups have these pages, where -1 stands for none.
    pub fn has(&self, pages: &[i32]) -> bool {
        pages.len() == self.groups.len()
            && pages.iter().zip(&self.groups).all(|(page, group)| {
                u32::try_from(*page).map_or(*page == -1, |page| page < group.regions[0].pages)
            })
    }
}

/// Bytes of a block that lie together in one page of one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Number of the region.
    pub region: usize,
    /// Byte of the region.
    pub from: usize,
    /// Byte of the block.
    pub at: usize,
    /// How many.
    pub bytes: usize,
}

impl PoolShape {
    /// Where these bytes of a block are; those of groups that have no page for it are left out.
    pub fn pieces<'a>(&'a self, pages: &'a [i32], bytes: Range<usize>) -> impl Iterator<Item = Piece> + 'a {
        let mut begin = 0;
        self.regions().enumerate().filter_map(move |(number, (group, region))| {
            let (from, end) = (begin.max(bytes.start), (begin + region.bytes).min(bytes.end));
            let in_page = from.saturating_sub(begin);
            begin += region.bytes;
            let page = usize::try_from(pages[group]).ok().filter(|_| from < end)?;
            Some(Piece { region: number, from: page * region.stride + in_page, at: from, bytes: end - from })
        })
    }
}

/// A block in the engine's memory and in host memory.
#[derive(Debug, Clone, Copy)]
pub struct BlockCopy<'a> {
    /// One page per layer group, -1 where the group has none: its bytes are left out.
    pub pages: &'a [i32],
    /// The host segment.
    pub segment: &'a Arc<SharedMemory>,
    /// Byte of the segment at which this rank's part of the block begins.
    pub offset: usize,
}

/// Bytes given to a device first, and at once at most, unless a single block has more.
const ISSUED_FIRST_BYTES: usize = 16 << 20;
const ISSUED_BYTES_MAX: usize = 256 << 20;

/// Parts of `blocks` blocks that are given to a device one after the other: the first is small, so that it begins soon;
/// those behind it grow, because each costs something besides its bytes, and are prepared while it copies.
pub fn issued_at_once(blocks: usize, block_bytes: usize) -> impl Iterator<Item = Range<usize>> {
    let whole = |bytes: usize| (bytes / block_bytes.max(1)).max(1);
    let (mut from, mut next, most) = (0, whole(ISSUED_FIRST_BYTES), whole(ISSUED_BYTES_MAX));
    std::iter::from_fn(move || {
        let part = from..blocks.min(from + next);
        (from, next) = (part.end, most.min(next * 2));
        (!part.is_empty()).then_some(part)
    })
}

/// Moves blocks between the engine's memory and host memory. Both ways are used at once, from two threads.
pub trait Mover: Send + Sync + fmt::Debug {
    /// How many blocks are best moved at once. While they are, they cannot be called back.
    fn batch_blocks(&self) -> usize;

    /// A host segment will be copied from and to.
    fn prepare(&self, segment: &Arc<SharedMemory>) -> Result<(), String> {
        let _ = segment;
        Ok(())
    }

    /// It will not be any more.
    fn release(&self, segment: &SharedMemory) {
        let _ = segment;
    }

    /// Remembers how far the engine has come on its stream.
    fn fence(&self, stream: u64) -> Result<Arc<dyn Fence>, String>;

    /// Brings blocks into the engine's memory, and returns when they are there.
    fn load(&self, blocks: &[BlockCopy<'_>]) -> Result<(), String>;

    /// Begins to bring blocks into the engine's memory step by step: these bytes of each block. `begun` is called as soon
    /// as a step is on its way, with a fence that says when it is there; from the first on only the device can fail. If it
    /// does, nothing is under way when this returns.
    fn load_in_steps(
        &self,
        blocks: &[BlockCopy<'_>],
        steps: &[Range<usize>],
        begun: &mut dyn FnMut(Arc<dyn Fence>),
    ) -> Result<(), String> {
        self.load(blocks)?;
        steps.iter().for_each(|_| begun(Arc::new(Passed)));
        Ok(())
    }

    /// Copies blocks out of the engine's memory, and returns when they are out.
    fn save(&self, blocks: &[BlockCopy<'_>]) -> Result<(), String>;
}

/// How far a device had come at some moment.
pub trait Fence: Send + Sync + fmt::Debug {
    /// Waits until the device has done what it was given by then.
    fn wait(&self) -> Result<(), String>;

    /// What the engine launches on this stream from now on begins behind it. On the CPU, which begins at once: waits.
    fn hold(&self, stream: u64) -> Result<(), String> {
        let _ = stream;
        self.wait()
    }
}

/// On the CPU what was launched is done.
#[derive(Debug)]
struct Passed;

impl Fence for Passed {
    fn wait(&self) -> Result<(), String> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use kvbm_shm::LentMemory;

    use super::*;

    fn region(pages: u32, bytes: usize, stride: usize) -> Region {
        Region { base: 4096, bytes, stride, pages }
    }

    #[test]
    fn impossible_pools_are_refused() {
        let refused = |groups: Vec<Vec<Region>>| {
            let groups = groups.into_iter().map(|regions| LayerGroup { regions }).collect();
            PoolShape::new(groups).unwrap_err().to_string()
        };
        assert!(refused(vec![]).contains("no layer group"));
        assert!(refused(vec![vec![]]).contains("group 0 has no memory"));
        assert!(refused(vec![vec![region(4, 8, 8), region(5, 8, 8)]]).contains("5 pages and one of 4"));
        assert!(refused(vec![vec![region(4, 9, 8)]]).contains("9 bytes every 8"));
        assert!(refused(vec![vec![region(4, 8, usize::MAX)]]).contains("pages of"));
    }

    #[test]
    fn every_block_is_issued_once_in_parts_that_grow() {
        let parts = |blocks, bytes| issued_at_once(blocks, bytes).map(|part| part.len()).collect::<Vec<_>>();
        assert_eq!(parts(0, 4 << 20), [] as [usize; 0]);
        assert_eq!(parts(3, 4 << 20), [3]);
        assert_eq!(parts(1024, 4 << 20)[..7], [4, 8, 16, 32, 64, 64, 64]);
        assert_eq!(parts(3, usize::MAX), [1, 1, 1]);
        for (blocks, bytes) in [(1024, 4 << 20), (77, 1), (50, 9 << 20), (2049, 2 << 20)] {
            let all: Vec<usize> = issued_at_once(blocks, bytes).flatten().collect();
            assert_eq!(all, (0..blocks).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_block_is_a_page_of_each_group() {
        let group = |regions| LayerGroup { regions };
        let shape = PoolShape::new(vec![
            group(vec![region(4, 8, 16), region(4, 4, 4)]),
            group(vec![region(9, 2, 2)]),
        ])
        .unwrap();
        assert_eq!((shape.block_bytes(), shape.pages_max()), (14, 9));
        assert!(shape.has(&[3, 8]) && shape.has(&[-1, 0]));
        assert!(!shape.has(&[4, 0]) && !shape.has(&[0]) && !shape.has(&[-2, 0]));
    }

    #[test]
    fn any_bytes_of_a_block_are_found() {
        let group = |regions| LayerGroup { regions };
        let shape = PoolShape::new(vec![
            group(vec![region(4, 8, 16), region(4, 4, 4)]),
            group(vec![region(9, 2, 2)]),
        ])
        .unwrap();
        let pieces = |pages: &[i32], bytes| {
            shape.pieces(pages, bytes).map(|of| (of.region, of.from, of.at, of.bytes)).collect::<Vec<_>>()
        };
        assert_eq!(pieces(&[2, 5], 0..14), [(0, 32, 0, 8), (1, 8, 8, 4), (2, 10, 12, 2)]);
        assert_eq!(pieces(&[2, 5], 6..10), [(0, 38, 6, 2), (1, 8, 8, 2)]);
        assert_eq!(pieces(&[-1, 5], 6..13), [(2, 10, 12, 1)]);
        assert_eq!(pieces(&[1, 1], 14..14), []);
    }

    #[test]
    fn blocks_come_back_as_they_went_and_absent_pages_are_left_alone() {
        let memory = || SharedMemory::create("pool", 4096).unwrap();
        let other = |memory: &SharedMemory| {
            LentMemory::of_shared(SharedMemory::from_fd(memory.fd().try_clone_to_owned().unwrap()).unwrap())
        };
        let (a, b) = (memory(), memory());
        let bytes: Vec<u8> = (0..200).collect();
        a.write(0, &bytes);
        b.write(0, &bytes);
        let shape = PoolShape::new(vec![
            LayerGroup { regions: vec![region(8, 5, 10)] },
            LayerGroup { regions: vec![region(8, 7, 9)] },
        ])
        .unwrap();
        let mover = MemoryMover::new(shape, vec![other(&a), other(&b)]);
        let segment = Arc::new(memory());
        let at = |pages| BlockCopy { pages, segment: &segment, offset: 50 };
        mover.save(&[at(&[2, 3])]).unwrap();
        mover.load(&[at(&[5, -1])]).unwrap();
        let read = |memory: &SharedMemory, from: usize, len: usize| {
            let mut seen = vec![0; len];
            memory.read(from, &mut seen);
            seen
        };
        assert_eq!(read(&a, 50, 5), bytes[20..25]);
        assert_eq!((read(&a, 0, 50), read(&a, 55, 145)), (bytes[..50].to_vec(), bytes[55..].to_vec()));
        assert_eq!(read(&b, 0, 200), bytes, "no page of group 1 was to be loaded");
        assert_eq!(read(&segment, 50, 12), [&bytes[20..25], &bytes[27..34]].concat());
    }
}
