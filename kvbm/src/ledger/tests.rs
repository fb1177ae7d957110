//! Random walks of the whole ledger against a world that keeps, for every place, which block's bytes are in it.
//!
//! Bytes are modelled by the key they belong to. Engines scribble over a block as soon as it is granted, copies read
//! their source both when they are planned and when they end: whatever the ledger reuses too early is seen.

mod cases;
mod engines;
mod node;
mod pins;
mod pressure;
mod quotas;
mod retention;
mod speed;

use std::collections::{HashMap, HashSet};

use kvbm_shm::PoolLayout;
use proptest::prelude::*;

use super::*;

const TOKENS: u32 = 32;
const KEYS: u16 = 40;

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
}

#[derive(Debug, Clone)]
enum Op {
    NewWorker {
        model: u8,
        domain: u32,
        inherit: bool,
    },
    Grant(usize, usize),
    Compute {
        worker: usize,
        namespace: usize,
        key: u16,
    },
    Chain {
        worker: usize,
        namespace: usize,
        key: u16,
    },
    Release(usize, usize),
    Match {
        worker: usize,
        namespace: usize,
        key: u16,
    },
    Onboard(usize, usize),
    ReleaseLease(usize),
    Plan(usize),
    EndOffload(usize, bool),
    EndOnboard(usize, bool),
    Kill(usize),
    Reattach(usize),
    Tick(u64),
    Segment,
    DiskSegment,
    DiskService(bool),
    Demote(usize),
    EndDemote(u64),
    /// A chain that is computed, let go of, and all the way down to disk.
    Sink {
        worker: usize,
        namespace: usize,
        key: u16,
    },
    /// Something that was written to disk at some time.
    Promote {
        block: usize,
        batch: usize,
    },
    EndPromote(u64),
    Pin {
        worker: usize,
        namespace: usize,
        key: u16,
        ms: u64,
        prefix: bool,
    },
    Unpin(usize),
    Scrub(usize),
    EndScrub(usize, bool),
    RestartDisk(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let worker = 0usize..4;
    prop_oneof![
        1 => (0u8..2, 1u32..3, any::<bool>())
            .prop_map(|(model, domain, inherit)| Op::NewWorker { model, domain, inherit }),
        4 => (worker.clone(), 1usize..5).prop_map(|(w, n)| Op::Grant(w, n)),
        8 => (worker.clone(), 0usize..2, 0..KEYS)
            .prop_map(|(worker, namespace, key)| Op::Compute { worker, namespace, key }),
        6 => (worker.clone(), 0usize..2, 0..KEYS)
            .prop_map(|(worker, namespace, key)| Op::Chain { worker, namespace, key }),
        16 => (worker.clone(), any::<usize>()).prop_map(|(w, i)| Op::Release(w, i)),
        6 => (worker.clone(), 0usize..2, 0..KEYS)
            .prop_map(|(worker, namespace, key)| Op::Match { worker, namespace, key }),
        5 => (worker.clone(), 1usize..5).prop_map(|(w, n)| Op::Onboard(w, n)),
        1 => worker.clone().prop_map(Op::ReleaseLease),
        10 => (1usize..5).prop_map(Op::Plan),
        6 => (any::<usize>(), prop::bool::weighted(0.85)).prop_map(|(i, ok)| Op::EndOffload(i, ok)),
        5 => (any::<usize>(), prop::bool::weighted(0.85)).prop_map(|(i, ok)| Op::EndOnboard(i, ok)),
        1 => worker.clone().prop_map(Op::Kill),
        1 => worker.prop_map(Op::Reattach),
        1 => (1u64..60).prop_map(Op::Tick),
        1 => Just(Op::Segment),
        1 => Just(Op::DiskSegment),
        1 => prop::bool::weighted(0.8).prop_map(Op::DiskService),
        8 => (1usize..5).prop_map(Op::Demote),
        6 => any::<u64>().prop_map(Op::EndDemote),
        8 => (0usize..4, 0usize..2, 0..KEYS)
            .prop_map(|(worker, namespace, key)| Op::Sink { worker, namespace, key }),
        6 => (any::<usize>(), 1usize..4).prop_map(|(block, batch)| Op::Promote { block, batch }),
        6 => any::<u64>().prop_map(Op::EndPromote),
        3 => (0usize..4, 0usize..2, 0..KEYS, 1u64..100, any::<bool>()).prop_map(
            |(worker, namespace, key, ms, prefix)| Op::Pin { worker, namespace, key, ms, prefix }
        ),
        1 => any::<usize>().prop_map(Op::Unpin),
        1 => (1usize..4).prop_map(Op::Scrub),
        2 => (any::<usize>(), prop::bool::weighted(0.7)).prop_map(|(i, ok)| Op::EndScrub(i, ok)),
        1 => any::<u64>().prop_map(Op::RestartDisk),
    ]
}

/// Of the namespaces of each worker.
const TENANTS: [&str; 2] = ["limited", "guaranteed"];

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
        assert_eq!(matched.lease.is_some(), matched.host_blocks > 0);
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
                let bytes: Vec<Bytes> = batch
                    .copies()
                    .map(|(place, _)| self.host[&(place.segment.0, place.offset(batch.stride()))])
                    .collect();
                let expected: Vec<Bytes> =
                    keys[first..].iter().take(count).map(|n| Some((digest, *n))).collect();
                assert_eq!(bytes, expected, "a lease is about the blocks that were matched");
                self.workers[i].loading.extend(&targets);
                self.onboards.push((batch, bytes, session, targets));
            }
            Err(_) => self.workers[i].granted.extend(targets),
        }
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
        for ((place, block), planned) in batch.copies().zip(&planned) {
            let now = self.host[&(place.segment.0, place.offset(batch.stride()))];
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

    fn demote(&mut self, blocks: usize) {
        let limit = BatchLimit { blocks, bytes: usize::MAX };
        let batch = self.ledger.next_demote(limit, Millis(self.now));
        for (bound, _) in self.ledger.take_bound(Tier::Disk) {
            self.disk.retain(|(segment, _), _| *segment != bound.0);
        }
        let Some(batch) = batch else { return };
        assert!((1..=blocks).contains(&batch.copies().len()));
        let stride = batch.stride();
        let host = |copy: &DemoteCopy| self.host[&(copy.from.segment.0, copy.from.offset(stride))];
        let bytes: Vec<Bytes> = batch.copies().map(|copy| host(&copy)).collect();
        for (copy, bytes) in batch.copies().zip(&bytes) {
            let n = u16::from_le_bytes([copy.key.0[0], copy.key.0[1]]);
            assert_eq!(*bytes, Some((copy.namespace, n)), "what is written is what it is called");
            self.disk.insert((copy.to.segment.0, copy.to.offset(stride)), None);
        }
        self.demotes.push((batch, bytes));
    }

    fn end_demote(&mut self, outcomes: u64) {
        if self.demotes.is_empty() {
            return;
        }
        let (batch, planned) = self.demotes.remove(0);
        let written: Vec<bool> = (0..planned.len()).map(|i| outcomes >> i & 3 != 0).collect();
        for ((copy, planned), written) in batch.copies().zip(planned).zip(&written) {
            let now = self.host[&(copy.from.segment.0, copy.from.offset(batch.stride()))];
            assert_eq!(now, planned, "a source changed while it was written");
            if *written {
                self.disk.insert((copy.to.segment.0, copy.to.offset(batch.stride())), now);
            }
        }
        self.ledger.finish_demote(batch, &written, Millis(self.now));
    }

    fn promote(&mut self, i: usize, namespace: usize, n: u16, blocks: usize) {
        let worker = &self.workers[i];
        let (session, (digest, id)) = (worker.session, worker.namespaces[namespace]);
        let hashes: Vec<_> = path(n).into_iter().map(hash).collect();
        let found =
            self.ledger.find_prefix(session, id, &hashes, Millis(self.now)).expect("all is registered");
        let limit = BatchLimit { blocks, bytes: usize::MAX };
        let batches = self.ledger.begin_promote(session, id, &hashes, limit, Millis(self.now));
        let batches = batches.expect("all is registered");
        let planned: usize = batches.iter().map(|batch| batch.copies().len()).sum();
        assert!(planned <= found.disk_blocks);
        for batch in batches {
            assert!(batch.copies().len() <= blocks && batch.namespace() == digest);
            let place = |place: Place| (place.segment.0, place.offset(batch.stride()));
            let bytes: Vec<Bytes> = batch.copies().map(|copy| self.disk[&place(copy.from)]).collect();
            for (copy, bytes) in batch.copies().zip(&bytes) {
                let n = u16::from_le_bytes([copy.key.0[0], copy.key.0[1]]);
                assert_eq!(*bytes, Some((digest, n)), "disk holds what is promoted");
                self.host.insert(place(copy.to), None);
            }
            self.promotes.push((batch, bytes));
        }
    }

    fn end_promote(&mut self, outcomes: u64) {
        if self.promotes.is_empty() {
            return;
        }
        let (batch, planned) = self.promotes.remove(0);
        let mut promoted = Vec::new();
        for (i, (copy, planned)) in batch.copies().zip(planned).enumerate() {
            let now = self.disk[&(copy.from.segment.0, copy.from.offset(batch.stride()))];
            assert_eq!(now, planned, "a source changed while it was read");
            promoted.push(match outcomes >> (2 * i) & 15 {
                0 => Promoted::Corrupt,
                1 => Promoted::Failed,
                _ => {
                    self.host.insert((copy.to.segment.0, copy.to.offset(batch.stride())), now);
                    Promoted::Arrived
                }
            });
        }
        self.ledger.finish_promote(batch, &promoted, Millis(self.now));
    }

    fn end_scrub(&mut self, i: usize, intact: bool) {
        if !self.scrubs.is_empty() {
            let item = self.scrubs.remove(i % self.scrubs.len());
            let n = u16::from_le_bytes([item.key.0[0], item.key.0[1]]);
            let bytes = self.disk[&(item.place.segment.0, item.place.offset(item.stride()))];
            assert_eq!(bytes, Some((item.namespace, n)), "disk holds what is looked at");
            self.ledger.finish_scrub(vec![(item, intact)], Millis(self.now));
        }
    }

    /// The disk goes away and comes back with what was on it, but for some blocks.
    fn restart_disk(&mut self, lost: u64) {
        if self.disk_segments == 0 || !self.ledger.drop_disk() {
            return;
        }
        self.follow_events();
        let mut classes = HashMap::new();
        for ((segment, offset), bytes) in &self.disk {
            let (digest, n) = match bytes {
                Some((digest, n)) if lost >> (n % 64) & 1 == 0 => (*digest, *n),
                _ => continue,
            };
            // Digests tell the model, and so the size of blocks; the domain is not in the bytes.
            let stride = layout((digest[0] - 1) / 2).stride();
            let class = Class { domain: TrustDomain(1), stride };
            let found = classes.entry(*segment).or_insert_with(|| (class, Vec::new()));
            if found.0 == class && offset % stride == 0 {
                found.1.push(FoundBlock {
                    namespace: digest,
                    index: (offset / stride) as u32,
                    key: hash(n),
                    parent: path(n).iter().rev().nth(1).map(|n| hash(*n)),
                    retention: Retention { priority: 50, duration: None },
                    stored: u64::from(n),
                });
            }
        }
        let slots_in = SlotsIn::bytes(4 * 4096);
        self.ledger.add_disk(slots_in.clone());
        let found: Vec<FoundSegment> = classes
            .into_iter()
            .map(|(segment, (class, blocks))| FoundSegment { segment: SegmentId(segment), class, blocks })
            .collect();
        let known: HashSet<SegmentId> = found.iter().map(|found| found.segment).collect();
        let names = self.ledger.name_found(&found, Millis(self.now));
        let tables = names.tables(found, &slots_in);
        self.ledger.install_found(Tier::Disk, names, tables);
        for event in self.ledger.residents_of(Tier::Disk) {
            if let EventKind::Stored { namespace, key, .. } = event.kind {
                self.resident.insert((event.tier, event.pool, namespace, key));
            }
        }
        for segment in (0..self.disk_segments).map(SegmentId).filter(|id| !known.contains(id)) {
            self.disk.retain(|(of, _), _| *of != segment.0);
            self.ledger.add_disk_segment(segment);
        }
        self.ledger.set_disk_service(true);
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

    fn apply(&mut self, op: &Op) {
        self.may_lose_pinned |= matches!(op, Op::EndPromote(_) | Op::EndScrub(..) | Op::RestartDisk(_));
        match op {
            Op::NewWorker { model, domain, inherit } => self.new_worker(*model, *domain, *inherit),
            Op::Grant(w, n) => {
                if let Some(i) = self.worker(*w) {
                    let (session, pool) = (self.workers[i].session, self.workers[i].pool);
                    for block in self
                        .ledger
                        .request_grants(session, pool, *n, Millis(self.now))
                        .expect("it is its pool")
                    {
                        // The engine may write at once.
                        self.device.insert((pool, block.block), None);
                        self.workers[i].granted.push(block);
                    }
                }
            }
            Op::Compute { worker, namespace, key } => {
                if let Some(i) = self.worker(*worker) {
                    self.compute(i, *namespace, *key);
                }
            }
            Op::Chain { worker, namespace, key } => {
                if let Some(i) = self.worker(*worker) {
                    for key in path(*key) {
                        self.apply(&Op::Grant(i, 1));
                        self.compute(i, *namespace, key);
                    }
                }
            }
            Op::Release(w, k) => {
                if let Some(i) = self.worker(*w) {
                    let worker = &mut self.workers[i];
                    let mut blocks: Vec<BlockRef> = worker.pins.keys().copied().collect();
                    blocks.sort_by_key(|block| (block.block, block.generation));
                    if let Some(block) = (!blocks.is_empty()).then(|| blocks[k % blocks.len()]) {
                        let pins = worker.pins.remove(&block).expect("listed just now");
                        let (session, pool) = (worker.session, worker.pool);
                        let held = [Held { block, pins }];
                        let now = Millis(self.now);
                        self.ledger.release(session, pool, &held, now).expect("it is its pool");
                    }
                }
            }
            Op::Match { worker, namespace, key } => {
                if let Some(i) = self.worker(*worker) {
                    self.find(i, *namespace, *key);
                }
            }
            Op::Onboard(w, n) => {
                if let Some(i) = self.worker(*w) {
                    self.onboard(i, *n);
                }
            }
            Op::ReleaseLease(w) => {
                if let Some((i, lease)) =
                    self.worker(*w).and_then(|i| Some((i, self.workers[i].leases.pop()?.0)))
                {
                    let _ = self.ledger.release_lease(self.workers[i].session, lease, Millis(self.now));
                }
            }
            Op::Plan(max) => self.plan(*max),
            Op::EndOffload(i, ok) => self.end_offload(*i, *ok),
            Op::EndOnboard(i, ok) => self.end_onboard(*i, *ok),
            Op::Kill(w) => {
                if let Some(i) = self.worker(*w) {
                    let worker = self.workers.swap_remove(i);
                    self.ledger.session_silent(worker.session);
                    let idle = self.ledger.pool(worker.pool).expect("it waits").quarantined();
                    assert!(idle >= worker.granted.len(), "a silent holder's blocks are quarantined");
                    assert!(
                        self.ledger.request_grants(worker.session, worker.pool, 1, Millis(self.now)).is_err()
                    );
                    self.ledger.session_dead(worker.session, Millis(self.now));
                }
            }
            Op::Reattach(w) => {
                if let Some(i) = self.worker(*w) {
                    self.reattach(i);
                }
            }
            Op::Tick(ms) => {
                self.now += ms;
                self.ledger.tick(Millis(self.now));
            }
            Op::DiskSegment => {
                if self.disk_segments == 0 {
                    self.ledger.add_disk(SlotsIn::bytes(4 * 4096));
                }
                if self.disk_segments < 4 {
                    self.ledger.add_disk_segment(SegmentId(self.disk_segments));
                    self.disk_segments += 1;
                    self.ledger.set_disk_service(true);
                }
            }
            Op::Sink { worker, namespace, key } => {
                self.apply(&Op::Chain { worker: *worker, namespace: *namespace, key: *key });
                (0..8).for_each(|i| self.apply(&Op::Release(*worker, i)));
                for _ in 0..2 {
                    self.apply(&Op::Plan(4));
                    self.apply(&Op::EndOffload(0, true));
                }
                self.apply(&Op::Tick(6));
                for _ in 0..2 {
                    self.apply(&Op::Demote(4));
                    self.apply(&Op::EndDemote(u64::MAX));
                }
            }
            Op::DiskService(on) => self.ledger.set_disk_service(*on && self.disk_segments > 0),
            Op::Demote(blocks) => self.demote(*blocks),
            Op::EndDemote(outcomes) => self.end_demote(*outcomes),
            Op::Promote { block, batch } => {
                let mut blocks: Vec<_> = self.disk.values().copied().flatten().collect();
                blocks.sort();
                let Some((digest, n)) = (!blocks.is_empty()).then(|| blocks[block % blocks.len()]) else {
                    return;
                };
                let knows = |worker: &Worker| worker.namespaces.iter().position(|(d, _)| *d == digest);
                let found = self.workers.iter().enumerate().find_map(|(i, worker)| Some((i, knows(worker)?)));
                if let Some((i, namespace)) = found {
                    self.promote(i, namespace, n, *batch);
                }
            }
            Op::Pin { worker, namespace, key, ms, prefix } => {
                if let Some(i) = self.worker(*worker) {
                    let hashes: Vec<_> = path(*key).into_iter().map(hash).collect();
                    let what = if *prefix {
                        PinWhat::Prefix(&hashes)
                    } else {
                        PinWhat::Keys(&hashes[hashes.len() - 1..])
                    };
                    let (id, now) = (self.workers[i].namespaces[*namespace].1, Millis(self.now));
                    let _ = self.ledger.pin_blocks(id, what, Millis(self.now + ms), now);
                }
            }
            Op::Unpin(i) => {
                let pins = self.ledger.pins();
                if let Some(pin) = (!pins.is_empty()).then(|| pins[i % pins.len()]) {
                    self.ledger.unpin(pin.id, Millis(self.now)).expect("listed just now");
                }
            }
            Op::EndPromote(outcomes) => self.end_promote(*outcomes),
            Op::Scrub(blocks) => {
                let items = self.ledger.next_scrub(BatchLimit { blocks: *blocks, bytes: usize::MAX });
                assert!(items.len() <= *blocks);
                self.scrubs.extend(items);
            }
            Op::EndScrub(i, intact) => self.end_scrub(*i, *intact),
            Op::RestartDisk(lost) => self.restart_disk(*lost),
            Op::Segment => {
                if self.segments < 2 {
                    self.ledger.add_segment(SegmentId(self.segments));
                    self.segments += 1;
                }
            }
        }
    }

    /// What is pinned and was in host or on disk is still there, unless it was damaged or its segments went with the disk.
    fn check_pins(&mut self) {
        let pinned: HashSet<(Tier, Key)> = [Tier::Host, Tier::Disk]
            .into_iter()
            .flat_map(|tier| self.ledger.tables_of(tier).into_iter().map(move |table| (tier, table)))
            .flat_map(|(tier, (_, slots))| slots.residents().into_iter().map(move |(_, key, _)| (tier, key)))
            .filter(|(_, key)| self.ledger.pins.contains(*key))
            .collect();
        let still = |at: &&(Tier, Key)| self.ledger.pins.contains(at.1) && !self.may_lose_pinned;
        let lost = self.pinned.iter().filter(still).find(|at| !pinned.contains(at));
        assert_eq!(lost, None, "a pinned block was lost");
        (self.pinned, self.may_lose_pinned) = (pinned, false);
    }

    /// Events tell exactly what is resident.
    fn follow_events(&mut self) {
        let events = std::mem::take(self.ledger.take_events());
        for Event { tier, pool, kind } in events {
            match kind {
                EventKind::Stored { namespace, key, parent } => {
                    if let Some(parent) = parent {
                        assert!(self.resident.contains(&(tier, pool, namespace, parent)), "parent first");
                    }
                    assert!(self.resident.insert((tier, pool, namespace, key)), "stored twice");
                }
                EventKind::Removed { namespace, key } => {
                    assert!(
                        self.resident.remove(&(tier, pool, namespace, key)),
                        "removed without being there"
                    );
                }
                EventKind::Cleared => self.resident.retain(|(t, p, ..)| (*t, *p) != (tier, pool)),
            }
        }
        let listed: HashSet<_> = self
            .ledger
            .residents()
            .into_iter()
            .map(|event| match event.kind {
                EventKind::Stored { namespace, key, .. } => (event.tier, event.pool, namespace, key),
                _ => unreachable!("residents are listed as stored"),
            })
            .collect();
        assert_eq!(listed, self.resident);
    }

    fn settle(&mut self) {
        while !self.offloads.is_empty() {
            self.end_offload(0, true);
        }
        while !self.onboards.is_empty() {
            self.end_onboard(0, true);
        }
        while !self.demotes.is_empty() {
            self.end_demote(u64::MAX);
        }
        while !self.promotes.is_empty() {
            self.end_promote(u64::MAX);
        }
        while !self.scrubs.is_empty() {
            self.end_scrub(0, true);
        }
        while let Some(worker) = self.workers.pop() {
            self.ledger.session_dead(worker.session, Millis(self.now));
        }
        for pin in self.ledger.pins() {
            self.ledger.unpin(pin.id, Millis(self.now)).expect("listed just now");
        }
        self.ledger.check_integrity();
        assert_eq!((self.ledger.leases(), self.ledger.quarantined()), (0, 0));
        for summary in self.ledger.host_summaries().into_iter().chain(self.ledger.disk_summaries()) {
            assert_eq!((summary.counts.filling, summary.counts.pinned), (0, 0));
        }
        for (_, pool) in self.ledger.pools() {
            let counts = pool.slots.counts();
            assert_eq!((counts.filling, counts.pinned), (0, 0));
            assert_eq!(counts.free + counts.resident, pool.slots.slots());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn random_walks_never_serve_other_bytes_and_lose_no_slot(ops in prop::collection::vec(op(), 1..300)) {
        let mut world = World::new(quotas());
        world.retention = mixed_retention;
        world.apply(&Op::Segment);
        world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: false });
        for op in &ops {
            world.apply(op);
            world.ledger.check_integrity();
            world.follow_events();
            world.check_pins();
        }
        world.settle();
        world.follow_events();
    }
}
