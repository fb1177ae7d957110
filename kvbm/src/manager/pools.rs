//! Device pools: opened, inherited, adopted, written.

use std::sync::Arc;

use super::adopt::Adopted;
use super::{
    AdoptPool, HostCapacity, Manager, OpenPool, OpenedPool, PIECE_BLOCKS, Shared, domain_of, populate,
};
use crate::error::{Error, Refused};
use crate::ledger::{BlockRef, CommitBlock, Held, NamespaceId, PoolId, PoolIdentity, SessionId};
use crate::store::OwnedPool;

impl Manager {
    /// Gives a session the pool that a dead worker left, if one fits. It may hold blocks of namespaces that the session
    /// has not registered: they are registered for it.
    pub fn inherit_pool(&self, session: SessionId, open: &OpenPool) -> Result<Option<OpenedPool>, Refused> {
        if open.fresh {
            return Ok(None);
        }
        let inherited = self.shared.with_ledger(|ledger, now| -> Result<_, Refused> {
            let fits = |identity: &PoolIdentity| {
                identity.base == open.base
                    && identity.layout == open.layout
                    && identity.device == open.device
                    && identity.tokens_per_block == open.tokens_per_block
            };
            let Some(id) = ledger.inherit_pool(session, fits)? else { return Ok(None) };
            let entries = ledger.entries(id);
            for entry in &entries {
                if let Some(namespace) = ledger.namespace(entry.namespace).cloned() {
                    let (tenant, model) = (&namespace.tenant, &namespace.model);
                    // A session with very many namespaces may not find these blocks; it can still use the pool.
                    let base = namespace.base.unwrap_or(open.base);
                    let _ = ledger.register_namespace(session, namespace.digest, base, tenant, model, now);
                }
            }
            let epoch = ledger.pool(id).expect("it was just inherited").epoch;
            Ok(Some((id, epoch, entries)))
        })?;
        Ok(inherited.map(|(pool_id, epoch, entries)| {
            let pool = self.shared.pools.get(pool_id).expect("the ledger's pools are mapped");
            OpenedPool { pool_id, memory: Arc::clone(&pool.memory), epoch, entries, inherited: true }
        }))
    }

    /// Gives a session a pool: the one a dead worker left, or a new one.
    pub fn open_pool(&self, session: SessionId, open: OpenPool) -> Result<OpenedPool, Error> {
        if let Some(inherited) = self.inherit_pool(session, &open)? {
            return Ok(inherited);
        }
        let pool = Arc::new(self.create_pool(&open)?);
        self.size_host_for(open.layout.stride())?;
        let memory = Arc::clone(&pool.memory);
        let epoch = memory.epoch();
        let node = self.shared.config.exports.node_of(&open.device);
        let pool_id = self.shared.with_ledger(|ledger, _| {
            let domain = domain_of(ledger, session)?;
            let identity = PoolIdentity {
                uuid: open.uuid,
                base: open.base,
                domain,
                layout: open.layout,
                tokens_per_block: open.tokens_per_block,
                device: open.device,
            };
            let id = ledger.add_pool(session, identity, epoch)?;
            ledger.set_pool_node(id, node);
            Ok::<_, Refused>(id)
        })?;
        self.shared.pools.insert(pool_id, Arc::clone(&pool));
        self.shared.connect_pool(pool_id, &pool);
        self.prepare_pool(pool);
        Ok(OpenedPool { pool_id, memory, epoch, entries: Vec::new(), inherited: false })
    }

    /// Pools of a GPU that nobody has come for give way to a new one.
    fn create_pool(&self, open: &OpenPool) -> Result<OwnedPool, Error> {
        let create = || OwnedPool::create(&*self.shared.config.exports, &open.device, open.uuid, open.layout);
        match create() {
            Err(Error::Refused(Refused::Exhausted { .. })) => {
                self.drop_orphan_pools();
                create()
            }
            created => created,
        }
    }

    /// Does in the background what would hold up the first who use it.
    fn prepare_pool(&self, pool: Arc<OwnedPool>) {
        if let Err(error) = self.spawn("kvbm-pool", move |shared| populate::run_pool(&shared, &pool)) {
            tracing::warn!(%error, "a device pool is populated only as it is used");
        }
    }

    /// Gives up the pools that wait for a successor, to make room for another.
    pub fn drop_orphan_pools(&self) {
        self.shared.with_ledger(|ledger, _| ledger.drop_orphans());
        drop(self.shared.unmapped_pools());
    }

    pub(super) fn size_host_for(&self, stride: usize) -> Result<(), Error> {
        self.shared.size_disk(stride as u64);
        match self.shared.config.host {
            HostCapacity::Bytes(_) => Ok(()),
            HostCapacity::Blocks(blocks) => self.size_host(u64::from(blocks) * stride as u64),
        }
    }

    /// Takes over a pool that its writer kept while it was detached. `done` is called once copies that touch an older
    /// idea of that pool have ended.
    pub fn adopt_pool(
        &self,
        session: SessionId,
        adopt: AdoptPool,
        done: Box<dyn FnOnce(Result<OpenedPool, Error>) + Send>,
    ) {
        let sized = self.size_host_for(adopt.memory.layout().stride());
        if let Err(error) = sized {
            *self.shared.host_error.lock() = Some(error.to_string());
        }
        let AdoptPool { memory, epoch, base, tokens_per_block, device, entries, held } = adopt;
        let pool = match OwnedPool::map(&*self.shared.config.exports, &device, memory) {
            Ok(pool) => Arc::new(pool),
            Err(error) => return done(Err(error)),
        };
        if pool.gpu.is_some() {
            self.prepare_pool(Arc::clone(&pool));
        }
        let adopt = Adopted { pool, epoch, base, tokens_per_block, device, entries, held };
        self.shared.adopt(session, adopt, done);
    }

    /// Up to `count` blocks to write into.
    pub fn request_grants(
        &self,
        session: SessionId,
        pool: PoolId,
        count: usize,
    ) -> Result<Vec<BlockRef>, Refused> {
        self.shared.with_ledger(|ledger, now| ledger.request_grants(session, pool, count, now))
    }

    /// Blocks are complete. They are offloaded to host as soon as the queue has room.
    pub fn commit(
        &self,
        session: SessionId,
        namespace: NamespaceId,
        pool: PoolId,
        blocks: &[CommitBlock],
    ) -> Result<(), Refused> {
        // In pieces: others get their turn in between, and copying begins after the first.
        let mut committed = Ok(());
        for piece in blocks.chunks(PIECE_BLOCKS) {
            let (done, block_bytes) = self.shared.with_ledger(|ledger, now| {
                let done = ledger.commit(session, namespace, pool, piece, now);
                (done, ledger.block_bytes(namespace))
            });
            if let (Ok(()), Some(block_bytes)) = (&done, block_bytes) {
                self.shared.what_if.stored(namespace, piece.iter().map(|block| block.hash), block_bytes);
            }
            committed = committed.and(done);
        }
        if !self.shared.offloads.has_room() {
            self.shared.counters.was_busy("offload");
        }
        committed
    }

    /// Gives back pins.
    pub fn release(&self, session: SessionId, pool: PoolId, blocks: &[Held]) -> Result<(), Refused> {
        self.shared.with_ledger(|ledger, now| ledger.release(session, pool, blocks, now))
    }
}

impl Shared {
    /// Finds the pools between which and a new one blocks can be copied directly.
    pub(super) fn connect_pool(&self, id: PoolId, pool: &OwnedPool) {
        let alike: Vec<PoolId> = {
            let ledger = self.ledger.lock();
            let Some(new) = ledger.pool(id).map(|pool| &pool.identity) else { return };
            let fits = |identity: &PoolIdentity| {
                (identity.domain, identity.base, identity.layout.stride())
                    == (new.domain, new.base, new.layout.stride())
            };
            let others = ledger.pools().filter(|(other, pool)| *other != id && fits(&pool.identity));
            others.map(|(other, _)| other).collect()
        };
        for other in alike {
            // Not under the lock: the driver takes its time.
            if self.pools.get(other).is_some_and(|other| pool.connect(&other)) {
                self.ledger.lock().connect_pools(id, other);
            }
        }
    }
}
