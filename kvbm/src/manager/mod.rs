//! Joins ledger, store and transfer: the facade that everyone else uses.
//!
//! Every call is synchronous and short: one acquisition of the ledger's lock, no I/O, no copy. Copies are done by one
//! thread per route; what follows is decided on another, while the next blocks are being copied.
//!
//! Lock order: ledger, then anything else; no callback runs under the ledger's lock.

mod adopt;
mod copy;
mod populate;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvbm_hash::SequenceHash;
use kvbm_shm::{PoolLayout, PoolMemory};
use parking_lot::Mutex;

use crate::counters::Counters;
use crate::error::{Error, Refused};
use crate::event::{Event, EventLog};
use crate::ledger::{
    ArrivalReport, BlockRef, CommitBlock, DiskRules, Held, LeaseId, Ledger, LedgerConfig, Matched, Millis,
    NamespaceId, PoolEntry, PoolId, PoolIdentity, Retention, SessionId, SlotsIn, TrustDomain, WaiterId,
};
use crate::store::{HostSegments, Pools, segment_plan};
use crate::transfer::{BoundedQueue, Gate};

pub use adopt::AdoptPool;
use copy::{OffloadJob, OnboardJob};

/// How much host memory the cache gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostCapacity {
    /// So many bytes.
    Bytes(u64),
    /// So many blocks of the first layout that attaches.
    Blocks(u32),
}

/// Blocks that one acquisition of the ledger's lock deals with, at most, where a request may have many.
const PIECE_BLOCKS: usize = 256;

/// Settings of a manager.
#[derive(Debug, Clone)]
pub struct ManagerConfig {
    /// Size of the host tier; 0 turns it off.
    pub host: HostCapacity,
    /// Batches that may wait per route, at least 1.
    pub queue_depth: usize,
    /// Blocks in one batch, 1..=256.
    pub batch_blocks: usize,
    /// How long an unused lease lives.
    pub lease: Duration,
    /// Pools of dead workers kept for a successor, at most.
    pub orphan_pools_max: usize,
    /// How long such a pool is kept.
    pub orphan_pool_ttl: Duration,
    /// Events kept for watchers.
    pub events_kept: usize,
    /// Waits so long after each copied block. For drills that must hit a copy in flight; zero otherwise.
    pub copy_delay: Duration,
    /// Spreads keys over buckets; a random number.
    pub secret: u64,
}

impl Default for ManagerConfig {
    fn default() -> Self {
        Self {
            host: HostCapacity::Bytes(0),
            queue_depth: 64,
            batch_blocks: 128,
            lease: Duration::from_secs(30),
            orphan_pools_max: 4,
            orphan_pool_ttl: Duration::from_secs(600),
            events_kept: 1 << 16,
            copy_delay: Duration::ZERO,
            secret: 0x5DEE_CE66_D1CE_4E5B,
        }
    }
}

/// What a batch came to. Reported exactly once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Blocks that arrived.
    pub blocks_done: usize,
    /// Blocks that did not.
    pub blocks_failed: usize,
    /// Bytes that arrived.
    pub bytes: u64,
    /// Why some did not.
    pub error: Option<Refused>,
}

type Done = Box<dyn FnOnce(Outcome) + Send>;

/// What a new pool is to be.
#[derive(Debug, Clone)]
pub struct OpenPool {
    /// Base namespace of all its blocks.
    pub base: [u8; 32],
    /// Sizes.
    pub layout: PoolLayout,
    /// Tokens in one block.
    pub tokens_per_block: u32,
    /// Device, for example `cpu:0`.
    pub device: String,
    /// Do not take over what a dead worker left.
    pub fresh: bool,
    /// Name for a new pool; random.
    pub uuid: [u8; 16],
}

/// A pool that a session may use from now on.
#[derive(Debug, Clone)]
pub struct OpenedPool {
    /// Its number.
    pub pool_id: PoolId,
    /// Its memory.
    pub memory: Arc<PoolMemory>,
    /// The writer's epoch.
    pub epoch: u64,
    /// What is resident in it, parents first.
    pub entries: Vec<PoolEntry>,
    /// True if a dead worker left it.
    pub inherited: bool,
}

/// What a prefetch found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefetched {
    /// Leading blocks in host memory.
    pub host_blocks: usize,
    /// Blocks behind them that are being promoted.
    pub promoting_blocks: usize,
}

/// Everything resident as of an event number.
#[derive(Debug, Clone)]
pub struct Resident {
    /// Number of the last event that is contained.
    pub sequence: u64,
    /// One `Stored` for each block, parents first.
    pub stored: Vec<Event>,
}

/// The block manager. Clones share it.
#[derive(Debug, Clone)]
pub struct Manager {
    shared: Arc<Shared>,
}

/// What the threads share.
struct Shared {
    config: ManagerConfig,
    started: Instant,
    ledger: Mutex<Ledger>,
    host: HostSegments,
    /// Planned host tier: segments and bytes of each.
    host_plan: Mutex<Option<(u32, usize)>>,
    host_error: Mutex<Option<String>>,
    pools: Pools,
    offloads: BoundedQueue<OffloadJob>,
    onboards: BoundedQueue<OnboardJob>,
    gate: Gate,
    waiters: Mutex<HashMap<WaiterId, Done>>,
    adoptions: Mutex<Vec<adopt::Pending>>,
    events: EventLog,
    counters: Counters,
    stopping: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manager").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Manager {
    /// Starts the copy threads and begins to populate host memory; returns at once.
    pub fn start(config: ManagerConfig) -> Result<Self, Error> {
        let ledger = Ledger::new(LedgerConfig {
            lease: config.lease,
            orphan_pools_max: config.orphan_pools_max,
            orphan_pool_ttl: config.orphan_pool_ttl,
            secret: config.secret,
            disk: DiskRules::default(),
        });
        let shared = Arc::new(Shared {
            started: Instant::now(),
            ledger: Mutex::new(ledger),
            host: HostSegments::default(),
            host_plan: Mutex::new(None),
            host_error: Mutex::new(None),
            pools: Pools::default(),
            offloads: BoundedQueue::new(config.queue_depth),
            onboards: BoundedQueue::new(config.queue_depth),
            gate: Gate::default(),
            waiters: Mutex::default(),
            adoptions: Mutex::default(),
            events: EventLog::new(config.events_kept),
            counters: Counters::default(),
            stopping: AtomicBool::new(false),
            threads: Mutex::default(),
            config,
        });
        let manager = Self { shared };
        let (ended, ends) = sync_channel(manager.shared.config.queue_depth);
        manager.spawn("kvbm-offload", move |shared| copy::run_offloads(&shared, &ended))?;
        manager.spawn("kvbm-offloaded", move |shared| copy::settle_offloads(&shared, &ends))?;
        let (ended, ends) = sync_channel(manager.shared.config.queue_depth);
        manager.spawn("kvbm-onboard", move |shared| copy::run_onboards(&shared, &ended))?;
        manager.spawn("kvbm-onboarded", move |shared| copy::settle_onboards(&shared, &ends))?;
        if let HostCapacity::Bytes(bytes) = manager.shared.config.host {
            manager.size_host(bytes)?;
        }
        Ok(manager)
    }

    fn spawn(&self, name: &'static str, run: impl FnOnce(Arc<Shared>) + Send + 'static) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(shared));
        self.shared.threads.lock().push(thread.map_err(|source| Error::Thread { name, source })?);
        Ok(())
    }

    /// Decides the host tier's segments, once, and begins to populate them.
    fn size_host(&self, bytes: u64) -> Result<(), Error> {
        let mut plan = self.shared.host_plan.lock();
        if plan.is_some() {
            return Ok(());
        }
        let (count, segment_bytes) = segment_plan(bytes);
        *plan = Some((count, segment_bytes));
        drop(plan);
        self.shared.ledger.lock().set_segments((count > 0).then(|| SlotsIn::bytes(segment_bytes)));
        if count > 0 {
            self.spawn("kvbm-populate", move |shared| populate::run(&shared, count, segment_bytes))?;
        }
        Ok(())
    }

    /// No new work; copies in flight end; threads end. Every callback has been called when this returns.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.offloads.close();
        self.shared.onboards.close();
        for thread in std::mem::take(&mut *self.shared.threads.lock()) {
            if thread.join().is_err() {
                tracing::error!("a block manager thread panicked");
            }
        }
        let waiters = std::mem::take(&mut *self.shared.waiters.lock());
        for done in waiters.into_values() {
            done(Outcome { blocks_done: 0, blocks_failed: 0, bytes: 0, error: Some(Refused::Closed) });
        }
        self.shared.settle_adoptions();
    }

    // ---- sessions -------------------------------------------------------------------------------------------------

    /// An engine attached.
    pub fn open_session(&self, domain: TrustDomain) -> SessionId {
        self.shared.with_ledger(|ledger, _| ledger.open_session(domain))
    }

    /// Its process is dead: what it held is released after copies in flight ended. A pool whose epoch moved is not kept:
    /// the engine had gone its own way in it, and what the ledger knows of it is of the past.
    pub fn session_dead(&self, session: SessionId) {
        self.shared.with_ledger(|ledger, now| {
            for id in ledger.pools_of(session) {
                let known = ledger.pool(id).map(|pool| pool.epoch);
                if self.shared.pools.get(id).map(|memory| memory.epoch()) != known {
                    ledger.retire_pool(id);
                }
            }
            ledger.session_dead(session, now);
        });
    }

    /// Its connection is gone while its process lives. If it holds no pool, it ends now; false if it does.
    pub fn end_session_without_pools(&self, session: SessionId) -> bool {
        self.shared.with_ledger(|ledger, now| {
            let idle = ledger.pools_of(session).is_empty();
            if idle {
                ledger.session_dead(session, now);
            }
            idle
        })
    }

    /// Its connection is gone while its process lives: what it holds is quarantined.
    pub fn session_silent(&self, session: SessionId) {
        self.shared.with_ledger(|ledger, _| ledger.session_silent(session));
    }

    /// Gives a session the right to a namespace.
    pub fn register_namespace(
        &self,
        session: SessionId,
        digest: [u8; 32],
        base: [u8; 32],
        tenant: &str,
        model: &str,
    ) -> Result<NamespaceId, Refused> {
        self.shared.with_ledger(|ledger, _| ledger.register_namespace(session, digest, base, tenant, model))
    }

    // ---- pools ----------------------------------------------------------------------------------------------------

    /// Gives a session the pool that a dead worker left, if one fits. It may hold blocks of namespaces that the session
    /// has not registered: they are registered for it.
    pub fn inherit_pool(&self, session: SessionId, open: &OpenPool) -> Result<Option<OpenedPool>, Refused> {
        if open.fresh {
            return Ok(None);
        }
        let inherited = self.shared.with_ledger(|ledger, _| -> Result<_, Refused> {
            let fits = |identity: &PoolIdentity| {
                identity.base == open.base
                    && identity.layout == open.layout
                    && identity.device == open.device
                    && identity.tokens_per_block == open.tokens_per_block
            };
            let Some(id) = ledger.inherit_pool(session, fits)? else { return Ok(None) };
            let entries = ledger.entries(id);
            for entry in &entries {
                if let Some(namespace) = ledger.namespace(entry.namespace).cloned() {
                    let (tenant, model) = (&namespace.tenant, &namespace.model);
                    // A session with very many namespaces may not find these blocks; it can still use the pool.
                    let base = namespace.base.unwrap_or(open.base);
                    let _ = ledger.register_namespace(session, namespace.digest, base, tenant, model);
                }
            }
            let epoch = ledger.pool(id).expect("it was just inherited").epoch;
            Ok(Some((id, epoch, entries)))
        })?;
        Ok(inherited.map(|(pool_id, epoch, entries)| {
            let memory = self.shared.pools.get(pool_id).expect("the ledger's pools are mapped");
            OpenedPool { pool_id, memory, epoch, entries, inherited: true }
        }))
    }

    /// Gives a session a pool: the one a dead worker left, or a new one.
    pub fn open_pool(&self, session: SessionId, open: OpenPool) -> Result<OpenedPool, Error> {
        if let Some(inherited) = self.inherit_pool(session, &open)? {
            return Ok(inherited);
        }
        let memory = Arc::new(PoolMemory::create(open.uuid, open.layout)?);
        self.size_host_for(open.layout)?;
        let epoch = memory.epoch();
        let pool_id = self.shared.with_ledger(|ledger, _| {
            let domain = domain_of(ledger, session)?;
            let identity = PoolIdentity {
                uuid: open.uuid,
                base: open.base,
                domain,
                layout: open.layout,
                tokens_per_block: open.tokens_per_block,
                device: open.device,
            };
            ledger.add_pool(session, identity, epoch)
        })?;
        self.shared.pools.insert(pool_id, Arc::clone(&memory));
        let whole = Arc::clone(&memory);
        if let Err(error) = self.spawn("kvbm-pool", move |shared| populate::run_pool(&shared, &whole)) {
            tracing::warn!(%error, "a device pool is populated only as it is used");
        }
        Ok(OpenedPool { pool_id, memory, epoch, entries: Vec::new(), inherited: false })
    }

    /// Gives up the pools that wait for a successor, to make room for another.
    pub fn drop_orphan_pools(&self) {
        self.shared.with_ledger(|ledger, _| ledger.drop_orphans());
        drop(self.shared.unmapped_pools());
    }

    fn size_host_for(&self, layout: PoolLayout) -> Result<(), Error> {
        match self.shared.config.host {
            HostCapacity::Bytes(_) => Ok(()),
            HostCapacity::Blocks(blocks) => self.size_host(u64::from(blocks) * layout.stride() as u64),
        }
    }

    /// Takes over a pool that its writer kept while it was detached. `done` is called once copies that touch an older
    /// idea of that pool have ended.
    pub fn adopt_pool(
        &self,
        session: SessionId,
        adopt: AdoptPool,
        done: Box<dyn FnOnce(Result<OpenedPool, Refused>) + Send>,
    ) {
        let sized = self.size_host_for(adopt.memory.layout());
        if let Err(error) = sized {
            *self.shared.host_error.lock() = Some(error.to_string());
        }
        self.shared.adopt(session, adopt, done);
    }

    /// Up to `count` blocks to write into.
    pub fn request_grants(
        &self,
        session: SessionId,
        pool: PoolId,
        count: usize,
    ) -> Result<Vec<BlockRef>, Refused> {
        self.shared.with_ledger(|ledger, _| ledger.request_grants(session, pool, count))
    }

    /// Blocks are complete. They are offloaded to host as soon as the queue has room.
    pub fn commit(
        &self,
        session: SessionId,
        namespace: NamespaceId,
        pool: PoolId,
        blocks: &[CommitBlock],
        retention: Retention,
    ) -> Result<(), Refused> {
        // In pieces: others get their turn in between, and copying begins after the first.
        let mut committed = Ok(());
        for piece in blocks.chunks(PIECE_BLOCKS) {
            let done = self
                .shared
                .with_ledger(|ledger, _| ledger.commit(session, namespace, pool, piece, retention.priority));
            committed = committed.and(done);
        }
        if !self.shared.offloads.has_room() {
            self.shared.counters.was_busy("offload");
        }
        committed
    }

    /// Gives back pins.
    pub fn release(&self, session: SessionId, pool: PoolId, blocks: &[Held]) -> Result<(), Refused> {
        self.shared.with_ledger(|ledger, _| ledger.release(session, pool, blocks))
    }

    // ---- finding and moving -----------------------------------------------------------------------------------------

    /// The longest prefix of `keys` that is held, pinned.
    pub fn match_prefix(
        &self,
        session: SessionId,
        namespace: NamespaceId,
        keys: &[SequenceHash],
        pool: Option<PoolId>,
    ) -> Result<Matched, Refused> {
        let matched = self
            .shared
            .with_ledger(|ledger, now| ledger.match_prefix(session, namespace, keys, pool, now))?;
        self.shared.counters.looked_up(matched.host_blocks, keys.len() - matched.device.len());
        Ok(matched)
    }

    /// The lease is not wanted any more.
    pub fn release_lease(&self, session: SessionId, lease: LeaseId) -> Result<(), Refused> {
        self.shared.with_ledger(|ledger, _| ledger.release_lease(session, lease))
    }

    /// Copies the first blocks of a lease into granted blocks. Unless refused, `done` is called exactly once, on
    /// another thread.
    pub fn onboard(
        &self,
        session: SessionId,
        lease: LeaseId,
        pool: PoolId,
        targets: &[BlockRef],
        done: Done,
    ) -> Result<(), Refused> {
        let memory = self.shared.pools.get(pool).ok_or(Refused::Unknown { what: "pool" })?;
        self.shared.with_ledger(|ledger, _| {
            // Only pushed to under this lock: room that is there now is there below.
            if !self.shared.onboards.has_room() {
                self.shared.counters.was_busy("onboard");
                return Err(self.shared.full("onboard"));
            }
            let batch = ledger.begin_onboard(session, lease, pool, targets)?;
            let tokens_per_block = ledger.pool(pool).map_or(0, |pool| pool.identity.tokens_per_block);
            self.shared.gate.enter();
            let job = OnboardJob { batch, memory, tokens_per_block, done };
            if let Err(job) = self.shared.onboards.push(job) {
                self.shared.gate.leave();
                ledger.cancel_onboard(job.batch);
                return Err(self.shared.full("onboard"));
            }
            Ok(())
        })
    }

    /// Reports when these committed blocks are in host memory. Unless refused, `done` is called exactly once.
    pub fn offload(
        &self,
        session: SessionId,
        pool: PoolId,
        blocks: &[BlockRef],
        done: Done,
    ) -> Result<(), Refused> {
        self.shared.with_ledger(|ledger, _| {
            let waiter = ledger.watch_offload(session, pool, blocks)?;
            self.shared.waiters.lock().insert(waiter, done);
            Ok(())
        })
    }

    /// Makes sure that what is known of a prefix will be in host memory when it is asked for.
    pub fn prefetch(
        &self,
        session: SessionId,
        namespace: NamespaceId,
        keys: &[SequenceHash],
    ) -> Result<Prefetched, Refused> {
        let host_blocks =
            self.shared.with_ledger(|ledger, _| ledger.find_prefix(session, namespace, keys))?.host_blocks;
        Ok(Prefetched { host_blocks, promoting_blocks: 0 })
    }

    /// As [`Manager::prefetch`]; `done` is called once, when what is being promoted has arrived or failed.
    pub fn prefetch_and_wait(
        &self,
        session: SessionId,
        namespace: NamespaceId,
        keys: &[SequenceHash],
        done: Box<dyn FnOnce(Prefetched) + Send>,
    ) -> Result<(), Refused> {
        done(self.prefetch(session, namespace, keys)?);
        Ok(())
    }

    // ---- time and accounts --------------------------------------------------------------------------------------------

    /// Ends leases and pools whose time has come. To be called a few times per second.
    pub fn tick(&self) {
        self.shared.with_ledger(|ledger, now| ledger.tick(now));
        let gone = self.shared.unmapped_pools();
        if !gone.is_empty() {
            // Unmapping a large pool takes long: not on the caller's thread if it can be helped.
            let _ = self.spawn("kvbm-unmap", move |_| drop(gone));
        }
        self.shared.threads.lock().retain(|thread| !thread.is_finished());
    }

    /// What was counted.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Residency changes.
    pub fn events(&self) -> &EventLog {
        &self.shared.events
    }

    /// Everything resident, consistent with the event numbers.
    pub fn residents(&self) -> Resident {
        let mut ledger = self.shared.ledger.lock();
        self.shared.events.append(ledger.take_events());
        Resident { sequence: self.shared.events.last(), stored: ledger.residents() }
    }

    /// A look at the ledger. Keep it short: everybody waits.
    pub fn inspect<R>(&self, look: impl FnOnce(&Ledger) -> R) -> R {
        look(&self.shared.ledger.lock())
    }

    /// Bytes of host memory that are planned, and that are populated.
    pub fn host_bytes(&self) -> (u64, u64) {
        let (count, bytes) = self.shared.host_plan.lock().unwrap_or((0, 0));
        (u64::from(count) * bytes as u64, self.shared.host.count() as u64 * bytes as u64)
    }

    /// Why host memory is less than planned, if it is.
    pub fn host_error(&self) -> Option<String> {
        self.shared.host_error.lock().clone()
    }

    /// Batches waiting or being copied.
    pub fn transfers_in_flight(&self) -> usize {
        self.shared.offloads.len() + self.shared.onboards.len()
    }
}

impl Shared {
    fn now(&self) -> Millis {
        Millis(self.started.elapsed().as_millis() as u64)
    }

    /// Runs `decide` under the lock, then does what follows from any change: events are numbered, offloads queued,
    /// answers given.
    fn with_ledger<R>(&self, decide: impl FnOnce(&mut Ledger, Millis) -> R) -> R {
        let (result, reports) = {
            let mut ledger = self.ledger.lock();
            let locked = Instant::now();
            let result = decide(&mut ledger, self.now());
            self.queue_offloads(&mut ledger);
            self.events.append(ledger.take_events());
            let reports = ledger.take_arrivals();
            self.counters.held(locked.elapsed());
            (result, reports)
        };
        for (waiter, report) in reports {
            self.report_offload(waiter, report);
        }
        self.settle_adoptions();
        result
    }

    /// Forgets pools that the ledger no longer knows. To be dropped without locks.
    fn unmapped_pools(&self) -> Vec<Arc<PoolMemory>> {
        let ledger = self.ledger.lock();
        self.pools.take_all_but(|id| ledger.pool(id).is_some())
    }

    fn queue_offloads(&self, ledger: &mut Ledger) {
        if self.host_plan.lock().is_none_or(|(count, _)| count == 0) {
            return;
        }
        while self.offloads.has_room() {
            let Some(batch) = ledger.next_offload(self.config.batch_blocks) else { return };
            let memory = self.pools.get(batch.pool);
            let Some(memory) = memory else {
                // The pool was added to the ledger a moment ago and is not mapped here yet: it has no blocks.
                ledger.finish_offload(batch, false);
                return;
            };
            if let Err(job) = self.offloads.push(OffloadJob { batch, memory }) {
                ledger.finish_offload(job.batch, false);
                return;
            }
        }
    }

    fn report_offload(&self, waiter: WaiterId, report: ArrivalReport) {
        let Some(done) = self.waiters.lock().remove(&waiter) else { return };
        let error = (report.failed > 0).then(|| self.ledger.lock().host_exhausted(report.failed));
        done(Outcome { blocks_done: report.done, blocks_failed: report.failed, bytes: 0, error });
    }

    fn full(&self, queue: &'static str) -> Refused {
        if self.stopping.load(Ordering::SeqCst) { Refused::Closed } else { Refused::Busy { queue } }
    }
}

fn domain_of(ledger: &Ledger, session: SessionId) -> Result<TrustDomain, Refused> {
    let found = ledger.sessions().find(|(id, _)| **id == session);
    found.map(|(_, session)| session.domain).ok_or(Refused::Unknown { what: "session" })
}

#[cfg(test)]
mod tests;
