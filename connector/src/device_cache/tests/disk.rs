//! Lookups that find blocks on disk.

use super::*;

/// What the engine asked last.
#[derive(Debug, PartialEq)]
enum Asked {
    Match(QuestionId),
    /// With so many keys.
    Prefetch(QuestionId, usize),
}

impl Engine {
    /// The one question that was asked since, and the leases that were given back.
    fn asked(&mut self) -> (Asked, Vec<u64>) {
        let (mut asked, mut returned) = (Vec::new(), Vec::new());
        while let Ok((_, command)) = self.commands.try_recv() {
            match command {
                Command::Match { question, .. } => asked.push(Asked::Match(question)),
                Command::Prefetch { question, keys: of, .. } => {
                    assert_eq!(of, keys(of.len() as u8), "the prefix, from its first block");
                    asked.push(Asked::Prefetch(question, of.len()));
                }
                Command::ReleaseLease(lease) => returned.push(lease),
                Command::Notes(_) | Command::RequestGrants { .. } => {}
                other @ (Command::Open(_) | Command::Onboard { .. }) => panic!("{other:?}"),
            }
        }
        let [asked] = <[Asked; 1]>::try_from(asked).unwrap();
        (asked, returned)
    }

    fn matched(&mut self, reply: v1::MatchReply) -> Vec<CacheEvent> {
        let Asked::Match(question) = self.asked().0 else { panic!("a match is asked") };
        self.link().desk.close(question);
        self.turn([Arrival::Matched { question, result: Ok(reply) }])
    }

    /// Looks up `count` blocks, of which `host` are in host memory and those behind them on disk. Returns the question
    /// that waits, and for how many blocks.
    fn wait(&mut self, ticket: u64, count: u8, host: u32, disk: u32) -> (QuestionId, usize) {
        self.cache.lookup(ticket, NAMESPACE, keys(count), vec![]);
        assert_eq!(self.matched(reply(host, disk)), [CacheEvent::Promoting { ticket }]);
        let (Asked::Prefetch(question, blocks), returned) = self.asked() else { panic!("a wait is asked") };
        assert_eq!(returned, if host > 0 { vec![LEASE] } else { vec![] }, "nothing is held meanwhile");
        assert!(self.cache.leases.is_empty());
        (question, blocks)
    }

    fn arrived(&mut self, question: QuestionId) -> Vec<CacheEvent> {
        self.turn([Arrival::Prefetched { question, result: Ok(v1::PrefetchReply::default()) }])
    }

    fn next_deadline(&self) -> Duration {
        self.link().desk.next(ATTEMPT).unwrap().saturating_duration_since(Instant::now())
    }
}

const LEASE: u64 = 70;

fn reply(host_blocks: u32, disk_blocks: u32) -> v1::MatchReply {
    let lease_id = if host_blocks > 0 { LEASE } else { 0 };
    v1::MatchReply { host_blocks, disk_blocks, lease_id, ..Default::default() }
}

/// Host blocks, promoted ones among them, disk blocks.
fn counts(events: &[CacheEvent]) -> (u32, u32, u32) {
    match events {
        [CacheEvent::Looked { host_blocks, promoted_blocks, disk_blocks, .. }] => {
            (*host_blocks, *promoted_blocks, *disk_blocks)
        }
        other => panic!("{other:?}"),
    }
}

const CALM: CacheState = CacheState::Attached { breaker_open: false };

#[test]
fn a_lookup_waits_for_the_disk_once_and_says_what_came_from_there() {
    let mut engine = Engine::attached(32);
    let (question, blocks) = engine.wait(1, 9, 2, 4);
    assert_eq!(blocks, 6, "no more is wanted from disk than was promised");
    assert!(engine.turn([]).is_empty());
    assert!(engine.arrived(question).is_empty());
    // One did not come, and further ones are not waited for.
    assert_eq!(counts(&engine.matched(reply(5, 2))), (5, 3, 2));
    assert_eq!(engine.cache.leases.len(), 1);
    let counters = engine.cache.counters();
    assert_eq!(
        (counters.matches.get(), counters.disk_waits.get(), counters.promoted_blocks.get()),
        (1, 1, 3)
    );
}

#[test]
fn what_others_brought_meanwhile_is_not_counted_as_this_wait_s() {
    let mut engine = Engine::attached(32);
    let (question, _) = engine.wait(1, 9, 2, 3);
    engine.arrived(question);
    assert_eq!(counts(&engine.matched(reply(8, 0))), (8, 3, 0));
    // Blocks that are in the pool by now are no host blocks.
    let mut engine = Engine::holding(32, &[0, 1]);
    let (question, _) = engine.wait(1, 9, 0, 3);
    for (block, at) in [(0, 0), (1, 1)] {
        engine.cache.commit(
            block,
            NAMESPACE,
            keys(2)[at],
            at.checked_sub(1).map(|before| keys(2)[before]),
            Retention::default(),
        );
    }
    engine.arrived(question);
    let device = [0, 1].map(|block| v1::BlockRef { block, generation: engine.generation_of(block) });
    let events = engine.matched(v1::MatchReply { device: device.into(), ..reply(2, 0) });
    assert_eq!(counts(&events), (2, 1, 0));
}

#[test]
fn pins_go_back_before_the_wait() {
    let mut engine = Engine::holding(32, &[0]);
    engine.cache.commit(0, NAMESPACE, keys(1)[0], None, Retention::default());
    engine.cache.release(&[0]);
    engine.cache.lookup(1, NAMESPACE, keys(3), vec![]);
    let device = v1::BlockRef { block: 0, generation: engine.generation_of(0) };
    let events = engine.matched(v1::MatchReply { device: vec![device], ..reply(0, 2) });
    assert_eq!(events, [CacheEvent::Promoting { ticket: 1 }]);
    assert_eq!(engine.cache.table.refs(0), 0);
    let mut returned = Vec::new();
    while let Ok((_, command)) = engine.commands.try_recv() {
        match command {
            Command::Notes(notes) => returned.extend(notes),
            Command::Prefetch { .. } => break,
            _ => {}
        }
    }
    let returned: Vec<_> = returned.iter().filter(|note| matches!(note, Note::Release(_))).collect();
    let [Note::Release(release)] = returned[..] else { panic!("{returned:?}") };
    assert_eq!((release.block.block, release.pins), (0, 1));
}

#[test]
fn a_daemon_that_refuses_to_wait_is_asked_again_at_once() {
    for refusal in [Refusal::Busy, Refusal::Closed, Refusal::Invalid] {
        let mut engine = Engine::attached(32);
        let (question, _) = engine.wait(1, 4, 0, 2);
        assert!(engine.turn([Arrival::Prefetched { question, result: Err(refused(refusal)) }]).is_empty());
        assert_eq!(counts(&engine.matched(reply(0, 2))), (0, 0, 2));
        assert_eq!(engine.cache.state(), CALM);
    }
}

#[test]
fn a_slow_disk_opens_no_breaker_and_ends_no_session() {
    let mut engine = Engine::attached(32);
    let (question, _) = engine.wait(1, 4, 1, 2);
    engine.cache.grants.keys().for_each(|question| engine.link().desk.close(*question));
    let planned = engine.next_deadline();
    assert!(planned <= Duration::from_millis(252) && planned > Duration::from_millis(20), "{planned:?}");
    // The desk forgets the deadline of the wait, and keeps that of the answer.
    let later = Instant::now() + planned;
    let expired = engine.link().desk.expire(ATTEMPT, later, later);
    assert_eq!(expired, crate::desk::Expired::Missed(vec![question]));
    assert!(engine.next_deadline() > Duration::from_secs(50));
    assert!(engine.turn([Arrival::Missed { question }]).is_empty());
    assert_eq!(engine.cache.state(), CALM);
    assert_eq!(counts(&engine.matched(reply(1, 2))), (1, 0, 2));
    assert!(engine.arrived(question).is_empty(), "nobody waits for that any more");
    let counters = engine.cache.counters();
    assert_eq!((counters.disk_wait_timeouts.get(), counters.match_timeouts.get()), (1, 0));
}

#[test]
fn a_daemon_that_is_silent_after_the_wait_is_one_that_is_silent() {
    let mut engine = Engine::attached(32);
    let (question, _) = engine.wait(1, 4, 0, 2);
    engine.arrived(question);
    let Asked::Match(question) = engine.asked().0 else { panic!("a match is asked") };
    assert_eq!(counts(&engine.turn([Arrival::Missed { question }])), (0, 0, 0));
    assert_eq!(engine.cache.state(), CacheState::Attached { breaker_open: true });
}

#[test]
fn only_blocks_that_could_be_used_are_waited_for() {
    let mut engine = Engine::attached(16);
    // Wanted are 3 blocks: one in host memory, two behind it.
    assert_eq!(engine.wait(1, 3, 1, 50).1, 3);
    // Half of the pool may be onboarded.
    let mut engine = Engine::attached(16);
    assert_eq!(engine.wait(1, 30, 5, 20).1, 8);
    for (blocks, first) in [(3, reply(3, 9)), (30, reply(8, 9)), (30, reply(20, 9)), (3, reply(0, 0))] {
        let mut engine = Engine::attached(16);
        engine.cache.lookup(1, NAMESPACE, keys(blocks), vec![]);
        let host = first.host_blocks.min(8);
        assert_eq!(counts(&engine.matched(first)).0, host, "answered at once");
    }
    let mut engine = Engine::attached(16);
    engine.cache.config.disk_wait_max = Duration::ZERO;
    engine.cache.lookup(1, NAMESPACE, keys(9), vec![]);
    assert_eq!(counts(&engine.matched(reply(1, 4))), (1, 0, 4), "known, and not waited for");
}

#[test]
fn a_wait_ends_with_the_session() {
    let mut engine = Engine::holding(16, &[0]);
    engine.cache.commit(0, NAMESPACE, keys(1)[0], None, Retention::default());
    engine.wait(1, 4, 0, 2);
    let events = engine.turn([Arrival::Down { reason: DetachReason::Silent, daemon_dead: false }]);
    let [CacheEvent::Looked { ticket: 1, device, lease: None, .. }, CacheEvent::Detached { .. }] =
        &events[..]
    else {
        panic!("{events:?}")
    };
    assert_eq!(*device, [0], "what the engine knows itself");
    assert!(engine.cache.lookups.is_empty());
}

#[test]
fn a_lookup_whose_wait_cannot_be_asked_is_answered() {
    let mut engine = Engine::attached(16);
    engine.cache.lookup(1, NAMESPACE, keys(4), vec![]);
    let Asked::Match(question) = engine.asked().0 else { panic!("a match is asked") };
    engine.fill_the_queue();
    let events = engine.turn([Arrival::Matched { question, result: Ok(reply(1, 2)) }]);
    let [CacheEvent::Detached { reason: DetachReason::QueueFull }, CacheEvent::Looked { ticket: 1, .. }] =
        &events[..]
    else {
        panic!("{events:?}")
    };
    assert!(engine.cache.lookups.is_empty());
}

#[test]
fn a_wait_that_is_abandoned_ends_without_a_word() {
    for early in [true, false] {
        let mut engine = Engine::attached(16);
        engine.cache.lookup(1, NAMESPACE, keys(4), vec![]);
        let Asked::Match(question) = engine.asked().0 else { panic!("a match is asked") };
        if early {
            // Its event is still to be taken.
            engine.link().inbox.push(ATTEMPT, Arrival::Matched { question, result: Ok(reply(0, 2)) });
            engine.cache.take_in();
            assert!(engine.cache.has_events());
        } else {
            engine.turn([Arrival::Matched { question, result: Ok(reply(0, 2)) }]);
        }
        engine.cache.abandon(1);
        assert!(!engine.cache.has_events());
        let Asked::Prefetch(question, 2) = engine.asked().0 else { panic!("a wait is asked") };
        assert!(engine.arrived(question).is_empty());
        assert!(engine.cache.lookups.is_empty());
        let asked_again = std::iter::from_fn(|| engine.commands.try_recv().ok())
            .any(|(_, command)| matches!(command, Command::Match { .. }));
        assert!(!asked_again);
    }
}

#[test]
fn an_answer_to_a_wait_that_makes_no_sense_ends_the_session() {
    let mut engine = Engine::attached(16);
    let (question, _) = engine.wait(1, 4, 0, 2);
    let malformed = ClientError::malformed("expected Prefetch, got Pong");
    let events = engine.turn([Arrival::Prefetched { question, result: Err(malformed) }]);
    assert!(matches!(events[0], CacheEvent::Looked { ticket: 1, .. }), "{events:?}");
    assert_eq!(engine.cache.state(), CacheState::Detached);
}
