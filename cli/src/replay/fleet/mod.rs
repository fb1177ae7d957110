//! A trace over several nodes in virtual time: the router's own index and choice, a daemon's ledger for each node.
//!
//! ```text
//! arrival ─► choice (index, load) ─► worker's queue ─► match, compute, commit (ledger) ─► first token ─► answer over
//!                  ▲                                                                          │
//!                  └────────────────────────── events, load ──────────────────────────────────┘
//! ```
//!
//! A worker computes one prompt after the other, at one rate; loading blocks takes no time. The same trace gives the same
//! figures, whatever else the machine does.

mod args;
mod report;
mod workers;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use kvbm::ledger::Millis;
use kvbm_frontend::{Burden, Fingerprint, RouterMode};

pub(super) use args::FleetArgs;
use report::FleetRow;
use workers::{Change, Workers};

use super::args::ReplayArgs;
use super::drive::{Hits, Setup};
use super::policies::{Candidate, Selection};
use super::random::Random;
use super::trace::Trace;

/// What a replay came to.
#[derive(Debug, Default)]
struct Figures {
    hits: Hits,
    /// From arrival to first token, microseconds.
    first_token_us: Vec<u64>,
    /// Blocks that each worker computed.
    computed: Vec<u64>,
}

/// What happens at a time.
enum Step {
    /// The next request of the trace comes.
    Arrival(usize),
    /// A worker has computed a prompt.
    FirstToken { worker: usize, changes: Vec<Change>, burden: Burden },
    /// An answer is complete.
    Over(Burden),
}

/// Replays the trace once for each mode.
pub(super) fn compare(args: &ReplayArgs, trace: &Trace) -> Result<String, String> {
    let Selection::One(Candidate::Ledger(policy)) = args.policy else {
        return Err("--router-mode needs one policy of the ledger: name it with --policy".to_owned());
    };
    let setup = Setup {
        policy,
        capacities: args.capacities(),
        disk_rules: args.disk_rules(),
        secret: args.secret,
        block_bytes: args.block_bytes(trace.block_bytes, trace.tokens_per_block),
        engines: args.fleet.workers,
    };
    let row = |mode: &RouterMode| {
        let figures = replay(trace, &setup, &args.fleet, *mode)
            .map_err(|refused| format!("the ledger refuses to go on: {refused}"))?;
        Ok(FleetRow::new(*mode, trace, figures))
    };
    let rows = args.fleet.modes().iter().map(row).collect::<Result<Vec<FleetRow>, String>>()?;
    if args.json { super::json(&rows) } else { Ok(report::table(&rows)) }
}

fn replay(
    trace: &Trace,
    setup: &Setup,
    args: &FleetArgs,
    mode: RouterMode,
) -> Result<Figures, kvbm::Refused> {
    let mut workers = Workers::new(trace, setup, args)?;
    let mut random = Random::new(1);
    let mut figures = Figures { computed: vec![0; workers.count()], ..Figures::default() };
    let mut agenda = Agenda::default();
    let requests: Vec<_> = trace.events.iter().filter(|event| event.kind.looks_up()).collect();
    if let Some(first) = requests.first() {
        agenda.add(first.at_ms * 1000, Step::Arrival(0));
    }
    while let Some((now_us, step)) = agenda.next() {
        let changed = match step {
            Step::Arrival(at) => {
                if let Some(next) = requests.get(at + 1) {
                    agenda.add(next.at_ms * 1000, Step::Arrival(at + 1));
                }
                let blocks = trace.blocks(requests[at]);
                let prints: Vec<Fingerprint> = blocks.iter().map(|id| trace.key(*id).into()).collect();
                Some(workers.place(at, &prints, mode, now_us, random.unit()))
            }
            Step::FirstToken { worker, changes, mut burden } => {
                workers.learn(&changes);
                burden.prefilled();
                agenda.add(now_us + u64::from(args.answer_ms) * 1000, Step::Over(burden));
                workers.idle(worker);
                Some(worker)
            }
            Step::Over(burden) => {
                drop(burden);
                None
            }
        };
        let Some(worker) = changed else { continue };
        let Some(job) = workers.begin(worker) else { continue };
        let event = requests[job.request];
        let (hits, changes) = workers.serve(worker, event, Millis(now_us / 1000))?;
        let computed = trace.blocks(event).len() as u64 - hits.total();
        // The last token of a prompt is always computed.
        let tokens = (computed * u64::from(trace.tokens_per_block)).max(1);
        let end_us = now_us + tokens * 1_000_000 / u64::from(args.prefill_rate);
        figures.first_token_us.push(end_us - job.arrived_us);
        figures.computed[worker] += computed;
        figures.hits = figures.hits + hits;
        agenda.add(end_us, Step::FirstToken { worker, changes, burden: job.burden });
    }
    Ok(figures)
}

/// What is to come, in order of time; of what comes at the same time, what was entered first.
#[derive(Default)]
struct Agenda {
    times: BinaryHeap<Reverse<(u64, usize)>>,
    steps: Vec<Option<Step>>,
}

impl Agenda {
    fn add(&mut self, at_us: u64, step: Step) {
        self.times.push(Reverse((at_us, self.steps.len())));
        self.steps.push(Some(step));
    }

    fn next(&mut self) -> Option<(u64, Step)> {
        let Reverse((at_us, step)) = self.times.pop()?;
        Some((at_us, self.steps[step].take()?))
    }
}

#[cfg(test)]
mod tests;
