//! The cache as the engine's loop sees it: every call returns at once, results come as events.
//!
//! One thread owns it. It decides everything about the pool in that thread, from its [`PoolTable`]; the link only
//! forwards and reports. So a detach is one step here: epoch, quarantine, table, answers; no other thread can be in the
//! middle of something.
//!
//! Who owns a block: `allocate` and a lookup's `device` give the caller one reference per block, `release` takes one.
//! Targets of an onboard are the cache's until `Onboarded` says they are the caller's again (`ok`), or gone.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvbm_hash::{Namespace, Retention, SequenceHash};
use kvbm_shm::PoolMemory;

use kvbm_proto::v1::TraceContext;
use kvbm_telemetry::context_of;
use tracing::Span;

use crate::exchange::{Attempt, Command, Note, QuestionId};
use crate::link::LinkHandle;
use crate::pool_table::{BlockRef, Content, DaemonId, PoolTable, Release};
use crate::{Config, Counters, DetachReason, WorkerRegistration};

mod arrivals;
mod promotion;
mod start;
#[cfg(test)]
mod tests;

pub use start::{MakePool, StartError, Startup};

use promotion::Stage;

/// Open questions, at most; more are answered locally.
const QUESTIONS_MAX: usize = 512;

/// Names a lease for as long as the engine is attached; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LeaseId(u64);

/// What came of an allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allocate {
    /// The caller's, one reference each.
    Blocks(Vec<u32>),
    /// Ask again after [`CacheEvent::Granted`].
    Pending,
    /// Nothing more can be evicted now, and the daemon knew of all releases when it said so. Until a release or the next
    /// [`DeviceCache::poll`], whoever asks for as many hears the same; then the daemon is asked again.
    Exhausted,
}

/// A result, or a change of state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheEvent {
    /// The answer to a lookup.
    Looked {
        /// The caller's name for it.
        ticket: u64,
        /// Leading blocks that are in the pool, one reference each for the caller.
        device: Vec<u32>,
        /// Blocks behind them that are in host memory and may be onboarded: leases, onboards under way and quarantine
        /// together are at most half of the pool.
        host_blocks: u32,
        /// How many of the host blocks were on disk when the lookup began and were waited for.
        promoted_blocks: u32,
        /// Blocks behind the host blocks that are on disk still; none while more are in host memory. They are not
        /// waited for.
        disk_blocks: u32,
        /// What to onboard the host blocks with.
        lease: Option<LeaseId>,
    },
    /// A lookup found blocks on disk and waits for them to come to host memory, `disk_wait_max` at most. Its `Looked`
    /// follows. Until then it holds nothing.
    Promoting {
        /// The caller's name for it.
        ticket: u64,
    },
    /// An allocation that was pending may succeed now.
    Granted,
    /// The outcome of an onboard.
    Onboarded {
        /// The caller's name for it.
        ticket: u64,
        /// The targets are complete and the caller's. Otherwise they are the caller's no more.
        ok: bool,
    },
    /// The daemon decides about the pool again.
    Attached {
        /// The daemon's name for it.
        pool_id: u32,
    },
    /// The engine is on its own.
    Detached {
        /// Why.
        reason: DetachReason,
    },
}

/// Who decides about the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheState {
    /// The engine.
    Detached,
    /// The daemon, which has not confirmed it yet: only blocks in use are found, allocations wait.
    Attaching,
    /// The daemon.
    Attached {
        /// It owes an answer whose deadline has passed: it is not asked until it has given one.
        breaker_open: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Detached,
    Attaching { attempt: Attempt, daemon: DaemonId },
    Attached { attempt: Attempt, daemon: DaemonId },
}

#[derive(Debug)]
struct Lookup {
    ticket: u64,
    namespace: Namespace,
    keys: Vec<SequenceHash>,
    /// Empty, or one for each key.
    retention: Vec<Option<Retention>>,
    stage: Stage,
    abandoned: bool,
    /// The caller's place in a trace.
    trace: Option<TraceContext>,
}

#[derive(Debug)]
struct Lease {
    lease_id: u64,
    contents: Vec<(Content, Retention)>,
}

#[derive(Debug)]
struct Onboard {
    ticket: u64,
    lease_id: u64,
    targets: Vec<u32>,
    contents: Vec<(Content, Retention)>,
    abandoned: bool,
}

/// A request for grants that is under way.
#[derive(Debug, Clone, Copy)]
struct Asked {
    blocks: u32,
    /// Releases before it.
    releases: u64,
}

/// What the daemon's answers say about blocks that it could still give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shortage {
    /// There may be some: it gave all that was asked, or blocks were released since.
    Unknown,
    /// There were none when an allocation waited, which has not heard of it yet.
    Certain,
    /// Allocations of this turn hear of it.
    Told,
    /// There were none some time ago: no blocks are asked for in advance.
    Past,
}

/// An event and the blocks that go with it, should nobody want it any more.
#[derive(Debug)]
struct Queued {
    event: CacheEvent,
    targets: Vec<u32>,
}

/// The engine's blocks, with the daemon or without.
pub struct DeviceCache {
    config: Config,
    table: PoolTable,
    memory: Arc<PoolMemory>,
    mode: Mode,
    link: Option<LinkHandle>,
    breaker_open: bool,
    events: VecDeque<Queued>,
    lookups: HashMap<QuestionId, Lookup>,
    onboards: HashMap<QuestionId, Onboard>,
    leases: HashMap<LeaseId, Lease>,
    /// Commits and releases that were not sent yet.
    notes: Vec<Note>,
    /// Open requests for grants.
    grants: HashMap<QuestionId, Asked>,
    /// Blocks that a pending allocation needs; 0 when none is pending.
    wanted: u32,
    shortage: Shortage,
    /// How many releases the daemon was told of, or will be.
    releases: u64,
    numbers: u64,
    /// The table's time begins.
    began: Instant,
    counters: Arc<Counters>,
}

impl DeviceCache {
    /// The mapped pool. It stays the same over detach and re-attachment.
    pub fn memory(&self) -> Arc<PoolMemory> {
        self.memory.clone()
    }

    /// What the cache did so far.
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }

    /// Who decides about the pool.
    pub fn state(&self) -> CacheState {
        match self.mode {
            Mode::Detached => CacheState::Detached,
            Mode::Attaching { .. } => CacheState::Attaching,
            Mode::Attached { .. } => CacheState::Attached { breaker_open: self.breaker_open },
        }
    }

    /// Blocks in the pool.
    pub fn block_count(&self) -> u32 {
        self.table.block_count()
    }

    /// The table, for tests and status.
    pub fn table(&self) -> &PoolTable {
        &self.table
    }

    /// Changes how this engine is listed in the daemon's registry.
    pub fn set_worker(&self, worker: Option<WorkerRegistration>) {
        if let Some(link) = &self.link {
            link.set_worker(worker);
        }
    }

    /// True when [`DeviceCache::poll`] would return something that no wake-up announced.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// Finds the longest prefix of `keys`, which begin with the first block of a sequence. Answered by
    /// [`CacheEvent::Looked`]; before that, perhaps, [`CacheEvent::Promoting`]. `retention` is empty, or says of each key
    /// what its block is to be kept like from now on; `None`: its priority stays.
    pub fn lookup(
        &mut self,
        ticket: u64,
        namespace: Namespace,
        keys: Vec<SequenceHash>,
        retention: Vec<Option<Retention>>,
    ) {
        let (stage, abandoned) = (Stage::Asked, false);
        let trace = context_of(&Span::current());
        self.ask_match(Lookup { ticket, namespace, keys, retention, stage, abandoned, trace });
    }

    fn ask_match(&mut self, lookup: Lookup) {
        if lookup.keys.is_empty() || !self.may_ask() {
            return self.answer_locally(lookup);
        }
        let question = self.number();
        let (namespace, keys) = (lookup.namespace, lookup.keys.clone());
        let (retention, trace) = (lookup.retention.clone(), lookup.trace.clone());
        self.lookups.insert(question, lookup);
        let (miss, fail) = (self.config.match_deadline, self.config.detach_after);
        self.ask(question, Some(miss), fail, Command::Match { question, namespace, keys, retention, trace });
    }

    /// Takes `count` blocks to fill, all or none.
    pub fn allocate(&mut self, count: usize) -> Allocate {
        self.advance();
        if let Some(blocks) = self.table.take(count) {
            self.counters.allocated_blocks.add(blocks.len() as u64);
            self.top_up();
            return Allocate::Blocks(blocks);
        }
        let wanted = u32::try_from(count).ok().filter(|count| *count <= self.block_count());
        let Some(wanted) = wanted.filter(|_| self.mode != Mode::Detached) else {
            self.counters.exhausted.add(1);
            return Allocate::Exhausted;
        };
        if matches!(self.shortage, Shortage::Certain | Shortage::Told) && self.grants.is_empty() {
            self.shortage = Shortage::Told;
            self.counters.exhausted.add(1);
            return Allocate::Exhausted;
        }
        self.wanted = self.wanted.max(wanted);
        self.flush();
        self.top_up();
        Allocate::Pending
    }

    /// Copies the first `targets` blocks of a lease into blocks that were allocated and not committed. Ends the lease.
    /// Answered by [`CacheEvent::Onboarded`]; until then nobody may touch the targets.
    pub fn onboard(&mut self, ticket: u64, lease: LeaseId, targets: Vec<u32>) {
        let may_ask = self.may_ask();
        let Some(mut lease) = self.leases.remove(&lease) else {
            return self.onboard_failed(ticket, &targets);
        };
        if !may_ask || targets.is_empty() || targets.len() > lease.contents.len() {
            self.send_now(Command::ReleaseLease(lease.lease_id));
            return self.onboard_failed(ticket, &targets);
        }
        lease.contents.truncate(targets.len());
        let question = self.number();
        let refs = targets.iter().map(|&block| self.table.block_ref(block)).collect();
        let lease_id = lease.lease_id;
        let onboard = Onboard { ticket, lease_id, targets, contents: lease.contents, abandoned: false };
        self.onboards.insert(question, onboard);
        // Copies queue behind each other.
        let blocks: usize = self.onboards.values().map(|onboard| onboard.targets.len()).sum();
        let mebibytes = (blocks * self.memory.layout().block_bytes).div_ceil(1 << 20);
        let fail = self.config.detach_after
            + self.config.onboard_per_mib.saturating_mul(u32::try_from(mebibytes).unwrap_or(u32::MAX));
        let command =
            Command::Onboard { question, lease_id, targets: refs, trace: context_of(&Span::current()) };
        self.ask(question, None, fail, command);
    }

    /// `block` is filled and will not be written again; it is to be kept as `retention` says. Reaches the daemon with the
    /// next [`DeviceCache::flush`].
    pub fn commit(
        &mut self,
        block: u32,
        namespace: Namespace,
        key: SequenceHash,
        parent: Option<SequenceHash>,
        retention: Retention,
    ) {
        let content = Content { namespace, key, parent };
        self.table.commit(block, content, retention);
        if self.mode != Mode::Detached {
            self.notes.push(Note::Commit { block: self.table.block_ref(block), content, retention });
        }
    }

    /// Gives back one reference of each block. Reaches the daemon with the next [`DeviceCache::flush`].
    pub fn release(&mut self, blocks: &[u32]) {
        self.advance();
        for &block in blocks {
            if let Some(release) = self.table.unreference(block) {
                self.note_release(release);
            }
        }
    }

    /// One more reference for a block that the caller holds.
    pub fn reference(&mut self, block: u32) {
        self.table.reference(block);
    }

    /// A lease will not be used.
    pub fn abandon_lease(&mut self, lease: LeaseId) {
        if let Some(lease) = self.leases.remove(&lease) {
            self.send_now(Command::ReleaseLease(lease.lease_id));
        }
    }

    /// Nobody waits for the lookup or onboard named `ticket` any more. What it brings, or has brought since the last
    /// [`DeviceCache::poll`], is given back, onboard targets included.
    pub fn abandon(&mut self, ticket: u64) {
        for lookup in self.lookups.values_mut().filter(|lookup| lookup.ticket == ticket) {
            lookup.abandoned = true;
        }
        for onboard in self.onboards.values_mut().filter(|onboard| onboard.ticket == ticket) {
            onboard.abandoned = true;
        }
        for Queued { event, targets } in std::mem::take(&mut self.events) {
            match event {
                CacheEvent::Looked { ticket: of, device, lease, .. } if of == ticket => {
                    self.release(&device);
                    lease.into_iter().for_each(|lease| self.abandon_lease(lease));
                }
                CacheEvent::Promoting { ticket: of } if of == ticket => {}
                CacheEvent::Onboarded { ticket: of, .. } if of == ticket => self.release(&targets),
                event => self.events.push_back(Queued { event, targets }),
            }
        }
    }

    /// Sends what commits and releases piled up. Once per turn of the loop is enough.
    pub fn flush(&mut self) {
        if matches!(self.mode, Mode::Attached { .. }) && !self.notes.is_empty() {
            let notes = std::mem::take(&mut self.notes);
            self.send_now(Command::Notes(notes));
        }
    }

    /// Takes in what arrived, and returns what is new.
    pub fn poll(&mut self) -> Vec<CacheEvent> {
        if self.shortage == Shortage::Told {
            self.shortage = Shortage::Past;
        }
        self.take_in();
        self.events.drain(..).map(|queued| queued.event).collect()
    }

    /// Tells the table the time: a priority's begins with a release, and is over before an eviction.
    fn advance(&mut self) {
        self.table.advance(self.began.elapsed());
    }

    fn note_release(&mut self, release: Release) {
        self.shortage = Shortage::Unknown;
        self.releases += 1;
        if self.mode != Mode::Detached {
            self.notes.push(Note::Release(release));
        }
    }

    /// Whether a question can be asked now. What piled up goes first: no question overtakes it, and should it be what
    /// ends the session, no question is lost with it.
    fn may_ask(&mut self) -> bool {
        self.flush();
        let open = self.lookups.len() + self.onboards.len() + self.grants.len();
        matches!(self.mode, Mode::Attached { .. }) && !self.breaker_open && open < QUESTIONS_MAX
    }

    fn answer_locally(&mut self, lookup: Lookup) {
        if lookup.abandoned {
            return;
        }
        self.counters.local_matches.add(1);
        let device = self.table.find(&lookup.keys, &lookup.retention);
        let (ticket, lease) = (lookup.ticket, None);
        let (host_blocks, promoted_blocks, disk_blocks) = (0, 0, 0);
        self.push(CacheEvent::Looked { ticket, device, host_blocks, promoted_blocks, disk_blocks, lease });
    }

    /// The daemon never wrote to `targets`, or has ended.
    fn onboard_failed(&mut self, ticket: u64, targets: &[u32]) {
        self.counters.onboard_failures.add(1);
        self.release(targets);
        self.push(CacheEvent::Onboarded { ticket, ok: false });
    }

    /// Asks for grants when the stash runs low, or an allocation waits.
    fn top_up(&mut self) {
        if self.shortage != Shortage::Unknown && self.wanted == 0 {
            return;
        }
        let stash = self.config.stash_blocks_max.min(self.block_count() / 8).max(1);
        let have = u32::try_from(self.table.free_count()).unwrap_or(u32::MAX);
        let have = have.saturating_add(self.grants.values().map(|asked| asked.blocks).sum());
        let low = if self.wanted > 0 { self.wanted } else { stash.div_ceil(2) };
        if have < low && self.may_ask() {
            let (question, count) = (self.number(), stash.max(self.wanted) - have);
            self.grants.insert(question, Asked { blocks: count, releases: self.releases });
            let command = Command::RequestGrants { question, count };
            self.ask(question, None, self.config.detach_after, command);
        }
    }

    /// Asks what is registered already, so that the end of the session answers it, this call's included.
    fn ask(&mut self, question: QuestionId, miss: Option<Duration>, fail: Duration, command: Command) {
        let Mode::Attached { attempt, .. } = self.mode else { return self.not_asked(question) };
        if let Some(link) = &self.link {
            link.desk.open(attempt, question, Instant::now(), miss, fail);
        }
        self.send_now(command);
    }

    /// Nobody will answer this question.
    fn not_asked(&mut self, question: QuestionId) {
        if let Some(lookup) = self.lookups.remove(&question) {
            self.answer_locally(lookup);
        }
        if let Some(onboard) = self.onboards.remove(&question) {
            self.onboard_failed(onboard.ticket, &onboard.targets);
        }
        if self.grants.remove(&question).is_some() && std::mem::take(&mut self.wanted) > 0 {
            self.push(CacheEvent::Granted);
        }
    }

    fn send_now(&mut self, command: Command) {
        let Mode::Attached { attempt, .. } = self.mode else { return };
        let sent = self.link.as_ref().map_or(Ok(()), |link| link.send(attempt, command));
        if let Err(reason) = sent {
            self.give_up(reason);
        }
    }

    fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    fn push(&mut self, event: CacheEvent) {
        self.events.push_back(Queued { event, targets: Vec::new() });
    }
}
