//! The KV blocks in a GPU's memory, laid out as on a CPU (see [`crate::engine::kv`]).

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use kvbm_cuda::{Context, DeviceRange, VmmMemory};
use kvbm_shm::{DeviceMemory, PoolLayout, PoolMemory};

use super::CudaEngine;
use super::device::allocate_exportable;
use super::kernels::KvPlace;
use crate::{BlockId, Error, KvLayout, Result};

/// The device pool on a GPU. Clones share the memory. Other processes may copy from and to blocks that the engine does not use.
#[derive(Clone)]
pub struct DevicePool {
    memory: Arc<VmmMemory>,
    stride: usize,
    block_count: usize,
    layout: KvLayout,
}

impl DevicePool {
    /// Memory of this process, zeroed. It can be exported.
    pub fn private(engine: &CudaEngine, block_count: usize) -> Result<Self> {
        let layout = engine.kv_layout();
        let bytes = Self::bytes_of(layout, block_count)?;
        let memory = allocate_exportable(engine.context(), "KV blocks", bytes)?;
        Self::of(Arc::new(memory), layout, block_count)
    }

    /// Memory that the daemon allocated: `bytes` as the daemon mapped it, block 0 at its start.
    pub fn import(
        engine: &CudaEngine,
        descriptor: BorrowedFd<'_>,
        bytes: usize,
        block_count: usize,
    ) -> Result<Self> {
        let layout = engine.kv_layout();
        let memory = VmmMemory::import(engine.context(), descriptor, bytes)?;
        Self::of(Arc::new(memory), layout, block_count)
    }

    fn of(memory: Arc<VmmMemory>, layout: KvLayout, block_count: usize) -> Result<Self> {
        let needed = Self::bytes_of(layout, block_count)?;
        if memory.bytes() < needed {
            let detail = format!("the pool has {} bytes, {block_count} blocks need {needed}", memory.bytes());
            return Err(Error::Device { device: memory.context().device().name.clone(), detail });
        }
        Ok(Self { memory, stride: Self::stride_of(layout), block_count, layout })
    }

    /// Bytes from one block to the next: as in every pool, whole pages.
    fn stride_of(layout: KvLayout) -> usize {
        layout.block_bytes().next_multiple_of(4096)
    }

    fn bytes_of(layout: KvLayout, block_count: usize) -> Result<usize> {
        let bytes = Self::stride_of(layout).checked_mul(block_count).filter(|bytes| *bytes > 0);
        bytes.ok_or_else(|| Error::invalid("pool", format!("{block_count} blocks are not possible")))
    }

    /// The pool as a cache keeps it, and hands it to a daemon that appears later.
    pub fn export(&self, uuid: [u8; 16]) -> Result<PoolMemory> {
        let device = DeviceMemory { descriptor: self.memory.export()?, bytes: self.memory.bytes() };
        let layout = PoolLayout {
            block_bytes: self.layout.block_bytes(),
            block_count: u32::try_from(self.block_count)
                .map_err(|_| Error::invalid("pool", format!("{} blocks are too many", self.block_count)))?,
        };
        Ok(PoolMemory::create_on_device(uuid, layout, device)?)
    }

    /// The memory, for whoever maps or copies it. Block 0 is at its start.
    pub fn memory(&self) -> &Arc<VmmMemory> {
        &self.memory
    }

    /// Bytes from one block to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Blocks of the pool.
    pub fn block_count(&self) -> usize {
        self.block_count
    }

    /// Dimensions of a block.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// The GPU.
    pub fn context(&self) -> &Context {
        self.memory.context()
    }

    /// Copies a block's bytes out, as checks do to compare them.
    ///
    /// # Panics
    /// When the pool has no such block.
    pub fn read_block(&self, block: BlockId) -> Result<Vec<u8>> {
        assert!((block.0 as usize) < self.block_count, "block {} of {}", block.0, self.block_count);
        let mut bytes = vec![0; self.layout.block_bytes()];
        self.memory.read(block.0 as usize * self.stride, &mut bytes)?;
        Ok(bytes)
    }

    /// As the kernels are told, but for the layer; `tables` is where the sequences' tables are.
    pub(super) fn place(&self, tables: u64) -> KvPlace {
        KvPlace {
            base: self.memory.address().0,
            tables,
            stride: (self.stride / 2) as u64,
            block_shift: self.layout.tokens_per_block.trailing_zeros(),
            width: self.layout.token_elements() as u32,
            layer: 0,
            unused: 0,
        }
    }
}
