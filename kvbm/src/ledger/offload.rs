//! Offload: which committed blocks go to host next.
//!
//! Write-through is a backlog per pool, not a queue of requests: it can hold no more than the pool's blocks, so nothing
//! is dropped when the copy queue is full, it is only copied later. A block whose ancestors are no longer in host takes
//! them along, as far as they are in the pool (and they are: prefixes are closed).

use super::device::Backlogged;
use super::disk::StoredBlock;
use super::key::Key;
use super::segments::{Claimed, Class, Place};
use super::slots::{Allowances, Copying, Incoming, Need, NotReserved, Reserved, SlotIndex};
use super::waiters::{ArrivalReport, WaiterId};
use super::{BlockRef, Ledger, Millis, NamespaceId, Owner, PoolId, Retention, SessionId};
use crate::error::Refused;
use crate::tier::Tier;

/// One block on its way to host.
#[derive(Debug)]
struct OffloadItem {
    source: Copying,
    key: Key,
    target: Reserved,
    place: Place,
    stored: StoredBlock,
}

/// Blocks of one pool to be copied to host, in this order. Comes back through [`Ledger::finish_offload`].
#[must_use]
#[derive(Debug)]
pub struct OffloadBatch {
    /// From which pool.
    pub pool: PoolId,
    /// The writer's epoch: if it moves before the copy ended, what was copied does not count.
    pub epoch: u64,
    /// More than half of the pool's blocks are nowhere else: they should be copied before they have to go.
    pub pressed: bool,
    class: Class,
    items: Vec<OffloadItem>,
    /// Digest of the namespace of the last item: mostly the next one's too.
    digest: Option<(NamespaceId, [u8; 32])>,
}

impl OffloadBatch {
    /// Bytes from slot to slot.
    pub fn stride(&self) -> usize {
        self.class.stride
    }

    /// What is to be copied: block of the pool, place in host memory.
    pub fn copies(&self) -> impl ExactSizeIterator<Item = (u32, Place)> + '_ {
        self.items.iter().map(|item| (item.source.slot().0, item.place))
    }

    /// What the places hold when the copies have ended well.
    pub fn stored(&self) -> impl ExactSizeIterator<Item = (Place, StoredBlock)> + '_ {
        self.items.iter().map(|item| (item.place, item.stored))
    }
}

/// Whether a block goes with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planned {
    Yes,
    /// There is no room now.
    Later,
    /// There will be no room.
    Never,
}

impl Ledger {
    /// The next blocks to copy to host, `max` at most. Pools take turns.
    pub fn next_offload(&mut self, max: usize, now: Millis) -> Option<OffloadBatch> {
        let after = self.next_offload_pool;
        let later = self.pools.range((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded));
        let order: Vec<PoolId> = later.chain(self.pools.range(..=after)).map(|(id, _)| *id).collect();
        for id in order {
            if let Some(batch) = self.next_offload_of(id, max, now) {
                self.next_offload_pool = id;
                return Some(batch);
            }
        }
        None
    }

    fn next_offload_of(&mut self, id: PoolId, max: usize, now: Millis) -> Option<OffloadBatch> {
        let pool = self.pools.get(&id)?;
        // A silent writer may have raised its epoch and be reusing blocks.
        if matches!(pool.owner, Owner::Silent(_) | Owner::Retired) || pool.backlog.is_empty() {
            return None;
        }
        let max = max.min(pool.offload_room());
        if max == 0 {
            return None;
        }
        let class = Class { domain: pool.identity.domain, stride: pool.identity.layout.stride() };
        let pressed = pool.backlog.len() * 2 > pool.identity.layout.block_count as usize;
        let mut batch =
            OffloadBatch { pool: id, epoch: pool.epoch, pressed, class, items: Vec::new(), digest: None };
        let rights = Claimed { tier: Tier::Host, tenants: &self.tenants, now };
        self.host.claim_share(class, rights);
        let allowances = self.tenants.in_segments(Tier::Host, &self.host, class);
        while batch.items.len() < max {
            let pool = self.pools.get_mut(&id)?;
            let Some(Backlogged { block, key }) = pool.backlog.pop_front() else { break };
            if !pool.slots.is_resident(SlotIndex(block.block), block.generation) {
                self.waiters.settle(key, false);
                continue;
            }
            if !self.plan_with_ancestors(id, SlotIndex(block.block), &mut batch, max, &allowances, now) {
                break;
            }
        }
        self.sweep();
        if batch.items.is_empty() {
            return None;
        }
        let pool = self.pools.get_mut(&id)?;
        pool.batches += 1;
        pool.offloading += batch.items.len();
        Some(batch)
    }

    /// Adds a block, and before it those of its ancestors that host lacks. False: what could not be added now is at the
    /// front of the backlog again, in order.
    fn plan_with_ancestors(
        &mut self,
        id: PoolId,
        slot: SlotIndex,
        batch: &mut OffloadBatch,
        max: usize,
        allowances: &Allowances,
        now: Millis,
    ) -> bool {
        let pool = self.pools.get_mut(&id).expect("it was just there");
        let (key, _) = pool.slots.block(slot).expect("resident blocks are planned");
        let known = self.host.class_mut(batch.class).filter(|table| table.slots.knows(key));
        if let Some(known) = known {
            // In host, or on its way there: then the outcome of that copy settles it.
            if let Some(in_host) = known.slots.resident(key) {
                let retention = pool.slots.retention(slot, now);
                if retention != Retention::default() {
                    known.slots.set_retention(in_host, retention, now);
                }
                let priority = known.slots.priority(in_host);
                self.waiters.settle(key, true);
                // Computed again: a use.
                self.used_in_host(batch.class, key, priority);
            }
            return true;
        }
        let (pool, host) = (&self.pools[&id], self.host.class(batch.class));
        let lacking = |slot: &SlotIndex| {
            let (key, _) = pool.slots.block(*slot).expect("ancestors of a resident block are resident");
            !host.is_some_and(|table| table.slots.knows(key))
        };
        let mut chain: Vec<SlotIndex> = pool.slots.ancestors(slot).take_while(lacking).collect();
        chain.reverse();
        for (i, wanted) in chain.iter().enumerate() {
            let planned = if self.pools[&id].slots.is_left_out(*wanted) {
                Planned::Never
            } else if batch.items.len() >= max {
                Planned::Later
            } else {
                self.plan_one(id, *wanted, batch, allowances, now)
            };
            if planned == Planned::Yes {
                continue;
            }
            let pool = self.pools.get_mut(&id).expect("it was just there");
            let is_left_out = pool.slots.is_left_out(*wanted);
            for slot in chain[i..].iter().rev() {
                let (key, _) = pool.slots.block(*slot).expect("nothing was evicted here");
                if is_left_out && !pool.slots.is_left_out(*slot) {
                    pool.slots.leave_out(*slot);
                    let depth = pool.slots.depth(Some(*slot)) as u32;
                    if let Some(table) = self.host.class_mut(batch.class) {
                        table.slots.passed_over(key, depth, now);
                    }
                }
                match planned {
                    Planned::Never => self.waiters.settle(key, false),
                    Planned::Later | Planned::Yes => {
                        pool.backlog.push_front(Backlogged { block: pool.block_ref(*slot), key });
                    }
                }
            }
            return planned == Planned::Never;
        }
        true
    }

    fn plan_one(
        &mut self,
        id: PoolId,
        slot: SlotIndex,
        batch: &mut OffloadBatch,
        allowances: &Allowances,
        now: Millis,
    ) -> Planned {
        let pool = self.pools.get_mut(&id).expect("it was just there");
        let (key, parent) = pool.slots.block(slot).expect("resident blocks are planned");
        // Those behind it in its prefix do not go either: they are planned behind it or not at all.
        if pool.slots.priority(slot) < self.config.offload_priority_min {
            self.tally.offloads_unimportant += 1;
            return Planned::Never;
        }
        let digest = match batch.digest {
            Some((namespace, digest)) if namespace == key.namespace => Some(digest),
            Some(_) | None => self.registry.namespace(key.namespace).map(|namespace| namespace.digest),
        };
        let Some(namespace) = digest else { return Planned::Never };
        batch.digest = Some((key.namespace, namespace));
        let Some(table) = self.host.make_room_near(batch.class, pool.node) else {
            self.tally.host_exhausted += 1;
            return Planned::Never;
        };
        let retention = pool.slots.retention(slot, now);
        let need = if self.disk.tier.is_on() { Need::Passing } else { Need::Optional };
        let block = Incoming { key, parent, retention, group: pool.slots.group_of(slot) };
        match table.slots.reserve(block, need, allowances, now) {
            Ok(target) => {
                let place = table.place(target.slot());
                let stored = StoredBlock { namespace, key: key.hash, parent, retention };
                let source = pool.slots.begin_copy(slot);
                batch.items.push(OffloadItem { source, key, target, place, stored });
                Planned::Yes
            }
            Err(NotReserved::Resident | NotReserved::Filling) => Planned::Yes,
            Err(NotReserved::Orphan) => {
                self.tally.orphans += 1;
                Planned::Never
            }
            Err(NotReserved::NotAdmitted) => {
                self.tally.host_not_admitted += 1;
                pool.slots.leave_out(slot);
                Planned::Never
            }
            // Counted for its tenant.
            Err(NotReserved::OverQuota) => {
                pool.slots.leave_out(slot);
                Planned::Never
            }
            Err(NotReserved::Exhausted) => {
                // Memory that is not populated yet, copies that end, leases that end: room will come. Else the chain
                // itself fills the tier.
                let counts = table.slots.counts();
                if table.slots.slots() == 0 || counts.filling + counts.pinned > 0 {
                    return Planned::Later;
                }
                self.tally.host_exhausted += 1;
                Planned::Never
            }
        }
    }

    /// The copies of a batch ended. `copied`: all bytes arrived and the epoch did not move. Returns the blocks that
    /// are resident in host now because of it.
    pub fn finish_offload(&mut self, batch: OffloadBatch, copied: bool, now: Millis) -> usize {
        let mut stored = 0;
        let pool = self.pools.get_mut(&batch.pool).expect("it is kept while a batch is in flight");
        pool.batches -= 1;
        pool.offloading -= batch.items.len();
        for item in batch.items {
            let table = self.host.class_mut(batch.class).expect("slots are reserved in it");
            let pool = self.pools.get_mut(&batch.pool).expect("it is kept while a batch is in flight");
            let alive = self.registry.namespace(item.key.namespace).is_some();
            let committed = if copied && alive {
                table.slots.commit(item.target, now)
            } else {
                table.slots.abandon(item.target, now);
                false
            };
            stored += usize::from(committed);
            let priority = pool.slots.priority(item.source.slot());
            pool.slots.end_copy(item.source, now);
            if committed {
                self.used_in_host(batch.class, item.key, priority);
            }
            self.waiters.settle(item.key, committed);
        }
        self.settle_fills(now);
        self.collect_pool(batch.pool);
        self.sweep();
        stored
    }

    /// Asks when these committed blocks are in host memory. Answered by [`Ledger::take_arrivals`].
    pub fn watch_offload(
        &mut self,
        session: SessionId,
        id: PoolId,
        blocks: &[BlockRef],
    ) -> Result<WaiterId, Refused> {
        let pool = self.owned_pool_mut(session, id)?;
        if blocks.is_empty() {
            return Err(Refused::invalid("blocks", "none given"));
        }
        let mut keys = Vec::with_capacity(blocks.len());
        for block in blocks {
            let slot = SlotIndex(block.block);
            let key = pool.slots.block(slot).filter(|_| pool.slots.is_resident(slot, block.generation));
            let (key, _) = key.ok_or_else(|| {
                Refused::invalid("blocks", format!("block {} is not committed", block.block))
            })?;
            keys.push(key);
        }
        let class = Class { domain: pool.identity.domain, stride: pool.identity.layout.stride() };
        let waiter = self.waiters.add(Some(id), &keys);
        if !self.host.is_on() {
            keys.into_iter().for_each(|key| self.waiters.settle(key, false));
            return Ok(waiter);
        }
        let host = self.host.class(class);
        let pool = self.pools.get_mut(&id).expect("it was just there");
        for (key, block) in keys.into_iter().zip(blocks) {
            match host.filter(|table| table.slots.knows(key)) {
                Some(table) if table.slots.resident(key).is_some() => self.waiters.settle(key, true),
                // The copy that is under way settles it.
                Some(_) => {}
                None => {
                    // Somebody waits for it: it gets another chance.
                    pool.slots.try_again(SlotIndex(block.block));
                    pool.backlog.push_back(Backlogged { block: *block, key });
                }
            }
        }
        Ok(waiter)
    }

    /// Questions that have been answered.
    pub fn take_arrivals(&mut self) -> Vec<(WaiterId, ArrivalReport)> {
        self.waiters.take_finished()
    }

    /// Blocks that wait to be copied to host.
    pub fn backlog(&self) -> usize {
        self.pools.values().map(|pool| pool.backlog.len()).sum()
    }

    /// Host memory that all is in use: what a caller is told.
    pub fn host_exhausted(&self, wanted: usize) -> Refused {
        let available = self.host.summaries().iter().map(|s| s.counts.free).sum();
        Refused::Exhausted { tier: Tier::Host, wanted, available }
    }
}
