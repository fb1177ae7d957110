//! Attached: lookups, grants, onboards, deadlines.

use std::time::Duration;

use kvbm_connector::{Allocate, CacheEvent, CacheState, Config, DeviceCache};
use kvbm_hash::{Namespace, Retention};
use kvbm_proto::v1::{self, client_message::Body as Question};

use crate::engine::{Engine, NAMESPACE, key, keys, layout, patient};
use crate::mock::{Hold, Mock, wait_for};

const CALM: CacheState = CacheState::Attached { breaker_open: false };

fn start(block_count: u32) -> (tempfile::TempDir, Mock, Engine) {
    let dir = tempfile::tempdir().unwrap();
    let mock = Mock::start(&dir.path().join("kvbm.sock"));
    let engine = Engine::start(patient(&mock.socket), block_count);
    assert_eq!(engine.cache.state(), CALM);
    (dir, mock, engine)
}

fn pins(mock: &Mock) -> u32 {
    mock.state.lock().blocks.iter().map(|block| block.pins).sum()
}

#[test]
fn committed_blocks_are_found_again_and_all_pins_come_back() {
    let (_dir, mock, mut engine) = start(64);
    let blocks = engine.compute(3);
    engine.cache.release(&blocks);
    let (device, host_blocks, lease) = engine.look(1, 4);
    assert_eq!((device.clone(), host_blocks, lease), (blocks, 0, None));
    assert_eq!(device.iter().map(|&block| engine.byte(block)).collect::<Vec<_>>(), [1, 2, 3]);
    engine.cache.release(&device);
    engine.cache.flush();
    let stash = u32::try_from(engine.cache.table().free_count()).unwrap();
    wait_for("pins to come back", || (pins(&mock) == stash).then_some(()));
    assert_eq!(engine.cache.counters().device_blocks_matched.get(), 3);
}

#[test]
fn host_blocks_are_onboarded_and_then_found_in_the_pool() {
    let (_dir, mock, mut engine) = start(64);
    let first = engine.compute(1);
    mock.state.lock().host.extend(keys(3).iter().map(|key| key.0.to_vec()));
    let (device, host_blocks, lease) = engine.look(1, 5);
    assert_eq!((device.clone(), host_blocks), (first.clone(), 2));
    let targets = engine.allocate(2);
    engine.cache.onboard(9, lease.unwrap(), targets.clone());
    assert!(engine.onboarded(9));
    assert_eq!(targets.iter().map(|&block| engine.byte(block)).collect::<Vec<_>>(), [2, 3]);
    let (again, _, _) = engine.look(2, 5);
    assert_eq!(again, [first[0], targets[0], targets[1]]);
    assert_eq!(engine.cache.counters().onboarded_blocks.get(), 2);
    // Used up.
    engine.cache.onboard(10, lease.unwrap(), Vec::new());
    assert!(!engine.onboarded(10));
}

#[test]
fn a_refused_onboard_releases_its_targets() {
    let (_dir, mock, mut engine) = start(64);
    mock.state.lock().host.extend(keys(2).iter().map(|key| key.0.to_vec()));
    let (_, _, lease) = engine.look(1, 2);
    let targets = engine.allocate(2);
    mock.hold(Hold { onboards: true, ..Hold::default() });
    engine.cache.onboard(9, lease.unwrap(), targets.clone());
    mock.held("the onboard", |question| matches!(question, Question::Onboard(_)));
    mock.state.lock().forget_leases();
    mock.let_go();
    assert!(!engine.onboarded(9));
    assert!(targets.iter().all(|&block| engine.cache.table().refs(block) == 0));
    assert_eq!(engine.cache.state(), CALM);
}

#[test]
fn a_late_match_is_no_match_and_is_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let mock = Mock::start(&dir.path().join("kvbm.sock"));
    let config = Config { match_deadline: Duration::from_millis(300), ..patient(&mock.socket) };
    let mut engine = Engine::start(config, 64);
    let blocks = engine.compute(1);
    engine.cache.release(&blocks);
    engine.cache.flush();
    mock.state.lock().host.extend(keys(3).iter().map(|key| key.0.to_vec()));
    mock.hold(Hold { matches: true, ..Hold::default() });

    assert_eq!(engine.look(1, 3), (vec![], 0, None));
    assert_eq!(engine.cache.state(), CacheState::Attached { breaker_open: true });
    // The breaker: answered at once, and not asked.
    engine.cache.lookup(2, NAMESPACE, keys(3), vec![]);
    assert!(engine.cache.has_events());
    assert_eq!(engine.looked(2), (vec![], 0, None));
    mock.held("the match", |question| matches!(question, Question::Match(_)));
    assert_eq!(mock.logged(|question| matches!(question, Question::Match(_)).then_some(())).len(), 1);

    mock.let_go();
    engine.until_state(CALM);
    let stash = u32::try_from(engine.cache.table().free_count()).unwrap();
    wait_for("the late pins and lease to come back", || {
        (pins(&mock) == stash && mock.state.lock().leases() == 0).then_some(())
    });
    assert_eq!(engine.cache.counters().match_timeouts.get(), 1);
    let (device, host_blocks, _) = engine.look(3, 3);
    assert_eq!((device, host_blocks), (blocks, 2));
}

#[test]
fn what_an_abandoned_request_gets_is_given_back() {
    let (_dir, mock, mut engine) = start(64);
    let blocks = engine.compute(1);
    engine.cache.release(&blocks);
    mock.state.lock().host.extend(keys(3).iter().map(|key| key.0.to_vec()));
    let (device, _, lease) = engine.look(1, 3);
    let targets = engine.allocate(2);
    mock.hold(Hold { matches: true, onboards: true, ..Hold::default() });
    engine.cache.lookup(2, NAMESPACE, keys(1), vec![]);
    engine.cache.onboard(2, lease.unwrap(), targets);
    engine.cache.abandon(2);
    engine.cache.release(&device);
    mock.held("the onboard", |question| matches!(question, Question::Onboard(_)));
    mock.let_go();
    wait_for("everything to come back", || {
        assert_eq!(engine.cache.poll().len(), 0);
        let stash = u32::try_from(engine.cache.table().free_count()).unwrap();
        (pins(&mock) == stash && mock.state.lock().leases() == 0).then_some(())
    });
    // Onboarded blocks are kept all the same.
    assert_eq!(engine.look(3, 3).0.len(), 3);
}

#[test]
fn allocations_wait_for_grants_and_learn_when_there_are_none() {
    let (_dir, mock, mut engine) = start(4);
    let mut blocks = engine.allocate(4);
    blocks.sort_unstable();
    assert_eq!(blocks, [0, 1, 2, 3]);
    assert_eq!(engine.cache.allocate(5), Allocate::Exhausted);
    assert_eq!(engine.cache.allocate(1), Allocate::Pending);
    engine.until("an answer", |event| (*event == CacheEvent::Granted).then_some(()));
    assert_eq!(engine.cache.allocate(1), Allocate::Exhausted);
    engine.cache.release(&[2, 3]);
    let mut again = engine.allocate(2);
    again.sort_unstable();
    assert_eq!(again, [2, 3]);
    assert_eq!(engine.cache.table().block_ref(2).generation, 2);
    assert_eq!(pins(&mock), 4);
}

#[test]
fn a_new_namespace_is_registered_before_it_is_used_and_nothing_overtakes() {
    let (_dir, mock, mut engine) = start(64);
    let blocks = engine.allocate(2);
    let other = Namespace([8; 32]);
    engine.commit(blocks[0], 0);
    engine.cache.commit(blocks[1], other, key(50), None, Retention::default());
    engine.cache.release(&blocks);
    engine.cache.lookup(1, other, vec![key(50)], vec![]);
    assert_eq!(engine.looked(1).0, [blocks[1]]);
    let order = mock.logged(|question| match question {
        Question::RegisterNamespace(register) => Some(format!("register {}", register.digest[0])),
        Question::Commit(commit) => Some(format!("commit {}", commit.keys[0])),
        Question::Release(release) => Some(format!("release {:?}", release.pins)),
        Question::Match(_) => Some("match".into()),
        _ => None,
    });
    assert_eq!(order, ["register 7", "commit 1", "register 8", "commit 51", "release [1, 1]", "match"]);
}

#[test]
fn the_worker_is_listed_with_its_pool() {
    let (_dir, mock, engine) = start(8);
    let listed = || {
        mock.logged(|question| match question {
            Question::RegisterWorker(worker) => Some((worker.pool_id, worker.state.clone())),
            _ => None,
        })
    };
    assert_eq!(listed(), [(1, "ready".into())]);
    let draining = kvbm_connector::WorkerRegistration { state: "draining".into(), ..Default::default() };
    engine.cache.set_worker(Some(draining));
    wait_for("the change", || (listed().last() == Some(&(1, "draining".into()))).then_some(()));
}

#[test]
fn what_blocks_are_to_be_kept_like_is_told_with_the_commit_and_the_match() {
    let (_dir, mock, mut engine) = start(8);
    let kept = |priority, duration| Retention { priority, duration };
    let (low, high) = (kept(0, None), kept(90, Some(Duration::from_secs(30))));
    let blocks = engine.allocate(4);
    for (at, retention) in [high, high, low, Retention::default()].into_iter().enumerate() {
        let parent = at.checked_sub(1).map(|before| key(before as u8));
        engine.cache.commit(blocks[at], NAMESPACE, key(at as u8), parent, retention);
    }
    engine.cache.lookup(1, NAMESPACE, keys(4), vec![None, Some(low), Some(low), Some(high)]);
    engine.cache.lookup(2, NAMESPACE, keys(4), vec![]);
    let run = |blocks, priority, duration_ms| v1::RetentionRun { blocks, priority, duration_ms };
    let committed = wait_for("the commit", || {
        let found = mock.logged(|question| match question {
            Question::Commit(commit) => Some(commit.retention.clone()),
            _ => None,
        });
        found.into_iter().next()
    });
    assert_eq!(committed, [run(2, Some(90), Some(30_000)), run(1, Some(0), None), run(1, None, None)]);
    let matched = wait_for("both matches", || {
        let found = mock.logged(|question| match question {
            Question::Match(of) => Some(of.retention.clone()),
            _ => None,
        });
        (found.len() == 2).then_some(found)
    });
    assert_eq!(matched[0], [run(1, None, None), run(2, Some(0), None), run(1, Some(90), Some(30_000))]);
    assert_eq!(matched[1], []);
}

#[test]
fn a_private_pool_keeps_what_is_dear_until_its_time_is_over() {
    let mut cache = DeviceCache::private(layout(3)).unwrap();
    let mut run = |name, retention| {
        let Allocate::Blocks(blocks) = cache.allocate(1) else { panic!("nothing is in use") };
        cache.commit(blocks[0], NAMESPACE, key(name), None, retention);
        cache.release(&blocks);
        let held: Vec<_> = (0..3).filter_map(|block| cache.table().content(block)).map(|of| of.key).collect();
        (0..=name).filter(|name| held.contains(&key(*name))).collect::<Vec<u8>>()
    };
    let dear = Retention { priority: 90, duration: None };
    let brief = Retention { priority: 90, duration: Some(Duration::ZERO) };
    assert_eq!(run(0, dear), [0]);
    assert_eq!(run(1, brief), [0, 1]);
    for (name, left) in [(2, [0, 1, 2]), (3, [0, 2, 3]), (4, [0, 3, 4])] {
        assert_eq!(run(name, Retention::default()), left);
    }
}
