//! Sessions side by side: each has a next request, the earliest comes first.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{Ids, Request};
use crate::replay::random::Random;

/// What takes turns.
pub(super) trait Session {
    /// Its request at this time, and milliseconds until the next one; `None`: that was the last.
    fn turn(&mut self, at_ms: u64, random: &mut Random, ids: &mut Ids) -> (Request, Option<u64>);
}

/// Sessions that begin at random, on average one in `mean_gap_ms`, until there are `count` requests.
pub(super) fn interleave<S: Session>(
    random: &mut Random,
    ids: &mut Ids,
    count: usize,
    mean_gap_ms: f64,
    mut begin: impl FnMut(&mut Random, &mut Ids) -> S,
) -> Vec<Request> {
    let mut requests = Vec::with_capacity(count);
    let mut sessions: Vec<Option<S>> = Vec::new();
    let mut due: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    let mut next_begin = 0.0;
    while requests.len() < count {
        while due.peek().is_none_or(|Reverse((at, _))| next_begin <= *at as f64) {
            due.push(Reverse((next_begin as u64, sessions.len())));
            sessions.push(Some(begin(random, ids)));
            next_begin += random.exponential(mean_gap_ms);
        }
        let Reverse((at_ms, number)) = due.pop().expect("one was just added, if there was none");
        let session = sessions[number].as_mut().expect("a session that is due has not ended");
        let (request, pause) = session.turn(at_ms, random, ids);
        requests.push(request);
        match pause {
            Some(pause) => due.push(Reverse((at_ms + pause, number))),
            None => sessions[number] = None,
        }
    }
    requests
}
