//! Engines that own their KV memory: opening their pools, storing, loading, and what their words say.
//!
//! Lock order: ledger, then the maps in here; no callback runs under any of them.

mod fan_out;
mod fences;
mod flights;
mod moves;
mod open;
mod pins;

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::{Manager, Shared};
use crate::error::Refused;
use crate::ledger::{
    EngineAsks, EngineMatch, EnginePoolMode, Ledger, Millis, NamespaceId, PoolId, SegmentId, SessionId,
    StagedSlot, StoreBlock, StoreId, Verdict,
};
use crate::store::EnginePoolMemory;
use crate::what_if::Asked;
use kvbm_shm::{PinState, PinnedSlot, SharedMemory};

pub use fences::Fence;
pub use open::{OpenEnginePool, OpenedEnginePool};

pub(super) use fan_out::FanOut;
pub(super) use fences::Fences;
pub(super) use flights::Flights;
pub(super) use moves::{LoadJob, StoreJob, run_loads, run_stores};

use super::PIECE_BLOCKS;

/// Answers a store: one verdict for each block.
pub(super) type Stored = Box<dyn FnOnce(Vec<Verdict>) + Send>;

/// What is known of engines' pools outside the ledger.
#[derive(Default)]
pub(super) struct EngineState {
    pools: RwLock<HashMap<PoolId, Arc<EnginePoolMemory>>>,
    stores: Mutex<HashMap<StoreId, Stored>>,
    openings: Mutex<Vec<open::Opening>>,
    pub fences: Fences,
    pub flights: Flights,
    fan_out: FanOut,
    /// Called when host memory was given to a class: engines may have to map it.
    segments_changed: Mutex<Option<Box<dyn Fn() + Send>>>,
}

impl EngineState {
    fn get(&self, id: PoolId) -> Option<Arc<EnginePoolMemory>> {
        self.pools.read().get(&id).cloned()
    }

    /// There is more host memory that will be copied from and to.
    pub fn prepare(&self, host: &Arc<SharedMemory>) {
        let all: Vec<_> = self.pools.read().values().cloned().collect();
        all.iter().for_each(|memory| memory.prepare(host));
    }

    /// Host memory was given to a class.
    pub fn segments_changed(&self) {
        if let Some(changed) = &*self.segments_changed.lock() {
            changed();
        }
    }
}

/// Blocks of an ipc pool that are complete once a fence is reached.
#[derive(Debug, Clone)]
pub struct StoreRequest {
    /// Of all blocks.
    pub namespace: NamespaceId,
    /// Where they are.
    pub pool: PoolId,
    /// Parents before children.
    pub blocks: Vec<StoreBlock>,
    /// `None`: they are complete.
    pub fence: Option<Fence>,
    /// They are copied only if the engine dies.
    pub rescue_only: bool,
}

/// What a staged pool's engine is to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    /// To be named when the copies have ended.
    pub store: StoreId,
    /// One for each block.
    pub verdicts: Vec<Verdict>,
    /// For each [`Verdict::Write`].
    pub slots: Vec<StagedSlot>,
}

impl Manager {
    /// Whether a session asks about a namespace on behalf of an engine that owns its memory.
    pub fn is_of_engine(&self, session: SessionId, namespace: NamespaceId) -> bool {
        self.inspect(|ledger| ledger.is_of_engine(session, namespace))
    }

    /// The longest prefix in host memory behind what the engine has itself, leased to all its ranks. The promise of a held
    /// lease is in all pin tables when this returns.
    pub fn match_for_engine(
        &self,
        session: SessionId,
        namespace: NamespaceId,
        asks: EngineAsks<'_>,
    ) -> Result<EngineMatch, Refused> {
        let (found, block_bytes) = self.shared.with_ledger(|ledger, now| {
            let found = ledger.match_for_engine(session, namespace, asks, now)?;
            if let (Some(held), Some((place, _))) = (&found.pin, found.slots.last()) {
                let slot = PinnedSlot { segment: place.segment.0, index: place.index };
                for words in held.pools.iter().filter_map(|pool| self.shared.engines.get(*pool)) {
                    words.words.set_pin(held.pin, PinState::Promised(held.lease.0), slot);
                }
            }
            if found.matched.disk_blocks > 0 {
                self.shared.queue_promotes(ledger, session, namespace, asks.hashes, now)?;
            }
            Ok::<_, Refused>((found, ledger.block_bytes(namespace)))
        })?;
        let keys = asks.hashes;
        let (host, disk) = (found.matched.host_blocks, found.matched.disk_blocks);
        self.shared.counters.looked_up(host, disk, keys.len().saturating_sub(asks.skip));
        if let Some(block_bytes) = block_bytes {
            let in_host = asks.skip.min(keys.len()) + host;
            let asked = Asked { session, namespace, keys, block_bytes, in_host, on_disk: in_host + disk };
            self.shared.what_if.asked(&asked, self.shared.now());
        }
        Ok(found)
    }

    /// Complete blocks of an ipc pool. Unless refused, `done` is called at most once, when each has its verdict; never if the
    /// engine dies.
    pub fn store(&self, session: SessionId, request: StoreRequest, done: Stored) -> Result<(), Refused> {
        let StoreRequest { namespace, pool, .. } = request;
        let memory = self.shared.engines.get(pool).ok_or(Refused::Unknown { what: "pool" })?;
        if self.shared.engines.fences.is_full() {
            self.shared.counters.was_busy("fences");
            return Err(self.shared.full("fences"));
        }
        let store = self.shared.with_ledger(|ledger, _| {
            let store = ledger.begin_store(session, namespace, pool, EnginePoolMode::Ipc)?;
            self.shared.engines.stores.lock().insert(store, done);
            Ok::<_, Refused>(store)
        })?;
        self.shared.fenced(session, store, request, memory);
        Ok(())
    }

    /// Complete blocks of a staged pool: which of them the engine is to copy, and where to.
    pub fn stage(
        &self,
        session: SessionId,
        namespace: NamespaceId,
        pool: PoolId,
        blocks: &[StoreBlock],
    ) -> Result<Staged, Refused> {
        let memory = self.shared.engines.get(pool).ok_or(Refused::Unknown { what: "pool" })?;
        let store = self
            .shared
            .with_ledger(|ledger, _| ledger.begin_store(session, namespace, pool, EnginePoolMode::Staged))?;
        let mut slots = Vec::new();
        for piece in blocks.chunks(PIECE_BLOCKS) {
            slots.extend(self.shared.with_ledger(|ledger, now| {
                let slots = ledger.stage(store, piece, now);
                self.shared.bind_segments(ledger);
                if let Some(warm) = &self.shared.warm {
                    warm.clear(slots.iter().map(|slot| slot.place));
                }
                for slot in &slots {
                    let place = PinnedSlot { segment: slot.place.segment.0, index: slot.place.index };
                    memory.words.set_pin(slot.pin, PinState::InUse(store.0), place);
                }
                slots
            }));
        }
        let verdicts = self.shared.with_ledger(|ledger, _| ledger.seal_store(store));
        self.saw_stored(namespace, blocks);
        Ok(Staged { store, verdicts, slots })
    }

    /// The engine's copies of a staged store have ended.
    pub fn finish_staged(&self, session: SessionId, store: StoreId, copied: &[bool]) -> Result<(), Refused> {
        self.shared.with_ledger(|ledger, now| {
            let (pool, pins) = ledger.finish_staged(session, store, copied, now)?;
            if let Some(memory) = self.shared.engines.get(pool) {
                pins.into_iter().for_each(|pin| memory.words.clear_pin(pin));
                let arrived = copied.iter().filter(|copied| **copied).count();
                self.shared.counters.staged(arrived, (arrived * memory.block_bytes) as u64);
            }
            Ok(())
        })
    }

    /// Stores that wait for a fence.
    pub fn stores_fenced(&self) -> usize {
        self.shared.engines.fences.len()
    }

    fn saw_stored(&self, namespace: NamespaceId, blocks: &[StoreBlock]) {
        if let Some(block_bytes) = self.inspect(|ledger| ledger.block_bytes(namespace)) {
            let hashes = blocks.iter().map(|block| block.hash);
            self.shared.what_if.stored(namespace, hashes, block_bytes);
        }
    }

    // ---- host segments in engines' hands ------------------------------------------------------------------------------

    /// Host segments that a session is to have and was not given yet.
    pub fn give_segments(&self, session: SessionId) -> Vec<(SegmentId, Arc<SharedMemory>)> {
        let given = self.shared.with_ledger(|ledger, _| {
            self.shared.bind_segments(ledger);
            ledger.give_segments(session)
        });
        let segments = self.shared.host.segments();
        given.into_iter().map(|id| (id, Arc::clone(&segments[id.0 as usize]))).collect()
    }

    /// The process behind a pool has mapped these segments.
    pub fn segments_mapped(
        &self,
        session: SessionId,
        pool: PoolId,
        segments: &[SegmentId],
    ) -> Result<(), Refused> {
        self.shared.with_ledger(|ledger, _| ledger.segments_mapped(session, pool, segments))
    }

    /// `changed` is called when engines may have to be given host segments; it must return at once and not call back.
    pub fn listen_segments(&self, changed: impl Fn() + Send + 'static) {
        *self.shared.engines.segments_changed.lock() = Some(Box::new(changed));
    }
}

impl Shared {
    /// Answers that have become true in the ledger. To be called under its lock; the answers, without.
    pub(super) fn engines_decided(&self, ledger: &mut Ledger, now: Millis) -> Vec<(Stored, Vec<Verdict>)> {
        self.settle_withdrawn(ledger, now);
        self.queue_stores(ledger, now);
        let filled = ledger.take_filled();
        if let Some(warm) = &self.warm {
            // Under the lock: nobody has put another block there yet.
            for filled in filled {
                warm.set(filled.stride, std::iter::once((filled.place, filled.stored)));
            }
        }
        let stored = ledger.take_stored();
        if stored.is_empty() {
            return Vec::new();
        }
        let mut waiting = self.engines.stores.lock();
        stored.into_iter().filter_map(|(id, verdicts)| Some((waiting.remove(&id)?, verdicts))).collect()
    }
}

#[cfg(test)]
mod tests;
