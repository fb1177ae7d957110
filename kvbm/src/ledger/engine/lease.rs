//! Leases of engines: taken once, used by all ranks.
//!
//! A lease that is *held* has no deadline. An entry in each rank's pin table stands for it, so that it outlives the
//! daemon; it ends when each rank has cleared its entry, or is dead. Others have a deadline until the first rank begins.

use std::collections::BTreeSet;

use kvbm_hash::SequenceHash;

use super::EngineId;
use crate::error::Refused;
use crate::ledger::key::Key;
use crate::ledger::lease::{Lease, Matched};
use crate::ledger::segments::Place;
use crate::ledger::{LeaseId, Ledger, Millis, NamespaceId, PoolId, Retention, SessionId};

/// Which ranks have a lease.
#[derive(Debug)]
pub(in crate::ledger) struct EngineLease {
    pub engine: EngineId,
    /// Ranks that are not done with it.
    pub ranks: BTreeSet<PoolId>,
    /// Entry of the ranks' pin tables, if it is held.
    pub pin: Option<u32>,
}

/// An entry that stands for a lease in the pin tables of these pools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeasePin {
    /// Which.
    pub lease: LeaseId,
    /// Its entry.
    pub pin: u32,
    /// Ranks that are not done with it.
    pub pools: Vec<PoolId>,
}

/// The longest prefix that is in host memory, for an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineMatch {
    /// The device part is empty.
    pub matched: Matched,
    /// Of a held lease: where its blocks are, and the generations of their slots.
    pub slots: Vec<(Place, u32)>,
    /// Of a held lease: what is to be entered in the pin tables.
    pub pin: Option<LeasePin>,
}

/// What an engine looks for.
#[derive(Debug, Clone, Copy)]
pub struct EngineAsks<'a> {
    /// From the first block of the sequence.
    pub hashes: &'a [SequenceHash],
    /// Leading blocks that the engine has itself.
    pub skip: usize,
    /// Its processes may copy by themselves.
    pub hold: bool,
    /// How the first of the blocks are to be kept from now on.
    pub retention: &'a [Option<Retention>],
}

impl Ledger {
    /// Whether a session asks about a namespace on behalf of an engine.
    pub fn is_of_engine(&self, session: SessionId, namespace: NamespaceId) -> bool {
        let base = self.registry.base_of(session, namespace);
        base.is_ok_and(|base| self.engines.of(session, &base).is_some())
    }

    /// The longest prefix in host memory behind what the engine has itself, leased to all its ranks.
    pub fn match_for_engine(
        &mut self,
        session: SessionId,
        namespace: NamespaceId,
        asks: EngineAsks<'_>,
        now: Millis,
    ) -> Result<EngineMatch, Refused> {
        let EngineAsks { hashes, skip, hold, retention } = asks;
        let base = self.registry.base_of(session, namespace)?;
        let engine = self.engines.of(session, &base).ok_or(Refused::Unknown { what: "engine" })?;
        let matched =
            Matched { device: Vec::new(), host_blocks: 0, peer_blocks: 0, disk_blocks: 0, lease: None };
        let mut found = EngineMatch { matched, slots: Vec::new(), pin: None };
        let Some(class) = self.host_class(session, &base) else { return Ok(found) };
        let key = |i: usize| Key { namespace, hash: hashes[i] };
        if let Some((deepest, blocks)) = self.disk_prefix(class, namespace, hashes) {
            let table = self.disk.tier.class_mut(class).expect("it was found there");
            table.slots.reuse(deepest, retention, now);
            found.matched.disk_blocks = blocks.saturating_sub(skip);
        }
        let ranks = self.engines.ranks(engine);
        let Some(table) = self.host.class_mut(class) else { return Ok(found) };
        let (blocks, Some(deepest)) = table.slots.prefix(key, hashes.len()) else { return Ok(found) };
        table.slots.reuse(deepest, retention, now);
        let priority = table.slots.priority(deepest);
        self.used_in_host(class, key(blocks - 1), priority);
        let Some(ranks) = ranks.filter(|_| blocks > skip) else {
            found.matched.disk_blocks = found.matched.disk_blocks.saturating_sub(blocks.saturating_sub(skip));
            return Ok(found);
        };
        let table = self.host.class(class).expect("it was just there");
        let mut chain = table.slots.chain(deepest, blocks - skip);
        if hold {
            // Blocks of a sequence are mostly in one segment.
            let mut known = None;
            let reachable = chain.iter().take_while(|slot| {
                let segment = table.place(**slot).segment;
                let is_mapped = known == Some(segment) || self.is_mapped(&ranks, segment);
                known = is_mapped.then_some(segment);
                is_mapped
            });
            let reachable = reachable.count();
            chain.truncate(reachable);
        }
        let count = chain.len();
        let is_cut = count < blocks - skip;
        found.matched.disk_blocks = if is_cut { 0 } else { found.matched.disk_blocks.saturating_sub(count) };
        let Some(deepest) = chain.last().copied() else { return Ok(found) };
        let pin = if hold {
            let free = self.engines.engines.get_mut(&engine).and_then(|engine| engine.free_pins.pop());
            Some(free.ok_or(Refused::Busy { queue: "lease_pins" })?)
        } else {
            None
        };
        let table = self.host.class_mut(class).expect("it was just there");
        if hold {
            let slots = chain.iter().map(|slot| (table.place(*slot), table.slots.generation(*slot)));
            found.slots = slots.collect();
        }
        table.slots.pin(deepest);
        let expires = (!hold).then(|| Millis(now.0 + self.config.lease.as_millis() as u64));
        let of_engine = EngineLease { engine, ranks: ranks.iter().copied().collect(), pin };
        let lease =
            Lease { session, namespace, class, deepest, count, expires, engine: Some(of_engine), peer: None };
        let lease = self.leases.add(lease);
        found.matched.host_blocks = count;
        found.matched.lease = Some(lease);
        found.pin = pin.map(|pin| LeasePin { lease, pin, pools: ranks });
        Ok(found)
    }

    /// A lease of an engine.
    pub(super) fn engine_lease(&self, engine: EngineId, id: LeaseId) -> Result<&Lease, Refused> {
        let lease = self.leases.get(id);
        let mine = |lease: &&Lease| lease.engine.as_ref().is_some_and(|of| of.engine == engine);
        lease.filter(mine).ok_or(Refused::Unknown { what: "lease" })
    }

    /// A session of the engine is done with a lease: with its own part of it, or (`whole`) with all of it. False: it is no
    /// lease of an engine.
    pub fn release_engine_lease(
        &mut self,
        session: SessionId,
        id: LeaseId,
        whole: bool,
        now: Millis,
    ) -> Result<bool, Refused> {
        let Some(lease) = self.leases.get(id) else { return Ok(false) };
        let Some(of) = &lease.engine else { return Ok(false) };
        let member = self.engines.engines.get(&of.engine).is_some_and(|e| e.members.contains(&session));
        if !member {
            return Err(Refused::Unknown { what: "lease" });
        }
        let mine =
            |rank: &&PoolId| self.engines.pools.get(rank).is_some_and(|pool| pool.session() == Some(session));
        let rank = of.ranks.iter().find(mine).copied();
        // Of a rank whose part is over already: its pin table said so before its message came. It speaks for itself only,
        // also if its session asked for the lease; the others may still be about to begin.
        let engine = of.engine;
        let is_rank = self
            .engines
            .pools
            .values()
            .any(|pool| pool.identity.engine == engine && pool.session() == Some(session));
        match (whole, rank) {
            (false, Some(rank)) => self.rank_done(id, rank, now),
            (false, None) if is_rank || lease.session != session => {}
            (true, _) | (false, None) => self.withdraw_lease(id, now),
        }
        Ok(true)
    }

    /// No rank may begin with a lease any more.
    pub(in crate::ledger) fn withdraw_lease(&mut self, id: LeaseId, now: Millis) {
        let Some(of) = self.leases.get(id).and_then(|lease| lease.engine.as_ref()) else { return };
        match of.pin {
            // Copies that the daemon has begun hold pins of their own.
            None => self.end_lease(id, now),
            Some(_) => self.engines.withdrawn.push(id),
        }
    }

    /// Held leases whose promises are to be taken back from those ranks that have not begun. What comes of it is told by
    /// [`Ledger::rank_done`].
    pub fn take_withdrawn(&mut self) -> Vec<LeasePin> {
        let withdrawn = std::mem::take(&mut self.engines.withdrawn);
        withdrawn.into_iter().filter_map(|id| self.lease_pin(id)).collect()
    }

    /// Leases that are held, with the ranks that are not done.
    pub fn held_leases(&self) -> Vec<LeasePin> {
        self.leases.held().filter_map(|id| self.lease_pin(id)).collect()
    }

    /// The pool of a session among the ranks of a held lease, and the lease's entry.
    pub fn pin_of_rank(&self, session: SessionId, lease: LeaseId) -> Option<(PoolId, u32)> {
        let LeasePin { pin, pools, .. } = self.lease_pin(lease)?;
        let mine =
            |rank: &PoolId| self.engines.pools.get(rank).and_then(|pool| pool.session()) == Some(session);
        pools.into_iter().find(mine).map(|pool| (pool, pin))
    }

    fn lease_pin(&self, lease: LeaseId) -> Option<LeasePin> {
        let of = self.leases.get(lease)?.engine.as_ref()?;
        Some(LeasePin { lease, pin: of.pin?, pools: of.ranks.iter().copied().collect() })
    }

    /// A rank is done with a lease.
    pub fn rank_done(&mut self, id: LeaseId, rank: PoolId, now: Millis) {
        let Some(of) = self.leases.get_mut(id).and_then(|lease| lease.engine.as_mut()) else { return };
        of.ranks.remove(&rank);
        if of.ranks.is_empty() {
            self.end_lease(id, now);
        }
        self.collect_engine_pool(rank);
    }

    /// A rank is dead: done with everything.
    pub(super) fn rank_gone(&mut self, rank: PoolId, now: Millis) {
        for lease in self.leases.held_by(rank) {
            self.rank_done(lease, rank, now);
        }
    }

    /// The entry of a lease that ended stands for nothing any more.
    pub(in crate::ledger) fn free_lease_pin(&mut self, of: &EngineLease) {
        if let (Some(pin), Some(engine)) = (of.pin, self.engines.engines.get_mut(&of.engine)) {
            engine.free_pins.push(pin);
        }
    }
}
