//! Products of rows of activations with weights, by cuBLAS: at the rate of the tensor cores for many rows, near that of the
//! memory for one (measured: kernels of our own that only stream the weights are no faster).

use kvbm_cuda::{DeviceAddress, Gemm, Matrix};

use super::kernels::{CudaResult, Kernels, Store};
use super::weights::WeightMatrix;

impl Kernels {
    /// y = x · wᵀ for `rows` rows of x: bf16, or f32 as `store` says.
    ///
    /// # Safety
    /// x has so many rows of w's columns, y of w's rows; both are mapped until the product is computed.
    pub unsafe fn multiply(
        &mut self,
        x: u64,
        w: &WeightMatrix,
        y: u64,
        rows: usize,
        store: Store,
    ) -> CudaResult {
        let gemm = Gemm {
            m: w.rows,
            n: rows,
            k: w.columns,
            a: Matrix::transposed(DeviceAddress(w.address()), w.columns),
            b: Matrix::plain(DeviceAddress(x), w.columns),
            c: Matrix::plain(DeviceAddress(y), w.rows),
            alpha: 1.0,
            beta: if store == Store::Add { 1.0 } else { 0.0 },
            c_is_f32: store != Store::Bf16,
        };
        // SAFETY: the caller's promise, and the weights live as long as the engine.
        unsafe { self.blas.gemm(&gemm) }
    }
}
