//! What is known of who has which blocks: from events where there are any, from where requests went where there are none.
//!
//! Lock order: `recent`, then `index`. Readers take `index` only.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use kvbm_nats::Bus;
use kvbm_proto::v1;
use parking_lot::{Mutex, RwLock};
use tokio::time::Instant;

use super::cost::Overlap;
use super::index::{Fingerprint, Index, Source, SourceId, Tier};
use super::recent::Recent;
use crate::fleet::Place;

/// Changes that are applied under one lock: a reader waits for no more.
const BATCH: usize = 512;

/// See the module.
#[derive(Debug)]
pub struct Knowledge {
    index: RwLock<Index>,
    recent: Mutex<Recent>,
    events: Events,
    bus: Option<Bus>,
}

/// Whether daemons are asked for events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Events {
    /// Yes; workers without a daemon are guessed at.
    Followed,
    /// No: all is guessed.
    Ignored,
}

/// One change at a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Stored(Source, Fingerprint),
    Removed(Source, Fingerprint),
    Cleared(Source),
}

impl Change {
    /// Of an event of a node; `None` if it is of no concern here.
    pub fn of(node: u32, event: &v1::Event) -> Option<Self> {
        let tier = match event.tier() {
            v1::Tier::Device => Tier::Device,
            v1::Tier::Host => Tier::Host,
            v1::Tier::Disk => Tier::Disk,
            v1::Tier::Remote | v1::Tier::Unspecified => return None,
        };
        let source = Source { node, tier, pool: event.pool_id };
        let key = || event.key.as_slice().try_into().ok().map(Fingerprint::of);
        match event.kind() {
            v1::EventKind::Stored => Some(Self::Stored(source, key()?)),
            v1::EventKind::Removed => Some(Self::Removed(source, key()?)),
            v1::EventKind::Cleared => Some(Self::Cleared(source)),
            v1::EventKind::Unspecified => None,
        }
    }
}

impl Knowledge {
    /// Nothing is known yet. What is guessed holds for `lifetime`.
    pub fn new(events: Events, lifetime: Duration) -> Self {
        Self { index: RwLock::default(), recent: Mutex::new(Recent::new(lifetime)), events, bus: None }
    }

    /// Events come over NATS, instead of from each daemon itself.
    pub fn over(self, bus: Bus) -> Self {
        Self { bus: Some(bus), ..self }
    }

    /// Where events come from, if not from the daemons themselves.
    pub fn bus(&self) -> Option<&Bus> {
        self.bus.as_ref()
    }

    /// Whether daemons are asked for events.
    pub fn events(&self) -> Events {
        self.events
    }

    /// Takes in what happened at nodes, in order.
    pub fn apply(&self, changes: &[Change]) {
        for batch in changes.chunks(BATCH) {
            let mut index = self.index.write();
            let mut last: Option<(Source, SourceId)> = None;
            for change in batch {
                let (Change::Stored(source, _) | Change::Removed(source, _) | Change::Cleared(source)) =
                    *change;
                let id = match last {
                    Some((known, id)) if known == source => id,
                    _ => match index.source(source) {
                        Some(id) => id,
                        None => continue,
                    },
                };
                last = Some((source, id));
                match *change {
                    Change::Stored(_, key) => index.store(id, key),
                    Change::Removed(_, key) => index.remove(id, key),
                    Change::Cleared(_) => index.clear(id),
                }
            }
        }
    }

    /// All that a node has, instead of what was known of it.
    pub fn replace(&self, node: u32, stored: &[Change]) {
        {
            let mut index = self.index.write();
            for source in index.sources_of(node) {
                index.forget(source);
            }
        }
        self.apply(stored);
    }

    /// A prompt goes to a worker that tells nothing of its blocks.
    pub fn note(&self, place: &Place, keys: Arc<[Fingerprint]>) {
        if keys.is_empty() || self.tells(place) {
            return;
        }
        let mut recent = self.recent.lock();
        let mut index = self.index.write();
        if let Some(source) = index.source(device(place)) {
            recent.note(&mut index, source, keys, Instant::now());
        }
    }

    fn tells(&self, place: &Place) -> bool {
        self.events == Events::Followed && place.node.has_events()
    }

    /// What the places have of a prompt, in blocks.
    pub fn overlaps(&self, keys: &[Fingerprint], places: &[&Place]) -> Vec<Overlap> {
        if keys.is_empty() {
            return vec![Overlap::default(); places.len()];
        }
        let sources = |place: &&Place| {
            let tier = |tier| Source { node: place.node.id(), tier, pool: 0 };
            [device(place), tier(Tier::Host), tier(Tier::Disk)]
        };
        let index = self.index.read();
        let mut ids: HashMap<Source, Option<SourceId>> = HashMap::new();
        let mut known = |source: Source| *ids.entry(source).or_insert_with(|| index.find(source));
        let wanted: Vec<Option<SourceId>> = places.iter().flat_map(sources).map(&mut known).collect();
        let depths = index.depths(keys, &wanted);
        let (depths, _) = depths.as_chunks::<3>();
        depths.iter().map(|[device, host, disk]| Overlap::of_depths(*device, *host, *disk)).collect()
    }

    /// Blocks that somebody has.
    pub fn blocks(&self) -> usize {
        self.index.read().blocks()
    }
}

fn device(place: &Place) -> Source {
    Source { node: place.node.id(), tier: Tier::Device, pool: place.pool }
}
