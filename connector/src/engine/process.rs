//! One process of an engine: its worker half, the scheduler half if it is rank 0, and the session they share.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kvbm_hash::BaseNamespace;
use parking_lot::Mutex;

use super::export::Exported;
use super::generations::Generations;
use super::keys::PlacedItem;
use super::link::{LinkOwner, Registered, RegisteredPool};
use super::metadata::Metadata;
use super::pool::{Mover, PoolShape};
use super::scheduler::{LoadMode, NewRequest, Report, SchedulerHalf};
use super::settings::EngineSettings;
use super::worker::{BrokenPromise, Pass, WorkerHalf};

mod apart;

pub use apart::{Found, SharedFacts};

/// A request as the engine's scheduler presents it.
#[derive(Debug, Clone, Default)]
pub struct Prompt {
    /// The engine's number of the request.
    pub id: u64,
    /// All its tokens.
    pub tokens: Vec<u32>,
    /// Number of its adapter.
    pub lora: Option<u64>,
    /// Where adapters have names that tell their weights from all others: its name.
    pub lora_name: Option<String>,
    /// Its cache salt.
    pub salt: Option<String>,
    /// Inputs that are not tokens, with their digests.
    pub items: Vec<PlacedItem>,
    /// False: something about it is not in the key; it is neither looked up nor saved.
    pub cacheable: bool,
}

/// See the module. The halves are told by one thread each; any thread may read the figures.
pub struct EngineProcess {
    settings: EngineSettings,
    started: Instant,
    parts: Mutex<Option<Parts>>,
    scheduler: Mutex<Option<SchedulerHalf>>,
    worker: Mutex<Option<WorkerHalf>>,
}

struct Parts {
    link: LinkOwner,
    base: BaseNamespace,
}

/// What is to be known of an engine's KV memory besides where it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryFacts {
    /// Names the order of bytes in a block.
    pub layout: String,
    /// Where it is, for status.
    pub device: String,
    /// All ranks have the same bytes.
    pub replicated: bool,
    /// Pages may leave a window while their request goes on.
    pub windowed: bool,
    /// It says itself how many tokens a block has. Otherwise only the engine's settings do.
    pub size_is_known: bool,
}

/// A figure and its name, in the words of docs/trtllm.md.
pub type Figure = (&'static str, u64);

impl EngineProcess {
    /// Nothing is reached, and nothing cached, before memory is registered.
    pub fn new(settings: EngineSettings) -> Self {
        Self {
            settings,
            started: Instant::now(),
            parts: Mutex::default(),
            scheduler: Mutex::default(),
            worker: Mutex::default(),
        }
    }

    /// What it was told at its start.
    pub fn settings(&self) -> &EngineSettings {
        &self.settings
    }

    /// Takes the engine's KV memory into service. `exported`: for the daemon to copy out of, or why it cannot.
    pub fn register(
        &self,
        shape: PoolShape,
        mover: Arc<dyn Mover>,
        exported: Result<Exported, String>,
        memory: &MemoryFacts,
    ) -> Result<(), String> {
        let mut parts = self.parts.lock();
        if parts.is_some() {
            return Err("register KV memory: it is registered already".into());
        }
        let mut settings = self.settings.clone();
        if memory.replicated {
            (settings.shard, settings.shard_count) = (0, 1);
        }
        let base = settings.base(&memory.layout);
        let device = memory.device.clone();
        let generations = Arc::new(Generations::new(&shape));
        let block_bytes = shape.block_bytes() * settings.shard_count as usize;
        let pool = RegisteredPool {
            exported: settings.pool.exported(&shape, exported)?,
            shape: shape.clone(),
            device,
            mover: mover.clone(),
            generations: generations.clone(),
        };
        let registered = Registered { base, block_bytes, pool: Some(pool) };
        let failed = |error: std::io::Error| format!("start threads: {error}");
        let link = LinkOwner::start(settings, registered).map_err(failed)?;
        let host = Arc::new(link.link().clone());
        // What all ranks have alike is stored once.
        let saves = !memory.replicated || self.settings.rank == 0;
        let broken = if self.settings.apart.is_some() { BrokenPromise::IsTold } else { BrokenPromise::Stops };
        let worker = WorkerHalf::new(shape, mover, host, generations, saves, broken).map_err(failed)?;
        *self.worker.lock() = Some(worker);
        if let Some(engine) = self.settings.apart {
            link.name(engine);
        } else if self.settings.rank == 0 {
            let mut engine = [0; 16];
            rustix::rand::getrandom(&mut engine, rustix::rand::GetRandomFlags::empty())
                .map_err(|error| format!("draw a name for this engine: {error}"))?;
            let directory = Arc::new(link.link().clone());
            let EngineSettings { tokens_per_block, load_mode, .. } = &self.settings;
            let half = SchedulerHalf::new(engine, *tokens_per_block, *load_mode, directory);
            let half = if memory.windowed { half.windowed() } else { half };
            *self.scheduler.lock() = Some(if memory.size_is_known { half.of_known_size() } else { half });
            link.name(engine);
        }
        *parts = Some(Parts { link, base });
        self.tell_base(base);
        Ok(())
    }

    /// Without it frontends choose this engine by its load.
    fn tell_base(&self, base: BaseNamespace) {
        let Some(path) = self.settings.base_file.as_ref().filter(|_| self.settings.rank == 0) else { return };
        if let Err(error) = std::fs::write(path, base.0) {
            tracing::warn!(path = %path.display(), %error, "frontends are not told how this engine makes keys");
        }
    }

    /// True while this process has a session with the daemon.
    pub fn is_attached(&self) -> bool {
        self.parts.lock().as_ref().is_some_and(|parts| parts.link.link().is_attached())
    }

    /// A query follows as soon as its tokens have been read: the daemon can be awake by then.
    pub fn expect_query(&self) {
        if let Some(parts) = &*self.parts.lock() {
            parts.link.link().expect();
        }
    }

    /// Tokens behind the first `local_tokens` that will be there without being computed, and whether the engine is to
    /// park the request until they are. `meanwhile` is run while the daemon is waited for, as long as it returns true.
    pub fn query(
        &self,
        prompt: Prompt,
        local_tokens: usize,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> (usize, bool) {
        let Some(base) = self.parts.lock().as_ref().map(|parts| parts.base) else { return (0, false) };
        let new = self.request_of(base, prompt);
        let now = self.now();
        let mut scheduler = self.scheduler.lock();
        let found = scheduler.as_mut().map_or(0, |half| half.query(new, local_tokens, now, meanwhile));
        (found, found > 0 && self.settings.load_mode == LoadMode::Parked)
    }

    fn request_of(&self, base: BaseNamespace, prompt: Prompt) -> NewRequest {
        let salt = prompt.salt.as_deref();
        let namespace = match &prompt.lora_name {
            Some(name) => self.settings.namespace_of_named(base, Some(name), salt),
            None => self.settings.namespace(base, prompt.lora, salt),
        };
        let Prompt { id, tokens, items, cacheable, .. } = prompt;
        NewRequest { id, tokens, namespace, items, cacheable }
    }

    /// The engine says where the request's blocks are, one list of pages per layer group.
    pub fn allocated(&self, id: u64, pages: &[Vec<i32>]) -> Result<(), String> {
        let now = self.now();
        let kept = self.scheduler.lock().as_mut().is_none_or(|half| half.allocated(id, pages, now));
        if kept {
            Ok(())
        } else {
            Err(format!("the offer to request {id} was not taken up for a minute and is gone"))
        }
    }

    /// The tokens of each request's query, for [`Report::known`]; none of one that was not asked about, or was reported.
    pub fn prompts(&self, ids: &[u64]) -> Vec<Arc<Vec<u32>>> {
        let scheduler = self.scheduler.lock();
        let prompt = |id: &u64| scheduler.as_ref().map(|half| half.prompt(*id)).unwrap_or_default();
        ids.iter().map(prompt).collect()
    }

    /// The metadata of the next pass.
    pub fn build(&self, new: Vec<Report>, cached: Vec<Report>) -> Vec<u8> {
        let now = self.now();
        let orphaned = self.worker.lock().as_mut().map(WorkerHalf::take_orphaned).unwrap_or_default();
        let mut scheduler = self.scheduler.lock();
        let Some(half) = scheduler.as_mut() else { return Vec::new() };
        for id in orphaned {
            half.save_again(id, now);
        }
        half.build(new, cached, now)
    }

    /// The request is over. True, at most once: its blocks are to be kept until `get_finished` names it.
    pub fn request_finished(&self, id: u64) -> bool {
        let saving = self.scheduler.lock().as_mut().is_some_and(|half| half.finished(id));
        // Of other ranks it is not known here: they tell the engine at once if there is nothing to wait for.
        saving
            && (self.settings.rank_count > 1
                || self.worker.lock().as_ref().is_some_and(|worker| worker.is_saving(id)))
    }

    /// Takes in the metadata of the next pass. Nothing at all says nothing.
    pub fn bind(&self, metadata: &[u8]) -> Result<(), String> {
        let Some(metadata) = Metadata::decode(metadata).map_err(|error| error.to_string())? else {
            return Ok(());
        };
        if let Some(parts) = &*self.parts.lock() {
            parts.link.name(metadata.engine());
        }
        self.with_worker(|worker| worker.bind(metadata))
    }

    /// Starts loads. Those that the pass needs are done when it returns, or are waited for on its stream: now, or, if it
    /// returns true, by asking for each [`EngineProcess::layer`].
    pub fn start_loads(&self, stream: u64, pass: Pass) -> Result<bool, String> {
        self.worker.lock().as_mut().map_or(Ok(false), |worker| worker.start_loads(stream, pass))
    }

    /// The pass gets to a layer, by its place in a block; any other number stands for all layers.
    pub fn layer(&self, layer: usize, stream: u64) -> Result<(), String> {
        self.with_worker(|worker| worker.layer(layer, stream))
    }

    /// The pass has been launched on this stream.
    pub fn pass_done(&self, stream: u64) -> Result<(), String> {
        self.with_worker(|worker| worker.pass_done(stream))
    }

    /// Whose saves, and whose loads, have ended: each once, after the engine asked.
    pub fn get_finished(&self, saving: &[u64], loading: &[u64]) -> Result<(Vec<u64>, Vec<u64>), String> {
        let mut worker = self.worker.lock();
        match worker.as_mut() {
            Some(worker) => worker.get_finished(saving, loading),
            None => Ok((saving.to_vec(), loading.to_vec())),
        }
    }

    /// Totals since the start, and why nothing is cached, if that is so.
    pub fn figures(&self) -> (Vec<Figure>, Option<String>) {
        let mut figures = vec![("attached", u64::from(self.is_attached()))];
        let mut disabled = None;
        if let Some(half) = &*self.scheduler.lock() {
            let counts = half.counts();
            disabled = half.disabled().map(str::to_owned);
            figures.extend([
                ("queries", counts.queries),
                ("promised_tokens", counts.promised_tokens),
                ("blocks_to_save", counts.blocks_to_save),
                ("voided_loads", counts.voided_loads),
                ("bypassed_requests", counts.bypassed_requests),
                ("failed_loads", counts.failed_loads),
            ]);
        }
        if let Some(worker) = &*self.worker.lock() {
            let counts = worker.counts();
            figures.extend(
                [
                    ("loaded_blocks", &counts.loaded_blocks),
                    ("layered_loads", &counts.layered_loads),
                    ("saved_blocks", &counts.saved_blocks),
                    ("stale_blocks", &counts.stale_blocks),
                    ("dropped_saves", &counts.dropped_saves),
                    ("cancelled_loads", &counts.cancelled_loads),
                    ("broken_promises", &counts.broken_promises),
                ]
                .map(|(name, count)| (name, count.load(Ordering::Relaxed))),
            );
        }
        if let Some(parts) = &*self.parts.lock() {
            figures.push(("ipc", u64::from(parts.link.link().is_ipc())));
            let counts = parts.link.link().counts();
            figures.extend(
                [
                    ("attaches", &counts.attaches),
                    ("lookup_timeouts", &counts.lookup_timeouts),
                    ("lookups_skipped", &counts.lookups_skipped),
                    ("lookups_on_stream", &counts.lookups_on_stream),
                    ("lookups_found", &counts.lookups_found),
                    ("disk_waits", &counts.disk_waits),
                    ("segments_kept", &counts.segments_kept),
                ]
                .map(|(name, count)| (name, count.load(Ordering::Relaxed))),
            );
        }
        (figures, disabled)
    }

    /// Ends threads and session. What comes later is answered as if there were no cache.
    pub fn close(&self) {
        *self.scheduler.lock() = None;
        *self.worker.lock() = None;
        *self.parts.lock() = None;
    }

    fn with_worker(&self, of: impl FnOnce(&mut WorkerHalf) -> Result<(), String>) -> Result<(), String> {
        self.worker.lock().as_mut().map_or(Ok(()), of)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}

impl Drop for EngineProcess {
    fn drop(&mut self) {
        self.close();
    }
}
