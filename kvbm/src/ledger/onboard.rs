//! Onboard: leased blocks, of host memory or of another pool, into granted device blocks.

use super::device::Backlogged;
use super::lease::Lease;
use super::peers::PeerPool;
use super::segments::Place;
use super::slots::{Committed, Copying, Incoming, SlotIndex};
use super::{BlockRef, LeaseId, Ledger, Millis, NamespaceId, Owner, PoolId, SessionId};
use crate::error::Refused;

/// Where the bytes of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnboardFrom {
    /// In host memory.
    Host(Place),
    /// In this block of the pool that the batch names.
    Peer(u32),
}

#[derive(Debug)]
enum Source {
    Host(Place),
    Peer(Copying),
}

#[derive(Debug)]
struct OnboardItem {
    source: Source,
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
    /// Out of which pool; `None`: out of host memory.
    pub peer: Option<PeerPool>,
    lease: Lease,
    items: Vec<OnboardItem>,
}

/// The next blocks of a batch. Comes back through [`Ledger::finish_onboard_part`], in order, before the batch does.
#[must_use]
#[derive(Debug)]
pub struct OnboardPart {
    pool: PoolId,
    peer: Option<PeerPool>,
    namespace: NamespaceId,
    stride: usize,
    items: Vec<OnboardItem>,
}

impl OnboardPart {
    /// Bytes from slot to slot.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// What is to be copied: from where, to which block of the pool.
    pub fn copies(&self) -> impl ExactSizeIterator<Item = (OnboardFrom, u32)> + '_ {
        copies(&self.items)
    }
}

fn copies(items: &[OnboardItem]) -> impl ExactSizeIterator<Item = (OnboardFrom, u32)> + '_ {
    items.iter().map(|item| {
        let from = match &item.source {
            Source::Host(place) => OnboardFrom::Host(*place),
            Source::Peer(hold) => OnboardFrom::Peer(hold.slot().0),
        };
        (from, item.to.block)
    })
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
        OnboardPart { pool: self.pool, peer: self.peer, namespace, stride, items }
    }

    /// What is to be copied: from where, to which block of the pool.
    pub fn copies(&self) -> impl ExactSizeIterator<Item = (OnboardFrom, u32)> + '_ {
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
        let source = lease.peer.as_ref().map(|peer| peer.pool);
        if source.is_some_and(|source| !self.pools[&id].peers.contains(&source)) {
            return Err(Refused::invalid("pool_id", "the leased blocks cannot be copied into this pool"));
        }
        let (peer, sources) = match source {
            Some(source) => {
                let (peer, holds) = self.begin_peer_copy(source, lease_id, targets.len())?;
                (Some(peer), holds.into_iter().map(Source::Peer).collect())
            }
            None => (None, Vec::new()),
        };
        let lease = self.leases.remove(lease_id).expect("it was just there");
        let mut table = None;
        let slots = match peer {
            Some(peer) => &mut self.pools.get_mut(&peer.pool).expect("it was just there").slots,
            None => {
                let host = self.host.class_mut(lease.class).expect("a lease is about a class that exists");
                &mut table.insert(host).slots
            }
        };
        let chain: Vec<SlotIndex> = slots.chain(lease.deepest, lease.count);
        let block = |slot: &SlotIndex| {
            let (key, parent) = slots.block(*slot).expect("leased blocks are resident");
            let retention = slots.retention(*slot, now);
            Incoming { key, parent, retention, group: slots.group_of(*slot) }
        };
        let blocks: Vec<Incoming> = chain.iter().take(targets.len()).map(block).collect();
        let sources = match table {
            Some(table) => chain.iter().map(|slot| Source::Host(table.place(*slot))).collect(),
            None => sources,
        };
        let pool = self.pools.get_mut(&id).expect("it was just there");
        let items = sources.into_iter().zip(blocks).zip(targets).map(|((source, block), to)| {
            let target = pool.slots.begin_copy(SlotIndex(to.block));
            OnboardItem { source, block, target, to: *to }
        });
        let items = items.collect();
        pool.batches += 1;
        pool.onboarding += 1;
        Ok(OnboardBatch { pool: id, epoch, peer, lease, items })
    }

    /// Copies ended. `copied`: all bytes arrived and the epoch did not move. The targets are committed under their keys;
    /// a target whose key became resident meanwhile stays private to its holder.
    pub fn finish_onboard_part(&mut self, part: OnboardPart, copied: bool, now: Millis) {
        let allowances = self.device_allowances(part.pool);
        // It may have got its tenant since the copy began.
        let group = self.registry.group_of(part.namespace);
        let offloads = self.host.is_on() && part.peer.is_some();
        let pool = self.pools.get_mut(&part.pool).expect("it is kept while a batch is in flight");
        let alive = self.registry.namespace(part.namespace).is_some() && pool.owner != Owner::Retired;
        let mut holds = Vec::new();
        for item in part.items {
            if let Source::Peer(hold) = item.source {
                holds.push(hold);
            }
            if copied && alive {
                let slot = item.target.slot();
                let block = Incoming { group, ..item.block };
                match pool.slots.commit_granted(slot, item.to.generation, block, &allowances, now) {
                    Committed::Resident if offloads => {
                        pool.backlog.push_back(Backlogged { block: item.to, key: block.key });
                    }
                    // It is in host already, or was when it was copied: nothing to offload.
                    Committed::Resident | Committed::OverQuota | Committed::Stale => {}
                    Committed::Duplicate => self.tally.duplicate_commits += 1,
                    Committed::Orphan => self.tally.orphans += 1,
                }
            }
            pool.slots.end_copy(item.target, now);
        }
        if let Some(peer) = part.peer {
            self.end_peer_holds(peer.pool, holds.into_iter(), now);
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
        match batch.lease.peer {
            Some(source) => {
                self.end_peer_holds(source.pool, std::iter::once(source.hold), now);
                self.end_peer_copy(source.pool);
            }
            None => {
                let table =
                    self.host.class_mut(batch.lease.class).expect("a lease is about a class that exists");
                table.slots.unpin(batch.lease.deepest, 1, now);
            }
        }
        self.collect_pool(batch.pool);
        self.sweep();
    }

    /// The copy could not even be queued: everything is as before it was planned, but the lease is gone.
    pub fn cancel_onboard(&mut self, batch: OnboardBatch, now: Millis) {
        self.finish_onboard(batch, false, now);
    }
}
