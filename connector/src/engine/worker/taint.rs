//! What may hold wrong bytes because a load within a pass failed.
//!
//! The engine computes on in that pass, and perhaps in one more that it has scheduled already, before it hears of the
//! failure and computes anew. What it computes meanwhile must not be found by anybody: neither blocks of that request
//! nor of those that share its pages.

use std::collections::{HashSet, VecDeque};

use super::saves::SaveJob;

/// Requests remembered, at most. The engine hears of a failure a pass or two later.
const REQUESTS_MAX: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Taint {
    requests: VecDeque<u64>,
    /// Of the first layer group, until they belong to another block.
    pages: HashSet<i32>,
}

impl Taint {
    pub fn failed(&mut self, request: u64, pages: impl Iterator<Item = i32>) {
        self.add(request);
        self.pages.extend(pages);
    }

    pub fn reassigned<'a>(&mut self, pages: impl Iterator<Item = &'a i32>) {
        if !self.pages.is_empty() {
            pages.for_each(|page| {
                self.pages.remove(page);
            });
        }
    }

    /// True if its blocks may be wrong; then those that come behind are as well.
    pub fn spreads_to(&mut self, save: &SaveJob) -> bool {
        let request = save.request_id;
        let tainted = self.requests.contains(&request)
            || (!self.pages.is_empty() && save.first_pages().any(|page| self.pages.contains(&page)));
        if tainted {
            self.add(request);
        }
        tainted
    }

    fn add(&mut self, request: u64) {
        if !self.requests.contains(&request) {
            self.requests.push_back(request);
        }
        if self.requests.len() > REQUESTS_MAX {
            self.requests.pop_front();
        }
    }
}
