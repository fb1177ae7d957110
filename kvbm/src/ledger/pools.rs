//! Device pools: opening, handing over, granting, committing, releasing.

use kvbm_hash::SequenceHash;

use super::device::{Backlogged, DevicePool, PoolIdentity};
use super::key::{Key, NamespaceId};
use super::slots::{Committed, Incoming, SlotIndex, SlotTable};
use super::{BlockRef, CommitBlock, Ledger, Millis, Owner, PoolId, Retention, SessionId, TrustDomain};
use crate::error::Refused;
use crate::event::{Event, EventKind};
use crate::tier::Tier;

/// A block and the pins its holder has on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Which block.
    pub block: BlockRef,
    /// How many pins.
    pub pins: u32,
}

/// A complete block in a pool that is handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolEntry {
    /// Where it is.
    pub block: BlockRef,
    /// Its namespace.
    pub namespace: NamespaceId,
    /// Its key.
    pub hash: SequenceHash,
    /// Key of the block before it.
    pub parent: Option<SequenceHash>,
    /// The engine uses it now.
    pub held: bool,
    /// How long and how dearly it is kept.
    pub retention: Retention,
}

impl Ledger {
    /// A new, empty pool, written by `session`.
    pub fn add_pool(
        &mut self,
        session: SessionId,
        identity: PoolIdentity,
        epoch: u64,
    ) -> Result<PoolId, Refused> {
        self.registry.session(session)?;
        let stride = identity.layout.stride();
        let known = *self.strides.entry((identity.domain, identity.base)).or_insert(stride);
        if known != stride {
            let reason = format!("blocks of this namespace have {known} bytes, not {stride}");
            return Err(Refused::invalid("block_bytes", reason));
        }
        self.last_pool += 1;
        let id = PoolId(self.last_pool);
        let slots = SlotTable::new(identity.layout.block_count, self.rules);
        let pool = DevicePool {
            identity,
            owner: Owner::Session(session),
            epoch,
            slots,
            backlog: Default::default(),
            batches: 0,
            offloading: 0,
            onboarding: 0,
            node: None,
            peers: Default::default(),
        };
        self.pools.insert(id, pool);
        Ok(id)
    }

    /// Says which node of the machine's memory a pool's device is closest to: its blocks go there, as far as there is a choice.
    pub fn set_pool_node(&mut self, id: PoolId, node: Option<u32>) {
        if let Some(pool) = self.pools.get_mut(&id) {
            pool.node = node;
        }
        self.set_engine_pool_node(id, node);
    }

    /// Gives a session the pool that a dead worker left, if one fits.
    pub fn inherit_pool(
        &mut self,
        session: SessionId,
        fits: impl Fn(&PoolIdentity) -> bool,
    ) -> Result<Option<PoolId>, Refused> {
        let domain = self.registry.session(session)?.domain;
        let orphans = self.pools.iter_mut().filter_map(|(id, pool)| match pool.owner {
            // A load that the dead worker had asked for may still be written into the pool: then it is nobody's yet.
            Owner::Orphan(since)
                if pool.onboarding == 0 && pool.identity.domain == domain && fits(&pool.identity) =>
            {
                Some((since, id, pool))
            }
            _ => None,
        });
        // The youngest has the most recent blocks.
        let Some((_, id, pool)) = orphans.max_by_key(|(since, id, _)| (*since, **id)) else {
            return Ok(None);
        };
        pool.owner = Owner::Session(session);
        Ok(Some(*id))
    }

    /// The pool of that name, written or left by somebody of this domain.
    pub fn pool_named(&self, domain: TrustDomain, uuid: [u8; 16]) -> Option<PoolId> {
        let mut pools = self.pools.iter();
        let found = pools.find(|(_, pool)| {
            pool.identity.uuid == uuid && pool.identity.domain == domain && pool.owner != Owner::Retired
        });
        found.map(|(id, _)| *id)
    }

    /// True while copies of ours may still touch memory of that name on behalf of a pool that was retired.
    pub fn is_draining(&self, domain: TrustDomain, uuid: [u8; 16]) -> bool {
        let named = |pool: &DevicePool| pool.identity.uuid == uuid && pool.identity.domain == domain;
        self.pools.values().any(|pool| named(pool) && pool.owner == Owner::Retired)
    }

    /// Nobody uses the pool any more. It is gone when the last copy has ended: see [`Ledger::is_gone`].
    pub fn retire_pool(&mut self, id: PoolId) {
        self.end_peer_leases(id);
        let Some(pool) = self.pools.get_mut(&id) else { return };
        pool.owner = Owner::Retired;
        pool.backlog.clear();
        self.sweep();
        let removed = self.pools[&id].slots.residents();
        for (_, key, _) in &removed {
            self.registry.removed(key.namespace, Tier::Device);
        }
        if !removed.is_empty() {
            self.events.push(Event { tier: Tier::Device, pool: Some(id), kind: EventKind::Cleared });
        }
        self.waiters.pool_gone(id);
        self.collect_pool(id);
    }

    /// True once no copy touches the pool any more.
    pub fn is_gone(&self, id: PoolId) -> bool {
        !self.pools.contains_key(&id)
    }

    pub(super) fn collect_pool(&mut self, id: PoolId) {
        if self.pools.get(&id).is_some_and(|pool| pool.owner == Owner::Retired && pool.batches == 0) {
            let gone = self.pools.remove(&id).expect("it was just there");
            self.pools.values_mut().for_each(|pool| _ = pool.peers.remove(&id));
            self.evictions_of_gone_pools += gone.slots.evictions();
            self.tenants.pool_gone(&gone.slots);
        }
    }

    /// Pools of a session, connected or silent.
    pub fn pools_of(&self, session: SessionId) -> Vec<PoolId> {
        let mine = |pool: &DevicePool| matches!(pool.owner, Owner::Session(owner) | Owner::Silent(owner) if owner == session);
        self.pools.iter().filter(|(_, pool)| mine(pool)).map(|(id, _)| *id).collect()
    }

    /// The session that writes a pool, connected or silent.
    pub fn pool_owner(&self, id: PoolId) -> Option<SessionId> {
        match self.pools.get(&id)?.owner {
            Owner::Session(owner) | Owner::Silent(owner) => Some(owner),
            Owner::Orphan(_) | Owner::Retired => None,
        }
    }

    pub(super) fn orphan_pool(&mut self, id: PoolId, now: Millis) {
        let pool = self.pools.get_mut(&id).expect("listed just now");
        pool.owner = Owner::Orphan(now);
        pool.slots.drop_all_pins(now);
    }

    pub(super) fn drop_surplus_orphans(&mut self) {
        let mut orphans: Vec<(Millis, PoolId)> = self.orphans().collect();
        orphans.sort();
        let surplus = orphans.len().saturating_sub(self.config.orphan_pools_max);
        orphans.into_iter().take(surplus).for_each(|(_, id)| self.retire_pool(id));
    }

    /// Gives up all pools that wait for a successor.
    pub fn drop_orphans(&mut self) {
        let all: Vec<_> = self.orphans().collect();
        all.into_iter().for_each(|(_, id)| self.retire_pool(id));
    }

    pub(super) fn drop_old_orphans(&mut self, now: Millis) {
        let ttl = self.config.orphan_pool_ttl.as_millis() as u64;
        let old: Vec<_> = self.orphans().filter(|(since, _)| since.0 + ttl <= now.0).collect();
        old.into_iter().for_each(|(_, id)| self.retire_pool(id));
    }

    fn orphans(&self) -> impl Iterator<Item = (Millis, PoolId)> + '_ {
        self.pools.iter().filter_map(|(id, pool)| match pool.owner {
            Owner::Orphan(since) => Some((since, *id)),
            Owner::Session(_) | Owner::Silent(_) | Owner::Retired => None,
        })
    }

    /// All pools.
    pub fn pools(&self) -> impl Iterator<Item = (PoolId, &DevicePool)> {
        self.pools.iter().map(|(id, pool)| (*id, pool))
    }

    /// A pool.
    pub fn pool(&self, id: PoolId) -> Option<&DevicePool> {
        self.pools.get(&id)
    }

    /// Fills a new pool with what its writer kept while detached. Entries whose parent is missing are private to the
    /// engine if it uses them, else free.
    pub fn adopt_entries(
        &mut self,
        session: SessionId,
        id: PoolId,
        entries: &[PoolEntry],
        held: &[BlockRef],
        now: Millis,
    ) -> Result<(), Refused> {
        let base = self.owned_pool_mut(session, id)?.identity.base;
        for entry in entries {
            if self.registry.base_of(session, entry.namespace)? != base {
                return Err(Refused::invalid("adoption", "an entry is of another base namespace"));
            }
        }
        let offloads = self.host.is_on();
        let allowances = self.device_allowances(id);
        let pool = self.pools.get_mut(&id).expect("it was just there");
        let registry = &self.registry;
        let invalid = |block: &BlockRef| {
            Refused::invalid("adoption", format!("block {} is out of range or listed twice", block.block))
        };
        for block in entries.iter().map(|entry| &entry.block).chain(held) {
            if !pool.slots.adopt(SlotIndex(block.block), block.generation) {
                return Err(invalid(block));
            }
        }
        pool.slots.finish_adoption();
        // Parents first: each round commits what has its parent; a round without progress ends it.
        let mut rest: Vec<&PoolEntry> = entries.iter().collect();
        loop {
            let before = rest.len();
            rest.retain(|entry| {
                let slot = SlotIndex(entry.block.block);
                let key = Key { namespace: entry.namespace, hash: entry.hash };
                let group = registry.group_of(entry.namespace);
                let block = Incoming { key, parent: entry.parent, retention: entry.retention, group };
                match pool.slots.commit_granted(slot, entry.block.generation, block, &allowances, now) {
                    Committed::Resident => {
                        if offloads {
                            pool.backlog.push_back(Backlogged { block: entry.block, key });
                        }
                        false
                    }
                    Committed::Duplicate | Committed::OverQuota | Committed::Stale => false,
                    Committed::Orphan => true,
                }
            });
            if rest.is_empty() || rest.len() == before {
                break;
            }
        }
        for entry in entries.iter().filter(|entry| !entry.held) {
            pool.slots.unpin(SlotIndex(entry.block.block), 1, now);
        }
        self.sweep();
        Ok(())
    }

    /// Complete blocks of a pool, parents first.
    pub fn entries(&self, id: PoolId) -> Vec<PoolEntry> {
        let Some(pool) = self.pools.get(&id) else { return Vec::new() };
        let blocks = pool.slots.residents().into_iter();
        blocks
            .map(|(slot, key, parent)| PoolEntry {
                block: pool.block_ref(slot),
                namespace: key.namespace,
                hash: key.hash,
                parent,
                held: pool.slots.pins(slot) > 0,
                retention: pool.slots.retention_as_set(slot),
            })
            .collect()
    }

    /// Up to `count` blocks to write into.
    pub fn request_grants(
        &mut self,
        session: SessionId,
        id: PoolId,
        count: usize,
        now: Millis,
    ) -> Result<Vec<BlockRef>, Refused> {
        self.owned_pool_mut(session, id)?;
        let allowances = self.device_allowances(id);
        let pool = self.pools.get_mut(&id).expect("it was just there");
        let mut blocks = Vec::with_capacity(count.min(pool.slots.slots()));
        while blocks.len() < count {
            let Some(slot) = pool.slots.grant(&allowances, now) else { break };
            blocks.push(pool.block_ref(slot));
        }
        self.tally.grants_short += u64::from(blocks.len() < count);
        self.sweep();
        Ok(blocks)
    }

    /// Blocks are complete. Each is judged by itself; the worst that happens to one is that others do not find it.
    pub fn commit(
        &mut self,
        session: SessionId,
        namespace: NamespaceId,
        id: PoolId,
        blocks: &[CommitBlock],
        now: Millis,
    ) -> Result<(), Refused> {
        let base = self.registry.base_of(session, namespace)?;
        let offloads = self.host.is_on();
        let (allowances, group) = (self.device_allowances(id), self.registry.group_of(namespace));
        let pool = self.owned_pool_mut(session, id)?;
        if pool.identity.base != base {
            return Err(Refused::invalid("namespace_id", "the pool is of another base namespace"));
        }
        let (mut duplicates, mut orphans, mut stale) = (0, 0, 0);
        for commit in blocks {
            let slot = SlotIndex(commit.block.block);
            let key = Key { namespace, hash: commit.hash };
            let retention = commit.retention.unwrap_or_default();
            let block = Incoming { key, parent: commit.parent, retention, group };
            match pool.slots.commit_granted(slot, commit.block.generation, block, &allowances, now) {
                Committed::Resident => {
                    if offloads {
                        pool.backlog.push_back(Backlogged { block: commit.block, key });
                    }
                }
                Committed::Duplicate => {
                    duplicates += 1;
                    // Computed again for somebody who keeps it otherwise.
                    if let (Some(there), Some(said)) = (pool.slots.resident(key), commit.retention) {
                        pool.slots.set_retention(there, said, now);
                    }
                }
                Committed::Orphan => orphans += 1,
                // Counted for its tenant.
                Committed::OverQuota => {}
                Committed::Stale => stale += 1,
            }
        }
        self.tally.duplicate_commits += duplicates;
        self.tally.orphans += orphans;
        self.sweep();
        if stale > 0 { Err(Refused::Stale { what: "committed block" }) } else { Ok(()) }
    }

    /// Gives back pins. References of the past are ignored.
    pub fn release(
        &mut self,
        session: SessionId,
        id: PoolId,
        blocks: &[Held],
        now: Millis,
    ) -> Result<(), Refused> {
        let pool = self.owned_pool_mut(session, id)?;
        for held in blocks {
            let slot = SlotIndex(held.block.block);
            let current = held.block.block < pool.identity.layout.block_count
                && pool.slots.generation(slot) == held.block.generation;
            if current {
                pool.slots.unpin(slot, held.pins, now);
            }
        }
        self.sweep();
        Ok(())
    }
}
