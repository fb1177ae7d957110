//! Scans: long documents that are read once, among conversations that are worth keeping.

use super::{Ids, Request, chat};
use crate::replay::random::Random;

/// Of so many requests one is a scan.
const SCANS: f64 = 0.3;

pub(super) fn requests(random: &mut Random, ids: &mut Ids, count: usize) -> Vec<Request> {
    let mut requests = chat::requests(random, ids, count);
    for request in &mut requests {
        if random.chance(SCANS) {
            *request = Request::new(request.at_ms, ids.fresh(random.between(32, 128)), 1);
        }
    }
    requests
}
