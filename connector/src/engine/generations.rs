//! Which use of a page a copy was about.
//!
//! Each page of each layer group has a word that is raised when the page changes hands, before the pass that may write
//! it is launched. A copy counts if the word was the same before and after it. The daemon, where it copies by itself,
//! looks at words that it shares with this process: they are kept equal to ours.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use kvbm_shm::PoolWords;
use parking_lot::Mutex;

use super::metadata::Pages;
use super::pool::PoolShape;

#[derive(Debug)]
pub(crate) struct Generations {
    words: Vec<Vec<AtomicU32>>,
    /// Of the session that is open, if its daemon copies by itself. Held while words are raised, so that the two never
    /// differ. Such pools have one layer group.
    shared: Mutex<Option<Arc<PoolWords>>>,
}

impl Generations {
    pub fn new(shape: &PoolShape) -> Self {
        let words = shape
            .groups()
            .iter()
            .map(|group| (0..group.regions[0].pages).map(|_| AtomicU32::new(0)).collect());
        Self { words: words.collect(), shared: Mutex::default() }
    }

    /// These pages have changed hands.
    pub fn raise(&self, reassigned: &[Pages]) -> Result<(), String> {
        let shared = self.shared.lock();
        for (group, pages) in reassigned.iter().enumerate() {
            for page in &pages.pages {
                let number = usize::try_from(*page).ok();
                let word = number.and_then(|page| self.words.get(group)?.get(page));
                let word =
                    word.ok_or_else(|| format!("page {page} of layer group {group} was never registered"))?;
                word.fetch_add(1, Ordering::SeqCst);
                if let Some(shared) = &*shared {
                    shared.raise_generation(page.cast_unsigned());
                }
            }
        }
        Ok(())
    }

    /// Generation of a page, if there is one.
    pub fn of(&self, group: usize, page: i32) -> u32 {
        let page = usize::try_from(page).ok();
        page.map_or(0, |page| self.words[group][page].load(Ordering::SeqCst))
    }

    /// Of the pages of a block, one per layer group.
    pub fn of_block(&self, pages: &[i32]) -> impl Iterator<Item = u32> {
        pages.iter().enumerate().map(|(group, page)| self.of(group, *page))
    }

    /// The daemon looks at these words from now on. Before it is told of any block.
    pub fn share(&self, words: &Arc<PoolWords>) {
        let mut shared = self.shared.lock();
        for (block, word) in (0..).zip(&self.words[0]) {
            words.set_generation(block, word.load(Ordering::SeqCst));
        }
        *shared = Some(words.clone());
    }

    /// A session that is over: its daemon takes nothing more from it.
    pub fn unshare(&self, words: &Arc<PoolWords>) {
        let mut shared = self.shared.lock();
        if shared.as_ref().is_some_and(|now| Arc::ptr_eq(now, words)) {
            *shared = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::pool::{LayerGroup, Region};

    #[test]
    fn shared_words_are_equal_to_ours_whenever_they_are_shared() {
        let region = Region { base: 4096, bytes: 8, stride: 8, pages: 4 };
        let shape = PoolShape::new(vec![LayerGroup { regions: vec![region] }]).unwrap();
        let generations = Generations::new(&shape);
        let raise = |pages: &[i32]| generations.raise(&[Pages { pages: pages.to_vec() }]);
        raise(&[1, 1, 3]).unwrap();
        let words = [1, 2].map(|name| Arc::new(PoolWords::create([name; 16], 4).unwrap()));
        let equal =
            |words: &PoolWords| (0..4).all(|page| words.generation(page) == generations.of(0, page as i32));
        generations.share(&words[0]);
        raise(&[0, 3]).unwrap();
        assert!(equal(&words[0]));
        generations.share(&words[1]);
        generations.unshare(&words[0]);
        raise(&[2]).unwrap();
        assert!(equal(&words[1]) && !equal(&words[0]));
        assert_eq!((generations.of(0, 1), generations.of(0, 3), generations.of(0, -1)), (2, 2, 0));
        assert!(raise(&[4]).unwrap_err().contains("page 4 of layer group 0"));
    }
}
