//! What the link reports, and what the engine makes of it.

use kvbm_hash::Retention;
use kvbm_proto::v1::{self, Refusal};

use super::promotion::{Stage, promoted_blocks};
use super::{
    BlockRef, CacheEvent, Content, DeviceCache, Lease, LeaseId, Lookup, Mode, Onboard, Queued, Shortage,
};
use crate::exchange::{Arrival, Attempt, Command, Opened, Opening, QuestionId};
use crate::pool_table::{DaemonId, Release};
use crate::{ClientError, DetachReason};

impl DeviceCache {
    pub(super) fn take_in(&mut self) {
        let Some(link) = &self.link else { return };
        for (attempt, arrival) in link.inbox.drain() {
            self.arrived(attempt, arrival);
        }
        self.flush();
        self.top_up();
    }

    fn arrived(&mut self, attempt: Attempt, arrival: Arrival) {
        let (current, daemon) = match self.mode {
            Mode::Detached => (None, None),
            Mode::Attaching { attempt, daemon } | Mode::Attached { attempt, daemon } => {
                (Some(attempt), Some(daemon))
            }
        };
        match arrival {
            Arrival::DaemonDead { daemon: dead } => {
                if daemon == Some(dead) {
                    self.hang_up();
                    self.detach(DetachReason::Died, true);
                }
                self.daemon_dead(dead);
            }
            Arrival::Reachable { daemon } if current.is_none() => self.hand_over(attempt, daemon),
            // Whatever else is not of this attempt is void: pins, grants and leases of a session end with it.
            _ if current != Some(attempt) => {}
            Arrival::Reachable { .. } => {}
            Arrival::Opened(opened) => self.opened(*opened),
            Arrival::Down { reason, daemon_dead } => self.detach(reason, daemon_dead),
            Arrival::Matched { question, result } => self.matched(question, result),
            Arrival::Prefetched { question, result } => self.prefetched(question, result),
            Arrival::Missed { question } => self.missed(question),
            Arrival::Onboarded { question, result } => self.onboarded(question, result),
            Arrival::Granted { question, result } => self.granted(question, result),
        }
    }

    /// A daemon is there: it is given the pool.
    fn hand_over(&mut self, attempt: Attempt, daemon: DaemonId) {
        let table = self.table.adoption(daemon);
        self.mode = Mode::Attaching { attempt, daemon };
        let memory = self.memory.clone();
        let opening = Opening::Adoption { epoch: memory.epoch(), memory, table };
        let sent = self.link.as_ref().map(|link| link.send(attempt, Command::Open(opening)));
        if let Some(Err(reason)) = sent {
            self.give_up(reason);
        }
    }

    fn opened(&mut self, opened: Opened) {
        let Mode::Attaching { attempt, daemon } = self.mode else { return };
        self.mode = Mode::Attached { attempt, daemon };
        self.table.attached(daemon);
        self.counters.reattaches.add(1);
        self.counters.attached.set(1);
        self.count_quarantine();
        self.push(CacheEvent::Attached { pool_id: opened.pool_id });
    }

    fn matched(&mut self, question: QuestionId, result: Result<v1::MatchReply, ClientError>) {
        let lookup = self.lookups.remove(&question);
        self.breaker_open = false;
        let reply = match result {
            Ok(reply) => reply,
            Err(ClientError::Malformed { detail }) => {
                self.lookups.extend(lookup.map(|lookup| (question, lookup)));
                return self.contradicted(detail);
            }
            Err(error) if is_forgotten(&error) => {
                self.lookups.extend(lookup.map(|lookup| (question, lookup)));
                return self.give_up(DetachReason::Refused(error));
            }
            Err(_) => return lookup.into_iter().for_each(|lookup| self.answer_locally(lookup)),
        };
        let device: Vec<BlockRef> = reply.device.iter().map(|&block| block.into()).collect();
        // Too late, or nobody waits: its pins and lease go straight back.
        let Some(lookup) = lookup.filter(|lookup| !lookup.abandoned) else {
            for &block in &device {
                self.note_release(Release { block, pins: 1 });
            }
            return self.release_lease(reply.lease_id);
        };
        let (accepted, doubted) =
            self.table.matched(lookup.namespace, &lookup.keys, &device, &lookup.retention);
        let believed = doubted.is_empty();
        if !believed {
            tracing::warn!(blocks = ?doubted, "the daemon matched blocks that are not known to hold that");
            self.counters.contradictions.add(1);
            doubted.into_iter().for_each(|release| self.note_release(release));
        } else if let Some(on_disk) = self.worth_waiting(&lookup, accepted.len(), &reply) {
            self.release(&accepted);
            self.release_lease(reply.lease_id);
            return self.promote(lookup, on_disk);
        }
        self.found(&lookup, accepted, believed, &reply);
    }

    /// Reports what the daemon matched, as far as it may be used.
    fn found(&mut self, lookup: &Lookup, accepted: Vec<u32>, believed: bool, reply: &v1::MatchReply) {
        self.counters.matches.add(1);
        self.counters.device_blocks_matched.add(accepted.len() as u64);
        let leased = believed && reply.lease_id != 0;
        let most = if leased { reply.host_blocks.min(self.onboardable()) } else { 0 };
        let contents = host_contents(lookup, accepted.len(), most);
        let host_end = accepted.len() + contents.len();
        let promoted_blocks = promoted_blocks(lookup, accepted.len()..host_end);
        self.counters.promoted_blocks.add(promoted_blocks.into());
        let host_blocks = u32::try_from(contents.len()).expect("no more than host_blocks");
        let lease = if contents.is_empty() {
            self.release_lease(reply.lease_id);
            None
        } else {
            let lease = LeaseId(self.number());
            self.leases.insert(lease, Lease { lease_id: reply.lease_id, contents });
            Some(lease)
        };
        let rest = u32::try_from(lookup.keys.len() - host_end).unwrap_or(u32::MAX);
        let all_host = believed && host_blocks == reply.host_blocks;
        let disk_blocks = if all_host { reply.disk_blocks.min(rest) } else { 0 };
        let (ticket, device) = (lookup.ticket, accepted);
        self.push(CacheEvent::Looked { ticket, device, host_blocks, promoted_blocks, disk_blocks, lease });
    }

    /// How many blocks more may be promised. Those a daemon may be writing to are lost for a while when it stops, and
    /// then there must be others left to compute in: they are half of the pool at most, leases counted as if used.
    pub(super) fn onboardable(&self) -> u32 {
        let leased = self.leases.values().map(|lease| lease.contents.len()).sum::<usize>();
        let targets = self.onboards.values().map(|onboard| onboard.targets.len()).sum::<usize>();
        let bound = leased + targets + self.table.quarantined_count();
        (self.block_count() / 2).saturating_sub(u32::try_from(bound).unwrap_or(u32::MAX))
    }

    fn missed(&mut self, question: QuestionId) {
        // Unless its answer overtook the deadline in the queue.
        let Some(lookup) = self.lookups.remove(&question) else { return };
        match lookup.stage {
            Stage::Asked | Stage::AskedAgain(_) => {
                self.counters.match_timeouts.add(1);
                self.breaker_open = true;
                self.answer_locally(lookup);
            }
            Stage::Promoting(_) => {
                self.counters.disk_wait_timeouts.add(1);
                self.look_again(lookup);
            }
        }
    }

    fn onboarded(&mut self, question: QuestionId, result: Result<v1::TransferDone, ClientError>) {
        self.breaker_open = false;
        if let Err(ClientError::Malformed { detail }) = result {
            return self.contradicted(detail);
        }
        let Some(onboard) = self.onboards.remove(&question) else { return };
        let Onboard { ticket, lease_id, targets, contents, abandoned } = onboard;
        if matches!(result, Err(ClientError::Refused { .. })) {
            // Only an onboard that was begun ends its lease.
            self.release_lease(lease_id);
        }
        let expected = targets.len();
        let ok =
            matches!(&result, Ok(done) if done.blocks_failed == 0 && done.blocks_done as usize == expected);
        if !ok {
            tracing::debug!(?result, "an onboard did not deliver");
            self.counters.onboard_failures.add(1);
            self.release(&targets);
        } else {
            self.counters.onboarded_blocks.add(expected as u64);
            for (&block, &(content, retention)) in targets.iter().zip(&contents) {
                self.table.commit(block, content, retention);
            }
            if abandoned {
                self.release(&targets);
            }
        }
        if !abandoned {
            let targets = if ok { targets } else { Vec::new() };
            self.events.push_back(Queued { event: CacheEvent::Onboarded { ticket, ok }, targets });
        }
    }

    /// The answer to a request for grants. One that gave too little is the last word only if it knew of all releases;
    /// otherwise a waiting allocation asks again.
    fn granted(&mut self, question: QuestionId, result: Result<Vec<BlockRef>, ClientError>) {
        self.breaker_open = false;
        let Some(asked) = self.grants.remove(&question) else { return };
        let blocks = match result {
            Ok(blocks) => blocks,
            Err(ClientError::Malformed { detail }) => return self.contradicted(detail),
            Err(error) if is_forgotten(&error) => return self.give_up(DetachReason::Refused(error)),
            Err(error) => {
                tracing::debug!(%error, "no grants");
                Vec::new()
            }
        };
        if let Err(contradiction) = self.table.grant(&blocks) {
            return self.contradicted(format!("block {} was granted while in use", contradiction.block));
        }
        let short = blocks.len() < asked.blocks as usize;
        let certain = short && asked.releases == self.releases;
        self.shortage = match self.shortage {
            _ if !certain => Shortage::Unknown,
            // Another answer of this turn has just woken the allocations.
            Shortage::Certain => Shortage::Certain,
            Shortage::Unknown | Shortage::Told | Shortage::Past if self.wanted > 0 => Shortage::Certain,
            Shortage::Unknown | Shortage::Told | Shortage::Past => Shortage::Past,
        };
        if self.wanted > 0 && (certain || self.table.free_count() >= self.wanted as usize) {
            self.wanted = 0;
            self.push(CacheEvent::Granted);
        }
    }

    fn daemon_dead(&mut self, daemon: DaemonId) {
        let before = self.table.quarantined_count();
        for release in self.table.clear_quarantine(daemon) {
            self.note_release(release);
        }
        self.count_quarantine();
        if self.table.quarantined_count() < before {
            self.push(CacheEvent::Granted);
        }
    }

    fn release_lease(&mut self, lease_id: u64) {
        if lease_id != 0 {
            self.send_now(Command::ReleaseLease(lease_id));
        }
    }

    /// The daemon is wrong about the pool. A new session with our table sets it right.
    pub(super) fn contradicted(&mut self, detail: String) {
        self.counters.contradictions.add(1);
        self.give_up(DetachReason::Contradiction(detail));
    }

    /// Ends the session from this side.
    pub(super) fn give_up(&mut self, reason: DetachReason) {
        self.hang_up();
        self.detach(reason, false);
    }

    fn hang_up(&self) {
        if let (Some(link), Mode::Attaching { attempt, .. } | Mode::Attached { attempt, .. }) =
            (&self.link, self.mode)
        {
            link.hang_up(attempt);
        }
    }

    /// Goes on alone. The order matters: no block is written again before the epoch says so, and no block is free
    /// that the daemon may still write to.
    fn detach(&mut self, reason: DetachReason, daemon_dead: bool) {
        let (was_attached, daemon) = match self.mode {
            Mode::Detached => return,
            Mode::Attaching { daemon, .. } => (false, daemon),
            Mode::Attached { daemon, .. } => (true, daemon),
        };
        self.memory.raise_epoch();
        self.mode = Mode::Detached;
        if let Some(link) = &self.link {
            link.desk.clear();
        }
        let onboards: Vec<Onboard> = self.onboards.drain().map(|(_, onboard)| onboard).collect();
        if !daemon_dead {
            for onboard in &onboards {
                self.table.quarantine(&onboard.targets, daemon);
            }
        }
        self.table.detach();
        for onboard in onboards {
            self.counters.onboard_failures.add(1);
            if daemon_dead {
                self.release(&onboard.targets);
            }
            if !onboard.abandoned {
                self.push(CacheEvent::Onboarded { ticket: onboard.ticket, ok: false });
            }
        }
        self.notes.clear();
        self.grants.clear();
        self.leases.clear();
        self.breaker_open = false;
        self.shortage = Shortage::Unknown;
        let lookups: Vec<Lookup> = self.lookups.drain().map(|(_, lookup)| lookup).collect();
        lookups.into_iter().for_each(|lookup| self.answer_locally(lookup));
        if std::mem::take(&mut self.wanted) > 0 {
            self.push(CacheEvent::Granted);
        }
        self.count_quarantine();
        self.counters.attached.set(0);
        if was_attached {
            self.counters.detaches.add(1);
            self.push(CacheEvent::Detached { reason });
        } else {
            tracing::debug!(%reason, "the daemon did not take the pool");
            self.counters.attach_failures.add(1);
        }
    }

    fn count_quarantine(&self) {
        self.counters.quarantined_blocks.set(self.table.quarantined_count() as u64);
    }
}

/// The daemon knows nothing of the pool, the namespace or the session that the question was about.
fn is_forgotten(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused { refusal: Refusal::Unknown, .. })
}

/// What the host blocks of a match hold, no more than the lookup asked for, and what they are to be kept like. Of blocks
/// of which the lookup said nothing only the daemon knows.
fn host_contents(lookup: &Lookup, device_blocks: usize, host_blocks: u32) -> Vec<(Content, Retention)> {
    let content = |at: usize| {
        let (namespace, key) = (lookup.namespace, lookup.keys[at]);
        let parent = at.checked_sub(1).map(|before| lookup.keys[before]);
        let retention = lookup.retention.get(at).copied().flatten().unwrap_or_default();
        (Content { namespace, key, parent }, retention)
    };
    let end = lookup.keys.len().min(device_blocks.saturating_add(host_blocks as usize));
    (device_blocks..end).map(content).collect()
}
