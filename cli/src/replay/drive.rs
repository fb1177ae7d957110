//! A trace through the ledger in virtual time: what the daemon would decide if every copy ended at once.

use std::time::Duration;

use kvbm::ledger::{
    BatchLimit, BlockRef, CommitBlock, DiskRules, Ledger, LedgerConfig, Matched, Millis, PolicyKind,
    PoolIdentity, Promoted, Quotas, SegmentId, SlotsIn,
};
use kvbm::{Held, NamespaceId, PoolId, SessionId, TrustDomain};
use kvbm_hash::SequenceHash;
use kvbm_shm::PoolLayout;

use super::progress::Progress;
use super::trace::{BlockId, Event, Trace};

const BASE: [u8; 32] = [2; 32];
/// As the daemon's batches.
const BATCH: usize = 256;
const LIMIT: BatchLimit = BatchLimit { blocks: BATCH, bytes: usize::MAX };

/// Sizes of the tiers, in blocks; 0: there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capacities {
    pub device: u32,
    pub host: u32,
    pub disk: u32,
}

impl Capacities {
    /// All tiers together.
    pub(super) fn total(self) -> usize {
        self.device as usize + self.host as usize + self.disk as usize
    }
}

/// Blocks by the tier in which they were found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Hits {
    pub device: u64,
    pub host: u64,
    pub disk: u64,
}

impl std::ops::Add for Hits {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            device: self.device + other.device,
            host: self.host + other.host,
            disk: self.disk + other.disk,
        }
    }
}

impl Hits {
    pub(super) fn total(self) -> u64 {
        self.device + self.host + self.disk
    }
}

/// What a replay came to. All counts in blocks.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    pub hits: Hits,
    /// Stored in the fastest tier that there is, because no tier had them.
    pub computed: u64,
    /// Copied from tier to tier, those that were computed included once they are in host memory.
    pub moved: u64,
    /// Written to disk.
    pub disk_writes: u64,
    /// Time of a core that the ledger took.
    pub elapsed: Duration,
    /// Memory of the ledger's tables.
    pub metadata_bytes: usize,
    /// Slots that these tables are about.
    pub slots: usize,
}

/// What is replayed where.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup {
    pub policy: PolicyKind,
    pub capacities: Capacities,
    pub disk_rules: DiskRules,
    /// As a daemon draws one.
    pub secret: u64,
    /// Bytes of one block.
    pub block_bytes: u64,
    /// Engines, each with a pool of its own.
    pub engines: u8,
}

/// Replays all of a trace.
pub(super) fn replay(trace: &Trace, setup: &Setup, mut progress: Progress) -> Result<Outcome, String> {
    let mut drive =
        Drive::new(trace, setup).map_err(|refused| format!("the ledger refuses to begin: {refused}"))?;
    let started = cpu_time();
    for event in &trace.events {
        drive.event(event).map_err(|refused| format!("the ledger refuses to go on: {refused}"))?;
        progress.step();
    }
    drive.outcome.elapsed = cpu_time().saturating_sub(started);
    progress.done();
    drive.outcome.metadata_bytes = drive.ledger.metadata_bytes();
    drive.outcome.slots = drive.ledger.slots();
    Ok(drive.outcome)
}

/// Of this thread: whatever else runs on the machine, it is what a core takes.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// One node: its ledger, and engines that take their turn.
pub(super) struct Drive<'a> {
    trace: &'a Trace,
    ledger: Ledger,
    engines: Vec<Engine>,
    /// Whose turn it is.
    engine: Engine,
    has_host: bool,
    has_disk: bool,
    outcome: Outcome,
    keys: Vec<SequenceHash>,
}

/// An engine, as the ledger knows it.
#[derive(Debug, Clone, Copy)]
struct Engine {
    session: SessionId,
    namespace: NamespaceId,
    pool: Option<PoolId>,
}

pub(super) type Answer<T> = Result<T, kvbm::Refused>;

impl<'a> Drive<'a> {
    pub(super) fn new(trace: &'a Trace, setup: &Setup) -> Answer<Self> {
        let Capacities { device: _, host, disk } = setup.capacities;
        let config = LedgerConfig {
            lease: Duration::from_secs(30),
            orphan_pools_max: 0,
            orphan_pool_ttl: Duration::ZERO,
            secret: setup.secret,
            offload_priority_min: 0,
            disk: setup.disk_rules,
            policy: setup.policy,
            quotas: Quotas::default(),
            pin_budget_bytes: 0,
            rescue: Duration::from_secs(3),
            shard_wait: Duration::from_secs(10),
            one_domain: true,
        };
        let mut ledger = Ledger::new(config);
        // Each tier is one segment of as many slots as were asked for.
        ledger.set_segments((host > 0).then(|| SlotsIn::new(move |_| host)));
        if host > 0 {
            ledger.add_segment(SegmentId(0));
        }
        if disk > 0 {
            ledger.add_disk(SlotsIn::new(move |_| disk));
            ledger.add_disk_segment(SegmentId(0));
            ledger.set_disk_service(true);
        }
        let engine = |number| Engine::join(&mut ledger, trace, setup, number);
        let engines = (0..setup.engines.max(1)).map(engine).collect::<Answer<Vec<Engine>>>()?;
        let (has_host, has_disk) = (host > 0, disk > 0);
        let (outcome, keys) = Default::default();
        Ok(Self { trace, ledger, engine: engines[0], engines, has_host, has_disk, outcome, keys })
    }

    /// An engine is asked for blocks, and computes what is missing; returns what it found.
    pub(super) fn request(&mut self, engine: usize, event: &Event, now: Millis) -> Answer<Hits> {
        self.engine = self.engines[engine];
        let before = self.outcome.hits;
        self.ledger.tick(now);
        self.demote(now);
        self.serve(self.trace.blocks(event), true, true, now)?;
        self.demote(now);
        let after = self.outcome.hits;
        Ok(Hits {
            device: after.device - before.device,
            host: after.host - before.host,
            disk: after.disk - before.disk,
        })
    }

    /// What changed, in which tier and in which engine's pool, since it was asked for last.
    pub(super) fn take_changes(&mut self) -> Vec<(kvbm::Event, usize)> {
        let engine = |pool: Option<PoolId>| {
            let of = |engine: &Engine| engine.pool == pool;
            self.engines.iter().position(of).unwrap_or(0)
        };
        let changes = std::mem::take(self.ledger.take_events());
        changes.into_iter().map(|event| (event, engine(event.pool))).collect()
    }

    fn event(&mut self, event: &Event) -> Answer<()> {
        let now = Millis(event.at_ms);
        self.ledger.tick(now);
        // What waited for a quiet moment found it before this event.
        self.demote(now);
        let blocks = self.trace.blocks(event);
        let parent = blocks.first().and_then(|first| self.trace.parent(*first));
        if event.kind.looks_up() {
            self.serve(blocks, event.kind.stores(), true, now)?;
        } else if !self.store(parent, blocks, now)? {
            // The blocks before them are gone from the cache, but whoever stores these has them all.
            let chain = blocks.last().map_or(Vec::new(), |last| self.trace.chain(*last));
            self.serve(&chain, true, false, now)?;
        }
        self.demote(now);
        self.ledger.take_events().clear();
        Ok(())
    }

    /// Finds what there is of a sequence, brings it to the fastest tier and stores what is missing, if that is wanted.
    fn serve(&mut self, blocks: &[BlockId], stores: bool, counts: bool, now: Millis) -> Answer<()> {
        let mut keys = std::mem::take(&mut self.keys);
        keys.clear();
        keys.extend(blocks.iter().map(|block| self.trace.key(*block)));
        let matched = self.find(&keys, counts, now)?;
        let found = match self.engine.pool {
            Some(pool) => self.serve_from_pool(pool, &keys, matched, stores, now)?,
            None => {
                let found = matched.host_blocks;
                if let Some(lease) = matched.lease {
                    self.ledger.release_lease(self.engine.session, lease, now)?;
                }
                if stores {
                    let parent = found.checked_sub(1).map(|last| keys[last]);
                    let stored = self.ledger.store_in_host(
                        self.engine.session,
                        self.engine.namespace,
                        parent,
                        &keys[found..],
                        now,
                    )?;
                    self.outcome.moved += stored.blocks as u64;
                }
                self.outcome.moved += found as u64;
                found
            }
        };
        if stores {
            self.outcome.computed += (keys.len() - found) as u64;
        }
        self.keys = keys;
        Ok(())
    }

    /// What is found, once what is on disk has come to host memory.
    fn find(&mut self, keys: &[SequenceHash], counts: bool, now: Millis) -> Answer<Matched> {
        let matched = self.ledger.match_prefix(
            self.engine.session,
            self.engine.namespace,
            keys,
            self.engine.pool,
            &[],
            now,
        )?;
        if counts {
            self.outcome.hits.device += matched.device.len() as u64;
            self.outcome.hits.host += matched.host_blocks as u64;
            self.outcome.hits.disk += matched.disk_blocks as u64;
        }
        if matched.disk_blocks == 0 {
            return Ok(matched);
        }
        // Whoever waits for a disk holds nothing.
        if let Some(lease) = matched.lease {
            self.ledger.release_lease(self.engine.session, lease, now)?;
        }
        if let Some(pool) = self.engine.pool {
            self.release(pool, &matched.device, now)?;
        }
        self.promote(keys, now)?;
        self.ledger.match_prefix(self.engine.session, self.engine.namespace, keys, self.engine.pool, &[], now)
    }

    fn promote(&mut self, keys: &[SequenceHash], now: Millis) -> Answer<()> {
        loop {
            let batches =
                self.ledger.begin_promote(self.engine.session, self.engine.namespace, keys, LIMIT, now)?;
            let mut arrived = 0;
            for batch in batches {
                let outcomes = vec![Promoted::Arrived; batch.copies().len()];
                arrived += self.ledger.finish_promote(batch, &outcomes, now);
            }
            self.outcome.moved += arrived as u64;
            if arrived == 0 {
                return Ok(());
            }
        }
    }

    /// As an engine does it: loads what host has into granted blocks, computes the rest, gives all back. Returns how
    /// many blocks did not have to be computed.
    fn serve_from_pool(
        &mut self,
        pool: PoolId,
        keys: &[SequenceHash],
        matched: Matched,
        stores: bool,
        now: Millis,
    ) -> Answer<usize> {
        let mut held = matched.device;
        if let Some(lease) = matched.lease {
            let targets = self.ledger.request_grants(self.engine.session, pool, matched.host_blocks, now)?;
            if targets.is_empty() {
                self.ledger.release_lease(self.engine.session, lease, now)?;
            } else {
                let batch = self.ledger.begin_onboard(self.engine.session, lease, pool, &targets, now)?;
                self.ledger.finish_onboard(batch, true, now);
                self.outcome.moved += targets.len() as u64;
                held.extend(targets);
            }
        }
        let found = held.len();
        if stores {
            self.compute(pool, keys, found, &mut held, now)?;
        }
        self.release(pool, &held, now)?;
        Ok(found)
    }

    /// The blocks from `first` on, as far as the pool has room. False: the block before them is not in the pool.
    fn compute(
        &mut self,
        pool: PoolId,
        keys: &[SequenceHash],
        first: usize,
        held: &mut Vec<BlockRef>,
        now: Millis,
    ) -> Answer<bool> {
        let orphans = self.ledger.tally().orphans;
        let granted = self.ledger.request_grants(self.engine.session, pool, keys.len() - first, now)?;
        let commits: Vec<CommitBlock> = granted
            .iter()
            .enumerate()
            .map(|(i, block)| CommitBlock {
                block: *block,
                hash: keys[first + i],
                parent: (first + i).checked_sub(1).map(|before| keys[before]),
                retention: None,
            })
            .collect();
        for part in commits.chunks(BATCH) {
            self.ledger.commit(self.engine.session, self.engine.namespace, pool, part, now)?;
            self.offload(now);
        }
        held.extend(granted);
        Ok(self.ledger.tally().orphans == orphans)
    }

    fn offload(&mut self, now: Millis) {
        while let Some(batch) = self.ledger.next_offload(BATCH, now).filter(|_| self.has_host) {
            self.outcome.moved += self.ledger.finish_offload(batch, true, now) as u64;
        }
    }

    fn release(&mut self, pool: PoolId, blocks: &[BlockRef], now: Millis) -> Answer<()> {
        let held: Vec<Held> = blocks.iter().map(|block| Held { block: *block, pins: 1 }).collect();
        self.ledger.release(self.engine.session, pool, &held, now)
    }

    /// Stores blocks behind `parent`. False: the cache does not have that one any more.
    fn store(&mut self, parent: Option<BlockId>, blocks: &[BlockId], now: Millis) -> Answer<bool> {
        let mut keys = std::mem::take(&mut self.keys);
        keys.clear();
        keys.extend(parent.iter().chain(blocks).map(|block| self.trace.key(*block)));
        let first = usize::from(parent.is_some());
        let stored = match self.engine.pool {
            Some(pool) => {
                let mut held = Vec::new();
                let stored = self.compute(pool, &keys, first, &mut held, now)?;
                self.release(pool, &held, now)?;
                stored
            }
            None => {
                let parent = parent.map(|_| keys[0]);
                let stored = self.ledger.store_in_host(
                    self.engine.session,
                    self.engine.namespace,
                    parent,
                    &keys[first..],
                    now,
                )?;
                self.outcome.moved += stored.blocks as u64;
                !stored.is_orphan
            }
        };
        self.keys = keys;
        if stored {
            self.outcome.computed += blocks.len() as u64;
        }
        Ok(stored)
    }

    fn demote(&mut self, now: Millis) {
        if !self.has_disk {
            return;
        }
        while let Some(batch) = self.ledger.next_demote(LIMIT, now) {
            let written = vec![true; batch.copies().len()];
            let stored = self.ledger.finish_demote(batch, &written, now);
            self.outcome.moved += stored as u64;
            self.outcome.disk_writes += stored as u64;
        }
    }
}

impl Engine {
    fn join(ledger: &mut Ledger, trace: &Trace, setup: &Setup, number: u8) -> Answer<Self> {
        let session = ledger.open_session(TrustDomain(0));
        let namespace = ledger.register_namespace(session, [1; 32], BASE, "", "replay", Millis(0))?;
        let stride = setup.block_bytes as usize;
        let block_count = setup.capacities.device;
        if block_count == 0 {
            ledger.declare_blocks(session, BASE, stride)?;
            return Ok(Self { session, namespace, pool: None });
        }
        let identity = PoolIdentity {
            uuid: [number; 16],
            base: BASE,
            domain: TrustDomain(0),
            layout: PoolLayout { block_bytes: stride, block_count },
            tokens_per_block: trace.tokens_per_block,
            device: "cpu:0".into(),
        };
        let pool = Some(ledger.add_pool(session, identity, 1)?);
        Ok(Self { session, namespace, pool })
    }
}

#[cfg(test)]
mod tests;
