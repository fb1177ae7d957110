//! Retrieval: a system prompt, some of many documents, the most popular one first, and a question that nobody asked
//! before.

use std::collections::HashMap;

use super::{Ids, Request};
use crate::replay::random::{Random, Zipf};

/// Documents.
const DOCUMENTS: usize = 2000;
/// Documents in a prompt.
const DOCUMENTS_PER_PROMPT: u64 = 4;
/// Between requests, on average, milliseconds.
const GAP_MS: f64 = 250.0;

pub(super) fn requests(random: &mut Random, ids: &mut Ids, count: usize) -> Vec<Request> {
    let system = ids.fresh(4);
    let lengths: Vec<u64> = (0..DOCUMENTS).map(|_| random.between(1, 8)).collect();
    let popularity = Zipf::new(DOCUMENTS, 1.0);
    // The same document behind other ones has other KV, and so other numbers.
    let mut placed: HashMap<Vec<usize>, Vec<u64>> = HashMap::new();
    let mut at_ms = 0.0;
    let mut requests = Vec::with_capacity(count);
    for _ in 0..count {
        let wanted = random.between(1, DOCUMENTS_PER_PROMPT);
        let mut found: Vec<usize> = (0..wanted).map(|_| popularity.draw(random)).collect();
        found.sort_unstable();
        found.dedup();
        let mut blocks = system.clone();
        for end in 1..=found.len() {
            let length = lengths[found[end - 1]];
            let part = placed.entry(found[..end].to_vec()).or_insert_with(|| ids.fresh(length));
            blocks.extend_from_slice(part);
        }
        blocks.extend(ids.fresh(1));
        requests.push(Request::new(at_ms as u64, blocks, 1));
        at_ms += random.exponential(GAP_MS);
    }
    requests
}
