//! How long a block takes to load, lately.

use std::time::Duration;

/// Blocks over which is averaged.
const LATELY: u32 = 8192;

#[derive(Debug, Default)]
pub(super) struct Speed {
    blocks: u32,
    took: Duration,
    is_new: bool,
}

impl Speed {
    pub fn loaded(&mut self, blocks: usize, took: Duration) {
        while self.blocks > LATELY {
            (self.blocks, self.took) = (self.blocks / 2, self.took / 2);
        }
        self.blocks = self.blocks.saturating_add(u32::try_from(blocks).unwrap_or(u32::MAX));
        self.took = self.took.saturating_add(took);
        self.is_new = blocks > 0;
    }

    /// Of one block, if anything was loaded since the last time.
    pub fn take(&mut self) -> Option<Duration> {
        std::mem::take(&mut self.is_new).then(|| self.took / self.blocks.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_once_and_what_was_long_ago_counts_less() {
        let mut speed = Speed::default();
        assert_eq!(speed.take(), None);
        speed.loaded(10, Duration::from_millis(10));
        speed.loaded(30, Duration::from_millis(10));
        assert_eq!((speed.take(), speed.take()), (Some(Duration::from_micros(500)), None));
        for _ in 0..20 {
            speed.loaded(LATELY as usize, Duration::from_millis(u64::from(LATELY)));
        }
        let block = speed.take().unwrap();
        assert!(block > Duration::from_micros(999), "{block:?}");
    }
}
