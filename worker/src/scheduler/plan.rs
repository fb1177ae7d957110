//! What the next step computes, and where its blocks come from.

use std::ops::Bound;

use super::{Admission, Arrival, Leased, Phase, Scheduler, Seat, Sequence, Ticket};
use crate::{Allocate, BlockId, Cache};

/// Each step that passes a prompt over makes it count as so many tokens shorter.
const AGE_TOKENS: usize = 64;

/// Most tokens of prompts in one step whose logits are wanted: each has as many as the vocabulary has tokens.
pub(crate) const SCORED_TOKENS_MAX: usize = 64;

/// With so many sequences without a seat (their lookups wait for a drive, or did), or as many as there are seats, none
/// is admitted: more would only push each other's blocks out of host memory again.
const SEATLESS_MAX: usize = 16;

/// What a step computes. To be applied before anything else is done with the scheduler.
#[derive(Debug)]
#[must_use = "a plan is computed and applied"]
pub struct Plan {
    pub(super) entries: Vec<Entry>,
}

/// Tokens of one sequence.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) arrival: Arrival,
    pub(super) tokens: usize,
}

impl Plan {
    /// There is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.entries.iter().map(|entry| entry.tokens).sum()
    }

    /// Sequences.
    pub fn sequences(&self) -> usize {
        self.entries.len()
    }
}

impl Scheduler {
    /// Starts onboards, and chooses what to compute.
    pub fn plan(&mut self, cache: &mut impl Cache) -> Plan {
        self.seat_found();
        self.start_onboards(cache);
        let mut plan = Plan { entries: Vec::new() };
        let (mut left, mut scored_left) = (self.options.max_batch_tokens, SCORED_TOKENS_MAX);
        for arrival in self.order() {
            let Some(remaining) = self.runnable(arrival) else { continue };
            let scored = self.active.get(&arrival).is_some_and(|s| s.prompt_logprobs.is_some());
            let wanted = remaining.min(left).min(if scored { scored_left } else { usize::MAX });
            let tokens = if wanted == 0 { 0 } else { self.secure(arrival, wanted, &mut plan, cache) };
            let Some(sequence) = self.active.get_mut(&arrival) else { continue };
            if tokens == 0 {
                sequence.skipped += usize::from(wanted == 0);
                continue;
            }
            sequence.skipped = 0;
            Self::report_start(sequence, &mut self.counters, &mut self.events);
            left -= tokens;
            scored_left -= if scored { tokens } else { 0 };
            plan.entries.push(Entry { arrival, tokens });
        }
        plan
    }

    /// Lets sequences out of the queue and asks the cache for their prefixes.
    pub fn admit(&mut self, cache: &mut impl Cache) {
        if self.seated() == 0 {
            self.admission = Admission::Open;
        }
        self.seat_found();
        let mut free = self.options.max_batch - self.seated();
        let seatless_max = self.options.max_batch.max(SEATLESS_MAX);
        if self.active.len() - self.seated() >= seatless_max {
            return;
        }
        while self.admission == Admission::Open && free > 0 {
            let Some((arrival, mut sequence)) = self.queue.pop_front() else { return };
            sequence.seat = Seat::Taken;
            free -= 1;
            let keys = sequence.lookup_keys();
            if !keys.is_empty() {
                let ticket = self.ticket();
                sequence.phase = Phase::Looking(ticket);
                let retention = sequence.retention(keys.len());
                let _span = sequence.request.span.enter();
                cache.lookup(ticket, sequence.request.namespace, keys, retention);
            }
            self.active.insert(arrival, sequence);
        }
    }

    fn seated(&self) -> usize {
        self.active.values().filter(|sequence| sequence.seat == Seat::Taken).count()
    }

    /// Gives free seats to sequences that have waited for the disk, the oldest first.
    fn seat_found(&mut self) {
        if self.admission == Admission::Closed {
            return;
        }
        let free = self.options.max_batch - self.seated();
        let found = self.active.values_mut().filter_map(|sequence| {
            let Phase::Found(leased) = sequence.phase else { return None };
            Some((sequence, leased))
        });
        found.take(free).for_each(|(sequence, leased)| sequence.go_on(leased));
    }

    /// An answer that the cache owes may change what is computed next: a lookup is under way while prompts are computed.
    pub fn awaits_lookup(&self) -> bool {
        self.active.values().any(|sequence| matches!(sequence.phase, Phase::Looking(_)))
            && self
                .active
                .values()
                .any(|sequence| sequence.phase == Phase::Running && sequence.remaining() > 1)
    }

    fn start_onboards(&mut self, cache: &mut impl Cache) {
        let matched: Vec<Arrival> = self
            .active
            .iter()
            .filter(|(_, sequence)| matches!(sequence.phase, Phase::Matched(_)))
            .map(|(arrival, _)| *arrival)
            .collect();
        let mut nothing = Plan { entries: Vec::new() };
        for arrival in matched {
            // One that was preempted on behalf of another is not there any more.
            let Some(Phase::Matched(Leased { lease, host_blocks, promoted_blocks })) =
                self.active.get(&arrival).map(|sequence| sequence.phase.clone())
            else {
                continue;
            };
            let Some(targets) = self.allocate(arrival, host_blocks, &mut nothing, cache) else { continue };
            let ticket = self.ticket();
            if let Some(sequence) = self.active.get_mut(&arrival) {
                let _span = sequence.request.span.enter();
                cache.onboard(ticket, lease, targets.clone());
                sequence.phase = Phase::Onboarding { ticket, targets, promoted_blocks };
            }
        }
    }

    /// Sequences in the order in which they are served: with one token left, in order of arrival; then with the fewest.
    fn order(&self) -> Vec<Arrival> {
        let mut order: Vec<(usize, Arrival)> = self
            .active
            .iter()
            .filter(|(_, sequence)| sequence.phase == Phase::Running)
            .map(|(arrival, sequence)| {
                let rank = match sequence.remaining() {
                    1 => 0,
                    remaining => remaining.saturating_sub(sequence.skipped * AGE_TOKENS).max(1),
                };
                (rank, *arrival)
            })
            .collect();
        order.sort_unstable();
        order.into_iter().map(|(_, arrival)| arrival).collect()
    }

    fn runnable(&self, arrival: Arrival) -> Option<usize> {
        self.active.get(&arrival).filter(|s| s.phase == Phase::Running).map(Sequence::remaining)
    }

    /// Gets blocks for the next `wanted` tokens of a sequence; returns for how many there are.
    fn secure(&mut self, arrival: Arrival, wanted: usize, plan: &mut Plan, cache: &mut impl Cache) -> usize {
        let per_block = self.options.limits.tokens_per_block;
        let sequence = &self.active[&arrival];
        let needed = (sequence.computed + wanted).div_ceil(per_block);
        let missing = needed.saturating_sub(sequence.blocks.len());
        let granted = if missing == 0 { None } else { self.allocate(arrival, missing, plan, cache) };
        let Some(sequence) = self.active.get_mut(&arrival) else { return 0 };
        sequence.blocks.extend(granted.into_iter().flatten());
        wanted.min(sequence.blocks.len() * per_block - sequence.computed)
    }

    /// Takes blocks for a sequence. While there are none, one without a seat gives up its own, then the youngest that is
    /// younger.
    fn allocate(
        &mut self,
        arrival: Arrival,
        count: usize,
        plan: &mut Plan,
        cache: &mut impl Cache,
    ) -> Option<Vec<BlockId>> {
        loop {
            match cache.allocate(count) {
                Allocate::Blocks(blocks) => {
                    assert_eq!(blocks.len(), count, "all or none");
                    if let Some(sequence) = self.active.get_mut(&arrival) {
                        sequence.starved_turns = 0;
                    }
                    return Some(blocks);
                }
                Allocate::Pending => return None,
                Allocate::Exhausted => {}
            }
            // Newcomers would only take what is missing.
            self.admission = Admission::Closed;
            let Some(victim) = self.victim(arrival) else {
                // Older ones will end, and rob this one if they need to. Copies will end too.
                if !self.others_hold_blocks(arrival) {
                    self.starve(arrival, cache);
                }
                return None;
            };
            plan.entries.retain(|entry| entry.arrival != victim);
            self.preempt(victim, cache);
        }
    }

    /// Who gives up its blocks to a sequence.
    fn victim(&self, robber: Arrival) -> Option<Arrival> {
        let seatless = self.active.iter().rev().find(|(_, s)| s.seat == Seat::None && !s.blocks.is_empty());
        let mut younger = self.active.range((Bound::Excluded(robber), Bound::Unbounded)).rev();
        let youngest =
            younger.find(|(_, s)| !s.blocks.is_empty() && !matches!(s.phase, Phase::Onboarding { .. }));
        seatless.or(youngest).map(|(victim, _)| *victim)
    }

    fn others_hold_blocks(&self, arrival: Arrival) -> bool {
        self.active.iter().any(|(other, sequence)| {
            let onboarding = matches!(sequence.phase, Phase::Onboarding { .. });
            *other != arrival && (onboarding || !sequence.blocks.is_empty())
        })
    }

    /// Takes a sequence's blocks and puts it back into the queue, which stays in order of arrival.
    fn preempt(&mut self, victim: Arrival, cache: &mut impl Cache) {
        let Some(mut sequence) = self.active.remove(&victim) else { return };
        sequence.let_go(cache);
        self.counters.preemptions += 1;
        let at = self.queue.partition_point(|(arrival, _)| *arrival < victim);
        self.queue.insert(at, (victim, sequence));
    }

    /// Nobody else holds a block and yet there is none: something else must end, or the request is given up.
    fn starve(&mut self, arrival: Arrival, cache: &mut impl Cache) {
        let Some(sequence) = self.active.get_mut(&arrival) else { return };
        sequence.starved_turns += 1;
        if sequence.starved_turns <= self.options.max_starved_turns {
            return;
        }
        let detail = "the device pool has no free block though no other request holds any";
        self.fail(arrival, detail.into(), cache);
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }
}
