//! One process of an engine, as Python sees it.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kvbm_connector::engine as core;
use kvbm_shm::{LentMemory, SharedMemory};
use parking_lot::Mutex;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::cuda::CudaMover;
use crate::numbers::{Pages, SpentList, Tokens};
use crate::options::Options;
use crate::requests::{ItemTuple, ReportTuple, prompt_of, report_of, words};

/// `(address, bytes, stride, pages)` of memory of a layer group.
type RegionTuple = (usize, usize, usize, u32);

/// Hashing fewer tokens takes less than waking a thread.
const BYTES_TO_ANNOUNCE: usize = 2048 * size_of::<u32>();

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
    /// Of the last query.
    spent: Mutex<Option<SpentList>>,
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
        log_to_stderr(variable("TLLM_KVBM_LOG"));
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
        Ok(Self {
            process: core::EngineProcess::new(settings),
            owner: Mutex::default(),
            spent: Mutex::default(),
        })
    }

    /// A process of an engine whose scheduler half is a process of its own. `engine` is the name that all share;
    /// `options` are settings by name, `prefix` begins the variables of the environment that say the same.
    #[staticmethod]
    #[pyo3(signature = (*, client, engine, model, revision, kv_dtype, tokens_per_block, rank, rank_count, options, prefix))]
    #[allow(clippy::too_many_arguments)]
    fn apart(
        client: String,
        engine: &str,
        model: String,
        revision: String,
        kv_dtype: String,
        tokens_per_block: u32,
        rank: u32,
        rank_count: u32,
        options: HashMap<String, String>,
        prefix: String,
    ) -> PyResult<Self> {
        if tokens_per_block == 0 || rank >= rank_count {
            let what = format!("{tokens_per_block} tokens per block, rank {rank} of {rank_count}");
            return Err(PyValueError::new_err(what));
        }
        let options = Options::new(options, prefix);
        log_to_stderr(options.variable("TLLM_KVBM_LOG"));
        let name = blake3::hash(engine.as_bytes());
        let settings = core::EngineSettings {
            client,
            model,
            revision,
            kv_dtype,
            tokens_per_block,
            rank,
            rank_count,
            shard: rank,
            shard_count: rank_count,
            apart: name.as_bytes().first_chunk().copied(),
            load_mode: core::LoadMode::Auto,
            // What has been measured with such an engine; the daemon copies out where that is asked for.
            pool: core::PoolChoice::Staged,
            ..core::EngineSettings::new(options.socket()?)
        };
        let settings =
            settings.with_environment(|name| options.variable(name)).map_err(|error| options.wrong(error))?;
        Ok(Self {
            process: core::EngineProcess::new(settings),
            owner: Mutex::default(),
            spent: Mutex::default(),
        })
    }

    /// Makes this the process of the scheduler half.
    fn join(&self, py: Python<'_>, layout: String, replicated: bool, block_bytes: usize) -> PyResult<()> {
        let facts = core::SharedFacts { layout, replicated, block_bytes };
        self.guard(py, |process| process.join(&facts))
    }

    /// `(tokens found behind the local ones, or None: ask again; whether the request is to be parked)`. `tokens` are
    /// packed, for they are asked about again and again. `others`: how many requests the engine has besides this one.
    #[allow(clippy::too_many_arguments)]
    fn look_up(
        &self,
        py: Python<'_>,
        id: u64,
        tokens: Option<&[u8]>,
        lora_name: Option<String>,
        salt: Option<String>,
        items: Vec<ItemTuple>,
        local_tokens: usize,
        others: usize,
    ) -> PyResult<(Option<usize>, bool)> {
        // Such an engine asks again in each step as long as a request waits.
        if tokens.is_some_and(|tokens| tokens.len() >= BYTES_TO_ANNOUNCE) {
            self.process.expect_query();
        }
        let tokens = tokens.map(words).transpose()?;
        let prompt = core::Prompt { lora_name, ..prompt_of(id, tokens, salt, items) };
        self.guard(py, |process| {
            Ok(match process.look_up(prompt, local_tokens, others) {
                core::Found::Tokens(tokens, parked) => (Some(tokens), parked),
                core::Found::Later => (None, false),
            })
        })
    }

    /// The engine does not take up what it was offered.
    fn declined(&self, py: Python<'_>, id: u64) -> PyResult<()> {
        self.guard(py, |process| {
            process.declined(id);
            Ok(())
        })
    }

    /// What other processes of the engine tell the scheduler half: pages that were not loaded, requests not saved, and
    /// nanoseconds that a block took to load, 0 for nothing.
    fn told(&self, py: Python<'_>, failed: Vec<i32>, orphaned: Vec<u64>, block_ns: u64) -> PyResult<()> {
        self.guard(py, |process| {
            process.loads_failed(&failed);
            process.save_again(&orphaned);
            if block_ns > 0 {
                process.block_takes(Duration::from_nanos(block_ns));
            }
            Ok(())
        })
    }

    /// Pages of this rank that were not loaded though it was promised, each once.
    fn take_failed(&self, py: Python<'_>) -> PyResult<Vec<i32>> {
        self.guard(py, |process| Ok(process.take_failed()))
    }

    /// Returns when a parked load has ended, none is under way, or a few milliseconds have passed.
    fn wait_for_load(&self, py: Python<'_>) -> PyResult<()> {
        self.guard(py, |process| {
            process.wait_for_load();
            Ok(())
        })
    }

    /// Nanoseconds that a block takes to load, if any was loaded since the last time; else 0.
    fn take_block_ns(&self, py: Python<'_>) -> PyResult<u64> {
        self.guard(py, |process| {
            let block = process.take_block_time().map_or(0, |block| block.as_nanos());
            Ok(u64::try_from(block).unwrap_or(u64::MAX))
        })
    }

    /// Requests whose blocks this rank could not save, each once.
    fn take_orphaned(&self, py: Python<'_>) -> PyResult<Vec<u64>> {
        self.guard(py, |process| Ok(process.take_orphaned()))
    }

    /// Takes memory of this process into service. `owner` is kept as long as the memory is used. `memfds`: a descriptor
    /// and the byte at which each region begins in it, if the daemon may copy out of them. `layers`: so many lie one
    /// behind the other in a block; 1 if that is not known.
    #[pyo3(signature = (groups, layout, device, replicated, windowed, size_is_known, owner, memfds, layers=1))]
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
        memfds: Option<Vec<(RawFd, u64)>>,
        layers: usize,
    ) -> PyResult<()> {
        let shape = shape_of(groups)?.of_layers(layers);
        let exported = exported(&shape, memfds);
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
        self.guard(py, |process| process.register(shape, mover, exported, &memory))
    }

    /// The same for memory of a GPU, by its number in this process.
    #[pyo3(signature = (groups, layout, device, replicated, windowed, size_is_known, owner, layers=1))]
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
        layers: usize,
    ) -> PyResult<()> {
        let shape = shape_of(groups)?.of_layers(layers);
        let of_mover = shape.clone();
        // SAFETY: as for `register_memory`: memory of a tensor on this GPU, which `owner` keeps alive.
        let mover = py.detach(|| unsafe { CudaMover::new(of_mover, device) });
        let mover = mover.map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
        let apart = self.process.settings().apart.is_some();
        let mover = if apart { mover.never_called_back() } else { mover };
        let memory =
            core::MemoryFacts { layout, device: mover.device(), replicated, windowed, size_is_known };
        self.owner.lock().replace(owner);
        let exported = mover.exported();
        self.guard(py, |process| process.register(shape, Arc::new(mover), exported, &memory))
    }

    #[getter]
    fn attached(&self) -> bool {
        self.process.is_attached()
    }

    /// `(tokens found behind the local ones, whether the request is to be parked)`. `get_tokens` gives the request's
    /// tokens when it is called with 0; `None`: something about the request is not in its key.
    #[pyo3(signature = (id, get_tokens, lora, salt, items, local_tokens))]
    #[allow(clippy::too_many_arguments)]
    fn query(
        &self,
        py: Python<'_>,
        id: u64,
        get_tokens: Option<Bound<'_, PyAny>>,
        lora: Option<u64>,
        salt: Option<String>,
        items: Vec<ItemTuple>,
        local_tokens: usize,
    ) -> PyResult<(usize, bool)> {
        if get_tokens.is_some() {
            self.process.expect_query();
        }
        let list = get_tokens.map(|get| get.call1((0,))).transpose()?;
        let tokens = list.as_ref().map(|list| list.extract::<Tokens>()).transpose()?;
        let prompt = prompt_of(id, tokens.and_then(|tokens| tokens.0), salt, items);
        // The engine's thread gives them back while it waits for the daemon, and what is left when it calls next.
        let mut spent = list.and_then(SpentList::new);
        let mut meanwhile = || Python::attach(|py| spent.as_mut().is_some_and(|list| list.shorten(py)));
        let found = self.guard(py, |process| {
            Ok(process.query(core::Prompt { lora, ..prompt }, local_tokens, &mut meanwhile))
        });
        *self.spent.lock() = spent;
        found
    }

    /// The engine says where a request's blocks are.
    fn allocated(&self, py: Python<'_>, id: u64, pages: Vec<Pages>) -> PyResult<()> {
        drop(self.spent.lock().take());
        let pages: Vec<Vec<i32>> = pages.into_iter().map(|group| group.0).collect();
        self.guard(py, |process| process.allocated(id, &pages))
    }

    /// The metadata of the next pass.
    fn build<'py>(
        &self,
        py: Python<'py>,
        new: Vec<ReportTuple<'py>>,
        cached: Vec<ReportTuple<'py>>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let ids: Vec<u64> = new.iter().map(|report| report.0).collect();
        // Most passes have no new request; each guard lets go of the interpreter's lock, which others may take.
        let prompts =
            if ids.is_empty() { vec![] } else { self.guard(py, |process| Ok(process.prompts(&ids)))? };
        let new = new.into_iter().zip(&prompts).map(|(report, prompt)| report_of(report, prompt)).collect();
        let cached = cached.into_iter().map(|report| report_of(report, &[])).collect();
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

    /// Starts loads. Those that the pass needs are done when it returns, or are waited for on its stream: now, or, if it
    /// returns true, by asking for each layer. `computes`: anything is computed in the pass. `kind`: the engine may ask
    /// for layers in it, as it does in others of this kind.
    #[pyo3(signature = (stream, computes=true, kind=None))]
    fn start_loads(
        &self,
        py: Python<'_>,
        stream: u64,
        computes: bool,
        kind: Option<String>,
    ) -> PyResult<bool> {
        let pass = match kind {
            _ if !computes => core::Pass::Idle,
            Some(kind) => core::Pass::Layered(kind),
            None => core::Pass::Whole,
        };
        self.guard(py, |process| process.start_loads(stream, pass))
    }

    /// The pass gets to a layer, by its place in a block; any other number stands for all layers.
    fn layer(&self, py: Python<'_>, layer: usize, stream: u64) -> PyResult<()> {
        self.guard(py, |process| process.layer(layer, stream))
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
        let (figures, disabled) = self.guard(py, |process| Ok(process.figures()))?;
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
    ///
    /// Whatever waits for the scheduler half has to: a query has the scheduler half when it takes the interpreter's lock.
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

/// Each memfd once, sealed.
fn exported(shape: &core::PoolShape, memfds: Option<Vec<(RawFd, u64)>>) -> Result<core::Exported, String> {
    let memfds = memfds.ok_or("it is memory of the engine's process alone")?;
    if memfds.len() != shape.regions().count() {
        return Err(format!("{} descriptors for {} regions", memfds.len(), shape.regions().count()));
    }
    let (mut exports, mut regions, mut known) = (Vec::new(), Vec::new(), Vec::new());
    for (fd, offset) in memfds {
        let export = match known.iter().position(|known| *known == fd) {
            Some(export) => export,
            None => {
                // SAFETY: the adapter passes the descriptor of a tensor that it holds during this call.
                let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
                let bytes = SharedMemory::seal(borrowed).map_err(|error| error.to_string())?;
                let memory = borrowed.try_clone_to_owned().map_err(|error| error.to_string())?;
                exports.push(core::Export { memory: core::ExportedMemory::Shared(memory), bytes });
                known.push(fd);
                known.len() - 1
            }
        };
        let export = u32::try_from(export).map_err(|error| error.to_string())?;
        regions.push(core::ExportedRegion { export, offset });
    }
    Ok(core::Exported { exports, regions })
}

pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// What a person should see goes where the engine's own messages go: warnings, unless something else is said.
pub(crate) fn log_to_stderr(filter: Option<String>) {
    let filter = filter.unwrap_or_else(|| "warn".into());
    let filter = tracing_subscriber::EnvFilter::try_new(filter).unwrap_or_else(|_| "warn".into());
    let subscriber =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(false).with_writer(std::io::stderr);
    // The second engine of a process finds it set.
    let _ = subscriber.try_init();
}
