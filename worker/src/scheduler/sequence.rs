//! One request on its way.

use std::ops::Range;
use std::time::Duration;

use kvbm_hash::{Chain, Retention, RetentionConfig, SequenceHash};

use super::cache::{LeaseId, Ticket};
use crate::request::{CachedTokens, Eos, FinishReason, Request};
use crate::sampling::{Choice, Sampler};
use crate::{Answer, BlockId, Cache, Logits, Logprobs, SoFar, Want};

/// Where a sequence stands.
///
/// ```text
/// queue -> Looking ----------------> Matched -> Onboarding -> Running -> done
///   ^         |  \______________ (no host blocks) ____________/ |
///   |         +-> Promoting -> Found -> as from Looking         |
///   |_________________________ preempted _______________________|
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// The cache was asked for its prefix.
    Looking(Ticket),
    /// The cache waits for a drive before it answers.
    Promoting(Ticket),
    /// It has answered; a seat is still wanted.
    Found(Option<Leased>),
    /// Host blocks are leased; blocks to copy them into are still wanted.
    Matched(Leased),
    /// Host blocks are being copied into `targets`; so many of them had been on disk.
    Onboarding { ticket: Ticket, targets: Vec<BlockId>, promoted_blocks: usize },
    /// It is computed.
    Running,
}

/// Host blocks that the cache pins for a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Leased {
    pub(super) lease: LeaseId,
    pub(super) host_blocks: usize,
    /// How many of them had been on disk.
    pub(super) promoted_blocks: usize,
}

/// A place among the sequences that may be in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seat {
    /// It waits in the queue, or for the disk or what comes after that.
    None,
    Taken,
}

/// A request and how far it is.
///
/// ```text
/// tokens:  [ prompt ............. | generated ... ]
///          [0, computed)  KV is in the blocks
///          [0, committed * tokens_per_block)  and known to the cache
/// ```
pub(super) struct Sequence {
    pub(super) request: Request,
    pub(super) sampler: Sampler,
    /// What the model thought of the prompt's tokens, as far as it was computed; `None`: not asked for, or reported.
    pub(super) prompt_logprobs: Option<Vec<Logprobs>>,
    /// Clipped to the context.
    pub(super) max_tokens: usize,
    /// The prompt, then what was generated.
    pub(super) tokens: Vec<u32>,
    /// Tokens whose KV is in the blocks. The last token's is never, between steps.
    pub(super) computed: usize,
    /// Blocks that the cache knows by their keys.
    committed: usize,
    pub(super) blocks: Vec<BlockId>,
    pub(super) phase: Phase,
    pub(super) seat: Seat,
    /// It gave its seat away once while it waited for the disk. It does not do so again, lest it never runs.
    pub(super) gave_way: bool,
    /// Steps in which it waited although it could have run.
    pub(super) skipped: usize,
    /// Turns in a row in which no block could be had though nobody else held any.
    pub(super) starved_turns: usize,
    /// What was found in the cache the first time.
    pub(super) cached: CachedTokens,
    /// How long it took to copy what of that was not in the pool.
    pub(super) onboard: Duration,
    pub(super) start: Start,
    keys: Vec<SequenceHash>,
    chain: Chain,
    /// What the request says of the blocks of its prompt, if it says anything.
    prompt_retention: Vec<Option<Retention>>,
    tokens_per_block: usize,
}

/// Whether the client was told that the request left the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    Unreported,
    Reported,
}

impl Sequence {
    pub(super) fn new(
        request: Request,
        sampler: Sampler,
        max_tokens: usize,
        tokens_per_block: usize,
    ) -> Self {
        Self {
            sampler,
            prompt_logprobs: request
                .sampling
                .prompt_logprobs
                .filter(|_| request.generated.is_empty())
                .map(|_| Vec::new()),
            max_tokens,
            tokens: [request.prompt.as_slice(), &request.generated].concat(),
            computed: 0,
            committed: 0,
            blocks: Vec::new(),
            phase: Phase::Running,
            seat: Seat::None,
            gave_way: false,
            skipped: 0,
            starved_turns: 0,
            cached: CachedTokens::default(),
            onboard: Duration::ZERO,
            start: Start::Unreported,
            keys: Vec::new(),
            chain: Chain::new(request.namespace),
            prompt_retention: request.retention.as_ref().map_or_else(Vec::new, |retention| {
                retention.per_block(tokens_per_block, request.prompt.len())
            }),
            tokens_per_block,
            request,
        }
    }

    /// Tokens whose KV is still to be computed.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Tokens generated so far, those of an earlier worker included.
    pub(super) fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// What is wanted of a pass over the next `tokens`: something of the last one if a token is to be chosen, the logits of
    /// all if the prompt's are wanted.
    pub(super) fn want(&self, tokens: usize) -> Want {
        if self.prompt_logprobs.is_some() {
            Want::Logits(tokens)
        } else if tokens == self.remaining() {
            self.sampler.want(self.generated())
        } else {
            Want::Nothing
        }
    }

    /// Takes in what such a pass says of the prompt, if that is wanted.
    pub(super) fn score_prompt(&mut self, answers: Range<usize>, logits: &Logits) {
        let Some(scores) = &mut self.prompt_logprobs else { return };
        let following = &self.request.prompt[self.computed + 1..];
        let scored = answers.map(|answer| logits.row(answer)).zip(following);
        scores.extend(scored.filter_map(|(row, token)| self.sampler.prompt_logprobs(row, *token)));
    }

    /// Chooses the next token from what a pass says of the last one.
    pub(super) fn choose(&mut self, answer: Answer<'_>) -> Result<Choice, String> {
        let (prompt, generated) = self.tokens.split_at(self.request.prompt.len());
        match answer {
            Answer::Token(token) => Ok(self.sampler.take_largest(token, generated.len())),
            Answer::Row(logits) => self.sampler.choose(logits, SoFar { prompt, generated }),
        }
    }

    /// Keys that are worth looking up: at least one token is always left to compute, and all of a prompt whose logits are
    /// wanted.
    pub(super) fn lookup_keys(&mut self) -> Vec<SequenceHash> {
        if self.prompt_logprobs.is_some() {
            return Vec::new();
        }
        let count = (self.tokens.len() - 1) / self.tokens_per_block;
        self.extend_keys(count);
        self.keys[..count].to_vec()
    }

    /// What the request says of its blocks up to `count`; empty if it says nothing at all. Those that begin behind the
    /// prompt were generated.
    pub(super) fn retention(&self, count: usize) -> Vec<Option<Retention>> {
        if self.request.retention.is_none() {
            Vec::new()
        } else {
            (0..count).map(|at| self.kept(at)).collect()
        }
    }

    fn kept(&self, block: usize) -> Option<Retention> {
        let decode = || self.request.retention.as_ref().map(RetentionConfig::decode);
        self.prompt_retention.get(block).copied().unwrap_or_else(decode)
    }

    /// Takes over blocks whose KV came from the cache.
    pub(super) fn adopt(&mut self, blocks: Vec<BlockId>) {
        self.blocks.extend(blocks);
        self.committed = self.blocks.len();
        self.computed = self.blocks.len() * self.tokens_per_block;
    }

    /// Goes on with what the cache answered, given a seat.
    pub(super) fn go_on(&mut self, leased: Option<Leased>) {
        self.seat = Seat::Taken;
        self.phase = leased.map_or(Phase::Running, Phase::Matched);
    }

    /// Tells the cache of blocks that became complete.
    pub(super) fn commit_complete(&mut self, cache: &mut impl Cache) {
        let complete = self.computed / self.tokens_per_block;
        self.extend_keys(complete);
        while self.committed < complete {
            let index = self.committed;
            let parent = index.checked_sub(1).map(|before| self.keys[before]);
            let retention = self.kept(index).unwrap_or_default();
            cache.commit(self.blocks[index], self.request.namespace, self.keys[index], parent, retention);
            self.committed += 1;
        }
    }

    /// Gives everything back to the cache. What was generated is kept.
    pub(super) fn let_go(&mut self, cache: &mut impl Cache) {
        match std::mem::replace(&mut self.phase, Phase::Running) {
            Phase::Looking(ticket) | Phase::Promoting(ticket) => cache.abandon(ticket),
            Phase::Found(Some(leased)) | Phase::Matched(leased) => cache.abandon_lease(leased.lease),
            Phase::Onboarding { ticket, .. } => cache.abandon(ticket),
            Phase::Found(None) | Phase::Running => {}
        }
        self.seat = Seat::None;
        if let Some(scores) = &mut self.prompt_logprobs {
            scores.clear();
        }
        if !self.blocks.is_empty() {
            cache.release(std::mem::take(&mut self.blocks));
        }
        (self.computed, self.committed, self.skipped, self.starved_turns) = (0, 0, 0, 0);
    }

    /// Whether another worker has generated the last token already, and was lost before it could say so.
    pub(super) fn ended_before(&self, eos_token_ids: &[u32]) -> Option<FinishReason> {
        (self.generated() > 0).then(|| self.finish(eos_token_ids)).flatten()
    }

    /// Whether the last token, just generated, ends the sequence.
    pub(super) fn finish(&self, eos_token_ids: &[u32]) -> Option<FinishReason> {
        let last = self.tokens.last()?;
        let at_end = self.request.eos == Eos::Ends && eos_token_ids.contains(last);
        if at_end || self.sampler.is_complete() || self.request.stop_token_ids.contains(last) {
            Some(FinishReason::Stop)
        } else if self.generated() >= self.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    fn extend_keys(&mut self, count: usize) {
        while self.keys.len() < count {
            let begin = self.keys.len() * self.tokens_per_block;
            self.keys.push(self.chain.push(&self.tokens[begin..begin + self.tokens_per_block]));
        }
    }
}
