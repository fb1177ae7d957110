//! What another capacity would find: sampled stack distances of the requests that the daemon sees.
//!
//! ```text
//!   match, commit ──► Feed ── keys below a threshold, nothing else ──► Model, a few times per second
//!                     (bounded)                                        │ a Stack per tier: how deep a key lies
//!                                                                      │ Seen: whether it was there at all
//!                                                                      └ Window: counts of two halves, then forgotten
//! ```
//!
//! A *stack* holds keys in the order of their last use. A cache that evicts the least recently used block holds exactly
//! the top of it, so the depth at which a request meets a key, in bytes, is the capacity that would have kept it (its
//! stack distance). Prefixes are closed: a use of a block is a use of all before it, a block is never kept without its
//! parents, and what counts is how many *leading* blocks of a request are there.
//!
//! Keys are uniform, so a key is sampled by comparing a part of it with a threshold, and always or never (SHARDS, FAST
//! 2015): what lies between two uses is scaled by the share of keys that are sampled. Memory is fixed: a stack with too
//! many samples halves its threshold, and forgets what lies deeper than the largest capacity that is asked about.
//!
//! What was found and what was missed is counted exactly, for every key. The sample only tells how the two divide:
//! which share of the found would be missed by a smaller cache, which share of the missed would be found by a larger one.
//!
//! **What it does not do.** It knows one policy, least recently used. It does not know priorities, pins and quotas, nor
//! the admission to disk. It touches no block and decides nothing.

mod feed;
mod model;
mod recency;
mod seen;
mod stack;
mod window;

use std::time::Duration;

use kvbm_hash::SequenceHash;
use parking_lot::Mutex;

use crate::ledger::{Millis, NamespaceId, SessionId};
use crate::tier::Tier;
use feed::Feed;
use model::Model;

/// Multiples of a tier's capacity that are asked about.
pub const CAPACITIES: [f64; 4] = [0.5, 1.0, 2.0, 4.0];

/// Samples of one stack, at most.
const SAMPLES_MAX: usize = 1 << 14;

/// Capacities of now, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Of host memory.
    pub host_bytes: u64,
    /// Of the disk.
    pub disk_bytes: u64,
}

/// What a request asked for and what was there, in leading blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    /// Who.
    pub session: SessionId,
    /// Where.
    pub namespace: NamespaceId,
    /// From the first block of the sequence on.
    pub keys: &'a [SequenceHash],
    /// Bytes of each block.
    pub block_bytes: u64,
    /// On the device or in host memory.
    pub in_host: usize,
    /// Anywhere.
    pub on_disk: usize,
}

/// What one tier finds, and would find.
#[derive(Debug, Clone, PartialEq)]
pub struct TierWhatIf {
    /// Down to which tier: `Host` is device and host, `Disk` is all three.
    pub tier: Tier,
    /// Its size now, bytes; with `Disk`, that of host memory included.
    pub capacity_bytes: u64,
    /// Blocks asked for in the window; 0: nothing below can be said.
    pub blocks: u64,
    /// Share of them that was found, 0..=1. Counted, not estimated.
    pub hit_rate: f64,
    /// Share that would have been found with so many times the capacity, by least recently used: [`CAPACITIES`].
    pub estimates: [f64; CAPACITIES.len()],
    /// Share that would have been found if nothing of the window had ever been evicted.
    pub ceiling: f64,
    /// Share of keys that are sampled, 0..=1.
    pub sampled: f64,
}

/// All tiers.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WhatIfReport {
    /// Those that are in service.
    pub tiers: Vec<TierWhatIf>,
    /// Requests and commits that came too fast to be looked at, since the start.
    pub unseen: u64,
    /// How far back the figures look, seconds.
    pub window_s: f64,
}

/// See the module. Lock order: model, then feed; neither while the ledger's lock is held.
#[derive(Debug)]
pub(crate) struct WhatIf {
    /// `None`: turned off.
    parts: Option<(Mutex<Feed>, Mutex<Model>)>,
}

impl WhatIf {
    /// Looks back between half of `window` and all of it. Zero turns it off.
    pub fn new(window: Duration) -> Self {
        let parts = (!window.is_zero())
            .then(|| (Mutex::new(Feed::default()), Mutex::new(Model::new(window / 2, SAMPLES_MAX))));
        Self { parts }
    }

    /// A request asked for a prefix. Costs a comparison per key.
    pub fn asked(&self, asked: &Asked<'_>, now: Millis) {
        if let Some((feed, _)) = &self.parts {
            feed.lock().asked(asked, now);
        }
    }

    /// Blocks became complete, parents first.
    pub fn stored(
        &self,
        namespace: NamespaceId,
        keys: impl ExactSizeIterator<Item = SequenceHash>,
        block_bytes: u64,
    ) {
        if let Some((feed, _)) = &self.parts {
            feed.lock().stored(namespace, keys, block_bytes);
        }
    }

    /// Looks at what was fed since the last call. To be called a few times per second.
    pub fn tick(&self, sizes: Sizes, now: Millis) {
        if let Some((feed, model)) = &self.parts {
            model.lock().take_in(feed, sizes, now);
        }
    }

    /// The figures as of now.
    pub fn report(&self, sizes: Sizes, now: Millis) -> WhatIfReport {
        let Some((feed, model)) = &self.parts else { return WhatIfReport::default() };
        let mut model = model.lock();
        model.take_in(feed, sizes, now);
        let unseen = feed.lock().unseen();
        model.report(now, unseen)
    }
}

#[cfg(test)]
mod tests;
