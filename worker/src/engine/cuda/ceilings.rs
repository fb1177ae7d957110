//! What the GPU gives at best, to compare figures of the engine with.

use kvbm_cuda::{DeviceRange, Event};

use super::CudaEngine;
use super::kernels::Store;
use crate::Result;

/// Times that each is measured; the best counts.
const ROUNDS: usize = 5;

/// Rates of a GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ceilings {
    /// Bytes read and written per second by a copy within its memory.
    pub memory_bytes_per_second: f64,
    /// Additions and multiplications per second of a large product by cuBLAS.
    pub product_flops_per_second: f64,
}

impl CudaEngine {
    /// Measures them with the engine's own buffers and weights.
    pub fn ceilings(&mut self) -> Result<Ceilings> {
        let (layer, rows) = (&self.model.layers[0], self.limits.tokens);
        let at = self.activations.addresses();
        let gate_up = self.activations.gate_up();
        let half = gate_up.bytes() / 2;
        let flops = 2.0 * (rows * layer.gate_up.rows * layer.gate_up.columns) as f64;
        let stream = self.kernels.stream().clone();
        let (begin, end) = (Event::timing(&self.context)?, Event::timing(&self.context)?);
        let (mut copy, mut product) = (f64::MAX, f64::MAX);
        for _ in 0..=ROUNDS {
            begin.record(&stream)?;
            // SAFETY: two halves of one buffer, which nothing uses meanwhile.
            unsafe { stream.copy(gate_up.address(), gate_up.address().plus(half), half) }?;
            end.record(&stream)?;
            end.synchronize()?;
            copy = copy.min(f64::from(end.ms_since(&begin)?) / 1e3);
            begin.record(&stream)?;
            // SAFETY: buffers of the largest batch, which nothing else uses meanwhile.
            unsafe { self.kernels.multiply(at.normal, &layer.gate_up, at.gate_up, rows, Store::Bf16) }?;
            end.record(&stream)?;
            end.synchronize()?;
            product = product.min(f64::from(end.ms_since(&begin)?) / 1e3);
        }
        Ok(Ceilings {
            memory_bytes_per_second: 2.0 * half as f64 / copy,
            product_flops_per_second: flops / product,
        })
    }
}
