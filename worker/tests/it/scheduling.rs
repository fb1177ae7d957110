//! The scheduler under random workloads: every output equals that of a run alone, and nothing is left behind.

use std::collections::BTreeMap;
use std::time::Duration;

use kvbm_hash::{Namespace, Retention, RetentionConfig, TokenRange};
use kvbm_worker::{
    BlockId, Cache, Chunk, Counters, Eos, Event, FinishReason, Grammar, Guides, KvMemory, Limits, Llama,
    Logits, Model, Refusal, Request, RequestId, Sampling, Scheduler, SchedulerOptions,
};

use crate::support::{Random, engine, model, run};
use crate::test_cache::{Behaviour, TestCache, TestModel, VOCAB, expected};

pub const EASY: Behaviour = Behaviour {
    blocks: 400,
    tokens_per_block: 16,
    host_blocks: 0,
    delay: 0,
    pending_in: 0,
    failing_in: 0,
    disk: None,
};

const EOS: u32 = 5;

pub fn scheduler(behaviour: Behaviour, change: impl FnOnce(&mut SchedulerOptions)) -> Scheduler {
    let limits = Limits {
        context_length: 6000,
        vocab_size: VOCAB,
        pool_blocks: behaviour.blocks,
        tokens_per_block: behaviour.tokens_per_block,
    };
    let mut options = SchedulerOptions::new(limits, vec![EOS]);
    change(&mut options);
    Scheduler::new(options)
}

pub fn request(id: u64, prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        id: RequestId(id),
        namespace: Namespace([3; 32]),
        prompt,
        generated: Vec::new(),
        sampling: Sampling::greedy(),
        guide: None,
        max_tokens,
        eos: Eos::Ignored,
        stop_token_ids: vec![],
        retention: None,
        span: tracing::Span::none(),
    }
}

/// One turn, as `Loop` does it. Returns whether something was computed.
pub fn turn(scheduler: &mut Scheduler, cache: &mut TestCache, model: &mut impl Model) -> usize {
    let mut logits = Logits::default();
    for event in cache.poll() {
        scheduler.cache_event(event, cache);
    }
    scheduler.admit(cache);
    for event in cache.poll() {
        scheduler.cache_event(event, cache);
    }
    let plan = scheduler.plan(cache);
    let tokens = plan.tokens();
    assert!(tokens <= 512);
    if !plan.is_empty() {
        let chunks = scheduler.chunks(&plan);
        assert!(answers(&chunks) <= 64 + 64, "one of each sequence, and 64 of prompts");
        model.forward(&chunks, &mut logits).unwrap();
        scheduler.apply(plan, &logits, cache);
    }
    tokens
}

fn answers(chunks: &[Chunk<'_>]) -> usize {
    chunks.iter().map(|chunk| chunk.want.answers()).sum()
}

/// What a request is answered by a model that runs it alone.
fn alone(request: &Request, limit: usize, next: impl Fn(&[u32]) -> Vec<f32>) -> (Vec<u32>, FinishReason) {
    let mut tokens = request.prompt.clone();
    loop {
        let token = request.sampling.choose(&next(&tokens), tokens.len());
        tokens.push(token);
        let out = tokens[request.prompt.len()..].to_vec();
        let ends = request.eos == Eos::Ends && token == EOS;
        if ends || request.stop_token_ids.contains(&token) {
            return (out, FinishReason::Stop);
        }
        if out.len() == limit {
            return (out, FinishReason::Length);
        }
    }
}

#[derive(Default, Debug)]
struct Outcome {
    started: usize,
    cached: usize,
    tokens: Vec<u32>,
    end: Option<Event>,
}

fn collect(outcomes: &mut BTreeMap<RequestId, Outcome>, scheduler: &mut Scheduler) {
    for (id, event) in scheduler.take_events() {
        let outcome = outcomes.entry(id).or_default();
        assert_eq!(outcome.end, None, "nothing after the end");
        match event {
            Event::Started { cached, .. } => {
                outcome.started += 1;
                outcome.cached = cached.device + cached.host + cached.disk;
            }
            Event::Tokens(tokens) => {
                assert_eq!(outcome.started, 1);
                outcome.tokens.extend(tokens);
            }
            end => outcome.end = Some(end),
        }
    }
}

fn random_request(random: &mut Random, id: u64, texts: &[Vec<u32>]) -> Request {
    let text = &texts[random.below(texts.len())];
    let mut prompt = text[..1 + random.below(text.len())].to_vec();
    prompt.extend((0..random.below(20)).map(|_| random.below(VOCAB) as u32));
    let max_tokens = 1 + random.below(60);
    Request {
        namespace: Namespace([random.below(2) as u8; 32]),
        sampling: match random.below(3) {
            0 => Sampling::greedy(),
            1 => Sampling { top_k: 20, top_p: 0.9, min_p: 0.01, ..Sampling::random(1.2, random.next()) },
            _ => Sampling::random(0.8, random.next()),
        },
        eos: if random.below(2) == 0 { Eos::Ends } else { Eos::Ignored },
        stop_token_ids: if random.below(3) == 0 { vec![7, 11] } else { vec![] },
        ..request(id, prompt, max_tokens)
    }
}

/// Runs one random workload and checks every output. Returns the counters, and evictions and onboards.
fn random_workload(seed: u64) -> (Counters, usize, usize) {
    let mut random = Random(seed);
    let tokens_per_block = [16, 32, 64][random.below(3)];
    let behaviour = Behaviour {
        // From barely enough for one request to enough for several.
        blocks: 480usize.div_ceil(tokens_per_block) + random.below(40),
        tokens_per_block,
        host_blocks: [0, 5, 200][random.below(3)],
        delay: random.below(4),
        pending_in: [0, 3, 10][random.below(3)],
        failing_in: [0, 2, 5][random.below(3)],
        disk: [None, Some(0), Some(30)][random.below(3)],
    };
    let (mut cache, contents) = TestCache::new(behaviour, seed);
    let mut model = TestModel { contents, tokens_per_block };
    let max_batch = 1 + random.below(10);
    let mut scheduler = scheduler(behaviour, |options| {
        options.max_batch = max_batch;
        options.max_batch_tokens = 10 + random.below(300);
    });
    let texts: Vec<Vec<u32>> =
        (0..4).map(|_| (0..400).map(|_| random.below(VOCAB) as u32).collect()).collect();
    let requests: Vec<Request> = (0..30).map(|id| random_request(&mut random, id, &texts)).collect();
    let mut outcomes: BTreeMap<RequestId, Outcome> = BTreeMap::new();
    let mut cancelled = Vec::new();
    let mut turns = 0;
    let mut coming = requests.iter();
    loop {
        if random.below(4) == 0 {
            for request in coming.by_ref().take(random.below(6)) {
                scheduler.submit(request.clone());
            }
        }
        if random.below(12) == 0 {
            let id = RequestId(random.below(30) as u64);
            scheduler.cancel(id, &mut cache);
            cancelled.push(id);
        }
        turn(&mut scheduler, &mut cache, &mut model);
        collect(&mut outcomes, &mut scheduler);
        turns += 1;
        assert!(turns < 100_000, "seed {seed} comes to an end");
        if coming.len() == 0 && scheduler.is_idle() {
            break;
        }
    }
    for request in &requests {
        let outcome = &outcomes[&request.id];
        assert!(outcome.cached < request.prompt.len(), "seed {seed}: no token counts twice");
        let (want, reason) = alone(request, request.max_tokens, expected);
        match outcome.end.as_ref().expect("every request ends") {
            Event::Finished { reason: FinishReason::Cancelled, completion_tokens, .. } => {
                assert!(cancelled.contains(&request.id));
                assert_eq!(*completion_tokens, outcome.tokens.len());
                assert!(want.starts_with(&outcome.tokens), "seed {seed}");
            }
            end => {
                let want_end = Event::Finished {
                    reason,
                    prompt_tokens: request.prompt.len(),
                    completion_tokens: want.len(),
                };
                assert_eq!((&outcome.tokens, end), (&want, &want_end), "seed {seed} {:?}", request.id);
            }
        }
    }
    cache.assert_nothing_held();
    let counters = scheduler.counters();
    assert!(counters.max_decode_batch as usize <= max_batch, "seed {seed}");
    (counters, cache.evictions, cache.onboards)
}

#[test]
fn random_workloads_give_the_outputs_of_runs_alone() {
    let mut total = Counters::default();
    let (mut evictions, mut onboards) = (0, 0);
    for seed in 0..400 {
        let (counters, evicted, onboarded) = random_workload(seed);
        total.preemptions += counters.preemptions;
        total.failed_onboards += counters.failed_onboards;
        total.cancelled += counters.cancelled;
        total.device_tokens += counters.device_tokens;
        total.host_tokens += counters.host_tokens;
        total.disk_tokens += counters.disk_tokens;
        total.max_decode_batch = total.max_decode_batch.max(counters.max_decode_batch);
        assert_eq!(counters.requests, counters.finished + counters.cancelled, "seed {seed}");
        (evictions, onboards) = (evictions + evicted, onboards + onboarded);
    }
    println!("{total:?}, {evictions} evictions, {onboards} onboards");
    assert!(total.preemptions > 100 && total.failed_onboards > 50 && total.cancelled > 500);
    assert!(total.device_tokens > 10_000 && total.host_tokens > 10_000 && total.max_decode_batch > 4);
    assert!(total.disk_tokens > 10_000, "{}", total.disk_tokens);
    assert!(evictions > 1000 && onboards > 500);
}

#[test]
fn a_short_prompt_overtakes_a_long_prefill() {
    let (mut cache, contents) = TestCache::new(EASY, 1);
    let mut model = TestModel { contents, tokens_per_block: 16 };
    let mut scheduler = scheduler(EASY, |_| {});
    scheduler.submit(request(1, vec![1; 3900], 5));
    assert_eq!(turn(&mut scheduler, &mut cache, &mut model), 512);
    scheduler.take_events();
    // It comes while a chunk is computed: the step after that one answers.
    scheduler.submit(request(2, vec![2; 40], 5));
    assert_eq!(turn(&mut scheduler, &mut cache, &mut model), 512);
    let answered = |events: Vec<(RequestId, Event)>| {
        events.iter().any(|(id, e)| id.0 == 2 && matches!(e, Event::Tokens(_)))
    };
    assert!(answered(scheduler.take_events()));
    // And the long one goes on beside it.
    assert_eq!(turn(&mut scheduler, &mut cache, &mut model), 512);
}

#[test]
fn a_long_prompt_is_not_starved_by_short_ones() {
    let behaviour = Behaviour { blocks: 3000, ..EASY };
    let (mut cache, contents) = TestCache::new(behaviour, 1);
    let mut model = TestModel { contents, tokens_per_block: 16 };
    let mut scheduler = scheduler(behaviour, |_| {});
    scheduler.submit(request(0, vec![1; 3900], 1));
    for step in 1..600 {
        for i in 0..3 {
            let id = step * 3 + i;
            scheduler.submit(request(id, (0..300).map(|t| ((id * 7 + t) % 97) as u32).collect(), 1));
        }
        turn(&mut scheduler, &mut cache, &mut model);
        let done =
            scheduler.take_events().iter().any(|(id, e)| id.0 == 0 && matches!(e, Event::Finished { .. }));
        if done {
            return;
        }
    }
    panic!("600 steps were not enough");
}

/// All that a request brought, run by itself.
fn events(behaviour: Behaviour, requests: Vec<Request>) -> Vec<Vec<Event>> {
    let (mut cache, contents) = TestCache::new(behaviour, 1);
    let mut model = TestModel { contents, tokens_per_block: behaviour.tokens_per_block };
    let mut scheduler = scheduler(behaviour, |_| {});
    let mut all = vec![Vec::new(); requests.len()];
    for (at, request) in requests.into_iter().enumerate() {
        scheduler.submit(request);
        loop {
            all[at].extend(scheduler.take_events().into_iter().map(|(_, event)| event));
            if scheduler.is_idle() {
                break;
            }
            turn(&mut scheduler, &mut cache, &mut model);
        }
    }
    all
}

#[test]
fn a_request_goes_on_with_what_another_worker_generated() {
    let sampling = Sampling {
        repetition_penalty: 1.3,
        frequency_penalty: 0.5,
        logit_bias: vec![(3, 1.0)],
        min_tokens: 60,
        logprobs: Some(2),
        ..Sampling::random(0.9, 77)
    };
    let whole = Request { sampling, eos: Eos::Ends, ..request(1, (0..45).collect(), 70) };
    let scored = |events: &[Event]| -> Vec<_> {
        events
            .iter()
            .flat_map(|event| if let Event::Scored(tokens) = event { tokens.clone() } else { vec![] })
            .collect()
    };
    let first = scored(&events(EASY, vec![whole.clone()])[0]);
    assert!(first.len() >= 60);
    for cut in [1, 2, 20, 51, first.len() - 1] {
        let generated = first[..cut].iter().map(|(token, _)| *token).collect();
        let rest = Request { generated, ..whole.clone() };
        let events = &events(EASY, vec![rest])[0];
        assert_eq!(scored(events), first[cut..], "cut behind {cut}");
        let Some(Event::Finished { prompt_tokens: 45, completion_tokens, .. }) = events.last() else {
            panic!()
        };
        assert_eq!(*completion_tokens, first.len(), "what came before counts");
    }
}

/// The worker was lost between the last token and the word of it.
#[test]
fn an_answer_that_another_worker_completed_ends_without_a_further_token() {
    let guides = Guides::new(&model(), vec![EOS]);
    let guide = guides.guide(&Grammar::Choice(vec!["A".into()])).unwrap();
    // The token of that letter: the whole of what may be said.
    let letter = (0..VOCAB as u32).find(|token| {
        let all = Request { guide: Some(guide.clone()), ..request(1, vec![1; 20], 9) };
        let said = Request { generated: vec![*token], ..all };
        matches!(events(EASY, vec![said])[0].as_slice(), [Event::Finished { .. }])
    });
    let by_guide =
        Request { guide: Some(guide), generated: vec![letter.unwrap()], ..request(1, vec![1; 20], 9) };
    let stopped = Request { stop_token_ids: vec![7], generated: vec![3, 7], ..request(1, vec![1; 20], 9) };
    for (request, said) in [(by_guide, 1), (stopped, 2)] {
        let [Event::Finished { reason: FinishReason::Stop, prompt_tokens: 20, completion_tokens }] =
            events(EASY, vec![request])[0][..]
        else {
            panic!()
        };
        assert_eq!(completion_tokens, said);
    }
}

#[test]
fn the_prompts_logprobs_are_all_there_whatever_is_cached() {
    let sampling = Sampling { prompt_logprobs: Some(1), ..Sampling::greedy() };
    let text: Vec<u32> = (0..200).map(|i| i * 31 % VOCAB as u32).collect();
    let plain = request(1, text.clone(), 3);
    let scoring = Request { sampling, ..request(2, text.clone(), 3) };
    let all = events(EASY, vec![plain, scoring.clone(), scoring]);
    let prompt = |events: &[Event]| -> Vec<_> {
        let found = events
            .iter()
            .filter_map(|event| if let Event::Prompt(found) = event { Some(found) } else { None });
        found.cloned().collect()
    };
    let (first, second) = (prompt(&all[1]), prompt(&all[2]));
    assert_eq!((first.len(), first[0].len()), (1, 199));
    assert_eq!(first, second);
    for (position, found) in first[0].iter().enumerate() {
        let logits = expected(&text[..=position]);
        let best = Sampling::greedy().choose(&logits, 0);
        assert_eq!(found.top[0].0, best, "position {position}");
        let next = logits[text[position + 1] as usize];
        assert!((found.top[0].1 - found.logprob - (logits[best as usize] - next)).abs() < 1e-3);
    }
    // The tokens themselves are the same with and without.
    let tokens = |events: &[Event]| {
        events.iter().filter(|event| matches!(event, Event::Tokens(_))).cloned().collect::<Vec<_>>()
    };
    assert_eq!(tokens(&all[0]), tokens(&all[1]));
}

#[test]
fn prompts_that_are_scored_share_the_room_for_logits() {
    let sampling = Sampling { prompt_logprobs: Some(0), ..Sampling::greedy() };
    let requests =
        (0..6).map(|id| Request { sampling: sampling.clone(), ..request(id, vec![7; 100 + id as usize], 2) });
    let (mut cache, contents) = TestCache::new(EASY, 1);
    let mut model = TestModel { contents, tokens_per_block: EASY.tokens_per_block };
    let mut scheduler = scheduler(EASY, |_| {});
    requests.for_each(|request| scheduler.submit(request));
    let mut scored = BTreeMap::new();
    while !scheduler.is_idle() {
        turn(&mut scheduler, &mut cache, &mut model);
        scored.extend(scheduler.take_events().into_iter().filter_map(|(id, event)| match event {
            Event::Prompt(found) => Some((id.0, found.len())),
            _ => None,
        }));
    }
    assert_eq!(scored, (0..6).map(|id| (id, 99 + id as usize)).collect());
    assert!(scheduler.counters().steps >= 10, "600 tokens, 64 at a time");
}

#[test]
fn what_is_committed_is_found_again_and_decode_blocks_too() {
    let (mut cache, contents) = TestCache::new(EASY, 1);
    let mut model = TestModel { contents, tokens_per_block: 16 };
    let mut scheduler = scheduler(EASY, |_| {});
    let mut started = |request: Request| {
        scheduler.submit(request);
        let mut events = Vec::new();
        while !scheduler.is_idle() {
            turn(&mut scheduler, &mut cache, &mut model);
            events.extend(scheduler.take_events());
        }
        let tokens: Vec<u32> = events
            .iter()
            .flat_map(|(_, e)| if let Event::Tokens(t) = e { t.clone() } else { vec![] })
            .collect();
        let Some((_, Event::Started { cached, .. })) = events.into_iter().next() else { panic!("starts") };
        (cached.device, tokens)
    };
    let prompt: Vec<u32> = (0..32).collect();
    let (hits, first) = started(request(1, prompt.clone(), 40));
    assert_eq!(hits, 0);
    let (hits, again) = started(request(2, prompt.clone(), 40));
    assert_eq!((hits, &again), (16, &first), "one token of the prompt is always computed");
    let conversation = [prompt, first].concat();
    assert_eq!(
        started(request(3, conversation, 1)).0,
        64,
        "of 72 tokens 71 were computed, 4 blocks complete"
    );
}

#[test]
fn a_full_queue_and_what_cannot_fit_are_refused() {
    let behaviour = Behaviour { blocks: 300, ..EASY };
    let (mut cache, _) = TestCache::new(behaviour, 1);
    let mut scheduler = scheduler(behaviour, |options| options.max_waiting = 2);
    for id in 0..3 {
        scheduler.submit(request(id, vec![1], 1));
    }
    assert_eq!(scheduler.take_events(), vec![(RequestId(2), Event::Refused(Refusal::Busy))]);
    scheduler.cancel(RequestId(0), &mut cache);
    scheduler.submit(request(4, vec![1; 5000], 1500));
    let events = scheduler.take_events();
    assert!(
        matches!(events[1].1, Event::Refused(Refusal::Invalid { field: "max_tokens", .. })),
        "{events:?}"
    );
}

#[test]
fn a_request_that_alone_gets_no_block_is_given_up() {
    let behaviour = Behaviour { blocks: 10, ..EASY };
    let (mut cache, contents) = TestCache::new(behaviour, 1);
    let stolen = cache.allocate(8);
    let mut model = TestModel { contents, tokens_per_block: 16 };
    let mut scheduler = scheduler(behaviour, |options| options.max_starved_turns = 20);
    scheduler.submit(request(1, vec![1; 100], 10));
    for _ in 0..30 {
        turn(&mut scheduler, &mut cache, &mut model);
    }
    let events = scheduler.take_events();
    assert!(matches!(events.as_slice(), [(RequestId(1), Event::Failed(_))]), "{events:?}");
    let kvbm_worker::Allocate::Blocks(stolen) = stolen else { panic!("ten were free") };
    cache.release(stolen);
    cache.assert_nothing_held();
}

/// The real model, several at once in a small pool, against runs alone.
#[test]
fn the_bundled_model_answers_the_same_in_company() {
    let mut random = Random(11);
    let behaviour = Behaviour { blocks: 34, delay: 1, pending_in: 5, ..EASY };
    let texts: Vec<Vec<u32>> =
        (0..2).map(|_| (0..300).map(|_| 3 + random.below(90) as u32).collect()).collect();
    let requests: Vec<Request> = (0..12)
        .map(|id| Request { max_tokens: 24, ..random_request(&mut random, id, &texts) })
        .map(|r| Request { namespace: Namespace([0; 32]), ..r })
        .collect();
    let mut solo = engine(2, None);
    let wants: Vec<(Vec<u32>, FinishReason)> = requests
        .iter()
        .map(|request| {
            let kv = KvMemory::private(solo.kv_layout(32), 20);
            let solo = std::cell::RefCell::new((&mut solo, 0));
            alone(request, 24, |tokens| {
                let (engine, done) = &mut *solo.borrow_mut();
                let logits = run(engine, &kv, &tokens[*done..], *done);
                *done = tokens.len();
                logits
            })
        })
        .collect();
    let engine = engine(2, None);
    let kv = KvMemory::private(engine.kv_layout(16), behaviour.blocks);
    let mut model = Llama { engine, kv };
    let (mut cache, _) = TestCache::new(behaviour, 5);
    let mut scheduler = scheduler(behaviour, |options| options.max_batch_tokens = 100);
    requests.iter().for_each(|request| scheduler.submit(request.clone()));
    let mut outcomes = BTreeMap::new();
    while !scheduler.is_idle() {
        turn(&mut scheduler, &mut cache, &mut model);
        collect(&mut outcomes, &mut scheduler);
    }
    for (request, (want, _)) in requests.iter().zip(wants) {
        assert_eq!(outcomes[&request.id].tokens, want, "{:?}", request.id);
    }
    let counters = scheduler.counters();
    assert!(
        counters.max_decode_batch > 1 && counters.device_tokens > 0 && counters.preemptions > 0,
        "{counters:?}"
    );
    cache.assert_nothing_held();
    assert_eq!(model.kv.read_block(BlockId(0)).len(), model.kv.layout().block_bytes());
}

/// Blocks of 16 tokens: 3 of the prompt (40 tokens), the third being finished by the answer, and 2 of the answer.
#[test]
fn each_block_is_kept_as_its_first_token_is_to_be() {
    let kept = |priority, duration| Retention { priority, duration };
    let (first, decode) = (kept(90, Some(Duration::from_secs(30))), kept(0, None));
    let ranges = vec![
        TokenRange { start: 0, end: Some(1), retention: first },
        TokenRange { start: 32, end: None, retention: kept(60, None) },
    ];
    let config = RetentionConfig::new(ranges, decode).unwrap();
    let mut scheduler = scheduler(EASY, |_| ());
    let (mut cache, contents) = TestCache::new(EASY, 1);
    let mut model = TestModel { contents, tokens_per_block: 16 };
    let prompt: Vec<u32> = (10..50).collect();
    let retention = Some(config);
    for (id, retention) in [(1, retention), (2, None)] {
        scheduler.submit(Request { retention, ..request(id, prompt.clone(), 41) });
        while !scheduler.is_idle() {
            turn(&mut scheduler, &mut cache, &mut model);
        }
    }
    // The last token's KV is never computed: 80 tokens are.
    let said = [first, Retention::default(), kept(60, None), decode, decode];
    assert_eq!(cache.committed[..5], said);
    assert_eq!(cache.looked_up[0], [Some(first), None]);
    assert!(cache.looked_up[1].is_empty(), "who says nothing changes nothing");
    assert!(cache.committed[5..].iter().all(|retention| *retention == Retention::default()));
}
