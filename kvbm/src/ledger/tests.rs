//! Random walks of the whole ledger against a world that keeps, for every place, which block's bytes are in it.
//!
//! Bytes are modelled by the key they belong to. Engines scribble over a block as soon as it is granted, copies read
//! their source both when they are planned and when they end: whatever the ledger reuses too early is seen.

mod cases;
mod disk_walk;
mod engines;
mod node;
mod nodes;
mod pins;
mod pressure;
mod quotas;
mod retention;
mod speed;
mod walk;
mod world_checks;

use std::collections::{HashMap, HashSet};

use kvbm_shm::PoolLayout;
use proptest::prelude::*;
use walk::Op;

use super::*;

const TOKENS: u32 = 32;
const KEYS: u16 = 40;
/// Of the namespaces of each worker.
const TENANTS: [&str; 2] = ["limited", "guaranteed"];

/// Keys form a forest: the parent of n is n / 2; 0 and 1 are first blocks.
fn path(n: u16) -> Vec<u16> {
    let mut path: Vec<u16> = std::iter::successors(Some(n), |n| (*n > 1).then_some(n / 2)).collect();
    path.reverse();
    path
}

fn hash(n: u16) -> SequenceHash {
    let mut hash = [9; 16];
    hash[..2].copy_from_slice(&n.to_le_bytes());
    SequenceHash(hash)
}

/// What is written somewhere: model, namespace digest and key of a block.
type Bytes = Option<([u8; 32], u16)>;

struct Worker {
    session: SessionId,
    pool: PoolId,
    model: u8,
    namespaces: [([u8; 32], NamespaceId); 2],
    /// Blocks granted and not committed.
    granted: Vec<BlockRef>,
    /// Pins on committed blocks.
    pins: HashMap<BlockRef, u32>,
    leases: Vec<(LeaseId, usize, Vec<u16>, usize)>,
    /// Targets of onboards whose end the engine has not seen.
    loading: HashSet<BlockRef>,
}

struct World {
    ledger: Ledger,
    /// How the block of each key is committed.
    retention: fn(u16) -> Retention,
    now: u64,
    workers: Vec<Worker>,
    device: HashMap<(PoolId, u32), Bytes>,
    host: HashMap<(u32, usize), Bytes>,
    offloads: Vec<(OffloadBatch, Vec<Bytes>)>,
    onboards: Vec<(OnboardBatch, Vec<Bytes>, SessionId, Vec<BlockRef>)>,
    disk: HashMap<(u32, usize), Bytes>,
    demotes: Vec<(DemoteBatch, Vec<Bytes>)>,
    promotes: Vec<(PromoteBatch, Vec<Bytes>)>,
    scrubs: Vec<ScrubItem>,
    disk_segments: u32,
    /// Pinned blocks in host and on disk after the last step.
    pinned: HashSet<(Tier, Key)>,
    /// The last step damaged blocks, or restarted the disk.
    may_lose_pinned: bool,
    resident: HashSet<(Tier, Option<PoolId>, NamespaceId, SequenceHash)>,
    segments: u32,
    /// Pools can be copied into each other.
    peers: bool,
}

fn quotas() -> Quotas {
    let limit = TierQuota { min_bytes: 0, max_bytes: Some(5 * 4096) };
    let floor = TierQuota { min_bytes: 2 * 4096, max_bytes: None };
    let of = |quota| TenantQuota { device: quota, host: quota, disk: quota };
    let quotas = [(TENANTS[0].to_owned(), of(limit)), (TENANTS[1].to_owned(), of(floor))];
    Quotas { tenants: quotas.into() }
}

/// Different for each key, so that tiers hold all kinds.
fn mixed_retention(n: u16) -> Retention {
    let duration = (n.is_multiple_of(3)).then(|| Duration::from_millis(u64::from(n) * 5));
    Retention { priority: [35, 35, 80, 10][usize::from(n % 4)], duration }
}

fn base(model: u8) -> [u8; 32] {
    [100 + model; 32]
}

fn layout(model: u8) -> PoolLayout {
    PoolLayout { block_bytes: 4096 * (1 + usize::from(model)), block_count: 8 }
}

impl World {
    fn new(quotas: Quotas) -> Self {
        let config = LedgerConfig {
            lease: Duration::from_millis(40),
            orphan_pools_max: 2,
            orphan_pool_ttl: Duration::from_millis(200),
            secret: 11,
            offload_priority_min: 0,
            disk: DiskRules {
                admission: AdmissionRules { frequency_filter: false, priority_min: 0, bytes_per_day: None },
                idle: Millis(5),
                high_water: 0.5,
            },
            policy: PolicyKind::Lru,
            quotas,
            pin_budget_bytes: 12 * 4096,
            rescue: Duration::from_secs(3),
            shard_wait: Duration::from_secs(10),
            one_domain: false,
        };
        let mut ledger = Ledger::new(config);
        ledger.set_segments(Some(SlotsIn::bytes(4 * 4096)));
        Self {
            ledger,
            retention: |_| Retention::default(),
            now: 0,
            workers: vec![],
            device: HashMap::new(),
            host: HashMap::new(),
            offloads: vec![],
            onboards: vec![],
            disk: HashMap::new(),
            demotes: vec![],
            promotes: vec![],
            scrubs: vec![],
            disk_segments: 0,
            pinned: HashSet::new(),
            may_lose_pinned: false,
            resident: HashSet::new(),
            segments: 0,
            peers: false,
        }
    }

    fn worker(&mut self, i: usize) -> Option<usize> {
        (!self.workers.is_empty()).then(|| i % self.workers.len())
    }

    fn namespaces(&mut self, session: SessionId, model: u8) -> [([u8; 32], NamespaceId); 2] {
        [0, 1].map(|salt| {
            let digest = [model * 2 + salt + 1; 32];
            let id = self.ledger.register_namespace(
                session,
                digest,
                base(model),
                TENANTS[usize::from(salt)],
                "m",
                Millis(self.now),
            );
            (digest, id.expect("there is room for namespaces"))
        })
    }

    fn identity(model: u8, domain: u32, uuid: u8) -> PoolIdentity {
        PoolIdentity {
            uuid: [uuid; 16],
            base: base(model),
            domain: TrustDomain(domain),
            layout: layout(model),
            tokens_per_block: TOKENS,
            device: "cpu:0".into(),
        }
    }

    fn new_worker(&mut self, model: u8, domain: u32, inherit: bool) {
        if self.workers.len() >= 4 {
            return;
        }
        let session = self.ledger.open_session(TrustDomain(domain));
        let namespaces = self.namespaces(session, model);
        let fits = |identity: &PoolIdentity| identity.base == base(model);
        let inherited = if inherit {
            self.ledger.inherit_pool(session, fits).expect("the session is there")
        } else {
            None
        };
        let uuid = self.ledger.last_pool as u8 + 1;
        let pool = inherited.unwrap_or_else(|| {
            self.ledger
                .add_pool(session, Self::identity(model, domain, uuid), 1)
                .expect("same size as before")
        });
        self.connect(pool);
        for entry in self.ledger.entries(pool) {
            assert!(!entry.held, "nothing of a dead worker is held");
            self.check_device(pool, entry.block.block, entry.namespace, entry.hash);
        }
        let (granted, pins, leases, loading) = Default::default();
        self.workers.push(Worker { session, pool, model, namespaces, granted, pins, leases, loading });
    }

    fn check_device(&self, pool: PoolId, block: u32, namespace: NamespaceId, hash: SequenceHash) {
        let digest = self.ledger.namespace(namespace).expect("residents have a namespace").digest;
        let n = u16::from_le_bytes([hash.0[0], hash.0[1]]);
        assert_eq!(self.device[&(pool, block)], Some((digest, n)), "{pool:?} block {block}");
    }

    fn compute(&mut self, i: usize, namespace: usize, n: u16) {
        let worker = &mut self.workers[i];
        let Some(block) = worker.granted.pop() else { return };
        let (digest, id) = worker.namespaces[namespace];
        self.device.insert((worker.pool, block.block), Some((digest, n)));
        let parent = path(n).iter().rev().nth(1).map(|n| hash(*n));
        let retention = Some((self.retention)(n));
        let commit = CommitBlock { block, hash: hash(n), parent, retention };
        let (session, pool) = (worker.session, worker.pool);
        assert_eq!(self.ledger.commit(session, id, pool, &[commit], Millis(self.now)), Ok(()));
        // Committed or private: either way it is held by one pin.
        *self.workers[i].pins.entry(block).or_default() += 1;
        let late = CommitBlock {
            block: BlockRef { generation: block.generation.wrapping_sub(1), ..block },
            ..commit
        };
        assert!(self.ledger.commit(session, id, pool, &[late], Millis(self.now)).is_err());
    }

    fn find(&mut self, i: usize, namespace: usize, n: u16) {
        let worker = &self.workers[i];
        let (digest, id) = worker.namespaces[namespace];
        let keys = path(n);
        let hashes: Vec<_> = keys.iter().map(|n| hash(*n)).collect();
        let (session, pool, now) = (worker.session, worker.pool, Millis(self.now));
        let said = [Some(Retention { priority: 60, duration: None }); 2];
        let said = if n.is_multiple_of(5) { &said[..] } else { &[] };
        let matched = self.ledger.match_prefix(session, id, &hashes, Some(pool), said, now);
        let matched = matched.expect("all is registered");
        for (block, n) in matched.device.iter().zip(&keys) {
            assert_eq!(self.device[&(pool, block.block)], Some((digest, *n)), "a match is what it says");
            *self.workers[i].pins.entry(*block).or_default() += 1;
        }
        assert_eq!(matched.lease.is_some(), matched.host_blocks + matched.peer_blocks > 0);
        assert!(matched.host_blocks == 0 || matched.peer_blocks == 0);
        if let Some(lease) = matched.lease {
            let first = matched.device.len();
            self.workers[i].leases.push((lease, namespace, keys, first));
        }
    }

    fn onboard(&mut self, i: usize, count: usize) {
        let worker = &mut self.workers[i];
        let Some((lease, namespace, keys, first)) = worker.leases.pop() else { return };
        let count = count.min(worker.granted.len());
        let targets: Vec<BlockRef> = worker.granted.drain(worker.granted.len() - count..).collect();
        let (session, pool, digest) = (worker.session, worker.pool, worker.namespaces[namespace].0);
        match self.ledger.begin_onboard(session, lease, pool, &targets, Millis(self.now)) {
            Ok(batch) => {
                let bytes: Vec<Bytes> = batch.copies().map(|(from, _)| self.source(&batch, from)).collect();
                let expected: Vec<Bytes> =
                    keys[first..].iter().take(count).map(|n| Some((digest, *n))).collect();
                assert_eq!(bytes, expected, "a lease is about the blocks that were matched");
                self.workers[i].loading.extend(&targets);
                self.onboards.push((batch, bytes, session, targets));
            }
            Err(_) => self.workers[i].granted.extend(targets),
        }
    }

    /// The bytes that an onboard is about to copy.
    fn source(&self, batch: &OnboardBatch, from: OnboardFrom) -> Bytes {
        match (from, batch.peer) {
            (OnboardFrom::Host(place), None) => self.host[&(place.segment.0, place.offset(batch.stride()))],
            (OnboardFrom::Peer(block), Some(peer)) => self.device[&(peer.pool, block)],
            (from, peer) => panic!("{from:?} of {peer:?}"),
        }
    }

    /// If pools of this world can be copied into each other.
    fn connect(&mut self, pool: PoolId) {
        let others: Vec<PoolId> = self.ledger.pools().map(|(id, _)| id).filter(|id| *id != pool).collect();
        others.into_iter().filter(|_| self.peers).for_each(|other| self.ledger.connect_pools(pool, other));
    }

    fn plan(&mut self, max: usize) {
        if let Some(batch) = self.ledger.next_offload(max, Millis(self.now)) {
            assert!(batch.copies().len() <= max);
            let bytes: Vec<Bytes> =
                batch.copies().map(|(block, _)| self.device[&(batch.pool, block)]).collect();
            // A slot that is being filled holds nothing.
            batch.copies().for_each(|(_, place)| {
                self.host.insert((place.segment.0, place.offset(batch.stride())), None);
            });
            self.offloads.push((batch, bytes));
        }
    }

    fn end_offload(&mut self, i: usize, ok: bool) {
        if self.offloads.is_empty() {
            return;
        }
        // In order, as the copy thread works: only the outcome is free.
        let _ = i;
        let (batch, planned) = self.offloads.remove(0);
        if ok {
            for ((block, place), planned) in batch.copies().zip(&planned) {
                let now = self.device[&(batch.pool, block)];
                assert_eq!(now, *planned, "a source changed while it was copied");
                self.host.insert((place.segment.0, place.offset(batch.stride())), now);
            }
        }
        self.ledger.finish_offload(batch, ok, Millis(self.now));
    }

    fn end_onboard(&mut self, i: usize, ok: bool) {
        if self.onboards.is_empty() {
            return;
        }
        let (batch, planned, session, targets) = self.onboards.remove(i % self.onboards.len());
        for ((from, block), planned) in batch.copies().zip(&planned) {
            let now = self.source(&batch, from);
            assert_eq!(now, *planned, "a leased block changed");
            if ok {
                self.device.insert((batch.pool, block), now);
            }
        }
        let mut batch = batch;
        let part = batch.take_part(i % 3);
        self.ledger.finish_onboard_part(part, ok, Millis(self.now));
        self.ledger.check_integrity();
        self.ledger.finish_onboard(batch, ok, Millis(self.now));
        if let Some(worker) = self.workers.iter_mut().find(|worker| worker.session == session) {
            for target in targets {
                worker.loading.remove(&target);
                if ok {
                    *worker.pins.entry(target).or_default() += 1;
                } else {
                    worker.granted.push(target);
                }
            }
        }
    }

    /// The engine goes on alone for a while, then comes back with its table: a new session, the same memory.
    fn reattach(&mut self, i: usize) {
        let worker = &self.workers[i];
        if !worker.loading.is_empty() || worker.leases.len() > 2 {
            return;
        }
        let (old_session, old_pool, model) = (worker.session, worker.pool, worker.model);
        // Batches in flight must have ended before the engine is answered.
        while let Some(at) = self.offloads.iter().position(|(batch, _)| batch.pool == old_pool) {
            let _ = at;
            self.end_offload(0, false);
        }
        let reads = |(batch, ..): &(OnboardBatch, Vec<Bytes>, SessionId, Vec<BlockRef>)| {
            batch.peer.is_some_and(|peer| peer.pool == old_pool)
        };
        while let Some(at) = self.onboards.iter().position(reads) {
            self.end_onboard(at, false);
        }
        let identity = self.ledger.pool(old_pool).expect("its worker lives").identity.clone();
        let entries = self.ledger.entries(old_pool);
        let held = self.workers[i].granted.clone();
        let entry_blocks: HashSet<BlockRef> = entries.iter().map(|entry| entry.block).collect();
        let private: Vec<BlockRef> =
            self.workers[i].pins.keys().filter(|block| !entry_blocks.contains(block)).copied().collect();
        self.ledger.retire_pool(old_pool);
        self.ledger.session_dead(old_session, Millis(self.now));
        assert!(self.ledger.is_gone(old_pool));
        let session = self.ledger.open_session(identity.domain);
        let namespaces = self.namespaces(session, model);
        let pool = self.ledger.add_pool(session, identity, 2).expect("same size as before");
        self.connect(pool);
        for block in 0..layout(model).block_count {
            let bytes = self.device.get(&(old_pool, block)).copied().unwrap_or(None);
            self.device.insert((pool, block), bytes);
        }
        let entries: Vec<PoolEntry> = entries
            .into_iter()
            .map(|entry| {
                let digest = self.device[&(pool, entry.block.block)].expect("entries have bytes").0;
                let (_, id) = namespaces.iter().find(|(d, _)| *d == digest).expect("of this model");
                PoolEntry { namespace: *id, held: self.workers[i].pins.contains_key(&entry.block), ..entry }
            })
            .collect();
        let kept: Vec<BlockRef> = held.iter().chain(&private).copied().collect();
        self.ledger
            .adopt_entries(session, pool, &entries, &kept, Millis(self.now))
            .expect("the table is sound");
        let worker = &mut self.workers[i];
        (worker.session, worker.pool, worker.namespaces) = (session, pool, namespaces);
        worker.leases.clear();
        worker.pins.values_mut().for_each(|pins| *pins = 1);
        let beyond = BlockRef { block: 99, generation: 0 };
        let twice = self.ledger.adopt_entries(session, pool, &[], &[beyond], Millis(self.now));
        assert!(twice.is_err(), "blocks out of range are refused");
    }
}
