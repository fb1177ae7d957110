//! Linked lists over the blocks of a trace: a block is in one of them or in none.

use crate::replay::trace::BlockId;

const NONE: u32 = u32::MAX;
const NOWHERE: u8 = u8::MAX;

#[derive(Debug, Clone, Copy)]
struct Link {
    before: u32,
    after: u32,
    list: u8,
}

#[derive(Debug, Clone, Copy)]
struct Ends {
    first: u32,
    last: u32,
    len: usize,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Lists {
    links: Vec<Link>,
    ends: Vec<Ends>,
}

impl Lists {
    pub(super) fn new(lists: u8, blocks: usize) -> Self {
        Self {
            links: vec![Link { before: NONE, after: NONE, list: NOWHERE }; blocks],
            ends: vec![Ends { first: NONE, last: NONE, len: 0 }; usize::from(lists)],
        }
    }

    /// In which list it is.
    pub(super) fn list_of(&self, block: BlockId) -> Option<u8> {
        Some(self.links[block.at()].list).filter(|list| *list != NOWHERE)
    }

    pub(super) fn holds(&self, block: BlockId) -> bool {
        self.list_of(block).is_some()
    }

    pub(super) fn len(&self, list: u8) -> usize {
        self.ends[usize::from(list)].len
    }

    /// The first of a list.
    pub(super) fn first(&self, list: u8) -> Option<BlockId> {
        Some(self.ends[usize::from(list)].first).filter(|block| *block != NONE).map(BlockId)
    }

    /// The one behind it in its list.
    pub(super) fn after(&self, block: BlockId) -> Option<BlockId> {
        Some(self.links[block.at()].after).filter(|block| *block != NONE).map(BlockId)
    }

    /// Moves a block, wherever it is, to the end of a list.
    pub(super) fn push_back(&mut self, list: u8, block: BlockId) {
        self.remove(block);
        let ends = &mut self.ends[usize::from(list)];
        let before = std::mem::replace(&mut ends.last, block.0);
        ends.len += 1;
        match before {
            NONE => ends.first = block.0,
            before => self.links[before as usize].after = block.0,
        }
        self.links[block.at()] = Link { before, after: NONE, list };
    }

    /// Takes the first of a list.
    pub(super) fn pop_front(&mut self, list: u8) -> Option<BlockId> {
        let first = self.first(list)?;
        self.remove(first);
        Some(first)
    }

    /// Takes a block out of the list it is in, if any.
    pub(super) fn remove(&mut self, block: BlockId) {
        let Link { before, after, list } = self.links[block.at()];
        if list == NOWHERE {
            return;
        }
        let ends = &mut self.ends[usize::from(list)];
        ends.len -= 1;
        match before {
            NONE => ends.first = after,
            before => self.links[before as usize].after = after,
        }
        match after {
            NONE => self.ends[usize::from(list)].last = before,
            after => self.links[after as usize].before = before,
        }
        self.links[block.at()] = Link { before: NONE, after: NONE, list: NOWHERE };
    }
}
