//! Taking over a pool from an engine that went on without us.

use std::sync::Arc;

use kvbm_shm::PoolMemory;

use super::{OpenedPool, Shared, domain_of};
use crate::error::{Error, Refused};
use crate::ledger::{BlockRef, PoolEntry, PoolIdentity, SessionId};
use crate::store::OwnedPool;

/// Adoptions that may wait for copies to end. Each belongs to a session that waits for it.
const PENDING_MAX: usize = 256;

/// A pool as its writer hands it back.
#[derive(Debug)]
pub struct AdoptPool {
    /// Its memory, with its name and layout.
    pub memory: PoolMemory,
    /// The writer's epoch.
    pub epoch: u64,
    /// Base namespace of all its blocks.
    pub base: [u8; 32],
    /// Tokens in one block.
    pub tokens_per_block: u32,
    /// Device, for example `cpu:0`.
    pub device: String,
    /// Complete blocks.
    pub entries: Vec<PoolEntry>,
    /// Blocks that the engine keeps for itself.
    pub held: Vec<BlockRef>,
}

/// The same, mapped.
pub(super) struct Adopted {
    pub pool: Arc<OwnedPool>,
    pub epoch: u64,
    pub base: [u8; 32],
    pub tokens_per_block: u32,
    pub device: String,
    pub entries: Vec<PoolEntry>,
    pub held: Vec<BlockRef>,
}

type Done = Box<dyn FnOnce(Result<OpenedPool, Error>) + Send>;

/// An adoption that waits for copies into the former pool to end.
pub(super) struct Pending {
    session: SessionId,
    adopt: Adopted,
    done: Done,
}

/// What is to be done about an adoption.
enum Next {
    Adopt,
    Wait,
}

impl Shared {
    pub(super) fn adopt(&self, session: SessionId, adopt: Adopted, done: Done) {
        match self.retire_former(session, &adopt) {
            Err(refused) => done(Err(refused.into())),
            Ok(Next::Adopt) => done(self.adopt_now(session, adopt).map_err(Error::from)),
            Ok(Next::Wait) => {
                let mut pending = self.adoptions.lock();
                if pending.len() >= PENDING_MAX {
                    drop(pending);
                    self.counters.was_busy("adoptions");
                    return done(Err(Refused::Busy { queue: "adoptions" }.into()));
                }
                pending.push(Pending { session, adopt, done });
                drop(pending);
                self.settle_adoptions();
            }
        }
    }

    /// Ends what is known of the pool under its former owner, if the adoption is newer than that.
    fn retire_former(&self, session: SessionId, adopt: &Adopted) -> Result<Next, Refused> {
        let uuid = adopt.pool.memory.uuid();
        if adopt.pool.memory.epoch() != adopt.epoch {
            return Err(Refused::Stale { what: "epoch" });
        }
        self.with_ledger(|ledger, now| {
            let domain = domain_of(ledger, session)?;
            if let Some(former) = ledger.pool_named(domain, uuid) {
                if ledger.pool(former).is_some_and(|pool| pool.epoch >= adopt.epoch) {
                    return Err(Refused::Stale { what: "epoch" });
                }
                let owner = ledger.pool_owner(former).filter(|owner| *owner != session);
                ledger.retire_pool(former);
                // The engine speaks for itself again: its former session ends, unless it holds other pools.
                if let Some(owner) = owner.filter(|owner| ledger.pools_of(*owner).is_empty()) {
                    ledger.session_dead(owner, now);
                }
            }
            Ok(if ledger.is_draining(domain, uuid) { Next::Wait } else { Next::Adopt })
        })
    }

    /// Takes up the adoptions that have nothing left to wait for.
    pub(super) fn settle_adoptions(&self) {
        if self.adoptions.lock().is_empty() {
            return;
        }
        let ready: Vec<Pending> = {
            let ledger = self.ledger.lock();
            let mut pending = self.adoptions.lock();
            let draining = |pending: &Pending| {
                let uuid = pending.adopt.pool.memory.uuid();
                domain_of(&ledger, pending.session).is_ok_and(|domain| ledger.is_draining(domain, uuid))
            };
            let (waiting, ready) = pending.drain(..).partition(draining);
            *pending = waiting;
            ready
        };
        for Pending { session, adopt, done } in ready {
            // From the start: another adoption of the same pool may have been first.
            self.adopt(session, adopt, done);
        }
    }

    fn adopt_now(&self, session: SessionId, adopt: Adopted) -> Result<OpenedPool, Refused> {
        let Adopted { pool, epoch, base, tokens_per_block, device, entries, held } = adopt;
        let memory = Arc::clone(&pool.memory);
        let node = self.config.exports.node_of(&device);
        let pool_id = self.with_ledger(|ledger, now| {
            let identity = PoolIdentity {
                uuid: memory.uuid(),
                base,
                domain: domain_of(ledger, session)?,
                layout: memory.layout(),
                tokens_per_block,
                device,
            };
            let id = ledger.add_pool(session, identity, epoch)?;
            ledger.set_pool_node(id, node);
            self.pools.insert(id, Arc::clone(&pool));
            match ledger.adopt_entries(session, id, &entries, &held, now) {
                Ok(()) => Ok(id),
                Err(refused) => {
                    ledger.retire_pool(id);
                    Err(refused)
                }
            }
        })?;
        self.connect_pool(pool_id, &pool);
        Ok(OpenedPool { pool_id, memory, epoch, entries: Vec::new(), inherited: false })
    }
}
