//! Engines that own their KV memory: their pools, what is stored from them and loaded into them.
//!
//! Such a pool is never searched: the engine's own prefix cache knows what is in it. The ledger knows which of its blocks
//! are complete (*registered*: block, generation, key), takes them to host memory, and leases host blocks to the engine.
//! An engine has one pool per rank; a host slot holds the parts of all shards of a block, and is resident when all are
//! there.
//!
//! ```text
//!   Session ── connection lost ──► Silent ── process dead ──► Rescue ── all copied, or time is up ──► Retired ──► gone
//!      │                            │                       (ipc only)                                  ▲
//!      └── opened anew ─────────────┴──► Former ── nothing of its process or of ours touches it ────────┘
//! ```
//!
//! The ledger does not see shared words. Whoever copies tells it whether a block's generation held; whoever sees the pin
//! tables tells it which rank is done with which lease.

mod fill;
mod found;
mod lease;
mod load;
mod open;
mod place;
mod plan;
mod stage;
mod store;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use kvbm_hash::SequenceHash;

use super::device::PoolId;
use super::key::{Key, NamespaceId};
use super::segments::{Class, SegmentId};
use super::{LeaseId, Millis, Retention, SessionId, TrustDomain};

pub use fill::Filled;
pub use found::FoundHold;
pub use lease::{EngineAsks, EngineMatch, LeasePin};
pub use load::LoadBatch;
pub use plan::{Copied, StoreBatch, StoreCopy};
pub use stage::StagedSlot;
pub use store::{StoreBlock, StoreId, Verdict};

pub(super) use lease::EngineLease;

/// Ranks of one engine, at most.
pub const RANKS_MAX: u32 = 64;

/// What the ranks and the scheduler half of one engine call themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EngineId(pub [u8; 16]);

/// Who copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EnginePoolMode {
    /// The daemon, which has mapped the engine's memory.
    Ipc,
    /// The engine, which has mapped the host segments of its domain.
    Staged,
}

impl EnginePoolMode {
    /// Name, as in status.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ipc => "ipc",
            Self::Staged => "staged",
        }
    }
}

/// What a pool of an engine is, from its opening on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnginePoolIdentity {
    /// Whose.
    pub engine: EngineId,
    /// Who copies.
    pub mode: EnginePoolMode,
    /// Name in the outside world.
    pub uuid: [u8; 16],
    /// Base namespace of all its blocks.
    pub base: [u8; 32],
    /// Whose processes may map host memory with its blocks.
    pub domain: TrustDomain,
    /// Bytes of this rank's part of a block.
    pub block_bytes: usize,
    /// Blocks in the pool.
    pub block_count: u32,
    /// Which part of a block, 0..`shard_count`.
    pub shard: u32,
    /// Parts of a block.
    pub shard_count: u32,
    /// Which of the engine's processes, 0..`rank_count`.
    pub rank: u32,
    /// Processes with a pool.
    pub rank_count: u32,
    /// Tokens in one block.
    pub tokens_per_block: u32,
    /// Device, for example `cpu:0`.
    pub device: String,
}

impl EnginePoolIdentity {
    /// Bytes from one host slot to the next: all shards, rounded up to a page. `None` if no memory could have them.
    pub fn stride(&self) -> Option<usize> {
        let bytes = self.block_bytes.checked_mul(self.shard_count as usize)?;
        bytes.checked_next_multiple_of(4096).filter(|stride| *stride > 0)
    }

    /// Bytes from the start of a slot to this rank's part.
    pub fn shard_offset(&self) -> usize {
        self.shard as usize * self.block_bytes
    }

    pub(super) fn class(&self) -> Class {
        Class { domain: self.domain, stride: self.stride().expect("checked when it was opened") }
    }
}

/// Whose a pool of an engine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineOwner {
    /// A session's.
    Session(SessionId),
    /// Of a session that is not connected while its process lives.
    Silent(SessionId),
    /// The process has opened it anew; of this one it may still use what it has pinned.
    Former(SessionId),
    /// Its process is dead; complete blocks are copied out, until then at the latest.
    Rescue(Millis),
    /// It goes when the last copy has ended.
    Retired,
}

/// A complete block that host memory may lack.
#[derive(Debug)]
struct Registered {
    generation: u32,
    key: Key,
    parent: Option<SequenceHash>,
    retention: Retention,
    /// Who waits for the outcome: which store, which of its blocks.
    asked: Option<(StoreId, usize)>,
    /// Rises from registration to registration.
    number: u64,
    /// It is in a batch.
    copying: bool,
}

/// See the module.
#[derive(Debug)]
pub struct EnginePool {
    /// What it is.
    pub identity: EnginePoolIdentity,
    /// Whose.
    pub owner: EngineOwner,
    /// The node of the machine's memory that its device is closest to.
    pub(super) node: Option<u32>,
    /// Host segments that its process has mapped.
    mapped: HashSet<SegmentId>,
    /// Complete blocks, by block. Each block at most once.
    registered: HashMap<u32, Registered>,
    by_key: HashMap<Key, u32>,
    /// Registered blocks to be copied, with the number of their registration. Stale entries are skipped.
    backlog: VecDeque<(u32, u64)>,
    /// Namespaces of blocks that were ever registered: kept while the pool is there.
    namespaces: HashSet<NamespaceId>,
    /// Batches of ours in flight that touch its memory.
    batches: usize,
    /// Blocks in those that go to host.
    storing: usize,
    /// Host slots that its process is writing.
    writing: usize,
    /// Entries of its pin table that stand for no slot.
    free_write_pins: Vec<u32>,
}

impl EnginePool {
    /// Complete blocks that are known and not in host memory yet.
    pub fn registered(&self) -> usize {
        self.registered.len()
    }

    /// Host slots that its process is writing.
    pub fn writing(&self) -> usize {
        self.writing
    }

    /// Batches of ours in flight that touch its memory.
    pub fn batches(&self) -> usize {
        self.batches
    }

    /// A block is to be copied. What was registered anew since it got in line is left out now and then, so that the line
    /// is not much longer than the pool.
    fn get_in_line(&mut self, block: u32, number: u64) {
        if self.backlog.len() > 2 * self.identity.block_count as usize {
            let registered = &self.registered;
            let is_current = |(block, number): &(u32, u64)| {
                registered.get(block).is_some_and(|known| known.number == *number)
            };
            self.backlog.retain(is_current);
        }
        self.backlog.push_back((block, number));
    }

    /// Takes a block out of the registered ones.
    fn forget(&mut self, block: u32) -> Option<Registered> {
        let known = self.registered.remove(&block)?;
        if self.by_key.get(&known.key) == Some(&block) {
            self.by_key.remove(&known.key);
        }
        Some(known)
    }

    /// The session that has it, connected or not.
    pub fn session(&self) -> Option<SessionId> {
        match self.owner {
            EngineOwner::Session(id) | EngineOwner::Silent(id) | EngineOwner::Former(id) => Some(id),
            EngineOwner::Rescue(_) | EngineOwner::Retired => None,
        }
    }

    fn is_open(&self) -> bool {
        matches!(self.owner, EngineOwner::Session(_) | EngineOwner::Silent(_))
    }
}

/// The processes of one engine.
#[derive(Debug)]
struct Engine {
    domain: TrustDomain,
    base: [u8; 32],
    /// Sessions that take part, with or without a pool.
    members: BTreeSet<SessionId>,
    /// Entries of the ranks' pin tables that stand for no lease: the same in each table.
    free_pins: Vec<u32>,
}

/// All engines.
#[derive(Debug, Default)]
pub(super) struct Engines {
    engines: BTreeMap<EngineId, Engine>,
    pools: BTreeMap<PoolId, EnginePool>,
    fills: fill::Fills,
    stores: store::Stores,
    /// Host segments that each session was given.
    given: HashMap<SessionId, HashSet<SegmentId>>,
    /// Leases that no rank may begin with any more: their promises are to be taken back.
    withdrawn: Vec<LeaseId>,
    /// Where the next search for blocks to store begins: pools take turns.
    next_pool: Option<PoolId>,
    /// Registrations so far.
    registrations: u64,
}

impl Engines {
    /// The engine with a base namespace that a session takes part in.
    fn of(&self, session: SessionId, base: &[u8; 32]) -> Option<EngineId> {
        let found = self.engines.iter().find(|(_, e)| e.base == *base && e.members.contains(&session));
        found.map(|(id, _)| *id)
    }

    /// Pools of an engine that are open.
    fn open_pools(&self, engine: EngineId) -> impl Iterator<Item = (PoolId, &EnginePool)> {
        let mine = move |pool: &EnginePool| pool.identity.engine == engine && pool.is_open();
        self.pools.iter().filter(move |(_, pool)| mine(pool)).map(|(id, pool)| (*id, pool))
    }

    /// The pools of all ranks; `None` while one is missing.
    fn ranks(&self, engine: EngineId) -> Option<Vec<PoolId>> {
        let mut ranks = Vec::new();
        let mut wanted = 1;
        for (id, pool) in self.open_pools(engine) {
            ranks.push(id);
            wanted = pool.identity.rank_count as usize;
        }
        (ranks.len() == wanted).then_some(ranks)
    }
}
