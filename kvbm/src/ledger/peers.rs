//! Blocks of one device pool copied into another, without a detour over host memory.
//!
//! A pool is a source while its writer is connected, or dead: one that is silent may be reusing blocks on its own. Whoever
//! copies reads the writer's epoch again afterwards, as for every copy out of a pool. A lease on blocks of a pool holds the
//! deepest one as a copy in flight does, since pins belong to the pool's writer and go with it.

use std::time::Duration;

use super::lease::Lease;
use super::slots::Copying;
use super::{
    Class, DevicePool, Key, LeaseId, Ledger, Millis, NamespaceId, Owner, PoolId, Retention, SessionId,
};
use crate::error::Refused;

/// How long a lease on blocks of another pool may live unused: its writer may be waiting for the room.
pub const PEER_LEASE_MAX: Duration = Duration::from_secs(2);

/// The pool that a lease is about, if it is not about host memory.
#[derive(Debug)]
pub(super) struct PeerSource {
    pub pool: PoolId,
    /// Holds the deepest block.
    pub hold: Copying,
}

/// Where the blocks of an onboard come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerPool {
    /// Which pool.
    pub pool: PoolId,
    /// Its writer's epoch: if it has moved when the copy has ended, what was copied does not count.
    pub epoch: u64,
}

/// What is looked for in other pools.
#[derive(Debug, Clone, Copy)]
pub(super) struct PeerAsk<'a> {
    pub session: SessionId,
    pub namespace: NamespaceId,
    pub class: Class,
    pub hashes: &'a [kvbm_hash::SequenceHash],
    pub retention: &'a [Option<Retention>],
    /// The pool that asks.
    pub into: PoolId,
    /// Leading blocks that it has.
    pub in_device: usize,
    /// Leading blocks that host memory has: only more than those are of use.
    pub in_host: usize,
}

impl DevicePool {
    pub(super) fn is_source(&self) -> bool {
        matches!(self.owner, Owner::Session(_) | Owner::Orphan(_))
    }
}

impl Ledger {
    /// Whoever copies can copy between two pools directly, both ways.
    pub fn connect_pools(&mut self, a: PoolId, b: PoolId) {
        for (one, other) in [(a, b), (b, a)] {
            if let Some(pool) = self.pools.get_mut(&one) {
                pool.peers.insert(other);
            }
        }
    }

    /// A lease on the longest prefix that another pool has, and its length, if that is more than host memory has.
    pub(super) fn lease_peer(&mut self, ask: PeerAsk<'_>, now: Millis) -> Option<(usize, LeaseId)> {
        let PeerAsk { session, namespace, class, hashes, retention, into, in_device, in_host } = ask;
        if in_device.max(in_host) >= hashes.len() {
            return None;
        }
        let key = |i: usize| Key { namespace, hash: hashes[i] };
        let peers = &self.pools.get(&into)?.peers;
        let sources = peers.iter().filter_map(|id| {
            let pool = self.pools.get(id).filter(|pool| pool.is_source())?;
            let fits = (pool.identity.domain, pool.identity.layout.stride()) == (class.domain, class.stride);
            let (blocks, deepest) = fits.then(|| pool.slots.prefix(key, hashes.len()))?;
            Some((blocks, *id, deepest?))
        });
        let (blocks, from, deepest) = sources.max_by_key(|(blocks, id, _)| (*blocks, *id))?;
        if blocks <= in_device.max(in_host) {
            return None;
        }
        let pool = self.pools.get_mut(&from)?;
        // Prefixes are closed, but whether these keys are one is the client's word.
        let chain = pool.slots.chain(deepest, blocks);
        if !chain.iter().enumerate().all(|(i, slot)| pool.slots.holds(*slot, key(i))) {
            return None;
        }
        pool.slots.reuse(deepest, retention, now);
        let hold = pool.slots.begin_copy(deepest);
        let lease = Lease {
            session,
            namespace,
            class,
            deepest,
            count: blocks - in_device,
            expires: Some(Millis(now.0 + self.config.lease.min(PEER_LEASE_MAX).as_millis() as u64)),
            engine: None,
            peer: Some(PeerSource { pool: from, hold }),
        };
        Some((blocks, self.leases.add(lease)))
    }

    /// A copy of the first `count` blocks of a lease begins: the pool that they are in, and a hold on each of them.
    pub(super) fn begin_peer_copy(
        &mut self,
        source: PoolId,
        lease: LeaseId,
        count: usize,
    ) -> Result<(PeerPool, Vec<Copying>), Refused> {
        let pool = self.pools.get_mut(&source).filter(|pool| pool.is_source());
        let (Some(pool), Some(lease)) = (pool, self.leases.get(lease)) else {
            return Err(Refused::Stale { what: "lease on another pool" });
        };
        pool.batches += 1;
        let chain = pool.slots.chain(lease.deepest, lease.count);
        let holds = chain.into_iter().take(count).map(|slot| pool.slots.begin_copy(slot)).collect();
        Ok((PeerPool { pool: source, epoch: pool.epoch }, holds))
    }

    /// The copies out of a pool ended, well or not.
    pub(super) fn end_peer_copy(&mut self, source: PoolId) {
        let pool = self.pools.get_mut(&source).expect("it is kept while a batch is in flight");
        pool.batches -= 1;
        self.collect_pool(source);
    }

    /// Some blocks of a pool are not held any more by a lease or a copy.
    pub(super) fn end_peer_holds(
        &mut self,
        source: PoolId,
        holds: impl Iterator<Item = Copying>,
        now: Millis,
    ) {
        // A lease does not keep a pool that nobody uses any more.
        let Some(pool) = self.pools.get_mut(&source) else { return };
        holds.for_each(|hold| pool.slots.end_copy(hold, now));
    }

    /// Nothing begins to be copied out of a pool any more, which is on its way out.
    pub(super) fn end_peer_leases(&mut self, source: PoolId) {
        for lease in self.leases.of_peer(source) {
            // Its hold goes with the pool.
            self.leases.remove(lease);
        }
    }
}
