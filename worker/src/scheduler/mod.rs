//! Which sequences run next, and with which blocks: continuous batching, chunked prefill, preemption, cancellation.
//!
//! A synchronous state machine: it is given requests, events of the [`Cache`] and logits; it reads no clock and waits for
//! nothing. Each turn the owner calls [`Scheduler::admit`] and [`Scheduler::plan`], runs the engine over [`Scheduler::chunks`] and hands the logits
//! to [`Scheduler::apply`].
//!
//! **Order.** Sequences that decode come first. The rest of a step goes to prompts, those with the fewest tokens left
//! first, so that a short prompt does not wait behind a long one; each step that passes a prompt over makes it count as
//! shorter, so that a long one is not starved.
//!
//! **Blocks.** Taken when a step needs them. When there are none, the youngest of the younger sequences gives up its own
//! and goes back to the queue; what it generated is kept, what it committed is usually found again. A sequence with no
//! younger one to rob waits. The oldest with a seat is never robbed, so something always gets done. Once blocks have run out, nothing
//! is admitted until a sequence has ended.
//!
//! **Seats.** At most `max_batch` sequences have one, and only they are computed. A lookup that waits for a drive gives
//! its seat to the next in the queue, and gets the first free one back when it is answered. Until then it is the first to
//! be robbed, whatever its age: those with a seat cannot wait for one that waits for a seat. It gives way only once.
//!
//! **Invariant.** The queue is in order of arrival, and every reference to a block that the cache gave is in exactly one
//! sequence.

mod cache;
mod counters;
mod plan;
mod sequence;

use std::collections::{BTreeMap, VecDeque};

pub use cache::{Allocate, Cache, CacheEvent, LeaseId, Onboard, Ticket};
pub use counters::Counters;
pub use plan::Plan;
pub(crate) use plan::SCORED_TOKENS_MAX;

use crate::request::{CachedTokens, Event, FinishReason, Limits, Refusal, Request, RequestId};
use crate::sampling::{Choice, Processors, Sampler};
use crate::{BlockId, Chunk, Logits};
use sequence::{Leased, Phase, Seat, Sequence, Start};

/// How a [`Scheduler`] works.
#[derive(Debug, Clone)]
pub struct SchedulerOptions {
    /// What requests must keep to.
    pub limits: Limits,
    /// Tokens that end a sequence.
    pub eos_token_ids: Vec<u32>,
    /// Most tokens of a step.
    pub max_batch_tokens: usize,
    /// Most sequences that have a seat, and so are in a step.
    pub max_batch: usize,
    /// Most requests in the queue.
    pub max_waiting: usize,
    /// Turns after which a request is given up that alone cannot get a block.
    pub max_starved_turns: usize,
    /// What else changes logits, of every request.
    pub processors: Processors,
}

impl From<Choice> for Event {
    fn from(Choice { token, logprobs }: Choice) -> Self {
        match logprobs {
            Some(logprobs) => Self::Scored(vec![(token, logprobs)]),
            None => Self::Tokens(vec![token]),
        }
    }
}

impl SchedulerOptions {
    /// The defaults: 512 tokens and 64 sequences, 1,024 in the queue.
    pub fn new(limits: Limits, eos_token_ids: Vec<u32>) -> Self {
        Self {
            limits,
            eos_token_ids,
            max_batch_tokens: 512,
            max_batch: 64,
            max_waiting: 1024,
            max_starved_turns: 5000,
            processors: Processors::default(),
        }
    }
}

/// Order in which requests came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Arrival(u64);

/// Whether new sequences may leave the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Admission {
    Open,
    /// Blocks ran out; until a sequence ends.
    Closed,
}

/// The state machine; see the module.
pub struct Scheduler {
    options: SchedulerOptions,
    queue: VecDeque<(Arrival, Sequence)>,
    active: BTreeMap<Arrival, Sequence>,
    admission: Admission,
    next_arrival: u64,
    next_ticket: u64,
    counters: Counters,
    events: Vec<(RequestId, Event)>,
}

impl Scheduler {
    /// A scheduler without requests.
    ///
    /// # Panics
    /// When a step could not hold one token of each active sequence.
    pub fn new(options: SchedulerOptions) -> Self {
        assert!(
            options.max_batch > 0 && options.max_batch_tokens >= options.max_batch,
            "a step holds all decodes"
        );
        Self {
            options,
            queue: VecDeque::new(),
            active: BTreeMap::new(),
            admission: Admission::Open,
            next_arrival: 0,
            next_ticket: 0,
            counters: Counters::default(),
            events: Vec::new(),
        }
    }

    /// Puts a request into the queue, or refuses it.
    pub fn submit(&mut self, request: Request) {
        let id = request.id;
        let checked = match self.options.limits.check(&request) {
            Ok(_) if self.queue.len() >= self.options.max_waiting => Err(Refusal::Busy),
            Ok(max_tokens) => {
                let sampler = Sampler::new(&request, &self.options.eos_token_ids, &self.options.processors);
                let unguided = |detail| Refusal::Invalid { field: "generated", detail };
                sampler.map(|sampler| (max_tokens, sampler)).map_err(unguided)
            }
            Err(refusal) => Err(refusal),
        };
        match checked {
            Err(refusal) => {
                self.counters.refused += 1;
                self.events.push((id, Event::Refused(refusal)));
            }
            Ok((max_tokens, sampler)) => {
                self.counters.requests += 1;
                let arrival = Arrival(self.next_arrival);
                self.next_arrival += 1;
                let per_block = self.options.limits.tokens_per_block;
                let sequence = Sequence::new(request, sampler, max_tokens, per_block);
                match sequence.ended_before(&self.options.eos_token_ids) {
                    Some(reason) => self.told(&sequence, reason),
                    None => self.queue.push_back((arrival, sequence)),
                }
            }
        }
    }

    /// Ends a request wherever it stands. Unknown and ended ones are ignored.
    pub fn cancel(&mut self, id: RequestId, cache: &mut impl Cache) {
        let waiting = self.queue.iter().position(|(_, sequence)| sequence.request.id == id);
        if let Some((_, sequence)) = waiting.and_then(|at| self.queue.remove(at)) {
            self.end(sequence, FinishReason::Cancelled, cache);
            return;
        }
        let active = self.active.iter().find(|(_, sequence)| sequence.request.id == id).map(|(at, _)| *at);
        if let Some(sequence) = active.and_then(|at| self.active.remove(&at)) {
            self.end(sequence, FinishReason::Cancelled, cache);
        }
    }

    /// Takes in what the cache reported.
    pub fn cache_event(&mut self, event: CacheEvent, cache: &mut impl Cache) {
        match event {
            CacheEvent::Looked { ticket, device, host_blocks, promoted_blocks, lease } => {
                let leased = match lease {
                    Some(lease) if host_blocks > 0 => Some(Leased { lease, host_blocks, promoted_blocks }),
                    Some(lease) => {
                        cache.abandon_lease(lease);
                        None
                    }
                    None => None,
                };
                self.looked(ticket, device, leased);
            }
            CacheEvent::Promoting { ticket } => self.promoting(ticket),
            // Every turn asks again anyway.
            CacheEvent::Granted => {}
            CacheEvent::Onboarded { ticket, outcome } => self.onboarded(ticket, outcome),
        }
    }

    /// What happened since the last call, in order.
    pub fn take_events(&mut self) -> Vec<(RequestId, Event)> {
        std::mem::take(&mut self.events)
    }

    /// No request is waiting or active.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.active.is_empty()
    }

    /// What was counted so far.
    pub fn counters(&self) -> Counters {
        Counters { waiting: self.queue.len() as u64, running: self.active.len() as u64, ..self.counters }
    }

    /// Adds the time that a step took.
    pub fn count_step_seconds(&mut self, seconds: f64) {
        self.counters.step_seconds += seconds;
    }

    /// What the engine is to compute for a plan.
    pub fn chunks<'a>(&'a self, plan: &Plan) -> Vec<Chunk<'a>> {
        plan.entries
            .iter()
            .map(|entry| {
                let sequence = &self.active[&entry.arrival];
                let (begin, end) = (sequence.computed, sequence.computed + entry.tokens);
                Chunk {
                    tokens: &sequence.tokens[begin..end],
                    first_position: begin,
                    blocks: &sequence.blocks,
                    want: sequence.want(entry.tokens),
                }
            })
            .collect()
    }

    /// Takes in that a plan was computed: commits blocks, chooses tokens, ends sequences.
    ///
    /// # Panics
    /// When the logits are not those of the plan.
    pub fn apply(&mut self, plan: Plan, logits: &Logits, cache: &mut impl Cache) {
        let (mut answer, mut decodes, mut failed) = (0, 0, Vec::new());
        for entry in plan.entries {
            let sequence = self.active.get_mut(&entry.arrival).expect("a plan is applied before all else");
            decodes += u64::from(entry.tokens == 1 && sequence.generated() > 0);
            let answers = answer..answer + sequence.want(entry.tokens).answers();
            answer = answers.end;
            sequence.score_prompt(answers, logits);
            sequence.computed += entry.tokens;
            self.counters.computed_tokens += entry.tokens as u64;
            sequence.commit_complete(cache);
            if sequence.remaining() > 0 {
                continue;
            }
            let id = sequence.request.id;
            if let Some(scores) = sequence.prompt_logprobs.take() {
                self.events.push((id, Event::Prompt(scores)));
            }
            let choice = match sequence.choose(logits.answer(answer - 1)) {
                Ok(choice) => choice,
                Err(detail) => {
                    failed.push((entry.arrival, detail));
                    continue;
                }
            };
            sequence.tokens.push(choice.token);
            self.counters.generated_tokens += 1;
            self.events.push((id, choice.into()));
            if let Some(reason) = sequence.finish(&self.options.eos_token_ids)
                && let Some(sequence) = self.active.remove(&entry.arrival)
            {
                self.end(sequence, reason, cache);
            }
        }
        assert_eq!(answer, logits.answers(), "logits are those of the plan");
        for (arrival, detail) in failed {
            self.fail(arrival, detail, cache);
        }
        self.counters.steps += 1;
        self.counters.decode_steps += u64::from(decodes > 0);
        self.counters.decode_sequences += decodes;
        self.counters.max_decode_batch = self.counters.max_decode_batch.max(decodes);
    }

    fn promoting(&mut self, ticket: Ticket) {
        let Some(sequence) = self.waiting_for(ticket) else { return };
        sequence.phase = Phase::Promoting(ticket);
        if !sequence.gave_way {
            (sequence.gave_way, sequence.seat) = (true, Seat::None);
        }
    }

    /// The sequence whose lookup this is.
    fn waiting_for(&mut self, ticket: Ticket) -> Option<&mut Sequence> {
        let of_lookup = [Phase::Looking(ticket), Phase::Promoting(ticket)];
        let found = self.active.values_mut().find(|sequence| of_lookup.contains(&sequence.phase));
        if found.is_none() {
            tracing::warn!(?ticket, "the cache spoke of a lookup that nobody waits for");
        }
        found
    }

    fn looked(&mut self, ticket: Ticket, device: Vec<BlockId>, leased: Option<Leased>) {
        let per_block = self.options.limits.tokens_per_block;
        let Some(sequence) = self.waiting_for(ticket) else { return };
        let most = (sequence.tokens.len() - 1) / per_block;
        let host_blocks = leased.map_or(0, |leased| leased.host_blocks);
        assert!(device.len() + host_blocks <= most, "a cache finds at most the blocks it was asked for");
        if sequence.start == Start::Unreported {
            // What an earlier lookup brought was given back.
            sequence.cached = CachedTokens { device: device.len() * per_block, ..CachedTokens::default() };
        }
        sequence.adopt(device);
        match sequence.seat {
            Seat::Taken => sequence.go_on(leased),
            Seat::None => sequence.phase = Phase::Found(leased),
        }
    }

    fn onboarded(&mut self, ticket: Ticket, outcome: Onboard) {
        let found = self.active.values_mut().find(
            |sequence| matches!(&sequence.phase, Phase::Onboarding { ticket: waiting, .. } if *waiting == ticket),
        );
        let Some(sequence) = found else {
            tracing::warn!(?ticket, "the cache ended an onboard that nobody waits for");
            return;
        };
        let Phase::Onboarding { targets, promoted_blocks, .. } =
            std::mem::replace(&mut sequence.phase, Phase::Running)
        else {
            unreachable!("the phase was compared just now");
        };
        match outcome {
            Onboard::Done(took) => {
                if sequence.start == Start::Unreported {
                    sequence.onboard = took;
                    let per_block = self.options.limits.tokens_per_block;
                    sequence.cached.disk = promoted_blocks * per_block;
                    sequence.cached.host = (targets.len() - promoted_blocks) * per_block;
                }
                sequence.adopt(targets);
            }
            Onboard::Failed => self.counters.failed_onboards += 1,
        }
    }

    /// Reports that a sequence left the queue, once.
    fn report_start(sequence: &mut Sequence, counters: &mut Counters, events: &mut Vec<(RequestId, Event)>) {
        if sequence.start == Start::Reported {
            return;
        }
        sequence.start = Start::Reported;
        let CachedTokens { device, host, disk } = sequence.cached;
        // With what another worker has generated: it is computed, or found, like the prompt.
        counters.prompt_tokens += sequence.tokens.len() as u64;
        counters.device_tokens += device as u64;
        counters.host_tokens += host as u64;
        counters.disk_tokens += disk as u64;
        let span = &sequence.request.span;
        span.record("prompt_tokens", sequence.request.prompt.len());
        span.record("device_tokens", device);
        span.record("host_tokens", host);
        span.record("disk_tokens", disk);
        events.push((
            sequence.request.id,
            Event::Started { cached: sequence.cached, onboard: sequence.onboard },
        ));
    }

    /// Gives a sequence up.
    fn fail(&mut self, arrival: Arrival, detail: String, cache: &mut impl Cache) {
        if let Some(mut sequence) = self.active.remove(&arrival) {
            sequence.let_go(cache);
            self.admission = Admission::Open;
            self.counters.failed += 1;
            self.events.push((sequence.request.id, Event::Failed(detail)));
        }
    }

    fn end(&mut self, mut sequence: Sequence, reason: FinishReason, cache: &mut impl Cache) {
        sequence.let_go(cache);
        self.admission = Admission::Open;
        self.told(&sequence, reason);
    }

    /// Reports an end.
    fn told(&mut self, sequence: &Sequence, reason: FinishReason) {
        match reason {
            FinishReason::Stop | FinishReason::Length => self.counters.finished += 1,
            FinishReason::Cancelled => self.counters.cancelled += 1,
        }
        sequence.request.span.record("completion_tokens", sequence.generated());
        let finished = Event::Finished {
            reason,
            prompt_tokens: sequence.request.prompt.len(),
            completion_tokens: sequence.generated(),
        };
        self.events.push((sequence.request.id, finished));
    }
}
