//! LFU: of the least frequently used the one that was used longest ago.

use std::collections::BTreeSet;

use super::Pool;
use crate::replay::trace::BlockId;

#[derive(Debug)]
pub(super) struct Lfu {
    capacity: usize,
    /// Uses and time of the last one; no uses: not in the pool.
    uses: Vec<(u32, u64)>,
    order: BTreeSet<(u32, u64, BlockId)>,
    time: u64,
}

impl Lfu {
    pub(super) fn new(capacity: usize, unique: usize) -> Self {
        Self { capacity, uses: vec![(0, 0); unique], order: BTreeSet::new(), time: 0 }
    }
}

impl Pool for Lfu {
    fn contains(&self, block: BlockId) -> bool {
        self.uses[block.at()].0 > 0
    }

    fn touch(&mut self, block: BlockId) {
        let (uses, at) = self.uses[block.at()];
        self.order.remove(&(uses, at, block));
        self.time += 1;
        self.uses[block.at()] = (uses + 1, self.time);
        self.order.insert((uses + 1, self.time, block));
    }

    fn insert(&mut self, block: BlockId) {
        while self.order.len() >= self.capacity {
            let (_, _, victim) = self.order.pop_first().expect("it is full");
            self.uses[victim.at()] = (0, 0);
        }
        self.touch(block);
    }
}
