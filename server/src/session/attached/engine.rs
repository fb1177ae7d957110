//! What an engine that owns its KV memory may ask.

use kvbm::ledger::{EngineId, EnginePoolIdentity, EnginePoolMode, SegmentId, StoreBlock, StoreId, Verdict};
use kvbm::{
    CommitBlock, Export, Fence, Fragment, LeaseId, NamespaceId, OpenEnginePool, OpenedEnginePool, Outcome,
    PoolId, Refused, StoreRequest,
};
use kvbm_proto::v1::{self, server_message::Body};
use kvbm_proto::{SideMessage, digest, uuid};
use kvbm_shm::PoolWords;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::{Answer, Attached, End};
use crate::random;
use crate::wire::{self, invalid, malformed};

/// Blocks of one `Store`.
const STORE_BLOCKS_MAX: usize = 4096;
/// Exports, and fragments, of one pool.
const PIECES_MAX: usize = 4096;

impl Attached {
    pub(super) fn is_engine_pool(&self, pool: u32) -> bool {
        self.core.manager.inspect(|ledger| ledger.engine_pool(PoolId(pool)).is_some())
    }

    pub(super) fn join_engine(&self, message: &v1::JoinEngine) -> Result<Body, Refused> {
        let engine = EngineId(uuid("engine", &message.engine).map_err(malformed)?);
        let base = digest("base", &message.base).map_err(malformed)?;
        self.core.manager.join_engine(self.id, engine, base)?;
        Ok(Body::Engine(v1::EngineReply {}))
    }

    // ---- opening ------------------------------------------------------------------------------------------------------

    /// The shared words travel before the answer, host segments before or after it.
    pub(super) async fn open_engine_pool(
        &mut self,
        answer: Answer,
        message: &v1::OpenPool,
    ) -> Result<(), End> {
        let open = match self.engine_pool(message).await? {
            Ok(open) => open,
            Err(refused) => {
                answer.refuse(&refused);
                return Ok(());
            }
        };
        let (sender, opened) = oneshot::channel();
        // A session that has ended does not need to know.
        self.core.manager.open_engine_pool(self.id, open, Box::new(move |done| drop(sender.send(done))));
        let opened = match opened.await {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => {
                tracing::warn!(session = self.id.0, %error, "the pool of an engine is refused");
                answer.send(Body::Refused(wire::failed(&error)));
                return Ok(());
            }
            Err(_) => return Err(End::Stopping),
        };
        let OpenedEnginePool { pool_id, words, slot_stride, shard_offset } = opened;
        tracing::info!(session = self.id.0, pool = pool_id.0, "the pool of an engine is opened");
        let uuid = words.uuid();
        let sent = self.side.send(SideMessage::PoolWords { uuid }, Some(words.fd()), self.limit).await;
        sent.map_err(|_| End::SideClosed)?;
        self.give_segments().await?;
        answer.send(Body::Pool(v1::PoolReply {
            pool_id: pool_id.0,
            pool_uuid: uuid.to_vec(),
            block_count: words.block_count(),
            slot_stride: slot_stride as u64,
            shard_offset: shard_offset as u64,
            ..Default::default()
        }));
        Ok(())
    }

    /// Sends the host segments that the session is to have and was not given yet.
    pub(super) async fn give_segments(&mut self) -> Result<(), End> {
        for (segment, memory) in self.core.manager.give_segments(self.id) {
            let message = SideMessage::HostSegment { segment: segment.0 };
            let sent = self.side.send(message, Some(memory.fd()), self.limit).await;
            sent.map_err(|_| End::SideClosed)?;
        }
        Ok(())
    }

    async fn engine_pool(&mut self, message: &v1::OpenPool) -> Result<Result<OpenEnginePool, Refused>, End> {
        let identity = match self.engine_identity(message) {
            Ok(identity) => identity,
            Err(refused) => return Ok(Err(refused)),
        };
        let mut exports = Vec::with_capacity(message.exports.len());
        for export in &message.exports {
            match self.export(export).await? {
                Ok(export) => exports.push(export),
                Err(refused) => return Ok(Err(refused)),
            }
        }
        let fragments: Result<Vec<Fragment>, Refused> = message.fragments.iter().map(fragment).collect();
        Ok(fragments.map(|fragments| OpenEnginePool {
            identity,
            exports,
            fragments,
            process: self.side.watch(),
        }))
    }

    fn engine_identity(&self, message: &v1::OpenPool) -> Result<EnginePoolIdentity, Refused> {
        let mode = match message.mode() {
            v1::PoolMode::Ipc => EnginePoolMode::Ipc,
            v1::PoolMode::Staged => EnginePoolMode::Staged,
            v1::PoolMode::Owned | v1::PoolMode::Unspecified => {
                return Err(invalid("mode", "is to be POOL_MODE_OWNED, POOL_MODE_IPC or POOL_MODE_STAGED"));
            }
        };
        let pieces = message.exports.len().max(message.fragments.len());
        match mode {
            EnginePoolMode::Staged if pieces > 0 => {
                return Err(invalid("exports", "a staged pool has neither exports nor fragments"));
            }
            EnginePoolMode::Ipc if pieces > PIECES_MAX => {
                return Err(invalid(
                    "exports",
                    format!("{pieces} pieces, at most {PIECES_MAX} are permitted"),
                ));
            }
            EnginePoolMode::Staged | EnginePoolMode::Ipc => {}
        }
        if message.adoption.is_some() {
            return Err(invalid("adoption", "a pool that the engine owns is opened anew"));
        }
        if message.tokens_per_block == 0 {
            return Err(invalid("tokens_per_block", "0 is not possible"));
        }
        self.check_pool_count()?;
        Ok(EnginePoolIdentity {
            engine: EngineId(uuid("engine", &message.engine).map_err(malformed)?),
            mode,
            uuid: random(),
            base: digest("base", &message.base).map_err(malformed)?,
            domain: self.domain,
            block_bytes: usize::try_from(message.block_bytes).unwrap_or(0),
            block_count: message.block_count,
            shard: message.shard,
            shard_count: message.shard_count.max(1),
            rank: message.rank,
            rank_count: message.rank_count.max(1),
            tokens_per_block: message.tokens_per_block,
            device: wire::label("device", &message.device)?.to_owned(),
        })
    }

    /// An export, with its descriptor, which may still be on its way.
    async fn export(&mut self, export: &v1::PoolExport) -> Result<Result<Export, Refused>, End> {
        use v1::pool_export::Kind;
        let name = match &export.kind {
            Some(Kind::Memory(name) | Kind::CudaVmm(name)) => uuid("exports.memory", name),
            Some(Kind::CudaIpc(ipc)) => {
                let handle = ipc.handle.as_slice().try_into();
                let gpu_uuid = export.gpu_uuid.clone();
                return Ok(handle
                    .map(|handle| Export::CudaIpc {
                        handle,
                        offset: ipc.offset,
                        bytes: export.bytes,
                        gpu_uuid,
                    })
                    .map_err(|_| invalid("exports.cuda_ipc.handle", "is to have 64 bytes")));
            }
            None => return Ok(Err(invalid("exports.kind", "is missing"))),
        };
        let name = match name {
            Ok(name) => name,
            Err(reason) => return Ok(Err(malformed(reason))),
        };
        let Ok(fd) = timeout(self.limit, self.descriptor(name)).await else {
            return Ok(Err(invalid("exports.memory", "its descriptor did not come in time")));
        };
        let (fd, bytes, gpu_uuid) = (fd?, export.bytes, export.gpu_uuid.clone());
        Ok(Ok(match &export.kind {
            Some(Kind::CudaVmm(_)) => Export::CudaVmm { descriptor: fd, bytes, gpu_uuid },
            Some(Kind::Memory(_) | Kind::CudaIpc(_)) | None => Export::Shared(fd),
        }))
    }

    pub(super) fn mapped_segments(&self, message: &v1::MappedSegments) -> Result<(), Refused> {
        let segments: Vec<SegmentId> = message.segments.iter().map(|id| SegmentId(*id)).collect();
        self.core.manager.segments_mapped(self.id, PoolId(message.pool_id), &segments)
    }

    // ---- loading --------------------------------------------------------------------------------------------

    /// Answered when the copies have ended, without a place in the queue of answers until then: who waits for a load must
    /// be able to cancel it.
    pub(super) fn load(&mut self, id: u64, message: &v1::Onboard) -> Result<(), Refused> {
        let answering = self.waits.begin(&self.outbound, id).ok_or_else(|| self.too_many())?;
        let done = Box::new(move |outcome: Outcome| answering(wire::transfer_done(&outcome)));
        let (lease, pool) = (LeaseId(message.lease_id), PoolId(message.pool_id));
        let first = usize::try_from(message.first).unwrap_or(usize::MAX);
        let targets = wire::blocks(&message.targets);
        self.core.manager.load(self.id, id, lease, pool, (first, &targets), done)
    }

    fn too_many(&self) -> Refused {
        let busy = Refused::Busy { queue: "session_answers" };
        self.core.refusals.note(&busy);
        busy
    }

    pub(super) fn cancel_onboard(&self, answer: Answer, message: &v1::CancelOnboard) {
        super::later_or(
            answer,
            |drained| self.core.manager.cancel_load(self.id, message.onboard_id, drained),
            Body::Cancel(v1::CancelReply { found: true }),
            Body::Cancel(v1::CancelReply { found: false }),
        );
    }

    // ---- storing ------------------------------------------------------------------------------------------------------

    /// Of a staged pool answered at once; of an ipc pool when each block has its verdict.
    pub(super) fn store(&mut self, id: u64, message: &v1::Store) -> Result<Option<Body>, Refused> {
        let (namespace, pool) = (NamespaceId(message.namespace_id), PoolId(message.pool_id));
        let blocks = store_blocks(message)?;
        if let Some(recorder) = &self.core.recorder {
            let commit = |b: &StoreBlock| {
                let StoreBlock { block, hash, parent, retention } = *b;
                CommitBlock { block, hash, parent, retention }
            };
            let commits: Vec<CommitBlock> = blocks.iter().map(commit).collect();
            recorder.committed(&self.core.manager, namespace, &commits);
        }
        let mode = self.core.manager.inspect(|ledger| ledger.engine_pool(pool).map(|p| p.identity.mode));
        match mode.ok_or(Refused::Unknown { what: "pool" })? {
            EnginePoolMode::Staged => {
                if message.fence.is_some() || message.rescue_only {
                    return Err(invalid(
                        "fence",
                        "the engine of a staged pool waits by itself, and is not rescued",
                    ));
                }
                let staged = self.core.manager.stage(self.id, namespace, pool, &blocks)?;
                let slots = v1::Slots {
                    segments: staged.slots.iter().map(|slot| slot.place.segment.0).collect(),
                    indices: staged.slots.iter().map(|slot| slot.place.index).collect(),
                    generations: staged.slots.iter().map(|slot| slot.generation).collect(),
                    pins: staged.slots.iter().map(|slot| slot.pin).collect(),
                };
                let store_id = if staged.slots.is_empty() { 0 } else { staged.store.0 };
                Ok(Some(store_reply(store_id, &staged.verdicts, Some(slots))))
            }
            EnginePoolMode::Ipc => {
                let fence = message.fence.map(|fence| Fence { word: fence.word, value: fence.value });
                if fence.is_some_and(|fence| fence.word >= PoolWords::FENCES) {
                    return Err(invalid(
                        "fence.word",
                        format!("0 to {} are possible", PoolWords::FENCES - 1),
                    ));
                }
                let answering = self.waits.begin(&self.outbound, id).ok_or_else(|| self.too_many())?;
                let rescue_only = message.rescue_only;
                let request = StoreRequest { namespace, pool, blocks, fence, rescue_only };
                let done = Box::new(move |verdicts: Vec<Verdict>| answering(store_reply(0, &verdicts, None)));
                self.core.manager.store(self.id, request, done)?;
                Ok(None)
            }
        }
    }

    pub(super) fn store_done(&self, message: &v1::StoreDone) -> Result<(), Refused> {
        let copied: Vec<bool> = message.copied.iter().map(|copied| *copied == 1).collect();
        self.core.manager.finish_staged(self.id, StoreId(message.store_id), &copied)
    }
}

fn fragment(message: &v1::Fragment) -> Result<Fragment, Refused> {
    let size = |what, bytes: u64| usize::try_from(bytes).map_err(|_| invalid(what, "is too large"));
    Ok(Fragment {
        export: message.export as usize,
        offset: size("fragments.offset", message.offset)?,
        stride: size("fragments.stride", message.stride)?,
        bytes: size("fragments.bytes", message.bytes)?,
    })
}

fn store_blocks(message: &v1::Store) -> Result<Vec<StoreBlock>, Refused> {
    if message.blocks.is_empty() || message.blocks.len() > STORE_BLOCKS_MAX {
        let reason = format!("{}, 1 to {STORE_BLOCKS_MAX} are permitted", message.blocks.len());
        return Err(invalid("blocks", reason));
    }
    // The same columns as those of a commit.
    let commit = v1::Commit {
        blocks: message.blocks.clone(),
        keys: message.keys.clone(),
        parents: message.parents.clone(),
        retention: message.retention.clone(),
        ..Default::default()
    };
    let rows = wire::commits(&commit)?.into_iter();
    Ok(rows
        .map(|CommitBlock { block, hash, parent, retention }| StoreBlock { block, hash, parent, retention })
        .collect())
}

fn store_reply(store_id: u64, verdicts: &[Verdict], slots: Option<v1::Slots>) -> Body {
    let verdicts = verdicts.iter().map(|verdict| verdict_out(*verdict) as u8).collect();
    Body::Store(v1::StoreReply { store_id, verdicts, slots })
}

fn verdict_out(verdict: Verdict) -> v1::StoreVerdict {
    match verdict {
        Verdict::Stored => v1::StoreVerdict::Stored,
        Verdict::Resident => v1::StoreVerdict::Resident,
        Verdict::InFlight => v1::StoreVerdict::InFlight,
        Verdict::Write => v1::StoreVerdict::Write,
        Verdict::Orphan => v1::StoreVerdict::Orphan,
        Verdict::Exhausted => v1::StoreVerdict::Exhausted,
        Verdict::NotAdmitted => v1::StoreVerdict::NotAdmitted,
        Verdict::Stale => v1::StoreVerdict::Stale,
        Verdict::Busy => v1::StoreVerdict::Busy,
        Verdict::Failed => v1::StoreVerdict::Failed,
        Verdict::Registered => v1::StoreVerdict::Registered,
    }
}
