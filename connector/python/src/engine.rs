//! One process of an engine, as Python sees it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use kvbm_connector::engine as core;
use kvbm_shm::LentMemory;
use parking_lot::Mutex;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::cuda::CudaMover;

/// `(id, tokens, pages by layer group, computed, scheduled or None, priorities or None)`
type ReportTuple<'a> = (u64, Option<Tokens<'a>>, Vec<Vec<i32>>, usize, Option<usize>, Option<Vec<u8>>);

/// Tokens as 32-bit words, little endian: a list of as many numbers takes twice as long to cross over.
type Tokens<'a> = Bound<'a, PyBytes>;

/// `(digest, start, tokens)` of an input that is not tokens.
type ItemTuple = ([u8; 32], u32, u32);

/// `(address, bytes, stride, pages)` of memory of a layer group.
type RegionTuple = (usize, usize, usize, u32);

/// The socket that an address names; without one the environment's, or that of `kvbm up`.
#[pyfunction]
#[pyo3(signature = (address=None))]
pub(crate) fn socket_of(address: Option<&str>) -> PyResult<PathBuf> {
    core::socket_of(address, variable).map_err(|error| PyValueError::new_err(error.to_string()))
}

/// One process of an engine: its worker half, and on rank 0 the scheduler half.
#[pyclass(frozen, module = "kvbm_connector._native")]
pub(crate) struct Engine {
    process: core::EngineProcess,
    /// Whatever owns the registered memory.
    owner: Mutex<Option<Py<PyAny>>>,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (*, socket, client, model, revision, kv_dtype, tokens_per_block, rank, rank_count, shard, shard_count, lora_scope))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        socket: PathBuf,
        client: String,
        model: String,
        revision: String,
        kv_dtype: String,
        tokens_per_block: u32,
        rank: u32,
        rank_count: u32,
        shard: u32,
        shard_count: u32,
        lora_scope: String,
    ) -> PyResult<Self> {
        if tokens_per_block == 0 || rank >= rank_count || shard >= shard_count {
            let what = format!(
                "{tokens_per_block} tokens per block, rank {rank} of {rank_count}, shard {shard} of {shard_count}"
            );
            return Err(PyValueError::new_err(what));
        }
        log_to_stderr();
        let settings = core::EngineSettings {
            client,
            model,
            revision,
            kv_dtype,
            tokens_per_block,
            rank,
            rank_count,
            shard,
            shard_count,
            lora_scope,
            ..core::EngineSettings::new(socket)
        };
        let settings =
            settings.with_environment(variable).map_err(|error| PyValueError::new_err(error.to_string()))?;
        Ok(Self { process: core::EngineProcess::new(settings), owner: Mutex::new(None) })
    }

    /// Takes memory of this process into service. `owner` is kept as long as the memory is used.
    #[allow(clippy::too_many_arguments)]
    fn register_memory(
        &self,
        py: Python<'_>,
        groups: Vec<Vec<RegionTuple>>,
        layout: String,
        device: String,
        replicated: bool,
        windowed: bool,
        size_is_known: bool,
        owner: Py<PyAny>,
    ) -> PyResult<()> {
        let shape = shape_of(groups)?;
        let memories: Result<Vec<LentMemory>, _> = shape
            .regions()
            .map(|(_, region)| {
                // The last page has nothing behind it.
                let bytes = region.stride * (region.pages as usize - 1) + region.bytes;
                // SAFETY: the adapter passes the memory of a tensor and the tensor itself, which `owner` keeps alive;
                // engines do not move their KV memory, and Rust has no reference to it.
                unsafe { LentMemory::new(region.base, bytes) }
            })
            .collect();
        let memories = memories.map_err(|error| PyValueError::new_err(error.to_string()))?;
        let mover = Arc::new(core::MemoryMover::new(shape.clone(), memories));
        self.owner.lock().replace(owner);
        let memory = core::MemoryFacts { layout, device, replicated, windowed, size_is_known };
        self.guard(py, |process| process.register(shape, mover, &memory))
    }

    /// The same for memory of a GPU, by its number in this process.
    #[allow(clippy::too_many_arguments)]
    fn register_cuda_memory(
        &self,
        py: Python<'_>,
        groups: Vec<Vec<RegionTuple>>,
        layout: String,
        device: u32,
        replicated: bool,
        windowed: bool,
        size_is_known: bool,
        owner: Py<PyAny>,
    ) -> PyResult<()> {
        let shape = shape_of(groups)?;
        let of_mover = shape.clone();
        // SAFETY: as for `register_memory`: memory of a tensor on this GPU, which `owner` keeps alive.
        let mover = py.detach(|| unsafe { CudaMover::new(of_mover, device) });
        let mover = mover.map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
        let memory =
            core::MemoryFacts { layout, device: mover.device(), replicated, windowed, size_is_known };
        self.owner.lock().replace(owner);
        self.guard(py, |process| process.register(shape, Arc::new(mover), &memory))
    }

    #[getter]
    fn attached(&self) -> bool {
        self.process.is_attached()
    }

    /// `(tokens found behind the local ones, whether the request is to be parked)`
    #[pyo3(signature = (id, tokens, lora, salt, items, cacheable, local_tokens))]
    #[allow(clippy::too_many_arguments)]
    fn query(
        &self,
        py: Python<'_>,
        id: u64,
        tokens: Tokens<'_>,
        lora: Option<u64>,
        salt: Option<String>,
        items: Vec<ItemTuple>,
        cacheable: bool,
        local_tokens: usize,
    ) -> PyResult<(usize, bool)> {
        let items =
            items.into_iter().map(|(digest, start, tokens)| core::PlacedItem { digest, start, tokens });
        let prompt =
            core::Prompt { id, tokens: words(&tokens)?, lora, salt, items: items.collect(), cacheable };
        self.guard(py, |process| Ok(process.query(prompt, local_tokens)))
    }

    /// The engine says where a request's blocks are.
    fn allocated(&self, py: Python<'_>, id: u64, pages: Vec<Vec<i32>>) -> PyResult<()> {
        self.guard(py, |process| process.allocated(id, &pages))
    }

    /// The metadata of the next pass.
    fn build<'py>(
        &self,
        py: Python<'py>,
        new: Vec<ReportTuple<'py>>,
        cached: Vec<ReportTuple<'py>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let reports =
            |tuples: Vec<ReportTuple<'py>>| tuples.into_iter().map(report_of).collect::<PyResult<_>>();
        let (new, cached) = (reports(new)?, reports(cached)?);
        let metadata = self.guard(py, |process| Ok(process.build(new, cached)))?;
        Ok(PyBytes::new(py, &metadata))
    }

    /// True, at most once per request: its blocks are to be kept until `get_finished` names it.
    fn request_finished(&self, py: Python<'_>, id: u64) -> PyResult<bool> {
        self.guard(py, |process| Ok(process.request_finished(id)))
    }

    /// Takes in the metadata of the next pass.
    fn bind(&self, py: Python<'_>, metadata: &[u8]) -> PyResult<()> {
        self.guard(py, |process| process.bind(metadata))
    }

    /// Starts loads; those that the pass needs are done when it returns.
    fn start_loads(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        self.guard(py, |process| process.start_loads(stream))
    }

    /// The pass has been launched.
    fn pass_done(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        self.guard(py, |process| process.pass_done(stream))
    }

    /// `(requests whose saves ended, requests whose loads ended)`
    fn get_finished(&self, saving: Vec<u64>, loading: Vec<u64>) -> PyResult<(Vec<u64>, Vec<u64>)> {
        unwound(|| self.process.get_finished(&saving, &loading))
    }

    /// Totals since the start; `disabled` says why nothing is cached.
    fn figures<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (figures, disabled) = self.process.figures();
        let named = PyDict::new(py);
        for (name, figure) in figures {
            named.set_item(name, figure)?;
        }
        named.set_item("disabled", disabled)?;
        Ok(named)
    }

    /// Ends threads and session.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.process.close());
        self.owner.lock().take();
    }
}

impl Engine {
    /// Runs without the interpreter's lock. Errors and panics become exceptions.
    fn guard<T: Send>(
        &self,
        py: Python<'_>,
        run: impl FnOnce(&core::EngineProcess) -> Result<T, String> + Send,
    ) -> PyResult<T> {
        py.detach(|| unwound(|| run(&self.process)))
    }
}

fn unwound<T>(run: impl FnOnce() -> Result<T, String>) -> PyResult<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(done) => done.map_err(PyRuntimeError::new_err),
        Err(_) => Err(PyRuntimeError::new_err("a bug in kvbm-connector; standard error says where")),
    }
}

fn shape_of(groups: Vec<Vec<RegionTuple>>) -> PyResult<core::PoolShape> {
    let group = |regions: Vec<RegionTuple>| core::LayerGroup {
        regions: regions
            .into_iter()
            .map(|(base, bytes, stride, pages)| core::Region { base, bytes, stride, pages })
            .collect(),
    };
    core::PoolShape::new(groups.into_iter().map(group).collect())
        .map_err(|error| PyValueError::new_err(error.to_string()))
}

fn report_of(
    (id, tokens, pages, computed, scheduled, priorities): ReportTuple<'_>,
) -> PyResult<core::Report> {
    let (opaque, tokens) = (tokens.is_none(), tokens.as_ref().map(words).transpose()?.unwrap_or_default());
    Ok(core::Report { id, tokens, opaque, pages, computed, scheduled, priorities })
}

fn words(tokens: &Tokens<'_>) -> PyResult<Vec<u32>> {
    let (words, rest) = tokens.as_bytes().as_chunks::<4>();
    if !rest.is_empty() {
        return Err(PyValueError::new_err("tokens are words of 4 bytes"));
    }
    Ok(words.iter().map(|word| u32::from_le_bytes(*word)).collect())
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// What a person should see goes where the engine's own messages go. `TLLM_KVBM_LOG` says what: `warn` unless it is set.
fn log_to_stderr() {
    let filter = variable("TLLM_KVBM_LOG").unwrap_or_else(|| "warn".into());
    let filter = tracing_subscriber::EnvFilter::try_new(filter).unwrap_or_else(|_| "warn".into());
    let subscriber =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr);
    // The second engine of a process finds it set.
    let _ = subscriber.try_init();
}
