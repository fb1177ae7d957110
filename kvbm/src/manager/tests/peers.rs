//! Blocks of one pool copied into another, while host memory does not have them.

use super::*;
use crate::Matched;
use crate::store::StandInGpus;

fn on_gpus(config: ManagerConfig) -> Manager {
    manager(ManagerConfig { exports: Arc::new(StandInGpus::new()), ..config })
}

/// One GPU to another, and one pool to another of the same GPU.
const PAIRS: [[&str; 2]; 2] = [["GPU-0", "GPU-1"], ["GPU-0", "GPU-0"]];

fn find(engine: &Engine, keys: &[SequenceHash]) -> Matched {
    let pool = Some(engine.pool.pool_id);
    engine.manager.match_prefix(engine.session, engine.namespace, keys, pool, &[]).unwrap()
}

#[test]
fn what_one_worker_computed_another_copies_out_of_its_pool() {
    for [from, to] in PAIRS {
        let manager = on_gpus(with_host(0));
        let from = Engine::attach_on(&manager, true, from);
        let keys = from.keys(&(0..24).collect::<Vec<_>>());
        let blocks = from.compute(&keys);
        from.release(&blocks);
        let to = Engine::attach_on(&manager, true, to);
        let matched = find(&to, &keys);
        assert_eq!((matched.device.len(), matched.peer_blocks, matched.host_blocks), (0, 6, 0));
        // The first four of the six.
        let targets = to.granted(4);
        let outcome = to.onboard(matched.lease.unwrap(), &targets).unwrap();
        assert_eq!((outcome.blocks_done, outcome.bytes), (4, 4 * 8192));
        to.check(&targets, &keys);
        let matched = find(&to, &keys);
        assert_eq!((matched.device.len(), matched.peer_blocks), (4, 2));
        manager.release_lease(to.session, matched.lease.unwrap()).unwrap();
        let counters = manager.counters();
        assert_eq!((counters.blocks(Route::DeviceToDevice), counters.blocks(Route::HostToDevice)), (4, 0));
        manager.stop();
        manager.inspect(Ledger::check_integrity);
    }
}

#[test]
fn host_memory_is_used_where_it_has_as_much_and_pools_of_other_kinds_are_not() {
    let manager = on_gpus(with_host(1 << 20));
    let from = Engine::attach_on(&manager, true, "GPU-0");
    let keys = from.keys(&(0..24).collect::<Vec<_>>());
    from.offloaded(&from.compute(&keys));
    let to = Engine::attach_on(&manager, true, "GPU-1");
    let matched = find(&to, &keys);
    assert_eq!((matched.host_blocks, matched.peer_blocks), (6, 0));
    manager.stop();

    for [from, to] in [["GPU-0", "cpu:0"], ["cpu:0", "GPU-0"], ["cpu:0", "cpu:0"]] {
        let manager = on_gpus(with_host(0));
        Engine::attach_on(&manager, true, from).compute(&keys);
        let to = Engine::attach_on(&manager, true, to);
        assert_eq!((find(&to, &keys).peer_blocks, find(&to, &keys).lease), (0, None));
        manager.stop();
    }
}

/// Blocks that are leased or being copied are not reassigned, whatever becomes of their writer.
#[test]
fn leased_blocks_stay_while_their_writer_wants_room_and_when_it_is_dead() {
    let manager = on_gpus(with_host(0));
    let from = Engine::attach_on(&manager, true, "GPU-0");
    let keys = from.keys(&(0..24).collect::<Vec<_>>());
    let blocks = from.compute(&keys);
    from.release(&blocks);
    let to = Engine::attach_on(&manager, true, "GPU-1");
    let lease = find(&to, &keys).lease.unwrap();
    let (session, pool) = (from.session, from.pool.pool_id);
    let granted = manager.request_grants(session, pool, 16).unwrap();
    assert_eq!(granted.len(), 10, "all but the leased ones");
    from.release(&granted);
    manager.session_dead(session);
    let heir = Engine::attach_on(&manager, false, "GPU-0");
    assert!(heir.pool.inherited);
    assert_eq!(heir.granted(10).len(), 10);
    assert!(manager.request_grants(heir.session, heir.pool.pool_id, 1).unwrap().is_empty());
    let targets = to.granted(6);
    assert_eq!(to.onboard(lease, &targets).unwrap().blocks_done, 6);
    to.check(&targets, &keys);
    assert_eq!(manager.request_grants(heir.session, heir.pool.pool_id, 6).unwrap().len(), 6, "all are free");
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

/// The writer went on by itself and may be reusing its blocks: what was copied out of them does not count.
#[test]
fn a_source_whose_writer_goes_its_own_way_is_none() {
    for [from, to] in PAIRS {
        let manager = on_gpus(with_host(0));
        let from = Engine::attach_on(&manager, true, from);
        let keys = from.keys(&(0..24).collect::<Vec<_>>());
        from.compute(&keys);
        let to = Engine::attach_on(&manager, true, to);
        // Not known yet to the ledger.
        let lease = find(&to, &keys).lease.unwrap();
        from.pool.memory.raise_epoch();
        let outcome = to.onboard(lease, &to.granted(6)).unwrap();
        assert_eq!((outcome.blocks_done, outcome.blocks_failed), (0, 6));
        assert_eq!(manager.counters().blocks(Route::DeviceToDevice), 0);
        assert!(find(&to, &keys).device.is_empty());
        // Silent.
        let lease = find(&to, &keys).lease.unwrap();
        manager.session_silent(from.session);
        assert!(matches!(to.onboard(lease, &to.granted(6)), Err(Refused::Stale { .. })));
        assert_eq!(find(&to, &keys).lease, None);
        manager.stop();
        manager.inspect(Ledger::check_integrity);
    }
}

#[test]
fn leases_on_a_pool_end_with_it() {
    let manager = on_gpus(ManagerConfig { orphan_pools_max: 0, ..with_host(0) });
    let from = Engine::attach_on(&manager, true, "GPU-0");
    let keys = from.keys(&(0..24).collect::<Vec<_>>());
    from.compute(&keys);
    let to = Engine::attach_on(&manager, true, "GPU-1");
    let lease = find(&to, &keys).lease.unwrap();
    manager.session_dead(from.session);
    assert_eq!(manager.inspect(Ledger::leases), 0);
    assert!(matches!(to.onboard(lease, &to.granted(6)), Err(Refused::Unknown { .. })));
    assert_eq!(find(&to, &keys).lease, None);
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

/// What came from another pool goes to host memory, if that one cannot bring it there any more.
#[test]
fn blocks_from_another_pool_are_offloaded_if_host_memory_lacks_them() {
    let manager = on_gpus(ManagerConfig { copy_delay: Duration::from_millis(2), ..with_host(1 << 20) });
    let from = Engine::attach_on(&manager, true, "GPU-0");
    let keys = from.keys(&(0..48).collect::<Vec<_>>());
    let to = Engine::attach_on(&manager, true, "GPU-1");
    from.compute(&keys);
    let matched = find(&to, &keys);
    // Copies out of the first pool take their time: some of it is not in host memory yet.
    let (count, lease) = (matched.peer_blocks + matched.host_blocks, matched.lease.unwrap());
    let targets = to.granted(count);
    assert_eq!(to.onboard(lease, &targets).unwrap().blocks_done, count);
    to.check(&targets, &keys);
    assert_eq!(to.offloaded(&targets).blocks_done, count);
    manager.stop();
    manager.inspect(Ledger::check_integrity);
}

/// Many threads and small pools: no byte is wrong, nothing is lost, whoever dies.
#[test]
fn engines_that_copy_from_each_other_always_read_what_was_stored() {
    let manager = on_gpus(with_host(0));
    let workers: Vec<_> = (0..4u32)
        .map(|seed| {
            let manager = manager.clone();
            std::thread::spawn(move || copy_from_others(&manager, seed))
        })
        .collect();
    let copied: usize = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
    assert!(copied > 0, "none of the engines found a block of another");
    manager.stop();
    manager.inspect(|ledger| {
        ledger.check_integrity();
        assert_eq!((ledger.leases(), ledger.quarantined()), (0, 0));
    });
}

fn copy_from_others(manager: &Manager, seed: u32) -> usize {
    let device = ["GPU-0", "GPU-1", "GPU-1", "GPU-0"][seed as usize];
    let (mut engine, mut copied) = (Engine::attach_on(manager, false, device), 0);
    let mut random = seed + 1;
    for round in 0..400 {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let topic = (random >> 16) % 6;
        let tokens: Vec<u32> = (0..16).map(|i| topic * 100 + i).collect();
        let keys = engine.keys(&tokens);
        let matched = find(&engine, &keys);
        engine.check(&matched.device, &keys);
        engine.release(&matched.device);
        match matched.lease {
            None if matched.device.is_empty() => {
                let blocks = engine.compute(&keys);
                engine.release(&blocks);
            }
            None => {}
            Some(lease) => {
                let targets = engine.granted(matched.peer_blocks);
                // A source that is gone meanwhile is an answer.
                if let Ok(outcome) = engine.onboard(lease, &targets) {
                    assert_eq!(outcome.blocks_done, targets.len());
                    engine.check(&targets, &keys[matched.device.len()..]);
                    copied += targets.len();
                }
                engine.release(&targets);
            }
        }
        if round % 100 == 99 {
            manager.session_dead(engine.session);
            engine = Engine::attach_on(manager, false, device);
        }
    }
    manager.session_dead(engine.session);
    copied
}
