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
mod engine;
mod frequency;
mod key;
mod lease;
mod offload;
mod onboard;
mod peers;
mod pins;
mod policy;
mod pools;
mod promote;
mod quotas;
mod registry;
mod replay;
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
pub use engine::{
    Copied, EngineAsks, EngineId, EngineMatch, EngineOwner, EnginePool, EnginePoolIdentity, EnginePoolMode,
    Filled, FoundHold, LeasePin, LoadBatch, StagedSlot, StoreBatch, StoreBlock, StoreCopy, StoreId, Verdict,
};
pub use key::{Key, KeyHasher, NamespaceId};
pub use kvbm_hash::Retention;
pub use lease::{LeaseId, Matched};
pub use offload::OffloadBatch;
pub use onboard::{OnboardBatch, OnboardFrom, OnboardPart};
pub use peers::{PEER_LEASE_MAX, PeerPool};
pub use pins::{PinId, PinInfo, PinWhat, Pinned};
pub use policy::{PolicyKind, UnknownPolicy};
pub use pools::{Held, PoolEntry};
pub use promote::{PrefixFound, PromoteBatch, PromoteCopy, Promoted};
pub use quotas::{Quotas, TenantQuota, TenantUsage, TierQuota};
pub use registry::{Namespace, Session, SessionId};
pub use replay::Stored;
pub use segments::{Class, ClassSummary, Place, SegmentId, SegmentTier, SlotsIn};
pub use slots::{Committed, SlotCounts, SlotIndex};
pub use waiters::{ArrivalReport, WaiterId};

use crate::error::Refused;
use crate::event::{Event, EventKind};
use crate::tier::Tier;
use engine::Engines;
use lease::Leases;
use pins::Pins;
use quotas::Tenants;
use registry::Registry;
use slots::{Change, TableRules};
use waiters::Waiters;

/// Milliseconds on the caller's monotonic clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

/// Processes that may map the same memory: a user id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(pub u32);

/// One block that its writer declares complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitBlock {
    /// Where it is.
    pub block: BlockRef,
    /// Its key.
    pub hash: SequenceHash,
    /// Key of the block before it.
    pub parent: Option<SequenceHash>,
    /// How it is to be kept; `None`: as any other, or as it is if it is there already.
    pub retention: Option<Retention>,
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
    /// Only blocks of this retention priority or more go to host, and only behind a prefix that does. 0..=100.
    pub offload_priority_min: u8,
    /// Flow to disk.
    pub disk: DiskRules,
    /// Which block goes first among those of equal right.
    pub policy: PolicyKind,
    /// What tenants may have.
    pub quotas: Quotas,
    /// Bytes that pins of one namespace may hold.
    pub pin_budget_bytes: u64,
    /// How long blocks are copied out of the pool of a dead engine.
    pub rescue: Duration,
    /// How long a block waits for shards that nobody has begun to copy.
    pub shard_wait: Duration,
    /// There is one trust domain and will be no other: engines are given host segments before anything is in them.
    pub one_domain: bool,
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
    /// Offloads given up because what would have had to go was worth more.
    pub host_not_admitted: u64,
    /// Offloads given up because the block, or one before it, is of too low a priority for host memory.
    pub offloads_unimportant: u64,
    /// Grants that could not be given in full.
    pub grants_short: u64,
    /// Leases that ended by their deadline.
    pub leases_expired: u64,
    /// What became of blocks that engines stored, by [`Verdict::index`].
    pub store_verdicts: [u64; Verdict::ALL.len()],
    /// Blocks of engines that were given up on their way to host: a copy failed, or a shard or the block before is missing.
    pub store_drops: u64,
    /// Blocks whose shards did not all come in time.
    pub shards_late: u64,
    /// Dead engines of whose pools there was something to rescue.
    pub rescues: u64,
    /// Blocks that arrived from pools of dead engines.
    pub rescued: u64,
    /// Blocks that were left behind in such pools when the time was up.
    pub rescue_left: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    config: LedgerConfig,
    rules: TableRules,
    tenants: Tenants,
    registry: Registry,
    pools: BTreeMap<PoolId, DevicePool>,
    last_pool: u32,
    /// Bytes of a block of each base namespace, as its first pool declared them.
    strides: HashMap<(TrustDomain, [u8; 32]), usize>,
    host: SegmentTier,
    disk: disk::Disk,
    engines: Engines,
    leases: Leases,
    pins: Pins,
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
        let rules = TableRules { hasher: KeyHasher::new(config.secret), policy: config.policy };
        Self {
            rules,
            tenants: Tenants::new(config.quotas.clone()),
            registry: Registry::default(),
            pools: BTreeMap::new(),
            last_pool: 0,
            strides: HashMap::new(),
            host: SegmentTier::new(Some(SlotsIn::bytes(0)), rules),
            disk: disk::Disk::new(config.disk, rules),
            engines: Engines::default(),
            leases: Leases::default(),
            pins: Pins::default(),
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
        self.engine_session_silent(session);
    }

    /// Its process is dead (or handed everything back): its leases end, its pools wait for a successor.
    pub fn session_dead(&mut self, session: SessionId, now: Millis) {
        for lease in self.leases.of_session(session) {
            match self.leases.get(lease).and_then(|lease| lease.engine.as_ref()) {
                Some(_) => self.withdraw_lease(lease, now),
                None => self.end_lease(lease, now),
            }
        }
        self.engine_session_dead(session, now);
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
        now: Millis,
    ) -> Result<NamespaceId, Refused> {
        let id = self.registry.register(session, digest, base, tenant, model)?;
        // What an earlier life of the daemon left of it had no tenant until now.
        let group = self.registry.namespace(id).map(|known| self.tenants.group_of(&known.tenant));
        if let Some(group) = group.filter(|group| self.registry.set_group(id, *group)) {
            self.regroup(id, group, now);
        }
        Ok(id)
    }

    /// Whether a session may use a namespace: only if it registered it.
    pub fn may_use(&self, session: SessionId, namespace: NamespaceId) -> Result<(), Refused> {
        self.registry.namespace_of(session, namespace).map(|_| ())
    }

    /// A connected session that registered a namespace.
    pub fn user_of(&self, namespace: NamespaceId) -> Option<SessionId> {
        self.registry.user_of(namespace)
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

    /// As [`Ledger::add_segment`], of memory on a node of the machine's, if that is known.
    pub fn add_segment_on(&mut self, segment: SegmentId, node: Option<u32>) {
        if let Some(node) = node {
            self.host.set_node(segment, node);
        }
        self.host.add_segment(segment);
    }

    /// On which node of the machine's memory a host segment is, if that is known.
    pub fn segment_node(&self, segment: SegmentId) -> Option<u32> {
        self.host.node_of(segment)
    }

    /// As [`Ledger::add_segment`], of memory that an earlier life of the daemon may have given to processes of a domain.
    pub fn add_segment_of(&mut self, segment: SegmentId, domain: TrustDomain) {
        self.host.expose_earlier(segment, domain);
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

    /// Bytes from block to block of a namespace; `None` as for [`Ledger::stride`].
    pub fn block_bytes(&self, namespace: NamespaceId) -> Option<u64> {
        let known = self.registry.namespace(namespace)?;
        self.stride(known.domain, known.base?).map(|stride| stride as u64)
    }

    // ---- time -------------------------------------------------------------------------------------------------------

    /// Ends what has a deadline: unused leases, pools nobody came for.
    pub fn tick(&mut self, now: Millis) {
        for lease in self.leases.expired(now) {
            self.tally.leases_expired += 1;
            self.end_lease(lease, now);
        }
        self.drop_old_orphans(now);
        self.tick_engines(now);
        self.end_pins(now);
        self.expire(now);
        self.sweep();
    }

    /// Ends priorities whose time is over. Tables see to it themselves before they evict; this is for those that do not.
    fn expire(&mut self, now: Millis) {
        self.pools.values_mut().for_each(|pool| pool.slots.expire(now));
        self.host.classes_mut().for_each(|(_, table)| table.slots.expire(now));
        self.disk.tier.classes_mut().for_each(|(_, table)| table.slots.expire(now));
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

    /// Bytes that the tables of all tiers take for what they know of their slots, free ones included, and their policies.
    pub fn metadata_bytes(&self) -> usize {
        let tiers = [Tier::Device, Tier::Host, Tier::Disk].into_iter();
        tiers.flat_map(|tier| self.tables_of(tier)).map(|(_, table)| table.metadata_bytes()).sum()
    }

    /// Slots that cannot be reused because their holder is silent.
    pub fn quarantined(&self) -> usize {
        self.pools.values().map(DevicePool::quarantined).sum::<usize>() + self.engine_quarantined()
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
        self.keep_arrivals();
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
        self.leases.check_integrity(&self.host, &self.pools);
        self.pins.check_integrity();
        self.check_engines();
        for (id, session) in self.registry.sessions() {
            for namespace in &session.namespaces {
                assert!(self.registry.namespace(*namespace).is_some(), "{id:?} holds a forgotten namespace");
            }
        }
    }
}

#[cfg(test)]
mod tests;
