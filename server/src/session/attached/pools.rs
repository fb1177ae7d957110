//! Pools whose memory the daemon owns: new ones, what a dead worker left, and what a worker has kept over a daemon's death.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvbm::ledger::PoolEntry;
use kvbm::{AdoptPool, Error, Manager, OpenPool, OpenedPool, Refused, SessionId};
use kvbm_proto::v1::{self, server_message::Body};
use kvbm_proto::{SideMessage, digest, uuid};
use kvbm_shm::{PoolLayout, PoolMemory};
use tokio::time::timeout;

use super::{Answer, Attached, End};
use crate::core::Core;
use crate::random;
use crate::session::side::ahead;
use crate::wire::{self, invalid, malformed};

/// Pools of one session.
const POOLS_MAX: usize = 16;

impl Attached {
    pub(super) async fn open_pool(&mut self, answer: Answer, message: &v1::OpenPool) -> Result<(), End> {
        if message.mode() != v1::PoolMode::Owned {
            return self.open_engine_pool(answer, message).await;
        }
        let wanted = match self.check_pool(message) {
            Ok(wanted) => wanted,
            Err(refused) => {
                answer.refuse(&refused);
                return Ok(());
            }
        };
        match &message.adoption {
            None => answer.send(self.give_pool(wanted).await?),
            Some(adoption) => match self.adoption(adoption, wanted).await? {
                Ok(adopt) => self.adopt(answer, adopt).await,
                Err(refused) => answer.refuse(&refused),
            },
        }
        Ok(())
    }

    /// A new pool, or what a dead worker left. Its memory travels before the answer.
    async fn give_pool(&mut self, wanted: OpenPool) -> Result<Body, End> {
        let layout = wanted.layout;
        // What a dead worker left costs no new memory.
        let opened = match self.core.manager.inherit_pool(self.id, &wanted) {
            Ok(Some(inherited)) => Ok(inherited),
            Ok(None) => match self.core.check_memory(&wanted.device, layout) {
                // A GPU that is used for the first time takes a while.
                Ok(()) => self.aside(move |manager, id| manager.open_pool(id, wanted)).await,
                Err(refused) => Err(refused.into()),
            },
            Err(refused) => Err(refused.into()),
        };
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => {
                if !matches!(error, Error::Refused(_)) {
                    tracing::warn!(session = self.id.0, %error, "a device pool cannot be had");
                }
                return Ok(Body::Refused(wire::failed(&error)));
            }
        };
        tracing::info!(
            session = self.id.0,
            pool = opened.pool_id.0,
            inherited = opened.inherited,
            "a pool is opened"
        );
        let uuid = opened.memory.uuid();
        let device = opened.memory.device().map(|(fd, _)| (SideMessage::DeviceMemory { uuid }, fd));
        let memory = (SideMessage::PoolMemory { uuid }, opened.memory.fd());
        for (message, fd) in device.into_iter().chain([memory]) {
            self.side.send(message, Some(fd), self.limit).await.map_err(|_| End::SideClosed)?;
        }
        Ok(pool_reply(&self.core, &opened))
    }

    fn check_pool(&self, message: &v1::OpenPool) -> Result<OpenPool, Refused> {
        if message.shard_count > 1 || message.shard > 0 {
            return Err(invalid("shard_count", "blocks of an owned pool have one shard"));
        }
        if message.tokens_per_block == 0 {
            return Err(invalid("tokens_per_block", "0 is not possible"));
        }
        self.check_pool_count()?;
        let block_bytes = usize::try_from(message.block_bytes).unwrap_or(0);
        let layout = PoolLayout { block_bytes, block_count: message.block_count };
        if layout.memory_bytes().is_none() {
            return Err(invalid("block_bytes", "no memory could have so few or so many bytes"));
        }
        Ok(OpenPool {
            base: digest("base", &message.base).map_err(malformed)?,
            layout,
            tokens_per_block: message.tokens_per_block,
            device: wire::label("device", &message.device)?.to_owned(),
            fresh: message.fresh,
            uuid: random(),
        })
    }

    pub(super) fn check_pool_count(&self) -> Result<(), Refused> {
        if self.core.pool_count(self.id) >= POOLS_MAX {
            let busy = Refused::Busy { queue: "session_pools" };
            self.core.refusals.note(&busy);
            return Err(busy);
        }
        Ok(())
    }

    /// An adoption with its memory, which may still be on its way.
    async fn adoption(
        &mut self,
        adoption: &v1::Adoption,
        wanted: OpenPool,
    ) -> Result<Result<AdoptPool, Refused>, End> {
        let name = match uuid("adoption.pool_uuid", &adoption.pool_uuid) {
            Ok(name) => name,
            Err(reason) => return Ok(Err(malformed(reason))),
        };
        match timeout(self.limit, self.descriptor(name)).await {
            Ok(fd) => {
                let fds = (fd?, self.device_descriptors.remove(&name));
                Ok(adoption_of(fds, name, adoption, wanted))
            }
            Err(_) => Ok(Err(invalid("adoption.pool_uuid", "its descriptor did not come in time"))),
        }
    }

    async fn adopt(&self, answer: Answer, adopt: AdoptPool) {
        let (core, session) = (Arc::clone(&self.core), self.id.0);
        let done = move |result: Result<OpenedPool, Error>| match result {
            Ok(opened) => {
                tracing::info!(session, pool = opened.pool_id.0, "a pool is adopted");
                core.end_forgotten_sessions();
                answer.send(pool_reply(&core, &opened));
            }
            Err(error) => {
                tracing::warn!(session, %error, "an adoption is refused");
                core.end_forgotten_sessions();
                answer.send(Body::Refused(wire::failed(&error)));
            }
        };
        self.aside(move |manager, id| manager.adopt_pool(id, adopt, Box::new(done))).await;
    }

    /// Does what may take long where no other session waits for it.
    pub(super) async fn aside<R: Send + 'static>(
        &self,
        work: impl FnOnce(&Manager, SessionId) -> R + Send + 'static,
    ) -> R {
        let (core, id) = (Arc::clone(&self.core), self.id);
        let done = tokio::task::spawn_blocking(move || work(&core.manager, id)).await;
        done.expect("the block manager does not panic")
    }

    /// The memory of that name, which travels beside the message.
    pub(super) async fn descriptor(&mut self, name: [u8; 16]) -> Result<OwnedFd, End> {
        loop {
            if let Some(fd) = self.descriptors.remove(&name) {
                return Ok(fd);
            }
            let packet = self.side.receive().await.ok_or(End::SideClosed)?;
            self.keep(ahead(packet));
        }
    }
}

fn adoption_of(
    (fd, device): (OwnedFd, Option<OwnedFd>),
    name: [u8; 16],
    adoption: &v1::Adoption,
    wanted: OpenPool,
) -> Result<AdoptPool, Refused> {
    let memory =
        PoolMemory::from_fds(fd, device).map_err(|error| invalid("adoption.pool_uuid", error.to_string()))?;
    if memory.uuid() != name || memory.layout() != wanted.layout {
        return Err(invalid(
            "adoption.pool_uuid",
            "the memory that came under this name has another name or layout",
        ));
    }
    let entries: Result<Vec<PoolEntry>, Refused> = adoption.entries.iter().map(wire::pool_entry).collect();
    Ok(AdoptPool {
        memory,
        epoch: adoption.epoch,
        base: wanted.base,
        tokens_per_block: wanted.tokens_per_block,
        device: wanted.device,
        entries: entries?,
        held: wire::blocks(&adoption.held),
    })
}

fn pool_reply(core: &Core, opened: &OpenedPool) -> Body {
    let layout = opened.memory.layout();
    Body::Pool(v1::PoolReply {
        pool_id: opened.pool_id.0,
        pool_uuid: opened.memory.uuid().to_vec(),
        epoch: opened.epoch,
        block_count: layout.block_count,
        stride: layout.stride() as u64,
        offset: opened.memory.blocks_offset() as u64,
        entries: opened.entries.iter().map(wire::pool_entry_out).collect(),
        namespaces: core.known_namespaces(opened.entries.iter().map(|entry| entry.namespace)),
        ..Default::default()
    })
}
