//! Engines that ask again, as vLLM does: each time they schedule, until they are told how much there is. They can also
//! decline an offer, and be told that a load failed.
//!
//! ```text
//!  query ──► on disk: waits, holds nothing ──► arrived, or waited long enough ──► looked up again: what is there counts
//!    └► offered ──► not scheduled: the same offer ──► taken up │ declined │ another local prefix: looked up again
//! ```

use std::time::Duration;

use super::request::Request;
use super::{Arrival, Asked, LoadMode, Look, NewRequest, SchedulerHalf};

/// A request that waits for blocks from disk.
pub(super) struct Wait {
    arrival: Arrival,
    until: Duration,
}

impl SchedulerHalf {
    /// As [`SchedulerHalf::query`], and whether the request is to be parked. `others`: so many requests the engine has
    /// besides. `None`: it is not known yet, the engine is to ask again.
    pub fn query_patiently(
        &mut self,
        new: NewRequest,
        local_tokens: usize,
        others: usize,
        now: Duration,
    ) -> Option<(usize, bool)> {
        let id = new.id;
        let is_standing = self.standing_offer(&new, local_tokens).is_some();
        let found = self.found_by_now(new, local_tokens, now)?;
        if found > 0 && !is_standing {
            let blocks = found / self.tokens_per_block as usize;
            // Loads are done one after the other. Those of requests that are gone are waited for when their pages are used.
            let is_first = !self.loads.values().any(|load| self.requests.contains_key(&load.request_id));
            let in_pass = self.mode == LoadMode::Auto && is_first && self.pace.admits(blocks, others);
            if let Some(request) = self.requests.get_mut(&id) {
                request.parked &= !in_pass;
                request.alone = others == 0 && is_first;
            }
        }
        Some((found, found > 0 && self.requests.get(&id).is_some_and(|request| request.parked)))
    }

    fn found_by_now(&mut self, new: NewRequest, local_tokens: usize, now: Duration) -> Option<usize> {
        if self.waits.get(&new.id).is_some_and(|wait| !wait.arrival.has_ended() && now < wait.until) {
            return None;
        }
        if let Some(offered) = self.standing_offer(&new, local_tokens) {
            return Some(offered);
        }
        if self.waits.remove(&new.id).is_some() {
            // It waited once; what has not come by now is computed.
            return Some(self.query(new, local_tokens, now, &mut || false));
        }
        self.counts.queries += 1;
        self.forget(new.id);
        let Some((keys, asked)) = self.keys_of(&new, local_tokens) else { return Some(0) };
        let look = asked.map_or(Look::Now(None), |Asked { skip, end }| {
            self.directory.look_up_patiently(new.namespace, &keys.keys()[..end], skip)
        });
        match look {
            Look::Now(promised) => Some(self.offer(new, keys, promised, local_tokens, now)),
            Look::Later(arrival) => {
                let until = now.saturating_add(arrival.patience);
                self.waits.insert(new.id, Wait { arrival, until });
                None
            }
        }
    }

    /// Some rank measured how long a block takes to load.
    pub fn measured(&mut self, block: Duration) {
        self.pace.measured(block);
    }

    /// What was offered to this request and is still held: engines ask again when they had no room for it.
    fn standing_offer(&self, new: &NewRequest, local_tokens: usize) -> Option<usize> {
        let request = self.requests.get(&new.id)?;
        let offer = request.offer.as_ref().filter(|offer| offer.loaded == 0)?;
        let same = request.local_tokens == local_tokens && request.is_prompt(&new.tokens);
        same.then(|| offer.slots.len() * self.tokens_per_block as usize)
    }

    /// The engine does not take up what it was offered.
    pub fn declined(&mut self, id: u64) {
        let offer =
            self.requests.get_mut(&id).and_then(|request| request.offer.take_if(|offer| offer.loaded == 0));
        if let Some(offer) = offer {
            self.take_back(offer.lease);
        }
    }

    /// Blocks did not arrive in these pages of the first layer group. The engine computes them, and is not offered
    /// blocks for the same request again.
    pub fn loads_failed(&mut self, pages: &[i32]) {
        let mut failed = std::collections::HashSet::new();
        for page in pages {
            let load = self.target(0, *page).and_then(|load_id| self.loads.get(&load_id));
            failed.extend(load.map(|load| load.request_id));
            // Of loads in a pass no account is kept while all goes well.
            let is_theirs = |request: &Request| {
                request
                    .pages
                    .first()
                    .is_some_and(|pages| pages.iter().take(request.loaded_to).any(|of| of == page))
            };
            let in_pass = self.requests.iter().filter(|(_, request)| is_theirs(request));
            failed.extend(in_pass.map(|(id, _)| *id));
        }
        self.counts.failed_loads += failed.len() as u64;
        self.failed.extend(failed);
    }
}

#[cfg(test)]
mod tests;
