//! The threads that copy between host memory and engines' own memory.
//!
//! The rule of generations: bytes that were copied out of a block count only if its word was what it was registered with
//! before the copy, and still is after it. Nothing is written into a block whose word has moved.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::fan_out::{Leader, Role};
use super::flights::Question;
use super::{Manager, Shared};
use kvbm_cuda::copy_engine::Copying;

use crate::error::Refused;
use crate::ledger::{
    BlockRef, Copied, LeaseId, Ledger, LoadBatch, Millis, Place, PoolId, SessionId, StoreBatch, StoreCopy,
};
use crate::manager::{Done, Outcome};
use crate::store::{EnginePoolMemory, MappedBlocks, Pace, RangeCopy};
use crate::tier::Route;

/// Engine to host.
pub(in crate::manager) struct StoreJob {
    batch: StoreBatch,
    memory: Arc<EnginePoolMemory>,
}

/// Host to engine.
pub(in crate::manager) struct LoadJob {
    batch: LoadBatch,
    memory: Arc<EnginePoolMemory>,
    question: Question,
    cancelled: Arc<AtomicBool>,
    done: Done,
}

fn mapped(memory: &EnginePoolMemory) -> &MappedBlocks {
    memory.blocks.as_ref().expect("only of ipc pools is anything copied")
}

pub(in crate::manager) fn run_stores(shared: &Shared) {
    while let Some(StoreJob { batch, memory }) = shared.stores.next() {
        let started = Instant::now();
        if let Some(warm) = &shared.warm {
            warm.clear(batch.copies().map(|copy| copy.to));
        }
        let outcomes = store_all(shared, &batch, &memory);
        shared.with_ledger(|ledger, now| {
            let failed = outcomes.contains(&Copied::Failed);
            let arrived = ledger.finish_store(batch, &outcomes, now);
            let bytes = (arrived * memory.block_bytes) as u64;
            shared.counters.moved(Route::DeviceToHost, arrived, bytes, started.elapsed());
            if failed {
                shared.counters.failed(Route::DeviceToHost);
            }
        });
        shared.stores.finished();
        drop(memory);
        shared.forget_engine_pools();
    }
}

fn store_all(shared: &Shared, batch: &StoreBatch, memory: &EnginePoolMemory) -> Vec<Copied> {
    let copies: Vec<StoreCopy> = batch.copies().collect();
    let mut outcomes = Vec::with_capacity(copies.len());
    let store = Store { shared, batch, memory };
    let mut under_way = None;
    // One piece ends while the next is under way already.
    for piece in copies.chunks(mapped(memory).blocks_at_once()) {
        let before = under_way.replace(store.begin(piece));
        outcomes.extend(before.into_iter().flat_map(|before| store.end(before)));
    }
    outcomes.extend(under_way.into_iter().flat_map(|last| store.end(last)));
    outcomes
}

/// One batch out of an engine's memory.
struct Store<'a> {
    shared: &'a Shared,
    batch: &'a StoreBatch,
    memory: &'a EnginePoolMemory,
}

/// Some of its blocks.
struct StorePiece<'a> {
    copies: &'a [StoreCopy],
    /// Which of them were still what they were registered as, and are being copied.
    current: Vec<bool>,
    copying: Result<Copying, String>,
}

impl Store<'_> {
    fn begin<'a>(&self, copies: &'a [StoreCopy]) -> StorePiece<'a> {
        let Self { shared, batch, memory } = self;
        // When stopping, nobody will read what is copied now.
        if shared.is_stopping() {
            let copying = Err("the daemon stops".into());
            return StorePiece { copies, current: vec![true; copies.len()], copying };
        }
        shared.gate.give_way();
        let (segments, blocks) = (shared.host.segments(), mapped(memory));
        let current: Vec<bool> = copies.iter().map(|copy| shared.is_current(memory, copy.from)).collect();
        let ranges: Vec<RangeCopy<'_>> = copies
            .iter()
            .zip(&current)
            .filter(|(_, current)| **current)
            .flat_map(|(copy, _)| {
                let host_offset = copy.to.offset(batch.stride()) + memory.shard_offset;
                blocks.ranges(copy.from.block, &segments[copy.to.segment.0 as usize], host_offset)
            })
            .collect();
        // Whoever is dead suffers nothing, and the next one waits for its memory.
        let pace = if batch.rescue { Pace::Full } else { Pace::Background };
        StorePiece { copies, current, copying: blocks.memory.begin_copy_out(pace, &ranges) }
    }

    fn end<'a>(&self, piece: StorePiece<'a>) -> impl Iterator<Item = Copied> + use<'a, '_> {
        let Self { shared, batch, memory } = self;
        let copied = piece.copying.and_then(Copying::wait);
        if let (Err(reason), false) = (&copied, shared.is_stopping()) {
            tracing::warn!(pool = batch.pool.0, reason, "blocks cannot be copied out of an engine's memory");
        }
        if copied.is_ok() {
            shared.copy_delay(piece.copies.len());
        }
        piece.copies.iter().zip(piece.current).map(move |(copy, current)| match (&copied, current) {
            (_, false) => Copied::Stale,
            (Err(_), true) => Copied::Failed,
            (Ok(_), true) if shared.is_current(memory, copy.from) => Copied::Arrived,
            (Ok(_), true) => Copied::Stale,
        })
    }
}

pub(in crate::manager) fn run_loads(shared: &Shared) {
    while let Some(LoadJob { batch, memory, question, cancelled, done }) = shared.loads.next() {
        let started = Instant::now();
        let blocks = batch.copies().len();
        let loaded = Load { shared, batch: &batch, memory: &memory, cancelled: &cancelled }.run();
        shared.gate.leave();
        shared.with_ledger(|ledger, now| {
            ledger.finish_load(batch, now);
            let Ok(from_peers) = loaded else { return shared.counters.failed(Route::HostToDevice) };
            let routes = [(Route::HostToDevice, blocks - from_peers), (Route::DeviceToDevice, from_peers)];
            for (route, blocks) in routes.into_iter().filter(|(_, blocks)| *blocks > 0) {
                shared.counters.moved(route, blocks, memory.bytes_of(blocks), started.elapsed());
            }
            shared.counters.matched(blocks as u64 * u64::from(memory.tokens_per_block));
        });
        shared.loads.finished();
        done(match loaded {
            Ok(_) => {
                Outcome { blocks_done: blocks, blocks_failed: 0, bytes: memory.bytes_of(blocks), error: None }
            }
            Err(error) => Outcome { blocks_done: 0, blocks_failed: blocks, bytes: 0, error: Some(error) },
        });
        shared.engines.flights.end(question);
        drop(memory);
        shared.forget_engine_pools();
    }
}

/// One load under way.
struct Load<'a> {
    shared: &'a Shared,
    batch: &'a LoadBatch,
    memory: &'a Arc<EnginePoolMemory>,
    cancelled: &'a AtomicBool,
}

type Piece = [(Place, BlockRef)];

impl Load<'_> {
    /// All bytes arrived in blocks that were the request's before and after; so many of these blocks came from another rank.
    fn run(&self) -> Result<usize, Refused> {
        let blocks = mapped(self.memory);
        let role = self.shared.engines.fan_out.begin(self.batch, self.memory);
        let (mut at, mut from_peers, mut under_way) = (0, 0, None);
        for piece in self.batch.copies().chunks(blocks.blocks_at_once()) {
            if self.cancelled.load(Ordering::SeqCst) || self.shared.is_stopping() {
                return Err(Refused::Stale { what: "a cancelled load" });
            }
            self.check(piece)?;
            let range = at..at + piece.len();
            at = range.end;
            match &role {
                Role::Follows(leader, source) if self.follow(leader, source, range, piece) => {
                    from_peers += piece.len();
                }
                Role::Follows(..) => self.end(self.begin(blocks, piece)?)?,
                Role::Leads(leading) => {
                    // One piece ends while the next is under way already.
                    let next = (self.begin(blocks, piece)?, piece.len());
                    if let Some((before, blocks)) = under_way.replace(next) {
                        self.end(before)?;
                        leading.advance(blocks);
                    }
                }
            }
            self.shared.copy_delay(piece.len());
        }
        if let (Some((last, blocks)), Role::Leads(leading)) = (under_way, &role) {
            self.end(last)?;
            leading.advance(blocks);
        }
        self.check(self.batch.copies())?;
        Ok(from_peers)
    }

    /// The blocks are still those of the request.
    fn check(&self, piece: &Piece) -> Result<(), Refused> {
        let current = piece.iter().all(|(_, to)| self.shared.is_current(self.memory, *to));
        if current { Ok(()) } else { Err(Refused::Stale { what: "target block" }) }
    }

    /// Begins to load from host memory. Who gives up meanwhile drops it, and so waits for it.
    fn begin(&self, blocks: &MappedBlocks, piece: &Piece) -> Result<Copying, Refused> {
        let segments = self.shared.host.segments();
        let ranges: Vec<RangeCopy<'_>> = piece
            .iter()
            .flat_map(|(from, to)| {
                let host_offset = from.offset(self.batch.stride()) + self.memory.shard_offset;
                blocks.ranges(to.block, &segments[from.segment.0 as usize], host_offset)
            })
            .collect();
        blocks.memory.begin_copy_in(&ranges).map_err(|reason| self.refused(reason))
    }

    fn end(&self, copying: Copying) -> Result<(), Refused> {
        copying.wait().map(|_| ()).map_err(|reason| self.refused(reason))
    }

    fn refused(&self, reason: String) -> Refused {
        let pool = self.batch.pool.0;
        tracing::warn!(pool, reason, "blocks cannot be copied into an engine's memory");
        Refused::invalid("targets", reason)
    }

    /// Out of the blocks of the rank that leads. False: that does not count, if it came to anything at all.
    fn follow(&self, leader: &Leader, source: &EnginePoolMemory, range: Range<usize>, piece: &Piece) -> bool {
        if !leader.wait_for(range.end) {
            return false;
        }
        let from = &leader.targets()[range];
        let holds = || from.iter().all(|block| self.shared.is_current(source, *block));
        if !holds() {
            return false;
        }
        let pairs = from.iter().zip(piece).map(|(from, (_, to))| (from.block, to.block));
        match mapped(self.memory).copy_from(mapped(source), pairs) {
            Ok(()) => holds(),
            Err(reason) => {
                tracing::warn!(reason, "blocks cannot be copied from rank to rank");
                false
            }
        }
    }
}

impl Shared {
    /// Whether a block is still what it was: its word has the value that its holder named.
    fn is_current(&self, memory: &EnginePoolMemory, block: BlockRef) -> bool {
        #[cfg(test)]
        if self.ignore_generations.load(Ordering::SeqCst) {
            return true;
        }
        memory.words.generation(block.block) == block.generation
    }

    pub(super) fn queue_stores(&self, ledger: &mut Ledger, now: Millis) {
        while self.stores.has_room() {
            let Some(batch) = ledger.next_store(self.config.batch_blocks, now) else { return };
            self.bind_segments(ledger);
            let memory = self.engines.get(batch.pool).expect("a pool of the ledger is known here");
            if let Err(job) = self.stores.push(StoreJob { batch, memory }) {
                let none = vec![Copied::Failed; job.batch.copies().len()];
                ledger.finish_store(job.batch, &none, now);
                return;
            }
        }
    }
}

impl Manager {
    /// Copies blocks of a lease, from the `first`-th on, into blocks of an ipc pool. Unless refused, `done` is called exactly
    /// once, on another thread. `question` names it, should it have to be cancelled.
    pub fn load(
        &self,
        session: SessionId,
        question: u64,
        lease: LeaseId,
        pool: PoolId,
        (first, targets): (usize, &[BlockRef]),
        done: Done,
    ) -> Result<(), Refused> {
        let memory = self.shared.engines.get(pool).ok_or(Refused::Unknown { what: "pool" })?;
        self.shared.with_ledger(|ledger, now| {
            // Only pushed to under this lock: room that is there now is there below.
            if !self.shared.loads.has_room() {
                self.shared.counters.was_busy("load");
                return Err(self.shared.full("load"));
            }
            let batch = ledger.begin_load(session, lease, pool, first, targets)?;
            let question = (session, question);
            let cancelled = self.shared.engines.flights.begin(question);
            self.shared.gate.enter();
            let job = LoadJob { batch, memory, question, cancelled, done };
            if let Err(job) = self.shared.loads.push(job) {
                self.shared.gate.leave();
                self.shared.engines.flights.end(question);
                ledger.finish_load(job.batch, now);
                return Err(self.shared.full("load"));
            }
            Ok(())
        })
    }

    /// The targets of a load are wanted back: `drained` is called when nothing more is written to them, after the load was
    /// answered. False, without a call: it has ended.
    pub fn cancel_load(&self, session: SessionId, question: u64, drained: Box<dyn FnOnce() + Send>) -> bool {
        self.shared.engines.flights.cancel((session, question), drained)
    }
}
