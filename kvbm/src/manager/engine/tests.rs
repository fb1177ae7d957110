//! Engines with memory of their own, on real memory and real threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use kvbm_hash::SequenceHash;
use kvbm_shm::{PoolWords, ProcessWatch, SharedMemory};

use super::*;
use crate::ledger::{BlockRef, EngineId, EnginePoolIdentity, LeaseId, TrustDomain};
use crate::manager::Outcome;
use crate::manager::tests::with_host;
use crate::manager::warm::tests::{Kept, start};
use crate::store::StandInGpus;
use crate::{Export, Fragment, ManagerConfig};

const BLOCK: usize = 6000;
const LAYER: usize = BLOCK / 2;
const BLOCKS: u32 = 128;
/// One that all ranks share.
const GPU: &str = "GPU-0";

fn manager(config: ManagerConfig) -> Manager {
    let manager = Manager::start(config).unwrap();
    while manager.host_bytes().0 != manager.host_bytes().1 {
        thread::yield_now();
    }
    manager
}

fn key(n: u32) -> SequenceHash {
    let mut hash = [3; 16];
    hash[..4].copy_from_slice(&n.to_le_bytes());
    SequenceHash(hash)
}

fn content(key: SequenceHash, rank: u32) -> Vec<u8> {
    let n = u32::from_le_bytes(key.0[..4].try_into().unwrap());
    (0..BLOCK as u32).map(|i| (i.wrapping_mul(n * 2 + 1 + rank * 64) >> 3) as u8).collect()
}

/// Memory of engines is that of GPUs, which the real copy engine reaches.
fn on_gpus(config: ManagerConfig) -> ManagerConfig {
    ManagerConfig { exports: Arc::new(StandInGpus::new()), ..config }
}

mod fan_out;

/// One rank: its memory is two layers, one behind the other in each of two memfds.
struct Rank {
    manager: Manager,
    session: SessionId,
    namespace: NamespaceId,
    pool: PoolId,
    /// Which shard it has.
    rank: u32,
    words: PoolWords,
    layers: Vec<SharedMemory>,
    opened: OpenedEnginePool,
}

impl Rank {
    fn open(manager: &Manager, engine: u8, mode: EnginePoolMode, (rank, ranks): (u32, u32)) -> Self {
        Self::open_shard(manager, engine, mode, (rank, ranks), (rank, ranks))
    }

    fn open_shard(
        manager: &Manager,
        engine: u8,
        mode: EnginePoolMode,
        (rank, ranks): (u32, u32),
        (shard, shards): (u32, u32),
    ) -> Self {
        let session = manager.open_session(TrustDomain(1));
        let namespace = manager.register_namespace(session, [5; 32], [6; 32], "", "m").unwrap();
        let bytes = (LAYER * BLOCKS as usize).next_multiple_of(4096);
        let layers: Vec<_> = (0..2).map(|_| SharedMemory::create("layer", bytes).unwrap()).collect();
        let is_ipc = mode == EnginePoolMode::Ipc;
        let mapped = layers.iter().filter(|_| is_ipc);
        let has_gpus = manager.shared.config.exports.node_of(GPU).is_some();
        let export = |layer: &SharedMemory| {
            let (descriptor, bytes) = (layer.fd().try_clone_to_owned().unwrap(), layer.bytes() as u64);
            match has_gpus {
                true => Export::CudaVmm { descriptor, bytes, gpu_uuid: GPU.into() },
                false => Export::Shared(descriptor),
            }
        };
        let fragment = |export| Fragment { export, offset: 0, stride: LAYER, bytes: LAYER };
        let open = OpenEnginePool {
            identity: EnginePoolIdentity {
                engine: EngineId([engine; 16]),
                mode,
                uuid: [engine; 16],
                base: [6; 32],
                domain: TrustDomain(1),
                block_bytes: BLOCK,
                block_count: BLOCKS,
                shard,
                shard_count: shards,
                rank,
                rank_count: ranks,
                tokens_per_block: 4,
                device: "cpu:0".into(),
            },
            exports: mapped.map(export).collect(),
            fragments: (0..2).filter(|_| is_ipc).map(fragment).collect(),
            process: Some(ProcessWatch::open(std::process::id()).unwrap()),
        };
        let (send, opened) = mpsc::channel();
        manager.open_engine_pool(session, open, Box::new(move |done| send.send(done).unwrap()));
        let opened = opened.recv().unwrap().unwrap();
        let words = PoolWords::from_fd(opened.words.fd().try_clone_to_owned().unwrap()).unwrap();
        let pool = opened.pool_id;
        let rank = shard;
        let opened = Self { manager: manager.clone(), session, namespace, pool, rank, words, layers, opened };
        opened.map();
        opened
    }

    fn map(&self) {
        let given: Vec<_> = self.manager.give_segments(self.session).into_iter().map(|(id, _)| id).collect();
        self.manager.segments_mapped(self.session, self.pool, &given).unwrap();
    }

    /// Assigns a block anew and writes other bytes into it.
    fn write(&self, block: u32, bytes: &[u8]) {
        self.words.raise_generation(block);
        for (layer, bytes) in self.layers.iter().zip(bytes.chunks(LAYER)) {
            layer.write(block as usize * LAYER, bytes);
        }
    }

    fn read(&self, block: u32) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK];
        for (layer, bytes) in self.layers.iter().zip(bytes.chunks_mut(LAYER)) {
            layer.read(block as usize * LAYER, bytes);
        }
        bytes
    }

    fn block(&self, block: u32) -> BlockRef {
        BlockRef { block, generation: self.words.generation(block) }
    }

    /// Writes the blocks of a chain into the first blocks of the pool.
    fn compute(&self, keys: &[SequenceHash]) -> Vec<StoreBlock> {
        let named = keys.iter().enumerate().map(|(i, key)| {
            self.write(i as u32, &content(*key, self.rank));
            let parent = i.checked_sub(1).map(|before| keys[before]);
            StoreBlock { block: self.block(i as u32), hash: *key, parent, retention: None }
        });
        named.collect()
    }

    fn store(
        &self,
        blocks: Vec<StoreBlock>,
        fence: Option<Fence>,
        rescue_only: bool,
    ) -> Receiver<Vec<Verdict>> {
        let (send, verdicts) = mpsc::channel();
        let request = StoreRequest { namespace: self.namespace, pool: self.pool, blocks, fence, rescue_only };
        let done = Box::new(move |said| send.send(said).unwrap());
        self.manager.store(self.session, request, done).unwrap();
        verdicts
    }

    fn find(&self, keys: &[SequenceHash], skip: usize, hold: bool) -> EngineMatch {
        let asks = EngineAsks { hashes: keys, skip, hold, retention: &[] };
        self.manager.match_for_engine(self.session, self.namespace, asks).unwrap()
    }

    fn load(&self, lease: LeaseId, first: usize, targets: &[BlockRef]) -> Result<Outcome, Refused> {
        let (send, done) = mpsc::channel();
        let done_later = Box::new(move |outcome| send.send(outcome).unwrap());
        self.manager.load(self.session, 1, lease, self.pool, (first, targets), done_later)?;
        Ok(done.recv().unwrap())
    }

    /// The bytes of this rank in a host slot.
    fn in_slot(&self, slot: &(crate::ledger::Place, u32)) -> Vec<u8> {
        let segment = Arc::clone(&self.manager.shared.host.segments()[slot.0.segment.0 as usize]);
        let mut bytes = vec![0; BLOCK];
        segment.read(slot.0.offset(self.opened.slot_stride) + self.opened.shard_offset, &mut bytes);
        bytes
    }
}

fn chain(count: u32) -> Vec<SequenceHash> {
    (0..count).map(key).collect()
}

#[test]
fn blocks_are_stored_when_their_fence_is_reached_and_loaded_into_another_engine() {
    let manager = manager(with_host(4 << 20));
    let a = Rank::open(&manager, 1, EnginePoolMode::Ipc, (0, 1));
    let keys = chain(20);
    let blocks = a.compute(&keys);
    let verdicts = a.store(blocks, Some(Fence { word: 3, value: 7 }), false);
    // Behind it in order, though its own fence is reached.
    let second = a.store(
        vec![StoreBlock { block: a.block(60), hash: key(60), parent: None, retention: None }],
        None,
        false,
    );
    assert!(second.recv_timeout(Duration::from_millis(30)).is_err());
    assert_eq!((manager.stores_fenced(), a.find(&keys, 0, false).matched.host_blocks), (2, 0));
    a.words.signal(3, 7);
    assert_eq!(verdicts.recv().unwrap(), [Verdict::Stored; 20]);
    assert_eq!(second.recv().unwrap(), [Verdict::Stored]);
    assert_eq!(a.store(a.compute(&keys), None, false).recv().unwrap(), [Verdict::Resident; 20]);

    let b = Rank::open(&manager, 2, EnginePoolMode::Ipc, (0, 1));
    let found = b.find(&keys, 5, false);
    assert_eq!((found.matched.device.len(), found.matched.host_blocks), (0, 15));
    let lease = found.matched.lease.unwrap();
    let targets: Vec<_> = (0..10).map(|block| b.block(100 + block)).collect();
    let outcome = b.load(lease, 5, &targets).unwrap();
    assert_eq!((outcome.blocks_done, outcome.bytes), (10, 10 * BLOCK as u64));
    for (target, key) in targets.iter().zip(&keys[10..]) {
        assert!(b.read(target.block) == content(*key, 0), "{key:?}");
    }
    // The request is cancelled and its blocks are somebody else's.
    b.words.raise_generation(105);
    let stale = b.load(lease, 5, &targets).unwrap();
    assert_eq!(stale.error, Some(Refused::Stale { what: "target block" }));
    manager.release_lease_of(b.session, lease, true).unwrap();
    assert!(matches!(b.load(lease, 5, &targets), Err(Refused::Unknown { .. })));
    manager.inspect(Ledger::check_integrity);
    manager.stop();
}

#[test]
fn two_ranks_put_their_shards_into_one_slot_and_each_gets_its_own_back() {
    let manager = manager(with_host(4 << 20));
    let ranks = [0, 1].map(|rank| Rank::open(&manager, 1, EnginePoolMode::Ipc, (rank, 2)));
    assert_eq!(ranks[1].opened.slot_stride, (2 * BLOCK).next_multiple_of(4096));
    let keys = chain(9);
    let said = ranks.each_ref().map(|rank| rank.store(rank.compute(&keys), None, false));
    said.iter().for_each(|said| assert_eq!(said.recv().unwrap(), [Verdict::Stored; 9]));
    let lease = ranks[0].find(&keys, 0, false).matched.lease.unwrap();
    for rank in &ranks {
        let targets: Vec<_> = (0..9).map(|block| rank.block(50 + block)).collect();
        assert_eq!(rank.load(lease, 0, &targets).unwrap().blocks_done, 9);
        for (target, key) in targets.iter().zip(&keys) {
            assert!(rank.read(target.block) == content(*key, rank.rank));
        }
        manager.release_lease_of(rank.session, lease, false).unwrap();
    }
    assert_eq!(manager.inspect(Ledger::leases), 0);
    // A rank that dies breaks the engine up: nothing is found for the other.
    manager.session_dead(ranks[1].session);
    assert_eq!(ranks[0].find(&keys, 0, false).matched.lease, None);
    manager.stop();
}

/// Copies as an engine of a staged pool would.
fn write_slots(rank: &Rank, blocks: &[StoreBlock], staged: &Staged) -> Vec<bool> {
    let written = blocks.iter().zip(&staged.verdicts).filter(|(_, verdict)| **verdict == Verdict::Write);
    let segments = rank.manager.shared.host.segments();
    let copied: Vec<bool> = written
        .zip(&staged.slots)
        .map(|((block, _), slot)| {
            let at = slot.place.offset(rank.opened.slot_stride) + rank.opened.shard_offset;
            segments[slot.place.segment.0 as usize].write(at, &rank.read(block.block.block));
            rank.words.clear_pin(slot.pin);
            true
        })
        .collect();
    assert_eq!(copied.len(), staged.slots.len());
    copied
}

#[test]
fn an_engine_that_copies_by_itself_holds_what_it_reads_until_it_says_so() {
    let manager = manager(with_host(4 << 20));
    let rank = Rank::open(&manager, 1, EnginePoolMode::Staged, (0, 1));
    let keys = chain(12);
    let blocks = rank.compute(&keys);
    let staged = manager.stage(rank.session, rank.namespace, rank.pool, &blocks).unwrap();
    assert_eq!(staged.verdicts, [Verdict::Write; 12]);
    assert_eq!(rank.words.pinned_slots().len(), 12);
    assert_eq!(rank.find(&keys, 0, true).matched.host_blocks, 0);
    let mut copied = write_slots(&rank, &blocks, &staged);
    assert!(manager.finish_staged(rank.session, staged.store, &copied[1..]).is_err());
    copied[10] = false;
    manager.finish_staged(rank.session, staged.store, &copied).unwrap();
    assert!(manager.finish_staged(rank.session, staged.store, &copied).is_err(), "only once");

    let found = rank.find(&keys, 2, true);
    let (lease, pin) = (found.matched.lease.unwrap(), found.pin.clone().unwrap().pin);
    assert_eq!((found.matched.host_blocks, found.slots.len()), (8, 8));
    assert!(rank.words.begin_use(pin, lease.0));
    for (slot, key) in found.slots.iter().zip(&keys[2..]) {
        assert!(rank.in_slot(slot) == content(*key, 0));
    }
    // Its scheduler half takes it back too late.
    manager.release_lease_of(rank.session, lease, true).unwrap();
    manager.tick();
    assert_eq!(manager.inspect(Ledger::leases), 1);
    rank.words.clear_pin(pin);
    manager.tick();
    assert_eq!(manager.inspect(Ledger::leases), 0, "it is seen without a message");
    // And in time.
    let found = rank.find(&keys, 0, true);
    let (lease, pin) = (found.matched.lease.unwrap(), found.pin.unwrap().pin);
    manager.release_lease_of(rank.session, lease, true).unwrap();
    assert!(!rank.words.begin_use(pin, lease.0));
    assert_eq!(manager.inspect(Ledger::leases), 0);
    manager.inspect(Ledger::check_integrity);
    manager.stop();
}

#[test]
fn a_rank_that_says_again_that_it_is_done_takes_nothing_from_the_others() {
    let manager = manager(with_host(4 << 20));
    let ranks = [0, 1].map(|rank| Rank::open(&manager, 1, EnginePoolMode::Staged, (rank, 2)));
    ranks.iter().for_each(Rank::map);
    let keys = chain(5);
    for rank in &ranks {
        let blocks = rank.compute(&keys);
        let staged = manager.stage(rank.session, rank.namespace, rank.pool, &blocks).unwrap();
        let copied = write_slots(rank, &blocks, &staged);
        manager.finish_staged(rank.session, staged.store, &copied).unwrap();
    }
    // The first rank's session asks, as that of an engine's scheduler does.
    let found = ranks[0].find(&keys, 0, true);
    let (lease, pin) = (found.matched.lease.unwrap(), found.pin.unwrap().pin);
    assert!(ranks[0].words.begin_use(pin, lease.0));
    ranks[0].words.clear_pin(pin);
    // Its entry is seen before its message comes.
    manager.tick();
    manager.release_lease_of(ranks[0].session, lease, false).unwrap();
    assert!(ranks[1].words.begin_use(pin, lease.0), "the other rank was promised the same");
    ranks[1].words.clear_pin(pin);
    manager.tick();
    assert_eq!(manager.inspect(Ledger::leases), 0);
    manager.inspect(Ledger::check_integrity);
    manager.stop();
}

#[test]
fn blocks_whose_writer_lost_its_session_can_be_written_again_when_it_has_cleared_its_entries() {
    let manager = manager(with_host(4 << 20));
    let former = Rank::open(&manager, 1, EnginePoolMode::Staged, (0, 1));
    let keys = chain(3);
    let blocks = former.compute(&keys);
    let staged = manager.stage(former.session, former.namespace, former.pool, &blocks).unwrap();
    assert_eq!(staged.verdicts, [Verdict::Write; 3]);
    manager.session_silent(former.session);
    let anew = Rank::open(&manager, 1, EnginePoolMode::Staged, (0, 1));
    let store =
        |rank: &Rank| manager.stage(rank.session, rank.namespace, rank.pool, &rank.compute(&keys)).unwrap();
    manager.tick();
    assert_eq!(store(&anew).verdicts, [Verdict::InFlight; 3], "somebody may still be writing there");
    staged.slots[1..].iter().for_each(|slot| former.words.clear_pin(slot.pin));
    manager.tick();
    assert_eq!(store(&anew).verdicts, [Verdict::InFlight; 3]);
    former.words.clear_pin(staged.slots[0].pin);
    manager.tick();
    assert_eq!(store(&anew).verdicts, [Verdict::Write; 3]);
    manager.inspect(Ledger::check_integrity);
    manager.session_dead(former.session);
    manager.session_dead(anew.session);
    manager.stop();
}

fn rescue(config: ManagerConfig, ignore_generations: bool) {
    let manager = manager(config);
    manager.shared.ignore_generations.store(ignore_generations, Ordering::SeqCst);
    let dying = Rank::open(&manager, 1, EnginePoolMode::Ipc, (0, 1));
    // Each is a sequence of its own.
    let keys = chain(BLOCKS);
    let blocks: Vec<StoreBlock> =
        dying.compute(&keys).into_iter().map(|block| StoreBlock { parent: None, ..block }).collect();
    assert_eq!(dying.store(blocks, None, true).recv().unwrap(), [Verdict::Registered; BLOCKS as usize]);
    // Complete, but nobody has seen it before the end.
    let unseen = StoreBlock { block: dying.block(0), hash: key(1000), parent: None, retention: None };
    dying.write(0, &content(key(1000), 0));
    let unseen = StoreBlock { block: dying.block(0), ..unseen };
    let reached = dying.store(vec![unseen], Some(Fence { word: 0, value: 1 }), true);
    let never = StoreBlock { block: dying.block(1), hash: key(2000), parent: None, retention: None };
    let lost = dying.store(vec![never], Some(Fence { word: 0, value: 2 }), true);
    let reassigned: Vec<u32> = (2..BLOCKS).filter(|block| block % 3 == 0).collect();
    reassigned.iter().for_each(|block| dying.write(*block, &[0xEE; BLOCK]));
    dying.words.signal(0, 1);
    manager.session_dead(dying.session);
    drop((reached, lost));
    while manager.inspect(|ledger| ledger.engine_pools().count()) > 0 {
        thread::sleep(Duration::from_millis(1));
        manager.tick();
    }
    let next = Rank::open(&manager, 2, EnginePoolMode::Ipc, (0, 1));
    let mut found = 0;
    for key in keys.iter().copied().chain([key(1000), key(2000)]) {
        let Some(lease) = next.find(&[key], 0, false).matched.lease else { continue };
        let target = next.block(9);
        assert_eq!(next.load(lease, 0, &[target]).unwrap().blocks_done, 1);
        assert!(next.read(9) == content(key, 0), "{key:?} is served with other bytes");
        manager.release_lease_of(next.session, lease, true).unwrap();
        found += 1;
    }
    // Block 0 was assigned anew, to the one that was seen last.
    assert_eq!(found, BLOCKS as usize - reassigned.len());
    assert_eq!(manager.inspect(Ledger::tally).rescued, found as u64);
    manager.stop();
}

#[test]
fn a_dead_engines_blocks_are_rescued_if_they_are_still_what_they_were() {
    rescue(with_host(4 << 20), false);
    rescue(on_gpus(with_host(4 << 20)), false);
}

#[test]
#[should_panic(expected = "is served with other bytes")]
fn a_rescue_that_does_not_look_at_generations_is_noticed() {
    rescue(with_host(4 << 20), true);
}

#[test]
#[should_panic(expected = "is served with other bytes")]
fn a_rescue_from_gpus_that_does_not_look_at_generations_is_noticed() {
    rescue(on_gpus(with_host(4 << 20)), true);
}

#[test]
fn a_load_that_is_cancelled_writes_nothing_after_it_is_drained() {
    let config = || ManagerConfig { copy_delay: Duration::from_millis(2), ..with_host(4 << 20) };
    cancel(config());
    (0..5).for_each(|_| cancel(on_gpus(config())));
}

fn cancel(config: ManagerConfig) {
    let manager = manager(config);
    let rank = Rank::open(&manager, 1, EnginePoolMode::Ipc, (0, 1));
    let keys = chain(60);
    rank.store(rank.compute(&keys), None, false).recv().unwrap();
    let lease = rank.find(&keys, 0, false).matched.lease.unwrap();
    let targets: Vec<_> = (60..120).map(|block| rank.block(block)).collect();
    let (send, ends) = mpsc::channel();
    let (done, drained) = (send.clone(), send);
    let answer = Box::new(move |outcome: Outcome| done.send(outcome.blocks_failed).unwrap());
    manager.load(rank.session, 7, lease, rank.pool, (0, &targets), answer).unwrap();
    let is_cancelled =
        manager.cancel_load(rank.session, 7, Box::new(move || drained.send(usize::MAX).unwrap()));
    assert!(is_cancelled);
    assert_eq!([ends.recv().unwrap(), ends.recv().unwrap()], [60, usize::MAX]);
    (60..120).for_each(|block| rank.write(block, &[1; BLOCK]));
    thread::sleep(Duration::from_millis(20));
    assert!((60..120).all(|block| rank.read(block) == [1; BLOCK]));
    assert!(!manager.cancel_load(rank.session, 7, Box::new(|| unreachable!("it has ended"))));
    manager.stop();
}

#[test]
fn blocks_that_are_reassigned_all_the_time_are_found_right_or_not_at_all() {
    reassign(ManagerConfig { batch_blocks: 4, ..with_host(8 << 20) });
    reassign(on_gpus(with_host(8 << 20)));
}

fn reassign(config: ManagerConfig) {
    let manager = manager(config);
    let rank = Rank::open(&manager, 1, EnginePoolMode::Ipc, (0, 1));
    let stop = AtomicBool::new(false);
    // An engine assigns and writes a block in one go.
    let engine = Mutex::new(());
    let mut stored = 0;
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut block = 0;
            while !stop.load(Ordering::SeqCst) {
                block = (block + 7) % BLOCKS;
                // Some are left alone, so that these are stored however long that takes.
                if !block.is_multiple_of(8) {
                    let _engine = engine.lock();
                    rank.write(block, &[block as u8; BLOCK]);
                }
            }
        });
        for round in 0..40 {
            let complete = (0..BLOCKS / 2).map(|at| {
                let (block, hash) = (at * 2, key(round * 1000 + at));
                let _engine = engine.lock();
                rank.write(block, &content(hash, 0));
                StoreBlock { block: rank.block(block), hash, parent: None, retention: None }
            });
            let said = rank.store(complete.collect(), None, false).recv().unwrap();
            stored += said.iter().filter(|verdict| **verdict == Verdict::Stored).count();
        }
        stop.store(true, Ordering::SeqCst);
    });
    assert!(stored > 0);
    let mut found = 0;
    for hash in (0..40).flat_map(|round| (0..BLOCKS / 2).map(move |at| key(round * 1000 + at))) {
        let matched = rank.find(&[hash], 0, true);
        let Some(lease) = matched.matched.lease else { continue };
        assert!(rank.in_slot(&matched.slots[0]) == content(hash, 0), "{hash:?} has other bytes");
        manager.release_lease_of(rank.session, lease, true).unwrap();
        found += 1;
    }
    assert!(found > 0 && found <= stored);
    manager.stop();
}

#[test]
fn a_pool_that_is_opened_anew_waits_until_nothing_touches_its_former_self() {
    let config = ManagerConfig { copy_delay: Duration::from_millis(5), ..with_host(4 << 20) };
    let manager = manager(config);
    let former = Rank::open(&manager, 1, EnginePoolMode::Ipc, (0, 1));
    let keys = chain(30);
    former.store(former.compute(&keys), None, false).recv().unwrap();
    let lease = former.find(&keys, 0, false).matched.lease.unwrap();
    let targets: Vec<_> = (60..90).map(|block| former.block(block)).collect();
    let (send, ended) = mpsc::channel();
    let done = Box::new(move |outcome: Outcome| send.send(outcome.blocks_done).unwrap());
    manager.load(former.session, 1, lease, former.pool, (0, &targets), done).unwrap();
    manager.session_silent(former.session);
    // The copies have ended when it is opened.
    let ticking = manager.clone();
    let ticks = thread::spawn(move || {
        for _ in 0..400 {
            ticking.tick();
            thread::sleep(Duration::from_millis(1));
        }
    });
    let anew = Rank::open(&manager, 1, EnginePoolMode::Ipc, (0, 1));
    assert_eq!(ended.try_recv(), Ok(30));
    assert_eq!(anew.find(&keys, 0, false).matched.host_blocks, 30);
    manager.session_dead(former.session);
    ticks.join().unwrap();
    manager.inspect(Ledger::check_integrity);
    manager.stop();
}

#[test]
fn what_an_engine_has_pinned_is_honoured_by_the_next_daemon_until_it_is_cleared() {
    let kept = Kept::default();
    let former = start(with_host(1 << 20), &kept);
    let rank = Rank::open(&former, 1, EnginePoolMode::Staged, (0, 1));
    let keys = chain(12);
    let blocks = rank.compute(&keys);
    let staged = former.stage(rank.session, rank.namespace, rank.pool, &blocks).unwrap();
    let copied = write_slots(&rank, &blocks, &staged);
    former.finish_staged(rank.session, staged.store, &copied).unwrap();
    let found = rank.find(&keys, 0, true);
    let (lease, pin) = (found.matched.lease.unwrap(), found.pin.clone().unwrap().pin);
    assert!(rank.words.begin_use(pin, lease.0));
    // And it is in the middle of writing others.
    let others: Vec<_> = rank.compute(&(100..103).map(key).collect::<Vec<_>>());
    let writing = former.stage(rank.session, rank.namespace, rank.pool, &others).unwrap();
    assert_eq!(writing.slots.len(), 3);
    let segments = former.shared.host.segments();
    let at = |slot: &StagedSlot| slot.place.offset(rank.opened.slot_stride);
    let scribble = |byte| {
        for slot in &writing.slots {
            segments[slot.place.segment.0 as usize].write(at(slot), &[byte; BLOCK]);
        }
    };
    scribble(1);

    // Not stopped: as if it had been killed.
    let next = start(with_host(1 << 20), &kept);
    let held = |manager: &Manager| {
        manager.inspect(|ledger| {
            let counts = ledger.host_summaries().into_iter().map(|class| class.counts);
            counts.fold((0, 0), |sum, counts| (sum.0 + counts.pinned, sum.1 + counts.filling))
        })
    };
    // The deepest block of the lease, and three places.
    assert_eq!(held(&next), (1, 3));
    let flood = |from: u32| {
        let engine = Rank::open(&next, 200 + from as u8, EnginePoolMode::Ipc, (0, 1));
        for round in 0..3 {
            let keys: Vec<_> = (0..BLOCKS).map(|n| key(from * 1000 + round * BLOCKS + n)).collect();
            let apart = engine.compute(&keys).into_iter().map(|block| StoreBlock { parent: None, ..block });
            let said = engine.store(apart.collect(), None, false).recv().unwrap();
            assert!(said.contains(&Verdict::Stored));
        }
        next.session_dead(engine.session);
        next.tick();
    };
    flood(10);
    for (slot, key) in found.slots.iter().zip(&keys) {
        assert!(rank.in_slot(slot) == content(*key, 0), "{key:?} was promised");
    }
    for slot in &writing.slots {
        let mut bytes = vec![0; BLOCK];
        segments[slot.place.segment.0 as usize].read(at(slot), &mut bytes);
        assert!(bytes == [1; BLOCK], "nobody else uses what is being written");
    }
    rank.words.clear_pin(pin);
    writing.slots.iter().for_each(|slot| rank.words.clear_pin(slot.pin));
    next.tick();
    assert_eq!((held(&next), kept.words.lock().len()), ((0, 0), 0));
    flood(20);
    next.inspect(Ledger::check_integrity);
    [former, next].iter().for_each(Manager::stop);
}
