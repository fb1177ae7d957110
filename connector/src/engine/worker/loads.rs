//! One load: blocks from host memory into the engine's.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kvbm_shm::SharedMemory;
use parking_lot::{Condvar, Mutex};

use super::Shared;
use crate::engine::host::HostMemory;
use crate::engine::metadata::{Lease, Load, Pages};
use crate::engine::pool::{BlockCopy, Fence, Steps};

/// How much of a load may still be on its way when the engine goes on with its request: 75 ms at the rate of a PCIe 5.0
/// link with 16 lanes.
const LEFT_BYTES_MAX: usize = 4 << 30;

/// How far a load in layers has come.
#[derive(Default)]
struct Begun {
    /// Of each step that is on its way: when it is there.
    steps: Vec<Arc<dyn Fence>>,
    /// There will be no more of them. None at all: it came whole, or failed, and is over.
    all: bool,
}

pub(super) struct LoadJob {
    pub load_id: u64,
    pub request_id: u64,
    pub parked: bool,
    lease: Lease,
    last: bool,
    /// Segment and index of each block.
    slots: Vec<(u32, u32)>,
    pages: BlockPages,
    fence: Mutex<Option<Arc<dyn Fence>>>,
    /// The engine may go on as soon as nothing can fail any more, and waits for each layer when it gets there.
    pub in_layers: bool,
    told: AtomicBool,
    begun: Mutex<Begun>,
    begins: Condvar,
    /// No batch is begun any more.
    called_back: AtomicBool,
    /// Held while a batch is copied: who has it knows that nothing is being written. Set when all is over.
    over: Mutex<Option<Loaded>>,
    ended: Condvar,
}

impl LoadJob {
    pub fn new(load: Load, shared: &Shared) -> Result<Self, String> {
        let pages = BlockPages::new(&load.pages);
        if let Some(pages) = pages.iter().find(|pages| !shared.shape.has(pages)) {
            return Err(format!(
                "request {} is to be loaded into pages {pages:?}, which were never registered",
                load.request_id
            ));
        }
        Ok(Self {
            load_id: load.load_id,
            request_id: load.request_id,
            parked: load.parked,
            lease: load.lease,
            last: load.last,
            slots: load.segments.into_iter().zip(load.indices).collect(),
            pages,
            fence: Mutex::default(),
            in_layers: load.in_layers && shared.steps.is_some(),
            told: AtomicBool::new(false),
            begun: Mutex::default(),
            begins: Condvar::new(),
            called_back: AtomicBool::new(false),
            over: Mutex::default(),
            ended: Condvar::new(),
        })
    }

    pub fn set_fence(&self, fence: Arc<dyn Fence>) {
        *self.fence.lock() = Some(fence);
    }

    /// False also while a batch is copied: the engine's thread does not wait for one to know.
    pub fn is_over(&self) -> bool {
        self.over.try_lock().is_some_and(|over| over.is_some())
    }

    /// When it returns nothing is written any more.
    pub fn call_back(&self) {
        // Before the lock is asked for, so that a batch is waited for and not all that follow.
        self.called_back.store(true, Ordering::SeqCst);
        drop(self.over.lock());
    }

    /// Waits for the end.
    pub fn wait(&self) -> Loaded {
        let mut over = self.over.lock();
        loop {
            match *over {
                Some(loaded) => return loaded,
                None => self.ended.wait(&mut over),
            }
        }
    }

    /// Waits until it has begun. True: it arrives in steps; false: it is over.
    pub fn arrives_in_steps(&self) -> bool {
        let mut begun = self.begun.lock();
        self.begins.wait_while(&mut begun, |begun| begun.steps.is_empty() && !begun.all);
        !begun.steps.is_empty()
    }

    /// What is launched on this stream from now on begins behind this step; `None`: behind the last.
    pub fn hold(&self, stream: u64, step: Option<usize>) -> Result<(), String> {
        let mut begun = self.begun.lock();
        let is_missing = |begun: &mut Begun| !begun.all && step.is_none_or(|step| step >= begun.steps.len());
        self.begins.wait_while(&mut begun, is_missing);
        let fence = step.map_or(begun.steps.last(), |step| begun.steps.get(step)).cloned();
        drop(begun);
        match fence {
            Some(fence) => fence.hold(stream),
            None if self.wait() == Loaded::Yes => Ok(()),
            None => Err(format!("the device did not bring what request {} was promised", self.request_id)),
        }
    }

    fn begin(&self, step: Arc<dyn Fence>) {
        self.begun.lock().steps.push(step);
        self.begins.notify_all();
    }

    fn begin_no_more(&self, loaded: Loaded) {
        let mut begun = self.begun.lock();
        begun.all = true;
        if loaded == Loaded::No {
            begun.steps.clear();
        }
        self.begins.notify_all();
    }

    /// Of the first layer group.
    pub fn first_pages(&self) -> impl Iterator<Item = i32> {
        self.pages.first_group()
    }

    pub fn run(&self, shared: &Shared) {
        let begun = Instant::now();
        let copied = self.copy(shared);
        let loaded = if copied.is_err() { Loaded::No } else { Loaded::Yes };
        match copied {
            Ok(Copied::All) => {
                let (blocks, took) = (self.slots.len(), begun.elapsed());
                tracing::debug!(request = self.request_id, blocks, ?took, "loaded");
            }
            Ok(Copied::CalledBack) => {
                shared.counts.cancelled_loads.fetch_add(1, Ordering::Relaxed);
            }
            Err(why) => {
                let why = format!("load of request {}: {why}", self.request_id);
                if self.told.load(Ordering::Relaxed) {
                    // The engine has gone on with it, perhaps in a pass behind this one.
                    shared.stop(why);
                } else {
                    shared.break_promise(self.first_pages(), why);
                }
            }
        }
        self.begin_no_more(loaded);
        if self.last {
            shared.host.end(self.lease);
        }
        *self.over.lock() = Some(loaded);
        self.ended.notify_all();
        self.tell(shared);
    }

    /// The engine goes on with the request. True the first time.
    fn tell(&self, shared: &Shared) -> bool {
        let is_new = !self.told.swap(true, Ordering::Relaxed);
        if is_new && self.parked {
            shared.loading.lock().end(self.request_id);
            shared.load_ended.notify_all();
        }
        is_new
    }

    fn copy(&self, shared: &Shared) -> Result<Copied, String> {
        if self.slots.is_empty() {
            return Ok(Copied::All);
        }
        if self.called_back.load(Ordering::SeqCst) {
            return Ok(Copied::CalledBack);
        }
        if let Some(fence) = self.fence.lock().take() {
            fence.wait()?;
        }
        let host = shared.host.begin(self.lease).ok_or("the lease is not this rank's any more")?;
        let begun = Instant::now();
        let blocks: Vec<_> = self.slots.iter().zip(self.pages.iter()).collect();
        if let Some(steps) = shared.steps.filter(|_| self.in_layers) {
            // To the end: what the device was given cannot be called back.
            let _copying = self.over.lock();
            if self.called_back.load(Ordering::SeqCst) {
                return Ok(Copied::CalledBack);
            }
            self.copy_in_steps(shared, &host, &blocks, &steps)?;
            shared.counts.loaded_blocks.fetch_add(blocks.len() as u64, Ordering::Relaxed);
            shared.speed.lock().loaded(blocks.len(), begun.elapsed());
            return Ok(Copied::All);
        }
        for batch in blocks.chunks(shared.mover.batch_blocks().max(1)) {
            let copying = self.over.lock();
            if self.called_back.load(Ordering::SeqCst) {
                return Ok(Copied::CalledBack);
            }
            shared.mover.load(&copies_of(&place(&host, batch)?))?;
            drop(copying);
            shared.counts.loaded_blocks.fetch_add(batch.len() as u64, Ordering::Relaxed);
        }
        shared.speed.lock().loaded(blocks.len(), begun.elapsed());
        Ok(Copied::All)
    }

    fn copy_in_steps(
        &self,
        shared: &Shared,
        host: &HostMemory,
        blocks: &[PlacedBlock<'_>],
        steps: &Steps,
    ) -> Result<(), String> {
        let placed = place(host, blocks)?;
        let (ranges, bytes) = (steps.ranges(), blocks.len() * shared.shape.block_bytes());
        let mut fences = Vec::with_capacity(ranges.len());
        shared.mover.load_in_steps(&copies_of(&placed), &ranges, &mut |fence| {
            fences.push(fence.clone());
            self.begin(fence);
            if bytes <= LEFT_BYTES_MAX {
                self.tell_early(shared);
            }
        })?;
        self.begin_no_more(Loaded::Yes);
        // A pass that begins now holds up the others in it for no longer than the rest takes.
        let (mut left, mut arrived) = (bytes, Ok(()));
        for (fence, range) in fences.iter().zip(&ranges) {
            if left <= LEFT_BYTES_MAX {
                self.tell_early(shared);
            }
            // Also behind one that failed: what is under way must not outlast this.
            arrived = arrived.and(fence.wait());
            left -= blocks.len() * range.len();
        }
        arrived
    }

    fn tell_early(&self, shared: &Shared) {
        if shared.trusts.load(Ordering::Relaxed) && self.tell(shared) {
            shared.counts.layered_loads.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// How a load ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loaded {
    /// With its bytes there, or called back.
    Yes,
    /// Without them.
    No,
}

enum Copied {
    All,
    CalledBack,
}

/// Segment, index and pages of a block.
type PlacedBlock<'a> = (&'a (u32, u32), &'a [i32]);

/// Where a block is in host memory, and its pages.
type Placed<'a> = ((Arc<SharedMemory>, usize), &'a [i32]);

fn place<'a>(host: &HostMemory, blocks: &[PlacedBlock<'a>]) -> Result<Vec<Placed<'a>>, String> {
    let one = |((segment, index), pages): &PlacedBlock<'a>| {
        let place = host.place(*segment, *index);
        place.map(|place| (place, *pages)).ok_or_else(|| format!("host segment {segment} is not mapped"))
    };
    blocks.iter().map(one).collect()
}

fn copies_of<'a>(placed: &'a [Placed<'a>]) -> Vec<BlockCopy<'a>> {
    placed.iter().map(|((segment, offset), pages)| BlockCopy { pages, segment, offset: *offset }).collect()
}

/// Pages of blocks, one per layer group, block by block.
#[derive(Debug)]
pub(super) struct BlockPages {
    pages: Vec<i32>,
    groups: usize,
}

impl BlockPages {
    /// From one list per group, all of one length.
    pub fn new(groups: &[Pages]) -> Self {
        let blocks = groups.first().map_or(0, |group| group.pages.len());
        let mut pages = Vec::with_capacity(blocks * groups.len());
        for block in 0..blocks {
            pages.extend(groups.iter().map(|group| group.pages[block]));
        }
        Self { pages, groups: groups.len().max(1) }
    }

    /// One after the other.
    pub fn iter(&self) -> impl Iterator<Item = &[i32]> {
        self.pages.chunks_exact(self.groups)
    }

    /// Those of the first layer group.
    pub fn first_group(&self) -> impl Iterator<Item = i32> {
        self.iter().filter_map(|groups| groups.first().copied())
    }

    /// Those of one block.
    pub fn get(&self, block: usize) -> Option<&[i32]> {
        let from = block.checked_mul(self.groups)?;
        self.pages.get(from..from + self.groups)
    }
}
