//! Engines come, fall silent, come back, die.

use std::collections::{HashMap, HashSet, VecDeque};

use kvbm_shm::PoolWords;

use super::{Engine, EngineId, EngineOwner, EnginePool, EnginePoolIdentity, EnginePoolMode, RANKS_MAX};
use crate::error::Refused;
use crate::ledger::segments::SegmentId;
use crate::ledger::{Ledger, Millis, PoolId, SessionId, TrustDomain};

impl Ledger {
    /// A session takes part in an engine.
    pub fn join_engine(&mut self, session: SessionId, id: EngineId, base: [u8; 32]) -> Result<(), Refused> {
        let domain = self.registry.session(session)?.domain;
        let engine = self.engines.engines.entry(id).or_insert_with(|| Engine {
            domain,
            base,
            members: Default::default(),
            free_pins: (0..PoolWords::LEASE_PINS).rev().collect(),
        });
        if engine.domain != domain {
            return Err(Refused::Unknown { what: "engine" });
        }
        if engine.base != base {
            return Err(Refused::invalid("base", "the engine is known with another base"));
        }
        if self.engines.of(session, &base).is_some_and(|known| known != id) {
            self.collect_engine(id);
            return Err(Refused::invalid("engine", "the session is in another engine of this base"));
        }
        self.engines.engines.get_mut(&id).expect("it was just there").members.insert(session);
        Ok(())
    }

    /// Whether copies of ours still touch the memory of a pool that this one is to follow. Call it until it says no.
    pub fn supersede_engine_pool(
        &mut self,
        session: SessionId,
        engine: EngineId,
        rank: u32,
    ) -> Result<bool, Refused> {
        let domain = self.registry.session(session)?.domain;
        let same = |pool: &EnginePool| {
            let identity = &pool.identity;
            (identity.engine, identity.rank, identity.domain) == (engine, rank, domain)
        };
        let former = self.engines.pools.iter().filter(|(_, pool)| same(pool));
        let former: Vec<PoolId> = former.map(|(id, _)| *id).collect();
        for id in &former {
            let pool = self.engines.pools.get_mut(id).expect("listed just now");
            if let EngineOwner::Session(owner) | EngineOwner::Silent(owner) = pool.owner {
                pool.owner = EngineOwner::Former(owner);
                self.drop_registered(*id);
                self.shards_missing(*id);
                self.collect_engine_pool(*id);
            }
        }
        let touched = |id| self.engines.pools.get(id).is_some_and(|pool| pool.batches > 0);
        Ok(former.iter().any(touched))
    }

    /// As [`Ledger::set_pool_node`].
    pub(in crate::ledger) fn set_engine_pool_node(&mut self, id: PoolId, node: Option<u32>) {
        if let Some(pool) = self.engines.pools.get_mut(&id) {
            pool.node = node;
        }
    }

    /// A new pool of an engine.
    pub fn add_engine_pool(
        &mut self,
        session: SessionId,
        identity: EnginePoolIdentity,
    ) -> Result<PoolId, Refused> {
        let of = |count: u32, what| Refused::invalid(what, format!("0 to {} are possible", count.max(1) - 1));
        if identity.rank_count == 0 || identity.rank_count > RANKS_MAX {
            return Err(Refused::invalid("rank_count", format!("1 to {RANKS_MAX} are possible")));
        }
        if identity.rank >= identity.rank_count {
            return Err(of(identity.rank_count, "rank"));
        }
        if identity.shard_count == 0 || identity.shard_count > identity.rank_count {
            return Err(Refused::invalid("shard_count", "1 to as many as ranks are possible"));
        }
        if identity.shard >= identity.shard_count {
            return Err(of(identity.shard_count, "shard"));
        }
        let stride = identity.stride().filter(|_| identity.block_count > 0);
        let stride = stride.ok_or_else(|| Refused::invalid("block_bytes", "such blocks are not possible"))?;
        self.join_engine(session, identity.engine, identity.base)?;
        for (_, other) in self.engines.open_pools(identity.engine) {
            let theirs = &other.identity;
            if theirs.rank == identity.rank {
                return Err(Refused::invalid("rank", "another session has opened it"));
            }
            let (a, b) = (theirs, &identity);
            if (a.block_bytes, a.shard_count, a.rank_count, a.tokens_per_block)
                != (b.block_bytes, b.shard_count, b.rank_count, b.tokens_per_block)
            {
                return Err(Refused::invalid("engine", "its other ranks have blocks of another shape"));
            }
        }
        let known = *self.strides.entry((identity.domain, identity.base)).or_insert(stride);
        if known != stride {
            let reason = format!("blocks of this namespace have {known} bytes, not {stride}");
            return Err(Refused::invalid("block_bytes", reason));
        }
        self.last_pool += 1;
        let id = PoolId(self.last_pool);
        let write_pins = PoolWords::LEASE_PINS..PoolWords::LEASE_PINS + PoolWords::WRITE_PINS;
        let pool = EnginePool {
            identity,
            owner: EngineOwner::Session(session),
            node: None,
            mapped: HashSet::new(),
            registered: HashMap::new(),
            by_key: HashMap::new(),
            backlog: VecDeque::new(),
            namespaces: HashSet::new(),
            batches: 0,
            storing: 0,
            writing: 0,
            free_write_pins: write_pins.rev().collect(),
        };
        self.engines.pools.insert(id, pool);
        self.bind_for_engines();
        Ok(id)
    }

    /// A pool that a connected session has opened.
    pub(in crate::ledger) fn engine_pool_mut(
        &mut self,
        session: SessionId,
        id: PoolId,
    ) -> Result<&mut EnginePool, Refused> {
        let pool = self.engines.pools.get_mut(&id);
        let pool = pool.filter(|pool| pool.owner == EngineOwner::Session(session));
        pool.ok_or(Refused::Unknown { what: "pool" })
    }

    /// All pools of engines.
    pub fn engine_pools(&self) -> impl Iterator<Item = (PoolId, &EnginePool)> {
        self.engines.pools.iter().map(|(id, pool)| (*id, pool))
    }

    /// A pool of an engine.
    pub fn engine_pool(&self, id: PoolId) -> Option<&EnginePool> {
        self.engines.pools.get(&id)
    }

    /// Whether a session has, or may still be using, pools of an engine or host segments.
    pub fn is_engine_session(&self, session: SessionId) -> bool {
        self.engines.given.contains_key(&session)
            || self.engines.pools.values().any(|pool| pool.session() == Some(session))
    }

    // ---- host segments in the hands of engines ----------------------------------------------------------------------

    /// Host segments that a session is to have and was not given yet. They are given now: those of its class and, where
    /// nobody else's blocks will ever be in them, those that have none yet. An engine that decodes suffers when host memory
    /// is made known to its GPU, so that is best done before it begins.
    pub fn give_segments(&mut self, session: SessionId) -> Vec<SegmentId> {
        let Self { engines, host, config, .. } = self;
        let mine = engines.pools.values().filter(|pool| pool.owner == EngineOwner::Session(session));
        let mut new = Vec::new();
        for class in mine.map(|pool| pool.identity.class()) {
            let given = engines.given.entry(session).or_default();
            let own = host.class(class).into_iter().flat_map(|table| table.segments());
            let ahead = host.free().filter(|_| config.one_domain);
            for segment in own.chain(ahead).collect::<Vec<_>>() {
                if given.insert(segment) {
                    host.expose(segment, class.domain);
                    new.push(segment);
                }
            }
        }
        new
    }

    /// The process behind a pool has mapped these segments.
    pub fn segments_mapped(
        &mut self,
        session: SessionId,
        id: PoolId,
        segments: &[SegmentId],
    ) -> Result<(), Refused> {
        let given = self.engines.given.get(&session);
        if !segments.iter().all(|segment| given.is_some_and(|given| given.contains(segment))) {
            return Err(Refused::Unknown { what: "segment" });
        }
        let pool = self.engine_pool_mut(session, id)?;
        pool.mapped.extend(segments);
        Ok(())
    }

    /// Whether all ranks have mapped a segment.
    pub(super) fn is_mapped(&self, ranks: &[PoolId], segment: SegmentId) -> bool {
        ranks.iter().all(|rank| self.engines.pools[rank].mapped.contains(&segment))
    }

    /// Engines that copy by themselves need memory that they have mapped before they can be named a slot in it.
    fn bind_for_engines(&mut self) {
        let Self { engines, host, .. } = self;
        for class in engines.pools.values().filter(|pool| pool.is_open()).map(|pool| pool.identity.class()) {
            if host.class(class).is_none_or(|table| table.slots.slots() == 0) {
                host.make_room(class);
            }
        }
    }

    // ---- ends -----------------------------------------------------------------------------------------------------

    pub(in crate::ledger) fn engine_session_silent(&mut self, session: SessionId) {
        let pools = self.engines.pools.values_mut();
        pools.filter(|pool| pool.owner == EngineOwner::Session(session)).for_each(|pool| {
            pool.owner = EngineOwner::Silent(session);
        });
    }

    /// The process is dead: nothing that it was using is used any more. What is left of its pools is rescued.
    pub(in crate::ledger) fn engine_session_dead(&mut self, session: SessionId, now: Millis) {
        let pools = self.engines.pools.iter().filter(|(_, pool)| pool.session() == Some(session));
        let pools: Vec<(PoolId, bool)> = pools.map(|(id, pool)| (*id, pool.is_open())).collect();
        for (id, was_open) in pools {
            self.abandon_writes(id, now);
            self.rank_gone(id, now);
            // One that was opened anew goes with its last lease.
            let Some(pool) = self.engines.pools.get_mut(&id) else { continue };
            if was_open && pool.identity.mode == EnginePoolMode::Ipc {
                let budget = self.config.rescue.as_millis() as u64;
                pool.owner = EngineOwner::Rescue(Millis(now.0 + budget));
                self.begin_rescue(id);
            } else {
                pool.owner = EngineOwner::Retired;
                self.drop_registered(id);
                self.shards_missing(id);
            }
            self.collect_engine_pool(id);
        }
        self.engines.given.remove(&session);
        let engines: Vec<EngineId> = self.engines.engines.keys().copied().collect();
        for id in engines {
            let engine = self.engines.engines.get_mut(&id).expect("listed just now");
            engine.members.remove(&session);
            self.collect_engine(id);
        }
        let domain = self.registry.session(session).map(|session| session.domain);
        if let Ok(domain) = domain {
            self.forget_exposure(domain);
        }
        self.settle_fills(now);
    }

    /// When no process of a domain has segments any more, they may go to others.
    fn forget_exposure(&mut self, domain: TrustDomain) {
        let theirs = |id: &SessionId| self.registry.session(*id).is_ok_and(|s| s.domain == domain);
        if !self.engines.given.keys().any(theirs) {
            self.host.forget_exposure(domain);
        }
    }

    /// True if there is nothing of a pool, or of a former one of that name, to wait for.
    pub(super) fn collect_engine_pool(&mut self, id: PoolId) {
        let Some(pool) = self.engines.pools.get_mut(&id) else { return };
        let is_over = match pool.owner {
            EngineOwner::Retired => pool.batches == 0,
            EngineOwner::Former(_) => pool.batches == 0 && pool.writing == 0 && !self.leases.is_held_by(id),
            EngineOwner::Session(_) | EngineOwner::Silent(_) | EngineOwner::Rescue(_) => false,
        };
        if is_over {
            let pool = self.engines.pools.remove(&id).expect("it was just there");
            // What arrived last counts before its namespace is let go of.
            self.sweep();
            pool.namespaces.into_iter().for_each(|namespace| self.registry.let_go(namespace));
            self.collect_engine(pool.identity.engine);
        }
    }

    fn collect_engine(&mut self, id: EngineId) {
        let has_pools = self.engines.pools.values().any(|pool| pool.identity.engine == id);
        let unused = |engine: &Engine| engine.members.is_empty() && !has_pools;
        if self.engines.engines.get(&id).is_some_and(unused) {
            self.engines.engines.remove(&id);
        }
    }

    /// Ends what has a deadline.
    pub(in crate::ledger) fn tick_engines(&mut self, now: Millis) {
        self.end_rescues(now);
        self.expire_fills(now);
        self.settle_fills(now);
        self.bind_for_engines();
        let former: Vec<PoolId> = self.engines.pools.keys().copied().collect();
        former.into_iter().for_each(|id| self.collect_engine_pool(id));
    }

    /// Host slots that are not used because their writer is silent.
    pub fn engine_quarantined(&self) -> usize {
        let silent =
            |pool: &&EnginePool| matches!(pool.owner, EngineOwner::Silent(_) | EngineOwner::Former(_));
        self.engines.pools.values().filter(silent).map(|pool| pool.writing).sum()
    }

    /// Panics if an invariant does not hold.
    pub(in crate::ledger) fn check_engines(&self) {
        self.check_fills();
        for (id, pool) in &self.engines.pools {
            assert!(
                self.engines.engines.contains_key(&pool.identity.engine),
                "{id:?} is of a forgotten engine"
            );
            assert!(pool.registered.len() <= pool.identity.block_count as usize);
            for (key, block) in &pool.by_key {
                assert_eq!(pool.registered[block].key, *key, "{id:?} finds its blocks by key");
            }
            let pins = pool.free_write_pins.len() + pool.writing;
            assert_eq!(pins, PoolWords::WRITE_PINS as usize, "{id:?} loses no pin");
        }
    }
}
