//! Which worker answers.
//!
//! ```text
//! prompt -> keys -> knowledge (index: events of daemons, or where requests went) -> overlap per worker
//!                                                       load of each worker ------> cost -> choice
//! choice -> keys that lie on disk are announced to the worker's daemon -> request -> first token
//! ```
//!
//! `dispatch` tries workers until one has answered with a token, and again when one is lost in the middle of an answer.
//! It deliberately holds no queue: a request waits at a worker, or is answered that all are full.

mod affinity;
mod chance;
mod chooser;
mod cost;
mod disagg;
mod dispatch;
mod homes;
mod index;
mod keys;
mod knowledge;
mod load;
mod metrics;
mod mode;
mod recent;
mod recomputed;
mod route;

use std::sync::Arc;
use std::time::Duration;

use kvbm_nats::Nats;
use kvbm_proto::v1::GenerateRequest;
use tokio::time::{Instant, timeout_at};

use crate::fleet::{Candidate, Entry, Fleet, Place};
use crate::openai::ApiError;
use affinity::Affinity;
use chance::Chance;
pub use chooser::Chooser;
pub use cost::{Busy, Overlap, Weights};
pub use disagg::{DisaggConfig, HandOver, Strategy};
use dispatch::Among;
pub use dispatch::{Dispatch, Opened, is_lost};
pub use homes::Homes;
pub use index::{Fingerprint, Index, Source, SourceId, Tier};
pub use keys::{Keying, Keys};
pub use knowledge::{Change, Events, Knowledge};
pub use load::{Burden, Load};
pub use metrics::RouterMetrics;
pub use mode::RouterMode;
pub use route::{Route, Wish};

/// How requests are spread and what happens when a worker is lost.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterConfig {
    /// How a worker is chosen.
    pub mode: RouterMode,
    /// What counts in mode kv.
    pub weights: Weights,
    /// Whether daemons are asked for events.
    pub events: Events,
    /// Where they come from, if not from each daemon itself.
    pub nats: Option<Nats>,
    /// How long a routed prompt counts as held by a worker that sends no events.
    pub guess_lifetime: Duration,
    /// How long a session stays with its worker; `None`: sessions are not looked at.
    pub affinity: Option<Duration>,
    /// How often one answer may move to another worker.
    pub migration_limit: u32,
    /// How long a worker may say nothing in the middle of an answer; `None`: as long as its connection lives.
    pub stall: Option<Duration>,
    /// Prefill and decode at different workers, where their roles say so.
    pub disagg: Option<DisaggConfig>,
    /// Answers say in a header where they come from and why.
    pub debug_headers: bool,
}

impl Default for RouterConfig {
    fn default() -> Self {
        Self {
            mode: RouterMode::default(),
            weights: Weights::default(),
            events: Events::Followed,
            nats: None,
            guess_lifetime: Duration::from_secs(120),
            affinity: None,
            migration_limit: 3,
            stall: Some(Duration::from_secs(30)),
            disagg: None,
            debug_headers: false,
        }
    }
}

/// Sends requests to workers.
pub struct Router {
    fleet: Arc<Fleet>,
    wait: Duration,
    config: RouterConfig,
    knowledge: Arc<Knowledge>,
    metrics: Arc<RouterMetrics>,
    affinity: Option<Affinity>,
    chooser: Chooser,
    homes: Homes,
    chance: Chance,
}

/// What is asked of the choice.
struct Ask<'a> {
    request: &'a GenerateRequest,
    wish: &'a Wish,
    /// Connections that were tried.
    tried: &'a [u64],
    among: &'a Among,
}

/// A worker that was chosen.
struct Choice {
    worker: Arc<Candidate>,
    route: Route,
    /// Known in mode kv, if the worker says how it makes keys.
    keys: Option<Keys>,
}

impl Ask<'_> {
    fn wants(&self, worker: &Candidate) -> bool {
        self.among.contains(worker)
    }

    /// The session, apart for each role: prefill and decode are at different workers.
    fn session(&self) -> Option<String> {
        self.wish.session.as_ref().map(|session| format!("{:?} {session}", self.among.role))
    }
}

impl Router {
    /// A request waits at most `wait` for a worker.
    pub fn new(
        fleet: Arc<Fleet>,
        wait: Duration,
        config: RouterConfig,
        knowledge: Arc<Knowledge>,
        metrics: Arc<RouterMetrics>,
    ) -> Self {
        let affinity = config.affinity.map(Affinity::new);
        let chooser = Chooser::new(config.weights);
        let (homes, chance) = Default::default();
        Self { fleet, wait, config, knowledge, metrics, affinity, chooser, homes, chance }
    }

    /// How it works.
    pub fn config(&self) -> &RouterConfig {
        &self.config
    }

    /// Until when a request that arrives now may wait.
    pub fn deadline(&self) -> Instant {
        Instant::now() + self.wait
    }

    /// A seed for a request that has none: another worker that goes on with it must draw as the first one did.
    pub fn seed(&self) -> u64 {
        self.chance.bits()
    }

    /// The workers of a model, as soon as there is one.
    pub async fn resolve(&self, model: &str, deadline: Instant) -> Result<Arc<Entry>, ApiError> {
        if let Some(entry) = self.fleet.entry(model) {
            return Ok(entry);
        }
        let mut views = self.fleet.subscribe();
        loop {
            {
                let view = views.borrow_and_update();
                if let Some(entry) = view.entry(model) {
                    return Ok(entry.clone());
                }
                if !view.may_come(model) {
                    return Err(ApiError::model_not_found(model));
                }
            }
            if !matches!(timeout_at(deadline, views.changed()).await, Ok(Ok(()))) {
                return Err(ApiError::no_worker(model, &format!("none became ready within {:?}", self.wait)));
            }
        }
    }

    fn choose(&self, entry: &Entry, ask: &Ask<'_>) -> Option<Choice> {
        let started = std::time::Instant::now();
        let choice = self.choose_by_mode(entry, ask);
        self.metrics.decision_seconds.observe(started.elapsed().as_secs_f64());
        let choice = choice?;
        if let (Some(affinity), Some(session)) = (&self.affinity, ask.session()) {
            affinity.bind(&session, &choice.worker.worker_id, Instant::now());
        }
        Some(choice)
    }

    fn choose_by_mode(&self, entry: &Entry, ask: &Ask<'_>) -> Option<Choice> {
        let mode = self.config.mode;
        if mode == RouterMode::RoundRobin && self.affinity.is_none() {
            return entry.in_turn(ask.tried, |worker| ask.wants(worker)).map(|worker| self.plain(worker));
        }
        let open = entry.candidates().iter().filter(|worker| worker.is_open(ask.tried) && ask.wants(worker));
        let open: Vec<&Arc<Candidate>> = open.collect();
        let bound = self.bound(&open, ask);
        match mode {
            RouterMode::Kv => return self.cheapest(&open, bound, ask),
            RouterMode::Direct => {
                let wanted = ask.wish.worker.as_ref()?;
                return open.into_iter().find(|worker| worker.worker_id == *wanted).map(|w| self.plain(w));
            }
            RouterMode::RoundRobin
            | RouterMode::Random
            | RouterMode::PowerOfTwo
            | RouterMode::LeastLoaded => {}
        }
        if let Some(at) = bound {
            return Some(self.plain(open[at]));
        }
        let requests = |at: &usize| open[*at].load.requests();
        let chosen = match (mode, open.len()) {
            (_, 0) => return None,
            (RouterMode::RoundRobin, _) => {
                return entry.in_turn(ask.tried, |worker| ask.wants(worker)).map(|worker| self.plain(worker));
            }
            (RouterMode::PowerOfTwo, count) if count > 1 => {
                let one = self.chance.below(count);
                let other = (one + 1 + self.chance.below(count - 1)) % count;
                [one, other].into_iter().min_by_key(requests)?
            }
            (RouterMode::LeastLoaded, count) => {
                let first = self.chance.below(count);
                (first..count).chain(0..first).min_by_key(requests)?
            }
            (_, count) => self.chance.below(count),
        };
        Some(self.plain(open[chosen]))
    }

    /// Where the session of a request is, among these.
    fn bound(&self, open: &[&Arc<Candidate>], ask: &Ask<'_>) -> Option<usize> {
        let affinity = self.affinity.as_ref()?;
        let worker = affinity.worker(&ask.session()?, Instant::now())?;
        open.iter().position(|candidate| candidate.worker_id == worker)
    }

    fn plain(&self, worker: &Arc<Candidate>) -> Choice {
        let route = Route::plain(self.config.mode, &worker.worker_id);
        Choice { worker: worker.clone(), route, keys: None }
    }

    fn cheapest(&self, open: &[&Arc<Candidate>], bound: Option<usize>, ask: &Ask<'_>) -> Option<Choice> {
        let overlaps = self.overlaps(open, ask.request);
        let prompt = ask.request.prompt.len() + ask.request.generated.len();
        let workers: Vec<(Overlap, &Load)> =
            open.iter().zip(&overlaps).map(|(worker, (overlap, _))| (*overlap, &*worker.load)).collect();
        let costs = self.chooser.costs(prompt, &workers);
        let chosen = match bound {
            Some(bound) => bound,
            None => self.chooser.choose(&costs, self.chance.unit())?,
        };
        let (overlap, keys) = overlaps.into_iter().nth(chosen)?;
        let worker = open[chosen].clone();
        let mut route = Route::plain(self.config.mode, &worker.worker_id);
        (route.overlap, route.cost) = (overlap, Some(costs[chosen]));
        route.block = worker.keying.map_or(0, |keying| keying.tokens_per_block);
        if self.config.debug_headers {
            route.costs = open.iter().map(|worker| worker.worker_id.clone()).zip(costs).collect();
        }
        Some(Choice { worker, route, keys })
    }

    /// What each worker has of a request, in tokens.
    fn overlaps(&self, open: &[&Arc<Candidate>], request: &GenerateRequest) -> Vec<(Overlap, Option<Keys>)> {
        let mut found = vec![(Overlap::default(), None); open.len()];
        // Workers of one model nearly always make keys alike.
        let mut done: Vec<Keying> = Vec::new();
        for keying in open.iter().filter_map(|worker| worker.keying) {
            if done.contains(&keying) {
                continue;
            }
            done.push(keying);
            let keys = keying.keys(request);
            let alike: Vec<usize> =
                (0..open.len()).filter(|at| open[*at].keying.as_ref() == Some(&keying)).collect();
            let places: Vec<&Place> = alike.iter().map(|at| &open[*at].place).collect();
            let overlaps = self.knowledge.overlaps(&keys.prints, &places);
            let home = self.homes.of(&keys.prints);
            for (at, overlap) in alike.into_iter().zip(overlaps) {
                let tokens = |blocks: usize| blocks * keying.tokens_per_block;
                let is_home = |home: &(usize, u64)| home.1 == open[at].connection.id();
                let overlap = Overlap {
                    device: tokens(overlap.device),
                    host: tokens(overlap.host),
                    disk: tokens(overlap.disk),
                    gone: 0,
                }
                .with_home(home.filter(is_home).map_or(0, |(blocks, _)| tokens(blocks)));
                found[at] = (overlap, Some(keys.clone()));
            }
        }
        found
    }
}
