//! The scheduler's [`Cache`] over a [`DeviceCache`]: the daemon's pool, or a private one.
//!
//! The two agree on who owns a block and on what each event means. What is adapted is `Exhausted`; see [`Shortage`].

use std::collections::HashMap;
use std::sync::Arc;

use kvbm_connector::{
    Allocate as Given, CacheEvent as Reported, CacheState, DeviceCache, LeaseId as DaemonLease,
    WorkerRegistration,
};
use kvbm_hash::{Namespace, SequenceHash};
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
    shortage: Shortage,
    leases: Leases,
}

impl PoolCache {
    pub fn new(inner: DeviceCache, listing: Listing) -> Self {
        Self { inner, listing, shortage: Shortage::default(), leases: Leases::default() }
    }
}

impl Cache for PoolCache {
    fn lookup(&mut self, ticket: Ticket, namespace: Namespace, keys: Vec<SequenceHash>) {
        self.inner.lookup(ticket.0, namespace, keys);
    }

    fn allocate(&mut self, count: usize) -> Allocate {
        let enough = self.inner.table().free_count() >= count;
        let answer = if enough || self.inner.state() == CacheState::Detached {
            self.inner.allocate(count)
        } else {
            self.shortage.ask(|| self.inner.allocate(count))
        };
        match answer {
            Given::Blocks(blocks) => Allocate::Blocks(blocks.into_iter().map(BlockId).collect()),
            Given::Pending => Allocate::Pending,
            Given::Exhausted => Allocate::Exhausted,
        }
    }

    fn onboard(&mut self, ticket: Ticket, lease: LeaseId, targets: Vec<BlockId>) {
        let lease = self.leases.take(lease);
        self.inner.onboard(ticket.0, lease, indices(&targets));
    }

    fn commit(
        &mut self,
        block: BlockId,
        namespace: Namespace,
        key: SequenceHash,
        parent: Option<SequenceHash>,
    ) {
        self.inner.commit(block.0, namespace, key, parent);
    }

    fn release(&mut self, blocks: Vec<BlockId>) {
        self.shortage.released();
        self.inner.release(&indices(&blocks));
    }

    fn abandon_lease(&mut self, lease: LeaseId) {
        let lease = self.leases.take(lease);
        self.inner.abandon_lease(lease);
    }

    fn abandon(&mut self, ticket: Ticket) {
        self.shortage.released();
        self.inner.abandon(ticket.0);
    }

    fn poll(&mut self) -> Vec<CacheEvent> {
        if let Some(worker) = self.listing.0.lock().take() {
            self.inner.set_worker(Some(worker));
        }
        let reported = self.inner.poll();
        self.shortage.new_turn();
        reported.into_iter().filter_map(|event| self.translate(event)).collect()
    }
}

impl PoolCache {
    fn translate(&mut self, event: Reported) -> Option<CacheEvent> {
        match event {
            Reported::Looked { ticket, device, host_blocks, disk_blocks, lease } => {
                Some(CacheEvent::Looked {
                    ticket: Ticket(ticket),
                    device: device.into_iter().map(BlockId).collect(),
                    host_blocks: host_blocks as usize,
                    disk_blocks: disk_blocks as usize,
                    lease: lease.map(|lease| self.leases.add(lease)),
                })
            }
            Reported::Granted => Some(CacheEvent::Granted),
            Reported::Onboarded { ticket, ok } => {
                self.shortage.released();
                let outcome = if ok { Onboard::Done } else { Onboard::Failed };
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

/// Whether it is certain that there are no blocks.
///
/// A device cache says `Exhausted` once for each answer of the daemon that gave too little; whoever asks next makes it
/// ask the daemon again and hears `Pending`. The scheduler asks for several sequences in a turn, and takes a victim's
/// blocks for the one that hears `Exhausted`, if there is a younger one. So two things have to hold:
///
/// * What one sequence was told is told to the others in the same turn. Otherwise the youngest, which has nobody to take
///   blocks from, could hear `Exhausted` in every turn, all others `Pending`, and nothing would ever move.
/// * It is said only of questions that followed all releases. Otherwise more is taken than is missing.
#[derive(Debug, Default)]
struct Shortage {
    certain: bool,
    released_since_asked: bool,
}

impl Shortage {
    fn ask(&mut self, mut allocate: impl FnMut() -> Given) -> Given {
        if self.certain {
            return Given::Exhausted;
        }
        let mut answer = allocate();
        if answer == Given::Exhausted && self.released_since_asked {
            // From here on a question follows the releases.
            self.released_since_asked = false;
            answer = allocate();
        }
        self.certain = answer == Given::Exhausted;
        answer
    }

    fn released(&mut self) {
        (self.certain, self.released_since_asked) = (false, true);
    }

    fn new_turn(&mut self) {
        self.certain = false;
    }
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

    /// Answers as a device cache does whose daemon has nothing to give.
    fn one_shot() -> impl FnMut() -> Given {
        let mut answers = [Given::Pending, Given::Exhausted].into_iter().cycle();
        move || answers.next().unwrap()
    }

    #[test]
    fn all_sequences_of_a_turn_hear_the_same() {
        let (mut shortage, mut allocate) = (Shortage::default(), one_shot());
        for _ in 0..3 {
            shortage.new_turn();
            assert_eq!(
                [(); 3].map(|()| shortage.ask(&mut allocate)),
                [Given::Pending, Given::Exhausted, Given::Exhausted]
            );
            shortage.new_turn();
            assert_eq!(shortage.ask(&mut allocate), Given::Pending);
            shortage.new_turn();
            assert_eq!([(); 2].map(|()| shortage.ask(&mut allocate)), [Given::Exhausted, Given::Exhausted]);
        }
    }

    #[test]
    fn a_release_is_taken_into_account_before_it_is_certain() {
        let (mut shortage, mut allocate) = (Shortage::default(), one_shot());
        assert_eq!(shortage.ask(&mut allocate), Given::Pending);
        shortage.released();
        shortage.new_turn();
        assert_eq!(shortage.ask(&mut allocate), Given::Pending, "the answer was under way at the release");
        shortage.new_turn();
        assert_eq!(shortage.ask(&mut allocate), Given::Exhausted);
        shortage.released();
        assert_eq!(shortage.ask(&mut allocate), Given::Pending, "it is certain only until a release");
    }

    #[test]
    fn a_private_pool_keeps_the_contract() {
        let inner = DeviceCache::private(PoolLayout { block_bytes: 4096, block_count: 3 }).unwrap();
        let mut cache = PoolCache::new(inner, Listing::default());
        let namespace = Namespace([7; 32]);
        let keys = sequence_hashes(namespace, 16, &[1; 48]);
        let Allocate::Blocks(blocks) = cache.allocate(3) else { panic!("all are free") };
        assert_eq!(cache.allocate(1), Allocate::Exhausted);
        cache.commit(blocks[0], namespace, keys[0], None);
        cache.commit(blocks[1], namespace, keys[1], Some(keys[0]));
        cache.release(blocks.clone());
        cache.lookup(Ticket(1), namespace, keys.clone());
        let found = |ticket| CacheEvent::Looked {
            ticket,
            device: blocks[..2].to_vec(),
            host_blocks: 0,
            disk_blocks: 0,
            lease: None,
        };
        assert_eq!(cache.poll(), [found(Ticket(1))]);
        assert_eq!(cache.allocate(2), Allocate::Exhausted, "what a lookup gave is not taken away");
        assert_eq!(cache.allocate(1), Allocate::Blocks(vec![blocks[2]]));
        cache.release(blocks[..2].to_vec());
        cache.lookup(Ticket(2), namespace, keys);
        cache.abandon(Ticket(2));
        assert_eq!(cache.poll(), []);
        let Allocate::Blocks(all) = cache.allocate(2) else { panic!("nothing is held but one block") };
        cache.release(all);
    }
}
