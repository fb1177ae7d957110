//! ARC: what was used once and what was used more often share the pool; the border moves as ghosts of either come back.

use super::Pool;
use super::lists::Lists;
use crate::replay::trace::BlockId;

/// In the pool, used once; in the pool, used more often; ghosts of both.
const ONCE: u8 = 0;
const OFTEN: u8 = 1;
const GHOST_ONCE: u8 = 2;
const GHOST_OFTEN: u8 = 3;

#[derive(Debug)]
pub(super) struct Arc {
    capacity: usize,
    /// Blocks that those used once are to have.
    target: usize,
    lists: Lists,
}

impl Arc {
    pub(super) fn new(capacity: usize, unique: usize) -> Self {
        Self { capacity, target: 0, lists: Lists::new(4, unique) }
    }

    fn resident(&self) -> usize {
        self.lists.len(ONCE) + self.lists.len(OFTEN)
    }

    /// Makes room for one.
    fn replace(&mut self, came_back_often: bool) {
        if self.resident() < self.capacity {
            return;
        }
        let once = self.lists.len(ONCE);
        let takes_once = once > 0 && (once > self.target || (came_back_often && once == self.target));
        let from = if takes_once || self.lists.len(OFTEN) == 0 { ONCE } else { OFTEN };
        if let Some(victim) = self.lists.pop_front(from) {
            self.lists.push_back(if from == ONCE { GHOST_ONCE } else { GHOST_OFTEN }, victim);
        }
    }
}

impl Pool for Arc {
    fn contains(&self, block: BlockId) -> bool {
        matches!(self.lists.list_of(block), Some(ONCE | OFTEN))
    }

    fn touch(&mut self, block: BlockId) {
        self.lists.push_back(OFTEN, block);
    }

    fn insert(&mut self, block: BlockId) {
        let (once, often) = (self.lists.len(GHOST_ONCE), self.lists.len(GHOST_OFTEN));
        match self.lists.list_of(block) {
            Some(GHOST_ONCE) => {
                self.target = (self.target + (often / once.max(1)).max(1)).min(self.capacity);
                self.replace(false);
                self.lists.push_back(OFTEN, block);
            }
            Some(GHOST_OFTEN) => {
                self.target = self.target.saturating_sub((once / often.max(1)).max(1));
                self.replace(true);
                self.lists.push_back(OFTEN, block);
            }
            _ => {
                if self.lists.len(ONCE) + once >= self.capacity {
                    if self.lists.len(ONCE) < self.capacity {
                        self.lists.pop_front(GHOST_ONCE);
                        self.replace(false);
                    } else {
                        self.lists.pop_front(ONCE);
                    }
                } else if self.resident() + once + often >= self.capacity {
                    if self.resident() + once + often >= 2 * self.capacity {
                        self.lists.pop_front(GHOST_OFTEN);
                    }
                    self.replace(false);
                }
                self.lists.push_back(ONCE, block);
            }
        }
    }
}
