//! What the walk would take long to come upon, or would not judge.

use super::*;

/// A worker with namespace and pool, and `segments` of host memory.
fn small_world(segments: u32) -> World {
    let mut world = World::new(Quotas::default());
    (0..segments).for_each(|_| world.apply(&Op::Segment));
    world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: false });
    world
}

fn compute_chain(world: &mut World, n: u16) {
    for key in path(n) {
        world.apply(&Op::Grant(0, 1));
        world.compute(0, 0, key);
    }
}

fn offload_all(world: &mut World) {
    loop {
        world.plan(4);
        if world.offloads.is_empty() {
            break;
        }
        world.end_offload(0, true);
    }
}

#[test]
fn what_was_computed_is_found_in_host_by_another_worker() {
    let mut world = small_world(2);
    compute_chain(&mut world, 20);
    offload_all(&mut world);
    world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: false });
    world.find(1, 0, 20);
    assert_eq!(world.workers[1].leases.len(), 1);
    world.apply(&Op::Grant(1, 5));
    world.onboard(1, 5);
    world.end_onboard(0, true);
    world.find(1, 0, 20);
    assert_eq!(world.workers[1].leases.len(), 0, "now it is in the device");
    assert_eq!(world.workers[1].pins.len(), path(20).len());
}

#[test]
fn other_domains_and_other_namespaces_find_nothing() {
    let mut world = small_world(4);
    compute_chain(&mut world, 9);
    offload_all(&mut world);
    world.find(0, 1, 9);
    world.apply(&Op::NewWorker { model: 0, domain: 2, inherit: false });
    world.find(1, 0, 9);
    assert!(world.workers[0].leases.is_empty() && world.workers[1].leases.is_empty());
}

#[test]
fn an_unused_lease_ends_by_its_deadline_and_a_started_one_does_not() {
    let mut world = small_world(2);
    compute_chain(&mut world, 9);
    offload_all(&mut world);
    world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: false });
    world.find(1, 0, 9);
    world.find(1, 0, 9);
    world.apply(&Op::Grant(1, 4));
    world.onboard(1, 4);
    world.apply(&Op::Tick(1000));
    assert_eq!((world.ledger.leases(), world.ledger.tally().leases_expired), (0, 1));
    world.end_onboard(0, true);
    world.find(1, 0, 9);
    assert_eq!(world.workers[1].pins.values().sum::<u32>(), 8, "onboarded and found again");
}

#[test]
fn a_dead_workers_pool_waits_for_a_successor_with_its_blocks() {
    let mut world = small_world(0);
    compute_chain(&mut world, 9);
    let pool = world.workers[0].pool;
    world.apply(&Op::Kill(0));
    assert_eq!(world.ledger.pool(pool).unwrap().slots.counts().resident, 4);
    world.apply(&Op::NewWorker { model: 1, domain: 1, inherit: true });
    world.apply(&Op::NewWorker { model: 0, domain: 2, inherit: true });
    world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: true });
    let pools: Vec<PoolId> = world.workers.iter().map(|worker| worker.pool).collect();
    assert!(pools[0] != pool && pools[1] != pool && pools[2] == pool, "same model and domain only");
    world.find(2, 0, 9);
    assert_eq!(world.workers[2].pins.len(), 4);
}

#[test]
fn surplus_and_old_orphan_pools_go() {
    let mut world = small_world(0);
    for _ in 0..4 {
        world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: false });
        world.apply(&Op::Kill(0));
    }
    let living = world.workers.len();
    assert_eq!(world.ledger.pools().count(), living + 2);
    world.apply(&Op::Tick(1000));
    assert_eq!(world.ledger.pools().count(), living);
}

#[test]
fn full_host_is_an_answer() {
    let mut world = small_world(1);
    for (worker, key) in [(0, 2), (1, 3), (2, 0)] {
        world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: false });
        world.apply(&Op::Grant(worker, 2));
        path(key).into_iter().for_each(|key| world.compute(worker, worker % 2, key));
    }
    (0..8).for_each(|_| world.plan(4));
    // All four host slots are being filled: the rest waits, and goes when there is room.
    let planned: usize = world.offloads.iter().map(|(batch, _)| batch.copies().len()).sum();
    assert_eq!((planned, world.ledger.backlog()), (4, 1));
    while !world.offloads.is_empty() {
        world.end_offload(0, true);
    }
    offload_all(&mut world);
    assert_eq!((world.ledger.backlog(), world.ledger.tally().host_exhausted), (0, 0));
    world.ledger.check_integrity();
}

/// A chain longer than all of host memory: its head is kept, its tail is given up, and others are not held up.
#[test]
fn a_chain_that_host_can_never_hold_does_not_block_others() {
    let mut world = small_world(1);
    compute_chain(&mut world, 32);
    offload_all(&mut world);
    assert_eq!(world.ledger.backlog(), 0);
    assert!(world.ledger.tally().host_exhausted > 0);
    let id = world.workers[0].namespaces[0].1;
    let hashes: Vec<_> = path(32).into_iter().map(hash).collect();
    assert_eq!(
        world.ledger.find_prefix(world.workers[0].session, id, &hashes, Millis(0)).unwrap().host_blocks,
        4
    );
}

#[test]
fn without_a_host_tier_nothing_piles_up() {
    let mut world = small_world(0);
    world.ledger.set_segments(None);
    compute_chain(&mut world, 9);
    assert_eq!(world.ledger.backlog(), 0);
    let worker = &world.workers[0];
    let block = *worker.pins.keys().next().unwrap();
    let waiter = world.ledger.watch_offload(worker.session, worker.pool, &[block]).unwrap();
    let reports = world.ledger.take_arrivals();
    assert_eq!(reports, [(waiter, ArrivalReport { done: 0, failed: 1 })]);
}

/// Blocks that were committed before the first page was populated are not forgotten.
#[test]
fn blocks_wait_for_host_memory_that_is_still_being_populated() {
    let mut world = small_world(0);
    compute_chain(&mut world, 9);
    world.plan(4);
    assert_eq!((world.offloads.len(), world.ledger.backlog()), (0, 4));
    world.apply(&Op::Segment);
    offload_all(&mut world);
    assert_eq!(world.ledger.host_summaries()[0].counts.resident, 4);
}

/// While a load of the dead worker may still be written, its pool is given to nobody.
#[test]
fn a_pool_with_a_load_in_flight_is_not_inherited() {
    let mut world = small_world(2);
    compute_chain(&mut world, 9);
    offload_all(&mut world);
    world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: false });
    let pool = world.workers[1].pool;
    world.find(1, 0, 9);
    world.apply(&Op::Grant(1, 4));
    world.onboard(1, 4);
    world.apply(&Op::Kill(1));
    world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: true });
    assert_ne!(world.workers[1].pool, pool);
    world.end_onboard(0, true);
    world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: true });
    assert_eq!(world.workers[2].pool, pool);
}

#[test]
fn keys_that_are_no_prefix_are_not_found_beyond_what_is_one() {
    let mut world = small_world(0);
    compute_chain(&mut world, 0);
    let worker = &world.workers[0];
    let keys = [hash(1), hash(9), hash(0)];
    let matched = world.ledger.match_prefix(
        worker.session,
        worker.namespaces[0].1,
        &keys,
        Some(worker.pool),
        &[],
        Millis(0),
    );
    assert_eq!(matched.unwrap().device, []);
}

#[test]
fn ancestors_that_host_lost_go_along() {
    let mut world = small_world(1);
    compute_chain(&mut world, 4);
    let session = world.workers[0].session;
    let pool = world.workers[0].pool;
    offload_all(&mut world);
    // Another pool's blocks push the chain out of host.
    world.apply(&Op::NewWorker { model: 0, domain: 1, inherit: false });
    world.apply(&Op::Grant(1, 4));
    [0, 1, 3, 2].into_iter().for_each(|n| world.compute(1, 1, n));
    offload_all(&mut world);
    world.apply(&Op::Grant(0, 1));
    world.compute(0, 0, 8);
    offload_all(&mut world);
    let hashes: Vec<_> = path(8).into_iter().map(hash).collect();
    let id = world.workers[0].namespaces[0].1;
    assert_eq!(world.ledger.find_prefix(session, id, &hashes, Millis(0)).unwrap().host_blocks, 4);
    assert!(world.ledger.pool(pool).is_some());
}
