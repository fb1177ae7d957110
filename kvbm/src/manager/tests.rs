//! The manager on real memory and real threads.

use std::sync::mpsc;

use kvbm_hash::{BaseNamespace, BaseParts, Namespace, SequenceHash, sequence_hashes};
use kvbm_shm::SharedMemory;

use super::*;
use crate::ledger::{BlockRef, CommitBlock, Held, LeaseId, NamespaceId, Owner, Retention};
use crate::tier::{Route, Tier};

mod gpu;
mod peers;

const LAYOUT: PoolLayout = PoolLayout { block_bytes: 8192, block_count: 16 };

fn base() -> BaseNamespace {
    BaseNamespace::new(&BaseParts {
        model: "m",
        revision: "1",
        kv_dtype: "bf16",
        layout: "test",
        tokens_per_block: 4,
        parallel: "tp1",
    })
}

pub(super) struct Engine {
    pub manager: Manager,
    pub session: SessionId,
    pub namespace: NamespaceId,
    digest: Namespace,
    pool: OpenedPool,
    /// Where the pool's blocks are.
    blocks: Arc<SharedMemory>,
}

impl Engine {
    pub fn attach(manager: &Manager, fresh: bool) -> Self {
        Self::attach_on(manager, fresh, "cpu:0")
    }

    pub fn attach_on(manager: &Manager, fresh: bool, device: &str) -> Self {
        let session = manager.open_session(TrustDomain(1));
        let digest = base().namespace(None, None);
        let namespace = manager.register_namespace(session, digest.0, base().0, "", "m").unwrap();
        static NAMES: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(1);
        let uuid = [NAMES.fetch_add(1, Ordering::Relaxed); 16];
        let open = OpenPool {
            base: base().0,
            layout: LAYOUT,
            tokens_per_block: 4,
            device: device.into(),
            fresh,
            uuid,
        };
        let pool = manager.open_pool(session, open).unwrap();
        let blocks = blocks_of(&pool.memory);
        Self { manager: manager.clone(), session, namespace, digest, pool, blocks }
    }

    fn at(&self, block: BlockRef) -> usize {
        self.pool.memory.blocks_offset() + block.block as usize * LAYOUT.stride()
    }

    pub fn keys(&self, tokens: &[u32]) -> Vec<SequenceHash> {
        sequence_hashes(self.digest, 4, tokens)
    }

    pub fn bytes_of(key: SequenceHash) -> Vec<u8> {
        key.0.iter().cycle().take(LAYOUT.block_bytes).copied().collect()
    }

    /// Writes and commits a chain; returns its blocks.
    pub fn compute(&self, keys: &[SequenceHash]) -> Vec<BlockRef> {
        self.compute_kept(keys, Retention::default())
    }

    /// As [`Engine::compute`], to be kept in a certain way.
    pub fn compute_kept(&self, keys: &[SequenceHash], retention: Retention) -> Vec<BlockRef> {
        let blocks = self.granted(keys.len());
        let mut commits = vec![];
        for (i, (block, key)) in blocks.iter().zip(keys).enumerate() {
            self.blocks.write(self.at(*block), &Self::bytes_of(*key));
            let parent = i.checked_sub(1).map(|before| keys[before]);
            commits.push(CommitBlock { block: *block, hash: *key, parent, retention: Some(retention) });
        }
        let (session, namespace, pool) = (self.session, self.namespace, self.pool.pool_id);
        self.manager.commit(session, namespace, pool, &commits).unwrap();
        blocks
    }

    /// Waits for copies in flight, which keep their blocks, if need be.
    pub fn granted(&self, count: usize) -> Vec<BlockRef> {
        let mut blocks = vec![];
        while blocks.len() < count {
            let wanted = count - blocks.len();
            blocks.extend(self.manager.request_grants(self.session, self.pool.pool_id, wanted).unwrap());
        }
        blocks
    }

    pub fn release(&self, blocks: &[BlockRef]) {
        let held: Vec<Held> = blocks.iter().map(|block| Held { block: *block, pins: 1 }).collect();
        self.manager.release(self.session, self.pool.pool_id, &held).unwrap();
    }

    pub fn offloaded(&self, blocks: &[BlockRef]) -> Outcome {
        let (send, receive) = mpsc::channel();
        let done = Box::new(move |outcome| send.send(outcome).unwrap());
        self.manager.offload(self.session, self.pool.pool_id, blocks, done).unwrap();
        receive.recv().unwrap()
    }

    pub fn onboard(&self, lease: LeaseId, targets: &[BlockRef]) -> Result<Outcome, Refused> {
        let (send, receive) = mpsc::channel();
        let done = Box::new(move |outcome| send.send(outcome).unwrap());
        self.manager.onboard(self.session, lease, self.pool.pool_id, targets, done)?;
        Ok(receive.recv().unwrap())
    }

    pub fn check(&self, blocks: &[BlockRef], keys: &[SequenceHash]) {
        let mut bytes = vec![0; LAYOUT.block_bytes];
        for (block, key) in blocks.iter().zip(keys) {
            self.blocks.read(self.at(*block), &mut bytes);
            assert!(bytes == Self::bytes_of(*key), "block {} holds other bytes", block.block);
        }
    }
}

/// The memory that has the blocks of a pool, as its engine maps it.
fn blocks_of(memory: &PoolMemory) -> Arc<SharedMemory> {
    let fd = memory.device().map_or(memory.fd(), |(descriptor, _)| descriptor);
    Arc::new(SharedMemory::from_fd(fd.try_clone_to_owned().unwrap()).unwrap())
}

fn manager(config: ManagerConfig) -> Manager {
    let manager = Manager::start(config).unwrap();
    // Population is quick here; waiting for it keeps the tests about something else.
    while manager.host_bytes().0 != manager.host_bytes().1 {
        std::thread::yield_now();
    }
    manager
}

pub(super) fn with_host(bytes: u64) -> ManagerConfig {
    ManagerConfig { host: HostCapacity::Bytes(bytes), ..ManagerConfig::default() }
}

#[test]
fn blocks_travel_to_host_and_into_another_pool() {
    let manager = manager(with_host(1 << 20));
    let (a, b) = (Engine::attach(&manager, true), Engine::attach(&manager, true));
    let keys = a.keys(&(0..24).collect::<Vec<_>>());
    let blocks = a.compute(&keys);
    assert_eq!(a.offloaded(&blocks), Outcome { blocks_done: 6, blocks_failed: 0, bytes: 0, error: None });
    let matched = manager.match_prefix(b.session, b.namespace, &keys, Some(b.pool.pool_id), &[]).unwrap();
    assert_eq!((matched.device.len(), matched.host_blocks), (0, 6));
    let targets = manager.request_grants(b.session, b.pool.pool_id, 5).unwrap();
    let outcome = b.onboard(matched.lease.unwrap(), &targets).unwrap();
    assert_eq!((outcome.blocks_done, outcome.bytes), (5, 5 * 8192));
    b.check(&targets, &keys);
    let again = manager.match_prefix(b.session, b.namespace, &keys, Some(b.pool.pool_id), &[]).unwrap();
    assert_eq!((again.device.len(), again.host_blocks), (5, 1));
    let counters = manager.counters();
    assert_eq!((counters.blocks(Route::DeviceToHost), counters.blocks(Route::HostToDevice)), (6, 5));
    assert_eq!((counters.bytes(Route::DeviceToHost), counters.matched_tokens()), (6 * 8192, 20));
    assert!((counters.hit_rate(Tier::Host) - 7.0 / 7.0).abs() < 1e-9);
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

#[test]
fn host_sized_in_blocks_is_sized_by_the_first_layout() {
    let manager =
        Manager::start(ManagerConfig { host: HostCapacity::Blocks(32), ..ManagerConfig::default() }).unwrap();
    assert_eq!(manager.host_bytes(), (0, 0));
    let engine = Engine::attach(&manager, true);
    assert_eq!(manager.host_bytes().0, 32 * 8192);
    let keys = engine.keys(&(0..8).collect::<Vec<_>>());
    while manager.host_bytes().0 != manager.host_bytes().1 {
        std::thread::yield_now();
    }
    let blocks = engine.compute(&keys);
    assert_eq!(engine.offloaded(&blocks).blocks_done, 2);
    manager.stop();
}

#[test]
fn without_host_everything_stays_in_the_device() {
    let manager = manager(with_host(0));
    let engine = Engine::attach(&manager, true);
    let keys = engine.keys(&(0..8).collect::<Vec<_>>());
    let blocks = engine.compute(&keys);
    engine.release(&blocks);
    let matched = manager
        .match_prefix(engine.session, engine.namespace, &keys, Some(engine.pool.pool_id), &[])
        .unwrap();
    assert_eq!((matched.device.len(), matched.host_blocks), (2, 0));
    manager.stop();
}

/// Everything works with room for one batch of one block: it only takes longer.
#[test]
fn queues_of_length_one_suffice() {
    let manager = manager(ManagerConfig { queue_depth: 1, batch_blocks: 1, ..with_host(1 << 20) });
    let engine = Engine::attach(&manager, true);
    let keys = engine.keys(&(0..64).collect::<Vec<_>>());
    let blocks = engine.compute(&keys);
    assert_eq!(engine.offloaded(&blocks).blocks_done, 16);
    manager.stop();
}

#[test]
fn a_full_onboard_queue_answers_busy_and_keeps_the_lease() {
    let config =
        ManagerConfig { queue_depth: 1, copy_delay: Duration::from_millis(50), ..with_host(1 << 20) };
    let manager = manager(config);
    let (a, b) = (Engine::attach(&manager, true), Engine::attach(&manager, true));
    let keys = a.keys(&(0..4).collect::<Vec<_>>());
    let blocks = a.compute(&keys);
    a.offloaded(&blocks);
    let targets = manager.request_grants(b.session, b.pool.pool_id, 8).unwrap();
    let (send, receive) = mpsc::channel();
    let mut busy = None;
    for target in &targets {
        let matched = manager.match_prefix(b.session, b.namespace, &keys, None, &[]).unwrap();
        let (lease, send) = (matched.lease.unwrap(), send.clone());
        let done = Box::new(move |outcome| send.send(outcome).unwrap());
        match manager.onboard(b.session, lease, b.pool.pool_id, &[*target], done) {
            Ok(()) => {}
            Err(refused) => {
                assert_eq!(refused, Refused::Busy { queue: "onboard" });
                assert_eq!(manager.release_lease(b.session, lease), Ok(()));
                busy = Some(());
                break;
            }
        }
    }
    drop(send);
    assert!(busy.is_some(), "one running, one waiting, the third is refused");
    assert!(receive.iter().all(|outcome: Outcome| outcome.blocks_done == 1));
    assert!(manager.counters().busy().any(|(queue, count)| queue == "onboard" && count == 1));
    manager.stop();
}

#[test]
fn copies_of_an_older_epoch_do_not_count_and_a_table_is_adopted() {
    let manager = manager(with_host(1 << 20));
    let engine = Engine::attach(&manager, true);
    let keys = engine.keys(&(0..12).collect::<Vec<_>>());
    // The engine goes its own way: what it commits now is in an epoch that the daemon does not know.
    let epoch = engine.pool.memory.raise_epoch();
    let blocks = engine.compute(&keys);
    assert_eq!(engine.offloaded(&blocks).blocks_failed, 3);
    assert_eq!(manager.counters().blocks(Route::DeviceToHost), 0);

    let session = manager.open_session(TrustDomain(1));
    let namespace = manager.register_namespace(session, engine.digest.0, base().0, "", "m").unwrap();
    let entries = keys.iter().zip(&blocks).enumerate().map(|(i, (key, block))| PoolEntry {
        block: BlockRef { generation: block.generation + 7, ..*block },
        namespace,
        hash: *key,
        parent: i.checked_sub(1).map(|before| keys[before]),
        held: i == 0,
        retention: Retention::default(),
    });
    let (send, receive) = mpsc::channel();
    let adopt = AdoptPool {
        memory: PoolMemory::from_fd(engine.pool.memory.fd().try_clone_to_owned().unwrap()).unwrap(),
        epoch,
        base: base().0,
        tokens_per_block: 4,
        device: "cpu:0".into(),
        entries: entries.collect(),
        held: vec![],
    };
    manager.adopt_pool(session, adopt, Box::new(move |opened| send.send(opened).unwrap()));
    let pool = receive.recv().unwrap().unwrap();
    let matched = manager.match_prefix(session, namespace, &keys, Some(pool.pool_id), &[]).unwrap();
    assert_eq!(matched.device.len(), 3);
    assert!(
        manager.request_grants(engine.session, engine.pool.pool_id, 1).is_err(),
        "the former session is over"
    );
    let engine = Engine { session, namespace, pool, ..engine };
    assert_eq!(engine.offloaded(&matched.device).blocks_done, 3);
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

#[test]
fn a_successor_inherits_what_a_dead_worker_left() {
    let manager = manager(with_host(0));
    let first = Engine::attach(&manager, false);
    let keys = first.keys(&(0..12).collect::<Vec<_>>());
    let blocks = first.compute(&keys);
    manager.session_dead(first.session);
    let second = Engine::attach(&manager, false);
    assert!(second.pool.inherited && second.pool.entries.len() == 3);
    let matched = manager
        .match_prefix(second.session, second.namespace, &keys, Some(second.pool.pool_id), &[])
        .unwrap();
    assert_eq!(matched.device, blocks);
    second.check(&matched.device, &keys);
    let third = Engine::attach(&manager, false);
    assert!(!third.pool.inherited);
    manager.stop();
}

/// The engine detached, reused blocks and died before it handed the pool back: nothing is known of it.
#[test]
fn a_pool_whose_epoch_moved_has_no_successor() {
    let manager = manager(with_host(0));
    let first = Engine::attach(&manager, false);
    let blocks = first.compute(&first.keys(&(0..12).collect::<Vec<_>>()));
    first.pool.memory.raise_epoch();
    first.pool.memory.memory().write(LAYOUT.offset(blocks[0].block), b"other bytes");
    manager.session_dead(first.session);
    let second = Engine::attach(&manager, false);
    assert!(!second.pool.inherited && second.pool.entries.is_empty());
    assert_eq!(manager.inspect(|ledger| ledger.pools().count()), 1);
    manager.stop();
}

/// The engine gave up on its first attempt and tries again while a copy of ours is still writing into the pool.
#[test]
fn every_adoption_waits_for_copies_into_the_pool_to_end() {
    let config = ManagerConfig { copy_delay: Duration::from_millis(100), ..with_host(1 << 20) };
    let manager = manager(config);
    let (a, b) = (Engine::attach(&manager, true), Engine::attach(&manager, true));
    let keys = a.keys(&(0..4).collect::<Vec<_>>());
    a.offloaded(&a.compute(&keys));
    let targets = b.granted(1);
    let lease = manager.match_prefix(b.session, b.namespace, &keys, None, &[]).unwrap().lease.unwrap();
    let (send, ends) = mpsc::channel();
    let ended = send.clone();
    let done = Box::new(move |_| ended.send("copy").unwrap());
    manager.onboard(b.session, lease, b.pool.pool_id, &targets, done).unwrap();
    let mut first = [0; 1];
    while first[0] != keys[0].0[0] {
        // Until the copy is under way: from then on it takes its time.
        b.pool.memory.memory().read(LAYOUT.offset(targets[0].block), &mut first);
    }
    let adopt = |epoch| {
        let session = manager.open_session(TrustDomain(1));
        let adopt = AdoptPool {
            memory: PoolMemory::from_fd(b.pool.memory.fd().try_clone_to_owned().unwrap()).unwrap(),
            epoch,
            base: base().0,
            tokens_per_block: 4,
            device: "cpu:0".into(),
            entries: vec![],
            held: vec![],
        };
        let (send, manager) = (send.clone(), manager.clone());
        let looker = manager.clone();
        let done = move |opened: Result<OpenedPool, Error>| {
            let draining =
                looker.inspect(|ledger| ledger.pools().any(|(_, pool)| pool.owner == Owner::Retired));
            let end = if draining { "early" } else { "adopted" };
            send.send(if opened.is_ok() { end } else { "refused" }).unwrap();
        };
        manager.adopt_pool(session, adopt, Box::new(done));
    };
    adopt(b.pool.memory.raise_epoch());
    adopt(b.pool.memory.raise_epoch());
    let order: Vec<&str> = ends.iter().take(3).collect();
    assert!(!order.contains(&"early") && order.contains(&"adopted"), "{order:?}");
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

#[test]
fn adopting_one_pool_leaves_the_former_sessions_others_alone() {
    let manager = manager(with_host(0));
    let first = Engine::attach(&manager, true);
    let other = OpenPool {
        base: base().0,
        layout: LAYOUT,
        tokens_per_block: 4,
        device: "cpu:1".into(),
        fresh: true,
        uuid: [200; 16],
    };
    let other = manager.open_pool(first.session, other).unwrap();
    let session = manager.open_session(TrustDomain(1));
    let adopt = AdoptPool {
        memory: PoolMemory::from_fd(first.pool.memory.fd().try_clone_to_owned().unwrap()).unwrap(),
        epoch: first.pool.memory.raise_epoch(),
        base: base().0,
        tokens_per_block: 4,
        device: "cpu:0".into(),
        entries: vec![],
        held: vec![],
    };
    let (send, receive) = mpsc::channel();
    manager.adopt_pool(session, adopt, Box::new(move |opened| send.send(opened).unwrap()));
    receive.recv().unwrap().unwrap();
    assert_eq!(manager.request_grants(first.session, other.pool_id, 1).unwrap().len(), 1);
    manager.stop();
}

#[test]
fn stopping_answers_everything_that_is_under_way() {
    let config = ManagerConfig { copy_delay: Duration::from_millis(1), ..with_host(1 << 20) };
    let manager = manager(config);
    let engine = Engine::attach(&manager, true);
    let keys = engine.keys(&(0..64).collect::<Vec<_>>());
    let blocks = engine.compute(&keys);
    let (send, receive) = mpsc::channel();
    let done = Box::new(move |outcome: Outcome| send.send(outcome).unwrap());
    manager.offload(engine.session, engine.pool.pool_id, &blocks, done).unwrap();
    manager.stop();
    let outcome = receive.recv().unwrap();
    assert!(outcome.blocks_done + outcome.blocks_failed == 16 || outcome.error == Some(Refused::Closed));
    manager.inspect(Ledger::check_integrity);
}

/// Many threads, a small pool and a small host: nothing is lost, no byte is wrong.
#[test]
fn concurrent_engines_always_read_what_was_stored() {
    concurrent_engines(manager(with_host(24 * 8192)), |_| "cpu:0");
}

fn concurrent_engines(manager: Manager, device_of: fn(u32) -> &'static str) {
    let workers: Vec<_> = (0..4u32)
        .map(|seed| {
            let manager = manager.clone();
            std::thread::spawn(move || {
                let engine = Engine::attach_on(&manager, true, device_of(seed));
                let mut random = seed + 1;
                for round in 0..500_000 {
                    // Copies of a GPU wait until it is known to be idle: until they took part too.
                    if round >= 300 && has_evicted(&manager) {
                        break;
                    }
                    random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    let topic = (random >> 16) % 9;
                    let tokens: Vec<u32> = (0..16).map(|i| topic * 100 + i).collect();
                    let keys = engine.keys(&tokens);
                    let pool = engine.pool.pool_id;
                    let matched = manager
                        .match_prefix(engine.session, engine.namespace, &keys, Some(pool), &[])
                        .unwrap();
                    engine.check(&matched.device, &keys);
                    engine.release(&matched.device);
                    let Some(lease) = matched.lease else {
                        if matched.device.is_empty() {
                            let blocks = engine.compute(&keys);
                            engine.release(&blocks);
                        }
                        continue;
                    };
                    let targets = engine.granted(matched.host_blocks + matched.peer_blocks);
                    let outcome = engine.onboard(lease, &targets).unwrap();
                    assert_eq!(outcome.blocks_done, targets.len());
                    engine.check(&targets, &keys[matched.device.len()..]);
                    engine.release(&targets);
                }
                manager.session_dead(engine.session);
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    manager.stop();
    manager.inspect(|ledger| {
        ledger.check_integrity();
        assert_eq!((ledger.leases(), ledger.quarantined()), (0, 0));
    });
    assert!(has_evicted(&manager));
}

/// Host memory was too small, which is when it is difficult.
fn has_evicted(manager: &Manager) -> bool {
    manager.inspect(|ledger| ledger.evictions(Tier::Host) > 0 || ledger.tally().host_exhausted > 0)
}
