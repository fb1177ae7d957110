//! Pages and whose they are.

use super::request::Request;
use super::{SchedulerHalf, TOKENS_AHEAD_MAX};
use crate::engine::metadata::Pages;

/// Whether an engine's blocks are those that its settings say.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fit {
    Yes,
    /// Perhaps.
    Unknown,
    No(String),
}

/// Where pages that are told belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// They are all of the request's.
    All,
    /// They come behind those that are known.
    Behind,
}

impl SchedulerHalf {
    /// Some engines use other blocks than their settings say. Then our blocks are not theirs, and keys would lie. A flat
    /// pool does not tell; how many blocks a prompt is given does. Engines may take some more, for tokens to come: they
    /// are believed once a long prompt has shown that it is not twice as many.
    pub(super) fn blocks_fit(&mut self, request: &Request) -> Fit {
        if self.size_is_known {
            return Fit::Yes;
        }
        let size = self.tokens_per_block as usize;
        let (blocks, tokens) = (request.blocks(), request.keys.tokens());
        let needed = tokens.div_ceil(size);
        if blocks < needed || blocks - needed > TOKENS_AHEAD_MAX.div_ceil(size) {
            return Fit::No(format!(
                "a request of {tokens} tokens has {blocks} blocks: the engine's blocks are not of the {size} tokens that \
                 kv_cache_config.tokens_per_block says; set it to what the engine uses"
            ));
        }
        let ahead = blocks - needed;
        self.size_is_known = needed >= 8 && ahead <= needed / 4;
        if ahead == 0 || self.size_is_known { Fit::Yes } else { Fit::Unknown }
    }

    /// Notes pages. Those that the request may write have changed hands.
    pub(super) fn place(&mut self, request: &mut Request, place: Place, pages: &[Vec<i32>]) {
        for (group, pages) in pages.iter().enumerate() {
            let known = request.pages.get(group).map_or(0, Vec::len);
            let from = if place == Place::All { 0 } else { known };
            for (index, page) in pages.iter().enumerate() {
                let block = from + index;
                if request.set_page(group, block, *page)
                    && *page >= 0
                    && block >= request.local_tokens / self.tokens_per_block as usize
                {
                    self.reassign(group, *page);
                }
            }
        }
    }

    /// The request has so many tokens from the engine's own cache; at its query it may have been more.
    pub(super) fn shrink_local(&mut self, request: &mut Request, tokens: usize) {
        let size = self.tokens_per_block as usize;
        let (least, most) = (tokens.min(request.local_tokens) / size, request.local_tokens / size);
        request.local_tokens = request.local_tokens.min(tokens);
        for (group, pages) in request.pages.iter().enumerate() {
            for page in pages.iter().take(most).skip(least).filter(|page| **page >= 0) {
                self.reassign(group, *page);
            }
        }
    }

    pub(super) fn reassign_all(&mut self, pages: &[Vec<i32>]) {
        for (group, pages) in pages.iter().enumerate() {
            for page in pages.iter().filter(|page| **page >= 0) {
                self.reassign(group, *page);
            }
        }
    }

    pub(super) fn reassign(&mut self, group: usize, page: i32) {
        let groups = &mut self.next.reassigned;
        if groups.len() <= group {
            groups.resize(group + 1, Pages::default());
        }
        groups[group].pages.push(page);
        if let Some(load_id) = self.target(group, page) {
            self.counts.voided_loads += 1;
            self.end_load(load_id);
            match self.next.loads.iter_mut().find(|load| load.load_id == load_id) {
                // No worker has heard of it yet; the engine still asks for its end.
                Some(load) => {
                    load.segments.clear();
                    load.indices.clear();
                    load.pages.clear();
                }
                None => self.next.voided.push(load_id),
            }
        }
    }

    /// Ends what is known of a load.
    pub(super) fn end_load(&mut self, load_id: u64) {
        let load = self.loads.remove(&load_id).expect("only loads under way have targets");
        for (group, page) in load.targets {
            if self.target(group, page) == Some(load_id) {
                self.set_target(group, page, 0);
            }
        }
    }

    /// The load that writes a page.
    pub(super) fn target(&self, group: usize, page: i32) -> Option<u64> {
        let page = usize::try_from(page).ok()?;
        self.targets.get(group)?.get(page).copied().filter(|load_id| *load_id > 0)
    }

    pub(super) fn set_target(&mut self, group: usize, page: i32, load_id: u64) {
        let Ok(page) = usize::try_from(page) else { return };
        if self.targets.len() <= group {
            self.targets.resize(group + 1, Vec::new());
        }
        let pages = &mut self.targets[group];
        if pages.len() <= page {
            pages.resize(page + 1, 0);
        }
        pages[page] = load_id;
    }
}
