//! The blocks that are offered, by queue, and within a queue by cell.
//!
//! A cell holds the blocks of a class whose ages are in one bucket, the longest unused first. All of a cell are worth
//! the same, so the next victim is the first block of the least worthy cell that is not empty. A bitmap in order of
//! worth says which one that is.

use super::hazard::CELLS;
use crate::ledger::policy::QueueId;
use crate::ledger::slots::SlotIndex;

const NONE: u32 = u32::MAX;
const NO_CELL: u16 = u16::MAX;
const WORDS: usize = CELLS.div_ceil(64);

/// Where a slot is.
#[derive(Debug, Clone, Copy)]
struct Link {
    before: u32,
    after: u32,
    cell: u16,
    queue: u16,
}

const NOT_OFFERED: Link = Link { before: NONE, after: NONE, cell: NO_CELL, queue: 0 };

/// First and last of a cell.
#[derive(Debug, Clone, Copy)]
struct Ends {
    first: u32,
    last: u32,
}

/// One queue. Made when it is first used.
#[derive(Debug)]
struct Cells {
    ends: Vec<Ends>,
    /// By rank.
    occupied: [u64; WORDS],
    /// The words of `occupied` that are not 0.
    words: u64,
}

const _: () = assert!(WORDS <= 64);

impl Default for Cells {
    fn default() -> Self {
        Self { ends: vec![Ends { first: NONE, last: NONE }; CELLS], occupied: [0; WORDS], words: 0 }
    }
}

impl Cells {
    fn fill(&mut self, rank: u16) {
        let word = usize::from(rank) / 64;
        self.occupied[word] |= 1 << (rank % 64);
        self.words |= 1 << word;
    }

    fn clear(&mut self, rank: u16) {
        let word = usize::from(rank) / 64;
        self.occupied[word] &= !(1 << (rank % 64));
        if self.occupied[word] == 0 {
            self.words &= !(1 << word);
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Order {
    links: Vec<Link>,
    queues: Vec<Option<Box<Cells>>>,
    /// By cell: how many cells are worth less.
    rank: Vec<u16>,
    /// By rank: the cell.
    cell: Vec<u16>,
}

/// Cells that are not empty, of one word of the bitmap.
pub struct Occupied {
    word: usize,
    left: u64,
}

impl Occupied {
    pub fn next(&mut self, order: &Order) -> Option<usize> {
        let bit = (self.left != 0).then(|| self.left.trailing_zeros())?;
        self.left &= self.left - 1;
        Some(usize::from(order.cell[self.word * 64 + bit as usize]))
    }
}

impl Order {
    pub fn new(index: &[f32]) -> Self {
        let unordered = vec![0; CELLS];
        let mut order =
            Self { links: Vec::new(), queues: Vec::new(), rank: unordered.clone(), cell: unordered };
        order.rank(index);
        order
    }

    pub fn grow(&mut self, slots: usize) {
        self.links.resize(slots, NOT_OFFERED);
    }

    /// Puts a slot into a cell: first if it is older than the one that is, else last.
    pub fn enter(
        &mut self,
        slot: SlotIndex,
        queue: QueueId,
        cell: usize,
        is_older_than: impl Fn(SlotIndex) -> bool,
    ) {
        let number = usize::from(queue.0);
        if self.queues.len() <= number {
            self.queues.resize_with(number + 1, || None);
        }
        let cells = self.queues[number].get_or_insert_default();
        let ends = &mut cells.ends[cell];
        let mut link = Link { before: NONE, after: NONE, cell: cell as u16, queue: queue.0 };
        if ends.first == NONE {
            *ends = Ends { first: slot.0, last: slot.0 };
            cells.fill(self.rank[cell]);
        } else if is_older_than(SlotIndex(ends.first)) {
            link.after = ends.first;
            self.links[ends.first as usize].before = slot.0;
            ends.first = slot.0;
        } else {
            link.before = ends.last;
            self.links[ends.last as usize].after = slot.0;
            ends.last = slot.0;
        }
        self.links[slot.at()] = link;
    }

    /// Takes a slot out, if it is in; the queue that it was in.
    pub fn leave(&mut self, slot: SlotIndex) -> Option<QueueId> {
        let link = self.links[slot.at()];
        if link.cell == NO_CELL {
            return None;
        }
        self.links[slot.at()] = NOT_OFFERED;
        let cells = self.queues[usize::from(link.queue)].as_mut()?;
        let ends = &mut cells.ends[usize::from(link.cell)];
        match link.before {
            NONE => ends.first = link.after,
            before => self.links[before as usize].after = link.after,
        }
        match link.after {
            NONE => ends.last = link.before,
            after => self.links[after as usize].before = link.before,
        }
        if ends.first == NONE {
            cells.clear(self.rank[usize::from(link.cell)]);
        }
        Some(QueueId(link.queue))
    }

    /// The first of the least worthy, and the cell where it is.
    pub fn first(&self, queue: QueueId) -> Option<(SlotIndex, usize)> {
        let cells = self.queues.get(usize::from(queue.0))?.as_ref()?;
        let word = (cells.words != 0).then(|| cells.words.trailing_zeros() as usize)?;
        let rank = word * 64 + cells.occupied[word].trailing_zeros() as usize;
        let cell = usize::from(self.cell[rank]);
        Some((SlotIndex(cells.ends[cell].first), cell))
    }

    /// The first of a cell.
    pub fn first_in(&self, queue: QueueId, cell: usize) -> Option<SlotIndex> {
        let first = self.queues.get(usize::from(queue.0))?.as_ref()?.ends[cell].first;
        (first != NONE).then_some(SlotIndex(first))
    }

    /// Cells of a queue that are not empty, of 64 cells that are next to each other in worth.
    pub fn occupied(&self, queue: QueueId, word: usize) -> Occupied {
        let cells = self.queues.get(usize::from(queue.0)).and_then(Option::as_ref);
        Occupied { word, left: cells.map_or(0, |cells| cells.occupied[word]) }
    }

    /// Orders the cells by what they are worth now.
    pub fn rank(&mut self, index: &[f32]) {
        // Floats that are not negative are in the order of their bits.
        let keys = index
            .iter()
            .zip((0..CELLS as u64).rev())
            .map(|(index, at)| u64::from(index.to_bits()) << 16 | at);
        let mut keys: Vec<u64> = keys.collect();
        keys.sort_unstable();
        for (rank, key) in keys.into_iter().enumerate() {
            let cell = CELLS - 1 - (key & 0xFFFF) as usize;
            self.cell[rank] = cell as u16;
            self.rank[cell] = rank as u16;
        }
        for cells in self.queues.iter_mut().flatten() {
            (cells.occupied, cells.words) = ([0; WORDS], 0);
            for cell in 0..CELLS {
                if cells.ends[cell].first != NONE {
                    cells.fill(self.rank[cell]);
                }
            }
        }
    }

    pub fn bytes(&self) -> usize {
        let queue = size_of::<Cells>() + CELLS * size_of::<Ends>();
        self.links.capacity() * size_of::<Link>()
            + self.queues.capacity() * size_of::<Option<Box<Cells>>>()
            + self.queues.iter().flatten().count() * queue
            + (self.rank.capacity() + self.cell.capacity()) * size_of::<u16>()
    }

    pub fn check_integrity(&self) {
        let mut found = 0;
        for (queue, cells) in self.queues.iter().enumerate() {
            let Some(cells) = cells else { continue };
            for (word, bits) in cells.occupied.iter().enumerate() {
                assert_eq!(*bits != 0, (cells.words >> word) & 1 == 1, "queue {queue}, word {word}");
            }
            for (cell, ends) in cells.ends.iter().enumerate() {
                let rank = usize::from(self.rank[cell]);
                assert_eq!(usize::from(self.cell[rank]), cell);
                let occupied = cells.occupied[rank / 64] >> (rank % 64) & 1 == 1;
                assert_eq!(occupied, ends.first != NONE, "queue {queue}, cell {cell}");
                let (mut before, mut at) = (NONE, ends.first);
                while at != NONE {
                    let link = self.links[at as usize];
                    let place = (usize::from(link.queue), usize::from(link.cell), link.before);
                    assert_eq!(place, (queue, cell, before), "slot {at}");
                    found += 1;
                    (before, at) = (at, link.after);
                }
                assert_eq!(ends.last, before, "queue {queue}, cell {cell}");
            }
        }
        assert_eq!(found, self.links.iter().filter(|link| link.cell != NO_CELL).count());
    }
}
