//! Moves by the processor: engines whose KV memory is ordinary memory.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

use kvbm_shm::{LentMemory, SharedMemory};
use parking_lot::{Condvar, Mutex};

use super::{BlockCopy, Fence, Mover, Passed, PoolShape};

/// Copies by the processor.
#[derive(Debug, Clone)]
pub struct MemoryMover {
    memory: Arc<Memory>,
}

#[derive(Debug)]
struct Memory {
    shape: PoolShape,
    /// One for each region.
    regions: Vec<LentMemory>,
}

impl MemoryMover {
    /// Over the memory of `shape`, one for each of its regions.
    pub fn new(shape: PoolShape, regions: Vec<LentMemory>) -> Self {
        Self { memory: Arc::new(Memory { shape, regions }) }
    }

    fn whole(&self) -> Range<usize> {
        0..self.memory.shape.block_bytes()
    }
}

impl Memory {
    fn load(&self, pages: &[i32], segment: &SharedMemory, offset: usize, bytes: Range<usize>) {
        for piece in self.shape.pieces(pages, bytes) {
            self.regions[piece.region].copy_from(piece.from, segment, offset + piece.at, piece.bytes);
        }
    }

    fn save(&self, pages: &[i32], segment: &SharedMemory, offset: usize, bytes: Range<usize>) {
        for piece in self.shape.pieces(pages, bytes) {
            self.regions[piece.region].copy_to(piece.from, segment, offset + piece.at, piece.bytes);
        }
    }
}

impl Mover for MemoryMover {
    fn batch_blocks(&self) -> usize {
        1
    }

    fn fence(&self, _stream: u64) -> Result<Arc<dyn Fence>, String> {
        Ok(Arc::new(Passed))
    }

    fn load(&self, blocks: &[BlockCopy<'_>]) -> Result<(), String> {
        for block in blocks {
            self.memory.load(block.pages, block.segment, block.offset, self.whole());
        }
        Ok(())
    }

    /// On a thread of its own, so that the engine computes meanwhile.
    fn load_in_steps(
        &self,
        blocks: &[BlockCopy<'_>],
        steps: &[Range<usize>],
        begun: &mut dyn FnMut(Arc<dyn Fence>),
    ) -> Result<(), String> {
        let done = Arc::new(StepsDone::default());
        let owned = |block: &BlockCopy<'_>| (block.pages.to_vec(), block.segment.clone(), block.offset);
        let blocks: Vec<(Vec<i32>, Arc<SharedMemory>, usize)> = blocks.iter().map(owned).collect();
        let (memory, ranges, counted) = (self.memory.clone(), steps.to_vec(), done.clone());
        let copy = move || {
            for range in ranges {
                for (pages, segment, offset) in &blocks {
                    memory.load(pages, segment, *offset, range.clone());
                }
                *counted.count.lock() += 1;
                counted.more.notify_all();
            }
        };
        let thread = thread::Builder::new().name("kvbm-steps".into()).spawn(copy);
        thread.map_err(|error| format!("start a thread: {error}"))?;
        (1..=steps.len()).for_each(|step| begun(Arc::new(Step { step, done: done.clone() })));
        Ok(())
    }

    fn save(&self, blocks: &[BlockCopy<'_>]) -> Result<(), String> {
        for block in blocks {
            self.memory.save(block.pages, block.segment, block.offset, self.whole());
        }
        Ok(())
    }
}

/// How many steps of a load are done.
#[derive(Default)]
struct StepsDone {
    count: Mutex<usize>,
    more: Condvar,
}

struct Step {
    step: usize,
    done: Arc<StepsDone>,
}

impl Fence for Step {
    fn wait(&self) -> Result<(), String> {
        let mut count = self.done.count.lock();
        while *count < self.step {
            self.done.more.wait(&mut count);
        }
        Ok(())
    }
}

impl fmt::Debug for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}", self.step)
    }
}
