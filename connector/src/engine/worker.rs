//! The worker half of one rank: moves blocks as the metadata says, on threads of its own, and answers the engine from
//! what it knows itself.
//!
//! ```text
//!  bind(metadata) ── generations up, voided loads called back, loads and saves noted
//!  start_loads ────► load thread:  begin lease, copy in, end lease ──────────────► finished
//!  layer ──────────► the pass waits for what is still on its way of those told of early (`layers`)
//!  pass_done ──────► save thread:  offer to the daemon, copy out, generation same? ► finished
//! ```
//!
//! A load that is called back does not write when `bind` returns: a batch is copied under the load's lock. A copy out
//! of a page that changed hands meanwhile does not count, because the generation was raised before the pass that may
//! have written the page. A load that cannot be kept is an error for the engine: it would compute on wrong bytes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::generations::Generations;
use super::host::Host;
use super::metadata::Metadata;
use super::pool::{Mover, PoolShape, Steps};

mod endings;
mod layers;
mod loads;
mod queue;
mod saves;
mod speed;
mod taint;
#[cfg(test)]
mod tests;

pub use layers::Pass;

use endings::Endings;
use layers::Arriving;
use loads::{LoadJob, Loaded};
use queue::Queue;
use saves::SaveJob;
use speed::Speed;
use taint::Taint;

/// Copies of one kind that wait for their thread, at most. More loads than the engine has requests cannot wait; a save
/// that finds no room is left out.
const QUEUE_MAX: usize = 65_536;

/// How long a save waits for room where the engine does not wait for the save.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);

/// How long a pass in which nothing is computed waits for the end of a load. A request that comes then waits as well.
const IDLE_PATIENCE: Duration = Duration::from_millis(5);

/// Totals since the start.
#[derive(Debug, Default)]
pub struct WorkerCounts {
    /// Blocks brought from host memory.
    pub loaded_blocks: AtomicU64,
    /// Loads whose requests went on before all layers were there.
    pub layered_loads: AtomicU64,
    /// Blocks copied to host memory.
    pub saved_blocks: AtomicU64,
    /// Copies out that did not count because the page had changed hands.
    pub stale_blocks: AtomicU64,
    /// Saves that nobody took.
    pub dropped_saves: AtomicU64,
    /// Loads called back because their pages had changed hands.
    pub cancelled_loads: AtomicU64,
    /// Loads that were promised and could not be kept. The engine is told before it computes on them.
    pub broken_promises: AtomicU64,
}

/// What the threads and the engine's thread share.
struct Shared {
    shape: PoolShape,
    /// How blocks are brought in layer by layer, if they can be.
    steps: Option<Steps>,
    /// The engine waits for layers, as far as was seen.
    trusts: AtomicBool,
    mover: Arc<dyn Mover>,
    host: Arc<dyn Host>,
    generations: Arc<Generations>,
    loading: Mutex<Endings>,
    load_ended: Condvar,
    saving: Mutex<Endings>,
    /// Requests whose saves did not arrive because of what came before them.
    orphaned: Mutex<Vec<u64>>,
    /// Pages, of the first layer group, of loads that could not be kept; where the engine can be told.
    failed: Option<Mutex<Vec<i32>>>,
    /// How long a save waits for room. Nothing where blocks are kept until it has ended.
    busy_patience: Duration,
    broken: Mutex<Option<String>>,
    speed: Mutex<Speed>,
    counts: Arc<WorkerCounts>,
}

/// The worker half of one rank.
pub(crate) struct WorkerHalf {
    shared: Arc<Shared>,
    /// Parked loads that may be under way.
    under_way: HashMap<u64, Arc<LoadJob>>,
    /// Of the metadata that is bound.
    next_loads: Vec<Arc<LoadJob>>,
    next_saves: Vec<SaveJob>,
    arriving: Arriving,
    taint: Taint,
    loads: Queue<Arc<LoadJob>>,
    /// `None`: another rank saves the same bytes.
    saves: Option<Queue<SaveJob>>,
}

/// What becomes of a load that cannot be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BrokenPromise {
    /// The engine is stopped before it computes on wrong bytes.
    Stops,
    /// The engine is told which pages to compute.
    IsTold,
}

impl WorkerHalf {
    /// `saves`: false where another rank saves the same bytes.
    pub fn new(
        shape: PoolShape,
        mover: Arc<dyn Mover>,
        host: Arc<dyn Host>,
        generations: Arc<Generations>,
        saves: bool,
        broken: BrokenPromise,
    ) -> std::io::Result<Self> {
        let steps = Steps::of(&shape);
        let shared = Arc::new(Shared {
            shape,
            steps,
            trusts: AtomicBool::new(false),
            mover,
            host,
            generations,
            loading: Mutex::new(Endings::always_asked()),
            load_ended: Condvar::new(),
            saving: Mutex::default(),
            orphaned: Mutex::default(),
            failed: (broken == BrokenPromise::IsTold).then(Mutex::default),
            busy_patience: if broken == BrokenPromise::IsTold { BUSY_PATIENCE } else { Duration::ZERO },
            broken: Mutex::default(),
            speed: Mutex::default(),
            counts: Arc::default(),
        });
        let of_loads = shared.clone();
        let loads = Queue::start("kvbm-load", QUEUE_MAX, move |job: Arc<LoadJob>| job.run(&of_loads))?;
        let of_saves = shared.clone();
        let save_queue = Queue::start("kvbm-save", QUEUE_MAX, move |job: SaveJob| job.run(&of_saves))?;
        Ok(Self {
            shared,
            under_way: HashMap::new(),
            next_loads: Vec::new(),
            next_saves: Vec::new(),
            arriving: Arriving::new(steps),
            taint: Taint::default(),
            loads,
            saves: saves.then_some(save_queue),
        })
    }

    pub fn counts(&self) -> &Arc<WorkerCounts> {
        &self.shared.counts
    }

    /// Takes in what is to be done before and after the next pass.
    pub fn bind(&mut self, metadata: Metadata) -> Result<(), String> {
        // A pass that never came: its blocks are not known to be complete.
        for save in std::mem::take(&mut self.next_saves) {
            save.drop_unsaved(&self.shared);
        }
        self.shared.generations.raise(&metadata.reassigned)?;
        let reassigned = metadata.reassigned.first().map_or(&[][..], |group| &group.pages);
        self.taint.reassigned(reassigned.iter());
        self.arriving.reassigned(reassigned);
        for load_id in &metadata.voided {
            if let Some(job) = self.under_way.remove(load_id) {
                job.call_back();
            }
        }
        for lease in metadata.ended {
            self.shared.host.end(lease);
        }
        self.under_way.retain(|_, job| !job.is_over());
        for load in metadata.loads {
            let job = Arc::new(LoadJob::new(load, &self.shared)?);
            if job.parked {
                self.shared.loading.lock().begin(job.request_id);
                self.under_way.insert(job.load_id, job.clone());
            }
            self.next_loads.push(job);
        }
        let saves = if self.saves.is_some() { metadata.saves } else { Vec::new() };
        for save in saves {
            let job = SaveJob::new(save, &self.shared)?;
            self.shared.saving.lock().begin(job.request_id);
            self.next_saves.push(job);
        }
        Ok(())
    }

    /// Starts the bound loads. Those that the pass needs are done when this returns, or are waited for on its stream:
    /// now, or, if it returns true, layer by layer.
    pub fn start_loads(&mut self, stream: u64, pass: Pass) -> Result<bool, String> {
        let jobs = std::mem::take(&mut self.next_loads);
        if !jobs.is_empty() {
            self.start(jobs, stream, self.arriving.trusts(&pass))?;
        }
        let asks = self.arriving.begin(pass, stream)?;
        self.shared.check().map(|()| asks)
    }

    fn start(&mut self, mut jobs: Vec<Arc<LoadJob>>, stream: u64, in_layers: bool) -> Result<(), String> {
        // What the engine launched before may still be using the pages.
        let fence = self.shared.mover.fence(stream)?;
        // The pass waits for those that are not parked.
        jobs.sort_by_key(|job| job.parked);
        let mut in_pass = Vec::new();
        for job in jobs {
            job.set_fence(fence.clone());
            if !job.parked {
                in_pass.push(job.clone());
            }
            if self.loads.push(job).is_err() {
                return Err(format!("more than {QUEUE_MAX} loads are waiting"));
            }
        }
        for job in in_pass {
            if in_layers && job.arrives_in_steps() {
                self.arriving.add(job);
            } else if job.wait() == Loaded::No {
                self.taint.failed(job.request_id, job.first_pages());
            }
        }
        Ok(())
    }

    /// The pass gets to a layer, by its place in a block; any other number stands for all.
    pub fn layer(&mut self, layer: usize, stream: u64) -> Result<(), String> {
        self.arriving.layer(layer, stream)
    }

    /// The pass whose metadata is bound has been launched: its blocks are complete when the stream gets here.
    pub fn pass_done(&mut self, stream: u64) -> Result<(), String> {
        let ended = self.arriving.end();
        self.shared.trusts.store(self.arriving.trusts_any(), Ordering::Relaxed);
        ended?;
        let Some(queue) = self.saves.as_ref().filter(|_| !self.next_saves.is_empty()) else { return Ok(()) };
        let fence = self.shared.mover.fence(stream)?;
        for mut save in std::mem::take(&mut self.next_saves) {
            if self.taint.spreads_to(&save) {
                save.drop_unsaved(&self.shared);
                continue;
            }
            save.fence = Some(fence.clone());
            if let Err(save) = queue.push(save) {
                save.drop_unsaved(&self.shared);
            }
        }
        Ok(())
    }

    /// Notes whose end the engine asks for; returns whose copies have ended, each once: saves, then loads.
    pub fn get_finished(&mut self, saving: &[u64], loading: &[u64]) -> Result<(Vec<u64>, Vec<u64>), String> {
        let saved = {
            let mut endings = self.shared.saving.lock();
            for request in saving {
                let _ = endings.ask(*request);
            }
            endings.take()
        };
        let loaded = {
            let mut endings = self.shared.loading.lock();
            for request in loading {
                if !endings.ask(*request) {
                    return Err(format!(
                        "the engine waits for a load of request {request}, of which this rank was never told"
                    ));
                }
            }
            endings.take()
        };
        for job in self.under_way.values().filter(|job| job.in_layers && !job.is_over()) {
            if loaded.contains(&job.request_id) {
                self.arriving.add(job.clone());
            }
        }
        self.shared.check()?;
        Ok((saved, loaded))
    }

    /// True while copies out of this request's blocks may be under way.
    pub fn is_saving(&self, request: u64) -> bool {
        self.shared.saving.lock().is_under_way(request)
    }

    /// Returns when a parked load has ended of which the engine was not told, none is under way, or it took too long.
    pub fn wait_for_load(&mut self) {
        let mut loading = self.shared.loading.lock();
        if loading.is_any_under_way() && !loading.has_news() {
            let _ = self.shared.load_ended.wait_for(&mut loading, IDLE_PATIENCE);
        }
    }

    /// Pages that were not loaded though it was promised, each once.
    pub fn take_failed(&mut self) -> Vec<i32> {
        self.shared.failed.as_ref().map_or_else(Vec::new, |failed| std::mem::take(&mut *failed.lock()))
    }

    /// How long a block takes to load, if any was loaded since the last time.
    pub fn take_block_time(&mut self) -> Option<Duration> {
        self.shared.speed.lock().take()
    }

    /// Requests that are to be saved again from the first block.
    pub fn take_orphaned(&mut self) -> Vec<u64> {
        std::mem::take(&mut *self.shared.orphaned.lock())
    }
}

impl Shared {
    /// A load into these pages of the first layer group ended without their bytes.
    fn break_promise(&self, pages: impl Iterator<Item = i32>, why: String) {
        self.counts.broken_promises.fetch_add(1, Ordering::Relaxed);
        if let Some(failed) = &self.failed {
            tracing::warn!(why, "blocks that were found are computed after all");
            return failed.lock().extend(pages);
        }
        self.stop(why);
    }

    /// The engine is not to compute any more.
    fn stop(&self, why: String) {
        tracing::error!(why, "a promised load cannot be kept");
        self.broken.lock().get_or_insert(why);
    }

    fn check(&self) -> Result<(), String> {
        self.broken.lock().clone().map_or(Ok(()), Err)
    }
}
