//! The engine's half alone: the link is there, but nobody runs it, and the test says what arrives.

use std::sync::Arc;

use kvbm_hash::{Namespace, SequenceHash};
use kvbm_proto::v1::{self, Refusal};
use kvbm_shm::{PoolLayout, PoolMemory};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc::Receiver;

use super::start::Beginning;
use super::*;
use crate::ClientError;
use crate::desk::Desk;
use crate::exchange::{Arrival, Inbox};

mod disk;
mod walk;

const ATTEMPT: Attempt = 1;
const DAEMON: DaemonId = DaemonId(1);
const NAMESPACE: Namespace = Namespace([7; 32]);

struct Engine {
    cache: DeviceCache,
    commands: Receiver<(Attempt, Command)>,
    generation: u32,
    _idle: Runtime,
}

fn keys(count: u8) -> Vec<SequenceHash> {
    (0..count).map(|at| SequenceHash([at + 1; 16])).collect()
}

fn refused(refusal: Refusal) -> ClientError {
    ClientError::Refused { refusal, detail: "pool is not this session's".into() }
}

impl Engine {
    fn attached(block_count: u32) -> Self {
        let idle = Builder::new_current_thread().build().unwrap();
        let layout = PoolLayout { block_bytes: 64, block_count };
        let (desk, inbox) = (Arc::new(Desk::default()), Arc::new(Inbox::new(Arc::new(|| {}))));
        let (link, commands) = LinkHandle::unserved(desk, inbox, idle.handle());
        let beginning = Beginning {
            table: PoolTable::new_granted(block_count),
            memory: PoolMemory::create([5; 16], layout).unwrap(),
            mode: Mode::Attached { attempt: ATTEMPT, daemon: DAEMON },
        };
        let cache = DeviceCache::begin(Config::new("none"), Some(link), beginning);
        Self { cache, commands, generation: 0, _idle: idle }
    }

    fn generation_of(&self, block: u32) -> u32 {
        self.cache.table.block_ref(block).generation
    }

    fn link(&self) -> &LinkHandle {
        self.cache.link.as_ref().unwrap()
    }

    /// What the engine does in one turn before it allocates, when this arrived.
    fn turn(&mut self, arrivals: impl IntoIterator<Item = Arrival>) -> Vec<CacheEvent> {
        arrivals.into_iter().for_each(|arrival| self.link().inbox.push(ATTEMPT, arrival));
        let events = self.cache.poll();
        self.cache.table.check_integrity().unwrap();
        events
    }

    /// The one request for grants that is open, answered with these blocks.
    fn granted(&mut self, blocks: &[u32]) -> Arrival {
        self.generation += 1;
        let mut open: Vec<_> = self.cache.grants.keys().copied().collect();
        open.sort_unstable();
        let block = |&block| BlockRef { block, generation: self.generation };
        Arrival::Granted { question: open[0], result: Ok(blocks.iter().map(block).collect()) }
    }

    fn allocate(&mut self, count: usize) -> Vec<u32> {
        match self.cache.allocate(count) {
            Allocate::Blocks(blocks) => blocks,
            other => panic!("{other:?}"),
        }
    }

    /// Attached, with these blocks in use and nothing under way.
    fn holding(block_count: u32, held: &[u32]) -> Self {
        let mut engine = Self::attached(block_count);
        assert_eq!(engine.cache.allocate(held.len()), Allocate::Pending);
        let grants = engine.granted(held);
        assert_eq!(engine.turn([grants]), [CacheEvent::Granted]);
        assert_eq!(engine.allocate(held.len()).len(), held.len());
        engine.answer_all(&[]);
        engine
    }

    /// All requests for grants, answered with nothing but, at first, these blocks.
    fn answer_all(&mut self, mut blocks: &[u32]) -> Vec<CacheEvent> {
        let mut events = Vec::new();
        while !self.cache.grants.is_empty() {
            let grants = self.granted(std::mem::take(&mut blocks));
            events.extend(self.turn([grants]));
        }
        events
    }

    /// Asks for `count` blocks of which the daemon has `host` in host memory, and none else.
    fn look(&mut self, ticket: u64, count: u8, host: u32) -> (u32, Option<LeaseId>) {
        self.cache.lookup(ticket, NAMESPACE, keys(count), vec![]);
        let question = *self.cache.lookups.keys().next().unwrap();
        let reply = v1::MatchReply { host_blocks: host, lease_id: 10 + ticket, ..Default::default() };
        match &self.turn([Arrival::Matched { question, result: Ok(reply) }])[..] {
            [CacheEvent::Looked { host_blocks, lease, .. }] => (*host_blocks, *lease),
            other => panic!("{other:?}"),
        }
    }

    fn fill_the_queue(&self) {
        while self.link().send(ATTEMPT, Command::ReleaseLease(1)).is_ok() {}
    }
}

#[test]
fn all_allocations_of_a_turn_hear_the_same_and_the_next_turn_asks_again() {
    let mut engine = Engine::holding(4, &[0, 1, 2, 3]);
    for _ in 0..3 {
        assert_eq!([(); 2].map(|()| engine.cache.allocate(1)), [Allocate::Pending, Allocate::Pending]);
        assert_eq!(engine.cache.grants.len(), 1, "asked once");
        assert!(engine.turn([]).is_empty(), "nothing new");
        assert_eq!(engine.cache.allocate(1), Allocate::Pending);
        assert_eq!(engine.answer_all(&[]), [CacheEvent::Granted]);
        assert_eq!([(); 3].map(|()| engine.cache.allocate(1)), [(); 3].map(|()| Allocate::Exhausted));
        assert!(engine.turn([]).is_empty());
        assert!(engine.cache.grants.is_empty(), "nothing is asked for in advance of nothing");
    }
}

#[test]
fn two_answers_of_one_turn_still_say_that_there_is_nothing() {
    let mut engine = Engine::holding(4, &[0, 1, 2]);
    assert_eq!([1, 3].map(|count| engine.cache.allocate(count)), [Allocate::Pending, Allocate::Pending]);
    assert_eq!(engine.cache.grants.len(), 2);
    let mut open: Vec<_> = engine.cache.grants.keys().copied().collect();
    open.sort_unstable();
    let nothing = |question| Arrival::Granted { question, result: Ok(Vec::new()) };
    assert_eq!(engine.turn(open.into_iter().map(nothing)), [CacheEvent::Granted]);
    assert_eq!([3, 1].map(|count| engine.cache.allocate(count)), [Allocate::Exhausted, Allocate::Exhausted]);
}

#[test]
fn an_answer_that_a_release_overtook_is_not_the_last_word() {
    let mut engine = Engine::holding(4, &[0, 1, 2, 3]);
    assert_eq!(engine.cache.allocate(1), Allocate::Pending);
    engine.cache.release(&[3]);
    let stale = engine.granted(&[]);
    assert!(engine.turn([stale]).is_empty());
    assert_eq!(engine.cache.allocate(1), Allocate::Pending, "asked again behind the release");
    assert_eq!(engine.answer_all(&[3]), [CacheEvent::Granted]);
    assert_eq!(engine.allocate(1), [3]);
    engine.answer_all(&[]);
    // It is certain only until a release.
    assert_eq!(engine.cache.allocate(1), Allocate::Pending);
    engine.answer_all(&[]);
    assert_eq!(engine.cache.allocate(1), Allocate::Exhausted);
    engine.cache.release(&[3]);
    assert_eq!(engine.cache.allocate(1), Allocate::Pending);
}

#[test]
fn what_was_said_of_a_refill_long_ago_preempts_nobody() {
    let mut engine = Engine::holding(32, &(0..30).collect::<Vec<_>>());
    assert_eq!(engine.cache.wanted, 0);
    engine.turn([]);
    assert_eq!(engine.cache.allocate(1), Allocate::Pending, "the daemon may have blocks by now");
}

#[test]
fn a_lookup_whose_flush_ends_the_session_is_answered() {
    let mut engine = Engine::holding(4, &[0]);
    engine.cache.commit(0, NAMESPACE, keys(1)[0], None, Retention::default());
    engine.fill_the_queue();
    engine.cache.lookup(1, NAMESPACE, keys(2), vec![]);
    let events = engine.turn([]);
    let [
        CacheEvent::Detached { reason: DetachReason::QueueFull },
        CacheEvent::Looked { ticket: 1, device, .. },
    ] = &events[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!(*device, [0]);
    assert!(engine.cache.lookups.is_empty());
}

#[test]
fn an_onboard_whose_flush_ends_the_session_fails_and_its_targets_are_free() {
    let mut engine = Engine::holding(4, &[0, 1]);
    let (host_blocks, lease) = engine.look(1, 1, 1);
    assert_eq!(host_blocks, 1);
    engine.cache.commit(0, NAMESPACE, keys(1)[0], None, Retention::default());
    engine.fill_the_queue();
    engine.cache.onboard(2, lease.unwrap(), vec![1]);
    let events = engine.turn([]);
    assert!(events.contains(&CacheEvent::Onboarded { ticket: 2, ok: false }), "{events:?}");
    assert_eq!((engine.cache.onboards.len(), engine.cache.table.quarantined_count()), (0, 0));
    assert_eq!(engine.allocate(3).len(), 3, "the daemon was never told of the target");
}

#[test]
fn a_question_that_cannot_be_asked_is_answered_by_the_question_itself() {
    let mut engine = Engine::holding(4, &[0]);
    engine.cache.give_up(DetachReason::HungUp);
    engine.turn([]);
    let stage = Stage::Asked;
    let (retention, abandoned) = (vec![], false);
    let (namespace, keys_) = (NAMESPACE, keys(1));
    let lookup = Lookup { ticket: 3, namespace, keys: keys_, retention, stage, abandoned, trace: None };
    engine.cache.lookups.insert(99, lookup);
    let (question, namespace) = (99, NAMESPACE);
    let command = Command::Match { question, namespace, keys: keys(1), retention: vec![], trace: None };
    engine.cache.ask(question, None, Duration::ZERO, command);
    assert!(matches!(engine.turn([])[..], [CacheEvent::Looked { ticket: 3, .. }]));
}

#[test]
fn a_daemon_that_forgot_the_pool_is_left() {
    for of_grants in [true, false] {
        let mut engine = Engine::holding(4, &[0, 1]);
        engine.cache.lookup(1, NAMESPACE, keys(2), vec![]);
        assert_eq!(engine.cache.allocate(1), Allocate::Pending);
        let arrival = if of_grants {
            let question = *engine.cache.grants.keys().next().unwrap();
            Arrival::Granted { question, result: Err(refused(Refusal::Unknown)) }
        } else {
            let question = *engine.cache.lookups.keys().next().unwrap();
            Arrival::Matched { question, result: Err(refused(Refusal::Unknown)) }
        };
        let events = engine.turn([arrival]);
        assert_eq!(engine.cache.state(), CacheState::Detached);
        assert!(
            events
                .contains(&CacheEvent::Detached { reason: DetachReason::Refused(refused(Refusal::Unknown)) })
        );
        assert!(events.iter().any(|event| matches!(event, CacheEvent::Looked { ticket: 1, .. })));
        assert!(events.contains(&CacheEvent::Granted));
        assert_eq!(engine.allocate(2).len(), 2);
    }
}

#[test]
fn other_refusals_and_those_of_a_lease_keep_the_session() {
    let mut engine = Engine::holding(4, &[0, 1]);
    let (_, lease) = engine.look(1, 1, 1);
    engine.cache.onboard(2, lease.unwrap(), vec![1]);
    let question = *engine.cache.onboards.keys().next().unwrap();
    let forgotten = Arrival::Onboarded { question, result: Err(refused(Refusal::Unknown)) };
    assert_eq!(engine.turn([forgotten]), [CacheEvent::Onboarded { ticket: 2, ok: false }]);
    engine.cache.lookup(3, NAMESPACE, keys(1), vec![]);
    let question = *engine.cache.lookups.keys().next().unwrap();
    let busy = Arrival::Matched { question, result: Err(refused(Refusal::Busy)) };
    assert!(matches!(engine.turn([busy])[..], [CacheEvent::Looked { ticket: 3, .. }]));
    assert_eq!(engine.cache.state(), CacheState::Attached { breaker_open: false });
}

/// A daemon whose queue is full keeps the lease: the blocks would stay pinned until its deadline.
#[test]
fn the_lease_of_a_refused_onboard_is_given_back() {
    let mut engine = Engine::holding(4, &[0, 1]);
    let (_, lease) = engine.look(1, 1, 1);
    engine.cache.onboard(2, lease.unwrap(), vec![1]);
    let question = *engine.cache.onboards.keys().next().unwrap();
    let busy = Arrival::Onboarded { question, result: Err(refused(Refusal::Busy)) };
    assert_eq!(engine.turn([busy]), [CacheEvent::Onboarded { ticket: 2, ok: false }]);
    let mut returned = Vec::new();
    while let Ok((_, command)) = engine.commands.try_recv() {
        if let Command::ReleaseLease(lease) = command {
            returned.push(lease);
        }
    }
    assert_eq!(returned, [11]);
}

#[test]
fn a_detach_leaves_no_question_on_the_desk() {
    let mut engine = Engine::holding(4, &[0]);
    engine.cache.lookup(1, NAMESPACE, keys(1), vec![]);
    assert!(engine.link().desk.next(ATTEMPT).is_some());
    engine.turn([Arrival::Down { reason: DetachReason::Silent, daemon_dead: false }]);
    assert_eq!(engine.link().desk.next(ATTEMPT), None);
}

#[test]
fn half_of_the_pool_is_never_promised_to_onboards() {
    let mut engine = Engine::holding(8, &(0..8).collect::<Vec<_>>());
    let (first, lease) = engine.look(1, 3, 3);
    assert_eq!(first, 3);
    engine.cache.onboard(9, lease.unwrap(), vec![0, 1, 2]);
    let (second, lease) = engine.look(2, 7, 7);
    assert_eq!(second, 1, "the other half is left to compute in");
    assert_eq!(engine.look(3, 7, 7), (0, None));
    engine.cache.abandon_lease(lease.unwrap());
    let question = *engine.cache.onboards.keys().next().unwrap();
    let done = v1::TransferDone { blocks_done: 3, ..Default::default() };
    engine.turn([Arrival::Onboarded { question, result: Ok(done) }]);
    let (third, lease) = engine.look(4, 7, 7);
    assert_eq!(third, 4);
    // The daemon stops: its targets cannot be used, the rest can.
    engine.cache.onboard(10, lease.unwrap(), vec![3, 4, 5, 6]);
    engine.turn([Arrival::Down { reason: DetachReason::Silent, daemon_dead: false }]);
    engine.cache.release(&[0, 1, 2, 7]);
    assert_eq!(engine.cache.table.quarantined_count(), 4);
    assert_eq!(engine.allocate(4).len(), 4);
}

#[test]
fn quarantined_blocks_count_as_promised() {
    let mut engine = Engine::holding(8, &[0, 1, 2]);
    engine.cache.table.quarantine(&[0, 1, 2], DaemonId(2));
    assert_eq!(engine.look(1, 7, 7).0, 1);
}
