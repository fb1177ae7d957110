//! A device pool as the ledger sees it: whose it is, and what of it still has to go to host.

use std::collections::{BTreeSet, VecDeque};

use kvbm_shm::PoolLayout;

use super::key::Key;
use super::slots::{SlotIndex, SlotTable};
use super::{Millis, SessionId, TrustDomain};

/// Number of a pool within one life of the daemon. Never reused, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PoolId(pub u32);

/// A block of a pool at one point of its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockRef {
    /// Position in the pool.
    pub block: u32,
    /// Rises each time the block is granted.
    pub generation: u32,
}

/// Offload batches that a pool's share of blocks in flight is cut into.
const BATCHES_IN_FLIGHT: usize = 4;

/// A committed block that is to go to host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Backlogged {
    pub block: BlockRef,
    pub key: Key,
}

/// Who may write into a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// A session.
    Session(SessionId),
    /// A session that is not connected while its process lives: nothing it holds is reused.
    Silent(SessionId),
    /// Nobody, since then: the process died. A successor may have it.
    Orphan(Millis),
    /// It goes when the last copy has ended.
    Retired,
}

/// What a pool is, from its opening on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolIdentity {
    /// Name in the outside world.
    pub uuid: [u8; 16],
    /// Base namespace of all its blocks.
    pub base: [u8; 32],
    /// Whose processes may map it.
    pub domain: TrustDomain,
    /// Sizes.
    pub layout: PoolLayout,
    /// Tokens in one block.
    pub tokens_per_block: u32,
    /// Device, for example `cpu:0`.
    pub device: String,
}

/// See the module.
#[derive(Debug)]
pub struct DevicePool {
    /// What it is.
    pub identity: PoolIdentity,
    /// Who writes.
    pub owner: Owner,
    /// The writer's epoch when it attached.
    pub epoch: u64,
    /// Its blocks.
    pub slots: SlotTable,
    /// Committed blocks to be offloaded, oldest first. At most one entry per commit; stale ones are skipped.
    pub(super) backlog: VecDeque<Backlogged>,
    /// Batches in flight that touch this pool.
    pub batches: usize,
    /// Blocks being copied to host.
    pub(super) offloading: usize,
    /// Onboard batches in flight.
    pub(super) onboarding: usize,
    /// The node of the machine's memory that its device is closest to.
    pub(super) node: Option<u32>,
    /// Pools between which and this one blocks can be copied directly.
    pub(super) peers: BTreeSet<PoolId>,
}

impl DevicePool {
    /// Blocks that the next offload batch may have. A block that is being copied cannot be evicted, so only a quarter
    /// of a pool is copied at a time, in a few batches, so that one is copied while another is being settled.
    pub(super) fn offload_room(&self) -> usize {
        let quarter = (self.slots.slots() / 4).max(1);
        quarter.div_ceil(BATCHES_IN_FLIGHT).min(quarter.saturating_sub(self.offloading))
    }

    /// The block at a slot, as it is now.
    pub fn block_ref(&self, slot: SlotIndex) -> BlockRef {
        BlockRef { block: slot.0, generation: self.slots.generation(slot) }
    }

    /// Slots of a silent holder that cannot be reused.
    pub fn quarantined(&self) -> usize {
        match self.owner {
            Owner::Silent(_) => {
                let counts = self.slots.counts();
                counts.filling + counts.pinned
            }
            Owner::Session(_) | Owner::Orphan(_) | Owner::Retired => 0,
        }
    }
}
