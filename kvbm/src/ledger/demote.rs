//! Demote: which host blocks go to disk next.
//!
//! Candidates wait in a bounded queue; when it is full the newest is dropped and counted: a later use makes it a
//! candidate again. They are written when the drive has had nothing to read for a while, or at once when host memory
//! fills up. A block whose ancestors are not on disk takes them along: prefixes are closed there too.

use std::collections::{HashSet, VecDeque};

use kvbm_hash::SequenceHash;

use super::key::Key;
use super::segments::Claimed;
use super::segments::{Class, Place};
use super::slots::{Allowances, Copying, Incoming, Need, NotReserved, Reserved, SlotIndex};
use super::{Ledger, Millis, Retention};
use crate::tier::Tier;

/// Blocks that may wait to be written.
const CANDIDATES_MAX: usize = 1 << 16;
/// Share of a class's host slots that may be pinned by writes to disk: one of so many.
const HOST_SHARE: usize = 4;

/// One block on its way to disk.
#[derive(Debug)]
pub(super) struct DemoteItem {
    source: Copying,
    from: Place,
    key: Key,
    parent: Option<SequenceHash>,
    target: Reserved,
    to: Place,
    retention: Retention,
}

/// What is written: one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DemoteCopy {
    /// Its place in host memory.
    pub from: Place,
    /// Its place on disk.
    pub to: Place,
    /// Digest of its namespace.
    pub namespace: [u8; 32],
    /// Its key.
    pub key: SequenceHash,
    /// Key of the block before it.
    pub parent: Option<SequenceHash>,
    /// How it is kept.
    pub retention: Retention,
}

/// Host blocks to be written to disk. Comes back through [`Ledger::finish_demote`], in the order of planning.
#[must_use]
#[derive(Debug)]
pub struct DemoteBatch {
    class: Class,
    items: Vec<DemoteItem>,
    namespaces: Vec<[u8; 32]>,
}

impl DemoteBatch {
    /// Bytes of each block.
    pub fn stride(&self) -> usize {
        self.class.stride
    }

    /// What is to be written.
    pub fn copies(&self) -> impl ExactSizeIterator<Item = DemoteCopy> + '_ {
        self.items.iter().zip(&self.namespaces).map(|(item, namespace)| DemoteCopy {
            from: item.from,
            to: item.to,
            namespace: *namespace,
            key: item.key.hash,
            parent: item.parent,
            retention: item.retention,
        })
    }
}

/// Blocks that wait to be written.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    queue: VecDeque<(Class, Key)>,
    /// What is in the queue: a block waits once, however often it is used.
    queued: HashSet<Key>,
    /// Blocks that found the queue full.
    pub dropped: u64,
}

impl Candidates {
    fn push(&mut self, class: Class, key: Key) {
        if self.queued.contains(&key) {
            return;
        }
        if self.queue.len() >= CANDIDATES_MAX {
            self.dropped += 1;
        } else {
            self.queued.insert(key);
            self.queue.push_back((class, key));
        }
    }

    /// The first, if it is of this class.
    fn pop(&mut self, class: Class) -> Option<Key> {
        let (_, key) = self.queue.pop_front_if(|(of, _)| *of == class)?;
        self.queued.remove(&key);
        Some(key)
    }

    /// What was popped waits on, as the first.
    fn put_back(&mut self, class: Class, key: Key) {
        self.queued.insert(key);
        self.queue.push_front((class, key));
    }

    pub fn len(&self) -> usize {
        self.queue.len()
    }

    pub fn clear(&mut self) {
        self.queue.clear();
        self.queued.clear();
    }
}

/// Bounds of one batch.
#[derive(Debug, Clone, Copy)]
pub struct BatchLimit {
    /// Blocks, at least 1.
    pub blocks: usize,
    /// Bytes; a larger block goes alone.
    pub bytes: usize,
}

impl BatchLimit {
    pub(super) fn blocks_of(self, stride: usize) -> usize {
        self.blocks.min(self.bytes / stride).max(1)
    }
}

impl Ledger {
    /// A block in host memory was used: it may be worth a place on disk.
    pub(super) fn used_in_host(&mut self, class: Class, key: Key, priority: u8) {
        if !self.disk.tier.is_on() || !self.disk.admission.used(key, priority) {
            return;
        }
        if self.disk.tier.class(class).is_none_or(|table| !table.slots.knows(key)) {
            self.disk.candidates.push(class, key);
        }
    }

    /// The next blocks to write to disk, if now is the time.
    pub fn next_demote(&mut self, limit: BatchLimit, now: Millis) -> Option<DemoteBatch> {
        if self.disk.candidates.len() == 0 || !self.may_demote(now) || !self.disk.admission.has_budget(now) {
            return None;
        }
        let class = self.disk.candidates.queue.front()?.0;
        let max = limit.blocks_of(class.stride).min(self.demote_room(class));
        if max == 0 {
            return None;
        }
        let mut batch = DemoteBatch { class, items: Vec::new(), namespaces: Vec::new() };
        let rights = Claimed { tier: Tier::Disk, tenants: &self.tenants, now };
        self.disk.tier.claim_share(class, rights);
        let allowances = self.tenants.in_segments(Tier::Disk, &self.disk.tier, class);
        while batch.items.len() < max {
            let Some(key) = self.disk.candidates.pop(class) else { break };
            if !self.plan_demote(key, &mut batch, max, &allowances, now) {
                break;
            }
        }
        self.sweep();
        if batch.items.is_empty() {
            return None;
        }
        self.disk.demoting += batch.items.len();
        self.disk.admission.spend(batch.items.len() as u64 * class.stride as u64);
        Some(batch)
    }

    fn may_demote(&self, now: Millis) -> bool {
        let idle = self.disk.read_at.is_none_or(|at| at.0 + self.disk.idle.0 <= now.0);
        self.disk.in_service && (idle || self.host.occupancy() > self.disk.high_water)
    }

    fn demote_room(&self, class: Class) -> usize {
        let slots = self.host.class(class).map_or(0, |table| table.slots.slots());
        (slots / HOST_SHARE).max(1).saturating_sub(self.disk.demoting)
    }

    /// Adds a block, and before it those of its ancestors that disk lacks. False: the batch is full, what is left waits
    /// again.
    fn plan_demote(
        &mut self,
        key: Key,
        batch: &mut DemoteBatch,
        max: usize,
        allowances: &Allowances,
        now: Millis,
    ) -> bool {
        let Some(host) = self.host.class_mut(batch.class) else { return true };
        let disk = self.disk.tier.class(batch.class);
        let lacking = |key: Key| disk.is_none_or(|table| !table.slots.knows(key));
        let Some(slot) = host.slots.resident(key).filter(|_| lacking(key)) else { return true };
        let blocks = host.slots.ancestors(slot).map_while(|slot| {
            let (key, parent) = host.slots.block(slot).expect("ancestors of a resident block are resident");
            lacking(key).then_some((slot, key, parent))
        });
        let mut chain: Vec<(SlotIndex, Key, Option<SequenceHash>)> = blocks.collect();
        chain.reverse();
        for (slot, part, parent) in chain {
            if batch.items.len() >= max {
                self.disk.candidates.put_back(batch.class, key);
                return false;
            }
            let Some(table) = self.disk.tier.make_room(batch.class) else {
                // Too large for a segment of this disk.
                self.disk.candidates.dropped += 1;
                return true;
            };
            let Some(namespace) = self.registry.namespace(part.namespace) else { return true };
            let retention = host.slots.retention(slot, now);
            let block = Incoming { key: part, parent, retention, group: host.slots.group_of(slot) };
            match table.slots.reserve(block, Need::Optional, allowances, now) {
                Ok(target) => {
                    let (from, to) = (host.place(slot), table.place(target.slot()));
                    let source = host.slots.begin_copy(slot);
                    batch.items.push(DemoteItem { source, from, key: part, parent, target, to, retention });
                    batch.namespaces.push(namespace.digest);
                }
                Err(NotReserved::Resident | NotReserved::Filling) => {}
                Err(NotReserved::NotAdmitted) => {
                    self.disk.not_admitted += 1;
                    return true;
                }
                // The chain fills the whole tier, or all of it is being written, or others have a right to it: what is
                // left has no place now.
                Err(NotReserved::Exhausted | NotReserved::Orphan | NotReserved::OverQuota) => {
                    self.disk.candidates.dropped += 1;
                    return true;
                }
            }
        }
        true
    }

    /// The writes of a batch ended: one outcome for each block. Returns how many are resident on disk because of it.
    pub fn finish_demote(&mut self, batch: DemoteBatch, written: &[bool], now: Millis) -> usize {
        let mut stored = 0;
        self.disk.demoting -= batch.items.len();
        for (item, written) in batch.items.into_iter().zip(written) {
            let table = self.disk.tier.class_mut(batch.class).expect("slots are reserved in it");
            let alive = self.registry.namespace(item.key.namespace).is_some();
            if *written && alive {
                stored += usize::from(table.slots.commit(item.target, now));
            } else {
                table.slots.abandon(item.target, now);
            }
            let host = self.host.class_mut(batch.class).expect("its slots are being read");
            host.slots.end_copy(item.source, now);
        }
        self.sweep();
        stored
    }
}
