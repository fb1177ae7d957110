//! Which complete blocks of ipc pools are copied to host memory next, and what came of it.
//!
//! As with owned pools, what is to be copied is a backlog per pool that can hold no more than the pool has blocks: nothing
//! is dropped because a queue is short. When an engine dies its backlog is all that it had registered, dearest first.

use std::cmp::Reverse;

use super::place::{NotBegun, Wanted};
use super::{EngineOwner, Registered, Verdict};
use crate::ledger::key::Key;
use crate::ledger::segments::{Class, Place};
use crate::ledger::slots::{Allowances, Incoming, Need};
use crate::ledger::{BlockRef, Ledger, Millis, PoolId};

/// Batches that a pool's share of blocks in flight is cut into.
const BATCHES_IN_FLIGHT: usize = 4;
/// Blocks of one pool that are copied at a time, at most.
const BLOCKS_IN_FLIGHT: usize = 1024;

/// One block to be copied: from which block of the pool, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreCopy {
    /// In this generation.
    pub from: BlockRef,
    /// The slot; the part of the pool's rank begins at its shard offset.
    pub to: Place,
}

/// What came of one copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied {
    /// All bytes arrived, and were of that generation.
    Arrived,
    /// The block's word has moved.
    Stale,
    /// Not all bytes arrived.
    Failed,
}

#[derive(Debug)]
struct StoreItem {
    copy: StoreCopy,
    number: u64,
    key: Key,
}

/// Blocks of one pool to be copied to host, in this order. Comes back through [`Ledger::finish_store`].
#[must_use]
#[derive(Debug)]
pub struct StoreBatch {
    /// From which pool.
    pub pool: PoolId,
    /// True if its engine is dead.
    pub rescue: bool,
    class: Class,
    shard: u32,
    items: Vec<StoreItem>,
}

impl StoreBatch {
    /// Bytes from slot to slot.
    pub fn stride(&self) -> usize {
        self.class.stride
    }

    /// What is to be copied.
    pub fn copies(&self) -> impl ExactSizeIterator<Item = StoreCopy> + '_ {
        self.items.iter().map(|item| item.copy)
    }
}

/// Whether a block goes with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planned {
    Yes,
    /// There is no room now.
    Later,
    /// It does not go now; whoever asked has been told.
    Never,
}

impl Ledger {
    /// The next blocks of ipc pools to copy to host, `max` at most. Pools take turns.
    pub fn next_store(&mut self, max: usize, now: Millis) -> Option<StoreBatch> {
        let ids: Vec<PoolId> = self.engines.pools.keys().copied().collect();
        let first = ids.partition_point(|id| Some(*id) <= self.engines.next_pool);
        for id in ids[first..].iter().chain(&ids[..first]) {
            if let Some(batch) = self.next_store_of(*id, max, now) {
                self.engines.next_pool = Some(*id);
                return Some(batch);
            }
        }
        None
    }

    fn next_store_of(&mut self, id: PoolId, max: usize, now: Millis) -> Option<StoreBatch> {
        let pool = self.engines.pools.get(&id)?;
        let rescue = match pool.owner {
            EngineOwner::Session(_) => false,
            EngineOwner::Rescue(until) if now < until => true,
            EngineOwner::Rescue(_)
            | EngineOwner::Silent(_)
            | EngineOwner::Former(_)
            | EngineOwner::Retired => return None,
        };
        let in_flight = (pool.identity.block_count as usize).clamp(1, BLOCKS_IN_FLIGHT);
        let room = in_flight.div_ceil(BATCHES_IN_FLIGHT).min(in_flight.saturating_sub(pool.storing));
        let max = max.min(room);
        if max == 0 || pool.backlog.is_empty() {
            return None;
        }
        let (class, shard) = (pool.identity.class(), pool.identity.shard);
        let allowances = self.prepare_host(class, now);
        let mut batch = StoreBatch { pool: id, rescue, class, shard, items: Vec::new() };
        while batch.items.len() < max {
            let pool = self.engines.pools.get_mut(&id).expect("it was just there");
            let Some((block, number)) = pool.backlog.pop_front() else { break };
            let is_current = |known: &&Registered| known.number == number && !known.copying;
            if pool.registered.get(&block).filter(is_current).is_none() {
                continue;
            }
            if self.plan_store(id, block, &mut batch, max, &allowances, now) == Planned::Later {
                let pool = self.engines.pools.get_mut(&id).expect("it was just there");
                pool.backlog.push_front((block, number));
                break;
            }
        }
        self.settle_fills(now);
        self.sweep();
        if batch.items.is_empty() {
            return None;
        }
        let pool = self.engines.pools.get_mut(&id).expect("it was just there");
        pool.batches += 1;
        pool.storing += batch.items.len();
        Some(batch)
    }

    /// Adds a block, and before it those of its ancestors that are registered in this pool and not known in host memory.
    fn plan_store(
        &mut self,
        id: PoolId,
        block: u32,
        batch: &mut StoreBatch,
        max: usize,
        allowances: &Allowances,
        now: Millis,
    ) -> Planned {
        let pool = &self.engines.pools[&id];
        let host = self.host.class(batch.class);
        let lacking = |key: Key| !host.is_some_and(|table| table.slots.knows(key));
        let mut chain = vec![block];
        let mut last = &pool.registered[&block];
        while let Some(parent) = last.parent {
            let key = Key { hash: parent, ..last.key };
            let Some(known) = pool.by_key.get(&key).filter(|_| lacking(key)) else { break };
            // No chain of keys is longer than the pool, unless the engine made it a circle.
            if chain.len() > pool.registered.len() {
                break;
            }
            chain.push(*known);
            last = &pool.registered[known];
        }
        for block in chain.iter().rev() {
            if batch.items.len() >= max {
                return Planned::Later;
            }
            match self.plan_one_store(id, *block, batch, allowances, now) {
                Planned::Yes => {}
                Planned::Later => return Planned::Later,
                // Those behind it find no parent when their turn comes; they stay registered.
                Planned::Never if block == chain.first().expect("it has one") => return Planned::Never,
                Planned::Never => {}
            }
        }
        Planned::Yes
    }

    fn plan_one_store(
        &mut self,
        id: PoolId,
        block: u32,
        batch: &mut StoreBatch,
        allowances: &Allowances,
        now: Millis,
    ) -> Planned {
        let Registered { key, parent, retention, number, generation, .. } =
            self.engines.pools[&id].registered[&block];
        if self.is_in_host(id, key, Some(retention).filter(|said| *said != Default::default()), now) {
            self.stored_or_not(id, block, number, Verdict::Resident);
            return Planned::Never;
        }
        let need = if batch.rescue { Need::Wanted } else { self.store_need() };
        let group = self.registry.group_of(key.namespace);
        let wanted = Wanted { pool: id, block: Incoming { key, parent, retention, group }, need };
        match self.begin_shard(wanted, allowances, now) {
            Ok(to) => {
                let pool = self.engines.pools.get_mut(&id).expect("it was just there");
                pool.registered.get_mut(&block).expect("it was just there").copying = true;
                let from = BlockRef { block, generation };
                batch.items.push(StoreItem { copy: StoreCopy { from, to }, number, key });
                Planned::Yes
            }
            Err(NotBegun::Later) => Planned::Later,
            Err(NotBegun::Verdict(verdict)) => {
                if verdict == Verdict::Orphan {
                    self.tally.orphans += 1;
                }
                self.stored_or_not(id, block, number, verdict);
                Planned::Never
            }
        }
    }

    /// A registered block has its verdict. It stays known for a rescue if host memory lacks it and it may be right.
    fn stored_or_not(&mut self, id: PoolId, block: u32, number: u64, verdict: Verdict) {
        let Some(pool) = self.engines.pools.get_mut(&id) else { return };
        let Some(known) = pool.registered.get_mut(&block).filter(|known| known.number == number) else {
            return;
        };
        let asked = known.asked.take();
        match verdict {
            Verdict::Stored | Verdict::Resident | Verdict::Stale | Verdict::Failed => {
                pool.forget(block);
            }
            Verdict::InFlight
            | Verdict::Orphan
            | Verdict::Exhausted
            | Verdict::NotAdmitted
            | Verdict::Busy
            | Verdict::Registered
            | Verdict::Write => {}
        }
        self.judge(asked, verdict);
    }

    /// The copies of a batch ended, one outcome for each. Returns how many blocks of it arrived.
    pub fn finish_store(&mut self, batch: StoreBatch, outcomes: &[Copied], now: Millis) -> usize {
        let mut arrived = 0;
        assert_eq!(batch.items.len(), outcomes.len(), "each copy has an outcome");
        let pool = self.engines.pools.get_mut(&batch.pool).expect("it is kept while a batch is in flight");
        pool.batches -= 1;
        pool.storing -= batch.items.len();
        for (item, outcome) in batch.items.into_iter().zip(outcomes) {
            let verdict = match outcome {
                Copied::Arrived => Verdict::Stored,
                Copied::Stale => Verdict::Stale,
                Copied::Failed => Verdict::Failed,
            };
            arrived += usize::from(verdict == Verdict::Stored);
            self.end_shard(item.key, batch.shard, verdict == Verdict::Stored);
            self.stored_or_not(batch.pool, item.copy.from.block, item.number, verdict);
        }
        self.settle_fills(now);
        if batch.rescue {
            self.tally.rescued += arrived as u64;
            self.end_rescues(now);
        }
        self.collect_engine_pool(batch.pool);
        self.sweep();
        arrived
    }

    // ---- rescue -------------------------------------------------------------------------------------------------------

    /// All that a dead engine had registered is to be copied, dearest first, and what was registered first before others.
    pub(super) fn begin_rescue(&mut self, id: PoolId) {
        let pool = self.engines.pools.get_mut(&id).expect("its session was just there");
        let mut all: Vec<_> = pool.registered.iter().map(|(block, known)| (*block, known)).collect();
        all.sort_by_key(|(_, known)| (Reverse(known.retention.priority), known.number));
        pool.backlog = all.iter().map(|(block, known)| (*block, known.number)).collect();
        self.tally.rescues += u64::from(!pool.backlog.is_empty());
    }

    /// Rescues that have nothing left to do, or no time.
    pub(super) fn end_rescues(&mut self, now: Millis) {
        let over: Vec<PoolId> = self
            .engines
            .pools
            .iter()
            .filter_map(|(id, pool)| match pool.owner {
                EngineOwner::Rescue(until) => {
                    let done = pool.backlog.is_empty() && pool.batches == 0;
                    (done || until <= now).then_some(*id)
                }
                EngineOwner::Session(_)
                | EngineOwner::Silent(_)
                | EngineOwner::Former(_)
                | EngineOwner::Retired => None,
            })
            .collect();
        for id in over {
            let pool = self.engines.pools.get_mut(&id).expect("listed just now");
            pool.owner = EngineOwner::Retired;
            self.tally.rescue_left += pool.backlog.len() as u64;
            self.drop_registered(id);
            self.shards_missing(id);
            self.collect_engine_pool(id);
        }
        self.settle_fills(now);
    }
}
