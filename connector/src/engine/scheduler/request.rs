//! What the scheduler half knows of one request.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::{Promised, Slot};
use crate::engine::keys::RequestKeys;
use crate::engine::metadata::Lease;

/// Stands for a block of which nothing is said.
const NO_PRIORITY: u8 = u8::MAX;

/// Blocks that were promised and are not loaded yet.
pub(super) struct Offer {
    pub lease: Lease,
    pub slots: Vec<Slot>,
    /// Number of the first block in the request.
    pub first: usize,
    /// How many have been given to the worker halves.
    pub loaded: usize,
    pub made_at: Duration,
}

impl Offer {
    pub fn new(promised: Promised, first: usize, now: Duration) -> Self {
        Self { lease: promised.lease, slots: promised.slots, first, loaded: 0, made_at: now }
    }
}

pub(super) struct Request {
    pub keys: RequestKeys,
    /// Tokens at the query; those of the first report are compared with them.
    prompt_tokens: Arc<Vec<u32>>,
    /// How many those were.
    pub prompt: usize,
    /// Tokens that the engine had itself.
    pub local_tokens: usize,
    pub offer: Option<Offer>,
    /// It is set aside while its blocks are loaded.
    pub parked: bool,
    /// The engine had no other request when it asked.
    pub alone: bool,
    /// The offer was taken back before the engine took it up.
    pub offer_expired: bool,
    /// Behind the last block that was loaded within a pass.
    pub loaded_to: usize,
    /// Page of each block, one list per layer group.
    pub pages: Vec<Vec<i32>>,
    priorities: Vec<u8>,
    /// Blocks given to the worker halves to save.
    pub saved: usize,
    /// Any at all.
    pub saves_given: bool,
    /// When they were last given from the first on, because some did not arrive.
    pub saved_again_at: Duration,
    pub last_seen: Duration,
}

impl Request {
    pub fn new(
        keys: RequestKeys,
        prompt_tokens: Vec<u32>,
        local_tokens: usize,
        offer: Option<Offer>,
        parked: bool,
        now: Duration,
    ) -> Self {
        Self {
            keys,
            prompt: prompt_tokens.len(),
            prompt_tokens: Arc::new(prompt_tokens),
            local_tokens,
            offer,
            parked,
            alone: false,
            offer_expired: false,
            loaded_to: 0,
            pages: Vec::new(),
            priorities: Vec::new(),
            saved: 0,
            saves_given: false,
            saved_again_at: Duration::ZERO,
            last_seen: now,
        }
    }

    /// Blocks whose pages are known.
    pub fn blocks(&self) -> usize {
        self.pages.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// True if it was asked about with just these tokens.
    pub fn is_prompt(&self, tokens: &[u32]) -> bool {
        *self.prompt_tokens == tokens
    }

    /// The tokens of the query, until the first report; then none.
    pub fn prompt_tokens(&self) -> Arc<Vec<u32>> {
        self.prompt_tokens.clone()
    }

    /// Checks that the tokens of the first report begin with those of the query, and leaves those behind them. `known`:
    /// so many are left out of `tokens`, because they were found to be the same.
    pub fn begins_with_prompt(&mut self, known: usize, tokens: &mut Vec<u32>) -> bool {
        let prompt = std::mem::take(&mut self.prompt_tokens);
        if known > 0 {
            return known == prompt.len();
        }
        if !tokens.starts_with(prompt.as_slice()) {
            return false;
        }
        tokens.drain(..prompt.len());
        true
    }

    /// Notes the page of a block; true if it is another than before.
    pub fn set_page(&mut self, group: usize, block: usize, page: i32) -> bool {
        if self.pages.len() <= group {
            self.pages.resize(group + 1, Vec::new());
        }
        let pages = &mut self.pages[group];
        if pages.len() <= block {
            pages.resize(block + 1, -1);
        }
        std::mem::replace(&mut pages[block], page) != page
    }

    /// Notes what the engine says of the blocks from `from` on.
    pub fn set_priorities(&mut self, from: usize, priorities: Option<&[u8]>) {
        for (index, priority) in priorities.into_iter().flatten().enumerate() {
            if self.priorities.len() <= from + index {
                self.priorities.resize(from + index + 1, NO_PRIORITY);
            }
            self.priorities[from + index] = *priority;
        }
    }

    /// Of these blocks, one each; empty when nothing is said of any.
    pub fn priorities(&self, blocks: Range<usize>) -> Vec<u8> {
        let of = |block: usize| self.priorities.get(block).copied().unwrap_or(NO_PRIORITY);
        if blocks.clone().all(|block| of(block) == NO_PRIORITY) {
            return Vec::new();
        }
        blocks.map(of).collect()
    }
}
