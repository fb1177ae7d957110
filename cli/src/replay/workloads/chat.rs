//! Conversations: a system prompt out of a few, then turns, each of which extends the prompt before by an answer and a
//! question. People think in between, some for long.

use super::schedule::{Session, interleave};
use super::{Ids, Request};
use crate::replay::random::{Random, Zipf};

/// Applications that share the cache.
const SYSTEM_PROMPTS: usize = 20;
/// Probability that a turn is followed by another.
const GOES_ON: f64 = 0.7;
/// Half of the pauses are shorter, milliseconds.
const THINK_MEDIAN_MS: f64 = 60_000.0;
/// Between beginnings of conversations, on average, milliseconds.
const BEGIN_GAP_MS: f64 = 1000.0;

struct Chat {
    context: Vec<u64>,
}

impl Session for Chat {
    fn turn(&mut self, at_ms: u64, random: &mut Random, ids: &mut Ids) -> (Request, Option<u64>) {
        let question = random.exponential(4.0) as u64 + 1;
        self.context.extend(ids.fresh(question));
        let answer = random.exponential(1.0) as u64 + 1;
        let request = Request::new(at_ms, self.context.clone(), answer);
        let goes_on = random.chance(GOES_ON);
        self.context.extend(ids.fresh(answer));
        let think = random.log_normal(THINK_MEDIAN_MS, 1.0) as u64;
        (request, goes_on.then_some(think))
    }
}

pub(super) fn requests(random: &mut Random, ids: &mut Ids, count: usize) -> Vec<Request> {
    let prompts: Vec<Vec<u64>> = (0..SYSTEM_PROMPTS).map(|_| ids.fresh(random.between(1, 8))).collect();
    let popularity = Zipf::new(SYSTEM_PROMPTS, 1.0);
    interleave(random, ids, count, BEGIN_GAP_MS, |random, _| Chat {
        context: prompts[popularity.draw(random)].clone(),
    })
}
