//! How often blocks were used that are not resident.
//!
//! Four bytes for each, in sets of eight: part of the mark, the number of uses, and when the block went, in coarse
//! steps. The one that went longest ago makes room.

const WAYS: usize = 8;

/// Part of the mark: 19 bits. The table is sets of the high bits of the mark, so these are its low ones.
const TAG: u32 = 0xFFFF_E000;
const TAG_AT: u32 = 13;
/// 0: nothing here.
const USES: u32 = 0x7F;
const USES_AT: u32 = 6;
const STEPS: u32 = 64;

/// Half a cache line.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(32))]
struct Set([u32; WAYS]);

/// See the module.
#[derive(Debug, Default)]
pub struct Ghosts {
    sets: Vec<Set>,
    step: u32,
    added_in_step: usize,
}

impl Ghosts {
    /// Blocks that can be remembered.
    pub fn capacity(&self) -> usize {
        self.sets.len() * WAYS
    }

    /// Makes room for at least so many blocks, and forgets those that were there.
    pub fn grow(&mut self, blocks: usize) {
        self.sets = vec![Set::default(); blocks.div_ceil(WAYS)];
    }

    /// A block that was used so often is not resident now. More than 127 uses count as 127.
    pub fn add(&mut self, mark: u32, uses: u16) {
        // Eight steps pass while the whole table is replaced: what is old is told from what is new long after.
        self.added_in_step += 1;
        if self.added_in_step > self.sets.len() {
            self.added_in_step = 0;
            self.step = (self.step + 1) % STEPS;
        }
        let step = self.step;
        let set = self.set(mark);
        let mut longest = 0;
        for (at, entry) in (0..).zip(set.iter()) {
            let steps_ago = match *entry {
                same if is(same, mark) => STEPS + 1,
                0 => STEPS,
                other => step.wrapping_sub(other) % STEPS,
            };
            longest = longest.max(steps_ago * WAYS as u32 + at);
        }
        let at = longest as usize % WAYS;
        set[at] = mark << TAG_AT | u32::from(uses).clamp(1, USES) << USES_AT | step;
    }

    /// How often a block that is not resident was used; 0 if that is not known.
    pub fn uses(&mut self, mark: u32) -> u16 {
        self.set(mark).iter().find(|entry| is(**entry, mark)).map_or(0, |entry| uses_in(*entry) as u16)
    }

    /// As [`uses`](Self::uses), and forgets the block: it becomes resident.
    pub fn take(&mut self, mark: u32) -> u16 {
        let found = self.set(mark).iter_mut().find(|entry| is(**entry, mark));
        found.map_or(0, |entry| uses_in(std::mem::take(entry)) as u16)
    }

    pub fn bytes(&self) -> usize {
        self.sets.capacity() * size_of::<Set>()
    }

    fn set(&mut self, mark: u32) -> &mut [u32; WAYS] {
        let set = (u64::from(mark) * self.sets.len() as u64) >> 32;
        &mut self.sets[set as usize].0
    }
}

fn is(entry: u32, mark: u32) -> bool {
    entry & TAG == mark << TAG_AT && uses_in(entry) != 0
}

fn uses_in(entry: u32) -> u32 {
    entry >> USES_AT & USES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_went_longest_ago_is_forgotten_first() {
        let mut ghosts = Ghosts::default();
        ghosts.grow(8);
        (1..=9).for_each(|mark| ghosts.add(mark, mark as u16));
        assert_eq!([1, 2, 9, 10].map(|mark| ghosts.uses(mark)), [0, 2, 9, 0]);
        ghosts.add(3, 1000);
        assert_eq!((ghosts.take(3), ghosts.take(3)), (127, 0));
        ghosts.add(11, 0);
        assert_eq!([2, 11].map(|mark| ghosts.uses(mark)), [2, 1]);
    }
}
