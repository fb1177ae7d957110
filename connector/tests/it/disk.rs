//! Blocks on disk, over a real link with its deadlines.

use std::time::{Duration, Instant};

use kvbm_connector::{CacheEvent, CacheState, Client, ClientError, Config, DetachReason};
use kvbm_proto::v1::client_message::Body as Question;

use crate::engine::{BASE, Engine, NAMESPACE, keys, patient};
use crate::mock::{Hold, Mock, wait_for};

const CALM: CacheState = CacheState::Attached { breaker_open: false };
/// Promotions take as long as the test wants.
fn slow() -> Hold {
    Hold { promotions: true, ..Hold::default() }
}

/// A daemon with so many blocks in host memory and, behind them, on disk.
fn start(config: impl FnOnce(Config) -> Config, host: u8, disk: u8) -> (tempfile::TempDir, Mock, Engine) {
    let dir = tempfile::tempdir().unwrap();
    let mock = Mock::start(&dir.path().join("kvbm.sock"));
    let engine = Engine::start(config(patient(&mock.socket)), 64);
    let all: Vec<_> = keys(host + disk).iter().map(|key| key.0.to_vec()).collect();
    let (in_host, on_disk) = all.split_at(host.into());
    let mut state = mock.state.lock();
    state.host.extend(in_host.iter().cloned());
    state.disk.extend(on_disk.iter().cloned());
    drop(state);
    (dir, mock, engine)
}

fn never(config: Config) -> Config {
    let never = Duration::from_secs(60);
    Config { disk_wait_base: never, disk_wait_max: never, ..config }
}

fn looked(engine: &mut Engine, wanted: u64) -> (u32, u32, u32) {
    engine.until("an answer to a lookup", |event| match event {
        CacheEvent::Looked { ticket, host_blocks, promoted_blocks, disk_blocks, .. } if *ticket == wanted => {
            Some((*host_blocks, *promoted_blocks, *disk_blocks))
        }
        _ => None,
    })
}

fn promoting(engine: &mut Engine, wanted: u64) {
    engine.until("the wait", |event| match event {
        CacheEvent::Promoting { ticket } => (*ticket == wanted).then_some(()),
        _ => None,
    });
}

#[test]
fn blocks_on_disk_are_waited_for_and_onboarded() {
    let (_dir, mock, mut engine) = start(never, 1, 2);
    mock.hold(slow());
    engine.cache.lookup(1, NAMESPACE, keys(6), vec![]);
    promoting(&mut engine, 1);
    mock.held("the wait", |question| matches!(question, Question::Prefetch(ask) if ask.wait));
    wait_for("the lease to go back", || (mock.state.lock().leases() == 0).then_some(()));
    // Others are served meanwhile.
    assert_eq!(engine.look(2, 1).1, 1);
    engine.allocate(2);
    mock.let_go();
    let (host_blocks, promoted_blocks, lease) = engine.until("an answer", |event| match event {
        CacheEvent::Looked { ticket: 1, host_blocks, promoted_blocks, lease, .. } => {
            Some((*host_blocks, *promoted_blocks, *lease))
        }
        _ => None,
    });
    assert_eq!((host_blocks, promoted_blocks), (3, 2));
    let targets = engine.allocate(3);
    engine.cache.onboard(9, lease.unwrap(), targets.clone());
    assert!(engine.onboarded(9));
    assert_eq!(targets.iter().map(|&block| engine.byte(block)).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(engine.cache.counters().promoted_blocks.get(), 2);
}

#[test]
fn a_drive_that_takes_long_costs_a_lookup_a_bounded_time() {
    let wait = Duration::from_millis(50);
    let (_dir, mock, mut engine) = start(|config| Config { disk_wait_base: wait, ..config }, 1, 2);
    mock.hold(slow());
    let begin = Instant::now();
    engine.cache.lookup(1, NAMESPACE, keys(6), vec![]);
    assert_eq!(looked(&mut engine, 1), (1, 0, 2));
    assert!(begin.elapsed() >= wait);
    assert_eq!(engine.cache.state(), CALM);
    let counters = engine.cache.counters();
    assert_eq!((counters.disk_wait_timeouts.get(), counters.match_timeouts.get()), (1, 0));
    // It comes late, for nobody; whoever asks next finds it.
    mock.let_go();
    engine.cache.lookup(2, NAMESPACE, keys(6), vec![]);
    assert_eq!(looked(&mut engine, 2), (3, 0, 0));
    assert_eq!(engine.cache.state(), CALM);
}

#[test]
fn a_daemon_without_room_for_a_wait_is_not_waited_for() {
    let (_dir, mock, mut engine) = start(never, 1, 2);
    mock.hold(Hold { busy: true, ..Hold::default() });
    engine.cache.lookup(1, NAMESPACE, keys(6), vec![]);
    assert_eq!(looked(&mut engine, 1), (1, 0, 2));
    let matches = mock.logged(|question| matches!(question, Question::Match(_)).then_some(()));
    assert_eq!((matches.len(), engine.cache.state()), (2, CALM));
}

#[test]
fn a_daemon_that_owes_the_answer_far_too_long_is_left() {
    let (_dir, mock, mut engine) = start(
        |config| Config {
            disk_wait_base: Duration::from_millis(10),
            disk_fail_after: Duration::from_millis(100),
            ..config
        },
        1,
        2,
    );
    mock.hold(slow());
    engine.cache.lookup(1, NAMESPACE, keys(6), vec![]);
    assert_eq!(looked(&mut engine, 1), (1, 0, 2));
    let reason = engine.until("the detach", |event| match event {
        CacheEvent::Detached { reason } => Some(reason.clone()),
        _ => None,
    });
    assert_eq!(reason, DetachReason::Silent);
    mock.hold(Hold::default());
    engine.until_state(CALM);
}

#[test]
fn a_daemon_that_vanishes_during_the_wait_leaves_no_lookup_behind() {
    let (_dir, mock, mut engine) = start(never, 1, 2);
    mock.hold(slow());
    engine.cache.lookup(1, NAMESPACE, keys(6), vec![]);
    promoting(&mut engine, 1);
    mock.held("the wait", |question| matches!(question, Question::Prefetch(_)));
    drop(mock);
    assert_eq!(looked(&mut engine, 1), (0, 0, 0));
    assert_eq!(engine.cache.state(), CacheState::Detached);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_client_may_wait_for_promotions_or_not() {
    let (_dir, mock, _engine) = tokio::task::block_in_place(|| start(never, 1, 2));
    let client = Client::connect(&mock.socket).await.unwrap();
    let namespace = client.register_namespace(NAMESPACE, BASE, "t", "m").await.unwrap();
    let reply = client.prefetch(namespace, &keys(3)).await.unwrap();
    assert_eq!((reply.host_blocks, reply.promoting_blocks), (1, 2));
    mock.hold(slow());
    let hasty = client.with_deadline(Duration::from_millis(30));
    assert_eq!(hasty.prefetch_and_wait(namespace, &keys(3)).await, Err(ClientError::Deadline));
    tokio::task::block_in_place(|| mock.let_go());
    let reply = client.prefetch_and_wait(namespace, &keys(3)).await.unwrap();
    assert_eq!((reply.host_blocks, reply.promoting_blocks), (3, 0));
}
