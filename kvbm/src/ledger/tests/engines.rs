//! Random walks with engines that own their memory: ranks that copy by themselves or have the daemon copy, blocks that are
//! assigned anew at any moment, processes that fall silent, come back and die.
//!
//! Bytes are modelled by namespace, key and shard. A copy reads its source when it ends, and makes the target nobody's
//! when it begins. Whatever is resident or leased must have the bytes of all its shards all the time.

use super::*;

const SHARD_BYTES: usize = 2048;
const BLOCKS: u32 = 6;
const HOST_SEGMENT: usize = 4 * 4096;

/// What is in one shard of a host slot, or in a block of a rank.
type Shard = Option<u16>;

struct Rank {
    session: SessionId,
    pool: PoolId,
    alive: bool,
    connected: bool,
    generations: [u32; BLOCKS as usize],
    bytes: [Shard; BLOCKS as usize],
    /// Stores whose slots it is writing: which store, and for each slot where it is, and the block it is copied from.
    writes: Vec<(StoreId, Vec<(Place, BlockRef)>)>,
}

struct Held {
    lease: LeaseId,
    /// Blocks it is about, with their places if it is held.
    keys: Vec<u16>,
    places: Vec<Place>,
    /// Ranks, by their pools, that are not done.
    waiting: Vec<PoolId>,
}

struct Nodes {
    ledger: Ledger,
    now: u64,
    mode: EnginePoolMode,
    shards: u32,
    ranks: Vec<Rank>,
    engines: u8,
    host: HashMap<(Place, u32), Shard>,
    stores: Vec<(StoreBatch, usize, Vec<bool>)>,
    loads: Vec<(LoadBatch, Vec<u16>, u32)>,
    held: Vec<Held>,
    /// Whether generations are compared.
    heeds_generations: bool,
}

#[derive(Debug, Clone)]
enum Op {
    Start,
    /// The engine computes a chain: on each rank, into blocks that are assigned anew.
    Compute(u16, u32),
    /// Of a chain, what a rank still has.
    Store(usize, u16, bool),
    Plan(usize),
    EndStore(usize),
    EndWrite(usize, usize, bool),
    Match(usize, u16, usize, bool),
    Release(usize, usize),
    Whole(usize),
    Load(usize, usize, usize),
    EndLoad(usize),
    Reassign(usize, u32),
    Silence(usize),
    Reopen(usize),
    Kill(usize),
    Tick(u64),
    Segment,
}

fn op() -> impl Strategy<Value = Op> {
    let any = any::<usize>;
    prop_oneof![
        2 => Just(Op::Start),
        8 => (0..KEYS, 0..BLOCKS).prop_map(|(n, at)| Op::Compute(n, at)),
        14 => (any(), 0..KEYS, prop::bool::weighted(0.1)).prop_map(|(r, n, last)| Op::Store(r, n, last)),
        8 => (1usize..4).prop_map(Op::Plan),
        8 => any().prop_map(Op::EndStore),
        8 => (any(), any(), prop::bool::weighted(0.85)).prop_map(|(r, i, ok)| Op::EndWrite(r, i, ok)),
        8 => (any(), 0..KEYS, 0usize..3, prop::bool::ANY).prop_map(|(r, n, skip, hold)| Op::Match(r, n, skip, hold)),
        6 => (any(), any()).prop_map(|(i, r)| Op::Release(i, r)),
        2 => any().prop_map(Op::Whole),
        4 => (any(), any(), 1usize..4).prop_map(|(i, r, n)| Op::Load(i, r, n)),
        4 => any().prop_map(Op::EndLoad),
        6 => (any(), 0..BLOCKS).prop_map(|(r, b)| Op::Reassign(r, b)),
        1 => any().prop_map(Op::Silence),
        1 => any().prop_map(Op::Reopen),
        1 => any().prop_map(Op::Kill),
        3 => (1u64..60).prop_map(Op::Tick),
        1 => Just(Op::Segment),
    ]
}

impl Nodes {
    fn new(mode: EnginePoolMode, shards: u32) -> Self {
        let World { mut ledger, .. } = World::new(Quotas::default());
        ledger.set_segments(Some(SlotsIn::bytes(HOST_SEGMENT)));
        let (ranks, host, stores, loads, held) = Default::default();
        Self {
            ledger,
            now: 0,
            mode,
            shards,
            ranks,
            engines: 0,
            host,
            stores,
            loads,
            held,
            heeds_generations: true,
        }
    }

    fn now(&self) -> Millis {
        Millis(self.now)
    }

    fn identity(&self, engine: u8, rank: u32) -> EnginePoolIdentity {
        EnginePoolIdentity {
            engine: EngineId([engine; 16]),
            mode: self.mode,
            uuid: [7; 16],
            base: base(0),
            domain: TrustDomain(1),
            block_bytes: SHARD_BYTES,
            block_count: BLOCKS,
            shard: rank,
            shard_count: self.shards,
            rank,
            rank_count: self.shards,
            tokens_per_block: TOKENS,
            device: "cpu:0".into(),
        }
    }

    fn namespace(&mut self, session: SessionId) -> NamespaceId {
        let now = self.now();
        self.ledger.register_namespace(session, [1; 32], base(0), "", "m", now).unwrap()
    }

    fn start(&mut self) {
        if self.ranks.iter().any(|rank| rank.alive) {
            return;
        }
        self.engines += 1;
        self.ranks.clear();
        for rank in 0..self.shards {
            let session = self.ledger.open_session(TrustDomain(1));
            self.namespace(session);
            let pool = self.ledger.add_engine_pool(session, self.identity(self.engines, rank)).unwrap();
            self.ranks.push(Rank {
                session,
                pool,
                alive: true,
                connected: true,
                generations: [0; BLOCKS as usize],
                bytes: [None; BLOCKS as usize],
                writes: vec![],
            });
        }
        self.map();
    }

    fn map(&mut self) {
        for rank in self.ranks.iter().filter(|rank| rank.alive && rank.connected) {
            let given = self.ledger.give_segments(rank.session);
            self.ledger.segments_mapped(rank.session, rank.pool, &given).unwrap();
        }
    }

    fn rank(&self, i: usize) -> Option<usize> {
        let serving = |i: &usize| self.ranks[*i].alive && self.ranks[*i].connected;
        (!self.ranks.is_empty()).then(|| i % self.ranks.len()).filter(serving)
    }

    /// From here on the block is somebody else's.
    fn assign(&mut self, rank: usize, block: u32) {
        let rank = &mut self.ranks[rank];
        rank.generations[block as usize] += 1;
        rank.bytes[block as usize] = None;
    }

    fn compute(&mut self, n: u16, at: u32) {
        for rank in 0..self.ranks.len() {
            for (i, n) in path(n).into_iter().enumerate() {
                let block = (at + i as u32) % BLOCKS;
                self.assign(rank, block);
                self.ranks[rank].bytes[block as usize] = Some(n);
            }
        }
    }

    fn store(&mut self, rank: usize, n: u16, rescue_only: bool) {
        let Some(rank) = self.rank(rank) else { return };
        let (session, pool) = (self.ranks[rank].session, self.ranks[rank].pool);
        let namespace = self.namespace(session);
        let chain = path(n);
        let mut blocks = vec![];
        for (i, n) in chain.iter().enumerate() {
            let has = |block: &u32| self.ranks[rank].bytes[*block as usize] == Some(*n);
            let Some(block) = (0..BLOCKS).find(has) else { continue };
            blocks.push(StoreBlock {
                block: BlockRef { block, generation: self.ranks[rank].generations[block as usize] },
                hash: hash(*n),
                parent: i.checked_sub(1).map(|before| hash(chain[before])),
                retention: Some(mixed_retention(*n)),
            });
        }
        let now = self.now();
        let store = self.ledger.begin_store(session, namespace, pool, self.mode).unwrap();
        match self.mode {
            EnginePoolMode::Ipc => {
                self.ledger.register(store, &blocks, rescue_only, now);
                self.ledger.seal_store(store);
            }
            EnginePoolMode::Staged => {
                let slots = self.ledger.stage(store, &blocks, now);
                let verdicts = self.ledger.seal_store(store);
                let written = blocks.iter().zip(&verdicts).filter(|(_, v)| **v == Verdict::Write);
                let sources: Vec<BlockRef> = written.map(|(block, _)| block.block).collect();
                assert_eq!(sources.len(), slots.len());
                for slot in &slots {
                    self.host.insert((slot.place, rank as u32), None);
                }
                if !slots.is_empty() {
                    let places = slots.iter().map(|slot| slot.place).zip(sources).collect();
                    self.ranks[rank].writes.push((store, places));
                }
            }
        }
    }

    fn current(&self, rank: usize, block: BlockRef) -> bool {
        !self.heeds_generations || self.ranks[rank].generations[block.block as usize] == block.generation
    }

    fn plan(&mut self, max: usize) {
        let now = self.now();
        let Some(batch) = self.ledger.next_store(max, now) else { return };
        // Of a rescue, the process is dead but its memory is there.
        let rank = self.ranks.iter().position(|rank| rank.pool == batch.pool).expect("its memory is there");
        let before = batch.copies().map(|copy| self.current(rank, copy.from)).collect();
        for copy in batch.copies() {
            self.host.insert((copy.to, rank as u32), None);
        }
        self.stores.push((batch, rank, before));
    }

    fn end_store(&mut self, i: usize) {
        if self.stores.is_empty() {
            return;
        }
        let (batch, rank, before) = self.stores.swap_remove(i % self.stores.len());
        let mut outcomes = vec![];
        for (copy, before) in batch.copies().zip(before) {
            if before {
                let read = self.ranks[rank].bytes[copy.from.block as usize];
                self.host.insert((copy.to, rank as u32), read);
            }
            let held = before && self.current(rank, copy.from);
            outcomes.push(if held { Copied::Arrived } else { Copied::Stale });
        }
        let now = self.now();
        self.ledger.finish_store(batch, &outcomes, now);
    }

    fn end_write(&mut self, rank: usize, i: usize, ok: bool) {
        let Some(rank) = self.rank(rank) else { return };
        if self.ranks[rank].writes.is_empty() {
            return;
        }
        let count = self.ranks[rank].writes.len();
        let (store, slots) = self.ranks[rank].writes.swap_remove(i % count);
        let mut copied = vec![];
        for (place, from) in slots {
            let arrived = ok && self.current(rank, from);
            let read = self.ranks[rank].bytes[from.block as usize].filter(|_| ok);
            self.host.insert((place, rank as u32), read);
            copied.push(arrived);
        }
        let (session, now) = (self.ranks[rank].session, self.now());
        self.ledger.finish_staged(session, store, &copied, now).unwrap();
    }

    fn check_place(&self, place: Place, n: u16) {
        for shard in 0..self.shards {
            assert_eq!(self.host[&(place, shard)], Some(n), "shard {shard} at {place:?}");
        }
    }

    fn find(&mut self, rank: usize, n: u16, skip: usize, hold: bool) {
        let Some(rank) = self.rank(rank) else { return };
        let session = self.ranks[rank].session;
        let namespace = self.namespace(session);
        let keys = path(n);
        let hashes: Vec<_> = keys.iter().map(|n| hash(*n)).collect();
        let (now, retention) = (self.now(), &[][..]);
        let asks = EngineAsks { hashes: &hashes, skip, hold, retention };
        let found = self.ledger.match_for_engine(session, namespace, asks, now).unwrap();
        let EngineMatch { matched, slots, pin } = found;
        let Some(lease) = matched.lease else {
            assert_eq!((matched.host_blocks, slots.len(), pin), (0, 0, None));
            return;
        };
        let keys = keys[skip..skip + matched.host_blocks].to_vec();
        let places: Vec<Place> = slots.into_iter().map(|(place, _)| place).collect();
        assert_eq!(places.len(), if hold { keys.len() } else { 0 });
        let mut pools: Vec<PoolId> = self.ranks.iter().map(|rank| rank.pool).collect();
        pools.sort();
        if let Some(pin) = &pin {
            assert_eq!((pin.lease, &pin.pools), (lease, &pools));
            assert!(self.held.iter().all(|held| held.lease != lease));
        }
        self.held.push(Held { lease, keys, places, waiting: pools });
    }

    fn release(&mut self, i: usize, rank: usize) {
        let Some(rank) = self.rank(rank).filter(|_| !self.held.is_empty()) else { return };
        let (at, now) = (i % self.held.len(), self.now());
        let (session, pool) = (self.ranks[rank].session, self.ranks[rank].pool);
        let held = &mut self.held[at];
        // It may have ended by its deadline, or with the engine.
        let _ = self.ledger.release_engine_lease(session, held.lease, false, now);
        assert!(self.ledger.take_withdrawn().is_empty(), "one rank's word takes nothing from the others");
        held.waiting.retain(|waiting| *waiting != pool);
        if held.waiting.is_empty() {
            self.held.swap_remove(at);
        }
    }

    fn whole(&mut self, i: usize) {
        let Some(rank) = self.rank(0).filter(|_| !self.held.is_empty()) else { return };
        let (at, now, session) = (i % self.held.len(), self.now(), self.ranks[rank].session);
        let _ = self.ledger.release_engine_lease(session, self.held[at].lease, true, now);
        let held = self.held.swap_remove(at);
        self.take_back();
        assert!(!self.ledger.held_leases().iter().any(|pin| pin.lease == held.lease));
    }

    /// Nobody has begun with what is withdrawn.
    fn take_back(&mut self) {
        let now = self.now();
        for LeasePin { lease, pools, .. } in self.ledger.take_withdrawn() {
            self.held.retain(|held| held.lease != lease);
            pools.into_iter().for_each(|pool| self.ledger.rank_done(lease, pool, now));
        }
    }

    fn load(&mut self, i: usize, rank: usize, count: usize) {
        let Some(rank) = self.rank(rank).filter(|_| !self.held.is_empty()) else { return };
        let held = &self.held[i % self.held.len()];
        let count = count.min(held.keys.len()).min(BLOCKS as usize);
        let first = held.keys.len() - count;
        let targets: Vec<BlockRef> = (0..count as u32)
            .map(|block| BlockRef { block, generation: self.ranks[rank].generations[block as usize] })
            .collect();
        let (session, pool) = (self.ranks[rank].session, self.ranks[rank].pool);
        let Ok(batch) = self.ledger.begin_load(session, held.lease, pool, first, &targets) else { return };
        self.loads.push((batch, held.keys[first..].to_vec(), rank as u32));
    }

    fn check_load(&self, (batch, keys, shard): &(LoadBatch, Vec<u16>, u32)) {
        for ((place, _), n) in batch.copies().iter().zip(keys) {
            assert_eq!(self.host[&(*place, *shard)], Some(*n), "what is loaded stays");
        }
    }

    fn end_load(&mut self, i: usize) {
        if !self.loads.is_empty() {
            let now = self.now();
            let (batch, ..) = self.loads.swap_remove(i % self.loads.len());
            self.ledger.finish_load(batch, now);
        }
    }

    fn silence(&mut self, rank: usize) {
        let Some(rank) = self.rank(rank) else { return };
        self.ranks[rank].connected = false;
        self.ledger.session_silent(self.ranks[rank].session);
    }

    /// A rank whose connection was lost opens its pool anew. What it was writing is still being written.
    fn reopen(&mut self, rank: usize) {
        let lost = self.ranks.iter().position(|rank| rank.alive && !rank.connected);
        let Some(rank) = lost.filter(|_| rank.is_multiple_of(2)) else { return };
        let session = self.ledger.open_session(TrustDomain(1));
        self.namespace(session);
        let identity = self.identity(self.engines, rank as u32);
        if self.ledger.supersede_engine_pool(session, identity.engine, identity.rank).unwrap() {
            let now = self.now();
            self.ledger.session_dead(session, now);
            return;
        }
        let pool = self.ledger.add_engine_pool(session, identity).unwrap();
        let former = std::mem::replace(&mut self.ranks[rank].session, session);
        let now = self.now();
        // All that the former session had is over when its process says so; here it has one process and says so at once.
        self.ranks[rank].writes.clear();
        self.ledger.session_dead(former, now);
        for held in &mut self.held {
            let old = self.ranks[rank].pool;
            held.waiting.retain(|waiting| *waiting != old);
        }
        self.held.retain(|held| !held.waiting.is_empty());
        self.take_back();
        self.ranks[rank].pool = pool;
        self.ranks[rank].connected = true;
        self.map();
    }

    fn kill(&mut self, rank: usize) {
        if self.ranks.is_empty() || self.ranks.iter().all(|rank| !rank.alive) {
            return;
        }
        let rank = rank % self.ranks.len();
        if !std::mem::replace(&mut self.ranks[rank].alive, false) {
            return;
        }
        self.ranks[rank].writes.clear();
        let (session, pool, now) = (self.ranks[rank].session, self.ranks[rank].pool, self.now());
        self.ledger.session_dead(session, now);
        for held in &mut self.held {
            held.waiting.retain(|waiting| *waiting != pool);
        }
        self.held.retain(|held| !held.waiting.is_empty());
        self.take_back();
    }

    fn tick(&mut self, ms: u64) {
        self.now += ms;
        let now = self.now();
        self.ledger.tick(now);
    }

    /// Every block that can be found has the bytes of all its shards; so has every block of a held lease.
    fn check(&self) {
        self.ledger.check_integrity();
        for event in self.ledger.residents_of(Tier::Host) {
            let EventKind::Stored { namespace, key, .. } = event.kind else { unreachable!() };
            assert!(self.ledger.namespace(namespace).is_some());
            let place = self.ledger.host_place(key).expect("it is resident");
            self.check_place(place, u16::from_le_bytes([key.0[0], key.0[1]]));
        }
        for held in &self.held {
            for (place, n) in held.places.iter().zip(&held.keys) {
                self.check_place(*place, *n);
            }
        }
        self.loads.iter().for_each(|load| self.check_load(load));
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Start => self.start(),
            Op::Compute(n, at) => self.compute(*n, *at),
            Op::Store(rank, n, rescue_only) => self.store(*rank, *n, *rescue_only),
            Op::Plan(max) => self.plan(*max),
            Op::EndStore(i) => self.end_store(*i),
            Op::EndWrite(rank, i, ok) => self.end_write(*rank, *i, *ok),
            Op::Match(rank, n, skip, hold) => self.find(*rank, *n, *skip, *hold),
            Op::Release(i, rank) => self.release(*i, *rank),
            Op::Whole(i) => self.whole(*i),
            Op::Load(i, rank, count) => self.load(*i, *rank, *count),
            Op::EndLoad(i) => self.end_load(*i),
            Op::Reassign(rank, block) => {
                if let Some(rank) = self.rank(*rank) {
                    self.assign(rank, *block);
                }
            }
            Op::Silence(rank) => self.silence(*rank),
            Op::Reopen(rank) => self.reopen(*rank),
            Op::Kill(rank) => self.kill(*rank),
            Op::Tick(ms) => self.tick(*ms),
            Op::Segment => {
                let bound: usize = self.ledger.host_summaries().iter().map(|s| s.segments).sum();
                let segments = bound + self.ledger.free_segments();
                if segments < 3 {
                    self.ledger.add_segment(SegmentId(segments as u32));
                }
            }
        }
        self.map();
        self.ledger.take_stored();
        self.ledger.take_filled();
        self.check();
    }

    /// Everybody dies and every copy ends: nothing is held any more.
    fn finish(&mut self) {
        for rank in 0..self.ranks.len() {
            self.kill(rank);
        }
        loop {
            while !self.stores.is_empty() {
                self.end_store(0);
            }
            self.plan(8);
            if self.stores.is_empty() {
                break;
            }
        }
        while !self.loads.is_empty() {
            self.end_load(0);
        }
        self.tick(1_000_000);
        self.check();
        assert_eq!((self.ledger.leases(), self.ledger.filling()), (0, 0));
        assert_eq!(self.ledger.engine_pools().count(), 0);
        for summary in self.ledger.host_summaries() {
            assert_eq!((summary.counts.filling, summary.counts.pinned), (0, 0), "{summary:?}");
        }
    }
}

fn walk(mode: EnginePoolMode, shards: u32, ops: &[Op]) {
    let mut nodes = Nodes::new(mode, shards);
    // Either way, all that holds holds.
    nodes.ledger.config.one_domain = ops.len().is_multiple_of(2);
    nodes.ledger.add_segment(SegmentId(0));
    nodes.start();
    for op in ops {
        // The memory of a dead engine is gone once nothing of it is known.
        let rescued = nodes.ranks.iter().all(|rank| nodes.ledger.engine_pool(rank.pool).is_none());
        if matches!(op, Op::Start) && !rescued {
            continue;
        }
        nodes.apply(op);
    }
    nodes.finish();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn engines_never_find_other_bytes_and_lose_no_slot(
        ipc in any::<bool>(),
        shards in 1u32..3,
        ops in prop::collection::vec(op(), 1..160),
    ) {
        walk(if ipc { EnginePoolMode::Ipc } else { EnginePoolMode::Staged }, shards, &ops);
    }
}

fn reassigned_while_copied(heeds_generations: bool) {
    let mut nodes = Nodes::new(EnginePoolMode::Ipc, 1);
    nodes.heeds_generations = heeds_generations;
    nodes.ledger.add_segment(SegmentId(0));
    nodes.start();
    nodes.compute(1, 0);
    nodes.store(0, 1, false);
    nodes.plan(1);
    nodes.assign(0, 0);
    nodes.end_store(0);
    nodes.check();
    assert_eq!(nodes.ledger.tally().store_verdicts[Verdict::Stale.index()], 1);
}

#[test]
fn a_block_that_is_assigned_anew_while_it_is_copied_is_not_stored() {
    reassigned_while_copied(true);
}

#[test]
#[should_panic(expected = "shard 0")]
fn without_generations_this_test_would_see_it() {
    reassigned_while_copied(false);
}

fn resident(nodes: &Nodes, n: u16) -> usize {
    path(n).iter().take_while(|n| nodes.ledger.host_place(hash(**n)).is_some()).count()
}

#[test]
fn a_block_is_found_when_all_shards_are_there_and_not_before() {
    let mut nodes = Nodes::new(EnginePoolMode::Ipc, 2);
    nodes.ledger.add_segment(SegmentId(0));
    nodes.start();
    nodes.compute(2, 0);
    nodes.store(0, 2, false);
    nodes.plan(8);
    nodes.end_store(0);
    assert_eq!((resident(&nodes, 2), nodes.ledger.filling()), (0, 2));
    nodes.store(1, 2, false);
    nodes.plan(8);
    nodes.end_store(0);
    assert_eq!((resident(&nodes, 2), nodes.ledger.filling()), (2, 0));
    nodes.check();
    nodes.finish();
}

#[test]
fn a_child_whose_shards_come_first_waits_for_its_parent() {
    let mut nodes = Nodes::new(EnginePoolMode::Ipc, 2);
    nodes.ledger.add_segment(SegmentId(0));
    nodes.start();
    nodes.compute(2, 0);
    nodes.store(0, 2, false);
    nodes.store(1, 2, false);
    // One block each: parent and child of rank 0, then of rank 1; the child's ends first.
    (0..4).for_each(|_| nodes.plan(1));
    let of_child = |nodes: &Nodes| {
        let child =
            nodes.stores.iter().position(|(batch, ..)| batch.copies().any(|copy| copy.from.block == 1));
        child.unwrap()
    };
    for _ in 0..2 {
        let at = of_child(&nodes);
        nodes.end_store(at);
    }
    assert_eq!(resident(&nodes, 2), 0);
    nodes.end_store(0);
    nodes.end_store(0);
    assert_eq!(resident(&nodes, 2), 2);
    nodes.finish();
}

#[test]
fn a_shard_that_does_not_come_is_waited_for_only_so_long() {
    for dies in [false, true] {
        let mut nodes = Nodes::new(EnginePoolMode::Ipc, 2);
        nodes.ledger.add_segment(SegmentId(0));
        nodes.start();
        nodes.compute(2, 0);
        nodes.store(0, 2, false);
        nodes.plan(8);
        nodes.end_store(0);
        assert_eq!(nodes.ledger.filling(), 2);
        if dies {
            nodes.kill(1);
            nodes.tick(1);
        } else {
            nodes.tick(10_000);
        }
        assert_eq!((nodes.ledger.filling(), nodes.ledger.tally().store_drops), (0, 2));
        nodes.finish();
    }
}

#[test]
fn what_a_silent_engine_writes_is_not_reused_before_it_is_dead() {
    let mut nodes = Nodes::new(EnginePoolMode::Staged, 1);
    nodes.ledger.add_segment(SegmentId(0));
    nodes.start();
    nodes.compute(2, 0);
    nodes.store(0, 2, false);
    assert_eq!(nodes.ledger.filling(), 2);
    nodes.silence(0);
    nodes.tick(1_000_000);
    assert_eq!((nodes.ledger.filling(), nodes.ledger.quarantined()), (2, 2));
    nodes.kill(0);
    assert_eq!((nodes.ledger.filling(), nodes.ledger.quarantined()), (0, 0));
    nodes.finish();
}

#[test]
fn a_dead_engine_is_rescued_dearest_first_until_the_time_is_up() {
    let mut nodes = Nodes::new(EnginePoolMode::Ipc, 1);
    nodes.ledger.add_segment(SegmentId(0));
    nodes.start();
    // Priorities 35 (n = 1), 80 (n = 2, behind 1) and 10 (n = 3, behind 1).
    nodes.compute(3, 2);
    nodes.compute(2, 0);
    nodes.store(0, 3, true);
    nodes.store(0, 2, true);
    nodes.assign(0, 3);
    nodes.plan(8);
    assert!(nodes.stores.is_empty(), "they are only for a rescue");
    nodes.kill(0);
    nodes.plan(2);
    let batch = &nodes.stores[0].0;
    assert!(batch.rescue);
    // Of the dearest block the one before it goes first.
    assert_eq!(batch.copies().map(|copy| copy.from.block).collect::<Vec<_>>(), [0, 1]);
    nodes.end_store(0);
    nodes.plan(8);
    nodes.end_store(0);
    nodes.check();
    assert_eq!(
        nodes.ledger.tally().store_verdicts[Verdict::Stale.index()],
        1,
        "block 3 was another's already"
    );
    nodes.tick(1);
    assert_eq!((nodes.ledger.engine_pools().count(), nodes.ledger.tally().rescued), (0, 2));
    nodes.finish();

    nodes.start();
    nodes.compute(5, 0);
    nodes.store(0, 5, true);
    nodes.kill(0);
    nodes.tick(3000);
    assert_eq!(nodes.ledger.engine_pools().count(), 0, "the time is up");
    assert!(nodes.ledger.tally().rescue_left > 0);
}

#[test]
fn where_there_is_one_domain_engines_are_given_memory_before_anything_is_in_it() {
    let given = |one_domain: bool| {
        let mut nodes = Nodes::new(EnginePoolMode::Staged, 1);
        nodes.ledger.config.one_domain = one_domain;
        (0..3).for_each(|segment| nodes.ledger.add_segment(SegmentId(segment)));
        let session = nodes.ledger.open_session(TrustDomain(1));
        assert_eq!(nodes.ledger.give_segments(session), [], "it has no pool");
        nodes.namespace(session);
        nodes.ledger.add_engine_pool(session, nodes.identity(1, 0)).unwrap();
        let first = nodes.ledger.give_segments(session);
        nodes.ledger.add_segment(SegmentId(3));
        (first, nodes.ledger.give_segments(session), nodes.ledger.give_segments(session))
    };
    assert_eq!(given(false), (vec![SegmentId(2)], vec![], vec![]));
    let all = vec![SegmentId(2), SegmentId(1), SegmentId(0)];
    assert_eq!(given(true), (all, vec![SegmentId(3)], vec![]));
}

#[test]
fn memory_that_processes_of_one_domain_have_mapped_is_not_given_to_another() {
    let mut nodes = Nodes::new(EnginePoolMode::Staged, 1);
    nodes.ledger.add_segment(SegmentId(0));
    nodes.start();
    let stranger = nodes.ledger.open_session(TrustDomain(2));
    let digest = [9; 32];
    let now = nodes.now();
    let id = nodes.ledger.register_namespace(stranger, digest, base(0), "", "m", now).unwrap();
    let theirs =
        EnginePoolIdentity { domain: TrustDomain(2), mode: EnginePoolMode::Ipc, ..nodes.identity(77, 0) };
    let pool = nodes.ledger.add_engine_pool(stranger, theirs).unwrap();
    let store_there = |nodes: &mut Nodes| {
        let store = nodes.ledger.begin_store(stranger, id, pool, EnginePoolMode::Ipc).unwrap();
        let block = BlockRef { block: 0, generation: 0 };
        let block = StoreBlock { block, hash: hash(1), parent: None, retention: None };
        nodes.ledger.register(store, &[block], false, nodes.now());
        nodes.ledger.seal_store(store);
        nodes.ledger.next_store(1, nodes.now())
    };
    assert!(store_there(&mut nodes).is_none(), "all memory is in the other domain's hands");
    nodes.kill(0);
    let batch = store_there(&mut nodes).expect("nobody has it any more");
    nodes.ledger.finish_store(batch, &[Copied::Failed], now);
}
