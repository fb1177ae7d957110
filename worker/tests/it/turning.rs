//! The loop and the echo engine behind their handles.

use std::time::Duration;

use kvbm_hash::Namespace;
use kvbm_worker::{
    CachedTokens, Echo, Eos, Event, FinishReason, Handle, Limits, Loop, Progress, Refusal, Request, Sampling,
    Scheduler, SchedulerOptions, Turn, inbox,
};
use tokio::sync::mpsc::Receiver;

use crate::test_cache::{Behaviour, TestCache, TestModel, VOCAB, expected};

const LIMITS: Limits =
    Limits { context_length: 200, vocab_size: VOCAB, pool_blocks: 40, tokens_per_block: 16 };

fn test_loop() -> (Handle, Loop<TestCache, TestModel>) {
    let (handle, inbox) = inbox(LIMITS.context_length);
    let behaviour = Behaviour {
        blocks: 40,
        tokens_per_block: 16,
        host_blocks: 10,
        delay: 1,
        pending_in: 4,
        failing_in: 0,
        disk: None,
    };
    let (cache, contents) = TestCache::new(behaviour, 3);
    let model = TestModel { contents, tokens_per_block: 16 };
    (handle, Loop::new(Scheduler::new(SchedulerOptions::new(LIMITS, vec![])), cache, model, inbox))
}

fn request(handle: &Handle, prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        id: handle.next_id(),
        namespace: Namespace([1; 32]),
        prompt,
        generated: Vec::new(),
        sampling: Sampling::greedy(),
        guide: None,
        max_tokens,
        eos: Eos::Ends,
        stop_token_ids: vec![],
        retention: None,
        span: tracing::Span::none(),
    }
}

fn turn_until_idle(turns: &mut impl Turn) {
    for _ in 0..10_000 {
        if turns.turn() == Progress::Idle {
            return;
        }
    }
    panic!("comes to rest");
}

fn drain(events: &mut Receiver<Event>) -> Vec<Event> {
    std::iter::from_fn(|| events.try_recv().ok()).collect()
}

#[test]
fn a_request_comes_back_as_events() {
    let (handle, mut turns) = test_loop();
    let prompt: Vec<u32> = (0..50).collect();
    let mut events = handle.submit(request(&handle, prompt.clone(), 30)).unwrap();
    turn_until_idle(&mut turns);
    let events = drain(&mut events);
    let started = Event::Started { cached: CachedTokens::default(), onboard: Duration::ZERO };
    assert_eq!(events[0], started);
    let mut tokens = prompt;
    for event in &events[1..31] {
        let next = Sampling::greedy().choose(&expected(&tokens), tokens.len());
        assert_eq!(*event, Event::Tokens(vec![next]));
        tokens.push(next);
    }
    let end = Event::Finished { reason: FinishReason::Length, prompt_tokens: 50, completion_tokens: 30 };
    assert_eq!(events[31..], [end]);
    let counters = *turns.counters().lock();
    assert_eq!((counters.finished, counters.generated_tokens, counters.running), (1, 30, 0));
    assert!(counters.steps >= 30 && counters.step_seconds > 0.0);
}

#[test]
fn a_lookup_that_answers_late_still_lets_a_short_prompt_overtake() {
    let (handle, inbox) = inbox(4096);
    let behaviour = Behaviour {
        blocks: 300,
        tokens_per_block: 16,
        host_blocks: 0,
        delay: 1,
        pending_in: 0,
        failing_in: 0,
        disk: None,
    };
    let (cache, contents) = TestCache::new(behaviour, 3);
    let model = TestModel { contents, tokens_per_block: 16 };
    let limits = Limits { context_length: 4096, pool_blocks: 300, ..LIMITS };
    let mut turns = Loop::new(Scheduler::new(SchedulerOptions::new(limits, vec![])), cache, model, inbox);
    let mut long = handle.submit(request(&handle, vec![1; 3900], 4)).unwrap();
    while drain(&mut long).is_empty() {
        turns.turn();
    }
    let mut short = handle.submit(request(&handle, vec![2; 100], 4)).unwrap();
    turns.turn();
    assert!(matches!(drain(&mut short)[..], [Event::Started { .. }, Event::Tokens(_)]), "in the next step");
    assert_eq!(drain(&mut long), vec![], "the long prompt is still being computed");
}

#[test]
fn clients_that_leave_hold_nothing() {
    let (handle, mut turns) = test_loop();
    let wanted = request(&handle, vec![1; 60], 100);
    let id = wanted.id;
    let mut cancelled = handle.submit(wanted).unwrap();
    let left = handle.submit(request(&handle, vec![2; 60], 100)).unwrap();
    for _ in 0..20 {
        turns.turn();
    }
    drop(left);
    handle.cancel(id).unwrap();
    turn_until_idle(&mut turns);
    let last = drain(&mut cancelled).pop();
    assert!(matches!(last, Some(Event::Finished { reason: FinishReason::Cancelled, .. })), "{last:?}");
    turns.cache().assert_nothing_held();
    assert_eq!(turns.counters().lock().cancelled, 2);
}

#[test]
fn impossible_requests_are_refused_and_stopping_is_told() {
    let (handle, mut turns) = test_loop();
    let mut refused = handle.submit(request(&handle, vec![], 1)).unwrap();
    let mut waiting = handle.submit(request(&handle, vec![1; 100], 50)).unwrap();
    turns.turn();
    assert!(matches!(drain(&mut refused)[..], [Event::Refused(Refusal::Invalid { field: "prompt", .. })]));
    drop(turns);
    assert_eq!(drain(&mut waiting).pop(), Some(Event::Refused(Refusal::Stopping)));
    assert_eq!(handle.submit(request(&handle, vec![1], 1)).err(), Some(Refusal::Stopping));
}

#[test]
fn the_loop_ends_with_its_handles() {
    let (handle, mut turns) = test_loop();
    drop(handle);
    assert_eq!(turns.turn(), Progress::Closed);
}

#[test]
fn echo_repeats_the_prompt() {
    let (handle, inbox) = inbox(LIMITS.context_length);
    let mut echo = Echo::new(LIMITS, inbox);
    let mut plain = handle.submit(request(&handle, vec![4, 5, 6], 5)).unwrap();
    let stop = Request { stop_token_ids: vec![5], ..request(&handle, vec![4, 5, 6], 5) };
    let mut stopped = handle.submit(stop).unwrap();
    turn_until_idle(&mut echo);
    let tokens = |events: &[Event]| -> Vec<u32> {
        events.iter().flat_map(|e| if let Event::Tokens(t) = e { t.clone() } else { vec![] }).collect()
    };
    assert_eq!(tokens(&drain(&mut plain)), vec![4, 5, 6, 4, 5]);
    let events = drain(&mut stopped);
    assert_eq!(tokens(&events), vec![4, 5]);
    assert!(matches!(events.last(), Some(Event::Finished { reason: FinishReason::Stop, .. })));
}
