//! Joins ledger, store and transfer: the facade that everyone else uses.
//!
//! Every call is synchronous and short: one acquisition of the ledger's lock, no I/O, no copy. Copies are done by one
//! thread per route; what follows is decided on another, while the next blocks are being copied.
//!
//! Lock order: ledger, then anything else; no callback runs under the ledger's lock.

mod adopt;
mod config;
mod copy;
mod disk;
mod engine;
mod moving;
mod pins;
mod pools;
mod populate;
mod sessions;
mod warm;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvbm_shm::{PoolLayout, PoolMemory};
use parking_lot::Mutex;
use rustix::process::setpriority_process;
use rustix::thread::gettid;

use crate::counters::Counters;
use crate::error::{Error, Refused};
use crate::event::{Event, EventLog};
use crate::ledger::{
    ArrivalReport, DiskRules, Ledger, LedgerConfig, Millis, PoolEntry, PoolId, SessionId, SlotsIn,
    TrustDomain, WaiterId,
};
use crate::store::{
    HostSegments, OwnedPool, Pools, WarmHost, WarmSegment, WarmTables, WarmWords, disk_io, segment_plan,
};
use crate::tier::Tier;
use crate::transfer::{BoundedQueue, Gate};
use crate::what_if::{Sizes, WhatIf, WhatIfReport};

pub use adopt::AdoptPool;
pub use config::{HostCapacity, ManagerConfig, PIN_BUDGET_BYTES};
use copy::{OffloadJob, OnboardJob};
use disk::DiskTier;
pub use disk::{DiskCapacity, DiskFigures, DiskState, DiskTierConfig, Recovery};
use engine::{EngineState, LoadJob, StoreJob};
pub use engine::{Fence, OpenEnginePool, OpenedEnginePool, Staged, StoreRequest};
pub use pins::LivePin;
use warm::FoundWords;

/// Blocks that one acquisition of the ledger's lock deals with, at most, where a request may have many.
const PIECE_BLOCKS: usize = 256;

/// Loads of engines' pools that are under way at a time: those of an engine's ranks go side by side.
const LOAD_THREADS: usize = 8;

/// How often what was asked for is looked at for [`Manager::what_if`].
const WHAT_IF_EVERY: Duration = Duration::from_millis(250);

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
    /// From engines' own memory to host memory, and back.
    stores: BoundedQueue<StoreJob>,
    loads: BoundedQueue<LoadJob>,
    engines: EngineState,
    /// As if the rule of generations were not there: what tests must notice.
    #[cfg(test)]
    ignore_generations: AtomicBool,
    /// Tables of host memory, if somebody keeps it.
    warm: Option<WarmTables>,
    /// What an earlier daemon left in host memory, until the size of the tier is known. Held while it is decided.
    warm_found: Mutex<(Vec<WarmSegment>, Vec<WarmWords>)>,
    /// What engines of an earlier daemon have pinned in it.
    found_words: Mutex<FoundWords>,
    disk: Option<DiskTier>,
    disk_threads: Mutex<Vec<JoinHandle<()>>>,
    gate: Gate,
    waiters: Mutex<HashMap<WaiterId, Done>>,
    adoptions: Mutex<Vec<adopt::Pending>>,
    events: EventLog,
    counters: Counters,
    what_if: WhatIf,
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
        Self::start_warm(config, None)
    }

    /// As [`Manager::start`], with host memory that somebody keeps, and what an earlier daemon left in it.
    pub fn start_warm(config: ManagerConfig, warm: Option<WarmHost>) -> Result<Self, Error> {
        let io = config.disk.as_ref().map(|disk| disk.io).unwrap_or_default();
        Self::start_with(config, warm, Box::new(move |files| disk_io::start(files, io)))
    }

    /// As [`Manager::start_warm`], with a drive of the caller's making.
    pub(crate) fn start_with(
        config: ManagerConfig,
        warm: Option<WarmHost>,
        start_engine: Box<disk::StartEngine>,
    ) -> Result<Self, Error> {
        config.quotas.validate()?;
        let (found, keeper) = match warm {
            Some(WarmHost { found, words, keeper }) => ((found, words), Some(keeper)),
            None => Default::default(),
        };
        let words_from = found.1.iter().map(|words| words.number + 1).max().unwrap_or(0);
        let disk = config.disk.clone();
        let disk = disk.map(|disk| DiskTier::open(disk, config.queue_depth, start_engine)).transpose()?;
        let ledger = Ledger::new(LedgerConfig {
            lease: config.lease,
            orphan_pools_max: config.orphan_pools_max,
            orphan_pool_ttl: config.orphan_pool_ttl,
            secret: config.secret,
            offload_priority_min: config.offload_priority_min,
            disk: config.disk.as_ref().map_or_else(DiskRules::default, |disk| disk.rules),
            policy: config.policy,
            quotas: config.quotas.clone(),
            pin_budget_bytes: config.pin_budget_bytes,
            rescue: config.rescue,
            shard_wait: config.shard_wait,
            one_domain: config.one_domain,
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
            stores: BoundedQueue::new(config.queue_depth),
            loads: BoundedQueue::new(config.queue_depth),
            engines: EngineState::default(),
            #[cfg(test)]
            ignore_generations: AtomicBool::new(false),
            warm: keeper.map(|keeper| WarmTables::new(keeper, words_from)),
            warm_found: Mutex::new(found),
            found_words: Mutex::default(),
            disk,
            disk_threads: Mutex::default(),
            gate: Gate::default(),
            waiters: Mutex::default(),
            adoptions: Mutex::default(),
            events: EventLog::new(config.events_kept),
            counters: Counters::default(),
            what_if: WhatIf::new(config.what_if_window),
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
        manager.spawn("kvbm-store", move |shared| engine::run_stores(&shared))?;
        for _ in 0..LOAD_THREADS {
            manager.spawn("kvbm-load", move |shared| engine::run_loads(&shared))?;
        }
        manager.spawn("kvbm-fences", move |shared| shared.watch_fences())?;
        if let HostCapacity::Bytes(bytes) = manager.shared.config.host {
            manager.size_host(bytes)?;
        }
        manager.start_disk()?;
        if !manager.shared.config.what_if_window.is_zero() {
            let looking = manager.clone();
            manager.spawn("kvbm-what-if", move |_| looking.look_on())?;
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
        // Nobody opens a pool before what is in host memory is known.
        let mut found = self.shared.warm_found.lock();
        if self.shared.host_plan.lock().is_some() {
            return Ok(());
        }
        let (count, segment_bytes) = segment_plan(bytes);
        self.shared.ledger.lock().set_segments((count > 0).then(|| SlotsIn::bytes(segment_bytes)));
        let there = self.shared.adopt_warm(std::mem::take(&mut *found), count, segment_bytes);
        *self.shared.host_plan.lock() = Some((count, segment_bytes));
        if count > there {
            self.spawn("kvbm-populate", move |shared| populate::run(&shared, there, count, segment_bytes))?;
        }
        Ok(())
    }

    /// No new work; copies in flight end; threads end. Every callback has been called when this returns.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.offloads.close();
        self.shared.onboards.close();
        self.shared.stores.close();
        self.shared.loads.close();
        self.shared.engines.fences.wake();
        self.stop_disk();
        for thread in std::mem::take(&mut *self.shared.threads.lock()) {
            thread.thread().unpark();
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

    // ---- time and accounts --------------------------------------------------------------------------------------------

    /// Follows what would be found with other capacities, until the manager stops: nothing in the process is less urgent.
    fn look_on(&self) {
        let modest = setpriority_process(Some(gettid()), 19);
        if let Err(error) = modest {
            tracing::debug!(%error, "what-if runs at normal priority");
        }
        while !self.shared.stopping.load(Ordering::SeqCst) {
            std::thread::park_timeout(WHAT_IF_EVERY);
            self.shared.what_if.tick(self.sizes(), self.shared.now());
        }
    }

    /// Ends leases and pools whose time has come. To be called a few times per second.
    pub fn tick(&self) {
        self.shared.with_ledger(|ledger, now| {
            self.shared.read_pins(ledger, now);
            self.shared.read_write_pins(ledger, now);
            self.shared.read_found_pins(ledger, now);
            ledger.tick(now);
        });
        self.shared.forget_engine_pools();
        self.shared.settle_openings();
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
        let disk = self.shared.disk.as_ref().map_or(0, |tier| tier.demotes.len() + tier.promotes.len());
        let engines = self.shared.stores.len() + self.shared.loads.len();
        self.shared.offloads.len() + self.shared.onboards.len() + engines + disk
    }

    /// What is found, and what other capacities would find.
    pub fn what_if(&self) -> WhatIfReport {
        self.shared.what_if.report(self.sizes(), self.shared.now())
    }

    fn sizes(&self) -> Sizes {
        let disk_bytes = self.shared.disk.as_ref().map_or(0, DiskTier::capacity_bytes);
        Sizes { host_bytes: self.host_bytes().0, disk_bytes }
    }

    /// The disk tier; `None` if it was not configured.
    pub fn disk(&self) -> Option<DiskFigures> {
        self.shared.disk.as_ref().map(DiskTier::figures)
    }
}

impl Shared {
    fn now(&self) -> Millis {
        Millis(self.started.elapsed().as_millis() as u64)
    }

    /// Runs `decide` under the lock, then does what follows from any change: events are numbered, offloads queued,
    /// answers given.
    fn with_ledger<R>(&self, decide: impl FnOnce(&mut Ledger, Millis) -> R) -> R {
        let (result, reports, stored) = {
            let mut ledger = self.ledger.lock();
            let locked = Instant::now();
            let now = self.now();
            let result = decide(&mut ledger, now);
            self.queue_offloads(&mut ledger, now);
            self.queue_demotes(&mut ledger, now);
            let stored = self.engines_decided(&mut ledger, now);
            self.events.append(ledger.take_events());
            let reports = ledger.take_arrivals();
            self.counters.held(locked.elapsed());
            (result, reports, stored)
        };
        for (done, verdicts) in stored {
            done(verdicts);
        }
        for (waiter, report) in reports {
            self.report_arrival(waiter, report);
        }
        self.settle_adoptions();
        result
    }

    /// Forgets pools that the ledger no longer knows. To be dropped without locks.
    fn unmapped_pools(&self) -> Vec<Arc<OwnedPool>> {
        let ledger = self.ledger.lock();
        self.pools.take_all_but(|id| ledger.pool(id).is_some())
    }

    fn queue_offloads(&self, ledger: &mut Ledger, now: Millis) {
        if self.host_plan.lock().is_none_or(|(count, _)| count == 0) {
            return;
        }
        while self.offloads.has_room() {
            let Some(batch) = ledger.next_offload(self.config.batch_blocks, now) else { return };
            self.bind_segments(ledger);
            let Some(pool) = self.pools.get(batch.pool) else {
                // The pool was added to the ledger a moment ago and is not mapped here yet: it has no blocks.
                ledger.finish_offload(batch, false, now);
                return;
            };
            if let Err(job) = self.offloads.push(OffloadJob { batch, pool }) {
                ledger.finish_offload(job.batch, false, now);
                return;
            }
        }
    }

    /// Segments that were given to another class: what is kept about them outside the ledger is void.
    fn bind_segments(&self, ledger: &mut Ledger) {
        let bound = ledger.take_bound(Tier::Host);
        if !bound.is_empty() {
            self.engines.segments_changed();
        }
        if let Some(warm) = &self.warm {
            for (segment, class) in bound {
                warm.bind(segment, class, ledger.host_slots_in(class.stride));
            }
        }
        let bound = ledger.take_bound(Tier::Disk);
        if let Some(store) = self.disk.as_ref().filter(|_| !bound.is_empty()).and_then(DiskTier::store) {
            bound.into_iter().for_each(|(segment, class)| store.bind(segment, class));
        }
    }

    fn report_arrival(&self, waiter: WaiterId, report: ArrivalReport) {
        let Some(done) = self.waiters.lock().remove(&waiter) else { return };
        let error = (report.failed > 0).then(|| self.ledger.lock().host_exhausted(report.failed));
        done(Outcome { blocks_done: report.done, blocks_failed: report.failed, bytes: 0, error });
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
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
