//! The executor over memory of the host: real threads and bytes, and a device that fails on demand.

use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};

use proptest::prelude::*;

use super::device::CopyDevice;
use super::memcpy_device::MemcpyDevice;
use super::*;
use crate::{Error, RawCopy};
use kvbm_shm::SharedMemory;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const BLOCK: usize = 4096;
const LANE: LaneId = LaneId(7);

fn memory(blocks: usize) -> CopyMemory {
    CopyMemory::Shared(Arc::new(SharedMemory::create("test", blocks * BLOCK).unwrap()))
}

fn bytes_of(memory: &CopyMemory) -> &SharedMemory {
    let CopyMemory::Shared(memory) = memory else { panic!("tests use memory of the host") };
    memory
}

fn pattern(seed: u64, block: usize) -> Vec<u8> {
    (0..BLOCK / 8)
        .flat_map(|i| (seed ^ (block as u64) << 32).wrapping_mul(2 * i as u64 + 1).to_le_bytes())
        .collect()
}

fn small() -> CopyEngineConfig {
    CopyEngineConfig {
        queue: 1000,
        piece_bytes: 3 * BLOCK as u64,
        in_flight_bytes: 8 * BLOCK as u64,
        ..CopyEngineConfig::default()
    }
}

/// A batch that tells its number and end.
fn batch(
    direction: Direction,
    lane: LaneId,
    number: usize,
    ends: &std::sync::mpsc::Sender<(usize, CopyEnd)>,
) -> CopyBatch {
    let ends = ends.clone();
    CopyBatch::new(direction, lane, Urgency::Demanded, move |end| {
        let _ = ends.send((number, end));
    })
}

fn is_done(end: &CopyEnd) -> bool {
    matches!(end, CopyEnd::Done { .. })
}

fn next(ends: &Receiver<(usize, CopyEnd)>) -> (usize, CopyEnd) {
    ends.recv_timeout(Duration::from_secs(20)).expect("every batch ends")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Batches of several lanes, both ways at once: all bytes arrive, each batch ends once, and each lane's in order.
    #[test]
    fn all_bytes_arrive_and_lanes_keep_their_order(
        sizes in prop::collection::vec((0u64..4, any::<bool>(), 0usize..9), 1..40),
        queue in 1usize..50,
        piece in 1u64..6,
        flight in 1u64..12,
        seed: u64,
    ) {
        let blocks: usize = sizes.iter().map(|(_, _, count)| count).sum::<usize>() + 1;
        let (pool, host) = (memory(2 * blocks), memory(2 * blocks));
        for block in 0..2 * blocks {
            bytes_of(&pool).write(block * BLOCK, &pattern(seed, block));
            bytes_of(&host).write(block * BLOCK, &pattern(!seed, block));
        }
        let config = CopyEngineConfig {
            queue,
            piece_bytes: piece * BLOCK as u64,
            in_flight_bytes: flight * BLOCK as u64,
            ..CopyEngineConfig::default()
        };
        let engine = CopyEngine::start_on_host(config);
        let (sender, ends) = channel();
        let mut next_block = 0;
        for (number, (lane, onboard, count)) in sizes.iter().enumerate() {
            let direction = if *onboard { Direction::Onboard } else { Direction::Offload };
            let mut batch = batch(direction, LaneId(*lane), number, &sender);
            // Offloads fill the second half of host memory from the first of the pool, and onboards the other way round.
            let (from, to) = if *onboard { (&host, &pool) } else { (&pool, &host) };
            for block in next_block..next_block + count {
                batch.copy((from, block * BLOCK), (to, (2 * blocks - 1 - block) * BLOCK), BLOCK);
            }
            next_block += count;
            let mut waiting = Some(batch);
            while let Some(batch) = waiting.take() {
                match engine.submit(batch) {
                    Ok(()) => {}
                    Err(NotAccepted { batch, reason: Refusal::Full }) => {
                        std::thread::yield_now();
                        waiting = Some(*batch);
                    }
                    Err(other) => panic!("{other:?}"),
                }
            }
        }
        let mut last = std::collections::HashMap::new();
        for _ in 0..sizes.len() {
            let (number, end) = next(&ends);
            prop_assert!(is_done(&end), "{end:?}");
            let (lane, onboard, _) = sizes[number];
            let before = last.insert((lane, onboard), number);
            prop_assert!(before.is_none_or(|before| before < number), "{before:?} before {number}");
        }
        drop(engine);
        prop_assert!(ends.try_recv().is_err(), "each ends once");
        let mut block = 0;
        for (_, onboard, count) in &sizes {
            for _ in 0..*count {
                let (to, seed) = if *onboard { (&pool, !seed) } else { (&host, seed) };
                let mut seen = vec![0; BLOCK];
                bytes_of(to).read((2 * blocks - 1 - block) * BLOCK, &mut seen);
                prop_assert!(seen == pattern(seed, block), "block {block}");
                block += 1;
            }
        }
    }
}

#[test]
fn full_is_an_answer_and_room_comes_back_before_the_word() {
    let engine = Arc::new(CopyEngine::start_on_host(CopyEngineConfig { queue: 1, ..small() }));
    let (pool, host) = (memory(1), memory(1));
    let fence = Arc::new(SharedMemory::create("fence", 4096).unwrap());
    let (sender, ends) = channel();
    let blocked = batch(Direction::Offload, LANE, 0, &sender).after(Fence {
        memory: fence.clone(),
        offset: 0,
        value: 1,
        limit: Duration::from_secs(60),
    });
    engine.submit(blocked).unwrap();
    assert!(!engine.has_room(Direction::Offload) && engine.has_room(Direction::Onboard));
    let refused = engine.submit(batch(Direction::Offload, LANE, 1, &sender)).unwrap_err();
    assert!(matches!(refused.reason, Refusal::Full), "{refused:?}");
    // The other direction has a queue of its own, and its end finds room.
    let (again, room) = (engine.clone(), channel());
    let mut onboard = CopyBatch::new(Direction::Onboard, LANE, Urgency::Demanded, move |_| {
        let _ = room.0.send(again.has_room(Direction::Onboard));
    });
    onboard.copy((&host, 0), (&pool, 0), BLOCK);
    engine.submit(onboard).unwrap();
    assert!(room.1.recv_timeout(Duration::from_secs(20)).unwrap());
    fence.word32(0).store(1, Ordering::Release);
    assert!(is_done(&next(&ends).1));
}

#[test]
fn a_fence_holds_up_its_own_lane_only_and_late_ones_fail() {
    let engine = CopyEngine::start_on_host(small());
    let (pool, host) = (memory(4), memory(4));
    bytes_of(&pool).write(0, &pattern(1, 0));
    let words = Arc::new(SharedMemory::create("words", 4096).unwrap());
    let fence = |offset, limit| Fence { memory: words.clone(), offset, value: 3, limit };
    let (sender, ends) = channel();
    let mut first = batch(Direction::Offload, LaneId(1), 0, &sender).after(fence(0, Duration::from_secs(60)));
    first.copy((&pool, 0), (&host, 0), BLOCK);
    engine.submit(first).unwrap();
    engine.submit(batch(Direction::Offload, LaneId(1), 1, &sender)).unwrap();
    engine.submit(batch(Direction::Offload, LaneId(2), 2, &sender)).unwrap();
    let late = batch(Direction::Offload, LaneId(3), 3, &sender).after(fence(8, Duration::ZERO));
    engine.submit(late).unwrap();
    let mut ended = [next(&ends), next(&ends)];
    ended.sort_by_key(|(number, _)| *number);
    assert_eq!((ended[0].0, is_done(&ended[0].1)), (2, true));
    assert!(matches!(ended[1], (3, CopyEnd::Failed(CopyFailure::FenceLate(_)))), "{ended:?}");
    // Nothing was copied before the word was reached, and what is copied is what was there then.
    let mut seen = vec![0; BLOCK];
    bytes_of(&host).read(0, &mut seen);
    assert!(seen.iter().all(|byte| *byte == 0));
    bytes_of(&pool).write(0, &pattern(2, 0));
    words.word32(0).store(4, Ordering::Release);
    assert_eq!([next(&ends).0, next(&ends).0], [0, 1]);
    bytes_of(&host).read(0, &mut seen);
    assert!(seen == pattern(2, 0));
}

#[test]
fn closing_a_lane_ends_what_waits_there_and_nothing_else() {
    let engine = CopyEngine::start_on_host(small());
    let words = Arc::new(SharedMemory::create("words", 4096).unwrap());
    let (sender, ends) = channel();
    for (number, lane) in [(0, 1), (1, 1), (2, 2)] {
        let fence =
            Fence { memory: words.clone(), offset: 4 * lane, value: 1, limit: Duration::from_secs(60) };
        engine.submit(batch(Direction::Offload, LaneId(lane as u64), number, &sender).after(fence)).unwrap();
    }
    engine.close_lane(LaneId(1));
    for number in [0, 1] {
        let (ended, end) = next(&ends);
        assert_eq!(ended, number);
        assert!(matches!(end, CopyEnd::Failed(CopyFailure::Cancelled)), "{end:?}");
    }
    words.word32(8).store(1, Ordering::Release);
    let (number, end) = next(&ends);
    assert!(number == 2 && is_done(&end));
}

#[test]
fn dropping_the_engine_ends_what_it_was_given() {
    let engine = CopyEngine::start_on_host(small());
    let words = Arc::new(SharedMemory::create("words", 4096).unwrap());
    let (pool, host) = (memory(64), memory(64));
    let (sender, ends) = channel();
    let fence = Fence { memory: words, offset: 0, value: 1, limit: Duration::from_secs(60) };
    engine.submit(batch(Direction::Onboard, LANE, 0, &sender).after(fence)).unwrap();
    let mut long = batch(Direction::Offload, LANE, 1, &sender);
    for block in 0..64 {
        long.copy((&pool, block * BLOCK), (&host, block * BLOCK), BLOCK);
    }
    engine.submit(long).unwrap();
    drop(engine);
    let mut ended: Vec<_> = ends.try_iter().collect();
    ended.sort_by_key(|(number, _)| *number);
    assert_eq!(ended.len(), 2);
    assert!(matches!(ended[0].1, CopyEnd::Failed(CopyFailure::Stopped)), "{ended:?}");
}

#[test]
fn background_copies_are_paced_and_demanded_ones_are_not() {
    let pacer = PacerConfig { link_bytes_per_second: 1e6, blind_share: 0.5, ..PacerConfig::default() };
    let engine = CopyEngine::start_on_host(CopyEngineConfig { pacer, ..small() });
    let (pool, host) = (memory(64), memory(64));
    let (sender, ends) = channel();
    let fill = |batch: &mut CopyBatch| {
        for block in 0..64 {
            batch.copy((&pool, block * BLOCK), (&host, block * BLOCK), BLOCK);
        }
    };
    // 256 KiB at 0.5 MB/s take half a second; what is demanded overtakes it in a lane of its own.
    let background = sender.clone();
    let mut slow = CopyBatch::new(Direction::Offload, LaneId(1), Urgency::Background, move |end| {
        let _ = background.send((0, end));
    });
    fill(&mut slow);
    engine.submit(slow).unwrap();
    let mut fast = batch(Direction::Offload, LaneId(2), 1, &sender);
    fill(&mut fast);
    engine.submit(fast).unwrap();
    assert_eq!(next(&ends).0, 1);
    assert!(ends.try_recv().is_err());
    // When the host needs the room, nothing is paced.
    engine.set_full_rate(true);
    let (number, end) = next(&ends);
    assert!(number == 0 && is_done(&end));
    let figures = engine.figures();
    assert_eq!(
        (figures.batches, figures.failed, figures.bytes),
        ([0, 2], [0, 0], [0, 2 * 64 * BLOCK as u64])
    );
}

#[test]
fn an_engine_that_is_busy_is_spared_until_another_takes_its_place() {
    let pacer = PacerConfig { slowdown_share: 0.0, ..PacerConfig::default() };
    let engine = CopyEngine::start_on_host(CopyEngineConfig { pacer, ..small() });
    let page = Arc::new(SharedMemory::create("words", 4096).unwrap());
    let (busy, idle) = (StepWords::new(page.clone(), 0), StepWords::new(page, 64));
    busy.begin();
    engine.pace_by(LANE, &busy);
    let (pool, host) = (memory(1), memory(1));
    let (sender, ends) = channel();
    let background = sender.clone();
    let mut batch_of_one = CopyBatch::new(Direction::Offload, LaneId(1), Urgency::Background, move |end| {
        let _ = background.send((0, end));
    });
    batch_of_one.copy((&pool, 0), (&host, 0), BLOCK);
    engine.submit(batch_of_one).unwrap();
    // Another lane's batch, issued later, has ended: the first had its chance.
    engine.submit(batch(Direction::Offload, LaneId(2), 1, &sender)).unwrap();
    assert_eq!(next(&ends).0, 1);
    assert!(ends.try_recv().is_err());
    engine.pace_by(LANE, &idle);
    assert_eq!(next(&ends).0, 0);
}

#[test]
fn memory_that_the_engine_does_not_reach_is_refused() {
    struct Blind;
    impl CopyDevice for Blind {
        type Mark = ();
        fn reaches(_: &CopyMemory) -> bool {
            false
        }
        unsafe fn issue(&mut self, _: &[RawCopy]) -> Result<(), Error> {
            unreachable!()
        }
        fn mark(&mut self) -> Result<(), Error> {
            unreachable!()
        }
        fn is_reached(&mut self, _: &()) -> Result<bool, Error> {
            unreachable!()
        }
        fn recycle(&mut self, _: ()) {}
        fn finish(&mut self) {}
    }
    let engine = CopyEngine::start_over([|| Blind; 2], "gpu-test", &small());
    let mut batch = CopyBatch::new(Direction::Offload, LANE, Urgency::Demanded, |_| unreachable!());
    batch.copy((&memory(1), 0), (&memory(1), 0), BLOCK);
    assert!(matches!(engine.submit(batch), Err(NotAccepted { reason: Refusal::Unreachable, .. })));
}

/// Fails calls by their number: as CUDA refuses one call, or as it fails for good.
struct Failing {
    inner: MemcpyDevice,
    calls: usize,
    refuse: Vec<usize>,
    break_at: usize,
}

fn cuda_error(code: u32) -> Error {
    Error::Call { call: "cuMemcpyBatchAsync_v2", code, name: "TEST".into(), meaning: "of a test".into() }
}

impl CopyDevice for Failing {
    type Mark = <MemcpyDevice as CopyDevice>::Mark;
    fn reaches(memory: &CopyMemory) -> bool {
        MemcpyDevice::reaches(memory)
    }
    unsafe fn issue(&mut self, copies: &[RawCopy]) -> Result<(), Error> {
        self.calls += 1;
        if self.calls >= self.break_at {
            return Err(cuda_error(700));
        }
        if self.refuse.contains(&self.calls) {
            return Err(cuda_error(1));
        }
        // SAFETY: the caller's promise.
        unsafe { self.inner.issue(copies) }
    }
    fn mark(&mut self) -> Result<Self::Mark, Error> {
        self.inner.mark()
    }
    fn is_reached(&mut self, mark: &Self::Mark) -> Result<bool, Error> {
        self.inner.is_reached(mark)
    }
    fn recycle(&mut self, mark: Self::Mark) {
        self.inner.recycle(mark);
    }
    fn finish(&mut self) {
        self.inner.finish();
    }
}

fn failing(refuse: Vec<usize>, break_at: usize) -> CopyEngine {
    let device = |refuse| move || Failing { inner: MemcpyDevice::new(), calls: 0, refuse, break_at };
    CopyEngine::start_over([device(refuse.clone()), device(refuse)], "gpu-test", &small())
}

#[test]
fn a_refused_piece_fails_its_batch_alone_and_in_its_turn() {
    // Each batch of 9 blocks is issued in pieces of 3; the fifth call is the second piece of the second batch.
    let engine = failing(vec![5], usize::MAX);
    let (pool, host) = (memory(9), memory(9));
    let (sender, ends) = channel();
    for number in 0..3 {
        let mut batch = batch(Direction::Onboard, LANE, number, &sender);
        for block in 0..9 {
            batch.copy((&host, block * BLOCK), (&pool, block * BLOCK), BLOCK);
        }
        engine.submit(batch).unwrap();
    }
    let ended: Vec<_> = (0..3).map(|_| next(&ends)).collect();
    assert_eq!(ended.iter().map(|(number, _)| *number).collect::<Vec<_>>(), [0, 1, 2]);
    assert!(is_done(&ended[0].1) && is_done(&ended[2].1), "{ended:?}");
    assert!(matches!(ended[1].1, CopyEnd::Failed(CopyFailure::Refused(_))), "{ended:?}");
    assert!(engine.out_of_service().is_none());
}

#[test]
fn an_error_that_stays_takes_the_gpu_out_of_service_and_ends_everything() {
    let engine = failing(vec![], 5);
    let (pool, host) = (memory(9), memory(9));
    let (sender, ends) = channel();
    let submit = |number| {
        let mut batch = batch(Direction::Offload, LANE, number, &sender);
        for block in 0..9 {
            batch.copy((&pool, block * BLOCK), (&host, block * BLOCK), BLOCK);
        }
        engine.submit(batch)
    };
    submit(0).unwrap();
    assert!(is_done(&next(&ends).1), "three calls that succeeded");
    let mut accepted = 0;
    for number in 1..6 {
        match submit(number) {
            Ok(()) => accepted += 1,
            Err(NotAccepted { reason: Refusal::OutOfService(_), .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    let ended: Vec<_> = (0..accepted).map(|_| next(&ends)).collect();
    let lost = |end: &CopyEnd| matches!(end, CopyEnd::Failed(CopyFailure::OutOfService(_)));
    assert!(accepted >= 1 && ended.iter().all(|(_, end)| lost(end)), "{ended:?}");
    assert!(engine.out_of_service().unwrap().to_string().contains("cuMemcpyBatchAsync_v2: TEST (700)"));
    let refused = engine.submit(batch(Direction::Offload, LANE, 9, &sender)).unwrap_err();
    assert!(matches!(refused.reason, Refusal::OutOfService(_)));
    drop((sender, refused));
    assert_eq!(ends.recv_timeout(Duration::from_secs(20)).map(|_| ()), Err(RecvTimeoutError::Disconnected));
}

#[test]
fn an_error_in_one_direction_ends_what_waits_in_the_other() {
    let engine = failing(vec![], 1);
    let words = Arc::new(SharedMemory::create("words", 4096).unwrap());
    let (pool, host) = (memory(1), memory(1));
    let (sender, ends) = channel();
    let fence = Fence { memory: words, offset: 0, value: 1, limit: Duration::from_secs(60) };
    engine.submit(batch(Direction::Onboard, LANE, 0, &sender).after(fence)).unwrap();
    let mut fatal = batch(Direction::Offload, LANE, 1, &sender);
    fatal.copy((&pool, 0), (&host, 0), BLOCK);
    engine.submit(fatal).unwrap();
    for _ in 0..2 {
        let (number, end) = next(&ends);
        assert!(matches!(end, CopyEnd::Failed(CopyFailure::OutOfService(_))), "{number}: {end:?}");
    }
    for direction in [Direction::Onboard, Direction::Offload] {
        let refused = engine.submit(batch(direction, LANE, 2, &sender)).unwrap_err();
        assert!(matches!(refused.reason, Refusal::OutOfService(_)));
        assert!(!engine.has_room(direction));
    }
}

#[test]
fn the_first_piece_is_short_and_pieces_grow_with_what_is_in_flight() {
    /// Tells how many copies came with each call. None of them ends before the test says so.
    struct Counting(std::sync::mpsc::Sender<usize>, Arc<std::sync::atomic::AtomicBool>);
    impl CopyDevice for Counting {
        type Mark = ();
        fn reaches(_: &CopyMemory) -> bool {
            true
        }
        unsafe fn issue(&mut self, copies: &[RawCopy]) -> Result<(), Error> {
            self.0.send(copies.len()).expect("the test listens");
            Ok(())
        }
        fn mark(&mut self) -> Result<(), Error> {
            Ok(())
        }
        fn is_reached(&mut self, (): &()) -> Result<bool, Error> {
            Ok(self.1.load(Ordering::Acquire))
        }
        fn recycle(&mut self, (): ()) {}
        fn finish(&mut self) {}
    }
    let (calls, ended) = (channel(), Arc::<std::sync::atomic::AtomicBool>::default());
    let device = || {
        let (calls, ended) = (calls.0.clone(), ended.clone());
        move || Counting(calls, ended)
    };
    let engine = CopyEngine::start_over([device(), device()], "gpu-test", &CopyEngineConfig::default());
    let (pool, host) = (memory(300), memory(300));
    let (sender, ends) = channel();
    let submit = |number| {
        let mut batch = batch(Direction::Onboard, LANE, number, &sender);
        (0..300).for_each(|block| batch.copy((&host, block * BLOCK), (&pool, block * BLOCK), BLOCK));
        engine.submit(batch).unwrap();
    };
    let seen = |count: usize| -> Vec<usize> {
        (0..count).map(|_| calls.1.recv_timeout(Duration::from_secs(20)).unwrap()).collect()
    };
    submit(0);
    assert_eq!(seen(5), [32, 32, 64, 128, 44]);
    submit(1);
    assert_eq!(seen(1), [300]);
    ended.store(true, Ordering::Release);
    assert!(is_done(&next(&ends).1) && is_done(&next(&ends).1));
}

#[test]
fn neither_direction_waits_for_the_other() {
    for blocked in [Direction::Onboard, Direction::Offload] {
        let [onboard, offload] = [channel::<()>(), channel()];
        let device = |may_go: Receiver<()>| {
            move || {
                may_go.recv().expect("the test says when");
                MemcpyDevice::new()
            }
        };
        let engine = CopyEngine::start_over([device(onboard.1), device(offload.1)], "gpu-test", &small());
        let (pool, host) = (memory(9), memory(9));
        let (sender, ends) = channel();
        for (number, direction) in [Direction::Onboard, Direction::Offload].into_iter().enumerate() {
            let mut batch = batch(direction, LANE, number, &sender);
            (0..9).for_each(|block| batch.copy((&pool, block * BLOCK), (&host, block * BLOCK), BLOCK));
            engine.submit(batch).unwrap();
        }
        let (first, second) = match blocked {
            Direction::Onboard => (offload.0, onboard.0),
            Direction::Offload => (onboard.0, offload.0),
        };
        first.send(()).unwrap();
        let number = usize::from(blocked == Direction::Onboard);
        let (ended, end) = next(&ends);
        assert!(ended == number && is_done(&end), "{ended}: {end:?}");
        assert!(ends.try_recv().is_err());
        second.send(()).unwrap();
        assert!(is_done(&next(&ends).1));
    }
}
