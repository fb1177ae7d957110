//! Which of the blocks that may go goes first.
//!
//! A table decides who has a right to stay: pins, tenants' shares, priorities. Blocks of equal right wait in one queue,
//! and a policy decides the order within a queue. It sees slot numbers, fingerprints of keys and the shape of the tree
//! of prefixes; never a key, a byte or a tenant. One instance serves one table, so that what it learns about reuse in one
//! queue helps in all of them.
//!
//! The table sees to it that only leaves are offered: a block goes before the blocks in front of it.

mod gittins;
mod kind;
mod lru;
mod s3fifo;
#[cfg(test)]
mod tests;

use std::fmt::Debug;

use super::Millis;
use super::slots::SlotIndex;

pub use gittins::Gittins;
pub use kind::{PolicyKind, UnknownPolicy};
pub use lru::Lru;
pub use s3fifo::S3Fifo;

/// Blocks of equal right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId(pub u16);

/// A block that became resident.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Newcomer {
    /// Stands for the key: the same whenever the same block comes back.
    pub fingerprint: u64,
    /// The block before it, resident in the same table.
    pub parent: Option<SlotIndex>,
    /// Blocks from the first of the sequence to this one, at least 1.
    pub depth: u32,
}

/// Order of eviction. Times never go backwards.
pub trait Policy: Debug + Send {
    /// Slots up to this number exist from now on.
    fn grow(&mut self, slots: u32);

    /// A block became resident in a slot. Counts as a use.
    fn stored(&mut self, slot: SlotIndex, block: Newcomer, now: Millis);

    /// A request found the blocks up to this one. It is a use of all blocks before it too, of which the policy is not
    /// told one by one: they matter only once their children are gone.
    fn used(&mut self, slot: SlotIndex, now: Millis);

    /// The last who held the block let go of it, or its priority ended. No further use of it.
    fn released(&mut self, _slot: SlotIndex, _now: Millis) {}

    /// Nobody holds the block and no child hangs on it: it may be chosen, as one of `queue`.
    fn offered(&mut self, slot: SlotIndex, queue: QueueId, now: Millis);

    /// It may not be chosen any more. Does nothing if it was not offered.
    fn withdrawn(&mut self, slot: SlotIndex);

    /// The one that goes first; `None` if nothing is offered in the queue. Stays offered until it is withdrawn.
    fn victim(&mut self, queue: QueueId, now: Millis) -> Option<SlotIndex>;

    /// The block left its slot: chosen to make room (`evicted`), or for another reason. It was withdrawn before.
    fn removed(&mut self, slot: SlotIndex, evicted: bool, now: Millis);

    /// Whether a newcomer is worth the eviction of `victim`, which is of equal right. Asked only where the newcomer may
    /// be left out, before each block of it.
    fn admits(&mut self, _newcomer: &Newcomer, _victim: SlotIndex, _now: Millis) -> bool {
        true
    }

    /// A block of a request was not stored: it was not admitted, or it is behind one that was not, or there was no
    /// room. Told so that the policy can learn from blocks that it did not want.
    fn left_out(&mut self, _fingerprint: u64, _depth: u32, _now: Millis) {}

    /// Bytes of memory it takes.
    fn bytes(&self) -> usize;

    /// Panics if what the policy keeps contradicts itself. O(everything).
    fn check_integrity(&self) {}
}
