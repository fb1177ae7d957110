//! Onboard: leased host blocks into granted device blocks.

use super::lease::Lease;
use super::segments::Place;
use super::slots::{Committed, Copying, Incoming, SlotIndex};
use super::{BlockRef, LeaseId, Ledger, Millis, NamespaceId, Owner, PoolId, SessionId};
use crate::error::Refused;

#[derive(Debug)]
struct OnboardItem {
    place: Place,
    block: Incoming,
    target: Copying,
    to: BlockRef,
}

/// Leased blocks to be copied into a pool. Holds the lease's pin. Comes back through [`Ledger::finish_onboard`].
#[must_use]
#[derive(Debug)]
pub struct OnboardBatch {
    /// Into which pool.
    pub pool: PoolId,
    /// The writer's epoch: if it has moved, the writer does not expect the bytes any more.
    pub epoch: u64,
    lease: Lease,
    items: Vec<OnboardItem>,
}

/// The next blocks of a batch. Comes back through [`Ledger::finish_onboard_part`], in order, before the batch does.
#[must_use]
#[derive(Debug)]
pub struct OnboardPart {
    pool: PoolId,
    namespace: NamespaceId,
    stride: usize,
    items: Vec<OnboardItem>,
}

impl OnboardPart {
    /// Bytes from slot to slot.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// What is to be copied: place in host memory, block of the pool.
    pub fn copies(&self) -> impl ExactSizeIterator<Item = (Place, u32)> + '_ {
        copies(&self.items)
    }
}

fn copies(items: &[OnboardItem]) -> impl ExactSizeIterator<Item = (Place, u32)> + '_ {
    items.iter().map(|item| (item.place, item.to.block))
}

impl OnboardBatch {
    /// Bytes from slot to slot.
    pub fn stride(&self) -> usize {
        self.lease.class.stride
    }

    /// Takes up to `max` blocks out of it, so that they can be settled while others are copied.
    pub fn take_part(&mut self, max: usize) -> OnboardPart {
        let items = self.items.drain(..max.min(self.items.len())).collect();
        let (namespace, stride) = (self.lease.namespace, self.stride());
        OnboardPart { pool: self.pool, namespace, stride, items }
    }

    /// What is to be copied: place in host memory, block of the pool.
    pub fn copies(&self) -> impl ExactSizeIterator<Item = (Place, u32)> + '_ {
        copies(&self.items)
    }
}

impl Ledger {
    /// Plans the copy of the first blocks of a lease into `targets`, which the session holds. Ends the lease, unless
    /// refused.
    pub fn begin_onboard(
        &mut self,
        session: SessionId,
        lease_id: LeaseId,
        id: PoolId,
        targets: &[BlockRef],
        now: Millis,
    ) -> Result<OnboardBatch, Refused> {
        let pool = self.owned_pool_mut(session, id)?;
        let mut seen = std::collections::HashSet::new();
        let writable = |b: &BlockRef| pool.slots.is_granted(SlotIndex(b.block), b.generation);
        if targets.iter().any(|target| !writable(target) || !seen.insert(target.block)) {
            return Err(Refused::Stale { what: "target block" });
        }
        let (pool_class, epoch) = ((pool.identity.domain, pool.identity.layout.stride()), pool.epoch);
        let lease = self.leases.get(lease_id).filter(|lease| lease.session == session);
        let lease = lease.filter(|lease| lease.engine.is_none()).ok_or(Refused::Unknown { what: "lease" })?;
        if (lease.class.domain, lease.class.stride) != pool_class {
            return Err(Refused::invalid("pool_id", "the leased blocks have another size"));
        }
        if targets.is_empty() || targets.len() > lease.count {
            let reason = format!("{} for a lease of {} blocks", targets.len(), lease.count);
            return Err(Refused::invalid("targets", reason));
        }
        let lease = self.leases.remove(lease_id).expect("it was just there");
        let table = self.host.class_mut(lease.class).expect("a lease is about a class that exists");
        let pool = self.pools.get_mut(&id).expect("it was just there");
        let chain = table.slots.chain(lease.deepest, lease.count);
        let items = chain.into_iter().zip(targets).map(|(slot, to)| {
            let (key, parent) = table.slots.block(slot).expect("leased blocks are resident");
            let (place, retention) = (table.place(slot), table.slots.retention(slot, now));
            let target = pool.slots.begin_copy(SlotIndex(to.block));
            let block = Incoming { key, parent, retention, group: table.slots.group_of(slot) };
            OnboardItem { place, block, target, to: *to }
        });
        let items = items.collect();
        pool.batches += 1;
        pool.onboarding += 1;
        Ok(OnboardBatch { pool: id, epoch, lease, items })
    }

    /// Copies ended. `copied`: all bytes arrived and the epoch did not move. The targets are committed under their keys;
    /// a target whose key became resident meanwhile stays private to its holder.
    pub fn finish_onboard_part(&mut self, part: OnboardPart, copied: bool, now: Millis) {
        let allowances = self.device_allowances(part.pool);
        // It may have got its tenant since the copy began.
        let group = self.registry.group_of(part.namespace);
        let pool = self.pools.get_mut(&part.pool).expect("it is kept while a batch is in flight");
        let alive = self.registry.namespace(part.namespace).is_some() && pool.owner != Owner::Retired;
        for item in part.items {
            if copied && alive {
                let slot = item.target.slot();
                let block = Incoming { group, ..item.block };
                match pool.slots.commit_granted(slot, item.to.generation, block, &allowances, now) {
                    // It is in host already, or was when it was copied: nothing to offload.
                    Committed::Resident | Committed::OverQuota | Committed::Stale => {}
                    Committed::Duplicate => self.tally.duplicate_commits += 1,
                    Committed::Orphan => self.tally.orphans += 1,
                }
            }
            pool.slots.end_copy(item.target, now);
        }
        self.sweep();
    }

    /// All copies of a batch ended; what was not taken out of it in parts is settled with it.
    pub fn finish_onboard(&mut self, mut batch: OnboardBatch, copied: bool, now: Millis) {
        let rest = batch.take_part(usize::MAX);
        self.finish_onboard_part(rest, copied, now);
        let pool = self.pools.get_mut(&batch.pool).expect("it is kept while a batch is in flight");
        pool.batches -= 1;
        pool.onboarding -= 1;
        let table = self.host.class_mut(batch.lease.class).expect("a lease is about a class that exists");
        table.slots.unpin(batch.lease.deepest, 1, now);
        self.collect_pool(batch.pool);
        self.sweep();
    }

    /// The copy could not even be queued: everything is as before it was planned, but the lease is gone.
    pub fn cancel_onboard(&mut self, batch: OnboardBatch, now: Millis) {
        self.finish_onboard(batch, false, now);
    }
}
