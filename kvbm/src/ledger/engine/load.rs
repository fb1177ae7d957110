//! Leased host blocks into blocks of an ipc pool, copied by the daemon.

use std::collections::HashSet;

use super::EnginePoolMode;
use crate::error::Refused;
use crate::ledger::segments::{Class, Place};
use crate::ledger::slots::SlotIndex;
use crate::ledger::{BlockRef, LeaseId, Ledger, Millis, PoolId, SessionId};

/// Leased blocks to be copied into a pool. Holds a pin of its own. Comes back through [`Ledger::finish_load`].
#[must_use]
#[derive(Debug)]
pub struct LoadBatch {
    /// Into which pool.
    pub pool: PoolId,
    /// Of which lease.
    pub lease: LeaseId,
    /// From which of its blocks on.
    pub first: usize,
    class: Class,
    deepest: SlotIndex,
    items: Vec<(Place, BlockRef)>,
}

impl LoadBatch {
    /// Bytes from slot to slot.
    pub fn stride(&self) -> usize {
        self.class.stride
    }

    /// What is to be copied: place in host memory, block of the pool and the generation it must have.
    pub fn copies(&self) -> &[(Place, BlockRef)] {
        &self.items
    }
}

impl Ledger {
    /// Plans the copy of the blocks of a lease from the `first`-th on into `targets`, which the engine holds.
    pub fn begin_load(
        &mut self,
        session: SessionId,
        lease_id: LeaseId,
        id: PoolId,
        first: usize,
        targets: &[BlockRef],
    ) -> Result<LoadBatch, Refused> {
        let pool = self.engine_pool_mut(session, id)?;
        if pool.identity.mode != EnginePoolMode::Ipc {
            return Err(Refused::invalid("pool_id", "the pool is staged: its engine copies"));
        }
        let (engine, count) = (pool.identity.engine, pool.identity.block_count);
        let mut seen = HashSet::new();
        if let Some(target) = targets.iter().find(|t| t.block >= count || !seen.insert(t.block)) {
            let reason = format!("block {} is out of range or named twice", target.block);
            return Err(Refused::invalid("targets", reason));
        }
        let lease = self.engine_lease(engine, lease_id)?;
        let end = first.checked_add(targets.len()).filter(|end| *end <= lease.count);
        if targets.is_empty() || end.is_none() {
            let reason = format!("{} behind {first} for a lease of {} blocks", targets.len(), lease.count);
            return Err(Refused::invalid("targets", reason));
        }
        let (class, deepest, count) = (lease.class, lease.deepest, lease.count);
        self.leases.keep(lease_id);
        let table = self.host.class_mut(class).expect("a lease is about a class that exists");
        let chain = table.slots.chain(deepest, count);
        let places = chain.into_iter().skip(first).map(|slot| table.place(slot));
        let items = places.zip(targets.iter().copied()).collect();
        table.slots.pin(deepest);
        self.engines.pools.get_mut(&id).expect("it was just there").batches += 1;
        Ok(LoadBatch { pool: id, lease: lease_id, first, class, deepest, items })
    }

    /// The copies of a batch ended, well or not.
    pub fn finish_load(&mut self, batch: LoadBatch, now: Millis) {
        let table = self.host.class_mut(batch.class).expect("a lease is about a class that exists");
        table.slots.unpin(batch.deepest, 1, now);
        let pool = self.engines.pools.get_mut(&batch.pool).expect("it is kept while a batch is in flight");
        pool.batches -= 1;
        self.collect_engine_pool(batch.pool);
        self.sweep();
    }
}
