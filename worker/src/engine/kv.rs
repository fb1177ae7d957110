//! The memory that holds KV blocks, and how a block is laid out in it.
//!
//! ```text
//! pool:   block 0 | block 1 | ..                 one every `stride` bytes
//! block:  layer 0: K, V | layer 1: K, V | ..
//! K or V: token 0: head 0, head 1, .. | token 1: .. each head `head_dim` bf16
//! ```

use std::any::Any;
use std::sync::Arc;

use kvbm_shm::{POOL_HEADER_BYTES, PoolMemory};

use super::lanes::{LANES, narrow};
use crate::model::Config;

/// A block of the device pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// Dimensions of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers of the model.
    pub layers: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens of a block: 16, 32 or 64.
    pub tokens_per_block: usize,
}

impl KvLayout {
    /// Name of this order of dimensions and of the arithmetic that fills it: part of the base namespace. It changes
    /// whenever the bytes that this engine computes for a token change.
    pub const NAME: &'static str = "layer.kv.token.head.dim/f32-chain-tile16-v1";
    /// Name of the element type, part of the base namespace.
    pub const DTYPE: &'static str = "bf16";

    /// As [`KvLayout::NAME`], of the engine that computes on GPUs.
    pub const CUDA_NAME: &'static str = "layer.kv.token.head.dim/cuda-bf16-v1";

    /// Blocks of a model with so many tokens.
    pub fn of(model: &Config, tokens_per_block: usize) -> Self {
        let (layers, kv_heads, head_dim) = (model.layers, model.kv_heads, model.head_dim);
        Self { layers, kv_heads, head_dim, tokens_per_block }
    }

    /// Elements of one token's K (or V) in one layer.
    pub fn token_elements(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.layers * 2 * self.tokens_per_block * self.token_elements() * 2
    }

    /// Blocks that hold `tokens` tokens.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.tokens_per_block)
    }

    /// Element at which a token's K (`half` 0) or V (`half` 1) begins.
    fn element(&self, layer: usize, half: usize, token: usize) -> usize {
        ((layer * 2 + half) * self.tokens_per_block + token) * self.token_elements()
    }
}

/// The device pool as the engine sees it. Other processes may copy from and to blocks that the engine does not use.
pub struct KvMemory {
    base: *mut u8,
    stride: usize,
    block_count: usize,
    layout: KvLayout,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory lives as long as the owner, which is Send and Sync, and is only accessed by methods that demand
// that no two threads touch the same token.
unsafe impl Send for KvMemory {}
// SAFETY: as above.
unsafe impl Sync for KvMemory {}

impl KvMemory {
    /// Takes over memory that something else has mapped.
    ///
    /// # Safety
    /// From `base` on, `block_count * stride` bytes must be mapped readable and writable for as long as `owner` lives,
    /// and `base` and `stride` must be multiples of 2. While the engine runs a batch, nobody else may write the blocks in
    /// the batch's block tables, or read those that it fills.
    ///
    /// # Panics
    /// When a block does not fit into `stride`, or tokens per block is not a multiple of 16.
    pub unsafe fn new(
        base: *mut u8,
        stride: usize,
        block_count: usize,
        layout: KvLayout,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        assert!(stride >= layout.block_bytes(), "a block of {} bytes fits the stride", layout.block_bytes());
        assert!(layout.tokens_per_block.is_multiple_of(LANES), "attention reads keys 16 at a time");
        assert!(base.addr().is_multiple_of(2) && stride.is_multiple_of(2), "elements are aligned");
        Self { base, stride, block_count, layout, _owner: owner }
    }

    /// The blocks of a pool that other processes may have mapped too. Which of them may be used, and when, is for the
    /// pool's cache to say.
    ///
    /// # Panics
    /// When the pool's blocks are not of this layout.
    pub fn of_pool(pool: Arc<PoolMemory>, layout: KvLayout) -> Self {
        let shape = pool.layout();
        assert_eq!(shape.block_bytes, layout.block_bytes(), "the pool was made for this layout");
        // SAFETY: the mapping holds the header page and then `block_count` strides, page-aligned, and lives as long as
        // `pool`. In this process nobody else touches the blocks; other processes copy only blocks that no batch uses.
        unsafe {
            let base = pool.memory().address().as_ptr().add(POOL_HEADER_BYTES);
            Self::new(base, shape.stride(), shape.block_count as usize, layout, pool)
        }
    }

    /// Memory of this process alone, zeroed.
    pub fn private(layout: KvLayout, block_count: usize) -> Self {
        let stride = layout.block_bytes();
        let mut memory = vec![0u64; (stride * block_count).div_ceil(8)].into_boxed_slice();
        let base = memory.as_mut_ptr().cast::<u8>();
        // Not kept as a Box: accesses through `base` must not compete with a unique owner.
        let owner = Arc::new(Owned { base: Box::into_raw(memory) });
        // SAFETY: `owner` frees the memory when the last reference is gone; it is of this size, and private.
        unsafe { Self::new(base, stride, block_count, layout, owner) }
    }

    /// Blocks of the pool.
    pub fn block_count(&self) -> usize {
        self.block_count
    }

    /// Dimensions of a block.
    pub fn layout(&self) -> KvLayout {
        self.layout
    }

    /// Copies a block's bytes out, as tests do to compare them.
    ///
    /// # Panics
    /// When the pool has no such block.
    pub fn read_block(&self, block: BlockId) -> Vec<u8> {
        let mut bytes = vec![0u8; self.layout.block_bytes()];
        // SAFETY: `block_start` checks the block, and a block has so many bytes.
        unsafe {
            self.block_start(block).cast::<u8>().copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len())
        };
        bytes
    }

    fn block_start(&self, block: BlockId) -> *mut u16 {
        let index = block.0 as usize;
        assert!(index < self.block_count, "block {index} of {}", self.block_count);
        // SAFETY: the block is within the memory that `new` was given.
        unsafe { self.base.add(index * self.stride).cast() }
    }

    /// Where the K and V of 16 consecutive tokens begin, the first being a multiple of 16 from the sequence's first.
    pub(crate) fn tile(
        &self,
        blocks: &[BlockId],
        layer: usize,
        first_position: usize,
    ) -> (*const u16, *const u16) {
        debug_assert!(first_position.is_multiple_of(LANES) && layer < self.layout.layers);
        let (block, token) =
            (first_position / self.layout.tokens_per_block, first_position % self.layout.tokens_per_block);
        let start = self.block_start(blocks[block]).cast_const();
        // SAFETY: layer, half and token are within a block.
        unsafe {
            (start.add(self.layout.element(layer, 0, token)), start.add(self.layout.element(layer, 1, token)))
        }
    }

    /// Stores one token's K and V.
    ///
    /// # Safety
    /// Nobody else accesses this token's place meanwhile.
    pub(crate) unsafe fn write(&self, block: BlockId, token: usize, layer: usize, k: &[f32], v: &[f32]) {
        assert!(token < self.layout.tokens_per_block && layer < self.layout.layers, "within a block");
        assert!(k.len() == self.layout.token_elements() && v.len() == k.len(), "one token's K and V");
        for (half, values) in [k, v].into_iter().enumerate() {
            // SAFETY: the place lies within the block, and is the caller's alone.
            unsafe {
                let to = self.block_start(block).add(self.layout.element(layer, half, token));
                for (i, value) in values.iter().enumerate() {
                    to.add(i).write(narrow(*value));
                }
            }
        }
    }
}

/// Frees private memory.
struct Owned {
    base: *mut [u64],
}

// SAFETY: the pointer is used only to free the memory.
unsafe impl Send for Owned {}
// SAFETY: as above.
unsafe impl Sync for Owned {}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: it came from `Box::into_raw`, and the `KvMemory` that used it is gone.
        drop(unsafe { Box::from_raw(self.base) });
    }
}
