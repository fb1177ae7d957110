//! The worker half over real memory: what is written when, and what counts.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_shm::{LentMemory, PinState, PinnedSlot, PoolWords, SharedMemory};
use parking_lot::{Condvar, Mutex, RwLock};

use super::*;
use crate::engine::host::{HostMemory, MappedSegment, StoreRequest, Stored, Write, WritePins, Writes};
use crate::engine::metadata::{Lease, Load, Pages, Save};
use crate::engine::pool::{BlockCopy, Fence, LayerGroup, MemoryMover, Region};

mod layers;

const BLOCK: usize = 64;
const PAGES: u32 = 16;
const STRIDE: usize = 4096;
const LEASE: Lease = Lease { lease_id: 5, pin: 3 };

/// Segments and indices of slots, and which of them have their bytes.
type Done = (Vec<(u32, u32)>, Vec<bool>);

/// A daemon that takes everything and puts it where it is free.
struct Daemon {
    memory: Arc<HostMemory>,
    segment: Arc<SharedMemory>,
    done: Mutex<Vec<Done>>,
    offered: Mutex<Vec<StoreRequest>>,
    takes: Mutex<bool>,
    /// Says so many times that it has no room.
    full: Mutex<u32>,
}

impl Host for Daemon {
    fn begin(&self, lease: Lease) -> Option<Arc<HostMemory>> {
        self.memory.begin(lease).then(|| self.memory.clone())
    }

    fn end(&self, lease: Lease) {
        self.memory.end(lease);
    }

    fn store(&self, request: &StoreRequest) -> Option<Stored> {
        self.offered.lock().push(request.clone());
        let mut full = self.full.lock();
        let busy = *full > 0;
        *full = full.saturating_sub(1);
        let write =
            |block: usize| Write { block, segment: 1, index: 8 + block as u32, pin: 1024 + block as u32 };
        let blocks = if busy { 0 } else { request.keys.len() };
        let writes: Vec<Write> = (0..blocks).map(write).collect();
        let is_taken = *self.takes.lock() && self.memory.writes.begin(writes.iter().map(|write| write.pin));
        is_taken.then(|| {
            let host = self.memory.clone();
            Stored::ToWrite(Writes { store_id: 1, host, writes, orphans: false, busy })
        })
    }

    fn store_done(&self, writes: &Writes, copied: Vec<bool>) {
        let slots = writes.writes.iter().map(|write| (write.segment, write.index)).collect();
        self.done.lock().push((slots, copied));
    }
}

/// Moves when it is let, one block, or one step of all blocks, at a time.
#[derive(Clone)]
struct Gate(Arc<GateParts>);

struct GateParts {
    mover: MemoryMover,
    /// What the engine's stream gives in place of one that is reached.
    fence: Mutex<Option<Arc<dyn Fence>>>,
    /// Steps after which the device fails.
    fails_after: Mutex<Option<usize>>,
    /// Blocks that may be moved; blocks that somebody wants to move.
    state: Mutex<(usize, usize)>,
    changed: Condvar,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gate")
    }
}

impl Gate {
    fn new(mover: MemoryMover) -> Self {
        let (fence, fails_after, state) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self(Arc::new(GateParts { mover, fence, fails_after, state, changed: Condvar::new() }))
    }

    fn let_through(&self, blocks: usize) {
        self.0.state.lock().0 += blocks;
        self.0.changed.notify_all();
    }

    fn wait_for_arrival(&self, blocks: usize) {
        let mut state = self.0.state.lock();
        while state.1 < blocks {
            self.0.changed.wait(&mut state);
        }
    }

    fn pass(&self) {
        let mut state = self.0.state.lock();
        state.1 += 1;
        self.0.changed.notify_all();
        while state.0 == 0 {
            self.0.changed.wait(&mut state);
        }
        state.0 -= 1;
    }
}

/// Reached when the other end was let go.
#[derive(Debug)]
struct Dropped(Mutex<Option<std::sync::mpsc::Receiver<()>>>);

impl Fence for Dropped {
    fn wait(&self) -> Result<(), String> {
        let mut ended = self.0.lock();
        if let Some(ended) = ended.take() {
            assert!(ended.recv().is_err());
        }
        Ok(())
    }
}

impl Mover for Gate {
    fn batch_blocks(&self) -> usize {
        1
    }

    fn fence(&self, stream: u64) -> Result<Arc<dyn Fence>, String> {
        self.0.fence.lock().take().map_or_else(|| self.0.mover.fence(stream), Ok)
    }

    fn load(&self, blocks: &[BlockCopy<'_>]) -> Result<(), String> {
        self.pass();
        self.0.mover.load(blocks)
    }

    fn load_in_steps(
        &self,
        blocks: &[BlockCopy<'_>],
        steps: &[Range<usize>],
        begun: &mut dyn FnMut(Arc<dyn Fence>),
    ) -> Result<(), String> {
        let (mut running, mut fences) = (Vec::new(), Vec::new());
        for step in steps {
            let (going, ended) = std::sync::mpsc::channel();
            running.push((step.clone(), going));
            fences.push(Arc::new(Dropped(Mutex::new(Some(ended)))));
        }
        type Owned = (Vec<i32>, Arc<SharedMemory>, usize);
        let owned: Vec<Owned> =
            blocks.iter().map(|block| (block.pages.to_vec(), block.segment.clone(), block.offset)).collect();
        let gate = self.clone();
        std::thread::spawn(move || {
            let copies =
                owned.iter().map(|(pages, segment, offset)| BlockCopy { pages, segment, offset: *offset });
            let copies: Vec<_> = copies.collect();
            for (step, going) in running {
                gate.pass();
                gate.0.mover.load_in_steps(&copies, &[step], &mut |step| step.wait().unwrap()).unwrap();
                drop(going);
            }
        });
        let issued = self.0.fails_after.lock().unwrap_or(steps.len());
        fences.into_iter().take(issued).for_each(|fence| begun(fence));
        if issued < steps.len() { Err("the device is gone".into()) } else { Ok(()) }
    }

    fn save(&self, blocks: &[BlockCopy<'_>]) -> Result<(), String> {
        self.0.mover.save(blocks)?;
        self.pass();
        Ok(())
    }
}

struct Rank {
    /// One for each layer.
    pool: Vec<SharedMemory>,
    daemon: Arc<Daemon>,
    gate: Gate,
    half: WorkerHalf,
}

fn rank() -> Rank {
    rank_that(BrokenPromise::Stops)
}

fn rank_that(broken: BrokenPromise) -> Rank {
    rank_of(1, broken)
}

/// Of an engine that has so many layers, each in a piece of memory of its own.
fn rank_of(layers: usize, broken: BrokenPromise) -> Rank {
    // Mapped twice: by the test, and lent to the half.
    let pool: Vec<_> = (0..layers).map(|_| SharedMemory::create("pool", 4096).unwrap()).collect();
    let again =
        |memory: &SharedMemory| SharedMemory::from_fd(memory.fd().try_clone_to_owned().unwrap()).unwrap();
    let lent: Vec<_> = pool.iter().map(again).collect();
    let bytes = BLOCK / layers;
    let region = |lent: &SharedMemory| {
        let base = lent.address().addr().get();
        Region { base, bytes, stride: bytes, pages: PAGES }
    };
    let shape = PoolShape::new(vec![LayerGroup { regions: lent.iter().map(region).collect() }]).unwrap();
    let shape = shape.of_layers(layers);
    let words = Arc::new(PoolWords::create([1; 16], PAGES).unwrap());
    let segment = Arc::new(SharedMemory::create("segment", 32 * STRIDE).unwrap());
    let same = segment.fd().try_clone_to_owned().unwrap();
    let lent = lent.into_iter().map(LentMemory::of_shared).collect();
    let gate = Gate::new(MemoryMover::new(shape.clone(), lent));
    let mapped = MappedSegment::new(same, Arc::new(gate.clone())).unwrap();
    let segments = RwLock::new([(1, Arc::new(mapped))].into());
    let memory = HostMemory {
        writes: Arc::new(WritePins::new(words.clone())),
        words,
        segments,
        slot_stride: STRIDE,
        shard_offset: 128,
        block_bytes: BLOCK,
    };
    let daemon = Arc::new(Daemon {
        memory: Arc::new(memory),
        segment,
        done: Mutex::default(),
        offered: Mutex::default(),
        takes: Mutex::new(true),
        full: Mutex::default(),
    });
    let generations = Arc::new(Generations::new(&shape));
    let half =
        WorkerHalf::new(shape, Arc::new(gate.clone()), daemon.clone(), generations, true, broken).unwrap();
    Rank { pool, daemon, gate, half }
}

impl Rank {
    fn promise(&self) {
        self.daemon.memory.words.set_pin(
            LEASE.pin,
            PinState::Promised(LEASE.lease_id),
            PinnedSlot { segment: 1, index: 2 },
        );
    }

    fn pin(&self) -> PinState {
        self.daemon.memory.words.pin(LEASE.pin)
    }

    fn fill_slot(&self, index: usize, byte: u8) {
        self.daemon.segment.write(index * STRIDE + 128, &[byte; BLOCK]);
    }

    fn slot(&self, index: usize) -> [u8; BLOCK] {
        let mut bytes = [0; BLOCK];
        self.daemon.segment.read(index * STRIDE + 128, &mut bytes);
        bytes
    }

    fn page(&self, page: usize) -> [u8; BLOCK] {
        let mut bytes = [0; BLOCK];
        let part = BLOCK / self.pool.len();
        for (of_layer, memory) in bytes.chunks_mut(part).zip(&self.pool) {
            memory.read(page * part, of_layer);
        }
        bytes
    }

    fn bind(&mut self, with: impl FnOnce(&mut Metadata)) {
        let mut metadata = Metadata::new([9; 16]);
        with(&mut metadata);
        self.half.bind(Metadata::decode(&metadata.encode()).unwrap().unwrap()).unwrap();
    }

    fn finished(&mut self, saving: &[u64], loading: &[u64]) -> (Vec<u64>, Vec<u64>) {
        self.half.get_finished(saving, loading).unwrap()
    }

    /// Until so many saves and loads are told of.
    fn wait_finished(&mut self, saves: usize, loads: usize) -> (Vec<u64>, Vec<u64>) {
        let (mut saved, mut loaded) = (Vec::new(), Vec::new());
        let end = Instant::now() + Duration::from_secs(20);
        while saved.len() < saves || loaded.len() < loads {
            assert!(Instant::now() < end, "saved {saved:?}, loaded {loaded:?}");
            let (more_saved, more_loaded) = self.finished(&[], &[]);
            saved.extend(more_saved);
            loaded.extend(more_loaded);
            std::thread::yield_now();
        }
        (saved, loaded)
    }
}

fn load(parked: bool, pages: &[i32]) -> Load {
    Load {
        load_id: 1,
        request_id: 7,
        parked,
        segments: vec![1; pages.len()],
        indices: (0..pages.len() as u32).collect(),
        pages: vec![Pages { pages: pages.to_vec() }],
        lease: LEASE,
        last: true,
        in_layers: false,
    }
}

fn save(request_id: u64, pages: &[i32]) -> Save {
    Save {
        request_id,
        namespace: vec![1; 32],
        keys: (0..pages.len() as u8).flat_map(|block| [block; 16]).collect(),
        pages: vec![Pages { pages: pages.to_vec() }],
        ..Save::default()
    }
}

#[test]
fn a_parked_load_is_told_of_once_its_bytes_are_there_and_the_lease_is_over() {
    let mut rank = rank();
    rank.promise();
    rank.fill_slot(0, 11);
    rank.fill_slot(1, 22);
    rank.bind(|metadata| metadata.loads.push(load(true, &[4, 9])));
    rank.half.start_loads(0, Pass::Whole).unwrap();
    assert_eq!(rank.finished(&[], &[7]), (vec![], vec![]));
    rank.gate.wait_for_arrival(1);
    assert_eq!(rank.pin(), PinState::InUse(LEASE.lease_id));
    rank.gate.let_through(2);
    assert_eq!(rank.wait_finished(0, 1), (vec![], vec![7]));
    assert_eq!((rank.page(4), rank.page(9), rank.page(5)), ([11; BLOCK], [22; BLOCK], [0; BLOCK]));
    assert_eq!(rank.pin(), PinState::Free);
}

#[test]
fn a_load_that_was_called_back_writes_nothing_afterwards() {
    let mut rank = rank();
    rank.promise();
    (0..3).for_each(|slot| rank.fill_slot(slot, 11));
    rank.bind(|metadata| metadata.loads.push(load(true, &[4, 5, 6])));
    rank.half.start_loads(0, Pass::Whole).unwrap();
    assert_eq!(rank.finished(&[], &[7]), (vec![], vec![]));
    rank.gate.wait_for_arrival(1);
    // Block 0 is being copied: the call back waits for it.
    let gate = rank.gate.clone();
    let helper = std::thread::spawn(move || {
        std::thread::yield_now();
        gate.let_through(1);
    });
    rank.bind(|metadata| metadata.voided.push(1));
    let before = (rank.page(4), rank.page(5), rank.page(6));
    assert_eq!(before, ([11; BLOCK], [0; BLOCK], [0; BLOCK]));
    rank.gate.let_through(100);
    assert_eq!(rank.wait_finished(0, 1).1, [7], "the engine still asks for its end");
    helper.join().unwrap();
    assert_eq!((rank.page(4), rank.page(5), rank.page(6)), before);
    assert_eq!((rank.pin(), rank.half.counts().cancelled_loads.load(Ordering::Relaxed)), (PinState::Free, 1));
}

#[test]
fn a_load_in_the_pass_is_there_when_loads_were_started() {
    let mut rank = rank();
    rank.promise();
    rank.fill_slot(0, 33);
    rank.gate.let_through(1);
    rank.bind(|metadata| metadata.loads.push(load(false, &[2])));
    rank.half.start_loads(0, Pass::Whole).unwrap();
    assert_eq!(rank.page(2), [33; BLOCK]);
    assert_eq!(rank.finished(&[], &[]), (vec![], vec![]), "nobody asks for it");
}

#[test]
fn a_promise_that_cannot_be_kept_is_an_error_before_the_pass() {
    // Not promised to this rank, or in memory that it has not mapped.
    for (promised, segment) in [(false, 1), (true, 2)] {
        let mut rank = rank();
        if promised {
            rank.promise();
        }
        rank.gate.let_through(9);
        rank.bind(|metadata| metadata.loads.push(Load { segments: vec![segment], ..load(false, &[2]) }));
        let error = rank.half.start_loads(0, Pass::Whole).unwrap_err();
        assert!(error.contains("load of request 7"), "{error}");
        assert_eq!(rank.half.counts().broken_promises.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn an_engine_that_can_be_told_is_told_which_pages_were_not_loaded_and_goes_on() {
    let mut rank = rank_that(BrokenPromise::IsTold);
    // Nobody promised it: the lease is not this rank's.
    rank.bind(|metadata| metadata.loads.push(load(true, &[4, 5])));
    rank.half.start_loads(0, Pass::Whole).unwrap();
    let mut loaded = rank.finished(&[], &[7]).1;
    loaded.extend(rank.wait_finished(0, 1 - loaded.len()).1);
    assert_eq!(loaded, [7]);
    assert_eq!(rank.half.take_failed(), [4, 5]);
    assert_eq!(rank.half.take_failed(), [] as [i32; 0]);
    // The next one is kept.
    rank.promise();
    rank.gate.let_through(1);
    rank.bind(|metadata| metadata.loads.push(load(false, &[6])));
    rank.half.start_loads(0, Pass::Whole).unwrap();
    assert_eq!(rank.half.take_failed(), [] as [i32; 0]);
}

#[test]
fn an_idle_pass_waits_for_a_load_but_not_for_long() {
    let mut rank = rank_that(BrokenPromise::IsTold);
    rank.half.wait_for_load();
    rank.promise();
    rank.bind(|metadata| metadata.loads.push(load(true, &[4])));
    rank.half.start_loads(0, Pass::Whole).unwrap();
    rank.gate.wait_for_arrival(1);
    rank.half.wait_for_load();
    assert_eq!(rank.finished(&[], &[7]).1, [] as [u64; 0], "it has not ended");
    rank.gate.let_through(1);
    let mut loaded = Vec::new();
    while loaded.is_empty() {
        rank.half.wait_for_load();
        loaded = rank.finished(&[], &[]).1;
    }
    assert_eq!(loaded, [7]);
}

#[test]
fn what_is_computed_on_pages_that_were_not_loaded_is_not_saved() {
    let mut rank = rank_that(BrokenPromise::IsTold);
    rank.gate.let_through(99);
    // Request 7 loads pages 4 and 5 in the pass; nobody promised them. Request 8 shares the first of them.
    rank.bind(|metadata| {
        metadata.loads.push(load(false, &[4, 5]));
        metadata.saves.extend([save(7, &[4, 5, 6]), save(8, &[4, 7]), save(9, &[8])]);
    });
    rank.half.start_loads(0, Pass::Whole).unwrap();
    rank.half.pass_done(0).unwrap();
    assert_eq!(rank.half.take_failed(), [4, 5]);
    // One more pass was scheduled before the engine heard of it.
    rank.bind(|metadata| metadata.saves.extend([save(7, &[10]), save(8, &[11]), save(9, &[12])]));
    rank.half.start_loads(0, Pass::Whole).unwrap();
    rank.half.pass_done(0).unwrap();
    // The page is another block's.
    rank.bind(|metadata| {
        metadata.reassigned.push(Pages { pages: vec![4] });
        metadata.saves.push(save(10, &[4]));
    });
    rank.half.pass_done(0).unwrap();
    let told = rank.finished(&[7, 8, 9, 10], &[]).0;
    let left = 4 - told.len();
    rank.wait_finished(left, 0);
    let offered: Vec<u32> = rank.daemon.offered.lock().iter().map(|request| request.blocks[0].0).collect();
    assert_eq!(offered, [8, 12, 4]);
}

#[test]
fn a_load_that_the_pass_waits_for_comes_before_those_that_are_parked() {
    let mut rank = rank_that(BrokenPromise::IsTold);
    rank.fill_slot(0, 33);
    rank.gate.let_through(1);
    rank.promise();
    rank.bind(|metadata| {
        metadata.loads.push(Load { load_id: 2, request_id: 8, last: false, ..load(true, &[5]) });
        metadata.loads.push(Load { last: false, ..load(false, &[2]) });
    });
    rank.half.start_loads(0, Pass::Whole).unwrap();
    assert_eq!((rank.page(2), rank.page(5)), ([33; BLOCK], [0; BLOCK]));
    assert!(rank.half.take_block_time().is_some());
    rank.gate.let_through(1);
    let loaded = rank.finished(&[], &[8]).1;
    rank.wait_finished(0, 1 - loaded.len());
    assert_eq!(rank.page(5), [33; BLOCK]);
}

#[test]
fn a_load_of_which_this_rank_was_never_told_is_an_error() {
    let mut rank = rank();
    let error = rank.half.get_finished(&[], &[8]).unwrap_err();
    assert!(error.contains("request 8"), "{error}");
}

#[test]
fn complete_blocks_are_saved_after_the_pass_and_told_of_when_asked() {
    let mut rank = rank();
    rank.gate.let_through(2);
    rank.bind(|metadata| metadata.saves.push(save(7, &[3, 1])));
    rank.half.start_loads(0, Pass::Whole).unwrap();
    assert!(rank.daemon.offered.lock().is_empty(), "not before the pass");
    rank.pool[0].write(3 * BLOCK, &[44; BLOCK]);
    rank.pool[0].write(BLOCK, &[55; BLOCK]);
    assert!(rank.half.is_saving(7));
    rank.half.pass_done(0).unwrap();
    let told = rank.finished(&[7], &[]).0;
    assert_eq!(if told.is_empty() { rank.wait_finished(1, 0).0 } else { told }, [7]);
    assert!(!rank.half.is_saving(7));
    assert_eq!(*rank.daemon.done.lock(), [(vec![(1, 8), (1, 9)], vec![true, true])]);
    assert_eq!((rank.slot(8), rank.slot(9)), ([44; BLOCK], [55; BLOCK]));
}

#[test]
fn what_was_copied_of_a_page_that_changed_hands_meanwhile_does_not_count() {
    let mut rank = rank();
    rank.bind(|metadata| metadata.saves.push(save(7, &[3, 1])));
    rank.half.pass_done(0).unwrap();
    rank.gate.wait_for_arrival(1);
    rank.bind(|metadata| metadata.reassigned.push(Pages { pages: vec![3] }));
    rank.gate.let_through(2);
    assert!(rank.finished(&[7], &[]).0.len() <= 1);
    let end = Instant::now() + Duration::from_secs(20);
    while rank.daemon.done.lock().is_empty() {
        assert!(Instant::now() < end);
        std::thread::yield_now();
    }
    assert_eq!(rank.daemon.done.lock()[0].1, [false, true]);
}

#[test]
fn blocks_of_a_pass_that_never_came_are_not_saved() {
    let mut rank = rank();
    rank.gate.let_through(9);
    rank.bind(|metadata| metadata.saves.push(save(7, &[3])));
    rank.bind(|_| ());
    rank.half.pass_done(0).unwrap();
    assert_eq!(rank.finished(&[7], &[]).0, [7]);
    assert!(rank.daemon.offered.lock().is_empty());
}

#[test]
fn saves_that_nobody_takes_end_and_are_offered_again() {
    let mut rank = rank();
    *rank.daemon.takes.lock() = false;
    rank.bind(|metadata| metadata.saves.push(save(7, &[3])));
    rank.half.pass_done(0).unwrap();
    let told = rank.finished(&[7], &[]).0;
    assert_eq!(if told.is_empty() { rank.wait_finished(1, 0).0 } else { told }, [7]);
    assert_eq!(rank.half.take_orphaned(), [7]);
    assert!(rank.half.take_orphaned().is_empty());
}

#[test]
fn where_the_engine_does_not_wait_for_it_a_save_waits_for_room() {
    for (broken, offers) in [(BrokenPromise::IsTold, 4), (BrokenPromise::Stops, 1)] {
        let mut rank = rank_that(broken);
        rank.gate.let_through(9);
        *rank.daemon.full.lock() = 3;
        rank.bind(|metadata| metadata.saves.push(save(7, &[3])));
        rank.half.pass_done(0).unwrap();
        let told = rank.finished(&[7], &[]).0;
        assert_eq!(if told.is_empty() { rank.wait_finished(1, 0).0 } else { told }, [7]);
        assert_eq!(rank.daemon.offered.lock().len(), offers);
        assert_eq!(rank.half.take_orphaned().is_empty(), offers == 4);
    }
}

#[test]
fn pages_that_were_never_registered_are_refused() {
    let mut rank = rank();
    for wrong in [PAGES as i32, -2] {
        let mut metadata = Metadata::new([9; 16]);
        metadata.loads.push(load(true, &[wrong]));
        assert!(rank.half.bind(metadata).unwrap_err().contains("never registered"));
    }
    let mut metadata = Metadata::new([9; 16]);
    metadata.reassigned.push(Pages { pages: vec![PAGES as i32] });
    assert!(rank.half.bind(metadata).unwrap_err().contains("never registered"));
}
