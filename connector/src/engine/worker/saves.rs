//! One save: complete blocks of the engine into host memory.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use kvbm_hash::{Namespace, SequenceHash};

use super::Shared;
use super::loads::BlockPages;
use crate::engine::host::{Copied, StoreRequest, Stored, Write, Writes};
use crate::engine::metadata::Save;
use crate::engine::pool::{BlockCopy, Fence};

/// Blocks offered to the daemon in one message.
const STORE_BLOCKS_MAX: usize = 512;

/// How often blocks are offered again to a daemon that has no room for them just now: it makes some, or this process is
/// about to map it.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// What became of an offer.
enum Offered {
    Taken,
    /// Not all of it yet. Those that were taken are known by their keys when it is made again.
    Busy,
    Refused,
}

pub(super) struct SaveJob {
    pub request_id: u64,
    namespace: Namespace,
    keys: Vec<SequenceHash>,
    parent: Option<SequenceHash>,
    priorities: Vec<u8>,
    pages: BlockPages,
    /// Of each page, when the blocks were given to us.
    generations: Vec<u32>,
    /// Reached when the blocks are complete.
    pub fence: Option<Arc<dyn Fence>>,
}

impl SaveJob {
    pub fn new(save: Save, shared: &Shared) -> Result<Self, String> {
        let pages = BlockPages::new(&save.pages);
        if let Some(pages) = pages.iter().find(|pages| !shared.shape.has(pages)) {
            return Err(format!(
                "request {} is to be saved from pages {pages:?}, which were never registered",
                save.request_id
            ));
        }
        let generations = pages.iter().flat_map(|pages| shared.generations.of_block(pages)).collect();
        Ok(Self {
            request_id: save.request_id,
            namespace: save.namespace(),
            keys: save.keys(),
            parent: save.parent(),
            priorities: save.priorities,
            generations,
            pages,
            fence: None,
        })
    }

    /// Of the first layer group.
    pub fn first_pages(&self) -> impl Iterator<Item = i32> {
        self.pages.first_group()
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
        let until = Instant::now() + shared.busy_patience;
        for start in (0..self.keys.len()).step_by(STORE_BLOCKS_MAX) {
            let end = self.keys.len().min(start + STORE_BLOCKS_MAX);
            loop {
                match self.offer(shared, start, end) {
                    Offered::Taken => break,
                    Offered::Busy if Instant::now() < until => std::thread::sleep(BUSY_PAUSE),
                    // What comes behind would be refused; it is offered again with the request's next blocks.
                    Offered::Busy | Offered::Refused => return shared.orphaned.lock().push(self.request_id),
                }
            }
        }
    }

    fn offer(&self, shared: &Shared, start: usize, end: usize) -> Offered {
        let Some(stored) = shared.host.store(&self.request(start, end)) else {
            shared.counts.dropped_saves.fetch_add(1, Ordering::Relaxed);
            return Offered::Refused;
        };
        let (orphans, busy) = match stored {
            Stored::Copied(Copied { stored, stale, orphans, busy }) => {
                shared.counts.saved_blocks.fetch_add(stored, Ordering::Relaxed);
                shared.counts.stale_blocks.fetch_add(stale, Ordering::Relaxed);
                (orphans, busy)
            }
            Stored::ToWrite(writes) => {
                if !writes.writes.is_empty() {
                    let copied = self.copy(shared, &writes, start);
                    shared.host.store_done(&writes, copied);
                }
                (writes.orphans, writes.busy)
            }
        };
        match (orphans, busy) {
            (_, true) => Offered::Busy,
            (true, false) => Offered::Refused,
            (false, false) => Offered::Taken,
        }
    }

    fn request(&self, start: usize, end: usize) -> StoreRequest {
        // Of several layer groups the first names the block: the daemon keeps no account of staged pages, and others have
        // one group.
        let number = |block: usize| {
            let page = self.pages.get(block).and_then(|pages| pages.first()).copied().unwrap_or_default();
            (
                u32::try_from(page).unwrap_or_default(),
                self.generations_of(block).and_then(|of| of.first()).copied().unwrap_or_default(),
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
        let known = self.pages.get(block).zip(self.generations_of(block));
        known.is_some_and(|(pages, generations)| {
            shared.generations.of_block(pages).zip(generations).all(|(now, then)| now == *then)
        })
    }

    fn generations_of(&self, block: usize) -> Option<&[u32]> {
        let groups = self.pages.get(block)?.len();
        self.generations.get(block * groups..(block + 1) * groups)
    }
}
