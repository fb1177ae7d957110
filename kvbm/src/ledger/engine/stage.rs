//! Staged pools: which slots the engine is to write by itself.

use super::place::{NotBegun, Wanted};
use super::store::StagedWrite;
use super::{EngineOwner, StoreBlock, StoreId, Verdict};
use crate::error::Refused;
use crate::ledger::key::Key;
use crate::ledger::segments::{Class, Place};
use crate::ledger::slots::Incoming;
use crate::ledger::{Ledger, Millis, PoolId, SessionId};

/// A slot that the engine is to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StagedSlot {
    /// Where.
    pub place: Place,
    /// Of the slot.
    pub generation: u32,
    /// Entry of the pool's pin table.
    pub pin: u32,
}

impl Ledger {
    /// Staged: places for those of these blocks that the engine is to copy.
    pub fn stage(&mut self, store: StoreId, blocks: &[StoreBlock], now: Millis) -> Vec<StagedSlot> {
        let Some(open) = self.engines.stores.open.get(&store) else { return Vec::new() };
        let (id, namespace) = (open.pool, open.namespace);
        let Some(pool) = self.engines.pools.get(&id) else { return Vec::new() };
        let (class, engine, shard) = (pool.identity.class(), pool.identity.engine, pool.identity.shard);
        let allowances = self.prepare_host(class, now);
        let ranks = self.engines.ranks(engine);
        let group = self.registry.group_of(namespace);
        let mut slots = Vec::new();
        for block in blocks {
            let at = self.add_to_store(store);
            let key = Key { namespace, hash: block.hash };
            let verdict = 'verdict: {
                if self.is_in_host(id, key, block.retention, now) {
                    break 'verdict Verdict::Resident;
                }
                let room = self.staged_room(class);
                let pool = &self.engines.pools[&id];
                if room == 0 || pool.free_write_pins.is_empty() {
                    break 'verdict Verdict::Busy;
                }
                let retention = block.retention.unwrap_or_default();
                let incoming = Incoming { key, parent: block.parent, retention, group };
                let wanted = Wanted { pool: id, block: incoming, need: self.store_need() };
                let place = match self.begin_shard(wanted, &allowances, now) {
                    Ok(place) => place,
                    Err(NotBegun::Verdict(verdict)) => break 'verdict verdict,
                    Err(NotBegun::Later) => break 'verdict Verdict::Busy,
                };
                let is_mapped = ranks.as_ref().is_some_and(|ranks| self.is_mapped(ranks, place.segment));
                if !is_mapped {
                    self.end_shard(key, shard, false);
                    self.settle_fills(now);
                    break 'verdict Verdict::Busy;
                }
                let slot = self.engines.fills.open[&key].target.slot();
                let generation = self.host.class(class).map_or(0, |table| table.slots.generation(slot));
                let pool = self.engines.pools.get_mut(&id).expect("it was just there");
                let pin = pool.free_write_pins.pop().expect("there was one");
                pool.writing += 1;
                slots.push(StagedSlot { place, generation, pin });
                let open = self.engines.stores.open.get_mut(&store).expect("it is open");
                open.writes.push(StagedWrite { key, pin });
                Verdict::Write
            };
            self.judge(Some((store, at)), verdict);
        }
        self.sweep();
        slots
    }

    /// The engine's copies of a staged store have ended. Returns the entries of the pool's pin table that stand for nothing
    /// any more.
    pub fn finish_staged(
        &mut self,
        session: SessionId,
        store: StoreId,
        copied: &[bool],
        now: Millis,
    ) -> Result<(PoolId, Vec<u32>), Refused> {
        let unknown = Refused::Unknown { what: "store" };
        let open = self.engines.stores.open.get(&store).filter(|open| !open.writes.is_empty());
        let open = open.ok_or(unknown.clone())?;
        let id = open.pool;
        let pool = self.engines.pools.get(&id).filter(|pool| pool.session() == Some(session));
        let shard = pool.ok_or(unknown)?.identity.shard;
        if copied.len() != open.writes.len() {
            let reason = format!("{} for {} slots", copied.len(), open.writes.len());
            return Err(Refused::invalid("copied", reason));
        }
        let open = self.engines.stores.open.remove(&store).expect("it was just there");
        let pins = self.end_writes(id, shard, &open.writes, copied);
        self.settle_fills(now);
        self.collect_engine_pool(id);
        self.sweep();
        Ok((id, pins))
    }

    fn end_writes(&mut self, id: PoolId, shard: u32, writes: &[StagedWrite], copied: &[bool]) -> Vec<u32> {
        for (write, arrived) in writes.iter().zip(copied) {
            self.end_shard(write.key, shard, *arrived);
            let verdict = if *arrived { Verdict::Stored } else { Verdict::Failed };
            self.tally.store_verdicts[verdict.index()] += 1;
        }
        let pins: Vec<u32> = writes.iter().map(|write| write.pin).collect();
        if let Some(pool) = self.engines.pools.get_mut(&id) {
            pool.writing -= writes.len();
            pool.free_write_pins.extend(&pins);
        }
        pins
    }

    /// The process behind a pool is dead: what it was writing does not arrive.
    pub(super) fn abandon_writes(&mut self, id: PoolId, now: Millis) {
        let stores = self.engines.stores.open.iter().filter(|(_, store)| store.pool == id);
        let stores: Vec<StoreId> = stores.map(|(id, _)| *id).collect();
        stores.into_iter().for_each(|store| self.abandon_store(store, now));
        self.settle_fills(now);
    }

    /// Nothing of a store arrives any more, and nobody copies for it.
    pub fn abandon_store(&mut self, store: StoreId, now: Millis) {
        let Some(open) = self.engines.stores.open.remove(&store) else { return };
        let Some(shard) = self.engines.pools.get(&open.pool).map(|pool| pool.identity.shard) else { return };
        let none = vec![false; open.writes.len()];
        self.end_writes(open.pool, shard, &open.writes, &none);
        for known in
            self.engines.pools.get_mut(&open.pool).into_iter().flat_map(|p| p.registered.values_mut())
        {
            known.asked = known.asked.filter(|(asked, _)| *asked != store);
        }
        self.engines.stores.give_up(store, open);
        self.settle_fills(now);
    }

    /// Staged stores that nobody will report, because their session is over while the process lives: the process clears
    /// its entries of the pin table, and that is all that it can do.
    pub fn unreported_stores(&self) -> Vec<(StoreId, PoolId, Vec<u32>)> {
        let is_over = |id: &PoolId| {
            let owner = self.engines.pools.get(id).map(|pool| pool.owner);
            matches!(owner, Some(EngineOwner::Silent(_) | EngineOwner::Former(_)))
        };
        let open = self.engines.stores.open.iter();
        open.filter(|(_, store)| !store.writes.is_empty() && is_over(&store.pool))
            .map(|(id, store)| (*id, store.pool, store.writes.iter().map(|write| write.pin).collect()))
            .collect()
    }

    /// Slots that engines may write by themselves: half of a class at most, so that what they hold does not fill it.
    fn staged_room(&self, class: Class) -> usize {
        let slots = self.host.class(class).map_or(0, |table| table.slots.slots());
        let pools = self.engines.pools.values().filter(|pool| pool.identity.class() == class);
        (slots / 2).max(1).saturating_sub(pools.map(|pool| pool.writing).sum())
    }
}
