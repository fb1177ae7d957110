//! Mapped device pools by number.

use std::collections::HashMap;
use std::sync::Arc;

use kvbm_shm::{POOL_STEPS_OFFSET, PoolMemory, SharedMemory};
use parking_lot::RwLock;

use super::{EngineMemory, Export, Fragment, MapExports, MappedBlocks, NoDeviceMemory};
use crate::error::{Error, Refused};
use crate::ledger::PoolId;
use crate::tier::Tier;

/// A pool of which the ledger decides what is in it, as it is mapped here.
#[derive(Debug)]
pub(crate) struct OwnedPool {
    /// Its header; and its blocks, if `gpu` is `None`.
    pub memory: Arc<PoolMemory>,
    /// Its blocks.
    pub gpu: Option<MappedBlocks>,
}

impl OwnedPool {
    /// A new pool on a device: a GPU by its UUID, or anything else, which is memory of the host.
    pub fn create(
        exports: &dyn MapExports,
        device: &str,
        uuid: [u8; 16],
        layout: kvbm_shm::PoolLayout,
    ) -> Result<Self, Error> {
        if !is_gpu(device) {
            return Ok(Self { memory: Arc::new(PoolMemory::create(uuid, layout)?), gpu: None });
        }
        let bytes = layout.stride().saturating_mul(layout.block_count as usize);
        let (blocks, device) = exports.allocate(device, bytes).map_err(|reason| match reason {
            NoDeviceMemory::Exhausted(free) => Refused::Exhausted {
                tier: Tier::Device,
                wanted: layout.block_count as usize,
                available: usize::try_from(free).unwrap_or(0) / layout.stride(),
            },
            NoDeviceMemory::Impossible(reason) => Refused::invalid("device", reason),
        })?;
        Self::on_gpu(PoolMemory::create_on_device(uuid, layout, device)?, blocks)
    }

    /// Maps a pool that somebody else made.
    pub fn map(exports: &dyn MapExports, device: &str, memory: PoolMemory) -> Result<Self, Error> {
        let Some((descriptor, bytes)) = memory.device() else {
            return match is_gpu(device) {
                false => Ok(Self { memory: Arc::new(memory), gpu: None }),
                true => Err(Refused::invalid("device", "the pool is in memory of the host").into()),
            };
        };
        let descriptor = descriptor.try_clone_to_owned().map_err(|error| {
            Refused::invalid("adoption.pool_uuid", format!("its descriptor cannot be kept: {error}"))
        })?;
        let export = Export::CudaVmm { descriptor, bytes: bytes as u64, gpu_uuid: device.to_owned() };
        let blocks = exports.map(vec![export]);
        Self::on_gpu(memory, blocks.map_err(|reason| Refused::invalid("adoption.pool_uuid", reason))?)
    }

    fn on_gpu(memory: PoolMemory, blocks: Arc<dyn EngineMemory>) -> Result<Self, Error> {
        let layout = memory.layout();
        let whole = Fragment { export: 0, offset: 0, stride: layout.stride(), bytes: layout.block_bytes };
        blocks.pace_by(memory.memory(), POOL_STEPS_OFFSET);
        let gpu = MappedBlocks::new(blocks, vec![whole], layout.block_bytes, layout.block_count);
        let gpu = gpu.map_err(|reason| Refused::invalid("block_count", reason))?;
        Ok(Self { memory: Arc::new(memory), gpu: Some(gpu) })
    }

    /// Whether blocks can be copied between this pool and another without a detour over host memory, both ways. Only on GPUs:
    /// out of another pool in memory of the host nothing comes sooner than out of the host tier.
    pub fn connect(&self, other: &Self) -> bool {
        let made = match (&self.gpu, &other.gpu) {
            (Some(here), Some(there)) => {
                let back = || there.memory.connect(&*here.memory);
                here.memory.connect(&*there.memory).and_then(|()| back())
            }
            (Some(_), None) | (None, _) => return false,
        };
        if let Err(reason) = &made {
            tracing::info!(reason, "blocks go from GPU to GPU by way of host memory only");
        }
        made.is_ok()
    }

    /// Makes host memory known to the GPU, if there is one.
    pub fn prepare(&self, host: &Arc<SharedMemory>) {
        if let Some(gpu) = &self.gpu {
            gpu.memory.prepare(host);
        }
    }
}

/// Whether a pool on that device has its blocks in the memory of a GPU: GPUs are named by UUID.
pub fn is_gpu(device: &str) -> bool {
    device.starts_with("GPU-")
}

/// Copies in flight hold their own reference: memory stays mapped until they ended.
#[derive(Debug, Default)]
pub(crate) struct Pools(RwLock<HashMap<PoolId, Arc<OwnedPool>>>);

impl Pools {
    pub fn insert(&self, id: PoolId, pool: Arc<OwnedPool>) {
        self.0.write().insert(id, pool);
    }

    pub fn get(&self, id: PoolId) -> Option<Arc<OwnedPool>> {
        self.0.read().get(&id).cloned()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<OwnedPool>> {
        self.0.read().values().cloned().collect()
    }

    /// Takes out what is no longer known.
    pub fn take_all_but(&self, known: impl Fn(PoolId) -> bool) -> Vec<Arc<OwnedPool>> {
        self.0.write().extract_if(|id, _| !known(*id)).map(|(_, pool)| pool).collect()
    }
}
