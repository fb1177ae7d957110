//! The daemon leaves, hangs, comes back.

use std::time::Duration;

use kvbm_connector::{Allocate, CacheEvent, CacheState, Config, DetachReason, DeviceCache};
use kvbm_hash::Retention;
use kvbm_proto::v1::client_message::Body as Question;
use kvbm_shm::{PoolMemory, SharedMemory};

use crate::engine::{Engine, NAMESPACE, keys, layout, patient};
use crate::mock::{Hold, Mock, on_gpu, wait_for};

const CALM: CacheState = CacheState::Attached { breaker_open: false };

fn detached(engine: &mut Engine) -> DetachReason {
    engine.until("the detach", |event| match event {
        CacheEvent::Detached { reason } => Some(reason.clone()),
        _ => None,
    })
}

#[test]
fn a_daemon_that_vanishes_is_replaced_by_the_table_and_gets_it_when_it_returns() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kvbm.sock");
    let mock = Mock::start(&socket);
    let mut engine = Engine::start(patient(&socket), 8);
    let kept = engine.compute(3);
    let filling = engine.allocate(1);
    engine.cache.release(&kept[1..]);
    engine.cache.flush();
    let (memory, epoch) = (engine.cache.memory(), engine.cache.memory().epoch());
    engine.cache.lookup(1, NAMESPACE, keys(1), vec![]);
    drop(mock);

    assert!(matches!(detached(&mut engine), DetachReason::Gone(_)));
    assert_eq!(engine.looked(1).0, kept[..1], "answered, by whom ever");
    assert_eq!(memory.epoch(), epoch + 1);
    // All blocks that nobody uses can be had, and the cache is still there.
    let found = engine.look(2, 3).0;
    assert_eq!(found, kept);
    engine.cache.release(&found);
    let taken = engine.allocate(6);
    assert!(taken.iter().all(|block| *block != kept[0] && !filling.contains(block)));
    assert_eq!(engine.cache.allocate(1), Allocate::Exhausted);
    engine.cache.release(&taken[2..]);

    let mock = Mock::start(&socket);
    engine.until("re-attachment", |event| matches!(event, CacheEvent::Attached { .. }).then_some(()));
    let state = mock.state.lock();
    let adoption = &state.adoptions[0];
    assert_eq!((adoption.pool_uuid.clone(), adoption.epoch), (memory.uuid().to_vec(), epoch + 1));
    let entries: Vec<_> =
        adoption.entries.iter().map(|entry| (entry.block.unwrap().block, entry.held)).collect();
    assert_eq!(entries, [(kept[0], true)]);
    let mut held: Vec<u32> = adoption.held.iter().map(|block| block.block).collect();
    let mut expected = [&filling[..], &taken[..2]].concat();
    held.sort_unstable();
    expected.sort_unstable();
    assert_eq!(held, expected);
    drop(state);
    // Both map the same memory.
    let theirs = mock.state.lock().memory.clone().unwrap();
    engine.cache.release(&taken[..2]);
    engine.commit(filling[0], 1);
    let mut byte = [0];
    theirs.memory().read(theirs.layout().offset(filling[0]), &mut byte);
    assert_eq!(byte, [2]);
    engine.cache.flush();
    let again = engine.look(3, 2).0;
    assert_eq!(again, [kept[0], filling[0]]);
    assert_eq!(engine.cache.counters().reattaches.get(), 1);
}

#[test]
fn targets_of_an_unanswered_onboard_are_quarantined_until_the_daemon_takes_the_pool_back() {
    let dir = tempfile::tempdir().unwrap();
    let mock = Mock::start(&dir.path().join("kvbm.sock"));
    let config = Config {
        detach_after: Duration::from_millis(800),
        attach_deadline: Duration::from_millis(800),
        ..patient(&mock.socket)
    };
    let mut engine = Engine::start(config, 8);
    mock.state.lock().host.extend(keys(2).iter().map(|key| key.0.to_vec()));
    let (_, host_blocks, lease) = engine.look(1, 2);
    assert_eq!(host_blocks, 2);
    let targets = engine.allocate(2);
    mock.hold(Hold { everything: true, ..Hold::default() });
    engine.cache.onboard(9, lease.unwrap(), targets.clone());

    assert!(!engine.onboarded(9));
    assert_eq!(detached(&mut engine), DetachReason::Silent);
    assert_eq!(engine.cache.counters().quarantined_blocks.get(), 2);
    // It answers greetings, but does not take the pool: that must not free them either.
    wait_for("a failed re-attachment", || {
        engine.cache.poll();
        (engine.cache.counters().attach_failures.get() > 0).then_some(())
    });
    engine.until_state(CacheState::Detached);
    let taken = engine.allocate(6);
    assert!(taken.iter().all(|block| !targets.contains(block)));
    assert_eq!(engine.cache.allocate(1), Allocate::Exhausted);

    mock.state.lock().held.clear();
    mock.hold(Hold::default());
    engine.until_state(CALM);
    assert_eq!(engine.cache.counters().quarantined_blocks.get(), 0);
    let adopted = mock.state.lock().adoptions.last().unwrap().clone();
    assert_eq!((adopted.entries.len(), adopted.held.len()), (0, 6));
    let mut freed = engine.allocate(2);
    freed.sort_unstable();
    let mut expected = targets;
    expected.sort_unstable();
    assert_eq!(freed, expected);
}

#[test]
fn missing_grants_detach_and_the_allocation_goes_on_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mock = Mock::start(&dir.path().join("kvbm.sock"));
    mock.hold(Hold { grants: true, ..Hold::default() });
    let config = Config { detach_after: Duration::from_millis(800), ..patient(&mock.socket) };
    let mut engine = Engine::start(config, 8);
    assert_eq!(engine.cache.allocate(3), Allocate::Pending);
    engine.until("the word to try again", |event| (*event == CacheEvent::Granted).then_some(()));
    assert!(matches!(engine.cache.allocate(3), Allocate::Blocks(blocks) if blocks.len() == 3));
    assert_eq!(detached(&mut engine), DetachReason::Silent);
}

#[test]
fn a_daemon_that_contradicts_the_table_is_left_and_set_right() {
    let dir = tempfile::tempdir().unwrap();
    let mock = Mock::start(&dir.path().join("kvbm.sock"));
    let mut engine = Engine::start(patient(&mock.socket), 8);
    let blocks = engine.compute(2);
    mock.state.lock().blocks.iter_mut().for_each(|block| block.pins = 0);
    assert_eq!(engine.cache.allocate(7), Allocate::Pending);
    assert!(matches!(detached(&mut engine), DetachReason::Contradiction(_)));
    engine.until_state(CALM);
    assert_eq!(engine.look(1, 2).0, blocks);
    assert_eq!(engine.cache.counters().contradictions.get(), 1);
}

#[test]
fn a_daemon_that_forgot_the_pool_is_given_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let mock = Mock::start(&dir.path().join("kvbm.sock"));
    let mut engine = Engine::start(patient(&mock.socket), 8);
    let blocks = engine.compute(2);
    for adoptions in 1..=2 {
        mock.hold(Hold { forget_pool: true, ..Hold::default() });
        if adoptions == 1 {
            engine.cache.lookup(1, NAMESPACE, keys(2), vec![]);
        } else {
            assert_eq!(engine.cache.allocate(6), Allocate::Pending);
        }
        assert!(matches!(detached(&mut engine), DetachReason::Refused(_)));
        engine.until_state(CALM);
        assert_eq!(mock.state.lock().adoptions.len(), adoptions);
    }
    assert_eq!(engine.look(2, 2).0, blocks);
    assert_eq!(engine.allocate(6).len(), 6);
}

#[test]
fn a_start_without_a_daemon_hands_its_memory_over_later() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kvbm.sock");
    let config = Config { init_timeout: Duration::from_millis(30), ..patient(&socket) };
    let mut engine = Engine::start(config, 8);
    assert_eq!(engine.cache.state(), CacheState::Detached);
    let blocks = engine.compute(2);
    let memory = engine.cache.memory();
    let mock = Mock::start(&socket);
    engine.until("the daemon", |event| matches!(event, CacheEvent::Attached { .. }).then_some(()));
    assert_eq!(mock.state.lock().memory.as_ref().unwrap().uuid(), memory.uuid());
    assert_eq!(engine.look(1, 2).0, blocks);
    assert_eq!(engine.cache.counters().matches.get(), 1);
}

#[test]
fn a_worker_whose_pool_is_refused_serves_alone_and_is_listed() {
    let dir = tempfile::tempdir().unwrap();
    let mock = Mock::start(&dir.path().join("kvbm.sock"));
    mock.hold(Hold { refuse_pool: true, ..Hold::default() });
    let mut engine = Engine::start(patient(&mock.socket), 8);
    assert_eq!(engine.cache.state(), CacheState::Detached);
    assert_eq!(engine.compute(2).len(), 2);
    wait_for("the listing", || {
        engine.cache.poll();
        let listed = mock.logged(|question| match question {
            Question::RegisterWorker(worker) => Some(worker.pool_id),
            _ => None,
        });
        listed.contains(&0).then_some(())
    });
    mock.hold(Hold::default());
    engine.until_state(CALM);
    assert_eq!(engine.look(1, 2).0.len(), 2);
}

#[test]
fn without_a_daemon_everything_works_alone() {
    let mut cache = DeviceCache::private(layout(4)).unwrap();
    let Allocate::Blocks(blocks) = cache.allocate(2) else { panic!("the pool is empty") };
    cache.commit(blocks[0], NAMESPACE, keys(1)[0], None, Retention::default());
    cache.release(&blocks);
    cache.lookup(1, NAMESPACE, keys(2), vec![]);
    let events = cache.poll();
    let [CacheEvent::Looked { ticket: 1, device, .. }] = &events[..] else { panic!("{events:?}") };
    assert_eq!(*device, blocks[..1]);
    assert_eq!(cache.state(), CacheState::Detached);
}

fn device_of(pool: &PoolMemory) -> SharedMemory {
    let (descriptor, _) = pool.device().expect("it is on a GPU");
    SharedMemory::from_fd(descriptor.try_clone_to_owned().unwrap()).unwrap()
}

#[test]
fn the_memory_of_a_gpu_goes_with_its_pool_to_the_next_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kvbm.sock");
    let mock = Mock::start(&socket);
    let config = Config { device: "GPU-1".into(), ..patient(&socket) };
    let mut engine = Engine::start(config, 8);
    let memory = engine.cache.memory();
    device_of(&mock.state.lock().memory.clone().unwrap()).write(8192, b"daemon");
    drop(mock);
    detached(&mut engine);
    let mock = Mock::start(&socket);
    engine.until("re-attachment", |event| matches!(event, CacheEvent::Attached { .. }).then_some(()));
    let mut seen = [0; 6];
    for pool in [&memory, &mock.state.lock().memory.clone().unwrap()] {
        device_of(pool).read(8192, &mut seen);
        assert_eq!(&seen, b"daemon");
    }
}

#[test]
fn without_a_daemon_the_engine_makes_memory_of_a_gpu_itself_and_hands_it_over_later() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("kvbm.sock");
    let config = Config {
        device: "GPU-1".into(),
        init_timeout: Duration::from_millis(20),
        attach_deadline: Duration::from_millis(200),
        ..patient(&socket)
    };
    let mut engine = Engine::start_or(config, 8, Box::new(|_, layout| Ok(on_gpu(layout))));
    assert_eq!(engine.cache.state(), CacheState::Detached);
    device_of(&engine.cache.memory()).write(0, b"engine");
    let mock = Mock::start(&socket);
    engine.until("attachment", |event| matches!(event, CacheEvent::Attached { .. }).then_some(()));
    let mut seen = [0; 6];
    device_of(&mock.state.lock().memory.clone().unwrap()).read(0, &mut seen);
    assert_eq!(&seen, b"engine");
}

#[test]
fn an_event_that_nobody_took_yet_is_given_back_too() {
    let mut cache = DeviceCache::private(layout(4)).unwrap();
    let Allocate::Blocks(blocks) = cache.allocate(1) else { panic!("the pool is empty") };
    cache.commit(blocks[0], NAMESPACE, keys(1)[0], None, Retention::default());
    cache.lookup(1, NAMESPACE, keys(1), vec![]);
    cache.lookup(2, NAMESPACE, keys(1), vec![]);
    assert_eq!(cache.table().refs(blocks[0]), 3);
    cache.abandon(1);
    assert_eq!(cache.table().refs(blocks[0]), 2);
    assert!(matches!(cache.poll()[..], [CacheEvent::Looked { ticket: 2, .. }]));
}

#[test]
fn a_cache_can_be_given_to_the_thread_of_the_engine() {
    fn is_send<T: Send>() {}
    is_send::<DeviceCache>();
}
