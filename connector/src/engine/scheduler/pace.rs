//! Whether a request is parked while its blocks are loaded, where that is left to us.
//!
//! An engine looks at a parked request again one or two passes later. While others compute that is what one wants; when
//! nobody else does, those passes are empty and most of what a short load takes. A load in the pass costs its own time
//! and no more, but holds up all who are in that pass.

use std::time::Duration;

/// Longest that loads hold up a pass in which nobody else is, and one in which others go on. An engine takes longer for
/// a step of prefill than for the first, and does not notice the second in a step of decoding.
const ALONE_MAX: Duration = Duration::from_millis(100);
const SHARED_MAX: Duration = Duration::from_millis(1);

#[derive(Debug, Default)]
pub(super) struct Pace {
    /// What a block takes, as the slowest rank measured last. Before any load was measured none is short.
    block: Option<Duration>,
    /// What the loads take that the next pass waits for already.
    planned: Duration,
}

impl Pace {
    pub fn measured(&mut self, block: Duration) {
        self.block = Some(block);
    }

    /// True, and it is reckoned with: the next pass can wait for a load of so many blocks.
    pub fn admits(&mut self, blocks: usize, others: usize) -> bool {
        let longest = if others == 0 { ALONE_MAX } else { SHARED_MAX };
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        let planned = self.block.map(|block| self.planned.saturating_add(block.saturating_mul(blocks)));
        let admitted = planned.filter(|planned| *planned <= longest);
        self.planned = admitted.unwrap_or(self.planned);
        admitted.is_some()
    }

    /// What was planned is in the metadata of a pass.
    pub fn next_pass(&mut self) {
        self.planned = Duration::ZERO;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_loads_are_done_in_the_pass_and_others_pay_for_hardly_any() {
        let mut pace = Pace::default();
        assert!(!pace.admits(1, 0), "nothing was measured");
        pace.measured(Duration::from_micros(100));
        assert!(!pace.admits(1001, 0));
        assert!(pace.admits(990, 0));
        assert!(!pace.admits(11, 0), "together they are too long");
        assert!(!pace.admits(1, 1), "the pass is held up for long enough already");
        pace.next_pass();
        assert!(pace.admits(6, 3) && pace.admits(4, 3) && !pace.admits(1, 3));
        assert!(pace.admits(11, 0));
        pace.measured(Duration::MAX);
        assert!(!pace.admits(usize::MAX, 0));
    }
}
