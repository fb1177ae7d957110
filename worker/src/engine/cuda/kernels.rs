//! The kernels: their code, their arguments, how many threads run them.
//!
//! The code is PTX for compute capability 8.0, made from `worker/kernels/*.cu` by `worker/kernels/build.sh` and checked in.
//! The driver compiles it for the GPU at hand, once per machine: nothing in it needs a later capability (Hopper's matrix
//! instructions are cuBLAS's business), so that one text serves A100, H100, H200 and what comes after.

use std::sync::Arc;

use kvbm_cuda::{Blas, Context, Driver, Function, Launch, Module, Stream};

use crate::Result;

/// Of issuing something.
pub(super) type CudaResult = std::result::Result<(), kvbm_cuda::Error>;

/// What `build.sh` made.
const PTX: &str = include_str!("../../../kernels/llama.ptx");
/// Threads of a block that works on one row.
const ROW_THREADS: u32 = 256;

/// Where KV lies; `Kv` in `pool.cuh`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct KvPlace {
    pub base: u64,
    pub tables: u64,
    /// Elements from one block to the next.
    pub stride: u64,
    /// Tokens of a block: 1 << shift.
    pub block_shift: u32,
    /// Elements of a token's K (or V) in one layer.
    pub width: u32,
    pub layer: u32,
    pub unused: u32,
}

/// Arguments of `embed`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Embed {
    pub tokens: u64,
    pub table: u64,
    pub hidden: u64,
    pub size: u32,
    pub unused: u32,
}

/// Arguments of `normalize`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Normalize {
    pub hidden: u64,
    pub weight: u64,
    pub out: u64,
    /// Which rows; 0: all.
    pub rows: u64,
    pub size: u32,
    pub epsilon: f32,
}

/// Arguments of `rotate_store`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct RotateStore {
    pub qkv: u64,
    pub positions: u64,
    pub table_starts: u64,
    pub angles: u64,
    pub kv: KvPlace,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub unused: u32,
}

/// Arguments of `activate`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Activate {
    pub gate_up: u64,
    pub out: u64,
    pub size: u32,
    pub unused: u32,
}

/// Arguments of `attend_prefill_*`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct AttendPrefill {
    pub qkv: u64,
    pub out: u64,
    pub tiles: u64,
    pub kv: KvPlace,
    pub heads: u32,
    pub kv_heads: u32,
    /// Of scores, times log2(e).
    pub scale: f32,
    pub unused: u32,
}

/// Arguments of `attend_decode_*` and `join_parts`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct AttendDecode {
    pub qkv: u64,
    pub parts: u64,
    pub out: u64,
    pub rows: u64,
    pub positions: u64,
    pub table_starts: u64,
    pub kv: KvPlace,
    pub heads: u32,
    pub kv_heads: u32,
    /// Of scores, times log2(e).
    pub scale: f32,
    pub splits: u32,
}

/// Arguments of `largest`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Largest {
    pub logits: u64,
    pub tokens: u64,
    /// Elements from one row to the next.
    pub row: u32,
    /// Elements that count.
    pub length: u32,
}

/// Arguments of `fill_random`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct FillRandom {
    pub to: u64,
    pub count: u64,
    pub seed: u64,
    pub scale: f32,
    pub unused: u32,
}

/// What becomes of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Store {
    /// Stored as bf16.
    Bf16,
    /// Stored as f32.
    F32,
    /// Added to f32.
    Add,
}

/// The loaded kernels, with attention for one size of heads, and cuBLAS. All is issued on one stream.
pub(super) struct Kernels {
    pub(super) blas: Blas,
    embed: Function,
    normalize: Function,
    rotate_store: Function,
    activate: Function,
    attend_prefill: Function,
    attend_decode: Function,
    join_parts: Function,
    largest: Function,
    fill_random: Function,
    head_dim: u32,
}

impl Kernels {
    /// Sizes of heads that there is attention for.
    pub const HEAD_DIMS: [usize; 2] = [64, 128];
    /// Most query heads that may share a head of keys.
    pub const GROUP_MAX: usize = 16;
    /// Queries of one tile of [`Kernels::attend_prefill`].
    pub const TILE_ROWS: usize = 128;
    /// Keys that a block of [`Kernels::attend_decode`] reads at a time.
    pub const DECODE_KEYS: usize = 64;

    /// Loads them.
    pub fn load(driver: &Driver, context: &Context, head_dim: usize) -> Result<Self> {
        let module = Module::load(context, PTX.as_bytes())?;
        let function = |name: &str| module.function(name);
        let kernels = Self {
            blas: Blas::new(driver, Arc::new(Stream::new(context)?))?,
            embed: function("embed")?,
            normalize: function("normalize")?,
            rotate_store: function("rotate_store")?,
            activate: function("activate")?,
            attend_prefill: function(&format!("attend_prefill_{head_dim}"))?,
            attend_decode: function(&format!("attend_decode_{head_dim}"))?,
            join_parts: function("join_parts")?,
            largest: function("largest")?,
            fill_random: function("fill_random")?,
            head_dim: head_dim as u32,
        };
        kernels.attend_prefill.allow_shared_bytes(kernels.attention_bytes())?;
        kernels.attend_decode.allow_shared_bytes(kernels.attention_bytes())?;
        Ok(kernels)
    }

    /// The stream.
    pub fn stream(&self) -> &Arc<Stream> {
        self.blas.stream()
    }

    /// Shared memory of both kinds of attention: 384 rows of a head.
    fn attention_bytes(&self) -> u32 {
        384 * self.head_dim * 2
    }

    /// # Safety
    /// Everything that the arguments reach is mapped until the kernel has ended. So with all that follow.
    pub unsafe fn embed(&self, rows: usize, arguments: &Embed) -> CudaResult {
        // SAFETY: the caller's promise.
        unsafe { self.issue(&self.embed, [rows, 1, 1], ROW_THREADS, 0, arguments) }
    }

    /// # Safety
    /// As for [`Kernels::embed`].
    pub unsafe fn normalize(&self, rows: usize, arguments: &Normalize) -> CudaResult {
        // A block of many threads has a row soon; many blocks of few keep a GPU busy.
        let threads =
            if rows < 256 { 1024.min(arguments.size / 4).next_multiple_of(32) } else { ROW_THREADS };
        // SAFETY: the caller's promise.
        unsafe { self.issue(&self.normalize, [rows, 1, 1], threads, 0, arguments) }
    }

    /// # Safety
    /// As for [`Kernels::embed`].
    pub unsafe fn rotate_store(&self, rows: usize, arguments: &RotateStore) -> CudaResult {
        // SAFETY: the caller's promise.
        unsafe { self.issue(&self.rotate_store, [rows, 1, 1], ROW_THREADS, 0, arguments) }
    }

    /// # Safety
    /// As for [`Kernels::embed`].
    pub unsafe fn activate(&self, rows: usize, arguments: &Activate) -> CudaResult {
        let pieces = (arguments.size / 8).div_ceil(ROW_THREADS) as usize;
        // SAFETY: the caller's promise.
        unsafe { self.issue(&self.activate, [pieces, rows, 1], ROW_THREADS, 0, arguments) }
    }

    /// # Safety
    /// As for [`Kernels::embed`].
    pub unsafe fn attend_prefill(&self, tiles: usize, arguments: &AttendPrefill) -> CudaResult {
        let grid = [arguments.heads as usize, tiles, 1];
        // SAFETY: the caller's promise.
        unsafe { self.issue(&self.attend_prefill, grid, 128, self.attention_bytes(), arguments) }
    }

    /// Attends, and joins the parts.
    ///
    /// # Safety
    /// As for [`Kernels::embed`].
    pub unsafe fn attend_decode(&self, rows: usize, arguments: &AttendDecode) -> CudaResult {
        let grid = [arguments.kv_heads as usize, rows, arguments.splits as usize];
        // SAFETY: the caller's promise.
        unsafe {
            self.issue(&self.attend_decode, grid, 128, self.attention_bytes(), arguments)?;
            self.issue(&self.join_parts, [arguments.heads as usize, rows, 1], self.head_dim, 0, arguments)
        }
    }

    /// # Safety
    /// As for [`Kernels::embed`].
    pub unsafe fn largest(&self, rows: usize, arguments: &Largest) -> CudaResult {
        // SAFETY: the caller's promise.
        unsafe { self.issue(&self.largest, [rows, 1, 1], 1024, 0, arguments) }
    }

    /// # Safety
    /// As for [`Kernels::embed`].
    pub unsafe fn fill_random(&self, arguments: &FillRandom) -> CudaResult {
        // SAFETY: the caller's promise.
        unsafe { self.issue(&self.fill_random, [2048, 1, 1], ROW_THREADS, 0, arguments) }
    }

    /// # Safety
    /// `P` is the structure that `function` takes; the rest as for [`Kernels::embed`].
    unsafe fn issue<P: Copy>(
        &self,
        function: &Function,
        grid: [usize; 3],
        threads: u32,
        shared_bytes: u32,
        arguments: &P,
    ) -> CudaResult {
        let launch = Launch { grid: grid.map(|size| size as u32), block: [threads, 1, 1], shared_bytes };
        // SAFETY: the caller's promise.
        unsafe { function.launch_by_value(self.stream(), launch, arguments) }
    }
}

#[cfg(test)]
mod tests;
