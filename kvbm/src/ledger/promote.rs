//! Promote: blocks on disk that are wanted, into host memory.

use kvbm_hash::SequenceHash;

use super::demote::BatchLimit;
use super::disk::StoredBlock;
use super::key::Key;
use super::segments::{Claimed, Class, Place};
use super::slots::{Copying, Incoming, Need, NotReserved, Reserved, SlotIndex};
use super::waiters::WaiterId;
use super::{Ledger, Millis, NamespaceId, Retention, SessionId};
use crate::error::Refused;
use crate::tier::Tier;

/// Share of a class's host slots that may be filled from disk at a time: one of so many.
const HOST_SHARE: usize = 2;

/// One block on its way from disk.
#[derive(Debug)]
struct PromoteItem {
    source: Copying,
    from: Place,
    key: Key,
    target: Reserved,
    to: Place,
    parent: Option<SequenceHash>,
    retention: Retention,
}

/// What is read: one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromoteCopy {
    /// Its place on disk.
    pub from: Place,
    /// Its place in host memory.
    pub to: Place,
    /// Its key.
    pub key: SequenceHash,
}

/// Blocks of one namespace to be read from disk. Comes back through [`Ledger::finish_promote`], in the order of planning.
#[must_use]
#[derive(Debug)]
pub struct PromoteBatch {
    class: Class,
    namespace: [u8; 32],
    items: Vec<PromoteItem>,
}

impl PromoteBatch {
    /// Bytes of each block.
    pub fn stride(&self) -> usize {
        self.class.stride
    }

    /// Digest of the namespace.
    pub fn namespace(&self) -> [u8; 32] {
        self.namespace
    }

    /// What is to be read.
    pub fn copies(&self) -> impl ExactSizeIterator<Item = PromoteCopy> + '_ {
        self.items.iter().map(|item| PromoteCopy { from: item.from, to: item.to, key: item.key.hash })
    }

    /// What the places in host memory hold when they have arrived.
    pub fn stored(&self) -> impl ExactSizeIterator<Item = (Place, StoredBlock)> + '_ {
        self.items.iter().map(|item| {
            let (key, parent, retention) = (item.key.hash, item.parent, item.retention);
            (item.to, StoredBlock { namespace: self.namespace, key, parent, retention })
        })
    }
}

/// What became of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promoted {
    /// Its bytes are in host memory, and are those that were stored.
    Arrived,
    /// Its slot holds something else.
    Corrupt,
    /// It could not be read.
    Failed,
}

/// A block of a chain: its slot, its key, its parent's key.
type ChainBlock = (SlotIndex, Key, Option<SequenceHash>);

/// What is known of a prefix outside the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixFound {
    /// Leading blocks in host memory.
    pub host_blocks: usize,
    /// Blocks directly behind them on disk, or on their way from there.
    pub disk_blocks: usize,
}

impl Ledger {
    /// Leading blocks of `hashes` in host memory and behind them on disk, now. Pins nothing; counts as a use.
    pub fn find_prefix(
        &mut self,
        session: SessionId,
        namespace: NamespaceId,
        hashes: &[SequenceHash],
        now: Millis,
    ) -> Result<PrefixFound, Refused> {
        let base = self.registry.base_of(session, namespace)?;
        let Some(class) = self.host_class(session, &base) else { return Ok(PrefixFound::default()) };
        let key = |i: usize| Key { namespace, hash: hashes[i] };
        let mut found = PrefixFound::default();
        if let Some(table) = self.host.class_mut(class) {
            let (blocks, deepest) = table.slots.prefix(key, hashes.len());
            found.host_blocks = blocks;
            if let Some(deepest) = deepest {
                table.slots.used(deepest, now);
                let (key, priority) = (key(blocks - 1), table.slots.priority(deepest));
                self.used_in_host(class, key, priority);
            }
        }
        if let Some((deepest, blocks)) = self.disk_prefix(class, namespace, hashes) {
            self.disk.tier.class_mut(class).expect("it was found there").slots.used(deepest, now);
            found.disk_blocks = blocks.saturating_sub(found.host_blocks);
        }
        Ok(found)
    }

    /// As [`Ledger::find_prefix`], but only looks, for whoever uses the namespace: an announced use is not yet a use.
    pub fn look_at_prefix(&self, namespace: NamespaceId, hashes: &[SequenceHash]) -> PrefixFound {
        let mut found = PrefixFound::default();
        let class = self.registry.namespace(namespace).and_then(|known| {
            let stride = self.stride(known.domain, known.base?)?;
            Some(Class { domain: known.domain, stride })
        });
        let Some(class) = class else { return found };
        if let Some(table) = self.host.class(class) {
            found.host_blocks = table.slots.prefix(|i| Key { namespace, hash: hashes[i] }, hashes.len()).0;
        }
        if let Some((_, blocks)) = self.disk_prefix(class, namespace, hashes) {
            found.disk_blocks = blocks.saturating_sub(found.host_blocks);
        }
        found
    }

    /// The deepest of the leading blocks on disk, and how many they are.
    pub(super) fn disk_prefix(
        &self,
        class: Class,
        namespace: NamespaceId,
        hashes: &[SequenceHash],
    ) -> Option<(SlotIndex, usize)> {
        let table = self.disk.tier.class(class).filter(|_| self.disk.in_service)?;
        let (blocks, deepest) = table.slots.prefix(|i| Key { namespace, hash: hashes[i] }, hashes.len());
        Some((deepest?, blocks))
    }

    /// Plans to read what disk has of a prefix behind what host has of it, as far as host memory can be had, in batches.
    pub fn begin_promote(
        &mut self,
        session: SessionId,
        namespace: NamespaceId,
        hashes: &[SequenceHash],
        limit: BatchLimit,
        now: Millis,
    ) -> Result<Vec<PromoteBatch>, Refused> {
        let known = self.registry.namespace_of(session, namespace)?;
        let digest = known.digest;
        let base = self.registry.base_of(session, namespace)?;
        let Some(class) = self.host_class(session, &base) else { return Ok(Vec::new()) };
        let chain = self.chain_on_disk(class, namespace, hashes);
        if chain.is_empty() {
            return Ok(Vec::new());
        }
        let rights = Claimed { tier: Tier::Host, tenants: &self.tenants, now };
        self.host.claim_share(class, rights);
        let allowances = self.tenants.in_segments(Tier::Host, &self.host, class);
        let mut room = self.promote_room(class);
        let mut batches: Vec<PromoteBatch> = Vec::new();
        let in_host = |(_, key, _): &ChainBlock| {
            self.host.class(class).is_some_and(|table| table.slots.resident(*key).is_some())
        };
        let first = chain.iter().take_while(|block| in_host(block)).count();
        for (slot, key, parent) in chain.into_iter().skip(first) {
            if room == 0 {
                break;
            }
            let Some(host) = self.host.make_room(class) else { break };
            let disk = self.disk.tier.class_mut(class).expect("the prefix was found in it");
            let retention = disk.slots.retention(slot, now);
            let block = Incoming { key, parent, retention, group: disk.slots.group_of(slot) };
            let target = match host.slots.reserve(block, Need::Wanted, &allowances, now) {
                Ok(target) => target,
                // It is on its way.
                Err(NotReserved::Resident | NotReserved::Filling) => continue,
                Err(
                    NotReserved::Orphan
                    | NotReserved::Exhausted
                    | NotReserved::OverQuota
                    | NotReserved::NotAdmitted,
                ) => break,
            };
            let (from, to) = (disk.place(slot), host.place(target.slot()));
            let source = disk.slots.begin_copy(slot);
            let item = PromoteItem { source, from, key, target, to, parent, retention };
            match batches.last_mut() {
                Some(batch) if batch.items.len() < limit.blocks_of(class.stride) => batch.items.push(item),
                _ => batches.push(PromoteBatch { class, namespace: digest, items: vec![item] }),
            }
            room -= 1;
            self.disk.promoting += 1;
        }
        if !batches.is_empty() {
            self.disk.read_at = Some(now);
        }
        self.sweep();
        Ok(batches)
    }

    /// What disk has of a prefix. The keys are those of the blocks found, not the client's word for them.
    fn chain_on_disk(
        &self,
        class: Class,
        namespace: NamespaceId,
        hashes: &[SequenceHash],
    ) -> Vec<ChainBlock> {
        let Some(table) = self.disk.tier.class(class).filter(|_| self.disk.in_service) else {
            return Vec::new();
        };
        let (count, deepest) = table.slots.prefix(|i| Key { namespace, hash: hashes[i] }, hashes.len());
        let slots = deepest.map_or(Vec::new(), |deepest| table.slots.chain(deepest, count));
        let block = |slot| table.slots.block(slot).map(|(key, parent)| (slot, key, parent));
        slots.into_iter().map_while(block).collect()
    }

    fn promote_room(&self, class: Class) -> usize {
        let slots = self.host.class(class).map_or(0, |table| table.slots.slots());
        (slots / HOST_SHARE).max(1).saturating_sub(self.disk.promoting)
    }

    /// Asks when the last of these blocks that is on its way to host has arrived. `None`: none is.
    pub fn watch_promote(
        &mut self,
        session: SessionId,
        namespace: NamespaceId,
        hashes: &[SequenceHash],
    ) -> Result<Option<WaiterId>, Refused> {
        let base = self.registry.base_of(session, namespace)?;
        let class = self.host_class(session, &base).filter(|_| self.disk.in_service);
        let Some(table) = class.and_then(|class| self.host.class(class)) else { return Ok(None) };
        let mut keys = hashes.iter().rev().map(|hash| Key { namespace, hash: *hash });
        let last = keys.find(|key| table.slots.knows(*key) && table.slots.resident(*key).is_none());
        Ok(last.map(|key| self.waiters.add(None, &[key])))
    }

    /// The reads of a batch ended: one outcome for each block. Returns how many are resident in host because of it.
    pub fn finish_promote(&mut self, batch: PromoteBatch, outcomes: &[Promoted], now: Millis) -> usize {
        let mut arrived = 0;
        self.disk.promoting -= batch.items.len();
        self.disk.read_at = Some(now);
        let class = batch.class;
        let mut sources = Vec::with_capacity(batch.items.len());
        for (item, outcome) in batch.items.into_iter().zip(outcomes) {
            let host = self.host.class_mut(class).expect("slots are reserved in it");
            let alive = self.registry.namespace(item.key.namespace).is_some();
            let committed = if *outcome == Promoted::Arrived && alive {
                host.slots.commit(item.target, now)
            } else {
                host.slots.abandon(item.target, now);
                false
            };
            arrived += usize::from(committed);
            self.waiters.settle(item.key, committed);
            sources.push((item.source, *outcome));
        }
        let disk = self.disk.tier.class_mut(class).expect("its slots are being read");
        let corrupt = sources.iter().filter(|(_, outcome)| *outcome == Promoted::Corrupt);
        disk.slots.condemn(corrupt.map(|(source, _)| source), now);
        sources.into_iter().for_each(|(source, _)| disk.slots.end_copy(source, now));
        self.settle_fills(now);
        self.sweep();
        arrived
    }
}
