//! DECIDES: which block is where, who holds it, what is copied, what is evicted.
//!
//! Pure and synchronous: it is told the time, does no I/O, touches no KV byte. Its user holds one mutex around it and
//! keeps batches at 256 blocks or less, so that nobody waits long.
//!
//! **Architecture invariant:** nothing in here knows of sockets, threads, clocks, memory addresses or files.
//!
//! What is decided is handed out as batches ([`OffloadBatch`], [`OnboardBatch`]) that carry the rights to the slots they
//! touch. A batch comes back exactly once, with its outcome, through `finish_offload` or `finish_onboard`; only then do
//! residency, events and accounts change.

#![forbid(unsafe_code)]

mod admission;
mod demote;
mod device;
mod disk;
mod key;
mod lease;
mod offload;
mod onboard;
#[expect(dead_code, reason = "the tables come next")]
mod policy;
mod pools;
mod promote;
mod registry;
mod segments;
mod slots;
mod waiters;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use kvbm_hash::SequenceHash;

pub use admission::{AdmissionRules, AdmissionTally};
pub use demote::{BatchLimit, DemoteBatch, DemoteCopy};
pub use device::{BlockRef, DevicePool, Owner, PoolId, PoolIdentity};
pub use disk::{DiskRules, FoundBlock, FoundNames, FoundSegment, FoundTables, ScrubItem, StoredBlock};
pub use key::{Key, KeyHasher, NamespaceId};
pub use lease::{LeaseId, Matched};
pub use offload::OffloadBatch;
pub use onboard::{OnboardBatch, OnboardPart};
pub use pools::{Held, PoolEntry};
pub use promote::{PrefixFound, PromoteBatch, PromoteCopy, Promoted};
pub use registry::{Namespace, Session, SessionId};
pub use segments::{Class, ClassSummary, Place, SegmentId, SegmentTier, SlotsIn};
pub use slots::{Committed, SlotCounts, SlotIndex};
pub use waiters::{ArrivalReport, WaiterId};

use crate::error::Refused;
use crate::event::{Event, EventKind};
use crate::tier::Tier;
use lease::Leases;
use registry::Registry;
use slots::Change;
use waiters::Waiters;

/// Milliseconds on the caller's monotonic clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

/// Processes that may map the same memory: a user id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(pub u32);

/// How long and how dearly a block is to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// 0..=100, higher stays longer.
    pub priority: u8,
    /// How long the priority holds after release; `None`: for ever.
    pub duration: Option<Duration>,
}

impl Default for Retention {
    fn default() -> Self {
        Self { priority: 35, duration: None }
    }
}

/// One block that its writer declares complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitBlock {
    /// Where it is.
    pub block: BlockRef,
    /// Its key.
    pub hash: SequenceHash,
    /// Key of the block before it.
    pub parent: Option<SequenceHash>,
}

/// Settings.
#[derive(Debug, Clone)]
pub struct LedgerConfig {
    /// How long an unused lease lives.
    pub lease: Duration,
    /// Pools of dead workers kept for a successor, at most.
    pub orphan_pools_max: usize,
    /// How long such a pool is kept.
    pub orphan_pool_ttl: Duration,
    /// Secret for spreading keys over buckets.
    pub secret: u64,
    /// Flow to disk.
    pub disk: DiskRules,
}

/// What happened since the start, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Commits that found their key resident already.
    pub duplicate_commits: u64,
    /// Commits and offloads whose parent was not resident.
    pub orphans: u64,
    /// Offloads given up because host memory was all in use.
    pub host_exhausted: u64,
    /// Grants that could not be given in full.
    pub grants_short: u64,
    /// Leases that ended by their deadline.
    pub leases_expired: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    config: LedgerConfig,
    hasher: KeyHasher,
    registry: Registry,
    pools: BTreeMap<PoolId, DevicePool>,
    last_pool: u32,
    /// Bytes of a block of each base namespace, as its first pool declared them.
    strides: HashMap<(TrustDomain, [u8; 32]), usize>,
    host: SegmentTier,
    disk: disk::Disk,
    leases: Leases,
    waiters: Waiters,
    /// Where the next search for blocks to offload begins: pools take turns.
    next_offload_pool: PoolId,
    tally: Tally,
    evictions_of_gone_pools: u64,
    events: Vec<Event>,
}

impl Ledger {
    /// A ledger of nothing.
    pub fn new(config: LedgerConfig) -> Self {
        let hasher = KeyHasher::new(config.secret);
        Self {
            hasher,
            registry: Registry::default(),
            pools: BTreeMap::new(),
            last_pool: 0,
            strides: HashMap::new(),
            host: SegmentTier::new(Some(SlotsIn::bytes(0)), hasher),
            disk: disk::Disk::new(config.disk, hasher),
            leases: Leases::default(),
            waiters: Waiters::default(),
            next_offload_pool: PoolId(0),
            tally: Tally::default(),
            evictions_of_gone_pools: 0,
            events: Vec::new(),
            config,
        }
    }

    // ---- sessions and namespaces ----------------------------------------------------------------------------------

    /// An engine attached.
    pub fn open_session(&mut self, domain: TrustDomain) -> SessionId {
        self.registry.open(domain)
    }

    /// Its process is alive but not connected: what it holds stays as it is, unused by others.
    pub fn session_silent(&mut self, session: SessionId) {
        self.registry.silence(session);
        for pool in self.pools.values_mut().filter(|pool| pool.owner == Owner::Session(session)) {
            pool.owner = Owner::Silent(session);
        }
    }

    /// Its process is dead (or handed everything back): its leases end, its pools wait for a successor.
    pub fn session_dead(&mut self, session: SessionId, now: Millis) {
        for lease in self.leases.of_session(session) {
            self.end_lease(lease);
        }
        for id in self.pools_of(session) {
            self.orphan_pool(id, now);
        }
        self.drop_surplus_orphans();
        self.registry.close(session);
        self.sweep();
    }

    /// Gives a session the right to a namespace.
    pub fn register_namespace(
        &mut self,
        session: SessionId,
        digest: [u8; 32],
        base: [u8; 32],
        tenant: &str,
        model: &str,
    ) -> Result<NamespaceId, Refused> {
        self.registry.register(session, digest, base, tenant, model)
    }

    /// Sessions and namespaces, to look at.
    pub fn sessions(&self) -> impl Iterator<Item = (&SessionId, &Session)> {
        self.registry.sessions()
    }

    /// All namespaces.
    pub fn namespaces(&self) -> impl Iterator<Item = (&NamespaceId, &Namespace)> {
        self.registry.namespaces()
    }

    /// A namespace.
    pub fn namespace(&self, id: NamespaceId) -> Option<&Namespace> {
        self.registry.namespace(id)
    }

    // ---- host memory ------------------------------------------------------------------------------------------------

    /// Populated memory is there to be used.
    pub fn add_segment(&mut self, segment: SegmentId) {
        self.host.add_segment(segment);
    }

    /// The host tier by class.
    pub fn host_summaries(&self) -> Vec<ClassSummary> {
        self.host.summaries()
    }

    /// Slots of a size in each host segment.
    pub fn host_slots_in(&self, stride: usize) -> u32 {
        self.host.slots_in(stride)
    }

    /// Segments that no class owns.
    pub fn free_segments(&self) -> usize {
        self.host.free_segments()
    }

    /// Decides, before the first segment, how segments are cut; `None`: there will be none.
    pub fn set_segments(&mut self, slots_in: Option<SlotsIn>) {
        self.host.set_up(slots_in);
    }

    /// Bytes from block to block of a base namespace; `None` if no pool of it was ever opened.
    pub fn stride(&self, domain: TrustDomain, base: [u8; 32]) -> Option<usize> {
        self.strides.get(&(domain, base)).copied()
    }

    // ---- time -------------------------------------------------------------------------------------------------------

    /// Ends what has a deadline: unused leases, pools nobody came for.
    pub fn tick(&mut self, now: Millis) {
        for lease in self.leases.expired(now) {
            self.tally.leases_expired += 1;
            self.end_lease(lease);
        }
        self.drop_old_orphans(now);
        self.sweep();
    }

    // ---- accounts -----------------------------------------------------------------------------------------------------

    /// What happened so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Leases alive.
    pub fn leases(&self) -> usize {
        self.leases.len()
    }

    /// Blocks evicted in a tier, ever.
    pub fn evictions(&self, tier: Tier) -> u64 {
        match tier {
            Tier::Device => {
                let living: u64 = self.pools.values().map(|pool| pool.slots.evictions()).sum();
                living + self.evictions_of_gone_pools
            }
            Tier::Host => self.host.classes().map(|(_, table)| table.slots.evictions()).sum(),
            Tier::Disk => self.disk.tier.classes().map(|(_, table)| table.slots.evictions()).sum(),
            Tier::Remote => 0,
        }
    }

    /// Slots that cannot be reused because their holder is silent.
    pub fn quarantined(&self) -> usize {
        self.pools.values().map(DevicePool::quarantined).sum()
    }

    /// Everything resident, parents before children.
    pub fn residents(&self) -> Vec<Event> {
        [Tier::Device, Tier::Host, Tier::Disk].into_iter().flat_map(|tier| self.residents_of(tier)).collect()
    }

    fn residents_of(&self, tier: Tier) -> Vec<Event> {
        let mut events = Vec::new();
        let mut list = |pool, slots: &slots::SlotTable| {
            events.extend(slots.residents().into_iter().map(|(_, key, parent)| {
                let kind = EventKind::Stored { namespace: key.namespace, key: key.hash, parent };
                Event { tier, pool, kind }
            }));
        };
        match tier {
            Tier::Device => {
                let living = self.pools.iter().filter(|(_, pool)| pool.owner != Owner::Retired);
                living.for_each(|(id, pool)| list(Some(*id), &pool.slots));
            }
            Tier::Host => self.host.classes().for_each(|(_, table)| list(None, &table.slots)),
            Tier::Disk => self.disk.tier.classes().for_each(|(_, table)| list(None, &table.slots)),
            Tier::Remote => {}
        }
        events
    }

    /// Segments of a tier that were bound to a class since the last call: what was in them is void.
    pub fn take_bound(&mut self, tier: Tier) -> Vec<(SegmentId, Class)> {
        match tier {
            Tier::Host => self.host.take_bound(),
            Tier::Disk => self.disk.tier.take_bound(),
            Tier::Device | Tier::Remote => Vec::new(),
        }
    }

    /// Residency changes since the last call, in order.
    pub fn take_events(&mut self) -> &mut Vec<Event> {
        self.sweep();
        &mut self.events
    }

    /// Carries changes from the slot tables into namespace accounts and events: the only place that does.
    fn sweep(&mut self) {
        let Self { pools, host, disk, registry, events, .. } = self;
        let mut note = |tier, pool, change| {
            let kind = match change {
                Change::Stored(Key { namespace, hash }, parent) => {
                    registry.stored(namespace, tier);
                    EventKind::Stored { namespace, key: hash, parent }
                }
                Change::Removed(Key { namespace, hash }) => {
                    registry.removed(namespace, tier);
                    EventKind::Removed { namespace, key: hash }
                }
            };
            events.push(Event { tier, pool, kind });
        };
        for (id, pool) in pools.iter_mut() {
            pool.slots.take_changes().for_each(|change| note(Tier::Device, Some(*id), change));
        }
        for (_, table) in host.classes_mut() {
            table.slots.take_changes().for_each(|change| note(Tier::Host, None, change));
        }
        for (_, table) in disk.tier.classes_mut() {
            table.slots.take_changes().for_each(|change| note(Tier::Disk, None, change));
        }
    }

    /// Panics if an invariant does not hold. O(everything).
    pub fn check_integrity(&self) {
        self.host.check_integrity();
        self.disk.tier.check_integrity();
        for pool in self.pools.values() {
            pool.slots.check_integrity();
        }
        self.leases.check_integrity(&self.host);
        for (id, session) in self.registry.sessions() {
            for namespace in &session.namespaces {
                assert!(self.registry.namespace(*namespace).is_some(), "{id:?} holds a forgotten namespace");
            }
        }
    }
}

#[cfg(test)]
mod tests;
