//! One save: complete blocks of the engine into host memory.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use kvbm_hash::{Namespace, SequenceHash};

use super::Shared;
use super::loads::by_block;
use crate::engine::host::{StoreRequest, Write, Writes};
use crate::engine::metadata::Save;
use crate::engine::pool::{BlockCopy, Fence};

/// Blocks offered to the daemon in one message.
const STORE_BLOCKS_MAX: usize = 512;

pub(super) struct SaveJob {
    pub request_id: u64,
    namespace: Namespace,
    keys: Vec<SequenceHash>,
    parent: Option<SequenceHash>,
    priorities: Vec<u8>,
    /// Pages of each block, one per layer group, and their generations when the blocks were given to us.
    pages: Vec<Vec<i32>>,
    generations: Vec<Vec<u32>>,
    /// Reached when the blocks are complete.
    pub fence: Option<Arc<dyn Fence>>,
}

impl SaveJob {
    pub fn new(save: Save, shared: &Shared) -> Result<Self, String> {
        let pages = by_block(&save.pages.iter().map(|group| group.pages.as_slice()).collect::<Vec<_>>());
        if let Some(pages) = pages.iter().find(|pages| !shared.shape.has(pages)) {
            return Err(format!(
                "request {} is to be saved from pages {pages:?}, which were never registered",
                save.request_id
            ));
        }
        let of_block = |pages: &Vec<i32>| {
            pages.iter().enumerate().map(|(group, page)| shared.generation(group, *page)).collect()
        };
        Ok(Self {
            request_id: save.request_id,
            namespace: save.namespace(),
            keys: save.keys(),
            parent: save.parent(),
            priorities: save.priorities,
            generations: pages.iter().map(of_block).collect(),
            pages,
            fence: None,
        })
    }

    pub fn run(self, shared: &Shared) {
        let ready = self.fence.as_ref().is_none_or(|fence| fence.wait().is_ok());
        if ready {
            self.offer_all(shared);
        }
        shared.saving.lock().end(self.request_id);
    }

    /// It is left out: nothing is found that was not stored.
    pub fn drop_unsaved(&self, shared: &Shared) {
        shared.counts.dropped_saves.fetch_add(1, Ordering::Relaxed);
        shared.saving.lock().end(self.request_id);
    }

    fn offer_all(&self, shared: &Shared) {
        for start in (0..self.keys.len()).step_by(STORE_BLOCKS_MAX) {
            let end = self.keys.len().min(start + STORE_BLOCKS_MAX);
            let Some(writes) = shared.host.store(&self.request(start, end)) else {
                shared.counts.dropped_saves.fetch_add(1, Ordering::Relaxed);
                // What comes behind would be refused; it is offered again with the request's next blocks.
                shared.orphaned.lock().push(self.request_id);
                return;
            };
            if writes.orphans || writes.busy {
                shared.orphaned.lock().push(self.request_id);
            }
            if !writes.writes.is_empty() {
                let copied = self.copy(shared, &writes, start);
                shared.host.store_done(&writes, copied);
            }
            if writes.orphans || writes.busy {
                return;
            }
        }
    }

    fn request(&self, start: usize, end: usize) -> StoreRequest {
        // Of several layer groups the first names the block: the daemon keeps no account of staged pages.
        let number = |block: usize| {
            let page = self.pages[block].first().copied().unwrap_or_default();
            (
                u32::try_from(page).unwrap_or_default(),
                self.generations[block].first().copied().unwrap_or_default(),
            )
        };
        StoreRequest {
            namespace: self.namespace,
            blocks: (start..end).map(number).collect(),
            keys: self.keys[start..end].to_vec(),
            parent: start.checked_sub(1).map_or(self.parent, |before| Some(self.keys[before])),
            priorities: self.priorities.get(start..end).map(<[u8]>::to_vec).unwrap_or_default(),
        }
    }

    /// Copies what is to be written, and says of which the bytes are those of the block.
    fn copy(&self, shared: &Shared, writes: &Writes, start: usize) -> Vec<bool> {
        let mut copied = Vec::with_capacity(writes.writes.len());
        for batch in writes.writes.chunks(shared.mover.batch_blocks().max(1)) {
            let done = self.copy_batch(shared, writes, start, batch);
            for write in batch {
                let block = start + write.block;
                // The engine raises the generation before it launches the pass that may write the page.
                let same = self.is_unchanged(shared, block);
                let counted =
                    if done && same { &shared.counts.saved_blocks } else { &shared.counts.stale_blocks };
                counted.fetch_add(1, Ordering::Relaxed);
                copied.push(done && same);
                writes.host.written(write.pin);
            }
        }
        copied
    }

    fn copy_batch(&self, shared: &Shared, writes: &Writes, start: usize, batch: &[Write]) -> bool {
        let placed: Option<Vec<_>> = batch
            .iter()
            .map(|write| {
                let pages = self.pages.get(start + write.block)?;
                Some((writes.host.place(write.segment, write.index)?, pages))
            })
            .collect();
        let Some(placed) = placed else { return false };
        let copies: Vec<BlockCopy<'_>> = placed
            .iter()
            .map(|((segment, offset), pages)| BlockCopy { pages, segment, offset: *offset })
            .collect();
        match shared.mover.save(&copies) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(error, "blocks could not be copied out");
                false
            }
        }
    }

    fn is_unchanged(&self, shared: &Shared, block: usize) -> bool {
        // The copy is read before the words are.
        fence(Ordering::SeqCst);
        let of_block = self.pages.get(block).zip(self.generations.get(block));
        of_block.is_some_and(|(pages, generations)| {
            pages
                .iter()
                .enumerate()
                .zip(generations)
                .all(|((group, page), generation)| shared.generation(group, *page) == *generation)
        })
    }
}
