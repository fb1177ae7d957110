//! The scheduler half: what to promise the engine, where promised blocks go, and which blocks are worth saving.
//!
//! It is told what the engine's scheduler does, in the engine's order, and answers at once; only a lookup asks the
//! daemon, through [`Directory`], which keeps the deadline.
//!
//! ```text
//!  query ──► offer ──► allocated ──► load in the next metadata ──► first report (parked loads: it is over)
//!    └ no match            └ pages change hands: whoever copies into or out of them for others is told to stop
//!                                      ──► each report: blocks complete after this pass ──► save in the same metadata
//! ```
//!
//! Rules that make it safe with an engine that tells us little:
//! * A page has changed hands when a request names it that may write it: at or behind the tokens it found in the
//!   engine's own cache. We hear of each such page before the pass that writes it is launched. Loads into it are voided
//!   then; saves out of it are dropped by the worker half, which compares generations after each copy.
//! * A block is saved once its tokens are known and a pass that writes them has been described: drafts are not known
//!   before they are accepted, and sampled tokens are not known before they are appended.
//! * Slots are given back by each rank for itself, when its last copy out of them has ended. Only an offer that no rank
//!   has heard of is taken back here.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvbm_hash::{Namespace, SequenceHash};

use super::keys::{PlacedItem, RequestKeys};
use super::metadata::{Lease, Metadata};

mod copies;
mod pace;
mod pages;
mod patience;
mod request;
#[cfg(test)]
mod tests;

use pace::Pace;
use pages::{Fit, Place};
use patience::Wait;
use request::{Offer, Request};

/// An offer that the engine does not take up for so long is taken back.
const OFFER_KEPT: Duration = Duration::from_secs(60);

/// A request that is not mentioned for so long has ended without a word.
const REQUEST_KEPT: Duration = Duration::from_secs(600);

/// Blocks that did not arrive are offered again no more often than this.
const SAVE_AGAIN_EVERY: Duration = Duration::from_secs(1);

/// Tokens for which an engine may have taken blocks in advance.
const TOKENS_AHEAD_MAX: usize = 256;

/// How often to look for such.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// Requests known at a time; more are served without the cache.
const REQUESTS_MAX: usize = 65_536;

/// Where the scheduler half finds blocks.
pub(crate) trait Directory: Send + Sync {
    /// The longest prefix of `keys` in host memory, if it reaches beyond the first `skip`: the slots of the blocks
    /// behind those, which stay as they are until they are released. Nothing when in doubt, or too slow. Where there is
    /// something to wait for, `meanwhile` is run until it is there, as long as it returns true.
    fn look_up(
        &self,
        namespace: Namespace,
        keys: &[SequenceHash],
        skip: usize,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> Option<Promised>;

    /// The same for an engine that asks again: what is on disk may be worth waiting for. Nothing is held meanwhile.
    fn look_up_patiently(&self, namespace: Namespace, keys: &[SequenceHash], skip: usize) -> Look {
        Look::Now(self.look_up(namespace, keys, skip, &mut || false))
    }

    /// No rank has heard of these slots, and none will.
    fn take_back(&self, lease: Lease);

    /// True when blocks that are saved have somewhere to go.
    fn takes_saves(&self) -> bool;
}

/// What a patient lookup found.
pub(crate) enum Look {
    Now(Option<Promised>),
    /// More is on its way from disk.
    Later(Arrival),
}

/// Blocks on their way from disk.
pub(crate) struct Arrival {
    /// They have come, or will not.
    pub ended: Arc<AtomicBool>,
    /// How long they are worth waiting for.
    pub patience: Duration,
}

impl Arrival {
    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// Blocks that every rank can copy by itself, whatever happens to the daemon.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Promised {
    pub lease: Lease,
    pub slots: Vec<Slot>,
}

/// A place in host memory: segment and number of the slot within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    pub segment: u32,
    pub index: u32,
}

/// How the engine waits for a load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadMode {
    /// The request is parked and others go on; its load is polled.
    Parked,
    /// The load is done within the next pass's start.
    InPass,
    /// The one or the other, as is shorter for the request and hardly noticed by others. For engines that ask again.
    Auto,
}

/// A request as it is when the engine asks for its prefix.
#[derive(Debug, Clone)]
pub struct NewRequest {
    /// The engine's number.
    pub id: u64,
    /// All its tokens.
    pub tokens: Vec<u32>,
    /// Adapter and salt.
    pub namespace: Namespace,
    /// Inputs that are not tokens.
    pub items: Vec<PlacedItem>,
    /// False: something about it is not in the key; it is neither looked up nor saved.
    pub cacheable: bool,
}

/// What the engine reports of a request before a pass.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// The engine's number.
    pub id: u64,
    /// How many tokens it begins with were compared with those of the query, are the same, and are left out of
    /// `tokens`. Only in the first report.
    pub known: usize,
    /// Tokens not reported before.
    pub tokens: Vec<u32>,
    /// Something is among them that is no token: from now on the request is served without the cache.
    pub opaque: bool,
    /// Pages not reported before, one list per layer group.
    pub pages: Vec<Vec<i32>>,
    /// Where the pass begins.
    pub computed: usize,
    /// Tokens that the pass computes; `None` where the engine does not say.
    pub scheduled: Option<usize>,
    /// One for each of the pages, 0..=100.
    pub priorities: Option<Vec<u8>>,
}

/// Totals since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedulerCounts {
    /// Prefixes asked for.
    pub queries: u64,
    /// Tokens promised.
    pub promised_tokens: u64,
    /// Blocks given to the worker halves to save.
    pub blocks_to_save: u64,
    /// Loads whose pages changed hands before they were over.
    pub voided_loads: u64,
    /// Requests neither looked up nor saved, because something about them is not in the key.
    pub bypassed_requests: u64,
    /// Requests whose blocks did not arrive, so that they are computed.
    pub failed_loads: u64,
}

/// Blocks `[skip, end)` of a request can be asked for.
struct Asked {
    skip: usize,
    end: usize,
}

/// Load that some rank may be working on.
struct LoadUnderWay {
    request_id: u64,
    targets: Vec<(usize, i32)>,
}

/// The scheduler half of one engine.
pub(crate) struct SchedulerHalf {
    engine: [u8; 16],
    tokens_per_block: u32,
    mode: LoadMode,
    /// Passes may begin before all layers of what they read have arrived.
    by_layer: bool,
    directory: Arc<dyn Directory>,
    requests: HashMap<u64, Request>,
    loads: HashMap<u64, LoadUnderWay>,
    /// Which load writes a page, 0 for none, by group and page. Pages are few and their numbers small: no map, because
    /// all blocks of a prompt are entered and taken out at once.
    targets: Vec<Vec<u64>>,
    next_load: u64,
    /// For the next metadata.
    next: Metadata,
    looked_at: Duration,
    /// Pages may leave a window while their request goes on.
    windowed: bool,
    /// The engine's blocks have as many tokens as we were told.
    size_is_known: bool,
    /// The engine's blocks are not what it says they are.
    disabled: Option<String>,
    /// Requests that wait for blocks from disk.
    waits: HashMap<u64, Wait>,
    /// Requests that were loaded for in vain: they compute everything.
    failed: HashSet<u64>,
    pace: Pace,
    counts: SchedulerCounts,
}

impl SchedulerHalf {
    pub fn new(
        engine: [u8; 16],
        tokens_per_block: u32,
        mode: LoadMode,
        directory: Arc<dyn Directory>,
    ) -> Self {
        Self {
            engine,
            tokens_per_block,
            mode,
            by_layer: false,
            directory,
            requests: HashMap::new(),
            loads: HashMap::new(),
            targets: Vec::new(),
            next_load: 1,
            next: Metadata::new(engine),
            looked_at: Duration::ZERO,
            windowed: false,
            size_is_known: false,
            disabled: None,
            waits: HashMap::new(),
            failed: HashSet::new(),
            pace: Pace::default(),
            counts: SchedulerCounts::default(),
        }
    }

    /// Of an engine whose pages may leave a window while their request goes on.
    #[must_use]
    pub fn windowed(self) -> Self {
        Self { windowed: true, ..self }
    }

    /// Of an engine that waits for each layer when a pass gets there.
    #[must_use]
    pub fn by_layer(self, by_layer: bool) -> Self {
        Self { by_layer, ..self }
    }

    /// Of an engine that says of its memory, not only in its settings, how many tokens a block has.
    #[must_use]
    pub fn of_known_size(self) -> Self {
        Self { size_is_known: true, ..self }
    }

    pub fn counts(&self) -> SchedulerCounts {
        self.counts
    }

    /// How many tokens behind the first `local_tokens` will be there without being computed. Whole blocks only, and at
    /// least one token is left to compute. `meanwhile`: of [`Directory::look_up`].
    pub fn query(
        &mut self,
        new: NewRequest,
        local_tokens: usize,
        now: Duration,
        meanwhile: &mut dyn FnMut() -> bool,
    ) -> usize {
        self.counts.queries += 1;
        self.forget(new.id);
        let Some((keys, asked)) = self.keys_of(&new, local_tokens) else { return 0 };
        let promised = asked.and_then(|Asked { skip, end }| {
            self.directory.look_up(new.namespace, &keys.keys()[..end], skip, meanwhile)
        });
        self.offer(new, keys, promised, local_tokens, now)
    }

    /// Keys of a request, and which of its blocks can be asked for. `None`: it is served without the cache.
    fn keys_of(&mut self, new: &NewRequest, local_tokens: usize) -> Option<(RequestKeys, Option<Asked>)> {
        if !new.cacheable || self.disabled.is_some() || self.requests.len() >= REQUESTS_MAX {
            self.counts.bypassed_requests += 1;
            return None;
        }
        let size = self.tokens_per_block as usize;
        let mut keys = RequestKeys::new(new.namespace, self.tokens_per_block, new.items.clone());
        keys.extend(&new.tokens);
        let (skip, end) = (local_tokens / size, new.tokens.len().saturating_sub(1) / size);
        // Within a block of its own the engine goes on by itself: only it knows what else is in that block.
        let askable = local_tokens.is_multiple_of(size) && skip < end && !self.failed.contains(&new.id);
        Some((keys, askable.then_some(Asked { skip, end })))
    }

    fn offer(
        &mut self,
        new: NewRequest,
        keys: RequestKeys,
        promised: Option<Promised>,
        local_tokens: usize,
        now: Duration,
    ) -> usize {
        let size = self.tokens_per_block as usize;
        let promised = promised.filter(|promised| !promised.slots.is_empty());
        let offered = promised.as_ref().map_or(0, |promised| promised.slots.len() * size);
        let offer = promised.map(|promised| Offer::new(promised, local_tokens / size, now));
        let parked = self.mode != LoadMode::InPass;
        let request = Request::new(keys, new.tokens, local_tokens, offer, parked, now);
        self.requests.insert(new.id, request);
        self.counts.promised_tokens += offered as u64;
        offered
    }

    /// The engine has taken up the offer and says where the request's blocks are. False: the offer was taken back
    /// long ago, and what was promised cannot be kept.
    #[must_use]
    pub fn allocated(&mut self, id: u64, pages: &[Vec<i32>], now: Duration) -> bool {
        let Some(mut request) = self.requests.remove(&id) else {
            self.reassign_all(pages);
            return true;
        };
        request.last_seen = now;
        self.place(&mut request, Place::All, pages);
        let kept = !request.offer_expired;
        if request.parked {
            self.load(id, &mut request);
        }
        self.requests.insert(id, request);
        kept
    }

    /// The tokens that were asked about, of a request that was not reported yet; none of others.
    pub fn prompt(&self, id: u64) -> Arc<Vec<u32>> {
        self.requests.get(&id).map(Request::prompt_tokens).unwrap_or_default()
    }

    /// The metadata of the next pass.
    pub fn build(&mut self, new: Vec<Report>, cached: Vec<Report>, now: Duration) -> Vec<u8> {
        for report in new {
            self.first_report(report, now);
        }
        for report in cached {
            self.report(report, now);
        }
        if now.saturating_sub(self.looked_at) >= LOOK_EVERY {
            self.looked_at = now;
            self.age_out(now);
        }
        self.pace.next_pass();
        std::mem::replace(&mut self.next, Metadata::new(self.engine)).encode()
    }

    /// The request is over. True, at most once: some of its blocks may still be being saved.
    pub fn finished(&mut self, id: u64) -> bool {
        self.waits.remove(&id);
        self.failed.remove(&id);
        let Some(request) = self.requests.get(&id) else { return false };
        let saving = request.saves_given;
        self.forget(id);
        saving
    }

    /// A save did not arrive: the request's blocks are given again, from the first, unless that was done just now.
    ///
    /// Not where pages leave a window while their request goes on: its earlier pages are somebody else's by then.
    pub fn save_again(&mut self, id: u64, now: Duration) {
        if self.windowed {
            return;
        }
        if let Some(request) = self.requests.get_mut(&id)
            && now.saturating_sub(request.saved_again_at) >= SAVE_AGAIN_EVERY
        {
            request.saved_again_at = now;
            request.saved = 0;
        }
    }

    /// Why nothing is cached, if that is so.
    pub fn disabled(&self) -> Option<&str> {
        self.disabled.as_deref()
    }

    fn first_report(&mut self, mut report: Report, now: Duration) {
        // A parked load is over on every rank when its request is reported; of what was told of early, ranks know best.
        let over: Vec<u64> =
            self.loads.iter().filter(|(_, load)| load.request_id == report.id).map(|(id, _)| *id).collect();
        for load_id in over {
            self.end_load(load_id);
        }
        let Some(mut request) = self.requests.remove(&report.id) else {
            return self.reassign_all(&report.pages);
        };
        if report.opaque || !request.begins_with_prompt(report.known, &mut report.tokens) {
            // Not the tokens that we were asked about: whatever this is, its keys are not known.
            self.reassign_all(&report.pages);
            return self.leave_out(report.id, request);
        }
        self.shrink_local(&mut request, report.computed);
        self.place(&mut request, Place::All, &report.pages);
        request.keys.extend(&std::mem::take(&mut report.tokens));
        match self.blocks_fit(&request) {
            Fit::Yes => {}
            Fit::Unknown => return self.leave_out(report.id, request),
            Fit::No(why) => {
                tracing::error!(why, "nothing is cached any more");
                self.disabled = Some(why);
                return self.leave_out(report.id, request);
            }
        }
        self.take(report, request, 0, now);
    }

    fn report(&mut self, report: Report, now: Duration) {
        let Some(mut request) = self.requests.remove(&report.id) else {
            return self.reassign_all(&report.pages);
        };
        if report.opaque {
            self.reassign_all(&report.pages);
            return self.leave_out(report.id, request);
        }
        let from = request.pages.first().map_or(0, Vec::len);
        self.place(&mut request, Place::Behind, &report.pages);
        self.take(report, request, from, now);
    }

    fn take(&mut self, report: Report, mut request: Request, from: usize, now: Duration) {
        request.last_seen = now;
        request.keys.extend(&report.tokens);
        request.set_priorities(from, report.priorities.as_deref());
        let mut written =
            report.computed + report.scheduled.unwrap_or(usize::from(report.computed >= request.prompt));
        if request.offer.is_some() {
            self.load(report.id, &mut request);
            // Where in the pass the engine goes on behind the load it does not say: it may honour less than was offered.
            // The next report says how far it came.
            written = written.max(request.loaded_to * self.tokens_per_block as usize);
        }
        let complete = written.min(request.keys.tokens()) / self.tokens_per_block as usize;
        if self.directory.takes_saves() {
            self.save(report.id, &mut request, complete);
        } else if self.windowed {
            // When somebody takes them, their pages may be somebody else's.
            request.saved = request.saved.max(complete);
        }
        self.requests.insert(report.id, request);
    }

    /// The request goes on without the cache.
    fn leave_out(&mut self, id: u64, request: Request) {
        self.counts.bypassed_requests += 1;
        self.requests.insert(id, request);
        self.forget(id);
    }

    /// Forgets a request. An offer that was not taken up is taken back; a parked load goes on until its pages change
    /// hands, which they do when the engine uses them again.
    fn forget(&mut self, id: u64) {
        let Some(request) = self.requests.remove(&id) else { return };
        match request.offer {
            Some(offer) if offer.loaded > 0 => self.next.ended.push(offer.lease),
            Some(offer) => self.take_back(offer.lease),
            None => {}
        }
    }

    /// Takes back an offer that no rank has heard of. The daemon does it for all ranks; without it they do it themselves.
    fn take_back(&mut self, lease: Lease) {
        self.directory.take_back(lease);
        self.next.ended.push(lease);
    }

    fn age_out(&mut self, now: Duration) {
        let loading: HashSet<u64> = self.loads.values().map(|load| load.request_id).collect();
        let silent = |id: &u64, request: &Request| {
            !loading.contains(id) && now.saturating_sub(request.last_seen) >= REQUEST_KEPT
        };
        let vanished: Vec<u64> =
            self.requests.iter().filter(|(id, request)| silent(id, request)).map(|(id, _)| *id).collect();
        for id in vanished {
            self.forget(id);
        }
        let mut old = Vec::new();
        for request in self.requests.values_mut() {
            let unused =
                |offer: &mut Offer| offer.loaded == 0 && now.saturating_sub(offer.made_at) >= OFFER_KEPT;
            if let Some(offer) = request.offer.take_if(unused) {
                request.offer_expired = true;
                old.push(offer.lease);
            }
        }
        for lease in old {
            self.take_back(lease);
        }
    }
}
