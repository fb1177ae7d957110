use std::collections::BTreeMap;
use std::sync::{Arc, mpsc};

use kvbm_shm::SharedMemory;
use proptest::prelude::*;

use super::super::Buffer;
use super::*;

type Told = mpsc::Receiver<Vec<IoResult>>;

fn memory() -> Arc<SharedMemory> {
    Arc::new(SharedMemory::create("test", 1 << 20).unwrap())
}

fn buffer(memory: &Arc<SharedMemory>, len: usize) -> Buffer {
    Buffer { memory: Arc::clone(memory), offset: 0, len }
}

fn read(memory: &Arc<SharedMemory>, len: usize) -> Io {
    Io::Read { file: 0, offset: 0, buffer: buffer(memory, len) }
}

fn write(memory: &Arc<SharedMemory>, len: usize) -> Io {
    Io::Write { file: 0, offset: 0, buffer: buffer(memory, len) }
}

fn batch(ios: Vec<Io>) -> (IoBatch, Told) {
    let (tell, told) = mpsc::channel();
    (IoBatch { ios, finished: Box::new(move |results| tell.send(results).unwrap()) }, told)
}

fn backlog(depth: usize, bytes: usize, waiting: usize) -> Backlog {
    let options = IoOptions {
        bytes_in_flight_max: bytes,
        waiting_reads_max: waiting,
        waiting_writes_max: waiting,
        ..IoOptions::default()
    };
    Backlog::new(depth, &options)
}

fn accept(backlog: &mut Backlog, ios: Vec<Io>) -> Told {
    let (batch, told) = batch(ios);
    backlog.accept(batch).unwrap();
    told
}

#[test]
fn bytes_in_flight_are_capped_and_what_is_larger_goes_alone() {
    let (memory, now) = (memory(), Instant::now());
    let mut backlog = backlog(8, 8192, 100);
    let _told = accept(&mut backlog, vec![read(&memory, 4096), read(&memory, 4096), read(&memory, 12288)]);
    let _told = accept(&mut backlog, vec![write(&memory, 4096)]);
    let (first, second) = (backlog.start(now).unwrap(), backlog.start(now).unwrap());
    assert!(backlog.start(now).is_none(), "8192 bytes are in flight");
    assert!(backlog.end(first.slot, Ok(())).is_none());
    assert!(!backlog.can_start(), "the large one waits, and nothing overtakes it");
    assert!(backlog.end(second.slot, Ok(())).is_none());
    let large = backlog.start(now).unwrap();
    assert_eq!((large.io.bytes(), backlog.can_start()), (12288, false));
    assert_eq!(backlog.load(now, Duration::MAX).bytes_in_flight, 12288);
}

#[test]
fn a_batch_longer_than_the_queue_is_accepted_by_an_empty_one_only() {
    let (memory, now) = (memory(), Instant::now());
    let mut backlog = backlog(1, 1 << 20, 1);
    let three = || (0..3).map(|_| write(&memory, 4096)).collect::<Vec<_>>();
    let _told = accept(&mut backlog, three());
    let (refused, told) = batch(three());
    let given_back = backlog.accept(refused).unwrap_err();
    assert_eq!(given_back.ios.len(), 3);
    assert_eq!(told.try_recv(), Err(mpsc::TryRecvError::Empty));
    // The other queue is another matter.
    let _told = accept(&mut backlog, vec![read(&memory, 4096)]);
    for _ in 0..4 {
        let started = backlog.start(now).unwrap();
        backlog.end(started.slot, Ok(()));
    }
    let _told = accept(&mut backlog, three());
}

#[test]
fn what_is_longer_with_the_kernel_than_the_deadline_is_overdue() {
    let (memory, start) = (memory(), Instant::now());
    let mut backlog = backlog(8, 1 << 20, 100);
    let _told = accept(&mut backlog, vec![read(&memory, 4096)]);
    backlog.start(start).unwrap();
    let _told = accept(&mut backlog, vec![read(&memory, 4096), read(&memory, 4096)]);
    backlog.start(start + Duration::from_secs(3)).unwrap();
    let load = |after| backlog.load(start + Duration::from_secs(after), Duration::from_secs(5));
    assert_eq!((load(5).overdue, load(6).overdue, load(9).overdue), (0, 1, 2));
    assert_eq!((load(6).oldest, load(6).in_flight, load(6).waiting), (Duration::from_secs(6), 2, 1));
}

#[test]
fn a_sync_held_back_by_writes_is_given_up_with_them() {
    let (memory, now) = (memory(), Instant::now());
    let mut backlog = backlog(1, 1 << 20, 100);
    let told = accept(&mut backlog, vec![Io::Sync { file: 0 }, write(&memory, 4096), write(&memory, 4096)]);
    let started = backlog.start(now).unwrap();
    assert_eq!(backlog.load(now, Duration::MAX).waiting, 2);
    backlog.abandon_waiting();
    assert_eq!((backlog.load(now, Duration::MAX).waiting, backlog.has_ended()), (0, false));
    backlog.end(started.slot, Ok(())).unwrap().call();
    assert_eq!(told.recv().unwrap(), [Err(IoFailure::Abandoned), Ok(()), Err(IoFailure::Abandoned)]);
}

#[derive(Debug, Clone)]
enum Op {
    Accept { reads: usize, writes: usize, syncs: usize },
    Start,
    End { which: usize },
    Abandon,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..4usize, 0..4usize, 0..2usize)
            .prop_map(|(reads, writes, syncs)| Op::Accept { reads, writes, syncs }),
        6 => Just(Op::Start),
        5 => any::<usize>().prop_map(|which| Op::End { which }),
        1 => Just(Op::Abandon),
    ]
}

proptest! {
    #[test]
    fn every_batch_ends_once_with_all_its_results_whatever_happens(
        ops in prop::collection::vec(op(), 0..200),
        depth in 1..5usize,
    ) {
        let (memory, now) = (memory(), Instant::now());
        let mut backlog = backlog(depth, 20_000, 6);
        let (tell, told) = mpsc::channel();
        let mut lengths = BTreeMap::new();
        let mut flights: Vec<Started> = Vec::new();
        let mut waiting_max = 0;
        for (number, op) in ops.into_iter().enumerate() {
            match op {
                Op::Accept { reads, writes, syncs } => {
                    let mut ios = vec![Io::Sync { file: 0 }; syncs];
                    ios.extend((0..reads).map(|_| read(&memory, 8192)));
                    ios.extend((0..writes).map(|_| write(&memory, 4096)));
                    let (len, tell) = (ios.len(), tell.clone());
                    let finished = Box::new(move |results| tell.send((number, results)).unwrap());
                    if backlog.accept(IoBatch { ios, finished }).is_ok() {
                        lengths.insert(number, len);
                    }
                }
                Op::Start => flights.extend(backlog.start(now)),
                Op::End { which } if !flights.is_empty() => {
                    let flight = flights.swap_remove(which % flights.len());
                    if let Some(ended) = backlog.end(flight.slot, Ok(())) {
                        ended.call();
                    }
                }
                Op::End { .. } => {}
                Op::Abandon => {
                    backlog.abandon_waiting();
                    prop_assert_eq!(backlog.load(now, Duration::MAX).waiting, 0);
                }
            }
            backlog.take_ended().into_iter().for_each(Ended::call);
            let load = backlog.load(now, Duration::MAX);
            prop_assert_eq!(load.in_flight, flights.len());
            prop_assert_eq!(load.bytes_in_flight, flights.iter().map(|flight| flight.io.bytes()).sum::<usize>());
            prop_assert!(load.in_flight <= depth && load.bytes_in_flight <= 20_000);
            waiting_max = waiting_max.max(load.waiting);
            for (number, results) in told.try_iter() {
                let results: Vec<IoResult> = results;
                prop_assert_eq!(lengths.remove(&number), Some(results.len()));
            }
        }
        prop_assert!(waiting_max <= 12);
        backlog.close();
        while let Some(started) = flights.pop().or_else(|| backlog.start(now)) {
            if let Some(ended) = backlog.end(started.slot, Ok(())) {
                ended.call();
            }
        }
        for (number, _) in told.try_iter() {
            prop_assert!(lengths.remove(&number).is_some());
        }
        prop_assert!(lengths.is_empty() && backlog.is_over());
    }
}
