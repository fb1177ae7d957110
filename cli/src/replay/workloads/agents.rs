//! Agents: many at a time, made from a few templates; each calls again as soon as a tool has answered, with all that
//! was said before and the tool's output behind it.

use super::schedule::{Session, interleave};
use super::{Ids, Request};
use crate::replay::random::{Random, Zipf};

/// Templates: system prompt and descriptions of tools.
const TEMPLATES: usize = 5;
/// Calls of one agent, on average.
const CALLS: f64 = 20.0;
/// Blocks of context at which an agent gives up.
const CONTEXT_MAX: usize = 256;
/// Half of the tools answer faster, milliseconds.
const TOOL_MEDIAN_MS: f64 = 3000.0;
/// Between beginnings of agents, on average, milliseconds.
const BEGIN_GAP_MS: f64 = 2500.0;

struct Agent {
    context: Vec<u64>,
}

impl Session for Agent {
    fn turn(&mut self, at_ms: u64, random: &mut Random, ids: &mut Ids) -> (Request, Option<u64>) {
        let request = Request::new(at_ms, self.context.clone(), 1);
        // Mostly a few lines, now and then a whole file.
        let output = if random.chance(0.1) { random.between(8, 32) } else { random.between(1, 3) };
        self.context.extend(ids.fresh(1 + output));
        let goes_on = random.chance(1.0 - 1.0 / CALLS) && self.context.len() <= CONTEXT_MAX;
        let pause = random.log_normal(TOOL_MEDIAN_MS, 0.8) as u64;
        (request, goes_on.then_some(pause))
    }
}

pub(super) fn requests(random: &mut Random, ids: &mut Ids, count: usize) -> Vec<Request> {
    let templates: Vec<Vec<u64>> = (0..TEMPLATES).map(|_| ids.fresh(random.between(8, 24))).collect();
    let popularity = Zipf::new(TEMPLATES, 0.8);
    interleave(random, ids, count, BEGIN_GAP_MS, |random, ids| {
        let mut context = templates[popularity.draw(random)].clone();
        context.extend(ids.fresh(random.between(1, 4)));
        Agent { context }
    })
}
