//! The workers: which there are, which can be used now, and who keeps them connected.
//!
//! One table behind one mutex is the truth; a `View` is derived from it after each change and published. Requests
//! only read views, and can wait for the next one.

mod candidate;
mod connection;
mod daemon;
mod endpoint;
mod events;
mod keeper;
mod node;
mod registry;
mod told;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvbm_hash::BaseNamespace;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::metrics::{Metrics, ModelMetrics};
use crate::model::Model;
use crate::router::Load;

pub use candidate::{Candidate, Role, base_namespace};
pub use connection::{Connection, Drivers};
pub use daemon::{Daemon, DaemonFiles, Unusable};
pub use endpoint::Endpoint;
pub use events::Follower;
pub use keeper::{Means, keep_static};
pub use node::{Node, Place};
pub use registry::watch_registry;

/// What a worker says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    pub worker_id: String,
    pub model: String,
    pub model_path: PathBuf,
    /// Tokens of prompt and answer together; `u32::MAX` when the worker does not say.
    pub context_length: u32,
    pub role: Role,
    /// `None`: it does not say.
    pub base: Option<BaseNamespace>,
    /// 0: it does not say.
    pub tokens_per_block: usize,
    pub place: Place,
}

impl Description {
    /// Whether both are of one process. Its place may have changed: a daemon that came back numbers pools anew.
    pub fn is_same_process(&self, other: &Self) -> bool {
        Self { place: other.place.clone(), ..self.clone() } == *other
    }
}

/// Whether a worker can be used.
pub enum WorkerState {
    /// Not yet, or no longer, for this reason; it is being retried.
    Down(String),
    /// It finishes what it has and takes nothing new.
    Draining,
    /// It takes requests.
    Ready(Arc<Connection>, Arc<Model>),
}

struct Row {
    description: Option<Description>,
    state: WorkerState,
    load: Arc<Load>,
}

/// A line of `/health`.
#[derive(Debug, serde::Serialize)]
pub struct WorkerHealth {
    id: String,
    model: String,
    endpoint: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// All workers.
pub struct Fleet {
    table: Mutex<Table>,
    view: watch::Sender<Arc<View>>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Table {
    workers: BTreeMap<Endpoint, Row>,
    /// Each model that ever had a worker: a request for it waits for one to come back. Counts its requests.
    seen: HashMap<String, Arc<AtomicUsize>>,
}

/// The usable workers at one time.
#[derive(Default)]
pub struct View {
    models: BTreeMap<String, Arc<Entry>>,
    known: Vec<String>,
}

/// The usable workers of one model, all of which have the same tokenizer.
pub struct Entry {
    pub model: Arc<Model>,
    pub context_length: u32,
    pub metrics: Arc<ModelMetrics>,
    ready: Vec<Arc<Candidate>>,
    next: Arc<AtomicUsize>,
}

impl Entry {
    /// All of them.
    pub fn candidates(&self) -> &[Arc<Candidate>] {
        &self.ready
    }

    /// The next worker in turn, of those that are `wanted` and not in `tried`. Only the first attempt takes a turn:
    /// otherwise a worker that fails would be given every request of a pair.
    pub fn in_turn(&self, tried: &[u64], wanted: impl Fn(&Candidate) -> bool) -> Option<&Arc<Candidate>> {
        let turn = match tried {
            [] => self.next.fetch_add(1, Ordering::Relaxed),
            _ => self.next.load(Ordering::Relaxed),
        };
        let first = turn % self.ready.len().max(1);
        let mut turn = self.ready[first..].iter().chain(&self.ready[..first]);
        turn.find(|worker| worker.is_open(tried) && wanted(worker))
    }
}

impl View {
    /// Usable workers of a model.
    pub fn entry(&self, model: &str) -> Option<&Arc<Entry>> {
        self.models.get(model)
    }

    /// Whether it is worth waiting for a worker of this model: it had one before, or there are none of any model.
    pub fn may_come(&self, model: &str) -> bool {
        self.known.is_empty() || self.known.iter().any(|known| known == model)
    }

    /// Models that can be used now, by name.
    pub fn models(&self) -> impl Iterator<Item = (&String, &Arc<Entry>)> {
        self.models.iter()
    }
}

impl Fleet {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { table: Mutex::default(), view: watch::Sender::default(), metrics }
    }

    /// The workers as of now.
    pub fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// The usable workers of `model` as of now.
    pub fn entry(&self, model: &str) -> Option<Arc<Entry>> {
        self.view.borrow().entry(model).cloned()
    }

    /// This view and all that follow.
    pub fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// Notes what is known of a worker.
    pub fn set(&self, endpoint: &Endpoint, description: Option<&Description>, state: WorkerState) {
        let mut table = self.table.lock();
        if let Some(description) = description {
            table.seen.entry(description.model.clone()).or_default();
        }
        let load = table.workers.get(endpoint).map(|row| row.load.clone()).unwrap_or_default();
        table.workers.insert(endpoint.clone(), Row { description: description.cloned(), state, load });
        self.publish(&table);
    }

    /// Forgets a worker.
    pub fn remove(&self, endpoint: &Endpoint) {
        let mut table = self.table.lock();
        table.workers.remove(endpoint);
        self.publish(&table);
    }

    fn publish(&self, table: &Table) {
        let mut models: BTreeMap<String, Entry> = BTreeMap::new();
        for row in table.workers.values() {
            let (Some(description), WorkerState::Ready(connection, model)) = (&row.description, &row.state)
            else {
                continue;
            };
            let entry = models.entry(description.model.clone()).or_insert_with(|| Entry {
                model: model.clone(),
                context_length: u32::MAX,
                metrics: self.metrics.model(&description.model),
                ready: Vec::new(),
                next: table.seen.get(&description.model).cloned().unwrap_or_default(),
            });
            // A worker with another tokenizer under the same name would answer nonsense; `health` names it.
            if Arc::ptr_eq(&entry.model, model) {
                entry.context_length = entry.context_length.min(description.context_length);
                let candidate = Candidate::new(description, connection.clone(), row.load.clone());
                entry.ready.push(Arc::new(candidate));
            }
        }
        let models = models.into_iter().map(|(name, entry)| (name, Arc::new(entry))).collect();
        self.view.send_replace(Arc::new(View { models, known: table.seen.keys().cloned().collect() }));
    }

    /// What this frontend has given each worker to do.
    pub fn loads(&self) -> Vec<(String, Arc<Load>)> {
        let table = self.table.lock();
        let named = |row: &Row| Some((row.description.as_ref()?.worker_id.clone(), row.load.clone()));
        table.workers.values().filter_map(named).collect()
    }

    /// Every worker and its state.
    pub fn health(&self) -> Vec<WorkerHealth> {
        let view = self.view();
        let table = self.table.lock();
        let lines = table.workers.iter().map(|(endpoint, row)| {
            let (id, model) = row
                .description
                .as_ref()
                .map(|description| (description.worker_id.clone(), description.model.clone()))
                .unwrap_or_default();
            let (state, reason) = match &row.state {
                WorkerState::Down(reason) => ("down", Some(reason.clone())),
                WorkerState::Draining => ("draining", None),
                WorkerState::Ready(_, own) => match view.entry(&model) {
                    Some(entry) if Arc::ptr_eq(&entry.model, own) => ("ready", None),
                    _ => ("down", Some("its tokenizer differs from that of another worker".to_owned())),
                },
            };
            WorkerHealth { id, model, endpoint: endpoint.to_string(), state, reason }
        });
        lines.collect()
    }
}
