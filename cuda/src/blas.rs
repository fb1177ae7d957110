//! Matrix products by cuBLAS.

use std::fmt;
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;

use cudarc::cublas::sys as blas;

use crate::{Context, DeviceAddress, DeviceMemory, DeviceRange, Driver, Error, Stream, library};

/// Memory that cuBLAS works in: what NVIDIA recommends for Hopper. Given once, because allocating in between would stop
/// the GPU and cannot be recorded in a graph.
const WORKSPACE_BYTES: usize = 32 << 20;

/// cuBLAS on one stream.
pub struct Blas {
    handle: blas::cublasHandle_t,
    /// What all products are issued on.
    stream: Arc<Stream>,
    _workspace: DeviceMemory,
    library: PathBuf,
}

// SAFETY: one thread at a time uses a handle: it is behind `&mut self` in `Blas`'s methods, or alone.
unsafe impl Send for Blas {}

/// C = A · B in cuBLAS's terms: column after column. Matrices of bfloat16, sums in f32.
///
/// A matrix of `r` rows that lies row after row is one of `r` columns here. So y[t, out] = x[t, in] · w[out, in]ᵀ is:
/// `m = out, n = t, k = in`, A = w transposed, B = x, C = y, each with its row's length as distance.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// First matrix.
    pub a: Matrix,
    /// Second matrix.
    pub b: Matrix,
    /// Result; it is never transposed.
    pub c: Matrix,
    /// What the product is multiplied with.
    pub alpha: f32,
    /// What C is multiplied with before the product is added.
    pub beta: f32,
    /// The result is f32 instead of bfloat16.
    pub c_is_f32: bool,
}

/// Where a matrix is and how it lies there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Matrix {
    at: DeviceAddress,
    step: usize,
    operation: blas::cublasOperation_t,
}

impl Matrix {
    /// As it lies there, `step` elements from one column to the next.
    pub fn plain(at: DeviceAddress, step: usize) -> Self {
        Self { at, step, operation: blas::cublasOperation_t::CUBLAS_OP_N }
    }

    /// The transpose of what lies there, `step` elements from one column of that to the next.
    pub fn transposed(at: DeviceAddress, step: usize) -> Self {
        Self { at, step, operation: blas::cublasOperation_t::CUBLAS_OP_T }
    }
}

/// How far matrices of a batch are from each other, in elements.
#[derive(Debug, Clone, Copy)]
pub struct Strides {
    /// First matrices.
    pub a: usize,
    /// Second matrices.
    pub b: usize,
    /// Results.
    pub c: usize,
    /// How many.
    pub count: usize,
}

impl Blas {
    /// Finds cuBLAS, also where only Python looks for it.
    pub fn new(_driver: &Driver, stream: Arc<Stream>) -> Result<Self, Error> {
        // cuBLAS asks for this one by name.
        let _ = library::open_first(&["libcublasLt.so.13", "libcublasLt.so.12"]);
        let library = library::open_first(&["libcublas.so.13", "libcublas.so.12"]).map_err(|error| match error {
            Error::Missing { reason, .. } => Error::missing(
                "cuBLAS (libcublas.so.13 or .12)",
                reason,
                "install the CUDA toolkit or pip install nvidia-cublas, or set CUDA_HOME or VIRTUAL_ENV to where it is",
            ),
            other => other,
        })?;
        // SAFETY: asks the dynamic linker only.
        if !unsafe { blas::is_culib_present() } {
            let reason = format!("{} was opened, but is not found by its name", library.display());
            return Err(Error::missing("libcublas", reason, "name its folder in LD_LIBRARY_PATH"));
        }
        stream.context().bind()?;
        let workspace = DeviceMemory::allocate(stream.context(), WORKSPACE_BYTES)?;
        let mut handle = ptr::null_mut();
        // SAFETY: writes one handle, which `self` destroys.
        check("cublasCreate", unsafe { blas::cublasCreate_v2(&mut handle) })?;
        let made = Self { handle, stream, _workspace: workspace, library };
        // SAFETY: stream and workspace live as long as the handle.
        unsafe {
            check("cublasSetStream", blas::cublasSetStream_v2(handle, made.stream.raw().cast()))?;
            let at = ptr::with_exposed_provenance_mut(made._workspace.address().0 as usize);
            check("cublasSetWorkspace", blas::cublasSetWorkspace_v2(handle, at, WORKSPACE_BYTES))?;
        }
        Ok(made)
    }

    /// What was opened.
    pub fn library(&self) -> &std::path::Path {
        &self.library
    }

    /// The stream on which products are issued.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Issues a product.
    ///
    /// # Safety
    /// The three matrices lie within mapped memory of the GPU until it has ended.
    pub unsafe fn gemm(&mut self, gemm: &Gemm) -> Result<(), Error> {
        // SAFETY: the caller's promise.
        unsafe { self.gemm_strided(gemm, Strides { a: 0, b: 0, c: 0, count: 1 }) }
    }

    /// Issues several products of the same shape.
    ///
    /// # Safety
    /// All matrices lie within mapped memory of the GPU until it has ended.
    pub unsafe fn gemm_strided(&mut self, gemm: &Gemm, strides: Strides) -> Result<(), Error> {
        self.context().bind()?;
        let (a, b, c) = (gemm.a, gemm.b, gemm.c);
        let sizes = [gemm.m, gemm.n, gemm.k, a.step, b.step, c.step, strides.count];
        if sizes.iter().any(|size| *size > i32::MAX as usize) {
            return Err(Error::refused("a matrix product", format!("{gemm:?} is too large")));
        }
        if c.operation != blas::cublasOperation_t::CUBLAS_OP_N {
            return Err(Error::refused("a matrix product", "its result cannot be transposed"));
        }
        let int = |size: usize| size as i32;
        let at = |matrix: Matrix| ptr::with_exposed_provenance_mut(matrix.at.0 as usize);
        let half = blas::cudaDataType::CUDA_R_16BF;
        let result = if gemm.c_is_f32 { blas::cudaDataType::CUDA_R_32F } else { half };
        let (alpha, beta) = (ptr::from_ref(&gemm.alpha).cast(), ptr::from_ref(&gemm.beta).cast());
        let compute = blas::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let algorithm = blas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT;
        let (op_a, op_b) = (a.operation, b.operation);
        let (m, n, k) = (int(gemm.m), int(gemm.n), int(gemm.k));
        let (lda, ldb, ldc) = (int(a.step), int(b.step), int(c.step));
        if strides.count == 1 {
            // SAFETY: the caller's promise; the two factors are read before the call returns.
            let status = unsafe {
                blas::cublasGemmEx(
                    self.handle,
                    op_a,
                    op_b,
                    m,
                    n,
                    k,
                    alpha,
                    at(a),
                    half,
                    lda,
                    at(b),
                    half,
                    ldb,
                    beta,
                    at(c),
                    result,
                    ldc,
                    compute,
                    algorithm,
                )
            };
            return check("cublasGemmEx", status);
        }
        let step = |elements: usize| elements as i64;
        // SAFETY: as above.
        let status = unsafe {
            blas::cublasGemmStridedBatchedEx(
                self.handle,
                op_a,
                op_b,
                m,
                n,
                k,
                alpha,
                at(a),
                half,
                lda,
                step(strides.a),
                at(b),
                half,
                ldb,
                step(strides.b),
                beta,
                at(c),
                result,
                ldc,
                step(strides.c),
                int(strides.count),
                compute,
                algorithm,
            )
        };
        check("cublasGemmStridedBatchedEx", status)
    }

    fn context(&self) -> &Context {
        self.stream.context()
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        let _ = self.stream.synchronize();
        // SAFETY: created by `new`, destroyed once; nothing of it runs any more.
        let _ = unsafe { blas::cublasDestroy_v2(self.handle) };
    }
}

impl fmt::Debug for Blas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Blas by {}", self.library.display())
    }
}

fn check(call: &'static str, status: blas::cublasStatus_t) -> Result<(), Error> {
    if status == blas::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    let meaning = match status {
        blas::cublasStatus_t::CUBLAS_STATUS_EXECUTION_FAILED => "the GPU failed, maybe in earlier work",
        blas::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => "not enough memory",
        _ => "see the documentation of cuBLAS",
    };
    Err(Error::Call { call, code: status as u32, name: format!("{status:?}"), meaning: meaning.into() })
}
