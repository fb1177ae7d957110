//! What requests leave behind for the model: sampled keys, and counts. Bounded, and cheap where it is filled.

use std::collections::VecDeque;

use kvbm_hash::SequenceHash;

use super::Asked;
use crate::ledger::{Millis, NamespaceId, SessionId};

/// Requests and commits that may wait for the model.
const SIGHTINGS_MAX: usize = 1 << 13;
/// Sampled keys that may wait for the model, which works off so many in about 5 ms.
const SAMPLES_MAX: usize = 1 << 14;
/// Requests waiting for a disk that are remembered.
const WAITING_MAX: usize = 64;
/// How long such a request may take to ask again; engines wait no longer than that by default.
const ASKS_AGAIN_WITHIN_MS: u64 = 15_000;

/// Any odd number whose bits are mixed.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

/// A sampled key: the part that is compared with thresholds, and where in its sequence it stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sample {
    pub word: u64,
    pub position: u32,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A request asked for `blocks`: so many leading ones were found.
    Asked { blocks: usize, in_host: usize, on_disk: usize },
    /// Blocks became complete.
    Stored,
}

/// One request or commit, and how many of the samples are its.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sighting {
    pub kind: Kind,
    pub block_bytes: u64,
    pub samples: usize,
}

/// What came in between two looks of the model.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub sightings: Vec<Sighting>,
    /// Of all sightings, in order; parents first within each.
    pub samples: Vec<Sample>,
}

impl Batch {
    pub fn clear(&mut self) {
        self.sightings.clear();
        self.samples.clear();
    }
}

/// A request that was told of blocks on disk and will ask again when they have come: one request, not two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Waiting {
    session: SessionId,
    namespace: NamespaceId,
    last: SequenceHash,
    until: Millis,
}

/// Digests are uniform already; the multiplication carries what keys of other makings differ in to the upper bits.
fn word(key: SequenceHash, spread: u64) -> u64 {
    let (low, high) = key.0.split_at(8);
    let half = |bytes: &[u8]| u64::from_le_bytes(*bytes.first_chunk().expect("8 of 16 bytes"));
    (half(low) ^ half(high).rotate_left(29) ^ spread).wrapping_mul(SPREAD)
}

/// See the module.
#[derive(Debug)]
pub(super) struct Feed {
    batch: Batch,
    /// Keys below it are sampled.
    threshold: u64,
    waiting: VecDeque<Waiting>,
    unseen: u64,
}

impl Default for Feed {
    fn default() -> Self {
        Self { batch: Batch::default(), threshold: u64::MAX, waiting: VecDeque::new(), unseen: 0 }
    }
}

impl Feed {
    pub fn asked(&mut self, asked: &Asked<'_>, now: Millis) {
        let Some(last) = asked.keys.last() else { return };
        if self.asks_again(asked, *last, now) {
            return;
        }
        let (in_host, on_disk) = (asked.in_host, asked.on_disk);
        let kind = Kind::Asked { blocks: asked.keys.len(), in_host, on_disk };
        self.take(kind, asked.block_bytes, asked.namespace, asked.keys.iter().copied());
    }

    pub fn stored(
        &mut self,
        namespace: NamespaceId,
        keys: impl ExactSizeIterator<Item = SequenceHash>,
        block_bytes: u64,
    ) {
        self.take(Kind::Stored, block_bytes, namespace, keys);
    }

    fn take(
        &mut self,
        kind: Kind,
        block_bytes: u64,
        namespace: NamespaceId,
        keys: impl ExactSizeIterator<Item = SequenceHash>,
    ) {
        let Batch { sightings, samples } = &mut self.batch;
        let before = samples.len();
        let is_full = before > 0 && before + keys.len() > SAMPLES_MAX;
        if sightings.len() == SIGHTINGS_MAX || is_full {
            self.unseen += 1;
            return;
        }
        // Every key is written, and the next one over it unless it is sampled: a branch that nobody can predict would
        // cost more than the write.
        let spread = u64::from(namespace.0) << 32;
        samples.resize(before + keys.len(), Sample::default());
        let mut end = before;
        for (position, key) in keys.enumerate() {
            let word = word(key, spread);
            samples[end] = Sample { word, position: position as u32 };
            end += usize::from(word < self.threshold);
        }
        samples.truncate(end);
        sightings.push(Sighting { kind, block_bytes, samples: end - before });
    }

    /// Whether this is the second look of a request that waited for a disk; remembers the first.
    fn asks_again(&mut self, asked: &Asked<'_>, last: SequenceHash, now: Millis) -> bool {
        self.waiting.retain(|waiting| waiting.until > now);
        let same = |waiting: &Waiting| {
            (waiting.session, waiting.namespace, waiting.last) == (asked.session, asked.namespace, last)
        };
        let first = self.waiting.iter().position(same);
        if asked.on_disk > asked.in_host {
            if let Some(first) = first {
                // Part of it has come, and it may ask once more.
                self.waiting[first].until.0 = now.0 + ASKS_AGAIN_WITHIN_MS;
                return true;
            }
            if self.waiting.len() == WAITING_MAX {
                self.waiting.pop_front();
            }
            let until = Millis(now.0 + ASKS_AGAIN_WITHIN_MS);
            let (session, namespace) = (asked.session, asked.namespace);
            self.waiting.push_back(Waiting { session, namespace, last, until });
            return false;
        }
        first.map(|first| self.waiting.remove(first)).is_some()
    }

    /// Exchanges what came in for an empty batch; from now on keys below `threshold` are sampled.
    pub fn exchange(&mut self, empty: &mut Batch, threshold: u64) {
        std::mem::swap(&mut self.batch, empty);
        self.threshold = threshold;
    }

    /// Sightings that found the feed full.
    pub fn unseen(&self) -> u64 {
        self.unseen
    }
}
