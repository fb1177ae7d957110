//! What the scheduler needs of a cache.

use std::time::Duration;

use kvbm_hash::{Namespace, Retention, SequenceHash};

use crate::BlockId;

/// Names a lookup or an onboard until its event; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// Names the pins on host blocks that a lookup found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LeaseId(pub u64);

/// A device pool with tiers behind it. No call blocks: answers come as [`CacheEvent`]s.
///
/// Blocks are counted references: [`Cache::allocate`] and a lookup give one for each block that they name,
/// [`Cache::release`] takes one back. A cache that has lost its daemon goes on answering, with fewer hits.
pub trait Cache {
    /// Asks for the longest prefix of `keys` that is held. [`CacheEvent::Looked`] will come, whatever happens; before
    /// it, if blocks have to come from disk, [`CacheEvent::Promoting`]. `retention` is empty, or says of each key what its
    /// block is to be kept like from now on; `None`: its priority stays.
    fn lookup(
        &mut self,
        ticket: Ticket,
        namespace: Namespace,
        keys: Vec<SequenceHash>,
        retention: Vec<Option<Retention>>,
    );

    /// Takes `count` free blocks, all or none.
    fn allocate(&mut self, count: usize) -> Allocate;

    /// Copies the lease's first `targets.len()` blocks into `targets`, which the caller allocated. The lease ends.
    /// [`CacheEvent::Onboarded`] will come. After a success the cache knows the targets by their keys: they are not
    /// committed again. After a failure it has taken them back.
    fn onboard(&mut self, ticket: Ticket, lease: LeaseId, targets: Vec<BlockId>);

    /// Tells that all KV of a block is written and will not change; others may use it from now on. References stay.
    /// `parent` is the key of the block before it in the sequence; `retention`, what the block is to be kept like.
    fn commit(
        &mut self,
        block: BlockId,
        namespace: Namespace,
        key: SequenceHash,
        parent: Option<SequenceHash>,
        retention: Retention,
    );

    /// Gives back one reference to each block.
    fn release(&mut self, blocks: Vec<BlockId>);

    /// Ends a lease that is not wanted any more.
    fn abandon_lease(&mut self, lease: LeaseId);

    /// Makes the cache itself release whatever the lookup or onboard of this ticket brings (the targets of an onboard
    /// included). Its event does not come any more.
    fn abandon(&mut self, ticket: Ticket);

    /// The events since the last call.
    fn poll(&mut self) -> Vec<CacheEvent>;
}

/// What became of an allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allocate {
    /// These blocks, one reference to each.
    Blocks(Vec<BlockId>),
    /// Some were asked for. [`CacheEvent::Granted`] will come; ask again then.
    Pending,
    /// None can be freed now. All releases up to this call have been taken into account: a cache that does not know yet
    /// what they freed answers `Pending`. Until the next poll, or release, all who ask for as many hear the same.
    Exhausted,
}

/// What a cache reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheEvent {
    /// Answer to a lookup: the blocks `[0, device)` are in the pool, the `host_blocks` behind them in host memory.
    Looked {
        /// The lookup's.
        ticket: Ticket,
        /// Blocks in the pool, one reference to each.
        device: Vec<BlockId>,
        /// Blocks that the lease pins.
        host_blocks: usize,
        /// How many of these were on disk when the lookup began: it waited for them.
        promoted_blocks: usize,
        /// There if `host_blocks` is not 0.
        lease: Option<LeaseId>,
    },
    /// A lookup waits for a drive, for a bounded time. It holds nothing until its answer comes.
    Promoting {
        /// The lookup's.
        ticket: Ticket,
    },
    /// Blocks may have become free.
    Granted,
    /// An onboard ended.
    Onboarded {
        /// The onboard's.
        ticket: Ticket,
        /// How.
        outcome: Onboard,
    },
}

/// How an onboard ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Onboard {
    /// All targets hold what was promised, so long after it was asked for.
    Done(Duration),
    /// The targets are gone.
    Failed,
}
