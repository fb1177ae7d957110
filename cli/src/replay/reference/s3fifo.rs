//! S3-FIFO: newcomers wait in a small queue; those used there move to the main one, the others leave a ghost, and who
//! comes back as a ghost goes to the main queue at once.

use super::Pool;
use super::lists::Lists;
use crate::replay::trace::BlockId;

const SMALL: u8 = 0;
const MAIN: u8 = 1;
const GHOST: u8 = 2;
/// Uses that are remembered.
const USES_MAX: u8 = 3;

#[derive(Debug)]
pub(super) struct S3Fifo {
    capacity: usize,
    small: usize,
    ghosts: usize,
    lists: Lists,
    uses: Vec<u8>,
}

impl S3Fifo {
    pub(super) fn new(capacity: usize, unique: usize) -> Self {
        let (small, ghosts) = ((capacity / 10).max(1), (capacity * 9 / 10).max(1));
        Self { capacity, small, ghosts, lists: Lists::new(3, unique), uses: vec![0; unique] }
    }

    fn evict_from_main(&mut self) {
        while let Some(block) = self.lists.pop_front(MAIN) {
            if self.uses[block.at()] == 0 {
                return;
            }
            self.uses[block.at()] -= 1;
            self.lists.push_back(MAIN, block);
        }
    }

    fn evict_from_small(&mut self) {
        while let Some(block) = self.lists.pop_front(SMALL) {
            if std::mem::take(&mut self.uses[block.at()]) == 0 {
                self.lists.push_back(GHOST, block);
                if self.lists.len(GHOST) > self.ghosts {
                    self.lists.pop_front(GHOST);
                }
                return;
            }
            self.lists.push_back(MAIN, block);
            if self.lists.len(MAIN) > self.capacity - self.small {
                self.evict_from_main();
            }
        }
    }
}

impl Pool for S3Fifo {
    fn contains(&self, block: BlockId) -> bool {
        matches!(self.lists.list_of(block), Some(SMALL | MAIN))
    }

    fn touch(&mut self, block: BlockId) {
        let uses = &mut self.uses[block.at()];
        *uses = (*uses + 1).min(USES_MAX);
    }

    fn insert(&mut self, block: BlockId) {
        while self.lists.len(SMALL) + self.lists.len(MAIN) >= self.capacity {
            if self.lists.len(SMALL) >= self.small || self.lists.len(MAIN) == 0 {
                self.evict_from_small();
            } else {
                self.evict_from_main();
            }
        }
        self.uses[block.at()] = 0;
        let list = if self.lists.list_of(block) == Some(GHOST) { MAIN } else { SMALL };
        self.lists.push_back(list, block);
    }
}
