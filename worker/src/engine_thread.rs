//! The thread that owns model, pool and scheduler, from loading to the end.
//!
//! Only this thread waits for the daemon, once, at its start.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvbm_connector::{DeviceCache, StartError, Startup, Tenants, WorkerRegistration};
use kvbm_cuda::DeviceName;
use kvbm_cuda::copy_engine::StepWords;
use kvbm_hash::BaseNamespace;
use kvbm_shm::{POOL_STEPS_OFFSET, PoolLayout};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::base;
use crate::pool_cache::{Listing, PoolCache};
use crate::scheduler::SCORED_TOKENS_MAX;
use crate::settings::Settings;
use crate::witness::{ReadBlock, Witness, Witnessed};
use crate::{
    BatchLimits, Bell, Cache, Counters, CudaEngine, CudaLlama, DevicePool, Echo, Engine, EngineKind,
    EngineOptions, Error, Inbox, KvLayout, KvMemory, Limits, Llama, Loop, Model, Progress, Scheduler,
    SchedulerOptions, Turn, WorkerError, turn_until_stopped,
};

/// Turns in which a request that alone cannot get a block waits before it is given up: about a minute, in which blocks
/// come out of quarantine.
const STARVED_TURNS_MAX: usize = 30_000;
/// What a daemon may take to make a pool on a GPU that it uses for the first time.
const GPU_POOL_DEADLINE: Duration = Duration::from_secs(20);
/// KV of an engine that computes none: a pool to be listed with.
const ECHO_POOL: PoolLayout = PoolLayout { block_bytes: 4096, block_count: 1 };

/// What the thread is to run.
pub(crate) struct EnginePlan {
    pub settings: Settings,
    pub limits: Limits,
    pub eos_token_ids: Vec<u32>,
    pub kv: KvLayout,
    pub pool: PoolLayout,
    /// How it is listed with the daemon.
    pub worker: WorkerRegistration,
    pub listing: Listing,
    /// Whose the namespaces are.
    pub tenants: Tenants,
    pub inbox: Inbox,
}

/// What is known once the model is loaded and the pool is there.
#[derive(Clone)]
pub(crate) struct Loaded {
    pub base: BaseNamespace,
    pub counters: Arc<Mutex<Counters>>,
    pub cache: Arc<kvbm_connector::Counters>,
}

/// The running thread. Dropping it asks it to stop.
pub(crate) struct EngineThread {
    stop: Arc<AtomicBool>,
    bell: Bell,
    ended: CancellationToken,
}

impl EngineThread {
    /// Starts it; the receiver tells when it is loaded, or why not.
    pub fn start(
        plan: EnginePlan,
    ) -> Result<(Self, oneshot::Receiver<Result<Loaded, WorkerError>>), WorkerError> {
        let stop = Arc::new(AtomicBool::new(false));
        let bell = plan.inbox.bell().clone();
        let (loaded, receiver) = oneshot::channel();
        let ended = CancellationToken::new();
        // Dropped when the thread ends, however it does.
        let end = ended.clone().drop_guard();
        let stopped = stop.clone();
        let work = move || {
            let _end = end;
            plan.run(&stopped, loaded);
        };
        std::thread::Builder::new().name("engine".into()).spawn(work).map_err(WorkerError::Thread)?;
        Ok((Self { stop, bell, ended }, receiver))
    }

    /// Rung when there is something to do.
    pub fn bell(&self) -> &Bell {
        &self.bell
    }

    /// Waits until the thread has ended.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Ends it after the current step.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.bell.ring();
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        self.stop();
    }
}

impl EnginePlan {
    fn run(self, stop: &AtomicBool, loaded: oneshot::Sender<Result<Loaded, WorkerError>>) {
        let ready = match (self.settings.engine, self.settings.device.clone()) {
            (EngineKind::Llama, None) => {
                self.llama().map(|(turns, facts)| (Turns::Llama(Box::new(turns)), facts))
            }
            (EngineKind::Llama, Some(device)) => {
                self.cuda(&device).map(|(turns, facts)| (Turns::Cuda(Box::new(turns)), facts))
            }
            (EngineKind::Echo, _) => self.echo().map(|(turns, facts)| (Turns::Echo(Box::new(turns)), facts)),
        };
        match ready {
            Ok((mut turns, facts)) => {
                // If nobody waits any more, the stop flag is set.
                let _ = loaded.send(Ok(facts));
                turn_until_stopped(&mut turns, stop);
            }
            Err(error) => drop(loaded.send(Err(error))),
        }
    }

    fn llama(self) -> Result<(Loop<Witnessed<PoolCache>, Llama>, Loaded), WorkerError> {
        let begin = Instant::now();
        let engine =
            Engine::load(&self.settings.model, &self.options()).map_err(|source| self.not_loaded(source))?;
        let seconds = begin.elapsed().as_secs_f64();
        tracing::info!(threads = engine.threads(), isa = ?engine.isa(), seconds, "model loaded");
        let base = self.base(engine.revision(), KvLayout::NAME);
        let cache = self.open_pool(self.pool, base)?;
        let [kv, again] = [(); 2].map(|()| KvMemory::of_pool(cache.memory(), self.kv));
        let witness = self.witness(Box::new(move |block| Ok(again.read_block(block))))?;
        Ok(self.join(base, cache, Llama { engine, kv }, witness))
    }

    /// The engine on a GPU, with blocks in memory of that GPU which the daemon made, or it itself for want of a daemon.
    fn cuda(
        self,
        device: &DeviceName,
    ) -> Result<(Loop<Witnessed<PoolCache>, CudaLlama>, Loaded), WorkerError> {
        let begin = Instant::now();
        let settings = &self.settings;
        let limits = BatchLimits {
            tokens: settings.max_batch_tokens,
            sequences: settings.max_batch,
            answers: settings.max_batch + SCORED_TOKENS_MAX,
            tokens_per_block: settings.tokens_per_block,
        };
        let engine = CudaEngine::load(device, &settings.model, &self.options(), limits);
        let mut engine = engine.map_err(|source| self.not_loaded(source))?;
        tracing::info!(seconds = begin.elapsed().as_secs_f64(), "model loaded");
        let base = self.base(engine.revision(), KvLayout::CUDA_NAME);
        let (cache, pool) = self.open_gpu_pool(&engine, base)?;
        engine.publish_steps(StepWords::new(cache.memory().memory().clone(), POOL_STEPS_OFFSET));
        let blocks = pool.clone();
        let witness = self.witness(Box::new(move |block| blocks.read_block(block)))?;
        Ok(self.join(base, cache, CudaLlama { engine, pool }, witness))
    }

    fn open_gpu_pool(
        &self,
        engine: &CudaEngine,
        base: BaseNamespace,
    ) -> Result<(DeviceCache, DevicePool), WorkerError> {
        let count = self.pool.block_count as usize;
        let mut own = None;
        let make = |uuid, _| {
            let say = |error: Error| StartError::Device(error.to_string());
            let pool = DevicePool::private(engine, count).map_err(say)?;
            let memory = pool.export(uuid).map_err(say)?;
            own = Some(pool);
            Ok(memory)
        };
        let cache = match self.settings.daemon.clone() {
            None => DeviceCache::private_in(self.pool, Box::new(make))?,
            Some(mut config) => {
                config.device.clone_from(&engine.context().device().uuid);
                config.attach_deadline = config.attach_deadline.max(GPU_POOL_DEADLINE);
                DeviceCache::attach_or(self.startup(config, self.pool, base), Box::new(make))?
            }
        };
        let memory = cache.memory();
        let pool = match (own, memory.device()) {
            (Some(own), _) => own,
            (None, Some((descriptor, bytes))) => DevicePool::import(engine, descriptor, bytes, count)
                .map_err(|source| WorkerError::Pool(StartError::Device(source.to_string())))?,
            (None, None) => unreachable!("the link accepts no pool elsewhere"),
        };
        Ok((cache, pool))
    }

    fn options(&self) -> EngineOptions {
        EngineOptions {
            threads: self.settings.threads,
            isa: self.settings.isa,
            context_length: self.settings.context_length,
            revision: self.settings.revision.clone(),
            random_weights: self.settings.random_weights,
        }
    }

    /// Who looks at the blocks, in a drill.
    fn witness(&self, read: ReadBlock) -> Result<Option<Witness>, WorkerError> {
        let path = self.settings.kv_witness.as_deref();
        let opened = path.map(|path| Witness::open(path, read)).transpose();
        let invalid = |error: std::io::Error| {
            let path = self.settings.kv_witness.as_deref().unwrap_or_else(|| "".as_ref());
            WorkerError::invalid(
                "KVBM_TEST_KV_WITNESS",
                path.display(),
                format!("a file that can be written ({error})"),
            )
        };
        opened.map_err(invalid)
    }

    fn not_loaded(&self, source: Error) -> WorkerError {
        WorkerError::Model { folder: self.settings.model.clone(), source }
    }

    fn join<M: Model>(
        self,
        base: BaseNamespace,
        cache: DeviceCache,
        model: M,
        witness: Option<Witness>,
    ) -> (Loop<Witnessed<PoolCache>, M>, Loaded) {
        let Self { settings, limits, eos_token_ids, listing, inbox, .. } = self;
        let scheduler = Scheduler::new(SchedulerOptions {
            max_batch_tokens: settings.max_batch_tokens,
            max_batch: settings.max_batch,
            max_waiting: settings.max_waiting,
            max_starved_turns: STARVED_TURNS_MAX,
            processors: settings.processors,
            ..SchedulerOptions::new(limits, eos_token_ids)
        });
        let cache_counters = cache.counters();
        let turns =
            Loop::new(scheduler, Witnessed::new(PoolCache::new(cache, listing), witness), model, inbox);
        let facts = Loaded { base, counters: turns.counters(), cache: cache_counters };
        (turns, facts)
    }

    fn echo(self) -> Result<(ListedEcho, Loaded), WorkerError> {
        let base = self.base("echo", "none");
        let cache = self.open_pool(ECHO_POOL, base)?;
        let facts = Loaded { base, counters: Arc::default(), cache: cache.counters() };
        let echo = Echo::new(self.limits, self.inbox).paced(self.settings.echo_step);
        Ok((ListedEcho { echo, cache: PoolCache::new(cache, self.listing) }, facts))
    }

    fn base(&self, revision: &str, layout: &str) -> BaseNamespace {
        let tokens_per_block = self.kv.tokens_per_block as u32;
        base::of_layout(&self.settings.served_name, revision, layout, tokens_per_block)
    }

    fn open_pool(&self, layout: PoolLayout, base: BaseNamespace) -> Result<DeviceCache, WorkerError> {
        let Some(config) = self.settings.daemon.clone() else { return Ok(DeviceCache::private(layout)?) };
        Ok(DeviceCache::attach(self.startup(config, layout, base))?)
    }

    fn startup(&self, config: kvbm_connector::Config, layout: PoolLayout, base: BaseNamespace) -> Startup {
        let bell = self.inbox.bell().clone();
        Startup {
            config,
            layout,
            base,
            worker: Some(self.worker.clone()),
            tenants: self.tenants.clone(),
            waker: Arc::new(move || bell.ring()),
            runtime: None,
        }
    }
}

/// What is turned.
enum Turns {
    Llama(Box<Loop<Witnessed<PoolCache>, Llama>>),
    Cuda(Box<Loop<Witnessed<PoolCache>, CudaLlama>>),
    Echo(Box<ListedEcho>),
}

impl Turn for Turns {
    fn turn(&mut self) -> Progress {
        match self {
            Self::Llama(turns) => turns.turn(),
            Self::Cuda(turns) => turns.turn(),
            Self::Echo(turns) => turns.turn(),
        }
    }

    fn bell(&self) -> &Bell {
        match self {
            Self::Llama(turns) => turns.bell(),
            Self::Cuda(turns) => turns.bell(),
            Self::Echo(turns) => turns.bell(),
        }
    }
}

/// The echo engine, listed with the daemon through a pool that it does not use.
struct ListedEcho {
    echo: Echo,
    cache: PoolCache,
}

impl Turn for ListedEcho {
    fn turn(&mut self) -> Progress {
        // Nothing was asked, so nothing comes but changes of state, which are logged.
        self.cache.poll();
        self.echo.turn()
    }

    fn bell(&self) -> &Bell {
        self.echo.bell()
    }
}
