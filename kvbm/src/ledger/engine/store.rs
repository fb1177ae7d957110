//! What an engine says is complete.

use std::collections::HashMap;

use kvbm_hash::SequenceHash;

use super::{EnginePool, EnginePoolMode, Registered};
use crate::error::Refused;
use crate::ledger::key::Key;
use crate::ledger::{BlockRef, Ledger, Millis, NamespaceId, PoolId, Retention, SessionId};

/// Number of a store within one life of the daemon. Never reused, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreId(pub u64);

/// A block that its engine declares complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreBlock {
    /// Where it is. Its generation is the value of its word.
    pub block: BlockRef,
    /// Its key.
    pub hash: SequenceHash,
    /// Key of the block before it.
    pub parent: Option<SequenceHash>,
    /// How it is to be kept; `None`: as any other, or as it is if it is there already.
    pub retention: Option<Retention>,
}

/// What became of a block, or is to be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// This rank's bytes are in host memory.
    Stored,
    /// The block was there before.
    Resident,
    /// Somebody else is copying the same bytes.
    InFlight,
    /// The engine is to copy it.
    Write,
    /// The block before it is not in host memory.
    Orphan,
    /// No slot could be had.
    Exhausted,
    /// Worth less than what would have to go, or over its tenant's quota.
    NotAdmitted,
    /// The block's word has moved on.
    Stale,
    /// Too much is being written.
    Busy,
    /// The copy failed.
    Failed,
    /// Known for a rescue.
    Registered,
}

impl Verdict {
    /// All of them, in order of [`Verdict::index`].
    pub const ALL: [Self; 11] = [
        Self::Stored,
        Self::Resident,
        Self::InFlight,
        Self::Write,
        Self::Orphan,
        Self::Exhausted,
        Self::NotAdmitted,
        Self::Stale,
        Self::Busy,
        Self::Failed,
        Self::Registered,
    ];

    /// Position in [`Verdict::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// Name, as in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Resident => "resident",
            Self::InFlight => "in_flight",
            Self::Write => "write",
            Self::Orphan => "orphan",
            Self::Exhausted => "exhausted",
            Self::NotAdmitted => "not_admitted",
            Self::Stale => "stale",
            Self::Busy => "busy",
            Self::Failed => "failed",
            Self::Registered => "registered",
        }
    }
}

/// A slot that the engine is writing.
#[derive(Debug)]
pub(super) struct StagedWrite {
    pub key: Key,
    pub pin: u32,
}

/// One that is open.
#[derive(Debug)]
pub(super) struct Store {
    pub pool: PoolId,
    pub namespace: NamespaceId,
    verdicts: Vec<Option<Verdict>>,
    /// Blocks without a verdict.
    open: usize,
    /// All its blocks are named.
    sealed: bool,
    pub writes: Vec<StagedWrite>,
}

/// All that are open.
#[derive(Debug, Default)]
pub(super) struct Stores {
    pub open: HashMap<StoreId, Store>,
    finished: Vec<(StoreId, Vec<Verdict>)>,
    last: u64,
}

impl Stores {
    /// Nothing more comes of a store that was taken out.
    pub fn give_up(&mut self, id: StoreId, store: Store) {
        let verdicts = store.verdicts.into_iter().map(|verdict| verdict.unwrap_or(Verdict::Failed));
        self.finished.push((id, verdicts.collect()));
    }
}

impl Ledger {
    /// Blocks of a pool, all of one namespace, are complete. They are named by [`Ledger::register`] or [`Ledger::stage`].
    pub fn begin_store(
        &mut self,
        session: SessionId,
        namespace: NamespaceId,
        id: PoolId,
        mode: EnginePoolMode,
    ) -> Result<StoreId, Refused> {
        let base = self.registry.base_of(session, namespace)?;
        let pool = self.engine_pool_mut(session, id)?;
        if pool.identity.mode != mode {
            return Err(Refused::invalid("pool_id", format!("the pool is {}", pool.identity.mode.name())));
        }
        if pool.identity.base != base {
            return Err(Refused::invalid("namespace_id", "the pool is of another base namespace"));
        }
        if pool.namespaces.insert(namespace) {
            self.registry.hold_known(namespace);
        }
        let stores = &mut self.engines.stores;
        stores.last += 1;
        let store = StoreId(stores.last);
        let (verdicts, writes) = Default::default();
        let opened = Store { pool: id, namespace, verdicts, open: 0, sealed: false, writes };
        stores.open.insert(store, opened);
        Ok(store)
    }

    /// Ipc: these blocks are known from now on. They are copied when there is room; `rescue_only`: only if their engine
    /// dies.
    pub fn register(&mut self, store: StoreId, blocks: &[StoreBlock], rescue_only: bool, now: Millis) {
        // Its engine may have died while its fence was waited for.
        let Some(open) = self.engines.stores.open.get(&store) else { return };
        let (id, namespace) = (open.pool, open.namespace);
        for block in blocks {
            let at = self.add_to_store(store);
            let key = Key { namespace, hash: block.hash };
            let is_of = |pool: &EnginePool| pool.is_open() && block.block.block < pool.identity.block_count;
            if !self.engines.pools.get(&id).is_some_and(is_of) {
                self.judge(Some((store, at)), Verdict::Failed);
                continue;
            }
            if self.is_in_host(id, key, block.retention, now) {
                self.judge(Some((store, at)), Verdict::Resident);
                continue;
            }
            self.engines.registrations += 1;
            let number = self.engines.registrations;
            let pool = self.engines.pools.get_mut(&id).expect("it was just there");
            let former = pool.forget(block.block.block);
            let known = Registered {
                generation: block.block.generation,
                key,
                parent: block.parent,
                retention: block.retention.unwrap_or_default(),
                asked: (!rescue_only).then_some((store, at)),
                number,
                copying: false,
            };
            pool.registered.insert(block.block.block, known);
            pool.by_key.insert(key, block.block.block);
            if !rescue_only {
                pool.get_in_line(block.block.block, number);
            }
            if let Some(former) = former {
                let same = (former.generation, former.key) == (block.block.generation, key);
                self.judge(former.asked, if same { Verdict::InFlight } else { Verdict::Stale });
            }
            if rescue_only {
                self.judge(Some((store, at)), Verdict::Registered);
            }
        }
    }

    /// All blocks of a store are named. Of a staged one the verdicts are returned.
    pub fn seal_store(&mut self, store: StoreId) -> Vec<Verdict> {
        let Some(open) = self.engines.stores.open.get_mut(&store) else { return Vec::new() };
        open.sealed = true;
        let staged =
            self.engines.pools.get(&open.pool).is_none_or(|p| p.identity.mode == EnginePoolMode::Staged);
        if !staged {
            self.finish_if_settled(store);
            return Vec::new();
        }
        let verdicts = open.verdicts.iter().map(|verdict| verdict.unwrap_or(Verdict::Failed)).collect();
        if open.writes.is_empty() {
            self.engines.stores.open.remove(&store);
        }
        verdicts
    }

    /// Nothing more of a pool is copied.
    pub(super) fn drop_registered(&mut self, id: PoolId) {
        let Some(pool) = self.engines.pools.get_mut(&id) else { return };
        pool.backlog.clear();
        pool.by_key.clear();
        let asked: Vec<_> = pool.registered.drain().filter_map(|(_, known)| known.asked).collect();
        asked.into_iter().for_each(|asked| self.judge(Some(asked), Verdict::Failed));
    }

    // ---- verdicts ---------------------------------------------------------------------------------------------------

    pub(super) fn add_to_store(&mut self, store: StoreId) -> usize {
        let open = self.engines.stores.open.get_mut(&store).expect("it is open until it is sealed");
        open.verdicts.push(None);
        open.open += 1;
        open.verdicts.len() - 1
    }

    /// A block has its verdict, which is told to whoever asked.
    pub(super) fn judge(&mut self, asked: Option<(StoreId, usize)>, verdict: Verdict) {
        self.tally.store_verdicts[verdict.index()] += 1;
        let Some((store, at)) = asked else { return };
        // Its engine may be gone.
        let Some(open) = self.engines.stores.open.get_mut(&store) else { return };
        if open.verdicts[at].replace(verdict).is_none() {
            open.open -= 1;
        }
        if open.sealed {
            self.finish_if_settled(store);
        }
    }

    fn finish_if_settled(&mut self, store: StoreId) {
        let stores = &mut self.engines.stores;
        if stores.open.get(&store).is_some_and(|open| open.open == 0 && open.writes.is_empty()) {
            let done = stores.open.remove(&store).expect("it was just there");
            stores.finished.push((store, done.verdicts.into_iter().flatten().collect()));
        }
    }

    /// Stores of ipc pools all of whose blocks have a verdict.
    pub fn take_stored(&mut self) -> Vec<(StoreId, Vec<Verdict>)> {
        std::mem::take(&mut self.engines.stores.finished)
    }
}
