//! The workers of all nodes, and what a router knows of them.

use std::collections::VecDeque;
use std::sync::Arc;

use kvbm::EventKind;
use kvbm::ledger::Millis;
use kvbm_frontend::{
    Burden, Chooser, Fingerprint, Homes, Index, Load, Overlap, RouterMode, Source, SourceId, Tier,
};

use super::FleetArgs;
use crate::replay::drive::{Answer, Drive, Hits, Setup};
use crate::replay::trace::{Event, Trace};

/// A block came to a place, or left it.
pub(super) struct Change {
    source: SourceId,
    key: Fingerprint,
    is_there: bool,
}

/// A request at a worker.
pub(super) struct Job {
    pub request: usize,
    pub arrived_us: u64,
    pub burden: Burden,
}

struct Worker {
    load: Arc<Load>,
    /// In its pool, in host memory, on disk.
    sources: [SourceId; 3],
    waiting: VecDeque<Job>,
    is_busy: bool,
}

/// See the module.
pub(super) struct Workers<'a> {
    nodes: Vec<Drive<'a>>,
    /// Those of the first node first.
    workers: Vec<Worker>,
    per_node: usize,
    tokens_per_block: usize,
    index: Index,
    chooser: Chooser,
    homes: Homes,
    turn: usize,
}

impl<'a> Workers<'a> {
    pub fn new(trace: &'a Trace, setup: &Setup, args: &FleetArgs) -> Answer<Self> {
        let nodes = (0..args.nodes).map(|_| Drive::new(trace, setup)).collect::<Answer<Vec<_>>>()?;
        let mut index = Index::default();
        let mut source = |node: u8, tier, pool| {
            let source = Source { node: node.into(), tier, pool };
            index.source(source).expect("4,096 workers and as many nodes are fewer than 65,536 places")
        };
        let mut worker = |node, number: u8| Worker {
            load: Arc::default(),
            sources: [
                source(node, Tier::Device, number.into()),
                source(node, Tier::Host, 0),
                source(node, Tier::Disk, 0),
            ],
            waiting: VecDeque::new(),
            is_busy: false,
        };
        let mut workers = Vec::new();
        for node in 0..args.nodes {
            workers.extend((0..args.workers).map(|number| worker(node, number)));
        }
        Ok(Self {
            nodes,
            workers,
            per_node: args.workers.into(),
            tokens_per_block: trace.tokens_per_block as usize,
            index,
            chooser: Chooser::new(args.weights()),
            homes: Homes::default(),
            turn: 0,
        })
    }

    pub fn count(&self) -> usize {
        self.workers.len()
    }

    /// Chooses a worker, to whose queue the request goes.
    pub fn place(
        &mut self,
        request: usize,
        keys: &[Fingerprint],
        mode: RouterMode,
        now_us: u64,
        chance: f64,
    ) -> usize {
        let prompt = keys.len() * self.tokens_per_block;
        let (chosen, found) = match mode {
            RouterMode::Kv => {
                let mut overlaps = self.overlaps(keys);
                if let Some((blocks, home)) = self.homes.of(keys) {
                    let overlap = &mut overlaps[home as usize];
                    *overlap = overlap.with_home(blocks * self.tokens_per_block);
                }
                let loads = self.workers.iter().map(|worker| &*worker.load);
                let known: Vec<(Overlap, &Load)> = overlaps.iter().copied().zip(loads).collect();
                let costs = self.chooser.costs(prompt, &known);
                let chosen = self.chooser.choose(&costs, chance).unwrap_or(0);
                self.homes.note(keys, chosen as u64);
                (chosen, overlaps[chosen].total())
            }
            RouterMode::LeastLoaded | RouterMode::PowerOfTwo => {
                let first = (chance * self.count() as f64) as usize;
                let all = (first..self.count()).chain(0..first);
                (all.min_by_key(|at| self.workers[*at].load.requests()).unwrap_or(0), 0)
            }
            RouterMode::Random => ((chance * self.count() as f64) as usize, 0),
            RouterMode::RoundRobin | RouterMode::Direct => {
                self.turn += 1;
                ((self.turn - 1) % self.count(), 0)
            }
        };
        let worker = &mut self.workers[chosen];
        let burden = self.chooser.place(&worker.load, prompt - found);
        worker.waiting.push_back(Job { request, arrived_us: now_us, burden });
        chosen
    }

    fn overlaps(&self, keys: &[Fingerprint]) -> Vec<Overlap> {
        let sources: Vec<Option<SourceId>> =
            self.workers.iter().flat_map(|worker| worker.sources).map(Some).collect();
        let depths = self.index.depths(keys, &sources);
        let (depths, _) = depths.as_chunks::<3>();
        let tokens = |depths: &[usize; 3]| {
            let [device, host, disk] = depths.map(|depth| depth * self.tokens_per_block);
            Overlap::of_depths(device, host, disk)
        };
        depths.iter().map(tokens).collect()
    }

    /// The next request of a worker that has time for it.
    pub fn begin(&mut self, worker: usize) -> Option<Job> {
        let worker = &mut self.workers[worker];
        if worker.is_busy {
            return None;
        }
        let job = worker.waiting.pop_front()?;
        worker.is_busy = true;
        Some(job)
    }

    pub fn idle(&mut self, worker: usize) {
        self.workers[worker].is_busy = false;
    }

    /// What a worker finds of a request, and what changes by that it serves it.
    pub fn serve(&mut self, worker: usize, event: &Event, now: Millis) -> Answer<(Hits, Vec<Change>)> {
        let (node, engine) = (worker / self.per_node, worker % self.per_node);
        let hits = self.nodes[node].request(engine, event, now)?;
        let changes = self.nodes[node].take_changes().into_iter().filter_map(|(change, engine)| {
            let [device, host, disk] = self.workers[node * self.per_node + engine].sources;
            let source = match change.tier {
                kvbm::Tier::Device => device,
                kvbm::Tier::Host => host,
                kvbm::Tier::Disk => disk,
                kvbm::Tier::Remote => return None,
            };
            match change.kind {
                EventKind::Stored { key, .. } => Some(Change { source, key: key.into(), is_there: true }),
                EventKind::Removed { key, .. } => Some(Change { source, key: key.into(), is_there: false }),
                EventKind::Cleared => None,
            }
        });
        Ok((hits, changes.collect()))
    }

    /// The router hears of changes.
    pub fn learn(&mut self, changes: &[Change]) {
        for change in changes {
            match change.is_there {
                true => self.index.store(change.source, change.key),
                false => self.index.remove(change.source, change.key),
            }
        }
    }
}
