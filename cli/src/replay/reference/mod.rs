//! Known policies as one plain pool, to compare with. Not what the daemon does: blocks come and go one by one, without
//! regard to what follows them, and each request stores its last block first.
//!
//! A request finds its leading blocks that are in the pool; then all of its blocks are used or stored.

mod arc;
mod belady;
mod lfu;
mod lists;
mod s3fifo;
mod sieve;

use super::trace::{BlockId, Trace};
use lists::Lists;

/// A pool of blocks.
trait Pool {
    fn contains(&self, block: BlockId) -> bool;
    /// A block of it is used.
    fn touch(&mut self, block: BlockId);
    /// A block that is not in it is stored.
    fn insert(&mut self, block: BlockId);
}

/// Which policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reference {
    /// First in, first out.
    Fifo,
    /// Least recently used.
    Lru,
    /// Least frequently used.
    Lfu,
    /// SIEVE, NSDI'24.
    Sieve,
    /// S3-FIFO, SOSP'23.
    S3Fifo,
    /// ARC, FAST'03.
    Arc,
    /// Knows the future: what is used again latest goes first, and what is used later than all there is not stored.
    Belady,
    /// Room for everything.
    Infinite,
}

impl Reference {
    pub(super) const ALL: [Self; 8] = [
        Self::Fifo,
        Self::Lru,
        Self::Lfu,
        Self::Sieve,
        Self::S3Fifo,
        Self::Arc,
        Self::Belady,
        Self::Infinite,
    ];

    /// Whether it knows nothing but the past.
    #[cfg(test)]
    pub(super) fn is_attainable(self) -> bool {
        !matches!(self, Self::Belady | Self::Infinite)
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fifo => "reference-fifo",
            Self::Lru => "reference-lru",
            Self::Lfu => "reference-lfu",
            Self::Sieve => "reference-sieve",
            Self::S3Fifo => "reference-s3fifo",
            Self::Arc => "reference-arc",
            Self::Belady => "belady",
            Self::Infinite => "infinite",
        }
    }

    /// Leading blocks that all requests together find in a pool of `capacity` blocks.
    pub(super) fn hit_blocks(self, trace: &Trace, capacity: usize) -> u64 {
        let unique = trace.unique_blocks();
        match self {
            _ if capacity == 0 => 0,
            Self::Fifo => run(trace, Recency::new(capacity, unique, false)),
            Self::Lru => run(trace, Recency::new(capacity, unique, true)),
            Self::Lfu => run(trace, lfu::Lfu::new(capacity, unique)),
            Self::Sieve => run(trace, sieve::Sieve::new(capacity, unique)),
            Self::S3Fifo => run(trace, s3fifo::S3Fifo::new(capacity, unique)),
            Self::Arc => run(trace, arc::Arc::new(capacity, unique)),
            Self::Belady => belady::hit_blocks(trace, capacity),
            Self::Infinite => run(trace, Recency::new(unique, unique, false)),
        }
    }
}

fn run(trace: &Trace, mut pool: impl Pool) -> u64 {
    let mut hits = 0;
    for event in &trace.events {
        let blocks = trace.blocks(event);
        if event.kind.looks_up() {
            hits += blocks.iter().take_while(|block| pool.contains(**block)).count() as u64;
        }
        for block in blocks.iter().rev() {
            if pool.contains(*block) {
                pool.touch(*block);
            } else if event.kind.stores() {
                pool.insert(*block);
            }
        }
    }
    hits
}

/// LRU and FIFO: one list, the next to go first.
struct Recency {
    capacity: usize,
    lists: Lists,
    uses_count: bool,
}

impl Recency {
    fn new(capacity: usize, unique: usize, uses_count: bool) -> Self {
        Self { capacity, lists: Lists::new(1, unique), uses_count }
    }
}

impl Pool for Recency {
    fn contains(&self, block: BlockId) -> bool {
        self.lists.holds(block)
    }

    fn touch(&mut self, block: BlockId) {
        if self.uses_count {
            self.lists.push_back(0, block);
        }
    }

    fn insert(&mut self, block: BlockId) {
        while self.lists.len(0) >= self.capacity {
            self.lists.pop_front(0);
        }
        self.lists.push_back(0, block);
    }
}

#[cfg(test)]
mod tests;
