//! Pools of engines are opened and forgotten.

use std::sync::Arc;

use kvbm_shm::{PoolWords, ProcessWatch};
use parking_lot::Mutex;

use super::{Manager, Shared};
use crate::error::{Error, Refused};
use crate::ledger::{EngineId, EnginePoolIdentity, EnginePoolMode, PoolId, SessionId};
use crate::manager::domain_of;
use crate::store::{EnginePoolMemory, Export, Fragment, MappedBlocks};

/// Openings that may wait for copies to end.
const PENDING_MAX: usize = 256;

/// A pool that an engine owns.
#[derive(Debug)]
pub struct OpenEnginePool {
    /// What it is; its domain is that of the session.
    pub identity: EnginePoolIdentity,
    /// Ipc: the memory.
    pub exports: Vec<Export>,
    /// Ipc: the pieces of a block.
    pub fragments: Vec<Fragment>,
    /// Its process: while it lives, what it has pinned is kept for the next daemon too.
    pub process: Option<ProcessWatch>,
}

/// A pool of an engine, opened.
#[derive(Debug)]
pub struct OpenedEnginePool {
    /// Its number.
    pub pool_id: PoolId,
    /// What is shared about it.
    pub words: Arc<PoolWords>,
    /// Bytes from one host slot to the next.
    pub slot_stride: usize,
    /// Bytes from the start of a slot to this rank's part.
    pub shard_offset: usize,
}

type Done = Box<dyn FnOnce(Result<OpenedEnginePool, Error>) + Send>;

/// One that waits until copies that touch its former self have ended.
pub(in crate::manager) struct Opening {
    session: SessionId,
    open: OpenEnginePool,
    done: Done,
}

impl Manager {
    /// A session takes part in an engine without a pool of its own.
    pub fn join_engine(&self, session: SessionId, engine: EngineId, base: [u8; 32]) -> Result<(), Refused> {
        self.shared.with_ledger(|ledger, _| ledger.join_engine(session, engine, base))
    }

    /// Opens a pool. `done` is called when no copy touches the pool that it follows, if it follows one.
    pub fn open_engine_pool(&self, session: SessionId, open: OpenEnginePool, done: Done) {
        if let Some(stride) = open.identity.stride()
            && let Err(error) = self.size_host_for(stride)
        {
            *self.shared.host_error.lock() = Some(error.to_string());
        }
        let manager = self.clone();
        let opened = move |opened: Result<OpenedEnginePool, Error>| {
            if let Ok(opened) = &opened {
                manager.prepare_engine_pool(opened.pool_id);
            }
            done(opened);
        };
        self.shared.open_engine_pool(Opening { session, open, done: Box::new(opened) });
    }

    /// Makes host memory known to the GPU in the background: a rescue has no time for that.
    fn prepare_engine_pool(&self, pool: PoolId) {
        let Some(memory) = self.shared.engines.get(pool).filter(|memory| memory.blocks.is_some()) else {
            return;
        };
        let prepare = move |shared: Arc<Shared>| {
            let segments = shared.host.segments();
            segments.iter().take_while(|_| !shared.is_stopping()).for_each(|host| memory.prepare(host));
        };
        if let Err(error) = self.spawn("kvbm-pool", prepare) {
            tracing::warn!(%error, "host memory is made known to a GPU only as it is used");
        }
    }
}

impl Shared {
    fn open_engine_pool(&self, opening: Opening) {
        let EnginePoolIdentity { engine, rank, .. } = opening.open.identity;
        let touched =
            self.with_ledger(|ledger, _| ledger.supersede_engine_pool(opening.session, engine, rank));
        match touched {
            Err(refused) => (opening.done)(Err(refused.into())),
            Ok(false) => {
                let opened = self.open_now(opening.session, opening.open);
                (opening.done)(opened);
            }
            Ok(true) => {
                let mut openings = self.engines.openings.lock();
                if openings.len() >= PENDING_MAX {
                    drop(openings);
                    self.counters.was_busy("adoptions");
                    return (opening.done)(Err(Refused::Busy { queue: "adoptions" }.into()));
                }
                openings.push(opening);
            }
        }
    }

    /// Takes up openings that may have nothing left to wait for.
    pub(in crate::manager) fn settle_openings(&self) {
        let openings = std::mem::take(&mut *self.engines.openings.lock());
        openings.into_iter().for_each(|opening| self.open_engine_pool(opening));
    }

    fn open_now(&self, session: SessionId, open: OpenEnginePool) -> Result<OpenedEnginePool, Error> {
        let OpenEnginePool { mut identity, exports, fragments, process } = open;
        let invalid = |field, reason| Error::Refused(Refused::Invalid { field, reason });
        let (stride, shard_offset) = (identity.stride(), identity.shard_offset());
        let too_large = || invalid("block_bytes", "such blocks are not possible".to_owned());
        let slot_stride = stride.filter(|_| identity.block_count > 0).ok_or_else(too_large)?;
        let blocks = match identity.mode {
            EnginePoolMode::Staged => None,
            EnginePoolMode::Ipc => {
                let memory = self.config.exports.map(exports).map_err(|reason| invalid("exports", reason))?;
                let (bytes, count) = (identity.block_bytes, identity.block_count);
                let blocks = MappedBlocks::new(memory, fragments, bytes, count);
                Some(blocks.map_err(|reason| invalid("fragments", reason))?)
            }
        };
        let words = Arc::new(PoolWords::create(identity.uuid, identity.block_count)?);
        let memory = Arc::new(EnginePoolMemory {
            blocks,
            words: Arc::clone(&words),
            block_bytes: identity.block_bytes,
            shard_offset,
            tokens_per_block: identity.tokens_per_block,
            connected: Mutex::default(),
            kept_words: self
                .warm
                .as_ref()
                .zip(process)
                .map(|(warm, process)| warm.keep_words(&words, &process)),
        });
        let kept = memory.kept_words;
        let node = self.config.exports.node_of(&identity.device);
        let pool_id = self.with_ledger(|ledger, _| {
            identity.domain = domain_of(ledger, session)?;
            let id = ledger.add_engine_pool(session, identity)?;
            ledger.set_pool_node(id, node);
            self.engines.pools.write().insert(id, memory);
            self.bind_segments(ledger);
            Ok::<_, Refused>(id)
        });
        let pool_id = pool_id.inspect_err(|_| self.discard_words(kept))?;
        Ok(OpenedEnginePool { pool_id, words, slot_stride, shard_offset })
    }

    /// Unmaps pools that the ledger no longer knows. Unmapping takes long: not under a lock.
    pub(in crate::manager) fn forget_engine_pools(&self) {
        let gone: Vec<_> = {
            let ledger = self.ledger.lock();
            let mut pools = self.engines.pools.write();
            pools.extract_if(|id, _| ledger.engine_pool(*id).is_none()).collect()
        };
        for (id, memory) in gone {
            tracing::info!(pool = id.0, "the pool of an engine is let go of");
            self.discard_words(memory.kept_words);
            drop(memory);
        }
    }

    fn discard_words(&self, number: Option<u32>) {
        if let Some((warm, number)) = self.warm.as_ref().zip(number) {
            warm.discard_words(number);
        }
    }
}
