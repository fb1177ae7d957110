//! A lookup that waits for the disk.
//!
//! ```text
//!  lookup ──► Asked ── nothing on disk that could be used ──────────────────────────────┐
//!               │ its pins and lease go back                                            ▼
//!               └──► Promoting ── arrived, failed, refused, too late ──► AskedAgain ──► Looked
//! ```
//!
//! While it waits it holds nothing, so a small pool is not kept from others by a slow drive, and no lease grows old. It
//! waits once and for a bounded time; what has not come by then is computed. That a drive is slow says nothing about the
//! daemon: neither breaker nor session depend on this wait.

use std::ops::Range;

use kvbm_proto::v1;

use super::{CacheEvent, DeviceCache, Lookup};
use crate::ClientError;
use crate::exchange::{Command, QuestionId};

/// How far a lookup is. Ranges are blocks, counted from the first of the sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stage {
    /// The daemon is asked what there is.
    Asked,
    /// These blocks are on their way from disk.
    Promoting(Range<usize>),
    /// The daemon is asked again. These blocks were on disk the first time.
    AskedAgain(Range<usize>),
}

impl DeviceCache {
    /// The blocks on disk that a lookup should wait for, if it has not waited yet: those that it asked for and that
    /// may be onboarded beside the host blocks of the same answer.
    pub(super) fn worth_waiting(
        &self,
        lookup: &Lookup,
        device_blocks: usize,
        reply: &v1::MatchReply,
    ) -> Option<Range<usize>> {
        let leased = reply.host_blocks == 0 || reply.lease_id != 0;
        if lookup.stage != Stage::Asked || !leased || self.config.disk_wait_max.is_zero() {
            return None;
        }
        let room = self.onboardable().checked_sub(reply.host_blocks)?;
        let begin = device_blocks.saturating_add(reply.host_blocks as usize);
        let end = begin.saturating_add(reply.disk_blocks.min(room) as usize).min(lookup.keys.len());
        (begin < end).then_some(begin..end)
    }

    /// Waits until the blocks of `on_disk` are in host memory, or it is too late for them.
    pub(super) fn promote(&mut self, mut lookup: Lookup, on_disk: Range<usize>) {
        if !self.may_ask() {
            return self.answer_locally(lookup);
        }
        let question = self.number();
        let wait = self.config.disk_wait(on_disk.len().saturating_mul(self.memory.layout().block_bytes));
        let (namespace, keys) = (lookup.namespace, lookup.keys[..on_disk.end].to_vec());
        let trace = lookup.trace.clone();
        self.counters.disk_waits.add(1);
        self.push(CacheEvent::Promoting { ticket: lookup.ticket });
        lookup.stage = Stage::Promoting(on_disk);
        self.lookups.insert(question, lookup);
        let fail = wait.saturating_add(self.config.disk_fail_after);
        self.ask(question, Some(wait), fail, Command::Prefetch { question, namespace, keys, trace });
    }

    pub(super) fn prefetched(
        &mut self,
        question: QuestionId,
        result: Result<v1::PrefetchReply, ClientError>,
    ) {
        self.breaker_open = false;
        match result {
            Ok(reply) => tracing::trace!(?reply, "a promotion ended"),
            Err(ClientError::Malformed { detail }) => return self.contradicted(detail),
            // Whatever it is that the daemon does not know any more, the next match says it too.
            Err(error) => tracing::debug!(%error, "a promotion is not waited for"),
        }
        // Unless its deadline has passed.
        if let Some(lookup) = self.lookups.remove(&question) {
            self.look_again(lookup);
        }
    }

    /// The wait is over, whatever came of it: the daemon says what is there now.
    pub(super) fn look_again(&mut self, mut lookup: Lookup) {
        if lookup.abandoned {
            return;
        }
        if let Stage::Promoting(on_disk) = lookup.stage {
            lookup.stage = Stage::AskedAgain(on_disk);
        }
        self.ask_match(lookup);
    }
}

/// How many blocks of `host` a lookup has waited for.
pub(super) fn promoted_blocks(lookup: &Lookup, host: Range<usize>) -> u32 {
    let Stage::AskedAgain(on_disk) = &lookup.stage else { return 0 };
    let common = host.end.min(on_disk.end).saturating_sub(host.start.max(on_disk.start));
    u32::try_from(common).expect("no more than the host blocks, which are counted in a u32")
}
