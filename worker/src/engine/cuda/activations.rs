//! What passes from kernel to kernel, allocated once for the largest batch.

use kvbm_cuda::{Context, DeviceMemory, DeviceRange};

use super::BatchLimits;
use super::device::allocate;
use super::kernels::Kernels;
use crate::Result;
use crate::model::Config;

/// Most parts into which a sequence's keys are divided when decoding.
const SPLITS_MAX: usize = 64;
/// Keys that are worth a part of their own.
const SPLIT_KEYS: usize = 4 * Kernels::DECODE_KEYS;
/// Blocks of decoding attention for each multiprocessor: so many run at a time.
const BLOCKS_EACH: usize = 2;

/// Buffers; rows are tokens.
pub(super) struct Activations {
    /// f32: the residual stream.
    hidden: DeviceMemory,
    normal: DeviceMemory,
    qkv: DeviceMemory,
    attended: DeviceMemory,
    gate_up: DeviceMemory,
    active: DeviceMemory,
    /// f32: parts of attention that are to be joined.
    parts: DeviceMemory,
    /// f32; rows are answers.
    logits: DeviceMemory,
    multiprocessors: usize,
    kv_heads: usize,
}

/// Their addresses.
#[derive(Debug, Clone, Copy)]
pub(super) struct Addresses {
    pub hidden: u64,
    pub normal: u64,
    pub qkv: u64,
    pub attended: u64,
    pub gate_up: u64,
    pub active: u64,
    pub parts: u64,
    pub logits: u64,
}

impl Activations {
    /// For batches up to `limits`.
    pub fn allocate(context: &Context, config: &Config, limits: BatchLimits) -> Result<Self> {
        let (rows, answers) = (limits.tokens, limits.answers);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let make = |elements: usize, bytes: usize| allocate(context, "activations", elements * bytes);
        let multiprocessors = context.device().multiprocessors as usize;
        let parts = (1..=limits.sequences)
            .map(|rows| rows * splits(multiprocessors, config.kv_heads, rows, usize::MAX));
        let part = config.heads * (config.head_dim + 2);
        Ok(Self {
            hidden: make(rows * config.hidden_size, 4)?,
            normal: make(rows * config.hidden_size, 2)?,
            qkv: make(rows * (q + 2 * kv), 2)?,
            attended: make(rows * q, 2)?,
            gate_up: make(rows * 2 * config.intermediate_size, 2)?,
            active: make(rows * config.intermediate_size, 2)?,
            parts: make(parts.max().unwrap_or(1) * part, 4)?,
            logits: make(answers * config.vocab_size, 4)?,
            multiprocessors,
            kv_heads: config.kv_heads,
        })
    }

    /// Where they are.
    pub fn addresses(&self) -> Addresses {
        Addresses {
            hidden: self.hidden.address().0,
            normal: self.normal.address().0,
            qkv: self.qkv.address().0,
            attended: self.attended.address().0,
            gate_up: self.gate_up.address().0,
            active: self.active.address().0,
            parts: self.parts.address().0,
            logits: self.logits.address().0,
        }
    }

    /// The largest buffer.
    pub fn gate_up(&self) -> &DeviceMemory {
        &self.gate_up
    }

    /// Into how many parts the keys of so many sequences are divided, the longest of `keys` keys.
    pub fn splits(&self, rows: usize, keys: usize) -> usize {
        splits(self.multiprocessors, self.kv_heads, rows, keys)
    }
}

/// A power of two, so that there are few graphs.
fn splits(multiprocessors: usize, kv_heads: usize, rows: usize, keys: usize) -> usize {
    let wanted = (BLOCKS_EACH * multiprocessors).div_ceil(kv_heads * rows.max(1));
    let most = wanted.min(keys.div_ceil(SPLIT_KEYS)).clamp(1, SPLITS_MAX);
    1 << most.ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_sequences_are_divided_and_many_short_ones_are_not() {
        assert_eq!(splits(132, 8, 1, 8192), 32);
        assert_eq!(splits(132, 8, 1, 100_000), 32);
        assert_eq!(splits(132, 8, 1, 40), 1);
        assert_eq!(splits(132, 8, 8, 8192), 4);
        assert_eq!(splits(132, 8, 32, 8192), 2);
        assert_eq!(splits(132, 8, 256, 8192), 1);
        assert_eq!(splits(132, 8, 8, 0), 1);
    }
}
