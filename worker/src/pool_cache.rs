//! The scheduler's [`Cache`] over a [`DeviceCache`]: the daemon's pool, or a private one.
//!
//! The two agree on who owns a block, on what each event means, and on when a pool is exhausted: only names are adapted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_connector::{
    Allocate as Given, CacheEvent as Reported, DeviceCache, LeaseId as DaemonLease, WorkerRegistration,
};
use kvbm_hash::{Namespace, Retention, SequenceHash};
use parking_lot::Mutex;

use crate::{Allocate, BlockId, Cache, CacheEvent, LeaseId, Onboard, Ticket};

/// A change of how the worker is listed, on its way to the thread that owns the cache.
#[derive(Clone, Default)]
pub(crate) struct Listing(Arc<Mutex<Option<WorkerRegistration>>>);

impl Listing {
    /// Takes effect with the cache's next poll: ring its bell.
    pub fn change(&self, worker: WorkerRegistration) {
        *self.0.lock() = Some(worker);
    }
}

/// See the module.
pub(crate) struct PoolCache {
    inner: DeviceCache,
    listing: Listing,
    leases: Leases,
    /// When each onboard was asked for that has not ended.
    onboards: HashMap<u64, Instant>,
}

impl PoolCache {
    pub fn new(inner: DeviceCache, listing: Listing) -> Self {
        Self { inner, listing, leases: Leases::default(), onboards: HashMap::new() }
    }
}

impl Cache for PoolCache {
    fn lookup(
        &mut self,
        ticket: Ticket,
        namespace: Namespace,
        keys: Vec<SequenceHash>,
        retention: Vec<Option<Retention>>,
    ) {
        self.inner.lookup(ticket.0, namespace, keys, retention);
    }

    fn allocate(&mut self, count: usize) -> Allocate {
        match self.inner.allocate(count) {
            Given::Blocks(blocks) => Allocate::Blocks(blocks.into_iter().map(BlockId).collect()),
            Given::Pending => Allocate::Pending,
            Given::Exhausted => Allocate::Exhausted,
        }
    }

    fn onboard(&mut self, ticket: Ticket, lease: LeaseId, targets: Vec<BlockId>) {
        let lease = self.leases.take(lease);
        self.onboards.insert(ticket.0, Instant::now());
        self.inner.onboard(ticket.0, lease, indices(&targets));
    }

    fn commit(
        &mut self,
        block: BlockId,
        namespace: Namespace,
        key: SequenceHash,
        parent: Option<SequenceHash>,
        retention: Retention,
    ) {
        self.inner.commit(block.0, namespace, key, parent, retention);
    }

    fn release(&mut self, blocks: Vec<BlockId>) {
        self.inner.release(&indices(&blocks));
    }

    fn abandon_lease(&mut self, lease: LeaseId) {
        let lease = self.leases.take(lease);
        self.inner.abandon_lease(lease);
    }

    fn abandon(&mut self, ticket: Ticket) {
        self.onboards.remove(&ticket.0);
        self.inner.abandon(ticket.0);
    }

    fn poll(&mut self) -> Vec<CacheEvent> {
        if let Some(worker) = self.listing.0.lock().take() {
            self.inner.set_worker(Some(worker));
        }
        self.inner.poll().into_iter().filter_map(|event| self.translate(event)).collect()
    }
}

impl PoolCache {
    fn translate(&mut self, event: Reported) -> Option<CacheEvent> {
        match event {
            // What is on disk still is computed: it was waited for once, or could not be used.
            Reported::Looked { ticket, device, host_blocks, promoted_blocks, disk_blocks: _, lease } => {
                Some(CacheEvent::Looked {
                    ticket: Ticket(ticket),
                    device: device.into_iter().map(BlockId).collect(),
                    host_blocks: host_blocks as usize,
                    promoted_blocks: promoted_blocks as usize,
                    lease: lease.map(|lease| self.leases.add(lease)),
                })
            }
            Reported::Promoting { ticket } => Some(CacheEvent::Promoting { ticket: Ticket(ticket) }),
            Reported::Granted => Some(CacheEvent::Granted),
            Reported::Onboarded { ticket, ok } => {
                let took = self.onboards.remove(&ticket).map_or(Duration::ZERO, |begin| begin.elapsed());
                let outcome = if ok { Onboard::Done(took) } else { Onboard::Failed };
                Some(CacheEvent::Onboarded { ticket: Ticket(ticket), outcome })
            }
            Reported::Attached { pool_id } => {
                tracing::info!(pool_id, "the daemon decides about the pool");
                None
            }
            Reported::Detached { reason } => {
                tracing::warn!(%reason, "going on without the daemon");
                None
            }
        }
    }
}

fn indices(blocks: &[BlockId]) -> Vec<u32> {
    blocks.iter().map(|block| block.0).collect()
}

/// The scheduler's names of leases. Each is used up once, by an onboard or by being abandoned.
#[derive(Default)]
struct Leases {
    held: HashMap<LeaseId, DaemonLease>,
    last: u64,
}

impl Leases {
    fn add(&mut self, lease: DaemonLease) -> LeaseId {
        self.last += 1;
        self.held.insert(LeaseId(self.last), lease);
        LeaseId(self.last)
    }

    fn take(&mut self, lease: LeaseId) -> DaemonLease {
        self.held.remove(&lease).expect("a lease is onboarded or abandoned once")
    }
}

#[cfg(test)]
mod tests {
    use kvbm_hash::sequence_hashes;
    use kvbm_shm::PoolLayout;

    use super::*;

    #[test]
    fn a_private_pool_keeps_the_contract() {
        let inner = DeviceCache::private(PoolLayout { block_bytes: 4096, block_count: 3 }).unwrap();
        let mut cache = PoolCache::new(inner, Listing::default());
        let namespace = Namespace([7; 32]);
        let keys = sequence_hashes(namespace, 16, &[1; 48]);
        let Allocate::Blocks(blocks) = cache.allocate(3) else { panic!("all are free") };
        assert_eq!(cache.allocate(1), Allocate::Exhausted);
        cache.commit(blocks[0], namespace, keys[0], None, Retention::default());
        cache.commit(blocks[1], namespace, keys[1], Some(keys[0]), Retention::default());
        cache.release(blocks.clone());
        cache.lookup(Ticket(1), namespace, keys.clone(), vec![]);
        let found = |ticket| CacheEvent::Looked {
            ticket,
            device: blocks[..2].to_vec(),
            host_blocks: 0,
            promoted_blocks: 0,
            lease: None,
        };
        assert_eq!(cache.poll(), [found(Ticket(1))]);
        assert_eq!(cache.allocate(2), Allocate::Exhausted, "what a lookup gave is not taken away");
        assert_eq!(cache.allocate(1), Allocate::Blocks(vec![blocks[2]]));
        cache.release(blocks[..2].to_vec());
        cache.lookup(Ticket(2), namespace, keys, vec![]);
        cache.abandon(Ticket(2));
        assert_eq!(cache.poll(), []);
        let Allocate::Blocks(all) = cache.allocate(2) else { panic!("nothing is held but one block") };
        cache.release(all);
    }
}
