//! The scheduler, when lookups wait for a drive.

use kvbm_worker::{
    CachedTokens, Event, FinishReason, Request, RequestId, Sampling, Scheduler, SchedulerOptions,
};

use crate::scheduling::{EASY, request, scheduler, turn};
use crate::test_cache::{Behaviour, TestCache, TestModel, VOCAB, expected};

const DISK: Behaviour = Behaviour { host_blocks: 300, disk: Some(0), ..EASY };

struct Rig {
    scheduler: Scheduler,
    cache: TestCache,
    model: TestModel,
    events: Vec<(RequestId, Event)>,
    turned: usize,
}

fn text(seed: u32, tokens: u32) -> Vec<u32> {
    (0..tokens).map(|at| (at * 31 + seed * 7) % VOCAB as u32).collect()
}

impl Rig {
    fn new(change: impl FnOnce(&mut SchedulerOptions)) -> Self {
        Self::of(DISK, change)
    }

    fn of(behaviour: Behaviour, change: impl FnOnce(&mut SchedulerOptions)) -> Self {
        let (cache, contents) = TestCache::new(behaviour, 1);
        let model = TestModel { contents, tokens_per_block: behaviour.tokens_per_block };
        Self { scheduler: scheduler(behaviour, change), cache, model, events: Vec::new(), turned: 0 }
    }

    /// The KV of this text is on disk, and nowhere else.
    fn store(&mut self, text: &[u32]) {
        self.scheduler.submit(request(1000, text.to_vec(), 1));
        self.until_idle();
        self.cache.only_the_disk_remembers();
        self.events.clear();
    }

    fn submit(&mut self, request: Request) {
        self.scheduler.submit(request);
    }

    fn turns(&mut self, count: usize) {
        self.turned += count;
        assert!(self.turned < 20_000, "it does not come to an end");
        for _ in 0..count {
            turn(&mut self.scheduler, &mut self.cache, &mut self.model);
            self.events.extend(self.scheduler.take_events());
        }
    }

    fn until_idle(&mut self) {
        while !self.scheduler.is_idle() {
            self.turns(1);
        }
    }

    fn started(&self, id: u64) -> Option<CachedTokens> {
        self.events.iter().find_map(|(of, event)| match event {
            Event::Started { cached, .. } if of.0 == id => Some(*cached),
            _ => None,
        })
    }

    fn ended(&self, id: u64) -> Option<FinishReason> {
        self.events.iter().find_map(|(of, event)| match event {
            Event::Finished { reason, .. } if of.0 == id => Some(*reason),
            _ => None,
        })
    }

    /// The tokens of an answer, which are those of the model alone.
    fn assert_answered(&self, id: u64, prompt: &[u32]) {
        let tokens = self.events.iter().filter(|(of, _)| of.0 == id).flat_map(|(_, event)| match event {
            Event::Tokens(tokens) => tokens.clone(),
            _ => vec![],
        });
        let mut all = prompt.to_vec();
        for token in tokens {
            assert_eq!(token, Sampling::greedy().choose(&expected(&all), all.len()));
            all.push(token);
        }
        assert!(all.len() > prompt.len() && self.ended(id) == Some(FinishReason::Length));
    }
}

#[test]
fn what_came_from_disk_is_counted_there_and_nowhere_else() {
    let mut rig = Rig::new(|_| {});
    let long = text(1, 200);
    rig.store(&long);
    rig.submit(request(1, long[..100].to_vec(), 1));
    rig.until_idle();
    assert_eq!(rig.started(1), Some(CachedTokens { device: 0, host: 0, disk: 96 }));
    rig.submit(request(2, long.clone(), 1));
    rig.until_idle();
    assert_eq!(rig.started(2), Some(CachedTokens { device: 96, host: 0, disk: 96 }));
    rig.assert_answered(2, &long);
    let counters = rig.scheduler.counters();
    assert_eq!((counters.device_tokens, counters.host_tokens, counters.disk_tokens), (96, 0, 192));
    // What did not arrive was not had from disk.
    rig.cache.only_the_disk_remembers();
    rig.cache.onboards_fail = true;
    rig.submit(request(3, long.clone(), 1));
    rig.until_idle();
    assert_eq!(rig.started(3), Some(CachedTokens::default()));
    rig.assert_answered(3, &long);
    rig.cache.assert_nothing_held();
}

#[test]
fn a_short_prompt_does_not_wait_for_the_disk_of_another() {
    for max_batch in [1, 4] {
        let mut rig = Rig::new(|options| options.max_batch = max_batch);
        let (long, short) = (text(1, 200), text(2, 40));
        rig.store(&long);
        rig.cache.drive_hangs = true;
        rig.submit(request(1, long.clone(), 3));
        rig.submit(request(2, short.clone(), 3));
        rig.turns(10);
        rig.assert_answered(2, &short);
        assert_eq!((rig.started(1), rig.scheduler.counters().running), (None, 1));
        rig.cache.drive_hangs = false;
        rig.until_idle();
        assert_eq!(rig.started(1), Some(CachedTokens { device: 0, host: 0, disk: 192 }));
        rig.assert_answered(1, &long);
        rig.cache.assert_nothing_held();
    }
}

#[test]
fn a_step_does_not_wait_for_a_lookup_that_waits_for_the_disk() {
    let mut rig = Rig::new(|_| {});
    let long = text(1, 200);
    rig.store(&long);
    rig.cache.drive_hangs = true;
    rig.submit(request(1, long, 1));
    rig.submit(request(2, text(2, 2000), 1));
    rig.turns(1);
    assert!(!rig.scheduler.awaits_lookup());
}

#[test]
fn who_waited_for_the_disk_gets_the_next_seat() {
    let mut rig = Rig::new(|options| options.max_batch = 1);
    let long = text(1, 200);
    rig.store(&long);
    rig.cache.drive_hangs = true;
    rig.submit(request(1, long.clone(), 2));
    rig.turns(2);
    rig.submit(request(2, text(2, 40), 20));
    rig.submit(request(3, text(3, 40), 20));
    rig.turns(5);
    rig.cache.drive_hangs = false;
    rig.turns(5);
    assert!(rig.started(2).is_some() && rig.started(1).is_none(), "there is one seat");
    while rig.ended(2).is_none() {
        rig.turns(1);
    }
    rig.turns(3);
    assert!(rig.started(1).is_some() && rig.started(3).is_none());
    rig.until_idle();
    rig.assert_answered(1, &long);
    rig.assert_answered(3, &text(3, 40));
    assert_eq!(rig.scheduler.counters().max_decode_batch, 1);
    rig.cache.assert_nothing_held();
}

#[test]
fn who_has_no_seat_does_not_keep_blocks_from_who_has_one() {
    let mut rig = Rig::of(Behaviour { blocks: 20, ..DISK }, |options| options.max_batch = 1);
    let long = text(1, 200);
    rig.store(&long);
    // Six blocks of it are in the pool.
    rig.submit(request(0, long[..100].to_vec(), 1));
    rig.until_idle();
    rig.cache.drive_hangs = true;
    rig.submit(request(1, long.clone(), 2));
    rig.turns(2);
    // It needs 18 blocks in the end.
    rig.submit(request(2, text(2, 40), 240));
    rig.turns(3);
    rig.cache.drive_hangs = false;
    rig.turns(3);
    assert!(rig.started(2).is_some() && rig.started(1).is_none());
    while rig.scheduler.counters().preemptions == 0 {
        rig.turns(1);
    }
    // It waits once more, in its seat now: it was passed over once.
    rig.cache.host_forgets();
    rig.cache.drive_hangs = true;
    rig.submit(request(3, text(3, 40), 1));
    while rig.ended(2).is_none() {
        rig.turns(1);
    }
    rig.turns(10);
    assert!(rig.started(1).is_none() && rig.started(3).is_none());
    rig.cache.drive_hangs = false;
    rig.until_idle();
    assert_eq!(rig.scheduler.counters().preemptions, 1);
    rig.assert_answered(1, &long);
    rig.assert_answered(2, &text(2, 40));
    rig.assert_answered(3, &text(3, 40));
    rig.cache.assert_nothing_held();
}

#[test]
fn only_so_many_wait_for_the_disk_at_once() {
    let mut rig = Rig::new(|options| options.max_batch = 1);
    let long = text(1, 200);
    rig.store(&long);
    rig.cache.drive_hangs = true;
    (0..40).for_each(|id| rig.submit(request(id, long.clone(), 1)));
    rig.turns(60);
    assert_eq!((rig.scheduler.counters().running, rig.scheduler.counters().waiting), (16, 24));
    rig.cache.drive_hangs = false;
    rig.until_idle();
    (0..40).for_each(|id| rig.assert_answered(id, &long));
    rig.cache.assert_nothing_held();
}

#[test]
fn a_request_that_is_cancelled_while_it_waits_leaves_nothing() {
    for answered in [false, true] {
        let mut rig = Rig::new(|options| options.max_batch = 1);
        let long = text(1, 200);
        rig.store(&long);
        rig.cache.drive_hangs = true;
        rig.submit(request(1, long, 2));
        rig.turns(2);
        rig.submit(request(2, text(2, 40), 30));
        rig.turns(2);
        if answered {
            // It has everything but a seat.
            rig.cache.drive_hangs = false;
            rig.turns(5);
        }
        rig.scheduler.cancel(RequestId(1), &mut rig.cache);
        rig.turns(1);
        assert_eq!((rig.ended(1), rig.started(1)), (Some(FinishReason::Cancelled), None));
        rig.until_idle();
        rig.assert_answered(2, &text(2, 40));
        rig.cache.assert_nothing_held();
    }
}
