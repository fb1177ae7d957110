//! SIEVE: a hand walks from old to young and takes the first that was not used since it last came by.

use super::Pool;
use super::lists::Lists;
use crate::replay::trace::BlockId;

#[derive(Debug)]
pub(super) struct Sieve {
    capacity: usize,
    /// The oldest first.
    lists: Lists,
    used: Vec<bool>,
    hand: Option<BlockId>,
}

impl Sieve {
    pub(super) fn new(capacity: usize, unique: usize) -> Self {
        Self { capacity, lists: Lists::new(1, unique), used: vec![false; unique], hand: None }
    }
}

impl Pool for Sieve {
    fn contains(&self, block: BlockId) -> bool {
        self.lists.holds(block)
    }

    fn touch(&mut self, block: BlockId) {
        self.used[block.at()] = true;
    }

    fn insert(&mut self, block: BlockId) {
        while self.lists.len(0) >= self.capacity {
            let mut at = self.hand.or(self.lists.first(0)).expect("it is full");
            while std::mem::take(&mut self.used[at.at()]) {
                at = self.lists.after(at).or(self.lists.first(0)).expect("it is full");
            }
            self.hand = self.lists.after(at);
            self.lists.remove(at);
        }
        self.used[block.at()] = false;
        self.lists.push_back(0, block);
    }
}
