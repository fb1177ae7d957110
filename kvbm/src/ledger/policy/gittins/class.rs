//! What blocks have in common that are expected to come back alike.

use std::ops::Range;

const USES: usize = 8;
const DEPTHS: usize = 4;

/// Number of classes.
pub const CLASSES: usize = USES * DEPTHS * 2;

/// Classes that differ in nothing but depth make a group: the number of groups.
pub const GROUPS: usize = CLASSES / DEPTHS;

/// How often the block was used (1, 2, 3 to 4, 5 to 8, ... more than 64 times), how deep in its sequence it lies (1 to
/// 3, up to 15, up to 63, beyond), and whether the last request that used it ended with it. The last block of a prompt
/// is often not full, and then nobody ever asks for it again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Class(u8);

impl Class {
    /// The class of a block that was used so often, the first time included, and is the `depth`th of its sequence.
    pub fn new(uses: u16, depth: u16, ends_a_request: bool) -> Self {
        let uses = (u16::BITS - uses.saturating_sub(1).leading_zeros()).min(USES as u32 - 1);
        let depth = (depth.max(1).ilog2() / 2).min(DEPTHS as u32 - 1);
        let group = uses * 2 + u32::from(ends_a_request);
        Self((group * DEPTHS as u32 + depth) as u8)
    }

    /// Its number, less than [`CLASSES`].
    pub fn at(self) -> usize {
        usize::from(self.0)
    }

    /// How often the blocks of a group were used, at most; of the last group, more.
    pub fn uses_of_group(group: usize) -> f32 {
        (1_u32 << (group / 2)) as f32
    }

    /// The numbers of the classes of a group.
    pub fn of_group(group: usize) -> Range<usize> {
        group * DEPTHS..(group + 1) * DEPTHS
    }

    /// As this one, for a block that ends a request.
    pub fn at_an_end(self) -> Self {
        Self(self.0 | DEPTHS as u8)
    }

    /// As this one, for a block that does not.
    pub fn not_at_an_end(self) -> Self {
        Self(self.0 & !(DEPTHS as u8))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_classes_are_dense() {
        let mut seen = [false; CLASSES];
        for uses in [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, u16::MAX] {
            for depth in [0, 1, 3, 4, 15, 16, 63, 64, u16::MAX] {
                let class = Class::new(uses, depth, false);
                assert_eq!(class.at_an_end(), Class::new(uses, depth, true));
                seen[class.at()] = true;
                seen[class.at_an_end().at()] = true;
            }
        }
        assert_eq!(seen, [true; CLASSES]);
        assert_eq!(Class::new(3, 4, true), Class::new(4, 15, true));
        assert_ne!(Class::new(4, 4, true), Class::new(5, 4, true));
    }
}
