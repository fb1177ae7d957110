//! Why a worker that goes on with an answer had to compute tokens that another one had computed.

use super::Route;

/// Tokens by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recomputed {
    /// In the block that was being filled, or the last one: an engine computes the last token always.
    pub open_block: usize,
    /// In complete blocks that had not left the lost worker's pool, as far as its daemon had told.
    pub not_offloaded: usize,
    /// In blocks that were thought to be there, but were not found.
    pub missed: usize,
}

impl Recomputed {
    /// Of a sequence of which `cached` tokens were found where `route` led.
    pub fn of(tokens: usize, cached: usize, route: &Route) -> Self {
        let recomputed = tokens.saturating_sub(cached);
        let complete = match route.block {
            0 => tokens.saturating_sub(1),
            block => tokens.saturating_sub(1) / block * block,
        };
        let open_block = recomputed.min(tokens - complete);
        let not_offloaded = (recomputed - open_block).min(complete.saturating_sub(route.overlap.total()));
        Self { open_block, not_offloaded, missed: recomputed - open_block - not_offloaded }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::router::{Overlap, RouterMode};

    fn of(tokens: usize, cached: usize, known: usize) -> [usize; 3] {
        let overlap = Overlap::of_depths(0, known, 0);
        let route = Route { overlap, block: 16, ..Route::plain(RouterMode::Kv, "w") };
        let Recomputed { open_block, not_offloaded, missed } = Recomputed::of(tokens, cached, &route);
        [open_block, not_offloaded, missed]
    }

    #[test]
    fn each_token_has_one_reason() {
        assert_eq!(of(100, 96, 96), [4, 0, 0]);
        assert_eq!(of(96, 80, 96), [16, 0, 0], "the last token of the last block is computed");
        assert_eq!(of(100, 64, 64), [4, 32, 0]);
        assert_eq!(of(100, 64, 96), [4, 0, 32]);
        assert_eq!(of(100, 0, 64), [4, 32, 64]);
        assert_eq!(of(100, 96, 64), [4, 0, 0], "more was there than was known");
        assert_eq!(of(100, 100, 0), [0, 0, 0]);
    }
}
